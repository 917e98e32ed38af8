"""Weight quantisers: worked numbers, equality with torchao, refresh in place, kernels, memory, refusals."""

from __future__ import annotations

import dataclasses
import subprocess
import sys

import pytest
import torch
from torch.nn.functional import linear as full_linear

from rltok.quant.codes import BACKENDS, dequantize, linear, quantize_weight, refresh, state_bytes
from rltok.quant.spec import BACKEND_BITS, SKIP, RolloutQuantSpec

WORKED = [0.3, -0.1, 0.9, -1.2]
EVERY = [
    RolloutQuantSpec(bits=8),
    RolloutQuantSpec(bits=4),
    RolloutQuantSpec(bits=8, group_size=32),
    RolloutQuantSpec(bits=4, group_size=32),
    RolloutQuantSpec(bits=4, group_size=32, hold_dequantized=True),
    RolloutQuantSpec(bits=8, backend="aten_int8"),
    RolloutQuantSpec(bits=4, backend="aten_int4"),
    RolloutQuantSpec(bits=4, backend="aten_int4", group_size=64),
    RolloutQuantSpec(bits=8, backend="fp8"),
]
FLOATS = [torch.float32, torch.bfloat16, torch.float16]


def label(spec):
    return f"{spec.backend}-{spec.bits}-{spec.group_size}{'-dense' if spec.hold_dequantized else ''}"


