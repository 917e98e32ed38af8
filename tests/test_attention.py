"""The streamed attention statistics against dense maps, the eager maps of the model, and worked numbers."""

from __future__ import annotations

import copy
import re
from dataclasses import replace

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    DogeConfig,
    DogeForCausalLM,
    FalconConfig,
    FalconForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GemmaConfig,
    GemmaForCausalLM,
    GptOssConfig,
    GptOssForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3NextConfig,
    Qwen3NextForCausalLM,
)
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from rltok.attention import (
    AttentionConfig,
    UnprobeableAttentionError,
    attention_signals,
    attention_statistics,
    calibrate_heads,
    default_layers,
    probing,
    select_heads,
)
from rltok.attention.probe import Region, layer_statistics

PROMPT, COMPLETION = 9, 31
WIDTH = PROMPT + COMPLETION
SIZES = {
    "vocab_size": 40,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 256,
    "initializer_range": 0.25,  # far from uniform attention
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": 1,
}
MIXED = ["sliding_attention", "full_attention"] * 3
MODELS = {
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**SIZES)),
    "qwen2-mixed": lambda: Qwen2ForCausalLM(
        Qwen2Config(**SIZES, use_sliding_window=True, sliding_window=12, layer_types=MIXED)
    ),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**SIZES)),
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SIZES)),
    "llama-mha": lambda: LlamaForCausalLM(LlamaConfig(**SIZES | {"num_key_value_heads": 4})),
    "mistral": lambda: MistralForCausalLM(MistralConfig(**SIZES, sliding_window=11)),
    "gemma": lambda: GemmaForCausalLM(GemmaConfig(**SIZES)),
    "gemma3": lambda: Gemma3ForCausalLM(
        Gemma3TextConfig(**SIZES, query_pre_attn_scalar=8, sliding_window=12, layer_types=MIXED)
    ),
}
PADDINGS = {
    "none": ([9, 9, 9], [31, 31, 31]),
    "left": ([9, 4, 1], [31, 31, 31]),
    "right": ([9, 9, 9], [31, 17, 3]),
    "both": ([9, 4, 1], [31, 17, 3]),
}


def make_model(name: str = "qwen3", dtype: torch.dtype = torch.float32):
    torch.manual_seed(0)
    return MODELS[name]().to(dtype).eval()


def make_batch(padding: str = "both", prompts=None, completions=None):
    """Ids, attention mask and response mask: prompts padded on the left, completions on the right."""
    default_prompts, default_completions = PADDINGS[padding]
    prompts, completions = prompts or default_prompts, completions or default_completions
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(2, 40, (len(prompts), WIDTH), generator=generator)
    columns = torch.arange(WIDTH)
    left, right = torch.tensor(prompts)[:, None], torch.tensor(completions)[:, None]
    mask = ((columns >= PROMPT - left) & (columns < PROMPT + right)).long()
    return ids * mask, mask, mask[:, PROMPT:]


def dense_statistics(maps, mask, response, window, horizon):
    """The definitions, one by one, from a (B, H, T, T) map."""
    rows, heads, width, _ = maps.shape
    offset = width - response.size(1)
    low, high = horizon
    t = torch.arange(width)
    distance = (t[:, None] - t[None, :]).to(maps.dtype)
    in_r = torch.zeros_like(mask, dtype=torch.bool)
    in_r[:, offset:] = response.bool()
    maps = torch.where(in_r[:, None, :, None], maps, torch.zeros_like(maps))
    span_sum = (maps * distance.clamp(min=0)).sum((2, 3))
    waad = (maps * distance.clamp(min=0, max=window)).sum(3)
    inside = (distance >= low) & (distance <= (width if high is None else high))
    fai = (maps * inside).sum(2) * in_r[:, None]
    count = (inside & in_r[:, :, None]).sum(1) * in_r
    return span_sum, waad[..., offset:], fai[..., offset:], count[:, offset:]


