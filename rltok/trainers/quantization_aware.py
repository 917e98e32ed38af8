"""Quantization-aware reinforcement learning (EdgeQAT): the policy is trained behind its fake quantisers.

    L = (1 - gamma) L_RL + L_E + L_D + gamma tau^2 KL(teacher || student)

The policy *is* the quantised model: rollouts, old and new log-probabilities and the final model all pass the same
quantisers. So nothing has to be corrected, but for `low_share > 0`: which tokens of a row are low depends on its end,
which a sampler does not know. Completions are then made with every token at the high width, and `rollout.correction`
(mode `auto`) weighs learner over sampler, as for an attention pattern.

Two models stay plain, in full precision: the reference of the KL term and the teacher, both the model before training.
They are one where both are there. The reference says where the policy came from, which quantisers did not take part in.

Steps of weights are set from the weights, steps of activations from the prompts of the first generation batch of all
ranks, before anything is sampled. All bits 32 and no loss changes nothing, bit for bit.

Kept out, each by name: adapters (their base is frozen; `rollout.quant.learner: same` quantises merged weights), weights
that are quantised or shared out already (bitsandbytes, DeepSpeed, FSDP), samplers that would not pass the quantisers
(vLLM, continuous batching), compiled code, a reference that follows the policy, and what replaces the cache, the
weights or the attention of the policy (`rollout.kv`, `rollout.quant`, `model.attention_pattern`).
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers.utils import is_peft_available
from trl import GRPOConfig

from rltok.config import ConfigError
from rltok.quant.fake import OFF
from rltok.quant.qat import is_converted, is_prepared
from rltok.quant.qat_config import SECTION, QuantizationAwareConfig, build_quantization_aware
from rltok.quant.qat_files import write_quantizers
from rltok.quant.qat_training import QATObjective
from rltok.trainers.attention_pattern import build_pattern
from rltok.trainers.distributed import AccelerateReducer
from rltok.trainers.door_trainer import DoorTrainer, loss_mask
from rltok.trainers.doors import Doors, check_doors
from rltok.trainers.engine_support import training_engine
from rltok.trainers.loss import PASS_ROWS

SERVED_ENGINES = ("single", "ddp")
"""training engines on which whole weights, and steps in full precision, lie on every process"""


class QuantizationAware(DoorTrainer):
    """A trainer whose policy may be trained behind fake quantisers; without them nothing is changed.

    Args:
        quantization_aware: `QuantizationAwareConfig`, a section such as `{"weight_bits": 4, "entropy": 0.5}`, or None.

    Raises (when built):
        ConfigError: unknown keys or wrong values, a model that cannot take quantisers, or settings that would leave
            some part of the run outside of them.
    """

    _qat: QATObjective | None = None

    def __init__(
        self,
        model: Any,
        reward_funcs: Any = None,
        args: GRPOConfig | None = None,
        *positional: Any,
        quantization_aware: QuantizationAwareConfig | Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        config = build_quantization_aware(quantization_aware)
        if config is not None:
            _check_arguments(model, kwargs)
            check_quantization_aware(
                config,
                self.doors,
                args,
                patterned=build_pattern(kwargs.get("attention_pattern")) is not None,
                has_rollout_func=kwargs.get("rollout_func") is not None,
            )
        elif isinstance(model, nn.Module) and is_prepared(model):
            raise ConfigError(
                f"{SECTION}: the model comes with fake quantisers of another run, which this one would train by "
                f"accident; set {SECTION} as it was there, or start from a plain model",
                SECTION,
            )
        super().__init__(model, reward_funcs, args, *positional, **kwargs)
        if config is not None:
            self._prepare_quantizers(config)

    def _prepare_quantizers(self, config: QuantizationAwareConfig) -> None:
        """After TRL has built model and reference, before optimizer and wrappers."""
        engine = training_engine(self)
        if engine not in SERVED_ENGINES:
            raise ConfigError(
                f"{SECTION} does not run on {engine}: weights and steps must lie whole, and in their own precision, on "
                f"every process. Set launch.strategy to auto or ddp, or remove {SECTION}.",
                SECTION,
            )
        if config.low_share > 0:
            self._correct_widths()
        reference = None if self.ref_model is None else self.accelerator.unwrap_model(self.ref_model)
        try:
            self._qat = QATObjective.prepare(
                self.model,
                config,
                teacher=reference if config.has_teacher else None,
                reducer=AccelerateReducer(self.accelerator),
                autocast=self.accelerator.autocast,
            )
        except ValueError as error:
            raise ConfigError(f"{SECTION}: {error}", SECTION) from error

    def _correct_widths(self) -> None:
        """Sampler and learner differ in the widths of tokens, so that weights of one over the other are due."""
        rollout = self.doors.rollout
        assert rollout.correction is not None  # RolloutConfig fills it
        try:
            decided = replace(rollout, correction=rollout.correction.resolve(True))
        except ValueError as error:
            raise ConfigError(
                f"{SECTION}.low_share makes the sampler another policy than the learner: {error}"
            ) from None
        self.doors = replace(self.doors, rollout=decided)
        with warnings.catch_warnings():  # said before, when the doors were checked without it
            warnings.simplefilter("ignore")
            check_doors(self.doors, self.args, self.reward_func_names, self.rollout_func is not None)

    # Before, during and after training

    @contextmanager
    def as_loaded(self) -> Iterator[None]:
        """The policy before training, in full precision unless it came with trained quantisers."""
        with nullcontext() if self._qat is None else self._qat.as_loaded():
            yield

    @contextmanager
    def sampling(self) -> Iterator[None]:
        """The policy as it makes completions: quantised weights formed once, every token at the high width."""
        with nullcontext() if self._qat is None or not is_prepared(self.model) else self._qat.sampling():
            yield

    def finish_quantization(self) -> bool:
        """Turn the trained policy into the final model, in place; whether it was (`quantization_aware.convert`)."""
        if self._qat is None or not self._qat.config.convert:
            return False
        self._qat.convert()
        return True

    def _generate(self, prompts: Any, *args: Any, **kwargs: Any) -> Any:
        if self._qat is None:
            return super()._generate(prompts, *args, **kwargs)
        if self._qat.needs_calibration:
            self._calibrate(prompts)
        with self.sampling():
            return super()._generate(prompts, *args, **kwargs)

    def _calibrate(self, prompts: Any) -> None:
        """Steps of activations from the prompts at hand; every rank has some, and all get the same steps."""
        assert self._qat is not None
        ids = self._tokenize_prompts(copy.deepcopy(prompts))[0]
        width, device = max(map(len, ids)), self.accelerator.device
        tokens = torch.full((len(ids), width), self._tokenizer.pad_token_id, device=device)
        mask = torch.zeros_like(tokens)
        for row, prompt in enumerate(ids):
            tokens[row, width - len(prompt) :] = torch.tensor(prompt, device=device)
            mask[row, width - len(prompt) :] = 1
        self._qat.calibrate(tokens, mask)

    def _compute_loss(self, model: Any, inputs: dict[str, Any]) -> Tensor:
        if self._qat is None or not self.model.training:
            return super()._compute_loss(model, inputs)
        with self._qat.around():
            loss = super()._compute_loss(model, inputs)
        found = self._qat.metrics()
        if self._qat.config.has_loss:
            predicted = torch.cat([torch.zeros_like(inputs["prompt_mask"]), loss_mask(inputs)], 1)
            extra, values = self._qat.loss(
                predicted,
                tokens=self._divisors(inputs, "train").tokens,
                rows=inputs.get(PASS_ROWS),
                slices=self._accumulation("train"),
            )
            loss = self._qat.task_weight * loss + extra.to(loss.dtype)
            found |= values
        for name, value in found.items():
            self._metrics["train"][f"qat/{name}"].append(value)
        return loss

    def get_decay_parameter_names(self, model: Any) -> list[str]:
        """Steps and zero points of quantisers do not decay: that would shrink their grids."""
        names: list[str] = super().get_decay_parameter_names(model)
        return names if self._qat is None else [name for name in names if "fake_quant" not in name]

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        super()._save(output_dir, state_dict)
        if self._qat is not None:
            write_quantizers(output_dir or self.args.output_dir, self.accelerator.unwrap_model(self.model))


def check_quantization_aware(
    config: QuantizationAwareConfig,
    doors: Doors,
    args: GRPOConfig | None,
    *,
    patterned: bool = False,
    has_rollout_func: bool = False,
) -> None:
    """Refuse settings that quantization-aware training would make wrong; needs no model.

    Args:
        patterned: the learner attends by `model.attention_pattern`.
        has_rollout_func: a function of the caller's own makes the rollouts.

    Raises:
        ConfigError: names both settings and what to change.
    """
    settings = args if args is not None else GRPOConfig(output_dir="unused", use_cpu=True)
    rollout, credit = doors.rollout, f"credit.type={type(doors.credit).__name__}"
    batching: Mapping[str, Any] = getattr(settings, "batching", None) or {}
    saving = settings.gradient_checkpointing and bool(
        (settings.gradient_checkpointing_kwargs or {}).get("use_reentrant", False)
    )
    unquantised = "its copy of the policy would sample without the quantisers"
    refused = {
        "training.use_vllm=true": (settings.use_vllm, f"{unquantised}; set it to false"),
        "training.use_transformers_continuous_batching=true": (
            settings.use_transformers_continuous_batching,
            "its attention would pass the quantisers by; set it to false",
        ),
        "rollout_func": (has_rollout_func, f"{unquantised}; leave it out"),
        "training.torch_compile=true": (
            settings.torch_compile,
            "quantisers do not run in compiled code; set it to false",
        ),
        "training.sync_ref_model=true": (
            settings.sync_ref_model,
            "the reference has no steps that could follow the policy's; set it to false",
        ),
        "rollout.quant": (
            rollout.quant is not None and not rollout.quant.is_neutral,
            "weights would be quantised twice, on two grids; remove rollout.quant",
        ),
        "rollout.kv": (rollout.kv is not None, "its attention would pass the quantisers by; remove rollout.kv"),
        "model.attention_pattern": (patterned, "it replaces the attention that is quantised; remove one of the two"),
        credit: (
            doors.attention is not None and config.activation_bits != OFF,
            f"that credit reads queries and keys before they are quantised; set {SECTION}.activation_bits={OFF}, or "
            "another credit.type",
        ),
        f"selection.type={type(doors.selection).__name__}": (
            doors.selection is not None and config.has_loss,
            f"{SECTION}'s losses are means over all rows, of which selection leaves some; set {SECTION}.entropy=0, "
            "distribution=0 and distillation=null, or remove selection",
        ),
        "batching.pack=true": (
            bool(batching.get("pack")) and (config.has_loss or config.low_share > 0),
            f"the losses and {SECTION}.low_share look at one sequence per row; set batching.pack=false",
        ),
        "training.gradient_checkpointing_kwargs.use_reentrant=true": (
            saving and config.has_loss,
            "queries and keys have no gradient then; set it to false",
        ),
    }
    for setting, (present, instead) in refused.items():
        if present:
            raise ConfigError(f"{SECTION} and {setting}: {instead}.", SECTION)


def refuse_adapters(lora: bool, quantised: bool) -> None:
    """Refuse policies whose linear weights are not trained.

    Raises:
        ConfigError: an adapter, or weights in few bits below one.
    """
    if quantised:
        raise ConfigError(
            f"{SECTION}: weights that bitsandbytes has quantised are frozen and have no steps to learn; remove "
            f"model.quantization, or {SECTION}",
            SECTION,
        )
    if lora:
        raise ConfigError(
            f"{SECTION}: the weights below an adapter are frozen, and would be quantised without it; to train all "
            "weights set model.lora=null model.adapter=merge, or, to quantise the merged weights, use rollout.quant "
            f"with learner=same in place of {SECTION}",
            SECTION,
        )


def _check_arguments(model: Any, kwargs: Mapping[str, Any]) -> None:
    """Refuse what only the trainer's arguments reveal."""
    adapter = kwargs.get("peft_config") is not None
    if is_peft_available() and not adapter:
        from peft import PeftModel

        adapter = isinstance(model, PeftModel)
    refuse_adapters(
        adapter, kwargs.get("quantization_config") is not None or bool(getattr(model, "is_quantized", False))
    )
    if (kwargs.get("optimizers") or (None,))[0] is not None:
        raise ConfigError(
            f"{SECTION}: an optimizer that was built before does not know the steps of the quantisers; leave out "
            "`optimizers`",
            SECTION,
        )
    if isinstance(model, nn.Module) and is_converted(model):
        raise ConfigError(
            f"{SECTION}: the model is converted: its weights lie on a low-bit grid whose steps are gone. Start from a "
            "checkpoint-N of that run, which has both, or from the model before it",
            SECTION,
        )
