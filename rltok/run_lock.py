"""One process at a time in a folder: a lock that the system lets go of when its holder ends, however it ends.

<folder>/.lock    locked with flock; its content, {"pid", "host", "started"}, tells who holds it or last held it
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import socket
import sys
import warnings
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import IO

from rltok.config import ConfigError

LOCK = ".lock"
"""Name of the file in a locked folder."""
NO_LOCKS = frozenset({errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP, errno.EINVAL})
"""What flock raises on file systems that have no locks."""
_held: weakref.WeakSet[IO[str]] = weakref.WeakSet()


@dataclass(frozen=True)
class Holder:
    """Who holds a lock."""

    pid: int
    host: str
    started: str
    """UTC, ISO 8601"""

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}, started {self.started}"


@contextmanager
def locked(folder: Path, busy: Callable[[str], str]) -> Iterator[IO[str]]:
    """Hold `folder`, which is made if needed, until the block or the process ends; SIGKILL frees it too.

    A process that is forked does not inherit the lock. One that is executed holds it along where it is handed the
    file's descriptor (`pass_fds`).

    Args:
        busy: from the holder in words to the message of the error.

    Yields:
        The open lock file. A file system without locks gives a RuntimeWarning, and nothing is held.

    Raises:
        ConfigError: another process holds it.
        OSError: the folder cannot be made or written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    file = _acquire(folder / LOCK, busy)
    _held.add(file)
    try:
        yield file
    finally:
        _held.discard(file)
        with suppress(OSError):
            if [entry.name for entry in os.scandir(folder)] == [LOCK]:  # nothing came of it: leave no trace
                (folder / LOCK).unlink()
                folder.rmdir()
        file.close()


def holder(folder: Path) -> Holder | None:
    """Who wrote the lock file last, None where that cannot be read."""
    try:
        values = json.loads((folder / LOCK).read_text(encoding="utf-8"))
        return Holder(int(values["pid"]), str(values["host"]), str(values["started"]))
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _acquire(path: Path, busy: Callable[[str], str]) -> IO[str]:
    while True:
        file = path.open("a+", encoding="utf-8")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            file.close()
            if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
                raise ConfigError(busy(str(holder(path.parent) or "another process")), "output_dir") from None
            if error.errno not in NO_LOCKS:
                raise
            warnings.warn(
                f"{path.parent} is on a file system without locks ({error.strerror}): a second run in this folder "
                "would not be noticed. Start only one, or set output_dir to a local disk.",
                RuntimeWarning,
                stacklevel=4,
            )
            return path.open("a+", encoding="utf-8")
        if _is_at(file, path):  # else whoever held it has removed it in between
            _sign(file)
            return file
        file.close()


def _sign(file: IO[str]) -> None:
    me = Holder(os.getpid(), socket.gethostname(), datetime.now(UTC).isoformat(timespec="seconds"))
    try:
        file.truncate(0)
        file.write(json.dumps(asdict(me)) + "\n")
        file.flush()
    except OSError:
        with suppress(OSError):
            file.close()
        raise


def _is_at(file: IO[str], path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False


def _let_go() -> None:
    for file in list(_held):
        with suppress(OSError):
            file.close()
    _held.clear()


if sys.platform != "win32":
    os.register_at_fork(after_in_child=_let_go)  # a forked child that outlives a killed run must not keep the lock
