"""The command line and the run directory, as a user meets them."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import load_file
from tests_support import build_model, build_tokenizer

from rltok.cli import main
from rltok.complete import isolated_rng
from rltok.config import ConfigError
from rltok.evaluate import Evaluation, evaluate, join_evaluations
from rltok.expect import check_expectations, check_syntax
from rltok.progress import clock, describe_metrics
from rltok.report import load
from rltok.rewards import build_rewards
from rltok.run import MetricsFile, RunDirectory, differences, fresh_directory

ROOT = Path(__file__).resolve().parent.parent
SMOKE = ["training.max_steps=4", "training.save_steps=2", "training.learning_rate=1e-3", "report.progress=lines"]
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "COLUMNS": "200"}


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "rltok", *arguments]


def run_cli(*arguments: str) -> int:
    """Exit status of a command in this process."""
    with pytest.raises(SystemExit) as caught:
        main(list(arguments))
    return int(caught.value.code or 0)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> subprocess.CompletedProcess[str]:
    """A whole run, started in a directory whose own modules must not be taken for ours; `args` holds its folder."""
    folder = tmp_path_factory.mktemp("work")
    for name in ("rewards", "trainers", "configs"):
        (folder / f"{name}.py").write_text("raise ImportError('a file of the user was imported')\n")
    done = subprocess.run(
        command("train", "smoke", *SMOKE), cwd=folder, env=ENVIRONMENT, capture_output=True, text=True, timeout=300
    )
    done.args = folder
    assert done.returncode == 0, done.stdout + done.stderr
    return done


@pytest.fixture
def run(finished: subprocess.CompletedProcess[str]) -> RunDirectory:
    return RunDirectory(Path(finished.args) / "runs" / "smoke-seed0")


# Help and lists


def test_help_is_immediate() -> None:
    code = (
        "import sys; from rltok.cli import main\n"
        "try: main(['--help'])\n"
        "except SystemExit: pass\n"
        "heavy = {'torch', 'trl', 'transformers', 'datasets', 'pandas'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", code], env=ENVIRONMENT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    for word in ("train", "launch", "eval", "demo", "methods", "recipes", "check", "show"):
        assert word in done.stdout


def test_methods_lists_every_method_with_its_defaults(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from rltok.config import first_line
    from rltok.credit import CREDIT
    from rltok.objective import OBJECTIVE
    from rltok.rewards import REWARDS
    from rltok.sampling import DECODING

    monkeypatch.setenv("COLUMNS", "300")
    assert run_cli("methods") == 0
    shown = capsys.readouterr().out
    for registry in (CREDIT, OBJECTIVE, DECODING, REWARDS):
        for name, cls in registry.items():
            assert name in shown
            assert first_line(cls), f"{name} has no docstring to show"
    assert "alpha=1.0" in shown and "tau=0.05" in shown


def test_recipes_lists_the_shipped_ones(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "300")
    assert run_cli("recipes") == 0
    shown = capsys.readouterr().out
    assert "dapo_math_qwen2.5_7b" in shown and "HAPO on the embedded tiny reasoner" in shown


# Check


def test_check_prints_the_effective_configuration_and_estimates(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from rltok.recipe import load_recipe

    monkeypatch.chdir(tmp_path)
    shape = ["training.per_device_train_batch_size=64", "training.steps_per_generation=8", "training.max_steps=80"]
    assert run_cli("check", "demo", "seed=3", *shape) == 0
    shown = capsys.readouterr().out
    text, _, estimates = shown.partition("\nrollout: 512 completions")
    assert "of 32 prompts (16 each), at most 40,960 tokens" in estimates
    assert "updates: 8 per rollout, each of 64 completions" in estimates
    assert "steps: 80 updates in 10 rollouts" in estimates
    assert "parameters: 806,656, of which 806,656 are trained" in estimates and "memory" in estimates
    assert "num_iterations: 1" in text, "TRL's own defaults are part of the effective configuration"
    (tmp_path / "shown.yaml").write_text(text)
    again = load_recipe(tmp_path / "shown.yaml")
    assert again.seed == 3 and again.training["steps_per_generation"] == 8
    assert not (tmp_path / "runs").exists()


def test_check_of_a_hub_model_works_without_network(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_cli("check", "gsm8k_qwen2.5_0.5b_lora", "--brief") == 0
    shown = capsys.readouterr().out
    assert "rollout: 320 completions of 64 prompts" in shown
    assert "memory: unknown" in shown or "parameters: " in shown


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["check", "demo", "training.learnin_rate=1"], ["training.learnin_rate", "did you mean 'learning_rate'"]),
        (["check", "dmo"], ["dmo: no such recipe", "did you mean 'demo'"]),
        (["train", "demo", "credit.type=hapo"], ["credit.type: unknown type 'hapo'", "token_group_average"]),
        (["check", "demo", "training.top_p=0.5"], ["top_p=0.5"]),
        (["eval", "no/where"], ["no/where: no such checkpoint"]),
        (["show", "no/where"], ["not a run directory"]),
        (["train", "demo", "model.path=./nothing", "output_dir=unused"], ["model.path", "nothing"]),
    ],
)
def test_wrong_settings_end_with_status_2_and_no_traceback(
    arguments: list[str],
    words: list[str],
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run_cli(*arguments) == 2
    error = capsys.readouterr().err
    assert "error: " in error and "Traceback" not in error
    for word in words:
        assert word in error


# A run


def test_run_directory_holds_everything(finished: subprocess.CompletedProcess[str], run: RunDirectory) -> None:
    summary = json.loads(run.summary.read_text())
    for name in ("strict_before", "strict_after", "lenient_before", "lenient_after"):
        assert 0.0 <= summary[name] <= 1.0
    assert summary["seed"] == 0 and summary["steps"] == 4 and summary["train_seconds"] > 0
    assert {"python", "torch", "transformers", "trl", "rltok"} <= set(summary["versions"])
    checkpoint = Path(finished.args) / summary["checkpoint"]
    assert (checkpoint / "model.safetensors").is_file()
    assert [line["step"] for line in run.read_metrics()] == [1, 2, 3, 4]
    assert "rewards/strict/mean" in run.read_metrics()[0]
    for moment in ("before", "after"):
        means = json.loads(run.evaluation(moment).read_text())["means"]
        rows = pd.read_parquet(run.evaluation_rows(moment))
        assert len(rows) == 16 and rows["strict"].mean() == means["strict"] == summary[f"strict_{moment}"]
    sampled = pd.read_parquet(sorted(run.completions.glob("*.parquet"))[0])
    assert {"prompt", "completion", "strict", "lenient", "advantage"} <= set(sampled.columns)
    assert "strict" in finished.stdout and f"rltok show {Path('runs/smoke-seed0')}" in finished.stdout
    assert "Traceback" not in finished.stderr


def test_recorded_recipe_loads_back(run: RunDirectory) -> None:
    from rltok.recipe import load_recipe

    assert load_recipe(run.recipe) == load_recipe("smoke", SMOKE)


def test_show_and_eval_are_the_commands_that_the_run_names(
    finished: subprocess.CompletedProcess[str], run: RunDirectory, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert run_cli("show", str(run.path), "--rows", "2") == 0
    shown = capsys.readouterr().out
    first = pd.read_parquet(run.evaluation_rows("after")).iloc[0]
    assert first["prompt"][0]["content"] in shown and "strict_after" in shown
    assert run_cli("show", str(run.path), "--source", "training") == 0
    assert "advantage" in capsys.readouterr().out
    out = tmp_path / "found.json"
    assert run_cli("eval", str(run.path / "checkpoint-4"), "evaluation.batch_size=4", "--output", str(out)) == 0
    found, summary = json.loads(out.read_text()), json.loads(run.summary.read_text())
    assert found["means"]["strict"] == summary["strict_after"]
    assert len(found["rows"]) == 16


def test_an_existing_run_is_not_overwritten(
    finished: subprocess.CompletedProcess[str],
    run: RunDirectory,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(str(finished.args))
    before = run.summary.read_bytes()
    assert run_cli("train", "smoke", *SMOKE) == 2
    error = capsys.readouterr().err
    assert "already holds a run" in error and "resume=auto" in error and "output_dir=" in error
    assert run_cli("train", "smoke", *SMOKE, "resume=auto") == 0
    assert "complete already" in capsys.readouterr().out
    assert run.summary.read_bytes() == before
    assert fresh_directory("smoke", 0) == "runs/smoke-seed0-2"


def test_killed_run_continues_to_the_same_parameters(
    finished: subprocess.CompletedProcess[str], run: RunDirectory, tmp_path: Path
) -> None:
    """kill -9 after the first checkpoint; the evaluation before training, left out here, changes nothing either."""
    arguments = ["train", "smoke", *SMOKE, "evaluation.before=false", "evaluation.after=false"]
    other = RunDirectory(tmp_path / "runs" / "smoke-seed0")
    with subprocess.Popen(
        command(*arguments), cwd=tmp_path, env=ENVIRONMENT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    ) as process:
        deadline = time.monotonic() + 200
        while not (other.path / "checkpoint-2" / "manifest.json").is_file():
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.02)
        process.send_signal(signal.SIGKILL)
    assert not other.summary.exists()
    shutil.rmtree(other.path / "checkpoint-4", ignore_errors=True)  # had the kill come late
    with other.metrics.open("a") as file:
        file.write('{"step": 3, "stale": true}\n{"step": 4, "cut o')
    done = subprocess.run(
        command(*arguments, "resume=auto"), cwd=tmp_path, env=ENVIRONMENT, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert "continuing from" in done.stdout and "checkpoint-2" in done.stdout
    expected = load_file(run.path / "checkpoint-4" / "model.safetensors")
    found = load_file(other.path / "checkpoint-4" / "model.safetensors")
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    lines = other.read_metrics()
    assert [line["step"] for line in lines] == [1, 2, 3, 4] and "stale" not in lines[2]
    timed = {"seconds", "step_time", "rollout/tokens_per_second", "time/rollout", "time/score", "time/update"}
    for ours, theirs in zip(lines, run.read_metrics(), strict=True):
        assert {k: v for k, v in ours.items() if k not in timed} == {k: v for k, v in theirs.items() if k not in timed}


def test_training_moves_the_parameters(run: RunDirectory) -> None:
    first = load_file(run.path / "checkpoint-2" / "model.safetensors")
    last = load_file(run.path / "checkpoint-4" / "model.safetensors")
    assert any(not torch.equal(first[name], last[name]) for name in first)


def test_demo_goes_through_accelerate_into_a_fresh_directory(tmp_path: Path) -> None:
    small = ["training.max_steps=1", "data.train_size=16", "data.heldout_size=4", "evaluation.before=false"]
    sizes = ["training.num_generations=2", "training.per_device_train_batch_size=2", "training.max_completion_length=8"]
    (tmp_path / "runs" / "demo-seed0").mkdir(parents=True)
    done = subprocess.run(
        command("demo", *small, *sizes), cwd=tmp_path, env=ENVIRONMENT, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert "accelerate launch" in done.stdout
    assert json.loads((tmp_path / "runs" / "demo-seed0-2" / "summary.json").read_text())["recipe"] == "demo"


def test_script_is_the_same_entry(tmp_path: Path) -> None:
    script = [sys.executable, str(ROOT / "scripts" / "train.py"), "--config", "smoke", "training.max_step=1"]
    done = subprocess.run(script, cwd=tmp_path, env=ENVIRONMENT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2 and "did you mean 'max_steps'" in done.stderr


def test_wandb_offline_and_violated_expectation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Without network or account: metrics, completions table and resolved recipe are in the offline run."""
    environment = {k: v for k, v in ENVIRONMENT.items() if not k.startswith("WANDB")}
    settings = ["report.to=[wandb]", "evaluation.rows=2", "training.max_steps=2", "name=tracked"]
    expected = ["expect=['steps == 2', 'max(reward) > 5']"]
    done = subprocess.run(
        command("train", "smoke", *settings, *expected),
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 1, done.stdout + done.stderr
    assert "steps == 2 -> holds" in done.stdout and "max(reward) > 5 -> FAILS" in done.stdout
    run = RunDirectory(tmp_path / "runs" / "tracked-seed0")
    assert json.loads(run.summary.read_text())["expect"] == {"steps == 2": True, "max(reward) > 5": False}
    (record,) = run.path.glob("wandb/offline-run-*/*.wandb")
    content = record.read_bytes()
    for word in (b"token_group_average", b"recipe", b"train/reward", b"strict_after"):
        assert word in content
    assert list(run.path.glob("wandb/offline-run-*/files/media/table/completions*.json"))
    maps = list(run.path.glob("wandb/offline-run-*/files/media/html/tokens/*.html"))
    assert len(maps) == 4 and all("credit" in file.read_text() for file in maps)


def test_report_and_compare_on_the_command_line(finished: subprocess.CompletedProcess, tmp_path: Path) -> None:
    run = Path(finished.args) / "runs" / "smoke-seed0"
    assert json.loads((run / "environment.json").read_text())["seed"] == 0
    page = tmp_path / "page.html"
    done = subprocess.run(command("report", str(run), "-o", str(page)), env=ENVIRONMENT, capture_output=True, text=True)
    assert done.returncode == 0 and str(page) in done.stdout, done.stderr
    text = page.read_text(encoding="utf-8")
    assert "smoke-seed0" in text and "http://" not in text.replace("http://www.w3.org", "")
    missing = subprocess.run(command("report", str(tmp_path / "none")), env=ENVIRONMENT, capture_output=True, text=True)
    assert missing.returncode == 2 and "none" in missing.stderr
    broken = tmp_path / "broken"  # as a run looks that was killed, and whose disk lost a little
    shutil.copytree(run, broken)
    (broken / "summary.json").unlink()
    (broken / "evaluation_after.json").unlink()
    lines = (broken / "metrics.jsonl").read_text().splitlines()
    (broken / "metrics.jsonl").write_text("\n".join([*lines[:-1], lines[-1][:20]]))
    first, *_ = sorted((broken / "samples").glob("*.parquet"))
    first.write_bytes(first.read_bytes()[:-200])
    both = subprocess.run(
        command("report", str(run), str(broken), "-o", str(page)), env=ENVIRONMENT, capture_output=True, text=True
    )
    assert both.returncode == 0, both.stderr
    for word in ("summary.json", "metrics.jsonl", first.name):
        assert "broken: " in both.stdout and word in both.stdout and word in page.read_text(encoding="utf-8"), word
    options = {"cwd": tmp_path, "env": ENVIRONMENT, "capture_output": True, "text": True}
    plan = subprocess.run(command("compare", "demo", "--dry-run"), **options)
    assert plan.returncode == 0 and "150 runs to do" in plan.stdout, plan.stderr


def test_a_run_of_one_step_on_two_processes_gives_a_whole_report(tmp_path: Path) -> None:
    options = {"cwd": tmp_path, "env": ENVIRONMENT | {"OMP_NUM_THREADS": "1"}, "capture_output": True, "text": True}
    ranks = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    settings = ["training.max_steps=1", "evaluation.before=false", "evaluation.rows=2", "output_dir=two"]
    done = subprocess.run([*ranks, "-m", "rltok", "train", "smoke", *settings], timeout=300, **options)
    assert done.returncode == 0, done.stderr[-3000:]
    found = load(tmp_path / "two")
    assert found.problems == [] and found.environment["processes"] == 2
    assert found.metrics["step"].tolist() == [1]
    samples = found.samples()
    assert set(samples.groupby("group").size()) == {4} and len(samples) == 16  # whole groups, over both ranks
    assert samples["row"].min() < 16 <= samples["row"].max() and samples["credit_used"].notna().any()
    made = subprocess.run(command("report", "two"), **options)
    assert made.returncode == 0 and "two/report.html" in made.stdout, made.stderr
    assert (tmp_path / "two" / "report.html").stat().st_size > 100_000


# Parts


def test_expectations() -> None:
    metrics = [{"step": 1, "reward": 0.2, "rewards/strict/mean": 0.1}, {"step": 2, "reward": 0.7}, {"x": True}]
    summary = {"strict_before": 0.25, "strict_after": 0.75, "name": "a"}
    cases = {
        "strict_after - strict_before >= 0.5": True,
        "max(reward) > 0.6 and min(reward) < 0.3": True,
        "reward == 0.7": True,
        "first(reward) < last(reward)": True,
        "mean(reward) > 0.5": False,
        "not rewards_strict_mean > 0.5": True,
        "0.1 < strict_before < 0.2": False,
        "-strict_after < 0 or reward / 0.7 < 0": True,
    }
    outcomes = check_expectations(list(cases), summary, metrics)
    assert {o.expression: o.held for o in outcomes} == cases
    (unknown,) = check_expectations(["max(rewrd) > 0"], summary, metrics)
    assert unknown.held is False and "unknown name 'rewrd'; did you mean 'reward'" in unknown.reason
    (unmeasured,) = check_expectations(["strict_before > 0"], summary | {"strict_before": None}, metrics)
    assert unmeasured.held is None and unmeasured.reason == "strict_before was not measured"


@pytest.mark.parametrize(
    "text", ["__import__('os')", "reward.real > 0", "open(reward)", "max(reward, 1)", "[1][0] > 0", "reward >", "'a'"]
)
def test_expectations_evaluate_nothing_else(text: str) -> None:
    with pytest.raises(ConfigError):
        check_syntax(text)
    (outcome,) = check_expectations([text], {"reward": 1.0}, [])
    assert outcome.held is False


def test_metrics_file_drops_cut_and_repeated_lines(tmp_path: Path) -> None:
    from transformers import TrainerControl, TrainerState

    run = RunDirectory(tmp_path)
    run.metrics.write_text('{"step": 1, "seconds": 4.0}\n{"step": 2, "seconds": 9.0}\n{"step": 3, "sec')
    writer, state = MetricsFile(run), TrainerState(global_step=1)
    writer.on_train_begin(None, state, TrainerControl())  # type: ignore[arg-type]
    state.global_step = 2
    writer.on_log(None, state, TrainerControl(), logs={"reward": float("nan"), "loss": 0.5})  # type: ignore[arg-type]
    first, second = run.read_metrics()
    assert first == {"step": 1, "seconds": 4.0}
    assert second["step"] == 2 and second["reward"] is None and second["loss"] == 0.5
    assert 4.0 <= second["seconds"] < 6.0, "training time goes on from the lines that are kept"


def test_progress_texts() -> None:
    logs = {"reward": 0.5, "rewards/strict/mean": 0.25, "completions/mean_length": 12.34, "entropy": float("nan")}
    assert describe_metrics(logs) == "reward 0.500  strict 0.250  length 12.3"
    assert describe_metrics({"train_runtime": 3.0}) == ""
    assert [clock(s) for s in (-1, 65, 3725)] == ["0:00", "1:05", "1:02:05"]


def test_differences_name_key_paths() -> None:
    assert differences({"a": {"b": 1, "c": 2}}, {"a": {"b": 1, "c": 3}, "d": 4}) == ["a.c", "d"]


# Evaluation


def length_reward(completions: list[str], completion_ids: list[list[int]], **columns: object) -> list[float]:
    return [float(len(ids)) for ids in completion_ids]


def own_rows(conversational: bool) -> list[dict[str, object]]:
    texts = [f"{i}+{i}=" for i in range(7)] + ["a much longer prompt than the others: 1+1="]
    return [
        {"prompt": [{"role": "user", "content": t}] if conversational else t, "answer": str(2 * i)}
        for i, t in enumerate(texts)
    ]


@pytest.mark.parametrize("conversational", [False, True])
def test_evaluation_does_not_depend_on_batches_and_leaves_no_trace(conversational: bool) -> None:
    tokenizer = build_tokenizer()
    model = build_model(tokenizer).train()
    rewards = build_rewards({"size": {"function": "length", "coef": -1.0}, "form": {"function": "answer_format"}})
    rows = own_rows(conversational)
    torch.manual_seed(7)
    expected_next = torch.rand(3)
    torch.manual_seed(7)
    found = [evaluate(model, tokenizer, rows, rewards, max_new_tokens=6, batch_size=size) for size in (1, 3, 64)]
    assert torch.equal(torch.rand(3), expected_next), "the caller's random state is untouched"
    assert model.training
    assert found[0] == found[1] == found[2]
    assert [row["row"] for row in found[0].rows] == list(range(8))
    assert found[0].means["size"] == found[0].means["length"] > 0
    assert found[0].rows[3]["answer"] == "6" and found[0].rows[3]["prompt"] == rows[3]["prompt"]


def test_sampled_evaluation_is_seeded_and_averages_samples() -> None:
    tokenizer = build_tokenizer()
    model = build_model(tokenizer)
    rewards = build_rewards({"size": {"function": "length", "coef": -1.0}})
    rows = own_rows(False)[:3]
    options = {"max_new_tokens": 5, "batch_size": 2, "temperature": 1.0, "num_samples": 4}
    one, same, other = (evaluate(model, tokenizer, rows, rewards, seed=seed, **options) for seed in (1, 1, 2))  # type: ignore[arg-type]
    assert one == same != other
    assert len(one.rows) == 12 and [row["sample"] for row in one.rows[:5]] == [0, 1, 2, 3, 0]
    assert one.means["size"] == np.mean([row["length"] for row in one.rows])
    with pytest.raises(ValueError, match="no held-out row"):
        evaluate(model, tokenizer, [], rewards, max_new_tokens=5, batch_size=2)


def test_shares_of_ranks_join_to_the_whole() -> None:
    rows = [{"row": i, "sample": 0, "length": i, "ended": True, "strict": float(i % 2)} for i in range(5)]
    parts = [Evaluation({"strict": 0.0}, rows[0::2]), Evaluation({"strict": 1.0}, rows[1::2])]
    whole = join_evaluations(parts)
    assert whole.rows == rows
    assert whole.means == {"strict": 0.4, "length": 2.0, "ended": 1.0}


def test_isolated_rng_restores_every_generator() -> None:
    import random

    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    expected = random.random(), np.random.rand(), torch.rand(1).item()
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    with isolated_rng(5):
        inside = random.random(), np.random.rand(), torch.rand(1).item()
    assert (random.random(), np.random.rand(), torch.rand(1).item()) == expected != inside
