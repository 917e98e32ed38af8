"""Trains tiny runs on fixed completions with any number of processes and writes losses and parameters.

Started by tests/test_ranks.py through torchrun. Completions depend on prompt and index only, and the order of rows in
micro-batches is arranged so that every update sees the same rows for any number of processes.
"""

from __future__ import annotations

import os
import sys
from dataclasses import replace
from pathlib import Path

import torch
import trl.trainer.grpo_trainer as grpo
from tests_support import build_model, build_tokenizer, digit_dataset, even_length, even_reward, run_settings
from trl import GRPOTrainer

from rltok.objective import LOSS_TYPES
from rltok.trainers import CreditConfig, CreditTrainer

RANKS = 2
GROUP, PER_RANK, STEPS = 4, 6, 4  # the third group of four lies on two ranks

PREPLAN = {"type": "preplan_anchor", "window": 2, "horizon_min": 1, "horizon_max": 4}
CUT = {"rows_start": 0.4, "rows_end": 0.4, "tokens_start": 0.5, "tokens_end": 0.5}
# the last case's trainer also serves the comparison with TRL's loss, so it has no objective terms
CASES: dict[str, dict[str, object]] = {
    "dapo": {},
    "hapo": {"credit": {"type": "token_group_average"}, "objective": {"type": "hapo"}},
    "hapo_micro": {"objective": {"type": "hapo", "statistics": "micro_batch"}},
    "kl_cov": {"objective": {"type": "kl_cov", "ratio": 0.1}},
    "shaping": {"credit": {"type": "entropy_shaping"}},
    "corrected": {
        "rollout": {"correction": {"mode": "mask", "clip_max": 1.1, "symmetric": True, "batch_normalize": True}}
    },
    "forced": {"rollout": {"decoding": [{"type": "budget_forcing", "max_tokens": 8, "final_text": "0123456789"}]}},
    "preplan": {"credit": PREPLAN},
    "preplan_batch": {"credit": PREPLAN | {"head_scope": "batch", "control": "shuffled"}},
    "d3s": {"selection": CUT | {"type": "d3s"}},
    "d3s_rejected": {  # only some completions, all on one of two ranks, have a token that is rejected
        "selection": CUT | {"type": "d3s"},
        "rollout": {"correction": {"mode": "mask", "clip_max": 3.0, "symmetric": True}},
    },
    "d3s_hapo": {
        "credit": {"type": "token_group_average"},
        "objective": {"type": "hapo"},
        "selection": CUT | {"type": "d3s", "loss_norm": "full"},
    },
    "d3s_micro": {"selection": CUT | {"type": "d3s", "entropy_from": "micro", "token_scope": "sample"}},
    "pods": {"loss_type": "grpo", "selection": {"type": "pods", "keep": 0.5}},
    "random": {"selection": CUT | {"type": "random", "scope": "group"}},
    "one_row": {"selection": {"type": "d3s", "rows_start": 0.01, "rows_end": 0.01}},
    "nothing": {"reward_weights": [0.0, 0.0], "selection": {"type": "d3s"}},
    "skipping": {"rollout": {"prompt_skipping": {"metric": "even_length", "p_easy": 0.05, "p_hard": 0.05}}},
    "dynamic": {"rollout": {"dynamic_sampling": {"metric": "even_length"}}},
}

# times, and the work of padding, of which smaller micro-batches have less
DIFFERS = ("time", "seconds", "work_share")
PROMPTS = {"skipping": 12}  # each rollout visits all of them


class FixedRollouts(CreditTrainer):
    """Completions as a function of the prompt and its occurrence, with a made-up sampler log-probability."""

    rejects = False

    def _generate_single_turn(self, prompt_ids, *args, **kwargs):
        completions, logps = [], []
        start = self.accelerator.process_index * len(prompt_ids)
        for i, ids in enumerate(prompt_ids):
            generator = torch.Generator().manual_seed(
                sum(k * t for k, t in enumerate(ids, 1)) * 7 + (start + i) % GROUP
            )
            length = int(torch.randint(1, 11, (1,), generator=generator))
            completions.append(torch.randint(3, 40, (length,), generator=generator).tolist())
            sampled = -3.9 - 0.1 * torch.rand(length, generator=generator)
            if start + i == 1 and self.rejects:
                sampled[0] -= 3.0  # out of bounds, on the first rank only
            if start + i < 3 and self.doors.rollout.forces:
                sampled[torch.tensor(completions[-1]) < 13] = 0.0  # digits, which were put there, on the first rank
            logps.append(sampled.tolist())
        corrects = self.doors.rollout.resolved_correction.mode != "off"
        return completions, logps if corrects else None


