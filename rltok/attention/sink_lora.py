"""SinkLoRA-style attention of the learner: causal groups of tokens, some heads shifted, the first tokens seen by all.

A sample of N tokens is cut into groups of G = ceil(N / groups) tokens. Query q of head h sees key k where

    k <= q  and  (k < sinks  or  group_h(q) = group_h(k))
    group_h(n) = floor(((n - s_h) mod N) / G),   s_h = floor(G / 2) in the last `shift_fraction` of the heads, else 0

Numbers count the tokens of a sample, not the columns of a batch, so that neither padding nor neighbours nor packing
change a sample; the published code counts columns and therefore wants padding on the right. The group that wraps
around the end holds the last and the first tokens; its pairs with k > q would show the future and are never allowed.

    limit                                full causal attention, exactly
    groups = 1                           everywhere
    N <= above, or N < groups            for that sample
    shift_fraction = 0, sinks = 0        plain causal blocks (not the limit)

What differs from the published code (which is S2-Attn of LongLoRA; no code of SinkLoRA's own attention is public):
lengths that `groups` does not divide have a shorter last group instead of an error; an odd G shifts by floor(G / 2)
and its shift is undone (the code's -G // 2 and G // 2 differ); sinks do not look at later tokens, which a causal model
must not. That `shift_fraction` is a share of heads is a reading of the paper's text, not its figure. A sample's groups
depend on its length: scored as the prefix of a longer one, a token sees other keys.

`sink_fixed_attention` gathers the tokens of each group and runs one kernel per share of heads, over
N (G + sinks) pairs instead of N N. `rltok.attention.pattern` puts it in place of a model's attention.

Source: SinkLoRA, arXiv 2406.05678, sections 3.2.1-3.2.2; S2-Attn: LongLoRA, arXiv 2309.12307. Left out: H2O at
inference (a cache policy, `rltok.kv`); heads or sequences spread over ranks; attention with a sliding window.

Legend: B rows, T columns, H query heads, Hkv key-value heads, D head size, S samples that are longer than `above`,
n their tokens.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention


@dataclass(frozen=True)
class SinkLoRAConfig:
    """Which keys a query of the learner sees in samples of more than `above` tokens.

    Raises:
        ValueError: a value out of its range.
    """

    groups: int = 4
    """Groups of a sample; 1 is full causal attention. Source: the code's group_size_ratio 1/4."""
    shift_fraction: float = 0.25
    """Share of the heads, the last ones, whose groups are moved by half a group; 0.5: S2-Attn, 0: plain blocks."""
    sinks: int = 4
    """First tokens of a sample that all its later tokens see. Source: paper, section 3.2.2."""
    above: int = 2048
    """Tokens of a sample, prompt and completion, up to which attention stays full."""

    def __post_init__(self) -> None:
        for name, least in (("groups", 1), ("sinks", 0), ("above", 0)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ValueError(f"{name}={value!r}; allowed: whole numbers >= {least}")
        if not 0.0 <= self.shift_fraction <= 1.0:
            raise ValueError(f"shift_fraction={self.shift_fraction!r}; allowed: 0 to 1, a share of the heads")

    @property
    def is_neutral(self) -> bool:
        """True if attention stays full at every length."""
        return self.groups == 1


PATTERNS: dict[str, type[SinkLoRAConfig]] = {"sink_lora": SinkLoRAConfig}
"""Attention patterns by the `type` of a recipe's section `model.attention_pattern`."""


# The definition


def shifted_heads(heads: int, shift_fraction: float) -> int:
    """How many of the heads are shifted: ceil(heads * shift_fraction), as S2-Attn shifts 2 of 3.

    Example: 12 heads at 0.25 give 3.
    """
    return math.ceil(heads * shift_fraction - 1e-9)


def group_size(length: Tensor, groups: int) -> Tensor:
    """Tokens of a group, ceil(length / groups); a sample of fewer tokens than groups is one group."""
    size = (length + groups - 1).div(groups, rounding_mode="floor")
    return torch.where(length < groups, length, size).clamp(min=1)


def rolled(number: Tensor, length: Tensor, size: Tensor, shifted: bool) -> Tensor:
    """Place of a token in the order that is cut into groups: (number - size // 2) mod length if shifted."""
    return torch.remainder(number - size.div(2, rounding_mode="floor"), length) if shifted else number


def sink_fixed_mask(
    length: int,
    heads: int,
    groups: int = 4,
    shift_fraction: float = 0.25,
    sinks: int = 4,
    *,
    device: torch.device | str | None = None,
) -> Tensor:
    """Which keys every query of one sample sees: k <= q and (k < sinks or same group in that head).

    Example: length 8, groups 4, heads 2, shift_fraction 0.5, sinks 0. Head 0 has the groups {0, 1}, {2, 3}, {4, 5},
    {6, 7}; head 1, shifted by 1, {1, 2}, {3, 4}, {5, 6}, {7, 0}, where query 7 sees key 0 and query 0 only itself.

    Returns:
        (H, T, T) bool, query x key; full and causal at groups = 1 or length < groups.

    Raises:
        ValueError: a value out of its range.
    """
    SinkLoRAConfig(groups, shift_fraction, sinks)
    if length < 0 or heads < 1:
        raise ValueError(f"length={length}, heads={heads}; allowed: length >= 0 and heads >= 1")
    number = torch.arange(length, device=device)
    total = torch.full_like(number, max(length, 1))
    size = group_size(total, groups)
    kinds = []
    for shifted in (False, True):
        group = rolled(number, total, size, shifted).div(size, rounding_mode="floor")
        seen = (number[None, :] < sinks) | (group[:, None] == group[None, :])
        kinds.append(seen & (number[None, :] <= number[:, None]))
    moved = shifted_heads(heads, shift_fraction)
    return torch.stack([kinds[0]] * (heads - moved) + [kinds[1]] * moved)


def sink_fixed_batch_mask(attention_mask: Tensor, heads: int, config: SinkLoRAConfig) -> Tensor:
    """`sink_fixed_mask` of every row of a padded batch, for models whose attention takes (B, H, T, T) masks.

    Args:
        attention_mask: (B, T) 1 for tokens; padding may lie anywhere.

    Returns:
        (B, H, T, T) bool; padding neither sees nor is seen.
    """
    valid = attention_mask.bool()
    rows, width = valid.shape
    mask = torch.zeros(rows, heads, width, width, dtype=torch.bool, device=valid.device)
    for row in range(rows):
        columns = valid[row].nonzero()[:, 0]
        groups = config.groups if len(columns) > config.above else 1
        found = sink_fixed_mask(len(columns), heads, groups, config.shift_fraction, config.sinks, device=valid.device)
        mask[row, :, columns[:, None], columns] = found
    return mask


# Samples of a batch


@dataclass(frozen=True)
class Samples:
    """Some samples of a batch; their tokens in order, numbers from 0 in each sample."""

    tokens: Tensor
    """(n,) places in the flat batch, row * T + column"""
    number: Tensor
    """(n,) number of the token in its sample"""
    owner: Tensor
    """(n,) index of its sample"""
    lengths: Tensor
    """(S,) tokens of the samples"""


def token_numbers(mask: Tensor) -> Tensor:
    """Number of every token in its own sample, -1 for padding.

    Args:
        mask: (B, T) 1 for tokens, every row one sample; or the (B, 1, T, T) bool mask of causal attention over padded
            or packed rows, where a token's number is the number of keys it sees, less itself.

    Returns:
        (B, T) int64.
    """
    if mask.dim() == 2:
        valid = mask.bool()
        number = valid.cumsum(1) - 1
    else:
        valid = mask[:, 0].diagonal(dim1=1, dim2=2)
        number = mask[:, 0].sum(-1) - 1
    return number.masked_fill(~valid, -1)


@dataclass(frozen=True)
class Groups:
    """Samples cut into groups of equal width, the rest empty slots; S * groups groups of g slots."""

    slots: Tensor
    """(S groups, g) place of a slot's token in the flat batch; any token for empty slots"""
    place: Tensor
    """(n,) slot of a token in the flat (S groups g)"""
    sink_slots: Tensor
    """(S groups, sinks) likewise of the sinks"""
    visible: Tensor
    """(S groups, 1, g, sinks + g) bool, queries x sinks and keys"""


@dataclass(frozen=True)
class Plan:
    """How a batch with a sample of more than `above` tokens is computed."""

    tokens: Tensor
    """(n,) places of the tokens of these samples"""
    blocks: tuple[Groups, Groups]
    """their groups in the heads that are not shifted, and in those that are"""
    short: tuple[Tensor, Groups] | None
    """likewise of shorter samples in the same packed rows, each one group; None where there is none"""
    dense_rows: Tensor
    """(R,) rows that hold shorter samples alone"""


def make_plan(number: Tensor, config: SinkLoRAConfig) -> Plan | None:
    """What to compute group by group; None where no sample is longer than `above`.

    Args:
        number: (B, T) of `token_numbers`.
    """
    if config.is_neutral:
        return None
    tokens = (number.flatten() >= 0).nonzero()[:, 0]
    every = number.flatten()[tokens]
    owner = (every == 0).cumsum(0) - 1
    lengths = torch.bincount(owner)
    long = (lengths > config.above) & (lengths >= config.groups)
    if not bool(long.any()):
        return None
    row = tokens.div(number.size(1), rounding_mode="floor")
    row_is_long = torch.zeros(number.size(0), dtype=torch.bool, device=number.device)
    row_is_long[row[long[owner]]] = True

    def some(chosen: Tensor) -> Samples:
        index, inside = chosen.cumsum(0) - 1, chosen[owner]
        return Samples(tokens[inside], every[inside], index[owner[inside]], lengths[chosen])

    samples = some(long)
    beside = ~long & row_is_long[row[every == 0]]
    short = None
    if bool(beside.any()):
        others = some(beside)
        short = others.tokens, cut(others, 1, 0, shifted=False)
    blocks = tuple(cut(samples, config.groups, config.sinks, shifted=shifted) for shifted in (False, True))
    return Plan(samples.tokens, (blocks[0], blocks[1]), short, (~row_is_long).nonzero()[:, 0])


def cut(samples: Samples, groups: int, sinks: int, *, shifted: bool) -> Groups:
    """The groups of samples in the heads that are shifted, or in those that are not."""
    number, owner = samples.number, samples.owner
    size = group_size(samples.lengths, groups)  # (S,)
    order = rolled(number, samples.lengths[owner], size[owner], shifted)
    group, slot = order.div(size[owner], rounding_mode="floor"), torch.remainder(order, size[owner])
    width, count = int(size.max()), len(size) * groups
    place = (owner * groups + group) * width + slot

    empty = torch.full((count * width,), -1, device=number.device, dtype=torch.long)
    numbers = empty.scatter(0, place, number).view(count, width)
    slots = empty.scatter(0, place, samples.tokens).clamp(min=0).view(count, width)
    keys, queries = numbers[:, None, :], numbers[:, :, None]
    visible = (keys <= queries) & (keys >= 0)
    visible |= torch.eye(width, dtype=torch.bool, device=number.device)  # an empty slot must see something

    sink = torch.arange(sinks, device=number.device)
    first = samples.lengths.cumsum(0) - samples.lengths
    own = samples.tokens[(first[:, None] + sink).clamp(max=len(number) - 1)]  # (S, sinks)
    total, tall = samples.lengths[:, None], size[:, None]
    home = rolled(sink.expand(len(size), -1), total, tall, shifted).div(tall, rounding_mode="floor")
    home = home.masked_fill(sink >= total, -1)
    elsewhere = (home[:, None] != torch.arange(groups, device=number.device)[:, None]) & (home >= 0)[:, None]
    seen = elsewhere.flatten(0, 1)[:, None] & (sink <= queries)  # those of a group are among its keys already
    return Groups(
        slots=slots,
        place=place,
        sink_slots=own.repeat_interleave(groups, 0),
        visible=torch.cat([seen, visible], -1)[:, None],
    )


# Attention


def sink_fixed_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    config: SinkLoRAConfig,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
) -> Tensor:
    """softmax(scaling q k) v over the keys that the pattern allows, group by group.

    Equal to attention under `sink_fixed_batch_mask`, at the cost of N (G + sinks) pairs per head; samples of at most
    `above` tokens get full causal attention.

    Args:
        query, key, value: (B, H, T, D), (B, Hkv, T, D), (B, Hkv, T, Dv); query heads h H/Hkv ... share key head h.
        attention_mask: (B, T) 1 for tokens, every row one sample; (B, 1, T, T) bool, causal over padded or packed rows;
            None: no padding.
        scaling: factor of the scores; None: D ** -0.5.
        dropout: of the attention weights.

    Returns:
        (B, H, T, Dv); 0 for padding where a row has no sample of full attention.

    Raises:
        ValueError: shapes that do not fit.
    """
    check_shapes(query, key, attention_mask)
    number = sample_numbers(attention_mask, query)
    plan = make_plan(number, config)
    scale = query.size(-1) ** -0.5 if scaling is None else scaling

    def full(rows: Tensor) -> Tensor:
        """(R, T, H, Dv)"""
        keys, values = _repeated(key[rows], value[rows], query.size(1))
        if attention_mask is not None and attention_mask.dim() == 4:
            mask = attention_mask.expand(query.size(0), -1, -1, -1)[rows]
        else:
            some = number[rows] >= 0
            mask = some[:, None, None] & torch.ones(2 * [query.size(2)], dtype=torch.bool, device=query.device).tril()
        mask = mask | torch.eye(query.size(2), dtype=torch.bool, device=query.device)  # padding must see something
        found = scaled_dot_product_attention(query[rows], keys, values, attn_mask=mask, dropout_p=dropout, scale=scale)
        return found.transpose(1, 2)

    if plan is None:
        return full(torch.arange(query.size(0), device=query.device)).transpose(1, 2)
    moved = shifted_heads(query.size(1), config.shift_fraction)
    return combine(query, key, value, plan, moved, full, scale, dropout).transpose(1, 2)


