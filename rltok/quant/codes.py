"""One weight as low-precision codes and scales.

`quantize_weight` makes a state, `linear` multiplies with it, `refresh` brings it to other values of the weight without
new buffers. `spec.py` has the equations of integer codes; float8 is, as in torchao,

    s = max|w| / 448,  code = float8_e4m3fn(clip(w / s, -448, 448)),  w^ = s * code

Bytes of an (N, K) weight whose dtype has b bytes, groups of g columns (g = K without groups):

    torch       4 bits   N K / 2 + N (K / g) b
                8 bits   N K + N (K / g) b
    aten_int4            N K / 2 + 2 N (K / g) b   g the kernel's, where there is one scale per row
    aten_int8, fp8       N K + N b
    hold_dequantized     N K b on top
    16 bits              0, the weight itself

Sources: torchao 0.18 (mappings); torch's `_weight_int4pack_mm_for_cpu`, `_weight_int8pack_mm`, `_scaled_mm`.
"""

from __future__ import annotations

import importlib.util
import math
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.nn.functional import linear as full_linear

from rltok.quant.spec import ATEN_GROUPS, RolloutQuantSpec

FLOAT8_MAX = 448.0
"""Largest float8_e4m3fn."""
DECODED_COLUMNS = 1024
"""Columns of an aten_int4 weight that are dequantised at once."""


@dataclass(frozen=True)
class QuantState:
    """A quantised weight of N rows and K columns."""

    spec: RolloutQuantSpec
    shape: tuple[int, int]
    """(N, K) of the weight"""
    dtype: torch.dtype
    """of the dequantised weight and of the scales"""
    codes: Tensor
    """packed as the backend does"""
    scale: Tensor
    """(N, K / g); aten_int4: (K / g, N, 2) with zero points, which are 0"""
    dense: Tensor | None = None
    """(N, K) dequantised weight, only with `hold_dequantized`"""


