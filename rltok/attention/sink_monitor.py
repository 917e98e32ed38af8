"""Attention sinks while a model trains: a callback that measures them every so many updates and logs them.

The metrics are those of `rltok.attention.sinks`, from one small pass of its own over rows of the last update.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback

from rltok.attention.model_sinks import SinkStatistics, all_layers, check_readable, sink_statistics
from rltok.attention.probe import language_model
from rltok.sink_config import SinkConfig

if TYPE_CHECKING:
    from transformers import Trainer, TrainerControl, TrainerState, TrainingArguments

logger = logging.getLogger(__name__)


class _Ranks:
    """The reducer of torch.distributed's default group; a single process where there is none."""

    def sum(self, local: Tensor) -> Tensor:
        """(K,) -> (K,) sums over ranks."""
        return self._reduce(local, torch.distributed.ReduceOp.SUM)

    def max(self, local: Tensor) -> Tensor:
        """(K,) -> (K,) maxima over ranks."""
        return self._reduce(local, torch.distributed.ReduceOp.MAX)

    def _reduce(self, local: Tensor, operation: Any) -> Tensor:
        if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
            return local
        result = local.clone()
        torch.distributed.all_reduce(result, operation)
        return result


TORCH_RANKS = _Ranks()


class SinkDiagnostics(TrainerCallback):
    """Logs sinks, value drains and dormant heads every so many updates, from a small pass of its own.

        attn/sink_mass/l{n}   mean over the heads of layer n
        attn/value_ratio      mean over all heads
        attn/sink_heads, attn/quiet_heads, attn/dormant_heads   heads with the mass, with the small output, with both
        attn/residual_peak    largest of the layers

    The sample is the first rows of the last update's training batch, each cut to its first tokens; packed rows are
    taken apart. The pass changes no random state and no parameter. Ranks add their sums.

    Args:
        every: updates between two measurements.
        rows: rows of the sample on a rank.
        tokens: of a row at most.
        sample: (input_ids, attention_mask) to measure in place of the training batch, such as held-out texts.
        layers: indices; None: all that can be read.

    Call `install(trainer)` in place of `trainer.add_callback`: as one of a trainer's `callbacks` it adds its numbers to
    the next log, where callbacks that come before it, as trackers do, have no chance to see them.

    Raises:
        ValueError: numbers below 1.
    """

    def __init__(
        self,
        every: int = 50,
        rows: int = 8,
        tokens: int = 512,
        *,
        sample: tuple[Tensor, Tensor] | None = None,
        layers: Sequence[int] | None = None,
    ) -> None:
        SinkConfig(every, rows, tokens)  # checks them
        self.every, self.rows, self.tokens, self.layers = every, rows, tokens, layers
        self.latest: SinkStatistics | None = None
        """of the last measurement, over all ranks"""
        self._given = sample
        self._kept: list[Tensor] = []
        self._hook: Any = None
        self._log: Callable[[dict[str, float]], None] | None = None
        self._pending: dict[str, float] = {}

    def install(self, trainer: Trainer) -> None:
        """Add to a trainer: TRL's average the numbers into their next log, others log them at once.

        Raises:
            UnprobeableAttentionError, ValueError: a model that cannot be measured; for what only the model in its place
                on the device can tell, when training begins.
        """
        averaged: Any = trainer
        model: Any = trainer.model
        all_layers(model, self.layers)
        if next(model.parameters()).device == trainer.args.device:
            check_readable(model, self.layers)

        def collect(values: dict[str, float]) -> None:
            for name, value in values.items():
                averaged._metrics["train"][name].append(value)

        self._log = collect if hasattr(trainer, "_metrics") else trainer.log
        trainer.add_callback(self)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Refuse a model whose attention cannot be read before time is spent on it."""
        check_readable(kwargs["model"], self.layers)
        if self._log is None:
            logger.warning("SinkDiagnostics: trackers will miss what it measures; call install(trainer) to add it")

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Watch the update that is measured afterwards."""
        self._stop_watching()
        if self._given is None and (state.global_step + 1) % self.every == 0:
            decoder = language_model(kwargs["model"]).get_decoder()
            self._hook = decoder.register_forward_pre_hook(self._see, with_kwargs=True)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Measure and log."""
        rows, self._kept = self._kept, []
        self._stop_watching()
        if state.global_step % self.every or state.global_step == 0:
            return
        model = kwargs["model"]
        device = next(model.parameters()).device
        ids, mask = _right_padded(rows, device) if self._given is None else self._given
        statistics = sink_statistics(model, ids.to(device), mask.to(device), self.layers)
        self.latest = statistics.reduced(TORCH_RANKS)
        metrics = sink_metrics(self.latest)
        if self._log is None:
            self._pending = metrics
        else:
            self._log(metrics)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Without `install`: add to what is being logged."""
        if logs is not None and self._pending:
            logs.update(self._pending)
            state.log_history[-1].update(self._pending)
            self._pending = {}

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Leave no hook behind."""
        self._stop_watching()

    def _stop_watching(self) -> None:
        if self._hook is not None:
            self._hook.remove()
        self._hook = None

    def _see(self, module: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> None:
        """Keep the first rows of a training pass; rollouts and old log-probabilities run without gradient."""
        missing = self.rows - len(self._kept)
        if not torch.is_grad_enabled() or missing <= 0:
            return
        given = inspect.signature(module.forward).bind_partial(*inputs, **named).arguments
        given = {**given.pop("kwargs", {}), **given}
        if isinstance(given.get("input_ids"), Tensor):
            self._kept += training_rows(given, self._padding(module))[:missing]
        self._kept = [row[: self.tokens] for row in self._kept]

    @staticmethod
    def _padding(module: nn.Module) -> int | None:
        padding: int | None = getattr(getattr(module, "config", None), "pad_token_id", None)
        return padding


def training_rows(given: Mapping[str, Any], padding: int | None) -> list[Tensor]:
    """The sequences of a forward pass without padding: rows of a mask, or what positions say was packed into a row."""
    ids = given["input_ids"].detach()
    mask, positions = given.get("attention_mask"), given.get("position_ids")
    if isinstance(mask, Tensor) and mask.dim() == 2 and mask.shape == ids.shape:
        return [row[kept] for row, kept in zip(ids, mask.bool(), strict=True)]
    if not isinstance(positions, Tensor) or positions.dim() != 2:
        return list(ids)
    rows = []
    for row, places in zip(ids, positions.expand_as(ids), strict=True):
        starts = (places == 0).nonzero()[:, 0].tolist()
        sequences = [row[first:end] for first, end in zip(starts, [*starts[1:], len(row)], strict=True)]
        rows += [sequence for sequence in sequences if padding is None or bool((sequence != padding).any())]
    return rows


def _right_padded(rows: Sequence[Tensor], device: torch.device) -> tuple[Tensor, Tensor]:
    """(B, T) ids and mask; a rank without rows measures one row of padding, which counts nowhere."""
    width = max((len(row) for row in rows), default=1)
    ids = torch.zeros(max(len(rows), 1), width, dtype=torch.long, device=device)
    mask = torch.zeros_like(ids)
    for index, row in enumerate(rows):
        ids[index, : len(row)], mask[index, : len(row)] = row, 1
    return ids, mask


def sink_metrics(statistics: SinkStatistics) -> dict[str, float]:
    """What is logged of a measurement; nothing if no row had two tokens."""
    if not float(statistics.heads.queries.sum()):
        return {}
    mass = statistics.sink_mass.mean(1).tolist()
    dormant = statistics.dormant()
    return {
        **{f"attn/sink_mass/l{layer}": value for layer, value in zip(statistics.layers, mass, strict=True)},
        "attn/value_ratio": float(statistics.value_ratio.mean()),
        "attn/sink_heads": float(dormant.sink.sum()),
        "attn/quiet_heads": float(dormant.quiet.sum()),
        "attn/dormant_heads": float(dormant.both.sum()),
        "attn/residual_peak": float(statistics.residual_peak.max()),
    }
