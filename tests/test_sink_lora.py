"""SinkLoRA-style attention: the definition, its fast form, where it acts in a model, and training under it."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from tests_support import build_model, build_tokenizer, digit_dataset, even_reward, run_settings
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import GenerationConfig, MistralConfig, MistralForCausalLM, Qwen3ForCausalLM
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from rltok.attention.pattern import attach_pattern, full_attention
from rltok.attention.sink_lora import (
    SinkLoRAConfig,
    shifted_heads,
    sink_fixed_attention,
    sink_fixed_batch_mask,
    sink_fixed_mask,
    token_numbers,
)
from rltok.config import ConfigError
from rltok.fast import LoopSettings, generate_rows
from rltok.kv import StreamingLLM, attach
from rltok.models import ModelConfig
from rltok.recipe import load_recipe
from rltok.trainers import CreditConfig, CreditTrainer

ACTIVE = {"type": "sink_lora", "groups": 4, "shift_fraction": 0.5, "sinks": 1, "above": 8}
EVERYWHERE = SinkLoRAConfig(groups=4, shift_fraction=0.5, sinks=1, above=0)
CONFIGS = {
    "defaults, above 5": SinkLoRAConfig(above=5),
    "S2-Attn": SinkLoRAConfig(shift_fraction=0.5, sinks=0, above=0),
    "blocks": SinkLoRAConfig(shift_fraction=0.0, sinks=0, above=0),
    "all heads shifted, three groups": SinkLoRAConfig(3, 1.0, 2, 0),
    "more sinks than a group has tokens": SinkLoRAConfig(6, 0.5, 7, 3),
    "full": SinkLoRAConfig(groups=1, above=0),
}
PADDING = {
    "none": [(0, 19), (0, 19), (0, 19)],
    "left": [(7, 19), (1, 19), (0, 19)],
    "right": [(0, 19), (0, 11), (0, 4)],
    "both": [(3, 17), (0, 6), (9, 19)],
}


# The definition


def pairs(mask: Tensor) -> list[tuple[int, int]]:
    return [(query, key) for query, key in mask.nonzero().tolist()]


def simulated(length: int, groups: int, shift: int, sinks: int) -> list[tuple[int, int]]:
    """Allowed pairs by moving a list around, as S2-Attn moves a tensor."""
    size = -(-length // groups) if length >= groups else max(length, 1)
    order = list(range(length))
    order = order[shift:] + order[:shift]
    allowed = set()
    for start in range(0, length, size):
        block = order[start : start + size]
        allowed |= {(query, key) for query in block for key in block if key <= query}
    allowed |= {(query, key) for query in range(length) for key in range(min(sinks, query + 1))}
    return sorted(allowed)


def test_worked_example() -> None:
    plain, shifted = sink_fixed_mask(8, 2, groups=4, shift_fraction=0.5, sinks=0)
    assert pairs(plain)[:6] == [(0, 0), (1, 0), (1, 1), (2, 2), (3, 2), (3, 3)]
    assert pairs(plain) == [pair for i in range(0, 8, 2) for pair in ((i, i), (i + 1, i), (i + 1, i + 1))]
    own = {(i, i) for i in range(8)}
    assert set(pairs(shifted)) == own | {(2, 1), (4, 3), (6, 5), (7, 0)}
    assert not shifted[0, 7] and shifted[0].sum() == 1, "query 0 does not see key 7, only itself"


def test_wrapped_groups_of_the_published_order_leak_without_the_causal_part() -> None:
    """N = 16, G = 4: shifted queries 0 and 1 share a group with keys 14 and 15, which they must not see."""
    shifted = sink_fixed_mask(16, 1, shift_fraction=1.0, sinks=0)[0]
    assert shifted[14, 0] and shifted[15, 1] and shifted[15, 14], "one group"
    assert not shifted[0, 14] and not shifted[1, 15]


@pytest.mark.parametrize("length", [1, 2, 3, 4, 5, 7, 8, 13, 16, 30])
def test_no_future_own_key_and_the_simulated_pairs(length: int) -> None:
    for groups in (1, 2, 3, 4, 7):
        for sinks in (0, 1, 4):
            size = -(-length // groups) if length >= groups else length
            mask = sink_fixed_mask(length, 4, groups, 0.5, sinks)
            assert not mask.triu(1).any(), "no pair k > q"
            assert mask.diagonal(dim1=1, dim2=2).all(), "every query has a key"
            assert mask[:, :, :sinks].equal(torch.ones_like(mask).tril()[:, :, :sinks]), "sinks are seen by all"
            assert pairs(mask[0]) == pairs(mask[1]) == simulated(length, groups, 0, sinks)
            assert pairs(mask[2]) == pairs(mask[3]) == simulated(length, groups, size // 2, sinks)


def test_limits_of_the_mask() -> None:
    causal = torch.ones(9, 9, dtype=torch.bool).tril()
    assert all(head.equal(causal) for head in sink_fixed_mask(9, 3, groups=1, shift_fraction=0.5, sinks=0))
    assert all(head.equal(causal[:3, :3]) for head in sink_fixed_mask(3, 3)), "fewer tokens than groups"
    blocks = torch.block_diag(*[torch.ones(3, 3)] * 3).bool() & causal
    assert all(head.equal(blocks) for head in sink_fixed_mask(9, 3, groups=3, shift_fraction=0.0, sinks=0))
    assert sink_fixed_mask(0, 2).shape == (2, 0, 0)


def test_share_of_shifted_heads_is_the_last_ones() -> None:
    assert [shifted_heads(12, share) for share in (0.0, 0.25, 0.5, 1.0)] == [0, 3, 6, 12]
    assert shifted_heads(3, 0.5) == 2 and shifted_heads(10, 0.1) == 1 and shifted_heads(2, 0.25) == 1
    mask = sink_fixed_mask(16, 4, sinks=0)
    assert [bool(head[2, 1]) for head in mask] == [True, True, True, False], "1 of 4 heads starts a group at token 2"


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"groups": 0}, "groups=0; allowed: whole numbers >= 1"),
        ({"groups": 2.0}, "groups=2.0"),
        ({"sinks": -1}, "sinks=-1; allowed: whole numbers >= 0"),
        ({"above": -5}, "above=-5"),
        ({"shift_fraction": 1.5}, "shift_fraction=1.5; allowed: 0 to 1"),
    ],
)
def test_values_are_checked(values: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words.replace(".", r"\.")):
        SinkLoRAConfig(**values)


# The fast form


def padded(kind: str) -> Tensor:
    mask = torch.zeros(3, 19)
    for row, (start, end) in enumerate(PADDING[kind]):
        mask[row, start:end] = 1
    return mask


def states(heads: int = 6, shared: int = 2, width: int = 19, rows: int = 3, seed: int = 0) -> list[Tensor]:
    torch.manual_seed(seed)
    return [torch.randn(rows, n, width, 5, requires_grad=True) for n in (heads, shared, shared)]


def dense(query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> Tensor:
    times = query.size(1) // key.size(1)
    scores = query @ key.repeat_interleave(times, 1).transpose(-1, -2) * query.size(-1) ** -0.5
    weights = scores.masked_fill(~mask, -1e30).softmax(-1).masked_fill(~mask, 0.0)
    return weights @ value.repeat_interleave(times, 1)


@pytest.mark.parametrize("kind", PADDING)
@pytest.mark.parametrize("name", CONFIGS)
def test_fast_form_is_masked_attention_with_its_gradients(name: str, kind: str) -> None:
    """Shifted and unshifted query heads share key-value heads: 6 on 2, of which 2, 3 or 6 are shifted."""
    config, mask = CONFIGS[name], padded(kind)
    parts = states()
    found = sink_fixed_attention(*parts, mask, config)
    expected = dense(*parts, sink_fixed_batch_mask(mask, 6, config))
    counted = mask[:, None, :, None].bool()
    torch.testing.assert_close(found * counted, expected * counted, atol=1e-5, rtol=0)
    weights = torch.randn_like(found) * counted
    gradients = [torch.autograd.grad((output * weights).sum(), parts) for output in (found, expected)]
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)
    if kind == "none":
        torch.testing.assert_close(sink_fixed_attention(*parts, None, config), found, atol=1e-6, rtol=0)


def test_a_row_depends_neither_on_padding_nor_on_neighbours() -> None:
    query, key, value = (part.detach()[:1, :, :14] for part in states())
    alone = sink_fixed_attention(query, key, value, None, EVERYWHERE)
    for start in (0, 2, 5):
        others = [part.detach().clone() for part in states(seed=1)]
        mask = torch.ones(3, 19)
        mask[1] = 0
        mask[1, start : start + 14] = 1
        for part, own in zip(others, (query, key, value), strict=True):
            part[1, :, start : start + 14] = own[0]
        found = sink_fixed_attention(*others, mask, EVERYWHERE)[1, :, start : start + 14]
        torch.testing.assert_close(found, alone[0], atol=1e-6, rtol=0)


def test_tokens_are_numbered_by_rows_and_by_packed_samples() -> None:
    assert token_numbers(torch.tensor([[0, 0, 1, 1, 1], [1, 1, 0, 0, 0]])).tolist() == [
        [-1, -1, 0, 1, 2],
        [0, 1, -1, -1, -1],
    ]
    packed = torch.block_diag(*(torch.ones(n, n) for n in (3, 1, 2))).bool().tril()[None, None]
    assert token_numbers(packed).tolist() == [[0, 1, 2, 0, 0, 1]]


def test_packed_samples_are_those_of_separate_rows() -> None:
    lengths = (11, 3, 5)  # the second and third stay full: fewer than 6 tokens
    config = SinkLoRAConfig(3, 0.5, 1, above=5)
    parts = [part[:1] for part in states()]
    mask = torch.block_diag(*(torch.ones(n, n) for n in lengths)).bool().tril()[None, None]
    packed = sink_fixed_attention(*parts, mask, config)
    start = 0
    for length in lengths:
        own = [part[:, :, start : start + length] for part in parts]
        found = packed[:, :, start : start + length]
        torch.testing.assert_close(found, sink_fixed_attention(*own, None, config), atol=1e-6, rtol=0)
        start += length


class _Largest(TorchDispatchMode):
    """The largest tensor that any operation makes."""

    numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        for value in output if isinstance(output, tuple | list) else [output]:
            if isinstance(value, Tensor):
                self.numel = max(self.numel, value.numel())
        return output


def test_nothing_of_the_size_of_all_pairs_is_made() -> None:
    """T = 2048 with 8 groups: the largest tensor is the groups' mask, T (T / 8 + sinks), one for all heads and rows."""
    parts = [part.detach() for part in states(width=2048, rows=1)]
    with _Largest() as largest:
        sink_fixed_attention(*parts, None, SinkLoRAConfig(8, 0.25, 4, 0))
    assert largest.numel <= 2048 * (2048 // 8 + 4)


def test_shapes_are_checked() -> None:
    query, key, value = (part.detach() for part in states())
    with pytest.raises(ValueError, match="as many keys as queries"):
        sink_fixed_attention(query[:, :, :1], key, value, None, EVERYWHERE)
    with pytest.raises(ValueError, match=r"attention mask \(3, 7\)"):
        sink_fixed_attention(query, key, value, torch.ones(3, 7), EVERYWHERE)
    with pytest.raises(ValueError, match=r"of torch\.float32"):
        sink_fixed_attention(query, key, value, torch.zeros(3, 1, 19, 19), EVERYWHERE)


# At work in a model


@pytest.fixture(autouse=True)
def _nothing_stays() -> Iterator[None]:
    yield
    if "sdpa" in ALL_ATTENTION_FUNCTIONS._local_mapping:
        gc.collect()  # a trainer that failed to be built
    assert "sdpa" not in ALL_ATTENTION_FUNCTIONS._local_mapping, "the attention function is transformers' again"


def batch(width: int = 21) -> tuple[Tensor, Tensor]:
    """Left-padded prompts and right-padded completions, one row shorter than the others."""
    torch.manual_seed(3)
    ids, mask = torch.randint(3, 40, (3, width)), torch.ones(3, width, dtype=torch.long)
    mask[0, :4] = mask[1, 15:] = mask[2, :6] = mask[2, 14:] = 0
    return ids * mask, mask


def logits(model: Any, ids: Tensor, mask: Tensor | None, **options: Any) -> Tensor:
    return model(ids, attention_mask=mask, **{"use_cache": False} | options).logits


def test_model_attends_by_the_mask() -> None:
    """transformers takes (B, H, T, T) masks as they are: the same model under the dense definition is the reference."""
    model = build_model(build_tokenizer())
    ids, mask = batch()
    config = SinkLoRAConfig(4, 0.25, 2, above=10)  # the third row has 8 tokens
    expected = logits(model, ids, sink_fixed_batch_mask(mask, 4, config) | torch.eye(21, dtype=torch.bool))
    plain = logits(model, ids, mask)
    with attach_pattern(model, config) as pattern:
        found = logits(model, ids, mask)
        assert pattern.calls == 2, "once per layer"
    valid = mask.bool()
    torch.testing.assert_close(found[valid], expected[valid], atol=1e-5, rtol=0)
    torch.testing.assert_close(found[2][valid[2]], plain[2][valid[2]], atol=1e-6, rtol=0)
    assert (found[0][valid[0]] - plain[0][valid[0]]).abs().max() > 1e-3
    assert torch.equal(logits(model, ids, mask), plain), "removed"


@pytest.mark.parametrize("with_padding", [True, False])
def test_below_the_length_no_bit_changes(with_padding: bool) -> None:
    model = build_model(build_tokenizer())
    ids, mask = batch()
    given = mask if with_padding else torch.ones_like(mask)
    plain = logits(model, ids, given)
    for config in (SinkLoRAConfig(above=21), SinkLoRAConfig(groups=1, above=0), SinkLoRAConfig(groups=22, above=0)):
        with attach_pattern(model, config) as pattern:
            assert torch.equal(logits(model, ids, given), plain)
            assert pattern.calls == 0
    with attach_pattern(model, SinkLoRAConfig(above=(16 if with_padding else 20))) as pattern:
        logits(model, ids, given)
        assert pattern.calls == 2, "one token more"


def test_completions_see_everything() -> None:
    """Calls with a cache: a prompt in one pass, generate, and our own loop."""
    model = build_model(build_tokenizer()).eval()
    ids, mask = batch()
    config = GenerationConfig(max_new_tokens=6, do_sample=False, pad_token_id=0, eos_token_id=None)
    rows = [row[valid.bool()].tolist() for row, valid in zip(ids, mask, strict=True)]

    def completions() -> list[Any]:
        loop = generate_rows(model, rows, [1, 2, 3], LoopSettings(max_new_tokens=6, temperature=0.0), record=True)
        with attach(model, StreamingLLM(sink=2, recent=6)):
            policed = model.generate(ids, attention_mask=mask, generation_config=config)
        generated = model.generate(ids, attention_mask=mask, generation_config=config)
        with torch.no_grad():
            prefill = logits(model, ids, mask, use_cache=True)
        return [loop.ids, loop.logps, policed.tolist(), generated.tolist(), prefill.tolist()]

    plain = completions()
    with attach_pattern(model, EVERYWHERE) as pattern:
        assert completions() == plain
        assert pattern.calls == 0
        with full_attention(model):
            assert torch.equal(logits(model, ids, mask).detach(), torch.tensor(plain[4])), "without a cache as well"
        logits(model, ids, mask)
        assert pattern.calls == 2


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_gives_the_same_gradients(reentrant: bool) -> None:
    """What the backward pass runs again attends by the pattern, also when completions were made in between."""
    ids, mask = batch()

    def gradients(checkpointing: bool, config: SinkLoRAConfig) -> dict[str, Tensor]:
        model = build_model(build_tokenizer()).train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            model.enable_input_require_grads()
        with attach_pattern(model, config) as pattern:
            loss = logits(model, ids, mask)[mask.bool()].log_softmax(-1).square().sum()
            calls = pattern.calls
            with torch.no_grad(), full_attention(model):
                logits(model, ids[:1], None)
            loss.backward()
            if not config.is_neutral:
                assert pattern.calls == calls * (2 if checkpointing else 1)
        return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}

    expected, found = gradients(False, EVERYWHERE), gradients(True, EVERYWHERE)
    full = gradients(False, SinkLoRAConfig(groups=1))
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, atol=1e-5, rtol=1e-5)
    assert any((value - full[name]).abs().max() > 1e-2 for name, value in expected.items())


