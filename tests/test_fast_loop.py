"""The rollout loop gives what `generate` gives, row by row and whatever ran beside a row."""

from __future__ import annotations

import copy
import itertools
import math

import pytest
import torch
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from test_decoding_together import CASES, VOCAB, WORDS
from tests_support import build_sharp_model
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    LogitsProcessorList,
    MinPLogitsWarper,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from rltok.entropy import entropy_stats
from rltok.fast import LoopSettings, generate_rows, row_key
from rltok.fast.cache import BlockLayer
from rltok.fast.settings import warp
from rltok.sampling import DECODING, DecodingContext, SampledLogps, make_processors, sampling_control

PAD, ENDS = 0, (1, 2)
SHAPE = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
    "initializer_range": 0.2,
    "tie_word_embeddings": False,
    "pad_token_id": PAD,
    "eos_token_id": list(ENDS),
    "bos_token_id": None,
}
MIXED = {"sliding_window": 5, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}
FAMILIES = {
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**{k: v for k, v in SHAPE.items() if k != "head_dim"})),
    "qwen2 mixed": lambda: Qwen2ForCausalLM(
        Qwen2Config(**{k: v for k, v in SHAPE.items() if k != "head_dim"}, use_sliding_window=True, **MIXED)
    ),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**SHAPE)),
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SHAPE)),
    "mistral": lambda: MistralForCausalLM(MistralConfig(**SHAPE, sliding_window=5)),
    "gemma2": lambda: Gemma2ForCausalLM(
        Gemma2Config(**SHAPE, query_pre_attn_scalar=8, final_logit_softcapping=None, **MIXED)
    ),
    "gemma3": lambda: Gemma3ForCausalLM(Gemma3TextConfig(**SHAPE, query_pre_attn_scalar=8, **MIXED)),
    "llama eager": lambda: LlamaForCausalLM._from_config(LlamaConfig(**SHAPE), attn_implementation="eager"),
    "gpt2": lambda: GPT2LMHeadModel(
        GPT2Config(
            vocab_size=VOCAB,
            n_embd=32,
            n_layer=2,
            n_head=4,
            n_positions=128,
            initializer_range=0.3,
            bos_token_id=1,
            eos_token_id=1,
        )
    ),
}
LENGTHS = (9, 3, 14, 1, 9, 6)


def build(family):
    torch.manual_seed(0)
    return FAMILIES[family]().eval()


def random_prompts(lengths=LENGTHS, copies=1, seed=1):
    """Prompts of these lengths, each several times; two of the lengths are the same prompt's."""
    generator = torch.Generator().manual_seed(seed)
    found = [torch.randint(3, VOCAB, (length,), generator=generator).tolist() for length in lengths]
    return [prompt for prompt in found for _ in range(copies)]


def keys_for(prompts, step=0):
    return [row_key(7, step, str(prompt), i) for i, prompt in enumerate(prompts)]


def padded(prompts):
    width = max(map(len, prompts))
    ids = torch.tensor([[PAD] * (width - len(prompt)) + list(prompt) for prompt in prompts])
    mask = torch.arange(width) >= width - torch.tensor([len(prompt) for prompt in prompts])[:, None]
    return {"input_ids": ids, "attention_mask": mask.long()}


def cut(ids, ends=ENDS):
    return ids[: next((i for i, token in enumerate(ids) if token in ends), len(ids)) + 1]


def generate(model, prompts, settings, processors=(), **options):
    """Greedy completions and their log-probabilities by transformers itself; `options` are generate's own."""
    inputs = padded(prompts)
    recorder = SampledLogps(greedy="record")
    with sampling_control(model, processors, recorder):
        output = model.generate(
            **inputs,
            do_sample=False,
            max_new_tokens=settings.max_new_tokens,
            min_new_tokens=settings.min_new_tokens or None,
            eos_token_id=list(settings.end_ids),
            pad_token_id=PAD,
            **options,
        )
    ids = [cut(row, settings.end_ids) for row in output[:, inputs["input_ids"].size(1) :].tolist()]
    return ids, recorder.finish(ids)


