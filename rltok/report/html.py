"""`rltok report`: one self-contained HTML file about one run or several.

The file asks for nothing from outside: style, script and data are part of it, and its content security policy allows
only the two scripts and the one style whose hashes it names. Curves come from all logged steps, completions from as
many groups as the size limit holds; the page says how many of how many.
"""

from __future__ import annotations

import base64
import hashlib
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any, Protocol

import jinja2
import pandas as pd
from markupsafe import Markup

from rltok.config import ConfigError
from rltok.report.page import curves as curves_page
from rltok.report.page import facts
from rltok.report.page.colors import color_table
from rltok.report.page.encode import script_json
from rltok.report.page.heatmap import heatmap
from rltok.report.page.quantities import all_quantities, as_json, scale_range
from rltok.report.page.samples import RunSamples, pack_samples

__all__ = ["Limits", "RunLike", "build", "heatmap"]

SCRIPTS = ("data.js", "color.js", "state.js", "charts.js", "tokens.js", "list.js", "inspector.js", "main.js")
"""Parts of the page's script, in their order; they share one scope."""
SMALLEST = 500_000
"""Bytes that the page itself, its curves and one group of completions may need."""


class RunLike(Protocol):
    """What a page needs of a run; `rltok.report.load` gives it."""

    name: str
    path: Path
    recipe: Any
    environment: Any
    metrics: Any
    evaluations: Any
    summary: Any
    problems: Any

    def samples(self, steps: Any = None, columns: Any = None) -> pd.DataFrame:
        """Recorded completions by `rltok.report.schema`."""
        ...


@dataclass(frozen=True)
class Limits:
    """How large a page may become."""

    max_bytes: int = 9_500_000
    """of the file; what is left beside the curves is shared by the runs' completions"""
    max_completions: int | None = None
    """per run; None: as many as fit"""
    max_points: int = 1_000
    """per curve; longer ones show means of adjacent logged steps"""

    def __post_init__(self) -> None:
        if self.max_bytes < SMALLEST:
            raise ConfigError(
                f"max_bytes: {self.max_bytes} is too small for a page; allowed: {SMALLEST} and more", "max_bytes"
            )
        if self.max_completions is not None and self.max_completions < 0:
            raise ConfigError(
                f"max_completions: {self.max_completions} is negative; allowed: 0 and more", "max_completions"
            )
        if self.max_points < 2:
            raise ConfigError(f"max_points: {self.max_points} draws no curve; allowed: 2 and more", "max_points")


def build(runs: Sequence[RunLike], out: Path, limits: Limits | None = None) -> Path:
    """Write the report of some runs.

    Args:
        runs: as `rltok.report.load` gives them, with names that differ.
        out: the file to write; it is replaced whole.
        limits: of the size; None takes the defaults.

    Returns:
        Path of the file.

    Raises:
        ConfigError: no run, or two of the same name.
    """
    limits = limits or Limits()
    names = [run.name for run in runs]
    if not runs:
        raise ConfigError("no run to report: give at least one run directory", "runs")
    if len(set(names)) < len(names):
        raise ConfigError(f"runs: names {names} are not unique; give every run another name", "runs")
    tables = [curves_page.numeric(run.metrics) for run in runs]
    points = curves_page.points_for(tables, limits.max_points)
    packed = [curves_page.pack_curves(table, points) for table in tables]
    spent = sum(len(curve.block) for curve in packed) + 250_000
    share = max((limits.max_bytes - spent) / len(runs), 50_000)
    samples = [_samples(run, share, limits.max_completions) for run in runs]
    text = _render(runs, tables, packed, samples)
    out.parent.mkdir(parents=True, exist_ok=True)
    draft = out.with_name(out.name + ".part")
    draft.write_bytes(text.encode("utf-8", "replace"))  # a path may hold bytes that are no UTF-8
    os.replace(draft, out)
    return out


def _samples(run: RunLike, max_bytes: float, max_completions: int | None) -> RunSamples:
    if max_completions == 0:
        return RunSamples({"rows": 0, "recorded": 0, "tokens": 0, "chunks": [], "columns": [], "rewards": []})
    return pack_samples(run, max_bytes, max_completions)


