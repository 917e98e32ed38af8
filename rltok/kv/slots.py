"""How many slots the rows of a batch hold in the layers of one budget, and when they are cut.

Counting is done on the host, where the loop knows it anyway, so that no layer waits for the device; tensors of it are
made once per step and shared by the layers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor


class Rows:
    """Rows of a batch, for all layers: how long they are and how many tokens of them were generated."""

    def __init__(self, rows: int, prompt_in_parts: bool) -> None:
        self.seen = 0
        """columns of the batch"""
        self.lengths: list[int] = []
        self.generated: list[int] = []
        self.in_prompt = rows > 0
        """a batch of prompts is being computed"""
        self.in_parts = prompt_in_parts
        """the prompt comes in several forwards, and somebody else says when it is complete"""
        self.pad: list[int] = [0] * rows

    def begin_prompt(self, pad: Sequence[int]) -> None:
        """A batch of prompts with so much padding on the left of each."""
        self.in_prompt, self.pad, self.seen = True, list(pad), 0

    def advance(self, columns: int) -> None:
        """A forward pass begins."""
        self.seen += columns
        if self.in_prompt:
            self.lengths = [self.seen - pad for pad in self.pad]
            self.generated = [0] * len(self.pad)
        else:
            self.lengths = [length + columns for length in self.lengths]
            self.generated = [count + columns for count in self.generated]


class Slots:
    """Slots of the rows in layers of one budget.

    Args:
        budget: slots of a row after a cut.
        interval: generated tokens of a row between two cuts; None: prompts alone are cut.
        rows: of the batch.
        by_length: slots after a cut of a row with so many tokens, not fewer than `budget`; None: always `budget`.
    """

    def __init__(
        self, budget: int, interval: int | None, rows: Rows, by_length: Callable[[int], int] | None = None
    ) -> None:
        self.least, self.interval, self.of, self.by_length = budget, interval, rows, by_length
        self.held: list[int] = []
        self.due: list[int] = []
        """rows that are cut in this forward pass"""
        self.at_cut: list[int] = []
        """rows whose interval ends in it, also those that hold too little to be cut"""
        self._made: dict[tuple[Any, ...], Tensor] = {}

    # ---- steps

    def advance(self, columns: int) -> None:
        """A forward pass begins; `of` has advanced already."""
        self._made.clear()
        if self.of.in_prompt:
            self.held = list(self.of.lengths)
            return
        self.held = [count + columns for count in self.held]
        if self.interval is None:
            return
        self.at_cut = [row for row, generated in enumerate(self.of.generated) if generated % self.interval < columns]
        self.due = [row for row in self.at_cut if self.held[row] > self.budget_of(row)]

    @property
    def width_after(self) -> int:
        """Width once what is due is cut."""
        due = set(self.due)
        return max((self.budget_of(row) if row in due else count for row, count in enumerate(self.held)), default=0)

    def settle(self) -> None:
        """A forward pass has ended: what was due is cut."""
        for row in self.due:
            self.held[row] = self.budget_of(row)
        self.due, self.at_cut = [], []
        self._made.clear()

    def changed(self) -> None:
        """Rows came or went."""
        self._made.clear()

    def prompt_done(self) -> None:
        """The prompts are complete and cut."""
        self.held = [min(count, self.budget_of(row)) for row, count in enumerate(self.held)]
        self._made.clear()

    # ---- facts

    @property
    def rows(self) -> int:
        """Rows in use."""
        return len(self.of.lengths)

    @property
    def seen(self) -> int:
        """Columns of the batch."""
        return self.of.seen

    @property
    def in_prompt(self) -> bool:
        """A batch of prompts is being computed."""
        return self.of.in_prompt

    @property
    def prompt_ends_here(self) -> bool:
        """The forward pass at hand is the whole prompt."""
        return self.of.in_prompt and not self.of.in_parts

    @property
    def budget(self) -> int:
        """Slots after a cut of the row that keeps most."""
        if self.by_length is None:
            return self.least
        return max(map(self.budget_of, range(self.rows)), default=self.least)

    def budget_of(self, row: int) -> int:
        """Slots of a row after a cut."""
        return self._after_cut(self.of.lengths[row])

    def _after_cut(self, length: int) -> int:
        return self.least if self.by_length is None else self.by_length(length)

    def most(self, prompt: int, new: int) -> int:
        """Slots of a row with so many prompt and so many generated tokens, at their most while it generates."""
        total = prompt + new
        if self.interval is None:
            return min(prompt, self._after_cut(prompt)) + new
        return min(total, self._after_cut(total) + self.interval)

    def counting(self, span: int, queries: int, device: torch.device) -> Tensor | None:
        """Which of the newest queries are among the last `span` before a row's next cut.

        Returns:
            (B, 1, queries, 1) 0 or 1; None: all of them; without an element: none.
        """
        if not span:
            return None
        if self.interval is None:
            return torch.zeros(0, device=device)
        newest, cut = range(queries - 1, -1, -1), set(self.at_cut)  # a cut comes after all queries of a pass
        flags = [
            [float((back if row in cut else -(generated - back) % self.interval) < span) for back in newest]
            for row, generated in enumerate(self.of.generated)
        ]
        if all(map(all, flags)):
            return None
        if not any(map(any, flags)):
            return torch.zeros(0, device=device)
        key = ("counting", span, queries)
        if key not in self._made:
            self._made[key] = torch.tensor(flags, device=device)[:, None, :, None]
        return self._made[key]

    @property
    def over_budget(self) -> list[int]:
        """Rows that hold more than the budget."""
        return [row for row, count in enumerate(self.held) if count > self.budget_of(row)]

    @property
    def width(self) -> int:
        """Slots of the row that holds most; while a dense prompt is all there is, its columns."""
        return max(self.held, default=0)

    def count(self, row: int) -> int:
        """Slots of one row."""
        return self.held[row]

    def weight(self, row: int) -> int:
        """Tokens that the slot of a row's merged ones stands for: 1 if it is an ordinary slot."""
        return self.of.lengths[row] - self.held[row] + 1

    def counts(self, device: torch.device) -> Tensor:
        """(B,) slots of every row."""
        return self._tensor("counts", self.held, device)

    def lengths(self, device: torch.device) -> Tensor:
        """(B,) tokens of every row."""
        return self._tensor("lengths", self.of.lengths, device)

    def padding(self, device: torch.device) -> Tensor:
        """(B,) columns of padding of the prompts."""
        return self._tensor("pad", self.of.pad, device)

    def mask(self, queries: int, flash: bool, device: torch.device) -> Tensor | None:
        """What the newest `queries` tokens of each row see: None for all slots of full rows, else True where visible.

        (B, width) for flash attention, which is causal by itself, (B, 1, queries, width) otherwise.
        """
        full = min(self.held, default=0) == self.width
        if full and (queries == 1 or flash):
            return None
        key = ("mask", queries, flash)
        if key not in self._made:
            column = torch.arange(self.width, device=device)
            filled = column >= self.width - self.counts(device)[:, None]
            at = torch.arange(self.width - queries, self.width, device=device)
            self._made[key] = filled if flash else filled[:, None, None] & (column <= at[:, None])
        return self._made[key]

    @property
    def has_merged(self) -> bool:
        """A row holds fewer slots than it has tokens."""
        return any(length > held for length, held in zip(self.of.lengths, self.held, strict=True))

    def bias(self, queries: int, place: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        """As `mask`, where the slot `place` of a row stands for itself and all tokens that the row does not hold.

        (B, 1, queries, width) 0 where visible, log of the number of tokens at that slot, -inf elsewhere.
        """
        key = ("bias", queries, place, dtype)
        if key not in self._made:
            width = self.width
            column = torch.arange(width, device=device)
            at = torch.arange(width - queries, width, device=device)
            first = width - self.counts(device)[:, None]
            visible = (column >= first)[:, None] & (column <= at[:, None])  # (B, queries, width)
            weights = self._tensor("weights", [self.weight(row) for row in range(self.rows)], device)
            many = weights.to(torch.float64).log()
            bias = torch.where(column == first + place, many[:, None], 0.0)[:, None].masked_fill(~visible, -torch.inf)
            self._made[key] = bias[:, None].to(dtype)
        return self._made[key]

    def _tensor(self, name: str, values: Sequence[int], device: torch.device) -> Tensor:
        key = (name, str(device))
        if key not in self._made:
            made = torch.tensor(values)
            if device.type == "cuda":  # pinned, so that the host does not wait for the copy
                made = made.pin_memory()
            self._made[key] = made.to(device, non_blocking=True)
        return self._made[key]
