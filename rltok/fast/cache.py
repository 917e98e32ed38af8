"""Key-value cache of a batch whose rows come and go, kept in blocks that are written in place.

A layer owns one buffer for keys and one for values, (places, heads, columns, dim). In use are the first `rows` places
and the columns from `start` to `end`; the model gets views of them. The newest column is the same for all rows, so a
new token is one write into the next column; the buffer is copied only when its columns run out, one block further.

Rows are aligned at the right: the newest token of every row is in the last column, its earlier tokens in the columns
before, without gaps, and what is left of its first token is padding. A distance in columns is then a distance in
tokens, so transformers' own causal and sliding-window masks are exact with one 2-D mask of the padding, in whatever
step a row joined. A sliding layer keeps the last window - 1 columns, as many as its mask can reach.

A row leaves by putting the last row into its place, so what is copied is one row for each that left. Buffers are
renewed one after the other, keys and values of a layer apart, so there is never a second copy of more than one of them.

`RowCache` is what the loop asks of a cache: another one, such as a policy that forgets tokens, is passed as `cache` to
`generate_rows`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin, get_layer_types_and_kwargs

SERVED = ("full_attention", "sliding_attention")
"""layer types, as transformers names them, whose cache is keys and values of past tokens alone"""

KeysValues = tuple[Tensor, Tensor]
Entry = Sequence[tuple[Tensor, ...]]
"""What a cache holds of one row: tensors without an entry per row, layer by layer."""


class RowCache(Protocol):
    """What the loop uses of a cache, besides transformers' own Cache interface, which the model uses.

    The loop makes one for its rows and one for every batch of prompts that it computes: `factory(config, rows,
    block=...)`, config of the decoder, rows in the batch at first, columns by which to grow. Columns are those of the
    batch, also where a policy holds fewer: `get_seq_length` is `seen`, and `get_mask_sizes` must fit a mask of
    `seen + q` columns. Rows are aligned at the right.
    """

    @property
    def seen(self) -> int:
        """Columns of the batch so far, W."""

    def of_row(self, row: int, length: int) -> Entry:
        """What is held of a row's newest `length` tokens, for `insert`; may be views, which the loop clones to keep."""

    def begin(self, padding: Sequence[int]) -> None:
        """A batch of prompts follows, each with so many columns of padding on its left."""

    def insert(self, entries: Sequence[Entry], copies: Sequence[int], seen: int, lengths: Sequence[int]) -> None:
        """New rows behind the others, so many copies of each entry; afterwards `seen` columns, no fewer than before.

        `lengths` are the tokens of each entry's row.
        """

    def keep(self, moves: Sequence[tuple[int, int]], rows: int) -> None:
        """Copy row a into place b for every (a, b), then use the first `rows` places only; rows may be 0."""

    def trim(self, seen: int) -> None:
        """Forget all but the newest `seen` columns, which hold all tokens of all rows."""

    def reserve(self, rows: int) -> None:
        """So many rows may be in use at once from now on; memory for them may be taken at once."""

    def take_peak(self) -> int:
        """Bytes: the largest size of all its tensors since the last call, with second copies made meanwhile."""

    def columns(self, prompt: int, new: int) -> int:
        """Tokens held at most of a row with so many prompt and so many generated tokens, mean over the layers."""


class Size:
    """Bytes of buffers now, and at most."""

    def __init__(self) -> None:
        self.now = self.peak = 0

    def replaced(self, old: Tensor, new: Tensor) -> None:
        """A buffer was copied into a new one, and both were there."""
        self.beside(new.nbytes)
        self.now += new.nbytes - old.nbytes

    def beside(self, nbytes: int) -> None:
        """So many bytes were there for a moment, beside the buffers."""
        self.peak = max(self.peak, self.now + nbytes)

    def take_peak(self) -> int:
        """The peak since the last call."""
        peak, self.peak = self.peak, self.now
        return peak