def test_packed_rows_of_a_model_are_those_of_separate_rows() -> None:
    model = build_model(build_tokenizer())
    ids, mask = batch()
    samples = [row[valid.bool()] for row, valid in zip(ids, mask, strict=True)]
    positions = torch.cat([torch.arange(len(sample)) for sample in samples])[None]
    with attach_pattern(model, SinkLoRAConfig(4, 0.5, 1, above=10)):
        packed = logits(model, torch.cat(samples)[None], None, position_ids=positions)[0]
        alone = torch.cat([logits(model, sample[None], None)[0] for sample in samples])
    torch.testing.assert_close(packed, alone, atol=1e-5, rtol=0)


def test_patterns_come_and_go_in_any_order() -> None:
    first, second = build_model(build_tokenizer()), build_model(build_tokenizer(), seed=1)
    ids, mask = batch()
    plain = [logits(model, ids, mask) for model in (first, second)]
    original = ALL_ATTENTION_FUNCTIONS["sdpa"]
    one = attach_pattern(first, EVERYWHERE)
    assert torch.equal(logits(second, ids, mask), plain[1]), "another model"
    two = attach_pattern(second, SinkLoRAConfig(above=0))
    one.remove()
    one.remove()
    assert torch.equal(logits(first, ids, mask), plain[0])
    assert not torch.allclose(logits(second, ids, mask)[0], plain[1][0], atol=1e-3)
    two.remove()
    assert ALL_ATTENTION_FUNCTIONS["sdpa"] is original
    for model, expected in zip((first, second), plain, strict=True):
        assert torch.equal(logits(model, ids, mask), expected)
        assert not any(module._forward_pre_hooks for module in model.modules())


