"""`CreditTrainer`: TRL's GRPOTrainer with doors for credit, selection, objective and rollout.

The trainer knows TRL, ranks and logging; the methods behind the doors know none of them. It overrides

    _generate_single_turn               door 3: processors and the recorder around TRL's own generation
    _calculate_rewards                  keeps the rewards of all ranks by function
    _generate_and_score_completions     dynamic sampling, correction, signals, door 1, selection
    _prepare_inputs, training_step      micro-batches of the selected rows, in place of TRL's cut
    _compute_loss                       door 2, composed from `rltok.objective`
    _save_checkpoint, _load_optimizer_and_scheduler    exact resume

and with no door set every parameter stays bit-identical to GRPOTrainer's.
"""

from __future__ import annotations

import logging
import math
import shutil
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, ClassVar

import torch
from accelerate.utils import gather_object
from torch import Tensor
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, rotate_checkpoints
from transformers.utils import is_peft_available
from trl import GRPOConfig, GRPOTrainer
from trl.models.utils import disable_gradient_checkpointing

from rltok.attention import AttentionSignals, attention_signals
from rltok.attention.probe import probeable_layers
from rltok.batch import TokenBatch
from rltok.config import ConfigError
from rltok.correction import rollout_weights
from rltok.credit import CreditMethod, check_credit
from rltok.entropy import LOG_FLOOR, EntropyStats, entropy_signal, entropy_stats
from rltok.objective import (
    HAPO,
    Divisors,
    LossBatch,
    LossSettings,
    ObjectiveTerm,
    aggregate,
    plan_loss,
    reference_kl,
    token_loss,
)
from rltok.objective.aggregate import CLIPPED, TOKEN_NORMALISED
from rltok.rollout import RolloutConfig
from rltok.sampling import AdaptiveTemperatureConfig, DecodingContext, SampledLogps, make_processors, sampling_control
from rltok.selection import SelectionMethod
from rltok.trainers.checkpoint import write_manifest
from rltok.trainers.config import CreditConfig
from rltok.trainers.credit_table import CreditTable
from rltok.trainers.distributed import AccelerateReducer, RaggedGather, gather_rows
from rltok.trainers.doors import build_doors, check_doors, needs_whole_rows
from rltok.trainers.dynamic_sampling import concatenate, gather_batch, mixed_groups, select_groups
from rltok.trainers.prompt_skipping import SkippedPrompts
from rltok.trainers.prompts import EpochRepeatSampler, RefillPrompts, local_share
from rltok.trainers.scoring import kept_positions
from rltok.trainers.selection import RolloutSelector, Rows, Selected, UpdateShape, trimmed, valid_tokens

logger = logging.getLogger(__name__)

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
# Where the generation batch's entropy statistics travel beside its rows; 0-d tensors are neither shuffled nor split.
LOSS_STATS = tuple(f"entropy_stats/{field.name}" for field in fields(EntropyStats))


