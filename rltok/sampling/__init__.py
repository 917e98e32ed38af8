"""Door 3, how tokens are made: logits processors, and the recorder of what was really sampled.

`DECODING` maps the `type` of a recipe's decoding section to its settings; an entry is a frozen dataclass that meets
`DecodingModule`. One method is one file and one line here.
"""

from rltok.sampling.control import (
    DecodingContext,
    DecodingModule,
    RolloutProcessor,
    generation_model,
    make_processors,
    sampling_control,
)
from rltok.sampling.recorder import SampledLogps
from rltok.sampling.temperature import (
    AdaptiveTemperature,
    AdaptiveTemperatureConfig,
    adaptive_temperature,
    row_entropy,
)

DECODING: dict[str, type] = {"adaptive_temperature": AdaptiveTemperatureConfig}

__all__ = [
    "DECODING",
    "AdaptiveTemperature",
    "AdaptiveTemperatureConfig",
    "DecodingContext",
    "DecodingModule",
    "RolloutProcessor",
    "SampledLogps",
    "adaptive_temperature",
    "generation_model",
    "make_processors",
    "row_entropy",
    "sampling_control",
]
