"""EdgeQAT: fake quantisers, their gradients, widths per token, the losses, and a model with all of it in place."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from tests_support import build_model, build_tokenizer
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3ForCausalLM
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from rltok.quant.fake import (
    OFF,
    DynamicFakeQuantActivation,
    DynamicFakeQuantWeight,
    FakeQuantActivation,
    FakeQuantLinear,
    FakeQuantWeight,
    TokenMixedFakeQuant,
    fake_quantize_activation,
    fake_quantize_rows,
    fake_quantize_tokens,
    fake_quantize_weight,
    first_token_attention,
    initial_activation_step,
    initial_weight_step,
    low_width_tokens,
    mix_by_token,
    symmetric_codes,
)
from rltok.quant.qat import (
    AttentionFakeQuant,
    QATSpec,
    calibrate_qat,
    collecting,
    collecting_teacher,
    convert,
    prepare_qat,
    qat_state,
    remove_qat,
)
from rltok.quant.qat_losses import (
    QueryKey,
    distillation_loss,
    distribution_loss,
    entropy_loss,
    map_cosines,
    streamed_distribution_loss,
)

WEIGHT = (0.3, -0.1, 0.9, -1.2)
ACTIVATION = (0.5, -1.0, 2.0)


def double(values: Any, grad: bool = False) -> Tensor:
    return torch.tensor(values, dtype=torch.float64, requires_grad=grad)


def random(*shape: int, seed: int = 0, grad: bool = False) -> Tensor:
    made = torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return made.requires_grad_(grad)


def as_double(values: Any) -> Tensor:
    return values.detach().double() if isinstance(values, Tensor) else double(values)


def assert_close(found: Any, expected: Any, tolerance: float = 1e-12) -> None:
    torch.testing.assert_close(as_double(found), as_double(expected), rtol=0, atol=tolerance)


# Learned steps


def test_the_worked_weight() -> None:
    weight = double(WEIGHT, grad=True)
    alpha = initial_weight_step(weight, 4)[None].requires_grad_(True)
    assert_close(alpha, [0.472456], 1e-6)
    found = fake_quantize_weight(weight, alpha, 4)
    assert_close(found, [0.472456, 0, 0.944911, -1.417367], 1e-6)
    found.sum().backward()
    assert_close(alpha.grad, [0.04], 1e-12)
    assert_close(weight.grad, [1, 1, 1, 1])


def test_the_worked_activation() -> None:
    x = double(ACTIVATION)
    alpha, zp, signed = initial_activation_step(x, 8)
    assert bool(signed)
    assert_close(torch.stack([alpha, zp]), [0.207050, 2.550238], 1e-6)
    alpha, zp = alpha[None].requires_grad_(True), zp[None].requires_grad_(True)
    found = fake_quantize_activation(x, alpha, zp, 8, signed)
    assert_close(found, [0.414100, -1.035249, 2.070499], 1e-6)
    found.sum().backward()
    assert_close(alpha.grad, [-0.012533], 1e-6)
    assert_close(zp.grad, [0.0])


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_weight_gradients_are_the_formulas(bits: int) -> None:
    weight, g = random(5, 7, grad=True), random(5, 7, seed=1)
    alpha = double([2.5 / 2**bits], grad=True)  # some codes clip
    (fake_quantize_weight(weight, alpha, bits) * g).sum().backward()
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    ratio = (weight / alpha).detach()
    inside = (ratio >= low) & (ratio <= high)
    assert 0 < inside.sum() < inside.numel()
    code = ratio.clamp(low, high).round()
    assert_close(weight.grad, g * inside)
    assert_close(alpha.grad, [(g * (code - inside * ratio)).sum() / math.sqrt(weight.numel() * high)])


@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("start", [2.3, -1.6])
def test_activation_gradients_are_the_formulas(signed: bool, start: float) -> None:
    x, g = random(3, 4, 5, grad=True), random(3, 4, 5, seed=1)
    alpha, zp = double([0.31], grad=True), double([start], grad=True)
    (fake_quantize_activation(x, alpha, zp, 4, signed) * g).sum().backward()
    low, high = (-8, 7) if signed else (0, 15)
    z = round(start)
    ratio = (x / alpha).detach()
    inside = (ratio + z >= low) & (ratio + z <= high)
    assert 0 < inside.sum() < inside.numel()
    code = (ratio + z).clamp(low, high).round()
    scale = 1 / math.sqrt(x.numel() * high)
    assert_close(x.grad, g * inside)
    assert_close(alpha.grad, [scale * (g * ((code - z) - inside * ratio)).sum()])
    assert_close(zp.grad, [scale * (g * alpha.detach() * (inside.double() - 1)).sum()])
    assert zp.grad is not None and zp.grad.item() != 0


def test_bounds_count_as_inside() -> None:
    weight = double([-8.0, 7.0, -8.001, 7.001], grad=True)
    fake_quantize_weight(weight, double([1.0]), 4).sum().backward()
    assert_close(weight.grad, [1, 1, 0, 0])


def test_rounding_is_half_to_even() -> None:
    assert_close(fake_quantize_weight(double([0.5, 1.5, 2.5, -0.5, -1.5]), double([1.0]), 4), [0, 2, 2, 0, -2])


def test_a_negative_step_acts_as_its_size() -> None:
    weight, found = double(WEIGHT), []
    for sign in (1, -1):
        alpha = double([sign * 0.4], grad=True)
        made = fake_quantize_weight(weight, alpha, 4)
        made.sum().backward()
        assert alpha.grad is not None
        found.append((made.detach(), sign * alpha.grad))
    assert torch.equal(found[0][0], found[1][0]) and torch.equal(found[0][1], found[1][1])


@pytest.mark.parametrize("start", [0.0, 1e-30, -1e-12])
def test_a_tiny_step_is_held_above_zero_and_can_grow(start: float) -> None:
    weight, alpha = double(WEIGHT, grad=True), double([start], grad=True)
    (fake_quantize_weight(weight, alpha, 4) - double([0.4, 0, 0.9, -1.1])).square().sum().backward()
    assert weight.grad is not None and alpha.grad is not None
    assert bool(torch.isfinite(alpha.grad)) and bool(weight.grad.isfinite().all())
    outward = -1 if start < 0 else 1
    assert alpha.grad.item() * outward < 0  # descent moves it away from zero


def test_off_is_the_same_tensor() -> None:
    x = random(2, 3, grad=True)
    for module in (
        FakeQuantWeight(OFF),
        FakeQuantActivation(OFF),
        DynamicFakeQuantWeight(OFF),
        DynamicFakeQuantActivation(OFF),
    ):
        assert module(x) is x
        assert not list(module.parameters())


@pytest.mark.parametrize("bits", [1, 9, 16])
def test_bits_are_checked(bits: int) -> None:
    for kind in (FakeQuantWeight, FakeQuantActivation, DynamicFakeQuantWeight, DynamicFakeQuantActivation):
        with pytest.raises(ValueError, match=f"bits={bits}"):
            kind(bits)


def test_the_step_is_set_once_and_saved() -> None:
    first, other = random(4, 6), 9 * random(4, 6, seed=1)
    weight = FakeQuantWeight(4, dtype=torch.float64)
    made = weight(first)
    assert_close(weight.alpha, [2 * first.abs().mean() / math.sqrt(7)])
    weight(other)
    assert_close(weight.alpha, [2 * first.abs().mean() / math.sqrt(7)])
    loaded = FakeQuantWeight(4, dtype=torch.float64)
    loaded(other)
    loaded.load_state_dict(weight.state_dict())
    assert torch.equal(loaded(first), made)


def test_an_activation_needs_a_first_batch_and_saves_its_sign() -> None:
    positive = random(4, 6).abs()
    quantiser = FakeQuantActivation(4, dtype=torch.float64).eval()
    with pytest.raises(ValueError, match="calibrate_qat"):
        quantiser(positive)
    made = quantiser.train()(positive)
    assert_close(quantiser.alpha, [2 * positive.mean() / math.sqrt(15)])
    assert_close(quantiser.zp, [0.1 * positive.min()])
    assert set(quantiser.state_dict()) == {"alpha", "zp", "init_state", "signed"}
    assert not bool(quantiser.signed) and bool(quantiser.init_state)
    loaded = FakeQuantActivation(4, dtype=torch.float64)
    loaded.load_state_dict(quantiser.state_dict())
    assert torch.equal(loaded.eval()(positive), made)


def test_loading_the_state_of_a_fresh_quantiser_starts_again() -> None:
    quantiser = FakeQuantActivation(4, dtype=torch.float64)
    quantiser(random(4, 6))
    quantiser(random(4, 6))
    quantiser.load_state_dict(FakeQuantActivation(4, dtype=torch.float64).state_dict())
    quantiser(9 * random(4, 6))
    assert_close(quantiser.alpha, [18 * random(4, 6).abs().mean() / math.sqrt(7)])


class _Ranks:
    """A reducer that knows what the other ranks would send."""

    def __init__(self, sums: Tensor, maxima: Tensor) -> None:
        self.sums, self.maxima = sums, maxima

    def sum(self, local: Tensor) -> Tensor:
        return local + self.sums

    def max(self, local: Tensor) -> Tensor:
        return torch.maximum(local, self.maxima)


def test_the_first_step_is_that_of_all_ranks() -> None:
    x = random(6, 5)
    here, there = x[:2].abs(), x[2:]
    reducer = _Ranks(torch.stack([there.abs().sum(), double(there.numel())]), (-there).amax()[None])
    whole = torch.cat([here, there])
    for found, expected in zip(
        initial_activation_step(here, 8, reducer=reducer), initial_activation_step(whole, 8), strict=True
    ):
        assert_close(found, expected)
    assert bool(initial_activation_step(here, 8, reducer=reducer)[2])  # signed, though nothing here is negative


def test_padding_enters_no_statistic() -> None:
    x = random(2, 4, 3)
    mask = torch.tensor([[1, 1, 1, 0], [1, 1, 0, 0]], dtype=torch.bool)[..., None]
    wild = torch.where(mask, x, torch.nan)
    kept = x[mask.expand_as(x)]
    for found, expected in zip(initial_activation_step(wild, 8, mask), initial_activation_step(kept, 8), strict=True):
        assert_close(found, expected)
    with pytest.raises(ValueError, match="no valid token"):
        initial_activation_step(x, 8, torch.zeros_like(mask))


def test_padding_does_not_change_the_scale_of_gradients() -> None:
    x, g = random(1, 5, 3), random(1, 5, 3, seed=1)
    mask = torch.tensor([[1, 1, 1, 0, 0]], dtype=torch.bool)[..., None]
    grads = []
    for part, valid in ((x, mask), (x[:, :3], None)):
        quantiser = FakeQuantActivation(4, dtype=torch.float64)
        (quantiser(part, valid) * g[:, : part.size(1)] * (1 if valid is None else mask)).sum().backward()
        grads.append(quantiser.alpha.grad)
    assert grads[0] is not None and grads[0].item() != 0
    assert_close(grads[0], grads[1])


def test_shared_keys_count_once_per_query_head() -> None:
    x, grads = random(2, 2, 5, 4), []
    for repeats in (1, 4):
        quantiser = FakeQuantActivation(4, dtype=torch.float64)
        quantiser(x, repeats=repeats).square().sum().backward()
        assert quantiser.alpha.grad is not None
        grads.append(quantiser.alpha.grad)
    assert_close(grads[0], 2 * grads[1])
    model, seen = prepared(QATSpec()), []
    layer = model.get_submodule("model.layers.0.self_attn.fake_quant")
    assert isinstance(layer, AttentionFakeQuant)
    layer.key.register_forward_pre_hook(lambda _, args, kwargs: seen.append(kwargs), with_kwargs=True)
    logits_of(model)
    assert seen == [{"repeats": 2}]


def test_half_precision_keeps_its_dtype() -> None:
    x = random(4, 6).bfloat16()
    quantiser = FakeQuantActivation(8)
    assert quantiser(x).dtype == torch.bfloat16 and quantiser.alpha.dtype == torch.float32
    assert FakeQuantWeight(4)(x).dtype == torch.bfloat16


# Dynamic steps


def test_the_worked_dynamic_examples() -> None:
    weight = torch.tensor([WEIGHT], requires_grad=True)
    codes, scales = symmetric_codes(weight, 4)
    assert codes.tolist() == [[2, -1, 6, -7]] and codes.dtype == torch.int8
    assert_close(scales, [[0.16]], 1e-7)
    assert_close(fake_quantize_rows(weight, 4), [[0.32, -0.16, 0.96, -1.12]], 1e-6)
    assert_close(symmetric_codes(weight, 8)[1], [[0.009411765]], 1e-8)
    assert_close(fake_quantize_rows(weight, 8), [[0.301176, -0.103529, 0.903529, -1.195294]], 1e-6)
    x = torch.tensor([[1.0, -2.0, 0.5, 3.0]])
    assert_close(fake_quantize_tokens(x), [[1, -2, 0.509804, 3]], 1e-6)
    (x * fake_quantize_rows(weight, 4)).sum().backward()
    assert weight.grad is not None and torch.equal(weight.grad, x)


def test_codes_need_the_reciprocal() -> None:
    weight = random(64, 64).float()
    codes, scales = symmetric_codes(weight, 4)
    divided = (weight / scales).round().clamp(-8, 7)
    differ = (codes != divided).float().mean().item()
    assert 0 < differ < 0.02
    assert (codes - divided).abs().max() == 1


@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("bits", "group"), [(4, None), (4, 32), (8, None), (8, 16), (2, 64)])
def test_weights_are_torchaos_bit_for_bit(bits: int, group: int | None, kind: torch.dtype) -> None:
    pytest.importorskip("torchao", reason="compares with torchao's fake quantiser; install rltok[quant]")
    from torchao.quantization.qat import IntxFakeQuantizeConfig
    from torchao.quantization.qat.fake_quantizer import IntxFakeQuantizer

    config = IntxFakeQuantizeConfig(
        getattr(torch, f"int{bits}"), "per_channel" if group is None else "per_group", group_size=group
    )
    weight, g = (random(48, 128, seed=seed).to(kind) for seed in (0, 1))
    results = []
    for quantise in (IntxFakeQuantizer(config), DynamicFakeQuantWeight(bits, group)):
        leaf = weight.clone().requires_grad_(True)
        made = quantise(leaf)
        (made * g).sum().backward()
        results.append((made, leaf.grad))
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])


@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("offset", [0.0, 5.0, -5.0])
def test_tokens_are_torchaos_bit_for_bit(offset: float, kind: torch.dtype) -> None:
    pytest.importorskip("torchao", reason="compares with torchao's fake quantiser; install rltok[quant]")
    from torchao.quantization.qat import IntxFakeQuantizeConfig
    from torchao.quantization.qat.fake_quantizer import IntxFakeQuantizer

    x, g = ((random(3, 17, 40, seed=seed) + offset).to(kind) for seed in (0, 1))
    x[0, 0] = 0
    results = []
    config = IntxFakeQuantizeConfig(torch.int8, "per_token", is_symmetric=False)
    for quantise in (IntxFakeQuantizer(config), DynamicFakeQuantActivation(8)):
        leaf = x.clone().requires_grad_(True)
        made = quantise(leaf)
        (made * g).sum().backward()
        results.append((made, leaf.grad))
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])


def test_a_linear_is_torchaos() -> None:
    pytest.importorskip("torchao", reason="compares with torchao's fake-quantised linear; install rltok[quant]")
    from torchao.quantization.qat import FakeQuantizedLinear, IntxFakeQuantizeConfig

    torch.manual_seed(0)
    plain = nn.Linear(64, 24)
    theirs = FakeQuantizedLinear.from_linear(
        copy.deepcopy(plain),
        activation_config=IntxFakeQuantizeConfig(torch.int8, "per_token", is_symmetric=False),
        weight_config=IntxFakeQuantizeConfig(torch.int4, group_size=32),
    )
    ours = FakeQuantLinear.adopt(copy.deepcopy(plain), DynamicFakeQuantWeight(4, 32), DynamicFakeQuantActivation(8))
    x = random(5, 64).float()
    assert torch.equal(theirs(x), ours(x))
    theirs(x).square().sum().backward()
    ours(x).square().sum().backward()
    assert theirs.weight.grad is not None and ours.weight.grad is not None
    assert torch.equal(theirs.weight.grad, ours.weight.grad)


def test_straight_through_where_nothing_clips() -> None:
    layer = FakeQuantLinear.adopt(nn.Linear(6, 3, dtype=torch.float64), DynamicFakeQuantWeight(8))
    x = random(5, 6)
    layer(x).sum().backward()
    _, scale = symmetric_codes(layer.weight, 8)
    clipped = (layer.weight / scale).round().abs() > 127
    expected = x.sum(0).expand(3, 6).masked_fill(clipped & (layer.weight > 0), 0.0)
    assert_close(layer.weight.grad, expected)


def test_a_linear_with_learned_steps() -> None:
    torch.manual_seed(0)
    layer = FakeQuantLinear(6, 3, activation_bits=8, dtype=torch.float64)
    x = random(5, 6)
    made = layer(x)
    assert isinstance(layer.weight_fake_quantizer, FakeQuantWeight)
    assert isinstance(layer.activation_fake_quantizer, FakeQuantActivation)
    weight = fake_quantize_weight(layer.weight, initial_weight_step(layer.weight, 4), 4)
    alpha, zp, signed = initial_activation_step(x, 8)
    assert_close(made, fake_quantize_activation(x, alpha, zp, 8, signed) @ weight.T + layer.bias)
    assert set(layer.state_dict()) == {"weight", "bias"} | {
        f"{kind}_fake_quantizer.{name}"
        for kind, names in (("weight", "alpha init_state"), ("activation", "alpha zp init_state signed"))
        for name in names.split()
    }


def test_a_linear_that_is_off_is_plain_bit_for_bit() -> None:
    layer, plain = FakeQuantLinear(6, 3, weight_bits=OFF), nn.Linear(6, 3)
    plain.load_state_dict({"weight": layer.weight.detach(), "bias": layer.bias.detach()})
    x = random(5, 6).float()
    for module in (layer, plain):
        module(x).square().sum().backward()
    assert torch.equal(layer(x), plain(x))
    assert layer.weight.grad is not None and plain.weight.grad is not None
    assert torch.equal(layer.weight.grad, plain.weight.grad)


def test_a_subclass_of_linear_is_refused() -> None:
    with pytest.raises(ValueError, match="NonDynamicallyQuantizableLinear"):
        FakeQuantLinear.adopt(nn.modules.linear.NonDynamicallyQuantizableLinear(2, 2))


def test_groups_are_checked() -> None:
    with pytest.raises(ValueError, match="group_size=5 does not divide the 6 columns"):
        fake_quantize_rows(random(2, 6), 4, 5)
    with pytest.raises(ValueError, match="matrix"):
        symmetric_codes(random(6), 4)


# Widths per token


def test_the_worked_widths() -> None:
    scores, mask = double([[0.1, 0.9, 0.4, -0.3]]), torch.ones(1, 4)
    assert low_width_tokens(scores, mask, 0.5, first_high=False).tolist() == [[True, False, False, True]]
    assert low_width_tokens(scores, mask, 0.5).tolist() == [[False, False, True, True]]


def test_widths_belong_to_a_sequence_and_ignore_padding() -> None:
    scores = double([[9.0, 0.1, 0.2, 0.3, 0.4], [0.4, 9.0, 0.3, 0.2, 0.1]])
    mask = torch.tensor([[1, 1, 1, 1, 1], [0, 1, 1, 1, 1]])
    found = low_width_tokens(scores, mask, 0.5)
    assert found.tolist() == [[False, True, True, False, False], [False, False, False, True, True]]
    for junk in (-9.0, 99.0, math.nan):
        assert torch.equal(low_width_tokens(scores.masked_fill(mask == 0, junk), mask, 0.5), found)
    alone = low_width_tokens(scores[1:, 1:], mask[1:, 1:], 0.5)
    assert torch.equal(alone, found[1:, 1:])


def test_shares_of_widths() -> None:
    scores, mask = random(3, 10), torch.ones(3, 10)
    mask[2] = 0
    assert not low_width_tokens(scores, mask, 0.0).any()
    assert low_width_tokens(scores, mask, 1.0).sum(1).tolist() == [9, 9, 0]
    assert low_width_tokens(scores, mask, 0.3).sum(1).tolist() == [3, 3, 0]
    with pytest.raises(ValueError, match="share=1.5"):
        low_width_tokens(scores, mask, 1.5)


@pytest.mark.parametrize("block", [1, 3, 128])
def test_attention_to_the_first_token(block: int) -> None:
    query, key = random(2, 4, 6, 8), random(2, 2, 6, 8, seed=1)
    mask = torch.tensor([[1, 1, 1, 1, 1, 1], [0, 0, 1, 1, 1, 0]])
    scores = query @ key.repeat_interleave(2, 1).transpose(-1, -2) / math.sqrt(8)
    seen = torch.ones(6, 6).tril().bool() & mask.bool()[:, None, None]
    weights = scores.masked_fill(~seen, -torch.inf).softmax(-1)
    expected = torch.stack([weights[0, :, :, 0].sum(0), weights[1, :, :, 2].sum(0)])
    expected[mask == 0] = 0
    found = first_token_attention(query, key, mask, block=block)
    assert_close(found, expected)
    assert_close(found[0, 0], 4.0)  # the first token sees only itself


def test_mixing_leaves_its_inputs_alone() -> None:
    high, low = random(2, 3, 4, grad=True), random(2, 3, 4, seed=1, grad=True)
    before = high.detach().clone()
    tokens = torch.tensor([[True, False, False], [False, True, True]])
    mixed = mix_by_token(high * 1, low * 1, tokens)
    mixed.sum().backward()
    assert torch.equal(high, before)
    assert high.grad is not None and low.grad is not None
    assert torch.equal(low.grad, tokens[..., None].expand(2, 3, 4).double())
    assert torch.equal(high.grad + low.grad, torch.ones(2, 3, 4, dtype=torch.float64))
    with pytest.raises(ValueError, match="do not fit"):
        mix_by_token(high, low, tokens[:, :2])


def test_each_width_learns_from_its_tokens() -> None:
    x, g = random(2, 2, 3, 4), random(2, 2, 3, 4, seed=1)
    tokens = torch.tensor([[False, True, True], [False, False, True]])
    mixed = TokenMixedFakeQuant(
        FakeQuantActivation(8, dtype=torch.float64), FakeQuantActivation(4, dtype=torch.float64)
    )
    (mixed(x, tokens) * g).sum().backward()
    alone = FakeQuantActivation(4, dtype=torch.float64)
    (alone(x) * g * tokens[:, None, :, None]).sum().backward()
    assert isinstance(mixed.low, FakeQuantActivation)
    assert_close(mixed.low.alpha.grad, alone.alpha.grad)
    assert mixed.low.alpha.grad is not None and mixed.low.alpha.grad.item() != 0


def test_no_low_token_is_the_uniform_width() -> None:
    made = []
    for low in (None, FakeQuantActivation(4)):
        x = random(2, 3, 4).float().requires_grad_(True)
        mixed = TokenMixedFakeQuant(FakeQuantActivation(8), low)
        found = mixed(x, torch.zeros(2, 3, dtype=torch.bool))
        found.square().sum().backward()
        assert isinstance(mixed.high, FakeQuantActivation)
        made.append((found.detach(), x.grad, mixed.high.alpha.grad))
    assert all(torch.equal(left, right) for left, right in zip(*made, strict=True))


# Losses


def test_the_worked_entropy_loss() -> None:
    query, key = double([[[[1.0, 3.0], [2.0, 2.0]]]]), double([[[[0.0, 2.0], [1.0, 1.0]]]])
    assert_close(entropy_loss(query, key, torch.ones(1, 2)), -0.393598, 1e-6)
    assert_close(entropy_loss(query, key, torch.ones(1, 2), form="paper"), 0.749970, 1e-6)
    assert_close(entropy_loss(query[0, 0], key[0, 0], form="code"), -0.393598, 1e-6)
    assert_close(entropy_loss(query, key, form="mean"), -0.5 * math.log(math.log(3)))
    assert entropy_loss(query, key, rate=0.0) == 0


def test_the_averaged_entropy_loss_has_the_codes_gradient() -> None:
    grads = []
    for form in ("code", "mean"):
        queries = [random(2, 4, 5, 8, seed=layer, grad=True) for layer in range(3)]
        keys = [random(2, 2, 5, 8, seed=9 + layer, grad=True) for layer in range(3)]
        entropy_loss(queries, keys, torch.ones(2, 5), form=form).backward()  # type: ignore[arg-type]
        grads.append([leaf.grad for leaf in queries + keys])
    for left, right in zip(*grads, strict=True):
        assert left.abs().max() > 0
        assert_close(left, right)


@pytest.mark.parametrize("form", ["code", "mean", "paper"])
def test_the_entropy_loss_by_loops(form: Any) -> None:
    queries, keys = random(2, 2, 4, 5, 8), random(2, 2, 2, 5, 8, seed=1)
    mask = torch.tensor([[1, 1, 1, 1, 1], [0, 1, 1, 0, 0]])
    total, count = 0.0, 0
    for layer in range(2):
        for head in range(4):
            q, k = queries[layer, :, head][mask == 1], keys[layer, :, head // 2][mask == 1]
            if form == "paper":
                total += math.log(1 + q.var(correction=0).item() * k.var(correction=0).item())
            else:
                total += sum(math.log(1 + row.var().item()) for part in (q, k) for row in part)
                count += len(q)
    expected = -0.5 * math.log(total / count if form == "mean" else total)
    assert_close(entropy_loss(queries, keys, mask, form=form), expected)


@pytest.mark.parametrize("form", ["code", "mean", "paper"])
def test_padding_does_not_reach_the_entropy_loss(form: Any) -> None:
    query, key = random(2, 4, 5, 8), random(2, 2, 5, 8, seed=1)
    mask = torch.tensor([[1, 1, 1, 1, 1], [0, 0, 1, 1, 0]])
    expected = entropy_loss(query, key, mask, form=form)
    wild = query.masked_fill(mask[:, None, :, None] == 0, math.nan).requires_grad_(True)
    found = entropy_loss(wild, key.masked_fill(mask[:, None, :, None] == 0, math.inf), mask, form=form)
    found.backward()
    assert_close(found, expected)
    assert wild.grad is not None and bool(wild.grad.isfinite().all())
    wider = [nn.functional.pad(part, (0, 0, 0, 3)) for part in (query, key)]
    assert_close(entropy_loss(*wider, nn.functional.pad(mask, (0, 3)), form=form), expected)


def test_spread_lowers_the_entropy_loss() -> None:
    query, key = random(1, 2, 5, 8), random(1, 2, 5, 8, seed=1)
    assert entropy_loss(2 * query, 2 * key) < entropy_loss(query, key)


def test_the_entropy_loss_refuses_in_words() -> None:
    with pytest.raises(ValueError, match="head size 1"):
        entropy_loss(random(1, 1, 3, 1), random(1, 1, 3, 1))
    with pytest.raises(ValueError, match="form='codes'"):
        entropy_loss(random(1, 1, 3, 2), random(1, 1, 3, 2), form="codes")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="no variance"):
        entropy_loss(torch.ones(1, 1, 3, 2), torch.ones(1, 1, 3, 2))
    with pytest.raises(ValueError, match="multiple of Hkv"):
        entropy_loss(random(1, 3, 3, 2), random(1, 2, 3, 2))
    query = random(1, 1, 3, 2, grad=True)
    empty = entropy_loss(query, random(1, 1, 3, 2), torch.zeros(1, 3))
    empty.backward()
    assert empty == 0 and query.grad is not None and not query.grad.any()


def test_the_worked_distribution_loss() -> None:
    student, teacher = double([[1.0, 0.0], [1.0, 1.0]]), double([[1.0, 0.0], [0.0, 1.0]])
    assert_close(map_cosines(student, teacher)[0], 0.816497, 1e-6)
    assert_close(distribution_loss(student, teacher), 0.183503, 1e-6)
    assert_close(distribution_loss(student, teacher, form="printed"), -0.202733, 1e-6)
    assert_close(distribution_loss(student, teacher, form="log"), 0.202733, 1e-6)
    batched = distribution_loss(student[None, None], teacher[None, None], torch.ones(1, 2))
    assert_close(batched, 0.183503, 1e-6)


def layers_of(seed: int, grad: bool = False, kv: int = 2, width: int = 7) -> list[QueryKey]:
    return [
        QueryKey(
            random(3, 4, width, 8, seed=seed + layer, grad=grad),
            random(3, kv, width, 8, seed=seed + 50 + layer, grad=grad),
            0.3,
        )
        for layer in range(2)
    ]


def maps_of(layers: list[QueryKey]) -> list[Tensor]:
    return [
        layer.query @ layer.key.repeat_interleave(4 // layer.key.size(1), 1).transpose(-1, -2) * layer.scaling
        for layer in layers
    ]


RAGGED = torch.tensor([[1, 1, 1, 1, 1, 1, 1], [0, 0, 1, 1, 1, 1, 0], [0, 0, 0, 0, 0, 0, 0]])


def near(seed: int, layers: list[QueryKey]) -> list[QueryKey]:
    """A teacher whose maps are like those of `layers`, so that the cosines are positive."""
    noise = layers_of(seed)
    return [
        QueryKey(a.query.detach() + 0.5 * b.query, a.key.detach() + 0.5 * b.key, a.scaling)
        for a, b in zip(layers, noise, strict=True)
    ]


@pytest.mark.parametrize("form", ["recommended", "log", "printed"])
@pytest.mark.parametrize("block", [1, 3, 64])
def test_the_streamed_loss_is_the_loss_of_the_maps(form: Any, block: int) -> None:
    whole, streamed = layers_of(0, grad=True), layers_of(0, grad=True)
    teacher = near(20, whole)
    first = distribution_loss(maps_of(whole), maps_of(teacher), RAGGED, 0.7, form)
    second = streamed_distribution_loss(streamed, teacher, RAGGED, 0.7, form, block)
    assert_close(first, second)
    first.backward()
    second.backward()
    for left, right in zip(whole, streamed, strict=True):
        assert left.query.grad is not None and left.query.grad.abs().max() > 1e-6
        assert_close(left.query.grad, right.query.grad)
        assert_close(left.key.grad, right.key.grad)


def test_the_streamed_gradient_is_numerically_right() -> None:
    mask = torch.tensor([[0, 1, 1, 1]])
    teacher = [QueryKey(random(1, 2, 4, 2, seed=2), random(1, 2, 4, 2, seed=3), 0.7)]

    def loss(query: Tensor, key: Tensor) -> Tensor:
        return streamed_distribution_loss([QueryKey(query, key, 0.3)], teacher, mask, block=3)

    assert torch.autograd.gradcheck(loss, (random(1, 2, 4, 3, grad=True), random(1, 1, 4, 3, seed=1, grad=True)))


def test_identical_maps_have_no_loss_and_no_gradient() -> None:
    student = layers_of(0, grad=True)
    loss = streamed_distribution_loss(student, layers_of(0), RAGGED, block=3)
    loss.backward()
    assert loss == 0
    for layer in student:
        assert_close(layer.query.grad, torch.zeros_like(layer.query), 1e-15)
        assert_close(layer.key.grad, torch.zeros_like(layer.key), 1e-15)
    maps = random(2, 2, 5, 5, grad=True)
    loss = distribution_loss(maps, maps.detach())
    loss.backward()
    assert loss == 0
    assert_close(maps.grad, torch.zeros_like(maps), 1e-15)


@pytest.mark.parametrize(("form", "raises"), [("recommended", True), ("log", True), ("printed", False)])
def test_one_descent_step_raises_the_similarity_unless_printed(form: Any, raises: bool) -> None:
    student = layers_of(0, grad=True)
    teacher = near(20, student)

    def similarity(layers: list[QueryKey]) -> float:
        return 1 - streamed_distribution_loss(layers, teacher, RAGGED).item()

    streamed_distribution_loss(student, teacher, RAGGED, form=form).backward()
    with torch.no_grad():
        moved = [QueryKey(a.query - 0.1 * a.query.grad, a.key - 0.1 * a.key.grad, a.scaling) for a in student]  # type: ignore[operator]
    change = similarity(moved) - similarity(student)
    assert (change > 1e-4) if raises else (change < -1e-4)


def test_padding_and_the_future_do_not_reach_the_distribution_loss() -> None:
    student, teacher = layers_of(0), layers_of(20)
    expected = streamed_distribution_loss(student, teacher, RAGGED)
    outside = RAGGED[:, None, :, None] == 0
    wild = [
        QueryKey(a.query.masked_fill(outside, math.nan), a.key.masked_fill(outside, math.inf), 0.3) for a in student
    ]
    leaf = wild[0].query.requires_grad_(True)
    found = streamed_distribution_loss(wild, teacher, RAGGED, block=2)
    found.backward()
    assert_close(found, expected)
    assert leaf.grad is not None and bool(leaf.grad.isfinite().all())
    maps = [part.masked_fill(~torch.ones(7, 7).tril().bool(), math.nan) for part in maps_of(student)]
    assert_close(distribution_loss(maps, maps_of(teacher), RAGGED), expected)
    rows = (
        [QueryKey(a.query[:2], a.key[:2], 0.3) for a in student],
        [QueryKey(a.query[:2], a.key[:2], 0.3) for a in teacher],
    )
    assert_close(streamed_distribution_loss(*rows, RAGGED[:2]), expected)  # an empty row counts nowhere


class _Largest(TorchDispatchMode):
    """The number of elements of the largest tensor that any operation makes."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for part in made if isinstance(made, (tuple, list)) else [made]:
            if isinstance(part, Tensor):
                self.elements = max(self.elements, part.numel())
        return made


