"""Compare arms of an experiment over seeds: a metric against trained tokens and against wall-clock.

    python scripts/compare_runs.py full=runs/dapo-seed0,runs/dapo-seed1 d3s=runs/d3s-seed0,runs/d3s-seed1 \\
        --metric reward --smooth 3 --out figure.png --json figures.json

An arm is NAME=DIRECTORY,DIRECTORY,... with the directory of one complete run per seed, as `rltok train` wrote it.

Points: logged steps that hold the metric (`reward`: steps with a rollout). A point lies where its line was written,
after the update of its step, though `reward` is that of the policy before it.
Trained tokens: `trained_tokens` of metrics.jsonl, completion tokens that entered the loss so far, over all ranks.
Seconds: `seconds` of metrics.jsonl and `train_seconds` of summary.json, time on the clock inside the training loop:
rollouts, rewards, credit, updates, logging, checkpoints and evaluations within the loop. Not counted: loading,
`evaluation_before` and `evaluation_after`, and work that a kill threw away, as a continued run takes up the clock
of its checkpoint.

Between its points the curve of a run is straight. The mean of an arm is taken at every x of any of its seeds where
all of them have data. "At equal x" is where the first of all runs has its last point; curves are read there as
drawn, with `--smooth`. "Last quarter" is the mean of the last quarter of a run's points (rounded up), not smoothed.
"""

from __future__ import annotations

import argparse
import difflib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

TOKENS, SECONDS = "trained_tokens", "seconds"
PANELS = {TOKENS: ("trained tokens (thousands)", 1000.0), SECONDS: ("training time (s)", 1.0)}
"""x field of metrics.jsonl -> label of its axis, and units per tick unit"""
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
"""Okabe and Ito's palette without yellow, told apart with any colour vision"""
AGAIN = "train again with this version of rltok"


class CompareError(Exception):
    """Arguments or run directories that cannot be compared; the message says what to do."""


@dataclass(frozen=True)
class Run:
    """One complete run and its n points."""

    path: Path
    x: Mapping[str, np.ndarray]
    """(n,) per key of `PANELS`, never falling"""
    raw: np.ndarray
    """(n,) the metric as logged"""
    values: np.ndarray
    """(n,) the metric, smoothed"""
    seed: int
    trained_tokens: float
    train_seconds: float
    after: Mapping[str, float]
    """held-out means after training"""


# Reading


def read_run(path: Path, metric: str, smooth: int) -> Run:
    """Read a run directory.

    Raises:
        CompareError: the directory, a file, a field or every value of the metric is missing, or a running total falls.
    """
    if not path.is_dir():
        raise CompareError(f"{path} is no directory; give run directories as `rltok train` prints them")
    file = path / "metrics.jsonl"
    lines = [_parse(text, file, AGAIN) for text in _read(file, "no step was logged; let the run train").splitlines()]
    points = [line for line in lines if line.get(metric) is not None]
    if not points:
        raise CompareError(_no_metric(file, metric, lines))
    for name in (metric, *PANELS):
        for line in points:
            if not isinstance(line.get(name), int | float):
                raise CompareError(
                    f"{file}: step {line.get('step')} has no number in the field {name!r} but {line.get(name)!r}; "
                    + ("choose another --metric" if name == metric else AGAIN)
                )
    totals = {name: [line[name] for line in lines if line.get(name) is not None] for name in PANELS}
    for name, values in totals.items():
        if values != sorted(values):
            raise CompareError(
                f"{file}: {name} falls from one line to the next, but it is a running total; two runs wrote here or a "
                "continued run counted anew: train again with another output_dir"
            )
    summary, evaluation = path / "summary.json", path / "evaluation_after.json"
    figures = _parse(_read(summary, "the run is not complete; continue it with resume=auto"), summary, AGAIN)
    held_out = _parse(_read(evaluation, "train with evaluation.after=true"), evaluation, AGAIN)
    raw = np.array([line[metric] for line in points], dtype=float)
    return Run(
        path=path,
        x={name: np.array([line[name] for line in points], dtype=float) for name in PANELS},
        raw=raw,
        values=trailing_mean(raw, smooth),
        seed=_field(figures, "seed", summary),
        trained_tokens=totals[TOKENS][-1],
        train_seconds=_field(figures, "train_seconds", summary),
        after=_field(held_out, "means", evaluation),
    )


def _read(path: Path, remedy: str) -> str:
    text = path.read_text(encoding="utf-8") if path.is_file() else ""
    if not text.strip():
        raise CompareError(f"{path} is missing or empty: {remedy}")
    return text


def _parse(text: str, path: Path, remedy: str) -> dict[str, Any]:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise CompareError(f"{path} holds {text[:40]!r}, which is no JSON ({error}); {remedy}") from None


