"""Trains tiny runs on fixed completions with every way to batch an update; started by tests/test_balanced_updates.py.

Writes losses, metrics and parameters, the number of passes per slice on every rank, and how often gradients were
exchanged.
"""

import os
import sys
from pathlib import Path

import torch
import trl.trainer.grpo_trainer as grpo
from accelerate.utils import gather_object
from ranks_worker import DIFFERS, GROUP, PER_RANK, RANKS, STEPS, FixedRollouts, arrange
from tests_support import build_model, build_tokenizer, digit_dataset, even_length, even_reward, run_settings

from rltok.trainers import CreditConfig

BATCHING: dict[str, dict[str, object]] = {
    "balance": {"balance": True},
    "budget": {"balance": True, "max_tokens": 40, "multiple_of": 2},
    "pack": {"pack": True},
    "together": {"balance": True, "pack": True, "max_tokens": 48},
}
__all__ = ["BATCHING", "DIFFERS"]


def main(folder: Path) -> None:
    results = {}
    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    grpo.shuffle_sequence_dict = arrange(ranks)
    for name, batching in {"plain": None, **BATCHING}.items():
        tokenizer = build_tokenizer()
        shape = {"per_device_train_batch_size": PER_RANK * RANKS // ranks, "steps_per_generation": STEPS}
        shape |= {"num_generations": GROUP, "max_completion_length": 12, "max_steps": 3}
        shape |= {"optim": "sgd", "learning_rate": 0.3, "lr_scheduler_type": "constant"}
        trainer = FixedRollouts(
            build_model(tokenizer),
            [even_reward, even_length],
            CreditConfig(**run_settings(folder / f"{name}{ranks}", **shape), batching=batching),
            train_dataset=digit_dataset(48),
            processing_class=tokenizer,
        )
        exchanges = [0]
        if ranks > 1:
            prepare = trainer.accelerator.prepare_model

            def prepared(model, *args, prepare=prepare, exchanges=exchanges, **kwargs):
                wrapped = prepare(model, *args, **kwargs)
                if hasattr(wrapped, "register_comm_hook"):
                    wrapped.register_comm_hook(exchanges, count)
                return wrapped

            trainer.accelerator.prepare_model = prepared
        trainer.train()
        log = [entry for entry in trainer.state.log_history if "loss" in entry]
        slices = trainer._buffered_inputs or []
        results[name] = {
            "losses": [entry["loss"] for entry in log],
            "metrics": {k: v for k, v in log[0].items() if isinstance(v, float)},
            "passes": gather_object([[len(s) if isinstance(s, list) else 1 for s in slices]]),
            "exchanges": exchanges[0],
            "parameters": {
                k: v.detach().clone() for k, v in trainer.accelerator.unwrap_model(trainer.model).named_parameters()
            },
        }
    if trainer.accelerator.is_main_process:
        torch.save(results, folder / f"balanced{ranks}.pt")


def count(exchanges: list[int], bucket: torch.distributed.GradBucket) -> torch.futures.Future[torch.Tensor]:
    """The mean over ranks, as DDP's own, and one more exchange if the bucket is the step's last."""
    exchanges[0] += bucket.is_last()
    tensor = bucket.buffer() / torch.distributed.get_world_size()
    future = torch.distributed.all_reduce(tensor, async_op=True).get_future()
    return future.then(lambda done: done.value()[0])


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]))
