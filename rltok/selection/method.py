"""What a selection method sees (`RowBatch`), answers, and how its two cuts move over training (`Cuts`)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal, Protocol

import torch
from torch import Tensor

from rltok.selection.schedule import SHAPES, D3SSchedule, Shape

LossNorm = Literal["kept", "selected", "full"]
LOSS_NORMS: tuple[str, ...] = ("kept", "selected", "full")
TokenPool = Literal["auto", "batch", "micro", "sample"]
TOKEN_POOLS: tuple[str, ...] = ("auto", "batch", "micro", "sample")
EntropySource = Literal["auto", "old", "micro"]
ENTROPY_SOURCES: tuple[str, ...] = ("auto", "old", "micro")


@dataclass(frozen=True)
class RowBatch:
    """The rollouts of one generation batch over all ranks, one number each. N rows, groups of G adjacent ones."""

    credit: Tensor
    """(N,) float64 mean credit over the row's tokens; exactly 0 where a row carries no signal"""
    rewards: Tensor
    """(N,) weighted sum of the reward functions, NaN where nobody could score"""
    trainable: Tensor
    """(N,) bool: at least one token counts"""
    group_size: int
    """G"""
    seed: int = 0
    """differs between rollouts, equal on all ranks and when a run is repeated"""

    @property
    def groups(self) -> Tensor:
        """(N,) group index of every row."""
        return torch.arange(self.credit.numel(), device=self.credit.device) // self.group_size


@dataclass(frozen=True)
class Cuts:
    """The two cuts of a rollout and how they move: options that every scheduled selection has."""

    rows_start: float = 0.25
    """share of the rollouts kept at the start, in (0, 1] (N_init / G)"""
    rows_end: float = 1.0
    """share of the rollouts kept at the end (N_final / G)"""
    tokens_start: float = 0.2
    """share of the kept rollouts' tokens kept at the start, in (0, 1] (K_init)"""
    tokens_end: float = 1.0
    """share of tokens kept at the end (K_final)"""
    shape: Shape = "linear"
    """`linear` (paper), `cosine`, or `step`: the start values until the end of the ramp"""
    over: float = 1.0
    """length of the ramp: up to 1 a share of training, above 1 a number of optimizer steps"""
    scope: Literal["batch", "group"] = "batch"
    """rows are chosen from the whole generation batch, or the same number from each prompt"""
    token_scope: TokenPool = "auto"
    """pool of the token share: all kept rows (`batch`), a micro-batch, or each row; `auto` takes the largest pool whose
    entropies are known, `batch` with old entropies, else `micro`"""
    entropy_from: EntropySource = "auto"
    """`old`: entropies of the policy that generated, which cost a forward pass unless something else needs it; `micro`:
    of the current policy, by a head that runs twice; `auto`: old if computed anyway, else micro"""
    loss_norm: LossNorm = "kept"
    """divisor of the loss: kept tokens, all tokens of the selected rows, or all tokens of all rollouts"""

    def __post_init__(self) -> None:
        for name in ("rows_start", "rows_end", "tokens_start", "tokens_end"):
            check_share(name, getattr(self, name))
        if not (0 < self.over <= 1 or (self.over > 1 and float(self.over).is_integer())):
            raise ValueError(f"selection.over={self.over}: a share in (0, 1], or a whole number of optimizer steps")
        check_choice("shape", self.shape, SHAPES)
        check_choice("scope", self.scope, ("batch", "group"))
        check_choice("token_scope", self.token_scope, TOKEN_POOLS)
        check_choice("entropy_from", self.entropy_from, ENTROPY_SOURCES)
        check_choice("loss_norm", self.loss_norm, LOSS_NORMS)
        if self.entropy_from == "micro" and self.token_scope == "batch":
            raise ValueError(
                "selection.token_scope='batch' ranks the tokens of all rows, but selection.entropy_from='micro' knows "
                "one micro-batch at a time. Use token_scope 'micro' or 'sample', or entropy_from='old'."
            )
        if self.entropy_from == "old" and self.token_scope == "micro":
            raise ValueError(
                "selection.token_scope='micro' is the pool of entropy_from='micro', but selection.entropy_from='old'. "
                "Use token_scope 'batch' or 'sample'."
            )

    @property
    def selects_tokens(self) -> bool:
        """True if any token can be dropped at any time."""
        return min(self.tokens_start, self.tokens_end) < 1

    def at(self, step: int, total_steps: int, rows: int, group_size: int) -> tuple[int, float]:
        """(rows to keep, share of tokens) at an optimizer step; rows in all (`batch`) or per prompt (`group`)."""
        count = rows if self.scope == "batch" else group_size
        ramp = max(1, round(self.over * total_steps)) if self.over <= 1 else self.over
        start, end = self.rows_start * count, self.rows_end * count
        n_keep, share = D3SSchedule(start, end, self.tokens_start, self.tokens_end, ramp, self.shape).at(step)
        return max(1, n_keep), share


def check_share(name: str, value: float) -> None:
    """Raise unless 0 < value <= 1."""
    if not 0 < value <= 1:
        raise ValueError(f"selection.{name}={value} is not in (0, 1]; 1 keeps everything")


def check_choice(name: str, value: str, allowed: tuple[str, ...]) -> None:
    """Raise unless the value is one of those allowed."""
    if value not in allowed:
        raise ValueError(f"selection.{name}={value!r} is unknown; allowed: {', '.join(allowed)}")


class SelectionMethod(Protocol):
    """Which rows and tokens of a rollout the updates train on, decided after credit is assigned."""

    reads_entropy: ClassVar[bool]
    """True if `tokens` looks at the entropies"""

    @property
    def scope(self) -> Literal["batch", "group"]: ...
    @property
    def loss_norm(self) -> LossNorm: ...
    @property
    def token_scope(self) -> TokenPool: ...
    @property
    def entropy_from(self) -> EntropySource: ...
    @property
    def selects_tokens(self) -> bool: ...
    @property
    def recredits(self) -> bool:
        """True if `credit` replaces the rows' credit, which needs one advantage per row."""
        ...

    @property
    def drops_zero(self) -> bool:
        """True if rows without signal are dropped even when the share of rows is 1."""
        ...

    def at(self, step: int, total_steps: int, rows: int, group_size: int) -> tuple[int, float]:
        """Row number and share of tokens at a step."""
        ...

    def rows(self, batch: RowBatch, n_keep: int) -> Tensor:
        """Indices of the kept rows, ascending, equal on all ranks."""
        ...

    def credit(self, batch: RowBatch, kept: Tensor) -> Tensor | None:
        """(N,) new credit per row, or None to leave the credit as it is."""
        ...

    def tokens(
        self, advantages: Tensor, entropies: Tensor | None, mask: Tensor, share: float, per_row: bool, seed: int
    ) -> Tensor:
        """(B, T) bool: the kept ones among the tokens that count, an exact number of them."""
        ...
