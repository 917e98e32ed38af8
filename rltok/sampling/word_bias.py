"""What word-biasing methods share: one number per row and step, added to the logits of a fixed set of tokens.

With temperature T, pi = softmax(z / T) and p_W the policy's mass on the words, a bias of delta gives

    pi(a) / mu(a) = Z for a outside W,   Z exp(-delta / T) for a in W,   Z = 1 + p_W (exp(delta / T) - 1)

so the importance ratio takes two values per step, and its product over a completion explodes: weight per token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from rltok.sampling.processor import Columns, RolloutProcessor, Rows
from rltok.sampling.words import ThinkingSpan


@dataclass(eq=False)
class WordBias(RolloutProcessor):
    """Adds `delta` of every row to the logits of `word_ids`; -inf stays -inf."""

    word_ids: Sequence[int]
    """(W,) token ids; duplicates count once"""
    end_ids: Sequence[int] = field(default=(), kw_only=True)
    """tokens that end the span in which a row thinks; none: it never ends"""
    start_ids: Sequence[int] = field(default=(), kw_only=True)
    """tokens that open the span; none: it is open from the first generated token"""
    prompt_length: int | None = field(default=None, kw_only=True)

    traced: ClassVar[tuple[str, ...]] = ("bias",)

    def __post_init__(self) -> None:
        self.word_ids = tuple(sorted(set(self.word_ids)))
        if not self.word_ids:
            raise ValueError("word_ids is empty: there is no token to bias")
        self._index: dict[torch.device, Tensor] = {}
        self._span = ThinkingSpan(tuple(self.start_ids), tuple(self.end_ids))

    def columns(self, rows: int, device: torch.device) -> Columns:
        """Where each row is relative to its thinking span."""
        return self._span.columns(rows, device)

    def observe(self, rows: Rows, columns: Columns) -> None:
        """Look for the marks of the span."""
        self._span.observe(rows, columns)

    def delta(self, rows: Rows, columns: Columns) -> Tensor:
        """(B,) float bias of this step, in logits at temperature 1."""
        raise NotImplementedError

    def apply(self, scores: Tensor, rows: Rows, columns: Columns) -> Tensor:
        """Bias the words' columns, in place."""
        delta = self.delta(rows, columns)
        columns["bias"] = delta
        return self.add(scores, delta)

    def add(self, scores: Tensor, delta: Tensor) -> Tensor:
        """(B, V) scores, which it may overwrite, (B,) biases -> (B, V); all that `apply` does to the scores."""
        return add_to_words(scores, self.index(scores.device), delta)

    def index(self, device: torch.device) -> Tensor:
        """(W,) word ids on a device."""
        if device not in self._index:
            self._index[device] = torch.tensor(self.word_ids, device=device)
        return self._index[device]


def add_to_words(scores: Tensor, index: Tensor, delta: Tensor) -> Tensor:
    """scores[b, v] += delta[b] for v in index, in place: (B, V), (W,) distinct ids, (B,) -> (B, V)."""
    scores[:, index] += delta[:, None].to(scores.dtype)
    return scores
