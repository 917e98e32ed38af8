"""`scripts/bench_rollout.py` at its smallest: whole figures, rows of the lengths asked for or no report, its sums."""

from __future__ import annotations

import dataclasses
import json
import math
import mmap
from pathlib import Path

import pytest
import torch
from tests_support import build_model, even_reward, load_script, run_settings
from transformers import GenerationConfig
from trl import GRPOConfig, GRPOTrainer

from rltok.sampling import Rows

TINY = ["--device", "cpu", "--shape", "tiny", "--groups", "3", "--group-size", "2", "--prompt-length", "8"]
TINY += ["--mean", "4", "--longest", "8", "--no-memory"]


script = load_script("bench_rollout")
CASE = script.Case(shape="tiny", groups=3, group_size=2, prompt_length=8, mean=4, longest=8, ragged=True)


def run_of(seconds, cpu_seconds=1.0, tokens=10, peak=None):
    return script.Run(tokens, seconds, cpu_seconds, peak, None)


# ---- the command


def test_a_tiny_run_of_all_engines(tmp_path, capsys):
    out = tmp_path / "figures.json"
    assert script.main([*TINY, "--ragged", "--repetitions", "2", "--out", str(out)]) == 0
    record = json.loads(out.read_text())
    assert str(tmp_path) not in out.read_text()
    assert record["command"].endswith("--no-memory --ragged --repetitions 2")
    assert {"device", "torch", "transformers", "threads", "cores"} == set(record["machine"])
    (case,) = record["cases"]
    assert script.Case(**case["case"]) == dataclasses.replace(CASE, name="case")
    assert case["lengths"]["tokens"] == sum(CASE.completion_lengths())
    assert list(case["engines"]) == list(script.ENGINES)
    base = case["engines"]["transformers"]
    for found in case["engines"].values():
        assert len(found["seconds"]) == len(found["cpu_seconds"]) == 2
        of_each = [before / after for before, after in zip(base["seconds"], found["seconds"], strict=True)]
        assert found["ratio"]["min"] == pytest.approx(min(of_each))
        assert found["ratio"]["max"] == pytest.approx(max(of_each))
        speeds = [case["lengths"]["tokens"] / seconds for seconds in found["seconds"]]
        assert found["tokens_per_second"]["max"] == pytest.approx(max(speeds))
    assert base["prefill_tokens_saved"] == 0 and base["live_share"] < 1
    fast = case["engines"]["fast"]
    assert fast["live_share"] == 1
    assert fast["prefill_tokens_saved"] == sum(map(len, CASE.prompts())) // 2
    assert fast["peak_cache_bytes"] > 0 and fast["peak_memory_bytes"] is None
    printed = capsys.readouterr().out
    assert "continuous_batching" in printed and "fast_recorded" in printed and "up to 8 tokens" in printed


def test_the_check_decides_the_exit_code(monkeypatch, tmp_path, capsys):
    command = [*TINY, "--engines", "fast", "--repetitions", "1", "--check", "--out", str(tmp_path / "f.json")]
    monkeypatch.setattr(script, "LEAST_RATIO", {"lognormal": 1e9, "equal": 1e9})
    assert script.main(command) == 1
    assert "case: fast makes" in capsys.readouterr().out
    assert len(json.loads((tmp_path / "f.json").read_text())["missed"]) == 1
    monkeypatch.setattr(script, "LEAST_RATIO", {"lognormal": 0.0, "equal": 0.0})
    assert script.main(command) == 0


def test_memory_is_that_of_a_process_of_its_own():
    """The padded cache and prefill of many rows are megabytes, and sharing prompts saves most of them."""
    case = script.Case(shape="small", groups=1, group_size=64, prompt_length=256, lengths="equal", mean=2)
    padded, shared = (script.peak_of_child(case, engine) for engine in ("transformers", "fast"))
    assert padded > script.padded_work(case, case.prompts(), case.completion_lengths())["peak_cache_bytes"]
    assert 0 < shared < padded


