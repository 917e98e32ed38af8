"""Door 2 inside the trainer: TRL's loss, composed from `rltok.objective`, and the numbers it logs."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from trl import GRPOConfig

from rltok.objective import Divisors, LossBatch, LossSettings, aggregate, plan_loss, reference_kl, token_loss
from rltok.objective.aggregate import CLIPPED, TOKEN_NORMALISED
from rltok.trainers.door_trainer import DoorTrainer, loss_mask, stats_from

# Of a pass over a part of a micro-batch or an unequal one, 0-d: rows and loss tokens of an average micro-batch of its
# window, and the pass's share of an average micro-batch's tokens, prompts included.
PASS_ROWS, PASS_TOKENS, PASS_SHARE = "pass/slice_rows", "pass/slice_tokens", "pass/share"


@dataclass
class WindowSums:
    """What the passes of one optimizer step add up to on this rank; it is reduced over ranks once, at the end."""

    pairs: dict[str, Tensor] = field(default_factory=dict)
    """name -> (2,) sum and count, in the order of the first pass"""
    extremes: Tensor | None = None
    """(2,) smallest share of low-clipped tokens of a completion, negated; largest share of high-clipped ones"""
    entropies: list[Tensor] = field(default_factory=list)
    """1-d entropies of the trained tokens, nats"""
    totals: dict[str, Tensor] = field(default_factory=dict)
    """name -> 0-d sum over passes, averaged over ranks"""

    def add_means(self, pairs: Mapping[str, Tensor], extremes: Tensor | None) -> None:
        for name, pair in pairs.items():
            self.pairs[name] = self.pairs[name] + pair if name in self.pairs else pair
        if extremes is not None:
            self.extremes = extremes if self.extremes is None else torch.maximum(self.extremes, extremes)

    def add(self, name: str, value: Tensor) -> None:
        self.totals[name] = self.totals[name] + value if name in self.totals else value


class ComposedLoss(DoorTrainer):
    """`_compute_loss` and what belongs to it; equal to TRL's when no door is set."""

    _window: WindowSums | None = None
    """sums of the optimizer step at hand, None where every micro-batch is reported by itself"""

    def _compute_loss(self, model: Any, inputs: dict[str, Any]) -> Tensor:
        mode = "train" if self.model.training else "eval"
        mask = valid = loss_mask(inputs)
        logps, entropy, aux_loss, kept = self._score_for_loss(model, inputs, mask)
        # a ratio over whole completions still sees the dropped tokens; otherwise they are not even scored
        if kept is not None and not (self._selector is not None and self._selector.whole_rows):
            mask = kept
        trained = mask if kept is None else kept
        selected = None
        if self.top_entropy_quantile < 1.0:
            selected = self.get_high_entropy_mask(entropy, mask, 1 - self.top_entropy_quantile)
        batch = LossBatch(
            logps=logps,
            old_logps=inputs.get("old_per_token_logps", logps.detach()),
            mask=mask,
            entropy=entropy.detach(),
            entropy_stats=stats_from(inputs),
            gather=self._gather,
            seed=(self.args.seed * 1_000_003 + self._step) * 1009 + self.accelerator.process_index,
        )
        advantages = inputs["advantages"]
        plan = plan_loss(
            batch,
            advantages if advantages.dim() > 1 else advantages.unsqueeze(1),
            self.loss_settings,
            self.doors.objective,
        )
        losses, values = token_loss(batch, plan, self.loss_settings, self._sampler_weight(inputs))
        if self.off_policy_mask_threshold is not None:
            losses = losses * self.get_off_policy_mask(
                advantages=plan.advantages,
                per_token_logps=logps,
                sampling_per_token_logps=inputs.get("sampling_per_token_logps", batch.old_logps),
                mask=mask,
                off_policy_threshold=self.off_policy_mask_threshold,
            )
        if selected is not None:
            losses = losses * selected
        if self.beta != 0.0:
            kl = reference_kl(logps, inputs["ref_per_token_logps"])
            if self.args.use_bias_correction_kl:
                kl = kl * torch.exp(plan.log_weight)
            losses = losses + self.beta * kl
            values["kl"] = kl.detach()
        loss = aggregate(losses, trained, self.loss_type, self._divisors(inputs, mode))
        slice_tokens = inputs.get(PASS_TOKENS)
        loss = self._add_entropy_bonus(loss, entropy, mask if selected is None else mask * selected, mode, slice_tokens)
        if self.aux_loss_enabled:
            steps = inputs["used_slots"] if "used_slots" in inputs else self._accumulation(mode)
            share = inputs.get(PASS_SHARE, 1.0)
            loss = loss + self.router_aux_loss_coef * aux_loss * share / steps
            if self._window is None:
                self._metrics[mode]["aux_loss"].append(self.accelerator.gather_for_metrics(aux_loss).mean().item())
            else:
                self._window.add("aux_loss", aux_loss.detach() * share / steps)
        values |= plan.metrics
        values["entropy"] = entropy.detach()
        values["ratio"] = torch.exp(plan.log_weight.detach())
        self._log_token_means(values, trained, mode)
        self._log_entropy_quantile(values["entropy"], trained, mode)
        if mode == "train" and self.log_completions and "row" in inputs:
            self._table.remember(inputs["row"], plan.advantages.expand_as(logps) * trained, valid)
        if mode == "train" and self._recorder is not None and "row" in inputs:
            flags = (values["clip_ratio/low_mean"], values["clip_ratio/high_mean"]) if self._clips else None
            self._recorder.remember(inputs, batch, plan, trained, flags)
        return loss

    @property
    def _clips(self) -> bool:
        return self.loss_type in CLIPPED

    def _sampler_weight(self, inputs: Mapping[str, Any]) -> Tensor | None:
        ours = self.doors.rollout.resolved_correction.mode != "off"
        trls = self.use_vllm and self.vllm_importance_sampling_correction
        return inputs.get("importance_sampling_ratio") if ours or trls else None

    def _accumulation(self, mode: str) -> float:
        return float(self.current_gradient_accumulation_steps) if mode == "train" else 1.0

    def _divisors(self, inputs: Mapping[str, Any], mode: str) -> Divisors:
        if "loss_tokens" in inputs:  # after selection
            budget = inputs["budget_share"] * self.max_completion_length
            rows = inputs["loss_rows"]
            return Divisors(1.0, inputs["loss_tokens"], budget, rows, inputs.get("row_tokens"))
        # The token count spans the generation batch; one accumulation window holds its share of it.
        tokens = inputs["num_items_in_batch"].clamp(min=1.0) / self.accelerator.num_processes
        if mode == "train":
            tokens = tokens * self.current_gradient_accumulation_steps / self.args.steps_per_generation
        accumulation = self._accumulation(mode)
        if PASS_ROWS not in inputs:
            return Divisors(accumulation, tokens, self.max_completion_length)
        rows, micro_tokens = inputs[PASS_ROWS] * accumulation, inputs[PASS_TOKENS]
        return Divisors(accumulation, tokens, self.max_completion_length, rows, micro_tokens=micro_tokens)

    def _add_entropy_bonus(
        self, loss: Tensor, entropy: Tensor, mask: Tensor, mode: str, slice_tokens: Tensor | None = None
    ) -> Tensor:
        """loss - coef * mean entropy, with TRL's fixed or adaptive coefficient; off by default.

        `slice_tokens`: tokens of an average micro-batch, where micro-batches are unequal; None: those of this one.
        """
        if not self._entropy_bonus_enabled:
            return loss
        scale = 1.0 if self.loss_type in TOKEN_NORMALISED else self._accumulation(mode)
        if self._window is None:
            self._metrics[mode]["policy_loss"].append(self.accelerator.gather(loss.detach() * scale).nanmean().item())
        else:
            self._window.add("policy_loss", loss.detach() * scale / self._accumulation(mode))
        adaptive = self.use_adaptive_entropy
        active = not adaptive or self._last_world_entropy <= self.args.entropy_target
        total, count = (entropy * mask).sum(), mask.sum()
        tokens = count.clamp(min=1.0) if slice_tokens is None else slice_tokens
        loss = loss - (self.entropy_coef if active else 0.0) * total / tokens / self._accumulation(mode)
        if mode == "train" and adaptive:
            window = torch.stack([total.detach(), count.to(total.dtype)])
            window = window if self._entropy_window_stats is None else self._entropy_window_stats + window
            self._entropy_window_stats = window
            if self.accelerator.sync_gradients:
                total, count = self._reducer.sum(window)
                self._last_world_entropy = (total / count.clamp(min=1.0)).item()
                falling = self._last_world_entropy <= self.args.entropy_target
                step = self.args.entropy_coef_delta if falling else -self.args.entropy_coef_delta
                low, high = self.args.entropy_coef_min, self.args.entropy_coef_max
                # each direction meets its own bound only, as a start outside the range must drift back
                moved = self.entropy_coef + step
                self.entropy_coef = min(moved, high) if falling else max(moved, low)
                self._entropy_window_stats = None
        if mode == "train" and self.accelerator.sync_gradients:
            self._metrics[mode]["entropy_coef"].append(self.entropy_coef)
        return loss

    def _log_token_means(self, values: Mapping[str, Tensor], mask: Tensor, mode: str) -> None:
        """Mean over masked tokens (or completions, for (B, 1) values) of all ranks, in one reduction."""
        counted = mask.sum(1) > 0
        # of the rows that selection kept, all; without selection TRL counts empty rows too
        rows = counted.sum() if mode == "train" and self._selector is not None else torch.tensor(mask.size(0))
        rows = rows.to(mask.device).float()
        tokens = mask.sum().float()
        pairs = {"": torch.stack([tokens, tokens])}
        for name, value in values.items():
            per_row = value.size(1) == 1 and mask.size(1) != 1
            pairs[name] = torch.stack([value.sum(), rows] if per_row else [(value * mask).sum(), tokens])
        extremes = None
        if self.loss_type in CLIPPED:
            low, high = (_row_means(values[f"clip_ratio/{side}_mean"], mask) for side in ("low", "high"))
            extremes = torch.stack([-low.masked_fill(~counted, torch.inf).amin(), high.amax()])
        if self._window is None:
            self._report_means(pairs, extremes, mode)
        else:
            self._window.add_means(pairs, extremes)

    def _report_means(self, pairs: Mapping[str, Tensor], extremes: Tensor | None, mode: str) -> None:
        """Sums and counts of this rank -> means over all ranks in the log; the first pair counts tokens."""
        totals = self._reducer.sum(torch.cat(list(pairs.values()))).view(-1, 2)
        if mode == "train":
            self._trained_tokens += int(totals[0, 0].item())
        means = (totals[1:, 0] / totals[1:, 1].clamp(min=1.0)).tolist()
        for name, mean in zip(list(pairs)[1:], means, strict=True):
            self._metrics[mode][name].append(mean)
        if extremes is not None:
            low_min, high_max = self._reducer.max(extremes).tolist()
            self._metrics[mode]["clip_ratio/low_min"].append(-low_min if math.isfinite(low_min) else 0.0)
            self._metrics[mode]["clip_ratio/high_max"].append(high_max)

    def _log_entropy_quantile(self, entropy: Tensor, mask: Tensor, mode: str) -> None:
        """The entropy above which a fifth of the tokens of all ranks lies."""
        if self._window is None:
            self._report_quantile(entropy[mask.bool()], mode)
        else:
            self._window.entropies.append(entropy[mask.bool()])

    def _report_quantile(self, entropies: Tensor, mode: str) -> None:
        values = self._gather(entropies)
        if values.numel():
            top = values.kthvalue(max(1, math.ceil(0.8 * values.numel()))).values
            self._metrics[mode]["entropy/top20_quantile"].append(top.item())

    def _report_window(self, window: WindowSums) -> None:
        """Log what the passes of one optimizer step added up to, over all ranks."""
        if window.pairs:
            self._report_means(window.pairs, window.extremes, "train")
        if window.entropies:
            self._report_quantile(torch.cat(window.entropies), "train")
        if window.totals:
            means = self.accelerator.gather(torch.stack(list(window.totals.values()))[None]).nanmean(0).tolist()
            for name, mean in zip(window.totals, means, strict=True):
                self._metrics["train"][name].append(mean)


def _row_means(values: Tensor, mask: Tensor) -> Tensor:
    """(B,) mean over each row's masked tokens; (B, 1) values are their own mean."""
    per_row = values.size(1) == 1 and mask.size(1) != 1
    return values[:, 0] if per_row else (values * mask).sum(1) / mask.sum(1).clamp(min=1)


def loss_settings(args: GRPOConfig) -> LossSettings:
    return LossSettings(
        loss_type=args.loss_type,
        ratio_level=args.importance_sampling_level,
        epsilon_low=args.epsilon,
        epsilon_high=args.epsilon if args.epsilon_high is None else args.epsilon_high,
        delta=args.delta,
        sapo_tau=(args.sapo_temperature_pos, args.sapo_temperature_neg),
        vespo_k=(args.vespo_k_pos, args.vespo_k_neg),
        vespo_lambda=(args.vespo_lambda_pos, args.vespo_lambda_neg),
    )
