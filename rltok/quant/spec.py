"""How weights are quantised.

    s    = max|w| / ((qmax - qmin) / 2)           rounded to the weight's dtype; one per row, or per group of columns
    code = clip(round(w * (1 / s)), qmin, qmax)   float32 arithmetic, ties to even
    w^   = s * code                               rounded to the weight's dtype

qmin, qmax are -8, 7 and -128, 127, so that half of the range is 7.5 and 127.5: the element of largest magnitude lies on
a tie of the rounding, and `w / s` in place of `w * (1 / s)` gives other codes.

Source: the symmetric mapping of torchao 0.18; equal to it bit for bit in float32, and in bfloat16 and float16 to its
int8 tensor and its fake quantiser. (Its unpacked intx tensor multiplies in the weight's dtype instead, which in
bfloat16 moves 1 % of the 4-bit and 10 % of the 8-bit codes by one step.)
"""

from __future__ import annotations

from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Literal

SKIP = ("lm_head", "embed_tokens", "embed_out", "router", "gate", "shared_expert_gate")
"""Names of modules that stay in full precision: heads, embeddings, and what routes tokens to experts."""

BACKEND_BITS: dict[str, tuple[int, ...]] = {
    "torch": (4, 8, 16),
    "aten_int8": (8,),
    "aten_int4": (4,),
    "torchao_int8": (8,),
    "fp8": (8,),
    "fp8_scaled_mm": (8,),
}
"""Bits that a backend serves."""

ATEN_GROUPS = (32, 64, 128, 256)
"""Group sizes of the int4 kernel of torch."""


@dataclass(frozen=True)
class RolloutQuantSpec:
    """How the weights of a policy are quantised; `bits=16` leaves them as they are."""

    bits: Literal[4, 8, 16] = 8
    """Bits of a weight; 16: nothing is done, whatever the policy's precision."""
    scheme: Literal["symmetric"] = "symmetric"
    """The mapping at the top of this file."""
    group_size: int | None = None
    """Input columns that share a scale; must divide the columns of every weight. null: one scale per output row."""
    backend: Literal["torch", "aten_int8", "aten_int4", "torchao_int8", "fp8", "fp8_scaled_mm"] = "torch"
    """`torch` dequantises and multiplies, on any device; `aten_int8` and `aten_int4` multiply with torch's own CPU
    kernels, which pay in bfloat16 with few rows (in float32 they are slower than the full weight); `torchao_int8`
    multiplies as torchao does, from the extra `rltok[quant]`; `fp8` holds float8_e4m3fn and dequantises;
    `fp8_scaled_mm` also rounds the inputs of a layer to it, row by row, and multiplies on GPUs of capability 8.9 and
    above."""
    skip: tuple[str, ...] = SKIP
    """Modules left in full precision: a name that is one part of a module's dotted name, or a pattern for all of it
    such as `model.layers.0.*`. The embeddings and the output head are left in any case."""
    hold_dequantized: bool = False
    """Hold the dequantised weights beside the codes: the speed of the policy, and more memory than it."""

    def __post_init__(self) -> None:
        _check_choice("bits", self.bits, (4, 8, 16))
        _check_choice("scheme", self.scheme, ("symmetric",))
        _check_choice("backend", self.backend, tuple(BACKEND_BITS))
        if isinstance(self.skip, str):
            raise ValueError(f"skip={self.skip!r} must be a list of names, such as [{self.skip!r}]")
        if self.group_size is not None and self.group_size < 1:
            raise ValueError(f"group_size={self.group_size} must be at least 1; null takes one scale per output row")
        allowed = BACKEND_BITS[self.backend]
        if self.bits not in allowed:
            raise ValueError(
                f"backend={self.backend!r} serves bits={' or '.join(map(str, allowed))}, not bits={self.bits}: "
                "set another backend or bits"
            )
        if self.backend == "aten_int4" and self.group_size not in (None, *ATEN_GROUPS):
            raise ValueError(f"group_size={self.group_size}: backend='aten_int4' allows {ATEN_GROUPS} or null")
        if self.backend in ("aten_int8", "torchao_int8", "fp8", "fp8_scaled_mm") and self.group_size is not None:
            raise ValueError(
                f"group_size={self.group_size}: backend={self.backend!r} has one scale per output row; set null"
            )
        if self.hold_dequantized and self.backend != "torch" and self.backend != "fp8":
            raise ValueError(f"hold_dequantized=True bypasses the kernel of backend={self.backend!r}: set 'torch'")

    @property
    def bounds(self) -> tuple[int, int]:
        """qmin and qmax of integer codes."""
        return -(2 ** (self.bits - 1)), 2 ** (self.bits - 1) - 1

    def keeps(self, name: str) -> bool:
        """Whether the module of this dotted name stays in full precision."""
        parts = name.split(".")
        return any(entry in parts or fnmatchcase(name, entry) for entry in self.skip)


def _check_choice(name: str, value: object, allowed: tuple[object, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{name}={value!r} is unknown; allowed: {', '.join(map(repr, allowed))}")
