"""Door 2: objectives. A term changes ratio, advantage, clip width or loss of a token; see `rltok.objective.batch`."""

from rltok.objective.aggregate import LOSS_TYPES, Divisors, aggregate
from rltok.objective.batch import LossBatch, LossPlan, ObjectiveTerm
from rltok.objective.covariance import ClipCov, KLCov
from rltok.objective.hapo import HAPO, redistribute, token_clip_widths
from rltok.objective.loss import LossSettings, plan_loss, reference_kl, token_loss
from rltok.objective.ratio import GSPOToken, log_importance_ratio
from rltok.objective.surrogate import clipped_surrogate

OBJECTIVE: dict[str, type] = {
    "hapo": HAPO,
    "gspo_token": GSPOToken,
    "clip_cov": ClipCov,
    "kl_cov": KLCov,
}

__all__ = [
    "HAPO",
    "LOSS_TYPES",
    "OBJECTIVE",
    "ClipCov",
    "Divisors",
    "GSPOToken",
    "KLCov",
    "LossBatch",
    "LossPlan",
    "LossSettings",
    "ObjectiveTerm",
    "aggregate",
    "clipped_surrogate",
    "log_importance_ratio",
    "plan_loss",
    "redistribute",
    "reference_kl",
    "token_clip_widths",
    "token_loss",
]