def close(left, right, tolerance=1e-5):
    assert [len(row) for row in left] == [len(row) for row in right]
    worst = max((abs(a - b) for a, b in zip(itertools.chain(*left), itertools.chain(*right), strict=True)), default=0)
    assert worst < tolerance, worst


def teacher_forced(model, prompts, completions, settings, processors=()):
    """Log-probabilities of completions, each row alone: one forward, then the processors as transformers calls them."""
    rows = []
    for prompt, ids in zip(prompts, completions, strict=True):
        with torch.no_grad():
            logits = model(torch.tensor([[*prompt, *ids]])).logits[:, len(prompt) - 1 : -1].float()
        chain = LogitsProcessorList(copy.deepcopy(list(processors)))
        for processor in chain:
            processor.begin(len(prompt), settings.for_processors())
        if settings.do_sample:
            chain.append(TemperatureLogitsWarper(float(settings.temperature)))
        if settings.top_k:
            chain.append(TopKLogitsWarper(settings.top_k))
        if settings.top_p < 1:
            chain.append(TopPLogitsWarper(settings.top_p))
        if settings.min_p:
            chain.append(MinPLogitsWarper(settings.min_p))
        steps = [
            chain(torch.tensor([[*prompt, *ids[:t]]]), logits[:, t].clone()).log_softmax(-1)[0, token].item()
            for t, token in enumerate(ids)
        ]
        rows.append(steps)
    return rows


GREEDY = {
    "plain": {},
    "one row at a time": {"max_rows": 1},
    "places are filled again": {"max_rows": 4, "cache_block": 1},
    "waves": {"max_rows": 4, "compact_share": 1.0},
    "some ended rows stay": {"max_rows": 5, "compact_share": 0.4, "cache_block": 3},
    "a token budget": {"max_cache_tokens": 80, "cache_block": 7},
    "prompts in chunks": {"prefill_chunk": 4},
    "one token per chunk": {"prefill_chunk": 1, "max_rows": 7},
    "at least 6 tokens": {"min_new_tokens": 6, "max_rows": 8},
    "one token": {"max_new_tokens": 1},
    "no end": {"end_ids": ()},
    "many ends": {"end_ids": tuple(range(1, VOCAB, 5)), "max_rows": 5},
}


@pytest.mark.parametrize("options", GREEDY.values(), ids=GREEDY)
@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_equals_generate(family, options):
    model = build(family)
    settings = LoopSettings(**{"max_new_tokens": 24, "end_ids": (1, 2, 7, 9), "temperature": 0.0, **options})
    prompts = random_prompts(copies=2)
    expected, logps = generate(model, prompts, settings)
    found = generate_rows(model, prompts, None, settings)
    assert found.ids == expected
    close(found.logps, logps)
    assert max(map(len, found.ids)) <= settings.max_new_tokens


def test_the_rows_above_do_end_early_and_late():
    lengths = [len(ids) for ids in generate(build("qwen3"), random_prompts(), greedy(end_ids=(1, 2, 7, 9)))[0]]
    assert min(lengths) < 12 and len(set(lengths)) > 2


def greedy(**options):
    return LoopSettings(**{"max_new_tokens": 24, "end_ids": ENDS, "temperature": 0.0, **options})


def sampled(**options):
    return LoopSettings(**{"max_new_tokens": 20, "end_ids": (1, 2, 7), "temperature": 0.8, **options})


