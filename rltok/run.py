"""One training run: its directory, the held-out evaluations around the training, the summary.

runs/<name>-seed<seed>/
    .lock                     held by the run at work here
    recipe.yaml               the whole recipe, defaults filled in
    metrics.jsonl             one JSON object per logged step
    completions/*.parquet     what was sampled, with rewards and credit
    checkpoint-N/             model, optimizer and every state that an exact continuation needs
    model/                    the converted model, with `quantization_aware`; the last one where none was saved
    evaluation_before.json    held-out means; the rows lie in evaluation_before.parquet; likewise `after`
    summary.json              written last: a run with a summary is complete
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import sys
import time
import warnings
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import datasets
import torch
from accelerate.utils import gather_object
from rich.console import Console
from rich.table import Table
from transformers import TrainerCallback, set_seed
from transformers.utils.logging import disable_progress_bar

from rltok.complete import (
    CompletionSettings,
    Engine,
    check_engine,
    check_methods,
    check_policy,
    decoding_context,
    quantized_policy,
    quantizer_name,
)
from rltok.config import ConfigError
from rltok.evaluate import Evaluation, evaluate, join_evaluations, tokenize_prompt
from rltok.expect import Outcome, check_expectations
from rltok.faults import explained, limit_collectives
from rltok.files import explained_writes, json_line, write_atomically, write_json
from rltok.kv import build_policy
from rltok.launch import SHARDED_WEIGHTS, check_started, check_strategy, refuse_sharded_evaluation, running_strategy
from rltok.models import check_trainable, is_adapter, load_model, load_model_config, load_tokenizer, peft_config
from rltok.pickles import refuse_code
from rltok.progress import EvaluationBar, ProgressDisplay
from rltok.quant.config import build_spec
from rltok.recipe import Recipe, dump_yaml
from rltok.report.environment import environment, versions, write_environment
from rltok.rollout import build_decoding, build_rollout
from rltok.run_start import Moment, RunDirectory, Start, opened, record_origin, run_directory, written
from rltok.sampler_stats import CALIBRATION_ROWS, SavedStats, calibrate_entropy, checkpoint_stats, stats_settings
from rltok.sampling import DecodingModule, make_processors
from rltok.secrets import redacted, refuse_secrets

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerControl, TrainerState, TrainingArguments

    from rltok.entropy import EntropyStats, Gather
    from rltok.rewards import RewardSet
    from rltok.sink_config import SinkConfig
    from rltok.steering import SteeringConfig
    from rltok.trainers import CreditConfig, CreditTrainer

OTHER_ENGINE = "set rollout.engine=transformers"
"""What to do where the engine `fast` does not serve a model."""
DISK_ADVICE = (
    "The run stops; its last whole checkpoint is untouched. Make room (training.save_total_limit=N keeps fewer "
    "checkpoints, report.samples.max_mb=N fewer samples), then continue with resume=auto; or give another disk with "
    "output_dir=DIR"
)
"""What to do where the disk refuses a file."""
KEPT_LOGS = 100
"""Entries of transformers' own log that stay in memory and in checkpoints; `metrics.jsonl` has all of them."""
HEAT_MAPS = 4
"""Completions of a rollout that W&B gets as HTML."""


def fresh_directory(recipe_name: str, seed: int) -> str:
    """`runs/<name>-seed<seed>`, or with the first free number behind it if that exists."""
    base = Path("runs") / f"{recipe_name}-seed{seed}"
    path, number = base, 2
    while path.exists():
        path, number = base.with_name(f"{base.name}-{number}"), number + 1
    return str(path)


