"""Which tokens to train on: the top share by |A_it| H_it, an exact number of them.

    m = ceil(K n_valid), the m valid tokens of largest |A_it| H_it; ties to the lowest index, row by row

With one advantage per completion, ranking inside one completion is plain entropy ranking; the default pool is the
batch, where |A| decides too. A quantile as threshold would keep more on ties and can miss the number by one.

Source: arXiv 2509.22115, Sec. 3.2; the entropy is the training policy's. The paper leaves the pool open (`scope`).
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

TokenScope = Literal["batch", "sample"]
TOKEN_SCOPES: tuple[str, ...] = ("batch", "sample")


def select_tokens(
    advantages: Tensor, entropies: Tensor, mask: Tensor, keep_fraction: float, scope: TokenScope = "batch"
) -> Tensor:
    """Tokens that enter the update.

    Args:
        advantages: (B,) or (B, T).
        entropies: (B, T) nats, of the training policy; values at masked positions do not matter.
        mask: (B, T) 1 where a token counts.
        keep_fraction: K in [0, 1]; 1 keeps every valid token: the baseline. Above 0, at least one token is kept
            where any is valid.
        scope: pool that the share is taken of: `batch`, or each `sample` (row) for itself.

    Returns:
        (B, T) bool, without gradient.

    Raises:
        ValueError: keep_fraction outside [0, 1], unknown scope, shapes that do not fit, NaN at a valid token.
    """
    if not 0.0 <= keep_fraction <= 1.0:
        raise ValueError(f"keep_fraction={keep_fraction} is not in [0, 1]")
    if scope not in TOKEN_SCOPES:
        raise ValueError(f"scope={scope!r} is unknown; allowed: {', '.join(TOKEN_SCOPES)}")
    if entropies.shape != mask.shape or advantages.shape not in (mask.shape, mask.shape[:1]):
        raise ValueError(
            f"advantages {tuple(advantages.shape)}, entropies {tuple(entropies.shape)} and mask {tuple(mask.shape)} "
            "do not fit: expected (B,) or (B, T), (B, T), (B, T)"
        )
    valid = mask.bool()
    size = advantages.detach().double().abs()
    score = (size if size.dim() > 1 else size[:, None]) * entropies.detach().double()
    if score[valid].isnan().any():
        raise ValueError("advantages or entropies are NaN at a token that counts")
    score = torch.where(valid, score, -torch.inf)  # a masked token never ranks above a valid one
    pool = score.reshape(1, -1) if scope == "batch" else score
    counts = valid.reshape(pool.shape).sum(1)
    numbers = torch.tensor([keep_count(n, keep_fraction) for n in counts.tolist()], device=pool.device)
    order = pool.argsort(dim=1, descending=True, stable=True)
    ranks = torch.arange(pool.size(1), device=pool.device).expand_as(order)
    kept = torch.zeros_like(pool, dtype=torch.bool).scatter(1, order, ranks < numbers[:, None])
    return kept.view_as(valid) & valid


def keep_count(valid: int, keep_fraction: float) -> int:
    """ceil(K n), guarded against rounding just above a whole number; at least 1 if both are positive."""
    if valid == 0 or keep_fraction == 0:
        return 0
    return min(valid, max(1, math.ceil(keep_fraction * valid - 1e-9)))
