"""Attention statistics of a causal language model, read in a stream while the model runs as it is.

With A the row-stochastic map of one head, t a query of the completion (R), s <= t a key, for every probed head

    span_sum  = sum_{t in R} sum_s A_ts (t - s)                      |R| times the head's average span, tokens
    WAAD_t    = sum_s A_ts min(t - s, W)                             windowed average attention distance, in [0, W]
    fai_sum_s = sum_{t in T(s)} A_ts,  T(s) = {t in R: H_lo <= t - s <= H_hi}        |T(s)| times FAI_s

For the duration of one forward pass the attention function in use is shadowed in transformers' mapping by one that
hands queries and keys to a collector and then calls the original, so masks, kernels and logits stay as they were. The
softmax is formed again from them, in blocks of query rows of the completion only: O(block T) numbers per head, never a
(T, T) map.

Limits: only attention whose weights are softmax(scaling q k) over causal keys, with or without a sliding window, can
be rebuilt this way; everything else is refused by name. Positions are those that the model derives itself, as in
training: models with learned absolute positions see padding, models with rotary ones do not.

Source: arXiv 2510.13554 v2, Eqs. 7, 9 and 10. Left out: heads spread over ranks (tensor or sequence parallel), which
are refused; statistics from a kernel's log-sum-exp when the head groups are fixed.

Legend: B rows, T columns of prompt and completion, C columns of the completion (the last C of T), P probed layers,
Hq query heads and Hkv key-value heads per layer, M = P Hq flat heads, layer-major, D head size.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

SUPPORTED = "supported: softmax attention through transformers' AttentionInterface, causal, full or sliding-window"
PROBEABLE_LAYER_TYPES = ("full_attention", "sliding_attention", "attention")
CHUNK_ELEMENTS = {"cpu": 2**20, "cuda": 2**24}
"""Scores held at once when `head_chunk` is None: small enough for a cache, large enough to fill a device."""


class UnprobeableAttentionError(ValueError):
    """The model's attention weights cannot be rebuilt from its queries and keys."""


class AttentionStatistics(NamedTuple):
    """Per-head sums over the completion; zero outside `response_mask`."""

    span_sum: Tensor
    """(B, M) sum over R of the mean distance, tokens"""
    waad: Tensor
    """(B, M, C) windowed average attention distance, tokens, in [0, window]"""
    fai_sum: Tensor
    """(B, M, C) attention received from the queries of the horizon"""
    fai_count: Tensor
    """(B, C) |T(s)|, the number of those queries, int64"""


class AttentionCall(NamedTuple):
    """One call of an attention layer, as a collector sees it."""

    layer: int
    query: Tensor
    """(B, Hq, T, D) after norms and rotary"""
    key: Tensor
    """(B, Hkv, T, D)"""
    scaling: float
    sliding_window: int | None
    """keys with t - s >= sliding_window are invisible; None: all causal keys are visible"""
    mask: Any
    """what the kernel was given: None, (B, 1, T, T) bool or additive, (B, T), or a kernel's own object"""
    implementation: str


Collector = Callable[[AttentionCall], None]


class LayerStatistics(NamedTuple):
    """`AttentionStatistics` of one layer, without the count."""

    span_sum: Tensor
    """(B, Hq)"""
    waad: Tensor
    """(B, Hq, C)"""
    fai_sum: Tensor
    """(B, Hq, C)"""


class _LastLayerSeenError(Exception):
    """Leaves the model's body: nothing above the last probed layer is needed."""


