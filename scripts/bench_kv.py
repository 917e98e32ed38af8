"""What a cache policy saves: decode steps, bytes, prefill and whole generations, against dense caches, interleaved.

    python scripts/bench_kv.py [--length 4096] [--repetitions 5] [--threads 1] [--json figures.json] [--check]
    python scripts/bench_kv.py --length 16384 --arms streaming_llm,h2o_window --check
    python scripts/bench_kv.py --shape 0.5b --device cuda [--length 16384]

    dense             transformers' DynamicCache: what a user has without this library; the base of all ratios
    dense_block       the dense cache of the engine `fast`, written in place
    streaming_llm     4 sinks and a window           h2o_window   heavy hitters by the last 32 queries before a cut
    h2o_all           heavy hitters by all queries   snap_kv      votes of the last 32 queries, pooled
    compress_kv       votes of all heads             r_kv         importance less redundancy
    razor_attention   every eighth head keeps all, the others sinks, a window and one token for the rest

All arms decode greedily with one random model of Qwen2's architecture and one batch of left-padded rows: the first has
`--length` tokens, the last a tenth less. A block is `--intervals` times `--interval` decode steps, so that every cut is
paid for, once per interval. A round is one block of every arm, then the same in reverse, so that a drift that is linear
in time cancels; the order turns from round to round. A ratio is dense by arm within a round; reported are medians with
a percentile bootstrap interval. A dense cache is put back to `--length` columns before every block.

The caches begin with random keys and values instead of a computed prompt, the same in both dense caches, the newest
`--budget` of them under a policy: a step takes the same time whatever they say, and no prompt of 16,384 tokens need be
computed. Left out, then: the prompt. It is measured apart on `--prefill` tokens, real ones, with the first cut.

Memory is what a cache itself holds: buffers with their free columns, positions, scores and watched queries. It is read
after as many tokens on top of `--length` as an arm generated in this run, the same number for all, and a policy's cache
is then as large as it gets. Both ratios are given, to the dense cache then and to it at `--length`. Bytes of a prefill
are the largest moment of the cache's own buffers; on a GPU the allocator's peak is given as well.

Whole generations, prompt included, run through transformers' `generate`, with `attach` where there is a policy, and
through the library's loop, with `PolicyCache` in place of its own: ratios are to `dense` and to `dense_block`.

`--check` exits with 1 where a bound of LIMITS is missed; they hold for the shape `small` on a CPU, batch 4, budget 512,
interval 64, at 4,096 and 16,384 tokens. `--shape tiny` is there to see the script run. On a CPU, memory that is freed
stays in the process (glibc), which spares `dense` the page faults of its copies.
"""

from __future__ import annotations

import argparse
import gc
import os
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
import transformers
from measuring import (
    CLOCKS,
    at_least_one,
    chosen_arms,
    conclude,
    interval,
    keep_freed_memory,
    machine,
    markdown_table,
    mebibytes,
    now,
    turned,
    with_interval,
)
from torch import Tensor
from transformers import Qwen2Config, Qwen2ForCausalLM
from transformers.cache_utils import DynamicCache

from rltok.fast import LoopSettings, generate_rows
from rltok.fast.cache import BlockCache
from rltok.kv import H2O, RKV, CompressKV, KVPolicy, PolicyCache, SnapKV, StreamingLLM, attach, watched_attention
from rltok.kv.razor_attention import RazorAttention

BASE, BLOCK_BASE = "dense", "dense_block"
WARM_UP = 2
"""steps of every arm before the first block"""
FIRST = 2
"""smallest id of a prompt"""


# ---- what is compared


@dataclass(frozen=True)
class Shape:
    """A model of Qwen2's architecture with tied embeddings."""

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_size: int
    intermediate: int
    vocabulary: int


SHAPES = {
    "tiny": Shape(2, 32, 4, 2, 8, 64, 64),
    "small": Shape(4, 256, 8, 4, 64, 1024, 2048),
    "0.5b": Shape(24, 896, 14, 2, 64, 4864, 151936),
}


