"""Quantised rollouts in training: who samples, which weights, what is logged and refused."""

from __future__ import annotations

import json
import re

import pytest
import torch
from fast_worker import Sampled
from peft import LoraConfig
from tests_support import build_model, build_tokenizer, digit_dataset, even_reward, run_settings

from rltok.config import ConfigError
from rltok.correction import CorrectionConfig
from rltok.fast import LoopSettings, generate_rows, row_key
from rltok.quant import QuantizedShadow, RolloutQuantSpec
from rltok.quant.config import KEYS, NoiseConfig, QuantConfig, build_quant
from rltok.recipe import load_recipe
from rltok.rollout import RolloutConfig, build_rollout
from rltok.trainers import CreditConfig
from rltok.trainers.doors import build_doors, check_doors
from rltok.trainers.fast_engine import prompt_id

INT4 = {"bits": 4}
OFF = {"correction": {"mode": "off"}}


def make(folder, rollout=None, model=None, peft_config=None, eval_dataset=None, **changes):
    tokenizer = build_tokenizer()
    args = CreditConfig(**run_settings(folder, **changes), rollout=rollout)
    model = model or build_model(tokenizer, initializer_range=0.5)
    return Sampled(
        model,
        even_reward,
        args,
        train_dataset=digit_dataset(),
        eval_dataset=eval_dataset,
        processing_class=tokenizer,
        peft_config=peft_config,
    )


def train(*args, **kwargs):
    trainer = make(*args, **kwargs)
    trainer.train()
    return trainer


def parameters(trainer):
    return torch.cat([parameter.detach().flatten() for parameter in trainer.model.parameters()])


def logged(trainer, key):
    return [entry[key] for entry in trainer.state.log_history if key in entry]


def sampled_again(trainer, model, rollout=0, seed=42):
    """The completions of a rollout, row by row from a model outside of the trainer."""
    settings, seen = LoopSettings(max_new_tokens=8, end_ids=(1,)), {}
    for prompt, _ in zip(*trainer.sampled[rollout][1:], strict=True):
        index = seen[tuple(prompt)] = seen.get(tuple(prompt), -1) + 1
        yield generate_rows(model, [prompt], [row_key(seed, rollout, prompt_id(prompt), index)], settings).ids[0]


# ---- limits ----


@pytest.mark.parametrize("learner", ["full", "same"])
def test_sixteen_bits_train_as_the_plain_trainer_bit_for_bit(tmp_path, learner):
    plain = train(tmp_path / "a")
    sixteen = train(tmp_path / "b", {"quant": {"bits": 16, "learner": learner}})
    assert sixteen._quantized_sampler is not None
    assert [row[2] for row in plain.sampled] == [row[2] for row in sixteen.sampled]
    assert torch.equal(parameters(plain), parameters(sixteen))
    assert not any(key.startswith("correction") for entry in sixteen.state.log_history for key in entry)


def test_sixteen_bits_with_weights_have_weight_one(tmp_path):
    """The correction runs, sampler and learner differ by what another batch shape rounds."""
    rollout = {"quant": {"bits": 16}, "correction": {"mode": "truncate", "clip_max": 2.0}}
    trainer = train(tmp_path, rollout, max_steps=2)
    assert max(logged(trainer, "correction/max_abs_diff")) < 1e-5
    assert logged(trainer, "correction/ess") == pytest.approx([1.0] * len(logged(trainer, "correction/ess")))


# ---- whose tokens, whose log-probabilities ----


@pytest.mark.parametrize("lora", [False, True])
def test_the_quantised_copy_samples_and_the_policy_is_left_alone(tmp_path, lora):
    peft = LoraConfig(r=2, target_modules=["q_proj", "down_proj"], init_lora_weights=False) if lora else None
    trainer = make(tmp_path, {"quant": INT4}, peft_config=peft, learning_rate=0.0, max_steps=1)
    before = parameters(trainer)
    shadow = QuantizedShadow(trainer.accelerator.unwrap_model(trainer.model), RolloutQuantSpec(4))
    trainer.train()
    assert torch.equal(parameters(trainer), before)
    sampled = trainer.sampled[0][2]
    assert list(sampled_again(trainer, shadow.module)) == sampled
    assert list(sampled_again(trainer, trainer._causal_lm)) != sampled
    (entry,) = (entry for entry in trainer.state.log_history if "correction/k3" in entry)
    assert entry["correction/k3"] > 1e-4 and 0 < entry["correction/ess"] < 1
    assert entry["quant/shadow_bytes"] < entry["quant/replaced_bytes"] / 4
    assert entry["quant/codes_changed"] == 0.0 and entry["quant/refresh_seconds"] > 0
    assert "quant/noise" not in entry


