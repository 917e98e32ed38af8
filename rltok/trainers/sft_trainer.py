"""TRL's SFTTrainer with fake quantisers in the model and EdgeQAT's losses beside the cross-entropy.

    L = (1 - gamma) CE + gamma tau^2 KL(teacher || student) + L_E + L_D

CE and KL are means over the trained tokens of the whole optimizer step, on all ranks, as TRL reduces them: gradient
accumulation changes nothing. L_E and L_D count every valid token, prompts included, of all ranks; over micro-batches
they are averaged. L_D is then that of one big batch where micro-batches have equally many rows; L_E is the log of a
mean, so its gradient is that of one big batch only as far as micro-batches have equal spread. All bits 32 and no loss
is TRL's trainer, bit for bit.

Source: arXiv 2402.10787 (EdgeQAT).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import is_peft_model
from torch import Tensor, nn
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from trl import SFTConfig as SFTConfig
from trl import SFTTrainer

from rltok.config import ConfigError
from rltok.launch import SHARDED_WEIGHTS, running_strategy
from rltok.quant.qat import is_prepared
from rltok.quant.qat_config import SECTION, QuantizationAwareConfig, build_quantization_aware
from rltok.quant.qat_files import write_quantizers
from rltok.quant.qat_training import QATObjective
from rltok.trainers.checkpoint import write_manifest
from rltok.trainers.distributed import AccelerateReducer


def check_quantization(config: QuantizationAwareConfig | None, args: SFTConfig, adapter: bool) -> None:
    """Refuse settings of the trainer that quantization-aware training cannot be right with.

    Args:
        adapter: an adapter is trained instead of all weights.

    Raises:
        ConfigError: names both settings.
    """
    if config is None:
        return
    if adapter:
        raise ConfigError(
            f"{SECTION}: trains the steps of all weights, which an adapter leaves frozen; set model.lora=null "
            f"model.quantization=null model.adapter=merge, or {SECTION}=null",
            SECTION,
        )
    if args.packing or args.padding_free:
        seen = "training.packing" if args.packing else "training.padding_free"
        for name in ("low_share", "distribution"):
            if getattr(config, name) > 0:
                raise ConfigError(
                    f"{SECTION}.{name}: {getattr(config, name)} looks at one text per row, but {seen} lays several "
                    f"into a row; set {seen}=false or {SECTION}.{name}=0",
                    f"{SECTION}.{name}",
                )
    if (
        config.has_loss
        and args.gradient_checkpointing
        and (args.gradient_checkpointing_kwargs or {}).get("use_reentrant")
    ):
        raise ConfigError(
            f"{SECTION}: its losses need the gradient of queries and keys, which reentrant checkpointing loses; set "
            "training.gradient_checkpointing_kwargs={use_reentrant: false}",
            "training.gradient_checkpointing_kwargs",
        )


class QATSFTTrainer(SFTTrainer):
    """SFTTrainer that trains for a low-bit copy of its model.

    Args:
        quantization_aware: the section of a recipe, or its typed form; None, or one that changes nothing: SFTTrainer.
        model, args, ...: as for SFTTrainer.

    Raises:
        ConfigError: settings that exclude each other, or a model that cannot be prepared.
    """

    _sampler_stats: None = None
    """no rollouts, so no statistics of them (`rltok.run.HeldOut` asks)"""

    def __init__(
        self,
        model: Any,
        args: SFTConfig | None = None,
        *,
        quantization_aware: Mapping[str, Any] | QuantizationAwareConfig | None = None,
        **kwargs: Any,
    ) -> None:
        self.quantization = build_quantization_aware(quantization_aware)
        self.objective: QATObjective | None = None
        """quantisers and losses, once they are in place"""
        if self.quantization is not None:
            if not isinstance(model, nn.Module):
                raise ConfigError(f"{SECTION}: needs a loaded model, not {model!r}", SECTION)
            check_quantization(
                self.quantization, args or SFTConfig(), kwargs.get("peft_config") is not None or is_peft_model(model)
            )
        super().__init__(model, args, **kwargs)
        if self.quantization is not None:
            self._check_model(self.quantization)

    @property
    def quantizes(self) -> bool:
        """Whether weights or activations are fake-quantised."""
        return self.quantization is not None and self.quantization.quantizes

    @property
    def _core(self) -> Any:
        return self.accelerator.unwrap_model(self.model)

    def _check_model(self, config: QuantizationAwareConfig) -> None:
        strategy = running_strategy(self.accelerator)
        if strategy in SHARDED_WEIGHTS:
            raise ConfigError(
                f"{SECTION}: no process holds the whole weights under {strategy}, so their steps cannot be found; "
                "train on one process or with ddp",
                SECTION,
            )

    # Before and after training

    def prepare_quantization(self) -> None:
        """Put the fake quantisers into the model, with steps from the first rows; done once, `train` does it if needed.

        Raises:
            ConfigError: a model that cannot be prepared.
        """
        if self.quantization is None or self.objective is not None:
            return
        reducer = AccelerateReducer(self.accelerator)
        try:
            self.objective = QATObjective.prepare(
                self._core, self.quantization, reducer=reducer, autocast=self.compute_loss_context_manager
            )
        except ValueError as error:
            raise ConfigError(f"{SECTION}: {error}", SECTION) from error
        rank, ranks = self.accelerator.process_index, self.accelerator.num_processes
        count = min(self.args.per_device_train_batch_size, len(self.train_dataset) // ranks)
        inputs = self._collated([self.train_dataset[rank + ranks * i] for i in range(max(count, 1))])
        self.objective.calibrate(inputs["input_ids"], inputs["attention_mask"])

    def finish_quantization(self) -> None:
        """Write the rounded weights into the model, where the section says `convert`."""
        if self.objective is not None:
            self.objective.convert()

    def save_final(self, folder: Path) -> None:
        """Write the trained model, with the steps of its quantisers (`rltok.models.load_model` puts them in place)."""
        self.save_model(str(folder))
        if self.args.should_save:
            write_quantizers(folder, self._core)
        self.accelerator.wait_for_everyone()

    @contextmanager
    def sampling(self) -> Iterator[None]:
        """The model as it makes completions: rounded weights formed once, and every token at the high width."""
        if self.objective is None or not is_prepared(self._core):
            yield
            return
        with self.objective.sampling():
            yield

    # Training

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """As SFTTrainer's, of the prepared model."""
        self.prepare_quantization()
        return super().train(*args, **kwargs)

    def get_decay_parameter_names(self, model: Any) -> list[str]:
        """Steps and zero points of quantisers do not decay: that would shrink the grid."""
        return [name for name in super().get_decay_parameter_names(model) if "fake_quant" not in name]

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """TRL's loss, and in training what the section adds."""
        objective = self.objective
        if objective is None or not objective.config.has_loss or not self.model.training:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        with objective.around():
            loss = super().compute_loss(model, inputs, num_items_in_batch=num_items_in_batch)
        tokens, slices = None, 1.0
        if num_items_in_batch is not None:  # else transformers divides by the micro-batches
            spread = self.accelerator.num_processes if self.args.average_tokens_across_devices else 1
            tokens, slices = num_items_in_batch / spread, float(self.current_gradient_accumulation_steps)
        with torch.autocast(self.accelerator.device.type, enabled=False):
            extra, found = objective.loss(inputs["labels"] != -100, tokens, slices=slices)
        for name, value in found.items():
            self._metrics["train"][f"qat/{name}"].append(value)
        return objective.task_weight * loss + extra

    # Held-out loss

    @torch.no_grad()
    def heldout_loss(self, rows: int, batch_size: int) -> dict[str, float]:
        """Held-out figures of the model at hand, over all ranks' trained tokens alike, whatever the batches.

        Args:
            rows: of `eval_dataset`, the first ones.
            batch_size: per rank.

        Returns:
            `loss` in nats per token, `perplexity`, `tokens`, `token_accuracy`: share of tokens that are the model's
            first choice, `exact`: share of rows of which every token is, which greedy decoding would therefore write.
        """
        model, training = self._core, self.model.training
        rank, ranks = self.accelerator.process_index, self.accelerator.num_processes
        mine = [self.eval_dataset[i] for i in range(rank, rows, ranks)]
        sums = torch.zeros(5, dtype=torch.float64, device=self.accelerator.device)
        model.eval()
        try:
            for begin in range(0, len(mine), batch_size):
                inputs = self._collated(mine[begin : begin + batch_size])
                with self.compute_loss_context_manager():
                    out = model(**inputs, use_cache=False, fused_lm_head=True)
                right = out.is_top1.bool() | ~out.label_mask
                hits = (out.is_top1.bool() & out.label_mask).sum()
                found = [-out.log_probs.double().sum(), out.label_mask.sum(), hits, right.all(1).sum()]
                sums += torch.stack([*(value.double() for value in found), torch.ones_like(sums[0]) * len(right)])
        finally:
            model.train(training)
        nats, tokens, hits, exact, count = self.accelerator.reduce(sums, reduction="sum").tolist()
        loss = nats / max(tokens, 1)
        means = {"loss": loss, "perplexity": math.exp(min(loss, 700.0)), "tokens": tokens}
        return means | {"token_accuracy": hits / max(tokens, 1), "exact": exact / max(count, 1)}

    def _collated(self, rows: list[Any]) -> dict[str, Tensor]:
        """Padded, never packed, on this rank's device."""
        collate = dataclasses.replace(self.data_collator, padding_free=False)
        rows = [{name: row[name] for name in ("input_ids", "labels")} for row in rows]
        return {name: value.to(self.accelerator.device) for name, value in collate(rows).items()}

    # Checkpoints

    def _run_epoch(self, *args: Any, **kwargs: Any) -> Any:
        # transformers would train one step beyond the end when a run is resumed from its last checkpoint
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
            return None
        return super()._run_epoch(*args, **kwargs)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        super()._save_checkpoint(model, trial)
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            folder = Path(self._get_output_dir(trial=trial)) / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
            write_quantizers(folder, self._core)
            write_manifest(folder)
        self.accelerator.wait_for_everyone()
