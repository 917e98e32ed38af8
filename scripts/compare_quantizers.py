"""RSQ against GPTQ and rounding to nearest, with the ablations between them: held-out perplexity and task accuracy.

    python scripts/compare_quantizers.py --out DIR [--model NAME=CHECKPOINT ...] [--bits 3 4] [--seeds 0 1 2]

For every model, width, seed and arm the model is quantised afresh (one scale per row, clip search, scales rounded to
float16) and measured on the same held-out problems of the recipe:

    loss    nats per token of rollouts that the full-precision model sampled on the held-out prompts. Its rise over the
            full model's own loss estimates KL(full || quantised) per token; perplexity is its exponential
    strict  verified answers of greedy completions

Calibration texts are rollouts of the model itself on training prompts. The seed chooses prompts and samples, the
rotation, and the random importance; held-out texts are the same for all. Differences are paired by seed and by
problem, with t intervals over both and Holm's correction over all comparisons of a measure, as in `rltok compare`.

Arms of one family differ in one thing: `gptq rotated expanded` is RSQ with all tokens equally important, so
`rsq` minus it is what importance does; `rsq random` weighs tokens by lot, uniformly over the same range.

Writes comparison.md, comparison.png, comparison.svg, runs.csv and differences.csv into DIR.
"""

from __future__ import annotations

import argparse
import copy
import csv
import math
import os
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import numpy as np
import torch
import transformers
from measuring import command_line, machine, markdown_table
from rich.console import Console

from rltok.attend import checkpoint_config, load_policy
from rltok.compare.intervals import Difference, holm, paired_difference
from rltok.models import TINY, load_tokenizer
from rltok.quant.gptq import QuantSpec
from rltok.quant.importance import ImportanceSpec
from rltok.quant.quantize import Method, quantize_model
from rltok.quant.rotation import RotationKind
from rltok.quant.texts import TokenSequence, calibration, sequence_losses
from rltok.quantize import Task, accuracy, load_task, rollouts, training_rollouts
from rltok.run import quiet_libraries

BATCH = 64
FULL = "full precision"
METRIC = "strict"
HELD_OUT_SEED = 1000


@dataclass(frozen=True)
class Arm:
    """A quantiser."""

    about: str
    method: Method
    rotation: RotationKind | None = None
    importance: ImportanceSpec | None = None
    expansion: int = 1


ARMS = {
    "rtn": Arm("every weight rounded by itself", "rtn"),
    "rtn rotated": Arm("the same, Hadamard rotation before", "rtn", "hadamard"),
    "gptq": Arm("GPTQ", "gptq"),
    "gptq rotated": Arm("GPTQ, Hadamard rotation before", "gptq", "hadamard"),
    "gptq rotated expanded": Arm(
        "the same, calibration rolled 8-fold: RSQ without importance", "gptq", "hadamard", None, 8
    ),
    "rsq": Arm(
        "RSQ as published: rotation, attention concentration from 0.01 to 1, 8-fold",
        "rsq",
        "hadamard",
        ImportanceSpec(),
        8,
    ),
    "rsq unexpanded": Arm("RSQ without the expansion", "rsq", "hadamard", ImportanceSpec()),
    "rsq unrotated": Arm("RSQ without rotation, importance from 0.1 to 1", "rsq", None, ImportanceSpec(r_min=0.1), 8),
    "rsq random": Arm("control: RSQ with importance by lot", "rsq", "hadamard", ImportanceSpec(score="credit"), 8),
}
CONTRASTS = (
    ("gptq", "rtn"),
    ("gptq rotated", "gptq"),
    ("gptq rotated expanded", "gptq rotated"),
    ("rsq", "gptq"),
    ("rsq", "gptq rotated"),
    ("rsq", "gptq rotated expanded"),
    ("rsq unexpanded", "gptq rotated"),
    ("rsq unrotated", "gptq"),
    ("rsq", "rsq random"),
)
"""arm, and what it is compared with"""


@dataclass(frozen=True)
class Measured:
    """One quantised model, problem by problem."""

    nats: np.ndarray
    """(P,) loss of a held-out text, scaled so that the mean is nats per token"""
    solved: np.ndarray
    """(P,) the metric"""
    seconds: float
    """of the quantisation"""

    @property
    def loss(self) -> float:
        """Nats per token."""
        return float(self.nats.mean())


