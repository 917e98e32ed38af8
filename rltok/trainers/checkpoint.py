"""Checkpoints that are whole or ignored.

A checkpoint counts only once `manifest.json` lies in it: written last, it lists every file with size and digest. A run
killed while writing, or a file damaged later, leaves a checkpoint that `latest_checkpoint` skips with a message.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
from pathlib import Path

logger = logging.getLogger(__name__)

MANIFEST = "manifest.json"
WHOLE_DIGEST_BYTES = 256 << 20
"""Files up to this size are digested whole, larger ones by their first and last MiB."""
_EDGE = 1 << 20


def digest(path: Path) -> str:
    """blake2b of the file, or of both its ends if it is large; the size is checked beside it."""
    hasher = hashlib.blake2b(digest_size=16)
    with path.open("rb") as file:
        if path.stat().st_size <= WHOLE_DIGEST_BYTES:
            for block in iter(lambda: file.read(_EDGE), b""):
                hasher.update(block)
        else:
            hasher.update(file.read(_EDGE))
            file.seek(-_EDGE, os.SEEK_END)
            hasher.update(file.read())
    return hasher.hexdigest()


def write_manifest(folder: Path) -> None:
    """Seal a checkpoint: list every file in it, flushed to disk, and rename the list into place."""
    files = {}
    for path in sorted(p for p in folder.rglob("*") if p.is_file() and p.name != MANIFEST):
        with path.open("rb") as file:
            os.fsync(file.fileno())
        files[path.relative_to(folder).as_posix()] = {"bytes": path.stat().st_size, "blake2b": digest(path)}
    draft = folder / (MANIFEST + ".part")
    with draft.open("w") as file:
        json.dump(files, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    draft.replace(folder / MANIFEST)


def damage(folder: Path) -> str | None:
    """What is wrong with a checkpoint, or None if it is whole."""
    try:
        files = json.loads((folder / MANIFEST).read_text())
    except FileNotFoundError:
        return f"{MANIFEST} is missing: the checkpoint was not finished"
    except (OSError, ValueError) as error:
        return f"{MANIFEST} cannot be read: {error}"
    for name, expected in files.items():
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != expected["bytes"]:
            return f"{name} has {path.stat().st_size} bytes, expected {expected['bytes']}"
        if digest(path) != expected["blake2b"]:
            return f"{name} does not match its digest"
    return None


def latest_checkpoint(run_dir: str | os.PathLike[str]) -> Path | None:
    """The newest whole `checkpoint-N` below `run_dir`, None if there is none; every skipped one is reported."""
    numbered = []
    for path in Path(run_dir).glob("checkpoint-*"):
        match = re.fullmatch(r"checkpoint-(\d+)", path.name)
        if match and path.is_dir():
            numbered.append((int(match[1]), path))
    for _, path in sorted(numbered, reverse=True):
        problem = damage(path)
        if problem is None:
            return path
        logger.warning("Skipping %s: %s", path, problem)
    return None
