"""Rows for supervised fine-tuning: texts, conversations, or prompts with completions, from the section `data`.

    source          rows
    reasoning_gym   problems of chain_sum and countdown with worked solutions (`rltok.tiny`); needs no network
    file, hub       columns `prompt` and `completion`, or `messages`, or `text`; `data.columns` renames

What TRL's SFTTrainer makes of them is its own: the chat template, the end-of-sequence token, labels of -100 on prompts.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import datasets
from datasets import Dataset

from rltok import tiny
from rltok.config import ConfigError, suggestion
from rltok.data import table_rows
from rltok.data.config import DataConfig
from rltok.data.load import DataSplits, load_data
from rltok.data.prompts import fill, make_prompt, plain_text, prompt_key, template_fields
from rltok.rewards.entries import decode_entry

FORMS = (("prompt", "completion"), ("messages",), ("text",))
"""Columns that make up a row to train on; the first form that is there counts."""
UNUSED = ("answer_pattern", "max_prompt_tokens", "long_prompts")
"""Settings of `DataConfig` that mean nothing here."""


@dataclass(frozen=True)
class SFTDataConfig(DataConfig):
    """Training and held-out rows of supervised fine-tuning."""

    habits: Literal["careful", "mixed"] = "careful"
    """reasoning_gym: worked solutions without mistakes, or of mixed quality as the embedded model saw last"""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.habits not in ("careful", "mixed"):
            raise ConfigError(f"data.habits: {self.habits!r}; allowed: careful, mixed", "data.habits")
        if self.habits != "careful" and self.source != "reasoning_gym":
            raise ConfigError(
                f"data.habits: belongs to source: reasoning_gym, but data.source is {self.source}", "data.habits"
            )
        for name in UNUSED:
            if getattr(self, name) != getattr(type(self), name):
                where = f"data.{name}"
                raise ConfigError(
                    f"{where}: has no meaning for supervised fine-tuning; training.max_length cuts long rows", where
                )
        for i, spec in enumerate(self.mixture if self.source == "reasoning_gym" else ()):
            if spec.task not in tiny.PROMPTS:
                where = "data.task" if self.task else f"data.tasks[{i}].task"
                raise ConfigError(
                    f"{where}: there are no worked solutions of {spec.task!r}{suggestion(spec.task, tiny.PROMPTS)}",
                    where,
                )


def load_sft_data(config: SFTDataConfig, seed: int = 0, *, load_hub: Any = datasets.load_dataset) -> DataSplits:
    """Training and held-out rows with the columns of one form of `FORMS`; the held-out ones keep the source's others.

    Args:
        config: the section `data`.
        seed: training seed; changes which problems reasoning-gym generates and how they are solved, never the held-out
            rows.
        load_hub: called as `load_hub(name, config_name, split=..., revision=...)`.

    Raises:
        ConfigError: missing file, column or split, no rows, or a template that does not fit.
    """
    if config.source == "reasoning_gym":
        splits = load_data(config, seed)
        train = _solved(splits.train, config, f"train/{seed}")
        heldout = _solved(splits.heldout, config, f"heldout/{config.split_seed}")
        return DataSplits(train.select_columns(["prompt", "completion"]), heldout)
    return _table_splits(config, load_hub)


def _solved(rows: Dataset, config: SFTDataConfig, stream: str) -> Dataset:
    """Problems with a worked solution each."""
    rng = random.Random(stream)
    habits: Mapping[str, float] | None = {} if config.habits == "careful" else None
    texts = [tiny.write_demonstration(decode_entry(entry), rng, habits) for entry in rows["entry"]]
    completions: list[Any] = [_answered(text, config.conversational) for text in texts]
    return rows.add_column("completion", completions)


def _answered(text: Any, conversational: bool) -> Any:
    """A completion as the trainer takes it: an assistant's message, or plain text; ready messages as they are."""
    if isinstance(text, list) and conversational:
        return [dict(message) for message in text]
    if not isinstance(text, str) or not text:
        raise ConfigError(
            f"data.columns.completion: a row holds {str(text)[:80]!r}; allowed: text"
            + (", or messages" if conversational else ""),
            "data.columns.completion",
        )
    return [{"role": "assistant", "content": text}] if conversational else text


# Files and hub


