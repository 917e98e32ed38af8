"""Reflection suppression: forbidden words, a finite strength, and rows that would be left with nothing."""

from __future__ import annotations

import math

import pytest
import torch
from decoding_support import END, VOCAB, WAIT, A, B, C, as_an_engine, random_rows, step_by_step, word_tokenizer

from rltok.correction import CorrectionConfig, rollout_weights
from rltok.sampling import (
    BudgetForcingLogitsProcessor,
    DecodingContext,
    ReflectionSuppressionConfig,
    ReflectionSuppressionLogitsProcessor,
    Rows,
    make_processors,
)

INF = math.inf


def suppression(**options):
    return ReflectionSuppressionLogitsProcessor(**{"word_ids": [WAIT, B], **options})


def test_worked_log_probs():
    z = torch.tensor([[1.0, 0.5, 0.0]], dtype=torch.float64)
    forbidden = ReflectionSuppressionLogitsProcessor([0])(None, z).log_softmax(-1)[0].tolist()
    assert forbidden[0] == -INF
    assert forbidden[1:] == pytest.approx([-0.474077, -0.974077], abs=1e-6)
    less = ReflectionSuppressionLogitsProcessor([0], strength=2.0)(None, z).log_softmax(-1)[0].tolist()
    assert less == pytest.approx([-2.104131, -0.604131, -1.104131], abs=1e-6)
    assert z.tolist() == [[1.0, 0.5, 0.0]]


@pytest.mark.parametrize("strength", [None, 0.5, 7.0])
def test_the_same_at_every_step(strength):
    ids, logits = random_rows(4, 6)
    out = step_by_step(suppression(strength=strength), ids, logits)
    others = [v for v in range(VOCAB) if v not in (WAIT, B)]
    assert torch.equal(out[..., others], logits[..., others])
    expected = logits[..., [WAIT, B]] - (INF if strength is None else strength)
    torch.testing.assert_close(out[..., [WAIT, B]], expected)


def test_strength_zero_returns_the_very_tensor():
    scores = torch.zeros(2, VOCAB)
    assert suppression(strength=0.0)(torch.zeros(2, 1), scores) is scores
    assert suppression(strength=0.0, only_thinking=True)(torch.zeros(2, 1), scores) is scores


def test_a_row_with_nothing_else_keeps_its_words():
    scores = torch.full((4, VOCAB), -INF)
    scores[0, [WAIT, B]] = torch.tensor([1.0, 2.0])  # words only: they stay, in their proportion
    scores[1, WAIT] = 0.0
    scores[2, [WAIT, A]] = torch.tensor([5.0, -3.0])
    scores[3, C] = 1.0
    out = suppression()(None, scores)
    assert torch.equal(out[[0, 1, 3]], scores[[0, 1, 3]])
    assert (out[2] > -INF).nonzero().flatten().tolist() == [A]
    assert not out.log_softmax(-1).isnan().any()


def test_a_row_with_nothing_else_in_a_large_vocabulary():
    scores = torch.full((3, 1000), -INF)
    scores[0, 900], scores[1, B], scores[2, :] = 1.0, 2.0, 0.0
    out = suppression()(None, scores)
    assert torch.equal(out[:2], scores[:2])  # what is left lies far behind, or is a word
    assert (out[2] == -INF).nonzero().flatten().tolist() == sorted((WAIT, B))


@pytest.mark.parametrize("order", [1, -1])
def test_a_forced_word_is_not_taken_away(order):
    """Budget forcing writes Wait, which suppression forbids: it stays possible where nothing else is."""
    budget = BudgetForcingLogitsProcessor([A, WAIT], [END], ignore=1, max_tokens=None)
    chain = [budget, suppression()][::order]
    ids = torch.tensor([[C, A], [C, C]])
    scores = torch.zeros(2, VOCAB)
    for processor in chain:
        out = scores.clone()
        for t in range(2):
            out = processor(
                ids[:, : t + 1], scores if t == 1 else torch.zeros(2, VOCAB).index_fill(1, torch.tensor([END]), 9.0)
            )
        scores = out
    assert (scores[0] > -INF).nonzero().flatten().tolist() == [WAIT]
    assert scores[0].log_softmax(-1)[WAIT] == 0
    assert scores[1, WAIT] == -INF
    assert scores[1].isfinite().sum() > 5


