"""The thought-switching penalty: where it acts in a thought, and when a thought starts."""

from __future__ import annotations

import pytest
import torch
from decoding_support import END, START, VOCAB, WAIT, A, B, C, as_an_engine, random_rows, step_by_step, word_tokenizer

from rltok.sampling import DecodingContext, ThoughtSwitchingConfig, ThoughtSwitchingLogitsProcessor

PROMPT = torch.tensor([[A, WAIT]])  # a switch word in the prompt starts no thought


def tip(**options):
    return ThoughtSwitchingLogitsProcessor(**{"word_ids": [WAIT, B], "alpha": 3.0, "beta": 4, **options})


def play(made, tokens):
    """(steps, V) biases of one row, before each token and after the last."""
    steps = [torch.cat([PROMPT, torch.tensor([tokens[:t]], dtype=torch.long)], 1) for t in range(len(tokens) + 1)]
    return torch.cat([made(ids, torch.zeros(1, VOCAB)) for ids in steps])


def penalised(made, tokens):
    out = play(made, tokens)
    assert set(out[:, WAIT].tolist()) <= {0.0, -made.alpha}
    return [step for step, bias in enumerate(out[:, WAIT].tolist()) if bias]


def test_worked_windows():
    tokens = [A, A, WAIT, A, A, A, A, A]
    assert penalised(tip(), tokens) == [0, 1, 2, 3, 4, 5, 6]
    assert penalised(tip(restart="start"), tokens) == [0, 1, 2, 3]


def test_every_word_of_the_list_starts_a_thought():
    assert penalised(tip(beta=2), [A, A, A, B, A, A, A, WAIT, A, A, A]) == [0, 1, 4, 5, 8, 9]
    assert penalised(tip(beta=2), [A, A, A, WAIT, WAIT, A, A, A]) == [0, 1, 4, 5, 6]
    assert penalised(tip(beta=2), [WAIT, A, A, A]) == [0, 1, 2]


def test_all_words_and_nothing_else():
    out = play(tip(alpha=2.5), [A])
    assert (out[:, [WAIT, B]] == -2.5).all()
    others = [v for v in range(VOCAB) if v not in (WAIT, B)]
    assert not out[:, others].any()


def test_only_while_thinking():
    assert penalised(tip(end_ids=[END]), [A, END, WAIT, A]) == [0, 1]
    assert penalised(tip(end_ids=[A, C]), [A, A, C, WAIT, A]) == [0, 1, 2]


def test_a_span_that_opens_begins_the_first_thought():
    tokens = [A, A, A, START, A, A, WAIT, A, END, A]
    assert penalised(tip(beta=2, start_ids=[START], end_ids=[END]), tokens) == [4, 5, 7, 8]
    assert penalised(tip(beta=5, start_ids=[START], restart="start"), tokens) == [4]


def test_neutral_limits():
    for made in (tip(alpha=0.0), tip(beta=0)):
        scores = torch.zeros(1, VOCAB)
        assert made(PROMPT, scores) is scores
    assert not tip().is_neutral


def test_rows_have_thoughts_of_their_own():
    ids, logits = random_rows(8, 14)
    ids[:4, ::5] = WAIT
    for options in ({"end_ids": [END]}, {"restart": "start"}, {"start_ids": [C]}):
        together = step_by_step(tip(**options), ids, logits)
        moved = as_an_engine(tip(**options), ids, logits, joins=[0, 0, 3, 9, 1, 1, 2, 5])
        assert torch.equal(together, moved)
        acts = (together != logits).any(-1)
        assert len(set(map(tuple, acts.tolist()))) > (1 if options.get("restart") != "start" else 0)


def test_the_penalty_in_the_trace():
    made = tip()
    out = play(made, [A, WAIT, A, A, A, A, A])
    assert torch.equal(made.trace()["bias"][0], out[:, WAIT])


def test_probabilities():
    """z = (1, 0.5, 0), word 0, alpha = 3: the penalty of a word is exactly alpha against any other token."""
    z = torch.tensor([[1.0, 0.5, 0.0]], dtype=torch.float64)
    out = ThoughtSwitchingLogitsProcessor([0])(torch.tensor([[1]]), z)
    before, after = z.log_softmax(-1)[0], out.log_softmax(-1)[0]
    assert (before[0] - before[1] - after[0] + after[1]).item() == pytest.approx(3.0)
    assert (before[1] - before[2] - after[1] + after[2]).item() == pytest.approx(0.0, abs=1e-12)


def test_config():
    context = DecodingContext(tokenizer=word_tokenizer())
    made = ThoughtSwitchingConfig().processor(context)
    assert (made.alpha, made.beta, made.restart) == (3.0, 600, "thought")
    assert (made.word_ids, made.end_ids, made.start_ids) == ((4, 5, 7, 8, 9), (END,), ())
    config = ThoughtSwitchingConfig(10.0, 300, "start", ("wait",), "all", think_end="a b", think_start="<think>")
    made = config.processor(context)
    assert (made.alpha, made.beta, made.restart, made.word_ids) == (10.0, 300, "start", (4, 5, 6))
    assert (made.end_ids, made.start_ids) == ((A, B), (START,))
    assert not config.restricts
    for options in ({"alpha": -1.0}, {"beta": -1}, {"restart": "always"}):
        with pytest.raises(ValueError, match=next(iter(options))):
            tip(**options)
