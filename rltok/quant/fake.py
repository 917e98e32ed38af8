"""Fake quantisation: a model that computes in full precision what its low-bit copy would compute, and can be trained.

Learned steps (LSQ; one per matrix or activation), with code = round(clip(x / alpha + z, Qn, Qp)), z = round(zp):

    x_hat = (code - z) alpha                            z = 0 for weights; round half to even
    dL/dx = g 1[inside]                                 inside: Qn <= x / alpha + z <= Qp
    dL/dalpha = s sum g ((code - z) - 1[inside] x / alpha)
    dL/dzp = s sum g alpha (1[inside] - 1)              s = 1 / sqrt(numel(x) Qp)

Dynamic steps, from the values at hand (torchao's mapping, bit for bit):

    weights       s = max|w| / ((qmax - qmin) / 2) of a row or group, code = clip(round(w (1 / s)), qmin, qmax)
    activations   per token, asymmetric: s = (max - min) / (qmax - qmin), zero included

`prepare_qat` places them in a causal LM of transformers: attention input, queries and keys after rotary, softmax
probabilities, values, MLP input, the product before down_proj, and the weights of all linears of the layers. The input
of o_proj, embeddings, norms and lm_head stay as they are. With `low_share`, the tokens that the first token receives
least attention from get `low_bits`: at once for the values and the MLP, in the next layer for its input, queries, keys.

Source: arXiv 2402.10787 (EdgeQAT; version 2 is called Squat) and its code. Different here: tokens are chosen per
sequence, by softmax probabilities, the first valid one stays high; padding enters no statistic; a step cannot turn
negative; what causal attention does not see stays 0 whatever the zero point. Left out: a kernel. In torch all of this
is slower than full precision, and every token is quantised at both widths.

Legend: B rows, T tokens, H heads, D size of a head or of the model.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.functional import dropout as drop
from torch.nn.functional import linear
from transformers import PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from rltok.attention.probe import AttentionCall, language_model, probeable_layers, probing, text_config
from rltok.quant.qat_losses import QueryKey
from rltok.reduce import ONE_RANK, Reducer

OFF = 32
"""bits of a quantiser that does nothing"""
MIN_STEP = 1e-8
"""smallest step; a learned one that falls below, or turns negative, acts as max(|alpha|, this)"""
SIGNED_BELOW = -1e-5
"""an activation with a smaller value than this gets signed codes"""
SERVED = "sdpa"
"""the attention implementation that a prepared model must use"""
ATTENTION_INPUTS = ("q_proj", "k_proj", "v_proj", "qkv_proj")
MLP_INPUTS = ("gate_proj", "up_proj", "gate_up_proj")
PRODUCTS = ("down_proj",)
PLAIN_INPUTS = ("o_proj",)
KNOWN_LINEARS = ATTENTION_INPUTS + MLP_INPUTS + PRODUCTS + PLAIN_INPUTS
UNKNOWN_TERMS = ("position_bias", "softcap", "s_aux", "sliding_window")
"""arguments of attention functions that change the scores in ways that are not quantised here"""

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
    return 2 * weight.detach().to(_wide(weight)).abs().mean() / code_range(bits)[1] ** 0.5


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
    x = x.detach().to(_wide(x))
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
    low, high = _signed_range(bits, torch.as_tensor(signed, device=x.device), _wide(x))
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
    step = alpha.detach().to(_wide(x)).reshape(()).abs().clamp(min=MIN_STEP)
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
        scale = scale.to(_wide(x))
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
        scale = scale.to(_wide(weight))
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
        kind = _wide(self.weight)
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
        self.__class__ = nn.Linear  # type: ignore[assignment]
        return self

    def quantised_weight(self) -> Tensor:
        """(out, in) weight that the layer computes with."""
        return self.weight if self.weight_fake_quantizer is None else self.weight_fake_quantizer(self.weight)

    def forward(self, input: Tensor) -> Tensor:
        """(..., in) -> (..., out)."""
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
    found = torch.zeros(rows, width, device=query.device, dtype=_wide(query))
    with torch.no_grad():
        index = torch.arange(width, device=query.device)
        for start in range(0, width, block):
            stop = min(start + block, width)
            scores = _grouped_scores(query[:, :, start:stop], key[:, :, :stop]).to(found.dtype) * factor
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


def _grouped_scores(query: Tensor, key: Tensor) -> Tensor:
    """(B, H, T, S) products; the queries of a key head side by side, so that keys are not repeated."""
    rows, heads, width, size = query.shape
    packed = query.reshape(rows, key.size(1), -1, size)
    return (packed @ key.transpose(-1, -2)).view(rows, heads, width, key.size(2))


def _signed_range(bits: int, signed: Tensor, kind: torch.dtype) -> tuple[Tensor, Tensor]:
    """Smallest and largest code as tensors: signedness is known on the device only."""
    (low, high), (zero, top) = code_range(bits), code_range(bits, signed=False)
    return torch.where(signed, low, zero).to(kind), torch.where(signed, high, top).to(kind)


def _wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


# A model with quantisers in place


@dataclass(frozen=True)
class QATSpec:
    """What is fake-quantised, and how finely."""

    weight_bits: int = 4
    """2 to 8; 32: weights stay as they are"""
    activation_bits: int = 8
    """2 to 8; 32: activations stay as they are"""
    low_bits: int = 4
    """activation bits of the tokens that matter least"""
    low_share: float = 0.0
    """share of those tokens, 0 to 1; 0: all tokens have `activation_bits`. The source uses 0.5"""
    weight: Method = "lsq"
    """one learned step per matrix, or dynamic ones per row or group"""
    activation: Method = "lsq"
    """one learned step per activation, or dynamic ones per token (better above 1B parameters)"""
    group_size: int | None = None
    """columns per step of dynamic weights; None: one step per row"""
    probabilities: bool = True
    """softmax probabilities too, for which whole (T, T) maps are formed; False keeps the kernel"""
    skip: tuple[str, ...] = ("lm_head", "embed_tokens")
    """linears with one of these as a part of their name stay as they are"""

    def __post_init__(self) -> None:
        for name in ("weight_bits", "activation_bits", "low_bits"):
            bits = getattr(self, name)
            if bits != OFF and not 2 <= bits <= 8:
                raise ValueError(f"{name}={bits}; allowed: 2 to 8, or {OFF} for no quantisation")
        for name in ("weight", "activation"):
            if getattr(self, name) not in ("lsq", "dynamic"):
                raise ValueError(f"{name}={getattr(self, name)!r}; allowed: lsq, dynamic")
        if not 0 <= self.low_share <= 1:
            raise ValueError(f"low_share={self.low_share}; allowed: 0..1")
        if self.low_share and self.activation_bits == OFF:
            raise ValueError(f"low_share={self.low_share} needs quantised activations; set activation_bits to 2..8")
        if self.group_size is not None and (self.group_size < 1 or self.weight != "dynamic"):
            raise ValueError(f"group_size={self.group_size} needs weight='dynamic' and must be >= 1; or leave it out")


@dataclass(eq=False)
class QATState:
    """What the quantisers of one prepared model share."""

    spec: QATSpec
    mask: Tensor | None = None
    """(B, T) bool, valid tokens of the forward pass at hand; None: all are"""
    low: dict[int, Tensor] = field(default_factory=dict)
    """layer -> (B, T) bool, its low tokens in the forward pass at hand"""
    collected: dict[int, QueryKey] | None = None
    """layer -> quantised queries and keys, while `collecting` is open"""
    handles: list[Any] = field(default_factory=list)

    def valid(self, tokens: int) -> Tensor | None:
        """(B, tokens) bool of the newest tokens."""
        return None if self.mask is None else self.mask[:, -tokens:]


class _Site(TokenMixedFakeQuant):
    """One place of a model: finds the mask and the widths of its tokens in the shared state."""

    def __init__(self, state: QATState, source: int, reducer: Reducer, like: Tensor) -> None:
        spec = state.spec
        low = _activation_quantiser(spec, spec.low_bits, reducer, like) if spec.low_share > 0 and source >= 0 else None
        super().__init__(_activation_quantiser(spec, spec.activation_bits, reducer, like), low)
        self.state = state
        self.source = source
        """layer whose attention chose the widths; -1: none, all tokens are high"""

    def forward(self, x: Tensor, repeats: int = 1) -> Tensor:  # type: ignore[override]
        mask = self.state.valid(x.size(-2))
        if mask is not None:
            mask = mask[:, None, :, None] if x.dim() == 4 else mask[..., None]
        low = None if self.low is None else self.state.low[self.source]
        return super().forward(x, low, mask, repeats)


class AttentionFakeQuant(nn.Module):
    """The quantisers of one attention layer; the attention function finds them here, also in a copy of the model."""

    def __init__(self, state: QATState, layer: int, reducer: Reducer, like: Tensor) -> None:
        super().__init__()
        self.state, self.layer = state, layer
        self.busy = False
        """a call is under way: a second wrapper beneath ours, put there while others came and went, passes it on"""
        self.input = _Site(state, layer - 1, reducer, like)
        self.query = _Site(state, layer - 1, reducer, like)
        self.key = _Site(state, layer - 1, reducer, like)
        self.value = _Site(state, layer, reducer, like)
        bits = state.spec.activation_bits
        active = state.spec.probabilities and bits != OFF
        self.probabilities = _activation_quantiser(state.spec, bits, reducer, like) if active else None
        _install(self)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        _install(self)

    def attend(
        self,
        original: Callable[..., Any],
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Any,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        """One call of the attention function, queries and keys after rotary."""
        self.busy = True
        try:
            return self._attend(original, module, query, key, value, attention_mask, *args, **kwargs)
        finally:
            self.busy = False

    def _attend(
        self,
        original: Callable[..., Any],
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Any,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        options = dict(zip(("dropout", "scaling", "is_causal", "position_bias"), args, strict=False)) | kwargs
        _check_call(module, query, key, options, self.state.spec)
        scaling = query.size(-1) ** -0.5 if options.get("scaling") is None else float(options["scaling"])
        query = self.query(query)
        key = self.key(key, repeats=query.size(1) // key.size(1))
        if self.state.collected is not None:
            self.state.collected[self.layer] = QueryKey(query, key, scaling)
        if self.state.spec.low_share > 0:
            self.state.low[self.layer] = self._low_tokens(query, key, scaling)
        value = self.value(value)
        if self.probabilities is None:
            return original(module, query, key, value, attention_mask, *args, **kwargs)
        rate = float(options.get("dropout") or 0.0)
        return self._quantised_attention(query, key, value, attention_mask, scaling, rate), None

    def _low_tokens(self, query: Tensor, key: Tensor, scaling: float) -> Tensor:
        mask = self.state.valid(query.size(2))
        if mask is None:
            mask = torch.ones(query.size(0), query.size(2), dtype=torch.bool, device=query.device)
        scores = first_token_attention(query.detach(), key.detach(), mask, scaling)
        return low_width_tokens(scores, mask, self.state.spec.low_share)

    def _quantised_attention(
        self, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, scaling: float, rate: float
    ) -> Tensor:
        """(B, T, H, D) attention with quantised probabilities, whole maps at once."""
        assert self.probabilities is not None
        kind = _wide(query)
        scores = _grouped_scores(query, key).to(kind) * scaling
        seen = _visible(attention_mask, query.size(2), key.size(2), query.device)
        if isinstance(attention_mask, Tensor) and attention_mask.dtype != torch.bool:
            scores = scores + attention_mask
        weights = scores.masked_fill(~seen, torch.finfo(kind).min).softmax(-1).to(query.dtype)
        mask = None
        if self.state.mask is not None:
            mask = self.state.mask[:, None, -query.size(2) :, None] & self.state.mask[:, None, None, : key.size(2)]
        # A zero point below -0.5 would give weight to what must not be seen.
        weights = self.probabilities(weights, mask).masked_fill(~seen, 0.0)
        weights = drop(weights, rate, training=rate > 0)
        rows, heads, width, _ = query.shape
        packed = weights.reshape(rows, key.size(1), -1, key.size(2))
        return (packed @ value).reshape(rows, heads, width, -1).transpose(1, 2).contiguous()


class MLPFakeQuant(nn.Module):
    """The quantiser of an MLP's input."""

    def __init__(self, state: QATState, layer: int, reducer: Reducer, like: Tensor) -> None:
        super().__init__()
        self.input = _Site(state, layer, reducer, like)


