"""What may change between a run and its continuation: one table, from the key path of a setting to a verdict.

A continuation is exact where nothing changes. What is shown and let through keeps it meaningful: the same run, from
some step on with another length, strength or place to report to. What is refused would give numbers of two different
runs in one directory, would not fit the state in the checkpoint, or would have no effect as that state overrides it.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from fnmatch import fnmatchcase
from typing import Any

from rltok.config import ConfigError, join


class Verdict(Enum):
    """What becomes of a changed setting; the value is the wording in the documentation."""

    SHOWN = "shown"
    IN_ROLLOUT = "refused inside a rollout, else shown"
    MEASURED = "refused once `evaluation_before.json` is there, else shown"
    SAME_RUN = "refused; shown with `resume=CHECKPOINT` into another directory"
    ALWAYS = "refused"


@dataclass(frozen=True)
class Rule:
    """The verdict on the settings that a pattern matches."""

    pattern: str
    """key path as a shell pattern, list indices left out: `objective.type`, `data*`"""
    verdict: Verdict
    reason: str
    """why it is refused, or what showing it means"""


_SHAPE = "the rollout and the optimizer in the checkpoint are cut by it"
_OPTIMIZER = "the optimizer's state in the checkpoint holds it, so a new value would have no effect"
_METHOD = "another method from some step on makes another run"
_HARMLESS = "changes nothing that is learnt"

RULES: tuple[Rule, ...] = (
    Rule("name", Verdict.SHOWN, _HARMLESS),
    Rule("seed", Verdict.SAME_RUN, "decides the order of prompts and all random numbers"),
    Rule("model.attn_implementation", Verdict.SHOWN, "the same numbers but for rounding"),
    Rule("model.trust_remote_code", Verdict.SHOWN, _HARMLESS),
    Rule("model.lora.dropout", Verdict.SHOWN, "acts from here on"),
    Rule("model.lora*", Verdict.ALWAYS, "the checkpoint holds that adapter's weights and their optimizer state"),
    Rule("model.adapter", Verdict.ALWAYS, "decides which weights are trained"),
    Rule("model*", Verdict.SAME_RUN, "base weights, tokenizer and reference policy come from it"),
    Rule("data*", Verdict.SAME_RUN, "decides the rows, their order and the prompts"),
    Rule("rewards*", Verdict.SAME_RUN, "another reward is another task"),
    Rule("credit", Verdict.SAME_RUN, _METHOD),
    Rule("credit.type", Verdict.SAME_RUN, _METHOD),
    Rule("credit.*", Verdict.SHOWN, "acts from the next rollout on"),
    Rule("selection", Verdict.SAME_RUN, _METHOD),
    Rule("selection.type", Verdict.SAME_RUN, _METHOD),
    Rule("selection.*", Verdict.IN_ROLLOUT, "the rollout in the checkpoint is selected already"),
    Rule("objective", Verdict.SAME_RUN, _METHOD),
    Rule("objective.type", Verdict.SAME_RUN, _METHOD),
    Rule("objective.*", Verdict.SHOWN, "acts from the next update on"),
    Rule("rollout", Verdict.SAME_RUN, _METHOD),
    Rule("rollout.engine", Verdict.SAME_RUN, "engines draw from different random numbers"),
    Rule("rollout.decoding", Verdict.SAME_RUN, _METHOD),
    Rule("rollout.decoding.type", Verdict.SAME_RUN, _METHOD),
    Rule("rollout.dynamic_sampling", Verdict.SAME_RUN, "the position of replacement prompts is in the checkpoint"),
    Rule("rollout.prompt_skipping", Verdict.SAME_RUN, "what is known of prompts is in the checkpoint"),
    Rule("rollout.steering", Verdict.SAME_RUN, _METHOD),
    Rule("rollout.quant*", Verdict.SAME_RUN, _METHOD),
    Rule("rollout.*", Verdict.SHOWN, "acts from the next rollout on"),
    Rule("quantization_aware.entropy", Verdict.SHOWN, "acts from the next update on"),
    Rule("quantization_aware.distribution", Verdict.SHOWN, "acts from the next update on"),
    Rule("quantization_aware.distillation*", Verdict.SHOWN, "acts from the next update on"),
    Rule("quantization_aware.convert", Verdict.SHOWN, "acts at the end"),
    Rule("quantization_aware*", Verdict.ALWAYS, "the checkpoint holds the steps of those quantisers"),
    Rule("batching*", Verdict.IN_ROLLOUT, "the micro-batches of the rollout in the checkpoint are cut already"),
    Rule("training.per_device_train_batch_size", Verdict.ALWAYS, _SHAPE),
    Rule("training.gradient_accumulation_steps", Verdict.ALWAYS, _SHAPE),
    Rule("training.steps_per_generation", Verdict.ALWAYS, _SHAPE),
    Rule("training.generation_batch_size", Verdict.ALWAYS, _SHAPE),
    Rule("training.num_generations", Verdict.ALWAYS, _SHAPE),
    Rule("training.num_iterations", Verdict.ALWAYS, _SHAPE),
    Rule("training.learning_rate", Verdict.ALWAYS, _OPTIMIZER),
    Rule("training.weight_decay", Verdict.ALWAYS, _OPTIMIZER),
    Rule("training.adam_*", Verdict.ALWAYS, _OPTIMIZER),
    Rule("training.optim*", Verdict.ALWAYS, _OPTIMIZER),
    Rule("training.deepspeed", Verdict.ALWAYS, _OPTIMIZER),
    Rule("training.fsdp*", Verdict.ALWAYS, _OPTIMIZER),
    Rule("training.data_seed", Verdict.SAME_RUN, "decides the order of prompts"),
    Rule("training.shuffle_dataset", Verdict.SAME_RUN, "decides the order of prompts"),
    Rule("training.chat_template*", Verdict.SAME_RUN, "decides what a prompt looks like"),
    Rule("training.loss_type", Verdict.SAME_RUN, _METHOD),
    Rule("training.importance_sampling_level", Verdict.SAME_RUN, _METHOD),
    Rule("training.use_vllm", Verdict.SAME_RUN, "engines draw from different random numbers"),
    Rule("training.*", Verdict.SHOWN, "acts from the next step, rollout or checkpoint on"),
    Rule("evaluation.before", Verdict.SHOWN, _HARMLESS),
    Rule("evaluation.after", Verdict.SHOWN, _HARMLESS),
    Rule("evaluation.batch_size", Verdict.SHOWN, _HARMLESS),
    Rule("evaluation*", Verdict.MEASURED, "accuracy before and after training could not be compared"),
    Rule("launch*", Verdict.SHOWN, "processes and strategy are compared with those in the checkpoint"),
    Rule("faults*", Verdict.SHOWN, _HARMLESS),
    Rule("report*", Verdict.SHOWN, _HARMLESS),
    Rule("expect*", Verdict.SHOWN, _HARMLESS),
    Rule("output_dir", Verdict.SHOWN, _HARMLESS),
    Rule("resume", Verdict.SHOWN, _HARMLESS),
)
"""The first rule that matches decides."""

BEFORE_TRAINING = ("model*", "data*", "rewards*", "evaluation*", "training.max_completion_length", "training.chat_*")
"""What the evaluation of the starting policy depends on."""


class _Absent:
    def __repr__(self) -> str:
        return "not set"


ABSENT = _Absent()
"""Stands for a key that one side lacks."""


@dataclass(frozen=True)
class Change:
    """One setting that differs."""

    path: str
    """key path; list items as `objective[0].alpha`"""
    old: Any
    new: Any

    @property
    def rule(self) -> Rule:
        """What the table says."""
        return rule_of(self.path)

    def __str__(self) -> str:
        return f"{self.path}: {_short(self.old)} -> {_short(self.new)}"


def rule_of(path: str) -> Rule:
    """The rule that decides about a key path.

    Raises:
        KeyError: the table has none.
    """
    plain = re.sub(r"\[\d+\]", "", path)
    for rule in RULES:
        if fnmatchcase(plain, rule.pattern):
            return rule
    raise KeyError(path)


def changes(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[Change]:
    """Settings that differ between two resolved recipes, with both values.

    A key of `training` that one side lacks has its default there.
    """
    return [change for change in _differing(_with_defaults(old, new), _with_defaults(new, old), "")]


def _differing(old: Any, new: Any, path: str) -> Iterator[Change]:
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        for key in dict.fromkeys([*old, *new]):
            yield from _differing(old.get(key, ABSENT), new.get(key, ABSENT), join(path, key))
    elif isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        for index, (before, after) in enumerate(zip(old, new, strict=True)):
            yield from _differing(before, after, f"{path}[{index}]")
    elif old != new:
        yield Change(path, old, new)


def _with_defaults(side: Mapping[str, Any], other: Mapping[str, Any]) -> Mapping[str, Any]:
    training, others = side.get("training") or {}, other.get("training") or {}
    missing = [name for name in others if name not in training]
    if not missing:
        return side
    from rltok.trainers.config import CreditConfig

    known = {field.name: field for field in dataclasses.fields(CreditConfig)}
    defaults = {name: _default(known[name]) for name in missing if name in known}
    return {**side, "training": {**training, **defaults}}


def _default(field: dataclasses.Field[Any]) -> Any:
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return ABSENT if field.default is dataclasses.MISSING else getattr(field.default, "value", field.default)


@dataclass(frozen=True)
class Continuation:
    """Where and how a run goes on, as far as the verdicts depend on it."""

    checkpoint: str
    """path of the checkpoint"""
    same_run: bool
    """it lies in the directory that the run writes into"""
    in_rollout: bool
    """updates of its last rollout are still to come"""
    measured: bool
    """the starting policy of this directory was evaluated"""

    def refuses(self, change: Change) -> bool:
        """Whether the change would make the continuation meaningless."""
        if _is_new_setting(change):
            return False
        verdict = change.rule.verdict
        return (
            verdict is Verdict.ALWAYS
            or (verdict is Verdict.SAME_RUN and self.same_run)
            or (verdict is Verdict.IN_ROLLOUT and self.in_rollout)
            or (verdict is Verdict.MEASURED and self.measured and self.same_run)
        )


def _is_new_setting(change: Change) -> bool:
    """A setting of a section that the version of rltok lacked by which the run was begun."""
    section, *keys = re.sub(r"\[\d+\]", "", change.path).split(".")
    return change.old is ABSENT and len(keys) <= 1 and section not in ("rewards", "training")


def refuse(found: Sequence[Change], how: Continuation) -> None:
    """Refuse to continue with other settings where the table says so.

    Raises:
        ConfigError: names every such setting with the old and the new value and why.
    """
    refused = [change for change in found if how.refuses(change)]
    if not refused:
        return
    lines = [f"    {change} ({change.rule.reason})" for change in refused]
    elsewhere = how.same_run and all(change.rule.verdict is not Verdict.ALWAYS for change in refused)
    ways = ["set them back"]
    if elsewhere:
        ways.append(f"train on with them in another directory: resume={how.checkpoint} output_dir=DIR")
    ways.append(f"start a new run from its weights: model.path={how.checkpoint} output_dir=DIR")
    raise ConfigError(
        f"resume: {how.checkpoint} was written with other settings (old -> new), with which it cannot be continued:\n"
        + "\n".join(lines)
        + f"\n  {'; or '.join(ways)}",
        refused[0].path,
    )


def concerns_evaluation(found: Iterable[Change]) -> bool:
    """Whether the starting policy would be measured differently now."""
    plain = (re.sub(r"\[\d+\]", "", change.path) for change in found)
    harmless = ("evaluation.before", "evaluation.after", "evaluation.batch_size")
    return any(
        path not in harmless and any(fnmatchcase(path, pattern) for pattern in BEFORE_TRAINING) for path in plain
    )


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 160 else f"{text[:157]}..."
