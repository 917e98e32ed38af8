"""Attention sinks and dormant heads: worked numbers, dense references, a model made by hand, callback and command."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from rich.console import Console
from safetensors.torch import load_file
from sinks_worker import row_stats
from tests_support import build_model, build_tokenizer, digit_dataset, even_reward, run_on_ranks, run_settings
from torch import Tensor, nn
from transformers import (
    GptOssConfig,
    GptOssForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3NextConfig,
    Qwen3NextForCausalLM,
    Trainer,
    TrainingArguments,
)
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from rltok.attention import UnprobeableAttentionError, model_sinks, sink_monitor
from rltok.attention.model_sinks import (
    SinkStatistics,
    loss_change,
    move_to_sink,
    next_token_loss,
    propose_sink,
    sink_statistics,
    zero_out,
)
from rltok.attention.pattern import attach_pattern
from rltok.attention.sink_lora import SinkLoRAConfig
from rltok.attention.sink_monitor import SinkDiagnostics, sink_metrics, training_rows
from rltok.attention.sinks import SUMS, AttentionRows, SinkStats, norm_factor, residual_peak, sink_stats
from rltok.cli import main
from rltok.config import ConfigError
from rltok.recipe import load_recipe
from rltok.run import RunDirectory, install_sinks, train
from rltok.sink_config import SinkConfig
from rltok.sinks import SinkOptions, describe_proposal, text_rows
from rltok.trainers import CreditConfig, CreditTrainer

HEADS = ("sink_mass", "value_ratio", "output_norm", "entropy", "relative_norm")
SIZES: dict[str, Any] = {
    "vocab_size": 60,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 12,
    "max_position_embeddings": 256,
    "initializer_range": 0.25,  # far from uniform attention
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": 1,
}
LENGTHS = (29, 17, 2, 23)


def close(found: Any, expected: Any, tolerance: float = 1e-5) -> None:
    torch.testing.assert_close(torch.as_tensor(found), torch.as_tensor(expected), atol=tolerance, rtol=tolerance)


def make_model(kind: str, dtype: torch.dtype = torch.float32, **changes: Any) -> Any:
    torch.manual_seed(0)
    models = {
        "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**SIZES | changes)),
        "llama": lambda: LlamaForCausalLM(LlamaConfig(**SIZES | {"attention_bias": True} | changes)),
        "mistral": lambda: MistralForCausalLM(MistralConfig(**SIZES | {"sliding_window": 9} | changes)),
    }
    model = models[kind]().to(dtype).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(parameter, std=0.3)
    return model


def padded_rows(side: str, lengths: tuple[int, ...] = LENGTHS) -> tuple[Tensor, Tensor]:
    """(B, T) ids and mask; the rows are the same on either side."""
    generator = torch.Generator().manual_seed(4)
    width = max(lengths) + 3
    ids = torch.zeros(len(lengths), width, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, length in enumerate(lengths):
        start = {"left": width - length, "right": 0, "both": (width - length) // 2}[side]
        ids[row, start : start + length] = torch.randint(2, 60, (length,), generator=generator)
        mask[row, start : start + length] = 1
    return ids, mask


def random_map(rows: int, heads: int, width: int, seed: int = 0) -> Tensor:
    """Causal rows that sum to 1."""
    scores = torch.randn(rows, heads, width, width, generator=torch.Generator().manual_seed(seed)) * 2
    hidden = torch.ones(width, width).triu(1).bool()
    return scores.masked_fill(hidden, -torch.inf).softmax(-1)


def by_loops(maps: Tensor, values: Tensor, weight: Tensor, mask: Tensor) -> dict[str, Tensor]:
    """The definitions one by one: maps (B, H, T, T), values (B, H, T, D), weight (hidden, H D)."""
    rows, heads, width, _ = maps.shape
    size = values.size(-1)
    sink, first, other, output, entropy = (torch.zeros(heads, dtype=torch.float64) for _ in range(5))
    received = torch.zeros(heads, width, dtype=torch.float64)
    behind = queries = counted = 0
    for row in range(rows):
        real = mask[row].nonzero()[:, 0].tolist()
        if len(real) < 2:
            continue
        counted += 1
        for head in range(heads):
            columns = weight[:, head * size : (head + 1) * size].double()
            for place, i in enumerate(real):
                attention = maps[row, head, i, real].double()
                written = columns @ (attention[:, None] * values[row, head, real].double()).sum(0)
                output[head] += written.norm()
                norm = (columns @ values[row, head, i].double()).norm()
                if place == 0:
                    first[head] += norm
                    continue
                other[head] += norm
                sink[head] += attention[0]
                entropy[head] += -sum(p * math.log(p) for p in attention.tolist() if p > 0) / math.log(place + 1)
                received[head, : len(real)] += attention
        behind += len(real) - 1
        queries += len(real)
    return {
        "sink_mass": sink / behind,
        "value_ratio": (first / counted) / (other / behind),
        "output_norm": output / queries,
        "entropy": entropy / queries,
        "received": received,
    }


# Worked numbers

WORKED_MAPS = torch.tensor(
    [[[1, 0, 0], [0.9, 0.1, 0], [0.8, 0.1, 0.1]], [[1, 0, 0], [0.2, 0.8, 0], [0.1, 0.3, 0.6]]], dtype=torch.float32
)
WORKED_VALUES = torch.tensor([[[0.1, 0], [1, 0], [0, 1]], [[1, 0], [1, 0], [0, 1]]], dtype=torch.float32)


@pytest.mark.parametrize("o_proj", [None, torch.eye(4), torch.eye(2)], ids=["none", "whole", "per head"])
def test_worked_numbers(o_proj: Tensor | None) -> None:
    stats = sink_stats(WORKED_MAPS, WORKED_VALUES, o_proj)
    close(stats.sink_mass, [0.85, 0.15])
    close(stats.value_ratio, [0.1, 1.0])
    close(stats.output_norm, [0.165304, 0.907037])
    assert stats.row_entropy is not None
    close(stats.row_entropy, [[0, 0.468996, 0.581672], [0, 0.721928, 0.817345]])
    close(stats.entropy, [(0.468996 + 0.581672) / 3, (0.721928 + 0.817345) / 3])
    assert stats.argmax_column.tolist() == [0, 1]
    dormant = stats.dormant()
    assert dormant.sink.tolist() == dormant.quiet.tolist() == dormant.both.tolist() == [True, False]
    assert stats.dormant(sink_mass=0.9).both.tolist() == [False, False]


def test_one_head_of_the_worked_example_alone() -> None:
    stats = sink_stats(WORKED_MAPS[:1], WORKED_VALUES[:1], torch.eye(2))
    close(stats.output_norm, [0.165304])
    assert stats.dormant().quiet.tolist() == [False]  # a head is its own median


def test_both_halves_of_the_decision_are_kept() -> None:
    """A sink that writes much, a quiet head without sink, a dormant one, and two plain ones."""
    on_first, uniform = torch.tensor([[1.0, 0], [0.9, 0.1]]), torch.tensor([[1.0, 0], [0.1, 0.9]])
    maps = torch.stack([on_first, uniform, on_first, uniform, uniform])
    values = torch.ones(5, 2, 1) * torch.tensor([1.0, 0.1, 0.1, 1.0, 1.0])[:, None, None]
    dormant = sink_stats(maps, values).dormant()
    assert dormant.sink.tolist() == [True, False, True, False, False]
    assert dormant.quiet.tolist() == [False, True, True, False, False]
    assert dormant.both.tolist() == [False, False, True, False, False]


def test_uniform_attention() -> None:
    width = 12
    uniform = torch.ones(width, width).tril() / torch.arange(1, width + 1)[:, None]
    stats = sink_stats(uniform.expand(2, 3, -1, -1), torch.randn(2, 3, width, 4), first=4)
    assert stats.row_entropy is not None
    close(stats.row_entropy[..., 1:], torch.ones(2, 3, width - 1))
    close(stats.row_entropy[..., 0], torch.zeros(2, 3))
    mean = sum(1 / (i + 1) for i in range(1, width)) / (width - 1)
    close(stats.sink_mass, [mean] * 3)
    close(stats.uniform_mass, mean)
    close(stats.early_sum, stats.early_uniform.expand(3, 4))


# The pure function


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_definitions_with_shared_values_and_a_projection(groups: int) -> None:
    maps = random_map(3, 4, 9)
    values = torch.randn(3, 4 // groups, 9, 5, generator=torch.Generator().manual_seed(1))
    weight = torch.randn(7, 20, generator=torch.Generator().manual_seed(2))
    stats = sink_stats(maps, values, weight)
    expected = by_loops(maps, values.repeat_interleave(groups, 1), weight, torch.ones(3, 9))
    for name, value in expected.items():
        close(getattr(stats, name).double(), value)
    close(stats.sink_mass, maps[:, :, 1:, 0].mean((0, 2)))


def test_norms_are_those_behind_the_projection() -> None:
    for hidden in (3, 5, 40):
        weight = torch.randn(hidden, 2 * 5, generator=torch.Generator().manual_seed(hidden))
        vectors = torch.randn(2, 6, 5, generator=torch.Generator().manual_seed(9))
        factor = norm_factor(weight, 2, 5)
        assert factor.size(2) <= 5
        expected = torch.stack([vectors[h] @ weight[:, 5 * h : 5 * h + 5].T for h in range(2)])
        close((vectors @ factor).norm(dim=-1), expected.norm(dim=-1))


def test_blocks_of_rows_equal_the_whole_map() -> None:
    maps, values = random_map(2, 4, 11), torch.randn(2, 2, 11, 3)
    mask = torch.ones(2, 11, dtype=torch.long)
    mask[1, :4] = 0
    maps[1] = random_map(1, 4, 11, seed=5)[0].masked_fill(~mask[1].bool(), 0)
    whole = sink_stats(maps, values, None, mask)
    blocks: list[Any] = [(8, maps[:, :, 8:]), AttentionRows(0, maps[:, :, :3, :3]), (3, maps[:, :, 3:8])]
    parts = sink_stats(iter(blocks), values, None, mask)
    for name in SUMS:
        close(getattr(parts, name), getattr(whole, name))


def test_blocks_may_leave_out_columns_of_weight_0() -> None:
    """As sliding windows do: the sink is out of sight there and receives nothing."""
    maps, values = random_map(2, 2, 9), torch.randn(2, 2, 9, 3)
    maps[:, :, 5:, :3] = 0
    maps = maps / maps.sum(-1, keepdim=True)
    blocks = [AttentionRows(0, maps[:, :, :5]), AttentionRows(5, maps[:, :, 5:, 3:], first_column=3)]
    parts, whole = sink_stats(blocks, values), sink_stats(maps, values)
    for name in SUMS:
        close(getattr(parts, name), getattr(whole, name))


def test_padding_is_read_nowhere() -> None:
    """Rows alone, padded on either side with anything at all, and a row of one token that counts nowhere."""
    lengths, width = (6, 4, 1), 9
    alone = [random_map(1, 2, n, seed=n)[0] for n in lengths]
    values = [torch.randn(2, n, 3, generator=torch.Generator().manual_seed(n)) for n in lengths]
    expected = sink_stats(alone[0], values[0], first=3) + sink_stats(alone[1], values[1], first=3)
    for starts in ((0, 0, 0), (3, 5, 8), (1, 2, 3)):
        maps, padded = torch.full((3, 2, width, width), torch.nan), torch.full((3, 2, width, 3), torch.nan)
        mask = torch.zeros(3, width, dtype=torch.long)
        for row, (start, length) in enumerate(zip(starts, lengths, strict=True)):
            part = slice(start, start + length)
            mask[row, part] = 1
            maps[row, :, part] = 0
            maps[row, :, part, part] = alone[row]
            padded[row, :, part] = values[row]
        stats = sink_stats(maps, padded, None, mask, first=3)
        for name in SUMS:
            if name != "received":
                close(getattr(stats, name), getattr(expected, name))
        close(stats.received[:, :6], expected.received)
        assert not stats.received[:, 6:].any()


def test_nothing_to_measure_is_no_number() -> None:
    stats = sink_stats(torch.ones(2, 1, 1), torch.ones(2, 1, 3))
    assert stats.queries == 0 and stats.sink_mass.isnan().all() and stats.output_norm.isnan().all()


def test_results_carry_no_gradient() -> None:
    values = torch.randn(2, 3, 2, requires_grad=True)
    assert not sink_stats(WORKED_MAPS.clone().requires_grad_(), values).output_norm.requires_grad


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: sink_stats(WORKED_MAPS, torch.ones(3, 2)), "allowed: (B, Hkv, T, D) or (Hkv, T, D)"),
        (lambda: sink_stats([], WORKED_VALUES), "no block"),
        (lambda: sink_stats(WORKED_MAPS, torch.ones(2, 4, 2)[:, :2]), "does not fit"),
        (lambda: sink_stats(torch.ones(3, 3, 3), WORKED_VALUES), "allowed: a multiple"),
        (lambda: sink_stats(WORKED_MAPS, WORKED_VALUES, torch.eye(3)), "allowed: (hidden, 4)"),
        (lambda: sink_stats(WORKED_MAPS, WORKED_VALUES, None, torch.ones(3, 2)), "allowed: (B, T)"),
        (lambda: sink_stats(WORKED_MAPS, WORKED_VALUES, first=0), "first=0"),
    ],
)
def test_wrong_arguments(call: Any, message: str) -> None:
    with pytest.raises(ValueError) as caught:
        call()
    assert message in str(caught.value)


def test_residual_peak() -> None:
    hidden = torch.tensor([[[9.0, 0], [3, 4], [0, 2]], [[100, 0], [0, 2], [0, 4]], [[5, 5], [7, 7], [1, 1]]])
    mask = torch.tensor([[1, 1, 1], [0, 1, 1], [0, 0, 1]])
    total, rows = residual_peak(hidden, mask)
    assert rows == 2
    close(total, 9 / 5 + 2 / 4)
    close(residual_peak(hidden[0])[0], 9 / 5)


# Models


def eager_reference(model: Any, ids: Tensor, mask: Tensor) -> list[dict[str, Tensor]]:
    """Per layer, from the maps that eager attention returns and the values that v_proj returns."""
    model.set_attn_implementation("eager")
    values: list[Tensor] = []
    hooks = [
        layer.self_attn.v_proj.register_forward_hook(lambda _, __, output: values.append(output))
        for layer in model.model.layers
    ]
    with torch.no_grad():
        output = model(ids, attention_mask=mask, output_attentions=True, output_hidden_states=True)
    for hook in hooks:
        hook.remove()
    found = []
    for index, (maps, value) in enumerate(zip(output.attentions, values, strict=True)):
        heads = value.view(*value.shape[:2], 2, -1).transpose(1, 2).repeat_interleave(2, 1)
        layer = by_loops(maps, heads, model.model.layers[index].self_attn.o_proj.weight.detach(), mask)
        if index + 1 < len(values):  # the last hidden state is normalised
            layer["peak"] = torch.stack(residual_peak(output.hidden_states[index + 1], mask))
        found.append(layer)
    model.set_attn_implementation("sdpa")
    return found


@pytest.mark.parametrize("kind", ["qwen3", "llama", "mistral"])
@pytest.mark.parametrize("side", ["left", "both"])
def test_streamed_numbers_equal_those_of_eager_maps(kind: str, side: str) -> None:
    model = make_model(kind)
    ids, mask = padded_rows(side)
    reference = eager_reference(model, ids, mask)
    found = sink_statistics(model, ids, mask, block=5)
    assert found.layers == (0, 1, 2) and found.sink_mass.shape == (3, 4) and found.gated == ()
    for index, layer in enumerate(reference):
        for name in ("sink_mass", "value_ratio", "output_norm", "entropy"):
            close(getattr(found, name)[index].double(), layer[name], 2e-5)
        width = max(LENGTHS)
        close(found.heads.received[index].double(), layer["received"][:, :width], 1e-4)
        assert found.heads.received.size(-1) == width and not layer["received"][:, width:].any()
        if "peak" in layer:
            close(torch.stack([found.peak_sum[index], found.peak_count[index]]), layer["peak"])


@pytest.mark.parametrize("kind", ["qwen3", "llama"])
def test_padding_and_batches_change_nothing(kind: str) -> None:
    model = make_model(kind)
    left = sink_statistics(model, *padded_rows("left"), first=4)
    right = sink_statistics(model, *padded_rows("right"), first=4)
    ids, mask = padded_rows("right")
    alone: SinkStatistics | None = None
    for row, length in enumerate(LENGTHS):
        one = sink_statistics(model, ids[row : row + 1, :length], mask[row : row + 1, :length], first=4)
        alone = one if alone is None else alone + one
    assert alone is not None
    for other in (right, alone):
        for name in HEADS + ("residual_peak",):
            close(getattr(other, name), getattr(left, name), 1e-4)
        assert torch.equal(other.heads.early_count, left.heads.early_count)


def test_heads_in_chunks_give_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch = make_model("qwen3"), padded_rows("left")
    whole = sink_statistics(model, *batch)
    monkeypatch.setattr("rltok.attention.probe.CHUNK_ELEMENTS", {"cpu": 1, "cuda": 1})
    chunked = sink_statistics(model, *batch, block=7)
    for name in SUMS:
        close(getattr(chunked.heads, name), getattr(whole.heads, name), 1e-4)


def test_layers_can_be_chosen_and_nothing_stays_behind() -> None:
    model = make_model("qwen3").train()
    before = ALL_ATTENTION_FUNCTIONS["sdpa"]
    ids, mask = padded_rows("left")
    whole, some = sink_statistics(model, ids, mask), sink_statistics(model, ids, mask, layers=[2, 0])
    assert some.layers == (2, 0)
    close(some.sink_mass, whole.sink_mass[[2, 0]])
    close(some.residual_peak, whole.residual_peak[[2, 0]])
    assert ALL_ATTENTION_FUNCTIONS["sdpa"] is before and model.training
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    with pytest.raises(ValueError, match="layers=\\(3,\\); allowed"):
        sink_statistics(model, ids, mask, layers=[3])
    assert ALL_ATTENTION_FUNCTIONS["sdpa"] is before


def test_an_adapter_counts_as_it_acts() -> None:
    model = make_model("qwen3")
    config = LoraConfig(r=2, target_modules=["o_proj"], init_lora_weights=False, lora_dropout=0.5)
    torch.manual_seed(3)
    adapted = get_peft_model(model, config)
    batch = padded_rows("left")
    apart = sink_statistics(adapted, *batch)
    assert apart.gated == ()
    merged = sink_statistics(adapted.merge_and_unload(), *batch)
    plain = sink_statistics(make_model("qwen3"), *batch)
    close(apart.output_norm, merged.output_norm, 1e-4)
    assert (apart.output_norm[0] - plain.output_norm[0]).abs().max() > 1e-2


def test_a_gate_behind_attention_is_reported() -> None:
    sizes = SIZES | {
        "num_hidden_layers": 2,
        "layer_types": ["linear_attention", "full_attention"],
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 2,
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 8,
        "num_experts": 2,
        "num_experts_per_tok": 1,
        "moe_intermediate_size": 8,
        "shared_expert_intermediate_size": 8,
    }
    torch.manual_seed(0)
    model = Qwen3NextForCausalLM(Qwen3NextConfig(**sizes)).eval()
    found = sink_statistics(model, *padded_rows("right", (9, 9)))
    assert found.layers == (1,) and found.gated == (1,)


def test_a_pattern_of_the_learner_is_left_out() -> None:
    model, batch = make_model("qwen3"), padded_rows("left")
    plain, loss = sink_statistics(model, *batch), next_token_loss(model, *batch)
    with attach_pattern(model, SinkLoRAConfig(groups=4, above=8)) as pattern:
        with torch.no_grad():
            model(batch[0], attention_mask=batch[1], use_cache=False)
        acted = pattern.calls
        patterned = sink_statistics(model, *batch)
        assert next_token_loss(model, *batch) == loss
        assert pattern.calls == acted > 0 and pattern.on
    for name in SUMS:
        assert torch.equal(getattr(patterned.heads, name), getattr(plain.heads, name)), name


def test_learned_sinks_are_refused() -> None:
    model = GptOssForCausalLM(GptOssConfig(**SIZES | {"num_local_experts": 2, "num_experts_per_tok": 1}))
    with pytest.raises(UnprobeableAttentionError, match="sinks"):
        sink_statistics(model, *padded_rows("left"))


def test_bfloat16_is_measured_in_float32() -> None:
    found = sink_statistics(make_model("qwen3", torch.bfloat16), *padded_rows("left"))
    assert found.sink_mass.dtype == torch.float32
    close(found.sink_mass, sink_statistics(make_model("qwen3"), *padded_rows("left")).sink_mass, 0.05)


# How many first tokens


def maps_with_sink(width: int, shares: list[float]) -> Tensor:
    """Every row gives these weights to its first tokens, and the rest to all tokens before it alike."""
    maps = torch.ones(width, width).tril() / torch.arange(1, width + 1)[:, None]
    for row in range(len(shares), width):
        maps[row] *= 1 - sum(shares)
        maps[row, : len(shares)] += torch.tensor(shares)
    return maps


def statistics_of(maps: Tensor, first: int = 8) -> SinkStatistics:
    stats = sink_stats(maps[None, None], torch.ones(1, 1, maps.size(0), 2), first=first)
    stacked = SinkStats(**{name: getattr(stats, name)[None] for name in SUMS})
    return SinkStatistics((0,), stacked, torch.ones(1), torch.ones(1))


@pytest.mark.parametrize(
    ("shares", "sink"), [([0.8], 1), ([0.05, 0.8], 2), ([0.3, 0.3, 0.2], 3), ([0.0, 0.0, 0.0, 0.5], 4), ([0.0], 0)]
)
def test_proposal_holds_nine_tenths_of_the_sink(shares: list[float], sink: int) -> None:
    proposal = propose_sink(statistics_of(maps_with_sink(40, shares)))
    assert proposal.sink == sink and proposal.queries == 32
    assert proposal.mass == sorted(proposal.mass) and proposal.mass[-1] >= sum(shares) - 1e-5
    if sink:
        assert proposal.held[sink - 1] >= 0.9 and all(held < 0.9 for held in proposal.held[: sink - 1])
        assert f"sink: {sink};" in describe_proposal(proposal)


def test_proposal_needs_longer_rows_and_a_share() -> None:
    short = statistics_of(maps_with_sink(8, [0.8]))
    assert propose_sink(short).sink is None and "no proposal" in describe_proposal(propose_sink(short))
    spread = propose_sink(statistics_of(maps_with_sink(40, [0.1] * 8)))
    assert spread.sink == 8 and "spread" in describe_proposal(spread)
    with pytest.raises(ValueError, match="share=0"):
        propose_sink(short, 0)


# Causal check


def copying_model() -> LlamaForCausalLM:
    """One layer that predicts the digit a row is made of: head 1 reads it, head 0 looks at the first token.

    Hidden dimensions: 0 is <s>, 1 is a digit, 2 to 5 which, 6 is always on, 8 to 11 the answer. Dimension 3 of a head
    turns too slowly to matter.
    """
    config = LlamaConfig(
        vocab_size=6,
        hidden_size=16,
        intermediate_size=4,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=8,
        rope_parameters={"rope_type": "default", "rope_theta": 1e12},
        tie_word_embeddings=False,
        pad_token_id=0,
        bos_token_id=1,
    )
    model = LlamaForCausalLM(config).eval()
    attention, digits = model.model.layers[0].self_attn, range(4)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if not name.endswith("norm.weight"):
                parameter.zero_()
        embedding = model.get_input_embeddings().weight
        embedding[1, 0] = 1
        embedding[1:, 6] = 1
        for digit in digits:
            embedding[2 + digit, 1] = embedding[2 + digit, 2 + digit] = 1
        for head, seen in ((0, 0), (1, 1)):
            attention.q_proj.weight[8 * head + 3, 6] = 4
            attention.k_proj.weight[8 * head + 3, seen] = 4
            for digit in digits:
                attention.v_proj.weight[8 * head + digit, 2 + digit] = 1
                attention.o_proj.weight[8 + digit, 8 * head + digit] = 2
        for digit in digits:
            model.lm_head.weight[2 + digit, 8 + digit] = 3
    return model


def digit_rows() -> tuple[Tensor, Tensor]:
    ids = torch.tensor([[0, 0, 1, 2, 2, 2, 2, 2], [1, 3, 3, 3, 3, 3, 3, 3], [0, 1, 5, 5, 5, 5, 5, 5]])
    return ids, (ids > 0).long()


def test_taking_a_dormant_head_away_costs_less_than_an_active_one() -> None:
    model = copying_model()
    ids, mask = digit_rows()
    found = sink_statistics(model, ids, mask)
    assert found.dormant().both.tolist() == [[True, False]]
    assert found.value_ratio[0].max() < 1e-6  # <s> carries nothing
    for how in ("zero", "sink"):
        dormant, active = loss_change(model, ids, mask, [(0, 0), (0, 1)], how).tolist()  # type: ignore[arg-type]
        assert abs(dormant) < 0.02 and active > 0.8, (how, dormant, active)


def test_zero_out_is_a_projection_without_the_heads_columns() -> None:
    model, (ids, mask) = make_model("llama"), padded_rows("left")
    with torch.no_grad():
        plain = model(ids, attention_mask=mask).logits
        with zero_out(model, 1, 2):
            zeroed = model(ids, attention_mask=mask).logits
        model.model.layers[1].self_attn.o_proj.weight[:, 24:36] = 0
        expected = model(ids, attention_mask=mask).logits
    close(zeroed[mask.bool()], expected[mask.bool()])
    assert (zeroed - plain)[mask.bool()].abs().max() > 1e-2


def test_move_to_sink_writes_the_first_tokens_value() -> None:
    model, (ids, mask) = make_model("llama"), padded_rows("left")
    attention = model.model.layers[2].self_attn
    seen: dict[str, Tensor] = {}
    hooks = [
        attention.v_proj.register_forward_hook(lambda _, __, output: seen.update(value=output)),
        attention.o_proj.register_forward_pre_hook(lambda _, inputs: seen.update(mixed=inputs[0])),
    ]
    with torch.no_grad():
        model(ids, attention_mask=mask)
        plain = seen["mixed"]
        with move_to_sink(model, 2, 3, mask):
            model(ids, attention_mask=mask)
    for hook in hooks:
        hook.remove()
    first = mask.argmax(1)
    expected = seen["value"][torch.arange(4), first][:, None, 12:]  # head 3 reads key-value head 1
    close(seen["mixed"][..., 36:], expected.expand(-1, ids.size(1), -1))
    assert torch.equal(seen["mixed"][..., :36], plain[..., :36])


def test_causal_check_of_an_eager_model_leaves_it_eager() -> None:
    model, (ids, mask) = copying_model(), digit_rows()
    expected = loss_change(model, ids, mask, [(0, 1)])
    model.set_attn_implementation("eager")
    close(loss_change(model, ids, mask, [(0, 1)]), expected)
    assert model.config._attn_implementation == "eager"


def test_loss_counts_real_tokens_behind_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    model, (ids, mask) = make_model("qwen3"), padded_rows("left")
    total, tokens = next_token_loss(model, ids, mask)
    assert tokens == sum(LENGTHS) - len(LENGTHS)
    expected = 0.0
    for row, length in enumerate(LENGTHS):
        one = ids[row : row + 1, -length:]
        with torch.no_grad():
            expected += float(model(one, labels=one).loss) * (length - 1)
    assert total == pytest.approx(expected, rel=1e-5)
    monkeypatch.setattr(model_sinks, "LOGITS", 1)
    assert next_token_loss(model, ids, mask)[0] == pytest.approx(total, rel=1e-6)
    counted = torch.zeros_like(mask)
    counted[:, -1] = 1
    assert next_token_loss(model, ids, mask, counted)[1] == len(LENGTHS)


def test_wrong_heads_and_ways_are_named() -> None:
    model, (ids, mask) = copying_model(), digit_rows()
    with pytest.raises(ValueError, match="layer 1, head 0; allowed: layers 0 to 0, heads 0 to 1"):
        loss_change(model, ids, mask, [(1, 0)])
    with pytest.raises(ValueError, match="how='scale'"):
        loss_change(model, ids, mask, [(0, 0)], "scale")  # type: ignore[arg-type]


# Ranks


class OtherRank:
    """Adds what another rank would send."""

    def __init__(self, vectors: list[Tensor] | None = None, width: int = 0) -> None:
        self.vectors, self.width, self.sent = vectors, width, []

    def sum(self, local: Tensor) -> Tensor:
        self.sent.append(local)
        return local if self.vectors is None else local + self.vectors[len(self.sent) - 1]

    def max(self, local: Tensor) -> Tensor:
        return local.clamp(min=self.width)


def test_ranks_add_up_to_the_whole_batch() -> None:
    """Ratios of sums: no mean of means, whatever rows a rank has and however wide they are."""
    model = make_model("qwen3")
    ids, mask = padded_rows("right")
    whole = sink_statistics(model, ids, mask)
    mine = sink_statistics(model, ids[:3], mask[:3])
    other = sink_statistics(model, ids[3:, :23], mask[3:, :23])
    sender = OtherRank(width=max(LENGTHS))
    other.reduced(sender)
    both = mine.reduced(OtherRank(sender.sent))
    for name in HEADS + ("residual_peak",):
        close(getattr(both, name).float(), getattr(whole, name), 1e-4)
    assert both.argmax_column.tolist() == whole.argmax_column.tolist()


def test_two_processes_agree_on_the_whole_batch(tmp_path: Path) -> None:
    run_on_ranks("sinks_worker.py", 2, tmp_path)
    whole = row_stats(0) + row_stats(1) + row_stats(2)
    for rank in range(2):
        received, relative_norm, value_ratio = torch.load(tmp_path / f"{rank}.pt")
        close(received.float(), whole.received)
        close(relative_norm.float(), whole.relative_norm)
        close(value_ratio.float(), whole.value_ratio)


# Training


def make_trainer(folder: Path, **changes: Any) -> CreditTrainer:
    tokenizer = build_tokenizer()
    args = CreditConfig(**run_settings(folder, **changes))
    return CreditTrainer(
        build_model(tokenizer), even_reward, args, train_dataset=digit_dataset(), processing_class=tokenizer
    )


def test_callback_logs_with_the_step_and_changes_no_parameter(tmp_path: Path) -> None:
    diagnostics = SinkDiagnostics(every=2, rows=6, tokens=9)
    plain = make_trainer(tmp_path / "a")
    plain.train()
    watched = make_trainer(tmp_path / "b")
    diagnostics.install(watched)
    watched.train()
    after = dict(watched.model.named_parameters())
    for name, expected in plain.model.named_parameters():
        assert torch.equal(expected, after[name]), name
    logs = [entry for entry in watched.state.log_history if "loss" in entry]
    assert [("attn/dormant_heads" in entry) for entry in logs] == [False, True, False]
    assert {name for name in logs[1] if name.startswith("attn/")} == {
        "attn/sink_mass/l0",
        "attn/sink_mass/l1",
        "attn/value_ratio",
        "attn/sink_heads",
        "attn/quiet_heads",
        "attn/dormant_heads",
        "attn/residual_peak",
    }
    latest = diagnostics.latest
    assert latest is not None and latest.heads.rows[0] == 6 and latest.heads.queries[0] <= 6 * 9
    assert logs[1]["attn/sink_mass/l1"] == pytest.approx(float(latest.sink_mass[1].mean()), rel=1e-6)
    assert not any(module._forward_pre_hooks for module in watched.model.modules())


def test_callback_takes_packed_rows_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen, padded = [], []
    rows_of = sink_monitor.training_rows

    def watch(given: Any, padding: int | None) -> list[Tensor]:
        padded.append(given.get("attention_mask") is not None)
        return rows_of(given, padding)

    monkeypatch.setattr(sink_monitor, "training_rows", watch)
    for pack in (False, True):
        trainer = make_trainer(tmp_path / str(pack), batching={"pack": pack}, max_steps=1)
        diagnostics = SinkDiagnostics(every=1, rows=8)
        diagnostics.install(trainer)
        trainer.train()
        seen.append(diagnostics.latest)
    assert set(padded[:2]) == {True} and set(padded[2:]) == {False}
    apart, packed = seen
    assert apart is not None and packed is not None
    assert apart.heads.rows.tolist() == packed.heads.rows.tolist() == [8, 8]
    assert apart.heads.queries.tolist() == packed.heads.queries.tolist()
    close(packed.sink_mass, apart.sink_mass, 1e-4)


def test_callback_among_a_trainers_callbacks_joins_the_next_log(tmp_path: Path) -> None:
    tokenizer = build_tokenizer()
    trainer = CreditTrainer(
        build_model(tokenizer),
        even_reward,
        CreditConfig(**run_settings(tmp_path, logging_steps=2, max_steps=4)),
        train_dataset=digit_dataset(),
        processing_class=tokenizer,
        callbacks=[SinkDiagnostics(3, 4, 16)],
    )
    trainer.train()
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert [("attn/sink_heads" in entry, entry["step"]) for entry in logs] == [(False, 2), (True, 4)]


def test_rows_of_a_training_pass() -> None:
    ids = torch.tensor([[0, 5, 6, 7], [5, 6, 0, 0]])
    mask = torch.tensor([[0, 1, 1, 1], [1, 1, 0, 0]])
    assert [row.tolist() for row in training_rows({"input_ids": ids, "attention_mask": mask}, 0)] == [[5, 6, 7], [5, 6]]
    packed = {"input_ids": torch.tensor([[5, 6, 7, 8, 9, 0, 0]]), "position_ids": torch.tensor([[0, 1, 0, 1, 2, 0, 1]])}
    assert [row.tolist() for row in training_rows(packed, 0)] == [[5, 6], [7, 8, 9]]
    assert [row.tolist() for row in training_rows({"input_ids": ids}, 0)] == ids.tolist()


def test_callback_on_a_plain_trainer_with_texts_of_its_own(tmp_path: Path) -> None:
    model = make_model("llama")
    rows = [{"input_ids": [3, 4, 5, 6], "labels": [3, 4, 5, 6]} for _ in range(8)]
    args = TrainingArguments(
        str(tmp_path), max_steps=4, per_device_train_batch_size=2, report_to=[], use_cpu=True, save_strategy="no"
    )
    trainer = Trainer(model, args, train_dataset=rows)
    ids, mask = padded_rows("left")
    diagnostics = SinkDiagnostics(every=3, sample=(ids, mask), layers=[1])
    diagnostics.install(trainer)
    trainer.train()
    (entry,) = [entry for entry in trainer.state.log_history if "attn/value_ratio" in entry]
    assert entry["step"] == 3 and "attn/sink_mass/l1" in entry and "attn/sink_mass/l0" not in entry
    assert diagnostics.latest is not None and diagnostics.latest.heads.rows.tolist() == [3 + 1]


def test_wrong_numbers_and_nothing_to_log() -> None:
    for changes in ({"every": 0}, {"rows": 0}, {"tokens": 1}):
        with pytest.raises(ValueError, match="allowed: >="):
            SinkDiagnostics(**changes)
    nothing = sink_statistics(make_model("qwen3"), torch.zeros(1, 1, dtype=torch.long), torch.zeros(1, 1))
    assert sink_metrics(nothing) == {}


# In a recipe

QUICK = [
    "training.max_steps=2",
    "training.learning_rate=1e-3",
    "training.save_strategy='no'",
    "evaluation.before=false",
    "evaluation.after=false",
    "report.progress=off",
]
LOGGED = {"value_ratio", "sink_heads", "quiet_heads", "dormant_heads", "residual_peak"}


def test_settings_of_a_recipe(tmp_path: Path) -> None:
    assert load_recipe("smoke").report.sinks is None
    assert load_recipe("smoke", ["report.sinks={}"]).report.sinks == SinkConfig(every=50, rows=8, tokens=512)
    recipe = load_recipe("smoke", ["report.sinks={every: 2, tokens: 64}"])
    assert recipe.report.sinks == SinkConfig(2, 8, 64)
    (tmp_path / "written.yaml").write_text(recipe.to_yaml())
    written = tmp_path / "written.yaml"
    assert load_recipe(written) == recipe and load_recipe(written, ["report.sinks=null"]).report.sinks is None


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("{every: 0}", "report.sinks: every=0; allowed: >= 1"),
        ("{rows: 0}", "report.sinks: rows=0; allowed: >= 1"),
        ("{tokens: 1}", "report.sinks: tokens=1; allowed: >= 2"),
        ("{evry: 2}", "report.sinks.evry: unknown key 'evry'; did you mean 'every'"),
        ("{every: often}", "report.sinks.every: 'often' is not a valid int"),
    ],
)
def test_wrong_settings_of_a_recipe(setting: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_recipe("smoke", [f"report.sinks={setting}"])
    assert message in str(caught.value)


def test_recipe_logs_sinks_and_learns_the_same(tmp_path: Path) -> None:
    weights, metrics = [], []
    for name, settings in (("plain", []), ("watched", ["report.sinks={every: 2, rows: 5, tokens: 48}"])):
        out = tmp_path / name
        recipe = load_recipe("smoke", [*QUICK, *settings, f"output_dir={out}"])
        assert train(recipe, Console(quiet=True)) == 0
        weights.append(load_file(out / "model" / "model.safetensors"))
        metrics.append([line for line in RunDirectory(out).read_metrics() if "loss" in line])
    plain, watched = weights
    assert plain.keys() == watched.keys()
    assert all(torch.equal(plain[name], watched[name]) for name in plain)
    assert not any(key.startswith("attn/") for line in metrics[0] for key in line)
    before, after = ({key[5:]: line[key] for key in line if key.startswith("attn/")} for line in metrics[1])
    assert not before and after.keys() == LOGGED | {f"sink_mass/l{layer}" for layer in range(4)}
    assert all(0 < after[f"sink_mass/l{layer}"] < 1 for layer in range(4)) and after["value_ratio"] > 0
    assert after["dormant_heads"] <= min(after["sink_heads"], after["quiet_heads"])


def test_recipe_of_a_model_that_cannot_be_read_is_refused_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = build_tokenizer()
    sizes = SIZES | {"num_local_experts": 2, "num_experts_per_tok": 1, "vocab_size": len(tokenizer)}
    GptOssForCausalLM(GptOssConfig(**sizes)).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    settings = [*QUICK, f"model.path={tmp_path / 'model'}", "rollout.engine=transformers", "report.sinks={}"]
    recipe = load_recipe("smoke", [*settings, f"output_dir={tmp_path / 'out'}"])
    monkeypatch.setattr(CreditTrainer, "train", lambda *_, **__: pytest.fail("training began"))
    with pytest.raises(ConfigError, match="report.sinks: .*set report.sinks=null: .*attention sinks as parameters"):
        train(recipe, Console(quiet=True))


def test_projection_of_an_unknown_name_is_refused_at_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model_sinks, "PROJECTIONS", ("elsewhere",))
    trainer = make_trainer(tmp_path)
    with pytest.raises(UnprobeableAttentionError, match="has no output projection that is known by name"):
        SinkDiagnostics().install(trainer)
    assert not any(isinstance(callback, SinkDiagnostics) for callback in trainer.callback_handler.callbacks)


def test_sharded_weights_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = make_trainer(tmp_path)
    monkeypatch.setattr("rltok.run.running_strategy", lambda _: "zero3")
    with pytest.raises(ConfigError, match="report.sinks: no process holds the whole weights under zero3"):
        install_sinks(SinkConfig(), trainer)
    install_sinks(None, trainer)
    next(trainer.model.parameters()).ds_id = 0  # as ZeRO-3 marks them
    with pytest.raises(ValueError, match="no process holds the whole weights of this model"):
        SinkDiagnostics().install(trainer)


# The command


def run_cli(*arguments: object) -> int:
    """Exit status of `rltok sinks` in this process."""
    with pytest.raises(SystemExit) as caught:
        main(["sinks", *map(str, arguments)])
    return int(caught.value.code or 0)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "random"
    tokenizer = build_tokenizer()
    build_model(tokenizer, seed=3).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_command_on_the_embedded_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = ["--json", tmp_path / "new" / "sinks.json", "--picture", tmp_path / "new" / "sinks.png"]
    assert run_cli("tiny-reasoner", "--rows", 6, "--check", 1, *files) == 0
    shown = capsys.readouterr().out
    for words in (
        "layers: means",
        "heads that stand out",
        "zeroed",
        "held-out problems",
        "0 dormant (both)",
        "proposal",
    ):
        assert words in shown
    found = json.loads((tmp_path / "new" / "sinks.json").read_text())
    assert found["rows"] == 6 and len(found["heads"]) == 16 and len(found["layers"]) == 4
    assert len(found["checks"]) == 2 and found["loss"]["tokens"] > 6
    for head in found["heads"]:
        assert 0 <= head["sink_mass"] <= 1 and 0 <= head["entropy"] <= 1 and head["output_norm"] > 0
        assert head["dormant"] == (head["sink"] and head["quiet"])
    assert found["thresholds"]["sink_mass"] == 0.5
    assert (tmp_path / "new" / "sinks.png").read_bytes().startswith(b"\x89PNG")
    assert not list((tmp_path / "new").glob("*.part"))


def test_command_on_completions_equals_the_function(checkpoint: Path, tmp_path: Path) -> None:
    rows = [{"prompt": "what is 1+2?", "completion": "so 1 and 2 is 3."}, {"prompt": "9*9=", "completion": "81"}]
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert run_cli(checkpoint, "--completions", file, "--layers", "1", "--json", tmp_path / "a.json") == 0
    found = json.loads((tmp_path / "a.json").read_text())
    tokenizer = build_tokenizer()
    ids = [tokenizer(row["prompt"] + row["completion"])["input_ids"] for row in rows]
    batch = torch.zeros(2, len(ids[0]), dtype=torch.long)
    mask = torch.zeros_like(batch)
    for row, tokens in enumerate(ids):
        batch[row, : len(tokens)], mask[row, : len(tokens)] = torch.tensor(tokens), 1
    expected = sink_statistics(build_model(tokenizer, seed=3), batch, mask, [1])
    assert [head["layer"] for head in found["heads"]] == [1] * 4 and found["loss"] is None
    close([head["sink_mass"] for head in found["heads"]], expected.sink_mass[0], 1e-4)
    close([head["output_norm"] for head in found["heads"]], expected.output_norm[0], 1e-4)
    close(found["layers"][0]["residual_peak"], float(expected.residual_peak[0]), 1e-4)


def test_text_is_cut_into_rows(checkpoint: Path, tmp_path: Path) -> None:
    file = tmp_path / "text.txt"
    file.write_text("abcdefgh")
    tokenizer = build_tokenizer()
    letters = tokenizer("abcdefgh")["input_ids"]
    assert text_rows(file, tokenizer, 2, 3) == [letters[:3], letters[3:6]]
    assert text_rows(file, tokenizer, 9, 3)[-1] == letters[6:]
    assert run_cli(checkpoint, "--text", file, "--tokens", 4, "--json", tmp_path / "b.json") == 0
    assert json.loads((tmp_path / "b.json").read_text())["tokens"] == 8


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "give what it should read"),
        (["--text", "a", "--completions", "b.jsonl"], "both were given"),
        (["--text", "missing.txt"], "there is no such file"),
        (["--text", "TEXT", "--tokens", 1], "--tokens 1 must be >= 2"),
        (["--text", "TEXT", "--tokens", 999], "made for 256"),
        (["--text", "TEXT", "--rows", 0], "--rows 0 must be >= 1"),
        (["--text", "TEXT", "--check", -1], "--check -1 must be >= 0"),
        (["--text", "TEXT", "--layers", "0,7"], "allowed: distinct indices from 0 to 1"),
        (["--text", "TEXT", "--layers", "first"], "name layers by number"),
        (["--text", "TEXT", "--picture", "a.pdf"], "ends in .png"),
        (["--text", "EMPTY"], "the file has no tokens"),
        (["--text", "ONE"], "no row has two tokens"),
        (["--text", "TEXT", "--chat"], "--chat only goes with --completions"),
    ],
)
def test_bad_input_is_explained(
    checkpoint: Path, tmp_path: Path, arguments: list[Any], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    texts = {"TEXT": "abc abc", "EMPTY": "", "ONE": "a"}
    for name, text in texts.items():
        (tmp_path / name).write_text(text)
    assert run_cli(checkpoint, *(tmp_path / str(a) if a in texts else a for a in arguments)) == 2
    assert message in capsys.readouterr().err


def test_attention_that_cannot_be_read_is_explained(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = GptOssForCausalLM(GptOssConfig(**SIZES | {"num_local_experts": 2, "num_experts_per_tok": 1}))
    model.save_pretrained(tmp_path / "model")
    build_tokenizer().save_pretrained(tmp_path / "model")
    (tmp_path / "text").write_text("abc")
    assert run_cli(tmp_path / "model", "--text", tmp_path / "text") == 2
    assert "cannot be read" in capsys.readouterr().err


def test_embedded_model_needs_no_file() -> None:
    SinkOptions("tiny-reasoner")
    with pytest.raises(ConfigError, match="only tiny-reasoner"):
        SinkOptions("elsewhere")
