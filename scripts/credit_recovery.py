"""Does attention credit find the one token that decides the reward? A task where that token is known.

    python scripts/credit_recovery.py [--seeds 0 1 2] [--completions 256] [--steps 300] [--json figures.json]

Language (41 tokens). A prompt is a few fillers and a target. A completion is fillers with ONE deciding token among
them, one of four, in the first two thirds; 18 - 28 tokens after it come a mark, the answer, four closing tokens and
the end. Answer and closing tokens are functions of the deciding token and of nothing else, and the reward
is 1 if the answer is the target: the deciding token alone decides it. A small Qwen3 learns the language from scratch
by next-token prediction, and then samples the completions that are scored; those that break the grammar are left out
and counted. That the model itself reads its answer off the deciding token is measured by exchanging the token.

Statistic: percentile of the deciding token's credit in its own completion, from 0 (least) to 1 (most), ties counted
half, so that any credit that knows nothing has mean 0.5. Every completion gets advantage 1: multipliers are ranked as
they are. (Entropy shaping adds to the advantage, so for a negative one its ranking by magnitude would be reversed.)
The interval is a bootstrap over completions; with few models it does not hold the spread between models, which the
column of seeds shows. AUC is the chance that the deciding token ranks higher than under the shuffled control.

Two controls beside `shuffled`, `entropy` and uniform:
  same place    the percentile of the same place in the other completions (without those whose deciding token is there):
                what a method gains from position alone
  decoy         the percentile of the decoys of the same completion: four tokens as rare as the deciding ones, anywhere,
                which mean nothing: what it gains from rarity alone

What entropy can pick up. The deciding token comes with the same chance at every place until it has come, and then gives
this chance to four tokens that mean nothing, so the language's entropy is equal before, at and after it, but for two
things: after 39 places without it, it must come (1.6 % of the completions), and the mark has a chance of its own from
18 tokens after it. The model's entropy is not exactly equal: the printed means differ by hundredths of a nat, but raw
entropy and the `entropy` control rank such differences too. And a sampled deciding token tends to stand where the model
gave it a higher chance, which evens its distribution out. Mark, answer, closing tokens and end are almost certain, so
every token before them, the deciding one too, outranks them in entropy: that alone gives about 0.59. `before mark`
ranks without them. So raw entropy is favoured here: it is no fair opponent of attention, only a report.

Windows: the paper's W = 10 and horizon 10 - 100 are for completions of hundreds of tokens, ours have about 40. `scaled`
divides all three by 2.5, so that the longest horizon is the length of a completion: W = 4, horizon 4 - 40. It was fixed
by this argument before any figure was seen; the paper's values are reported beside it. Both probe the default layers,
2, 3 and 4 of 0 - 5. `all layers` is `scaled` on all six; it was added after the first figures, as a diagnosis, because
the heads that read the deciding token were found in layers 0 and 1.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import numpy as np
import torch
import transformers
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import GenerationConfig, Qwen3Config, Qwen3ForCausalLM, set_seed

from rltok.attention.signals import attention_signals
from rltok.batch import TokenBatch, masked_mean
from rltok.credit import EntropyShaping, GroupCredit
from rltok.credit.preplan_anchor import Control, PreplanAnchor, Strategy, shuffle_multipliers

PAD, BOS, ASK, MARK, EOS = range(5)
FILLER = range(5, 21)
DECIDING = range(21, 25)
DECOY = range(25, 29)
"""as rare as the deciding tokens, anywhere, without meaning"""
LATER = range(29, 33)
"""takes over the deciding tokens' chance once one has come; without meaning"""
ANSWER = range(33, 37)
CLOSING = range(37, 41)
VOCABULARY = 41

RARE = 0.1
"""chance of a deciding token (later: of a LATER one) at a place, and of a decoy"""
LAST_PLACE = 40
"""the deciding token is one of the first 40 tokens; at least 25 follow, so it lies in the first two thirds"""
GAP = (18, 28)
"""tokens between the deciding token and the mark"""
CLOSINGS = 4
TAIL = CLOSINGS + 3
"""mark, answer, closing tokens, end"""
MAX_COMPLETION = LAST_PLACE + GAP[1] + TAIL

