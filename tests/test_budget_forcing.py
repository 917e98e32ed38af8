"""Budget forcing: exact movement of probability, the same texts as S1, budgets, forced texts."""

from __future__ import annotations

import math
from collections import defaultdict

import pytest
import torch
from decoding_support import END, EOS, PAD, VOCAB, WAIT, A, B, C, D, as_an_engine, random_rows, word_tokenizer
from decoding_support import step_by_step as run

from rltok.sampling import (
    DECODING,
    BudgetForcingConfig,
    BudgetForcingLogitsProcessor,
    DecodingContext,
    Rows,
    make_processors,
)

INF = math.inf
ENDS = [END, EOS]


def processor(**options):
    """w = Wait, ends = </think> and <eos>, T = 1; no budgets but the given ones."""
    defaults = {
        "wait_ids": [WAIT],
        "end_ids": [END],
        "eos_ids": [EOS],
        "min_tokens": 0,
        "max_tokens": None,
        "ignore": 0,
    }
    return BudgetForcingLogitsProcessor(**{**defaults, **options})


def rows_at(position, last=0, rows=1):
    return Rows(torch.full((rows,), position), torch.full((rows,), last), position)


def logits_of(**probabilities):
    """(1, V) float64 logits of words at T = 1; all other words are impossible."""
    names = {"wait": WAIT, "end": END, "eos": EOS, "a": A, "b": B}
    row = torch.full((1, VOCAB), -INF, dtype=torch.float64)
    for name, p in probabilities.items():
        row[0, names[name]] = math.log(p)
    return row


EARLY = logits_of(wait=0.1, end=0.3, eos=0.1, a=0.5)  # the end is likelier than Wait
LATE = logits_of(wait=0.4, end=0.1, eos=0.1, a=0.4)  # Wait is likelier than the end
PROMPT = torch.tensor([[A, END]])


def play(made, tokens, scores=EARLY):
    """(steps, V) outputs of a row that gets `tokens` one by one, the same or given logits at every step."""
    scores = [scores] * (len(tokens) + 1) if isinstance(scores, torch.Tensor) else scores
    steps = [torch.cat([PROMPT, torch.tensor([tokens[:t]], dtype=torch.long)], 1) for t in range(len(tokens) + 1)]
    return torch.cat([made(ids, row) for ids, row in zip(steps, scores, strict=True)])


def forces(out):
    """The one token that is possible, with log-probability exactly 0; None if several are."""
    possible = (out > -INF).nonzero().flatten().tolist()
    if len(possible) != 1:
        return None
    assert out.log_softmax(-1)[possible[0]].item() == 0.0
    return possible[0]


def ignores(out):
    return bool((out[ENDS] == -INF).all()) and forces(out) is None


# ---- moving the mass


def test_worked_example():
    out = play(processor(ignore=1), [])[0].softmax(-1)
    assert out[WAIT].item() == pytest.approx(0.5, abs=1e-12)
    assert out[A].item() == pytest.approx(0.5, abs=1e-12)
    assert out[ENDS].tolist() == [0.0, 0.0]


@pytest.mark.parametrize("temperature", [0.2, 0.6, 1.0, 1.7])
def test_exactly_the_mass_of_the_ends_moves(temperature):
    _, logits = random_rows(200, 1)
    logits = 3 * logits[:, 0]
    out = processor(ignore=1, base=temperature)(torch.zeros(200, 1, dtype=torch.long), logits)
    pi, mu = (logits / temperature).softmax(-1), (out / temperature).softmax(-1)
    others = [v for v in range(VOCAB) if v not in (WAIT, END, EOS)]
    torch.testing.assert_close(mu[:, others].log(), pi[:, others].log(), rtol=1e-12, atol=1e-12)
    assert torch.equal(out[:, others], logits[:, others])
    torch.testing.assert_close(mu[:, WAIT], pi[:, [WAIT, *ENDS]].sum(1), rtol=1e-12, atol=1e-15)
    assert (mu[:, ENDS] == 0).all()
    own = pi[:, WAIT] / (pi[:, WAIT] + pi[:, ENDS].sum(1))
    torch.testing.assert_close(pi[:, WAIT] / mu[:, WAIT], own, rtol=1e-12, atol=1e-15)


