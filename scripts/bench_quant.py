"""What a quantised sampler costs and loses: int8, int4, float8 shadows against bf16 and fp32, in one interleaved run.

    python scripts/bench_quant.py [--preset 115m] [--repetitions 3] [--threads 1] [--json figures.json] [--markdown]
    python scripts/bench_quant.py --preset 0.5b --arms aten_int8,aten_int4_g128,held_int8 --repetitions 2
    python scripts/bench_quant.py --device cuda [--preset 0.5b]
    python scripts/bench_quant.py --read figures.json --markdown

    fp32, bf16                  the policy itself: the baselines; the other arms sample from a shadow of one of them
    torch_int8                  one scale per row, dequantised for every multiplication
    torch_int4_g32, _g128       two codes a byte, one scale per group of columns, dequantised for every multiplication
    held_int8                   int8 with the dequantised weights held beside the codes (hold_dequantized)
    aten_int8, aten_int4_g32,   torch's own CPU kernels
    aten_int4_g128
    torchao_int8                int8 multiplied as torchao does (extra rltok[quant])
    fp8                         float8_e4m3fn, dequantised for every multiplication
    fp8_scaled_mm               float8 times float8, on GPUs of capability 8.9 and above
    ..._fp32                    the same shadow of the fp32 policy; the others are of the bf16 policy

An arm that cannot run on this machine or shape is listed with its reason. One that is not refused but fails is listed
with its error, and the script exits with 1.

Measured, all arms in turns:

    decode      steps of the engine `fast` at every batch of `--batches`, sampling at temperature 1, log-probabilities
                recorded; the prompt is not in it. A block is as many steps as fill `--block` seconds, 1 to 64
    prefill     one forward pass of 4 rows, the head of the last token only
    refresh     `sync` when all weights have moved, when those of `--few` decoder layers have, when none has (the
                checksum alone). The writes themselves and what merging LoRA would add are not in it
    bytes       of the shadow, and of the weights that it stands for. It is held on top of the policy
    errors      on text sampled by the arm: relative Frobenius error of the quantised weights, mean |logit difference|,
                KL(policy, shadow) per token, share of equal largest logits, and of the sampled tokens what the
                correction sees (k1, k3, effective sample size, share above ratio 2)

A round of decoding or prefill is one block of every arm, then the same in reverse, so that a drift that is linear in
time cancels; the order turns from round to round. Ratios are formed within a round; reported are medians with a
percentile bootstrap interval. An arm whose first round of something takes more than `--patience` seconds sits out the
later ones, and its ratio has no interval. `pays after`: tokens that a rollout must sample at a batch until the time
saved makes up for one full refresh, against the arm's own policy; never where the interval of its speed begins at or
below that policy's.

Errors of a shadow are against its own policy, those of bf16 against fp32; `bf16, itself` is the floor that rounding and
kernels of other batch shapes leave between sampler and scorer of the same weights. Weights are random, as transformers
initialises them, and their errors are not those of trained weights: all are measured on the embedded tiny reasoner too.

The head and the embeddings are never quantised, so their share of the weights bounds what can be gained. `115m` has the
share that Qwen2.5-0.5B has (27 %), by a vocabulary of 40,960. `--vocab` below 151,936 with `0.5b` flatters the shadows.
Not measured: a drop in reward. On a CPU the weights should exceed its last cache; the tables name both.

The run calls itself disturbed where the load average was 0.7 or more at its start or, with one thread, less than 95 %
of the measured wall time was this process's. `--quick` is there to see the script run.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import json
import math
import os
import re
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
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
    command_line,
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
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen2Config

from rltok.correction import CorrectionConfig, rollout_weights
from rltok.data import DataConfig, load_data
from rltok.fast import LoopProgress, LoopSettings, generate_rows, row_key
from rltok.quant import QuantizedShadow, RolloutQuantSpec
from rltok.tiny import CHAIN_SUM_PROMPT, tiny_reasoner_path

BASES = {"fp32": torch.float32, "bf16": torch.bfloat16}
FIRST = 2
"""smallest id of a random prompt"""
PREFILL_ROWS, SCORED_ROWS = 4, 4
MOST_STEPS = 64
WARM_UP = 8
"""tokens of a row"""
RANDOM_NEW = 16
"""most tokens of a completion of random weights, whose errors say little"""
CORRECTION = CorrectionConfig(mode="truncate", clip_max=2.0)
BUSY_LOAD, LEAST_SHARE = 0.7, 0.95


# ---- what is compared


@dataclass(frozen=True)
class Shape:
    """A model of Qwen2's architecture with tied embeddings."""

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    intermediate: int
    vocabulary: int


PRESETS = {
    "tiny": Shape(2, 128, 4, 2, 256, 512),
    "115m": Shape(10, 768, 12, 4, 2944, 40960),
    "0.5b": Shape(24, 896, 14, 2, 4864, 151936),
}