def test_models_that_cannot_follow_a_pattern_are_refused() -> None:
    tokenizer = build_tokenizer()
    eager = build_model(tokenizer, attn_implementation="eager")
    with pytest.raises(
        ValueError, match="attn_implementation='eager' cannot run an attention pattern; allowed: 'sdpa'"
    ):
        attach_pattern(eager, EVERYWHERE)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    sliding = MistralForCausalLM(MistralConfig(vocab_size=9, num_key_value_heads=1, sliding_window=4, **sizes))
    with pytest.raises(ValueError, match="sliding_attention"):
        attach_pattern(sliding, EVERYWHERE)
    twice = build_model(tokenizer)
    with attach_pattern(twice, EVERYWHERE), pytest.raises(ValueError, match="has an attention pattern already"):
        attach_pattern(twice, EVERYWHERE)


# Training


def make(folder: Path, *, pattern: Any = None, peft: Any = None, model: Any = None, **changes: Any) -> CreditTrainer:
    doors = {name: changes.pop(name) for name in ("credit", "rollout") if name in changes}
    tokenizer = build_tokenizer()
    return CreditTrainer(
        build_model(tokenizer) if model is None else model,
        even_reward,
        CreditConfig(**run_settings(folder, **changes)),
        train_dataset=digit_dataset(),
        processing_class=tokenizer,
        attention_pattern=pattern,
        peft_config=peft,
        **doors,
    )


