"""What an optimizer step costs: every method of rltok against TRL's own trainer, in one interleaved run.

    python scripts/bench_step.py [--repetitions 6] [--threads 1] [--json figures.json] [--check]
    python scripts/bench_step.py --arms uniform,hapo,balance --repetitions 30
    python scripts/bench_step.py --shape 0.5b --device cuda [--mean 2048 --longest 4096]

All arms train random models of one shape on the same prompts, completions, rewards and seeds. The completions are token
ids prepared beforehand, with log-normal lengths (evenly spaced quantiles, shuffled per rollout), so that the sampler
takes the same time in every arm: none. What is measured is everything else between the first prompt and the last
optimizer step of a rollout:

    rollout   what the trainer does around the sampler: tokenising, decoding, counting; the sampler itself is left out
    score     rewards, the old policy's forward pass, credit, correction, attention signals, selection
    update    the rest: micro-batches, forward and backward passes, clipping, optimizer, metrics, logging of every step

Left out: building the trainer, the sampler and what decoding methods do in it (bench_rollout.py, bench_decoding.py),
recording of completions (bench_recording.py), checkpoints, evaluation. For HAPO's adaptive temperature the prepared
log-probabilities are those of a uniform distribution, which a random model's nearly is.

A block is one rollout with all its updates. A quad is four blocks, T A A T or A T T A by turns, T of TRL's trainer with
the same loss and A of the arm, the first two and the last two on equal rows: a drift that is linear in time cancels
in its ratio (a1 + a2) / (t1 + t2). Reported are the median of the ratios and a percentile bootstrap interval of it.
Arms with a bound below 1.1 get `--precise` quads for each of the others. Garbage is collected between blocks, never
in one, and freed memory stays in the process (glibc), for all arms alike.

On a CPU every arm keeps its trainer; with `--fresh`, the default on a GPU, every block builds its own on restored
weights, after one block of warm-up. Peak memory is measured apart, in a process per arm: on a CPU the resident set
above that of a process that has trained a tiny model, with an allocator that returns large blocks at once, on a GPU
torch's allocator. `--check` exits with 1 where a bound of LIMITS is missed. `d3s` is measured at the start of its
schedule, where it keeps least. `--shape tiny` is there to see the script run.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import json
import logging
import math
import os
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
import transformers
import trl
from datasets import Dataset
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
    memory_apart,
    now,
    release_freed_memory,
    resident_bytes,
    turned,
    with_interval,
)
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, PrinterCallback, Qwen2Config, Qwen2ForCausalLM, TrainerCallback
from trl import GRPOConfig, GRPOTrainer

from rltok.config import ConfigError
from rltok.trainers import CreditConfig, CreditTrainer

PAD, END, FIRST = 0, 1, 3
"""ids of padding and end of a text, first id of a word"""
PHASES = ("rollout", "score", "update")
PRECISE = 1.1
"""arms with a bound of time below this get more quads"""


# ---- what is compared


@dataclass(frozen=True)
class Arm:
    """One way to train."""

    settings: Mapping[str, Any] = field(default_factory=dict)
    """doors of `CreditConfig`, or settings of `GRPOConfig`"""
    base: str = "trl_dapo"
    """the arm of TRL's trainer that this one is compared with"""
    is_trl: bool = False
    """TRL's own trainer"""


