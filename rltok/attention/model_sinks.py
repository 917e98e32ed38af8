"""Attention sinks of a model: what its heads do with a row's first tokens, and what the loss says about it.

`sink_statistics` reads the metrics of `rltok.attention.sinks` in one pass; weights are rebuilt from queries and keys in
blocks of query rows (`rltok.attention.probe`): never a (T, T) map. `propose_sink` says how many first tokens a window
cache should keep. `loss_change` is the causal check of a dormant head: it takes the head away, or puts all its weight
on the row's first token, and tells what the loss says.

Source: arXiv 2410.13835 v2 and its code (zero-out and move-to-BOS hooks); the proposal is ours.

Legend: B rows, T columns, H query heads, D head size, L layers, F first tokens looked at.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from rltok.attention.pattern import full_attention
from rltok.attention.probe import (
    PROBEABLE_LAYER_TYPES,
    AttentionCall,
    Region,
    UnprobeableAttentionError,
    check_mask,
    evaluating,
    interface_name,
    is_sharded,
    language_model,
    probeable_layers,
    run_probed,
    text_config,
)
from rltok.attention.sinks import (
    FIRST,
    OUTPUT_RATIO,
    SINK_MASS,
    SUMS,
    Dormant,
    SinkStats,
    layer_sink_stats,
    residual_peak,
    sum_dtype,
)
from rltok.reduce import Reducer

SINK_SHARE = 0.9
"""Share of the sink's attention that the proposed first tokens hold."""
PROJECTIONS = ("o_proj", "out_proj", "dense", "c_proj", "wo")
"""Names of an attention module's output projection."""
LOGITS = 2**26
"""Logits formed at once when a loss is measured."""

Intervention = Literal["zero", "sink"]


@dataclass(frozen=True)
class SinkStatistics:
    """Sums and counts of the heads of a model; add batches with +, ranks with `reduced`."""

    layers: tuple[int, ...]
    """indices of the L layers"""
    heads: SinkStats
    """(L, H) sums"""
    peak_sum: Tensor
    """(L,) sum over rows of the residual peak"""
    peak_count: Tensor
    """(L,) rows"""
    gated: tuple[int, ...] = ()
    """layers whose output projection reads something else than what attention returned, such as a gated output; their
    output norms are those in front of that"""

    @property
    def sink_mass(self) -> Tensor:
        """(L, H)"""
        return self.heads.sink_mass

    @property
    def value_ratio(self) -> Tensor:
        """(L, H)"""
        return self.heads.value_ratio

    @property
    def output_norm(self) -> Tensor:
        """(L, H)"""
        return self.heads.output_norm

    @property
    def relative_norm(self) -> Tensor:
        """(L, H) output norm over the layer's median"""
        return self.heads.relative_norm

    @property
    def entropy(self) -> Tensor:
        """(L, H)"""
        return self.heads.entropy

    @property
    def argmax_column(self) -> Tensor:
        """(L, H) int64"""
        return self.heads.argmax_column

    @property
    def residual_peak(self) -> Tensor:
        """(L,)"""
        return self.peak_sum / self.peak_count

    def dormant(self, sink_mass: float = SINK_MASS, output_ratio: float = OUTPUT_RATIO) -> Dormant:
        """(L, H) decisions"""
        return self.heads.dormant(sink_mass, output_ratio)

    def __add__(self, other: SinkStatistics) -> SinkStatistics:
        """Sums of two batches over the same layers."""
        if self.layers != other.layers:
            raise ValueError(f"statistics of layers {self.layers} and {other.layers} cannot be added")
        return SinkStatistics(
            self.layers,
            self.heads + other.heads,
            self.peak_sum + other.peak_sum,
            self.peak_count + other.peak_count,
            tuple(sorted({*self.gated, *other.gated})),
        )

    def reduced(self, reducer: Reducer) -> SinkStatistics:
        """Sums over ranks; every rank calls this with the same layers."""
        both = reducer.sum(torch.cat([self.peak_sum, self.peak_count]).to(sum_dtype(self.peak_sum)))
        peak_sum, peak_count = both.chunk(2)
        return SinkStatistics(self.layers, self.heads.reduced(reducer), peak_sum, peak_count, self.gated)


