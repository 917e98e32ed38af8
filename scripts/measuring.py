"""What the benchmark scripts beside this file share: clocks and turns, intervals, memory, tables, the last words."""

from __future__ import annotations

import argparse
import ctypes
import dataclasses
import json
import os
import platform
import re
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import scipy.stats
import torch
from rich.table import Table

CLOCKS = ("wall", "cpu")
"""what `now` tells, in its order"""


# ---- clocks and turns


def now(device: str) -> tuple[float, float]:
    """Wall and CPU seconds, on a GPU after all work that it still has."""
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter(), time.process_time()


def turned(names: Sequence[Any], by: int) -> list[Any]:
    """The names, beginning with another one."""
    turn = by % max(1, len(names))
    return [*names[turn:], *names[:turn]]


# ---- figures


def interval(values: Sequence[float]) -> dict[str, float | None]:
    """Median with a 95 % percentile bootstrap interval; without one for a single value."""
    median = statistics.median(values)
    if len(values) < 2:
        return {"median": median, "low": None, "high": None}
    result = scipy.stats.bootstrap(
        (np.asarray(values),), np.median, method="percentile", n_resamples=9999, rng=np.random.default_rng(0)
    ).confidence_interval
    return {"median": median, "low": float(result.low), "high": float(result.high)}


def with_interval(found: Mapping[str, float | None], digits: int) -> str:
    """A median, with its interval if there is one."""
    if found["low"] is None:
        return f"{found['median']:.{digits}f}"
    return f"{found['median']:.{digits}f} [{found['low']:.{digits}f}, {found['high']:.{digits}f}]"


def mebibytes(count: float | None) -> str:
    """Bytes as MiB, `-` where they were not measured."""
    return "-" if count is None else f"{count / 2**20:.1f}"


def markdown_table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table of the documentation."""
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (columns, ["---"] * len(columns), *rows))


def ratio_table(title: str, column: str, times: Mapping[str, Sequence[float]], digits: int = 3) -> Table:
    """Median seconds of every variant, and its ratios to the first one within a repetition."""
    table = Table(column, "seconds (median)", "ratio min", "median", "max", title=title)
    base = next(iter(times.values()))
    for name, seconds in times.items():
        ratios = [value / one for value, one in zip(seconds, base, strict=True)]
        figures = (min(ratios), statistics.median(ratios), max(ratios))
        table.add_row(name, f"{statistics.median(seconds):.{digits}f}", *(f"{figure:.3f}" for figure in figures))
    return table


# ---- machine and memory


def device_name(device: str) -> str:
    """Of the GPU, or of the processor where Linux tells it."""
    if device == "cuda":
        return torch.cuda.get_device_name()
    info = Path("/proc/cpuinfo")
    names = re.findall(r"model name\s*: (.*)", info.read_text()) if info.exists() else []
    return names[0] if names else platform.machine()


def machine(device: str, *libraries: ModuleType) -> dict[str, Any]:
    """Where the figures come from."""
    name = {"device": device_name(device)}
    versions = {library.__name__: library.__version__ for library in libraries}
    if device == "cuda":
        return name | versions
    return name | {"cores": os.cpu_count(), "threads": torch.get_num_threads()} | versions


def keep_freed_memory() -> None:
    """Let glibc keep large blocks for this process; elsewhere there is nothing to do."""
    _return_blocks_from(1 << 30)


def return_freed_memory() -> None:
    """Let glibc hand large blocks back to the system at once; elsewhere there is nothing to do."""
    _return_blocks_from(1 << 16)


def release_freed_memory() -> None:
    """Hand free memory back to the system, so that a baseline holds none of it."""
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).malloc_trim(0)


def _return_blocks_from(size: int) -> None:
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        for option in (-3, -1):  # M_MMAP_THRESHOLD, M_TRIM_THRESHOLD
            libc.mallopt(option, size)


def resident_bytes(reset: bool = False) -> int:
    """Largest resident set of this process, since `reset` where the system can forget the one before.

    Linux: VmHWM. `ru_maxrss` would there begin with the size of the process that started this one.
    """
    if reset and Path("/proc/self/clear_refs").exists():
        Path("/proc/self/clear_refs").write_text("5")
    status = Path("/proc/self/status")
    if status.exists():
        return 1024 * int(re.findall(r"VmHWM:\s*(\d+) kB", status.read_text())[0])
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def memory_apart(script: str, name: str, **given: Any) -> Any:
    """What `script --memory-of GIVEN` prints last: a process with as many threads as this one, returning freed memory.

    Args:
        name: of what is measured, for the error.

    Raises:
        RuntimeError: the process fails.
    """
    text = json.dumps({**given, "threads": torch.get_num_threads()})
    command = [sys.executable, str(Path(script).resolve()), "--memory-of", text]
    settings = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}  # of glibc; ignored elsewhere
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | settings)
    if done.returncode:
        raise RuntimeError(f"measuring the memory of {name} failed:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


# ---- the command


def at_least_one(parser: argparse.ArgumentParser, options: argparse.Namespace, names: Iterable[str]) -> None:
    """End with an error where one of these options is below 1."""
    for name in names:
        if getattr(options, name) < 1:
            parser.error(f"--{name.replace('_', '-')} {getattr(options, name)} must be at least 1")


def chosen_arms(parser: argparse.ArgumentParser, given: str | None, allowed: Iterable[str]) -> list[str]:
    """Names of `--arms`, all without it; end with an error where one is unknown."""
    names = given.split(",") if given else list(allowed)
    unknown = sorted(set(names) - set(allowed))
    if unknown:
        parser.error(f"--arms {', '.join(unknown)} unknown; allowed: {', '.join(allowed)}")
    return names


def command_line(script: str, argv: Sequence[str] | None) -> str:
    """How to run it again, less the place of `--out`; None: as this process was started."""
    given = sys.argv[1:] if argv is None else list(argv)
    kept = [a for i, a in enumerate(given) if a != "--out" and (i == 0 or given[i - 1] != "--out")]
    return " ".join([f"python scripts/{script}", *(a for a in kept if not a.startswith("--out="))])


def conclude(
    options: argparse.Namespace,
    facts: Mapping[str, Any],
    arms: Mapping[str, Any],
    settings: Iterable[str],
    missed: Sequence[str],
    unjudged: Sequence[str],
) -> int:
    """Print bounds that are missed or not judged, write `--json`; 1 where one is missed.

    Args:
        settings: options to be written, beside the case.
    """
    for line in missed:
        print(f"MISSED {line}")
    for line in unjudged:
        print(f"not judged: {line}")
    if options.json:
        record = {
            "machine": facts,
            "case": dataclasses.asdict(options.case),
            "settings": {name: getattr(options, name) for name in settings},
            "arms": arms,
            "missed": missed,
        }
        options.json.write_text(json.dumps(record, indent=1) + "\n")
    return 1 if missed else 0
