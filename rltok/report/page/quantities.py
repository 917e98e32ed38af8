"""What tokens can be coloured by: the quantities of the schema, and two that are read off them.

credit_share   credit / advantage of the completion: the weight of a token in its completion
mismatch       old_logp - sampler_logp, nats: 0 where learner and sampler agree
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from rltok.report.schema import quantities as recorded_quantities

FIRST = ("credit", "credit_used", "credit_share", "entropy", "ratio", "clipped")
"""Shown first, in this order."""
NEUTRAL = {"in_loss": 1, "kept": 1}
"""The value of a discrete quantity that stays uncoloured, where it is not 0."""
PALETTE = {-1: "blue", 0: "orange", 1: "orange", 2: "blue", 3: "purple"}
"""Value of a discrete quantity -> its colour, unless neutral."""
TAIL = 2.0
"""Percent of the values at either end that lie beyond the scale."""


@dataclass(frozen=True)
class Quantity:
    """One quantity of tokens and how it is coloured."""

    name: str
    label: str
    unit: str
    meaning: str
    kind: Literal["diverging", "sequential", "discrete"]
    centre: float | None = None
    log: bool = False
    values: tuple[tuple[int, str], ...] = ()
    of: tuple[str, ...] = ()
    """columns it is read off; empty: the column of its name"""

    @property
    def columns(self) -> tuple[str, ...]:
        """Columns of the sample files that it needs."""
        return self.of or (self.name,)


DERIVED = (
    Quantity(
        "credit_share",
        "credit / advantage",
        "",
        "credit of the token over the advantage of its completion",
        "diverging",
        centre=1.0,
        of=("credit", "advantage"),
    ),
    Quantity(
        "mismatch",
        "mismatch, learner - sampler",
        "nats",
        "log-probability of the token under the learner before the first update minus that under the sampler",
        "diverging",
        centre=0.0,
        of=("old_logp", "sampler_logp"),
    ),
)


def all_quantities() -> list[Quantity]:
    """Every quantity, those asked for most often first."""
    found = list(DERIVED)
    for column in recorded_quantities():
        scale = column.scale
        assert scale is not None
        found.append(
            Quantity(
                column.name,
                column.label,
                column.unit,
                column.meaning,
                scale.kind,
                scale.centre,
                scale.log,
                scale.values,
            )
        )
    return sorted(found, key=lambda quantity: FIRST.index(quantity.name) if quantity.name in FIRST else len(FIRST))


def derive(
    quantity: Quantity, columns: Mapping[str, NDArray[np.float64]], advantage: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Values (n,) of a quantity from its columns; `advantage` (n,) is that of the completion, at every token."""
    if quantity.name == "credit_share":
        safe = np.where(advantage == 0, np.nan, advantage)
        return columns["credit"] / safe
    if quantity.name == "mismatch":
        return columns["old_logp"] - columns["sampler_logp"]
    return columns[quantity.name]


@dataclass(frozen=True)
class Range:
    """The values between which a scale changes colour."""

    low: float
    high: float
    reverse: bool = False
    """strong colour at the low end: nothing lies above 0, and what is far from it matters"""


def scale_range(quantity: Quantity, parts: Iterable[NDArray[np.float64]]) -> Range:
    """The range that holds all but `TAIL` percent at either end of the values of every part.

    Symmetric about the centre of a diverging scale; never empty.
    """
    lows, highs = [], []
    for part in parts:
        finite = part[np.isfinite(part)]
        if quantity.log:
            finite = finite[finite > 0]
        if finite.size:
            low, high = np.percentile(finite, [TAIL, 100 - TAIL])
            lows.append(float(low))
            highs.append(float(high))
    if not lows:
        lows, highs = [0.0 if quantity.centre is None else quantity.centre], [1.0]
    low, high = min(lows), max(highs)
    if quantity.kind == "diverging":
        return _about(quantity.centre or 0.0, low, high, quantity.log)
    if quantity.kind == "sequential" and high <= 0 and low < 0:
        return Range(low, 0.0, reverse=True)
    if 0 < low < 0.1 * high:
        low = 0.0
    return Range(low, high if high > low else low + max(abs(low), 1.0) * 1e-3)


def _about(centre: float, low: float, high: float, log: bool) -> Range:
    if log:
        half = max(abs(math.log(low / centre)), abs(math.log(high / centre)), 1e-3)
        return Range(centre * math.exp(-half), centre * math.exp(half))
    half = max(abs(low - centre), abs(high - centre), 1e-6)
    return Range(centre - half, centre + half)


def place(quantity: Quantity, span: Range, value: float) -> float:
    """Where a value lies on the scale, 0 at its low colour to 1 at its high colour; beyond the range it is cut."""
    low, high = span.low, span.high
    if quantity.log:
        low, high = math.log(low), math.log(high)
        value = math.log(value) if value > 0 else low
    share = min(max((value - low) / (high - low), 0.0), 1.0)
    return 1 - share if span.reverse else share


def as_json(quantity: Quantity, span: Range) -> dict[str, Any]:
    """What the page's script needs to know of a quantity."""
    neutral = NEUTRAL.get(quantity.name, 0)
    swatches = [
        {"value": value, "text": text, "color": None if value == neutral else PALETTE[value]}
        for value, text in quantity.values
    ]
    return asdict(quantity) | {"values": swatches, "low": span.low, "high": span.high, "reverse": span.reverse}
