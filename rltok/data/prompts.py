"""From a row to a prompt: template, system prompt, plain or conversational."""

from __future__ import annotations

import json
import string
from collections.abc import Iterable, Mapping
from typing import Any

from rltok.config import ConfigError, suggestion

Message = dict[str, str]
Prompt = str | list[Message]


def template_fields(template: str, allowed: Iterable[str], path: str) -> list[str]:
    """The columns that a template names.

    Raises:
        ConfigError: a field that is not allowed, an empty one (literal braces must be doubled), or a broken template.
    """
    names = list(allowed)
    try:
        parsed = [name for _, name, _, _ in string.Formatter().parse(template) if name is not None]
    except ValueError as error:
        raise ConfigError(f"{path}: {template!r} is not a template: {error}; double literal braces", path) from error
    fields = []
    for name in parsed:
        head = name.split(".")[0].split("[")[0]
        if "." in name.split("[")[0]:
            raise ConfigError(
                f"{path}: {template!r} asks for an attribute, {name!r}; only columns and their parts in brackets are "
                f"filled in, such as {{{head}[key]}}",
                path,
            )
        if not head:
            raise ConfigError(f"{path}: {template!r} has an empty field {{}}; double literal braces, {{{{}}}}", path)
        if head not in names:
            hint = suggestion(head, names)
            raise ConfigError(f"{path}: {template!r} names {head!r}, which no row has{hint}", path)
        fields.append(head)
    return list(dict.fromkeys(fields))


def fill(template: str, values: Mapping[str, Any], path: str) -> str:
    """`template` with a row's values.

    Raises:
        ConfigError: a part of a field that the row lacks, such as `{metadata[terms]}`.
    """
    try:
        return template.format_map(values)
    except (KeyError, IndexError, AttributeError, TypeError, ValueError) as error:
        message = f"{path}: {template!r} does not fit a row: {type(error).__name__}: {error}"
        raise ConfigError(message, path) from error


def plain_text(value: Any, path: str) -> str:
    """Text of a prompt column that holds text, or messages of which one is the user's.

    Raises:
        ConfigError: anything else.
    """
    if isinstance(value, str):
        return value
    if isinstance(value, list):
        texts = [m["content"] for m in value if isinstance(m, Mapping) and m.get("role") == "user"]
        if len(texts) == 1:
            return str(texts[0])
    raise ConfigError(
        f"{path}: the prompt column holds {str(value)[:80]!r}, which is neither text nor messages with one user turn; "
        "a prompt of several turns needs data.conversational: true and no data.template",
        path,
    )


def make_prompt(content: Any, system: str | None, conversational: bool) -> Prompt:
    """A prompt as the trainer takes it.

    Args:
        content: the user's text, or ready messages.
        system: system prompt; replaces one in ready messages.
        conversational: a list of messages, else plain text (the system prompt before it, a blank line between).
    """
    if not conversational:
        text = plain_text(content, "data.conversational")
        return f"{system}\n\n{text}" if system else text
    is_ready = isinstance(content, list)
    messages = [dict(m) for m in content] if is_ready else [{"role": "user", "content": str(content)}]
    if system:
        messages = [m for m in messages if m.get("role") != "system"]
        messages.insert(0, {"role": "system", "content": system})
    return messages


def prompt_key(prompt: Prompt) -> str:
    """What makes two prompts the same."""
    return prompt if isinstance(prompt, str) else json.dumps(prompt, sort_keys=True, ensure_ascii=False)
