"""KVCOMM: keys and values of a text that is read again after another prefix, estimated from stored examples.

A shared text (a question, another agent's answer) has a base: its keys and values computed once, at position 0 and
without what a reader puts before it. An anchor is an example of the same place in the same reader's prompt that was
computed densely: its base, and what the prefix did to it. For a new text the offsets of the anchors are averaged,

    K' = K_base + sum_a w_a dK_a          dK_a = K_real - K_base of anchor a    (values alike, with their own weights)
    w_ta = softmax_a( -mean over layers, batch, heads, channels of |K_base - K_a| )   a weight per token t
    v_a  = softmax_a( -||K_base - K_a||_2 over the last T tokens )                    per layer, head, channel

w for the text, v for the fixed segment behind it. Layer 0 is left as it is: nothing before a token changes its keys and
values there. Whether to trust the anchors is decided on the values V of the base,

    p = softmax_a( -||V - V_a||_2 ),    a new anchor is wanted if A < 2 or entropy_2(p) > gamma log2(A)

This is an approximation: the sampler is another distribution than the learner, and its rollouts need the correction of
`rltok.correction`. One anchor with K_a = K_base gives base + d exactly, d = 0 the base. All of it belongs to one state
of the weights: `flush` at every optimizer step (`flush_on_step`), or the offsets of a model that is gone are used.

Other than in the released code, bases and offsets are kept at position 0, so that anchors from other places in the
prompt fit; the pool is never larger than its limit, where the code lets one more in; and uses are counted for the
smallest set of anchors that reaches 0.9 of p, where the code leaves out the anchor that crosses it, and counts all
anchors when the first one alone is above it.

Source: KVCOMM, arXiv 2510.12872, by its released code (`offset_kv_cache_pair`, `predict_as_anchor`).
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor


class KV(NamedTuple):
    """Keys and values of some tokens in all layers: two tensors (L, B, Hkv, T, D)."""

    keys: Tensor
    values: Tensor

    @property
    def tokens(self) -> int:
        """T."""
        return self.keys.size(-2)

    def span(self, start: int, end: int | None = None) -> KV:
        """Tokens start .. end-1, as views."""
        return KV(self.keys[..., start:end, :], self.values[..., start:end, :])

    def minus(self, other: KV) -> KV:
        """Differences."""
        return KV(self.keys - other.keys, self.values - other.values)


def joined(parts: Sequence[KV]) -> KV:
    """Tokens of all parts, one after the other."""
    return KV(torch.cat([part.keys for part in parts], -2), torch.cat([part.values for part in parts], -2))


# ---- weights and offsets


def placeholder_weights(base: Tensor, anchors: Sequence[Tensor] | Tensor, temperature: float = 1.0) -> Tensor:
    """softmax over anchors of -mean |base - anchor| / temperature, one weight per token.

    Args:
        base: (L, B, Hkv, T, D) keys or values of the new text.
        anchors: A of (L, B, Hkv, >= T, D) at the same positions; their first T tokens count.

    Returns:
        (A, T) float32 or wider, sums over A are 1.

    Example: base 0 and anchors at distance 0.1 and 1.0 give 0.71095 and 0.28905 at every token.
    """
    stacked = _wide(torch.stack([_first(anchor, base) for anchor in anchors]))
    distance = (_wide(base) - stacked).abs().mean(dim=(1, 2, 3, 5))
    return torch.softmax(-distance / temperature, dim=0)


def following_weights(base: Tensor, anchors: Sequence[Tensor] | Tensor, temperature: float = 1.0) -> Tensor:
    """softmax over anchors of -||base - anchor||_2 / temperature over the last T tokens, per layer, head and channel.

    These weigh the offsets of the fixed segment behind the placeholder.

    Args:
        base: (L, B, Hkv, T, D) keys or values of the new text.
        anchors: A of (L, B, Hkv, >= T, D).

    Returns:
        (A, L, B, Hkv, 1, D) float32 or wider, sums over A are 1.
    """
    stacked = torch.stack([_check(anchor, base)[..., anchor.size(-2) - base.size(-2) :, :] for anchor in anchors])
    distance = (_wide(base) - _wide(stacked)).norm(dim=-2, keepdim=True)
    return torch.softmax(-distance / temperature, dim=0)


def interpolate(base: Tensor, deltas: Sequence[Tensor] | Tensor, weights: Tensor) -> Tensor:
    """base + sum_a w_a delta_a in every layer but the first.

    Args:
        base: (L, B, Hkv, T, D).
        deltas: A of (L, B, Hkv, >= T, D), what the prefix added to each anchor; their first T tokens count.
        weights: (A, T) of `placeholder_weights`, or (A, L, B, Hkv, 1, D) of `following_weights`.

    Returns:
        (L, B, Hkv, T, D) in the dtype of the base; layer 0 is the base.

    Example: base 0, deltas +1 and -1 with weights 0.71095 and 0.28905 give 0.42190, in layer 0 0.
    """
    stacked = _wide(torch.stack([_first(delta, base) for delta in deltas]))
    shaped = weights[:, None, None, None, :, None] if weights.dim() == 2 else weights
    total = _wide(base) + (shaped.to(stacked.device) * stacked).sum(0)
    return torch.cat([base[:1], total[1:].to(base.dtype)])


def _wide(x: Tensor) -> Tensor:
    """In float32 at least."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _check(anchor: Tensor, base: Tensor) -> Tensor:
    if anchor.size(-2) < base.size(-2):
        raise ValueError(f"an anchor of {anchor.size(-2)} tokens is shorter than the text of {base.size(-2)}")
    return anchor


