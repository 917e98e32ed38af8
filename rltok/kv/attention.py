"""The thin wrapper around the attention function in use, and attention weights of a few queries.

A `PolicyLayer` marks the keys that it hands to the model. The wrapper finds the mark, lets the layer call the function
with its own mask in place of the model's, lets it see the queries, and lets it cut itself. Keys without a mark pass
through untouched: training, other models, sliding-window layers.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

if TYPE_CHECKING:
    from rltok.kv.policy import LayerView

MARK = "_rltok_layer"
SERVED = ("sdpa", "flash_attention_2", "flash_attention_3")
"""attention implementations that the wrapper can stand in for"""


def implementation(model: Any) -> str:
    """The attention implementation of a model's decoder.

    Raises:
        ValueError: one that cannot be wrapped.
    """
    name = model.config.get_text_config(decoder=True)._attn_implementation
    if name not in SERVED:
        raise ValueError(
            f"model.attn_implementation={name!r} cannot be used with a cache policy; allowed: {', '.join(SERVED)}"
        )
    return name


@contextmanager
def watched_attention(model: Any) -> Iterator[None]:
    """While open, layers of a `PolicyCache` see the attention calls that read them.

    Raises:
        ValueError: an attention implementation that cannot be wrapped.
    """
    name = implementation(model)
    original = ALL_ATTENTION_FUNCTIONS[name]

    def wrapper(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, *args: Any, **kwargs: Any
    ) -> Any:
        layer = getattr(key, MARK, None)
        if layer is None:
            return original(module, query, key, value, attention_mask, *args, **kwargs)
        flash = name != "sdpa"
        output = layer.attend(original, module, query, key, value, attention_mask, flash, args, kwargs)
        with torch.no_grad():
            layer.after_attention(query, kwargs.get("scaling") or query.size(-1) ** -0.5)
        return output

    ALL_ATTENTION_FUNCTIONS[name] = wrapper
    try:
        yield
    finally:
        del ALL_ATTENTION_FUNCTIONS[name]
        if ALL_ATTENTION_FUNCTIONS[name] is not original:  # another local entry was there before
            ALL_ATTENTION_FUNCTIONS[name] = original


def grouped_weights(queries: Tensor, keys: Tensor, visible: Tensor | None, scaling: float) -> Tensor:
    """softmax(scaling q k) over visible keys, in float32; rows that see nothing are 0.

    Args:
        queries: (B, H, q, D).
        keys: (B, Hkv, S, D); query heads h G .. h G + G - 1 share key head h.
        visible: (B, 1 or Hkv, q, S) bool; None: all.

    Returns:
        (B, Hkv, G, q, S).
    """
    rows, heads, count, size = queries.shape
    groups = heads // keys.size(1)
    packed = queries.reshape(rows, keys.size(1), groups * count, size).float()
    logits = (packed @ keys.float().transpose(-1, -2)) * scaling
    logits = logits.view(rows, keys.size(1), groups, count, -1)
    if visible is None:
        return logits.softmax(-1)
    seen = visible[:, :, None]
    weights = logits.masked_fill(~seen, -torch.inf).softmax(-1)
    return weights.masked_fill(~seen.any(-1, keepdim=True), 0.0)


def window_weights(view: LayerView) -> Tensor:
    """(B, Hkv, w, S) float32 attention of the newest queries over the slots, mean over the group's query heads."""
    return window_weights_by_head(view).mean(2)


def window_weights_by_head(view: LayerView) -> Tensor:
    """(B, Hkv, G, w, S) float32 attention of the newest queries over the slots."""
    assert view.queries is not None
    at = view.query_positions
    visible = (view.positions[:, :, None] <= at[:, None, :, None]) & view.filled[:, :, None]
    visible = visible & (at >= 0)[:, None, :, None]
    return grouped_weights(view.queries, view.keys, visible, view.scaling)
