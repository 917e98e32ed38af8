"""CyclicReflex: the wave, where it acts, and what it does to the policy."""

from __future__ import annotations

import math

import pytest
import torch
from decoding_support import END, PAD, START, VOCAB, WAIT, A, B, C, random_rows, step_by_step, word_tokenizer

from rltok.sampling import (
    CyclicReflexConfig,
    CyclicReflexLogitsProcessor,
    DecodingContext,
    ReflectionSchedule,
    triangular_bias,
    triangular_wave,
)
from rltok.sampling.cyclic_reflex import apply

POSITIONS = [0, 10, 25, 50, 60, 75, 90, 100]
WAVE = [0, 1.2, 3, 0, -1.2, -3, -1.2, 0]  # A = 3, C = 100


def three_branches(n, period, amplitude, shift):
    """The form of the authors' code."""
    u = ((n + shift * period) % period) / period
    if u <= 0.25:
        return 4 * u * amplitude
    if u <= 0.75:
        return amplitude - 4 * amplitude * (u - 0.25)
    return -amplitude + 4 * amplitude * (u - 0.75)


def closed(position, period, amplitude, phase=0.0):
    return triangular_wave(torch.as_tensor(position, dtype=torch.float64), period, amplitude, phase)


# ---- the wave


def test_worked_wave():
    expected = torch.tensor(WAVE, dtype=torch.float64)
    torch.testing.assert_close(closed(POSITIONS, 100, 3), expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(triangular_bias(torch.tensor(POSITIONS), 3, 100), expected.float(), rtol=0, atol=1e-6)
    assert triangular_wave(10, 100, 3).item() == pytest.approx(1.2)
    assert triangular_bias(torch.tensor(0), 3, 100, 0.25).item() == pytest.approx(3)
    assert triangular_bias(torch.tensor(0), 3, 100, -0.25).item() == pytest.approx(-3)
    assert closed(7, 100, 3, 0.5).item() == pytest.approx(-closed(7, 100, 3).item())


@pytest.mark.parametrize("period", [1, 100, 600, 333.7, 0.9, math.pi])
@pytest.mark.parametrize("shift", [0.0, 0.25, -0.25, 0.31, -2.6])
def test_closed_form_equals_the_three_branches(period, shift):
    n = torch.arange(2000)
    expected = torch.tensor([three_branches(i, period, 3.0, shift) for i in range(2000)], dtype=torch.float64)
    torch.testing.assert_close(closed(n, period, 3.0, shift), expected, rtol=0, atol=3e-12 * max(1, 1 / period))
    torch.testing.assert_close(triangular_wave(n, period, 3.0, shift).double(), expected, rtol=0, atol=1e-6)


def test_wave_is_bounded_periodic_and_of_mean_zero():
    n = torch.arange(1000)
    for shift in (0.0, 0.3):
        wave = closed(n, 100, 3, shift)
        assert wave.min() == pytest.approx(-3, abs=0.13)
        assert wave.abs().max() <= 3
        assert wave[:100].sum().item() == pytest.approx(0, abs=1e-10)
        torch.testing.assert_close(wave[100:], wave[:-100], rtol=0, atol=1e-10)
    fractional = torch.linspace(0, 50, 4001, dtype=torch.float64)[:-1]
    for period in (12.5, 6.25):
        wave = closed(fractional, period, 2)
        assert wave.mean().item() == pytest.approx(0, abs=1e-12)
        torch.testing.assert_close(closed(fractional + period, period, 2), wave, rtol=0, atol=1e-11)


def test_whole_positions_keep_their_digits():
    """float32 would lose a third of a period far into a long completion."""
    far = torch.tensor([2**25 + 1])
    assert triangular_wave(far, 3, 1.0).item() == pytest.approx(three_branches(2**25 + 1, 3, 1.0, 0), abs=1e-6)
    assert triangular_wave(far, 3, 1.0).dtype == torch.float32
    assert triangular_wave(far.double(), 3, 1.0).dtype == torch.float64
    assert triangular_wave(torch.zeros(2, 3), 3, 1.0).shape == (2, 3)


def test_amplitude_zero_is_zero():
    assert not triangular_wave(torch.arange(50), 7.3, 0.0, 0.2).any()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [((0, 3), "period=0"), ((-1, 3), "period=-1"), ((10, -3), "amplitude=-3"), ((math.inf, 3), "period=inf")],
)
def test_waves_that_do_not_exist(arguments, words):
    with pytest.raises(ValueError, match=words):
        triangular_wave(torch.arange(3), *arguments)


