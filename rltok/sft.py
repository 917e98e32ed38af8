"""Supervised fine-tuning by a recipe, in full precision or aware of the rounding to come: `rltok sft`.

runs/<name>-seed<seed>/
    recipe.yaml, environment.json, metrics.jsonl, summary.json    as of `rltok train`
    evaluation_before.json    held-out loss (and accuracy) of the model before training, in full precision
    evaluation_rounded.json   the same model behind its fake quantisers, not trained: what rounding alone costs
    evaluation_after.json     the final model; all with rows in .parquet beside them where there are rewards
    checkpoint-N/             to continue from, with `resume`
    model/                    the final model, converted where `quantization_aware.convert` says so

Where there are rewards, checkpoints and model hold a recipe.yaml of their own, by which `rltok eval` judges them.
"""

from __future__ import annotations

import importlib.util
import json
import math
import sys
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

import torch
import yaml
from rich.console import Console
from rich.table import Table
from transformers import TrainerCallback, set_seed

from rltok.config import ConfigError, build
from rltok.expect import check_expectations
from rltok.files import explained_writes, write_atomically, write_json
from rltok.launch import refuse_sharded_evaluation, running_strategy
from rltok.models import check_trainable, load_model, load_tokenizer, peft_config
from rltok.pickles import refuse_code
from rltok.progress import ProgressDisplay
from rltok.quant.qat_config import build_quantization_aware
from rltok.recipe import dump_yaml
from rltok.report.environment import environment, versions, write_environment
from rltok.run import (
    DISK_ADVICE,
    HeldOut,
    MetricsFile,
    TrackRecipe,
    _close_trackers,
    _set_tracker_environment,
    differences,
    held_out_rows,
    quiet_libraries,
)
from rltok.run_lock import locked
from rltok.run_start import ELSEWHERE, RunDirectory, on_main, run_directory
from rltok.secrets import refuse_secrets
from rltok.sft_recipe import SFTRecipe, judging_recipe

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase, TrainerControl, TrainerState, TrainingArguments

    from rltok.rewards import RewardSet
    from rltok.trainers.sft_trainer import QATSFTTrainer, SFTConfig

Moment = Literal["before", "rounded", "after"]
MOMENTS: tuple[Moment, ...] = ("before", "rounded", "after")
MAY_CHANGE = ("evaluation", "report", "expect", "rewards", "output_dir", "resume", "name")
"""Sections that a continued run may change; of `training` only the number of steps and how it saves and logs."""
TRAINING_MAY_CHANGE = ("max_steps", "num_train_epochs", "logging_", "save_")


def sft_arguments(recipe: SFTRecipe, output_dir: str | Path) -> SFTConfig:
    """The trainer's configuration of a recipe.

    Raises:
        ConfigError: settings that TRL refuses, or a tracker that is not installed.
    """
    from rltok.trainers.sft_trainer import SFTConfig

    for tracker in recipe.report.to:
        if importlib.util.find_spec(tracker) is None:
            raise ConfigError(f"report.to: {tracker} is not installed; pip install 'rltok[{tracker}]'", "report.to")
    settings = {
        "use_cpu": not torch.accelerator.is_available(),
        "dataloader_pin_memory": torch.cuda.is_available(),
        "eval_packing": False,
    } | recipe.training
    try:
        return SFTConfig(
            **settings,
            seed=recipe.seed,
            output_dir=str(output_dir),
            run_name=f"{recipe.name}-seed{recipe.seed}",
            report_to=list(recipe.report.to) or "none",
            project=recipe.report.project,
            disable_tqdm=True,
        )
    except ConfigError:
        raise
    except (ValueError, TypeError) as error:
        raise ConfigError(f"training: {error}", "training") from error


