"""Quantise a decoder layer by layer, each on the inputs that the already quantised layers before it produce.

    rsq   GPTQ whose Hessian counts a token by its importance in the layer, measured before the layer is touched
    gptq  all tokens count the same
    rtn   every weight is rounded by itself

In a layer the groups {q, k, v}, {o}, {up, gate}, {down} follow each other, and the inputs of a group are collected
behind the groups before it. The weights of the model become the dequantised ones (fake quantisation: it runs
anywhere); the codes and scales are in the result. Embeddings and head stay as they are.

Memory beside the model: the hidden states of the calibration set, the codes so far, one layer's copy and the Hessians
of one group. A layer is run up to six times on the calibration set: this is for frozen models or once in many updates,
not for every refresh of a rollout copy.

Limits: the model types of `rltok.quant.rotation.KNOWN_MODELS`, on one device, on one rank.

Source: arXiv 2503.01820 v1 and its official code. Rotation is a separate step (`rltok.quant.rotation.rotate_model`),
asked for by `rotation`.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from rltok.attention.probe import AttentionCall, Region, evaluating, probing
from rltok.quant import importance as scores
from rltok.quant.gptq import (
    HessianAccumulator,
    QuantizedLinearState,
    QuantSpec,
    gptq_quantize,
    round_to_nearest,
    weighted_error,
)
from rltok.quant.importance import ImportanceSpec
from rltok.quant.rotation import Rotation, RotationKind, known_decoder, rotate_model

Method = Literal["rsq", "gptq", "rtn"]
Progress = Callable[[int, int, str], None]
GROUPS = (
    ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    ("self_attn.o_proj",),
    ("mlp.up_proj", "mlp.gate_proj"),
    ("mlp.down_proj",),
)
"""linears of a layer that share their inputs, in the order in which they are quantised"""


class CalibrationBatch(NamedTuple):
    """Sequences that run together."""

    input_ids: Tensor
    """(B, T)"""
    attention_mask: Tensor
    """(B, T) 1 at valid tokens, one run of them per row"""
    credit: Tensor | None = None
    """(B, T) token credit, for ImportanceSpec(score="credit")"""


@dataclass(frozen=True)
class LinearReport:
    """How well one matrix was rounded; errors are relative: tr((W-Q) H (W-Q)^T) / tr(W H W^T)."""

    name: str
    """of the module in the model"""
    error: float | None
    """all tokens count the same; None: not measured"""
    weighted_error: float | None
    """tokens count by importance; None: not measured, or no importance"""
    dampings: int
    """how often the damping was added; 0: not by GPTQ"""


@dataclass(frozen=True)
class LayerReport:
    """How well one layer was quantised, on the inputs that it had: |layer_q(x) - layer(x)|^2 / |layer(x)|^2."""

    layer: int
    """index"""
    error: float | None
    """all valid tokens count the same; None: not measured"""
    weighted_error: float | None
    """tokens count by importance; None: not measured, or no importance"""
    share_above_middle: float | None
    """share of the tokens with importance above the middle of its range; None: no importance"""


@dataclass(frozen=True)
class QuantizedModel:
    """Codes and scales of every linear, and the errors."""

    method: Method
    spec: QuantSpec
    importance: ImportanceSpec | None
    rotation: Rotation | None
    states: dict[str, QuantizedLinearState] = field(default_factory=dict)
    """name of the linear -> codes and scales"""
    linears: list[LinearReport] = field(default_factory=list)
    layers: list[LayerReport] = field(default_factory=list)


def calibration_batches(
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    credit: Tensor | None = None,
    *,
    batch_size: int = 8,
    expansion: int = 1,
) -> list[CalibrationBatch]:
    """Cut (N, T) sequences into batches, after dataset expansion.

    Args:
        input_ids: (N, T).
        attention_mask: (N, T); None: all tokens are valid. Rows without a valid token are left out.
        credit: (N, T) or None.
        batch_size: rows per batch.
        expansion: 8 in full RSQ: every sequence also rolled by k L / 8; 1: as they are.

    Raises:
        ValueError: shapes that do not fit, or nothing to calibrate on.
    """
    mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
    for name, values in (("attention_mask", mask), ("credit", credit)):
        if values is not None and values.shape != input_ids.shape:
            raise ValueError(f"{name} has shape {tuple(values.shape)}; allowed: {tuple(input_ids.shape)}, that of ids")
    if batch_size < 1:
        raise ValueError(f"batch_size={batch_size}; allowed: >= 1")
    used = mask.bool().any(-1)
    if not bool(used.any()):
        raise ValueError("the calibration has no valid token; give at least one sequence with mask 1 somewhere")
    mask = mask[used]
    ids = scores.expand_by_rolls(input_ids[used], mask, expansion)
    gains = None if credit is None else scores.expand_by_rolls(credit[used], mask, expansion)
    mask = mask.repeat(expansion, 1)
    cuts = [slice(i, i + batch_size) for i in range(0, ids.size(0), batch_size)]
    return [CalibrationBatch(ids[cut], mask[cut], None if gains is None else gains[cut]) for cut in cuts]


def quantize_model(
    model: nn.Module,
    calibration: Sequence[CalibrationBatch] | Tensor | None,
    spec: QuantSpec,
    method: Method = "rsq",
    importance: ImportanceSpec | None = None,
    *,
    rotation: RotationKind | None = None,
    seed: int = 0,
    measure: bool = True,
    hessian_dtype: torch.dtype | None = None,
    progress: Progress | None = None,
) -> QuantizedModel:
    """Quantise the seven linears of every decoder layer, in place.

    Args:
        model: a causal language model of `rltok.quant.rotation.KNOWN_MODELS`. Its weights become the dequantised ones.
        calibration: batches, (N, T) ids of equal length, or None (only for "rtn", which then measures nothing).
        spec: bits, groups, clip search, damping.
        method: "rsq", "gptq" or "rtn".
        importance: for "rsq" what weighs tokens (None: the defaults); for the others only what errors are measured by.
        rotation: rotate the model first; None: leave it as it is. RSQ as published rotates ("hadamard").
        seed: of the rotation.
        measure: report the errors; costs a copy of one layer and a second Hessian.
        hessian_dtype: float32, float64, or None (float64 for a float64 model, else float32).
        progress: called with (linears done, linears in all, name) after each linear.

    Returns:
        Codes, scales and reports.

    Raises:
        UnknownModelError: a model that is not known; UnprobeableAttentionError: attention whose weights cannot be
        rebuilt from queries and keys; ValueError: settings that do not fit.
    """
    core = known_decoder(model)
    batches = _checked_calibration(core, calibration, method, importance)
    for name, linear in core.model.layers[0].named_modules():
        if isinstance(linear, nn.Linear):
            _check_columns(spec, name, linear)
    turned = None if rotation is None else rotate_model(core, rotation, seed)
    importance = ImportanceSpec() if method == "rsq" and importance is None else importance
    result = QuantizedModel(method, spec, importance, turned)
    with torch.no_grad(), evaluating(core):
        run = _Run(core, batches, result, measure, hessian_dtype, progress)
        for index in range(len(core.model.layers)):
            run.quantize_layer(index)
    return result


class _LeaveLayerError(Exception):
    """Leaves a layer's forward pass: what comes behind is not needed."""


