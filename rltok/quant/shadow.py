"""A quantised copy of a policy that samples in its place.

The copy is a second tree of modules. Embeddings, norms, biases, routers and the output head are the policy's own
parameters, hence always current; the linear layers of the decoder hold low-precision codes (`codes.py`), which `sync`
refreshes in place when the policy has moved. The policy is never written to, and nothing of the copy is in its
`state_dict`, its optimizer or its checkpoints.

Of a policy with LoRA the merged weight is quantised, W + sum_a s_a B_a A_a, or with DoRA m (W + s B A) / ||W + s B A||
per row, formed layer by layer in float32 beside the base: the sampler is Q(W + s B A), not Q(W) + s B A.

Noise on the gains of RMSNorm layers (QeRL): w + Z, Z ~ N(0, sigma^2), in the copy alone, drawn at every `sync` around
the policy's present gain.

What the copy does not take over: observers of the policy (forward hooks other than those of transformers and TRL), its
training mode, and wrappers around a module's own forward such as autocast; sample inside `torch.autocast` where the
policy does.

Sources: FlashRL (low-precision rollouts), QeRL arXiv 2510.11696 and its code (noise).
"""

from __future__ import annotations

import copy
import inspect
import time
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from rltok.quant.codes import QuantState, dequantize, linear, quantize_weight, refresh, state_bytes
from rltok.quant.spec import RolloutQuantSpec

KEPT_HOOKS = ("transformers", "trl")
"""Packages whose forward hooks belong to what a model computes; those of others observe the policy."""
BNB = ("Linear4bit", "Linear8bitLt")


@dataclass(frozen=True)
class SyncFacts:
    """What a sync did, and what the copy is."""

    seconds: float
    """wall time"""
    refreshed: int
    """layers whose weight had moved (or all, if forced)"""
    layers: int
    """quantised layers"""
    changed: float
    """share of all codes that changed, 0 to 1"""
    nbytes: int
    """memory of codes, scales and noisy gains"""
    replaced_nbytes: int
    """memory of the policy's weights that they stand for"""
    noise: float
    """standard deviation of the noise on the gains"""


class QuantLinear(nn.Module):
    """A linear layer with a quantised weight and the policy's bias."""

    def __init__(self, state: QuantState, bias: nn.Parameter | None) -> None:
        super().__init__()
        self.state = state
        self.out_features, self.in_features = state.shape
        self.bias = bias
        self.train(False)

    @property
    def weight(self) -> Tensor:
        """(N, K) dequantised weight, made for every call."""
        return dequantize(self.state)

    def forward(self, x: Tensor) -> Tensor:
        """(..., K) -> (..., N)."""
        return linear(x, self.state, self.bias)

    def extra_repr(self) -> str:
        """Shape and bits."""
        return f"in_features={self.in_features}, out_features={self.out_features}, bits={self.state.spec.bits}"


