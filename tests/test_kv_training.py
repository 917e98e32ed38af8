"""Cache policies in training, evaluation and generation: whose tokens, which weights, what is logged and refused."""

from __future__ import annotations

import json
import logging
import re

import pytest
import torch
from fast_worker import Sampled
from tests_support import build_model, build_tokenizer, digit_dataset, even_reward, run_settings
from transformers import GPT2Config, GPT2LMHeadModel
from typer.testing import CliRunner

from rltok.cli import app
from rltok.complete import CompletionSettings, complete, completed_ids
from rltok.config import ConfigError
from rltok.correction import CorrectionConfig, mismatch_quantiles
from rltok.fast import LoopSettings, generate_rows, row_key
from rltok.kv import H2O, RKV, HoldConfig, KVConfig, StreamingLLM, build_kv, kv_settings, policy_cache
from rltok.recipe import load_recipe
from rltok.rollout import RolloutConfig, build_rollout
from rltok.trainers import CreditConfig
from rltok.trainers.doors import build_doors, check_doors
from rltok.trainers.fast_engine import prompt_id

SMALL = {"policy": "streaming_llm", "sink": 1, "recent": 3, "interval": 1}
LARGE = {"policy": "h2o", "budget": 200}


def make(folder, rollout=None, model=None, **changes):
    tokenizer = build_tokenizer()
    args = CreditConfig(**run_settings(folder, **changes), rollout=rollout)
    model = model or build_model(tokenizer, initializer_range=0.5)
    return Sampled(model, even_reward, args, train_dataset=digit_dataset(), processing_class=tokenizer)


def train(*args, **kwargs):
    trainer = make(*args, **kwargs)
    trainer.train()
    return trainer


def parameters(trainer):
    return torch.cat([parameter.detach().flatten() for parameter in trainer.model.parameters()])


def logged(trainer, key):
    return [entry[key] for entry in trainer.state.log_history if key in entry]


# ---- whose tokens, whose log-probabilities ----


@pytest.mark.parametrize("engine", ["fast", "transformers"])
def test_a_budget_above_the_length_trains_as_the_dense_cache_does_bit_for_bit(tmp_path, engine):
    rollout = {"engine": engine, "correction": {"mode": "off"}}
    dense = train(tmp_path / "a", rollout)
    kept = train(tmp_path / "b", rollout | {"kv": LARGE})
    assert torch.equal(parameters(dense), parameters(kept))


@pytest.mark.parametrize("engine", ["fast", "transformers"])
def test_a_small_budget_samples_another_policy_and_says_so(tmp_path, engine):
    dense = train(tmp_path / "a", {"engine": engine}, max_steps=1)
    kept = train(tmp_path / "b", {"engine": engine, "kv": SMALL}, max_steps=1)
    assert dense.sampled[0][1] == kept.sampled[0][1] and dense.sampled[0][2] != kept.sampled[0][2]
    (entry,) = (entry for entry in kept.state.log_history if "correction/ratio_min" in entry)
    assert 0 < entry["correction/ratio_min"] <= entry["correction/ratio_p5"] < 0.99
    assert entry["correction/agreement_p5"] <= entry["correction/ratio_p5"]
    assert entry["correction/max_abs_diff"] > 0.1 and 0 < entry["correction/ess"] < 1
    assert entry["rollout/peak_cache_bytes"] > 0
    rows = [
        len(prompt) + len(ids) for _, prompts, found in kept.sampled for prompt, ids in zip(prompts, found, strict=True)
    ]
    share = sum(min(4, length) for length in rows) / sum(rows)
    assert entry["kv/kept_share"] == pytest.approx(share)
    assert not any(key.startswith("correction") for entry in dense.state.log_history for key in entry)


def test_what_is_recorded_is_what_a_lone_row_would_be_drawn_from(tmp_path):
    """Sampled anew outside of the trainer, one row at a time, under the same policy."""
    trainer = train(tmp_path, {"kv": SMALL}, learning_rate=0.0, max_steps=1, seed=5)
    policy, settings = StreamingLLM(sink=1, recent=3, interval=1), LoopSettings(max_new_tokens=8, end_ids=(1,))
    seen: dict[tuple, int] = {}
    ((_, prompts, sampled),) = trainer.sampled
    with policy_cache(trainer.model, policy) as cache:
        for prompt, ids in zip(prompts, sampled, strict=True):
            index = seen[tuple(prompt)] = seen.get(tuple(prompt), -1) + 1
            key = row_key(5, 0, prompt_id(prompt), index)
            assert generate_rows(trainer.model, [prompt], [key], settings, cache=cache).ids == [ids]