def trained(folder: Path, **options: Any) -> tuple[dict[str, Tensor], list[dict[str, Any]]]:
    """Parameters and log of a run whose pattern is taken away afterwards."""
    trainer = make(folder, **options)
    trainer.train()
    trainer.remove_attention_pattern()
    return {n: p.detach().clone() for n, p in trainer.model.named_parameters()}, trainer.state.log_history


@pytest.fixture(scope="module")
def plain_run(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tensor]:
    return trained(tmp_path_factory.mktemp("plain"))[0]


NEUTRAL = {
    "no group": {"type": "sink_lora", "groups": 1, "shift_fraction": 0.0, "sinks": 0, "above": 0},
    "no row is that long": {"type": "sink_lora", "above": 30},
}


@pytest.mark.parametrize("case", NEUTRAL)
def test_neutral_pattern_trains_bit_for_bit_as_none(tmp_path: Path, plain_run: dict[str, Tensor], case: str) -> None:
    found, log = trained(tmp_path, pattern=NEUTRAL[case])
    for name, value in plain_run.items():
        assert torch.equal(found[name], value), name
    if case == "no row is that long":
        assert log[0]["attention_pattern/rows"] == 0.0
        assert log[0]["correction/weight_mean"] == 1.0


def test_active_pattern_trains_with_weights_of_learner_over_sampler(
    tmp_path: Path, plain_run: dict[str, Tensor]
) -> None:
    found, log = trained(tmp_path, pattern=ACTIVE)
    assert not all(torch.equal(found[name], value) for name, value in plain_run.items())
    steps = [entry for entry in log if "loss" in entry]
    assert 0 < steps[0]["attention_pattern/rows"] <= 1
    assert steps[0]["correction/max_abs_diff"] > 1e-2, "the learner is another policy than the sampler"
    assert steps[0]["correction/unknown"] == 0.0, "every log-probability was recorded"