Key = tuple[int, str, int]
"""bits, arm, seed; bits 0 is the model in full precision"""


class Bench:
    """One model with what all its arms share."""

    def __init__(self, checkpoint: str, task: Task, samples: int, console: Console) -> None:
        config = checkpoint_config(checkpoint, "float32")
        self.task, self.samples, self.console = task, samples, console
        self.tokenizer = load_tokenizer(config)
        self.model = load_policy(config)
        self.length = self.model.config.max_position_embeddings
        rows = [task.heldout[i] for i in range(len(task.heldout))]
        self.held_out = rollouts(
            task, self.model, self.tokenizer, rows, HELD_OUT_SEED, self.length, "held-out texts", console
        )

    def texts(self, seed: int) -> list[TokenSequence]:
        """Calibration sequences of a seed, with a random credit for the control."""
        found = training_rollouts(self.task, self.model, self.tokenizer, self.samples, seed, self.length, self.console)
        generator = torch.Generator().manual_seed(seed)
        return [replace_credit(one, torch.rand(len(one.ids), generator=generator).tolist()) for one in found]

    def quantized(self, arm: Arm, bits: int, seed: int, texts: Sequence[TokenSequence]) -> Measured:
        """Quantise a copy and measure it."""
        model = copy.deepcopy(self.model)
        spec = QuantSpec(bits, -1, clip_search=True, scale_dtype=torch.float16)
        started = time.perf_counter()
        batches = calibration(texts, self.tokenizer.pad_token_id, batch_size=BATCH, expansion=arm.expansion)
        quantize_model(
            model, batches, spec, arm.method, arm.importance, rotation=arm.rotation, seed=seed, measure=False
        )
        return self.measured(model, time.perf_counter() - started)

    def measured(self, model: Any, seconds: float = 0.0) -> Measured:
        """Losses and greedy answers of a model."""
        losses = sequence_losses(model, self.held_out, self.tokenizer.pad_token_id, BATCH)
        found = accuracy(self.task, model, self.tokenizer, "greedy", Console(quiet=True))
        nats = (losses.nats / losses.tokens.mean()).numpy()
        return Measured(nats, np.array([float(row[METRIC]) for row in found.rows]), seconds)


def replace_credit(one: TokenSequence, credit: list[float]) -> TokenSequence:
    """The sequence with another credit."""
    return one._replace(credit=credit)


def run(bench: Bench, name: str, widths: Sequence[int], seeds: Sequence[int]) -> dict[Key, Measured]:
    """All arms of a model; a line for each."""
    found = {(0, FULL, 0): bench.measured(bench.model)}
    say(name, (0, FULL, 0), found)
    for seed in seeds:
        texts = bench.texts(seed)
        for bits in widths:
            for arm, about in ARMS.items():
                found[bits, arm, seed] = bench.quantized(about, bits, seed, texts)
                say(name, (bits, arm, seed), found)
    return found


def say(name: str, key: Key, found: Mapping[Key, Measured]) -> None:
    """One line of progress."""
    one = found[key]
    bits, arm, seed = key
    print(
        f"{name:9} {bits} bits  seed {seed}  {arm:22} loss {one.loss:.4f}  {METRIC} {one.solved.mean():.4f}  "
        f"{one.seconds:.1f} s",
        flush=True,
    )


# ---- differences


@dataclass(frozen=True)
class Contrast:
    """An arm minus another one."""

    bits: int
    arm: str
    base: str
    loss: Difference
    solved: Difference


def contrasts(found: Mapping[Key, Measured], widths: Sequence[int], seeds: Sequence[int]) -> list[Contrast]:
    """All of `CONTRASTS` at every width."""

    def table(bits: int, arm: str, part: str) -> np.ndarray:
        return np.stack([getattr(found[bits, arm, seed], part) for seed in seeds])

    return [
        Contrast(
            bits,
            arm,
            base,
            paired_difference(table(bits, arm, "nats"), table(bits, base, "nats")),
            paired_difference(table(bits, arm, "solved"), table(bits, base, "solved")),
        )
        for bits in widths
        for arm, base in CONTRASTS
    ]


def span(low: float | None, high: float | None, scale: float, digits: int) -> str:
    """An interval; empty for a single value."""
    return "" if low is None or high is None else f" [{scale * low:+.{digits}f}, {scale * high:+.{digits}f}]"


