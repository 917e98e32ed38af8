"""Preplan-and-anchor credit: worked numbers, a slow reference, the limits and identities of its multipliers."""

from __future__ import annotations

import dataclasses
import math
from types import SimpleNamespace

import pytest
import torch

from rltok.attention.signals import AttentionSignals
from rltok.batch import TokenBatch
from rltok.config import ConfigError, build_typed
from rltok.credit import CREDIT, GroupCredit, PreplanAnchor, check_credit, rhythm_gamma, shape_advantages
from rltok.credit.preplan_anchor import RhythmCredit, rank_by_entropy, shuffle_multipliers

WAAD = [3.0, 0.8, 1.4, 5.2, 1.0, 0.9, 2.6, 0.7]
FAI = [0.02, 0.30, 0.05, 0.26, 0.41, 0.03, 0.22, 0.01]


def positions(chosen: torch.Tensor) -> set[int]:
    """Indices of the true entries of a single row."""
    (row,) = chosen
    return set(row.nonzero()[:, 0].tolist())


def options(**changes: object) -> SimpleNamespace:
    """Exactly the fields that `rhythm_gamma` may read."""
    names = ("gamma_amp", "top_quantile", "backalloc", "lookback", "tau_waad", "tau_delta", "delta_mode")
    defaults = {f.name: f.default for f in dataclasses.fields(PreplanAnchor) if f.name in names}
    return SimpleNamespace(**(defaults | changes))


def rhythm(waad, fai, count=None, response=None, credit=None, dtype=torch.float32, **changes) -> RhythmCredit:
    """`rhythm_gamma` of one completion given as lists; all tokens count unless masked."""
    waad, fai = torch.tensor([waad], dtype=dtype), torch.tensor([fai], dtype=dtype)
    response = torch.ones_like(waad) if response is None else torch.tensor([response])
    credit = response if credit is None else torch.tensor([credit])
    count = torch.ones_like(waad) if count is None else torch.tensor([count])
    return rhythm_gamma(waad, fai, count, response, credit, options(**changes))


def signals(waad, fai, count) -> AttentionSignals:
    """Only the token signals matter to the credit; the record of heads is one head of span 0."""
    none = torch.zeros(waad.size(0), 1, dtype=torch.long)
    return AttentionSignals(waad, fai, count, span=none.float(), local=none, global_=none, layers=(0,))


def random_case(seed: int, rows: int = 24, width: int = 19, levels: int = 6, dtype=torch.float32):
    """Signals with many ties, rows of every length down to 0, tool tokens, tokens without horizon."""
    generator = torch.Generator().manual_seed(seed)
    waad = torch.randint(0, levels, (rows, width), generator=generator).to(dtype) / 2
    fai = torch.randint(0, levels, (rows, width), generator=generator).to(dtype) / levels
    lengths = torch.randint(0, width + 1, (rows,), generator=generator)
    lengths[:3] = torch.tensor([0, 1, width])
    response = (torch.arange(width) < lengths[:, None]).long()
    tools = torch.rand(rows, width, generator=generator) < 0.2
    tools[2:6] = False
    count = (lengths[:, None] - torch.arange(width) - 3).clamp(min=0) * response
    return waad, fai, count, response, response * ~tools


def batch(seed: int = 0, entropy_levels: int = 5, tools: bool = True, **changes: object) -> TokenBatch:
    waad, fai, count, response, credit = random_case(seed)
    generator = torch.Generator().manual_seed(seed + 1000)
    rows, width = waad.shape
    credit = credit if tools else response
    values = {
        "advantages": torch.randn(rows, generator=generator),
        "mask": credit.float(),
        "ids": torch.zeros(rows, width, dtype=torch.long),
        "all_rewards": torch.zeros(rows),
        "all_lengths": credit.sum(1),
        "group_size": 4,
        "entropy": torch.randint(0, entropy_levels, (rows, width), generator=generator).float(),
        "attention": signals(waad, fai, count),
        "response_mask": response,
        "seed": 7,
    }
    return TokenBatch(**(values | changes))


