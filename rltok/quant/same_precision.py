"""The learner computes with the sampler's quantised weights, so that sampler and learner are one policy.

    y = x Q(W)^T + b                      Q of `codes.py`; with LoRA Q(W + sum_a s_a B_a A_a), with DoRA
                                          Q(c (W + s B A)), c = m / ||W + s B A|| per row

    dL/dx = g Q(W),   dL/dW = g^T x       straight-through: Q counts as the identity
    dL/dA = s (g B)^T x,   dL/dB = s g^T (x A^T),   DoRA: g c for g, and dL/dm = sum_rows g * (x (W + s B A)^T) / ||.||

It is the other cure than a weight pi_p / pi_q on the loss (`rltok.correction`): pi_p = pi_q, hence weights of 1, at the
price of a learner whose function is the quantised one. The weights that the optimizer moves stay in full precision.

Memory: a layer saves its input and its parameters, and makes Q(W) again in backward, so that one dequantised weight is
alive at a time. The gradients of A and B go through the low rank, without a matrix of the weight's size. Time: two
quantisations of every layer in a step of the learner, three with gradient checkpointing. An attached policy quantises
anew for every token if it samples itself: sample from the shadow.

What is equal: on the same batch an attached learner gives the logits of a `QuantizedShadow` of it bit for bit, with the
kernels `aten_int8` and `aten_int4` too. Batches of another shape, or decoding with a cache, differ as they do in one
full-precision model, by the order of sums.

Left out: quantised activations and gradients, as of an FP8 training step; of the backends only `fp8_scaled_mm` rounds
the inputs of a layer, straight-through here too.

Sources: Jet-RL arXiv 2601.14243 (one precision in both); straight-through: Bengio et al., arXiv 1308.3432.
"""

from __future__ import annotations

import functools
import types
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from rltok.quant.codes import check_weight, linear, quantize_weight, rounded_input, rounded_weight
from rltok.quant.shadow import MARK, LinearSource, Merge, active_adapters, inner_model, linear_sources, wide
from rltok.quant.spec import RolloutQuantSpec


class AttachedPrecision:
    """Layers of a model that compute with quantised weights, and the way back."""

    def __init__(self, spec: RolloutQuantSpec, modules: dict[str, Any], switch: _Switch) -> None:
        self.spec = spec
        self._modules = modules
        self._switch = switch

    @property
    def layers(self) -> tuple[str, ...]:
        """Their names in the model inside of PEFT; none with `bits=16` and after `remove`."""
        return tuple(self._modules)

    @property
    def calls(self) -> int:
        """Forward passes of single layers with quantised weights so far, those of gradient checkpointing included."""
        return self._switch.calls

    @contextmanager
    def suspended(self) -> Iterator[None]:
        """Full precision inside; a forward pass and its backward pass must lie on the same side."""
        self._switch.suspended += 1
        try:
            yield
        finally:
            self._switch.suspended -= 1

    def remove(self) -> None:
        """Give the layers their own forward back; the model is as it was before, bit for bit."""
        for module in self._modules.values():
            vars(module).pop("forward", None)
            vars(module).pop(MARK, None)
        self._modules = {}