def training_arguments(recipe: Recipe, output_dir: str | Path, reward_weights: Sequence[float]) -> CreditConfig:
    """The trainer's configuration of a recipe.

    Raises:
        ConfigError: settings that TRL refuses, or a tracker that is not installed.
    """
    from rltok.trainers import CreditConfig

    for tracker in recipe.report.to:
        if importlib.util.find_spec(tracker) is None:
            raise ConfigError(f"report.to: {tracker} is not installed; pip install 'rltok[{tracker}]'", "report.to")
    settings = {
        "use_cpu": not torch.accelerator.is_available(),
        "dataloader_pin_memory": torch.cuda.is_available(),
        "model_init_kwargs": _reference_options(recipe),
    } | recipe.training
    try:
        return CreditConfig(
            **settings,
            seed=recipe.seed,
            output_dir=str(output_dir),
            run_name=f"{recipe.name}-seed{recipe.seed}",
            reward_weights=list(reward_weights),
            credit=recipe.credit,
            selection=recipe.selection,
            objective=recipe.objective,
            rollout=recipe.rollout,
            report_to=list(recipe.report.to) or "none",
            project=recipe.report.project,
            log_completions=recipe.report.completions,
            samples=asdict(recipe.report.samples),
            batching=asdict(recipe.batching),
            faults=asdict(recipe.faults),
            num_completions_to_print=0,
            disable_tqdm=True,
        )
    except ConfigError:
        raise
    except (ValueError, TypeError) as error:
        raise ConfigError(f"training: {error}", "training") from error


def _reference_options(recipe: Recipe) -> dict[str, Any] | None:
    """What TRL must know to load the KL reference as the policy was loaded; it finds the path itself.

    Raises:
        ConfigError: the policy starts from a merged adapter, which TRL cannot load a second time.
    """
    model = recipe.model
    if not recipe.training.get("beta") or model.lora is not None or model.adapter == "continue":
        return None  # the reference is the policy without its new adapter, or a copy of the adapter at its start
    if is_adapter(model.path):
        raise ConfigError(
            f"training.beta: {recipe.training['beta']} needs a reference policy, but model.path {model.path!r} is an "
            "adapter, whose merged weights cannot be loaded again; save the merged model first, or set training.beta=0",
            "training.beta",
        )
    options = {
        "revision": model.revision,
        "use_safetensors": True,
        "trust_remote_code": model.trust_remote_code,
        **model.config_overrides,
    }
    return {key: value for key, value in options.items() if value is not None}


def train(recipe: Recipe, console: Console | None = None) -> int:
    """Run a recipe to its end; 0 if its expectations hold, 1 if one does not.

    Raises:
        ConfigError: settings that cannot work together, or a directory that another run is using; raised before the
            first rollout, on all processes.
        StorageError: the disk refused a file; what was saved before can be continued.
    """
    from rltok.rewards import build_rewards

    quiet_libraries()
    run = run_directory(recipe)
    refuse_secrets(recipe.resolved())
    check_trainable(recipe.model)
    rewards = build_rewards(recipe.rewards, save_dir=run.path, timeout=recipe.faults.reward_timeout)
    args = training_arguments(recipe, run.path, rewards.weights)
    check_started(recipe.launch, args.distributed_state)
    limit_collectives(args.ddp_timeout)
    console = _console(console, args.process_index == 0)
    _refuse_sharded_evaluation(recipe)

    def say(line: str) -> None:
        console.print(line, highlight=False, markup=False, soft_wrap=True)

    with opened(recipe, run, args, say) as start:
        if start.complete:
            say(
                f"{run.path} is complete already; see {run.summary}. To train on: resume={run.path}; "
                "for another run: output_dir=DIR or seed=N"
            )
            return 0
        with explained_writes(run.path, DISK_ADVICE), explained(args.process_index, args.ddp_timeout):
            return _train(recipe, run, start, args, rewards, console)


