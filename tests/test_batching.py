"""Grouping, packing and unpacking as pure functions: worked numbers, and what holds for every set of lengths."""

import itertools
import random

import pytest
import torch

from rltok.batching import (
    BatchingConfig,
    pack_rows,
    pack_tokens,
    packed_positions,
    packed_width,
    plan_micro_batches,
    unpack,
)
from rltok.config import ConfigError, build

LENGTHS = [5, 9, 3, 7, 2, 8]


def cost(group, lengths, heads=None):
    """Tokens of a micro-batch with its padding."""
    heads = heads or [0] * len(lengths)
    return len(group) * (max(heads[i] for i in group) + max(lengths[i] - heads[i] for i in group))


def random_cases(count=60, seed=0):
    rng = random.Random(seed)
    for _ in range(count):
        lengths = [max(1, int(rng.lognormvariate(3, 0.8))) for _ in range(rng.randint(1, 24))]
        heads = [rng.randint(0, length) for length in lengths]
        yield lengths, heads, rng.randint(1, len(lengths)), rng.randint(1, 200)


def all_groupings(order, parts):
    for cuts in itertools.combinations(range(1, len(order)), parts - 1):
        edges = [0, *cuts, len(order)]
        yield [order[a:b] for a, b in itertools.pairwise(edges)]


def test_worked_numbers():
    rows = pack_rows(LENGTHS, 12)
    assert rows == [[1, 2], [5, 4], [3, 0]]
    assert [sum(LENGTHS[i] for i in row) for row in rows] == [12, 10, 12]
    assert packed_width(rows, LENGTHS) * 3 - sum(LENGTHS) == 2, "padding"
    assert plan_micro_batches(LENGTHS, max_tokens=16) == [[1], [5, 3], [0, 2, 4]]
    assert plan_micro_batches(LENGTHS) == [[0, 1, 2, 3, 4, 5]]
    # equal cuts of 9 8 7 | 5 3 2 cost 27 + 15; no other cut with a dearest group of at most 27 costs less
    assert plan_micro_batches(LENGTHS, n_slices=2) == [[1, 5, 3], [0, 2, 4]]
    # equal cuts 9 8 | 7 5 | 3 2 cost 18 + 14 + 6 = 38, and 9 | 8 7 | 5 3 2 costs 9 + 16 + 15 = 40
    assert plan_micro_batches(LENGTHS, n_slices=3) == [[1, 5], [3, 0], [2, 4]]
    # a budget that three groups keep; with four there is less padding: 9 | 8 7 | 5 | 3 2
    assert plan_micro_batches(LENGTHS, n_slices=4, max_tokens=16) == [[1], [5, 3], [0], [2, 4]]
    # packed, the sums of lengths count: 9 + 2, 8 + 3, 7 + 5
    groups = plan_micro_batches(LENGTHS, n_slices=3, padded=False)
    assert sorted(sum(LENGTHS[i] for i in group) for group in groups) == [11, 11, 12]


def test_every_sample_once_and_budgets_kept():
    for lengths, heads, n_slices, budget in random_cases():
        for wanted, limit, padded in itertools.product((n_slices, None), (budget, None), (True, False)):
            groups = plan_micro_batches(lengths, wanted, limit, heads=heads, padded=padded)
            assert sorted(sum(groups, [])) == list(range(len(lengths)))
            assert all(groups), "no group is empty"
            if wanted is not None:
                assert len(groups) == wanted if limit is None else len(groups) >= wanted
            for group in groups if limit is not None else ():
                tokens = cost(group, lengths, heads) if padded else sum(lengths[i] for i in group)
                assert tokens <= limit or len(group) == 1