def all_layers(model: nn.Module, layers: Sequence[int] | None) -> tuple[int, ...]:
    """The given layers, or all whose attention can be read.

    Raises:
        UnprobeableAttentionError: attention that cannot be rebuilt from queries and keys.
        ValueError: a layer that the model does not have, or twice the same.
    """
    if layers is None:
        config = text_config(language_model(model))
        types = getattr(config, "layer_types", None) or getattr(config, "layers_block_type", None) or []
        layers = [n for n in range(config.num_hidden_layers) if not types or types[n] in PROBEABLE_LAYER_TYPES]
    return probeable_layers(model, layers)


def sink_statistics(
    model: nn.Module,
    input_ids: Tensor,
    attention_mask: Tensor,
    layers: Sequence[int] | None = None,
    *,
    block: int = 64,
    first: int = FIRST,
) -> SinkStatistics:
    """Sink mass, value ratio, output norm, entropies and residual peaks of a model, from one pass without gradient.

    The model runs in eval mode without cache, on rows moved to the left, so that positions start at 0 in every row;
    its mode and transformers' mapping are as before afterwards. A model with eager attention runs this pass with sdpa,
    one with an attention pattern (`rltok.attention.pattern`) with full attention, as when it samples.

    Args:
        model: a causal language model of transformers, or a wrapper around one.
        input_ids: (B, T) token ids.
        attention_mask: (B, T) 1 for real tokens, which must be contiguous: padding left and/or right.
        layers: indices of the layers; None: all that can be read.
        block: query rows per step; memory and speed only.
        first: F, see `sink_stats`.

    Returns:
        `SinkStatistics` in float32 (float64 for a float64 model).

    Raises:
        UnprobeableAttentionError: attention that cannot be rebuilt (see `rltok.attention.probe`), or an attention
            module without a known output projection.
        ValueError: masks, layers or settings that are not allowed.
    """
    wanted = all_layers(model, layers)
    if input_ids.shape != attention_mask.shape:
        raise ValueError(f"input_ids {tuple(input_ids.shape)} and attention_mask {tuple(attention_mask.shape)} differ")
    if block < 1:
        raise ValueError(f"block={block}; allowed: >= 1 query row")
    Region.from_masks(attention_mask, attention_mask)  # refuses padding between tokens
    input_ids, attention_mask = left_aligned(input_ids, attention_mask)
    with ExitStack() as stack:
        reading = _Reading(Region.from_masks(attention_mask, attention_mask), block, first, stack)
        stack.enter_context(full_attention(model))
        # Outside of the probe, hence called by it: the probe reports a call, then the values of that call pass by.
        stack.enter_context(_attention_outputs(model, reading.values_seen))
        for index, module in _decoder_layers(model, wanted).items():
            stack.callback(module.register_forward_hook(reading.residual_hook(index)).remove)
        run_probed(model, input_ids, attention_mask, wanted, reading.call_seen)
    missing = [layer for layer in wanted if layer not in reading.heads or layer not in reading.peaks]
    if missing:
        raise UnprobeableAttentionError(
            f"layers {missing} of {type(language_model(model)).__name__} never handed (B, T) queries, keys and values "
            "to transformers' attention interface"
        )
    parts = [dataclasses.replace(reading.heads[layer], row_entropy=None) for layer in wanted]
    return SinkStatistics(
        layers=wanted,
        heads=SinkStats(**{name: torch.stack([getattr(part, name) for part in parts]) for name in SUMS}),
        peak_sum=torch.stack([reading.peaks[layer][0] for layer in wanted]),
        peak_count=torch.stack([reading.peaks[layer][1] for layer in wanted]),
        gated=tuple(sorted(reading.gated)),
    )


def check_readable(model: nn.Module, layers: Sequence[int] | None = None) -> None:
    """Read one row of two tokens, so that what cannot be read shows before time is spent on it.

    Raises:
        UnprobeableAttentionError, ValueError: as `sink_statistics`, or parameters that are spread over ranks.
    """
    if is_sharded(model):
        raise ValueError(
            "no process holds the whole weights of this model (FSDP, DeepSpeed ZeRO-3), and output norms take whole "
            "output projections; measure a saved checkpoint with `rltok sinks` instead"
        )
    ids = torch.zeros(1, 2, dtype=torch.long, device=next(model.parameters()).device)
    sink_statistics(model, ids, torch.ones_like(ids), layers)