def _train(
    recipe: Recipe, run: RunDirectory, start: Start, args: CreditConfig, rewards: RewardSet, console: Console
) -> int:
    from rltok.config import build
    from rltok.data import DataConfig, check_prompts, load_data
    from rltok.trainers import CreditTrainer

    if start.checkpoint is not None:
        refuse_code(start.checkpoint)
    _set_tracker_environment(recipe, run)
    set_seed(recipe.seed)
    data, evaluates = build(DataConfig, recipe.data, "data"), recipe.evaluation.before or recipe.evaluation.after
    tokenizer = load_tokenizer(recipe.model)
    check_evaluation(recipe, tokenizer)
    splits = check_prompts(
        load_data(data, recipe.seed),
        data,
        tokenizer,
        load_model_config(recipe.model),
        completion=args.max_completion_length,
        evaluation=evaluation_options(recipe)["max_new_tokens"] if evaluates else None,
        chat_template_kwargs=args.chat_template_kwargs,
    )
    model = load_model(recipe.model)
    if evaluates:
        _check_sampler(recipe, model)
    display = ProgressDisplay(console, recipe.report.progress)
    metrics = MetricsFile(run)
    trainer = CreditTrainer(
        model=model,
        reward_funcs=list(rewards.functions),
        args=args,
        train_dataset=splits.train,
        processing_class=tokenizer,
        peft_config=peft_config(recipe.model.lora),
        attention_pattern=recipe.model.attention_pattern,
        quantization_aware=recipe.quantization_aware,
        callbacks=[metrics, TrackRecipe(recipe)],
    )
    check_strategy(recipe.launch, trainer.accelerator)
    before = recipe.evaluation.before and start.checkpoint is None and not start.evaluated
    refuse_sharded_evaluation(running_strategy(trainer.accelerator), before, recipe.evaluation.after)
    if before or recipe.evaluation.after:
        check_quantizer(recipe, trainer.accelerator.unwrap_model(trainer.model))
    display.install(trainer)
    install_sinks(recipe.report.sinks, trainer)
    if "wandb" in recipe.report.to and trainer._recorder is not None:
        trainer._recorder.listeners.append(log_heat_maps)
    main = trainer.is_world_process_zero()
    if main:
        _begin_files(recipe, run, start, args.world_size)
    console.print(
        f"{recipe.name}, seed {recipe.seed}: {len(splits.train)} training and {len(splits.heldout)} held-out rows, "
        f"{args.world_size} process(es) on {args.device.type}, in {run.path}",
        highlight=False,
        soft_wrap=True,
    )
    if start.checkpoint is not None:
        console.print(f"continuing from {start.checkpoint}", soft_wrap=True)
    held_out = HeldOut(recipe, run, console, tokenizer, splits.heldout, rewards, trainer)
    if recipe.evaluation.before and not start.evaluated:
        if start.checkpoint is None:
            with trainer.as_loaded():
                held_out.evaluate("before")
        else:
            console.print("no evaluation_before.json: the starting policy was not evaluated and is not any more here")
    trainer.accelerator.wait_for_everyone()
    try:
        trainer.train(resume_from_checkpoint=str(start.checkpoint) if start.checkpoint else None)
    finally:
        display.stop()
    converted = trainer.finish_quantization()
    if recipe.evaluation.after:
        with trainer.sampling():
            held_out.evaluate("after")
    checkpoint = _final_checkpoint(trainer, run, converted)
    status = 0
    if main:
        status = _finish(recipe, run, console, trainer.state.global_step, metrics.seconds, checkpoint)
        _close_trackers(recipe, run)
    trainer.accelerator.wait_for_everyone()
    return status


def quiet_libraries() -> None:
    """No bars and no notices of future changes from libraries in between the run's own output."""
    disable_progress_bar()
    datasets.disable_progress_bars()
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"(transformers|torch|trl)\.")


def _console(console: Console | None, is_main: bool) -> Console:
    if not is_main:
        return Console(quiet=True)
    return console or Console()


def install_sinks(config: SinkConfig | None, trainer: CreditTrainer) -> None:
    """Let a trainer measure attention sinks as it trains; nothing to do for None.

    Raises:
        ConfigError: a model whose attention cannot be read, or weights that no process holds as a whole.
    """
    if config is None:
        return
    from rltok.attention.sink_monitor import SinkDiagnostics

    strategy = running_strategy(trainer.accelerator)
    if strategy in SHARDED_WEIGHTS:
        raise ConfigError(
            f"report.sinks: no process holds the whole weights under {strategy}, so attention sinks cannot be measured "
            "in place; set report.sinks=null and run `rltok sinks CHECKPOINT`",
            "report.sinks",
        )
    try:
        SinkDiagnostics(**asdict(config)).install(trainer)
    except ValueError as error:
        raise ConfigError(
            f"report.sinks: attention sinks of this model cannot be measured; set report.sinks=null: {error}",
            "report.sinks",
        ) from error