def _first(anchor: Tensor, base: Tensor) -> Tensor:
    return _check(anchor, base)[..., : base.size(-2), :]


# ---- decision


class Decision(NamedTuple):
    """Whether the anchors at hand are good enough for a text."""

    new_anchor: bool
    """compute it densely and store it"""
    entropy: float
    """of p in bits; infinite without two anchors"""
    p: Tensor
    """(A,) share of every anchor"""


def predict_as_anchor(values: Tensor, anchors: Sequence[Tensor] | Tensor, gamma: float = 0.3) -> Decision:
    """A new anchor is wanted if there are fewer than two, or if p is too even: entropy_2(p) > gamma log2(A).

    Args:
        values: (L, B, Hkv, T, D) of the new text's base.
        anchors: A of (L, B, Hkv, >= T, D), values of the bases of the anchors.
        gamma: share of the largest possible entropy.

    Example: 2 layers x 2 tokens x 1 channel, values 0: anchors 0.1 and 1.0 have entropy 0.58907 (new anchor at gamma
    0.3), anchors 0.1 and 5.0 have 0.00086 (reuse).
    """
    if len(anchors) < 2:
        return Decision(True, math.inf, torch.ones(len(anchors)))
    stacked = _wide(torch.stack([_first(anchor, values) for anchor in anchors]))
    distance = (_wide(values) - stacked).flatten(1).norm(dim=1)
    p = torch.softmax(-distance, dim=0)
    entropy = float(-torch.special.xlogy(p, p).sum() / math.log(2))
    return Decision(entropy > gamma * math.log2(len(anchors)), entropy, p)


def used_anchors(p: Tensor, top_p: float = 0.9) -> list[int]:
    """The fewest anchors whose shares sum to `top_p`, the largest first."""
    shares, order = p.sort(descending=True, stable=True)
    count = int((shares.cumsum(0) < top_p).sum()) + 1
    return order[:count].tolist()


# ---- pool


@dataclass(frozen=True)
class Anchor:
    """An example of a placeholder that was computed densely; everything at position 0."""

    base: KV
    """of the text, without its prefix"""
    offset: KV
    """dK, dV: what the prefix added to it"""
    following: KV
    """the same of the fixed segment behind it"""


@dataclass
class _Kept:
    anchor: Anchor
    uses: int = 0


class Flushable(Protocol):
    """Something that holds keys and values of one state of the weights."""

    def flush(self) -> None:
        """Forget them."""