def test_greedy_takes_the_maximum():
    row = torch.zeros(1, VOCAB)
    row[0, A], row[0, WAIT], row[0, END], row[0, EOS] = 2.0, 0.5, 1.9, 1.9  # together the ends are likelier than A
    for made in (processor(ignore=1, base=0.0), sampled := processor(ignore=1)):
        if made is sampled:
            made.begin(1, Settings(do_sample=False, temperature=0.3))
        out = made(torch.zeros(1, 1, dtype=torch.long), row.clone())
        assert out[0, WAIT].item() == pytest.approx(1.9)
        assert out.argmax().item() == A
    assert processor(ignore=1)(torch.zeros(1, 1, dtype=torch.long), row).argmax().item() == WAIT


class Settings:
    def __init__(self, do_sample=True, temperature=1.0, output_logits=None):
        self.do_sample, self.temperature, self.output_logits = do_sample, temperature, output_logits


def test_the_temperature_must_be_the_engines():
    made = processor(ignore=1, base=0.7)
    with pytest.raises(ValueError, match=r"temperature=0.7 but generate uses 1.0"):
        made.begin(2, Settings(temperature=None))
    made.begin(2, Settings(temperature=0.7))
    made.begin(2, Settings(do_sample=False, temperature=1.0))
    made.begin(2, Settings(temperature=0.7))
    expected = processor(ignore=1, base=0.7)(PROMPT, EARLY)
    assert torch.equal(made(PROMPT, EARLY.clone()), expected)  # after `begin` it may overwrite
    processor(max_tokens=3, base=0.7).begin(2, Settings(temperature=1.0))  # moves no mass: any temperature will do


def test_forbidden_tokens():
    only_end = logits_of(end=1.0)
    assert forces(play(processor(ignore=1), [], only_end)[0]) == WAIT
    no_end = logits_of(wait=0.2, a=0.8)
    torch.testing.assert_close(play(processor(ignore=1), [], no_end), no_end, rtol=1e-15, atol=1e-15)
    neither = logits_of(a=0.5, b=0.5)
    assert torch.equal(play(processor(ignore=1), [], neither), neither)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_dtypes(dtype):
    _, logits = random_rows(5, 1)
    low = logits[:, 0].to(dtype)
    made = processor(ignore=1, max_tokens=1, base=0.6)
    out = made(torch.zeros(5, 1, dtype=torch.long), low)
    assert out.dtype == dtype
    exact = processor(ignore=1, base=0.6)(torch.zeros(5, 1, dtype=torch.long), low.double())
    torch.testing.assert_close(out[:, WAIT].double(), exact[:, WAIT], rtol=torch.finfo(dtype).eps, atol=1e-6)
    assert [forces(row) for row in made(torch.zeros(5, 2, dtype=torch.long), low)] == [END] * 5


# ---- the same texts as S1

LENGTH = 4
"""of texts over five tokens: 0 the end of the sequence, 1 the end of thinking, 2 Wait, 3 and 4 other words"""


def table(seed):
    """prefix -> (5,) logits; a fixed table."""

    def look(prefix):
        place = sum((token + 1) * 6**i for i, token in enumerate(prefix))  # a number of its own for every prefix
        generator = torch.Generator().manual_seed(10_000 * seed + place)
        return 1.5 * torch.randn(5, generator=generator, dtype=torch.float64)

    return look


def chances(logits, temperature):
    """(V,) logits -> (V,) probabilities; temperature 0 is greedy."""
    if temperature == 0:
        return torch.nn.functional.one_hot(logits.argmax(), logits.numel()).double()
    return (logits / temperature).softmax(-1)


