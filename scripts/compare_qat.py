"""Quantization-aware fine-tuning (EdgeQAT) against rounding afterwards, at equal bits and equal numbers of updates.

    python scripts/compare_qat.py --out DIR [--seeds 0 1 2] [--skill-steps 150] [--steps 60] [--batch 32]

Per seed the embedded model is first fine-tuned in full precision on careful worked solutions (those of the recipe
`sft`): the start of all arms, and the teacher of those that have one. Every arm then trains `--steps` updates more on
the same rows in the same order:

    full            in full precision; what the rounded arms below are made of
    rounded rows    `full`, rounded: one symmetric step per row of a matrix, activations by min and max of every token
    rounded lsq     `full` behind the quantisers of the trained arms, their steps as they are initialised, untrained
    qat             trained with fake quantisers, one learned step per matrix or activation (LSQ); cross-entropy alone
    qat rows        the same with the quantisers of `rounded rows`, which have nothing to learn
    + E, + D        and the entropy loss, the distribution loss, or both; `distil` adds the teacher's predictions

Measured on the held-out problems' careful solutions, the same for all seeds: nats per token of the converted model
(perplexity is its exponential), the share of solutions of which every token is the model's first choice, and, where all
tokens have one width, the verified answers of greedy completions. With widths that differ by token (`mixed`: half of
the tokens at 4 bits) which tokens are low depends on later ones, so the loss of a token sees a little of its future.

Differences are paired by seed, with t intervals (95 %) over seeds. Writes comparison.md, comparison.png,
comparison.svg, runs.csv and differences.csv into DIR.
"""

from __future__ import annotations

import argparse
import copy
import csv
import math
import os
import statistics
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
import transformers
from measuring import command_line, machine, markdown_table
from scipy.stats import t as student
from transformers import set_seed

from rltok.config import build
from rltok.data.sft_rows import SFTDataConfig, load_sft_data
from rltok.evaluate import evaluate
from rltok.models import load_model, load_tokenizer
from rltok.rewards import build_rewards
from rltok.run import evaluation_options, quiet_libraries
from rltok.sft import sft_arguments
from rltok.sft_recipe import SFTRecipe, load_sft_recipe
from rltok.trainers.sft_trainer import QATSFTTrainer

W4A8: dict[str, Any] = {"weight_bits": 4, "activation_bits": 8}
MIXED = W4A8 | {"low_bits": 4, "low_share": 0.5}
ROWS = {"weight": "dynamic", "activation": "dynamic"}
E, D = {"entropy": 0.5}, {"distribution": 1.0}
DISTIL = {"distillation": {"gamma": 0.5, "temperature": 2.0}}
ROUNDED: dict[str, dict[str, dict[str, Any]]] = {
    "W4A8": {"rounded rows": W4A8 | ROWS, "rounded lsq": W4A8},
    "W4A8/4 mixed": {"rounded rows": MIXED | ROWS, "rounded lsq": MIXED},
}
TRAINED: dict[str, dict[str, dict[str, Any]]] = {
    "W4A8": {
        "qat": W4A8,
        "qat + E": W4A8 | E,
        "qat + D": W4A8 | D,
        "qat + E + D": W4A8 | E | D,
        "qat + E + D + distil": W4A8 | E | D | DISTIL,
        "qat rows": W4A8 | ROWS,
        "qat rows + E + D": W4A8 | ROWS | E | D,
    },
    "W4A8/4 mixed": {
        "qat": MIXED,
        "qat + E + D": MIXED | E | D,
        "qat rows": MIXED | ROWS,
        "qat rows + E + D": MIXED | ROWS | E | D,
    },
}
FULL = ("full precision", "full")
CONTRASTS = (
    ("qat", "rounded rows"),
    ("qat", "rounded lsq"),
    ("qat rows", "rounded rows"),
    ("qat + E", "qat"),
    ("qat + D", "qat"),
    ("qat + E + D", "qat"),
    ("qat + E + D + distil", "qat + E + D"),
    ("qat rows + E + D", "qat rows"),
)
Arm = tuple[str, str]
"""widths and name"""


@dataclass(frozen=True)
class Run:
    """What one model reached."""

    seed: int
    arm: Arm
    loss: float
    """nats per token"""
    exact: float
    strict: float | None
    seconds: float
    """of training, none for what is only rounded"""


