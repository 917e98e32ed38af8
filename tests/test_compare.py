"""`rltok.compare`: statistics with known answers, resumption, refusals, words, files, and a whole small comparison."""

from __future__ import annotations

import csv
import fcntl
import io
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import yaml
from rich.console import Console

from rltok.cli import main
from rltok.compare import compare, holm, load_comparison, make_plan, paired_difference, read_results, t_interval
from rltok.compare.execute import expected_seconds, run_process
from rltok.compare.words import markdown, verdict_words
from rltok.config import ConfigError
from rltok.recipe import shipped_recipes
from rltok.run import RunDirectory

pytest.importorskip("scipy", reason="rltok compare needs SciPy: pip install 'rltok[compare]'")
pytest.importorskip("matplotlib", reason="rltok compare needs matplotlib: pip install 'rltok[compare]'")

ROOT = Path(__file__).resolve().parent.parent
PROBLEMS = 40


# Statistics


def test_t_interval_has_the_textbook_numbers() -> None:
    found = t_interval([1.0, 2.0, 3.0])
    quantile = 0.95 * (2 / (1 - 0.95**2)) ** 0.5  # of t with 2 degrees of freedom, whose distribution has a closed form
    half = quantile / 3**0.5  # standard deviation 1
    assert (found.mean, found.count) == (2.0, 3)
    assert [found.low, found.high] == pytest.approx([2 - half, 2 + half], rel=1e-12)
    assert found.p == pytest.approx(1 - (12 / 14) ** 0.5, rel=1e-9) and not found.excludes_zero
    wide, narrow = t_interval([1.0, 2.0, 3.0], 0.99), t_interval([1.0, 2.0, 3.0], 0.9)
    assert wide.low < found.low < narrow.low and narrow.excludes_zero  # type: ignore[operator]


def test_t_interval_of_one_value_and_of_equal_values() -> None:
    one = t_interval([0.3])
    assert (one.mean, one.low, one.p) == (0.3, None, None) and not one.excludes_zero
    equal, zero = t_interval([0.1] * 3), t_interval([0.0] * 3)
    assert (equal.mean, equal.low, equal.high, equal.p) == (0.1, 0.1, 0.1, 0.0) and equal.excludes_zero
    assert (zero.low, zero.high, zero.p) == (0.0, 0.0, 1.0) and not zero.excludes_zero
    for bad in ([], [1.0, float("nan")]):
        with pytest.raises(ValueError, match="finite values"):
            t_interval(bad)


def test_pairing_removes_what_seeds_and_problems_share() -> None:
    random = np.random.default_rng(0)
    base = random.normal(size=(4, 1)) + random.normal(size=(1, 50))  # spread far above the difference
    found = paired_difference(base + 0.01 + 1e-4 * random.normal(size=(4, 50)), base)
    assert found.verdict == "above" and found.mean == pytest.approx(0.01, abs=1e-4)
    assert paired_difference(base, base + 0.01 + 1e-4 * random.normal(size=(4, 50))).verdict == "below"
    with pytest.raises(ValueError, match=r"\(4, 50\) and \(3, 50\)"):
        paired_difference(base, base[:3])


def test_a_difference_must_hold_over_seeds_and_over_problems() -> None:
    by_seed = np.repeat([[3.0], [-1.0], [1.0]], 60, axis=1)  # every problem says the same, seeds do not
    by_problem = np.repeat([[10.0, 0.0, -4.0, 0.5] * 15], 3, axis=0) / 10  # every seed says the same, problems do not
    zero = np.zeros((3, 60))
    over_seeds, over_problems = paired_difference(by_seed, zero), paired_difference(by_problem, zero)
    assert over_seeds.problems.excludes_zero and not over_seeds.seeds.excludes_zero
    assert over_seeds.verdict == "within noise" and over_seeds.p == over_seeds.seeds.p == pytest.approx(
        1 - (0.75 / 2.75) ** 0.5
    )
    assert over_problems.seeds.excludes_zero and over_problems.seeds.p == 0.0
    noisy = paired_difference(np.repeat([[10.0, -9.0] * 30], 3, axis=0), zero)
    assert noisy.seeds.excludes_zero and not noisy.problems.excludes_zero and noisy.verdict == "within noise"
    assert paired_difference(by_seed[:1], zero[:1]).verdict == "undecided"