def sft(recipe: SFTRecipe, console: Console | None = None) -> int:
    """Run a recipe to its end; 0 if its expectations hold, 1 if one does not.

    Raises:
        ConfigError: settings that cannot work together, or a directory that another run is using; raised before the
            first update, on all processes.
        StorageError: the disk refused a file; what was saved before can be continued.
    """
    from rltok.rewards import build_rewards
    from rltok.trainers.sft_trainer import check_quantization

    quiet_libraries()
    run = run_directory(recipe)
    refuse_secrets(recipe.resolved())
    check_trainable(recipe.model)
    rewards = build_rewards(recipe.rewards, save_dir=run.path) if recipe.rewards else None
    args = sft_arguments(recipe, run.path)
    adapter = recipe.model.lora is not None or recipe.model.adapter == "continue"
    check_quantization(build_quantization_aware(recipe.quantization_aware), args, adapter)
    shown = (console or Console()) if args.process_index == 0 else Console(quiet=True)
    with ExitStack() as held, explained_writes(run.path, DISK_ADVICE):
        checkpoint = on_main(args.distributed_state, lambda: _open(recipe, run, held))
        if checkpoint == COMPLETE:
            _say(shown, f"{run.path} is complete already; see {run.summary}; for another run: {ELSEWHERE}")
            return 0
        return _run(recipe, run, args, rewards, checkpoint, shown)


# Where a run begins

COMPLETE = "complete"


def _open(recipe: SFTRecipe, run: RunDirectory, held: ExitStack) -> str | None:
    """Hold the run's directory; the checkpoint to continue from, None to begin, or `COMPLETE`."""
    from rltok.trainers.checkpoint import damage, latest_checkpoint

    def busy(holder: str) -> str:
        return f"output_dir: another run is at work in {run.path} ({holder}); wait for it, end it, or {ELSEWHERE}"

    held.enter_context(locked(run.path, busy))
    if recipe.resume == "never":
        if run.is_used():
            raise ConfigError(
                f"output_dir: {run.path} already holds a run; continue it with resume=auto, or {ELSEWHERE}",
                "output_dir",
            )
        return None
    if recipe.resume == "auto":
        if run.summary.is_file():
            return COMPLETE
        found = latest_checkpoint(run.path)
    else:
        given = Path(recipe.resume).expanduser()
        found = given if (given / "trainer_state.json").is_file() else latest_checkpoint(given)
        if found is None or damage(found) is not None:
            problem = "there is no whole checkpoint in it" if found is None else damage(found)
            raise ConfigError(f"resume: {str(given)!r}: {problem}; allowed: never, auto, a checkpoint, a run", "resume")
    if found is not None:
        refuse_code(found)
        _refuse_changes(found.parent, recipe)
    return None if found is None else str(found)


def _refuse_changes(folder: Path, recipe: SFTRecipe) -> None:
    """Refuse to continue with settings that would make it another run."""
    file = folder / "recipe.yaml"
    try:
        old = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError) as error:
        raise ConfigError(f"resume: {file} cannot be read ({error}), so nothing says how the run began") from error
    new = yaml.safe_load(dump_yaml(recipe.resolved()))
    other = [path for path in differences(old, new) if not _may_change(path)]
    if other:
        raise ConfigError(
            f"{other[0]}: the run in {folder} was started with other settings ({', '.join(other)}); set them as they "
            f"were, or {ELSEWHERE}",
            other[0],
        )


def _may_change(path: str) -> bool:
    section, _, key = path.partition(".")
    return section in MAY_CHANGE or (section == "training" and key.startswith(TRAINING_MAY_CHANGE))


# The run


