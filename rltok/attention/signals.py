"""WAAD and FAI of a batch: the attention statistics of the probed heads, averaged over the two head groups.

    span_h = (1/|R|) sum_{t in R} sum_s A_ts^h (t - s)                    ranks the heads, tokens
    waad_t = mean over the local group of the heads' WAAD_t               in [0, W] tokens
    fai_s  = mean over the global group of fai_sum_s / |T(s)|             in [0, 1], 0 where T(s) is empty

Both are linear in the maps, so the mean over heads equals the statistic of the group's mean map (Eq. 8), which is
never built.

The heads are ranked per response (`sequence`, the literal reading of Eq. 7), once over all rows of all ranks
(`batch`, weighted by tokens), or are given (`static`, for instance from `calibrate_heads`).

Source: arXiv 2510.13554 v2, Eqs. 7-10 and Sec. 5.3.1 for the defaults; the scope of the ranking is not given there.
Legend: B rows, T columns, C columns of the completion, M flat heads (layer-major), n_sel heads per group.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from rltok.attention.heads import check_quantile, select_heads
from rltok.attention.probe import AttentionStatistics, Region, attention_statistics, probeable_layers
from rltok.reduce import ONE_RANK, Reducer

HeadScope = Literal["sequence", "batch", "static"]
Batch = tuple[Tensor, Tensor, Tensor]
"""input_ids (B, T), attention_mask (B, T), response_mask (B, C)"""


@dataclass(frozen=True)
class AttentionConfig:
    """Which heads are read, over which distances, and how much of the batch at once."""

    layers: tuple[int, ...] | None = None
    """layers to probe; None: five evenly spaced in the middle third"""
    head_quantile: float = 0.3
    """share of the heads in either group, in (0, 0.5]"""
    head_scope: HeadScope = "sequence"
    """what the heads are ranked over: each response, all rows of all ranks, or not at all (given lists)"""
    local_heads: tuple[int, ...] | None = None
    """`static` only: flat indices (position in `layers` times heads per layer plus head) of the local group"""
    global_heads: tuple[int, ...] | None = None
    """`static` only: the same for the global group"""
    window: int = 10
    """W of WAAD, tokens"""
    horizon_min: int = 10
    """smallest distance of a query that counts for FAI, tokens; smaller ones see syntax instead of reasoning"""
    horizon_max: int | None = 100
    """largest distance, tokens; None: up to the end of the completion"""
    block: int = 64
    """query rows per step: memory and speed only"""
    token_budget: int = 16384
    """tokens (rows times columns) of one pass; one row always fits"""

    def __post_init__(self) -> None:
        check_quantile(self.head_quantile)
        if self.head_scope not in get_args(HeadScope):
            raise ValueError(f"head_scope={self.head_scope!r} is unknown; allowed: {', '.join(get_args(HeadScope))}")
        for name, minimum in (("window", 1), ("horizon_min", 0), ("block", 1), ("token_budget", 1)):
            if getattr(self, name) < minimum:
                raise ValueError(f"{name}={getattr(self, name)}; allowed: >= {minimum}")
        if self.horizon_max is not None and self.horizon_max < self.horizon_min:
            raise ValueError(
                f"horizon_max={self.horizon_max}; allowed: >= horizon_min={self.horizon_min}, or None for no limit"
            )
        if self.layers is not None and (not self.layers or len(set(self.layers)) != len(self.layers)):
            raise ValueError(f"layers={self.layers}; allowed: distinct layer indices, at least one, or None")
        self._check_head_lists()

    def _check_head_lists(self) -> None:
        for name in ("local_heads", "global_heads"):
            heads = getattr(self, name)
            if (self.head_scope == "static") != (heads is not None):
                raise ValueError(f"{name}={heads} with head_scope={self.head_scope!r}; lists belong to 'static' only")
            if heads is not None and (not heads or len(set(heads)) != len(heads) or min(heads) < 0):
                raise ValueError(f"{name}={heads}; allowed: distinct flat head indices >= 0, at least one")

    @property
    def horizon(self) -> tuple[int, int | None]:
        """(H_lo, H_hi)."""
        return self.horizon_min, self.horizon_max


@dataclass(frozen=True)
class AttentionSignals:
    """Signals of one batch, without gradient; 0 outside the completion."""

    waad: Tensor
    """(B, C) windowed average attention distance of the local group, tokens"""
    fai: Tensor
    """(B, C) future attention influence of the global group, in [0, 1]; 0 where `fai_count` is 0"""
    fai_count: Tensor
    """(B, C) |T(s)|, how many queries `fai` averages; a token without any cannot be an anchor"""
    span: Tensor
    """(B, M) average span per head, tokens; 0 in rows without completion"""
    local: Tensor
    """(B, n_sel) flat head indices for `sequence`, (n_sel,) for `batch` and `static`"""
    global_: Tensor
    """as `local`"""
    layers: tuple[int, ...]
    """the probed layers; flat head h is head h % (M / len(layers)) of layers[h // (M / len(layers))]"""


@dataclass(frozen=True)
class _Part:
    """A micro-batch: some rows of the batch, and the columns that are not padding in all of them."""

    rows: Tensor
    """indices of the rows, longest first"""
    columns: slice
    """of T"""
    response: slice
    """of C; the last columns of `columns`"""

    def cut(self, batch: Batch) -> Batch:
        """The micro-batch of a batch."""
        ids, mask, response = (values[self.rows] for values in batch)
        return ids[:, self.columns], mask[:, self.columns], response[:, self.response]


def attention_signals(
    model: nn.Module,
    input_ids: Tensor,
    attention_mask: Tensor,
    response_mask: Tensor,
    config: AttentionConfig,
    reducer: Reducer = ONE_RANK,
    *,
    stop_early: bool = True,
) -> AttentionSignals:
    """WAAD and FAI of every completion token, in passes of at most `config.token_budget` tokens.

    Rows are sorted by length, cut, trimmed of common padding, and put back in their order and place; the cut changes
    memory and time only. Per-head statistics of the whole batch are kept for `batch` alone, which can group heads only
    after the last row. Ranks may run different numbers of passes: give the model without a wrapper that communicates
    in its forward pass (DDP with buffers, FSDP).

    Args:
        model, input_ids, attention_mask, response_mask: as for `attention_statistics`.
        config: which heads and distances.
        reducer: totals over ranks; used once, by `batch` only.
        stop_early: as for `attention_statistics`.

    Returns:
        `AttentionSignals`.

    Raises:
        ValueError: as `attention_statistics`, or static heads that the probed layers do not have.
    """
    layers = probeable_layers(model, config.layers)
    parts = _micro_batches(attention_mask, response_mask, config.token_budget)
    batch = (input_ids, attention_mask, response_mask)
    spans, counts, waads, fais = [], [], [], []
    groups: list[tuple[Tensor, Tensor]] = []
    kept: list[AttentionStatistics] = []
    for part in parts:
        ids, mask, response = part.cut(batch)
        stats = _statistics(model, (ids, mask, response), layers, config, stop_early)
        spans.append(stats.span_sum)
        counts.append(stats.fai_count)
        if config.head_scope == "batch":
            kept.append(stats)
            continue
        if config.head_scope == "static":
            groups.append(_static_heads(config, stats.span_sum))
        else:
            groups.append(select_heads(mean_span(stats.span_sum, response), config.head_quantile))
        waad, fai = group_signals(stats, *groups[-1])
        waads.append(waad)
        fais.append(fai)
    span_sum = _rows_in_order(parts, spans)
    if config.head_scope == "batch":
        shared = select_heads(_span_of_all(span_sum, response_mask, reducer), config.head_quantile)
        for stats in kept:
            waad, fai = group_signals(stats, *shared)
            waads.append(waad)
            fais.append(fai)
    elif config.head_scope == "static":
        shared = groups[0]
    else:
        shared = (_rows_in_order(parts, [g[0] for g in groups]), _rows_in_order(parts, [g[1] for g in groups]))
    width = response_mask.size(1)
    return AttentionSignals(
        waad=_in_place(parts, waads, width),
        fai=_in_place(parts, fais, width),
        fai_count=_in_place(parts, counts, width),
        span=mean_span(span_sum, response_mask),
        local=shared[0],
        global_=shared[1],
        layers=layers,
    )


def calibrate_heads(
    model: nn.Module,
    batches: Iterable[Batch],
    config: AttentionConfig,
    reducer: Reducer = ONE_RANK,
    *,
    stop_early: bool = True,
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Head groups for `head_scope="static"`, ranked once over all completion tokens of the given batches.

    Args:
        model: as for `attention_statistics`; usually the model before training.
        batches: (input_ids, attention_mask, response_mask) each; at least one.
        config: layers, head_quantile and token_budget are used.
        reducer: totals over ranks, so that every rank gets the same lists.

    Returns:
        Flat indices of the local heads (nearest first) and of the global heads (farthest last).

    Raises:
        ValueError: as `attention_statistics`; no batch, or no completion token in any.
    """
    layers = probeable_layers(model, config.layers)
    total: Tensor | None = None
    for batch in batches:
        for part in _micro_batches(batch[1], batch[2], config.token_budget):
            ids, mask, response = part.cut(batch)
            stats = attention_statistics(
                model, ids, mask, response, layers, 1, (0, 0), config.block, stop_early=stop_early
            )
            sums = _span_and_count(stats.span_sum, response)
            total = sums if total is None else total + sums
    if total is None:
        raise ValueError("batches is empty; head groups need at least one batch")
    total = reducer.sum(total)
    if not total[-1] > 0:
        raise ValueError("batches hold 0 completion tokens; head groups need at least one")
    local, far = select_heads(total[:-1] / total[-1], config.head_quantile)
    return tuple(local.tolist()), tuple(far.tolist())


def mean_span(span_sum: Tensor, response_mask: Tensor) -> Tensor:
    """(B, M) average span in tokens: `span_sum` over |R| of its row; 0 where R is empty."""
    count = response_mask.to(span_sum.device).bool().sum(1, keepdim=True)
    return span_sum / count.clamp(min=1)


def group_signals(stats: AttentionStatistics, local: Tensor, global_: Tensor) -> tuple[Tensor, Tensor]:
    """WAAD of the local group and FAI of the global group, (B, C) each, from per-head statistics.

    Args:
        stats: of B rows.
        local, global_: (B, n_sel), or (n_sel,) for all rows.
    """
    fai = _group_mean(stats.fai_sum, global_) / stats.fai_count.clamp(min=1)
    return _group_mean(stats.waad, local), fai


def _group_mean(values: Tensor, heads: Tensor) -> Tensor:
    """(B, M, C) -> (B, C), mean over the heads of each row's group."""
    if heads.dim() == 1:
        return values[:, heads].mean(1)
    index = heads[:, :, None].expand(-1, -1, values.size(-1))
    return values.gather(1, index).mean(1)


def _statistics(
    model: nn.Module, batch: Batch, layers: tuple[int, ...], config: AttentionConfig, stop_early: bool
) -> AttentionStatistics:
    return attention_statistics(
        model, *batch, layers, config.window, config.horizon, config.block, stop_early=stop_early
    )


def _static_heads(config: AttentionConfig, span_sum: Tensor) -> tuple[Tensor, Tensor]:
    """The configured lists as indices.

    Raises:
        ValueError: a head beyond the last.
    """
    groups = []
    for name, heads in (("local_heads", config.local_heads), ("global_heads", config.global_heads)):
        assert heads is not None  # AttentionConfig saw to it
        if max(heads) >= span_sum.size(1):
            raise ValueError(f"{name} has head {max(heads)}; the probed layers have heads 0 to {span_sum.size(1) - 1}")
        groups.append(torch.tensor(heads, device=span_sum.device))
    return groups[0], groups[1]


def _span_and_count(span_sum: Tensor, response_mask: Tensor) -> Tensor:
    """(M + 1,) span numerators over rows and |R|, in float64 where the device has it: they grow with the batch."""
    dtype = torch.float32 if span_sum.device.type == "mps" else torch.float64
    count = response_mask.to(span_sum.device).bool().sum().to(dtype)
    return torch.cat([span_sum.to(dtype).sum(0), count[None]])


def _span_of_all(span_sum: Tensor, response_mask: Tensor, reducer: Reducer) -> Tensor:
    """(M,) average span over all completion tokens of all ranks."""
    total = reducer.sum(_span_and_count(span_sum, response_mask))
    return total[:-1] / total[-1].clamp(min=1)


def _micro_batches(attention_mask: Tensor, response_mask: Tensor, token_budget: int) -> list[_Part]:
    """Rows by falling length, in groups of at most `token_budget` tokens after trimming.

    A row of more tokens than the budget makes a group of its own.
    """
    Region.from_masks(attention_mask, response_mask)  # padding must be contiguous before it can be trimmed
    width, span = attention_mask.size(1), response_mask.size(1)
    valid = attention_mask.bool().cpu()
    lengths = valid.sum(1)
    first = torch.where(lengths > 0, valid.long().argmax(1), width - 1).tolist()
    end = [start + int(length) for start, length in zip(first, lengths, strict=True)]
    parts: list[_Part] = []
    rows: list[int] = []
    for row in lengths.argsort(descending=True, stable=True).tolist():
        grown = [*rows, row]
        if rows and len(grown) * (max(end[r] for r in grown) - min(first[r] for r in grown)) > token_budget:
            parts.append(_part(rows, first, end, width, span))
            grown = [row]
        rows = grown
    parts.append(_part(rows, first, end, width, span))
    return parts


def _part(rows: list[int], first: list[int], end: list[int], width: int, span: int) -> _Part:
    """At least one column of T stays; the completion's columns stay the last ones."""
    start = min(first[row] for row in rows)
    stop = max(start + 1, *(end[row] for row in rows))
    offset = width - span
    return _Part(
        rows=torch.tensor(rows),
        columns=slice(start, stop),
        response=slice(max(0, start - offset), max(0, stop - offset)),
    )


def _rows_in_order(parts: list[_Part], values: list[Tensor]) -> Tensor:
    """Concatenate what the parts gave per row, in the order of the batch."""
    order = torch.cat([part.rows for part in parts]).to(values[0].device)
    return torch.cat(values)[order.argsort()]


def _in_place(parts: list[_Part], values: list[Tensor], width: int) -> Tensor:
    """(B, C) from what the parts gave for their rows and columns; 0 elsewhere."""
    result = values[0].new_zeros((sum(part.rows.numel() for part in parts), width))
    for part, value in zip(parts, values, strict=True):
        result[part.rows.to(value.device), part.response] = value
    return result
