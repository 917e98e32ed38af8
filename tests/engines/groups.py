"""Starts the matrix' process groups."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

HERE = Path(__file__).parent
GROUPS: dict[int, list[str]] = {
    1: ["one process", "gradient checkpointing", "bf16", "LoRA", "DoRA"],
    2: ["two processes", "ZeRO-1", "ZeRO-2", "ZeRO-3", "FSDP2"],
    4: ["four processes"],
}
"""processes -> engines that a group of them can be, one after another"""


def start(worker: str, ranks: int, *arguments: str, timeout: float = 900) -> None:
    """A script of this folder as one process or several over gloo.

    Raises:
        AssertionError: it failed; with the end of what it wrote.
    """
    command = [sys.executable]
    if ranks > 1:
        command += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
    quiet = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "HF_HUB_OFFLINE": "1", "DS_ACCELERATOR": "cpu"}
    run = subprocess.run(
        [*command, str(HERE / worker), *arguments],
        env={
            **os.environ,
            **quiet,
            "PYTHONPATH": os.pathsep.join([str(HERE.parent), str(HERE.parents[1])]),
            "ACCELERATE_USE_CPU": "true",
        },
        capture_output=True,
        text=True,
        timeout=timeout,
    )
    assert run.returncode == 0, run.stderr[-4000:]


def run_group(folder: Path, ranks: int, plan: Mapping[str, Sequence[str]]) -> dict[str, dict[str, Any]]:
    """engine -> method -> what it trained, of {engine: methods}. `one process` comes before all others."""
    start("worker.py", ranks, str(folder), json.dumps(plan))
    return {engine: torch.load(folder / f"{engine}.pt", weights_only=True) for engine in plan}
