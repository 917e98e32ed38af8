"""From a (B, T) token loss to the number that is differentiated.

grpo, sapo           mean over tokens of a completion, then over completions
bnpo                 mean over the tokens of the micro-batch, or of the window where micro-batches are unequal
dr_grpo              sum / (B * token budget)
dapo, cispo, vespo   sum / tokens of one accumulation window, averaged over the generation batch
luspo                sum over tokens, mean over completions
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

LOSS_TYPES = ("grpo", "bnpo", "dr_grpo", "dapo", "luspo", "cispo", "sapo", "vespo")
CLIPPED = ("grpo", "bnpo", "dr_grpo", "dapo", "luspo")
TOKEN_NORMALISED = ("dapo", "cispo", "vespo")


@dataclass(frozen=True)
class Divisors:
    """What a micro-batch is divided by so that the steps of an accumulation window add up to one mean."""

    accumulation: float = 1.0
    """micro-batches in this optimizer step"""
    tokens: Tensor | float = 1.0
    """tokens of one accumulation window on one rank (`dapo`, `cispo`, `vespo`)"""
    token_budget: Tensor | float = 1
    """`max_completion_length` (`dr_grpo`)"""
    rows: Tensor | float | None = None
    """completions of one accumulation window on one rank, for the means over completions; None: those of this
    micro-batch times `accumulation`"""
    row_tokens: Tensor | None = None
    """(B,) tokens of each completion (`grpo`, `sapo`); None: the masked-in ones"""
    micro_tokens: Tensor | float | None = None
    """tokens of an average micro-batch (`bnpo`), which makes its mean that of the whole window; None: those of this
    micro-batch"""


def aggregate(token_loss: Tensor, mask: Tensor, loss_type: str, divisors: Divisors) -> Tensor:
    """Scalar loss of one micro-batch.

    Args:
        token_loss: (B, T) or (B, 1) loss to minimise.
        mask: (B, T).
        loss_type: one of `LOSS_TYPES`.
        divisors: see `Divisors`; empty rows and empty batches divide by 1.

    Raises:
        ValueError: unknown loss type.
    """
    if loss_type not in LOSS_TYPES:
        raise ValueError(f"loss_type={loss_type!r} is unknown; allowed: {', '.join(LOSS_TYPES)}")
    if loss_type in TOKEN_NORMALISED:
        return (token_loss * mask).sum() / divisors.tokens
    if loss_type == "bnpo":
        count = mask.sum().clamp(min=1.0) if divisors.micro_tokens is None else divisors.micro_tokens
        return (token_loss * mask).sum() / count / divisors.accumulation
    rows = (token_loss * mask).sum(-1)
    if loss_type in ("grpo", "sapo"):
        counts = mask.sum(-1) if divisors.row_tokens is None else divisors.row_tokens
        rows = rows / counts.clamp(min=1.0)
    if loss_type == "dr_grpo" and divisors.rows is None:
        return rows.sum() / (rows.size(0) * divisors.token_budget) / divisors.accumulation
    if loss_type == "dr_grpo":
        rows = rows / divisors.token_budget
    return rows.mean() / divisors.accumulation if divisors.rows is None else rows.sum() / divisors.rows
