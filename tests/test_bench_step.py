"""`scripts/bench_step.py` and `scripts/soak.py` at their smallest: arms, pairs, statistics and exit status."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from tests_support import load_script

step = load_script("bench_step")
soak = load_script("soak")
CASE = step.case_of("tiny", "cpu", rows=2, accumulation=2, windows=2)
TINY = ["--shape", "tiny", "--device", "cpu", "--rows", "2", "--accumulation", "2", "--memory-repetitions", "0"]


# ---- arms


@pytest.mark.parametrize("name", step.ARMS)
def test_every_arm_trains(name, tmp_path):
    runner = step.Runner(CASE, step.ARMS[name], str(tmp_path))
    before = [p.detach().clone() for p in runner.trainer.model.parameters()]
    block = runner.run(1)
    assert set(block.seconds) == {"rollout", "score", "update"} and min(block.seconds.values()) > 0
    assert runner.trainer.state.global_step == CASE.windows
    assert any(not torch.equal(a, b) for a, b in zip(before, runner.trainer.model.parameters(), strict=True))
    assert isinstance(runner.trainer, step.CreditTrainer) != step.ARMS[name].is_trl
    assert step.gc.isenabled()


def test_every_method_of_the_library_is_an_arm():
    from rltok.credit import CREDIT
    from rltok.objective import OBJECTIVE

    sections = [arm.settings.get(door, {}) for arm in step.ARMS.values() for door in ("credit", "objective")]
    measured = {section["type"] for section in sections if section}
    assert measured >= set(OBJECTIVE) and measured >= set(CREDIT) - {"group", "shuffled"}


def test_arms_share_weights_rows_and_shuffle(tmp_path, monkeypatch):
    seen = {}
    for name in ("trl_dapo", "uniform"):
        runner = step.Runner(CASE, step.ARMS[name], str(tmp_path))
        weights = [p.detach().clone() for p in runner.trainer.model.parameters()]
        used = []
        inner = runner.trainer._compute_loss

        def loss(model, inputs, inner=inner, used=used):
            used.append(inputs["completion_ids"])
            return inner(model, inputs)

        monkeypatch.setattr(runner.trainer, "_compute_loss", loss)
        runner.run(5)
        seen[name] = (weights, used, [p.detach().clone() for p in runner.trainer.model.parameters()])
    for ours, theirs in zip(*(seen[name] for name in ("uniform", "trl_dapo")), strict=True):
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
    assert len(seen["uniform"][1]) == CASE.accumulation * CASE.windows


def test_completions_of_a_case():
    case = step.case_of("small", "cpu")
    first, second = case.completions(1), case.completions(2)
    assert first == case.completions(1) and first != second
    assert sorted(map(len, first)) == sorted(map(len, second))
    assert all(ids[-1] == step.END and min(ids[:-1]) >= step.FIRST for ids in first)
    many = step.case_of("small", "cpu", rows=64, longest=10_000)
    logs = np.log(many.lengths(0))
    assert np.std(logs) == pytest.approx(0.8, rel=0.03)
    assert np.mean(many.lengths(0)) == pytest.approx(64, rel=0.03)
    assert set(step.case_of("small", "cpu", sigma=0.0).lengths(3)) == {64}
    assert step.parity_reward([[3, 4], [3, 5]]) == [0.5, 1.0]


def test_a_refused_arm_is_named_and_fails_the_check(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(step.ARMS, "balance", step.Arm({"batching": {"max_tokens": 0}}))
    out = tmp_path / "figures.json"
    monkeypatch.setattr(step.Runner, "run", lambda runner, seed: block(1.0))
    assert step.main([*TINY, "--arms", "balance", "--repetitions", "1", "--json", str(out), "--check"]) == 1
    record = json.loads(out.read_text())
    assert "max_tokens" in record["arms"]["balance"]["error"] and "did not run" in record["missed"][0]
    assert "| balance | did not run |" in capsys.readouterr().out


def test_figures_of_a_tiny_run(tmp_path, capsys):
    out = tmp_path / "figures.json"
    assert step.main([*TINY, "--arms", "uniform,pods", "--repetitions", "2", "--precise", "1", "--json", str(out)]) == 0
    record = json.loads(out.read_text())
    assert list(record["arms"]) == ["trl_dapo", "uniform", "pods"]
    assert [len(record["arms"][name]["ratios"]["cpu"]["step"]) for name in ("uniform", "pods")] == [2, 2]
    assert record["arms"]["pods"]["ratio"]["step"] == record["arms"]["pods"]["step_ratio_by_clock"]["wall"]
    parts = record["arms"]["uniform"]["milliseconds_per_step"]
    assert parts["step"] == pytest.approx(parts["rollout"] + parts["score"] + parts["update"], rel=0.3)
    table = capsys.readouterr().out
    assert table.count("| trl_dapo |") == 1 and "| pods |" in table
    assert str(tmp_path) not in out.read_text()


def test_memory_of_a_process_of_its_own():
    found = step.memory_of_child(CASE, "uniform")
    weights = 4 * sum(p.numel() for p in step.build_model(CASE).parameters())
    assert set(found) == set(step.PHASES) and max(found.values()) < 200 * 2**20
    assert max(found.values()) > weights
    with pytest.raises(RuntimeError, match="measuring the memory of nothing failed"):
        step.memory_of_child(CASE, "nothing")


# ---- pairs and their statistics


def block(seconds: float) -> object:
    return step.Block(
        {"rollout": 0.0, "score": seconds / 4, "update": 3 * seconds / 4}, dict.fromkeys(step.PHASES, 1.0)
    )


def test_a_linear_drift_cancels_in_a_quad():
    clock = iter(range(1000))
    true = {"trl_dapo": 10.0, "uniform": 10.1}

    class Drifting:
        def run(self, name, seed):
            rows.append((name, seed))
            return block(true[name] + 0.5 * next(clock))

    rows, quads = [], step.Quads()
    for number in range(2):
        step.run_quad(Drifting(), "trl_dapo", "uniform", 7, number % 2 == 1, quads)
    names = ["trl_dapo", "uniform", "uniform", "trl_dapo", "uniform", "trl_dapo", "trl_dapo", "uniform"]
    assert rows == list(zip(names, [7, 7, 8, 8] * 2, strict=True))
    assert quads.ratios("wall") == pytest.approx([(20.2 + 1.5) / (20 + 1.5), (20.2 + 5.5) / (20 + 5.5)])
    assert quads.ratios("wall", "update") == pytest.approx(quads.ratios("wall"))
    assert quads.ratios("cpu") == [1.0, 1.0]


def test_interval_of_a_median():
    values = list(np.random.default_rng(1).normal(1.02, 0.01, 41))
    found = step.interval(values)
    assert found["median"] == np.median(values)
    assert found["low"] < found["median"] < found["high"]
    # of a normal sample the median has standard error 1.2533 sigma / sqrt(n)
    assert found["high"] - found["low"] == pytest.approx(2 * 1.96 * 1.2533 * 0.01 / 41**0.5, rel=0.5)
    assert step.interval([1.5]) == {"median": 1.5, "low": None, "high": None}


def test_arms_turn_and_bounded_ones_get_more_quads(monkeypatch):
    order = []

    class Counting:
        def prepare(self, name):
            if name == "pods":
                raise step.ConfigError("no")

        def run(self, name, seed):
            order.append(name)
            return block(1.0)

    found, errors = step.measure(Counting(), ["trl_dapo", "trl_grpo", "uniform", "uniform_grpo", "pods", "d3s"], 2, 3)
    assert {name: len(quads.arm) for name, quads in found.items()} == {
        "trl_grpo": 2,
        "uniform": 6,
        "uniform_grpo": 6,
        "d3s": 2,
    }
    assert errors == {"pods": "no"}
    assert set(order[:4]) == {"trl_dapo", "trl_grpo"} and set(order[16:28]) == {"trl_grpo", "uniform_grpo"}
    assert order[32:36] == ["uniform", "trl_dapo", "trl_dapo", "uniform"]  # the fourth quad of uniform comes first


def arm(ratio: float, update: float = 1.0, memory: float | None = None) -> dict:
    record = {"ratio": {"step": {"median": ratio}, "update": {"median": update}}}
    return record if memory is None else record | {"memory_ratio": {"median": memory}}


@pytest.mark.parametrize(
    ("arms", "words"),
    [
        ({"uniform": arm(1.01, memory=1.02)}, []),
        ({"uniform": arm(1.011)}, ["1.0110 times TRL's, at most 1.01"]),
        ({"uniform": arm(1.0, memory=1.021)}, ["peak memory is 1.0210"]),
        ({"hapo": arm(1.04)}, []),
        ({"hapo": arm(1.05, memory=1.1)}, ["1.0500", "1.1000"]),
        ({"balance": arm(0.9, update=0.8)}, []),
        ({"balance": arm(0.9, update=0.81)}, ["1.235 times as fast, at least 1.25"]),
        ({"balance": {"error": "not built"}}, ["did not run: not built"]),
        ({"d3s": arm(3.0), "d3s2": arm(9.0)}, []),
    ],
)
def test_what_is_missed(arms, words):
    found = step.failures(arms)
    assert len(found) == len(words) and all(word in line for word, line in zip(words, found, strict=True))


def test_what_was_not_judged_is_said():
    lines = step.unjudged({"uniform": arm(1.0), "hapo": arm(1.0, memory=1.0)})
    assert "uniform: peak memory was not measured" in lines and "balance: not among the arms" in lines
    assert not any(line.startswith("hapo") for line in lines)


@pytest.mark.parametrize(("seconds", "status"), [(1.02, 1), (1.0, 0)])
def test_the_check_decides_the_exit_status(seconds, status, monkeypatch, capsys):
    quads = step.Quads([(block(1.0), block(1.0))] * 3, [(block(seconds), block(seconds))] * 3)
    monkeypatch.setattr(step, "measure", lambda *args: ({"uniform": quads}, {}))
    assert step.main([*TINY, "--arms", "uniform"]) == 0  # nothing is judged
    assert step.main([*TINY, "--arms", "uniform", "--check"]) == status
    out = capsys.readouterr().out
    assert ("MISSED uniform: a step takes 1.0200 times" in out) == bool(status)
    assert "not judged: hapo" in out and "not judged: uniform: peak memory" in out


def test_options(capsys):
    options = step.arguments(["--device", "cpu", "--arms", "uniform_grpo,hapo"])
    assert options.arms == ["trl_dapo", "trl_grpo", "uniform_grpo", "hapo"] and not options.fresh
    gpu = step.arguments(["--device", "cuda"])
    assert gpu.fresh and gpu.case.shape == "0.5b" and gpu.case.checkpointing and gpu.case.longest == 4096
    assert step.SHAPES["1.5b"].vocabulary == step.SHAPES["0.5b"].vocabulary == 151936
    for words, command in {
        "--arms what unknown; allowed: trl_dapo": ["--arms", "what"],
        "--repetitions 0 must be at least 1": ["--repetitions", "0"],
        "no multiple of --group 5": ["--device", "cpu", "--group", "5"],
    }.items():
        with pytest.raises(SystemExit):
            step.arguments(command)
        assert words in capsys.readouterr().err


# ---- soak


def series(**slopes: float) -> list[dict[str, float]]:
    noise = np.random.default_rng(0).normal(0, 0.2, 40)
    return [
        {"step": 50 * (i + 1)}
        | {name: 100 + slopes.get(name, 0.0) * 0.05 * (i + 1) + (name == "rss_mib") * noise[i] for name in soak.SERIES}
        for i in range(40)
    ]


def test_trend_of_known_series():
    steps = [50 * (i + 1) for i in range(40)]
    exact = soak.trend(steps, [3 + 0.002 * step for step in steps])
    assert exact["slope"] == pytest.approx(2.0) and exact["high"] - exact["low"] == pytest.approx(0, abs=1e-6)
    generator, hits, plain = np.random.default_rng(0), 0, 0
    for _ in range(400):  # autocorrelated residuals around a slope of 2
        noise = np.zeros(40)
        for i in range(1, 40):
            noise[i] = 0.4 * noise[i - 1] + generator.normal()
        found = soak.trend(steps, 0.002 * np.asarray(steps) + noise)
        hits += found["low"] <= 2 <= found["high"]
        fit = soak.scipy.stats.linregress(np.asarray(steps) / 1000, 0.002 * np.asarray(steps) + noise)
        plain += abs(fit.slope - 2) <= 2.02 * fit.stderr
    assert hits / 400 > 0.83 and hits > plain
    with pytest.raises(ValueError, match="3 samples"):
        soak.trend([1, 2, 3], [1, 2, 3])


@pytest.mark.parametrize(
    ("slopes", "words"),
    [
        ({}, []),
        ({"rss_mib": 4.0}, []),
        ({"rss_mib": 9.0}, ["memory grows by"]),
        ({"files": 2.0}, ["files: "]),
        ({"threads": 2.0, "tensors": 1.0}, ["threads: ", "tensors: "]),
        ({"objects": 500.0, "history_mib": 3.0}, []),
    ],
)
def test_what_a_leak_looks_like(slopes, words):
    found = soak.failures(soak.summarise(series(**slopes), 0.25), bound=8.0)
    assert len(found) == len(words) and all(line.startswith(word) for word, line in zip(words, found, strict=True))


def test_the_warm_up_is_left_out():
    samples = series()
    for one in samples[:10]:
        one["files"] = 1000
    rest = soak.after_warmup(samples, 0.25)
    assert len(rest) == 30 and rest[0]["step"] == 550
    assert soak.summarise(samples, 0.25)["files"]["slope"] == 0


def test_a_short_soak(tmp_path, capsys):
    out, picture = tmp_path / "soak.json", tmp_path / "soak.png"
    command = ["--steps", "12", "--every", "2", "--save-every", "6", "--json", str(out), "--plot", str(picture)]
    assert soak.main([*command, "--bound", "1e9", "data.train_size=16", "data.heldout_size=1"]) == 0
    record = json.loads(out.read_text())
    assert [one["step"] for one in record["samples"]] == [2, 4, 6, 8, 10, 12]
    assert all(one["rss_mib"] > 50 and one["files"] > 3 and one["tensors"] > 10 for one in record["samples"])
    assert set(record["summary"]) == set(soak.SERIES) and picture.stat().st_size > 1000
    assert "| rss_mib |" in capsys.readouterr().out and str(tmp_path) not in out.read_text()
    assert soak.rltok.run.MetricsFile is not soak.Watch


@pytest.mark.parametrize(("bound", "status"), [(8.0, 0), (0.001, 1)])
def test_the_soak_check_decides_the_exit_status(bound, status, monkeypatch, capsys):
    monkeypatch.setattr(soak, "run", lambda *args: (series(), 1.0))
    assert soak.main(["--check", "--bound", str(bound)]) == status
    assert ("MISSED memory" in capsys.readouterr().out) == bool(status)


def test_soak_options(capsys):
    for words, command in {
        "must be in [0, 1)": ["--warmup", "1"],
        "leave 3 samples": ["--steps", "200", "--every", "50"],
    }.items():
        with pytest.raises(SystemExit):
            soak.arguments(command)
        assert words in capsys.readouterr().err
