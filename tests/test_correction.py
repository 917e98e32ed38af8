"""Correction weights: worked numbers, exact limits, unbiasedness by enumeration, and independence of ranks."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from transformers import TopPLogitsWarper

from rltok.config import ConfigError
from rltok.correction import CorrectionConfig, rollout_weights
from rltok.rollout import RolloutConfig, build_rollout, refuse_restricted_sampling
from rltok.sampling import AdaptiveTemperatureConfig

OLD = torch.tensor([[-1.0, -0.5, -2.0]])
MU = torch.tensor([[-0.8, -0.9, -1.0]])
ONES = torch.ones(1, 3)

EVERY_MODE = [
    CorrectionConfig(level=level, mode=mode, batch_normalize=normalize, symmetric=symmetric, veto=veto)
    for level, mode in [
        ("token", "truncate"),
        ("token", "mask"),
        ("sequence", "truncate"),
        ("sequence", "mask"),
        ("geometric", "mask"),
    ]
    for normalize, symmetric, veto in [(False, False, None), (True, True, 1e-4)]
]


def random_pair(rows: int = 6, steps: int = 7, scale: float = 0.4, seed: int = 0):
    """log pi_old, log mu and a mask of different lengths, one row of them empty."""
    generator = torch.Generator().manual_seed(seed)
    log_mu = -2 * torch.rand(rows, steps, generator=generator)
    log_old = log_mu + scale * torch.randn(rows, steps, generator=generator)
    lengths = torch.randint(1, steps + 1, (rows,), generator=generator)
    lengths[0] = 0
    return log_old, log_mu, (torch.arange(steps) < lengths[:, None]).long()


def close(actual, expected, tolerance=1e-6):
    torch.testing.assert_close(
        torch.as_tensor(actual, dtype=torch.float32), torch.as_tensor(expected), atol=tolerance, rtol=0
    )


@pytest.mark.parametrize(
    ("cfg", "weight"),
    [
        (CorrectionConfig(mode="truncate", clip_max=None), [[0.818731, 1.491825, 0.367879]]),
        (CorrectionConfig(mode="truncate", clip_max=1.2), [[0.818731, 1.2, 0.367879]]),
        (CorrectionConfig(mode="truncate", clip_max=1.2, clip_min=0.5), [[0.818731, 1.2, 0.5]]),
        (CorrectionConfig(mode="mask", clip_max=1.2, clip_min=0.5), [[0.818731, 0.0, 0.0]]),
        (CorrectionConfig(level="sequence", mode="truncate"), [[0.449329]]),
        (CorrectionConfig(level="sequence", mode="mask", symmetric=True), [[0.0]]),
        (CorrectionConfig(level="sequence", mode="mask", clip_max=3.0, symmetric=True), [[0.449329]]),
        (CorrectionConfig(level="geometric", mode="mask", clip_min=0.76), [[1.0]]),
        (CorrectionConfig(level="geometric", mode="mask", clip_min=0.77), [[0.0]]),
        (CorrectionConfig(mode="off"), [[1.0, 1.0, 1.0]]),
    ],
)
def test_worked_weights(cfg, weight):
    close(rollout_weights(OLD, MU, ONES, cfg).weight, weight)


def test_worked_metrics():
    metrics = rollout_weights(OLD, MU, ONES, CorrectionConfig(mode="truncate", clip_max=1.2)).metrics
    expected = {
        "k1": 0.266667,
        "k3": 0.159478,
        "ess": 0.788909,
        "max_abs_diff": 1.0,
        "perplexity_ratio": math.exp(0.8 / 3),
        "chi2": (math.exp(-0.4) + math.exp(0.8) + math.exp(-2)) / 3 - 1,
        "ratio_mean": (0.818731 + 1.491825 + 0.367879) / 3,
        "ratio_max": 1.491825,
        "truncated": 1 / 3,
        "rejected": 0.0,
        "vetoed": 0.0,
        "weight_mean": (0.818731 + 1.2 + 0.367879) / 3,
        "unknown": 0.0,
    }
    for name, value in expected.items():
        assert metrics[name].item() == pytest.approx(value, abs=1e-6), name
    assert metrics["weight_ess"] > metrics["ess"]  # a truncated tail


@pytest.mark.parametrize("cfg", EVERY_MODE)
def test_equal_policies_have_weight_exactly_one(cfg):
    _, log_mu, mask = random_pair()
    result = rollout_weights(log_mu, log_mu.clone(), mask, cfg)
    assert result.weight.eq(1).all()
    assert result.keep.all()
    assert torch.equal(result.loss_mask, mask)
    assert result.metrics["ess"] == 1
    assert result.metrics["k1"] == 0


@pytest.mark.parametrize("cfg", EVERY_MODE)
def test_masked_positions_do_not_matter_and_nothing_is_differentiated(cfg):
    log_old, log_mu, mask = random_pair()
    clean = rollout_weights(log_old, log_mu, mask, cfg)
    hidden = mask == 0
    garbage_old = log_old.masked_fill(hidden, float("nan")).requires_grad_()
    garbage = rollout_weights(garbage_old, log_mu.masked_fill(hidden, -float("inf")), mask, cfg)
    assert torch.equal(clean.weight, garbage.weight)
    assert torch.equal(clean.loss_mask, garbage.loss_mask)
    assert not garbage.weight.requires_grad
    for name, value in clean.metrics.items():
        assert torch.isfinite(value), name
        assert torch.equal(value, garbage.metrics[name]), name


def test_modes_agree_with_trl_formulas():
    log_old, log_mu, mask = random_pair(rows=32, steps=9, seed=3)
    difference = (log_old - log_mu) * mask
    low, high = 0.6, 1.5
    for level in ("token", "sequence"):
        ratio = (difference if level == "token" else difference.sum(-1, keepdim=True)).exp()
        truncated = ratio.clamp(min=low, max=high)
        masked = torch.where((ratio < low) | (ratio > high), torch.zeros_like(ratio), ratio)
        for mode, expected in (("truncate", truncated), ("mask", masked)):
            cfg = CorrectionConfig(level=level, mode=mode, clip_min=low, clip_max=high, masked_in_denominator=True)
            result = rollout_weights(log_old, log_mu, mask, cfg)
            torch.testing.assert_close(result.weight, expected)
            assert not torch.equal(expected, ratio)  # the bounds bite
            assert torch.equal(result.loss_mask, mask)


def test_rejected_tokens_leave_the_denominator_unless_asked():
    cfg = CorrectionConfig(mode="mask", clip_min=0.5, clip_max=1.2)
    assert rollout_weights(OLD, MU, ONES, cfg).loss_mask.tolist() == [[1, 0, 0]]
    cfg = replace(cfg, masked_in_denominator=True)
    assert rollout_weights(OLD, MU, ONES, cfg).loss_mask.tolist() == [[1, 1, 1]]


@pytest.mark.parametrize("level", ["token", "sequence", "geometric"])
def test_veto_drops_only_the_offending_sequence(level):
    log_mu = torch.full((3, 4), -1.0)
    log_old = log_mu.clone()
    log_old[1, 2] = -1.0 + math.log(1e-5)
    log_old[2, 3] = -100.0  # outside the mask
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 1, 1], [1, 1, 1, 0]])
    mode = "mask" if level == "geometric" else "truncate"
    result = rollout_weights(log_old, log_mu, mask, CorrectionConfig(level=level, mode=mode, veto=1e-4))
    assert result.keep.all(dim=1).tolist() == [True, False, True]
    assert result.weight[1].eq(0).all()
    assert result.weight[[0, 2]].eq(1).all()
    assert result.loss_mask[1].sum() == 0
    assert result.metrics["vetoed"].item() == pytest.approx(1 / 3)
    assert result.metrics["truncated"] == 0


def test_veto_sees_ratios_below_the_safety_clamp():
    log_old = torch.tensor([[-30.0, -1.0]])
    log_mu = torch.tensor([[-1.0, -1.0]])  # log-ratio -29: clamped to -20 before exp
    cfg = CorrectionConfig(mode="truncate", veto=1e-12)  # log veto = -27.6
    assert not rollout_weights(log_old, log_mu, torch.ones(1, 2), cfg).keep.any()


def test_nan_gives_ratio_one_and_infinity_stays_finite():
    log_mu = torch.tensor([[float("nan"), -1.0, -float("inf")]])
    log_old = torch.tensor([[-1.0, -1.0, -1.0]])
    result = rollout_weights(log_old, log_mu, ONES, CorrectionConfig(mode="truncate", clip_max=None))
    close(result.weight, [[1.0, 1.0, math.exp(20)]], tolerance=100)
    assert result.metrics["unknown"].item() == pytest.approx(1 / 3)
    unknown = torch.full((1, 3), float("nan"))
    assert rollout_weights(log_old, unknown, ONES, CorrectionConfig(level="sequence", mode="mask")).weight == 1


def test_all_rejected_and_empty_batches_stay_finite():
    cfg = CorrectionConfig(mode="mask", clip_max=1.0001, clip_min=0.9999, batch_normalize=True)
    result = rollout_weights(OLD, MU, ONES, cfg)
    assert result.weight.sum() == 0
    assert result.loss_mask.sum() == 0
    assert result.metrics["rejected"] == 1
    empty = rollout_weights(OLD, MU, torch.zeros(1, 3), cfg)
    for metrics in (result.metrics, empty.metrics):
        assert all(torch.isfinite(value) for value in metrics.values())
    assert empty.metrics["ess"] == 1


@pytest.mark.parametrize("level", ["token", "sequence"])
def test_normalised_weights_average_one(level):
    log_old, log_mu, mask = random_pair(rows=16)
    cfg = CorrectionConfig(level=level, mode="mask", clip_max=1.3, symmetric=True, batch_normalize=True)
    result = rollout_weights(log_old, log_mu, mask, cfg)
    units = mask.bool() if level == "token" else mask.bool().any(1, keepdim=True)
    assert (~result.keep & units).any()
    assert result.weight[units & result.keep].mean().item() == pytest.approx(1, abs=1e-6)
    cfg = replace(cfg, masked_in_denominator=True)
    assert rollout_weights(log_old, log_mu, mask, cfg).weight[units].mean().item() == pytest.approx(1, abs=1e-6)


class Captured:
    """Collects what a rank hands in, and answers with the total that was agreed on."""

    def __init__(self, sums=None, maxima=None):
        self.sums, self.maxima, self.calls = sums, maxima, []

    def sum(self, local):
        self.calls.append(local)
        return local if self.sums is None else self.sums

    def max(self, local):
        self.calls.append(local)
        return local if self.maxima is None else self.maxima


@pytest.mark.parametrize("cfg", EVERY_MODE)
def test_two_ranks_equal_one(cfg):
    log_old, log_mu, mask = random_pair(rows=8, scale=0.8, seed=5)
    whole = rollout_weights(log_old, log_mu, mask, cfg)
    parts = [slice(0, 3), slice(3, 8)]
    captured = []
    for part in parts:
        reducer = Captured()
        rollout_weights(log_old[part], log_mu[part], mask[part], cfg, reduce=reducer)
        captured.append(reducer.calls)
    (sums_a, max_a), (sums_b, max_b) = captured
    total = Captured(sums_a + sums_b, torch.maximum(max_a, max_b))
    results = [rollout_weights(log_old[p], log_mu[p], mask[p], cfg, reduce=total) for p in parts]
    torch.testing.assert_close(torch.cat([r.weight for r in results]), whole.weight)
    assert torch.equal(torch.cat([r.loss_mask for r in results]), whole.loss_mask)
    for result in results:
        for name, value in whole.metrics.items():
            torch.testing.assert_close(result.metrics[name], value, msg=name)


# ---- what the weights are for: expectations, by enumeration ----


def enumerated_weights(learner_logits, sampler_logits, cfg):
    """(V,) weight of every token as a one-token completion, and the sampler's probabilities."""
    log_old = learner_logits.log_softmax(-1)
    log_mu = sampler_logits.log_softmax(-1)
    weight = rollout_weights(log_old[:, None], log_mu[:, None], torch.ones(len(log_mu), 1), cfg).weight
    return weight.squeeze(1), log_mu.exp()


