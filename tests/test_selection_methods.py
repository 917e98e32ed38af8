"""Selection methods, their cuts and the repacking: what every method must keep, and what makes each one itself."""

from __future__ import annotations

import itertools
import math
from collections import Counter

import pytest
import torch

from rltok.selection import (
    D3S,
    PODS,
    SELECTION,
    D3SSchedule,
    RandomSelection,
    RowBatch,
    keep_count,
    max_variance_subset,
    pack_rows,
    renormalized,
)
from rltok.selection.method import Cuts
from rltok.selection.packing import used_slots

PROMPTS, GROUP = 6, 8
ROWS = PROMPTS * GROUP


def build(name, rows=1.0, tokens=1.0, scope="group"):
    """A method of the registry with constant cuts; None where it has no such scope."""
    method = SELECTION[name]
    if issubclass(method, Cuts):
        return method(rows_start=rows, rows_end=rows, tokens_start=tokens, tokens_end=tokens, scope=scope)
    if method is PODS:
        return PODS(keep=rows) if scope == "group" else None
    raise AssertionError(f"say here how to build {name!r} with given cuts, so that the tests below cover it")


CASES = [(name, scope) for name in SELECTION for scope in ("batch", "group") if build(name, scope=scope)]
cases = pytest.mark.parametrize(("name", "scope"), CASES, ids=["-".join(case) for case in CASES])
names = pytest.mark.parametrize("name", SELECTION)


