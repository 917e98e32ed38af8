"""Thought-switching penalty (TIP): early in a thought, words that switch to another one are made unlikely.

    z[v] -= alpha      v in the word list, while the row still thinks and n < start of the current thought + beta

n counts tokens generated so far in the row. A thought starts where the row begins to think and, with
`restart: thought`, right after every switch word. alpha = 0 or beta = 0 is the plain sampler, bit for bit.

    paper   here      default
    alpha   alpha     3.0, in logits (best of 3, 5, 10, 20 on AIME 2022-23)
    beta    beta      600 tokens (best of 300 to 700 there)

Example, alpha = 3, beta = 4, a switch word generated at n = 2: the bias at n = 0, 1, ... is -3, -3, -3 and again
-3, -3, -3, -3 from n = 3 on, then 0 from n = 7. With `restart: start` it is -3 up to n = 3 and 0 from n = 4, and a span
that `think_start` opens later is penalised only as far as it lies in that window.

The sampler differs from the learner by two ratios per step (`rltok.sampling.word_bias`); no token loses its support.

Source: arXiv 2501.18585. `restart: start` is the form that the authors of CyclicReflex (arXiv 2506.11077) ran as a
baseline: one window from n = 0. The default words are theirs too. No result of RL with this penalty is published.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from rltok.sampling.processor import Columns, DecodingContext, DecodingModule, Rows
from rltok.sampling.word_bias import WordBias
from rltok.sampling.words import (
    REFLECTION_WORDS,
    Variants,
    resolve_word_ids,
    span_ids,
)

Restart = Literal["thought", "start"]


@dataclass(eq=False)
class ThoughtSwitchingLogitsProcessor(WordBias):
    """The penalty on `word_ids`, of every row by itself; alpha 0 or beta 0 returns the very tensor it got.

    Args as `ThoughtSwitchingConfig`, with token ids in place of words.
    """

    alpha: float = 3.0
    beta: int = 600
    restart: Restart = "thought"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_penalty(self.alpha, self.beta, self.restart)

    @property
    def is_neutral(self) -> bool:
        """True at alpha 0 and at beta 0."""
        return self.alpha == 0 or self.beta == 0

    def columns(self, rows: int, device: torch.device) -> Columns:
        """Where each row is relative to its thinking span, and `thought`, the position where its thought began."""
        thought = torch.zeros(rows, dtype=torch.long, device=device)
        return super().columns(rows, device) | {"thought": thought}

    def observe(self, rows: Rows, columns: Columns) -> None:
        """Look for the marks of the span and for switch words."""
        before = columns["inside"].clone()
        super().observe(rows, columns)
        if self.restart == "start":
            return
        begins = columns["inside"] & ~before
        begins |= (rows.last[:, None] == self.index(rows.last.device)).any(1)
        columns["thought"].copy_(torch.where(begins, rows.position, columns["thought"]))

    def delta(self, rows: Rows, columns: Columns) -> Tensor:
        """(B,) -alpha in the first beta tokens of a thought, else 0."""
        early = columns["inside"] & (rows.position < columns["thought"] + self.beta)
        return early.float() * -self.alpha


@dataclass(frozen=True)
class ThoughtSwitchingConfig(DecodingModule):
    """TIP: a penalty on the logits of thought-switching words early in a thought."""

    alpha: float = 3.0
    """Penalty in logits; 0 is the plain sampler."""
    beta: int = 600
    """Tokens of a thought during which it acts; 0 is the plain sampler."""
    restart: Restart = "thought"
    """`thought`: a switch word begins a new thought (paper); `start`: one window, from the first token."""
    words: tuple[str, ...] = REFLECTION_WORDS
    """Words whose tokens are penalised; one of several tokens is left out with a warning."""
    variants: Variants = "bare"
    """Spellings: `bare` as listed, `space` with a leading space, `both`, `all` in every case as well."""
    think_end: str | None = "auto"
    """Text that ends the thinking span; `auto` is </think> if the tokenizer has it; null: the span never ends."""
    think_start: str | None = None
    """Text that opens the span; null: open from the first generated token, as where the prompt ends with <think>."""

    def __post_init__(self) -> None:
        check_penalty(self.alpha, self.beta, self.restart)
        if not self.words:
            raise ValueError("words is empty: name at least one word to penalise")

    @property
    def is_neutral(self) -> bool:
        """True if it can never change a sample."""
        return self.alpha == 0 or self.beta == 0

    def processor(self, context: DecodingContext) -> ThoughtSwitchingLogitsProcessor:
        """The processor of one generate call."""
        assert context.tokenizer is not None
        end_ids, start_ids = span_ids(context.tokenizer, self.think_end, self.think_start)
        return ThoughtSwitchingLogitsProcessor(
            resolve_word_ids(context.tokenizer, self.words, self.variants),
            self.alpha,
            self.beta,
            self.restart,
            end_ids=end_ids,
            start_ids=start_ids,
        )


def check_penalty(alpha: float, beta: int, restart: str) -> None:
    """Raise ValueError for options out of range."""
    if not (alpha >= 0 and math.isfinite(alpha)):
        raise ValueError(f"alpha={alpha} must be finite and >= 0; it is the penalty in logits")
    if not beta >= 0:
        raise ValueError(f"beta={beta} must be >= 0; it is the number of tokens of a thought that are penalised")
    if restart not in get_args(Restart):
        raise ValueError(f"restart={restart!r} is unknown; allowed: 'thought', 'start'")
