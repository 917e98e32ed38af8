"""Collectives the pure functions ask for, on accelerate."""

from __future__ import annotations

import torch
from accelerate import Accelerator
from torch import Tensor


class AccelerateReducer:
    """Sums and maxima over all ranks (`rltok.reduce.Reducer`)."""

    def __init__(self, accelerator: Accelerator) -> None:
        self.accelerator = accelerator

    def sum(self, local: Tensor) -> Tensor:
        """(K,) -> (K,) sums over ranks."""
        return self.accelerator.reduce(local, reduction="sum")

    def max(self, local: Tensor) -> Tensor:
        """(K,) -> (K,) maxima over ranks."""
        if self.accelerator.num_processes == 1:
            return local
        return self.accelerator.gather(local).view(self.accelerator.num_processes, -1).amax(0)


class RaggedGather:
    """Concatenation over ranks of 1-d tensors whose lengths differ, in rank order."""

    def __init__(self, accelerator: Accelerator) -> None:
        self.accelerator = accelerator

    def __call__(self, local: Tensor) -> Tensor:
        ranks = self.accelerator.num_processes
        if ranks == 1:
            return local
        lengths = self.accelerator.gather(torch.tensor([local.numel()], device=self.accelerator.device)).tolist()
        padded = torch.nn.functional.pad(local, (0, max(lengths) - local.numel()))
        rows = self.accelerator.gather(padded).view(ranks, -1)
        return torch.cat([row[:n] for row, n in zip(rows, lengths, strict=True)])


def gather_rows(accelerator: Accelerator, rows: Tensor, pad_value: float = 0, pad_first: bool = False) -> Tensor:
    """(B, ...) on each rank -> (N, ...) on every rank; dimension 1 is padded to the longest rank's."""
    if accelerator.num_processes == 1:
        return rows
    if rows.dim() > 1:
        rows = accelerator.pad_across_processes(rows, dim=1, pad_index=pad_value, pad_first=pad_first)
    return accelerator.gather(rows.contiguous())
