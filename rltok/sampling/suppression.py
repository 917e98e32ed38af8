"""Reflection suppression (NoWait): reflection words are forbidden, or made less likely by a constant.

    z[v] = -inf   or   z[v] -= strength      v in the word list, at every step (or while the row still thinks)

strength = 0 is the plain sampler, bit for bit; strength None forbids. A row in which no other token is left keeps its
words: a token that another method forces (`rltok.sampling.budget_forcing`) is not taken away again.

Example, logits (1, 0.5, 0), word 0: forbidden, the log-probabilities are (-inf, -0.474077, -0.974077); strength 2
gives (-2.104131, -0.604131, -1.104131).

Forbidding takes support away: the sampler gives 0 to tokens that the policy may choose, and no importance weight can
repair that (`restricts`). It is meant for evaluation; in training use a finite strength, whose ratios are two per step
(`rltok.sampling.word_bias`).

Source: "Wait, We Don't Need to 'Wait'!" (NoWait), whose word list this is; known to us through secondary descriptions
only. A finite strength is ours. No result of RL with either is published.
Left out: keywords of several tokens ("double-check" in most vocabularies), which are skipped with a warning.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from rltok.sampling.processor import Columns, DecodingContext, DecodingModule, Rows
from rltok.sampling.word_bias import WordBias, add_to_words
from rltok.sampling.words import Variants, resolve_word_ids, span_ids

SUPPRESSED_WORDS = (
    "wait",
    "alternatively",
    "hmm",
    "but",
    "however",
    "check",
    "double-check",
    "maybe",
    "verify",
    "again",
    "oh",
    "ah",
)
"""Keywords of NoWait."""
FEW_COLUMNS = 256
"""Columns of the scores that are looked at before all of them."""


@dataclass(eq=False)
class ReflectionSuppressionLogitsProcessor(WordBias):
    """A constant on `word_ids`; strength 0 returns the very tensor it got.

    Args as `ReflectionSuppressionConfig`, with token ids in place of words; those of the span are read only with
    `only_thinking`.
    """

    strength: float | None = None
    only_thinking: bool = False

    traced = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        check_strength(self.strength)
        self.memory = "ids" if self.only_thinking else "none"

    @property
    def is_neutral(self) -> bool:
        """True at strength 0."""
        return self.strength == 0

    def columns(self, rows: int, device: torch.device) -> Columns:
        """Where each row is relative to its thinking span; nothing if it acts everywhere."""
        return super().columns(rows, device) if self.only_thinking else {}

    def observe(self, rows: Rows, columns: Columns) -> None:
        """Look for the marks of the span."""
        if self.only_thinking:
            super().observe(rows, columns)

    def delta(self, rows: Rows, columns: Columns) -> Tensor:
        """(B,) the constant, 0 where it does not act."""
        bias = -math.inf if self.strength is None else -self.strength
        delta = torch.full(rows.position.shape, bias, device=rows.position.device)
        return torch.where(columns["inside"], delta, torch.zeros_like(delta)) if self.only_thinking else delta

    def add(self, scores: Tensor, delta: Tensor) -> Tensor:
        """Bias the words' columns, in place, except in rows where that would leave no token."""
        if self.strength is not None:
            return super().add(scores, delta)
        index = self.index(scores.device)
        words = scores[:, index]  # (B, W), a copy
        add_to_words(scores, index, delta)
        # On the CPU, where waiting is free, a few columns nearly always show that every row has something left.
        if scores.device.type == "cpu" and bool((scores[:, :FEW_COLUMNS].amax(-1) > -math.inf).all()):
            return scores
        is_empty = scores.amax(-1, keepdim=True) == -math.inf  # (B, 1)
        scores[:, index] = torch.where(is_empty, words, scores[:, index])
        return scores


@dataclass(frozen=True)
class ReflectionSuppressionConfig(DecodingModule):
    """Reflection words forbidden, or made less likely by a constant."""

    strength: float | None = None
    """What is subtracted from the words' logits; null forbids them, 0 is the plain sampler."""
    words: tuple[str, ...] = SUPPRESSED_WORDS
    """Words whose tokens are suppressed; one of several tokens is left out with a warning."""
    variants: Variants = "all"
    """Spellings: `bare` as listed, `space` with a leading space, `both`, `all` in every case as well."""
    only_thinking: bool = False
    """Act in the thinking span only; false: in the whole completion."""
    think_end: str | None = "auto"
    """Text that ends the thinking span; `auto` is </think> if the tokenizer has it; null: the span never ends."""
    think_start: str | None = None
    """Text that opens the span; null: open from the first generated token, as where the prompt ends with <think>."""

    restricts = True  # of the default; every instance says it of itself

    def __post_init__(self) -> None:
        check_strength(self.strength)
        if not self.words:
            raise ValueError("words is empty: name at least one word to suppress")
        object.__setattr__(self, "restricts", self.strength is None)

    @property
    def is_neutral(self) -> bool:
        """True if it can never change a sample."""
        return self.strength == 0

    def processor(self, context: DecodingContext) -> ReflectionSuppressionLogitsProcessor:
        """The processor of one generate call."""
        assert context.tokenizer is not None
        marks = (self.think_end, self.think_start) if self.only_thinking else (None, None)
        end_ids, start_ids = span_ids(context.tokenizer, *marks)
        return ReflectionSuppressionLogitsProcessor(
            resolve_word_ids(context.tokenizer, self.words, self.variants),
            self.strength,
            self.only_thinking,
            end_ids=end_ids,
            start_ids=start_ids,
        )


def check_strength(strength: float | None) -> None:
    """Raise ValueError unless the strength is None, or finite and >= 0."""
    if strength is not None and not (strength >= 0 and math.isfinite(strength)):
        raise ValueError(f"strength={strength} must be finite and >= 0, in logits; null forbids the words")
