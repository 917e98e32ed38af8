"""Kill a training run again and again, continue it each time, and compare it with one that nobody disturbed.

    python scripts/kill_loop.py [RECIPE] [--kills 20] [--seed 0] [--out DIR] [KEY=VALUE ...]

The recipe (default: the demo, shortened to 32 updates) is trained once undisturbed. Then it is trained with SIGKILL at
random moments, `resume=auto` after each: three of four moments are uniform over the life of the undisturbed run, in
order, so that start-up, evaluations, rollouts, updates and saving are met in proportion to their time; the others are
uniform over the start-up of a continuation, which an undisturbed run does not have. At the end the two runs must agree
in every parameter and in every number that is not a time. Exits with 1 on a difference.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd
import torch
import yaml
from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file

from rltok.run_start import RunDirectory

SHORT = (
    "training.max_steps=32",
    "training.save_steps=2",
    "training.per_device_train_batch_size=16",
    "training.num_generations=8",
    "training.steps_per_generation=4",
    "data.train_size=512",
    "data.heldout_size=48",
    "expect=[]",
)
"""What makes the demo short enough to be killed twenty times in minutes."""
START_UP_SHARE = 0.25
"""Share of the kills that fall into the start-up of a continuation."""
POLL = 0.01
"""Seconds between two looks at a run's files."""
TIMED = ("seconds", "time", "per_second", "runtime")
"""Parts of names of numbers that differ between any two runs."""


# What a run's files tell of where it is


@dataclass
class Watch:
    """Events of one life of a run, as its files show them; files of an earlier life do not count."""

    run: RunDirectory
    events: dict[str, float] = field(default_factory=dict)
    """name -> seconds since the process was started, in the order seen"""

    def __post_init__(self) -> None:
        self._start, self._clock = time.monotonic(), time.time()
        self._old = {path: _identity(path) for path in (self.run.recipe, self.run.metrics)}

    def seconds(self) -> float:
        """Age of this life."""
        return time.monotonic() - self._start

    def look(self) -> None:
        """Note what has happened since the last look."""
        if self._renewed(self.run.recipe):
            self._note("files written")
        if "files written" in self.events and self.run.evaluation("before").is_file():
            self._note("evaluated before")
        if self._renewed(self.run.metrics):
            self._note("training began")
            for line in _whole_lines(self.run.metrics):
                self._note(f"step {line}")
        for name in ("after", "summary"):
            file = self.run.summary if name == "summary" else self.run.evaluation("after")
            if file.is_file() and "training began" in self.events:
                self._note("summary" if name == "summary" else "evaluated after")

    def phase(self, last_step: int) -> str:
        """What the run was doing when it was looked at last."""
        if "files written" not in self.events:
            return "start-up"
        if "training began" not in self.events:
            if not _checkpoints(self.run) and "evaluated before" not in self.events:
                return "evaluation before"
            return "loading the checkpoint" if _checkpoints(self.run) else "before the first step"
        if any(self._is_half_written(folder) for folder in _checkpoints(self.run)):
            return "saving"
        if "evaluated after" in self.events:
            return "summary"
        step = max(self.steps(), default=0)
        if step >= last_step:
            return "evaluation after"
        return "update" if step % _updates_per_rollout(self.run) else "rollout and first update"

    def steps(self) -> list[int]:
        """Steps that this life has logged or found logged."""
        return [int(name.split()[1]) for name in self.events if name.startswith("step ")]

    def _note(self, name: str) -> None:
        self.events.setdefault(name, self.seconds())

    def _is_half_written(self, folder: Path) -> bool:
        """Unsealed, and not just left so by an earlier life."""
        try:
            return not (folder / "manifest.json").is_file() and folder.stat().st_mtime > self._clock
        except FileNotFoundError:
            return False

    def _renewed(self, path: Path) -> bool:
        now = _identity(path)
        return now is not None and now != self._old[path]


def _identity(path: Path) -> tuple[int, int] | None:
    """Device and inode; a file that is replaced and not appended to gets another one."""
    try:
        found = path.stat()
    except FileNotFoundError:
        return None
    return found.st_dev, found.st_ino


def _whole_lines(path: Path) -> list[int]:
    found = []
    for text in path.read_text(encoding="utf-8").splitlines():
        try:
            found.append(int(json.loads(text)["step"]))
        except (ValueError, KeyError):
            continue
    return found