def _field(values: Mapping[str, Any], name: str, path: Path) -> Any:
    if values.get(name) is None:
        raise CompareError(f"{path} lacks the field {name!r}; {AGAIN}")
    return values[name]


def _no_metric(path: Path, metric: str, lines: Sequence[Mapping[str, Any]]) -> str:
    known = sorted({name for line in lines for name in line} - {"step", *PANELS})
    if metric in known:
        return f"{path}: {metric!r} is null (not finite) on every step; choose another --metric"
    near = difflib.get_close_matches(metric, known, n=5) or known
    return f"{path}: no step has the field {metric!r}; choose with --metric one of: {', '.join(near)}"


def read_arms(specs: Sequence[str], metric: str, smooth: int) -> dict[str, list[Run]]:
    """Arms in the order given.

    Raises:
        CompareError: not NAME=DIRECTORY,..., a name or a directory given twice, or a run that cannot be read.
    """
    arms: dict[str, list[Run]] = {}
    for spec in specs:
        name, _, folders = spec.partition("=")
        paths = [Path(folder) for folder in folders.split(",") if folder]
        if not name or not paths:
            raise CompareError(f"{spec!r} is no arm; write NAME=DIRECTORY,DIRECTORY,...")
        if name in arms:
            raise CompareError(f"arm {name!r} is given twice; put all its directories behind one {name}=")
        if len({path.resolve() for path in paths}) < len(paths):
            raise CompareError(f"arm {name!r} holds a directory twice; give each run once")
        arms[name] = [read_run(path, metric, smooth) for path in paths]
    return arms


# Curves


def trailing_mean(values: np.ndarray, width: int) -> np.ndarray:
    """Mean of each value and the width - 1 before it, of fewer at the start; width 1 changes nothing."""
    return np.array([values[max(0, i + 1 - width) : i + 1].mean() for i in range(len(values))])


def mean_curve(runs: Sequence[Run], axis: str) -> tuple[np.ndarray, np.ndarray]:
    """x and mean over seeds, (m,) each, at every x of any seed where all have data; m = 0 where they do not overlap."""
    low, high = max(run.x[axis][0] for run in runs), min(run.x[axis][-1] for run in runs)
    grid = np.unique(np.concatenate([run.x[axis] for run in runs]))
    grid = grid[(grid >= low) & (grid <= high)]
    return grid, np.mean([np.interp(grid, run.x[axis], run.values) for run in runs], axis=0)


def value_at(run: Run, axis: str, x: float) -> float | None:
    """The curve of a run at x; None outside its points."""
    xs = run.x[axis]
    return float(np.interp(x, xs, run.values)) if xs[0] <= x <= xs[-1] else None


# Figures


def compare(arms: Mapping[str, Sequence[Run]], metric: str, smooth: int) -> dict[str, Any]:
    """All figures of the table, as they go into the JSON file.

    Raises:
        CompareError: held-out means of one run that another lacks.
    """
    every = [run for runs in arms.values() for run in runs]
    names = dict.fromkeys(name for run in every for name in run.after)
    equal = {axis: float(min(run.x[axis][-1] for run in every)) for axis in PANELS}
    found = {}
    for arm, runs in arms.items():
        after = {n: [_field(run.after, n, run.path / "evaluation_after.json") for run in runs] for n in names}
        found[arm] = {
            "runs": [str(run.path) for run in runs],
            "seeds": [run.seed for run in runs],
            "after": {name: over_seeds(values) for name, values in after.items()},
            "trained_tokens": over_seeds([run.trained_tokens for run in runs]),
            "train_seconds": over_seeds([run.train_seconds for run in runs]),
            "last_quarter": over_seeds([float(run.raw[-math.ceil(len(run.raw) / 4) :].mean()) for run in runs]),
            "at_equal": {axis: over_seeds([value_at(run, axis, equal[axis]) for run in runs]) for axis in PANELS},
        }
    return {"metric": metric, "smooth": smooth, "equal": equal, "arms": found}


def over_seeds(values: Sequence[float | None]) -> dict[str, Any]:
    """Values per seed with their mean, min and max; None for all three unless every seed has a value."""
    known = [value for value in values if value is not None]
    if len(known) < len(values):
        return {"per_seed": list(values), "mean": None, "min": None, "max": None}
    return {"per_seed": known, "mean": float(np.mean(known)), "min": min(known), "max": max(known)}