LAYERS = 6
SCALED = {"window": 4, "horizon_min": 4, "horizon_max": 40}
SETTINGS: dict[str, dict[str, Any]] = {
    "scaled": SCALED,
    "paper": {"window": 10, "horizon_min": 10, "horizon_max": 100},
    "all layers": SCALED | {"layers": tuple(range(LAYERS))},
}
"""options of the attention pass"""
STRATEGIES: tuple[Strategy, ...] = ("local", "global", "coupled")
CONTROLS: tuple[Control, ...] = ("none", "shuffled", "entropy")
STEPS = 300
MIN_ACCURACY = 0.95
"""of the answers; below it the model has not learnt what the statistic presupposes"""


class RecoveryError(Exception):
    """The model has not learnt the task, so there is nothing to recover; the message says what to do."""


# The language


def write_prompt(rng: random.Random) -> list[int]:
    """A few fillers and the target."""
    return [BOS, *rng.choices(FILLER, k=rng.randint(2, 5)), ASK, rng.choice(ANSWER)]


def write_completion(rng: random.Random) -> list[int]:
    """A completion of the language."""
    body: list[int] = []
    while not body or body[-1] not in DECIDING:
        must_decide = len(body) == LAST_PLACE - 1
        body.append(rng.choice(DECIDING) if must_decide else _body_token(rng, DECIDING))
    decision = DECIDING.index(body[-1])
    after = [_body_token(rng, LATER) for _ in range(rng.randint(*GAP))]
    return [*body, *after, *write_tail(decision)]


def write_tail(decision: int) -> list[int]:
    """Mark, answer, closing tokens and end, as the decision determines them."""
    return [MARK, ANSWER[decision], *(CLOSING[(decision + i) % len(CLOSING)] for i in range(CLOSINGS)), EOS]


def _body_token(rng: random.Random, rare: Sequence[int]) -> int:
    draw = rng.random()
    return rng.choice(rare if draw < RARE else DECOY if draw < 2 * RARE else FILLER)


def is_grammatical(completion: Sequence[int]) -> bool:
    """One deciding token in the first two thirds and before the mark, whole tail; the answer may be wrong."""
    places = [i for i, token in enumerate(completion) if token in DECIDING]
    body, end = completion[:-TAIL], completion[-TAIL:]
    return (
        len(places) == 1
        and places[0] < len(completion) * 2 / 3
        and all(token in FILLER or token in DECIDING or token in DECOY or token in LATER for token in body)
        and not any(token in LATER for token in body[: places[0]])
        and len(end) == TAIL
        and end[0] == MARK
        and end[1] in ANSWER
        and all(token in CLOSING for token in end[2:-1])
        and end[-1] == EOS
    )


# The model


def build_model() -> Qwen3ForCausalLM:
    """Six layers of four heads, 0.3M parameters; the default layers of the attention pass are 2, 3 and 4."""
    model = Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=VOCABULARY,
            hidden_size=64,
            intermediate_size=192,
            num_hidden_layers=LAYERS,
            num_attention_heads=4,
            num_key_value_heads=4,
            head_dim=16,
            max_position_embeddings=128,
            rope_parameters={"rope_type": "default", "rope_theta": 1000.0},
            tie_word_embeddings=True,
            initializer_range=0.1,
            pad_token_id=PAD,
            bos_token_id=BOS,
            eos_token_id=EOS,
        )
    )
    model.generation_config = GenerationConfig(do_sample=True, top_k=0, pad_token_id=PAD, eos_token_id=EOS)
    return model


def train(seed: int, steps: int, batch: int = 32, rate: float = 3e-3) -> Qwen3ForCausalLM:
    """Next-token prediction on fresh rows of the language, loss on the completion; linear warm-up, cosine decay."""
    set_seed(seed)
    rng = random.Random(seed)
    model = build_model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, betas=(0.9, 0.98), weight_decay=0.01)
    shape = [min((step + 1) / 50, 0.5 + 0.5 * np.cos(np.pi * step / steps)) for step in range(steps)]
    for factor in shape:
        rows = [(write_prompt(rng), write_completion(rng)) for _ in range(batch)]
        ids = _padded([prompt + completion for prompt, completion in rows])
        labels = _padded([[-100] * len(prompt) + completion for prompt, completion in rows], fill=-100)
        logits = model(input_ids=ids).logits
        loss = cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        optimizer.param_groups[0]["lr"] = rate * factor
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    return model.eval()


def _padded(rows: Sequence[Sequence[int]], fill: int = PAD, left: bool = False) -> Tensor:
    width = max(map(len, rows))
    gaps = [[fill] * (width - len(row)) for row in rows]
    return torch.tensor([gap + list(row) if left else list(row) + gap for row, gap in zip(rows, gaps, strict=True)])


