"""Numbers of every sampled token, and last values of rows that ended, left on the device until the end."""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import torch
from torch import Tensor


class Records:
    """Values of one number per row and step; one call of `step` goes with the calls of `add` of that step."""

    def __init__(self) -> None:
        self._owners: list[Tensor] = []
        self._positions: list[Tensor] = []
        self._values: dict[Hashable, list[Tensor]] = {}

    def step(self, owners: Tensor, positions: Tensor) -> None:
        """(B,) rows that the values of this step belong to, -1 for none, and the position of each in its row.

        The tensors are kept as they are: the caller must not write into them.
        """
        self._owners.append(owners)
        self._positions.append(positions)

    def add(self, name: Hashable, values: Tensor) -> None:
        """(B,) values of this step."""
        self._values.setdefault(name, []).append(values)

    def lists(self, name: Hashable, rows: int) -> list[list[float]]:
        """One list for each row."""
        lists: list[list[float]] = [[] for _ in range(rows)]
        if name in self._values:
            owners, values = torch.cat(self._owners).tolist(), torch.cat(self._values[name]).tolist()
            for owner, value in zip(owners, values, strict=True):
                if owner >= 0:
                    lists[owner].append(value)
        return lists

    def table(self, name: Hashable, rows: int) -> Tensor:
        """(rows, steps), 0 where a row had ended."""
        if name not in self._values:
            return torch.zeros(rows, 0)
        values, owners, steps = (torch.cat(part) for part in (self._values[name], self._owners, self._positions))
        live = owners >= 0
        table = values.new_zeros(rows, int(steps[live].max()) + 1)
        table[owners[live], steps[live]] = values[live]
        return table


class LastValues:
    """Values that a row had when it ended, by name."""

    def __init__(self) -> None:
        self._rows: list[int] = []
        self._values: dict[Hashable, list[Tensor]] = {}

    def ended(self, rows: Sequence[int]) -> None:
        """The rows, in order, to which the values added next belong."""
        self._rows += rows

    def add(self, name: Hashable, values: Tensor) -> None:
        """(n, ...) values of the rows that ended now."""
        self._values.setdefault(name, []).append(values)

    def table(self, name: Hashable) -> Tensor:
        """(rows, ...) in the order of the rows, all of which have ended."""
        values = torch.cat(self._values[name])
        table = torch.empty_like(values)
        table[torch.tensor(self._rows, device=values.device)] = values
        return table
