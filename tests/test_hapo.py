"""HAPO's pure functions against its worked example (float64, computed independently) and its exact limits."""

import pytest
import torch

from rltok.credit import token_group_average
from rltok.entropy import entropy_signal, entropy_stats
from rltok.objective import (
    HAPO,
    Divisors,
    LossBatch,
    LossSettings,
    aggregate,
    clipped_surrogate,
    plan_loss,
    redistribute,
    token_clip_widths,
    token_loss,
)

REWARDS = torch.tensor([1.0, -1.0, -1.0], dtype=torch.float64)
LENGTHS = torch.tensor([4, 1, 2])
GROUPS = torch.zeros(3, dtype=torch.long)
MASK = torch.tensor([[1, 1, 1, 1], [1, 0, 0, 0], [1, 1, 0, 0]])
ENTROPY = torch.tensor([[0.02, 1.2, 0.3, 0.1], [0.05, 9.0, 0, 0], [0.8, 0.001, -1, 0]], dtype=torch.float64)
RATIO = torch.tensor([[1, 1.25, 0.95, 1], [0.75, 7, 1, 1], [1.3, 1.02, 1, 1]], dtype=torch.float64)


def close(actual, expected):
    torch.testing.assert_close(torch.as_tensor(actual).double(), torch.tensor(expected).double(), atol=2e-6, rtol=0)


def loss_of(adv, lo, hi):
    old = torch.full_like(RATIO, -0.7)
    logp = (RATIO.log() + old).requires_grad_()
    losses = clipped_surrogate(logp, old, adv, lo, hi, 10.0)
    loss = (losses * MASK).sum() / MASK.sum()
    loss.backward()
    return loss.item(), logp.grad


def test_token_group_average_matches_the_worked_example():
    adv = token_group_average(REWARDS, LENGTHS, GROUPS)
    close(adv, [0.866025, -1.154699, -1.154699])
    assert abs((adv * LENGTHS).sum()) < 1e-12


def test_signed_example_from_entropy_to_gradient():
    stats = entropy_stats(ENTROPY, MASK)
    close(stats.pivot.exp(), 0.8)
    h = entropy_signal(ENTROPY, stats, MASK)
    close(h[0], [-0.551846, 1, -0.146729, -0.311079])
    close(h[1:, 0], [-0.414772, 0])
    close(h[2, 1], -1)
    assert not h[~MASK.bool()].any()
    lo, hi = token_clip_widths(h, 0.2, 0.28)
    close(lo[0], [0.310369, 0.2, 0.229346, 0.262216])
    close(lo[1:, 0], [0.282954, 0.2])
    close(lo[2, 1], 0.4)
    close(hi[0], [0.28, 0.56, 0.28, 0.28])
    adv = token_group_average(REWARDS, LENGTHS, GROUPS)[:, None]
    shaped = redistribute(adv, h, RATIO, 0.2, 0.28)
    close(shaped[0], [0.388112, 1.732049, 0.738953, 0.596623])
    close(shaped[1:, 0], [-1.154699, -1.154699])
    close(shaped[2, 1], 0)
    loss, grad = loss_of(shaped, lo, hi)
    close(loss, -0.212095389)
    close(grad[0], [-0.055445, -0.309294, -0.100287, -0.085232])
    close(grad[1:, 0], [0.123718, 0.214444])
    close(grad[2, 1], 0)
    tokenwise = redistribute(adv, h, RATIO, lo, hi)
    close(tokenwise[0, 1], 0.866025)
    close(loss_of(tokenwise, lo, hi)[0], -0.057448154)


def test_released_sign_example():
    h = entropy_signal(ENTROPY, entropy_stats(ENTROPY, MASK), MASK, sign="released")
    close(h[0], [0.551846, 1, 0.146729, 0.311079])
    lo, hi = token_clip_widths(h, 0.2, 0.28)
    adv = token_group_average(REWARDS, LENGTHS, GROUPS)[:, None]
    shaped = redistribute(adv, h, RATIO, 0.2, 0.28)
    close(shaped[1, 0], -1.633636)
    close(shaped[2, :2], [-1.154699, -1.154699])
    close(loss_of(shaped, lo, hi)[0], -0.104860316)
    close(loss_of(redistribute(adv, h, RATIO, lo, hi), lo, hi)[0], 0.049786921)


