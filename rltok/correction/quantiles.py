"""How far sampler and learner are apart at the tail, where learning breaks.

    xi_t = pi_old(a_t) / mu(a_t)            agreement_t = min(xi_t, 1 / xi_t)        1: the two policies agree

Sparse or quantised rollouts fail through a few tokens that the learner finds absurd, which means do not show.

Sources: arXiv 2601.10079 (xi); arXiv 2606.08446 (5th percentile as what decides; its exact ratio is not published).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from rltok.correction.weights import LOG_RATIO_LIMIT

TAIL = 0.05


def mismatch_quantiles(log_ratio: Tensor) -> dict[str, Tensor]:
    """Minimum and 5th percentile of xi, and 5th percentile of the agreement, over the tokens of all ranks.

    Args:
        log_ratio: (N,) log pi_old - log mu of the sampled tokens, nats; NaN (log mu unknown) is left out.

    Returns:
        `ratio_min`, `ratio_p5`, `agreement_p5`, 0-d; 1 without a token. The percentile is the smallest value that at
        least 5 % of the tokens do not exceed.

    Example: xi 1.25, 0.8, 0.005, 1 have minimum and 5th percentile 0.005.
    """
    x = log_ratio.detach()
    x = x[~x.isnan()].float().clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)
    if x.numel() == 0:
        one = torch.ones((), device=x.device)
        return {"ratio_min": one, "ratio_p5": one, "agreement_p5": one}
    rank = max(1, math.ceil(TAIL * x.numel()))
    return {
        "ratio_min": x.min().exp(),
        "ratio_p5": x.kthvalue(rank).values.exp(),
        "agreement_p5": (-x.abs()).kthvalue(rank).values.exp(),
    }