def table(figures: Mapping[str, Any]) -> Table:
    """One column per arm."""
    arms, metric, equal = list(figures["arms"].values()), figures["metric"], figures["equal"]
    result = Table(caption="mean (min to max) over seeds; -: a run whose first point comes later")
    result.add_column("")
    for name in figures["arms"]:
        result.add_column(name, justify="right")
    result.add_row("number of seeds", *(str(len(arm["seeds"])) for arm in arms))
    result.add_row("seeds", *(", ".join(map(str, arm["seeds"])) for arm in arms))
    for name in arms[0]["after"]:
        result.add_row(f"held-out {name} after", *(f"{arm['after'][name]['mean']:.4g}" for arm in arms))
        per_seed = (", ".join(f"{value:.4g}" for value in arm["after"][name]["per_seed"]) for arm in arms)
        result.add_row("  per seed", *per_seed)
    result.add_row("trained tokens", *(_spread(arm["trained_tokens"], ",.0f") for arm in arms))
    result.add_row("training seconds", *(_spread(arm["train_seconds"], ",.1f") for arm in arms))
    result.add_row(f"{metric}, last quarter", *(_spread(arm["last_quarter"]) for arm in arms))
    for axis, place in ((TOKENS, f"{equal[TOKENS]:,.0f} tokens"), (SECONDS, f"{equal[SECONDS]:,.1f} s")):
        result.add_row(f"{metric} at {place}", *(_spread(arm["at_equal"][axis]) for arm in arms))
    return result


def _spread(part: Mapping[str, Any], spec: str = ".4g") -> str:
    if part["mean"] is None:
        return "-"
    ends = f" ({part['min']:{spec}} to {part['max']:{spec}})" if len(part["per_seed"]) > 1 else ""
    return f"{part['mean']:{spec}}{ends}"


# Picture


def plot(arms: Mapping[str, Sequence[Run]], metric: str, smooth: int, path: Path, axes: Sequence[str] = ()) -> None:
    """One panel per axis (none given: both), 1200 pixels wide: thin lines are seeds, thick ones their mean.

    Raises:
        CompareError: matplotlib is not installed, too many arms, or seeds of an arm that do not overlap.
    """
    try:
        from matplotlib.figure import Figure  # without pyplot: draws with Agg, needs no display
    except ImportError:
        raise CompareError("--out needs matplotlib: pip install rltok[plot], or leave out --out") from None
    if len(arms) > len(COLOURS):
        raise CompareError(f"{len(arms)} arms cannot be told apart in one picture; give at most {len(COLOURS)}")
    figure = Figure(figsize=(10, 4.2), dpi=120, layout="constrained")
    axes = axes or tuple(PANELS)
    panels = figure.subplots(1, len(axes), sharey=True, squeeze=False)[0]
    for panel, axis in zip(panels, axes, strict=True):
        axis_label, unit = PANELS[axis]
        for (arm, runs), colour in zip(arms.items(), COLOURS, strict=False):
            grid, mean = mean_curve(runs, axis)
            if not len(grid):
                raise CompareError(f"arm {arm!r}: its seeds share no range of {axis}; give runs of the same length")
            for run in runs:
                panel.plot(run.x[axis] / unit, run.values, color=colour, linewidth=0.8, alpha=0.45)
            label = f"{arm} ({len(runs)} seed{'s' if len(runs) > 1 else ''})"
            panel.plot(grid / unit, mean, color=colour, linewidth=2.6, label=label)
        panel.set_xlabel(axis_label, fontsize=12)
        panel.set_xlim(left=0)
        panel.tick_params(labelsize=11)
        panel.grid(color="0.9", linewidth=0.6)
        panel.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel(metric if smooth == 1 else f"{metric}, mean of the last {smooth} points", fontsize=12)
    panels[0].legend(frameon=False, fontsize=11)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, format="png")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("arms", nargs="+", metavar="NAME=DIR,DIR,...")
    parser.add_argument("--metric", default="reward", help="field of metrics.jsonl (default: reward)")
    parser.add_argument("--smooth", type=int, default=1, help="mean of this many last points (default: 1, as logged)")
    parser.add_argument("--out", type=Path, help="PNG to write; needs matplotlib")
    parser.add_argument("--axis", choices=list(PANELS), help="draw this panel only (default: both)")
    parser.add_argument("--json", type=Path, help="file for the figures of the table")
    args = parser.parse_args(arguments)
    if args.smooth < 1:
        parser.error(f"--smooth {args.smooth} is below 1, which draws the metric as logged")
    try:
        arms = read_arms(args.arms, args.metric, args.smooth)
        figures = compare(arms, args.metric, args.smooth)
        Console(markup=False).print(table(figures))
        if args.json:
            args.json.parent.mkdir(parents=True, exist_ok=True)
            args.json.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
        if args.out:
            plot(arms, args.metric, args.smooth, args.out, [args.axis] if args.axis else ())
    except CompareError as error:
        parser.exit(2, f"error: {error}\n")


if __name__ == "__main__":
    main()
