"""The rollout loop with what is set around it: strings that stop, penalties, caches, hooks, adapters, precisions."""

from __future__ import annotations

import itertools
from collections import Counter
from contextlib import contextmanager, nullcontext

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from peft import LoraConfig, get_peft_model
from test_fast_loop import (
    ENDS,
    FAMILIES,
    PAD,
    VOCAB,
    build,
    close,
    generate,
    greedy,
    keys_for,
    padded,
    processors_for,
    random_prompts,
    sampled,
    teacher_forced,
)
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from rltok.fast import BlockCache, LoopProgress, generate_rows, unpad
from rltok.fast.cache import BlockLayer
from rltok.sampling import BudgetForcingLogitsProcessor, RolloutProcessor
from rltok.steering import SteeringVector, steered

LETTERS = "abcdef"
TOKENS = ["<pad>", "<eos>", "<stop>", *LETTERS, *("".join(pair) for pair in itertools.product(LETTERS, repeat=2))]
TOKENS += ["xyz", "xy", " a"][: VOCAB - len(TOKENS)]


def letter_tokenizer():
    """Texts of letters, one or two in a token, so that a string may end inside of a token."""
    core = Tokenizer(models.BPE({token: i for i, token in enumerate(TOKENS)}, []))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", eos_token="<eos>", padding_side="left")


def text_of(ids):
    return "".join(TOKENS[token] for token in ids)


# ---- stop strings


def strings_within(model, prompts, settings):
    """Strings that some plain completions hold: over two tokens, inside of one, begun by a prompt."""
    plain = generate_rows(model, prompts, None, settings).ids
    long, second = sorted({tuple(ids) for ids in plain}, key=len)[-2:][::-1]
    begun = text_of(prompts[4][-1:])[-1:] + text_of(plain[4][:1])[:1]
    return text_of(long[2:5])[1:-1], text_of(second[6:8])[1:3], begun


STOPPING = {
    "plain": {},
    "three rows at a time": {"max_rows": 3},
    "ended rows stay": {"compact_share": 1.0, "max_rows": 5},
    "at least 9 tokens": {"min_new_tokens": 9, "max_rows": 5},
    "no end token": {"end_ids": ()},
}


@pytest.mark.parametrize("options", STOPPING.values(), ids=STOPPING)
@pytest.mark.parametrize("family", ["qwen3", "mistral"])
def test_stop_strings_end_the_rows_that_generate_ends(family, options):
    model, tokenizer, prompts = build(family), letter_tokenizer(), random_prompts(copies=2)
    base = {"end_ids": (1, 2, 7, 9), **options}
    strings = strings_within(model, prompts, greedy(**base))
    found = generate_rows(model, prompts, None, greedy(**base, stop_strings=strings), tokenizer=tokenizer).ids
    own = {"stop_strings": list(strings), "tokenizer": tokenizer}
    for prompt, ids in zip(prompts, found, strict=True):
        assert ids == generate(model, [prompt], greedy(**base), **own)[0][0]
    output = model.generate(
        **padded(prompts),
        **own,
        do_sample=False,
        max_new_tokens=24,
        min_new_tokens=base.get("min_new_tokens"),
        eos_token_id=list(base["end_ids"]),
        pad_token_id=PAD,
    )[:, max(map(len, prompts)) :]
    for ids, row in zip(found, output.tolist(), strict=True):
        assert row == ids + [PAD] * (len(row) - len(ids))
    plain = generate_rows(model, prompts, None, greedy(**base)).ids
    by_string = [len(ids) < len(whole) for ids, whole in zip(found, plain, strict=True)]
    assert any(by_string) and not all(by_string)
    for ids, stops in zip(found, by_string, strict=True):
        assert not stops or any(string in text_of(ids[-4:]) for string in strings) or len(ids) == 1


def test_rows_stop_in_every_way():
    model, prompts = build("qwen3"), random_prompts(copies=2)
    settings = greedy(end_ids=(1, 2, 7, 9))
    strings = strings_within(model, prompts, settings)
    found = generate_rows(
        model, prompts, None, greedy(end_ids=(1, 2, 7, 9), stop_strings=strings), tokenizer=letter_tokenizer()
    ).ids
    ways = Counter("token" if ids[-1] in (1, 2, 7, 9) else "length" if len(ids) == 24 else "string" for ids in found)
    assert set(ways) == {"token", "length", "string"}, ways
    assert min(map(len, found)) == 1  # the prompt began the string


