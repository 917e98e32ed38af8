"""Where and how a run was made: versions, machine, commit, command line. Kept in `environment.json` of the run.

A continued run keeps the facts of its first start; those of every continuation follow in the list `continued`.
Secrets on the command line are replaced by `***` (`rltok.secrets`); environment variables are not recorded.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rltok.files import write_json
from rltok.secrets import redacted

FILE = "environment.json"
"""In a run directory."""
GIT_SECONDS = 10
"""Longest that git may take; a working tree on a slow disk must not hold up a run."""


def environment(argv: Sequence[str], seed: int, processes: int, folder: str | Path = ".") -> dict[str, Any]:
    """Facts of this process that a reader needs to make the run again.

    Args:
        argv: the command and its arguments, such as `sys.argv`.
        seed: of the run.
        processes: number of processes that train.
        folder: whose commit is looked up; the working directory.

    Returns:
        `started` (UTC, ISO 8601), `command`, `argv`, `seed`, `processes`, `python`, `platform`, `devices`, `versions`,
        and `git`: commit, branch and whether files differ from it; None outside a repository or without git.
    """
    shown = redacted(list(argv))
    return {
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": shlex.join(shown),
        "argv": shown,
        "seed": seed,
        "processes": processes,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "devices": devices(),
        "versions": versions(),
        "git": git_state(folder),
    }


def versions() -> dict[str, str]:
    """Versions of Python and of the libraries that decide a run's numbers."""
    names = ("torch", "transformers", "trl", "accelerate", "datasets", "peft", "reasoning-gym", "rltok")
    return {"python": platform.python_version()} | {name: importlib.metadata.version(name) for name in names}


def devices() -> list[dict[str, Any]]:
    """What torch computes on: every accelerator with its name and memory in bytes, and the CPU with its cores."""
    import torch

    cores = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count()
    found: list[dict[str, Any]] = [
        {"type": "cpu", "name": platform.machine(), "cores": cores, "threads": torch.get_num_threads()}
    ]
    for index in range(torch.cuda.device_count()):
        facts = torch.cuda.get_device_properties(index)
        found.append({"type": "cuda", "name": facts.name, "memory_bytes": facts.total_memory})
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    if accelerator is not None and accelerator.type != "cuda":
        found.append({"type": accelerator.type, "count": torch.accelerator.device_count()})
    return found


def git_state(folder: str | Path = ".") -> dict[str, Any] | None:
    """Commit and branch of the repository around `folder`, and whether tracked files differ from the commit."""
    commit = _git(folder, "rev-parse", "HEAD")
    if commit is None:
        return None
    changes = _git(folder, "status", "--porcelain", "--untracked-files=no")
    branch = _git(folder, "rev-parse", "--abbrev-ref", "HEAD")
    return {"commit": commit, "branch": branch, "dirty": None if changes is None else bool(changes)}


def _git(folder: str | Path, *arguments: str) -> str | None:
    """Output of a git command, None where git or the repository is missing."""
    command = ["git", "--no-optional-locks", "-C", str(folder), *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=GIT_SECONDS, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def write_environment(run_dir: str | Path, facts: dict[str, Any], continued: bool = False) -> Path:
    """Write `environment.json`; with `continued`, add the facts to those of the first start.

    A file that cannot be read is replaced: the facts then count as those of the first start.
    """
    path = Path(run_dir) / FILE
    first = _first_start(path) if continued else None
    if first is not None:
        facts = first | {"continued": [*first.get("continued", []), facts]}
    write_json(path, facts)
    return path


def _first_start(path: Path) -> dict[str, Any] | None:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return values if isinstance(values, dict) else None
