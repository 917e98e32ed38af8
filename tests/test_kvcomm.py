"""KVCOMM: anchors that estimate what a prefix does to a shared text, and prompts put together from segments."""

from __future__ import annotations

import importlib.util
import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM, Trainer, TrainingArguments

from rltok.fast import LoopSettings, generate_rows, row_key
from rltok.kv.anchors import (
    KV,
    Anchor,
    KVAnchorPool,
    flush_on_step,
    following_weights,
    interpolate,
    joined,
    placeholder_weights,
    predict_as_anchor,
    used_anchors,
)
from rltok.kv.segments import FlushOnStep, SegmentCache, SegmentPrompt, dense_logps, sample_rows
from rltok.models import TINY, ModelConfig, load_model

SHAPE = (2, 1, 1, 2, 1)  # layers, batch, heads, tokens, channels


def full(value: float, shape: tuple[int, ...] = SHAPE) -> Tensor:
    return torch.full(shape, value)


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


# Worked numbers


def test_two_anchors_by_hand() -> None:
    """Distances 0.1 and 1.0, offsets +1 and -1."""
    weights = placeholder_weights(full(0.0), [full(0.1), full(1.0)])
    assert weights.shape == (2, 2)
    torch.testing.assert_close(weights[:, 0], torch.tensor([0.71095, 0.28905]), atol=1e-5, rtol=0)
    found = interpolate(full(0.0), [full(1.0), full(-1.0)], weights)
    assert torch.equal(found[0], torch.zeros(1, 1, 2, 1))
    torch.testing.assert_close(found[1], torch.full((1, 1, 2, 1), 0.42190), atol=1e-5, rtol=0)


@pytest.mark.parametrize(("far", "entropy", "new"), [(1.0, 0.58907, True), (5.0, 0.00086, False)])
def test_decisions_by_hand(far: float, entropy: float, new: bool) -> None:
    decision = predict_as_anchor(full(0.0), [full(0.1), full(far)], gamma=0.3)
    assert decision.entropy == pytest.approx(entropy, abs=1e-5)
    assert decision.new_anchor is new
    assert predict_as_anchor(full(0.0), [full(0.0)]).new_anchor  # one is not enough to compare
    assert predict_as_anchor(full(0.0), []).new_anchor


def test_entropy_is_a_share_of_the_largest() -> None:
    same = [full(0.5)] * 4
    assert predict_as_anchor(full(0.0), same, gamma=0.99).entropy == pytest.approx(2.0)
    assert predict_as_anchor(full(0.0), same, gamma=0.99).new_anchor
    assert not predict_as_anchor(full(0.0), same, gamma=1.0).new_anchor


def test_used_anchors_reach_the_share() -> None:
    assert used_anchors(torch.tensor([0.05, 0.95])) == [1]
    assert used_anchors(torch.tensor([0.3, 0.5, 0.15, 0.05])) == [1, 0, 2]
    assert used_anchors(torch.tensor([0.25] * 4), top_p=0.5) == [0, 1]


def test_weights_are_those_of_the_sums_written_out() -> None:
    base = noise(3, 1, 2, 4, 5)
    anchors = [noise(3, 1, 2, 4 + extra, 5, seed=7 + extra) for extra in (0, 2, 3)]
    weights = placeholder_weights(base, anchors)
    for token in range(4):
        far = [float((base[..., token, :] - anchor[..., token, :]).abs().mean()) for anchor in anchors]
        total = sum(math.exp(-d) for d in far)
        assert weights[:, token].tolist() == pytest.approx([math.exp(-d) / total for d in far], abs=1e-6)
    behind = following_weights(base, anchors)
    assert behind.shape == (3, 3, 1, 2, 1, 5)
    for layer, head, channel in ((0, 1, 2), (2, 0, 4)):
        mine = base[layer, 0, head, :, channel]
        far = [float((mine - anchor[layer, 0, head, -4:, channel]).norm()) for anchor in anchors]
        total = sum(math.exp(-d) for d in far)
        found = behind[:, layer, 0, head, 0, channel].tolist()
        assert found == pytest.approx([math.exp(-d) / total for d in far], abs=1e-6)