# ---- schedule and words


def test_windows_are_half_open():
    schedule = ReflectionSchedule(3.0, 100.0, 0.25, [(2, 4), (7, 8)])
    n = torch.arange(10)
    acts = [2, 3, 7]
    assert schedule(n).nonzero().flatten().tolist() == acts
    everywhere = ReflectionSchedule(3.0, 100.0, 0.25)(n)
    assert torch.equal(schedule(n)[acts], everywhere[acts])


def test_worked_log_probs_and_ratios():
    z, temperature = torch.tensor([[1.0, 0.5, 0.0]], dtype=torch.float64), 0.6
    schedule, n = ReflectionSchedule(3.0, 100.0), torch.tensor([10])
    biased = apply(z, n, torch.tensor([True]), [0], schedule)
    before, after = (z / temperature).log_softmax(-1), (biased / temperature).log_softmax(-1)
    expected = torch.tensor([[-0.484568, -1.317902, -2.151235]], dtype=torch.float64)
    torch.testing.assert_close(before, expected, rtol=0, atol=1e-6)
    expected = torch.tensor([[-0.081007, -2.914340, -3.747673]], dtype=torch.float64)
    torch.testing.assert_close(after, expected, rtol=0, atol=1e-6)
    ratio = (before - after).exp()[0].tolist()
    assert ratio == pytest.approx([0.667937, 4.935421, 4.935421], abs=3e-6)
    total = 1 + before[0, 0].exp().item() * (math.exp(1.2 / temperature) - 1)  # Z
    assert ratio == pytest.approx([total * math.exp(-1.2 / temperature), total, total], rel=1e-6)
    assert torch.equal(z, torch.tensor([[1.0, 0.5, 0.0]], dtype=torch.float64))  # the caller's is as it was


def test_apply_leaves_rows_that_do_not_think():
    z = torch.randn(3, 5, generator=torch.Generator().manual_seed(0))
    active = torch.tensor([True, False, True])
    out = apply(z, torch.tensor([25, 25, 75]), active, [1, 3, 3, 1], ReflectionSchedule(3.0, 100.0))
    change = torch.zeros(3, 5)
    change[0, [1, 3]], change[2, [1, 3]] = 3.0, -3.0  # a word that is named twice is biased once
    torch.testing.assert_close(out - z, change, atol=1e-5, rtol=0)
    assert torch.equal(out[1], z[1])


# ---- the processor


def reflex(**options):
    return CyclicReflexLogitsProcessor(**{"word_ids": [WAIT], "amplitude": 3.0, "period": 8.0, "phase": 0.1, **options})


def biases(made, tokens, prompt=((A, B),)):
    """Bias of the word before each token of one row, and after the last."""
    prompt = torch.tensor(prompt)
    out = []
    for t in range(len(tokens) + 1):
        ids = torch.cat([prompt, torch.tensor([tokens[:t]], dtype=torch.long)], 1)
        out.append(made(ids, torch.zeros(1, VOCAB, dtype=torch.float64))[0])
    return torch.stack(out)


def test_only_the_words_are_biased_by_the_wave():
    out = biases(reflex(word_ids=[WAIT, C, C]), [A] * 9)
    wave = triangular_wave(torch.arange(10), 8.0, 3.0, 0.1).double()
    for word in (WAIT, C):
        torch.testing.assert_close(out[:, word], wave, rtol=0, atol=1e-6)
    others = [v for v in range(VOCAB) if v not in (WAIT, C)]
    assert not out[:, others].any()


def test_unchanged_from_the_step_after_the_end_token():
    out = biases(reflex(end_ids=[END]), [A, A, END, A, A])[:, WAIT]
    assert (out[:3] != 0).all()
    assert not out[3:].any()


def test_end_of_several_tokens_that_overlaps_itself():
    out = biases(reflex(end_ids=[B, B, C]), [A, B, B, B, C, A])[:, WAIT]
    assert (out[:5] != 0).all()
    assert not out[5:].any()


