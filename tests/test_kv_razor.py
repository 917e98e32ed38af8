"""RazorAttention: two groups of heads, the compensation token, and the heads that retrieve."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from kv_support import LAYERS, NEW, build, greedy, in_loop, random_prompts, replaced
from torch import Tensor
from transformers import (
    DynamicCache,
    LlamaConfig,
)
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from rltok.config import ConfigError, build_typed
from rltok.kv import PolicyCache, StreamingLLM, attach, watched_attention
from rltok.kv.razor_attention import RazorAttention, compensated_attention, dropped_tokens
from rltok.kv.razor_layer import RazorLayer
from rltok.kv.razor_profile import head_count, razor_profile, retrieval_heads, retrieval_scores, streamed_scores
from rltok.kv.tables import ModelFacts, RazorTable, write_table

LENGTHS = (3, 17, 33, 26)
HEADS, KEY_HEADS = 6, 3
SIZES = {"hidden_size": 60, "num_attention_heads": HEADS, "num_key_value_heads": KEY_HEADS}
FULL = {0: [2], 2: [0, 2]}
"""one full head, none, and a pair that is not adjacent"""
POLICIES: dict[str, RazorAttention] = {
    "window": RazorAttention(FULL, sink=2, floor=6, ratio=None, interval=5),
    "ratio": RazorAttention(FULL, sink=2, floor=5, ratio=3, interval=5),
    "every_step": RazorAttention(FULL, sink=1, floor=7, ratio=4, interval=1),
    "prompt_only": RazorAttention(FULL, sink=2, floor=6, ratio=None, interval=None),
    "no_sink": RazorAttention(FULL, sink=0, floor=6, ratio=5, interval=4),
    "forgetful": RazorAttention(FULL, sink=2, floor=6, ratio=5, interval=5, compensate=False),
    "no_full_head": RazorAttention({}, sink=2, floor=6, ratio=5, interval=5),
    "a_dense_layer": RazorAttention({1: [0, 1, 2]}, sink=2, floor=6, ratio=None, interval=3),
}


@pytest.fixture(scope="module", params=["qwen3", "llama"])
def model(request: pytest.FixtureRequest) -> Any:
    return build(request.param, **SIZES)


@pytest.fixture(scope="module")
def hybrid() -> Any:
    """Full, sliding, full."""
    types = ["full_attention", "sliding_attention", "full_attention"]
    return build("qwen3", **SIZES, use_sliding_window=True, sliding_window=8, layer_types=types)


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    return random_prompts(LENGTHS)


# Exactness


@pytest.mark.parametrize("name", POLICIES)
def test_equal_to_attention_with_the_dropped_tokens_as_one(model: Any, prompts: Any, name: str) -> None:
    policy = POLICIES[name]
    with attach(model, policy):
        ids, logits = greedy(model, prompts)
    for row, prompt in enumerate(prompts):
        expected = replay(model, prompt, ids[row], policy)
        torch.testing.assert_close(logits[row], expected, atol=2e-5, rtol=0)
    dense, _ = greedy(model, prompts)
    assert dense != ids  # the policy does something


def test_the_compensation_token_changes_what_is_generated(model: Any, prompts: Any) -> None:
    found = []
    for name in ("window", "forgetful"):
        with attach(model, POLICIES[name]):
            found.append(greedy(model, prompts)[0])
    assert found[0] != found[1]


def test_sliding_layers_keep_their_window(hybrid: Any, prompts: Any) -> None:
    policy = POLICIES["window"]
    with attach(hybrid, policy) as handle:
        ids, logits = greedy(hybrid, prompts)
    assert [isinstance(layer, RazorLayer) for layer in handle.caches[0].layers] == [True, False, True]
    for row, prompt in enumerate(prompts):
        expected = replay(hybrid, prompt, ids[row], policy)
        torch.testing.assert_close(logits[row], expected, atol=2e-5, rtol=0)
    assert in_loop(hybrid, policy, prompts * 2, max_rows=3).ids == ids * 2


def replay(model: Any, prompt: list[int], ids: list[int], policy: RazorAttention) -> Tensor:
    """(NEW, V) logits of a pass without a cache, in which every query sees what the policy leaves it."""
    tokens = torch.tensor([[*prompt, *ids[:-1]]])
    total = tokens.size(1)
    gone = lost(total, len(prompt), policy)

    def attention(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, **kwargs: Any) -> Any:
        out = torch.zeros(total, HEADS, value.size(-1), dtype=torch.float64)
        window = kwargs.get("sliding_window") or total
        full = policy.full_heads.get(module.layer_idx, ()) if window == total else range(KEY_HEADS)  # type: ignore
        for head in range(HEADS):
            of = head // (HEADS // KEY_HEADS)
            keys, values = key[0, of].double(), value[0, of].double()
            for at in range(total):
                dropped = [] if of in full else gone[at]
                seen = [token for token in range(max(0, at + 1 - window), at + 1) if token not in dropped]
                scores = keys[seen] @ query[0, head, at].double() * kwargs["scaling"]
                numerator, denominator = scores.exp() @ values[seen], scores.exp().sum()
                if dropped and policy.compensate:
                    mean = keys[dropped].mean(0) @ query[0, head, at].double() * kwargs["scaling"]
                    numerator = numerator + len(dropped) * mean.exp() * values[dropped].mean(0)
                    denominator = denominator + len(dropped) * mean.exp()
                out[at, head] = numerator / denominator
        return out.to(query.dtype)[None], None

    with replaced("sdpa", attention), torch.no_grad():
        return model(input_ids=tokens, use_cache=False).logits[0, len(prompt) - 1 :]


def lost(total: int, prompt: int, policy: RazorAttention) -> list[list[int]]:
    """Tokens that each query does not see one by one, from the rule alone."""
    found, now = [], []
    for at in range(total):
        found.append(list(now) if at >= prompt else [])
        length = at + 1
        generated = length - prompt
        if generated == 0 or (generated > 0 and policy.interval is not None and generated % policy.interval == 0):
            window = policy.floor if policy.ratio is None else max(policy.floor, length // policy.ratio)
            now = list(range(policy.sink, length - window))
    return found


# Batches


@pytest.mark.parametrize("name", POLICIES)
def test_a_row_depends_on_itself_alone(model: Any, prompts: Any, name: str) -> None:
    with attach(model, POLICIES[name]):
        ids, logits = greedy(model, prompts)
        wider, wide_logits = greedy(model, prompts[1:3], extra=9)
        for row, prompt in enumerate(prompts):
            alone, own = greedy(model, [prompt])
            assert alone[0] == ids[row]
            torch.testing.assert_close(logits[row], own[0], atol=2e-5, rtol=0)
    assert wider == ids[1:3]
    torch.testing.assert_close(wide_logits, logits[1:3], atol=2e-5, rtol=0)


@pytest.mark.parametrize("name", POLICIES)
@pytest.mark.parametrize("rows", [None, 3])
def test_the_loop_gives_what_generate_gives(model: Any, prompts: Any, name: str, rows: int | None) -> None:
    """Rows join in the middle, in other phases of the interval, and in chunks of the prompt."""
    with attach(model, POLICIES[name]):
        ids, _ = greedy(model, prompts)
    assert in_loop(model, POLICIES[name], prompts * 2, max_rows=rows).ids == ids * 2


def test_rows_that_leave_early_change_nothing(model: Any, prompts: Any) -> None:
    """Tokens that end a row are chosen so that rows end one after the other, and places are filled again."""
    policy = POLICIES["ratio"]
    free = in_loop(model, policy, prompts * 2).ids
    ends = (free[0][4], free[2][9])
    result = in_loop(model, policy, prompts * 2, end_ids=ends, max_rows=3, prefill_chunk=2048)
    for ids, whole in zip(result.ids, free, strict=True):
        stop = next((at for at, token in enumerate(whole) if token in ends), NEW - 1)
        assert ids == whole[: stop + 1]
    assert len({len(ids) for ids in result.ids}) > 1


def test_several_tokens_at_once_see_what_they_see_one_by_one(model: Any, prompts: Any) -> None:
    policy = POLICIES["prompt_only"]
    rows = [prompts[1], prompts[3][:17]]
    new = torch.tensor([[11, 12, 13], [21, 22, 23]])
    found = []
    for steps in ([new], list(new.split(1, 1))):
        cache = PolicyCache(model.config, 2, policy=policy, in_parts=False)
        cache.begin([0, 0])
        with watched_attention(model), torch.no_grad():
            model(input_ids=torch.tensor(rows), past_key_values=cache)
            at, logits = 17, []
            for step in steps:
                place = torch.arange(at, at + step.size(1)).expand(2, -1)
                logits.append(model(input_ids=step, position_ids=place, past_key_values=cache).logits)
                at += step.size(1)
        found.append(torch.cat(logits, 1))
    torch.testing.assert_close(found[0], found[1], atol=2e-5, rtol=0)


# Limits


@pytest.mark.parametrize(
    "policy",
    [
        RazorAttention({layer: [0, 1, 2] for layer in range(LAYERS)}, floor=1, ratio=None, interval=1),
        RazorAttention(FULL, floor=200),
        RazorAttention(FULL, floor=1, ratio=1, interval=1),
    ],
    ids=["all_heads_full", "nothing_dropped", "window_as_long_as_the_row"],
)
def test_limits_are_dense_bit_for_bit(model: Any, prompts: Any, policy: RazorAttention) -> None:
    ids, logits = greedy(model, prompts)
    with attach(model, policy):
        kept_ids, kept = greedy(model, prompts)
    assert ids == kept_ids and torch.equal(logits, kept)
    assert in_loop(model, policy, prompts, max_rows=2).ids == ids


def test_without_full_heads_and_compensation_it_is_streaming_llm(model: Any, prompts: Any) -> None:
    with attach(model, StreamingLLM(sink=3, recent=8, interval=4)):
        ids, logits = greedy(model, prompts)
    with attach(model, RazorAttention({}, sink=3, floor=8, ratio=None, interval=4, compensate=False)):
        own, found = greedy(model, prompts)
    assert own == ids
    torch.testing.assert_close(found, logits, atol=2e-5, rtol=0)


# The compensation token


def test_running_sums_are_the_mean_of_all_that_was_dropped(model: Any, prompts: Any) -> None:
    """Keys of the first layer depend on the tokens alone, so a dense cache says what they are."""
    policy = RazorAttention({0: [1]}, sink=2, floor=6, ratio=None, interval=3)
    with attach(model, policy) as handle:
        ids, _ = greedy(model, prompts)
    cache = handle.caches[0]
    layer = cache.kept[0]
    assert isinstance(layer, RazorLayer)
    for row, prompt in enumerate(prompts):
        tokens = [*prompt, *ids[row][:-1]]
        dense = DynamicCache(config=model.config)
        with torch.no_grad():
            model(input_ids=torch.tensor([tokens]), past_key_values=dense)
        count = policy.kept(0) + (len(tokens) - len(prompt)) % 3
        many = len(tokens) - count + 1
        if many <= 1:
            continue
        place = layer.end - count + policy.sink
        for name, states in (("keys", dense.layers[0].keys), ("values", dense.layers[0].values)):
            mean = states[0, [0, 2], 2 : 2 + many].mean(1)
            torch.testing.assert_close(layer.tracks[name][row, :, place], mean, atol=1e-5, rtol=1e-5)
            torch.testing.assert_close(layer.sums[name][row] / many, mean, atol=1e-5, rtol=1e-5)


def test_sums_do_not_stall_in_bfloat16() -> None:
    """A mean over 500 tokens in bfloat16 would no longer move with one token more."""
    policy = RazorAttention({}, sink=0, floor=1, ratio=None, interval=1)
    config = LlamaConfig(num_hidden_layers=1, num_attention_heads=1, num_key_value_heads=1, hidden_size=8)
    cache = PolicyCache(config, 1, policy=policy, in_parts=False)
    cache.begin([0])
    generator = torch.Generator().manual_seed(0)
    steps = [1, *[1] * 900]
    drawn = torch.randn(1, 1, sum(steps), 8, generator=generator)
    states = (drawn + torch.linspace(0, 3, sum(steps))[:, None]).bfloat16()
    layer = cache.kept[0]
    for at in range(sum(steps)):
        part = states[:, :, at : at + 1]
        cache.update(part, part, 0)
        layer.after_attention(part, 1.0)
    width = layer.end
    assert width == 2
    expected = states[0, 0, :-1].float().mean(0)
    assert (layer.tracks["keys"][0, 0, 0].float() - expected).abs().max() < 2**-7
    torch.testing.assert_close(layer.sums["keys"][0, 0] / 900, expected, atol=1e-5, rtol=1e-5)


def test_compensated_attention_by_hand() -> None:
    query, values = torch.tensor([1.0, 0.0]), torch.arange(1.0, 7.0)[:, None]
    keys = torch.tensor([[1.0, 0], [0, 1], [2, 0], [0, 2], [1, 1], [0, 0]])
    dropped = dropped_tokens(6, 1, 2)
    assert dropped.tolist() == [False, True, True, True, False, False]
    assert compensated_attention(query, keys, values, dropped).item() == pytest.approx(3.244304, abs=1e-6)
    without = compensated_attention(query, keys, values, dropped, compensate=False)
    assert without.item() == pytest.approx(3.466087, abs=1e-6)
    nothing = torch.zeros(6, dtype=torch.bool)
    assert compensated_attention(query, keys, values, nothing).item() == pytest.approx(3.189566, abs=1e-6)
    one = dropped_tokens(6, 3, 2)  # one dropped token is itself
    assert one.sum() == 1
    assert compensated_attention(query, keys, values, one).item() == pytest.approx(3.189566, abs=1e-6)


def test_compensated_attention_takes_batches() -> None:
    generator = torch.Generator().manual_seed(0)
    query, keys, values = (torch.randn(3, *shape, generator=generator) for shape in ((4,), (9, 4), (9, 5)))
    dropped = torch.rand(3, 9, generator=generator) < 0.5
    whole = compensated_attention(query, keys, values, dropped, 0.5)
    for row in range(3):
        own = compensated_attention(query[row], keys[row], values[row], dropped[row], 0.5)
        torch.testing.assert_close(whole[row], own)


# Memory and kernels


def test_bytes_are_those_of_the_tensors(model: Any) -> None:
    policy = RazorAttention({0: [1]}, sink=2, floor=30, ratio=None, interval=8)
    prompts = [[5 + i % 90 for i in range(200)]] * 3
    with attach(model, policy) as handle:
        greedy(model, prompts)
    cache = handle.caches[0]
    held = 0
    for layer in cache.layers:
        assert isinstance(layer, RazorLayer)
        tensors = [*layer.tracks.values(), *layer.sums.values()]
        tensors += [] if layer.full is None else [layer.full.keys, layer.full.values]
        held += sum(tensor.nbytes for tensor in tensors)
    assert cache.nbytes == held
    slot = 2 * 16 * 4 + 4
    cut_heads, full = 3 * LAYERS - 1, 3 * (200 + NEW + 128) * 2 * 16 * 4
    assert held <= 3 * cut_heads * ((policy.kept(0) + 8) * slot + 2 * 16 * 4) + full


@pytest.mark.parametrize("name", ["window", "forgetful"])
def test_the_other_heads_take_sdpa_beside_flash(model: Any, prompts: Any, name: str) -> None:
    """A stand-in with flash attention's arguments: a (B, S) mask of the keys, causal by itself, no bias."""
    masks = []

    def flash(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, **kwargs: Any) -> Any:
        assert mask is None or mask.dim() == 2
        masks.append(key.size(1))
        count, width = query.size(2), key.size(2)
        column = torch.arange(width)
        seen = (column <= column[width - count :, None])[None, None]
        if mask is not None:
            seen = seen & mask[:, None, None, -width:].bool()
        seen = seen | (column == column[width - count :, None])  # padding looks at itself
        return ALL_ATTENTION_FUNCTIONS["sdpa"](module, query, key, value, seen, **kwargs)

    with attach(model, POLICIES[name]):
        ids, _ = greedy(model, prompts)
    model.config._attn_implementation = "flash_attention_2"
    try:
        with replaced("flash_attention_2", flash), attach(model, POLICIES[name]):
            assert greedy(model, prompts)[0] == ids
    finally:
        model.config._attn_implementation = "sdpa"
    assert set(masks) == {3, 1, 2}  # prompts, then the full heads of layers 0 and 2


