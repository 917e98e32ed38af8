"""How the rows of an update share forward passes: padding trimmed, passes balanced by tokens, rows packed.

`plan_micro_batches` groups rows of similar length, `pack_rows` puts several rows into one, and `pack_tokens`,
`packed_positions` and `unpack` move the numbers of tokens there and back. Everything here is about lengths; the
trainer's part is in `rltok.trainers.micro_batches` and `rltok.trainers.packed`.

Tensor legend: B samples, T tokens of the longest, R packed rows, W positions of a packed row.

Example: lengths (5, 9, 3, 7, 2, 8). Rows of at most 12 tokens by best fit decreasing: {1, 2}, {5, 4}, {3, 0}, 2 of 36
positions are padding. Micro-batches with n * max_len <= 16, longest first: [1], [5, 3], [0, 2, 4].
"""

from __future__ import annotations

import heapq
from bisect import bisect_left, insort
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from rltok.config import ConfigError


@dataclass(frozen=True)
class BatchingConfig:
    """Micro-batches of the policy update; the default leaves them as TRL cuts them, bit for bit."""

    balance: bool = False
    """regroup the rows of every optimizer step: rows of similar length share a micro-batch, and lose their padding"""
    max_tokens: int | None = None
    """most tokens of one forward pass of the update, padding included; needs `balance`; a longer row goes alone;
    None: no limit"""
    pack: bool = False
    """put several rows into one, without padding; they do not see each other"""
    multiple_of: int = 1
    """widths are rounded up to this, for kernels that are compiled per shape"""

    def __post_init__(self) -> None:
        for name in ("max_tokens", "multiple_of"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"batching.{name}: {value} must be >= 1", f"batching.{name}")
        if self.max_tokens is not None and not self.balance:
            raise ConfigError(
                f"batching.max_tokens: {self.max_tokens} limits the passes that batching.balance=true makes; with "
                "balance=false TRL cuts them. Set balance: true, or remove max_tokens",
                "batching.max_tokens",
            )
        if self.max_tokens is not None and self.multiple_of > self.max_tokens:
            raise ConfigError(
                f"batching.multiple_of: {self.multiple_of} rounds every width beyond batching.max_tokens="
                f"{self.max_tokens}. Lower it, or raise max_tokens",
                "batching.multiple_of",
            )
        if self.multiple_of > 1 and self.is_neutral:
            raise ConfigError(
                f"batching.multiple_of: {self.multiple_of} rounds the widths that batching.balance=true or "
                "batching.pack=true choose; both are false. Set one of them, or multiple_of: 1",
                "batching.multiple_of",
            )

    @property
    def is_neutral(self) -> bool:
        """True if micro-batches stay TRL's."""
        return not (self.balance or self.pack)


# ---------------------------------------------------------------------- micro-batches


def plan_micro_batches(
    lengths: Sequence[int],
    n_slices: int | None = None,
    max_tokens: int | None = None,
    heads: Sequence[int] | None = None,
    padded: bool = True,
) -> list[list[int]]:
    """Group samples into micro-batches; every sample is in exactly one, none is empty, the longest samples come first.

    The cost of a micro-batch is n * max_len, its tokens with padding. The micro-batches of an optimizer step run one
    after the other, and ranks wait for each other only at its end, so the time of a rank is the *sum* of the costs and
    its peak memory the *largest* one. Neighbours in the order of length are grouped:

        n_slices                the least sum among groupings whose largest cost is at most that of equal cuts of the
                                sorted list: never slower and never larger than equal counts
        max_tokens              longest first, each micro-batch as long as n * max_len <= max_tokens
        both                    the least sum with n_slices micro-batches within max_tokens; more of them where
                                max_tokens needs more
        neither                 one micro-batch

    `padded=False` is for packed rows: the cost is the sum of lengths. The sum over micro-batches is then the same for
    every grouping, and only the largest counts: longest processing time first.

    Args:
        lengths: (n,) tokens of each sample.
        n_slices: number of micro-batches.
        max_tokens: most tokens of a micro-batch, padding included; a longer sample goes alone.
        heads: (n,) how many of a sample's tokens are padded apart, at its left (a prompt): max_len is then the longest
            head plus the longest rest. None: 0.
        padded: whether a micro-batch is padded to its longest sample.

    Returns:
        Lists of indices into `lengths`.

    Raises:
        ValueError: names the argument: a length below 0, heads longer than their samples, n_slices outside
            [1, n], max_tokens < 1.
    """
    _check_plan(lengths, n_slices, max_tokens, heads)
    count = len(lengths)
    if count == 0:
        return []
    if n_slices is None and max_tokens is None:
        return [list(range(count))]
    if not padded:
        return _plan_packed(lengths, n_slices, max_tokens)
    orders = [sorted(range(count), key=lambda i: (-lengths[i], i))]
    if heads is not None and any(heads):
        orders.append(sorted(range(count), key=lambda i: (heads[i] - lengths[i], i)))
    plans = [_plan_padded(_costs(lengths, heads, order), order, n_slices, max_tokens) for order in orders]
    return min(plans, key=lambda plan: (len(plan[0]), plan[1]))[0]


