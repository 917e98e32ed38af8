"""Quantization-aware training: a causal LM with fake quantisers in place, and back to one without.

`prepare_qat` places them: attention input, queries and keys after rotary, softmax probabilities, values, MLP input, the
product before down_proj, and the weights of all linears of the layers. The input of o_proj, embeddings, norms and
lm_head stay as they are. With `low_share`, the tokens that the first token receives least attention from get
`low_bits`: at once for the values and the MLP, in the next layer for its input, queries, keys.

Source: arXiv 2402.10787 (EdgeQAT) and its Llama code. Different here: what causal attention does not see stays 0
whatever the zero point.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import dropout as drop
from transformers import PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from rltok.attention.probe import AttentionCall, language_model, probeable_layers, probing, text_config
from rltok.quant.fake import (
    OFF,
    DynamicFakeQuantActivation,
    DynamicFakeQuantWeight,
    FakeQuantActivation,
    FakeQuantLinear,
    FakeQuantWeight,
    Method,
    TokenMixedFakeQuant,
    first_token_attention,
    grouped_scores,
    low_width_tokens,
    wide,
)
from rltok.quant.qat_losses import QueryKey
from rltok.reduce import ONE_RANK, Reducer

SERVED = "sdpa"
"""the attention implementation that a prepared model must use"""
ATTENTION_INPUTS = ("q_proj", "k_proj", "v_proj", "qkv_proj")
MLP_INPUTS = ("gate_proj", "up_proj", "gate_up_proj")
PRODUCTS = ("down_proj",)
PLAIN_INPUTS = ("o_proj",)
KNOWN_LINEARS = ATTENTION_INPUTS + MLP_INPUTS + PRODUCTS + PLAIN_INPUTS
UNKNOWN_TERMS = ("position_bias", "softcap", "s_aux", "sliding_window")
"""arguments of attention functions that change the scores in ways that are not quantised here"""


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
    inputs: dict[str, Any] = field(default_factory=dict)
    """what the body was called with, while `collecting` is open"""
    plain: bool = False
    """no activation is quantised (`suspended`)"""
    high_only: bool = False
    """every token has the high width (`high_width`)"""
    handles: list[Any] = field(default_factory=list)

    @property
    def mixes(self) -> bool:
        """Whether tokens get different widths at present."""
        return self.spec.low_share > 0 and not (self.high_only or self.plain)

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
        if self.state.plain:
            return x
        mask = self.state.valid(x.size(-2))
        if mask is not None:
            mask = mask[:, None, :, None] if x.dim() == 4 else mask[..., None]
        if self.low is None or self.state.high_only:
            return cast(Tensor, self.high(x, mask, repeats))
        return super().forward(x, self.state.low[self.source], mask, repeats)


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
        if self.state.plain:
            return original(module, query, key, value, attention_mask, *args, **kwargs)
        options = dict(zip(("dropout", "scaling", "is_causal", "position_bias"), args, strict=False)) | kwargs
        _check_call(module, query, key, options, self.state)
        scaling = query.size(-1) ** -0.5 if options.get("scaling") is None else float(options["scaling"])
        query = self.query(query)
        key = self.key(key, repeats=query.size(1) // key.size(1))
        if self.state.collected is not None:
            self.state.collected[self.layer] = QueryKey(query, key, scaling)
        if self.state.mixes:
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
        kind = wide(query)
        scores = grouped_scores(query, key).to(kind) * scaling
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
    state.handles.append(body.register_forward_pre_hook(partial(_note_inputs, state), with_kwargs=True))
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


def to_torchao(model: nn.Module) -> nn.Module:
    """Hand a prepared model over to torchao: its linears get torchao's tensors with the codes that training computed.

    Call it in place of `convert`: a converted weight's largest element has another size than before, so that scales
    found in it anew would be others. Only dynamic weights have torchao's scales, and only full-precision activations
    its placement.

    Returns:
        `model`, without fake quantisers.

    Raises:
        ValueError: a model that is not prepared or is converted, learned steps of weights, quantised activations, or
            bits that torchao has no tensor for.
        ImportError: torchao is not installed.
    """
    spec = qat_state(model).spec
    if is_converted(model):
        raise ValueError("the model is converted; hand it over before, with its full-precision weights")
    if spec.weight != "dynamic" or spec.weight_bits == OFF or spec.activation_bits != OFF:
        raise ValueError(
            f"weight={spec.weight!r}, weight_bits={spec.weight_bits}, activation_bits={spec.activation_bits}; allowed: "
            f"weight='dynamic' with 2 to 8 bits and activation_bits={OFF}"
        )
    from torchao.quantization import IntxWeightOnlyConfig, quantize_
    from torchao.quantization.granularity import PerAxis, PerGroup

    adopted = set(_adopted(model))
    remove_qat(model)
    granularity = PerAxis(0) if spec.group_size is None else PerGroup(spec.group_size)
    config = IntxWeightOnlyConfig(weight_dtype=getattr(torch, f"int{spec.weight_bits}"), granularity=granularity)
    quantize_(model, config, filter_fn=lambda module, name: module in adopted)
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
    state = _state(model)
    if state is None:
        raise ValueError(f"{type(model).__name__} is not prepared; call prepare_qat first")
    return state


def is_prepared(model: nn.Module) -> bool:
    """Whether a model has fake quantisers in place, those of a converted one included."""
    return _state(model) is not None


def is_converted(model: nn.Module) -> bool:
    """Whether only the fixed quantisers of activations are left."""
    return is_prepared(model) and all(module.weight_fake_quantizer is None for module in _adopted(model))


def needs_calibration(model: nn.Module) -> bool:
    """Whether a quantiser of activations has no step yet."""
    learned = [module for module in model.modules() if isinstance(module, FakeQuantActivation)]
    return any(module.bits != OFF and not module.initialised for module in learned)


def _state(model: nn.Module) -> QATState | None:
    found = (module.state for module in model.modules() if isinstance(module, AttentionFakeQuant))
    return next(found, None)


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
        state.inputs = {}


@contextmanager
def suspended(model: nn.Module) -> Iterator[None]:
    """While open, a prepared model computes with its full-precision weights and activations, as if it were plain.

    Raises:
        ValueError: a model that is not prepared.
    """
    state, linears = qat_state(model), _adopted(model)
    before = state.plain
    state.plain = True
    for module in linears:
        module.plain = True
    try:
        yield
    finally:
        state.plain = before
        for module in linears:
            module.plain = before


@contextmanager
def high_width(model: nn.Module) -> Iterator[None]:
    """While open, every token of a prepared model has the high width, so that caches and packed rows are allowed.

    Which tokens are low depends on later ones, which a sampler does not know yet. Nothing changes with `low_share=0`.

    Raises:
        ValueError: a model that is not prepared.
    """
    state = qat_state(model)
    before, state.high_only = state.high_only, True
    try:
        yield
    finally:
        state.high_only = before


@contextmanager
def kept_weights(model: nn.Module) -> Iterator[None]:
    """While open, quantised weights are formed once, not at every call: for sampling. One more copy of the weights.

    Weights must not change inside, and get no gradient.

    Raises:
        ValueError: a model that is not prepared.
    """
    qat_state(model)
    linears = [module for module in _adopted(model) if module.weight_fake_quantizer is not None]
    with torch.no_grad():
        for module in linears:
            module.kept = module.quantised_weight().detach()
    try:
        yield
    finally:
        for module in linears:
            module.kept = None


@contextmanager
def collecting_teacher(model: nn.Module) -> Iterator[dict[int, QueryKey]]:
    """Layer -> queries and keys after rotary of a plain model, the teacher, without gradients."""
    found: dict[int, QueryKey] = {}

    def keep(call: AttentionCall) -> None:
        found[call.layer] = QueryKey(call.query, call.key, call.scaling)

    with probing(model, range(text_config(language_model(model)).num_hidden_layers), keep):
        yield found


def _adopted(model: nn.Module) -> list[FakeQuantLinear]:
    return [module for module in model.modules() if isinstance(module, FakeQuantLinear)]


def _activation_quantiser(spec: QATSpec, bits: int, reducer: Reducer, like: Tensor) -> nn.Module:
    """One quantiser, on the device of the layer's parameters; its step is never in half precision."""
    if spec.activation == "dynamic":
        return DynamicFakeQuantActivation(bits)
    return FakeQuantActivation(bits, reducer, like.device, wide(like))


