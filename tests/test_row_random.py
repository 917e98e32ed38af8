"""Row-seeded random numbers: fixed values, uniformity, independence, and draws that follow the distribution."""

from __future__ import annotations

import math

import pytest
import torch

from rltok.fast import draw, row_key, uniforms
from rltok.fast.row_random import largest, pick, streams, uniforms_of

GOLDEN_KEYS = [2391539541053276776, 1825234068690658839, 7356312866314379522, 1188333644505025273]
GOLDEN_UNIFORMS = [0.6524484863740322, 0.9435642308648544, 0.510562089893682, 0.7480227189628226]

CHI2_15 = 37.70
"""0.999 quantile of the chi-square distribution with 15 degrees of freedom"""
CHI2_99 = 148.23
"""the same with 99"""


def grid(keys, positions):
    """(keys, positions) uniform numbers."""
    k, t = torch.meshgrid(keys, torch.arange(positions), indexing="ij")
    return uniforms(k.flatten(), t.flatten()).view(len(keys), positions)


def hashed_keys(rows, seed=0):
    return torch.tensor([row_key(seed, 1, f"prompt {i // 8}", i % 8) for i in range(rows)])


def chi_square(counts, expected):
    return float(((counts - expected) ** 2 / expected).sum())


def test_keys_and_numbers_never_change():
    assert [row_key(0, 0, 0, 0), row_key(42, 7, 3, 1), row_key(42, 7, "3", 1), row_key(-1, 7, "é", 15)] == GOLDEN_KEYS
    found = uniforms(torch.tensor([0, 1, -1, 2**62]), torch.tensor([0, 1, 2, 10**6])).tolist()
    assert found == GOLDEN_UNIFORMS


def test_every_part_of_a_key_matters():
    keys = [row_key(s, t, p, c) for s in range(4) for t in range(4) for p in (0, 1, "0", "1", "") for c in range(-1, 8)]
    assert len(set(keys)) == len(keys)
    assert all(-(2**63) <= key < 2**63 for key in keys)


def test_wrong_numbers_are_refused():
    with pytest.raises(ValueError, match="seed=18446744073709551616 does not fit in 64 bits"):
        row_key(2**64, 0, 0, 0)
    with pytest.raises(ValueError, match="torch.int64"):
        uniforms(torch.tensor([1.0]), torch.tensor([0]))
    with pytest.raises(ValueError, match="of one shape"):
        uniforms(torch.tensor([1, 2]), torch.tensor([0]))


def test_uniform_over_positions_and_over_keys():
    for values in (grid(hashed_keys(64), 1000), grid(torch.arange(1000), 64)):
        assert values.dtype == torch.float64
        assert float(values.min()) >= 0 and float(values.max()) < 1
        counts = torch.histc(values, 100, 0, 1)
        assert chi_square(counts, values.numel() / 100) < CHI2_99
        assert chi_square(torch.histc(values[0], 16, 0, 1), values.size(1) / 16) < CHI2_15
        assert chi_square(torch.histc(values[:, 0], 16, 0, 1), values.size(0) / 16) < CHI2_15


@pytest.mark.parametrize("keys", [torch.arange(256), torch.arange(256) << 56, "hashed"])
def test_neighbours_are_independent(keys):
    """Correlations between positions and between keys, against four standard errors."""
    values = grid(hashed_keys(256) if isinstance(keys, str) else keys, 256)
    centred = (values - 0.5) * math.sqrt(12)
    for left, right in [
        (centred[:, 1:], centred[:, :-1]),
        (centred[1:], centred[:-1]),
        (centred[1:, 1:], centred[:-1, :-1]),
    ]:
        assert abs(float((left * right).mean())) < 4 / math.sqrt(left.numel())
    pairs = (values[:, :-1] * 4).long() * 4 + (values[:, 1:] * 4).long()
    counts = torch.bincount(pairs[:, ::2].flatten(), minlength=16).double()
    assert chi_square(counts, counts.sum() / 16) < CHI2_15


def test_every_bit_is_balanced():
    words = (grid(hashed_keys(64), 512) * 2**53).long().flatten()
    for bit in range(53):
        share = ((words >> bit) & 1).double().mean()
        assert abs(float(share) - 0.5) < 4.5 * 0.5 / math.sqrt(words.numel()), bit


def test_numbers_do_not_depend_on_the_batch():
    keys, positions = hashed_keys(64), torch.arange(64) % 7
    whole = uniforms(keys, positions)
    order = torch.randperm(64, generator=torch.Generator().manual_seed(0))
    assert torch.equal(uniforms(keys[order], positions[order]), whole[order])
    alone = [uniforms(keys[i : i + 1], positions[i : i + 1]) for i in range(64)]
    assert torch.equal(torch.cat(alone), whole)


