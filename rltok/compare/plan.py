"""What a comparison consists of: a YAML file -> checked recipes of equal budget, one per task, arm and seed.

    base: dapo                         # recipe of every arm that names none of its own
    baseline: dapo                     # arm that every other is compared with
    seeds: [0, 1, 2]
    settings: {training: {max_steps: 64}}              # sections over every recipe
    tasks:                                             # name -> sections over every recipe
      sums: {data: {tasks: [...]}}
    arms:                                              # name -> its recipe, and sections over it
      dapo: {}
      hapo: {recipe: demo}
      grpo: {settings: {training: {loss_type: grpo}}}

Sections are merged over a recipe as overrides on the command line are: `settings`, then the task's, then the arm's.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from rltok.config import ConfigError, build, suggestion
from rltok.recipe import CONFIG_DIR, Recipe, find_recipe, load_recipe

COMPARISON_DIR = CONFIG_DIR / "compare"
"""Where the shipped comparisons lie."""


@dataclass(frozen=True)
class Arm:
    """One method of a comparison."""

    recipe: str | None = None
    """recipe it trains by; null takes `base`"""
    settings: dict[str, Any] = field(default_factory=dict)
    """sections over the recipe, as a recipe file would hold them"""
    seeds: tuple[int, ...] | None = None
    """its seeds, among the baseline's; null takes `seeds`"""
    seed_offset: int = 0
    """added to each seed when training: with the baseline's settings, an arm whose difference can only be noise"""
    about: str = ""
    """what it is, in a few words"""


@dataclass(frozen=True)
class Comparison:
    """Methods to compare on the same tasks, seeds and budget."""

    base: str
    """recipe of every arm that names none"""
    baseline: str
    """arm that every other is compared with"""
    arms: dict[str, Arm]
    """name -> method"""
    seeds: tuple[int, ...]
    """one run per task, arm and seed; runs of equal seed are paired"""
    tasks: dict[str, dict[str, Any]] = field(default_factory=lambda: {"task": {}})
    """name -> sections over every recipe, such as `data`"""
    settings: dict[str, Any] = field(default_factory=dict)
    """sections over every recipe"""
    metric: str = "strict"
    """reward whose held-out mean is compared"""
    level: float = 0.95
    """of the intervals"""
    output_dir: str | None = None
    """null is runs/compare-<name>"""
    name: str = "comparison"
    """default: the file's name"""

    def __post_init__(self) -> None:
        for group in ("arms", "tasks"):
            for key in getattr(self, group):
                if not re.fullmatch(r"[A-Za-z0-9][\w.-]*", key):
                    raise ConfigError(f"{group}: {key!r} names a directory; use letters, digits, '_' and '-'", group)
            if not getattr(self, group):
                raise ConfigError(f"{group}: empty; name at least one", group)
        if self.baseline not in self.arms:
            raise ConfigError(
                f"baseline: {self.baseline!r} is no arm{suggestion(self.baseline, self.arms)}", "baseline"
            )
        if not 0.5 <= self.level < 1:
            raise ConfigError(f"level: {self.level} must lie in [0.5, 1), such as 0.95", "level")
        for name in self.arms:
            self._check_seeds(name)

    def _check_seeds(self, name: str) -> None:
        where = "seeds" if self.arms[name].seeds is None else f"arms.{name}.seeds"
        seeds = self.seeds_of(name)
        if not seeds or len(set(seeds)) < len(seeds) or min(seeds) < 0:
            raise ConfigError(f"{where}: {list(seeds)} must be different numbers >= 0, at least one", where)
        alone = sorted(set(seeds) - set(self.seeds_of(self.baseline)))
        if alone:
            raise ConfigError(
                f"{where}: {alone[0]} is no seed of the baseline {self.baseline!r}, so its run has no pair; allowed: "
                f"{', '.join(map(str, self.seeds_of(self.baseline)))}",
                where,
            )

    def seeds_of(self, arm: str) -> tuple[int, ...]:
        """Seeds of an arm, before its offset."""
        own = self.arms[arm].seeds
        return self.seeds if own is None else own

    @property
    def directory(self) -> Path:
        """Where runs and results lie."""
        return Path(self.output_dir or f"runs/compare-{self.name}")


