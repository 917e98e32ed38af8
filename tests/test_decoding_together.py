"""Every decoding method alone, and all together, inside `generate`: recorded log-probabilities, limits, no memory."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tests_support import build_sharp_model
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    LogitsProcessorList,
    PreTrainedTokenizerFast,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from rltok.entropy import entropy_stats
from rltok.sampling import DECODING, DecodingContext, SampledLogps, make_processors, sampling_control

NAMED = ("<pad>", "<eos>", "<stop>", "</think>", "wait", "Wait", "but", "But", "Alternatively")
WORDS = (*NAMED, *(f"w{i}" for i in range(len(NAMED), 48)))
PAD, EOS = 0, [1, 2, 40, 41, 42, 43, 44, 45]
VOCAB, PROMPT, NEW = len(WORDS), 6, 14
ENTROPIES = torch.tensor([[0.3, 1.0, 2.0, 2.6, 3.2]])
STATS = entropy_stats(ENTROPIES, torch.ones_like(ENTROPIES))

Methods = dict[str, dict[str, Any]]

ACTIVE: Methods = {
    "adaptive_temperature": {"tau": 0.5},
    "budget_forcing": {"min_tokens": 3, "max_tokens": 9, "ignore": 1},
    "cyclic_reflex": {"amplitude": 3.0, "period": 8.0},
    "reflection_suppression": {"strength": 2.0, "words": ["wait", "but"]},
    "thought_switching": {"alpha": 3.0, "beta": 4},
}
NEUTRAL: Methods = {
    "adaptive_temperature": {"tau": 0.0},
    "budget_forcing": {"min_tokens": 0, "max_tokens": None, "ignore": 0},
    "cyclic_reflex": {"amplitude": 0.0},
    "reflection_suppression": {"strength": 0.0, "words": ["wait"]},
    "thought_switching": {"alpha": 0.0},
}
"""method -> its limits; a method that is missing in either table fails"""
TOGETHER = ("cyclic_reflex", "thought_switching", "reflection_suppression", "budget_forcing", "adaptive_temperature")
CASES: dict[str, Methods] = {
    **{name: {name: options} for name, options in ACTIVE.items()},
    "forbidden words": {"reflection_suppression": {"strength": None, "words": ["wait", "but"]}},
    "a text of two tokens": {"budget_forcing": {"ignore": 2, "max_tokens": 9, "wait_text": "Wait but"}},
    "all": {name: ACTIVE[name] for name in TOGETHER},
    "all, words forbidden": {name: ACTIVE[name] for name in TOGETHER}
    | {"reflection_suppression": {"strength": None, "words": ["but"]}},
}
PLAIN = {"temperature": 1.0, "top_k": 0, "top_p": 1.0}
WARPED = {"temperature": 0.7, "top_k": 20, "top_p": 0.9}


@pytest.fixture(scope="module")
def tokenizer():
    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<pad>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", eos_token="<eos>", padding_side="left")


@pytest.fixture(scope="module")
def model():
    model = build_sharp_model(VOCAB, PAD, EOS)
    with torch.no_grad():  # a random model hardly ever says these
        model.lm_head.weight[3:9] *= 1.5
    return model


@pytest.fixture(scope="module")
def prompts():
    """8 left-padded prompts of 2 to 6 tokens, some with the marks and words that only count when generated."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, VOCAB, (8, PROMPT), generator=generator)
    ids[::2, -1] = WORDS.index("</think>")
    ids[1::4, -2] = WORDS.index("Wait")
    lengths = torch.tensor([6, 2, 3, 4, 5, 6, 2, 4])
    mask = (torch.arange(PROMPT) >= PROMPT - lengths[:, None]).long()
    return {"input_ids": ids.masked_fill(mask == 0, PAD), "attention_mask": mask}


def processors(methods: Methods, tokenizer, temperature: float):
    """By the way of a recipe: settings, modules, context, processors."""
    modules = [DECODING[name](**options) for name, options in methods.items()]
    return make_processors(modules, DecodingContext(temperature, STATS, tokenizer))


def sample(model, prompts, settings, seed=0, **kwargs):
    torch.manual_seed(seed)
    return model.generate(
        **prompts, **settings, do_sample=True, max_new_tokens=NEW, pad_token_id=PAD, eos_token_id=EOS,
        return_dict_in_generate=True, output_scores=True, **kwargs,
    )  # fmt: skip


def completions(sequences):
    """Generated ids of every row, up to and including the end token."""
    rows = sequences[:, PROMPT:].tolist()
    ends = [next((i for i, token in enumerate(row) if token in EOS), NEW) for row in rows]
    return [row[: end + 1] for row, end in zip(rows, ends, strict=True)]