@dataclass(frozen=True)
class Case:
    """Everything that all arms share."""

    shape: Shape
    device: str = "cpu"
    batches: tuple[int, ...] = (1, 8, 64)
    prompt: int = 16
    """tokens before a decode step"""
    prefill: int = 128
    """tokens of the prefill, of 4 rows together"""
    few: int = 1
    """decoder layers that move in the smaller refresh"""


@dataclass(frozen=True)
class Arm:
    """A policy, or the shadow of one."""

    policy: str
    spec: RolloutQuantSpec | None = None
    """None: the policy itself"""


def _arms() -> dict[str, Arm]:
    specs = {
        "torch_int8": RolloutQuantSpec(bits=8),
        "torch_int4_g32": RolloutQuantSpec(bits=4, group_size=32),
        "torch_int4_g128": RolloutQuantSpec(bits=4, group_size=128),
        "held_int8": RolloutQuantSpec(bits=8, hold_dequantized=True),
        "aten_int8": RolloutQuantSpec(bits=8, backend="aten_int8"),
        "aten_int4_g32": RolloutQuantSpec(bits=4, backend="aten_int4", group_size=32),
        "aten_int4_g128": RolloutQuantSpec(bits=4, backend="aten_int4", group_size=128),
        "torchao_int8": RolloutQuantSpec(bits=8, backend="torchao_int8"),
        "fp8": RolloutQuantSpec(bits=8, backend="fp8"),
        "fp8_scaled_mm": RolloutQuantSpec(bits=8, backend="fp8_scaled_mm"),
    }
    of_fp32 = ("torch_int8", "aten_int8", "aten_int4_g128")
    return (
        {name: Arm(name) for name in BASES}
        | {name: Arm("bf16", spec) for name, spec in specs.items()}
        | {f"{name}_fp32": Arm("fp32", specs[name]) for name in of_fp32}
    )


ARMS = _arms()


# ---- models and arms


def build_policies(shape: Shape, positions: int, device: str) -> dict[str, Any]:
    """The same random weights in both precisions, the same at every call."""
    config = Qwen2Config(
        num_hidden_layers=shape.layers,
        hidden_size=shape.hidden,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        intermediate_size=shape.intermediate,
        vocab_size=shape.vocabulary,
        max_position_embeddings=positions,
        tie_word_embeddings=True,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=None,
    )
    found = {}
    torch.manual_seed(0)
    for name, dtype in BASES.items():  # a cast of the whole model would round its rotary frequencies too
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="sdpa")
        if found:
            model.load_state_dict(found["fp32"].state_dict())
        found[name] = model.eval()
    return {name: model.to(device) for name, model in found.items()}


def reasoner_policies(device: str) -> dict[str, Any]:
    """The embedded tiny reasoner in both precisions."""
    load = partial(AutoModelForCausalLM.from_pretrained, tiny_reasoner_path())
    return {name: load(dtype=dtype).eval().to(device) for name, dtype in BASES.items()}


def decoder_linears(model: Any) -> list[str]:
    """Names of the linear layers that a shadow quantises."""
    head = model.get_output_embeddings()
    return [name for name, part in model.named_modules() if isinstance(part, nn.Linear) and part is not head]


def counted(model: Any) -> dict[str, int]:
    """Parameters: all, those that are quantised, those of the head."""
    linears = sum(model.get_submodule(name).weight.numel() for name in decoder_linears(model))
    return {
        "all": sum(parameter.numel() for parameter in model.parameters()),
        "quantised": linears,
        "head": model.get_output_embeddings().weight.numel(),
    }


@dataclass
class Sampler:
    """An arm that runs."""

    policy: Any
    module: Any
    """what samples"""
    shadow: QuantizedShadow | None = None


@torch.no_grad()
def make_sampler(arm: Arm, policies: Mapping[str, Any], device: str) -> Sampler:
    """The arm, tried on one token.

    Raises:
        ValueError: the library refuses the arm on this machine or shape.
    """
    policy = policies[arm.policy]
    shadow = None if arm.spec is None else QuantizedShadow(policy, arm.spec)
    sampler = Sampler(policy, policy if shadow is None else shadow.module, shadow)
    sampler.module(input_ids=torch.full((1, 2), FIRST, device=device), use_cache=False)
    return sampler


def make_samplers(names: Sequence[str], policies: Mapping[str, Any], device: str) -> tuple[dict, dict, list[str]]:
    """Arms that run, records of those that do not, and what failed without being refused."""
    running: dict[str, Sampler] = {}
    others: dict[str, dict[str, Any]] = {}
    failed = []
    for name in names:
        try:
            running[name] = make_sampler(ARMS[name], policies, device)
        except ValueError as error:
            others[name] = {"reason": str(error)}
        except (RuntimeError, NotImplementedError) as error:
            others[name] = {"reason": f"fails: {type(error).__name__}: {error}"}
            failed.append(f"{name} fails: {error}")
    return running, others, failed