def prepare_qat(model: nn.Module, spec: QATSpec | None = None, reducer: Reducer = ONE_RANK) -> nn.Module:
    """Put fake quantisers into a causal LM, in place, so that training knows its low-bit copy.

    Weights stay in full precision and keep their names; steps are new parameters, so prepare before the optimizer is
    built and before PEFT, DDP or FSDP wrap the model. Steps of activations are set by the first batch in training mode,
    or by `calibrate_qat`, which must come first where parameters are sharded: what a sharded forward pass writes into
    a parameter is lost. All bits 32 is the plain model, bit for bit.

    With `low_share` a forward pass must see whole sequences, one per row: whether a token is low depends on later
    ones. Calls with a cache are refused then, and so are packed rows. With gradient checkpointing each forward pass
    must be followed by its own backward pass, since layers that run again take their widths from the latest one.

    Args:
        model: a causal LM of transformers with sdpa attention (Llama, Qwen2, Qwen3, Mistral and others with the same
            names of linears).
        spec: what to quantise; None: 4-bit weights and 8-bit activations.
        reducer: makes the first statistics of activations those of all ranks.

    Returns:
        `model`.

    Raises:
        ValueError: a prepared model, another attention implementation, attention that is not a softmax over causal
            keys, or a linear whose place is not known.

    Source: arXiv 2402.10787; placement as in its Llama code.
    """
    state = QATState(QATSpec() if spec is None else spec)
    core = language_model(model)
    if any(isinstance(module, AttentionFakeQuant) for module in core.modules()):
        raise ValueError("the model is prepared already; call remove_qat first")
    attention = _attention_modules(core)
    linears = _linears(core, state.spec)
    mlps = {name.rpartition(".")[0] for name in linears if name.rpartition(".")[2] in MLP_INPUTS}
    layers = {name: _layer_of(name, attention) for name in linears}
    for name, module in linears.items():
        product = name.rpartition(".")[2] in PRODUCTS
        site = _Site(state, layers[name], reducer, module.weight) if product else None
        FakeQuantLinear.adopt(module, _weight_quantiser(state.spec, module), site)
    for layer in attention.values():
        quantisers = AttentionFakeQuant(state, cast(int, layer.layer_idx), reducer, next(layer.parameters()))
        layer.fake_quant = quantisers.train(layer.training)
        state.handles.append(layer.register_forward_pre_hook(_quantise_input, with_kwargs=True))
    for name in sorted(mlps):
        mlp = core.get_submodule(name)
        mlp.fake_quant = MLPFakeQuant(state, _layer_of(name, attention), reducer, next(mlp.parameters()))
        mlp.fake_quant.train(mlp.training)
        state.handles.append(mlp.register_forward_pre_hook(_quantise_input, with_kwargs=True))
    body = core.base_model  # called by the head's model, and directly by those who want hidden states
    state.handles.append(body.register_forward_pre_hook(partial(_note_mask, state), with_kwargs=True))
    return model


