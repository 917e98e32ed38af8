"""Weights and masks between the policy that sampled and the policy that learns."""

from rltok.correction.quantiles import mismatch_quantiles
from rltok.correction.weights import CorrectionConfig, RolloutWeights, rollout_weights

__all__ = ["CorrectionConfig", "RolloutWeights", "mismatch_quantiles", "rollout_weights"]