def dense_map(call, mask):
    """softmax(scaling q k) of one layer as a (B, H, T, T) tensor, with keys repeated and every mask explicit."""
    query, width = call.query, call.query.size(2)
    dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
    key = call.key.repeat_interleave(query.size(1) // call.key.size(1), 1)
    scores = query.to(dtype) @ key.to(dtype).transpose(2, 3) * call.scaling
    t = torch.arange(width)
    gap = t[:, None] - t[None, :]
    hidden = gap < 0
    if call.sliding_window is not None:
        hidden = hidden | (gap >= call.sliding_window)
    hidden = hidden | ~mask.bool()[:, None, None, :]
    return scores.masked_fill(hidden, float("-inf")).softmax(-1).nan_to_num(0.0)


def collected_maps(model, ids, mask, layers):
    calls = {}
    with torch.no_grad(), probing(model, layers, lambda call: calls.__setitem__(call.layer, call)):
        model(input_ids=ids, attention_mask=mask, use_cache=False)
    return torch.cat([dense_map(calls[layer], mask) for layer in layers], 1)


def close(stats, expected, tolerance):
    for name, value, reference in zip(("span", "waad", "fai", "count"), stats, expected, strict=True):
        assert value.shape == reference.shape, name
        assert (value - reference).abs().max() <= tolerance, name


@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("name", MODELS)
def test_streaming_equals_dense_maps_of_the_same_queries_and_keys(name, padding):
    ids, mask, response = make_batch(padding)
    model, layers = make_model(name), (1, 2, 5)
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.float64, 1e-12)):
        model = model.to(dtype)
        maps = collected_maps(model, ids, mask, layers)
        # span_sum adds up to 31 numbers of up to 40 tokens: its scale is that of the sum, so compare the mean
        stats = attention_statistics(model, ids, mask, response, layers, 5, (3, 12), 16)
        dense = dense_statistics(maps, mask, response, 5, (3, 12))
        assert stats.span_sum.dtype == dtype
        count = response.sum(1, keepdim=True)
        close(stats._replace(span_sum=stats.span_sum / count), (dense[0] / count, *dense[1:]), tolerance)


@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("name", MODELS)
def test_streaming_equals_the_eager_maps_of_the_model(name, padding):
    ids, mask, response = make_batch(padding)
    model = make_model(name)
    stats = attention_statistics(model, ids, mask, response, range(6), 5, (3, 12))
    model.set_attn_implementation("eager")
    with torch.no_grad():
        maps = torch.cat(model(input_ids=ids, attention_mask=mask, output_attentions=True).attentions, 1)
    close(stats, dense_statistics(maps.float(), mask, response, 5, (3, 12)), 5e-4)


@pytest.mark.parametrize("settings", [{"block": 1}, {"block": 16}, {"block": 1000}, {"head_chunk": 1}])
@pytest.mark.parametrize("horizon", [(10, 100), (0, 7), (5, None), (0, None), (0, 0), (40, 50)])
@pytest.mark.parametrize("name", ["qwen3", "mistral"])
def test_blocks_chunks_and_horizons(name, horizon, settings):
    ids, mask, response = make_batch()
    model = make_model(name, torch.float64)
    for window in (1, 10, 1000):
        stats = attention_statistics(model, ids, mask, response, (2, 4), window, horizon, **settings)
        maps = collected_maps(model, ids, mask, (2, 4))
        close(stats, dense_statistics(maps, mask, response, window, horizon), 1e-11)


def test_padding_longer_than_a_block_of_queries():
    """Queries of a whole row, of which another one begins far to the right: blocks end before that row begins."""
    torch.manual_seed(0)
    model = Qwen3ForCausalLM(tiny(Qwen3Config)).eval()
    ids = torch.randint(3, 40, (2, 40))
    mask = torch.ones_like(ids)
    mask[0, :30] = 0
    stats = attention_statistics(model, ids, mask, mask, (1,), 4, (2, 9), 8)
    alone = attention_statistics(model, ids[:1, 30:], mask[:1, 30:], mask[:1, 30:], (1,), 4, (2, 9), 8)
    torch.testing.assert_close(stats.waad[:1, :, 30:], alone.waad, atol=1e-5, rtol=0)
    torch.testing.assert_close(stats.fai_sum[:1, :, 30:], alone.fai_sum, atol=1e-5, rtol=0)


def test_response_may_span_all_columns():
    ids, mask, _ = make_batch()
    model = make_model(dtype=torch.float64)
    stats = attention_statistics(model, ids, mask, mask, (1,), 4, (2, 9), 16)
    dense = dense_statistics(collected_maps(model, ids, mask, (1,)), mask, mask, 4, (2, 9))
    close(stats, dense, 1e-11)


def test_worked_example():
    """Queries log A and keys that pick a column give the map A itself."""
    rows = [[1.0], [0.5, 0.5], [0.2, 0.3, 0.5], [0.1, 0.1, 0.2, 0.6], [0.4, 0.1, 0.1, 0.2, 0.2]]
    maps = torch.zeros(5, 5, dtype=torch.float64)
    for t, row in enumerate(rows):
        maps[t, : len(row)] = torch.tensor(row, dtype=torch.float64)
    region = Region.from_masks(torch.ones(1, 5), torch.ones(1, 4))
    query = maps.clamp(min=1e-300).log()[None, None]
    key = torch.eye(5, dtype=torch.float64)[None, None]
    stats = layer_statistics(query, key, 1.0, None, region, 2, (1, 2), block=2)
    assert stats.span_sum.item() / 4 == pytest.approx(1.05, abs=1e-12)
    assert stats.waad[0, 0].tolist() == pytest.approx([0.5, 0.7, 0.6, 1.4], abs=1e-12)
    assert stats.fai_sum[0, 0].tolist() == pytest.approx([0.4, 0.3, 0.2, 0.0], abs=1e-12)


