"""What decoding control costs: a decode step with all processors and the recorder, against the same step without them.

    python scripts/bench_decoding.py [--repetitions 3] [--steps 8] [--device cpu] [--out results.json]

A model of the shape of Qwen2.5-0.5B (24 layers, hidden 896, tied embeddings of 151,936 tokens) with random weights
generates for 64 prompts at once, through `generate`. A step is the time from one call of the first logits processor to
the next, so the pass over the prompt is not in it: one forward pass, processors, one draw. The variants are interleaved
inside every repetition, their order alternates, and the ratio is that of the median steps within a repetition. No token
ends a row; sampling is at temperature 1 without truncation, the cheapest plain step there is. Times are CPU seconds of
the process, all threads together, on a CPU, so that other work on the machine does not count; `--clock wall` for a
quiet one and on a GPU.

`all` is every decoding method, in their costly form (words forbidden, a budget that runs out half way), with the
recorder of log-probabilities. The second table is the time inside each of them, by a clock around its call.

`--tiny` is a small model and vocabulary, to see the script run.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
import transformers
from measuring import command_line, device_name
from rich.console import Console
from rich.table import Table
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList, PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

from rltok.entropy import entropy_stats
from rltok.sampling import (
    DECODING,
    DecodingContext,
    RolloutProcessor,
    SampledLogps,
    make_processors,
    sampling_control,
)
from rltok.sampling.suppression import SUPPRESSED_WORDS
from rltok.sampling.words import REFLECTION_WORDS, SPACE_MARKS, THINK_END

RECORDER = "recorder"
CLOCKS = {"cpu": time.process_time, "wall": time.perf_counter}
TINY = {"layers": 2, "vocabulary": 2048, "batch": 4, "prompt": 4, "steps": 4, "repetitions": 2}


class Clock(LogitsProcessor):
    """Notes the time of every call; in between lies one decode step."""

    def __init__(self, now: Callable[[], float]) -> None:
        self.now, self.times = now, list[float]()

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self.times.append(self.now())
        return scores

    @property
    def steps(self) -> list[float]:
        return [after - before for before, after in zip(self.times, self.times[1:], strict=False)]


class Timed(RolloutProcessor):
    """A processor with a clock around its call; the first, which follows the prompt, is not kept."""

    def __init__(self, inner: Any, now: Callable[[], float]) -> None:
        self.inner, self.now, self.seconds = inner, now, list[float]()

    def begin(self, prompt_length: int, settings: Any) -> None:
        self.inner.begin(prompt_length, settings)

    def reset(self) -> None:
        self.inner.reset()

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        start = self.now()
        scores = self.inner(input_ids, scores)
        self.seconds.append(self.now() - start)
        return scores


def read_clock(options: argparse.Namespace) -> Callable[[], float]:
    """Seconds of the chosen clock, after all work that a GPU still has."""

    def after_the_gpu() -> float:
        torch.cuda.synchronize()
        return CLOCKS[options.clock]()

    return after_the_gpu if options.device == "cuda" else CLOCKS[options.clock]


def build_model(options: argparse.Namespace) -> Qwen2ForCausalLM:
    torch.manual_seed(0)
    shape = {"hidden_size": 896, "intermediate_size": 4864, "num_attention_heads": 14, "num_key_value_heads": 2}
    if options.tiny:
        shape = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2, "num_key_value_heads": 1}
    config = Qwen2Config(
        **shape,
        num_hidden_layers=options.layers,
        vocab_size=options.vocabulary,
        tie_word_embeddings=True,
        max_position_embeddings=options.prompt + options.steps + 1,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=None,
    )
    return Qwen2ForCausalLM(config).to(options.device, getattr(torch, options.dtype)).eval()


def build_tokenizer(size: int) -> PreTrainedTokenizerFast:
    """As many tokens as the model has, among them every spelling of the methods' words."""
    words = [f"{mark}{form}" for word in (*REFLECTION_WORDS, *SUPPRESSED_WORDS) for mark in ("", *SPACE_MARKS)
             for form in (word, word.lower(), word.capitalize(), word.upper())]  # fmt: skip
    named = list(dict.fromkeys(["<pad>", "</s>", THINK_END, *words]))
    vocabulary = {word: i for i, word in enumerate([*named, *(f"t{i}" for i in range(len(named), size))])}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", eos_token="</s>", padding_side="left")


