"""Cache policies: exact in batches of ragged rows, equal to dense attention restricted to what they keep."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from kv_support import HEADS, KEY_HEADS, LAYERS, NEW, build, greedy, in_loop, random_prompts, replaced
from torch import Tensor
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from rltok.config import ConfigError
from rltok.kv import (
    H2O,
    RKV,
    CompressKV,
    KVPolicy,
    PolicyCache,
    SnapKV,
    StreamingLLM,
    allocate_layers,
    attach,
    build_policy,
    heavy_hitters,
    redundancy,
    semantic_head_scores,
    watched_attention,
)

LENGTHS = (5, 17, 33, 26)
POLICIES: dict[str, KVPolicy] = {
    "streaming": StreamingLLM(sink=2, recent=10, interval=1),
    "streaming_interval": StreamingLLM(sink=2, recent=10, interval=7),
    "h2o": H2O(heavy=6, recent=6, interval=5),
    "h2o_greedy": H2O(heavy=9, recent=0, interval=1),
    "h2o_window": H2O(heavy=6, recent=6, interval=5, observe="window", observed=4),
    "h2o_long_window": H2O(heavy=6, recent=6, interval=5, observe="window", observed=9),
    "h2o_normalised": H2O(heavy=6, recent=6, interval=7, observe="window", observed=4, normalise=True),
    "snap": SnapKV(budget=12, window=4),
    "snap_interval": SnapKV(budget=12, window=4, interval=5),
    "r_kv": RKV(budget=12, window=4, interval=6),
    "compress": CompressKV(heads={0: [1], 1: [0, 3], 2: [2]}, budgets=[9, 20, 12], window=4, interval=5),
}


@pytest.fixture(scope="module", params=["qwen3", "llama"])
def model(request: pytest.FixtureRequest) -> Any:
    return build(request.param)


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    return random_prompts(LENGTHS)


# Exactness


@pytest.mark.parametrize(
    "policy",
    [
        StreamingLLM(sink=2, recent=100),
        H2O(50, 50),
        RKV(budget=99),
        SnapKV(99, interval=4),
        CompressKV(budgets=[99, 80, 70], interval=4),
    ],
    ids=lambda policy: type(policy).__name__,
)
def test_a_budget_above_the_length_is_the_dense_cache_bit_for_bit(model: Any, prompts: Any, policy: KVPolicy) -> None:
    ids, logits = greedy(model, prompts)
    with attach(model, policy):
        kept_ids, kept = greedy(model, prompts)
    assert ids == kept_ids and torch.equal(logits, kept)


@pytest.mark.parametrize("name", POLICIES)
def test_a_row_depends_on_itself_alone(model: Any, prompts: Any, name: str) -> None:
    with attach(model, POLICIES[name]):
        ids, logits = greedy(model, prompts)
        wider, _ = greedy(model, prompts[:2], extra=9)
        for row, prompt in enumerate(prompts):
            alone, own = greedy(model, [prompt])
            assert alone[0] == ids[row]
            torch.testing.assert_close(logits[row], own[0], atol=2e-5, rtol=0)
    assert wider == ids[:2]
    dense, _ = greedy(model, prompts)
    assert dense != ids  # the policy does something


@pytest.mark.parametrize("name", POLICIES)
@pytest.mark.parametrize("rows", [None, 3])
def test_the_loop_gives_what_generate_gives(model: Any, prompts: Any, name: str, rows: int | None) -> None:
    """Rows of the loop join in the middle, in other phases of the interval, and in chunks of the prompt."""
    policy = POLICIES[name]
    with attach(model, policy):
        ids, _ = greedy(model, prompts)
    assert in_loop(model, policy, prompts * 2, max_rows=rows).ids == ids * 2


@pytest.mark.parametrize("name", POLICIES)
def test_equal_to_dense_attention_restricted_to_what_is_kept(model: Any, prompts: Any, name: str) -> None:
    policy = POLICIES[name]
    with attach(model, policy):
        ids, logits = greedy(model, prompts)
    for row, prompt in enumerate(prompts):
        visible, expected = replay(model, prompt, ids[row], policy)
        torch.testing.assert_close(logits[row], expected, atol=2e-5, rtol=0)
        for layer in range(LAYERS):
            over = policy.kept(layer) + (NEW if policy.interval is None else policy.interval)
            if len(prompt) + NEW > over:
                assert visible[layer][:, -1].sum(-1).max() <= over + 1


def replay(model: Any, prompt: list[int], ids: list[int], policy: KVPolicy) -> tuple[list[Tensor], Tensor]:
    """What one row sees, kept sets found by `Simulation`, and (NEW, V) logits of a dense pass that sees only that."""
    tokens = torch.tensor([[*prompt, *ids[:-1]]])
    total = tokens.size(1)
    visible = [torch.ones(KEY_HEADS, total, total, dtype=torch.bool).tril() for _ in range(LAYERS)]
    simulations = [Simulation(policy, layer, len(prompt), visible[layer]) for layer in range(LAYERS)]
    # a later layer's queries depend on what earlier layers kept, and a kept set on all queries before it
    with restricted(visible, lambda layer, query, key, scaling: simulations[layer].run(query, key, scaling)):
        logits = model(input_ids=tokens, use_cache=False).logits
    return visible, logits[0, len(prompt) - 1 :]


class Simulation:
    """Kept sets of one layer and row, token by token, from all queries and keys; fills `visible` as it goes."""

    def __init__(self, policy: KVPolicy, layer: int, prompt: int, visible: Tensor) -> None:
        self.policy, self.layer, self.prompt, self.visible = policy, layer, prompt, visible

    def run(self, query: Tensor, key: Tensor, scaling: float) -> None:
        total = key.size(1)
        for head in range(KEY_HEADS if not isinstance(self.policy, CompressKV) else 1):
            groups = HEADS // KEY_HEADS
            mine = list(range(head * groups, (head + 1) * groups))
            if isinstance(self.policy, CompressKV):
                mine = list(self.policy.heads.get(self.layer, range(HEADS)))
            kept = list(range(self.prompt))
            self.score = [0.0] * total
            for at in range(self.prompt):
                self.see(query, key, scaling, mine, at, list(range(at + 1)))
            kept = self.cut(query, key, scaling, mine, kept, self.prompt - 1)
            for at in range(self.prompt, total):
                kept.append(at)
                row = torch.zeros(total, dtype=torch.bool)
                row[kept] = True
                shown = slice(None) if isinstance(self.policy, CompressKV) else head
                self.visible[shown, at] = row
                self.see(query, key, scaling, mine, at, kept)
                interval = self.policy.interval
                if interval is not None and (at - self.prompt + 1) % interval == 0:
                    kept = self.cut(query, key, scaling, mine, kept, at)

    def weights(self, query: Tensor, key: Tensor, scaling: float, head: int, at: int, kept: list[int]) -> Tensor:
        of = head // (HEADS // KEY_HEADS)
        return (query[head, at] @ key[of, kept].T * scaling).softmax(-1)

    def see(self, query: Tensor, key: Tensor, scaling: float, heads: list[int], at: int, kept: list[int]) -> None:
        if not isinstance(self.policy, H2O):
            return
        for head in heads:
            for token, weight in zip(kept, self.weights(query, key, scaling, head, at, kept).tolist(), strict=True):
                self.score[token] += weight / len(heads)

    def cut(self, query: Tensor, key: Tensor, scaling: float, heads: list[int], kept: list[int], at: int) -> list[int]:
        policy, budget = self.policy, self.policy.kept(self.layer)
        if len(kept) <= budget:
            return kept
        if isinstance(policy, StreamingLLM):
            return kept[: policy.sink] + kept[len(kept) - policy.recent :]
        if isinstance(policy, H2O) and policy.observe == "all":
            scores, protected = [self.score[token] for token in kept], policy.recent
        elif isinstance(policy, H2O):
            votes = self.votes(query, key, scaling, heads, kept, range(at - policy.observed + 1, at + 1))
            scores, protected = votes.mean(0).tolist(), policy.recent
            if policy.normalise:  # by the queries of the window that could see the token
                scores = [
                    score / min(policy.observed, at - token + 1) for score, token in zip(scores, kept, strict=True)
                ]
        else:
            protected = policy.watched
            window = range(at - protected + 1, at + 1)
            if isinstance(policy, RKV):
                scores = self.r_kv(query, key, scaling, heads, kept, window, policy)
            else:
                votes = self.votes(query, key, scaling, heads, kept, window)[:, : len(kept) - protected]
                pad = policy.kernel // 2  # type: ignore[attr-defined]
                wide = torch.nn.functional.pad(votes, (pad, protected + pad))
                scores = (wide.unfold(1, 2 * pad + 1, 1).sum(-1) / (2 * pad + 1)).mean(0).tolist()
        others = range(len(kept) - protected)
        best = sorted(others, key=lambda i: (-scores[i], i))[: budget - protected]
        return [kept[i] for i in sorted([*best, *range(len(kept) - protected, len(kept))])]

    def votes(
        self, query: Tensor, key: Tensor, scaling: float, heads: list[int], kept: list[int], window: range
    ) -> Tensor:
        """(heads, kept) sums of the window's weights."""
        out = torch.zeros(len(heads), len(kept))
        for row, head in enumerate(heads):
            for at in window:
                seen = [i for i, token in enumerate(kept) if token <= at]
                if at >= 0:
                    out[row, seen] += self.weights(query, key, scaling, head, at, [kept[i] for i in seen])
        return out

    def r_kv(self, query: Any, key: Any, scaling: float, heads: Any, kept: Any, window: range, policy: RKV) -> list:
        before = [token for token in kept if token < window[0]]
        of = heads[0] // (HEADS // KEY_HEADS)
        rows = []
        for at in window:
            logits = torch.stack([query[head, at] @ key[of, before].T * scaling for head in heads]).amax(0)
            rows.append(logits.softmax(-1))
        importance = torch.stack(rows).mean(0)
        # the pooling reaches over the window's slots, which count 0
        half = policy.kernel // 2
        importance = torch.nn.functional.pad(importance, (half, half)).unfold(0, policy.kernel, 1).amax(-1)
        unit = torch.nn.functional.normalize(key[of, kept], dim=-1)
        similar = unit @ unit.T
        similar.fill_diagonal_(0)
        for i in range(len(kept)):
            above = [j for j in range(len(kept)) if similar[i, j] > policy.threshold]
            similar[i, above[-1] if above else 0] = 0
        repeated = (similar.sum(0) / len(kept)).softmax(-1)
        scores = (policy.lam * importance - (1 - policy.lam) * repeated[: len(before)]).tolist()
        return [*scores, *[float("inf")] * len(window)]