def test_identities():
    ids, mask, response = make_batch()
    model = make_model(dtype=torch.float64)
    stats = attention_statistics(model, ids, mask, response, None, WIDTH, (0, None))
    assert torch.allclose(stats.waad.sum(2), stats.span_sum, atol=1e-10)
    short = attention_statistics(model, ids, mask, response, None, 3, (4, 9))
    assert short.waad.min() >= 0 and short.waad.max() <= 3
    assert (short.fai_sum >= 0).all() and (short.fai_sum <= short.fai_count[:, None] + 1e-12).all()
    # every query of R spends one unit of attention, on R or on the prompt
    maps = collected_maps(model, ids, mask, default_layers(6))
    to_prompt = (maps[:, :, PROMPT:, :PROMPT].sum(3) * response[:, None]).sum(2)
    assert torch.allclose(stats.fai_sum.sum(2) + to_prompt, response.sum(1, keepdim=True).double(), atol=1e-10)


def test_sliding_window_bounds_the_span():
    ids, mask, response = make_batch()
    stats = attention_statistics(make_model("mistral"), ids, mask, response, None, 1000, (11, None))
    assert stats.waad.max() <= 10 and stats.fai_sum.abs().max() == 0


@pytest.mark.parametrize("name", ["qwen2", "qwen3", "llama", "mistral", "gemma", "gemma3"])
def test_a_padded_batch_equals_each_row_alone(name):
    ids, mask, response = make_batch()
    model = make_model(name)
    together = attention_statistics(model, ids, mask, response, None, 5, (3, 12))
    for row in range(ids.size(0)):
        columns = mask[row].nonzero().squeeze(1)
        n = int(response[row].sum())
        alone = attention_statistics(
            model, ids[row : row + 1, columns], mask[row : row + 1, columns], torch.ones(1, n), None, 5, (3, 12)
        )
        assert torch.allclose(together.span_sum[row] / n, alone.span_sum[0] / n, atol=1e-5)
        assert torch.allclose(together.waad[row, :, :n], alone.waad[0], atol=1e-5)
        assert torch.allclose(together.fai_sum[row, :, :n], alone.fai_sum[0], atol=1e-5)
        assert torch.equal(together.fai_count[row, :n], alone.fai_count[0])
        assert together.waad[row, :, n:].abs().sum() == together.fai_sum[row, :, n:].abs().sum() == 0


@pytest.mark.parametrize(
    ("prompts", "completions"), [([9, 5], [0, 1]), ([9, 0], [0, 0]), ([3, 0], [1, 0]), ([4], [0]), ([0], [1])]
)
def test_completions_of_no_and_one_token_and_rows_of_padding(prompts, completions):
    ids, mask, response = make_batch(prompts=prompts, completions=completions)
    model = make_model()
    stats = attention_statistics(model, ids, mask, response)
    assert stats.waad.shape == (len(prompts), 12, COMPLETION)
    assert all(torch.isfinite(value).all() for value in stats)
    empty = torch.tensor(completions) == 0
    assert stats.span_sum[empty].abs().sum() == stats.waad[empty].abs().sum() == stats.fai_sum.abs().sum() == 0
    for scope in ("sequence", "batch"):
        signals = attention_signals(model, ids, mask, response, AttentionConfig(head_scope=scope))
        assert signals.waad.shape == signals.fai.shape == response.shape
        assert all(torch.isfinite(value).all() for value in (signals.waad, signals.fai, signals.span))
        assert signals.fai.abs().sum() == 0 and signals.waad[empty].abs().sum() == 0


def test_no_completion_columns():
    ids, mask, response = make_batch()
    stats = attention_statistics(make_model(), ids, mask, response[:, :0])
    assert stats.waad.shape == (3, 12, 0) and stats.span_sum.abs().sum() == 0


# ---- the model is left as it was


@pytest.mark.parametrize("name", MODELS)
def test_logits_are_bitwise_the_same(name):
    ids, mask, _ = make_batch()
    model = make_model(name)
    with torch.no_grad():
        before = model(input_ids=ids, attention_mask=mask).logits
        with probing(model, range(6), lambda call: None):
            inside = model(input_ids=ids, attention_mask=mask).logits
        after = model(input_ids=ids, attention_mask=mask).logits
    assert torch.equal(before, inside) and torch.equal(before, after)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_everything_is_restored_after_an_error(implementation):
    ids, mask, response = make_batch()
    model = make_model()
    model.set_attn_implementation(implementation)
    model.train()
    model.model.layers[0].eval()
    modes = [module.training for module in model.modules()]
    original = ALL_ATTENTION_FUNCTIONS["sdpa"]

    def fail(module, args, output):
        raise RuntimeError("a layer broke")

    handle = model.model.layers[3].register_forward_hook(fail)
    with pytest.raises(RuntimeError, match="a layer broke"):
        attention_statistics(model, ids, mask, response, (2, 5))
    handle.remove()
    assert ALL_ATTENTION_FUNCTIONS["sdpa"] is original
    assert model.config._attn_implementation == implementation
    assert [module.training for module in model.modules()] == modes
    attention_statistics(model, ids, mask, response)
    assert ALL_ATTENTION_FUNCTIONS["sdpa"] is original and "sdpa" not in ALL_ATTENTION_FUNCTIONS._local_mapping
    assert model.config._attn_implementation == implementation
    assert [module.training for module in model.modules()] == modes


