"""Head groups: the heads that look close by and the heads that look far back.

Heads are ranked by their average span d (tokens); the lowest share is the local group, the highest the global group.

Source: arXiv 2510.13554 v2, Sec. 4.1 (30 % on either side). Whether heads are ranked per response, per batch or once
is not said there; `rltok.attention.signals` offers the three.
"""

from __future__ import annotations

import math

from torch import Tensor


def select_heads(span: Tensor, quantile: float) -> tuple[Tensor, Tensor]:
    """Heads of the smallest and of the largest average span.

        n_sel = max(1, floor(quantile M + 1e-9))

    Heads are sorted by ascending span; of equal spans the lower index comes first, so it goes to the local side. With
    M = 1 the head is in both groups.

    Args:
        span: (M,) or (B, M) average span in tokens, heads flat and layer-major.
        quantile: share of the heads on either side, in (0, 0.5].

    Returns:
        (n_sel,) or (B, n_sel) indices of the local heads (nearest first), and of the global heads (farthest last).

    Raises:
        ValueError: quantile outside (0, 0.5], or a span of another shape or without heads.

    Example: spans (3, 1, 2, 9) with quantile 0.5 give local (1, 2) and global (0, 3).
    """
    check_quantile(quantile)
    if span.dim() not in (1, 2) or span.size(-1) == 0:
        raise ValueError(f"span has shape {tuple(span.shape)}; allowed: (M,) or (B, M) with M >= 1 heads")
    order = span.argsort(dim=-1, stable=True)
    n_sel = heads_per_group(span.size(-1), quantile)
    return order[..., :n_sel], order[..., -n_sel:]


def heads_per_group(n_heads: int, quantile: float) -> int:
    """max(1, floor(quantile M + 1e-9)); the small number keeps 0.3 * 10 at 3."""
    return max(1, math.floor(quantile * n_heads + 1e-9))


def check_quantile(quantile: float) -> None:
    """Raise ValueError unless `quantile` is in (0, 0.5]."""
    if not 0.0 < quantile <= 0.5:
        raise ValueError(f"head_quantile={quantile} is not in (0, 0.5]; above 0.5 the two groups would overlap")
