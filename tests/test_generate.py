"""Decoding outside of training: `rltok generate`, decoding and steering in evaluation, statistics for temperatures."""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from rich.console import Console
from tests_support import build_model, build_tokenizer
from transformers import LogitsProcessorList, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

import rltok.complete
from rltok.attend import read_completions
from rltok.best_of import choose, reward_set, total_rewards
from rltok.cli import main
from rltok.complete import CompletionSettings, complete, completed_ids, end_ids, isolated_rng
from rltok.config import ConfigError
from rltok.entropy import EntropyStats, entropy_stats
from rltok.evaluate import evaluate
from rltok.generate import GenerateOptions, Sampling, fit_context, resolve_sampling, run_generate
from rltok.generate import generate as generate_all
from rltok.generation_files import Generated, token_traces
from rltok.models import TINY, ModelConfig, load_model, load_tokenizer
from rltok.prompts import prompt_tokens
from rltok.recipe import load_decoding, load_recipe
from rltok.rewards import build_rewards
from rltok.rollout import build_decoding
from rltok.run import RunDirectory, evaluate_path, evaluation_entropy, evaluation_options, train
from rltok.sampler_stats import CALIBRATION_ROWS, SavedStats, calibrate_entropy, checkpoint_stats
from rltok.sampling import (
    AdaptiveTemperature,
    AdaptiveTemperatureConfig,
    CyclicReflexConfig,
    CyclicReflexLogitsProcessor,
    DecodingContext,
    RolloutProcessor,
    SampledLogps,
    adaptive_temperature,
    make_processors,
    row_entropy,
    sampling_control,
    triangular_wave,
)

QUESTIONS = ("compute 3 + 4", "compute 12 + 7 - 5 + 6", "make 12 from 3, 4", "compute 9 - 2 - 3")
WAVE: dict[str, Any] = {
    "type": "cyclic_reflex",
    "words": [";", "<think>"],
    "period": 9.0,
    "phase": 0.25,
    "amplitude": 3.0,
}
NO_END: dict[str, Any] = {"think_end": None}
"""The wave is everywhere."""
WARM: dict[str, Any] = {"type": "adaptive_temperature", "tau": 0.2}
STATS = EntropyStats(*(torch.tensor(x) for x in (-1.0, -6.0, 0.5, 1.5)), torch.tensor(50))


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(ModelConfig(path=TINY))


@pytest.fixture(scope="module")
def model():
    return load_model(ModelConfig(path=TINY)).eval()


@pytest.fixture(scope="module")
def prompts(tokenizer) -> list[list[int]]:
    return [prompt_tokens(tokenizer, [{"role": "user", "content": text}])[1] for text in QUESTIONS]


@pytest.fixture
def decoding_file(tmp_path: Path) -> Path:
    """A recipe of nothing but decoding."""
    path = tmp_path / "decoding.yaml"
    path.write_text(yaml.safe_dump({"decoding": [WAVE | NO_END, WARM]}))
    return path


def run_cli(*arguments: object) -> int:
    """Exit status of a command in this process."""
    with pytest.raises(SystemExit) as caught:
        main([str(argument) for argument in arguments])
    return int(caught.value.code or 0)


def made(folder: Path) -> tuple[list[dict[str, Any]], pd.DataFrame, dict[str, Any]]:
    """What a call wrote."""
    lines = [json.loads(line) for line in (folder / "generations.jsonl").read_text().splitlines()]
    return lines, pd.read_parquet(folder / "tokens.parquet"), json.loads((folder / "generation.json").read_text())


def asked(*options: object) -> list[object]:
    """Arguments of `rltok generate` for all questions."""
    return ["generate", TINY, *(x for text in QUESTIONS for x in ("--prompt", text)), "--chat", *options]


def generate(*args: Any, **options: Any) -> list[Generated]:
    """Completions without what they cost."""
    return generate_all(*args, **options).completions


ENGINES = pytest.mark.parametrize("engine", ["fast", "transformers"])


def plain_generate(model, tokenizer, prompts: Sequence[list[int]], length: int, **sampling: Any) -> list[list[int]]:
    """The ids of transformers' own generate, up to the end token."""
    padded = tokenizer.pad({"input_ids": list(prompts)}, padding_side="left", return_tensors="pt")
    with torch.no_grad():
        out = model.generate(
            input_ids=padded["input_ids"],
            attention_mask=padded["attention_mask"],
            max_new_tokens=length,
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=end_ids(model, tokenizer),
            **sampling,
        )
    rows = out[:, padded["input_ids"].size(1) :].tolist()
    ends = set(end_ids(model, tokenizer))
    return [row[: next((i for i, t in enumerate(row) if t in ends), len(row)) + 1] for row in rows]


def step_logits(model, prompt: list[int], ids: list[int]) -> torch.Tensor:
    """(T, V) logits of every token of a completion, from one pass."""
    with torch.no_grad():
        return model(torch.tensor([prompt + ids])).logits[0, len(prompt) - 1 : -1]


# What is generated


@ENGINES
def test_greedy_is_plain_generate_in_the_order_asked(model, tokenizer, prompts, engine: str) -> None:
    expected = plain_generate(model, tokenizer, prompts, 40, do_sample=False)
    for batch_size in (1, 3, 16):
        settings = Sampling(0.0, max_new_tokens=40, batch_size=batch_size, engine=engine)
        found = generate(model, tokenizer, prompts, (), settings)
        assert [one.ids for one in found] == expected
        assert [one.row for one in found] == [0, 1, 2, 3]
    for prompt, one in zip(prompts, found, strict=True):
        logps = step_logits(model, prompt, one.ids).log_softmax(-1)
        assert one.columns["temperature"] == [None] * len(one.ids)
        np.testing.assert_allclose(one.columns["logp"], [float(logps[t, i]) for t, i in enumerate(one.ids)], atol=1e-5)


def test_sampling_of_transformers_is_plain_generate_with_the_same_seed(model, tokenizer, prompts) -> None:
    settings = Sampling(0.7, 0.9, 20, max_new_tokens=30, seed=5, engine="transformers")
    assert len({len(prompt) for prompt in prompts}) == 4, "batches are sorted by length"
    order = sorted(range(4), key=lambda i: -len(prompts[i]))
    with isolated_rng(5):
        sampling = {"do_sample": True, "temperature": 0.7, "top_p": 0.9, "top_k": 20}
        expected = plain_generate(model, tokenizer, [prompts[i] for i in order], 30, **sampling)
    found, again = (generate(model, tokenizer, prompts, (), settings) for _ in range(2))
    assert [found[i].ids for i in order] == expected
    assert found == again
    assert generate(model, tokenizer, prompts, (), replace(settings, seed=6)) != found