def tensor_bytes(sampler: Sampler) -> dict[str, int]:
    """Bytes of the policy, and of a shadow with the weights that it stands for."""
    found = {"policy_bytes": sum(parameter.nbytes for parameter in sampler.policy.parameters())}
    if sampler.shadow is not None:
        facts = sampler.shadow.last
        found |= {"shadow_bytes": facts.nbytes, "replaced_bytes": facts.replaced_nbytes}
    return found


# ---- speed


@dataclass
class Rounds:
    """(wall, CPU) seconds of the two blocks of an arm, round by round."""

    tokens: int
    """of one block"""
    pairs: list[tuple[tuple[float, float], tuple[float, float]]] = field(default_factory=list)

    def per_token(self, clock: str) -> list[float]:
        """Seconds of a token, by round."""
        which = CLOCKS.index(clock)
        return [(first[which] + second[which]) / (2 * self.tokens) for first, second in self.pairs]

    def seconds(self, clock: str) -> float:
        """Of all blocks."""
        return 2 * self.tokens * sum(self.per_token(clock))


class StepClock:
    """Notes the time after the first and the last step of a rollout; the prompt is in the first."""

    def __init__(self, device: str, steps: int) -> None:
        self.device, self.last, self.seen = device, steps, 0
        self.times: list[tuple[float, float]] = []

    def __call__(self, _: LoopProgress) -> None:
        self.seen += 1
        if self.seen in (1, self.last):
            self.times.append(now(self.device))

    @property
    def between(self) -> tuple[float, float]:
        """Wall and CPU seconds."""
        first, last = self.times
        return last[0] - first[0], last[1] - first[1]


def timed(device: str, work: Callable[[], Any]) -> tuple[float, float]:
    """Wall and CPU seconds of the work, with the device's queue empty before and after."""
    gc.disable()
    try:
        first = now(device)
        work()
        last = now(device)
    finally:
        gc.enable()
    return last[0] - first[0], last[1] - first[1]


def random_rows(case: Case, rows: int, length: int) -> list[list[int]]:
    """Different prompts of random ids, the same at every call."""
    generator = torch.Generator().manual_seed(rows)
    return torch.randint(FIRST, case.shape.vocabulary, (rows, length), generator=generator).tolist()


def decode(case: Case, sampler: Sampler, batch: int, steps: int) -> tuple[float, float]:
    """Seconds of so many decode steps of the engine `fast`."""
    clock = StepClock(case.device, steps + 1)
    keys = [row_key(0, 0, row, 0) for row in range(batch)]
    rows = random_rows(case, 1, case.prompt) * batch  # equal prompts are computed once
    gc.disable()
    try:
        generate_rows(sampler.module, rows, keys, LoopSettings(max_new_tokens=steps + 1), on_progress=clock)
    finally:
        gc.enable()
    return clock.between


def steps_of(seconds: float, block: float) -> int:
    """Steps of a block, from the seconds of one."""
    return max(1, min(MOST_STEPS, math.ceil(block / max(seconds, 1e-9))))


@torch.no_grad()
def prefill(case: Case, sampler: Sampler, length: int) -> tuple[float, float]:
    """Seconds of a forward pass of prompts of this length, with the head of their last tokens."""
    rows = random_rows(case, PREFILL_ROWS, length)
    ids = torch.tensor(rows, device=case.device)
    return timed(case.device, partial(sampler.module, input_ids=ids, use_cache=False, logits_to_keep=1))


def measure_turns(
    blocks: Mapping[str, Callable[[], tuple[float, float]]],
    tokens: Mapping[str, int],
    repetitions: int,
    patience: float,
) -> dict[str, Rounds]:
    """Rounds of all arms: every block there and back, in an order that turns.

    Args:
        blocks: arm -> one block, which gives its seconds.
        tokens: of one block.
        patience: wall seconds; an arm, not a baseline, that takes longer for its first round has no other.
    """
    found = {name: Rounds(tokens[name]) for name in blocks}
    for repetition in range(repetitions):
        order = [name for name in turned(list(blocks), repetition) if not _too_slow(name, found[name], patience)]
        gc.collect()
        seconds = [blocks[name]() for name in (*order, *reversed(order))]
        for i, name in enumerate(order):
            found[name].pairs.append((seconds[i], seconds[-1 - i]))
    return found


def _too_slow(name: str, own: Rounds, patience: float) -> bool:
    return name not in BASES and bool(own.pairs) and sum(block[0] for block in own.pairs[0]) > patience


def measure_decode(
    case: Case, samplers: Mapping[str, Sampler], batch: int, block: float, repetitions: int, patience: float
) -> dict[str, Rounds]:
    """Decode steps at one batch, after a warm-up that also says how many fill a block."""
    blocks, tokens = {}, {}
    for name, sampler in samplers.items():
        seconds = decode(case, sampler, batch, 1)[0]
        if seconds < block:  # else another warm-up would cost more than it tells
            seconds = decode(case, sampler, batch, 2)[0] / 2
        steps = steps_of(seconds, block)
        blocks[name], tokens[name] = partial(decode, case, sampler, batch, steps), batch * steps
    return measure_turns(blocks, tokens, repetitions, patience)