def reference(waad, fai, count, response, credit, cfg) -> dict[str, list[list[float]]]:
    """The card's sections 6-8 in plain loops over Python numbers."""
    found: dict[str, list[list[float]]] = {name: [] for name in RhythmCredit._fields}
    bonus, alpha = cfg.gamma_amp - 1, cfg.backalloc
    for w, f, c, r, k in zip(*(x.tolist() for x in (waad, fai, count, response, credit)), strict=True):
        width, own = len(w), [t for t in range(len(w)) if k[t]]
        delta = {}
        for t in own:
            if t + 1 < width and r[t + 1]:
                delta[t] = w[t] - w[t + 1] if cfg.delta_mode == "drop" else abs(w[t] - w[t + 1])
        n_select = math.ceil(cfg.top_quantile * len(own) - 1e-9)
        local = sorted(delta, key=lambda t: (-delta[t], t))[:n_select]
        anchors = sorted((t for t in own if c[t] > 0), key=lambda t: (-f[t], t))[:n_select]
        tau_waad = cfg.tau_waad
        if tau_waad == "median" and own:
            tau_waad = sorted(w[t] for t in own)[(len(own) - 1) // 2]
        tau_delta = cfg.tau_delta
        if tau_delta == "topq":
            tau_delta = min((delta[t] for t in local), default=math.inf)
        dominated, intro = [], []
        for t in anchors:
            before = [u for u in range(t - cfg.lookback, t) if u in delta]
            if before and w[t] <= tau_waad and max(delta[u] for u in before) >= tau_delta:
                dominated.append(t)
                intro.append(max(before, key=lambda u: (delta[u], -u)))
        gamma = [1.0] * width
        for t in anchors:
            gamma[t] += bonus if t not in dominated else (1 - alpha) * bonus
        for t in set(intro):
            gamma[t] += alpha * bonus
        found["gamma_local"].append([1 + bonus * (t in local) for t in range(width)])
        found["gamma_global"].append([1 + bonus * (t in anchors) for t in range(width)])
        found["gamma_coupled"].append(gamma)
        for name, chosen in zip(RhythmCredit._fields[3:], (local, anchors, dominated, intro), strict=True):
            found[name].append([t in chosen for t in range(width)])
    return found


# Worked numbers


def test_worked_example_of_eight_tokens():
    found = rhythm(WAAD, FAI)
    assert positions(found.is_local) == {0, 2, 3, 6} and positions(found.is_global) == {1, 3, 4, 6}
    assert positions(found.is_dominated) == {1, 4} and positions(found.is_introductory) == {0, 3}
    assert found.gamma_coupled.tolist() == [[1.25, 1.25, 1, 1.75, 1.25, 1, 1.5, 1]]
    assert found.gamma_local.tolist() == [[1.5, 1, 1.5, 1.5, 1, 1, 1.5, 1]]
    assert found.gamma_global.tolist() == [[1, 1.5, 1, 1.5, 1.5, 1, 1.5, 1]]


def test_worked_example_from_the_attention_map():
    rows = [[1, 0, 0, 0, 0], [0.5, 0.5, 0, 0, 0], [0.2, 0.3, 0.5, 0, 0], [0.1, 0.1, 0.2, 0.6, 0]]
    attention = torch.tensor([*rows, [0.4, 0.1, 0.1, 0.2, 0.2]], dtype=torch.float64)
    distance = (torch.arange(5)[:, None] - torch.arange(5)).clamp(min=0)
    ahead = (distance >= 1) & (distance <= 2)
    waad = (attention * distance.clamp(max=2)).sum(1)[1:]  # prompt: token 0
    count = ahead.sum(0)[1:]
    fai = ((attention * ahead).sum(0)[1:] / count.clamp(min=1)).tolist()
    assert waad.tolist() == pytest.approx([0.5, 0.7, 0.6, 1.4]) and count.tolist() == [2, 2, 1, 0]
    assert fai == pytest.approx([0.2, 0.15, 0.2, 0])
    # Delta .2 .1 .8, two of each; anchor 2 lies below the median .6 and token 0 made a change of .2 before it
    found = rhythm([0.5, 0.7, 0.6, 1.4], [0.2, 0.15, 0.2, 0], count.tolist(), dtype=torch.float64)
    assert positions(found.is_local) == {0, 2} and positions(found.is_global) == {0, 2}
    assert positions(found.is_dominated) == {2} and positions(found.is_introductory) == {0}
    assert found.gamma_coupled.tolist() == [[1.75, 1, 1.25, 1]]


def test_two_anchors_share_one_introductory_token_which_is_paid_once():
    found = rhythm([9.0, 1, 1, 1, 1, 1], [0, 0.9, 0.8, 0, 0, 0], top_quantile=0.3)
    assert positions(found.is_dominated) == {1, 2} and positions(found.is_introductory) == {0}
    assert found.gamma_coupled.tolist() == [[1.25, 1.25, 1.25, 1, 1, 1]]


def test_a_dominated_anchor_that_introduces_another_gets_the_full_bonus():
    found = rhythm([9.0, 2, 0, 5, 5, 5], [0, 0.9, 0.8, 0, 0, 0], top_quantile=0.3, lookback=1)
    assert positions(found.is_dominated) == {1} and found.gamma_coupled.tolist() == [[1.25, 1.25, 1.5, 1, 1, 1]]
    found = rhythm([9.0, 2, 0, 5, 5, 5], [0, 0.9, 0.8, 0, 0, 0], top_quantile=0.3, lookback=1, tau_delta=2.0)
    assert positions(found.is_dominated) == {1, 2} and positions(found.is_introductory) == {0, 1}
    assert found.gamma_coupled.tolist() == [[1.25, 1.5, 1.25, 1, 1, 1]]


def test_ties_go_to_the_earlier_token_and_counts_are_exact():
    flat = rhythm([2.0] * 5, [0.5] * 5)
    assert positions(flat.is_local) == positions(flat.is_global) == {0, 1}  # ceil(0.4 * 5) = 2, not more on ties
    tied = rhythm([5.0, 1, 5, 1, 1, 1], [0, 0, 0, 0.9, 0, 0], top_quantile=0.5)
    assert positions(tied.is_introductory) == {0}, "of equal changes before the anchor, the first introduced it"
    for n, expected in ((1, 1), (2, 1), (3, 2), (5, 2), (10, 4), (11, 5)):
        assert rhythm(list(range(n)), [0.1] * n).is_global.sum() == expected
    assert rhythm([0.0] * 100, [0.1] * 100, top_quantile=0.07).is_global.sum() == 7  # 0.07 * 100 > 7 in floating point


def test_thresholds_as_numbers_and_falls_only():
    assert positions(rhythm(WAAD, FAI, tau_waad=0.9).is_dominated) == {1}
    assert positions(rhythm(WAAD, FAI, tau_waad=3.0, tau_delta=2.5).is_dominated) == {4, 6}
    assert positions(rhythm(WAAD, FAI, tau_delta=4.3).is_dominated) == set()
    drops = rhythm(WAAD, FAI, delta_mode="drop")  # 2.2 -.6 -3.8 4.2 .1 -1.7 1.9
    assert positions(drops.is_local) == {0, 3, 4, 6}


def test_tool_tokens_are_context_only():
    response, credit = [1] * 8, [1, 1, 0, 1, 0, 1, 1, 1]
    found = rhythm(WAAD, FAI, response=response, credit=credit)
    # n = 6, 3 of each; Delta of 1 and 3 reach into the tool tokens 2 and 4
    assert positions(found.is_local) == {0, 3, 6} and positions(found.is_global) == {1, 3, 6}
    for gamma in found[:3]:
        assert (gamma[0][[2, 4]] == 1).all()
    narrow = rhythm(WAAD, FAI, response=credit, credit=credit)
    assert positions(narrow.is_local) == {0, 5, 6}, "without the tool tokens the change at 3 is not defined"


# Against the reference


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"top_quantile": 0.1, "lookback": 1},
        {"top_quantile": 1.0, "backalloc": 0.3, "gamma_amp": 2.2},
        {"lookback": 40, "backalloc": 1.0},
        {"delta_mode": "drop", "tau_waad": 1.5},
        {"delta_mode": "drop", "top_quantile": 0.8},
        {"tau_delta": 1.0, "tau_waad": 2.0, "backalloc": 0.0},
    ],
    ids=str,
)
def test_equals_the_obvious_loops(changes):
    dominated = 0
    for seed in range(12):
        case, cfg = random_case(seed, dtype=torch.float64), options(**changes)
        found, expected = rhythm_gamma(*case, cfg), reference(*case, cfg)
        for name, values in found._asdict().items():
            wanted = torch.tensor(expected[name], dtype=values.dtype)
            torch.testing.assert_close(values, wanted, atol=1e-12, rtol=0, msg=lambda m, n=name: f"{n}: {m}")
        dominated += int(found.is_dominated.sum())
    assert dominated > 20, "the comparison must meet dominated anchors"