# Exact limits


def test_one_anchor_gives_base_plus_offset_and_offset_zero_the_base() -> None:
    base, offset = noise(3, 1, 2, 4, 5), noise(3, 1, 2, 4, 5, seed=1)
    weights = placeholder_weights(base, [base])
    assert torch.equal(weights, torch.ones(1, 4))
    found = interpolate(base, [offset], weights)
    assert torch.equal(found[1:], (base + offset)[1:]) and torch.equal(found[0], base[0])
    assert torch.equal(interpolate(base, [offset * 0], weights), base)
    assert torch.equal(interpolate(base, [offset], following_weights(base, [base]))[1:], (base + offset)[1:])


def test_an_anchor_that_is_too_short_is_refused() -> None:
    with pytest.raises(ValueError, match="anchor of 3 tokens is shorter than the text of 4"):
        placeholder_weights(noise(2, 1, 1, 4, 2), [noise(2, 1, 1, 3, 2)])


# Pool


def pair(x: Tensor) -> KV:
    return KV(x, x + 1)


def example(seed: int, tokens: int = 3) -> Anchor:
    base, offset = pair(noise(2, 1, 1, tokens, 4, seed=seed)), pair(noise(2, 1, 1, tokens, 4, seed=seed + 100))
    return Anchor(base, offset, pair(noise(2, 1, 1, 2, 4, seed=seed + 200)))


def test_the_pool_is_bounded_and_forgets_the_least_used_of_the_oldest() -> None:
    pool = KVAnchorPool(gamma=1.0, max_anchors=3, window=2)
    examples = {name: example(seed) for seed, name in enumerate("abc")}
    for name, anchor in examples.items():
        pool.add("here", name, anchor)
    # a text equal to `a` up to a little: `a` is used
    close = KV(*(x + 1e-3 for x in examples["a"].base))
    far = [float((close.values - anchor.base.values).norm()) for anchor in examples.values()]
    share = math.exp(-far[0]) / sum(math.exp(-d) for d in far)
    assert share > 0.9
    pool.correct("here", close, examples["a"].following)
    assert pool.uses("here") == {"a": 1, "b": 0, "c": 0}
    pool.add("here", "d", example(9))
    assert list(pool.uses("here")) == ["a", "c", "d"]  # b and c are unused, b is among the two oldest
    pool.add("there", "a", example(1))
    for seed in range(20):
        pool.add("here", f"more {seed}", example(seed))
        assert len(pool.uses("here")) == 3
    assert len(pool) == 4 and pool.nbytes == 4 * 2 * (3 + 3 + 2) * 2 * 4 * 4


def test_the_same_text_replaces_its_anchor() -> None:
    pool = KVAnchorPool()
    pool.add("here", "a", example(0))
    pool.add("here", "a", example(5))
    assert len(pool) == 1
    assert torch.equal(pool.usable("here", 3, 2)[0][1].base.keys, example(5).base.keys)


def test_only_anchors_that_are_long_enough_count() -> None:
    pool = KVAnchorPool(gamma=1.0)
    text = example(7, tokens=3)
    pool.add("here", "a", example(0, tokens=3))
    pool.add("here", "b", example(1, tokens=2))
    assert pool.decide("here", text.base, 2).new_anchor
    with pytest.raises(ValueError, match="1 usable anchors"):
        pool.correct("here", text.base, text.following)
    pool.add("here", "c", example(2, tokens=5))
    assert not pool.decide("here", text.base, 2).new_anchor
    assert pool.decide("here", text.base, 3).new_anchor  # the fixed segment behind is longer than theirs
    found, behind = pool.correct("here", text.base, text.following)
    assert found.tokens == 3 and behind.tokens == 2
    assert torch.equal(found.keys[0], text.base.keys[0]) and not torch.equal(found.keys[1], text.base.keys[1])