def row_batch(rewards, group_size=GROUP, trainable=None, seed=0):
    rewards = torch.as_tensor(rewards)
    everything = torch.arange(rewards.numel())
    credit = renormalized(rewards, everything // group_size, everything)
    trainable = torch.ones_like(rewards, dtype=torch.bool) if trainable is None else trainable
    return RowBatch(credit, rewards, trainable, group_size, seed)


def scored_batch(seed):
    """Rewards 0, 0.5, 1; some rows without tokens, one prompt with two that have any, one with none."""
    generator = torch.Generator().manual_seed(seed)
    rewards = torch.randint(0, 3, (ROWS,), generator=generator) / 2
    trainable = torch.rand(ROWS, generator=generator) > 0.2
    trainable[2 * GROUP : 3 * GROUP] = False
    trainable[[2 * GROUP + 1, 2 * GROUP + 6]] = True
    trainable[4 * GROUP : 5 * GROUP] = False
    return row_batch(rewards, trainable=trainable, seed=seed)


def tokens_of_rows(seed, rows=7, width=11):
    """Advantages, entropies and mask; garbage where the mask is 0, one row without tokens."""
    generator = torch.Generator().manual_seed(seed)
    mask = torch.rand(rows, width, generator=generator) > 0.35
    mask[3] = False
    entropies = torch.rand(rows, width, generator=generator)
    return torch.randn(rows, generator=generator), torch.where(mask, entropies, torch.nan), mask


# ---------------------------------------------------------------------- every method: rows


@cases
@pytest.mark.parametrize("share", [0.125, 0.25, 0.5, 0.8, 1.0])
def test_rows_exact_number_ascending_trainable_and_repeatable(name, scope, share):
    method = build(name, share, scope=scope)
    for seed in range(4):
        batch = scored_batch(seed)
        n_keep, _ = method.at(0, 100, ROWS, GROUP)
        assert n_keep == math.floor(share * (ROWS if scope == "batch" else GROUP) + 0.5)
        state = torch.get_rng_state()
        kept = method.rows(batch, n_keep)
        assert torch.equal(torch.get_rng_state(), state), "the sampler's random numbers must not move"
        assert kept.dtype == torch.long and (kept[1:] > kept[:-1]).all()
        assert batch.trainable[kept].all()
        available = torch.bincount(batch.groups[batch.trainable], minlength=PROMPTS)
        assert available[2] == 2 and available[4] == 0
        if scope == "batch":
            assert kept.numel() == min(n_keep, int(batch.trainable.sum()))
        else:
            expected = available.clamp(max=n_keep)
            assert torch.bincount(batch.groups[kept], minlength=PROMPTS).tolist() == expected.tolist()
        assert torch.equal(kept, method.rows(batch, n_keep))


@cases
def test_share_one_keeps_every_row_that_can_train(name, scope):
    method = build(name, 1.0, scope=scope)
    batch = scored_batch(5)
    for step in (0, 50, 100):
        n_keep, share = method.at(step, 100, ROWS, GROUP)
        assert n_keep == (ROWS if scope == "batch" else GROUP) and share == 1.0
        assert torch.equal(method.rows(batch, n_keep), batch.trainable.nonzero()[:, 0])
    assert not method.selects_tokens
    assert method.credit(batch, method.rows(batch, n_keep)) is None, "nothing dropped: the credit is the baseline's"


@cases
def test_no_row_to_train_on_gives_no_rows(name, scope):
    batch = row_batch(torch.rand(8), 4, torch.zeros(8, dtype=torch.bool))
    kept = build(name, 0.5, scope=scope).rows(batch, 2)
    assert kept.shape == (0,) and kept.dtype == torch.long


# ---------------------------------------------------------------------- every method: tokens


@names
@pytest.mark.parametrize("share", [0.01, 0.2, 0.5, 0.7, 1.0])
@pytest.mark.parametrize("per_row", [False, True])
def test_tokens_exact_number_in_their_pool(name, share, per_row):
    method = build(name, 0.5, share)
    n_keep, given = method.at(0, 100, ROWS, GROUP)
    assert given == (share if method.selects_tokens else 1.0)
    for seed in range(4):
        advantages, entropies, mask = tokens_of_rows(seed)
        answer = entropies if method.reads_entropy else None
        kept = method.tokens(advantages, answer, mask, given, per_row, seed)
        assert kept.dtype == torch.bool and kept.shape == mask.shape and not (kept & ~mask).any()
        valid = mask.sum(1).tolist()
        if per_row:
            assert kept.sum(1).tolist() == [keep_count(n, given) for n in valid]
        else:
            assert int(kept.sum()) == keep_count(sum(valid), given)
        assert torch.equal(kept, method.tokens(advantages, answer, mask.long(), given, per_row, seed))
        if given == 1.0:
            assert torch.equal(kept, mask)


def test_keep_count_rounds_up_but_not_the_error_of_a_product():
    found = [keep_count(n, share) for n, share in ((12, 0.4), (10, 0.3), (100, 0.07), (10, 0.31), (7, 0.01), (9, 1.0))]
    assert found == [5, 3, 7, 4, 1, 9], "100 * 0.07 is 7.000000000000001 in floating point"
    assert keep_count(0, 0.5) == keep_count(10, 0.0) == 0


@names
@pytest.mark.parametrize("per_row", [False, True])
def test_without_valid_tokens_none_is_kept(name, per_row):
    method = build(name, 0.5, 0.5)
    nothing = torch.zeros(2, 3)
    assert not method.tokens(torch.ones(2), nothing, nothing, 0.5, per_row, 0).any()


def test_d3s_tokens_rank_by_advantage_times_entropy_in_the_batch_and_by_entropy_in_a_row():
    advantages = torch.tensor([2.0, -0.5])
    entropies = torch.tensor([[0.3, 0.2, 0.1, 0.4], [1.0, 0.9, 0.3, 0.1]])
    every = torch.ones(2, 4, dtype=torch.bool)
    batch = D3S().tokens(advantages, entropies, every, 0.375, False, 0)  # |A| H: 0.6 0.4 0.2 0.8 | 0.5 0.45 0.15 0.05
    assert batch.nonzero().tolist() == [[0, 0], [0, 3], [1, 0]]
    row = D3S().tokens(advantages, entropies, every, 0.5, True, 0)
    assert row.nonzero().tolist() == [[0, 0], [0, 3], [1, 0], [1, 1]]
    per_token = torch.tensor([[0.0, 0, 0, 0], [0, 0, 5.0, -9.0]])
    assert D3S().tokens(per_token, entropies, every, 0.25, False, 0).nonzero().tolist() == [[1, 2], [1, 3]]


# ---------------------------------------------------------------------- D3S


def test_d3s_worked_example_end_to_end():
    rewards = torch.tensor([0.9, 0.1, 0.2, 0.0, 1, 1, 1, 0.4, 0.5, 0.5, 0.5, 0.5], dtype=torch.float64)
    batch = row_batch(rewards, 4)
    printed = [1.469334, -0.489778, -0.244889, -0.734667, 0.499833, 0.499833, 0.499833, -1.4995, 0, 0, 0, 0]
    assert batch.credit.tolist() == pytest.approx(printed, abs=1e-6)
    method = D3S(rows_start=1 / 3, rows_end=1.0, tokens_start=0.4, tokens_end=1.0)
    n_keep, share = method.at(0, 100, 12, 4)
    assert (n_keep, share) == (4, 0.4)
    kept = method.rows(batch, n_keep)
    assert kept.tolist() == [0, 3, 6, 7]
    assert method.credit(batch, kept) is None
    entropies = torch.full((12, 4), torch.nan, dtype=torch.float64)
    written = {0: [0.1, 1.2, 0.4], 3: [0.9, 0.05, 0.3, 0.2], 6: [0.5, 0.5, 0.5], 7: [2.0, 0.3]}
    for row, values in written.items():
        entropies[row, : len(values)] = torch.tensor(values, dtype=torch.float64)
    mask = ~entropies.isnan()
    tokens = method.tokens(batch.credit[kept], entropies[kept], mask[kept], share, False, 0)
    chosen = {(int(kept[row]), column) for row, column in tokens.nonzero().tolist()}
    assert chosen == {(7, 0), (0, 1), (3, 0), (0, 2), (7, 1)}
    loss = -(batch.credit[kept][:, None] * tokens).sum()  # on-policy: every ratio is 1
    # the two printed losses are rounded: 0.15899989 and 0.06624995 in full
    assert (loss / tokens.sum()).item() == pytest.approx(0.1590000, abs=2e-7)
    assert (loss / mask[kept].sum()).item() == pytest.approx(0.0662500, abs=1e-7)


def test_d3s_batch_scope_maximises_variance_over_the_rows_that_can_train():
    generator = torch.Generator().manual_seed(0)
    for seed in range(5):
        rewards = torch.rand(12, generator=generator, dtype=torch.float64)
        trainable = torch.arange(12) % 4 != seed % 4
        batch = row_batch(rewards, 4, trainable, seed)
        kept = D3S(scope="batch").rows(batch, 4)
        sets = itertools.combinations(trainable.nonzero()[:, 0].tolist(), 4)
        best = max(batch.credit[list(rows)].var().item() for rows in sets)
        assert batch.credit[kept].var().item() == pytest.approx(best, abs=1e-12)


def test_d3s_drop_zero_keeps_only_rows_with_signal_even_at_share_one():
    batch = row_batch([1.0, 0, 0, 0, 1, 1, 1, 1, 0, 1, 0, 1], 4)
    assert D3S(drop_zero=True).drops_zero and not D3S().drops_zero
    assert D3S(drop_zero=True).rows(batch, 12).tolist() == [0, 1, 2, 3, 8, 9, 10, 11]
    assert D3S(drop_zero=True, scope="group").rows(batch, 4).tolist() == [0, 1, 2, 3, 8, 9, 10, 11]
    assert D3S().rows(batch, 12).numel() == 12
    assert D3S().rows(batch, 8).tolist() == [0, 1, 2, 3, 8, 9, 10, 11], "rows without signal leave first"


# ---------------------------------------------------------------------- PODS


@pytest.mark.parametrize("keep", [0.25, 0.5, 0.75])
def test_pods_is_d3s_group_scope_renormalised(keep):
    for seed in range(4):
        generator = torch.Generator().manual_seed(seed)
        batch = row_batch(torch.rand(ROWS, generator=generator), seed=seed)
        pods = PODS(keep=keep)
        n_keep, share = pods.at(0, 100, ROWS, GROUP)
        assert (n_keep, share) == (int(keep * GROUP), 1.0) == pods.at(70, 100, ROWS, GROUP)
        kept = pods.rows(batch, n_keep)
        assert torch.equal(kept, D3S(scope="group").rows(batch, n_keep))
        credit = pods.credit(batch, kept)
        rewards = batch.rewards.double()[kept].view(PROMPTS, n_keep)
        expected = torch.zeros(ROWS, dtype=torch.float64)
        expected[kept] = ((rewards - rewards.mean(1, True)) / (rewards.std(1, keepdim=True) + 1e-4)).flatten()
        assert torch.allclose(credit, expected, atol=1e-12)
        assert credit[kept].view(PROMPTS, n_keep).sum(1).abs().max() < 1e-12


def test_pods_chooses_the_largest_reward_variance_of_each_group():
    generator = torch.Generator().manual_seed(3)
    rewards = torch.randint(0, 4, (16,), generator=generator).double()
    kept = PODS(keep=0.375).rows(row_batch(rewards, 8), 3)
    for group in range(2):
        own = kept[kept // 8 == group]
        sets = itertools.combinations(range(8 * group, 8 * group + 8), 3)
        best = max(rewards[list(rows)].var().item() for rows in sets)
        assert rewards[own].var().item() == pytest.approx(best, abs=1e-12)


def test_renormalised_whole_groups_are_grpo_advantages():
    rewards = torch.rand(ROWS, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    everything = torch.arange(ROWS)
    grouped = rewards.view(PROMPTS, GROUP)
    grpo = ((grouped - grouped.mean(1, keepdim=True)) / (grouped.std(1, keepdim=True) + 1e-4)).flatten()
    assert torch.allclose(renormalized(rewards, everything // GROUP, everything), grpo, atol=1e-12)
    lone = renormalized(torch.tensor([1.0] + [0.0] * 7), torch.zeros(8, dtype=torch.long), torch.arange(8))
    assert lone.tolist() == pytest.approx([2.474] + [-0.353] * 7, abs=1e-3)
    assert PODS(keep=1.0).credit(row_batch(rewards), everything) is None, "keep=1 leaves the baseline's own credit"


@pytest.mark.parametrize("successes", range(9))
def test_pods_binary_rewards_keep_half_of_each_kind_where_there_are_enough(successes):
    order = torch.randperm(8, generator=torch.Generator().manual_seed(successes))
    rewards = (torch.arange(8) < successes).float()[order]
    batch = row_batch(rewards)
    kept = PODS(keep=0.5).rows(batch, 4)
    failures = 8 - successes
    expected = successes if successes < 2 else 4 - failures if failures < 2 else 2
    assert kept.numel() == 4 and int(rewards[kept].sum()) == expected
    credit = PODS(keep=0.5).credit(batch, kept)
    if successes in (0, 8):
        assert credit.tolist() == [0.0] * 8
    else:
        assert (credit[kept].sign() == 2 * rewards[kept] - 1).all()
    if successes == 4:
        assert credit[kept].abs().tolist() == pytest.approx([0.5 / (math.sqrt(1 / 3) + 1e-4)] * 4)


@pytest.mark.parametrize("value", [0.1, 0.7, 1 / 3, -0.2, 0.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_equal_rewards_give_exactly_zero(value, dtype):
    for size in (3, 6, 7, 10):  # where the mean of equal numbers need not be that number
        rewards = torch.full((2 * size,), value, dtype=dtype)
        rewards[0] += 1  # the first group is alive
        everything = torch.arange(2 * size)
        credit = renormalized(rewards, everything // size, everything)
        assert credit[:size].abs().min() > 0 and credit[size:].tolist() == [0.0] * size
    one = renormalized(torch.tensor([0.3, 0.9]), torch.tensor([0, 1]), torch.tensor([0, 1]))
    assert one.tolist() == [0.0, 0.0], "a group of one has no spread"


def test_pods_never_keeps_a_row_without_score():
    rewards = torch.tensor([torch.nan, 1, 0, torch.nan, 1, 0, 0.5, 0.5, *[torch.nan] * 8, *[1, 0] * 4])
    batch = RowBatch(torch.zeros(24).double(), rewards, torch.ones(24, dtype=torch.bool), 8)
    for keep in (0.25, 0.5, 1.0):
        method = PODS(keep=keep)
        n_keep, _ = method.at(0, 1, 24, 8)
        kept = method.rows(batch, n_keep)
        assert rewards[kept].isfinite().all()
        assert torch.bincount(kept // 8, minlength=3).tolist() == [min(n_keep, 6), 0, n_keep]
        credit = method.credit(batch, kept)
        if keep < 1:
            assert credit.isfinite().all() and (credit[rewards.isnan()] == 0).all() and (credit[kept] != 0).any()


def test_pods_without_renormalisation_has_no_new_credit():
    batch = scored_batch(0)
    plain = PODS(keep=0.5, renormalize=False)
    kept = plain.rows(batch, 4)
    assert not plain.recredits and plain.credit(batch, kept) is None
    assert torch.equal(kept, PODS(keep=0.5).rows(batch, 4))
    assert PODS(keep=0.5).recredits and PODS(keep=0.5).credit(batch, kept) is not None


# ---------------------------------------------------------------------- random


@pytest.mark.parametrize("scope", ["batch", "group"])
@pytest.mark.parametrize("shape", ["linear", "cosine", "step"])
def test_random_keeps_the_numbers_of_d3s(scope, shape):
    options = {"rows_start": 0.2, "rows_end": 0.9, "tokens_start": 0.1, "tokens_end": 0.8, "over": 0.7}
    d3s, blind = (method(**options, scope=scope, shape=shape) for method in (D3S, RandomSelection))
    for step in (0, 3, 10, 35, 69, 70, 100):
        n_keep, share = d3s.at(step, 100, ROWS, GROUP)
        assert (n_keep, share) == blind.at(step, 100, ROWS, GROUP)
        batch = scored_batch(step)
        rows, drawn = d3s.rows(batch, n_keep), blind.rows(batch, n_keep)
        assert rows.numel() == drawn.numel()
        if scope == "group":
            assert torch.equal(batch.groups[rows], batch.groups[drawn])
        advantages, entropies, mask = tokens_of_rows(step)
        for per_row in (False, True):
            ranked = d3s.tokens(advantages, entropies, mask, share, per_row, step)
            drawn = blind.tokens(advantages, None, mask, share, per_row, step)
            assert ranked.sum() == drawn.sum()
            assert not per_row or torch.equal(ranked.sum(1), drawn.sum(1))


@pytest.mark.parametrize(("scope", "group_size", "n_keep", "sets"), [("batch", 3, 3, 20), ("group", 4, 2, 36)])
def test_random_rows_every_set_equally_likely(scope, group_size, n_keep, sets):
    """Six trainable rows, 3 of 6 or 2 of 4 twice. Chi-square: P(> 70 at 19, > 95 at 35 degrees of freedom) < 1e-6."""
    method = RandomSelection(scope=scope)
    trainable = torch.ones(8, dtype=torch.bool)
    if scope == "batch":
        trainable[[2, 5]] = False
    rows = torch.zeros(8)
    draws = 60 * sets
    seen: Counter[tuple[int, ...]] = Counter(
        tuple(method.rows(RowBatch(rows.double(), rows, trainable, group_size, seed), n_keep).tolist())
        for seed in range(draws)
    )
    assert len(seen) == sets
    statistic = sum((count - 60) ** 2 / 60 for count in seen.values())
    assert statistic < {20: 70, 36: 95}[sets]


@pytest.mark.parametrize("per_row", [False, True])
def test_random_tokens_equally_likely_also_given_the_rows(per_row):
    """Rows and tokens are drawn with one seed, as in training; z of every kept token's frequency given its row."""
    method = RandomSelection(scope="batch")
    draws, width, share = 3000, 4, 0.25
    mask = torch.ones(4, width, dtype=torch.bool)
    kept_with, row_drawn = torch.zeros(8, width), torch.zeros(8)
    zeros = torch.zeros(8)
    for seed in range(draws):
        rows = method.rows(RowBatch(zeros.double(), zeros, torch.ones(8, dtype=torch.bool), 4, seed), 4)
        kept_with[rows] += method.tokens(torch.ones(4), None, mask, share, per_row, seed)
        row_drawn[rows] += 1
    deviation = (kept_with / row_drawn[:, None] - share) / (share * (1 - share) / row_drawn[:, None]).sqrt()
    assert deviation.abs().max() < 5


@pytest.mark.parametrize("scope", ["batch", "group"])
def test_random_depends_on_the_seed_alone(scope):
    method = RandomSelection(scope=scope)
    n_keep = 12 if scope == "batch" else 4
    generator = torch.Generator().manual_seed(0)
    one, other = (row_batch(torch.rand(ROWS, generator=generator), seed=4) for _ in range(2))
    assert not torch.equal(one.credit, other.credit)
    assert torch.equal(method.rows(one, n_keep), method.rows(other, n_keep))
    many = {tuple(method.rows(row_batch(one.rewards, seed=seed), n_keep).tolist()) for seed in range(20)}
    assert len(many) == 20
    mask = torch.ones(4, 30)
    advantages = torch.randn(4, generator=generator)
    for per_row in (False, True):
        drawn = method.tokens(advantages, None, mask, 0.3, per_row, 4)
        entropies = torch.rand(4, 30, generator=generator)
        for others in (torch.randn(4, generator=generator), torch.randn(4, 30, generator=generator), torch.zeros(4)):
            assert torch.equal(drawn, method.tokens(others, entropies, mask, 0.3, per_row, 4))
        assert not torch.equal(drawn, method.tokens(advantages, None, mask, 0.3, per_row, 5))


# ---------------------------------------------------------------------- cuts


def test_ramp_over_a_share_of_training_and_over_whole_steps():
    cuts = Cuts(rows_start=0.25, rows_end=1.0, tokens_start=0.2, tokens_end=1.0)
    for step, rows, share in ((0, 12, 0.2), (25, 21, 0.4), (50, 30, 0.6), (100, 48, 1.0), (170, 48, 1.0)):
        assert cuts.at(step, 100, ROWS, GROUP) == (rows, pytest.approx(share))
    half = Cuts(over=0.5)
    assert [half.at(step, 100, ROWS, GROUP)[0] for step in (0, 25, 50, 100)] == [12, 30, 48, 48]
    steps = Cuts(over=20)
    for total in (10, 1000):
        assert [steps.at(step, total, ROWS, GROUP)[0] for step in (0, 10, 20, 21)] == [12, 30, 48, 48]
    group = Cuts(scope="group")
    assert [group.at(step, 100, ROWS, GROUP)[0] for step in (0, 50, 100)] == [2, 5, 8]
    assert Cuts(over=0.001).at(1, 10, ROWS, GROUP) == (ROWS, 1.0), "a ramp of less than a step is over after one"


@pytest.mark.parametrize(
    ("shape", "quarter", "middle", "late"),
    [
        ("linear", 0.25, 0.5, 0.99),
        ("cosine", (1 - math.sqrt(0.5)) / 2, 0.5, (1 - math.cos(0.99 * math.pi)) / 2),
        ("step", 0, 0, 0),
    ],
)
def test_shapes_of_the_ramp(shape, quarter, middle, late):
    cuts = Cuts(rows_start=0.1, rows_end=0.9, tokens_start=0.2, tokens_end=0.8, shape=shape)
    for step, f in ((0, 0), (25, quarter), (50, middle), (99, late), (100, 1), (1000, 1)):
        rows, share = cuts.at(step, 100, 1000, GROUP)
        assert share == pytest.approx(0.2 + 0.6 * f, abs=1e-12)
        assert abs(rows - (100 + 800 * f)) <= 0.5 + 1e-9
    for start, end in ((0.1, 0.9), (0.9, 0.1)):
        moving = Cuts(rows_start=start, rows_end=end, tokens_start=start, tokens_end=end, shape=shape)
        values = [moving.at(step, 100, ROWS, GROUP) for step in range(101)]
        for column in zip(*values, strict=True):
            assert list(column) == sorted(column, reverse=start > end)
        assert values[0] == (math.floor(start * ROWS + 0.5), start)
        assert values[-1] == (math.floor(end * ROWS + 0.5), end)


@cases
def test_at_least_one_row_at_any_time(name, scope):
    method = build(name, 0.001, scope=scope)
    assert [method.at(step, 10, ROWS, GROUP)[0] for step in (0, 5, 10)] == [1, 1, 1]
    assert method.rows(row_batch(torch.rand(ROWS)), 1).numel() == (1 if scope == "batch" else PROMPTS)


def test_equal_start_and_end_never_move():
    cuts = Cuts(rows_start=0.25, rows_end=0.25, tokens_start=0.7, tokens_end=0.7, scope="group")
    assert {cuts.at(step, 50, 60, 6) for step in range(51)} == {(2, 0.7)}


def test_one_row_comes_from_the_high_end():
    for values in ([0.0, 0.1, 0.3, 0.7], [0.3, 0.1, 0.7, 0.05]):
        tensor = torch.tensor(values, dtype=torch.float64)
        assert max_variance_subset(tensor, 1).tolist() == [int(tensor.argmax())]


SCHEDULED = [method for method in SELECTION.values() if issubclass(method, Cuts)]
REFUSED = [
    *[
        ({name: value}, (f"selection.{name}={value}", "(0, 1]"))
        for name in ("rows_start", "rows_end", "tokens_start", "tokens_end")
        for value in (0, -0.1, 1.01, 16, math.nan)
    ],
    *[
        ({"over": value}, (f"selection.over={value}", "(0, 1]", "whole number of optimizer steps"))
        for value in (0, -1, 1.5, math.nan, math.inf)
    ],
    ({"shape": "exp"}, ("selection.shape='exp'", "linear, cosine, step")),
    ({"scope": "prompt"}, ("selection.scope='prompt'", "batch, group")),
    ({"token_scope": "group"}, ("selection.token_scope='group'", "auto, batch, micro, sample")),
    ({"entropy_from": "new"}, ("selection.entropy_from='new'", "auto, old, micro")),
    ({"loss_norm": "mean"}, ("selection.loss_norm='mean'", "kept, selected, full")),
    (
        {"entropy_from": "micro", "token_scope": "batch"},
        ("entropy_from='micro'", "token_scope='batch'", "'micro' or 'sample'", "entropy_from='old'"),
    ),
    (
        {"entropy_from": "old", "token_scope": "micro"},
        ("entropy_from='old'", "token_scope='micro'", "'batch' or 'sample'"),
    ),
]


@pytest.mark.parametrize("method", SCHEDULED)
@pytest.mark.parametrize(("options", "words"), REFUSED, ids=[str(options) for options, _ in REFUSED])
def test_refusals_name_the_value_and_what_is_allowed(method, options, words):
    with pytest.raises(ValueError) as caught:
        method(**options)
    assert all(word in str(caught.value) for word in words), str(caught.value)


@pytest.mark.parametrize("method", SCHEDULED)
def test_pools_that_fit_their_source_are_accepted(method):
    for source, pools in {
        "auto": "auto batch micro sample",
        "old": "auto batch sample",
        "micro": "auto micro sample",
    }.items():
        for pool in pools.split():
            assert method(entropy_from=source, token_scope=pool).token_scope == pool


@pytest.mark.parametrize(
    ("build_it", "words"),
    [
        (lambda: PODS(keep=0), ("selection.keep=0", "(0, 1]")),
        (lambda: PODS(keep=16), ("selection.keep=16", "(0, 1]")),
        (lambda: PODS(loss_norm="mean"), ("selection.loss_norm='mean'", "kept, selected, full")),
        (lambda: D3SSchedule(-1, 4, 0.1, 1, 10), ("n_init=-1", ">= 0")),
        (lambda: D3SSchedule(4, 4, 0.1, 1.5, 10), ("k_final=1.5", "(0, 1]")),
        (lambda: D3SSchedule(4, 4, 0.1, 1, 10, "exp"), ("shape='exp'", "linear, cosine, step")),
    ],
)
def test_refusals_of_pods_and_of_the_schedule(build_it, words):
    with pytest.raises(ValueError) as caught:
        build_it()
    assert all(word in str(caught.value) for word in words), str(caught.value)


# ---------------------------------------------------------------------- repacking


def random_lengths(n, seed):
    """Distinct, so that the order by length is unique."""
    return (100 + torch.randperm(1900, generator=torch.Generator().manual_seed(seed))[:n]).tolist()


def rows_of(window):
    return [row for rank in window for slot in rank for row in slot]


SHAPES = [  # rows, windows, ranks, slots, rows per slot
    (0, 2, 2, 2, 2),
    (1, 1, 1, 1, 1),
    (1, 2, 3, 2, 2),
    (2, 1, 4, 2, 2),
    (3, 2, 4, 2, 2),
    (5, 4, 1, 2, 1),
    (16, 2, 2, 2, 2),
    (13, 2, 2, 2, 2),
    (37, 4, 3, 4, 2),
    (48, 4, 2, 3, 2),
    (60, 3, 2, 8, 3),
    (61, 3, 2, 8, 3),
    (144, 3, 2, 8, 3),
]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("seed", [0, 1])
def test_packing_invariants(shape, seed):
    n, windows, ranks, slots, rows_per_slot = shape
    lengths = random_lengths(n, seed)
    state = torch.get_rng_state()
    packed = pack_rows(lengths, windows, ranks, slots, rows_per_slot, seed)
    assert torch.equal(torch.get_rng_state(), state)
    assert packed == pack_rows(lengths, windows, ranks, slots, rows_per_slot, seed)
    assert len(packed) == windows and all(len(window) == ranks for window in packed)
    assert all(len(rank) == slots for window in packed for rank in window)
    assert sorted(row for window in packed for row in rows_of(window)) == list(range(n)), "every row exactly once"
    sizes = [len(rows_of(window)) for window in packed]
    assert sum(sizes) == n and max(sizes) - min(sizes) <= 1
    for window, size in zip(packed, sizes, strict=True):
        per_rank = [sum(map(len, rank)) for rank in window]
        assert max(per_rank) - min(per_rank) <= 1
        used = math.ceil(max(per_rank) / rows_per_slot)
        assert used_slots(window) == used == math.ceil(math.ceil(size / ranks) / rows_per_slot), "as few as it needs"
        for rank, count in zip(window, per_rank, strict=True):
            filled = [len(slot) for slot in rank]
            assert not any(filled[: slots - used]), "unused slots come first, in the same number on every rank"
            assert max(filled) <= rows_per_slot
            tail = filled[slots - used :]
            assert not tail or max(tail) - min(tail) <= 1
            assert count == 0 or filled[-1] > 0, "a rank with rows has one in the slot that exchanges gradients"
        for slot in range(slots - used, slots):
            assert any(rank[slot] for rank in window), "no rank has a row in a slot that is used"


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_slots_hold_neighbours_in_length(shape):
    """In a window sorted by length and cut into blocks of one row per rank, a slot is some blocks in a row."""
    n, windows, ranks, slots, rows_per_slot = shape
    lengths = random_lengths(n, 7)
    for window in pack_rows(lengths, windows, ranks, slots, rows_per_slot, 7):
        order = sorted(rows_of(window), key=lambda row: -lengths[row])
        block = {row: position // ranks for position, row in enumerate(order)}
        blocks = [[sorted(block[row] for row in slot) for slot in rank] for rank in window]
        for rank in blocks:
            flat = [b for slot in rank for b in slot]
            assert flat == list(range(len(flat))), "one row of every block, the longest first"
        if len(order) % ranks == 0:
            assert all(rank == blocks[0] for rank in blocks), "ranks wait for no longer row in the same slot"


def test_ranks_of_a_window_get_equal_totals():
    window = pack_rows([8, 7, 6, 5, 4, 3, 2, 1], 1, 2, 4, 1, 0)[0]
    assert window == [[[0], [3], [4], [7]], [[1], [2], [5], [6]]]
    window = pack_rows([8, 7, 6, 5, 4], 1, 2, 4, 2, 0)[0]
    assert window == [[[], [], [0], [3, 4]], [[], [], [1], [2]]]


@pytest.mark.parametrize("n", [512, 509])
def test_token_totals_of_windows_are_near_each_other(n):
    """Windows get one row of every block of neighbours, so the gaps add up to the range of the lengths at most, plus
    one row where the last block is short. Sums over an unsorted split are off by several times that."""
    windows, unsorted = 4, []
    for seed in range(10):
        lengths = random_lengths(n, seed)
        packed = pack_rows(lengths, windows, 2, 16, 8, seed)
        totals = [sum(lengths[row] for row in rows_of(window)) for window in packed]
        bound = max(lengths) - (min(lengths) if n % windows == 0 else 0)
        assert max(totals) - min(totals) <= bound
        chunks = [sum(lengths[start : start + n // windows]) for start in range(0, n - n % windows, n // windows)]
        unsorted.append((max(chunks) - min(chunks)) / bound)
    assert sorted(unsorted)[len(unsorted) // 2] > 3, "the bound tells a sorted split from an unsorted one"


def test_no_window_always_gets_the_longest_row():
    lengths = random_lengths(16, 0)
    longest = lengths.index(max(lengths))
    where: Counter[int] = Counter()
    for seed in range(400):
        packed = pack_rows(lengths, 4, 2, 2, 1, seed)
        where.update(number for number, window in enumerate(packed) if longest in rows_of(window))
    assert all(60 < where[number] < 140 for number in range(4)), where  # 100 expected, standard deviation 8.7


def test_rows_of_equal_length_are_spread_at_random():
    first = Counter(pack_rows([5] * 8, 1, 1, 4, 2, seed)[0][0][0][0] for seed in range(400))
    assert all(20 < first[row] < 85 for row in range(8)), first  # 50 expected, standard deviation 6.6


def test_too_many_rows_are_refused_and_a_full_rollout_fits():
    assert sum(len(rows_of(window)) for window in pack_rows([3] * 24, 2, 3, 2, 2, 0)) == 24
    with pytest.raises(ValueError, match="25 rows do not fit into 2 windows of 3 x 2 x 2"):
        pack_rows([3] * 25, 2, 3, 2, 2, 0)