def test_an_entry_that_shadowed_the_function_before_is_kept():
    ids, mask, response = make_batch()
    model = make_model()
    original = ALL_ATTENTION_FUNCTIONS["sdpa"]
    calls = []

    def mine(*args, **kwargs):
        calls.append(1)
        return original(*args, **kwargs)

    ALL_ATTENTION_FUNCTIONS["sdpa"] = mine
    try:
        attention_statistics(model, ids, mask, response, (1,), stop_early=False)
        assert ALL_ATTENTION_FUNCTIONS["sdpa"] is mine and len(calls) == 6
    finally:
        del ALL_ATTENTION_FUNCTIONS["sdpa"]


def test_eager_models_are_probed_with_sdpa():
    ids, mask, response = make_batch()
    model = make_model()
    expected = attention_statistics(model, ids, mask, response)
    model.set_attn_implementation("eager")
    for value, reference in zip(attention_statistics(model, ids, mask, response), expected, strict=True):
        assert torch.equal(value, reference)


def test_stopping_early_skips_the_layers_above():
    ids, mask, response = make_batch()
    model = make_model()
    reached = []
    for layer in model.model.layers:
        layer.register_forward_hook(lambda module, args, output: reached.append(module.self_attn.layer_idx))
    early = attention_statistics(model, ids, mask, response, (1, 2))
    assert reached == [0, 1]
    full = attention_statistics(model, ids, mask, response, (1, 2), stop_early=False)
    assert reached == [0, 1, 0, 1, 2, 3, 4, 5]
    assert all(torch.equal(a, b) for a, b in zip(early, full, strict=True))


def test_layers_in_another_order_give_their_heads_in_that_order():
    ids, mask, response = make_batch()
    model = make_model()
    ahead = attention_statistics(model, ids, mask, response, (1, 4))
    back = attention_statistics(model, ids, mask, response, (4, 1))
    assert torch.equal(ahead.waad, back.waad.roll(4, 1)) and not torch.equal(ahead.waad, back.waad)


def test_training_mode_and_dropout_do_not_reach_the_statistics():
    ids, mask, response = make_batch()
    model = make_model()
    expected = attention_statistics(model, ids, mask, response)
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.9
    model.train()
    model.gradient_checkpointing_enable()
    found = attention_statistics(model, ids, mask, response)
    assert model.training and all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradients_are_unchanged_under_checkpointing(reentrant):
    ids, mask, _ = make_batch()
    grads, seen = [], []
    for probe in (False, True):
        model = make_model().train()
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        model.enable_input_require_grads()
        if probe:
            with probing(model, (2, 4), lambda call: seen.append((call.layer, call.query))):
                model(input_ids=ids, attention_mask=mask, use_cache=False).logits.square().mean().backward()
        else:
            model(input_ids=ids, attention_mask=mask, use_cache=False).logits.square().mean().backward()
        grads.append([parameter.grad.clone() for parameter in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))
    assert sorted({layer for layer, _ in seen}) == [2, 4] and not any(query.requires_grad for _, query in seen)


def test_lora():
    ids, mask, response = make_batch()
    base = make_model()
    plain = attention_statistics(base, ids, mask, response)
    tuned = get_peft_model(base, LoraConfig(target_modules=["q_proj", "k_proj"], r=4, lora_dropout=0.5)).train()
    fresh = attention_statistics(tuned, ids, mask, response)
    assert all(torch.equal(a, b) for a, b in zip(fresh, plain, strict=True))  # a fresh adapter adds zero
    generator = torch.Generator().manual_seed(3)
    for name, parameter in tuned.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(generator=generator)
    adapted = attention_statistics(tuned, ids, mask, response)
    assert (adapted.span_sum - plain.span_sum).abs().max() > 0.1 and tuned.training
    merged = tuned.merge_and_unload().eval()
    for a, b in zip(adapted, attention_statistics(merged, ids, mask, response), strict=True):
        assert torch.allclose(a, b, atol=1e-3)


