"""GPTQ with a weight per token: round a matrix column by column, and let the columns to come make up for the error.

    H   = (2 / n) sum_sequences sum_t w_t x_t x_t^T                 n sequences, w of unit mean per sequence
    e_i = (W_i - quant(W_i)) / U_ii,   W_j -= e_i U_ij  (j > i),    U = upper Cholesky factor of (H + damping)^-1

All w = 1 is plain GPTQ, exactly. Codes are symmetric: round(W / scale) in -2^(b-1) .. 2^(b-1) - 1, with
scale = max|W| / (2^(b-1) - 1) per output row or per group of columns, and optionally the best of 80 shrunk scales.

Source: GPTQ, arXiv 2210.17323; token weights of RSQ, arXiv 2503.01820 v1, in the form of its official code. Left out:
act order, asymmetric scales, vector codebooks.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from rltok.quant.importance import unit_mean

SHRINKS = 80
"""scales that the clip search tries: 1.00, 0.99, ... of the full one"""
CLIP_NORM = 2.4
"""exponent of the error that the clip search minimises"""
MAX_DAMPINGS = 49
"""how often the damping is added before a Hessian counts as hopeless"""


@dataclass(frozen=True)
class QuantSpec:
    """How a matrix is rounded."""

    bits: int = 3
    """width of a code, 2 to 8"""
    group_size: int = -1
    """columns that share a scale; -1: the whole row"""
    clip_search: bool = False
    """choose the scale of a row or group among 80 shrunk ones by sum |error|^2.4"""
    percdamp: float = 0.01
    """share of the Hessian's mean diagonal that is added to its diagonal, above 0"""
    block_size: int = 128
    """columns between two updates of the rest; speed only"""
    scale_dtype: torch.dtype | None = None
    """scales are rounded to this before codes are chosen, as a checkpoint will store them; None: as computed"""

    def __post_init__(self) -> None:
        if not 2 <= self.bits <= 8:
            raise ValueError(f"bits={self.bits}; allowed: 2 to 8")
        if self.group_size != -1 and self.group_size < 1:
            raise ValueError(f"group_size={self.group_size}; allowed: -1 (one scale per row) or >= 1 column")
        if not 0 < self.percdamp <= 1:
            raise ValueError(f"percdamp={self.percdamp}; allowed: above 0, at most 1")
        if self.block_size < 1:
            raise ValueError(f"block_size={self.block_size}; allowed: >= 1 column")
        if self.scale_dtype is not None and not self.scale_dtype.is_floating_point:
            raise ValueError(f"scale_dtype={self.scale_dtype}; allowed: None or a floating-point dtype")

    @property
    def lowest(self) -> int:
        """-2^(b-1), the smallest code."""
        return -(2 ** (self.bits - 1))

    @property
    def highest(self) -> int:
        """2^(b-1) - 1, the largest code."""
        return 2 ** (self.bits - 1) - 1

    def columns(self, in_features: int) -> int:
        """Columns that share a scale in a matrix with so many.

        Raises:
            ValueError: groups that do not fill the row.
        """
        if self.group_size == -1:
            return in_features
        if in_features % self.group_size:
            raise ValueError(
                f"group_size={self.group_size} does not divide in_features={in_features}; set group_size to a divisor "
                "or to -1 (one scale per row)"
            )
        return self.group_size


@dataclass(frozen=True)
class QuantizedLinearState:
    """A rounded matrix: integer codes and their scales."""

    codes: Tensor
    """(out, in) int8"""
    scales: Tensor
    """(out, groups) positive"""
    bits: int
    """width of a code"""
    group_size: int
    """columns that share a scale; -1: the whole row"""
    dampings: int = 0
    """how often the damping was added until the Hessian could be factored; 0: not by GPTQ"""

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """(out, in) codes times scales, in the dtype of the scales unless another is given."""
        out, groups = self.scales.shape
        codes = self.codes.to(self.scales.dtype).view(out, groups, -1)
        weight = (codes * self.scales[..., None]).view(out, -1)
        return weight if dtype is None else weight.to(dtype)

    def rows(self, start: int, stop: int) -> QuantizedLinearState:
        """The state of the output rows [start, stop)."""
        codes, scales = self.codes[start:stop].clone(), self.scales[start:stop].clone()
        return QuantizedLinearState(codes, scales, self.bits, self.group_size, self.dampings)


