"""Decoding methods in training: what is recorded, weighted and left out, on TRL's transformers engines; refusals."""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass

import pytest
import torch
from tests_support import build_model, build_tokenizer, digit_dataset, even_reward, run_settings, teacher_forced
from transformers import TemperatureLogitsWarper

from rltok.config import ConfigError
from rltok.correction import CorrectionConfig
from rltok.rollout import RolloutConfig, build_rollout, strictest
from rltok.sampling import DecodingContext, DecodingModule, RolloutProcessor, make_processors
from rltok.steering import SteeringVector, decoder_layers, describe_model, save_vectors
from rltok.trainers import CreditConfig, CreditTrainer
from rltok.trainers.doors import build_doors, check_doors
from rltok.trainers.engine_choice import engine_of
from rltok.trainers.engines import _check_processor, check_built

REFLEX = {"type": "cyclic_reflex", "words": ["1", "2", "3"], "amplitude": 2.0, "period": 6.0}
SWITCHING = {"type": "thought_switching", "words": ["4", "5"], "alpha": 1.0, "beta": 3}
SUPPRESSION = {"type": "reflection_suppression", "words": ["6"], "strength": 1.5, "variants": "bare"}
FORCING = {"type": "budget_forcing", "min_tokens": 3, "max_tokens": 5, "ignore": 0, "wait_text": "w"}
FORCING["final_text"] = "so"
BATCHING = {
    "use_transformers_continuous_batching": True,
    "transformers_continuous_batching_config": {"num_blocks": 64, "max_batch_tokens": 64},
}
TEMPERATURE = {"type": "adaptive_temperature", "tau": 0.5}
ALL = [REFLEX, SWITCHING, SUPPRESSION, FORCING, TEMPERATURE]


class Watching(CreditTrainer):
    """Keeps the scored rollouts and the statistics that their temperatures came from."""

    def _generate_and_score_completions(self, inputs):
        before = self._sampler_stats
        output = super()._generate_and_score_completions(inputs)
        self.seen = [*getattr(self, "seen", []), (before, {k: v for k, v in output.items()})]
        return output


def make(folder, decoding=(), cls=Watching, rollout=None, model=None, **changes):
    tokenizer = build_tokenizer()
    args = CreditConfig(**run_settings(folder, **changes), rollout={"decoding": list(decoding), **(rollout or {})})
    model = model or build_model(tokenizer, initializer_range=0.3)
    return cls(model, even_reward, args, train_dataset=digit_dataset(), processing_class=tokenizer)


def train(folder, *args, **kwargs):
    trainer = make(folder, *args, **kwargs)
    trainer.train()
    return trainer


def logged(trainer, key):
    return [entry[key] for entry in trainer.state.log_history if key in entry]


def recomputed(trainer, stats, output, temperature):
    """(B, T) log-probabilities of a rollout: the policy's logits through the same processors, step by step."""
    context = DecodingContext(temperature, stats, trainer.processing_class)
    chain = [*make_processors(trainer.doors.rollout.decoding, context), TemperatureLogitsWarper(temperature)]
    logps = teacher_forced(trainer.model.eval(), output, chain)
    trainer.model.train()
    return logps


@pytest.mark.parametrize("engine", ["fast", "transformers", "continuous_batching"])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_recorded_log_probabilities_are_those_of_the_processors(tmp_path, engine, temperature):
    decoding = [d for d in ALL if engine != "continuous_batching" or d is not FORCING]
    choice = BATCHING if engine == "continuous_batching" else {"rollout": {"engine": engine}}
    trainer = make(tmp_path, decoding, temperature=temperature, learning_rate=0.0, max_steps=4, **choice)
    assert engine_of(trainer.args, trainer.doors.rollout) == engine
    trainer.train()
    assert len(trainer.seen) == 2 and trainer.seen[0][0] is None and trainer.seen[1][0] is not None
    for stats, output in trainer.seen:
        mask = output["completion_mask"].bool()
        expected = recomputed(trainer, stats, output, temperature)
        torch.testing.assert_close(output["sampling_per_token_logps"][mask], expected[mask], atol=1e-5, rtol=0)
    assert logged(trainer, "correction/max_abs_diff")[0] > 0.1


