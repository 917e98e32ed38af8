"""Held-out accuracy of a policy: complete the prompts, score with the recipe's reward functions.

Greedy or sampled; the random state of the caller and the model's mode are as before afterwards, so that a run that
evaluates before training trains exactly like one that does not. Decoding methods, steering
vectors, cache policies and quantised weights act only if they are given: those of a recipe's rollouts are not.
"""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from rltok.complete import (
    CompletionSettings,
    Engine,
    OnRows,
    complete,
    completed_ids,
    decoding_context,
    end_ids,
    isolated_rng,
    named_processors,
)
from rltok.entropy import EntropyStats
from rltok.kv import KVPolicy
from rltok.quant import RolloutQuantSpec
from rltok.sampling import DecodingModule

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from rltok.rewards import RewardSet
    from rltok.steering import SteeringConfig


@dataclass(frozen=True)
class Evaluation:
    """What `evaluate` found."""

    means: dict[str, float]
    """name of the reward function -> mean over all completions; also `length`, in tokens, and `ended`, a fraction"""
    rows: list[dict[str, Any]]
    """one per completion, in the order of the data set: `row`, `prompt`, `completion`, `length`, `ended`, rewards"""


def evaluate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    dataset: Sequence[Mapping[str, Any]],
    rewards: RewardSet,
    *,
    max_new_tokens: int,
    batch_size: int,
    temperature: float = 0.0,
    top_p: float = 1.0,
    num_samples: int = 1,
    seed: int = 0,
    engine: Engine = "fast",
    row_ids: Sequence[int] | None = None,
    autocast: torch.dtype | None = None,
    chat_template_kwargs: Mapping[str, Any] | None = None,
    on_rows: OnRows | None = None,
    decoding: Sequence[DecodingModule] = (),
    steering: SteeringConfig | None = None,
    kv: KVPolicy | None = None,
    quant: RolloutQuantSpec | None = None,
    entropy_stats: EntropyStats | None = None,
) -> Evaluation:
    """Mean rewards of a policy's completions.

    With the engine `fast` a sampled completion depends on `seed`, its row's number and its own number alone: other
    batch sizes, and shares of the rows that are evaluated apart, give the same ones.

    Args:
        dataset: rows with `prompt` (text or a conversation); the other columns go to the reward functions.
        temperature: 0 decodes greedily.
        num_samples: completions per row.
        seed: of the sampling; with `temperature=0` it changes nothing.
        engine: `fast` or `transformers` (`rltok.complete`).
        row_ids: number of every row in the whole data set, of which these may be a share; None counts from 0.
        autocast: compute in this dtype; None computes in the weights' dtype.
        on_rows: as completions end, with their number and the tokens sampled since the last call.
        decoding: methods that act on the logits; none is plain `generate`.
        steering: vectors that are added to hidden states while completions are made.
        kv: what the cache keeps while completions are made; None: every token.
        quant: completions are those of a copy with weights quantised so; None or `bits=16`: of the model itself.
        entropy_stats: for adaptive temperature, which does nothing to greedy decoding (`rltok.sampler_stats`).

    Raises:
        ConfigError: a model that the engine, the cache policy or the quantiser does not serve.
        ValueError: the data set is empty, the tokenizer lacks what a decoding method names, or statistics are missing.
    """
    if not dataset:
        raise ValueError("there is no held-out row to evaluate; set data.heldout_size >= 1 or evaluation.before=false")
    numbers = range(len(dataset)) if row_ids is None else row_ids
    if len(numbers) != len(dataset):
        raise ValueError(f"{len(numbers)} row_ids for {len(dataset)} rows: pass one number for each")
    places = [(int(number), sample) for number in numbers for sample in range(num_samples)]
    rows = [dict(row) for row in dataset for _ in range(num_samples)]
    context = decoding_context(decoding, tokenizer, temperature, entropy_stats, end_ids(model, tokenizer))
    parts = complete(
        model,
        tokenizer,
        [tokenize_prompt(tokenizer, row["prompt"], chat_template_kwargs or {}) for row in rows],
        CompletionSettings(max_new_tokens, temperature, top_p=top_p, seed=seed, batch_size=batch_size, engine=engine),
        places=places,
        processors=partial(named_processors, decoding, context),
        steering=steering,
        kv=kv,
        quant=quant,
        autocast=autocast,
        on_rows=on_rows,
    )
    ids = completed_ids(parts)
    with isolated_rng(seed), torch.no_grad():
        scores = score(rows, tokenizer, ids, rewards)
    return _collect(rows, places, tokenizer, ids, scores, set(end_ids(model, tokenizer)))