class _Run:
    """The state between layers: the hidden states in front of the next one, batch by batch."""

    def __init__(
        self,
        core: PreTrainedModel,
        batches: list[CalibrationBatch],
        result: QuantizedModel,
        measure: bool,
        hessian_dtype: torch.dtype | None,
        progress: Progress | None,
    ) -> None:
        self.core = core
        self.batches = batches if measure or result.method != "rtn" else []
        self.result = result
        self.measure = measure and bool(batches)
        self.hessian_dtype = hessian_dtype
        self.progress = progress
        self.total = len(core.model.layers) * sum(len(group) for group in GROUPS)
        self.hidden: list[Tensor] = [core.model.embed_tokens(batch.input_ids) for batch in self.batches]
        self.counts = _token_counts(core, self.batches, result.importance)

    def quantize_layer(self, index: int) -> None:
        """Measure importance, quantise the groups one behind the other, and move the hidden states on."""
        layer = self.core.model.layers[index]
        r = self._importance(index)
        original = copy.deepcopy(layer) if self.measure else None
        for group in GROUPS:
            self._quantize_group(index, group, r)
        errors = _ErrorSums()
        for i, batch in enumerate(self.batches):
            output = self._forward(layer, index, i)
            if original is not None:
                errors.add(self._forward(original, index, i), output, batch.attention_mask, self._weights(r, i))
            self.hidden[i] = output
        plain, weighted = errors.relative()
        self.result.layers.append(LayerReport(index, plain, weighted if r else None, self._share(r)))

    def _quantize_group(self, index: int, names: tuple[str, ...], r: list[Tensor]) -> None:
        layer = self.core.model.layers[index]
        linears = [layer.get_submodule(name) for name in names]
        method = self.result.method
        plain, weighted = self._hessians(index, linears[0], r)
        used = weighted if method == "rsq" else plain
        stacked = torch.cat([linear.weight for linear in linears])  # rows do not see each other: one factorisation
        if method == "rtn":
            state = round_to_nearest(stacked, self.result.spec)
        else:
            assert used is not None
            state = gptq_quantize(stacked, used, self.result.spec)
        start = 0
        for name, linear in zip(names, linears, strict=True):
            part = state.rows(start, start + linear.out_features)
            start += linear.out_features
            full = f"model.layers.{index}.{name}"
            error, by_importance = (
                _relative_error(linear.weight, part, h) if self.measure else None for h in (plain, weighted)
            )
            self.result.states[full] = part
            self.result.linears.append(LinearReport(full, error, by_importance, part.dampings))
            linear.weight.data.copy_(part.dequantize())
            if self.progress is not None:
                self.progress(len(self.result.states), self.total, full)

    def _hessians(self, index: int, linear: nn.Linear, r: list[Tensor]) -> tuple[Tensor | None, Tensor | None]:
        """The Hessians without and with importance of the inputs of a linear; None where nothing asks for it."""
        if not self.batches or (self.result.method == "rtn" and not self.measure):
            return None, None
        plain = HessianAccumulator(linear.in_features, self.hessian_dtype)
        weighted = HessianAccumulator(linear.in_features, self.hessian_dtype)
        wants_plain = self.measure or self.result.method == "gptq"
        wants_weighted = bool(r) and (self.measure or self.result.method == "rsq")
        for i, batch in enumerate(self.batches):
            x = self._inputs(index, linear, i)
            if wants_plain:
                plain.add(x, None, batch.attention_mask)
            if wants_weighted:
                weighted.add(x, self._weights(r, i), batch.attention_mask)
        return plain.hessian if wants_plain else None, weighted.hessian if wants_weighted else None

    def _inputs(self, index: int, linear: nn.Linear, i: int) -> Tensor:
        """(B, T, in) what the linear is given for batch i; the layer is left there."""
        seen: list[Tensor] = []

        def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
            seen.append(args[0])
            raise _LeaveLayerError

        handle = linear.register_forward_pre_hook(hook)
        try:
            self._forward(self.core.model.layers[index], index, i)
        except _LeaveLayerError:
            pass
        finally:
            handle.remove()
        return seen[0]

    def _importance(self, index: int) -> list[Tensor]:
        """(B, T) importance of the tokens of each batch in this layer; empty without importance."""
        spec = self.result.importance
        if spec is None or not self.batches:
            return []
        return [
            spec.scale(self._scores(spec.score, index, i), batch.attention_mask) for i, batch in enumerate(self.batches)
        ]

    def _scores(self, score: scores.Score, index: int, i: int) -> Tensor:
        batch, x = self.batches[i], self.hidden[i]
        if score == "attention_concentration":
            return self._received(index, i)
        if score == "act_norm":
            return scores.act_norm(x)
        if score == "act_diff":
            return scores.act_diff(x, self._forward(self.core.model.layers[index], index, i))
        if score == "token_frequency":
            assert self.counts is not None
            return scores.token_frequency(batch.input_ids, self.counts)
        if score == "token_similarity":
            return scores.token_similarity(x, batch.attention_mask)
        if score == "first_tokens":
            return scores.first_tokens(batch.attention_mask)
        if score == "first_and_last":
            return scores.first_and_last(batch.attention_mask)
        assert batch.credit is not None
        return batch.credit.abs()

    def _received(self, index: int, i: int) -> Tensor:
        """(B, T) attention that the tokens of batch i receive in the layer."""
        region = Region.from_masks(self.batches[i].attention_mask, self.batches[i].attention_mask)
        found: list[Tensor] = []

        def collect(call: AttentionCall) -> None:
            found.append(scores.call_received(call, region))
            raise _LeaveLayerError

        try:
            with probing(self.core, [index], collect):
                self._forward(self.core.model.layers[index], index, i)
        except _LeaveLayerError:
            return found[0]
        raise ValueError(
            f"layer {index} never called transformers' attention interface; choose another importance score"
        )

    def _forward(self, layer: nn.Module, index: int, i: int) -> Tensor:
        """(B, T, d) what the layer makes of the hidden states of batch i, called as the model calls layer `index`."""
        return layer(self.hidden[i], **_layer_arguments(self.core, index, self.batches[i]))

    def _weights(self, r: list[Tensor], i: int) -> Tensor | None:
        """(B, T) weights of unit mean of batch i."""
        if not r:
            return None
        assert self.result.importance is not None
        return scores.unit_mean(r[i], self.batches[i].attention_mask, self.result.importance.power)

    def _share(self, r: list[Tensor]) -> float | None:
        spec = self.result.importance
        if not r or spec is None:
            return None
        flat = torch.cat([part[batch.attention_mask.bool()] for part, batch in zip(r, self.batches, strict=True)])
        return float(scores.share_above_middle(flat, None, spec.r_min, spec.r_max))