def _refuse_sharded_evaluation(recipe: Recipe) -> None:
    """Completions of a rank's own need whole weights on every rank."""
    sharded = os.environ.get("ACCELERATE_USE_FSDP") == "true" or (
        os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true"
        and os.environ.get("ACCELERATE_DEEPSPEED_ZERO_STAGE", "2") == "3"
    )
    if sharded and recipe.evaluation.after:
        raise ConfigError(
            "evaluation.after: the weights are sharded over ranks (FSDP or ZeRO-3), where the trained policy cannot be "
            "evaluated in place; set evaluation.after=false and run `rltok eval CHECKPOINT` afterwards",
            "evaluation.after",
        )


# Held-out evaluation


@dataclass(frozen=True)
class HeldOut:
    """The held-out rows of a run and what it takes to evaluate its policy on them, on all ranks."""

    recipe: Recipe
    run: RunDirectory
    console: Console
    tokenizer: PreTrainedTokenizerBase
    rows: Any
    rewards: RewardSet
    trainer: Any

    def evaluate(self, moment: Moment) -> None:
        """Evaluate the policy and write means and rows; every rank takes its share of the rows."""
        with _own_weights(self.trainer.accelerator.unwrap_model(self.trainer.model)):
            self._evaluate(moment)

    def _evaluate(self, moment: Moment) -> None:
        from rltok.trainers.distributed import RaggedGather

        accelerator = self.trainer.accelerator
        rows = [self.rows[i] for i in range(held_out_rows(self.recipe, self.rows))]
        rank, ranks = accelerator.process_index, accelerator.num_processes
        mine = list(range(rank, len(rows), ranks))
        settings = self.recipe.evaluation
        model = accelerator.unwrap_model(self.trainer.model)
        stats = evaluation_entropy(
            self.recipe,
            model,
            self.tokenizer,
            [rows[i] for i in mine],
            self.console,
            saved=self._rollout_stats(),
            row_ids=mine,
            rank=rank,
            gather=RaggedGather(accelerator),
            in_training=True,
        )
        parts = []
        with EvaluationBar(
            self.console, f"evaluation {moment}", len(mine) * settings.num_samples, self.recipe.report.progress
        ) as bar:
            if mine:
                found = evaluate(
                    model,
                    self.tokenizer,
                    [rows[i] for i in mine],
                    self.rewards,
                    **evaluation_options(self.recipe, rank, in_training=True),
                    row_ids=mine,
                    entropy_stats=stats,
                    on_rows=bar,
                )
                parts = [found]
        parts = gather_object(parts) if ranks > 1 else parts
        if accelerator.is_main_process:
            write_evaluation(join_evaluations(parts), self.run, moment, evaluation_parts(self.recipe))

    def _rollout_stats(self) -> SavedStats | None:
        stats = self.trainer._sampler_stats
        return None if stats is None else SavedStats(stats, "the last rollout", stats_settings(self.recipe.resolved()))


def held_out_rows(recipe: Recipe, rows: Sequence[Any]) -> int:
    """Number of held-out rows that a recipe evaluates."""
    return len(rows) if recipe.evaluation.rows is None else min(recipe.evaluation.rows, len(rows))


def evaluation_engine(recipe: Recipe) -> Engine:
    """Who makes the completions of a recipe's evaluations: `rollout.engine`, also where vLLM makes the rollouts."""
    return build_rollout(recipe.rollout).engine


def _own_weights(model: Any) -> AbstractContextManager[Any]:
    """Full precision, where `rollout.quant.learner: same` lets the learner compute with quantised weights."""
    from rltok.quant.same_precision import attached_precision

    attached = attached_precision(model)
    return nullcontext() if attached is None else attached.suspended()