def attach_same_precision(policy: Any, spec: RolloutQuantSpec) -> AttachedPrecision:
    """Let a policy compute with the quantised weights of the `QuantizedShadow` of the same spec, in the same layers.

    Parameters, `state_dict`, saved files and optimizers stay as they are. Attach after adapters were added, before
    data-parallel wrappers and `torch.compile`. A deep copy is attached by itself, to its own weights
    (`attached_precision` finds it); pickling is refused.

    Args:
        policy: a transformers model or a PEFT model around one. LoRA stays unmerged in it; its layers compute with the
            quantised merged weight, without adapters (such as in `disable_adapter`) with the quantised base.
        spec: how weights are quantised; with `bits=16` nothing is attached.

    Warns of the CPU kernels, which are slow with a learner's many rows.

    Raises:
        ValueError: a policy or layer that a `QuantizedShadow` refuses, dropout in an adapter, a layer with a forward of
            its own, a policy that is attached already.
    """
    if attached_precision(policy) is not None:
        raise ValueError("the policy computes with quantised weights already: call remove() of what was attached first")
    sources, switch = linear_sources(policy, spec), _Switch()
    for source in sources:
        _check_source(source, spec)
    if spec.backend in ("aten_int8", "aten_int4") and sources:
        warnings.warn(
            f"backend={spec.backend!r} in the learner: its kernel is made for few rows at a time and makes a learner's "
            "step several times slower; backend='torch' has the same codes and scales",
            stacklevel=2,
        )
    for source in sources:
        module = source.module
        setattr(module, MARK, _Attached(source.name, spec, source.adapted is not None, switch))
        module.forward = types.MethodType(_replacing(type(module).forward), module)
    return AttachedPrecision(spec, {source.name: source.module for source in sources}, switch)


def attached_precision(policy: Any) -> AttachedPrecision | None:
    """What is attached to a policy, such as to the deep copy of one; None without."""
    found = {name: module for name, module in inner_model(policy).named_modules() if MARK in vars(module)}
    if not found:
        return None
    attached: _Attached = vars(next(iter(found.values())))[MARK]
    return AttachedPrecision(attached.spec, found, attached.switch)


@dataclass
class _Switch:
    """What the layers of one model share."""

    suspended: int = 0
    calls: int = 0

    def __deepcopy__(self, memo: dict[int, Any]) -> _Switch:
        return _Switch()

    def __reduce__(self) -> NoReturn:
        raise TypeError("a model that computes with quantised weights cannot be pickled: call remove() before")


@dataclass(frozen=True)
class _Attached:
    """What a layer knows of its precision; it holds no module, so that a deep copy of the layer is whole."""

    name: str
    spec: RolloutQuantSpec
    adapted: bool
    switch: _Switch


@dataclass(frozen=True)
class _Rounding:
    """From the tensors of a layer to its quantised weight."""

    spec: RolloutQuantSpec
    dtype: torch.dtype
    merge: Merge


class _RoundedLinear(torch.autograd.Function):
    """x Q(W)^T + b; the equations of the gradients are at the top of this file."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor | None, rounding: _Rounding, *tensors: Tensor) -> Tensor:
        y = linear(x, quantize_weight(rounding.merge(*tensors), rounding.spec, rounding.dtype), bias)
        learned = any(ctx.needs_input_grad[3:])
        ctx.rounding, ctx.shape, ctx.dtype = rounding, x.shape, x.dtype
        ctx.bias_dtype = None if bias is None else bias.dtype
        ctx.compute = y.dtype if torch.is_autocast_enabled(x.device.type) else rounding.dtype
        ctx.save_for_backward(x if learned else None, *(tensors if learned or ctx.needs_input_grad[0] else ()))
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, *tensors = ctx.saved_tensors
        rounding: _Rounding = ctx.rounding
        needs_x, needs_bias, _, *needs = ctx.needs_input_grad
        grad_x, grad_bias, grads = None, None, [None] * len(needs)
        with torch.autocast(grad.device.type, enabled=False):
            g = grad.reshape(-1, grad.size(-1))
            if needs_bias:
                grad_bias = g.sum(0).to(ctx.bias_dtype)
            g = g.to(ctx.compute)
            if needs_x:
                weight = rounded_weight(rounding.merge(*tensors), rounding.spec, rounding.dtype)
                grad_x = (g @ weight.to(ctx.compute)).view(ctx.shape).to(ctx.dtype)
            if any(needs):
                inputs = rounded_input(x.reshape(-1, x.size(-1)), rounding.spec).to(ctx.compute)
                grads = _parameter_gradients(rounding.merge, g, inputs, tensors, needs)
        return grad_x, grad_bias, None, *grads


def _parameter_gradients(merge: Merge, g: Tensor, x: Tensor, tensors: list[Tensor], needs: list[bool]) -> list[Any]:
    """Gradients of the tensors of a weight, of g (R, N) and x (R, K), as if the weight were x's only factor."""
    grads: list[Any] = [None] * len(tensors)
    base, adapters = tensors[0], tensors[1:]
    outer, factor = g, None
    if merge.dora:
        unscaled = merge.unscaled(*tensors[:-1])
        factor = merge.factor(unscaled, adapters[-1])
        outer = wide(g) * factor
        if needs[-1]:
            norm = torch.linalg.norm(unscaled, dim=1)
            grads[-1] = ((wide(g) * (wide(x) @ unscaled.t())).sum(0) / norm).to(adapters[-1].dtype)
    if needs[0]:
        full = outer.to(g.dtype).t() @ x
        grads[0] = (full.t() if merge.transposed else full).to(base.dtype)
    for index, scaling in enumerate(merge.scalings):
        at = 2 * index
        a, b = wide(adapters[at]), wide(adapters[at + 1])
        if needs[at + 1]:
            grads[at + 1] = (scaling * (wide(outer) @ b).t() @ wide(x)).to(adapters[at].dtype)
        if needs[at + 2]:
            grads[at + 2] = (scaling * wide(outer).t() @ (wide(x) @ a.t())).to(adapters[at + 1].dtype)
    return grads


