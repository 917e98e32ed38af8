"""Clip-Cov and KL-Cov: hold back the few tokens whose covariance of advantage and log-probability drives entropy down.

    c_t = (A_t - mean A) (logp_t - mean logp)     means over the masked tokens of the micro-batch on all ranks

Source: arXiv 2505.22617; constants from the authors' recipes. Left out: nothing.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from rltok.objective.batch import LossBatch, LossPlan


def token_covariance(batch: LossBatch, advantages: Tensor) -> Tensor:
    """(B, T) product of the two deviations, detached, 0 where masked."""
    mask = batch.mask.bool()
    logps = batch.logps.detach()
    adv = advantages.expand_as(logps)
    all_adv, all_logps = batch.gather(adv[mask]), batch.gather(logps[mask])
    count = max(all_adv.numel(), 1)
    return (adv - all_adv.sum() / count) * (logps - all_logps.sum() / count) * mask


def _share(batch: LossBatch, ratio: float) -> int:
    """max(1, int(ratio * tokens on all ranks))"""
    mask = batch.mask.bool()
    return max(1, int(ratio * batch.gather(batch.mask[mask]).numel()))


@dataclass(frozen=True)
class ClipCov:
    """Clip-Cov: randomly chosen high-covariance tokens that plain clipping left alone get no loss."""

    ratio: float = 2e-4
    """share of tokens to silence; at least one token where any qualifies. 0 is the baseline"""
    low: float = 1.0
    """smallest covariance that qualifies"""
    high: float = 5.0
    """largest covariance that qualifies"""

    needs: ClassVar[tuple[str, ...]] = ()

    def __call__(self, batch: LossBatch, plan: LossPlan) -> LossPlan:
        if self.ratio == 0:
            return plan
        cov = token_covariance(batch, plan.advantages)
        ratio, adv = torch.exp(plan.log_weight.detach()), plan.advantages
        clipped = ((ratio < 1 - plan.clip_low) & (adv < 0)) | ((ratio > 1 + plan.clip_high) & (adv > 0))
        candidate = (cov > self.low) & (cov < self.high) & ~clipped & batch.mask.bool()
        generator = torch.Generator().manual_seed(batch.seed)
        draw = torch.rand(cov.shape, generator=generator, dtype=torch.float64).to(cov.device)
        draws = batch.gather(draw[candidate])
        if draws.numel() == 0:
            return plan.log(**{"clip_cov/silenced": torch.zeros_like(cov)})
        k = min(_share(batch, self.ratio), draws.numel())
        silenced = candidate & (draw <= draws.kthvalue(k).values)
        keep = (~silenced).to(cov.dtype)
        keep = keep if plan.keep is None else plan.keep * keep
        return replace(plan, keep=keep).log(**{"clip_cov/silenced": silenced.float()})


@dataclass(frozen=True)
class KLCov:
    """KL-Cov: no ratio clip; the tokens of highest covariance pay coef * |logp - logp_old|."""

    ratio: float = 2e-4
    """share of tokens that pay; at least one"""
    coef: float = 1.0
    """price per nat; 0 leaves the unclipped policy gradient"""

    needs: ClassVar[tuple[str, ...]] = ()

    def __call__(self, batch: LossBatch, plan: LossPlan) -> LossPlan:
        cov = token_covariance(batch, plan.advantages)
        mask = batch.mask.bool()
        values = batch.gather(cov[mask])
        plan = replace(plan, clip_low=float("inf"), clip_high=float("inf"))
        if values.numel() == 0:
            return plan
        k = _share(batch, self.ratio)
        pays = mask & (cov >= values.topk(k).values[-1])
        price = self.coef * (batch.logps - batch.old_logps).abs() * pays
        penalty = price if plan.penalty is None else plan.penalty + price
        return replace(plan, penalty=penalty).log(**{"kl_cov/penalised": pays.float()})
