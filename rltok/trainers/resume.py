"""Exact resume: the order of prompts, whole checkpoints, and every state that transformers' files leave out."""

from __future__ import annotations

import shutil
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, rotate_checkpoints

from rltok.config import ConfigError
from rltok.entropy import EntropyStats
from rltok.files import StorageError, free_space, write_failure
from rltok.pickles import load_tensors
from rltok.trainers.checkpoint import checkpoint_steps, write_manifest
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
        limit, self.args.save_total_limit = self.args.save_total_limit, None
        try:
            with self._all_write(folder):
                if self.args.should_save and folder.exists():
                    shutil.rmtree(folder)  # left over from a run that was killed after this step
            with self._all_write(folder):
                super()._save_checkpoint(model, trial)
                if not self.args.save_only_model:
                    torch.save(self._resume_state(), folder / _state_file(self.accelerator.process_index))
            with self._all_write(folder):
                if self.args.should_save:
                    write_manifest(folder)
        finally:
            self.args.save_total_limit = limit
        if self.args.should_save:
            rotate_checkpoints(str(run_dir), limit, self.state.best_model_checkpoint, use_mtime=True)
        self.accelerator.wait_for_everyone()

    @contextmanager
    def _all_write(self, folder: Path) -> Iterator[None]:
        """All processes leave the block together: with what they wrote, or with the same error if one could not.

        Sharded models write in collectives, in which the others would wait for the one that failed; there it raises at
        once, and the launcher ends the others.

        Raises:
            StorageError: the disk refused a file. The half-written checkpoint is removed.
        """
        problem: str | None = None
        cause: Exception | None = None
        try:
            yield
        except Exception as error:  # torch and safetensors wrap the system's error in their own
            problem, cause = write_failure(error), error
            if problem is None:
                raise
            if self.is_fsdp_enabled or self.is_deepspeed_enabled:
                raise self._unwritten(folder, problem) from error
        found = [problem]
        if self.accelerator.num_processes > 1:
            found = gather_object(found)
        problem = next((text for text in found if text is not None), None)
        if problem is not None:
            unwritten = self._unwritten(folder, problem)
            self.accelerator.wait_for_everyone()
            raise unwritten from cause

    def _unwritten(self, folder: Path, problem: str) -> StorageError:
        free = free_space(folder)
        if self.args.should_save:
            shutil.rmtree(folder, ignore_errors=True)  # never loaded, and in the way of what needs the space
        before = [step for step in checkpoint_steps(folder.parent) if step < self.state.global_step]
        last = f"{PREFIX_CHECKPOINT_DIR}-{before[-1]} is untouched" if before else "there is no checkpoint before it"
        return StorageError(
            f"{folder} could not be written: {problem}; {free}. The run stops, the half-written checkpoint is removed, "
            f"{last}. Make room (training.save_total_limit=N keeps fewer checkpoints), then continue with resume=auto; "
            "or give another disk with output_dir=DIR",
            "output_dir",
        )

    def _strategy(self) -> str:
        """How weights and optimizer state are spread over processes."""
        if self.is_deepspeed_enabled:
            return f"zero{self.accelerator.state.deepspeed_plugin.zero_stage}"
        return "fsdp" if self.is_fsdp_enabled else "whole"

    def _shape_of_run(self) -> dict[str, int | str]:
        args = self.args
        return {
            "processes": self.accelerator.num_processes,
            "launch.strategy": self._strategy(),
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
            "kv_budget": None if self._sampler_cache is None else self._sampler_cache.budget,
            "quantized": None if self._quantized_sampler is None else self._quantized_sampler.state(),
        }

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is None:
            return
        path = Path(checkpoint) / _state_file(self.accelerator.process_index)
        if not path.is_file():
            raise ConfigError(
                f"resume: {path.name} is missing in {checkpoint}: it was not written by CreditTrainer with the same "
                "number of processes, so the run cannot continue exactly. Train on from its weights: model.path.",
                "resume",
            )
        state = load_tensors(path, map_location=_loadable(self.accelerator.device))
        saved, now = state["shape"], self._shape_of_run()
        for name, value in saved.items():
            if now[name] != value:
                raise ConfigError(
                    f"{name}={now[name]} but the checkpoint {checkpoint} was written with {value}; set it back", name
                )
        self._step, self._buffered_inputs = state["step"], state["buffer"]
        self._metrics["train"] = defaultdict(list, state["metrics"])
        stats = state["sampler_stats"]
        self._sampler_stats = None if stats is None else EntropyStats(*stats)
        # a part that the checkpoint knows nothing of (another recipe, by resume=CHECKPOINT) begins at its beginning
        if self._refill is not None and state["refill"] is not None:
            self._refill.state = state["refill"]
        if self._skipping is not None and state["skipping"] is not None:
            self._skipping.load(state["skipping"])
        self._table.load(state["table"])
        self._entropy_window_stats = state["last_entropy_window"]
        self._trained_tokens, self._generated_tokens = state["trained_tokens"], state["generated_tokens"]
        self._rollout = RolloutState(**state["rollout"])
        if self._recorder is not None and state["samples"] is not None:
            self._recorder.load(state["samples"])
        if self._fast is not None and state["rollouts"] is not None:
            self._fast.rollouts = state["rollouts"]
        if self._sampler_cache is not None and state.get("kv_budget") is not None:
            self._sampler_cache.budget = state["kv_budget"]
        if self._quantized_sampler is not None:
            self._quantized_sampler.load(state.get("quantized"))


def _loadable(device: torch.device) -> str:
    """A device as `torch.load` knows it: the CPU of one of several processes has a number there, which it refuses."""
    return "cpu" if device.type == "cpu" else str(device)


def _state_file(rank: int) -> str:
    return f"rltok_state_{rank}.pt"
