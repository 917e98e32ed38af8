"""`scripts/bench_quant.py` at its smallest: arms, rounds, errors, figures, tables and exit status."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from tests_support import load_script

from rltok.quant.spec import BACKEND_BITS

bench = load_script("bench_quant")
MISSING = {"fp8_scaled_mm": "GPU", "torchao_int8": "rltok[quant]"}
"""arms that may not run here, and a word of the reason"""
SHAPE = bench.PRESETS["tiny"]
CASE = bench.Case(SHAPE, batches=(1, 2), prompt=3, prefill=8)
ERRORS = {"weight_error", "tokens", "logit_difference", "kl", "top1", "k1", "k3", "ess", "truncated", "max_abs_diff"}


@pytest.fixture(scope="module")
def policies() -> dict[str, Any]:
    return bench.build_policies(SHAPE, 64, "cpu")


@pytest.fixture(scope="module")
def record(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What `--quick` writes."""
    file = tmp_path_factory.mktemp("quant") / "figures.json"
    assert bench.main(["--quick", "--device", "cpu", "--json", str(file)]) == 0
    return json.loads(file.read_text())


# ---- arms


def test_every_backend_is_an_arm_and_every_policy_a_baseline() -> None:
    specs = [arm.spec for arm in bench.ARMS.values() if arm.spec is not None]
    assert {spec.backend for spec in specs} == set(BACKEND_BITS)
    assert {(spec.bits, spec.group_size) for spec in specs if spec.backend == "torch"} == {(8, None), (4, 32), (4, 128)}
    assert any(spec.hold_dequantized for spec in specs)
    assert [name for name, arm in bench.ARMS.items() if arm.spec is None] == list(bench.BASES)


def test_the_presets_have_the_sizes_that_they_are_named_after() -> None:
    with torch.device("meta"):
        sizes = {
            name: bench.counted(bench.build_policies(shape, 8, "meta")["bf16"])
            for name, shape in bench.PRESETS.items()
            if name != "tiny"
        }
    assert sizes["115m"]["all"] == pytest.approx(115e6, rel=0.01)
    assert sizes["0.5b"]["all"] == 494_032_768  # Qwen2.5-0.5B
    shares = [size["head"] / size["all"] for size in sizes.values()]
    assert shares[0] == pytest.approx(shares[1], abs=0.01)


def test_both_policies_have_the_same_weights(policies: dict[str, Any]) -> None:
    full, half = (policies[name].state_dict() for name in ("fp32", "bf16"))
    assert all(torch.equal(weight.bfloat16(), half[name]) for name, weight in full.items())
    frequencies = [policies[name].model.rotary_emb.inv_freq for name in ("fp32", "bf16")]
    assert torch.equal(*frequencies)  # a cast of the whole model would round them


