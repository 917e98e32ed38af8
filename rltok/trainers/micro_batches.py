"""Token-balanced micro-batches of the policy update: unequal slices of one optimizer step, trimmed, in several passes.

TRL cuts a rollout into equal counts of rows, all padded to the longest prompt and completion of the rollout. With
`batching.balance` the rows of an optimizer step (of one rollout's part of it, where a step spans several) stay together
but are grouped by length (`rltok.batching.plan_micro_batches`), and every group loses the padding that none of its rows
needs. With `batching.max_tokens` there may be more groups than accumulation slices; a slice then runs several passes,
in equal number on every rank, and gradients are exchanged in the last pass of the last slice only.

The gradient of an optimizer step stays TRL's: means over completions divide by the rows of an average slice, token
means (`bnpo`, the entropy bonus) by the tokens of one, so that slices of a step add up to the mean over all its rows,
which is TRL's with one slice. Numbers in the log are means over the optimizer step, reduced once.

The load-balancing loss of a mixture of experts is a product of means of one forward pass; it is averaged over passes by
their tokens, and so depends a little on the grouping, as it does on TRL's batch size.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from accelerate.utils import DistributedType
from torch import Tensor
from transformers import Trainer
from transformers.integrations import is_fsdp_managed_module
from trl import GRPOConfig

from rltok.batching import BatchingConfig, plan_micro_batches
from rltok.config import ConfigError, build
from rltok.fast.serve import MOVING_ROPE, rope_types
from rltok.objective import HAPO, ClipCov, KLCov
from rltok.trainers.door_trainer import MULTIMODAL, loss_mask
from rltok.trainers.doors import Doors
from rltok.trainers.dynamic_sampling import LEFT_PADDED
from rltok.trainers.loss import PASS_ROWS, PASS_SHARE, PASS_TOKENS, ComposedLoss, WindowSums
from rltok.trainers.packed import check_packable

Pass = dict[str, Any]
"""inputs of one forward pass: tensors of its rows, and 0-d ones"""


class BalancedUpdates(ComposedLoss):
    """`_prepare_inputs` and `training_step` for `batching.balance`; without it both are those of the classes behind."""

    _at_hand: Pass | None = None
    """the pass that transformers' training step is about to run"""

    def _set_up_batching(self) -> None:
        """Read `CreditConfig.batching` and refuse what it does not go with.

        Raises:
            ConfigError: names the settings.
        """
        section: Mapping[str, Any] = getattr(self.args, "batching", None) or {}
        self._batching = build(BatchingConfig, section, "batching")
        check_batching(self._batching, self.doors, self.args)
        if self._batching.balance and not self._batching.pack:
            _check_trimmable(self._causal_lm)
        if self._batching.pack:
            check_packable(self._causal_lm, self.aux_loss_enabled)

    def _prepare_inputs(self, generation_batch: Any) -> Any:
        if self._at_hand is not None:
            return self._at_hand
        before = self._buffered_inputs
        inputs = super()._prepare_inputs(generation_batch)
        if not self.model.training:
            return inputs
        if not self._batching.balance:
            if isinstance(inputs, list):
                raise ValueError(
                    "batching.balance=false, but the checkpoint's rollout was cut with batching.balance=true. Continue "
                    "the run with the recipe it was started with."
                )
            return inputs
        if self._buffered_inputs is not before:
            assert self._buffered_inputs is not None
            self._buffered_inputs = self._balanced(self._buffered_inputs)
            inputs = self._buffered_inputs[self._step % self.args.steps_per_generation]
        return inputs

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        """TRL's step over the passes of one slice."""
        if not self._batching.balance:
            return super().training_step(model, inputs, num_items_in_batch)
        start = time.perf_counter()
        model.train()
        if callable(getattr(self.optimizer, "train", None)):
            self.optimizer.train()
        slice_ = self._prepare_inputs(inputs)
        passes = slice_ if isinstance(slice_, list) else [slice_]  # TRL's cut, from a checkpoint without `balance`
        if self._window is None:
            self._window = WindowSums()
        early = torch.zeros((), device=self.accelerator.device)
        try:
            with self._gradients_kept_local(model):
                for one in passes[:-1]:
                    self._at_hand = one
                    early = early + Trainer.training_step(self, model, inputs, num_items_in_batch)
            self._at_hand = passes[-1]
            self._current_train_step_time += time.perf_counter() - start
            loss = super().training_step(model, inputs, num_items_in_batch)
        finally:
            self._at_hand = None
        if self.accelerator.sync_gradients:
            window, self._window = self._window, None
            self._report_window(window)
        return loss + early if len(passes) > 1 else loss

    @contextmanager
    def _gradients_kept_local(self, model: Any) -> Iterator[None]:
        """While open, a backward pass neither exchanges gradients nor lets DeepSpeed step, also in a last slice."""
        accelerator = self.accelerator
        if not accelerator.sync_gradients:  # the loop has taken care of the other slices
            yield
            return
        state = accelerator.gradient_state
        context: Any = partial(accelerator.no_sync, model=model)
        each = state.plugin_kwargs.get("sync_each_batch", False)
        if each or accelerator.distributed_type == DistributedType.DEEPSPEED:  # its engine goes by sync_gradients
            context = nullcontext
        elif getattr(self, "is_distributed_loading_by_transformers", False) and is_fsdp_managed_module(self.model):
            context = self._defer_fsdp_gradient_reduction
        state._set_sync_gradients(False)
        try:
            with context():
                yield
        finally:
            state._set_sync_gradients(True)

    def _balanced(self, slices: Sequence[Mapping[str, Any]]) -> list[list[Pass]]:
        """TRL's equal slices of a rollout -> the passes of each slice, rows of an optimizer step still together."""
        if any(slices[0].get(key) is not None for key in MULTIMODAL):
            raise ValueError("batching.balance does not support images, whose rows it cannot regroup; set it to false")
        rows = {name: _joined([part[name] for part in slices]) for name in slices[0]}
        size = slices[0]["prompt_ids"].size(0)
        in_part = min(len(slices), self.args.gradient_accumulation_steps)
        widths = _Widths(rows, self._batching.multiple_of, exact=self._batching.pack)
        parts = [range(first * size, (first + in_part) * size) for first in range(0, len(slices), in_part)]
        plans = [self._plan(widths, part, in_part) for part in parts]
        if self._batching.max_tokens is not None:  # ranks run the same number of passes
            counts = torch.tensor([len(plan) for plan in plans], device=self.accelerator.device)
            most = self._reducer.max(counts).tolist()
            plans = [
                plan if len(plan) == count else self._plan(widths, part, count)
                for plan, part, count in zip(plans, parts, most, strict=True)
            ]
        balanced: list[list[Pass]] = []
        for plan, part in zip(plans, parts, strict=True):
            passes = [widths.cut(rows, group) for group in plan]
            self._add_divisors(passes, {name: _rows_of(value, part) for name, value in rows.items()}, size, in_part)
            balanced += [passes[len(plan) * k // in_part : len(plan) * (k + 1) // in_part] for k in range(in_part)]
        return balanced

    def _plan(self, widths: _Widths, part: range, count: int) -> list[list[int]]:
        """Groups of rows of `part`, `count` or more."""
        lengths, heads = widths.lengths[part.start : part.stop], widths.prompts[part.start : part.stop]
        budget, pack = self._batching.max_tokens, self._batching.pack
        if budget is not None and pack:  # the width of a packed row is rounded up, not the lengths in it
            budget -= budget % self._batching.multiple_of
        groups = plan_micro_batches(lengths, count, budget, heads=heads, padded=not pack)
        return [[part.start + i for i in group] for group in groups]

    @staticmethod
    def _add_divisors(passes: list[Pass], rows: Mapping[str, Any], size: int, in_part: int) -> None:
        """What the losses of the passes are divided by; float64 on the CPU, where any device can read it."""

        def number(value: float) -> Tensor:
            return torch.tensor(value, dtype=torch.float64)

        def attended(inputs: Mapping[str, Any]) -> float:
            return float(inputs["prompt_mask"].sum() + inputs["completion_mask"].sum())

        shared = {
            PASS_ROWS: number(float(size)),
            PASS_TOKENS: number(max(float(loss_mask(rows).sum()), 1.0) / in_part),
        }
        every = max(attended(rows), 1.0)
        for one in passes:
            one |= shared | {PASS_SHARE: number(attended(one) / every * in_part)}


class _Widths:
    """How much of every row's columns is needed, rounded up."""

    def __init__(self, rows: Mapping[str, Any], multiple: int, exact: bool = False) -> None:
        """`exact`: lengths count tokens, not columns; for rows that lose all their padding."""
        prompt, completion = rows["prompt_mask"], rows["completion_mask"]
        # a width of 1 is read as one number per row elsewhere
        least = min(2, completion.size(1))
        self.prompts = [_rounded(n, multiple, prompt.size(1)) for n in _last(prompt.flip(1))]
        self.completions = [_rounded(max(n, least), multiple, completion.size(1)) for n in _last(completion)]
        self.lengths = [p + c for p, c in zip(self.prompts, self.completions, strict=True)]
        if exact:
            self.lengths = (prompt.sum(1) + completion.sum(1)).tolist()
            self.prompts = [min(p, n) for p, n in zip(self.prompts, self.lengths, strict=True)]
        self._columns = self.prompts, self.completions, completion.size(1)

    def cut(self, rows: Mapping[str, Any], group: Sequence[int]) -> Pass:
        """Rows `group` without the padding that none of them needs."""
        prompts, completions, width = self._columns
        prompt, completion = max(prompts[i] for i in group), max(completions[i] for i in group)

        def cut(name: str, value: Any) -> Any:
            if not isinstance(value, Tensor) or value.dim() == 0:
                return value
            taken = value[torch.tensor(group, device=value.device)]
            if name in LEFT_PADDED:
                return taken[:, taken.size(1) - prompt :].contiguous()
            return taken[:, :completion].contiguous() if taken.dim() > 1 and taken.size(1) == width else taken

        return {name: cut(name, value) for name, value in rows.items()}


def _last(mask: Tensor) -> list[int]:
    """(B, T) mask -> columns of each row up to the last 1."""
    return (mask.bool() * torch.arange(1, mask.size(1) + 1, device=mask.device)).amax(1).tolist()


def _rounded(columns: int, multiple: int, most: int) -> int:
    return min(most, -(-max(columns, 1) // multiple) * multiple)


def _joined(values: Sequence[Any]) -> Any:
    """Rows of all slices; what is not rows is the same in each."""
    return torch.cat(list(values)) if isinstance(values[0], Tensor) and values[0].dim() > 0 else values[0]


def _rows_of(value: Any, part: range) -> Any:
    return value[part.start : part.stop] if isinstance(value, Tensor) and value.dim() > 0 else value


def check_batching(config: BatchingConfig, doors: Doors, args: GRPOConfig) -> None:
    """Refuse settings that unequal or packed micro-batches would change the meaning of.

    Raises:
        ConfigError: names both settings and what to change.
    """
    for name in ("balance", "pack"):
        if getattr(config, name) and doors.selection is not None:
            raise ConfigError(
                f"batching.{name}=true with selection.type={type(doors.selection).__name__}: a selection packs its "
                f"rows itself, by length and trimmed. Set batching.{name}=false, or remove the section selection.",
                f"batching.{name}",
            )
    if not config.balance:
        return
    steps, accumulation = args.steps_per_generation or 1, args.gradient_accumulation_steps
    if steps % accumulation and accumulation % steps:
        raise ConfigError(
            f"batching.balance=true regroups the rows of whole optimizer steps or whole rollouts, but "
            f"training.steps_per_generation={steps} is neither a multiple nor a divisor of "
            f"training.gradient_accumulation_steps={accumulation}. Make it one.",
            "batching.balance",
        )
    of_one_pass = {
        f"training.top_entropy_quantile={args.top_entropy_quantile}": args.top_entropy_quantile < 1,
    }
    for term in doors.objective:
        if isinstance(term, HAPO):
            of_one_pass["objective.statistics='micro_batch'"] = (
                term.statistics == "micro_batch" and term.alpha + term.beta > 0
            )
        elif isinstance(term, ClipCov | KLCov):
            of_one_pass[f"objective.type={type(term).__name__}"] = isinstance(term, KLCov) or term.ratio > 0
    for setting, is_so in of_one_pass.items():
        if is_so:
            raise ConfigError(
                f"batching.balance=true with {setting}, which ranks the tokens of one micro-batch: among rows of "
                "similar length other tokens would be chosen. Set batching.balance=false, or change it.",
                "batching.balance",
            )


def _check_trimmable(model: Any) -> None:
    """Refuse models for which columns of padding change the positions of tokens, or their frequencies.

    Raises:
        ConfigError: names the reason.
    """
    config = model.config.get_text_config()
    table = learned_positions(model)
    instead = "Set batching.pack=true, which gives positions from 0, or batching.balance=false."
    if table is not None:
        raise ConfigError(
            f"batching.balance=true trims padding, but {config.model_type!r} has a learned table of positions "
            f"({table}) in which TRL counts the padding at the left: trimmed rows would move. {instead}",
            "batching.balance",
        )
    moving = sorted(rope_types(config) & MOVING_ROPE)
    if moving:
        raise ConfigError(
            f"batching.balance=true changes the widths of passes, and {config.model_type!r} has {moving} rotary "
            "positions, whose frequencies change with the longest row. Set batching.balance=false.",
            "batching.balance",
        )


def learned_positions(model: Any) -> str | None:
    """Name of a model's embedding by absolute position, None if it has none.

    It is an embedding beside that of the tokens with a row for every position the config allows (OPT keeps two more).
    """
    config = model.config.get_text_config()
    most = {getattr(config, name, None) for name in ("max_position_embeddings", "n_positions", "max_seq_len", "n_ctx")}
    sizes = {size + extra for size in most if isinstance(size, int) for extra in (0, 1, 2)}
    tokens = model.get_input_embeddings()
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Embedding) and module is not tokens and module.num_embeddings in sizes:
            return str(name)
    return None
