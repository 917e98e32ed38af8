"""SnapKV: the last queries of the prompt vote for the tokens before them.

    score = average-pool(sum over the window of softmax(q k)), window columns left out, mean over the group's heads

The paper cuts the prompt alone; with `interval` the newest queries vote again while tokens are generated.

Source: arXiv 2404.14469; the official code keeps one set per query head, which grouped heads cannot.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor
from torch.nn.functional import avg_pool1d

from rltok.kv.attention import window_weights
from rltok.kv.policy import KVPolicy, LayerView, best_slots, newest


@dataclass(frozen=True)
class SnapKV(KVPolicy):
    """The window and the tokens that it attends to."""

    interval: int | None = field(default=None, kw_only=True)
    """generated tokens of a row between two cuts; None, as in the paper: the prompt alone is cut"""
    budget: int = 2048
    """tokens kept, window included"""
    window: int = 32
    """newest queries that are looked at; their tokens stay"""
    kernel: int = 5
    """width of the average pooling, odd"""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_window(self.budget, self.window, self.kernel, "budget")

    @property
    def watched(self) -> int:
        """Queries that vote."""
        return self.window

    @classmethod
    def of_budget(cls, budget: int, options: Mapping[str, Any]) -> dict[str, Any]:
        """All of it."""
        return {"budget": budget}

    def kept(self, layer: int) -> int:
        """budget."""
        return self.budget

    def select(self, view: LayerView) -> Tensor:
        """The window's slots and the best others."""
        score = pooled_votes(window_weights(view), newest(view, self.window), self.kernel)
        return best_slots(score, newest(view, self.window), view.filled, view.budget)


def pooled_votes(weights: Tensor, window: Tensor, kernel: int) -> Tensor:
    """(B, N, w, S) attention of the window -> (B, N, S) its sum, 0 in the window's own slots, average-pooled.

    Slots without a token count as 0, as does what lies outside.
    """
    votes = weights.sum(2).masked_fill(window, 0.0)
    return avg_pool1d(votes, kernel, stride=1, padding=kernel // 2)


def check_window(budget: int, window: int, kernel: int, name: str) -> None:
    """Raise ValueError for a window that does not fit."""
    if window < 1:
        raise ValueError(f"window={window} must be >= 1")
    if budget <= window:
        raise ValueError(f"{name}={budget} must be above window={window}, whose tokens always stay")
    if kernel < 1 or kernel % 2 == 0:
        raise ValueError(f"kernel={kernel} must be odd and >= 1")
