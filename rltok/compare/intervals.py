"""How sure a difference is: Student's t over seeds and over problems, and Holm's correction for many comparisons.

An arm has a table of S seeds by P problems, so has the baseline, with the same seeds and problems; D is their
difference. Its mean is uncertain for two reasons, and each gets an interval:

    over seeds      t interval of the S means of D over problems: would other seeds say the same?
    over problems   t interval of the P means of D over seeds: would other problems say the same?

A difference counts only if neither interval holds 0; its p value is the larger of the two (both must hold: an
intersection-union test, which needs no correction for being two). SciPy computes intervals and p values.

Source: scipy.stats.ttest_1samp; Holm 1979, A simple sequentially rejective multiple test procedure.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from rltok.config import ConfigError

Verdict = Literal["above", "below", "within noise", "undecided"]


@dataclass(frozen=True)
class Interval:
    """A mean and where it may lie; without `low` and `high` for a single value."""

    mean: float
    low: float | None
    high: float | None
    count: int
    """number of values"""
    p: float | None
    """two-sided p value of the mean being 0"""

    @property
    def excludes_zero(self) -> bool:
        """True if 0 lies outside; False without an interval."""
        return self.low is not None and self.high is not None and (self.low > 0 or self.high < 0)


@dataclass(frozen=True)
class Difference:
    """An arm minus the baseline on one task."""

    seeds: Interval
    """over seeds"""
    problems: Interval
    """over problems"""

    @property
    def mean(self) -> float:
        """Mean difference over seeds and problems."""
        return self.seeds.mean

    @property
    def p(self) -> float | None:
        """The larger of the two p values; None with a single seed or problem."""
        if self.seeds.p is None or self.problems.p is None:
            return None
        return max(self.seeds.p, self.problems.p)

    @property
    def verdict(self) -> Verdict:
        """`above` or `below` the baseline if neither interval holds 0; `undecided` with a single seed or problem."""
        if self.p is None:
            return "undecided"
        if not (self.seeds.excludes_zero and self.problems.excludes_zero):
            return "within noise"
        return "above" if self.mean > 0 else "below"


def t_interval(values: Sequence[float] | np.ndarray, level: float = 0.95) -> Interval:
    """Mean of independent values with Student's t interval.

    Args:
        values: (n,) numbers.
        level: probability that the interval holds the mean, in (0, 1).

    Returns:
        For n = 1 the value alone; equal values give an interval of width 0 and p = 0, or 1 where they are all 0.

    Raises:
        ValueError: no value, or one that is not finite.
    """
    found = np.asarray(values, dtype=float)
    if found.size == 0 or not np.isfinite(found).all():
        raise ValueError(f"an interval needs finite values, at least one; there are {found.size}: {found[:5]}")
    mean = float(found.mean())
    if found.size == 1:
        return Interval(mean, None, None, 1, None)
    if np.ptp(found) == 0:  # where SciPy's p is NaN; a mean of equal values would not be exactly their value
        value = float(found[0])
        return Interval(value, value, value, found.size, float(value == 0))
    result = _stats().ttest_1samp(found, 0.0)
    low, high = result.confidence_interval(level)
    return Interval(mean, float(low), float(high), found.size, float(result.pvalue))


def paired_difference(arm: np.ndarray, baseline: np.ndarray, level: float = 0.95) -> Difference:
    """Difference of two tables of the same seeds and problems.

    Args:
        arm: (S, P) metric of every problem in every run.
        baseline: (S, P) likewise, rows and columns in the same order.
        level: of both intervals.

    Raises:
        ValueError: shapes differ, or a value that is not finite.
    """
    if arm.shape != baseline.shape or arm.ndim != 2:
        raise ValueError(f"a pair needs equal (seeds, problems); got {arm.shape} and {baseline.shape}")
    difference = np.asarray(arm, dtype=float) - baseline
    return Difference(t_interval(difference.mean(axis=1), level), t_interval(difference.mean(axis=0), level))


def holm(p_values: Sequence[float | None]) -> list[float | None]:
    """P values adjusted for their number by Holm's step-down method: m p_(1), (m - 1) p_(2), ..., never falling, <= 1.

    None, which is no test, stays None and does not count. Example: 0.01, 0.04, 0.03 give 0.03, 0.06, 0.06.
    """
    places = sorted((i for i, p in enumerate(p_values) if p is not None), key=lambda i: p_values[i] or 0.0)
    adjusted: list[float | None] = [None] * len(p_values)
    largest = 0.0
    for rank, place in enumerate(places):
        largest = max(largest, min(1.0, (len(places) - rank) * (p_values[place] or 0.0)))
        adjusted[place] = largest
    return adjusted


def check_installed() -> None:
    """Raise ConfigError if the statistics cannot be computed here."""
    _stats()


def _stats() -> Any:
    try:
        from scipy import stats
    except ImportError:
        raise ConfigError("rltok compare needs SciPy for its intervals: pip install 'rltok[compare]'") from None
    return stats
