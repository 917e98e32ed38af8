"""The engine `fast` under TRL: the random numbers of every row, one call of the loop, its progress and what it cost.

A completion's key is `row_key(seed, rollout, prompt, i)`: the run's seed, the number of generation batches before this
one, a hash of the prompt's tokens, and i = 0, 1, ... counting the rows of that prompt over all ranks, in their order.
No process, batch size or order of prompts enters. After a tool call a row goes on with its key and the turn's number.
Evaluations have keys of their own, so that a run that evaluates samples what one that does not would sample.
"""

from __future__ import annotations

import hashlib
from array import array
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import gather_object
from tqdm.auto import tqdm
from trl.extras.profiling import profiling_context
from trl.models.utils import unwrap_model_for_generation

from rltok.config import ConfigError
from rltok.fast import LoopMetrics, LoopProgress, LoopResult, LoopSettings, generate_rows, row_key, servable_model
from rltok.kv import policy_cache
from rltok.rollout import FastConfig
from rltok.sampling import RolloutProcessor

if TYPE_CHECKING:
    from rltok.trainers.door_trainer import DoorTrainer

INSTEAD = "Set rollout.engine=transformers."
BAR_AFTER = 10.0
"""Seconds of a rollout after which a progress bar appears, where no callback shows one."""


@dataclass
class _Row:
    """A completion of the generation batch at hand."""

    key: int
    history: list[int]
    """tokens of the prompt and of what followed so far"""


class FastEngine:
    """Makes a trainer's completions; what it remembers is the number of rollouts.

    Args:
        trainer: set up, but for its model's wrappers.
    """

    def __init__(self, trainer: DoorTrainer) -> None:
        self.trainer = trainer
        self.rollouts = 0
        """generation batches of training so far; a checkpoint keeps it"""
        self._evaluations = (-1, 0)  # optimizer step, batches evaluated there
        self._source = (0, 0)  # seed and step of the keys of the batch at hand
        self._rows: list[_Row] = []
        self._turn = 0
        self._costs: list[LoopMetrics] = []

    def begin(self) -> None:
        """Before a generation batch."""
        trainer = self.trainer
        if trainer.model.training:
            self._source = (trainer.args.seed, self.rollouts)
            self.rollouts += 1
        else:
            step, batch = trainer.state.global_step, 0
            if self._evaluations[0] == step:
                batch = self._evaluations[1] + 1
            self._evaluations = (step, batch)
            self._source = (row_key(trainer.args.seed, step, "evaluation", 0), batch)
        self._rows, self._turn, self._costs = [], 0, []

    def complete(
        self, prompts: Sequence[Sequence[int]], processors: Sequence[RolloutProcessor], record: bool
    ) -> LoopResult:
        """One completion of every prompt of this rank, or the next turn of those that called a tool."""
        trainer = self.trainer
        rows = self._first_rows(prompts) if self._turn == 0 else self._same_rows(prompts)
        policy = trainer._kv_policy
        keys = [row.key if self._turn == 0 else row_key(row.key, self._turn, "turn", 0) for row in rows]
        with (
            profiling_context(trainer, "fast.generate_rows"),
            unwrap_model_for_generation(
                trainer.model_wrapped,
                trainer.accelerator,
                gather_deepspeed3_params=trainer.args.ds3_gather_for_generation,
                gradient_checkpointing_kwargs=trainer.args.gradient_checkpointing_kwargs,
            ) as model,
            self._sampler(model) as sampler,
            self._progress(len(prompts)) as on_progress,
            policy_cache(sampler, policy) as cache,
        ):
            result = generate_rows(
                sampler,
                prompts,
                keys,
                loop_settings(trainer.generation_kwargs, trainer.doors.rollout.fast),
                processors,
                record,
                tokenizer=trainer._tokenizer,
                on_progress=on_progress,
                cache=cache,
            )
        for row, prompt, ids in zip(rows, prompts, result.ids, strict=True):
            row.history = [*prompt, *ids]
        self._turn += 1
        self._costs.append(result.metrics)
        return result

    def log(self) -> None:
        """After a generation batch: what it cost on all ranks, into the trainer's metrics."""
        if not self._costs:  # completions came from somewhere else
            return
        trainer = self.trainer
        totals = torch.tensor(_totals(self._costs), device=trainer.accelerator.device)
        tokens, live, computed, prefilled, saved = trainer._reducer.sum(totals[:5]).tolist()
        seconds, peak = trainer._reducer.max(totals[5:]).tolist()
        kept = trainer._metrics["train" if trainer.model.training else "eval"]
        for name, value in {
            "tokens_per_second": tokens / seconds,
            "live_share": live / computed if computed else 1.0,
            "prefill_tokens": prefilled,
            "prefill_tokens_saved": saved,
            "peak_cache_bytes": peak,
        }.items():
            kept[f"rollout/{name}"].append(value)

    def _first_rows(self, prompts: Sequence[Sequence[int]]) -> list[_Row]:
        own = [prompt_id(prompt) for prompt in prompts]
        ranks = gather_object([own])
        seen = Counter(name for earlier in ranks[: self.trainer.accelerator.process_index] for name in earlier)
        for name, prompt in zip(own, prompts, strict=True):
            self._rows.append(_Row(row_key(*self._source, name, seen[name]), list(prompt)))
            seen[name] += 1
        return list(self._rows)

    def _same_rows(self, prompts: Sequence[Sequence[int]]) -> list[_Row]:
        """The rows that prompts continue: some of all, in their order."""
        found: list[_Row] = []
        rows = iter(self._rows)
        for prompt in prompts:
            row = next((row for row in rows if list(prompt[: len(row.history)]) == row.history), None)
            if row is None:
                raise RuntimeError(
                    "a later turn does not begin with the tokens of an earlier one, so its row is unknown. " + INSTEAD
                )
            found.append(row)
        return found

    def _sampler(self, policy: Any) -> AbstractContextManager[Any]:
        """The model that samples: the policy, or its quantised copy."""
        copy = self.trainer._quantized_sampler
        if copy is None or not copy.samples(self.trainer.model.training):
            return nullcontext(policy)
        return copy.sampling(self.trainer)

    @contextmanager
    def _progress(self, rows: int) -> Iterator[Callable[[LoopProgress], None]]:
        """What shows the progress: callbacks with `on_rollout`, else a bar that appears when a rollout takes long."""
        trainer = self.trainer
        displays = [c for c in trainer.callback_handler.callbacks if hasattr(c, "on_rollout")]
        if displays:

            def tell(progress: LoopProgress) -> None:
                for display in displays:
                    display.on_rollout(progress)

            yield tell
            return
        hidden = trainer.args.disable_tqdm or not trainer.is_world_process_zero()
        with tqdm(total=rows, desc="rollout", unit="row", delay=BAR_AFTER, leave=False, disable=hidden) as bar:

            def show(progress: LoopProgress) -> None:
                bar.set_postfix_str(f"{progress.tokens} tokens", refresh=False)
                bar.update(progress.ended - bar.n)

            yield show


