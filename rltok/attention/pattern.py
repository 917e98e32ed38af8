"""An attention pattern at work in a model: where it acts, and how it is put there and taken away.

Only calls without a cache follow the pattern. These score tokens: updates, old and reference log-probabilities, and the
layers that gradient checkpointing runs again in the backward pass. Calls with a cache make completions, and see
everything: our rollout loop, transformers' `generate`, evaluation. Whether there is a cache is read from the arguments
of every attention module, so no rollout has to say what it is; `full_attention` turns the pattern off regardless.

For as long as a pattern is attached, the attention function `sdpa` in transformers' mapping is wrapped. The wrapper
passes on calls of other models, and calls without a sample of more than `above` tokens, as they are.

Left out: `generate(use_cache=False)`, whose calls look like scoring; attention implementations other than sdpa.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn
from transformers import Cache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from rltok.attention.probe import language_model, probeable_layers, text_config
from rltok.attention.sink_lora import (
    Plan,
    SinkLoRAConfig,
    check_shapes,
    combine,
    make_plan,
    sample_numbers,
    shifted_heads,
)

SERVED = "sdpa"
"""The attention implementation that a pattern can stand in for."""
CACHES = ("past_key_values", "past_key_value", "layer_past", "cache")
"""Arguments by which an attention module gets a cache."""
UNKNOWN_TERMS = ("position_bias", "softcap", "s_aux", "sliding_window")
"""Arguments of attention functions that change the scores in ways that a pattern does not know."""


class AttachedPattern:
    """A pattern at work in a model; `remove` ends it. Also a context manager."""

    def __init__(self, config: SinkLoRAConfig) -> None:
        self.config = config
        self.on = True
        """False while `full_attention` is open"""
        self.calls = 0
        """attention calls so far in which the pattern acted"""
        self._latest: tuple[weakref.ref[Tensor] | None, tuple[Any, ...], Plan | None] | None = None
        self._hooks: list[Any] = []
        self._modules: list[weakref.ref[nn.Module]] = []

    def __enter__(self) -> AttachedPattern:
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()

    def remove(self) -> None:
        """The model attends as before; a second call does nothing."""
        for hook in self._hooks:
            hook.remove()
        modules, self._modules, self._hooks, self._latest = self._modules, [], [], None
        for reference in modules:
            module = reference()
            if module is not None:
                _ATTACHED.pop(module, None)
        if modules:
            _release()

    def attend(
        self,
        original: Callable[..., Any],
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Any,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        """One call of the attention function; `original` where no sample is longer than `above`."""
        check_shapes(query, key, mask)
        options = dict(zip(("dropout", "scaling", "is_causal", "position_bias"), args, strict=False)) | kwargs
        _check_call(module, query, options)
        plan = self._plan(query, mask)
        if plan is None:
            return original(module, query, key, value, mask, *args, **kwargs)
        self.calls += 1

        def full(rows: Tensor) -> Tensor:
            some = mask if mask is None or mask.size(0) == 1 else mask[rows]
            return original(module, query[rows], key[rows], value[rows], some, *args, **kwargs)[0]

        scaling = options.get("scaling")
        scaling = query.size(-1) ** -0.5 if scaling is None else float(scaling)
        dropout = float(options.get("dropout") or 0.0)
        moved = shifted_heads(query.size(1), self.config.shift_fraction)
        return combine(query, key, value, plan, moved, full, scaling, dropout), None

    def _plan(self, query: Tensor, mask: Tensor | None) -> Plan | None:
        """The plan of a call; all layers of a forward pass have the same mask, so the last one is kept."""
        shape = query.size(0), query.size(2), query.device
        if self._latest is not None and self._latest[1] == shape:
            known = self._latest[0]
            if (known is None and mask is None) or (known is not None and mask is not None and known() is mask):
                return self._latest[2]
        with torch.inference_mode(False), torch.no_grad():  # it may serve a pass with gradients next
            plan = make_plan(sample_numbers(mask, query), self.config)
        self._latest = (None if mask is None else weakref.ref(mask), shape, plan)
        return plan


@dataclass
class _Attached:
    """What is known of an attention module."""

    pattern: AttachedPattern
    cached: bool = False
    """its call at hand has a cache: it makes completions"""


_ATTACHED: weakref.WeakKeyDictionary[nn.Module, _Attached] = weakref.WeakKeyDictionary()


def attach_pattern(model: nn.Module, config: SinkLoRAConfig) -> AttachedPattern:
    """From now on the model attends by the pattern, except where it is called with a cache.

    Calls with a cache make completions: prompts and their continuation see everything, as the sampler must. Calls
    without one score tokens: updates, old and reference log-probabilities, and what gradient checkpointing runs again.
    Rows are told apart by the model's own mask, so packed rows and padding on both sides are right. Without a sample of
    more than `above` tokens a call is what it was, bit for bit.

    Args:
        model: a causal LM of transformers with sdpa attention, or a wrapper around one.

    Returns:
        A handle whose `remove` undoes everything.

    Raises:
        ValueError: another attention implementation, a sliding window, attention that is not a softmax over causal
            keys, inputs other than text, or a pattern that is attached already.
    """
    modules = patternable_modules(model)
    if any(module in _ATTACHED for module in modules):
        raise ValueError("the model has an attention pattern already; remove it first")
    pattern = AttachedPattern(config)
    if config.is_neutral:
        return pattern
    _install()
    for module in modules:
        _ATTACHED[module] = _Attached(pattern)
        pattern._modules.append(weakref.ref(module))
        pattern._hooks.append(module.register_forward_pre_hook(_note_cache, with_kwargs=True))
    return pattern


def patternable_modules(model: nn.Module) -> list[nn.Module]:
    """The attention modules of a model, one per layer, after its attention was checked.

    Raises:
        ValueError: as for `attach_pattern`.
    """
    core = language_model(model)
    config = text_config(core)
    name = config._attn_implementation
    if name != SERVED:
        raise ValueError(f"attn_implementation={name!r} cannot run an attention pattern; allowed: {SERVED!r}")
    if config is not core.config:
        raise ValueError(f"{type(core).__name__} takes more than text, whose attention a pattern does not know")
    layers = config.num_hidden_layers
    probeable_layers(model, range(layers))
    kinds = sorted(set(getattr(config, "layer_types", None) or ()) - {"full_attention", "attention"})
    if kinds or (getattr(config, "layer_types", None) is None and getattr(config, "sliding_window", None) is not None):
        raise ValueError(
            f"{type(core).__name__} has layers of type {kinds or ['sliding_attention']}; a pattern needs full "
            "attention in all of them"
        )
    modules = [
        module
        for module in core.modules()
        if isinstance(getattr(module, "layer_idx", None), int) and hasattr(module, "is_causal")
    ]
    if sorted(cast(int, module.layer_idx) for module in modules) != list(range(layers)):
        raise ValueError(
            f"{type(core).__name__} has {len(modules)} attention modules that name their layer, but {layers} layers; a "
            "pattern needs one per layer"
        )
    return modules


@contextmanager
def full_attention(model: nn.Module) -> Iterator[None]:
    """While open, the model attends without its pattern, with and without a cache."""
    found = {_ATTACHED[module].pattern for module in model.modules() if module in _ATTACHED}
    before = {pattern: pattern.on for pattern in found}
    try:
        for pattern in found:
            pattern.on = False
        yield
    finally:
        for pattern, on in before.items():
            pattern.on = on


def _note_cache(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """In front of an attention module: only its arguments say whether there is a cache."""
    attached = _ATTACHED.get(module)
    if attached is not None:
        named = any(kwargs.get(name) is not None for name in CACHES)
        attached.cached = named or any(isinstance(value, Cache) for value in args)


def _check_call(module: nn.Module, query: Tensor, options: dict[str, Any]) -> None:
    """Refuse what only a call reveals."""
    for name in UNKNOWN_TERMS:
        if options.get(name) is not None:
            raise ValueError(f"{type(module).__name__} attends with {name}, which an attention pattern does not know")
    heads = getattr(getattr(module, "config", None), "num_attention_heads", query.size(1))
    if heads != query.size(1):
        raise ValueError(
            f"{type(module).__name__} computes {query.size(1)} of {heads} heads: which heads are shifted is not known "
            "where heads are spread over ranks"
        )


class _Wrapper:
    """Stands in for the attention function while any pattern is attached; calls of other modules pass through."""

    patterns: ClassVar[int] = 0
    """attached and not removed; not the size of `_ATTACHED`, which modules leave when they die"""

    def __init__(self, original: Callable[..., Any]) -> None:
        self.original = original

    def __call__(
        self,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Any,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        attached = _ATTACHED.get(module)
        if attached is None or attached.cached or not attached.pattern.on:
            return self.original(module, query, key, value, attention_mask, *args, **kwargs)
        return attached.pattern.attend(self.original, module, query, key, value, attention_mask, *args, **kwargs)


def _install() -> None:
    """Count a pattern, and put a wrapper in place unless one is there."""
    _Wrapper.patterns += 1
    current = ALL_ATTENTION_FUNCTIONS[SERVED]
    if not isinstance(current, _Wrapper):
        ALL_ATTENTION_FUNCTIONS[SERVED] = _Wrapper(current)


def _release() -> None:
    """Take the wrapper away with the last pattern; one that something else wraps by now stays and does nothing."""
    _Wrapper.patterns -= 1
    current = ALL_ATTENTION_FUNCTIONS[SERVED]
    if _Wrapper.patterns or not isinstance(current, _Wrapper):
        return
    del ALL_ATTENTION_FUNCTIONS[SERVED]
    if ALL_ATTENTION_FUNCTIONS[SERVED] is not current.original:  # another local entry was there before
        ALL_ATTENTION_FUNCTIONS[SERVED] = current.original