def _updates_per_rollout(run: RunDirectory) -> int:
    training = yaml.safe_load(run.recipe.read_text(encoding="utf-8"))["training"]
    window = training.get("gradient_accumulation_steps", 1)
    return max(1, training.get("steps_per_generation", window) * training.get("num_iterations", 1) // window)


def _checkpoints(run: RunDirectory) -> list[Path]:
    return sorted(run.path.glob("checkpoint-*"))


# Lives


@dataclass(frozen=True)
class Moment:
    """When to kill: so many seconds after an event."""

    event: str
    seconds: float


@dataclass(frozen=True)
class Kill:
    """One life that was ended."""

    age: float
    """seconds since its process was started"""
    phase: str
    step: int
    """the last logged one"""
    whole: int
    """step of the newest whole checkpoint, 0 where there is none"""


def start(recipe: str, settings: Sequence[str], log: Path) -> subprocess.Popen[bytes]:
    """A training process in a session of its own, with its output appended to a file."""
    command = [sys.executable, "-m", "rltok", "train", recipe, *settings, "report.progress=lines"]
    with log.open("ab") as file:
        return subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, start_new_session=True)


def live(
    recipe: str, settings: Sequence[str], run: RunDirectory, log: Path, moment: Moment | None
) -> tuple[Watch, int]:
    """One life of a run: to its end, or until `moment`, when its process and all its children are killed.

    Returns:
        What was seen, and the exit status, negative for a signal.
    """
    watch = Watch(run)
    process = start(recipe, settings, log)
    try:
        while process.poll() is None:
            watch.look()
            since = 0.0 if moment is None or moment.event == "start" else watch.events.get(moment.event, math.inf)
            if moment is not None and watch.seconds() >= since + moment.seconds:
                break
            time.sleep(POLL)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    return watch, process.wait()


def moments(watch: Watch, kills: int, generator: random.Random) -> list[Moment]:
    """`kills` moments, in the order in which a run meets them: over its life, and over start-ups in between."""
    marks = [("start", 0.0), *watch.events.items()]
    end = watch.events["summary"]
    start_up = watch.events["training began"] - (
        watch.events["evaluated before"] - watch.events["files written"] if "evaluated before" in watch.events else 0.0
    )
    in_life = sorted(generator.uniform(0.0, end) for _ in range(kills - round(START_UP_SHARE * kills)))
    found = []
    for second in in_life:
        event, at = max((mark for mark in marks if mark[1] <= second), key=lambda mark: mark[1])
        found.append(Moment(event, second - at))
    for _ in range(kills - len(found)):
        place = generator.randrange(1, len(found) + 1) if found else 0  # after the first life
        found.insert(place, Moment("start", generator.uniform(0.0, start_up)))
    return found


def newest_whole(run: RunDirectory) -> int:
    """Step of the newest sealed checkpoint, 0 without one."""
    steps = [int(path.name.split("-")[1]) for path in _checkpoints(run) if (path / "manifest.json").is_file()]
    return max(steps, default=0)


def kill_loop(
    recipe: str, settings: Sequence[str], run: RunDirectory, log: Path, plan: Sequence[Moment], last_step: int
) -> list[Kill]:
    """Start, kill, continue; then one life to the end.

    Raises:
        SystemExit: a life ended by itself with an error.
    """
    killed = []
    for number, moment in enumerate([*plan, None], start=1):
        watch, status = live(recipe, settings, run, log, moment)
        watch.look()
        if status == -signal.SIGKILL:
            logged = _whole_lines(run.metrics) if run.metrics.is_file() else []
            step = max(logged, default=0)
            killed.append(Kill(watch.seconds(), watch.phase(last_step), step, newest_whole(run)))
        elif status:
            raise SystemExit(f"life {number} ended with status {status}; its output is in {log}")
        elif moment is not None:
            break  # it was done before its moment came; the kills are counted at the end
    return killed


# Comparison


def differences(one: RunDirectory, other: RunDirectory) -> list[str]:
    """What the second run has otherwise than the first; times aside."""
    found = [f"{name} is missing" for name in ("summary.json", "metrics.jsonl") if not (other.path / name).is_file()]
    if found:
        return found
    found += _other_parameters(one, other)
    steps = [line["step"] for line in other.read_metrics()]
    if steps != sorted(set(steps)):
        found.append(f"metrics.jsonl: steps {steps}")
    for name, (mine, theirs) in {
        "metrics.jsonl": (one.read_metrics(), other.read_metrics()),
        "summary.json": tuple(_figures(run) for run in (one, other)),
        "evaluation_before.json": tuple(_evaluation(run, "before") for run in (one, other)),
        "evaluation_after.json": tuple(_evaluation(run, "after") for run in (one, other)),
    }.items():
        if _untimed(mine) != _untimed(theirs):
            found.append(f"{name} differs")
    for folder in ("samples", "completions", "."):
        found += _other_tables(one.path / folder, other.path / folder)
    return found