class QuantizedShadow:
    """The quantised copy of a policy.

    `module` is a transformers model for `generate_rows`, `generate` or a forward pass under `torch.no_grad`; its
    parameters are the policy's, so it must not be moved, cast, trained or loaded into. With `bits=16` nothing is
    quantised: the same logits as the policy's, bit for bit, and a sync without noise does nothing.
    """

    def __init__(self, policy: Any, spec: RolloutQuantSpec, linear_types: tuple[type[nn.Linear], ...] = ()) -> None:
        """Quantise a policy.

        Args:
            policy: a transformers model or a PEFT model around one, outside of data-parallel wrappers and
                `torch.compile`. LoRA stays unmerged in it.
            spec: how weights are quantised.
            linear_types: subclasses of `nn.Linear` whose own forward is that of a linear layer with quantised weights,
                and may be replaced.

        Raises:
            ValueError: a policy that it does not serve: sharded (ZeRO-3, FSDP), offloaded or already quantised
                weights, adapters other than LoRA and DoRA, experts in one tensor, a forward of its own; no layer to
                quantise.
        """
        _check_policy(policy)
        self.spec = spec
        self._base = _inner(policy)
        self._sources = [] if spec.bits == 16 else _find_sources(self._base, spec, linear_types)
        if spec.bits != 16 and not self._sources:
            raise ValueError(f"skip={list(spec.skip)} leaves no linear layer to quantise: shorten it, or set bits=16")
        started = time.perf_counter()
        self._layers = {source.name: _quantized(source, spec) for source in self._sources}
        self._marks = {source.name: source.mark() for source in self._sources}
        self.module: Any = _twin(self._base, {source.name: self._layers[source.name] for source in self._sources})
        self._gains: dict[str, nn.Parameter] = {}
        self._noise = 0.0
        self.last = self._facts(started, len(self._layers), 0.0)

    @torch.no_grad()
    def sync(self, force: bool = False, noise: float = 0.0, seed: int | None = None) -> SyncFacts:
        """Refresh what has moved in the policy; equal to a new shadow of it, in the same buffers.

        A layer has moved if the address, version or a checksum of its parameters changed: fused optimizers and writes
        through `.data` do not raise the version, so it alone would miss them.

        Args:
            force: refresh every layer.
            noise: standard deviation on the gains of RMSNorm layers, drawn anew around their present values; 0: none.
            seed: of the noise; the same on all ranks that are to sample alike.

        Raises:
            ValueError: noise below 0 or without a seed, or no RMSNorm layer for it; a policy whose layers were replaced
                since the shadow was made, such as by adapters.
        """
        started = time.perf_counter()
        self._check_modules()
        moved = [source for source in self._sources if force or self._marks[source.name].moved(source)]
        changed = sum(self._refresh(source) for source in moved)
        self._share()
        self._perturb(noise, seed)
        self.last = self._facts(started, len(moved), changed)
        return self.last

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """transformers' `generate` of `module`, which is not synced first."""
        return self.module.generate(*args, **kwargs)

    @property
    def layers(self) -> dict[str, QuantLinear]:
        """Quantised layers by their name in the model inside of PEFT."""
        return dict(self._layers)

    def _check_modules(self) -> None:
        for source in self._sources:
            expected = source.linear if source.adapted is None else source.adapted
            if self._base.get_submodule(source.name) is not expected:
                raise ValueError(f"{source.name} of the policy was replaced since the shadow was made: make a new one")

    def _refresh(self, source: _Source) -> float:
        """Codes of one layer that changed."""
        layer, weight = self._layers[source.name], source.weight()
        count = layer.in_features * layer.out_features
        self._marks[source.name] = source.mark()
        if weight.device != layer.state.codes.device or source.dtype != layer.state.dtype:
            layer.state = quantize_weight(weight, self.spec, source.dtype)  # the policy was moved or cast
            return float(count)
        return refresh(layer.state, weight) * count

    def _share(self) -> None:
        """Give the copy the policy's present tensors, also where they were replaced by others."""
        inside = tuple(f"{name}." for name in self._layers)
        for name, module in self._base.named_modules():
            if name not in self._layers and not name.startswith(inside):
                twin = self.module.get_submodule(name)
                twin._parameters.update(module._parameters)
                twin._buffers.update(module._buffers)
        for source in self._sources:
            self._layers[source.name].bias = source.linear.bias

    def _perturb(self, noise: float, seed: int | None) -> None:
        if not noise >= 0:
            raise ValueError(f"noise={noise} is a standard deviation: set 0 (none) or above")
        self._noise = noise
        if not noise:
            return
        if seed is None:
            raise ValueError(f"noise={noise} needs a seed, or ranks and repeated runs would differ")
        gains = {name: module.weight for name, module in self._base.named_modules() if is_rms_norm(module)}
        if not gains:
            raise ValueError(f"noise={noise}: the policy has no RMSNorm layer with a gain; set noise to 0")
        generator = torch.Generator().manual_seed(seed)
        for name, clean in gains.items():
            drawn = torch.randn(clean.shape, generator=generator)
            noisy = (clean.float() + noise * drawn.to(clean.device)).to(clean.dtype)
            held = self._gains.get(name)
            if held is None or held.dtype != clean.dtype or held.device != clean.device:
                held = self._gains[name] = nn.Parameter(noisy.clone(), requires_grad=False)
            held.data.copy_(noisy)
            self.module.get_submodule(name)._parameters["weight"] = held

    def _facts(self, started: float, refreshed: int, changed: float) -> SyncFacts:
        count = sum(layer.in_features * layer.out_features for layer in self._layers.values())
        held = sum(state_bytes(layer.state) for layer in self._layers.values())
        return SyncFacts(
            seconds=time.perf_counter() - started,
            refreshed=refreshed,
            layers=len(self._layers),
            changed=changed / max(count, 1),
            nbytes=held + sum(gain.nbytes for gain in self._gains.values()),
            replaced_nbytes=sum(source.linear.weight.nbytes for source in self._sources),
            noise=self._noise,
        )


