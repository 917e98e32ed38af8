"""Importance weights for tokens that another policy drew than the one being trained.

    x_t = log pi_old(a_t) - log mu(a_t)          0 outside the mask and where log mu is NaN (ratio 1)
    rho = exp x_t                                level "token"      (B, T)
          exp sum_t x_t                          level "sequence"   (B, 1)
          exp mean_t x_t                         level "geometric"  (B, 1), rejects only
    truncate:  w = clamp(rho, clip_min, clip_max)
    mask:      w = rho where clip_min <= rho <= clip_max, else rejected (geometric: 1 where inside)
    veto:      a sequence with any exp x_t < veto is rejected

mu is what drew the token (engine, processors, temperature), pi_old the learner at generation time; the ratio of the
clipped objective stays pi_theta / pi_old. Order: log-ratios clamped to [-20, 20] before exp, veto on the unclamped
ones, truncation, rejection, normalisation. Everything is detached.

Example: log pi_old (-1.0, -0.5, -2.0), log mu (-0.8, -0.9, -1.0): token ratios (0.818731, 1.491825, 0.367879), with
clip_max 1.2 truncated to (0.818731, 1.2, 0.367879), masked within [0.5, 1.2] to (0.818731, 0, 0).

The weights are right only where mu covers pi_old: with top-p, top-k, min-p or forbidden tokens E_mu[rho] is the kept
mass instead of 1.

Sources: Yao et al. 2025 (truncated importance sampling); Li et al. 2025 (sequence and geometric masks, veto);
arXiv 2601.10079 (veto and normalisation for compressed caches). Left out: replaying the sampler's transformation in
the learner, which needs per-token data and a head that is not fused; the off-policy sequence mask, which TRL has.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from rltok.reduce import ONE_RANK, Reducer

LOG_RATIO_LIMIT = 20.0
"""Bound of |log rho| before exp: e^20 stays finite in float32 also when squared."""


@dataclass(frozen=True)
class CorrectionConfig:
    """How a token is weighted when the sampler is not the policy being trained; `mode: off` weights all tokens 1."""

    level: Literal["token", "sequence", "geometric"] = "token"
    """What one ratio spans: a token, the product over a completion, or the geometric mean over a completion (which
    rejects only, and wants bounds within about 0.1 % of 1)."""
    mode: Literal["auto", "truncate", "mask", "off"] = "auto"
    """`truncate` bounds the weight, `mask` rejects outside the bounds, `off` leaves weight 1; `auto` truncates
    (level geometric: masks) exactly when something modifies the sampler."""
    clip_max: float | None = 2.0
    """Upper bound of the ratio, at least 1; null for none."""
    clip_min: float | None = None
    """Lower bound of the ratio, in (0, 1]: floor of the weight when truncating, edge of rejection when masking."""
    symmetric: bool = False
    """Take 1 / clip_max as the lower bound where clip_min is null."""
    veto: float | None = None
    """Per-token floor: reject the whole completion if any token's ratio is below it; 1e-4 with an evicting cache."""
    batch_normalize: bool = False
    """Divide the weights by their mean over the tokens (or completions) of all ranks that still count."""
    masked_in_denominator: bool = False
    """Keep rejected tokens in the denominator of the loss, as TRL does; false: a rejected token is not data."""
    min_ess: float = 0.5
    """Warn when the effective sample size, as a fraction of the sample, falls below this; 0 never warns."""

    def __post_init__(self) -> None:
        _check_choice("level", self.level, ("token", "sequence", "geometric"))
        _check_choice("mode", self.mode, ("auto", "truncate", "mask", "off"))
        if self.clip_max is not None and not self.clip_max >= 1.0:
            raise ValueError(
                f"clip_max={self.clip_max} must be at least 1, or equal policies would not get weight 1; null for none"
            )
        if self.clip_min is not None and not 0.0 < self.clip_min <= 1.0:
            raise ValueError(f"clip_min={self.clip_min} is not in (0, 1]; null sets no lower bound")
        if self.symmetric and self.clip_max is None:
            raise ValueError("symmetric=True takes 1 / clip_max as the lower bound: set clip_max")
        if self.symmetric and self.clip_min is not None:
            raise ValueError(f"symmetric=True and clip_min={self.clip_min} both set the lower bound: keep one")
        if self.veto is not None and not 0.0 < self.veto < 1.0:
            raise ValueError(f"veto={self.veto} is not in (0, 1); it is the smallest ratio that a token may have")
        if not 0.0 <= self.min_ess <= 1.0:
            raise ValueError(f"min_ess={self.min_ess} is not in [0, 1]; it is a fraction of the sample")
        if self.level == "geometric" and self.mode == "truncate":
            raise ValueError("level='geometric' only rejects: set mode='mask' (or another level)")
        if self.mode == "off" and self.veto is not None:
            raise ValueError(f"mode='off' makes veto={self.veto} ineffective: set veto to null or another mode")

    @property
    def bounds(self) -> tuple[float, float]:
        """Smallest and largest ratio that is neither truncated nor rejected; (0, inf) without bounds."""
        high = math.inf if self.clip_max is None else self.clip_max
        if self.clip_min is not None:
            return self.clip_min, high
        return (1.0 / high if self.symmetric else 0.0), high

    def resolve(self, sampler_is_modified: bool) -> CorrectionConfig:
        """This configuration with `mode: auto` decided; any other mode stays."""
        if self.mode != "auto":
            return self
        if not sampler_is_modified:
            return replace(self, mode="off", veto=None)
        return replace(self, mode="mask" if self.level == "geometric" else "truncate")