def test_equal_methods_seldom_look_different() -> None:
    """300 comparisons of five seeds and 60 problems without a difference: at most 5 % may look like one."""
    random = np.random.default_rng(1)
    verdicts = []
    for _ in range(300):
        skill = random.random((1, 60))
        arm, base = (random.random((5, 60)) < skill + 0.1 * random.normal(size=(5, 1)) for _ in range(2))
        verdicts.append(paired_difference(arm, base).verdict)
    false_alarms = 1 - verdicts.count("within noise") / 300
    assert 0 < false_alarms < 0.08  # 0.05 and 2.4 deviations


def test_holm() -> None:
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.5, None, 0.001]) == pytest.approx([0.5, None, 0.002])
    assert holm([0.9, 0.8]) == [1.0, 1.0] and holm([]) == []


# Plans

BASE: dict[str, Any] = {
    "base": "smoke",
    "baseline": "plain",
    "seeds": [0, 1, 2],
    "settings": {"credit": None, "objective": None, "rollout": None},
    "tasks": {"sums": {"data": {"split_seed": 1}}, "more": {"data": {"split_seed": 2}}},
    "arms": {
        "plain": None,
        "good": {"settings": {"credit": {"type": "token_group_average"}}, "about": "better"},
        "same": {"seed_offset": 1000},
    },
}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write(folder: Path, **changes: Any) -> Path:
    path = folder / "try.yaml"
    path.write_text(yaml.safe_dump(BASE | changes, sort_keys=False))
    return path


def arms(**changes: Any) -> dict[str, Any]:
    return {"arms": BASE["arms"] | changes}


def test_a_plan_has_every_run_with_its_own_settings(folder: Path) -> None:
    plan = make_plan(write(folder), ["settings.training.learning_rate=1e-5"])
    assert [str(run) for run in plan.runs[:4]] == [
        "sums plain seed 0",
        "sums good seed 0",
        "sums same seed 0",
        "more plain seed 0",
    ]
    assert len(plan.runs) == 18 and plan.directory == Path("runs/compare-try")
    good = plan.runs[1].recipe
    assert (good.name, good.seed, good.expect, good.training["learning_rate"]) == ("sums-good", 0, (), 1e-5)
    assert good.credit["type"] == "token_group_average" and plan.runs[0].recipe.credit is None  # type: ignore[index]
    assert plan.runs[2].recipe.seed == 1000 and plan.runs[2].path == Path("runs/compare-try/runs/sums/same/seed0")
    assert plan.budget["more"]["max_steps"] == 4 and plan.budget["more"]["max_completion_length"] == 32


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"basline": "plain"}, "unknown key 'basline'; did you mean 'baseline'"),
        ({"baseline": "plan"}, "baseline: 'plan' is no arm; did you mean 'plain'"),
        ({"seeds": [0, 0]}, r"seeds: \[0, 0\] must be different"),
        ({"seeds": []}, r"seeds: \[\] must be different numbers >= 0, at least one"),
        ({"seeds": "0"}, "seeds: '0' is not a valid"),
        ({"arms": {}}, "arms: empty|baseline: 'plain' is no arm"),
        (arms(**{"a/b": None}), "arms: 'a/b' names a directory"),
        (arms(good={"setings": {}}), "arms.good.setings: unknown key 'setings'; did you mean 'settings'"),
        (arms(good={"recipe": "dpo"}), "arms.good on sums: dpo: no such recipe file; did you mean 'dapo'"),
        (arms(good={"seeds": [0, 7]}), "arms.good.seeds: 7 is no seed of the baseline 'plain'.*allowed: 0, 1, 2"),
        (arms(good={"settings": {"seed": 3}}), "arms.good.seed: set by the comparison itself"),
        (arms(good={"settings": {"trainin": {}}}), "arms.good on sums: trainin: unknown key.*did you mean 'training'"),
        (
            arms(good={"settings": {"training": {"max_step": 2}}}),
            "training.max_step: unknown.*did you mean 'max_steps'",
        ),
        (arms(good={"settings": {"training": {"top_p": 0.5}}}), "sums-good.*top_p"),
        (arms(good={}), "arms.good: on sums it has the settings and seeds of arms.plain.*seed_offset"),
        ({"metric": "strickt"}, "metric 'strickt' is no reward of its recipe; did you mean 'strict'"),
        ({"settings": {"evaluation": {"after": False}}}, "evaluation.after is false"),
        ({"level": 95}, "level: 95"),
    ],
)
def test_wrong_comparisons_are_refused_by_name(changes: dict[str, Any], words: str, folder: Path) -> None:
    with pytest.raises(ConfigError, match=words) as caught:
        make_plan(write(folder, **changes))
    assert str(caught.value).startswith(str(folder / "try.yaml"))


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"training": {"max_steps": 8}}, "training.max_steps is 8, but 4 for the baseline 'plain'.*equal updates"),
        ({"training": {"num_iterations": 2}}, "training.num_iterations is 2, but 1"),
        ({"training": {"steps_per_generation": 4}}, "training.steps_per_generation is 4, but 2.*equal completions"),
        ({"training": {"num_generations": 2}}, "training.num_generations is 2, but 4"),
        ({"training": {"max_completion_length": 64}}, "max_completion_length is 64, but 32.*equal generated tokens"),
        ({"rollout": {"dynamic_sampling": {"metric": "strict"}}}, "rollout.dynamic_sampling.*equal generated tokens"),
        ({"data": {"heldout_size": 8}}, "data.heldout_size is 8, but 16.*the same problems, model and evaluation"),
        ({"evaluation": {"max_new_tokens": 9}}, "evaluation.max_new_tokens is 9, but None"),
        ({"rewards": {"strict": {"function": "answer_format"}}}, "rewards.strict is .*answer_format.*one and the same"),
    ],
)
def test_unequal_budgets_and_measures_are_refused_by_the_setting(
    settings: dict[str, Any], words: str, folder: Path
) -> None:
    with pytest.raises(ConfigError, match=f"arms.good on sums.*{words}"):
        make_plan(write(folder, **arms(good={"settings": settings})))