def convert(model: nn.Module) -> nn.Module:
    """Write the fake-quantised weights into the model, in place, and fix the steps of activations.

    The converted model computes what the prepared one computes in eval mode, bit for bit. Full-precision weights are
    gone afterwards. Quantisers of activations stay, without gradients: they are part of what was trained.

    Returns:
        `model`.

    Raises:
        ValueError: a model that is not prepared.
    """
    qat_state(model)
    for module in list(model.modules()):
        if isinstance(module, FakeQuantLinear):
            with torch.no_grad():
                module.weight.copy_(module.quantised_weight())
            module.weight_fake_quantizer = None
            if module.activation_fake_quantizer is None:
                module.release()
    for module in model.modules():
        if isinstance(module, (FakeQuantActivation, FakeQuantWeight)):
            module.requires_grad_(False)
    return model


def remove_qat(model: nn.Module) -> nn.Module:
    """Take all fake quantisers out, in place; the model computes with its weights as they are.

    Returns:
        `model`.

    Raises:
        ValueError: a model that is not prepared.
    """
    state = qat_state(model)
    for handle in state.handles:
        handle.remove()
    state.handles.clear()
    for module in list(model.modules()):
        if isinstance(module, FakeQuantLinear):
            module.release()
        found = module._modules.get("fake_quant")
        if isinstance(found, (AttentionFakeQuant, MLPFakeQuant)):
            del module.fake_quant
        if isinstance(found, AttentionFakeQuant):
            _LIVE.discard(found)
    _release()
    return model


