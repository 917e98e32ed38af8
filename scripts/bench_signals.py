"""What attention signals cost: a forward pass with the probe, against the plain pass and against full attention maps.

    python scripts/bench_signals.py [--repetitions 5] [--tokens 2048] [--memory-tokens 4096] [--device cpu]

Random weights, 28 layers of Qwen3's kind (hidden 512, 8 query and 4 key heads of 64), fp32, one sequence of which the
last 7/8 are completion, one thread. Time: plain SDPA forward of the body; the same with the probe on the 5 default
layers; the probe stopping after the last of them; eager attention with `output_attentions=True` and the signals from
the dense maps. Interleaved, ratio to the plain pass within each repetition; CPU seconds on a CPU. Memory: growth of the
process's peak resident size, first over plain passes, then over passes with the probe, in fresh processes that hand
freed memory back at once; with glibc's defaults the gaps that the heap keeps make this figure vary by tens of MiB.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import platform
import statistics
import time
from collections.abc import Callable

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
from measuring import ratio_table, resident_bytes, return_freed_memory, turned
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers import Qwen3Config, Qwen3ForCausalLM

from rltok.attention import attention_statistics, default_layers

LAYERS, HEADS, WINDOW, HORIZON = 28, 8, 10, (10, 100)


def build(device: str, implementation: str = "sdpa") -> Qwen3ForCausalLM:
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=8192, hidden_size=512, intermediate_size=1536, num_hidden_layers=LAYERS, num_attention_heads=HEADS,
        num_key_value_heads=4, head_dim=64, max_position_embeddings=65536, attn_implementation=implementation,
    )  # fmt: skip
    return Qwen3ForCausalLM(config).eval().to(device)


def batch(tokens: int, device: str) -> tuple[Tensor, Tensor, Tensor]:
    ids = torch.randint(3, 8192, (1, tokens), generator=torch.Generator().manual_seed(1)).to(device)
    return ids, torch.ones_like(ids), torch.ones_like(ids)[:, tokens // 8 :]


@torch.no_grad()
def plain(model: Qwen3ForCausalLM, ids: Tensor, mask: Tensor, response: Tensor) -> None:
    model.model(input_ids=ids, attention_mask=mask, use_cache=False)


def probed(model: Qwen3ForCausalLM, ids: Tensor, mask: Tensor, response: Tensor) -> None:
    attention_statistics(model, ids, mask, response, window=WINDOW, horizon=HORIZON, stop_early=False)


def stopped(model: Qwen3ForCausalLM, ids: Tensor, mask: Tensor, response: Tensor) -> None:
    attention_statistics(model, ids, mask, response, window=WINDOW, horizon=HORIZON, stop_early=True)


@torch.no_grad()
def dense(model: Qwen3ForCausalLM, ids: Tensor, mask: Tensor, response: Tensor) -> None:
    """Full maps of every layer, and the three signals of the default layers from them."""
    output = model.model(input_ids=ids, attention_mask=mask, use_cache=False, output_attentions=True)
    tokens = ids.size(1)
    distance = torch.arange(tokens, device=ids.device)[:, None] - torch.arange(tokens, device=ids.device)
    rows = slice(tokens - response.size(1), None)
    near = distance.clamp(0, WINDOW)[rows].float()
    ahead = ((distance >= HORIZON[0]) & (distance <= HORIZON[1]))[rows].float()
    for layer in default_layers(LAYERS):
        maps = output.attentions[layer][0, :, rows]
        (maps * distance[rows]).sum((1, 2)), (maps * near).sum(-1), (maps * ahead).sum(1)


VARIANTS: dict[str, Callable[..., None]] = {
    "plain SDPA forward": plain,
    "with the probe, 5 layers": probed,
    "probe, stop after the last layer": stopped,
    "eager, output_attentions": dense,
}


def seconds(run: Callable[..., None], model: Qwen3ForCausalLM, inputs: tuple[Tensor, Tensor, Tensor]) -> float:
    start = time.process_time() if not ids_on_gpu(inputs) else time.perf_counter()
    run(model, *inputs)
    if ids_on_gpu(inputs):
        torch.cuda.synchronize()
        return time.perf_counter() - start
    return time.process_time() - start


def ids_on_gpu(inputs: tuple[Tensor, Tensor, Tensor]) -> bool:
    return inputs[0].is_cuda


def growth(tokens: int, queue: multiprocessing.Queue) -> None:
    """Peak resident MiB that passes with the probe add to what plain passes needed."""
    return_freed_memory()
    torch.set_num_threads(1)
    model, inputs = build("cpu"), batch(tokens, "cpu")
    loaded = resident_bytes()
    for _ in range(3):
        plain(model, *inputs)
    forward = resident_bytes()
    for _ in range(3):
        probed(model, *inputs)
    queue.put(((forward - loaded) / 2**20, (resident_bytes() - forward) / 2**20))


def times_table(options: argparse.Namespace) -> Table:
    models = {name: build(options.device, "eager" if run is dense else "sdpa") for name, run in VARIANTS.items()}
    inputs = batch(options.tokens, options.device)
    times: dict[str, list[float]] = {name: [] for name in VARIANTS}
    for repetition in range(-1, options.repetitions):  # the first warms up
        for name in turned(list(VARIANTS), repetition):
            value = seconds(VARIANTS[name], models[name], inputs)
            if repetition >= 0:
                times[name].append(value)
    machine = torch.cuda.get_device_name() if options.device == "cuda" else f"{platform.machine()} CPU, 1 thread"
    title = f"{options.tokens} tokens, {LAYERS} layers, {options.repetitions} runs on {machine}"
    return ratio_table(title, "pass", times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repetitions", type=int, default=5, help="0 leaves the times out")
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--memory-tokens", type=int, default=4096, help="0 leaves the memory out")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args()
    torch.set_num_threads(1)
    console = Console(width=110)
    if options.repetitions:
        console.print(times_table(options))
    if options.memory_tokens and platform.system() == "Linux":
        context = multiprocessing.get_context("spawn")
        queue: multiprocessing.Queue = context.Queue()
        found = []
        for _ in range(3):
            process = context.Process(target=growth, args=(options.memory_tokens, queue))
            process.start()
            found.append(queue.get())
            process.join()
        plain_peak, extra = zip(*found, strict=True)
        console.print(
            f"{options.memory_tokens} tokens, {HEADS} heads per layer, 3 processes: plain passes raise the peak memory "
            f"by {statistics.median(plain_peak):.0f} MiB (median), passes with the probe by {min(extra):.0f}, "
            f"{statistics.median(extra):.0f}, {max(extra):.0f} MiB more (min, median, max)"
        )


if __name__ == "__main__":
    main()
