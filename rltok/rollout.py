"""Settings of door 3: how completions are made, and how the learner makes up for a changed sampler."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from rltok.config import ConfigError, build, build_typed, join
from rltok.correction import CorrectionConfig
from rltok.fast import LoopSettings
from rltok.kv import KVConfig, build_kv
from rltok.quant.config import QuantConfig, build_quant
from rltok.sampling import DECODING, DecodingModule
from rltok.selection.prompts import PromptSkippingConfig
from rltok.steering import SteeringConfig


@dataclass(frozen=True)
class DynamicSamplingConfig:
    """Sample prompts again until no group of completions has a constant metric (DAPO)."""

    metric: str
    """Name of the reward function that must vary within a group; correctness, not the shaped sum."""
    max_rounds: int = 10
    """Generation rounds per batch, the first included; 0 or less for no limit."""
    on_limit: Literal["error", "keep"] = "error"
    """After the last round: stop the run, or train on the constant groups that are left."""

    def __post_init__(self) -> None:
        if not self.metric:
            raise ValueError("metric is empty: name the reward function that must vary within a group")
        if self.on_limit not in ("error", "keep"):
            raise ValueError(f"on_limit={self.on_limit!r} is unknown; allowed: 'error', 'keep'")


@dataclass(frozen=True)
class FastConfig:
    """Memory and work of the engine `fast`; no value changes a sample, up to floating-point ties."""

    max_rows: int | None = None
    """Completions computed at a time on each process, the others wait; null: a whole generation batch."""
    max_cache_tokens: int | None = None
    """Rows times columns of the key-value cache in use on each process, each row counted with its longest possible
    completion (under a cache policy, with what is held of it); the others wait, and a row that is longer runs alone;
    null: no limit."""
    prefill_chunk: int = LoopSettings.prefill_chunk
    """Prompt tokens of one forward pass; longer prompts take several."""
    compact_share: float = LoopSettings.compact_share
    """Ended rows leave when they are more than this share of the batch; 0: at once, 1: all together."""
    cache_block: int = LoopSettings.cache_block
    """Columns by which the cache grows."""

    def __post_init__(self) -> None:
        LoopSettings(max_new_tokens=1, **vars(self))  # says what is wrong


@dataclass(frozen=True)
class RolloutConfig:
    """How completions are made; the default is plain sampling by the engine `fast`, unrecorded and uncorrected."""

    engine: Literal["fast", "transformers"] = "fast"
    """Who samples where TRL would call transformers' generate: the loop of `rltok.fast`, or generate as TRL has it."""
    fast: FastConfig = FastConfig()
    """Limits of the engine `fast`."""
    decoding: tuple[DecodingModule, ...] = ()
    """Decoding methods, each `{type: NAME, option: value}`; they act together, temperatures last."""
    steering: SteeringConfig | None = None
    """Steering vectors added to hidden states while completions are made; null is the plain model."""
    kv: KVConfig | None = None
    """Cache policy of the sampler, `{policy: NAME, budget: N, option: value}`; null keeps every token."""
    quant: QuantConfig | None = None
    """Low-precision copy of the policy that samples, `{bits: 4, option: value}`; null samples from the policy."""
    correction: CorrectionConfig | None = None
    """Weights between the sampler and the learner; null takes what the parts above recommend."""
    dynamic_sampling: DynamicSamplingConfig | None = None
    """Refill groups whose metric is constant; null trains on them as they are."""
    prompt_skipping: PromptSkippingConfig | None = None
    """Skip prompts that were lately solved always or never, before they cost a rollout; null visits every prompt."""
    record_logps: Literal["auto", "always", "never"] = "auto"
    """Record the log-probability of every sampled token; `auto` exactly when something uses it."""
    strict: bool = True
    """Refuse top-p, top-k, min-p and penalties, whose ratio to the unrestricted policy is biased by construction."""

    def __post_init__(self) -> None:
        if self.engine not in ("fast", "transformers"):
            raise ValueError(f"engine={self.engine!r} is unknown; allowed: 'fast', 'transformers'")
        if self.engine != "fast" and self.fast != FastConfig():
            raise ValueError(f"fast={self.fast} is read by engine='fast' alone, but engine={self.engine!r}: remove it")
        object.__setattr__(self, "decoding", tuple(self.decoding))
        check_decoding(self.decoding)
        if self.correction is None:
            active = [part.recommended for part in self._parts if not part.is_neutral]
            object.__setattr__(self, "correction", strictest(active))
        if self.record_logps not in ("auto", "always", "never"):
            raise ValueError(f"record_logps={self.record_logps!r} is unknown; allowed: 'auto', 'always', 'never'")
        if self.record_logps == "never" and self.resolved_correction.mode != "off":
            raise ValueError(
                f"correction.mode={self.resolved_correction.mode!r} needs what record_logps='never' drops: "
                "set record_logps='auto' or correction.mode='off'"
            )

    @property
    def modifies_sampler(self) -> bool:
        """True if anything here can change a sample."""
        return any(not part.is_neutral for part in self._parts)

    @property
    def steers(self) -> bool:
        """True if hidden states are moved."""
        return self.steering is not None and not self.steering.is_neutral

    @property
    def _parts(self) -> tuple[DecodingModule | SteeringConfig | KVConfig | QuantConfig, ...]:
        return (*self.decoding, *(part for part in (self.steering, self.kv, self.quant) if part is not None))

    @property
    def decodes(self) -> bool:
        """True if any decoding method can change a sample."""
        return any(not module.is_neutral for module in self.decoding)

    @property
    def forces(self) -> bool:
        """True if a decoding method puts tokens in place of samples."""
        return any(module.forces and not module.is_neutral for module in self.decoding)

    @property
    def resolved_correction(self) -> CorrectionConfig:
        """`correction` with mode `auto` decided by `modifies_sampler`."""
        assert self.correction is not None  # __post_init__ fills it
        return self.correction.resolve(self.modifies_sampler)

    @property
    def records_logps(self) -> bool:
        """True if log-probabilities are recorded during rollouts."""
        wanted = self.resolved_correction.mode != "off" or self.forces
        return self.record_logps == "always" or (self.record_logps == "auto" and wanted)

    @property
    def needs(self) -> frozenset[str]:
        """Fields of `DecodingContext` that the active decoding methods need."""
        return frozenset(need for module in self.decoding if not module.is_neutral for need in module.needs)


