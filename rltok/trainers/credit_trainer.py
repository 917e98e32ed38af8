"""`CreditTrainer`: TRL's GRPOTrainer with doors for credit, selection, objective and rollout.

The trainer knows TRL, ranks and logging; the methods behind the doors know none of them. It overrides

    _generate                           door 3: the random numbers of a batch, and what it cost              here
    _generate_single_turn               door 3: our engine, or processors and recorder around TRL's own      here
    _calculate_rewards                  keeps the rewards of all ranks by function                           here
    _generate_and_score_completions     dynamic sampling, correction, signals, door 1, selection             here
    _prepare_inputs, training_step      micro-batches of the selected rows, in place of TRL's cut   selected_updates.py
    _prepare_inputs, training_step      micro-batches of equal cost, in place of TRL's cut             micro_batches.py
    _get_per_token_logps_and_entropies  rows packed without padding                                           packed.py
    _generate, _compute_loss, _save     fake quantisers and EdgeQAT's losses                       quantization_aware.py
    _compute_loss                       door 2, composed from `rltok.objective`                                 loss.py
    _save_checkpoint, _load_optimizer_and_scheduler, the sampler        exact resume                          resume.py
    compute_loss, _clip_grad_norm, _get_grad_norm, train                faults: NaN, lost processes          guarded.py

and with `rollout.engine: transformers` and no other door set, every parameter stays bit-identical to GRPOTrainer's.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from accelerate.utils import gather_object
from torch import Tensor
from torch.nn.functional import pad
from trl import GRPOConfig
from trl.models.utils import disable_gradient_checkpointing

from rltok.attention import AttentionSignals, attention_signals
from rltok.attention.probe import probeable_layers
from rltok.batch import TokenBatch
from rltok.complete import named_processors
from rltok.config import ConfigError, build
from rltok.correction import mismatch_quantiles, rollout_weights
from rltok.credit import CreditMethod, check_credit
from rltok.entropy import LOG_FLOOR, EntropyStats, entropy_signal, entropy_stats
from rltok.generation_files import token_traces
from rltok.objective import (
    HAPO,
    ObjectiveTerm,
)
from rltok.report import SampleConfig
from rltok.rollout import RolloutConfig
from rltok.sampling import AdaptiveTemperatureConfig, RolloutProcessor
from rltok.selection import SelectionMethod
from rltok.trainers.attention_pattern import PatternedAttention
from rltok.trainers.config import CreditConfig
from rltok.trainers.credit_table import CreditTable
from rltok.trainers.distributed import AccelerateReducer, RaggedGather, gather_rows
from rltok.trainers.door_trainer import LOSS_STATS, MULTIMODAL, TRACE, RolloutState, loss_mask, multimodal, sequence
from rltok.trainers.doors import build_doors, check_doors
from rltok.trainers.dynamic_sampling import concatenate, gather_batch, mixed_groups, select_groups
from rltok.trainers.engine_choice import engine_of
from rltok.trainers.engine_support import check_engine_support, training_engine
from rltok.trainers.engines import built_with, check_built, controlled, steered_rollout
from rltok.trainers.fast_engine import FastEngine
from rltok.trainers.guarded import GuardedTraining
from rltok.trainers.loss import ComposedLoss, loss_settings
from rltok.trainers.micro_batches import BalancedUpdates
from rltok.trainers.packed import PackedScoring
from rltok.trainers.prompt_skipping import SkippedPrompts
from rltok.trainers.prompts import RefillPrompts, local_share
from rltok.trainers.quantization_aware import QuantizationAware
from rltok.trainers.quantized_sampler import QuantizedSampler
from rltok.trainers.recording import SampleRecorder
from rltok.trainers.resume import ExactResume
from rltok.trainers.sampler_cache import SamplerCache
from rltok.trainers.selected_updates import SelectedUpdates
from rltok.trainers.selection import Selected

logger = logging.getLogger(__name__)


class CreditTrainer(
    QuantizationAware,
    PatternedAttention,
    GuardedTraining,
    ExactResume,
    BalancedUpdates,
    PackedScoring,
    SelectedUpdates,
    ComposedLoss,
):
    """GRPOTrainer with token-aware credit. Takes everything GRPOTrainer takes.

    Args:
        credit: a credit method, or a section such as `{"type": "token_group_average"}`.
        selection: a selection method, or a section such as `{"type": "d3s"}`.
        objective: an objective term, a section such as `{"type": "hapo"}`, or a list of them, applied in order.
        rollout: `RolloutConfig`, or a section with `decoding`, `correction`, `dynamic_sampling`, `prompt_skipping`.

    A door may be set here or in `CreditConfig`, not in both. All at None is GRPOTrainer with faster rollouts.

    Raises:
        ConfigError: unknown names or values, or a combination whose mathematics is wrong; before anything is loaded.

    Example:
        trainer = CreditTrainer(
            model="Qwen/Qwen2.5-0.5B-Instruct", reward_funcs=reward, train_dataset=dataset,
            args=CreditConfig(output_dir="out", steps_per_generation=8), objective={"type": "hapo"},
        )
    """

    _tag_names: ClassVar[list[str]] = ["trl", "grpo", "rltok"]

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
        with built_with(self.doors.rollout, args):
            super().__init__(model, reward_funcs, args, *positional, **kwargs)
        if args is None:
            check_doors(self.doors, self.args, self.reward_func_names, self.rollout_func is not None)
        check_engine_support(self)
        self.loss_settings = loss_settings(self.args)
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
        self._sampler_cache = None if rollout_section.kv is None else SamplerCache(rollout_section.kv)
        plain = self.rollout_func is None and engine_of(self.args, rollout_section) == "fast"
        self._fast = FastEngine(self) if plain else None
        quant = rollout_section.quant
        self._quantized_sampler = None if quant is None or self._fast is None else QuantizedSampler(self, quant)
        check_built(self)
        self._forced_ids = self._find_forced_ids()
        self._warned_of_ess = False
        self._scored: list[tuple[Tensor, Tensor | None]] | None = None
        self._postponed = False
        self._rewards_per_func: Tensor | None = None
        self._trained_tokens = self._generated_tokens = 0
        self._selector = self._build_selector()
        self._set_up_batching()
        self._selected: Selected | None = None
        self._rollout = RolloutState()
        self._table = CreditTable(self._logs, self._tokenizer.decode)
        section = getattr(self.args, "samples", None)
        samples = SampleConfig(rows=0) if section is None else build(SampleConfig, section, "samples")
        self._recorder = SampleRecorder(self, samples) if samples.rows else None
        self._phases = {"rollout": 0.0, "score": 0.0, "update": 0.0}  # seconds since the last optimizer step
        self._traces: dict[str, Tensor] = {}
        self._turns = 0

    def _check_attention(self) -> None:
        """Refuse a model whose attention the credit method cannot read, before anything is generated."""
        config = self.doors.attention
        if config is None:
            return
        name = f"credit.type={type(self.doors.credit).__name__}"
        if training_engine(self) in ("zero3", "fsdp2"):
            raise ConfigError(
                f"{name} reads attention in passes whose number differs between ranks; sharded weights (FSDP, "
                "ZeRO-3) would hang. Use launch.strategy ddp, zero1 or zero2, or another credit.type."
            )
        try:
            probeable_layers(self.model, config.layers)
        except ValueError as error:
            raise ConfigError(f"{name}: {error}") from None

    # ------------------------------------------------------------------ door 3: rollout

    def _generate(self, *args: Any, **kwargs: Any) -> Any:
        start = time.perf_counter()
        if self._fast is not None:
            self._fast.begin()
        output = super()._generate(*args, **kwargs)
        if self._fast is not None:
            self._fast.log()
        if self.model.training:
            self._phases["rollout"] += time.perf_counter() - start
            tokens = torch.tensor([float(sum(map(len, output[1])))], device=self.accelerator.device)
            self._generated_tokens += int(self._reducer.sum(tokens).item())
        return output

    def _generate_single_turn(self, prompt_ids: Any, *args: Any, **kwargs: Any) -> Any:
        rollout = self.doors.rollout
        controls = self.model.training and (rollout.records_logps or rollout.modifies_sampler)
        if not controls:
            return self._complete(prompt_ids, *args, **kwargs)
        named = named_processors(rollout.decoding, self._decoding_context(self._sampler_stats))
        processors = [processor for _, processor in named]
        with steered_rollout(self) as steered:
            output = self._complete(prompt_ids, *args, **kwargs, processors=processors, record=rollout.records_logps)
        self._turns += 1
        if self._recorder is not None:  # a later turn's columns do not line up with the completion's
            self._traces = token_traces(named) if self._turns == 1 else {}
        if steered is not None:
            for name, value in steered.metrics().items():
                self._metrics["train"][f"rollout/{name}"].append(value)
        lengths = [len(ids) for ids in output[0]]
        for processor in processors:
            for name, value in processor.metrics(lengths).items():
                self._metrics["train"][f"rollout/{name}"].append(value)
        return output

    def _complete(
        self,
        prompt_ids: Any,
        *args: Any,
        processors: Sequence[RolloutProcessor] | None = None,
        record: bool = False,
        **kwargs: Any,
    ) -> Any:
        """TRL's completions and log-probabilities, by our engine or by TRL's own; None: nothing is controlled."""
        if self._fast is not None:
            result = self._fast.complete(prompt_ids, processors or (), record)
            return result.ids, result.logps
        if processors is None:
            return super()._generate_single_turn(prompt_ids, *args, **kwargs)
        with controlled(self, processors, record) as finish:
            completion_ids, logps, *rest = super()._generate_single_turn(prompt_ids, *args, **kwargs)
        return completion_ids, finish(completion_ids, logps), *rest

    def _find_forced_ids(self) -> Tensor:
        """(F,) ids that a decoding method may put in place of a sample."""
        context = self._decoding_context()
        modules = [module for module in self.doors.rollout.decoding if module.forces and not module.is_neutral]
        ids = sorted(set().union(*(module.forced_ids(context) for module in modules)))
        return torch.tensor(ids, dtype=torch.long, device=self.accelerator.device)

    def _leave_out_forced(self, output: dict[str, Any], mode: str) -> None:
        """A token that was put there, with probability 1, is no sample: it leaves the loss mask and its count."""
        if not self._forced_ids.numel() or "sampling_per_token_logps" not in output:
            return
        mask = loss_mask(output)
        certain = output["sampling_per_token_logps"] == 0
        forced = certain & torch.isin(output["completion_ids"], self._forced_ids) & mask.bool()
        output["tool_mask"] = output.get("tool_mask", torch.ones_like(mask)) * ~forced
        output["num_items_in_batch"] = self.accelerator.gather(loss_mask(output).sum()).sum()
        count, total = self._reducer.sum(torch.stack([forced.sum(), mask.sum()]).float()).tolist()
        self._metrics[mode]["rollout/forced"].append(count / max(total, 1.0))

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

    def _score_once(self, inputs: Any, postpone: bool = False) -> dict[str, Any]:
        """TRL's generation and scoring, plus this rank's rewards by function and whatever signals are needed.

        `postpone` leaves the old policy's log-probabilities at 0 for now.
        """
        wants_scores = self._reads_scores
        self._scored, self._traces, self._turns = [] if wants_scores else None, {}, 0
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
        output |= self._token_traces(output["completion_ids"])
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

    def _token_traces(self, ids: Tensor) -> dict[str, Tensor]:
        """(B, T) of what decoding methods recorded, under names that no other input has."""
        if self._recorder is None or not self.model.training:
            return {}
        found = {name: self._traces[name] for name in ("temperature", "wave", "forced") if name in self._traces}
        if "temperature" in found:
            found["temperature"] = found["temperature"] * self.temperature
        width = ids.size(1)
        return {
            TRACE + name: pad(value[:, :width], (0, max(width - value.size(1), 0))) for name, value in found.items()
        }

    def _score_old_policy(self, output: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
        training = self.model.training
        batch_size = self.args.per_device_train_batch_size if training else self.args.per_device_eval_batch_size
        with torch.no_grad(), disable_gradient_checkpointing(self.model, self.args.gradient_checkpointing_kwargs):
            logps, entropy, *_ = self._get_per_token_logps_and_entropies(
                self.model, *sequence(output), batch_size=batch_size, compute_entropy=True, **multimodal(output)
            )
        return logps, entropy

    def _generate_and_score_completions(self, inputs: Any) -> dict[str, Any]:
        start, rollout = time.perf_counter(), self._phases["rollout"]
        output = self._scored_batch(inputs)
        if self.model.training:
            self._phases["score"] += time.perf_counter() - start - (self._phases["rollout"] - rollout)
        return output

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        """TRL's step; the seconds of its phases are logged once per optimizer step."""
        start, before = time.perf_counter(), sum(self._phases.values())
        loss = super().training_step(*args, **kwargs)
        self._phases["update"] += time.perf_counter() - start - (sum(self._phases.values()) - before)
        if self._step % self.args.gradient_accumulation_steps == 0:
            for name, seconds in self._phases.items():
                self._metrics["train"][f"time/{name}"].append(seconds)
                self._phases[name] = 0.0
        return loss

    def _scored_batch(self, inputs: Any) -> dict[str, Any]:
        """A generation batch with credit, corrected and selected."""
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
        traces = {name: output.pop(name) for name in list(output) if name.startswith(TRACE)}
        rewards_per_func = output.pop("rewards_per_func")
        scored_logps = output.pop("scored_logps", None)
        entropy = output.pop("scored_entropy", None)
        self._leave_out_forced(output, mode)
        if scored_logps is not None and self.doors.rollout.resolved_correction.mode != "off":
            self._correct(output, scored_logps, mode)
        mask = loss_mask(output)
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
        if mode == "train" and (self._recorder is not None or self.log_completions):
            output["row"] = batch.offset + torch.arange(credit.size(0), device=credit.device)
        if mode == "train" and self._recorder is not None:
            kept = None if self._selected is None else self._selected.keep
            self._recorder.begin(output | traces, batch, credit, kept, entropy, attention)
        self._log_credit(credit, shown, output["completion_ids"], mask, mode)
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
        config = self.doors.attention
        if config is None:
            return None
        if any(key in output for key in MULTIMODAL):
            raise ValueError("credit from attention does not support images; use another credit.type")
        start = time.perf_counter()
        ids, mask, _ = sequence(output)
        with self.accelerator.autocast():
            signals = attention_signals(self.model, ids, mask, output["completion_mask"], config, self._reducer)
        seconds = time.perf_counter() - start
        self._log_heads(signals, output["completion_mask"], seconds, mode)
        return signals

    def _log_heads(self, signals: AttentionSignals, mask: Tensor, seconds: float, mode: str) -> None:
        """The two head groups over the completions of all ranks: mean span, and where they lie; time of the pass."""
        rows, layers = mask.size(0), signals.layers
        some = (mask.sum(1) > 0).to(signals.span.dtype)
        per_layer = signals.span.size(1) // len(layers)
        numbers = []
        for group in (signals.local, signals.global_):
            heads = group.expand(rows, -1)
            spans = signals.span.gather(1, heads).nan_to_num().mean(1)
            shares = [(heads // per_layer == index).to(some.dtype).mean(1) for index in range(len(layers))]
            numbers += [(value * some).sum() for value in (spans, *shares)]
        *totals, count = self._reducer.sum(torch.stack([*numbers, some.sum()])).tolist()
        names = ["span", *(f"share_in_layer_{layer}" for layer in layers)]
        keys = [f"attention/{group}_{name}" for group in ("local", "global") for name in names]
        for key, total in zip(keys, totals, strict=True):
            self._metrics[mode][key].append(total / max(count, 1.0))
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
        mask = loss_mask(output)
        config = self.doors.rollout.resolved_correction
        weights = rollout_weights(logps, self._sampler_logps(output, logps), mask, config, self._reducer)
        output["importance_sampling_ratio"] = weights.weight.to(logps.dtype)
        if not torch.equal(weights.loss_mask, mask):
            output["tool_mask"] = output.get("tool_mask", torch.ones_like(mask)) * weights.loss_mask
        output["num_items_in_batch"] = self.accelerator.gather(loss_mask(output).sum()).sum()
        sampled = mask.bool()
        x = self._gather((logps - output["sampling_per_token_logps"])[sampled].detach())
        values = {name: float(value) for name, value in (weights.metrics | mismatch_quantiles(x)).items()}
        for name, value in values.items():
            self._metrics[mode][f"correction/{name}"].append(value)
        if self._sampler_cache is not None:
            for name, found in self._sampler_cache.after_rollout(self, output, values).items():
                self._metrics[mode][f"kv/{name}"].append(found)
        if values["weight_ess"] < config.min_ess and not self._warned_of_ess:
            self._warned_of_ess = True
            log = logger.warning if self.accelerator.is_main_process else logger.debug
            log(
                "The effective sample size after correction is %.3f of the sample, below rollout.correction.min_ess=%s."
                " Weaken the decoding (rollout.decoding) or lower rollout.correction.clip_max=%s. This is said once; "
                "correction/weight_ess is logged at every step.",
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
        result["num_items_in_batch"] = accelerator.gather(loss_mask(result).sum()).sum()
        self._metrics["train"]["dynamic_sampling/rounds"].append(rounds)
        self._metrics["train"]["dynamic_sampling/kept_share"].append(kept / seen)
        return result

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """TRL's training; what is recorded of the last rollout is written at the end."""
        output = super().train(*args, **kwargs)
        if self._recorder is not None:
            self._recorder.flush()
        return output

    # ------------------------------------------------------------------ logging

    def _log_credit(self, credit: Tensor, shown: Tensor, ids: Tensor, mask: Tensor, mode: str) -> None:
        """Numbers that show where the credit went, and the completions table's column of it (`shown`)."""
        values = self._gather(credit.abs()[mask.bool()])
        if values.numel():
            top = values.topk(max(1, round(0.2 * values.numel()))).values.sum()
            total = values.sum()
            self._metrics[mode]["credit/abs_mean"].append(values.mean().item())
            self._metrics[mode]["credit/nonzero_share"].append((values > 0).float().mean().item())
            self._metrics[mode]["credit/top20_share"].append((top / total).item() if total > 0 else 0.0)
        if self.log_completions:
            self._table.add(ids, shown, mask, updates_follow=mode == "train")

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
            self._metrics["train"]["generated_tokens"] = [self._generated_tokens]
            if self._selector is not None:
                self._metrics["train"]["selection/skipped_updates"] = [self._rollout.skipped_updates]
        super().log(logs, *args, **kwargs)


def _only_one(name: str, args: GRPOConfig | None, given: Any) -> Any:
    """A door's setting from the constructor or from CreditConfig; both is an error."""
    section = getattr(args, name) if isinstance(args, CreditConfig) else None
    if section is not None and given is not None:
        raise ValueError(f"{name} is set both in CreditConfig and in CreditTrainer({name}=...); keep one")
    return given if section is None else section


def _reward_name(function: Any) -> str:
    """The name TRL will give a reward function."""
    if isinstance(function, str):
        return function.split("/")[-1]
    if isinstance(function, torch.nn.Module):
        config = getattr(function, "config", None)
        return str(getattr(config, "_name_or_path", type(function).__name__)).split("/")[-1]
    return getattr(function, "__name__", type(function).__name__)
