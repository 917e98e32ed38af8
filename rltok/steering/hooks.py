"""A steering vector added to the hidden states of decoder layers, at unchanged length.

    h'  = h + strength v
    h'' = h' ||h|| / (||h'|| + 1e-8)

h is the output of a decoder layer at one position, norms are over its d features. The hooks act on every position,
prompt and padding included: padded positions are hidden from the others by the attention mask, and the rule is per
position, so what they hold changes nothing. The computation is float32 whatever the model's type.

Steered prompts make steered keys and values: a cache of prefixes must not be shared with requests that are not steered.
Decoding that runs captured graphs or compiled code may pass the hooks by; use eager forward passes.
Source: arXiv 2507.18043. Its released code takes the norm over positions per feature, which in cached decoding leaves
sign(h') |h|; ours is the paper's norm per token. vLLM's layers hand on hidden states and residual apart; their sum is
steered (`steered_modules`).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from rltok.attention.probe import language_model, text_config

EPS = 1e-8
"""Added to the norm that is divided by."""

_STEERED: WeakSet[nn.Module] = WeakSet()
"""Layers that have a steering hook now."""


@dataclass(frozen=True, eq=False)
class SteeringVector:
    """A direction for the hidden states of one decoder layer."""

    layer: int
    """index of the layer whose output is moved, from 0"""
    vector: Tensor
    """(d,)"""
    strength: float
    """factor of the vector; 0 is off"""
    normalize: bool = True
    """keep the length of the hidden states"""

    def __post_init__(self) -> None:
        if isinstance(self.layer, bool) or not isinstance(self.layer, int) or self.layer < 0:
            raise ValueError(f"layer={self.layer!r} must be the index of a decoder layer, from 0")
        if self.vector.dim() != 1 or not self.vector.is_floating_point() or not self.vector.isfinite().all():
            shape = f"shape {tuple(self.vector.shape)} and type {self.vector.dtype}"
            raise ValueError(
                f"the vector of layer {self.layer} has {shape}; allowed: (d,) finite floating-point numbers"
            )
        if not math.isfinite(self.strength):
            raise ValueError(f"strength={self.strength} of layer {self.layer} must be finite; 0 is off")


def steer(h: Tensor, v: Tensor, strength: float, normalize: bool = True) -> Tensor:
    """Hidden states moved along `v`, at their old length.

    Example: h = (3, 4), strength v = (4, 0) gives (7, 4) scaled to length 5: (4.341216, 2.480695).

    Args:
        h: (..., d).
        v: (d,).
        strength: factor of `v`; 0 returns `h` itself.
        normalize: False leaves the sum as it is.

    Returns:
        (..., d) of the dtype of `h`.

    Raises:
        ValueError: a vector of another size.
    """
    if strength == 0:
        return h
    if v.dim() != 1 or v.numel() != h.size(-1):
        raise ValueError(f"v has shape {tuple(v.shape)}; allowed: ({h.size(-1)},), the size of the hidden states")
    moved, _ = _moved(h, strength * _at_least_float32(v.detach().to(h.device)), normalize)
    return moved


def _at_least_float32(values: Tensor) -> Tensor:
    return values.float() if values.dtype in (torch.float16, torch.bfloat16) else values


def _moved(h: Tensor, shift: Tensor, normalize: bool) -> tuple[Tensor, Tensor]:
    """h'' of the dtype of `h`, and (...) norms of `h`."""
    wide = _at_least_float32(h)
    moved = wide + shift.to(wide.dtype)
    norm = wide.norm(dim=-1, keepdim=True)
    if normalize:
        moved = moved * (norm / (moved.norm(dim=-1, keepdim=True) + EPS))
    return moved.to(h.dtype), norm.squeeze(-1)


def decoder_layers(model: nn.Module) -> nn.ModuleList:
    """The decoder layers of the language model inside PEFT or other wrappers, in order.

    Raises:
        ValueError: there is no list of as many modules as the configuration has layers.
    """
    core = language_model(model)
    return layer_list(core.get_decoder(), text_config(core).num_hidden_layers)


def layer_list(module: nn.Module, expected: int) -> nn.ModuleList:
    """The outermost list of `expected` modules inside a module.

    Raises:
        ValueError: there is none.
    """
    lists = [(name, m) for name, m in module.named_modules() if isinstance(m, nn.ModuleList) and len(m) == expected]
    if not lists:
        raise ValueError(f"{type(module).__name__} has no list of {expected} decoder layers, so it cannot be steered")
    return min(lists, key=lambda pair: pair[0].count("."))[1]  # lists inside a layer, such as experts, lie deeper


def steered_layers(model: nn.Module) -> tuple[int, ...]:
    """Indices of the layers that are being steered."""
    if not _STEERED:
        return ()
    return tuple(index for index, layer in enumerate(decoder_layers(model)) if layer in _STEERED)


class Steering:
    """What a `steered` block did, to read in or after it."""

    def __init__(self) -> None:
        self._sums: dict[int, Tensor] = {}  # layer -> (2,) sum over positions of 1 / ||h||, and their number
        self._sizes: dict[int, float] = {}  # layer -> ||strength v||

    def metrics(self) -> dict[str, float]:
        """`steering/shift`: mean of ||h' - h|| / ||h|| over the steered positions.

        Padding counts, except where its hidden state is 0, as that of some models is. With several layers also
        `steering/shift_layer_<l>`. Empty where nothing was steered. Waits for the device.
        """
        shifts = {}
        for layer, sums in self._sums.items():
            total, count = sums.tolist()
            shifts[layer] = self._sizes[layer] * total / max(count, 1.0)
        if not shifts:
            return {}
        found = {"steering/shift": sum(shifts.values()) / len(shifts)}
        if len(shifts) > 1:
            found |= {f"steering/shift_layer_{layer}": shift for layer, shift in sorted(shifts.items())}
        return found

    def _register(
        self, layer: int, module: nn.Module, vector: SteeringVector, splits_residual: bool
    ) -> RemovableHandle:
        device = next((p.device for p in module.parameters()), vector.vector.device)
        shifts = {device: vector.strength * _at_least_float32(vector.vector.detach()).to(device)}
        self._sizes[layer] = float(shifts[device].norm())

        def hook(_: nn.Module, __: Any, output: Any) -> Any:
            hidden = output[0] if isinstance(output, tuple) else output
            if splits_residual:
                hidden = hidden + output[1]
            if not isinstance(hidden, Tensor) or not hidden.is_floating_point():
                raise TypeError(
                    f"layer {layer} returns {type(hidden).__name__}, not hidden states: it cannot be steered"
                )
            if hidden.device not in shifts:
                shifts[hidden.device] = shifts[device].to(hidden.device)
            moved, norm = _moved(hidden, shifts[hidden.device], vector.normalize)
            self._add(layer, norm.detach())
            if splits_residual:
                return (moved - output[1], *output[1:])
            return (moved, *output[1:]) if isinstance(output, tuple) else moved

        return module.register_forward_hook(hook)

    def _add(self, layer: int, norm: Tensor) -> None:
        counted = norm > EPS
        inverse = torch.where(counted, norm, torch.ones_like(norm)).reciprocal() * counted
        sums = torch.stack([inverse.sum(), counted.sum().to(norm.dtype)])
        known = self._sums.get(layer)
        self._sums[layer] = sums if known is None else known + sums.to(known.device)


@contextmanager
def steered(model: nn.Module, vectors: Sequence[SteeringVector]) -> Iterator[Steering]:
    """Steer the model's forward passes inside the block; the hooks are gone afterwards, also on errors.

    Works for `generate` with left padding, with a cache, and for teacher-forced passes, which then give the
    log-probabilities of what was sampled. No vectors, or all of strength 0, put no hook anywhere. The model's training
    pass does not belong inside.

    Args:
        model: a causal language model, PEFT and other wrappers included.
        vectors: at most one per layer.

    Yields:
        `Steering`, whose `metrics()` tell how strongly the hidden states were moved.

    Raises:
        ValueError: a layer that the model does not have, that has two vectors or that is steered already; a vector of
            another size than the hidden states.
    """
    check_fit(model, vectors)
    with steered_modules(decoder_layers(model), vectors) as state:
        yield state


@contextmanager
def steered_modules(
    layers: nn.ModuleList, vectors: Sequence[SteeringVector], splits_residual: bool = False
) -> Iterator[Steering]:
    """`steered` for a list of decoder layers.

    Args:
        layers: all decoder layers, in order.
        vectors: those of strength 0 put no hook anywhere.
        splits_residual: a layer returns (hidden, residual), of which the sum is steered, as vLLM's do.

    Raises:
        ValueError: a layer that is steered already.
    """
    active = [vector for vector in vectors if vector.strength != 0]
    state = Steering()
    taken = [vector.layer for vector in active if layers[vector.layer] in _STEERED]
    if taken:
        raise ValueError(f"layers {taken} are steered already: pass all vectors to one `steered` block")
    handles: list[RemovableHandle] = []
    try:
        for vector in active:
            handles.append(state._register(vector.layer, layers[vector.layer], vector, splits_residual))
            _STEERED.add(layers[vector.layer])
        yield state
    finally:
        for handle in handles:
            handle.remove()
        for vector in active:
            _STEERED.discard(layers[vector.layer])


def check_fit(model: nn.Module, vectors: Sequence[SteeringVector]) -> None:
    """Raise ValueError for vectors that do not fit the model."""
    config = text_config(language_model(model))
    n_layers, size = config.num_hidden_layers, config.hidden_size
    seen: set[int] = set()
    for vector in vectors:
        if vector.layer >= n_layers:
            raise ValueError(f"a vector is for layer {vector.layer}; the model has layers 0 to {n_layers - 1}")
        if vector.vector.numel() != size:
            raise ValueError(
                f"the vector of layer {vector.layer} has size {vector.vector.numel()}; the model's hidden size: {size}"
            )
        if vector.layer in seen:
            raise ValueError(f"layer {vector.layer} has two vectors: keep one, or add them up")
        seen.add(vector.layer)
