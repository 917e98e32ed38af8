"""What a cache policy decides: how many slots a layer keeps, when it looks, and which tokens stay.

Legend: B rows, H query heads, Hkv key-value heads, G = H / Hkv, S slots, C budget, D head size, w newest queries.
Slots are in the order of their tokens; a row that holds fewer than S has them at the right end.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

if TYPE_CHECKING:
    from rltok.fast.cache import Size
    from rltok.kv.layer import PolicyLayer
    from rltok.kv.slots import Slots

Positions = Literal["original", "cache"]
POSITIONS: tuple[str, ...] = ("original", "cache")


@dataclass(frozen=True)
class LayerView:
    """What a policy sees of one layer when it chooses; every row holds more than the budget."""

    index: int
    """of the layer in the model"""
    budget: int
    """C, slots to keep"""
    keys: Tensor
    """(B, Hkv, S, D) as the model rotated them"""
    values: Tensor
    """(B, Hkv, S, D)"""
    positions: Tensor
    """(B, Hkv, S) int32 number of the slot's token in its row, 0 for the first; -1 where there is none"""
    counts: Tensor
    """(B,) slots in use, the last ones"""
    lengths: Tensor
    """(B,) tokens of the row so far"""
    scaling: float
    """of queries times keys"""
    score: Tensor | None = None
    """(B, Hkv, S) float32 attention received so far, mean over the group's query heads; only if the policy asks"""
    queries: Tensor | None = None
    """(B, H, w, D) newest queries, the last one that of the newest token; only if the policy asks"""

    @property
    def filled(self) -> Tensor:
        """(B, 1, S) True where a slot holds a token."""
        width = self.keys.size(2)
        return (torch.arange(width, device=self.counts.device) >= width - self.counts[:, None])[:, None]

    @property
    def query_positions(self) -> Tensor:
        """(B, w) number of each newest query's token in its row; negative where the row has none."""
        assert self.queries is not None
        back = torch.arange(self.queries.size(2) - 1, -1, -1, device=self.lengths.device)
        return self.lengths[:, None] - 1 - back


@dataclass(frozen=True, kw_only=True)
class KVPolicy:
    """Base of all policies: subclasses say `kept` and `select`, and set what they need to see.

    A layer is cut to its budget after the prompt and after every `interval` generated tokens of a row, whatever the
    row's neighbours do. Between cuts it holds up to `budget + interval` tokens.
    """

    interval: int | None = 64
    """generated tokens of a row between two cuts; None: the prompt alone is cut"""
    positions: Positions = "original"
    """`original`: keys stay as rotated; `cache`: kept tokens get consecutive positions"""

    def __post_init__(self) -> None:
        if self.interval is not None and self.interval < 1:
            raise ValueError(f"interval={self.interval} must be >= 1, or None to cut the prompt alone")
        if self.positions not in POSITIONS:
            raise ValueError(f"positions={self.positions!r}; allowed: {', '.join(POSITIONS)}")

    @property
    def watched(self) -> int:
        """Newest queries that are kept for `select`."""
        return 0

    @property
    def accumulates(self) -> bool:
        """True if the attention of queries is added to `score`."""
        return False

    @property
    def span(self) -> int:
        """If it is added: only that of the last so many queries before a cut, at most `interval`; 0: of every query."""
        return 0

    @property
    def needs_queries(self) -> bool:
        """True if attention must be watched."""
        return self.watched > 0 or self.accumulates

    @classmethod
    def of_budget(cls, budget: int, options: Mapping[str, Any]) -> dict[str, Any]:
        """Options that keep `budget` tokens in a layer, beside the given ones."""
        raise ValueError(f"budget={budget} cannot be set for {cls.__name__}; set its own options")

    def check_model(self, config: Any) -> None:
        """Refuse a model, by its configuration, that the policy's own options do not fit."""

    def kept(self, layer: int) -> int:
        """Slots of a row that a layer keeps at a cut."""
        raise NotImplementedError

    def kept_by_length(self, layer: int) -> Callable[[int], int] | None:
        """Slots of a row with so many tokens, at least `kept`, where a longer row keeps more; None: always `kept`.

        The same for layers of equal `kept`. Where there is one, `make_layer` must give a layer that can cut that way.
        """
        return None

    def select(self, view: LayerView) -> Tensor:
        """(B, Hkv, C) indices of the slots to keep, ascending."""
        raise NotImplementedError

    def make_layer(self, index: int, heads: int, slots: Slots, block: int, size: Size) -> PolicyLayer | None:
        """A layer of the model that keeps what this policy keeps; None: every token, the layer stays dense.

        Args:
            index: of the layer in the model.
            heads: key-value heads.
            slots: counts of the rows, shared by all layers of one budget.
            block: columns by which buffers grow.
            size: counts bytes.
        """
        from rltok.kv.layer import PolicyLayer  # which itself knows policies

        if self.kept_by_length(index) is not None:
            raise NotImplementedError(f"{type(self).__name__} keeps more of longer rows: override make_layer as well")
        return PolicyLayer(index, self, slots, block, size)


def best_slots(score: Tensor, protected: Tensor, filled: Tensor, count: int) -> Tensor:
    """The protected slots and the best of the others, `count` in all.

    Args:
        score: (B, Hkv, S); ties go to the older token.
        protected: (B, 1 or Hkv, S) bool; at most `count` in a row.
        filled: (B, 1, S) bool.

    Returns:
        (B, Hkv, count) slot indices, ascending.
    """
    ranked = score.float().masked_fill(protected, torch.inf).masked_fill(~filled, -torch.inf)
    order = ranked.argsort(dim=-1, descending=True, stable=True)
    return order[..., :count].sort(dim=-1).values


def newest(view: LayerView, count: int) -> Tensor:
    """(1, 1, S) True for the last `count` slots."""
    width = view.keys.size(2)
    return (torch.arange(width, device=view.keys.device) >= width - count)[None, None]


def oldest(view: LayerView, count: int) -> Tensor:
    """(B, 1, S) True for the first `count` slots that hold a token."""
    width = view.keys.size(2)
    place = torch.arange(width, device=view.keys.device) - (width - view.counts[:, None])
    return ((place >= 0) & (place < count))[:, None]