def test_a_reward_may_change_its_weight_only(folder: Path) -> None:
    lot = {"strict": {"weight": 0.0}, "lot": {"function": "random_reward"}}
    plan = make_plan(write(folder, **arms(lot={"settings": {"rewards": lot}})))
    assert plan.runs[3].recipe.rewards["strict"] == {"function": "strict_accuracy", "weight": 0.0}


def test_files_that_are_no_comparison(folder: Path) -> None:
    for text, words in (("- a\n", "not valid YAML|is a mapping"), ("a: [1\n", "not valid YAML"), ("", "base: missing")):
        (folder / "bad.yaml").write_text(text)
        with pytest.raises(ConfigError, match=words):
            load_comparison("bad.yaml")
    with pytest.raises(ConfigError, match="no such comparison file; did you mean 'demo'"):
        load_comparison("demoo")
    with pytest.raises(ConfigError, match="write key.path=value"):
        load_comparison("demo", ["seeds"])


def test_the_shipped_comparison_covers_what_it_promises(folder: Path) -> None:
    plan = make_plan("demo")
    methods = {"grpo", "dapo", "hapo", "hapo_a", "hapo_b", "hapo_c", "hapo_d", "d3s", "cyclic_reflex"}
    methods |= {"preplan", "preplan_local", "preplan_global", "uniform", "shuffled", "random_reward"}
    comparison = plan.comparison
    assert set(comparison.arms) == methods and set(comparison.tasks) == {"sums", "countdown"}
    assert len(comparison.seeds) >= 3 and comparison.baseline == "dapo"
    assert len(plan.runs) == len(methods) * 2 * len(comparison.seeds)
    by_arm = {run.arm: run.recipe for run in plan.runs if run.task == "sums"}
    hapo, parts = by_arm["hapo"], [by_arm[f"hapo_{part}"] for part in "abcd"]
    assert [bool(r.rollout and r.rollout["decoding"]) for r in parts] == [True, False, False, False]
    assert parts[1].credit == hapo.credit and [r.credit for r in (parts[0], *parts[2:])] == [None] * 3
    assert [r.objective and (r.objective["alpha"], r.objective["beta"]) for r in parts] == [None, None, (0, 1), (1, 0)]
    grpo = by_arm["grpo"].training
    assert (grpo["loss_type"], grpo["epsilon_high"], grpo["delta"]) == ("grpo", None, None)
    assert {run.recipe.data["tasks"][0]["task"] for run in plan.runs} == {"chain_sum", "countdown"}
    assert "demo" in shipped_recipes() and "base" in shipped_recipes(), "comparisons are not listed as recipes"
    assert shipped_recipes()["demo"].startswith("HAPO")