def test_keys_and_values_have_weights_of_their_own() -> None:
    pool = KVAnchorPool(gamma=1.0)
    near, far = full(0.0), full(3.0)
    pool.add("p", "a", Anchor(KV(near, far), KV(full(1.0), full(1.0)), KV(full(0.0), full(0.0))))
    pool.add("p", "b", Anchor(KV(far, near), KV(full(-1.0), full(-1.0)), KV(full(0.0), full(0.0))))
    found, _ = pool.correct("p", KV(full(0.0), full(0.0)), KV(full(0.0), full(0.0)))
    assert float(found.keys[1].min()) > 0.9 and float(found.values[1].max()) < -0.9


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"gamma": 1.5}, "gamma=1.5"),
        ({"gamma": -0.1}, "gamma=-0.1"),
        ({"max_anchors": 1}, "max_anchors=1"),
        ({"window": 0}, "window=0"),
        ({"top_p": 2}, "top_p=2"),
    ],
)
def test_numbers_outside_their_range_are_refused(options: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        KVAnchorPool(**options)


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.AdamW])
def test_a_step_of_an_optimizer_empties_the_pool(kind: Any) -> None:
    weight = torch.nn.Parameter(torch.ones(3))
    optimizer, pool = kind([weight], lr=0.1), KVAnchorPool()
    handle = flush_on_step(optimizer, pool)
    pool.add("here", "a", example(0))
    weight.sum().backward()
    assert len(pool) == 1
    optimizer.step()
    assert len(pool) == 0 and pool.version == 1
    handle.remove()
    pool.add("here", "a", example(0))
    optimizer.step()
    assert len(pool) == 1


def test_another_step_number_empties_the_pool() -> None:
    pool = KVAnchorPool()
    pool.sync(3)
    pool.add("here", "a", example(0))
    pool.sync(3)
    assert len(pool) == 1
    pool.sync(4)
    assert len(pool) == 0


# Segments


def tiny(kind: str) -> Any:
    if kind == "tiny-reasoner":
        return load_model(ModelConfig(path=TINY)).eval()
    torch.manual_seed(0)
    sizes: dict[str, Any] = {
        "vocab_size": 97,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "initializer_range": 0.1,
    }
    return LlamaForCausalLM(LlamaConfig(**sizes)).eval()


@pytest.fixture(scope="module", params=["tiny-reasoner", "llama"])
def model(request: pytest.FixtureRequest) -> Any:
    return tiny(request.param)


def text(seed: int, length: int) -> tuple[int, ...]:
    return tuple(torch.randint(5, 97, (length,), generator=torch.Generator().manual_seed(seed)).tolist())


def prompt_of(reader: int, *shared: tuple[int, ...]) -> SegmentPrompt:
    between = [text(50 + i, 3) for i in range(len(shared))]
    return SegmentPrompt(f"reader {reader}", (text(40, 4) + text(41 + reader, 6), *between), shared)


def of_model(model: Any, ids: tuple[int, ...]) -> KV:
    """Keys and values by a plain forward pass."""
    with torch.no_grad():
        layers = model(input_ids=torch.tensor([list(ids)]), use_cache=True).past_key_values.layers
    return KV(torch.stack([layer.keys for layer in layers]), torch.stack([layer.values for layer in layers]))


