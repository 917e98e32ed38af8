"""Logged metrics as panels of curves: which metric belongs where, thinned to what a screen can show, and packed."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from rltok.report.page.encode import pack_floats

MAX_VALUES = 600_000
"""Values of all curves of a page; above it every run shows fewer points."""
MIN_POINTS = 100
"""Points per curve that are always shown."""


@dataclass(frozen=True)
class Panel:
    """One chart: metrics that share a vertical axis."""

    key: str
    title: str
    unit: str
    series: tuple[tuple[str, str], ...]
    """(regular expression of the whole metric name, label); groups of the expression fill the label"""
    note: str = ""


PANELS = (
    Panel("reward", "Reward", "", (("reward", "weighted sum"),), "mean over the batch"),
    Panel(
        "accuracy",
        "Strict and lenient accuracy",
        "",
        ((r"rewards/([^/]*strict[^/]*)/mean", r"\1"), (r"rewards/([^/]*lenient[^/]*)/mean", r"\1")),
        "share of the sampled completions in training; held-out accuracy stands below",
    ),
    Panel("rewards", "Other reward functions", "", ((r"rewards/((?!.*(?:strict|lenient))[^/]+)/mean", r"\1"),)),
    Panel("length", "Completion length", "tokens", ((r"completions/mean_length", "mean"),)),
    Panel("cut", "Completions cut at the length limit", "share", ((r"completions/clipped_ratio", "cut"),)),
    Panel(
        "entropy",
        "Entropy",
        "nats",
        (
            ("entropy", "mean"),
            (r"entropy[_/](?:top_?20|p80|q80|quantile_?80|top20_quantile)\w*", "top-20 % quantile"),
        ),
    ),
    Panel(
        "credit",
        "Credit concentration",
        "share",
        (
            (r"credit/top20_share", "of |credit| in the top 20 % of tokens"),
            (r"credit/nonzero_share", "tokens with any"),
        ),
    ),
    Panel(
        "clip",
        "Clipped tokens",
        "share",
        (
            (r"clip_ratio/region_mean", "either bound"),
            (r"clip_ratio/low_mean", "lower"),
            (r"clip_ratio/high_mean", "upper"),
        ),
    ),
    Panel(
        "kl",
        "Sampler / learner mismatch: KL",
        "nats",
        (
            (r"correction/k3", "k3 estimate"),
            (r"correction/k1", "k1 estimate"),
            (r"sampling/sampling_logp_difference/mean", "|log-probability difference|"),
        ),
    ),
    Panel(
        "mismatch",
        "Sampler / learner mismatch: ratio and sample size",
        "",
        (
            (r"correction/ratio_mean", "mean ratio"),
            (r"correction/ess", "effective sample size (share)"),
            (r"sampling/importance_sampling_ratio/mean", "mean ratio (TRL)"),
        ),
    ),
    Panel("ratio", "Ratio learner / old", "", (("ratio", "mean"),)),
    Panel(
        "time",
        "Time by phase",
        "s",
        (
            (r"(?:profiling|time|times|timing|phase|phases|seconds)/(?:Time taken: )?(?:\w+Trainer\.)?(.+)", r"\1"),
            (r"(?!seconds$)(?:(\w+)/)?(step_time|\w*seconds)", r"\1 \2"),
        ),
        "seconds, as logged per step",
    ),
    Panel("speed", "Tokens per second", "tokens/s", ((r"(?:(\w+)/)?tokens_per_second", r"\1"),)),
    Panel(
        "tokens",
        "Tokens by phase",
        "tokens",
        (
            (r"selection/tokens_(\w+)", r"\1 per update"),
            (r"tokens/(?!generated$)(\w+)", r"\1"),
            (r"rollout/prefill_tokens", "prompt tokens computed"),
        ),
    ),
    Panel("loss", "Loss", "", (("loss", "loss"),)),
    Panel("gradient", "Gradient norm", "", (("grad_norm", "norm"),)),
)

GENERATED = (
    ("generated_tokens", "generated tokens"),
    ("tokens/generated", "generated tokens"),
    ("num_tokens", "generated tokens (with their prompts)"),
)
"""Metric that counts generated tokens since the start -> what it says; the first that all runs have is used."""


@dataclass(frozen=True)
class Axis:
    """A choice of the horizontal axis."""

    key: str
    label: str
    metric: str


def axes(names: Sequence[set[str]]) -> list[Axis]:
    """The horizontal axes that runs with these metrics can share."""
    common = set.intersection(*names) if names else set()
    found = [Axis("step", "optimizer steps", "step")]
    found += [Axis("generated", label, metric) for metric, label in GENERATED if metric in common][:1]
    if "trained_tokens" in common:
        found.append(Axis("trained", "trained tokens", "trained_tokens"))
    if "seconds" in common:
        found.append(Axis("seconds", "wall-clock, seconds", "seconds"))
    return found


def panels(names: set[str]) -> list[dict[str, Any]]:
    """The panels that have something to show, with the metrics found for each."""
    found = []
    for panel in PANELS:
        series: dict[str, str] = {}
        for pattern, label in panel.series:
            for name in sorted(names):
                match = re.fullmatch(pattern, name)
                if match and name not in series:
                    series[name] = " ".join(match.expand(label).split()).replace("_", " ") or name
        if series:
            listed = [{"metric": name, "label": label} for name, label in series.items()]
            found.append(
                {"key": panel.key, "title": panel.title, "unit": panel.unit, "note": panel.note} | {"series": listed}
            )
    return found


@dataclass(frozen=True)
class RunCurves:
    """The curves of one run, packed."""

    metrics: list[str]
    points: int
    logged: int
    """logged steps; more than `points` when thinned"""
    block: str
    """metric by metric, `points` floats each"""

    def as_json(self) -> dict[str, Any]:
        """For the page's script."""
        return {"metrics": self.metrics, "points": self.points, "logged": self.logged, "block": self.block}