BASE = "trl_dapo"
ARMS: dict[str, Arm] = {
    BASE: Arm(is_trl=True),
    "trl_grpo": Arm({"loss_type": "grpo"}, is_trl=True),
    "uniform": Arm(),
    "uniform_grpo": Arm({"loss_type": "grpo"}, "trl_grpo"),
    "token_group_average": Arm({"credit": {"type": "token_group_average"}}),
    "entropy_shaping": Arm({"credit": {"type": "entropy_shaping"}}),
    "hapo": Arm(
        {
            "credit": {"type": "token_group_average"},
            "objective": {"type": "hapo"},
            "rollout": {"engine": "transformers", "decoding": [{"type": "adaptive_temperature"}]},
        }
    ),
    "preplan_anchor": Arm({"credit": {"type": "preplan_anchor"}}),
    "d3s": Arm({"selection": {"type": "d3s"}}),
    "pods": Arm({"selection": {"type": "pods"}}),
    "gspo_token": Arm({"objective": {"type": "gspo_token"}}),
    "clip_cov": Arm({"objective": {"type": "clip_cov"}}),
    "kl_cov": Arm({"objective": {"type": "kl_cov"}}),
    "balance": Arm({"batching": {"balance": True}}),
    "balance_max_tokens": Arm({"batching": {"balance": True, "max_tokens": "auto"}}),
    "balance_pack": Arm({"batching": {"balance": True, "pack": True}}),
}


@dataclass(frozen=True)
class Limit:
    """What an arm must hold against TRL's trainer; None: nothing."""

    step: float | None = None
    """most times the seconds of a step, median of the ratios"""
    memory: float | None = None
    """most times the peak memory"""
    update_speed: float | None = None
    """least times the speed of the update phase"""


LIMITS: dict[str, Limit] = {
    "uniform": Limit(step=1.01, memory=1.02),
    "uniform_grpo": Limit(step=1.01, memory=1.02),
    "hapo": Limit(step=1.04, memory=1.02),
    "balance": Limit(update_speed=1.25),
}


@dataclass(frozen=True)
class Shape:
    """A model of Qwen2's architecture with tied embeddings, and the rollouts that suit it."""

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    intermediate: int
    vocabulary: int
    prompt: int
    """tokens"""
    mean: float
    """tokens of a completion"""
    longest: int
    """tokens; longer completions are cut"""
    rows: int = 8
    """per micro-batch"""
    group: int = 8
    """completions of a prompt"""
    checkpointing: bool = False
    """gradient checkpointing"""


SHAPES = {
    "tiny": Shape(2, 32, 2, 1, 64, 64, prompt=4, mean=8, longest=16, rows=4),
    "small": Shape(4, 256, 4, 2, 1024, 2048, prompt=32, mean=64, longest=256, rows=4),
    "0.5b": Shape(24, 896, 14, 2, 4864, 151936, prompt=256, mean=2048, longest=4096, rows=4, checkpointing=True),
    "1.5b": Shape(28, 1536, 12, 2, 8960, 151936, prompt=256, mean=2048, longest=4096, rows=4, checkpointing=True),
}


@dataclass(frozen=True)
class Case:
    """Everything that all arms share."""

    shape: str = "small"
    device: str = "cpu"
    prompt: int = 32
    mean: float = 64
    longest: int = 256
    sigma: float = 0.8
    """standard deviation of the log-length; 0: all of length `mean`"""
    rows: int = 8
    group: int = 8
    accumulation: int = 4
    """micro-batches of an optimizer step"""
    windows: int = 2
    """optimizer steps of a rollout"""
    checkpointing: bool = False

    @property
    def rollout_rows(self) -> int:
        """Completions of a rollout."""
        return self.rows * self.accumulation * self.windows

    def lengths(self, seed: int) -> list[int]:
        """Tokens of every completion of a rollout, end included; the same multiset for every seed."""
        normal = statistics.NormalDist(math.log(self.mean) - self.sigma**2 / 2, self.sigma) if self.sigma else None
        count = self.rollout_rows
        raw = [math.exp(normal.inv_cdf((i + 0.5) / count)) if normal else self.mean for i in range(count)]
        order = torch.randperm(count, generator=torch.Generator().manual_seed(seed)).tolist()
        return [min(max(round(raw[i]), 2), self.longest) for i in order]

    def completions(self, seed: int) -> list[list[int]]:
        """Token ids of a rollout, each with its end."""
        generator = torch.Generator().manual_seed(seed)
        high = SHAPES[self.shape].vocabulary
        return [
            [*torch.randint(FIRST, high, (length - 1,), generator=generator).tolist(), END]
            for length in self.lengths(seed)
        ]