class CreditTrainer(GRPOTrainer):
    """GRPOTrainer with token-aware credit. Takes everything GRPOTrainer takes.

    Args:
        credit: a credit method, or a section such as `{"type": "token_group_average"}`.
        selection: a selection method, or a section such as `{"type": "d3s"}`.
        objective: an objective term, a section such as `{"type": "hapo"}`, or a list of them, applied in order.
        rollout: `RolloutConfig`, or a section with `decoding`, `correction`, `dynamic_sampling`, `prompt_skipping`.

    A door may be set here or in `CreditConfig`, not in both. All at None is GRPOTrainer.

    Raises:
        ConfigError: unknown names or values, or a combination whose mathematics is wrong; before anything is loaded.

    Example:
        trainer = CreditTrainer(
            model="Qwen/Qwen2.5-0.5B-Instruct", reward_funcs=reward, train_dataset=dataset,
            args=CreditConfig(output_dir="out", steps_per_generation=8), objective={"type": "hapo"},
        )
    """

    _tag_names: ClassVar[list[str]] = ["trl", "grpo", "rltok"]
    # State of TRL's adaptive entropy coefficient, which its checkpoints carry.
    entropy_coef: float
    _last_world_entropy: float
    _entropy_window_stats: Tensor | None
    # TRL's micro-batches of the current rollout, and its clock of an optimizer step.
    _buffered_inputs: list[Any] | None
    _current_train_step_time: float

    def __init__(
        self,
        model: Any,
        reward_funcs: Any = None,
        args: GRPOConfig | None = None,
        *positional: Any,
        credit: CreditMethod | Mapping[str, Any] | None = None,
        objective: ObjectiveTerm | Mapping[str, Any] | Sequence[Any] | None = None,
        rollout: RolloutConfig | Mapping[str, Any] | None = None,
        selection: SelectionMethod | Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        self.doors = build_doors(
            _only_one("credit", args, credit),
            _only_one("objective", args, objective),
            _only_one("rollout", args, rollout),
            _only_one("selection", args, selection),
        )
        if args is not None:
            names = [_reward_name(f) for f in (reward_funcs if isinstance(reward_funcs, list) else [reward_funcs])]
            check_doors(self.doors, args, names, kwargs.get("rollout_func") is not None)
        super().__init__(model, reward_funcs, args, *positional, **kwargs)
        if args is None:
            check_doors(self.doors, self.args, self.reward_func_names, self.rollout_func is not None)
        self.loss_settings = _loss_settings(self.args)
        self._reducer = AccelerateReducer(self.accelerator)
        self._gather = RaggedGather(self.accelerator)
        self._sampler_stats: EntropyStats | None = None
        self._refill: RefillPrompts | None = None
        self._skipping: SkippedPrompts | None = None
        self._visits: list[tuple[list[str], Tensor]] = []
        rollout_section = self.doors.rollout
        for setting in ("dynamic_sampling", "prompt_skipping"):
            if getattr(rollout_section, setting) is None:
                continue
            if not hasattr(self.train_dataset, "__getitem__"):
                raise ValueError(
                    f"rollout.{setting} draws replacement prompts by index, which an iterable train_dataset "
                    f"does not allow. Pass a Dataset, or unset rollout.{setting}."
                )
            self._refill = RefillPrompts(len(self.train_dataset), self.args.seed)
        if rollout_section.prompt_skipping is not None:
            assert self._refill is not None
            self._skipping = SkippedPrompts(
                rollout_section.prompt_skipping, self.train_dataset, self._refill, self.accelerator, self.args.seed
            )
        self._check_attention()
        self._scored: list[tuple[Tensor, Tensor | None]] | None = None
        self._postponed = False
        self._rewards_per_func: Tensor | None = None
        self._trained_tokens = 0
        self._selector = self._build_selector()
        self._selected: Selected | None = None
        self._rollout = _RolloutState()
        self._table = CreditTable(self._logs, self._tokenizer.decode)

    def _check_attention(self) -> None:
        """Refuse a model whose attention the credit method cannot read, before anything is generated."""
        method = self.doors.credit
        if "attention" not in method.needs:
            return
        name = f"credit.type={type(method).__name__}"
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            raise ConfigError(
                f"{name} reads attention in passes whose number differs between ranks; sharded models (FSDP, "
                "DeepSpeed) would hang. Train unsharded, or use another credit.type."
            )
        try:
            probeable_layers(self.model, method.attention.layers)  # type: ignore[attr-defined]
        except ValueError as error:
            raise ConfigError(f"{name}: {error}") from None

    # ------------------------------------------------------------------ prompts

    def _get_train_sampler(self, dataset: Any = None) -> Any:
        return EpochRepeatSampler.like(super()._get_train_sampler(dataset))

    def _run_epoch(self, *args: Any, **kwargs: Any) -> Any:
        # transformers would train one step beyond the end when a run is resumed from its last checkpoint
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
            return None
        return super()._run_epoch(*args, **kwargs)

    # ------------------------------------------------------------------ door 3: rollout

    def _generate_single_turn(self, prompt_ids: Any, *args: Any, **kwargs: Any) -> Any:
        rollout = self.doors.rollout
        if not self.model.training or self.use_vllm or not (rollout.records_logps or rollout.modifies_sampler):
            return super()._generate_single_turn(prompt_ids, *args, **kwargs)
        context = DecodingContext(self.temperature, self._sampler_stats, self._tokenizer)
        processors = make_processors(rollout.decoding, context)
        recorder = SampledLogps() if rollout.records_logps else None
        with sampling_control(self.accelerator.unwrap_model(self.model), processors, recorder):
            completion_ids, logps, *rest = super()._generate_single_turn(prompt_ids, *args, **kwargs)
        lengths = [len(ids) for ids in completion_ids]
        for processor in processors:
            for name, value in processor.metrics(lengths).items():
                self._metrics["train"][f"rollout/{name}"].append(value)
        if recorder is not None:
            logps = recorder.finish(completion_ids)
        return completion_ids, logps, *rest

    # ------------------------------------------------------------------ scoring

    def _calculate_rewards(self, *args: Any, **kwargs: Any) -> Tensor:
        self._rewards_per_func = super()._calculate_rewards(*args, **kwargs)
        return self._rewards_per_func

    def _get_per_token_logps_and_entropies(self, model: Any, *args: Any, **kwargs: Any) -> Any:
        # While a batch is scored, the old policy's entropies come with the log-probabilities TRL computes anyway.
        if self._postponed:  # the old policy's pass comes first; after selection it runs on the kept rows only
            self._postponed = False
            ids, width = (args[0] if args else kwargs["input_ids"]), (args[2] if len(args) > 2 else None)
            width = kwargs["logits_to_keep"] if width is None else width
            return torch.zeros(ids.size(0), width, device=ids.device), None, None
        capturing = self._scored is not None and model is self.model
        if capturing:
            kwargs["compute_entropy"] = True
        output = super()._get_per_token_logps_and_entropies(model, *args, **kwargs)
        if capturing:
            assert self._scored is not None
            self._scored.append((output[0], output[1]))
        return output

    @property
    def _reads_scores(self) -> bool:
        """True if something reads the old policy's scores of all rows."""
        corrects = self.doors.rollout.resolved_correction.mode != "off"
        return corrects or bool(self.doors.needs & {"entropy", "entropy_stats", "old_logps"})

    @property
    def _ratio_needs_old(self) -> bool:
        """True if TRL scores the old policy: a rollout serves several updates, or vLLM sampled it."""
        rollout = self.args.steps_per_generation * self.num_iterations
        return self.args.gradient_accumulation_steps % rollout != 0 or self._corrects_vllm

    @property
    def _corrects_vllm(self) -> bool:
        return self.use_vllm and self.vllm_importance_sampling_correction

    def _score_once(self, inputs: Any, postpone: bool = False) -> dict[str, Any]:
        """TRL's generation and scoring, plus this rank's rewards by function and whatever signals are needed.

        `postpone` leaves the old policy's log-probabilities at 0 for now.
        """
        wants_scores = self._reads_scores
        self._scored = [] if wants_scores else None
        self._postponed = postpone and self._ratio_needs_old
        try:
            output = super()._generate_and_score_completions(inputs)
            scored = self._scored
        finally:
            self._scored, self._postponed = None, False
        rows = output["completion_ids"].size(0)
        assert self._rewards_per_func is not None
        if self._skipping is not None and self.model.training:
            self._visits.append((self._skipping.ids, self._rewards_per_func))
        first = self.accelerator.process_index * rows
        output["rewards_per_func"] = self._rewards_per_func[first : first + rows]
        if wants_scores:
            # TRL scores the old policy first, and only when updates and generations are not aligned.
            if "old_per_token_logps" in output and scored:
                logps, entropy = scored[0]
            else:
                logps, entropy = self._score_old_policy(output)
            output["scored_logps"], output["scored_entropy"] = logps, entropy
        return output

    def _score_old_policy(self, output: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
        training = self.model.training
        batch_size = self.args.per_device_train_batch_size if training else self.args.per_device_eval_batch_size
        with torch.no_grad(), disable_gradient_checkpointing(self.model, self.args.gradient_checkpointing_kwargs):
            logps, entropy, *_ = self._get_per_token_logps_and_entropies(
                self.model, *_sequence(output), batch_size=batch_size, compute_entropy=True, **_multimodal(output)
            )
        return logps, entropy

    def _generate_and_score_completions(self, inputs: Any) -> dict[str, Any]:
        mode = "train" if self.model.training else "eval"
        budget, postpone = self._selection_budget(len(inputs) * self.accelerator.num_processes, mode)
        if mode == "train" and self._skipping is not None:
            inputs = self._skipping.replace(inputs, self.num_generations)
        if mode == "train" and self.doors.rollout.dynamic_sampling is not None:
            output = self._sample_until_full(inputs, postpone)
        else:
            output = self._score_once(inputs, postpone)
        if mode == "train" and self._skipping is not None:
            self._learn_from_visits(self._skipping)
        rewards_per_func = output.pop("rewards_per_func")
        scored_logps = output.pop("scored_logps", None)
        entropy = output.pop("scored_entropy", None)
        if scored_logps is not None and self.doors.rollout.resolved_correction.mode != "off":
            self._correct(output, scored_logps, mode)
        mask = _loss_mask(output)
        stats = self._entropy_statistics(output, entropy, mask, mode)
        attention = self._attention_signals(output, mode)
        batch = self._token_batch(output, mask, rewards_per_func, scored_logps, entropy, stats, attention)
        credit = self.doors.credit(batch)
        check_credit(credit, batch, type(self.doors.credit).__name__)
        if self.log_completions and mode == "train" and self.doors.rollout.dynamic_sampling is not None:
            self._show_trained_rows(output, batch)
        output["advantages"] = credit
        shown = credit
        if budget is not None:
            shown = self._select(output, batch, credit, entropy, budget, postpone)
        self._log_credit(output, credit, shown, mask, mode)
        self._log_method(batch, mode)
        return output

    def _token_batch(
        self,
        output: Mapping[str, Any],
        mask: Tensor,
        rewards_per_func: Tensor,
        logps: Tensor | None,
        entropy: Tensor | None,
        stats: EntropyStats | None,
        attention: AttentionSignals | None,
    ) -> TokenBatch:
        parts = gather_rows(self.accelerator, rewards_per_func)
        rewards = (parts * self.reward_weights.to(parts.device)).nansum(1)
        rewards[parts.isnan().all(1)] = torch.nan
        return TokenBatch(
            advantages=output["advantages"],
            mask=mask.to(output["advantages"].dtype),
            ids=output["completion_ids"],
            all_rewards=rewards,
            all_lengths=gather_rows(self.accelerator, mask.sum(1)),
            group_size=self.num_generations if self.model.training else self.num_generations_eval,
            offset=self.accelerator.process_index * mask.size(0),
            reward_parts={name: parts[:, i] for i, name in enumerate(self.reward_func_names)},
            old_logps=logps,
            entropy=entropy,
            entropy_stats=stats,
            attention=attention,
            response_mask=output["completion_mask"].to(output["advantages"].dtype),
            seed=self.args.seed * 1_000_003 + self._step,
        )

    def _attention_signals(self, output: Mapping[str, Any], mode: str) -> AttentionSignals | None:
        """One pass over the rollout with the learner's weights, if the credit method asks for attention."""
        method = self.doors.credit
        if "attention" not in method.needs:
            return None
        if any(key in output for key in MULTIMODAL):
            raise ValueError("credit from attention does not support images; use another credit.type")
        start = time.perf_counter()
        ids, mask, _ = _sequence(output)
        config = method.attention  # type: ignore[attr-defined]
        with self.accelerator.autocast():
            signals = attention_signals(self.model, ids, mask, output["completion_mask"], config, self._reducer)
        seconds = time.perf_counter() - start
        self._log_heads(signals, output["completion_mask"], seconds, mode)
        return signals

    def _log_heads(self, signals: AttentionSignals, mask: Tensor, seconds: float, mode: str) -> None:
        """Mean span of the two head groups over the completions of all ranks, and the time of the pass."""
        some = (mask.sum(1) > 0).to(signals.span.dtype)
        spans = [
            signals.span.gather(1, heads.expand(mask.size(0), -1)).mean(1) for heads in (signals.local, signals.global_)
        ]
        sums = torch.stack([(span.nan_to_num() * some).sum() for span in spans] + [some.sum()])
        near, far, count = self._reducer.sum(sums).tolist()
        self._metrics[mode]["attention/local_span"].append(near / max(count, 1.0))
        self._metrics[mode]["attention/global_span"].append(far / max(count, 1.0))
        self._metrics[mode]["attention/seconds"].append(seconds)

    def _entropy_statistics(
        self, output: dict[str, Any], entropy: Tensor | None, mask: Tensor, mode: str
    ) -> EntropyStats | None:
        """Statistics for the loss go into `output`, those for the next rollout into the trainer."""
        if entropy is None or "entropy_stats" not in self.doors.needs:
            return None
        term = next((t for t in self.doors.objective if isinstance(t, HAPO)), None)
        rho, floor = (0.8, LOG_FLOOR) if term is None else (term.rho, term.floor)
        stats = entropy_stats(entropy, mask, rho, floor, self._gather)
        if stats is not None:
            output |= dict(zip(LOSS_STATS, stats, strict=True))
        if mode == "train":
            for module in self.doors.rollout.decoding:
                if isinstance(module, AdaptiveTemperatureConfig):
                    same = (module.rho, module.floor) == (rho, floor)
                    latest = stats if same else entropy_stats(entropy, mask, module.rho, module.floor, self._gather)
                    self._sampler_stats = self._sampler_stats if latest is None else latest
        if stats is not None:
            h = self._gather(entropy_signal(entropy, stats, mask, floor=floor)[mask.bool()])
            for share in (10, 50, 90):
                value = h.kthvalue(max(1, round(share / 100 * h.numel()))).values.item()
                self._metrics[mode][f"entropy_signal/p{share}"].append(value)
        return stats

    def _correct(self, output: dict[str, Any], logps: Tensor, mode: str) -> None:
        """Weight learner over sampler into `output`; rejected tokens leave the loss mask and its count."""
        if "sampling_per_token_logps" not in output:  # evaluation samples plainly and records nothing
            return
        mask = _loss_mask(output)
        config = self.doors.rollout.resolved_correction
        weights = rollout_weights(logps, output["sampling_per_token_logps"], mask, config, self._reducer)
        output["importance_sampling_ratio"] = weights.weight.to(logps.dtype)
        if not torch.equal(weights.loss_mask, mask):
            output["tool_mask"] = output.get("tool_mask", torch.ones_like(mask)) * weights.loss_mask
        output["num_items_in_batch"] = self.accelerator.gather(_loss_mask(output).sum()).sum()
        values = {name: float(value) for name, value in weights.metrics.items()}
        for name, value in values.items():
            self._metrics[mode][f"correction/{name}"].append(value)
        if values["weight_ess"] < config.min_ess and self.accelerator.is_main_process:
            logger.warning(
                "The effective sample size after correction is %.3f of the sample, below rollout.correction.min_ess=%s."
                " Weaken the decoding (rollout.decoding) or lower rollout.correction.clip_max=%s.",
                values["weight_ess"],
                config.min_ess,
                config.clip_max,
            )

    # ------------------------------------------------------------------ dynamic sampling, prompt skipping

    def _learn_from_visits(self, skipping: SkippedPrompts) -> None:
        """Enter the rewards of every group of this batch, those that dynamic sampling dropped included."""
        config = self.doors.rollout.prompt_skipping
        assert config is not None
        column = self.reward_func_names.index(config.metric)
        ids = [identity for group, _ in self._visits for identity in group]
        rewards = torch.cat([values[:, column] for _, values in self._visits])
        self._visits = []
        values = skipping.record(ids, rewards, self.num_generations, self.state.epoch or 0.0)
        for name, value in (values | skipping.metrics).items():
            self._metrics["train"][f"prompt_skipping/{name}"].append(value)

    def _sample_until_full(self, inputs: list[Any], postpone: bool) -> dict[str, Any]:
        dynamic, refill = self.doors.rollout.dynamic_sampling, self._refill
        assert dynamic is not None and refill is not None
        column = self.reward_func_names.index(dynamic.metric)
        accelerator, size = self.accelerator, self.num_generations
        pad_id = self._tokenizer.pad_token_id
        wanted = len(inputs) * accelerator.num_processes // size
        kept_parts, dropped_parts, kept, seen, rounds = [], [], 0, 0, 0
        while True:
            rounds += 1
            output = self._score_once(inputs, postpone)
            if any(key in output for key in MULTIMODAL):
                raise ValueError("rollout.dynamic_sampling does not support images; unset it")
            rows = {name: value for name, value in output.items() if name != "num_items_in_batch"}
            rows = gather_batch(accelerator, rows, pad_id)
            mixed = mixed_groups(rows["rewards_per_func"][:, column], size)
            kept_parts.append(select_groups(rows, mixed, size))
            dropped_parts.append(select_groups(rows, ~mixed, size))
            kept, seen = kept + int(mixed.sum()), seen + mixed.numel()
            if kept >= wanted:
                break
            if 0 < dynamic.max_rounds <= rounds:
                if dynamic.on_limit == "keep":
                    kept_parts += dropped_parts
                    break
                raise RuntimeError(
                    f"rollout.dynamic_sampling: after max_rounds={dynamic.max_rounds} rounds only {kept} of {wanted} "
                    f"groups vary in {dynamic.metric!r}. Raise max_rounds, use on_limit='keep', or choose problems "
                    "that are neither solved nor hopeless."
                )
            groups = wanted - kept
            while groups * size % accelerator.num_processes:
                groups += 1
            drawn = refill.take(groups) if self._skipping is None else self._skipping.take(groups)
            prompts = [index for index in drawn for _ in range(size)]
            share = local_share(prompts, accelerator.process_index, accelerator.num_processes)
            inputs = [dict(self.train_dataset[index]) for index in share]
            if self._skipping is not None:
                self._skipping.ids = self._skipping.ids_of(inputs, size)
        merged = concatenate(kept_parts, pad_id)
        local = wanted * size // accelerator.num_processes
        first = accelerator.process_index * local
        result: dict[str, Any] = {name: value[first : first + local] for name, value in merged.items()}
        result["num_items_in_batch"] = accelerator.gather(_loss_mask(result).sum()).sum()
        self._metrics["train"]["dynamic_sampling/rounds"].append(rounds)
        self._metrics["train"]["dynamic_sampling/kept_share"].append(kept / seen)
        return result

    # ------------------------------------------------------------------ selection

    def _build_selector(self) -> RolloutSelector | None:
        method, args = self.doors.selection, self.args
        if method is None:
            return None
        source: str = method.entropy_from
        if source == "auto":
            source = "old" if self._ratio_needs_old or self._reads_scores else "micro"
        if source == "old" and method.selects_tokens and not (self._ratio_needs_old or self._reads_scores):
            logger.warning(
                "selection.entropy_from='old' with one update per rollout: nothing else needs the old policy's pass, "
                "so each kept row costs one more forward pass. selection.entropy_from='micro' does without."
            )
        model = self._causal_lm
        head = model.get_output_embeddings().weight.numel()
        tables = {id(p): p.numel() for p in (model.get_output_embeddings().weight, model.get_input_embeddings().weight)}
        checkpointing = args.gradient_checkpointing
        shape = UpdateShape(
            windows=args.steps_per_generation // args.gradient_accumulation_steps,
            slots=args.gradient_accumulation_steps,
            rows_per_slot=args.per_device_train_batch_size,
            pad_id=self._tokenizer.pad_token_id,
            pad_multiple=args.pad_to_multiple_of or 1,
            body_weights=max(1, sum(p.numel() for p in model.parameters()) - sum(tables.values())),
            head_weights=head,
            body_passes=4.0 if checkpointing else 3.0,
            head_everywhere=self.accelerator.device.type not in ("cuda", "xpu"),
        )
        return RolloutSelector(method, self.accelerator, shape, needs_whole_rows(self.doors, args), source)

    @property
    def _causal_lm(self) -> Any:
        """The model TRL gave its fused head, inside all wrappers."""
        model = self.accelerator.unwrap_model(self.model)
        if is_peft_available():
            from peft import PeftModel

            if isinstance(model, PeftModel):
                return model.get_base_model()
        return model

    def _selection_budget(self, rows: int, mode: str) -> tuple[tuple[int, float, bool] | None, bool]:
        """This rollout's cuts, and whether scoring the old policy can wait until rows are selected."""
        self._selected = None
        if self._selector is None or mode != "train":
            return None, False
        budget = self._selector.budget(self.state.global_step, self.state.max_steps, rows, self.num_generations)
        return budget, not (budget[2] or self._reads_scores or self._corrects_vllm)

    def _select(
        self,
        output: dict[str, Any],
        batch: TokenBatch,
        credit: Tensor,
        entropy: Tensor | None,
        budget: tuple[int, float, bool],
        postponed: bool,
    ) -> Tensor:
        """Leaves the micro-batches in `self._selected`; returns the (B, T) credit of what may be trained."""
        selector = self._selector
        assert selector is not None
        if any(key in output for key in MULTIMODAL):
            raise ValueError("selection does not support images, whose rows it cannot exchange; unset it")
        if budget[2]:
            rows = batch.all_rewards.numel()
            self._rollout.metrics = selector.everything_metrics(output, rows, budget[1])
            return credit
        scores = self._ratio_needs_old or (selector.source == "old" and budget[1] < 1 and selector.method.reads_entropy)
        score = self._score_selected if postponed and scores else None
        seed = self.args.seed * 1_000_003 + self._step
        self._selected = selector.select(output, batch, credit, entropy, budget, seed, score)
        self._rollout.metrics = self._selected.metrics
        return self._selected.credit * self._selected.keep

    def _score_selected(self, rows: Rows) -> tuple[Tensor, Tensor]:
        """Old log-probabilities and entropies of kept rows: each rank scores its share, in order of length."""
        accelerator, valid = self.accelerator, valid_tokens(rows)
        count, width = valid.shape
        position = torch.arange(1, width + 1, device=valid.device)
        ends, prompts = (valid * position).amax(1), rows["prompt_mask"].sum(1)
        order = (ends + prompts).argsort(descending=True, stable=True).tolist()
        share = -(-count // accelerator.num_processes)
        # every rank runs equally many passes: some rows are scored twice
        padded = order + order[-1:] * (share * accelerator.num_processes - count)
        mine = padded[accelerator.process_index :: accelerator.num_processes]
        scores = torch.zeros(share, 2, width, device=valid.device)
        model = self._causal_lm
        for start in range(0, share, self.args.per_device_train_batch_size):
            index = mine[start : start + self.args.per_device_train_batch_size]
            chunk = trimmed(rows, index, int(prompts[index].max()), int(ends[index].max()))
            with (
                torch.no_grad(),
                disable_gradient_checkpointing(self.model, self.args.gradient_checkpointing_kwargs),
                kept_positions(model, valid_tokens(chunk), chunk["completion_ids"].size(1)),
            ):
                logps, entropy, *_ = super()._get_per_token_logps_and_entropies(
                    self.model, *_sequence(chunk), compute_entropy=True
                )
            scores[start : start + len(index), :, : logps.size(1)] = torch.stack([logps, entropy], 1)
        everyone = accelerator.gather(scores).view(accelerator.num_processes, share, 2, width).transpose(0, 1)
        result = torch.zeros(count, 2, width, device=valid.device)
        result[torch.tensor(padded, device=valid.device)] = everyone.reshape(-1, 2, width)
        return result[:, 0], result[:, 1]

    def _prepare_inputs(self, generation_batch: Any) -> Any:
        if self._selector is None or not self.model.training:
            return super()._prepare_inputs(generation_batch)
        every = self.args.steps_per_generation * self.num_iterations
        due = self._step % every == 0 or self._buffered_inputs is None
        if due and self._rollout.made_at != self._step:
            inputs = super()._prepare_inputs(generation_batch)  # generates, scores, selects and cuts
            self._rollout.made_at = self._step
            if self._selected is None:
                return inputs
            self._buffered_inputs, self._selected = self._selected.slots, None
        assert self._buffered_inputs is not None
        return self._buffered_inputs[self._step % self.args.steps_per_generation]

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        """TRL's step; a micro-batch that selection left empty runs no pass."""
        if self._selector is None:
            return super().training_step(model, inputs, num_items_in_batch)
        start = time.perf_counter()
        model.train()
        slot = self._prepare_inputs(inputs)
        prepared = time.perf_counter()
        self._current_train_step_time += prepared - start
        accumulation = self.args.gradient_accumulation_steps
        if slot is not None:
            loss = super().training_step(model, inputs, num_items_in_batch)
        else:
            loss = torch.zeros((), device=self.accelerator.device)
            self._step += 1
            if self._step % accumulation == 0:
                self._metrics["train"]["step_time"].append(self._current_train_step_time)
                self._current_train_step_time = 0.0
        window = self._rollout
        window.seconds += time.perf_counter() - prepared
        window.ran |= slot is not None
        if self._step % accumulation == 0:
            for name, value in window.metrics.items():
                self._metrics["train"][name].append(value)
            self._metrics["train"]["selection/update_seconds"].append(window.seconds)
            self._rollout.skipped_updates += not window.ran
            window.seconds, window.ran = 0.0, False
        return loss

    def _score_for_loss(self, model: Any, inputs: dict[str, Any], mask: Tensor) -> tuple[Any, Any, Any, Tensor | None]:
        """Log-probabilities, entropies, auxiliary loss, and the (B, T) mask of selected tokens (None: all)."""

        def score() -> Any:
            return self._get_per_token_logps_and_entropies(
                model,
                *_sequence(inputs),
                compute_entropy=True,
                compute_aux_loss=self.aux_loss_enabled,
                **_multimodal(inputs),
            )

        if "keep" not in inputs:
            return *score(), None
        assert self._selector is not None and self.doors.selection is not None
        keep, method = inputs["keep"], self.doors.selection

        def choose(entropy: Tensor) -> Tensor:
            share, per_row = inputs["token_share"].item(), method.token_scope == "sample"
            return method.tokens(inputs["advantages"], entropy, mask * keep, share, per_row, self._step)

        chosen_here = "token_share" in inputs
        if self._selector.whole_rows:
            logps, entropy, aux = score()
            return logps, entropy, aux, (choose(entropy.detach()) if chosen_here else keep).to(mask.dtype)
        with kept_positions(self._causal_lm, choose if chosen_here else keep, mask.size(1)) as kept:
            logps, entropy, aux = score()
        assert kept.mask is not None
        return logps, entropy, aux, kept.mask.to(mask.dtype)

    # ------------------------------------------------------------------ door 2: objective

    def _compute_loss(self, model: Any, inputs: dict[str, Any]) -> Tensor:
        mode = "train" if self.model.training else "eval"
        mask = valid = _loss_mask(inputs)
        logps, entropy, aux_loss, kept = self._score_for_loss(model, inputs, mask)
        # a ratio over whole completions still sees the dropped tokens; otherwise they are not even scored
        if kept is not None and not (self._selector is not None and self._selector.whole_rows):
            mask = kept
        trained = mask if kept is None else kept
        selected = None
        if self.top_entropy_quantile < 1.0:
            selected = self.get_high_entropy_mask(entropy, mask, 1 - self.top_entropy_quantile)
        batch = LossBatch(
            logps=logps,
            old_logps=inputs.get("old_per_token_logps", logps.detach()),
            mask=mask,
            entropy=entropy.detach(),
            entropy_stats=_stats_from(inputs),
            gather=self._gather,
            seed=(self.args.seed * 1_000_003 + self._step) * 1009 + self.accelerator.process_index,
        )
        advantages = inputs["advantages"]
        plan = plan_loss(
            batch,
            advantages if advantages.dim() > 1 else advantages.unsqueeze(1),
            self.loss_settings,
            self.doors.objective,
        )
        losses, values = token_loss(batch, plan, self.loss_settings, self._sampler_weight(inputs))
        if self.off_policy_mask_threshold is not None:
            losses = losses * self.get_off_policy_mask(
                advantages=plan.advantages,
                per_token_logps=logps,
                sampling_per_token_logps=inputs.get("sampling_per_token_logps", batch.old_logps),
                mask=mask,
                off_policy_threshold=self.off_policy_mask_threshold,
            )
        if selected is not None:
            losses = losses * selected
        if self.beta != 0.0:
            kl = reference_kl(logps, inputs["ref_per_token_logps"])
            if self.args.use_bias_correction_kl:
                kl = kl * torch.exp(plan.log_weight)
            losses = losses + self.beta * kl
            values["kl"] = kl.detach()
        loss = aggregate(losses, trained, self.loss_type, self._divisors(inputs, mode))
        loss = self._add_entropy_bonus(loss, entropy, mask if selected is None else mask * selected, mode)
        if self.aux_loss_enabled:
            steps = inputs["used_slots"] if "used_slots" in inputs else self._accumulation(mode)
            loss = loss + self.router_aux_loss_coef * aux_loss / steps
            self._metrics[mode]["aux_loss"].append(self.accelerator.gather_for_metrics(aux_loss).mean().item())
        values |= plan.metrics
        values["entropy"] = entropy.detach()
        values["ratio"] = torch.exp(plan.log_weight.detach())
        self._log_token_means(values, trained, mode)
        if mode == "train" and self.log_completions and "row" in inputs:
            self._table.remember(inputs["row"], plan.advantages.expand_as(logps) * trained, valid)
        return loss

    def _sampler_weight(self, inputs: Mapping[str, Any]) -> Tensor | None:
        ours = self.doors.rollout.resolved_correction.mode != "off"
        trls = self.use_vllm and self.vllm_importance_sampling_correction
        return inputs.get("importance_sampling_ratio") if ours or trls else None

    def _accumulation(self, mode: str) -> float:
        return float(self.current_gradient_accumulation_steps) if mode == "train" else 1.0

    def _divisors(self, inputs: Mapping[str, Any], mode: str) -> Divisors:
        if "loss_tokens" in inputs:  # after selection
            budget = inputs["budget_share"] * self.max_completion_length
            rows = inputs["loss_rows"]
            return Divisors(1.0, inputs["loss_tokens"], budget, rows, inputs.get("row_tokens"))
        # The token count spans the generation batch; one accumulation window holds its share of it.
        tokens = inputs["num_items_in_batch"].clamp(min=1.0) / self.accelerator.num_processes
        if mode == "train":
            tokens = tokens * self.current_gradient_accumulation_steps / self.args.steps_per_generation
        return Divisors(self._accumulation(mode), tokens, self.max_completion_length)

    def _add_entropy_bonus(self, loss: Tensor, entropy: Tensor, mask: Tensor, mode: str) -> Tensor:
        """loss - coef * mean entropy, with TRL's fixed or adaptive coefficient; off by default."""
        if not self._entropy_bonus_enabled:
            return loss
        scale = 1.0 if self.loss_type in TOKEN_NORMALISED else self._accumulation(mode)
        self._metrics[mode]["policy_loss"].append(self.accelerator.gather(loss.detach() * scale).nanmean().item())
        adaptive = self.use_adaptive_entropy
        active = not adaptive or self._last_world_entropy <= self.args.entropy_target
        total, count = (entropy * mask).sum(), mask.sum()
        loss = loss - (self.entropy_coef if active else 0.0) * total / count.clamp(min=1.0) / self._accumulation(mode)
        if mode == "train" and adaptive:
            window = torch.stack([total.detach(), count.to(total.dtype)])
            window = window if self._entropy_window_stats is None else self._entropy_window_stats + window
            self._entropy_window_stats = window
            if self.accelerator.sync_gradients:
                total, count = self._reducer.sum(window)
                self._last_world_entropy = (total / count.clamp(min=1.0)).item()
                falling = self._last_world_entropy <= self.args.entropy_target
                step = self.args.entropy_coef_delta if falling else -self.args.entropy_coef_delta
                low, high = self.args.entropy_coef_min, self.args.entropy_coef_max
                # each direction meets its own bound only, as a start outside the range must drift back
                moved = self.entropy_coef + step
                self.entropy_coef = min(moved, high) if falling else max(moved, low)
                self._entropy_window_stats = None
        if mode == "train" and self.accelerator.sync_gradients:
            self._metrics[mode]["entropy_coef"].append(self.entropy_coef)
        return loss

    # ------------------------------------------------------------------ logging

    def _log_token_means(self, values: Mapping[str, Tensor], mask: Tensor, mode: str) -> None:
        """Mean over masked tokens (or completions, for (B, 1) values) of all ranks, in one reduction."""
        counted = mask.sum(1) > 0
        # of the rows that selection kept, all; without selection TRL counts empty rows too
        rows = counted.sum() if mode == "train" and self._selector is not None else torch.tensor(mask.size(0))
        rows = rows.to(mask.device).float()
        tokens = mask.sum().float()
        pairs = [torch.stack([tokens, tokens])]
        for value in values.values():
            per_row = value.size(1) == 1 and mask.size(1) != 1
            pairs.append(torch.stack([value.sum(), rows] if per_row else [(value * mask).sum(), tokens]))
        totals = self._reducer.sum(torch.cat(pairs)).view(-1, 2)
        if mode == "train":
            self._trained_tokens += int(totals[0, 0].item())
        means = (totals[1:, 0] / totals[1:, 1].clamp(min=1.0)).tolist()
        for name, mean in zip(values, means, strict=True):
            self._metrics[mode][name].append(mean)
        if self.loss_type in CLIPPED:
            low, high = (_row_means(values[f"clip_ratio/{side}_mean"], mask) for side in ("low", "high"))
            least = low.masked_fill(~counted, torch.inf).amin()
            low_min, high_max = self._reducer.max(torch.stack([-least, high.amax()])).tolist()
            self._metrics[mode]["clip_ratio/low_min"].append(-low_min if math.isfinite(low_min) else 0.0)
            self._metrics[mode]["clip_ratio/high_max"].append(high_max)

    def _log_credit(self, output: dict[str, Any], credit: Tensor, shown: Tensor, mask: Tensor, mode: str) -> None:
        """Numbers that show where the credit went, and the completions table's column of it (`shown`)."""
        values = self._gather(credit.abs()[mask.bool()])
        if values.numel():
            top = values.topk(max(1, round(0.2 * values.numel()))).values.sum()
            total = values.sum()
            self._metrics[mode]["credit/abs_mean"].append(values.mean().item())
            self._metrics[mode]["credit/nonzero_share"].append((values > 0).float().mean().item())
            self._metrics[mode]["credit/top20_share"].append((top / total).item() if total > 0 else 0.0)
        if self.log_completions:
            if mode == "train":
                first = self.accelerator.process_index * credit.size(0)
                output["row"] = first + torch.arange(credit.size(0), device=credit.device)
            self._table.add(output["completion_ids"], shown, mask, updates_follow=mode == "train")

    def _log_method(self, batch: TokenBatch, mode: str) -> None:
        """Numbers of the credit method's own, `metrics(batch)` if it has them: means over tokens of all ranks."""
        metrics = getattr(self.doors.credit, "metrics", None)
        if metrics is None:
            return
        for name, value in metrics(batch).items():
            total, count = self._reducer.sum(torch.stack([(value * batch.mask).sum(), batch.mask.sum()])).tolist()
            self._metrics[mode][f"credit/{name}"].append(total / max(count, 1.0))

    def _show_trained_rows(self, output: Mapping[str, Any], batch: TokenBatch) -> None:
        """After dynamic sampling the table shows the rows that are trained, not the candidates."""

        def texts(ids: str, mask: str) -> list[str]:
            rows = [i[m.bool()] for i, m in zip(output[ids], output[mask], strict=True)]
            return gather_object(self.processing_class.batch_decode(rows, skip_special_tokens=True))

        columns = {
            "prompt": texts("prompt_ids", "prompt_mask"),
            "completion": texts("completion_ids", "completion_mask"),
            "advantages": gather_rows(self.accelerator, batch.advantages).tolist(),
        }
        self._table.replace(columns, {name: part.tolist() for name, part in batch.reward_parts.items()})

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """TRL's log; the table's `credit` column first takes what the loss has used by now."""
        if self.log_completions and self.model.training:
            self._table.refresh()
        if self.model.training:  # running totals, which a mean over the logged steps would blur
            self._metrics["train"]["trained_tokens"] = [self._trained_tokens]
            if self._selector is not None:
                self._metrics["train"]["selection/skipped_updates"] = [self._rollout.skipped_updates]
        super().log(logs, *args, **kwargs)

    # ------------------------------------------------------------------ checkpoints

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        run_dir = Path(self._get_output_dir(trial=trial))
        folder = run_dir / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        if self.args.should_save and folder.exists():
            shutil.rmtree(folder)  # left over from a run that was killed after this step
        self.accelerator.wait_for_everyone()
        limit, self.args.save_total_limit = self.args.save_total_limit, None
        try:
            super()._save_checkpoint(model, trial)
        finally:
            self.args.save_total_limit = limit
        if not self.args.save_only_model:
            torch.save(self._resume_state(), folder / _state_file(self.accelerator.process_index))
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            write_manifest(folder)
            rotate_checkpoints(str(run_dir), limit, self.state.best_model_checkpoint, use_mtime=True)
        self.accelerator.wait_for_everyone()

    def _shape_of_run(self) -> dict[str, int]:
        args = self.args
        return {
            "processes": self.accelerator.num_processes,
            "training.per_device_train_batch_size": args.per_device_train_batch_size,
            "training.gradient_accumulation_steps": args.gradient_accumulation_steps,
            "training.steps_per_generation": args.steps_per_generation,
            "training.num_generations": self.num_generations,
            "training.num_iterations": self.num_iterations,
        }

    def _resume_state(self) -> dict[str, Any]:
        """What transformers' checkpoint leaves out and an exact continuation needs."""
        stats = self._sampler_stats
        return {
            "shape": self._shape_of_run(),
            "step": self._step,
            "buffer": self._buffered_inputs,
            "metrics": {name: list(values) for name, values in self._metrics["train"].items()},
            "sampler_stats": None if stats is None else list(stats),
            "refill": None if self._refill is None else self._refill.state,
            "skipping": None if self._skipping is None else self._skipping.state,
            "table": self._table.state(),
            "last_entropy_window": self._entropy_window_stats,
            "trained_tokens": self._trained_tokens,
            "rollout": vars(self._rollout),
        }

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is None:
            return
        path = Path(checkpoint) / _state_file(self.accelerator.process_index)
        if not path.is_file():
            raise FileNotFoundError(
                f"{path.name} is missing in {checkpoint}: it was not written by CreditTrainer with the same number of "
                "processes, so the run cannot continue exactly. Start a new run from its weights (model.path)."
            )
        state = torch.load(path, map_location=self.accelerator.device, weights_only=True)
        saved, now = state["shape"], self._shape_of_run()
        for name, value in saved.items():
            if now[name] != value:
                raise ValueError(f"{name}={now[name]} but the checkpoint {checkpoint} was written with {value}")
        self._step, self._buffered_inputs = state["step"], state["buffer"]
        self._metrics["train"] = defaultdict(list, state["metrics"])
        stats = state["sampler_stats"]
        self._sampler_stats = None if stats is None else EntropyStats(*stats)
        if self._refill is not None:
            self._refill.state = state["refill"]
        if self._skipping is not None:
            self._skipping.load(state["skipping"])
        self._table.load(state["table"])
        self._entropy_window_stats = state["last_entropy_window"]
        self._trained_tokens = state["trained_tokens"]
        self._rollout = _RolloutState(**state["rollout"])


@dataclass
class _RolloutState:
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


def _only_one(name: str, args: GRPOConfig | None, given: Any) -> Any:
    """A door's setting from the constructor or from CreditConfig; both is an error."""
    section = getattr(args, name) if isinstance(args, CreditConfig) else None
    if section is not None and given is not None:
        raise ValueError(f"{name} is set both in CreditConfig and in CreditTrainer({name}=...); keep one")
    return given if section is None else section


def _row_means(values: Tensor, mask: Tensor) -> Tensor:
    """(B,) mean over each row's masked tokens; (B, 1) values are their own mean."""
    per_row = values.size(1) == 1 and mask.size(1) != 1
    return values[:, 0] if per_row else (values * mask).sum(1) / mask.sum(1).clamp(min=1)


def _state_file(rank: int) -> str:
    return f"rltok_state_{rank}.pt"


def _reward_name(function: Any) -> str:
    """The name TRL will give a reward function."""
    if isinstance(function, str):
        return function.split("/")[-1]
    if isinstance(function, torch.nn.Module):
        config = getattr(function, "config", None)
        return str(getattr(config, "_name_or_path", type(function).__name__)).split("/")[-1]
    return getattr(function, "__name__", type(function).__name__)


def _loss_settings(args: GRPOConfig) -> LossSettings:
    return LossSettings(
        loss_type=args.loss_type,
        ratio_level=args.importance_sampling_level,
        epsilon_low=args.epsilon,
        epsilon_high=args.epsilon if args.epsilon_high is None else args.epsilon_high,
        delta=args.delta,
        sapo_tau=(args.sapo_temperature_pos, args.sapo_temperature_neg),
        vespo_k=(args.vespo_k_pos, args.vespo_k_neg),
        vespo_lambda=(args.vespo_lambda_pos, args.vespo_lambda_neg),
    )


def _sequence(inputs: Mapping[str, Any]) -> tuple[Tensor, Tensor, int]:
    """Token ids, attention mask, and how many of the last positions are completion."""
    ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1)
    attention = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], dim=1)
    return ids, attention, inputs["completion_ids"].size(1)


def _multimodal(inputs: Mapping[str, Any]) -> dict[str, Any]:
    return {name: inputs[name] for name in MULTIMODAL if inputs.get(name) is not None}


def _loss_mask(inputs: Mapping[str, Any]) -> Tensor:
    mask = inputs["completion_mask"]
    return mask if "tool_mask" not in inputs else mask * inputs["tool_mask"]


def _stats_from(inputs: Mapping[str, Any]) -> EntropyStats | None:
    return EntropyStats(*(inputs[key] for key in LOSS_STATS)) if LOSS_STATS[0] in inputs else None
