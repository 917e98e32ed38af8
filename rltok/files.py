"""Files that are either whole or not there, JSON without NaN, and disks that refuse a file."""

from __future__ import annotations

import errno
import json
import math
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from rltok.config import ConfigError

DISK_ERRORS = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG, errno.EIO, errno.ESTALE})
"""Errors of a disk and not of a program: full, over the quota, read-only, past a size limit, broken."""
_OS_ERROR = re.compile(r"\(os error (\d+)\)")  # how safetensors tells them
_TORCH_WRITER = ("PytorchStreamWriter", "inline_container", "iostream error")


class StorageError(ConfigError):
    """A file could not be written; the message names it, the error, and the setting that moves or shrinks it."""


def write_failure(error: BaseException) -> str | None:
    """What the disk said where `error` is a file that could not be written, else None.

    safetensors and torch.save wrap the system's error in their own; torch leaves its reason out.
    """
    if isinstance(error, OSError):
        if error.errno not in DISK_ERRORS:
            return None
        return _reason(error.errno) + (f" ({error.filename})" if error.filename else "")
    text = str(error)
    found = _OS_ERROR.search(text)
    if found and int(found[1]) in DISK_ERRORS:
        return _reason(int(found[1]))
    if isinstance(error, RuntimeError) and any(mark in text for mark in _TORCH_WRITER):
        return "torch could not write all bytes of a file"
    return None


def _reason(number: int) -> str:
    return f"{os.strerror(number)} [{errno.errorcode[number]}]"


def free_space(folder: Path) -> str:
    """`12.3 MB free on its disk` of the nearest folder that is there."""
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    return f"{shutil.disk_usage(folder).free / 1e6:,.1f} MB free on its disk"


@contextmanager
def explained_writes(folder: Path, advice: str) -> Iterator[None]:
    """Say in words what a disk refused while a run wrote into `folder`; other errors pass through.

    Raises:
        StorageError: in place of an error that `write_failure` knows.
    """
    try:
        yield
    except ConfigError:
        raise
    except Exception as error:  # torch and safetensors wrap the system's error in their own
        problem = write_failure(error)
        if problem is None:
            raise
        raise StorageError(f"{folder}: {problem}; {free_space(folder)}. {advice}", "output_dir") from error


def write_json(path: Path, values: Mapping[str, Any]) -> None:
    """Write a JSON file that is either whole or not there."""
    write_atomically(path, json.dumps(_finite(values), indent=2) + "\n")


def write_atomically(path: Path, text: str) -> None:
    """Write beside the file, then rename over it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(path.name + ".part")
    try:
        with draft.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        draft.replace(path)
    except OSError:
        with suppress(OSError):
            draft.unlink(missing_ok=True)
        raise


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