def test_expected_weight_is_one_with_full_support_and_the_kept_mass_with_top_p():
    logits = 1.5 * torch.randn(50, generator=torch.Generator().manual_seed(1))
    cfg = CorrectionConfig(mode="truncate", clip_max=None)
    weight, mu = enumerated_weights(logits, logits / 0.8 + 0.3 * logits.sin(), cfg)
    assert (weight * mu).sum().item() == pytest.approx(1, abs=1e-6)
    restricted = TopPLogitsWarper(top_p=0.8)(None, logits[None])[0]
    kept = restricted > -float("inf")
    weight, mu = enumerated_weights(logits, restricted, cfg)
    kept_mass = logits.softmax(-1)[kept].sum().item()
    assert 0.8 < kept_mass < 0.95
    assert (weight * mu)[kept].sum().item() == pytest.approx(kept_mass, abs=1e-6)


@pytest.mark.parametrize("sampler", ["quantised", "biased"])
def test_bandit_gradient(sampler):
    logits = torch.tensor([0.7, 0.1, -0.6], requires_grad=True)
    reward = torch.tensor([1.0, 0.0, -0.5])
    changed = logits.detach().round() if sampler == "quantised" else logits.detach() + torch.tensor([0.0, 0.0, 1.0])

    def gradient(weight, probabilities):
        loss = (probabilities * weight * reward * logits.log_softmax(-1)).sum()
        return torch.autograd.grad(loss, logits)[0]

    exact = gradient(torch.ones(3), logits.detach().softmax(-1))
    for mode, is_exact in (("off", False), ("truncate", True)):
        weight, mu = enumerated_weights(logits.detach(), changed, CorrectionConfig(mode=mode, clip_max=None))
        error = (gradient(weight, mu) - exact).abs().max().item()
        assert (error < 1e-6) if is_exact else (error > 0.02), (mode, error)