def evaluation_options(recipe: Recipe, rank: int = 0, in_training: bool = False) -> dict[str, Any]:
    """Keyword arguments of `evaluate` for a recipe; `decoding`, `steering`, `kv` and `quant` of `rollout` are not read.

    Ranks differ in the seed only where completions come from one random state (`transformers`).

    Args:
        in_training: the policy is a trainer's, whose mixed precision a quantised copy of it does not take over.
    """
    settings, training, engine = recipe.evaluation, recipe.training, evaluation_engine(recipe)
    half = torch.bfloat16 if training.get("bf16") else torch.float16 if training.get("fp16") else None
    quant = build_spec(settings.quant, "evaluation.quant")
    copied = in_training and quantizer_name(quant) is not None
    return {
        "max_new_tokens": settings.max_new_tokens or training.get("max_completion_length") or 512,
        "batch_size": settings.batch_size,
        "temperature": settings.temperature,
        "top_p": settings.top_p,
        "num_samples": settings.num_samples,
        "seed": settings.seed + (rank if engine == "transformers" else 0),
        "engine": engine,
        "autocast": half if recipe.model.dtype == "float32" or copied else None,
        "chat_template_kwargs": training.get("chat_template_kwargs"),
        "decoding": build_decoding(settings.decoding, "evaluation.decoding"),
        "steering": build_steering(settings.steering, "evaluation.steering"),
        "kv": None if settings.kv is None else build_policy(settings.kv, "evaluation.kv"),
        "quant": quant,
    }


def evaluation_parts(recipe: Recipe) -> dict[str, Any]:
    """What acts on a recipe's held-out completions beside plain sampling, as plain values for files."""
    settings = recipe.evaluation
    return {
        "decoding": list(settings.decoding),
        "steering": settings.steering,
        "kv": settings.kv,
        "quant": settings.quant,
    }


def build_steering(section: Mapping[str, Any] | None, path: str) -> SteeringConfig | None:
    """Steering vectors of a recipe section, None for none.

    Raises:
        ConfigError: unknown key or wrong value.
    """
    if section is None:
        return None
    from rltok.config import build
    from rltok.steering import SteeringConfig

    return build(SteeringConfig, section, path)


def check_evaluation(recipe: Recipe, tokenizer: PreTrainedTokenizerBase) -> None:
    """Refuse what an evaluation after hours of training would stumble over.

    Raises:
        ConfigError: words that the tokenizer lacks, a method that the engine cannot run, no file of steering vectors, a
            quantiser on top of quantised weights.
    """
    options = evaluation_options(recipe)
    base = recipe.model.quantization
    if base is not None and quantizer_name(options["quant"]) is not None:
        raise ConfigError(
            f"evaluation.quant: the weights are already held in {base.bits} bits (model.quantization); remove "
            "evaluation.quant to evaluate them, or set model.quantization=null to quantise full weights",
            "evaluation.quant",
        )
    check_decoding_fits(options["decoding"], tokenizer, options["engine"], "evaluation.decoding")
    check_vectors(options["steering"], "evaluation.steering")


def check_completions(recipe: Recipe, model: PreTrainedModel) -> None:
    """Refuse a model that engine, cache policy or quantiser of the recipe's evaluations does not serve.

    Raises:
        ConfigError: names the setting and what stands against it.
    """
    _check_sampler(recipe, model)
    check_quantizer(recipe, model)


def _check_sampler(recipe: Recipe, model: PreTrainedModel) -> None:
    """What of `check_completions` does not depend on what a trainer puts into the model, such as adapters."""
    check_engine(model, evaluation_engine(recipe), OTHER_ENGINE)
    check_policy(model, evaluation_options(recipe)["kv"], "evaluation.kv")


def check_quantizer(recipe: Recipe, model: PreTrainedModel) -> None:
    """Refuse a model that `evaluation.quant` cannot quantise, by a copy that is dropped again.

    Raises:
        ConfigError: names the setting and what stands against it.
    """
    quantized_policy(model, evaluation_options(recipe)["quant"], "evaluation.quant")