# Completions


@dataclass(frozen=True)
class Rollouts:
    """B grammatical completions, prompts padded on the left, completions on the right to C tokens."""

    input_ids: Tensor
    """(B, P + C)"""
    attention_mask: Tensor
    """(B, P + C)"""
    mask: Tensor
    """(B, C)"""
    deciding: Tensor
    """(B,) place of the deciding token in the completion"""
    rewards: Tensor
    """(B,) 1 where the answer is the target"""
    grammatical: float
    """share of the sampled completions that were kept"""

    @property
    def ids(self) -> Tensor:
        """(B, C) completion ids."""
        return self.input_ids[:, -self.mask.size(1) :]


@torch.no_grad()
def sample(model: Qwen3ForCausalLM, completions: int, seed: int) -> Rollouts:
    """Completions that the model samples at temperature 1 for fresh prompts, until enough are grammatical.

    Raises:
        RecoveryError: fewer than half of the completions are grammatical.
    """
    set_seed(seed)
    rng = random.Random(seed)
    kept: list[tuple[list[int], list[int]]] = []
    drawn = 0
    while len(kept) < completions:
        if len(kept) < drawn / 2:
            raise RecoveryError(f"only {len(kept)} of {drawn} samples are grammatical; train longer (--steps)")
        prompts = [write_prompt(rng) for _ in range(completions)]
        inputs = _padded(prompts, left=True)
        output = model.generate(inputs, attention_mask=(inputs != PAD).long(), max_new_tokens=MAX_COMPLETION + 8)
        rows = [row[: row.index(EOS) + 1] if EOS in row else row for row in output[:, inputs.size(1) :].tolist()]
        drawn += len(rows)
        kept += [pair for pair in zip(prompts, rows, strict=True) if is_grammatical(pair[1])]
    share = len(kept) / drawn
    return collate(kept[:completions], share)


def collate(rows: Sequence[tuple[list[int], list[int]]], grammatical: float = 1.0) -> Rollouts:
    """`Rollouts` of (prompt, completion) pairs."""
    prompts = _padded([prompt for prompt, _ in rows], left=True)
    ids = _padded([completion for _, completion in rows])
    input_ids = torch.cat([prompts, ids], dim=1)
    is_deciding = (ids >= DECIDING[0]) & (ids <= DECIDING[-1])
    return Rollouts(
        input_ids=input_ids,
        attention_mask=(input_ids != PAD).long(),
        mask=(ids != PAD).long(),
        deciding=is_deciding.long().argmax(1),
        rewards=torch.tensor([float(completion[-TAIL + 1] == prompt[-1]) for prompt, completion in rows]),
        grammatical=grammatical,
    )


@torch.no_grad()
def logits_of(model: Qwen3ForCausalLM, rollouts: Rollouts, input_ids: Tensor | None = None) -> Tensor:
    """(B, C, V) logits that predicted each completion token."""
    ids = rollouts.input_ids if input_ids is None else input_ids
    return model(input_ids=ids, attention_mask=rollouts.attention_mask).logits[:, -rollouts.mask.size(1) - 1 : -1]


def answer_accuracy(model: Qwen3ForCausalLM, rollouts: Rollouts, exchange: int = 0) -> float:
    """Share of completions whose most likely answer follows from the deciding token, after exchanging that token.

    Args:
        model: reads the completion up to the mark.
        rollouts: its completions.
        exchange: what is added to the decision (modulo 4) beforehand; 0 leaves the completions as they are.
    """
    rows = torch.arange(rollouts.deciding.numel())
    column = rollouts.input_ids.size(1) - rollouts.mask.size(1) + rollouts.deciding
    ids = rollouts.input_ids.clone()
    decision = (ids[rows, column] - DECIDING[0] + exchange) % len(DECIDING)
    ids[rows, column] = DECIDING[0] + decision
    answer_place = rollouts.mask.sum(1) - TAIL + 1
    choice = logits_of(model, rollouts, ids)[rows, answer_place].argmax(1)
    return float((choice == ANSWER[0] + decision).float().mean())


# Credit