def _replacing(plain: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The forward of a layer with a mark. It finds the layer in `self` alone: a deep copy is bound to its own."""

    @functools.wraps(plain)
    def forward(self: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        attached: _Attached = vars(self)[MARK]
        if attached.switch.suspended:
            return plain(self, x, *args, **kwargs)
        if args or any(value is not None for value in kwargs.values()):
            raise ValueError(
                f"{attached.name}: {[*map(str, args), *kwargs]} cannot be passed to a layer with a quantised weight; "
                "one adapter serves a whole batch"
            )
        attached.switch.calls += 1
        source = _present_source(self, attached)
        tensors, merge = source.parts()
        rounding = _Rounding(attached.spec, source.dtype, merge)
        y: Tensor = _RoundedLinear.apply(x, source.linear.bias, rounding, *tensors)  # type: ignore[no-untyped-call]
        return y

    return forward


def _present_source(module: Any, attached: _Attached) -> LinearSource:
    """The layer as it is now: adapters may be switched, added, merged and disabled between calls."""
    if not attached.adapted:
        return LinearSource(attached.name, module)
    if module.disable_adapters and module.merged:
        module.unmerge()  # as PEFT does
    if module.training:
        _check_dropout(attached.name, module, active_adapters(module))
    return LinearSource(attached.name, module.get_base_layer(), module)


def _check_source(source: LinearSource, spec: RolloutQuantSpec) -> None:
    try:
        (base, *_), merge = source.parts()
        check_weight(base.t() if merge.transposed else base, spec, source.dtype)
    except ValueError as error:
        raise ValueError(f"{source.name}: {error}") from None
    if source.adapted is not None:
        _check_dropout(source.name, source.adapted, list(source.adapted.lora_dropout))
    for module in {source.module, source.linear}:
        if "forward" in vars(module):
            raise ValueError(f"{source.name} has a forward of its own already: remove it, or add its name to skip")


def _check_dropout(name: str, layer: Any, adapters: list[str]) -> None:
    for adapter in adapters:
        rate = getattr(layer.lora_dropout[adapter], "p", 0.0)
        if rate > 0:
            raise ValueError(
                f"{name}: adapter {adapter!r} has lora_dropout={rate}, and a merged weight cannot drop the adapter's "
                "inputs: set lora_dropout (model.lora.dropout) to 0, or leave the learner in full precision"
            )
