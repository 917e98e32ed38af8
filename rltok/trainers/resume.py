"""Exact resume: the order of prompts, whole checkpoints, and every state that transformers' files leave out."""

from __future__ import annotations

import shutil
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, rotate_checkpoints

from rltok.entropy import EntropyStats
from rltok.trainers.checkpoint import write_manifest
from rltok.trainers.door_trainer import DoorTrainer, RolloutState
from rltok.trainers.prompts import EpochRepeatSampler


class ExactResume(DoorTrainer):
    """A run that was killed continues where it would have been, bit for bit."""

    def _get_train_sampler(self, dataset: Any = None) -> Any:
        return EpochRepeatSampler.like(super()._get_train_sampler(dataset))

    def _run_epoch(self, *args: Any, **kwargs: Any) -> Any:
        # transformers would train one step beyond the end when a run is resumed from its last checkpoint
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
            return None
        return super()._run_epoch(*args, **kwargs)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        run_dir = Path(self._get_output_dir(trial=trial))
        folder = run_dir / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        if self.args.should_save and folder.exists():
            shutil.rmtree(folder)  # left over from a run that was killed after this step
        self.accelerator.wait_for_everyone()
        limit, self.args.save_total_limit = self.args.save_total_limit, None
        try:
            super()._save_checkpoint(model, trial)
        finally:
            self.args.save_total_limit = limit
        if not self.args.save_only_model:
            torch.save(self._resume_state(), folder / _state_file(self.accelerator.process_index))
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            write_manifest(folder)
            rotate_checkpoints(str(run_dir), limit, self.state.best_model_checkpoint, use_mtime=True)
        self.accelerator.wait_for_everyone()

    def _shape_of_run(self) -> dict[str, int]:
        args = self.args
        return {
            "processes": self.accelerator.num_processes,
            "training.per_device_train_batch_size": args.per_device_train_batch_size,
            "training.gradient_accumulation_steps": args.gradient_accumulation_steps,
            "training.steps_per_generation": args.steps_per_generation,
            "training.num_generations": self.num_generations,
            "training.num_iterations": self.num_iterations,
        }

    def _resume_state(self) -> dict[str, Any]:
        """What transformers' checkpoint leaves out and an exact continuation needs."""
        stats = self._sampler_stats
        return {
            "shape": self._shape_of_run(),
            "step": self._step,
            "buffer": self._buffered_inputs,
            "metrics": {name: list(values) for name, values in self._metrics["train"].items()},
            "sampler_stats": None if stats is None else list(stats),
            "refill": None if self._refill is None else self._refill.state,
            "skipping": None if self._skipping is None else self._skipping.state,
            "table": self._table.state(),
            "last_entropy_window": self._entropy_window_stats,
            "trained_tokens": self._trained_tokens,
            "generated_tokens": self._generated_tokens,
            "rollout": vars(self._rollout),
            "samples": None if self._recorder is None else self._recorder.state(),
            "rollouts": None if self._fast is None else self._fast.rollouts,
        }

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is None:
            return
        path = Path(checkpoint) / _state_file(self.accelerator.process_index)
        if not path.is_file():
            raise FileNotFoundError(
                f"{path.name} is missing in {checkpoint}: it was not written by CreditTrainer with the same number of "
                "processes, so the run cannot continue exactly. Start a new run from its weights (model.path)."
            )
        state = torch.load(path, map_location=self.accelerator.device, weights_only=True)
        saved, now = state["shape"], self._shape_of_run()
        for name, value in saved.items():
            if now[name] != value:
                raise ValueError(f"{name}={now[name]} but the checkpoint {checkpoint} was written with {value}")
        self._step, self._buffered_inputs = state["step"], state["buffer"]
        self._metrics["train"] = defaultdict(list, state["metrics"])
        stats = state["sampler_stats"]
        self._sampler_stats = None if stats is None else EntropyStats(*stats)
        if self._refill is not None:
            self._refill.state = state["refill"]
        if self._skipping is not None:
            self._skipping.load(state["skipping"])
        self._table.load(state["table"])
        self._entropy_window_stats = state["last_entropy_window"]
        self._trained_tokens, self._generated_tokens = state["trained_tokens"], state["generated_tokens"]
        self._rollout = RolloutState(**state["rollout"])
        if self._recorder is not None and state["samples"] is not None:
            self._recorder.load(state["samples"])
        if self._fast is not None:
            self._fast.rollouts = state["rollouts"]


def _state_file(rank: int) -> str:
    return f"rltok_state_{rank}.pt"