def texts_of(made, look, temperature):
    """text -> probability under the processor, by walking all texts of at most LENGTH tokens."""
    texts, stack = {}, [((), 1.0, made.columns(1, torch.device("cpu")))]
    while stack:
        prefix, mass, columns = stack.pop()
        if len(prefix) == LENGTH or prefix[-1:] == (0,):
            texts[prefix] = mass
            continue
        here = {name: values.clone() for name, values in columns.items()}
        if prefix:
            made.observe(rows_at(len(prefix), prefix[-1]), here)
        scores = made.apply(look(prefix)[None].clone(), rows_at(len(prefix), prefix[-1] if prefix else 0), here)
        for token, chance in enumerate(chances(scores[0], temperature).tolist()):
            if chance > 0:
                stack.append((prefix + (token,), mass * chance, {n: v.clone() for n, v in here.items()}))
    return texts


def texts_of_s1(look, temperature, ignore, least, by_likelihood):
    """The rule of S1 written down: sample from the model; an end that comes too early is dropped and Wait appended.

    `by_likelihood` counts a Wait as an ignored end where the ends were likelier; else ends that were sampled count.
    """
    texts = defaultdict(float)

    def walk(prefix, mass, ignored, thinks):
        if len(prefix) == LENGTH or prefix[-1:] == (0,):
            texts[prefix] += mass
            return
        pi = chances(look(prefix), temperature)
        too_early = thinks and (ignored < ignore or len(prefix) < least)
        likelier = bool(pi[0] + pi[1] > pi[2])
        for sampled, chance in enumerate(pi.tolist()):
            dropped = too_early and sampled in (0, 1)
            token = 2 if dropped else sampled
            counts = (too_early and token == 2 and likelier) if by_likelihood else dropped
            if chance > 0:
                walk(prefix + (token,), mass * chance, ignored + counts, thinks and token != 1)

    walk((), 1.0, 0, True)
    return texts


def assert_same_texts(actual, expected):
    assert actual.keys() == {text for text, mass in expected.items() if mass > 0}
    assert sum(actual.values()) == pytest.approx(1, abs=1e-12)
    for text, mass in actual.items():
        assert mass == pytest.approx(expected[text], abs=1e-13), text


def tiny(temperature, **options):
    return processor(wait_ids=[2], end_ids=[1], eos_ids=[0], base=temperature, **options)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("temperature", [0.6, 1.0])
@pytest.mark.parametrize("least", [1, 2, 4])
def test_minimum_makes_the_texts_of_s1(seed, temperature, least):
    look = table(seed)
    actual = texts_of(tiny(temperature, min_tokens=least), look, temperature)
    assert_same_texts(actual, texts_of_s1(look, temperature, 0, least, by_likelihood=False))
    assert len(actual) >= 81
    plain = texts_of(tiny(temperature), look, temperature)
    assert max(abs(mass - plain.get(text, 0.0)) for text, mass in actual.items()) > 0.01


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize(("ignore", "least"), [(1, 0), (2, 0), (1, 2)])
def test_greedy_ignoring_makes_the_text_of_s1(seed, ignore, least):
    look = table(seed)
    actual = texts_of(tiny(0.0, ignore=ignore, min_tokens=least), look, 0)
    assert_same_texts(actual, texts_of_s1(look, 0, ignore, least, by_likelihood=False))