def qat_state(model: nn.Module) -> QATState:
    """What the quantisers of a prepared model share.

    Raises:
        ValueError: a model that is not prepared.
    """
    for module in model.modules():
        if isinstance(module, AttentionFakeQuant):
            return module.state
    raise ValueError(f"{type(model).__name__} is not prepared; call prepare_qat first")


def calibrate_qat(model: nn.Module, **inputs: Any) -> None:
    """Set the steps that are not set yet, by one forward pass without gradient or dropout.

    Args:
        model: prepared.
        inputs: what the model is called with, such as `input_ids` and `attention_mask`; every rank its own.

    Raises:
        ValueError: a model that is not prepared.
    """
    qat_state(model)
    before = {module: module.training for module in model.modules()}
    model.eval()
    try:
        for module in model.modules():
            if isinstance(module, (FakeQuantActivation, FakeQuantWeight)):
                module.training = True
        with torch.no_grad():
            model(**inputs, use_cache=False)
    finally:
        for module, training in before.items():
            module.training = training


@contextmanager
def collecting(model: nn.Module) -> Iterator[dict[int, QueryKey]]:
    """Layer -> quantised queries and keys of the latest forward pass inside the context, with their gradients.

    Close it before the backward pass: layers that gradient checkpointing runs again would report again.
    """
    state = qat_state(model)
    found: dict[int, QueryKey] = {}
    state.collected = found
    try:
        yield found
    finally:
        state.collected = None


