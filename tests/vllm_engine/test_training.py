"""Two steps of GRPO with vLLM in the trainer's process: processors in the rollout, their weights in the loss."""

from __future__ import annotations

import copy

import pytest
import torch
import vllm._custom_ops
from runs import FORCING, REFLEX, TEMPERATURE, check_metrics, check_rollouts, logged, make
from tests_support import teacher_forced
from transformers import TemperatureLogitsWarper
from trl.generation import vllm_generation as trl_generation

from rltok.sampling import DecodingContext, make_processors
from rltok.sampling.vllm_rows import BatchRows
from rltok.steering import SteeringVector, describe_model, save_vectors, steered


@pytest.fixture(autouse=True)
def small_engine(monkeypatch):
    """TRL's engine in float32 and small; with plain weights, which the weight synchronisation can write to on a CPU."""
    small = {"dtype": "float32", "enforce_eager": True, "max_num_seqs": 8, "max_model_len": 64}
    original = trl_generation.LLM
    monkeypatch.setattr(trl_generation, "LLM", lambda **settings: original(**(settings | small)))
    monkeypatch.setattr(vllm._custom_ops, "_supports_onednn", False)


def test_colocated_training(tmp_path, folder, tokenizer, monkeypatch):
    trainer = make(folder, tmp_path, tokenizer, [REFLEX, FORCING, TEMPERATURE], learning_rate=0.0)
    trainer.train()
    check_rollouts(trainer)
    assert trainer.vllm_generation.generation_kwargs == {}

    rows, update = [], BatchRows.update
    monkeypatch.setattr(BatchRows, "update", lambda self, *a: update(self, *a) or rows.append(len(self._requests)))
    trainer.model.eval()
    trainer.evaluate()
    assert rows and not any(rows), "evaluation asks for no processors"


def test_weights_follow_the_learner(tmp_path, folder, tokenizer):
    """Without processors the engine is the learner, also after an update; with them the difference is theirs."""
    corrected = {"correction": {"mode": "truncate"}}
    plain = make(folder, tmp_path / "plain", tokenizer, [], corrected)
    before = [parameter.detach().clone() for parameter in plain.model.parameters()]
    plain.train()
    assert any(not torch.equal(a, b) for a, b in zip(before, plain.model.parameters(), strict=True))
    biased = make(folder, tmp_path / "biased", tokenizer, [REFLEX])
    biased.train()
    for trainer in (plain, biased):
        check_metrics(trainer)
        print({key: logged(trainer, f"correction/{key}") for key in ("max_abs_diff", "k3", "weight_ess")})
    assert max(logged(plain, "correction/max_abs_diff")) < 1e-4
    assert max(abs(1 - value) for value in logged(plain, "correction/weight_ess")) < 1e-6
    assert min(logged(biased, "correction/max_abs_diff")) > 1
    assert max(logged(biased, "correction/weight_ess")) < 0.99


def test_steered_rollouts(tmp_path, folder, model, tokenizer):
    """Log-probabilities of a steered engine are those of the steered policy; nothing of it is left for evaluation."""
    generator = torch.Generator().manual_seed(0)
    vectors = [
        SteeringVector(layer, torch.nn.functional.normalize(torch.randn(64, generator=generator), dim=0), 2.0)
        for layer in (0, 1)
    ]
    save_vectors(tmp_path / "v.safetensors", vectors, describe_model(model, "tiny"))
    rollout = {"steering": {"path": str(tmp_path / "v.safetensors")}}
    trainer = make(folder, tmp_path / "run", tokenizer, [REFLEX], rollout, learning_rate=0.0)
    trainer.train()
    worst, effect = 0.0, 0.0
    for stats, output, _ in trainer.seen:
        context = DecodingContext(0.7, stats, tokenizer)
        chain = [*make_processors(trainer.doors.rollout.decoding, context), TemperatureLogitsWarper(0.7)]
        mask = output["completion_mask"].bool()
        policy = trainer.model.eval()
        plain = teacher_forced(policy, output, chain)
        with steered(policy, vectors):
            expected = teacher_forced(policy, output, [copy.deepcopy(p) for p in chain])
        worst = max(worst, (output["sampling_per_token_logps"] - expected)[mask].abs().max().item())
        effect = max(effect, (plain - expected)[mask].abs().max().item())
    trainer.model.train()
    print(f"largest difference of steered log-probabilities: {worst:.1e}, of unsteered ones {effect:.2f}")
    assert worst < 1e-5 < 0.1 < effect
    assert min(logged(trainer, "rollout/steering/shift")) > 0.05
    hooks = []
    trainer.vllm_generation.llm.apply_model(lambda m: hooks.extend(len(x._forward_hooks) for x in m.modules()))
    assert hooks and not any(hooks)
