"""Skipping prompts before they cost a rollout: those that were lately solved by all completions or by none (GRESO).

    P(skip) = 1 - max(p^z, floor)

z is the number of most recent consecutive visits that were easy (or hard), p a base per kind. A controller moves p by
`step` after each rollout from the second epoch on: down while at least the target share of prompts is of that kind.

    z         0    1    2     3      ...   7 and more
    p = 0.5   0    0.5  0.75  0.875  ...   0.99

Because P(skip) < 1 every prompt is visited again sooner or later, and a visit of another kind ends the run.

Source: arXiv 2506.02177 and its released code. The code's thresholds on a group's mean (0.98 easy, 0.11 hard) belong to
its reward scale; here a group is easy if every reward is maximal, hard if every reward is minimal.
Left out: the released code's adaptive size of the next generation; a skipped prompt is replaced one by one.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor


def skip_probability(visits: int, p: float, floor: float = 0.01) -> float:
    """1 - max(p^z, floor): 0 for z = 0, at most 1 - floor.

    Args:
        visits: z >= 0, most recent consecutive easy (or hard) visits.
        p: base in [0, 1]; 1 never skips.
        floor: smallest probability of a visit, in (0, 1]; 1 never skips.

    Raises:
        ValueError: an argument outside its range.
    """
    if visits < 0:
        raise ValueError(f"visits={visits} must be >= 0; it counts consecutive visits of one kind")
    if not 0.0 <= p <= 1.0:
        raise ValueError(f"p={p} is not in [0, 1]")
    if not 0.0 < floor <= 1.0:
        raise ValueError(f"floor={floor} is not in (0, 1]; at 0 a prompt could be lost for good")
    return 1.0 - max(p**visits, floor)


@dataclass(frozen=True)
class PromptSkippingConfig:
    """Skip prompts that all or none of their completions solved on the last visits (GRESO); acts from epoch 2 on."""

    metric: str
    """Name of the reward function that tells solved from unsolved; correctness, not the shaped sum."""
    p_easy: float = 0.5
    """Starting base of the skip probability of easy prompts, in [low, high]; smaller skips more."""
    p_hard: float = 0.5
    """Starting base of the skip probability of hard prompts, in [low, high]; smaller skips more."""
    easy_at: float = 1.0
    """A visit is easy if every reward of the group reaches this value; the metric's maximum."""
    hard_at: float = 0.0
    """A visit is hard if no reward of the group exceeds this value; the metric's minimum."""
    target_zero_variance: float = 0.25
    """Share of easy and hard prompts in a rollout that is aimed at, in [0, 1]: a third easy, two thirds hard."""
    step: float = 0.01
    """By how much p moves after each rollout; 0 keeps the starting values."""
    floor: float = 0.01
    """Smallest probability of a visit, in (0, 1]; 1 never skips, which is plain sampling."""
    low: float = 0.05
    """Lower bound of p."""
    high: float = 0.95
    """Upper bound of p."""

    def __post_init__(self) -> None:
        if not self.metric:
            raise ValueError("metric is empty: name the reward function that tells solved from unsolved")
        if not self.easy_at > self.hard_at:
            raise ValueError(
                f"easy_at={self.easy_at} must be > hard_at={self.hard_at}: the metric's maximum and its minimum"
            )
        if not 0.0 <= self.low <= self.high <= 1.0:
            raise ValueError(f"low={self.low} and high={self.high} must satisfy 0 <= low <= high <= 1")
        for name in ("p_easy", "p_hard"):
            if not self.low <= getattr(self, name) <= self.high:
                raise ValueError(f"{name}={getattr(self, name)} is not in [low, high] = [{self.low}, {self.high}]")
        for name in ("target_zero_variance", "step"):
            if not 0.0 <= getattr(self, name) <= 1.0:
                raise ValueError(f"{name}={getattr(self, name)} is not in [0, 1]")
        if not 0.0 < self.floor <= 1.0:
            raise ValueError(f"floor={self.floor} is not in (0, 1]; at 0 a prompt could be lost for good")

    @property
    def target_easy(self) -> float:
        """Share of easy prompts aimed at: a third of `target_zero_variance`."""
        return self.target_zero_variance / 3

    @property
    def target_hard(self) -> float:
        """Share of hard prompts aimed at: two thirds of `target_zero_variance`."""
        return 2 * self.target_zero_variance / 3


