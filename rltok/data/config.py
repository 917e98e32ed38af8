"""The section `data` of a recipe: where prompts come from, and how a row becomes a prompt."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

from rltok.config import ConfigError, build, check_keys, suggestion

Source = Literal["reasoning_gym", "file", "hub"]
LongPrompts = Literal["refuse", "drop"]

SUFFIXES = {".jsonl": "json", ".ndjson": "json", ".json": "json", ".parquet": "parquet", ".csv": "csv", ".tsv": "csv"}
"""File suffix -> reader of the datasets library."""

ONLY_FOR = {
    "tasks": "reasoning_gym",
    "task": "reasoning_gym",
    "task_options": "reasoning_gym",
    "train_size": "reasoning_gym",
    "path": "file",
    "heldout_path": "file",
    "name": "hub",
    "config_name": "hub",
    "split": "hub",
    "revision": "hub",
    "heldout_split": "hub",
}
LEAST = {"train_size": 1, "max_rows": 1, "heldout_size": 0, "max_prompt_tokens": 1}
"""Setting -> smallest value."""
NOT_FOR_REASONING_GYM = ("columns", "answer_pattern", "max_rows", "heldout_fraction")


@dataclass(frozen=True)
class TaskSpec:
    """One reasoning-gym task of a mixture."""

    task: str
    """name in reasoning-gym, such as `chain_sum`"""
    weight: float = 1.0
    """share of the rows, relative to the other tasks"""
    options: dict[str, Any] = field(default_factory=dict)
    """the task's own parameters, such as `{min_terms: 3, max_terms: 5}`; not size and seed"""
    template: str | None = None
    """str.format over question, answer and metadata; default: that of the mixture"""
    difficulty: str | None = None
    """what the column `difficulty` says; default: made from the entry's metadata"""


@dataclass(frozen=True)
class DataConfig:
    """Training and held-out rows, from reasoning-gym, a local file or a hub dataset."""

    source: Source = "reasoning_gym"
    """`reasoning_gym` generates rows; `file` reads `path`; `hub` reads the dataset `name`"""

    tasks: list[TaskSpec] = field(default_factory=list)
    """reasoning_gym: a weighted mixture; each has task, weight, options, template, difficulty"""
    task: str | None = None
    """reasoning_gym: short form for a mixture of one"""
    task_options: dict[str, Any] = field(default_factory=dict)
    """reasoning_gym: parameters of `task`"""
    train_size: int | None = None
    """reasoning_gym: rows to train on; required there"""

    path: str | None = None
    """file: .jsonl, .json, .parquet, .csv or .tsv, relative to the recipe"""

    name: str | None = None
    """hub: dataset name, such as `openai/gsm8k`"""
    config_name: str | None = None
    """hub: name of the dataset's configuration, such as `main`"""
    split: str | None = None
    """hub: split to train on; default `train`"""
    revision: str | None = None
    """hub: branch, tag or commit"""

    columns: dict[str, str] = field(default_factory=dict)
    """file, hub: our column -> the source's, such as {prompt: question}; `reward_model.ground_truth` reaches into a
    column of mappings. `prompt` and `answer` default to themselves; {answer: ""} means that there is none"""
    answer_pattern: str | None = None
    """file, hub: regular expression that finds the final answer in the answer column; its first group if it has one"""
    max_rows: int | None = None
    """file, hub: train on the first so many rows only (after the held-out ones are taken out)"""

    template: str | None = None
    """str.format over the row's columns that gives the user's text; literal braces are doubled, `\\boxed{{}}`"""
    system: str | None = None
    """system prompt"""
    conversational: bool = True
    """prompts are lists of messages; otherwise plain text for a model without chat template"""
    max_prompt_tokens: int | None = None
    """longest prompt, chat template included; the model's positions less the completion's are a limit in any case"""
    long_prompts: LongPrompts = "refuse"
    """a longer prompt: `refuse` ends the run before it starts; `drop` leaves such rows out and says how many"""

    heldout_size: int | None = None
    """number of held-out rows; reasoning_gym requires it"""
    heldout_fraction: float | None = None
    """file, hub: share of the distinct prompts that is held out; 0.1 where nothing else about it is set"""
    heldout_split: str | None = None
    """hub: a split of its own for the held-out rows, such as `test`"""
    heldout_path: str | None = None
    """file: a file of its own for the held-out rows"""
    split_seed: int = 0
    """decides which rows are held out; the training seed does not"""

    def __post_init__(self) -> None:
        specs = [
            build(TaskSpec, t, f"data.tasks[{i}]") if isinstance(t, Mapping) else t for i, t in enumerate(self.tasks)
        ]
        object.__setattr__(self, "tasks", specs)
        if self.source not in get_args(Source):
            raise _error("source", f"{self.source!r} is unknown{suggestion(str(self.source), get_args(Source))}")
        if self.long_prompts not in get_args(LongPrompts):
            raise _error("long_prompts", f"{self.long_prompts!r}; allowed: {', '.join(get_args(LongPrompts))}")
        self._check_places()
        self._check_sizes()
        if self.source == "reasoning_gym":
            self._check_tasks()
        elif self.source == "file":
            _check_file(self.path, "path", required=True)
            _check_file(self.heldout_path, "heldout_path", required=False)
        elif not self.name:
            raise _error("name", "missing; source: hub needs the name of a dataset, such as openai/gsm8k")
        self._check_pattern()

    @property
    def mixture(self) -> list[TaskSpec]:
        """The reasoning-gym tasks, the short form included."""
        return [TaskSpec(self.task, options=self.task_options)] if self.task else self.tasks

    def _check_places(self) -> None:
        """Refuse settings that the chosen source would ignore."""
        defaults = {f.name: _default(f) for f in dataclasses.fields(self)}
        is_set = {name: getattr(self, name) != default for name, default in defaults.items()}
        for name, source in ONLY_FOR.items():
            if is_set[name] and self.source != source:
                raise _error(name, f"belongs to source: {source}, but data.source is {self.source}")
        for name in NOT_FOR_REASONING_GYM:
            if is_set[name] and self.source == "reasoning_gym":
                raise _error(name, "belongs to source: file or hub, but data.source is reasoning_gym")

    def _check_sizes(self) -> None:
        for name, least in LEAST.items():
            value = getattr(self, name)
            if value is not None and value < least:
                raise _error(name, f"{value} must be at least {least}")
        if self.heldout_fraction is not None and not 0 <= self.heldout_fraction < 1:
            raise _error("heldout_fraction", f"{self.heldout_fraction} must be in [0, 1)")
        ways = ("heldout_size", "heldout_fraction", "heldout_split", "heldout_path")
        chosen = [name for name in ways if getattr(self, name) is not None]
        if len(chosen) > 1:
            raise _error(chosen[0], f"set together with data.{chosen[1]}; held-out rows come from one of them")

    def _check_tasks(self) -> None:
        if bool(self.task) == bool(self.tasks):
            seen = "both data.task and data.tasks are set" if self.task else "missing"
            raise _error("task", f"{seen}; source: reasoning_gym needs one task, or a list data.tasks")
        if self.task_options and not self.task:
            raise _error("task_options", "belongs to data.task; in data.tasks every task has its own `options`")
        for name in ("train_size", "heldout_size"):
            if getattr(self, name) is None:
                raise _error(name, "missing; source: reasoning_gym generates as many rows as this says")
        for i, spec in enumerate(self.mixture):
            paths = ("data.task", "data.task_options", "data.tasks")
            if not self.task:
                paths = (f"data.tasks[{i}].task", f"data.tasks[{i}].options", f"data.tasks[{i}].weight")
            _check_task(spec, *paths)

    def _check_pattern(self) -> None:
        if self.answer_pattern is None:
            return
        try:
            re.compile(self.answer_pattern)
        except re.error as error:
            raise _error("answer_pattern", f"{self.answer_pattern!r} is not a regular expression: {error}") from error


