"""Shuffled credit, the control of every method that gives tokens of a completion different credit.

    A'_it = A_i,pi_i(t)     pi_i: a random order of the tokens of completion i that the loss counts

The credit of `of` with the right numbers in the wrong places: each completion keeps its sum, mean and spread, and what
the method knows about *where* is gone. What a method gains over it, its choice of tokens has gained. Credit that is the
same on all tokens of a completion stays as it is, bit for bit.

Example: credit 1.5, 1, 1 of one completion becomes 1.5, 1, 1 or 1, 1.5, 1 or 1, 1, 1.5, each as often.

The order depends on `seed`, on the rollout and on the completion's tokens: it is new in every rollout, and neither the
number of ranks, nor padding, nor the order of rows changes it. Two equal completions of a rollout get the same order.
Ours; `preplan_anchor` has the same as its own `control: shuffled`, in the order of its rows.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, cast

import numpy as np
import torch
from torch import Tensor

from rltok.batch import TokenBatch
from rltok.config import ConfigError, build_typed

if TYPE_CHECKING:
    from rltok.attention.signals import AttentionConfig
    from rltok.credit import AttentiveCredit, CreditMethod


def shuffle_credit(credit: Tensor, mask: Tensor, ids: Tensor, seed: tuple[int, ...]) -> Tensor:
    """The values of every completion in random order among its masked-in tokens.

    Args:
        credit: (B, T).
        mask: (B, T) 1 where a value may move; the others stay in place.
        ids: (B, T) token ids; those under the mask name the completion.
        seed: numbers that are not negative.

    Returns:
        (B, T) with the same values in every row.
    """
    source = torch.arange(credit.size(1)).repeat(credit.size(0), 1)
    for row, (kept, tokens) in enumerate(zip(mask.bool().cpu(), ids.cpu(), strict=True)):
        places = kept.nonzero()[:, 0]
        order = np.random.default_rng([*seed, *tokens[places].tolist()]).permutation(places.numel())
        source[row, places] = places[torch.from_numpy(order)]
    return credit.gather(1, source.to(credit.device))


@dataclass(frozen=True)
class ShuffledCredit:
    """The credit of another method in random order within each completion, as a control."""

    of: Mapping[str, Any] = field(default_factory=lambda: {"type": "entropy_shaping"})
    """the section `credit` of the method whose credit is shuffled"""
    seed: int = 0
    """another seed is another order"""
    method: CreditMethod = field(init=False, repr=False, compare=False)
    """the method itself"""

    per_token: ClassVar[bool] = True

    def __post_init__(self) -> None:
        from rltok.credit import CREDIT

        if self.seed < 0:
            raise ConfigError(f"credit.seed: {self.seed} must be >= 0", "credit.seed")
        method: CreditMethod = build_typed(CREDIT, self.of, "credit.of")
        if isinstance(method, ShuffledCredit) or not method.per_token:
            names = [n for n, kind in CREDIT.items() if getattr(kind, "per_token", True) and kind is not ShuffledCredit]
            raise ConfigError(
                f"credit.of: {self.of['type']!r} leaves nothing to shuffle; name a method that gives the tokens of a "
                f"completion different credit: {', '.join(names)}",
                "credit.of",
            )
        object.__setattr__(self, "method", method)

    @property
    def needs(self) -> tuple[str, ...]:
        """Signals that the method reads."""
        return self.method.needs

    @property
    def attention(self) -> AttentionConfig:
        """Options of the attention pass, of a method that has one."""
        return cast("AttentiveCredit", self.method).attention

    def __call__(self, batch: TokenBatch) -> Tensor:
        return shuffle_credit(self.method(batch), batch.mask, batch.ids, (self.seed, batch.seed))

    def metrics(self, batch: TokenBatch) -> dict[str, Tensor]:
        """The method's own numbers, at the places where it had them."""
        metrics = getattr(self.method, "metrics", None)
        return {} if metrics is None else metrics(batch)
