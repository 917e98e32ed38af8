"""How many slots the rows of a batch hold in the layers of one budget, and when they are cut.

Counting is done on the host, where the loop knows it anyway, so that no layer waits for the device; tensors of it are
made once per step and shared by the layers.
"""

from __future__ import annotations

from collections.abc import Sequence
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
    """Slots of the rows in layers of one budget."""

    def __init__(self, budget: int, interval: int | None, rows: Rows) -> None:
        self.budget, self.interval, self.of = budget, interval, rows
        self.held: list[int] = []
        self.due: list[int] = []
        """rows that are cut in this forward pass"""
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
        self.due = [
            row
            for row, (count, generated) in enumerate(zip(self.held, self.of.generated, strict=True))
            if generated % self.interval < columns and count > self.budget
        ]

    @property
    def width_after(self) -> int:
        """Width once what is due is cut."""
        due = set(self.due)
        return max((self.budget if row in due else count for row, count in enumerate(self.held)), default=0)

    def settle(self) -> None:
        """A forward pass has ended: what was due is cut."""
        for row in self.due:
            self.held[row] = self.budget
        self.due = []
        self._made.clear()

    def changed(self) -> None:
        """Rows came or went."""
        self._made.clear()

    def prompt_done(self) -> None:
        """The prompts are complete and cut."""
        self.held = [min(count, self.budget) for count in self.held]
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
    def over_budget(self) -> list[int]:
        """Rows that hold more than the budget."""
        return [row for row, count in enumerate(self.held) if count > self.budget]

    @property
    def width(self) -> int:
        """Slots of the row that holds most; while a dense prompt is all there is, its columns."""
        return max(self.held, default=0)

    def count(self, row: int) -> int:
        """Slots of one row."""
        return self.held[row]

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

    def _tensor(self, name: str, values: Sequence[int], device: torch.device) -> Tensor:
        key = (name, str(device))
        if key not in self._made:
            self._made[key] = torch.tensor(values, device=device)
        return self._made[key]
