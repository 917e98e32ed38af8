"""HAPO parts C and D: redistribute the advantage and widen the clip range by the entropy of each token.

h in [-1, 1] is the entropy signal of `rltok.entropy`; alpha, beta strengths; e_lo, e_hi the base clip widths.

    D   lo_t = e_lo (1 - alpha h)  if h <= 0 else e_lo          hi_t = e_hi (1 + alpha h)  if h > 0 else e_hi
    C   A'_t = A_t (1 + beta h)    if h > 0 and r_t outside the neutral zone     amplify, factor in (1, 1 + beta]
                                   if h <= 0 and r_t inside it                   attenuate, factor in [1 - beta, 1]
        neutral zone: (1 - e_lo / 2, 1 + e_hi / 2), open

alpha = beta = 0 is DAPO, bit for bit. With r = 1 everywhere (one update per rollout) D does nothing and C only shrinks
routine tokens: use several updates per rollout.

| paper | here |
| --- | --- |
| rho (entropy pivot) | `rho` |
| alpha, beta | `alpha`, `beta` |
| h tilde | `entropy_signal(...)` |

Example (one group, rewards 1, -1, -1; lengths 4, 1, 2; widths 0.2 / 0.28): a token with h = -0.551846, ratio 1 and
advantage 0.866025 gets 0.388112; one with h = 1 and ratio 1.25 gets 1.732049 and an upper width of 0.56.

Source: arXiv 2509.16591, Eqs. 10-13. Left out: the released code's advantage fall-back inside the loss (it belongs to
part B, `token_group_average(limit=...)`).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
from torch import Tensor

from rltok.entropy import LOG_FLOOR, Sign, entropy_signal, entropy_stats
from rltok.objective.batch import LossBatch, LossPlan


def token_clip_widths(
    h: Tensor, eps_low: Tensor | float, eps_high: Tensor | float, alpha: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Clip widths per token: certain tokens may fall further, uncertain ones may rise further.

    Args:
        h: (B, T) entropy signal in [-1, 1].
        eps_low, eps_high: base widths.
        alpha: strength; at 1 a width at most doubles. 0 returns the base widths.

    Returns:
        (lo, hi), each (B, T). At most one of the two differs from its base.
    """
    lo = eps_low * (1 - alpha * h.clamp(max=0.0))
    hi = eps_high * (1 + alpha * h.clamp(min=0.0))
    return lo, hi


def redistribute(
    adv: Tensor, h: Tensor, ratio: Tensor, eps_low: Tensor | float, eps_high: Tensor | float, beta: float = 1.0
) -> Tensor:
    """Advantage per token after part C. The sign never flips for beta <= 1; beta = 0 returns `adv` broadcast.

    Args:
        adv: (B, T) or (B, 1).
        h: (B, T) entropy signal.
        ratio: (B, T) pi_theta / pi_old; read as a constant.
        eps_low, eps_high: widths whose halves bound the neutral zone: base widths (paper) or part D's (released code).
        beta: strength.

    Returns:
        (B, T) without gradient.
    """
    ratio = ratio.detach()
    inside = (ratio > 1 - eps_low / 2) & (ratio < 1 + eps_high / 2)
    changed = torch.where(h > 0, ~inside, inside)
    return torch.where(changed, adv * (1 + beta * h), adv).detach()


@dataclass(frozen=True)
class HAPO:
    """HAPO's loss: advantages redistributed by entropy and ratio (C), clip widths by entropy (D)."""

    alpha: float = 1.0
    """strength of D, the adaptive clip range; 0 is off; eps_low * (1 + alpha) must stay below 1"""
    beta: float = 1.0
    """strength of C, the redistribution; 0 is off; above 1 advantages would change sign"""
    rho: float = 0.8
    """quantile of log-entropy that parts low from high; 0.8 makes the top 20 % of tokens high"""
    sign: Sign = "signed"
    """`signed` as the paper describes; `released` as the authors' code computes (magnitude below the pivot)"""
    statistics: Literal["generation_batch", "micro_batch"] = "generation_batch"
    """which entropies set pivot and extremes: old policy's of the generation batch, or current policy's of the
    micro-batch (the authors' code; noisy for small micro-batches). Both over all ranks"""
    zone: Literal["base", "token"] = "base"
    """neutral zone from the base widths (paper) or from part D's widths (released code)"""
    floor: float = LOG_FLOOR
    """entropies below are read as this, in nats; it scales the lower half of the signal"""

    needs: ClassVar[tuple[str, ...]] = ("entropy_stats",)

    def __post_init__(self) -> None:
        if self.alpha < 0:
            raise ValueError(f"objective.alpha={self.alpha} must be >= 0")
        if not 0 <= self.beta <= 1:
            raise ValueError(f"objective.beta={self.beta} must lie in [0, 1]: beyond 1 advantages change sign")
        if not 0 <= self.rho <= 1:
            raise ValueError(f"objective.rho={self.rho} must lie in [0, 1]")

    def check_widths(self, eps_low: float, delta: float | None, eps_high: float) -> None:
        """Raise if the widest clip range leaves (0, delta)."""
        if eps_low * (1 + self.alpha) >= 1:
            raise ValueError(
                f"training.epsilon={eps_low} with objective.alpha={self.alpha} opens the clip range down to "
                f"{1 - eps_low * (1 + self.alpha):g}; epsilon * (1 + alpha) must stay below 1"
            )
        widest = 1 + eps_high * (1 + self.alpha)
        if delta is not None and delta <= widest:
            raise ValueError(
                f"training.delta={delta} would cut positive advantages: with training.epsilon_high={eps_high} and "
                f"objective.alpha={self.alpha} it must exceed {widest:g}"
            )

    def __call__(self, batch: LossBatch, plan: LossPlan) -> LossPlan:
        if self.alpha == 0 and self.beta == 0:
            return plan
        stats = batch.entropy_stats
        if self.statistics == "micro_batch":
            stats = entropy_stats(batch.entropy, batch.mask, self.rho, self.floor, batch.gather)
        h = entropy_signal(batch.entropy, stats, batch.mask, self.sign, self.floor).to(batch.logps.dtype)
        lo, hi = plan.clip_low, plan.clip_high
        if self.alpha > 0:
            lo, hi = token_clip_widths(h, plan.clip_low, plan.clip_high, self.alpha)
        adv = plan.advantages
        if self.beta > 0:
            zone = (lo, hi) if self.zone == "token" else (plan.clip_low, plan.clip_high)
            adv = redistribute(adv, h, batch.ratio, *zone, self.beta)
        before = plan.advantages.abs().expand_as(h)
        out = replace(plan, advantages=adv, clip_low=lo, clip_high=hi)
        return out.log(
            **{
                "hapo/signal_mean": h,
                "hapo/amplified": (adv.abs() > before).float(),
                "hapo/attenuated": (adv.abs() < before).float(),
            }
        )