def test_the_streamed_loss_never_holds_a_map() -> None:
    width, block = 128, 8
    student, teacher = layers_of(0, grad=True, width=width), layers_of(20, width=width)
    mask = torch.ones(3, width)
    with _Largest() as largest:
        streamed_distribution_loss(student, teacher, mask, block=block).backward()
    queries = student[0].query.numel()
    assert largest.elements <= max(3 * 4 * block * width, queries) < 3 * 4 * width * width / 10


def test_the_distribution_loss_refuses_in_words() -> None:
    maps = random(1, 2, 3, 3)
    with pytest.raises(ValueError, match="set form='recommended'"):
        distribution_loss(maps, -maps, form="log")
    with pytest.raises(ValueError, match="form='sum'"):
        distribution_loss(maps, maps, form="sum")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="allowed: equal"):
        distribution_loss(maps, maps[:, :1])
    with pytest.raises(ValueError, match="start checkpoint"):
        streamed_distribution_loss(layers_of(0), [QueryKey(a.query[:, :2], a.key, 1.0) for a in layers_of(0)], RAGGED)
    with pytest.raises(ValueError, match="block=0"):
        streamed_distribution_loss(layers_of(0), layers_of(1), RAGGED, block=0)


def test_the_distillation_loss() -> None:
    logits, teacher = random(2, 4, 9, grad=True), random(2, 4, 9, seed=1)
    mask = torch.tensor([[1, 1, 1, 0], [1, 0, 0, 0]])
    labels = torch.randint(9, (2, 4), generator=torch.Generator().manual_seed(0))
    rows = mask.bool()
    divergence = nn.functional.kl_div(
        (logits[rows] / 2).log_softmax(-1), (teacher[rows] / 2).softmax(-1), reduction="batchmean"
    )
    found = distillation_loss(logits, teacher, mask)
    assert_close(found, 0.5 * 4 * divergence)
    with_labels = distillation_loss(logits, teacher, mask, labels=labels)
    assert_close(with_labels, 2 * divergence + 0.5 * nn.functional.cross_entropy(logits[rows], labels[rows]))
    assert_close(distillation_loss(logits, logits.detach(), mask), 0.0, 1e-15)
    assert distillation_loss(logits, teacher, torch.zeros_like(mask)) == 0
    found.backward()
    assert logits.grad is not None and not logits.grad[mask == 0].any() and logits.grad[mask == 1].abs().min() > 0
    for wrong in ({"temperature": 0.0}, {"gamma": 1.5}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            distillation_loss(logits, teacher, mask, **wrong)


# A model


@pytest.fixture(autouse=True)
def _no_wrapper_left() -> Iterator[None]:
    """Whatever a test leaves prepared is forgotten, so that the next one sees transformers' own function."""
    before = ALL_ATTENTION_FUNCTIONS["sdpa"]
    yield
    if ALL_ATTENTION_FUNCTIONS["sdpa"] is not before:
        from rltok.quant import qat

        for quantisers in list(qat._LIVE):
            qat._LIVE.discard(quantisers)
        qat._release()


def build(seed: int = 0, **changes: object) -> Qwen3ForCausalLM:
    return build_model(build_tokenizer(), seed, **changes).eval()


IDS = torch.tensor([[5, 9, 11, 7, 20, 31, 8, 12], [6, 10, 14, 3, 22, 30, 13, 15]])
ONES = torch.ones_like(IDS)
SPECS: dict[str, QATSpec] = {
    "W4A8": QATSpec(),
    "without probabilities": QATSpec(probabilities=False),
    "mixed widths": QATSpec(low_share=0.5),
    "dynamic": QATSpec(weight="dynamic", activation="dynamic", group_size=8),
    "weights only": QATSpec(activation_bits=OFF),
    "activations only": QATSpec(weight_bits=OFF),
}


def logits_of(model: nn.Module, ids: Tensor = IDS, mask: Tensor = ONES, **options: Any) -> Tensor:
    return model(input_ids=ids, attention_mask=mask, use_cache=False, **options).logits


def grads_of(model: nn.Module) -> dict[str, Tensor]:
    model.zero_grad()
    logits_of(model).square().mean().backward()
    return {name: value.grad.clone() for name, value in model.named_parameters() if value.grad is not None}


def prepared(spec: QATSpec, seed: int = 0, **changes: object) -> nn.Module:
    model = prepare_qat(build(seed, **changes), spec)
    calibrate_qat(model, input_ids=IDS, attention_mask=ONES)
    return model


@pytest.mark.parametrize("mask", [ONES, torch.tensor([[1] * 8, [0, 0, 0, 1, 1, 1, 1, 1]])])
def test_all_off_is_the_plain_model_bit_for_bit(mask: Tensor) -> None:
    plain, model = build(), prepare_qat(build(), QATSpec(weight_bits=OFF, activation_bits=OFF))
    assert torch.equal(logits_of(plain, mask=mask), logits_of(model, mask=mask))
    expected, found = grads_of(plain), grads_of(model)
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[name], found[name]) for name in expected)