def combine(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    plan: Plan,
    moved: int,
    full: Callable[[Tensor], Tensor],
    scaling: float,
    dropout: float,
) -> Tensor:
    """(B, T, H, Dv): by the plan, the last `moved` heads shifted; `full(rows)` for its dense rows."""
    rows, heads, width, _ = query.shape
    flat = [part.transpose(1, 2).flatten(0, 1) for part in (query, key, value)]  # (B T, heads, D)

    def grouped(groups: Groups, first: int, end: int) -> Tensor:
        return _grouped(flat, groups, first, end, scaling, dropout)

    parts = [grouped(plan.blocks[0], 0, heads - moved)] if moved < heads else []
    parts += [grouped(plan.blocks[1], heads - moved, heads)] if moved else []
    found = torch.cat(parts, 1)  # (n, H, Dv)
    result = found.new_zeros(rows, width, heads, value.size(-1))
    if len(plan.dense_rows):
        result = result.index_copy(0, plan.dense_rows, full(plan.dense_rows).to(found.dtype))
    result = result.flatten(0, 1).index_copy(0, plan.tokens, found)
    if plan.short is not None:
        tokens, groups = plan.short
        result = result.index_copy(0, tokens, grouped(groups, 0, heads))
    return result.view(rows, width, heads, -1)


