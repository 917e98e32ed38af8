"""`rltok compare`: plan, run what is missing, tell what was found."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from rltok.compare import intervals, plot
from rltok.compare.execute import Runner, expected_seconds, is_finished, run_missing
from rltok.compare.plan import Plan, PlannedRun, make_plan
from rltok.compare.results import Results, read_results
from rltok.compare.words import (
    caveats,
    differences_csv,
    learning_words,
    markdown,
    rich_table,
    runs_csv,
    verdict_words,
)
from rltok.config import ConfigError, suggestion
from rltok.progress import clock

INTERRUPTED = 130
"""Exit status after Ctrl-C, as shells have it."""


def compare(
    path: str | Path,
    console: Console,
    only: Sequence[str] | None = None,
    dry_run: bool = False,
    overrides: Sequence[str] = (),
    runner: Runner | None = None,
) -> int:
    """Run what a comparison still lacks and write its report.

    Args:
        path: a comparison file, or the name of a shipped one.
        console: where progress, tables and verdicts go.
        only: run only these arms, tasks or `task/arm` pairs; the report covers whatever is finished.
        dry_run: print the plan and the expected time; run and write nothing.
        overrides: `key.path=value` over the file, such as `seeds=[0]`.
        runner: what runs a command; default: a process.

    Returns:
        0; 1 if a run failed or its files are unusable; 130 if it was interrupted.

    Raises:
        ConfigError: whatever `make_plan` refuses, an unknown name in `only`, or a missing library; before any run.
    """
    plan = make_plan(path, overrides)
    chosen = choose(plan, only)
    if dry_run:
        _print_plan(plan, chosen, console)
        return 0
    intervals.check_installed()
    plot.check_installed()
    total, left = len(chosen), sum(not is_finished(run) for run in chosen)
    _say(console, f"{plan.comparison.name}: {total} runs, {total - left} finished, {left} to do, in {plan.directory}")
    try:
        failures = run_missing(plan, chosen, console, runner)
    except KeyboardInterrupt:
        _say(console, "interrupted; the same command goes on from here")
        return INTERRUPTED
    results = read_results(plan)
    files = write_report(results, _command(path, overrides))
    _print_results(results, console)
    for failure in failures:
        _say(console, f"FAILED {failure}")
    _say(console, f"report: {', '.join(str(file) for file in files)}")
    return 1 if failures or results.unusable else 0


def choose(plan: Plan, only: Sequence[str] | None) -> list[PlannedRun]:
    """Runs of some arms, tasks or `task/arm` pairs, all without.

    Raises:
        ConfigError: a name that is none of them.
    """
    names = dict.fromkeys([*plan.comparison.arms, *plan.comparison.tasks])
    pairs = {f"{run.task}/{run.arm}" for run in plan.runs}
    for name in only or ():
        if name not in names and name not in pairs:
            raise ConfigError(f"--only {name}: no arm, task or task/arm of {plan.file}{suggestion(name, names)}")
    if not only:
        return list(plan.runs)
    return [run for run in plan.runs if {run.task, run.arm, f"{run.task}/{run.arm}"} & set(only)]


def write_report(results: Results, command: str) -> list[Path]:
    """Write report, picture and tables into the directory of a comparison; equal results give equal files."""
    from rltok.files import write_atomically

    folder = results.plan.directory
    pictures = plot.draw(results, folder)
    figure = pictures[0].name if pictures else None
    texts = {
        "comparison.md": markdown(results, command, figure),
        "runs.csv": runs_csv(results),
        "differences.csv": differences_csv(results),
    }
    for name, text in texts.items():
        write_atomically(folder / name, text)
    return [*(folder / name for name in texts), *pictures]


def _command(path: str | Path, overrides: Sequence[str]) -> str:
    return shlex.join(["rltok", "compare", str(path), *overrides])


def _print_plan(plan: Plan, chosen: Sequence[PlannedRun], console: Console) -> None:
    comparison, budget = plan.comparison, plan.budget
    table = Table(title=f"{comparison.name}: {len(plan.runs)} runs, baseline {comparison.baseline}")
    table.add_column("arm", no_wrap=True)
    table.add_column("recipe", no_wrap=True)
    table.add_column("what it is")
    for task in comparison.tasks:
        table.add_column(f"{task}: seeds (finished)", justify="right")
    for name, arm in comparison.arms.items():
        cells = []
        for task in comparison.tasks:
            own = [run for run in chosen if (run.task, run.arm) == (task, name)]
            done = sum(is_finished(run) for run in own)
            cells.append(f"{', '.join(str(run.seed) for run in own) or '-'} ({done})")
        table.add_row(name, arm.recipe or comparison.base, arm.about, *cells)
    console.print(table)
    for task, settings in budget.items():
        equal = ", ".join(f"{setting} {value}" for setting, value in settings.items())
        _say(console, f"equal in all runs of {task}: {equal}")
    left = [run for run in chosen if not is_finished(run)]
    _say(console, f"{len(left)} runs to do, in {plan.directory}")
    seconds = expected_seconds(left, plan.runs)
    if seconds is None:
        first = f"--only {comparison.baseline}"
        _say(console, f"expected time: unknown until a run is finished; measure one arm first with {first}")
    else:
        _say(console, f"expected time: {clock(seconds)}, by the runs that are finished")


def _print_results(results: Results, console: Console) -> None:
    for line in learning_words(results):
        _say(console, line)
    for task in results.plan.comparison.tasks:
        cells = results.of_task(task)
        if not cells:
            continue
        console.print(rich_table(task, results))
        for cell in cells:
            if cell.difference is not None:
                _say(console, verdict_words(cell, results))
    for line in caveats(results):
        _say(console, line)


def _say(console: Console, line: str) -> None:
    console.print(line, markup=False, highlight=False, soft_wrap=True)
