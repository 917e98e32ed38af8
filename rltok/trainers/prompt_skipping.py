"""Prompt skipping between data loader and rollout: which prompts of a batch are replaced, alike on all ranks.

The rows of all ranks are put in one order and tested group by group, because a group may lie on two ranks. Every rank
makes every decision itself, from gathered prompt ids, so nothing but ids is sent.

Source: arXiv 2506.02177. Its loader drops a skipped prompt and reads on; here the batch of the data loader keeps its
size and order, and the next prompt of the refill stream takes the place of a skipped one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor

from rltok.selection.prompts import PromptSkippingConfig, PromptTraces, prompt_id
from rltok.trainers.prompts import RefillPrompts

Row = dict[str, Any]


class SkippedPrompts:
    """Replaces prompts that `PromptTraces` skips, and learns from the rewards afterwards.

    For each training batch, on every rank:

        inputs = skipped.replace(inputs, group_size)          # before the rollout
        ids = skipped.ids                                     # of its groups, in global order
        ... rollout, rewards ...
        values = skipped.record(ids, rewards_of_metric_on_all_ranks, group_size, epoch)
        values | skipped.metrics                              # what to log

    Further rounds of dynamic sampling in the same batch take their prompts from `take(count)` instead of
    `refill.take(count)` and their ids from `ids_of(rows, group_size)`; ids and rewards of all rounds, constant groups
    included, are concatenated and go to one `record` at the end, so that the controller acts once per batch.
    `refill` is one and the same object for both, and its position is saved beside `state`.
    """

    def __init__(
        self,
        config: PromptSkippingConfig,
        dataset: Any,
        refill: RefillPrompts,
        accelerator: Accelerator,
        seed: int,
    ) -> None:
        self.dataset, self.refill, self.accelerator = dataset, refill, accelerator
        self.traces = PromptTraces(config, seed)
        self.ids: list[str] = []
        """prompt id of each group of the last replaced batch, in global order"""
        self._ids: dict[int, str] = {}  # by row of the dataset, as far as drawn
        self._start_batch()

    def replace(self, inputs: list[Row], group_size: int) -> list[Row]:
        """This rank's rows with skipped prompts replaced; `inputs` itself if there are none.

        A batch that has met as many skipped prompts in the refill stream as the dataset has rows keeps the prompts it
        would still skip, so that it always ends.

        Raises:
            ValueError: groups that are not whole, or rows of one group that differ.
        """
        self._start_batch()
        self.ids = self.ids_of(inputs, group_size)
        replaced: dict[int, int] = {}
        for group, identity in enumerate(self.ids):
            if not self._skips(identity):
                continue
            index = self._next()
            if index is None:
                self._skipped -= 1
                self._kept += 1
            else:
                replaced[group] = index
                self.ids[group] = self._id(index)
        if not replaced:
            return inputs
        first = self.accelerator.process_index * len(inputs)
        sources = [replaced.get((first + i) // group_size) for i in range(len(inputs))]
        return [row if index is None else dict(self.dataset[index]) for row, index in zip(inputs, sources, strict=True)]

    def take(self, count: int) -> list[int]:
        """The next `count` rows of the refill stream that are not skipped; all ranks draw the same.

        Shares the limit of `replace`; beyond it rows are taken untested.
        """
        taken = []
        for _ in range(count):
            index = self._next()
            if index is None:
                index = self.refill.take(1)[0]
                self._kept += 1
            taken.append(index)
        return taken

    def ids_of(self, rows: Sequence[Mapping[str, Any]], group_size: int) -> list[str]:
        """Prompt id of each group over all ranks, in global order, from this rank's rows; call it on every rank.

        Before the rollout: scoring may change a row.

        Raises:
            ValueError: groups that are not whole, or rows of one group that differ.
        """
        ids = gather_object([prompt_id(row) for row in rows])
        if len(ids) % group_size:
            raise ValueError(f"{len(ids)} rows on all ranks are not whole groups of group_size={group_size}")
        for start in range(0, len(ids), group_size):
            if len(set(ids[start : start + group_size])) > 1:
                raise ValueError(
                    f"rows {start} to {start + group_size - 1} are one group of group_size={group_size} but hold "
                    "different prompts; rollout.prompt_skipping needs the rows of a prompt adjacent over all ranks"
                )
        return ids[::group_size]

    def record(self, ids: Sequence[str], metric_all_ranks: Tensor, group_size: int, epoch: float) -> dict[str, float]:
        """Enter the rewards (N,) of the groups `ids`; the controller acts from the second epoch (`epoch` >= 1) on."""
        return self.traces.record(ids, metric_all_ranks, group_size, adapt=epoch >= 1)

    @property
    def metrics(self) -> dict[str, float]:
        """Of the last batch: prompts `skipped`, their share of those tested, and `kept_at_limit` against the test."""
        return {
            "skipped": float(self._skipped),
            "skipped_share": self._skipped / max(1, self._tested),
            "kept_at_limit": float(self._kept),
        }

    @property
    def state(self) -> dict[str, Any]:
        """What a checkpoint needs besides the refill stream's position: plain containers."""
        return self.traces.state

    def load(self, state: Mapping[str, Any]) -> None:
        """Continue from `state`."""
        self.traces.load(state)

    def _start_batch(self) -> None:
        self._tested = self._skipped = self._kept = self._in_vain = 0

    def _skips(self, identity: str) -> bool:
        skips = self.traces.skips(identity)
        self._tested += 1
        self._skipped += skips
        return skips

    def _next(self) -> int | None:
        """The refill stream's next row that is not skipped, or None at the limit."""
        while self._in_vain < self.refill.size:
            index = self.refill.take(1)[0]
            if not self._skips(self._id(index)):
                return index
            self._in_vain += 1
        return None

    def _id(self, index: int) -> str:
        if index not in self._ids:
            self._ids[index] = prompt_id(self.dataset[index])
        return self._ids[index]
