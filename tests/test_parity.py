"""Our composed loss against TRL's own, on random (B, T) advantages and ratios; and TRL's contract with us."""

import inspect

import pytest
import torch
from tests_support import build_model, build_tokenizer, digit_dataset, even_reward, run_settings
from trl import GRPOConfig, GRPOTrainer

from rltok.objective import LOSS_TYPES
from rltok.trainers import CreditConfig, CreditTrainer

B, P, T = 6, 5, 9


def make_trainer(tmp_path, **settings):
    tokenizer = build_tokenizer()
    shape = {"per_device_train_batch_size": B, "steps_per_generation": 4, "num_generations": 3}
    shape |= {"max_completion_length": T, "gradient_checkpointing": False}
    trainer = CreditTrainer(
        build_model(tokenizer),
        even_reward,
        CreditConfig(**run_settings(tmp_path, **(shape | settings))),
        train_dataset=digit_dataset(),
        processing_class=tokenizer,
    )
    trainer.current_gradient_accumulation_steps = 2
    trainer.model.train()
    return trainer


def make_inputs(trainer, seed=0, per_token=True, tool_mask=False, kl=False, sampler=False):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, 40, (B, P + T), generator=generator)
    lengths = torch.tensor([T, 1, 4, T, 0, 6])
    mask = (torch.arange(T) < lengths[:, None]).long()
    prompt_mask = (torch.arange(P) >= torch.tensor([0, 1, 2, 0, 3, 0])[:, None]).long()
    inputs = {
        "prompt_ids": ids[:, :P],
        "prompt_mask": prompt_mask,
        "completion_ids": ids[:, P:],
        "completion_mask": mask,
        "advantages": torch.randn(B, T, generator=generator) if per_token else torch.randn(B, generator=generator),
        "num_items_in_batch": torch.tensor(4 * int(mask.sum()) - 3),
    }
    with torch.no_grad():
        full = torch.cat([prompt_mask, mask], 1)
        logps, *_ = trainer._get_per_token_logps_and_entropies(trainer.model, ids, full, T)
    noise = torch.randn(B, T, generator=generator)
    inputs["old_per_token_logps"] = logps + 0.3 * noise
    if tool_mask:
        inputs["tool_mask"] = (torch.rand(B, T, generator=generator) > 0.2).long()
    if kl:
        inputs["ref_per_token_logps"] = logps + 0.2 * torch.randn(B, T, generator=generator)
    if sampler:
        inputs["sampling_per_token_logps"] = logps + 0.1 * torch.randn(B, T, generator=generator)
        inputs["importance_sampling_ratio"] = torch.rand(B, T, generator=generator) + 0.5
    return inputs


def loss_and_gradients(trainer, compute, inputs):
    trainer.model.zero_grad()
    loss = compute(trainer, trainer.model, inputs)
    loss.backward()
    metrics = {name: values[-1] for name, values in trainer._metrics["train"].items()}
    trainer._metrics["train"].clear()
    return loss.detach(), [p.grad.clone() for p in trainer.model.parameters()], metrics


def assert_parity(trainer, inputs):
    theirs = loss_and_gradients(trainer, GRPOTrainer._compute_loss, inputs)
    ours = loss_and_gradients(trainer, CreditTrainer._compute_loss, inputs)
    assert theirs[1][0].abs().max() > 0, "the comparison needs a gradient"
    torch.testing.assert_close(ours[0], theirs[0], atol=1e-6, rtol=1e-6)
    for a, b in zip(ours[1], theirs[1], strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-5)
    for name, value in theirs[2].items():
        if value == value:  # TRL divides by zero tokens in the row without any
            assert ours[2][name] == pytest.approx(value, abs=1e-5), name


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_every_loss_type_equals_trls(tmp_path, loss_type):
    trainer = make_trainer(tmp_path, loss_type=loss_type, epsilon_high=1.4 if loss_type == "cispo" else 0.28)
    for seed, per_token in enumerate((True, False)):
        assert_parity(trainer, make_inputs(trainer, seed, per_token))
        assert_parity(trainer, make_inputs(trainer, seed, per_token, tool_mask=True))
    trainer.beta = 0.1
    assert_parity(trainer, make_inputs(trainer, 2, kl=True, tool_mask=True))
    trainer.args.use_bias_correction_kl = True
    assert_parity(trainer, make_inputs(trainer, 3, kl=True))
    trainer.beta = 0.0
    trainer.use_vllm, trainer.vllm_importance_sampling_correction = True, True
    assert_parity(trainer, make_inputs(trainer, 4, sampler=True))


