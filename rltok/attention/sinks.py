"""Attention sinks of one layer: heads that put their weight on a row's first token and write next to nothing.

With s a row's first real token, A the row-stochastic map of a head, v its values, W its columns of the output
projection, and N real tokens in the row (rows of one token are left out), per head

    sink mass     = mean over queries i > s of A_is
    value ratio   = norm of W v_s / mean over j != s of norm of W v_j
    output norm   = mean over i of norm of W sum_j A_ij v_j
    row entropy   = -sum_j A_ij log A_ij / log(i - s + 1), 0 for i = s; of a head: mean over i

and per layer

    residual peak = norm of the layer's output at s / largest norm elsewhere, mean over rows

A head is called dormant here if its sink mass is at least 0.5 and its output norm at most 0.5 of its layer's median.
That is a correlation: `rltok.attention.model_sinks.loss_change` tells what the loss says.

Everything is kept as sums and counts, so that batches and ranks are added before anything is divided; numerator and
denominator of a ratio are summed apart. Norms of W v are taken as those of R v with W = QR, which are the same.

Source: arXiv 2410.13835 v2 and its code (metrics); the output norm is that of arXiv 2504.03889; the two thresholds are
ours. Left out: the trimming of quantiles before plots.

Legend: B rows, T columns, H query heads, Hkv key-value heads, D head size, L layers, F first tokens looked at.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from rltok.attention.probe import AttentionCall, Region, block_weights, heads_at_once
from rltok.reduce import Reducer

SINK_MASS = 0.5
"""Least sink mass of a dormant head."""
OUTPUT_RATIO = 0.5
"""Largest output norm of a dormant head, as a share of its layer's median."""
FIRST = 16
"""First tokens of a row among which a sink is looked for."""


class AttentionRows(NamedTuple):
    """A block of rows of an attention map."""

    first_row: int
    """query column of the first row"""
    weights: Tensor
    """(B, H, q, K), or (H, q, K) without batch; rows sum to 1"""
    first_column: int = 0
    """key column of the first weight; columns that are not there have weight 0"""


AttentionChunks = Tensor | Iterable[AttentionRows | tuple[int, Tensor]]