# Limits and identities


def test_identities_of_the_multipliers():
    for seed in range(8):
        case = random_case(seed)
        n = case[4].sum(1)
        found = rhythm_gamma(*case, options())
        candidates = (case[4].bool() & (case[2] > 0)).sum(1)
        expected = torch.minimum(torch.tensor([math.ceil(0.4 * int(m) - 1e-9) for m in n]), candidates)
        assert torch.equal(found.is_global.sum(1), expected)
        torch.testing.assert_close((found.gamma_global - 1).sum(1), 0.5 * expected)
        assert set(found.gamma_local.unique().tolist()) | set(found.gamma_global.unique().tolist()) == {1.0, 1.5}
        assert found.gamma_coupled.min() >= 1 and found.gamma_coupled.max() <= 1 + 0.5 * 1.5
        lost = (found.gamma_global - found.gamma_coupled).double().sum(1)
        dominated, introductory = found.is_dominated.sum(1), found.is_introductory.sum(1)
        torch.testing.assert_close(lost, 0.25 * (dominated - introductory).double())
        assert (introductory <= dominated).all() and (introductory < dominated).any()
        assert not (found.is_dominated & ~found.is_global).any()
        for values in found:
            assert not values.requires_grad
        for gamma in found[:3]:
            assert (gamma[case[4] == 0] == 1).all()


