"""Secrets kept out of what is written: names and values that look like one are replaced by `***`.

A recipe is copied into every run directory, its trackers and its report, so it must hold no secret at all:
`refuse_secrets` stops it. What quotes the outside world (command lines, tracebacks) goes through `redacted`.
What a secret looks like is a guess: of a name (`api_key`, `password`, `hub_token`), of a value (`hf_...`, `sk-...`,
`https://user:password@host`), or the value of an environment variable of such a name. A password that looks like a word
and stands where nothing names it is not found.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from typing import Any

from rltok.config import ConfigError, join

HIDDEN = "***"
"""Stands for a secret."""
MIN_CHARS = 8
"""Shortest value of an environment variable that is looked for in texts."""

_NAME = re.compile(
    r"(.*[_.-])?("
    r"pass(word|wd|phrase)|secrets?|credentials?|authorization"
    r"|(api|access|secret|private|encryption|signing|wandb|openai|anthropic|hf)[_-]?key"
    r"|(hub|hf|api|access|auth|bearer|refresh|session|secret|wandb|github|gh|id)[_-]?token"
    r")",
    re.IGNORECASE,
)
_BARE_TOKEN = re.compile(r"(.*\.)?token", re.IGNORECASE)
_SHAPES = re.compile(
    r"(?<![A-Za-z0-9])("
    r"hf_[A-Za-z0-9]{16,}|api_org_[A-Za-z0-9]{16,}"  # Hugging Face
    r"|sk-[A-Za-z0-9_-]{16,}"  # OpenAI, Anthropic and others
    r"|wandb_v\d_\w{20,}"
    r"|(gh[opsur]|github_pat)_\w{20,}|glpat-[\w-]{16,}"
    r"|AKIA[0-9A-Z]{16}|AIza[\w-]{35}|xox[abprs]-[\w-]{10,}"
    r"|eyJ[\w-]{10,}\.[\w-]{10,}\.[\w-]{10,}"  # JSON web token
    r")"
)
_BEARER = re.compile(r"\b(Bearer|Basic)\s+[\w.~+/=-]{12,}", re.IGNORECASE)
_USERINFO = re.compile(r"(?<=://)[^/\s@'\"]+:[^/\s@'\"]+(?=@)")
_QUERY = re.compile(r"(?<=[?&])([\w.-]+)=([^&\s'\"#]+)")
_ASSIGNED = re.compile(r"""([\w.-]+)(["']?\s*[=:]\s*)("[^"]*"|'[^']*'|[^\s,;&'"{}\[\]()]+)""")
_SETTING = re.compile(r"(--?)?([\w.\[\]-]+)=(.+)", re.DOTALL)

INSTEAD = {
    "hub_token": "`hf auth login` or the environment variable HF_TOKEN",
    "hf_token": "`hf auth login` or the environment variable HF_TOKEN",
    "wandb": "`wandb login` or the environment variable WANDB_API_KEY",
}
"""Part of a key -> where that secret belongs."""


def is_secret_name(name: str) -> bool:
    """Whether a setting or variable of this name holds a secret, by the name alone: `api_key`, `HF_TOKEN`.

    `token` alone counts; `pad_token`, `max_tokens` and the like do not.
    """
    return _NAME.fullmatch(name) is not None or _BARE_TOKEN.fullmatch(name) is not None


def redacted(value: Any) -> Any:
    """`value` with everything that looks like a secret replaced by `***`; mappings and lists are copied.

    Text keeps what is around a secret; of `https://user:password@host/x` remains `https://***@host/x`.
    """
    if isinstance(value, str):
        return _text(value)
    if isinstance(value, Mapping):
        return {
            _text(key) if isinstance(key, str) else key: _named(str(key), item) if item is not None else None
            for key, item in value.items()
        }
    if isinstance(value, list | tuple):
        items = [_argument(before, item) for before, item in zip([None, *value], value, strict=False)]
        return items if isinstance(value, list) else tuple(items)
    return value


def refuse_secrets(values: Any, path: str = "") -> None:
    """Refuse settings that hold a secret.

    Raises:
        ConfigError: names the setting and where the secret belongs instead, never the secret.
    """
    if isinstance(values, Mapping):
        for key, value in values.items():
            where = join(path, str(key))
            if isinstance(value, str) and _holds_secret(str(key), value):
                raise _refused(where)
            refuse_secrets(value, where)
    elif isinstance(values, list | tuple):
        for index, value in enumerate(values):
            refuse_secrets(value, f"{path}[{index}]")
    elif isinstance(values, str) and _by_shape(values) != values:
        raise _refused(path)


def without_secrets(environment: Mapping[str, str]) -> dict[str, str]:
    """The variables whose names are no secret's: for a process that judges text which a model wrote."""
    return {name: value for name, value in environment.items() if not is_secret_name(name)}


def _holds_secret(key: str, value: str) -> bool:
    if not value.strip():
        return False
    if _BARE_TOKEN.fullmatch(key) is not None:  # also a column or a special token
        return len(value) >= 2 * MIN_CHARS and not re.search(r"[\s<>|]", value)
    return _NAME.fullmatch(key) is not None


def _refused(where: str) -> ConfigError:
    key = where.lower()
    instead = next((place for part, place in INSTEAD.items() if part in key), None)
    if instead is None:
        instead = "an environment variable, which the code that needs the secret reads itself"
    return ConfigError(
        f"{where}: holds a secret (a name or a value that looks like one); a recipe is written into every run "
        f"directory: use {instead}",
        where,
    )


def _named(name: str, value: Any) -> Any:
    if isinstance(value, str) and value and is_secret_name(name):
        return HIDDEN
    return redacted(value)


def _argument(before: Any, item: Any) -> Any:
    """An item of a list, which may be a command line: `--api-key VALUE`, `key.path=VALUE`."""
    if not isinstance(item, str):
        return redacted(item)
    if isinstance(before, str) and before.startswith("--") and "=" not in before and is_secret_name(before[2:]):
        return HIDDEN
    setting = _SETTING.fullmatch(item)
    if setting is not None and is_secret_name(setting[2]):
        return f"{setting[1] or ''}{setting[2]}={HIDDEN}"
    return _text(item)


def _text(text: str) -> str:
    for secret in _of_environment():
        text = text.replace(secret, HIDDEN)
    return _ASSIGNED.sub(_hide_assigned, _by_shape(text))


def _by_shape(text: str) -> str:
    text = _USERINFO.sub(HIDDEN, text)
    text = _QUERY.sub(lambda m: f"{m[1]}={HIDDEN}" if is_secret_name(m[1]) else m[0], text)
    return _SHAPES.sub(HIDDEN, _BEARER.sub(lambda m: f"{m[1]} {HIDDEN}", text))


def _hide_assigned(match: re.Match[str]) -> str:
    """`api_key = "x"` in a text; a bare `token = x` is too often code."""
    return f"{match[1]}{match[2]}{HIDDEN}" if _NAME.fullmatch(match[1]) else match[0]


def _of_environment() -> list[str]:
    """Values of the secret variables of this process, longest first."""
    found = {value for name, value in os.environ.items() if is_secret_name(name) and len(value) >= MIN_CHARS}
    return sorted(found, key=lambda value: (-len(value), value))
