"""The recipe section `quantization_aware`: which fake quantisers a model is trained with, and EdgeQAT's losses.

    quantization_aware:
      weight_bits: 4
      activation_bits: 8
      entropy: 0.5                                    # r_E
      distribution: 1.0                               # r_D
      distillation: {gamma: 0.5, temperature: 2.0}    # null: none

The same section stands in a recipe of `rltok train` and in one of `rltok sft`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from rltok.config import build, hints
from rltok.quant.fake import OFF, Method
from rltok.quant.qat import QATSpec
from rltok.quant.qat_losses import DISTRIBUTION_FORMS, ENTROPY_FORMS, DistributionForm, EntropyForm

SECTION = "quantization_aware"


@dataclass(frozen=True)
class DistillationConfig:
    """(1 - gamma) task loss + gamma tau^2 KL(teacher || student), a mean over the tokens that the task is trained on.

    Raises:
        ValueError: gamma outside of 0..1, or a temperature that is not above 0.
    """

    gamma: float = 0.5
    """weight of the divergence; 0 is the task alone, 1 the teacher alone"""
    temperature: float = 2.0
    """tau; divides the logits of both"""

    def __post_init__(self) -> None:
        if not 0 <= self.gamma <= 1:
            raise ValueError(f"gamma={self.gamma}; allowed: 0..1")
        if not (self.temperature > 0 and math.isfinite(self.temperature)):
            raise ValueError(f"temperature={self.temperature}; allowed: above 0")


@dataclass(frozen=True)
class QuantizationAwareConfig:
    """Fake quantisers in the trained model, and what is added to its loss.

    All bits 32 and no loss is the plain trainer, bit for bit.

    Raises:
        ValueError: a value out of range, or quantisers that do not fit together (`QATSpec`).

    Source: arXiv 2402.10787 (EdgeQAT).
    """

    weight_bits: int = 4
    """2 to 8; 32: weights stay as they are"""
    activation_bits: int = 8
    """2 to 8; 32: activations stay as they are"""
    low_bits: int = 4
    """activation bits of the tokens that matter least"""
    low_share: float = 0.0
    """share of those tokens, 0 to 1; 0: all tokens have `activation_bits`"""
    weight: Method = "lsq"
    """one learned step per matrix, or dynamic ones per row or group"""
    activation: Method = "lsq"
    """one learned step per activation, or dynamic ones per token (better above 1B parameters)"""
    group_size: int | None = None
    """columns per step of dynamic weights; None: one step per row"""
    probabilities: bool = True
    """softmax probabilities too, for which whole (T, T) maps are formed; False keeps the kernel"""
    skip: tuple[str, ...] = ("lm_head", "embed_tokens")
    """linears with one of these as a part of their name stay as they are"""
    entropy: float = 0.0
    """r_E, weight of the loss that spreads queries and keys; 0: none. The source uses 0.5"""
    entropy_form: EntropyForm = "mean"
    """code, mean or paper, as in `rltok.quant.qat_losses.entropy_loss`; code and mean have the same gradient"""
    distribution: float = 0.0
    """r_D, weight of the loss that keeps the teacher's score maps; 0: none. The source uses 1"""
    distribution_form: DistributionForm = "recommended"
    """recommended, log or printed, as in `rltok.quant.qat_losses.distribution_loss`; printed has the wrong sign"""
    distillation: DistillationConfig | None = None
    """divergence from the teacher's predictions; None: none"""
    teacher: Literal["start"] = "start"
    """what the last two losses compare with: the model before training, in full precision"""
    convert: bool = True
    """the final model has its weights on their low-bit grid; False: full-precision weights beside their steps"""

    def __post_init__(self) -> None:
        self.spec  # noqa: B018 - checks the quantisers
        for name in ("entropy", "distribution"):
            value = getattr(self, name)
            if not (value >= 0 and math.isfinite(value)):
                raise ValueError(f"{name}={value}; allowed: >= 0, where 0 is no loss")
        for name, allowed in (("entropy_form", ENTROPY_FORMS), ("distribution_form", DISTRIBUTION_FORMS)):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name}={getattr(self, name)!r}; allowed: {', '.join(allowed)}")

    @property
    def spec(self) -> QATSpec:
        """What `prepare_qat` places."""
        names = [field.name for field in dataclasses.fields(QATSpec)]
        return QATSpec(**{name: getattr(self, name) for name in names})

    @property
    def quantizes(self) -> bool:
        """Whether any weight or activation is quantised."""
        return min(self.weight_bits, self.activation_bits) < OFF

    @property
    def distills(self) -> bool:
        """Whether the teacher's predictions enter the loss."""
        return self.distillation is not None and self.distillation.gamma > 0

    @property
    def has_teacher(self) -> bool:
        """Whether a copy of the model before training is needed."""
        return self.distribution > 0 or self.distills

    @property
    def has_loss(self) -> bool:
        """Whether anything is added to the loss."""
        return self.entropy > 0 or self.has_teacher

    @property
    def is_neutral(self) -> bool:
        """Whether it changes nothing."""
        return not (self.quantizes or self.has_loss)


def build_quantization_aware(
    section: Mapping[str, Any] | QuantizationAwareConfig | None, path: str = SECTION
) -> QuantizationAwareConfig | None:
    """The typed settings of a recipe section; None for none, or for one that changes nothing.

    Raises:
        ConfigError: unknown key or wrong value.
    """
    if section is None:
        return None
    if not isinstance(section, QuantizationAwareConfig):
        section = build(QuantizationAwareConfig, section, path)
    return None if section.is_neutral else section


def filled_quantization_aware(section: Any, path: str = SECTION) -> dict[str, Any]:
    """The section with its defaults filled in, as plain values; a null where None is no value means the default.

    Raises:
        ConfigError: unknown key or wrong value.
    """
    if isinstance(section, Mapping):
        section = {name: value for name, value in section.items() if value is not None or _takes_none(name)}
    config = build(QuantizationAwareConfig, section, path)
    return dataclasses.asdict(config) | {"skip": list(config.skip)}


def _takes_none(name: str) -> bool:
    return type(None) in getattr(hints(QuantizationAwareConfig).get(name, Any), "__args__", ())