@dataclass(frozen=True)
class Region:
    """What a batch's masks say about the completion; shared by all layers."""

    valid: Tensor
    """(B, T) bool"""
    response: Tensor
    """(B, C) bool, R"""
    padded: bool
    """some key is not valid"""
    first_key: int
    """first column that any row with a completion may attend to"""
    last_left_pad: int
    """columns before this one are padding in some row with a completion"""
    first_row: int
    """first column of R over all rows"""
    end_row: int
    """one past the last column of R; equal to `first_row` when R is empty"""

    @property
    def offset(self) -> int:
        """Column of the first completion token: T - C."""
        return self.valid.size(1) - self.response.size(1)

    @classmethod
    def from_masks(cls, attention_mask: Tensor, response_mask: Tensor) -> Region:
        """Check the two masks against each other and measure them.

        Raises:
            ValueError: shapes that do not fit, padding between valid tokens, or a completion token that is padding.
        """
        if attention_mask.dim() != 2 or response_mask.dim() != 2 or attention_mask.size(0) != response_mask.size(0):
            shapes = f"attention_mask {tuple(attention_mask.shape)}, response_mask {tuple(response_mask.shape)}"
            raise ValueError(f"{shapes}; allowed: (B, T) and (B, C) with the same B")
        rows, width, span = attention_mask.size(0), attention_mask.size(1), response_mask.size(1)
        if rows == 0 or width == 0 or span > width:
            raise ValueError(f"B={rows}, T={width}, C={span}; allowed: B >= 1, T >= 1 and C <= T")
        valid, response = attention_mask.bool(), response_mask.to(attention_mask.device).bool()
        starts = valid[:, 0].long() + (valid[:, 1:] & ~valid[:, :-1]).sum(1)
        if bool((starts > 1).any()):
            row = int((starts > 1).nonzero()[0])
            raise ValueError(
                f"attention_mask row {row} has {int(starts[row])} runs of valid tokens; allowed: one, with padding on "
                "the left and/or on the right only (distances are differences of columns)"
            )
        if bool((response & ~valid[:, width - span :]).any()):
            raise ValueError("response_mask marks a token that attention_mask calls padding; it must be a subset")
        active = response.any(1)
        if not bool(active.any()):
            return cls(valid, response, not bool(valid.all()), 0, 0, width, width)
        columns = response.any(0).nonzero()
        first_valid = valid[active].long().argmax(1)
        return cls(
            valid=valid,
            response=response,
            padded=not bool(valid.all()),
            first_key=int(first_valid.min()),
            last_left_pad=int(first_valid.max()),
            first_row=width - span + int(columns[0]),
            end_row=width - span + int(columns[-1]) + 1,
        )


def default_layers(n_layers: int) -> tuple[int, ...]:
    """Five layers evenly spaced from floor(L/3) to floor(2L/3), all of that range if it has fewer.

    Example: 36 layers give 12, 15, 18, 21, 24; 28 layers give 9, 11, 14, 16, 18.
    Source: arXiv 2510.13554 v2, Sec. 5.1; the rounding is not given there.
    """
    low, high = n_layers // 3, min(2 * n_layers // 3, n_layers - 1)
    if high - low + 1 < 5:
        return tuple(range(low, high + 1))
    return tuple(low + int((high - low) * i / 4 + 0.5) for i in range(5))