def test_a_rotated_segment_is_the_recomputed_one_in_the_first_layer(model: Any) -> None:
    prefix, shared = text(1, 9), text(2, 7)
    cache = SegmentCache(model, "kvcomm")
    moved = cache.rotated(of_model(model, shared), len(prefix))
    real = of_model(model, prefix + shared).span(len(prefix))
    for side in (0, 1):
        torch.testing.assert_close(moved[side][0], real[side][0], atol=2e-6, rtol=1e-5)
        assert (moved[side][1:] - real[side][1:]).abs().max() > 1e-2  # above, the prefix matters
    back = cache.rotated(moved, -len(prefix))
    torch.testing.assert_close(back.keys, of_model(model, shared).keys, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("mode", ["dense", "prefix"])
def test_prefilling_is_exact(model: Any, mode: Any) -> None:
    question, other = text(3, 11), text(4, 8)
    cache = SegmentCache(model, mode)
    prompts = [prompt_of(0, question), prompt_of(1, question), prompt_of(0, question, other), prompt_of(0, question)]
    copied = []
    for prompt in prompts:
        found = cache.prefill(prompt)
        assert found.exact and found.kv is not None
        for mine, real in zip(found.kv, of_model(model, prompt.ids[:-1]), strict=True):
            torch.testing.assert_close(mine, real, atol=2e-5, rtol=1e-4)
        copied.append(found.copied)
    # nothing; the beginning of all readers; prefix, question and what follows it; everything
    assert copied == ([0, 4, 10 + 11 + 2, 10 + 11 + 2] if mode == "prefix" else [0] * 4)
    assert cache.counts.copied == sum(copied)
    total = sum(len(prompt.ids) for prompt in prompts)
    assert cache.counts.prompt_tokens == total and cache.counts.computed == total - sum(copied)


def test_completions_are_those_of_the_rollout_loop(model: Any) -> None:
    """Equal beginnings change no sample, and the sampler's log-probabilities are those of a dense scoring."""
    prompts = [prompt_of(0, text(3, 11)), prompt_of(0, text(3, 11), text(4, 8)), prompt_of(1, text(3, 11))]
    keys = [[row_key(0, 0, i, j) for j in range(3)] for i in range(len(prompts))]
    cache = SegmentCache(model, "prefix")
    rows = [
        sample_rows(model, cache.prefill(prompt), mine, 12, (1,)) for prompt, mine in zip(prompts, keys, strict=True)
    ]
    assert cache.counts.copied > 0
    plain = generate_rows(
        model,
        [list(prompt.ids) for prompt in prompts for _ in range(3)],
        [key for mine in keys for key in mine],
        LoopSettings(max_new_tokens=12, end_ids=(1,)),
    )
    assert [ids for found in rows for ids in found.ids] == plain.ids
    for prompt, found in zip(prompts, rows, strict=True):
        for logps, dense in zip(found.logps, dense_logps(model, prompt.ids, found.ids), strict=True):
            torch.testing.assert_close(torch.tensor(logps), dense.detach(), atol=2e-5, rtol=0)


def test_gamma_zero_computes_everything(model: Any) -> None:
    cache = SegmentCache(model, "kvcomm", KVAnchorPool(gamma=0.0))
    for seed in range(4):
        prompt = prompt_of(0, text(seed, 11), text(seed + 20, 8))
        found = cache.prefill(prompt)
        assert found.exact and found.kv is not None
        torch.testing.assert_close(found.kv.keys, of_model(model, prompt.ids[:-1]).keys, atol=2e-5, rtol=1e-4)
    assert cache.counts.anchors == 8 and cache.counts.estimated == 0


def test_estimates_come_nearer_than_bases(model: Any) -> None:
    """With ten anchors, a new question is put together nearer to the real thing than from the segments alone; with two
    of them it need not be. The exact beginning is untouched."""
    cache = SegmentCache(model, "kvcomm", KVAnchorPool(gamma=0.0))
    for seed in range(10):
        assert cache.prefill(prompt_of(0, text(100 + seed, 11), text(200 + seed, 8))).exact
    assert cache.pool is not None and len(cache.pool) == cache.counts.anchors == 20
    cache.pool.gamma = 1.0
    far, bare = torch.zeros(2), torch.zeros(2)
    for seed in range(4):
        prompt = prompt_of(0, text(seed, 11), text(seed + 20, 8))
        found = cache.prefill(prompt)
        assert not found.exact and found.kv is not None
        assert found.estimated == 11 + 3 + 8 + 2 and found.kv.tokens == len(prompt.ids) - 1
        real = of_model(model, prompt.ids[:-1])
        torch.testing.assert_close(found.kv.keys[..., :10, :], real.keys[..., :10, :], atol=2e-5, rtol=1e-4)
        torch.testing.assert_close(found.kv.keys[0], real.keys[0], atol=2e-5, rtol=1e-4)
        segments = put_together(cache, model, prompt)
        for side in (0, 1):
            far[side] += (found.kv[side] - real[side]).norm() ** 2
            bare[side] += (segments[side] - real[side]).norm() ** 2
    assert (far < 0.95 * bare).all()


def put_together(cache: SegmentCache, model: Any, prompt: SegmentPrompt) -> KV:
    """A prompt of its segments as they are, each rotated to its place."""
    template = of_model(model, tuple(token for part in prompt.fixed for token in part))
    parts, at, passed = [], 0, 0
    for index, fixed in enumerate(prompt.fixed):
        parts.append(cache.rotated(template.span(passed, passed + len(fixed)), at - passed))
        at, passed = at + len(fixed), passed + len(fixed)
        if index < len(prompt.shared):
            parts.append(cache.rotated(of_model(model, prompt.shared[index]), at))
            at += len(prompt.shared[index])
    return joined(parts).span(0, at - 1)


def test_a_text_read_before_is_nearly_exact_beside_far_anchors(model: Any) -> None:
    """The same text under the same prefix: with offsets of its own the estimate is the real thing."""
    cache = SegmentCache(model, "kvcomm", KVAnchorPool(gamma=1.0), prompts=1)
    prompt = prompt_of(0, text(0, 11))
    real = of_model(model, prompt.ids[:-1])
    cache.prefill(prompt)
    assert cache.pool is not None
    place, kept = next(iter(cache.pool._kept.items()))
    anchor = kept[prompt.shared[0]].anchor
    away = Anchor(KV(*(x + 100 for x in anchor.base)), anchor.offset, anchor.following)
    cache.pool.add(place, "far away", away)
    cache._seen.clear()  # or the beginning would be copied
    found = cache.prefill(prompt)
    assert found.estimated == 11 + 2 and found.kv is not None
    for side in (0, 1):
        torch.testing.assert_close(found.kv[side], real[side], atol=1e-4, rtol=1e-3)


def test_new_weights_empty_everything() -> None:
    model = tiny("llama")
    cache = SegmentCache(model, "kvcomm", KVAnchorPool(gamma=1.0))
    prompt = prompt_of(0, text(0, 11))
    cache.prefill(prompt)
    assert cache.pool is not None and len(cache.pool) == 1 and len(cache) > 1
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    model(input_ids=torch.tensor([[5, 6, 7]]), labels=torch.tensor([[5, 6, 7]])).loss.backward()
    optimizer.step()  # nobody tells the cache
    found = cache.prefill(prompt)
    assert cache.counts.flushes == 1 and found.copied == 0 and found.kv is not None
    torch.testing.assert_close(found.kv.keys, of_model(model, prompt.ids[:-1]).keys, atol=2e-5, rtol=1e-4)


def test_a_trainer_flushes_at_every_optimizer_step(tmp_path: Path) -> None:
    model, pool = tiny("llama"), KVAnchorPool()
    pool.add("here", "a", example(0))
    rows = [{"input_ids": [5, 6, 7], "labels": [5, 6, 7]}] * 4
    arguments = TrainingArguments(
        str(tmp_path), max_steps=2, gradient_accumulation_steps=2, per_device_train_batch_size=1, use_cpu=True,
        report_to=[], save_strategy="no", disable_tqdm=True,
    )  # fmt: skip
    Trainer(model, arguments, train_dataset=rows, callbacks=[FlushOnStep(pool)]).train()  # type: ignore[arg-type]
    assert len(pool) == 0 and pool.version == 2


def test_the_base_of_an_answer_is_what_its_writer_left(model: Any) -> None:
    cache = SegmentCache(model, "kvcomm")
    prompt = prompt_of(0, text(0, 11))
    rows = sample_rows(model, cache.prefill(prompt), [3, 4], 7)
    answer = tuple(rows.ids[0][:-1])
    assert rows.kv is not None and rows.kv.tokens == len(answer) == 6
    real = of_model(model, prompt.ids + answer).span(len(prompt.ids))
    torch.testing.assert_close(rows.kv.keys, real.keys, atol=5e-5, rtol=1e-4)
    before = cache.counts.computed
    cache.publish(answer, rows.kv, len(prompt.ids))
    base = cache._base(answer)
    assert cache.counts.computed == before  # nothing to compute
    torch.testing.assert_close(base.keys[0], of_model(model, answer).keys[0], atol=1e-5, rtol=1e-4)
    cache.publish((*answer, 9), rows.kv, len(prompt.ids))  # the writer never read its last token
    cache._base((*answer, 9))
    assert cache.counts.computed == before + 7


def test_edges_of_prompts(model: Any) -> None:
    cache = SegmentCache(model, "kvcomm", KVAnchorPool(gamma=1.0))
    one = cache.prefill(SegmentPrompt("r", ((7,),)))
    assert one.kv is None
    assert len(sample_rows(model, one, [1, 2], 3).ids) == 2
    for seed in range(3):  # an empty text is skipped, a prompt may end with a text
        empty = SegmentPrompt("r", (text(40, 5), text(41, 3), text(42, 3)), ((), text(seed, 6)))
        ends = SegmentPrompt("s", (text(43, 5), ()), (text(seed, 6),))
        for prompt in (empty, ends):
            found = cache.prefill(prompt)
            assert found.kv is not None and found.kv.tokens == len(prompt.ids) - 1
            assert prompt is empty or found.exact
    assert cache.counts.estimated > 0


def test_refusals() -> None:
    model = tiny("llama")
    for options, words in [({"mode": "kvcom"}, "kvcomm"), ({"mode": "prefix", "pool": KVAnchorPool()}, "kvcomm")]:
        with pytest.raises(ValueError, match=words):
            SegmentCache(model, **options)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="prompts=0"):
        SegmentCache(model, prompts=0)
    with pytest.raises(ValueError, match="one more"):
        SegmentPrompt("r", ((1,),), ((2,),))
    with pytest.raises(ValueError, match=r"fixed\[0\]"):
        SegmentPrompt("r", ((), (1,)), ((2,),))
    sizes: dict[str, Any] = {"vocab_size": 50, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "sliding_window": 8}
    with pytest.raises(ValueError, match="sliding windows of 8"):
        SegmentCache(MistralForCausalLM(MistralConfig(**sizes, **heads)))