# ---- configuration ----


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"level": "word"}, "level='word'"),
        ({"mode": "clip"}, "mode='clip'"),
        ({"clip_max": 0.5}, "clip_max=0.5"),
        ({"clip_min": 1.5}, "clip_min=1.5"),
        ({"symmetric": True, "clip_max": None}, "clip_max"),
        ({"symmetric": True, "clip_min": 0.5}, "clip_min"),
        ({"veto": 2.0}, "veto=2.0"),
        ({"min_ess": 2.0}, "min_ess=2.0"),
        ({"level": "geometric", "mode": "truncate"}, "mode='mask'"),
        ({"mode": "off", "veto": 1e-4}, "veto"),
    ],
)
def test_wrong_correction_settings_are_refused(options, words):
    with pytest.raises(ValueError, match=words):
        CorrectionConfig(**options)


def test_auto_is_decided_by_the_sampler():
    auto = CorrectionConfig(veto=1e-4)
    assert auto.resolve(sampler_is_modified=False).mode == "off"
    assert auto.resolve(sampler_is_modified=True).mode == "truncate"
    assert CorrectionConfig(level="geometric").resolve(sampler_is_modified=True).mode == "mask"
    assert CorrectionConfig(mode="mask").resolve(sampler_is_modified=False).mode == "mask"
    plain, explicit = CorrectionConfig(), CorrectionConfig(mode="truncate")
    asked = (rollout_weights(OLD, MU, ONES, config).weight for config in (plain, explicit))
    assert torch.equal(*asked), "who asks for weights gets them"
    with pytest.raises(ValueError, match="shapes differ"):
        rollout_weights(OLD, MU[:, :2], ONES, CorrectionConfig(mode="off"))