def attention_statistics(
    model: nn.Module,
    input_ids: Tensor,
    attention_mask: Tensor,
    response_mask: Tensor,
    layers: Sequence[int] | None = None,
    window: int = 10,
    horizon: tuple[int, int | None] = (10, 100),
    block: int = 64,
    *,
    stop_early: bool = True,
    head_chunk: int | None = None,
) -> AttentionStatistics:
    """Spans, WAAD and FAI of every head of the probed layers, from one pass of the model without gradient.

    The model runs in eval mode without cache; training mode, attention implementation and transformers' mapping are
    as before afterwards, also after an error. A model with eager attention runs this pass with sdpa. PEFT, DDP and
    other wrappers are called as they are.

    Args:
        model: a causal language model of transformers, or a wrapper around one.
        input_ids: (B, T) token ids.
        attention_mask: (B, T) 1 for valid tokens, which must be contiguous: padding left and/or right.
        response_mask: (B, C) over the last C columns, 1 for valid completion tokens (tool tokens included): R.
        layers: indices of the layers to probe; None: `default_layers`.
        window: W of WAAD in tokens, >= 1.
        horizon: (H_lo, H_hi) of FAI in tokens, 0 <= H_lo <= H_hi; None for H_hi: up to the end of the completion.
        block: query rows per step; memory and speed only.
        stop_early: leave the body after the last probed layer. Set False where a forward pass must be finished
            (FSDP, DeepSpeed ZeRO-3, offloading hooks).
        head_chunk: key-value heads per step; memory and speed only. None: from the size of the batch.

    Returns:
        `AttentionStatistics` in float32 (float64 for a float64 model), heads flat in the order of `layers`.

    Raises:
        UnprobeableAttentionError: soft-capping, attention sinks, position biases, bidirectional or linear attention,
            heads spread over ranks, or a layer that never calls transformers' attention interface.
        ValueError: masks, layers or settings that are not allowed, or `stop_early` under FSDP or ZeRO-3.
    """
    probed = probeable_layers(model, layers)
    low, high = _checked_horizon(window, horizon, block, head_chunk)
    if input_ids.shape != attention_mask.shape:
        raise ValueError(f"input_ids {tuple(input_ids.shape)} and attention_mask {tuple(attention_mask.shape)} differ")
    if stop_early and is_sharded(model):
        raise ValueError("stop_early=True would leave a sharded model in mid-forward; set stop_early=False")
    region = Region.from_masks(attention_mask, response_mask)
    found: dict[int, LayerStatistics] = {}
    seen_masks: list[tuple[Any, int | None]] = []

    def collect(call: AttentionCall) -> None:
        if not any(mask is call.mask and width == call.sliding_window for mask, width in seen_masks):
            check_mask(call, region, block)
            seen_masks.append((call.mask, call.sliding_window))
        found[call.layer] = layer_statistics(
            call.query, call.key, call.scaling, call.sliding_window, region, window, (low, high), block, head_chunk
        )
        if stop_early and len(found) == len(probed):
            raise _LastLayerSeenError

    run_probed(model, input_ids, attention_mask, probed, collect)
    _check_reported(model, probed, found)
    parts = [found[layer] for layer in probed]
    return AttentionStatistics(
        span_sum=torch.cat([part.span_sum for part in parts], 1),
        waad=torch.cat([part.waad for part in parts], 1),
        fai_sum=torch.cat([part.fai_sum for part in parts], 1),
        fai_count=horizon_count(region.response, low, high),
    )


def run_probed(
    model: nn.Module, input_ids: Tensor, attention_mask: Tensor, layers: Sequence[int], collect: Collector
) -> None:
    """One pass of (B, T) ids under the probe, in eval mode, without gradient or cache; a head gets one position."""
    parameters = inspect.signature(language_model(model).forward).parameters
    head = {"logits_to_keep": 1} if "logits_to_keep" in parameters else {}
    with torch.no_grad(), evaluating(model), probing(model, layers, collect, tuple(input_ids.shape)):
        try:
            model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False, **head)
        except _LastLayerSeenError:
            return


@contextmanager
def probing(
    model: nn.Module, layers: Sequence[int], collector: Collector, shape: tuple[int, ...] | None = None
) -> Iterator[None]:
    """Hand queries and keys of the given layers to `collector` during the forward passes inside the context.

    The model computes what it computes without the probe, bit for bit; only eager attention, which cannot be shadowed,
    is replaced by sdpa inside the context. The collector runs without gradient, once per layer and forward pass, and
    again when gradient checkpointing repeats a layer: it must overwrite, not add. Calls with other numbers of queries
    than keys (decoding) and calls of other models are passed on unseen.

    Args:
        model: as for `attention_statistics`.
        layers: indices of the layers to report.
        collector: called with an `AttentionCall`; what it raises leaves the forward pass.
        shape: (B, T) of the calls to report; None: any.

    Raises:
        UnprobeableAttentionError: at entry, or at the first call that shows it.
        ValueError: a layer out of range.
    """
    wanted = frozenset(probeable_layers(model, layers))
    members = frozenset(id(module) for module in model.modules())
    with interface_name(model) as name:
        original = ALL_ATTENTION_FUNCTIONS[name]

        def shadow(
            module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, *args: Any, **kwargs: Any
        ) -> Any:
            layer = getattr(module, "layer_idx", None)
            seen = (query.size(0), query.size(2))
            if layer in wanted and id(module) in members and query.size(2) == key.size(2) and shape in (None, seen):
                call = _attention_call(module, layer, query, key, attention_mask, name, kwargs)
                with torch.no_grad(), torch.autocast(query.device.type, enabled=False):
                    collector(call)
            return original(module, query, key, value, attention_mask, *args, **kwargs)

        ALL_ATTENTION_FUNCTIONS[name] = shadow
        try:
            yield
        finally:
            del ALL_ATTENTION_FUNCTIONS[name]
            if ALL_ATTENTION_FUNCTIONS[name] is not original:  # another local entry was there before
                ALL_ATTENTION_FUNCTIONS[name] = original