class Backend(Protocol):
    """How one kind of codes is made, read and multiplied with."""

    def check(self, w: Tensor, spec: RolloutQuantSpec, dtype: torch.dtype) -> None:
        """Raise ValueError where it does not serve this weight."""
        ...

    def encode(self, w: Tensor, spec: RolloutQuantSpec, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """(N, K) weight -> codes and scales."""
        ...

    def decode(self, state: QuantState) -> Tensor:
        """(N, K) dequantised weight."""
        ...

    def multiply(self, x: Tensor, state: QuantState) -> Tensor:
        """(..., K) -> (..., N)."""
        ...

    def changed(self, old: Tensor, new: Tensor) -> Tensor:
        """How many codes differ, 0-d."""
        ...


@torch.no_grad()
def quantize_weight(w: Tensor, spec: RolloutQuantSpec, dtype: torch.dtype | None = None) -> QuantState:
    """Quantise a weight.

    Args:
        w: (N, K) weight of a linear layer; it is not changed, and only with `bits=16` kept.
        dtype: of the dequantised weight and of the scales, if not the weight's own.

    Raises:
        ValueError: a weight that the backend does not serve, columns that the group size does not divide, a missing
            kernel, a weight that is not finite.

    Example: bits 4, one group: (0.3, -0.1, 0.9, -1.2) has s = 0.16 and dequantises to (0.32, -0.16, 0.96, -1.12).
    """
    dtype = dtype or w.dtype
    check_weight(w, spec, dtype)
    backend = _backend(spec)
    codes, scale = backend.encode(w.detach(), spec, dtype)
    shape = (w.size(0), w.size(1))
    state = QuantState(spec, shape, dtype, codes, scale)
    if not spec.hold_dequantized or spec.bits == 16:
        return state
    return QuantState(spec, shape, dtype, codes, scale, backend.decode(state))


def dequantize(state: QuantState) -> Tensor:
    """(N, K) w^ of the weight's dtype; with `bits=16` the weight itself."""
    return _backend(state.spec).decode(state) if state.dense is None else state.dense


def linear(x: Tensor, state: QuantState, bias: Tensor | None = None) -> Tensor:
    """x w^T + bias with the quantised weight.

    Args:
        x: (..., K).
        bias: (N,).

    Returns:
        (..., N).
    """
    if state.dense is not None:
        return full_linear(x, state.dense, bias)
    y = _backend(state.spec).multiply(x, state)
    return y if bias is None else y + bias.to(y.dtype)


def check_weight(w: Tensor, spec: RolloutQuantSpec, dtype: torch.dtype) -> None:
    """Raise ValueError for a weight that cannot be quantised so, whatever its values."""
    if w.dim() != 2 or not w.is_floating_point():
        raise ValueError(f"w must be a matrix of floats, not {tuple(w.shape)} of {w.dtype}")
    _backend(spec).check(w, spec, dtype)


@torch.no_grad()
def rounded_weight(w: Tensor, spec: RolloutQuantSpec, dtype: torch.dtype | None = None) -> Tensor:
    """(N, K) w^ of a weight: `dequantize(quantize_weight(w, spec, dtype))` bit for bit, without packed codes."""
    dtype = dtype or w.dtype
    if spec.bits == 16 or spec.backend in ("fp8", "fp8_scaled_mm"):
        return dequantize(quantize_weight(w, spec, dtype))
    check_weight(w, spec, dtype)
    codes, scale = integer_codes(w, spec, dtype)
    return (codes.to(torch.int8).to(dtype) * scale[..., None]).view(w.shape)


@torch.no_grad()
def rounded_input(x: Tensor, spec: RolloutQuantSpec) -> Tensor:
    """What `linear` multiplies the weight with: x, of `fp8_scaled_mm` (..., K) x rounded row by row, in float32."""
    if spec.bits == 16 or spec.backend != "fp8_scaled_mm":
        return x
    codes, scale = _float8_rows(x)
    return codes.float() * scale


@torch.no_grad()
def refresh(state: QuantState, w: Tensor) -> float:
    """Bring a state to the present values of its weight: the same as a fresh quantisation, in the same buffers.

    Returns:
        Share of codes that changed, 0 to 1.

    Raises:
        ValueError: another shape or device than the state's, or values that are not finite; with `bits=16` another
            tensor than the one the state holds.
    """
    if tuple(w.shape) != state.shape or w.device != state.codes.device:
        raise ValueError(
            f"the state is of a {state.shape} weight on {state.codes.device}, not of {tuple(w.shape)} on {w.device}: "
            "quantise it anew"
        )
    if state.spec.bits == 16:
        if w.data_ptr() != state.codes.data_ptr():
            raise ValueError("with bits=16 the state is the weight itself, not a copy: quantise the other weight anew")
        return 0.0
    backend = _backend(state.spec)
    codes, scale = backend.encode(w.detach(), state.spec, state.dtype)
    changed = int(backend.changed(state.codes, codes))
    state.codes.copy_(codes)
    state.scale.copy_(scale)
    if state.dense is not None:
        state.dense.copy_(backend.decode(state))
    return changed / max(math.prod(state.shape), 1)


def state_bytes(state: QuantState) -> int:
    """Memory of a state that the weight does not already take."""
    if state.spec.bits == 16:
        return 0
    tensors = (state.codes, state.scale, state.dense)
    return sum(tensor.nbytes for tensor in tensors if tensor is not None)


def integer_codes(w: Tensor, spec: RolloutQuantSpec, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(N, K / g, g) codes as floats and (N, K / g) scales of `dtype`."""
    low, high = spec.bounds
    width = w.size(1) if spec.group_size is None else spec.group_size
    grouped = w.to(_arithmetic(w)).reshape(w.size(0), -1, width)
    scale = _scale(grouped, (high - low) / 2, dtype)
    return (grouped * (1 / scale.to(grouped.dtype))[..., None]).round_().clamp_(low, high), scale


class _Full:
    """16 bits: the weight itself."""

    def check(self, w: Tensor, spec: RolloutQuantSpec, dtype: torch.dtype) -> None:
        if dtype != w.dtype:
            raise ValueError(f"bits=16 keeps {w.dtype}; dtype={dtype} would need a copy")

    def encode(self, w: Tensor, spec: RolloutQuantSpec, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        return w, w.new_ones(w.size(0), 1)

    def decode(self, state: QuantState) -> Tensor:
        return state.codes

    def multiply(self, x: Tensor, state: QuantState) -> Tensor:
        return full_linear(x, state.codes)

    def changed(self, old: Tensor, new: Tensor) -> Tensor:
        return (old != new).sum()


class _Torch:
    """int8, or two 4-bit codes in a byte, even columns low; dequantised for every multiplication."""

    def check(self, w: Tensor, spec: RolloutQuantSpec, dtype: torch.dtype) -> None:
        _check_groups(w, spec)
        if spec.bits == 4 and w.size(1) % 2:
            raise ValueError(f"bits=4 packs two columns in a byte, and the weight has {w.size(1)}: skip it")

    def encode(self, w: Tensor, spec: RolloutQuantSpec, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        codes, scale = integer_codes(w, spec, dtype)
        flat = codes.view(w.shape)
        return (flat.to(torch.int8).contiguous() if spec.bits == 8 else _pack(flat)), scale

    def decode(self, state: QuantState) -> Tensor:
        codes = state.codes if state.spec.bits == 8 else _unpack(state.codes)
        rows, columns = state.shape
        grouped = codes.to(state.dtype).view(rows, state.scale.size(1), -1)
        return (grouped * state.scale[..., None]).view(rows, columns)

    def multiply(self, x: Tensor, state: QuantState) -> Tensor:
        return _like(x, state, full_linear(*_matched(x, self.decode(state))))

    def changed(self, old: Tensor, new: Tensor) -> Tensor:
        return (old != new).sum() if old.dtype == torch.int8 else _changed_nibbles(old, new)


class _AtenInt8(_Torch):
    """The same codes, multiplied by torch's int8 CPU kernel, which dequantises on its way."""

    def check(self, w: Tensor, spec: RolloutQuantSpec, dtype: torch.dtype) -> None:
        super().check(w, spec, dtype)
        _check_cpu_kernel(w, spec, dtype, ("_weight_int8pack_mm",))
        # bfloat16 reads past the end of other rows: wrong numbers or a crash (torch 2.13)
        _check_multiple(spec, "input columns", w.size(1), 32)

    def multiply(self, x: Tensor, state: QuantState) -> Tensor:
        rows = x.reshape(-1, x.size(-1)).to(state.dtype).contiguous()
        y = torch.ops.aten._weight_int8pack_mm(rows, state.codes, state.scale.view(-1))
        return _like(x, state, y.view(*x.shape[:-1], -1))


class _TorchaoInt8(_Torch):
    """The same codes, multiplied as torchao multiplies its int8 weights (its GPU kernels, where there are any)."""

    def check(self, w: Tensor, spec: RolloutQuantSpec, dtype: torch.dtype) -> None:
        if importlib.util.find_spec("torchao") is None:
            raise ValueError(
                f"backend={spec.backend!r} needs torchao: pip install 'rltok[quant]', or set backend='torch'"
            )
        super().check(w, spec, dtype)

    def multiply(self, x: Tensor, state: QuantState) -> Tensor:
        from torchao.quantization import Int8Tensor

        x, _ = _matched(x, state.scale)
        weight = Int8Tensor(state.codes, state.scale, [1, state.shape[1]], state.dtype)
        return full_linear(x, weight)


class _AtenInt4:
    """4-bit codes in the order of torch's int4 CPU kernel."""

    def check(self, w: Tensor, spec: RolloutQuantSpec, dtype: torch.dtype) -> None:
        _check_groups(w, spec)
        ops = ("_convert_weight_to_int4pack_for_cpu", "_weight_int4pack_mm_for_cpu")
        _check_cpu_kernel(w, spec, dtype, ops)
        _check_multiple(spec, "output rows", w.size(0), 16)
        _check_multiple(spec, "input columns", w.size(1), ATEN_GROUPS[0])

    def encode(self, w: Tensor, spec: RolloutQuantSpec, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        codes, scale = integer_codes(w, spec, dtype)
        shifted = (codes.view(w.shape) + 8).to(torch.int32)
        packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(shifted, 1)
        groups = w.size(1) // (spec.group_size or _kernel_group(w.size(1)))
        spread = scale.repeat_interleave(groups // scale.size(1), 1).t()
        return packed, torch.stack([spread, torch.zeros_like(spread)], -1)

    def decode(self, state: QuantState) -> Tensor:
        # only the kernel knows its order: products with 1 give the codes, which bfloat16 holds exactly
        columns, rows = state.shape[1], state.shape[0]
        ones = torch.zeros(state.scale.shape, dtype=torch.bfloat16)
        ones[..., 0] = 1
        unit = torch.eye(columns, dtype=torch.bfloat16).split(DECODED_COLUMNS)
        codes = torch.cat([self._product(part, state, ones) for part in unit]).t().to(state.dtype)
        scale = state.scale[..., 0].t()
        return (codes.reshape(rows, scale.size(1), -1) * scale[..., None]).view(rows, columns)

    def multiply(self, x: Tensor, state: QuantState) -> Tensor:
        rows = x.reshape(-1, x.size(-1)).to(state.dtype).contiguous()
        return _like(x, state, self._product(rows, state, state.scale).view(*x.shape[:-1], -1))

    def changed(self, old: Tensor, new: Tensor) -> Tensor:
        return _changed_nibbles(old, new)

    def _product(self, rows: Tensor, state: QuantState, scale: Tensor) -> Tensor:
        group = state.shape[1] // scale.size(0)
        y: Tensor = torch.ops.aten._weight_int4pack_mm_for_cpu(rows, state.codes, group, scale)
        return y


class _Fp8:
    """float8_e4m3fn with one scale per row, dequantised for every multiplication."""

    def check(self, w: Tensor, spec: RolloutQuantSpec, dtype: torch.dtype) -> None:
        if not hasattr(torch, "float8_e4m3fn"):
            raise ValueError(f"backend={spec.backend!r}: this torch has no float8_e4m3fn; set backend='torch'")

    def encode(self, w: Tensor, spec: RolloutQuantSpec, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        w = w.to(_arithmetic(w))
        scale = _scale(w, FLOAT8_MAX, dtype)[:, None]
        codes = (w / scale.to(w.dtype)).clamp_(-FLOAT8_MAX, FLOAT8_MAX).to(torch.float8_e4m3fn)
        return codes, scale

    def decode(self, state: QuantState) -> Tensor:
        return state.codes.to(state.dtype) * state.scale

    def multiply(self, x: Tensor, state: QuantState) -> Tensor:
        return _like(x, state, full_linear(*_matched(x, self.decode(state))))

    def changed(self, old: Tensor, new: Tensor) -> Tensor:
        return (old.view(torch.uint8) != new.view(torch.uint8)).sum()


class _Fp8ScaledMM(_Fp8):
    """float8 times float8: the rows of the input are rounded too. Not run: no GPU was there when it was written."""

    def check(self, w: Tensor, spec: RolloutQuantSpec, dtype: torch.dtype) -> None:
        super().check(w, spec, dtype)
        if not w.is_cuda or not hasattr(torch, "_scaled_mm") or torch.cuda.get_device_capability(w.device) < (8, 9):
            raise ValueError(
                f"backend={spec.backend!r} needs a GPU of capability 8.9 or above and torch._scaled_mm, and the weight "
                f"is on {w.device}: set backend='fp8', which dequantises"
            )
        if dtype != torch.bfloat16:
            raise ValueError(f"backend={spec.backend!r} serves bfloat16, not {dtype}: load the model in bfloat16")
        _check_multiple(spec, "output rows", w.size(0), 16)
        _check_multiple(spec, "input columns", w.size(1), 16)

    def multiply(self, x: Tensor, state: QuantState) -> Tensor:
        codes, scale = _float8_rows(x.reshape(-1, x.size(-1)))
        y = torch._scaled_mm(
            codes, state.codes.t(), scale_a=scale, scale_b=state.scale.float().t(), out_dtype=state.dtype
        )
        return _like(x, state, y.view(*x.shape[:-1], -1))


BACKENDS: dict[str, Backend] = {
    "torch": _Torch(),
    "aten_int8": _AtenInt8(),
    "aten_int4": _AtenInt4(),
    "torchao_int8": _TorchaoInt8(),
    "fp8": _Fp8(),
    "fp8_scaled_mm": _Fp8ScaledMM(),
}
_FULL: Backend = _Full()


def _backend(spec: RolloutQuantSpec) -> Backend:
    return _FULL if spec.bits == 16 else BACKENDS[spec.backend]


def _arithmetic(w: Tensor) -> torch.dtype:
    return torch.promote_types(w.dtype, torch.float32)


def _scale(values: Tensor, half_range: float, dtype: torch.dtype) -> Tensor:
    """Largest magnitude along the last dimension by half of the range, in `dtype`; a row of zeros has a tiny one."""
    largest = values.abs().amax(-1)
    if not largest.isfinite().all():
        raise ValueError("the weight holds values that are not finite (nan or inf): it cannot be quantised")
    return (largest / half_range).clamp_(min=torch.finfo(dtype).smallest_normal).to(dtype)


def _float8_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """(..., K) -> float8 codes and (..., 1) float32 scales, one per row."""
    x = x.float()
    scale = _scale(x, FLOAT8_MAX, torch.float32)[..., None]
    return (x / scale).clamp_(-FLOAT8_MAX, FLOAT8_MAX).to(torch.float8_e4m3fn), scale


def _pack(codes: Tensor) -> Tensor:
    """(N, K) codes -8..7 -> (N, K / 2) bytes."""
    nibbles = codes.to(torch.int8).view(torch.uint8) & 15
    return nibbles[:, ::2] | (nibbles[:, 1::2] << 4)


def _unpack(packed: Tensor) -> Tensor:
    """(N, K / 2) bytes -> (N, K) int8 codes -8..7."""
    both = torch.stack([packed << 4, packed & 240], -1).view(torch.int8)
    return (both >> 4).flatten(-2)  # the shift carries the sign


def _changed_nibbles(old: Tensor, new: Tensor) -> Tensor:
    different = old ^ new
    return ((different & 15) != 0).sum() + ((different >> 4) != 0).sum()


def _kernel_group(columns: int) -> int:
    return max(group for group in ATEN_GROUPS if columns % group == 0)


def _matched(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Both in the weight's dtype; autocast, where it is on, decides itself."""
    return (x, weight) if torch.is_autocast_enabled(x.device.type) else (x.to(weight.dtype), weight)


def _like(x: Tensor, state: QuantState, y: Tensor) -> Tensor:
    """The dtype that a linear layer would give."""
    return y if x.dtype == state.dtype or torch.is_autocast_enabled(x.device.type) else y.to(x.dtype)


def _check_groups(w: Tensor, spec: RolloutQuantSpec) -> None:
    if spec.group_size is not None and w.size(1) % spec.group_size:
        raise ValueError(
            f"group_size={spec.group_size} does not divide the {w.size(1)} input columns of a weight: "
            "set another one, or null for one scale per output row"
        )


def _check_multiple(spec: RolloutQuantSpec, what: str, count: int, multiple: int) -> None:
    if count % multiple:
        raise ValueError(
            f"backend={spec.backend!r} needs a multiple of {multiple} {what}, and a weight has {count}: "
            "skip it, or set backend='torch'"
        )


def _check_cpu_kernel(w: Tensor, spec: RolloutQuantSpec, dtype: torch.dtype, ops: tuple[str, ...]) -> None:
    missing = [op for op in ops if not hasattr(torch.ops.aten, op)]
    if missing:
        raise ValueError(f"backend={spec.backend!r}: torch {torch.__version__} has no {missing}; set backend='torch'")
    if w.device.type != "cpu":
        raise ValueError(f"backend={spec.backend!r} serves the CPU, and the weight is on {w.device}: set 'torch'")
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise ValueError(f"backend={spec.backend!r} serves float32, bfloat16 and float16, not {dtype}: set 'torch'")
