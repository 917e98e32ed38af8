"""Keys that move: rotary positions of cached keys shifted by whole numbers, without the text they came from.

A rotary key at position p is R(p f) k, one plane rotated per frequency f, so R((p + d) f) k = R(d f) R(p f) k: a cached
key moves by d when it is rotated by d f. A scale that the model puts on its cosines and sines (`attention_scaling` of
YaRN) is inside the cached key already, so the rotation here is a pure one.

With `positions: cache` slot j of the S slots of a row sits at position last - (S - 1) + j after every cut, `last` being
the row's newest token. Queries then need not change, new tokens come behind, and between cuts nothing moves. Slots are
consecutive before a cut as well, so how far a kept slot moves follows from its place alone.

Every move rounds once to the dtype of the cache: in bfloat16 a key that was moved 100 times is off by 1.7 % of its
norm, once moved by 0.15 %, which is the rounding of the dtype itself (in float32 2e-6 and 4e-8). A large `interval`
moves less often.

Frequencies come from a configuration. That the model's own attention rotates its keys this way (halves of the head, all
of it or its front) is tried out once per configuration on an attention module of one head.

Source: StreamingLLM, arXiv 2309.17453, Sec. 3.2 (positions inside the cache); RoFormer, arXiv 2104.09864 (rotation).
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModel

from rltok.fast.serve import MOVING_ROPE, rope_types

_TRIED = (3, 11, 40)
"""positions at which an attention module is tried"""


def rotate_keys(keys: Tensor, delta: Tensor | int, inv_freq: Tensor) -> Tensor:
    """Keys as the model would have rotated them `delta` positions further on.

        (a, b) -> (a cos x - b sin x, b cos x + a sin x),    x = delta * inv_freq

    over the two halves a, b of the rotary part of a head. delta = 0 changes no bit.

    Args:
        keys: (..., S, D) rotated already, with or without the model's `attention_scaling`.
        delta: whole positions, broadcastable to (..., S).
        inv_freq: (r,) frequencies in radians per position; dimensions from 2 r on are not rotary and stay.

    Returns:
        (..., S, D) in the dtype of the keys, computed in float32 (float64 for float64 keys).

    Raises:
        ValueError: more frequencies than the head has planes.
    """
    half = inv_freq.numel()
    if 2 * half > keys.size(-1):
        raise ValueError(f"inv_freq has {half} frequencies, more than half of the head size {keys.size(-1)}")
    kind = torch.promote_types(keys.dtype, torch.float32)
    moved = torch.as_tensor(delta, device=keys.device).to(kind)
    angle = moved[..., None] * inv_freq.to(keys.device, kind)
    cos, sin = angle.cos(), angle.sin()
    first, second = keys[..., :half].to(kind), keys[..., half : 2 * half].to(kind)
    rotated = [(first * cos - second * sin).to(keys.dtype), (second * cos + first * sin).to(keys.dtype)]
    return torch.cat([*rotated, keys[..., 2 * half :].expand(*rotated[0].shape[:-1], -1)], -1)


def moves(kept: Tensor, width: int) -> Tensor:
    """How far kept slots move to become the last ones, consecutive: (width - C) + j - kept_j, never negative.

    Args:
        kept: (..., C) ascending indices into `width` slots that sit at consecutive positions.
        width: S, slots before the cut.

    Returns:
        (..., C) positions.
    """
    count = kept.size(-1)
    return width - count + torch.arange(count, device=kept.device) - kept


def layer_inv_freq(config: Any, layer: int) -> Tensor:
    """(r,) frequencies of a layer's rotary keys; empty where the layer gives its keys no position.

    Args:
        config: of a model of transformers or its decoder.
        layer: number of an attention layer.

    Raises:
        ValueError: a rope type whose frequencies depend on the length, keys that are not rotary or rotated in another
            way than `rotate_keys` does, or a model that cannot be tried out.
    """
    return model_inv_freq(config)[layer]


def model_inv_freq(config: Any) -> tuple[Tensor, ...]:
    """`layer_inv_freq` of every layer; an empty tensor too for layers that are no attention."""
    decoder = config.get_text_config(decoder=True)
    refuse_length_dependent(decoder)
    text = decoder.to_json_string(use_diff=False)
    if text not in _FOUND:
        _FOUND[text] = _tried_layers(decoder)
    return _FOUND[text]


def refuse_length_dependent(config: Any) -> None:
    """Raises ValueError where the frequencies change with the length: a cached key then has no position of its own."""
    kinds = rope_types(config)
    if not kinds:
        raise _refusal(config, "it has no rotary keys (no rope_parameters)")
    moving = sorted(kinds & MOVING_ROPE)
    if moving:
        raise _refusal(config, f"its frequencies depend on the length of the text (rope_type={moving[0]!r})")


def place_in_cache(layers: Sequence[Any], config: Any) -> None:
    """Give layers of a cache (`index`, `inv_freq`) what they need to move their keys; see `layer_inv_freq`."""
    found = model_inv_freq(config)
    for layer in layers:
        layer.inv_freq = found[layer.index] if found[layer.index].numel() else None


def _refusal(config: Any, why: str) -> ValueError:
    return ValueError(f"positions='cache' does not serve {config.model_type!r}: {why}; set `positions: original`")


# ---- what a model does to its keys


_FOUND: dict[str, tuple[Tensor, ...]] = {}
"""configuration -> frequencies of its layers"""


def _tried_layers(config: Any) -> tuple[Tensor, ...]:
    """Frequencies of every layer, from a model of one head whose attention modules are tried one by one."""
    small = _one_head(config)
    try:
        with torch.device("meta"), torch.random.fork_rng(devices=[]):
            model = AutoModel.from_config(small, attn_implementation="eager")
        rotary = type(model.rotary_emb)(config=small)
    except Exception as error:
        raise _refusal(config, f"its rotary embedding was not found ({type(error).__name__}: {error})") from error
    kinds = getattr(small, "layer_types", None) or [None] * small.num_hidden_layers
    modules = _attentions(model)
    return tuple(
        _tried(config, modules[layer], rotary, kinds[layer]) if layer in modules else torch.zeros(0)
        for layer in range(small.num_hidden_layers)
    )


def _one_head(config: Any) -> Any:
    """The same with one head and the smallest hidden size."""
    small = copy.deepcopy(config)
    small.head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    small.num_attention_heads = small.num_key_value_heads = 1
    small.hidden_size = small.head_dim
    small.pad_token_id = None
    return small


def _attentions(model: nn.Module) -> dict[int, nn.Module]:
    """Layer -> its attention module."""
    found: dict[int, nn.Module] = {}
    for module in model.modules():
        index = getattr(module, "layer_idx", None)
        if type(module).__name__.endswith("Attention") and isinstance(index, int):
            found.setdefault(index, module)
    return found


class _KeysFound(Exception):
    def __init__(self, keys: Tensor) -> None:
        super().__init__()
        self.keys = keys


class _Catch:
    """A cache that ends the forward pass with the keys that it is given."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> None:
        raise _KeysFound(key_states)