def test_forced_tokens_leave_the_loss(tmp_path):
    trainer = train(tmp_path, [FORCING], max_steps=1)
    ((_, output),) = trainer.seen
    ids, mask = output["completion_ids"], output["completion_mask"].bool()
    tokenizer = trainer.processing_class
    forced = mask & (output["sampling_per_token_logps"] == 0)
    assert forced.any() and not forced.all(dim=1).any()
    texts = {tokenizer.decode(row[f]) for row, f in zip(ids, forced, strict=True) if f.any()}
    assert all(text.replace(" ", "").replace("<eos>", "") in {"so", "s"} or "<eos>" in text for text in texts), texts
    assert torch.equal(output["tool_mask"].bool() & mask, mask & ~forced)
    assert output["num_items_in_batch"] == (mask & ~forced).sum()
    assert logged(trainer, "rollout/forced") == [pytest.approx(forced.sum().item() / mask.sum().item())]
    assert (mask.sum(1) >= 3).all(), "no completion ends before the least length"


def test_forced_tokens_need_no_correction_to_leave_the_loss(tmp_path):
    rollout = {"correction": {"mode": "off"}}
    with pytest.raises(ConfigError, match="puts words in place of samples.*mode='off'.*strict=false"):
        make(tmp_path, [FORCING], rollout=rollout)
    trainer = train(tmp_path, [FORCING], rollout=rollout | {"strict": False}, max_steps=1)
    ((_, output),) = trainer.seen
    assert (output["tool_mask"] == 0).any()


NEUTRAL = [
    {"type": "cyclic_reflex", "words": ["1"], "amplitude": 0.0},
    {"type": "thought_switching", "words": ["1"], "alpha": 0.0},
    {"type": "reflection_suppression", "words": ["1"], "strength": 0.0},
    {"type": "budget_forcing", "min_tokens": 0, "max_tokens": None, "ignore": 0},
    {"type": "adaptive_temperature", "tau": 0.0},
]


def test_neutral_methods_cost_nothing_and_change_nothing(tmp_path):
    plain = train(tmp_path / "a")
    neutral = train(tmp_path / "b", NEUTRAL)
    assert not neutral.doors.rollout.modifies_sampler and not neutral.doors.rollout.records_logps
    for a, b in zip(plain.model.parameters(), neutral.model.parameters(), strict=True):
        assert torch.equal(a, b)
    for (_, a), (_, b) in zip(plain.seen, neutral.seen, strict=True):
        assert torch.equal(a["completion_ids"], b["completion_ids"])


@pytest.mark.parametrize("engine", ["fast", "transformers"])
def test_evaluation_during_training_samples_plainly(tmp_path, monkeypatch, engine):
    import rltok.trainers.credit_trainer as module

    modes = []
    real = module.named_processors

    def counting(modules, context):
        modes.append(trainer.model.training)
        return real(modules, context)

    monkeypatch.setattr(module, "named_processors", counting)
    trainer = make(tmp_path, ALL, per_device_eval_batch_size=4, max_steps=1, rollout={"engine": engine})
    trainer.train()
    assert modes == [True]
    trainer.evaluate(eval_dataset=digit_dataset(4))
    assert modes == [True]


# ---- refusals, defaults and warnings ----


REFUSED = [
    (
        {"decoding": [FORCING], "use_transformers_continuous_batching": True},
        "BudgetForcingConfig does not run on the engine continuous_batching.*continuous_batching=false",
    ),
    ({"decoding": [SUPPRESSION | {"strength": None}]}, r"decoding\[0\].*probability 0.*finite strength.*strict=false"),
    ({"decoding": [REFLEX | {"words": ["wait", "but"]}]}, r"rollout.decoding\[0\]: of words=\['wait', 'but'\] only 0"),
    ({"decoding": [REFLEX], "generation_kwargs": {"num_beams": 2}}, "num_beams"),
    ({"decoding": [REFLEX], "generation_kwargs": {"top_p": 0.9}}, "generation_kwargs sets top_p.*strict=false"),
    ({"decoding": [REFLEX], "generation_kwargs": {"temperature": 0.5}}, "generation_kwargs sets temperature"),
    ({"decoding": [REFLEX | {"amplitude": -1.0}]}, r"rollout.decoding\[0\].*amplitude=-1.0"),
    ({"decoding": [REFLEX | {"period": 0.0}]}, "period=0.0"),
    ({"decoding": [REFLEX | {"windows": [[5, 5]]}]}, r"windows has \[5, 5\]"),
    ({"decoding": [REFLEX, REFLEX]}, "CyclicReflexConfig 2 times"),
]