def difference_cells(one: Difference, scale: float, digits: int, p: float | None, lower_is_better: bool) -> list[str]:
    """Mean, interval over seeds, verdict and corrected p."""
    words = {"above": "worse", "below": "better"} if lower_is_better else {"above": "better", "below": "worse"}
    mean = f"{scale * one.mean:+.{digits}f}{span(one.seeds.low, one.seeds.high, scale, digits)}"
    mark = "" if p is None else f"{p:.2g}{' *' if p < 0.05 else ''}"
    return [mean, words.get(one.verdict, one.verdict), mark]


# ---- files


def means_rows(found: Mapping[Key, Measured], widths: Sequence[int], seeds: Sequence[int]) -> list[list[str]]:
    """Rows of the table of means, per arm and width."""
    full = found[0, FULL, 0]
    rows = [[FULL, "", f"{math.exp(full.loss):.4f}", "", f"{100 * full.solved.mean():.1f}", "", ""]]
    for bits in widths:
        for arm in ARMS:
            cells = [found[bits, arm, seed] for seed in seeds]
            losses = [one.loss for one in cells]
            solved = [100 * float(one.solved.mean()) for one in cells]
            rows.append(
                [
                    arm,
                    str(bits),
                    f"{math.exp(statistics.mean(losses)):.4f}",
                    f"{statistics.mean(losses) - full.loss:.4f} ({', '.join(f'{x - full.loss:.4f}' for x in losses)})",
                    f"{statistics.mean(solved):.1f}",
                    ", ".join(f"{x:.1f}" for x in solved),
                    f"{statistics.mean(one.seconds for one in cells):.1f}",
                ]
            )
    return rows


def write_markdown(
    path: Path,
    results: Mapping[str, Mapping[Key, Measured]],
    found: Mapping[str, Sequence[Contrast]],
    options: argparse.Namespace,
    command: str,
    facts: Mapping[str, Any],
) -> None:
    """comparison.md."""
    lines = ["# RSQ, GPTQ and rounding to nearest", "", f"    {command}", "", "![rise of the loss](comparison.png)"]
    for name, measured in results.items():
        problems = len(measured[0, FULL, 0].solved)
        lines += [
            "",
            f"## {name}: {problems} held-out problems, seeds {', '.join(map(str, options.seeds))}",
            "",
            markdown_table(
                ["arm", "bits", "perplexity", "rise, nats per token (seeds)", f"{METRIC} %", "seeds", "seconds"],
                means_rows(measured, options.bits, options.seeds),
            ),
            "",
            "Differences, paired by seed and problem; interval over seeds (95 %, t); p the larger of those over seeds "
            "and over problems, after Holm's correction over the table (* below 0.05). A verdict is that of the two "
            "intervals alone, before the correction:",
            "",
        ]
        by_loss = holm([one.loss.p for one in found[name]])
        by_solved = holm([one.solved.p for one in found[name]])
        rows = [
            [f"{one.arm} − {one.base}", str(one.bits)]
            + difference_cells(one.loss, 1000, 2, p, True)
            + difference_cells(one.solved, 100, 1, q, False)
            for one, p, q in zip(found[name], by_loss, by_solved, strict=True)
        ]
        columns = ["difference", "bits", "loss, 0.001 nats", "verdict", "p", f"{METRIC}, points", "verdict", "p"]
        lines.append(markdown_table(columns, rows))
    arms = [[name, arm.about] for name, arm in ARMS.items()]
    where = ", ".join(f"{name} {value}" for name, value in facts.items())
    lines += ["", "## Arms", "", markdown_table(["arm", "what it is"], arms), "", f"Run on: {where}.", ""]
    path.write_text("\n".join(lines), encoding="utf-8")