def strictest(configs: Sequence[CorrectionConfig]) -> CorrectionConfig:
    """One correction that is at least as careful as each of several; the default for none.

    Raises:
        ValueError: they weight at different levels.
    """
    if not configs:
        return CorrectionConfig()
    levels = sorted({config.level for config in configs})
    if len(levels) > 1:
        raise ValueError(
            f"what changes the sampler recommends weights at levels {', '.join(levels)}: set correction.level"
        )
    most = [c.clip_max for c in configs if c.clip_max is not None]
    least = [c.bounds[0] for c in configs if c.bounds[0] > 0]
    vetoes = [c.veto for c in configs if c.veto is not None]
    return replace(
        configs[0],
        mode="mask" if any(c.mode == "mask" for c in configs) else configs[0].mode,
        clip_max=min(most, default=None),
        clip_min=max(least, default=None),
        symmetric=False,
        veto=max(vetoes, default=None),
        batch_normalize=any(c.batch_normalize for c in configs),
        min_ess=max(c.min_ess for c in configs),
    )


def build_rollout(section: Mapping[str, Any] | RolloutConfig | None, path: str = "rollout") -> RolloutConfig:
    """The rollout section of a recipe as typed settings; None is the plain sampler.

    Raises:
        ConfigError: unknown key or type, wrong value, or settings that do not go together.
    """
    if isinstance(section, RolloutConfig):
        return section
    if isinstance(section, Mapping):
        made: dict[str, Any] = {}
        if "decoding" in section:
            made["decoding"] = build_decoding(section["decoding"], join(path, "decoding"))
        if "kv" in section:
            made["kv"] = build_kv(section["kv"], join(path, "kv"))
        if "quant" in section:
            made["quant"] = build_quant(section["quant"], join(path, "quant"))
        section = {**section, **made}
    return build(RolloutConfig, section, path)


def check_decoding(modules: Sequence[DecodingModule]) -> None:
    """Raise unless these are decoding methods, each of them listed once.

    Raises:
        TypeError: an entry of another kind.
        ValueError: a method listed twice.
    """
    for module in modules:
        if not isinstance(module, DecodingModule):
            raise TypeError(f"decoding has {module!r}, which is no decoding method; known: {', '.join(DECODING)}")
    kinds = [type(module) for module in modules]
    for kind in kinds:
        if kinds.count(kind) > 1:
            raise ValueError(f"decoding lists {kind.__name__} {kinds.count(kind)} times: keep one")


def build_decoding(items: Any, path: str) -> tuple[DecodingModule, ...]:
    """Decoding methods from a list of `{type: NAME, option: value}`; None is the empty list.

    Raises:
        ConfigError: no list, unknown key or type, or a wrong value.
    """
    if items is None:
        return ()
    if not isinstance(items, list | tuple):
        raise ConfigError(f"{path}: {items!r} is not a list; write [{{type: NAME, option: value}}, ...]", path)
    return tuple(
        item if isinstance(item, DecodingModule) else build_typed(DECODING, item, f"{path}[{index}]")
        for index, item in enumerate(items)
    )


def refuse_restricted_sampling(
    rollout: RolloutConfig,
    *,
    top_p: float | None = None,
    top_k: int | None = None,
    min_p: float | None = None,
    repetition_penalty: float | None = None,
) -> None:
    """Raise where samples are drawn from a restricted set while ratios are taken to the unrestricted policy.

    With top-p the mean ratio is the kept mass (0.9, say), not 1, so no weight can repair it. `strict: false` allows it.

    Raises:
        ValueError: naming every setting in force and its neutral value.
    """
    seen = []
    if top_p is not None and top_p < 1:
        seen.append(f"top_p={top_p} (set 1.0)")
    if top_k is not None and top_k > 0:
        seen.append(f"top_k={top_k} (set 0)")
    if min_p is not None and min_p > 0:
        seen.append(f"min_p={min_p} (set null)")
    if repetition_penalty is not None and repetition_penalty != 1:
        seen.append(f"repetition_penalty={repetition_penalty} (set 1.0)")
    if rollout.strict and seen:
        raise ValueError(
            f"{', '.join(seen)}: the learner's ratio is to the unrestricted policy, so the gradient would be biased; "
            "or accept that with rollout.strict=false"
        )
