"""Rewards that see only the number of completion tokens n."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class OverlongPenalty:
    """DAPO's soft overlong punishment, in [-factor, 0].

        0                                           n <= max_tokens - cache_tokens
        factor (max_tokens - cache_tokens - n) / cache_tokens       up to max_tokens
        -factor                                     n > max_tokens

    factor 0 is no penalty, 1 is the paper's Eq. 13. Example: max_tokens 40, cache_tokens 16 and lengths
    20, 24, 28, 32, 40 give 0, 0, -0.25, -0.5, -1.

    Source: arXiv 2503.14476, Sec. 3.4; the factor is the released code's, which lacks the third branch.
    """

    max_tokens: int
    """L_max, the hard limit; the paper has 20480. Set it to training.max_completion_length"""
    cache_tokens: int
    """L_cache, the width of the ramp below it; the paper has 4096"""
    factor: float = 1.0
    """largest penalty"""

    __name__ = "overlong_penalty"

    def __post_init__(self) -> None:
        if not 0 < self.cache_tokens <= self.max_tokens:
            raise ValueError(
                f"cache_tokens={self.cache_tokens} must be in 1 ... max_tokens={self.max_tokens}: "
                "the penalty sets in at max_tokens - cache_tokens"
            )
        if not self.factor >= 0:
            raise ValueError(f"factor={self.factor} must be >= 0; a negative one would reward overlong completions")

    def __call__(
        self, prompts: Sequence[Any], completions: Sequence[Any], completion_ids: Sequence[Any] | None, **columns: Any
    ) -> list[float]:
        start = self.max_tokens - self.cache_tokens
        ramp = [(start - n) / self.cache_tokens for n in token_counts(completion_ids, self.__name__)]
        return [self.factor * min(0.0, max(-1.0, r)) for r in ramp]


@dataclass(frozen=True)
class Length:
    """-coef n: a price per token; coef 0 is no price, a negative one rewards length."""

    coef: float = 0.001
    """price of one completion token"""

    __name__ = "length"

    def __call__(
        self, prompts: Sequence[Any], completions: Sequence[Any], completion_ids: Sequence[Any] | None, **columns: Any
    ) -> list[float]:
        return [-self.coef * n for n in token_counts(completion_ids, self.__name__)]


def token_counts(completion_ids: Sequence[Any] | None, name: str) -> list[int]:
    """Number of tokens per completion."""
    if completion_ids is None:
        raise ValueError(f"{name} counts tokens: call it with completion_ids, as the trainer does")
    return [len(ids) for ids in completion_ids]
