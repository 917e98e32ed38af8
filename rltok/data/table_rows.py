"""Rows of a local file or a hub dataset: column map, answer pattern, template, held-out split."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from datasets import Dataset, concatenate_datasets
from datasets.exceptions import DatasetGenerationError, DatasetNotFoundError

from rltok.config import ConfigError, suggestion
from rltok.data.config import SUFFIXES, DataConfig
from rltok.data.prompts import fill, make_prompt, plain_text, prompt_key, template_fields

LoadHub = Callable[..., Any]

DEFAULT_HELDOUT_FRACTION = 0.1
NO_ROWS = "corresponds to no data"
"""What the datasets library says of a file without rows, if it says anything."""
RESERVED = frozenset(
    {
        "prompts",
        "completion",
        "completions",
        "completion_ids",
        "trainer_state",
        "log_extra",
        "log_metric",
        "environments",
    }
)
"""Names that the trainer passes to reward functions itself; columns of the source with these names are dropped."""


def read_file(path: str, base_dir: Path, setting: str) -> Dataset:
    """A JSON lines, Parquet, CSV or TSV file.

    Raises:
        ConfigError: no such file, unreadable, or without rows.
    """
    file = (base_dir / Path(path).expanduser()).resolve()
    if not file.is_file():
        message = f"{setting}: there is no file {str(file)!r} ({path!r} is relative to {str(base_dir)!r})"
        raise ConfigError(message, setting)
    reader = {"json": Dataset.from_json, "parquet": Dataset.from_parquet, "csv": Dataset.from_csv}
    options = {"sep": "\t"} if file.suffix.lower() == ".tsv" else {}
    if file.stat().st_size == 0:
        raise _no_rows(setting, path)
    try:
        table = reader[SUFFIXES[file.suffix.lower()]](str(file), **options)
    except (DatasetGenerationError, ValueError, OSError, StopIteration) as error:
        if isinstance(error, StopIteration) or NO_ROWS in str(error):
            raise _no_rows(setting, path) from error
        cause = error.__cause__ or error
        raise ConfigError(f"{setting}: {path!r} cannot be read: {type(cause).__name__}: {cause}", setting) from error
    return _not_empty(table, setting, path)


def read_hub(config: DataConfig, split: str, setting: str, load_hub: LoadHub) -> Dataset:
    """One split of a hub dataset.

    Raises:
        ConfigError: not found, no such configuration or split, or without rows.
    """
    try:
        table = load_hub(config.name, config.config_name, split=split, revision=config.revision)
    except (ValueError, FileNotFoundError, DatasetNotFoundError, ConnectionError) as error:
        what = f"{config.name!r} (config_name {config.config_name!r}, split {split!r}, revision {config.revision!r})"
        raise ConfigError(f"{setting}: {what} cannot be loaded: {type(error).__name__}: {error}", setting) from error
    if not isinstance(table, Dataset):
        raise ConfigError(f"{setting}: {split!r} gave a {type(table).__name__}, not the rows of one split", setting)
    return _not_empty(table, setting, f"{config.name} {split}")


def to_rows(table: Dataset, config: DataConfig) -> Dataset:
    """The source's rows with `prompt`, `answer` and the other mapped columns; prompts are distinct (first one kept).

    Raises:
        ConfigError: a missing column, a template field or an answer that does not fit.
    """
    columns = column_map(table, config)
    fields = (
        []
        if config.template is None
        else template_fields(config.template, [*table.column_names, *columns], "data.template")
    )
    used = {source.split(".")[0] for source in columns.values()} | {f for f in fields if f not in columns}
    made: dict[str, list[Any]] = {name: [] for name in columns}
    kept, seen = [], set()
    for index, row in enumerate(table.select_columns(sorted(used))):
        values = {ours: reach(row, source, f"data.columns.{ours}") for ours, source in columns.items()}
        if "answer" in values:
            values["answer"] = final_answer(values["answer"], config.answer_pattern, index)
        prompt = _prompt(row, values, config)
        key = prompt_key(prompt)
        if key in seen:
            continue
        seen.add(key)
        kept.append(index)
        for name, value in {**values, "prompt": prompt}.items():
            made[name].append(value)
    rows = table if len(kept) == len(table) else table.select(kept)
    others = [c for c in rows.column_names if c not in RESERVED and c not in made]
    ours = Dataset.from_dict(made)
    return concatenate_datasets([rows.select_columns(others), ours], axis=1) if others else ours


def column_map(table: Dataset, config: DataConfig) -> dict[str, str]:
    """Our column -> the source's, checked against the source."""
    wanted = {"prompt": "prompt", "answer": "answer", **config.columns}
    columns = {ours: source for ours, source in wanted.items() if source or ours != "answer"}
    for ours, source in columns.items():
        setting = f"data.columns.{ours}"
        if ours in RESERVED:
            raise ConfigError(f"{setting}: the trainer uses the name {ours!r} itself; choose another", setting)
        if source.split(".")[0] not in table.column_names and source not in table.column_names:
            hint = suggestion(source, table.column_names)
            raise ConfigError(f"{setting}: the source has no column {source!r}{hint}", setting)
    return columns


