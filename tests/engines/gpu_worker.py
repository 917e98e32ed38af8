"""One run through accelerate on a GPU, as `rltok train` would make it, without evaluation.

    gpu_worker.py FOLDER METHOD ENGINE      ENGINE: single, zero2, zero3, fsdp or qlora

Started by test_engines_gpu.py, by accelerate with the shipped files. Completions are fixed; QLoRA draws its own.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import torch
import trl.trainer.grpo_trainer as grpo
from tests_support import build_tokenizer
from worker import ADAPTER, arrange, build, matrix_model, settings

from rltok.models import LoraSettings, ModelConfig, QuantizationSettings, load_model, peft_config
from rltok.trainers.engine_support import training_engine

STARTED = {"single": "single", "zero2": "zero2", "zero3": "zero3", "fsdp": "fsdp2", "qlora": "single"}


def quantised(folder: Path) -> Any:
    """The matrix' model in 4 bits; widths are multiples of a block of 64."""
    place = folder / "whole"
    matrix_model(build_tokenizer(), hidden_size=128, intermediate_size=256, head_dim=32).save_pretrained(place)
    bits = QuantizationSettings(bits=4, compute_dtype="float32")
    return load_model(ModelConfig(path=str(place), quantization=bits))


def whole_parameters(trainer: Any) -> dict[str, torch.Tensor]:
    """name -> parameter on the CPU, on every process."""
    model = trainer.accelerator.unwrap_model(trainer.model)
    if training_engine(trainer) == "zero3":
        import deepspeed

        with deepspeed.zero.GatheredParameters(list(model.parameters())):
            return {name: value.detach().float().cpu().clone() for name, value in model.named_parameters()}
    full = ((n, v.full_tensor() if hasattr(v, "full_tensor") else v) for n, v in model.named_parameters())
    return {name: value.detach().float().cpu().clone() for name, value in full}


def main(folder: Path, method: str, engine: str) -> None:
    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    grpo.shuffle_sequence_dict = arrange(ranks)
    args = settings(folder, method, ranks, use_cpu=False, output_dir=str(folder / f"run {engine}"))
    if engine == "fsdp":
        args.rollout = {"engine": "transformers"} | (args.rollout or {})
    model, adapter = None, None
    if engine == "qlora":
        model = quantised(folder)
        adapter = peft_config(LoraSettings(r=4, alpha=8, target_modules=ADAPTER["target_modules"]))
    trainer = build(folder, method, args, model, peft_config=adapter)
    assert training_engine(trainer) in (STARTED[engine], "ddp"), training_engine(trainer)
    assert trainer.accelerator.num_processes == ranks and trainer.accelerator.device.type == "cuda"
    trainer.fixed = engine != "qlora"
    frozen = {n: v.detach().clone() for n, v in trainer.model.named_parameters() if not v.requires_grad}
    trainer.train()
    log = [entry for entry in trainer.state.log_history if "loss" in entry]
    after = dict(trainer.model.named_parameters())
    result = {
        "losses": [entry["loss"] for entry in log],
        "parameters": whole_parameters(trainer),
        "frozen_moved": [name for name, value in frozen.items() if not torch.equal(after[name], value)],
        "four_bits": sum(type(value).__name__ == "Params4bit" for value in after.values()),
    }
    if trainer.accelerator.is_main_process:
        torch.save(result, folder / f"{engine}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], sys.argv[3])