def test_strength_zero_is_the_dapo_surrogate():
    h = entropy_signal(ENTROPY, entropy_stats(ENTROPY, MASK), MASK)
    adv = token_group_average(REWARDS, LENGTHS, GROUPS)[:, None]
    lo, hi = token_clip_widths(h, 0.2, 0.28, alpha=0.0)
    shaped = redistribute(adv, h, RATIO, 0.2, 0.28, beta=0.0)
    assert torch.equal(shaped, adv.expand_as(shaped))
    assert torch.equal(lo, torch.full_like(lo, 0.2)) and torch.equal(hi, torch.full_like(hi, 0.28))
    close(loss_of(shaped, lo, hi)[0], -0.004948712)


def test_the_term_gives_the_functions_result():
    stats = entropy_stats(ENTROPY, MASK)
    old = torch.full_like(RATIO, -0.7)
    batch = LossBatch((RATIO.log() + old).requires_grad_(), old, MASK, ENTROPY, stats)
    adv = token_group_average(REWARDS, LENGTHS, GROUPS)[:, None]
    settings = LossSettings("dapo", epsilon_low=0.2, epsilon_high=0.28, delta=10.0)
    plan = plan_loss(batch, adv, settings, [HAPO()])
    losses, _ = token_loss(batch, plan, settings)
    close(aggregate(losses, MASK, "dapo", Divisors(tokens=7)), -0.212095389)
    assert not plan.advantages.requires_grad and not plan.clip_low.requires_grad and not plan.clip_high.requires_grad
    zoned = plan_loss(batch, adv, settings, [HAPO(zone="token")])
    close(aggregate(token_loss(batch, zoned, settings)[0], MASK, "dapo", Divisors(tokens=7)), -0.057448154)
    # the micro-batch scope reads the current entropies, which here are the same tokens
    micro = plan_loss(LossBatch(batch.logps, old, MASK, ENTROPY), adv, settings, [HAPO(statistics="micro_batch")])
    assert torch.equal(micro.advantages, plan.advantages)


@pytest.mark.parametrize("n", [1, 2, 5, 7, 100])
def test_signal_properties(n):
    generator = torch.Generator().manual_seed(n)
    entropy = torch.rand(1, n, generator=generator, dtype=torch.float64) * 3 + 1e-3
    mask = torch.ones(1, n)
    h = entropy_signal(entropy, entropy_stats(entropy, mask), mask)
    assert (h > 0).sum() == n - 1 - round(0.8 * (n - 1))
    assert h.abs().max() <= 1
    if n >= 5:
        assert h.max() == 1 and h.min() == -1
    scaled = 2.5 * entropy**1.7
    torch.testing.assert_close(entropy_signal(scaled, entropy_stats(scaled, mask), mask), h)
    order = torch.randperm(n, generator=generator)
    assert torch.equal(entropy_signal(entropy[:, order], entropy_stats(entropy, mask), mask), h[:, order])


def test_signal_edge_cases():
    empty = torch.zeros(2, 3)
    assert entropy_stats(torch.rand(2, 3), empty) is None
    assert not entropy_signal(torch.rand(2, 3), None, torch.ones(2, 3)).any()
    constant = torch.full((2, 3), 0.7)
    assert not entropy_signal(constant, entropy_stats(constant, torch.ones(2, 3)), torch.ones(2, 3)).any()
    one = torch.tensor([[0.3, 5.0]])
    assert entropy_signal(one, entropy_stats(one, torch.tensor([[1, 0]])), torch.tensor([[1, 0]])).tolist() == [[0, 0]]
    rounded = torch.tensor([[-1e-7, 0.0, 0.5, 1.0, 2.0, 0.1]])
    h = entropy_signal(rounded, entropy_stats(rounded, torch.ones(1, 6)), torch.ones(1, 6))
    assert h.isfinite().all() and h[0, 0] == h[0, 1] == -1
    with pytest.raises(ValueError, match=r"rho=1\.5 is not in \[0, 1\]"):
        entropy_stats(one, one, rho=1.5)


def test_stats_gather_joins_ranks():
    entropy, mask = torch.rand(6, 5), torch.rand(6, 5) > 0.3
    whole = entropy_stats(entropy, mask)
    other = entropy[3:].clamp(min=1e-8).log()[mask[3:]]
    parts = entropy_stats(entropy[:3], mask[:3], gather=lambda local: torch.cat([local, other]))
    for a, b in zip(whole, parts, strict=True):
        torch.testing.assert_close(a, b)


