"""Importance ratio between current and old policy, per token or per completion.

token       log r_t   = logp_t - logp_old_t                      (GRPO, DAPO)
sequence    log s     = mean_t log r_t, one per completion       (GSPO, arXiv 2507.18071)
gspo_token  log s_t   = sg[log s] + logp_t - sg[logp_t]          (same value as sequence, gradient per token)
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from torch import Tensor

from rltok.objective.batch import LossBatch, LossPlan

LEVELS = ("token", "sequence")


def log_importance_ratio(logps: Tensor, old_logps: Tensor, mask: Tensor, level: str = "token") -> Tensor:
    """Log ratio of current to old policy: (B, T) for `token`, (B, 1) for `sequence`; a row without tokens gives 0.

    Raises:
        ValueError: unknown level.
    """
    log_ratio = logps - old_logps
    if level == "token":
        return log_ratio
    if level == "sequence":
        return ((log_ratio * mask).sum(-1) / mask.sum(-1).clamp(min=1.0)).unsqueeze(-1)
    raise ValueError(f"importance_sampling_level={level!r} is unknown; allowed: {', '.join(LEVELS)}")


@dataclass(frozen=True)
class GSPOToken:
    """GSPO-token: the completion's ratio as value, each token's own gradient, so credit per token is meaningful.

    s_t = sg[s] * pi_t / sg[pi_t] with s = exp(mean_t log r_t). With advantages equal within a completion, value and
    gradient are those of GSPO. Use small widths (3e-4 / 4e-4 in the paper) and `loss_type: grpo`.

    Source: arXiv 2507.18071, Eq. 13-14.
    """

    needs: ClassVar[tuple[str, ...]] = ()

    def __call__(self, batch: LossBatch, plan: LossPlan) -> LossPlan:
        sequence = log_importance_ratio(batch.logps.detach(), batch.old_logps, batch.mask, "sequence")
        return replace(plan, log_weight=sequence + batch.logps - batch.logps.detach())
