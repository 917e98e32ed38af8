"""Rewards of completions: which functions judge them, what they say, and the best completion of every prompt."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rltok.config import ConfigError, suggestion
from rltok.evaluate import score
from rltok.prompts import Row

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from rltok.generation_files import Generated
    from rltok.recipe import Recipe
    from rltok.rewards import RewardSet


def reward_set(
    asked: Sequence[str], best_of: int | None, recipe_data: bool, out: Path | None, recipe: Recipe | None
) -> RewardSet | None:
    """The functions of `--reward`, else the recipe's where a choice or its data asks for rewards, else None.

    Args:
        asked: values of `--reward`.
        out: folder in which a user's own reward file is kept.

    Raises:
        ConfigError: an unknown function, or none to choose by.
    """
    from rltok.rewards import build_rewards

    own: Mapping[str, Any] = (recipe.rewards or {}) if recipe is not None else {}
    if asked:
        section = _asked_rewards(asked, own)
    elif best_of is None and not recipe_data:
        return None
    elif not own:
        if best_of is None:
            return None
        raise ConfigError(f"--best-of {best_of}: no reward to choose by; give --reward NAME, or a recipe with rewards")
    else:
        section = dict(own)
    found = build_rewards(section, save_dir=out)
    if best_of is not None and not any(found.weights):
        raise ConfigError(f"--best-of {best_of}: every reward has weight 0; give --reward NAME")
    return found


def _asked_rewards(references: Sequence[str], own: Mapping[str, Any]) -> dict[str, Any]:
    """Section `rewards` for names of the recipe's rewards, registered names and `file.py:function`; weight 1 each."""
    from rltok.rewards import REWARDS

    section: dict[str, Any] = {}
    for reference in references:
        name = reference.rpartition(":")[2]
        if name in section:
            raise ConfigError(f"--reward {reference}: {name!r} is given twice; leave one out")
        if ":" not in reference and reference not in own and reference not in REWARDS:
            known = [*own, *REWARDS, "module:function", "path/file.py:function"]
            raise ConfigError(f"--reward {reference}: unknown reward{suggestion(reference, known)}")
        section[name] = {**own.get(reference, {"function": reference}), "weight": 1.0}
    return section


def check_columns(rewards: RewardSet | None, rows: Sequence[Row]) -> None:
    """Refuse rows that a reward function of ours cannot judge, before the time that generation takes."""
    from rltok.rewards import REWARDS

    for guard in [] if rewards is None else rewards.functions:
        function: Any = getattr(guard, "function", None)
        if type(function) not in REWARDS.values():
            continue  # a function of the user is called on real completions only
        columns = {name: [row[name] for row in rows] for name in rows[0] if name != "prompt"}
        empty: list[Any] = [
            [{"role": "assistant", "content": ""}] if isinstance(row["prompt"], list) else "" for row in rows
        ]
        try:
            function(
                prompts=[row["prompt"] for row in rows], completions=empty, completion_ids=[[] for _ in rows], **columns
            )
        except (ValueError, KeyError, TypeError) as error:
            raise ConfigError(f"--reward {guard.__name__}: cannot judge these prompts: {error}") from error


def score_completions(
    completions: Sequence[Generated],
    rows: Sequence[Row],
    tokenizer: PreTrainedTokenizerBase,
    rewards: RewardSet | None,
) -> dict[str, list[float]]:
    """Name of the reward function -> reward of every completion, NaN where it does not apply.

    Raises:
        ConfigError: a function raised, or returned no number.
    """
    from rltok.rewards import RewardError

    if rewards is None:
        return {}
    try:
        return score([rows[one.row] for one in completions], tokenizer, [one.ids for one in completions], rewards)
    except RewardError as error:
        raise ConfigError(f"--reward {error}") from error


def total_rewards(scores: Mapping[str, Sequence[float]], rewards: RewardSet | None) -> list[float]:
    """Weighted sum of every completion's rewards, without those that do not apply; NaN where none applies."""
    if rewards is None:
        return []
    weights = dict(zip(rewards.names, rewards.weights, strict=True))
    totals = []
    for values in zip(*(scores[name] for name in weights), strict=True):
        pairs = [(w, v) for w, v in zip(weights.values(), values, strict=True) if not math.isnan(v)]
        totals.append(sum(w * v for w, v in pairs) if pairs else math.nan)
    return totals


def choose(completions: Sequence[Generated], totals: Sequence[float]) -> list[bool]:
    """Which completion of every prompt has the highest total reward; the first of equals, NaN below every number."""
    best: dict[int, int] = {}
    ranks = [-math.inf if math.isnan(total) else total for total in totals]
    for index, one in enumerate(completions):
        if one.row not in best or ranks[index] > ranks[best[one.row]]:
            best[one.row] = index
    kept = set(best.values())
    return [index in kept for index in range(len(completions))]


def reward_means(
    scores: Mapping[str, Sequence[float]], totals: Sequence[float], chosen: Sequence[bool] | None
) -> dict[str, float]:
    """Means over all completions by function, of the `total`, and of the `chosen` ones' totals."""
    means = {name: _mean(values) for name, values in scores.items()}
    if scores:
        means["total"] = _mean(totals)
    if chosen is not None:
        means["chosen"] = _mean([total for total, is_chosen in zip(totals, chosen, strict=True) if is_chosen])
    return means


def _mean(values: Sequence[float]) -> float:
    known = [value for value in values if not math.isnan(value)]
    return sum(known) / len(known) if known else math.nan
