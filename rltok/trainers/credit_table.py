"""The `tokens` and `credit` columns of TRL's completions table: the advantage the loss last used for every token."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import Tensor


class CreditTable:
    """Keeps the columns in step with TRL's others, and the credit up to date as updates use the rows.

    A new generation batch enters with the credit of door 1; each update overwrites the rows it used, so that what an
    objective term made of the advantage is what the table shows. Every rank calls every method.
    """

    def __init__(self, logs: dict[str, Any], decode: Callable[[list[int]], str]) -> None:
        self.logs = logs
        """TRL's bounded columns: prompt, completion, advantages, rewards by name, extra by name"""
        self.text = cache(lambda token: decode([token]))
        """token id -> its text"""
        self.cells: list[list[float]] = []
        """the column's cells of the current generation batch, all ranks in order"""
        self.used: dict[int, list[float]] = {}
        """row in the order of all ranks -> what the loss used last on this rank"""

    def add(self, ids: Tensor, credit: Tensor, mask: Tensor, updates_follow: bool) -> None:
        """Append (B, T) tokens and credit of every rank; rows that updates will use replace the batch before."""
        cells = gather_object(rows_of(credit, mask))
        tokens = [[self.text(i) for i in row[:n]] for row, n in zip(ids.tolist(), counted(mask), strict=True)]
        self.logs["extra"]["tokens"].extend(gather_object(tokens))
        self.logs["extra"]["credit"].extend(cells)
        if updates_follow:
            self.cells, self.used = cells, {}

    def remember(self, rows: Tensor, advantages: Tensor, mask: Tensor) -> None:
        """(B,) row numbers of a micro-batch (below 0: no row) and the (B, T) advantages its loss used."""
        used = zip(rows.tolist(), rows_of(advantages, mask), strict=True)
        self.used |= {row: values for row, values in used if row >= 0}

    def refresh(self) -> None:
        """Write what was used into the column."""
        if not self.cells:
            return
        for used in gather_object([self.used]):
            for row, values in used.items():
                self.cells[row][: len(values)] = values  # a tail that selection cut off stays as it was, 0

    def replace(self, columns: Mapping[str, Sequence[Any]], rewards: Mapping[str, Sequence[float]]) -> None:
        """Show other rows than TRL logged; columns that rewards logged belong to the others and are dropped."""
        for target, source in ((self.logs, columns), (self.logs["rewards"], rewards)):
            for name, values in source.items():
                target[name].clear()
                target[name].extend(values)
        self.logs["extra"].clear()

    def state(self) -> dict[str, Any]:
        """Plain lists for a checkpoint; `cells` as their place in the column."""
        column = list(self.logs["extra"].get("credit", ()))
        first = next((i for i, cell in enumerate(column) if self.cells and cell is self.cells[0]), None)
        return {
            **{name: list(self.logs[name]) for name in ("prompt", "completion", "advantages")},
            **{kind: {name: list(values) for name, values in self.logs[kind].items()} for kind in ("rewards", "extra")},
            "cells": (0, 0) if first is None else (first, len(self.cells)),
            "used": self.used,
        }

    def load(self, state: Mapping[str, Any]) -> None:
        """Continue from `state`."""
        for name in ("prompt", "completion", "advantages"):
            self.logs[name].extend(state[name])
        for kind in ("rewards", "extra"):
            for name, values in state[kind].items():
                self.logs[kind][name] = deque(values, maxlen=self.logs["prompt"].maxlen)
        first, count = state["cells"]
        self.cells = list(self.logs["extra"].get("credit", ()))[first : first + count]
        self.used = state["used"]


def rows_of(values: Tensor, mask: Tensor) -> list[list[float]]:
    """One list per row, up to the last token that counts, rounded for the table."""
    rows = values.detach().float().cpu().tolist()
    return [[round(v, 5) for v in row[:n]] for row, n in zip(rows, counted(mask), strict=True)]


def counted(mask: Tensor) -> list[int]:
    """(B, T) mask -> length of each row up to the last token that counts."""
    return (mask * torch.arange(1, mask.size(1) + 1, device=mask.device)).amax(1).tolist()
