"""Low precision: weight quantisers and the quantised copy of a policy that samples in its place.

`spec.py` says how weights are quantised, `codes.py` quantises one weight, `shadow.py` keeps the copy of a policy,
`same_precision.py` lets the learner compute with the copy's weights.
"""

from rltok.quant.codes import QuantState, dequantize, linear, quantize_weight, refresh, state_bytes
from rltok.quant.same_precision import AttachedPrecision, attach_same_precision, attached_precision
from rltok.quant.shadow import QuantizedShadow, SyncFacts, noise_sigma, noise_stage
from rltok.quant.spec import RolloutQuantSpec

__all__ = [
    "AttachedPrecision",
    "RolloutQuantSpec",
    "QuantState",
    "QuantizedShadow",
    "SyncFacts",
    "attach_same_precision",
    "attached_precision",
    "dequantize",
    "linear",
    "noise_sigma",
    "noise_stage",
    "quantize_weight",
    "refresh",
    "state_bytes",
]