def test_some_greedy_texts_hold_an_ignored_end():
    texts = [next(iter(texts_of(tiny(0.0, ignore=1), table(seed), 0))) for seed in range(12)]
    plain = [next(iter(texts_of(tiny(0.0), table(seed), 0))) for seed in range(12)]
    assert sum(a != b for a, b in zip(texts, plain, strict=True)) >= 3


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("temperature", [0.6, 1.0])
@pytest.mark.parametrize(("ignore", "least"), [(1, 0), (2, 0), (1, 2), (3, 1)])
def test_ignoring_makes_the_texts_of_s1_with_the_count_by_likelihood(seed, temperature, ignore, least):
    look = table(seed)
    actual = texts_of(tiny(temperature, ignore=ignore, min_tokens=least), look, temperature)
    assert_same_texts(actual, texts_of_s1(look, temperature, ignore, least, by_likelihood=True))


# ---- what counts


def test_ends_are_ignored_so_many_times():
    for count in (0, 1, 2, 3):
        out = play(processor(ignore=count, max_tokens=99), [WAIT] * 5)
        assert [ignores(row) for row in out] == [True] * count + [False] * (6 - count)
    out = play(processor(ignore=1), [A, A, WAIT, A])
    assert [ignores(row) for row in out] == [True, True, True, False, False]


def test_a_word_that_the_policy_would_rather_choose_is_no_end():
    out = play(processor(ignore=1), [WAIT, WAIT, A], [LATE, EARLY, EARLY, LATE])
    assert [ignores(row) for row in out] == [True, True, False, False]
    assert torch.equal(out[2], EARLY[0])


def test_a_replayed_history_counts_every_word():
    direct = processor(ignore=2)(torch.tensor([[A]]), LATE)  # the prompt
    assert ignores(direct[0])
    for words, expected in ((1, True), (2, False)):
        made = processor(ignore=2, prompt_length=1)
        history = torch.tensor([[A, B, *[WAIT] * words]])
        assert ignores(made(history, EARLY)[0]) is expected
    made = processor(ignore=2, prompt_length=3)
    assert ignores(made(torch.tensor([[WAIT, WAIT, WAIT]]), EARLY)[0])  # words of the prompt do not count


def test_minimum():
    out = play(processor(min_tokens=3), [WAIT, A, WAIT, A])
    assert [ignores(row) for row in out] == [True, True, True, False, False]
    both = play(processor(min_tokens=2, ignore=1), [A, A, WAIT, A])  # the ignored end comes after the minimum
    assert [ignores(row) for row in both] == [True, True, True, False, False]


def test_after_the_end_nothing_is_changed():
    made = processor(ignore=5, min_tokens=50, max_tokens=50)
    out = play(made, [A, END, A, WAIT])
    assert [ignores(row) for row in out] == [True, True, False, False, False]
    assert torch.equal(out[2:], EARLY.expand(3, -1))


def test_an_end_in_the_prompt_is_none():
    assert ignores(play(processor(ignore=1), [])[0])  # the prompt of `play` ends with </think>


def test_a_span_that_opens_later():
    made = processor(ignore=1, max_tokens=4, start_ids=[C])
    out = play(made, [A, C, B, B])
    assert [ignores(row) for row in out] == [False, False, True, True, False]
    assert forces(out[4]) == END
    late = play(processor(max_tokens=2, start_ids=[C]), [A, A, A, C, END])
    assert [forces(row) for row in late] == [None] * 4 + [END, None]


# ---- texts of several tokens


def test_a_longer_continuation_is_forced_after_an_ignored_end():
    made = processor(wait_ids=[WAIT, B, C], ignore=2)
    out = play(made, [WAIT, B, C, WAIT, B, C, END])
    assert [forces(row) for row in out] == [None, B, C, None, B, C, None, None]
    assert [ignores(row) for row in out] == [True, False, False, True, False, False, False, False]
    assert made.trace()["forced"].tolist() == [[False, True, True, False, True, True, False, False]]
    natural = play(processor(wait_ids=[WAIT, B, C], ignore=2), [WAIT, A], LATE)
    assert [forces(row) for row in natural] == [None] * 3


