"""What the page says in words and tables: summary, held-out accuracy with intervals, recipes, environment."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

import pandas as pd
import yaml

LEVEL = 0.95
"""Of the intervals."""
ACCURACIES = ("strict", "lenient")
"""Rewards that are accuracies: each completion has 0 or 1."""


@dataclass(frozen=True)
class Share:
    """A share of completions with its binomial interval."""

    value: float
    low: float
    high: float
    count: int


@dataclass(frozen=True)
class Change:
    """An accuracy before and after training."""

    name: str
    before: Share | None
    after: Share | None
    low: float | None = None
    high: float | None = None

    @property
    def difference(self) -> float | None:
        """after - before."""
        return None if self.before is None or self.after is None else self.after.value - self.before.value

    @property
    def verdict(self) -> str:
        """In words: is there a difference beyond chance?"""
        if self.low is None or self.high is None:
            return ""
        if self.low > 0:
            return "better"
        return "worse" if self.high < 0 else "within noise"


def wilson(successes: float, count: int, level: float = LEVEL) -> tuple[float, float]:
    """Wilson's score interval of a binomial share.

    centre (p + z²/2n) / (1 + z²/n), half-width z / (1 + z²/n) sqrt(p (1 - p) / n + z² / 4n²); Wilson 1927.
    """
    z = NormalDist().inv_cdf((1 + level) / 2)
    p, spread = successes / count, 1 + z * z / count
    centre = (p + z * z / (2 * count)) / spread
    half = z / spread * math.sqrt(p * (1 - p) / count + z * z / (4 * count * count))
    return max(centre - half, 0.0), min(centre + half, 1.0)


def accuracy(evaluation: Mapping[str, Any] | None, name: str) -> Share | None:
    """A share with its interval; None where the evaluation has no such accuracy."""
    if not isinstance(evaluation, Mapping):
        return None
    means = evaluation.get("means")
    value = means.get(name) if isinstance(means, Mapping) else None
    count = evaluation.get("completions")
    if not isinstance(value, int | float) or not isinstance(count, int) or count < 1 or not 0 <= value <= 1:
        return None
    low, high = wilson(value * count, count)
    return Share(float(value), low, high, count)


def change(evaluations: Mapping[str, Any], name: str) -> Change | None:
    """An accuracy before and after, with Newcombe's interval of the difference (1998, method 10).

    It takes the two evaluations for independent samples; on the same problems the true interval is narrower.
    """
    before, after = accuracy(evaluations.get("before"), name), accuracy(evaluations.get("after"), name)
    if before is None and after is None:
        return None
    if before is None or after is None:
        return Change(name, before, after)
    gain = after.value - before.value
    low = gain - math.hypot(after.value - after.low, before.high - before.value)
    high = gain + math.hypot(after.high - after.value, before.value - before.low)
    return Change(name, before, after, low, high)


def changes(evaluations: Mapping[str, Any]) -> list[Change]:
    """Every accuracy that was evaluated."""
    found = [change(evaluations, name) for name in ACCURACIES]
    return [entry for entry in found if entry is not None]


def other_means(evaluations: Mapping[str, Any]) -> list[tuple[str, float | None, float | None]]:
    """Held-out means that are no accuracies: (name, before, after)."""
    means = {moment: (evaluations.get(moment) or {}).get("means") or {} for moment in ("before", "after")}
    names = [name for name in dict.fromkeys([*means["before"], *means["after"]]) if name not in ACCURACIES]
    return [(name, means["before"].get(name), means["after"].get(name)) for name in names]


def methods(recipe: Mapping[str, Any]) -> str:
    """The methods at the four doors, in one line."""
    rollout = recipe.get("rollout")
    decoding = rollout.get("decoding") if isinstance(rollout, Mapping) else None
    doors = {
        "credit": recipe.get("credit"),
        "objective": recipe.get("objective"),
        "selection": recipe.get("selection"),
        "decoding": decoding,
    }
    named = {door: _types(section) for door, section in doors.items()}
    return " · ".join(f"{door} {', '.join(types)}" for door, types in named.items() if types)


def _types(section: Any) -> list[str]:
    if isinstance(section, Mapping):
        return [str(section["type"])] if "type" in section else []
    if isinstance(section, Sequence) and not isinstance(section, str):
        return [name for part in section for name in _types(part)]
    return []


def figures(run: Any, metrics: pd.DataFrame) -> list[tuple[str, str]]:
    """(label, value) of what a run did."""
    recipe, summary = run.recipe or {}, run.summary or {}
    wanted = (recipe.get("training") or {}).get("max_steps") if isinstance(recipe.get("training"), Mapping) else None
    steps = _last(metrics, "step")
    shown = []
    if steps is not None:
        of = f" of {int(wanted):,}" if isinstance(wanted, int) and wanted > 0 and wanted != steps else ""
        shown.append(("steps", f"{int(steps):,}{of}"))
    for label, name in (
        ("generated tokens", "generated_tokens"),
        ("tokens incl. prompts", "num_tokens"),
        ("trained tokens", "trained_tokens"),
    ):
        value = _last(metrics, name)
        if value is not None:
            shown.append((label, f"{int(value):,}"))
    seconds = summary.get("train_seconds", _last(metrics, "seconds"))
    if seconds is not None:
        shown.append(("wall-clock", clock(float(seconds))))
    reward = _last(metrics, "reward")
    if reward is not None:
        shown.append(("last reward", f"{reward:.3f}"))
    if recipe.get("seed") is not None:
        shown.append(("seed", str(recipe["seed"])))
    return shown


def _last(metrics: pd.DataFrame, name: str) -> float | None:
    if name not in metrics:
        return None
    known = metrics[name].dropna()
    return float(known.iloc[-1]) if len(known) else None


def clock(seconds: float) -> str:
    """2 h 03 min, 4 min 05 s or 6.7 s."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s"


