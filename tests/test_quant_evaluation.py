"""Completions under the quantiser that a policy is served with: evaluation, `rltok eval`, `rltok generate`."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
import yaml
from peft import LoraConfig, get_peft_model
from rich.console import Console
from tests_support import build_model, build_tokenizer, digit_dataset
from torch import nn
from typer.testing import CliRunner

import rltok.complete
from rltok.cli import app
from rltok.complete import CompletionSettings, complete, completed_ids, quantized_policy, quantizer_name
from rltok.config import ConfigError
from rltok.entropy import EntropyStats
from rltok.evaluate import evaluate, join_evaluations
from rltok.kv import StreamingLLM
from rltok.models import TINY, ModelConfig, load_model, load_tokenizer
from rltok.prompts import prompt_tokens
from rltok.quant import QuantizedShadow, RolloutQuantSpec, dequantize, quantize_weight
from rltok.quant.same_precision import attach_same_precision
from rltok.recipe import load_decoding, load_recipe
from rltok.rewards import build_rewards
from rltok.rollout import build_decoding
from rltok.run import RunDirectory, check_completions, evaluate_path, evaluation_options, train
from rltok.sampler_stats import calibrate_entropy
from rltok.steering import SteeringConfig, SteeringVector, describe_model, save_vectors

INT4, FULL = RolloutQuantSpec(bits=4, group_size=16), RolloutQuantSpec(bits=16)
REWARDS = {"size": {"function": "length", "coef": -1.0}}
GREEDY = CompletionSettings(12, temperature=0.0)
ENGINES = pytest.mark.parametrize("engine", ["fast", "transformers"])
HELD_OUT = [
    "data.train_size=32",
    "data.heldout_size=24",
    "evaluation.max_new_tokens=14",
    "report.progress=off",
]
LOW = "evaluation.quant={bits: 4, group_size: 32}"


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer()


@pytest.fixture
def model(tokenizer):
    return build_model(tokenizer, initializer_range=0.5).eval()


@pytest.fixture(scope="module")
def prompts(tokenizer) -> list[list[int]]:
    return [tokenizer(row["prompt"])["input_ids"] for row in digit_dataset(6)]


@pytest.fixture
def vectors(tmp_path: Path, model) -> Path:
    vector = torch.randn(32, generator=torch.Generator().manual_seed(0))
    path = tmp_path / "vectors.safetensors"
    save_vectors(path, [SteeringVector(0, 20 * vector / vector.norm(), 1.0)], describe_model(model, "tiny"))
    return path


def rounded(model: Any, spec: RolloutQuantSpec) -> Any:
    """The same model with the weights of its decoder's linear layers quantised and dequantised by hand."""
    twin = type(model)(model.config).eval()
    twin.load_state_dict(model.state_dict())
    with torch.no_grad():
        for name, module in twin.named_modules():
            if isinstance(module, nn.Linear) and name != "lm_head":
                module.weight.copy_(dequantize(quantize_weight(module.weight, spec)))
    return twin


def ids_of(model: Any, tokenizer: Any, prompts: list[list[int]], settings: Any = GREEDY, **options: Any) -> Any:
    return completed_ids(complete(model, tokenizer, prompts, settings, **options))


# Completions


@ENGINES
@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_completions_are_those_of_the_rounded_model(model, tokenizer, prompts, engine, temperature):
    settings = replace(GREEDY, engine=engine, temperature=temperature)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    found = ids_of(model, tokenizer, prompts, settings, quant=INT4)
    assert found == ids_of(rounded(model, INT4), tokenizer, prompts, settings)
    assert found == ids_of(QuantizedShadow(model, INT4).module, tokenizer, prompts, settings)
    assert found != ids_of(model, tokenizer, prompts, settings)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@ENGINES
