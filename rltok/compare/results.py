"""What the finished runs of a comparison say: figures, and differences paired by seed and problem."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from rltok.compare.execute import is_finished, wall_seconds
from rltok.compare.intervals import Difference, Interval, holm, paired_difference, t_interval
from rltok.compare.plan import Plan, PlannedRun


class UnusableRun(Exception):
    """A finished run whose files are missing or damaged; the message says which."""


@dataclass(frozen=True)
class RunResult:
    """Figures of one finished run."""

    run: PlannedRun
    problems: tuple[str, ...]
    """prompts of the held-out problems, in order"""
    after: np.ndarray
    """(P,) metric of the trained policy on every problem"""
    before: np.ndarray | None
    """(P,) of the policy it started from; None if the recipe does not evaluate it"""
    means: Mapping[str, float]
    """every held-out mean after training"""
    training_mean: float | None
    """mean metric of all sampled completions: how early a run learned, by problems it trained on"""
    updates: int
    generated_tokens: float | None
    """completion tokens of all rollouts"""
    trained_tokens: float | None
    """completion tokens that entered the loss"""
    train_seconds: float
    """inside the training loop"""
    wall_seconds: float | None
    """with loading and evaluation"""
    versions: Mapping[str, str]


@dataclass(frozen=True)
class Cell:
    """One arm on one task."""

    task: str
    arm: str
    results: tuple[RunResult, ...]
    """of its seeds, in order; not empty"""
    accuracy: Interval
    """mean metric with its interval over seeds"""
    difference: Difference | None
    """to the baseline over common seeds; None for the baseline itself, and where there are none"""
    pairs: tuple[int, ...]
    """seeds of the difference"""
    adjusted_p: float | None = None
    """p value of the difference, by Holm over all differences of the comparison"""

    def mean(self, name: str) -> float | None:
        """Mean of a figure of `RunResult` over seeds; None where a run lacks it."""
        values = [getattr(result, name) for result in self.results]
        return None if any(value is None for value in values) else float(np.mean(values))


@dataclass(frozen=True)
class Results:
    """All that a comparison found so far."""

    plan: Plan
    cells: tuple[Cell, ...]
    """by task, then arm, in the order of the file; arms without a finished run are left out"""
    learning: Mapping[str, Difference]
    """task -> baseline after minus before training, paired likewise; without tasks that were not evaluated before"""
    missing: tuple[PlannedRun, ...]
    """runs that are not finished"""
    unusable: tuple[str, ...]
    """runs that are finished and cannot be read, with the reason"""

    @property
    def comparisons(self) -> int:
        """Number of differences with a p value: what Holm's correction counts."""
        return sum(cell.adjusted_p is not None for cell in self.cells)

    def of_task(self, task: str) -> list[Cell]:
        """Cells of one task."""
        return [cell for cell in self.cells if cell.task == task]


def read_results(plan: Plan) -> Results:
    """Read every finished run of a plan and compute its differences."""
    found: dict[tuple[str, str], list[RunResult]] = {}
    missing, unusable = [], []
    for run in plan.runs:
        if not is_finished(run):
            missing.append(run)
            continue
        try:
            result = read_run(run, plan.comparison.metric)
        except UnusableRun as error:
            unusable.append(f"{run}: {error}")
            continue
        found.setdefault((run.task, run.arm), []).append(result)
    unusable += _drop_other_problems(plan, found)
    cells = [
        _cell(plan, task, arm, found)
        for task in plan.comparison.tasks
        for arm in plan.comparison.arms
        if found.get((task, arm))
    ]
    adjusted = holm([None if cell.difference is None else cell.difference.p for cell in cells])
    cells = [Cell(**(vars(cell) | {"adjusted_p": p})) for cell, p in zip(cells, adjusted, strict=True)]
    return Results(plan, tuple(cells), _learning(plan, found), tuple(missing), tuple(unusable))


def _drop_other_problems(plan: Plan, found: dict[tuple[str, str], list[RunResult]]) -> list[str]:
    """Leave out runs that were judged by other problems than the first run of their task; say which."""
    told = []
    for task in plan.comparison.tasks:
        wanted: tuple[str, ...] | None = None
        for (where, _), results in found.items():
            for result in list(results) if where == task else []:
                wanted = result.problems if wanted is None else wanted
                if result.problems != wanted:
                    results.remove(result)
                    told.append(
                        f"{result.run}: judged by other held-out problems than the first run; delete and repeat"
                    )
    return told