def test_never_worse_than_equal_cuts():
    for lengths, _, n_slices, _ in random_cases(seed=1):
        order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
        cuts = [len(order) * k // n_slices for k in range(n_slices + 1)]
        equal = [cost(order[a:b], lengths) for a, b in itertools.pairwise(cuts)]
        ours = [cost(group, lengths) for group in plan_micro_batches(lengths, n_slices)]
        assert sum(ours) <= sum(equal) and max(ours) <= max(equal)


def test_the_sum_is_the_least_within_the_limit():
    rng = random.Random(2)
    for _ in range(20):
        lengths = [rng.randint(1, 40) for _ in range(rng.randint(2, 9))]
        n_slices = rng.randint(1, len(lengths))
        order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
        cuts = [len(order) * k // n_slices for k in range(n_slices + 1)]
        limit = max(cost(order[a:b], lengths) for a, b in itertools.pairwise(cuts))
        every = ([cost(g, lengths) for g in groups] for groups in all_groupings(order, n_slices))
        least = min(sum(costs) for costs in every if max(costs) <= limit)
        assert sum(cost(g, lengths) for g in plan_micro_batches(lengths, n_slices)) == least


def test_grouping_saves_padding_on_log_normal_lengths():
    rng = random.Random(3)
    lengths = [max(1, int(rng.lognormvariate(5, 0.8))) for _ in range(64)]
    equal = len(lengths) * max(lengths)
    ours = sum(cost(group, lengths) for group in plan_micro_batches(lengths, 8))
    assert ours < 0.5 * equal and ours < 1.35 * sum(lengths)


@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
def test_ranks_agree_on_the_number_of_micro_batches(ranks):
    """Each rank plans its own rows; with the largest number of any rank all make the same number within the budget."""
    for lengths, *_ in random_cases(20, seed=ranks):
        local = [[n + 7 * rank for n in lengths] for rank in range(ranks)]
        for padded in (True, False):
            wanted = max(len(plan_micro_batches(mine, 1, 60, padded=padded)) for mine in local)
            plans = [plan_micro_batches(mine, wanted, 60, padded=padded) for mine in local]
            assert {len(plan) for plan in plans} == {wanted}


def test_packed_groups_are_level():
    for lengths, _, n_slices, _ in random_cases(seed=4):
        sums = [sum(lengths[i] for i in g) for g in plan_micro_batches(lengths, n_slices, padded=False)]
        assert max(sums) <= max(max(lengths), sum(lengths) / n_slices) * 4 / 3 + 1


def test_rows_are_full_and_no_sample_is_dropped():
    for lengths, _, _, limit in random_cases(seed=5):
        rows = pack_rows(lengths, limit)
        assert sorted(sum(rows, [])) == list(range(len(lengths)))
        sums = [sum(lengths[i] for i in row) for row in rows]
        assert all(total <= limit or len(row) == 1 for total, row in zip(sums, rows, strict=True))
        half_empty = [total for total in sums if total <= limit / 2]
        assert len(half_empty) <= 1, "two rows that fit into one"


def test_packing_and_unpacking_are_inverse():
    for lengths, _, _, limit in random_cases(20, seed=6):
        tokens = torch.arange(1, len(lengths) * max(lengths) + 1).view(len(lengths), -1)
        rows = pack_rows(lengths, limit)
        packed = pack_tokens(tokens, rows, lengths, fill=-1)
        assert int((packed >= 0).sum()) == sum(lengths)
        there = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
        assert torch.equal(unpack(packed, rows, lengths), tokens * there)
        positions = packed_positions(rows, lengths)
        assert torch.equal(unpack(positions, rows, lengths), torch.arange(max(lengths)) * there)
        assert int((positions == 0).sum()) >= len(lengths), "each sample begins at 0"


def test_one_packed_row_by_hand():
    rows, lengths = [[1, 0], [2]], [2, 3, 1]
    tokens = torch.tensor([[11, 12, 0], [21, 22, 23], [31, 0, 0]])
    assert pack_tokens(tokens, rows, lengths, fill=9).tolist() == [[21, 22, 23, 11, 12], [31, 9, 9, 9, 9]]
    assert packed_positions(rows, lengths).tolist() == [[0, 1, 2, 0, 1], [0, 0, 1, 2, 3]]
    assert packed_positions(rows, lengths, width=6)[0].tolist() == [0, 1, 2, 0, 1, 0]
    values = torch.arange(10.0).view(2, 5).requires_grad_()
    back = unpack(values, rows, lengths)
    assert back.tolist() == [[3, 4, 0], [0, 1, 2], [5, 0, 0]]
    back.sum().backward()
    assert values.grad.tolist() == [[1, 1, 1, 1, 1], [1, 0, 0, 0, 0]]


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: plan_micro_batches([3, 4], n_slices=3), "n_slices=3 for 2 lengths"),
        (lambda: plan_micro_batches([3, 4], n_slices=0), "n_slices=0"),
        (lambda: plan_micro_batches([3, 4], max_tokens=0), "max_tokens=0"),
        (lambda: plan_micro_batches([3, -4], max_tokens=5), r"lengths\[1\]=-4"),
        (lambda: plan_micro_batches([3, 4], 2, heads=[1]), "heads has 1 entries but lengths has 2"),
        (lambda: plan_micro_batches([3, 4], 2, heads=[1, 5]), r"heads\[1\]=5"),
        (lambda: pack_rows([3], 0), "max_tokens=0"),
        (lambda: pack_rows([-3], 4), r"lengths\[0\]=-3"),
        (lambda: unpack(torch.zeros(1, 4), [[0]], [2, 2]), "each of the 2 samples"),
        (lambda: unpack(torch.zeros(1, 3), [[0, 1]], [2, 2]), "4 tokens, more than width=3"),
    ],
)
def test_errors_name_the_argument(call, words):
    with pytest.raises(ValueError, match=words):
        call()


def test_no_samples():
    assert plan_micro_batches([]) == [] and pack_rows([], 4) == []
    assert plan_micro_batches([], max_tokens=4) == []


def test_long_lists_are_planned_quickly():
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randn(512, generator=generator).mul(0.8).add(6).exp().long().tolist()
    groups = plan_micro_batches(lengths, 32)
    assert len(groups) == 32 and sorted(sum(groups, [])) == list(range(512))
    assert len(pack_rows(lengths * 20, 8192)) < 1.01 * sum(lengths) * 20 / 8192 + 1


@pytest.mark.parametrize(
    ("section", "path", "words"),
    [
        ({"balance": True, "max_tokens": 0}, "batching.max_tokens", "must be >= 1"),
        ({"pack": True, "multiple_of": 0}, "batching.multiple_of", "must be >= 1"),
        ({"max_tokens": 100}, "batching.max_tokens", "balance: true"),
        ({"multiple_of": 64}, "batching.multiple_of", "both are false"),
        ({"balance": True, "max_tokens": 32, "multiple_of": 64}, "batching.multiple_of", "max_tokens=32"),
        ({"balanced": True}, "batching.balanced", "did you mean 'balance'"),
    ],
)
def test_config_errors_name_the_setting(section, path, words):
    with pytest.raises(ConfigError, match=words) as caught:
        build(BatchingConfig, section, "batching")
    assert caught.value.path == path


def test_the_default_is_neutral():
    assert BatchingConfig().is_neutral
    assert not BatchingConfig(balance=True).is_neutral and not BatchingConfig(pack=True).is_neutral