def random_weight(rows=512, columns=256, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return (0.02 * torch.randn(rows, columns, generator=generator)).to(dtype)


@pytest.fixture(params=EVERY, ids=label)
def spec(request):
    return request.param


@pytest.mark.parametrize(
    ("bits", "group_size", "scale", "expected"),
    [
        (4, 4, 0.16, [0.32, -0.16, 0.96, -1.12]),
        (4, None, 0.16, [0.32, -0.16, 0.96, -1.12]),
        (8, 4, 0.009411765, [0.301176, -0.103529, 0.903529, -1.195294]),
        (8, None, 0.009411765, [0.301176, -0.103529, 0.903529, -1.195294]),
    ],
)
def test_worked_numbers(bits, group_size, scale, expected):
    state = quantize_weight(torch.tensor([WORKED]), RolloutQuantSpec(bits=bits, group_size=group_size))
    torch.testing.assert_close(state.scale, torch.tensor([[scale]]), atol=1e-9, rtol=1e-6)
    torch.testing.assert_close(dequantize(state), torch.tensor([expected]), atol=1e-6, rtol=0)


def test_reciprocal_decides_the_tie():
    """The largest element lies on a tie: dividing by the scale gives other codes than multiplying by its reciprocal."""
    w = random_weight()
    scale = w.abs().amax(1, keepdim=True) / 7.5
    reciprocal = (w * (1 / scale)).round().clamp(-8, 7) * scale
    divided = (w / scale).round().clamp(-8, 7) * scale
    assert torch.equal(dequantize(quantize_weight(w, RolloutQuantSpec(bits=4))), reciprocal)
    assert not torch.equal(divided, reciprocal)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("group_size", [None, 32])
def test_equal_to_torchao_in_float32(bits, group_size):
    pytest.importorskip("torchao", reason="torchao is not installed")
    from torchao.quantization.quantize_.workflows import IntxUnpackedToInt8Tensor

    for w in (random_weight(), torch.tensor([WORKED])):
        width = group_size if group_size and w.size(1) > 4 else w.size(1)
        theirs = IntxUnpackedToInt8Tensor.from_hp(w, (1, width), getattr(torch, f"int{bits}"))
        ours = quantize_weight(w, RolloutQuantSpec(bits=bits, group_size=width))
        assert torch.equal(dequantize(ours), theirs.dequantize())
        assert torch.equal(ours.scale, theirs.scale)


@pytest.mark.parametrize("dtype", FLOATS)
def test_equal_to_torchao_int8(dtype):
    pytest.importorskip("torchao", reason="torchao is not installed")
    from torchao.quantization import PerRow
    from torchao.quantization.quantize_.workflows import Int8Tensor

    w = random_weight(dtype=dtype)
    theirs, ours = Int8Tensor.from_hp(w, PerRow()), quantize_weight(w, RolloutQuantSpec(bits=8))
    assert torch.equal(ours.codes, theirs.qdata)
    assert torch.equal(dequantize(ours), theirs.dequantize())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_equal_to_the_fake_quantiser_of_torchao(dtype):
    pytest.importorskip("torchao", reason="torchao is not installed")
    from torchao.quantization.qat import IntxFakeQuantizeConfig, IntxFakeQuantizer

    w = random_weight(dtype=dtype)
    theirs = IntxFakeQuantizer(IntxFakeQuantizeConfig(torch.int4, group_size=32))(w)
    assert torch.equal(dequantize(quantize_weight(w, RolloutQuantSpec(bits=4, group_size=32))), theirs)


@pytest.mark.parametrize("dtype", FLOATS)
def test_float8_equals_torchao(dtype):
    pytest.importorskip("torchao", reason="torchao is not installed")
    from torchao.quantization import PerRow
    from torchao.quantization.quantize_.workflows import Float8Tensor

    w = random_weight(dtype=dtype)
    theirs = Float8Tensor.from_hp(w, granularity=PerRow())
    ours = quantize_weight(w, RolloutQuantSpec(bits=8, backend="fp8"))
    assert torch.equal(ours.codes.view(torch.uint8), theirs.qdata.view(torch.uint8))
    assert torch.equal(dequantize(ours), theirs.dequantize())


def test_scale_has_the_dtype_of_the_weight():
    w = random_weight(dtype=torch.bfloat16)
    state = quantize_weight(w, RolloutQuantSpec(bits=8))
    assert state.scale.dtype == torch.bfloat16
    codes = (w.float() * (1 / state.scale.float())).round().clamp(-128, 127)
    assert torch.equal(state.codes.float(), codes)
    assert torch.equal(dequantize(state), (codes * state.scale.float()).bfloat16())


def test_error_is_half_a_step(spec):
    w = random_weight()
    state = quantize_weight(w, spec)
    error = (dequantize(state) - w).abs()
    if spec.backend == "fp8":
        assert (error <= w.abs() * 2**-4 + 448 * 2**-18 * state.scale).all()  # half a unit of a 3-bit mantissa
        return
    width = spec.group_size or w.size(1)
    half = (w.unflatten(1, (-1, width)).abs().amax(-1) / (2**spec.bits - 1)).repeat_interleave(width, 1)
    assert (error <= half * (1 + 1e-4)).all()
    assert error.max() > 0.99 * half.max()


@pytest.mark.parametrize("dtype", FLOATS)
def test_linear_is_the_product_with_the_dequantised_weight(spec, dtype):
    state = quantize_weight(random_weight(64, 128, dtype), spec)
    generator = torch.Generator().manual_seed(1)
    x, bias = torch.randn(2, 3, 128, generator=generator).to(dtype), torch.randn(64, generator=generator).to(dtype)
    got = linear(x, state, bias)
    exact = full_linear(x.double(), dequantize(state).double(), bias.double())
    assert got.dtype == dtype and got.shape == (2, 3, 64)
    assert (got.double() - exact).norm() / exact.norm() < 8 * torch.finfo(dtype).eps
    assert torch.equal(linear(x, state), linear(x, state, torch.zeros_like(bias)))


def test_kernels_have_the_codes_of_plain_torch():
    w = random_weight(64, 128)
    for group_size in (None, 32):
        plain = dequantize(quantize_weight(w, RolloutQuantSpec(bits=4, group_size=group_size)))
        kernel = quantize_weight(w, RolloutQuantSpec(bits=4, group_size=group_size, backend="aten_int4"))
        assert torch.equal(dequantize(kernel), plain)
    plain = dequantize(quantize_weight(w, RolloutQuantSpec(bits=8)))
    assert torch.equal(dequantize(quantize_weight(w, RolloutQuantSpec(bits=8, backend="aten_int8"))), plain)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_refresh_is_a_fresh_quantisation_in_the_same_buffers(spec, dtype):
    old, new = random_weight(64, 128, dtype, seed=0), random_weight(64, 128, dtype, seed=1)
    state, fresh = quantize_weight(old, spec), quantize_weight(new, spec)
    before = dequantize(state).clone()
    tensors = [t for t in (state.codes, state.scale, state.dense) if t is not None]
    places = [tensor.data_ptr() for tensor in tensors]
    different = integer_view(state) != integer_view(fresh)
    changed = refresh(state, new)
    assert [tensor.data_ptr() for tensor in tensors] == places
    assert torch.equal(integer_view(state), integer_view(fresh))
    assert torch.equal(state.scale, fresh.scale)
    assert torch.equal(dequantize(state), dequantize(fresh))
    assert not torch.equal(dequantize(state), before)
    assert changed == pytest.approx(different.double().mean().item())
    assert refresh(state, new) == 0.0


def integer_view(state):
    """(N, K) codes, whatever their order in memory."""
    if state.codes.dtype == torch.uint8:
        return torch.stack([state.codes & 15, state.codes >> 4], -1).flatten(1)
    return state.codes.view(torch.int8)


def test_codes_flip_at_the_rate_of_the_update_over_the_step():
    """An update of 1e-6 per weight flips |update| / step of the codes: 0.18 % at N(0, 0.02), 2048 columns."""
    generator = torch.Generator().manual_seed(0)
    w = 0.02 * torch.randn(512, 2048, generator=generator)
    update = 1e-6 * torch.randn(w.shape, generator=generator).sign()
    update.scatter_(1, w.abs().argmax(1, keepdim=True), 0.0)  # the scale stays
    state = quantize_weight(w, RolloutQuantSpec(bits=8))
    step = state.scale.mean().item()
    assert step == pytest.approx(5.7e-4, rel=0.05)
    expected = (update.abs() / state.scale).mean().item()
    assert expected == pytest.approx(0.0018, rel=0.05)
    assert refresh(state, w + update) == pytest.approx(expected, rel=0.1)  # 3 standard deviations are 7 %


def test_int8_rounds_small_updates_away():
    w = random_weight(8, 64)
    state = quantize_weight(w, RolloutQuantSpec(bits=8))
    assert refresh(state, w * (1 + 1e-7)) == 0.0


@pytest.mark.parametrize(
    ("spec", "dtype", "expected"),
    [
        (RolloutQuantSpec(bits=8), torch.float32, 512 * 256 + 512 * 4),
        (RolloutQuantSpec(bits=8), torch.bfloat16, 512 * 256 + 512 * 2),
        (RolloutQuantSpec(bits=4), torch.bfloat16, 512 * 128 + 512 * 2),
        (RolloutQuantSpec(bits=4, group_size=32), torch.bfloat16, 512 * 128 + 512 * 8 * 2),
        (
            RolloutQuantSpec(bits=4, group_size=32, hold_dequantized=True),
            torch.float32,
            512 * 128 + 512 * 32 + 512 * 256 * 4,
        ),
        (RolloutQuantSpec(bits=4, backend="aten_int4", group_size=64), torch.bfloat16, 512 * 128 + 2 * 512 * 4 * 2),
        (RolloutQuantSpec(bits=4, backend="aten_int4"), torch.bfloat16, 512 * 128 + 2 * 512 * 1 * 2),
        (RolloutQuantSpec(bits=8, backend="aten_int8"), torch.float32, 512 * 256 + 512 * 4),
        (RolloutQuantSpec(bits=8, backend="fp8"), torch.bfloat16, 512 * 256 + 512 * 2),
        (RolloutQuantSpec(bits=16), torch.float32, 0),
    ],
    ids=lambda value: label(value) if isinstance(value, RolloutQuantSpec) else None,
)
def test_bytes(spec, dtype, expected):
    assert state_bytes(quantize_weight(random_weight(dtype=dtype), spec)) == expected


def test_sixteen_bits_are_the_weight_itself():
    w, x = random_weight(8, 16), torch.randn(3, 16)
    state = quantize_weight(w, RolloutQuantSpec(bits=16))
    assert dequantize(state).data_ptr() == w.data_ptr()
    assert torch.equal(linear(x, state), full_linear(x, w))
    assert refresh(state, w) == 0.0
    with pytest.raises(ValueError, match="bits=16"):
        refresh(state, w.clone())


def test_a_weight_is_never_written_to(spec):
    w = random_weight(64, 128)
    before, version = w.clone(), w._version
    state = quantize_weight(w, spec)
    refresh(state, w)
    assert torch.equal(w, before) and w._version == version


@pytest.mark.parametrize("dtype", FLOATS)
def test_rows_of_zeros_stay_zero(spec, dtype):
    w = random_weight(64, 128, dtype)
    w[3] = 0
    state = quantize_weight(w, spec)
    assert (dequantize(state)[3] == 0).all() and dequantize(state).isfinite().all()


def test_float32_weight_with_a_smaller_dtype():
    """What a merged adapter needs: codes of the float32 weight, scales and products of the base's dtype."""
    w = random_weight(64, 128)
    state = quantize_weight(w, RolloutQuantSpec(bits=8), torch.bfloat16)
    assert state.scale.dtype == dequantize(state).dtype == torch.bfloat16
    assert torch.equal(state.codes.float(), (w * (1 / state.scale.float())).round().clamp(-128, 127))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"bits": 3}, r"bits=3 is unknown; allowed: 4, 8, 16"),
        ({"scheme": "asymmetric"}, "scheme='asymmetric' is unknown"),
        ({"backend": "torchao"}, "backend='torchao' is unknown"),
        ({"group_size": 0}, "group_size=0"),
        ({"bits": 8, "backend": "aten_int4"}, "serves bits=4, not bits=8"),
        ({"bits": 4, "backend": "fp8"}, "serves bits=8, not bits=4"),
        ({"bits": 4, "backend": "aten_int4", "group_size": 16}, "group_size=16"),
        ({"backend": "fp8", "group_size": 32}, "one scale per output row"),
        ({"bits": 4, "backend": "aten_int4", "hold_dequantized": True}, "hold_dequantized"),
        ({"skip": "lm_head"}, "must be a list"),
    ],
)
def test_settings_are_refused_by_name(settings, message):
    with pytest.raises(ValueError, match=message):
        RolloutQuantSpec(**settings)


