"""The picture of a comparison: for every task means, and differences to the baseline, with their intervals."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rltok.compare.intervals import Difference
from rltok.compare.results import Cell, Results
from rltok.compare.words import survives
from rltok.config import ConfigError

BLUE, ORANGE, GREY, BLACK = "#0072B2", "#D55E00", "#7F7F7F", "#000000"
"""Okabe and Ito's blue and vermilion, told apart with any colour vision; marks differ in shape as well"""
LOOKS = {"above": (BLUE, "^"), "below": (ORANGE, "v"), "within noise": (GREY, "o"), "undecided": (GREY, "x")}
"""verdict -> colour and mark"""
FORMATS = ("png", "svg")


def draw(results: Results, folder: Path, name: str = "comparison") -> list[Path]:
    """Write `<name>.png` and `<name>.svg`; equal results give equal files.

    Left: one dot for each seed, the mean, and its t interval over seeds. Right: the paired difference with its interval
    over seeds (thick) and over problems (thin); filled marks still count after Holm's correction; one far off all
    others stands as a number at the edge.

    Returns:
        The files; none where no task has a result.

    Raises:
        ConfigError: matplotlib is not installed.
    """
    figure_class = check_installed()
    import matplotlib

    tasks = [task for task in results.plan.comparison.tasks if results.of_task(task)]
    if not tasks:
        return []
    heights = [0.9 + 0.3 * len(results.of_task(task)) for task in tasks]
    with matplotlib.rc_context({"svg.hashsalt": "rltok", "svg.fonttype": "none", "font.size": 10}):
        figure = figure_class(figsize=(10, sum(heights) + 0.5), dpi=120, layout="constrained")
        panels = figure.subplots(len(tasks), 2, squeeze=False, gridspec_kw={"height_ratios": heights})
        for task, (left, right) in zip(tasks, panels, strict=True):
            cells = results.of_task(task)
            _draw_means(left, cells, results, task)
            _draw_differences(right, cells, results)
        figure.supxlabel(
            "right: ▲ above, ▼ below, ● within noise; filled: also after Holm's correction; "
            "thick: interval over seeds, thin: over problems",
            fontsize=8,
        )
        files = [folder / f"{name}.{kind}" for kind in FORMATS]
        folder.mkdir(parents=True, exist_ok=True)
        for file in files:
            figure.savefig(file, metadata={"Date": None} if file.suffix == ".svg" else {"Software": None})
    return files


def check_installed() -> Any:
    """matplotlib's Figure without pyplot, which draws without a display.

    Raises:
        ConfigError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ConfigError("rltok compare needs matplotlib for its picture: pip install 'rltok[compare]'") from None
    return Figure


def _draw_means(panel: Any, cells: Sequence[Cell], results: Results, task: str) -> None:
    comparison = results.plan.comparison
    base = [cell.accuracy.mean for cell in cells if cell.arm == comparison.baseline]
    for mean in base:
        panel.axvline(100 * mean, color=GREY, linewidth=1, linestyle="--")
    for place, cell in enumerate(cells):
        values = [100 * float(result.after.mean()) for result in cell.results]
        panel.plot(values, [place + 0.27] * len(values), "o", color=GREY, markersize=4, alpha=0.7, markeredgewidth=0)
        _interval(panel, place, cell.accuracy.low, cell.accuracy.high, BLACK, 1.6)
        panel.plot([100 * cell.accuracy.mean], [place], "|", color=BLACK, markersize=12, markeredgewidth=2)
    panel.set_title(task, loc="left", fontweight="bold")
    panel.set_xlabel(f"held-out {comparison.metric} (%)")
    _label(panel, cells)


def _draw_differences(panel: Any, cells: Sequence[Cell], results: Results) -> None:
    panel.axvline(0, color=GREY, linewidth=1, linestyle="--")
    limit = _limit([cell.difference for cell in cells if cell.difference is not None])
    panel.set_xlim(-limit, limit)
    for place, cell in enumerate(cells):
        difference = cell.difference
        if difference is None:
            continue
        colour, mark = LOOKS[difference.verdict]
        if abs(100 * difference.mean) > limit:
            _beyond(panel, place, 100 * difference.mean, colour)
            continue
        _interval(panel, place, difference.seeds.low, difference.seeds.high, colour, 3.0)
        _interval(panel, place, difference.problems.low, difference.problems.high, BLACK, 0.9)
        filled = colour if survives(cell, results) or mark == "x" else "white"
        options = {"color": colour, "markersize": 8, "markerfacecolor": filled, "markeredgewidth": 1.6}
        panel.plot([100 * difference.mean], [place], mark, **options)
    panel.set_xlabel(f"difference to {results.plan.comparison.baseline} (points)")
    _label(panel, cells)
    panel.tick_params(labelleft=False)


def _limit(differences: Sequence[Difference]) -> float:
    """Half of the axis, in points: one arm that is far off all others must not squeeze them."""
    extents: list[float] = []
    for difference in differences:
        parts = (difference.seeds, difference.problems)
        ends = [abs(end) for part in parts for end in (part.low, part.high) if end is not None]
        extents.append(100 * max([abs(difference.mean), *ends]))
    inside = [extent for extent in extents if extent <= 3 * statistics.median(extents)]
    return 1.1 * max(inside, default=0.0) or 1.0


def _beyond(panel: Any, place: int, mean: float, colour: str) -> None:
    """A difference outside the axis as its number at the edge."""
    text, side = (f"◂ {mean:+.1f}", "left") if mean < 0 else (f"{mean:+.1f} ▸", "right")
    edge = panel.get_xlim()[0 if mean < 0 else 1]
    panel.text(edge, place, text, color=colour, ha=side, va="center", fontsize=9)


def _interval(panel: Any, place: int, low: float | None, high: float | None, colour: str, width: float) -> None:
    if low is not None and high is not None:
        panel.plot([100 * low, 100 * high], [place, place], color=colour, linewidth=width, solid_capstyle="butt")


def _label(panel: Any, cells: Sequence[Cell]) -> None:
    panel.set_yticks(range(len(cells)), [cell.arm for cell in cells])
    panel.set_ylim(len(cells) - 0.4, -0.6)
    panel.grid(axis="x", color="0.9", linewidth=0.6)
    panel.set_axisbelow(True)
    panel.spines[["top", "right"]].set_visible(False)
