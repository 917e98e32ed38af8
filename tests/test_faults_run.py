"""Faults around the run directory: two runs at once, full and read-only disks, damaged checkpoints, changed recipes,
and a run that is killed again and again. Each ends as docs/faults.md says."""

from __future__ import annotations

import dataclasses
import errno
import fcntl
import importlib.util
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from tests_support import run_on_ranks

from rltok.cli import main
from rltok.config import ConfigError
from rltok.files import StorageError, explained_writes, write_atomically, write_failure
from rltok.recipe import Recipe, load_recipe
from rltok.resume_rules import RULES, Verdict, changes, rule_of
from rltok.run import train, training_arguments
from rltok.run_lock import LOCK, holder, locked
from rltok.run_start import RunDirectory, Start, opened
from rltok.trainers import CreditConfig
from rltok.trainers.checkpoint import MANIFEST, write_manifest

ROOT = Path(__file__).resolve().parent.parent
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "COLUMNS": "200"}
QUICK = [
    "training.save_steps=1",
    "training.save_total_limit=null",
    "training.learning_rate=1e-3",
    "evaluation.before=false",
    "evaluation.after=false",
    "report.progress='off'",
]
"""Four steps in two rollouts: checkpoints 1 and 3 lie inside a rollout."""


def recipe_of(folder: Path, *settings: str) -> Recipe:
    return load_recipe("smoke", [*QUICK, f"output_dir={json.dumps(str(folder))}", *settings])


def run_here(folder: Path, *settings: str) -> int:
    return train(recipe_of(folder, *settings), Console(quiet=True))


def start_of(folder: Path, *settings: str) -> tuple[Start, str]:
    """Where a run would begin, and what it says about that."""
    recipe, lines = recipe_of(folder, "resume=auto", *settings), list[str]()
    with opened(recipe, RunDirectory(folder), training_arguments(recipe, folder, [1.0]), lines.append) as start:
        return start, "\n".join(lines)


def run_cli(*arguments: str) -> int:
    with pytest.raises(SystemExit) as caught:
        main(list(arguments))
    return int(caught.value.code or 0)


def assert_same_parameters(one: Path, other: Path) -> None:
    mine, theirs = load_file(one / "model.safetensors"), load_file(other / "model.safetensors")
    assert mine.keys() == theirs.keys() and all(torch.equal(mine[name], theirs[name]) for name in mine)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with checkpoints 1 to 4, complete."""
    folder = tmp_path_factory.mktemp("faults") / "run"
    assert run_here(folder) == 0
    assert not (folder / "origin.json").exists()
    return folder


@pytest.fixture
def cut(whole: Path, tmp_path: Path) -> Path:
    """The same as if it had been killed at its end."""
    folder = tmp_path / "cut"
    shutil.copytree(whole, folder)
    (folder / "summary.json").unlink()
    return folder


# Two runs in one folder

HOLD = """
import os, sys, time
from pathlib import Path
from rltok.run_lock import locked
with locked(Path(sys.argv[1]), str):
    if "fork" in sys.argv and os.fork() == 0:
        print(os.getpid(), flush=True)
    elif "fork" not in sys.argv:
        print(os.getpid(), flush=True)
    time.sleep(600)
