"""The same rollouts by TRL's transformers path, by continuous batching and by the fast loop, in one interleaved run.

    python scripts/bench_rollout.py [--repetitions 3] [--device cpu] [--out results.json]
    python scripts/bench_rollout.py --suite [--check]
    python scripts/bench_rollout.py --shape 0.5b --batch 256 --device cuda [--compile]

    transformers            `generate` on the left-padded batch with TRL's generation config, tokens cut at their end
    continuous_batching     one request per row, as `generate_batch` adds them, with TRL's generation config
    fast, fast_recorded     `rltok.fast.generate_rows` without and with log-probabilities
    fast_compiled           `--compile`: fast with a compiled forward, dynamic shapes
    fast_graphs             `--compile` on a GPU: the same in mode reduce-overhead

The models are of Qwen2's architecture with random weights. Every engine makes rows of the same lengths: a processor
forbids the end token before a row's length and forces it there; continuous batching, which has no such processor, gets
the length as the limit of the request. After every run each row's length is compared with the one wanted, and nothing
is reported if one differs. Log-normal lengths are evenly spaced quantiles, shuffled.

Engines are interleaved inside every repetition, the order rotates, and a ratio is that of tokens/s to `transformers`
within a repetition. The ratio of CPU seconds, all threads together, hides other work on the machine; it does not show
what a second core would have done. Peak memory is that of one rollout alone: on a GPU of torch's allocator, on a CPU
the growth of the resident set of a fresh process per engine after a warm-up, with an allocator that returns large
blocks at once: left to itself, glibc keeps some of them by chance.

`--check` exits with 1 where `fast` is slower than 2.5 times `transformers` on log-normal lengths or 0.97 times on equal
ones, or takes more memory (on a CPU: by more than 1 MiB, the noise of the measure). `--shape tiny` is a small model, to
see the script run.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import json
import math
import os
import shutil
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
import transformers
from measuring import at_least_one, command_line, device_name, mebibytes, memory_apart, resident_bytes, turned
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import GenerationConfig, Qwen2Config, Qwen2ForCausalLM
from transformers.generation import ContinuousBatchingConfig
from transformers.generation.continuous_batching.utils import WorkloadHints

from rltok.fast import LoopMetrics, LoopSettings, generate_rows, row_key
from rltok.sampling import RolloutProcessor, Rows, sampling_control
from rltok.sampling.processor import Columns

BASE = "transformers"
MUST_RUN = (BASE, "fast", "fast_recorded")
"""engines whose failure ends the script; of the others the reason is printed"""
ENGINES = (BASE, "continuous_batching", "fast", "fast_recorded")
COMPILED = {"fast_compiled": "default", "fast_graphs": "reduce-overhead"}
"""engine -> mode of torch.compile"""
LEAST_RATIO = {"lognormal": 2.5, "equal": 0.97}
PAD, END = 0, 1
PROBE = 64
"""logits that tell prompts apart"""
CERTAIN = 1e4
"""logit of an end that is due; every other token then has probability 0 in float32"""
PAGE = 32
"""tokens of a page of continuous batching on a CPU, where it cannot size its cache itself"""
NOISE = {"cpu": 2**20, "cuda": 0}
"""bytes by which peaks of equal runs may differ"""


@dataclass(frozen=True)
class Shape:
    """Size of a model of Qwen2's architecture with tied embeddings."""

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    intermediate: int
    vocabulary: int


SHAPES = {
    "prototype": Shape(4, 256, 4, 2, 1024, 8192),
    "0.5b": Shape(24, 896, 14, 2, 4864, 151936),
    "small": Shape(2, 64, 2, 1, 128, 512),
    "tiny": Shape(2, 32, 2, 1, 64, 128),
}