@pytest.mark.parametrize("changes", [{"gamma_amp": 1.0}, {"top_quantile": 0.0}])
def test_no_strength_is_one_everywhere(changes):
    found = rhythm_gamma(*random_case(1), options(**changes))
    for gamma in found[:3]:
        assert torch.equal(gamma, torch.ones_like(gamma))


def test_coupled_is_global_without_back_allocation_or_dominated_anchors():
    case = random_case(2)
    for changes in ({"backalloc": 0.0}, {"tau_delta": 1e6}, {"tau_waad": -1.0}):
        found = rhythm_gamma(*case, options(**changes))
        assert torch.equal(found.gamma_coupled, found.gamma_global)
        assert found.is_global.any() and found.is_dominated.any() == ("backalloc" in changes)
    assert not torch.equal(*rhythm_gamma(*case, options())[1:3])


def test_rows_without_anything_to_choose():
    width = 4
    waad, fai = torch.rand(4, width), torch.rand(4, width)
    mask = torch.tensor([[0, 0, 0, 0], [1, 0, 0, 0], [1, 1, 1, 1], [1, 1, 0, 0]])
    found = rhythm_gamma(waad, fai, torch.zeros(4, width), mask, mask, options())  # shorter than the horizon
    assert torch.equal(found.gamma_global, torch.ones(4, width))
    assert torch.equal(found.gamma_coupled, torch.ones(4, width))
    assert found.is_local.sum(1).tolist() == [0, 0, 2, 1]
    assert rhythm([1.0], [0.3], count=[1]).gamma_coupled.tolist() == [[1.5]], "one token can anchor, given a horizon"
    for shape in ((3, 0), (0, 5), (0, 0)):
        empty = torch.zeros(shape)
        for strategy in ("coupled", "local", "global"):
            assert getattr(rhythm_gamma(*[empty] * 5, options()), f"gamma_{strategy}").shape == shape