class PromptTraces:
    """What the last visits of every prompt were, the two bases p, and the draws that decide.

    Ranks that make the same calls in the same order decide alike: a draw depends on (seed, number of draws so far).
    """

    def __init__(self, config: PromptSkippingConfig, seed: int) -> None:
        self.config, self.seed = config, seed
        self.p_easy, self.p_hard = config.p_easy, config.p_hard
        self.draws = 0
        """random numbers used so far"""
        self.runs: dict[str, int] = {}
        """prompt id -> z of an easy run, -z of a hard run; other prompts have none"""

    def skip_probability(self, prompt_id: str) -> float:
        """Probability that this prompt would be skipped now."""
        run = self.runs.get(prompt_id, 0)
        return skip_probability(abs(run), self.p_easy if run > 0 else self.p_hard, self.config.floor)

    def skips(self, prompt_id: str) -> bool:
        """Decide, at random, whether to skip this prompt; uses a draw only where the answer is open."""
        probability = self.skip_probability(prompt_id)
        return probability > 0 and self._draw() < probability

    def record(self, ids: Sequence[str], metric: Tensor, group_size: int, adapt: bool) -> dict[str, float]:
        """Enter the visits of one rollout, and let the controller act.

        Args:
            ids: prompt id of each group, in the order of the rows.
            metric: (N,) values of the metric, N = len(ids) * group_size; NaN where nobody could score.
            group_size: adjacent rows per prompt.
            adapt: move p_easy and p_hard; true from the second epoch on.

        Returns:
            `share_easy` and `share_hard` of the scored groups (NaN without any), and `p_easy`, `p_hard` afterwards.

        Raises:
            ValueError: ids and metric do not match.
        """
        if metric.dim() != 1 or metric.numel() != len(ids) * group_size:
            raise ValueError(
                f"metric has shape {tuple(metric.shape)} but {len(ids)} groups of {group_size} rows need "
                f"({len(ids) * group_size},)"
            )
        scored, easy, hard = (kind.tolist() for kind in self._kinds(metric.detach().view(len(ids), group_size)))
        for prompt, is_scored, is_easy, is_hard in zip(ids, scored, easy, hard, strict=True):
            if is_scored:
                self._visit(prompt, 1 if is_easy else -1 if is_hard else 0)
        count = sum(scored)
        share_easy = sum(easy) / count if count else float("nan")
        share_hard = sum(hard) / count if count else float("nan")
        if adapt and count:
            self.p_easy = self._moved(self.p_easy, share_easy >= self.config.target_easy)
            self.p_hard = self._moved(self.p_hard, share_hard >= self.config.target_hard)
        return {"share_easy": share_easy, "share_hard": share_hard, "p_easy": self.p_easy, "p_hard": self.p_hard}

    @property
    def state(self) -> dict[str, Any]:
        """A copy of all that changes, as plain containers."""
        return {"runs": dict(self.runs), "p_easy": self.p_easy, "p_hard": self.p_hard, "draws": self.draws}

    def load(self, state: Mapping[str, Any]) -> None:
        """Continue from `state`: the same calls then give the same decisions."""
        self.runs = dict(state["runs"])
        self.p_easy, self.p_hard, self.draws = state["p_easy"], state["p_hard"], state["draws"]

    def _kinds(self, groups: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(P, G) rewards -> (P,) groups that are scored, easy, hard."""
        known = groups.isfinite()
        scored = known.any(1)
        easy = scored & ((groups >= self.config.easy_at) | ~known).all(1)
        hard = scored & ((groups <= self.config.hard_at) | ~known).all(1)
        return scored, easy, hard

    def _visit(self, prompt: str, kind: int) -> None:
        run = self.runs.pop(prompt, 0)
        if kind:
            self.runs[prompt] = run + kind if run * kind > 0 else kind

    def _moved(self, p: float, too_many: bool) -> float:
        step = -self.config.step if too_many else self.config.step
        return min(self.config.high, max(self.config.low, p + step))

    def _draw(self) -> float:
        """Uniform in [0, 1) with 53 bits; a digest keeps it the same in every process and version."""
        text = f"{self.seed}:{self.draws}".encode()
        self.draws += 1
        return (int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "big") >> 11) * 2.0**-53


def prompt_id(row: Mapping[str, Any]) -> str:
    """Digest of a dataset row's fields, the same in every process and run; order of the fields does not matter.

    Binary content (bytes, decoded images) is left out, so rows that differ in nothing else count as one prompt.
    """
    fields = {name: value for name, value in row.items() if not _is_binary(value)}
    text = json.dumps(fields, sort_keys=True, default=_plain)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def _is_binary(value: Any) -> bool:
    # the text of an object without content of its own names its address, which changes from load to load
    return isinstance(value, bytes | bytearray | memoryview) or (
        not isinstance(value, _JSON) and " at 0x" in str(value)
    )


_JSON = (str, int, float, bool, type(None), list, tuple, dict)


def _plain(value: Any) -> Any:
    """What JSON has no form for, as something it has."""
    if isinstance(value, set | frozenset):
        return sorted(value, key=repr)
    if isinstance(value, Tensor | np.ndarray):
        return value.tolist()
    return type(value).__name__ if _is_binary(value) else str(value)
