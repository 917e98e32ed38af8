"""Agents that read one question and each other's answers, with prompts that are computed once, shared, or estimated.

    python scripts/multi_agent.py [--modes dense prefix kvcomm] [--questions 6] [--rounds 3] [--samples 4]

Three agents have prefixes of their own behind a beginning that they share. In the first round each reads the question,
in every later one also the last answers of the other two. Each writes `--samples` completions; the first one is its
answer. All modes sample with the same random numbers:

    dense    every prompt is computed from its first token
    prefix   equal beginnings are copied: exact, the same completions
    kvcomm   texts that were read or written elsewhere are put together from stored keys and values, rotated to their
             place and corrected by anchors (arXiv 2510.12872); an approximation, so another distribution than the
             learner's

Printed for every mode: the share of the prompt tokens that was not computed (copied and estimated ones, less what the
bases of shared texts cost), and how far the sampler is from a dense scoring of its tokens,

    xi = pi_dense(token) / pi_sampler(token)        1 where sampler and learner agree

as minimum, 5th percentile and mean, with the weights that a learner must put on the tokens (`rollout_weights`,
truncated at `--clip-max`; `cut` is the share that was). Then one real update follows: the policy gradient of the
weighted tokens, AdamW at `--learning-rate`. It empties what was stored, because keys, values and offsets belong to the
weights that made them: on-policy training gains from reuse within one batch alone.

The reward is 1 for the right number at the end. The embedded model was never taught to read other agents, so few
answers are right and the update is a demonstration, not training. Where all rewards of a group are equal its advantages
are 0.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from rltok.correction import CorrectionConfig, RolloutWeights, mismatch_quantiles, rollout_weights
from rltok.fast import row_key
from rltok.kv.anchors import KVAnchorPool, flush_on_step
from rltok.kv.segments import MODES, Mode, SegmentCache, SegmentPrompt, dense_logps, sample_rows
from rltok.models import TINY, ModelConfig, load_model, load_tokenizer

BEGINNING = "<|system|>"
AGENTS = {"solver": "solver<|user|>", "checker": "checker<|user|>", "writer": "writer<|user|>"}
OTHERS = ", "
"""between the texts that an agent reads"""
END = "<|assistant|>"
ANSWER = re.compile(r"(?:<answer>|so )(-?\d+)(?:</answer>)?$")


@dataclass
class Batch:
    """What one mode sampled. N completions, T tokens of the longest."""

    prompts: list[tuple[int, ...]] = field(default_factory=list)
    """prompt of every completion"""
    ids: list[list[int]] = field(default_factory=list)
    logps: list[list[float]] = field(default_factory=list)
    rewards: list[float] = field(default_factory=list)


@dataclass(frozen=True)
class Outcome:
    """Figures of one mode."""

    mode: str
    batch: Batch
    cache: SegmentCache
    weights: RolloutWeights
    """what the learner multiplies its tokens by"""
    figures: dict[str, float]


def questions(count: int, seed: int) -> list[tuple[str, int]]:
    """Sums of three digits, and their answers."""
    generator = random.Random(seed)
    found = []
    for _ in range(count):
        a, b, c = (generator.randint(1, 9) for _ in range(3))
        found.append((f"compute {a} + {b} - {c}", a + b - c))
    return found


class Group:
    """The agents of one run: their templates, and what they said.

    Args:
        tokenizer: of the model.
    """

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.end = tokenizer.eos_token_id

    def ids(self, text: str) -> tuple[int, ...]:
        """Token ids of a piece of text."""
        return tuple(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def prompt(self, agent: str, question: str, answers: Sequence[tuple[int, ...]]) -> SegmentPrompt:
        """What an agent reads: its prefix, the question, and the answers of the others."""
        first, between, last = self.ids(BEGINNING + AGENTS[agent]), self.ids(OTHERS), self.ids(END)
        shared = (self.ids(question), *answers)
        return SegmentPrompt(agent, (first, *[between] * len(answers), last), shared)

    def said(self, completion: Sequence[int]) -> tuple[int, ...]:
        """A completion as others read it, without the token that ends it."""
        return tuple(token for token in completion if token != self.end)

    def reward(self, completion: Sequence[int], answer: int) -> float:
        """1 for the right answer at the end of a completion."""
        found = ANSWER.search(self.tokenizer.decode(self.said(completion)).strip())
        return float(found is not None and int(found[1]) == answer)


def rollout(model: Any, tokenizer: Any, cache: SegmentCache, options: argparse.Namespace) -> Batch:
    """All questions, rounds and agents."""
    group, batch = Group(tokenizer), Batch()
    for number, (question, answer) in enumerate(questions(options.questions, options.seed)):
        last: dict[str, tuple[int, ...]] = {}
        for turn in range(options.rounds):
            heard, last = last, {}
            for agent in AGENTS:
                others = [text for name, text in heard.items() if name != agent]
                prompt = group.prompt(agent, question, others)
                place = f"{number}/{turn}/{agent}"
                keys = [row_key(options.seed, 0, place, sample) for sample in range(options.samples)]
                rows = sample_rows(model, cache.prefill(prompt), keys, options.max_new_tokens, (group.end,))
                last[agent] = group.said(rows.ids[0])
                cache.publish(last[agent], rows.kv, len(prompt.ids))
                batch.prompts += [prompt.ids] * len(keys)
                batch.ids += rows.ids
                batch.logps += rows.logps
                batch.rewards += [group.reward(ids, answer) for ids in rows.ids]
    return batch


def scored(model: Any, batch: Batch, samples: int) -> list[Tensor]:
    """Log-probabilities of all completions under the model itself, without any cache."""
    found: list[Tensor] = []
    for first in range(0, len(batch.ids), samples):
        found += dense_logps(model, batch.prompts[first], batch.ids[first : first + samples])
    return found


def correct(log_old: Sequence[Tensor], batch: Batch, clip_max: float) -> tuple[RolloutWeights, dict[str, float]]:
    """Weights of the tokens (N, T), and xi."""
    old = pad_sequence([row.detach() for row in log_old], batch_first=True)
    mu = pad_sequence([torch.tensor(row) for row in batch.logps], batch_first=True)
    mask = pad_sequence([torch.ones(len(row)) for row in batch.ids], batch_first=True)
    weights = rollout_weights(old, mu, mask, CorrectionConfig(mode="truncate", clip_max=clip_max))
    quantiles = mismatch_quantiles((old - mu)[mask.bool()])
    metrics = {name: float(value) for name, value in (weights.metrics | quantiles).items()}
    return weights, metrics


def run(model: Any, tokenizer: Any, mode: Mode, options: argparse.Namespace) -> Outcome:
    """One mode: sample, score densely, weigh."""
    pool = KVAnchorPool(options.gamma, options.max_anchors) if mode == "kvcomm" else None
    cache = SegmentCache(model, mode, pool)
    batch = rollout(model, tokenizer, cache, options)
    with torch.no_grad():
        log_old = scored(model, batch, options.samples)
    weights, metrics = correct(log_old, batch, options.clip_max)
    counts = cache.counts
    figures = {
        "prompt_tokens": counts.prompt_tokens,
        "computed": counts.computed,
        "saved": counts.saved,
        "copied": counts.copied / counts.prompt_tokens,
        "estimated": counts.estimated / counts.prompt_tokens,
        "anchors": 0 if pool is None else len(pool),
        "xi_min": metrics["ratio_min"],
        "xi_p5": metrics["ratio_p5"],
        "xi_mean": metrics["ratio_mean"],
        "max_abs_diff": metrics["max_abs_diff"],
        "ess": metrics["ess"],
        "weight_mean": metrics["weight_mean"],
        "truncated": metrics["truncated"],
        "reward": sum(batch.rewards) / len(batch.rewards),
    }
    return Outcome(mode, batch, cache, weights, {name: float(value) for name, value in figures.items()})


def update(model: Any, outcome: Outcome, options: argparse.Namespace) -> dict[str, float]:
    """One step of AdamW on the corrected policy gradient; the optimizer's hook empties what was stored."""
    batch, cache = outcome.batch, outcome.cache
    rewards = torch.tensor(batch.rewards).view(-1, options.samples)
    advantages = (rewards - rewards.mean(1, keepdim=True)).flatten()
    optimizer = torch.optim.AdamW(model.parameters(), lr=options.learning_rate, weight_decay=0.0)
    handle = flush_on_step(optimizer, cache)
    held, anchors = len(cache), 0 if cache.pool is None else len(cache.pool)
    tokens, loss = sum(map(len, batch.ids)), 0.0
    before = [parameter.detach().clone() for parameter in model.parameters()]
    for row in advantages.nonzero()[:, 0].tolist():
        logps = dense_logps(model, batch.prompts[row], [batch.ids[row]])[0]
        weight = outcome.weights.weight[row, : len(logps)]
        part = -(weight * advantages[row] * (logps - logps.detach()).exp()).sum() / tokens
        part.backward()
        loss += float(part.detach())
    optimizer.step()
    handle.remove()
    with torch.no_grad():
        moved = max(float((old - new).abs().max()) for old, new in zip(before, model.parameters(), strict=True))
    return {
        "loss": loss,
        "rows_with_advantage": float((advantages != 0).sum()),
        "largest_change": moved,
        "held_before": float(held),
        "anchors_before": float(anchors),
        "held_after": float(len(cache)),
        "anchors_after": 0.0 if cache.pool is None else float(len(cache.pool)),
    }


