"""Faults inside training: losses and gradients that are not finite, rewards that hang, processes that die.

Once per optimizer step, before clipping, one number per rank is reduced over all ranks: whether any loss of the step's
micro-batches, or any gradient, is NaN or infinite. All ranks therefore stop, or leave the step out, together. A step
that is left out leaves weights and optimizer state untouched; it counts as a step all the same, and the learning rate
follows the step number, so that step n has the learning rate it has in an undisturbed run.

Where gradients cannot be seen, losses still are: under fp16 an infinite gradient is ordinary and left to the scaler;
under DeepSpeed, which steps inside backward, the engine's global norm stands for the gradients, weights in memory may
be damaged by the time of the check (nothing is saved of them), and `nonfinite: skip` is refused.
"""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from accelerate.utils import DistributedType, gather_object
from torch import Tensor
from transformers.training_args import OptimizerNames
from trl import GRPOConfig

from rltok.config import ConfigError, build
from rltok.faults import FaultsConfig, NonFiniteError, explained, limit_collectives
from rltok.files import write_json
from rltok.rewards.guard import limited
from rltok.trainers.door_trainer import DoorTrainer

logger = logging.getLogger(__name__)

Window = list[tuple[Tensor, Mapping[str, Any]]]
"""Loss and inputs of the micro-batches of one optimizer step."""
Chosen = list[tuple[int, Tensor, Mapping[str, Any]]]
"""Some of them, with their number in the step."""

FOLDER = "nonfinite"
"""Where the micro-batches are saved, below `output_dir`."""
MAX_SAVED = 20
"""Left-out steps whose micro-batches are saved; later ones are only reported."""
SKIPPED = "faults/skipped_steps"
"""Metric: optimizer steps left out since the start of the run."""
STEPS_IN_BACKWARD = (OptimizerNames.LOMO, OptimizerNames.ADALOMO)