@pytest.mark.parametrize("family", ["qwen3", "mistral", "gemma3"])
def test_samples_do_not_depend_on_the_company(family):
    model = build(family)
    prompts = random_prompts((9, 3, 14, 1), copies=16)
    keys = keys_for(prompts)
    whole = generate_rows(model, prompts, keys, sampled())
    assert len({tuple(ids) for ids in whole.ids}) > 40
    for options in [
        {"max_rows": 1},
        {"max_rows": 7},
        {"max_rows": 7, "compact_share": 1.0},
        {"compact_share": 1.0},
        {"max_rows": 20, "compact_share": 0.5, "cache_block": 2},
    ]:
        found = generate_rows(model, prompts, keys, sampled(**options))
        assert found.ids == whole.ids, options
        close(found.logps, whole.logps, tolerance=5e-5)  # logits of size 10 in float32, by other kernels
    order = torch.randperm(64, generator=torch.Generator().manual_seed(0)).tolist()
    moved = generate_rows(model, [prompts[i] for i in order], [keys[i] for i in order], sampled(max_rows=10))
    assert moved.ids == [whole.ids[i] for i in order]
    halves = [generate_rows(model, prompts[i::2], keys[i::2], sampled()).ids for i in range(2)]
    assert [ids for pair in zip(*halves, strict=True) for ids in pair] == whole.ids


@pytest.mark.parametrize(
    "options",
    [{}, {"top_k": 6}, {"top_p": 0.7}, {"min_p": 0.2}, {"top_k": 9, "top_p": 0.8, "min_p": 0.1}, {"min_new_tokens": 4}],
)
def test_recorded_log_probabilities_are_those_of_teacher_forcing(options):
    model = build("qwen3")
    prompts = random_prompts(copies=3)
    settings = sampled(**options, max_rows=7)
    found = generate_rows(model, prompts, keys_for(prompts), settings)
    if settings.min_new_tokens:
        assert min(map(len, found.ids)) == settings.min_new_tokens + 1  # an end is possible from then on
        return
    close(found.logps, teacher_forced(model, prompts, found.ids, settings))
    assert generate_rows(model, prompts, keys_for(prompts), settings, record=False).logps is None


def test_warp_equals_transformers():
    scores = torch.randn(6, VOCAB, generator=torch.Generator().manual_seed(2)) * 3
    scores[0, :5] = scores[0].max()  # ties
    scores[1, 3:] = -torch.inf
    scores[2] = 0.0
    for t, k, p, m in itertools.product((1.0, 0.5), (0, 1, 5, 99), (1.0, 0.9, 0.01), (0.0, 0.3, 1.0)):
        chain = LogitsProcessorList([TemperatureLogitsWarper(t)])
        chain += [TopKLogitsWarper(k)] if k else []
        chain += [TopPLogitsWarper(p)] if p < 1 else []
        chain += [MinPLogitsWarper(m)] if m else []
        settings = LoopSettings(max_new_tokens=1, temperature=t, top_k=k, top_p=p, min_p=m)
        assert torch.equal(warp(scores.clone(), settings), chain(None, scores.clone())), (t, k, p, m)
    same = LoopSettings(max_new_tokens=1)
    assert warp(scores, same) is scores


CHI2_BOUND = {3: 16.27, 8: 26.12, 15: 37.70, 26: 54.05, 39: 72.05}
"""0.999 quantiles of the chi-square distribution by degrees of freedom"""


def test_frequencies_are_exact_on_an_enumerable_model():
    """Every text of at most 3 of 4 tokens, one of them the end: 3 + 9 + 27 + 1 = 40 texts."""
    model = build_sharp_model(4, PAD, [1])
    settings = LoopSettings(max_new_tokens=3, end_ids=(1,), temperature=1.3)
    prompt, rows = [2, 3, 0, 2], 20_000
    texts = [list(ids) for n in (1, 2, 3) for ids in itertools.product(range(4), repeat=n)]
    texts = [ids for ids in texts if 1 not in ids[:-1] and (ids[-1] == 1 or len(ids) == 3)]
    assert len(texts) == 40
    logps = teacher_forced(model, [prompt] * len(texts), texts, settings)
    expected = rows * torch.tensor([math.exp(sum(row)) for row in logps], dtype=torch.float64)
    assert abs(float(expected.sum()) / rows - 1) < 1e-5
    keys = [row_key(11, 0, 0, i) for i in range(rows)]
    found = generate_rows(model, [prompt] * rows, keys, settings)
    assert found.metrics.prefill_tokens == 4
    counts = torch.tensor([found.ids.count(ids) for ids in texts], dtype=torch.float64)
    assert counts.sum() == rows
    rare = expected < 5
    cells = [*zip(counts[~rare], expected[~rare], strict=True)]
    if rare.any():
        cells.append((counts[rare].sum(), expected[rare].sum()))
    statistic = sum(float((count - mean) ** 2 / mean) for count, mean in cells)
    assert len(cells) > 8
    bound = min(value for degrees, value in CHI2_BOUND.items() if degrees >= len(cells) - 1)
    assert statistic < bound, (statistic, len(cells))