@pytest.mark.parametrize(("changes", "message"), REFUSED, ids=[m[:40] for _, m in REFUSED])
def test_what_cannot_work_is_refused_at_construction(tmp_path, changes, message):
    with pytest.raises(ConfigError, match=f"(?s){message}"):
        make(tmp_path, **changes)


VLLM = {"use_vllm": True, "vllm_mode": "colocate"}


def check(decoding, rollout=None, **settings):
    """What is checked before any engine is loaded; vLLM need not be installed for it."""
    args = CreditConfig(**run_settings("unused", **settings))
    doors = build_doors(None, None, {"decoding": decoding, **(rollout or {})})
    check_doors(doors, args, ["even_reward"])
    return engine_of(args, doors.rollout)


def test_every_method_runs_on_vllm_as_far_as_settings_tell():
    assert check(ALL, **VLLM) == "vllm_colocate"
    assert check(ALL, use_vllm=True, vllm_mode="server") == "vllm_server"


def test_trls_correction_of_whole_completions_is_refused_with_decoding():
    off = {"correction": {"mode": "off"}, "strict": False}
    with pytest.raises(ConfigError, match="vllm_importance_sampling_mode='sequence_mask' drops almost every"):
        check([REFLEX], off, **VLLM)
    assert check([REFLEX], off, vllm_importance_sampling_correction=False, **VLLM)
    assert check([REFLEX], off, vllm_importance_sampling_mode="token_truncate", **VLLM)


@dataclass(frozen=True)
class Own(DecodingModule):
    """A user's method that says it runs everywhere."""

    is_neutral = False

    def processor(self, context):
        return OwnProcessor()


class OwnProcessor(RolloutProcessor):
    def apply(self, scores, rows, columns):
        return scores


def test_a_method_of_ones_own_runs_where_its_processor_can(tmp_path):
    rollout = RolloutConfig(decoding=[Own()])
    tokenizer = build_tokenizer()

    def build(**settings):
        args = CreditConfig(**run_settings(tmp_path, **settings))
        data = {"train_dataset": digit_dataset(), "processing_class": tokenizer}
        return CreditTrainer(build_model(tokenizer), even_reward, args, rollout=rollout, **data)

    assert build().doors.rollout.modifies_sampler
    with pytest.raises(ConfigError, match=r"decoding\[0\]: OwnProcessor remembers more of a row"):
        build(use_transformers_continuous_batching=True)
    with pytest.raises(ValueError, match="OwnProcessor cannot be sent to an engine.*use_vllm=False"):
        _check_processor(OwnProcessor(), "vllm_colocate")


def test_a_server_without_processors_stops_every_rank(tmp_path, monkeypatch):
    import rltok.trainers.vllm as module

    def missing(generation):
        raise ConfigError("the server has no processors")

    monkeypatch.setattr(module, "probe_server", missing)
    trainer = make(tmp_path, [REFLEX], rollout={"engine": "transformers"})
    trainer.vllm_generation, trainer.args.use_vllm, trainer.args.vllm_mode = None, True, "server"
    with pytest.raises(ConfigError, match="the server has no processors"):
        check_built(trainer)
    monkeypatch.setattr(module, "probe_server", lambda generation: None)
    check_built(trainer)
    trainer._is_vlm = True
    with pytest.raises(ConfigError, match="images on a vLLM server"):
        check_built(trainer)


def test_a_rollout_func_is_out_of_reach(tmp_path):
    def rollout_func(prompts, trainer):
        raise AssertionError("never called")

    tokenizer = build_tokenizer()
    args = CreditConfig(**run_settings(tmp_path), rollout={"decoding": [REFLEX]})
    with pytest.raises(ConfigError, match="rollout.decoding cannot reach into a custom rollout_func"):
        CreditTrainer(
            build_model(tokenizer),
            even_reward,
            args,
            train_dataset=digit_dataset(),
            processing_class=tokenizer,
            rollout_func=rollout_func,
        )


def test_methods_bring_their_correction():
    assert RolloutConfig().resolved_correction.mode == "off"
    active = build_rollout({"decoding": [REFLEX, TEMPERATURE]})
    assert active.resolved_correction == CorrectionConfig(level="token", mode="truncate", clip_max=2.0)
    assert build_rollout({"decoding": [REFLEX | {"amplitude": 0.0}]}).resolved_correction.mode == "off"
    given = build_rollout({"decoding": [REFLEX], "correction": {"clip_max": 8.0}})
    assert given.resolved_correction.clip_max == 8.0