def test_the_resident_set_grows_with_what_is_held():
    size, before = 64 * 2**20, script.resident_bytes(reset=True)
    held = mmap.mmap(-1, size)  # not of the allocator, which another benchmark may have told to keep what is freed
    held[:: mmap.PAGESIZE] = b"x" * (size // mmap.PAGESIZE)
    grown = script.resident_bytes() - before
    assert size * 0.9 < grown < size * 1.5
    if not Path("/proc/self/status").exists():
        pytest.skip("this system does not forget the largest resident set, so only its growth was tested")
    held.close()
    assert script.resident_bytes(reset=True) < before + 32 * 2**20


def test_an_engine_that_cannot_run_is_named_with_its_reason(monkeypatch, capsys):
    def fails(bench):
        raise RuntimeError("no pages left\nmore")

    monkeypatch.setattr(script.Bench, "_continuous", fails)
    record = script.measure(CASE, ["transformers", "continuous_batching", "fast"], 1, memory=False)
    assert record["engines"]["continuous_batching"] == {"error": "RuntimeError: no pages left"}
    script.show(record, {"device": "CPU"}, 1)
    assert "continuous_batching did not run: RuntimeError: no pages left" in capsys.readouterr().out
    monkeypatch.setattr(script.Bench, "_fast", lambda bench, engine: fails(bench))
    with pytest.raises(RuntimeError, match="no pages left"):
        script.measure(CASE, ["transformers", "fast"], 1, memory=False)


def test_wrong_lengths_are_no_reason_to_leave_an_engine_out(monkeypatch):
    monkeypatch.setattr(script.Bench, "_continuous", lambda bench: [[5]] * len(bench.prompts))
    with pytest.raises(script.WrongLengths, match="continuous_batching made"):
        script.measure(CASE, ["transformers", "continuous_batching"], 1, memory=False)


def test_a_compiled_forward_is_used_and_removed(monkeypatch):
    calls = []

    def compile_(forward, **options):
        calls.append(options)
        return lambda *args, **kwargs: calls.append("forward") or forward(*args, **kwargs)

    monkeypatch.setattr(script.torch, "compile", compile_)
    bench = script.Bench(CASE)
    with bench._forward_of("fast_compiled"):
        bench.model(input_ids=torch.tensor([[3]]))
    assert calls == [{"mode": "default", "dynamic": True}, "forward"]
    assert "forward" not in vars(bench.model)
    with bench._forward_of("fast"):
        bench.model(input_ids=torch.tensor([[3]]))
    assert len(calls) == 2


def test_engines_are_interleaved_and_the_order_rotates(monkeypatch):
    order = []
    monkeypatch.setattr(script.Bench, "warm", lambda bench, engine: None)
    monkeypatch.setattr(script.Bench, "run", lambda bench, engine: order.append(engine) or run_of(1.0))
    monkeypatch.setattr(script, "work_of", lambda *args: {})
    script.measure(CASE, ["transformers", "fast", "fast_recorded"], 3, memory=False)
    first, second, third = order[:3], order[3:6], order[6:]
    assert first == ["transformers", "fast", "fast_recorded"]
    assert second == ["fast", "fast_recorded", "transformers"] and third[0] == "fast_recorded"


def test_log_probabilities_are_kept_by_one_engine_only(monkeypatch):
    kept = []
    generate = script.generate_rows
    monkeypatch.setattr(
        script, "generate_rows", lambda *args, record: kept.append(record) or generate(*args, record=record)
    )
    bench = script.Bench(CASE)
    for engine in ("fast", "fast_recorded"):
        bench.run(engine)
    assert kept == [False, True]


# ---- the same rows in every engine


@pytest.mark.parametrize("engine", script.ENGINES)
@pytest.mark.parametrize("lengths", ["lognormal", "equal"])
def test_every_engine_makes_the_lengths_asked_for(engine, lengths):
    bench = script.Bench(dataclasses.replace(CASE, lengths=lengths))
    for _ in range(2):  # nothing is left of a run
        assert bench.run(engine).tokens == sum(bench.lengths)
    assert (lengths == "equal") == (len(set(bench.lengths)) == 1)


@pytest.mark.parametrize("groups, size", [(1, 1), (2, 1), (1, 2)])
def test_the_warm_up_of_few_rows(groups, size):
    case = dataclasses.replace(CASE, groups=groups, group_size=size)
    bench = script.Bench(case)
    bench.warm("fast")
    bench.warm("transformers")
    assert bench.lengths == case.completion_lengths() and bench.prompts == case.prompts()


def never_ends(forcer, scores, rows, columns):
    scores[:, script.END] = -math.inf
    return scores


def ends_by_place(forcer, scores, rows, columns):
    """As if rows came in the order of the prompts, which ragged ones do not."""
    wanted = [length for lengths in forcer.lengths for length in lengths]
    if columns["length"].numel() == len(wanted) and not columns["length"].any():
        columns["length"].copy_(torch.tensor(wanted))
    scores[:, script.END] = torch.where(rows.position + 1 >= columns["length"], 1e4, -math.inf)
    return scores


@pytest.mark.parametrize("broken", [never_ends, ends_by_place])
def test_nothing_is_reported_of_other_lengths(broken, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(script.LengthForcer, "apply", broken)
    out = tmp_path / "figures.json"
    with pytest.raises(script.WrongLengths, match="nothing is reported"):
        script.main([*TINY, "--ragged", "--engines", "fast", "--repetitions", "1", "--out", str(out)])
    assert not out.exists() and "tokens/s" not in capsys.readouterr().out


def test_lengths_are_compared_row_by_row():
    script.check_lengths("fast", [[5, 1], [7]], [2, 1])
    with pytest.raises(script.WrongLengths, match=r"fast made 2 rows of 3 tokens .* rows \[0, 1\]"):
        script.check_lengths("fast", [[7], [5, 1]], [2, 1])
    with pytest.raises(script.WrongLengths, match="made 1 rows"):
        script.check_lengths("fast", [[5, 1]], [2, 1])
    with pytest.raises(script.WrongLengths, match=r"after the end token in rows \[1\]"):
        script.check_lengths("fast", [[5], [1, 5]], [1, 2])


def test_rows_are_told_apart_by_their_prompt_in_any_order():
    known = torch.eye(3, script.PROBE)
    forcer = script.LengthForcer([[2, 3], [4], [1]], known)
    forcer.begin(0, GenerationConfig())
    columns = forcer.columns(3, torch.device("cpu"))
    scores = known[[1, 0, 2]] + 0.01
    position = torch.zeros(3, dtype=torch.long)
    out = forcer.apply(scores.clone(), Rows(position, position, 0), columns)
    assert columns["length"].tolist() == [4, 2, 1]
    assert (out[:, script.END] > 0).tolist() == [False, False, True]
    assert out[:2, script.END].isinf().all() and torch.equal(out[:, 2:], scores[:, 2:])
    late = {"length": torch.cat([columns["length"][:1], forcer.columns(1, torch.device("cpu"))["length"]])}
    rows = Rows(torch.tensor([3, 0]), torch.tensor([9, 0]), 3)
    out = forcer.apply(torch.stack([known[2], known[0]]), rows, late)  # only the new row is looked up
    assert late["length"].tolist() == [4, 3]
    assert (out[:, script.END] > 0).tolist() == [True, False]
    forcer.columns(1, torch.device("cpu"))
    with pytest.raises(script.WrongLengths, match="more rows look like prompt 0 than the 2 it has"):
        forcer.apply(known[:1].clone(), Rows(position[:1], position[:1], 0), {"length": torch.zeros(1).long()})


def test_lengths_of_a_case():
    lengths = torch.tensor(script.Case().completion_lengths(), dtype=torch.float64)
    assert len(lengths) == 64 and lengths.max() == 400 and lengths.mean() == pytest.approx(89, rel=0.03)
    assert lengths.log().std() == pytest.approx(0.8, rel=0.05)
    assert lengths.tolist() != sorted(lengths.tolist())
    assert script.Case(sigma=0.0, mean=7).completion_lengths() == [7] * 64
    assert script.Case(lengths="equal", mean=7, longest=5).completion_lengths() == [5] * 64


def test_prompts_of_a_case():
    prompts = dataclasses.replace(CASE, groups=4, prompt_length=32).prompts()
    assert prompts[::2] == prompts[1::2]
    assert sorted(map(len, prompts[::2])) == [4, 13, 23, 32]
    assert min(map(min, prompts)) > script.END and max(map(max, prompts)) < 128
    assert {len(prompt) for prompt in script.Case().prompts()} == {256}


def test_generate_is_called_as_trl_calls_it(tokenizer, tmp_path):
    from datasets import Dataset

    args = GRPOConfig(**run_settings(tmp_path, max_completion_length=max(CASE.completion_lengths())))
    trainer = GRPOTrainer(
        model=build_model(tokenizer),
        reward_funcs=even_reward,
        args=args,
        train_dataset=Dataset.from_dict({"prompt": ["1+1="] * 4}),
        processing_class=tokenizer,
    )
    ours, theirs = script.Bench(CASE).settings.to_dict(), trainer.generation_config.to_dict()
    named = ("pad_token_id", "eos_token_id")
    assert {k: v for k, v in ours.items() if k not in named} == {k: v for k, v in theirs.items() if k not in named}
    assert ours["disable_compile"] and len(ours["eos_token_id"]) == len(theirs["eos_token_id"]) == 1


# ---- sums


def test_ratios_are_taken_within_a_repetition():
    base, fast = [run_of(8.0, 6.0), run_of(4.0, 6.0), run_of(6.0, 6.0)], [run_of(2.0), run_of(4.0, 2.0), run_of(2.0, 3)]
    found = script.figures(fast, base, {"live_share": 0.5}, 77)
    assert found["ratio"] == {"median": 3.0, "min": 1.0, "max": 4.0}  # not 6 / 2, the ratio of medians
    assert found["cpu_ratio"] == {"median": 3.0, "min": 2.0, "max": 6.0}
    assert found["tokens_per_second"] == {"median": 5.0, "min": 2.5, "max": 5.0}
    assert (found["live_share"], found["peak_memory_bytes"]) == (0.5, 77)
    on_gpu = script.figures([run_of(1.0, peak=5), run_of(1.0, peak=9)], base[:2], {}, None)
    assert on_gpu["peak_memory_bytes"] == 9
    with pytest.raises(ValueError):
        script.ratios([1.0, 2.0], [1.0])


def test_work_of_a_padded_batch():
    work = script.padded_work(CASE, [[5] * 4, [6] * 7], [3, 5])
    assert work["live_share"] == pytest.approx((2 + 4) / (2 * 4))
    assert work["peak_cache_bytes"] == 2 * (7 + 5 - 1) * (2 * 2 * 1 * 16) * 4  # tokens, layers x (K, V) x heads x dim
    assert script.padded_work(CASE, [[5]], [1])["live_share"] == 1


def record_of(ratio, cpu_ratio, fast, base, lengths="lognormal", device="cpu"):
    case = {"name": "x", "lengths": lengths, "device": device}
    engines = {"fast": {"ratio": {"median": ratio}, "cpu_ratio": {"median": cpu_ratio}, "peak_memory_bytes": fast}}
    return {"case": case, "engines": engines | {"transformers": {"peak_memory_bytes": base}}}


@pytest.mark.parametrize(
    ("record", "clock", "words"),
    [
        (record_of(2.5, 0.1, 10, 10), "wall", []),
        (record_of(2.49, 9.0, 10, 10), "wall", ["2.490 times"]),
        (record_of(2.49, 2.5, 10, 10), "cpu", []),
        (record_of(0.97, 0.1, None, None, "equal"), "wall", []),
        (record_of(0.96, 9.0, None, None, "equal"), "wall", ["at least 0.97 wanted"]),
        (record_of(3.0, 9.0, 10 + 2**20, 10), "wall", []),
        (record_of(3.0, 9.0, 11 + 2**20, 10), "wall", ["MiB at its peak"]),
        (record_of(3.0, 9.0, 11, 10, device="cuda"), "wall", ["MiB at its peak"]),
        (record_of(2.0, 9.0, 2**30, 10), "wall", ["2.000 times", "1024.0 MiB at its peak"]),
    ],
)
def test_what_is_missed(record, clock, words):
    found = script.failures([record], clock)
    assert len(found) == len(words)
    assert all(word in line and line.startswith("x: ") for word, line in zip(words, found, strict=True))


def test_cases_of_the_suite():
    cpu = {case.name: case for case in script.suite("cpu", "float32")}
    main = cpu["lognormal"]
    assert (main.rows, main.group_size, main.sigma, main.prompt_length, main.longest) == (64, 16, 0.8, 256, 400)
    assert cpu["ragged"].ragged and {case.lengths for case in cpu.values()} == {"lognormal", "equal"}
    gpu = {case.name: case for case in script.suite("cuda", "bfloat16")}
    assert {"lognormal-64", "lognormal-256", "equal-64", "equal-256"} <= set(gpu)
    assert gpu["lognormal-256"].rows == 256 and {case.shape for case in gpu.values()} == {"0.5b"}
    assert all(len(name) > 0 and case.dtype == "bfloat16" for name, case in gpu.items())


def test_options(capsys):
    given = script.arguments(["--batch", "32", "--group-size", "8", "--device", "cpu"])
    (case,) = script.chosen_cases(given)
    assert (case.groups, case.rows, given.dtype) == (4, 32, "float32")
    assert script.arguments(["--device", "cuda"]).dtype == "bfloat16"
    assert script.chosen_engines(script.arguments(["--engines", "fast"])) == ["transformers", "fast"]
    compiled = script.arguments(["--compile", "--device", "cuda"])
    assert script.chosen_engines(compiled)[-2:] == ["fast_compiled", "fast_graphs"]
    names = [case.name for case in script.chosen_cases(script.arguments(["--suite", "--only", "ragged"]))]
    assert names == ["ragged"]
    with pytest.raises(SystemExit, match="--only .*'what'.* unknown; allowed: lognormal"):
        script.chosen_cases(script.arguments(["--suite", "--only", "what", "--device", "cpu"]))
    refused = {
        "positive multiple": ["--batch", "30"],
        "must be at least 1": ["--repetitions", "0"],
        "unknown; allowed: transformers": ["--engines", "vllm"],
        "needs the engine fast": ["--check", "--engines", "fast_recorded"],
        "cases of --suite": ["--only", "ragged"],
    }
    for words, command in refused.items():
        with pytest.raises(SystemExit):
            script.arguments(command)
        assert words in capsys.readouterr().err
