"""Selection inside the trainer: micro-batches of what was selected in place of TRL's cut, and their scoring."""

from __future__ import annotations

import logging
import time
from typing import Any

import torch
from torch import Tensor
from trl.models.utils import disable_gradient_checkpointing

from rltok.batch import TokenBatch
from rltok.trainers.door_trainer import MULTIMODAL, DoorTrainer, multimodal, sequence
from rltok.trainers.doors import needs_whole_rows
from rltok.trainers.scoring import kept_positions
from rltok.trainers.selection import RolloutSelector, Rows, UpdateShape, trimmed, valid_tokens

logger = logging.getLogger(__name__)


class SelectedUpdates(DoorTrainer):
    """`_prepare_inputs` and `training_step` for selected rows; without a selection both are TRL's."""

    def _build_selector(self) -> RolloutSelector | None:
        method, args = self.doors.selection, self.args
        if method is None:
            return None
        source: str = method.entropy_from
        if source == "auto":
            source = "old" if self._ratio_needs_old or self._reads_scores else "micro"
        if source == "old" and method.selects_tokens and not (self._ratio_needs_old or self._reads_scores):
            logger.warning(
                "selection.entropy_from='old' with one update per rollout: nothing else needs the old policy's pass, "
                "so each kept row costs one more forward pass. selection.entropy_from='micro' does without."
            )
        model = self._causal_lm
        head = _size(model.get_output_embeddings().weight)
        tables = {id(p): _size(p) for p in (model.get_output_embeddings().weight, model.get_input_embeddings().weight)}
        checkpointing = args.gradient_checkpointing
        shape = UpdateShape(
            windows=args.steps_per_generation // args.gradient_accumulation_steps,
            slots=args.gradient_accumulation_steps,
            rows_per_slot=args.per_device_train_batch_size,
            pad_id=self._tokenizer.pad_token_id,
            pad_multiple=args.pad_to_multiple_of or 1,
            body_weights=max(1, sum(_size(p) for p in model.parameters()) - sum(tables.values())),
            head_weights=head,
            body_passes=4.0 if checkpointing else 3.0,
            head_everywhere=self.accelerator.device.type not in ("cuda", "xpu"),
        )
        return RolloutSelector(method, self.accelerator, shape, needs_whole_rows(self.doors, args), source)

    def _selection_budget(self, rows: int, mode: str) -> tuple[tuple[int, float, bool] | None, bool]:
        """This rollout's cuts, and whether scoring the old policy can wait until rows are selected."""
        self._selected = None
        if self._selector is None or mode != "train":
            return None, False
        budget = self._selector.budget(self.state.global_step, self.state.max_steps, rows, self.num_generations)
        return budget, not (budget[2] or self._reads_scores or self._corrects_vllm)

    def _select(
        self,
        output: dict[str, Any],
        batch: TokenBatch,
        credit: Tensor,
        entropy: Tensor | None,
        budget: tuple[int, float, bool],
        postponed: bool,
    ) -> Tensor:
        """Leaves the micro-batches in `self._selected`; returns the (B, T) credit of what may be trained."""
        selector = self._selector
        assert selector is not None
        if any(key in output for key in MULTIMODAL):
            raise ValueError("selection does not support images, whose rows it cannot exchange; unset it")
        if budget[2]:
            rows = batch.all_rewards.numel()
            self._rollout.metrics = selector.everything_metrics(output, rows, budget[1])
            return credit
        scores = self._ratio_needs_old or (selector.source == "old" and budget[1] < 1 and selector.method.reads_entropy)
        score = self._score_selected if postponed and scores else None
        seed = self.args.seed * 1_000_003 + self._step
        self._selected = selector.select(output, batch, credit, entropy, budget, seed, score)
        self._rollout.metrics = self._selected.metrics
        return self._selected.credit * self._selected.keep

    def _score_selected(self, rows: Rows) -> tuple[Tensor, Tensor]:
        """Old log-probabilities and entropies of kept rows: each rank scores its share, in order of length."""
        accelerator, valid = self.accelerator, valid_tokens(rows)
        count, width = valid.shape
        position = torch.arange(1, width + 1, device=valid.device)
        ends, prompts = (valid * position).amax(1), rows["prompt_mask"].sum(1)
        order = (ends + prompts).argsort(descending=True, stable=True).tolist()
        share = -(-count // accelerator.num_processes)
        # every rank runs equally many passes: some rows are scored twice
        padded = order + order[-1:] * (share * accelerator.num_processes - count)
        mine = padded[accelerator.process_index :: accelerator.num_processes]
        scores = torch.zeros(share, 2, width, device=valid.device)
        model = self._causal_lm
        for start in range(0, share, self.args.per_device_train_batch_size):
            index = mine[start : start + self.args.per_device_train_batch_size]
            chunk = trimmed(rows, index, int(prompts[index].max()), int(ends[index].max()))
            with (
                torch.no_grad(),
                disable_gradient_checkpointing(self.model, self.args.gradient_checkpointing_kwargs),
                kept_positions(model, valid_tokens(chunk), chunk["completion_ids"].size(1)),
            ):
                logps, entropy, *_ = super()._get_per_token_logps_and_entropies(
                    self.model, *sequence(chunk), compute_entropy=True
                )
            scores[start : start + len(index), :, : logps.size(1)] = torch.stack([logps, entropy], 1)
        everyone = accelerator.gather(scores).view(accelerator.num_processes, share, 2, width).transpose(0, 1)
        result = torch.zeros(count, 2, width, device=valid.device)
        result[torch.tensor(padded, device=valid.device)] = everyone.reshape(-1, 2, width)
        return result[:, 0], result[:, 1]

    def _prepare_inputs(self, generation_batch: Any) -> Any:
        if self._selector is None or not self.model.training:
            return super()._prepare_inputs(generation_batch)
        every = self.args.steps_per_generation * self.num_iterations
        due = self._step % every == 0 or self._buffered_inputs is None
        if due and self._rollout.made_at != self._step:
            inputs = super()._prepare_inputs(generation_batch)  # generates, scores, selects and cuts
            self._rollout.made_at = self._step
            if self._selected is None:
                return inputs
            self._buffered_inputs, self._selected = self._selected.slots, None
        assert self._buffered_inputs is not None
        return self._buffered_inputs[self._step % self.args.steps_per_generation]

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        """TRL's step; a micro-batch that selection left empty runs no pass."""
        if self._selector is None:
            return super().training_step(model, inputs, num_items_in_batch)
        start = time.perf_counter()
        model.train()
        slot = self._prepare_inputs(inputs)
        prepared = time.perf_counter()
        self._current_train_step_time += prepared - start
        accumulation = self.args.gradient_accumulation_steps
        if slot is not None:
            loss = super().training_step(model, inputs, num_items_in_batch)
        else:
            loss = torch.zeros((), device=self.accelerator.device)
            self._step += 1
            if self._step % accumulation == 0:
                self._metrics["train"]["step_time"].append(self._current_train_step_time)
                self._current_train_step_time = 0.0
        window = self._rollout
        window.seconds += time.perf_counter() - prepared
        window.ran |= slot is not None
        if self._step % accumulation == 0:
            for name, value in window.metrics.items():
                self._metrics["train"][name].append(value)
            self._metrics["train"]["selection/update_seconds"].append(window.seconds)
            self._rollout.skipped_updates += not window.ran
            window.seconds, window.ran = 0.0, False
        return loss

    def _score_for_loss(self, model: Any, inputs: dict[str, Any], mask: Tensor) -> tuple[Any, Any, Any, Tensor | None]:
        """Log-probabilities, entropies, auxiliary loss, and the (B, T) mask of selected tokens (None: all)."""

        def score() -> Any:
            return self._get_per_token_logps_and_entropies(
                model,
                *sequence(inputs),
                compute_entropy=True,
                compute_aux_loss=self.aux_loss_enabled,
                **multimodal(inputs),
            )

        if "keep" not in inputs:
            return *score(), None
        assert self._selector is not None and self.doors.selection is not None
        keep, method = inputs["keep"], self.doors.selection

        def choose(entropy: Tensor) -> Tensor:
            share, per_row = inputs["token_share"].item(), method.token_scope == "sample"
            return method.tokens(inputs["advantages"], entropy, mask * keep, share, per_row, self._step)

        chosen_here = "token_share" in inputs
        if self._selector.whole_rows:
            logps, entropy, aux = score()
            return logps, entropy, aux, (choose(entropy.detach()) if chosen_here else keep).to(mask.dtype)
        with kept_positions(self._causal_lm, choose if chosen_here else keep, mask.size(1)) as kept:
            logps, entropy, aux = score()
        return logps, entropy, aux, kept.mask.to(mask.dtype)


def _size(weight: Tensor) -> int:
    """Numbers in a whole weight, also where ZeRO-3 has left this process without any."""
    return int(getattr(weight, "ds_numel", weight.numel()))
