"""EdgeQAT in a training loop: quantisers, teacher, and the losses around a forward pass; no trainer of TRL in it.

    objective = QATObjective.prepare(model, config, reducer=reducer)     before optimizer and wrappers
    objective.calibrate(input_ids, attention_mask)                       once; every rank its own batch
    with objective.around():                                             one forward pass of the model
        task = ...
    extra, metrics = objective.loss(predicted)
    (objective.task_weight * task + extra).backward()
    with objective.sampling(): ...                                       completions
    objective.convert()                                                  at the end

    extra = L_E + L_D + gamma tau^2 KL(teacher || student),   task_weight = 1 - gamma

Ranks: sums and counts are added over all ranks, so losses are those of the rows of all of them, however these are
shared out. What a rank returns averages to that over ranks, in value and in gradient, as data parallelism averages.

Micro-batches: L_D and the divergence are means, hence with `rows` and `tokens` of a whole optimizer step exact for it.
L_E is the log of a mean and is formed for each micro-batch by itself, then averaged: nothing knows the mean of a step
before its last micro-batch. Its form `paper` has variances of a rank's own rows, and is averaged over ranks.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rltok.attention.probe import language_model, text_config
from rltok.quant.fake import OFF, FakeQuantWeight
from rltok.quant.qat import (
    calibrate_qat,
    collecting,
    collecting_teacher,
    convert,
    high_width,
    is_converted,
    is_prepared,
    kept_weights,
    needs_calibration,
    prepare_qat,
    qat_state,
    remove_qat,
    suspended,
)
from rltok.quant.qat_config import QuantizationAwareConfig
from rltok.quant.qat_losses import (
    QueryKey,
    check_spread,
    entropy_loss,
    hidden_divergence,
    spread_sums,
    streamed_cosines,
)
from rltok.reduce import ONE_RANK, Reducer

BODY_INPUTS = ("input_ids", "attention_mask", "position_ids")
"""what the teacher is called with, as the student was"""
LOGIT_TERMS = ("final_logit_softcapping", "logits_scaling", "logit_scale", "mup_logits_scale")
"""settings of models whose logits are not just head times hidden state"""

Context = Callable[[], AbstractContextManager[Any]]


@dataclass(frozen=True)
class _Seen:
    """What one forward pass of the student left behind."""

    layers: dict[int, QueryKey]
    inputs: dict[str, Any]
    hidden: Tensor
    """(B, T, D) below the head"""


class QATObjective:
    """Quantisers of one model in training, its teacher, and what is added to its loss.

    Args:
        model: the prepared causal LM, inside all wrappers that come later.
        config: the recipe's section.
        teacher: a plain model of the same shape, frozen; needed where `config.has_teacher`.
        reducer: adds up statistics over ranks.
        autocast: context in which models compute.
    """

    def __init__(
        self,
        model: Any,
        config: QuantizationAwareConfig,
        teacher: Any = None,
        reducer: Reducer = ONE_RANK,
        autocast: Context = nullcontext,
    ) -> None:
        if config.has_teacher and teacher is None:
            raise ValueError("the distribution and the distillation loss need a teacher; use QATObjective.prepare")
        qat_state(model)
        self.model, self.config, self.teacher = model, config, teacher
        self.reducer, self.autocast = reducer, autocast
        self._seen: _Seen | None = None

    @classmethod
    def prepare(
        cls,
        model: Any,
        config: QuantizationAwareConfig,
        teacher: Any = None,
        reducer: Reducer = ONE_RANK,
        autocast: Context = nullcontext,
    ) -> QATObjective:
        """Put the quantisers into `model`, in place; copy it as teacher before, if one is needed and none given.

        A model that has the same quantisers already, from a checkpoint of another run, goes on with their steps; its
        teacher has its full-precision weights.

        Raises:
            ValueError: a converted model, one with other quantisers, or one that `prepare_qat` refuses.
        """
        if is_converted(model):
            raise ValueError(
                "the model is converted: its weights lie on a low-bit grid whose steps are gone. Start from a "
                "checkpoint of that run (checkpoint-N), which has both, or from the model before it"
            )
        if is_prepared(model) and qat_state(model).spec != config.spec:
            raise ValueError(
                f"the model was trained with other quantisers ({qat_state(model).spec}) than these ({config.spec}); "
                "set quantization_aware as it was"
            )
        if config.distills:
            _check_head(model)
        if config.has_teacher and teacher is None:
            teacher = start_copy(model)
        if not is_prepared(model):
            prepare_qat(model, config.spec, reducer)
        qat_state(model).high_only = False
        return cls(model, config, teacher, reducer, autocast)

    @property
    def task_weight(self) -> float:
        """1 - gamma, the factor of the task's own loss."""
        return 1.0 - self.config.distillation.gamma if self.config.distillation is not None else 1.0

    @property
    def needs_calibration(self) -> bool:
        """Whether steps of activations are not set yet."""
        return needs_calibration(self.model)

    def calibrate(self, input_ids: Tensor, attention_mask: Tensor) -> None:
        """Set the steps that are not set yet, from the batches of all ranks; (B, T) both. All ranks call it."""
        with self.autocast():
            calibrate_qat(self.model, input_ids=input_ids, attention_mask=attention_mask)

    @contextmanager
    def around(self) -> Iterator[None]:
        """Open it around one forward pass of the model, and close it before the backward pass."""
        if not self.config.has_loss:
            yield
            return
        self._seen = None
        hidden: list[Tensor] = []
        body = language_model(self.model).base_model
        handle = body.register_forward_hook(lambda *call: hidden.append(call[2][0]))
        try:
            with collecting(self.model) as layers:
                yield
                inputs = {name: qat_state(self.model).inputs.get(name) for name in BODY_INPUTS}
        finally:
            handle.remove()
        if len(hidden) != 1:
            raise RuntimeError(f"{len(hidden)} forward passes inside QATObjective.around; allowed: one")
        self._seen = _Seen(dict(layers), {k: v for k, v in inputs.items() if v is not None}, hidden[0])

    def loss(
        self,
        predicted: Tensor | None = None,
        tokens: Tensor | float | None = None,
        rows: Tensor | float | None = None,
        slices: float = 1.0,
    ) -> tuple[Tensor, dict[str, float]]:
        """What is added to the loss of the pass that `around` saw. All ranks call it, equally often.

        Args:
            predicted: (B, T) 1 at tokens whose prediction is trained, for the divergence; None: all valid ones but
                the first of a row.
            tokens: such tokens of one optimizer step, mean over ranks; None: those of this pass, times `slices`.
            rows: rows of one pass, mean over the passes of a step and over ranks; None: those of this pass.
            slices: micro-batches of one optimizer step.

        Returns:
            A scalar whose mean over ranks is the loss, and numbers for the log (`entropy_loss`, `distribution_loss`,
            `distillation_loss`, before `rows`, `tokens` and `slices`).

        Raises:
            ValueError: queries and keys without gradient, or a log that does not exist.
        """
        if not self.config.has_loss:
            return torch.zeros((), device=next(self.model.parameters()).device), {}
        if self._seen is None:
            raise RuntimeError("QATObjective.loss needs a forward pass inside QATObjective.around")
        seen, self._seen = self._seen, None
        student = [seen.layers[layer] for layer in sorted(seen.layers)]
        if torch.is_grad_enabled() and not student[-1].query.requires_grad:
            raise ValueError(
                "queries have no gradient inside a checkpointed layer; set gradient_checkpointing_kwargs.use_reentrant "
                "to false"
            )
        mask = _attended(seen)
        theirs, states = self._taught(seen)
        parts = (
            *self._spread(student, mask),
            *self._distance(student, theirs, mask),
            *self._divergence(seen, states, mask, predicted),
        )
        own = [value.detach().double() for value in (*parts, mask.any(1).sum(), torch.ones_like(parts[0]))]
        sums = self.reducer.sum(torch.stack(own)).unbind()
        ranks = sums[7]
        terms = {
            "entropy_loss": self._entropy_loss(parts[0], sums[0], sums[1], ranks),
            "distribution_loss": self._distribution_loss(parts[2], sums[2], sums[3], ranks),
        }
        share = 1.0 if rows is None else sums[6] / (ranks * rows)
        extra = torch.stack([loss * share / slices for loss, _ in terms.values()]).sum()
        found = {name: float(value) for name, (_, value) in terms.items() if self._wants(name)}
        if self.config.distills:
            assert self.config.distillation is not None
            count, gamma = sums[5].clamp(min=1), self.config.distillation.gamma
            extra = extra + gamma * parts[4] / (slices * count / ranks if tokens is None else tokens)
            found["distillation_loss"] = float(gamma * sums[4] / count)
        return extra.to(torch.promote_types(seen.hidden.dtype, torch.float32)), found

    def _wants(self, name: str) -> bool:
        return float(getattr(self.config, name.removesuffix("_loss"))) > 0

    def _spread(self, student: list[QueryKey], mask: Tensor) -> tuple[Tensor, Tensor]:
        """Sum and count of the entropy loss of this rank; of the form `paper` its loss, once."""
        if self.config.entropy == 0:
            return _nothing(mask)
        queries, keys = [part.query for part in student], [part.key for part in student]
        if self.config.entropy_form == "paper":
            value = entropy_loss(queries, keys, mask, self.config.entropy, "paper")
            return value, torch.ones_like(value)
        return spread_sums(queries, keys, mask)

    def _entropy_loss(self, own: Tensor, total: Tensor, count: Tensor, ranks: Tensor) -> tuple[Tensor, Tensor]:
        """A loss whose gradient averages over ranks to that of all rows, and its value for the log."""
        rate, form = self.config.entropy, self.config.entropy_form
        if rate == 0 or not bool(count):
            return own * 0.0, total * 0.0
        if form == "paper":
            return own, total / ranks
        check_spread(total)
        value = -rate * torch.log(total / count if form == "mean" else total)
        return value - rate * ranks * (own - own.detach()) / total, value

    def _distance(self, student: list[QueryKey], theirs: list[QueryKey], mask: Tensor) -> tuple[Tensor, Tensor]:
        """Sum of 1 - c over layers, heads and rows of this rank, and the number of its terms."""
        if self.config.distribution == 0:
            return _nothing(mask)
        found = streamed_cosines(student, theirs, mask)
        far = [torch.where(counts, 1 - cosine, 0.0).sum() for cosine, counts in found]
        return torch.stack(far).sum(), torch.stack([counts.expand_as(cosine).sum() for cosine, counts in found]).sum()

    def _distribution_loss(self, own: Tensor, total: Tensor, count: Tensor, ranks: Tensor) -> tuple[Tensor, Tensor]:
        """As `_entropy_loss`."""
        rate, form = self.config.distribution, self.config.distribution_form
        if rate == 0 or not bool(count):
            return own * 0.0, total * 0.0
        if form == "recommended":
            return rate * ranks * own / count, rate * total / count
        alike = count - total
        if float(alike) <= 0:
            raise ValueError(
                f"the cosines of the score maps average {float(alike / count):.4g}, whose log does not exist; set "
                f"distribution_form to 'recommended' (seen: {form!r})"
            )
        value = rate * torch.log(alike) if form == "printed" else -rate * torch.log(alike / count)
        sign = -1.0 if form == "printed" else 1.0
        return value + sign * rate * ranks * (own - own.detach()) / alike, value

    def _divergence(
        self, seen: _Seen, states: Tensor | None, mask: Tensor, predicted: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Sum over the predicted tokens of this rank, and their number; a token is predicted one place before it."""
        if states is None or self.config.distillation is None or not self.config.distills:
            return _nothing(mask)
        chosen = mask[:, 1:] & mask[:, :-1]
        if predicted is not None:
            chosen = chosen & predicted[:, 1:].bool()
        with self.autocast():
            total = hidden_divergence(
                seen.hidden[:, :-1][chosen],
                language_model(self.model).get_output_embeddings(),
                states[:, :-1][chosen],
                language_model(self.teacher).get_output_embeddings(),
                self.config.distillation.temperature,
            )
        return total, chosen.sum()

    def _taught(self, seen: _Seen) -> tuple[list[QueryKey], Tensor | None]:
        """Queries and keys of the teacher's layers, and its hidden states, on the student's input."""
        if not self.config.has_teacher:
            return [], None
        device = seen.hidden.device
        if next(self.teacher.parameters()).device != device:
            self.teacher.to(device)
        core = language_model(self.teacher)
        with ExitStack() as stack:
            stack.enter_context(torch.no_grad())
            stack.enter_context(self.autocast())
            compares = self.config.distribution > 0
            layers = stack.enter_context(collecting_teacher(core)) if compares else {}
            states = core.base_model(**seen.inputs, use_cache=False)[0]
        return [layers[layer] for layer in sorted(layers)], states

    @contextmanager
    def sampling(self) -> Iterator[None]:
        """For completions: quantised weights are formed once, and every token has the high width."""
        with kept_weights(self.model), high_width(self.model):
            yield

    @contextmanager
    def as_loaded(self) -> Iterator[None]:
        """The model before training: without quantisers, where they have no steps yet."""
        with suspended(self.model) if self.needs_calibration else self.sampling():
            yield

    def metrics(self) -> dict[str, float]:
        """`weight_step`, the mean size of the learned steps of weights; `low_share` of the last forward pass."""
        steps = [
            m.alpha.detach().abs() for m in self.model.modules() if isinstance(m, FakeQuantWeight) and m.initialised
        ]
        found = {"weight_step": float(torch.cat(steps).mean())} if steps else {}
        state = qat_state(self.model)
        if self.config.low_share > 0 and state.low:
            low = torch.stack([tokens.sum() for tokens in state.low.values()]).double().mean()
            rows = next(iter(state.low.values()))
            count = (
                rows.new_tensor(rows.numel(), dtype=torch.float64) if state.mask is None else state.mask.sum().double()
            )
            total = self.reducer.sum(torch.stack([low, count]))
            found["low_share"] = float(total[0] / total[1].clamp(min=1))
        return found

    def convert(self) -> Any:
        """Leave the final model: weights on their grid and fixed steps of activations; plain where none are quantised.

        With `convert=False` in the section the model stays as it is.
        """
        if self.config.convert and not is_converted(self.model):
            convert(self.model)
            if self.config.activation_bits == OFF:
                remove_qat(self.model)
        return self.model


def start_copy(model: Any) -> Any:
    """A frozen copy of a model in full precision, in evaluation mode, without its quantisers."""
    teacher = copy.deepcopy(model)
    if is_prepared(teacher):
        remove_qat(teacher)
    vars(teacher).pop("forward", None)  # one that a trainer has put there is bound to the model
    return teacher.requires_grad_(False).eval()


def _attended(seen: _Seen) -> Tensor:
    """(B, T) bool, valid tokens of a pass."""
    given, positions = seen.inputs.get("attention_mask"), seen.inputs.get("position_ids")
    if isinstance(given, Tensor) and given.dim() == 2:
        return given.bool()
    if given is not None:
        raise ValueError(f"attention_mask {tuple(getattr(given, 'shape', ()))}; allowed: (B, T) or none")
    if isinstance(positions, Tensor) and bool((positions.diff(dim=-1) != 1).any()):
        raise ValueError("EdgeQAT's losses compare whole rows, and these are packed; train without packing")
    return torch.ones(seen.hidden.shape[:2], dtype=torch.bool, device=seen.hidden.device)


def _nothing(mask: Tensor) -> tuple[Tensor, Tensor]:
    zero = torch.zeros((), device=mask.device)
    return zero, zero


def _check_head(model: Any) -> None:
    """Refuse models whose logits are more than a linear head of the last hidden states."""
    config = text_config(language_model(model))
    for name in LOGIT_TERMS:
        if getattr(config, name, None) not in (None, 1, 1.0):
            raise ValueError(
                f"{type(model).__name__} changes its logits by {name}={getattr(config, name)}, which the distillation "
                "loss does not know; set quantization_aware.distillation to null"
            )