@dataclass(frozen=True)
class PlannedRun:
    """One training run of a comparison."""

    task: str
    arm: str
    seed: int
    """before the arm's offset: what runs are paired by"""
    recipe: Recipe
    """checked; with the training's seed and directory"""

    @property
    def path(self) -> Path:
        """Its run directory."""
        assert self.recipe.output_dir is not None
        return Path(self.recipe.output_dir)

    def __str__(self) -> str:
        return f"{self.task} {self.arm} seed {self.seed}"


@dataclass(frozen=True)
class Plan:
    """A checked comparison: every run, and what all of them may spend."""

    comparison: Comparison
    file: Path
    runs: tuple[PlannedRun, ...]
    """by seed, then task, then arm: an unfinished comparison has all arms for its first seeds"""
    budget: Mapping[str, Mapping[str, Any]]
    """task -> the settings of `training` that decide what a run may spend, equal in all its runs"""

    @property
    def directory(self) -> Path:
        """Where runs and results lie."""
        return self.comparison.directory


def load_comparison(path: str | Path, overrides: Sequence[str] = ()) -> tuple[Comparison, Path]:
    """Read a comparison; nothing of its recipes is checked yet.

    Args:
        path: a YAML file, or the name of a shipped comparison such as `demo`.
        overrides: `key.path=value` with a YAML value, such as `seeds=[0]` or `settings.training.max_steps=8`.

    Raises:
        ConfigError: no such file, no valid YAML, unknown key or a value of the wrong type; names key and nearest name.
    """
    file = find_comparison(path)
    for text in overrides:
        if "=" not in text:
            raise ConfigError(f"override {text!r}: write key.path=value, such as seeds=[0]")
    try:
        layers = [OmegaConf.create(file.read_text(encoding="utf-8")), OmegaConf.from_dotlist(list(overrides))]
        values = OmegaConf.to_container(OmegaConf.merge(*layers), resolve=False)
    except (yaml.YAMLError, OmegaConfBaseException, TypeError, ValueError) as error:
        raise ConfigError(f"{file}: not valid YAML: {error}") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{file}: a comparison is a mapping; it names base, baseline, seeds and arms")
    values.setdefault("name", file.stem)
    for group in ("arms", "tasks"):
        if isinstance(values.get(group), dict):  # `dapo:` with nothing behind it is an arm without changes
            values[group] = {str(key): {} if value is None else value for key, value in values[group].items()}
    try:
        return build(Comparison, {str(key): value for key, value in values.items()}), file
    except ConfigError as error:
        raise ConfigError(f"{file}: {error}", error.path) from error


def find_comparison(path: str | Path) -> Path:
    """File of a comparison: a path, else the name of a shipped one.

    Raises:
        ConfigError: there is none; lists the shipped ones, nearest name first.
    """
    given = Path(path).expanduser()
    for folder in (Path.cwd(), COMPARISON_DIR):
        for name in (given, given.with_name(given.name + ".yaml")):
            if (folder / name).is_file():
                return (folder / name).resolve()
    shipped = sorted(file.stem for file in COMPARISON_DIR.glob("*.yaml"))
    raise ConfigError(f"{path}: no such comparison file{suggestion(given.stem, shipped)}")


def make_plan(path: str | Path, overrides: Sequence[str] = ()) -> Plan:
    """Read and check a comparison: every recipe by itself, and that all of a task can be compared.

    Raises:
        ConfigError: whatever `load_comparison` or a recipe refuses; budgets, data, model or evaluation that differ from
            the baseline's; arms that are the same; runs of other settings in the directory. Names arm and setting.
    """
    comparison, file = load_comparison(path, overrides)
    recipes = {
        (task, arm): _recipe(comparison, file, task, arm) for task in comparison.tasks for arm in comparison.arms
    }
    try:
        budget = check_comparable(comparison, recipes)
        runs = tuple(_runs(comparison, recipes))
        for run in runs:
            refuse_other_settings(run)
    except ConfigError as error:
        raise ConfigError(f"{file}: {error}", error.path) from error
    return Plan(comparison, file, runs, budget)


