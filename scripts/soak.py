"""Does a long run leak? Memory, open files and threads of one process over 2,000 optimizer steps of a tiny recipe.

    python scripts/soak.py [--steps 2000] [--threads 1] [--json soak.json] [--plot soak.png] [--check]

Runs `rltok train` on the recipe `smoke` in this process, as a user would: sampling, every part of HAPO, recorded
completions, completion tables, a metrics file, a checkpoint every 100 steps of which two are kept. Evaluation is off.
Every `--every` steps, after garbage has been collected, it notes

    rss_mib     resident memory of the process
    files       open file descriptors
    threads     of the process
    objects     Python objects that the garbage collector tracks
    tensors     torch tensors among them
    history_mib what transformers' own log of the run takes, of which a run keeps the newest entries

The first `--warmup` share of the steps is left out: caches and the allocator fill in it. Of the rest, each series gets
a least-squares slope per 1,000 steps with a 95 % interval from Newey-West standard errors, which allow for samples that
resemble their neighbours.

`--check` exits with 1 unless the upper end of the interval of the memory's slope is at most `--bound` MiB per 1,000
steps, and open files, threads and tensors are no more at the end than after the warm-up.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import os
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import numpy as np
import psutil
import scipy.stats
import torch
from rich.console import Console

import rltok.run
from rltok.recipe import load_recipe

SERIES = ("rss_mib", "files", "threads", "objects", "tensors", "history_mib")
FLAT = ("files", "threads", "tensors")
"""series that must not grow at all"""
MIB = 2**20


class Watch(rltok.run.MetricsFile):
    """Writes the metrics of the run, and notes what the process takes."""

    every = 50
    samples: list[dict[str, float]] = []  # noqa: RUF012 - one run per process

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Note every `every` steps."""
        if state.global_step % self.every == 0:
            self.samples.append({"step": state.global_step, **sample(state.log_history)})