def check_decoding_fits(
    decoding: Sequence[DecodingModule], tokenizer: PreTrainedTokenizerBase, engine: Engine, where: str
) -> None:
    """Raise ConfigError where the engine cannot run a decoding method, or the tokenizer lacks its words or marks."""
    try:
        check_methods(decoding, engine)
        make_processors(decoding, decoding_context(decoding, tokenizer, 0.0))
    except ValueError as error:
        raise ConfigError(f"{where}: {error}", where) from error


def check_vectors(steering: SteeringConfig | None, where: str) -> None:
    """Raise ConfigError where there are no steering vectors to read."""
    if steering is None or steering.is_neutral:
        return
    from rltok.steering import load_vectors

    try:
        load_vectors(steering.path)
    except ValueError as error:
        raise ConfigError(f"{where}.path: {error}", f"{where}.path") from error


def evaluation_entropy(
    recipe: Recipe,
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Mapping[str, Any]],
    console: Console,
    *,
    saved: SavedStats | None,
    row_ids: Sequence[int] | None = None,
    rank: int = 0,
    gather: Gather | None = None,
    in_training: bool = False,
) -> EntropyStats | None:
    """Statistics for the adaptive temperature of `evaluation.decoding`, None where it needs none.

    They are of the first `CALIBRATION_ROWS` completions of the whole data set, of which a rank makes those of its rows.
    """
    options = evaluation_options(recipe, rank, in_training)
    template, samples = options.pop("chat_template_kwargs") or {}, options.pop("num_samples")
    names = ("max_new_tokens", "temperature", "top_p", "seed", "batch_size", "engine")
    settings = CompletionSettings(**{name: options.pop(name) for name in names})
    numbered = zip(range(len(rows)) if row_ids is None else row_ids, rows, strict=True)
    first = [
        ((number, sample), row)
        for number, row in numbered
        for sample in range(samples)
        if number * samples + sample < CALIBRATION_ROWS
    ]
    return calibrate_entropy(
        model,
        tokenizer,
        [tokenize_prompt(tokenizer, row["prompt"], template) for _, row in first],
        options.pop("decoding"),
        settings,
        places=[place for place, _ in first],
        saved=saved,
        gather=gather,
        say=lambda line: console.print(line, highlight=False, soft_wrap=True),
        **options,
    )


def write_evaluation(evaluation: Evaluation, run: RunDirectory, moment: Moment, parts: Mapping[str, Any]) -> None:
    """Rows first, means last: where the means are, the rows are whole; `parts` as `evaluation_parts` has them."""
    import pandas as pd

    pd.DataFrame(evaluation.rows).to_parquet(run.evaluation_rows(moment))
    facts = {"completions": len(evaluation.rows), "means": evaluation.means, "settings": dict(parts)}
    write_json(run.evaluation(moment), facts)


def evaluate_path(recipe: Recipe, console: Console) -> Evaluation:
    """Evaluate `model.path` on the held-out rows of a recipe, on this process's device."""
    from rltok.config import build
    from rltok.data import DataConfig, load_data
    from rltok.rewards import build_rewards

    quiet_libraries()
    rewards = build_rewards(recipe.rewards)
    splits = load_data(build(DataConfig, recipe.data, "data"), recipe.seed)
    tokenizer = load_tokenizer(recipe.model)
    check_evaluation(recipe, tokenizer)
    model = load_model(recipe.model).to("cuda" if torch.cuda.is_available() else "cpu")
    check_completions(recipe, model)
    rows = [splits.heldout[i] for i in range(held_out_rows(recipe, splits.heldout))]
    total = len(rows) * recipe.evaluation.num_samples
    saved = checkpoint_stats(recipe.model.path)
    options = evaluation_options(recipe)
    quantizer = quantizer_name(options["quant"])
    if quantizer is not None:
        console.print(f"evaluated with quantised weights: {quantizer}", highlight=False, soft_wrap=True)
    stats = evaluation_entropy(recipe, model, tokenizer, rows, console, saved=saved)
    with EvaluationBar(console, "evaluation", total, recipe.report.progress) as bar:
        return evaluate(model, tokenizer, rows, rewards, **options, entropy_stats=stats, on_rows=bar)