def scored(trainer: CreditTrainer) -> dict[str, Any]:
    prompts = [dict(trainer.train_dataset[i]) for i in range(6) for _ in range(4)]
    trainer.model.train()
    return trainer._generate_and_score_completions(prompts)


def sequence(output: dict[str, Any]) -> tuple[Tensor, Tensor, int]:
    ids = torch.cat([output["prompt_ids"], output["completion_ids"]], 1)
    mask = torch.cat([output["prompt_mask"], output["completion_mask"]], 1)
    return ids, mask, output["completion_ids"].size(1)


def reference_logps(model: Any, output: dict[str, Any], config: SinkLoRAConfig) -> Tensor:
    """(B, T) log-probabilities of the completions by the dense definition, of a model without a pattern."""
    ids, mask, keep = sequence(output)
    seen = sink_fixed_batch_mask(mask, 4, config) | torch.eye(ids.size(1), dtype=torch.bool)
    with torch.no_grad():
        scores = logits(model, ids, seen).log_softmax(-1)
    return scores[:, -keep - 1 : -1].gather(2, ids[:, -keep:, None])[..., 0]


@pytest.mark.parametrize("engine", ["fast", "transformers"])
def test_rollouts_are_full_and_every_score_is_patterned(tmp_path: Path, engine: str) -> None:
    config = SinkLoRAConfig(4, 0.5, 1, above=13)
    build_model(build_tokenizer()).save_pretrained(tmp_path / "model")

    def policy() -> Any:  # TRL loads the reference from the same folder
        return Qwen3ForCausalLM.from_pretrained(tmp_path / "model")

    recorded = {"engine": engine, "record_logps": "always"}
    plain = scored(make(tmp_path, beta=0.1, model=policy(), rollout=recorded))
    trainer = make(tmp_path, beta=0.1, model=policy(), pattern=config, rollout={"engine": engine})
    assert len(trainer._patterns) == 2, "policy and reference"
    assert trainer.doors.rollout.resolved_correction.mode == "truncate" and trainer.doors.rollout.records_logps
    output = scored(trainer)
    ids, mask, keep = sequence(output)
    if engine == "fast":  # its samples do not depend on the global random state
        assert torch.equal(output["completion_ids"], plain["completion_ids"])
        assert torch.equal(output["sampling_per_token_logps"], plain["sampling_per_token_logps"])
    counted, model = output["completion_mask"].bool(), build_model(build_tokenizer())
    sampler = reference_logps(model, output, SinkLoRAConfig(groups=1))
    learner = reference_logps(model, output, config)
    torch.testing.assert_close(output["sampling_per_token_logps"][counted], sampler[counted], atol=1e-5, rtol=0)
    for name in ("old_per_token_logps", "ref_per_token_logps"):
        torch.testing.assert_close(output[name][counted], learner[counted], atol=1e-5, rtol=0)
    new = trainer._get_per_token_logps_and_entropies(trainer.model, ids, mask, keep)[0]
    torch.testing.assert_close(new[counted], learner[counted], atol=1e-5, rtol=0)
    long = mask.sum(1) > 13
    assert long.any() and not long.all()
    weight = output["importance_sampling_ratio"]
    assert torch.equal(weight[~long], torch.ones_like(weight[~long])), "these rows were sampled by the learner"
    ratio = (learner - sampler).exp().clamp(max=2.0)
    torch.testing.assert_close(weight[long][counted[long]], ratio[long][counted[long]], atol=1e-4, rtol=0)
    assert trainer._metrics["train"]["attention_pattern/rows"] == [pytest.approx(long.float().mean().item())]
    trainer.remove_attention_pattern()


