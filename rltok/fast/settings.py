"""Settings of the rollout loop, and what it does to the logits of a step: the order of transformers' `generate`.

repetition penalty, minimum length, processors, temperature, top-k, top-p, min-p
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class ProcessorSettings:
    """The fields of a generation config that processors read."""

    temperature: float | None
    do_sample: bool | None
    output_logits: bool | None = False


@dataclass(frozen=True)
class LoopSettings:
    """How the loop samples, when rows end, and how much it holds at a time."""

    max_new_tokens: int
    """Tokens of a completion at most."""
    end_ids: tuple[int, ...] = ()
    """Tokens that end a completion; they belong to it."""
    min_new_tokens: int = 0
    """Tokens before the first of which no end token is sampled."""
    temperature: float = 1.0
    """0 is greedy: the largest processed logit, without truncation."""
    top_k: int = 0
    """Tokens kept, ties with the last one included; 0 keeps all."""
    top_p: float = 1.0
    """Least mass of the most probable tokens kept; 1 keeps all."""
    min_p: float = 0.0
    """Least probability kept, as a share of the largest; 0 keeps all."""
    stop_strings: tuple[str, ...] = ()
    """Texts that end a completion; the token that completes one belongs to it. Needs a tokenizer."""
    repetition_penalty: float = 1.0
    """Divides positive logits, multiplies negative ones, of ids that are in the row, prompt included; 1 is off."""
    max_rows: int | None = None
    """Rows computed at a time; the others wait. None: all rows at once."""
    max_cache_tokens: int | None = None
    """Rows times columns of the cache that may be in use, each row counted with its longest possible completion; a row
    that is longer runs alone. None: no limit."""
    prefill_chunk: int = 2048
    """Tokens of one prefill forward; a longer prompt takes several."""
    compact_share: float = 0.0
    """Ended rows leave when they are more than this share of the batch; 0: at once, 1: all at the end."""
    cache_block: int = 32
    """Columns by which the cache grows."""

    def __post_init__(self) -> None:
        self._check_sampling()
        self._check_ends()
        self._check_sizes()

    @property
    def do_sample(self) -> bool:
        """False at temperature 0."""
        return self.temperature > 0

    def for_processors(self) -> ProcessorSettings:
        """What `begin` of a processor reads; greedy decoding divides by 1, as in transformers."""
        return ProcessorSettings(self.temperature if self.do_sample else 1.0, self.do_sample)

    def _check_sampling(self) -> None:
        if not (self.temperature >= 0 and math.isfinite(self.temperature)):
            raise ValueError(f"temperature={self.temperature} must be finite and >= 0; 0 is greedy")
        if self.top_k < 0:
            raise ValueError(f"top_k={self.top_k} must be >= 0; 0 keeps all tokens")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p={self.top_p} is not in (0, 1]; 1 keeps all tokens")
        if not 0 <= self.min_p <= 1:
            raise ValueError(f"min_p={self.min_p} is not in [0, 1]; 0 keeps all tokens")
        if not (self.repetition_penalty > 0 and math.isfinite(self.repetition_penalty)):
            raise ValueError(f"repetition_penalty={self.repetition_penalty} must be finite and > 0; 1 is off")

    def _check_ends(self) -> None:
        negative = [token for token in self.end_ids if token < 0]
        if negative:
            raise ValueError(f"end_ids={list(self.end_ids)} holds {negative}; token ids are >= 0")
        if isinstance(self.stop_strings, str) or not all(self.stop_strings):
            raise ValueError(f"stop_strings={self.stop_strings!r} must be a tuple of texts, none of them empty")

    def _check_sizes(self) -> None:
        for name in ("max_new_tokens", "prefill_chunk", "cache_block", "max_rows", "max_cache_tokens"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name}={value} must be >= 1")
        if not 0 <= self.min_new_tokens <= self.max_new_tokens:
            raise ValueError(
                f"min_new_tokens={self.min_new_tokens} is not between 0 and max_new_tokens={self.max_new_tokens}"
            )
        if not 0 <= self.compact_share <= 1:
            raise ValueError(f"compact_share={self.compact_share} is not in [0, 1]; it is a share of the batch")


def warp(scores: Tensor, settings: LoopSettings) -> Tensor:
    """(B, V) processed logits -> (B, V) scores that are sampled from; the same tensor at temperature 1 without limits.

    Temperature, top-k, top-p, min-p, with the ties and the least kept token of transformers' own. Greedy: unchanged.
    """
    if not settings.do_sample:
        return scores
    if settings.temperature != 1:
        scores = scores / settings.temperature
    if settings.top_k:
        least = scores.topk(min(settings.top_k, scores.size(-1)), dim=-1).values[:, -1:]
        scores = scores.masked_fill(scores < least, -math.inf)
    if settings.top_p < 1:
        scores = _keep_top_p(scores, settings.top_p)
    if settings.min_p > 0:
        probabilities = scores.softmax(dim=-1)
        least = settings.min_p * probabilities.amax(dim=-1, keepdim=True)
        scores = scores.masked_fill(probabilities < least, -math.inf)
    return scores


def _keep_top_p(scores: Tensor, top_p: float) -> Tensor:
    """Drop the least probable tokens whose probabilities add up to at most 1 - top_p; the most probable one stays."""
    ordered, index = scores.sort(dim=-1, descending=False)
    dropped = ordered.softmax(dim=-1).cumsum(dim=-1) <= 1 - top_p
    dropped[:, -1] = False
    return scores.masked_fill(torch.zeros_like(dropped).scatter(1, index, dropped), -math.inf)