def test_the_strictest_of_several_recommendations():
    loose, tight = CorrectionConfig(clip_max=3.0, min_ess=0.1), CorrectionConfig(clip_max=1.5, veto=1e-4)
    assert strictest([loose, tight]) == CorrectionConfig(clip_max=1.5, veto=1e-4, min_ess=0.5)
    assert strictest([CorrectionConfig(symmetric=True, clip_max=4.0), loose]).clip_min == 0.25
    with pytest.raises(ValueError, match="geometric, token"):
        strictest([loose, CorrectionConfig(level="geometric")])


def test_a_small_effective_sample_warns_once_with_the_number(tmp_path, caplog):
    rollout = {"correction": {"clip_max": None, "min_ess": 0.9}}
    with caplog.at_level(logging.WARNING):
        trainer = train(tmp_path, [REFLEX | {"amplitude": 6.0}], rollout=rollout, max_steps=4)
    sizes = logged(trainer, "correction/weight_ess")
    assert len(sizes) == 2 and max(sizes) < 0.9
    warnings = [r.getMessage() for r in caplog.records if "effective sample size" in r.getMessage()]
    assert len(warnings) == 1
    assert f"{sizes[0]:.3f}" in warnings[0] and "rollout.correction.min_ess=0.9" in warnings[0]
    assert all(math.isfinite(loss) for loss in logged(trainer, "loss"))


# ---- steering ----


@pytest.fixture
def vectors(tmp_path):
    """A file with one vector, for the tests' model."""
    model = build_model(build_tokenizer(), initializer_range=0.3)
    vector = torch.nn.functional.normalize(torch.randn(32, generator=torch.Generator().manual_seed(0)), dim=0)
    path = tmp_path / "vectors.safetensors"
    save_vectors(path, [SteeringVector(0, vector, 4.0)], describe_model(model, "tiny"))
    return path


@pytest.mark.parametrize("engine", ["transformers", "continuous_batching"])
def test_steered_rollouts_record_the_steered_log_probabilities(tmp_path, vectors, engine):
    batching = BATCHING if engine == "continuous_batching" else {}
    rollout = {"steering": {"path": str(vectors)}}
    trainer = make(tmp_path / "run", [REFLEX], rollout=rollout, learning_rate=0.0, max_steps=1, **batching)
    trainer.train()
    ((stats, output),) = trainer.seen
    mask = output["completion_mask"].bool()
    with trainer.doors.rollout.steering.attach(trainer.model):
        expected = recomputed(trainer, stats, output, 1.0)
    torch.testing.assert_close(output["sampling_per_token_logps"][mask], expected[mask], atol=1e-5, rtol=0)
    unsteered = recomputed(trainer, stats, output, 1.0)
    assert (unsteered - expected)[mask].abs().max() > 0.05
    assert logged(trainer, "rollout/steering/shift")[0] > 0.05
    assert not any(layer._forward_hooks for layer in decoder_layers(trainer.model))


def test_steering_alone_brings_the_correction_and_strength_0_is_plain(tmp_path, vectors):
    steered = build_rollout({"steering": {"path": str(vectors)}})
    assert steered.modifies_sampler and steered.records_logps and not steered.decodes
    assert steered.resolved_correction == CorrectionConfig(mode="truncate")
    off = {"steering": {"path": "missing.safetensors", "strength": 0.0}}
    plain, neutral = train(tmp_path / "a"), train(tmp_path / "b", rollout=off)
    for a, b in zip(plain.model.parameters(), neutral.model.parameters(), strict=True):
        assert torch.equal(a, b)


def test_steering_that_cannot_work_is_refused_at_construction(tmp_path, vectors):
    steering = {"steering": {"path": str(vectors)}}
    with pytest.raises(ConfigError, match="rollout.steering .*vllm_server. Use vllm_colocate .*transformers"):
        check([], steering, use_vllm=True, vllm_mode="server")
    assert check([], steering, **VLLM) == "vllm_colocate"
    with pytest.raises(ConfigError, match="missing.safetensors"):
        make(tmp_path, rollout={"steering": {"path": "missing.safetensors"}})
    with pytest.raises(ConfigError, match="hidden size 32, the model has 16"):
        make(tmp_path, rollout=steering, model=build_model(build_tokenizer(), hidden_size=16))