def test_values_outside_the_response_do_not_matter():
    waad, fai, count, response, credit = random_case(3)
    outside = response == 0
    found = rhythm_gamma(waad, fai, count, response, credit, options())
    for junk in (torch.nan, torch.inf, 1e9):
        again = rhythm_gamma(
            waad.masked_fill(outside, junk), fai.masked_fill(outside, junk), count + outside.long() * 9, response,
            credit, options(),
        )  # fmt: skip
        for one, other in zip(found, again, strict=True):
            assert torch.equal(one, other)


def test_rows_are_independent_and_padding_does_not_matter():
    case = random_case(4)
    found = rhythm_gamma(*case, options())
    order = torch.randperm(case[0].size(0), generator=torch.Generator().manual_seed(0))
    for one, other in zip(found, rhythm_gamma(*(x[order] for x in case), options()), strict=True):
        assert torch.equal(one[order], other)
    for row in range(case[0].size(0)):
        length = max(1, int(case[3][row].sum()))
        alone = rhythm_gamma(*(x[row : row + 1, :length] for x in case), options())
        for one, other in zip(found, alone, strict=True):
            assert torch.equal(one[row : row + 1, :length], other)


def test_gradients_stop_and_half_precision_is_widened():
    waad, fai, count, response, credit = random_case(5)
    tracked = rhythm_gamma(waad.requires_grad_(), fai.requires_grad_(), count, response, credit, options())
    assert not any(values.requires_grad for values in tracked)
    half = rhythm_gamma(waad.detach().bfloat16(), fai.detach(), count, response, credit, options())
    assert half.gamma_coupled.dtype == torch.float32
    assert torch.equal(half.gamma_local, tracked.gamma_local), "halves of small numbers are exact in bfloat16"


# Advantages


def test_sign_of_the_advantage():
    adv, gamma = torch.tensor([2.0, -2.0, 0.0]), torch.tensor([[1.5, 1.0]] * 3)
    assert shape_advantages(adv, gamma).tolist() == [[3, 2], [-3, -2], [0, 0]]
    assert shape_advantages(adv, gamma, "positive").tolist() == [[3, 2], [-2, -2], [0, 0]]
    assert shape_advantages(adv, gamma, "negative").tolist() == [[2, 2], [-3, -2], [0, 0]]
    noise = torch.randn(50, generator=torch.Generator().manual_seed(0))
    assert torch.equal(shape_advantages(noise, torch.ones(50, 3)), noise[:, None].expand(50, 3))
    assert shape_advantages(noise.double(), torch.ones(50, 3)).dtype == torch.float64
    assert not shape_advantages(noise.clone().requires_grad_(), torch.ones(50, 3)).requires_grad


def test_credit_is_gamma_times_advantage_on_credit_tokens():
    data = batch()
    for strategy in ("coupled", "local", "global"):
        found = rhythm_gamma(*random_case(0), options())
        credit = PreplanAnchor(strategy=strategy)(data)
        check_credit(credit, data, "preplan_anchor")
        expected = data.advantages[:, None] * getattr(found, f"gamma_{strategy}") * data.mask
        assert torch.equal(credit, expected)
    assert torch.equal(PreplanAnchor()(dataclasses.replace(data, advantages=torch.zeros(24))), torch.zeros(24, 19))