@pytest.mark.parametrize("name", SPECS)
def test_converted_is_prepared_bit_for_bit(name: str) -> None:
    model = prepared(SPECS[name])
    with torch.no_grad():  # as if it had been trained
        for module in model.modules():
            if isinstance(module, FakeQuantWeight) and module.bits != OFF:
                module.alpha.mul_(1.1)
    expected = logits_of(model)
    plain = logits_of(build())
    assert not torch.equal(expected, plain)
    assert (expected - plain).abs().max() < 0.5 * plain.abs().max()  # not noise
    assert torch.equal(logits_of(convert(model)), expected)
    assert not any(isinstance(module, FakeQuantWeight) for module in model.modules())
    weight = model.get_submodule("model.layers.0.mlp.down_proj").weight
    if SPECS[name].weight == "lsq" and SPECS[name].weight_bits == 4:
        assert len(weight.unique()) <= 16


@pytest.mark.parametrize("name", SPECS)
def test_removed_without_a_trace(name: str) -> None:
    original = ALL_ATTENTION_FUNCTIONS["sdpa"]
    model = build()
    expected, keys = logits_of(model), list(model.state_dict())
    kinds = [type(module) for module in model.modules()]
    weights = [id(parameter) for parameter in model.parameters()]
    prepare_qat(model, SPECS[name])
    assert ALL_ATTENTION_FUNCTIONS["sdpa"] is not original
    calibrate_qat(model, input_ids=IDS, attention_mask=ONES)
    assert not torch.equal(logits_of(model), expected)
    assert remove_qat(model) is model
    assert torch.equal(logits_of(model), expected)
    assert list(model.state_dict()) == keys
    assert [type(module) for module in model.modules()] == kinds
    assert [id(parameter) for parameter in model.parameters()] == weights
    assert not any(module._forward_pre_hooks for module in model.modules())
    assert ALL_ATTENTION_FUNCTIONS["sdpa"] is original and "sdpa" not in ALL_ATTENTION_FUNCTIONS._local_mapping