def _run(
    recipe: SFTRecipe,
    run: RunDirectory,
    args: SFTConfig,
    rewards: RewardSet | None,
    checkpoint: str | None,
    console: Console,
) -> int:
    from rltok.data.sft_rows import SFTDataConfig, load_sft_data
    from rltok.trainers.sft_trainer import QATSFTTrainer

    _set_tracker_environment(recipe, run)
    set_seed(recipe.seed)
    config = build(SFTDataConfig, recipe.data, "data")
    splits = load_sft_data(config, recipe.seed)
    tokenizer = load_tokenizer(recipe.model)
    if rewards is not None:
        _check_scored(recipe, splits.heldout.column_names, tokenizer)
    metrics = MetricsFile(run)
    trainer = QATSFTTrainer(
        model=load_model(recipe.model),
        args=args,
        train_dataset=splits.train,
        eval_dataset=splits.heldout.select_columns(splits.train.column_names) if len(splits.heldout) else None,
        processing_class=tokenizer,
        peft_config=peft_config(recipe.model.lora),
        quantization_aware=recipe.quantization_aware,
        callbacks=[metrics, TrackRecipe(recipe), JudgedCheckpoints(recipe)],
    )
    settings = recipe.evaluation
    refuse_sharded_evaluation(running_strategy(trainer.accelerator), settings.before, settings.after)
    display = SFTDisplay(console, recipe.report.progress)
    display.install(trainer)
    main = trainer.is_world_process_zero()
    if main:
        _begin_files(recipe, run, args, checkpoint)
    _say(
        console,
        f"{recipe.name}, seed {recipe.seed}: {len(splits.train)} training and {len(splits.heldout)} held-out rows, "
        f"{args.world_size} process(es) on {args.device.type}, in {run.path}",
    )
    judge = Judge(recipe, run, console, tokenizer, splits.heldout, rewards, trainer)
    if checkpoint is None and recipe.evaluation.before:
        judge.evaluate("before")
    trainer.prepare_quantization()
    if checkpoint is None and recipe.evaluation.before and trainer.quantizes:
        judge.evaluate("rounded")
    trainer.accelerator.wait_for_everyone()
    if checkpoint is not None:
        _say(console, f"continuing from {checkpoint}")
    try:
        trainer.train(resume_from_checkpoint=checkpoint)
    finally:
        display.stop()
    trainer.finish_quantization()
    if recipe.evaluation.after:
        judge.evaluate("after")
    trainer.save_final(run.path / "model")
    if main:
        _write_judging_recipe(recipe, run.path / "model")
    status = 0
    if main:
        status = _finish(recipe, run, console, trainer.state.global_step, metrics.seconds)
        _close_trackers(recipe, run)
    trainer.accelerator.wait_for_everyone()
    return status


def _check_scored(recipe: SFTRecipe, columns: list[str], tokenizer: PreTrainedTokenizerBase) -> None:
    """Refuse rewards where there is nothing to complete."""
    from rltok.run import check_evaluation

    if "prompt" not in columns or "completion" not in columns:
        raise ConfigError(
            "rewards: score completions of held-out prompts, but the rows are whole texts; remove rewards, or name "
            "data.columns.prompt and data.columns.completion",
            "rewards",
        )
    check_evaluation(recipe, tokenizer)


class JudgedCheckpoints(TrainerCallback):
    """Says in every checkpoint how `rltok eval` judges it."""

    def __init__(self, recipe: SFTRecipe) -> None:
        self.recipe = recipe

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            _write_judging_recipe(self.recipe, Path(args.output_dir or "") / f"checkpoint-{state.global_step}")


def _write_judging_recipe(recipe: SFTRecipe, folder: Path) -> None:
    """Beside the weights, where `rltok eval` looks first; nothing without rewards."""
    judged = judging_recipe(recipe)
    if judged is not None:
        write_atomically(folder / "recipe.yaml", judged.to_yaml())


class Judge:
    """Held-out loss of the model at hand, and its accuracy where the recipe has rewards; on all ranks."""

    def __init__(
        self,
        recipe: SFTRecipe,
        run: RunDirectory,
        console: Console,
        tokenizer: PreTrainedTokenizerBase,
        rows: Any,
        rewards: RewardSet | None,
        trainer: QATSFTTrainer,
    ) -> None:
        self.recipe, self.run, self.console, self.trainer = recipe, run, console, trainer
        self.rows = held_out_rows(recipe, rows)
        self.completed: HeldOut | None = None
        if rewards is not None and len(rows):
            from rltok.run import check_completions

            check_completions(recipe, trainer.accelerator.unwrap_model(trainer.model))
            prompts = rows.remove_columns("completion")  # a reward function must not see the solution
            self.completed = HeldOut(recipe, run, console, tokenizer, prompts, rewards, trainer)

    def evaluate(self, moment: Moment) -> None:
        """Measure and write `evaluation_<moment>.json`."""
        means: dict[str, float] = {}
        if self.rows:
            means |= self.trainer.heldout_loss(self.rows, self.recipe.evaluation.batch_size)
        if self.completed is not None:
            with self.trainer.sampling():
                self.completed.evaluate(cast(Any, moment))
        if self.trainer.is_world_process_zero():
            facts: dict[str, Any] = {"completions": 0, "means": {}, "settings": {}}
            if self.completed is not None:
                facts = _read_evaluation(self.run, moment)
            means |= facts["means"]
            write_json(_evaluation(self.run, moment), facts | {"means": means})
            _say(self.console, f"{moment}: {_shown(means)}")


