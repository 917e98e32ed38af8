"""Trains with the engine `fast` with any number of processes and writes every sampled token.

Started by tests/test_fast_trainer.py through torchrun. The order of rows in micro-batches is arranged as in
ranks_worker.py, so that every update sees the same rows for any number of processes.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch
import trl.trainer.grpo_trainer as grpo
from accelerate.utils import gather_object
from ranks_worker import RANKS, arrange
from tests_support import build_model, build_tokenizer, digit_dataset, even_length, even_reward, run_settings

from rltok.trainers import CreditConfig, CreditTrainer

GROUP, PER_RANK, STEPS = 4, 7, 2  # the fourth of seven groups lies on two ranks
FORCING = {"type": "budget_forcing", "min_tokens": 2, "max_tokens": 9, "ignore": 0, "wait_text": "w"}
CASES: dict[str, dict[str, object]] = {
    "plain": {},
    "limits": {"rollout": {"fast": {"max_rows": 3, "prefill_chunk": 2, "compact_share": 0.5}}},
    "decoding": {"rollout": {"decoding": [FORCING, {"type": "adaptive_temperature", "tau": 0.3}]}},
    "dynamic": {"rollout": {"dynamic_sampling": {"metric": "even_length"}}},
}


class Sampled(CreditTrainer):
    """Keeps what every generation batch sampled on this rank."""

    def _generate_single_turn(self, prompt_ids, *args, **kwargs):
        found = super()._generate_single_turn(prompt_ids, *args, **kwargs)
        kind = "train" if self.model.training else "eval"
        self.sampled = [*getattr(self, "sampled", []), (kind, [list(p) for p in prompt_ids], found[0])]
        return found


def main(folder: Path) -> None:
    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    grpo.shuffle_sequence_dict = arrange(ranks, STEPS)
    results = {}
    for name, doors in CASES.items():
        tokenizer = build_tokenizer()
        shape = {"per_device_train_batch_size": PER_RANK * RANKS // ranks, "steps_per_generation": STEPS}
        shape |= {"num_generations": GROUP, "max_completion_length": 12, "max_steps": 4}
        shape |= {"per_device_eval_batch_size": 8 // ranks, "num_generations_eval": 2}
        shape |= {"optim": "sgd", "learning_rate": 0.05, "lr_scheduler_type": "constant"}
        args = CreditConfig(**run_settings(folder / f"{name}{ranks}", **shape, **doors))
        model = build_model(tokenizer, initializer_range=0.2)
        rewards = [even_reward, even_length]
        trainer = Sampled(model, rewards, args, train_dataset=digit_dataset(48), processing_class=tokenizer)
        assert trainer.accelerator.num_processes == ranks
        trainer.train()
        trainer.evaluate(eval_dataset=digit_dataset(8))
        parts = gather_object([trainer.sampled])
        batches = [
            (batch[0][0], [p for part in batch for p in part[1]], [c for part in batch for c in part[2]])
            for batch in zip(*parts, strict=True)
        ]
        log = trainer.state.log_history[0]
        costs = {key: log[key] for key in ("rollout/prefill_tokens", "rollout/prefill_tokens_saved")}
        results[name] = {"batches": batches, "rollouts": trainer._fast.rollouts, "costs": costs}
    if trainer.accelerator.is_main_process:
        torch.save(results, folder / f"fast{ranks}.pt")


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]))
