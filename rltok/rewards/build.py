"""The section `rewards` of a recipe -> reward functions and their weights."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rltok.config import ConfigError, build, check_keys, convert, suggestion
from rltok.rewards.accuracy import LenientAccuracy, StrictAccuracy
from rltok.rewards.answer_format import AnswerFormat
from rltok.rewards.guard import RewardFunction, guarded
from rltok.rewards.length import Length, OverlongPenalty
from rltok.rewards.math_equivalence import MathEquivalence
from rltok.rewards.random_reward import RandomReward
from rltok.rewards.reasoning import ReasoningGym
from rltok.rewards.user import bind_options, load_function

REWARDS: dict[str, type] = {
    "reasoning_gym": ReasoningGym,
    "strict_accuracy": StrictAccuracy,
    "lenient_accuracy": LenientAccuracy,
    "math_equivalence": MathEquivalence,
    "answer_format": AnswerFormat,
    "overlong_penalty": OverlongPenalty,
    "length": Length,
    "random_reward": RandomReward,
}
"""Name -> frozen dataclass whose fields are the options and whose instances are reward functions."""


@dataclass(frozen=True)
class RewardSet:
    """Reward functions in the order of the recipe."""

    functions: list[RewardFunction]
    """guarded; `__name__` is the key in the recipe"""
    weights: list[float]
    """factor of each function in the total reward"""

    @property
    def names(self) -> list[str]:
        """Names of the functions."""
        return [function.__name__ for function in self.functions]


def build_rewards(
    section: Mapping[str, Mapping[str, Any]],
    base_dir: Path | None = None,
    save_dir: Path | None = None,
    timeout: float | None = None,
) -> RewardSet:
    """Reward functions of a recipe section `name -> {function, weight, **options}`.

    Args:
        section: `function` is a name of `REWARDS`, `module:function` or `path/file.py:function`; `weight` defaults
            to 1; the rest are the function's options.
        base_dir: what a file is relative to; default the working directory.
        save_dir: where failures are saved; default `reward_errors/` in the working directory.
        timeout: seconds that one call of a function may take, `faults.reward_timeout`; None: no limit.

    Raises:
        ConfigError: names the key path, the value and the allowed values, nearest first.
    """
    if not isinstance(section, Mapping) or not section:
        raise ConfigError(
            f"rewards: {section!r} names no reward; write `name: {{function: ..., weight: 1.0}}`", "rewards"
        )
    base_dir = Path.cwd() if base_dir is None else Path(base_dir)
    functions, weights = [], []
    for name, options in section.items():
        path = f"rewards.{name}"
        if not isinstance(options, Mapping):
            raise ConfigError(f"{path}: {options!r} is not a mapping; write {{function: ..., weight: 1.0}}", path)
        function = _build_one(options, base_dir, path)
        functions.append(guarded(function, str(name), save_dir, timeout))
        weights.append(_weight(options.get("weight", 1.0), f"{path}.weight"))
    return RewardSet(functions, weights)


def _build_one(values: Mapping[str, Any], base_dir: Path, path: str) -> RewardFunction:
    where = f"{path}.function"
    reference = values.get("function")
    if not isinstance(reference, str):
        seen = "missing" if reference is None else f"{reference!r} is not a name"
        raise ConfigError(f"{where}: {seen}; known: {', '.join(REWARDS)}, module:function or file.py:function", where)
    options = {key: value for key, value in values.items() if key not in ("function", "weight")}
    if ":" in reference:
        return bind_options(load_function(reference, base_dir, where), options, path)
    if reference not in REWARDS:
        known = [*REWARDS, "module:function", "path/file.py:function"]
        raise ConfigError(f"{where}: unknown reward {reference!r}{suggestion(reference, known)}", where)
    kind: Any = REWARDS[reference]
    check_keys(options, ["function", "weight", *(f.name for f in dataclasses.fields(kind))], path)
    return build(kind, options, path)


def _weight(value: Any, path: str) -> float:
    weight = float(convert(float, value, path))
    if not math.isfinite(weight):
        raise ConfigError(f"{path}: {weight} is not a finite number", path)
    return weight