def test_a_sampled_completion_depends_on_seed_prompt_and_number_alone(model, tokenizer, prompts) -> None:
    modules = build_decoding([WAVE, WARM], "decoding")
    settings = Sampling(0.7, 0.9, 20, max_new_tokens=30, seed=5, num_samples=3)
    whole = generate(model, tokenizer, prompts, modules, settings, entropy_stats=STATS)
    assert len({tuple(one.ids) for one in whole}) >= 8
    for batch_size in (1, 5, 64):
        found = generate(
            model, tokenizer, prompts, modules, replace(settings, batch_size=batch_size), entropy_stats=STATS
        )
        assert [one.ids for one in found] == [one.ids for one in whole]
        for one, other in zip(found, whole, strict=True):
            for name in ("logp", "temperature", "wave", "entropy"):
                np.testing.assert_allclose(one.columns[name], other.columns[name], atol=1e-4)
    fewer = replace(settings, num_samples=2, max_new_tokens=12)
    first = generate(model, tokenizer, prompts[:3], modules, fewer, entropy_stats=STATS)
    expected = [one.ids[:12] for one in whole if one.row < 3 and one.sample < 2]
    assert [one.ids for one in first] == expected, "more prompts, samples and tokens change nothing before them"
    other = generate(model, tokenizer, prompts, modules, replace(settings, seed=6), entropy_stats=STATS)
    assert [one.ids for one in other] != [one.ids for one in whole]


@ENGINES
@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_strength_zero_changes_no_bit(model, tokenizer, prompts, temperature: float, engine: str) -> None:
    settings = Sampling(temperature, max_new_tokens=30, num_samples=3, batch_size=5, engine=engine)

    def ids_and_logps(*sections: Mapping[str, Any]) -> list[Any]:
        modules = build_decoding(sections, "decoding")
        found = generate(model, tokenizer, prompts, modules, settings, entropy_stats=STATS)
        return [(one.row, one.sample, one.ids, one.columns["logp"]) for one in found]

    plain = ids_and_logps()
    assert ids_and_logps(WAVE | {"amplitude": 0.0}, WARM | {"tau": 0.0}) == plain
    assert ids_and_logps(WAVE | {"amplitude": 9.0}) != plain
    assert [(row, sample) for row, sample, _, _ in plain] == [(r, s) for r in range(4) for s in range(3)]


def test_random_state_and_mode_are_as_before(model, tokenizer, prompts) -> None:
    model.train()
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    generate(model, tokenizer, prompts[:2], (), Sampling(max_new_tokens=4))
    assert torch.equal(torch.rand(2), expected) and model.training
    model.eval()


@ENGINES
def test_recorded_values_equal_the_pure_functions(
    tokenizer, tmp_path: Path, decoding_file: Path, monkeypatch: pytest.MonkeyPatch, engine: str
) -> None:
    """The files of a whole call, recomputed from the model's logits alone: nothing but the written settings is used.

    In double precision, because padding and cache alone move single-precision logits by several 1e-6.
    """
    model = load_model(ModelConfig(path=TINY)).eval().double()
    monkeypatch.setattr("rltok.generate.load_policy", lambda config: model)
    out = tmp_path / "out"
    sampling = ["--temperature", 0.7, "--top-k", 20, "--top-p", 0.9, "--num-samples", 3, "--batch-size", 5, "--seed", 2]
    sampling += ["--engine", engine]
    assert run_cli(*asked("--decoding", decoding_file, *sampling, "--out", out, "--max-new-tokens", 40)) == 0
    lines, table, facts = made(out)
    stats = EntropyStats(*map(torch.tensor, facts["entropy_stats"]))
    modules = build_decoding(facts["decoding"], "decoding")
    assert facts["sampling"]["engine"] == engine and (facts["cost"] is None) == (engine == "transformers")
    assert [item["type"] for item in facts["decoding"]] == ["cyclic_reflex", "adaptive_temperature"]
    assert facts["decoding"][0]["period"] == 9.0 and facts["decoding"][0]["variants"] == "bare"
    context = DecodingContext(0.7, stats, tokenizer)
    moved = 0
    for line in lines:
        part = table[table["completion"] == line["index"]]
        ids, prompt = line["token_ids"], prompt_tokens(tokenizer, line["prompt"])[1]
        assert part["token_id"].tolist() == ids and part["position"].tolist() == list(range(len(ids)))
        logits = step_logits(model, prompt, ids).float()  # as generate hands them to processors
        chain = LogitsProcessorList(make_processors(modules, context))
        chain += [TemperatureLogitsWarper(0.7), TopKLogitsWarper(20), TopPLogitsWarper(0.9)]
        bias, biased = make_processors(modules[:1], context)[0], []
        for t, token in enumerate(ids):
            before = torch.tensor([prompt + ids[:t]])
            row = logits[t : t + 1]
            logp = chain(before, row).log_softmax(-1)[0, token].item()
            assert part["logp"].iloc[t] == pytest.approx(logp, abs=1e-5)
            biased.append(bias(before, row))
        entropy = row_entropy(torch.cat(biased), 0.7)
        expected = adaptive_temperature(entropy, stats, 0.7, 0.2)
        np.testing.assert_allclose(part["temperature"], expected.numpy(), rtol=1e-4)
        np.testing.assert_allclose(part["entropy"], entropy.numpy(), rtol=1e-3, atol=1e-5)
        wave = triangular_wave(torch.arange(len(ids)), 9.0, 3.0, 0.25).numpy()
        np.testing.assert_allclose(part["wave"], wave, atol=1e-6)
        moved += int((abs(part["temperature"] - 0.7) > 0.05).sum())
    assert moved > 20, "the temperatures must really differ from the base"


def test_wave_is_zero_where_the_row_no_longer_thinks(model, tokenizer, prompts) -> None:
    modules = build_decoding([WAVE], "decoding")
    found = generate(model, tokenizer, prompts, modules, Sampling(0.0, max_new_tokens=40))
    end = tokenizer.convert_tokens_to_ids("</think>")
    for one in found:
        thinks = one.ids.index(end) + 1 if end in one.ids else len(one.ids)
        wave = triangular_wave(torch.arange(len(one.ids)), 9.0, 3.0, 0.25)
        wave[thinks:] = 0
        np.testing.assert_allclose(one.columns["wave"], wave.numpy(), atol=1e-6)
    assert any(end in one.ids[:-2] for one in found)