"""


@contextmanager
def held(folder: Path, *words: str) -> Iterator[tuple[subprocess.Popen[str], int]]:
    """Another process that holds a folder, and the id that it (or its fork) printed."""
    command = [sys.executable, "-c", HOLD, str(folder), *words]
    with subprocess.Popen(
        command, env=ENVIRONMENT, stdout=subprocess.PIPE, text=True, start_new_session=True
    ) as process:
        assert process.stdout is not None
        try:
            yield process, int(process.stdout.readline())
        finally:
            with suppress(ProcessLookupError):  # the fork may live on where the process does not
                os.killpg(process.pid, signal.SIGKILL)


def test_a_second_run_in_a_folder_is_refused_until_the_first_ends(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rltok.run.load_model", lambda config: pytest.fail("the model was loaded"))
    folder = tmp_path / "run"
    with held(folder) as (process, pid):
        first = holder(folder)
        assert first is not None and first.pid == pid == process.pid
        for resume in ("auto", "never"):
            assert run_cli("train", "smoke", f"output_dir={folder}", f"resume={resume}") == 2
            error = capsys.readouterr().err
            assert f"process {pid} on {first.host}, started {first.started}" in error
            assert "output_dir=DIR" in error and "seed=N" in error
        process.kill()
        process.wait()
        with locked(folder, str):
            second = holder(folder)
            assert second is not None and second.pid == os.getpid(), "SIGKILL freed the lock"


def test_a_forked_child_that_outlives_its_run_does_not_hold_the_folder(tmp_path: Path) -> None:
    with held(tmp_path / "run", "fork") as (process, child):
        process.kill()
        process.wait()
        os.kill(child, 0)  # it lives
        with locked(tmp_path / "run", str):
            pass


def test_a_lock_leaves_no_trace_where_nothing_was_written(tmp_path: Path) -> None:
    with locked(tmp_path / "a" / "run", str):
        assert (tmp_path / "a" / "run" / LOCK).is_file()
        with pytest.raises(ConfigError, match=f"process {os.getpid()} on "), locked(tmp_path / "a" / "run", str):
            pass
    assert not (tmp_path / "a" / "run").exists()
    with locked(tmp_path / "b", str):
        (tmp_path / "b" / "recipe.yaml").touch()
    assert (tmp_path / "b" / LOCK).is_file() and RunDirectory(tmp_path / "b").is_used()
    (tmp_path / "b" / "recipe.yaml").unlink()
    assert not RunDirectory(tmp_path / "b").is_used()


def test_a_file_system_without_locks_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: Any) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", refuse)
    with pytest.warns(RuntimeWarning, match="without locks .*a second run .* not be noticed"), locked(tmp_path, str):
        pass


def test_two_ranks_end_together(tmp_path: Path) -> None:
    """At a locked folder, and where the disk refuses a file of one of them."""
    with held(tmp_path / "locked") as (_, pid):
        run_on_ranks("faults_run_worker.py", 2, tmp_path)
    one, two = (json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in (0, 1))
    free = re.compile(r"[\d.,]+ [kKMGT]?i?B")  # each looks at the disk for itself, and others write there
    assert {k: free.sub("", v) for k, v in one.items()} == {k: free.sub("", v) for k, v in two.items()}
    assert one["locked"].startswith("ConfigError: output_dir:") and f"process {pid} on " in one["locked"]
    assert one["full"].startswith("StorageError: ") and "No space left" in one["full"]
    assert "rltok_state_1.pt" in one["full"] and "checkpoint-1 is untouched" in one["full"]
    assert not (tmp_path / "full" / "checkpoint-2").exists()


# Full disks


@contextmanager
def small_disk(folder: Path, megabytes: int) -> Iterator[Callable[[str], None]]:
    """A disk of its own at `folder`; yields a function that changes its options."""
    folder.mkdir()

    def mount(options: str, *more: str) -> None:
        command = ["mount", "-t", "tmpfs", "-o", options, *more, "tmpfs", str(folder)]
        try:
            subprocess.run(command, check=True, capture_output=True, text=True)
        except (OSError, subprocess.CalledProcessError) as error:
            pytest.skip(f"needs the right to mount a tmpfs: {getattr(error, 'stderr', error)}")

    mount(f"size={megabytes}m")
    try:
        yield lambda options: mount(f"remount,{options}")
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_full_disk_stops_the_run_and_room_continues_it(whole: Path, tmp_path: Path) -> None:
    size = sum(file.stat().st_size for file in (whole / "checkpoint-1").iterdir()) / 2**20
    with small_disk(tmp_path / "disk", round(2.5 * size)) as change:
        folder = tmp_path / "disk" / "run"
        with pytest.raises(StorageError) as caught:
            run_here(folder)
        text = str(caught.value)
        assert f"{folder}/checkpoint-3 could not be written: " in text and "MB free" in text
        for word in ("checkpoint-2 is untouched", "training.save_total_limit", "resume=auto", "output_dir=DIR"):
            assert word in text
        assert not (folder / "checkpoint-3").exists()
        assert start_of(folder)[0].checkpoint == folder / "checkpoint-2"
        change("size=500m")
        assert run_here(folder, "resume=auto") == 0
        assert_same_parameters(folder / "checkpoint-4", whole / "checkpoint-4")
        steps = [line["step"] for line in RunDirectory(folder).read_metrics()]
        assert steps == [1, 2, 3, 4]


def test_a_file_that_may_not_grow_ends_the_command_with_words(tmp_path: Path) -> None:
    """The limit of the system: real errors of real writes, without any right."""

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (4 << 20, 4 << 20))  # the weights fit, the optimizer does not

    command = [sys.executable, "-m", "rltok", "train", "smoke", *QUICK, "training.max_steps=1"]
    done = subprocess.run(
        command, cwd=tmp_path, env=ENVIRONMENT, capture_output=True, text=True, timeout=200, preexec_fn=limit
    )
    assert done.returncode == 2, done.stderr
    assert "error: " in done.stderr and "checkpoint-1 could not be written" in done.stderr
    assert "there is no checkpoint before it" in done.stderr and "output_dir=DIR" in done.stderr
    assert "Traceback" not in done.stderr
    assert not list(tmp_path.glob("runs/*/checkpoint-*"))


def test_errors_of_a_disk_are_told_from_others(tmp_path: Path) -> None:
    weights = {"x": torch.zeros(1 << 20)}
    with pytest.raises(Exception) as caught:
        torch.save(weights, "/dev/full")
    assert write_failure(caught.value) is not None
    wrapped = SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")
    assert "No space left" in str(write_failure(wrapped))
    assert write_failure(RuntimeError("size mismatch for lm_head")) is None
    assert write_failure(FileNotFoundError(errno.ENOENT, "no", "a")) is None
    with (
        pytest.raises(StorageError, match=r"metrics.jsonl.*MB free.*more room"),
        explained_writes(tmp_path, "more room"),
    ):
        raise OSError(errno.ENOSPC, "No space left on device", str(tmp_path / "metrics.jsonl"))
    with pytest.raises(PermissionError), explained_writes(tmp_path, ""):
        raise PermissionError(errno.EACCES, "no", "a")
    save_file(weights, tmp_path / "w.safetensors")


def test_a_draft_that_does_not_fit_is_removed(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", 1):
        write_atomically(tmp_path / "disk" / "a.json", "old")
        with pytest.raises(OSError, match="No space left"):
            write_atomically(tmp_path / "disk" / "a.json", "x" * (2 << 20))
        assert [path.name for path in (tmp_path / "disk").iterdir()] == ["a.json"]
        assert (tmp_path / "disk" / "a.json").read_text() == "old"


# Folders that cannot be written


@pytest.mark.parametrize("where", ["a file", "below a file", "nowhere", "read-only"])
def test_a_folder_that_cannot_be_written_is_refused_before_anything_is_loaded(
    where: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rltok.run.load_tokenizer", lambda config: pytest.fail("the tokenizer was loaded"))
    monkeypatch.setattr("rltok.run.load_model", lambda config: pytest.fail("the model was loaded"))
    (tmp_path / "file").touch()
    if where == "nowhere" and not Path("/proc/self").exists():
        pytest.skip("there is no /proc, where nobody can make a folder")
    disk = small_disk(tmp_path / "disk", 1) if where == "read-only" else nullcontext()
    places = {
        "a file": tmp_path / "file",
        "below a file": tmp_path / "file" / "run",
        "nowhere": Path("/proc/rltok-run"),
        "read-only": tmp_path / "disk" / "run",
    }
    with disk as change:
        if change is not None:
            change("ro")
        assert run_cli("train", "smoke", f"output_dir={places[where]}") == 2
    error = capsys.readouterr().err
    assert f"output_dir: {places[where]} cannot be written" in error and "output_dir=DIR" in error


# Damaged checkpoints


def half(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def empty(file: Path) -> None:
    file.write_bytes(b"")


def test_every_file_of_a_checkpoint_counts(cut: Path, caplog: pytest.LogCaptureFixture) -> None:
    names = sorted(path.name for path in (cut / "checkpoint-4").iterdir())
    assert {"model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "rltok_state_0.pt"} < set(names)
    for name in names:
        file = cut / "checkpoint-4" / name
        whole_bytes = file.read_bytes()
        for harm in (half, empty, Path.unlink):
            harm(file)
            caplog.clear()
            assert start_of(cut)[0].checkpoint == cut / "checkpoint-3", (name, harm)
            assert "Skipping" in caplog.text and "checkpoint-4" in caplog.text and name in caplog.text, (name, harm)
            file.write_bytes(whole_bytes)
    assert start_of(cut)[0].checkpoint == cut / "checkpoint-4"


@pytest.mark.parametrize("text", ["[]", "{}", "3", '{"model.safetensors": 3}', '{"a": {"bytes": "x", "blake2b": ""}}'])
def test_a_manifest_of_garbage_is_damage(cut: Path, caplog: pytest.LogCaptureFixture, text: str) -> None:
    (cut / "checkpoint-4" / MANIFEST).write_text(text)
    assert start_of(cut)[0].checkpoint == cut / "checkpoint-3"
    assert f"{MANIFEST} cannot be read" in caplog.text


def test_a_run_goes_on_from_the_checkpoint_before(cut: Path, whole: Path) -> None:
    half(cut / "checkpoint-4" / "optimizer.pt")
    assert run_here(cut, "resume=auto") == 0
    assert_same_parameters(cut / "checkpoint-4", whole / "checkpoint-4")
    assert [line["step"] for line in RunDirectory(cut).read_metrics()] == [1, 2, 3, 4]


def test_without_a_whole_checkpoint_it_starts_from_scratch_and_says_so(cut: Path) -> None:
    for folder in cut.glob("checkpoint-*"):
        empty(folder / "model.safetensors")
    start, said = start_of(cut)
    assert start.checkpoint is None and "holds a run without a whole checkpoint: it starts from scratch" in said
    (cut / "evaluation_before.json").write_text("{}")
    assert start_of(cut)[0].evaluated
    start, said = start_of(cut, "evaluation.rows=3")
    assert not start.evaluated and "evaluated again" in said and "evaluation.rows: None -> 3" in said
    assert not (cut / "evaluation_before.json").exists()


# A changed recipe


def refusal(folder: Path, *settings: str) -> str:
    with pytest.raises(ConfigError) as caught:
        start_of(folder, *settings)
    return str(caught.value)


@pytest.mark.parametrize(
    ("setting", "told"),
    [
        ("seed=3", "seed: 0 -> 3"),
        ("model.dtype=bfloat16", "model.dtype: 'float32' -> 'bfloat16'"),
        ("model.lora={r: 4}", "model.lora: None -> {'r': 4"),
        ("data.train_size=32", "data.train_size: 64 -> 32"),
        ("data.split_seed=1", "data.split_seed: 0 -> 1"),
        ("data.tasks[0].template='say {question}'", "data.tasks[0].template: "),
        ("rewards.short.coef=0.5", "rewards.short.coef: 0.01 -> 0.5"),
        ("rewards.more={function: length}", "rewards.more: not set -> "),
        ("credit=null", "credit: {'type': 'token_group_average'"),
        ("objective={type: length_norm}", "objective"),
        ("selection={type: d3s}", "selection: None -> "),
        ("rollout.engine=transformers", "rollout.engine: 'fast' -> 'transformers'"),
        ("rollout.decoding=[]", "rollout.decoding: [{"),
        ("training.num_generations=8", "training.num_generations: 4 -> 8"),
        ("training.num_iterations=2", "training.num_iterations: 1 -> 2"),
        ("training.learning_rate=5e-4", "training.learning_rate: 0.001 -> 0.0005"),
        ("training.loss_type=grpo", "training.loss_type: 'dapo' -> 'grpo'"),
    ],
)
def test_what_would_be_another_run_is_refused_with_both_values(cut: Path, setting: str, told: str) -> None:
    if "length_norm" in setting:
        from rltok.objective import OBJECTIVE

        setting = f"objective={{type: {next(name for name in OBJECTIVE if name != 'hapo')}}}"
    text = refusal(cut, setting)
    assert told in text and "set them back" in text and "model.path=" in text and str(cut / "checkpoint-4") in text


def test_what_keeps_the_run_is_shown_with_both_values(cut: Path) -> None:
    settings = ["training.max_steps=6", "objective.alpha=0.5", "training.epsilon=0.1", "report.samples.rows=4"]
    start, said = start_of(cut, *settings, "faults.nonfinite=skip", "batching.balance=true")
    assert start.checkpoint == cut / "checkpoint-4"
    for line in ("training.max_steps: 4 -> 6", "objective.alpha: 1.0 -> 0.5", "training.epsilon: 0.2 -> 0.1"):
        assert line in said
    assert "faults.nonfinite: 'stop' -> 'skip'" in said and "batching.balance: False -> True" in said
    assert start_of(cut)[1] == "", "nothing changed, nothing said"


def test_batching_may_change_between_rollouts_only(cut: Path) -> None:
    shutil.rmtree(cut / "checkpoint-4")
    assert start_of(cut)[0].checkpoint == cut / "checkpoint-3"
    assert "batching.balance: False -> True" in refusal(cut, "batching.balance=true")
    shutil.rmtree(cut / "checkpoint-3")
    assert "batching.balance: False -> True" in start_of(cut, "batching.balance=true")[1]


def test_evaluation_may_not_change_between_before_and_after(cut: Path) -> None:
    assert "evaluation.rows: None -> 4" in start_of(cut, "evaluation.rows=4")[1]
    (cut / "evaluation_before.json").write_text("{}")
    assert "evaluation.rows: None -> 4" in refusal(cut, "evaluation.rows=4")
    assert "evaluation.after" in start_of(cut, "evaluation.after=true")[1]


def test_a_checkpoint_in_another_directory_allows_more(cut: Path, tmp_path: Path) -> None:
    given = f"resume={cut / 'checkpoint-3'}"
    start, said = start_of(tmp_path / "new", given, "seed=3", "data.train_size=32", "training.loss_type=grpo")
    assert start.foreign and start.checkpoint == cut / "checkpoint-3"
    assert "seed: 0 -> 3" in said and "data.train_size: 64 -> 32" in said and "output_dir" not in said
    assert "training.num_generations: 4 -> 8" in refusal(tmp_path / "new", given, "training.num_generations=8")
    layers = "model.config_overrides.num_hidden_layers=2"
    assert "num_hidden_layers" in refusal(tmp_path / "new", given, layers)
    assert not (tmp_path / "new").exists(), "a refused start leaves nothing behind"
    assert "holds checkpoints after checkpoint-3 (4)" in refusal(cut, given)
    assert "already holds a run" in refusal(cut, f"resume={self_copy(cut, tmp_path / 'other') / 'checkpoint-4'}")


def self_copy(folder: Path, copy: Path) -> Path:
    shutil.copytree(folder, copy)
    return copy


def test_a_run_from_a_foreign_checkpoint_comes_back_to_it(cut: Path, tmp_path: Path, whole: Path) -> None:
    new = tmp_path / "new"
    assert run_here(new, f"resume={cut / 'checkpoint-2'}") == 0
    assert_same_parameters(new / "checkpoint-4", whole / "checkpoint-4")
    for folder in new.glob("checkpoint-*"):
        shutil.rmtree(folder)
    (new / "summary.json").unlink()
    assert start_of(new)[0].checkpoint == cut / "checkpoint-2", "killed before its own first checkpoint"
    shutil.rmtree(cut)
    assert "is gone" in refusal(new)


def test_a_complete_run_that_is_trained_on_is_not_complete_meanwhile(whole: Path, tmp_path: Path) -> None:
    folder = self_copy(whole, tmp_path / "run")
    assert start_of(folder)[0].complete
    assert run_here(folder, f"resume={folder}", "training.max_steps=5") == 0
    assert json.loads((folder / "summary.json").read_text())["steps"] == 5
    (folder / "summary.json").write_text("{}")
    with pytest.raises(KeyError, match="stopped here"):
        stop_at_training(folder, f"resume={folder}", "training.max_steps=6")
    assert not (folder / "summary.json").exists()
    assert start_of(folder, "training.max_steps=6")[0].checkpoint == folder / "checkpoint-5"


def stop_at_training(folder: Path, *settings: str) -> None:
    """A run that ends with an error as its training begins."""

    def stop(*arguments: Any, **options: Any) -> None:
        raise KeyError("stopped here")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("rltok.trainers.CreditTrainer.train", stop)
        run_here(folder, *settings)


def test_checkpoints_that_do_not_fit_are_refused_before_anything_is_loaded(cut: Path) -> None:
    last = cut / "checkpoint-4"
    assert "training.max_steps: 3, but" in refusal(cut, "training.max_steps=3")
    shutil.copy(last / "rltok_state_0.pt", last / "rltok_state_1.pt")
    text = refusal(cut)
    assert "written by 2 process(es), this run has 1" in text and "launch.processes=2" in text
    for file in last.glob("rltok_state_*.pt"):
        file.unlink()
    write_manifest(last)
    text = refusal(cut)
    assert "holds weights only (training.save_only_model)" in text and f"model.path={last}" in text


def test_a_learning_rate_that_changed_would_have_no_effect(cut: Path, whole: Path, monkeypatch: Any) -> None:
    """Why the table refuses it: optimizer and schedule come from the checkpoint with their old value."""
    monkeypatch.setattr("rltok.run_start.refuse", lambda *arguments: None)
    shutil.rmtree(cut / "checkpoint-4")
    assert run_here(cut, "resume=auto", "training.learning_rate=0.5") == 0
    assert_same_parameters(cut / "checkpoint-4", whole / "checkpoint-4")


# The table


def key_paths(value: Any, path: str = "") -> Iterator[str]:
    if isinstance(value, dict) and value:
        for key, item in value.items():
            yield from key_paths(item, f"{path}.{key}" if path else key)
    else:
        yield path


def test_every_setting_has_a_verdict() -> None:
    settings = ["selection={type: d3s}", "evaluation.steering={path: x}", "rollout.prompt_skipping={metric: strict}"]
    for path in key_paths(load_recipe("demo", settings).resolved()):
        assert rule_of(path).verdict in Verdict
    for field in dataclasses.fields(CreditConfig):
        assert rule_of(f"training.{field.name}").verdict in Verdict
    with pytest.raises(KeyError):
        rule_of("unheard.of")
    assert {rule_of(section).pattern for section in ("seed", "credit", "objective", "batching")} == {
        "seed",
        "credit",
        "objective",
        "batching*",
    }


def test_every_rule_decides_about_something_and_is_documented() -> None:
    assert len({rule.pattern for rule in RULES}) == len(RULES)
    text = (ROOT / "docs" / "faults.md").read_text(encoding="utf-8")
    for rule in RULES:
        assert f"`{rule.pattern}`" in text, rule.pattern
    for verdict in Verdict:
        assert verdict.value in text


def test_defaults_of_the_training_section_are_no_change() -> None:
    old = {"training": {"max_steps": 4}, "credit": {"type": "a", "beta": 1.0}}
    new = {"training": {"max_steps": 4, "beta": 0.0, "epsilon": 0.3}, "credit": {"type": "a", "beta": 2.0}}
    assert [str(change) for change in changes(old, new)] == ["training.epsilon: 0.2 -> 0.3", "credit.beta: 1.0 -> 2.0"]
    lists = [
        {"objective": [{"type": "a", "x": 1}, {"type": "b"}]},
        {"objective": [{"type": "a", "x": 2}, {"type": "c"}]},
    ]
    assert [change.path for change in changes(*lists)] == ["objective[0].x", "objective[1].type"]
    assert [change.rule.verdict for change in changes(*lists)] == [Verdict.SHOWN, Verdict.SAME_RUN]


# Killed again and again


def test_killed_at_random_moments_it_ends_as_if_undisturbed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = importlib.util.spec_from_file_location("kill_loop", ROOT / "scripts" / "kill_loop.py")
    assert spec is not None and spec.loader is not None
    loop = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "kill_loop", loop)
    spec.loader.exec_module(loop)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    settings = ["training.save_steps=1", "training.learning_rate=1e-3", "evaluation.rows=4"]
    out = tmp_path / "out"
    assert loop.main(["smoke", *settings, "--kills", "2", "--seed", "5", "--out", str(out)]) == 0
    shown = capsys.readouterr().out
    assert "after 2 kills: the same parameters, metrics, samples and evaluations" in shown
    one, other = RunDirectory(out / "whole"), RunDirectory(out / "killed")
    assert loop.differences(one, other) == []
    lines = other.metrics.read_text().splitlines()
    other.metrics.write_text("\n".join([*lines, lines[-1]]) + "\n")
    weights = load_file(out / "killed" / "checkpoint-4" / "model.safetensors")
    name = next(iter(weights))
    save_file(weights | {name: weights[name] + 1e-3}, out / "killed" / "checkpoint-4" / "model.safetensors")
    found = "\n".join(loop.differences(one, other))
    assert "1 of " in found and "parameters differ, by up to 0.00" in found and "metrics.jsonl: steps" in found