# The example


def script() -> Any:
    path = Path(__file__).parents[1] / "scripts" / "multi_agent.py"
    spec = importlib.util.spec_from_file_location("multi_agent", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["multi_agent"] = module
    spec.loader.exec_module(module)
    return module


def test_the_multi_agent_example(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "figures.json"
    arguments = ["--questions", "3", "--rounds", "2", "--samples", "6", "--max-new-tokens", "12", "--seed", "1"]
    assert script().main([*arguments, "--json", str(out)]) == 0
    figures = json.loads(out.read_text())
    dense, prefix, kvcomm, update = (figures[name] for name in ("dense", "prefix", "kvcomm", "update"))
    assert dense["saved"] == dense["estimated"] == 0
    assert prefix["saved"] == pytest.approx(prefix["copied"]) and prefix["saved"] > 0.3 and prefix["estimated"] == 0
    for exact in (dense, prefix):
        assert exact["xi_min"] == pytest.approx(1, abs=1e-4) and exact["weight_mean"] == pytest.approx(1, abs=1e-5)
    assert prefix["reward"] == dense["reward"] and prefix["prompt_tokens"] == dense["prompt_tokens"]
    assert kvcomm["estimated"] > 0.01 and kvcomm["anchors"] > 0
    assert kvcomm["xi_min"] < 0.9 and kvcomm["xi_p5"] < 1 and kvcomm["ess"] < 0.999  # correction is not optional
    assert update["rows_with_advantage"] > 0 and update["largest_change"] > 0
    assert update["anchors_before"] == kvcomm["anchors"] and update["anchors_after"] == update["held_after"] == 0
    printed = capsys.readouterr().out
    assert "kvcomm" in printed and "after it: 0, anchors 0" in printed