@contextmanager
def interface_name(model: nn.Module) -> Iterator[str]:
    """The name under which the model looks its attention up; eager attention, which has none, is sdpa in the context.

    Raises:
        UnprobeableAttentionError: eager attention of a model that has no sdpa.
    """
    core = language_model(model)
    config = text_config(core)
    name = config._attn_implementation
    if name not in (None, "eager"):
        yield name
        return
    if not core._supports_sdpa:
        raise UnprobeableAttentionError(
            f"{type(core).__name__} runs with attn_implementation={name!r} and has no sdpa to probe instead; "
            f"{SUPPORTED}"
        )
    config._attn_implementation = "sdpa"
    try:
        yield "sdpa"
    finally:
        config._attn_implementation = name


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode for the duration; every module gets its own mode back."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def language_model(model: nn.Module) -> PreTrainedModel:
    """The transformers model inside PEFT, DDP, FSDP or other wrappers.

    Raises:
        UnprobeableAttentionError: there is none.
    """
    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            return module
    raise UnprobeableAttentionError(f"{type(model).__name__} holds no transformers PreTrainedModel; {SUPPORTED}")


def text_config(core: PreTrainedModel) -> PreTrainedConfig:
    """The configuration of the decoder that generates text."""
    return core.config.get_text_config(decoder=True)


def probeable_layers(model: nn.Module, layers: Sequence[int] | None) -> tuple[int, ...]:
    """The layers to probe, after everything that the configuration and the parameters reveal was checked.

    Raises:
        UnprobeableAttentionError: attention that cannot be rebuilt from queries and keys.
        ValueError: no layer, a layer twice, or one that the model does not have.
    """
    core = language_model(model)
    config = text_config(core)
    n_layers = config.num_hidden_layers
    probed = default_layers(n_layers) if layers is None else tuple(int(layer) for layer in layers)
    if not probed or len(set(probed)) != len(probed) or min(probed) < 0 or max(probed) >= n_layers:
        raise ValueError(f"layers={probed}; allowed: distinct indices from 0 to {n_layers - 1}, at least one")
    reason = _known_obstacle(core, config, probed)
    if reason is not None:
        raise UnprobeableAttentionError(f"{type(core).__name__} has {reason}; {SUPPORTED}")
    return probed


def _known_obstacle(core: PreTrainedModel, config: PreTrainedConfig, layers: Sequence[int]) -> str | None:
    """What configuration and parameters say against probing these layers."""
    cap = getattr(config, "attn_logit_softcapping", None)
    if cap is not None:
        return f"attention soft-capping (attn_logit_softcapping={cap})"
    sinks = next((name for name, _ in core.named_parameters() if name.rsplit(".", 1)[-1] == "sinks"), None)
    if sinks is not None:
        return f"attention sinks as parameters ({sinks})"
    if config.model_type in ("bloom", "mpt") or getattr(config, "alibi", False):
        return "position biases in the attention scores (ALiBi)"
    if getattr(config, "use_bidirectional_attention", False):
        return f"bidirectional attention (use_bidirectional_attention={config.use_bidirectional_attention})"
    types = getattr(config, "layer_types", None) or getattr(config, "layers_block_type", None) or []
    for layer in layers:
        if types and types[layer] not in PROBEABLE_LAYER_TYPES:
            possible = [index for index, kind in enumerate(types) if kind in PROBEABLE_LAYER_TYPES]
            return f"layer {layer} of type {types[layer]!r}; set layers to some of {possible}"
    return None