@pytest.mark.parametrize("loss_type", ["grpo", "dapo", "luspo", "sapo"])
def test_sequence_ratio_equals_trls(tmp_path, loss_type):
    trainer = make_trainer(tmp_path, loss_type=loss_type, importance_sampling_level="sequence", epsilon=0.05)
    assert_parity(trainer, make_inputs(trainer, 0, per_token=False))
    assert_parity(trainer, make_inputs(trainer, 1, per_token=False, tool_mask=True))


@pytest.mark.parametrize(
    "settings",
    [
        {"delta": 1.5, "epsilon_high": 0.28},
        {"top_entropy_quantile": 0.2},
        {"entropy_coef": 0.01},
        {"entropy_coef": 0.01, "use_adaptive_entropy": True, "entropy_target": 10.0},
        {"off_policy_mask_threshold": 0.05},
    ],
    ids=lambda s: next(iter(s)) if len(s) < 3 else "adaptive",
)
@pytest.mark.parametrize("loss_type", ["dapo", "grpo"])
def test_options_of_the_loss_equal_trls(tmp_path, settings, loss_type):
    trainer = make_trainer(tmp_path, loss_type=loss_type, **settings)
    inputs = make_inputs(trainer, 5)
    if not trainer.use_adaptive_entropy:
        assert_parity(trainer, inputs)
        return
    # the controller has state: each side starts from the same
    results = []
    for compute in (GRPOTrainer._compute_loss, CreditTrainer._compute_loss):
        trainer.entropy_coef, trainer._last_world_entropy, trainer._entropy_window_stats = 0.01, 0.0, None
        loss, gradients, _ = loss_and_gradients(trainer, compute, inputs)
        results.append((loss, gradients, trainer.entropy_coef, trainer._last_world_entropy))
    (loss_a, grads_a, coef_a, entropy_a), (loss_b, grads_b, coef_b, entropy_b) = results
    torch.testing.assert_close(loss_a, loss_b)
    for a, b in zip(grads_a, grads_b, strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-5)
    assert coef_a == coef_b != 0.01 and entropy_a == pytest.approx(entropy_b)


def test_evaluation_loss_equals_trls(tmp_path):
    trainer = make_trainer(tmp_path)
    inputs = make_inputs(trainer, 6)
    trainer.model.eval()
    with torch.no_grad():
        torch.testing.assert_close(
            CreditTrainer._compute_loss(trainer, trainer.model, inputs),
            GRPOTrainer._compute_loss(trainer, trainer.model, inputs),
        )


def test_all_masked_micro_batch_gives_zero(tmp_path):
    trainer = make_trainer(tmp_path)
    trainer.doors = type(trainer.doors)(trainer.doors.credit, _terms("hapo", "clip_cov"), trainer.doors.rollout)
    inputs = make_inputs(trainer)
    inputs["tool_mask"] = torch.zeros_like(inputs["completion_mask"])
    loss, gradients, _ = loss_and_gradients(trainer, CreditTrainer._compute_loss, inputs)
    assert loss == 0 and all(not g.any() for g in gradients)


def _terms(*names):
    from rltok.objective import OBJECTIVE

    return tuple(OBJECTIVE[name]() for name in names)


@pytest.mark.parametrize(
    "name", ["_generate_single_turn", "_calculate_rewards", "_generate_and_score_completions", "_run_epoch"]
)
def test_trl_still_has_the_methods_we_wrap(name):
    assert callable(getattr(GRPOTrainer, name))


def test_contract_with_trl():
    """What would silently change if TRL moved: signatures, keys, and the (B, T) branch of its loss."""
    assert list(inspect.signature(GRPOTrainer._compute_loss).parameters) == ["self", "model", "inputs"]
    assert list(inspect.signature(GRPOTrainer._generate_and_score_completions).parameters) == ["self", "inputs"]
    scoring = inspect.signature(GRPOTrainer._get_per_token_logps_and_entropies).parameters
    assert list(scoring)[:5] == ["self", "model", "input_ids", "attention_mask", "logits_to_keep"]
    assert {"batch_size", "compute_entropy", "compute_aux_loss"} <= set(scoring)
    from rltok.trainers.credit_trainer import MULTIMODAL

    assert set(MULTIMODAL) == set(scoring) - {
        *list(scoring)[:5],
        "batch_size",
        "compute_entropy",
        "compute_aux_loss",
    }, "TRL scores with other inputs than we hand on"
    fields = {f for f in GRPOConfig.__dataclass_fields__}
    ours = set(CreditConfig.__dataclass_fields__) - fields
    assert ours == {"credit", "objective", "rollout", "selection", "samples", "batching", "faults"}