def left_aligned(input_ids: Tensor, attention_mask: Tensor) -> tuple[Tensor, Tensor]:
    """(B, W) ids and mask of rows that begin in the first column, W tokens of the longest; 0 is behind them.

    Args:
        input_ids, attention_mask: (B, T) with one run of real tokens per row.
    """
    valid = attention_mask.bool()
    lengths = valid.sum(1, keepdim=True)
    columns = torch.arange(max(1, int(lengths.max())), device=input_ids.device)
    source = (valid.long().argmax(1, keepdim=True) + columns).clamp(max=input_ids.size(1) - 1)
    real = columns < lengths
    return input_ids.gather(1, source).masked_fill(~real, 0), real.long()


class _Reading:
    """What is gathered during one forward pass."""

    def __init__(self, region: Region, block: int, first: int, stack: ExitStack) -> None:
        self.region, self.block, self.first, self.stack = region, block, first, stack
        self.heads: dict[int, SinkStats] = {}
        self.peaks: dict[int, tuple[Tensor, Tensor]] = {}
        self.gated: set[int] = set()
        self._call: AttentionCall | None = None
        self._checked: list[tuple[Any, int | None]] = []

    def call_seen(self, call: AttentionCall) -> None:
        """Keep a call until its values pass by."""
        if not any(mask is call.mask and width == call.sliding_window for mask, width in self._checked):
            check_mask(call, self.region, self.block)
            self._checked.append((call.mask, call.sliding_window))
        self._call = call

    def values_seen(self, module: nn.Module, value: Tensor, output: Tensor) -> Tensor:
        """Work out the sums of the call at hand."""
        call, self._call = self._call, None
        if call is None:
            return output
        projection = output_projection(module)
        with torch.no_grad(), torch.autocast(value.device.type, enabled=False):
            width = call.query.size(1) * value.size(-1)
            weight = projection_weight(projection, width, value.dtype)
            self.heads[call.layer] = layer_sink_stats(call, value.detach(), weight, self.region, self.block, self.first)

        def compare(_: nn.Module, inputs: tuple[Any, ...]) -> None:
            handle.remove()
            if not torch.equal(inputs[0], output.reshape(inputs[0].shape)):
                self.gated.add(call.layer)

        handle = projection.register_forward_pre_hook(compare)
        self.stack.callback(handle.remove)
        return output

    def residual_hook(self, layer: int) -> Callable[..., None]:
        """A forward hook that measures the output of a decoder layer."""

        def hook(_: nn.Module, __: Any, output: Any) -> None:
            hidden = output[0] if isinstance(output, tuple) else output
            self.peaks[layer] = residual_peak(hidden, self.region.valid.to(hidden.device))

        return hook


def output_projection(attention: nn.Module) -> nn.Module:
    """The module that mixes the heads of an attention module back into the residual stream.

    Raises:
        UnprobeableAttentionError: none of the known names.
    """
    children = dict(attention.named_children())
    for name in PROJECTIONS:
        if name in children:
            return children[name]
    raise UnprobeableAttentionError(
        f"{type(attention).__name__} has no output projection that is known by name; has: {', '.join(children)}; "
        f"known: {', '.join(PROJECTIONS)}"
    )


def projection_weight(projection: nn.Module, width: int, dtype: torch.dtype) -> Tensor:
    """(hidden, width) weight of an output projection; of an adapter, quantised or transposed one as it acts.

    Args:
        projection: the module.
        width: H D.
        dtype: of what is put through modules that are no plain `nn.Linear` with floating weights.
    """
    weight = getattr(projection, "weight", None)
    if type(projection) is nn.Linear and weight is not None and weight.dim() == 2 and weight.size(1) == width:
        return weight.detach()
    floating = next((p for p in projection.parameters() if p.is_floating_point()), None)
    device = next(projection.parameters()).device
    unit = torch.eye(width, dtype=dtype if floating is None else floating.dtype, device=device)
    moved: Tensor = projection(unit) - projection(unit.new_zeros(1, width))  # without the bias
    return moved.detach().T


