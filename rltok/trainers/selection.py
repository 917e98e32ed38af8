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
        if self.accelerator.num_processes > 1:  # rejected tokens may have made one on some ranks only
            counted = rows.get("tool_mask", torch.ones_like(rows["completion_mask"]))
            rows["tool_mask"] = counted.to(rows["completion_mask"].dtype)
        rows = exchange_rows(self.accelerator, rows, self.shape.pad_id)
        if score is not None and kept.numel():
            rows["old_per_token_logps"], rows["old_entropy"] = score(rows)
            if "old_per_token_logps" not in output:
                del rows["old_per_token_logps"]
        valid = valid_tokens(rows)
        keep = self._tokens(rows, valid, share, seed)
        rows.pop("old_entropy", None)
        packed = self._pack(rows, valid, keep, share, seed)
        numbers = self._numbers(rows_all, valid, keep, packed, share, float(output["num_items_in_batch"]))
        shared = {name: value for name, value in output.items() if value.dim() == 0}
        shared |= self._divisors(numbers, packed, share)
        per_row = {"keep": keep} if self.method.loss_norm == "kept" else {"keep": keep, "row_tokens": valid.sum(1)}
        slots = self._slots(rows | per_row, shared, packed)
        own = torch.zeros_like(batch.mask, dtype=torch.bool)
        mine = (rows["row"] >= batch.offset) & (rows["row"] < batch.offset + credit.size(0))
        own[rows["row"][mine] - batch.offset] = keep[mine, : own.size(1)]  # other ranks' rows may be longer
        width = rows["prompt_ids"].size(1) + valid.size(1)
        metrics = self._work(numbers, packed, share, width) | self._statistics(rows_all, kept, budget)
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

    def _numbers(
        self, rows_all: RowBatch, valid: Tensor, keep: Tensor, packed: _Packed, share: float, tokens: float
    ) -> _Numbers:
        counts: list[int] = valid.sum(1).tolist()
        trained = int(keep.sum())
        if self._in_micro_batches(share):  # an exact number per pool, known before the pool's entropies are
            per_row = self.method.token_scope == "sample"
            sizes = counts if per_row else [sum(counts[i] for i in slot) for slot in packed.slots]
            trained = sum(keep_count(size, share) for size in sizes)
        return _Numbers(
            rows_generated=rows_all.credit.numel(),
            rows_selected=len(counts),
            rows_trained=sum(len(slot) for slot in packed.slots),
            tokens_generated=tokens,
            tokens_selected=sum(counts),
            tokens_in_slots=sum(counts[i] for slot in packed.slots for i in slot),
            tokens_trained=trained,
        )

    def _divisors(self, n: _Numbers, packed: _Packed, share: float) -> Rows:
        """What the losses of a micro-batch are divided by, the same in every micro-batch of the rollout."""
        norm, device = self.method.loss_norm, self.accelerator.device
        tokens = {"kept": n.tokens_trained, "selected": n.tokens_selected, "full": n.tokens_generated}[norm]
        rows = {"kept": n.rows_trained, "selected": n.rows_selected, "full": n.rows_generated}[norm]
        parts = packed.parts(self.shape.windows if norm == "full" else 0)
        kept_share = n.tokens_trained / max(1, n.tokens_selected) if norm == "kept" else 1.0
        values = {"loss_tokens": max(tokens, 1) / parts, "loss_rows": max(rows, 1) / parts, "budget_share": kept_share}
        found = {name: torch.tensor(value, device=device) for name, value in values.items()}
        if self._in_micro_batches(share):
            found["token_share"] = torch.tensor(share, dtype=torch.float64, device=device)
        return found

    def _slots(self, rows: Rows, shared: Rows, packed: _Packed) -> list[Rows | None]:
        shape, rank = self.shape, self.accelerator.process_index
        slots: list[Rows | None] = []
        for window in packed.windows:
            used = used_slots(window)
            common = shared | {"used_slots": torch.tensor(float(used), device=self.accelerator.device)}
            for number in range(shape.slots):
                index = window[rank][number]
                if number < shape.slots - used:
                    slots.append(None)
                elif index:
                    slots.append(cut_rows(rows, index, packed, shape.pad_multiple) | common)
                else:
                    slots.append(_stand_in(rows, window, packed, shape.pad_multiple) | common)
        return slots

    # ------------------------------------------------------------------ metrics

    def _work(self, n: _Numbers, packed: _Packed, share: float, width: int) -> dict[str, float]:
        """Rows and tokens of the updates, and an estimate of their work as a share of the full batch's."""
        shape = self.shape
        positions = sum(
            len(slot) * (max(packed.prompts[i] for i in slot) + max(packed.cuts[i] for i in slot))
            for slot in packed.slots
        )
        scored = n.tokens_in_slots if self.whole_rows else n.tokens_trained
        looked_at = n.tokens_in_slots if self._in_micro_batches(share) and not self.whole_rows else 0
        everywhere = n.rows_generated * width
        full_head = everywhere if shape.head_everywhere else n.tokens_generated
        work = shape.body_passes * shape.body_weights * positions + shape.head_weights * (4 * scored + looked_at)
        full = shape.body_passes * shape.body_weights * everywhere + shape.head_weights * 4 * full_head
        divisor = {"kept": n.tokens_trained, "selected": n.tokens_selected, "full": n.tokens_generated}
        norm = self.method.loss_norm
        windows = packed.parts(shape.windows if norm == "full" else 0) / self.accelerator.num_processes
        return {
            "selection/samples_generated": n.rows_generated,
            "selection/samples_trained": n.rows_trained,
            "selection/samples_skipped": n.rows_generated - n.rows_trained,
            "selection/tokens_generated": n.tokens_generated,
            "selection/tokens_trained": n.tokens_trained,
            "selection/tokens_skipped": n.tokens_generated - n.tokens_trained,
            "selection/work_share": work / max(full, 1.0),
            "selection/divisor": max(divisor[norm], 1) / windows,
        }

    def _statistics(self, rows: RowBatch, kept: Tensor, budget: tuple[int, float, bool]) -> dict[str, float]:
        """The schedule, and what kind of rows were kept."""
        n_keep, share, _ = budget
        count = rows.credit.numel() if self.method.scope == "batch" else rows.group_size
        values, some = rows.credit[kept], kept.numel() > 0
        spread = float(rows.credit.var(unbiased=False))
        grouped = rows.rewards.view(-1, rows.group_size).nanmean(1)
        return {
            "selection/rows_share": min(1.0, n_keep / count),
            "selection/tokens_share": share,
            "selection/prompts_trained": float(rows.groups[kept].unique().numel()),
            "selection/prompt_reward_trained": float(grouped[rows.groups[kept]].mean()) if some else 0.0,
            "selection/credit_mean": float(values.mean()) if some else 0.0,
            "selection/variance_gain": float(values.var(unbiased=False)) / spread if some and spread else 0.0,
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


@dataclass(frozen=True)
class _Packed:
    windows: list[list[Slots]]
    """[window][rank][slot] -> indices of kept rows"""
    prompts: list[int]
    """prompt tokens of each kept row"""
    cuts: list[int]
    """completion positions of each kept row up to the last one that is needed"""

    @property
    def slots(self) -> list[list[int]]:
        """Every micro-batch with rows, on any rank."""
        return [slot for window in self.windows for rank in window for slot in rank if slot]

    def parts(self, windows: int = 0) -> int:
        """Ranks times optimizer steps: `windows`, or those that have rows."""
        live = windows or sum(used_slots(window) > 0 for window in self.windows)
        return max(1, live) * len(self.windows[0])


@dataclass(frozen=True)
class _Numbers:
    """Counts of one rollout over all ranks."""

    rows_generated: int
    rows_selected: int
    rows_trained: int
    tokens_generated: float
    tokens_selected: int
    tokens_in_slots: int
    """of the rows that reach a forward pass"""
    tokens_trained: int


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
    padded = {
        name: torch.cat([value, value.new_zeros(most - count, *value.shape[1:])])
        for name, value in sorted(rows.items())  # one order of collectives on all ranks
    }
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
