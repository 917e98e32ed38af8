"""Repacking: the rows that are left over optimizer windows, ranks and micro-batches, evenly by length.

A rollout has W optimizer steps (windows); a window has S accumulation slots on each of R ranks, of up to B rows each.
After selection fewer rows are left. They are spread so that

* every window gets its share: blocks of W rows of neighbouring lengths are dealt to the windows in random order;
* in a window, ranks hold rows of nearly equal lengths in the same slot, so that none waits for another;
* a window uses as few slots as its rows need, and rows of similar length share one, so that little is padding;
* unused slots come first: gradients are exchanged in a window's last slot, which must be a real one.

The number of windows does not change. A window without rows has no real slot.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

Slots = list[list[int]]
"""row indices of each slot of one window on one rank; unused ones are empty and come first"""


def pack_rows(
    lengths: Sequence[int], windows: int, ranks: int, slots: int, rows_per_slot: int, seed: int
) -> list[list[Slots]]:
    """Place every row exactly once.

    Args:
        lengths: (n,) tokens of each row, prompt included.
        windows, ranks, slots, rows_per_slot: W, R, S, B; n <= W R S B.
        seed: of the order of windows; equal on all ranks.

    Returns:
        [window][rank][slot] -> indices into `lengths`. Windows differ by at most one row, ranks of a window too. All
        ranks of a window use the same slots; a rank may have an empty list in a used slot when rows are too few.

    Raises:
        ValueError: more rows than fit.
    """
    if len(lengths) > windows * ranks * slots * rows_per_slot:
        raise ValueError(
            f"{len(lengths)} rows do not fit into {windows} windows of {ranks} x {slots} x {rows_per_slot} rows"
        )
    generator = torch.Generator().manual_seed(seed)
    tie = torch.randperm(len(lengths), generator=generator).tolist()  # equal lengths in random order
    order = sorted(range(len(lengths)), key=lambda row: (-lengths[row], tie[row]))
    dealt: list[list[int]] = [[] for _ in range(windows)]
    for start in range(0, len(order), windows):
        turn = torch.randperm(windows, generator=generator).tolist()
        for row, window in zip(order[start : start + windows], turn, strict=False):
            dealt[window].append(row)
    return [_pack_window(rows, ranks, slots, rows_per_slot) for rows in dealt]


def _pack_window(rows: list[int], ranks: int, slots: int, rows_per_slot: int) -> list[Slots]:
    """Rows sorted by falling length -> slots of each rank."""
    local: list[list[int]] = [[] for _ in range(ranks)]
    for block, start in enumerate(range(0, len(rows), ranks)):
        turn = range(ranks) if block % 2 == 0 else range(ranks - 1, -1, -1)
        for row, rank in zip(rows[start : start + ranks], turn, strict=False):
            local[rank].append(row)
    used = -(-max(len(share) for share in local) // rows_per_slot)
    return [[[] for _ in range(slots - used)] + _even_parts(share, used) for share in local]


def _even_parts(rows: list[int], parts: int) -> Slots:
    """Neighbouring rows in `parts` lists; the longer lists are those of the shorter rows."""
    cuts = [len(rows) * part // parts for part in range(parts + 1)] if parts else [0]
    return [rows[a:b] for a, b in zip(cuts, cuts[1:], strict=False)]


def used_slots(window: list[Slots]) -> int:
    """How many slots of a window some rank has rows in; they are its last ones."""
    return sum(any(rank[slot] for rank in window) for slot in range(len(window[0])))