class Noting(RolloutProcessor):
    """Records under the name of something else."""

    memory = "none"

    def __init__(self, *names: str) -> None:
        self.traced = names

    def apply(self, scores, rows, columns):
        columns.update({name: scores[:, 0] for name in self.traced})
        return scores


def test_other_recorded_values_keep_their_names_unless_two_methods_share_one() -> None:
    first, second = Noting("bias", "forced"), Noting("bias", "logp")
    for processor in (first, second):
        processor(torch.zeros(2, 1, dtype=torch.long), torch.ones(2, 3))
    assert set(token_traces([("tip", first)])) == {"bias", "forced"}
    assert set(token_traces([("tip", first), ("less", second)])) == {"tip_bias", "less_bias", "forced", "less_logp"}


# Files


def test_files_are_complete(tmp_path: Path, tokenizer, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    with warnings.catch_warnings():
        warnings.simplefilter("error", FutureWarning)
        assert run_cli(*asked("--temperature", 0, "--max-new-tokens", 12, "--out", out)) == 0
    shown = capsys.readouterr().out
    assert QUESTIONS[0] in shown and "generations.jsonl" in shown
    assert "tokens/s; prompt tokens computed once: 0 saved" in shown
    lines, table, facts = made(out)
    assert facts["cost"]["tokens"] == facts["tokens"] and facts["cost"]["live_share"] == 1
    assert list(table.columns) == ["completion", "position", "token_id", "token", "logp", "temperature", "wave"]
    assert table["temperature"].isna().all() and (table["wave"] == 0).all() and table["logp"].notna().all()
    assert [line["prompt"][0]["content"] for line in lines] == list(QUESTIONS)
    for index, line in enumerate(lines):
        part = table[table["completion"] == index]
        assert part["token"].tolist() == line["tokens"] and len(part) == line["length"] <= 12
        assert line["completion"] == tokenizer.decode(line["token_ids"], skip_special_tokens=True)
        assert line["ended"] == (line["token_ids"][-1] == tokenizer.eos_token_id)
        assert line["logp"] == pytest.approx(part["logp"].sum())
        assert (line["chosen"], line["rewards"], line["reward"], line["seed"]) == (None, {}, None, None)
        assert line["sampling"]["temperature"] == 0 and line["decoding"] == []
    assert {line["ended"] for line in lines} == {True, False}
    assert facts["completions"] == 4 and facts["tokens"] == len(table) and facts["seed"] is None
    assert facts["checkpoint"] == TINY and {"torch", "transformers", "rltok"} <= set(facts["versions"])
    assert read_completions(out / "generations.jsonl")[2]["tokens"] == lines[2]["tokens"], "`rltok attend` reads them"


def test_prompts_of_a_file_with_columns_for_the_reward(tmp_path: Path) -> None:
    """JSON lines and Parquet alike; the other columns reach the reward, row by row."""
    function = tmp_path / "mine.py"
    function.write_text("def index_of(completions, number, **_):\n    return [float(n) for n in number]\n")
    rows = [{"prompt": text, "number": i, "completion": "x"} for i, text in enumerate(QUESTIONS)]
    pd.DataFrame(rows).to_parquet(tmp_path / "rows.parquet")
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = []
    for name in ("rows.parquet", "rows.jsonl"):
        out = tmp_path / name.replace(".", "_")
        common = ["--prompts", tmp_path / name, "--rows", 3, "--num-samples", 2, "--max-new-tokens", 5]
        assert run_cli("generate", TINY, *common, "--reward", f"{function}:index_of", "--out", out) == 0
        lines, table, facts = made(out)
        assert [line["rewards"] for line in lines] == [{"index_of": float(i)} for i in (0, 0, 1, 1, 2, 2)]
        assert facts["means"] == {"index_of": 1.0, "total": 1.0} and facts["seed"] == 0
        found.append((lines, table.to_dict("records")))
    assert found[0] == found[1]


def test_console_shows_text_of_the_model_as_it_is(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    prompt = "[bold]1[/bold] :smile: [/x]"
    assert run_cli("generate", TINY, "--prompt", prompt, "--max-new-tokens", 2, "--out", tmp_path / "[red]out") == 0
    shown = capsys.readouterr().out
    assert prompt in shown and "[red]out" in shown.replace("\n", "")


@ENGINES
def test_stop_texts_and_the_least_length(model, tokenizer, tmp_path: Path, engine: str) -> None:
    """A completion ends with the first stop text, which it holds; no end token comes before the least length."""
    out, common = tmp_path / "out", ["--temperature", 0, "--max-new-tokens", 40, "--engine", engine]
    assert run_cli(*asked(*common, "--out", out)) == 0
    plain = made(out)[0]
    stops = ["--stop", "</think>", "--stop", ";"]
    assert run_cli(*asked(*common, *stops, "--out", out)) == 0
    lines, table, facts = made(out)
    assert facts["sampling"]["stop_strings"] == ["</think>", ";"] and facts["sampling"]["min_new_tokens"] == 0
    cut = 0
    for line, whole in zip(lines, plain, strict=True):
        text = tokenizer.decode(line["token_ids"])
        stopped = [stop for stop in ("</think>", ";") if stop in text]
        assert line["token_ids"] == whole["token_ids"][: line["length"]]
        assert (table["completion"] == line["index"]).sum() == line["length"]
        assert line["ended"] and (
            text.rstrip().endswith(tuple(stopped)) if stopped else line["length"] == whole["length"]
        )
        cut += line["length"] < whole["length"]
        before = tokenizer.decode(line["token_ids"][:-1])
        assert not any(stop in before for stop in stopped), "the first one ends it"
    assert cut == 2
    limit = min(line["length"] for line in lines if line["length"] < 40 and line["completion"].endswith(";"))
    common[3] = limit
    assert run_cli(*asked(*common, *stops, "--out", out)) == 0
    ends = [(line["length"], line["ended"]) for line in made(out)[0]]
    assert (limit, True) in ends and (limit, False) in ends, "at the limit the text tells"
    common[3] = 40
    assert run_cli(*asked(*common, "--stop", "<|assistant|><think>", "--out", out)) == 0
    (across,) = {(line["length"], line["ended"]) for line in made(out)[0] if line["tokens"][0] == "<think>"}
    assert across == (1, True), "a stop text may begin in the prompt"
    longest = max(line["length"] for line in plain if line["ended"])
    assert run_cli(*asked(*common, "--min-new-tokens", longest + 2, "--out", out)) == 0
    lines, _, facts = made(out)
    assert facts["sampling"]["min_new_tokens"] == longest + 2 and min(line["length"] for line in lines) > longest + 1
    assert all(tokenizer.eos_token_id not in line["token_ids"][: longest + 2] for line in lines)


def test_engine_of_the_recipe_unless_it_is_given(tmp_path: Path) -> None:
    changed = load_recipe("demo", ["rollout.engine=transformers"])
    options = GenerateOptions(TINY, "demo", prompts=("a",), out=tmp_path)
    assert resolve_sampling(options, changed).engine == "transformers"
    assert resolve_sampling(replace(options, engine="fast"), changed).engine == "fast"
    assert resolve_sampling(options, load_recipe("demo")).engine == "fast" == resolve_sampling(options, None).engine


# Best of N


def test_best_of_takes_the_highest_total_and_of_equals_the_first() -> None:
    completions = [Generated(row, sample, [1], {}) for row in range(3) for sample in range(3)]
    nan = float("nan")
    totals = [0.0, 2.0, 2.0, nan, -1.0, -3.0, nan, nan, nan]
    assert choose(completions, totals) == [False, True, False, False, True, False, True, False, False]
    rewards = build_rewards({"a": {"function": "answer_format"}, "b": {"function": "answer_format", "weight": -0.5}})
    weighed = total_rewards({"a": [1.0, nan, nan], "b": [2.0, 3.0, nan]}, rewards)
    assert weighed[:2] == [0.0, -1.5] and weighed[2] != weighed[2]


def test_best_of_n(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    function = tmp_path / "mine.py"
    function.write_text("def shortness(completion_ids, **_):\n    return [-float(len(i)) for i in completion_ids]\n")
    out = tmp_path / "out"
    reward = ["--best-of", 4, "--reward", f"{function}:shortness", "--out", out, "--max-new-tokens", 30]
    assert run_cli(*asked(*reward)) == 0
    lines, _, facts = made(out)
    varied = 0
    assert len(lines) == 16 and facts["best_of"] == 4
    for row in range(4):
        group = [line for line in lines if line["row"] == row]
        lengths = [line["length"] for line in group]
        assert [line["chosen"] for line in group] == [i == lengths.index(min(lengths)) for i in range(4)]
        varied += len(set(lengths)) > 1
    assert varied >= 3
    rewards = [line["reward"] for line in lines]
    assert facts["means"]["total"] == pytest.approx(np.mean(rewards))
    chosen = [line["reward"] for line in lines if line["chosen"]]
    assert facts["means"]["chosen"] == pytest.approx(np.mean(chosen))
    assert facts["means"]["chosen"] > facts["means"]["total"]
    assert "chosen" in capsys.readouterr().out


def test_recipe_gives_data_rewards_and_sampling(tmp_path: Path) -> None:
    """Held-out rows, rewards and their weights, decoding, temperature and length come from a whole recipe."""
    out = tmp_path / "out"
    changes = [
        "training.temperature=0.9",
        "training.max_completion_length=24",
        "data.heldout_size=6",
        "data.train_size=64",
    ]
    recipe = ["--decoding", "demo", "--recipe-data", "--rows", 3, "--best-of", 2, "--out", out]
    assert run_cli("generate", TINY, *changes, *recipe) == 0
    lines, table, facts = made(out)
    expected = {"temperature": 0.9, "top_p": 1.0, "top_k": 0, "max_new_tokens": 24}
    assert expected.items() <= facts["sampling"].items()
    assert facts["rewards"] == {"strict": 1.0, "lenient": 0.0} and len(lines) == 6
    assert facts["decoding"] == load_recipe("demo").rollout["decoding"]
    assert all(line["reward"] == line["rewards"]["strict"] for line in lines)
    assert sum(line["chosen"] for line in lines) == 3 and max(line["length"] for line in lines) <= 24
    assert not np.allclose(table["temperature"], 0.9) and abs(table["temperature"] / 0.9 - 1).max() <= 0.05 + 1e-6
    given = ["--temperature", 0.5, "--top-k", 7, "--top-p", 0.8, "--max-new-tokens", 4]
    assert run_cli("generate", TINY, "--decoding", "demo", "--prompt", "so ", *given, "--out", out) == 0
    assert {"temperature": 0.5, "top_p": 0.8, "top_k": 7, "max_new_tokens": 4}.items() <= made(out)[2][
        "sampling"
    ].items(), "the command line comes before the recipe"


def test_override_of_a_file_of_decoding_alone(decoding_file: Path) -> None:
    plan = load_decoding(decoding_file, ["decoding[0].amplitude=1.5"])
    assert plan.recipe is None and plan.decoding[0]["amplitude"] == 1.5 and plan.decoding[1]["tau"] == 0.2
    with pytest.raises(ConfigError, match="unknown key 'training'.*Allowed: steering, name, decoding"):
        load_decoding(decoding_file, ["training.temperature=0.5"])
    with pytest.raises(ConfigError, match=r"decoding.yaml:\d+.*decoding\[0\]: period=-1.0 must be"):
        decoding_file.write_text(yaml.safe_dump({"decoding": [WAVE | {"period": -1.0}]}))
        load_decoding(decoding_file)


def test_completion_length_fits_the_context(model, prompts) -> None:
    longest = max(map(len, prompts))
    room = model.config.max_position_embeddings - longest
    assert fit_context(Sampling(max_new_tokens=10_000), prompts, model, has_length=False).max_new_tokens == room
    assert fit_context(Sampling(max_new_tokens=room), prompts, model, has_length=True).max_new_tokens == room
    with pytest.raises(ConfigError, match=f"at most --max-new-tokens {room}"):
        fit_context(Sampling(max_new_tokens=room + 1), prompts, model, has_length=True)
    with pytest.raises(ConfigError, match=f"--min-new-tokens {room + 1}: completions have at most {room}"):
        fit_context(Sampling(max_new_tokens=10_000, min_new_tokens=room + 1), prompts, model, has_length=False)
    with pytest.raises(ConfigError, match="shorter prompts"):
        fit_context(Sampling(), [[5] * 256], model, has_length=False)


# Steering


@pytest.fixture
def vectors(tmp_path: Path, model) -> Path:
    """Steering vectors of one layer."""
    from rltok.steering import SteeringVector, describe_model, save_vectors

    width = model.config.hidden_size
    vector = torch.randn(width, generator=torch.Generator().manual_seed(0))
    path = tmp_path / "vectors.safetensors"
    save_vectors(path, [SteeringVector(1, 20 * vector / vector.norm(), 1.0)], describe_model(model, TINY))
    return path


def test_steering_of_a_recipe_acts_and_leaves_no_hook(vectors: Path, model, tokenizer, prompts, tmp_path: Path) -> None:
    from rltok.steering import SteeringConfig

    file = tmp_path / "steered.yaml"
    file.write_text("decoding: []\nsteering: {path: vectors.safetensors}\n")
    assert load_decoding(file).steering["path"] == str(vectors), "relative to the recipe"
    whole = load_decoding("demo", [f"rollout.steering={json.dumps({'path': str(vectors), 'strength': 0.5})}"])
    assert whole.steering == {"path": str(vectors), "strength": 0.5, "layers": None}
    for strength in ("0.0", "3.0"):
        changed = asked(f"steering.strength={strength}", "--decoding", file, "--temperature", 0, "--out", tmp_path)
        assert run_cli(*changed) == 0
        lines, _, facts = made(tmp_path)
        settings = Sampling(0.0, max_new_tokens=facts["sampling"]["max_new_tokens"])
        plain = [one.ids for one in generate(model, tokenizer, prompts, (), settings)]
        assert ([line["token_ids"] for line in lines] == plain) == (strength == "0.0")
        steering = SteeringConfig(str(vectors), strength=float(strength))
        steered = generate(model, tokenizer, prompts, (), settings, steering=steering)
        assert [one.ids for one in steered] == [line["token_ids"] for line in lines]
        assert [one.ids for one in generate(model, tokenizer, prompts, (), settings)] == plain
        assert facts["steering"]["strength"] == float(strength)


# Evaluation


def held_out(count: int = 6) -> list[dict[str, Any]]:
    return [
        {"prompt": [{"role": "user", "content": f"compute {i} + {i + 3}"}], "answer": str(2 * i + 3)}
        for i in range(count)
    ]


LENGTH = {"size": {"function": "length", "coef": -1.0}}
EVALUATION = [
    "evaluation.rows=6",
    "evaluation.temperature=1.0",
    "evaluation.max_new_tokens=20",
    "data.heldout_size=6",
    "data.train_size=64",
]
ASKED = [*EVALUATION, f"evaluation.decoding={json.dumps([WAVE, WARM])}"]


def test_evaluation_without_decoding_is_plain_generate(model, tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: object, **__: object) -> None:
        raise AssertionError("sampling_control without decoding")

    monkeypatch.setattr(rltok.complete, "sampling_control", never)
    rows, options = held_out(), {"max_new_tokens": 15, "batch_size": 6, "temperature": 0.8, "seed": 4}
    found = evaluate(model, tokenizer, rows, build_rewards(LENGTH), **options, engine="transformers")
    prompts = [prompt_tokens(tokenizer, row["prompt"])[1] for row in rows]
    order = sorted(range(6), key=lambda i: -len(prompts[i]))
    with isolated_rng(4):
        sampling = {"do_sample": True, "temperature": 0.8, "top_k": 0, "top_p": 1.0}
        ids = plain_generate(model, tokenizer, [prompts[i] for i in order], 15, **sampling)
    texts = tokenizer.batch_decode(ids, skip_special_tokens=True)
    assert [found.rows[i]["completion"] for i in order] == texts


@ENGINES
def test_rollout_decoding_is_never_used_in_evaluation(monkeypatch: pytest.MonkeyPatch, engine: str) -> None:
    settings = [*EVALUATION, f"rollout.engine={engine}"]
    calls: list[str] = []
    for processor in (CyclicReflexLogitsProcessor, AdaptiveTemperature):

        def noted(self: RolloutProcessor, *args: Any, original: Any = processor.apply) -> torch.Tensor:
            calls.append(type(self).__name__)
            return original(self, *args)

        monkeypatch.setattr(processor, "apply", noted)
    rollout = f"rollout.decoding={json.dumps([WAVE | {'amplitude': 8.0}, WARM])}"
    plain = evaluate_path(load_recipe("dapo", settings), Console(quiet=True))
    trained_so = evaluate_path(load_recipe("dapo", [*settings, rollout]), Console(quiet=True))
    assert trained_so == plain and calls == []
    asked_for = evaluate_path(load_recipe("dapo", [*ASKED, settings[-1]]), Console(quiet=True))
    assert {"CyclicReflexLogitsProcessor", "AdaptiveTemperature"} == set(calls)
    assert asked_for.rows != plain.rows
    neutral = [WAVE | {"amplitude": 0.0}, WARM | {"tau": 0.0}]
    off = load_recipe("dapo", [*settings, f"evaluation.decoding={json.dumps(neutral)}"])
    assert evaluate_path(off, Console(quiet=True)) == plain


@ENGINES
def test_evaluation_with_decoding_equals_generation_with_it(model, tokenizer, engine: str) -> None:
    """Two ways to the same completions: same seed, same processors, same statistics."""
    rows, modules = held_out(), build_decoding([WAVE, WARM], "decoding")
    options = {"max_new_tokens": 15, "batch_size": 4, "temperature": 0.8, "num_samples": 2, "seed": 3, "engine": engine}
    found = evaluate(model, tokenizer, rows, build_rewards(LENGTH), **options, decoding=modules, entropy_stats=STATS)
    prompts = [prompt_tokens(tokenizer, row["prompt"])[1] for row in rows]
    settings = Sampling(0.8, **{name: value for name, value in options.items() if name != "temperature"})
    ids = [one.ids for one in generate(model, tokenizer, prompts, modules, settings, entropy_stats=STATS)]
    assert [row["completion"] for row in found.rows] == tokenizer.batch_decode(ids, skip_special_tokens=True)


def test_adaptive_temperature_without_statistics_is_refused_and_greedy_needs_none(model, tokenizer) -> None:
    rewards, common = build_rewards(LENGTH), {"max_new_tokens": 8, "batch_size": 8}
    warm = (AdaptiveTemperatureConfig(tau=0.4),)
    with pytest.raises(ValueError, match="calibrate_entropy"):
        evaluate(model, tokenizer, held_out(), rewards, **common, temperature=1.0, decoding=warm)
    greedy = evaluate(model, tokenizer, held_out(), rewards, **common, decoding=warm)
    assert greedy == evaluate(model, tokenizer, held_out(), rewards, **common)


def test_training_and_eval_command_evaluate_alike(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, vectors: Path
) -> None:
    """Before and after training and by `rltok eval`: the same decoding, statistics, steering and completions."""
    monkeypatch.chdir(tmp_path)
    steering = f"evaluation.steering={json.dumps({'path': str(vectors), 'strength': 0.3})}"
    shape = ["training.max_steps=2", "training.save_steps=2", "training.learning_rate=1e-3", "training.warmup_steps=0"]
    recipe = load_recipe("smoke", [*ASKED, steering, *shape, f"rollout.decoding={json.dumps([WARM])}"])
    console = Console(record=True, width=200)
    assert train(recipe, console) == 0
    run = RunDirectory(tmp_path / "runs" / "smoke-seed0")
    said = console.export_text()
    assert "of a plain first batch" in said and "tokens of the last rollout" in said
    lines = []
    for moment, checkpoint in (("before", TINY), ("after", str(run.path / "checkpoint-2"))):
        console = Console(record=True, width=200)
        found = evaluate_path(load_recipe(run.recipe, [f"model.path={checkpoint}"]), console)
        table = pd.read_parquet(run.evaluation_rows(moment))
        assert [row["completion"] for row in found.rows] == table["completion"].tolist()
        assert found.means == json.loads(run.evaluation(moment).read_text())["means"]
        lines.append(console.export_text())
    assert "plain first batch" in lines[0] and "last rollout of" in lines[1]
    bare = load_recipe(run.recipe, [f"model.path={TINY}", "evaluation.decoding=null", "evaluation.steering=null"])
    before = pd.read_parquet(run.evaluation_rows("before"))["completion"].tolist()
    assert [row["completion"] for row in evaluate_path(bare, Console(quiet=True)).rows] != before


def test_steering_of_an_evaluation_acts(model, tokenizer, vectors: Path) -> None:
    from rltok.steering import SteeringConfig

    rewards, common = build_rewards(LENGTH), {"max_new_tokens": 12, "batch_size": 8}
    plain, strong, off = (
        evaluate(model, tokenizer, held_out(), rewards, **common, steering=steering)
        for steering in (None, SteeringConfig(str(vectors), strength=3.0), SteeringConfig(str(vectors), strength=0.0))
    )
    assert strong != plain == off == evaluate(model, tokenizer, held_out(), rewards, **common)


def test_evaluation_section() -> None:
    recipe = load_recipe("demo", ["evaluation.decoding=[{type: cyclic_reflex, amplitude: null}]"])
    assert recipe.evaluation.decoding[0]["amplitude"] == CyclicReflexConfig().amplitude
    assert evaluation_options(recipe)["decoding"] == (CyclicReflexConfig(),)
    assert load_recipe("demo").evaluation.decoding == () and evaluation_options(load_recipe("demo"))["steering"] is None
    for override, words in (
        ("evaluation.decoding={type: cyclic_reflex}", "is not a list"),
        ("evaluation.decoding=[{type: cyclic}]", r"evaluation.decoding\[0\].type: .*did you mean 'cyclic_reflex'"),
        ("evaluation.decoding=[{type: cyclic_reflex, period: 0}]", "period=0"),
        ("evaluation.decoding=[{type: cyclic_reflex}, {type: cyclic_reflex}]", "2 times: keep one"),
        ("evaluation.steering={strength: 1.0}", "evaluation.steering.path: missing"),
        ("evaluation.steering={path: a, strenght: 1.0}", "did you mean 'strength'"),
    ):
        with pytest.raises(ConfigError, match=words):
            load_recipe("demo", [override])


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("evaluation.decoding=[{type: cyclic_reflex, words: [Alternatively]}]", "evaluation.decoding: of words="),
        ("evaluation.steering={path: none.safetensors}", "evaluation.steering.path: .*no such file"),
    ],
)
def test_evaluation_that_cannot_run_stops_before_the_model_is_loaded(
    override: str, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("rltok.run.load_model", lambda config: pytest.fail("the model was loaded"))
    recipe = load_recipe("smoke", [override, "evaluation.before=false"])
    for command in (train, evaluate_path):
        with pytest.raises(ConfigError, match=words):
            command(recipe, Console(quiet=True))


# Statistics of the entropy


@ENGINES
def test_statistics_are_those_of_a_plain_batch(model, tokenizer, prompts, engine: str) -> None:
    said: list[str] = []
    torch.manual_seed(3)
    state = torch.get_rng_state()
    settings = CompletionSettings(20, 0.8, 0.9, 30, seed=6, engine=engine)
    modules = build_decoding([WAVE, WARM | {"rho": 0.6}], "decoding")
    found = calibrate_entropy(model, tokenizer, prompts, modules, settings, say=said.append)
    assert torch.equal(torch.get_rng_state(), state)
    ids = completed_ids(complete(model, tokenizer, prompts, settings))
    if engine == "fast":
        few = replace(settings, batch_size=2)
        again = calibrate_entropy(model, tokenizer, prompts, modules, few)
        torch.testing.assert_close(torch.stack([*again]), torch.stack([*found]), rtol=1e-4, atol=1e-4)
    entropy = [row_entropy(step_logits(model, p, i), 0.8) for p, i in zip(prompts, ids, strict=True)]
    expected = entropy_stats(torch.cat(entropy), torch.ones(sum(map(len, ids))), 0.6)
    assert len({len(i) for i in ids}) > 1, "what is after a row's end must not count"
    assert int(found.count) == sum(map(len, ids)) == int(expected.count)
    torch.testing.assert_close(torch.stack([*found][:4]), torch.stack([*expected][:4]), rtol=1e-3, atol=1e-3)
    assert "plain first batch, which is thrown away" in said[0]


def test_statistics_are_not_made_where_nothing_reads_them(model, tokenizer, prompts) -> None:
    for sections, temperature in (([WAVE], 1.0), ([WARM], 0.0), ([WARM | {"tau": 0.0}], 1.0), ([], 1.0)):
        modules = build_decoding(sections, "decoding")
        assert calibrate_entropy(model, tokenizer, prompts, modules, CompletionSettings(2, temperature)) is None


def test_statistics_of_a_checkpoint_serve_where_they_hold(model, tokenizer, prompts, tmp_path: Path) -> None:
    folder = tmp_path / "run" / "checkpoint-4"
    folder.mkdir(parents=True)
    assert checkpoint_stats(folder) is None and checkpoint_stats(TINY) is None
    torch.save({"sampler_stats": None, "step": 4}, folder / "rltok_state_0.pt")
    assert checkpoint_stats(folder) is None
    torch.save({"sampler_stats": list(STATS), "step": 4}, folder / "rltok_state_0.pt")
    unknown = checkpoint_stats(folder)
    assert [*unknown.stats] == [*STATS] and unknown.settings == {}
    recipe = {"training": {"temperature": 0.8}, "rollout": {"decoding": [WAVE, WARM | {"rho": 0.8, "floor": 1e-8}]}}
    (folder.parent / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    saved = checkpoint_stats(folder)
    assert saved.settings == {"temperature": 0.8, "rho": 0.8, "floor": 1e-8}

    def found(saved: SavedStats | None, temperature: float = 0.8, **change: float) -> tuple[Any, str]:
        said: list[str] = []
        modules = build_decoding([WARM | change], "decoding")
        settings = CompletionSettings(4, temperature)
        return calibrate_entropy(model, tokenizer, prompts, modules, settings, saved=saved, say=said.append), said[0]

    for known in (saved, unknown):
        stats, said = found(known)
        assert stats is known.stats and "50 tokens of the last rollout of" in said
    for change, name in (({"temperature": 1.0}, "temperature"), ({"rho": 0.5}, "rho"), ({"floor": 1e-6}, "floor")):
        stats, said = found(saved, **change)
        assert stats is not saved.stats and said.endswith(f"are of another {name}")


def test_ranks_share_their_statistics(model, tokenizer, prompts) -> None:
    """A rank without rows takes part; all ranks get the statistics of all tokens."""
    modules, settings = build_decoding([WARM], "decoding"), CompletionSettings(6)
    alone: list[torch.Tensor] = []

    def note(values: torch.Tensor) -> torch.Tensor:
        alone.append(values)
        return values

    whole = calibrate_entropy(model, tokenizer, prompts, modules, settings, gather=note)
    empty = calibrate_entropy(model, tokenizer, [], modules, settings, gather=lambda own: torch.cat([own, alone[0]]))
    assert [*whole] == [*empty]
    assert calibrate_entropy(model, tokenizer, [], modules, settings) is None


def test_shares_of_an_evaluation_have_the_statistics_of_the_whole(model, tokenizer) -> None:
    """Two processes calibrate on the completions that one process would take, however many rows there are."""
    rows, sampled = held_out(50), "evaluation.num_samples=2"
    recipe = load_recipe("dapo", [*ASKED, sampled, "evaluation.max_new_tokens=6", "evaluation.batch_size=7"])
    console = Console(quiet=True)
    whole = evaluation_entropy(recipe, model, tokenizer, rows, console, saved=None)
    known: list[torch.Tensor] = []

    def gather(values: torch.Tensor) -> torch.Tensor:
        known.append(values)
        return torch.cat(known)

    for rank in (0, 1):
        mine = list(range(rank, 50, 2))
        share = [rows[i] for i in mine]
        options = {"saved": None, "row_ids": mine, "rank": rank, "gather": gather}
        found = evaluation_entropy(recipe, model, tokenizer, share, console, **options)
    assert 64 < int(whole.count) <= CALIBRATION_ROWS * 6, "of 100 completions the first ones"
    assert int(found.count) == int(whole.count) and len(known) == 2 and min(map(len, known)) > 0
    torch.testing.assert_close(torch.stack([*found][:4]), torch.stack([*whole][:4]), rtol=1e-4, atol=1e-4)


# The recorder


def test_greedy_is_recorded_only_if_that_is_asked_for(model, tokenizer, prompts) -> None:
    processors = make_processors(build_decoding([WAVE], "decoding"), DecodingContext(tokenizer=tokenizer))
    with pytest.raises(ValueError, match="do_sample=False"), sampling_control(model, processors, SampledLogps()):
        plain_generate(model, tokenizer, prompts[:1], 5, do_sample=False)
    recorder = SampledLogps(greedy="record")
    with sampling_control(model, processors, recorder):
        (ids,) = plain_generate(model, tokenizer, prompts[:1], 9, do_sample=False)
    (logps,) = recorder.finish([ids])
    logits, (processor,) = step_logits(model, prompts[0], ids), processors
    for t, token in enumerate(ids):
        row = processor(torch.tensor([prompts[0] + ids[:t]]), logits[t : t + 1])
        assert row.argmax() == token
        assert logps[t] == pytest.approx(row.log_softmax(-1)[0, token].item(), abs=1e-5)
    with pytest.raises(ValueError, match="greedy='yes'"):
        SampledLogps(greedy="yes")  # type: ignore[arg-type]


# Errors

ONE = ["--prompt", "so "]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], ["no prompts were given", "--prompt TEXT, --prompts FILE, --recipe-data"]),
        ([*ONE, "--recipe-data", "--decoding", "demo"], ["--prompt TEXT and --recipe-data were given"]),
        ([*ONE, "--rows", "2"], ["--rows 2 only goes with --prompts FILE or --recipe-data"]),
        (["--recipe-data", "--decoding", "demo", "--chat"], ["--chat", "data.conversational"]),
        (["--recipe-data"], ["--recipe-data", "--decoding none has no section data"]),
        (["--recipe-data", "--decoding", "short.yaml"], ["short.yaml has no section data"]),
        ([*ONE, "--decoding", "dmo"], ["dmo: no such recipe", "did you mean 'demo'"]),
        ([*ONE, "--decoding", "broken.yaml"], ["broken.yaml:2", "unknown type 'cyclic'", "cyclic_reflex"]),
        ([*ONE, "--decoding", "foreign.yaml"], ["--decoding foreign.yaml", "words=['Alternatively']", "vocabulary"]),
        ([*ONE, "--decoding", "steered.yaml"], ["steering.path", "no such file"]),
        ([*ONE, "decoding=[]"], ["decoding=[]: there is no recipe to change with --decoding none"]),
        ([*ONE, "--decoding", "demo", "rollout.decodin=[]"], ["did you mean 'decoding'"]),
        ([*ONE, "--decoding", "demo", "training.min_p=0.1", "rollout.strict=false"], ["training.min_p=null"]),
        ([*ONE, "--num-samples", "2", "--best-of", "2"], ["--num-samples 2 and --best-of 2"]),
        ([*ONE, "--num-samples", "2", "--temperature", "0"], ["--num-samples 2: greedy", "--temperature T > 0"]),
        ([*ONE, "--best-of", "2", "--temperature", "0"], ["--best-of 2: greedy"]),
        ([*ONE, "--best-of", "1", "--temperature", "0"], ["--best-of 1: greedy"]),
        ([*ONE, "--seed", "1", "--temperature", "0"], ["--seed 1: greedy decoding does not read it"]),
        ([*ONE, "--top-p", "0.9", "--temperature", "0"], ["--top-p 0.9: greedy"]),
        ([*ONE, "--top-k", "5", "--temperature", "0"], ["--top-k 5: greedy"]),
        ([*ONE, "--best-of", "2"], ["--best-of 2: no reward to choose by", "--reward NAME"]),
        ([*ONE, "--best-of", "2", "--reward", "strict_acuracy"], ["did you mean 'strict_accuracy'"]),
        ([*ONE, "--best-of", "2", "--reward", "strict_accuracy"], ["cannot judge these prompts", "no column answer"]),
        ([*ONE, "--best-of", "2", "--reward", "lenient_accuracy"], ["cannot judge these prompts", "no column answer"]),
        ([*ONE, "--best-of", "2", "--reward", "no.py:f"], ["there is no file"]),
        ([*ONE, "--reward", "answer_format", "--reward", "answer_format"], ["given twice"]),
        ([*ONE, "--temperature", "-1"], ["--temperature -1.0 must be >= 0"]),
        ([*ONE, "--temperature", "nan"], ["--temperature nan must be"]),
        ([*ONE, "--top-p", "0"], ["--top-p 0.0 must be > 0 and <= 1"]),
        ([*ONE, "--top-k", "-1"], ["--top-k -1 must be >= 0"]),
        ([*ONE, "--stop", ""], ["--stop ''"]),
        ([*ONE, "--min-new-tokens", "9", "--max-new-tokens", "8"], ["--min-new-tokens 9", "at most 8 tokens"]),
        ([*ONE, "--min-new-tokens", "-1"], ["--min-new-tokens -1 must be >= 0"]),
        ([*ONE, "--batch-size", "0"], ["--batch-size 0 must be >= 1"]),
        ([*ONE, "--out", "short.yaml"], ["--out short.yaml: is a file"]),
        (["--prompts", "no.jsonl"], ["--prompts no.jsonl: there is no such file"]),
        (["--prompts", "short.yaml"], ["'.yaml'", "allowed: .jsonl, .parquet"]),
        (["--prompts", "other.jsonl"], ["--prompts other.jsonl, line 1: there is no column prompt; found: text"]),
        (["--prompts", "number.jsonl"], ["row 1: prompt 5 is neither text nor a list"]),
        (["--prompt", ""], ["has no tokens"]),
    ],
)
def test_contradictions_are_refused_before_the_model_is_loaded(
    arguments: list[str],
    words: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("rltok.generate.load_policy", lambda config: pytest.fail("the model was loaded"))
    Path("short.yaml").write_text(yaml.safe_dump({"decoding": [WARM]}))
    Path("broken.yaml").write_text("decoding:\n- type: cyclic\n")
    Path("foreign.yaml").write_text("decoding:\n- {type: cyclic_reflex, words: [Alternatively]}\n")
    Path("steered.yaml").write_text("decoding: []\nsteering: {path: none.safetensors}\n")
    Path("other.jsonl").write_text('{"text": "1"}\n')
    Path("number.jsonl").write_text('{"prompt": 5}\n')
    assert run_cli("generate", TINY, *arguments) == 2
    error = capsys.readouterr().err
    assert "error: " in error and "Traceback" not in error
    for word in words:
        assert word in error
    assert not Path("generate").exists()


def test_a_reward_that_fails_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "mine.py").write_text("def broken(completions, **_):\n    raise KeyError('x')\n")
    reward = ["--reward", f"{tmp_path}/mine.py:broken", "--out", tmp_path / "out", "--max-new-tokens", 2]
    assert run_cli("generate", TINY, *ONE, *reward) == 2
    assert "reward function 'broken' raised KeyError" in capsys.readouterr().err
    assert not (tmp_path / "out" / "generation.json").exists()


