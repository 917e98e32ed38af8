"""The directory of a run: its files, the lock on it, and where in it a run begins.

The main process looks, locks and decides; the others hear of it, so that all begin at the same place or none does.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryFile
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import yaml

from rltok.config import ConfigError
from rltok.files import StorageError, write_json
from rltok.recipe import Recipe, dump_yaml
from rltok.resume_rules import Change, Continuation, changes, concerns_evaluation, refuse
from rltok.run_lock import LOCK, locked

if TYPE_CHECKING:
    from rltok.trainers import CreditConfig

Moment = Literal["before", "after"]
Say = Callable[[str], None]
T = TypeVar("T")

ORIGIN = "origin.json"
"""In a run that began from a checkpoint of another: {"checkpoint": its path}."""
ELSEWHERE = "give another directory with output_dir=DIR or another seed=N"
MODEL_SHAPE = (
    "model_type",
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "tie_word_embeddings",
)
"""Fields of a model's configuration that decide which weights fit."""


@dataclass(frozen=True)
class RunDirectory:
    """The files of one run."""

    path: Path

    @property
    def recipe(self) -> Path:
        """The resolved recipe."""
        return self.path / "recipe.yaml"

    @property
    def metrics(self) -> Path:
        """One JSON object per logged step."""
        return self.path / "metrics.jsonl"

    @property
    def summary(self) -> Path:
        """The figures of a complete run."""
        return self.path / "summary.json"

    @property
    def completions(self) -> Path:
        """Folder of the sampled completions, a parquet file per logged step."""
        return self.path / "completions"

    @property
    def origin(self) -> Path:
        """Which checkpoint of another run this one began from."""
        return self.path / ORIGIN

    def evaluation(self, moment: Moment) -> Path:
        """Means of a held-out evaluation."""
        return self.path / f"evaluation_{moment}.json"

    def evaluation_rows(self, moment: Moment) -> Path:
        """Rows of a held-out evaluation."""
        return self.path / f"evaluation_{moment}.parquet"

    def read_metrics(self) -> list[dict[str, Any]]:
        """The lines of `metrics.jsonl`; a line cut off by a killed process is left out."""
        lines = []
        if self.metrics.is_file():
            for text in self.metrics.read_text(encoding="utf-8").splitlines():
                try:
                    lines.append(json.loads(text))
                except json.JSONDecodeError:
                    continue
        return lines

    def is_used(self) -> bool:
        """True if a run left something here."""
        return self.path.is_dir() and any(entry.name != LOCK for entry in self.path.iterdir())

    def forget_evaluation(self, moment: Moment) -> None:
        """Delete an evaluation: first the means, without which the rows do not count."""
        self.evaluation(moment).unlink(missing_ok=True)
        self.evaluation_rows(moment).unlink(missing_ok=True)


@dataclass(frozen=True)
class Start:
    """Where a run begins: `checkpoint` None is from scratch; `complete`: there is nothing left to do."""

    checkpoint: Path | None = None
    complete: bool = False
    foreign: bool = False
    """the checkpoint lies in another run's directory"""
    evaluated: bool = False
    """the starting policy's evaluation is there already"""


def run_directory(recipe: Recipe) -> RunDirectory:
    """`output_dir`, or `runs/<name>-seed<seed>` below the working directory."""
    return RunDirectory(Path(recipe.output_dir or f"runs/{recipe.name}-seed{recipe.seed}"))


@contextmanager
def opened(recipe: Recipe, run: RunDirectory, args: CreditConfig, say: Say) -> Iterator[Start]:
    """Hold a run's directory for the block; yields where to begin, the same on all processes.

    Args:
        args: of the trainer; its processes all enter the block.
        say: prints a line; called on the main process alone.

    Raises:
        ConfigError: on all processes: another run is at work there, the directory cannot be written, it holds a run and
            `resume` is `never`, there is no such checkpoint, or it cannot be continued with these settings.
    """
    with ExitStack() as held:
        yield on_main(args.distributed_state, lambda: _open(recipe, run, args, say, held))


def on_main(state: Any, action: Callable[[], T]) -> T:
    """What `action` returns on the main process, or the ConfigError that it raises there, on all processes."""
    box: list[Any] = [None]
    if state.is_main_process:
        try:
            box = [action()]
        except ConfigError as error:
            box = [error]
    if state.num_processes > 1:
        from accelerate.utils import broadcast_object_list

        broadcast_object_list(box)
    if isinstance(box[0], ConfigError):
        raise box[0]
    return box[0]


