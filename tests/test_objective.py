"""Losses of one worked example for every loss type, and the terms that are not HAPO's."""

import pytest
import torch

from rltok.objective import (
    ClipCov,
    Divisors,
    GSPOToken,
    KLCov,
    LossBatch,
    LossSettings,
    aggregate,
    log_importance_ratio,
    plan_loss,
    reference_kl,
    token_loss,
)
from rltok.objective.covariance import token_covariance
from rltok.objective.surrogate import vespo_weight

MASK = torch.tensor([[1, 1, 1, 1], [1, 0, 0, 0], [1, 1, 0, 0]])
RATIO = torch.tensor([[1, 1.25, 0.95, 1], [0.75, 7, 1, 1], [1.3, 1.02, 1, 1]], dtype=torch.float64)
ENTROPY = torch.tensor([[0.02, 1.2, 0.3, 0.1], [0.05, 0, 0, 0], [0.8, 0.001, 0, 0]], dtype=torch.float64)
OLD = torch.full_like(RATIO, -0.7)
SCALED = torch.tensor([[1.154601], [-0.577300], [-0.577300]], dtype=torch.float64)
"""rewards 1, -1, -1 over mean and n - 1 deviation + 1e-4"""
CENTRED = torch.tensor([[4 / 3], [-2 / 3], [-2 / 3]], dtype=torch.float64)


def make_batch(seed=0):
    logps = (RATIO.log() + OLD).requires_grad_()
    return LossBatch(logps, OLD, MASK, ENTROPY, seed=seed)


def loss_of(settings, advantages=SCALED, terms=(), keep=None, budget=8):
    batch = make_batch()
    losses, _ = token_loss(batch, plan_loss(batch, advantages, settings, terms), settings)
    if keep is not None:
        losses = losses * keep
    loss = aggregate(losses, MASK, settings.loss_type, Divisors(tokens=7, token_budget=budget))
    loss.backward()
    return loss.item(), batch.logps.grad


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        (LossSettings("grpo"), -0.022130),
        (LossSettings("bnpo"), -0.427202),
        (LossSettings("dapo", epsilon_high=0.28), -0.435449),
        (LossSettings("cispo", epsilon_high=5.0), 0.281732),
        (LossSettings("sapo"), -0.073055),
        (LossSettings("grpo", "sequence", epsilon_low=3e-4, epsilon_high=4e-4), 0.028946),
    ],
    ids=["grpo", "bnpo", "dapo", "cispo", "sapo", "gspo"],
)
def test_worked_losses(settings, expected):
    assert loss_of(settings)[0] == pytest.approx(expected, abs=2e-6)


def test_worked_dr_grpo_gradient_and_80_20():
    assert loss_of(LossSettings("dr_grpo"), CENTRED)[0] == pytest.approx(-0.143889, abs=1e-6)
    dapo = LossSettings("dapo", epsilon_high=0.28)
    gradient = loss_of(dapo)[1]
    expected = [[-0.164943, -0.206179, -0.156696, -0.164943], [0, 0, 0, 0], [0.107213, 0.084121, 0, 0]]
    torch.testing.assert_close(gradient, torch.tensor(expected, dtype=torch.float64), atol=1e-6, rtol=0)
    forking = loss_of(dapo, keep=ENTROPY >= 0.7)[0]  # 0.7 is the interpolated 80 % quantile of the seven entropies
    assert forking == pytest.approx(-0.098966, abs=1e-6)


def test_gspo_token_has_gspos_value_and_gradient_for_equal_credit():
    gspo = loss_of(LossSettings("grpo", "sequence", epsilon_low=0.5, epsilon_high=0.5))
    token = loss_of(LossSettings("grpo", epsilon_low=0.5, epsilon_high=0.5), terms=[GSPOToken()])
    assert token[0] == pytest.approx(gspo[0])
    torch.testing.assert_close(token[1], gspo[1])


def test_sequence_ratio_of_an_empty_row_is_one():
    logps = torch.randn(2, 3)
    ratio = log_importance_ratio(logps, logps - 1, torch.tensor([[1, 1, 0], [0, 0, 0]]), "sequence")
    torch.testing.assert_close(ratio, torch.tensor([[1.0], [0.0]]))
    with pytest.raises(ValueError, match="'word' is unknown; allowed: token, sequence"):
        log_importance_ratio(logps, logps, torch.ones(2, 3), "word")


def test_covariance_worked_number():
    cov = token_covariance(make_batch(), SCALED)
    assert cov.max().item() == cov[1, 0].item() == pytest.approx(0.308223, abs=1e-6)
    assert not cov[~MASK.bool()].any()


def test_clip_cov_silences_an_exact_number_of_eligible_tokens():
    settings = LossSettings("dapo", epsilon_low=0.2, epsilon_high=0.28)
    batch = make_batch()
    cov = token_covariance(batch, SCALED)
    eligible = (cov > 0) & MASK.bool()
    eligible[1, 0] = False  # ratio 0.75 with a negative advantage: plain clipping has it already
    plan = plan_loss(batch, SCALED, settings, [ClipCov(ratio=2 / 7, low=0.0)])
    silenced = plan.keep == 0
    assert silenced.sum() == 2 and not (silenced & ~eligible).any()
    again = plan_loss(make_batch(), SCALED, settings, [ClipCov(ratio=2 / 7, low=0.0)])
    assert torch.equal(again.keep, plan.keep), "the draw depends on the seed alone"
    draws = {
        tuple(plan_loss(make_batch(seed), SCALED, settings, [ClipCov(ratio=1e-9, low=0.0)]).keep.flatten().tolist())
        for seed in range(20)
    }
    assert len(draws) > 1 and all(row.count(0) == 1 for row in draws), "at least one, and not always the same"
    none = plan_loss(batch, SCALED, settings, [ClipCov(low=5.0, high=9.0)])
    assert none.keep is None
    assert plan_loss(batch, SCALED, settings, [ClipCov(ratio=0.0)]).keep is None


def test_kl_cov_charges_the_top_tokens_and_drops_the_clip():
    settings = LossSettings("dapo", epsilon_low=0.2, epsilon_high=0.28)
    batch = make_batch()
    plan = plan_loss(batch, SCALED, settings, [KLCov(ratio=1 / 7, coef=2.0)])
    losses, metrics = token_loss(batch, plan, settings)
    expected = -RATIO * SCALED
    expected[1, 0] += 2.0 * abs(RATIO[1, 0].log())
    torch.testing.assert_close(losses[MASK.bool()], expected[MASK.bool()])
    assert not metrics["clip_ratio/region_mean"].any()
    free = token_loss(batch, plan_loss(batch, SCALED, settings, [KLCov(coef=0.0)]), settings)[0]
    torch.testing.assert_close(free[MASK.bool()], (-RATIO * SCALED)[MASK.bool()])


def test_reference_kl_and_vespo_weight_at_their_neutral_points():
    logps = torch.randn(3, 4)
    assert not reference_kl(logps, logps).any() and (reference_kl(logps, torch.randn(3, 4)) >= 0).all()
    weight = vespo_weight(SCALED, torch.zeros(3, 4), MASK)
    torch.testing.assert_close(weight, torch.ones_like(weight))


def test_unknown_loss_type_is_named():
    with pytest.raises(ValueError, match="loss_type='ppo' is unknown; allowed: grpo"):
        aggregate(torch.zeros(1, 1), torch.ones(1, 1), "ppo", Divisors())