def token_batch(model: Qwen3ForCausalLM, rollouts: Rollouts, seed: int) -> TokenBatch:
    """One group of completions with advantage 1 and the entropies of the policy that sampled them."""
    logits = logits_of(model, rollouts)
    return TokenBatch(
        advantages=torch.ones(len(rollouts.rewards)),
        mask=rollouts.mask.float(),
        ids=rollouts.ids,
        all_rewards=rollouts.rewards,
        all_lengths=rollouts.mask.sum(1),
        group_size=len(rollouts.rewards),
        entropy=torch.distributions.Categorical(logits=logits).entropy(),
        seed=seed,
    )


def entropy_around(batch: TokenBatch, rollouts: Rollouts) -> dict[str, float]:
    """Mean entropy (nats) before, at, and up to 18 tokens after the deciding token."""
    assert batch.entropy is not None
    distance = torch.arange(rollouts.mask.size(1)) - rollouts.deciding[:, None]
    sides = {"before": distance < 0, "at": distance == 0, "after": (distance > 0) & (distance <= GAP[0])}
    return {name: float(batch.entropy[side].mean()) for name, side in sides.items()}


def credits(model: Qwen3ForCausalLM, rollouts: Rollouts, batch: TokenBatch) -> Iterator[tuple[str, str, Tensor]]:
    """Setting of the attention pass ("" where it plays no part), method, and its credit (B, C)."""
    assert batch.entropy is not None
    yield "", "uniform (group)", GroupCredit()(batch)
    yield "", "entropy, raw", batch.entropy
    yield "", "entropy shaping", EntropyShaping()(batch)
    for setting, options in SETTINGS.items():
        config = PreplanAnchor(**options).attention
        signals = attention_signals(model, rollouts.input_ids, rollouts.attention_mask, rollouts.mask, config)
        seen = replace(batch, attention=signals)
        change = torch.zeros_like(signals.waad)
        change[:, :-1] = (signals.waad[:, :-1] - signals.waad[:, 1:]).abs() * rollouts.mask[:, 1:]
        yield setting, "WAAD change, raw", change
        yield setting, "FAI, raw", signals.fai
        for strategy in STRATEGIES:
            for control in CONTROLS:
                name = strategy if control == "none" else f"{strategy}, {control}"
                yield setting, name, PreplanAnchor(strategy=strategy, control=control, **options)(seen)


# Statistic


def percentiles(credit: Tensor, mask: Tensor) -> np.ndarray:
    """(B, C) share of the other tokens of its completion that a token's credit exceeds, ties counted half.

    0 is the least credit of a completion, 1 the most, 0.5 the mean over a completion, whatever the credit. NaN outside
    the mask, and for the only token of a completion.
    """
    values, inside = credit.double().numpy(), mask.bool().numpy()
    own, other = values[:, :, None], values[:, None, :]
    wins = ((own > other) + 0.5 * (own == other)) * inside[:, None, :]
    others = inside.sum(1, keepdims=True) - 1
    with np.errstate(divide="ignore", invalid="ignore"):
        ranks = (wins.sum(2) - 0.5) / others  # without the tie with itself
    return np.where(inside & (others > 0), ranks, np.nan)


def same_place(ranks: np.ndarray, places: np.ndarray) -> np.ndarray:
    """(B,) mean rank of a row's place in the other rows, where these have a token that is not their deciding one."""
    there = ranks[:, places]  # (B, B): row, place of which row
    there = np.where(places[:, None] == places[None, :], np.nan, there)
    return np.nanmean(there, axis=0)


def auc(values: np.ndarray, control: np.ndarray) -> float:
    """Chance that a value exceeds one of the control, ties counted half (Mann-Whitney U over all pairs)."""
    own, other = values[:, None], control[None, :]
    return float(((own > other) + 0.5 * (own == other)).mean())


def interval(values: np.ndarray, seed: int = 0, resamples: int = 2000) -> tuple[float, float]:
    """95 % bootstrap interval of the mean."""
    draws = np.random.default_rng(seed).integers(len(values), size=(resamples, len(values)))
    low, high = np.quantile(values[draws].mean(1), (0.025, 0.975))
    return float(low), float(high)


@dataclass(frozen=True)
class Finding:
    """Percentiles of the deciding tokens of B completions under one credit; all (B,)."""

    setting: str
    method: str
    rank: np.ndarray
    """among all tokens of the completion"""
    before_mark: np.ndarray
    """among the tokens before the mark"""
    shuffled: np.ndarray
    """after shuffling the credit within the completion"""
    place: np.ndarray
    """of the same place in other completions"""
    decoy: np.ndarray
    """mean of the completion's decoys; NaN where it has none"""
    above_mean: np.ndarray
    """1 where the deciding token's credit is above the mean of its completion"""