@contextmanager
def collecting_teacher(model: nn.Module) -> Iterator[dict[int, QueryKey]]:
    """Layer -> queries and keys after rotary of a plain model, the teacher, without gradients."""
    found: dict[int, QueryKey] = {}

    def keep(call: AttentionCall) -> None:
        found[call.layer] = QueryKey(call.query, call.key, call.scaling)

    with probing(model, range(text_config(language_model(model)).num_hidden_layers), keep):
        yield found


def _activation_quantiser(spec: QATSpec, bits: int, reducer: Reducer, like: Tensor) -> nn.Module:
    """One quantiser, on the device of the layer's parameters; its step is never in half precision."""
    if spec.activation == "dynamic":
        return DynamicFakeQuantActivation(bits)
    return FakeQuantActivation(bits, reducer, like.device, _wide(like))


def _weight_quantiser(spec: QATSpec, module: nn.Linear) -> nn.Module:
    if spec.weight == "lsq":
        return FakeQuantWeight(spec.weight_bits, module.weight.device, _wide(module.weight))
    if spec.group_size is not None and module.in_features % spec.group_size:
        raise ValueError(f"group_size={spec.group_size} does not divide the {module.in_features} inputs of a linear")
    return DynamicFakeQuantWeight(spec.weight_bits, spec.group_size)


def _attention_modules(core: PreTrainedModel) -> dict[str, nn.Module]:
    """Name -> attention module, one per layer, after what the configuration reveals was checked."""
    config = text_config(core)
    kind = type(core).__name__
    if config._attn_implementation != SERVED:
        raise ValueError(
            f"attn_implementation={config._attn_implementation!r} cannot be quantised; allowed: {SERVED!r}"
        )
    if config is not core.config:
        raise ValueError(f"{kind} takes more than text, whose attention is not known here")
    probeable_layers(core, range(config.num_hidden_layers))
    types = sorted(set(getattr(config, "layer_types", None) or ()) - {"full_attention", "attention"})
    if types or (getattr(config, "layer_types", None) is None and getattr(config, "sliding_window", None) is not None):
        raise ValueError(f"{kind} has layers of type {types or ['sliding_attention']}; allowed: full attention only")
    found = {
        name: module
        for name, module in core.named_modules()
        if isinstance(getattr(module, "layer_idx", None), int) and hasattr(module, "is_causal")
    }
    if sorted(cast(int, module.layer_idx) for module in found.values()) != list(range(config.num_hidden_layers)):
        raise ValueError(f"{kind}: {len(found)} attention modules for {config.num_hidden_layers} layers; one per layer")
    return found


def _linears(core: nn.Module, spec: QATSpec) -> dict[str, nn.Linear]:
    """Name -> linear to quantise."""
    found = {
        name: module
        for name, module in core.named_modules()
        if isinstance(module, nn.Linear) and not set(name.split(".")) & set(spec.skip)
    }
    for name, module in found.items():
        if name.rpartition(".")[2] not in KNOWN_LINEARS:
            raise ValueError(
                f"the place of linear {name!r} is not known; known names: {', '.join(KNOWN_LINEARS)}. Prepare before "
                f"PEFT wraps the model, or add the name to skip (now {spec.skip})"
            )
        if type(module) is not nn.Linear:
            raise ValueError(f"{name} is a {type(module).__name__}; allowed: torch.nn.Linear itself, or add it to skip")
    if not found:
        raise ValueError(f"no linear is left to quantise; skip={spec.skip}")
    return found


