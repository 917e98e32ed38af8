"""One optimizer step of EdgeQAT on fixed completions, as one process or as several: `quantization_aware_worker.py DIR`.

Every update sees the same rows for any number of processes, so its result must not depend on their number.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import torch
from tests_support import build_model, build_tokenizer, digit_dataset, even_reward, run_settings

from rltok.trainers import CreditConfig, CreditTrainer

GROUP, ROWS = 4, 8
QUANTISERS = {"entropy": 0.5, "distribution": 1.0, "distillation": {"gamma": 0.5}}


class FixedRollouts(CreditTrainer):
    """Completions as a function of the prompt and its occurrence."""

    def _generate_single_turn(self, prompt_ids: Any, *args: Any, **kwargs: Any) -> Any:
        start = self.accelerator.process_index * len(prompt_ids)
        completions = []
        for i, ids in enumerate(prompt_ids):
            generator = torch.Generator().manual_seed(sum(ids) * 7 + (start + i) % GROUP)
            length = int(torch.randint(1, 9, (1,), generator=generator))
            completions.append(torch.randint(3, 40, (length,), generator=generator).tolist())
        return completions, None


def main(folder: Path) -> None:
    """Train, and let the first process write log and parameters."""
    tokenizer, ranks = build_tokenizer(), int(os.environ.get("WORLD_SIZE", "1"))
    settings = run_settings(
        folder / str(ranks),
        per_device_train_batch_size=ROWS // ranks,
        gradient_accumulation_steps=1,
        steps_per_generation=1,
        max_steps=1,
        optim="sgd",  # Adam's first steps are signs, which noise of the order of sums may turn
        learning_rate=0.1,
        max_grad_norm=0.0,
    )
    trainer = FixedRollouts(
        build_model(tokenizer),
        even_reward,
        CreditConfig(**settings),
        train_dataset=digit_dataset(),
        processing_class=tokenizer,
        quantization_aware=QUANTISERS,
    )
    trainer.train()
    if trainer.is_world_process_zero():
        parameters = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
        log = [entry for entry in trainer.state.log_history if "loss" in entry]
        torch.save({"log": log, "parameters": parameters}, folder / f"ranks{ranks}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