def noise_sigma(
    stage: int,
    stages: int = 10,
    start: float = 1e-2,
    end: float = 1e-4,
    form: Literal["code", "paper"] = "code",
) -> float:
    """Standard deviation of QeRL's noise in a stage of training; 0 in stage 0.

        code    start (end / start)^((stage - 1) / (stages - 2))     stages 1 .. stages - 1, from start to end
        paper   start (end / start)^((stage - 1) / (stages - 1))     stages 1 .. stages (eq. 8)

    Raises:
        ValueError: a stage, number of stages, bound or form that is not allowed.

    Example: 10 stages from 1e-2 to 1e-4: stage 1 has 1e-2, stage 5 has 1e-3, stage 9 has 1e-4.
    """
    least = {"code": 3, "paper": 2}
    if form not in least:
        raise ValueError(f"form={form!r} is unknown; allowed: 'code', 'paper'")
    if stages < least[form]:
        raise ValueError(f"stages={stages}: form={form!r} needs at least {least[form]}")
    last = stages - 1 if form == "code" else stages
    if not 0 <= stage <= last:
        raise ValueError(f"stage={stage} is not in 0..{last} (stages={stages}, form={form!r})")
    if not 0 < end <= start:
        raise ValueError(f"start={start}, end={end}: allowed is 0 < end <= start")
    return 0.0 if stage == 0 else start * (end / start) ** ((stage - 1) / (last - 1))


