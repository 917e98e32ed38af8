"""How the two cuts of D3S relax: one ramp for rows and tokens over a part of training.

    [N_p, K_p] = (1 - f(p)) [N_init, K_init] + f(p) [N_final, K_final]     p = min(1, step / total_steps)

    linear   f(p) = p                         the paper's
    cosine   f(p) = (1 - cos(pi p)) / 2       slow at both ends
    step     f(p) = 0 before p = 1, then 1    the start values, then the end values

Source: arXiv 2509.22115, Sec. 3.3. Rounding of N (half up), the clock (optimizer steps) and the other shapes are ours.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

Shape = Literal["linear", "cosine", "step"]
SHAPES: tuple[str, ...] = ("linear", "cosine", "step")


@dataclass(frozen=True)
class D3SSchedule:
    """Rows and share of tokens to keep at a step; a pure function of the step, so that resuming needs no state.

    Example: N 4 -> 16 and K 0.1 -> 1 give (4, 0.1), (7, 0.325), (10, 0.55), (16, 1.0) at p = 0, 0.25, 0.5, 1.
    """

    n_init: float
    """rows at the start; may be a fraction of a row, the value at a step is rounded"""
    n_final: float
    """rows at the end; both at or above the number of rows: no selection"""
    k_init: float
    """share of tokens at the start, in (0, 1]"""
    k_final: float
    """share of tokens at the end; both 1: no selection"""
    total_steps: float
    """steps until the end values are reached"""
    shape: Shape = "linear"
    """how the values move between start and end"""

    def __post_init__(self) -> None:
        for name in ("n_init", "n_final"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}={getattr(self, name)} must be >= 0")
        for name in ("k_init", "k_final"):
            if not 0.0 < getattr(self, name) <= 1.0:
                raise ValueError(f"{name}={getattr(self, name)} is not in (0, 1]")
        if self.shape not in SHAPES:
            raise ValueError(f"shape={self.shape!r} is unknown; allowed: {', '.join(SHAPES)}")

    def at(self, step: int) -> tuple[int, float]:
        """(rows, share of tokens) at an optimizer step, counted from 0."""
        p = min(1.0, max(0, step) / max(1, self.total_steps))
        if self.shape == "cosine":
            p = (1 - math.cos(math.pi * p)) / 2
        elif self.shape == "step":
            p = float(p >= 1)
        rows = _between(self.n_init, self.n_final, p)
        return math.floor(rows + 0.5 + 1e-9), _between(self.k_init, self.k_final, p)


def _between(start: float, end: float, p: float) -> float:
    """(1 - p) start + p end, exactly constant when both are equal."""
    return end if p >= 1 else start + p * (end - start)