def test_token_group_average_properties():
    generator = torch.Generator().manual_seed(0)
    rewards = torch.randn(12, generator=generator, dtype=torch.float64)
    lengths = torch.randint(1, 30, (12,), generator=generator)
    groups = torch.arange(12) // 4
    adv = token_group_average(rewards, lengths, groups)
    for g in range(3):
        rows = groups == g
        a, n = adv[rows], lengths[rows].double()
        assert abs((a * n).sum()) < 1e-9
        torch.testing.assert_close((a.square() * n).sum() / n.sum(), torch.ones((), dtype=a.dtype), atol=1e-5, rtol=0)
    torch.testing.assert_close(token_group_average(3 * rewards - 7, lengths, groups), adv, atol=1e-5, rtol=1e-5)
    order = torch.randperm(12, generator=generator)
    torch.testing.assert_close(token_group_average(rewards[order], lengths[order], groups[order]), adv[order])
    even = token_group_average(rewards, torch.full((12,), 5), groups)
    grpo = torch.cat([(r - r.mean()) / r.std() for r in rewards.view(3, 4)])
    torch.testing.assert_close(even, grpo * (4 / 3) ** 0.5, atol=1e-5, rtol=1e-5)


def test_token_group_average_edge_cases():
    groups = torch.zeros(3, dtype=torch.long)
    ones = torch.ones(3)
    assert token_group_average(ones * 0.1, LENGTHS, groups).tolist() == [0, 0, 0]
    assert token_group_average(torch.tensor([1.0]), torch.tensor([3]), torch.tensor([0])).tolist() == [0]
    empty = token_group_average(torch.tensor([5.0, 1.0, 0.0]), torch.tensor([0, 2, 2]), groups)
    assert empty[0] == 0 and empty[1] == -empty[2] != 0
    unscored = token_group_average(torch.tensor([float("nan"), 1.0, 0.0]), torch.tensor([3, 2, 2]), groups)
    assert unscored[0] == 0 and unscored.isfinite().all()
    assert token_group_average(ones, torch.zeros(3), groups).tolist() == [0, 0, 0]
    # a minority of 1/101 of the tokens is 10 deviations away: beyond the limit the group takes GRPO's advantages
    rewards, lengths = torch.tensor([1.0, -1.0, -1.0]), torch.tensor([1, 50, 50])
    assert token_group_average(rewards, lengths, groups)[0] > 9
    close(token_group_average(rewards, lengths, groups, limit=5), [1.154699, -0.577350, -0.577350])
    close(token_group_average(REWARDS, LENGTHS, GROUPS, scale=False), [6 / 7, -8 / 7, -8 / 7])


def test_widths_and_redistribution_properties():
    generator = torch.Generator().manual_seed(1)
    h = torch.rand(4, 9, generator=generator) * 2 - 1
    lo, hi = token_clip_widths(h, 0.2, 0.28)
    assert ((lo != 0.2).int() + (hi != 0.28).int() == 1).all()
    assert (lo / 0.2 >= 1 - 1e-6).all() and (lo / 0.2 <= 2 + 1e-6).all() and (hi / 0.28 <= 2 + 1e-6).all()
    adv = torch.randn(4, 9, generator=generator)
    on_policy = redistribute(adv, h, torch.ones(4, 9), 0.2, 0.28, 0.5)
    torch.testing.assert_close(on_policy, torch.where(h > 0, adv, adv * (1 + 0.5 * h)))
    ratio = torch.rand(4, 9, generator=generator) * 2
    assert (redistribute(adv, h, ratio, 0.2, 0.28).sign() * adv.sign() >= 0).all()
    edge = redistribute(torch.ones(1, 2), torch.tensor([[0.5, -0.5]]), torch.tensor([[0.75, 0.75]]), 0.5, 0.5)
    assert edge.tolist() == [[1.5, 1.0]], "a ratio on the edge of the zone is outside"


@pytest.mark.parametrize(
    ("options", "message"),
    [({"beta": 1.5}, "beta=1.5"), ({"alpha": -1}, "alpha=-1"), ({"rho": 2}, "rho=2")],
)
def test_bad_strengths_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        HAPO(**options)
    with pytest.raises(ValueError, match="training.epsilon=0.6 with objective.alpha=1.0"):
        HAPO().check_widths(0.6, None, 0.28)
    with pytest.raises(ValueError, match="training.delta=1.5"):
        HAPO().check_widths(0.2, 1.5, 0.28)
