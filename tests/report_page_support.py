"""Runs for the tests of the report page, made without training: curves, evaluations and recorded completions."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

HOSTILE = [
    "<script>window.broken = 1</script>",
    '<img src="x" onerror="window.broken = 1">',
    "</script><!-- {{ 7 * 7 }} ",
    "\u202egnp.exe",
]
"""Texts that would run or mislead if they were markup."""
WORDS = [
    " the",
    " sum",
    " is",
    " 12",
    " +",
    " 7",
    ",",
    "\n",
    " so",
    " answer",
    "=",
    " 19",
    ".",
    "\n\n",
    "  ",
    "\t",
    "check",
]
ARABIC = ["\u0645\u0631", "\u062d\u0628", "\u0627"]
SPLIT = "\U0001f600"
"""A character that the fake tokenizer cuts into four tokens."""


@dataclass
class FakeRun:
    """What `rltok.report.load` gives, from memory."""

    name: str = "demo"
    path: Path = Path("runs/demo")
    recipe: dict[str, Any] = field(default_factory=dict)
    environment: dict[str, Any] = field(default_factory=dict)
    metrics: pd.DataFrame = field(default_factory=lambda: pd.DataFrame({"step": [], "seconds": []}))
    evaluations: dict[str, Any] = field(default_factory=dict)
    summary: dict[str, Any] | None = None
    rows: pd.DataFrame = field(default_factory=pd.DataFrame)
    problems: list[str] = field(default_factory=list)

    def samples(self, steps: Any = None, columns: Any = None) -> pd.DataFrame:
        """The recorded completions."""
        rows = self.rows
        if steps is not None and len(rows):
            rows = rows[rows["step"].isin(list(steps))]
        return rows if columns is None or not len(rows) else rows[list(columns)]


def metrics(steps: int = 40, seed: int = 0) -> pd.DataFrame:
    """Logged metrics by the names that training uses."""
    rng = np.random.default_rng(seed)
    step = np.arange(1, steps + 1)
    rise = 1 - np.exp(-step / max(steps / 3, 1))
    noise = lambda size: rng.normal(0, size, steps)  # noqa: E731
    return pd.DataFrame(
        {
            "step": step,
            "seconds": np.cumsum(0.4 + 0.1 * rng.random(steps)),
            "num_tokens": np.where(step % 2 == 1, step * 3000.0, np.nan),
            "trained_tokens": step * 900.0,
            "reward": 0.1 + 0.6 * rise + noise(0.05),
            "rewards/strict/mean": 0.1 + 0.6 * rise + noise(0.05),
            "rewards/lenient/mean": 0.2 + 0.6 * rise + noise(0.05),
            "rewards/short/mean": -0.1 + noise(0.01),
            "completions/mean_length": 40 - 15 * rise + noise(2),
            "completions/clipped_ratio": 0.2 * (1 - rise) + 0.02,
            "entropy": 0.5 * (1 - 0.7 * rise) + noise(0.02),
            "entropy/top20_quantile": 0.9 * (1 - 0.5 * rise) + noise(0.02),
            "credit/top20_share": 0.4 + 0.1 * rise + noise(0.02),
            "credit/nonzero_share": 0.9 + noise(0.02),
            "clip_ratio/low_mean": 0.01 + noise(0.002),
            "clip_ratio/high_mean": 0.012 + noise(0.002),
            "clip_ratio/region_mean": 0.022 + noise(0.002),
            "correction/k1": noise(1e-4),
            "correction/k3": np.abs(noise(1e-4)),
            "correction/ratio_mean": 1 + noise(1e-3),
            "correction/ess": 0.98 + noise(1e-3),
            "ratio": 1 + noise(1e-3),
            "step_time": 0.3 + noise(0.02),
            "profiling/Time taken: CreditTrainer.generate": 0.2 + noise(0.01),
            "rollout/tokens_per_second": 2500 + noise(100),
            "loss": noise(0.1),
            "grad_norm": 1 + noise(0.1),
            "hapo/signal_mean": noise(0.1),
        }
    )


def samples(
    rollouts: int = 6, groups: int = 2, size: int = 4, length: int = 60, seed: int = 0, columns: str = "all"
) -> pd.DataFrame:
    """Recorded completions of random tokens, with a few hostile, right-to-left and split ones in every rollout.

    `columns` is `all`, or `few` for credit, entropy, ratio and clipped.
    """
    rng = np.random.default_rng(seed)
    rows = []
    for rollout in range(rollouts):
        for row in range(groups * size):
            rows.append(_row(rng, rollout, row, size, length, columns))
    return pd.DataFrame(rows)


def _row(rng: np.random.Generator, rollout: int, row: int, size: int, length: int, columns: str) -> dict[str, Any]:
    texts = [WORDS[i] for i in rng.integers(0, len(WORDS), length)]
    completion = list(texts)
    if length >= 40:
        place = 4
        for text in HOSTILE:
            texts[place] = completion[place] = text
            place += 2
        texts[20:23] = completion[20:23] = ARABIC
        texts[24:28], completion[24:28] = ["\ufffd"] * 4, [SPLIT, "", "", ""]
        texts[-1] = completion[-1] = "<|im_end|>"
    reward = float(rng.integers(0, 2))
    advantage = np.float32(rng.normal())
    entropy = rng.gamma(0.4, 0.8, length).astype(np.float32)
    credit = (advantage * (0.4 + entropy)).astype(np.float32)
    ratio = np.exp(rng.normal(0, 0.12, length)).astype(np.float32)
    clipped = np.where(ratio > 1.25, 1, np.where(ratio < 0.8, -1, 0)).astype(np.int8)
    out: dict[str, Any] = {
        "rollout": rollout,
        "step": 2 * rollout,
        "updates": 2,
        "row": row,
        "group": row // size,
        "prompt": f"compute {rollout} + {row // size}",
        "completion": "".join(completion),
        "ended": bool(rng.random() > 0.2),
        "reward": np.float32(reward - 0.01 * length),
        "reward/strict": np.float32(reward),
        "reward/lenient": np.float32(max(reward, float(rng.integers(0, 2)))),
        "advantage": advantage,
        "token_ids": np.array([sum(map(ord, text)) % 30000 for text in texts], dtype=np.int32),
        "tokens": texts,
        "credit": credit,
        "entropy": entropy,
        "ratio": ratio,
        "clipped": clipped,
    }
    if columns == "all":
        old = -rng.gamma(0.5, 1.0, length).astype(np.float32)
        in_loss = rng.random(length) > 0.05
        out |= {
            "in_loss": in_loss,
            "credit_used": (credit * in_loss).astype(np.float32),
            "sampler_logp": old + rng.normal(0, 1e-3, length).astype(np.float32),
            "old_logp": old,
            "learner_logp": old + np.log(ratio),
            "kept": rng.random(length) > 0.1,
            "weight": np.ones(length, np.float32),
            "temperature": (1 + 0.1 * rng.normal(size=length)).astype(np.float32),
            "wave": np.zeros(length, np.float32),
            "forced": rng.random(length) > 0.98,
            "fai": rng.gamma(0.3, 0.01, length).astype(np.float32),
            "mark": rng.integers(0, 4, length).astype(np.int8) * (rng.random(length) > 0.9).astype(np.int8),
        }
    return out


def recipe(name: str = "demo", **changes: Any) -> dict[str, Any]:
    """A resolved recipe, shortened."""
    return {
        "name": name,
        "seed": 0,
        "credit": {"type": "token_group_average", "eps": 1e-6},
        "objective": {"type": "hapo", "alpha": 1.0},
        "rollout": {"engine": "fast", "decoding": [{"type": "adaptive_temperature", "tau": 0.05}]},
        "selection": None,
        "training": {"max_steps": 40, "num_generations": 4, "learning_rate": 2e-4},
    } | changes


def evaluations(before: float = 0.3, after: float = 0.6, count: int = 200) -> dict[str, Any]:
    """Held-out means of two evaluations."""
    return {
        "before": {"completions": count, "means": {"strict": before, "lenient": before, "length": 30.0}},
        "after": {"completions": count, "means": {"strict": after, "lenient": after + 0.05, "length": 20.0}},
    }


def full_run(name: str = "demo", seed: int = 0, **changes: Any) -> FakeRun:
    """A complete run."""
    values: dict[str, Any] = {
        "name": name,
        "path": Path("runs") / name,
        "recipe": recipe(name, seed=seed),
        "environment": {"versions": {"torch": "2.13.0"}, "commit": "0123abc", "seed": seed, "devices": ["cpu"]},
        "metrics": metrics(seed=seed),
        "evaluations": evaluations(),
        "summary": {"train_seconds": 18.2, "steps": 40, "expect": {"strict_after > 0.5": True}},
        "rows": samples(seed=seed),
    }
    return FakeRun(**(values | changes))