def parity_reward(completion_ids: list[list[int]], **_: Any) -> list[float]:
    """Share of odd ids: differs between completions, known from the ids alone."""
    return [sum(token % 2 for token in ids) / len(ids) for ids in completion_ids]


# ---- clocks


class PhaseClock:
    """Wall and CPU seconds by phase; on a GPU its queue is emptied at every change of phase."""

    def __init__(self, device: str, peaks: PhasePeaks | None = None) -> None:
        self.device, self.peaks = device, peaks
        self.seconds = dict.fromkeys(PHASES, 0.0)
        self.cpu_seconds = dict.fromkeys(PHASES, 0.0)
        self._phase: str | None = None
        self._since = (0.0, 0.0)

    def begin(self) -> None:
        """A block starts, in the phase `update`."""
        self.seconds, self.cpu_seconds = dict.fromkeys(PHASES, 0.0), dict.fromkeys(PHASES, 0.0)
        self._phase = None
        self._switch("update")

    def end(self) -> None:
        """The block ends."""
        self._switch(None)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """The block inside belongs to a phase, not to the one around it."""
        outer = self._phase
        self._switch(name)
        try:
            yield
        finally:
            self._switch(outer)

    def _switch(self, phase: str | None) -> None:
        since = now(self.device)
        if self._phase is not None:
            self.seconds[self._phase] += since[0] - self._since[0]
            self.cpu_seconds[self._phase] += since[1] - self._since[1]
        if self.peaks is not None:
            self.peaks.switch(self._phase)
        self._phase, self._since = phase, since


class PhasePeaks:
    """Largest memory in use by phase, above `baseline`; bytes."""

    def __init__(self, device: str, baseline: int) -> None:
        self.device, self.baseline = device, baseline
        self.bytes = dict.fromkeys(PHASES, 0)

    def switch(self, ended: str | None) -> None:
        """A phase ended, another begins."""
        if ended is not None:
            self.bytes[ended] = max(self.bytes[ended], peak_bytes(self.device) - self.baseline)
        reset_peak(self.device)


def reset_peak(device: str) -> None:
    """Let `peak_bytes` begin anew, where the system can."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    else:
        resident_bytes(reset=True)


def peak_bytes(device: str) -> int:
    """Largest memory in use since `reset_peak`: torch's allocator, or the resident set of this process."""
    return torch.cuda.max_memory_allocated() if device == "cuda" else resident_bytes()


class BlockClock(TrainerCallback):
    """Starts and ends the clock with the training loop, without what builds it."""

    def __init__(self, clock: PhaseClock) -> None:
        self.clock, self.seed = clock, 0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """The last thing before the loop."""
        torch.manual_seed(self.seed)
        self.clock.begin()

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """The first thing after it."""
        self.clock.end()


class Prepared:
    """In front of a trainer: completions are given instead of sampled, phases are timed."""

    clock: PhaseClock
    completions: list[list[int]]
    logps: list[list[float]] | None

    def _generate_single_turn(self, prompt_ids: list[list[int]], *args: Any, **kwargs: Any) -> Any:
        if len(prompt_ids) != len(self.completions):
            raise RuntimeError(f"{len(prompt_ids)} prompts for {len(self.completions)} prepared completions")
        return self.completions, self.logps

    def _generate(self, *args: Any, **kwargs: Any) -> Any:
        with self.clock.phase("rollout"):
            return super()._generate(*args, **kwargs)  # type: ignore[misc]

    def _generate_and_score_completions(self, *args: Any, **kwargs: Any) -> Any:
        with self.clock.phase("score"):
            return super()._generate_and_score_completions(*args, **kwargs)  # type: ignore[misc]


class PreparedTRL(Prepared, GRPOTrainer):
    """TRL's trainer on prepared completions."""