# ---- processors


def word_tokenizer():
    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<pad>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", eos_token="<eos>")


ENTROPIES = torch.tensor([[0.3, 1.0, 2.0, 2.6, 3.2]])


def processors_for(methods, temperature):
    stats = entropy_stats(ENTROPIES, torch.ones_like(ENTROPIES))
    context = DecodingContext(temperature, stats, word_tokenizer(), ENDS)
    return make_processors([DECODING[name](**options) for name, options in methods.items()], context)


def test_every_method_is_run():
    assert {name for methods in CASES.values() for name in methods} == set(DECODING)


@pytest.mark.parametrize("options", [{}, {"top_k": 20, "top_p": 0.9}], ids=["plain", "truncated"])
@pytest.mark.parametrize("methods", CASES.values(), ids=CASES)
def test_processors_give_what_their_transformers_form_gives(methods, options):
    model = build("qwen3")
    prompts = random_prompts(copies=3)
    settings = sampled(temperature=0.7, end_ids=ENDS, max_rows=7, **options)
    processors = processors_for(methods, 0.7)
    found = generate_rows(model, prompts, keys_for(prompts), settings, processors)
    close(found.logps, teacher_forced(model, prompts, found.ids, settings, processors_for(methods, 0.7)))
    plain = generate_rows(model, prompts, keys_for(prompts), settings)
    assert plain.ids != found.ids
    at_once = generate_rows(
        model, prompts, keys_for(prompts), sampled(temperature=0.7, end_ids=ENDS, **options), processors
    )
    assert at_once.ids == found.ids


@pytest.mark.parametrize("methods", CASES.values(), ids=CASES)
def test_greedy_with_processors_equals_generate(methods):
    model = build("qwen3")
    prompts = random_prompts(copies=2)
    settings = greedy(max_new_tokens=14, max_rows=5)
    expected, logps = generate(model, prompts, settings, processors_for(methods, 1.0))
    found = generate_rows(model, prompts, None, settings, processors_for(methods, 1.0))
    assert found.ids == expected
    close(found.logps, logps)


def test_traces_are_those_of_each_row_alone():
    model = build("qwen3")
    prompts = random_prompts(copies=2)
    methods = {"budget_forcing": {"min_tokens": 3, "max_tokens": 9}, "adaptive_temperature": {"tau": 0.5}}
    processors = processors_for(methods, 0.7)
    settings = sampled(temperature=0.7, end_ids=ENDS, max_rows=5)
    found = generate_rows(model, prompts, keys_for(prompts), settings, processors)
    lengths = [len(ids) for ids in found.ids]
    for processor, traced in zip(processors, found.traces, strict=True):
        for name, values in traced.items():
            assert values.shape == (len(prompts), max(lengths))
            assert not values[torch.arange(max(lengths)) >= torch.tensor(lengths)[:, None]].any()
            assert torch.equal(processor.trace()[name], values)
    forced, entropy = found.traces[0]["forced"], found.traces[1]["entropy"]
    assert forced.any() and not forced.all()
    for row, logps in enumerate(found.logps):
        certain = torch.tensor(logps) == 0
        assert certain[forced[row, : len(logps)]].all()
    again = processors_for(methods, 0.7)
    alone = generate_rows(model, prompts[4:5], keys_for(prompts)[4:5], settings, again)
    torch.testing.assert_close(alone.traces[1]["entropy"][0], entropy[4, : lengths[4]], rtol=1e-4, atol=1e-5)
    metrics = processors[1].metrics(lengths)
    assert 0 < metrics["temperature_factor"] < 2