@dataclass(frozen=True)
class Case:
    """Everything that all arms share."""

    shape: str = "small"
    device: str = "cpu"
    batch: int = 4
    length: int = 4096
    """columns at the start"""
    budget: int = 512
    interval: int = 64

    @property
    def dtype(self) -> torch.dtype:
        """Of weights and caches."""
        return torch.bfloat16 if self.device == "cuda" else torch.float32

    def lengths(self, longest: int) -> list[int]:
        """Tokens of the rows, from `longest` down to nine tenths of it."""
        return [longest - row * longest // (10 * max(1, self.batch - 1)) for row in range(self.batch)]


def policies(case: Case) -> dict[str, KVPolicy]:
    """The policy of every arm that has one."""
    budget, interval = case.budget, case.interval
    half = budget // 2
    return {
        "streaming_llm": StreamingLLM(sink=4, recent=budget - 4, interval=interval),
        "h2o_window": H2O(heavy=budget - half, recent=half, observe="window", interval=interval),
        "h2o_all": H2O(heavy=budget - half, recent=half, observe="all", interval=interval),
        "snap_kv": SnapKV(budget=budget, interval=interval),
        "r_kv": RKV(budget=budget, interval=interval),
        "compress_kv": CompressKV(budgets=(budget,) * SHAPES[case.shape].layers, interval=interval),
        "razor_attention": RazorAttention(retrieval_heads(case), floor=budget - 4, ratio=None, interval=interval),
    }


def retrieval_heads(case: Case) -> dict[int, list[int]]:
    """Every eighth key-value head of the model, by layer."""
    shape = SHAPES[case.shape]
    found: dict[int, list[int]] = {}
    for number in range(0, shape.layers * shape.kv_heads, 8):
        found.setdefault(number // shape.kv_heads, []).append(number % shape.kv_heads)
    return found


ARMS = (BASE, BLOCK_BASE, "streaming_llm", "h2o_window", "h2o_all", "snap_kv", "r_kv", "compress_kv", "razor_attention")


@dataclass(frozen=True)
class Limit:
    """What an arm must hold against the dense cache; None: nothing."""

    speed: float | None = None
    """least times the speed of a decode step, median of the ratios"""
    memory: float | None = None
    """most times the bytes of the cache"""


LIMITS: dict[int, dict[str, Limit]] = {
    4096: {"streaming_llm": Limit(speed=6, memory=1 / 7), "h2o_window": Limit(speed=4, memory=1 / 7)},
    16384: {"streaming_llm": Limit(speed=15)},
}
"""by length, for cases that are `Case(length=...)`"""


def limits(case: Case) -> dict[str, Limit]:
    """The bounds of a case by arm; none where the issue names none."""
    return LIMITS.get(case.length, {}) if case == Case(length=case.length) else {}


# ---- model and caches


def build_model(case: Case, longest: int) -> Qwen2ForCausalLM:
    """Random weights, the same at every call, for texts of so many tokens."""
    shape = SHAPES[case.shape]
    config = Qwen2Config(
        num_hidden_layers=shape.layers,
        hidden_size=shape.hidden,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        head_dim=shape.head_size,
        intermediate_size=shape.intermediate,
        vocab_size=shape.vocabulary,
        max_position_embeddings=longest,
        tie_word_embeddings=True,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=None,
        attn_implementation="sdpa",
    )
    torch.manual_seed(0)
    with torch.device(case.device):
        return Qwen2ForCausalLM(config).to(case.dtype).eval()


def padding_mask(lengths: Sequence[int], columns: int, more: int, device: str) -> Tensor:
    """(B, columns + more) 0 left of rows that end in column `columns`, 1 elsewhere."""
    pad = columns - torch.tensor(lengths, device=device)
    return (torch.arange(columns + more, device=device) >= pad[:, None]).long()


def random_states(case: Case, heads: int, tokens: int, generator: torch.Generator) -> Tensor:
    """(heads, tokens, D) normal numbers."""
    size = SHAPES[case.shape].head_size
    return torch.randn(heads, tokens, size, generator=generator, device=case.device, dtype=case.dtype)


def filled_cache(case: Case, config: Any, policy: KVPolicy | None, block: bool) -> Any:
    """A cache as after a prompt of the case's lengths, with random contents."""
    if policy is None and not block:
        return _filled_dynamic(case)
    cache = BlockCache(config) if policy is None else PolicyCache(config, policy=policy)
    lengths = case.lengths(case.length)
    entries = [_random_row(case, policy, row, length) for row, length in enumerate(lengths)]
    cache.reserve(case.batch)
    cache.insert(entries, [1] * case.batch, case.length, lengths)
    return cache


def _random_row(case: Case, policy: KVPolicy | None, row: int, length: int) -> list[tuple[Tensor, ...]]:
    """What a loop's cache takes in for a row, layer by layer."""
    shape, generator = SHAPES[case.shape], torch.Generator(case.device).manual_seed(row)
    entry = []
    for layer in range(shape.layers):
        full = len(policy.full.get(layer, ())) if isinstance(policy, RazorAttention) else 0
        kept = length if policy is None else policy.kept(layer)
        parts = [random_states(case, shape.kv_heads - full, kept, generator) for _ in range(2)]
        if policy is not None:
            number = torch.arange(length - kept, length, dtype=torch.int32, device=case.device)
            parts.append(number.expand(shape.kv_heads - full, -1))
            if policy.accumulates:
                parts.append(torch.rand(shape.kv_heads, kept, generator=generator, device=case.device))
            if policy.watched:
                parts.append(random_states(case, shape.heads, policy.watched, generator))
        if isinstance(policy, RazorAttention):  # tokens of full heads, sums over what the others dropped
            parts += [random_states(case, full, length, generator) for _ in range(2)] if full else []
            parts += [parts[side].float().sum(1) for side in range(2)]
        entry.append(tuple(parts))
    return entry


def _filled_dynamic(case: Case) -> DynamicCache:
    """transformers' cache with the contents of `dense_block`, padding in front."""
    cache = DynamicCache()
    rows = [_random_row(case, None, row, length) for row, length in enumerate(case.lengths(case.length))]
    for layer in range(SHAPES[case.shape].layers):
        keys, values = (torch.stack([_left_padded(row[layer][side], case.length) for row in rows]) for side in range(2))
        cache.update(keys, values, layer)
    return cache


def _left_padded(states: Tensor, columns: int) -> Tensor:
    return torch.nn.functional.pad(states, (0, 0, columns - states.size(1), 0))


def cache_bytes(cache: Any) -> int:
    """Bytes of all that a cache holds now."""
    if isinstance(cache, DynamicCache):
        return sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    return int(cache.size.now)


# ---- decode steps


@dataclass(frozen=True)
class Seconds:
    """Of one block, by both clocks."""

    wall: float
    cpu: float

    def of(self, clock: str) -> float:
        """By one of CLOCKS."""
        return self.wall if clock == "wall" else self.cpu


def timed(device: str, work: Callable[[], Any]) -> Seconds:
    """Seconds of the work, with the device's queue empty before and after."""
    gc.disable()
    try:
        first = now(device)
        work()
        last = now(device)
    finally:
        gc.enable()
    return Seconds(last[0] - first[0], last[1] - first[1])


class Decoder:
    """One arm's cache and batch, ready to decode."""

    def __init__(self, case: Case, model: Any, name: str, steps: int) -> None:
        """`steps`: the most that are decoded in all."""
        self.case, self.model = case, model
        self.policy = policies(case).get(name)
        self.cache = filled_cache(case, model.config, self.policy, block=name == BLOCK_BASE)
        self.steps = 0
        lengths = case.lengths(case.length)
        self.mask = padding_mask(lengths, case.length, steps, case.device)
        self.places = torch.tensor(lengths, device=case.device)[:, None]
        self.ids = torch.full((case.batch, 1), FIRST, device=case.device)

    @property
    def columns(self) -> int:
        """Of the batch so far."""
        return int(self.cache.get_seq_length())

    def block(self, steps: int) -> Seconds:
        """Seconds of so many decode steps; a dense cache begins them with the case's length."""
        if self.policy is None and self.columns > self.case.length:
            if isinstance(self.cache, DynamicCache):
                self.cache.crop(self.case.length - self.columns)
            else:
                self.cache.trim(self.case.length)
        with torch.no_grad(), nullcontext() if self.policy is None else watched_attention(self.model):
            return timed(self.case.device, partial(self._decode, steps))

    def _decode(self, steps: int) -> None:
        for _ in range(steps):
            output = self.model(
                input_ids=self.ids,
                attention_mask=self.mask[:, : self.columns + 1],
                position_ids=self.places + self.steps,
                past_key_values=self.cache,
                use_cache=True,
                logits_to_keep=1,
            )
            self.ids = output.logits[:, -1].argmax(-1, keepdim=True)
            self.steps += 1

    def catch_up(self) -> None:
        """Give a dense cache the columns of every step that was decoded."""
        missing = self.case.length + self.steps - self.columns
        if self.policy is not None or missing <= 0:
            return
        shape = SHAPES[self.case.shape]
        size = (self.case.batch, shape.kv_heads, missing, shape.head_size)
        for layer in range(shape.layers):
            new = torch.zeros(size, device=self.case.device, dtype=self.case.dtype)
            self.cache.update(new, new, layer)


@dataclass
class Rounds:
    """Seconds of the two blocks of an arm, round by round."""

    pairs: list[tuple[Seconds, Seconds]] = field(default_factory=list)

    def totals(self, clock: str) -> list[float]:
        """Of both blocks."""
        return [first.of(clock) + second.of(clock) for first, second in self.pairs]


def measure_steps(
    case: Case, model: Any, names: Sequence[str], repetitions: int, block: int
) -> tuple[dict[str, Rounds], dict[str, dict[str, int]]]:
    """Rounds, and bytes of the cache at the case's length and at the end, by arm."""
    steps = WARM_UP + 2 * repetitions * block
    decoders = {name: Decoder(case, model, name, steps) for name in names}
    held = {name: {"bytes_at_length": cache_bytes(decoder.cache)} for name, decoder in decoders.items()}
    for decoder in decoders.values():
        decoder.block(WARM_UP)
    found = {name: Rounds() for name in names}
    for repetition in range(repetitions):
        order = turned(names, repetition)
        gc.collect()
        seconds = [decoders[name].block(block) for name in (*order, *reversed(order))]
        for i, name in enumerate(order):
            found[name].pairs.append((seconds[i], seconds[-1 - i]))
    for name, decoder in decoders.items():
        decoder.catch_up()
        held[name] |= {"bytes": cache_bytes(decoder.cache), "tokens": decoder.steps}
    return found, held


# ---- prefill and whole generations


@dataclass(frozen=True)
class Prompts:
    """Left-padded rows of random ids."""

    rows: list[list[int]]
    device: str

    @property
    def width(self) -> int:
        """Columns."""
        return max(map(len, self.rows))

    def padded(self) -> dict[str, Tensor]:
        """`input_ids` and `attention_mask`, (B, width)."""
        ids = [[0] * (self.width - len(row)) + row for row in self.rows]
        lengths = [len(row) for row in self.rows]
        mask = padding_mask(lengths, self.width, 0, self.device)
        return {"input_ids": torch.tensor(ids, device=self.device), "attention_mask": mask}


def random_prompts(case: Case, longest: int) -> Prompts:
    """Rows of the case's proportions."""
    generator, high = torch.Generator().manual_seed(7), SHAPES[case.shape].vocabulary
    rows = [torch.randint(FIRST, high, (n,), generator=generator).tolist() for n in case.lengths(longest)]
    return Prompts(rows, case.device)


def prefill(case: Case, model: Any, name: str, prompts: Prompts) -> dict[str, Any]:
    """Seconds of a prompt with its first cut, the cache's largest moment, on a GPU the allocator's."""
    policy = policies(case).get(name)
    cache: Any = DynamicCache()
    if policy is not None:
        cache = PolicyCache(model.config, case.batch, policy=policy, in_parts=False)
        cache.begin([prompts.width - len(row) for row in prompts.rows])
    elif name == BLOCK_BASE:
        cache = BlockCache(model.config, case.batch, block=1)
    given = prompts.padded()
    places = (given["attention_mask"].cumsum(1) - 1).clamp(min=0)
    if case.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated() if case.device == "cuda" else 0
    run = partial(model, **given, position_ids=places, past_key_values=cache, use_cache=True, logits_to_keep=1)
    with torch.no_grad(), nullcontext() if policy is None else watched_attention(model):
        seconds = timed(case.device, run)
    peak = cache_bytes(cache) if isinstance(cache, DynamicCache) else cache.take_peak()
    found = {"seconds": seconds, "cache_peak_bytes": max(peak, cache_bytes(cache))}
    if case.device == "cuda":
        found["device_peak_bytes"] = torch.cuda.max_memory_allocated() - before
    return found


def measure_prefill(
    case: Case, model: Any, names: Sequence[str], tokens: int, repetitions: int, clock: str
) -> dict[str, dict[str, Any]]:
    """By arm: seconds, ratios to `dense` of every repetition, and bytes."""
    prompts = random_prompts(case, tokens)
    prefill(case, model, BASE, random_prompts(case, min(tokens, 64)))
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    for repetition in range(repetitions):
        gc.collect()
        for name in turned(names, repetition):
            runs[name].append(prefill(case, model, name, prompts))
    base = [run["seconds"].of(clock) for run in runs[BASE]]
    found = {}
    for name, own in runs.items():
        seconds = [run["seconds"].of(clock) for run in own]
        found[name] = {
            "seconds": statistics.median(seconds),
            "ratio": interval([a / max(b, 1e-12) for a, b in zip(seconds, base, strict=True)]),
            **{key: max(run[key] for run in own) for key in own[0] if key != "seconds"},
        }
    return found


def whole_generation(case: Case, model: Any, name: str, engine: str, prompts: Prompts, new: int) -> dict[str, Any]:
    """Seconds of prompts and `new` tokens through an engine, with the tokens."""
    policy = policies(case).get(name)
    ids: list[list[int]] = []

    def run() -> None:
        if engine == "generate":
            with nullcontext() if policy is None else attach(model, policy):
                output = model.generate(**prompts.padded(), max_new_tokens=new, do_sample=False)
            ids[:] = output[:, prompts.width :].tolist()
            return
        settings = LoopSettings(max_new_tokens=new, end_ids=(), temperature=0.0)
        cache = BlockCache if policy is None else partial(PolicyCache, policy=policy)
        with nullcontext() if policy is None else watched_attention(model):
            ids[:] = generate_rows(model, prompts.rows, None, settings, record=False, cache=cache).ids

    with torch.no_grad():
        seconds = timed(case.device, run)
    if [len(row) for row in ids] != [new] * case.batch:
        raise RuntimeError(f"{name} through {engine} made rows of {[len(row) for row in ids]} tokens, not {new}")
    return {"seconds": seconds, "ids": ids}


def measure_generation(
    case: Case, model: Any, names: Sequence[str], prompt: int, new: int, repetitions: int, clock: str
) -> dict[str, dict[str, Any]]:
    """By arm: seconds per engine, speed against the engine's dense cache, share of rows that agree between engines.

    transformers' engine has `dense` for its dense cache, the loop `dense_block`.
    """
    prompts = random_prompts(case, prompt)
    policy_arms = [name for name in names if name not in (BASE, BLOCK_BASE)]
    engines = {"generate": [BASE, *policy_arms], "loop": [BLOCK_BASE, *policy_arms]}
    bases = {"generate": BASE, "loop": BLOCK_BASE}
    runs: dict[tuple[str, str], list[dict[str, Any]]] = {}
    order = [(engine, name) for engine, own in engines.items() for name in own]
    for engine in engines:  # what transformers builds once
        whole_generation(case, model, bases[engine], engine, random_prompts(case, min(prompt, 64)), 2)
    for repetition in range(repetitions):
        gc.collect()
        for engine, name in turned(order, repetition):
            runs.setdefault((engine, name), []).append(whole_generation(case, model, name, engine, prompts, new))
    found: dict[str, dict[str, Any]] = {}
    for (engine, name), own in runs.items():
        seconds = [run["seconds"].of(clock) for run in own]
        base = [run["seconds"].of(clock) for run in runs[engine, bases[engine]]]
        speed = interval([b / max(a, 1e-12) for a, b in zip(seconds, base, strict=True)])
        found.setdefault(name, {})[engine] = {"seconds": statistics.median(seconds), "speed": speed}
    for name in policy_arms:
        pairs = zip(runs["generate", name][0]["ids"], runs["loop", name][0]["ids"], strict=True)
        found[name]["equal_rows"] = statistics.mean(float(a == b) for a, b in pairs)
    return found


# ---- figures


def figures(
    found: Mapping[str, Rounds], held: Mapping[str, Mapping[str, int]], block: int, clock: str
) -> dict[str, dict[str, Any]]:
    """What is reported of an arm's steps and bytes; ratios are to `dense` and to `dense_block`."""
    dense = held[BASE]
    arms: dict[str, dict[str, Any]] = {}
    for name, rounds in found.items():
        steps = 2 * block
        arms[name] = {
            "milliseconds_per_step": 1000 * statistics.median(rounds.totals(clock)) / steps,
            "milliseconds_by_round": {kind: [1000 * s / steps for s in rounds.totals(kind)] for kind in CLOCKS},
            "speed": interval(speeds(found[BASE], rounds, clock)),
            "speed_to_block": interval(speeds(found[BLOCK_BASE], rounds, clock)),
            "speed_by_clock": {kind: interval(speeds(found[BASE], rounds, kind)) for kind in CLOCKS},
            **held[name],
            "memory_ratio": held[name]["bytes"] / dense["bytes"],
            "memory_ratio_at_length": held[name]["bytes"] / dense["bytes_at_length"],
        }
    return arms


def speeds(base: Rounds, arm: Rounds, clock: str) -> list[float]:
    """How many times as fast as the base, round by round."""
    return [b / max(a, 1e-12) for a, b in zip(arm.totals(clock), base.totals(clock), strict=True)]


def failures(arms: Mapping[str, Mapping[str, Any]], bounds: Mapping[str, Limit]) -> list[str]:
    """Bounds that are missed by the arms that ran."""
    missed = []
    for name, limit in bounds.items():
        record = arms.get(name)
        if record is None:
            continue
        speed, memory = record["speed"]["median"], record["memory_ratio"]
        if limit.speed is not None and not speed >= limit.speed:
            missed.append(f"{name}: a step is {speed:.2f} times as fast as dense, at least {limit.speed:g} wanted")
        if limit.memory is not None and not memory <= limit.memory:
            missed.append(f"{name}: the cache takes 1/{1 / memory:.2f} of dense, at most 1/{1 / limit.memory:g} wanted")
    return missed


def unjudged(arms: Mapping[str, Mapping[str, Any]], bounds: Mapping[str, Limit]) -> list[str]:
    """Bounds of which this run says nothing."""
    if not bounds:
        return ["this case has no bounds; --help names those that have"]
    return [f"{name}: not among the arms" for name in bounds if name not in arms]


def markdown(arms: Mapping[str, Mapping[str, Any]], length: int) -> str:
    """The tables of the documentation: steps and bytes, prefill, whole generations."""
    columns = ("arm", "ms per step", "speed, to dense [95 %]", "to dense_block", "MiB", "of dense")
    rows = [
        (
            name,
            f"{record['milliseconds_per_step']:.2f}",
            with_interval(record["speed"], 2),
            with_interval(record["speed_to_block"], 2),
            mebibytes(record["bytes"]),
            f"1/{1 / record['memory_ratio']:.2f}",
            f"1/{1 / record['memory_ratio_at_length']:.2f}",
        )
        for name, record in arms.items()
    ]
    tables = [markdown_table((*columns, f"of dense at {length}"), rows)]
    columns = ("arm", "prefill, s", "ratio to dense [95 %]", "cache at most, MiB", "device at most, MiB")
    rows = [_prefill_row(name, record["prefill"]) for name, record in arms.items() if "prefill" in record]
    tables += [markdown_table(columns, rows)] if rows else []
    columns = ("arm", "generate, s", "speed [95 %]", "loop, s", "speed [95 %]", "equal rows")
    rows = [_generation_row(name, record["generation"]) for name, record in arms.items() if "generation" in record]
    tables += [markdown_table(columns, rows)] if rows else []
    return "\n\n".join(tables)


def _prefill_row(name: str, own: Mapping[str, Any]) -> list[str]:
    peaks = [mebibytes(own.get(key)) for key in ("cache_peak_bytes", "device_peak_bytes")]
    return [name, f"{own['seconds']:.2f}", with_interval(own["ratio"], 2), *peaks]


def _generation_row(name: str, own: Mapping[str, Any]) -> list[str]:
    cells = [name]
    for engine in ("generate", "loop"):
        part = own.get(engine)
        cells += ["-", "-"] if part is None else [f"{part['seconds']:.2f}", with_interval(part["speed"], 2)]
    return [*cells, f"{own['equal_rows']:.0%}" if "equal_rows" in own else "-"]


# ---- the command


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line, checked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=list(SHAPES), help="default: small, on a GPU 0.5b")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=1, help="on a CPU")
    parser.add_argument("--batch", type=int, default=4, help="rows")
    parser.add_argument("--length", type=int, default=4096, help="cached tokens of the longest row")
    parser.add_argument("--budget", type=int, default=512, help="tokens that a policy keeps")
    parser.add_argument("--interval", type=int, default=64, help="tokens between two cuts")
    parser.add_argument("--intervals", type=int, default=1, help="intervals of a block")
    parser.add_argument("--repetitions", type=int, default=5, help="rounds, each of two blocks per arm")
    parser.add_argument("--arms", help=f"with commas, of {', '.join(ARMS)}; the dense ones are added")
    parser.add_argument("--prefill", type=int, help="tokens of the measured prompt, default 1024 or less; 0: none")
    parser.add_argument("--prompt", type=int, help="tokens before a whole generation, default 1024 or less; 0: none")
    parser.add_argument("--new", type=int, default=128, help="tokens of a whole generation")
    parser.add_argument("--whole-repetitions", type=int, default=2, help="of prefills and whole generations")
    parser.add_argument("--clock", choices=CLOCKS, default="wall", help="seconds of the machine or of this process")
    parser.add_argument("--check", action="store_true", help="exit with 1 where a bound is missed")
    parser.add_argument("--json", type=Path, help="file for all figures")
    options = parser.parse_args(argv)
    options.shape = options.shape or ("0.5b" if options.device == "cuda" else "small")
    sizes = ("threads", "batch", "length", "interval", "intervals", "repetitions", "new", "whole_repetitions")
    at_least_one(parser, options, sizes)
    for name in ("prefill", "prompt"):
        if getattr(options, name) is None:
            setattr(options, name, min(1024, options.length))
        elif getattr(options, name) < 0:
            parser.error(f"--{name} {getattr(options, name)} must be at least 0")
    names = chosen_arms(parser, options.arms, ARMS)
    options.arms = [name for name in ARMS if name in {*names, BASE, BLOCK_BASE}]
    fields = {name: getattr(options, name) for name in ("shape", "device", "batch", "length", "budget", "interval")}
    options.case = Case(**fields)
    shortest = min(options.case.lengths(options.length))
    if options.budget >= shortest:
        parser.error(f"--budget {options.budget} must be below the shortest row's {shortest} tokens; raise --length")
    try:
        policies(options.case)
    except ValueError as error:
        parser.error(f"--budget {options.budget}: {error}")
    return options


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print, write; 1 where `--check` fails."""
    options = arguments(argv)
    case: Case = options.case
    torch.set_num_threads(options.threads)
    if case.device == "cpu":
        keep_freed_memory()
    transformers.utils.logging.set_verbosity_error()
    start = time.perf_counter()
    block = options.intervals * case.interval
    steps = WARM_UP + 2 * options.repetitions * block
    longest = max(case.length + steps, options.prefill, options.prompt + options.new) + 1
    model = build_model(case, longest)
    arms = figures(*measure_steps(case, model, options.arms, options.repetitions, block), block, options.clock)
    again = (options.whole_repetitions, options.clock)
    if options.prefill:
        for name, own in measure_prefill(case, model, options.arms, options.prefill, *again).items():
            arms[name]["prefill"] = own
    if options.prompt:
        for name, own in measure_generation(case, model, options.arms, options.prompt, options.new, *again).items():
            arms[name]["generation"] = own
    return report(options, arms, time.perf_counter() - start)


def report(options: argparse.Namespace, arms: Mapping[str, Mapping[str, Any]], seconds: float) -> int:
    """Print and write the figures; 1 where `--check` fails."""
    case, facts, bounds = options.case, machine(options.device, torch, transformers), limits(options.case)
    lengths = case.lengths(case.length)
    tokens = arms[BASE]["tokens"]
    print(
        f"{case.shape}: {case.batch} rows of {min(lengths)} to {max(lengths)} tokens, budget {case.budget}, interval "
        f"{case.interval}; bytes after {tokens} tokens more; {options.clock} clock; {facts}; {seconds:.0f} s\n"
    )
    print(markdown(arms, case.length))
    missed = failures(arms, bounds) if options.check else []
    without = unjudged(arms, bounds) if options.check else []
    names = ("repetitions", "intervals", "prefill", "prompt", "new", "whole_repetitions", "clock")
    return conclude(options, facts, arms, names, missed, without)


if __name__ == "__main__":
    sys.exit(main())
