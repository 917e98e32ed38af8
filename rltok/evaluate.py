"""Held-out accuracy of a policy: generate in batches, score with the recipe's reward functions.

Greedy or sampled; the random state of the caller and the model's mode are as before afterwards, so that a run that
evaluates before training trains exactly like one that does not. Decoding methods and steering vectors act only if
they are given: those of a recipe's rollouts are not.
"""

from __future__ import annotations

import asyncio
import inspect
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from rltok.entropy import EntropyStats
from rltok.sampling import (
    DecodingContext,
    DecodingModule,
    RolloutProcessor,
    SampledLogps,
    make_processors,
    sampling_control,
)

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
    autocast: torch.dtype | None = None,
    chat_template_kwargs: Mapping[str, Any] | None = None,
    on_batch: Callable[[int], None] | None = None,
    decoding: Sequence[DecodingModule] = (),
    steering: SteeringConfig | None = None,
    entropy_stats: EntropyStats | None = None,
) -> Evaluation:
    """Mean rewards of a policy's completions.

    Args:
        dataset: rows with `prompt` (text or a conversation); the other columns go to the reward functions.
        temperature: 0 decodes greedily.
        num_samples: completions per row.
        seed: of the sampling; with `temperature=0` it changes nothing.
        autocast: compute in this dtype; None computes in the weights' dtype.
        on_batch: called after every batch with the number of completions it made.
        decoding: methods that act on the logits; none is plain `generate`, bit for bit.
        steering: vectors that are added to hidden states while completions are made.
        entropy_stats: for adaptive temperature, which does nothing to greedy decoding (`rltok.sampler_stats`).

    Raises:
        ValueError: the data set is empty, the tokenizer lacks what a decoding method names, or statistics are missing.
    """
    rows = [dict(row) for row in dataset for _ in range(num_samples)]
    if not rows:
        raise ValueError("there is no held-out row to evaluate; set data.heldout_size >= 1 or evaluation.before=false")
    context = decoding_context(decoding, tokenizer, temperature, entropy_stats, end_ids(model, tokenizer))
    prompts = [tokenize_prompt(tokenizer, row["prompt"], chat_template_kwargs or {}) for row in rows]
    ids: list[list[int]] = [[] for _ in rows]
    order = sorted(range(len(rows)), key=lambda i: len(prompts[i]), reverse=True)
    with isolated_rng(seed), inference(model, steering, autocast):
        for start in range(0, len(order), batch_size):
            chosen = order[start : start + batch_size]
            outputs = generate_batch(
                model,
                tokenizer,
                [prompts[i] for i in chosen],
                max_new_tokens,
                temperature,
                top_p,
                processors=make_processors(decoding, context),
            )
            for i, output in zip(chosen, outputs, strict=True):
                ids[i] = output
            if on_batch is not None:
                on_batch(len(chosen))
        scores = score(rows, tokenizer, ids, rewards)
    return _collect(rows, tokenizer, ids, scores, num_samples, set(end_ids(model, tokenizer)))


def decoding_context(
    decoding: Sequence[DecodingModule],
    tokenizer: PreTrainedTokenizerBase,
    temperature: float,
    entropy_stats: EntropyStats | None = None,
    eos_ids: Sequence[int] | None = None,
) -> DecodingContext:
    """What the processors of a `generate_batch` call are made from; greedy decoding counts as temperature 1.

    `eos_ids` are all tokens that end a completion (`end_ids`); None: the tokenizer's.

    Raises:
        ValueError: a method needs statistics of the entropy, and there are none.
    """
    if temperature > 0 and entropy_stats is None and needs_entropy_stats(decoding):
        raise ValueError("the temperature adapts to statistics of the entropy: give entropy_stats (calibrate_entropy)")
    ends = None if eos_ids is None else tuple(eos_ids)
    return DecodingContext(temperature or 1.0, entropy_stats if temperature > 0 else None, tokenizer, ends)


def needs_entropy_stats(decoding: Sequence[DecodingModule]) -> bool:
    """True if an active method reads statistics of the entropy."""
    return any("entropy_stats" in module.needs for module in decoding if not module.is_neutral)


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