def test_bfloat16_is_softmaxed_in_float32():
    """From the same queries and keys bf16 costs nothing; through a bf16 model activations move the maps."""
    ids, mask, response = make_batch()
    model = make_model()
    exact = attention_statistics(model, ids, mask, response)
    half = copy.deepcopy(model).to(torch.bfloat16)
    stats = attention_statistics(half, ids, mask, response, None, 10, (10, 100))
    assert stats.waad.dtype == torch.float32 and all(torch.isfinite(value).all() for value in stats)
    close(stats, dense_statistics(collected_maps(half, ids, mask, (2, 3, 4)), mask, response, 10, (10, 100)), 1e-3)
    with torch.autocast("cpu", torch.bfloat16):
        cast = attention_statistics(model, ids, mask, response)
        calls = {}
        with probing(model, (2, 3, 4), lambda call: calls.__setitem__(call.layer, call)):
            model(input_ids=ids, attention_mask=mask, use_cache=False)
    maps = torch.cat([dense_map(calls[layer], mask) for layer in (2, 3, 4)], 1)
    close(cast, dense_statistics(maps, mask, response, 10, (10, 100)), 1e-3)
    for found in (stats, cast):
        assert (found.waad - exact.waad).abs().max() < 1.0  # of 10 tokens; random weights of scale 0.25
        assert (found.waad - exact.waad).abs().mean() < 0.1


def test_another_model_in_the_context_is_not_seen():
    ids, mask, _ = make_batch()
    model, other = make_model(), make_model()
    seen = []
    with torch.no_grad(), probing(model, (1,), lambda call: seen.append(call.layer)):
        other(input_ids=ids, attention_mask=mask)
        assert seen == []
        model.generate(ids[:1], max_new_tokens=4, min_new_tokens=4, do_sample=False)
    assert seen == [1]  # the prompt; decoding steps have fewer queries than keys


def test_rounding_leaves_the_distance_in_its_bounds():
    generator = torch.Generator().manual_seed(2)
    query = torch.randn(1, 8, WIDTH, 8, generator=generator)
    key = query + 0.01 * torch.randn(1, 8, WIDTH, 8, generator=generator)
    region = Region.from_masks(torch.ones(1, WIDTH), torch.ones(1, WIDTH))
    for scale in (1.0, 3.0, 10.0):
        waad = layer_statistics(query, key, scale, None, region, 7, (3, 12)).waad
        assert waad.min() >= 0 and waad.max() <= 7


@pytest.mark.parametrize("junk", [float("nan"), float("inf"), 1e30])
def test_what_padding_holds_does_not_matter(junk):
    _, mask, response = make_batch()
    region = Region.from_masks(mask, response)
    generator = torch.Generator().manual_seed(2)
    query = torch.randn(3, 4, WIDTH, 8, generator=generator)
    key = torch.randn(3, 2, WIDTH, 8, generator=generator)
    clean = layer_statistics(query, key, 0.5, 12, region, 5, (3, 12), 16)
    padding = ~mask.bool()[:, None, :, None]
    dirty = [tensor.masked_fill(padding, junk) for tensor in (query, key)]
    for a, b in zip(layer_statistics(*dirty, 0.5, 12, region, 5, (3, 12), 16), clean, strict=True):
        assert torch.equal(a, b)


class LargestTensor(TorchDispatchMode):
    """Remembers the largest number of elements that any operation returned."""

    def __init__(self):
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for value in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(value, torch.Tensor):
                self.elements = max(self.elements, value.numel())
        return result


def test_no_map_is_built():
    width, heads, block = 512, 4, 32
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(1, heads, width, 4, generator=generator)
    key = torch.randn(1, 2, width, 4, generator=generator)
    region = Region.from_masks(torch.ones(1, width), torch.ones(1, width))
    for horizon in ((10, 100), (0, None)):
        for window in (10, width):
            with LargestTensor() as largest:
                layer_statistics(query, key, 0.5, None, region, window, horizon, block)
            assert largest.elements == heads * block * width < width * width
    with LargestTensor() as largest:
        layer_statistics(query, key, 0.5, None, region, 10, (10, 100), block, head_chunk=1)
    assert largest.elements == heads // 2 * block * width


# ---- refusals


def tiny(config, **changes):
    return config(**SIZES | changes)


def refused(model, match, **settings):
    ids, mask, response = make_batch()
    before = dict(ALL_ATTENTION_FUNCTIONS)
    with pytest.raises(UnprobeableAttentionError, match=match):
        attention_statistics(model, ids, mask, response, **settings)
    assert dict(ALL_ATTENTION_FUNCTIONS) == before


