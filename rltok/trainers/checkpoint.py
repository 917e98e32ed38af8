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
from contextlib import suppress
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
    for place in (folder, folder.parent):
        _sync_folder(place)


def _sync_folder(folder: Path) -> None:
    """Names survive a power failure only once their folder is on the disk too; not every file system can."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):
            os.fsync(descriptor)
    finally:
        os.close(descriptor)


def damage(folder: Path) -> str | None:
    """What is wrong with a checkpoint, or None if it is whole."""
    try:
        files = json.loads((folder / MANIFEST).read_text())
        listed = [(str(name), int(seen["bytes"]), str(seen["blake2b"])) for name, seen in files.items()]
    except FileNotFoundError:
        return f"{MANIFEST} is missing: the checkpoint was not finished"
    except (OSError, ValueError) as error:
        return f"{MANIFEST} cannot be read: {error}"
    except (AttributeError, KeyError, TypeError):
        return f"{MANIFEST} cannot be read: it is no list of files with bytes and blake2b"
    if not listed:
        return f"{MANIFEST} cannot be read: it lists no file"
    for name, size, blake2b in listed:
        path = folder / name
        try:
            if not path.is_file():
                return f"{name} is missing"
            if path.stat().st_size != size:
                return f"{name} has {path.stat().st_size} bytes, expected {size}"
            if digest(path) != blake2b:
                return f"{name} does not match its digest"
        except OSError as error:
            return f"{name} cannot be read: {error}"
    return None


def checkpoint_steps(run_dir: str | os.PathLike[str]) -> list[int]:
    """Steps of all `checkpoint-N` folders below `run_dir`, whole or not, ascending."""
    folders = [path.name for path in Path(run_dir).glob("checkpoint-*") if path.is_dir()]
    return sorted(int(match[1]) for name in folders if (match := re.fullmatch(r"checkpoint-(0|[1-9]\d*)", name)))


def latest_checkpoint(run_dir: str | os.PathLike[str]) -> Path | None:
    """The newest whole `checkpoint-N` below `run_dir`, None if there is none; every skipped one is reported."""
    for step in reversed(checkpoint_steps(run_dir)):
        path = Path(run_dir) / f"checkpoint-{step}"
        problem = damage(path)
        if problem is None:
            return path
        logger.warning("Skipping %s: %s", path, problem)
    return None
