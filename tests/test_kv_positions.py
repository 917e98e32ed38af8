"""Positions inside the cache: kept keys move up, and attention is what it would be had they been rotated there."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from kv_support import HEADS, KEY_HEADS, LAYERS, NEW, greedy, in_loop, padded, random_prompts, replaced, sharpened
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from rltok.kv import H2O, RKV, CompressKV, KVPolicy, PolicyCache, SnapKV, StreamingLLM, attach, watched_attention
from rltok.kv.rotary import layer_inv_freq, model_inv_freq, moves, rotate_keys

YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128, "rope_theta": 10000.0}
LINEAR = {"rope_type": "linear", "factor": 3.0, "rope_theta": 10000.0}
POLICIES: dict[str, KVPolicy] = {
    "streaming": StreamingLLM(sink=2, recent=10, interval=1, positions="cache"),
    "streaming_interval": StreamingLLM(sink=2, recent=10, interval=7, positions="cache"),
    "h2o": H2O(heavy=6, recent=6, interval=5, positions="cache"),
    "snap": SnapKV(budget=12, window=4, positions="cache"),
    "r_kv": RKV(budget=12, window=4, interval=6, positions="cache"),
    "compress": CompressKV(budgets=[9, 20, 12], window=4, interval=5, positions="cache"),
}


def config_of(kind: str, **options: Any) -> Any:
    sizes: dict[str, Any] = {
        "vocab_size": 97,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KEY_HEADS,
        "head_dim": 16,
        "max_position_embeddings": 512,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    return AutoConfig.for_model(kind, **copy.deepcopy(sizes | options))  # a configuration writes into its rope


def build(kind: str, **options: Any) -> Any:
    torch.manual_seed(1)
    return sharpened(AutoModelForCausalLM.from_config(config_of(kind, **options), attn_implementation="sdpa"))


@pytest.fixture(scope="module", params=["qwen3", "llama", "llama-yarn", "qwen3-linear", "stablelm"])
def model(request: pytest.FixtureRequest) -> Any:
    kind, _, rope = request.param.partition("-")
    options = {"": {}, "yarn": {"rope_parameters": YARN}, "linear": {"rope_parameters": LINEAR}}
    return build(kind, **options[rope])


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    return random_prompts((5, 17, 33))


# References


def turned(x: Tensor, at: Tensor, inv_freq: Tensor) -> Tensor:
    """(S, D) float64 rotated by `at` (S,) positions: a plane of two halves as one complex number."""
    half = inv_freq.numel()
    planes = torch.complex(x[:, :half], x[:, half : 2 * half])
    angle = at.double()[:, None] * inv_freq.double()
    planes = planes * torch.polar(torch.ones_like(angle), angle)
    return torch.cat([planes.real, planes.imag, x[:, 2 * half :]], 1)


def decode(model: Any, rows: list[list[int]], policy: KVPolicy, new: int) -> tuple[list[list[int]], Tensor, list[Any]]:
    """Greedy ids, (rows, new, V) logits, and kept[step][layer][row] -> (Hkv, n) numbers of tokens before a step."""
    ids, mask = padded(rows).values()
    at = (mask.cumsum(1) - 1).clamp(min=0)
    cache = PolicyCache(model.config, len(rows), policy=policy)
    cache.begin([ids.size(1) - len(row) for row in rows])
    out, logits, kept = [], [], []
    with watched_attention(model), torch.no_grad():
        for _ in range(new):
            result = model(input_ids=ids, attention_mask=mask, position_ids=at, past_key_values=cache)
            entries = [cache.of_row(row, cache.of.lengths[row]) for row in range(len(rows))]
            kept.append([[entry[layer][2].clone() for entry in entries] for layer in range(LAYERS)])
            logits.append(result.logits[:, -1])
            ids = logits[-1].argmax(-1)[:, None]
            out.append(ids[:, 0])
            mask, at = torch.cat([mask, torch.ones_like(ids)], 1), at[:, -1:] + 1
    return torch.stack(out, 1).tolist(), torch.stack(logits, 1), kept


def reference(model: Any, prompt: list[int], ids: list[int], kept: Callable[[int, int], Tensor]) -> tuple[Tensor, int]:
    """(NEW, V) logits of one pass without a cache: every generated token attends in float64 to what is kept(step,
    layer) (Hkv, n) and to itself, with keys un-rotated and rotated again at positions inside the cache.

    The number beside them is the largest distance between a query and a key that it reads.
    """
    tokens = torch.tensor([[*prompt, *ids[:-1]]])
    furthest = 0

    def attention(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, **options: Any) -> Any:
        nonlocal furthest
        inv_freq = frequencies(model, module.layer_idx)
        queries, keys, values = query[0].double(), key[0].double(), value[0].double()
        everything = torch.arange(keys.size(1))
        out = torch.zeros_like(queries)
        for head in range(queries.size(0)):
            of = head // (HEADS // KEY_HEADS)
            plain = turned(keys[of], -everything, inv_freq)
            for at in range(keys.size(1)):
                if at < len(prompt):
                    seen = everything[: at + 1]
                else:
                    before = kept(at - len(prompt), module.layer_idx)[of]
                    seen = torch.cat([before.long(), torch.tensor([at])])
                places = at - (len(seen) - 1) + torch.arange(len(seen))
                furthest = max(furthest, len(seen))
                weights = turned(plain[seen], places, inv_freq) @ queries[head, at] * options["scaling"]
                out[head, at] = weights.softmax(0) @ values[of, seen]
        return out.to(query.dtype)[None].transpose(1, 2), None

    with replaced("sdpa", attention), torch.no_grad():
        logits = model(input_ids=tokens, use_cache=False).logits
    return logits[0, len(prompt) - 1 :], furthest


def frequencies(model: Any, layer: int) -> Tensor:
    return model.model.rotary_emb.inv_freq


def streaming_kept(policy: StreamingLLM, prompt: int, step: int) -> list[int]:
    """Tokens that StreamingLLM holds when the generated token number `step` comes, counted one by one."""

    def cut(kept: list[int]) -> list[int]:
        over = len(kept) > policy.sink + policy.recent
        return kept[: policy.sink] + kept[len(kept) - policy.recent :] if over else kept

    kept = cut(list(range(prompt)))
    for new in range(step):
        kept = [*kept, prompt + new]
        if policy.interval is not None and (new + 1) % policy.interval == 0:
            kept = cut(kept)
    return kept


# Exactness


@pytest.mark.parametrize("name", POLICIES)
def test_equal_to_attention_over_the_kept_tokens_at_cache_positions(model: Any, prompts: Any, name: str) -> None:
    policy = POLICIES[name]
    ids, logits, kept = decode(model, prompts, policy, NEW)
    moved = False
    for row, prompt in enumerate(prompts):
        expected, _ = reference(model, prompt, ids[row], lambda step, layer, row=row: kept[step][layer][row])
        torch.testing.assert_close(logits[row], expected, atol=2e-5, rtol=0)
        if isinstance(policy, StreamingLLM):
            for step in range(NEW):
                alone = streaming_kept(policy, len(prompt), step)
                assert kept[step][0][row].tolist() == [alone] * KEY_HEADS
        moved = moved or len(prompt) > policy.kept(0)
    assert moved
    stays = type(policy)(**{**vars(policy), "positions": "original"})
    _, other, _ = decode(model, prompts, stays, NEW)
    assert (other[2] - logits[2]).abs().max() > 1e-2  # positions are not a detail


@pytest.mark.parametrize("name", POLICIES)
@pytest.mark.parametrize("rows", [None, 2])
def test_the_loop_gives_what_generate_gives(model: Any, prompts: Any, name: str, rows: int | None) -> None:
    policy = POLICIES[name]
    expected, _, _ = decode(model, prompts, policy, NEW)
    assert in_loop(model, policy, prompts * 2, max_rows=rows).ids == expected * 2
    with attach(model, policy):
        assert greedy(model, prompts)[0] == expected


def test_nothing_evicted_is_the_dense_cache_bit_for_bit(model: Any, prompts: Any) -> None:
    ids, logits = greedy(model, prompts)
    with attach(model, StreamingLLM(sink=2, recent=100, interval=1, positions="cache")):
        kept_ids, kept = greedy(model, prompts)
    assert ids == kept_ids and torch.equal(logits, kept)


def test_far_beyond_the_trained_length_no_distance_is_new() -> None:
    """A model of 48 positions writes 150 tokens, and reads no key further away than 22."""
    model = build("qwen3", max_position_embeddings=48)
    policy = StreamingLLM(sink=2, recent=12, interval=8, positions="cache")
    prompt = list(range(5, 25))
    ids, logits, kept = decode(model, [prompt], policy, 150)
    expected, furthest = reference(model, prompt, ids[0], lambda step, layer: kept[step][layer][0])
    assert furthest <= 22 < 48 < len(prompt) + len(ids[0])
    # float32 angles of positions near 170, in the model as in the cache
    torch.testing.assert_close(logits[0], expected, atol=2e-4, rtol=0)


# Rotation


def test_rotation_by_hand() -> None:
    keys = torch.tensor([[1.0, 0.0, 2.0, 0.0, 7.0]])  # planes (1, 2) and (0, 0); the fifth is not rotary
    inv_freq = torch.tensor([torch.pi / 2, 1.0])
    torch.testing.assert_close(rotate_keys(keys, 1, inv_freq), torch.tensor([[-2.0, 0.0, 1.0, 0.0, 7.0]]))
    torch.testing.assert_close(rotate_keys(keys, torch.tensor([2]), inv_freq), torch.tensor([[-1, 0, -2.0, 0, 7]]))
    assert rotate_keys(keys.bfloat16(), 3, inv_freq).dtype == torch.bfloat16


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rotation_of_slots_of_heads(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    keys = torch.randn(2, 3, 5, 8, generator=generator).to(dtype)
    delta = torch.randint(0, 900, (2, 3, 5), generator=generator)
    inv_freq = 1 / 10000 ** (torch.arange(0, 6, 2) / 6)
    moved = rotate_keys(keys, delta, inv_freq)
    for row in range(2):
        for head in range(3):
            expected = turned(keys[row, head].double(), delta[row, head], inv_freq)
            tolerance = 2e-4 if dtype == torch.float32 else 2e-2
            torch.testing.assert_close(moved[row, head].double(), expected, atol=tolerance, rtol=tolerance)
    assert torch.equal(rotate_keys(keys, 0, inv_freq), keys)
    assert torch.equal(rotate_keys(keys, delta, torch.zeros(0)), keys)
    with pytest.raises(ValueError, match="5 frequencies"):
        rotate_keys(keys, 1, torch.ones(5))


def test_moves_by_hand() -> None:
    """Slots 0, 1, 4, 5, 6 of 7 become the last five: the two old ones move by 2."""
    assert moves(torch.tensor([0, 1, 4, 5, 6]), 7).tolist() == [2, 2, 0, 0, 0]
    assert moves(torch.tensor([[2, 3], [0, 3]]), 4).tolist() == [[0, 0], [2, 0]]


# Frequencies


@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3", "mistral", "gemma2", "olmo2", "stablelm", "qwen3_moe"])
@pytest.mark.parametrize("rope", [None, LINEAR, YARN])
def test_frequencies_of_a_configuration_are_those_of_the_model(kind: str, rope: Any) -> None:
    config = config_of(kind, **({} if rope is None else {"rope_parameters": rope}))
    state = torch.random.get_rng_state()
    found = model_inv_freq(config)
    assert torch.equal(state, torch.random.get_rng_state())
    rotary = AutoModelForCausalLM.from_config(config).model.rotary_emb
    assert len(found) == LAYERS
    for inv_freq in found:
        assert torch.equal(inv_freq, rotary.inv_freq)


def test_frequencies_of_layers_that_differ() -> None:
    ropes = {
        "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
        "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
    }
    kinds = ["sliding_attention", "full_attention", "sliding_attention"]
    config = config_of("gemma3_text", layer_types=kinds, rope_parameters=ropes)
    rotary = AutoModelForCausalLM.from_config(config).model.rotary_emb
    for layer, kind in enumerate(kinds):
        assert torch.equal(layer_inv_freq(config, layer), getattr(rotary, f"{kind}_inv_freq"))
    without = config_of("smollm3", no_rope_layers=[1, 0, 1])  # its middle layer knows no positions
    assert [inv_freq.numel() for inv_freq in model_inv_freq(without)] == [8, 0, 8]


def test_a_scale_of_cosines_is_not_applied_again() -> None:
    """YaRN's `attention_scaling` is in the cached key already."""
    model = build("llama", rope_parameters=YARN)
    rotary = model.model.rotary_emb
    assert rotary.attention_scaling > 1.1
    keys = torch.randn(1, 1, 1, 16, generator=torch.Generator().manual_seed(0))
    moved = rotate_keys(keys, 100, layer_inv_freq(model.config, 0))
    torch.testing.assert_close(moved.norm(), keys.norm())


@pytest.mark.parametrize(
    ("kind", "options", "words"),
    [
        ("llama", {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}}, "'dynamic'"),
        (
            "phi3",
            {
                "rope_parameters": {
                    "rope_type": "longrope",
                    "rope_theta": 1e4,
                    "short_factor": [1.0] * 8,
                    "long_factor": [4.0] * 8,
                    "original_max_position_embeddings": 64,
                }
            },
            "'longrope'",
        ),
        ("gpt2", {"n_layer": 2, "n_head": 2, "n_embd": 32}, "no rotary keys"),
        ("cohere", {}, "halves of the head"),  # neighbouring dimensions are a plane
        ("glm", {}, "halves of the head"),
    ],
)
def test_models_whose_keys_cannot_move_are_refused(kind: str, options: Any, words: str) -> None:
    config = config_of(kind, **options) if kind != "gpt2" else AutoConfig.for_model(kind, **options)
    policy = StreamingLLM(sink=2, recent=8, positions="cache")
    with pytest.raises(ValueError, match=words) as refused:
        PolicyCache(config, 1, policy=policy)
    assert "positions: original" in str(refused.value)
    PolicyCache(config, 1, policy=StreamingLLM(sink=2, recent=8))