# Callbacks


class MetricsFile(TrainerCallback):
    """Appends every logged step to `metrics.jsonl`; a continued run first drops the lines it will write again."""

    def __init__(self, run: RunDirectory) -> None:
        self.run = run
        self.seconds = 0.0
        """training time so far, over all continuations"""
        self._resumed = time.monotonic()
        self._before = 0.0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        kept = [line for line in self.run.read_metrics() if line["step"] <= state.global_step]
        self._before = kept[-1]["seconds"] if kept else 0.0
        self._resumed = time.monotonic()
        if state.is_world_process_zero:
            write_atomically(self.run.metrics, "".join(json_line(line) for line in kept))

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        self.seconds = self._before + time.monotonic() - self._resumed
        del state.log_history[:-KEPT_LOGS]
        if not state.is_world_process_zero or not logs or "train_runtime" in logs:
            return
        with self.run.metrics.open("a", encoding="utf-8") as file:
            file.write(json_line({"step": state.global_step, "seconds": round(self.seconds, 3), **logs}))

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.seconds = self._before + time.monotonic() - self._resumed


class TrackRecipe(TrainerCallback):
    """Stores the resolved recipe in the configuration of the W&B run."""

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if "wandb" in self.recipe.report.to and state.is_world_process_zero:
            import wandb

            wandb.config.update({"recipe": redacted(self.recipe.resolved())}, allow_val_change=True)


def log_heat_maps(rows: Sequence[Mapping[str, Any]], step: int) -> None:
    """The first recorded completions of a rollout as W&B HTML, coloured by the credit that the loss used."""
    import wandb

    from rltok.report.html import heatmap

    shown = [row for row in rows if row.get("credit_used") is not None][:HEAT_MAPS]
    if wandb.run is not None and shown:
        pages = {f"tokens/{i}": wandb.Html(heatmap(row, "credit_used"), inject=False) for i, row in enumerate(shown)}
        wandb.log(pages | {"train/global_step": step}, commit=False)


def _set_tracker_environment(recipe: Recipe, run: RunDirectory) -> None:
    """What transformers' tracker callbacks read from the environment."""
    if "wandb" in recipe.report.to:
        run.path.mkdir(parents=True, exist_ok=True)
        os.environ["WANDB_MODE"] = recipe.report.mode
        os.environ["WANDB_PROJECT"] = recipe.report.project
        os.environ["WANDB_DIR"] = str(run.path)
        os.environ.setdefault("WANDB_SILENT", "true")
    if "tensorboard" in recipe.report.to:
        os.environ["TENSORBOARD_LOGGING_DIR"] = str(run.path / "tensorboard")


def _close_trackers(recipe: Recipe, run: RunDirectory) -> None:
    """Add the summary's figures to the W&B run and end it."""
    if "wandb" in recipe.report.to:
        import wandb

        summary = json.loads(run.summary.read_text(encoding="utf-8"))
        wandb.summary.update({key: value for key, value in summary.items() if isinstance(value, int | float)})
        wandb.finish()


# End of a run


def _final_checkpoint(trainer: Any, run: RunDirectory, converted: bool) -> Path:
    """The checkpoint of the last step; where none is saved by `training.save_strategy`, the model alone.

    A converted model lies apart: the checkpoint keeps full-precision weights, to train on from.
    """
    path = run.path / f"checkpoint-{trainer.state.global_step}"
    if converted or not path.is_dir():
        path = run.path / "model"
        trainer.save_model(str(path))
    return path