def sample(history: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """What the process takes now."""
    gc.collect()
    process, tracked = psutil.Process(), gc.get_objects()
    return {
        "rss_mib": process.memory_info().rss / MIB,
        "files": process.num_fds(),
        "threads": process.num_threads(),
        "objects": len(tracked),
        "tensors": sum(issubclass(type(thing), torch.Tensor) for thing in tracked),
        "history_mib": sum(size_of(entry) for entry in history) / MIB,
    }


def size_of(entry: Mapping[str, Any]) -> int:
    """Bytes of a flat mapping, its keys and values counted whole."""
    return sys.getsizeof(entry) + sum(sys.getsizeof(key) + sys.getsizeof(value) for key, value in entry.items())


def run(steps: int, every: int, save_every: int, overrides: Sequence[str]) -> tuple[list[dict[str, float]], float]:
    """Train and return the samples and the seconds."""
    Watch.every, Watch.samples = every, []
    real = rltok.run.MetricsFile
    with tempfile.TemporaryDirectory() as folder:
        settings = [f"output_dir={folder}/run", f"training.max_steps={steps}", f"training.save_steps={save_every}"]
        settings += ["training.save_total_limit=2", "evaluation.before=false", "evaluation.after=false"]
        recipe = load_recipe("smoke", [*settings, "report.progress='off'", "expect=[]", *overrides])
        start = time.perf_counter()
        rltok.run.MetricsFile = Watch  # type: ignore[misc]
        try:
            rltok.run.train(recipe, Console(quiet=True))
        finally:
            rltok.run.MetricsFile = real  # type: ignore[misc]
        return Watch.samples, time.perf_counter() - start


# ---- statistics


def trend(steps: Sequence[float], values: Sequence[float], level: float = 0.95) -> dict[str, float]:
    """Least-squares slope per 1,000 steps, with an interval that holds for autocorrelated residuals.

        se^2 = S_xx^-1 Omega S_xx^-1,   Omega = sum_l w_l sum_t u_t u_(t-l),   w_l = 1 - |l| / (L + 1)

    with scores u = (x - mean x) e of the residuals e, L = floor(4 (n / 100)^(2/9)) lags, at least 1, the correction
    n / (n - 2) and Student's t on n - 2.

    Raises:
        ValueError: fewer than four samples.

    Source: Newey and West 1987, 1994.
    """
    n = len(steps)
    if n < 4:
        raise ValueError(f"{n} samples after the warm-up say nothing of a trend: at least 4 are needed; lower --every")
    x = np.asarray(steps, dtype=float) / 1000
    y = np.asarray(values, dtype=float)
    fit = scipy.stats.linregress(x, y)
    centred = x - x.mean()
    scores = centred * (y - fit.intercept - fit.slope * x)
    lags = max(1, math.floor(4 * (n / 100) ** (2 / 9)))
    omega = float(scores @ scores)
    for lag in range(1, lags + 1):
        omega += 2 * (1 - lag / (lags + 1)) * float(scores[lag:] @ scores[:-lag])
    error = math.sqrt(max(omega, 0.0) * n / (n - 2)) / float(centred @ centred)
    half = float(scipy.stats.t.ppf((1 + level) / 2, n - 2)) * error
    slope = float(fit.slope)
    return {"slope": slope, "low": slope - half, "high": slope + half}


def after_warmup(samples: Sequence[Mapping[str, float]], share: float) -> list[Mapping[str, float]]:
    """The samples without the first share of the steps."""
    start = share * samples[-1]["step"]
    return [one for one in samples if one["step"] > start]


def summarise(samples: Sequence[Mapping[str, float]], warmup: float) -> dict[str, dict[str, float]]:
    """Slope per 1,000 steps, first and last value of every series after the warm-up."""
    rest = after_warmup(samples, warmup)
    steps = [one["step"] for one in rest]
    return {
        name: trend(steps, [one[name] for one in rest]) | {"first": rest[0][name], "last": rest[-1][name]}
        for name in SERIES
    }


def failures(summary: Mapping[str, Mapping[str, float]], bound: float) -> list[str]:
    """What a run that leaks nothing would not show."""
    found = []
    memory = summary["rss_mib"]
    if memory["high"] > bound:
        found.append(
            f"memory grows by {memory['slope']:.2f} MiB per 1,000 steps [{memory['low']:.2f}, {memory['high']:.2f}], "
            f"at most {bound} wanted"
        )
    for name in FLAT:
        if summary[name]["last"] > summary[name]["first"]:
            found.append(
                f"{name}: {summary[name]['first']:.0f} after the warm-up, {summary[name]['last']:.0f} at the end"
            )
    return found


def markdown(summary: Mapping[str, Mapping[str, float]]) -> str:
    """The table of the documentation."""
    lines = ["| series | after warm-up | at the end | slope per 1,000 steps [95 %] |", "| --- | --- | --- | --- |"]
    for name, one in summary.items():
        digits = 1 if name.endswith("mib") else 0
        span = f"{one['slope']:.2f} [{one['low']:.2f}, {one['high']:.2f}]"
        lines.append(f"| {name} | {one['first']:.{digits}f} | {one['last']:.{digits}f} | {span} |")
    return "\n".join(lines)


def plot(samples: Sequence[Mapping[str, float]], warmup: float, path: Path) -> None:
    """A picture with one panel per series; the warm-up is grey."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(len(SERIES), sharex=True, figsize=(7, 1.6 * len(SERIES)), layout="constrained")
    steps = [one["step"] for one in samples]
    for axis, name in zip(axes, SERIES, strict=True):
        axis.plot(steps, [one[name] for one in samples], marker=".", markersize=3, linewidth=1)
        axis.axvspan(steps[0], warmup * steps[-1], color="0.9")
        axis.set_ylabel(name)
    axes[-1].set_xlabel("optimizer step")
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


# ---- the command


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line, checked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--every", type=int, default=50, help="steps between samples")
    parser.add_argument("--save-every", type=int, default=100, help="steps between checkpoints")
    parser.add_argument("--warmup", type=float, default=0.25, help="share of the steps that is left out")
    parser.add_argument("--bound", type=float, default=0.5, help="MiB per 1,000 steps")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path, help="file for samples and slopes")
    parser.add_argument("--plot", type=Path, help="file for a picture, needs matplotlib")
    parser.add_argument("--check", action="store_true", help="exit with 1 where something grows")
    parser.add_argument("overrides", nargs="*", help="settings of the recipe, KEY=VALUE")
    options = parser.parse_args(argv)
    if not 0 <= options.warmup < 1:
        parser.error(f"--warmup {options.warmup} must be in [0, 1)")
    kept = sum(step > options.warmup * options.steps for step in range(options.every, options.steps + 1, options.every))
    if kept < 4:
        parser.error(
            f"--steps {options.steps} with --every {options.every} leave {kept} samples; at least 4 are needed"
        )
    return options


def main(argv: Sequence[str] | None = None) -> int:
    """Run, print, write; 1 where `--check` fails."""
    options = arguments(argv)
    torch.set_num_threads(options.threads)
    samples, seconds = run(options.steps, options.every, options.save_every, options.overrides)
    summary = summarise(samples, options.warmup)
    print(f"{options.steps} steps in {seconds:.0f} s, the first {options.warmup:.0%} left out\n")
    print(markdown(summary))
    missed = failures(summary, options.bound) if options.check else []
    for line in missed:
        print(f"MISSED {line}")
    if options.plot:
        plot(samples, options.warmup, options.plot)
    if options.json:
        settings = {
            name: getattr(options, name) for name in ("steps", "every", "save_every", "warmup", "bound", "threads")
        }
        facts = {"torch": torch.__version__, "cores": os.cpu_count()}
        record = {"machine": facts, "settings": settings, "seconds": seconds, "summary": summary}
        options.json.write_text(json.dumps(record | {"samples": samples, "missed": missed}, indent=1) + "\n")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