def build_processors(options: argparse.Namespace, tokenizer: PreTrainedTokenizerFast) -> dict[str, RolloutProcessor]:
    """Decoding method -> its processor, in the order in which they run."""
    changes: dict[str, dict[str, Any]] = {
        "cyclic_reflex": {"period": float(options.steps), "windows": None},
        "budget_forcing": {"max_tokens": max(1, options.steps // 2)},
    }
    middle = torch.log(torch.tensor(options.vocabulary)) * torch.tensor([[0.1, 0.5, 0.8, 0.9, 0.95, 0.99]])
    stats = entropy_stats(middle.to(options.device), torch.ones_like(middle, device=options.device))
    context = DecodingContext(1.0, stats, tokenizer)
    found = {}
    for name in sorted(DECODING, key=lambda name: (DECODING[name].stage == "temperature", DECODING[name].forces)):
        for processor in make_processors([DECODING[name](**changes.get(name, {}))], context):
            found[name] = processor
    return found


class Bench:
    """One model, one batch of prompts, and what `generate` takes with some processors on it."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.model = build_model(options)
        self.now = read_clock(options)
        self.steps = options.steps + 1  # the first follows the prompt
        ids = torch.randint(1, options.vocabulary, (options.batch, options.prompt))
        self.inputs = {"input_ids": ids.to(options.device)}
        self.inputs["attention_mask"] = torch.ones_like(self.inputs["input_ids"])

    def generate(self, processors: Sequence[RolloutProcessor], recorder: Any = None) -> list[float]:
        """Seconds of every decode step."""
        clock = Clock(self.now)
        with sampling_control(self.model, processors, recorder):
            self._sample(clock)
        return clock.steps

    def plain(self) -> list[float]:
        """Seconds of every decode step of `generate` left alone."""
        clock = Clock(self.now)
        self._sample(clock)
        return clock.steps

    def _sample(self, clock: Clock) -> None:
        torch.manual_seed(0)
        out = self.model.generate(
            **self.inputs, do_sample=True, temperature=1.0, top_k=0, top_p=1.0, max_new_tokens=self.steps,
            logits_processor=LogitsProcessorList([clock]),
        )  # fmt: skip
        assert out.size(1) == self.inputs["input_ids"].size(1) + self.steps


def machine(options: argparse.Namespace) -> dict[str, Any]:
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    facts: dict[str, Any] = {"device": device_name(options.device), **versions}
    return facts if options.device == "cuda" else facts | {"threads": torch.get_num_threads()}


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Median seconds of a step and the ratio per repetition, and the seconds inside every processor."""
    bench, tokenizer = Bench(options), build_tokenizer(options.vocabulary)
    processors = build_processors(options, tokenizer)
    plain, controlled = list[list[float]](), list[list[float]]()
    inside: dict[str, list[float]] = {name: [] for name in (*processors, RECORDER)}
    for repetition in range(-1, options.repetitions):  # the first warms up
        runs = {"plain": bench.plain, "all": lambda: bench.generate([*processors.values()], SampledLogps())}
        names = list(runs) if repetition % 2 else list(runs)[::-1]
        times = {name: runs[name]() for name in names}
        alone = {
            name: Timed(processor, bench.now) for name, processor in [*processors.items(), (RECORDER, SampledLogps())]
        }
        bench.generate([alone[name] for name in processors], alone[RECORDER])
        if repetition >= 0:
            plain.append(times["plain"])
            controlled.append(times["all"])
            for name, timed in alone.items():
                inside[name] += timed.seconds[1:]
    ratios = [statistics.median(b) / statistics.median(a) for a, b in zip(plain, controlled, strict=True)]
    return {
        "plain_s": [statistics.median(values) for values in plain],
        "all_s": [statistics.median(values) for values in controlled],
        "ratio": ratios,
        "ratio_median": statistics.median(ratios),
        "inside_s": {name: statistics.median(values) for name, values in inside.items()},
    }


def show(options: argparse.Namespace, found: dict[str, Any], facts: dict[str, Any]) -> None:
    step = statistics.median(found["plain_s"])
    title = (
        f"batch {options.batch}, vocabulary {options.vocabulary}, {options.layers} layers, {options.dtype}, "
        f"{options.repetitions} x {options.steps} steps on {facts['device']}"
    )
    title += f", {facts['threads']} thread(s)" if "threads" in facts else ""
    unit = "CPU ms" if options.clock == "cpu" else "ms"
    table = Table("decode step", f"{unit} (median)", "ratio min", "median", "max", title=title)
    table.add_row("plain", f"{1e3 * step:.1f}", *["1.000"] * 3)
    figures = (min(found["ratio"]), found["ratio_median"], max(found["ratio"]))
    controlled = statistics.median(found["all_s"])
    table.add_row("all, recorded", f"{1e3 * controlled:.1f}", *(f"{figure:.3f}" for figure in figures))
    console = Console(width=110)
    console.print(table)
    table = Table("processor", f"{unit} (median)", "share of a plain step", title="time inside a processor")
    parts = {**found["inside_s"], "sum": sum(found["inside_s"].values())}
    for name, seconds in parts.items():
        table.add_row(name, f"{1e3 * seconds:.2f}", f"{seconds / step:.2%}")
    console.print(table)


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], help="default: float32 on a CPU, else bfloat16")
    parser.add_argument("--threads", type=int, help="on a CPU; default: torch's")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--vocabulary", type=int, default=151936)
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--prompt", type=int, default=8, help="tokens")
    parser.add_argument("--steps", type=int, default=8, help="decode steps per generate call")
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--out", type=Path, help="JSON file for the figures")
    parser.add_argument("--tiny", action="store_true", help="a small model and vocabulary")
    parser.add_argument("--clock", choices=list(CLOCKS), help="default: cpu on a CPU, else wall")
    options = parser.parse_args(argv)
    if options.tiny:
        for name, value in TINY.items():
            if getattr(options, name) == parser.get_default(name):
                setattr(options, name, value)
    options.dtype = options.dtype or ("float32" if options.device == "cpu" else "bfloat16")
    options.clock = options.clock or ("cpu" if options.device == "cpu" else "wall")
    if options.steps < 2 or options.repetitions < 1:
        parser.error(f"--steps {options.steps} must be at least 2, --repetitions {options.repetitions} at least 1")
    return options


def main(argv: Sequence[str] | None = None) -> None:
    options = arguments(argv)
    transformers.utils.logging.set_verbosity_error()
    if options.threads:
        torch.set_num_threads(options.threads)
    facts = machine(options)
    found = measure(options)
    show(options, found, facts)
    if options.out:
        settings = {name: value for name, value in vars(options).items() if name not in ("out", "threads")}
        command = command_line("bench_decoding.py", argv)
        record = {"command": command, "machine": facts, "settings": settings, **found}
        options.out.write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