def show(outcomes: Sequence[Outcome], console: Console) -> None:
    """Tables of what was reused, and of what it costs the learner."""
    reuse = Table(title="prompt tokens", title_justify="left")
    gap = Table(title="sampler against dense scoring", title_justify="left")
    for name in ("mode", "tokens", "computed", "not computed", "copied", "estimated", "anchors"):
        reuse.add_column(name, justify="left" if name == "mode" else "right")
    for name in ("mode", "xi min", "xi 5 %", "xi mean", "max |log|", "ESS", "weight", "cut", "reward"):
        gap.add_column(name, justify="left" if name == "mode" else "right")
    for outcome in outcomes:
        f = outcome.figures
        reuse.add_row(
            outcome.mode,
            *(f"{f[name]:.0f}" for name in ("prompt_tokens", "computed")),
            *(f"{f[name]:.1%}" for name in ("saved", "copied", "estimated")),
            f"{f['anchors']:.0f}",
        )
        gap.add_row(
            outcome.mode,
            *(f"{f[name]:.4f}" for name in ("xi_min", "xi_p5", "xi_mean")),
            f"{f['max_abs_diff']:.0e}",
            *(f"{f[name]:.3f}" for name in ("ess", "weight_mean", "truncated", "reward")),
        )
    console.print(reuse)
    console.print(gap)