def _totals(costs: Sequence[LoopMetrics]) -> list[float]:
    """Tokens, live rows, computed rows, prompt tokens computed and saved; seconds and peak bytes, of several calls."""
    return [
        sum(cost.tokens for cost in costs),
        sum(cost.live_rows for cost in costs),
        sum(cost.computed_rows for cost in costs),
        sum(cost.prefill_tokens for cost in costs),
        sum(cost.prefill_tokens_saved for cost in costs),
        sum(cost.seconds for cost in costs),
        max(cost.peak_cache_bytes for cost in costs),
    ]


def prompt_id(ids: Sequence[int]) -> int:
    """A signed 64-bit number that stands for a prompt's tokens, the same on every machine."""
    digest = hashlib.blake2b(array("q", ids).tobytes(), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)


def loop_settings(generation: Mapping[str, Any], limits: FastConfig) -> LoopSettings:
    """TRL's generation arguments, those of `training.generation_kwargs` included, as the loop reads them."""
    ends = generation["eos_token_id"]
    stops = generation.get("stop_strings") or ()
    return LoopSettings(
        max_new_tokens=generation["max_new_tokens"],
        end_ids=(ends,) if isinstance(ends, int) else tuple(ends or ()),
        min_new_tokens=generation.get("min_new_tokens") or 0,
        temperature=generation["temperature"] if generation["do_sample"] else 0.0,
        top_k=generation["top_k"] or 0,
        top_p=1.0 if generation["top_p"] is None else generation["top_p"],
        min_p=generation["min_p"] or 0.0,
        stop_strings=(stops,) if isinstance(stops, str) else tuple(stops),
        repetition_penalty=generation["repetition_penalty"] or 1.0,
        **vars(limits),
    )


def check_servable(trainer: DoorTrainer) -> None:
    """Refuse a model, a wrapper or settings of the loop that the engine `fast` does not serve.

    Raises:
        ConfigError: names the reason, and `rollout.engine=transformers`.
    """
    if trainer._is_vlm:
        raise ConfigError(f"rollout.engine=fast completes text alone, but the model takes images. {INSTEAD}")
    if trainer.is_fsdp_enabled or (trainer.is_deepspeed_enabled and not trainer.args.ds3_gather_for_generation):
        raise ConfigError(
            "rollout.engine=fast runs another number of forward passes on every rank, which waits forever where each "
            "pass gathers parameters (FSDP, or ZeRO-3 with training.ds3_gather_for_generation=false). " + INSTEAD
        )
    try:
        servable_model(trainer.accelerator.unwrap_model(trainer.model))
        loop_settings(trainer.generation_kwargs, trainer.doors.rollout.fast)
    except ValueError as error:
        raise ConfigError(f"rollout.engine=fast: {error} ({INSTEAD})") from None
