"""Run what a comparison still lacks: one process after another, each of which may be killed at any time.

<output_dir>/
    .lock                          held while a comparison, or a run that it started, is at work here
    recipes/<task>-<arm>.yaml      what its runs train by: rltok train FILE seed=S output_dir=DIR resume=auto
    runs/<task>/<arm>/seed<S>/     run directories; beside each seed<S>.log, and seed<S>.json: seconds, attempts, status
"""

from __future__ import annotations

import json
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from rich.console import Console

from rltok.compare.plan import Plan, PlannedRun
from rltok.progress import clock
from rltok.run_lock import locked

Runner = Callable[[Sequence[str], Path], int]
"""Runs a command with its output appended to a file; returns the exit status, negative for a signal."""


def is_finished(run: PlannedRun) -> bool:
    """True if the run wrote its summary, which it does last."""
    from rltok.run import RunDirectory

    return RunDirectory(run.path).summary.is_file()


def train_command(recipe: Path, run: PlannedRun) -> list[str]:
    """What trains one run, or continues it from its last whole checkpoint."""
    settings = [f"seed={run.recipe.seed}", f"output_dir={json.dumps(str(run.path))}"]
    return [sys.executable, "-m", "rltok", "train", str(recipe), *settings, "resume=auto", "report.progress=lines"]


def run_missing(plan: Plan, runs: Sequence[PlannedRun], console: Console, runner: Runner | None = None) -> list[str]:
    """Run those of `runs` that are not finished, in order.

    Returns:
        What failed, one line for each run. The others are run all the same.

    Raises:
        ConfigError: another comparison is at work in the directory.
    """
    left = [run for run in runs if not is_finished(run)]
    failures: list[str] = []
    with _locked(plan.directory) as lock, _ended_by_signal():
        start = runner or (lambda command, log: run_process(command, log, lock))
        for number, run in enumerate(left, start=1):
            message = _run_one(plan, run, start)
            if message is not None:
                failures.append(message)
            told = message or f"{run}: done in {clock(_record(run)['seconds'])}"
            seconds = expected_seconds(left[number:], runs)
            rest = f"; about {clock(seconds)} left" if seconds else ""
            console.print(f"[{number}/{len(left)}] {told}{rest}", markup=False, highlight=False, soft_wrap=True)
    return failures


def _run_one(plan: Plan, run: PlannedRun, start: Runner) -> str | None:
    """None if the run is finished afterwards, else what went wrong."""
    from rltok.files import write_atomically, write_json

    recipe = plan.directory / "recipes" / f"{run.task}-{run.arm}.yaml"
    write_atomically(recipe, run.recipe.to_yaml())
    run.path.parent.mkdir(parents=True, exist_ok=True)
    log = run.path.with_suffix(".log")
    before, begun = _record(run), time.monotonic()
    status: int | None = None  # stays so where the comparison itself is interrupted
    try:
        status = start(train_command(recipe, run), log)
    finally:
        seconds = round(before["seconds"] + time.monotonic() - begun, 2)
        record = {"status": status, "seconds": seconds, "attempts": before["attempts"] + 1}
        write_json(run.path.with_suffix(".json"), record)
    if is_finished(run):
        return None
    assert status is not None
    ended = f"was ended by signal {-status}" if status < 0 else f"ended with status {status}"
    return f"{run}: {ended}; its last words are in {log}:\n{_last_lines(log)}"


def _record(run: PlannedRun) -> dict[str, Any]:
    """Time on the clock of all attempts at a run, as far as it was written down."""
    try:
        found = json.loads(run.path.with_suffix(".json").read_text(encoding="utf-8"))
        return {"seconds": float(found["seconds"]), "attempts": int(found["attempts"])}
    except (OSError, ValueError, KeyError, TypeError):
        return {"seconds": 0.0, "attempts": 0}


def wall_seconds(run: PlannedRun) -> float | None:
    """Time on the clock of a run with loading and evaluation, over all attempts; None if it was not written down."""
    return _record(run)["seconds"] or None


def expected_seconds(left: Sequence[PlannedRun], runs: Sequence[PlannedRun]) -> float | None:
    """Time that the runs in `left` will take, by the median of finished ones: of their task and arm, of their task,
    or of all; None while nothing is finished."""
    done = [(run, seconds) for run in runs if is_finished(run) and (seconds := wall_seconds(run))]
    if not done:
        return None
    total = 0.0
    for run in left:
        alike = [
            [s for r, s in done if (r.task, r.arm) == (run.task, run.arm)],
            [s for r, s in done if r.task == run.task],
            [s for _, s in done],
        ]
        total += statistics.median(next(group for group in alike if group))
    return total


def run_process(command: Sequence[str], log: Path, lock: IO[str] | None = None) -> int:
    """Run a command to its end; it holds `lock` too, and is ended when the caller is interrupted."""
    held = () if lock is None else (lock.fileno(),)
    with log.open("a", encoding="utf-8") as file:
        file.write(f"$ {' '.join(command)}\n")
        file.flush()
        process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, pass_fds=held)
        try:
            return process.wait()
        finally:
            if process.poll() is None:
                process.terminate()
                try:
                    process.wait(timeout=30)
                except subprocess.TimeoutExpired:
                    process.kill()
                    process.wait()


def _last_lines(log: Path, count: int = 5) -> str:
    text = log.read_text(encoding="utf-8", errors="replace") if log.is_file() else ""
    return "\n".join(f"    {line}" for line in text.rstrip().splitlines()[-count:])


@contextmanager
def _locked(directory: Path) -> Iterator[IO[str]]:
    """Hold the directory; the lock is shared with runs, so that one that outlives a killed comparison is noticed."""

    def busy(holder: str) -> str:
        return (
            f"{directory}: another comparison, or a run that one started, is still at work there ({holder}); wait for "
            "it, end it, or choose another output_dir"
        )

    with locked(directory, busy) as lock:
        yield lock


@contextmanager
def _ended_by_signal() -> Iterator[None]:
    """SIGTERM interrupts as Ctrl-C does, so that the run at work is ended and its time written down."""

    def interrupt(number: int, frame: Any) -> None:
        raise KeyboardInterrupt

    try:
        old = signal.signal(signal.SIGTERM, interrupt)
    except ValueError:  # not in the main thread, where signals do not arrive
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, old)