def show_weights(outcome: Outcome, tokenizer: Any, console: Console) -> None:
    """The completion with the largest correction, token by token."""
    weight = outcome.weights.weight
    row = int((weight - 1).abs().mul(outcome.weights.loss_mask).amax(1).argmax())
    ids = outcome.batch.ids[row]
    words = " ".join(
        f"{tokenizer.decode([token])!r}x{float(value):.3f}" for token, value in zip(ids, weight[row], strict=False)
    )
    console.print(f"{outcome.mode}, weights of the completion that needs them most: {words}", markup=False)


def show_update(step: dict[str, float], console: Console) -> None:
    """What the step did, and what it left in the store."""
    console.print(
        f"one step of AdamW on {step['rows_with_advantage']:.0f} completions with an advantage: "
        f"weights moved by up to {step['largest_change']:.1e}"
    )
    console.print(
        f"stored before the step: {step['held_before']:.0f}, of them anchors {step['anchors_before']:.0f}; "
        f"after it: {step['held_after']:.0f}, anchors {step['anchors_after']:.0f}"
    )


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=TINY, help="embedded model, directory or hub id (default: %(default)s)")
    parser.add_argument("--modes", nargs="+", choices=MODES, default=list(MODES), help="(default: all)")
    parser.add_argument("--questions", type=int, default=6, help="(default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="turns of every agent (default: %(default)s)")
    parser.add_argument("--samples", type=int, default=4, help="completions per prompt (default: %(default)s)")
    parser.add_argument("--max-new-tokens", type=int, default=24, help="of a completion (default: %(default)s)")
    parser.add_argument(
        "--gamma",
        type=float,
        default=0.3,
        help="kvcomm: least entropy of a new anchor, as a share of the largest (default: %(default)s)",
    )
    parser.add_argument("--max-anchors", type=int, default=20, help="kvcomm: per placeholder (default: %(default)s)")
    parser.add_argument("--clip-max", type=float, default=2.0, help="largest weight of a token (default: %(default)s)")
    parser.add_argument("--learning-rate", type=float, default=1e-4, help="of the one update (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of questions and samples (default: %(default)s)")
    parser.add_argument("--json", type=Path, help="write the figures there")
    options = parser.parse_args(arguments)
    for name in ("questions", "rounds", "samples", "max_new_tokens"):
        if getattr(options, name) < 1:
            parser.error(f"--{name.replace('_', '-')} {getattr(options, name)}: must be at least 1")
    config = ModelConfig(path=options.model)
    model, tokenizer = load_model(config), load_tokenizer(config)
    console = Console()
    outcomes = [run(model, tokenizer, mode, options) for mode in options.modes]
    show(outcomes, console)
    last = outcomes[-1]
    show_weights(last, tokenizer, console)
    step = update(model, last, options)
    show_update(step, console)
    if options.json is not None:
        figures = {outcome.mode: outcome.figures for outcome in outcomes} | {"update": step}
        options.json.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