# Scores and choice of heads


def test_scores_by_hand() -> None:
    attention = torch.zeros(1, 4, 4)
    for at, row in enumerate([[1], [0.5, 0.5], [0.7, 0.1, 0.2], [0.1, 0.6, 0.2, 0.1]]):
        attention[0, at, : at + 1] = torch.tensor(row)
    echo, induction = retrieval_scores(attention, 2)
    assert echo.item() == pytest.approx(0.65) and induction.item() == pytest.approx(0.15)


@pytest.mark.parametrize("nearest", [False, True])
@pytest.mark.parametrize("first", [0, 1])
@pytest.mark.parametrize("elements", [1, 2**22])
def test_streamed_scores_are_those_of_the_map(
    monkeypatch: pytest.MonkeyPatch, nearest: bool, first: int, elements: int
) -> None:
    """Three copies of 5 tokens; pairs counted one by one; key-value heads one by one and together."""
    monkeypatch.setattr("rltok.kv.razor_profile.BLOCK_ELEMENTS", elements)
    width, k = first + 15, 5
    generator = torch.Generator().manual_seed(0)
    query, key = (torch.randn(heads, width, 4, generator=generator) for heads in (4, 2))
    hidden = torch.ones(width, width).triu(1).bool()
    logits = (query @ key.repeat_interleave(2, 0).mT * 0.7).masked_fill(hidden, -torch.inf)
    maps = logits.softmax(-1)
    pairs = [
        (i, i - k * back)
        for i in range(first + k, width)
        for back in ([1] if nearest else [1, 2])
        if i - k * back >= first
    ]
    assert len(pairs) == (10 if nearest else 15)
    expected = [torch.stack([maps[:, i, j + step] for i, j in pairs]).mean(0) for step in (0, 1)]
    for found in (
        retrieval_scores(maps, k, first, nearest=nearest),
        *(streamed_scores(query, key, 0.7, k, first, nearest=nearest, block=block) for block in (1, 4, 64)),
    ):
        torch.testing.assert_close(found[0], expected[0])
        torch.testing.assert_close(found[1], expected[1])