def test_a_string_stops_a_row_before_its_minimum():
    model, prompts, tokenizer = build("qwen3"), random_prompts((9,)), letter_tokenizer()
    first = text_of(generate_rows(model, prompts, None, greedy(min_new_tokens=9)).ids[0][:2])
    settings = greedy(min_new_tokens=9, stop_strings=(first,))
    assert len(generate_rows(model, prompts, None, settings, tokenizer=tokenizer).ids[0]) == 2


def test_stop_strings_need_a_tokenizer():
    with pytest.raises(ValueError, match=r"stop_strings=\['ab'\].*pass the model's tokenizer"):
        generate_rows(build("llama"), [[3]], None, greedy(stop_strings=("ab",)))


# ---- repetition penalty


@pytest.mark.parametrize("options", [{}, {"max_rows": 3}, {"min_new_tokens": 6, "compact_share": 0.5}], ids=str)
@pytest.mark.parametrize("penalty", [1.3, 0.8])
def test_repetition_penalty_equals_generate(penalty, options):
    model, prompts = build("qwen3"), random_prompts(copies=2)
    settings = greedy(**options, end_ids=(1, 2, 7, 9), repetition_penalty=penalty)
    found = generate_rows(model, prompts, None, settings)
    expected, logps = generate(model, prompts, settings, repetition_penalty=penalty)
    assert found.ids == expected
    close(found.logps, logps)
    for row, prompt in enumerate(prompts):
        assert generate(model, [prompt], settings, repetition_penalty=penalty)[0] == [found.ids[row]]
    assert found.ids != generate_rows(model, prompts, None, greedy(**options, end_ids=(1, 2, 7, 9))).ids


def test_a_pad_token_in_the_text_is_an_id_like_others():
    """Whether the pad token counts follows from the text, never from the width of the batch."""
    model = build("qwen3")
    prompts = [[5, PAD, 7], [9] * 8]
    settings = greedy(repetition_penalty=5.0)
    found = generate_rows(model, prompts, None, settings).ids
    assert found[:1] == generate(model, prompts[:1], settings, repetition_penalty=5.0)[0]
    assert found[0] != generate_rows(model, [[5, 8, 7]], None, settings).ids[0]


def test_the_penalty_comes_before_the_processors():
    model, prompts = build("qwen3"), random_prompts(copies=2)
    methods = {"reflection_suppression": {"strength": 2.0, "words": ["wait", "but"]}, "budget_forcing": {"ignore": 2}}
    settings = greedy(repetition_penalty=1.4, min_new_tokens=3, max_rows=5)
    found = generate_rows(model, prompts, None, settings, processors_for(methods, 1.0))
    expected, logps = generate(model, prompts, settings, processors_for(methods, 1.0), repetition_penalty=1.4)
    assert found.ids == expected
    close(found.logps, logps)


def test_penalty_and_strings_do_not_depend_on_the_company():
    model, prompts, tokenizer = build("qwen3"), random_prompts(copies=6), letter_tokenizer()
    options = {"repetition_penalty": 1.2, "stop_strings": ("abc", "fe", "dd")}
    whole = generate_rows(model, prompts, keys_for(prompts), sampled(**options), tokenizer=tokenizer)
    assert whole.ids != generate_rows(model, prompts, keys_for(prompts), sampled()).ids
    for limits in ({"max_rows": 1}, {"max_rows": 7, "compact_share": 0.5}):
        again = generate_rows(model, prompts, keys_for(prompts), sampled(**options, **limits), tokenizer=tokenizer)
        assert again.ids == whole.ids, limits


# ---- progress, padding, caches


def test_progress_is_told_once_for_every_step():
    model, prompts = build("qwen3"), random_prompts(copies=4)
    told: list[LoopProgress] = []
    found = generate_rows(model, prompts, keys_for(prompts), sampled(), on_progress=told.append)
    lengths = torch.tensor([len(ids) for ids in found.ids])
    assert [now.tokens for now in told] == [int(lengths.clamp(max=n + 1).sum()) for n in range(int(lengths.max()))]
    assert [now.ended for now in told] == [int((lengths <= n + 1).sum()) for n in range(len(told))]
    assert {now.rows for now in told} == {24}
    seconds = [now.seconds for now in told]
    assert seconds == sorted(seconds) and seconds[0] > 0 and seconds[-1] <= found.metrics.seconds
    few: list[LoopProgress] = []
    generate_rows(model, prompts, keys_for(prompts), sampled(max_rows=3), on_progress=few.append)
    assert len(few) > len(told)
    assert (few[-1].ended, few[-1].tokens) == (24, found.metrics.tokens)
    late: list[LoopProgress] = []
    stay = generate_rows(model, prompts, keys_for(prompts), sampled(compact_share=1.0), on_progress=late.append)
    assert [now.tokens for now in late] == [now.tokens for now in told]  # rows that ended get no tokens
    assert stay.metrics.tokens == found.metrics.tokens