def test_training_evaluation_keeps_every_token(tmp_path):
    trainer = make(tmp_path, {"kv": SMALL})
    assert trainer._kv_policy == StreamingLLM(sink=1, recent=3, interval=1)
    trainer.model.eval()
    assert trainer._kv_policy is None


# ---- the correction that goes with it ----


def test_the_recommended_correction_is_on_unless_another_is_set():
    config = build_rollout({"kv": SMALL})
    assert config.modifies_sampler and config.records_logps
    assert config.resolved_correction == CorrectionConfig(mode="truncate", clip_max=1.5, veto=1e-4)
    assert build_rollout({"kv": SMALL, "correction": {"mode": "off"}}).resolved_correction.mode == "off"
    paper = {"mode": "truncate", "clip_max": None, "veto": 0.01}
    assert build_rollout({"kv": SMALL, "correction": paper}).resolved_correction == CorrectionConfig(**paper)


def test_training_without_correction_is_warned_about(tmp_path):
    with pytest.warns(UserWarning, match=r"mode='off' with rollout\.kv"):
        make(tmp_path, {"kv": SMALL, "correction": {"mode": "off"}})


def test_rejected_completions_stay_in_the_group_and_leave_the_loss(tmp_path):
    class Kept(Sampled):
        def _generate_and_score_completions(self, inputs):
            self.outputs = super()._generate_and_score_completions(inputs)
            return self.outputs

    tokenizer = build_tokenizer()
    rollout = {"kv": SMALL, "correction": {"mode": "truncate", "clip_max": 1.5, "veto": 0.5}}
    args = CreditConfig(**run_settings(tmp_path, max_steps=1), rollout=rollout)
    model = build_model(tokenizer, initializer_range=0.5)
    trainer = Kept(model, even_reward, args, train_dataset=digit_dataset(), processing_class=tokenizer)
    trainer.train()
    weights = trainer.outputs["importance_sampling_ratio"]
    rejected = (weights == 0).all(1)
    assert 0 < rejected.sum() < len(rejected)
    assert not trainer.outputs["tool_mask"][rejected].any()
    ids = trainer.sampled[0][2]
    rewards = torch.tensor(even_reward(tokenizer.batch_decode(ids, skip_special_tokens=True))).view(-1, 4)
    expected = ((rewards - rewards.mean(1, keepdim=True)) / (rewards.std(1, keepdim=True) + 1e-4)).flatten()
    torch.testing.assert_close(trainer.outputs["advantages"][~rejected, 0], expected[~rejected])
    assert logged(trainer, "correction/vetoed") == [pytest.approx(rejected.float().mean().item())]


def test_quantiles_of_the_mismatch_by_hand():
    x = torch.log(torch.tensor([1.25, 0.8, 0.005, 1.0]))
    found = mismatch_quantiles(torch.cat([x, torch.tensor([torch.nan])]))
    assert found["ratio_min"].item() == pytest.approx(0.005) == found["ratio_p5"].item()
    assert found["agreement_p5"].item() == pytest.approx(0.005)
    ratios = torch.linspace(0.5, 1.5, 101)
    found = mismatch_quantiles(ratios.log())
    assert found["ratio_p5"].item() == pytest.approx(0.55)  # six of 101 are not above it, and five would be too few
    below = torch.minimum(ratios, 1 / ratios).sort().values[5]
    assert found["agreement_p5"].item() == pytest.approx(below.item())
    assert all(value == 1 for value in mismatch_quantiles(torch.zeros(0)).values())
    assert all(value == 1 for value in mismatch_quantiles(torch.zeros(7)).values())


# ---- holding the agreement ----


def test_a_move_of_the_budget():
    hold = HoldConfig(least=10, most=130)
    assert [hold.moved(100, p5) for p5 in (0.80, 0.86, 0.90, 0.95, float("nan"))] == [125, 100, 100, 80, 100]
    assert hold.moved(120, 0.1) == 130 and hold.moved(11, 1.0) == 10
    moved = KVConfig(H2O(8, 8), budget=16, hold=HoldConfig(least=4, most=64)).at(20)
    assert moved == H2O(10, 10)
    assert KVConfig(StreamingLLM(sink=2, recent=14), budget=16).at(20) == StreamingLLM(sink=2, recent=18)