def _table_splits(config: SFTDataConfig, load_hub: Any) -> DataSplits:
    if config.source == "file":
        assert config.path is not None
        table = table_rows.read_file(config.path, Path.cwd(), "data.path")
        own = config.heldout_path and table_rows.read_file(config.heldout_path, Path.cwd(), "data.heldout_path")
    else:
        table = table_rows.read_hub(config, config.split or "train", "data.split", load_hub)
        own = config.heldout_split and table_rows.read_hub(config, config.heldout_split, "data.heldout_split", load_hub)
    form = row_form(table, config)
    rows = _rows(table, config, form)
    if own:
        heldout = _rows(own, config, form)
        taken = set(_keys(heldout, form))
        train = rows.select([i for i, key in enumerate(_keys(rows, form)) if key not in taken])
    else:
        train, heldout = _split_off(rows, config, form)
    if len(train) == 0:
        raise ConfigError("data: every row is also held out, which leaves none to train on", "data")
    if config.max_rows is not None:
        train = train.select(range(min(config.max_rows, len(train))))
    return DataSplits(train.select_columns(list(form)), heldout)


def row_form(table: Dataset, config: SFTDataConfig) -> tuple[str, ...]:
    """The columns that make up a row: those that `data.columns` names, else the first form that the source has.

    Raises:
        ConfigError: the source lacks them.
    """
    named = {ours: source for ours, source in config.columns.items() if source}
    for ours, source in named.items():
        if source.split(".")[0] not in table.column_names and source not in table.column_names:
            where = f"data.columns.{ours}"
            raise ConfigError(
                f"{where}: the source has no column {source!r}{suggestion(source, table.column_names)}", where
            )
    there = {*table.column_names, *named}
    forms = [form for form in FORMS if set(form) <= there]
    chosen = [form for form in forms if set(form) & set(named)] or forms
    if not chosen:
        raise ConfigError(
            f"data.columns: the source has the columns {', '.join(table.column_names)}; needed are prompt and "
            "completion, or messages, or text: name them, such as {prompt: question, completion: answer}",
            "data.columns",
        )
    form = chosen[0]
    for name in ("template", "system"):
        if getattr(config, name) is not None and form != FORMS[0]:
            where = f"data.{name}"
            raise ConfigError(f"{where}: makes prompts, but the rows are whole ({form[0]}); remove it", where)
    return form


def _rows(table: Dataset, config: SFTDataConfig, form: Sequence[str]) -> Dataset:
    """The source's rows with the columns of `form` in place, and the other mapped ones."""
    named = {ours: source for ours, source in config.columns.items() if source}
    columns = {name: named.get(name, name) for name in form} | named
    fields: list[str] = []
    if config.template is not None:
        fields = template_fields(config.template, [*table.column_names, *columns], "data.template")
    used = {source.split(".")[0] for source in columns.values()} | {f for f in fields if f not in columns}
    made: dict[str, list[Any]] = {name: [] for name in columns}
    for row in table.select_columns(sorted(used)):
        values = {ours: table_rows.reach(row, source, f"data.columns.{ours}") for ours, source in columns.items()}
        if form[0] == "prompt":
            values |= {"prompt": _prompt(row, values, config)}
            values |= {"completion": _answered(values["completion"], config.conversational)}
        elif not values[form[0]]:
            raise ConfigError(f"data.columns.{form[0]}: a row is empty", f"data.columns.{form[0]}")
        for name, value in values.items():
            made[name].append(value)
    others = [name for name in table.column_names if name not in made]
    ours = Dataset.from_dict(made)
    return datasets.concatenate_datasets([table.select_columns(others), ours], axis=1) if others else ours


def _prompt(row: Mapping[str, Any], values: Mapping[str, Any], config: SFTDataConfig) -> Any:
    content = values["prompt"]
    if config.template is not None:
        known = {**row, **values, "prompt": plain_text(content, "data.columns.prompt")}
        content = fill(config.template, known, "data.template")
    elif content is None or content == "":
        raise ConfigError("data.columns.prompt: a row has an empty prompt", "data.columns.prompt")
    return make_prompt(content, config.system, config.conversational)


def _keys(rows: Dataset, form: Sequence[str]) -> list[str]:
    """What may not be in both splits: the prompt, or the whole row."""
    return [prompt_key(value) for value in rows[form[0]]]


def _split_off(rows: Dataset, config: SFTDataConfig, form: Sequence[str]) -> tuple[Dataset, Dataset]:
    """(train, held-out): distinct prompts with the smallest hashes are held out, with all their rows."""
    keys = _keys(rows, form)
    distinct = sorted(set(keys), key=lambda key: hashlib.sha256(f"{config.split_seed}/{key}".encode()).digest())
    count, setting = table_rows.heldout_count(config, len(distinct))
    if count >= len(distinct):
        raise ConfigError(
            f"{setting}: {count} of {len(distinct)} distinct rows held out leaves none to train on; lower it", setting
        )
    chosen = set(distinct[:count])
    train = rows.select([i for i, key in enumerate(keys) if key not in chosen])
    return train, rows.select([i for i, key in enumerate(keys) if key in chosen])