def score(
    rows: Sequence[Mapping[str, Any]],
    tokenizer: PreTrainedTokenizerBase,
    ids: Sequence[Sequence[int]],
    rewards: RewardSet,
) -> dict[str, list[float]]:
    """Name of the reward function -> reward of every completion, called as the trainer calls them."""
    from transformers import TrainerState

    texts = tokenizer.batch_decode(list(ids), skip_special_tokens=True)
    conversational = isinstance(rows[0]["prompt"], list)
    completions = [[{"role": "assistant", "content": t}] for t in texts] if conversational else texts
    columns = {key: [row.get(key) for row in rows] for key in rows[0] if key != "prompt"}
    scores = {}
    for name, function in zip(rewards.names, rewards.functions, strict=True):
        values = function(
            prompts=[row["prompt"] for row in rows],
            completions=completions,
            completion_ids=[list(i) for i in ids],
            trainer_state=TrainerState(),
            log_extra=lambda *args, **kwargs: None,
            log_metric=lambda *args, **kwargs: None,
            **columns,
        )
        if inspect.isawaitable(values):
            values = asyncio.run(_wait(values))
        scores[name] = [float("nan") if value is None else float(value) for value in values]
    return scores


def join_evaluations(parts: Sequence[Evaluation]) -> Evaluation:
    """The evaluations of several ranks as one; row numbers must already be those of the whole data set."""
    rows = sorted((row for part in parts for row in part.rows), key=lambda row: (row["row"], row["sample"]))
    return Evaluation(_means(rows, [key for part in parts for key in part.means]), rows)


async def _wait(values: Any) -> Any:
    return await values


def tokenize_prompt(
    tokenizer: PreTrainedTokenizerBase, prompt: Any, chat_template_kwargs: Mapping[str, Any]
) -> list[int]:
    """Ids of a prompt: text, or a conversation by the chat template with the assistant's turn opened."""
    if isinstance(prompt, str):
        return tokenizer(prompt)["input_ids"]
    text = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, tokenize=False, **chat_template_kwargs)
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def _collect(
    rows: Sequence[Mapping[str, Any]],
    places: Sequence[tuple[int, int]],
    tokenizer: PreTrainedTokenizerBase,
    ids: Sequence[Sequence[int]],
    scores: Mapping[str, Sequence[float]],
    ends: set[int],
) -> Evaluation:
    texts = tokenizer.batch_decode(list(ids), skip_special_tokens=True)
    found = []
    for i, row in enumerate(rows):
        record = {
            "row": places[i][0],
            "sample": places[i][1],
            "prompt": row["prompt"],
            "completion": texts[i],
            "length": len(ids[i]),
            "ended": bool(ids[i]) and ids[i][-1] in ends,
        }
        if "answer" in row:
            record["answer"] = row["answer"]
        found.append(record | {name: values[i] for name, values in scores.items()})
    return Evaluation(_means(found, list(scores)), found)


def _means(rows: Sequence[Mapping[str, Any]], names: Sequence[str]) -> dict[str, float]:
    keys = dict.fromkeys([*names, "length", "ended"])
    return {key: float(np.mean([row[key] for row in rows])) for key in keys}