@pytest.mark.parametrize("neutral", [{"gamma_amp": 1.0}, {"top_quantile": 0.0}, {"gamma_amp": 1, "control": "entropy"}])
def test_baseline_is_bitwise_group_credit_and_asks_for_nothing(neutral):
    data = batch(attention=None, entropy=None, response_mask=None)
    method = PreplanAnchor(**neutral)
    assert method.needs == () and method.metrics(data) == {} and method.per_token
    assert torch.equal(method(data), GroupCredit()(data))


def test_without_a_response_mask_every_token_of_the_response_counts():
    data = batch(tools=False)
    assert torch.equal(PreplanAnchor()(data), PreplanAnchor()(dataclasses.replace(data, response_mask=None)))
    tools = batch()
    assert not torch.equal(PreplanAnchor()(tools), PreplanAnchor()(dataclasses.replace(tools, response_mask=None)))


def test_renormalised_multipliers_average_one():
    data = dataclasses.replace(batch(), advantages=torch.ones(24))
    credit = PreplanAnchor(renormalize=True)(data)
    check_credit(credit, data, "preplan_anchor")
    n = data.mask.sum(1)
    torch.testing.assert_close(credit.sum(1), n)
    plain = PreplanAnchor()(data)
    torch.testing.assert_close(credit * (plain.sum(1) / n.clamp(min=1))[:, None], plain)


# Controls


def test_shuffled_keeps_the_multipliers_of_each_completion():
    data = dataclasses.replace(batch(), advantages=torch.ones(24))
    plain, shuffled = PreplanAnchor()(data), PreplanAnchor(control="shuffled")(data)
    check_credit(shuffled, data, "preplan_anchor")
    for one, other, mask in zip(plain, shuffled, data.mask.bool(), strict=True):
        assert sorted(one[mask].tolist()) == sorted(other[mask].tolist())
    assert not torch.equal(plain, shuffled)
    assert torch.equal(shuffled, PreplanAnchor(control="shuffled")(data)), "repeatable"
    other_rollout = PreplanAnchor(control="shuffled")(dataclasses.replace(data, seed=8))
    assert not torch.equal(shuffled, other_rollout)


def test_shuffle_ignores_global_state_padding_and_the_number_of_ranks():
    gamma = torch.arange(60.0).view(6, 10)
    mask = (torch.arange(10) < torch.tensor([0, 1, 4, 7, 7, 7])[:, None]).long()
    torch.manual_seed(0)
    whole = shuffle_multipliers(gamma, mask, seed=3)
    torch.manual_seed(1)
    assert torch.equal(whole, shuffle_multipliers(gamma, mask, seed=3))
    assert torch.equal(whole[:, :7], shuffle_multipliers(gamma[:, :7], mask[:, :7], seed=3))
    assert torch.equal(whole[2:5], shuffle_multipliers(gamma[2:5], mask[2:5], seed=3, first_row=2))
    assert torch.equal(whole[mask == 0], gamma[mask == 0])
    orders = {tuple((row - row.min()).tolist()) for row in whole[3:, :7]}
    assert len(orders) == 3, "rows of one length are not shuffled alike"


def test_shuffle_is_uniform():
    gamma, mask = torch.tensor([[1.0, 2.0, 3.0, 9.0]]), torch.tensor([[1, 1, 1, 0]])
    first = torch.stack([shuffle_multipliers(gamma, mask, seed)[0, 0] for seed in range(600)])
    for value in (1.0, 2.0, 3.0):
        assert (first == value).float().mean().item() == pytest.approx(1 / 3, abs=0.08)  # four standard deviations


