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
training mode, the learner's own precision (`same_precision.py`), and wrappers around a module's own forward such as
autocast; sample inside `torch.autocast` where the policy does.

Over a base that bitsandbytes already holds in few bits (QLoRA), only `bits=16` is served: the adapters stay unmerged as
in the policy, and the copy is there for the noise.

Sources: FlashRL (low-precision rollouts), QeRL arXiv 2510.11696 and its code (noise).
"""

from __future__ import annotations

import copy
import inspect
import time
import warnings
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
PACKS = "support_avx512bf16_for_cpu"
"""Flag of a 4-bit layer of bitsandbytes: in evaluation mode on the CPU it packs its weight in place, the policy's own,
which then passes no gradient on."""
MARK = "_same_precision"
"""Attribute of a layer whose forward `same_precision.py` replaced."""


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

        Warns of torch's CPU kernels on a policy in float32, which are slow.

        Raises:
            ValueError: a policy that it does not serve: sharded (ZeRO-3, FSDP), offloaded or (but for `bits=16`)
                already quantised weights, adapters other than LoRA and DoRA, experts in one tensor, a forward of its
                own; no layer to quantise.
        """
        self.spec = spec
        self._sources = linear_sources(policy, spec, linear_types)
        self._base = inner_model(policy)
        if spec.backend.startswith("aten") and any(source.dtype == torch.float32 for source in self._sources):
            warnings.warn(
                f"backend={spec.backend!r} is several times slower than the full weights of a float32 policy: load it "
                "in bfloat16 (model.dtype), or set backend='torch'",
                stacklevel=2,
            )
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
            if self._base.get_submodule(source.name) is not source.module:
                raise ValueError(f"{source.name} of the policy was replaced since the shadow was made: make a new one")

    def _refresh(self, source: LinearSource) -> float:
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
class Merge:
    """How the weight of a linear layer is made of its tensors: the base weight, A and B of every adapter, and DoRA's m.

        W + sum_a s_a B_a A_a           LoRA; without adapters W
        m (W + s B A) / ||W + s B A||   DoRA; the norm, one per row, is a constant of the gradient

    Source of the constant norm: DoRA, arXiv 2402.09353, sec. 4.3.
    """

    scalings: tuple[float, ...] = ()
    """s_a"""
    dora: bool = False
    """a magnitude comes last"""
    transposed: bool = False
    """the base weight is (K, N)"""

    def __call__(self, *tensors: Tensor) -> Tensor:
        """(N, K) weight, at least float32."""
        weight = self.unscaled(*tensors)
        return weight * self.factor(weight, tensors[-1])[:, None] if self.dora else weight

    def unscaled(self, base: Tensor, *adapters: Tensor) -> Tensor:
        """(N, K) W + sum_a s_a B_a A_a, also in autocast at least float32."""
        weight = wide(base.t() if self.transposed else base)
        with torch.autocast(base.device.type, enabled=False):
            for index, scaling in enumerate(self.scalings):
                a, b = adapters[2 * index : 2 * index + 2]
                weight = weight + wide(b) @ wide(a) * scaling
        return weight

    def factor(self, unscaled: Tensor, magnitude: Tensor) -> Tensor:
        """(N,) m / ||W + s B A||."""
        return wide(magnitude) / torch.linalg.norm(unscaled.detach(), dim=1)


@dataclass(frozen=True)
class LinearSource:
    """A linear layer of the policy that is quantised."""

    name: str
    linear: Any
    """the layer itself, inside of LoRA"""
    adapted: Any = None
    """PEFT's layer around it"""

    @property
    def module(self) -> Any:
        """The outer one of both."""
        return self.linear if self.adapted is None else self.adapted

    @property
    def dtype(self) -> torch.dtype:
        """Of the base weight, and so of the dequantised one."""
        dtype: torch.dtype = self.linear.weight.dtype
        return dtype

    @torch.no_grad()
    def weight(self) -> Tensor:
        """(N, K) present weight; at least float32 with LoRA."""
        tensors, merge = self.parts()
        if self.adapted is not None:
            return merge(*tensors)
        weight = tensors[0].detach()
        return weight.t() if merge.transposed else weight

    def parts(self) -> tuple[list[Tensor], Merge]:
        """What the weight is made of."""
        if self.adapted is None:
            return [self.linear.weight], Merge(transposed=_is_conv1d(self.linear))
        return lora_parts(self.adapted)

    def mark(self) -> _Mark:
        """How the parts look now."""
        tensors, settings = self.parts()
        return _Mark(settings, [_version(tensor) for tensor in tensors], [checksum(tensor) for tensor in tensors])


@dataclass(frozen=True)
class _Mark:
    """How the parts of a weight looked when it was quantised."""

    settings: Merge
    versions: list[object]
    sums: list[Tensor]

    def moved(self, source: LinearSource) -> bool:
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
    """The weight that a LoRA or DoRA layer of PEFT computes with, at least float32, of the base weight's shape.

    The layer is not changed. Inactive, disabled and already merged adapters add nothing.

    Raises:
        ValueError: a variant of LoRA other than DoRA, DoRA with a second adapter, a bias in the adapter.
    """
    tensors, merge = lora_parts(layer)
    weight = merge(*tensors)
    return weight.t() if merge.transposed else weight