def test_share_zero_is_the_uniform_width() -> None:
    uniform, mixed = prepared(QATSpec()), prepared(QATSpec(low_share=0.0, low_bits=2))
    assert torch.equal(logits_of(uniform), logits_of(mixed))
    left, right = grads_of(uniform), grads_of(mixed)
    assert left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)
    none = prepared(QATSpec(low_share=0.05))  # int(0.05 * 8) tokens
    assert torch.equal(logits_of(uniform), logits_of(none))
    some = prepared(QATSpec(low_share=0.5))
    assert not torch.equal(logits_of(uniform), logits_of(some))


def test_the_quantisers_lie_where_the_card_says() -> None:
    model = prepared(QATSpec(low_share=0.5))
    names = {name.rpartition(".")[0] for name, _ in model.named_parameters() if name.endswith(".zp")}
    first = {name.removeprefix("model.layers.0.") for name in names if ".layers.0." in name}
    second = {name.removeprefix("model.layers.1.") for name in names if ".layers.1." in name}
    highs = {f"self_attn.fake_quant.{part}.high" for part in ("input", "query", "key", "value")}
    rest = {
        "self_attn.fake_quant.probabilities",
        "mlp.fake_quant.input.high",
        "mlp.down_proj.activation_fake_quantizer.high",
    }
    at_once = {
        "self_attn.fake_quant.value.low",
        "mlp.fake_quant.input.low",
        "mlp.down_proj.activation_fake_quantizer.low",
    }
    later = {f"self_attn.fake_quant.{part}.low" for part in ("input", "query", "key")}
    assert first == highs | rest | at_once
    assert second == first | later
    steps = {name for name, _ in model.named_parameters() if name.endswith("weight_fake_quantizer.alpha")}
    assert len(steps) == 2 * 7
    assert type(model.get_submodule("lm_head")) is nn.Linear