@dataclass(frozen=True)
class RolloutWeights:
    """Detached weights of one batch. B rows on this rank, T completion tokens."""

    weight: Tensor
    """(B, T) for level token, else (B, 1); 0 where rejected"""
    keep: Tensor
    """bool, shape of `weight`; False where rejected"""
    loss_mask: Tensor
    """(B, T) dtype of the mask; 1 where a token counts in the denominator of the loss"""
    metrics: dict[str, Tensor]
    """name -> 0-d tensor, over all ranks"""


def rollout_weights(
    log_old: Tensor, log_mu: Tensor, mask: Tensor, cfg: CorrectionConfig, reduce: Reducer | None = None
) -> RolloutWeights:
    """Weights that turn an expectation under the sampler into one under the learner at generation time.

    log_old = log_mu gives exactly 1 everywhere, in every mode.

    Args:
        log_old: (B, T) log-probabilities of the tokens under the learner at generation time, nats.
        log_mu: (B, T) under the distribution that drew them; NaN where unknown.
        mask: (B, T) 1 where the policy chose the token; values elsewhere do not matter.
        cfg: `mode: auto` corrects here; who asks for weights has decided that the sampler is modified.
        reduce: totals over ranks; None for one rank. Called twice on every rank.

    Returns:
        `RolloutWeights`. Metrics: `k1` = mean(log mu - log pi_old) and `k3` = mean(rho - 1 - log rho), both estimates
        of KL(mu, pi_old) in nats; `max_abs_diff`; `perplexity_ratio` = exp k1; `chi2` = mean(rho^2) - 1 over tokens;
        `unknown`, the share of tokens without log mu; at the level's own unit and before any bound `ratio_mean`,
        `ratio_max`, `ess` (effective sample size as a fraction) and `truncated`; `rejected`, including vetoes;
        `vetoed`, share of completions; after bounds and normalisation `weight_mean` and `weight_ess`.

    Raises:
        ValueError: shapes that differ.
    """
    cfg = cfg.resolve(True)
    if not log_old.shape == log_mu.shape == mask.shape:
        raise ValueError(
            f"shapes differ: log_old {tuple(log_old.shape)}, log_mu {tuple(log_mu.shape)}, mask {tuple(mask.shape)}"
        )
    valid = mask.bool()
    x, unknown = _log_ratios(log_old, log_mu, valid)
    ratio = _level_ratio(x, valid, cfg.level)
    low, high = cfg.bounds
    outside = (ratio < low) | (ratio > high)
    vetoed = _vetoed(x, cfg.veto)  # (B, 1)

    weight, keep = _bounded(ratio, outside, cfg)
    keep = keep & ~vetoed
    weight = torch.where(keep, weight, torch.zeros_like(weight))

    units = valid if cfg.level == "token" else valid.any(dim=1, keepdim=True)
    counted = units if cfg.masked_in_denominator else units & keep
    totals = _totals(
        x, ratio, weight, valid, units, counted, unknown=unknown, outside=outside, vetoed=vetoed, keep=keep
    )
    metrics = _metrics(totals, _maxima(x, ratio, units), reduce or ONE_RANK, truncating=cfg.mode == "truncate")
    if cfg.batch_normalize:
        mean = metrics["weight_mean"]
        weight = weight / torch.where(mean > 0, mean, torch.ones_like(mean))
        metrics["weight_mean"] = torch.where(mean > 0, torch.ones_like(mean), mean)
    loss_mask = mask if cfg.masked_in_denominator else mask * keep.to(mask.dtype)
    return RolloutWeights(weight, keep, loss_mask, metrics)


