"""StreamingLLM: the first tokens of a row, which attention uses as a sink, and a window of the newest ones.

Kept of n > sink + recent tokens: 0 .. sink-1 and n-recent .. n-1. Nothing is watched, so attention stays as it is.

Source: arXiv 2309.17453, Sec. 3.2; `StartRecentKVCache` of the official code.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rltok.kv.policy import KVPolicy, LayerView


@dataclass(frozen=True)
class StreamingLLM(KVPolicy):
    """Attention sinks and a rolling window; `sink + recent` at or above the row's length is dense attention."""

    sink: int = 4
    """first tokens of a row that stay for ever; 0 is a plain window"""
    recent: int = 508
    """newest tokens that stay"""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.sink < 0:
            raise ValueError(f"sink={self.sink} must be >= 0")
        if self.recent < 1:
            raise ValueError(f"recent={self.recent} must be >= 1")

    @classmethod
    def of_budget(cls, budget: int, options: Mapping[str, Any]) -> dict[str, Any]:
        """The window takes what the sinks leave."""
        return {"recent": budget - options.get("sink", cls.sink)}

    def kept(self, layer: int) -> int:
        """sink + recent."""
        return self.sink + self.recent

    def select(self, view: LayerView) -> Tensor:
        """The row's first `sink` slots and its last `recent`."""
        rows, heads, width, _ = view.keys.shape
        first = width - view.counts[:, None] + torch.arange(self.sink, device=view.keys.device)
        last = torch.arange(width - self.recent, width, device=view.keys.device).expand(rows, -1)
        return torch.cat([first, last], 1)[:, None].expand(-1, heads, -1)