def test_neutral_processors_change_nothing():
    model = build("llama")
    prompts = random_prompts()
    processors = [DECODING["adaptive_temperature"](tau=0.0).processor(DecodingContext(0.8))]
    processors = [processor for processor in processors if processor is not None]
    plain = generate_rows(model, prompts, keys_for(prompts), sampled())
    with_them = generate_rows(model, prompts, keys_for(prompts), sampled(), processors)
    assert with_them.ids == plain.ids and with_them.logps == plain.logps


# ---- models


def test_lora_model():
    model = build("qwen3")
    adapted = get_peft_model(
        model, LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    ).eval()
    prompts = random_prompts(copies=2)
    expected, logps = generate(adapted, prompts, greedy())
    found = generate_rows(adapted, prompts, None, greedy(max_rows=5))
    assert found.ids == expected
    close(found.logps, logps)
    with adapted.disable_adapter():
        assert generate_rows(adapted, prompts, None, greedy()).ids != expected


@pytest.mark.parametrize("family", ["qwen3", "mistral", "gemma2"])
def test_bf16_model(family):
    model = build(family).bfloat16()
    prompts = random_prompts(copies=2)
    found = generate_rows(model, prompts, keys_for(prompts), sampled(max_rows=5))
    assert all(math.isfinite(value) for row in found.logps for value in row)
    close(found.logps, teacher_forced(model, prompts, found.ids, sampled()), tolerance=0.5)


def state_of(model):
    return {
        name: (module.training, getattr(module, "gradient_checkpointing", None), sorted(vars(module)))
        for name, module in model.named_modules()
    }


@pytest.mark.parametrize("fails", [False, True])
def test_no_trace_on_a_model_in_training_with_checkpointing(fails):
    model = build("qwen3")
    prompts = random_prompts()
    expected = generate_rows(model, prompts, None, greedy()).ids
    model.train()
    model.model.layers[1].eval()
    model.model.layers[0].self_attn.attention_dropout = 0.5
    model.gradient_checkpointing_enable()
    before, config = state_of(model), copy.deepcopy(model.config.to_dict())
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    random = torch.get_rng_state()
    if fails:
        with pytest.raises(IndexError):
            generate_rows(model, [[VOCAB + 5]], None, greedy())
    else:
        assert generate_rows(model, prompts, None, greedy()).ids == expected
    assert state_of(model) == before
    assert model.config.to_dict() == config
    assert torch.equal(torch.get_rng_state(), random)
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


# ---- work


def test_work_is_counted():
    model = build("qwen3")
    prompts = random_prompts((9, 3), copies=8)
    found = generate_rows(model, prompts, keys_for(prompts), sampled())
    metrics = found.metrics
    assert metrics.tokens == sum(map(len, found.ids))
    assert (metrics.prefill_tokens, metrics.prefill_tokens_saved) == (12, 7 * 12)
    assert metrics.live_share == 1
    assert metrics.tokens_per_second > 0
    late = generate_rows(model, prompts, keys_for(prompts), sampled(compact_share=1.0)).metrics
    longest = max(map(len, found.ids))
    assert late.live_share == pytest.approx((metrics.tokens - 16) / (16 * (longest - 1)))
    few = generate_rows(model, prompts, keys_for(prompts), sampled(max_rows=2)).metrics
    assert few.prefill_tokens == 12  # a prompt waits for the rest of its group
    assert few.peak_cache_bytes < metrics.peak_cache_bytes
    per_token = 3 * 2 * 2 * 8 * 4  # layers, keys and values, heads, dim, bytes
    budget = generate_rows(model, prompts, keys_for(prompts), sampled(max_cache_tokens=60, cache_block=1)).metrics
    second = 60 // 6  # while the keys, or the values, of one of three layers are renewed
    assert budget.peak_cache_bytes <= (60 + 12 + second) * per_token


