"""Rows of reasoning-gym tasks: a weighted mixture, generated from a seed."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from typing import Any

from datasets import Dataset

from rltok.config import ConfigError
from rltok.data.config import DataConfig, TaskSpec
from rltok.data.prompts import fill, make_prompt, prompt_key, template_fields
from rltok.rewards.entries import encode_entry

CHUNK = 256
"""Entries per reasoning-gym dataset: the work of some tasks grows with their size, and some refuse large sizes."""
MAX_TRIES_PER_ROW = 20
"""A task that finds so many times in a row nothing new is exhausted."""
FIELDS = ("question", "answer", "metadata")
"""What a template may name."""

Row = dict[str, Any]


def heldout_rows(config: DataConfig) -> list[Row]:
    """The held-out rows: distinct prompts, a function of `split_seed` only.

    Raises:
        ConfigError: the tasks have too few distinct problems.
    """
    return _draw(config, config.heldout_size or 0, f"heldout/{config.split_seed}", set(), distinct=True)


def train_rows(config: DataConfig, seed: int, heldout: list[Row]) -> list[Row]:
    """The training rows: no held-out prompt among them; prompts may repeat where the task is small.

    Raises:
        ConfigError: the tasks have too few problems beside the held-out ones.
    """
    taken = {prompt_key(row["prompt"]) for row in heldout}
    return _draw(config, config.train_size or 0, f"train/{seed}", taken, distinct=False)


def to_dataset(rows: list[Row]) -> Dataset:
    """Rows as a `Dataset`, with columns also where there are no rows."""
    names = ("prompt", "answer", "task", "entry", "task_options", "difficulty")
    return Dataset.from_dict({name: [row[name] for row in rows] for name in names})


def turns(weights: list[float], count: int) -> Iterator[int]:
    """Index of the mixture's task for each of `count` rows: evenly interleaved, counts within one of the weights.

    Smooth weighted round robin: every task gains its weight per row, the richest one is taken and pays the total.
    """
    credit = [0.0] * len(weights)
    for _ in range(count):
        credit = [c + w for c, w in zip(credit, weights, strict=True)]
        chosen = max(range(len(weights)), key=credit.__getitem__)
        credit[chosen] -= sum(weights)
        yield chosen


def entry_difficulty(entry: Mapping[str, Any]) -> str:
    """Short text such as `num_terms=4 num_digits=1`, the entry's own value where it has one, else the range."""
    metadata = entry["metadata"]
    parts = []
    for name, span in (metadata.get("difficulty") or {}).items():
        own = metadata.get(name, span)
        value = own if isinstance(own, int | float | str) else span
        is_span = isinstance(value, list | tuple) and len(value) == 2 and all(isinstance(v, int | float) for v in value)
        parts.append(f"{name}={_span(value) if is_span else value}")
    return " ".join(parts)


def _draw(config: DataConfig, count: int, stream: str, taken: set[str], distinct: bool) -> list[Row]:
    """`count` rows whose prompts are not in `taken` (nor, if distinct, in each other)."""
    mixture = config.mixture
    taken = set(taken)
    sources = [_entries(spec, f"{stream}/{i}") for i, spec in enumerate(mixture)]
    templates = [spec.template or config.template for spec in mixture]
    paths = [f"data.tasks[{i}].template" if spec.template else "data.template" for i, spec in enumerate(mixture)]
    for template, path in zip(templates, paths, strict=True):
        if template is not None:
            template_fields(template, FIELDS, path)
    rows: list[Row] = []
    for turn in turns([spec.weight for spec in mixture], count):
        for _ in range(MAX_TRIES_PER_ROW):
            row = _row(config, mixture[turn], next(sources[turn]), templates[turn], paths[turn])
            key = prompt_key(row["prompt"])
            if key not in taken:
                break
        else:
            raise _exhausted(mixture[turn], stream, len(rows), count)
        if distinct:
            taken.add(key)
        rows.append(row)
    return rows


def _entries(spec: TaskSpec, stream: str) -> Iterator[dict[str, Any]]:
    """Endless entries of a task. Seeds are hashed: reasoning-gym's item i of seed s is item 0 of seed s + i."""
    import reasoning_gym

    chunk = 0
    while True:
        digest = hashlib.sha256(f"{stream}/{chunk}".encode()).digest()
        seed = int.from_bytes(digest[:4], "big") >> 1  # 31 bits: what every task's generator takes
        made = reasoning_gym.create_dataset(spec.task, seed=seed, size=CHUNK, **spec.options)
        for i in range(CHUNK):
            yield made[i]
        chunk += 1


def _row(config: DataConfig, spec: TaskSpec, entry: dict[str, Any], template: str | None, path: str) -> Row:
    text = entry["question"]
    if template is not None:
        text = fill(template, {name: entry[name] for name in FIELDS}, path)
    return {
        "prompt": make_prompt(text, config.system, config.conversational),
        "answer": "" if entry["answer"] is None else str(entry["answer"]),
        "task": spec.task,
        "entry": encode_entry(entry),
        "task_options": json.dumps(spec.options, sort_keys=True),
        "difficulty": entry_difficulty(entry) if spec.difficulty is None else spec.difficulty,
    }


def _exhausted(spec: TaskSpec, stream: str, found: int, wanted: int) -> ConfigError:
    is_heldout = stream.startswith("heldout")
    setting = "data.heldout_size" if is_heldout else "data.train_size"
    other = "" if is_heldout else " beside the held-out ones; lower data.heldout_size"
    return ConfigError(
        f"{setting}: {wanted} rows are wanted, but after {found} rows the task {spec.task!r} with options "
        f"{spec.options} gave no new prompt in {MAX_TRIES_PER_ROW} tries{other}; lower {setting} or widen the "
        "task's options",
        setting,
    )


def _span(value: Any) -> str:
    low, high = value
    return str(low) if low == high else f"{low}-{high}"