def test_only_while_thinking():
    made = suppression(only_thinking=True, end_ids=[END])
    ids = torch.tensor([[A, END, A, A], [A, A, A, END]])
    out = step_by_step(made, ids, torch.zeros(2, 4, VOCAB))
    assert (out[..., WAIT] == -INF).tolist() == [[True, True, False, False], [True] * 4]
    opened = suppression(only_thinking=True, start_ids=[C], strength=2.0)
    out = step_by_step(opened, torch.tensor([[A, C, A, A]]), torch.zeros(1, 4, VOCAB))
    assert out[0, :, WAIT].tolist() == [0.0, 0.0, -2.0, -2.0]


def test_memory_is_what_the_form_needs():
    assert suppression().memory == "none"
    assert suppression().columns(3, torch.device("cpu")) == {}
    assert suppression(only_thinking=True).memory == "ids"
    assert suppression().memory == "none"  # an instance does not change the others


def test_without_history():
    """An engine that keeps no memory: no columns, no positions."""
    zeros = torch.zeros(3, dtype=torch.long)
    out = suppression(strength=1.5).apply(torch.zeros(3, VOCAB), Rows(zeros, zeros, 0), {})
    assert (out[:, [WAIT, B]] == -1.5).all()


def test_rows_that_move():
    ids, logits = random_rows(5, 10)
    for options in ({}, {"strength": 2.0}, {"only_thinking": True, "end_ids": [C]}):
        moved = as_an_engine(suppression(**options), ids, logits, joins=[0, 4, 2, 2, 7])
        assert torch.equal(moved, step_by_step(suppression(**options), ids, logits))


def test_finite_strength_can_be_weighted_and_forbidding_cannot():
    """Expected importance weight under the sampler: 1 with full support, the mass outside the words without."""
    z = 2 * torch.randn(1, VOCAB, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    log_pi = z.log_softmax(-1).T
    cfg = CorrectionConfig(mode="truncate", clip_max=None)
    for strength, expected in ((1.5, 1.0), (None, 1 - log_pi[[WAIT, B]].exp().sum().item())):
        log_mu = suppression(strength=strength)(None, z).log_softmax(-1).T
        possible = log_mu.isfinite()
        weight = rollout_weights(
            log_pi[possible][:, None], log_mu[possible][:, None], torch.ones(int(possible.sum()), 1), cfg
        )
        mean = (weight.weight[:, 0] * log_mu[possible].exp()).sum().item()
        assert mean == pytest.approx(expected, abs=1e-6)
        assert ReflectionSuppressionConfig(strength=strength).restricts is (strength is None)


def test_config():
    words = ["<pad>", "<eos>", "</think>", "wait", "Wait", "\u0120WAIT", "hmm", "\u0120but", "again", "\u0120Oh", "x"]
    context = DecodingContext(tokenizer=word_tokenizer(words))
    with pytest.warns(UserWarning, match="double-check"):
        made = ReflectionSuppressionConfig().processor(context)
    assert made.word_ids == tuple(range(3, 10))
    assert (made.strength, made.only_thinking, made.end_ids) == (None, False, ())
    config = ReflectionSuppressionConfig(2.0, ("wait",), "bare", only_thinking=True, think_start="x")
    made = config.processor(context)
    assert (made.word_ids, made.strength, made.end_ids, made.start_ids) == ((3,), 2.0, (2,), (10,))
    assert not config.restricts
    assert ReflectionSuppressionConfig.restricts  # the default forbids
    assert not ReflectionSuppressionConfig(strength=0.0).restricts
    assert make_processors([ReflectionSuppressionConfig(strength=0.0)], context) == []
    with pytest.raises(ValueError, match="strength=-1"):
        suppression(strength=-1)