def _other_parameters(one: RunDirectory, other: RunDirectory) -> list[str]:
    mine, theirs = (load_file(_final(run) / "model.safetensors") for run in (one, other))
    if mine.keys() != theirs.keys():
        return ["the final checkpoints hold other parameters"]
    bad = [name for name, value in mine.items() if not torch.equal(value, theirs[name])]
    largest = max(((mine[name] - theirs[name]).abs().max().item() for name in bad), default=0.0)
    return [f"{len(bad)} of {len(mine)} parameters differ, by up to {largest:.3g}"] if bad else []


def _final(run: RunDirectory) -> Path:
    return run.path / Path(json.loads(run.summary.read_text())["checkpoint"]).name


def _figures(run: RunDirectory) -> dict[str, Any]:
    return {key: value for key, value in json.loads(run.summary.read_text()).items() if key != "checkpoint"}


def _evaluation(run: RunDirectory, which: Any) -> Any:
    file = run.evaluation(which)
    return json.loads(file.read_text()) if file.is_file() else None


def _untimed(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _untimed(item) for key, item in value.items() if not any(word in key for word in TIMED)}
    return [_untimed(item) for item in value] if isinstance(value, list) else value


def _other_tables(mine: Path, theirs: Path) -> list[str]:
    names, found = {path.name for path in mine.glob("*.parquet")}, {path.name for path in theirs.glob("*.parquet")}
    if names != found:
        return [f"{theirs.name}: other files: {sorted(names ^ found)}"]
    bad = []
    for name in sorted(names):
        try:
            pd.testing.assert_frame_equal(pd.read_parquet(mine / name), pd.read_parquet(theirs / name))
        except AssertionError as error:
            bad.append(f"{theirs.name}/{name}: {str(error).splitlines()[0]}")
    return bad


# Report


def show(console: Console, killed: Sequence[Kill]) -> None:
    """Where the kills fell."""
    table = Table(title="kills")
    for column in ("", "phase", "seconds of its life", "last logged step", "whole checkpoint"):
        table.add_column(column, justify="left" if column == "phase" else "right")
    for number, kill in enumerate(killed, start=1):
        table.add_row(str(number), kill.phase, f"{kill.age:.1f}", str(kill.step), str(kill.whole or "-"))
    console.print(table)
    counts = Counter(kill.phase for kill in killed)
    console.print("by phase: " + ", ".join(f"{phase} {count}" for phase, count in counts.most_common()))


def parse(arguments: Sequence[str] | None) -> tuple[argparse.Namespace, list[str]]:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("words", nargs="*", metavar="[RECIPE] [KEY=VALUE ...]")
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--out", type=Path, help="kept afterwards; default: a temporary folder")
    found = parser.parse_args(arguments)
    found.recipe = next((word for word in found.words if "=" not in word), "demo")
    given = [word for word in found.words if "=" in word]
    return found, [*(SHORT if found.recipe == "demo" else ()), *given]


def main(arguments: Sequence[str] | None = None) -> int:
    """0 if the killed run equals the undisturbed one."""
    options, settings = parse(arguments)
    console = Console(soft_wrap=True, highlight=False)
    folder = options.out or Path(tempfile.mkdtemp(prefix="kill-loop-"))
    folder.mkdir(parents=True, exist_ok=True)
    whole, cut = RunDirectory(folder / "whole"), RunDirectory(folder / "killed")
    if whole.path.exists() or cut.path.exists():
        raise SystemExit(f"--out: {folder} holds the runs of an earlier loop; delete it or name another folder")
    began = time.monotonic()
    own = [*settings, f"output_dir={json.dumps(str(whole.path))}"]
    watch, status = live(options.recipe, own, whole, folder / "whole.log", None)
    watch.look()
    if status:
        raise SystemExit(f"the undisturbed run ended with status {status}; its output is in {folder / 'whole.log'}")
    last = max(watch.steps())
    console.print(f"undisturbed: {last} steps in {watch.seconds():.0f} s, {' '.join([options.recipe, *settings])}")
    plan = moments(watch, options.kills, random.Random(options.seed))
    own = [*settings, f"output_dir={json.dumps(str(cut.path))}", "resume=auto"]
    killed = kill_loop(options.recipe, own, cut, folder / "killed.log", plan, last)
    show(console, killed)
    found = differences(whole, cut)
    if len(killed) < options.kills:
        found.append(f"only {len(killed)} of {options.kills} kills came before the end; use a longer run")
    console.print(f"{time.monotonic() - began:.0f} s in all")
    for line in found:
        console.print(f"DIFFERENT: {line}")
    if not found:
        console.print(f"after {len(killed)} kills: the same parameters, metrics, samples and evaluations, bit for bit")
        if options.out is None:
            shutil.rmtree(folder)
    return 1 if found else 0


if __name__ == "__main__":
    raise SystemExit(main())