def test_a_longer_continuation_between_other_budgets():
    made = processor(wait_ids=[WAIT, B, C], min_tokens=1, max_tokens=7, final_ids=[D])
    out = play(made, [WAIT, B, C, A, WAIT, A, A, END, D, A])  # the second Wait comes after the minimum
    assert [forces(row) for row in out] == [None, B, C, None, None, None, None, END, D, None, None]
    assert [ignores(row) for row in out] == [True] + [False] * 10
    assert made.metrics() == {"budget_ends_ignored": 1.0, "budget_cut": 1.0}


def test_a_forced_token_that_repeats_the_word():
    out = play(processor(wait_ids=[WAIT, WAIT], ignore=2), [WAIT, WAIT, A])
    assert [forces(row) for row in out] == [None, WAIT, None, None]
    assert [ignores(row) for row in out] == [True, False, True, True]  # the second one was forced, it stands for no end


# ---- the maximum


def test_maximum_with_final_text():
    made = processor(max_tokens=2, final_ids=[B, C])
    out = play(made, [A, A, END, B, C, A])
    assert [forces(row) for row in out] == [None, None, END, B, C, None, None]
    assert torch.equal(out[5:], EARLY.expand(2, -1))
    assert made.metrics() == {"budget_ends_ignored": 0.0, "budget_cut": 1.0}
    assert made.forced_ids == {END, B, C}


def test_a_delimiter_of_several_tokens():
    long = {"end_ids": [B, C, D], "max_tokens": 3}
    assert [forces(row) for row in play(processor(**long), [A, A, A, B, C, D, A])] == [None] * 3 + [B, C, D, None, None]
    begun = play(processor(**long), [A, B, C, D])  # what the row has begun is finished, not begun again
    assert [forces(row) for row in begun] == [None] * 3 + [D, None]
    ended = play(processor(**long), [B, C, D, A])
    assert [forces(row) for row in ended] == [None] * 5


def test_maximum_comes_before_ignoring():
    made = processor(wait_ids=[WAIT, B, C], ignore=9, max_tokens=2)
    assert [forces(row) for row in play(made, [WAIT, B, END])] == [None, B, END, None]
    exact = play(processor(min_tokens=2, max_tokens=2), [A, A, END])
    assert [ignores(row) for row in exact] == [True, True, False, False]
    assert forces(exact[2]) == END


def test_no_thinking_at_all():
    out = play(processor(max_tokens=0, final_ids=[B]), [END, B, A])
    assert [forces(row) for row in out] == [END, B, None, None]


def test_without_a_delimiter_the_sequence_ends():
    out = play(processor(end_ids=[], max_tokens=2), [A, A, EOS])
    assert [forces(row) for row in out] == [None, None, EOS, None]
    with_text = play(processor(end_ids=[], max_tokens=1, final_ids=[B]), [A, B, A])
    assert [forces(row) for row in with_text] == [None, B, None, None]
    assert ignores(play(processor(end_ids=[], ignore=1), [])[0]) is False  # </think> is a word like others
    assert play(processor(end_ids=[], ignore=1), [])[0, EOS] == -INF


def test_a_forced_token_that_is_forbidden_comes_all_the_same():
    forbidden = logits_of(a=1.0)
    assert [forces(row) for row in play(processor(max_tokens=1), [A, END], forbidden)][1] == END


def test_finished_rows_are_not_cut_and_disturb_nobody():
    made = processor(max_tokens=3)
    ids = torch.tensor([[A, EOS, PAD, PAD, PAD], [A, A, A, END, A], [A, END, A, A, A]])
    out = run(made, ids, EARLY.expand(3, 5, -1), prompt=torch.full((3, 2), A))
    assert [[forces(row) for row in rows] for rows in out] == [[None] * 5, [None, None, None, END, None], [None] * 5]
    assert made.metrics([2, 5, 5]) == {"budget_ends_ignored": 0.0, "budget_cut": pytest.approx(1 / 3)}


