"""The policy loss of a micro-batch: plan -> terms -> token loss.

The trainer turns `token_loss` into a scalar with `rltok.objective.aggregate`. With no terms this is the loss of TRL for
every loss type, on (B, T) advantages as well as on (B,).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rltok.objective.aggregate import CLIPPED
from rltok.objective.batch import LossBatch, LossPlan, ObjectiveTerm
from rltok.objective.ratio import log_importance_ratio
from rltok.objective.surrogate import cispo_surrogate, clipped_from_ratio, sapo_surrogate, vespo_weight


@dataclass(frozen=True)
class LossSettings:
    """The settings of the loss that TRL's configuration already names."""

    loss_type: str = "dapo"
    ratio_level: str = "token"
    """`importance_sampling_level`"""
    epsilon_low: float = 0.2
    epsilon_high: float = 0.2
    delta: float | None = None
    sapo_tau: tuple[float, float] = (1.0, 1.05)
    """for positive, negative advantages"""
    vespo_k: tuple[float, float] = (2.0, 3.0)
    vespo_lambda: tuple[float, float] = (3.0, 2.0)


def plan_loss(
    batch: LossBatch, advantages: Tensor, settings: LossSettings, terms: Sequence[ObjectiveTerm] = ()
) -> LossPlan:
    """The neutral plan of `settings`, passed through every term in order. `advantages` is (B, T) or (B, 1)."""
    plan = LossPlan(
        advantages=advantages,
        log_weight=log_importance_ratio(batch.logps, batch.old_logps, batch.mask, settings.ratio_level),
        clip_low=settings.epsilon_low,
        clip_high=settings.epsilon_high,
    )
    for term in terms:
        plan = term(batch, plan)
    return plan


def token_loss(
    batch: LossBatch, plan: LossPlan, settings: LossSettings, correction: Tensor | None = None
) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss of every token (before masking), and what was clipped.

    Args:
        correction: (B, T) or (B, 1) sampler weights; VESPO folds them into its own weight, the others multiply.

    Returns:
        (B, T) or (B, 1) loss to minimise, and metrics of the same shape.
    """
    ratio = torch.exp(plan.log_weight)
    adv = plan.advantages
    metrics: dict[str, Tensor] = {}
    kind = settings.loss_type
    if kind in CLIPPED:
        loss = clipped_from_ratio(ratio, adv, plan.clip_low, plan.clip_high, settings.delta)
        low = (ratio < 1 - plan.clip_low) & (adv < 0)
        high = (ratio > 1 + plan.clip_high) & (adv > 0)
        metrics |= {"clip_ratio/low_mean": low, "clip_ratio/high_mean": high, "clip_ratio/region_mean": low | high}
    elif kind == "cispo":
        loss = cispo_surrogate(ratio, batch.logps, adv, plan.clip_high)
        metrics["cispo_clip_ratio"] = (ratio > plan.clip_high) & (adv > 0)
    elif kind == "sapo":
        loss = sapo_surrogate(ratio, adv, *settings.sapo_tau)
    elif kind == "vespo":
        log_ratio = batch.logps - batch.old_logps
        phi = vespo_weight(adv, log_ratio, batch.mask, correction, settings.vespo_k, settings.vespo_lambda)
        loss = -phi * adv * batch.logps
        metrics["vespo/phi_seq_mean"] = phi
    else:
        raise ValueError(f"loss_type={kind!r} is unknown")
    if plan.penalty is not None:
        loss = loss + plan.penalty
    if plan.keep is not None:
        loss = loss * plan.keep
    if correction is not None and kind != "vespo":
        loss = loss * correction
    return loss, {name: value.detach().float() for name, value in metrics.items()}


def reference_kl(logps: Tensor, ref_logps: Tensor) -> Tensor:
    """KL to the reference policy per token, k3 estimator: exp(d) - d - 1 with d = logp_ref - logp; never negative."""
    diff = ref_logps - logps
    return torch.exp(diff) - diff - 1