def _recipe(comparison: Comparison, file: Path, task: str, arm: str) -> Recipe:
    own = comparison.arms[arm]
    layers = {"settings": comparison.settings, f"tasks.{task}": comparison.tasks[task], f"arms.{arm}": own.settings}
    for where, layer in layers.items():
        for key in ("name", "seed", "output_dir", "resume", "defaults"):
            if key in layer:
                raise ConfigError(f"{file}: {where}.{key}: set by the comparison itself; leave it out", where)
    overrides = [f"{key}={json.dumps(value)}" for layer in layers.values() for key, value in layer.items()]
    try:
        named = own.recipe or comparison.base
        recipe = find_recipe(named, beside=file.parent)
        if recipe == file:  # a comparison demo.yaml that names the recipe demo.yaml
            recipe = find_recipe(named, beside=CONFIG_DIR)
        return load_recipe(recipe, [*overrides, f"name={task}-{arm}", "expect=[]"])
    except ConfigError as error:
        told = error.__cause__ if isinstance(error.__cause__, ConfigError) else error  # without "override '...': "
        raise ConfigError(f"{file}: arms.{arm} on {task}: {told}", error.path) from error


def _runs(comparison: Comparison, recipes: Mapping[tuple[str, str], Recipe]) -> Iterator[PlannedRun]:
    for seed in comparison.seeds_of(comparison.baseline):
        for (task, arm), recipe in recipes.items():
            if seed in comparison.seeds_of(arm):
                path = comparison.directory / "runs" / task / arm / f"seed{seed}"
                trained = replace(recipe, seed=seed + comparison.arms[arm].seed_offset, output_dir=str(path))
                yield PlannedRun(task, arm, seed, trained)


# What must be equal

BUDGET = {
    "max_steps": "updates",
    "num_train_epochs": "updates",
    "num_iterations": "updates",
    "gradient_accumulation_steps": "updates",
    "per_device_train_batch_size": "completions",
    "steps_per_generation": "completions",
    "num_generations": "completions",
    "max_completion_length": "generated tokens",
}
"""Setting of `training` -> what it decides."""


def check_comparable(comparison: Comparison, recipes: Mapping[tuple[str, str], Recipe]) -> dict[str, dict[str, Any]]:
    """Refuse runs that could not be compared; the settings that decide the budget of each task.

    Raises:
        ConfigError: names the arm, the setting and both values.
    """
    budget: dict[str, dict[str, Any]] = {}
    for task in comparison.tasks:
        base = recipes[task, comparison.baseline]
        equal = _equal_settings(base)
        _check_measured(comparison, task, comparison.baseline, base)
        for arm in comparison.arms:
            recipe = recipes[task, arm]
            _check_measured(comparison, task, arm, recipe)
            for setting, value in _equal_settings(recipe).items():
                if value != equal[setting]:
                    raise _unequal(comparison, task, arm, setting, value, equal[setting])
        _refuse_twins(comparison, task, recipes)
        budget[task] = {name: equal[f"training.{name}"] for name in BUDGET}
    return budget


def _equal_settings(recipe: Recipe) -> dict[str, Any]:
    """What must be equal in all arms: key path -> value, TRL's defaults filled in."""
    from rltok.estimate import check_combination

    try:
        args = check_combination(recipe)
    except ConfigError as error:
        raise ConfigError(f"{recipe.name}: {error}", error.path) from error
    values = recipe.resolved()
    found = {f"training.{name}": getattr(args, name) for name in BUDGET}
    found["rollout.dynamic_sampling"] = (values["rollout"] or {}).get("dynamic_sampling")
    return found | {section: values[section] for section in ("model", "data", "evaluation")}