def _error(name: str, message: str) -> ConfigError:
    return ConfigError(f"data.{name}: {message}", f"data.{name}")


def _default(setting: dataclasses.Field[Any]) -> Any:
    if setting.default_factory is not dataclasses.MISSING:
        return setting.default_factory()
    return setting.default


def _check_file(path: str | None, name: str, required: bool) -> None:
    if path is None:
        if required:
            raise _error(name, "missing; source: file needs a file to read")
        return
    suffix = Path(path).suffix.lower()
    if suffix not in SUFFIXES:
        raise _error(name, f"{path!r} has the suffix {suffix!r}{suggestion(suffix, SUFFIXES)}")


def _check_task(spec: TaskSpec, task_path: str, options_path: str, weight_path: str) -> None:
    """Refuse unknown tasks and parameters, and values that the task itself refuses."""
    from reasoning_gym.factory import DATASETS  # here: it takes half a second, and only this source needs it

    known: Iterable[str] = sorted(name for name in DATASETS if name != "composite")  # `tasks` is our mixture
    if spec.task not in known:
        raise ConfigError(
            f"{task_path}: unknown reasoning-gym task {spec.task!r}{suggestion(spec.task, known)}", task_path
        )
    if not 0 < spec.weight < float("inf"):
        raise ConfigError(f"{weight_path}: {spec.weight} must be > 0 and finite", weight_path)
    kind = DATASETS[spec.task][1]
    check_keys(spec.options, (f.name for f in dataclasses.fields(kind) if f.name not in ("seed", "size")), options_path)
    try:
        kind(**spec.options).validate()
    except (AssertionError, ValueError, TypeError) as error:
        message = f"{options_path}: {spec.options} is refused by {spec.task}: {error or 'an assertion failed'}"
        raise ConfigError(message, options_path) from error