def _attention_call(
    module: nn.Module, layer: int, query: Tensor, key: Tensor, mask: Any, name: str, kwargs: dict[str, Any]
) -> AttentionCall:
    """The call's facts, after what only the call itself reveals was checked."""
    obstacles = {"softcap": "attention soft-capping", "s_aux": "attention sinks", "position_bias": "a position bias"}
    where = f"layer {layer} ({type(module).__name__})"
    for argument, meaning in obstacles.items():
        if kwargs.get(argument) is not None:
            raise UnprobeableAttentionError(f"{where} has {meaning} ({argument}); {SUPPORTED}")
    causal = kwargs.get("is_causal")
    if not (getattr(module, "is_causal", True) if causal is None else causal):
        raise UnprobeableAttentionError(f"{where} is bidirectional (is_causal=False); {SUPPORTED}")
    n_heads = getattr(getattr(module, "config", None), "num_attention_heads", None)
    if isinstance(n_heads, int) and n_heads != query.size(1):
        raise UnprobeableAttentionError(
            f"{where} computes {query.size(1)} query heads, its configuration has {n_heads}: heads that are spread "
            "over ranks (tensor parallel) cannot be ranked here"
        )
    scaling = kwargs.get("scaling")
    width = kwargs.get("sliding_window", getattr(module, "sliding_window", None))
    if width is not None and width >= query.size(2):
        width = None
    return AttentionCall(
        layer=layer,
        query=query.detach(),
        key=key.detach(),
        scaling=query.size(-1) ** -0.5 if scaling is None else float(scaling),
        sliding_window=width,
        mask=mask,
        implementation=name,
    )


def check_mask(call: AttentionCall, region: Region, block: int) -> None:
    """Compare the mask that the kernel gets with the causal, windowed one that the statistics assume.

    Only (B, 1, T, T) masks and their absence under sdpa say what the kernel will do; other kernels take the window as
    an argument.

    Args:
        call: what an attention layer was called with.
        region: the masks of the batch; rows outside R may see anything.
        block: query rows compared at once.

    Raises:
        UnprobeableAttentionError: another pattern, or a bias.
    """
    width = call.sliding_window
    wrong = False
    if call.mask is None and call.implementation == "sdpa":
        wrong = width is not None or region.last_left_pad > 0
    elif isinstance(call.mask, Tensor) and call.mask.dim() == 4:
        found = torch.zeros((), dtype=torch.bool, device=call.mask.device)
        for start in range(region.first_row, region.end_row, block):
            stop = min(start + block, region.end_row)
            part = call.mask[:, :, start:stop]
            visible = part if part.dtype == torch.bool else part == 0
            rows = torch.arange(start, stop, device=found.device)[:, None]
            keys = torch.arange(visible.size(-1), device=found.device)
            expected = keys <= rows
            if width is not None:
                expected &= rows - keys < width
            expected = expected & region.valid[:, None, None, :]
            counted = region.response[:, None, start - region.offset : stop - region.offset, None]
            found |= ((visible != expected) & counted).any()
        wrong = bool(found)
    if wrong:
        kind = "causal" if width is None else f"causal with sliding_window={width}"
        raise UnprobeableAttentionError(
            f"layer {call.layer} attends by another pattern or bias than {kind} over valid tokens; {SUPPORTED}"
        )


def _check_reported(model: nn.Module, layers: Sequence[int], found: dict[int, LayerStatistics]) -> None:
    missing = [layer for layer in layers if layer not in found]
    if missing:
        core = language_model(model)
        raise UnprobeableAttentionError(
            f"layers {missing} of {type(core).__name__} (model_type {core.config.model_type!r}) never handed (B, T) "
            "queries and keys to transformers' attention interface: linear or recurrent layers, an interface of the "
            f"model's own, compiled code, or a split sequence; {SUPPORTED}"
        )


def is_sharded(model: nn.Module) -> bool:
    """Whether a model's parameters are spread over ranks: FSDP (1 or 2) or DeepSpeed ZeRO-3."""
    from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel

    sharded = any(isinstance(module, (FSDPModule, FullyShardedDataParallel)) for module in model.modules())
    return sharded or any(hasattr(parameter, "ds_id") for parameter in model.parameters())


