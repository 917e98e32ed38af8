"""Row and token selection against exhaustive search, the worked example, and their exact limits."""

import itertools

import pytest
import torch

from rltok.selection import D3SSchedule, keep_count, max_variance_subset, select_rollouts, select_tokens

REWARDS = torch.tensor([0.9, 0.1, 0.2, 0.0, 1, 1, 1, 0.4, 0.5, 0.5, 0.5, 0.5], dtype=torch.float64)
GROUPS = torch.arange(12) // 4
ADVANTAGES = torch.cat([(r - r.mean()) / (r.std() + 1e-4) for r in REWARDS.view(3, 4)])


def variance(values):
    return values.double().var(unbiased=False).item()


@pytest.mark.parametrize("kind", ["distinct", "tied", "constant", "two-valued"])
def test_equals_exhaustive_search(kind):
    generator = torch.Generator().manual_seed(0)
    for n in range(1, 13):
        if kind == "distinct":
            values = torch.randn(n, generator=generator, dtype=torch.float64)
        elif kind == "constant":
            values = torch.full((n,), 0.7, dtype=torch.float64)
        else:
            top = 3 if kind == "tied" else 2
            values = torch.randint(0, top, (n,), generator=generator).double()
        for k in range(1, n + 1):
            chosen = max_variance_subset(values, k)
            assert chosen.tolist() == sorted(set(chosen.tolist())) and len(chosen) == k
            best = max(variance(values[list(c)]) for c in itertools.combinations(range(n), k))
            assert variance(values[chosen]) == pytest.approx(best, abs=1e-12), (values, k)


def test_edges_shift_scale_and_order():
    values = torch.randn(20, generator=torch.Generator().manual_seed(1))
    assert max_variance_subset(values, 0).tolist() == []
    assert max_variance_subset(values, 20).tolist() == max_variance_subset(values, 99).tolist() == list(range(20))
    assert max_variance_subset(values[:0], 3).tolist() == []
    base = max_variance_subset(values, 7)
    assert torch.equal(max_variance_subset(3 * values + 5, 7), base)
    order = torch.randperm(20, generator=torch.Generator().manual_seed(2))
    assert set(order[max_variance_subset(values[order], 7)].tolist()) == set(base.tolist())
    assert max_variance_subset(1e6 + torch.arange(8.0), 4).tolist() == [0, 1, 6, 7]
    for bad, message in (((values, -1), "k=-1"), ((values[None], 2), "expected"), ((values / 0, 2), "NaN or inf")):
        with pytest.raises(ValueError, match=message):
            max_variance_subset(*bad)


def test_worked_example():
    assert select_rollouts(ADVANTAGES, GROUPS, 4).tolist() == [0, 3, 6, 7]
    group = select_rollouts(ADVANTAGES, GROUPS, 2, scope="group")
    assert (GROUPS[group] == torch.tensor([0, 0, 1, 1, 2, 2])).all() and {0, 3, 7} <= set(group.tolist())
    rows = torch.tensor([0, 3, 6, 7])
    entropy = torch.tensor([[0.1, 1.2, 0.4, 0], [0.9, 0.05, 0.3, 0.2], [0.5, 0.5, 0.5, 0], [2.0, 0.3, 0, 0]])
    mask = torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1], [1, 1, 1, 0], [1, 1, 0, 0]])
    kept = select_tokens(ADVANTAGES[rows], entropy, mask, 0.4)
    assert kept.nonzero().tolist() == [[0, 1], [0, 2], [1, 0], [3, 0], [3, 1]]
    loss = -(ADVANTAGES[rows][:, None] * kept).sum()
    assert (loss / kept.sum()).item() == pytest.approx(0.1590000, abs=1e-6)
    assert (loss / mask.sum()).item() == pytest.approx(0.0662500, abs=1e-6)


def test_group_scope_is_pods_and_groups_may_differ_in_size():
    generator = torch.Generator().manual_seed(3)
    labels = torch.tensor([5, 2, 5, 5, 2, 9, 5, 2, 2, 5])
    values = torch.randn(10, generator=generator, dtype=torch.float64)
    chosen = select_rollouts(values, labels, 3, scope="group")
    expected = []
    for label in (2, 5, 9):
        own = (labels == label).nonzero()[:, 0]
        expected += own[max_variance_subset(values[own], 3)].tolist()
    assert chosen.tolist() == sorted(expected)
    binary = torch.tensor([1.0, 1, 1, 1, 0, 0, 0, 0])
    picked = binary[select_rollouts(binary, torch.zeros(8, dtype=torch.long), 4, scope="group")]
    assert picked.sum() == 2