def noise_stage(step: int, total_steps: int, stages: int = 10) -> int:
    """Stage 0 .. stages - 1 of a training step: stages of equal length, the last one also for later steps.

    Raises:
        ValueError: a step below 0, or no steps or stages.
    """
    if step < 0 or total_steps < 1 or stages < 1:
        raise ValueError(f"step={step}, total_steps={total_steps}, stages={stages}: allowed are >= 0, >= 1, >= 1")
    return min(step * stages // total_steps, stages - 1)


def is_rms_norm(module: nn.Module) -> bool:
    """Whether a module is an RMSNorm layer with a gain, of torch or of any transformers model."""
    weight = module._parameters.get("weight")
    return "RMSNorm" in type(module).__name__ and weight is not None and weight.dim() == 1


@dataclass(frozen=True)
class _Source:
    """A linear layer of the policy."""

    name: str
    linear: Any
    """the layer itself, inside of LoRA"""
    adapted: Any = None
    """PEFT's layer around it"""

    @property
    def dtype(self) -> torch.dtype:
        dtype: torch.dtype = self.linear.weight.dtype
        return dtype

    def weight(self) -> Tensor:
        """(N, K) present weight; in float32 with LoRA."""
        weight: Tensor = self.linear.weight.detach()
        if self.adapted is not None:
            weight = merged_weight(self.adapted)
        return weight.t() if _is_conv1d(self.linear) else weight

    def parts(self) -> tuple[list[Tensor], object]:
        """What the weight is made of: tensors, and settings of the adapters."""
        layer = self.adapted
        if layer is None:
            return [self.linear.weight], None
        names = _adapters(layer)
        modules = [part[name] for name in names for part in (layer.lora_A, layer.lora_B)]
        modules += [layer.lora_magnitude_vector[name] for name in names if name in layer.lora_magnitude_vector]
        settings = (tuple(names), tuple(layer.scaling[name] for name in names))
        return [self.linear.weight, *(module.weight for module in modules)], settings

    def mark(self) -> _Mark:
        tensors, settings = self.parts()
        return _Mark(settings, [_version(tensor) for tensor in tensors], [checksum(tensor) for tensor in tensors])


@dataclass(frozen=True)
class _Mark:
    """How the parts of a weight looked when it was quantised."""

    settings: object
    versions: list[object]
    sums: list[Tensor]

    def moved(self, source: _Source) -> bool:
        """Whether they look different now."""
        tensors, settings = source.parts()
        if settings != self.settings or [_version(tensor) for tensor in tensors] != self.versions:
            return True
        return not all(torch.equal(checksum(tensor), old) for tensor, old in zip(tensors, self.sums, strict=True))


def checksum(tensor: Tensor) -> Tensor:
    """Sums of the bits of a tensor along its first dimension, as integers: they differ where the values do.

    Two different tensors have the same sums only where changes cancel in every column.
    """
    flat = tensor.detach().contiguous()
    flat = flat[None] if flat.dim() == 1 else flat.flatten(1)
    width, offset = flat.size(1) * flat.element_size(), flat.storage_offset() * flat.element_size()
    for kind in (torch.int64, torch.int32, torch.int16, torch.int8):
        if width % kind.itemsize == 0 and offset % kind.itemsize == 0:
            return flat.view(kind).sum(0)
    raise AssertionError("every width is a multiple of a byte")


@torch.no_grad()
def merged_weight(layer: Any) -> Tensor:
    """The weight that a LoRA or DoRA layer of PEFT computes with, float32, of the base weight's shape.

    The layer is not changed. Inactive, disabled and already merged adapters add nothing.

    Raises:
        ValueError: a variant of LoRA other than DoRA, DoRA with a second adapter, a bias in the adapter.
    """
    weight: Tensor = layer.get_base_layer().weight.detach().float()
    names = _adapters(layer)
    for name in names:
        variant = type(layer.lora_variant[name]).__name__ if name in layer.lora_variant else None
        if variant not in (None, "DoraLinearVariant") or (variant and len(names) > 1):
            raise ValueError(
                f"adapters {names} with {variant}: allowed are LoRA adapters, or one with DoRA; merge it into the base "
                "before training, or sample in full precision (bits=16)"
            )
        if layer.lora_bias.get(name):
            raise ValueError(f"adapter {name!r} has lora_bias=True, which is not supported: set it to False")
        delta = layer.lora_B[name].weight.float() @ layer.lora_A[name].weight.float() * layer.scaling[name]
        if variant is None:
            weight = weight + (delta.t() if layer.fan_in_fan_out else delta)
            continue
        dora = layer.lora_magnitude_vector[name]
        norm = dora.get_weight_norm(weight, delta, scaling=1)  # transposes the weight itself where needed
        factor = (dora.weight.float() / norm)[:, None]
        both = weight + (delta.t() if layer.fan_in_fan_out else delta)
        weight = both * (factor.t() if layer.fan_in_fan_out else factor)
    return weight


def _adapters(layer: Any) -> list[str]:
    """Adapters that a LoRA layer adds to its base weight."""
    if layer.disable_adapters or layer.merged:
        return []
    return [name for name in layer.active_adapters if name in layer.lora_A]


def _version(tensor: Tensor) -> object:
    return tensor.data_ptr(), tensor._version, tensor.dtype, tuple(tensor.shape)


def _inner(policy: Any) -> Any:
    unwrap = getattr(policy, "get_base_model", None)
    return policy if unwrap is None else unwrap()


def _is_conv1d(module: nn.Module) -> bool:
    """transformers' linear layer of GPT-2, whose weight is (K, N)."""
    return type(module).__name__ == "Conv1D" and not isinstance(module, nn.Conv1d)


def _quantized(source: _Source, spec: RolloutQuantSpec) -> QuantLinear:
    try:
        state = quantize_weight(source.weight(), spec, source.dtype)
    except ValueError as error:
        raise ValueError(f"{source.name}: {error}") from None
    return QuantLinear(state, source.linear.bias)


def _check_policy(policy: Any) -> None:
    if not hasattr(policy, "config"):
        raise ValueError(f"{type(policy).__name__} is not a transformers or PEFT model: unwrap it first")
    if type(policy).__name__ == "OptimizedModule":
        raise ValueError("the policy is compiled: pass the model that torch.compile was given")
    for name, adapter in getattr(policy, "peft_config", {}).items():
        if adapter.is_prompt_learning:
            raise ValueError(f"adapter {name!r} ({adapter.peft_type}) adds virtual tokens: allowed are LoRA and DoRA")
    for name, module in policy.named_modules():
        kinds = {kind.__name__ for kind in type(module).__mro__}
        if kinds & {"FSDPModule", "FullyShardedDataParallel"}:
            raise ValueError("the policy is sharded by FSDP: a shadow needs whole weights; use DDP or ZeRO-2")
        if kinds & set(BNB):
            raise ValueError(
                f"{name} is {type(module).__name__} of bitsandbytes: the base already samples in low precision; "
                "leave quantised rollouts off, or load the base unquantised"
            )
    for name, parameter in policy.named_parameters():
        _check_parameter(name, parameter)


def _check_parameter(name: str, parameter: nn.Parameter) -> None:
    if hasattr(parameter, "ds_id"):
        raise ValueError(f"{name} is sharded by DeepSpeed ZeRO-3: a shadow needs whole weights; use ZeRO-2")
    if type(parameter.data).__name__ == "DTensor":
        raise ValueError(f"{name} is sharded (DTensor): a shadow needs whole weights; use DDP or ZeRO-2")
    if parameter.is_meta or not parameter.numel():
        raise ValueError(f"{name} holds no data (offloaded or sharded): a shadow needs whole weights")
    if type(parameter.data) is not Tensor or not parameter.is_floating_point():
        raise ValueError(
            f"{name} is already quantised ({type(parameter.data).__name__}, {parameter.dtype}): "
            "leave quantised rollouts off, or load the base unquantised"
        )


def _find_sources(base: Any, spec: RolloutQuantSpec, linear_types: tuple[type[nn.Linear], ...]) -> list[_Source]:
    """Linear layers of the decoder; those inside of an adapter's layer belong to it."""
    kept = [module for module in (base.get_input_embeddings(), base.get_output_embeddings()) if module is not None]
    sources: list[_Source] = []
    inside: tuple[str, ...] = ()
    for name, module in base.named_modules():
        if name.startswith(inside):
            continue
        if any(module is part for part in kept) or spec.keeps(name):
            inside += (f"{name}.",)
            continue
        source = _source(name, module, linear_types)
        if source is not None:
            _check_forward(name, source.linear, replaced=True)
            sources.append(source)
            inside += (f"{name}.",)
        else:
            _check_experts(name, module)
    return sources


def _source(name: str, module: nn.Module, linear_types: tuple[type[nn.Linear], ...]) -> _Source | None:
    """A layer to quantise, or None for another kind of module."""
    if type(module) is nn.Linear or _is_conv1d(module) or isinstance(module, linear_types):
        return _Source(name, module)
    if isinstance(module, nn.Linear):
        raise ValueError(
            f"{name} is {type(module).__name__}, a linear layer with a forward of its own: add its name to skip, or "
            "its class to linear_types"
        )
    from peft.tuners.lora import Linear as LoraLinear
    from peft.tuners.tuners_utils import BaseTunerLayer

    if not isinstance(module, BaseTunerLayer):
        return None
    found: Any = module
    if type(module) is LoraLinear:
        return _Source(name, found.get_base_layer(), found)
    raise ValueError(
        f"{name} is adapted by {type(module).__module__}.{type(module).__name__}: allowed are LoRA and DoRA on linear "
        "layers; merge it into the base, or add its name to skip"
    )


def _check_experts(name: str, module: nn.Module) -> None:
    for part, parameter in module._parameters.items():
        convolution = isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d)
        if parameter is not None and parameter.dim() > 2 and not convolution:
            raise ValueError(
                f"{name}.{part} holds several matrices in one tensor {tuple(parameter.shape)}, as of experts, which is "
                f"not supported: add {name.rpartition('.')[2]!r} to skip to leave them in full precision"
            )