def test_adapters_packed_rows_and_checkpointing(tmp_path: Path) -> None:
    from peft import LoraConfig

    adapter = LoraConfig(
        r=2, target_modules=["q_proj"], modules_to_save=["embed_tokens", "norm"], task_type="CAUSAL_LM"
    )
    found = []
    for batching in (None, {"pack": True}):
        trainer = make(tmp_path, pattern=ACTIVE, peft=adapter, batching=batching, gradient_checkpointing=True)
        output = scored(trainer)
        ids, mask, keep = sequence(output)
        logps = trainer._get_per_token_logps_and_entropies(trainer.model, ids, mask, keep)[0]
        found.append(logps * output["completion_mask"])
        expected = reference_logps(build_model(build_tokenizer()), output, SinkLoRAConfig(4, 0.5, 1, 8))
        counted = output["completion_mask"].bool()
        torch.testing.assert_close(logps.detach()[counted], expected[counted], atol=1e-5, rtol=0)
        trainer.remove_attention_pattern()
    torch.testing.assert_close(found[0], found[1], atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("rollout", "mode", "records"),
    [
        ({}, "truncate", True),
        ({"correction": {"mode": "auto", "clip_max": 3.0}}, "truncate", True),
        ({"correction": {"level": "geometric", "clip_max": 1.01}}, "mask", True),
        ({"correction": {"mode": "mask"}}, "mask", True),
        ({"correction": {"mode": "off"}}, "off", False),
    ],
)
def test_correction_comes_on_unless_it_is_off(
    tmp_path: Path, rollout: dict[str, Any], mode: str, records: bool
) -> None:
    trainer = make(tmp_path, pattern=ACTIVE, rollout=rollout)
    decided = trainer.doors.rollout
    assert decided.resolved_correction.mode == mode and decided.records_logps == records
    if "correction" in rollout and "clip_max" in rollout["correction"]:
        assert decided.resolved_correction.clip_max == rollout["correction"]["clip_max"]
    assert not decided.modifies_sampler, "the sampler is the model itself"
    trainer.remove_attention_pattern()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"rollout": {"record_logps": "never"}}, "record_logps"),
        ({"credit": {"type": "preplan_anchor"}}, "model.attention_pattern and credit.type=PreplanAnchor"),
        ({"torch_compile": True}, "training.torch_compile=false"),
        (
            {"rollout": {"engine": "transformers"}, "generation_kwargs": {"use_cache": False}},
            "training.generation_kwargs.use_cache=false",
        ),
        ({"pattern": {"type": "sink_lora", "group": 2}}, "model.attention_pattern.group: unknown key"),
        ({"pattern": {"type": "sinklora"}}, "model.attention_pattern.type: unknown type 'sinklora'"),
        ({"pattern": {"type": "sink_lora", "sinks": -1}}, "sinks=-1"),
    ],
)
def test_trainer_refuses_what_would_be_wrong(tmp_path: Path, changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        make(tmp_path, **{"pattern": ACTIVE} | changes)
    assert words in str(caught.value)


def test_trainer_refuses_other_attention(tmp_path: Path) -> None:
    model = build_model(build_tokenizer(), attn_implementation="eager")
    with pytest.raises(ConfigError, match=r"attn_implementation='eager'.*Set model\.attn_implementation=sdpa"):
        make(tmp_path, pattern=ACTIVE, model=model)


def test_a_pattern_that_was_pushed_aside_stops_the_run(tmp_path: Path) -> None:
    trainer = make(tmp_path, pattern=ACTIVE)
    own = ALL_ATTENTION_FUNCTIONS["sdpa"]
    del ALL_ATTENTION_FUNCTIONS["sdpa"]
    with pytest.raises(RuntimeError, match=r"model\.attention_pattern did not act"):
        scored(trainer)
    ALL_ATTENTION_FUNCTIONS["sdpa"] = own
    trainer.remove_attention_pattern()


def test_pattern_leaves_with_its_trainer(tmp_path: Path) -> None:
    model = build_model(build_tokenizer())
    ids, mask = batch()
    plain = logits(model, ids, mask)
    trainer = make(tmp_path, pattern=ACTIVE, model=model)
    assert not torch.allclose(logits(model, ids, mask)[0, -1], plain[0, -1], atol=1e-3)
    del trainer
    gc.collect()
    assert torch.equal(logits(model, ids, mask), plain)
    trainer = make(tmp_path, pattern=ACTIVE)
    del trainer, model
    gc.collect()
    assert "sdpa" not in ALL_ATTENTION_FUNCTIONS._local_mapping, "also when the model is gone with it"


# Recipes


def test_section_of_a_recipe_is_checked_and_filled_in() -> None:
    filled = ModelConfig(path="x", attention_pattern={"type": "sink_lora", "sinks": 2}).attention_pattern
    assert filled == {"type": "sink_lora", "groups": 4, "shift_fraction": 0.25, "sinks": 2, "above": 2048}
    assert load_recipe("demo").model.attention_pattern is None
    recipe = load_recipe("demo", ["model.attention_pattern={type: sink_lora, above: 9}"])
    assert recipe.model.attention_pattern == filled | {"sinks": 4, "above": 9}
    for override, words in {
        "model.attention_pattern={type: sink_lora, grups: 2}": "model.attention_pattern.grups: unknown key",
        "model.attention_pattern={groups: 2}": "model.attention_pattern.type",
        "model.attention_pattern={type: sink_lora, groups: 0}": "groups=0",
    }.items():
        with pytest.raises(ConfigError) as caught:
            load_recipe("demo", [override])
        assert words in str(caught.value)
    with pytest.raises(ConfigError, match=r"model\.attn_implementation=sdpa"):
        ModelConfig(path="x", attn_implementation="eager", attention_pattern={"type": "sink_lora"})


def test_recipe_with_the_published_settings() -> None:
    recipe = load_recipe("sink_lora_qwen2.5_1.5b")
    lora, training = recipe.model.lora, recipe.training
    assert lora is not None and (lora.r, lora.alpha, lora.dropout) == (8, 16, 0.0)
    assert lora.target_modules == ["q_proj", "k_proj", "v_proj", "o_proj"]
    assert lora.modules_to_save == ["embed_tokens", "norm"]
    assert (training["learning_rate"], training["warmup_steps"], training["weight_decay"]) == (2e-5, 20, 0.0)
    assert training["lr_scheduler_type"] == "constant_with_warmup"
    pattern, overrides = recipe.model.attention_pattern, recipe.model.config_overrides
    assert pattern is not None and (pattern["groups"], pattern["shift_fraction"], pattern["sinks"]) == (4, 0.25, 4)
    assert overrides["rope_parameters"]["rope_type"] == "linear"
    assert overrides["rope_parameters"]["factor"] * 4096 == overrides["max_position_embeddings"]


def test_small_recipe_trains_under_the_pattern(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from rltok.run import RunDirectory, train

    monkeypatch.chdir(tmp_path)
    recipe = load_recipe("sink_lora", ["output_dir=out", "data.heldout_size=4"])
    assert train(recipe, Console(quiet=True)) == 0
    lines = [line for line in RunDirectory(Path("out")).read_metrics() if "loss" in line]
    assert len(lines) == 4 and lines[0]["attention_pattern/rows"] > 0.5
    assert lines[0]["correction/max_abs_diff"] > 1e-3