def _layer_of(name: str, attention: dict[str, nn.Module]) -> int:
    """The layer of a module, by the attention module beside it."""
    for beside, module in attention.items():
        if name == beside or name.startswith(beside.rpartition(".")[0] + "."):
            return cast(int, module.layer_idx)
    raise ValueError(f"{name} lies in no decoder layer; add it to skip")


def _quantise_input(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
    """In front of an attention module or an MLP."""
    site = cast(AttentionFakeQuant | MLPFakeQuant, module.fake_quant).input
    if args:
        return (site(args[0]), *args[1:]), kwargs
    return args, kwargs | {"hidden_states": site(kwargs["hidden_states"])}


def _note_mask(state: QATState, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """In front of the body: which tokens are valid."""
    mask = kwargs.get("attention_mask", args[1] if len(args) > 1 else None)
    state.mask = mask.bool() if isinstance(mask, Tensor) and mask.dim() == 2 else None
    state.low.clear()
    positions = kwargs.get("position_ids")
    if state.spec.low_share == 0 or state.mask is not None or not isinstance(positions, Tensor):
        return
    if bool((positions.diff(dim=-1) != 1).any()):
        raise ValueError(
            f"low_share={state.spec.low_share} chooses tokens of one sequence per row; these rows are packed. Train "
            "without packing, or set low_share to 0"
        )


def _check_call(module: nn.Module, query: Tensor, key: Tensor, options: dict[str, Any], spec: QATSpec) -> None:
    """Refuse what only a call reveals."""
    for name in UNKNOWN_TERMS:
        if options.get(name) is not None:
            raise ValueError(f"{type(module).__name__} attends with {name}, which is not quantised here")
    causal = options.get("is_causal")
    if not (getattr(module, "is_causal", True) if causal is None else causal):
        raise ValueError(f"{type(module).__name__} is bidirectional (is_causal=False); allowed: causal attention")
    if spec.low_share > 0 and query.size(2) != key.size(2):
        raise ValueError(
            f"low_share={spec.low_share} needs whole sequences, this call has {query.size(2)} queries of {key.size(2)} "
            "tokens; generate with use_cache=False, or sample with low_share=0"
        )


def _visible(mask: Any, queries: int, keys: int, device: torch.device) -> Tensor:
    """Bool tensor that broadcasts to (B, H, T, S): the key may be seen."""
    if isinstance(mask, Tensor):
        return mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2
    index = torch.arange(keys, device=device)
    return index <= index[keys - queries :, None]


_LIVE: weakref.WeakSet[AttentionFakeQuant] = weakref.WeakSet()


class _Wrapper:
    """Stands in for the attention function while any model is prepared; calls of others pass through."""

    def __init__(self, original: Callable[..., Any]) -> None:
        self.original = original

    def __call__(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        found = module._modules.get("fake_quant")
        if isinstance(found, AttentionFakeQuant) and not found.busy:
            return found.attend(self.original, module, *args, **kwargs)
        return self.original(module, *args, **kwargs)


def _install(quantisers: AttentionFakeQuant) -> None:
    """Count a layer's quantisers, and put a wrapper in place unless one is there."""
    _LIVE.add(quantisers)
    current = ALL_ATTENTION_FUNCTIONS[SERVED]
    if not isinstance(current, _Wrapper):
        ALL_ATTENTION_FUNCTIONS[SERVED] = _Wrapper(current)


def _release() -> None:
    """Take the wrapper away with the last quantisers; one that something else wraps by now stays and does nothing."""
    current = ALL_ATTENTION_FUNCTIONS[SERVED]
    if _LIVE or not isinstance(current, _Wrapper):
        return
    del ALL_ATTENTION_FUNCTIONS[SERVED]
    if ALL_ATTENTION_FUNCTIONS[SERVED] is not current.original:  # another local entry was there before
        ALL_ATTENTION_FUNCTIONS[SERVED] = current.original