def _checked_horizon(
    window: int, horizon: tuple[int, int | None], block: int, head_chunk: int | None
) -> tuple[int, int | None]:
    low, high = horizon
    if window < 1:
        raise ValueError(f"window={window}; allowed: >= 1 token")
    if low < 0 or (high is not None and high < low):
        raise ValueError(f"horizon=({low}, {high}); allowed: 0 <= H_lo <= H_hi, or None for H_hi")
    if block < 1:
        raise ValueError(f"block={block}; allowed: >= 1 query row")
    if head_chunk is not None and head_chunk < 1:
        raise ValueError(f"head_chunk={head_chunk}; allowed: >= 1 key-value head, or None")
    return low, high


def horizon_count(response: Tensor, low: int, high: int | None) -> Tensor:
    """|T(s)|: completion tokens at distance `low` to `high` after s, for s in R; 0 elsewhere.

    Args:
        response: (B, C) bool, R.
        low, high: bounds of the distance in tokens, both included; None: no upper bound.

    Returns:
        (B, C) int64.
    """
    span = response.size(1)
    before = nn.functional.pad(response.long().cumsum(1), (1, 0))  # (B, C + 1) members of R in front of a column
    columns = torch.arange(span, device=response.device)
    first = (columns + low).clamp(max=span)
    end = torch.full_like(columns, span) if high is None else (columns + high + 1).clamp(max=span)
    return (before[:, end] - before[:, first]) * response


def layer_statistics(
    query: Tensor,
    key: Tensor,
    scaling: float,
    sliding_window: int | None,
    region: Region,
    window: int,
    horizon: tuple[int, int | None],
    block: int = 64,
    head_chunk: int | None = None,
) -> LayerStatistics:
    """The statistics of one layer from its queries and keys, in blocks of rows and chunks of heads.

    Args:
        query, key: (B, Hq, T, D) and (B, Hkv, T, D), Hq a multiple of Hkv.
        scaling: factor of the scores.
        sliding_window: keys with t - s >= sliding_window are invisible; None: all causal keys are visible.
        region: the masks.
        window, horizon, block, head_chunk: as for `attention_statistics`.

    Returns:
        `LayerStatistics`; the largest tensor on the way has B x heads of the chunk x block x T elements.
    """
    rows, n_query, width, _ = query.shape
    n_key = key.size(1)
    groups = n_query // n_key
    dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
    span = region.response.size(1)
    span_sum = query.new_zeros((rows, n_query), dtype=dtype)
    waad = query.new_zeros((rows, n_query, span), dtype=dtype)
    fai_sum = query.new_zeros((rows, n_query, span), dtype=dtype)
    lines = min(block, region.end_row - region.first_row)
    chunk = min(n_key, head_chunk or heads_at_once(query.device.type, rows * groups * lines * width))
    # Reused by every block: tensors that grow from block to block would leave a trail of holes in the heap.
    size = rows * chunk * groups * lines * width
    scratch = query.new_empty(size, dtype=dtype), query.new_empty(size, dtype=dtype)
    for first in range(0, n_key, chunk):
        keys = key[:, first : first + chunk].to(dtype)
        if region.padded:  # whatever padding holds, it must not reach a sum as NaN
            keys = keys.masked_fill(~region.valid[:, None, :, None], 0.0)
        keys = keys.contiguous()
        heads = slice(first * groups, (first + keys.size(1)) * groups)
        queries = query[:, heads]
        sums = LayerStatistics(span_sum[:, heads], waad[:, heads], fai_sum[:, heads])
        for start in range(region.first_row, region.end_row, block):
            stop = min(start + block, region.end_row)
            weights, first_key = block_weights(queries, keys, scaling, sliding_window, region, start, stop, scratch)
            _add_block(sums, weights, first_key, start, stop, region, window, horizon)
    waad.clamp_(0, window)
    outside = ~region.response[:, None]
    return LayerStatistics(span_sum, waad.masked_fill_(outside, 0.0), fai_sum.masked_fill_(outside, 0.0))