@pytest.mark.parametrize(("width", "k", "first"), [(5, 2, 0), (2, 2, 0), (4, 0, 0), (4, 2, -1)])
def test_texts_without_copies_are_refused(width: int, k: int, first: int) -> None:
    with pytest.raises(ValueError, match=f"k={k} and first={first}"):
        retrieval_scores(torch.ones(1, width, width), k, first)


def test_the_best_heads_of_all_layers_are_full() -> None:
    echo = [[0.1, 0.9], None, [0.2, 0.3]]
    induction = [[0.4, 0.1], None, [0.4, 0.4]]
    # 4 heads: one by echo, two by induction, where three are equal and the lower layer, then head, comes first
    assert retrieval_heads(echo, induction, 0.25, 0.5) == {0: [0, 1], 2: [0]}
    assert retrieval_heads(echo, induction, 0.0, 0.25) == {0: [0]}
    assert retrieval_heads(echo, induction, 0.0, 0.0) == {}
    assert retrieval_heads(echo, induction, 1.0, 0.0) == {0: [0, 1], 2: [0, 1]}
    # the paper's shares of a model with 28 layers of 4 heads
    scores = [[float(layer * 4 + head) for head in range(4)] for layer in range(28)]
    assert sum(map(len, retrieval_heads(scores, scores).values())) == 16
    assert [head_count(n, 0.01) for n in (49, 50, 51, 112, 150)] == [0, 0, 1, 1, 2]
    with pytest.raises(ValueError, match=r"echo_share=1\.5"):
        retrieval_heads(echo, induction, 1.5, 0.1)
    with pytest.raises(ValueError, match="not finite"):
        retrieval_heads([[float("nan")]], [[0.1]])
    with pytest.raises(ValueError, match="different layers"):
        retrieval_heads(echo, [[0.1, 0.1]] * 3)