def test_attention_with_quantised_probabilities_by_hand() -> None:
    model = prepared(QATSpec())
    layer = model.get_submodule("model.layers.1.self_attn.fake_quant")
    assert isinstance(layer, AttentionFakeQuant) and isinstance(layer.probabilities, FakeQuantActivation)
    query, key, value = random(2, 4, 5, 8), random(2, 2, 5, 8, seed=1), random(2, 2, 5, 8, seed=2)
    keys, values = key.repeat_interleave(2, 1), value.repeat_interleave(2, 1)
    seen = torch.ones(5, 5).tril().bool()
    qat_state(model).mask = None
    weights = (query @ keys.transpose(-1, -2) * 0.3).masked_fill(~seen, -torch.inf).softmax(-1)
    expected = (layer.probabilities(weights) @ values).transpose(1, 2)
    assert_close(layer._quantised_attention(query, key, value, None, 0.3, 0.0), expected)
    assert_close(layer._quantised_attention(query, key, value, seen[None, None], 0.3, 0.0), expected)
    added = torch.zeros(1, 1, 5, 5).masked_fill(~seen, torch.finfo(torch.float32).min)
    assert_close(layer._quantised_attention(query, key, value, added, 0.3, 0.0), expected)
    exact = (weights @ values).transpose(1, 2)
    assert (expected - exact).abs().max() > 1e-6
    layer.probabilities = FakeQuantActivation(OFF)
    assert_close(layer._quantised_attention(query, key, value, None, 0.3, 0.0), exact)


