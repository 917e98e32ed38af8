"""Builders shared by the tests and by the scripts that tests start as processes of their own."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from datasets import Dataset
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

CHARACTERS = "0123456789+-=*/ abcdefghijklmnopqrstuvwxyz<>?.,:\n"

SCRIPTS = Path(__file__).parents[1] / "scripts"


def load_script(name: str) -> ModuleType:
    """A module of `scripts/`, which finds its neighbours there as it does when it is run."""
    if str(SCRIPTS) not in sys.path:
        sys.path.append(str(SCRIPTS))
    return importlib.import_module(name)


def run_settings(folder: object, **changes: object) -> dict:
    """Settings of a tiny training run on the CPU: three updates per rollout, each of two micro-batches."""
    settings: dict[str, object] = {
        "output_dir": str(folder),
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 2,
        "steps_per_generation": 6,
        "num_generations": 4,
        "max_completion_length": 8,
        "max_steps": 3,
        "learning_rate": 5e-3,
        "epsilon": 0.2,
        "epsilon_high": 0.28,
        "logging_steps": 1,
        "report_to": [],
        "save_strategy": "no",
        "use_cpu": True,
        "disable_tqdm": True,
        "bf16": False,
    }
    return settings | changes


def build_tokenizer() -> PreTrainedTokenizerFast:
    """One token per character."""
    vocabulary = {"<pad>": 0, "<eos>": 1, "<unk>": 2} | {c: i + 3 for i, c in enumerate(CHARACTERS)}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>", padding_side="left"
    )
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m['role'][0] }}:{{ m['content'] }}\n{% endfor %}"
        "{% if add_generation_prompt %}a:{% endif %}"
    )
    return tokenizer


def build_model(tokenizer: PreTrainedTokenizerFast, seed: int = 0, **changes: object) -> Qwen3ForCausalLM:
    """Two layers, about 20 thousand parameters, random."""
    torch.manual_seed(seed)
    settings: dict[str, object] = {
        "vocab_size": len(tokenizer),
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 256,
        "pad_token_id": tokenizer.pad_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "bos_token_id": None,
    }
    return Qwen3ForCausalLM(Qwen3Config(**(settings | changes)))


def build_sharp_model(vocabulary: int, pad: int, ends: list[int] | int, layers: int = 2) -> Qwen3ForCausalLM:
    """A random model whose rows differ in entropy, for sampling; in evaluation mode."""
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=vocabulary,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=layers,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        max_position_embeddings=64,
        initializer_range=0.3,
        tie_word_embeddings=False,
        pad_token_id=pad,
        eos_token_id=ends,
        bos_token_id=None,
    )
    return Qwen3ForCausalLM(config).eval()


def digit_dataset(rows: int = 32) -> Dataset:
    """Prompts of different lengths."""
    return Dataset.from_list([{"prompt": f"{i * 37 % 1000}+{i}=", "answer": str(i)} for i in range(rows)])


def even_reward(completions: list[str], **_: object) -> list[float]:
    """A reward that varies: share of even digits, plus a little for short completions."""
    return [sum(c in "02468" for c in text) / (1 + len(text)) + 0.01 * (len(text) % 3) for text in completions]


def even_length(completions: list[str], **_: object) -> list[float]:
    """0 or 1."""
    return [float(sum(c in "02468aeiou" for c in text) % 2) for text in completions]


def teacher_forced(model: Any, output: dict[str, torch.Tensor], chain: Sequence[Any]) -> torch.Tensor:
    """(B, T) log-probabilities of a rollout: a policy's logits through processors, one step after another."""
    ids = torch.cat([output["prompt_ids"], output["completion_ids"]], dim=1)
    mask = torch.cat([output["prompt_mask"], output["completion_mask"]], dim=1)
    width, start = output["completion_ids"].size(1), output["prompt_ids"].size(1)
    with torch.no_grad():
        logits = model(ids, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp(min=0)).logits
    logps = torch.zeros(ids.size(0), width)
    for t in range(width):
        scores = logits[:, start - 1 + t].clone()
        for processor in chain:
            scores = processor(ids[:, : start + t], scores)
        logps[:, t] = scores.log_softmax(-1).gather(1, ids[:, start + t, None]).squeeze(1)
    return logps


def run_on_ranks(worker: str, ranks: int, folder: Path) -> None:
    """Run a script of this folder, `worker FOLDER`, as one process or several over gloo."""
    here = Path(__file__).parent
    command = [sys.executable]
    if ranks > 1:
        command += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
    run = subprocess.run(
        [*command, str(here / worker), str(folder)],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(here), "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"},
        capture_output=True,
        text=True,
        timeout=180,
    )
    assert run.returncode == 0, run.stderr[-3000:]
