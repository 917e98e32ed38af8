"""A cache whose full-attention layers keep what a policy keeps.

It is transformers' Cache for the model and `rltok.fast.RowCache` for the loop. Sliding-window layers are not the
policy's: they hold their window as `BlockLayer`s do, and so do layers that the policy leaves dense.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor
from transformers.cache_utils import Cache

from rltok.fast.cache import BlockLayer, Entry, KeysValues, Size, layer_windows
from rltok.kv.layer import PolicyLayer
from rltok.kv.policy import KVPolicy
from rltok.kv.rotary import place_in_cache
from rltok.kv.slots import Rows, Slots


class PolicyCache(Cache):
    """Keys and values of a model's layers, those of full attention under a policy.

    Args:
        config: of the model or its decoder.
        rows: prompts that are computed next; 0: the rows of a loop, which enter by `insert`.
        block: columns by which it grows.
        policy: what to keep.
        in_parts: a prompt comes in several forward passes; `of_row` says that it is complete.

    Raises:
        ValueError: a layer that keeps something else than keys and values, no layer with full attention, or a model
            that the policy's options do not fit.
    """

    layers: list[PolicyLayer | BlockLayer]  # type: ignore[assignment]

    def __init__(
        self, config: Any, rows: int = 0, block: int = 128, *, policy: KVPolicy, in_parts: bool = True
    ) -> None:
        self.policy, self.size = policy, Size()
        self.of = Rows(rows, in_parts)
        self.slots: dict[int, Slots] = {}
        config = config.get_text_config(decoder=True)
        windows = layer_windows(config)
        if None not in windows:
            raise ValueError(
                f"{config.model_type!r} has sliding-window layers alone: a cache policy has nothing to do; remove it"
            )
        policy.check_model(config)
        heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        made: list[PolicyLayer | BlockLayer] = []
        for index, window in enumerate(windows):
            layer = None if window is not None else self._policy_layer(index, heads, block)
            made.append(BlockLayer(rows, block, window, self.size) if layer is None else layer)
        self.kept = [layer for layer in made if isinstance(layer, PolicyLayer)]
        """the layers under the policy"""
        if policy.positions == "cache":
            place_in_cache(self.kept, config)
        self._first = 0
        super().__init__(layers=made)

    def _policy_layer(self, index: int, heads: int, block: int) -> PolicyLayer | None:
        budget = self.policy.kept(index)
        slots = self.slots.get(budget)
        if slots is None:
            slots = Slots(budget, self.policy.interval, self.of, self.policy.kept_by_length(index))
        layer = self.policy.make_layer(index, heads, slots, block, self.size)
        if layer is not None:
            self.slots[budget] = slots
        return layer

    # ---- for the model

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> KeysValues:
        """Take in a layer's states; the first layer begins the forward pass for all."""
        if layer_idx == self._first:
            self._begin(key_states.size(2))
        return self.layers[layer_idx].update(key_states, value_states)

    def _begin(self, columns: int) -> None:
        if self.of.in_prompt and not self.of.in_parts and self.of.seen:
            self._prompt_done()
        for slots in self.slots.values():
            slots.settle()
        self.of.advance(columns)
        for slots in self.slots.values():
            slots.advance(columns)

    def _prompt_done(self) -> None:
        self.of.in_prompt = False
        for slots in self.slots.values():
            slots.prompt_done()

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Columns of the batch so far."""
        return self.of.seen

    # ---- for the loop

    @property
    def seen(self) -> int:
        """Columns of the batch so far, W."""
        return self.of.seen

    @property
    def rows(self) -> int:
        """Rows in use."""
        return len(self.of.lengths)

    @property
    def nbytes(self) -> int:
        """Bytes held now."""
        return self.size.now

    def take_peak(self) -> int:
        """Bytes: the largest size of all buffers since the last call, with second copies made meanwhile."""
        return self.size.take_peak()

    def begin(self, padding: Sequence[int]) -> None:
        """A batch of prompts with so many columns of padding on the left of each."""
        self.of.begin_prompt(padding)

    def of_row(self, row: int, length: int) -> Entry:
        """What is kept of a row's newest `length` tokens; of prompts, they are then complete."""
        self._settle()
        if self.of.in_prompt:
            for layer in self.kept:
                layer.finish_prompt()
            self._prompt_done()
        return [layer.of_row(row, length) for layer in self.layers]

    def insert(self, entries: Sequence[Entry], copies: Sequence[int], seen: int, lengths: Sequence[int]) -> None:
        """New rows behind the others, so many copies of each entry, whose rows have so many tokens."""
        self._settle()
        self.of.in_prompt = False
        for slots in self.slots.values():
            index = next(layer.index for layer in self.kept if layer.slots is slots)
            for entry, count in zip(entries, copies, strict=True):
                slots.held += [entry[index][0].size(1)] * count
            slots.changed()
        for length, count in zip(lengths, copies, strict=True):
            self.of.lengths += [length] * count
            self.of.generated += [0] * count
        self.of.seen = seen
        for index, layer in enumerate(self.layers):
            parts = [entry[index] for entry in entries]
            if isinstance(layer, BlockLayer):
                layer.insert(parts, copies, seen)
            else:
                layer.insert(parts, copies)

    def keep(self, moves: Sequence[tuple[int, int]], rows: int) -> None:
        """Copy row a into place b for every (a, b), then use the first `rows` places only."""
        self._settle()
        for layer in self.layers:
            layer.keep(moves, rows)
        for counts in (self.of.lengths, self.of.generated, *(slots.held for slots in self.slots.values())):
            for source, target in moves:
                counts[target] = counts[source]
            del counts[rows:]
        for slots in self.slots.values():
            slots.changed()
        for layer in self.kept:
            layer.narrow()

    def trim(self, seen: int) -> None:
        """The batch has so many columns from now on."""
        self.of.seen = seen
        for layer in self.layers:
            layer.trim(seen)

    def columns(self, prompt: int, new: int) -> int:
        """Tokens held at most of a row with so many prompt and so many generated tokens, mean over the layers."""
        dense = (len(self.layers) - len(self.kept)) * (prompt + new)
        return -(-(dense + sum(layer.slots.most(prompt, new) for layer in self.kept)) // len(self.layers))

    def reserve(self, rows: int) -> None:
        """Places to hold free for rows to come."""
        for layer in self.layers:
            layer.reserve = rows

    def _settle(self) -> None:
        for slots in self.slots.values():
            slots.settle()

    # ---- refused

    def crop(self, *args: Any, **kwargs: Any) -> None:
        """Refused: forgotten tokens do not come back."""
        raise NotImplementedError("a cache policy has forgotten tokens: it cannot be cropped (assisted decoding)")

    def reorder_cache(self, *args: Any, **kwargs: Any) -> None:
        """Refused: beams are not sampled."""
        raise NotImplementedError("a cache policy does not serve beam search; set num_beams=1")