def _weight_quantiser(spec: QATSpec, module: nn.Linear) -> nn.Module:
    if spec.weight == "lsq":
        return FakeQuantWeight(spec.weight_bits, module.weight.device, wide(module.weight))
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


def _note_inputs(state: QATState, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
    """In front of the body: which tokens are valid, and their positions where nobody says them.

    Rotary attention is relative, but what is rounded of a query is not: counted from the padding, as transformers does,
    positions would let the padding decide about the codes.
    """
    kwargs = dict(zip(("input_ids", "attention_mask"), args, strict=False)) | kwargs
    mask, positions = kwargs.get("attention_mask"), kwargs.get("position_ids")
    state.mask = mask.bool() if isinstance(mask, Tensor) and mask.dim() == 2 else None
    state.low.clear()
    rounds = state.spec.activation_bits != OFF or state.collected is not None
    if rounds and not state.plain and state.mask is not None and positions is None:
        tokens = next(kwargs[name] for name in ("input_ids", "inputs_embeds") if kwargs.get(name) is not None).size(1)
        kwargs["position_ids"] = (state.mask.long().cumsum(1) - 1).clamp(min=0)[:, -tokens:]
    if state.collected is not None:
        state.inputs = dict(kwargs)
    packed = state.mask is None and isinstance(positions, Tensor) and bool((positions.diff(dim=-1) != 1).any())
    if state.mixes and packed:
        raise ValueError(
            f"low_share={state.spec.low_share} chooses tokens of one sequence per row; these rows are packed. Train "
            "without packing, or set low_share to 0"
        )
    return (), kwargs


def _check_call(module: nn.Module, query: Tensor, key: Tensor, options: dict[str, Any], state: QATState) -> None:
    """Refuse what only a call reveals."""
    for name in UNKNOWN_TERMS:
        if options.get(name) is not None:
            raise ValueError(f"{type(module).__name__} attends with {name}, which is not quantised here")
    causal = options.get("is_causal")
    if not (getattr(module, "is_causal", True) if causal is None else causal):
        raise ValueError(f"{type(module).__name__} is bidirectional (is_causal=False); allowed: causal attention")
    if state.mixes and query.size(2) != key.size(2):
        raise ValueError(
            f"low_share={state.spec.low_share} needs whole sequences, this call has {query.size(2)} queries of "
            f"{key.size(2)} tokens; generate inside `high_width`, or with use_cache=False"
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
    """Count a layer's quantisers, and put a wrapper in place unless one is there; it goes with the last of them."""
    _LIVE.add(quantisers)
    weakref.finalize(quantisers, _release).atexit = False
    current = ALL_ATTENTION_FUNCTIONS[SERVED]
    if not isinstance(current, _Wrapper):
        ALL_ATTENTION_FUNCTIONS[SERVED] = _Wrapper(current)


def _release() -> None:
    """Take the wrapper away with the last quantisers; one that something else wraps by now stays and does nothing."""
    current = ALL_ATTENTION_FUNCTIONS[SERVED]
    if any(True for _ in _LIVE) or not isinstance(current, _Wrapper):  # len() may count one that is just dying
        return
    del ALL_ATTENTION_FUNCTIONS[SERVED]
    if ALL_ATTENTION_FUNCTIONS[SERVED] is not current.original:  # another local entry was there before
        ALL_ATTENTION_FUNCTIONS[SERVED] = current.original