def reach(row: Mapping[str, Any], source: str, setting: str) -> Any:
    """Value of a column, or of a part of a column of mappings, `reward_model.ground_truth`."""
    if source in row:
        return row[source]
    value: Any = row
    for part in source.split("."):
        if not isinstance(value, Mapping) or part not in value:
            allowed = value if isinstance(value, Mapping) else ()
            raise ConfigError(f"{setting}: {source!r} has no {part!r} in a row{suggestion(part, allowed)}", setting)
        value = value[part]
    return value


def final_answer(value: Any, pattern: str | None, row: int) -> str:
    """Text of an answer; with a pattern its last match in it (the first group, if the pattern has one).

    Raises:
        ConfigError: the row has no answer, or the pattern does not match it.
    """
    if value is None:
        raise ConfigError(f"data.columns.answer: row {row} has no answer", "data.columns.answer")
    text = str(value).strip()
    if pattern is None:
        return text
    matches = list(re.finditer(pattern, text))
    if not matches:
        message = f"data.answer_pattern: {pattern!r} matches nothing in the answer of row {row}, {text[-80:]!r}"
        raise ConfigError(message, "data.answer_pattern")
    found = matches[-1].group(1 if matches[-1].re.groups else 0)
    return (found or "").strip()


def split_off(rows: Dataset, config: DataConfig) -> tuple[Dataset, Dataset]:
    """(train, held-out): the held-out prompts have the smallest hashes, so the order of the file does not matter.

    Raises:
        ConfigError: nothing would remain to train on.
    """
    keys = [prompt_key(prompt) for prompt in rows["prompt"]]
    count, setting = heldout_count(config, len(keys))
    if count >= len(keys):
        message = f"{setting}: {count} of {len(keys)} distinct prompts held out leaves none to train on; lower it"
        raise ConfigError(message, setting)
    order = sorted(range(len(keys)), key=lambda i: hashlib.sha256(f"{config.split_seed}/{keys[i]}".encode()).digest())
    chosen = set(order[:count])
    heldout = rows.select(sorted(chosen))
    return rows.select([i for i in range(len(keys)) if i not in chosen]), heldout


def without(rows: Dataset, heldout: Dataset) -> Dataset:
    """`rows` whose prompts are not held out.

    Raises:
        ConfigError: none is left.
    """
    taken = {prompt_key(prompt) for prompt in heldout["prompt"]}
    left = [i for i, prompt in enumerate(rows["prompt"]) if prompt_key(prompt) not in taken]
    if not left:
        raise ConfigError("data: every training prompt is also held out; choose another held-out split or file", "data")
    return rows if len(left) == len(rows) else rows.select(left)


def _prompt(row: Mapping[str, Any], values: Mapping[str, Any], config: DataConfig) -> Any:
    content = values["prompt"]
    if config.template is not None:
        known = {**row, **values, "prompt": plain_text(content, "data.columns.prompt")}
        content = fill(config.template, known, "data.template")
    elif content is None or content == "":
        raise ConfigError("data.columns.prompt: a row has an empty prompt", "data.columns.prompt")
    elif not isinstance(content, str | list):
        content = str(content)
    return make_prompt(content, config.system, config.conversational)


def heldout_count(config: DataConfig, distinct: int) -> tuple[int, str]:
    """How many of so many distinct prompts are held out, and the setting that says so."""
    if config.heldout_size is not None:
        return config.heldout_size, "data.heldout_size"
    fraction = DEFAULT_HELDOUT_FRACTION if config.heldout_fraction is None else config.heldout_fraction
    count = round(fraction * distinct)
    return (max(count, 1) if fraction else 0), "data.heldout_fraction"


def _not_empty(table: Dataset, setting: str, what: str) -> Dataset:
    if len(table) == 0:
        raise _no_rows(setting, what)
    return table


def _no_rows(setting: str, what: str) -> ConfigError:
    return ConfigError(f"{setting}: {what!r} has no rows", setting)
