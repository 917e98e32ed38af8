"""What quantisation cost: errors of linears and layers, held-out perplexity, task accuracy, as JSON and as a picture.

Errors are relative and squared: of a linear tr((W-Q) H (W-Q)^T) / tr(W H W^T) on its calibration inputs, of a layer
|layer_q(x) - layer(x)|^2 / |layer(x)|^2 on the inputs that the quantised layers before it give.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rltok.quant.quantize import GROUPS, QuantizedModel

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SHORT = {name: name.rsplit(".", 1)[1].removesuffix("_proj") for group in GROUPS for name in group}
"""linear of a layer -> its short name: q, k, v, o, up, gate, down"""
COLOURS = ("#0072B2", "#56B4E9", "#009E73", "#D55E00", "#E69F00", "#CC79A7", "#000000")
MARKS = "osD^v<X"
"""of the Okabe-Ito palette; the marks differ in shape as well"""
FORMATS = ("png", "svg")


@dataclass(frozen=True)
class Perplexity:
    """Held-out losses of the same tokens, before and after."""

    source: str
    """what the texts are, in words"""
    sequences: int
    tokens: int
    """whose loss counts"""
    full: float
    """nats per token of the model in full precision"""
    quantized: float
    """nats per token"""


@dataclass(frozen=True)
class Score:
    """A reward of the same problems, before and after."""

    full: float
    """mean of the model in full precision"""
    quantized: float
    """mean"""
    fell: int
    """problems whose reward is lower after"""
    rose: int
    """problems whose reward is higher after"""


@dataclass(frozen=True)
class Accuracy:
    """Held-out rewards of greedy completions."""

    source: str
    """the recipe"""
    problems: int
    scores: dict[str, Score]
    """name of the reward, `length` or `ended` -> means"""


@dataclass(frozen=True)
class Quality:
    """Everything that was measured; None: was not asked for."""

    quantized: QuantizedModel
    perplexity: Perplexity | None
    accuracy: Accuracy | None

    def to_json(self) -> dict[str, Any]:
        """As plain values; the perplexities are exp of nats per token."""
        ppl, acc = self.perplexity, self.accuracy
        return {
            "perplexity": None
            if ppl is None
            else vars(ppl)
            | {"full": math.exp(ppl.full), "quantized": math.exp(ppl.quantized)}
            | {"nats_per_token": {"full": ppl.full, "quantized": ppl.quantized}},
            "accuracy": None
            if acc is None
            else {
                "source": acc.source,
                "problems": acc.problems,
                "means": {name: vars(score) for name, score in acc.scores.items()},
            },
            "layers": [vars(layer) for layer in self.quantized.layers],
            "linears": [vars(linear) for linear in self.quantized.linears],
        }


def paired_scores(
    full: Sequence[Mapping[str, Any]], quantized: Sequence[Mapping[str, Any]], names: Sequence[str]
) -> dict[str, Score]:
    """Means of two evaluations of the same problems, and how many problems changed.

    Args:
        full, quantized: rows of evaluations, in the same order.
        names: their numbers.
    """
    found = {}
    for name in names:
        pairs = [(float(a[name]), float(b[name])) for a, b in zip(full, quantized, strict=True)]
        before, after = (sum(pair[side] for pair in pairs) / len(pairs) for side in (0, 1))
        found[name] = Score(before, after, sum(b < a for a, b in pairs), sum(b > a for a, b in pairs))
    return found


def linear_errors(quantized: QuantizedModel) -> dict[str, list[float | None]]:
    """Short name of a linear -> its error in every layer; None where none was measured."""
    names = list(SHORT.values())
    by_name: dict[str, list[float | None]] = {name: [] for name in names}
    for linear in quantized.linears:
        by_name[linear.name.rsplit(".", 1)[1].removesuffix("_proj")].append(linear.error)
    return by_name


def new_figure() -> Figure:
    """An empty picture, drawn without a display.

    Raises:
        ImportError: matplotlib is not installed.
    """
    from matplotlib.figure import Figure

    return Figure(dpi=110, layout="constrained")


def draw(figure: Figure, quality: Quality, folder: Path, title: str, name: str = "quality") -> list[Path]:
    """Errors of linears and of layers over the depth, and what they cost; `<name>.png` and `<name>.svg`.

    Equal figures give equal files.
    """
    import matplotlib

    layers = [layer.layer for layer in quality.quantized.layers]
    with matplotlib.rc_context({"svg.hashsalt": "rltok", "svg.fonttype": "none", "font.size": 10}):
        figure.set_size_inches(min(16.0, 9 + 0.12 * len(layers)), 4.4)
        left, right = figure.subplots(1, 2, width_ratios=[3, 2])
        _draw_linears(left, quality.quantized, layers)
        _draw_layers(right, quality.quantized, layers)
        for panel in (left, right):
            panel.set_xlabel("layer")
            panel.xaxis.get_major_locator().set_params(integer=True)
            panel.grid(color="0.9", linewidth=0.6)
            panel.set_axisbelow(True)
            panel.spines[["top", "right"]].set_visible(False)
        figure.suptitle("\n".join([title, *_words(quality)]), fontsize=10, x=0.01, ha="left", parse_math=False)
        files = [folder / f"{name}.{kind}" for kind in FORMATS]
        for file in files:
            figure.savefig(file, metadata={"Date": None} if file.suffix == ".svg" else {"Software": None})
    return files


def _draw_linears(panel: Axes, quantized: QuantizedModel, layers: Sequence[int]) -> None:
    panel.set_title("relative squared error of a linear's output", fontsize=10, loc="left")
    drawn = False
    for (name, errors), colour, mark in zip(linear_errors(quantized).items(), COLOURS, MARKS, strict=True):
        if not any(errors):
            continue
        panel.plot(layers, _points(errors), marker=mark, markersize=5, linewidth=1, color=colour, label=name)
        drawn = True
    _finish(panel, drawn)


def _draw_layers(panel: Axes, quantized: QuantizedModel, layers: Sequence[int]) -> None:
    panel.set_title("of a layer's output", fontsize=10, loc="left")
    plain = [layer.error for layer in quantized.layers]
    weighted = [layer.weighted_error for layer in quantized.layers]
    if any(plain):
        panel.plot(layers, _points(plain), "o-", markersize=5, linewidth=1, color=COLOURS[0], label="all tokens alike")
    if any(weighted):
        panel.plot(layers, _points(weighted), "^--", markersize=5, linewidth=1, color=COLOURS[3], label="by importance")
    _finish(panel, any(plain))


def _points(errors: Sequence[float | None]) -> list[float]:
    """Values of a logarithmic axis; what is 0 or missing leaves a gap."""
    return [error if error else math.nan for error in errors]


def _finish(panel: Axes, drawn: bool) -> None:
    if drawn:
        panel.set_yscale("log")
        panel.legend(frameon=False, fontsize=9, ncols=2)
    else:
        panel.text(0.5, 0.5, "not measured: no calibration", ha="center", va="center", transform=panel.transAxes)


def _words(quality: Quality) -> list[str]:
    parts = []
    if quality.perplexity is not None:
        full, quantized = math.exp(quality.perplexity.full), math.exp(quality.perplexity.quantized)
        parts.append(f"perplexity {full:.4f} → {quantized:.4f}")
    if quality.accuracy is not None:
        parts += [f"{name} {score.full:.3f} → {score.quantized:.3f}" for name, score in quality.accuracy.scores.items()]
    return ["   ".join(parts)] if parts else []