def test_metrics_count_ignored_ends():
    made = processor(ignore=2, max_tokens=9)
    assert made.metrics() == {}
    run(made, torch.tensor([[WAIT, WAIT, A], [A, WAIT, A], [A, A, A], [EOS, WAIT, A]]), EARLY.expand(4, 3, -1))
    assert made.metrics()["budget_ends_ignored"] == pytest.approx(3 / 4)


def test_the_trace_is_not_overwritten():
    ids, logits = random_rows(4, 8)
    made = processor(max_tokens=3, final_ids=[A, B])
    out = run(made, ids, logits)
    alone = torch.tensor([[forces(row) is not None for row in rows] for rows in out])
    assert torch.equal(made.trace()["forced"], alone)
    assert 0 < alone.sum() < alone.numel()


def test_a_bound_of_the_position_may_be_loose():
    """An engine whose rows are at different places says how far the furthest is."""
    ids, logits = random_rows(3, 10)
    options = {"max_tokens": 4, "ignore": 1, "wait_ids": [WAIT, A]}
    moved = as_an_engine(processor(**options), ids, logits, joins=[0, 6, 3])
    torch.testing.assert_close(moved, run(processor(**options), ids, logits), rtol=1e-12, atol=1e-12)


# ---- settings


def test_the_tokenizer_decides_what_ends():
    context = DecodingContext(temperature=0.6, tokenizer=word_tokenizer())
    made = BudgetForcingConfig(final_text="a b", think_start="<think>").processor(context)
    assert (made.wait_ids, made.end_ids, made.eos_ids, made.final_ids) == ((WAIT,), (END,), (EOS,), (A, B))
    assert (made.base, made.start_ids, made.ignore, made.max_tokens) == (0.6, (3,), 1, 32000)
    assert BudgetForcingConfig(end=None).processor(context).end_ids == ()
    without = DecodingContext(tokenizer=word_tokenizer(["<pad>", "<eos>", "Wait", "a"]))
    assert BudgetForcingConfig().processor(without).end_ids == ()
    assert make_processors([BudgetForcingConfig(ignore=0, max_tokens=None)], context) == []
    assert DECODING["budget_forcing"].forces


def test_forced_ids():
    context = DecodingContext(tokenizer=word_tokenizer())
    config = BudgetForcingConfig(wait_text="Wait a b", final_text="c d", max_tokens=5)
    assert config.forced_ids(context) == {A, B, C, D, END}
    assert BudgetForcingConfig(wait_text="Wait a", max_tokens=None).forced_ids(context) == {A}
    assert BudgetForcingConfig(max_tokens=None).forced_ids(context) == frozenset()
    assert BudgetForcingConfig(ignore=0, wait_text="Wait a", end=None).forced_ids(context) == {EOS}
    assert isinstance(config.forced_ids(context), frozenset)


def test_what_cannot_be_done_is_refused_in_words():
    tokenizer = word_tokenizer()
    context = DecodingContext(tokenizer=tokenizer)
    with pytest.raises(ValueError, match=r"end of thinking is 2 tokens .*set end to a text of one token"):
        BudgetForcingConfig(end="a b").processor(context)
    BudgetForcingConfig(end="a b", ignore=0).processor(context)  # a maximum alone may have it
    with pytest.raises(ValueError, match=r"wait_text holds token\(s\) \[2\]"):
        BudgetForcingConfig(wait_text="Wait </think>").processor(context)
    with pytest.raises(ValueError, match="base=-1.0"):
        processor(base=-1.0)
    tokenizer.eos_token = None
    with pytest.raises(ValueError, match="needs a way to end thinking"):
        BudgetForcingConfig(ignore=0, end=None).processor(context)
    with pytest.raises(ValueError, match="need an end to ignore"):
        BudgetForcingConfig(end=None, max_tokens=None).processor(context)
    with pytest.raises(ValueError, match="wait_text has no tokens"):
        processor(wait_ids=[], min_tokens=1)
