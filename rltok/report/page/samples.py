"""The inspector's data: rows of completions, packed token columns, and what was left out.

Completions lie in chunks of whole groups. A chunk is one data block of the page, and each of its columns is packed on
its own, so that a page decodes only what it shows.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from rltok.report.page.choose import Group, fitting, priority
from rltok.report.page.encode import pack_counts, pack_floats, pack_json, pack_small
from rltok.report.page.quantities import Quantity, all_quantities, derive
from rltok.report.page.tokens import TokenTable
from rltok.report.schema import REWARD_PREFIX, quantities

CHUNK_TOKENS = 32_768
"""A chunk ends with the first group that reaches this."""
TRIAL_TOKENS = 40_000
"""Packed on trial to learn how many bytes a token takes."""
HEAD = 120
"""Characters of a completion that the list shows."""
KEYS = ["rollout", "step", "row", "group"]
SMALL = frozenset(column.name for column in quantities() if column.dtype in ("bool", "int8"))
NOT_KNOWN = -128
"""A flag that was not recorded."""


@dataclass(frozen=True)
class RunSamples:
    """The packed completions of one run."""

    index: dict[str, Any]
    """what the page reads first: packed rows, prompts and tokens, chunks, columns, counts"""
    chunks: list[dict[str, str]] = field(default_factory=list)
    """packed columns of each chunk"""
    values: dict[str, NDArray[np.float64]] = field(default_factory=dict)
    """quantity -> its values at all tokens shown, for the range of the scale"""

    @property
    def size(self) -> int:
        """Characters in the page."""
        return _size(self.index) + sum(map(_size, self.chunks))


def _size(block: Mapping[str, Any]) -> int:
    return sum(len(value) for value in block.values() if isinstance(value, str)) + 64 * len(block)


def pack_samples(run: Any, max_bytes: float, max_completions: int | None = None) -> RunSamples:
    """The completions of a run, as many groups as fit into `max_bytes` of page.

    Args:
        run: has `samples(steps=None, columns=None) -> DataFrame` by the schema.
        max_bytes: size of what is returned, kept to about a percent; at least one group is shown.
        max_completions: no more than this many, but at least one group; None sets no bound.
    """
    keys = _frame(run.samples(columns=[*KEYS, "token_ids"]))
    if keys.empty:
        return RunSamples(_nothing())
    groups = _groups(keys)
    order = priority(groups)
    trial = fitting(order, TRIAL_TOKENS)
    per_token = _pack(run, trial, groups).size / max(sum(group.tokens for group in trial), 1)
    max_tokens = max_bytes / max(per_token, 0.1)
    while True:
        chosen = fitting(order, max_tokens, max_completions)
        packed = _pack(run, chosen, groups)
        if packed.size <= max_bytes or len(chosen) == 1:
            return packed
        max_tokens = min(0.98 * max_bytes / packed.size, 0.9) * sum(group.tokens for group in chosen)


def _frame(samples: pd.DataFrame | None) -> pd.DataFrame:
    if samples is None or len(samples) == 0:
        return pd.DataFrame()
    return samples.sort_values(["rollout", "group", "row"], kind="stable").reset_index(drop=True)


def _groups(keys: pd.DataFrame) -> list[Group]:
    lengths = keys["token_ids"].map(len)
    found = keys.assign(length=lengths).groupby(["rollout", "group"], sort=True)
    table = found.agg(step=("step", "first"), rows=("row", "size"), tokens=("length", "sum")).reset_index()
    return [
        Group(int(r.rollout), int(r.group), int(r.step), int(r.rows), int(r.tokens))
        for r in table.itertuples(index=False)
    ]


def _nothing() -> dict[str, Any]:
    return {"rows": 0, "recorded": 0, "tokens": 0, "chunks": [], "columns": [], "rewards": []}


def _pack(run: Any, chosen: Sequence[Group], groups: Sequence[Group]) -> RunSamples:
    wanted = {(group.rollout, group.group) for group in chosen}
    frame = _frame(run.samples(steps=sorted({group.step for group in chosen})))
    pairs = zip(frame["rollout"], frame["group"], strict=True)
    frame = frame[[pair in wanted for pair in pairs]].reset_index(drop=True)
    lengths = np.array([len(ids) for ids in frame["token_ids"]], dtype=np.int64)
    table = TokenTable()
    places = [
        table.index(np.asarray(ids, dtype=np.int64), list(texts), completion)
        for ids, texts, completion in zip(frame["token_ids"], frame["tokens"], frame["completion"], strict=True)
    ]
    recorded = [column for column in quantities() if column.name in frame and _known(frame[column.name])]
    columns = {column.name: _flat(frame[column.name], lengths) for column in recorded}
    bounds = _chunk_bounds(frame, lengths)
    starts = np.concatenate([[0], np.cumsum(lengths)])
    tokens = np.concatenate(places) if places else np.zeros(0, np.uint32)
    chunks = []
    for first, last in bounds:
        span = slice(int(starts[first]), int(starts[last]))
        chunk = {"tokens": pack_counts(tokens[span])}
        for name, values in columns.items():
            part = values[span]
            if not np.isnan(part).all():
                chunk[name] = _pack_column(name, part)
        chunks.append(chunk)
    rewards = [name for name in frame if name.startswith(REWARD_PREFIX) and frame[name].notna().any()]
    index = {
        "rows": len(frame),
        "recorded": sum(group.rows for group in groups),
        "groups": len(chosen),
        "recorded_groups": len(groups),
        "tokens": int(lengths.sum()),
        "recorded_tokens": sum(group.tokens for group in groups),
        "chunks": [first for first, _ in bounds],
        "columns": list(columns),
        "rewards": [name.removeprefix(REWARD_PREFIX) for name in rewards],
        "table": pack_json(_row_table(frame, lengths, rewards)),
        "vocabulary": pack_json(table.columns()),
    }
    return RunSamples(index, chunks, _values(columns, frame, lengths))


def _known(cells: pd.Series) -> bool:
    return any(_present(cell) for cell in cells)


def _present(cell: Any) -> bool:
    return cell is not None and not isinstance(cell, float)


def _flat(cells: pd.Series, lengths: NDArray[np.int64]) -> NDArray[np.float64]:
    """Lists of a column, one behind the other; NaN where a completion has none, or one of another length."""
    parts = []
    for cell, length in zip(cells, lengths, strict=True):
        values = np.asarray(cell, dtype=np.float64) if _present(cell) else np.zeros(0)
        parts.append(values if len(values) == length else np.full(length, np.nan))
    return np.concatenate(parts) if parts else np.zeros(0)


def _pack_column(name: str, values: NDArray[np.float64]) -> str:
    if name in SMALL:
        return pack_small(np.where(np.isnan(values), NOT_KNOWN, values))
    return pack_floats(values)


def _chunk_bounds(frame: pd.DataFrame, lengths: NDArray[np.int64]) -> list[tuple[int, int]]:
    """(first row, row after the last) of every chunk; a group is never cut."""
    bounds: list[tuple[int, int]] = []
    first = tokens = 0
    keys = list(zip(frame["rollout"], frame["group"], strict=True))
    for row in range(len(frame)):
        tokens += int(lengths[row])
        if row + 1 == len(frame) or (tokens >= CHUNK_TOKENS and keys[row + 1] != keys[row]):
            bounds.append((first, row + 1))
            first, tokens = row + 1, 0
    return bounds


def _row_table(frame: pd.DataFrame, lengths: NDArray[np.int64], rewards: Sequence[str]) -> dict[str, Any]:
    """The rows by columns; prompts once each."""
    prompts = {prompt: place for place, prompt in enumerate(dict.fromkeys(frame["prompt"].map(str)))}
    whole = {name: _whole(frame, name) for name in (*KEYS, "updates")}
    return whole | {
        "length": lengths.tolist(),
        "prompt": [prompts[str(prompt)] for prompt in frame["prompt"]],
        "prompts": list(prompts),
        "head": [str(text)[:HEAD] for text in frame["completion"]],
        "ended": [None if pd.isna(value) else int(value) for value in _column(frame, "ended")],
        "reward": _rounded(frame, "reward"),
        "advantage": _rounded(frame, "advantage"),
        "rewards": {name.removeprefix(REWARD_PREFIX): _rounded(frame, name) for name in rewards},
    }


def _column(frame: pd.DataFrame, name: str) -> list[Any]:
    return list(frame[name]) if name in frame else [None] * len(frame)


def _whole(frame: pd.DataFrame, name: str) -> list[int | None]:
    return [None if pd.isna(value) else int(value) for value in _column(frame, name)]


def _rounded(frame: pd.DataFrame, name: str) -> list[float | None]:
    """Five significant digits, as in the token columns; None where there is no finite number."""
    values = [math.nan if value is None else float(value) for value in _column(frame, name)]
    return [float(f"{value:.5g}") if math.isfinite(value) else None for value in values]


def _values(
    columns: Mapping[str, NDArray[np.float64]], frame: pd.DataFrame, lengths: NDArray[np.int64]
) -> dict[str, NDArray[np.float64]]:
    """Values of every quantity that can be had from the columns."""
    given = np.array([math.nan if value is None else float(value) for value in _column(frame, "advantage")])
    advantage = np.repeat(given, lengths) if len(given) else np.zeros(0)
    have = set(columns) | ({"advantage"} if np.isfinite(given).any() else set())
    found: dict[str, NDArray[np.float64]] = {}
    for quantity in all_quantities():
        if have.issuperset(quantity.columns):
            found[quantity.name] = _in_loss_only(quantity, derive(quantity, columns, advantage), columns)
    return found


def _in_loss_only(
    quantity: Quantity, values: NDArray[np.float64], columns: Mapping[str, NDArray[np.float64]]
) -> NDArray[np.float64]:
    """Zeros of tokens outside the loss say nothing of the range of credit."""
    if quantity.columns[0] in ("credit", "credit_used") and "in_loss" in columns:
        return values[columns["in_loss"] != 0]
    return values