class Bench:
    """Rows, settings and measurements that all arms share."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        rows = max(options.skill_steps, options.steps) * options.batch
        self.recipe = load_sft_recipe(
            "sft", [f"data.train_size={rows}", f"data.heldout_size={options.heldout}", "evaluation.batch_size=128"]
        )
        self.tokenizer = load_tokenizer(self.recipe.model)
        self.rewards = build_rewards(self.recipe.rewards)

    def train(
        self, model: Any, section: Mapping[str, Any] | None, seed: int, steps: int, rows_seed: int
    ) -> tuple[QATSFTTrainer, float]:
        """A trained, unconverted model in its trainer, and the seconds that it took; 0 steps only prepare."""
        recipe = self._recipe(seed, max(steps, 1))
        splits = load_sft_data(build(SFTDataConfig, recipe.data, "data"), rows_seed)
        self.heldout = splits.heldout
        set_seed(seed)
        with tempfile.TemporaryDirectory() as folder:
            trainer = QATSFTTrainer(
                model,
                sft_arguments(recipe, folder),
                quantization_aware=section,
                train_dataset=splits.train,
                eval_dataset=splits.heldout.select_columns(["prompt", "completion"]),
                processing_class=self.tokenizer,
            )
            trainer.remove_callback(transformers.PrinterCallback)
            start = time.monotonic()
            if steps:
                trainer.train()
            trainer.prepare_quantization()
        return trainer, time.monotonic() - start if steps else 0.0

    def _recipe(self, seed: int, steps: int) -> SFTRecipe:
        own = {
            "max_steps": steps,
            "per_device_train_batch_size": self.options.batch,
            "save_strategy": "no",
            "logging_steps": 1000,
            "learning_rate": self.options.rate,
        }
        return replace(self.recipe, seed=seed, training=self.recipe.training | own)

    def measure(self, trainer: QATSFTTrainer, seed: int, arm: Arm, seconds: float) -> Run:
        """Convert and measure."""
        trainer.finish_quantization()
        found = trainer.heldout_loss(len(self.heldout), 128)
        strict = None
        if "mixed" not in arm[0]:
            with trainer.sampling():
                prompts = self.heldout.remove_columns("completion")
                done = evaluate(trainer.model, self.tokenizer, prompts, self.rewards, **evaluation_options(self.recipe))
            strict = done.means["strict"]
        run = Run(seed, arm, found["loss"], found["exact"], strict, seconds)
        shown = "" if strict is None else f"  strict {100 * strict:.1f} %"
        print(
            f"seed {seed}  {arm[0]:<16} {arm[1]:<22} loss {run.loss:.5f}  exact {100 * run.exact:.1f} %{shown}  "
            f"{seconds:.0f} s",
            flush=True,
        )
        return run

    def seed(self, seed: int) -> list[Run]:
        """All arms of one seed."""
        options = self.options
        made, seconds = self.train(load_model(self.recipe.model), None, seed, options.skill_steps, seed)
        start = unpatched(made)
        runs = [self.measure(made, seed, ("full precision", "start"), seconds)]

        def arm(key: Arm, model: Any, section: Mapping[str, Any] | None, steps: int) -> Any:
            trainer, took = self.train(copy.deepcopy(model), section, seed, steps, 1000 + seed)
            plain = unpatched(trainer) if section is None else None
            runs.append(self.measure(trainer, seed, key, took))
            return plain

        full = arm(FULL, start, None, options.steps)
        for widths, sections in ROUNDED.items():
            for name, section in sections.items():
                arm((widths, name), full, section, 0)
        for widths, sections in TRAINED.items():
            for name, section in sections.items():
                arm((widths, name), start, section, options.steps)
        return runs


def unpatched(trainer: QATSFTTrainer) -> Any:
    """The trained model, without the head that TRL put on it, which copies would share."""
    model = trainer._core
    vars(model).pop("forward", None)
    found = copy.deepcopy(model)
    from trl.trainer.utils import add_fused_lm_head

    add_fused_lm_head(model, outputs=("log_probs", "entropy", "is_top1"))
    return found


# What is written


def span(values: Sequence[float]) -> tuple[float, float, float]:
    """Mean and t interval (95 %) over seeds; without one for a single seed."""
    mean = statistics.fmean(values)
    if len(values) < 2:
        return mean, math.nan, math.nan
    half = float(student.ppf(0.975, len(values) - 1)) * statistics.stdev(values) / len(values) ** 0.5
    return mean, mean - half, mean + half


def of(runs: Sequence[Run], arm: Arm, name: str) -> list[float]:
    """A figure of an arm, one per seed."""
    return [getattr(run, name) for run in runs if run.arm == arm and getattr(run, name) is not None]


def arms(runs: Sequence[Run]) -> list[Arm]:
    """In the order in which they ran."""
    return list(dict.fromkeys(run.arm for run in runs))


def mean_rows(runs: Sequence[Run]) -> list[list[str]]:
    rows = []
    for arm in arms(runs):
        loss, exact, strict = (of(runs, arm, name) for name in ("loss", "exact", "strict"))
        row = [*arm, f"{math.exp(statistics.fmean(loss)):.4f}"]
        row.append(f"{statistics.fmean(loss):.4f} ({', '.join(f'{value:.4f}' for value in loss)})")
        for shares in (exact, strict):
            listed = ", ".join(f"{100 * value:.1f}" for value in shares)
            row.append(f"{100 * statistics.fmean(shares):.1f} ({listed})" if shares else "")
        rows.append([*row, f"{statistics.fmean(of(runs, arm, 'seconds')):.0f}"])
    return rows


def differences(runs: Sequence[Run]) -> list[tuple[str, str, str, str, float, float, float]]:
    """(widths, arm, other arm, figure, mean, low, high) of every contrast that was run."""
    found = []
    for widths in TRAINED:
        pairs = [pair for pair in CONTRASTS if {(widths, pair[0]), (widths, pair[1])} <= set(arms(runs))]
        for one, other in pairs:
            for name in ("loss", "exact", "strict"):
                left, right = of(runs, (widths, one), name), of(runs, (widths, other), name)
                if left:
                    by_seed = [a - b for a, b in zip(left, right, strict=True)]
                    found.append((widths, one, other, name, *span(by_seed)))
    return found


def difference_rows(runs: Sequence[Run]) -> list[list[str]]:
    rows: dict[tuple[str, str, str], dict[str, str]] = {}
    for widths, one, other, name, mean, low, high in differences(runs):
        scale, digits = (1000, 1) if name == "loss" else (100, 1)
        text = f"{scale * mean:+.{digits}f}"
        if not math.isnan(low):
            text += f" [{scale * low:+.{digits}f}, {scale * high:+.{digits}f}]"
        rows.setdefault((widths, one, other), {})[name] = text
    return [
        [w, f"{a} − {b}", *(cells.get(n, "") for n in ("loss", "exact", "strict"))] for (w, a, b), cells in rows.items()
    ]


def write(
    folder: Path, runs: Sequence[Run], options: argparse.Namespace, argv: Sequence[str] | None, took: float
) -> None:
    """Markdown, CSV and picture."""
    folder.mkdir(parents=True, exist_ok=True)
    facts = machine("cpu", torch, transformers)
    columns = [
        "widths",
        "arm",
        "perplexity",
        "nats per token (seeds)",
        "exact % (seeds)",
        "strict % (seeds)",
        "seconds",
    ]
    text = "\n".join(
        [
            "# EdgeQAT: training for the rounding against rounding afterwards",
            "",
            f"    {command_line('compare_qat.py', argv)}",
            "",
            "![nats per token over those of full precision](comparison.png)",
            "",
            f"{options.heldout} held-out problems, seeds {', '.join(map(str, options.seeds))}; {options.skill_steps} "
            f"updates in full precision make the start, then {options.steps} per arm, each of {options.batch} rows, "
            f"learning rate {options.rate:g} (cosine). Seconds are those of an arm's training.",
            "",
            markdown_table(columns, mean_rows(runs)),
            "",
            "Differences, paired by seed, with t intervals (95 %) over seeds; not corrected for their number:",
            "",
            markdown_table(
                ["widths", "difference", "0.001 nats", "exact, points", "strict, points"], difference_rows(runs)
            ),
            "",
            f"Machine: {', '.join(f'{key} {value}' for key, value in facts.items())}; {took / 60:.0f} minutes in all.",
            "",
        ]
    )
    (folder / "comparison.md").write_text(text, encoding="utf-8")
    with (folder / "runs.csv").open("w", newline="", encoding="utf-8") as file:
        table = csv.writer(file)
        table.writerow(["seed", "widths", "arm", "loss", "exact", "strict", "seconds"])
        table.writerows([r.seed, *r.arm, r.loss, r.exact, r.strict, round(r.seconds, 1)] for r in runs)
    with (folder / "differences.csv").open("w", newline="", encoding="utf-8") as file:
        table = csv.writer(file)
        table.writerow(["widths", "arm", "minus", "figure", "mean", "low", "high"])
        table.writerows(differences(runs))
    draw(folder, runs)


def draw(folder: Path, runs: Sequence[Run]) -> None:
    """Rise of the loss over `full`, one row per arm, one mark per seed."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    full = of(runs, FULL, "loss")
    shown = [arm for arm in arms(runs) if arm[0] != FULL[0]]
    figure, axes = pyplot.subplots(figsize=(8, 0.4 * len(shown) + 1.4), layout="constrained")
    for place, arm in enumerate(reversed(shown)):
        rise = [value - base for value, base in zip(of(runs, arm, "loss"), full, strict=True)]
        axes.plot(rise, [place] * len(rise), "o", color="#0072B2", alpha=0.6)
        axes.plot(statistics.fmean(rise), place, "D", color="#D55E00")
    axes.set_yticks(range(len(shown)), [f"{widths}: {name}" for widths, name in reversed(shown)])
    axes.set_xlabel("nats per token over those of full precision (dots: seeds, diamonds: means)")
    axes.set_xscale("symlog", linthresh=0.01)
    axes.axvline(0, color="black", linewidth=0.8)
    axes.grid(axis="x", alpha=0.3)
    for kind in ("png", "svg"):
        figure.savefig(folder / f"comparison.{kind}", metadata={"Date": None} if kind == "svg" else None)
    pyplot.close(figure)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of the results")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--skill-steps", type=int, default=150, help="updates in full precision before the arms part")
    parser.add_argument("--steps", type=int, default=60, help="updates of every arm")
    parser.add_argument("--batch", type=int, default=32, help="rows of an update")
    parser.add_argument("--rate", type=float, default=5e-4, help="peak learning rate")
    parser.add_argument("--heldout", type=int, default=256, help="held-out problems")
    options = parser.parse_args(argv)
    quiet_libraries()
    bench, start = Bench(options), time.monotonic()
    runs = [run for seed in options.seeds for run in bench.seed(seed)]
    write(options.out, runs, options, argv, time.monotonic() - start)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
