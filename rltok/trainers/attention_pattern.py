"""The learner's attention pattern in training: it acts in every pass that scores, never in one that samples.

New, old and reference log-probabilities and the layers that gradient checkpointing runs again are computed under
`model.attention_pattern`; completions, those of evaluation too, are made with full attention. So the sampler is another
policy than the learner wherever a row is longer than `above`, and `rollout.correction.mode: auto` decides as for a
decoding method: log-probabilities are recorded, and weights of learner over sampler enter the loss. Rows up to `above`
have weight 1 exactly, unless something else changes the sampler. `mode: off` leaves all weights at 1.
"""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from trl import GRPOConfig

from rltok.attention.pattern import AttachedPattern, attach_pattern, full_attention
from rltok.attention.sink_lora import PATTERNS, SinkLoRAConfig
from rltok.config import ConfigError, build_typed
from rltok.trainers.door_trainer import DoorTrainer
from rltok.trainers.doors import check_doors

SECTION = "model.attention_pattern"


class PatternedAttention(DoorTrainer):
    """A trainer whose learner may attend by a pattern; without one, or with a neutral one, nothing is changed.

    Args:
        attention_pattern: `SinkLoRAConfig`, a section such as `{"type": "sink_lora", "groups": 4}`, or None.

    Raises (when built):
        ConfigError: unknown names or values, a model whose attention cannot be replaced, or settings that need the
            attention of the full model.
    """

    _patterns: tuple[AttachedPattern, ...] = ()
    """at work in the policy, and in a reference of its own weights"""
    _only_pattern_differs: bool = False
    """no weight but the pattern's is asked for: rows that it leaves alone have weight 1"""

    def __init__(
        self,
        model: Any,
        reward_funcs: Any = None,
        args: GRPOConfig | None = None,
        *positional: Any,
        attention_pattern: SinkLoRAConfig | Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        pattern = build_pattern(attention_pattern)
        super().__init__(model, reward_funcs, args, *positional, **kwargs)
        if pattern is not None:
            self._attach_pattern(pattern)

    def remove_attention_pattern(self) -> None:
        """Policy and reference attend as they were loaded; also done when the trainer is gone."""
        for pattern in self._patterns:
            pattern.remove()
        self._patterns = ()

    def _attach_pattern(self, config: SinkLoRAConfig) -> None:
        _check_settings(self)
        rollout = self.doors.rollout
        assert rollout.correction is not None  # RolloutConfig fills it
        self._only_pattern_differs = (
            rollout.correction.mode == "auto" and not rollout.modifies_sampler and not self.use_vllm
        )
        try:
            decided = replace(rollout, correction=rollout.correction.resolve(True))
        except ValueError as error:
            raise ConfigError(f"{SECTION} makes the sampler another policy than the learner: {error}") from None
        self.doors = replace(self.doors, rollout=decided)
        with warnings.catch_warnings():  # said before, when the doors were checked without the pattern
            warnings.simplefilter("ignore")
            check_doors(self.doors, self.args, self.reward_func_names, self.rollout_func is not None)
        models = [self.model] if self.ref_model is None else [self.model, self.ref_model]
        self._patterns = tuple(_attached(model, config) for model in models)
        weakref.finalize(self, _remove, self._patterns)

    def _generate(self, *args: Any, **kwargs: Any) -> Any:
        if not self._patterns:
            return super()._generate(*args, **kwargs)
        with full_attention(self.model):  # calls with a cache are full anyway
            return super()._generate(*args, **kwargs)

    def _get_per_token_logps_and_entropies(self, model: Any, *args: Any, **kwargs: Any) -> Any:
        before = sum(pattern.calls for pattern in self._patterns)
        output = super()._get_per_token_logps_and_entropies(model, *args, **kwargs)
        if self._patterns and sum(pattern.calls for pattern in self._patterns) == before:
            mask = args[1] if len(args) > 1 else kwargs["attention_mask"]
            if bool(self._is_patterned(mask).any()):
                raise RuntimeError(
                    f"{SECTION} did not act on rows it is meant for: something replaced transformers' attention "
                    "function after this trainer was built; build the trainer outside of such contexts"
                )
        return output

    def _generate_and_score_completions(self, inputs: Any) -> dict[str, Any]:
        output = super()._generate_and_score_completions(inputs)
        if self._patterns:
            acted = self._is_patterned(torch.cat([output["prompt_mask"], output["completion_mask"]], 1))
            count, rows = self._reducer.sum(torch.stack([acted.sum(), acted.new_ones(acted.size(0)).sum()]).float())
            mode = "train" if self.model.training else "eval"
            self._metrics[mode]["attention_pattern/rows"].append((count / rows.clamp(min=1)).item())
        return output

    def _sampler_logps(self, output: Mapping[str, Any], logps: Tensor) -> Tensor:
        """(B, T) log-probabilities of the sampler to weigh with; the learner's own in rows that no pattern changes."""
        sampled: Tensor = output["sampling_per_token_logps"]
        if not self._patterns or not self._only_pattern_differs:
            return sampled
        acted = self._is_patterned(torch.cat([output["prompt_mask"], output["completion_mask"]], 1))
        return torch.where(acted[:, None], sampled, logps.to(sampled.dtype))

    def _is_patterned(self, mask: Tensor) -> Tensor:
        """(B,) whether the pattern acts on rows of a (B, T) mask."""
        config = self._patterns[0].config
        lengths = mask.sum(1)
        return (lengths > config.above) & (lengths >= config.groups)


def build_pattern(section: SinkLoRAConfig | Mapping[str, Any] | None) -> SinkLoRAConfig | None:
    """The pattern of a recipe's section, None for none or one that changes nothing.

    Raises:
        ConfigError: unknown type or key, or a wrong value.
    """
    pattern = build_typed(PATTERNS, section, SECTION) if isinstance(section, Mapping) else section
    return None if pattern is None or pattern.is_neutral else pattern


def _check_settings(trainer: DoorTrainer) -> None:
    """Refuse settings that the pattern would make wrong."""
    if trainer.doors.attention is not None:
        raise ConfigError(
            f"{SECTION} and credit.type={type(trainer.doors.credit).__name__}: that credit reads the attention of the "
            "full model, which the learner does not have. Remove one of the two."
        )
    if trainer.args.torch_compile:
        raise ConfigError(f"{SECTION} does not run in compiled code. Set training.torch_compile=false.")
    generation = trainer.args.generation_kwargs
    if isinstance(generation, Mapping) and generation.get("use_cache") is False:
        raise ConfigError(
            f"{SECTION} acts where no cache is given, and training.generation_kwargs.use_cache=false samples so. "
            "Remove use_cache."
        )


def _attached(model: nn.Module, config: SinkLoRAConfig) -> AttachedPattern:
    try:
        return attach_pattern(model, config)
    except ValueError as error:
        raise ConfigError(f"{SECTION}: {error}. Set model.attn_implementation=sdpa, or remove {SECTION}.") from None


def _remove(patterns: tuple[AttachedPattern, ...]) -> None:
    for pattern in patterns:
        pattern.remove()