class PreparedCredit(Prepared, CreditTrainer):
    """Ours on prepared completions."""


# ---- running


@dataclass(frozen=True)
class Block:
    """Seconds of one rollout with all its updates, by phase."""

    seconds: dict[str, float]
    cpu_seconds: dict[str, float]

    def of(self, clock: str, phase: str = "step") -> float:
        """Seconds by a clock (`wall`, `cpu`) of a phase, or of all (`step`)."""
        found = self.seconds if clock == "wall" else self.cpu_seconds
        return sum(found.values()) if phase == "step" else found[phase]


class Runner:
    """One arm's trainer, ready to run blocks."""

    def __init__(self, case: Case, arm: Arm, folder: str, peaks: PhasePeaks | None = None) -> None:
        clock = PhaseClock(case.device, peaks)
        self.case, self.callback = case, BlockClock(clock)
        self.trainer = build_trainer(case, arm, folder, self.callback)
        self.trainer.clock = clock
        doors = getattr(self.trainer, "doors", None)
        self._records = doors is not None and doors.rollout.records_logps

    def run(self, seed: int) -> Block:
        """A block on the rollout of this seed."""
        trainer, clock = self.trainer, self.callback.clock
        trainer.completions = self.case.completions(seed)
        uniform = -math.log(SHAPES[self.case.shape].vocabulary)
        trainer.logps = [[uniform] * len(ids) for ids in trainer.completions] if self._records else None
        self.callback.seed = seed
        gc.collect()
        gc.disable()
        try:
            trainer.train()
        finally:
            gc.enable()
        return Block(dict(clock.seconds), dict(clock.cpu_seconds))


