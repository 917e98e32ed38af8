"""From a scored generation batch to the micro-batches of what was selected: exchange, repacking, divisors, metrics.

Every rank solves the same small problem on the numbers of all ranks, receives the kept rows, and takes its share of
them. Nothing is dropped by weight: what is not selected is in no forward pass.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from rltok.batch import TokenBatch
from rltok.selection import RowBatch, SelectionMethod, keep_count, pack_rows
from rltok.selection.packing import Slots, used_slots
from rltok.trainers.distributed import gather_rows
from rltok.trainers.dynamic_sampling import LEFT_PADDED, gather_batch, mixed_groups

Rows = dict[str, Tensor]
Score = Callable[[Rows], tuple[Tensor, Tensor]]
"""kept rows of all ranks -> (rows, T) old log-probabilities and entropies"""

RESIDUE = 1e-3
"""float32 rounding leaves advantages up to 6e-4 in a group of equal rewards; below this they are read as 0"""


@dataclass(frozen=True)
class UpdateShape:
    """How a rollout is cut into updates, and what a micro-batch's cost is made of."""

    windows: int
    """optimizer steps per rollout"""
    slots: int
    """micro-batches per optimizer step and rank"""
    rows_per_slot: int
    pad_id: int
    pad_multiple: int = 1
    body_weights: int = 1
    """weights every position passes through"""
    head_weights: int = 0
    """weights of the output layer"""
    body_passes: float = 3.0
    """forward and backward of the body in units of its forward; 4 with gradient checkpointing"""
    head_everywhere: bool = False
    """the head of a full batch computes every position, not only the completion's (CPU)"""


@dataclass
class Selected:
    """What one rollout's updates will train on, on this rank."""

    slots: list[Rows | None]
    """micro-batches in order; None runs nothing"""
    keep: Tensor
    """(B, T) bool over this rank's own rollouts: what may be trained, for the completions table"""
    credit: Tensor
    """(B, T) credit of this rank's own rollouts after selection"""
    metrics: dict[str, float] = field(default_factory=dict)