@contextmanager
def restricted(visible: list[Tensor], before: Callable[..., None]) -> Iterator[None]:
    """Attention of one row, without a cache, over what is visible to each key head; float64 where it matters."""

    def attention(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, **kwargs: Any) -> Any:
        scaling = kwargs["scaling"]
        before(module.layer_idx, query[0].double(), key[0].double(), scaling)
        groups = query.size(1) // key.size(1)
        seen = visible[module.layer_idx].repeat_interleave(groups, 0)
        keys, values = (x[0].repeat_interleave(groups, 0) for x in (key, value))
        weights = (query[0] @ keys.transpose(-1, -2) * scaling).masked_fill(~seen, -torch.inf).softmax(-1)
        return (weights @ values)[None].transpose(1, 2), None

    with replaced("sdpa", attention):
        yield


# Worked numbers


@pytest.mark.parametrize(
    ("interval", "expected"),
    [
        (1, ["01234", "01345", "01456", "01567", "01678"]),
        (2, ["01234", "012345", "01456", "014567", "01678"]),
    ],
)
def test_streaming_llm_step_by_step(interval: int, expected: list[str]) -> None:
    """Prompt of 5 tokens, 2 sinks, a window of 3, four new tokens."""
    model = build("llama")
    cache = PolicyCache(model.config, 1, policy=StreamingLLM(sink=2, recent=3, interval=interval), in_parts=False)
    cache.begin([0])
    found = []
    with watched_attention(model), torch.no_grad():
        ids = torch.tensor([[7, 8, 9, 10, 11]])
        for step in range(5):
            model(
                input_ids=ids,
                position_ids=torch.arange(5)[None] if step == 0 else torch.tensor([[4 + step]]),
                past_key_values=cache,
            )
            layer = cache.kept[0]
            positions = layer.tracks["positions"][0, 0, layer.start : layer.end]
            found.append("".join(map(str, positions.tolist())))
            ids = torch.tensor([[20 + step]])
    assert found == expected


