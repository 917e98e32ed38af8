"""Per-token policy losses (to minimise) of every loss type, on any advantages and clip widths that broadcast to (B, T).

clipped   -min(min(r, delta) A, clip(r, 1 - lo, 1 + hi) A)      grpo, bnpo, dr_grpo, dapo, luspo
cispo     -sg[min(r, hi)] A logp                                arXiv 2506.13585; `hi` is the bound itself
sapo      -A sigmoid(tau (r - 1)) 4 / tau, tau by sign of A     arXiv 2511.20347
vespo     -phi(w) A logp, w the completion's ratio              gamma weighting, detached
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def clipped_from_ratio(
    ratio: Tensor, advantages: Tensor, lo: Tensor | float, hi: Tensor | float, delta: float | None = None
) -> Tensor:
    """Clipped loss of a ratio that carries gradient; see `clipped_surrogate`."""
    low, high = 1 - lo, 1 + hi
    if isinstance(low, Tensor) or isinstance(high, Tensor):
        clipped = torch.clamp(ratio, torch.as_tensor(low).to(ratio), torch.as_tensor(high).to(ratio))
    else:
        clipped = torch.clamp(ratio, low, high)
    capped = ratio if delta is None else torch.clamp(ratio, max=delta)
    return -torch.min(capped * advantages, clipped * advantages)


def clipped_surrogate(
    logp: Tensor, old_logp: Tensor, adv: Tensor, lo: Tensor | float, hi: Tensor | float, delta: float | None = None
) -> Tensor:
    """PPO's clipped loss per token with widths of its own for every token, and dual clipping.

    -min(min(r, delta) A, clip(r, 1 - lo, 1 + hi) A), r = exp(logp - old_logp)

    Args:
        logp: (B, T) with gradient.
        old_logp: (B, T) constant.
        adv: (B, T) or (B, 1), constant.
        lo, hi: widths below and above 1, numbers or (B, T).
        delta: dual clip: caps the loss of a token with negative advantage at -A delta; None is off. Inert for
            positive advantages as long as it exceeds 1 + hi.

    Returns:
        (B, T), to be minimised. Numbers lo, hi and delta None give DAPO's token loss.
    """
    return clipped_from_ratio(torch.exp(logp - old_logp), adv, lo, hi, delta)


def cispo_surrogate(ratio: Tensor, logp: Tensor, adv: Tensor, bound: Tensor | float) -> Tensor:
    """Detached, capped ratio times advantage times log-probability; every token keeps its gradient."""
    return -torch.clamp(ratio, max=bound).detach() * adv * logp


def sapo_surrogate(ratio: Tensor, adv: Tensor, tau_positive: float, tau_negative: float) -> Tensor:
    """Soft gate instead of a clip; at r = 1 value and slope of the plain ratio are 2/tau and 1."""
    tau = torch.where(adv > 0, tau_positive, tau_negative)
    return -(torch.sigmoid(tau * (ratio - 1)) * 4 / tau) * adv


@torch.no_grad()
def vespo_weight(
    adv: Tensor,
    log_ratio: Tensor,
    mask: Tensor,
    correction: Tensor | None = None,
    k: tuple[float, float] = (2.0, 3.0),
    lam: tuple[float, float] = (3.0, 2.0),
) -> Tensor:
    """phi(w) = e^lambda w^k e^(-lambda w), 1 at w = 1; w = prod_t r_t of the completion, times the sampler correction.

    Args:
        adv: (B, 1) or (B, T); its sign picks (k, lambda): first entry for A >= 0, second for A < 0.
        log_ratio: (B, T) token log ratios.
        correction: (B, T) sampler weights, multiplied into w.

    Returns:
        (B, 1) or (B, T), without gradient.
    """
    floor = math.log(1e-8)
    log_w = (log_ratio.clamp(-20.0, 20.0) * mask).sum(-1, keepdim=True)
    if correction is not None:
        log_w = log_w + correction.log().clamp(floor, 20.0).sum(-1, keepdim=True)
    log_w = log_w.clamp(floor, 20.0)
    positive = adv >= 0
    k_t = torch.where(positive, k[0], k[1])
    lam_t = torch.where(positive, lam[0], lam[1]).clamp(min=1e-4)
    return torch.exp(lam_t + k_t * log_w - lam_t * log_w.exp()).nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)