def test_the_model_computes_with_quantised_queries_keys_and_values() -> None:
    """One layer of the prepared model against a plain one that is fed what the quantisers make."""
    model = prepared(QATSpec(probabilities=False, weight_bits=OFF))
    layer = model.get_submodule("model.layers.0.self_attn.fake_quant")
    assert isinstance(layer, AttentionFakeQuant)
    seen: dict[str, Tensor] = {}
    original = ALL_ATTENTION_FUNCTIONS["sdpa"].original  # type: ignore[attr-defined]

    def spy(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Any:
        if module.layer_idx == 0:
            seen.update(query=query, key=key, value=value)
        return original(module, query, key, value, *args, **kwargs)

    ALL_ATTENTION_FUNCTIONS["sdpa"].original = spy  # type: ignore[attr-defined]
    logits_of(model)
    ALL_ATTENTION_FUNCTIONS["sdpa"].original = original  # type: ignore[attr-defined]
    for name, tensor in seen.items():
        step = getattr(layer, name).high.alpha.detach()
        assert_close((tensor / step).detach().round(), (tensor / step).detach(), 1e-3)
        assert len(tensor.unique()) <= 256


def test_a_zero_point_shows_nothing_of_the_future() -> None:
    model = prepared(QATSpec())
    for module in model.modules():
        if isinstance(module, AttentionFakeQuant):
            assert isinstance(module.probabilities, FakeQuantActivation)
            module.probabilities.zp.data.fill_(-3.0)
    changed = IDS.clone()
    changed[:, -1] = 40
    before, after = logits_of(model), logits_of(model, changed)
    assert torch.equal(before[:, :-1], after[:, :-1]) and not torch.equal(before[:, -1], after[:, -1])


@pytest.mark.parametrize("share", [0.0, 0.5])
@pytest.mark.parametrize("pads", [(3, 0), (0, 3), (2, 2)])
def test_padding_changes_no_step_no_width_and_no_logit(pads: tuple[int, int], share: float) -> None:
    spec = QATSpec(low_share=share)
    left, right = pads
    ids, mask = nn.functional.pad(IDS, pads), nn.functional.pad(ONES, pads)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    plain, padded = prepare_qat(build().double(), spec), prepare_qat(build().double(), spec)
    calibrate_qat(plain, input_ids=IDS, attention_mask=ONES)
    calibrate_qat(padded, input_ids=ids, attention_mask=mask, position_ids=positions)
    inner = slice(left, left + 8)
    for (name, one), (_, two) in zip(plain.named_parameters(), padded.named_parameters(), strict=True):
        assert_close(one, two, 1e-10), name
    expected = logits_of(plain)
    found = logits_of(padded, ids, mask, position_ids=positions)[:, inner]
    assert_close(found, expected, 1e-8)
    if share:
        for layer in range(2):
            assert torch.equal(qat_state(plain).low[layer], qat_state(padded).low[layer][:, inner])
            assert qat_state(padded).low[layer].sum(1).tolist() == [4, 4]
    expected.square().mean().backward()
    found.square().mean().backward()
    for one, two in zip(plain.parameters(), padded.parameters(), strict=True):
        assert (one.grad is None) == (two.grad is None)
        if one.grad is not None and two.grad is not None:
            assert_close(one.grad, two.grad, 1e-8)


@pytest.mark.parametrize("share", [0.0, 0.5])
def test_gradient_checkpointing_changes_nothing(share: float) -> None:
    plain, saving = prepared(QATSpec(low_share=share)), prepared(QATSpec(low_share=share))
    saving.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})  # type: ignore[operator]
    plain.train()
    saving.train()
    left, right = grads_of(plain), grads_of(saving)
    assert left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