def _finish(recipe: Recipe, run: RunDirectory, console: Console, steps: int, seconds: float, checkpoint: Path) -> int:
    before, after = _means(run, "before"), _means(run, "after")
    summary: dict[str, Any] = {
        "recipe": recipe.name,
        "seed": recipe.seed,
        "strict_before": before.get("strict"),
        "strict_after": after.get("strict"),
        "lenient_before": before.get("lenient"),
        "lenient_after": after.get("lenient"),
        "train_seconds": round(seconds, 2),
        "steps": steps,
        "checkpoint": str(checkpoint),
        "before": before,
        "after": after,
        "versions": versions(),
    }
    quantizer = quantizer_name(build_spec(recipe.evaluation.quant, "evaluation.quant"))
    if quantizer is not None:
        summary["evaluation_quant"] = quantizer
    outcomes = check_expectations(recipe.expect, summary, run.read_metrics())
    summary["expect"] = {outcome.expression: outcome.held for outcome in outcomes}
    write_json(run.summary, summary)
    _print_summary(summary, run, console, outcomes)
    return 1 if any(outcome.held is False for outcome in outcomes) else 0


def _means(run: RunDirectory, moment: Moment) -> dict[str, float]:
    path = run.evaluation(moment)
    return json.loads(path.read_text(encoding="utf-8"))["means"] if path.is_file() else {}


def _print_summary(
    summary: Mapping[str, Any], run: RunDirectory, console: Console, outcomes: Sequence[Outcome]
) -> None:
    table = Table(title=f"held-out accuracy of {run.path.name}")
    for column in ("", "before", "after", "points"):
        table.add_column(column, justify="left" if not column else "right")
    for name in ("strict", "lenient"):
        before, after = summary[f"{name}_before"], summary[f"{name}_after"]
        gain = None if before is None or after is None else after - before
        table.add_row(name, _percent(before), _percent(after), "-" if gain is None else f"{100 * gain:+.1f}")
    console.print(table)
    checkpoint = summary["checkpoint"]
    quantizer = summary.get("evaluation_quant")
    lines: dict[str, Any] = {} if quantizer is None else {"evaluated with": f"quantised weights: {quantizer}"}
    lines |= {
        "steps": f"{summary['steps']} in {summary['train_seconds']:.0f} s",
        "checkpoint": checkpoint,
        "metrics": run.metrics,
        "completions": run.completions,
        "summary": run.summary,
        "look at them": f"{_program()} show {run.path}",
        "token by token": f"{_program()} report {run.path}",
        "evaluate again": f"{_program()} eval {checkpoint}",
    }
    for label, value in lines.items():
        console.print(f"{label:<15} {value}", highlight=False, soft_wrap=True)
    for outcome in outcomes:
        verdict = {True: "holds", False: "FAILS", None: "not checked"}[outcome.held]
        reason = f" ({outcome.reason})" if outcome.reason else ""
        console.print(f"expected: {outcome.expression} -> {verdict}{reason}", highlight=False, soft_wrap=True)


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f} %"


def _program() -> str:
    """How to call rltok from here: its name if the shell finds it, else where it lies or the module."""
    if shutil.which("rltok"):
        return "rltok"
    script = Path(sys.executable).with_name("rltok")
    if not script.is_file():
        return f"{sys.executable} -m rltok"
    return os.path.relpath(script) if script.is_relative_to(Path.cwd()) else str(script)


# Files


def _begin_files(recipe: Recipe, run: RunDirectory, start: Start, processes: int) -> None:
    """What a run says about itself before it trains; one that is trained on is not complete any more."""
    run.summary.unlink(missing_ok=True)
    run.forget_evaluation("after")
    record_origin(run, start)
    write_atomically(run.recipe, dump_yaml(written(recipe)))
    facts = environment(sys.argv, recipe.seed, processes)
    write_environment(run.path, facts, continued=start.checkpoint is not None)


def differences(old: Any, new: Any, path: str = "") -> list[str]:
    """Key paths whose values differ."""
    if isinstance(old, dict) and isinstance(new, dict):
        keys = dict.fromkeys([*old, *new])
        return [d for k in keys for d in differences(old.get(k), new.get(k), f"{path}.{k}" if path else str(k))]
    return [] if old == new else [path]
