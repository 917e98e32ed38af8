"""`scripts/bench_decoding.py` at its smallest: every method takes part and is measured, and the figures are whole."""

from __future__ import annotations

import json

import pytest
from tests_support import load_script

from rltok.sampling import DECODING

script = load_script("bench_decoding")


def test_figures_of_a_tiny_run(tmp_path, capsys):
    out = tmp_path / "figures.json"
    script.main(["--tiny", "--device", "cpu", "--out", str(out)])
    record = json.loads(out.read_text())
    assert set(record["inside_s"]) == {*DECODING, "recorder"}
    assert all(seconds > 0 for seconds in record["inside_s"].values())
    assert len(record["ratio"]) == len(record["plain_s"]) == record["settings"]["repetitions"]
    for ratio, plain, everything in zip(record["ratio"], record["plain_s"], record["all_s"], strict=True):
        assert ratio == pytest.approx(everything / plain)
    assert record["command"] == "python scripts/bench_decoding.py --tiny --device cpu"
    assert str(tmp_path) not in out.read_text()
    assert "share of a plain step" in capsys.readouterr().out


def test_every_processor_acts_on_the_measured_steps():
    options = script.arguments(["--tiny", "--device", "cpu"])
    bench, tokenizer = script.Bench(options), script.build_tokenizer(options.vocabulary)
    made = script.build_processors(options, tokenizer)
    assert list(made)[-2:] == ["budget_forcing", "adaptive_temperature"]  # after what biases words, and last
    assert not any(processor.is_neutral for processor in made.values())
    assert len(tokenizer) == bench.model.config.vocab_size
    steps = bench.generate(list(made.values()))
    assert len(steps) == options.steps
    assert made["budget_forcing"].metrics() == {"budget_ends_ignored": 0.0, "budget_cut": 1.0}
    assert (made["adaptive_temperature"].factors() != 1).any()
    assert made["cyclic_reflex"].trace()["bias"].abs().max() > 0
    assert made["thought_switching"].trace()["bias"].abs().max() > 0


def test_a_step_is_the_time_between_two_calls():
    times = iter([1.0, 1.5, 3.0])
    clock = script.Clock(lambda: next(times))
    for _ in range(3):
        clock(None, None)
    assert clock.steps == [0.5, 1.5]


def test_options():
    assert script.arguments([]).vocabulary == 151936
    assert script.arguments(["--tiny"]).vocabulary == 2048
    assert script.arguments(["--tiny", "--batch", "2"]).batch == 2
    with pytest.raises(SystemExit):
        script.arguments(["--steps", "1"])