def test_entropy_control_hands_out_the_same_multipliers_by_entropy():
    gamma = torch.tensor([[1.25, 1.0, 1.75, 1.0, 1.5]])
    entropy = torch.tensor([[0.1, 2.0, 0.3, 2.0, 9.0]])
    assert rank_by_entropy(gamma, entropy, torch.ones(1, 5)).tolist() == [[1.0, 1.5, 1.0, 1.25, 1.75]]
    masked = rank_by_entropy(gamma, entropy.masked_fill(entropy == 9, torch.nan), torch.tensor([[1, 1, 1, 1, 0]]))
    assert masked.tolist() == [[1.0, 1.75, 1.0, 1.25, 1.0]], "a masked token neither gives nor gets"
    with pytest.raises(ValueError, match="entropy is not finite"):
        rank_by_entropy(gamma, torch.full((1, 5), torch.nan), torch.ones(1, 5))


@pytest.mark.parametrize("strategy", ["coupled", "local", "global"])
def test_entropy_control_picks_the_highest_entropy(strategy):
    data = dataclasses.replace(batch(), advantages=torch.ones(24))
    plain = PreplanAnchor(strategy=strategy)(data)
    ranked = PreplanAnchor(strategy=strategy, control="entropy")(data)
    check_credit(ranked, data, "preplan_anchor")
    for one, other, mask, entropy in zip(plain, ranked, data.mask.bool(), data.entropy, strict=True):
        assert sorted(one[mask].tolist()) == sorted(other[mask].tolist())
        order = entropy[mask].argsort(descending=True, stable=True)
        assert other[mask][order].tolist() == sorted(one[mask].tolist(), reverse=True)


@pytest.mark.parametrize("control", ["none", "shuffled", "entropy"])
@pytest.mark.parametrize("strategy", ["coupled", "local", "global"])
def test_neither_ranks_nor_padding_change_the_credit(strategy, control):
    method, data = PreplanAnchor(strategy=strategy, control=control, renormalize=True, sign="positive"), batch()
    rows, longest = slice(7, 15), int(data.response_mask[7:15].sum(1).max())

    def local(values):
        return values[rows, :longest]

    part = dataclasses.replace(
        data,
        advantages=data.advantages[rows],
        offset=7,
        attention=signals(*(local(x) for x in (data.attention.waad, data.attention.fai, data.attention.fai_count))),
        **{name: local(getattr(data, name)) for name in ("mask", "ids", "entropy", "response_mask")},
    )
    assert longest < data.mask.size(1), "there must be padding to cut"
    torch.testing.assert_close(method(part), local(method(data)))


# The method as a door


def test_needs_and_options_of_the_attention_pass():
    assert PreplanAnchor().needs == ("attention",) == PreplanAnchor(control="shuffled").needs
    assert set(PreplanAnchor(control="entropy").needs) == {"attention", "entropy"}
    method = PreplanAnchor(layers=(1, 2), head_quantile=0.2, window=7, horizon_min=3, horizon_max=None)
    config = method.attention
    for name in ("layers", "head_quantile", "head_scope", "local_heads", "global_heads", "window", "horizon_min"):
        assert getattr(config, name) == getattr(method, name), name
    assert config.horizon_max is None
    built = build_typed(CREDIT, {"type": "preplan_anchor", "tau_waad": 2, "layers": [0, 3]}, "credit")
    assert built == PreplanAnchor(tau_waad=2.0, layers=(0, 3))


