"""Fake quantisers: they compute in full precision what low-bit codes stand for, and can be trained.

Learned steps (LSQ; one per matrix or activation), with code = round(clip(x / alpha + z, Qn, Qp)), z = round(zp):

    x_hat = (code - z) alpha                            z = 0 for weights; round half to even
    dL/dx = g 1[inside]                                 inside: Qn <= x / alpha + z <= Qp
    dL/dalpha = s sum g ((code - z) - 1[inside] x / alpha)
    dL/dzp = s sum g alpha (1[inside] - 1)              s = 1 / sqrt(numel(x) Qp)

Dynamic steps, from the values at hand (torchao's mapping, bit for bit):

    weights       s = max|w| / ((qmax - qmin) / 2) of a row or group, code = clip(round(w (1 / s)), qmin, qmax)
    activations   per token, asymmetric: s = (max - min) / (qmax - qmin), zero included

Widths per token: of two quantisers of an activation, one serves the tokens that attend least to the first token.
`rltok.quant.qat` puts all of it into a model.

Source: arXiv 2402.10787 (EdgeQAT; version 2 is called Squat) and its code. Different here: tokens are chosen per
sequence, by softmax probabilities, the first valid one stays high; padding enters no statistic; a step cannot turn
negative. Left out: a kernel. In torch all of this is slower than full precision, and every token is quantised at both
widths.

Legend: B rows, T tokens, H heads, D size of a head or of the model.
"""

from __future__ import annotations

from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.functional import linear

from rltok.reduce import ONE_RANK, Reducer

OFF = 32
"""bits of a quantiser that does nothing"""
MIN_STEP = 1e-8
"""smallest step; a learned one that falls below, or turns negative, acts as max(|alpha|, this)"""
SIGNED_BELOW = -1e-5
"""an activation with a smaller value than this gets signed codes"""

Method = Literal["lsq", "dynamic"]


# Learned steps