def test_models_that_cannot_be_probed_are_refused_by_name():
    refused(Gemma2ForCausalLM(tiny(Gemma2Config)), "Gemma2ForCausalLM has attention soft-capping.*50")
    uncapped = Gemma2ForCausalLM(tiny(Gemma2Config, attn_logit_softcapping=None))
    refused(uncapped, "Gemma2ForCausalLM runs with attn_implementation='eager' and has no sdpa to probe instead")
    experts = {"num_local_experts": 2, "num_experts_per_tok": 1}
    refused(GptOssForCausalLM(tiny(GptOssConfig, **experts)), "GptOssForCausalLM has attention sinks as parameters")
    refused(DogeForCausalLM(tiny(DogeConfig)), r"layers \[2, 3, 4\] of DogeForCausalLM .*interface of the model's")
    mamba = MambaForCausalLM(MambaConfig(vocab_size=40, hidden_size=32, num_hidden_layers=6, state_size=4))
    refused(mamba, "MambaForCausalLM.*supported: softmax attention")
    bidirectional = Gemma3ForCausalLM(tiny(Gemma3TextConfig, use_bidirectional_attention=True))
    refused(bidirectional, "bidirectional")
    falcon = FalconForCausalLM(
        FalconConfig(vocab_size=40, hidden_size=32, num_hidden_layers=6, num_attention_heads=4, alibi=True)
    )
    refused(falcon, "ALiBi")
    refused(torch.nn.Linear(2, 2), "Linear holds no transformers PreTrainedModel")


def test_hybrid_models_are_probed_in_their_attention_layers_only():
    types = ["linear_attention", "full_attention"] * 3
    linear = {
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 2,
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 8,
        "num_experts": 2,
        "num_experts_per_tok": 1,
        "moe_intermediate_size": 16,
        "shared_expert_intermediate_size": 16,
    }
    torch.manual_seed(0)
    model = Qwen3NextForCausalLM(tiny(Qwen3NextConfig, layer_types=types, **linear)).eval()
    refused(model, r"layer 2 of type 'linear_attention'; set layers to some of \[1, 3, 5\]")
    ids, mask, response = make_batch()
    stats = attention_statistics(model, ids, mask, response, (1, 3))
    dense = dense_statistics(collected_maps(model, ids, mask, (1, 3)), mask, response, 10, (10, 100))
    close(stats, dense, 5e-4)


@pytest.mark.parametrize(
    ("argument", "meaning"), [("softcap", "soft-capping"), ("s_aux", "sinks"), ("position_bias", "position bias")]
)
def test_what_only_the_call_reveals_is_refused(argument, meaning):
    model = make_model()
    ids, mask, _ = make_batch()
    value = torch.zeros(()) if argument == "position_bias" else 1.0
    with (
        torch.no_grad(),
        pytest.raises(UnprobeableAttentionError, match=f"layer 0 .*{meaning}"),
        probing(model, (0,), lambda call: None),
    ):
        model(input_ids=ids, attention_mask=mask, **{argument: value})


def test_a_mask_that_is_not_causal_is_refused():
    """Packed sequences, prefixes and biases come in through the mask alone."""
    model = make_model()
    ids, mask, response = make_batch("none")
    causal = torch.ones(WIDTH, WIDTH, dtype=torch.bool).tril()
    packed = causal.clone()
    packed[20:, :20] = False
    biased = torch.where(causal, 0.0, torch.finfo(torch.float32).min)
    biased[30, 2] = -1.0
    forward = model.forward
    for four in (packed, biased):
        model.forward = lambda input_ids, attention_mask, four=four, **kwargs: forward(
            input_ids=input_ids, attention_mask=four.expand(3, 1, -1, -1), **kwargs
        )
        with pytest.raises(UnprobeableAttentionError, match="another pattern or bias than causal"):
            attention_statistics(model, ids, mask, response)
    model.forward = lambda input_ids, attention_mask, **kwargs: forward(
        input_ids=input_ids, attention_mask=causal.expand(3, 1, -1, -1), **kwargs
    )
    attention_statistics(model, ids, mask, response)


@pytest.mark.parametrize("padding", ["none", "both"])
def test_a_window_that_the_mask_does_not_know_is_refused(padding):
    model = make_model()
    ids, mask, response = make_batch(padding)
    model.model.layers[2].self_attn.sliding_window = 5
    with pytest.raises(UnprobeableAttentionError, match="layer 2 attends by another .* causal with sliding_window=5"):
        attention_statistics(model, ids, mask, response)


def test_bad_arguments_are_named():
    model = make_model()
    ids, mask, response = make_batch()
    for layers in ((6,), (-1,), (), (1, 1)):
        with pytest.raises(ValueError, match=re.escape(f"layers={layers}; allowed: distinct indices from 0 to 5")):
            attention_statistics(model, ids, mask, response, layers)
    holes = mask.clone()
    holes[0, 12] = 0
    with pytest.raises(ValueError, match="attention_mask row 0 has 2 runs of valid tokens"):
        attention_statistics(model, ids, holes, holes[:, PROMPT:])
    with pytest.raises(ValueError, match="response_mask marks a token that attention_mask calls padding"):
        attention_statistics(model, ids, mask, torch.ones_like(response))
    with pytest.raises(ValueError, match="C <= T"):
        attention_statistics(model, ids, mask, torch.ones(3, WIDTH + 1))
    for settings, match in (
        ({"window": 0}, "window=0"),
        ({"horizon": (5, 4)}, r"horizon=\(5, 4\)"),
        ({"horizon": (-1, 4)}, r"horizon=\(-1, 4\)"),
        ({"block": 0}, "block=0"),
        ({"head_chunk": 0}, "head_chunk=0"),
    ):
        with pytest.raises(ValueError, match=match):
            attention_statistics(model, ids, mask, response, **settings)


