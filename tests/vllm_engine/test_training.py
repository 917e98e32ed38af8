"""Two steps of GRPO with vLLM in the trainer's process: processors in the rollout, their weights in the loss."""

from __future__ import annotations

import pytest
import torch
import vllm._custom_ops
from runs import FORCING, REFLEX, TEMPERATURE, check_metrics, check_rollouts, logged, make
from trl.generation import vllm_generation as trl_generation

from rltok.sampling.vllm_rows import BatchRows


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
