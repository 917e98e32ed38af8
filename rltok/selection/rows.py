"""Which rollouts to train on: the subset whose advantages vary most, in closed form.

    S = argmax over |S| = k of Var(A_S)     Var about the subset's own mean

For any reals and any k some maximiser is the i smallest together with the k - i largest, for one i in 0..k: with the
other members fixed, k^2 Var is strictly convex in each single value, so no selected value lies strictly between two
unselected ones. One sort and prefix sums of x and x^2 give every split's variance: O(n log n), exact.

Inside one group the advantage is an increasing affine map of the reward, so the group form picks PODS's rows.

Example: rewards 0.9, 0.1, 0.2, 0 | 1, 1, 1, 0.4 | 0.5 x 4 in groups of four, k = 4: the advantages' split variances are
0.176237, 1.168032, 1.294864, 1.198387, 0.221149, so two from each end: rows 0, 3, 6, 7.

Source: arXiv 2509.22115, Sec. 3.1 (D1S, D1S-Cross); arXiv 2504.13818 (PODS).
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

Scope = Literal["batch", "group"]
SCOPES: tuple[str, ...] = ("batch", "group")


def max_variance_subset(values: Tensor, k: int) -> Tensor:
    """Indices of k values with the largest possible variance.

    Args:
        values: (n,) finite numbers; computed in float64 about their median, so a large offset does no harm.
        k: how many to keep; n or more keeps all, 0 none.

    Returns:
        (min(k, n),) indices, ascending. Ties: stable by index, and the split with more rows from the high end.

    Raises:
        ValueError: k < 0, `values` not one-dimensional, NaN or infinity.
    """
    if values.dim() != 1:
        raise ValueError(f"values has shape {tuple(values.shape)}, expected (n,)")
    kept = _subset_of_rows(values[None], torch.tensor([values.numel()], device=values.device), k)
    return kept[0].nonzero()[:, 0]


def select_rollouts(
    advantages: Tensor, group_ids: Tensor, n_keep: int, scope: Scope = "batch", drop_zero: bool = False
) -> Tensor:
    """Rows to train on.

    Args:
        advantages: (n,) of all ranks' rows, as computed on full groups.
        group_ids: (n,) integer label of the prompt.
        n_keep: rows in all (`batch`) or per prompt (`group`).
        scope: `batch` solves one problem over all rows; `group` one per prompt.
        drop_zero: rows with advantage 0 are never kept, so fewer than `n_keep` may remain.

    Returns:
        Row indices, ascending. `n_keep` at or above the number of rows keeps all: the baseline.

    Raises:
        ValueError: unknown scope, n_keep < 0, shapes that differ, NaN or infinity.
    """
    if scope not in SCOPES:
        raise ValueError(f"scope={scope!r} is unknown; allowed: {', '.join(SCOPES)}")
    if advantages.shape != group_ids.shape or advantages.dim() != 1:
        raise ValueError(f"advantages {tuple(advantages.shape)} and group_ids {tuple(group_ids.shape)} must be (n,)")
    candidates = (advantages != 0).nonzero()[:, 0] if drop_zero else torch.arange(advantages.numel())
    candidates = candidates.to(advantages.device)
    values = advantages[candidates]
    if scope == "batch":
        return candidates[max_variance_subset(values, n_keep)]
    _, label = torch.unique(group_ids[candidates], return_inverse=True)
    order = torch.argsort(label, stable=True)  # rows of a group together, in row order
    sizes = torch.bincount(label, minlength=1)
    starts = sizes.cumsum(0) - sizes
    column = torch.arange(order.numel(), device=order.device) - starts[label[order]]
    table = values.new_zeros(sizes.numel(), int(sizes.max()) if order.numel() else 0)
    table[label[order], column] = values[order]
    kept = _subset_of_rows(table, sizes, n_keep)
    return candidates[order[kept[label[order], column]]].sort().values


def first_of_each_group(groups: Tensor, count: int) -> Tensor:
    """(n,) group labels in any order -> positions of the first `count` rows of every label, ascending."""
    order = torch.argsort(groups, stable=True)
    _, sizes = torch.unique_consecutive(groups[order], return_counts=True)
    starts = (sizes.cumsum(0) - sizes).repeat_interleave(sizes)
    rank = torch.arange(order.numel(), device=groups.device) - starts
    return order[rank < count].sort().values


def _subset_of_rows(values: Tensor, lengths: Tensor, k: int) -> Tensor:
    """(R, n) values of which the first `lengths` (R,) count -> (R, n) True where kept; k per row."""
    if k < 0:
        raise ValueError(f"k={k} must be >= 0; it is the number of rows to keep")
    rows, n = values.shape
    position = torch.arange(n, device=values.device)
    counts = position < lengths[:, None]
    x = values.detach().double()
    if not x[counts].isfinite().all():
        raise ValueError("values contain NaN or infinity; a rollout without a score must be dropped first")
    if k == 0 or n == 0:
        return torch.zeros_like(counts)
    x, order = torch.where(counts, x, torch.inf).sort(dim=1, stable=True)  # what does not count comes last
    middle = x.gather(1, ((lengths - 1).clamp(min=0) // 2)[:, None])
    x = torch.where(counts, x - middle, 0.0)
    zero = x.new_zeros(rows, 1)
    p1, p2 = (torch.cat([zero, p.cumsum(1)], 1) for p in (x, x.square()))
    low = torch.arange(k + 1, device=x.device).expand(rows, -1)  # how many from the low end
    high_from = (lengths[:, None] - (k - low)).clamp(min=0)
    low = torch.minimum(low, high_from)

    def picked(prefix: Tensor) -> Tensor:
        total = prefix.gather(1, lengths[:, None])
        return prefix.gather(1, low) + total - prefix.gather(1, high_from)

    variance = picked(p2) / k - (picked(p1) / k).square()
    best = _first_argmax(variance, x.square().sum(1, keepdim=True) / k)
    cut_low, cut_high = low.gather(1, best), high_from.gather(1, best)
    everything = lengths[:, None] <= k
    chosen = ((position < cut_low) | (position >= cut_high) | everything) & counts
    return torch.zeros_like(counts).scatter(1, order, chosen)


def _first_argmax(values: Tensor, scale: Tensor) -> Tensor:
    """(R, m) -> (R, 1) smallest index whose value is the maximum up to rounding of numbers of size `scale` (R, 1)."""
    top = values.amax(1, keepdim=True)
    return (values >= top - 1e-12 * scale).to(torch.int8).argmax(1, keepdim=True)