class KVAnchorPool:
    """Anchors by placeholder, for one state of the weights; a pool belongs to one process.

    Args:
        gamma: entropy threshold as a share of log2(A); 1 reuses whenever there are two anchors.
        max_anchors: of a placeholder; beyond, one of the oldest goes.
        window: of so many oldest anchors the least used one goes.
        top_p: share of p whose anchors count as used.

    Raises:
        ValueError: numbers outside their range.
    """

    def __init__(self, gamma: float = 0.3, max_anchors: int = 20, window: int = 5, top_p: float = 0.9) -> None:
        for name, share in (("gamma", gamma), ("top_p", top_p)):
            if not 0 <= share <= 1:
                raise ValueError(f"{name}={share} is not in [0, 1]")
        for name, count, least in (("max_anchors", max_anchors, 2), ("window", window, 1)):
            if count < least:
                raise ValueError(f"{name}={count} must be >= {least}")
        self.gamma, self.max_anchors, self.window, self.top_p = gamma, max_anchors, window, top_p
        self.version = 0
        """how often the pool was flushed"""
        self._step: int | None = None
        self._kept: dict[Hashable, dict[Hashable, _Kept]] = {}

    def __len__(self) -> int:
        """Anchors of all placeholders."""
        return sum(map(len, self._kept.values()))

    @property
    def nbytes(self) -> int:
        """Bytes of all anchors; a base that two anchors share is counted twice."""
        held = [kept.anchor for place in self._kept.values() for kept in place.values()]
        return sum(x.nbytes for anchor in held for kv in (anchor.base, anchor.offset, anchor.following) for x in kv)

    def uses(self, placeholder: Hashable) -> dict[Hashable, int]:
        """Text -> times that its anchor was among the used ones, the oldest first."""
        return {text: kept.uses for text, kept in self._kept.get(placeholder, {}).items()}

    def add(self, placeholder: Hashable, text: Hashable, anchor: Anchor) -> None:
        """Store an example; the same text again replaces it. Beyond the limit one of the oldest goes."""
        place = self._kept.setdefault(placeholder, {})
        if text in place:
            place[text].anchor = anchor
            return
        if len(place) >= self.max_anchors:
            oldest = list(place)[: self.window]
            del place[min(oldest, key=lambda name: place[name].uses)]
        place[text] = _Kept(anchor)

    def usable(self, placeholder: Hashable, tokens: int, following: int) -> list[tuple[Hashable, Anchor]]:
        """Anchors at least as long as a text, whose following segment covers that of the text."""
        return [
            (text, kept.anchor)
            for text, kept in self._kept.get(placeholder, {}).items()
            if kept.anchor.base.tokens >= tokens and kept.anchor.following.tokens >= following
        ]

    def decide(self, placeholder: Hashable, base: KV, following: int) -> Decision:
        """`predict_as_anchor` for a text with this base before `following` fixed tokens."""
        found = self.usable(placeholder, base.tokens, following)
        return predict_as_anchor(base.values, [anchor.base.values for _, anchor in found], self.gamma)

    def correct(self, placeholder: Hashable, base: KV, following: KV) -> tuple[KV, KV]:
        """The text and the fixed segment behind it as after this reader's prefix, estimated; counts uses.

        Raises:
            ValueError: fewer than two anchors, see `decide`.
        """
        found = self.usable(placeholder, base.tokens, following.tokens)
        p = predict_as_anchor(base.values, [anchor.base.values for _, anchor in found], self.gamma).p
        if len(found) < 2:
            raise ValueError(f"placeholder {placeholder!r} has {len(found)} usable anchors; at least 2 are needed")
        for index in used_anchors(p, self.top_p):
            self._kept[placeholder][found[index][0]].uses += 1
        anchors = [anchor for _, anchor in found]
        return _corrected(base, following, anchors)

    def flush(self) -> None:
        """Forget all anchors: they belong to weights that have changed."""
        self._kept.clear()
        self.version += 1

    def sync(self, step: int) -> None:
        """Flush if `step`, the number of optimizer steps so far, is another one than at the last call."""
        if self._step is not None and step != self._step:
            self.flush()
        self._step = step


def _corrected(base: KV, following: KV, anchors: Sequence[Anchor]) -> tuple[KV, KV]:
    """Text and following segment; keys and values have weights of their own."""
    text, behind = [], []
    for side in (0, 1):
        bases = [anchor.base[side] for anchor in anchors]
        text.append(
            interpolate(base[side], [anchor.offset[side] for anchor in anchors], placeholder_weights(base[side], bases))
        )
        behind.append(
            interpolate(
                following[side], [anchor.following[side] for anchor in anchors], following_weights(base[side], bases)
            )
        )
    return KV(*text), KV(*behind)


def flush_on_step(optimizer: torch.optim.Optimizer, *stores: Flushable) -> Any:
    """Flush after every step of an optimizer; the handle's `remove` ends it."""

    def flush(*_: Any) -> None:
        for store in stores:
            store.flush()

    return optimizer.register_step_post_hook(flush)