def measure_prefill(
    case: Case, samplers: Mapping[str, Sampler], repetitions: int, patience: float
) -> dict[str, Rounds]:
    """Forward passes of prompts, after a short warm-up."""
    length = case.prefill // PREFILL_ROWS
    for sampler in samplers.values():
        prefill(case, sampler, min(length, WARM_UP))
    blocks = {name: partial(prefill, case, sampler, length) for name, sampler in samplers.items()}
    return measure_turns(blocks, dict.fromkeys(blocks, PREFILL_ROWS * length), repetitions, patience)


# ---- refresh


@torch.no_grad()
def move(policy: Any, names: Sequence[str]) -> None:
    """Write other values of about the same size into these linear layers."""
    for name in names:
        weight = policy.get_submodule(name).weight
        weight.copy_(0.99 * weight + 0.1 * weight.flip(0))


def refresh_once(case: Case, sampler: Sampler) -> dict[str, tuple[float, float]]:
    """Seconds of `sync` by what has moved since the last one.

    Raises:
        RuntimeError: it refreshed another number of layers than have moved.
    """
    shadow = sampler.shadow
    assert shadow is not None
    names = list(shadow.layers)
    first = case.shape.layers - case.few
    few = [name for name in names if int(re.findall(r"layers\.(\d+)\.", name)[0]) >= first]
    shadow.sync()  # other arms may have moved their common policy
    found = {}
    for kind, moved in (("nothing", []), ("few", few), ("all", names)):
        move(sampler.policy, moved)
        found[kind] = timed(case.device, shadow.sync)
        if shadow.last.refreshed != len(moved):
            raise RuntimeError(f"{len(moved)} layers had moved, and sync refreshed {shadow.last.refreshed}")
    return found


def measure_refresh(
    case: Case, samplers: Mapping[str, Sampler], repetitions: int
) -> dict[str, dict[str, list[tuple[float, float]]]]:
    """By shadow and by what has moved: seconds of every round. The policies are others afterwards."""
    shadows = {name: sampler for name, sampler in samplers.items() if sampler.shadow is not None}
    found: dict[str, dict[str, list[tuple[float, float]]]] = {name: {} for name in shadows}
    for repetition in range(repetitions + 1):
        for name in turned(list(shadows), repetition):
            for kind, seconds in refresh_once(case, shadows[name]).items():
                if repetition:  # the first is a warm-up
                    found[name].setdefault(kind, []).append(seconds)
    return found


# ---- errors


@dataclass(frozen=True)
class Text:
    """What errors are measured on."""

    prompts: list[list[int]]
    new: int
    """tokens of a completion at most"""
    ends: tuple[int, ...] = ()


def reasoner_text(prompts: int, new: int) -> Text:
    """Sums of three to five terms, in the tiny reasoner's format."""
    options = {"min_terms": 3, "max_terms": 5, "min_digits": 1, "max_digits": 1}
    task = {"source": "reasoning_gym", "task": "chain_sum", "train_size": prompts, "heldout_size": 1}
    data = load_data(DataConfig(**task, task_options=options, template=CHAIN_SUM_PROMPT), 0)
    tokenizer = AutoTokenizer.from_pretrained(tiny_reasoner_path())
    encode = partial(tokenizer.apply_chat_template, add_generation_prompt=True, tokenize=True, return_dict=False)
    return Text([list(encode(row["prompt"])) for row in data.train], new, (tokenizer.eos_token_id,))


@torch.no_grad()
def weight_error(policy: Any, module: Any) -> float:
    """||w^ - w|| / ||w|| over all quantised weights together."""
    difference = size = 0.0
    for name in decoder_linears(policy):
        weight = policy.get_submodule(name).weight.double()
        difference += float((module.get_submodule(name).weight.double() - weight).square().sum())
        size += float(weight.square().sum())
    return math.sqrt(difference / size)


@torch.no_grad()
def scored(model: Any, rows: Sequence[tuple[list[int], list[int]]]) -> Iterator[tuple[Tensor, Tensor]]:
    """(n, V) logits before, and (n,) ids of, all completion tokens of a few (prompt, completion) rows at a time."""
    device = model.get_input_embeddings().weight.device
    for start in range(0, len(rows), SCORED_ROWS):
        part = rows[start : start + SCORED_ROWS]
        ids = pad_sequence([torch.tensor(prompt + new) for prompt, new in part], batch_first=True).to(device)
        place = torch.arange(1, ids.size(1))
        begins = torch.tensor([len(prompt) for prompt, _ in part])[:, None]
        ends = torch.tensor([len(prompt + new) for prompt, new in part])[:, None]
        kept = ((place >= begins) & (place < ends)).to(device)
        yield model(input_ids=ids, use_cache=False).logits[:, :-1][kept], ids[:, 1:][kept]


