"""Scoring kept positions only gives TRL's numbers and gradients there, for known masks and for choices by entropy."""

import pytest
import torch
from tests_support import build_model, build_tokenizer, digit_dataset, even_reward, run_settings
from transformers import Gemma2Config, Gemma2ForCausalLM, MixtralConfig, MixtralForCausalLM

from rltok.trainers import CreditConfig, CreditTrainer
from rltok.trainers.scoring import kept_positions


def gemma(tokenizer):
    """Soft-capped logits."""
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "head_dim": 8}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "final_logit_softcapping": 2.0}
    return Gemma2ForCausalLM(Gemma2Config(vocab_size=len(tokenizer), pad_token_id=0, **shape, **heads))


def mixtral(tokenizer):
    """Experts with a load-balancing loss."""
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_local_experts": 4}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "output_router_logits": True}
    return MixtralForCausalLM(MixtralConfig(vocab_size=len(tokenizer), pad_token_id=0, **shape, **heads))


MODELS = {"qwen3": build_model, "softcap": gemma, "experts": mixtral}


def trainer_of(tmp_path, build, **changes):
    tokenizer = build_tokenizer()
    args = CreditConfig(**run_settings(tmp_path, temperature=0.7, **changes))
    data = {"train_dataset": digit_dataset(), "processing_class": tokenizer}
    return CreditTrainer(build(tokenizer), even_reward, args, **data)


def batch(rows=3, prompt=4, width=7):
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, 40, (rows, prompt + width), generator=generator)
    attention = torch.ones_like(ids)
    attention[0, :2] = 0
    attention[1, -3:] = 0
    keep = torch.rand(rows, width, generator=generator) < 0.4
    return ids, attention, width, keep


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def full_pass(trainer, ids, attention, width):
    return trainer._get_per_token_logps_and_entropies(
        trainer.model, ids, attention, width, compute_entropy=True, compute_aux_loss=trainer.aux_loss_enabled
    )


@pytest.mark.parametrize("name", MODELS)
def test_known_positions_have_the_numbers_and_gradients_of_a_full_pass(tmp_path, name):
    trainer = trainer_of(tmp_path, MODELS[name])
    ids, attention, width, keep = batch()
    model = trainer.model
    model.train()
    logps, entropy, aux = full_pass(trainer, ids, attention, width)
    weight = torch.randn(keep.shape, generator=torch.Generator().manual_seed(2)) * keep
    expected = gradients(model, (logps * weight).sum() + 0.1 * (entropy * weight).sum() + (0 if aux is None else aux))
    with kept_positions(model, keep, width) as kept:
        some, some_entropy, some_aux = full_pass(trainer, ids, attention, width)
    valid = keep & attention[:, -width:].bool()
    torch.testing.assert_close(some, logps * valid, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(some_entropy, entropy * valid, atol=1e-6, rtol=1e-6)
    assert (aux is None) == (some_aux is None) == (name != "experts")
    loss = (some * weight).sum() + 0.1 * (some_entropy * weight).sum() + (0 if some_aux is None else some_aux)
    found = gradients(model, loss)
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, atol=2e-6, rtol=1e-4)
    assert torch.equal(kept.mask, keep)


@pytest.mark.parametrize("name", MODELS)
def test_a_choice_by_entropy_sees_every_valid_entropy_and_scores_what_it_chose(tmp_path, name):
    trainer = trainer_of(tmp_path, MODELS[name])
    ids, attention, width, _ = batch()
    model = trainer.model
    model.train()
    logps, entropy, _ = full_pass(trainer, ids, attention, width)
    seen = []

    def choose(values):
        assert not values.requires_grad
        seen.append(values)
        return values > values[attention[:, -width:].bool()].median()

    with kept_positions(model, choose, width) as kept:
        some, some_entropy, _ = full_pass(trainer, ids, attention, width)
    valid = attention[:, -width:].bool()
    torch.testing.assert_close(seen[0], entropy.detach() * valid, atol=1e-6, rtol=1e-6)
    assert 0 < kept.mask.sum() < valid.sum()
    torch.testing.assert_close(some, logps * kept.mask, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(some_entropy, entropy * kept.mask, atol=1e-6, rtol=1e-6)


def test_the_head_computes_kept_positions_only(tmp_path, monkeypatch):
    import trl.trainer.utils as trl_utils

    trainer = trainer_of(tmp_path, build_model)
    ids, attention, width, keep = batch()
    sizes = []
    real = trl_utils._ChunkedLogProbFunction

    class Counting:
        @staticmethod
        def apply(hidden, *args):
            sizes.append((hidden.size(0), hidden.requires_grad))
            return real.apply(hidden, *args)

    monkeypatch.setattr(trl_utils, "_ChunkedLogProbFunction", Counting)
    valid = attention[:, -width:].bool()
    with kept_positions(trainer.model, keep, width):
        full_pass(trainer, ids, attention, width)
    assert sizes == [(int((keep & valid).sum()), True)]
    sizes.clear()
    with kept_positions(trainer.model, lambda entropy: keep, width):
        full_pass(trainer, ids, attention, width)
    assert sizes == [(int(valid.sum()), False), (int((keep & valid).sum()), True)]


def test_nothing_kept_gives_a_loss_that_reaches_every_parameter(tmp_path):
    trainer = trainer_of(tmp_path, build_model)
    ids, attention, width, keep = batch()
    with kept_positions(trainer.model, torch.zeros_like(keep), width):
        logps, entropy, _ = full_pass(trainer, ids, attention, width)
    assert not logps.any() and not entropy.any()
    found = gradients(trainer.model, logps.sum())
    assert found.keys() == dict(trainer.model.named_parameters()).keys()
    assert not any(value.any() for value in found.values())


def test_the_model_is_as_before_afterwards_and_after_an_error(tmp_path):
    trainer = trainer_of(tmp_path, build_model)
    ids, attention, width, keep = batch()
    before = trainer.model.forward
    logits = trainer.model(ids).logits
    with pytest.raises(RuntimeError, match="stop"), kept_positions(trainer.model, keep, width):
        assert torch.equal(trainer.model(ids).logits, logits), "calls without the fused head are untouched"
        raise RuntimeError("stop")
    assert trainer.model.forward == before
    with pytest.raises(TypeError, match="no fused head"), kept_positions(build_model(build_tokenizer()), keep, width):
        pass


def test_adapters_and_gradient_checkpointing(tmp_path):
    from peft import LoraConfig

    tokenizer = build_tokenizer()
    args = CreditConfig(**run_settings(tmp_path, gradient_checkpointing=True))
    data = {"train_dataset": digit_dataset(), "processing_class": tokenizer, "peft_config": LoraConfig(r=2)}
    trainer = CreditTrainer(build_model(tokenizer), even_reward, args, **data)
    trainer.model.train()
    ids, attention, width, keep = batch()
    logps, _, _ = full_pass(trainer, ids, attention, width)
    expected = gradients(trainer.model, (logps * keep).sum())
    with kept_positions(trainer._causal_lm, keep, width):
        some, _, _ = full_pass(trainer, ids, attention, width)
    found = gradients(trainer.model, (some * keep).sum())
    assert found.keys() == expected.keys() and all("lora" in key for key in found)
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, atol=2e-6, rtol=1e-4)
