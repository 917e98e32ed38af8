"""One attention layer's kept tokens: storage, the cut, and the mask that fits what is stored.

Slots of a row are aligned at the right like columns of `BlockLayer`: the newest token of every row is in the last
column, and what a row has fewer than the widest is padding on its left. All key-value heads of a row hold equally many
slots, though not the same tokens. Until the first cut nothing differs from a dense cache, bit for bit.

A prompt is computed densely, in a `BlockLayer`, and cut when it is complete. After that a row is cut whenever it has
generated a multiple of `interval` tokens and holds more than the budget: a matter of the row alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import CacheLayerMixin

from rltok.fast.cache import BlockLayer, KeysValues, Size
from rltok.kv.attention import MARK, grouped_weights
from rltok.kv.policy import KVPolicy, LayerView
from rltok.kv.rotary import moves, rotate_keys
from rltok.kv.slots import Slots

PROMPT_QUERIES = 256
"""queries of a prompt whose attention is summed at once"""


class PolicyLayer(CacheLayerMixin):
    """A layer under a policy.

    Args:
        index: of the layer in the model.
        policy: says what to keep.
        slots: counts of the rows, shared by all layers of one budget.
        block: columns by which buffers grow.
        size: counts bytes.
    """

    def __init__(self, index: int, policy: KVPolicy, slots: Slots, block: int, size: Size) -> None:
        super().__init__()
        self.index, self.policy, self.slots, self.block, self.size = index, policy, slots, block, size
        self.prompt: BlockLayer | None = None
        """the dense prompt, while it is computed"""
        self.prompt_score: Tensor | None = None
        self.tracks: dict[str, Tensor] = {}
        """(places, Hkv, columns[, D]) keys, values, positions and, if the policy asks, score"""
        self.queries: Tensor | None = None
        """(places, H, w, D) newest queries, in a ring once tokens are generated"""
        self.oldest = 0
        """where the ring begins, and the next query goes"""
        self.start = self.end = 0
        self.reserve = 0
        self.scaling = 1.0
        self._ones: Tensor | None = None
        self.inv_freq: Tensor | None = None
        """frequencies of the keys, where kept ones move up"""

    # ---- what transformers asks

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing: buffers are made by the first prompt or the first rows."""

    @property
    def is_initialized(self) -> bool:  # type: ignore[override]
        """True once something is held."""
        return self.prompt is not None or bool(self.tracks)

    @is_initialized.setter
    def is_initialized(self, value: bool) -> None:
        pass

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> KeysValues:
        """Take in (rows, Hkv, q, D) states -> all that they may see, marked for the wrapper."""
        if self.slots.in_prompt:
            if self.prompt is None:
                self.prompt = BlockLayer(key_states.size(0), self.block, size=self.size)
            keys, values = self.prompt.update(key_states, value_states)
        else:
            keys, values = self._append(key_states, value_states)
        setattr(keys, MARK, self)
        return keys, values

    def get_seq_length(self) -> int:
        """Columns of the batch so far; fewer may be held."""
        return self.slots.seen

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Columns that the next update returns, and the number of the first of them."""
        held = self.slots.seen if self.slots.in_prompt else min(self.end - self.start, self.slots.seen)
        return held + query_length, self.slots.seen - held

    def get_max_length(self) -> int:
        """No limit."""
        return -1

    # ---- what the wrapper asks

    def mask(self, given: Any, query: Tensor, flash: bool) -> Any:
        """The attention mask of this call; `given` is transformers' own, which is right while a prompt is computed."""
        if self.slots.in_prompt:
            return given
        mask: Tensor | None = self.slots.mask(query.size(2), flash, query.device)
        if mask is None and not flash and query.size(2) == 1 and query.device.type == "cpu" and self._has_forgotten:
            # transformers packs grouped query heads where there is a mask, a third faster than what it does without
            return self._all_visible(self.end - self.start, query.device)
        return mask

    def _all_visible(self, width: int, device: torch.device) -> Tensor:
        """(1, 1, 1, width) True."""
        if self._ones is None or self._ones.size(3) < width:
            self._ones = torch.ones(1, 1, 1, width + self.block, dtype=torch.bool, device=device)
        return self._ones[..., :width]

    @property
    def _has_forgotten(self) -> bool:
        """A row holds fewer slots than it has tokens, so that bits need not be those of a dense cache."""
        return max(self.slots.of.lengths, default=0) > self.slots.width

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
        """Call the attention function in use on what `update` returned, under this layer's mask."""
        return attention(module, query, key, value, self.mask(given, query, flash), *args, **kwargs)

    def after_attention(self, query: Tensor, scaling: float) -> None:
        """Watch (B, H, q, D) queries, then cut what is due."""
        self.scaling = scaling
        if self.slots.in_prompt:
            self._watch_prompt(query)
            if self.slots.prompt_ends_here:
                self.finish_prompt()
            return
        self._watch(query)
        due = self.slots.due
        if due:
            self._cut(due)
        if self.slots.at_cut and self.policy.accumulates and self.policy.span:  # the next window begins at 0
            self.tracks["score"][torch.tensor(self.slots.at_cut, device=query.device)] = 0.0

    # ---- prompt

    def _watch_prompt(self, query: Tensor) -> None:
        """Attention sums and newest queries of a part of the prompt, aligned like its keys."""
        window = self.policy.watched or (self.policy.span if self.policy.accumulates else 0)
        if window:
            before = self.queries
            joined = query if before is None else torch.cat([before, query], 2)
            self._hold_queries(joined[:, :, -window:].clone())
        if not self.policy.accumulates or self.policy.span:
            return
        self._add_prompt_scores(query)

    def _add_prompt_scores(self, query: Tensor) -> None:
        """Add the attention of the prompt's newest (B, H, q, D) queries to its keys' scores."""
        assert self.prompt is not None
        keys = self.prompt.held()[0]
        rows, heads, width, _ = keys.shape
        first = width - query.size(2)  # column of the first query
        column = torch.arange(width, device=keys.device)
        real = column >= self.slots.padding(keys.device)[:, None]  # (B, width)
        score = keys.new_zeros(rows, heads, width, dtype=torch.float32)
        if self.prompt_score is not None:
            score[:, :, :first] = self.prompt_score
        for start in range(0, query.size(2), PROMPT_QUERIES):
            part = query[:, :, start : start + PROMPT_QUERIES]
            at = slice(first + start, first + start + part.size(2))
            seen = slice(at.stop)
            visible = real[:, None, seen] & (column[seen] <= column[at, None]) & real[:, at, None]
            score[:, :, seen] += grouped_weights(part, keys[:, :, seen], visible[:, None], self.scaling).mean(2).sum(2)
        self.prompt_score = score

    def finish_prompt(self) -> None:
        """The prompt is complete: keep what the policy keeps of it."""
        assert self.prompt is not None
        keys, values = self.prompt.held()
        rows, heads, width, _ = keys.shape
        if self.policy.accumulates and self.policy.span:
            assert self.queries is not None
            self._add_prompt_scores(self.queries)
            self.size.now -= self.queries.nbytes
            self.queries = None
        if self.queries is not None and self.queries.size(2) < self.policy.watched:
            self._hold_queries(pad_queries(self.queries, self.policy.watched))
        column = torch.arange(width, device=keys.device, dtype=torch.int32)
        number = column - self.slots.padding(keys.device)[:, None].to(torch.int32)
        number = number.clamp(min=-1)[:, None].expand(rows, heads, width)
        held = {"keys": keys, "values": values, "positions": number}
        if self.policy.accumulates:
            assert self.prompt_score is not None
            held["score"] = self.prompt_score
        over, budget = self.slots.over_budget, self.slots.budget
        prompt, self.prompt, self.prompt_score = self.prompt, None, None
        if not over:  # as it is, with the room behind it
            self.tracks = {"keys": prompt.keys, "values": prompt.values}
            for name in [name for name in held if name not in self.tracks]:
                whole = held[name].new_zeros(rows, heads, prompt.keys.size(2))
                whole[:, :, prompt.start : prompt.end] = held[name]
                self.tracks[name] = whole
                self.size.now += whole.nbytes
            self.start, self.end = prompt.start, prompt.end
        else:
            if len(over) == rows:
                held = self._chosen(held, None)
            else:
                held = {name: track.clone() for name, track in held.items()}
                self._cut_in(held, over)
                held = {name: track[:, :, width - budget :].clone() for name, track in held.items()}
            self.tracks, self.start, self.end = held, 0, budget
            self.size.beside(sum(track.nbytes for track in held.values()))
            self.size.now += sum(track.nbytes for track in held.values()) - prompt.keys.nbytes - prompt.values.nbytes
        if self.policy.accumulates and self.policy.span:
            self.tracks["score"].zero_()
        self.size.beside(0)

    # ---- generated tokens

    def _append(self, keys: Tensor, values: Tensor) -> KeysValues:
        count, rows = keys.size(2), self.slots.rows
        self._make_room(rows, right=count)
        new = slice(self.end, self.end + count)
        self.tracks["keys"][:rows, :, new] = keys
        self.tracks["values"][:rows, :, new] = values
        # the newest token of every row is in the last column, so nothing is asked of the host
        positions = self.tracks["positions"][:rows]
        last, added = positions[:, :, self.end - 1 : self.end], positions[:, :, new]
        if count == 1:
            torch.add(last, 1, out=added)
        else:
            added[:] = last + torch.arange(1, count + 1, device=keys.device)
        if "score" in self.tracks:
            self.tracks["score"][:rows, :, new] = 0.0
        self.end += count
        self.start = self.end - self.slots.width
        used = (slice(rows), slice(None), slice(self.start, self.end))
        return self.tracks["keys"][used], self.tracks["values"][used]

    def _watch(self, query: Tensor) -> None:
        if self.policy.watched:
            self._remember(query)
        if self.policy.accumulates:
            counting = self.slots.counting(self.policy.span, query.size(2), query.device)
            if counting is not None and not counting.numel():
                return
            used = (slice(self.slots.rows), slice(None), slice(self.start, self.end))
            visible = self.slots.mask(query.size(2), False, query.device)
            weights = grouped_weights(query, self.tracks["keys"][used], visible, self.scaling).mean(2)
            self.tracks["score"][used] += (weights if counting is None else weights * counting).sum(2)

    def _remember(self, query: Tensor) -> None:
        """Put (B, H, q, D) queries over the oldest of the ring."""
        assert self.queries is not None
        window, rows = self.policy.watched, self.slots.rows
        query = query[:, :, -window:]
        count = query.size(2)
        behind = min(count, window - self.oldest)
        self.queries[:rows, :, self.oldest : self.oldest + behind] = query[:, :, :behind]
        if behind < count:
            self.queries[:rows, :, : count - behind] = query[:, :, behind:]
        self.oldest = (self.oldest + count) % window

    def _newest(self, rows: int | slice) -> Tensor | None:
        """Newest queries of a row or of some, in their order."""
        if self.queries is None:
            return None
        ring = self.queries[rows]
        return ring if not self.oldest else torch.cat([ring[..., self.oldest :, :], ring[..., : self.oldest, :]], -2)

    def _hold_queries(self, queries: Tensor) -> None:
        """Newest queries in their order, in a tensor of their own."""
        if self.queries is not None:
            self.size.replaced(self.queries, queries)
        else:
            self.size.now += queries.nbytes
        self.queries, self.oldest = queries, 0

    def _held(self) -> dict[str, Tensor]:
        used = (slice(self.slots.rows), slice(None), slice(self.start, self.end))
        return {name: track[used] for name, track in self.tracks.items()}

    def _view(self, index: Tensor | None, held: dict[str, Tensor] | None = None) -> LayerView:
        """What the policy sees of some rows, None: of all."""
        held = self._held() if held is None else held
        device = held["keys"].device
        queries = self._newest(slice(self.slots.rows))

        def of(values: Tensor) -> Tensor:
            return values if index is None else values[index]

        return LayerView(
            index=self.index,
            budget=self.slots.budget,
            keys=of(held["keys"]),
            values=of(held["values"]),
            positions=of(held["positions"]),
            counts=of(self.slots.counts(device)),
            lengths=of(self.slots.lengths(device)),
            scaling=self.scaling,
            score=of(held["score"]) if "score" in held else None,
            queries=None if queries is None else of(queries),
        )

    def _chosen(self, held: dict[str, Tensor], index: Tensor | None) -> dict[str, Tensor]:
        """(rows, Hkv, C[, D]) what the policy keeps of some rows, None: of all."""
        kept = self.policy.select(self._view(index, held))

        def take(track: Tensor) -> Tensor:
            rows = track if index is None else track[index]
            at = kept if rows.dim() == 3 else kept[..., None].expand(-1, -1, -1, rows.size(3))
            return rows.gather(2, at)

        chosen = {name: take(track) for name, track in held.items()}
        chosen["keys"] = self._moved(chosen["keys"], kept, held["keys"].size(2))
        return chosen

    def _moved(self, keys: Tensor, kept: Tensor, width: int) -> Tensor:
        """Kept keys at the positions of the last slots, where the policy asks for it; `rotary.py` says why."""
        if self.inv_freq is None:
            return keys
        self.inv_freq = self.inv_freq.to(keys.device)
        return rotate_keys(keys, moves(kept, width), self.inv_freq)

    def _cut_in(self, held: dict[str, Tensor], rows: Sequence[int]) -> None:
        """Cut some rows of (B, Hkv, S[, D]) tracks in place, to their right end."""
        index = torch.tensor(rows, device=held["keys"].device)
        for name, chosen in self._chosen(held, index).items():
            held[name][:, :, held[name].size(2) - chosen.size(2) :].index_copy_(0, index, chosen)

    def _cut(self, due: Sequence[int]) -> None:
        """Cut rows to the budget; what is left moves to the front of the buffer if no other row is wider."""
        rows, budget = self.slots.rows, self.slots.budget
        held = self._held()
        if len(due) == rows:
            held = self._chosen(held, None)
        else:
            self._cut_in(held, due)
        if len(due) < rows and self.slots.width_after > budget:
            return
        for name, track in held.items():
            front = track[:, :, track.size(2) - budget :]
            front = front if len(due) == rows else front.clone()
            self.size.beside(front.nbytes)
            self.tracks[name][:rows, :, :budget] = front
        self.start, self.end = 0, budget

    # ---- rows come and go

    def of_row(self, row: int, length: int) -> tuple[Tensor, ...]:
        """Views of what is held of a row: its tracks, and its newest queries."""
        count = self.slots.count(row)
        held = [self.tracks[name][row, :, self.end - count : self.end] for name in self._names]
        queries = self._newest(row)
        return tuple(held) if queries is None else (*held, queries)

    @property
    def _names(self) -> list[str]:
        """Tracks in the order of an entry."""
        return ["keys", "values", "positions", *(["score"] if self.policy.accumulates else [])]

    def insert(self, entries: Sequence[tuple[Tensor, ...]], copies: Sequence[int]) -> None:
        """New rows behind the others; `slots` knows of them already."""
        names = self._names
        if not self.tracks:
            self.tracks = {
                name: part.new_zeros(0, part.size(0), 0, *part.shape[2:])
                for name, part in zip(names, entries[0], strict=False)
            }
        first = self.slots.rows - sum(copies)
        missing = max(0, self.slots.width - (self.end - self.start))
        self._make_room(self.slots.rows, left=missing, held_rows=first)
        self.start = self.end - self.slots.width
        place = first
        for entry, count in zip(entries, copies, strict=True):
            for name, part in zip(names, entry, strict=False):
                self.tracks[name][place : place + count, :, self.end - part.size(1) : self.end] = part
            place += count
        if self.policy.watched:
            new = [entry[-1].expand(count, *entry[-1].shape) for entry, count in zip(entries, copies, strict=True)]
            self._add_queries(torch.cat([pad_queries(part, self.policy.watched) for part in new]), first)

    def _add_queries(self, new: Tensor, first: int) -> None:
        """Newest queries of new rows, from place `first` on."""
        before = self._newest(slice(first))
        if self.queries is None or self.queries.size(0) < first + new.size(0):
            whole = new.new_zeros(max(first + new.size(0), self.reserve), *new.shape[1:])
            if before is not None:
                whole[:first] = before
            self._hold_queries(whole)
        elif before is not None and self.oldest:
            self.queries[:first] = before
            self.oldest = 0
        assert self.queries is not None
        self.queries[first : first + new.size(0)] = new

    def keep(self, moves: Sequence[tuple[int, int]], rows: int) -> None:
        """Copy row a into place b for every (a, b), then use the first `rows` places only."""
        if not self.tracks:
            return
        device = self.tracks["keys"].device
        if moves:
            source, target = (torch.tensor(side, device=device) for side in zip(*moves, strict=True))
            for track in self.tracks.values():
                moved = track[:, :, self.start : self.end].index_select(0, source)
                self.size.beside(moved.nbytes)
                track[:, :, self.start : self.end].index_copy_(0, target, moved)
            if self.queries is not None:
                self.queries.index_copy_(0, target, self.queries.index_select(0, source))

    def trim(self, seen: int) -> None:
        """The batch has so many columns from now on, of which the layer needs to know nothing."""

    def narrow(self) -> None:
        """Forget columns that no row uses."""
        self.start = self.end - self.slots.width

    def _make_room(self, rows: int, left: int = 0, right: int = 0, held_rows: int | None = None) -> None:
        """Room for more places or columns: up to the budget and one interval, while rows are cut together."""
        places, _, columns = self.tracks["keys"].shape[:3]
        if rows <= places and left <= self.start and self.end + right <= columns:
            return
        used, held = self.end - self.start, self.slots.rows if held_rows is None else held_rows
        needed = left + used + right
        if rows <= places and columns - needed >= self.block // 2:  # enough at the front
            wanted = (places, columns)
        else:
            limit = self.slots.budget + (self.policy.interval or 0)
            room = needed + self.block - 1
            wanted = (max(rows, self.reserve), min(room, limit) if columns < needed <= limit else room)
        for name, old in self.tracks.items():
            new = old.new_zeros(wanted[0], old.size(1), wanted[1], *old.shape[3:])
            new[:held, :, left : left + used] = old[:held, :, self.start : self.end]
            self.size.replaced(old, new)
            self.tracks[name] = new
        self.start, self.end = left, left + used


def pad_queries(queries: Tensor, window: int) -> Tensor:
    """(B, H, n, D) newest queries -> (B, H, window, D) with zeros in front."""
    missing = window - queries.size(2)
    return queries if missing <= 0 else torch.nn.functional.pad(queries, (0, 0, missing, 0))