def test_dead_rows_leave_first_or_are_dropped():
    live = select_rollouts(ADVANTAGES, GROUPS, 8)
    assert live.tolist() == list(range(8)), "no zero-advantage row while live rows remain"
    assert len(select_rollouts(ADVANTAGES, GROUPS, 10)) == 10
    assert select_rollouts(ADVANTAGES, GROUPS, 10, drop_zero=True).tolist() == list(range(8))
    zeros = torch.zeros(6)
    assert select_rollouts(zeros, torch.arange(6) // 2, 3, drop_zero=True).numel() == 0
    assert select_rollouts(zeros, torch.arange(6) // 2, 1, scope="group", drop_zero=True).numel() == 0
    assert len(select_rollouts(zeros, torch.arange(6) // 2, 3)) == 3
    with pytest.raises(ValueError, match="scope='prompt' is unknown; allowed: batch, group"):
        select_rollouts(ADVANTAGES, GROUPS, 4, scope="prompt")


def test_tokens_exact_count_ties_and_padding():
    generator = torch.Generator().manual_seed(4)
    for fraction in (0.01, 0.2, 0.5, 0.77, 1.0):
        mask = torch.rand(5, 9, generator=generator) > 0.3
        advantages = torch.randn(5, generator=generator)
        entropy = torch.where(mask, torch.rand(5, 9, generator=generator), torch.tensor(1e9))
        kept = select_tokens(advantages, entropy, mask, fraction)
        assert kept.sum() == keep_count(int(mask.sum()), fraction) and not (kept & ~mask).any()
        rowwise = select_tokens(advantages, entropy, mask, fraction, scope="sample")
        assert rowwise.sum(1).tolist() == [keep_count(int(n), fraction) for n in mask.sum(1)]
    every = torch.ones(2, 4, dtype=torch.bool)
    assert select_tokens(torch.ones(2), torch.ones(2, 4), every, 0.5).tolist() == [[True] * 4, [False] * 4]
    assert torch.equal(select_tokens(torch.zeros(2), torch.rand(2, 4), every, 1.0), every)
    entropy = torch.rand(2, 4, generator=generator)
    top = select_tokens(torch.tensor([-1.0, 1.0]), entropy, every, 0.25)
    assert set(entropy[top].tolist()) == set(entropy.flatten().topk(2).values.tolist()), "equal |A|: entropy ranking"
    mixed = select_tokens(torch.tensor([0.0, 1e-3]), torch.tensor([[9.0] * 4, [1e-3] * 4]), every, 0.5)
    assert mixed.tolist() == [[False] * 4, [True] * 4], "a token without advantage is never above a live one"
    assert not select_tokens(torch.ones(2), entropy, torch.zeros(2, 4), 0.5).any()
    for bad in ((torch.ones(3), entropy, every, 0.5), (torch.ones(2), entropy, every, 1.5)):
        with pytest.raises(ValueError, match="do not fit|keep_fraction=1.5"):
            select_tokens(*bad)


def test_no_gradient_through_the_choice():
    advantages = torch.randn(3, requires_grad=True)
    entropy = torch.rand(3, 5, requires_grad=True)
    assert not select_tokens(advantages, entropy, torch.ones(3, 5), 0.4).requires_grad
    assert not select_rollouts(advantages, torch.zeros(3, dtype=torch.long), 2).requires_grad


def test_schedule():
    schedule = D3SSchedule(n_init=4, n_final=16, k_init=0.1, k_final=1.0, total_steps=100)
    values = [schedule.at(step) for step in (0, 25, 50, 100, 1000)]
    assert [n for n, _ in values] == [4, 7, 10, 16, 16]
    assert [k for _, k in values] == pytest.approx([0.1, 0.325, 0.55, 1.0, 1.0])
    with pytest.raises(ValueError, match=r"k_init=0 is not in \(0, 1\]"):
        D3SSchedule(4, 16, 0, 1.0, 100)