def test_leaving_a_sharded_model_is_refused():
    model = make_model()
    ids, mask, response = make_batch()
    model.lm_head.weight.ds_id = 0  # what DeepSpeed ZeRO-3 puts on a parameter
    with pytest.raises(ValueError, match="set stop_early=False"):
        attention_statistics(model, ids, mask, response)
    attention_statistics(model, ids, mask, response, stop_early=False)


# ---- layers and heads


def test_default_layers():
    assert default_layers(36) == (12, 15, 18, 21, 24)
    assert default_layers(28) == (9, 11, 14, 16, 18)
    assert default_layers(6) == (2, 3, 4)
    assert default_layers(2) == (0, 1)
    assert default_layers(1) == (0,)


def test_select_heads():
    local, far = select_heads(torch.tensor([3.0, 1.0, 2.0, 9.0]), 0.5)
    assert local.tolist() == [1, 2] and far.tolist() == [0, 3]
    local, far = select_heads(torch.tensor([[1.0, 1.0, 1.0, 1.0], [4.0, 3.0, 2.0, 1.0]]), 0.25)
    assert local.tolist() == [[0], [3]] and far.tolist() == [[3], [0]]  # of equals the lower index is local
    assert [side.tolist() for side in select_heads(torch.tensor([5.0]), 0.3)] == [[0], [0]]
    assert select_heads(torch.arange(100.0), 0.29)[0].numel() == 29  # not 28: 0.29 * 100 is below 29 in floating point
    assert select_heads(torch.arange(9.0), 0.3)[0].numel() == 2
    for quantile in (0.0, 0.51, -1.0, float("nan")):
        with pytest.raises(ValueError, match="head_quantile"):
            select_heads(torch.arange(4.0), quantile)


# ---- signals


CONFIG = AttentionConfig(layers=(1, 3), window=5, horizon_min=3, horizon_max=12)
SCOPES = {
    "sequence": CONFIG,
    "batch": replace(CONFIG, head_scope="batch"),
    "static": replace(CONFIG, head_scope="static", local_heads=(6, 0), global_heads=(3, 5)),
}


def long_batch():
    return make_batch(prompts=[9, 4, 1, 2, 9, 0, 7], completions=[31, 17, 3, 30, 0, 0, 12])


def test_sequence_scope_ranks_each_row():
    ids, mask, response = long_batch()
    model = make_model(dtype=torch.float64)
    signals = attention_signals(model, ids, mask, response, CONFIG)
    stats = attention_statistics(model, ids, mask, response, (1, 3), 5, (3, 12))
    span = stats.span_sum / response.sum(1, keepdim=True).clamp(min=1)
    local, far = select_heads(span, 0.3)
    assert torch.allclose(signals.span, span, atol=1e-10) and signals.layers == (1, 3)
    assert torch.equal(signals.local, local) and torch.equal(signals.global_, far) and local.shape == (7, 2)
    assert len({tuple(row) for row in local.tolist()}) > 1
    for row in range(7):
        waad = stats.waad[row, local[row]].mean(0)
        fai = stats.fai_sum[row, far[row]].mean(0) / stats.fai_count[row].clamp(min=1)
        assert torch.allclose(signals.waad[row], waad, atol=1e-10)
        assert torch.allclose(signals.fai[row], fai, atol=1e-10)
    assert torch.equal(signals.fai_count, stats.fai_count)
    assert signals.fai.max() <= 1 and signals.waad.max() <= 5 and (signals.fai[signals.fai_count == 0] == 0).all()


def test_batch_scope_ranks_all_rows_of_all_ranks():
    ids, mask, response = long_batch()
    model = make_model(dtype=torch.float64)
    stats = attention_statistics(model, ids, mask, response, (1, 3), 5, (3, 12))
    local, far = select_heads(stats.span_sum.sum(0) / response.sum(), 0.3)
    signals = attention_signals(model, ids, mask, response, SCOPES["batch"])
    assert torch.equal(signals.local, local) and torch.equal(signals.global_, far)
    assert torch.allclose(signals.waad, stats.waad[:, local].mean(1), atol=1e-10)
    assert signals.waad.shape == response.shape

    class TwoRanks:
        """This rank holds rows 0-2; the totals are those of all rows."""

        calls = 0

        def sum(self, values):
            self.calls += 1
            return torch.cat([stats.span_sum.sum(0), response.sum()[None].double()])

        def max(self, values):
            raise AssertionError("not needed")

    ranks = TwoRanks()
    half = attention_signals(model, ids[:3], mask[:3], response[:3], SCOPES["batch"], ranks)
    assert ranks.calls == 1 and torch.equal(half.local, local)
    assert torch.allclose(half.waad, signals.waad[:3], atol=1e-10)
    assert torch.allclose(half.fai, signals.fai[:3], atol=1e-10)


