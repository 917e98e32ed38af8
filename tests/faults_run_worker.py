"""One rank of a run that meets a locked folder, then a disk that refuses a file of the second rank.

    torchrun --nproc_per_node 2 faults_run_worker.py FOLDER

FOLDER/locked is held by the parent. Every rank writes what it met to FOLDER/rank<N>.json.
"""

from __future__ import annotations

import errno
import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from rltok.config import ConfigError
from rltok.recipe import load_recipe
from rltok.run import train

SETTINGS = ["evaluation.before=false", "evaluation.after=false", "report.progress='off'", "training.save_steps=1"]


def message(folder: Path, name: str) -> str:
    """What a run in FOLDER/name ends with."""
    recipe = load_recipe("smoke", [*SETTINGS, f"output_dir={folder / name}"])
    try:
        train(recipe, Console(quiet=True))
    except ConfigError as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


def main(folder: Path) -> None:
    rank = int(os.environ["RANK"])
    found = {"locked": message(folder, "locked")}
    real = torch.save

    def save(value: Any, file: Any, *rest: Any, **options: Any) -> None:
        if "checkpoint-2" in str(file) and str(file).endswith("rltok_state_1.pt"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(file))
        real(value, file, *rest, **options)

    torch.save = save
    found["full"] = message(folder, "full")
    (folder / f"rank{rank}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]))