def test_sixteen_bits_are_no_quantiser(model, tokenizer, prompts, engine, monkeypatch):
    settings = replace(GREEDY, engine=engine, temperature=0.8)
    plain = complete(model, tokenizer, prompts, settings, record=True)
    assert quantized_policy(model, FULL) is model is quantized_policy(model, None)
    monkeypatch.setattr(rltok.complete, "QuantizedShadow", lambda *_: pytest.fail("a copy was made"))
    sixteen = complete(model, tokenizer, prompts, settings, record=True, quant=FULL)
    assert [(part.ids, part.logps) for part in sixteen] == [(part.ids, part.logps) for part in plain]


def test_of_an_adapter_the_merged_weight_is_quantised(tokenizer, prompts):
    torch.manual_seed(3)
    settings = LoraConfig(r=4, lora_alpha=16, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    adapted = get_peft_model(build_model(tokenizer, initializer_range=0.5), settings)
    found = ids_of(adapted, tokenizer, prompts, quant=INT4)
    base_alone = build_model(tokenizer, initializer_range=0.5)
    merged = adapted.merge_and_unload().eval()
    assert found == ids_of(rounded(merged, INT4), tokenizer, prompts)
    assert found != ids_of(rounded(base_alone, INT4), tokenizer, prompts)


@ENGINES
def test_steering_and_cache_policy_act_on_the_copy(model, tokenizer, prompts, vectors, engine, recwarn):
    settings = replace(GREEDY, engine=engine)
    steering, kv = SteeringConfig(str(vectors), strength=0.5), StreamingLLM(sink=1, recent=3, interval=1)
    together = ids_of(model, tokenizer, prompts, settings, steering=steering, kv=kv, quant=INT4)
    assert not [one for one in recwarn if "made of other weights" in str(one.message)]
    assert together == ids_of(rounded(model, INT4), tokenizer, prompts, settings, steering=steering, kv=kv)
    parts = {"steering": steering, "kv": kv, "quant": INT4}
    for name in parts:
        rest = {key: value for key, value in parts.items() if key != name}
        assert ids_of(model, tokenizer, prompts, settings, **rest) != together, name
    plain = ids_of(build_model(tokenizer, initializer_range=0.5), tokenizer, prompts, settings)
    assert ids_of(model, tokenizer, prompts, settings) == plain, "nothing is left on the policy"


def test_in_mixed_precision_the_copy_computes_as_its_model(model, tokenizer, prompts):
    found = ids_of(model, tokenizer, prompts, quant=INT4, autocast=torch.bfloat16)
    assert found == ids_of(rounded(model, INT4), tokenizer, prompts, autocast=torch.bfloat16)


def test_statistics_for_temperatures_are_the_copys(model, tokenizer, prompts):
    warm, settings = build_decoding([{"type": "adaptive_temperature", "tau": 0.4}], "decoding"), CompletionSettings(10)
    found = calibrate_entropy(model, tokenizer, prompts, warm, settings, quant=INT4)
    expected = calibrate_entropy(rounded(model, INT4), tokenizer, prompts, warm, settings)
    plain = calibrate_entropy(model, tokenizer, prompts, warm, settings)
    assert isinstance(found, EntropyStats)
    torch.testing.assert_close(torch.stack([*found]), torch.stack([*expected]))
    assert not torch.allclose(torch.stack([*found])[:4], torch.stack([*plain])[:4])


def test_evaluation_of_shares_is_that_of_the_whole(model, tokenizer):
    """As on two ranks, each of which has a copy of its own."""
    rows, rewards = [dict(row) for row in digit_dataset(6)], build_rewards(REWARDS)
    options: dict[str, Any] = {"max_new_tokens": 10, "batch_size": 3, "temperature": 0.7, "quant": INT4}
    whole = evaluate(model, tokenizer, rows, rewards, **options)
    parts = [
        evaluate(model, tokenizer, [rows[i] for i in share], rewards, **options, row_ids=share)
        for share in ([0, 2, 4], [1, 3, 5])
    ]
    assert join_evaluations(parts).rows == whole.rows
    assert whole.rows != evaluate(model, tokenizer, rows, rewards, **options | {"quant": None}).rows
    assert evaluate(model, tokenizer, rows, rewards, **options | {"quant": FULL}) == evaluate(
        model, tokenizer, rows, rewards, **options | {"quant": None}
    )


# Refused


def test_models_that_cannot_be_quantised_are_refused_by_the_setting(model, tokenizer, prompts):
    class Linear4bit(nn.Linear):
        """Named as bitsandbytes names its layer."""

    recipe = load_recipe("smoke", ["evaluation.quant={bits: 4, group_size: 24}"])
    with pytest.raises(ConfigError, match=r"evaluation\.quant: .*group_size=24"):
        check_completions(recipe, model)
    model.model.layers[0].mlp.up_proj.__class__ = Linear4bit
    with pytest.raises(ConfigError, match=r"evaluation\.quant: .*up_proj is Linear4bit of bitsandbytes"):
        check_completions(load_recipe("smoke", ["evaluation.quant.bits=8"]), model)
    told: list[int] = []
    with pytest.raises(ConfigError, match="quant: .*Linear4bit"):
        complete(model, tokenizer, prompts, GREEDY, quant=INT4, on_rows=lambda ended, tokens: told.append(tokens))
    assert told == [], "nothing was generated"
    check_completions(load_recipe("smoke", ["evaluation.quant.bits=16"]), model)


def test_sharded_weights_are_refused(model):
    model.model.layers[0].mlp.up_proj.weight.ds_id = 3
    with pytest.raises(ConfigError, match=r"evaluation\.quant: .*ZeRO-3"):
        quantized_policy(model, INT4, "evaluation.quant")


def test_a_model_with_fake_quantisers_is_refused(tokenizer):
    from rltok.quant.qat import QATSpec, prepare_qat

    prepared = prepare_qat(build_model(tokenizer), QATSpec())
    with pytest.raises(ConfigError, match=r"evaluation\.quant: .*quantization_aware"):
        quantized_policy(prepared, INT4, "evaluation.quant")


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("evaluation.quant.bits=3", r"evaluation\.quant.*3"),
        ("evaluation.quant.group_size=32", r"evaluation\.quant\.bits: missing; allowed: 4, 8, 16"),
        ("evaluation.quant={bits: 4, groupsize: 32}", "did you mean 'group_size'"),
        ("evaluation.quant={bits: 4, refresh: 2}", r"evaluation\.quant.*refresh"),
        ("evaluation.quant=int4", "not a mapping"),
    ],
)
def test_wrong_sections_are_refused(override, words):
    with pytest.raises(ConfigError, match=words):
        load_recipe("smoke", [override])


