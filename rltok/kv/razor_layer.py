"""One attention layer under RazorAttention: heads that keep every token, and heads that keep a part and a mean.

Full heads are stored like a dense layer (`BlockLayer`), the others like any layer under a policy: slots of a row at the
right end, in the order of their tokens. After a cut a row's slots are

    sink first tokens | compensation token | newest tokens

The compensation token stands for what the row does not hold, itself included: N_d = length - slots + 1 tokens. That is
1 before the first cut, when the slot is an ordinary token and log N_d = 0, so no row needs a flag. Sums over the
dropped tokens are kept in float32 beside the slots, which hold the mean in the cache's dtype.

Attention is one call for each group. The other heads need a bias, which flash attention does not have: they take sdpa.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from rltok.fast.cache import BlockLayer, KeysValues, Size
from rltok.kv.attention import MARK
from rltok.kv.layer import PolicyLayer
from rltok.kv.slots import Slots

if TYPE_CHECKING:
    from rltok.kv.razor_attention import RazorAttention

SUMMED = ("keys", "values")


class RazorLayer(PolicyLayer):
    """A layer with some full heads, or none.

    Args:
        index, policy, slots, block, size: as for `PolicyLayer`; slots are those of the heads that are cut.
        full: key-value heads that keep every token, ascending; not all.
        heads: key-value heads.
    """

    policy: RazorAttention

    def __init__(
        self,
        index: int,
        policy: RazorAttention,
        slots: Slots,
        block: int,
        size: Size,
        full: Sequence[int],
        heads: int,
    ) -> None:
        super().__init__(index, policy, slots, block, size)
        self.heads, self.full_heads = heads, tuple(full)
        self.cut_heads = tuple(head for head in range(heads) if head not in self.full_heads)
        grouped = self.full_heads + self.cut_heads
        self._ranks = tuple(grouped.index(head) for head in range(heads))
        """of the model's heads in the order full, cut"""
        self.full: BlockLayer | None = None
        """every token of the full heads, once the prompt is complete; None without such heads"""
        self.sums: dict[str, Tensor] = {}
        """(rows, cut heads, D) sums over the dropped keys and values, if they are compensated"""
        self._places: dict[tuple[Any, ...], Tensor] = {}

    # ---- what transformers asks

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> KeysValues:
        """Take in (rows, Hkv, q, D) states -> those of the heads that are cut, marked for the wrapper."""
        if self.slots.in_prompt:
            return super().update(key_states, value_states)
        if self.full is not None:
            self.full.update(self._of(key_states, self.full_heads), self._of(value_states, self.full_heads))
        keys, values = self._append(self._of(key_states, self.cut_heads), self._of(value_states, self.cut_heads))
        setattr(keys, MARK, self)
        return keys, values

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """All columns: transformers' mask is that of the full heads."""
        return self.slots.seen + query_length, 0

    # ---- what the wrapper asks

    def attend(
        self,
        attention: Callable[..., Any],
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        given: Any,
        flash: bool,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        """Attention of the two groups, in the order of the model's heads."""
        if self.slots.in_prompt:
            return attention(module, query, key, value, given, *args, **kwargs)
        groups = query.size(1) // self.heads
        biased = ALL_ATTENTION_FUNCTIONS["sdpa"] if flash else attention
        part = self._of(query, self.cut_heads, groups)
        output, *rest = biased(module, part, key, value, self._bias(given, query), *args, **kwargs)
        if self.full is None:
            return output, *rest
        keys, values = self.full.held()
        part = self._of(query, self.full_heads, groups)
        whole = attention(module, part, keys, values, given, *args, **kwargs)[0]
        joined = torch.cat([whole, output], 2)  # (B, q, H, D)
        return joined.index_select(2, self._place(self._ranks, groups, query.device)), *rest

    def _bias(self, given: Any, query: Tensor) -> Any:
        """Mask of the heads that are cut, with log N_d where a row has a compensation token."""
        if not self.policy.compensate or not self.slots.has_merged:
            return self.mask(given, query, flash=False)
        dtype = query.dtype
        if query.device.type == "cpu":  # other kernels want the queries' dtype: bfloat16 changes N_d by up to 3 %
            dtype = torch.promote_types(dtype, torch.float32)
        return self.slots.bias(query.size(2), self.policy.sink, dtype, query.device)

    def _of(self, states: Tensor, heads: tuple[int, ...], groups: int = 1) -> Tensor:
        """(B, n, q, D) of (B, H, q, D): some key-value heads, or the query heads of them."""
        if len(heads) == self.heads:
            return states
        return states.index_select(1, self._place(heads, groups, states.device))

    def _place(self, heads: tuple[int, ...], groups: int, device: torch.device) -> Tensor:
        """Indices of the heads, each `groups` query heads."""
        key = (heads, groups, str(device))
        if key not in self._places:
            places = [head * groups + group for head in heads for group in range(groups)]
            self._places[key] = torch.tensor(places, device=device)
        return self._places[key]

    # ---- cuts

    def finish_prompt(self) -> None:
        """The prompt is complete: full heads keep it, the others what they keep of it."""
        assert self.prompt is not None
        prompt, self.prompt = self.prompt, None
        keys, values = prompt.held()
        rows, _, width, _ = keys.shape
        if self.full_heads:
            self.full = BlockLayer(rows, self.block, size=self.size)
            self.full.update(self._of(keys, self.full_heads), self._of(values, self.full_heads))
        column = torch.arange(width, device=keys.device, dtype=torch.int32)
        number = (column - self.slots.padding(keys.device)[:, None].to(torch.int32)).clamp(min=-1)
        self.tracks = {
            "keys": self._of(keys, self.cut_heads),
            "values": self._of(values, self.cut_heads),
            "positions": number[:, None].repeat(1, len(self.cut_heads), 1),
        }
        self.start, self.end = 0, width
        if self.policy.compensate:
            self._hold_sums({name: self._no_sums(self.tracks[name]) for name in SUMMED})
        copied = sum(track.nbytes for name, track in self.tracks.items() if self.full_heads or name == "positions")
        self._fold(self.slots.over_budget)
        after = max(min(self.slots.count(row), self.slots.budget_of(row)) for row in range(rows))
        self.tracks = {name: track[:, :, width - after :].clone() for name, track in self.tracks.items()}
        self.end = after
        held = sum(track.nbytes for track in self.tracks.values())
        self.size.beside(copied + held)
        self.size.now += held - prompt.keys.nbytes - prompt.values.nbytes

    def _cut(self, due: Sequence[int]) -> None:
        """Cut rows; if all are, what is left moves to the front of the buffer."""
        self._fold(due)
        rows, width = self.slots.rows, self.slots.width_after
        if len(due) < rows:
            return
        for track in self.tracks.values():
            front = track[:rows, :, self.end - width : self.end]
            if self.end - width < width:
                front = front.clone()
                self.size.beside(front.nbytes)
            track[:rows, :, :width] = front
        self.start, self.end = 0, width

    def _fold(self, over: Sequence[int]) -> None:
        """Cut rows in place; rows that lose the same slots share the work."""
        alike: dict[tuple[int, int, bool], list[int]] = {}
        for row in over:
            count = self.slots.count(row)
            gone = count - self.slots.budget_of(row)
            alike.setdefault((count, gone, self.slots.weight(row) > 1), []).append(row)
        for (count, gone, merged), rows in alike.items():
            self._fold_alike(rows, count, gone, merged)

    def _fold_alike(self, rows: Sequence[int], count: int, gone: int, merged: bool) -> None:
        """Rows of `count` slots lose `gone`: what is left of the window moves next to it."""
        keys = self.tracks["keys"]
        every = len(rows) == self.slots.rows
        place: Any = slice(len(rows)) if every else torch.tensor(rows, device=keys.device)
        first = self.end - count
        middle = first + self.policy.sink  # the compensation token, or the first token to go
        if self.policy.compensate:
            weights = torch.tensor([self.slots.weight(row) + gone for row in rows], device=keys.device)
            for name in SUMMED:
                track, sums = self.tracks[name], self.sums[name]
                lost = track[place, :, middle + merged : middle + gone + 1].sum(2, dtype=sums.dtype)
                sums[place] = sums[place] + lost
                track[place, :, middle + gone] = (sums[place] / weights[:, None, None]).to(track.dtype)
            self.tracks["positions"][place, :, middle + gone] = -1
        for track in self.tracks.values():
            track[place, :, first + gone : middle + gone] = track[place, :, first:middle].clone()

    def _no_sums(self, track: Tensor) -> Tensor:
        rows, heads, _, size = track.shape
        return track.new_zeros(rows, heads, size, dtype=torch.promote_types(track.dtype, torch.float32))

    def _hold_sums(self, sums: dict[str, Tensor]) -> None:
        for name, new in sums.items():
            old = self.sums.get(name)
            self.size.now += new.nbytes - (0 if old is None else old.nbytes)
            self.sums[name] = new

    # ---- rows come and go

    def of_row(self, row: int, length: int) -> tuple[Tensor, ...]:
        """Views of what is held of a row: its tracks, its full heads' newest `length` tokens, its sums."""
        full = () if self.full is None else self.full.of_row(row, length)
        return (*super().of_row(row, length), *full, *(self.sums[name][row] for name in SUMMED if self.sums))

    def insert(self, entries: Sequence[tuple[Tensor, ...]], copies: Sequence[int]) -> None:
        """New rows behind the others; `slots` knows of them already."""
        super().insert(entries, copies)
        at = len(self._names)
        if self.full_heads:
            if self.full is None:
                self.full = BlockLayer(0, self.block, size=self.size)
            self.full.reserve = self.reserve
            self.full.insert([entry[at : at + 2] for entry in entries], copies, self.slots.seen)
        if not self.policy.compensate:
            return
        new = {}
        for place, name in enumerate(SUMMED, -len(SUMMED)):
            parts = [entry[place].expand(count, -1, -1) for entry, count in zip(entries, copies, strict=True)]
            new[name] = torch.cat([self.sums[name], *parts] if self.sums else parts)
        self._hold_sums(new)

    def keep(self, moves: Sequence[tuple[int, int]], rows: int) -> None:
        """Copy row a into place b for every (a, b), then use the first `rows` places only."""
        super().keep(moves, rows)
        if self.full is not None:
            self.full.keep(moves, rows)
        if not self.sums:
            return
        held = self.sums["keys"]
        order = list(range(held.size(0)))
        for source, target in moves:
            order[target] = source
        index = torch.tensor(order[:rows], device=held.device, dtype=torch.long)
        self._hold_sums({name: sums[index] for name, sums in self.sums.items()})

    def trim(self, seen: int) -> None:
        """The batch has so many columns from now on."""
        if self.full is not None:
            self.full.trim(seen)