@pytest.mark.parametrize(("start", "agreement", "way"), [(6, 0.999, 1), (12, 0.001, -1)])
def test_the_budget_moves_from_rollout_to_rollout(tmp_path, start, agreement, way):
    hold = {"least": 4, "most": 20, "agreement": agreement, "slack": 0.0}
    kv = {"policy": "streaming_llm", "sink": 1, "budget": start, "interval": 1, "hold": hold}
    trainer = train(tmp_path, {"kv": kv}, max_steps=9)
    budgets = logged(trainer, "kv/budget")
    assert budgets[0] == start and len(set(budgets)) >= 3
    assert budgets == sorted(budgets, reverse=way < 0)
    assert trainer._kv_policy.sink == 1 and trainer._kv_policy.recent == trainer._sampler_cache.budget - 1


def test_a_resumed_run_goes_on_with_the_budget_it_had(tmp_path):
    hold = {"least": 4, "most": 20, "agreement": 0.999}
    rollout = {"kv": {"policy": "streaming_llm", "sink": 1, "budget": 6, "interval": 1, "hold": hold}}
    saving = {"save_strategy": "steps", "save_steps": 3}
    whole = train(tmp_path / "a", rollout, max_steps=9, **saving)
    resumed = make(tmp_path / "b", rollout, max_steps=9, **saving)
    resumed.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-6"))
    assert torch.equal(parameters(whole), parameters(resumed))
    assert resumed._sampler_cache.budget == whole._sampler_cache.budget > 6


def test_unsafe_learning_is_said_once_and_logged(tmp_path, caplog):
    with caplog.at_level(logging.WARNING, logger="rltok.trainers.sampler_cache"):
        trainer = train(tmp_path, {"kv": SMALL | {"safe_agreement": 0.99}}, max_steps=6)
    (record,) = (r for r in caplog.records if r.name == "rltok.trainers.sampler_cache")
    assert "unsafe" in record.message and "rollout.kv.budget" in record.message
    assert logged(trainer, "kv/unsafe")[0] == 1.0
    caplog.clear()
    with caplog.at_level(logging.WARNING, logger="rltok.trainers.sampler_cache"):
        trainer = train(tmp_path / "b", {"kv": LARGE}, max_steps=3)
    assert not [r for r in caplog.records if r.name == "rltok.trainers.sampler_cache"]
    assert logged(trainer, "kv/unsafe")[0] == 0.0


# ---- sections and refusals ----


@pytest.mark.parametrize(
    "section",
    [
        {"policy": "h2o", "budget": 32},
        {"policy": "h2o", "heavy": 3, "recent": 5, "observe": "window"},
        {"policy": "r_kv", "budget": 16, "hold": {"least": 12, "most": 64}},
        {"policy": "snap_kv", "budget": 40, "interval": 8, "safe_agreement": 0.5},
    ],
)
def test_a_filled_section_reads_back_as_the_same_settings(section):
    filled = json.loads(json.dumps(load_recipe("demo", [f"rollout.kv={json.dumps(section)}"]).rollout["kv"]))
    assert build_kv(filled) == build_kv(section)
    assert set(kv_settings(section, "rollout.kv")) == set(filled)


@pytest.mark.parametrize(
    ("section", "named"),
    [
        ({"policy": "h3o"}, "unknown policy 'h3o'; did you mean 'h2o'"),
        ({"budget": 3}, "rollout.kv.policy: missing"),
        ({"policy": "h2o", "budget": 0}, "rollout.kv.budget: 0"),
        ({"policy": "h2o", "budget": 8, "heavy": 4}, "rollout.kv.heavy and rollout.kv.budget"),
        ({"policy": "h2o", "hold": {"least": 1, "most": 2}}, "hold moves the budget"),
        ({"policy": "h2o", "budget": 8, "hold": {"least": 9, "most": 12}}, "budget=8 is outside"),
        ({"policy": "streaming_llm", "budget": 8, "hold": {"least": 2, "most": 12}}, "recent=-2"),
        ({"policy": "h2o", "budget": 8, "hold": {"least": 2, "most": 12, "factor": 1}}, "factor=1"),
        ({"policy": "h2o", "safe_agreement": 1.0}, "safe_agreement=1.0"),
        ({"policy": "h2o", "interval": 0}, "interval=0"),
        ("h2o", "not a mapping"),
    ],
)
def test_wrong_sections_are_refused(section, named):
    with pytest.raises(ConfigError, match=re.escape(named)):
        build_rollout({"kv": section})
    with pytest.raises(ConfigError, match=re.escape(named)):
        load_recipe("demo", [f"rollout.kv={json.dumps(section)}"])


