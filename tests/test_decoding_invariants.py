"""What every decoding method must hold: neutral settings, plain settings, memory that belongs to rows."""

from __future__ import annotations

import json

import pytest
import torch
from decoding_support import EOS, PAD, VOCAB, WAIT, A, as_an_engine, random_rows, step_by_step, word_tokenizer
from tests_support import build_sharp_model
from transformers import (
    LogitsProcessorList,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from rltok.entropy import EntropyStats
from rltok.sampling import DECODING, DecodingContext, Rows, SampledLogps, make_processors, sampling_control

STATS = EntropyStats(*(torch.tensor(value) for value in (0.0, -3.0, 1.0, 1.0, 9.0)))
TOKENIZER = word_tokenizer()
SPAN = {"think_start": "<think>", "think_end": "f"}

CASES = {
    "adaptive_temperature": [{"tau": 0.4}, {"tau": 0.2, "form": "zscore"}],
    "cyclic_reflex": [
        {"amplitude": 2.0, "period": 5.5, "windows": [[1, 4], [6, 20]]},
        {"amplitude": 2.0, "period": 7.0, "phase": 0.3, "variants": "all", **SPAN},
    ],
    "thought_switching": [{"beta": 3}, {"beta": 4, "restart": "start"}, {"beta": 2, **SPAN}],
    "reflection_suppression": [
        {"words": ["wait", "but"]},
        {"words": ["wait", "a", "b"], "strength": 1.5},
        {"words": ["wait", "a", "b"], "only_thinking": True, **SPAN},
    ],
    "budget_forcing": [
        {"ignore": 2, "max_tokens": 9},
        {"min_tokens": 4, "ignore": 0, "max_tokens": 7, "wait_text": "a b c", "final_text": "d e"},
        {"ignore": 0, "max_tokens": 5, "end": "e f", "final_text": "a"},
        {"ignore": 1, "max_tokens": 8, "end": None, "think_start": "<think>"},
    ],
}
"""method -> settings that act on random rows of 12 tokens"""
QUIET = {"words": ("wait", "but")}
NEUTRAL = {
    "adaptive_temperature": [{"tau": 0.0}],
    "cyclic_reflex": [{"amplitude": 0.0}],
    "thought_switching": [{"alpha": 0.0}, {"beta": 0}],
    "reflection_suppression": [{"strength": 0.0, **QUIET}, {"strength": 0.0, "only_thinking": True, **QUIET}],
    "budget_forcing": [{"min_tokens": 0, "ignore": 0, "max_tokens": None}],
}
REFUSED = [
    ("adaptive_temperature", {"tau": 1.5}, "tau=1.5"),
    ("cyclic_reflex", {"amplitude": -1.0}, "amplitude=-1.0"),
    ("cyclic_reflex", {"amplitude": float("nan")}, "amplitude=nan"),
    ("cyclic_reflex", {"period": 0.0}, "period=0.0"),
    ("cyclic_reflex", {"phase": float("inf")}, "phase=inf"),
    ("cyclic_reflex", {"windows": ((5, 5),)}, r"windows has \[5, 5\]"),
    ("cyclic_reflex", {"windows": ((-1, 5),)}, "windows"),
    ("cyclic_reflex", {"words": ()}, "words is empty"),
    ("thought_switching", {"alpha": -0.5}, "alpha=-0.5"),
    ("thought_switching", {"alpha": float("inf")}, "alpha=inf"),
    ("thought_switching", {"beta": -1}, "beta=-1"),
    ("thought_switching", {"restart": "never"}, "restart='never' is unknown; allowed: 'thought', 'start'"),
    ("thought_switching", {"words": ()}, "words is empty"),
    ("reflection_suppression", {"strength": -1.0}, "strength=-1.0"),
    ("reflection_suppression", {"strength": float("inf")}, "null forbids"),
    ("reflection_suppression", {"words": ()}, "words is empty"),
    ("budget_forcing", {"min_tokens": -1}, "min_tokens=-1"),
    ("budget_forcing", {"ignore": -2}, "ignore=-2"),
    ("budget_forcing", {"min_tokens": 9, "max_tokens": 8}, "max_tokens=8 is below min_tokens=9"),
    ("budget_forcing", {"wait_text": ""}, "wait_text=''"),
]
ALL = [pytest.param(name, options, id=f"{name}-{i}") for name, sets in CASES.items() for i, options in enumerate(sets)]


def build(name, options, temperature=0.7):
    context = DecodingContext(temperature=temperature, entropy_stats=STATS, tokenizer=TOKENIZER)
    return DECODING[name](**options).processor(context)


def test_every_method_is_here():
    assert set(CASES) == set(NEUTRAL) == set(DECODING) == {name for name, _, _ in REFUSED}


@pytest.mark.parametrize(("name", "options"), [(name, options) for name in NEUTRAL for options in NEUTRAL[name]])
def test_neutral_settings_return_the_very_tensor(name, options):
    config = DECODING[name](**options)
    assert config.is_neutral
    assert not config.restricts
    context = DecodingContext(temperature=0.7, entropy_stats=STATS, tokenizer=TOKENIZER)
    assert make_processors([config], context) == []
    assert config.forced_ids(context) == frozenset()
    processor = config.processor(context)
    ids, logits = random_rows(2, 3)
    before = logits.clone()
    if processor is not None:
        assert processor.is_neutral
        for t in range(3):
            scores = logits[:, t]
            assert processor(ids[:, : 1 + t], scores) is scores
    assert torch.equal(logits, before)


@pytest.mark.parametrize(("name", "options", "words"), REFUSED)
def test_wrong_settings_are_refused(name, options, words):
    with pytest.raises(ValueError, match=words):
        DECODING[name](**options)


@pytest.mark.parametrize(("name", "options"), ALL)
def test_settings_make_an_equal_processor_again(name, options):
    processor = build(name, options)
    again = type(processor)(**json.loads(json.dumps(processor.settings())))
    assert json.dumps(again.settings()) == json.dumps(processor.settings())
    assert again.memory == processor.memory
    ids, logits = random_rows(5, 12)
    expected = step_by_step(processor, ids, logits)
    assert not torch.equal(expected, logits)  # it does something here
    assert torch.equal(step_by_step(again, ids, logits), expected)


@pytest.mark.parametrize(("name", "options"), ALL)
def test_rows_join_move_and_leave(name, options):
    """Rows at different positions, moved at every step, get what each row gets by itself."""
    ids, logits = random_rows(6, 12)
    alone = [step_by_step(build(name, options), ids[i : i + 1], logits[i : i + 1])[0] for i in range(6)]
    moved = as_an_engine(build(name, options), ids, logits, joins=[0, 3, 1, 0, 7, 4])
    torch.testing.assert_close(moved, torch.stack(alone), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(step_by_step(build(name, options), ids, logits), moved, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("name", "options"), ALL)
def test_memory_is_written_in_place(name, options):
    """An engine may hold the columns as views of larger tensors."""
    processor, (ids, logits) = build(name, options), random_rows(4, 12)
    columns = processor.columns(4, ids.device)
    memory = dict(columns)
    assert len({values.data_ptr() for values in memory.values()}) == len(memory)  # no two share their memory
    for t in range(12):
        rows = Rows(torch.full((4,), t), ids[:, t - 1], t)
        if t:
            processor.observe(rows, columns)
        processor.apply(logits[:, t].clone(), rows, columns)
        assert all(columns[key] is values for key, values in memory.items())


@pytest.mark.parametrize(("name", "options"), ALL)
def test_left_padding_does_not_count(name, options):
    ids, logits = random_rows(3, 12)
    short = step_by_step(build(name, options), ids, logits, prompt=torch.full((3, 1), A))
    marks = torch.tensor([[PAD, PAD, PAD, A], [2, 3, WAIT, 2], [PAD, EOS, 15, 3]])  # marks of a span, of other turns
    assert torch.equal(step_by_step(build(name, options), ids, logits, prompt=marks), short)


@pytest.mark.parametrize(("name", "options"), [case for case in ALL if build(*case.values).memory != "logits"])
def test_a_replayed_history_equals_single_steps(name, options):
    processor = build(name, options)
    ids, logits = random_rows(5, 12)
    expected = step_by_step(processor, ids, logits)
    jumping = build(name, options)
    jumping.prompt_length = 2
    for t in (0, 4, 5, 11, 3, 4):  # forth, one further, forth, back
        out = jumping(torch.cat([torch.full((5, 2), PAD), ids[:, :t]], 1), logits[:, t])
        assert torch.equal(out, expected[:, t]), t


@pytest.mark.parametrize(("name", "options"), ALL)
def test_a_direct_call_leaves_the_callers_tensor(name, options):
    processor = build(name, options)
    ids, logits = random_rows(4, 12)
    before = logits.clone()
    prompt = torch.full((4, 2), PAD)
    for t in range(12):
        processor(torch.cat([prompt, ids[:, :t]], 1), logits[:, t])
    assert torch.equal(logits, before)


@pytest.mark.parametrize(("name", "options"), ALL)
def test_forbidden_tokens_and_finite_rows(name, options):
    ids, logits = random_rows(4, 12)
    logits[:, :, [EOS, A]] = -torch.inf
    out = step_by_step(build(name, options), ids, logits)
    assert not out.isnan().any()
    assert (out.amax(-1) > -torch.inf).all()
    if not DECODING[name].forces:
        assert (out[:, :, [EOS, A]] == -torch.inf).all()


# ---- in generate

NEW, PROMPT = 12, 6
SETTINGS = {"do_sample": True, "max_new_tokens": NEW, "pad_token_id": PAD, "eos_token_id": EOS, "temperature": 0.7}
WARPED = {**SETTINGS, "top_k": 12, "top_p": 0.9}


@pytest.fixture(scope="module")
def lm():
    return build_sharp_model(VOCAB, PAD, EOS, layers=1)


@pytest.fixture(scope="module")
def prompts():
    """8 left-padded prompts of 2 to 6 tokens, with marks of a thinking span in them."""
    ids = torch.randint(2, VOCAB, (8, PROMPT), generator=torch.Generator().manual_seed(1))
    mask = (torch.arange(PROMPT) >= PROMPT - torch.tensor([6, 2, 3, 4, 5, 6, 2, 4])[:, None]).long()
    return {"input_ids": ids.masked_fill(mask == 0, PAD), "attention_mask": mask}


def sample(model, prompts, settings, seed=0, **changes):
    torch.manual_seed(seed)
    return model.generate(**prompts, **settings, **changes, return_dict_in_generate=True, output_scores=True)


def completions(sequences):
    rows = sequences[:, PROMPT:].tolist()
    return [row[: row.index(EOS) + 1] if EOS in row else row for row in rows]


def teacher_forced(model, prompts, sequences, processors, settings, copies=1):
    """(B, T, V) log-probabilities: logits of one pass, then the processors step by step."""
    mask = prompts["attention_mask"].repeat_interleave(copies, 0)
    mask = torch.cat([mask, torch.ones_like(sequences[:, PROMPT:])], dim=1)
    with torch.no_grad():
        logits = model(sequences, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp(min=0)).logits
    chain = LogitsProcessorList([*processors, TemperatureLogitsWarper(settings["temperature"])])
    if "top_k" in settings:
        chain += [TopKLogitsWarper(settings["top_k"]), TopPLogitsWarper(settings["top_p"])]
    steps = range(PROMPT, sequences.size(1))
    return torch.stack([chain(sequences[:, :t], logits[:, t - 1]).log_softmax(-1) for t in steps], dim=1)


@pytest.mark.parametrize("settings", [SETTINGS, WARPED], ids=["plain", "warped"])
@pytest.mark.parametrize(("name", "options"), [*ALL, pytest.param("all", {}, id="all")])
def test_recorded_equals_teacher_forcing(lm, prompts, name, options, settings):
    def chain():
        return [build(key, CASES[key][0]) for key in sorted(CASES, key="adaptive_temperature".__eq__)]

    make = chain if name == "all" else lambda: [build(name, options)]
    recorder, processors = SampledLogps(), make()
    with sampling_control(lm, processors, recorder):
        sequences = sample(lm, prompts, settings, num_return_sequences=2).sequences
    ids = completions(sequences)
    assert len({len(row) for row in ids}) > 1  # some rows finish before others
    recorded = recorder.finish(ids)
    expected = teacher_forced(lm, prompts, sequences, make(), settings, copies=2)
    for row, tokens in enumerate(ids):
        steps = expected[row, range(len(tokens)), tokens]
        torch.testing.assert_close(torch.tensor(recorded[row]), steps, atol=1e-5, rtol=0)
    lengths = [len(row) for row in ids]
    for processor in processors:
        assert all(0 <= value < 100 for value in processor.metrics(lengths).values())
        for values in processor.trace().values():
            assert values.shape == (16, sequences.size(1) - PROMPT)


@pytest.mark.parametrize(("name", "options"), [(name, options) for name in NEUTRAL for options in NEUTRAL[name]])
def test_neutral_generation_is_bit_identical(lm, prompts, name, options):
    plain = sample(lm, prompts, WARPED)
    with sampling_control(lm, [p for p in [build(name, options)] if p is not None]):
        neutral = sample(lm, prompts, WARPED)
    assert torch.equal(plain.sequences, neutral.sequences)
    assert all(torch.equal(a, b) for a, b in zip(plain.scores, neutral.scores, strict=True))


@pytest.mark.parametrize("controlled", [True, False])
@pytest.mark.parametrize(("name", "options"), ALL)
def test_a_second_call_inherits_nothing(lm, prompts, name, options, controlled):
    """The second call's prompt is the first call's output, so that its ids look like one more step of the first."""

    def generate(processor, start, seed):
        ids = {"input_ids": start, "attention_mask": torch.ones_like(start)}
        if controlled:
            with sampling_control(lm, [processor]):
                return sample(lm, ids, SETTINGS, seed)
        return sample(lm, ids, SETTINGS, seed, logits_processor=LogitsProcessorList([processor]))

    used = build(name, options)
    first = generate(used, prompts["input_ids"][:1].repeat(3, 1), seed=0).sequences
    if not controlled:
        first = torch.cat([first[:, :1], first], dim=1)  # without `begin`, a call that continues the last one is one
    again, fresh = generate(used, first, seed=5), generate(build(name, options), first, seed=5)
    assert torch.equal(again.sequences, fresh.sequences)
    assert all(torch.equal(a, b) for a, b in zip(again.scores, fresh.scores, strict=True))