class BlockLayer(CacheLayerMixin):
    """One attention layer's keys and values.

    Args:
        rows: places in use.
        block: columns by which the buffer grows.
        window: sliding window in tokens, the newest one included; None: full attention.
        size: counts the bytes, of several layers together; None: of this one.
    """

    def __init__(self, rows: int, block: int, window: int | None = None, size: Size | None = None) -> None:
        super().__init__()
        self.size = Size() if size is None else size
        self.rows, self.block, self.window = rows, block, window
        self.is_sliding = window is not None
        self.start = self.end = self.seen = 0
        self.reserve = 0
        """places kept free for rows to come when the buffer is renewed"""

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """An empty buffer with the heads and the dtype of these states, under autocast with the dtype that attends."""
        self.keys, self.values = (
            x.new_zeros(0, x.size(1), 0, x.size(3), dtype=_attended_dtype(x)) for x in (key_states, value_states)
        )
        self.dtype, self.device = self.keys.dtype, key_states.device
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> KeysValues:
        """Write (rows, heads, q, dim) states into the next q columns -> views of all columns that they may see."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        count = key_states.size(2)
        self._make_room(self.rows, right=count)
        self.keys[: self.rows, :, self.end : self.end + count] = key_states
        self.values[: self.rows, :, self.end : self.end + count] = value_states
        self.end += count
        self.seen += count
        keys, values = self.held()
        self.start = max(self.start, self.end - self._columns(self.seen))
        return keys, values

    def held(self) -> KeysValues:
        """(rows, heads, columns in use, dim) views of keys and values."""
        used = (slice(self.rows), slice(None), slice(self.start, self.end))
        return self.keys[used], self.values[used]

    def of_row(self, row: int, length: int) -> KeysValues:
        """(heads, n, dim) views of what is held of a row's newest `length` tokens."""
        first = max(self.start, self.end - length)
        return self.keys[row, :, first : self.end], self.values[row, :, first : self.end]

    def insert(self, entries: Sequence[tuple[Tensor, ...]], copies: Sequence[int], seen: int) -> None:
        """New rows behind the others: so many copies of each entry, which is what `of_row` gave.

        Columns in use afterwards are `seen`, no fewer than before.
        """
        if not self.is_initialized:
            keys, values = entries[0]
            self.lazy_initialization(keys[None], values[None])
        missing = self._columns(seen) - (self.end - self.start)
        self._make_room(self.rows + sum(copies), left=missing)
        self.start -= missing
        self.seen = seen
        for (keys, values), count in zip(entries, copies, strict=True):
            places, columns = slice(self.rows, self.rows + count), slice(self.end - keys.size(1), self.end)
            self.keys[places, :, columns] = keys
            self.values[places, :, columns] = values
            self.rows += count

    def keep(self, moves: Sequence[tuple[int, int]], rows: int) -> None:
        """Copy row a into place b for every (a, b), then use the first `rows` places only."""
        if moves:
            held = slice(self.start, self.end)
            source, target = (torch.tensor(side, device=self.device) for side in zip(*moves, strict=True))
            for x in (self.keys, self.values):
                moved = x[:, :, held].index_select(0, source)
                self.size.beside(moved.nbytes)
                x[:, :, held].index_copy_(0, target, moved)
        self.rows = rows

    def trim(self, seen: int) -> None:
        """Forget all but the newest `seen` columns."""
        self.seen = seen
        self.start = max(self.start, self.end - seen)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Columns that the next update returns, and the number of the first of them."""
        held = self.end - self.start
        return held + query_length, self.seen - held

    def get_seq_length(self) -> int:
        """Columns of the batch so far; a sliding layer may hold fewer."""
        return self.seen

    def get_max_length(self) -> int:
        """The window of a sliding layer, -1 for none."""
        return -1 if self.window is None else self.window

    def _columns(self, seen: int) -> int:
        """Columns to hold of so many."""
        return seen if self.window is None else min(seen, self.window - 1)

    def _make_room(self, rows: int, left: int = 0, right: int = 0) -> None:
        """Renew the buffer if it lacks places, columns before the first in use, or columns after the last."""
        places, _, columns, _ = self.keys.shape
        if rows <= places and left <= self.start and self.end + right <= columns:
            return
        used = self.end - self.start
        size = (max(rows, self.reserve), left + used + right + self.block - 1)
        self.keys = self._renewed(self.keys, *size, left)
        self.values = self._renewed(self.values, *size, left)
        self.start, self.end = left, left + used

    def _renewed(self, old: Tensor, places: int, columns: int, left: int) -> Tensor:
        held = old[: self.rows, :, self.start : self.end]
        # zeros, not empty memory: masked padding must be finite
        new = old.new_zeros(places, old.size(1), columns, old.size(3))
        new[: held.size(0), :, left : left + held.size(2)] = held
        self.size.replaced(old, new)
        return new


class BlockCache(Cache):
    """A cache of `BlockLayer`s for one model.

    Args:
        config: of the decoder.
        rows: rows in the batch at first.
        block: columns by which it grows.

    Raises:
        ValueError: a layer keeps something else than keys and values of past tokens.
    """

    layers: list[BlockLayer]

    def __init__(self, config: Any, rows: int = 0, block: int = 128) -> None:
        self.size = Size()
        super().__init__(layers=[BlockLayer(rows, block, window, self.size) for window in layer_windows(config)])

    @property
    def seen(self) -> int:
        """Columns in use, W."""
        return self.layers[0].seen

    @property
    def rows(self) -> int:
        """Rows in use, B."""
        return self.layers[0].rows

    def take_peak(self) -> int:
        """Bytes: the largest size of all buffers since the last call, with second copies made meanwhile."""
        return self.size.take_peak()

    def columns(self, prompt: int, new: int) -> int:
        """All tokens of a row."""
        return prompt + new

    def of_row(self, row: int, length: int) -> Entry:
        """Views of a row's newest `length` tokens, layer by layer."""
        return [layer.of_row(row, length) for layer in self.layers]

    def begin(self, padding: Sequence[int]) -> None:
        """Nothing: masks tell the padding of prompts."""

    def insert(
        self, entries: Sequence[Entry], copies: Sequence[int], seen: int, lengths: Sequence[int] | None = None
    ) -> None:
        """New rows behind the others, so many copies of each entry; `seen` columns are in use afterwards."""
        for index, layer in enumerate(self.layers):
            layer.insert([entry[index] for entry in entries], copies, seen)

    def keep(self, moves: Sequence[tuple[int, int]], rows: int) -> None:
        """Copy row a into place b for every (a, b), then use the first `rows` places only."""
        for layer in self.layers:
            layer.keep(moves, rows)

    def trim(self, seen: int) -> None:
        """Forget all but the newest `seen` columns."""
        for layer in self.layers:
            layer.trim(seen)

    def reserve(self, rows: int) -> None:
        """Places to hold free for rows to come."""
        for layer in self.layers:
            layer.reserve = rows


def _attended_dtype(states: Tensor) -> torch.dtype:
    """Rotary positions raise keys to float32, and autocast lowers them again in every product: once is enough."""
    device = states.device.type
    lowers = torch.is_autocast_enabled(device) and states.dtype in (torch.float32, torch.float16, torch.bfloat16)
    return torch.get_autocast_dtype(device) if lowers else states.dtype


def layer_windows(config: Any) -> list[int | None]:
    """Sliding window of every layer of a decoder's config, None for full attention.

    Raises:
        ValueError: a layer type whose cache is not keys and values of past tokens.
    """
    types, options = get_layer_types_and_kwargs(config)
    other = sorted(set(types) - set(SERVED))
    if other:
        raise ValueError(
            f"{config.model_type!r} has layers of type {other}; the rollout loop serves {list(SERVED)}: use "
            "transformers' generate for this model"
        )
    if isinstance(options, Mapping):  # of transformers before per-layer options: one mapping for all layers
        window = options.get("sliding_window")
        return [window if kind == "sliding_attention" else None for kind in types]
    return [option.get("sliding_window") for option in options]