def test_a_row_beyond_the_token_budget_runs_alone():
    model = build("qwen3")
    prompts = random_prompts((9, 3), copies=4)
    everything = generate_rows(model, prompts, keys_for(prompts), sampled())
    alone = generate_rows(model, prompts, keys_for(prompts), sampled(max_cache_tokens=10, cache_block=1))
    assert alone.ids == everything.ids
    assert alone.metrics.peak_cache_bytes < everything.metrics.peak_cache_bytes / 4


def test_places_are_reserved_only_for_rows_that_may_come():
    model = build("llama")
    prompts = random_prompts((5,), copies=16)
    settings = sampled(max_new_tokens=40, end_ids=tuple(range(1, VOCAB, 4)), cache_block=4)
    found = generate_rows(model, prompts, keys_for(prompts), settings)
    lengths = sorted(len(ids) for ids in found.ids)
    assert lengths[-1] > 3 * lengths[len(lengths) // 2], "one row is far longer than the others"
    per_token = 3 * 2 * 2 * 8 * 4  # layers, keys and values, heads, dim, bytes
    assert found.metrics.peak_cache_bytes < 16 * (5 + 4 * 4) * per_token < 16 * lengths[-1] * per_token


def test_the_cache_grows_in_blocks_and_a_window_bounds_it(monkeypatch):
    renewed = []
    renew = BlockLayer._renewed
    monkeypatch.setattr(BlockLayer, "_renewed", lambda layer, *args: renewed.append(layer) or renew(layer, *args))
    prompts = random_prompts((9,), copies=4)
    bytes_by_family = {}
    for family in ("llama", "mistral"):
        renewed.clear()
        settings = greedy(max_new_tokens=64, end_ids=(), cache_block=16)
        bytes_by_family[family] = generate_rows(build(family), prompts, None, settings).metrics.peak_cache_bytes
        in_loop = [layer for layer in renewed if layer.block == 16]
        assert len(in_loop) <= 3 * 2 * (1 + 64 // 16 + 1)  # layers, keys and values, growths
    per_column = 4 * 3 * 2 * 2 * 8 * 4  # rows, layers, keys and values, heads, dim, bytes
    prompt = 9 * per_column // 4
    second = 7 / 6  # with a second copy of the keys, or the values, of one of three layers
    assert bytes_by_family["mistral"] <= (5 + 16) * per_column * second + prompt  # window 5
    assert bytes_by_family["llama"] <= (9 + 64 + 16) * per_column * second + prompt


def test_rows_that_move_in_the_cache_keep_their_tokens():
    def states(rows, columns, first):
        base = torch.arange(rows)[:, None] * 100 + torch.arange(first, first + columns)
        return base[:, None, :, None].expand(rows, 2, columns, 3).float()

    for window in (None, 4):
        layer = BlockLayer(4, 3, window)
        layer.update(states(4, 5, 0), -states(4, 5, 0))
        for column in range(5, 9):
            keys, _ = layer.update(states(4, 1, column), -states(4, 1, column))
            assert keys[:, 0, -1, 0].tolist() == [100 * row + column for row in range(4)]
        keys, values = layer.update(states(4, 1, 9), -states(4, 1, 9))
        assert keys[1, 0, :, 0].tolist() == [100 + c for c in (range(10) if window is None else range(6, 10))]
        assert torch.equal(keys, -values)
        layer.keep([(3, 0)], 2)
        assert layer.held()[0][:, 0, -1, 0].tolist() == [309, 109]
        layer.insert([(torch.full((2, 2, 3), 7.0),) * 2], [2], 10)
        keys, values = layer.held()
        assert keys[:, 0, -2:, 0].tolist() == [[308, 309], [108, 109], [7, 7], [7, 7]]
        assert keys.isfinite().all() and layer.get_seq_length() == 10
        assert layer.get_mask_sizes(1) == ((11, 0) if window is None else (4, 7))


def test_no_prompts():
    found = generate_rows(build("llama"), [], [], sampled())
    assert (found.ids, found.logps, found.metrics.tokens) == ([], [], 0)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens=0"),
        ({"temperature": -1.0}, "temperature=-1.0"),
        ({"temperature": math.nan}, "temperature=nan"),
        ({"top_k": -1}, "top_k=-1"),
        ({"top_p": 0.0}, "top_p=0.0"),
        ({"min_p": 1.5}, "min_p=1.5"),
        ({"min_new_tokens": 99}, "min_new_tokens=99 is not between 0 and max_new_tokens=20"),
        ({"end_ids": (3, -1)}, r"holds \[-1\]"),
        ({"max_rows": 0}, "max_rows=0"),
        ({"prefill_chunk": 0}, "prefill_chunk=0"),
        ({"compact_share": 2.0}, "compact_share=2.0"),
        ({"stop_strings": "x"}, "stop_strings='x' must be a tuple"),
        ({"stop_strings": ("x", "")}, "none of them empty"),
        ({"repetition_penalty": 0.0}, "repetition_penalty=0.0"),
    ],
)
def test_wrong_settings_are_refused(options, words):
    with pytest.raises(ValueError, match=words):
        sampled(**options)