@pytest.mark.parametrize("vocabulary", [16, 1000])
def test_frequencies_follow_the_distribution(vocabulary):
    generator = torch.Generator().manual_seed(3)
    logits = torch.randn(vocabulary, generator=generator)
    logits[[2, 5, vocabulary - 1]] = -torch.inf
    rows, steps = 64, 1000
    u = grid(hashed_keys(rows), steps).flatten()
    tokens = torch.cat([draw(logits.expand(len(part), -1), part) for part in u.split(4000)])
    counts = torch.bincount(tokens, minlength=vocabulary).double()
    expected = logits.double().softmax(0) * len(u)
    assert not counts[expected == 0].any()
    sixteen = torch.arange(vocabulary) * 16 // vocabulary  # 16 cells of neighbouring tokens
    cells, means = (torch.zeros(16, dtype=torch.float64).index_add_(0, sixteen, x) for x in (counts, expected))
    used = means > 0
    assert chi_square(cells[used], means[used]) < CHI2_15


def test_a_draw_does_not_depend_on_the_batch():
    generator = torch.Generator().manual_seed(1)
    scores = torch.randn(64, 1531, generator=generator) * 3
    scores[:, ::3] = -torch.inf
    u = torch.rand(64, generator=generator, dtype=torch.float64)
    whole = draw(scores, u)
    for size in (1, 7, 63):
        parts = [draw(a, b) for a, b in zip(scores.split(size), u.split(size), strict=True)]
        assert torch.equal(torch.cat(parts), whole)
    assert torch.equal(draw(scores.flip(0), u.flip(0)), whole.flip(0))


@pytest.mark.parametrize("vocabulary", [5, 256, 257, 5000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_edges_never_give_a_token_without_probability(vocabulary, dtype):
    generator = torch.Generator().manual_seed(vocabulary)
    scores = (torch.randn(6, vocabulary, generator=generator) * 4).to(dtype)
    scores[:, 0] = scores[:, -1] = -torch.inf
    scores[1, 2:] = -torch.inf  # one token left
    scores[2] = scores[2, 1]  # ties, everything allowed
    scores[3, 3:] = -1e30 if dtype == torch.float64 else -3e38
    possible = scores.double().softmax(-1) > 0
    for u in (0.0, 2**-53, 0.25, 0.5, 1 - 2**-53):
        tokens = draw(scores, torch.full((6,), u, dtype=torch.float64))
        assert possible.gather(1, tokens[:, None]).all(), u
        assert tokens[1] == 1
        assert tokens[2] == min(int(u * vocabulary), vocabulary - 1)
    first = draw(scores, torch.zeros(6, dtype=torch.float64))
    assert torch.equal(first, possible.long().argmax(-1))


def test_probabilities_are_exact_at_their_borders():
    scores = torch.tensor([[0.0, math.log(2), -torch.inf, math.log(5)]], dtype=torch.float64)
    borders = [(0.1249, 0), (0.1251, 1), (0.3749, 1), (0.3751, 3), (0.9999, 3)]
    for u, token in borders:
        assert draw(scores, torch.tensor([u], dtype=torch.float64)).item() == token


@pytest.mark.parametrize("value", [-torch.inf, torch.nan, torch.inf])
def test_rows_without_a_distribution_are_refused(value):
    scores = torch.zeros(3, 8)
    scores[1] = value
    with pytest.raises(ValueError, match="row 1 of the scores has the maximum"):
        draw(scores, torch.zeros(3, dtype=torch.float64))


@pytest.mark.parametrize("vocabulary", [5, 256, 257, 5000])
def test_a_pick_knows_its_log_probability_and_does_not_wait(vocabulary):
    generator = torch.Generator().manual_seed(vocabulary)
    scores = 4 * torch.randn(40, vocabulary, generator=generator)
    scores[:, 2] = -torch.inf
    scores[3, 1:] = -torch.inf  # certain
    scores[5], scores[6, 0], scores[7, 4] = -torch.inf, torch.nan, torch.inf
    given = scores.clone()
    impossible = torch.zeros(40, dtype=torch.bool).index_fill_(0, torch.tensor([5, 6, 7]), True)
    expected = scores.double().log_softmax(dim=-1)
    for u in (None, torch.rand(40, generator=generator, dtype=torch.float64)):
        tokens, logps = pick(scores, u)
        assert torch.equal(tokens < 0, impossible)
        fine = ~impossible
        own = expected[fine].gather(1, tokens[fine, None]).squeeze(1)
        torch.testing.assert_close(logps[fine].double(), own, rtol=1e-6, atol=1e-6)
        assert logps.dtype == torch.float32 and logps[3] == 0
        assert torch.equal(tokens[fine], scores[fine].argmax(-1) if u is None else draw(scores[fine], u[fine]))
    assert torch.equal(largest(scores), pick(scores, None)[0])
    torch.testing.assert_close(scores, given, rtol=0, atol=0, equal_nan=True)


def test_streams_are_the_part_that_stays():
    keys, positions = hashed_keys(64), torch.arange(64) % 7
    assert torch.equal(uniforms_of(streams(keys), positions), uniforms(keys, positions))
