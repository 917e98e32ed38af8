"""Trains tiny runs that record their completions, with any number of processes (started by tests/test_recording.py)."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import torch
import trl.trainer.grpo_trainer as grpo
from ranks_worker import RANKS, arrange
from tests_support import build_model, build_tokenizer, digit_dataset, even_length, even_reward, run_settings

from rltok.trainers import CreditConfig, CreditTrainer
from rltok.trainers.door_trainer import loss_mask

REFLEX = {"type": "cyclic_reflex", "words": ["1", "2", "3"], "amplitude": 2.0, "period": 6.0}
FORCING = {
    "type": "budget_forcing",
    "min_tokens": 2,
    "max_tokens": 9,
    "ignore": 0,
    "wait_text": "w",
    "final_text": "so",
}
PREPLAN = {"type": "preplan_anchor", "window": 2, "horizon_min": 1, "horizon_max": 4}
CUT = {"type": "d3s", "rows_start": 0.8, "rows_end": 0.8, "tokens_start": 0.6, "tokens_end": 0.6}
DOORS: dict[str, dict[str, Any]] = {
    "plain": {"rollouts": 2, "doors": {}},
    "everything": {
        "rollouts": 2,
        "doors": {
            "credit": PREPLAN,
            "objective": {"type": "hapo"},
            "rollout": {"decoding": [REFLEX, FORCING]},
            "selection": CUT,
        },
    },
    "dynamic": {"rollouts": 2, "doors": {"rollout": {"dynamic_sampling": {"metric": "even_length"}}}},
}
CASES = tuple(DOORS)


class Watched(CreditTrainer):
    """Keeps what was scored and what every loss used."""

    scored: list[dict[str, torch.Tensor]]
    losses: list[dict[str, Any]]

    def _token_batch(self, output, mask, *args):
        batch = super()._token_batch(output, mask, *args)
        self.scored = [*getattr(self, "scored", []), {}]
        self.scored[-1] |= {k: v.clone() for k, v in output.items() if torch.is_tensor(v) and v.dim() == 2}
        self.scored[-1] |= {"in_loss": mask.bool(), "entropy": batch.entropy, "advantage": batch.advantages}
        self.scored[-1]["credit"] = self.doors.credit(batch)
        return batch

    def _compute_loss(self, model, inputs):
        import rltok.trainers.loss as module

        kept: dict[str, Any] = {}
        real = module.token_loss

        def watching(batch, plan, *args):
            losses, values = real(batch, plan, *args)
            kept.update(batch=batch, plan=plan, values=values)
            return losses, values

        module.token_loss = watching
        try:
            loss = super()._compute_loss(model, inputs)
        finally:
            module.token_loss = real
        shape = kept["batch"].logps.shape
        flags = kept["values"]["clip_ratio/high_mean"] - kept["values"]["clip_ratio/low_mean"]
        found = {
            "credit_used": kept["plan"].advantages.expand(shape),
            "learner_logp": kept["batch"].logps,
            "ratio": kept["plan"].log_weight.exp().expand(shape),
            "clipped": flags.expand(shape),
            "entropy": kept["batch"].entropy,
            "trained": kept["batch"].mask.bool() & loss_mask(inputs).bool(),
        }
        for i, row in enumerate(inputs["row"].tolist()):
            one = {name: value[i].detach().numpy().copy() for name, value in found.items()}
            self.losses = [*getattr(self, "losses", []), {"rollout": len(self.scored) - 1, "row": row, **one}]
        return loss


def train(
    folder: Path,
    case: str,
    watch: bool = False,
    resume: str | None = None,
    samples: dict[str, Any] | None = {"rows": 8},  # noqa: B006
    rewards: Any = even_reward,
    **changes: Any,
) -> CreditTrainer:
    tokenizer = build_tokenizer()
    settings = {"max_steps": 6, "max_completion_length": 12, "lr_scheduler_type": "constant", "epsilon": 0.02}
    settings |= {"epsilon_high": 0.02, "delta": 10.0}
    if "save_steps" in changes:
        settings["save_strategy"] = "steps"
    args = CreditConfig(**run_settings(folder, **(settings | changes)), samples=samples, **DOORS[case]["doors"])
    model = build_model(tokenizer, initializer_range=0.3)
    data = {"train_dataset": digit_dataset(48), "processing_class": tokenizer}
    trainer = (Watched if watch else CreditTrainer)(model, rewards, args, **data)
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def main(folder: Path) -> None:
    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    steps = 2
    grpo.shuffle_sequence_dict = arrange(ranks, steps)
    for case in CASES:
        train(
            folder / f"{case}{ranks}",
            case,
            samples={"rows": 16},
            rewards=[even_reward, even_length],
            per_device_train_batch_size=7 * RANKS // ranks,
            steps_per_generation=steps,
            gradient_accumulation_steps=2,
            max_steps=2,
            optim="sgd",
            learning_rate=0.05,
        )


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]))