@pytest.mark.parametrize(
    ("w", "spec", "message"),
    [
        (torch.randn(8, 48), RolloutQuantSpec(group_size=32), "group_size=32 does not divide the 48"),
        (torch.randn(8, 31), RolloutQuantSpec(bits=4), "packs two columns"),
        (torch.randn(24, 64), RolloutQuantSpec(bits=4, backend="aten_int4"), "multiple of 16 output rows"),
        (torch.randn(16, 48), RolloutQuantSpec(bits=4, backend="aten_int4"), "multiple of 32 input columns"),
        (torch.randn(16, 48), RolloutQuantSpec(bits=8, backend="aten_int8"), "multiple of 32 input columns"),
        (torch.randn(16, 64).double(), RolloutQuantSpec(bits=4, backend="aten_int4"), "not torch.float64"),
        (torch.randn(16, 64), RolloutQuantSpec(backend="fp8_scaled_mm"), "capability 8.9"),
        (torch.randn(16, 64).fill_(torch.nan), RolloutQuantSpec(), "not finite"),
        (torch.randn(2, 16, 64), RolloutQuantSpec(), "must be a matrix"),
        (torch.ones(16, 64, dtype=torch.int8), RolloutQuantSpec(), "must be a matrix of floats"),
    ],
)
def test_weights_are_refused_by_name(w, spec, message):
    with pytest.raises(ValueError, match=message):
        quantize_weight(w, spec)


