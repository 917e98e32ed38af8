"""Entropy advantage shaping: a detached entropy bonus on each token's advantage, bounded so that its sign survives.

    A'_t = A + min(alpha sg[H_t], |A| / kappa)

Example: alpha 0.4, kappa 2, A = 1.154601 and H = 0.02 nats give 1.162601; A = -0.5773 and H = 0.05 give -0.5573.

alpha = 0 is the baseline. Source: arXiv 2506.14758; alpha 0.4 and kappa 2 are commonly quoted for GRPO, not confirmed
from the paper. H is the old policy's, at the sampling temperature, once per generation batch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from rltok.batch import TokenBatch


def shape_by_entropy(advantages: Tensor, entropy: Tensor, alpha: float = 0.4, kappa: float = 2.0) -> Tensor:
    """A + min(alpha H, |A| / kappa), without gradient. `advantages` (B, 1) or (B, T), `entropy` (B, T) nats."""
    return advantages + torch.minimum(alpha * entropy.detach(), advantages.abs() / kappa)


@dataclass(frozen=True)
class EntropyShaping:
    """Entropy bonus added to the advantage of each token, never enough to flip its sign."""

    alpha: float = 0.4
    """advantage per nat of entropy; 0 is the baseline"""
    kappa: float = 2.0
    """the bonus is at most |A| / kappa; above 1 keeps the sign"""

    needs: ClassVar[tuple[str, ...]] = ("entropy",)
    per_token: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.alpha < 0:
            raise ValueError(f"credit.alpha={self.alpha} must be >= 0")
        if self.kappa <= 1:
            raise ValueError(f"credit.kappa={self.kappa} must be above 1, or the bonus can flip an advantage")

    def __call__(self, batch: TokenBatch) -> Tensor:
        assert batch.entropy is not None
        return shape_by_entropy(batch.advantages[:, None], batch.entropy, self.alpha, self.kappa) * batch.mask