def _log_ratios(log_old: Tensor, log_mu: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
    """Unclamped log-ratios (B, T), and where they are unknown."""
    x = (log_old.detach() - log_mu.detach()).to(torch.promote_types(log_old.dtype, torch.float32))
    unknown = valid & x.isnan()
    return torch.where(valid & ~unknown, x, torch.zeros_like(x)), unknown


def _level_ratio(x: Tensor, valid: Tensor, level: str) -> Tensor:
    if level != "token":
        total = x.sum(dim=1, keepdim=True)
        x = total if level == "sequence" else total / valid.sum(dim=1, keepdim=True).clamp(min=1)
    return x.clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT).exp()


def _vetoed(x: Tensor, veto: float | None) -> Tensor:
    if veto is None:
        return torch.zeros(x.size(0), 1, dtype=torch.bool, device=x.device)
    return (x < math.log(veto)).any(dim=1, keepdim=True)


def _bounded(ratio: Tensor, outside: Tensor, cfg: CorrectionConfig) -> tuple[Tensor, Tensor]:
    """Weight and keep mask before the veto."""
    everything = torch.ones_like(outside)
    if cfg.mode == "off":
        return torch.ones_like(ratio), everything
    if cfg.mode == "truncate":
        low, high = cfg.bounds
        return ratio.clamp(min=low, max=high), everything
    return (torch.ones_like(ratio) if cfg.level == "geometric" else ratio), ~outside


def _totals(
    x: Tensor, ratio: Tensor, weight: Tensor, valid: Tensor, units: Tensor, counted: Tensor, **flags: Tensor
) -> dict[str, Tensor]:
    """Local sums and counts; all that the metrics need, so that one reduction serves them all."""
    safe = x.clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)
    weight = weight * counted
    rows = valid.any(dim=1, keepdim=True)
    sums = {
        "tokens": valid.sum(),
        "x": x.sum(),
        "k3": (torch.expm1(safe) - safe).sum(),
        "rho2": ((2 * safe).exp() * valid).sum(),
        "units": units.sum(),
        "ratio": (ratio * units).sum(),
        "ratio2": (ratio.square() * units).sum(),
        "outside": (flags["outside"] & units).sum(),
        "rejected": (~flags["keep"] & units).sum(),
        "rows": rows.sum(),
        "vetoed": (flags["vetoed"] & rows).sum(),
        "counted": counted.sum(),
        "weight": weight.sum(),
        "weight2": weight.square().sum(),
        "unknown": flags["unknown"].sum(),
    }
    return {name: value.to(x.dtype) for name, value in sums.items()}


def _maxima(x: Tensor, ratio: Tensor, units: Tensor) -> Tensor:
    zero = x.new_zeros(1)  # keeps an empty batch from having no maximum
    return torch.stack([torch.cat([v.flatten(), zero]).max() for v in (x.abs(), ratio * units)])


def _metrics(totals: dict[str, Tensor], maxima: Tensor, reduce: Reducer, truncating: bool) -> dict[str, Tensor]:
    reduced = reduce.sum(torch.stack(list(totals.values())))
    s = dict(zip(totals, reduced.unbind(), strict=True))
    max_abs_diff, ratio_max = reduce.max(maxima).unbind()
    tokens, units, rows, counted = (s[name].clamp(min=1) for name in ("tokens", "units", "rows", "counted"))
    k1 = -s["x"] / tokens
    return {
        "k1": k1,
        "k3": s["k3"] / tokens,
        "max_abs_diff": max_abs_diff,
        "perplexity_ratio": k1.exp(),
        "chi2": torch.where(s["tokens"] > 0, s["rho2"] / tokens - 1, torch.zeros_like(k1)),
        "unknown": s["unknown"] / tokens,
        "ratio_mean": s["ratio"] / units,
        "ratio_max": ratio_max,
        "ess": _ess(s["ratio"], s["ratio2"], s["units"]),
        "truncated": s["outside"] / units if truncating else torch.zeros_like(k1),
        "rejected": s["rejected"] / units,
        "vetoed": s["vetoed"] / rows,
        "weight_mean": s["weight"] / counted,
        "weight_ess": _ess(s["weight"], s["weight2"], s["counted"]),
    }


def _ess(total: Tensor, squares: Tensor, count: Tensor) -> Tensor:
    """(sum w)^2 / (n sum w^2), in (0, 1]; 1 for an empty sample, 0 where all weights are 0."""
    tiny = torch.finfo(total.dtype).tiny
    ess = total.square() / (count * squares).clamp(min=tiny)
    return torch.where(count > 0, ess, torch.ones_like(ess))


def _check_choice(name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{name}={value!r} is unknown; allowed: {', '.join(map(repr, allowed))}")