class HessianAccumulator:
    """The sum over calibration sequences that GPTQ needs, one (in, in) matrix.

    `total` and `sequences` are plain sums: add them over data ranks before `hessian` is read.
    """

    def __init__(self, in_features: int | None = None, dtype: torch.dtype | None = None) -> None:
        """`in_features=None`: from the first inputs; `dtype=None`: float64 for float64 inputs, else float32.

        Raises:
            ValueError: another dtype than float32 and float64.
        """
        if dtype not in (None, torch.float32, torch.float64):
            raise ValueError(f"dtype={dtype}; allowed: None, torch.float32, torch.float64")
        self.in_features = in_features
        self.dtype = dtype
        self.total: Tensor | None = None
        """(in, in) sum over sequences and tokens of w x x^T"""
        self.sequences = 0
        """n, sequences with a valid token"""

    def add(self, x: Tensor, token_weight: Tensor | None = None, mask: Tensor | None = None) -> None:
        """Add one sequence or a batch of sequences.

        Args:
            x: (T, in) or (B, T, in) inputs of the linear.
            token_weight: (T,) or (B, T) importance, not negative; scaled to unit mean over a sequence's valid tokens,
                so importance and unit-mean weights give the same. None: all 1, plain GPTQ.
            mask: (T,) or (B, T), 1 at valid tokens. None: tokens of positive weight are valid; give it where valid
                tokens may weigh 0.

        Raises:
            ValueError: shapes that do not fit.
        """
        if x.dim() not in (2, 3) or x.size(-1) != (self.in_features or x.size(-1)):
            raise ValueError(
                f"x has shape {tuple(x.shape)}; allowed: (T, in) or (B, T, in) with in={self.in_features or 'any'}"
            )
        for name, values in (("token_weight", token_weight), ("mask", mask)):
            if values is not None and values.shape != x.shape[:-1]:
                raise ValueError(f"{name} has shape {tuple(values.shape)}; allowed: {tuple(x.shape[:-1])}, that of x")
        dtype = self.dtype or (torch.float64 if x.dtype == torch.float64 else torch.float32)
        valid = _valid_tokens(x, token_weight, mask)
        x = x.to(dtype).masked_fill(~valid[..., None], 0.0)
        if token_weight is not None:
            # The root on both sides keeps H symmetric to the bit.
            x = x * unit_mean(token_weight.to(x.device, torch.float64), valid).sqrt().to(dtype)[..., None]
        x = x.flatten(0, -2)
        found = x.T @ x
        self.in_features, self.dtype = x.size(-1), dtype
        self.total = found if self.total is None else self.total + found
        self.sequences += int(valid.any(-1).sum())

    def merge(self, other: HessianAccumulator) -> None:
        """Add the sums of another accumulator, as of another rank.

        Raises:
            ValueError: another width.
        """
        if other.total is None:
            return
        if self.total is not None and self.total.shape != other.total.shape:
            raise ValueError(f"in_features={other.in_features} cannot be added to in_features={self.in_features}")
        self.total = other.total.clone() if self.total is None else self.total + other.total.to(self.total)
        self.in_features, self.dtype = other.in_features, self.dtype or other.dtype
        self.sequences += other.sequences

    @property
    def hessian(self) -> Tensor:
        """(in, in) H, the mean over sequences of 2 sum_t w_t x_t x_t^T.

        Raises:
            ValueError: no valid token was added.
        """
        if self.total is None or self.sequences == 0:
            raise ValueError("the calibration has no valid token; give at least one sequence with mask 1 somewhere")
        return self.total * (2.0 / self.sequences)