class Tokens:
    """As much of a tokenizer as a profile asks for."""

    bos_token_id: int | None = 1
    all_special_ids = (0, 1, 2)

    def __len__(self) -> int:
        return 97


def test_profile_of_a_model(model: Any, hybrid: Any, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        found = razor_profile(model, Tokens(), k=20, copies=3, echo_share=0.01, induction_share=0.34)
    assert "no echo head" in caplog.text  # 0.01 of 9 heads
    assert (found["heads"], found["echo_heads"], found["induction_heads"], found["tokens"]) == (9, 0, 3, 61)
    assert sum(map(len, found["full_heads"].values())) == 3
    expected = profile_by_maps(model, found)
    for name in ("echo", "induction"):
        torch.testing.assert_close(torch.tensor(found[name]), expected[name], atol=1e-5, rtol=1e-4)
    flat = sorted(
        (-score, layer, head) for layer, row in enumerate(found["induction"]) for head, score in enumerate(row)
    )
    assert {(layer, head) for _, layer, head in flat[:3]} == {
        (layer, head) for layer, heads in found["full_heads"].items() for head in heads
    }
    again = razor_profile(model, Tokens(), k=20, copies=3, echo_share=0.01, induction_share=0.34)
    assert again == found
    other = razor_profile(model, Tokens(), k=20, copies=3, seed=1)
    assert other["induction"] != found["induction"]
    mixed = razor_profile(hybrid, Tokens(), k=20, copies=3)
    assert mixed["echo"][1] is None and mixed["heads"] == 6
    RazorAttention(found["full_heads"]).check_model(model.config)


def profile_by_maps(model: Any, found: dict[str, Any]) -> dict[str, Tensor]:
    """(L, Hkv) scores from attention maps that the model itself gives."""
    seen: list[Tensor] = []

    def record(module: Any, args: Any, kwargs: Any, output: Any) -> None:
        seen.append(kwargs["input_ids"] if "input_ids" in kwargs else args[0])

    handle = model.model.register_forward_hook(record, with_kwargs=True)
    razor_profile(model, Tokens(), k=found["k"], copies=found["copies"])
    handle.remove()
    ids = seen[0]
    assert ids[0, 0] == 1 and not set(ids[0, 1:].tolist()) & {0, 1, 2}
    assert torch.equal(ids[0, 1:21], ids[0, 21:41]) and torch.equal(ids[0, 1:21], ids[0, 41:])
    model.set_attn_implementation("eager")
    with torch.no_grad():
        maps = model(input_ids=ids, output_attentions=True).attentions
    model.set_attn_implementation("sdpa")
    scores = [retrieval_scores(layer[0], 20, 1) for layer in maps]
    return {
        name: torch.stack([score[at].view(KEY_HEADS, -1).amax(1) for score in scores])
        for at, name in enumerate(("echo", "induction"))
    }


def test_a_head_that_copies_is_found() -> None:
    """Keys that hold the token before them, and queries that hold their own token, make an induction head."""
    k, copies = 12, 3
    codes = torch.eye(k).repeat(copies, 1) * 20
    query = torch.stack([codes, codes, torch.zeros_like(codes)])
    before = torch.cat([torch.zeros(1, k), codes[:-1]])
    key = torch.stack([before, codes, codes])
    echo, induction = streamed_scores(query, key, 1.0, k)
    assert induction.argmax() == 0 and echo.argmax() == 1
    # weights are shared by equal tokens; echo pairs compete with the token itself as well
    assert induction[0] == pytest.approx((12 * 1 + 12 * (0.5 + 0.5)) / 36, abs=1e-3)
    assert echo[1] == pytest.approx((12 * 0.5 + 12 * 2 / 3) / 36, abs=1e-3)


def test_profile_refusals(model: Any) -> None:
    with pytest.raises(ValueError, match="make 10001 tokens, the model has 512 positions"):
        razor_profile(model, Tokens())
    with pytest.raises(ValueError, match="copies=1"):
        razor_profile(model, Tokens(), k=20, copies=1)
    tokens = Tokens()
    tokens.bos_token_id = None
    bare = SimpleNamespace(bos_token_id=None, all_special_ids=range(97), __len__=None)
    assert razor_profile(model, tokens, k=20, copies=2)["bos"] == model.config.bos_token_id
    with pytest.raises(TypeError):
        razor_profile(model, bare, k=20, copies=2)


# Settings


def test_windows_grow_with_the_row() -> None:
    policy = RazorAttention({})
    assert (policy.sink, policy.floor, policy.ratio) == (4, 4000, 5)
    assert [policy.recent(length) for length in (10, 20_000, 20_004, 20_005, 30_000)] == [4000, 4000, 4000, 4001, 6000]
    grown = policy.kept_by_length(0)
    assert grown is not None and grown(30_000) == 4 + 6000 + 1 and policy.kept(0) == 4005
    assert RazorAttention({}, ratio=None).kept_by_length(0) is None


def test_heads_come_from_a_mapping_or_a_table(tmp_path: Path, model: Any) -> None:
    kinds = {"razor_attention": RazorAttention}
    text = json.loads(json.dumps({"type": "razor_attention", "full_heads": {0: [2, 1]}, "floor": 64}))
    assert build_typed(kinds, text, "rollout.kv") == RazorAttention({0: [1, 2]}, floor=64)
    path = tmp_path / "razor.json"
    facts = ModelFacts.of(model.config)
    write_table(path, RazorTable(facts, {2: [1]}))
    policy = build_typed(kinds, {"type": "razor_attention", "table": str(path)}, "rollout.kv")
    assert policy.full_heads == {2: (1,)} and policy.made_of == facts
    policy.check_model(model.config)
    assert policy.of_budget(64, {"sink": 8}) == {"floor": 56, "ratio": None}
    with pytest.raises(ConfigError, match="layers=3, this one has layers=2"):
        policy.check_model(type(model.config)(num_hidden_layers=2))
    with pytest.raises(ConfigError, match="keep one"):
        build_typed(kinds, {"type": "razor_attention", "table": str(path), "full_heads": {0: [1]}}, "rollout.kv")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({}, "full_heads and table are missing"),
        ({"full_heads": {}, "sink": -1}, "sink=-1"),
        ({"full_heads": {}, "floor": 0}, "floor=0"),
        ({"full_heads": {}, "ratio": 0}, "ratio=0"),
        ({"full_heads": {}, "interval": 0}, "interval=0"),
        ({"full_heads": {}, "positions": "cache"}, "positions='cache'"),
        ({"full_heads": {1: [2, 2]}}, r"full_heads\[1\]"),
    ],
)
def test_wrong_options_are_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        RazorAttention(**options)


def test_a_policy_by_length_needs_a_layer_of_its_own(model: Any) -> None:
    class Growing(StreamingLLM):
        def kept_by_length(self, layer: int) -> Callable[[int], int]:
            return lambda length: length

    with pytest.raises(NotImplementedError, match="Growing keeps more of longer rows"):
        PolicyCache(model.config, policy=Growing())


@pytest.mark.parametrize(
    ("heads", "words"),
    [({3: [0]}, "layers 0 to 2"), ({0: [3]}, "key-value heads 0 to 2"), ({1: [0]}, "sliding window of 8")],
)
def test_heads_that_the_model_does_not_have_are_refused(hybrid: Any, heads: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words), attach(hybrid, RazorAttention(heads)):
        greedy(hybrid, [[5, 6, 7]])