def test_heavy_hitters_by_hand() -> None:
    scores = torch.tensor([1.837566, 1.055927, 0.106507])
    assert heavy_hitters(scores, 1, 2).tolist() == [0, 1, 2]
    grown = torch.tensor([2.447862, 1.055927, 0.189102, 0.224515, 0.082595])
    assert heavy_hitters(grown, 1, 2).tolist() == [0, 3, 4]
    assert heavy_hitters(torch.tensor([1.0, 1.0, 0.5]), 1, 1).tolist() == [0, 2]  # a tie goes to the older token


def test_redundancy_in_parts_is_that_of_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    keys, filled = torch.randn(2, 3, 29, 4, generator=generator), torch.ones(2, 29, dtype=torch.bool)
    filled[1, :11] = False
    whole = redundancy(keys, filled)
    monkeypatch.setattr("rltok.kv.r_kv.ROWS", 8)
    torch.testing.assert_close(redundancy(keys, filled), whole, atol=1e-7, rtol=1e-6)


def test_redundancy_by_hand_and_beside_padding() -> None:
    keys = torch.tensor([[1, 0], [0, 1], [1, 0.1], [0.7, 0.7]])[None, None]
    expected = torch.tensor([0.301941, 0.241374, 0.259390, 0.197294])
    torch.testing.assert_close(redundancy(keys, torch.ones(1, 4, dtype=torch.bool))[0, 0], expected, atol=1e-6, rtol=0)
    wide = torch.cat([torch.full((1, 1, 3, 2), 9.0), keys], 2)
    filled = torch.tensor([[False] * 3 + [True] * 4])
    torch.testing.assert_close(redundancy(wide, filled)[0, 0, 3:], expected, atol=1e-6, rtol=0)


