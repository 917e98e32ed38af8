"""What a credit method sees, and the masked reductions that every method shares.

Tensor legend: B rows (completions) on this rank, N rows on all ranks, G completions per prompt,
T completion tokens after right padding. Rows of a group are adjacent in the order of N.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from rltok.entropy import EntropyStats

if TYPE_CHECKING:
    from rltok.attention.signals import AttentionSignals


@dataclass(frozen=True)
class TokenBatch:
    """One generation batch as credit methods see it: local token tensors, and per-row numbers of all ranks.

    Rows `offset : offset + B` of the `all_*` vectors are this rank's rows; groups are `group_size`
    adjacent rows of the `all_*` vectors and may straddle ranks.
    """

    advantages: Tensor
    """(B,) after TRL's group normalisation"""
    mask: Tensor
    """(B, T) 1 where the policy chose the token and the loss counts it"""
    ids: Tensor
    """(B, T) token ids"""
    all_rewards: Tensor
    """(N,) weighted sum of the reward functions, before normalisation"""
    all_lengths: Tensor
    """(N,) number of masked-in tokens per row"""
    group_size: int
    """G; evaluation has its own"""
    offset: int = 0
    """index of this rank's first row in the `all_*` vectors"""
    reward_parts: Mapping[str, Tensor] = field(default_factory=dict)
    """name of the reward function -> (N,) unweighted rewards"""
    old_logps: Tensor | None = None
    """(B, T) learner log-probabilities at generation time, nats, only if asked for"""
    entropy: Tensor | None = None
    """(B, T) entropy in nats under the same policy, only if asked for"""
    entropy_stats: EntropyStats | None = None
    """statistics of `entropy` over all ranks, only if asked for"""
    attention: AttentionSignals | None = None
    """(B, T) attention signals of the policy that sampled, only if asked for"""
    response_mask: Tensor | None = None
    """(B, T) 1 at every completion token, also those the loss does not count (tools, rejected); None: same as `mask`"""
    seed: int = 0
    """not negative; differs between rollouts, equal when a run is repeated, on all ranks alike"""

    @property
    def all_groups(self) -> Tensor:
        """(N,) group index of every row."""
        return torch.arange(self.all_rewards.numel(), device=self.all_rewards.device) // self.group_size

    def local(self, values: Tensor) -> Tensor:
        """Slice a vector over all ranks (N,) to this rank's rows (B,)."""
        return values[self.offset : self.offset + self.mask.size(0)]


def masked_mean(values: Tensor, mask: Tensor, dim: int | None = None) -> Tensor:
    """Mean of `values` where `mask` is 1; 0 where nothing is masked in. `dim=None` reduces everything."""
    mask = mask.to(values.dtype)
    total = (values * mask).sum() if dim is None else (values * mask).sum(dim)
    count = mask.sum() if dim is None else mask.sum(dim)
    return total / count.clamp(min=1)