def test_recorded_log_probabilities_are_the_copys(tmp_path):
    class Kept(Sampled):
        def _generate_and_score_completions(self, inputs):
            self.outputs = super()._generate_and_score_completions(inputs)
            return self.outputs

    tokenizer = build_tokenizer()
    args = CreditConfig(**run_settings(tmp_path, max_steps=1, learning_rate=0.0), rollout={"quant": INT4})
    model = build_model(tokenizer, initializer_range=0.5)
    trainer = Kept(model, even_reward, args, train_dataset=digit_dataset(), processing_class=tokenizer)
    trainer.train()
    out = trainer.outputs
    ids = torch.cat([out["prompt_ids"], out["completion_ids"]], 1)
    mask = torch.cat([out["prompt_mask"], out["completion_mask"]], 1)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    expected = {}
    for name, module in (("sampler", QuantizedShadow(model, RolloutQuantSpec(4)).module), ("learner", model)):
        with torch.no_grad():
            logits = module(input_ids=ids, attention_mask=mask, position_ids=positions).logits[:, :-1].log_softmax(-1)
        expected[name] = logits.gather(2, ids[:, 1:, None])[..., 0][:, -out["completion_ids"].size(1) :]
    on = out["completion_mask"].bool()
    torch.testing.assert_close(out["sampling_per_token_logps"][on], expected["sampler"][on], atol=2e-5, rtol=0)
    weights = (expected["learner"] - expected["sampler"]).exp().clamp(max=2.0)
    torch.testing.assert_close(out["importance_sampling_ratio"][on], weights[on], atol=1e-4, rtol=1e-4)
    assert not out["importance_sampling_ratio"].requires_grad


def test_a_refresh_brings_the_copy_to_the_present_policy(tmp_path):
    trainer = train(tmp_path, {"quant": INT4}, learning_rate=0.05, max_steps=6)
    changed = logged(trainer, "quant/codes_changed")
    assert changed[0] == 0.0 and len(changed) > 1 and all(0 < share < 1 for share in changed[1:])
    shadow = trainer._quantized_sampler.shadow
    shadow.sync()
    fresh = QuantizedShadow(trainer.accelerator.unwrap_model(trainer.model), RolloutQuantSpec(4))
    for name, layer in fresh.layers.items():
        assert torch.equal(layer.state.codes, shadow.layers[name].state.codes)
        assert torch.equal(layer.state.scale, shadow.layers[name].state.scale)


