"""What recording completions costs a training run: seconds inside the recorder as a share of the training's.

    python scripts/bench_recording.py [--updates 24] [--rows 16] [--repetitions 3] [KEY=VALUE ...]

Trains the demo recipe for some updates and adds up the wall time of every call of the recorder. One run compares with
itself, so the spread between runs, larger than what is measured, does not enter.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any

from rich.console import Console

from rltok.recipe import load_recipe
from rltok.run import train
from rltok.trainers.recording import SampleRecorder

METHODS = ("begin", "remember", "flush")


def timed(method: Callable[..., Any], spent: list[float]) -> Callable[..., Any]:
    """The method, with the seconds of every call added to `spent`."""

    @wraps(method)
    def call(*args: Any, **kwargs: Any) -> Any:
        start = time.perf_counter()
        try:
            return method(*args, **kwargs)
        finally:
            spent.append(time.perf_counter() - start)

    return call


def measure(updates: int, rows: int, overrides: list[str]) -> tuple[float, float, float]:
    """Seconds in the recorder, seconds of training, MiB written."""
    spent: dict[str, list[float]] = {name: [] for name in METHODS}
    real = {name: getattr(SampleRecorder, name) for name in METHODS}
    with tempfile.TemporaryDirectory() as folder:
        settings = [f"output_dir={folder}/run", f"training.max_steps={updates}", f"report.samples.rows={rows}"]
        settings += ["evaluation.before=false", "evaluation.after=false", "report.progress='off'", "expect=[]"]
        recipe = load_recipe("demo", [*settings, *overrides])
        try:
            for name in METHODS:
                setattr(SampleRecorder, name, timed(real[name], spent[name]))
            train(recipe, Console(quiet=True))
        finally:
            for name in METHODS:
                setattr(SampleRecorder, name, real[name])
        seconds = json.loads((Path(folder) / "run" / "summary.json").read_text())["train_seconds"]
        size = sum(file.stat().st_size for file in (Path(folder) / "run" / "samples").glob("*.parquet"))
    # begin calls flush for the rollout before; the last flush stands alone
    inside = sum(spent["begin"]) + sum(spent["remember"]) + (spent["flush"][-1] if spent["flush"] else 0.0)
    return inside, seconds, size / 2**20


def main() -> None:
    """Print one line per repetition and the median."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--updates", type=int, default=24)
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("overrides", nargs="*")
    options = parser.parse_args()
    shares = []
    for number in range(options.repetitions):
        inside, seconds, size = measure(options.updates, options.rows, options.overrides)
        shares.append(inside / seconds)
        print(f"run {number}: {inside:.3f} s of {seconds:.2f} s, {shares[-1]:.2%}; {size:.2f} MiB", flush=True)
    print(f"median {statistics.median(shares):.2%} of the training time")


if __name__ == "__main__":
    main()
