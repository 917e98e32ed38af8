"""Totals over ranks, for statistics that must not depend on how rows fell on ranks.

The trainer implements `Reducer` with collectives; the pure functions only see the protocol. Every rank calls it the
same number of times with the same shapes, whatever its data.
"""

from __future__ import annotations

from typing import Protocol

from torch import Tensor


class Reducer(Protocol):
    """Elementwise totals of a small 1-d tensor over all ranks; every rank gets the same result."""

    def sum(self, local: Tensor) -> Tensor:
        """(K,) local sums or counts -> (K,) sums over ranks."""
        ...

    def max(self, local: Tensor) -> Tensor:
        """(K,) local maxima -> (K,) maxima over ranks."""
        ...


class OneRank:
    """The reducer of a single process: local totals are the totals."""

    def sum(self, local: Tensor) -> Tensor:
        """The argument itself."""
        return local

    def max(self, local: Tensor) -> Tensor:
        """The argument itself."""
        return local


ONE_RANK = OneRank()