@contextmanager
def isolated_rng(seed: int) -> Iterator[None]:
    """Seed Python, numpy and torch inside, restore their states afterwards."""
    python_state, numpy_state = random.getstate(), np.random.get_state()
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    with torch.random.fork_rng(devices=devices):
        random.seed(seed)
        np.random.seed(seed % 2**32)
        torch.manual_seed(seed)
        try:
            yield
        finally:
            random.setstate(python_state)
            np.random.set_state(numpy_state)


async def _wait(values: Any) -> Any:
    return await values


@contextmanager
def inference(
    model: PreTrainedModel, steering: SteeringConfig | None = None, autocast: torch.dtype | None = None
) -> Iterator[None]:
    """Evaluation mode without gradients, steered if that is asked for; the model is as before afterwards."""
    with _evaluating(model), _autocast(model, autocast), torch.no_grad(), _steered(model, steering):
        yield


def _steered(model: PreTrainedModel, steering: SteeringConfig | None) -> AbstractContextManager[Any]:
    return nullcontext() if steering is None or steering.is_neutral else steering.attach(model)


@contextmanager
def _evaluating(model: PreTrainedModel) -> Iterator[None]:
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


def _autocast(model: PreTrainedModel, dtype: torch.dtype | None) -> Any:
    return nullcontext() if dtype is None else torch.autocast(model.device.type, dtype)


def tokenize_prompt(
    tokenizer: PreTrainedTokenizerBase, prompt: Any, chat_template_kwargs: Mapping[str, Any]
) -> list[int]:
    """Ids of a prompt: text, or a conversation by the chat template with the assistant's turn opened."""
    if isinstance(prompt, str):
        return tokenizer(prompt)["input_ids"]
    text = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, tokenize=False, **chat_template_kwargs)
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def generate_batch(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[list[int]],
    max_new_tokens: int,
    temperature: float,
    top_p: float,
    top_k: int = 0,
    processors: Sequence[RolloutProcessor] = (),
    recorder: SampledLogps | None = None,
) -> list[list[int]]:
    """Completion ids, each up to and with its end-of-sequence token.

    Args:
        temperature: 0 decodes greedily.
        top_k: 0 is no limit.
        processors: act on the logits before the temperature; none is plain `generate`.
        recorder: to be read with `finish` afterwards.
    """
    from transformers import GenerationConfig

    padded = tokenizer.pad({"input_ids": prompts}, padding=True, padding_side="left", return_tensors="pt")
    inputs = {key: padded[key].to(model.device) for key in ("input_ids", "attention_mask")}
    sampling = temperature > 0
    # every field that a model's own generation_config may carry is set, so that none of them slips in
    config = GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=sampling,
        temperature=temperature if sampling else 1.0,
        top_p=top_p if sampling else 1.0,
        top_k=top_k if sampling else 50,
        repetition_penalty=1.0,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=end_ids(model, tokenizer),
        use_cache=True,
    )
    controls = bool(processors) or recorder is not None
    with sampling_control(model, processors, recorder) if controls else nullcontext():
        output = model.generate(**inputs, generation_config=config)  # (batch, prompt + completion)
    completions = output[:, inputs["input_ids"].size(1) :].tolist()
    ends = set(config.eos_token_id)
    return [ids[: next((i for i, token in enumerate(ids) if token in ends), len(ids)) + 1] for ids in completions]


def end_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Every token that ends a completion, as the trainer counts them: the tokenizer's and the model's own."""
    declared = model.generation_config.eos_token_id
    own = [declared] if isinstance(declared, int) else list(declared or ())
    return list(dict.fromkeys([tokenizer.eos_token_id, *own]))


def _collect(
    rows: Sequence[Mapping[str, Any]],
    tokenizer: PreTrainedTokenizerBase,
    ids: Sequence[Sequence[int]],
    scores: Mapping[str, Sequence[float]],
    num_samples: int,
    ends: set[int],
) -> Evaluation:
    texts = tokenizer.batch_decode(list(ids), skip_special_tokens=True)
    found = []
    for i, row in enumerate(rows):
        record = {
            "row": i // num_samples,
            "sample": i % num_samples,
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