class _ErrorSums:
    """Squared errors and squared outputs of a layer, over all batches, without and with weights."""

    def __init__(self) -> None:
        self.sums: dict[str, Tensor] = {}

    def add(self, wanted: Tensor, found: Tensor, mask: Tensor, weights: Tensor | None) -> None:
        wanted, found = wanted.to(torch.float64), found.to(torch.float64)
        valid = mask.bool()
        error = (found - wanted).square().sum(-1).masked_fill(~valid, 0.0)
        size = wanted.square().sum(-1).masked_fill(~valid, 0.0)
        parts = {"error": error, "size": size}
        if weights is not None:
            parts |= {"weighted_error": error * weights, "weighted_size": size * weights}
        for name, values in parts.items():
            self.sums[name] = self.sums.get(name, values.new_zeros(())) + values.sum()

    def relative(self) -> tuple[float | None, float | None]:
        plain = float(self.sums["error"] / self.sums["size"]) if "size" in self.sums else None
        weighted = self.sums.get("weighted_size")
        return plain, None if weighted is None else float(self.sums["weighted_error"] / weighted)


def _layer_arguments(core: PreTrainedModel, index: int, batch: CalibrationBatch) -> dict[str, Any]:
    """The keyword arguments (mask, rotary tables, ...) with which the model calls a layer for a batch.

    They are asked of the model itself, whose other layers pass their input on for that one call: kept for all batches,
    masks would need more memory than the layer.
    """
    found: dict[str, Any] = {}

    def capture(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        found.update(kwargs)
        return hidden_states

    with _replaced_layers(core.model.layers, index, capture):
        core.model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False)
    return found