def _check_plan(
    lengths: Sequence[int], n_slices: int | None, max_tokens: int | None, heads: Sequence[int] | None
) -> None:
    _check_lengths(lengths)
    if n_slices is not None and not 1 <= n_slices <= len(lengths):
        raise ValueError(
            f"n_slices={n_slices} for {len(lengths)} lengths: each slice needs a sample, so 1 <= n_slices <= n"
        )
    if max_tokens is not None and max_tokens < 1:
        raise ValueError(f"max_tokens={max_tokens} must be >= 1, or None for no limit")
    if heads is None:
        return
    if len(heads) != len(lengths):
        raise ValueError(f"heads has {len(heads)} entries but lengths has {len(lengths)}")
    for index, (head, length) in enumerate(zip(heads, lengths, strict=True)):
        if not 0 <= head <= length:
            raise ValueError(f"heads[{index}]={head} must lie in [0, lengths[{index}]={length}]")


def _check_lengths(lengths: Sequence[int]) -> None:
    for index, length in enumerate(lengths):
        if length < 0:
            raise ValueError(f"lengths[{index}]={length} must be >= 0")


def _costs(lengths: Sequence[int], heads: Sequence[int] | None, order: list[int]) -> np.ndarray:
    """(n, n) cost of the samples order[j : i + 1] at [j, i]; below the diagonal infinite."""
    n = len(order)
    head = np.array([heads[i] for i in order] if heads is not None else [0] * n, dtype=np.float64)
    tail = np.array([lengths[i] for i in order], dtype=np.float64) - head
    inside = np.triu(np.ones((n, n), dtype=bool))
    widest = sum(np.maximum.accumulate(np.where(inside, part, -1.0), axis=1) for part in (head, tail))
    counts = np.arange(n)[None, :] - np.arange(n)[:, None] + 1
    return np.where(inside, counts * widest, np.inf)


def _plan_padded(
    costs: np.ndarray, order: list[int], n_slices: int | None, max_tokens: int | None
) -> tuple[list[list[int]], float]:
    """Contiguous groups of `order`, and what they cost together."""
    greedy = None if max_tokens is None else _greedy_cuts(costs, max_tokens)
    if n_slices is None:
        assert greedy is not None
        cuts = greedy
    else:
        parts = n_slices if greedy is None else max(n_slices, len(greedy) - 1)
        equal = _equal_cuts(len(order), parts)
        limit = max(_cut_costs(costs, equal))
        if max_tokens is not None and limit > max_tokens:
            limit = max_tokens
        cuts = _cheapest_cuts(costs, parts, limit)
    groups = [order[a:b] for a, b in zip(cuts, cuts[1:], strict=False)]
    return groups, sum(_cut_costs(costs, cuts))


def _cut_costs(costs: np.ndarray, cuts: list[int]) -> list[float]:
    return [float(costs[a, b - 1]) for a, b in zip(cuts, cuts[1:], strict=False)]