def test_a_policy_object_is_a_section():
    assert RolloutConfig(kv=KVConfig(RKV(16))) == build_rollout({"kv": RKV(16)})
    with pytest.raises(TypeError, match="no cache policy"):
        KVConfig("h2o")


@pytest.mark.parametrize(
    ("settings", "engine"),
    [
        ({"use_vllm": True, "vllm_mode": "server"}, "vllm_server"),
        ({"use_transformers_continuous_batching": True}, "continuous_batching"),
    ],
)
def test_engines_with_a_cache_of_their_own_are_refused(settings, engine):
    doors = build_doors(None, None, {"kv": SMALL})
    args = CreditConfig(**run_settings("unused", **settings), rollout={"kv": SMALL})
    with pytest.raises(ConfigError, match=rf"rollout\.kv .*{engine} .*rollout\.engine=fast"):
        check_doors(doors, args, ["even_reward"])


def test_models_that_a_policy_does_not_serve_are_refused_before_the_first_step(tmp_path):
    tokenizer = build_tokenizer()
    eager = build_model(tokenizer, attn_implementation="eager")
    with pytest.raises(ConfigError, match=r"rollout\.kv: model\.attn_implementation='eager'"):
        make(tmp_path, {"kv": SMALL}, model=eager)
    with pytest.raises(ConfigError, match=r"rollout\.kv: budgets has 1 numbers"):
        make(tmp_path, {"kv": {"policy": "compress_kv", "budgets": [40]}})
    with pytest.raises(ConfigError, match=r"evaluation\.kv\.hold"):
        load_recipe("demo", ["evaluation.kv={policy: h2o, budget: 8, hold: {least: 4, most: 9}}"])


# ---- outside of training ----


@pytest.mark.parametrize("engine", ["fast", "transformers"])
def test_completions_under_a_policy(engine):
    tokenizer = build_tokenizer()
    model = build_model(tokenizer, initializer_range=0.5).eval()
    prompts = [tokenizer(row["prompt"])["input_ids"] for row in digit_dataset(6)]
    settings = CompletionSettings(12, temperature=0.0, engine=engine)

    def greedy(kv):
        return completed_ids(complete(model, tokenizer, prompts, settings, kv=kv))

    assert greedy(H2O(90, 90)) == greedy(None) != greedy(StreamingLLM(sink=1, recent=3, interval=1))


def test_generate_and_eval_take_the_section(tmp_path):
    runner = CliRunner()
    recipe = tmp_path / "few.yaml"
    recipe.write_text("kv: {policy: streaming_llm, sink: 1, recent: 7, interval: 1}\n")
    common = ["generate", "tiny-reasoner", "--prompt", "2 + 3 + 4 =", "--temperature", "0", "--max-new-tokens", "24"]
    for out, extra in (("dense", []), ("kept", ["--decoding", str(recipe)])):
        result = runner.invoke(app, [*common, *extra, "--out", str(tmp_path / out)])
        assert result.exit_code == 0, result.output
    facts = {out: json.loads((tmp_path / out / "generation.json").read_text()) for out in ("dense", "kept")}
    assert facts["dense"]["kv"] is None
    assert facts["kept"]["kv"]["policy"] == "streaming_llm" and facts["kept"]["kv"]["recent"] == 7
    texts = {out: (tmp_path / out / "generations.jsonl").read_text() for out in ("dense", "kept")}
    assert texts["dense"] != texts["kept"]


def test_a_model_with_learned_positions_serves_too():
    """Nothing in a policy needs rotary keys as long as they stay where they are."""
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=50, n_positions=64, n_embd=32, n_layer=2, n_head=2)).eval()
    settings = LoopSettings(max_new_tokens=10, end_ids=(), temperature=0.0)
    dense = generate_rows(model, [[5, 6, 7]], None, settings).ids
    with policy_cache(model, StreamingLLM(sink=2, recent=90)) as cache:
        assert generate_rows(model, [[5, 6, 7]], None, settings, cache=cache).ids == dense