def test_unpad():
    prompts = random_prompts()
    inputs = padded(prompts)
    assert unpad(**inputs) == prompts
    assert unpad(inputs["input_ids"], inputs["attention_mask"].bool()) == prompts
    assert unpad(torch.zeros(0, 4), torch.zeros(0, 4)) == []
    assert unpad(torch.tensor([[PAD, PAD, 5]]), torch.tensor([[0, 1, 1]])) == [[PAD, 5]]  # the mask decides
    ids = torch.arange(8).view(2, 4)
    for row in ([1, 1, 1, 0], [0, 1, 0, 1]):
        with pytest.raises(ValueError, match="row 1 of attention_mask has padding behind a token"):
            unpad(ids, torch.tensor([[0, 1, 1, 1], row]))
    with pytest.raises(ValueError, match=r"input_ids have shape \(2, 4\), attention_mask \(2, 3\)"):
        unpad(ids, torch.ones(2, 3))


class CountingCache(BlockCache):
    """Changes nothing."""

    made: list[CountingCache] = []

    def __init__(self, config, rows=0, block=128):
        super().__init__(config, rows, block=block)
        self.calls = Counter(made_for=rows, block=block)
        self.made.append(self)

    def __getattribute__(self, name):
        if name in ("of_row", "insert", "keep", "trim", "reserve", "take_peak", "update"):
            self.calls[name] += 1
        return super().__getattribute__(name)


def test_another_cache_does_the_work():
    model, prompts = build("mistral"), random_prompts(copies=3)
    settings = sampled(max_rows=7, cache_block=3, prefill_chunk=20)
    plain = generate_rows(model, prompts, keys_for(prompts), settings)
    CountingCache.made = []
    found = generate_rows(model, prompts, keys_for(prompts), settings, cache=CountingCache)
    assert found.ids == plain.ids and found.logps == plain.logps
    assert found.metrics.peak_cache_bytes == plain.metrics.peak_cache_bytes
    rows, *of_prompts = CountingCache.made
    assert rows.calls["block"] == 3 and len(of_prompts) >= 2
    assert all(rows.calls[name] > 0 for name in ("insert", "keep", "trim", "reserve", "take_peak", "update"))
    assert sum(cache.calls["of_row"] for cache in of_prompts) == len({tuple(prompt) for prompt in prompts})


@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_peak_bytes_are_those_of_all_buffers_with_the_second_copy(family, monkeypatch):
    """Counted anew from the buffers that are there each time that one is renewed."""
    peaks, layers = [0], []
    renew, make = BlockLayer._renewed, BlockLayer.__init__

    def renewed(layer, old, *args):
        new = renew(layer, old, *args)
        alive = [x for held in layers if held.is_initialized for x in (held.keys, held.values) if x is not None]
        peaks.append(sum(x.nbytes for x in alive) + new.nbytes)
        return new

    def init(layer, *args):
        make(layer, *args)
        layers.append(layer)

    monkeypatch.setattr(BlockLayer, "_renewed", renewed)
    monkeypatch.setattr(BlockLayer, "__init__", init)
    settings = greedy(max_new_tokens=40, end_ids=(), cache_block=8)
    prompts = random_prompts((9,), copies=4)
    peak = generate_rows(build(family), prompts, None, settings).metrics.peak_cache_bytes
    of_prompt = 3 * 2 * 2 * 8 * 4 * 9  # its buffers, which the list of layers keeps alive here
    assert max(peaks) - of_prompt <= peak <= max(peaks)
    whole = sum(x.nbytes for layer in layers for x in (layer.keys, layer.values)) - of_prompt
    assert whole < peak <= whole * 7 / 6  # one of six tensors is double, not all


# ---- scores without a token


class Forbids(RolloutProcessor):
    """No token for a row that has so many."""

    def __init__(self, after, value=-torch.inf):
        self.after, self.value = after, value

    def apply(self, scores, rows, columns):
        scores[rows.position == self.after] = self.value
        return scores


