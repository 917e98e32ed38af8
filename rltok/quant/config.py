"""Quantised rollouts in a recipe: `rollout.quant: {bits: 4, scheme: symmetric, refresh: 1, ...}`.

`evaluation.quant` and `rltok generate` take the keys of `RolloutQuantSpec` alone: nothing is refreshed there.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from rltok.config import ConfigError, build, hints, join
from rltok.correction import CorrectionConfig
from rltok.quant.shadow import noise_sigma, noise_stage
from rltok.quant.spec import RolloutQuantSpec


@dataclass(frozen=True)
class NoiseConfig:
    """Adaptive noise of QeRL on the gains of RMSNorm layers, in the sampler alone: w + Z, Z ~ N(0, sigma^2).

    Training is cut into `stages` of equal length; the first has no noise, then sigma falls from `start` to `end`.
    """

    start: float = 1e-2
    """sigma of the first stage with noise, in units of the gains"""
    end: float = 1e-4
    """sigma of the last stage"""
    stages: int = 10
    """stages of training, the one without noise included"""
    form: Literal["code", "paper"] = "code"
    """how sigma falls: geometric, to `end` in the last stage as in the official code, or by eq. 8 of the paper"""

    def __post_init__(self) -> None:
        noise_sigma(1, self.stages, self.start, self.end, self.form)  # says what is wrong

    def sigma(self, step: int, total_steps: int) -> float:
        """Standard deviation at an optimizer step of so many.

        Example: the defaults over 100 steps: 0 up to step 9, 1e-2 at step 10, 1e-3 at step 50, 1e-4 at step 90.
        """
        return noise_sigma(noise_stage(step, total_steps, self.stages), self.stages, self.start, self.end, self.form)


@dataclass(frozen=True)
class QuantConfig:
    """A quantised copy of the policy that samples in its place, and what makes up for it."""

    spec: RolloutQuantSpec = RolloutQuantSpec()
    """How its weights are quantised."""
    refresh: int = 1
    """The copy takes the policy's weights before every so many generation batches; 1: before each."""
    learner: Literal["full", "same"] = "full"
    """`full`: the learner computes with its own weights, and correction weights make up for the difference; `same`: it
    computes with quantised weights as the sampler does, and gradients pass straight through the rounding."""
    noise: NoiseConfig | None = None
    """QeRL's noise in the sampler; null adds none."""

    recommended: ClassVar[CorrectionConfig] = CorrectionConfig(mode="truncate", clip_max=2.0)
    """correction where a recipe has none: token weights up to 2"""
    engines: ClassVar[tuple[str, ...]] = ("fast",)
    """engines that sample from a copy of the policy in this process"""

    def __post_init__(self) -> None:
        if isinstance(self.refresh, bool) or self.refresh < 1:
            raise ValueError(f"refresh={self.refresh} must be a whole number >= 1; 1 refreshes before every rollout")
        if self.learner not in ("full", "same"):
            raise ValueError(f"learner={self.learner!r} is unknown; allowed: 'full', 'same'")
        if self.spec.bits == 16 and self.refresh != 1:
            raise ValueError(
                f"refresh={self.refresh} with bits=16: nothing is copied that could grow old; set refresh=1"
            )
        if self.learner == "same" and self.refresh != 1:
            raise ValueError(
                f"refresh={self.refresh} with learner='same': the sampler would be older than the learner that is to "
                "compute like it; set refresh=1 or learner='full'"
            )

    @property
    def is_neutral(self) -> bool:
        """True if no sample is changed."""
        return self.spec.bits == 16 and self.noise is None

    @property
    def quantizes_learner(self) -> bool:
        """True if the learner's own weights are fake-quantised."""
        return self.learner == "same" and self.spec.bits != 16


SPEC = tuple(field.name for field in dataclasses.fields(RolloutQuantSpec))
"""keys of the section that say how weights are quantised"""
KEYS = (*SPEC, "refresh", "learner", "noise")
"""keys of the section `rollout.quant`"""


def build_quant(
    section: Mapping[str, Any] | QuantConfig | RolloutQuantSpec | None, path: str = "rollout.quant"
) -> QuantConfig | None:
    """A recipe section `{bits: N, scheme: NAME, refresh: N, ...}` as typed settings; None: the policy itself samples.

    Raises:
        ConfigError: unknown key or a wrong value.
    """
    if section is None or isinstance(section, QuantConfig):
        return section
    if isinstance(section, RolloutQuantSpec):
        return QuantConfig(section)
    own = {key: value for key, value in _checked(section, path, KEYS).items() if key not in SPEC}
    spec = build_spec({key: section[key] for key in SPEC if key in section}, path)
    return build(QuantConfig, own | {"spec": spec}, path)


def build_spec(section: Mapping[str, Any] | RolloutQuantSpec | None, path: str = "quant") -> RolloutQuantSpec | None:
    """A section `{bits: N, scheme: NAME, ...}` without what moves in training; None: weights as they are.

    Raises:
        ConfigError: unknown key or a wrong value.
    """
    if section is None or isinstance(section, RolloutQuantSpec):
        return section
    section = _checked(section, path, SPEC)
    if section.get("bits") is None:
        where = join(path, "bits")
        raise ConfigError(f"{where}: missing; allowed: 4, 8, 16", where)
    return build(RolloutQuantSpec, section, path)


def quant_settings(section: Mapping[str, Any], path: str) -> dict[str, Any]:
    """The section `rollout.quant` with every default filled in, as values that read back as the same settings."""
    config = build_quant(section, path)
    assert config is not None
    return spec_settings(config.spec) | {"refresh": config.refresh, "learner": config.learner, "noise": config.noise}


def spec_settings(spec: RolloutQuantSpec) -> dict[str, Any]:
    """The keys of `RolloutQuantSpec` with their values."""
    return {name: getattr(spec, name) for name in SPEC}


def spec_of(section: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """What of a section `rollout.quant` also belongs to `evaluation.quant`."""
    return None if section is None else {key: section[key] for key in SPEC if key in section}


def section_hints(keys: tuple[str, ...]) -> dict[str, Any]:
    """Types of a section's keys."""
    known = {**hints(RolloutQuantSpec), **hints(QuantConfig)}
    return {key: known[key] for key in keys}


def _checked(section: Any, path: str, keys: tuple[str, ...]) -> dict[str, Any]:
    from rltok.config import check_keys

    if not isinstance(section, Mapping):
        raise ConfigError(f"{path}: {section!r} is not a mapping; write {{bits: 8}}", path)
    check_keys(section, keys, path)
    return dict(section)