@contextmanager
def _replaced_layers(layers: nn.ModuleList, index: int, capture: Callable[..., Tensor]) -> Iterator[None]:
    def pass_on(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return hidden_states

    own = [layer.__dict__.get("forward") for layer in layers]
    try:
        for i, layer in enumerate(layers):
            layer.forward = capture if i == index else pass_on
        yield
    finally:
        for layer, forward in zip(layers, own, strict=True):
            layer.__dict__.pop("forward", None)
            if forward is not None:
                layer.forward = forward


def _checked_calibration(
    core: PreTrainedModel,
    calibration: Sequence[CalibrationBatch] | Tensor | None,
    method: str,
    importance: ImportanceSpec | None,
) -> list[CalibrationBatch]:
    if method not in get_args(Method):
        raise ValueError(f"method={method!r}; allowed: {', '.join(get_args(Method))}")
    batches = calibration_batches(calibration) if isinstance(calibration, Tensor) else list(calibration or [])
    if not batches and method != "rtn":
        raise ValueError(f"method={method!r} needs calibration sequences; give some, or use method='rtn'")
    if importance is not None and importance.score == "credit" and any(batch.credit is None for batch in batches):
        raise ValueError("importance score 'credit' needs the credit of every calibration batch; give it or set score")
    device = core.device
    placed = []
    for batch in batches:
        credit = None if batch.credit is None else batch.credit.to(device)
        placed.append(CalibrationBatch(batch.input_ids.to(device), batch.attention_mask.to(device), credit))
    return placed


def _check_columns(spec: QuantSpec, name: str, linear: nn.Linear) -> None:
    try:
        spec.columns(linear.in_features)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None


def _token_counts(
    core: PreTrainedModel, batches: list[CalibrationBatch], importance: ImportanceSpec | None
) -> Tensor | None:
    if importance is None or importance.score != "token_frequency" or not batches:
        return None
    size = core.model.embed_tokens.num_embeddings
    counted = [scores.count_tokens(batch.input_ids, batch.attention_mask, size) for batch in batches]
    return torch.stack(counted).sum(0)


def _relative_error(weight: Tensor, state: QuantizedLinearState, hessian: Tensor | None) -> float | None:
    if hessian is None:
        return None
    size = weighted_error(weight, torch.zeros_like(weight), hessian)
    return float(weighted_error(weight, state, hessian) / size) if float(size) > 0 else 0.0
