"""What an objective term sees (`LossBatch`) and what it may change (`LossPlan`).

A term is a frozen dataclass, `term(batch, plan) -> plan`. Terms are chained: each receives the plan the one before
it returned, and replaces only the fields it is about. The plan is then turned into a loss by `rltok.objective.loss`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import ClassVar, Protocol

import torch
from torch import Tensor

from rltok.entropy import EntropyStats


def one_rank(values: Tensor) -> Tensor:
    """The gather of a single process: the values themselves."""
    return values


@dataclass(frozen=True)
class LossBatch:
    """One micro-batch inside the loss. Everything but `logps` is constant for the gradient."""

    logps: Tensor
    """(B, T) log-probabilities under the current policy, nats, with gradient"""
    old_logps: Tensor
    """(B, T) under the policy that generated, scored by the learner"""
    mask: Tensor
    """(B, T) 1 where the loss counts the token"""
    entropy: Tensor
    """(B, T) entropy of the current policy, nats, detached"""
    entropy_stats: EntropyStats | None = None
    """statistics of the generation batch's old-policy entropies over all ranks; None where no token was masked in"""
    gather: Callable[[Tensor], Tensor] = one_rank
    """1-d tensor of this rank -> concatenation over all ranks"""
    seed: int = 0
    """differs between micro-batches and ranks, equal when a run is repeated; for terms that draw at random"""

    @cached_property
    def ratio(self) -> Tensor:
        """(B, T) pi_theta / pi_old per token, detached."""
        return torch.exp((self.logps - self.old_logps).detach())


@dataclass(frozen=True)
class LossPlan:
    """How the loss of each token will be formed; a neutral plan is plain PPO clipping of `advantages`."""

    advantages: Tensor
    """(B, T) or (B, 1)"""
    log_weight: Tensor
    """(B, T) or (B, 1): log importance ratio, with gradient"""
    clip_low: Tensor | float
    """width below 1, a number or (B, T)"""
    clip_high: Tensor | float
    """width above 1 (for CISPO the bound itself), a number or (B, T)"""
    keep: Tensor | None = None
    """(B, T) multiplies the policy loss of a token; the divisor still counts it"""
    penalty: Tensor | None = None
    """(B, T) added to the policy loss of a token"""
    metrics: Mapping[str, Tensor] = field(default_factory=dict)
    """name -> (B, T) values, averaged over masked tokens of all ranks for logging"""

    def log(self, **values: Tensor) -> LossPlan:
        """The same plan with more metrics."""
        return replace(self, metrics={**self.metrics, **values})


class ObjectiveTerm(Protocol):
    """A change to the loss of a token, as a pure function of the micro-batch and the plan so far."""

    needs: ClassVar[tuple[str, ...]]
    """signals of the generation batch the term reads: `entropy_stats` or nothing"""

    def __call__(self, batch: LossBatch, plan: LossPlan) -> LossPlan: ...