# Runs, by a runner that makes run directories instead of training


SKILL = {"plain": 0.3, "good": 0.8, "same": 0.3}


def setting(command: Sequence[str], name: str) -> str:
    (value,) = [item.split("=", 1)[1] for item in command if item.startswith(f"{name}=")]
    return value


class FakeRunner:
    """Writes what `rltok train` writes; `stop` is called with each run's number before it is finished."""

    def __init__(self, stop: Callable[[int, Path], int | None] | None = None) -> None:
        self.commands: list[Sequence[str]] = []
        self.stop = stop

    def __call__(self, command: Sequence[str], log: Path) -> int:
        self.commands.append(command)
        path = Path(json.loads(setting(command, "output_dir")))
        path.mkdir(parents=True, exist_ok=True)
        log.write_text("first words\nlast words\n")
        values = yaml.safe_load(Path(command[4]).read_text())
        (path / "recipe.yaml").write_text(yaml.safe_dump(values | {"seed": int(setting(command, "seed"))}))
        status = None if self.stop is None else self.stop(len(self.commands), path)
        if status is not None:
            return status
        write_run(path, values["name"], int(setting(command, "seed")))
        return 0


def write_run(path: Path, name: str, seed: int, problems: int = PROBLEMS) -> None:
    """Two thirds of the noise is the problems', equal in all runs; the rest is the run's own."""
    task, arm = name.split("-")
    shared, own = np.random.default_rng(len(task)), np.random.default_rng([len(arm), ord(arm[0]), seed])
    hard = shared.random(problems)
    for moment, skill in (("before", 0.05), ("after", SKILL[arm])):
        right = (0.7 * hard + 0.3 * own.random(problems)) < skill
        rows = [
            {"row": i, "sample": 0, "prompt": f"{task} {i}", "length": 5, "strict": float(right[i])}
            for i in reversed(range(problems))
        ]
        pd.DataFrame(rows).to_parquet(path / f"evaluation_{moment}.parquet")
    lines = [
        {"step": 1, "completions/mean_length": 10.0, "trained_tokens": 100.0, "rewards/strict/mean": 0.1},
        {"step": 2, "trained_tokens": 200.0},
        {"step": 3, "completions/mean_length": 20.0, "trained_tokens": 300.0, "rewards/strict/mean": 0.3},
        {"step": 4, "trained_tokens": 400.0},
    ]
    (path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    means = {"strict": float(np.mean(right)), "lenient": 1.0}
    summary = {"steps": 4, "train_seconds": 3.0, "after": means, "versions": {"rltok": "0"}}
    (path / "summary.json").write_text(json.dumps(summary))


def console() -> Console:
    return Console(file=io.StringIO(), width=200)


def text_of(shown: Console) -> str:
    assert isinstance(shown.file, io.StringIO)
    return shown.file.getvalue()


def test_a_whole_comparison(folder: Path) -> None:
    runner, shown = FakeRunner(), console()
    assert compare(write(folder), shown, runner=runner) == 0
    assert len(runner.commands) == 18 and all("resume=auto" in command for command in runner.commands)
    told, out = text_of(shown), folder / "runs" / "compare-try"
    report = (out / "comparison.md").read_text()
    for text in (told, report):
        assert "good is above plain on sums: +" in text and "holds after Holm's correction for 4 comparisons" in text
        assert "same is within noise of plain on sums: " in text and "(3 seeds, 40 problems)" in text
        assert "plain learned on sums: +" in text and "4 comparisons with one baseline" in text
    assert "4 updates, 16 completions per rollout of at most 32 tokens" in report
    assert "All 18 runs took" in report and "Incomplete" not in report and "| good | better | smoke |" in report
    rows = list(csv.DictReader((out / "runs.csv").open()))
    assert len(rows) == 18
    first = rows[0]
    # two rollouts of 16 completions with 10 and 20 tokens
    assert (first["generated_tokens"], first["trained_tokens"], first["updates"]) == ("480.0", "400.0", "4")
    assert float(first["training_mean"]) == pytest.approx(0.2) and rows[-1]["training_seed"] == "1002"
    found = list(csv.DictReader((out / "differences.csv").open()))
    assert [row["verdict"] for row in found] == ["baseline", "above", "within noise"] * 2
    good = found[1]
    assert (
        float(good["difference_low_over_seeds"]) < float(good["difference"]) < float(good["difference_high_over_seeds"])
    )
    assert float(good["mean"]) - float(found[0]["mean"]) == pytest.approx(float(good["difference"]))
    picture = (out / "comparison.svg").read_text()
    assert (out / "comparison.png").stat().st_size > 10_000
    for word in ("plain", "good", "same", "sums", "more", "difference to plain (points)"):
        assert word in picture


def test_one_arm_far_off_does_not_squeeze_the_others(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SKILL, "plain", 0.75)
    monkeypatch.setitem(SKILL, "same", 0.75)
    for name, skill in (("near", 0.76), ("far", 0.0)):
        monkeypatch.setitem(SKILL, name, skill)
    more = {"near": {"seed_offset": 7}, "far": {"seed_offset": 8}}
    path = write(folder, tasks={"sums": {}}, arms=BASE["arms"] | more)
    assert compare(path, console(), runner=FakeRunner()) == 0
    far = [cell for cell in read_results(make_plan(path)).cells if cell.arm == "far"][0]
    assert far.difference is not None and far.difference.mean < -0.5
    picture = (folder / "runs/compare-try/comparison.svg").read_text()
    assert f"◂ {100 * far.difference.mean:+.1f}" in picture and "−50<" not in picture.replace(" ", "")


def test_a_finished_comparison_runs_nothing_and_writes_the_same_files(folder: Path) -> None:
    path, out = write(folder), folder / "runs" / "compare-try"
    names = ("comparison.md", "comparison.png", "comparison.svg", "runs.csv", "differences.csv")
    assert compare(path, console(), runner=FakeRunner()) == 0
    before = [(out / name).read_bytes() for name in names]
    again = FakeRunner()
    assert compare(path, console(), runner=again) == 0 and again.commands == []
    assert [(out / name).read_bytes() for name in names] == before


def test_interrupted_between_runs_and_continued(folder: Path) -> None:
    def stop(number: int, path: Path) -> int | None:
        if number == 3:
            raise KeyboardInterrupt
        return None

    path, shown = write(folder), console()
    assert compare(path, shown, runner=FakeRunner(stop)) == 130 and "goes on from here" in text_of(shown)
    rest = FakeRunner()
    assert compare(path, console(), runner=rest) == 0
    assert len(rest.commands) == 16, "two were finished"
    record = json.loads((folder / "runs/compare-try/runs/sums/same/seed0.json").read_text())
    assert record["attempts"] == 2 and record["status"] == 0


def test_a_killed_run_is_reported_and_the_others_go_on(folder: Path) -> None:
    def kill(number: int, path: Path) -> int | None:
        (path / "metrics.jsonl").write_text('{"step": 1')
        return -9 if number == 2 else None

    path, shown, runner = write(folder, tasks={"sums": {}}), console(), FakeRunner(kill)
    assert compare(path, shown, runner=runner) == 1 and len(runner.commands) == 9
    told = text_of(shown)
    assert "FAILED sums good seed 0: was ended by signal 9" in told and "last words" in told
    assert "not finished, 1 of 9 runs: sums good seed 0" in told
    report = (folder / "runs/compare-try/comparison.md").read_text()
    assert "**Incomplete: 8 of 9 runs.**" in report and "(2 seeds, 40 problems)" in report
    again = FakeRunner()
    assert compare(path, console(), runner=again) == 0
    (command,) = again.commands
    assert "runs/sums/good/seed0" in setting(command, "output_dir") and "resume=auto" in command


def test_only_some_and_the_rest_later(folder: Path) -> None:
    path, first = write(folder), FakeRunner()
    assert compare(path, console(), only=["more/good", "plain"], runner=first) == 0 and len(first.commands) == 9
    plan = make_plan(path)
    cells = {(cell.task, cell.arm): cell for cell in read_results(plan).cells}
    assert set(cells) == {("sums", "plain"), ("more", "plain"), ("more", "good")}
    with pytest.raises(ConfigError, match="--only god: no arm, task.*did you mean 'good'"):
        compare(path, console(), only=["god"], runner=first)


def test_dry_run_prints_and_writes_nothing(folder: Path) -> None:
    path, shown, runner = write(folder), console(), FakeRunner()
    assert compare(path, shown, dry_run=True, runner=runner) == 0
    told = text_of(shown)
    assert "18 runs" in told and "0, 1, 2 (0)" in told and "max_steps 4" in told and "expected time: unknown" in told
    assert runner.commands == [] and not (folder / "runs").exists()
    compare(path, console(), only=["plain"], runner=runner)
    for run in make_plan(path).runs:
        if run.arm == "plain":
            run.path.with_suffix(".json").write_text('{"seconds": 30.0, "attempts": 1}')
    shown = console()
    compare(path, shown, dry_run=True)
    assert "expected time: 6:00, by the runs that are finished" in text_of(shown)  # 12 runs of 30 s
    assert expected_seconds([], make_plan(path).runs) == 0


def test_runs_of_other_settings_are_refused_before_anything_runs(folder: Path) -> None:
    path, runner = write(folder), FakeRunner()
    compare(path, console(), only=["plain"], runner=runner)
    with pytest.raises(ConfigError, match="holds a run with another training.learning_rate; choose another output_dir"):
        compare(path, console(), overrides=["settings.training.learning_rate=1e-5"], runner=runner)
    assert len(runner.commands) == 6
    assert compare(path, console(), only=["plain"], overrides=["settings.report.completions=false"]) == 0


def truncate(path: Path) -> None:
    file = path / "evaluation_after.parquet"
    file.write_bytes(file.read_bytes()[:50])


def no_metric(path: Path) -> None:
    file = path / "evaluation_after.parquet"
    pd.read_parquet(file).assign(strict=float("nan")).to_parquet(file)


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (truncate, "evaluation_after.parquet is missing or damaged"),
        (no_metric, "problems without a value of 'strict'"),
        (lambda path: (path / "summary.json").write_text("{"), "summary.json is missing or damaged"),
        (lambda path: (path / "summary.json").write_text("{}"), "summary.json is damaged (KeyError"),
        (
            lambda path: write_run(path, "sums-good", 1, problems=39),
            "judged by other held-out problems than the first run",
        ),
    ],
)
def test_damaged_runs_are_left_out_and_named(damage: Callable[[Path], Any], words: str, folder: Path) -> None:
    path, shown = write(folder, tasks={"sums": {}}), console()
    compare(path, console(), runner=FakeRunner())
    damage(folder / "runs/compare-try/runs/sums/good/seed1")
    assert compare(path, shown, runner=FakeRunner()) == 1
    assert f"left out: sums good seed 1: {'' if 'other' in words else 'runs'}" in text_of(shown)
    assert words in text_of(shown) and "good is above plain: +" in text_of(shown)