def _open(recipe: Recipe, run: RunDirectory, args: CreditConfig, say: Say, held: ExitStack) -> Start:
    def busy(holder: str) -> str:
        return f"output_dir: another run is at work in {run.path} ({holder}); wait for it, end it, or {ELSEWHERE}"

    given = None if recipe.resume in ("never", "auto") else _given_checkpoint(Path(recipe.resume).expanduser())
    try:
        held.enter_context(locked(run.path, busy))
        with TemporaryFile(dir=run.path) as probe:
            probe.write(bytes(1 << 16))
    except OSError as error:
        raise StorageError(
            f"output_dir: {run.path} cannot be written: {error.strerror or error} ({error.filename or run.path}); "
            "make room or change its permissions, or give another directory with output_dir=DIR",
            "output_dir",
        ) from error
    return find_start(recipe, run, args, say, given)


def find_start(recipe: Recipe, run: RunDirectory, args: CreditConfig, say: Say, given: Path | None = None) -> Start:
    """Where to begin, by `resume` and what the run directory holds.

    Args:
        given: the checkpoint that `resume` names, if it names one.

    Raises:
        ConfigError: the directory holds a run and `resume` is `never`, or its checkpoint cannot be continued with these
            settings; both values are named.
    """
    from rltok.trainers.checkpoint import latest_checkpoint

    if recipe.resume == "never":
        if run.is_used():
            raise ConfigError(
                f"output_dir: {run.path} already holds a run; continue it with resume=auto, or {ELSEWHERE}",
                "output_dir",
            )
        return Start()
    if recipe.resume == "auto":
        if run.summary.is_file():
            return Start(complete=True)
        given = latest_checkpoint(run.path) or _origin(run)
        if given is None:
            return _from_scratch(recipe, run, say)
    assert given is not None
    foreign = given.resolve().parent != run.path.resolve()
    if recipe.resume != "auto":
        _refuse_other_branch(given, run, foreign)
    evaluated = run.evaluation("before").is_file()
    found = _changes(given.parent, recipe, say)
    refuse(found, Continuation(str(given), not foreign, _in_rollout(given, args), evaluated))
    check_fits(given, recipe, args)
    _show(found, f"{given} was written", say)
    return Start(given, foreign=foreign, evaluated=evaluated)


def _from_scratch(recipe: Recipe, run: RunDirectory, say: Say) -> Start:
    if not run.is_used():
        return Start()
    if run.recipe.is_file():
        say(f"{run.path} holds a run without a whole checkpoint: it starts from scratch")
        found = _changes(run.path, recipe, say)
        _show(found, "this run was started", say)
        if concerns_evaluation(found) and run.evaluation("before").is_file():
            say("evaluation_before.json was measured with other settings: the starting policy is evaluated again")
            run.forget_evaluation("before")
    return Start(evaluated=run.evaluation("before").is_file())


def _given_checkpoint(path: Path) -> Path:
    from rltok.trainers.checkpoint import damage, latest_checkpoint

    if not path.is_dir():
        raise ConfigError(f"resume: {str(path)!r} is no directory; allowed: auto, never, a checkpoint, a run", "resume")
    if (path / "trainer_state.json").is_file():
        problem = damage(path)
        if problem is not None:
            raise ConfigError(f"resume: {path} is not usable: {problem}", "resume")
        return path
    found = latest_checkpoint(path)
    if found is None:
        raise ConfigError(f"resume: {path} holds no whole checkpoint", "resume")
    return found


def _origin(run: RunDirectory) -> Path | None:
    """The checkpoint of another run from which this one began, if it did."""
    if not run.origin.is_file():
        return None
    try:
        return _given_checkpoint(Path(json.loads(run.origin.read_text(encoding="utf-8"))["checkpoint"]))
    except (ConfigError, OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"resume: {run.path} has no checkpoint of its own yet, and the one that it began from is gone ({error}); "
            f"delete {run.path} to start anew, or name another checkpoint with resume=CHECKPOINT",
            "resume",
        ) from error


def record_origin(run: RunDirectory, start: Start) -> None:
    """Note the checkpoint of another run that this one begins from, for when it is killed before its first own."""
    if start.foreign and start.checkpoint is not None:
        write_json(run.origin, {"checkpoint": str(start.checkpoint.resolve())})