def test_refresh_skips_generation_batches_and_resumes_with_the_old_codes(tmp_path):
    saving = {"save_strategy": "steps", "save_steps": 3, "learning_rate": 0.05, "max_steps": 9}
    rollout = {"quant": INT4 | {"refresh": 2}}
    whole = train(tmp_path / "a", rollout, **saving)
    assert len(logged(whole, "quant/codes_changed")) == -(-whole._fast.rollouts // 2) < whole._fast.rollouts
    resumed = make(tmp_path / "b", rollout, **saving)
    resumed.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-3"))
    assert torch.equal(parameters(whole), parameters(resumed))


def test_a_run_resumes_exactly(tmp_path):
    saving = {"save_strategy": "steps", "save_steps": 3, "max_steps": 6}
    rollout = {"quant": INT4 | {"noise": {"start": 0.1, "end": 0.01, "stages": 3}}}
    whole = train(tmp_path / "a", rollout, **saving)
    resumed = make(tmp_path / "b", rollout, **saving)
    resumed.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-3"))
    assert torch.equal(parameters(whole), parameters(resumed))


# ---- noise ----


def test_noise_is_in_the_sampler_alone_and_falls(tmp_path):
    noise = {"start": 0.3, "end": 0.03, "stages": 3}
    trainer = train(tmp_path, {"quant": {"bits": 16, "noise": noise}}, max_steps=9)
    seen = logged(trainer, "quant/noise")
    assert seen == sorted(seen, key=lambda sigma: (sigma > 0, -sigma)) and set(seen) == {0.0, 0.3, 0.03}
    apart = logged(trainer, "correction/k3")
    assert apart[0] < 1e-6 < max(apart)


def test_sigma_by_hand():
    noise = NoiseConfig()
    assert [noise.sigma(step, 100) for step in (0, 9)] == [0.0, 0.0]
    assert [noise.sigma(step, 100) for step in (10, 50, 90, 500)] == pytest.approx([1e-2, 1e-3, 1e-4, 1e-4])


# ---- the learner in the same precision ----


def test_a_learner_of_the_same_precision_is_the_sampler(tmp_path):
    """The same weights on both sides: what is left of the mismatch is rounding of float32."""
    apart = train(tmp_path / "a", {"quant": INT4}, max_steps=4)
    same = train(tmp_path / "b", {"quant": INT4 | {"learner": "same"}}, max_steps=4)
    assert apart.sampled[0][2] == same.sampled[0][2]
    assert max(logged(same, "correction/max_abs_diff")) < 1e-4 < min(logged(apart, "correction/max_abs_diff"))
    assert not torch.equal(parameters(apart), parameters(same))


def test_a_quantised_learner_is_evaluated_as_it_is(tmp_path):
    def evaluated(learner, **changes):
        rollout = {"quant": INT4 | {"learner": learner}}
        trainer = make(tmp_path / learner, rollout, eval_dataset=digit_dataset(4), temperature=1.0, **changes)
        trainer.evaluate()
        return trainer.sampled[-1][1:], trainer

    (prompts, full), _ = evaluated("full")
    (also, same), trainer = evaluated("same")
    assert prompts == also and full != same
    trainer.model.eval()
    assert trainer._sampling_lm is trainer._quantized_sampler.shadow.module


# ---- sections and refusals ----


def test_the_recommended_correction_is_on_unless_another_is_set():
    config = build_rollout({"quant": INT4})
    assert config.modifies_sampler and config.records_logps
    assert config.resolved_correction == CorrectionConfig(mode="truncate", clip_max=2.0)
    assert build_rollout({"quant": INT4} | OFF).resolved_correction.mode == "off"
    both = build_rollout({"quant": INT4, "kv": {"policy": "h2o", "budget": 8}}).resolved_correction
    assert both == CorrectionConfig(mode="truncate", clip_max=1.5, veto=1e-4)
    neutral = build_rollout({"quant": {"bits": 16}})
    assert not neutral.modifies_sampler and neutral.resolved_correction.mode == "off"


def test_training_without_correction_is_warned_about_unless_the_learner_is_the_same(tmp_path, recwarn):
    with pytest.warns(UserWarning, match=r"mode='off' with rollout\.quant"):
        make(tmp_path, {"quant": INT4} | OFF)
    recwarn.clear()
    make(tmp_path, {"quant": INT4 | {"learner": "same"}} | OFF)
    assert not [w for w in recwarn if "rollout.quant" in str(w.message)]


@pytest.mark.parametrize(
    "section",
    [
        {"bits": 8},
        {"bits": 4, "group_size": 16, "skip": ["lm_head", "o_proj"], "refresh": 3},
        {"bits": 4, "learner": "same"},
        {"bits": 16, "noise": {"stages": 5}},
        {"bits": 8, "backend": "fp8", "noise": None},
    ],
)
def test_a_filled_section_reads_back_as_the_same_settings(section):
    filled = json.loads(json.dumps(load_recipe("demo", [f"rollout.quant={json.dumps(section)}"]).rollout["quant"]))
    assert build_quant(filled) == build_quant(section)
    assert set(filled) == set(KEYS)


@pytest.mark.parametrize(
    ("section", "named"),
    [
        ({"scheme": "symmetric"}, "rollout.quant.bits: missing"),
        ({"bits": 5}, "rollout.quant.bits: 5"),
        ({"bits": 4, "scheme": "asymmetric"}, "rollout.quant.scheme"),
        ({"bits": 4, "backend": "aten_int8"}, "backend='aten_int8' serves bits=8"),
        ({"bits": 4, "refresh": 0}, "refresh=0"),
        ({"bits": 16, "refresh": 2}, "refresh=2 with bits=16"),
        ({"bits": 4, "refresh": 2, "learner": "same"}, "refresh=2 with learner='same'"),
        ({"bits": 4, "learner": "half"}, "rollout.quant.learner"),
        ({"bits": 4, "noise": {"start": 0.1, "end": 0.2}}, "start=0.1, end=0.2"),
        ({"bits": 4, "granularity": "row"}, "unknown key 'granularity'"),
        (4, "not a mapping"),
    ],
)
def test_wrong_sections_are_refused(section, named):
    with pytest.raises(ConfigError, match=re.escape(named)):
        build_rollout({"quant": section})
    with pytest.raises(ConfigError, match=re.escape(named)):
        load_recipe("demo", [f"rollout.quant={json.dumps(section)}"])


def test_a_spec_is_a_section():
    assert RolloutConfig(quant=QuantConfig(RolloutQuantSpec(4))) == build_rollout({"quant": RolloutQuantSpec(4)})


@pytest.mark.parametrize(
    ("settings", "engine"),
    [
        ({"use_vllm": True, "vllm_mode": "server"}, "vllm_server"),
        ({"use_vllm": True, "vllm_mode": "colocate"}, "vllm_colocate"),
        ({"use_transformers_continuous_batching": True}, "continuous_batching"),
        ({}, "transformers"),
    ],
)
def test_engines_with_weights_of_their_own_are_refused(settings, engine):
    rollout = {"quant": INT4} | ({} if settings else {"engine": "transformers"})
    args = CreditConfig(**run_settings("unused", **settings), rollout=rollout)
    with pytest.raises(ConfigError, match=rf"rollout\.quant .*{engine} .*rollout\.engine=fast"):
        check_doors(build_doors(None, None, rollout), args, ["even_reward"])


@pytest.mark.parametrize("engine", ["zero3", "fsdp2"])
def test_weights_that_are_shared_out_are_refused_by_name(tmp_path, monkeypatch, engine):
    monkeypatch.setattr("rltok.trainers.quantized_sampler.training_engine", lambda trainer: engine)
    with pytest.raises(ConfigError, match=rf"rollout\.quant .*{engine}.*launch\.strategy"):
        make(tmp_path, {"quant": INT4})


def test_models_that_cannot_be_copied_are_refused_before_the_first_step(tmp_path):
    with pytest.raises(ConfigError, match=r"rollout\.quant: .*group_size=7"):
        make(tmp_path, {"quant": INT4 | {"group_size": 7}})
    with pytest.raises(ConfigError, match=r"rollout\.quant: skip="):
        make(tmp_path, {"quant": INT4 | {"skip": ["model"]}})