# Words


def test_one_seed_decides_nothing(folder: Path) -> None:
    path = write(folder, seeds=[0], tasks={"sums": {}})
    compare(path, console(), runner=FakeRunner())
    results = read_results(make_plan(path))
    (good, _) = [cell for cell in results.cells if cell.difference is not None]
    assert verdict_words(good, results).startswith("good cannot be told from plain: +")
    assert "with 1 seed, 40 problems says nothing about noise" in verdict_words(good, results)
    assert "plain: +" in markdown(results, "", None) and "did not clearly learn" not in markdown(results, "", None)


def test_a_baseline_that_does_not_learn_makes_the_comparison_void(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(SKILL, "plain", 0.05)
    path, shown = write(folder, tasks={"sums": {}}), console()
    compare(path, shown, runner=FakeRunner())
    assert "plain did not clearly learn" in text_of(shown) and "says nothing about methods" in text_of(shown)


def test_a_difference_that_only_holds_alone_is_called_so(folder: Path) -> None:
    """Many arms: an unadjusted p just below 0.05 does not survive."""
    path = write(folder, tasks={"sums": {}})
    compare(path, console(), runner=FakeRunner())
    results = read_results(make_plan(path))
    (good, same) = [cell for cell in results.cells if cell.difference is not None]
    assert good.adjusted_p is not None and good.adjusted_p < 0.05 < (same.adjusted_p or 0)
    alone = type(good)(**(vars(good) | {"adjusted_p": 0.3}))
    words = verdict_words(alone, results)
    assert words.startswith("good is above plain: +") and "taken alone only" in words and "(p = 0.3)" in words


# Processes


def test_a_directory_at_work_is_refused(folder: Path) -> None:
    path = write(folder)
    out = folder / "runs" / "compare-try"
    out.mkdir(parents=True)
    with (out / ".lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(ConfigError, match="another comparison, or a run that one started, is still at work"):
            compare(path, console(), runner=FakeRunner())
    assert compare(path, console(), only=["plain"], runner=FakeRunner()) == 0


SLEEPER = """
import sys
from pathlib import Path
from rltok.compare.execute import _ended_by_signal, _locked, run_process
out = Path(sys.argv[1])
child = [sys.executable, "-c", "import os, time; print(os.getpid(), flush=True); time.sleep(60)"]
with _locked(out) as lock, _ended_by_signal():
    run_process(child, out / "log", lock)
"""


def start_sleeper(out: Path) -> tuple[subprocess.Popen[bytes], int]:
    out.mkdir()
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    parent = subprocess.Popen([sys.executable, "-c", SLEEPER, str(out)], env=environment, stderr=subprocess.DEVNULL)
    for _ in range(600):
        lines = (out / "log").read_text().splitlines() if (out / "log").exists() else []
        if lines and lines[-1].isdigit():
            return parent, int(lines[-1])
        time.sleep(0.1)
    raise AssertionError("the child did not start")


def is_locked(out: Path) -> bool:
    with (out / ".lock").open("a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def test_a_run_that_outlives_a_killed_comparison_keeps_the_lock_and_sigterm_ends_both(tmp_path: Path) -> None:
    parent, child = start_sleeper(tmp_path / "killed")
    parent.kill()
    parent.wait()
    assert is_locked(tmp_path / "killed"), "the run is still at work"
    os.kill(child, signal.SIGKILL)
    for _ in range(100):
        if not is_locked(tmp_path / "killed"):
            break
        time.sleep(0.05)
    else:
        raise AssertionError("the lock outlived the run")
    parent, child = start_sleeper(tmp_path / "ended")
    parent.terminate()
    assert parent.wait(30) != 0
    with pytest.raises(ProcessLookupError):
        os.kill(child, 0)


def in_process(command: Sequence[str], log: Path) -> int:
    """The same command without a process of its own, which would import everything again."""
    assert command[1:3] == ["-m", "rltok"]
    with pytest.raises(SystemExit) as caught:
        main(list(command[3:]))
    return int(caught.value.code or 0)


def test_a_real_comparison_on_the_smoke_recipe(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One run in a process of its own, as in use, and three more within this one."""
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    values = {
        "base": "smoke",
        "baseline": "hapo",
        "seeds": [0, 1],
        "settings": {"training": {"max_steps": 2, "save_strategy": "no"}, "data": {"heldout_size": 8}},
        "arms": {"hapo": None, "shuffled": {"settings": {"credit": {"type": "shuffled"}}}},
        "output_dir": "out",
    }
    path = folder / "tiny.yaml"
    path.write_text(yaml.safe_dump(values))
    first = RunDirectory(folder / "out/runs/task/hapo/seed0")
    assert compare(path, console(), only=["hapo"], runner=lambda command, log: run_once(command, log, first)) == 1
    assert first.summary.is_file() and "held-out accuracy" in first.path.with_suffix(".log").read_text()
    written = first.summary.stat().st_mtime_ns
    shown = console()
    assert compare(path, shown, runner=in_process) == 0
    assert first.summary.stat().st_mtime_ns == written, "a finished run is not run again"
    plan = make_plan(path)
    results = read_results(plan)
    assert [len(cell.results) for cell in results.cells] == [2, 2] and not results.missing and not results.unusable
    run = results.cells[1].results[0]
    assert run.updates == 2 and run.generated_tokens and 16 < run.generated_tokens <= 16 * 32
    assert run.trained_tokens is not None and 0 < run.trained_tokens <= run.generated_tokens
    assert results.cells[0].accuracy.mean == pytest.approx(
        np.mean(
            [json.loads(RunDirectory(r.path).summary.read_text())["strict_after"] for r in plan.runs if r.arm == "hapo"]
        )
    )
    assert "shuffled" in text_of(shown) and (folder / "out" / "comparison.png").is_file()


def run_once(command: Sequence[str], log: Path, wanted: RunDirectory) -> int:
    """Only one of the runs gets its process; the other one counts as failed."""
    return run_process(command, log) if str(wanted.path.relative_to(Path.cwd())) in command[6] else 3