def test_a_missing_kernel_is_an_error(monkeypatch):
    import rltok.quant.codes as codes

    class Torch:
        """torch.ops without the kernel."""

        aten = object()

    monkeypatch.setattr(codes.torch, "ops", Torch())
    with pytest.raises(ValueError, match="_weight_int4pack_mm_for_cpu"):
        quantize_weight(torch.randn(16, 64), RolloutQuantSpec(bits=4, backend="aten_int4"))


def test_refresh_refuses_another_shape():
    state = quantize_weight(random_weight(8, 16), RolloutQuantSpec())
    with pytest.raises(ValueError, match="quantise it anew"):
        refresh(state, random_weight(16, 8))


def test_skip_takes_parts_and_patterns():
    spec = RolloutQuantSpec(skip=(*SKIP, "model.layers.0.*", "down_proj"))
    kept = ("lm_head", "model.layers.1.mlp.gate", "model.layers.0.self_attn.q_proj", "model.layers.3.mlp.down_proj")
    assert all(spec.keeps(name) for name in kept)
    assert not any(spec.keeps(name) for name in ("model.layers.1.mlp.gate_proj", "model.layers.10.self_attn.q_proj"))


def test_every_backend_has_its_bits():
    assert set(BACKENDS) == set(BACKEND_BITS)
    assert dataclasses.is_dataclass(RolloutQuantSpec) and RolloutQuantSpec.__dataclass_params__.frozen


def test_torchao_is_not_imported():
    code = "import sys, rltok.quant; sys.exit('torchao' in sys.modules or 'bitsandbytes' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_torchao_multiplies_the_same_codes(dtype):
    pytest.importorskip("torchao", reason="torchao is the extra rltok[quant]")
    from torchao.quantization import Int8Tensor, PerRow

    generator = torch.Generator().manual_seed(0)
    w, x = torch.randn(24, 32, generator=generator).to(dtype), torch.randn(3, 5, 32, generator=generator).to(dtype)
    state = quantize_weight(w, RolloutQuantSpec(8, backend="torchao_int8"))
    theirs = Int8Tensor.from_hp(w, granularity=PerRow())
    assert torch.equal(state.codes, theirs.qdata)
    assert torch.equal(linear(x, state), torch.nn.functional.linear(x, theirs))
    assert torch.equal(dequantize(state), dequantize(quantize_weight(w, RolloutQuantSpec(8))))
    refresh(state, w * 1.5)
    fresh = quantize_weight(w * 1.5, RolloutQuantSpec(8, backend="torchao_int8"))
    assert torch.equal(state.codes, fresh.codes) and torch.equal(state.scale, fresh.scale)


def test_torchao_that_is_missing_is_named(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"backend='torchao_int8' needs torchao.*rltok\[quant\]"):
        quantize_weight(torch.ones(2, 4), RolloutQuantSpec(8, backend="torchao_int8"))