def _equal_cuts(count: int, parts: int) -> list[int]:
    """Places where `count` sorted samples are cut into equal counts; what does not divide goes to the shorter ones."""
    return [count * part // parts for part in range(parts + 1)]


def _greedy_cuts(costs: np.ndarray, max_tokens: int) -> list[int]:
    cuts = [0]
    for i in range(1, costs.shape[0]):
        if costs[cuts[-1], i] > max_tokens:
            cuts.append(i)
    return [*cuts, costs.shape[0]]


def _cheapest_cuts(costs: np.ndarray, parts: int, limit: float) -> list[int]:
    """The cut into `parts` groups of least total cost, each within `limit` or a single sample; O(parts n^2)."""
    n = costs.shape[0]
    # [i, j]: the group order[j : i + 1]; the minimum runs along memory
    allowed = np.ascontiguousarray(np.where((costs <= limit) | np.eye(n, dtype=bool), costs, np.inf).T)
    best, back, total = allowed[:, 0].copy(), [], np.empty_like(allowed)
    before = np.empty(n)
    for _ in range(parts - 1):
        before[0], before[1:] = np.inf, best[:-1]  # best cost of the samples in front of j
        np.add(allowed, before, out=total)
        back.append(total.argmin(axis=1))
        best = total[np.arange(n), back[-1]]
    cuts = [n]
    for starts in reversed(back):
        cuts.append(int(starts[cuts[-1] - 1]))
    return [0, *reversed(cuts)]


def _plan_packed(lengths: Sequence[int], n_slices: int | None, max_tokens: int | None) -> list[list[int]]:
    """Groups whose cost is their sum of lengths."""
    if max_tokens is None:
        assert n_slices is not None
        return _by_cost(_longest_processing_time(lengths, n_slices), lengths)
    rows = pack_rows(lengths, max_tokens)
    if n_slices is None:
        return _by_cost(rows, lengths)
    parts = max(n_slices, len(rows))
    even = _longest_processing_time(lengths, parts)
    if all(len(group) == 1 or sum(lengths[i] for i in group) <= max_tokens for group in even):
        return _by_cost(even, lengths)
    heap = [(-sum(lengths[i] for i in row), number, row) for number, row in enumerate(rows)]
    heapq.heapify(heap)
    done: list[list[int]] = []
    while len(heap) + len(done) < parts:  # halve the dearest group that can be halved
        cost, number, row = heapq.heappop(heap)
        if len(row) == 1:
            done.append(row)
            continue
        for half in _longest_processing_time([lengths[i] for i in row], 2):
            group = [row[i] for i in half]
            number += 2 * len(lengths)
            heapq.heappush(heap, (-sum(lengths[i] for i in group), number + group[0], group))
    return _by_cost([row for *_, row in heap] + done, lengths)


def _longest_processing_time(lengths: Sequence[int], parts: int) -> list[list[int]]:
    """Longest first, each to the group with the least tokens so far; among equals to the one with fewer samples."""
    groups: list[list[int]] = [[] for _ in range(parts)]
    heap = [(0, 0, part) for part in range(parts)]
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        total, size, part = heap[0]
        groups[part].append(index)
        heapq.heapreplace(heap, (total + lengths[index], size + 1, part))
    return groups


def _by_cost(groups: list[list[int]], lengths: Sequence[int]) -> list[list[int]]:
    return sorted(groups, key=lambda group: (-sum(lengths[i] for i in group), group))


# ---------------------------------------------------------------------- packed rows


def pack_rows(lengths: Sequence[int], max_tokens: int) -> list[list[int]]:
    """Put samples into rows of at most `max_tokens` tokens by best fit decreasing; O(n log n) comparisons.

    The longest sample first, each into the fullest row that has room, a new row where none has. A sample longer than
    `max_tokens` is alone in its row; nothing is cut or dropped.

    Args:
        lengths: (n,) tokens of each sample.
        max_tokens: tokens of a row.

    Returns:
        Rows in the order they were opened, as indices into `lengths` in the order they were placed.

    Raises:
        ValueError: a length below 0, max_tokens < 1.
    """
    _check_lengths(lengths)
    if max_tokens < 1:
        raise ValueError(f"max_tokens={max_tokens} must be >= 1")
    rows: list[list[int]] = []
    room: list[tuple[int, int]] = []  # (free tokens, row), sorted
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        length = lengths[index]
        place = bisect_left(room, (length, -1))
        if length <= max_tokens and place < len(room):
            free, row = room.pop(place)
        else:
            free, row = max_tokens, len(rows)
            rows.append([])
        rows[row].append(index)
        insort(room, (free - length, row))
    return rows


def packed_places(rows: Sequence[Sequence[int]], lengths: Sequence[int], width: int) -> Tensor:
    """(B, T) where each token of a sample lies in the flattened (R, W) rows, -1 beyond the sample's end.

    Args:
        rows: samples of each row, in the order in which they lie there; every sample once.
        lengths: (B,) tokens of each sample.
        width: W.

    Raises:
        ValueError: a sample missing from `rows` or there twice, or a row wider than `width`.
    """
    placed = sorted(index for row in rows for index in row)
    if placed != list(range(len(lengths))):
        raise ValueError(f"rows={rows} must hold each of the {len(lengths)} samples of lengths exactly once")
    starts = [0] * len(lengths)
    for number, row in enumerate(rows):
        at = 0
        for index in row:
            starts[index] = number * width + at
            at += lengths[index]
        if at > width:
            raise ValueError(f"row {number} of rows holds {at} tokens, more than width={width}")
    token = torch.arange(max(lengths, default=0))
    places = torch.tensor(starts)[:, None] + token
    return places.masked_fill(token >= torch.tensor(lengths)[:, None], -1)


def packed_width(rows: Sequence[Sequence[int]], lengths: Sequence[int], multiple: int = 1) -> int:
    """W: tokens of the fullest row, rounded up to a multiple; at least 1."""
    widest = max((sum(lengths[i] for i in row) for row in rows), default=0)
    return -(-max(widest, 1) // multiple) * multiple


def pack_tokens(
    values: Tensor, rows: Sequence[Sequence[int]], lengths: Sequence[int], fill: float = 0, width: int | None = None
) -> Tensor:
    """(B, T) values of tokens, samples at the left -> (R, W), samples of a row one behind the other, then `fill`.

    The inverse of `unpack`.

    Args:
        values: (B, T); entries beyond a sample's length are left out.
        rows: see `packed_places`.
        lengths: (B,) tokens of each sample.
        fill: what padding holds.
        width: W; None: the fullest row.

    Raises:
        ValueError: see `packed_places`.
    """
    width = packed_width(rows, lengths) if width is None else width
    places = packed_places(rows, lengths, width).to(values.device)
    flat = values.new_full((len(rows) * width,), fill)
    there = places >= 0
    flat[places[there]] = values[:, : places.size(1)][there]
    return flat.view(len(rows), width)


def packed_positions(rows: Sequence[Sequence[int]], lengths: Sequence[int], width: int | None = None) -> Tensor:
    """(R, W) position ids that restart at 0 with every sample, and with the padding behind the last one.

    Raises:
        ValueError: see `packed_places`.
    """
    width = packed_width(rows, lengths) if width is None else width
    used = torch.tensor([sum(lengths[i] for i in row) for row in rows])
    padding = (torch.arange(width) - used[:, None]).clamp(min=0)
    token = torch.arange(max(lengths, default=0)).expand(len(lengths), -1)
    return pack_tokens(token, rows, lengths, width=width) + padding


def unpack(values: Tensor, rows: Sequence[Sequence[int]], lengths: Sequence[int]) -> Tensor:
    """(R, W) values of packed rows -> (B, T), each sample at the left of its own row again, 0 behind it.

    Gradients flow through. One gather; no loop over tokens.

    Args:
        values: (R, W) one value per position.
        rows: see `packed_places`.
        lengths: (B,) tokens of each sample.

    Raises:
        ValueError: see `packed_places`.
    """
    places = packed_places(rows, lengths, values.size(1)).to(values.device)
    taken = values.reshape(-1)[places.clamp(min=0)]
    return taken.masked_fill(places < 0, 0)