def test_wrong_inputs_are_refused():
    model = build("llama")
    with pytest.raises(ValueError, match=r"prompts \[1\] are empty"):
        generate_rows(model, [[3], []], [0, 1], sampled())
    with pytest.raises(ValueError, match="keys=None but temperature=0.8"):
        generate_rows(model, [[3]], None, sampled())
    with pytest.raises(ValueError, match="2 keys for 1 prompts"):
        generate_rows(model, [[3]], [1, 2], sampled())
    stats = entropy_stats(ENTROPIES, torch.ones_like(ENTROPIES))
    wrong = DECODING["adaptive_temperature"](tau=0.3).processor(DecodingContext(0.5, stats))
    with pytest.raises(ValueError, match=r"built for temperature=0.5 but generate uses 0.8"):
        generate_rows(model, [[3]], [1], sampled(), [wrong])


def refused_models():
    from transformers import AutoModelForCausalLM, BloomConfig, MambaConfig, Qwen3NextConfig, T5Config
    from transformers import T5ForConditionalGeneration as T5

    small = {"vocab_size": 16, "hidden_size": 16, "num_hidden_layers": 1}
    yield "mamba", lambda: AutoModelForCausalLM.from_config(MambaConfig(**small, state_size=4))
    yield (
        "bloom",
        lambda: AutoModelForCausalLM.from_config(BloomConfig(vocab_size=16, hidden_size=16, n_layer=1, n_head=2)),
    )
    yield "t5", lambda: T5(T5Config(vocab_size=16, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2))
    rope = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
    yield "llama", lambda: LlamaForCausalLM(LlamaConfig(**{**SHAPE, "rope_parameters": rope}))
    hybrid = Qwen3NextConfig(**small, intermediate_size=16, num_attention_heads=2, num_key_value_heads=1, head_dim=8)
    hybrid.layer_types = ["linear_attention"]
    yield "qwen3_next", lambda: AutoModelForCausalLM.from_config(hybrid)


@pytest.mark.parametrize(("kind", "make"), list(refused_models()), ids=[kind for kind, _ in refused_models()])
def test_models_that_it_cannot_serve_are_refused_by_name(kind, make):
    with pytest.raises(ValueError, match=f"'{kind}'.*use transformers' generate"):
        generate_rows(make(), [[3]], [1], sampled())


def test_prompt_learning_is_refused():
    model = get_peft_model(build("llama"), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2))
    with pytest.raises(ValueError, match="adds virtual tokens"):
        generate_rows(model, [[3]], [1], sampled())
