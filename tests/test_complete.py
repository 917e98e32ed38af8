"""Completions outside of training: two engines, one result; refused models; evaluation in shares."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from tests_support import build_model, build_tokenizer
from tokenizers import decoders

import rltok.complete
from rltok.cli import main
from rltok.complete import (
    Completed,
    CompletionSettings,
    complete,
    completed_ids,
    decoding_context,
    end_ids,
    named_processors,
)
from rltok.config import ConfigError
from rltok.entropy import EntropyStats
from rltok.evaluate import evaluate, join_evaluations
from rltok.generation_files import token_traces
from rltok.models import TINY, ModelConfig, load_tokenizer
from rltok.progress import EvaluationBar
from rltok.recipe import load_recipe
from rltok.rewards import build_rewards
from rltok.rollout import build_decoding
from rltok.run import evaluation_options, train
from rltok.steering import SteeringConfig, SteeringVector, describe_model, save_vectors

TOKENIZER = build_tokenizer()
TOKENIZER.backend_tokenizer.decoder = decoders.Fuse()  # characters without blanks between them, for stop texts
PROMPTS = [TOKENIZER(text)["input_ids"] for text in ("1+1=", "a longer prompt: 3*4=", "9=", "so what is 7-2?", "1+1=")]
STATS = EntropyStats(*(torch.tensor(x) for x in (-1.0, -6.0, 0.5, 1.5)), torch.tensor(50))
METHODS: list[dict[str, Any]] = [
    {"type": "cyclic_reflex", "words": ["s", "o"], "period": 5.0, "phase": 0.25, "amplitude": 3.0, "think_end": None},
    {"type": "adaptive_temperature", "tau": 0.2},
]
GREEDY = CompletionSettings(14, temperature=0.0, batch_size=2)
SAMPLED = CompletionSettings(14, temperature=0.9, top_p=0.95, top_k=20, seed=4, batch_size=2)
REWARDS = {"size": {"function": "length", "coef": -1.0}, "form": {"function": "answer_format"}}


@pytest.fixture(scope="module")
def model():
    """A random model whose completions end at different lengths."""
    return build_model(TOKENIZER, seed=1, initializer_range=0.3, tie_word_embeddings=False).eval()


@pytest.fixture
def steering(model, tmp_path: Path) -> SteeringConfig:
    vector = torch.randn(model.config.hidden_size, generator=torch.Generator().manual_seed(0))
    path = tmp_path / "vectors.safetensors"
    save_vectors(path, [SteeringVector(1, 3 * vector, 1.0)], describe_model(model, "random"))
    return SteeringConfig(str(path))


def recorded(parts: Sequence[Completed]) -> list[dict[str, Any]]:
    """Of every completion, in the order of the prompts: ids, log-probabilities and traced values."""
    found = {}
    for part in parts:
        traces = token_traces(part.processors)
        for at, index in enumerate(part.indices):
            length = len(part.ids[at])
            values = {name: value[at, :length] for name, value in traces.items()}
            found[index] = {"ids": part.ids[at], "logp": torch.tensor(part.logps[at]), **values}
    return [found[index] for index in sorted(found)]


def processors_of(sections: Sequence[dict[str, Any]], settings: CompletionSettings, model: Any) -> Any:
    modules = build_decoding(sections, "decoding")
    context = decoding_context(modules, TOKENIZER, settings.temperature, STATS, end_ids(model, TOKENIZER))
    return partial(named_processors, modules, context)


# Both engines


@pytest.mark.parametrize("steered", [False, True], ids=["plain", "steered"])
@pytest.mark.parametrize("sections", [[], METHODS[:1]], ids=["model", "wave"])
@pytest.mark.parametrize("case", ["alone", "least-length", "stop", "one-batch"])
def test_engines_agree_on_greedy_completions(
    model, sections: list[dict[str, Any]], case: str, steered: bool, steering: SteeringConfig
) -> None:
    options = {"record": True, "steering": steering if steered else None}

    def made(settings: CompletionSettings) -> list[Completed]:
        processors = processors_of(sections, settings, model)
        return complete(model, TOKENIZER, PROMPTS, settings, processors=processors, **options)

    plain = completed_ids(made(replace(GREEDY, engine="transformers")))
    stops = (TOKENIZER.decode(plain[0][2:3]), TOKENIZER.decode(plain[1][5:7]))
    changes = {"least-length": {"min_new_tokens": 9}, "stop": {"stop_strings": stops}, "one-batch": {"batch_size": 64}}
    settings = replace(GREEDY, **changes.get(case, {}))
    found = {}
    for engine in ("transformers", "fast"):
        parts = made(replace(settings, engine=engine))
        assert len(parts) == (1 if engine == "fast" else -(-len(PROMPTS) // settings.batch_size))
        assert all((part.metrics is None) == (engine == "transformers") for part in parts)
        found[engine] = recorded(parts)
    for ours, theirs in zip(found["fast"], found["transformers"], strict=True):
        assert ours["ids"] == theirs["ids"] and ours.keys() == theirs.keys()
        assert "wave" in ours or not sections
        for name in ours.keys() - {"ids"}:
            torch.testing.assert_close(ours[name], theirs[name], rtol=0, atol=1e-5)
    for one, whole in zip(found["fast"], plain, strict=True):
        if case == "least-length":
            assert len(one["ids"]) >= 9
        else:
            assert one["ids"] == whole[: len(one["ids"])]
    if case == "stop":
        assert len(found["fast"][0]["ids"]) <= 3 and len(found["fast"][1]["ids"]) <= 7


def test_the_cases_above_differ(model, steering: SteeringConfig) -> None:
    """Each option changes some completion, and completions end at different lengths: equality above says something."""
    plain = completed_ids(complete(model, TOKENIZER, PROMPTS, GREEDY))
    ends = set(end_ids(model, TOKENIZER))
    assert len({len(ids) for ids in plain}) > 1 and any(ids[-1] in ends for ids in plain)
    waved = complete(model, TOKENIZER, PROMPTS, GREEDY, processors=processors_of(METHODS[:1], GREEDY, model))
    moved = complete(model, TOKENIZER, PROMPTS, GREEDY, steering=steering)
    longer = complete(model, TOKENIZER, PROMPTS, replace(GREEDY, min_new_tokens=9))
    for parts in (waved, moved, longer):
        assert completed_ids(parts) != plain


@pytest.mark.parametrize("engine", ["fast", "transformers"])
def test_padding_behind_a_stop_text_is_no_part_of_it(model, engine: str) -> None:
    """What generate fills a finished row with does not count, even if that is a stop text as well."""
    settings = replace(GREEDY, engine=engine, batch_size=8)
    plain = completed_ids(complete(model, TOKENIZER, PROMPTS, settings))
    stops = {plain[0][0], TOKENIZER.pad_token_id}
    texts = tuple(TOKENIZER.decode([token]) for token in stops)
    found = completed_ids(complete(model, TOKENIZER, PROMPTS, replace(settings, stop_strings=texts)))
    assert found[0] == plain[0][:1] == found[4] and max(map(len, found)) > 2
    for ids, whole in zip(found, plain, strict=True):
        assert ids == whole[: next((t for t, token in enumerate(whole) if token in stops), len(whole)) + 1]


@pytest.mark.parametrize("engine", ["fast", "transformers"])
def test_progress_adds_up_and_nothing_of_the_caller_changes(model, engine: str) -> None:
    calls: list[tuple[int, int]] = []
    model.train()
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    parts = complete(model, TOKENIZER, PROMPTS, replace(SAMPLED, engine=engine), on_rows=lambda *now: calls.append(now))
    assert torch.equal(torch.rand(2), expected) and model.training
    model.eval()
    ids = completed_ids(parts)
    assert [sum(side) for side in zip(*calls, strict=True)] == [len(PROMPTS), sum(map(len, ids))]
    assert len(calls) >= 3 and min(min(call) for call in calls) >= 0
    assert complete(model, TOKENIZER, [], replace(SAMPLED, engine=engine)) == []


def test_engines_agree_under_autocast(model) -> None:
    settings = replace(GREEDY, max_new_tokens=6)
    found = [
        recorded(
            complete(model, TOKENIZER, PROMPTS, replace(settings, engine=engine), record=True, autocast=torch.bfloat16)
        )
        for engine in ("fast", "transformers")
    ]
    exact = recorded(complete(model, TOKENIZER, PROMPTS, settings, record=True))
    for ours, theirs, whole in zip(*found, exact, strict=True):
        torch.testing.assert_close(ours["logp"][0], theirs["logp"][0], rtol=0, atol=0.1)
        assert not torch.equal(ours["logp"], whole["logp"]), "in half precision"


# Samples that belong to their rows


def test_sampled_completions_depend_on_seed_and_place_alone(model) -> None:
    modules = processors_of(METHODS, SAMPLED, model)
    places = [(row, sample) for row in range(5) for sample in range(3)]
    prompts = [PROMPTS[row] for row, _ in places]
    made = partial(complete, model, TOKENIZER, processors=modules)
    whole = completed_ids(made(prompts, SAMPLED, places=places))
    assert len({tuple(ids) for ids in whole}) == 15, "equal prompts of other rows are sampled apart"
    for batch_size in (1, 3, 64):
        assert completed_ids(made(prompts, replace(SAMPLED, batch_size=batch_size), places=places)) == whole
    backwards = completed_ids(made(prompts[::-1], SAMPLED, places=places[::-1]))
    assert backwards[::-1] == whole
    share = completed_ids(made(prompts[1::2], SAMPLED, places=places[1::2]))
    assert share == whole[1::2]
    assert completed_ids(made(prompts, replace(SAMPLED, seed=5), places=places)) != whole
    assert completed_ids(made(PROMPTS, SAMPLED)) == [whole[3 * row] for row in range(5)]


@pytest.mark.parametrize("temperature", [0.0, 0.9])
def test_an_evaluation_does_not_depend_on_batches_or_shares(model, temperature: float) -> None:
    rows = [{"prompt": f"{i}+{i}=" + "?" * (i % 3), "answer": str(2 * i)} for i in range(7)]
    options: dict[str, Any] = {
        "max_new_tokens": 8,
        "temperature": temperature,
        "num_samples": 1 + 2 * (temperature > 0),
    }
    modules = build_decoding(METHODS, "decoding")
    run = partial(evaluate, model, TOKENIZER, rewards=build_rewards(REWARDS), decoding=modules, entropy_stats=STATS)
    found = [run(rows, batch_size=size, **options) for size in (1, 3, 64)]
    assert found[0] == found[1] == found[2]
    assert len({row["completion"] for row in found[0].rows}) > len(rows) // 2
    shares = [list(range(rank, 7, 2)) for rank in (0, 1)]
    parts = [run([rows[i] for i in mine], row_ids=mine, batch_size=4, **options) for mine in shares]
    assert [row["row"] for row in parts[1].rows][:: options["num_samples"]] == [1, 3, 5]
    joined = join_evaluations(parts)
    assert joined.rows == found[0].rows and joined.means == pytest.approx(found[0].means)
    if temperature:
        unnumbered = run([rows[i] for i in shares[1]], batch_size=4, **options)
        assert [r["completion"] for r in unnumbered.rows] != [r["completion"] for r in parts[1].rows]
    with pytest.raises(ValueError, match="2 row_ids for 7 rows"):
        run(rows, row_ids=[0, 1], batch_size=4, **options)


def test_a_reward_that_draws_numbers_is_seeded_and_leaves_no_trace(model, tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(
        "import random\nimport torch\n\ndef noise(completions, **_):\n"
        "    return [random.random() + torch.rand(1).item() for _ in completions]\n"
    )
    rewards = build_rewards({"noise": {"function": f"{tmp_path}/mine.py:noise"}})
    run = partial(evaluate, model, TOKENIZER, [{"prompt": "1+1="}] * 3, rewards, max_new_tokens=2, batch_size=2)
    before = random.getstate(), torch.get_rng_state().tolist()
    found = [run(seed=seed).means["noise"] for seed in (1, 1, 2)]
    assert (random.getstate(), torch.get_rng_state().tolist()) == before
    assert found[0] == found[1] != found[2]


def test_evaluation_follows_the_engine_of_its_recipe() -> None:
    plain, changed = load_recipe("demo"), load_recipe("demo", ["rollout.engine=transformers", "evaluation.seed=5"])
    assert evaluation_options(plain)["engine"] == "fast" and evaluation_options(plain, rank=3)["seed"] == 0
    assert evaluation_options(changed)["engine"] == "transformers" and evaluation_options(changed, rank=3)["seed"] == 8


# Models and settings that are refused


@pytest.fixture(scope="module")
def recurrent(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model with a recurrent state, which the rollout loop cannot serve, and the embedded tokenizer."""
    from transformers import MambaConfig, MambaForCausalLM

    folder = tmp_path_factory.mktemp("models") / "recurrent"
    tokenizer = load_tokenizer(ModelConfig(path=TINY))
    torch.manual_seed(0)
    shape = {"hidden_size": 16, "state_size": 4, "num_hidden_layers": 1, "vocab_size": len(tokenizer)}
    tokens = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id, "bos_token_id": None}
    MambaForCausalLM(MambaConfig(**shape, **tokens)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def run_cli(*arguments: object) -> int:
    """Exit status of a command in this process."""
    with pytest.raises(SystemExit) as caught:
        main([str(argument) for argument in arguments])
    return int(caught.value.code or 0)


SHORT = ["data.train_size=64", "data.heldout_size=4", "evaluation.max_new_tokens=3"]


def test_a_model_that_the_loop_cannot_serve_is_refused_by_name(
    recurrent: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    asked = ["generate", recurrent, "--prompt", "so ", "--max-new-tokens", 3]
    evaluation = ["eval", recurrent, "--recipe", "smoke", *SHORT]
    with monkeypatch.context() as patch:
        patch.setattr(rltok.complete, "generate_rows", lambda *_, **__: pytest.fail("rows were generated"))
        for command, instead in ((asked, "--engine transformers"), (evaluation, "rollout.engine=transformers")):
            assert run_cli(*command) == 2
            error = capsys.readouterr().err
            assert "'mamba'" in error and instead in error and "Traceback" not in error
        patch.setattr("rltok.trainers.CreditTrainer", lambda **_: pytest.fail("the trainer was built"))
        recipe = load_recipe("smoke", [*SHORT, f"model.path={recurrent}"])
        with pytest.raises(ConfigError, match=r"'mamba'.*rollout\.engine=transformers"):
            train(recipe, Console(quiet=True))
    assert not (tmp_path / "generate").exists()
    assert run_cli(*asked, "--engine", "transformers") == 0
    facts = json.loads((tmp_path / "generate" / "generation.json").read_text())
    assert facts["sampling"]["engine"] == "transformers" and facts["cost"] is None and facts["tokens"] <= 3
    assert run_cli(*evaluation, "rollout.engine=transformers") == 0


def test_a_model_is_refused_without_a_command_as_well(recurrent: Path) -> None:
    from rltok.models import load_model

    config = ModelConfig(path=str(recurrent))
    model, tokenizer = load_model(config), load_tokenizer(config)
    with pytest.raises(ConfigError, match="'mamba'.*engine='transformers'"):
        complete(model, tokenizer, [[5, 6]], CompletionSettings(2))
    with pytest.raises(ConfigError, match="'mamba'"):
        evaluate(model, tokenizer, [{"prompt": "a"}], build_rewards(REWARDS), max_new_tokens=2, batch_size=1)


def test_wrong_settings_are_refused(model) -> None:
    with pytest.raises(ValueError, match="engine='quick' is unknown; allowed: fast, transformers"):
        CompletionSettings(4, engine="quick")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="batch_size=0 must be >= 1"):
        CompletionSettings(4, batch_size=0)
    with pytest.raises(ValueError, match="top_p=0"):
        complete(model, TOKENIZER, PROMPTS, replace(SAMPLED, top_p=0.0))


# Progress


def test_lines_of_a_long_generation() -> None:
    """One line at most in half a minute, with what was done since the start."""
    text, now = StringIO(), [100.0]
    console = Console(file=text, width=200)
    with EvaluationBar(console, "generation", 40, "lines", timer=lambda: now[0]) as bar:
        for seconds, done, tokens in ((10, 1, 100), (19.9, 0, 100), (0.1, 2, 100), (29.9, 3, 500), (0.2, 4, 101)):
            now[0] += seconds
            bar(done, tokens)
    assert text.getvalue().splitlines() == [
        "generation: 40 completions",
        "generation: 3/40 completions  300 tokens  10 tokens/s",
        "generation: 10/40 completions  901 tokens  15 tokens/s",
    ]
    silent = StringIO()
    with EvaluationBar(Console(file=silent), "generation", 2, "off", timer=lambda: now[0]) as bar:
        now[0] += 100
        bar(1, 5)
    assert silent.getvalue() == ""