def lora_parts(layer: Any) -> tuple[list[Tensor], Merge]:
    """The parameters of a LoRA or DoRA layer of PEFT in the order of `Merge`, without adapters that are not at work.

    Raises:
        ValueError: as of `merged_weight`.
    """
    names, base = active_adapters(layer), layer.get_base_layer()
    variants = {name: type(layer.lora_variant[name]).__name__ for name in names if name in layer.lora_variant}
    tensors = [base.weight]
    for name in names:
        variant = variants.get(name)
        if variant not in (None, "DoraLinearVariant") or (variant and len(names) > 1):
            raise ValueError(
                f"adapters {names} with {variant}: allowed are LoRA adapters, or one with DoRA; merge it into the base "
                "before training, or sample in full precision (bits=16)"
            )
        if layer.lora_bias.get(name):
            raise ValueError(f"adapter {name!r} has lora_bias=True, which is not supported: set it to False")
        tensors += [layer.lora_A[name].weight, layer.lora_B[name].weight]
    tensors += [layer.lora_magnitude_vector[name].weight for name in variants]
    scalings = tuple(layer.scaling[name] for name in names)
    return tensors, Merge(scalings, bool(variants), _is_conv1d(base))


def active_adapters(layer: Any) -> list[str]:
    """Adapters that a LoRA layer adds to its base weight."""
    if layer.disable_adapters or layer.merged:
        return []
    return [name for name in layer.active_adapters if name in layer.lora_A]


def _version(tensor: Tensor) -> object:
    return tensor.data_ptr(), tensor._version, tensor.dtype, tuple(tensor.shape)


def wide(tensor: Tensor) -> Tensor:
    """A tensor in float32, or in its own dtype if that is wider."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def inner_model(policy: Any) -> Any:
    """The model inside of PEFT."""
    unwrap = getattr(policy, "get_base_model", None)
    return policy if unwrap is None else unwrap()


def _is_conv1d(module: nn.Module) -> bool:
    """transformers' linear layer of GPT-2, whose weight is (K, N)."""
    return type(module).__name__ == "Conv1D" and not isinstance(module, nn.Conv1d)


def _quantized(source: LinearSource, spec: RolloutQuantSpec) -> QuantLinear:
    try:
        state = quantize_weight(source.weight(), spec, source.dtype)
    except ValueError as error:
        raise ValueError(f"{source.name}: {error}") from None
    return QuantLinear(state, source.linear.bias)


def _check_policy(policy: Any, spec: RolloutQuantSpec) -> None:
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
        if kinds & set(BNB) and spec.bits != 16:
            raise ValueError(
                f"{name} is {type(module).__name__} of bitsandbytes: the base already samples in low precision, and "
                f"bits={spec.bits} would need its full weights; leave rollout.quant out, set rollout.quant.bits=16 to "
                "sample with noise on the RMSNorm gains alone, or remove model.quantization"
            )
    for name, parameter in policy.named_parameters():
        _check_parameter(name, parameter, spec)


def _check_parameter(name: str, parameter: nn.Parameter, spec: RolloutQuantSpec) -> None:
    if hasattr(parameter, "ds_id"):
        raise ValueError(f"{name} is sharded by DeepSpeed ZeRO-3: a shadow needs whole weights; use ZeRO-2")
    if type(parameter.data).__name__ == "DTensor":
        raise ValueError(f"{name} is sharded (DTensor): a shadow needs whole weights; use DDP or ZeRO-2")
    if parameter.is_meta or not parameter.numel():
        raise ValueError(f"{name} holds no data (offloaded or sharded): a shadow needs whole weights")
    if spec.bits != 16 and (type(parameter.data) is not Tensor or not parameter.is_floating_point()):
        raise ValueError(
            f"{name} is already quantised ({type(parameter.data).__name__}, {parameter.dtype}): "
            "leave quantised rollouts off, or load the base unquantised"
        )


def linear_sources(
    policy: Any, spec: RolloutQuantSpec, linear_types: tuple[type[nn.Linear], ...] = ()
) -> list[LinearSource]:
    """The linear layers of a policy that are quantised; none with `bits=16`.

    Raises:
        ValueError: as of `QuantizedShadow`.
    """
    _check_policy(policy, spec)
    if spec.bits == 16:
        return []
    sources = _find_sources(inner_model(policy), spec, linear_types)
    if not sources:
        raise ValueError(f"skip={list(spec.skip)} leaves no linear layer to quantise: shorten it, or set bits=16")
    return sources


def _find_sources(base: Any, spec: RolloutQuantSpec, linear_types: tuple[type[nn.Linear], ...]) -> list[LinearSource]:
    """Linear layers of the decoder; those inside of an adapter's layer belong to it."""
    kept = [module for module in (base.get_input_embeddings(), base.get_output_embeddings()) if module is not None]
    sources: list[LinearSource] = []
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


def _source(name: str, module: nn.Module, linear_types: tuple[type[nn.Linear], ...]) -> LinearSource | None:
    """A layer to quantise, or None for another kind of module."""
    if type(module) is nn.Linear or _is_conv1d(module) or isinstance(module, linear_types):
        return LinearSource(name, module)
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
        if MARK in vars(found.get_base_layer()):
            raise ValueError(
                f"{name} was adapted after the policy was attached to quantised weights, and now adds the adapter to "
                "Q(W) in place of quantising the merged weight: remove() what was attached, and attach again"
            )
        return LinearSource(name, found.get_base_layer(), found)
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
        if type(module).__name__ in BNB:  # what belongs to the codes is shared as they are
            held = [vars(module)[name] for name in ("state", "quant_state") if name in vars(module)]
            memo |= {id(value): value for value in held}
    memo |= {id(tensor): tensor for tensor in _tensors(base)}
    inside = tuple(f"{name}." for name in layers)
    for name, module in base.named_modules():
        if name not in layers and not name.startswith(inside):
            _check_forward(name, module)
    twin = copy.deepcopy(base, memo)
    for module in twin.modules():
        if any(module.children()) or MARK in vars(module):
            vars(module).pop("forward", None)
            vars(module).pop(MARK, None)
        if hasattr(module, PACKS):
            setattr(module, PACKS, False)
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