@dataclass(frozen=True)
class SinkStats:
    """Sums and counts of the heads of a layer, (H,) and (); of several layers, (L, H) and (L,)."""

    sink_sum: Tensor
    """(H,) sum of A_is over queries i > s"""
    sink_count: Tensor
    """() number of those queries"""
    sink_uniform: Tensor
    """() what uniform attention would give in place of `sink_sum`: sum of 1 / (i - s + 1)"""
    sink_value_sum: Tensor
    """(H,) sum over rows of norm of W v_s"""
    rows: Tensor
    """() rows of two or more tokens"""
    other_value_sum: Tensor
    """(H,) sum of norm of W v_j over the other tokens, of which there are `sink_count`"""
    output_sum: Tensor
    """(H,) sum over queries of norm of W sum_j A_ij v_j"""
    entropy_sum: Tensor
    """(H,) sum over queries of the normalised row entropy"""
    queries: Tensor
    """() number of all queries of those rows"""
    received: Tensor
    """(H, T) attention received from queries i > s, by the key's place in its row: 0 is s"""
    early_sum: Tensor
    """(H, F) attention received by the first F tokens from the queries behind them"""
    early_uniform: Tensor
    """() what each would receive from uniform attention: sum of 1 / (i - s + 1)"""
    early_count: Tensor
    """() number of queries with i - s >= F"""
    row_entropy: Tensor | None = None
    """(B, H, T), or (H, T) without batch: normalised entropy of every row, 0 at padding; dropped by sums"""

    @property
    def sink_mass(self) -> Tensor:
        """(H,) mean weight on s, in [0, 1]; uniform attention over N tokens gives the mean of 1 / (i + 1), i > 0."""
        return self.sink_sum / self.sink_count[..., None]

    @property
    def uniform_mass(self) -> Tensor:
        """() sink mass of uniform attention over the same rows."""
        return self.sink_uniform / self.sink_count

    @property
    def value_ratio(self) -> Tensor:
        """(H,) norm of the projected value at s over the mean of the others; below 1 is a drain."""
        return (self.sink_value_sum / self.rows[..., None]) / (self.other_value_sum / self.sink_count[..., None])

    @property
    def output_norm(self) -> Tensor:
        """(H,) mean norm of what the head writes to the residual stream."""
        return self.output_sum / self.queries[..., None]

    @property
    def relative_norm(self) -> Tensor:
        """(H,) output norm over the median of the layer's heads (mean of the middle two, if they are even)."""
        norm = self.output_norm
        return norm / norm.quantile(0.5, dim=-1, keepdim=True)

    @property
    def entropy(self) -> Tensor:
        """(H,) mean normalised entropy of the rows, the first row's 0 included, as in the source."""
        return self.entropy_sum / self.queries[..., None]

    @property
    def argmax_column(self) -> Tensor:
        """(H,) place in the row, from 0, of the token that receives most attention in sum."""
        return self.received.argmax(-1)

    def dormant(self, sink_mass: float = SINK_MASS, output_ratio: float = OUTPUT_RATIO) -> Dormant:
        """Which heads are dormant by these thresholds, with both halves of the decision."""
        return Dormant(self.sink_mass >= sink_mass, self.relative_norm <= output_ratio)

    def __add__(self, other: SinkStats) -> SinkStats:
        """Sums of two batches; the shorter row of `received` is filled with 0."""
        width = max(self.received.size(-1), other.received.size(-1))
        mine, theirs = self._widened(width), other._widened(width)
        return SinkStats(**{name: getattr(mine, name) + getattr(theirs, name) for name in SUMS})

    def _widened(self, width: int) -> SinkStats:
        missing = width - self.received.size(-1)
        return dataclasses.replace(self, received=nn.functional.pad(self.received, (0, missing)), row_entropy=None)

    def reduced(self, reducer: Reducer) -> SinkStats:
        """Sums over ranks, in float64; two calls of the reducer, whatever the data."""
        own = torch.tensor([self.received.size(-1)], device=self.received.device)
        whole = self._widened(int(reducer.max(own)))
        parts = [getattr(whole, name) for name in SUMS]
        total = reducer.sum(torch.cat([part.reshape(-1).to(sum_dtype(part)) for part in parts]))
        split = total.split([part.numel() for part in parts])
        return SinkStats(**{name: sums.view_as(part) for name, sums, part in zip(SUMS, split, parts, strict=True)})


SUMS = tuple(field.name for field in dataclasses.fields(SinkStats) if field.name != "row_entropy")
"""The fields of `SinkStats` that are added over batches and ranks."""


class Dormant(NamedTuple):
    """The dormant decision; count both halves, never one alone."""

    sink: Tensor
    """(..., H) bool, sink mass at or above its threshold"""
    quiet: Tensor
    """(..., H) bool, output norm at or below its share of the layer's median"""

    @property
    def both(self) -> Tensor:
        """(..., H) bool, the dormant heads."""
        return self.sink & self.quiet


def sum_dtype(tensor: Tensor) -> torch.dtype:
    """The dtype of sums over ranks: float64, or float32 on devices that lack it."""
    return torch.float32 if tensor.device.type == "mps" else torch.float64


