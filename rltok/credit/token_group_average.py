"""HAPO part B: standardise the reward over all tokens of the group instead of over its completions.

    mu = sum_i n_i R_i / sum_i n_i     var = sum_i n_i (R_i - mu)^2 / sum_i n_i     A_i = (R_i - mu) / (sqrt(var) + eps)

n_i counts the tokens of completion i that the loss sees. sum_i n_i A_i = 0: under a token-mean loss, long wrong answers
no longer outweigh short right ones. With equal lengths it is GRPO's advantage times sqrt(G / (G - 1)).

Example: rewards 1, -1, -1, lengths 4, 1, 2 give 0.866025, -1.154699, -1.154699 (GRPO: 1.154699, -0.577350, -0.577350).

Source: arXiv 2509.16591, Eq. 9. The fall-back to GRPO beyond a limit exists in the released code only; off by default.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from rltok.batch import TokenBatch


def token_group_average(
    rewards: Tensor, lengths: Tensor, groups: Tensor, eps: float = 1e-6, scale: bool = True, limit: float | None = None
) -> Tensor:
    """Advantage of every completion, standardised over the tokens of its group.

    Args:
        rewards: (N,) one per completion of all ranks; NaN marks a completion nobody could score.
        lengths: (N,) tokens the loss counts.
        groups: (N,) any integer label; equal labels form a group.
        eps: added to the deviation.
        scale: False only centres.
        limit: a group with an |A| at or above it takes GRPO's advantages (mean and n - 1 deviation over completions).

    Returns:
        (N,) in the dtype of `rewards`. 0 for completions without tokens or score, groups of one, and constant groups.
    """
    r, n = rewards.detach().double(), lengths.detach().double()
    usable = (n > 0) & r.isfinite()
    r, n = torch.where(usable, r, 0.0), torch.where(usable, n, 0.0)
    _, index = torch.unique(groups, return_inverse=True)
    size = int(index.max()) + 1 if index.numel() else 0

    def total(values: Tensor) -> Tensor:
        return values.new_zeros(size).index_add_(0, index, values)

    def standardise(weight: Tensor, ddof: int) -> Tensor:
        count = total(weight)
        centred = r - (total(weight * r) / count.clamp(min=1))[index]
        if not scale:
            return centred
        variance = total(weight * centred.square()) / (count - ddof).clamp(min=1)
        return centred / (variance.sqrt() + eps)[index]

    advantages = standardise(n, 0)
    if limit is not None:
        beyond = total((usable & (advantages.abs() >= limit)).double()) > 0
        advantages = torch.where(beyond[index], standardise(usable.double(), 1), advantages)
    high = r.new_full((size,), -torch.inf).scatter_reduce_(0, index, torch.where(usable, r, -torch.inf), "amax")
    low = r.new_full((size,), torch.inf).scatter_reduce_(0, index, torch.where(usable, r, torch.inf), "amin")
    varies = usable & (high > low)[index]
    return torch.where(varies, advantages, 0.0).to(rewards.dtype)


@dataclass(frozen=True)
class TokenGroupAverage:
    """HAPO part B: advantages standardised over all tokens of a group, so length does not tilt the loss."""

    eps: float = 1e-6
    """added to the deviation"""
    scale: bool = True
    """divide by the deviation; False only centres"""
    limit: float | None = None
    """fall back to GRPO's advantages for a group with an |advantage| at or above (released code: 5); null is off"""

    needs: ClassVar[tuple[str, ...]] = ()
    per_token: ClassVar[bool] = False

    def __call__(self, batch: TokenBatch) -> Tensor:
        advantages = token_group_average(
            batch.all_rewards, batch.all_lengths, batch.all_groups, self.eps, self.scale, self.limit
        )
        return batch.local(advantages)[:, None] * batch.mask
