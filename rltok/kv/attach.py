"""A cache policy around transformers' `generate`, without a trace afterwards."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from rltok.fast.cache import BlockCache
from rltok.fast.loop import CacheFactory
from rltok.kv.attention import watched_attention
from rltok.kv.cache import PolicyCache
from rltok.kv.policy import KVPolicy


@contextmanager
def policy_cache(model: Any, policy: KVPolicy | None) -> Iterator[CacheFactory]:
    """What makes the caches of `rltok.fast.generate_rows` while open; None: the dense ones.

    Args:
        model: a causal LM of transformers, or a PEFT model around one.

    Raises:
        ValueError: attention that cannot be watched.
    """
    if policy is None:
        yield BlockCache
        return
    with watched_attention(base_model(model)):
        yield partial(PolicyCache, policy=policy)


def base_model(model: Any) -> Any:
    """The model inside PEFT's wrapper."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


@dataclass
class Attached:
    """What happened inside `attach`."""

    policy: KVPolicy
    caches: list[PolicyCache] = field(default_factory=list)
    """the cache of the last call of generate"""
    peak_bytes: int = 0
    """largest size of a cache so far"""

    @property
    def stats(self) -> dict[str, float]:
        """Bytes of the caches."""
        peak = max([self.peak_bytes, *(cache.size.peak for cache in self.caches)])
        return {"cache_bytes": float(sum(cache.nbytes for cache in self.caches)), "peak_cache_bytes": float(peak)}


@contextmanager
def attach(model: Any, policy: KVPolicy) -> Iterator[Attached]:
    """While open, `model.generate` keeps what the policy keeps; a budget at or above the length changes no bit.

    Args:
        model: a causal LM of transformers, or a PEFT model around one.

    Raises:
        ValueError: attention that cannot be watched; in generate, an option that needs the whole cache.
    """
    base = base_model(model)
    handle = Attached(policy)

    def prepare(
        generation_config: Any, model_kwargs: dict[str, Any], generation_mode: Any, batch_size: int, *rest: Any
    ) -> None:
        _refuse(generation_config, model_kwargs, generation_mode)
        mask = model_kwargs.get("attention_mask")
        pad = left_padding(mask, batch_size)
        cache = PolicyCache(base.config, len(pad), policy=policy, in_parts=False)
        cache.begin(pad)
        handle.peak_bytes = int(handle.stats["peak_cache_bytes"])
        handle.caches = [cache]
        model_kwargs["past_key_values"] = cache

    with watched_attention(base):
        base._prepare_cache_for_generation = prepare
        try:
            yield handle
        finally:
            del base._prepare_cache_for_generation


def _refuse(config: Any, kwargs: dict[str, Any], mode: Any) -> None:
    if kwargs.get("past_key_values") is not None:
        raise ValueError("past_key_values: a cache was given, but the policy makes its own; pass none")
    for name, neutral in (("num_beams", 1), ("prefill_chunk_size", None), ("cache_implementation", None)):
        value = getattr(config, name, None)
        if value not in (neutral, None):
            raise ValueError(f"{name}={value!r} does not work with a cache policy; leave it at {neutral!r}")
    if config.use_cache is False:
        raise ValueError("use_cache=False leaves nothing to a cache policy; set it to True")
    if "assisted" in str(mode).lower():
        raise ValueError("assisted decoding takes tokens back, which a cache policy has forgotten; use no assistant")


def left_padding(mask: Tensor | None, rows: int) -> list[int]:
    """Columns of padding on the left of every row of a (B, S) mask."""
    return [0] * rows if mask is None else (mask == 0).sum(1).to(torch.long).tolist()