@dataclass(frozen=True)
class Case:
    """What is rolled out: prompts in groups of completions with given lengths, by which model."""

    name: str = "case"
    shape: str = "prototype"
    groups: int = 4
    group_size: int = 16
    prompt_length: int = 256
    """tokens; of the longest prompt where they are ragged"""
    ragged: bool = False
    """prompts from an eighth of `prompt_length` to all of it"""
    lengths: str = "lognormal"
    """`lognormal` or `equal`"""
    mean: float = 89.0
    """tokens of a completion"""
    sigma: float = 0.8
    """standard deviation of the log-length"""
    longest: int = 400
    """tokens; longer ones are cut"""
    dtype: str = "float32"
    device: str = "cpu"

    @property
    def rows(self) -> int:
        """Completions, B."""
        return self.groups * self.group_size

    def completion_lengths(self) -> list[int]:
        """Tokens of every completion, end included."""
        if self.lengths == "equal":
            return [min(round(self.mean), self.longest)] * self.rows
        middle = math.log(self.mean) - self.sigma**2 / 2
        normal = statistics.NormalDist(middle, self.sigma) if self.sigma else None
        logs = [normal.inv_cdf((i + 0.5) / self.rows) if normal else middle for i in range(self.rows)]
        order = torch.randperm(self.rows, generator=torch.Generator().manual_seed(1)).tolist()
        return [min(max(round(math.exp(logs[i])), 1), self.longest) for i in order]

    def prompts(self) -> list[list[int]]:
        """Token ids of every row's prompt; rows of a group are adjacent and share it."""
        generator = torch.Generator().manual_seed(2)
        sizes = [self.prompt_length] * self.groups
        if self.ragged:
            least = max(1, self.prompt_length // 8)
            spread = torch.linspace(least, self.prompt_length, self.groups).round().long()
            sizes = spread[torch.randperm(self.groups, generator=generator)].tolist()
        vocabulary = SHAPES[self.shape].vocabulary
        unique = [torch.randint(END + 1, vocabulary, (size,), generator=generator).tolist() for size in sizes]
        return [prompt for prompt in unique for _ in range(self.group_size)]


class WrongLengths(RuntimeError):
    """An engine made other rows than those asked for, so that its figures would mean nothing."""


class LengthForcer(RolloutProcessor):
    """Ends every row at its own length: the k-th row of a prompt at the k-th of the prompt's lengths.

    An engine does not say which row it shows. A new row's prompt is found by the logits that follow it.

    Args:
        lengths: prompt -> its lengths.
        known: (prompts, PROBE) first logits after every prompt.
    """

    memory = "logits"

    def __init__(self, lengths: Sequence[Sequence[int]], known: Tensor) -> None:
        self.lengths, self.known = lengths, known
        self._given = [0] * len(lengths)
        self._new_rows = False

    def begin(self, prompt_length: int, settings: Any) -> None:
        """A call starts: all lengths are to be given out again."""
        super().begin(prompt_length, settings)
        self._given = [0] * len(self.lengths)

    def columns(self, rows: int, device: torch.device) -> Columns:
        """Length of every row, 0 until it is known."""
        self._new_rows = True
        return {"length": torch.zeros(rows, dtype=torch.long, device=device)}

    def apply(self, scores: Tensor, rows: Rows, columns: Columns) -> Tensor:
        """No end before a row's length, nothing else there."""
        if self._new_rows:
            self._give(scores, columns["length"])
        scores[:, END] = torch.where(rows.position + 1 >= columns["length"], CERTAIN, -math.inf).to(scores.dtype)
        return scores

    def _give(self, scores: Tensor, lengths: Tensor) -> None:
        self._new_rows = False
        fresh = (lengths == 0).nonzero().squeeze(1)
        nearest = torch.cdist(scores[fresh, :PROBE].float(), self.known).argmin(dim=1)
        found = []
        for prompt in nearest.tolist():
            if self._given[prompt] == len(self.lengths[prompt]):
                raise WrongLengths(f"more rows look like prompt {prompt} than the {len(self.lengths[prompt])} it has")
            found.append(self.lengths[prompt][self._given[prompt]])
            self._given[prompt] += 1
        lengths[fresh] = torch.tensor(found, device=lengths.device)


def check_lengths(engine: str, ids: Sequence[Sequence[int]], wanted: Sequence[int]) -> None:
    """Raise WrongLengths unless every row has its length and ends where it should."""
    made = [len(row) for row in ids]
    if made != list(wanted):
        wrong = [i for i, pair in enumerate(zip(made, wanted, strict=False)) if pair[0] != pair[1]]
        raise WrongLengths(
            f"{engine} made {len(made)} rows of {sum(made)} tokens where {len(wanted)} of {sum(wanted)} were wanted; "
            f"lengths differ in rows {wrong[:8]}: nothing is reported"
        )
    early = [i for i, row in enumerate(ids) if END in row[:-1]]
    if early:
        raise WrongLengths(f"{engine} went on after the end token in rows {early[:8]}: nothing is reported")


@dataclass(frozen=True)
class Run:
    """One rollout by one engine."""

    tokens: int
    seconds: float
    cpu_seconds: float
    peak_bytes: int | None
    """on a GPU, above what was allocated before"""
    metrics: LoopMetrics | None
    """of the fast loop"""


class Bench:
    """One case: its model, its rows, and the engines that make them."""

    def __init__(self, case: Case) -> None:
        self.case, self.device = case, torch.device(case.device)
        self.model = build_model(case)
        self.all_prompts, self.all_lengths = case.prompts(), case.completion_lengths()
        self.keys = [row_key(0, 0, i // case.group_size, i % case.group_size) for i in range(case.rows)]
        self.known = self._first_logits()
        self.compiled: dict[str, Callable[..., Any]] = {}
        self._use(self.all_prompts, self.all_lengths, case.group_size, self.known)

    def run(self, engine: str) -> Run:
        """A rollout, timed and checked.

        Raises:
            WrongLengths: it made other rows.
        """
        make = {BASE: self._transformers, "continuous_batching": self._continuous}
        metrics = None
        gc.collect()
        with self._memory() as peak:
            torch.manual_seed(0)
            start = time.perf_counter(), time.process_time()
            if engine in make:
                ids = make[engine]()
            else:
                ids, metrics = self._fast(engine)
            self._synchronize()
            seconds, cpu_seconds = time.perf_counter() - start[0], time.process_time() - start[1]
        check_lengths(engine, ids, self.lengths)
        return Run(sum(map(len, ids)), seconds, cpu_seconds, peak(), metrics)

    def warm(self, engine: str) -> None:
        """The engine once on little: two rows of two tokens, all rows at full length where something is compiled."""
        if engine in COMPILED:
            self.run(engine)
            return
        prompts = [prompt[:2] for prompt in self.all_prompts[:2]]
        # all rows look like the first prompt, so that any may be given any length
        self._use(prompts, [2] * len(prompts), len(prompts), self.known[:1])
        try:
            self.run(engine)
        finally:
            self._use(self.all_prompts, self.all_lengths, self.case.group_size, self.known)

    def _use(self, prompts: list[list[int]], lengths: list[int], group_size: int, known: Tensor) -> None:
        self.prompts, self.lengths = prompts, lengths
        self.forcer = LengthForcer([lengths[i : i + group_size] for i in range(0, len(lengths), group_size)], known)
        self.settings = GenerationConfig(
            max_new_tokens=max(lengths), do_sample=True, pad_token_id=PAD, bos_token_id=None, eos_token_id=[END],
            temperature=1.0, top_p=1.0, top_k=0, min_p=None, repetition_penalty=1.0, cache_implementation=None,
            disable_compile=True,
        )  # fmt: skip

    @torch.no_grad()
    def _transformers(self) -> list[list[int]]:
        tensors = [torch.tensor(prompt) for prompt in self.prompts]
        ids = pad_sequence(tensors, batch_first=True, padding_value=PAD, padding_side="left").to(self.device)
        ones = [torch.ones_like(tensor) for tensor in tensors]
        mask = pad_sequence(ones, batch_first=True, padding_value=0, padding_side="left").to(self.device)
        with sampling_control(self.model, [self.forcer]):
            output = self.model.generate(input_ids=ids, attention_mask=mask, generation_config=self.settings)
        new = output[:, ids.size(1) :]
        ends = new == END
        length = torch.where(ends.any(dim=1), ends.int().argmax(dim=1) + 1, new.size(1))
        return [row[:count] for row, count in zip(new.tolist(), length.tolist(), strict=True)]

    @torch.no_grad()
    def _continuous(self) -> list[list[int]]:
        """What `generate_batch` does, but for a limit of new tokens of each request's own and no end token."""
        options = {
            "generation_config": self.settings,
            "continuous_batching_config": self._paging(),
            "workload_hints": WorkloadHints(max(map(len, self.prompts)), max(self.lengths), len(self.prompts)),
        }
        attention = self.model.config._attn_implementation
        results: dict[str, Any] = {}
        try:
            with self.model.continuous_batching_context_manager(**options, timeout=5) as manager:
                for row in sorted(range(len(self.prompts)), key=lambda row: self.prompts[row], reverse=True):
                    manager.add_request(
                        self.prompts[row], request_id=str(row), max_new_tokens=self.lengths[row], eos_token_id=-1
                    )
                while len(results) < len(self.prompts):
                    result = manager.get_result(timeout=1)
                    if result is not None and (result.error is not None or result.is_finished()):
                        results[result.request_id] = result
                    elif result is None and not manager.is_running():
                        raise RuntimeError(f"it stopped after {len(results)} of {len(self.prompts)} requests")
        finally:
            if self.model.config._attn_implementation != attention:
                self.model.set_attn_implementation(attention)
        errors = [result.error for result in results.values() if result.error is not None]
        if errors:
            raise RuntimeError(errors[0])
        # the end token was left in the vocabulary; it must not look like an end
        return [
            [PAD if token == END else token for token in results[str(row)].generated_tokens]
            for row in range(len(self.prompts))
        ]

    def _paging(self) -> ContinuousBatchingConfig:
        """TRL's default config; on a CPU with room for all rows at once."""
        if self.device.type != "cpu":
            return ContinuousBatchingConfig()
        pages = sum(-(-(len(p) + n) // PAGE) + 1 for p, n in zip(self.prompts, self.lengths, strict=True))
        tokens = max(len(self.prompts), 256)
        return ContinuousBatchingConfig(page_size=PAGE, num_blocks=pages, max_batch_tokens=tokens, use_cuda_graph=False)

    def _fast(self, engine: str) -> tuple[list[list[int]], LoopMetrics]:
        settings = LoopSettings(max_new_tokens=max(self.lengths), end_ids=(END,))
        keys = self.keys[: len(self.prompts)]
        with self._forward_of(engine):
            result = generate_rows(
                self.model, self.prompts, keys, settings, [self.forcer], record=engine == "fast_recorded"
            )
        return result.ids, result.metrics

    @contextmanager
    def _forward_of(self, engine: str) -> Iterator[None]:
        """The model with a compiled forward, where the engine has one; a limit of recompilation raises."""
        if engine not in COMPILED:
            yield
            return
        if engine not in self.compiled:
            self.compiled[engine] = torch.compile(self.model.forward, mode=COMPILED[engine], dynamic=True)
        self.model.forward = self.compiled[engine]
        try:
            with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
                yield
        finally:
            del self.model.forward

    @torch.no_grad()
    def _first_logits(self) -> Tensor:
        """(prompts, PROBE) logits after every prompt, computed one by one."""
        logits = []
        for prompt in self.all_prompts[:: self.case.group_size]:
            ids = torch.tensor([prompt], device=self.device)
            logits.append(self.model(input_ids=ids, use_cache=False, logits_to_keep=1).logits[0, -1, :PROBE].float())
        return torch.stack(logits)

    @contextmanager
    def _memory(self) -> Iterator[Callable[[], int | None]]:
        """Around a run: yields what tells its peak afterwards."""
        if self.device.type != "cuda":
            yield lambda: None
            return
        torch.cuda.empty_cache()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        yield lambda: torch.cuda.max_memory_allocated() - before

    def _synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()


def build_model(case: Case) -> Any:
    """A model of the case's shape with random weights."""
    torch.manual_seed(0)
    shape = SHAPES[case.shape]
    config = Qwen2Config(
        num_hidden_layers=shape.layers,
        hidden_size=shape.hidden,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        intermediate_size=shape.intermediate,
        vocab_size=shape.vocabulary,
        max_position_embeddings=case.prompt_length + case.longest + 1,
        tie_word_embeddings=True,
        pad_token_id=PAD,
        bos_token_id=None,
        eos_token_id=END,
    )
    return Qwen2ForCausalLM(config).to(case.device, getattr(torch, case.dtype)).eval()


# ---- figures


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, smallest and largest."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def ratios(base: Sequence[float], seconds: Sequence[float]) -> list[float]:
    """Of every repetition: seconds of the base by those of the engine, which is the ratio of their tokens/s."""
    return [before / after for before, after in zip(base, seconds, strict=True)]


def padded_work(case: Case, prompts: Sequence[Sequence[int]], lengths: Sequence[int]) -> dict[str, Any]:
    """Work of a padded batch, from its shape: every row is computed until the longest ends."""
    shape, rows = SHAPES[case.shape], len(lengths)
    width = max(map(len, prompts)) + max(lengths) - 1
    per_token = 2 * shape.layers * shape.kv_heads * (shape.hidden // shape.heads) * getattr(torch, case.dtype).itemsize
    steps = max(lengths) - 1
    return {
        "live_share": (sum(lengths) - rows) / (rows * steps) if steps else 1.0,
        "prefill_tokens_saved": 0,
        "peak_cache_bytes": rows * width * per_token,
    }


def figures(runs: Sequence[Run], base: Sequence[Run], work: Mapping[str, Any], memory: int | None) -> dict[str, Any]:
    """What is reported of one engine in one case."""
    seconds, cpu_seconds = [run.seconds for run in runs], [run.cpu_seconds for run in runs]
    peaks = [run.peak_bytes for run in runs if run.peak_bytes is not None]
    return {
        "tokens_per_second": spread([run.tokens / run.seconds for run in runs]),
        "ratio": spread(ratios([run.seconds for run in base], seconds)),
        "cpu_ratio": spread(ratios([run.cpu_seconds for run in base], cpu_seconds)),
        "seconds": seconds,
        "cpu_seconds": cpu_seconds,
        **work,
        "peak_memory_bytes": max(peaks) if peaks else memory,
    }


def work_of(bench: Bench, engine: str, runs: Sequence[Run]) -> dict[str, Any]:
    """Live share, saved prompt tokens and cache size; None where an engine does not tell."""
    metrics = runs[-1].metrics
    names = ("live_share", "prefill_tokens_saved", "peak_cache_bytes")
    if metrics is not None:
        return {name: getattr(metrics, name) for name in names}
    if engine == BASE:
        return padded_work(bench.case, bench.prompts, bench.lengths)
    return dict.fromkeys(names)


def failures(cases: Sequence[Mapping[str, Any]], clock: str) -> list[str]:
    """Where `fast` misses what it must hold: speed by the clock, memory never above that of `transformers`."""
    found = []
    for record in cases:
        fast, base = record["engines"]["fast"], record["engines"][BASE]
        least = LEAST_RATIO[record["case"]["lengths"]]
        ratio = fast["cpu_ratio" if clock == "cpu" else "ratio"]["median"]
        if ratio < least:
            found.append(
                f"{record['case']['name']}: fast makes {ratio:.3f} times the tokens/s, at least {least} wanted"
            )
        peaks = fast["peak_memory_bytes"], base["peak_memory_bytes"]
        if None not in peaks and peaks[0] > peaks[1] + NOISE[record["case"]["device"]]:
            own, other = map(mebibytes, peaks)
            found.append(f"{record['case']['name']}: fast takes {own} MiB at its peak, {BASE} {other} MiB")
    return found


# ---- measuring


@dataclass
class Measurement:
    """Runs of a case by engine, and why engines are missing."""

    runs: dict[str, list[Run]] = field(default_factory=dict)
    errors: dict[str, str] = field(default_factory=dict)
    compilation: dict[str, dict[str, int]] = field(default_factory=dict)
    """engine -> graphs compiled in all and during the timed runs, CUDA graphs that were given up"""


def measure(case: Case, engines: Sequence[str], repetitions: int, memory: bool) -> dict[str, Any]:
    """Figures of one case: all engines in every repetition, in rotating order."""
    bench, found = Bench(case), Measurement()
    for engine in engines:
        with _counted(found, engine, "graphs"):
            _attempt(found, engine, partial(bench.warm, engine))
    for repetition in range(repetitions):
        for engine in turned(engines, repetition):
            if engine in found.errors:
                continue
            with _counted(found, engine, "recompilations"):
                run = _attempt(found, engine, partial(bench.run, engine))
            if run is not None:
                found.runs.setdefault(engine, []).append(run)
    memory = memory and case.device == "cpu"
    measured = [engine for engine in engines if memory and engine in ENGINES and engine not in found.errors]
    peaks = {engine: peak_of_child(case, engine) for engine in measured}
    reported: dict[str, Any] = {}
    for engine in engines:
        if engine in found.errors:
            reported[engine] = {"error": found.errors[engine]}
            continue
        runs = found.runs[engine]
        reported[engine] = figures(runs, found.runs[BASE], work_of(bench, engine, runs), peaks.get(engine))
        if engine in COMPILED:
            reported[engine] |= found.compilation[engine]
    lengths = bench.lengths
    total = {"rows": len(lengths), "tokens": sum(lengths), "mean": sum(lengths) / len(lengths), "longest": max(lengths)}
    return {"case": dataclasses.asdict(case), "lengths": total, "engines": reported}


def _attempt(found: Measurement, engine: str, action: Callable[[], Any]) -> Any:
    """The action's result; the failure of an engine that may fail is kept and printed, wrong lengths never pass."""
    try:
        return action()
    except WrongLengths:
        raise
    except Exception as error:
        if engine in MUST_RUN:
            raise
        lines = str(error).strip().splitlines()
        found.errors[engine] = f"{type(error).__name__}: {lines[0] if lines else 'no message'}"
        found.runs.pop(engine, None)
        return None


@contextmanager
def _counted(found: Measurement, engine: str, name: str) -> Iterator[None]:
    """Add what torch compiles in the block to the engine's count of this name."""
    counters = torch._dynamo.utils.counters
    before = counters["stats"]["unique_graphs"], counters["inductor"]["cudagraph_skips"]
    yield
    if engine in COMPILED:
        counts = found.compilation.setdefault(engine, {"graphs": 0, "recompilations": 0, "cuda_graphs_skipped": 0})
        counts[name] += int(counters["stats"]["unique_graphs"] - before[0])
        counts["cuda_graphs_skipped"] += int(counters["inductor"]["cudagraph_skips"] - before[1])


def memory_of(case: Case, engine: str) -> int:
    """Bytes by which a rollout raises the resident set, for a process that does nothing else."""
    bench = Bench(case)
    bench.warm(engine)
    gc.collect()
    before = resident_bytes(reset=True)
    bench.run(engine)
    return resident_bytes() - before


def peak_of_child(case: Case, engine: str) -> int | None:
    """`memory_of` in a process of its own; None where the engine fails there."""
    try:
        return int(memory_apart(__file__, engine, case=dataclasses.asdict(case), engine=engine)["peak_bytes"])
    except RuntimeError:
        if engine in MUST_RUN:
            raise
        return None


def run_child(settings: str) -> None:
    """The other side of `peak_of_child`."""
    given = json.loads(settings)
    torch.set_num_threads(given["threads"])
    print(json.dumps({"peak_bytes": memory_of(Case(**given["case"]), given["engine"])}))


# ---- the command


def suite(device: str, dtype: str) -> list[Case]:
    """The cases of the documentation."""
    case = Case(device=device, dtype=dtype)
    if device == "cuda":
        big = dataclasses.replace(case, shape="0.5b")
        return [
            dataclasses.replace(big, name=f"{lengths}-{batch}", groups=batch // 16, lengths=lengths, mean=mean)
            for batch in (64, 256)
            for lengths, mean in (("lognormal", 89), ("equal", 128))
        ] + [dataclasses.replace(big, name="ragged-64", ragged=True)]
    equal = dataclasses.replace(case, lengths="equal")
    return [
        dataclasses.replace(case, name="lognormal"),
        dataclasses.replace(case, name="ragged", ragged=True),
        dataclasses.replace(equal, name="equal-long", mean=160),
        dataclasses.replace(equal, name="equal-short", mean=16),
        dataclasses.replace(case, name="short-prompts", prompt_length=16),
        dataclasses.replace(equal, name="equal-short-prompts", prompt_length=16, mean=160),
        dataclasses.replace(equal, name="equal-alone", groups=16, group_size=1, prompt_length=64, mean=128),
        dataclasses.replace(
            equal, name="equal-small", shape="small", groups=32, group_size=1, prompt_length=32, mean=384
        ),
    ]


def machine(options: argparse.Namespace) -> dict[str, Any]:
    """Where the figures come from."""
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    facts: dict[str, Any] = {"device": device_name(options.device), **versions}
    if options.device == "cuda":
        return facts
    return facts | {"cores": os.cpu_count(), "threads": torch.get_num_threads()}


def _spread_text(figures: Mapping[str, float], digits: int) -> str:
    return f"{figures['median']:.{digits}f} ({figures['min']:.{digits}f}-{figures['max']:.{digits}f})"


def show(record: Mapping[str, Any], facts: Mapping[str, Any], repetitions: int) -> None:
    """The table of one case."""
    case, lengths = Case(**record["case"]), record["lengths"]
    prompts = f"{'up to ' if case.ragged else ''}{case.prompt_length} tokens"
    title = (
        f"{case.name}: {case.shape}, {case.dtype}, {case.groups} prompts of {prompts} x {case.group_size} completions, "
        f"{case.lengths}, mean {lengths['mean']:.0f}, longest {lengths['longest']}; {repetitions} repetition(s) on "
        f"{facts['device']}"
    )
    title += f", {facts['threads']} thread(s)" if "threads" in facts else ""
    columns = ("engine", "tokens/s", "ratio", "CPU ratio", "live", "prefill saved", "cache MiB", "peak MiB")
    table = Table(*columns, title=title)
    for engine, found in record["engines"].items():
        if "error" in found:
            table.add_row(engine, "did not run", *["-"] * (len(columns) - 2))
            continue
        live = "-" if found["live_share"] is None else f"{found['live_share']:.2f}"
        saved = "-" if found["prefill_tokens_saved"] is None else str(found["prefill_tokens_saved"])
        table.add_row(
            engine,
            _spread_text(found["tokens_per_second"], 0),
            _spread_text(found["ratio"], 2),
            _spread_text(found["cpu_ratio"], 2) if case.device == "cpu" else "-",
            live,
            saved,
            mebibytes(found["peak_cache_bytes"]),
            mebibytes(found["peak_memory_bytes"]),
        )
    console = Console(width=140)
    console.print(table)
    for engine, found in record["engines"].items():
        if "error" in found:
            console.print(f"{engine} did not run: {found['error']}", markup=False)
        elif "recompilations" in found:
            console.print(
                f"{engine}: {found['graphs']} graphs compiled before and {found['recompilations']} during the timed "
                f"runs, CUDA graphs given up {found['cuda_graphs_skipped']} times"
            )


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line, with defaults filled in."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], help="default: float32 on a CPU, else bfloat16")
    parser.add_argument("--threads", type=int, help="on a CPU; default: torch's")
    parser.add_argument("--shape", choices=list(SHAPES), default=Case.shape)
    parser.add_argument("--groups", type=int, default=Case.groups, help="prompts")
    parser.add_argument("--group-size", type=int, default=Case.group_size, help="completions of a prompt")
    parser.add_argument("--batch", type=int, help="completions in all, in place of --groups")
    parser.add_argument("--prompt-length", type=int, default=Case.prompt_length, help="tokens")
    parser.add_argument("--ragged", action="store_true", help="prompts from an eighth of that length to all of it")
    parser.add_argument("--lengths", choices=list(LEAST_RATIO), default=Case.lengths)
    parser.add_argument("--mean", type=float, default=Case.mean, help="tokens of a completion")
    parser.add_argument("--sigma", type=float, default=Case.sigma, help="of log-normal lengths")
    parser.add_argument("--longest", type=int, default=Case.longest, help="tokens of a completion at most")
    parser.add_argument("--suite", action="store_true", help="the cases of the documentation in place of one")
    parser.add_argument("--only", help="cases of the suite, by name, with commas")
    parser.add_argument("--engines", default=",".join(ENGINES), help="with commas; transformers is always measured")
    parser.add_argument("--compile", action="store_true", help="also the fast loop with a compiled forward")
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--no-memory", action="store_true", help="no process per engine for its memory on a CPU")
    parser.add_argument("--clock", choices=["wall", "cpu"], default="wall", help="what --check reads")
    parser.add_argument("--check", action="store_true", help="exit with 1 where the fast loop misses its marks")
    parser.add_argument("--out", type=Path, help="JSON file for the figures")
    parser.add_argument("--memory-of", help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    options.dtype = options.dtype or ("float32" if options.device == "cpu" else "bfloat16")
    unknown = sorted(set(options.engines.split(",")) - set(ENGINES))
    if unknown:
        parser.error(f"--engines {unknown} unknown; allowed: {', '.join(ENGINES)}")
    if options.check and "fast" not in options.engines.split(","):
        parser.error(f"--check needs the engine fast, --engines is {options.engines}")
    at_least_one(parser, options, ("repetitions", "groups", "group_size", "prompt_length", "longest"))
    if options.mean < 1 or options.sigma < 0:
        parser.error(f"--mean {options.mean} must be at least 1, --sigma {options.sigma} at least 0")
    if options.batch is not None and (options.batch < 1 or options.batch % options.group_size):
        parser.error(f"--batch {options.batch} must be a positive multiple of --group-size {options.group_size}")
    if options.only and not options.suite:
        parser.error("--only names cases of --suite, which is not given")
    return options


def chosen_cases(options: argparse.Namespace) -> list[Case]:
    """The suite or its part, or the one case of the options.

    Raises:
        SystemExit: a name that the suite does not have.
    """
    if options.suite:
        cases = suite(options.device, options.dtype)
        names = options.only.split(",") if options.only else [case.name for case in cases]
        unknown = sorted(set(names) - {case.name for case in cases})
        if unknown:
            raise SystemExit(f"--only {unknown} unknown; allowed: {', '.join(case.name for case in cases)}")
        return [case for case in cases if case.name in names]
    fields = {f.name: getattr(options, f.name) for f in dataclasses.fields(Case) if f.name != "name"}
    if options.batch is not None:
        fields["groups"] = options.batch // options.group_size
    return [Case(**fields)]


def chosen_engines(options: argparse.Namespace) -> list[str]:
    """Engines in the order of the tables."""
    asked = options.engines.split(",")
    engines = [engine for engine in ENGINES if engine == BASE or engine in asked]
    if options.compile:
        if options.device == "cpu" and not (os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")):
            print("--compile: no C++ compiler (g++, clang++ or $CXX) was found; nothing is compiled")
            return engines
        engines += [engine for engine in COMPILED if engine != "fast_graphs" or options.device == "cuda"]
    return engines


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print, write; 1 where `--check` fails."""
    options = arguments(argv)
    transformers.utils.logging.set_verbosity_error()
    if options.memory_of:
        run_child(options.memory_of)
        return 0
    if options.threads:
        torch.set_num_threads(options.threads)
    facts, engines = machine(options), chosen_engines(options)
    records = []
    for case in chosen_cases(options):
        records.append(measure(case, engines, options.repetitions, not options.no_memory))
        show(records[-1], facts, options.repetitions)
    missed = failures(records, options.clock) if options.check else []
    for line in missed:
        print(line)
    if options.out:
        command = command_line("bench_rollout.py", argv)
        record = {"command": command, "machine": facts, "repetitions": options.repetitions, "cases": records}
        options.out.write_text(json.dumps(record | {"missed": missed}, indent=2) + "\n")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
