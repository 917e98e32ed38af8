"""D3S: train on the rollouts whose advantages vary most and on their tokens of highest |A| H, relaxing both cuts.

    rows    S = argmax over |S| = N of Var(A_S)              rltok.selection.rows
    tokens  the top K of the tokens of S by |A_it| H_it      rltok.selection.tokens
    N, K    a ramp over training                             rltok.selection.schedule

Advantages are those of the full groups, never normalised again. With `rows_start = rows_end = tokens_start = tokens_end
= 1` nothing is dropped and the run is the baseline bit for bit.

| paper | here |
| --- | --- |
| N_init / G, N_final / G | `rows_start`, `rows_end` |
| K_init, K_final | `tokens_start`, `tokens_end` |
| D1S, D1S-Cross | `scope: group`, `scope: batch`, both with tokens at 1 |

Source: arXiv 2509.22115. The values of the four shares, the clock, the pool of tokens, the divisor of the loss and what
to do with rows of no signal are not in its public text: each is an option here, and the defaults are ours.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from rltok.selection.method import Cuts, RowBatch
from rltok.selection.rows import select_rollouts
from rltok.selection.tokens import select_tokens


@dataclass(frozen=True)
class D3S(Cuts):
    """Rollouts of largest advantage variance, tokens of largest |advantage| times entropy."""

    drop_zero: bool = False
    """never keep rows of zero credit, so that fewer than asked for may remain; false fills up with them"""

    reads_entropy: ClassVar[bool] = True
    recredits: ClassVar[bool] = False

    @property
    def drops_zero(self) -> bool:
        """`drop_zero`"""
        return self.drop_zero

    def rows(self, batch: RowBatch, n_keep: int) -> Tensor:
        """Rows without a token to train on are no candidates."""
        candidates = batch.trainable.nonzero()[:, 0]
        kept = select_rollouts(
            batch.credit[candidates], batch.groups[candidates], n_keep, self.scope, drop_zero=self.drop_zero
        )
        return candidates[kept]

    def credit(self, batch: RowBatch, kept: Tensor) -> Tensor | None:
        """None: the advantages stay those of the full groups."""
        return None

    def tokens(
        self, advantages: Tensor, entropies: Tensor | None, mask: Tensor, share: float, per_row: bool, seed: int
    ) -> Tensor:
        """Ranked by |A| H; the seed is not used."""
        assert entropies is not None
        return select_tokens(advantages, entropies, mask, share, "sample" if per_row else "batch")