def test_what_is_refused_has_a_reason_and_what_breaks_is_reported(
    policies: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    running, others, failed = bench.make_samplers(["bf16", "fp8_scaled_mm", "torch_int8"], policies, "cpu")
    assert list(running) == ["bf16", "torch_int8"] and failed == []
    assert "needs a GPU of capability 8.9" in others["fp8_scaled_mm"]["reason"]

    def broken(*_: Any) -> None:
        raise RuntimeError("no such kernel")

    monkeypatch.setattr(bench, "QuantizedShadow", broken)
    running, others, failed = bench.make_samplers(["bf16", "torch_int8"], policies, "cpu")
    assert list(running) == ["bf16"] and others["torch_int8"]["reason"] == "fails: RuntimeError: no such kernel"
    assert failed == ["torch_int8 fails: no such kernel"]


def test_bytes_of_a_shadow_and_of_what_it_stands_for(policies: dict[str, Any]) -> None:
    held = bench.tensor_bytes(bench.make_sampler(bench.ARMS["torch_int8"], policies, "cpu"))
    weights = bench.counted(policies["bf16"])
    rows = sum(policies["bf16"].get_submodule(n).weight.size(0) for n in bench.decoder_linears(policies["bf16"]))
    assert held["replaced_bytes"] == 2 * weights["quantised"]
    assert held["shadow_bytes"] == weights["quantised"] + 2 * rows
    assert held["policy_bytes"] == 2 * weights["all"]


# ---- rounds


def rounds(tokens: int, *seconds: float) -> Any:
    return bench.Rounds(tokens, [((value, value / 2), (value, value / 2)) for value in seconds])


def test_a_linear_drift_cancels_in_a_round() -> None:
    order: list[str] = []

    def block(name: str, cost: float) -> Any:
        def run() -> tuple[float, float]:
            order.append(name)
            return cost * (1 + 0.1 * len(order)), cost

        return run

    costs = {"fp32": 8.0, "bf16": 4.0, "aten_int8": 1.0}
    blocks = {name: block(name, cost) for name, cost in costs.items()}
    found = bench.measure_turns(blocks, dict.fromkeys(costs, 10), 3, math.inf)
    assert order == [
        *("fp32", "bf16", "aten_int8", "aten_int8", "bf16", "fp32"),
        *("bf16", "aten_int8", "fp32", "fp32", "aten_int8", "bf16"),
        *("aten_int8", "fp32", "bf16", "bf16", "fp32", "aten_int8"),
    ]
    own = bench.speed_figures(found, "wall")["aten_int8"]
    assert own["to_fp32"]["median"] == pytest.approx(8) and own["to_bf16"]["low"] == pytest.approx(4)


def test_a_slow_arm_has_one_round_and_a_baseline_all() -> None:
    costs = {"fp32": 9.0, "bf16": 0.5, "aten_int8_fp32": 3.0, "aten_int8": 1.0}
    calls = dict.fromkeys(costs, 0)

    def block(name: str) -> Any:
        def run() -> tuple[float, float]:
            calls[name] += 1
            return costs[name], costs[name]

        return run

    found = bench.measure_turns({name: block(name) for name in costs}, dict.fromkeys(costs, 1), 3, 5.0)
    assert calls == {"fp32": 6, "bf16": 6, "aten_int8_fp32": 2, "aten_int8": 6}
    own = bench.speed_figures(found, "wall")["aten_int8_fp32"]
    assert own["rounds"] == 1 and own["to_fp32"] == {"median": 3.0, "low": None, "high": None}


def test_figures_of_known_seconds() -> None:
    found = {"fp32": rounds(8, 8, 9, 10), "bf16": rounds(16, 8, 8, 8), "aten_int8": rounds(32, 8, 12, 8)}
    wall, cpu = (bench.speed_figures(found, clock)["aten_int8"] for clock in bench.CLOCKS)
    assert wall["tokens_per_second"] == 4 and cpu["tokens_per_second"] == 8
    assert wall["to_bf16"]["median"] == 2 and wall["to_bf16"]["low"] == pytest.approx(4 / 3)
    assert wall["to_fp32"]["median"] == 4  # 4, 3, 5 by round
    assert wall["seconds_per_token"] == {"wall": [0.25, 0.375, 0.25], "cpu": [0.125, 0.1875, 0.125]}
    assert found["bf16"].seconds("wall") == 48


@pytest.mark.parametrize(
    ("refresh", "shadow", "policy", "tokens"),
    [(2.0, 0.1, 0.2, 20.0), (0.0, 0.1, 0.2, 0.0), (2.0, 0.2, 0.2, None), (2.0, 0.3, 0.2, None)],
)
def test_when_a_refresh_pays(refresh: float, shadow: float, policy: float, tokens: float | None) -> None:
    assert bench.pays_after(refresh, shadow, policy) == (None if tokens is None else pytest.approx(tokens))


def test_a_refresh_is_set_against_the_policy_of_the_arm() -> None:
    def decode(speed: float, fp32: float, bf16: tuple[float, float | None]) -> dict[str, Any]:
        ratios = {"to_fp32": {"median": fp32, "low": fp32}, "to_bf16": dict(zip(("median", "low"), bf16, strict=True))}
        return {"decode": {"8": {"tokens_per_second": speed} | ratios}}

    arms = {
        "fp32": decode(10, 1, (0.5, 0.5)),
        "bf16": decode(20, 2, (1, 1)),
        "aten_int8": decode(40, 4, (2, 1.9)),
        "torchao_int8": decode(40, 4, (2, None)),
        "held_int8": decode(21, 2.1, (1.05, 0.99)),
        "aten_int8_fp32": decode(5, 0.5, (0.25, 0.25)),
    }
    seconds = {"all": [(3.0, 1.0), (1.0, 1.0), (2.0, 1.0)], "few": [(0.5, 0.5)], "nothing": [(0.25, 0.25)]}
    bench.add_refresh(arms, dict.fromkeys(list(arms)[2:], seconds), "wall")
    assert arms["aten_int8"]["refresh"] == {"all": 2.0, "few": 0.5, "nothing": 0.25}
    for name in ("aten_int8", "torchao_int8"):
        assert arms[name]["pays_after"]["8"] == pytest.approx(2 / (1 / 20 - 1 / 40))
    assert arms["held_int8"]["pays_after"]["8"] is None, "as fast as its policy, for all that is known"
    assert arms["aten_int8_fp32"]["pays_after"]["8"] is None


@pytest.mark.parametrize(("seconds", "block", "steps"), [(0.1, 0.4, 4), (0.3, 0.4, 2), (9.0, 0.4, 1), (1e-6, 0.4, 64)])
def test_steps_that_fill_a_block(seconds: float, block: float, steps: int) -> None:
    assert bench.steps_of(seconds, block) == steps


def test_a_clock_leaves_the_prompt_out(monkeypatch: pytest.MonkeyPatch) -> None:
    times = iter([(5.0, 1.0), (9.0, 2.5)])
    monkeypatch.setattr(bench, "now", lambda device: next(times))
    clock = bench.StepClock("cpu", 4)
    for _ in range(4):
        clock(None)
    assert clock.between == (4.0, 1.5)


def test_decoding_makes_the_steps_that_are_counted(policies: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    made = []
    original = bench.generate_rows

    def counted(*args: Any, **kwargs: Any) -> Any:
        made.append(original(*args, **kwargs))
        return made[-1]

    monkeypatch.setattr(bench, "generate_rows", counted)
    sampler = bench.make_sampler(bench.ARMS["bf16"], policies, "cpu")
    wall, _ = bench.decode(CASE, sampler, 3, 5)
    assert wall > 0 and made[0].metrics.computed_rows == 3 * 5 and made[0].metrics.prefill_tokens == CASE.prompt


def test_a_refresh_follows_what_moved() -> None:
    policies = bench.build_policies(SHAPE, 64, "cpu")
    one, other = (bench.make_sampler(bench.ARMS[name], policies, "cpu") for name in ("torch_int8", "aten_int8"))
    for sampler in (one, other, one):  # each finds the policy moved by the one before
        assert set(bench.refresh_once(CASE, sampler)) == {"nothing", "few", "all"}
        assert sampler.shadow.last.refreshed == sampler.shadow.last.layers == 7 * SHAPE.layers
        assert sampler.shadow.last.changed > 0.1
        assert bench.weight_error(sampler.policy, sampler.module) < 0.02


def test_a_sync_that_overlooks_a_layer_is_noticed(policies: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    sampler = bench.make_sampler(bench.ARMS["torch_int8"], policies, "cpu")
    monkeypatch.setattr(bench, "move", lambda policy, names: None)
    with pytest.raises(RuntimeError, match="7 layers had moved, and sync refreshed 0"):
        bench.refresh_once(CASE, sampler)


# ---- errors


def test_logit_errors_of_known_distributions() -> None:
    p, q = torch.tensor([[0.5, 0.25, 0.25], [0.8, 0.1, 0.1]]), torch.tensor([[0.25, 0.5, 0.25], [0.8, 0.1, 0.1]])
    sums = bench.logit_errors(p.log(), q.log())
    assert float(sums["kl"]) == pytest.approx(0.25 * math.log(2))
    assert float(sums["top1"]) == 1
    assert float(sums["logit_difference"]) == pytest.approx(2 * math.log(2) / 3)


def test_scored_rows_are_those_of_each_row_alone(policies: dict[str, Any]) -> None:
    rows = [([2, 3, 4], [5, 6]), ([7], [8, 9, 10]), ([11, 12], [13])]
    rows += [([20 + i], [30, 31]) for i in range(bench.SCORED_ROWS)]
    parts = list(bench.scored(policies["fp32"], rows))
    logits, ids = torch.cat([part[0] for part in parts]), torch.cat([part[1] for part in parts])
    assert ids.tolist() == [token for _, new in rows for token in new]
    with torch.no_grad():
        alone = [policies["fp32"](torch.tensor([p + n])).logits[0, len(p) - 1 : -1] for p, n in rows]
    assert torch.allclose(logits, torch.cat(alone), atol=1e-5)


def test_a_sampler_has_no_error_against_itself_and_int4_more_than_int8(policies: dict[str, Any]) -> None:
    text = bench.Text(bench.random_rows(CASE, 3, 4), 5)
    names = ["fp32", "bf16", "torch_int8_fp32", "torch_int4_g128"]
    samplers, _, _ = bench.make_samplers(names, policies, "cpu")
    found = bench.measure_errors(samplers, text)
    assert found["fp32"]["tokens"] == 15 and found["fp32"]["top1"] == 1
    assert found["fp32"]["weight_error"] == found["fp32"]["kl"] == found["fp32"]["logit_difference"] == 0
    assert found["fp32"]["k3"] < 1e-10 and found["fp32"]["ess"] == pytest.approx(1)
    assert found["bf16, itself"]["kl"] == 0 < found["bf16"]["kl"]
    assert 0.005 < found["torch_int8_fp32"]["weight_error"] < 0.008 < 0.1 < found["torch_int4_g128"]["weight_error"]
    assert found["torch_int8_fp32"]["kl"] < found["torch_int4_g128"]["kl"]
    assert found["torch_int8_fp32"]["k3"] < found["torch_int4_g128"]["k3"]


def test_weight_error_is_relative_to_all_weights_together(policies: dict[str, Any]) -> None:
    other = bench.build_policies(SHAPE, 64, "cpu")["fp32"]
    with torch.no_grad():
        for name in bench.decoder_linears(other):
            other.get_submodule(name).weight.mul_(1.5)
        other.lm_head.weight.zero_()  # the head is not counted
    assert bench.weight_error(policies["fp32"], other) == pytest.approx(0.5)


# ---- the machine


@pytest.mark.parametrize(
    ("facts", "threads", "words"),
    [
        ({"load": 0.1, "cpu_share": 0.99, "device_kind": "cpu"}, 1, []),
        ({"load": 1.5, "cpu_share": 0.99, "device_kind": "cpu"}, 1, ["load average was 1.50"]),
        ({"load": None, "cpu_share": 0.5, "device_kind": "cpu"}, 1, ["50% of the measured time"]),
        ({"load": 0.7, "cpu_share": 0.5, "device_kind": "cpu"}, 2, ["load average was 0.70"]),
        ({"load": 0.1, "cpu_share": 0.5, "device_kind": "cuda"}, 1, []),
    ],
)
def test_a_disturbed_run_says_so(facts: dict[str, Any], threads: int, words: list[str]) -> None:
    found = bench.disturbances(facts, threads)
    assert len(found) == len(words) and all(word in line for word, line in zip(words, found, strict=True))


# ---- the command


def test_every_arm_has_figures_or_a_reason(record: dict[str, Any]) -> None:
    assert list(record["arms"]) == list(bench.ARMS)
    for name, own in record["arms"].items():
        if "reason" in own:
            assert MISSING[name] in own["reason"]
            continue
        assert set(own["decode"]) == {"1", "3"}
        for speed in (*own["decode"].values(), own["prefill"]):
            assert speed["tokens_per_second"] > 0 and speed["to_bf16"]["median"] > 0 and speed["rounds"] == 2
        for kind in ("random", "reasoner"):
            assert set(own["errors"][kind]) == ERRORS and own["errors"][kind]["tokens"] > 0
        if bench.ARMS[name].spec is not None:
            assert set(own["refresh"]) == {"all", "few", "nothing"} and min(own["refresh"].values()) > 0
            assert set(own["pays_after"]) == {"1", "3"} and own["shadow_bytes"] > 0
    assert set(record["arms"]["bf16"]["floor"]) == {"random", "reasoner"}
    arms = record["arms"]
    assert arms["torch_int8"]["shadow_bytes"] < arms["torch_int8"]["replaced_bytes"] < arms["held_int8"]["shadow_bytes"]
    assert arms["torch_int4_g128"]["shadow_bytes"] < arms["torch_int4_g32"]["shadow_bytes"]
    assert record["machine"]["parameters"]["all"] > record["machine"]["parameters"]["quantised"]
    assert record["settings"]["command"].startswith("python scripts/bench_quant.py --quick")


def test_the_section_of_the_documentation_comes_from_the_file(
    record: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    record["arms"]["aten_int8"]["decode"]["3"] |= {
        "tokens_per_second": 123.44,
        "to_bf16": {"median": 1.5, "low": 1.25, "high": 1.75},
        "to_fp32": {"median": 2.0, "low": None, "high": None},
    }
    record["arms"]["aten_int8"] |= {
        "pays_after": {"1": None, "3": 345.6},
        "shadow_bytes": 2**19,
        "replaced_bytes": 2**20,
    }
    record["machine"]["disturbed"] = ["somebody compiles"]
    file = tmp_path / "figures.json"
    file.write_text(json.dumps(record))
    assert bench.main(["--read", str(file), "--markdown"]) == 0
    text = capsys.readouterr().out
    assert "| 123.4 | 1.50 [1.25, 1.75] | 2.00 |" in text and "| never | 346 | 0.5 | 0.50 |" in text
    assert "DISTURBED: somebody compiles." in text and "| fp8_scaled_mm | model.layers.0" in text
    assert "| tiny reasoner |" in text and "| random weights |" in text and "| bf16, itself |" in text
    widths = [[line.count(" | ") for line in table.splitlines()] for table in text.split("\n\n") if table[0] == "|"]
    assert len(widths) == 5 and all(len(set(table)) == 1 for table in widths)


def test_a_broken_arm_ends_the_run_with_1(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    original = bench.make_sampler

    def broken(arm: Any, *rest: Any) -> Any:
        if arm.spec is not None and arm.spec.backend == "fp8":
            raise RuntimeError("no such kernel")
        return original(arm, *rest)

    monkeypatch.setattr(bench, "make_sampler", broken)
    options = ["--arms", "torch_int8,fp8", "--batches", "1", "--random-prompts", "0", "--error-prompts", "0"]
    assert bench.main(["--quick", "--device", "cpu", *options]) == 1
    text = capsys.readouterr().out
    assert "MISSED fp8 fails: no such kernel" in text and "| fp8 | fails: RuntimeError" in text
    assert "| torch_int8 |" in text and "tiny reasoner" not in text


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--arms", "int3"], "--arms int3 unknown; allowed: fp32, bf16"),
        (["--batches", "1,x"], "--batches 1,x must be different whole numbers >= 1"),
        (["--batches", "2,2"], "--batches 2,2 must be different"),
        (["--repetitions", "0"], "--repetitions 0 must be at least 1"),
        (["--prefill", "3"], "--prefill 3 must be at least 4"),
        (["--block", "0"], "--block 0.0 must be above 0 seconds"),
        (["--error-prompts", "-1"], "--error-prompts -1 must be at least 0"),
        (["--few", "11"], "--few 11 is above the 10 layers"),
        (["--hidden", "700"], "--hidden 700 must be a multiple of twice --heads 12"),
        (["--kv-heads", "5"], "--heads 12 must be a multiple of --kv-heads 5"),
        (["--layers", "0"], "sizes must be at least 1"),
    ],
)
def test_options_that_are_refused(options: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as error:
        bench.main(["--device", "cpu", *options])
    assert error.value.code == 2 and words in capsys.readouterr().err


def test_options_that_are_filled_in() -> None:
    options = bench.arguments(["--device", "cpu", "--arms", "fp8", "--vocab", "1000", "--layers", "3"])
    assert options.names == ["fp32", "bf16", "fp8"] and options.repetitions == 3
    assert (options.case.shape.layers, options.case.shape.vocabulary, options.case.shape.hidden) == (3, 1000, 768)
    assert bench.arguments(["--device", "cuda"]).preset == "0.5b"
    assert bench.arguments(["--quick", "--repetitions", "3"]).repetitions == 3
    assert bench.arguments([]).case.batches == (1, 8, 64)