def _decoder_layers(model: nn.Module, layers: Sequence[int]) -> dict[int, nn.Module]:
    """Index -> decoder layer: of the outermost list of as many modules as the configuration has layers."""
    core = language_model(model)
    expected = text_config(core).num_hidden_layers
    lists = [(n, m) for n, m in core.named_modules() if isinstance(m, nn.ModuleList) and len(m) == expected]
    if not lists:
        raise UnprobeableAttentionError(f"{type(core).__name__} has no list of {expected} decoder layers")
    found = min(lists, key=lambda pair: pair[0].count("."))[1]
    return {layer: found[layer] for layer in layers}


@contextmanager
def _attention_outputs(model: nn.Module, act: Callable[[nn.Module, Tensor, Tensor], Tensor]) -> Iterator[None]:
    """Every attention call of the model returns `act(module, value, output)` in place of its output (B, T, H, D)."""
    members = frozenset(id(module) for module in model.modules())
    with interface_name(model) as name:
        original = ALL_ATTENTION_FUNCTIONS[name]

        def wrapper(
            module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, *args: Any, **kwargs: Any
        ) -> Any:
            output, *rest = original(module, query, key, value, attention_mask, *args, **kwargs)
            if id(module) in members:
                output = act(module, value, output)
            return (output, *rest)

        ALL_ATTENTION_FUNCTIONS[name] = wrapper
        try:
            yield
        finally:
            del ALL_ATTENTION_FUNCTIONS[name]
            if ALL_ATTENTION_FUNCTIONS[name] is not original:  # another local entry was there before
                ALL_ATTENTION_FUNCTIONS[name] = original


# How many first tokens to keep


class SinkProposal(NamedTuple):
    """First tokens that a window cache should keep."""

    sink: int | None
    """smallest number of first tokens with `share` of the excess; 0 without excess; None: no row was long enough"""
    mass: list[float]
    """mean weight of all heads on the first 1, 2, ... F tokens, from the queries behind the first F"""
    held: list[float]
    """share of the excess that the first 1, 2, ... F tokens hold"""
    queries: int
    """queries behind the first F tokens, in one layer"""


def propose_sink(statistics: SinkStatistics, share: float = SINK_SHARE) -> SinkProposal:
    """The smallest number of first tokens that holds `share` of the sink mass.

    What a column of the first F receives beyond uniform attention counts, per head and from the queries behind the
    first F tokens alone:

        excess_c = sum over heads of max(0, mean_i (A_ic - 1 / (i + 1))),  sink = min k: sum_{c<k} >= share sum_{c<F}

    Limits: F tokens that hold content which heads read count as well as sinks do; compare texts before acting on it.

    Raises:
        ValueError: `share` outside (0, 1].
    """
    if not 0 < share <= 1:
        raise ValueError(f"share={share} is not in (0, 1]")
    heads = statistics.heads
    first = heads.early_sum.size(-1)
    queries = int(heads.early_count.reshape(-1)[0])
    if queries == 0:
        return SinkProposal(None, [], [], 0)
    mean = heads.early_sum.double() / queries  # (L, H, F)
    excess = (mean - heads.early_uniform.double()[..., None, None] / queries).clamp(min=0).sum((0, 1))
    mass = mean.mean((0, 1)).cumsum(0).tolist()
    total = float(excess.sum())
    if total <= 1e-9:
        return SinkProposal(0, mass, [1.0] * first, queries)
    held = (excess.cumsum(0) / total).tolist()
    return SinkProposal(next(k for k, value in enumerate(held, 1) if value >= share - 1e-9), mass, held, queries)


# Causal check


@contextmanager
def zero_out(model: nn.Module, layer: int, head: int) -> Iterator[None]:
    """One head's weights are 0 inside the context: it writes nothing.

    Raises:
        ValueError: a head that the model does not have.
    """
    _check_head(model, layer, head)

    def act(module: nn.Module, value: Tensor, output: Tensor) -> Tensor:
        if getattr(module, "layer_idx", None) != layer:
            return output
        changed = output.clone()
        changed[:, :, head] = 0
        return changed

    with _attention_outputs(model, act):
        yield