def _evaluation(run: RunDirectory, moment: Moment) -> Path:
    return run.evaluation(cast(Any, moment))


def _read_evaluation(run: RunDirectory, moment: Moment) -> dict[str, Any]:
    path = _evaluation(run, moment)
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {"means": {}, "completions": 0}


SHOWN = ("loss", "perplexity", "token_accuracy", "exact", "strict", "lenient")


def _shown(means: Mapping[str, float]) -> str:
    return "  ".join(f"{name} {means[name]:.4f}" for name in SHOWN if name in means) or "nothing held out"


class SFTDisplay(ProgressDisplay):
    """Shows step, loss, token accuracy, EdgeQAT's losses and time left."""

    METRICS = (
        ("loss", "loss"),
        ("accuracy", "mean_token_accuracy"),
        ("entropy", "qat/entropy_loss"),
        ("distribution", "qat/distribution_loss"),
        ("teacher", "qat/distillation_loss"),
    )
    """label -> the logged metric"""

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        super().on_train_begin(args, state, control, **kwargs)
        self._line.plain = "first update"

    def _shown(self) -> str:
        found = [
            (label, self._last[key]) for label, key in self.METRICS if isinstance(self._last.get(key), int | float)
        ]
        return "  ".join(f"{label} {value:.4f}" for label, value in found if math.isfinite(value))


def _say(console: Console, line: str) -> None:
    console.print(line, highlight=False, markup=False, soft_wrap=True)


# Files


def _begin_files(recipe: SFTRecipe, run: RunDirectory, args: SFTConfig, checkpoint: str | None) -> None:
    run.summary.unlink(missing_ok=True)
    write_atomically(run.recipe, dump_yaml(recipe.resolved() | {"resume": "never"}))
    write_environment(run.path, environment(sys.argv, recipe.seed, args.world_size), continued=checkpoint is not None)


def _finish(recipe: SFTRecipe, run: RunDirectory, console: Console, steps: int, seconds: float) -> int:
    measured = {moment: _read_evaluation(run, moment)["means"] for moment in MOMENTS}
    summary: dict[str, Any] = {"recipe": recipe.name, "seed": recipe.seed}
    for name in ("loss", "perplexity", "strict", "lenient"):
        summary |= {f"{name}_{moment}": means.get(name) for moment, means in measured.items()}
    summary |= {
        "train_seconds": round(seconds, 2),
        "steps": steps,
        "checkpoint": str(run.path / "model"),
        "converted": bool(recipe.quantization_aware and recipe.quantization_aware["convert"]),
        **{str(moment): means for moment, means in measured.items()},
        "versions": versions(),
    }
    outcomes = check_expectations(recipe.expect, summary, run.read_metrics())
    summary["expect"] = {outcome.expression: outcome.held for outcome in outcomes}
    write_json(run.summary, summary)
    _print_summary(measured, run, console)
    for outcome in outcomes:
        verdict = {True: "holds", False: "FAILS", None: "not checked"}[outcome.held]
        reason = f" ({outcome.reason})" if outcome.reason else ""
        _say(console, f"expected: {outcome.expression} -> {verdict}{reason}")
    return 1 if any(outcome.held is False for outcome in outcomes) else 0


def _print_summary(measured: Mapping[Moment, Mapping[str, float]], run: RunDirectory, console: Console) -> None:
    table = Table(title=f"held-out rows of {run.path.name}")
    moments = [moment for moment in MOMENTS if measured[moment]]
    for column in ("", *moments):
        table.add_column(column, justify="left" if not column else "right")
    names = [name for name in SHOWN if any(name in measured[moment] for moment in moments)]
    for name in names:
        table.add_row(name, *(f"{measured[m][name]:.4f}" if name in measured[m] else "-" for m in moments))
    if names:
        console.print(table)
    for label, value in {"model": run.path / "model", "metrics": run.metrics, "summary": run.summary}.items():
        _say(console, f"{label:<15} {value}")
