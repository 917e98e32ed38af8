"""What every credit method must do, whatever it computes; a new method needs no row here, the registry is the list."""

import dataclasses

import pytest
import torch

from rltok.attention.signals import AttentionSignals
from rltok.batch import TokenBatch, masked_mean
from rltok.credit import CREDIT, check_credit, shape_by_entropy
from rltok.entropy import entropy_stats

LENGTHS = torch.tensor([5, 1, 0, 3, 2, 5, 4, 4])
"""two groups of four; one empty completion, one of a single token"""


def batch(rewards=None, lengths=LENGTHS, width=5, seed=0):
    generator = torch.Generator().manual_seed(seed)
    rows = lengths.numel()
    rewards = torch.randn(rows, generator=generator) if rewards is None else rewards
    grouped = rewards.view(-1, 4)
    advantages = ((grouped - grouped.mean(1, keepdim=True)) / (grouped.std(1, keepdim=True) + 1e-4)).flatten()
    mask = (torch.arange(width) < lengths[:, None]).float()
    entropy = torch.rand(rows, width, generator=generator) * 2 + 1e-3
    return TokenBatch(
        advantages=advantages,
        mask=mask,
        ids=torch.randint(0, 9, (rows, width), generator=generator),
        all_rewards=rewards,
        all_lengths=lengths,
        group_size=4,
        old_logps=-torch.rand(rows, width, generator=generator),
        entropy=entropy,
        entropy_stats=entropy_stats(entropy, mask),
        attention=attention_signals(mask, generator),
        response_mask=mask,
        seed=seed,
    )


def attention_signals(mask, generator):
    """Signals of a pass over one layer of two heads with a horizon that starts at the next token."""
    rows = mask.size(0)
    ahead = (mask.flip(1).cumsum(1).flip(1) - 1).clamp(min=0) * mask
    return AttentionSignals(
        waad=torch.rand(mask.shape, generator=generator) * 10 * mask,
        fai=torch.rand(mask.shape, generator=generator) * (ahead > 0),
        fai_count=ahead.long(),
        span=torch.rand(rows, 2, generator=generator),
        local=torch.tensor([[0]]).expand(rows, 1),
        global_=torch.tensor([[1]]).expand(rows, 1),
        layers=(0,),
    )


def cut(data, rows=slice(None), tokens=slice(None), **changes):
    """`data` with some rows, in any order, and some tokens of its local tensors; the numbers of all ranks stay."""
    signals = data.attention
    return dataclasses.replace(
        data,
        advantages=data.advantages[rows],
        attention=dataclasses.replace(
            signals,
            span=signals.span[rows],
            local=signals.local[rows],
            global_=signals.global_[rows],
            **{name: getattr(signals, name)[rows][:, tokens] for name in ("waad", "fai", "fai_count")},
        ),
        **{
            name: getattr(data, name)[rows][:, tokens]
            for name in ("mask", "ids", "old_logps", "entropy", "response_mask")
        },
        **changes,
    )


@pytest.fixture(params=CREDIT)
def method(request):
    return CREDIT[request.param]()


def test_contract(method):
    data = batch()
    credit = method(data)
    check_credit(credit, data, type(method).__name__)
    assert credit.dtype == torch.float32 and credit.abs().sum() > 0
    if not method.per_token:
        for row, mask in zip(credit, data.mask.bool(), strict=True):
            assert row[mask].unique().numel() <= 1


@pytest.mark.parametrize(
    "data",
    [
        batch(rewards=torch.full((8,), 0.3)),
        batch(lengths=torch.zeros(8, dtype=torch.long)),
        batch(lengths=torch.ones(8, dtype=torch.long)),
        batch(rewards=torch.tensor([1.0, 0, 0, 0, 1, 1, 1, 1])),
    ],
    ids=["constant rewards", "everything masked", "one token each", "one constant group"],
)
def test_edge_batches_stay_finite(method, data):
    credit = method(data)
    check_credit(credit, data, type(method).__name__)


def test_a_constant_group_gets_no_credit_to_speak_of(method):
    credit = method(batch(rewards=torch.full((8,), 0.3)))
    assert credit.abs().max() < 1e-3


def test_order_of_rows_inside_a_group_does_not_matter(method):
    data = batch()
    order = torch.tensor([2, 0, 3, 1, 7, 5, 4, 6])
    shuffled = cut(data, order, all_rewards=data.all_rewards[order], all_lengths=data.all_lengths[order])
    torch.testing.assert_close(method(shuffled), method(data)[order])


def test_right_padding_does_not_matter(method):
    wide = batch(width=9)
    narrow = cut(wide, tokens=slice(5))
    torch.testing.assert_close(method(wide)[:, :5], method(narrow))


def test_a_rank_gets_its_own_rows(method):
    whole = batch()
    local = slice(3, 6)  # the second group lies on two ranks
    part = cut(whole, local, offset=3)
    torch.testing.assert_close(method(part), method(whole)[local])


def test_entropy_shaping_worked_numbers_and_limit():
    advantages = torch.tensor([[1.154601], [-0.5773], [-0.5773]], dtype=torch.float64)
    entropy = torch.tensor([[0.02, 1.2], [0.05, 0.0], [0.8, 0.001]], dtype=torch.float64)
    shaped = shape_by_entropy(advantages, entropy)
    expected = torch.tensor([1.162601, -0.557300, -0.576900], dtype=torch.float64)
    torch.testing.assert_close(torch.stack([shaped[0, 0], shaped[1, 0], shaped[2, 1]]), expected, atol=1e-6, rtol=0)
    assert shaped[0, 1] == pytest.approx(1.154601 + 0.4 * 1.2) and shaped[2, 0] == pytest.approx(-0.5773 / 2)
    assert torch.equal(shape_by_entropy(advantages, entropy, alpha=0.0), advantages.expand(3, 2))
    for options, message in (({"alpha": -1.0}, "alpha=-1.0"), ({"kappa": 1.0}, "kappa=1.0")):
        with pytest.raises(ValueError, match=message):
            CREDIT["entropy_shaping"](**options)


def test_check_credit_names_what_is_wrong():
    data = batch()
    for credit, message in (
        (torch.zeros(8, 4), r"shape \(8, 4\), expected \(8, 5\)"),
        (torch.full((8, 5), torch.inf), "returned inf at row 0, token 0"),
        (torch.ones(8, 5), "gave credit to masked tokens"),
        (data.mask.clone().requires_grad_(), "detach it"),
    ):
        with pytest.raises(ValueError, match=f"credit 'mine'.*{message}"):
            check_credit(credit, data, "mine")


def test_masked_mean():
    values, mask = torch.tensor([[1.0, 3.0, 9.0], [5.0, 5.0, 5.0]]), torch.tensor([[1, 1, 0], [0, 0, 0]])
    assert masked_mean(values, mask) == 2 and masked_mean(values, mask, 1).tolist() == [2, 0]
