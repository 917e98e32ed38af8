"""Dynamic sampling (DAPO): drop groups whose correctness is constant, refill from new prompts, keep the batch exact.

Rows of all ranks are put in one order, kept groups are counted over all ranks, and each rank takes its share of the
final batch, so the result does not depend on which rank generated what.

Source: arXiv 2503.14476, Sec. 3.2. The metric is one named reward: a length penalty makes every shaped sum vary.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from accelerate import Accelerator
from torch import Tensor

from rltok.trainers.distributed import gather_rows

Rows = dict[str, Tensor]

LEFT_PADDED = ("prompt_ids", "prompt_mask")


def mixed_groups(metric: Tensor, group_size: int) -> Tensor:
    """(N,) values of the metric -> (N / G,) True where it varies within the group; groups of one always count.

    Rows nobody could score (NaN) do not count; a group with fewer than two scored rows does not vary.
    """
    grouped = metric.view(-1, group_size)
    if group_size == 1:
        return torch.ones(grouped.size(0), dtype=torch.bool, device=metric.device)
    known = grouped.isfinite()
    high = torch.where(known, grouped, -torch.inf).amax(1)
    low = torch.where(known, grouped, torch.inf).amin(1)
    return high > low


def gather_batch(accelerator: Accelerator, rows: Mapping[str, Tensor], pad_id: int) -> Rows:
    """All ranks' rows on every rank, padded to common widths."""
    return {
        name: gather_rows(accelerator, value, pad_id if name.endswith("_ids") else 0, name in LEFT_PADDED)
        for name, value in rows.items()
    }


def select_groups(rows: Mapping[str, Tensor], groups: Tensor, group_size: int) -> Rows:
    """Rows of the groups marked True."""
    chosen = groups.repeat_interleave(group_size)
    return {name: value[chosen] for name, value in rows.items()}


def concatenate(parts: list[Rows], pad_id: int) -> Rows:
    """Rows of several rounds below one another: prompts padded on the left, completions on the right."""
    return {name: _stack(name, [part[name] for part in parts], pad_id) for name in parts[0]}


def _stack(name: str, blocks: list[Tensor], pad_id: int) -> Tensor:
    if blocks[0].dim() == 1:
        return torch.cat(blocks)
    width = max(block.size(1) for block in blocks)
    fill = pad_id if name.endswith("_ids") else 0

    def widen(block: Tensor) -> Tensor:
        extra = width - block.size(1)
        sides = (extra, 0) if name in LEFT_PADDED else (0, extra)
        return torch.nn.functional.pad(block, sides, value=fill)

    return torch.cat([widen(block) for block in blocks])