def test_layer_budgets_by_hand() -> None:
    assert allocate_layers([0.5, 0.3, 0.15, 0.05], 256, 32, 192) == [97, 70, 51, 38]
    assert allocate_layers([0.9, 0.05, 0.03, 0.02], 256, 32, 192) == [147, 38, 36, 35]
    for total in range(128, 769, 37):
        budgets = allocate_layers([5, 1, 3, 0.1], total, 32, 192)
        assert sum(budgets) == total and min(budgets) >= 32 and max(budgets) <= 192
    with pytest.raises(ValueError, match="total=100"):
        allocate_layers([1, 1, 1, 1], 100, 32, 192)


def test_semantic_heads_by_hand() -> None:
    attention = torch.tensor([[[0.1, 0.2, 0.3, 0.1, 0.3]], [[0, 0.5, 0.1, 0.1, 0.3]]])
    score = semantic_head_scores(attention, torch.tensor([7, 9]), torch.tensor([1, 7, 9, 7, 2]), (1, 4))
    assert score.tolist() == pytest.approx([1.9])


# Settings and refusals


def test_memory_is_bounded_by_budget_and_interval(model: Any) -> None:
    policy = StreamingLLM(sink=2, recent=30, interval=8)
    prompts = [[5 + i % 90 for i in range(200)]] * 3
    with attach(model, policy) as handle:
        greedy(model, prompts)
    per_slot = LAYERS * 3 * KEY_HEADS * (2 * 16 * 4 + 4)
    assert 0 < handle.stats["cache_bytes"] <= (32 + 8) * per_slot


def test_nothing_is_left_behind(model: Any, prompts: Any) -> None:
    before = (ALL_ATTENTION_FUNCTIONS["sdpa"], dict(vars(model)), model.config._attn_implementation)
    with pytest.raises(ValueError, match="num_beams=2"), attach(model, StreamingLLM()):
        greedy(model, prompts, num_beams=2)
    assert (ALL_ATTENTION_FUNCTIONS["sdpa"], dict(vars(model)), model.config._attn_implementation) == before


def test_recipe_sections() -> None:
    assert build_policy({"policy": "streaming_llm", "budget": 64}) == StreamingLLM(sink=4, recent=60)
    assert build_policy({"policy": "h2o", "budget": 9, "observe": "window"}) == H2O(5, 4, observe="window")
    assert build_policy({"policy": "r_kv", "budget": 64, "lam": 0.2}) == RKV(budget=64, lam=0.2)
    for section, words in [
        ({"policy": "h3o"}, "h2o"),
        ({"policy": "h2o", "budget": 8, "heavy": 3}, "both say"),
        ({"policy": "h2o", "budget": 0}, "rollout.kv.budget"),
        ({"policy": "streaming_llm", "recent": 0}, "recent=0"),
        ({"policy": "snap_kv", "budget": 8}, "window=32"),
        ({"policy": "r_kv", "interval": 0}, "interval=0"),
        ("h2o", "not a mapping"),
    ]:
        with pytest.raises(ConfigError, match=words):
            build_policy(section)  # type: ignore[arg-type]


def test_eager_attention_is_refused() -> None:
    model = build("llama")
    model.set_attn_implementation("eager")
    with pytest.raises(ValueError, match="attn_implementation='eager'"), attach(model, StreamingLLM()):
        pass