def test_build_rollout():
    assert build_rollout(None) == RolloutConfig() == build_rollout({})
    assert not RolloutConfig().modifies_sampler
    assert not RolloutConfig().records_logps
    rollout = build_rollout(
        {
            "decoding": [{"type": "adaptive_temperature", "tau": 0.1}],
            "correction": {"clip_max": 3},
            "dynamic_sampling": {"metric": "accuracy", "max_rounds": 3},
        }
    )
    assert rollout.decoding == (AdaptiveTemperatureConfig(tau=0.1),)
    assert rollout.resolved_correction == CorrectionConfig(mode="truncate", clip_max=3)
    assert rollout.records_logps
    assert rollout.needs == {"entropy_stats"}
    assert rollout.dynamic_sampling.on_limit == "error"
    assert build_rollout(rollout) is rollout
    neutral = build_rollout({"decoding": [{"type": "adaptive_temperature", "tau": 0}]})
    assert not neutral.modifies_sampler
    assert not neutral.needs
    assert neutral.resolved_correction.mode == "off"


@pytest.mark.parametrize(
    ("section", "words"),
    [
        ({"decodin": []}, r"rollout\.decodin: unknown key.*did you mean 'decoding'"),
        ({"decoding": [{"type": "adaptive"}]}, r"rollout\.decoding\[0\]\.type: unknown type 'adaptive'"),
        ({"decoding": [{"type": "adaptive_temperature", "tau": 1.5}]}, r"rollout\.decoding\[0\]: tau=1.5 must be < 1"),
        ({"decoding": {"type": "adaptive_temperature"}}, "is not a list"),
        ({"decoding": [{"type": "adaptive_temperature"}] * 2}, "2 times"),
        ({"correction": {"clip_max": 0.1}}, r"rollout\.correction: clip_max=0.1"),
        ({"dynamic_sampling": {}}, r"rollout\.dynamic_sampling\.metric: missing"),
        ({"dynamic_sampling": {"metric": "a", "on_limit": "skip"}}, "on_limit"),
        ({"correction": {"mode": "truncate"}, "record_logps": "never"}, "record_logps"),
    ],
)
def test_wrong_rollout_sections_are_refused(section, words):
    with pytest.raises(ConfigError, match=words):
        build_rollout(section)


def test_restricted_sampling_is_refused_while_strict():
    refuse_restricted_sampling(RolloutConfig(), top_p=1.0, top_k=0, min_p=None, repetition_penalty=1.0)
    with pytest.raises(ValueError, match=r"top_p=0.9.*top_k=20.*min_p=0.1.*rollout.strict=false"):
        refuse_restricted_sampling(RolloutConfig(), top_p=0.9, top_k=20, min_p=0.1)
    refuse_restricted_sampling(RolloutConfig(strict=False), top_p=0.9)