def teacher_forced(sequences, logits, made, settings):
    """Rows of log-probabilities, from logits (B, steps, V) through the processors and the warpers of generate."""
    chain = LogitsProcessorList([*made, TemperatureLogitsWarper(settings["temperature"])])
    if settings["top_k"]:
        chain += [TopKLogitsWarper(settings["top_k"]), TopPLogitsWarper(settings["top_p"])]
    expected = []
    for step in range(logits.size(1)):
        scores = chain(sequences[:, : PROMPT + step], logits[:, step].float())
        expected.append(scores.log_softmax(-1).gather(1, sequences[:, PROMPT + step, None]))
    return [row[: len(ids)] for row, ids in zip(torch.cat(expected, 1).tolist(), completions(sequences), strict=True)]


@torch.no_grad()
def forward(model, sequences, attention_mask):
    """(B, steps, V) logits before every generated token, in one pass."""
    mask = torch.cat([attention_mask, torch.ones_like(sequences[:, PROMPT:])], dim=1)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    return model(sequences, attention_mask=mask, position_ids=positions).logits[:, PROMPT - 1 : -1]


def furthest(rows, others):
    assert [len(row) for row in rows] == [len(row) for row in others]
    return max(abs(a - b) for row, other in zip(rows, others, strict=True) for a, b in zip(row, other, strict=True))


def test_every_method_has_its_rows():
    assert set(ACTIVE) == set(NEUTRAL) == set(DECODING) == set(TOGETHER)
    assert not any(DECODING[name](**options).is_neutral for name, options in ACTIVE.items())
    assert all(DECODING[name](**options).is_neutral for name, options in NEUTRAL.items())


@pytest.mark.parametrize("settings", [PLAIN, WARPED], ids=["plain", "warped"])
@pytest.mark.parametrize("case", CASES)
def test_recorded_equals_teacher_forcing(model, tokenizer, prompts, case, settings):
    recorder = SampledLogps()
    with sampling_control(model, processors(CASES[case], tokenizer, settings["temperature"]), recorder):
        sequences = sample(model, prompts, settings).sequences
    ids = completions(sequences)
    recorded = recorder.finish(ids)
    lengths = {len(row) for row in ids}
    assert len(lengths) > 2 and max(lengths) == NEW  # rows end at different times, some at the limit

    logits = forward(model, sequences, prompts["attention_mask"])
    made = processors(CASES[case], tokenizer, settings["temperature"])
    assert furthest(recorded, teacher_forced(sequences, logits, made, settings)) < 1e-5
    assert furthest(recorded, teacher_forced(sequences, logits, [], settings)) > 0.05  # the method acted


@pytest.mark.parametrize("name", TOGETHER)
def test_every_method_acts_among_the_others(model, tokenizer, prompts, name):
    recorder = SampledLogps()
    with sampling_control(model, processors(CASES["all"], tokenizer, 0.7), recorder):
        sequences = sample(model, prompts, WARPED).sequences
    recorded = recorder.finish(completions(sequences))
    without = {other: options for other, options in CASES["all"].items() if other != name}
    logits = forward(model, sequences, prompts["attention_mask"])
    assert furthest(recorded, teacher_forced(sequences, logits, processors(without, tokenizer, 0.7), WARPED)) > 0.02


def test_scores_of_generate_are_the_recorded_ones_to_the_bit(model, tokenizer, prompts):
    recorder = SampledLogps()
    with sampling_control(model, processors(CASES["all"], tokenizer, 0.7), recorder):
        output = sample(model, prompts, WARPED)
    ids = completions(output.sequences)
    for row, values in enumerate(recorder.finish(ids)):
        assert values == [output.scores[t][row].log_softmax(-1)[token].item() for t, token in enumerate(ids[row])]


@pytest.mark.parametrize("settings", [PLAIN, WARPED], ids=["plain", "warped"])
@pytest.mark.parametrize(
    "methods",
    [
        *({name: options} for name, options in NEUTRAL.items()),
        NEUTRAL,
        {"budget_forcing": {"ignore": 0, "max_tokens": 10**6}},
        {"thought_switching": {"beta": 0}},
        {"cyclic_reflex": {"amplitude": 5.0, "windows": [[NEW, NEW + 1]]}},
    ],
    ids=lambda methods: ", ".join(methods) if len(methods) < 2 else "all",
)
def test_limits_are_plain_generate_to_the_bit(model, tokenizer, prompts, methods, settings):
    def run(made):
        recorder = SampledLogps()
        with sampling_control(model, made, recorder):
            output = sample(model, prompts, settings)
        return output, recorder.finish(completions(output.sequences))

    plain = sample(model, prompts, settings)
    context = DecodingContext(settings["temperature"], STATS, tokenizer)
    # also the processors themselves, which make_processors leaves out where they are neutral
    direct = [DECODING[name](**options).processor(context) for name, options in methods.items()]
    recorded = run([])[1]
    for made in (processors(methods, tokenizer, settings["temperature"]), [p for p in direct if p is not None]):
        output, logps = run(made)
        assert torch.equal(output.sequences, plain.sequences)
        assert all(torch.equal(a, b) for a, b in zip(output.scores, plain.scores, strict=True))
        assert logps == recorded
    active = run(processors(CASES["all"], tokenizer, settings["temperature"]))[0]
    assert not torch.equal(active.scores[1], plain.scores[1])