def write_csv(folder: Path, results: Mapping[str, Mapping[Key, Measured]], found: Mapping[str, Any]) -> None:
    """runs.csv and differences.csv."""
    with (folder / "runs.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["model", "bits", "arm", "seed", "loss_nats", METRIC, "seconds"])
        for name, measured in results.items():
            for (bits, arm, seed), one in measured.items():
                row = [f"{one.loss:.6f}", f"{one.solved.mean():.6f}", f"{one.seconds:.2f}"]
                writer.writerow([name, bits or "", arm, seed, *row])
    with (folder / "differences.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        ends = ["mean", "seeds_low", "seeds_high", "problems_low", "problems_high", "p", "verdict"]
        writer.writerow(["model", "bits", "arm", "base", "measure", *ends])
        for name, many in found.items():
            for one in many:
                for measure, part in (("loss_nats", one.loss), (METRIC, one.solved)):
                    values = [part.mean, part.seeds.low, part.seeds.high, part.problems.low, part.problems.high, part.p]
                    cells = ["" if value is None else f"{value:.6g}" for value in values]
                    writer.writerow([name, one.bits, one.arm, one.base, measure, *cells, part.verdict])


def draw(folder: Path, results: Mapping[str, Mapping[Key, Measured]], options: argparse.Namespace) -> None:
    """Rise of the loss and accuracy of every arm, a dot per seed; comparison.png and comparison.svg."""
    import matplotlib
    from matplotlib.figure import Figure

    looks = dict(zip(options.bits, (("#D55E00", "o"), ("#0072B2", "s"), ("#009E73", "^")), strict=False))
    with matplotlib.rc_context({"svg.hashsalt": "rltok", "svg.fonttype": "none", "font.size": 10}):
        figure = Figure(figsize=(11, 3.6 * len(results)), dpi=120, layout="constrained")
        panels = figure.subplots(len(results), 2, squeeze=False)
        for (name, measured), (left, right) in zip(results.items(), panels, strict=True):
            full = measured[0, FULL, 0]
            right.axvline(100 * full.solved.mean(), color="#7F7F7F", linestyle="--", linewidth=1)
            for bits, (colour, mark) in looks.items():
                for place, arm in enumerate(ARMS):
                    cells = [measured[bits, arm, seed] for seed in options.seeds]
                    for panel, values in (
                        (left, [one.loss - full.loss for one in cells]),
                        (right, [100 * float(one.solved.mean()) for one in cells]),
                    ):
                        panel.plot(values, [place] * len(values), mark, color=colour, alpha=0.5, markersize=5)
                        panel.plot([statistics.mean(values)], [place], "|", color=colour, markersize=14)
                left.plot([], [], mark, color=colour, label=f"{bits} bits")
            left.set_title(name, loc="left", fontweight="bold")
            left.axvline(0, color="#7F7F7F", linestyle="--", linewidth=1)
            left.set_xlabel("rise of the held-out loss (nats per token)")
            right.set_xlabel(f"held-out {METRIC} (%); dashed: full precision")
            left.legend(frameon=False, fontsize=9)
            for panel in (left, right):
                panel.set_yticks(range(len(ARMS)), list(ARMS))
                panel.set_ylim(len(ARMS) - 0.4, -0.6)
                panel.grid(axis="x", color="0.9", linewidth=0.6)
                panel.set_axisbelow(True)
                panel.spines[["top", "right"]].set_visible(False)
            right.tick_params(labelleft=False)
        for kind, about in (("png", {"Software": None}), ("svg", {"Date": None})):
            figure.savefig(folder / f"comparison.{kind}", metadata=about)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the comparison and write its files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="directory of the files")
    parser.add_argument(
        "--model", action="append", metavar="NAME=CHECKPOINT", help=f"may be repeated; default embedded={TINY}"
    )
    parser.add_argument("--recipe", default="dapo", help="data and rewards")
    parser.add_argument("--problems", type=int, default=256, help="held-out problems")
    parser.add_argument("--samples", type=int, default=128, help="calibration sequences")
    parser.add_argument("--bits", type=int, nargs="+", default=[3, 4])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    options = parser.parse_args(argv)
    models = dict(text.split("=", 1) for text in options.model or [f"embedded={TINY}"])
    quiet_libraries()
    task = load_task(options.recipe, [f"data.heldout_size={options.problems}", "report.progress=off"])
    results = {}
    for name, checkpoint in models.items():
        bench = Bench(checkpoint, task, options.samples, Console(quiet=True))
        results[name] = run(bench, name, options.bits, options.seeds)
    found = {name: contrasts(measured, options.bits, options.seeds) for name, measured in results.items()}
    options.out.mkdir(parents=True, exist_ok=True)
    write_csv(options.out, results, found)
    draw(options.out, results, options)
    command = command_line("compare_quantizers.py", argv)
    write_markdown(options.out / "comparison.md", results, found, options, command, machine("cpu", torch, transformers))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