def sink_stats(
    attn_chunks: AttentionChunks,
    values: Tensor,
    o_proj: Tensor | None = None,
    mask: Tensor | None = None,
    *,
    first: int = FIRST,
) -> SinkStats:
    """Sums and counts of a layer from its attention map, its values and its output projection.

    Args:
        attn_chunks: blocks of rows, `AttentionRows` or (first_row, weights), which may come in any order; or one whole
            map, (B, H, T, T) or (H, T, T).
        values: (B, Hkv, T, D) or (Hkv, T, D); query heads h G .. h G + G - 1 share value head h, with G = H / Hkv.
        o_proj: (hidden, H D) weight of the output projection, columns head by head; (hidden, D) for the same columns
            under every head; None: the identity.
        mask: (B, T) 1 for real tokens, one run per row; None: all are real. Padding is read nowhere.
        first: F, tokens of a row's beginning that `early_sum` counts.

    Returns:
        `SinkStats` in float32 (float64 for values in float64), without gradient.

    Raises:
        ValueError: shapes that do not fit, or no block.

    Example: two rows of weights [1, 0] and [0.9, 0.1] give sink mass 0.9.
    """
    if values.dim() not in (3, 4):
        raise ValueError(f"values has shape {tuple(values.shape)}; allowed: (B, Hkv, T, D) or (Hkv, T, D)")
    single = values.dim() == 3
    values = values.detach()[None] if single else values.detach()
    totals: _Totals | None = None
    for block in _blocks(attn_chunks):
        weights = block.weights.detach()
        weights = weights[None] if weights.dim() == 3 else weights
        if totals is None:
            totals = _Totals(values, weights.size(1), o_proj, mask, first)
        totals.add(weights, block.first_row, block.first_column)
    if totals is None:
        raise ValueError("attn_chunks holds no block; give at least one (first_row, weights)")
    stats = totals.finish()
    assert stats.row_entropy is not None
    return dataclasses.replace(stats, row_entropy=stats.row_entropy[0]) if single else stats


def _blocks(attn_chunks: AttentionChunks) -> Iterator[AttentionRows]:
    if isinstance(attn_chunks, Tensor):
        yield AttentionRows(0, attn_chunks)
        return
    for chunk in attn_chunks:
        yield AttentionRows(*chunk)