def logit_errors(policy: Tensor, shadow: Tensor) -> dict[str, Tensor]:
    """Sums over n tokens, of (n, V) logits: mean |difference| over the vocabulary, KL(policy, shadow), equal maxima."""
    log_p, log_q = policy.double().log_softmax(-1), shadow.double().log_softmax(-1)
    return {
        "logit_difference": (policy.double() - shadow.double()).abs().mean(-1).sum(),
        "kl": (log_p.exp() * (log_p - log_q)).sum(),
        "top1": (policy.argmax(-1) == shadow.argmax(-1)).double().sum(),
    }


def errors(policy: Any, module: Any, text: Text) -> dict[str, float]:
    """Of a sampler against a policy, on text that the sampler draws."""
    keys = [row_key(0, 0, row, 0) for row in range(len(text.prompts))]
    drawn = generate_rows(module, text.prompts, keys, LoopSettings(max_new_tokens=text.new, end_ids=text.ends))
    assert drawn.logps is not None
    rows = list(zip(text.prompts, drawn.ids, strict=True))
    sums: dict[str, float] = {}
    old = []
    for (ours, ids), (theirs, _) in zip(scored(policy, rows), scored(module, rows), strict=True):
        for name, value in logit_errors(ours, theirs).items():
            sums[name] = sums.get(name, 0.0) + float(value)
        old.append(ours.float().log_softmax(-1).gather(1, ids[:, None]).squeeze(1))
    log_old = torch.cat(old)[None].cpu()
    log_mu = torch.tensor([logp for row in drawn.logps for logp in row])[None]
    seen = rollout_weights(log_old, log_mu, torch.ones_like(log_mu), CORRECTION).metrics
    found = {"weight_error": weight_error(policy, module), "tokens": log_mu.numel()}
    found |= {name: total / log_mu.numel() for name, total in sums.items()}
    return found | {name: float(seen[name]) for name in ("k1", "k3", "ess", "truncated", "max_abs_diff")}


def measure_errors(samplers: Mapping[str, Sampler], text: Text) -> dict[str, dict[str, Any]]:
    """By arm; a shadow against its policy, a baseline against fp32, and bf16 against itself too."""
    found: dict[str, dict[str, Any]] = {}
    for name, sampler in samplers.items():
        policy = sampler.policy if sampler.shadow is not None else samplers["fp32"].module
        found[name] = errors(policy, sampler.module, text)
    found["bf16, itself"] = errors(samplers["bf16"].module, samplers["bf16"].module, text)
    return found


# ---- figures


def speed_figures(rounds: Mapping[str, Rounds], clock: str) -> dict[str, dict[str, Any]]:
    """Tokens/s, and how many times as fast as both baselines, round by round."""
    bases = {base: rounds[base].per_token(clock) for base in BASES}
    found = {}
    for name, own in rounds.items():
        seconds = own.per_token(clock)
        found[name] = {
            "tokens_per_second": 1 / statistics.median(seconds),
            "seconds_per_token": {kind: own.per_token(kind) for kind in CLOCKS},
            "tokens_of_block": own.tokens,
            "rounds": len(seconds),
        }
        for base, theirs in bases.items():
            pairs = zip(seconds, theirs, strict=False)  # a slow arm has the first round alone
            found[name][f"to_{base}"] = interval([b / max(a, 1e-12) for a, b in pairs])
    return found


def pays_after(refresh: float, shadow: float, policy: float) -> float | None:
    """Tokens until a refresh is made up for, from seconds of it and of a token; None: never."""
    return None if shadow >= policy else refresh / (policy - shadow)


def add_refresh(
    arms: dict[str, dict[str, Any]], found: Mapping[str, Mapping[str, Sequence[tuple[float, float]]]], clock: str
) -> None:
    """Put the seconds of a refresh, and when it pays, into the arms' records."""
    which = CLOCKS.index(clock)
    for name, kinds in found.items():
        own = {kind: statistics.median(both[which] for both in seconds) for kind, seconds in kinds.items()}
        base = arms[ARMS[name].policy]["decode"]
        arms[name]["refresh"] = own
        arms[name]["pays_after"] = {
            batch: pays_after(own["all"], 1 / record["tokens_per_second"], 1 / base[batch]["tokens_per_second"])
            if faster(record[f"to_{ARMS[name].policy}"])
            else None
            for batch, record in arms[name]["decode"].items()
        }


def faster(ratio: Mapping[str, float | None]) -> bool:
    """Whether the interval of a ratio lies above 1; the median where there is none."""
    least = ratio["median"] if ratio["low"] is None else ratio["low"]
    return least is not None and least > 1


def disturbances(facts: Mapping[str, Any], threads: int) -> list[str]:
    """What says that other work ran beside this."""
    found = []
    if facts["load"] is not None and facts["load"] >= BUSY_LOAD:
        found.append(f"the load average was {facts['load']:.2f} at the start, below {BUSY_LOAD} wanted")
    if threads == 1 and facts["device_kind"] == "cpu" and facts["cpu_share"] < LEAST_SHARE:
        found.append(f"{facts['cpu_share']:.0%} of the measured time was this process's, {LEAST_SHARE:.0%} wanted")
    return found


