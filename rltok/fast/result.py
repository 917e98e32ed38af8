"""What the loop gives: completions, what they cost, and how far it has come."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class LoopMetrics:
    """What a call cost."""

    tokens: int
    """tokens sampled"""
    seconds: float
    """wall time of the call"""
    computed_rows: int
    """rows computed by decoding steps, summed over the steps"""
    live_rows: int
    """those of them that had not ended"""
    prefill_tokens: int
    """prompt tokens computed"""
    prefill_tokens_saved: int
    """prompt tokens that were copied instead of computed"""
    peak_cache_bytes: int
    """largest size of all caches together, with the second copy of a tensor while it grows"""

    @property
    def tokens_per_second(self) -> float:
        """Sampled tokens by wall time."""
        return self.tokens / self.seconds

    @property
    def live_share(self) -> float:
        """Share of the computed rows that had not ended; 1 where nothing was decoded."""
        return self.live_rows / self.computed_rows if self.computed_rows else 1.0


@dataclass(frozen=True)
class LoopProgress:
    """How far a call has come."""

    ended: int
    """completions that have ended"""
    rows: int
    """all of them"""
    tokens: int
    """tokens sampled so far"""
    seconds: float
    """since the start of the call"""


@dataclass(frozen=True)
class LoopResult:
    """Completions in the order of the prompts."""

    ids: list[list[int]]
    """tokens of every completion, the end token included"""
    logps: list[list[float]] | None
    """log-probability in nats of every token under what drew it (greedy: at temperature 1); None: not recorded"""
    traces: list[dict[str, Tensor]]
    """for every processor, name -> (B, steps) traced values, 0 after a row's end; the processors have them too"""
    metrics: LoopMetrics