def code_range(bits: int, signed: bool = True) -> tuple[int, int]:
    """Smallest and largest code: (-2^(b-1), 2^(b-1) - 1) if signed, else (0, 2^b - 1).

    Raises:
        ValueError: bits outside of 2..8.
    """
    if not 2 <= bits <= 8:
        raise ValueError(f"bits={bits}; allowed: 2 to 8, or {OFF} for no quantisation")
    return (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if signed else (0, 2**bits - 1)


def initial_weight_step(weight: Tensor, bits: int) -> Tensor:
    """alpha = 2 mean|W| / sqrt(Qp), a scalar.

    Example: (0.3, -0.1, 0.9, -1.2) at 4 bits gives 0.472456.
    """
    return 2 * weight.detach().to(wide(weight)).abs().mean() / code_range(bits)[1] ** 0.5


def initial_activation_step(
    x: Tensor, bits: int, mask: Tensor | None = None, reducer: Reducer = ONE_RANK
) -> tuple[Tensor, Tensor, Tensor]:
    """Step, zero point and signedness of an activation from its first batch.

        signed = min x < -1e-5,  alpha = 2 mean|x| / sqrt(Qp),  zp = 0.1 (min x - alpha Qn)

    Args:
        x: any shape.
        bits: 2 to 8.
        mask: broadcasts to x, True where x counts; None: everywhere.
        reducer: makes the statistics those of all ranks; each calls it once for sums and once for maxima.

    Returns:
        alpha, zp and signed, scalars; signed is bool.

    Raises:
        ValueError: no value counts on any rank, or bits out of range.

    Example: (0.5, -1, 2) at 8 bits gives 0.207050, 2.550238, True.
    """
    code_range(bits)
    x = x.detach().to(wide(x))
    kept = torch.ones_like(x, dtype=torch.bool) if mask is None else mask.expand_as(x)
    total, count = reducer.sum(torch.stack([torch.where(kept, x.abs(), 0.0).sum(), kept.sum().to(x.dtype)]))
    if not bool(count):
        raise ValueError("no valid token in the first batch of a fake quantiser; its attention mask is 0 on all ranks")
    masked = torch.where(kept, -x, -torch.inf)
    lowest = -reducer.max(masked.amax()[None] if x.numel() else x.new_full((1,), -torch.inf))[0]
    signed = lowest < SIGNED_BELOW
    low, high = _signed_range(bits, signed, x.dtype)
    alpha = 2 * (total / count) / high.sqrt()
    return alpha, 0.1 * (lowest - alpha * low), signed


def fake_quantize_weight(weight: Tensor, alpha: Tensor, bits: int) -> Tensor:
    """W_hat = alpha round(clip(W / alpha, Qn, Qp)), gradients as in the module's docstring.

    Args:
        weight: any shape.
        alpha: one element; below 1e-8 in size it counts as 1e-8, negative as its size.
        bits: 2 to 8; 32 returns `weight` itself.

    Returns:
        The shape and dtype of `weight`.

    Example: (0.3, -0.1, 0.9, -1.2), alpha 0.472456, 4 bits: (0.472456, 0, 0.944911, -1.417367).
    """
    if bits == OFF:
        return weight
    low, high = code_range(bits)
    return cast(Tensor, _LearnedStep.apply(weight, alpha, None, low, high, weight.numel()))


def fake_quantize_activation(
    x: Tensor,
    alpha: Tensor,
    zp: Tensor,
    bits: int,
    signed: Tensor | bool = True,
    elements: Tensor | int | None = None,
) -> Tensor:
    """x_hat = (round(clip(x / alpha + z, Qn, Qp)) - z) alpha, z = round(zp), gradients as in the module's docstring.

    Args:
        x: any shape.
        alpha, zp: one element each.
        bits: 2 to 8; 32 returns `x` itself.
        signed: codes of both signs, or none below 0.
        elements: numel(x) in the scale of the gradients of alpha and zp; None: that of `x`.

    Returns:
        The shape and dtype of `x`.

    Example: (0.5, -1, 2), alpha 0.207050, zp 2.550238, 8 bits: (0.414100, -1.035249, 2.070499).
    """
    if bits == OFF:
        return x
    low, high = _signed_range(bits, torch.as_tensor(signed, device=x.device), wide(x))
    return cast(Tensor, _LearnedStep.apply(x, alpha, zp, low, high, x.numel() if elements is None else elements))


class _LearnedStep(torch.autograd.Function):
    """The learned step in both directions; codes are formed again in the backward pass."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, alpha: Tensor, zp: Tensor | None, low: Any, high: Any, elements: Tensor | int
    ) -> Tensor:
        ctx.save_for_backward(x, alpha, zp)
        ctx.settings = low, high, elements
        step, zero, _, code = _codes(x, alpha, zp, low, high)
        return ((code - zero) * step).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, alpha, zp = ctx.saved_tensors
        low, high, elements = ctx.settings
        step, zero, position, code = _codes(x, alpha, zp, low, high)
        inside = ((position >= low) & (position <= high)).to(step.dtype)
        wide = grad.to(step.dtype)
        scale = 1 / torch.as_tensor(elements * high, dtype=step.dtype, device=x.device).clamp(min=1).sqrt()
        slope = wide * ((code - zero) - inside * (x.to(step.dtype) / step))
        sign = torch.where(alpha < 0, -1.0, 1.0).to(step.dtype)  # the step is |alpha|; at 0 it may grow
        grad_alpha = (scale * slope.sum() * sign).to(alpha.dtype).view_as(alpha)
        grad_zp = None
        if zp is not None:
            grad_zp = (scale * (wide * step * (inside - 1)).sum()).to(zp.dtype).view_as(zp)
        return (wide * inside).to(x.dtype), grad_alpha, grad_zp, None, None, None


def _codes(
    x: Tensor, alpha: Tensor, zp: Tensor | None, low: Any, high: Any
) -> tuple[Tensor, Tensor | float, Tensor, Tensor]:
    """Step, zero point, unclipped position and code, at least in float32."""
    step = alpha.detach().to(wide(x)).reshape(()).abs().clamp(min=MIN_STEP)
    zero: Tensor | float = 0.0 if zp is None else zp.detach().to(step.dtype).reshape(()).round()
    position = x.detach().to(step.dtype) / step + zero
    return step, zero, position, position.clamp(low, high).round()


class _Remembered(nn.Module):
    """A module that sets its parameters once, from the first values it sees; the state dict says whether it did."""

    init_state: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("init_state", torch.tensor(False))
        self._known = False

    @property
    def initialised(self) -> bool:
        """Whether the step was set; the buffer is read once only, since reading waits for the device."""
        self._known = self._known or bool(self.init_state)
        return self._known

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._known = False


class FakeQuantWeight(_Remembered):
    """A learned step of one matrix, set at the first forward pass. `bits=32` returns the weight itself."""

    def __init__(self, bits: int = 4, device: Any = None, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.bits = bits
        if bits != OFF:
            code_range(bits)
            self.alpha = nn.Parameter(torch.ones(1, device=device, dtype=dtype))
            self.init_state = self.init_state.to(device)

    def forward(self, weight: Tensor) -> Tensor:
        """(R, C) -> (R, C)."""
        if self.bits == OFF:
            return weight
        if not self.initialised:
            with torch.no_grad():
                self.alpha.copy_(initial_weight_step(weight, self.bits))
                self.init_state.fill_(True)
        return fake_quantize_weight(weight, self.alpha, self.bits)

    def extra_repr(self) -> str:
        return f"bits={self.bits}"


class FakeQuantActivation(_Remembered):
    """A learned step and zero point of one activation, set by the first batch in training mode.

    `bits=32` returns the activation itself. Buffers `init_state` and `signed` are part of the state dict.
    """

    signed: Tensor

    def __init__(
        self, bits: int = 8, reducer: Reducer = ONE_RANK, device: Any = None, dtype: torch.dtype = torch.float32
    ) -> None:
        super().__init__()
        self.bits = bits
        self.reducer = reducer
        if bits != OFF:
            code_range(bits)
            self.alpha = nn.Parameter(torch.ones(1, device=device, dtype=dtype))
            self.zp = nn.Parameter(torch.zeros(1, device=device, dtype=dtype))
            self.init_state = self.init_state.to(device)
            self.register_buffer("signed", torch.tensor(True, device=device))

    def forward(self, x: Tensor, mask: Tensor | None = None, repeats: int = 1) -> Tensor:
        """Fake-quantise an activation.

        Args:
            x: any shape.
            mask: broadcasts to x, True where x counts in the first batch and in numel(x); None: everywhere.
            repeats: times that x will be repeated (keys that several heads share), a factor of numel(x).

        Raises:
            ValueError: not initialised and not in training mode.
        """
        if self.bits == OFF:
            return x
        if not self.initialised:
            self._initialise(x, mask)
        count = x.numel() if mask is None else mask.sum() * (x.numel() // mask.numel())
        return fake_quantize_activation(x, self.alpha, self.zp, self.bits, self.signed, count * repeats)

    def _initialise(self, x: Tensor, mask: Tensor | None) -> None:
        if not self.training:
            raise ValueError(
                "an activation's fake quantiser has no step yet: run `calibrate_qat`, a forward pass in training mode, "
                "or load a trained state before evaluating"
            )
        with torch.no_grad():
            alpha, zp, signed = initial_activation_step(x, self.bits, mask, self.reducer)
            self.alpha.copy_(alpha)
            self.zp.copy_(zp)
            self.signed.copy_(signed)
            self.init_state.fill_(True)

    def extra_repr(self) -> str:
        return f"bits={self.bits}"


# Dynamic steps


def symmetric_codes(weight: Tensor, bits: int, group_size: int | None = None) -> tuple[Tensor, Tensor]:
    """Symmetric codes of each row or group.

        s = max|w| / ((qmax - qmin) / 2),  code = clip(round(w (1 / s)), qmin, qmax)

    The product with the reciprocal and the divisor (7.5 at 4 bits, not 7) are torchao's; the largest element lies on a
    tie, where w / s would round the other way.

    Args:
        weight: (R, C).
        bits: 2 to 8.
        group_size: columns that share a scale, a divisor of C; None: the whole row.

    Returns:
        (R, C) int8 codes and (R, C / group_size) scales in float32 (float64 for float64 weights).

    Raises:
        ValueError: a weight that is not a matrix, a group size that does not divide C, or bits out of range.

    Example: (0.3, -0.1, 0.9, -1.2) in float32 at 4 bits: scale 0.16, codes (2, -1, 6, -7).
    """
    code, scale, _ = _row_codes(weight.detach(), bits, group_size)
    return code.reshape(weight.shape).to(torch.int8), scale[..., 0]


def fake_quantize_rows(weight: Tensor, bits: int, group_size: int | None = None) -> Tensor:
    """Weights that their symmetric codes stand for; gradient g where nothing clips, 0 elsewhere.

    Args:
        weight, bits, group_size: as for `symmetric_codes`; bits 32 returns `weight` itself.

    Returns:
        The shape and dtype of `weight`; bit-equal to torchao's fake quantisation per channel or per group.

    Example: (0.3, -0.1, 0.9, -1.2) in float32: 4 bits (0.32, -0.16, 0.96, -1.12), 8 bits (0.301176, -0.103529,
    0.903529, -1.195294).
    """
    if bits == OFF:
        return weight
    code, scale, kind = _row_codes(weight, bits, group_size)
    return (code.to(kind) * scale).to(kind).reshape(weight.shape)


def fake_quantize_tokens(x: Tensor, bits: int = 8) -> Tensor:
    """Activations that asymmetric codes with a step and a zero point per token stand for; gradient as for weights.

        s = (max - min) / (qmax - qmin), 0 in the range;  z = clip(qmin - round(min / s))
        code = clip(round(x (1 / s)) + z)

    Args:
        x: (..., D), one token per row.
        bits: 2 to 8; 32 returns `x` itself.

    Returns:
        The shape and dtype of `x`; bit-equal to torchao's fake quantisation per token.

    Example: (1, -2, 0.5, 3) at 8 bits in float32: (1, -2, 0.509804, 3).
    """
    if bits == OFF:
        return x
    low, high = code_range(bits)
    with torch.no_grad():
        smallest = x.amin(-1, keepdim=True).clamp(max=0)
        largest = x.amax(-1, keepdim=True).clamp(min=0)
        scale = ((largest - smallest) / float(high - low)).clamp(min=torch.finfo(x.dtype).smallest_normal)
        zero = (low - (smallest / scale).round()).clamp(low, high)
        scale = scale.to(wide(x))
    code = torch.clamp(_Round.apply(x * (1.0 / scale)) + zero, low, high)
    return ((code.to(x.dtype) - zero.to(x.dtype)) * scale).to(x.dtype)


def _row_codes(weight: Tensor, bits: int, group_size: int | None) -> tuple[Tensor, Tensor, torch.dtype]:
    """(R, n, g) codes with a straight-through gradient, (R, n, 1) scales, and the dtype of the weight."""
    low, high = code_range(bits)
    if weight.dim() != 2:
        raise ValueError(f"weight {tuple(weight.shape)}; allowed: a matrix (R, C)")
    size = weight.size(1) if group_size is None else group_size
    if size < 1 or weight.size(1) % size:
        raise ValueError(f"group_size={size} does not divide the {weight.size(1)} columns of {tuple(weight.shape)}")
    grouped = weight.reshape(weight.size(0), -1, size)
    with torch.no_grad():
        largest = grouped.abs().amax(-1, keepdim=True)
        scale = (largest / (float(high - low) / 2)).clamp(min=torch.finfo(weight.dtype).smallest_normal)
        scale = scale.to(wide(weight))
    return torch.clamp(_Round.apply(grouped * (1.0 / scale)), low, high), scale, weight.dtype


class _Round(torch.autograd.Function):
    """round with the gradient of the identity."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.round()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad


class DynamicFakeQuantWeight(nn.Module):
    """Symmetric codes per row or group, scales from the weight itself; nothing is learned."""

    def __init__(self, bits: int = 4, group_size: int | None = None) -> None:
        super().__init__()
        self.bits, self.group_size = bits, group_size
        if bits != OFF:
            code_range(bits)

    def forward(self, weight: Tensor) -> Tensor:
        """(R, C) -> (R, C)."""
        return fake_quantize_rows(weight, self.bits, self.group_size)

    def extra_repr(self) -> str:
        return f"bits={self.bits}, group_size={self.group_size}"


class DynamicFakeQuantActivation(nn.Module):
    """Asymmetric codes per token, scales from the activation itself; nothing is learned."""

    def __init__(self, bits: int = 8) -> None:
        super().__init__()
        self.bits = bits
        if bits != OFF:
            code_range(bits)

    def forward(self, x: Tensor, mask: Tensor | None = None, repeats: int = 1) -> Tensor:
        """(..., D) -> (..., D); mask and repeats change nothing."""
        return fake_quantize_tokens(x, self.bits)

    def extra_repr(self) -> str:
        return f"bits={self.bits}"


class FakeQuantLinear(nn.Linear):
    """A linear layer with fake-quantised weight and, if asked for, input; learned steps unless `adopt` gives others."""

    weight_fake_quantizer: nn.Module | None
    activation_fake_quantizer: nn.Module | None
    plain: bool = False
    """compute as if no quantiser were there"""
    kept: Tensor | None = None
    """quantised weight to compute with, so that it is not formed again at every call; None: form it"""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        weight_bits: int = 4,
        activation_bits: int = OFF,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(in_features, out_features, bias, device, dtype)
        kind = wide(self.weight)
        self.weight_fake_quantizer = FakeQuantWeight(weight_bits, device, kind)
        self.activation_fake_quantizer = FakeQuantActivation(activation_bits, device=device, dtype=kind)

    @classmethod
    def adopt(
        cls, module: nn.Linear, weight: nn.Module | None = None, activation: nn.Module | None = None
    ) -> FakeQuantLinear:
        """Turn a linear layer into one with quantisers, in place: parameters, hooks and references to it stay valid.

        Args:
            module: the layer.
            weight, activation: modules that fake-quantise weight and input; None: as they are.

        Raises:
            ValueError: a subclass of `nn.Linear`, whose forward pass is its own.
        """
        if type(module) is not nn.Linear:
            raise ValueError(f"{type(module).__name__} cannot be fake-quantised; allowed: torch.nn.Linear itself")
        module.__class__ = cls
        adopted = cast(FakeQuantLinear, module)
        adopted.weight_fake_quantizer, adopted.activation_fake_quantizer = weight, activation
        adopted.train(module.training)
        return adopted

    def release(self) -> nn.Linear:
        """The plain layer again, in place, with the weight as it is."""
        del self.weight_fake_quantizer, self.activation_fake_quantizer
        for name in ("plain", "kept"):
            vars(self).pop(name, None)
        self.__class__ = nn.Linear  # type: ignore[assignment]
        return self

    def quantised_weight(self) -> Tensor:
        """(out, in) weight that the layer computes with."""
        if self.kept is not None:
            return self.kept
        return self.weight if self.weight_fake_quantizer is None else self.weight_fake_quantizer(self.weight)

    def forward(self, input: Tensor) -> Tensor:
        """(..., in) -> (..., out)."""
        if self.plain:
            return linear(input, self.weight, self.bias)
        if self.activation_fake_quantizer is not None:
            input = self.activation_fake_quantizer(input)
        return linear(input, self.quantised_weight(), self.bias)


# Widths per token


def low_width_tokens(scores: Tensor, mask: Tensor, share: float, first_high: bool = True) -> Tensor:
    """Tokens of each sequence that get the low width: the int(share n) least important of its n valid ones.

    Args:
        scores: (B, T) importance, the attention a token pays to the first one, summed over heads.
        mask: (B, T) 1 at valid tokens.
        share: 0 to 1; 0 is the high width for all.
        first_high: the first valid token stays high whatever its score. Softmax probabilities of a causal model give
            it the largest score anyway, 1 per head.

    Returns:
        (B, T) bool, False at padding. Of equal scores the earlier token is low.

    Raises:
        ValueError: a share out of range, or shapes that differ.

    Example: scores (0.1, 0.9, 0.4, -0.3), share 0.5: tokens 2 and 3, and 0 and 3 with `first_high=False`.
    """
    if not 0 <= share <= 1:
        raise ValueError(f"share={share}; allowed: 0..1")
    if scores.dim() != 2 or scores.shape != mask.shape:
        raise ValueError(f"scores {tuple(scores.shape)} and mask {tuple(mask.shape)}; allowed: (B, T) both")
    valid = mask.bool()
    count = (valid.sum(1).double() * share).floor().long()  # (B,)
    candidates = valid & ~(valid & (valid.cumsum(1) == 1)) if first_high else valid
    order = scores.detach().masked_fill(~candidates, torch.inf).argsort(dim=1, stable=True)
    places = torch.arange(scores.size(1), device=scores.device).expand_as(order)
    rank = torch.empty_like(order).scatter_(1, order, places)
    return (rank < count[:, None]) & candidates


def first_token_attention(
    query: Tensor, key: Tensor, mask: Tensor, scaling: float | None = None, block: int = 128
) -> Tensor:
    """Attention of every token to the first valid one of its row, summed over heads.

    Args:
        query, key: (B, H, T, D) and (B, Hkv, T, D), H a multiple of Hkv.
        mask: (B, T) 1 at valid tokens.
        scaling: factor of the scores; None: 1 / sqrt(D).
        block: query rows at once; memory and speed only.

    Returns:
        (B, T) in 0..H, causal softmax over valid keys; 0 at padding. No gradient.
    """
    valid = mask.bool()
    rows, heads, width, size = query.shape
    factor = size**-0.5 if scaling is None else scaling
    first = valid.long().argmax(1)
    found = torch.zeros(rows, width, device=query.device, dtype=wide(query))
    with torch.no_grad():
        index = torch.arange(width, device=query.device)
        for start in range(0, width, block):
            stop = min(start + block, width)
            scores = grouped_scores(query[:, :, start:stop], key[:, :, :stop]).to(found.dtype) * factor
            seen = valid[:, None, :stop] & (index[:stop] <= index[start:stop, None])
            weights = scores.masked_fill(~seen[:, None], torch.finfo(found.dtype).min).softmax(-1)
            at = first.clamp(max=stop - 1).view(-1, 1, 1, 1).expand(-1, heads, stop - start, 1)
            found[:, start:stop] = weights.gather(-1, at)[..., 0].sum(1)
    return found.masked_fill(~valid, 0.0)


def mix_by_token(high: Tensor, low: Tensor, low_tokens: Tensor) -> Tensor:
    """`low` at the low tokens, `high` elsewhere; a new tensor, so both keep their gradients.

    Args:
        high, low: (B, T, D) or (B, H, T, D).
        low_tokens: (B, T) bool.
    """
    if high.dim() not in (3, 4) or tuple(low_tokens.shape) != (high.size(0), high.size(-2)):
        raise ValueError(f"widths of {tuple(low_tokens.shape)} tokens do not fit {tuple(high.shape)}")
    return torch.where(low_tokens[:, None, :, None] if high.dim() == 4 else low_tokens[..., None], low, high)


class TokenMixedFakeQuant(nn.Module):
    """Two fake quantisers of an activation, chosen by token; without `low` it is `high` alone.

    Each learns from all tokens of the first batch, and then from those that it serves.
    """

    def __init__(self, high: nn.Module, low: nn.Module | None = None) -> None:
        super().__init__()
        self.high, self.low = high, low

    def forward(
        self, x: Tensor, low_tokens: Tensor | None = None, mask: Tensor | None = None, repeats: int = 1
    ) -> Tensor:
        """(B, T, D) or (B, H, T, D) -> the same; `low_tokens` (B, T) bool, None: all tokens are high."""
        high = self.high(x, mask, repeats)
        if self.low is None:
            return high
        low = self.low(x, mask, repeats)
        return high if low_tokens is None else mix_by_token(high, low, low_tokens)


def grouped_scores(query: Tensor, key: Tensor) -> Tensor:
    """(B, H, T, S) products; the queries of a key head side by side, so that keys are not repeated."""
    rows, heads, width, size = query.shape
    packed = query.reshape(rows, key.size(1), -1, size)
    return (packed @ key.transpose(-1, -2)).view(rows, heads, width, key.size(2))


def _signed_range(bits: int, signed: Tensor, kind: torch.dtype) -> tuple[Tensor, Tensor]:
    """Smallest and largest code as tensors: signedness is known on the device only."""
    (low, high), (zero, top) = code_range(bits), code_range(bits, signed=False)
    return torch.where(signed, low, zero).to(kind), torch.where(signed, high, top).to(kind)


def wide(x: Tensor) -> torch.dtype:
    """The dtype of sums over `x`: at least float32."""
    return torch.promote_types(x.dtype, torch.float32)