def last_cache_bytes() -> int | None:
    """Of the processor's largest cache, as Linux tells; a virtual machine may share it with others."""
    sizes = [path.read_text().strip() for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")]
    units = {"K": 2**10, "M": 2**20}
    return max((int(size[:-1]) * units[size[-1]] for size in sizes if size[-1:] in units), default=None)


# ---- tables


def markdown(record: Mapping[str, Any]) -> str:
    """The tables of the documentation: decode, prefill with refresh and bytes, errors, arms that did not run."""
    arms = {name: own for name, own in record["arms"].items() if "reason" not in own}
    batches = [str(batch) for batch in record["case"]["batches"]]
    columns = ["arm"]
    for batch in batches:
        columns += [f"batch {batch}: tokens/s", "to bf16 [95 %]", "to fp32"]
    rows = [[name, *(cell for batch in batches for cell in _speed(own["decode"][batch]))] for name, own in arms.items()]
    tables = [markdown_table(columns, rows)]
    columns = ["arm", "prefill: tokens/s", "to bf16 [95 %]", "to fp32", "refresh all, s", "few", "none"]
    columns += [f"pays after, batch {batch}" for batch in batches] + ["MiB held", "of the weights"]
    tables.append(markdown_table(columns, [_cost_row(name, own, batches) for name, own in arms.items()]))
    for kind, title in (("reasoner", "tiny reasoner"), ("random", "random weights")):
        table = _error_table(arms, kind, title)
        tables += [table] if table else []
    absent = [(name, own["reason"]) for name, own in record["arms"].items() if "reason" in own]
    tables += [markdown_table(("did not run", "reason"), absent)] if absent else []
    return "\n\n".join(tables)


def _speed(own: Mapping[str, Any]) -> list[str]:
    return [f"{own['tokens_per_second']:.1f}", with_interval(own["to_bf16"], 2), f"{own['to_fp32']['median']:.2f}"]


def _cost_row(name: str, own: Mapping[str, Any], batches: Sequence[str]) -> list[str]:
    cells = [name, *_speed(own["prefill"])]
    if "refresh" not in own:
        return [*cells, *["-"] * (5 + len(batches))]
    cells += [f"{own['refresh'][kind]:.3f}" for kind in ("all", "few", "nothing")]
    tokens = [own["pays_after"][batch] for batch in batches]
    cells += ["never" if count is None else f"{count:.0f}" for count in tokens]
    return [*cells, mebibytes(own["shadow_bytes"]), f"{own['shadow_bytes'] / own['replaced_bytes']:.2f}"]


def _error_table(arms: Mapping[str, Mapping[str, Any]], kind: str, title: str) -> str | None:
    rows = []
    for name, own in arms.items():
        for label, key in ((name, "errors"), (f"{name}, itself", "floor")):
            if kind in own.get(key, {}):
                rows.append(_error_row(label, own[key][kind]))
    columns = (title, "weights", "mean abs. logit difference", "KL per token", "same top-1", "k1", "k3", "ESS", "> 2")
    return markdown_table(columns, rows) if rows else None


def _error_row(label: str, own: Mapping[str, Any]) -> list[str]:
    if "reason" in own:
        return [label, own["reason"], *["-"] * 7]
    small = [f"{own[name]:.2e}" for name in ("weight_error", "logit_difference", "kl")]
    seen = [f"{own['k1']:.1e}", f"{own['k3']:.1e}", f"{own['ess']:.4f}", f"{own['truncated']:.2%}"]
    return [label, *small, f"{own['top1']:.2%}", *seen]


def section(record: Mapping[str, Any]) -> str:
    """The part of the documentation that this run fills: command, case, machine, tables."""
    facts, case, settings = record["machine"], record["case"], record["settings"]
    shape, parameters = case["shape"], facts["parameters"]
    cache = "unknown" if facts["cache_bytes"] is None else f"{mebibytes(facts['cache_bytes'])} MiB"
    versions = ", ".join(f"{name} {facts[name]}" for name in ("torch", "transformers"))
    cores = f", {facts['cores']} cores, {facts['threads']} thread(s)" if "cores" in facts else ""
    lines = [
        f"    {settings['command']}",
        "",
        f"{shape['layers']} layers, hidden {shape['hidden']}, {shape['heads']} query and {shape['kv_heads']} key-value "
        f"heads, vocabulary {shape['vocabulary']:,}, random weights: {parameters['all'] / 1e6:.1f} million parameters, "
        f"{parameters['quantised'] / 1e6:.1f} of them quantised and {parameters['head'] / 1e6:.1f} the head's, "
        f"{mebibytes(record['arms']['bf16']['policy_bytes'])} MiB in bf16; largest cache: {cache}. Prompts of "
        f"{case['prompt']} tokens, prefill of {case['prefill']}; {settings['repetitions']} rounds, {settings['clock']} "
        f"time. Machine: {facts['device']}{cores}, {versions}; load average {facts['load']} at the start, "
        f"{facts['cpu_share']:.0%} of the measured time this process's; {facts['seconds']:.0f} s in all.",
        *(f"DISTURBED: {line}." for line in facts["disturbed"]),
        "",
        markdown(record),
    ]
    return "\n".join(lines)


# ---- the command

FULL: dict[str, Any] = {
    "preset": "115m",
    "batches": "1,8,64",
    "prompt": 16,
    "prefill": 128,
    "block": 0.3,
    "repetitions": 3,
    "error_prompts": 128,
    "error_new": 48,
    "random_prompts": 4,
}
QUICK: dict[str, Any] = {
    "preset": "tiny",
    "batches": "1,3",
    "prompt": 4,
    "prefill": 16,
    "block": 0.001,
    "repetitions": 2,
    "error_prompts": 6,
    "error_new": 6,
    "random_prompts": 2,
}
SHAPE_OPTIONS = {"layers": "layers", "hidden": "hidden", "heads": "heads", "kv_heads": "kv_heads"}
SHAPE_OPTIONS |= {"intermediate": "intermediate", "vocab": "vocabulary"}


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line, checked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=list(PRESETS), help="default: 115m, on a GPU 0.5b")
    for option in SHAPE_OPTIONS:
        parser.add_argument(f"--{option.replace('_', '-')}", type=int, help="in place of the preset's")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=1, help="on a CPU")
    parser.add_argument("--arms", help=f"with commas, of {', '.join(ARMS)}; the baselines are added")
    parser.add_argument("--batches", help="rows of a decode step, with commas, default 1,8,64")
    parser.add_argument("--prompt", type=int, help="tokens before a decode step, default 16")
    parser.add_argument("--prefill", type=int, help="tokens of the prefill, of 4 rows together, default 128")
    parser.add_argument("--few", type=int, default=1, help="decoder layers that move in the smaller refresh")
    parser.add_argument("--block", type=float, help="seconds of a block of decode steps, default 0.3")
    parser.add_argument(
        "--patience", type=float, default=4.0, help="seconds of a round after which an arm has no other"
    )
    parser.add_argument("--repetitions", type=int, help="rounds, default 3")
    parser.add_argument("--error-prompts", type=int, help="of the tiny reasoner, default 128; 0: no errors of it")
    parser.add_argument("--random-prompts", type=int, help="of the random model, default 4; 0: no errors of it")
    parser.add_argument("--error-new", type=int, help="tokens of a completion at most, default 48")
    parser.add_argument("--clock", choices=CLOCKS, default="wall", help="seconds of the machine or of this process")
    parser.add_argument("--quick", action="store_true", help="the smallest of everything")
    parser.add_argument("--markdown", action="store_true", help="print the section of the documentation alone")
    parser.add_argument("--read", type=Path, help="print the figures of an earlier --json; nothing is measured")
    parser.add_argument("--json", type=Path, help="file for all figures")
    options = parser.parse_args(argv)
    options.command = command_line("bench_quant.py", argv)
    defaults = QUICK if options.quick else FULL | ({"preset": "0.5b"} if options.device == "cuda" else {})
    for name, value in defaults.items():
        if getattr(options, name) is None:
            setattr(options, name, value)
    options.names = [name for name in ARMS if name in {*chosen_arms(parser, options.arms, ARMS), *BASES}]
    at_least_one(parser, options, ("threads", "prompt", "repetitions", "few", "error_new"))
    options.case = _case(parser, options)
    return options