def test_reward_of_the_recipe_by_name_counts_whole(tmp_path: Path) -> None:
    demo = load_recipe("demo")
    found = reward_set(("lenient",), 2, False, tmp_path, demo)
    assert found.names == ["lenient"] and found.weights == [1.0]
    assert reward_set((), None, False, tmp_path, demo) is None
    with pytest.raises(ConfigError, match="every reward has weight 0"):
        reward_set((), 2, False, tmp_path, load_recipe("demo", ["rewards.strict.weight=0.0"]))
    options = GenerateOptions(TINY, "demo", prompts=("a",), best_of=2, out=tmp_path)
    assert resolve_sampling(options, load_recipe("demo")).max_new_tokens == 80
    assert resolve_sampling(options, None).max_new_tokens == 256


def test_character_model_without_template_and_random_weights(tmp_path: Path) -> None:
    """Another model from disk: conversations of a recipe need its chat template, plain prompts do not."""
    tokenizer = build_tokenizer()
    build_model(tokenizer).save_pretrained(tmp_path / "m")
    tokenizer.chat_template = None
    tokenizer.save_pretrained(tmp_path / "m")
    options = GenerateOptions(str(tmp_path / "m"), prompts=("1+1=",), out=tmp_path / "out", max_new_tokens=6)
    assert run_generate(options, Console(quiet=True)) == 0
    assert made(tmp_path / "out")[0][0]["length"] <= 6
    with pytest.raises(ConfigError, match="no chat template"):
        run_generate(replace(options, chat=True), Console(quiet=True))
    with pytest.raises(ConfigError, match="--stop '2': this tokenizer does not turn single tokens into text"):
        run_generate(replace(options, stop=("2",)), Console(quiet=True))


def test_a_method_that_the_engine_cannot_run_is_refused(
    tmp_path: Path, decoding_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rltok.generate.load_policy", lambda config: pytest.fail("the model was loaded"))
    monkeypatch.setattr(CyclicReflexConfig, "engines", ("transformers", "vllm_server"))
    options = GenerateOptions(TINY, str(decoding_file), prompts=("so ",), out=tmp_path / "out")
    words = "--decoding .*decoding.yaml: cyclic_reflex does not run on the engine 'fast'; it runs on transformers"
    with pytest.raises(ConfigError, match=words):
        run_generate(options, Console(quiet=True))
    recipe = load_recipe("dapo", ASKED)
    with pytest.raises(ConfigError, match="evaluation.decoding: cyclic_reflex does not run on the engine 'fast'"):
        evaluate_path(recipe, Console(quiet=True))
    with pytest.raises(BaseException, match="the model was loaded"):
        run_generate(replace(options, engine="transformers"), Console(quiet=True))
