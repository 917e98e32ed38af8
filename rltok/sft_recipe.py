"""Recipes of supervised fine-tuning: YAML files as those of `rltok train`, with sections of their own.

    section             what it is
    model               the model, as in every recipe
    data                texts, conversations, or prompts with completions (`rltok.data.sft_rows`)
    training            fields of TRL's SFTConfig
    quantization_aware  fake quantisers and EdgeQAT's losses; null trains in full precision
    rewards             if there are any, held-out prompts are completed and scored as by `rltok eval`
    evaluation          held-out loss, and how the completions are made

Layers, overrides, references and messages are those of `rltok.recipe`. Shipped ones lie in `configs/sft`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rltok.config import ConfigError, build
from rltok.models import ModelConfig
from rltok.quant.qat_config import filled_quantization_aware
from rltok.recipe import (
    CONFIG_DIR,
    ELSEWHERE,
    Recipe,
    ReportConfig,
    build_section,
    checked_evaluation,
    checked_plain,
    checked_rewards,
    checked_training,
    find_recipe,
    located,
    merged,
    without_nulls,
)

SFT_DIR = CONFIG_DIR / "sft"
"""Where the shipped recipes of supervised fine-tuning lie."""
SFT_SECTIONS = (
    "defaults",
    "name",
    "seed",
    "model",
    "data",
    "rewards",
    "training",
    "quantization_aware",
    "evaluation",
    "report",
    "expect",
    "output_dir",
    "resume",
)
SFT_ELSEWHERE = {
    key: ELSEWHERE[key]
    for key in (
        "seed",
        "output_dir",
        "run_name",
        "report_to",
        "disable_tqdm",
        "project",
        "resume_from_checkpoint",
        "model_init_kwargs",
        "trust_remote_code",
        "hub_token",
    )
} | {
    "dataset_text_field": "`data.columns.text`",
    "dataset_kwargs": "nothing; rows are prepared from `data`",
    "eos_token": "it in the tokenizer of `model.path`",
    "pad_token": "it in the tokenizer of `model.path`",
}
"""Fields of TRL's SFTConfig that a recipe sets in another place -> that place."""


@dataclass(frozen=True)
class SFTRecipe(Recipe):
    """A checked recipe without rollouts: its doors are empty, and `training` belongs to TRL's SFTConfig."""

    quantization_aware: dict[str, Any] | None = None

    def resolved(self) -> dict[str, Any]:
        """Every setting as plain values, defaults filled in; written to YAML it loads back to an equal recipe."""
        values = super().resolved()
        return {key: values[key] for key in SFT_SECTIONS if key in values}


def load_sft_recipe(recipe: str | Path, overrides: Sequence[str] = ()) -> SFTRecipe:
    """Read, merge and check a recipe of supervised fine-tuning.

    Args:
        recipe: a YAML file, or the name of a shipped one such as `sft_edge_qat`.
        overrides: `key.path=value` with a YAML value.

    Raises:
        ConfigError: no such recipe, an unknown key or type, or a value of the wrong type. The message starts with file
            and line where the setting stands.
    """
    values, marks = merged(find_recipe(recipe, shipped=SFT_DIR), overrides)
    try:
        return _recipe(values)
    except ConfigError as error:
        raise located(error, marks) from error


def _recipe(values: dict[str, Any]) -> SFTRecipe:
    mappings = ("model", "data", "training", "evaluation", "report")
    values, plain = checked_plain(values, SFTRecipe, SFT_SECTIONS, mappings)
    quantization = values.get("quantization_aware")
    recipe = SFTRecipe(
        **plain,
        model=build_section(ModelConfig, values, "model"),
        data=_checked_data(values),
        rewards=checked_rewards(values) if values.get("rewards") else {},
        training=_checked_training(values.get("training", {})),
        quantization_aware=None if quantization is None else filled_quantization_aware(quantization),
        evaluation=checked_evaluation(values.get("evaluation") or {}),
        report=build_section(ReportConfig, values, "report"),
    )
    _check_together(recipe)
    return recipe


def _checked_data(values: Mapping[str, Any]) -> dict[str, Any]:
    from rltok.data.sft_rows import SFTDataConfig

    if "data" not in values:
        raise ConfigError("data: missing; a recipe says where its rows come from (`data.source`)", "data")
    return dataclasses.asdict(build(SFTDataConfig, without_nulls(SFTDataConfig, values["data"]), "data"))


def _checked_training(values: Mapping[str, Any]) -> dict[str, Any]:
    from rltok.trainers.sft_trainer import SFTConfig  # takes seconds

    return checked_training(values, SFTConfig, SFT_ELSEWHERE)


def _check_together(recipe: SFTRecipe) -> None:
    """Refuse settings that exclude each other, before anything is loaded."""
    if recipe.model.attention_pattern is not None:
        where = "model.attention_pattern"
        raise ConfigError(f"{where}: belongs to the learner of `rltok train`; set it to null", where)
    for name in ("sinks", "samples", "completions"):
        if getattr(recipe.report, name) != getattr(ReportConfig(), name):
            where = f"report.{name}"
            raise ConfigError(f"{where}: belongs to `rltok train`; there are no rollouts here, remove it", where)
    if recipe.quantization_aware is not None and recipe.evaluation.quant is not None:
        raise ConfigError(
            "evaluation.quant: quantises weights that quantization_aware has rounded already; set one of them to null",
            "evaluation.quant",
        )


def judging_recipe(recipe: SFTRecipe) -> Recipe | None:
    """How `rltok eval` judges the model of a run: prompts, rewards, evaluation of its recipe; None without rewards."""
    from rltok.data import DataConfig

    if not recipe.rewards:
        return None
    data = {key: value for key, value in recipe.data.items() if key != "habits"}
    if data["source"] != "reasoning_gym":
        columns = {key: value for key, value in data["columns"].items() if key != "completion"}
        data["columns"] = columns if "answer" in columns else columns | {"answer": ""}
    return Recipe(
        name=recipe.name,
        seed=recipe.seed,
        model=recipe.model,
        data=dataclasses.asdict(build(DataConfig, data, "data")),
        rewards=recipe.rewards,
        evaluation=recipe.evaluation,
    )