def _render(
    runs: Sequence[RunLike],
    tables: Sequence[pd.DataFrame],
    packed: Sequence[curves_page.RunCurves],
    samples: Sequence[RunSamples],
) -> str:
    names = [set(table.columns) for table in tables if len(table)]
    everything = set().union(*names) if names else set()
    axes = [{"key": axis.key, "label": axis.label, "metric": axis.metric} for axis in curves_page.axes(names)]
    page: dict[str, Any] = {
        "runs": [run.name for run in runs],
        "curves": {
            "axes": axes,
            "panels": curves_page.panels(everything),
            "metrics": sorted(everything - {"step", "epoch"}),
            "runs": [curve.as_json() for curve in packed],
        },
        "samples": [one.index for one in samples],
        "group_sizes": [_group_size(run) for run in runs],
        "quantities": _quantities(samples),
        "colors": color_table(),
    }
    style = _static("style.css") + _vendor("uPlot.min.css")
    library, script = _vendor("uPlot.iife.min.js"), _script()
    views = [
        _view(run, table, curve, one) for run, table, curve, one in zip(runs, tables, packed, samples, strict=True)
    ]
    recipes, environments = [run.recipe or {} for run in runs], [run.environment or {} for run in runs]
    return (
        _templates()
        .get_template("page.html.jinja")
        .render(
            title=", ".join(run.name for run in runs[:3]) + (f" and {len(runs) - 3} more" if len(runs) > 3 else ""),
            policy=_policy([library, script], style),
            style=Markup(style),
            library=Markup(library),
            script=Markup(script),
            page=Markup(script_json(page)),
            chunks=[
                (f"chunk-{run}-{number}", Markup(script_json(chunk)))
                for run, one in enumerate(samples)
                for number, chunk in enumerate(one.chunks)
            ],
            runs=views,
            has_curves=bool(page["curves"]["panels"]),
            has_samples=any(one.index["rows"] for one in samples),
            differences=facts.differences(recipes),
            environments=facts.table_of(environments),
            level=round(100 * facts.LEVEL),
        )
    )


def _quantities(samples: Sequence[RunSamples]) -> list[dict[str, Any]]:
    """Quantities that some run has, with one range for all runs: a colour means the same value everywhere."""
    found = []
    for quantity in all_quantities():
        parts = [one.values[quantity.name] for one in samples if quantity.name in one.values]
        if parts:
            found.append(as_json(quantity, scale_range(quantity, parts)))
    return found


def _group_size(run: RunLike) -> int | None:
    training = (run.recipe or {}).get("training")
    size = training.get("num_generations") if isinstance(training, Mapping) else None
    return size if isinstance(size, int) else None


def _view(run: RunLike, metrics: pd.DataFrame, curve: curves_page.RunCurves, samples: RunSamples) -> dict[str, Any]:
    """What the template says of one run."""
    recipe, summary = run.recipe or {}, run.summary or {}
    evaluations = run.evaluations or {}
    expected = summary.get("expect")
    return {
        "name": run.name,
        "path": str(run.path),
        "recipe_name": recipe.get("name"),
        "methods": facts.methods(recipe),
        "complete": bool(run.summary),
        "problems": [str(problem) for problem in run.problems],
        "figures": facts.figures(run, metrics),
        "changes": facts.changes(evaluations),
        "other_means": facts.other_means(evaluations),
        "expect": list(expected.items()) if isinstance(expected, Mapping) else [],
        "recipe": facts.recipe_text(recipe),
        "logged": curve.logged,
        "points": curve.points,
        "samples": samples.index,
    }


# Files of the page


@cache
def _static(name: str) -> str:
    return (files("rltok.report.page") / "static" / name).read_text(encoding="utf-8")


@cache
def _vendor(name: str) -> str:
    return (files("rltok.report.page") / "vendor" / name).read_text(encoding="utf-8").strip("\n")


def _script() -> str:
    body = "\n".join(_static(name) for name in SCRIPTS)
    return f'"use strict";\n(() => {{\n{body}}})();'


def _policy(scripts: Sequence[str], style: str) -> str:
    """The content security policy: these scripts and this style, nothing from anywhere."""
    allowed = " ".join(_hash(script) for script in scripts)
    return (
        f"default-src 'none'; script-src {allowed}; style-src {_hash(style)}; img-src data:; base-uri 'none'; "
        "form-action 'none'; require-trusted-types-for 'script'; trusted-types 'none'"
    )


def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


@cache
def _templates() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("rltok.report.page", "templates"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"percent": _percent, "points": _points, "number": _number, "count": lambda n: f"{n:,}"}
    return environment


def _percent(value: float) -> str:
    return f"{100 * value:.1f} %"


def _points(value: float) -> str:
    return f"{100 * value:+.1f}".replace("-", "\u2212")


def _number(value: Any) -> str:
    if not isinstance(value, int | float) or not math.isfinite(value):
        return "-"
    return f"{value:.4g}"
