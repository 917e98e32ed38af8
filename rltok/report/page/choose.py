"""Which groups of completions a page holds when not all fit: whole groups, spread evenly over the run."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Iterable, Sequence
from typing import NamedTuple, TypeVar

T = TypeVar("T", bound=Hashable)


class Group(NamedTuple):
    """The recorded completions of one prompt in one generation batch."""

    rollout: int
    group: int
    step: int
    rows: int
    tokens: int


def spread(items: Sequence[T]) -> list[T]:
    """First, last, then ever finer midpoints: every prefix lies evenly over the items."""
    if len(items) < 3:
        return list(items)
    order = [0, len(items) - 1]
    gaps = [(0, len(items) - 1)]
    while gaps:
        halves = []
        for low, high in gaps:
            middle = (low + high) // 2
            if low < middle < high:
                order.append(middle)
                halves += [(low, middle), (middle, high)]
        gaps = halves
    return [items[index] for index in order]


def priority(groups: Iterable[Group]) -> list[Group]:
    """Groups, those to show first in front: one of every rollout before a second one of any."""
    by_rollout: dict[int, list[Group]] = defaultdict(list)
    for group in sorted(groups):
        by_rollout[group.rollout].append(group)
    order = spread(sorted(by_rollout))
    rounds = max((len(members) for members in by_rollout.values()), default=0)
    return [by_rollout[rollout][turn] for turn in range(rounds) for rollout in order if turn < len(by_rollout[rollout])]


def fitting(groups: Sequence[Group], max_tokens: float, max_rows: int | None = None) -> list[Group]:
    """The longest prefix within the limits, but at least one group; in the order of the run."""
    chosen: list[Group] = []
    tokens = rows = 0
    for group in groups:
        tokens, rows = tokens + group.tokens, rows + group.rows
        if chosen and (tokens > max_tokens or (max_rows is not None and rows > max_rows)):
            break
        chosen.append(group)
    return sorted(chosen)