def _grouped(flat: list[Tensor], groups: Groups, first: int, end: int, scaling: float, dropout: float) -> Tensor:
    """(n, end - first, Dv): attention inside the groups of the query heads `first` to `end - 1`."""
    query, key, value = flat
    times = query.size(1) // key.size(1)
    low, high = first // times, (end - 1) // times + 1
    seen = torch.cat([groups.sink_slots, groups.slots], 1)

    def gathered(part: Tensor, slots: Tensor) -> Tensor:
        return (
            part.index_select(0, slots.flatten()).unflatten(0, slots.shape).transpose(1, 2)
        )  # (S groups, h, slots, D)

    def shared(part: Tensor) -> Tensor:
        found = gathered(part[:, low:high], seen)
        own = torch.arange(first, end, device=part.device) // times - low
        return found if times == 1 else found.index_select(1, own)

    found = scaled_dot_product_attention(
        gathered(query[:, first:end], groups.slots),
        shared(key),
        shared(value),
        attn_mask=groups.visible,
        dropout_p=dropout,
        scale=scaling,
    )
    return found.transpose(1, 2).flatten(0, 1).index_select(0, groups.place)


def _repeated(key: Tensor, value: Tensor, heads: int) -> tuple[Tensor, Tensor]:
    times = heads // key.size(1)
    return key.repeat_interleave(times, 1), value.repeat_interleave(times, 1)