@pytest.mark.parametrize("value", [-torch.inf, torch.nan])
@pytest.mark.parametrize("options", [{}, {"temperature": 0.0}, {"stop_strings": ("abc",), "repetition_penalty": 1.1}])
def test_a_row_without_any_token_is_refused_by_name(options, value):
    model, prompts = build("qwen3"), random_prompts()
    settings = sampled(end_ids=(), **options)
    with pytest.raises(ValueError, match=r"completion \d, after 3 tokens: .*no token can be drawn"):
        generate_rows(model, prompts, keys_for(prompts), settings, [Forbids(3, value)], tokenizer=letter_tokenizer())


def test_a_row_that_has_ended_needs_no_token():
    model, prompts = build("qwen3"), random_prompts((9, 3), copies=2)
    strings = ("a",)
    plain = generate_rows(
        model, prompts, keys_for(prompts), sampled(end_ids=(), stop_strings=strings), tokenizer=letter_tokenizer()
    )
    shortest = min(len(ids) for ids in plain.ids)
    assert shortest < max(len(ids) for ids in plain.ids)

    class ForbidsEnded(RolloutProcessor):
        """A row that stays where it was has ended."""

        def columns(self, rows, device):
            return {"before": torch.full((rows,), -1, device=device)}

        def apply(self, scores, rows, columns):
            scores[rows.position == columns["before"]] = -torch.inf
            columns["before"].copy_(rows.position)
            return scores

    settings = sampled(end_ids=(), stop_strings=strings, compact_share=1.0)
    found = generate_rows(model, prompts, keys_for(prompts), settings, [ForbidsEnded()], tokenizer=letter_tokenizer())
    assert found.ids == plain.ids


# ---- last values


BUDGET = {"wait_ids": (5,), "end_ids": (3,), "eos_ids": ENDS, "min_tokens": 2, "max_tokens": 9, "ignore": 2}


def forcing(**changes):
    return BudgetForcingLogitsProcessor(**{**BUDGET, **changes})


@pytest.mark.parametrize(
    "options", [{}, {"max_rows": 5}, {"compact_share": 1.0}, {"compact_share": 0.4, "max_rows": 7}]
)
def test_metrics_of_processors_equal_those_of_generate(options):
    model, prompts = build("qwen3"), random_prompts(copies=4)
    with torch.no_grad():
        model.lm_head.weight[[3, 5]] *= 2
    settings = greedy(end_ids=ENDS, **options)
    theirs, ours = forcing(), forcing()
    expected, _ = generate(model, prompts, settings, [theirs])
    found = generate_rows(model, prompts, None, settings, [ours])
    assert found.ids == expected
    lengths = [len(ids) for ids in found.ids]
    metrics = ours.metrics(lengths)
    assert metrics == theirs.metrics(lengths) == theirs.metrics()
    assert metrics == ours.metrics()
    assert metrics["budget_ends_ignored"] > 0 and 0 < metrics["budget_cut"] < 1
    for name in ("ignored", "cut_at"):
        assert torch.equal(ours.final()[name], theirs.final()[name]), name  # in the order of the rows


def test_what_comes_after_a_row_has_ended_does_not_count():
    """A string stops rows that generate goes on to pad: those come to the greatest budget there, but not as texts."""
    model, prompts, tokenizer = build("qwen3"), random_prompts(copies=4), letter_tokenizer()
    with torch.no_grad():
        model.lm_head.weight[[3, 5]] *= 2
    whole = generate_rows(model, prompts, None, greedy(), [forcing()]).ids
    strings = tuple(text_of(ids[3:5]) for ids in whole[::4] if len(ids) > 9)[:2] + (text_of([5, 5]),)
    theirs, ours = forcing(), forcing()
    settings = greedy(stop_strings=strings, compact_share=0.5, max_rows=7)
    found = generate_rows(model, prompts, None, settings, [ours], tokenizer=tokenizer).ids
    generate(model, prompts, settings, [theirs], stop_strings=list(strings), tokenizer=tokenizer)
    lengths = [len(ids) for ids in found]
    assert ours.metrics(lengths) == ours.metrics() == theirs.metrics(lengths)
    beyond = theirs.metrics()
    assert beyond["budget_cut"] > ours.metrics()["budget_cut"]
    assert beyond["budget_ends_ignored"] > ours.metrics()["budget_ends_ignored"]


