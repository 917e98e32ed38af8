"""The order in which prompts are drawn, made independent of when a run was interrupted."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from trl.trainer.utils import RepeatSampler


class EpochRepeatSampler(RepeatSampler):
    """TRL's RepeatSampler whose order depends on (seed, epoch) only: epoch k gives what TRL's k-th pass gives.

    TRL's own keeps a running generator, so a resumed run would see the first epoch's order again.
    """

    epoch = 0

    @classmethod
    def like(cls, base: RepeatSampler) -> EpochRepeatSampler:
        """The same sampler, resumable."""
        sampler = cls.__new__(cls)
        sampler.__dict__.update(base.__dict__)
        return sampler

    def set_epoch(self, epoch: int) -> None:
        """Called by the data loader before each pass."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        if self.shuffle and self.seed is not None:
            self.generator = torch.Generator().manual_seed(self.seed)
            for _ in range(self.epoch):
                torch.randperm(self.num_samples, generator=self.generator)
        return super().__iter__()


class RefillPrompts:
    """Endless shuffled passes over a dataset for dynamic sampling; its position is two integers.

    Every rank draws the same rows. Passes are permutations seeded by (seed, pass), apart from the training order.
    """

    def __init__(self, size: int, seed: int) -> None:
        self.size, self.seed = size, seed
        self.state = [0, 0]
        """[pass, position in it]"""

    def take(self, count: int) -> list[int]:
        """The next `count` row indices."""
        taken: list[int] = []
        while len(taken) < count:
            done, position = self.state
            generator = torch.Generator().manual_seed((self.seed + 1) * 1_000_003 + done)
            order = torch.randperm(self.size, generator=generator)[position : position + count - len(taken)].tolist()
            taken += order
            position += len(order)
            self.state = [done + 1, 0] if position >= self.size else [done, position]
        return taken


def local_share(rows: list[Any], rank: int, ranks: int) -> list[Any]:
    """This rank's contiguous share of rows that divide evenly over ranks."""
    share = len(rows) // ranks
    return rows[rank * share : (rank + 1) * share]