def build_trainer(case: Case, arm: Arm, folder: str, callback: TrainerCallback) -> Any:
    """A trainer on a fresh random model, the same weights in every arm.

    Raises:
        ConfigError: the library refuses the arm's settings.
    """
    settings = dict(arm.settings)
    batching = settings.get("batching", {})
    if batching.get("max_tokens") == "auto":  # two thirds of what TRL's micro-batch takes
        settings["batching"] = batching | {"max_tokens": 2 * case.rows * (case.prompt + case.longest) // 3}
    cuda = case.device == "cuda"
    common: dict[str, Any] = {
        "output_dir": folder,
        "per_device_train_batch_size": case.rows,
        "gradient_accumulation_steps": case.accumulation,
        "steps_per_generation": case.accumulation * case.windows,
        "num_generations": case.group,
        "max_completion_length": case.longest,
        "max_steps": case.windows,
        "loss_type": "dapo",
        "epsilon": 0.2,
        "epsilon_high": 0.28,
        "delta": 10.0,
        "learning_rate": 1e-6,
        "lr_scheduler_type": "constant",
        "gradient_checkpointing": case.checkpointing,
        "bf16": cuda,
        "use_cpu": not cuda,
        "dataloader_pin_memory": False,
        "report_to": "none",
        "save_strategy": "no",
        "logging_steps": 1,
        "disable_tqdm": True,
        "seed": 0,
    }
    data = Dataset.from_list([{"prompt": _prompt(case, i)} for i in range(case.rollout_rows // case.group)])
    tokenizer = build_tokenizer(SHAPES[case.shape].vocabulary)
    if arm.is_trl:
        kind, args = PreparedTRL, GRPOConfig(**common | settings)
    else:
        kind, args = PreparedCredit, CreditConfig(**common | {"rollout": {"engine": "transformers"}} | settings)
    trainer = kind(
        build_model(case), parity_reward, args, train_dataset=data, processing_class=tokenizer, callbacks=[callback]
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def _prompt(case: Case, index: int) -> str:
    generator = torch.Generator().manual_seed(index)
    words = torch.randint(FIRST, SHAPES[case.shape].vocabulary, (case.prompt,), generator=generator)
    return " ".join(f"t{word}" for word in words.tolist())


def build_tokenizer(vocabulary: int) -> PreTrainedTokenizerFast:
    """One token per word, `t3` is id 3."""
    words = {f"t{i}": i for i in range(vocabulary)}
    core = Tokenizer(models.WordLevel(words, unk_token="t2"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=core, pad_token=f"t{PAD}", eos_token=f"t{END}", padding_side="left")


def build_model(case: Case) -> Qwen2ForCausalLM:
    """Random weights, the same at every call."""
    shape = SHAPES[case.shape]
    config = Qwen2Config(
        num_hidden_layers=shape.layers,
        hidden_size=shape.hidden,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        intermediate_size=shape.intermediate,
        vocab_size=shape.vocabulary,
        max_position_embeddings=case.prompt + case.longest + 1,
        tie_word_embeddings=True,
        pad_token_id=PAD,
        bos_token_id=None,
        eos_token_id=END,
    )
    torch.manual_seed(0)
    with torch.device(case.device):
        return Qwen2ForCausalLM(config)


class Bench:
    """Runs blocks of arms, on kept trainers or on fresh ones."""

    def __init__(self, case: Case, fresh: bool, folder: str) -> None:
        self.case, self.fresh, self.folder = case, fresh, folder
        self.kept: dict[str, Runner] = {}

    def prepare(self, name: str) -> None:
        """Build the arm's trainer and warm it up.

        Raises:
            ConfigError: the library refuses the arm's settings.
        """
        runner = Runner(self.case, ARMS[name], self.folder)
        if not self.fresh:
            runner.run(0)
            self.kept[name] = runner

    def run(self, name: str, seed: int) -> Block:
        """A timed block."""
        if not self.fresh:
            return self.kept[name].run(seed)
        runner = Runner(self.case, ARMS[name], self.folder)
        runner.run(0)
        block = runner.run(seed)
        del runner
        gc.collect()
        if self.case.device == "cuda":
            torch.cuda.empty_cache()
        return block


@dataclass
class Quads:
    """Of every quad of an arm: two blocks of TRL's trainer and two of the arm's."""

    base: list[tuple[Block, Block]] = field(default_factory=list)
    arm: list[tuple[Block, Block]] = field(default_factory=list)

    def ratios(self, clock: str, phase: str = "step") -> list[float]:
        """(a1 + a2) / (t1 + t2) of every quad."""
        return [
            sum(block.of(clock, phase) for block in arm) / max(sum(block.of(clock, phase) for block in base), 1e-12)
            for base, arm in zip(self.base, self.arm, strict=True)
        ]


def run_quad(bench: Bench, base: str, arm: str, seed: int, arm_first: bool, quads: Quads) -> None:
    """T A A T, or A T T A; the first pair and the last one on equal rows."""
    found: dict[str, list[Block]] = {"base": [], "arm": []}
    first, second = ("arm", "base") if arm_first else ("base", "arm")
    names = {"base": base, "arm": arm}
    for offset, side in enumerate((first, second, second, first)):
        found[side].append(bench.run(names[side], seed + offset // 2))
    quads.base.append((found["base"][0], found["base"][1]))
    quads.arm.append((found["arm"][0], found["arm"][1]))


def measure(
    bench: Bench, names: Sequence[str], repetitions: int, precise: int
) -> tuple[dict[str, Quads], dict[str, str]]:
    """Quads by arm in rotating order, and why arms are missing; `trl_grpo` is one, against `trl_dapo`."""
    errors: dict[str, str] = {}
    for name in names:
        try:
            bench.prepare(name)
        except ConfigError as error:
            errors[name] = str(error)
    compared = [name for name in names if name != BASE and name not in errors]
    found = {name: Quads() for name in compared}
    seed = 1
    for repetition in range(repetitions):
        turns = turned(compared, repetition)
        order = [name for name in turns for _ in range(precise if _is_precise(name) else 1)]
        for name in order:
            run_quad(bench, ARMS[name].base, name, seed, len(found[name].arm) % 2 == 1, found[name])
            seed += 2
    return found, errors


def _is_precise(name: str) -> bool:
    limit = LIMITS.get(name, Limit())
    return limit.step is not None and limit.step < PRECISE


# ---- memory


def memory_of(case: Case, arm: str) -> dict[str, int]:
    """Peak bytes by phase of training two rollouts, for a process that does nothing else.

    Above what the process takes after training a tiny model in the same way, which loads every module it needs.
    """
    tiny = case_of("tiny", "cpu")
    with tempfile.TemporaryDirectory() as folder:
        Runner(tiny, ARMS[arm], folder).run(0)
        gc.collect()
        if case.device == "cuda":
            torch.cuda.empty_cache()
            baseline = torch.cuda.memory_allocated()
        else:
            release_freed_memory()
            reset_peak("cpu")
            baseline = peak_bytes("cpu")
        peaks = PhasePeaks(case.device, baseline)
        runner = Runner(case, ARMS[arm], folder, peaks)
        for seed in range(2):
            runner.run(seed)
    return peaks.bytes


def memory_of_child(case: Case, arm: str) -> dict[str, int]:
    """`memory_of` in a process of its own.

    Raises:
        RuntimeError: the process fails.
    """
    found: dict[str, int] = memory_apart(__file__, arm, case=dataclasses.asdict(case), arm=arm)
    return found


def measure_memory(case: Case, names: Sequence[str], repetitions: int) -> dict[str, list[dict[str, int]]]:
    """Peak bytes by arm, in turns."""
    found: dict[str, list[dict[str, int]]] = {name: [] for name in names}
    for _ in range(repetitions):
        for name in names:
            found[name].append(memory_of_child(case, name))
    return found


# ---- figures


def figures(quads: Quads, windows: int, clock: str) -> dict[str, Any]:
    """What is reported of an arm's time; ratios are to TRL's trainer, by the clock that is judged and by the other."""
    ratios = {name: {part: quads.ratios(name, part) for part in ("step", *PHASES)} for name in CLOCKS}
    return {
        "milliseconds_per_step": milliseconds(quads.arm, windows, clock),
        "ratio": {part: interval(values) for part, values in ratios[clock].items()},
        "step_ratio_by_clock": {name: interval(found["step"]) for name, found in ratios.items()},
        "ratios": ratios,
    }


def milliseconds(pairs: Sequence[tuple[Block, Block]], windows: int, clock: str) -> dict[str, float]:
    """Of an optimizer step, whole and by phase: medians over blocks, the rollout's costs spread over its steps."""
    blocks = [block for pair in pairs for block in pair]
    return {
        part: 1000 * statistics.median(block.of(clock, part) for block in blocks) / windows
        for part in ("step", *PHASES)
    }


def peak(memory: Sequence[Mapping[str, int]]) -> float:
    """Median over processes of the largest peak of any phase, bytes."""
    return statistics.median(max(one.values()) for one in memory)


def memory_ratios(arm: Sequence[Mapping[str, int]], base: Sequence[Mapping[str, int]]) -> list[float]:
    """Peak of the arm by that of its base, of every repetition."""
    return [max(a.values()) / max(b.values()) for a, b in zip(arm, base, strict=True)]


def failures(arms: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Bounds of LIMITS that are missed, or could not be judged, by the arms that were asked for."""
    found = []
    for name, limit in LIMITS.items():
        record = arms.get(name)
        if record is None:
            continue
        if "error" in record:
            found.append(f"{name} did not run: {record['error']}")
            continue
        step, update = record["ratio"]["step"]["median"], record["ratio"]["update"]["median"]
        if limit.step is not None and step > limit.step:
            found.append(f"{name}: a step takes {step:.4f} times TRL's, at most {limit.step} wanted")
        if limit.update_speed is not None and 1 / update < limit.update_speed:
            found.append(f"{name}: updates are {1 / update:.3f} times as fast, at least {limit.update_speed} wanted")
        memory = record.get("memory_ratio")
        if limit.memory is not None and memory is not None and memory["median"] > limit.memory:
            found.append(f"{name}: peak memory is {memory['median']:.4f} times TRL's, at most {limit.memory} wanted")
    return found


def unjudged(arms: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Bounds of which this run says nothing."""
    missing = [f"{name}: not among the arms" for name in LIMITS if name not in arms]
    without = [
        f"{name}: peak memory was not measured"
        for name, limit in LIMITS.items()
        if limit.memory is not None and "ratio" in arms.get(name, {}) and "memory_ratio" not in arms[name]
    ]
    return missing + without


def markdown(arms: Mapping[str, Mapping[str, Any]]) -> str:
    """The table of the documentation."""
    columns = ["arm", "ms per step", "score", "update", "step, ratio [95 %]", "update, ratio [95 %]"]
    columns += ["peak MiB", "ratio"]
    rows = []
    for name, record in arms.items():
        if "error" in record:
            rows.append([name, "did not run", *["-"] * (len(columns) - 2)])
            continue
        ms = record["milliseconds_per_step"]
        times = [f"{ms[phase]:.1f}" for phase in ("step", "score", "update")]
        found = record.get("ratio")
        ratio = [with_interval(found[phase], 3) if found else "1" for phase in ("step", "update")]
        share = f"{record['memory_ratio']['median']:.3f}" if "memory_ratio" in record else "-"
        rows.append([name, *times, *ratio, mebibytes(record.get("peak_bytes")), share])
    return markdown_table(columns, rows)


# ---- the command


def case_of(shape: str, device: str, **changes: Any) -> Case:
    """A shape's own rollouts, with changes that are not None."""
    own = SHAPES[shape]
    settings = {name: getattr(own, name) for name in ("prompt", "mean", "longest", "rows", "group", "checkpointing")}
    return Case(shape, device, **settings | {name: value for name, value in changes.items() if value is not None})


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line, checked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=list(SHAPES), help="default: small, on a GPU 0.5b")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=1, help="on a CPU")
    parser.add_argument("--repetitions", type=int, default=6, help="quads per arm")
    parser.add_argument("--precise", type=int, default=5, help="quads for each one of the others, of arms with a bound")
    parser.add_argument("--arms", help=f"with commas, of {', '.join(ARMS)}; what they are compared with is added")
    parser.add_argument("--prompt", type=int, help="tokens")
    parser.add_argument("--mean", type=float, help="tokens of a completion")
    parser.add_argument("--sigma", type=float, default=0.8, help="of the log-lengths; 0: all equally long")
    parser.add_argument("--longest", type=int, help="tokens of a completion at most")
    parser.add_argument("--rows", type=int, help="per micro-batch")
    parser.add_argument("--group", type=int, help="completions of a prompt")
    parser.add_argument("--accumulation", type=int, default=4, help="micro-batches of an optimizer step")
    parser.add_argument("--windows", type=int, default=2, help="optimizer steps of a rollout")
    parser.add_argument("--fresh", action=argparse.BooleanOptionalAction, help="a trainer per block; default on a GPU")
    parser.add_argument("--memory-repetitions", type=int, default=2, help="processes per arm; 0: no memory")
    parser.add_argument("--clock", choices=CLOCKS, default="wall", help="seconds of the machine or of this process")
    parser.add_argument("--check", action="store_true", help="exit with 1 where a bound is missed")
    parser.add_argument("--json", type=Path, help="file for all figures")
    parser.add_argument("--memory-of", help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    options.shape = options.shape or ("0.5b" if options.device == "cuda" else "small")
    options.fresh = options.device == "cuda" if options.fresh is None else options.fresh
    options.arms = with_bases(chosen_arms(parser, options.arms, ARMS))
    at_least_one(parser, options, ("threads", "repetitions", "precise", "accumulation", "windows"))
    options.case = case_of(
        options.shape,
        options.device,
        **{name: getattr(options, name) for name in ("prompt", "mean", "sigma", "longest", "rows", "group")},
        accumulation=options.accumulation,
        windows=options.windows,
    )
    if options.case.rollout_rows % options.case.group:
        parser.error(f"{options.case.rollout_rows} rows of a rollout are no multiple of --group {options.case.group}")
    return options


def with_bases(names: Sequence[str]) -> list[str]:
    """The arms in the order of the table, with those of TRL's trainer that they are compared with."""
    wanted = {*names, *(ARMS[name].base for name in names), BASE}
    return [name for name in ARMS if name in wanted]


def records(
    found: Mapping[str, Quads],
    errors: Mapping[str, str],
    memory: Mapping[str, Sequence[Mapping[str, int]]],
    options: argparse.Namespace,
) -> dict[str, dict[str, Any]]:
    """Figures by arm, in the order of the table."""
    result: dict[str, dict[str, Any]] = {}
    for name in options.arms:
        if name in errors:
            result[name] = {"error": errors[name]}
            continue
        if name in found:
            result[name] = figures(found[name], options.case.windows, options.clock)
        else:
            pairs = [pair for other, quads in found.items() if ARMS[other].base == BASE for pair in quads.base]
            if not pairs:
                result[name] = {"error": "no arm was compared with it"}
                continue
            result[name] = {"milliseconds_per_step": milliseconds(pairs, options.case.windows, options.clock)}
        if memory.get(name):
            result[name] |= {"peak_bytes": peak(memory[name]), "peak_bytes_by_phase": list(memory[name])}
            if name in found:
                ratios = memory_ratios(memory[name], memory[ARMS[name].base])
                result[name] |= {"memory_ratio": {"median": statistics.median(ratios)}, "memory_ratios": ratios}
    return result


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print, write; 1 where `--check` fails."""
    options = arguments(argv)
    with quiet_libraries():
        return run(options)


@contextmanager
def quiet_libraries() -> Iterator[None]:
    """No warnings and no notices between the figures."""
    level, verbosity = logging.root.manager.disable, transformers.utils.logging.get_verbosity()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        transformers.utils.logging.set_verbosity_error()
        logging.disable(logging.WARNING)
        try:
            yield
        finally:
            logging.disable(level)
            transformers.utils.logging.set_verbosity(verbosity)


def run(options: argparse.Namespace) -> int:
    """`main` with its options read."""
    torch.set_num_threads(options.threads)
    if options.memory_of:
        given = json.loads(options.memory_of)
        torch.set_num_threads(given["threads"])
        print(json.dumps(memory_of(Case(**given["case"]), given["arm"])))
        return 0
    if options.device == "cpu":
        keep_freed_memory()
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(options.case, options.fresh, folder)
        found, errors = measure(bench, options.arms, options.repetitions, options.precise)
    del bench
    gc.collect()
    running = [name for name in options.arms if name not in errors]
    memory = measure_memory(options.case, running, options.memory_repetitions)
    arms = records(found, errors, memory, options)
    facts = machine(options.device, torch, transformers, trl)
    case = options.case
    lengths = case.lengths(0)
    print(
        f"{options.shape}: {case.rollout_rows} completions of {case.prompt} + {min(lengths)} to {max(lengths)} tokens "
        f"(mean {statistics.mean(lengths):.0f}), {case.windows} steps of {case.accumulation} x {case.rows} rows; "
        f"{options.clock} clock; {facts}; {time.perf_counter() - start:.0f} s\n"
    )
    print(markdown(arms))
    for name, why in errors.items():
        print(f"{name} did not run: {why}")
    missed, without = (failures(arms), unjudged(arms)) if options.check else ([], [])
    return conclude(options, facts, arms, ("repetitions", "precise", "clock", "fresh"), missed, without)


if __name__ == "__main__":
    sys.exit(main())