def test_no_last_values_are_left_of_an_earlier_call():
    model, made = build("qwen3"), forcing()
    generate_rows(model, random_prompts(), None, greedy(), [made])
    assert set(made.final()) == set(made.kept)
    generate_rows(model, [], None, greedy(), [made])
    assert made.final() == {} and made.metrics() == {}
    generate(model, random_prompts(), greedy(), [made])
    assert made.final()["ignored"].shape == (6,)


# ---- around the model


def with_lora(model):
    torch.manual_seed(3)
    config = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj", "down_proj"])
    adapted = get_peft_model(model, config)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.3)
    return adapted.eval()


def in_training(model):
    model.train()
    model.gradient_checkpointing_enable()
    model.config.use_cache = False
    return model


@contextmanager
def mixed_precision(model):
    AcceleratorState._reset_state(True)
    accelerator = Accelerator(mixed_precision="bf16", cpu=True)
    try:
        yield accelerator.unwrap_model(accelerator.prepare(model))
    finally:
        AcceleratorState._reset_state(True)


@contextmanager
def steering(model):
    vectors = [SteeringVector(1, torch.randn(32, generator=torch.Generator().manual_seed(5)), 1.5)]
    with steered(model, vectors):
        yield model


@contextmanager
def autocast(model):
    with torch.autocast("cpu", torch.bfloat16):
        yield model


AROUND = {
    "steering": steering,
    "lora": lambda model: nullcontext(with_lora(model)),
    "autocast": autocast,
    "mixed precision": mixed_precision,
    "training with checkpointing": lambda model: nullcontext(in_training(model)),
    "steered lora": lambda model: steering(with_lora(model)),
}
OPTIONS = {
    "plain": {},
    "few rows in blocks": {"max_rows": 4, "cache_block": 2},
    "waves in chunks": {"max_rows": 5, "compact_share": 1.0, "prefill_chunk": 4},
    "everything": {"max_rows": 5, "min_new_tokens": 4, "repetition_penalty": 1.2, "stop_strings": ("abc", "fe", "dd")},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("around", AROUND.values(), ids=AROUND)
def test_every_option_holds_around_the_model(around, options):
    prompts, tokenizer = random_prompts(copies=2), letter_tokenizer()
    settings = greedy(end_ids=(1, 2, 7, 9), **options)
    own = {"repetition_penalty": settings.repetition_penalty}
    if settings.stop_strings:
        own |= {"stop_strings": list(settings.stop_strings), "tokenizer": tokenizer}
    plain = generate_rows(build("qwen3"), prompts, None, settings, tokenizer=tokenizer)
    with around(build("qwen3")) as model:
        training = model.training
        found = generate_rows(model, unpad(**padded(prompts)), None, settings, tokenizer=tokenizer)
        assert model.training == training
        model.eval()
        expected, logps = zip(*(generate(model, [prompt], settings, **own) for prompt in prompts), strict=True)
        together, _ = generate(model, prompts, settings, **own)
    assert found.ids == [rows[0] for rows in expected]
    assert found.ids == [ids[: len(own_ids)] for ids, own_ids in zip(together, found.ids, strict=True)]
    half = around in (autocast, mixed_precision)
    close(found.logps, [rows[0] for rows in logps], tolerance=0.1 if half else 1e-5)
    same = around is AROUND["training with checkpointing"]
    assert (found.ids == plain.ids and found.logps == plain.logps) == same


@pytest.mark.parametrize("around", [autocast, mixed_precision], ids=["autocast", "mixed precision"])
@pytest.mark.parametrize("family", ["qwen3", "mistral", "gemma2"])
def test_half_precision_around_the_model_is_in_the_cache(family, around):
    CountingCache.made = []
    prompts = random_prompts(copies=2)
    with around(build(family)) as model:
        found = generate_rows(model, prompts, keys_for(prompts), sampled(max_rows=5), cache=CountingCache)
        expected = teacher_forced(model, prompts, found.ids, sampled())
    close(found.logps, expected, tolerance=0.5)
    assert {layer.keys.dtype for cache in CountingCache.made for layer in cache.layers} == {torch.bfloat16}


def test_all_families_are_served_with_a_penalty():
    prompts = random_prompts(copies=2)
    settings = greedy(repetition_penalty=1.3, max_rows=5)
    for family in FAMILIES:
        model = build(family)
        expected, _ = generate(model, prompts, settings, repetition_penalty=1.3)
        assert generate_rows(model, prompts, None, settings).ids == expected, family