def test_metrics_average_to_the_numbers_they_name():
    data = batch()
    method, mask = PreplanAnchor(), data.mask.bool()
    found = rhythm_gamma(*random_case(0), options())
    means = {name: values[mask].mean().item() for name, values in method.metrics(data).items()}
    n = int(mask.sum())
    assert means["gamma"] == pytest.approx(found.gamma_coupled[mask].mean().item())
    assert means["amplified"] == pytest.approx(int((found.gamma_coupled > 1).sum()) / n)
    for name, chosen in zip(("preplan", "anchor", "dominated", "introductory"), found[3:], strict=True):
        assert means[name] == pytest.approx(int(chosen.sum()) / n)
    ratio = [
        int(d.sum()) / max(int(a.sum()), 1) * int(m.sum())
        for d, a, m in zip(found.is_dominated, found.is_global, mask, strict=True)
    ]
    assert means["dominated_of_anchors"] == pytest.approx(sum(ratio) / n)
    assert means["waad"] == pytest.approx(data.attention.waad[mask].mean().item())
    assert means["fai"] == pytest.approx(data.attention.fai[mask].mean().item())
    for values in method.metrics(data).values():
        assert values.shape == data.mask.shape and (values[~mask] == 0).all()
    renormalised = PreplanAnchor(renormalize=True, control="shuffled").metrics(data)
    assert renormalised["amplified"].sum() == int((found.gamma_coupled > 1).sum())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"strategy": "both"}, "credit.strategy='both' is unknown; allowed: 'coupled', 'local', 'global'"),
        ({"control": "random"}, "credit.control='random' is unknown; allowed: 'none', 'shuffled', 'entropy'"),
        ({"sign": "all"}, "credit.sign='all'.*'both', 'positive', 'negative'"),
        ({"delta_mode": "rise"}, "credit.delta_mode='rise'.*'abs', 'drop'"),
        ({"gamma_amp": 0.9}, r"credit.gamma_amp=0.9 must be finite and >= 1"),
        ({"gamma_amp": math.nan}, r"credit.gamma_amp=nan"),
        ({"gamma_amp": math.inf}, r"credit.gamma_amp=inf"),
        ({"top_quantile": 1.2}, r"credit.top_quantile=1.2 must lie in \[0, 1\]"),
        ({"backalloc": -0.1}, r"credit.backalloc=-0.1 must lie in \[0, 1\]"),
        ({"lookback": 0}, "credit.lookback=0 must be >= 1"),
        ({"tau_waad": "mean"}, "credit.tau_waad='mean' must be 'median' or a finite number"),
        ({"tau_delta": math.inf}, "credit.tau_delta=inf must be 'topq' or a finite number"),
        ({"window": 0}, "window"),
        ({"head_quantile": 0.6}, "head_quantile"),
        ({"head_scope": "static"}, "local_heads"),
        ({"horizon_min": 20, "horizon_max": 10}, "horizon"),
    ],
    ids=str,
)
def test_options_that_make_no_sense_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        PreplanAnchor(**changes)
    with pytest.raises(ConfigError):
        build_typed(CREDIT, {"type": "preplan_anchor"} | changes, "credit")


def test_signals_that_do_not_fit_are_refused():
    waad, fai, count, response, credit = random_case(6)
    with pytest.raises(ValueError, match=r"fai \(24, 18\)"):
        rhythm_gamma(waad, fai[:, 1:], count, response, credit, options())
    with pytest.raises(ValueError, match="credit_mask is 1 outside response_mask at row 0, token 0"):
        rhythm_gamma(waad, fai, count, response * 0, torch.ones_like(credit), options())
    broken = waad.clone()
    broken[2, 4] = torch.nan
    with pytest.raises(ValueError, match="waad is nan at row 2, token 4"):
        rhythm_gamma(broken, fai, count, response, credit, options())
    with pytest.raises(ValueError, match="delta_mode='rise'"):
        rhythm_gamma(waad, fai, count, response, credit, options(delta_mode="rise"))
    with pytest.raises(ValueError, match=r"advantages \(3,\) and gamma \(2, 4\)"):
        shape_advantages(torch.ones(3), torch.ones(2, 4))
    with pytest.raises(ValueError, match="sign='up' is unknown"):
        shape_advantages(torch.ones(2), torch.ones(2, 4), "up")
    for changes, message in (
        ({"attention": None}, "needs TokenBatch.attention"),
        ({"entropy": None}, "needs TokenBatch.entropy"),
    ):
        with pytest.raises(ValueError, match=message):
            PreplanAnchor(control="entropy")(batch(**changes))
