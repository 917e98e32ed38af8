"""Door 1: credit. One file per method: rewards of completions -> (B, T) advantages.

A method is a frozen dataclass with `needs` (signals it reads: `entropy`, `old_logps`, `entropy_stats`, `attention`),
`per_token` (False when every token of a completion gets the same) and `__call__(batch: TokenBatch) -> Tensor` of shape
(B, T), finite, and 0 where `batch.mask` is 0. One that needs `attention` has a property `attention` with the options of
that pass. A method `metrics(batch) -> dict[str, Tensor]` is optional: (B, T) values to log, averaged over tokens.
"""

from typing import Protocol, runtime_checkable

from torch import Tensor

from rltok.attention.signals import AttentionConfig
from rltok.batch import TokenBatch
from rltok.credit.entropy_shaping import EntropyShaping, shape_by_entropy
from rltok.credit.group import GroupCredit
from rltok.credit.preplan_anchor import PreplanAnchor, RhythmCredit, rhythm_gamma, shape_advantages
from rltok.credit.shuffled import ShuffledCredit, shuffle_credit
from rltok.credit.token_group_average import TokenGroupAverage, token_group_average


class CreditMethod(Protocol):
    """Rewards of completions -> credit of tokens."""

    @property
    def needs(self) -> tuple[str, ...]: ...
    @property
    def per_token(self) -> bool: ...

    def __call__(self, batch: TokenBatch) -> Tensor: ...


@runtime_checkable
class AttentiveCredit(CreditMethod, Protocol):
    """A credit method that reads attention signals."""

    @property
    def attention(self) -> AttentionConfig: ...


CREDIT: dict[str, type] = {
    "group": GroupCredit,
    "token_group_average": TokenGroupAverage,
    "entropy_shaping": EntropyShaping,
    "preplan_anchor": PreplanAnchor,
    "shuffled": ShuffledCredit,
}


def check_credit(credit: Tensor, batch: TokenBatch, name: str) -> None:
    """Raise if a credit method returned something the loss must not see.

    Raises:
        ValueError: wrong shape, NaN or infinity, or credit on a masked token; the message names the method.
    """
    if credit.shape != batch.mask.shape:
        raise ValueError(f"credit {name!r} returned shape {tuple(credit.shape)}, expected {tuple(batch.mask.shape)}")
    if credit.requires_grad:
        raise ValueError(f"credit {name!r} returned a tensor with gradient; detach it")
    if not credit.isfinite().all():
        row, position = (~credit.isfinite()).nonzero()[0].tolist()
        raise ValueError(f"credit {name!r} returned {credit[row, position].item()} at row {row}, token {position}")
    if (credit * (1 - batch.mask)).any():
        raise ValueError(f"credit {name!r} gave credit to masked tokens; multiply by `batch.mask`")


__all__ = [
    "CREDIT",
    "AttentiveCredit",
    "CreditMethod",
    "EntropyShaping",
    "GroupCredit",
    "PreplanAnchor",
    "RhythmCredit",
    "ShuffledCredit",
    "TokenGroupAverage",
    "check_credit",
    "rhythm_gamma",
    "shape_advantages",
    "shape_by_entropy",
    "shuffle_credit",
    "token_group_average",
]