def find(setting: str, method: str, credit: Tensor, rollouts: Rollouts, seed: int) -> Finding:
    """Where a credit (B, C) puts the deciding tokens. `seed` as in the batch, so that the shuffle is the control's."""
    rows, places = np.arange(len(credit)), rollouts.deciding.numpy()
    mask = rollouts.mask
    ranks = percentiles(credit, mask)
    body = mask.clone()
    body[torch.arange(mask.size(1)) >= mask.sum(1, keepdim=True) - TAIL] = 0
    is_decoy = ((rollouts.ids >= DECOY[0]) & (rollouts.ids <= DECOY[-1])).numpy()
    decoys = is_decoy.sum(1)
    own = credit[torch.arange(len(credit)), rollouts.deciding]
    return Finding(
        setting,
        method,
        rank=ranks[rows, places],
        before_mark=percentiles(credit, body)[rows, places],
        shuffled=percentiles(shuffle_multipliers(credit, mask, seed), mask)[rows, places],
        place=same_place(ranks, places),
        decoy=np.where(decoys > 0, (ranks * is_decoy).sum(1, where=is_decoy) / np.maximum(decoys, 1), np.nan),
        above_mean=(own > masked_mean(credit, mask, 1) + 1e-6).double().numpy(),
    )


# Which heads read the deciding token


def reading_head(model: Qwen3ForCausalLM, rollouts: Rollouts) -> dict[str, Any]:
    """The head with most attention from the mark, whose row predicts the answer, to the deciding token; a diagnosis.

    Returns:
        layer, head, mean attention, whether the default layers hold it, and the shares of completions in which it
        belongs to the global and to the local group.
    """
    model.set_attn_implementation("eager")
    with torch.no_grad():
        maps = model(rollouts.input_ids, attention_mask=rollouts.attention_mask, output_attentions=True).attentions
    model.set_attn_implementation("sdpa")
    rows = torch.arange(len(rollouts.deciding))
    first = rollouts.input_ids.size(1) - rollouts.mask.size(1)
    mark, key = first + rollouts.mask.sum(1) - TAIL, first + rollouts.deciding
    weight = torch.stack([layer[rows, :, mark, key].mean(0) for layer in maps])  # (L, H)
    layer, head = divmod(int(weight.argmax()), weight.size(1))
    signals = attention_signals(
        model, rollouts.input_ids, rollouts.attention_mask, rollouts.mask, PreplanAnchor().attention
    )
    flat = signals.layers.index(layer) * weight.size(1) + head if layer in signals.layers else -1
    return {
        "layer": layer,
        "head": head,
        "attention": float(weight.max()),
        "probed": layer in signals.layers,
        "in_global": float((signals.global_ == flat).any(1).double().mean()),
        "in_local": float((signals.local == flat).any(1).double().mean()),
    }


# The experiment


@dataclass(frozen=True)
class Outcome:
    """One model."""

    facts: Mapping[str, Any]
    findings: Sequence[Finding]


def measure(seed: int, steps: int, completions: int) -> Outcome:
    """Train one model, sample its completions, and rank their deciding tokens under every credit.

    Raises:
        RecoveryError: the answers do not follow the deciding token often enough, or too few samples are grammatical.
    """
    start = time.perf_counter()
    model = train(seed, steps)
    trained = time.perf_counter()
    rollouts = sample(model, completions, seed=1_000 + seed)
    accuracy, exchanged = answer_accuracy(model, rollouts), answer_accuracy(model, rollouts, exchange=1)
    if min(accuracy, exchanged) < MIN_ACCURACY:
        raise RecoveryError(
            f"seed {seed}: {accuracy:.1%} of the answers follow the deciding token, {exchanged:.1%} after it is "
            f"exchanged; at least {MIN_ACCURACY:.0%} are needed, train longer (--steps)"
        )
    batch = token_batch(model, rollouts, seed)
    findings = [find(*entry, rollouts, seed) for entry in credits(model, rollouts, batch)]
    facts = {
        "seed": seed,
        "answer_accuracy": accuracy,
        "answer_accuracy_exchanged": exchanged,
        "grammatical": rollouts.grammatical,
        "mean_reward": float(rollouts.rewards.mean()),
        "mean_length": float(rollouts.mask.sum(1).double().mean()),
        "entropy_nats": entropy_around(batch, rollouts),
        "reading_head": reading_head(model, rollouts),
        "train_seconds": trained - start,
        "score_seconds": time.perf_counter() - trained,
    }
    return Outcome(facts, findings)


