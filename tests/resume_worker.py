"""Trains a run that uses everything a checkpoint must keep; can be told to die.

    python resume_worker.py FOLDER [step N | save N | resume]

`step N` kills the process with SIGKILL after optimizer step N, `save N` in the middle of writing checkpoint N.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

import torch
from tests_support import build_model, build_tokenizer, digit_dataset, even_length, even_reward, run_settings
from transformers import TrainerCallback

from rltok.trainers import CreditConfig, CreditTrainer
from rltok.trainers.checkpoint import latest_checkpoint


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


class DieAfterStep(TrainerCallback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            die()


class DiesWhileSaving(CreditTrainer):
    doomed = -1

    def _resume_state(self):
        if self.state.global_step == self.doomed:
            die()
        return super()._resume_state()


def main(folder: Path, how: str, when: int) -> None:
    tokenizer = build_tokenizer()
    schedule = {"max_steps": 9, "save_strategy": "steps", "save_steps": 2, "save_total_limit": 2}
    tables = {"log_completions": True, "num_completions_to_print": 0}
    args = CreditConfig(
        # three updates per rollout: a checkpoint every two steps cuts through the buffer
        **run_settings(folder, max_completion_length=10, delta=10.0, **schedule, **tables),
        credit={"type": "token_group_average"},
        objective={"type": "hapo"},
        rollout={
            "decoding": [
                {"type": "cyclic_reflex", "words": ["1", "2"], "amplitude": 1.0, "period": 5.0},
                {"type": "budget_forcing", "min_tokens": 2, "max_tokens": 7, "ignore": 0, "wait_text": "w"},
                {"type": "adaptive_temperature", "tau": 0.3},
            ],
            "dynamic_sampling": {"metric": "even_length", "max_rounds": 0},
            "prompt_skipping": {
                "metric": "even_reward",
                "easy_at": 0.2,
                "hard_at": 0.15,
                "p_easy": 0.05,
                "p_hard": 0.05,
            },
        },
        selection={"type": "d3s", "rows_end": 0.8, "tokens_end": 0.9, "shape": "cosine"},
    )
    trainer = DiesWhileSaving(
        build_model(tokenizer),
        [even_reward, even_length],
        args,
        train_dataset=digit_dataset(13),  # two rollouts an epoch: the run crosses epochs
        processing_class=tokenizer,
        callbacks=[DieAfterStep(when)] if how == "step" else None,
    )
    trainer.doomed = when if how == "save" else -1
    checkpoint = latest_checkpoint(folder) if how == "resume" else None
    trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    torch.save(
        {
            "from": None if checkpoint is None else checkpoint.name,
            "parameters": dict(trainer.model.named_parameters()),
            "stats": list(trainer._sampler_stats),
            "refill": trainer._refill.state,
            "skipping": trainer._skipping.state,
            "log": [
                {k: v for k, v in entry.items() if "time" not in k and "second" not in k}
                for entry in trainer.state.log_history
                if "loss" in entry
            ],
        },
        folder / "final.pt",
    )


if __name__ == "__main__":
    torch.set_num_threads(1)
    words = sys.argv[2:] or ["whole"]
    main(Path(sys.argv[1]), words[0], int(words[1]) if len(words) > 1 else -1)