def sample_numbers(mask: Tensor | None, query: Tensor) -> Tensor:
    """`token_numbers` of a call, (B, T); None: no padding, every row one sample."""
    if mask is not None:
        return token_numbers(mask).expand(query.size(0), -1)
    return torch.arange(query.size(2), device=query.device).expand(query.size(0), -1)


def check_shapes(query: Tensor, key: Tensor, mask: Tensor | None) -> None:
    """Raise ValueError where queries, keys and mask are not those of causal attention without a cache."""
    rows, heads, width, _ = query.shape
    if key.size(2) != width or heads % key.size(1):
        raise ValueError(
            f"query {tuple(query.shape)}, key {tuple(key.shape)}; allowed: as many keys as queries, and query heads "
            "that are a multiple of key heads"
        )
    if mask is None:
        return
    plain = tuple(mask.shape) == (rows, width)
    square = mask.dim() == 4 and tuple(mask.shape[1:]) == (1, width, width) and mask.size(0) in (1, rows)
    if not plain and not (square and mask.dtype == torch.bool):
        raise ValueError(
            f"attention mask {tuple(mask.shape)} of {mask.dtype}; allowed: (B, T), or bool (B, 1, T, T) as "
            f"transformers makes it for sdpa, with B={rows}, T={width}"
        )
