"""A reward that knows nothing: the control that shows what training does by itself."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class RandomReward:
    """1 with probability p, else 0, whatever the completion says.

        r = 1{hash(seed, step, prompt, completion ids) < 2^64 p}

    The hash (BLAKE2b) is the same in every process and on every machine, so a continued run and a run of several
    processes get the same rewards. `step` is the trainer's, so the lottery is a new one for every rollout and no answer
    can be learnt. Two equal completions of a prompt within a rollout get the same reward. p = 0 and p = 1 are constant.
    """

    p: float = 0.5
    """probability of 1"""
    seed: int = 0
    """another seed is another lottery"""

    __name__ = "random_reward"

    def __post_init__(self) -> None:
        if not 0 <= self.p <= 1:
            raise ValueError(f"p={self.p} is not a probability; set it in [0, 1]")

    def __call__(
        self,
        prompts: Sequence[Any],
        completions: Sequence[Any],
        completion_ids: Sequence[Any] | None,
        trainer_state: Any = None,
        **columns: Any,
    ) -> list[float]:
        if completion_ids is None:
            raise ValueError(f"{self.__name__} hashes tokens: call it with completion_ids, as the trainer does")
        step = 0 if trainer_state is None else int(trainer_state.global_step)
        return [
            float(self._draw(step, prompt, ids) < self.p * 2**64)
            for prompt, ids in zip(prompts, completion_ids, strict=True)
        ]

    def _draw(self, step: int, prompt: Any, ids: Sequence[Any]) -> int:
        text = json.dumps([self.seed, step, prompt, [int(i) for i in ids]], sort_keys=True)
        return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big")
