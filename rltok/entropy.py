"""The entropy signal of HAPO: where a token's entropy lies between the batch's extremes, as one number in [-1, 1].

    l  = log max(H, floor)
    Q  = rho-quantile of l over the masked tokens, nearest rank (k-th smallest, k = round_half_even(rho (n - 1)))
    h  = (l - Q) / (l_max - Q)  above the pivot,   (l - Q) / (Q - l_min)  at or below it

sigma of the paper cancels in h, so h does not change when H becomes c H^a (a, c > 0): nats or bits are the same.

Source: arXiv 2509.16591, Eqs. 5-7; the released code takes the magnitude below the pivot (`sign="released"`) and
spreads about the pivot where Eq. 5 says standard deviation; we follow the equation.
Left out: running statistics over several batches; the paper uses one batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Gather = Callable[[Tensor], Tensor]
Sign = Literal["signed", "released"]

LOG_FLOOR = 1e-8
"""Smallest entropy (nats) that is told apart from zero; shared by the loss and the sampler."""


@dataclass(frozen=True)
class EntropyStats:
    """Statistics of log-entropy over a set of tokens: 0-d tensors on the device of the entropies."""

    pivot: Tensor
    """rho-quantile of log H"""
    low: Tensor
    """smallest log H"""
    high: Tensor
    """largest log H"""
    sigma: Tensor
    """standard deviation of log H about its mean (Eq. 5); it cancels in h, only the z-score temperature uses it"""
    count: Tensor
    """number of tokens"""

    def __iter__(self) -> Iterator[Tensor]:
        return iter((self.pivot, self.low, self.high, self.sigma, self.count))


def log_entropy(entropy: Tensor, floor: float = LOG_FLOOR) -> Tensor:
    """log max(H, floor), detached and at least float32."""
    entropy = entropy.detach()
    if entropy.dtype in (torch.float16, torch.bfloat16):
        entropy = entropy.float()
    return entropy.clamp(min=floor).log()


def entropy_stats(
    entropy: Tensor, mask: Tensor, rho: float = 0.8, floor: float = LOG_FLOOR, gather: Gather | None = None
) -> EntropyStats | None:
    """Pivot, extremes and spread of log-entropy over the masked tokens of all ranks.

    Args:
        entropy: (B, T) entropy in nats.
        mask: (B, T) 1 where a token counts.
        rho: quantile that splits low from high entropy, in [0, 1]; 0.8 makes the top 20 % "high".
        floor: smallest entropy in nats, > 0.
        gather: maps a rank's 1-d tensor to the concatenation over all ranks (lengths may differ). None: one rank.

    Returns:
        `EntropyStats`, or None when no token is masked in on any rank.

    Raises:
        ValueError: rho outside [0, 1], floor <= 0, or shapes that differ.
    """
    if not 0.0 <= rho <= 1.0:
        raise ValueError(f"rho={rho} is not in [0, 1]; set the quantile `rho` that splits low from high entropy")
    if not floor > 0.0:
        raise ValueError(f"floor={floor} must be > 0; it replaces entropies that round to zero")
    if entropy.shape != mask.shape:
        raise ValueError(f"entropy has shape {tuple(entropy.shape)} but mask has {tuple(mask.shape)}")
    values = log_entropy(entropy, floor)[mask.bool()]
    if gather is not None:
        values = gather(values)
    n = values.numel()
    if n == 0:
        return None
    rank = round(rho * (n - 1))  # Python rounds halves to even, as the nearest-rank rule of the paper's code does
    pivot = values.kthvalue(rank + 1).values
    sigma = values.std(unbiased=False).clamp(min=1e-4)
    return EntropyStats(pivot, values.min(), values.max(), sigma, torch.tensor(n, device=values.device))


def signal_from_log(log_h: Tensor, stats: EntropyStats, sign: Sign = "signed") -> Tensor:
    """h of a log-entropy tensor of any shape, clamped to [-1, 1] ([0, 1] for `sign="released"`)."""
    if sign not in ("signed", "released"):
        raise ValueError(f"sign={sign!r} is unknown; allowed: 'signed', 'released'")
    pivot, low, high = (torch.as_tensor(x).to(log_h) for x in (stats.pivot, stats.low, stats.high))
    deviation = log_h - pivot
    zero = torch.zeros((), dtype=log_h.dtype, device=log_h.device)
    # where() on the divisor keeps 0/0 out: with a degenerate side every in-batch deviation on it is 0,
    # and a value from outside the batch saturates at the clamp.
    tiny = torch.finfo(log_h.dtype).tiny
    above = deviation / (high - pivot).clamp(min=tiny)
    below = deviation / (pivot - low).clamp(min=tiny)
    h = torch.where(deviation > 0, above, torch.where(deviation < 0, below, zero)).clamp(-1.0, 1.0)
    return h.abs() if sign == "released" else h


def entropy_signal(
    entropy: Tensor, stats: EntropyStats | None, mask: Tensor, sign: Sign = "signed", floor: float = LOG_FLOOR
) -> Tensor:
    """HAPO's h of every token: 1 at the batch's largest entropy, 0 at the pivot, -1 at the smallest.

    Args:
        entropy: (B, T) nats; may be another policy's than the statistics', hence the clamp.
        stats: from `entropy_stats`; None gives zeros, the neutral signal.
        mask: (B, T); h is 0 where it is 0.
        sign: `signed` gives [-1, 1]; `released` the magnitude, in [0, 1], as the authors' code computes it.
        floor: the floor used for `stats`.

    Returns:
        (B, T) without gradient.
    """
    log_h = log_entropy(entropy, floor)
    if stats is None:
        return torch.zeros_like(log_h)
    return signal_from_log(log_h, stats, sign) * mask.to(log_h.dtype)