@contextmanager
def move_to_sink(model: nn.Module, layer: int, head: int, attention_mask: Tensor) -> Iterator[None]:
    """One head's weights are all on the row's first token inside the context, for forward passes without cache.

    Args:
        model, layer, head: the head.
        attention_mask: (B, T) of the passes inside the context.

    Raises:
        ValueError: a head that the model does not have, or a pass of another shape.
    """
    _check_head(model, layer, head)
    sink = attention_mask.bool().long().argmax(1)

    def act(module: nn.Module, value: Tensor, output: Tensor) -> Tensor:
        if getattr(module, "layer_idx", None) != layer:
            return output
        seen = (value.size(0), value.size(2))
        if seen != tuple(attention_mask.shape):
            raise ValueError(f"values of (B, T)={seen} under a mask of {tuple(attention_mask.shape)}")
        changed = output.clone()
        shared = value[:, head // (output.size(2) // value.size(1))]  # (B, T, D)
        row = torch.arange(value.size(0), device=value.device)
        changed[:, :, head] = shared[row, sink.to(value.device)][:, None]
        return changed

    with _attention_outputs(model, act):
        yield


def _check_head(model: nn.Module, layer: int, head: int) -> None:
    config = text_config(language_model(model))
    if not (0 <= layer < config.num_hidden_layers and 0 <= head < config.num_attention_heads):
        raise ValueError(
            f"layer {layer}, head {head}; allowed: layers 0 to {config.num_hidden_layers - 1}, heads 0 to "
            f"{config.num_attention_heads - 1}"
        )


def next_token_loss(
    model: nn.Module, input_ids: Tensor, attention_mask: Tensor, counted: Tensor | None = None
) -> tuple[float, int]:
    """Sum over tokens of the negative log-probability, nats, and their number.

    Args:
        model, input_ids, attention_mask: as for `sink_statistics`.
        counted: (B, T) 1 for tokens that count, such as those of completions; None: all real ones. A row's first token
            never does.
    """
    rows, width = input_ids.shape
    at_once = max(1, LOGITS // (width * text_config(language_model(model)).vocab_size))
    real = attention_mask.bool()
    wanted = real[:, 1:] & real[:, :-1] & (real if counted is None else counted.bool())[:, 1:]
    total = 0.0
    with torch.no_grad(), evaluating(model), full_attention(model):
        for start in range(0, rows, at_once):
            part = slice(start, start + at_once)
            ids = input_ids[part]
            logits = model(input_ids=ids, attention_mask=attention_mask[part], use_cache=False).logits[:, :-1].float()
            loss = nn.functional.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none")
            total += float(loss.masked_fill(~wanted[part], 0.0).double().sum())
    return total, int(wanted.sum())


def loss_change(
    model: nn.Module,
    input_ids: Tensor,
    attention_mask: Tensor,
    heads: Sequence[tuple[int, int]],
    how: Intervention = "zero",
    counted: Tensor | None = None,
) -> Tensor:
    """What the loss gains when one head at a time is taken away: the causal check of a dormant head.

    Args:
        model, input_ids, attention_mask: as for `sink_statistics`.
        heads: (layer, head) pairs.
        how: "zero" for `zero_out`, "sink" for `move_to_sink`.
        counted: see `next_token_loss`.

    Returns:
        (n,) float64 changes of the mean loss, nats per token; positive: the head helped; NaN: no token counts.

    Raises:
        ValueError: another `how`, or a head that the model does not have.
    """
    if how not in ("zero", "sink"):
        raise ValueError(f"how={how!r}; allowed: 'zero', 'sink'")
    for layer, head in heads:
        _check_head(model, layer, head)
    changes = torch.zeros(len(heads), dtype=torch.float64)
    with interface_name(model):  # the same kernel with and without the head
        before, tokens = next_token_loss(model, input_ids, attention_mask, counted)
        for index, (layer, head) in enumerate(heads):
            context = (
                zero_out(model, layer, head) if how == "zero" else move_to_sink(model, layer, head, attention_mask)
            )
            with context:
                changes[index] = next_token_loss(model, input_ids, attention_mask, counted)[0] - before
    return changes / tokens