def _cell(plan: Plan, task: str, arm: str, found: Mapping[tuple[str, str], Sequence[RunResult]]) -> Cell:
    results, level = found[task, arm], plan.comparison.level
    accuracy = t_interval([float(result.after.mean()) for result in results], level)
    own = {result.run.seed: result.after for result in results}
    base = {result.run.seed: result.after for result in found.get((task, plan.comparison.baseline), ())}
    pairs = tuple(seed for seed in own if seed in base)
    difference = None
    if arm != plan.comparison.baseline and pairs:
        difference = paired_difference(np.stack([own[s] for s in pairs]), np.stack([base[s] for s in pairs]), level)
    return Cell(task, arm, tuple(results), accuracy, difference, pairs)


def _learning(plan: Plan, found: Mapping[tuple[str, str], Sequence[RunResult]]) -> dict[str, Difference]:
    learning = {}
    for task in plan.comparison.tasks:
        results = found.get((task, plan.comparison.baseline), ())
        before = [result.before for result in results if result.before is not None]
        if results and len(before) == len(results):
            after = np.stack([result.after for result in results])
            learning[task] = paired_difference(after, np.stack(before), plan.comparison.level)
    return learning


# One run


def read_run(run: PlannedRun, metric: str) -> RunResult:
    """Figures of a finished run.

    Raises:
        UnusableRun: a file is missing or damaged, or a problem has no value of the metric.
    """
    from rltok.run import RunDirectory

    directory = RunDirectory(run.path)
    summary = _read_json(directory.summary)
    problems, after = _read_problems(directory.evaluation_rows("after"), metric)
    before = None
    if directory.evaluation_rows("before").is_file():
        started, before = _read_problems(directory.evaluation_rows("before"), metric)
        if started != problems:
            raise UnusableRun("its problems before and after training differ; delete and repeat it")
    lines = directory.read_metrics()
    try:
        return RunResult(
            run=run,
            problems=problems,
            after=after,
            before=before,
            means={str(key): float(value) for key, value in summary["after"].items() if value is not None},
            training_mean=_mean(lines, f"rewards/{metric}/mean"),
            updates=int(summary["steps"]),
            generated_tokens=generated_tokens(lines, run, int(summary["steps"])),
            trained_tokens=_last(lines, "trained_tokens"),
            train_seconds=float(summary["train_seconds"]),
            wall_seconds=wall_seconds(run),
            versions=dict(summary["versions"]),
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UnusableRun(f"{directory.summary} is damaged ({type(error).__name__}: {error})") from error


def generated_tokens(lines: Sequence[Mapping[str, Any]], run: PlannedRun, updates: int) -> float | None:
    """Completion tokens of all rollouts on one process: logged mean lengths times completions.

    TRL logs the mean length of a rollout's completions with the update after it. None where it was not logged.
    """
    from rltok.estimate import check_combination

    length = _mean(lines, "completions/mean_length")
    if length is None:
        return None
    args = check_combination(run.recipe)
    per_rollout = args.steps_per_generation * args.num_iterations / args.gradient_accumulation_steps
    rollouts = -(-updates // per_rollout)
    return length * rollouts * args.per_device_train_batch_size * args.steps_per_generation


def _mean(lines: Sequence[Mapping[str, Any]], name: str) -> float | None:
    values = [line[name] for line in lines if line.get(name) is not None]
    return float(np.mean(values)) if values else None


def _last(lines: Sequence[Mapping[str, Any]], name: str) -> float | None:
    values = [line[name] for line in lines if line.get(name) is not None]
    return float(values[-1]) if values else None


def _read_json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UnusableRun(f"{path} is missing or damaged ({error})") from error
    if not isinstance(found, dict):
        raise UnusableRun(f"{path} is damaged: it holds no mapping")
    return found


def _read_problems(path: Path, metric: str) -> tuple[tuple[str, ...], np.ndarray]:
    """Prompts, and the metric of each averaged over its samples, in the order of the data set."""
    import pandas as pd

    try:
        table = pd.read_parquet(path, columns=["row", "prompt", metric])
    except Exception as error:  # pyarrow, pandas and the system have a dozen words for a file that is no table
        raise UnusableRun(f"{path} is missing or damaged ({type(error).__name__})") from error
    table["prompt"] = [json.dumps(_plain(prompt), sort_keys=True) for prompt in table["prompt"]]
    each = table.groupby("row", sort=True).agg({"prompt": "first", metric: "mean"})
    values = each[metric].to_numpy(dtype=float)
    if not len(values) or not np.isfinite(values).all():
        raise UnusableRun(f"{path} has problems without a value of {metric!r}")
    return tuple(each["prompt"]), values


def _plain(prompt: Any) -> Any:
    """A conversation as Parquet returns it, as plain values."""
    return prompt if isinstance(prompt, str) else [dict(message) for message in prompt]