class RolloutSelector:
    """Applies a selection method to generation batches."""

    def __init__(
        self, method: SelectionMethod, accelerator: Accelerator, shape: UpdateShape, whole_rows: bool, source: str
    ) -> None:
        self.method, self.accelerator, self.shape = method, accelerator, shape
        self.whole_rows = whole_rows
        """the ratio of a row needs all its tokens, so no position can be left out"""
        self.source = source
        """`old` or `micro`: where the entropies come from"""

    def budget(self, step: int, total: int, rows: int, group_size: int) -> tuple[int, float, bool]:
        """Rows to keep, share of tokens, and whether that is everything: the baseline, without any repacking."""
        n_keep, share = self.method.at(step, total, rows, group_size)
        count = rows if self.method.scope == "batch" else group_size
        return n_keep, share, n_keep >= count and share >= 1 and not self.method.drops_zero

    def select(
        self,
        output: Mapping[str, Any],
        batch: TokenBatch,
        credit: Tensor,
        entropy: Tensor | None,
        budget: tuple[int, float, bool],
        seed: int,
        score: Score | None,
    ) -> Selected:
        """Choose rows and tokens and cut them into micro-batches.

        Args:
            output: this rank's scored rows; (B, ...) tensors, and 0-d ones that every micro-batch gets.
            credit: (B, T) of this rank.
            entropy: (B, T) old entropies of this rank, or None.
            score: scores kept rows only, where the old policy was not scored on all rows.
        """
        n_keep, share, _ = budget
        rows_all = row_batch(self.accelerator, batch, credit, seed)
        kept = self._rows(rows_all, n_keep)
        new = self.method.credit(rows_all, kept)
        if new is not None:
            credit = batch.local(new)[:, None].to(credit.dtype) * batch.mask
        local = kept[(kept >= batch.offset) & (kept < batch.offset + credit.size(0))]
        rows = {name: value[local - batch.offset] for name, value in output.items() if value.dim() > 0}
        rows |= {"advantages": credit[local - batch.offset], "row": local}
        if entropy is not None:
            rows["old_entropy"] = entropy[local - batch.offset]
        rows = exchange_rows(self.accelerator, rows, self.shape.pad_id)
        if score is not None and kept.numel():
            rows["old_per_token_logps"], rows["old_entropy"] = score(rows)
            if "old_per_token_logps" not in output:
                del rows["old_per_token_logps"]
        valid = valid_tokens(rows)
        keep = self._tokens(rows, valid, share, seed)
        rows.pop("old_entropy", None)
        packed = self._pack(rows, valid, keep, share, seed)
        slots = self._slots(rows | {"keep": keep}, valid, packed, output, share, rows_all)
        own = torch.zeros_like(batch.mask, dtype=torch.bool)
        mine = (rows["row"] >= batch.offset) & (rows["row"] < batch.offset + credit.size(0))
        own[rows["row"][mine] - batch.offset] = keep[mine, : own.size(1)]  # other ranks' rows may be longer
        metrics = packed.metrics | self._metrics(rows_all, kept, keep, budget, output)
        return Selected(slots, own, credit, metrics)

    def _rows(self, rows: RowBatch, n_keep: int) -> Tensor:
        if not rows.credit[rows.trainable].any():  # nothing carries signal, so no set of rows is better than none
            return torch.zeros(0, dtype=torch.long, device=rows.credit.device)
        return self.method.rows(rows, n_keep)

    def _in_micro_batches(self, share: float) -> bool:
        """True if tokens are chosen inside the loss."""
        return share < 1 and self.method.reads_entropy and self.source == "micro"

    def _tokens(self, rows: Rows, valid: Tensor, share: float, seed: int) -> Tensor:
        if share >= 1 or self._in_micro_batches(share) or not valid.any():
            return valid
        per_row = self.method.token_scope == "sample"
        return self.method.tokens(rows["advantages"], rows.get("old_entropy"), valid, share, per_row, seed)

    # ------------------------------------------------------------------ repacking

    def _pack(self, rows: Rows, valid: Tensor, keep: Tensor, share: float, seed: int) -> _Packed:
        shape, in_loss = self.shape, self._in_micro_batches(share)
        needed = valid if self.whole_rows or in_loss else keep
        live = keep.any(1).nonzero()[:, 0]
        position = torch.arange(1, valid.size(1) + 1, device=valid.device)
        cuts = (needed * position).amax(1) if valid.numel() else valid.sum(1)
        prompts = rows["prompt_mask"].sum(1)
        lengths = (prompts + cuts)[live].tolist()
        ranks = self.accelerator.num_processes
        places = pack_rows(lengths, shape.windows, ranks, shape.slots, shape.rows_per_slot, seed)
        index = live.tolist()
        windows = [[[[index[i] for i in slot] for slot in rank] for rank in window] for window in places]
        return _Packed(windows, prompts.tolist(), cuts.tolist())

    def _slots(
        self, rows: Rows, valid: Tensor, packed: _Packed, output: Mapping[str, Any], share: float, rows_all: RowBatch
    ) -> list[Rows | None]:
        shape, rank, ranks = self.shape, self.accelerator.process_index, self.accelerator.num_processes
        device = rows["row"].device
        in_loss, per_row = self._in_micro_batches(share), self.method.token_scope == "sample"
        row_tokens = valid.sum(1)
        row_kept = rows["keep"].sum(1)
        counts: list[int] = row_tokens.tolist()
        trained = int(row_kept.sum())
        if in_loss:  # an exact number per pool, known before the pool's entropies are
            pools = [slot for window in packed.windows for r in window for slot in r if slot]
            sizes = counts if per_row else [sum(counts[i] for i in slot) for slot in pools]
            trained = sum(keep_count(size, share) for size in sizes)
        live_windows = [window for window in packed.windows if used_slots(window)]
        norm = self.method.loss_norm
        tokens_all = float(output["num_items_in_batch"])
        tokens = {"kept": trained, "selected": int(row_tokens.sum()), "full": tokens_all}[norm]
        live_rows = sum(len(slot) for window in packed.windows for r in window for slot in r)
        rows_norm = {"kept": live_rows, "selected": rows["row"].numel(), "full": rows_all.credit.numel()}[norm]
        parts = (shape.windows if norm == "full" else max(1, len(live_windows))) * ranks
        common = {name: value for name, value in output.items() if value.dim() == 0}
        common |= {
            "loss_tokens": torch.tensor(max(tokens, 1) / parts, device=device),
            "loss_rows": torch.tensor(max(rows_norm, 1) / parts, device=device),
            "budget_share": torch.tensor(
                trained / max(1, int(row_tokens.sum())) if norm == "kept" else 1.0, device=device
            ),
        }
        if in_loss:
            common["token_share"] = torch.tensor(share, dtype=torch.float64)
        if norm != "kept":
            rows = rows | {"row_tokens": row_tokens}
        slots: list[Rows | None] = []
        for window in packed.windows:
            used = used_slots(window)
            common = common | {"used_slots": torch.tensor(float(used), device=device)}
            for number in range(shape.slots):
                if number < shape.slots - used:
                    slots.append(None)
                elif window[rank][number]:
                    slots.append(cut_rows(rows, window[rank][number], packed, shape.pad_multiple) | common)
                else:
                    slots.append(_stand_in(rows, window, packed, shape.pad_multiple) | common)
        packed.metrics = self._work(packed, rows, counts, row_kept.tolist(), trained, in_loss, output, rows_all)
        packed.metrics["selection/divisor"] = max(tokens, 1) / (parts / ranks)
        return slots

    # ------------------------------------------------------------------ metrics

    def _work(
        self,
        packed: _Packed,
        rows: Rows,
        counts: list[int],
        kept: list[int],
        trained: int,
        in_loss: bool,
        output: Mapping[str, Any],
        rows_all: RowBatch,
    ) -> dict[str, float]:
        """Rows and tokens of the updates, and an estimate of their work as a share of the full batch's."""
        shape = self.shape
        slots = [slot for window in packed.windows for rank in window for slot in rank if slot]
        used = [i for slot in slots for i in slot]
        positions = sum(
            len(slot) * (max(packed.prompts[i] for i in slot) + max(packed.cuts[i] for i in slot)) for slot in slots
        )
        scored = sum(counts[i] for i in used) if self.whole_rows else trained
        looked_at = sum(counts[i] for i in used) if in_loss and not self.whole_rows else 0
        samples, tokens = rows_all.credit.numel(), float(output["num_items_in_batch"])
        width = rows["prompt_ids"].size(1) + rows["completion_ids"].size(1)
        full_head = samples * width if shape.head_everywhere else tokens
        work = shape.body_passes * shape.body_weights * positions + shape.head_weights * (4 * scored + looked_at)
        full = shape.body_passes * shape.body_weights * samples * width + shape.head_weights * 4 * full_head
        return {
            "selection/samples_generated": samples,
            "selection/samples_trained": len(used),
            "selection/samples_skipped": samples - len(used),
            "selection/tokens_generated": tokens,
            "selection/tokens_trained": trained,
            "selection/tokens_skipped": tokens - trained,
            "selection/work_share": work / max(full, 1.0),
        }

    def _metrics(
        self,
        rows: RowBatch,
        kept: Tensor,
        keep: Tensor,
        budget: tuple[int, float, bool],
        output: Mapping[str, Any],
    ) -> dict[str, float]:
        n_keep, share, _ = budget
        count = rows.credit.numel() if self.method.scope == "batch" else rows.group_size
        found = {"selection/rows_share": min(1.0, n_keep / count), "selection/tokens_share": share}
        values = rows.credit[kept]
        spread = float(rows.credit.var(unbiased=False))
        grouped = rows.rewards.view(-1, rows.group_size).nanmean(1)
        return found | {
            "selection/prompts_trained": float(rows.groups[kept].unique().numel()),
            "selection/prompt_reward_trained": float(grouped[rows.groups[kept]].mean()) if kept.numel() else 0.0,
            "selection/credit_mean": float(values.mean()) if kept.numel() else 0.0,
            "selection/variance_gain": float(values.var(unbiased=False)) / spread if kept.numel() and spread else 0.0,
        }

    def everything_metrics(self, output: Mapping[str, Any], rows: int, share: float) -> dict[str, float]:
        """The same numbers for a rollout that is trained whole."""
        tokens = float(output["num_items_in_batch"])
        return {
            "selection/rows_share": 1.0,
            "selection/tokens_share": share,
            "selection/samples_generated": rows,
            "selection/samples_trained": rows,
            "selection/samples_skipped": 0.0,
            "selection/tokens_generated": tokens,
            "selection/tokens_trained": tokens,
            "selection/tokens_skipped": 0.0,
            "selection/work_share": 1.0,
            "selection/divisor": tokens / self.shape.windows,
        }


