"""R-KV: keep what the newest queries attend to and what no later key repeats.

    score = lam importance - (1 - lam) redundancy

importance   logits of the window's queries, the largest of a group's heads, softmax over the keys before the window,
             mean over the window, max-pooled
redundancy   cosine similarity of keys, diagonal 0; in each row the most recent key above the threshold is forgiven (in
             a row without one, the first key); mean over rows, softmax over keys

Source: arXiv 2505.24133; the official code computes the redundancy of row 0 for all rows, which this does not.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import max_pool1d, normalize

from rltok.kv.policy import KVPolicy, LayerView, best_slots, newest
from rltok.kv.snap_kv import check_window

ROWS = 512
"""keys whose similarity to all others is held at once"""


@dataclass(frozen=True)
class RKV(KVPolicy):
    """Importance less redundancy; `lam=1` is importance alone."""

    interval: int | None = field(default=128, kw_only=True)
    """generated tokens of a row between two cuts"""
    budget: int = 1024
    """tokens kept, window included"""
    window: int = 8
    """newest queries that are looked at; their tokens stay"""
    lam: float = 0.1
    """weight of importance against redundancy, 0 to 1"""
    threshold: float = 0.5
    """cosine above which a key repeats another"""
    kernel: int = 7
    """width of the max pooling, odd"""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_window(self.budget, self.window, self.kernel, "budget")
        if not 0 <= self.lam <= 1:
            raise ValueError(f"lam={self.lam} must be in 0..1")

    @property
    def watched(self) -> int:
        """Queries that are looked at."""
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
        window = newest(view, self.window)
        importance = window_importance(view, window, self.kernel)
        repeated = redundancy(view.keys, view.filled[:, 0], self.threshold)
        score = self.lam * importance - (1 - self.lam) * repeated
        return best_slots(score, window, view.filled, view.budget)


def window_importance(view: LayerView, window: Tensor, kernel: int) -> Tensor:
    """(B, Hkv, S) attention of the newest queries over what lies before them, max-pooled."""
    assert view.queries is not None
    rows, heads, count, size = view.queries.shape
    groups = heads // view.keys.size(1)
    packed = view.queries.reshape(rows, -1, groups * count, size).float()
    logits = (packed @ view.keys.float().transpose(-1, -2)) * view.scaling
    logits = logits.view(rows, -1, groups, count, view.keys.size(2)).amax(2)
    before = view.filled & ~window
    weights = logits.masked_fill(~before[:, :, None], -torch.inf).softmax(-1)
    return max_pool1d(weights.mean(2), kernel, stride=1, padding=kernel // 2)


def redundancy(keys: Tensor, filled: Tensor, threshold: float = 0.5) -> Tensor:
    """How much each key repeats others.

    Args:
        keys: (B, Hkv, S, D).
        filled: (B, S) True where a slot holds a token, the last ones.
        threshold: cosine above which a key repeats another.

    Returns:
        (B, Hkv, S) softmax over the row's slots, 0 where there is none.

    Example: keys (1, 0), (0, 1), (1, 0.1), (0.7, 0.7) give 0.301941, 0.241374, 0.259390, 0.197294.
    """
    unit = normalize(keys.float(), dim=-1)
    width = keys.size(2)
    column = torch.arange(width, device=keys.device)
    first = (width - filled.sum(1))[:, None, None]
    total = unit.new_zeros(unit.shape[:3])
    for start in range(0, width, ROWS):  # never all pairs of a long prompt at once
        rows = slice(start, start + ROWS)
        similar = unit[:, :, rows] @ unit.transpose(-1, -2)
        real = filled[:, None, rows, None] & filled[:, None, None, :]
        similar = similar.masked_fill(~real | (column[rows, None] == column), 0.0)
        latest = torch.where(similar > threshold, column, -1).amax(-1)
        forgiven = torch.where(latest < 0, first, latest)
        total += similar.scatter(-1, forgiven[..., None], 0.0).sum(-2)
    mean = total / filled.sum(1)[:, None, None]
    return mean.masked_fill(~filled[:, None], -torch.inf).softmax(-1)