def test_an_end_token_in_the_prompt_does_not_count():
    out = biases(reflex(end_ids=[END]), [A, A], prompt=((END, A, END),))[:, WAIT]
    assert (out != 0).all()
    straddling = biases(reflex(end_ids=[B, C]), [C, A], prompt=((A, B),))[:, WAIT]  # begun in the prompt
    assert (straddling != 0).all()


def test_a_span_that_is_opened():
    out = biases(reflex(start_ids=[START], end_ids=[END]), [A, START, A, END, START, A])[:, WAIT]
    assert (out != 0).tolist() == [False, False, True, True, False, False, False]


def test_left_padding_does_not_move_the_position():
    padded = torch.tensor([[PAD, PAD, A], [PAD, A, B], [A, B, C]])
    made = reflex()
    for t in range(5):
        out = made(torch.cat([padded, torch.full((3, t), A)], 1), torch.zeros(3, VOCAB))
        torch.testing.assert_close(out[:, WAIT], triangular_wave(torch.full((3,), t), 8.0, 3.0, 0.1))


def test_batch_equals_row_by_row():
    ids, logits = random_rows(6, 12)
    together = step_by_step(reflex(end_ids=[END]), ids, logits)
    for row in range(6):
        alone = step_by_step(reflex(end_ids=[END]), ids[row : row + 1], logits[row : row + 1])
        assert torch.equal(alone[0], together[row])


def test_minus_infinity_stays_and_the_callers_tensor_too():
    scores = torch.zeros(2, VOCAB)
    scores[0, WAIT] = -math.inf
    before = scores.clone()
    out = reflex()(torch.tensor([[A], [A]]), scores)
    assert out[0, WAIT] == -math.inf
    assert out[1, WAIT] != 0
    assert out.data_ptr() != scores.data_ptr()
    assert torch.equal(scores, before)


def test_amplitude_zero_returns_the_very_tensor():
    scores = torch.zeros(2, VOCAB)
    assert reflex(amplitude=0.0)(torch.tensor([[A], [A]]), scores) is scores


def test_another_batch_is_not_taken_for_the_next_step():
    made = reflex(end_ids=[END])
    scores = torch.zeros(1, VOCAB, dtype=torch.float64)
    first = made(torch.tensor([[A, END]]), scores)
    made(torch.tensor([[A, END, A]]), scores)
    other = made(torch.tensor([[B, END, A, A]]), scores)  # one longer, but of another text
    assert torch.equal(other, first)
    made(torch.tensor([[B, END, A, A, END]]), scores)
    assert made(torch.tensor([[A, A]]), scores)[0, WAIT] == first[0, WAIT]


def test_prompt_length_too_long():
    with pytest.raises(ValueError, match="prompt_length=4 but input_ids have only 3"):
        reflex(prompt_length=4)(torch.tensor([[A, A, A]]), torch.zeros(1, VOCAB))


def test_the_trace_is_the_wave():
    made = reflex(end_ids=[END])
    out = biases(made, [A, A, END, A])
    torch.testing.assert_close(made.trace()["bias"], out[:, WAIT][None].float())


def test_dtypes_are_kept():
    for dtype in (torch.float16, torch.bfloat16, torch.float64):
        assert reflex()(torch.tensor([[A]]), torch.zeros(1, VOCAB, dtype=dtype)).dtype == dtype


def test_config_resolves_words_and_marks():
    context = DecodingContext(tokenizer=word_tokenizer())
    made = CyclicReflexConfig(amplitude=2.0, period=30.0, phase=0.1, think_start="<think>").processor(context)
    assert made.word_ids == (4, 5, 7, 8, 9)
    assert (made.end_ids, made.start_ids, made.windows) == ((END,), (START,), ((0, 8192),))
    assert (made.amplitude, made.period, made.phase) == (2.0, 30.0, 0.1)
    assert CyclicReflexConfig(variants="both").processor(context).word_ids == (4, 5, 6, 7, 8, 9)
    assert CyclicReflexConfig(think_end=None).processor(context).end_ids == ()
    with pytest.raises(ValueError, match="variants='all'"):
        CyclicReflexConfig(words=("perhaps",)).processor(context)
    with pytest.raises(ValueError, match="word_ids is empty"):
        CyclicReflexLogitsProcessor([])