@dataclass
class _Packed:
    windows: list[list[Slots]]
    """[window][rank][slot] -> indices of kept rows"""
    prompts: list[int]
    """prompt tokens of each kept row"""
    cuts: list[int]
    """completion positions of each kept row up to the last one that is needed"""
    metrics: dict[str, float] = field(default_factory=dict)


def row_batch(accelerator: Accelerator, batch: TokenBatch, credit: Tensor, seed: int) -> RowBatch:
    """One number per row of all ranks: its mean credit over the tokens that count.

    Summed in float64, so that equal credit stays exactly equal whatever the lengths. In a group of equal rewards what
    rounding left of the advantages becomes 0.
    """
    mask = batch.mask.double()
    mean = (credit.double() * mask).sum(1) / mask.sum(1).clamp(min=1)
    values = gather_rows(accelerator, mean)
    dead = ~mixed_groups(batch.all_rewards, batch.group_size).repeat_interleave(batch.group_size)
    values = torch.where(dead & (values.abs() < RESIDUE), 0.0, values)
    return RowBatch(values, batch.all_rewards, batch.all_lengths > 0, batch.group_size, seed)


def exchange_rows(accelerator: Accelerator, rows: Rows, pad_id: int) -> Rows:
    """Rows of every rank, in different numbers -> all of them on every rank, in rank order."""
    if accelerator.num_processes == 1:
        return rows
    count = rows["row"].numel()
    counts = accelerator.gather(torch.tensor([count], device=accelerator.device)).tolist()
    most = max(counts)
    padded = {name: torch.cat([value, value.new_zeros(most - count, *value.shape[1:])]) for name, value in rows.items()}
    gathered = gather_batch(accelerator, padded, pad_id)
    real = torch.tensor([i < n for n in counts for i in range(most)], dtype=torch.bool, device=accelerator.device)
    return {name: value[real] for name, value in gathered.items()}