def _check_forward(name: str, module: nn.Module, replaced: bool = False) -> None:
    """Refuse a module whose own forward is not a wrapper around that of its class.

    A shadow runs the forward of the class: a function put in its place may hold the policy's own modules, and would
    sample from them in full precision.
    """
    own = vars(module).get("forward")
    if own is None or (not replaced and not any(module.children())):
        return  # a leaf computes with parameters that are shared
    if inspect.unwrap(own) is not inspect.unwrap(type(module).forward):
        raise ValueError(
            f"{name or type(module).__name__} has a forward of its own ({getattr(own, '__qualname__', own)}), which "
            "a shadow cannot copy: remove it, or add the module's name to skip"
        )


def _twin(base: Any, layers: dict[str, QuantLinear]) -> Any:
    """A copy of the tree with the same parameters and buffers, and other linear layers."""
    memo: dict[int, Any] = {}
    for name, module in base.named_modules():
        if name in layers:
            memo[id(module)] = layers[name]
        for attribute, value in vars(module).items():
            if "_hooks" in attribute and isinstance(value, dict):
                memo[id(value)] = _kept_hooks(module, value)
    memo |= {id(tensor): tensor for tensor in _tensors(base)}
    inside = tuple(f"{name}." for name in layers)
    for name, module in base.named_modules():
        if name not in layers and not name.startswith(inside):
            _check_forward(name, module)
    twin = copy.deepcopy(base, memo)
    for module in twin.modules():
        if any(module.children()):
            vars(module).pop("forward", None)
    return twin.train(False)


def _tensors(base: nn.Module) -> Iterator[Tensor]:
    for module in base.modules():
        yield from (tensor for tensor in module._parameters.values() if tensor is not None)
        yield from (tensor for tensor in module._buffers.values() if tensor is not None)


def _kept_hooks(module: nn.Module, hooks: dict[Any, Any]) -> dict[Any, Any]:
    """Those of a dict of hooks, or of flags of hooks, that belong to what the model computes."""
    forward = (module._forward_hooks, module._forward_pre_hooks)
    package = {
        key: str(getattr(hook, "__module__", "")).partition(".")[0] for group in forward for key, hook in group.items()
    }
    kept: OrderedDict[Any, Any] = OrderedDict()
    kept.update((key, hook) for key, hook in hooks.items() if package.get(key) in KEPT_HOOKS)
    return kept