@pytest.mark.parametrize("probabilities", [True, False])
def test_a_cache_changes_no_completion(probabilities: bool) -> None:
    model = prepared(QATSpec(probabilities=probabilities))
    options = {"max_new_tokens": 6, "do_sample": False, "attention_mask": ONES}
    outputs = [
        model.generate(IDS, use_cache=cached, output_logits=True, return_dict_in_generate=True, **options)  # type: ignore[operator]
        for cached in (True, False)
    ]
    assert torch.equal(outputs[0].sequences, outputs[1].sequences)
    for left, right in zip(outputs[0].logits, outputs[1].logits, strict=True):
        assert_close(left, right, 1e-4)


def test_widths_refuse_a_cache_and_packed_rows() -> None:
    model = prepared(QATSpec(low_share=0.5))
    with pytest.raises(ValueError, match="low_share=0.5 needs whole sequences"):
        model.generate(IDS, max_new_tokens=2, attention_mask=ONES)  # type: ignore[operator]
    positions = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3]])
    with pytest.raises(ValueError, match="packed"):
        model(input_ids=IDS[:1], position_ids=positions, use_cache=False)


def test_a_copy_works_on_its_own() -> None:
    original = ALL_ATTENTION_FUNCTIONS["sdpa"]
    model = prepared(QATSpec(low_share=0.5))
    twin = copy.deepcopy(model)
    expected = logits_of(model)
    assert qat_state(twin) is not qat_state(model)
    remove_qat(model)
    assert torch.equal(logits_of(twin), expected)
    remove_qat(twin)
    assert torch.equal(logits_of(twin), logits_of(model)) and torch.equal(logits_of(twin), logits_of(build()))
    assert ALL_ATTENTION_FUNCTIONS["sdpa"] is original