class _Totals:
    """Adds blocks of attention rows up to `SinkStats`."""

    def __init__(
        self, values: Tensor, n_heads: int, o_proj: Tensor | None, mask: Tensor | None, first: int = FIRST
    ) -> None:
        rows, n_key, width, size = values.shape
        if n_heads % n_key:
            raise ValueError(f"{n_heads} heads of attention and {n_key} of values; allowed: a multiple")
        if mask is not None and mask.shape != (rows, width):
            raise ValueError(f"mask has shape {tuple(mask.shape)}, values {tuple(values.shape)}; allowed: (B, T)")
        if first < 1:
            raise ValueError(f"first={first}; allowed: >= 1 token")
        dtype = torch.float64 if values.dtype == torch.float64 else torch.float32
        valid = torch.ones(rows, width, dtype=torch.bool, device=values.device) if mask is None else mask.bool()
        self.real = valid & (valid.sum(1, keepdim=True) > 1)  # (B, T)
        self.sink = self.real.long().argmax(1)  # (B,)
        self.place = torch.arange(width, device=values.device) - self.sink[:, None]  # (B, T), 0 at s
        self.values = values.to(dtype).masked_fill(~self.real[:, None, :, None], 0.0)  # padding may hold NaN
        self.factor = None if o_proj is None else norm_factor(o_proj, n_heads, size).to(dtype)
        self.n_heads, self.first = n_heads, first
        heads = values.new_zeros(n_heads, dtype=dtype)
        self.sink_sum, self.output_sum = heads.clone(), heads.clone()
        self.early_sum = values.new_zeros(n_heads, first, dtype=dtype)
        self.received = values.new_zeros(rows, n_heads, width, dtype=dtype)
        self.row_entropy = values.new_zeros(rows, n_heads, width, dtype=dtype)

    def add(self, weights: Tensor, first_row: int, first_column: int = 0) -> None:
        """Add rows `first_row` .. of (B, H, q, K) weights on the columns `first_column` .."""
        rows, n_heads, count, span = weights.shape
        whole = (self.real.size(0), self.n_heads, self.real.size(1))
        if (rows, n_heads) != whole[:2] or first_row + count > whole[2] or first_column + span > whole[2]:
            raise ValueError(
                f"attention of shape {tuple(weights.shape)} from row {first_row} and column {first_column} does not "
                f"fit B={whole[0]}, H={whole[1]}, T={whole[2]}"
            )
        queries, columns = slice(first_row, first_row + count), slice(first_column, first_column + span)
        real, place = self.real[:, queries], self.place[:, queries]
        behind = (real & (place > 0)).to(self.values.dtype)  # (B, q)
        weights = weights.to(self.values.dtype).masked_fill(~real[:, None, :, None], 0.0)

        mixed = self._mix(weights, columns)  # (B, H, q, D)
        self.output_sum += self._norm(mixed).sum((0, 2))
        scale = (place + 1).clamp(min=2).to(weights.dtype).log()[:, None]
        entropy = torch.special.entr(weights).sum(-1) / scale
        self.row_entropy[:, :, queries] = entropy * behind[:, None]
        self.received[:, :, columns] += torch.einsum("bhqk,bq->bhk", weights, behind)

        index = self.sink[:, None] + torch.arange(self.first, device=weights.device) - first_column  # (B, F)
        inside = ((index >= 0) & (index < span)).to(weights.dtype)
        found = index.clamp(0, span - 1)[:, None, None].expand(-1, n_heads, count, -1)
        early = weights.gather(-1, found) * inside[:, None, None]
        self.sink_sum += torch.einsum("bhq,bq->h", early[..., 0], behind)
        late = (real & (place >= self.first)).to(weights.dtype)
        self.early_sum += torch.einsum("bhqf,bq->hf", early, late)

    def _mix(self, weights: Tensor, columns: slice) -> Tensor:
        rows, n_heads, count, span = weights.shape
        n_key = self.values.size(1)
        grouped = weights.reshape(rows, n_key, -1, span)
        return (grouped @ self.values[:, :, columns]).view(rows, n_heads, count, -1)

    def _norm(self, vectors: Tensor) -> Tensor:
        """(B, H, n, D) -> (B, H, n) norms behind the output projection."""
        return (vectors if self.factor is None else vectors @ self.factor).norm(dim=-1)

    def finish(self) -> SinkStats:
        """The sums so far, with those that need the values alone."""
        dtype = self.values.dtype
        norms = self._norm(self.values.repeat_interleave(self.n_heads // self.values.size(1), 1))  # (B, H, T)
        at_sink = self.real & (self.place == 0)
        behind, late = self.real & (self.place > 0), self.real & (self.place >= self.first)
        width = self.real.size(1)
        columns = self.sink[:, None] + torch.arange(width, device=self.sink.device)
        moved = self.received.gather(-1, columns.clamp(max=width - 1)[:, None].expand_as(self.received))
        uniform = 1.0 / (self.place + 1).clamp(min=1).to(dtype)
        return SinkStats(
            sink_sum=self.sink_sum,
            sink_count=behind.sum().to(dtype),
            sink_uniform=(uniform * behind).sum(),
            sink_value_sum=torch.einsum("bht,bt->h", norms, at_sink.to(dtype)),
            rows=at_sink.sum().to(dtype),
            other_value_sum=torch.einsum("bht,bt->h", norms, behind.to(dtype)),
            output_sum=self.output_sum,
            entropy_sum=self.row_entropy.sum((0, 2)),
            queries=self.real.sum().to(dtype),
            received=(moved * (columns < width)[:, None]).sum(0),
            early_sum=self.early_sum,
            early_uniform=(uniform * late).sum(),
            early_count=late.sum().to(dtype),
            row_entropy=self.row_entropy,
        )


def norm_factor(o_proj: Tensor, n_heads: int, size: int) -> Tensor:
    """(H, D, m) such that v @ factor[h] has the norm of W_h v, with m <= D: the R of W_h = QR, turned over.

    Args:
        o_proj: (hidden, H D) or (hidden, D) weight.
        n_heads, size: H and D.

    Raises:
        ValueError: another shape.
    """
    if o_proj.dim() != 2 or o_proj.size(1) not in (n_heads * size, size):
        raise ValueError(
            f"o_proj has shape {tuple(o_proj.shape)}; allowed: (hidden, {n_heads * size}) for H={n_heads} and "
            f"D={size}, or (hidden, {size}) for the same under every head"
        )
    weight = o_proj.detach()
    weight = weight if weight.dtype == torch.float64 else weight.float()
    if weight.size(1) == size:
        weight = weight.repeat(1, n_heads)
    per_head = weight.view(weight.size(0), n_heads, size).transpose(0, 1)  # (H, hidden, D)
    if weight.size(0) <= size:
        return per_head.transpose(1, 2)
    return torch.linalg.qr(per_head, mode="r").R.transpose(1, 2)


def residual_peak(hidden: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Sum over rows of norm at the row's first token / largest norm elsewhere, and the number of rows.

    Args:
        hidden: (B, T, hidden) or (T, hidden) residual stream.
        mask: (B, T) 1 for real tokens; None: all are real. Rows of one token are left out.

    Returns:
        Two () tensors in float32 (float64 for float64).
    """
    hidden = hidden.detach()[None] if hidden.dim() == 2 else hidden.detach()
    dtype = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    norm = hidden.to(dtype).norm(dim=-1)
    valid = torch.ones_like(norm, dtype=torch.bool) if mask is None else mask.bool()
    counted = valid.sum(1) > 1
    first = valid.long().argmax(1, keepdim=True)
    others = valid & (torch.arange(norm.size(1), device=norm.device) != first)
    ratio = norm.gather(1, first)[:, 0] / norm.masked_fill(~others, 0.0).amax(1)
    return ratio.masked_fill(~counted, 0.0).sum(), counted.sum().to(dtype)


def layer_sink_stats(
    call: AttentionCall, value: Tensor, o_proj: Tensor, region: Region, block: int, first: int
) -> SinkStats:
    """Sums of one layer from its queries, keys and values, in blocks of rows and chunks of key-value heads.

    Args:
        call: queries (B, H, T, Dk) and keys (B, Hkv, T, Dk) of the layer, its scaling and its window.
        value: (B, Hkv, T, D).
        o_proj: (hidden, H D) weight of the output projection.
        region: the masks; all real tokens are queries.
        block: query rows per step; memory and speed only.
        first: F, see `sink_stats`.

    Returns:
        `SinkStats` of H heads.
    """
    rows, n_query, width, _ = call.query.shape
    n_key, size = value.size(1), value.size(-1)
    groups = n_query // n_key
    dtype = torch.float64 if call.query.dtype == torch.float64 else torch.float32
    lines = min(block, region.end_row - region.first_row)
    chunk = min(n_key, heads_at_once(value.device.type, rows * groups * lines * width))
    flat = rows * chunk * groups * lines * width
    scratch = value.new_empty(flat, dtype=dtype), value.new_empty(flat, dtype=dtype)
    parts = []
    for start_head in range(0, n_key, chunk):
        keys = call.key[:, start_head : start_head + chunk].to(dtype)
        keys = keys.masked_fill(~region.valid[:, None, :, None], 0.0).contiguous()
        heads = slice(start_head * groups, (start_head + keys.size(1)) * groups)
        columns = slice(heads.start * size, heads.stop * size)
        queries = call.query[:, heads]
        values = value[:, start_head : start_head + chunk].to(dtype)
        totals = _Totals(values, queries.size(1), o_proj[:, columns], region.valid, first)
        for start in range(region.first_row, region.end_row, block):
            stop = min(start + block, region.end_row)
            weights, first_key = block_weights(
                queries, keys, call.scaling, call.sliding_window, region, start, stop, scratch
            )
            totals.add(weights, start, first_key)
        parts.append(totals.finish())
    per_head = ("sink_sum", "sink_value_sum", "other_value_sum", "output_sum", "entropy_sum", "received", "early_sum")
    return dataclasses.replace(
        parts[0],
        row_entropy=torch.cat([part.row_entropy for part in parts if part.row_entropy is not None], 1),
        **{name: torch.cat([getattr(part, name) for part in parts]) for name in per_head},
    )
