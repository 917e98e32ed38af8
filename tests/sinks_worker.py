"""Sums of attention sinks of a batch whose rows lie on two processes, added over them.

Started by tests/test_sinks.py through torchrun.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from rltok.attention.sink_monitor import TORCH_RANKS
from rltok.attention.sinks import SinkStats, sink_stats

LENGTHS = (5, 7, 3)


def row_stats(row: int) -> SinkStats:
    """Of one row of random attention; rows differ in length."""
    generator = torch.Generator().manual_seed(row)
    width = LENGTHS[row]
    hidden = torch.ones(width, width).triu(1).bool()
    maps = torch.randn(4, width, width, generator=generator).masked_fill(hidden, -torch.inf).softmax(-1)
    return sink_stats(maps, torch.randn(2, width, 3, generator=generator), first=2)


if __name__ == "__main__":
    torch.distributed.init_process_group("gloo")
    rank = torch.distributed.get_rank()
    mine = row_stats(0) + row_stats(1) if rank == 0 else row_stats(2)
    total = mine.reduced(TORCH_RANKS)
    torch.save((total.received, total.relative_norm, total.value_ratio), Path(sys.argv[1]) / f"{rank}.pt")
    torch.distributed.destroy_process_group()
