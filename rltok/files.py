"""Files that are either whole or not there, and JSON without NaN."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def write_json(path: Path, values: Mapping[str, Any]) -> None:
    """Write a JSON file that is either whole or not there."""
    write_atomically(path, json.dumps(_finite(values), indent=2) + "\n")


def write_atomically(path: Path, text: str) -> None:
    """Write beside the file, then rename over it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(path.name + ".part")
    with draft.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    draft.replace(path)


def json_line(values: Mapping[str, Any]) -> str:
    """A line of a JSON-lines file; NaN and infinity become null."""
    return json.dumps(_finite(values)) + "\n"


def _finite(value: Any) -> Any:
    """NaN and infinity, which JSON does not have, as null."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return value if value is None or isinstance(value, str | int | bool) else float(value)