def _tried(config: Any, module: nn.Module, rotary: Any, kind: str | None) -> Tensor:
    """Frequencies by which the module's keys move, after a look at keys of it."""
    own = getattr(rotary, f"{kind}_inv_freq", None)
    inv_freq = (own if own is not None else rotary.inv_freq).detach().float().clone()
    generator = torch.Generator().manual_seed(0)
    module = module.to_empty(device="cpu").float()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
        hidden = torch.randn(1, 1, _width(module), generator=generator).expand(1, len(_TRIED), -1)
        at = torch.tensor([_TRIED])
        options = {"layer_type": kind} if own is not None else {}
        try:
            turns, start = (rotary(hidden, positions, **options) for positions in (at, at * 0))
            keys, origin = (_keys(module, hidden, turn) for turn in (turns, start))
        except Exception as error:
            raise _refusal(config, f"its attention cannot be tried ({type(error).__name__}: {error})") from error
    if torch.equal(keys, origin):
        return torch.zeros(0)
    if keys.dim() != 4 or not torch.allclose(rotate_keys(origin, at, inv_freq), keys, rtol=1e-4, atol=1e-4):
        raise _refusal(config, "it does not rotate its keys by halves of the head")
    return inv_freq


def _width(module: nn.Module) -> int:
    """Input size of an attention module."""
    return next(part.in_features for part in module.modules() if isinstance(part, nn.Linear))


def _keys(module: nn.Module, hidden: Tensor, turn: Any) -> Tensor:
    try:
        module(hidden_states=hidden, position_embeddings=turn, attention_mask=None, past_key_values=_Catch())
    except _KeysFound as found:
        return found.keys
    raise RuntimeError("no keys were cached")