class GuardedTraining(DoorTrainer):
    """Stops, or leaves out a step, where a loss or gradient is not finite; a healthy run is not changed by a bit.

    Raises (when built):
        ConfigError: `faults` has a wrong value, or asks for something that the set-up cannot do; or there is no row.
    """

    def __init__(
        self, model: Any, reward_funcs: Any = None, args: GRPOConfig | None = None, *positional: Any, **kwargs: Any
    ) -> None:
        section = getattr(args, "faults", None)
        self._faults = FaultsConfig() if section is None else build(FaultsConfig, section, "faults")
        self._micro_losses: Window = []
        """loss and inputs of the micro-batches since the last optimizer step"""
        self._skips_in_a_row = self._saved_steps = 0
        _check_rows(positional[0] if positional else kwargs.get("train_dataset"))
        super().__init__(model, reward_funcs, args, *positional, **kwargs)
        limit_collectives(self.args.ddp_timeout)
        self._check_faults()
        self._limit_rewards()

    def _check_faults(self) -> None:
        """Refuse `skip` where a step cannot be left out."""
        if self._faults.nonfinite != "skip":
            return
        engine = "DeepSpeed" if self.is_deepspeed_enabled else None
        if self.args.optim in STEPS_IN_BACKWARD:
            engine = f"training.optim={OptimizerNames(self.args.optim).value}"
        if engine is not None:
            raise ConfigError(
                f"faults.nonfinite: 'skip' cannot leave out a step with {engine}, which changes the weights during the "
                "backward pass; set faults.nonfinite=stop",
                "faults.nonfinite",
            )

    def _limit_rewards(self) -> None:
        """Give every reward function the time limit, also those that were not built from a recipe."""
        seconds = self._faults.reward_timeout
        if seconds is None:
            return
        for i, (function, name) in enumerate(zip(self.reward_funcs, self.reward_func_names, strict=True)):
            if not isinstance(function, torch.nn.Module):  # a reward model runs on the device, as the policy does
                self.reward_funcs[i] = limited(function, name, Path(self.args.output_dir), seconds)

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """TRL's training; where another process is gone, the error says so."""
        with explained(self.accelerator.process_index, self.args.ddp_timeout):
            return super().train(*args, **kwargs)

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        """TRL's loss, remembered with its inputs until the optimizer step."""
        loss = super().compute_loss(model, inputs, *args, **kwargs)
        if self.model.training:
            self._micro_losses.append((loss.detach(), inputs))
        return loss

    def _clip_grad_norm(self, model: Any) -> Any:
        norm = self._check_step(model)
        return super()._clip_grad_norm(model) if norm is None else norm

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        if grad_norm is None:  # with training.max_grad_norm=0 nothing was clipped, and nothing checked
            grad_norm = self._check_step(model)
        return super()._get_grad_norm(model, grad_norm=grad_norm)

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """TRL's log, with the number of steps left out so far."""
        if self.model.training and self._faults.nonfinite == "skip":
            self._metrics["train"][SKIPPED] = [self._skipped_steps]
        super().log(logs, *args, **kwargs)

    @property
    def _skipped_steps(self) -> int:
        """Steps left out since the start; what a checkpoint keeps anyway (pending metrics, the log) holds it."""
        pending = self._metrics["train"].get(SKIPPED)
        if pending:
            return int(pending[-1])
        return next((int(entry[SKIPPED]) for entry in reversed(self.state.log_history) if SKIPPED in entry), 0)

    # ------------------------------------------------------------------ the check

    def _check_step(self, model: Any) -> Tensor | None:
        """None where every loss and gradient of all ranks is finite; NaN where the step was left out.

        Raises:
            NonFiniteError: the run ends, on all ranks.
        """
        window, self._micro_losses = self._micro_losses, []
        device = self.accelerator.device
        losses = torch.stack([loss.reshape(()).float() for loss, _ in window]) if window else torch.zeros(1)
        finite = torch.stack([losses.to(device).isfinite().all(), self._gradients_finite(model)])
        totals = self._reducer.sum((~finite).float())  # the one reduction: every rank decides alike
        bad_losses, bad_gradients = totals.tolist()
        if not bad_losses and not bad_gradients:
            self._skips_in_a_row = 0
            return None
        message = self._report_nonfinite(model, window, only_bad_losses=bad_losses > 0)
        if self._faults.nonfinite == "stop":
            raise NonFiniteError(
                f"{message}. The run ends because of faults.nonfinite=stop; faults.nonfinite=skip would leave out such "
                "steps. Common causes: too high a training.learning_rate, half precision, log-probabilities of -inf"
            )
        self._leave_out_step(model, message)
        return torch.tensor(math.nan, device=device)

    def _gradients_finite(self, model: Any) -> Tensor:
        """0-d bool, of this rank's gradients; no transfer from the device."""
        device = self.accelerator.device
        yes = torch.ones((), dtype=torch.bool, device=device)
        if self.accelerator.mixed_precision == "fp16":
            return yes
        if self.accelerator.distributed_type == DistributedType.DEEPSPEED:
            norm = super()._clip_grad_norm(model)
            return yes if norm is None else torch.as_tensor(norm, device=device).isfinite().all()
        gradients = [_local(p.grad) for p in model.parameters() if p.grad is not None]
        gradients = [gradient for gradient in gradients if gradient.numel()]
        if not gradients:
            return yes
        half = gradients[0].dtype in (torch.float16, torch.bfloat16)
        norms = torch._foreach_norm(gradients, dtype=torch.float32 if half else None)  # NaN is passed on
        return torch.stack([norm.to(device) for norm in norms]).isfinite().all()

    def _leave_out_step(self, model: Any, message: str) -> None:
        """Leave the coming optimizer step out: parameters without gradient are passed over, their state included.

        Raises:
            NonFiniteError: there were too many in a row.
        """
        self._skips_in_a_row += 1
        if self._skips_in_a_row > self._faults.max_skips:
            raise NonFiniteError(
                f"{message}. It is step {self._skips_in_a_row} in a row of this kind, more than faults.max_skips="
                f"{self._faults.max_skips} allows, so the run ends"
            )
        self._metrics["train"][SKIPPED] = [self._skipped_steps + 1]
        if self.accelerator.is_main_process:
            logger.warning("%s. The step is left out (faults.nonfinite=skip)", message)
        self.accelerator.unscale_gradients()  # a scaler insists on having seen the gradients
        for parameter in model.parameters():
            parameter.grad = None

    # ------------------------------------------------------------------ post-mortem

    def _report_nonfinite(self, model: Any, window: Window, only_bad_losses: bool) -> str:
        """Save this rank's micro-batches; what happened where, of all ranks, in one sentence.

        With finite losses everywhere nobody knows which micro-batch the gradient came from: all of them are saved.
        """
        chosen = [
            (k, loss, inputs)
            for k, (loss, inputs) in enumerate(window)
            if not only_bad_losses or not loss.isfinite().all()
        ]
        mine = None
        if chosen:
            rank, step = self.accelerator.process_index, self.state.global_step + 1
            place = Path(self.args.output_dir) / FOLDER / f"step_{step}_rank_{rank}"
            names = _rows_of(chosen)
            what = f"the loss is {float(chosen[0][1])}" if only_bad_losses else "a gradient is not finite"
            mine = f"{what} on rank {rank} ({names}; {self._save_micro_batches(place, model, window, chosen)})"
        self._saved_steps += 1
        reports = [report for report in gather_object([mine]) if report is not None]
        return f"step {self.state.global_step + 1}: {'; '.join(reports)}"

    def _save_micro_batches(
        self,
        place: Path,
        model: Any,
        window: Window,
        chosen: Chosen,
    ) -> str:
        """Write the tensors and their description; where they lie, in words."""
        if self._saved_steps >= MAX_SAVED:
            return f"not saved, {MAX_SAVED} such steps lie in {place.parent} already"
        tensors = {f"{k}/loss": loss for k, loss, _ in chosen}
        tensors |= {
            f"{k}/{name}": value for k, _, inputs in chosen for name, value in inputs.items() if torch.is_tensor(value)
        }
        record = {
            "step": self.state.global_step + 1,
            "rank": self.accelerator.process_index,
            "processes": self.accelerator.num_processes,
            "faults.nonfinite": self._faults.nonfinite,
            "micro_batches_of_the_step": len(window),
            "saved_micro_batches": [k for k, _, _ in chosen],
            "losses": [_number(loss) for loss, _ in window],
            "not_finite": [name for name, value in tensors.items() if not _finite(value)],
            "gradient_norms": {
                name: _number(_local(p.grad).float().norm())
                for name, p in model.named_parameters()
                if p.grad is not None
            },
            "parameters_not_finite": [name for name, p in model.named_parameters() if not _finite(_local(p))],
            "rows": [row for k, _, inputs in chosen for row in self._row_texts(k, inputs)],
        }
        file = place.with_suffix(".safetensors")
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            draft = file.with_name(file.name + ".part")
            draft.write_bytes(safetensors.torch.save({n: t.detach().cpu().clone() for n, t in tensors.items()}))
            os.replace(draft, file)
            write_json(place.with_suffix(".json"), record)
        except OSError as problem:  # a full disk must not hide the message
            return f"the micro-batch could not be saved to {file}: {problem}"
        return f"micro-batch saved to {file}, described in the .json beside it"

    def _row_texts(self, k: int, inputs: Mapping[str, Any]) -> list[dict[str, Any]]:
        """Every row of a micro-batch: prompt as text, completion as the texts of its tokens."""
        ids, mask = inputs.get("completion_ids"), inputs.get("completion_mask")
        if ids is None or mask is None:
            return []
        prompts, real = inputs["prompt_ids"], inputs["prompt_mask"].bool()
        numbers = inputs["row"].tolist() if "row" in inputs else [None] * ids.size(0)
        return [
            {
                "micro_batch": k,
                "row": number,
                "prompt": self._tokenizer.decode(prompt[keep]),
                "tokens": [self._table.text(token) for token in row[counted.bool()].tolist()],
            }
            for number, prompt, keep, row, counted in zip(numbers, prompts, real, ids, mask, strict=True)
        ]


def _check_rows(dataset: Any) -> None:
    if dataset is not None and hasattr(dataset, "__len__") and len(dataset) == 0:
        raise ConfigError("train_dataset: it has no rows; choose other data (`data`)", "data")


def _rows_of(chosen: Chosen) -> str:
    """Micro-batches, and the rows of the rollout in them where these are known."""
    batches = ", ".join(str(k) for k, _, _ in chosen)
    rows = sorted({row for _, _, inputs in chosen if "row" in inputs for row in inputs["row"].tolist() if row >= 0})
    if rows:
        return f"micro-batch {batches}, rows {', '.join(map(str, rows))} of the rollout"
    counts = {len(inputs["completion_ids"]) for _, _, inputs in chosen if "completion_ids" in inputs}
    return f"micro-batch {batches}" + (f", rows 0 to {max(counts) - 1} of it" if counts else "")


def _local(tensor: Tensor) -> Tensor:
    """This rank's part of a sharded tensor."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def _finite(tensor: Tensor) -> bool:
    return not tensor.is_floating_point() or bool(tensor.isfinite().all())


def _number(value: Tensor) -> float | str:
    """JSON has neither NaN nor infinity: their names."""
    number = float(value)
    return number if math.isfinite(number) else str(number)
