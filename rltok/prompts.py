"""Prompts and rows that commands read: from files, as text or conversations, in tokens."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rltok.config import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Prompt = str | list[dict[str, Any]]
"""Text, or a conversation of messages with role and content."""
Row = dict[str, Any]

FILE_SUFFIXES = (".jsonl", ".parquet")


# Files


def read_rows(
    path: Path, option: str, required: Sequence[str], others: Sequence[str] | None = None, rows: int | None = None
) -> list[Row]:
    """Rows of a JSON-lines or Parquet file.

    Args:
        option: of the command line, for messages.
        required: columns that every row must have.
        others: columns that are kept beside them where the file has them; None keeps all.
        rows: the first so many; None reads all.

    Raises:
        ConfigError: no such file, another kind of file, unreadable, without rows, or a column that is missing.
    """
    if not path.is_file():
        raise ConfigError(f"{option} {path}: there is no such file")
    if path.suffix.lower() not in FILE_SUFFIXES:
        kinds = ", ".join(FILE_SUFFIXES)
        raise ConfigError(f"{option} {path}: files of kind {path.suffix!r} cannot be read; allowed: {kinds}")
    reader = _read_parquet if path.suffix.lower() == ".parquet" else _read_json_lines
    table = reader(path, option, required, others, rows)
    if not table:
        raise ConfigError(f"{option} {path}: the file has no rows")
    return table


def _read_parquet(
    path: Path, option: str, required: Sequence[str], others: Sequence[str] | None, rows: int | None
) -> list[Row]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        file = pq.ParquetFile(path)
        names = file.schema_arrow.names
        _check_columns(names, required, f"{option} {path}")
        kept = names if others is None else [name for name in (*required, *others) if name in names]
        table = file.read(columns=kept)
    except (pa.ArrowException, OSError) as error:
        raise ConfigError(f"{option} {path}: cannot be read as Parquet: {error}") from error
    return table.slice(0, rows).to_pylist()


def _read_json_lines(
    path: Path, option: str, required: Sequence[str], others: Sequence[str] | None, rows: int | None
) -> list[Row]:
    table: list[Row] = []
    try:
        lines = path.read_text(encoding="utf-8").split("\n")  # splitlines() would also cut at U+2028 inside a text
    except (UnicodeDecodeError, OSError) as error:
        raise ConfigError(f"{option} {path}: cannot be read as UTF-8 text: {error}") from error
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        if len(table) == rows:
            break
        where = f"{option} {path}, line {number}"
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise ConfigError(f"{where}: not JSON ({error})") from error
        if not isinstance(row, dict):
            raise ConfigError(f"{where}: {row!r} is no object with {' and '.join(required)}")
        _check_columns(list(row), required, where)
        table.append(row if others is None else {k: v for k, v in row.items() if k in (*required, *others)})
    return table


def _check_columns(names: Sequence[str], required: Sequence[str], where: str) -> None:
    missing = [name for name in required if name not in names]
    if missing:
        found = ", ".join(names) or "none"
        raise ConfigError(f"{where}: there is no column {' and no '.join(missing)}; found: {found}")


# Prompts


def is_conversation(value: Any) -> bool:
    """Whether a value is a list of messages of text."""
    return (
        isinstance(value, list)
        and bool(value)
        and all(isinstance(m, dict) and isinstance(m.get("role"), str) for m in value)
        and all(isinstance(m.get("content"), str) for m in value)
    )


def check_prompt(prompt: Any, where: str) -> None:
    """Raise ConfigError unless a value is a prompt."""
    if not isinstance(prompt, str) and not is_conversation(prompt):
        raise ConfigError(f"{where}: prompt {prompt!r} is neither text nor a list of messages of text")


def asked_as(prompt: Prompt, chat: bool) -> Prompt:
    """A plain prompt as the user's message of a conversation, if `chat`."""
    return [{"role": "user", "content": prompt}] if chat and isinstance(prompt, str) else prompt


def prompt_tokens(
    tokenizer: PreTrainedTokenizerBase, prompt: Prompt, chat_template_kwargs: Mapping[str, Any] | None = None
) -> tuple[str, list[int]]:
    """A prompt as text and token ids: a conversation by the chat template, with the assistant's turn opened.

    Raises:
        ConfigError: a conversation without chat template, or a prompt of no tokens.
    """
    if isinstance(prompt, str):
        text, ids = prompt, tokenizer(prompt)["input_ids"]
    elif tokenizer.chat_template is None:
        raise ConfigError(
            "the prompt is a conversation, but the tokenizer has no chat template; give plain prompts, without --chat"
        )
    else:
        options = {"add_generation_prompt": True, "tokenize": False, **(chat_template_kwargs or {})}
        text = tokenizer.apply_chat_template(prompt, **options)
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    if not ids:
        raise ConfigError(f"the prompt {prompt!r} has no tokens; a completion needs at least one token before it")
    return text, ids


def token_texts(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> list[str]:
    """Text of every token alone, special tokens by name."""
    return [tokenizer.decode([token]) for token in ids]


# Words of the command line


def flag(name: str) -> str:
    """Option of the command line for a field's name."""
    return f"--{name.replace('_', '-')}"


def clip(text: str, length: int) -> str:
    """`text`, or its beginning with an ellipsis."""
    return text if len(text) <= length else text[: length - 1] + "\N{HORIZONTAL ELLIPSIS}"