def _refuse_other_branch(given: Path, run: RunDirectory, foreign: bool) -> None:
    """Refuse to mix two continuations in one directory: a kill would leave no way to tell them apart."""
    from rltok.trainers.checkpoint import checkpoint_steps, damage

    own = checkpoint_steps(run.path)
    if foreign and (own or run.summary.is_file()):
        raise ConfigError(
            f"output_dir: {run.path} already holds a run; continue it with resume=auto, or {ELSEWHERE}", "output_dir"
        )
    newer = [step for step in own if step > _step(given) and damage(run.path / f"checkpoint-{step}") is None]
    if not foreign and newer:
        raise ConfigError(
            f"resume: {run.path} holds checkpoints after {given.name} ({', '.join(map(str, newer))}); continue "
            "the last one with resume=auto, train on from this one elsewhere with output_dir=DIR, or delete them",
            "resume",
        )


# Settings then and now


def _changes(folder: Path, recipe: Recipe, say: Say) -> list[Change]:
    """Settings that differ from the recipe in a run's folder."""
    file = folder / "recipe.yaml"
    try:
        old = yaml.safe_load(file.read_text(encoding="utf-8"))
        if not isinstance(old, dict):
            raise ValueError("it is no mapping")
    except (OSError, ValueError, yaml.YAMLError) as error:
        say(f"the settings before cannot be compared with those of now: {file}: {error}")
        return []
    return changes(old, yaml.safe_load(dump_yaml(written(recipe))))


def written(recipe: Recipe) -> dict[str, Any]:
    """The settings as `recipe.yaml` keeps them."""
    return recipe.resolved() | {"resume": "never"}


def _show(found: list[Change], since: str, say: Say) -> None:
    told = [str(change) for change in found if change.path != "output_dir"]
    if told:
        say("\n    ".join([f"settings that changed since {since} (old -> new):", *told]))


def _step(checkpoint: Path) -> int:
    return int(json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))["global_step"])


def _in_rollout(checkpoint: Path, args: CreditConfig) -> bool:
    """True if updates of the checkpoint's last rollout are still to come."""
    micro_batches = _step(checkpoint) * args.gradient_accumulation_steps
    return micro_batches % ((args.steps_per_generation or 1) * args.num_iterations) != 0


def check_fits(checkpoint: Path, recipe: Recipe, args: CreditConfig) -> None:
    """Refuse a checkpoint that this run could not load or that leaves it nothing to do.

    Raises:
        ConfigError: a file that would run code, weights only, another number of processes, an adapter where there
            should be none or the reverse, weights of another shape, or `training.max_steps` below the checkpoint's
            step.
    """
    from rltok.pickles import refuse_code

    refuse_code(checkpoint)
    processes = len(list(checkpoint.glob("rltok_state_*.pt")))
    if not processes:
        raise ConfigError(
            f"resume: {checkpoint} holds weights only (training.save_only_model), so the run cannot continue exactly; "
            f"start a new one from them with model.path={checkpoint} output_dir=DIR",
            "resume",
        )
    if processes != args.world_size:
        raise ConfigError(
            f"resume: {checkpoint} was written by {processes} process(es), this run has {args.world_size}; start "
            f"{processes} (launch.processes={processes}), or a new run from its weights: model.path={checkpoint}",
            "launch.processes",
        )
    step = _step(checkpoint)
    if 0 < args.max_steps < step:
        raise ConfigError(
            f"training.max_steps: {args.max_steps}, but {checkpoint} is of step {step}; "
            f"set training.max_steps >= {step}",
            "training.max_steps",
        )
    _check_weights(checkpoint, recipe)


def _check_weights(checkpoint: Path, recipe: Recipe) -> None:
    from rltok.models import load_model_config

    file = checkpoint / "adapter_config.json"
    trains_adapter = recipe.model.lora is not None or recipe.model.adapter == "continue"
    if file.is_file() != trains_adapter:
        there = f"an adapter (rank {_json(file).get('r')})" if file.is_file() else "whole weights"
        wanted = "an adapter" if trains_adapter else "all weights (model.lora: null)"
        raise ConfigError(
            f"model.lora: {checkpoint} holds {there}, but this recipe trains {wanted}; set model.lora as it was",
            "model.lora",
        )
    if not (checkpoint / "config.json").is_file():
        return
    old, new = _json(checkpoint / "config.json"), load_model_config(recipe.model).to_dict()
    other = [name for name in MODEL_SHAPE if name in old and old[name] != new.get(name)]
    if other:
        values = ", ".join(f"{name} {old[name]!r} -> {new.get(name)!r}" for name in other)
        raise ConfigError(
            f"model.path: {recipe.model.path!r} is another model than the one in {checkpoint} (old -> new: {values}); "
            "name the model that the run was started with",
            "model.path",
        )


def _json(file: Path) -> dict[str, Any]:
    return json.loads(file.read_text(encoding="utf-8"))