@pytest.mark.parametrize("case", CASES)
def test_a_second_call_inherits_nothing(model, tokenizer, prompts, case):
    made = processors(CASES[case], tokenizer, 0.7)
    other = {name: value.flip(0) for name, value in prompts.items()}
    recorder = SampledLogps()
    with sampling_control(model, made, recorder):
        first = sample(model, other, WARPED, seed=3).sequences
        recorder.finish(completions(first))
        second = sample(model, prompts, WARPED, seed=4).sequences
        used = recorder.finish(completions(second))
    fresh = SampledLogps()
    with sampling_control(model, processors(CASES[case], tokenizer, 0.7), fresh):
        again = sample(model, prompts, WARPED, seed=4).sequences
    assert torch.equal(second, again)
    assert used == fresh.finish(completions(again))


@pytest.mark.parametrize("case", CASES)
def test_rows_do_not_depend_on_their_neighbours(model, tokenizer, prompts, case):
    """The same completions in another batch, in another order: the same numbers for each row."""
    recorder = SampledLogps()
    with sampling_control(model, processors(CASES[case], tokenizer, 1.0), recorder):
        sequences = sample(model, prompts, PLAIN).sequences
    recorded = recorder.finish(completions(sequences))
    logits = forward(model, sequences, prompts["attention_mask"])
    for rows in ([3], [5, 0], [7, 6, 5, 4, 3, 2, 1, 0]):
        alone = teacher_forced(sequences[rows], logits[rows], processors(CASES[case], tokenizer, 1.0), PLAIN)
        assert furthest([recorded[row] for row in rows], alone) < 1e-5


def test_several_completions_per_prompt(model, tokenizer, prompts):
    recorder = SampledLogps()
    with sampling_control(model, processors(CASES["all"], tokenizer, 0.7), recorder):
        sequences = sample(model, prompts, WARPED, num_return_sequences=3).sequences
    assert sequences.size(0) == 24
    recorded = recorder.finish(completions(sequences))
    mask = prompts["attention_mask"].repeat_interleave(3, dim=0)
    made = processors(CASES["all"], tokenizer, 0.7)
    assert furthest(recorded, teacher_forced(sequences, forward(model, sequences, mask), made, WARPED)) < 1e-5


def test_peft_models(model, tokenizer, prompts):
    config = LoraConfig(target_modules=["q_proj", "v_proj"], r=2, task_type="CAUSAL_LM", init_lora_weights=False)
    torch.manual_seed(0)
    wrapped = get_peft_model(copy.deepcopy(model), config).eval()
    recorder = SampledLogps()
    with sampling_control(wrapped, processors(CASES["all"], tokenizer, 0.7), recorder):
        sequences = sample(wrapped, prompts, WARPED).sequences
    recorded = recorder.finish(completions(sequences))
    made = processors(CASES["all"], tokenizer, 0.7)
    logits = forward(wrapped, sequences, prompts["attention_mask"])
    assert furthest(recorded, teacher_forced(sequences, logits, made, WARPED)) < 1e-5
    plain = forward(model, sequences, prompts["attention_mask"])
    assert (plain - logits).abs().max() > 0.01  # the adapter is in both


def test_bfloat16_weights(model, tokenizer, prompts):
    """From generate's own logits, as a second pass in bfloat16 gives others; also: they are not overwritten."""
    small = copy.deepcopy(model).bfloat16()
    recorder = SampledLogps()
    with sampling_control(small, processors(CASES["all"], tokenizer, 0.7), recorder):
        output = sample(small, prompts, WARPED, output_logits=True)
    recorded = recorder.finish(completions(output.sequences))
    logits = torch.stack(output.logits, dim=1)
    made = processors(CASES["all"], tokenizer, 0.7)
    assert furthest(recorded, teacher_forced(output.sequences, logits, made, WARPED)) < 1e-5
    assert furthest(recorded, teacher_forced(output.sequences, logits, [], WARPED)) > 0.05
