"""PODS: of each prompt's rollouts keep the k whose rewards vary most, and normalise the rewards again on these.

    S_g = argmax over |S| = k of Var(r_S)      A_i = (r_i - mean_S) / (std_S + 1e-4), std with ddof 1

A prompt whose k kept rewards are all equal gets A = 0. `keep = 1` is the baseline up to its normalisation, which is
TRL's (ddof 1, 1e-4) on whole groups. With `renormalize: false` it is D3S with `scope: group` and all tokens.

Source: arXiv 2504.13818 and its code. Ties between equal rewards may be broken freely; here by the lowest row.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from rltok.selection.method import LOSS_NORMS, EntropySource, LossNorm, RowBatch, TokenPool, check_choice, check_share
from rltok.selection.rows import select_rollouts


@dataclass(frozen=True)
class PODS:
    """The rollouts of largest reward variance in each group, with advantages of their own."""

    keep: float = 0.25
    """share k / n of each prompt's rollouts, in (0, 1]; the authors use 16 of 64"""
    renormalize: bool = True
    """advantages from the kept rewards; false keeps those of the full group"""
    loss_norm: LossNorm = "kept"
    """divisor of the loss: tokens of the kept rows (`kept` and `selected`), or of all rollouts (`full`)"""

    reads_entropy: ClassVar[bool] = False
    selects_tokens: ClassVar[bool] = False
    drops_zero: ClassVar[bool] = False
    scope: ClassVar[Literal["batch", "group"]] = "group"
    token_scope: ClassVar[TokenPool] = "auto"
    entropy_from: ClassVar[EntropySource] = "auto"

    def __post_init__(self) -> None:
        check_share("keep", self.keep)
        check_choice("loss_norm", self.loss_norm, LOSS_NORMS)

    @property
    def recredits(self) -> bool:
        """True with `renormalize` while rows are dropped."""
        return self.renormalize and self.keep < 1

    def at(self, step: int, total_steps: int, rows: int, group_size: int) -> tuple[int, float]:
        """A constant number of rows per prompt, all their tokens."""
        return max(1, int(self.keep * group_size + 0.5)), 1.0

    def rows(self, batch: RowBatch, n_keep: int) -> Tensor:
        """Chosen by reward in every group."""
        candidates = (batch.trainable & batch.rewards.isfinite()).nonzero()[:, 0]
        rewards = batch.rewards.double()[candidates]
        return candidates[select_rollouts(rewards, batch.groups[candidates], n_keep, "group")]

    def credit(self, batch: RowBatch, kept: Tensor) -> Tensor | None:
        """Advantages on the kept rows, 0 elsewhere."""
        return renormalized(batch.rewards, batch.groups, kept) if self.recredits else None

    def tokens(
        self, advantages: Tensor, entropies: Tensor | None, mask: Tensor, share: float, per_row: bool, seed: int
    ) -> Tensor:
        """All of them."""
        return mask.bool()


def renormalized(rewards: Tensor, groups: Tensor, kept: Tensor, eps: float = 1e-4) -> Tensor:
    """(N,) rewards and group labels, indices of kept rows -> (N,) float64 (r - mean) / (std + eps) over each group's
    kept rows, ddof 1; 0 for rows not kept, groups of equal rewards and groups of one."""
    values = rewards.double()[kept]
    _, label = torch.unique(groups[kept], return_inverse=True)
    many = int(label.max()) + 1 if label.numel() else 0
    count = torch.bincount(label, minlength=many).double()
    mean = torch.zeros(many, dtype=torch.float64, device=values.device).index_add(0, label, values) / count
    spread = (values - mean[label]).square()
    variance = torch.zeros_like(mean).index_add(0, label, spread) / (count - 1).clamp(min=1)
    low = torch.full_like(mean, torch.inf).scatter_reduce(0, label, values, "amin")
    high = torch.full_like(mean, -torch.inf).scatter_reduce(0, label, values, "amax")
    result = (values - mean[label]) / (variance.sqrt()[label] + eps)
    result = torch.where((high > low)[label], result, 0.0)
    return torch.zeros(rewards.numel(), dtype=torch.float64, device=rewards.device).scatter(0, kept, result)