def _case(parser: argparse.ArgumentParser, options: argparse.Namespace) -> Case:
    """The case of the options; ends with an error where they do not fit together."""
    given = {field: getattr(options, option) for option, field in SHAPE_OPTIONS.items()}
    shape = dataclasses.replace(PRESETS[options.preset], **{k: v for k, v in given.items() if v is not None})
    if min(dataclasses.astuple(shape)) < 1 or shape.vocabulary <= FIRST:
        parser.error(f"{shape}: sizes must be at least 1, --vocab at least {FIRST + 1}")
    if shape.hidden % (2 * shape.heads):
        parser.error(f"--hidden {shape.hidden} must be a multiple of twice --heads {shape.heads}")
    if shape.heads % shape.kv_heads:
        parser.error(f"--heads {shape.heads} must be a multiple of --kv-heads {shape.kv_heads}")
    if options.few > shape.layers:
        parser.error(f"--few {options.few} is above the {shape.layers} layers of the model")
    if options.prefill < PREFILL_ROWS:
        parser.error(f"--prefill {options.prefill} must be at least {PREFILL_ROWS}, one token per row")
    for name in ("block", "patience"):
        if not getattr(options, name) > 0:
            parser.error(f"--{name} {getattr(options, name)} must be above 0 seconds")
    for name in ("error_prompts", "random_prompts"):
        if getattr(options, name) < 0:
            parser.error(f"--{name.replace('_', '-')} {getattr(options, name)} must be at least 0; 0 leaves them out")
    try:
        batches = tuple(int(batch) for batch in options.batches.split(","))
    except ValueError:
        batches = ()
    if not batches or min(batches) < 1 or len(set(batches)) < len(batches):
        parser.error(f"--batches {options.batches} must be different whole numbers >= 1 with commas")
    return Case(shape, options.device, batches, options.prompt, options.prefill, options.few)


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print, write; 1 where an arm fails that nothing refused."""
    options = arguments(argv)
    if options.read:
        print(section(json.loads(options.read.read_text())))
        return 0
    torch.set_num_threads(options.threads)
    if options.device == "cpu":
        keep_freed_memory()
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
    started = time.perf_counter()
    arms, shared, failed = measure(options)
    facts = machine(options.device, torch, transformers) | shared
    facts |= {"load": None if load is None else round(load, 2), "seconds": time.perf_counter() - started}
    facts |= {"device_kind": options.device, "cache_bytes": last_cache_bytes() if options.device == "cpu" else None}
    facts["disturbed"] = disturbances(facts, options.threads)
    return report(options, facts, arms, failed)


def measure(options: argparse.Namespace) -> tuple[dict[str, dict[str, Any]], dict[str, Any], list[str]]:
    """Records of all arms, what belongs to none, and what failed."""
    case: Case = options.case
    longest = max(case.prompt + MOST_STEPS + 1, case.prefill, case.prompt + options.error_new)
    policies = build_policies(case.shape, longest, case.device)
    samplers, arms, failed = make_samplers(options.names, policies, case.device)
    arms |= {name: tensor_bytes(sampler) for name, sampler in samplers.items()}
    if options.random_prompts:  # before the refreshes move the weights
        say("errors of random weights")
        text = Text(random_rows(case, options.random_prompts, case.prompt), min(options.error_new, RANDOM_NEW))
        add_errors(arms, "random", measure_errors(samplers, text))
    measured = []
    again = (options.repetitions, options.patience)
    for batch in case.batches:
        say(f"decode steps at batch {batch}")
        rounds = measure_decode(case, samplers, batch, options.block, *again)
        for name, own in speed_figures(rounds, options.clock).items():
            arms[name].setdefault("decode", {})[str(batch)] = own
        measured += list(rounds.values())
    say("prefill")
    rounds = measure_prefill(case, samplers, *again)
    for name, own in speed_figures(rounds, options.clock).items():
        arms[name]["prefill"] = own
    measured += list(rounds.values())
    say("refresh")
    add_refresh(arms, measure_refresh(case, samplers, options.repetitions), options.clock)
    parameters = counted(policies["fp32"])
    del samplers, policies
    if options.error_prompts:
        say("errors of the tiny reasoner")
        failed += reasoner_errors(options, arms)
    share = sum(own.seconds("cpu") for own in measured) / sum(own.seconds("wall") for own in measured)
    ordered = {name: arms[name] for name in options.names}
    return ordered, {"parameters": parameters, "cpu_share": share}, failed


def reasoner_errors(options: argparse.Namespace, arms: dict[str, dict[str, Any]]) -> list[str]:
    """Add the errors on the embedded model to the arms that run; what failed."""
    names = [name for name in options.names if "reason" not in arms[name]]
    samplers, others, failed = make_samplers(names, reasoner_policies(options.device), options.device)
    found = measure_errors(samplers, reasoner_text(options.error_prompts, options.error_new))
    add_errors(arms, "reasoner", found | others)
    return failed


def add_errors(arms: dict[str, dict[str, Any]], kind: str, found: Mapping[str, Mapping[str, Any]]) -> None:
    """Put the errors of one model into the arms' records."""
    for label, own in found.items():
        name, _, itself = label.partition(", ")
        arms[name].setdefault("floor" if itself else "errors", {})[kind] = own


def say(stage: str) -> None:
    """Where a long run is."""
    print(f"... {stage}", file=sys.stderr, flush=True)


def report(
    options: argparse.Namespace, facts: dict[str, Any], arms: Mapping[str, Mapping[str, Any]], failed: Sequence[str]
) -> int:
    """Print and write the figures; 1 where an arm failed."""
    names = (
        "command",
        "preset",
        "repetitions",
        "block",
        "patience",
        "clock",
        "error_prompts",
        "error_new",
        "random_prompts",
    )
    settings = {name: getattr(options, name) for name in names}
    record = {"machine": facts, "case": dataclasses.asdict(options.case), "settings": settings, "arms": arms}
    if not options.markdown:
        print(f"{options.preset} on {facts['device']}: {facts}\n")
    print(section(record) if options.markdown else markdown(record))
    for line in facts["disturbed"]:
        print(f"DISTURBED: {line}", file=sys.stderr)
    return conclude(options, facts, arms, names, failed, [])


if __name__ == "__main__":
    sys.exit(main())