def numeric(metrics: pd.DataFrame | None) -> pd.DataFrame:
    """The metrics that are numbers, each with at least one; ordered by step."""
    if metrics is None or len(metrics) == 0 or "step" not in metrics:
        return pd.DataFrame()
    table = metrics.apply(pd.to_numeric, errors="coerce").sort_values("step", kind="stable")
    return table.loc[:, table.notna().any()].reset_index(drop=True)


def pack_curves(table: pd.DataFrame, max_points: int) -> RunCurves:
    """Curves of one run, with at most about `max_points` points: then means of adjacent logged steps.

    Counters take their last value. The last logged step always ends the curve.
    """
    logged = len(table)
    if logged > max_points:
        table = _thinned(table, max_points)
    filled = table.copy()
    for name in ("num_tokens", "trained_tokens", "generated_tokens", "tokens/generated"):
        if name in filled:
            filled[name] = filled[name].ffill()
    names = [str(name) for name in filled.columns]
    block = pack_floats(np.concatenate([filled[name].to_numpy(np.float64) for name in names])) if names else ""
    return RunCurves(names, len(filled), logged, block)


_COUNTERS = frozenset({"step", "seconds", "epoch", "trained_tokens", *(metric for metric, _ in GENERATED)})


def _thinned(table: pd.DataFrame, points: int) -> pd.DataFrame:
    bins = np.arange(len(table)) * points // len(table)
    how: dict[Any, Any] = {name: "last" if name in _COUNTERS else "mean" for name in table.columns}
    return table.groupby(bins, sort=True).agg(how).reset_index(drop=True)


def points_for(tables: Sequence[pd.DataFrame], max_points: int) -> int:
    """Points per curve so that all curves of the page stay within `MAX_VALUES`."""
    metrics = sum(table.shape[1] for table in tables)
    return max(min(max_points, MAX_VALUES // max(metrics, 1)), MIN_POINTS)
