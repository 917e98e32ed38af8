"""H2O: the newest tokens, and of the others those that received most attention ("heavy hitters").

    score_j = sum over queries i >= j of A_ij        of the kept tokens; a dropped token's score is gone

mean over the query heads of a key-value head; a plain sum by default, as in the paper, which favours early tokens.

Source: arXiv 2306.14048; `H2OKVCache_LayerWise` of the official code, made right for batches and grouped heads.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from rltok.kv.attention import window_weights
from rltok.kv.policy import KVPolicy, LayerView, best_slots, newest

OBSERVE = ("all", "window")


@dataclass(frozen=True)
class H2O(KVPolicy):
    """Heavy hitters and a rolling window; `heavy=0` is a plain window."""

    heavy: int = 256
    """tokens kept for their score"""
    recent: int = 256
    """newest tokens that stay"""
    observe: Literal["all", "window"] = "all"
    """`all`: every query counts, as in the paper; `window`: the last `observed` queries before each cut, added up"""
    observed: int = 32
    """queries of the window"""
    normalise: bool = False
    """divide by the number of queries that could see the token"""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, least in (("heavy", 0), ("recent", 0), ("observed", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name}={getattr(self, name)} must be >= {least}")
        if self.heavy + self.recent < 1:
            raise ValueError(f"heavy={self.heavy} and recent={self.recent} keep nothing; raise one")
        if self.observe not in OBSERVE:
            raise ValueError(f"observe={self.observe!r}; allowed: {', '.join(OBSERVE)}")

    @property
    def accumulates(self) -> bool:
        """True where attention is added up as it happens, and no query needs to be kept."""
        return self.observe == "all" or self.interval is None or self.interval >= self.observed

    @property
    def span(self) -> int:
        """The last queries before a cut, with `observe: window`."""
        return self.observed if self.observe == "window" else 0

    @property
    def watched(self) -> int:
        """Queries kept where the window reaches back over earlier cuts."""
        return 0 if self.accumulates else self.observed

    @classmethod
    def of_budget(cls, budget: int, options: Mapping[str, Any]) -> dict[str, Any]:
        """Half for heavy hitters, half for the newest."""
        return {"heavy": budget - budget // 2, "recent": budget // 2}

    def kept(self, layer: int) -> int:
        """heavy + recent."""
        return self.heavy + self.recent

    def select(self, view: LayerView) -> Tensor:
        """The last `recent` slots and the `heavy` others of largest score."""
        score = view.score if self.accumulates else window_weights(view).sum(2)
        assert score is not None
        if self.normalise:
            seen = view.lengths[:, None, None] - view.positions
            if self.observe == "window":
                seen = seen.clamp(max=self.observed)
            score = score / seen.clamp(min=1).to(score.dtype)
        return best_slots(score, newest(view, self.recent), view.filled, view.budget)


def heavy_hitters(score: Tensor, heavy: int, recent: int) -> Tensor:
    """Indices kept of (S,) accumulated scores: the last `recent` and the `heavy` best of the others, ascending.

    All of them where `heavy + recent` is at least S.
    """
    size = score.numel()
    if heavy + recent >= size:
        return torch.arange(size, device=score.device)
    order = score[: size - recent].argsort(descending=True, stable=True)[:heavy]
    return torch.cat([order.sort().values, torch.arange(size - recent, size, device=score.device)])