def flat(value: Any, path: str = "") -> dict[str, Any]:
    """A nested mapping as key path -> value; lists of plain values stay whole."""
    if isinstance(value, Mapping) and value:
        return {
            k: v for key, part in value.items() for k, v in flat(part, f"{path}.{key}" if path else str(key)).items()
        }
    if isinstance(value, list) and any(isinstance(part, Mapping | list) for part in value):
        return {k: v for i, part in enumerate(value) for k, v in flat(part, f"{path}[{i}]").items()}
    return {path: value}


_MISSING = object()


def differences(settings: Sequence[Mapping[str, Any]]) -> list[tuple[str, list[str]]]:
    """(key path, value of every run) of the settings that are not the same in all.

    A section that chooses another `type`, or that some run lacks, stands in one line: its options do not compare.
    """
    return _differences("", list(settings))


def _differences(path: str, values: Sequence[Any]) -> list[tuple[str, list[str]]]:
    if all(value == values[0] for value in values[1:]):
        return []
    if all(isinstance(value, Mapping) for value in values) and len({str(value.get("type")) for value in values}) == 1:
        keys = dict.fromkeys(key for value in values for key in value)
        parts = [
            (f"{path}.{key}" if path else str(key), [value.get(key, _MISSING) for value in values]) for key in keys
        ]
        return [found for key, part in parts for found in _differences(key, part)]
    if all(isinstance(value, list) for value in values) and len({len(value) for value in values}) == 1:
        parts = [(f"{path}[{i}]", list(part)) for i, part in enumerate(zip(*values, strict=True))]
        return [found for key, part in parts for found in _differences(key, part)]
    return [(path, ["-" if value is _MISSING else plain(value) for value in values])]


def table_of(settings: Sequence[Mapping[str, Any]]) -> list[tuple[str, list[str]]]:
    """(key path, value of every run) of all settings."""
    tables = [flat(one) if one else {} for one in settings]
    keys = dict.fromkeys(key for table in tables for key in table if key)
    return [(key, [plain(table[key]) if key in table else "-" for table in tables]) for key in keys]


def plain(value: Any) -> str:
    """A setting as YAML would write it in one line."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, list):
        return "[" + ", ".join(plain(part) for part in value) + "]"
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{key}: {plain(part)}" for key, part in value.items()) + "}"
    return str(value)


def recipe_text(recipe: Mapping[str, Any] | None) -> str:
    """A recipe as YAML."""
    return yaml.safe_dump(dict(recipe), sort_keys=False, allow_unicode=True, width=110) if recipe else ""
