"""Group-relative credit: every token of a completion carries the completion's advantage. The baseline of all others.

    A_it = (R_i - mean_group R) / (std_group R + 1e-4)    (whatever `scale_rewards` says; computed by TRL)

Source: arXiv 2402.03300.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from rltok.batch import TokenBatch


@dataclass(frozen=True)
class GroupCredit:
    """GRPO / DAPO: the same group-normalised advantage for every token of a completion."""

    needs: ClassVar[tuple[str, ...]] = ()
    per_token: ClassVar[bool] = False

    def __call__(self, batch: TokenBatch) -> Tensor:
        return batch.advantages[:, None] * batch.mask
