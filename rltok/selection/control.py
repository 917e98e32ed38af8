"""Random selection: the same numbers of rows and tokens as D3S, drawn blindly. The control of every comparison."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from rltok.selection.method import Cuts, RowBatch
from rltok.selection.rows import first_of_each_group
from rltok.selection.tokens import select_tokens


@dataclass(frozen=True)
class RandomSelection(Cuts):
    """Rows and tokens drawn at random, equally on all ranks and again when the run is repeated."""

    reads_entropy: ClassVar[bool] = False
    recredits: ClassVar[bool] = False
    drops_zero: ClassVar[bool] = False

    def rows(self, batch: RowBatch, n_keep: int) -> Tensor:
        """Every set of `n_keep` rows (in all or per prompt) that have a token to train on is equally likely."""
        candidates = batch.trainable.nonzero()[:, 0]
        generator = torch.Generator().manual_seed(batch.seed)
        order = candidates[torch.randperm(candidates.numel(), generator=generator).to(candidates.device)]
        if self.scope == "group":
            order = order[first_of_each_group(batch.groups[order], n_keep)]
        return order[:n_keep].sort().values if self.scope == "batch" else order.sort().values

    def credit(self, batch: RowBatch, kept: Tensor) -> Tensor | None:
        """None: the credit stays as it is."""
        return None

    def tokens(
        self, advantages: Tensor, entropies: Tensor | None, mask: Tensor, share: float, per_row: bool, seed: int
    ) -> Tensor:
        """As many as D3S would keep, drawn from the tokens that count."""
        generator = torch.Generator().manual_seed(seed)
        draws = torch.zeros(mask.shape, dtype=torch.float64)
        valid = mask.bool().cpu()
        draws[valid] = torch.rand(int(valid.sum()), generator=generator, dtype=torch.float64)
        ones = torch.ones(mask.size(0), device=mask.device)
        return select_tokens(ones, draws.to(mask.device), mask, share, "sample" if per_row else "batch")
