"""Door 3, how tokens are made: logits processors, and the recorder of what was really sampled.

`DECODING` maps the `type` of a recipe's decoding section to its settings; an entry is a frozen dataclass derived from
`DecodingModule`. One method is one file and one line here.
"""

from rltok.sampling.budget_forcing import BudgetForcingConfig, BudgetForcingLogitsProcessor
from rltok.sampling.control import generation_model, sampling_control
from rltok.sampling.cyclic_reflex import (
    CyclicReflexConfig,
    CyclicReflexLogitsProcessor,
    ReflectionSchedule,
    triangular_bias,
    triangular_wave,
)
from rltok.sampling.processor import (
    DecodingContext,
    DecodingModule,
    RolloutProcessor,
    Rows,
    make_processors,
)
from rltok.sampling.recorder import SampledLogps
from rltok.sampling.suppression import ReflectionSuppressionConfig, ReflectionSuppressionLogitsProcessor
from rltok.sampling.temperature import (
    AdaptiveTemperature,
    AdaptiveTemperatureConfig,
    adaptive_temperature,
    row_entropy,
    stats_from_entropy,
    temperature_factor,
)
from rltok.sampling.thought_switching import ThoughtSwitchingConfig, ThoughtSwitchingLogitsProcessor
from rltok.sampling.words import resolve_word_ids

DECODING: dict[str, type[DecodingModule]] = {
    "adaptive_temperature": AdaptiveTemperatureConfig,
    "budget_forcing": BudgetForcingConfig,
    "cyclic_reflex": CyclicReflexConfig,
    "reflection_suppression": ReflectionSuppressionConfig,
    "thought_switching": ThoughtSwitchingConfig,
}

__all__ = [
    "DECODING",
    "AdaptiveTemperature",
    "AdaptiveTemperatureConfig",
    "BudgetForcingConfig",
    "BudgetForcingLogitsProcessor",
    "CyclicReflexConfig",
    "CyclicReflexLogitsProcessor",
    "DecodingContext",
    "DecodingModule",
    "ReflectionSchedule",
    "ReflectionSuppressionConfig",
    "ReflectionSuppressionLogitsProcessor",
    "RolloutProcessor",
    "Rows",
    "SampledLogps",
    "ThoughtSwitchingConfig",
    "ThoughtSwitchingLogitsProcessor",
    "adaptive_temperature",
    "generation_model",
    "make_processors",
    "resolve_word_ids",
    "row_entropy",
    "sampling_control",
    "stats_from_entropy",
    "temperature_factor",
    "triangular_bias",
    "triangular_wave",
]
