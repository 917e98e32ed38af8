"""Cache policies on adapters, hybrid models, several tokens at once, on a GPU; the mask of flash attention."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
import torch
from kv_support import padded
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import Gemma3ForCausalLM, Gemma3TextConfig, Qwen3Config, Qwen3ForCausalLM
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from rltok.fast import LoopSettings, generate_rows
from rltok.kv import H2O, KVConfig, KVPolicy, PolicyCache, SnapKV, StreamingLLM, attach, policy_cache, watched_attention
from rltok.kv.policy import LayerView, best_slots, newest
from rltok.kv.slots import Rows, Slots
from rltok.rollout import RolloutConfig

PROMPTS = [[5, 9, 11], [7] * 9 + [8, 12, 30, 4], [21]]
SMALL: list[KVPolicy] = [
    StreamingLLM(sink=1, recent=4, interval=3),
    H2O(heavy=3, recent=3, interval=2),
    SnapKV(budget=6, window=2, interval=4),
]
DENSE = H2O(heavy=60, recent=60)


def build(**changes: Any) -> Qwen3ForCausalLM:
    torch.manual_seed(2)
    settings: dict[str, Any] = {
        "vocab_size": 61,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 128,
        "initializer_range": 0.4,
        "bos_token_id": None,
        "eos_token_id": None,
    }
    return Qwen3ForCausalLM(Qwen3Config(**(settings | changes))).eval()


def loop(model: Any, policy: KVPolicy | None, **options: Any) -> list[list[int]]:
    settings = LoopSettings(max_new_tokens=20, end_ids=(), temperature=0.0, **options)
    with policy_cache(model, policy) as cache:
        return generate_rows(model, PROMPTS, None, settings, cache=cache).ids


def generated(model: Any, policy: KVPolicy, prompts: list[list[int]], **options: Any) -> list[list[int]]:
    given = padded(prompts)
    settings = {"max_new_tokens": 20, "do_sample": False, "pad_token_id": 0, "eos_token_id": None} | options
    torch.manual_seed(0)
    with attach(model, policy):
        found = model.generate(**given, **settings)
    return found[:, given["input_ids"].size(1) :].tolist()


@pytest.mark.parametrize("policy", SMALL, ids=lambda policy: type(policy).__name__)
def test_an_adapter_is_followed_and_nothing_of_us_is_left(policy: KVPolicy) -> None:
    base = build()
    without = loop(base, policy)
    torch.manual_seed(0)
    settings = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False)
    model = get_peft_model(base, settings).eval()
    before = ALL_ATTENTION_FUNCTIONS["sdpa"]
    inside = generated(model, policy, PROMPTS)
    assert inside == loop(model, policy) != without
    assert loop(model, DENSE) == loop(model, None)
    assert ALL_ATTENTION_FUNCTIONS["sdpa"] is before
    assert "_prepare_cache_for_generation" not in vars(model.get_base_model())


@pytest.mark.parametrize("policy", SMALL, ids=lambda policy: type(policy).__name__)
def test_several_completions_of_a_prompt_are_those_of_the_prompt_repeated(policy: KVPolicy) -> None:
    model = build()
    once = generated(model, policy, PROMPTS[:2], do_sample=True, num_return_sequences=3)
    assert once == generated(model, policy, [p for p in PROMPTS[:2] for _ in range(3)], do_sample=True)
    assert len({tuple(row) for row in once}) > 3


@pytest.mark.parametrize("kind", ["qwen3", "gemma3"])
@pytest.mark.parametrize("policy", SMALL, ids=lambda policy: type(policy).__name__)
def test_sliding_layers_of_a_hybrid_model_keep_their_window(kind: str, policy: KVPolicy) -> None:
    types = ["sliding_attention", "full_attention", "sliding_attention"]
    if kind == "qwen3":
        model: Any = build(use_sliding_window=True, sliding_window=5, layer_types=types)
    else:
        torch.manual_seed(2)
        model = Gemma3ForCausalLM(
            Gemma3TextConfig(
                vocab_size=61,
                hidden_size=32,
                intermediate_size=48,
                num_hidden_layers=3,
                num_attention_heads=4,
                num_key_value_heads=2,
                head_dim=8,
                sliding_window=5,
                layer_types=types,
                initializer_range=0.4,
                tie_word_embeddings=False,
                eos_token_id=None,
            )
        ).eval()
    assert loop(model, DENSE) == loop(model, None)
    kept = loop(model, policy)
    assert kept != loop(model, None)
    assert kept == [loop_alone for prompt in PROMPTS for loop_alone in generated(model, policy, [prompt])]
    cache = PolicyCache(model.config, policy=policy)
    assert [layer.index for layer in cache.kept] == [1]


def test_a_model_of_sliding_layers_alone_is_refused() -> None:
    model = build(use_sliding_window=True, sliding_window=5, layer_types=["sliding_attention"] * 3)
    with pytest.raises(ValueError, match="sliding-window layers alone"):
        PolicyCache(model.config, policy=DENSE)


@pytest.mark.parametrize("policy", [SMALL[0], SMALL[1]], ids=lambda policy: type(policy).__name__)
def test_several_tokens_at_once_are_causal_over_what_is_kept(policy: KVPolicy) -> None:
    """Five tokens in one forward pass after a cut: the same logits as one after another, until the next cut is due."""
    model = build()
    slow = type(policy)(**{**vars(policy), "interval": 50})
    prompt, more = torch.tensor([PROMPTS[1]]), torch.tensor([[3, 14, 15, 9, 26]])
    logits = []
    with torch.no_grad(), watched_attention(model):
        for parts in ([more], list(more.split(1, dim=1))):
            cache = PolicyCache(model.config, 1, policy=slow, in_parts=False)
            cache.begin([0])
            model(input_ids=prompt, position_ids=torch.arange(13)[None], past_key_values=cache)
            place, found = 13, []
            for part in parts:
                at = torch.arange(place, place + part.size(1))[None]
                found.append(model(input_ids=part, position_ids=at, past_key_values=cache).logits)
                place += part.size(1)
            logits.append(torch.cat(found, 1))
    torch.testing.assert_close(logits[0], logits[1], atol=2e-5, rtol=0)


def test_the_mask_of_flash_attention_names_filled_slots_alone() -> None:
    """Flash attention is causal by itself, aligned at the right end, and takes one row of slots per batch row."""
    rows = Rows(2, prompt_in_parts=False)
    slots = Slots(budget=4, interval=2, rows=rows)
    rows.begin_prompt([0, 3])
    rows.advance(5)
    slots.advance(5)
    rows.in_prompt = False
    slots.prompt_done()
    rows.advance(1)
    slots.advance(1)
    device = torch.device("cpu")
    mask = slots.mask(1, flash=True, device=device)
    assert mask is not None and mask.tolist() == [[True] * 5, [False, False, True, True, True]]
    usual = slots.mask(1, flash=False, device=device)
    assert usual is not None and usual.shape == (2, 1, 1, 5) and torch.equal(usual[:, 0, 0], mask)


def test_a_limit_of_cache_tokens_admits_more_rows_under_a_policy() -> None:
    """Rows are counted with what the policy holds of them; their tokens stay the same."""
    model, policy = build(), StreamingLLM(sink=1, recent=4, interval=3)
    cache = PolicyCache(model.config, policy=policy)
    assert cache.columns(13, 20) == 8 and cache.columns(3, 2) == 5
    assert PolicyCache(model.config, policy=SnapKV(budget=6, window=2)).columns(13, 20) == 26
    settings = LoopSettings(max_new_tokens=20, end_ids=(), temperature=0.0, max_cache_tokens=40)
    passes: list[int] = []
    hook = model.register_forward_hook(lambda *_: passes.append(1))
    generate_rows(model, PROMPTS, None, settings)
    dense, passes[:] = len(passes), []
    with policy_cache(model, policy) as made:
        kept = generate_rows(model, PROMPTS, None, settings, cache=made).ids
    hook.remove()
    assert len(passes) < dense / 2  # three rows together, not one after another
    assert kept == loop(model, policy)


def test_a_prompt_of_one_token_and_a_budget_below_the_sinks() -> None:
    model = build()
    policy = StreamingLLM(sink=4, recent=1, interval=1)
    assert generated(model, policy, [[21]]) == [loop(model, policy)[2]]


@dataclass(frozen=True)
class LoudValues(KVPolicy):
    """A policy of a user: a window, and the values of largest norm."""

    keep: int = 8
    recent: int = 4

    def kept(self, layer: int) -> int:
        return self.keep

    def select(self, view: LayerView) -> Tensor:
        return best_slots(view.values.norm(dim=-1), newest(view, self.recent), view.filled, self.keep)


def test_a_policy_of_a_user_is_one_class() -> None:
    model, policy = build(), LoudValues(interval=3)
    kept = loop(model, policy)
    assert kept == [row for prompt in PROMPTS for row in generated(model, policy, [prompt])] != loop(model, None)
    assert loop(model, LoudValues(keep=99)) == loop(model, None)
    config = RolloutConfig(kv=KVConfig(policy))
    assert config.resolved_correction.veto == 1e-4
    unused = KVPolicy(interval=2)
    with pytest.raises(NotImplementedError):
        unused.kept(0)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("implementation", ["sdpa", "flash_attention_2"])
@pytest.mark.parametrize("policy", SMALL, ids=lambda policy: type(policy).__name__)
def test_on_a_gpu_rows_do_not_depend_on_their_neighbours(implementation: str, policy: KVPolicy) -> None:
    if implementation == "flash_attention_2":
        pytest.importorskip("flash_attn", reason="flash_attn is not installed")
    model: Any = build(attn_implementation=implementation, head_dim=32).to("cuda")
    if implementation == "flash_attention_2":
        model = model.to(torch.bfloat16)
    settings = LoopSettings(max_new_tokens=20, end_ids=(), temperature=0.0)
    with watched_attention(model):
        run = partial(generate_rows, model, keys=None, settings=settings, cache=partial(PolicyCache, policy=policy))
        together, alone = run(prompts=PROMPTS).ids, [run(prompts=[p]).ids[0] for p in PROMPTS]
    equal = sum(a == b for rows in zip(together, alone, strict=True) for a, b in zip(*rows, strict=True))
    assert equal / (3 * 20) > (0.99 if implementation == "sdpa" else 0.5)  # half precision parts at near ties