def summarise(outcomes: Sequence[Outcome]) -> list[dict[str, Any]]:
    """One row per credit: the completions of all models together, and the mean of each model."""
    rows = []
    for same in zip(*(outcome.findings for outcome in outcomes), strict=True):
        joined = {name: np.concatenate([getattr(one, name) for one in same]) for name in ARRAYS}
        low, high = interval(joined["rank"])
        rows.append(
            {
                "setting": same[0].setting,
                "method": same[0].method,
                "completions": len(joined["rank"]),
                "rank": float(joined["rank"].mean()),
                "rank_low": low,
                "rank_high": high,
                "rank_by_seed": [float(one.rank.mean()) for one in same],
                "above_mean": float(joined["above_mean"].mean()),
                "auc_shuffled": auc(joined["rank"], joined["shuffled"]),
                "same_place": float(np.nanmean(joined["place"])),
                "decoy": float(np.nanmean(joined["decoy"])),
                "before_mark": float(joined["before_mark"].mean()),
            }
        )
    return rows


ARRAYS = ("rank", "before_mark", "shuffled", "place", "decoy", "above_mean")


def table(rows: Sequence[Mapping[str, Any]]) -> Table:
    result = Table(title="percentile of the deciding token's credit within its completion (0.5: knows nothing)")
    for column in ("setting", "credit"):
        result.add_column(column, no_wrap=True)
    for column in ("mean", "95 %", "by seed", "above mean", "AUC shuffled", "same place", "decoy", "before mark"):
        result.add_column(column, justify="right", no_wrap=True)
    for row in rows:
        result.add_row(
            row["setting"],
            row["method"],
            f"{row['rank']:.3f}",
            f"{row['rank_low']:.3f}-{row['rank_high']:.3f}",
            " ".join(f"{value:.2f}" for value in row["rank_by_seed"]),
            f"{row['above_mean']:.1%}",
            *(f"{row[name]:.3f}" for name in ("auc_shuffled", "same_place", "decoy", "before_mark")),
        )
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="one model each")
    parser.add_argument("--completions", type=int, default=256, help="scored per model")
    parser.add_argument("--steps", type=int, default=STEPS, help="of training, 32 rows each")
    parser.add_argument("--json", type=Path, help="write the figures here")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    console = Console(width=150)
    outcomes = []
    for seed in arguments.seeds:
        outcomes.append(measure(seed, arguments.steps, arguments.completions))
        console.print(describe(outcomes[-1].facts), highlight=False, soft_wrap=True)
    rows = summarise(outcomes)
    console.print(table(rows))
    versions = f"torch {torch.__version__}, transformers {transformers.__version__}, {platform.machine()} CPU, 1 thread"
    console.print(f"{arguments.completions} completions per seed, {arguments.steps} steps; {versions}", highlight=False)
    if arguments.json:
        report = {"rows": rows, "models": [outcome.facts for outcome in outcomes], "settings": SETTINGS}
        arguments.json.write_text(json.dumps(report, indent=1) + "\n")


def describe(facts: Mapping[str, Any]) -> str:
    """What has to be true of a model before its table means anything, and which head reads the deciding token."""
    head = facts["reading_head"]
    return (
        f"seed {facts['seed']}: answers follow the deciding token {facts['answer_accuracy']:.1%}, after exchanging it "
        f"{facts['answer_accuracy_exchanged']:.1%}; {facts['grammatical']:.1%} grammatical, mean reward "
        f"{facts['mean_reward']:.2f}, {facts['mean_length']:.1f} tokens; trained in {facts['train_seconds']:.0f} s, "
        f"scored in {facts['score_seconds']:.0f} s\n"
        f"  mean entropy before, at and after the deciding token: "
        f"{', '.join(f'{value:.3f}' for value in facts['entropy_nats'].values())} nats\n"
        f"  the mark reads it most with head {head['head']} of layer {head['layer']} (attention "
        f"{head['attention']:.2f}, probed: {'yes' if head['probed'] else 'no'}; in the global group of "
        f"{head['in_global']:.0%} of the completions, in the local group of {head['in_local']:.0%})"
    )


if __name__ == "__main__":
    main()