def valid_tokens(rows: Mapping[str, Tensor]) -> Tensor:
    """(n, T) bool: chosen by the policy and counted by the loss."""
    mask = rows["completion_mask"].bool()
    return mask & rows["tool_mask"].bool() if "tool_mask" in rows else mask


def cut_rows(rows: Rows, index: list[int], packed: _Packed, multiple: int = 1) -> Rows:
    """Some rows without the padding and the tail that none of them needs."""
    prompt = max(packed.prompts[i] for i in index)
    return trimmed(rows, index, prompt, max(packed.cuts[i] for i in index), multiple)


def trimmed(rows: Rows, index: list[int], prompt: int, completion: int, multiple: int = 1) -> Rows:
    """Rows `index` with the last `prompt` and the first `completion` positions, widths rounded up to `multiple`."""
    width = rows["completion_ids"].size(1)
    take = torch.tensor(index, device=rows["row"].device)
    prompt = min(rows["prompt_ids"].size(1), -(-max(prompt, 1) // multiple) * multiple)
    completion = min(width, -(-max(completion, 1) // multiple) * multiple)

    def cut(name: str, value: Tensor) -> Tensor:
        if name in LEFT_PADDED:
            return value[take, -prompt:]
        return value[take, :completion] if value.dim() > 1 and value.size(1) == width else value[take]

    return {name: cut(name, value) for name, value in rows.items()}


def _stand_in(rows: Rows, window: list[Slots], packed: _Packed, multiple: int) -> Rows:
    """One cheap row of no weight, for a rank that must take part in a step the others have rows for."""
    shortest = min((i for rank in window for slot in rank for i in slot), key=lambda i: packed.prompts[i])
    slot = trimmed(rows, [shortest], packed.prompts[shortest], 1, multiple)
    nothing = torch.zeros_like(slot["completion_mask"])
    return slot | {"keep": nothing.bool(), "tool_mask": nothing, "row": torch.full_like(slot["row"], -1)}