def test_a_saved_state_goes_on_where_it_was() -> None:
    model, fresh = prepared(QATSpec(low_share=0.5)), prepare_qat(build(seed=3), QATSpec(low_share=0.5))
    with pytest.raises(ValueError, match="calibrate_qat"):
        logits_of(fresh)
    fresh.load_state_dict(model.state_dict())
    assert torch.equal(logits_of(fresh), logits_of(model))


def test_calibration_leaves_modes_and_gradients_alone() -> None:
    model = prepare_qat(build(), QATSpec()).train()
    model.get_submodule("model.layers.0").eval()
    modes = [module.training for module in model.modules()]
    calibrate_qat(model, input_ids=IDS, attention_mask=ONES)
    assert [module.training for module in model.modules()] == modes
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(bool(value) for name, value in model.state_dict().items() if name.endswith("init_state"))


def test_the_losses_train_a_prepared_model() -> None:
    teacher = build()
    model = prepared(QATSpec(weight_bits=2, activation_bits=4))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02)
    first = last = None
    for _ in range(6):
        with torch.no_grad(), collecting_teacher(teacher) as theirs:
            wanted = logits_of(teacher)
        with collecting(model) as ours:
            logits = logits_of(model)
        assert sorted(ours) == sorted(theirs) == [0, 1]
        student, targets = [ours[layer] for layer in (0, 1)], [theirs[layer] for layer in (0, 1)]
        distance = streamed_distribution_loss(student, targets, ONES, block=3)
        spread = entropy_loss([part.query for part in student], [part.key for part in student], ONES)
        loss = distillation_loss(logits, wanted, ONES) + distance + 0.01 * spread
        optimizer.zero_grad()
        loss.backward()
        if first is None:
            first = distance.item()
            quiet = [name for name, value in model.named_parameters() if value.grad is None or not value.grad.any()]
            assert not [name for name in quiet if name.endswith("alpha")], quiet
        optimizer.step()
        last = distance.item()
    assert first is not None and last is not None and last < first
    assert qat_state(model).collected is None


def test_what_is_collected_is_what_attention_compares() -> None:
    model = prepared(QATSpec(activation_bits=OFF, weight_bits=OFF))
    with collecting_teacher(build()) as theirs:
        logits_of(build(seed=1))  # another model is not seen
        assert not theirs
    plain = build()
    with torch.no_grad(), collecting_teacher(plain) as theirs, collecting(model) as ours:
        logits_of(plain)
        logits_of(model)
    for layer in (0, 1):
        assert torch.equal(ours[layer].query, theirs[layer].query) and torch.equal(ours[layer].key, theirs[layer].key)
        assert ours[layer].scaling == theirs[layer].scaling
    layers = [0, 1]
    assert streamed_distribution_loss([ours[i] for i in layers], [theirs[i] for i in layers], ONES) == 0


def test_other_models_see_nothing_of_it() -> None:
    other = build(seed=5)
    expected = logits_of(other)
    prepared(QATSpec())
    assert torch.equal(logits_of(other), expected)


def test_wrappers_of_others_in_between_quantise_nothing_twice() -> None:
    original = ALL_ATTENTION_FUNCTIONS["sdpa"]
    first = prepared(QATSpec(probabilities=False))
    expected = logits_of(first)
    ours = ALL_ATTENTION_FUNCTIONS["sdpa"]
    ALL_ATTENTION_FUNCTIONS["sdpa"] = lambda *args, **kwargs: ours(*args, **kwargs)
    second = prepared(QATSpec(probabilities=False))
    assert torch.equal(logits_of(first), expected) and torch.equal(logits_of(second), expected)
    remove_qat(second)
    remove_qat(first)
    ALL_ATTENTION_FUNCTIONS["sdpa"] = ours
    assert torch.equal(logits_of(first), logits_of(build()))
    del ALL_ATTENTION_FUNCTIONS["sdpa"]
    assert ALL_ATTENTION_FUNCTIONS["sdpa"] is original


def test_llama_with_biases() -> None:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, attention_bias=True, mlp_bias=True,
    )  # fmt: skip
    model = prepare_qat(LlamaForCausalLM(config).eval(), QATSpec(low_share=0.25))
    calibrate_qat(model, input_ids=IDS, attention_mask=ONES)
    expected = logits_of(model)
    assert torch.equal(logits_of(convert(model)), expected)


def _eager(model: nn.Module) -> nn.Module:
    model.set_attn_implementation("eager")  # type: ignore[operator]
    return model


def _with_adapter(model: nn.Module) -> nn.Module:
    from peft import LoraConfig, get_peft_model

    return get_peft_model(model, LoraConfig(target_modules=["q_proj"], r=2))


def _sliding(_: nn.Module) -> nn.Module:
    return build(layer_types=["full_attention", "sliding_attention"], sliding_window=4, use_sliding_window=True)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (_eager, "attn_implementation='eager'"),
        (_with_adapter, "Prepare before PEFT"),
        (_sliding, "sliding_attention"),
        (lambda model: prepare_qat(model), "prepared already"),
    ],
)
def test_what_cannot_be_prepared_is_refused(change: Callable[[nn.Module], nn.Module], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        prepare_qat(change(build()))


def test_an_adapter_around_a_prepared_model() -> None:
    model = _with_adapter(prepared(QATSpec()))
    logits_of(model).square().mean().backward()
    trained = [name for name, value in model.named_parameters() if value.grad is not None]
    assert trained and all("lora_" in name for name in trained)


def test_a_model_that_is_not_prepared() -> None:
    for act in (convert, remove_qat, calibrate_qat, qat_state):
        with pytest.raises(ValueError, match="not prepared"):
            act(build())


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"weight_bits": 16}, "weight_bits=16"),
        ({"low_share": 1.2}, "low_share=1.2"),
        ({"low_share": 0.5, "activation_bits": OFF}, "activation_bits"),
        ({"weight": "awq"}, "weight='awq'"),
        ({"group_size": 32}, "weight='dynamic'"),
    ],
)
def test_settings_are_checked(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        QATSpec(**settings)


def test_groups_must_divide_every_linear() -> None:
    with pytest.raises(ValueError, match="does not divide the 48 inputs"):
        prepare_qat(build(), QATSpec(weight="dynamic", group_size=32))