def _unequal(comparison: Comparison, task: str, arm: str, setting: str, value: Any, wanted: Any) -> ConfigError:
    from rltok.run import differences

    what = BUDGET.get(setting.removeprefix("training."), "generated tokens" if "dynamic" in setting else "")
    if isinstance(value, dict) and isinstance(wanted, dict):
        setting = differences(wanted, value, setting)[0]
        for key in setting.split(".")[1:]:
            value, wanted = (side.get(key) if isinstance(side, dict) else side for side in (value, wanted))
    reason = f"equal {what}" if what else "the same problems, model and evaluation"
    return ConfigError(
        f"arms.{arm} on {task}: {setting} is {_short(value)}, but {_short(wanted)} for the baseline "
        f"{comparison.baseline!r}; runs of one comparison have {reason}: set it for all arms in `settings`, or "
        "leave it out here",
        setting,
    )


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 120 else f"{text[:117]}..."


def _check_measured(comparison: Comparison, task: str, arm: str, recipe: Recipe) -> None:
    """Refuse an arm whose held-out metric is missing or another one than the baseline's."""
    where = f"arms.{arm} on {task}"
    if comparison.metric not in recipe.rewards:
        names = suggestion(comparison.metric, recipe.rewards)
        raise ConfigError(f"{where}: metric {comparison.metric!r} is no reward of its recipe{names}", "metric")
    if not recipe.evaluation.after:
        raise ConfigError(f"{where}: evaluation.after is false, so nothing is compared; set it to true", "evaluation")


def _refuse_twins(comparison: Comparison, task: str, recipes: Mapping[tuple[str, str], Recipe]) -> None:
    """Refuse two arms whose runs would be equal bit for bit, and a metric that means something else in an arm."""
    seen: dict[str, str] = {}
    wanted = _measure(recipes[task, comparison.baseline], comparison.metric)
    for arm, own in comparison.arms.items():
        recipe = recipes[task, arm]
        if (found := _measure(recipe, comparison.metric)) != wanted:
            where = f"rewards.{comparison.metric}"
            raise ConfigError(
                f"arms.{arm} on {task}: {where} is {found}, but {wanted} for the baseline {comparison.baseline!r}; the "
                "metric is one and the same function in all arms (only its weight may differ)",
                where,
            )
        values = recipe.resolved() | {"name": "", "seed": own.seed_offset}
        key = json.dumps(values, sort_keys=True, default=str)
        if key in seen:
            raise ConfigError(
                f"arms.{arm}: on {task} it has the settings and seeds of arms.{seen[key]}, so its runs would be equal "
                "bit for bit; leave it out, or give it seed_offset: 1000, a control that differs by noise alone",
                f"arms.{arm}",
            )
        seen[key] = arm


def _measure(recipe: Recipe, metric: str) -> dict[str, Any]:
    return {key: value for key, value in recipe.rewards[metric].items() if key != "weight"}


# Runs that are there already

FREE = ("output_dir", "resume", "report", "expect")
"""Settings that change nothing about what a run computes."""


def refuse_other_settings(run: PlannedRun) -> None:
    """Refuse to continue or to count a run that was made with other settings.

    Raises:
        ConfigError: names the settings.
    """
    from rltok.run import RunDirectory, differences

    file = RunDirectory(run.path).recipe
    if not file.is_file():
        return
    try:
        old = yaml.safe_load(file.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ConfigError(f"{file} is damaged ({error}); delete {run.path} and run again") from error
    changed = [path for path in differences(old, run.recipe.resolved()) if path.split(".")[0] not in FREE]
    if changed:
        raise ConfigError(
            f"{run.path} holds a run with another {', '.join(changed[:3])}{' ...' if len(changed) > 3 else ''}; choose "
            "another output_dir, or delete that run",
            changed[0],
        )
