"""What the parts of `CreditTrainer` share: attributes, a few facts about the run, and the layout of TRL's inputs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from torch import Tensor
from transformers.utils import is_peft_available
from trl import GRPOTrainer

from rltok.entropy import EntropyStats
from rltok.kv import KVPolicy
from rltok.objective import LossSettings
from rltok.sampling import DecodingContext
from rltok.trainers.credit_table import CreditTable
from rltok.trainers.distributed import AccelerateReducer, RaggedGather
from rltok.trainers.doors import Doors
from rltok.trainers.prompt_skipping import SkippedPrompts
from rltok.trainers.prompts import RefillPrompts
from rltok.trainers.quantized_sampler import QuantizedSampler
from rltok.trainers.sampler_cache import SamplerCache
from rltok.trainers.selection import RolloutSelector, Selected

# Inputs of vision models that TRL hands from scoring to the loss.
MULTIMODAL = (
    "pixel_values",
    "image_grid_thw",
    "num_images",
    "pixel_attention_mask",
    "spatial_shapes",
    "num_tiles",
    "image_sizes",
    "token_type_ids",
    "mm_token_type_ids",
    "image_position_ids",
)
# What decoding methods recorded of every token, between sampling and the end of scoring.
TRACE = "trace/"
# Where the generation batch's entropy statistics travel beside its rows; 0-d tensors are neither shuffled nor split.
LOSS_STATS = tuple(f"entropy_stats/{field.name}" for field in fields(EntropyStats))


@dataclass
class RolloutState:
    """What selection remembers between the micro-batches of a rollout."""

    made_at: int = -1
    """micro-step at which the rollout was made"""
    metrics: dict[str, float] = field(default_factory=dict)
    seconds: float = 0.0
    """of forward and backward passes in the current window"""
    ran: bool = False
    """whether any micro-batch of the current window ran"""
    skipped_updates: int = 0
    """optimizer steps without a single row, since the start"""


class DoorTrainer(GRPOTrainer):
    """GRPOTrainer with the attributes that `CreditTrainer` sets and its parts read; does nothing by itself."""

    doors: Doors
    loss_settings: LossSettings
    _reducer: AccelerateReducer
    _gather: RaggedGather
    _sampler_stats: EntropyStats | None
    """statistics of the last rollout's entropies, for the next one's temperatures"""
    _fast: Any
    """our `FastEngine`, where it makes the completions, else None"""
    _sampler_cache: SamplerCache | None
    """the cache policy of the rollouts, None where every token is kept"""
    _quantized_sampler: QuantizedSampler | None
    """the quantised copy of the policy, None where the policy itself samples"""
    _refill: RefillPrompts | None
    _skipping: SkippedPrompts | None
    _table: CreditTable
    _recorder: Any
    """the `SampleRecorder`, None where nothing is recorded"""
    _generated_tokens: int
    """completion tokens sampled since the start, all ranks"""
    _trained_tokens: int
    """completion tokens that entered the loss since the start, all ranks"""
    _selector: RolloutSelector | None
    _selected: Selected | None
    """what was selected, between scoring and the first micro-batch"""
    _rollout: RolloutState
    # TRL's arguments of generate, those of the recipe included.
    generation_kwargs: dict[str, Any]
    # State of TRL's adaptive entropy coefficient, which its checkpoints carry.
    entropy_coef: float
    _last_world_entropy: float
    _entropy_window_stats: Tensor | None
    # TRL's micro-batches of the current rollout, and its clock of an optimizer step.
    _buffered_inputs: list[Any] | None
    _current_train_step_time: float

    def _decoding_context(self, stats: EntropyStats | None = None) -> DecodingContext:
        """What a rollout's decoding methods may use."""
        return DecodingContext(self.temperature, stats, self._tokenizer, tuple(self.eos_token_ids))

    @property
    def _reads_scores(self) -> bool:
        """True if something reads the old policy's scores of all rows."""
        corrects = self.doors.rollout.resolved_correction.mode != "off"
        return corrects or bool(self.doors.needs & {"entropy", "entropy_stats", "old_logps"})

    @property
    def _kv_policy(self) -> KVPolicy | None:
        """What the cache of the completions to come keeps; None, as always in evaluation: every token."""
        return self._sampler_cache.policy if self._sampler_cache is not None and self.model.training else None

    @property
    def _sampling_lm(self) -> Any:
        """The model that makes the completions to come, where that is done in this process."""
        copy = self._quantized_sampler
        return self._causal_lm if copy is None or not copy.samples(self.model.training) else copy.shadow.module

    @property
    def _ratio_needs_old(self) -> bool:
        """True if TRL scores the old policy: a rollout serves several updates, or vLLM sampled it."""
        rollout = self.args.steps_per_generation * self.num_iterations
        return self.args.gradient_accumulation_steps % rollout != 0 or self._corrects_vllm

    @property
    def _corrects_vllm(self) -> bool:
        return self.use_vllm and self.vllm_importance_sampling_correction

    @property
    def _causal_lm(self) -> Any:
        """The model TRL gave its fused head, inside all wrappers."""
        model = self.accelerator.unwrap_model(self.model)
        if is_peft_available():
            from peft import PeftModel

            if isinstance(model, PeftModel):
                return model.get_base_model()
        return model


def sequence(inputs: Mapping[str, Any]) -> tuple[Tensor, Tensor, int]:
    """Token ids, attention mask, and how many of the last positions are completion."""
    ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1)
    attention = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], dim=1)
    return ids, attention, inputs["completion_ids"].size(1)


def multimodal(inputs: Mapping[str, Any]) -> dict[str, Any]:
    return {name: inputs[name] for name in MULTIMODAL if inputs.get(name) is not None}


def loss_mask(inputs: Mapping[str, Any]) -> Tensor:
    mask = inputs["completion_mask"]
    return mask if "tool_mask" not in inputs else mask * inputs["tool_mask"]


def stats_from(inputs: Mapping[str, Any]) -> EntropyStats | None:
    return EntropyStats(*(inputs[key] for key in LOSS_STATS)) if LOSS_STATS[0] in inputs else None
