"""What selection saves: time of the update phase with parts of a rollout, against the full batch.

    python scripts/bench_update.py [--repetitions 7] [--device cpu] [--model small] [--completion 448]

The update phase is everything from a scored and selected rollout to the last optimizer step: forward, backward,
clipping, optimizer. Generation, rewards, the old policy's scoring and the selection itself are not in it. Weights and
completions are random; all completions have the same length, so that nothing is saved by trimming padding, and every
kept row keeps its own 20 % of tokens, so that no row leaves for want of tokens. The variants are interleaved inside
every repetition, and the ratio to the full batch is taken within the repetition.

On a CPU, TRL's head would allocate tiles wider than a small vocabulary and fault their pages in anew every time. The
tile is cut to the vocabulary and freed memory is kept, for all variants; without that the savings look larger.

Models: `small` has 4 layers (hidden 256, vocabulary 8192), `0.5b` the shape of Qwen2.5-0.5B.
"""

from __future__ import annotations

import argparse
import logging
import os
import platform
import tempfile
import time
import warnings
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
import transformers
import trl.trainer.utils
from datasets import Dataset
from measuring import keep_freed_memory, ratio_table, turned
from rich.console import Console
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, PrinterCallback, Qwen2Config, Qwen2ForCausalLM, TrainerCallback

from rltok.trainers import CreditConfig, CreditTrainer

HALF = {"type": "d3s", "rows_start": 0.5, "rows_end": 0.5, "tokens_start": 1.0, "tokens_end": 1.0}
FIFTH = HALF | {"tokens_start": 0.2, "tokens_end": 0.2, "token_scope": "sample"}
VARIANTS: dict[str, dict[str, Any] | None] = {
    "full batch": None,
    "1/2 of the rollouts": HALF,
    "1/2, 20 % of tokens, old entropies": FIFTH | {"entropy_from": "old"},
    "1/2, 20 % of tokens, two-stage head": FIFTH | {"entropy_from": "micro"},
    "all, 20 % of tokens, old entropies": FIFTH | {"rows_start": 1.0, "rows_end": 1.0, "entropy_from": "old"},
}
SHAPES = {
    "small": {"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 4, "vocab_size": 8192}
    | {"num_attention_heads": 8, "num_key_value_heads": 2},
    "0.5b": {"hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24, "vocab_size": 151936}
    | {"num_attention_heads": 14, "num_key_value_heads": 2, "tie_word_embeddings": True},
}
GROUP, ACCUMULATION, WINDOWS = 8, 4, 2


class Clock(TrainerCallback):
    """Sums the time between begin and end of every optimizer step."""

    seconds = 0.0

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.start = now()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.seconds += now() - self.start


class RandomRollouts(CreditTrainer):
    """Random completions of one length; keeps the time of everything that comes before an update."""

    before = 0.0

    def _generate_single_turn(self, prompt_ids: Any, *args: Any, **kwargs: Any) -> Any:
        shape = (len(prompt_ids), self.max_completion_length)
        return torch.randint(3, self._causal_lm.config.vocab_size, shape).tolist(), None

    def _prepare_inputs(self, batch: Any) -> Any:
        start = now()
        result = super()._prepare_inputs(batch)
        self.before += now() - start
        return result


def now() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def random_reward(completions: list[str], **_: Any) -> list[float]:
    return torch.rand(len(completions)).tolist()


def build(selection: dict[str, Any] | None, options: argparse.Namespace, folder: str) -> tuple[CreditTrainer, Clock]:
    torch.manual_seed(0)
    cuda = options.device == "cuda"
    model = Qwen2ForCausalLM(Qwen2Config(**SHAPES[options.model], max_position_embeddings=8192, pad_token_id=0))
    words = {f"t{i}": i for i in range(model.config.vocab_size)}
    core = Tokenizer(models.WordLevel(words, unk_token="t2"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    prompt = " ".join(f"t{3 + i}" for i in range(options.prompt))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, pad_token="t0", eos_token="t1", padding_side="left")
    args = CreditConfig(
        output_dir=folder,
        per_device_train_batch_size=options.batch,
        gradient_accumulation_steps=ACCUMULATION,
        steps_per_generation=ACCUMULATION * WINDOWS,
        num_generations=GROUP,
        max_completion_length=options.completion,
        max_steps=WINDOWS,
        learning_rate=1e-6,
        lr_scheduler_type="constant",
        gradient_checkpointing=options.checkpointing,
        bf16=cuda,
        use_cpu=not cuda,
        report_to="none",
        save_strategy="no",
        logging_steps=WINDOWS,
        disable_tqdm=True,
        selection=selection,
    )
    clock = Clock()
    data = Dataset.from_list([{"prompt": prompt}] * (options.batch * ACCUMULATION * WINDOWS // GROUP))
    trainer = RandomRollouts(
        model, random_reward, args, train_dataset=data, processing_class=tokenizer, callbacks=[clock]
    )
    trainer.remove_callback(PrinterCallback)
    return trainer, clock


def seconds(trainer: Any, clock: Clock, seed: int) -> float:
    """Update time of one rollout."""
    torch.manual_seed(seed)
    clock.seconds = trainer.before = 0.0
    trainer.train()
    return clock.seconds - trainer.before


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repetitions", type=int, default=7)
    parser.add_argument("--model", choices=list(SHAPES), default="small")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--batch", type=int, default=4, help="rows per micro-batch")
    parser.add_argument("--prompt", type=int, default=64, help="tokens")
    parser.add_argument("--completion", type=int, default=448, help="tokens")
    parser.add_argument("--checkpointing", action="store_true", help="gradient checkpointing")
    parser.add_argument("--threads", type=int, default=1, help="on the CPU")
    options = parser.parse_args()
    if options.batch * ACCUMULATION * WINDOWS % GROUP:
        parser.error(f"--batch {options.batch}: rows per rollout must be a multiple of {GROUP}")
    warnings.filterwarnings("ignore")
    transformers.utils.logging.set_verbosity_error()
    logging.disable(logging.WARNING)
    torch.set_num_threads(options.threads)
    if options.device == "cpu":
        keep_freed_memory()
        trl.trainer.utils._CHUNKED_LOGPROB_CHUNK_SIZE = min(32768, SHAPES[options.model]["vocab_size"])

    with tempfile.TemporaryDirectory() as folder:
        trainers = {name: build(selection, options, folder) for name, selection in VARIANTS.items()}
        times: dict[str, list[float]] = {name: [] for name in VARIANTS}
        for repetition in range(-1, options.repetitions):  # the first warms up
            for name in turned(list(VARIANTS), repetition):
                value = seconds(*trainers[name], seed=repetition + 1)
                if repetition >= 0:
                    times[name].append(value)

    cuda = options.device == "cuda"
    machine = torch.cuda.get_device_name() if cuda else f"{platform.machine()} CPU, {options.threads} thread(s)"
    rows = options.batch * ACCUMULATION * WINDOWS
    length = options.prompt + options.completion
    title = f"{rows} rollouts of {length} tokens, {options.model}, {options.repetitions} runs on {machine}"
    Console(width=110).print(ratio_table(title, "update phase with", times))


if __name__ == "__main__":
    main()
