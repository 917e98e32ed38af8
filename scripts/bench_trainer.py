"""What token-aware credit costs: time of the same training with TRL's trainer, with closed doors, and with HAPO.

    python scripts/bench_trainer.py [--repetitions 5] [--rollouts 3] [--device cpu]

Trains the embedded model on chain_sum, several updates per rollout. The variants are interleaved inside every
repetition and share its seed; the ratio to TRL's trainer is taken within the repetition. Prints min, median and max.
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
from measuring import ratio_table, turned
from rich.console import Console
from transformers import AutoModelForCausalLM, AutoTokenizer, PrinterCallback
from trl import GRPOConfig, GRPOTrainer

from rltok.data import DataConfig, load_data
from rltok.rewards import build_rewards
from rltok.tiny import CHAIN_SUM_PROMPT, tiny_reasoner_path
from rltok.trainers import CreditConfig, CreditTrainer

HAPO = {
    "credit": {"type": "token_group_average"},
    "objective": {"type": "hapo"},
    "rollout": {"decoding": [{"type": "adaptive_temperature"}], "engine": "transformers"},
}
TRLS = {"engine": "transformers"}
VARIANTS: dict[str, tuple[type, type, dict[str, Any]]] = {
    "TRL GRPOTrainer (dapo)": (GRPOTrainer, GRPOConfig, {}),
    "CreditTrainer, no doors, TRL's sampler": (CreditTrainer, CreditConfig, {"rollout": TRLS}),
    "the same, log-probs recorded": (CreditTrainer, CreditConfig, {"rollout": {"record_logps": "always"} | TRLS}),
    "the same, HAPO whole": (CreditTrainer, CreditConfig, HAPO),
    "CreditTrainer as it comes": (CreditTrainer, CreditConfig, {}),
}
UPDATES = 8
"""per rollout, of 32 completions each"""


def seconds(name: str, seed: int, rollouts: int, device: str) -> float:
    """Wall-clock seconds of `train()`, without building the trainer."""
    trainer_class, config_class, doors = VARIANTS[name]
    task = {"source": "reasoning_gym", "task": "chain_sum", "train_size": 512, "heldout_size": 1}
    options = {"min_terms": 3, "max_terms": 5, "min_digits": 1, "max_digits": 1}
    data = load_data(DataConfig(**task, task_options=options, template=CHAIN_SUM_PROMPT), seed)
    with tempfile.TemporaryDirectory() as folder:
        args = config_class(
            output_dir=folder,
            per_device_train_batch_size=32,
            gradient_accumulation_steps=1,
            steps_per_generation=UPDATES,
            num_generations=16,
            max_completion_length=48,
            max_steps=UPDATES * rollouts,
            learning_rate=1e-4,
            epsilon=0.2,
            epsilon_high=0.28,
            delta=10.0,
            seed=seed,
            report_to="none",
            save_strategy="no",
            logging_steps=UPDATES,
            disable_tqdm=True,
            bf16=False,
            gradient_checkpointing=False,
            use_cpu=device == "cpu",
            **doors,
        )
        trainer = trainer_class(
            model=AutoModelForCausalLM.from_pretrained(tiny_reasoner_path(), dtype=torch.float32),
            reward_funcs=list(build_rewards({"strict": {"function": "strict_accuracy"}}).functions),
            args=args,
            train_dataset=data.train,
            processing_class=AutoTokenizer.from_pretrained(tiny_reasoner_path()),
        )
        trainer.remove_callback(PrinterCallback)
        start = time.perf_counter()
        trainer.train()
        return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--rollouts", type=int, default=3, help="per training")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    warnings.filterwarnings("ignore", category=FutureWarning)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    logging.disable(logging.WARNING)

    seconds(next(iter(VARIANTS)), 0, 1, args.device)  # imports, caches and kernels are warm from here on
    times: dict[str, list[float]] = {name: [] for name in VARIANTS}
    for repetition in range(args.repetitions):
        for name in turned(list(VARIANTS), repetition):
            times[name].append(seconds(name, repetition, args.rollouts, args.device))

    machine = torch.cuda.get_device_name() if args.device == "cuda" else f"{platform.machine()}, {os.cpu_count()} cores"
    title = f"{args.repetitions} repetitions of {args.rollouts} rollouts on {machine}"
    Console().print(ratio_table(title, "variant", times, digits=2))


if __name__ == "__main__":
    main()