def test_static_scope_takes_the_lists():
    ids, mask, response = long_batch()
    model = make_model(dtype=torch.float64)
    stats = attention_statistics(model, ids, mask, response, (1, 3), 5, (3, 12))
    signals = attention_signals(model, ids, mask, response, SCOPES["static"])
    assert signals.local.tolist() == [6, 0] and signals.global_.tolist() == [3, 5]
    assert torch.allclose(signals.waad, stats.waad[:, [6, 0]].mean(1), atol=1e-10)
    far = stats.fai_sum[:, [3, 5]].mean(1) / stats.fai_count.clamp(min=1)
    assert torch.allclose(signals.fai, far, atol=1e-10)
    with pytest.raises(ValueError, match="global_heads has head 8; the probed layers have heads 0 to 7"):
        attention_signals(model, ids, mask, response, replace(SCOPES["static"], global_heads=(8,)))


@pytest.mark.parametrize("scope", SCOPES)
def test_the_token_budget_changes_no_result(scope):
    ids, mask, response = long_batch()
    model = make_model()
    passes = []
    model.register_forward_pre_hook(
        lambda module, args, kwargs: passes.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    whole = attention_signals(model, ids, mask, response, SCOPES[scope])
    assert len(passes) == 1
    for budget in (1, 60, 100):
        passes.clear()
        cut = attention_signals(model, ids, mask, response, replace(SCOPES[scope], token_budget=budget))
        assert all(rows == 1 or rows * columns <= budget for rows, columns in passes) and len(passes) > 2
        assert sum(rows for rows, _ in passes) == 7
        for name in ("waad", "fai", "span"):
            assert torch.allclose(getattr(cut, name), getattr(whole, name), atol=1e-5), name
        assert torch.equal(cut.fai_count, whole.fai_count)
        assert torch.equal(cut.local, whole.local) and torch.equal(cut.global_, whole.global_)
    assert not whole.waad.requires_grad


def test_a_shorter_row_that_widens_the_pass_counts():
    """31 tokens without a prompt and 29 with one need 40 columns together: 80 tokens, not 62."""
    ids, mask, response = make_batch(prompts=[0, 9], completions=[31, 20])
    model = make_model()
    passes = []
    model.register_forward_pre_hook(
        lambda module, args, kwargs: passes.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    attention_signals(model, ids, mask, response, replace(CONFIG, token_budget=79))
    assert passes == [(1, 31), (1, 29)]
    passes.clear()
    attention_signals(model, ids, mask, response, replace(CONFIG, token_budget=80))
    assert passes == [(2, 40)]


def test_calibrated_heads_equal_those_of_the_batch():
    ids, mask, response = long_batch()
    model = make_model()
    batch_scope = attention_signals(model, ids, mask, response, SCOPES["batch"])
    halves = [(ids[:3], mask[:3], response[:3]), (ids[3:], mask[3:], response[3:])]
    local, far = calibrate_heads(model, halves, CONFIG)
    assert local == tuple(batch_scope.local.tolist()) and far == tuple(batch_scope.global_.tolist())
    static = replace(CONFIG, head_scope="static", local_heads=local, global_heads=far)
    found = attention_signals(model, ids, mask, response, static)
    assert torch.equal(found.waad, batch_scope.waad) and torch.equal(found.fai, batch_scope.fai)
    with pytest.raises(ValueError, match="batches is empty"):
        calibrate_heads(model, [], CONFIG)
    with pytest.raises(ValueError, match="0 completion tokens"):
        calibrate_heads(model, [(ids, mask, torch.zeros_like(response))], CONFIG)


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"head_quantile": 0.6}, "head_quantile=0.6"),
        ({"head_scope": "row"}, "head_scope='row' is unknown; allowed: sequence, batch, static"),
        ({"window": 0}, "window=0; allowed: >= 1"),
        ({"horizon_min": -1}, "horizon_min=-1"),
        ({"horizon_max": 3}, "horizon_max=3; allowed: >= horizon_min=10"),
        ({"block": 0}, "block=0"),
        ({"token_budget": 0}, "token_budget=0"),
        ({"layers": (2, 2)}, r"layers=\(2, 2\)"),
        ({"head_scope": "static"}, "local_heads=None with head_scope='static'"),
        ({"local_heads": (1,)}, "lists belong to 'static' only"),
        ({"head_scope": "static", "local_heads": (1, 1), "global_heads": (2,)}, r"local_heads=\(1, 1\); allowed"),
        ({"head_scope": "static", "local_heads": (1,), "global_heads": ()}, r"global_heads=\(\); allowed"),
    ],
)
def test_settings_are_checked(changes, match):
    with pytest.raises(ValueError, match=match):
        AttentionConfig(**changes)
