"""`scripts/bench_kv.py` at its smallest: caches, rounds, memory, tables and exit status."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tests_support import load_script
from transformers.cache_utils import DynamicCache

bench = load_script("bench_kv")
CASE = bench.Case("tiny", "cpu", batch=3, length=96, budget=40, interval=8)
TINY = [
    "--shape",
    "tiny",
    "--device",
    "cpu",
    "--batch",
    "3",
    "--length",
    "96",
    "--budget",
    "40",
    "--interval",
    "8",
    "--repetitions",
    "1",
]
WHOLE = ["--prefill", "64", "--prompt", "64", "--new", "10", "--whole-repetitions", "1"]
NO_WHOLE = ["--prefill", "0", "--prompt", "0"]


@pytest.fixture(scope="module")
def model() -> Any:
    return bench.build_model(CASE, 256)


# ---- arms


def test_every_policy_of_the_library_is_an_arm() -> None:
    from rltok.kv import POLICIES

    measured = {type(policy) for policy in bench.policies(CASE).values()}
    assert set(bench.ARMS) == {"dense", "dense_block", *bench.policies(CASE)}
    assert measured >= set(POLICIES.values())


@pytest.mark.parametrize("name", bench.ARMS)
def test_an_arm_decodes_and_holds_what_it_should(model: Any, name: str) -> None:
    steps, interval = 20, CASE.interval
    decoder = bench.Decoder(CASE, model, name, steps)
    decoder.block(steps - interval)
    last = decoder.block(interval)
    assert min(last.wall, last.cpu) > 0 and decoder.steps == steps
    decoder.catch_up()
    assert decoder.columns == CASE.length + steps
    shape = bench.SHAPES["tiny"]
    per_slot = shape.layers * CASE.batch * shape.kv_heads * 2 * shape.head_size * 4
    held = bench.cache_bytes(decoder.cache)
    if name == "dense":
        assert held == (CASE.length + steps) * per_slot
    elif decoder.policy is None:
        assert held >= (CASE.length + steps) * per_slot
    elif name == "razor_attention":  # one head of four is full
        whole, part = CASE.length + steps, CASE.budget + 1 + interval
        assert 0.25 * whole + 0.75 * part <= held / per_slot < 0.75 * whole + 0.5 * part
    else:
        columns = CASE.budget + interval  # and not one more
        positions = shape.layers * CASE.batch * shape.kv_heads * columns * 4
        queries = shape.layers * CASE.batch * shape.heads * decoder.policy.watched * shape.head_size * 4
        assert held == columns * per_slot + positions * (2 if decoder.policy.accumulates else 1) + queries


def test_dense_caches_begin_alike_and_blocks_with_the_length(model: Any) -> None:
    dense, block = (bench.Decoder(CASE, model, name, 24) for name in ("dense", "dense_block"))
    for row, length in enumerate(CASE.lengths(CASE.length)):
        for layer in range(2):
            keys = dense.cache.layers[layer].keys[row, :, CASE.length - length :]
            assert torch.equal(keys, block.cache.of_row(row, length)[layer][0])
    found = []
    for decoder in (dense, block):
        decoder.block(3)
        found.append(decoder.ids)
        assert decoder.columns == CASE.length + 3
        decoder.block(5)
        assert decoder.columns == CASE.length + 5
    assert torch.equal(*found)


def test_rows_of_a_case() -> None:
    assert bench.Case().lengths(4096) == [4096, 3960, 3823, 3687]
    assert bench.Case(batch=1).lengths(100) == [100]
    mask = bench.padding_mask([3, 1], 3, 2, "cpu")
    assert mask.tolist() == [[1, 1, 1, 1, 1], [0, 0, 1, 1, 1]]


def test_a_prefill_is_cut_and_its_largest_moment_is_dense(model: Any) -> None:
    prompts = bench.random_prompts(CASE, 64)
    assert [len(row) for row in prompts.rows] == CASE.lengths(64)
    dense, kept = (bench.prefill(CASE, model, name, prompts) for name in ("dense", "streaming_llm"))
    assert kept["cache_peak_bytes"] >= dense["cache_peak_bytes"] > 0


def test_engines_agree_on_a_generation(model: Any) -> None:
    prompts = bench.random_prompts(CASE, 60)
    for name in ("streaming_llm", "h2o_window"):
        ids = [bench.whole_generation(CASE, model, name, engine, prompts, 12)["ids"] for engine in ("generate", "loop")]
        assert ids[0] == ids[1] and [len(row) for row in ids[0]] == [12] * 3


# ---- what a step of a policy does not do


def test_buffers_stay_where_they_are(model: Any) -> None:
    decoder = bench.Decoder(CASE, model, "h2o_window", 40)
    decoder.block(1)  # which makes room for an interval

    def places() -> list[int]:
        return [x.data_ptr() for layer in decoder.cache.kept for x in (*layer.tracks.values(), layer.queries)]

    before = places()
    decoder.block(30)
    assert places() == before and decoder.cache.of.generated == [31] * 3


def test_between_cuts_nothing_goes_from_host_to_device(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    decoder, made = bench.Decoder(CASE, model, "h2o_window", 40), []
    decoder.block(1)
    original = torch.tensor

    def counted(*args: Any, **kwargs: Any) -> torch.Tensor:
        made.append(args)
        return original(*args, **kwargs)

    monkeypatch.setattr(torch, "tensor", counted)
    decoder.block(CASE.interval - 2)
    assert not made
    decoder.block(1)  # the cut
    assert made


@pytest.mark.parametrize("parts", [[1] * 11, [3, 1, 4, 2], [7, 5, 30], [32, 33]])
def test_watched_queries_stay_in_order(model: Any, parts: list[int]) -> None:
    cache = bench.filled_cache(CASE, model.config, bench.policies(CASE)["snap_kv"], block=False)
    layer = cache.kept[0]
    seen = layer._newest(slice(3)).clone()
    for count in parts:
        new = torch.randn(3, 4, count, 8)
        layer._remember(new)
        seen = torch.cat([seen, new], 2)
        assert torch.equal(layer._newest(slice(3)), seen[:, :, -32:])
        assert torch.equal(layer._newest(1), seen[1, :, -32:])
    layer._add_queries(torch.full((2, 4, 32, 8), 5.0), first=3)
    assert torch.equal(layer._newest(slice(3)), seen[:, :, -32:])
    assert (layer._newest(slice(3, 5)) == 5).all()
    assert layer.size.now == bench.cache_bytes(cache)


def test_numbers_of_several_new_tokens(model: Any) -> None:
    cache = bench.filled_cache(CASE, model.config, bench.policies(CASE)["streaming_llm"], block=False)
    lengths = torch.tensor(CASE.lengths(CASE.length))
    for count in (1, 3, 2):
        new = torch.zeros(3, 2, count, 8)
        for layer in range(2):
            cache.update(new, new, layer)
        lengths = lengths + count
        layer = cache.kept[1]
        found = layer.tracks["positions"][:, :, layer.end - count : layer.end]
        assert torch.equal(found, (lengths[:, None, None] - count + torch.arange(count)).expand(3, 2, -1).int())


# ---- rounds and figures


def seconds(*values: float) -> Any:
    return bench.Rounds([(bench.Seconds(value, value / 2), bench.Seconds(value, value / 2)) for value in values])


def test_a_linear_drift_cancels_in_a_round(monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []
    clock = [0.0]

    class Drifting:
        steps, policy, cache = 2, None, DynamicCache()

        def __init__(self, case: Any, model: Any, name: str, steps: int) -> None:
            self.name, self.cost = name, {"dense": 8.0, "dense_block": 4.0, "streaming_llm": 1.0}[name]

        def block(self, steps: int) -> Any:
            order.append(self.name)
            clock[0] += 1
            return bench.Seconds(self.cost * (1 + 0.1 * clock[0]), self.cost)

        def catch_up(self) -> None:
            pass

    monkeypatch.setattr(bench, "Decoder", Drifting)
    names = ["dense", "dense_block", "streaming_llm"]
    found, held = bench.measure_steps(CASE, None, names, 3, 8)
    assert order[3:] == [
        *("dense", "dense_block", "streaming_llm", "streaming_llm", "dense_block", "dense"),
        *("dense_block", "streaming_llm", "dense", "dense", "streaming_llm", "dense_block"),
        *("streaming_llm", "dense", "dense_block", "dense_block", "dense", "streaming_llm"),
    ]
    for clock_name in bench.CLOCKS:
        assert bench.speeds(found["dense"], found["streaming_llm"], clock_name) == pytest.approx([8.0] * 3)
    assert held["dense"] == {"bytes_at_length": 0, "bytes": 0, "tokens": 2}


def test_figures_of_known_seconds_and_bytes() -> None:
    held = {
        "dense": {"bytes_at_length": 800, "bytes": 1000, "tokens": 9},
        "dense_block": {"bytes_at_length": 900, "bytes": 1100, "tokens": 9},
        "streaming_llm": {"bytes_at_length": 100, "bytes": 125, "tokens": 9},
    }
    found = {"dense": seconds(8, 9, 10), "dense_block": seconds(4, 4, 4), "streaming_llm": seconds(1, 1.5, 1)}
    arms = bench.figures(found, held, 8, "wall")
    record = arms["streaming_llm"]
    assert record["speed"]["median"] == 8 and record["speed_to_block"]["median"] == 4
    assert record["speed"]["low"] == 6 and record["speed"]["high"] == 10
    assert record["milliseconds_per_step"] == pytest.approx(125)
    assert record["milliseconds_by_round"]["cpu"] == pytest.approx([62.5, 93.75, 62.5])
    assert record["memory_ratio"] == 0.125 and record["memory_ratio_at_length"] == 125 / 800
    assert arms["dense"]["speed"]["median"] == 1
    table = bench.markdown(arms, 64)
    assert "| streaming_llm | 125.00 | 8.00 [6.00, 10.00] | 4.00 [2.67, 4.00] | 0.0 | 1/8.00 | 1/6.40 |" in table
    assert "prefill" not in table and "generate" not in table


def test_interval_of_a_median() -> None:
    assert bench.interval([3.0]) == {"median": 3.0, "low": None, "high": None}
    found = bench.interval([1.0, 2.0, 3.0, 4.0, 50.0])
    assert found["median"] == 3 and found["low"] == 1 and found["high"] == 50


# ---- bounds


def arm(speed: float, memory: float) -> dict[str, Any]:
    return {"speed": {"median": speed}, "memory_ratio": memory}


@pytest.mark.parametrize(
    ("length", "arms", "words"),
    [
        (4096, {"streaming_llm": arm(6, 1 / 7), "h2o_window": arm(4, 1 / 7)}, []),
        (4096, {"streaming_llm": arm(5.99, 0.1)}, ["streaming_llm: a step is 5.99 times"]),
        (4096, {"h2o_window": arm(3.9, 0.1)}, ["h2o_window: a step is 3.90 times"]),
        (4096, {"h2o_window": arm(9, 0.15)}, ["h2o_window: the cache takes 1/6.67 of dense, at most 1/7"]),
        (4096, {"streaming_llm": arm(float("nan"), 1)}, ["a step is nan", "the cache takes 1/1.00"]),
        (4096, {"h2o_all": arm(0.1, 3)}, []),
        (16384, {"streaming_llm": arm(14.9, 3), "h2o_window": arm(1, 3)}, ["at least 15 wanted"]),
        (16384, {"streaming_llm": arm(15, 3)}, []),
        (2048, {"streaming_llm": arm(0.1, 3)}, []),
    ],
)
def test_what_is_missed(length: int, arms: dict[str, Any], words: list[str]) -> None:
    missed = bench.failures(arms, bench.limits(bench.Case(length=length)))
    assert len(missed) == len(words)
    assert all(word in line for word, line in zip(words, missed, strict=True))


def test_bounds_belong_to_their_case_alone() -> None:
    assert set(bench.limits(bench.Case(length=4096))) == {"streaming_llm", "h2o_window"}
    for other in ({"budget": 256}, {"batch": 8}, {"interval": 128}, {"shape": "0.5b"}, {"device": "cuda"}):
        assert bench.limits(bench.Case(length=4096, **other)) == {}
    assert bench.unjudged({}, {}) == ["this case has no bounds; --help names those that have"]
    assert bench.unjudged({"h2o_window": {}}, bench.LIMITS[4096]) == ["streaming_llm: not among the arms"]


# ---- the command


def test_a_run_reports_what_it_promises(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "figures.json"
    assert bench.main([*TINY, *WHOLE, "--arms", "streaming_llm,h2o_window", "--json", str(file), "--check"]) == 0
    text, record = capsys.readouterr().out, json.loads(file.read_text())
    assert text.count("| streaming_llm |") == 3 and "bytes after 18 tokens more" in text
    assert "not judged: this case has no bounds" in text
    assert record["case"]["length"] == 96 and record["settings"]["clock"] == "wall" and record["missed"] == []
    assert list(record["arms"]) == ["dense", "dense_block", "streaming_llm", "h2o_window"]
    for name, own in record["arms"].items():
        assert own["tokens"] == 18 and own["bytes"] > 0 and own["milliseconds_per_step"] > 0
        assert len(own["milliseconds_by_round"]["cpu"]) == 1 and own["speed"]["median"] > 0
        assert own["prefill"]["seconds"] > 0 and own["prefill"]["cache_peak_bytes"] > 0
        assert set(own["generation"]) == {
            "dense": {"generate"},
            "dense_block": {"loop"},
        }.get(name, {"generate", "loop", "equal_rows"})
    assert record["arms"]["h2o_window"]["memory_ratio"] < record["arms"]["dense"]["memory_ratio"] == 1
    assert record["arms"]["streaming_llm"]["generation"]["equal_rows"] == 1


@pytest.mark.parametrize(("speed", "status"), [(1e9, 1), (1e-9, 0)])
def test_the_check_decides_the_exit_status(
    speed: float, status: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(bench, "limits", lambda case: {"streaming_llm": bench.Limit(speed=speed)})
    assert bench.main([*TINY, *NO_WHOLE, "--arms", "streaming_llm", "--check"]) == status
    assert ("MISSED streaming_llm" in capsys.readouterr().out) == bool(status)
    if status:
        assert bench.main([*TINY, *NO_WHOLE, "--arms", "streaming_llm"]) == 0  # nobody asked


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--arms", "h3o"], "--arms h3o unknown; allowed: dense"),
        (["--length", "500"], "--budget 512 must be below the shortest row's 450 tokens; raise --length"),
        (["--budget", "20"], "--budget 20: budget=20 must be above window=32"),
        (["--interval", "0"], "--interval 0 must be at least 1"),
        (["--whole-repetitions", "0"], "--whole-repetitions 0 must be at least 1"),
        (["--prefill", "-1"], "--prefill -1 must be at least 0"),
    ],
)
def test_options_that_are_refused(options: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as error:
        bench.main(["--device", "cpu", *options])
    assert error.value.code == 2 and words in capsys.readouterr().err


def test_options_that_are_filled_in() -> None:
    options = bench.arguments(["--device", "cpu", "--arms", "r_kv", "--length", "800"])
    assert options.arms == ["dense", "dense_block", "r_kv"] and options.prefill == options.prompt == 800
    assert options.case == bench.Case(length=800)
    assert bench.arguments(["--device", "cuda"]).shape == "0.5b"


def test_help_says_what_is_left_out(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as error:
        bench.main(["--help"])
    text = capsys.readouterr().out
    assert error.value.code == 0 and "Left out" in text and "random keys and values" in text and "--check" in text