def heads_at_once(device: str, elements_per_key_head: int) -> int:
    """Key-value heads whose scores `CHUNK_ELEMENTS` allows at once, at least 1; `device` is a type such as "cpu"."""
    return max(1, CHUNK_ELEMENTS.get(device, CHUNK_ELEMENTS["cuda"]) // max(1, elements_per_key_head))


def block_weights(
    query: Tensor,
    keys: Tensor,
    scaling: float,
    sliding_window: int | None,
    region: Region,
    start: int,
    stop: int,
    scratch: tuple[Tensor, Tensor],
) -> tuple[Tensor, int]:
    """Attention weights of the rows [start, stop), rebuilt from queries and keys, and the column of their first key.

    Args:
        query: (B, H, T, D) queries, H a multiple of Hkv.
        keys: (B, Hkv, T, D) in the dtype of the result, contiguous, 0 at padding.
        scaling, sliding_window: as for `layer_statistics`.
        region: the masks. Rows outside R get zero queries: their weights are finite and belong into no sum.
        start, stop: query columns, n = stop - start.
        scratch: two flat tensors of at least B H n T elements; the weights lie in the second one.

    Returns:
        (B, H, n, stop - first_key) weights, rows sum to 1, and `first_key`.
    """
    rows, n_query, _, size = query.shape
    n_key = keys.size(1)
    first_key = region.first_key
    if sliding_window is not None:
        first_key = max(first_key, start - sliding_window + 1)
    counted = region.response[:, None, start - region.offset : stop - region.offset, None]
    part = query[:, :, start:stop].to(keys.dtype).masked_fill(~counted, 0.0).mul_(scaling)
    part = part.reshape(rows * n_key, -1, size)  # (B Hkv, G n, D): the G queries of a key head need no copy of it
    shape = (rows, n_query, stop - start, stop - first_key)
    scores, weights = (flat[: math.prod(shape)].view(shape) for flat in scratch)
    product = scores.view(rows * n_key, -1, stop - first_key)
    torch.bmm(part, keys[:, :, first_key:stop].flatten(0, 1).transpose(1, 2), out=product)
    lowest = torch.finfo(scores.dtype).min
    index = torch.arange(first_key, stop, device=scores.device)
    t = index[start - first_key :, None]
    scores[..., start - first_key :].masked_fill_(index[start - first_key :] > t, lowest)
    if sliding_window is not None and stop - sliding_window > first_key:
        edge = slice(0, stop - sliding_window - first_key)
        scores[..., edge].masked_fill_(t - index[edge] >= sliding_window, lowest)
    last_pad = min(region.last_left_pad, stop)
    if last_pad > first_key:  # causality hides right padding from every row of R
        edge = slice(0, last_pad - first_key)
        padding = ~region.valid[:, first_key:last_pad]
        scores[..., edge].masked_fill_(padding[:, None, None], lowest)
    torch.softmax(scores, -1, out=weights)
    return weights, first_key


def _add_block(
    sums: LayerStatistics,
    weights: Tensor,
    first_key: int,
    start: int,
    stop: int,
    region: Region,
    window: int,
    horizon: tuple[int, int | None],
) -> None:
    """Add the rows [start, stop) to the sums; overwrites `weights`."""
    offset, width = region.offset, region.valid.size(1)
    block = slice(start - offset, stop - offset)
    counted = region.response[:, block].to(weights.dtype)  # (B, n)
    index = torch.arange(first_key, stop, device=weights.device)
    t = index[start - first_key :, None]
    # Positions count from the block's end: small numbers where local heads look keep float32 exact to 1e-6 tokens.
    back = (stop - 1 - index).to(weights.dtype)
    distance = weights @ back - (stop - 1 - t[:, 0]).to(weights.dtype)  # (B, H, n)
    sums.span_sum.add_((distance * counted[:, None]).sum(-1))

    reach = min(window, width)
    near = max(0, start - reach + 1 - first_key)
    missing = (reach - (t - index[near:])).clamp(min=0).to(weights.dtype)
    sums.waad[:, :, block] = reach - (weights[..., near:] * missing).sum(-1)

    low, high = horizon[0], width if horizon[1] is None else horizon[1]
    left, right = max(first_key, offset, start - high), stop - low
    if right > left:
        columns = slice(left - first_key, right - first_key)
        gap = t - index[columns]
        received = weights[..., columns].mul_(((gap >= low) & (gap <= high)).to(weights.dtype))
        total = torch.matmul(counted[:, None, None].expand(-1, received.size(1), -1, -1), received).squeeze(-2)
        sums.fai_sum[:, :, left - offset : right - offset].add_(total)