def test_a_base_in_few_bits_is_refused_before_anything_is_loaded(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("rltok.run.load_model", lambda config: pytest.fail("the model was loaded"))
    recipe = load_recipe("smoke", [LOW, "model.lora.r=4", "model.quantization.bits=4", *HELD_OUT])
    for command in (train, evaluate_path):
        with pytest.raises(ConfigError, match=r"evaluation\.quant: .*model\.quantization"):
            command(recipe, Console(quiet=True))


# Recipes and commands


def test_the_section_reaches_the_evaluation():
    assert evaluation_options(load_recipe("smoke"))["quant"] is None
    recipe = load_recipe("smoke", [LOW, "rollout.quant={bits: 8}"])
    assert evaluation_options(recipe)["quant"] == RolloutQuantSpec(bits=4, group_size=32)
    assert evaluation_options(load_recipe("smoke", ["rollout.quant={bits: 8}"]))["quant"] is None
    assert quantizer_name(evaluation_options(recipe)["quant"]) == "4 bits, groups of 32, torch"
    assert quantizer_name(RolloutQuantSpec(bits=8)) == "8 bits, one scale per row, torch"
    assert quantizer_name(FULL) is quantizer_name(None) is None
    half = ["model.dtype=auto", "training.bf16=true"]
    for overrides, in_training, expected in (
        ([*half, LOW], True, torch.bfloat16),
        ([*half, LOW], False, None),
        (half, True, None),
    ):
        assert evaluation_options(load_recipe("smoke", overrides), 0, in_training)["autocast"] == expected


def test_training_and_eval_command_evaluate_alike(tmp_path, monkeypatch):
    """The command line, files and summary name the quantiser, and its results are not taken for others."""
    monkeypatch.chdir(tmp_path)
    shape = ["training.max_steps=1", "training.steps_per_generation=1", "training.max_completion_length=8"]
    recipe = load_recipe("smoke", [*HELD_OUT, *shape, LOW, "training.learning_rate=1e-3", "training.warmup_steps=0"])
    console = Console(record=True, width=200)
    assert train(recipe, console) == 0
    assert "quantised weights: 4 bits, groups of 32, torch" in console.export_text()
    run = RunDirectory(tmp_path / "runs" / "smoke-seed0")
    summary = json.loads(run.summary.read_text())
    assert summary["evaluation_quant"] == "4 bits, groups of 32, torch"
    checkpoint = summary["checkpoint"]
    completions: dict[str, list[str]] = {}
    cases = {"own": [], "off": ["evaluation.quant=null"], "8": ["evaluation.quant={bits: 8}"]}
    cases |= {
        "16": ["evaluation.quant={bits: 16}"],
        "again": ["evaluation.quant.bits=8"],
    }
    for name, overrides in cases.items():
        out = tmp_path / f"{name}.json"
        result = CliRunner().invoke(app, ["eval", checkpoint, *overrides, "--output", str(out)])
        assert result.exit_code == 0, result.output
        named = "evaluated with quantised weights: " in result.output
        assert named == (name in ("own", "8", "again"))
        completions[name] = [row["completion"] for row in json.loads(out.read_text())["rows"]]
    after = pd.read_parquet(run.evaluation_rows("after"))["completion"].tolist()
    assert completions["own"] == after != completions["off"] == completions["16"]
    assert completions["8"] == completions["again"] != completions["own"]
    written = json.loads(run.evaluation("after").read_text())
    assert written["settings"]["quant"]["bits"] == 4 and written["settings"]["kv"] is None
    tokenizer, policy = load_tokenizer(ModelConfig(path=TINY)), load_model(ModelConfig(path=TINY)).eval()
    before = pd.read_parquet(run.evaluation_rows("before"))
    asked = [prompt_tokens(tokenizer, [dict(part) for part in prompt])[1] for prompt in before["prompt"]]
    settings = CompletionSettings(14, temperature=0.0)
    by_hand = ids_of(rounded(policy, RolloutQuantSpec(bits=4, group_size=32)), tokenizer, asked, settings)
    assert before["completion"].tolist() == tokenizer.batch_decode(by_hand, skip_special_tokens=True)
    same_run = [*HELD_OUT, *shape, "training.learning_rate=1e-3", "training.warmup_steps=0", "training.max_steps=2"]
    resumed = load_recipe("smoke", [*same_run, "output_dir=runs/smoke-seed0", f"resume={run.path}"])
    with pytest.raises(ConfigError, match=r"evaluation\.quant.*accuracy before and after"):
        train(resumed, Console(quiet=True))


def test_a_learner_of_the_samplers_precision_is_evaluated_in_its_own(model, tokenizer, prompts):
    from rltok.run import _own_weights

    full, low = ids_of(model, tokenizer, prompts), ids_of(model, tokenizer, prompts, quant=INT4)
    attach_same_precision(model, INT4)
    assert ids_of(model, tokenizer, prompts) == low != full
    with _own_weights(model):
        assert ids_of(model, tokenizer, prompts) == full
        assert ids_of(model, tokenizer, prompts, quant=INT4) == low
    assert ids_of(model, tokenizer, prompts) == low


@pytest.mark.parametrize(
    "setting",
    [
        ["rollout.quant={bits: 4, learner: same}"],
        ["rollout.quant={bits: 4, learner: same}", LOW],
        ["model.lora={r: 4, alpha: 64}", LOW],
    ],
    ids=["same-precision", "same-precision-low", "lora-low"],
)
def test_a_trained_policy_is_evaluated_as_its_checkpoint_is(tmp_path, monkeypatch, setting):
    monkeypatch.chdir(tmp_path)
    shape = ["training.max_steps=1", "training.steps_per_generation=1", "training.max_completion_length=8"]
    fast = [
        "training.learning_rate=1e-3",
        "training.warmup_steps=0",
        "evaluation.before=false",
        "evaluation.temperature=1.0",
    ]
    assert train(load_recipe("smoke", [*HELD_OUT, *shape, *fast, *setting]), Console(quiet=True)) == 0
    run = RunDirectory(tmp_path / "runs" / "smoke-seed0")
    after = pd.read_parquet(run.evaluation_rows("after"))["completion"].tolist()
    found = {}
    for quant in ("null", "{bits: 4, group_size: 32}", "{bits: 4, group_size: null}"):
        checkpoint = json.loads(run.summary.read_text())["checkpoint"]
        recipe = load_recipe(run.recipe, [f"model.path={checkpoint}", "model.lora=null", f"evaluation.quant={quant}"])
        found[quant] = [row["completion"] for row in evaluate_path(recipe, Console(quiet=True)).rows]
    assert [quant for quant in found if found[quant] == after] == [
        "{bits: 4, group_size: 32}" if LOW in setting else "null"
    ]


# rltok generate


def test_generate_takes_the_section_and_records_it(tmp_path):
    few, whole = tmp_path / "few.yaml", tmp_path / "whole.yaml"
    few.write_text("quant: {bits: 4, group_size: 32}\n")
    whole.write_text(
        yaml.safe_dump({"defaults": "demo", "rollout": {"quant": {"bits": 4, "group_size": 32, "refresh": 2}}})
    )
    assert load_decoding(few).quant == load_decoding(whole).quant
    common = ["generate", TINY, "--prompt", "compute 12 + 7 - 5 + 6", "--chat", "--temperature", "0"]
    common += ["--max-new-tokens", "24"]
    cases: dict[str, list[str]] = {
        "plain": [],
        "few": ["--decoding", str(few)],
        "whole": ["--decoding", str(whole)],
        "other": ["--decoding", str(few), "quant.bits=16"],
    }
    ids, facts = {}, {}
    for name, extra in cases.items():
        result = CliRunner().invoke(app, [*common, *extra, "--out", str(tmp_path / name)])
        assert result.exit_code == 0, result.output
        assert ("4 bits, groups of 32, torch" in result.output) == (name in ("few", "whole"))
        facts[name] = json.loads((tmp_path / name / "generation.json").read_text())["quant"]
        record = json.loads((tmp_path / name / "generations.jsonl").read_text().splitlines()[0])
        assert record["quant"] == facts[name]
        ids[name] = (record["token_ids"], record["logp"])
    assert facts["plain"] is None and facts["few"] == facts["whole"] and facts["other"]["bits"] == 16
    assert facts["few"]["bits"] == 4 and facts["few"]["group_size"] == 32 and "refresh" not in facts["few"]
    assert ids["few"] == ids["whole"] and ids["other"] == ids["plain"]
    assert ids["few"][1] != ids["plain"][1]
    wrong = CliRunner().invoke(
        app, [*common, "--decoding", str(few), "quant.group_size=24", "--out", str(tmp_path / "no")]
    )
    assert wrong.exit_code != 0 and isinstance(wrong.exception, ConfigError) and "quant: " in str(wrong.exception)
    assert not (tmp_path / "no").exists()
