"""The section `rewards` of a recipe, checked without running a user's code: for commands that only look at a recipe."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from rltok.rewards.build import build_rewards
from rltok.rewards.user import check_function


class CheckedRewards(NamedTuple):
    """Names and weights in the order of the recipe."""

    names: list[str]
    weights: list[float]


def check_rewards(section: Mapping[str, Mapping[str, Any]], base_dir: Path | None = None) -> CheckedRewards:
    """Check what `build_rewards` builds; a user's own file is parsed, never run.

    Args:
        section: as `build_rewards` takes it.
        base_dir: what a file is relative to; default the working directory.

    Raises:
        ConfigError: as `build_rewards`, as far as the text of a user's file tells.
    """
    base = Path.cwd() if base_dir is None else Path(base_dir)
    shipped: Any = section
    if isinstance(section, Mapping):
        shipped = {name: _without_code(str(name), options, base) for name, options in section.items()}
    built = build_rewards(shipped, base)
    return CheckedRewards(built.names, built.weights)


def _without_code(name: str, options: Any, base_dir: Path) -> Any:
    """A reward of the user's as one of ours of the same weight, once its file has been looked at."""
    reference = options.get("function") if isinstance(options, Mapping) else None
    if not isinstance(reference, str) or ":" not in reference:
        return options
    own = {key: value for key, value in options.items() if key not in ("function", "weight")}
    check_function(reference, own, base_dir, f"rewards.{name}")
    weight = {"weight": options["weight"]} if "weight" in options else {}
    return {"function": "strict_accuracy", **weight}