def arrange(ranks: int, steps: int = STEPS):
    """Rows of a rollout of `steps` micro-batches in the order in which RANKS ranks would hold them."""

    def in_rank_order(rows):
        if ranks == RANKS:
            return rows
        count = len(next(iter(rows.values())))
        local, micro = count // RANKS, count // RANKS // steps
        order = [r * local + k * micro + j for k in range(steps) for r in range(RANKS) for j in range(micro)]
        return {name: value if value.ndim == 0 else value[order] for name, value in rows.items()}

    return in_rank_order


def parity(trainer: CreditTrainer) -> dict[str, float]:
    """Loss type -> largest difference to TRL's own loss, in loss and local gradients, on rows that differ by rank."""
    generator = torch.Generator().manual_seed(trainer.accelerator.process_index)
    rows, width = 4, 9
    ids = torch.randint(3, 40, (rows, 5 + width), generator=generator)
    mask = (torch.arange(width) < torch.randint(1, width + 1, (rows, 1), generator=generator)).long()
    inputs = {
        "prompt_ids": ids[:, :5],
        "prompt_mask": torch.ones(rows, 5, dtype=torch.long),
        "completion_ids": ids[:, 5:],
        "completion_mask": mask,
        "tool_mask": (torch.rand(rows, width, generator=generator) > 0.2).long(),
        "advantages": torch.randn(rows, width, generator=generator),
        "old_per_token_logps": -3.7 + 0.4 * torch.randn(rows, width, generator=generator),
        "ref_per_token_logps": -3.7 + 0.2 * torch.randn(rows, width, generator=generator),
        "num_items_in_batch": trainer.accelerator.gather(mask.sum()).sum() * 4,
    }
    trainer.beta, trainer.current_gradient_accumulation_steps = 0.1, 2
    found = {}
    for kind in LOSS_TYPES:
        trainer.loss_type, trainer.loss_settings = kind, replace(trainer.loss_settings, loss_type=kind)
        results = []
        for compute in (GRPOTrainer._compute_loss, CreditTrainer._compute_loss):
            trainer.model.zero_grad()
            loss = compute(trainer, trainer.model, inputs)
            loss.backward()
            results.append([loss.detach(), *(p.grad.clone() for p in trainer.model.parameters())])
        found[kind] = max((a - b).abs().max().item() for a, b in zip(*results, strict=True))
        found[kind] = trainer.accelerator.gather(torch.tensor(found[kind])).max().item()
    return found


def main(folder: Path) -> None:
    results = {}
    for name, doors in CASES.items():
        tokenizer = build_tokenizer()
        ranks = int(os.environ.get("WORLD_SIZE", "1"))
        grpo.shuffle_sequence_dict = arrange(ranks)
        shape = {"per_device_train_batch_size": PER_RANK * RANKS // ranks, "steps_per_generation": STEPS}
        shape |= {"num_generations": GROUP, "max_completion_length": 12, "max_steps": 4}
        # plain descent: Adam divides rounding differences of tiny gradients by their size
        shape |= {"optim": "sgd", "learning_rate": 0.3}
        args = CreditConfig(**run_settings(folder / f"{name}{ranks}", **shape, lr_scheduler_type="constant", **doors))
        rewards = [even_reward, even_length]
        trainer = FixedRollouts(
            build_model(tokenizer),
            rewards,
            args,
            train_dataset=digit_dataset(PROMPTS.get(name, 48)),
            processing_class=tokenizer,
        )
        assert trainer.accelerator.num_processes == ranks, (trainer.accelerator.num_processes, ranks)
        trainer.rejects = name == "d3s_rejected"
        start = {name: value.detach().clone() for name, value in trainer.model.named_parameters()}
        trainer.train()
        log = [entry for entry in trainer.state.log_history if "loss" in entry]
        results[name] = {
            "losses": [entry["loss"] for entry in log],
            "metrics": {
                k: v for k, v in log[0].items() if isinstance(v, float) and not any(word in k for word in DIFFERS)
            },
            "skipped": [entry.get("selection/skipped_updates") for entry in log],
            "start": start,
            "prompts_skipped": sum(entry.get("prompt_skipping/skipped", 0) for entry in log),
            "parameters": {
                k: v.detach().clone() for k, v in trainer.accelerator.unwrap_model(trainer.model).named_parameters()
            },
        }
    results["parity"] = parity(trainer)
    if trainer.accelerator.is_main_process:
        torch.save(results, folder / f"ranks{ranks}.pt")


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]))
