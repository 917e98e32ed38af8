"""What a comparison says, in words and tables: nothing here that the figures do not carry."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from typing import Any

from rich.table import Table

from rltok.compare.intervals import Interval
from rltok.compare.results import Cell, Results
from rltok.progress import clock

COLUMNS = (
    "arm",
    "seeds",
    "mean",
    "while training",
    "difference",
    "over problems",
    "verdict",
    "Holm p",
    "generated tokens",
    "trained tokens",
    "train time",
)

SHOWN_MISSING = 12
"""Arms with runs that are not finished are named up to so many"""


def verdict_words(cell: Cell, results: Results) -> str:
    """Whether an arm differs from the baseline on a task, in one sentence with the numbers behind it."""
    comparison = results.plan.comparison
    difference = cell.difference
    assert difference is not None
    name, base, where = cell.arm, comparison.baseline, f" on {cell.task}" if len(comparison.tasks) > 1 else ""
    seeds, problems = difference.seeds, difference.problems
    counts = f"{_count(seeds.count, 'seed')}, {_count(problems.count, 'problem')}"
    mean = points(difference.mean)
    if difference.verdict == "undecided":
        return f"{name} cannot be told from {base}{where}: {mean} points with {counts} says nothing about noise."
    level = f"{100 * comparison.level:g} % interval"
    told = f"{mean} points, {level} {_span(seeds)} over seeds and {_span(problems)} over problems ({counts})"
    if difference.verdict == "within noise":
        return f"{name} is within noise of {base}{where}: {told}."
    sentence = f"{name} is {difference.verdict} {base}{where}: {told}"
    if survives(cell, results):
        return f"{sentence}; this holds after Holm's correction for {_count(results.comparisons, 'comparison')}."
    return (
        f"{sentence}; taken alone only: it does not hold after Holm's correction for "
        f"{_count(results.comparisons, 'comparison')} (p = {cell.adjusted_p:.2g})."
    )


def survives(cell: Cell, results: Results) -> bool:
    """True if a difference still counts after the correction for the number of comparisons."""
    decided = cell.difference is not None and cell.difference.verdict in ("above", "below")
    return decided and cell.adjusted_p is not None and cell.adjusted_p <= 1 - results.plan.comparison.level


def learning_words(results: Results) -> list[str]:
    """Whether the baseline learned at all, without which no difference means anything; one line for each task."""
    comparison = results.plan.comparison
    lines = []
    for task in comparison.tasks:
        difference = results.learning.get(task)
        where = f" on {task}" if len(comparison.tasks) > 1 else ""
        if difference is None:
            reason = "evaluation.before is false" if _finished(task, results) else "no run of it is finished"
            lines.append(f"Whether {comparison.baseline} learned{where} is not known: {reason}.")
        elif difference.verdict == "undecided":
            lines.append(
                f"{comparison.baseline}{where}: {points(difference.mean)} points since the start; with "
                f"{_count(difference.seeds.count, 'seed')} that says nothing about noise."
            )
        elif difference.verdict == "above":
            lines.append(
                f"{comparison.baseline} learned{where}: {points(difference.mean)} points of {comparison.metric} since "
                f"the start, {100 * comparison.level:g} % interval {_span(difference.seeds)} over seeds."
            )
        else:
            lines.append(
                f"{comparison.baseline} did not clearly learn{where} ({points(difference.mean)} points since the "
                "start): this comparison says nothing about methods there."
            )
    return lines


def _finished(task: str, results: Results) -> bool:
    return any(cell.arm == results.plan.comparison.baseline for cell in results.of_task(task))


def caveats(results: Results) -> list[str]:
    """What a reader must know before believing a table."""
    comparison = results.plan.comparison
    lines = [f"left out: {line}" for line in results.unusable]
    if results.missing:
        told = _missing(results)
        rest = f"; and {len(told) - SHOWN_MISSING} more" if len(told) > SHOWN_MISSING else ""
        count = f"{len(results.missing)} of {len(results.plan.runs)} runs"
        lines.append(f"not finished, {count}: {'; '.join(told[:SHOWN_MISSING])}{rest}")
    alpha = 1 - comparison.level
    if results.comparisons > 1:
        lines.append(
            f"{results.comparisons} comparisons with one baseline: if no arm differed, up to about "
            f"{alpha * results.comparisons:.2g} of them would still look like a difference by their intervals alone. "
            f"Holm's correction keeps the chance of even one below {alpha:.2g}."
        )
    builds = {tuple(sorted(result.versions.items())) for cell in results.cells for result in cell.results}
    if len(builds) > 1:
        lines.append("the runs were made with different versions of libraries; see summary.json of each")
    return lines


def _missing(results: Results) -> list[str]:
    """Arms with the seeds that are not finished."""
    seeds: dict[str, list[str]] = {}
    for run in results.missing:
        seeds.setdefault(f"{run.task} {run.arm}", []).append(str(run.seed))
    return [f"{name} seed{'s' if len(own) > 1 else ''} {', '.join(own)}" for name, own in seeds.items()]


def method_words(results: Results) -> list[str]:
    """How the figures were made, and how to read them."""
    comparison = results.plan.comparison
    level, base = f"{100 * comparison.level:g} %", comparison.baseline
    tasks = {task: _budget(budget) for task, budget in results.plan.budget.items()}
    alike = len(set(tasks.values())) == 1
    spent = next(iter(tasks.values())) if alike else "; ".join(f"{task}: {told}" for task, told in tasks.items())
    wall = [result.wall_seconds for cell in results.cells for result in cell.results]
    took = [f"All {len(wall)} runs took {clock(sum(s or 0.0 for s in wall))} on the clock."] if all(wall) else []
    return [
        f"Mean: held-out `{comparison.metric}` over seeds, with Student's t interval ({level}) over seeds.",
        "While training: mean over all sampled completions, which shows how early an arm learned; not tested.",
        f"Difference: arm minus `{base}` in points (hundredths), paired by seed and by held-out problem, with a t "
        f"interval ({level}) over seeds (do other seeds say the same?) and one over problems (do other problems?).",
        "Verdict: `above` and `below` if neither interval holds 0. `within noise`: one does, so that these data do not "
        "tell the two apart; that is no proof that they are equal.",
        "Holm p: the larger of the two p values, corrected for the number of comparisons; * marks those that still "
        "count.",
        f"Budget, equal in all runs of a task: {spent}. Generated tokens are those of all rollouts, trained ones those "
        "that entered the loss, both as measured; time is that of the training loop.",
        *took,
    ]


def _budget(budget: Mapping[str, Any]) -> str:
    steps, epochs = budget["max_steps"], budget["num_train_epochs"]
    length = f"{steps} updates" if steps > 0 else f"{epochs:g} epochs"
    completions = budget["per_device_train_batch_size"] * budget["steps_per_generation"]
    return f"{length}, {completions} completions per rollout of at most {budget['max_completion_length']} tokens"


# Tables


def table_rows(cells: Sequence[Cell], results: Results) -> list[list[str]]:
    """Cells of a table of one task, by `COLUMNS`."""
    rows = []
    for cell in cells:
        difference = cell.difference
        p = "" if cell.adjusted_p is None else f"{cell.adjusted_p:.2g}{' *' if survives(cell, results) else ''}"
        baseline = cell.arm == results.plan.comparison.baseline
        tokens = [cell.mean("generated_tokens"), cell.mean("trained_tokens")]
        rows.append(
            [
                cell.arm,
                str(len(cell.results)),
                f"{percent(cell.accuracy.mean)}{_plus_minus(cell.accuracy)}",
                "-" if (training := cell.mean("training_mean")) is None else percent(training),
                "" if difference is None else f"{points(difference.mean)} {_bracket(difference.seeds)}".rstrip(),
                "" if difference is None else _bracket(difference.problems),
                "baseline" if baseline else "no pair" if difference is None else difference.verdict,
                p,
                *("-" if count is None else f"{count:,.0f}" for count in tokens),
                clock(cell.mean("train_seconds") or 0.0),
            ]
        )
    return rows


def rich_table(task: str, results: Results) -> Table:
    """The table of one task for a terminal."""
    table = Table(title=_title(task, results), title_justify="left")
    for number, column in enumerate(COLUMNS):
        table.add_column(column, justify="right" if number not in (0, 6) else "left", no_wrap=number == 0)
    for row in table_rows(results.of_task(task), results):
        table.add_row(*(_escape_markup(value) for value in row))
    return table


def _escape_markup(value: str) -> str:
    return value.replace("[", r"\[")


def _title(task: str, results: Results) -> str:
    cells = results.of_task(task)
    problems = len(cells[0].results[0].problems) if cells else 0
    return f"{task}: held-out {results.plan.comparison.metric}, {_count(problems, 'problem')}"


def markdown(results: Results, command: str, figure: str | None) -> str:
    """The whole report as Markdown."""
    comparison = results.plan.comparison
    lines = [f"# Comparison {comparison.name}: {len(comparison.arms)} arms against {comparison.baseline}", ""]
    lines += [f"    {command}", ""]
    if results.missing or results.unusable:
        total = len(results.plan.runs)
        usable = total - len(results.missing) - len(results.unusable)
        lines += [f"**Incomplete: {usable} of {total} runs.** What follows can still change.", ""]
    lines += [line + "\n" for line in learning_words(results)]
    if figure is not None:
        lines += [f"![means and differences to {comparison.baseline}]({figure})", ""]
    for task in comparison.tasks:
        cells = results.of_task(task)
        if not cells:
            continue
        lines += [f"## {_title(task, results)}", "", _row(COLUMNS), _row(["---"] * len(COLUMNS))]
        lines += [_row(row) for row in table_rows(cells, results)]
        lines += ["", *(f"- {verdict_words(cell, results)}" for cell in cells if cell.difference is not None), ""]
    lines += ["## How to read this", "", *(f"- {line}" for line in method_words(results) + caveats(results)), ""]
    lines += ["## Arms", "", _row(("arm", "what it is", "recipe")), _row(["---"] * 3)]
    lines += [_row((name, arm.about, arm.recipe or comparison.base)) for name, arm in comparison.arms.items()]
    return "\n".join(lines) + "\n"


def _row(values: Sequence[str]) -> str:
    return "| " + " | ".join(value.replace("|", r"\|").replace("\n", " ") for value in values) + " |"


def runs_csv(results: Results) -> str:
    """One line for each finished run."""
    names = sorted({name for cell in results.cells for result in cell.results for name in result.means})
    head = ["task", "arm", "seed", "training_seed", "updates", "generated_tokens", "trained_tokens", "train_seconds"]
    head.insert(4, "training_mean")
    rows: list[list[Any]]
    rows = [[*head, "wall_seconds", f"{results.plan.comparison.metric}_before", *(f"{name}_after" for name in names)]]
    for cell in results.cells:
        for result in cell.results:
            before = None if result.before is None else float(result.before.mean())
            figures = [getattr(result, name) for name in head[4:]]
            run = result.run
            means = [result.means.get(name) for name in names]
            rows.append([run.task, run.arm, run.seed, run.recipe.seed, *figures, result.wall_seconds, before, *means])
    return _csv(rows)


def differences_csv(results: Results) -> str:
    """One line for each arm and task, with every number of the table."""
    ends = [f"difference_{end}_over_{over}" for over in ("seeds", "problems") for end in ("low", "high")]
    head = ["task", "arm", "seeds", "mean", "mean_low", "mean_high", "difference", *ends, "p", "holm_p", "verdict"]
    rows: list[list[Any]] = [head]
    for cell in results.cells:
        d = cell.difference
        numbers: list[Any] = [None] * 7
        if d is not None:
            numbers = [d.mean, d.seeds.low, d.seeds.high, d.problems.low, d.problems.high, d.p, cell.adjusted_p]
        accuracy = cell.accuracy
        verdict = "baseline" if d is None else d.verdict
        rows.append(
            [cell.task, cell.arm, len(cell.results), accuracy.mean, accuracy.low, accuracy.high, *numbers, verdict]
        )
    return _csv(rows)


def _csv(rows: Sequence[Sequence[Any]]) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(["" if v is None else v for v in row] for row in rows)
    return text.getvalue()


# Numbers


def percent(value: float) -> str:
    """A share in percent."""
    return f"{100 * value:.1f} %"


def points(value: float) -> str:
    """A difference of shares in percentage points, with its sign."""
    return f"{100 * value:+.1f}"


def _span(interval: Interval) -> str:
    return f"{points(interval.low or 0.0)} to {points(interval.high or 0.0)}"


def _bracket(interval: Interval) -> str:
    return "" if interval.low is None or interval.high is None else f"[{points(interval.low)}, {points(interval.high)}]"


def _plus_minus(interval: Interval) -> str:
    return "" if interval.high is None else f" ± {100 * (interval.high - interval.mean):.1f}"


def _count(number: int, word: str) -> str:
    return f"{number} {word}{'' if number == 1 else 's'}"