def gptq_quantize(weight: Tensor, hessian: Tensor, spec: QuantSpec) -> QuantizedLinearState:
    """Round a matrix against a Hessian.

    Args:
        weight: (out, in).
        hessian: (in, in), of `HessianAccumulator`; is not changed. Columns with H_jj = 0 are never used: their
            weights become 0.
        spec: bits, groups, damping.

    Returns:
        Codes and scales. Scales of whole rows are those of `round_to_nearest`; scales of groups are found when the
        group is reached, from its updated weights.

    Raises:
        ValueError: shapes that do not fit, groups that do not divide the row, or a Hessian that 49 dampings leave
            without a Cholesky factor.

    Example: weight (-.2, -1), 3 bits: H = [[44.788462, -29.692308], [-29.692308, 20.596154]] gives -1/3, -4/3, and
    H = [[28, -20], [-20, 18]] gives -1/3, -1.
    """
    dtype = _compute_dtype(weight, hessian)
    if weight.dim() != 2 or hessian.shape != (weight.size(1), weight.size(1)):
        raise ValueError(f"weight {tuple(weight.shape)}, hessian {tuple(hessian.shape)}; allowed: (out, in), (in, in)")
    size = spec.columns(weight.size(1))
    work, h = weight.detach().to(dtype, copy=True), hessian.detach().to(weight.device, dtype, copy=True)
    scales = [] if spec.group_size != -1 else [row_scales(work, spec)]
    dead = h.diagonal() == 0
    h.diagonal()[dead] = 1.0
    work[:, dead] = 0.0
    upper, dampings = _inverse_factor(h, spec.percdamp)
    codes = torch.empty_like(work)
    for start, stop in _segments(work.size(1), spec):
        errors = torch.empty_like(work[:, start:stop])
        for i in range(start, stop):
            if i % size == 0 and spec.group_size != -1:
                scales.append(row_scales(work[:, i : i + size], spec))
            scale = scales[i // size][:, 0]
            codes[:, i] = _codes(work[:, i], scale, spec)
            errors[:, i - start] = (work[:, i] - codes[:, i] * scale) / upper[i, i]
            work[:, i:stop] -= errors[:, i - start, None] * upper[i, i:stop]
        work[:, stop:] -= errors @ upper[start:stop, stop:]
    return QuantizedLinearState(codes.to(torch.int8), torch.cat(scales, 1), spec.bits, spec.group_size, dampings)


def round_to_nearest(weight: Tensor, spec: QuantSpec) -> QuantizedLinearState:
    """Round every weight by itself: what GPTQ is without a Hessian.

    Args:
        weight: (out, in).
        spec: bits, groups, clip search.

    Returns:
        Codes and scales.
    """
    if weight.dim() != 2:
        raise ValueError(f"weight {tuple(weight.shape)}; allowed: (out, in)")
    work = weight.detach().to(_compute_dtype(weight))
    size = spec.columns(weight.size(1))
    grouped = work.reshape(-1, size)
    scale = row_scales(grouped, spec)
    codes = _codes(grouped, scale, spec).to(torch.int8).view(work.shape)
    return QuantizedLinearState(codes, scale.view(work.size(0), -1), spec.bits, spec.group_size)


def weighted_error(weight: Tensor, quantised: Tensor | QuantizedLinearState, hessian: Tensor) -> Tensor:
    """tr((W - Q) H (W - Q)^T), a scalar: with H of `HessianAccumulator` twice the mean weighted output error.

    Args:
        weight: (out, in).
        quantised: (out, in), or the state that holds it.
        hessian: (in, in).
    """
    values = quantised.dequantize() if isinstance(quantised, QuantizedLinearState) else quantised
    dtype = _compute_dtype(weight, hessian)
    difference = weight.detach().to(dtype) - values.to(dtype)
    return ((difference @ hessian.to(difference)) * difference).sum()


def row_scales(weight: Tensor, spec: QuantSpec) -> Tensor:
    """(out, 1) scale of each row of (out, in); 1 for a row of zeros."""
    full = weight.abs().amax(1, keepdim=True) / spec.highest
    full = _stored(full, spec)
    if not spec.clip_search:
        return full
    best, least = full, torch.full_like(full, torch.inf)
    for i in range(SHRINKS):
        scale = _stored(weight.abs().amax(1, keepdim=True) * (1 - i / 100) / spec.highest, spec)
        error = (_codes(weight, scale, spec) * scale - weight).abs().pow(CLIP_NORM).sum(1, keepdim=True)
        best, least = torch.where(error < least, scale, best), torch.minimum(error, least)
    return best


def _stored(scale: Tensor, spec: QuantSpec) -> Tensor:
    rounded = scale if spec.scale_dtype is None else scale.to(spec.scale_dtype).to(scale.dtype)
    return rounded.masked_fill(rounded == 0, 1.0)


def _codes(weight: Tensor, scale: Tensor, spec: QuantSpec) -> Tensor:
    return (weight / scale).round().clamp(spec.lowest, spec.highest)


def _segments(in_features: int, spec: QuantSpec) -> Iterator[tuple[int, int]]:
    """Column ranges between two updates of the rest; a group starts only where all earlier columns have been applied
    to the whole of it."""
    size = spec.columns(in_features)
    if size <= spec.block_size:
        step = spec.block_size // size * size
        yield from ((start, min(start + step, in_features)) for start in range(0, in_features, step))
        return
    for group in range(0, in_features, size):
        for start in range(group, group + size, spec.block_size):
            yield start, min(start + spec.block_size, group + size)


def _inverse_factor(hessian: Tensor, percdamp: float) -> tuple[Tensor, int]:
    """Upper Cholesky factor of the inverse of the damped Hessian, and the number of dampings; overwrites `hessian`."""
    damp = percdamp * hessian.diagonal().mean()
    if not bool(hessian.isfinite().all()):
        raise ValueError("the Hessian is not finite; check the calibration inputs of this layer")
    for count in range(1, MAX_DAMPINGS + 1):
        hessian.diagonal().add_(damp)
        lower, failed = torch.linalg.cholesky_ex(hessian)
        if bool(failed):
            continue
        upper, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
        if not bool(failed) and bool(upper.isfinite().all()):
            return upper, count
    raise ValueError(
        f"the Hessian has no Cholesky factor after {MAX_DAMPINGS} dampings of {float(damp):.3g}; raise percdamp "
        f"(now {percdamp}), or accumulate in float64"
    )


def _compute_dtype(*tensors: Tensor) -> torch.dtype:
    return torch.float64 if any(tensor.dtype == torch.float64 for tensor in tensors) else torch.float32


def _valid_tokens(x: Tensor, token_weight: Tensor | None, mask: Tensor | None) -> Tensor:
    if mask is not None:
        return mask.to(x.device).bool()
    if token_weight is not None:
        return token_weight.to(x.device) > 0
    return torch.ones_like(x[..., 0], dtype=torch.bool)
