"""Which calibration tokens matter: scores per token, scaled to a range, as weights of a quantiser's Hessian.

    s_j = sum_m sum_i A_mij                              attention that token j receives from all heads and queries
    r_j = r_min + (s_j - min s) / (max s - min s) (r_max - r_min)          per sequence
    w_j = r_j^p / mean(r^p)                              p = `power`, unit mean per sequence

Attention concentration is RSQ's choice; the norm of the input, its change over a layer, token counts, similarity and
positions are the other scores of its code, and any token credit of RL can stand in for them. Equal scores, or a single
token, give r_max to all: with equal importances the Hessian is the plain one.

Under the causal mask an early token is seen by more queries, and the first one is often a sink: it takes max s and
leaves the others near r_min. `share_above_middle` shows that; `clip` (quantiles) and `discount` (queries that can see
the token) are against it.

Source: arXiv 2503.01820 v1 and its official code, whose division by zero on equal scores is not repeated here. Left
out: binning of the scores, and zeroing of the lowest fraction.

Legend: B sequences, T columns, M heads, d width of the hidden states; `mask` is (B, T), 1 at valid tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from rltok.attention.probe import AttentionCall, Region, block_weights, check_mask, heads_at_once, run_probed

Discount = Literal["linear", "root"]
Score = Literal[
    "attention_concentration",
    "act_norm",
    "act_diff",
    "token_frequency",
    "token_similarity",
    "first_tokens",
    "first_and_last",
    "credit",
]
SCORES: tuple[Score, ...] = get_args(Score)


@dataclass(frozen=True)
class ImportanceSpec:
    """How importance is measured and scaled. `r_min = r_max` is plain GPTQ."""

    score: Score = "attention_concentration"
    """what importance is made of; "credit" reads the calibration's token credit"""
    r_min: float = 0.01
    """importance of a sequence's least token, 0 to r_max; 0.1 is better without rotation"""
    r_max: float = 1.0
    """importance of a sequence's first token, above 0"""
    power: int = 1
    """the Hessian's weight is r (1, official code) or r^2 (2, paper)"""
    discount: Discount | None = None
    """divide a score by the number of queries that can see the token ("linear"), or by its root ("root")"""
    clip: tuple[float, float] | None = None
    """(low, high) quantiles of a sequence's scores outside of which they are cut; None: no cut"""

    def __post_init__(self) -> None:
        if self.score not in SCORES:
            raise ValueError(f"score={self.score!r}; allowed: {', '.join(SCORES)}")
        check_range(self.r_min, self.r_max)
        _check_power(self.power)
        _check_discount(self.discount)
        _check_clip(self.clip)

    def scale(self, scores: Tensor, mask: Tensor | None = None) -> Tensor:
        """(B, T) importance of (B, T) scores: discount, quantiles, range."""
        return _finished(scores, mask, self.r_min, self.r_max, self.discount, self.clip)

    def weights(self, scores: Tensor, mask: Tensor | None = None) -> Tensor:
        """(B, T) weights of unit mean of (B, T) scores."""
        return unit_mean(self.scale(scores, mask), mask, self.power)


def attention_concentration(
    attn: Tensor,
    mask: Tensor | None = None,
    r_min: float = 0.01,
    r_max: float = 1.0,
    *,
    discount: Discount | None = None,
    clip: tuple[float, float] | None = None,
) -> Tensor:
    """Importance by the attention that a token receives: s_j = sum_m sum_i A_mij, scaled per sequence.

    Args:
        attn: (B, M, T, T) attention probabilities of a layer, queries first.
        mask: (B, T) 1 at valid tokens; the queries of others have no vote. None: all are valid.
        r_min, r_max: range of the importance.
        discount, clip: as in `ImportanceSpec`.

    Returns:
        (B, T) in [r_min, r_max], 0 at padding; r_max everywhere where all scores are equal.

    Raises:
        ValueError: shapes that do not fit, or settings out of range.

    Example: heads [[1, 0, 0], [.6, .4, 0], [.5, .2, .3]] and [[1, 0, 0], [.2, .8, 0], [.1, .1, .8]] with r_min = 0.1
    give s = 3.4, 1.5, 1.1 and r = 1, 0.256522, 0.1.
    Source: arXiv 2503.01820 v1, eq. 4.
    """
    if attn.dim() != 4 or attn.size(2) != attn.size(3):
        raise ValueError(f"attn has shape {tuple(attn.shape)}; allowed: (B, M, T, T)")
    return _finished(attention_received(attn, mask), mask, r_min, r_max, discount, clip)


def attention_received(attn: Tensor, mask: Tensor | None = None) -> Tensor:
    """(B, T) s_j of (B, M, T, T) attention probabilities: sums over heads and valid queries."""
    if mask is not None:
        attn = attn.masked_fill(~_valid(attn[:, 0, 0], mask)[:, None, :, None], 0.0)
    return _floating(attn).sum((1, 2))


def streamed_concentration(
    query: Tensor,
    key: Tensor,
    mask: Tensor | None = None,
    r_min: float = 0.01,
    r_max: float = 1.0,
    *,
    scaling: float | None = None,
    sliding_window: int | None = None,
    discount: Discount | None = None,
    clip: tuple[float, float] | None = None,
    block: int = 64,
    head_chunk: int | None = None,
) -> Tensor:
    """`attention_concentration` of causal attention from its queries and keys, without ever holding a (T, T) map.

    Args:
        query: (B, Hq, T, D) after norms and rotary.
        key: (B, Hkv, T, D), Hq a multiple of Hkv.
        mask: (B, T) 1 at valid tokens, one run of them per row. None: all are valid.
        r_min, r_max, discount, clip: as for `attention_concentration`.
        scaling: factor of the scores; None: D^-0.5.
        sliding_window: keys with t - s >= sliding_window are invisible; None: all causal keys are visible.
        block, head_chunk: query rows and key-value heads per step; memory and speed only.

    Returns:
        (B, T) as `attention_concentration`.
    """
    valid = query.new_ones((query.size(0), query.size(2)), dtype=torch.bool) if mask is None else mask.bool()
    scale = query.size(-1) ** -0.5 if scaling is None else scaling
    received = streamed_received(query, key, Region.from_masks(valid, valid), scale, sliding_window, block, head_chunk)
    return _finished(received, valid, r_min, r_max, discount, clip)


def streamed_received(
    query: Tensor,
    key: Tensor,
    region: Region,
    scaling: float,
    sliding_window: int | None = None,
    block: int = 64,
    head_chunk: int | None = None,
) -> Tensor:
    """(B, T) s_j from queries and keys, in blocks of query rows and chunks of heads.

    Args:
        query, key, scaling, sliding_window, block, head_chunk: as for `streamed_concentration`.
        region: the masks, with all valid tokens as response.

    Returns:
        (B, T) float32 (float64 for float64 queries); the largest tensor on the way has B x heads x block x T elements.
    """
    rows, n_query, width, _ = query.shape
    n_key = key.size(1)
    groups = n_query // n_key
    dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
    total = query.new_zeros((rows, width), dtype=dtype)
    lines = min(block, region.end_row - region.first_row)
    chunk = min(n_key, head_chunk or heads_at_once(query.device.type, rows * groups * lines * width))
    size = rows * chunk * groups * lines * width
    scratch = query.new_empty(size, dtype=dtype), query.new_empty(size, dtype=dtype)
    for first in range(0, n_key, chunk):
        keys = key[:, first : first + chunk].to(dtype).masked_fill(~region.valid[:, None, :, None], 0.0).contiguous()
        queries = query[:, first * groups : (first + keys.size(1)) * groups]
        for start in range(region.first_row, region.end_row, block):
            stop = min(start + block, region.end_row)
            near = replace(region, last_left_pad=min(region.last_left_pad, stop))  # columns behind a block are hidden
            part, first_key = block_weights(queries, keys, scaling, sliding_window, near, start, stop, scratch)
            votes = region.valid[:, start:stop].to(dtype)[:, None, None]
            total[:, first_key:stop] += torch.matmul(votes, part).sum((1, 2))
    return total.masked_fill_(~region.valid, 0.0)


def call_received(call: AttentionCall, region: Region, block: int = 64) -> Tensor:
    """(B, T) s_j of one probed attention layer.

    Raises:
        UnprobeableAttentionError: the layer's mask is not the causal one that the sums assume.
    """
    check_mask(call, region, block)
    return streamed_received(call.query, call.key, region, call.scaling, call.sliding_window, block)


def model_received(
    model: nn.Module, input_ids: Tensor, attention_mask: Tensor, layers: Sequence[int], block: int = 64
) -> dict[int, Tensor]:
    """s_j of several layers of a causal language model, from one pass as it is.

    Args:
        model: as for `rltok.attention.attention_statistics`.
        input_ids, attention_mask: (B, T), valid tokens contiguous.
        layers: indices of the layers.
        block: query rows per step.

    Returns:
        Layer -> (B, T) attention received, 0 at padding.

    Raises:
        UnprobeableAttentionError: attention that cannot be rebuilt from queries and keys.
    """
    region = Region.from_masks(attention_mask, attention_mask)
    found: dict[int, Tensor] = {}

    def collect(call: AttentionCall) -> None:
        found[call.layer] = call_received(call, region, block)

    run_probed(model, input_ids, attention_mask, layers, collect)
    missing = [layer for layer in layers if layer not in found]
    if missing:
        raise ValueError(f"layers {missing} never called transformers' attention interface; choose other layers")
    return found


def scale_to_range(scores: Tensor, mask: Tensor | None = None, r_min: float = 0.01, r_max: float = 1.0) -> Tensor:
    """Min-max scaling per sequence.

    Args:
        scores: (B, T) finite at valid tokens.
        mask: (B, T); None: all are valid.
        r_min, r_max: 0 <= r_min <= r_max, r_max > 0.

    Returns:
        (B, T) in [r_min, r_max]; 0 at padding; r_max where a sequence's scores are equal up to rounding.

    Raises:
        ValueError: the range, or a score that is not finite.
    """
    check_range(r_min, r_max)
    valid = _valid(scores, mask)
    scores = _floating(scores).masked_fill(~valid, 0.0)
    if not bool(scores.isfinite().all()):
        raise ValueError("a score of a valid token is not finite; check the hidden states or the mask")
    low, high = _extremes(scores, valid)
    span = high - low
    # Sums that differ in the last bits are equal: stretching their noise to the whole range would make up importance.
    equal = span <= 16 * torch.finfo(scores.dtype).eps * torch.maximum(low.abs(), high.abs())
    unit = ((scores - low) / span.masked_fill(equal, 1.0)).clamp(0, 1)
    scaled = (r_min + unit * (r_max - r_min)).clamp(r_min, r_max)
    return torch.where(equal, r_max, scaled).masked_fill(~valid, 0.0)


def unit_mean(r: Tensor, mask: Tensor | None = None, power: int = 1) -> Tensor:
    """Weights w = r^p / mean(r^p) over the valid tokens of a sequence; scaling r changes nothing.

    Args:
        r: (B, T) or (T,) importance, not negative.
        mask: of the same shape; None: all are valid.
        power: 1 (official code) or 2 (paper).

    Returns:
        Weights of the shape of r, mean 1 per sequence with some importance, exactly 1 where all r are equal, 0 at
        padding.

    Raises:
        ValueError: a power other than 1 or 2, a negative or not finite importance.

    Example: r = 1, 0.256522, 0.1 gives 2.211538, 0.567308, 0.221154.
    """
    _check_power(power)
    valid = _valid(r, mask)
    r = _floating(r).masked_fill(~valid, 0.0)
    if not bool((r.isfinite() & (r >= 0)).all()):
        raise ValueError("an importance is negative or not finite; allowed: finite and >= 0")
    largest = r.amax(-1, keepdim=True)
    r = (r / largest.masked_fill(largest == 0, 1.0)) ** power  # equal r become exactly 1, so their mean does too
    mean = r.sum(-1, keepdim=True) / valid.sum(-1, keepdim=True).clamp(min=1)
    return r / mean.masked_fill(mean == 0, 1.0)


def from_credit(credit: Tensor, mask: Tensor | None = None, r_min: float = 0.01, r_max: float = 1.0) -> Tensor:
    """Importance by the size of a token's credit: |A_t|, scaled per sequence.

    Args:
        credit: (B, T) token advantages or other credit; 0 where there is none, as at prompts.
        mask, r_min, r_max: as for `scale_to_range`.

    Returns:
        (B, T); a sequence without any credit gets r_max everywhere and counts as in plain GPTQ.
    """
    return scale_to_range(credit.abs(), mask, r_min, r_max)


def act_norm(x: Tensor) -> Tensor:
    """(B, T) norm of the (B, T, d) layer inputs."""
    return _floating(x).norm(dim=-1)


def act_diff(x: Tensor, y: Tensor) -> Tensor:
    """(B, T) -||x - y|| of a layer's inputs and outputs (B, T, d): tokens that a layer leaves alone score high."""
    return -(_floating(x) - _floating(y)).norm(dim=-1)


def token_frequency(input_ids: Tensor, counts: Tensor) -> Tensor:
    """(B, T) minus the number of times a token occurs in the calibration set.

    Args:
        input_ids: (B, T).
        counts: (V,) occurrences per token id, of `count_tokens`.
    """
    return -counts[input_ids].to(torch.float64 if counts.dtype == torch.float64 else torch.float32)


def count_tokens(input_ids: Tensor, mask: Tensor | None, vocab_size: int) -> Tensor:
    """(V,) int64 occurrences of each id at valid tokens."""
    return torch.bincount(input_ids[_valid(input_ids, mask)], minlength=vocab_size)


def token_similarity(x: Tensor, mask: Tensor | None = None) -> Tensor:
    """(B, T) mean_j ||x_t - x_j||^2 over the valid tokens j of the sequence, of (B, T, d) hidden states.

    From the mean of the sequence instead of all pairs: ||x_t - m||^2 + mean_j ||x_j - m||^2.
    """
    valid = _valid(x[..., 0], mask)
    x = _floating(x).masked_fill(~valid[..., None], 0.0)
    count = valid.sum(-1, keepdim=True).clamp(min=1)
    mean = x.sum(1, keepdim=True) / count[..., None]
    squared = (x - mean).pow(2).sum(-1).masked_fill(~valid, 0.0)
    return (squared + squared.sum(-1, keepdim=True) / count).masked_fill(~valid, 0.0)


def first_tokens(mask: Tensor, share: float = 1 / 8) -> Tensor:
    """(B, T) 1 at the first `share` of a sequence's valid tokens (rounded up), else 0."""
    if not 0 < share <= 1:
        raise ValueError(f"share={share}; allowed: above 0, at most 1")
    order, length = _places(mask)
    return ((order < (length * share).ceil()) & mask.bool()).to(torch.float32)


def first_and_last(mask: Tensor, chunks: int = 32) -> Tensor:
    """(B, T) 1 in the first and the last of `chunks` equal parts (rounded up) of a sequence's valid tokens, else 0."""
    if chunks < 2:
        raise ValueError(f"chunks={chunks}; allowed: >= 2")
    order, length = _places(mask)
    part = (length / chunks).ceil()
    return (((order < part) | (order >= length - part)) & mask.bool()).to(torch.float32)


def discounted(scores: Tensor, mask: Tensor | None = None, kind: Discount = "linear") -> Tensor:
    """Scores per query that can see the token: divided by T - j ("linear") or its root ("root").

    Args:
        scores: (B, T).
        mask: (B, T); T - j counts valid tokens from j on.
        kind: which.

    Returns:
        (B, T).
    """
    _check_discount(kind)
    seen_by = _valid(scores, mask).long().flip(-1).cumsum(-1).flip(-1).clamp(min=1).to(_floating(scores).dtype)
    return scores / (seen_by if kind == "linear" else seen_by.sqrt())


def clip_quantiles(scores: Tensor, mask: Tensor | None = None, low: float = 0.0, high: float = 1.0) -> Tensor:
    """Cut the scores of a sequence at two of its own quantiles (linear interpolation); (0, 1) changes nothing.

    Args:
        scores: (B, T).
        mask: (B, T); padding does not count.
        low, high: 0 <= low < high <= 1.

    Returns:
        (B, T).
    """
    _check_clip((low, high))
    valid = _valid(scores, mask)
    scores = _floating(scores).masked_fill(~valid, 0.0)
    cut = scores.clone()
    for row, keep in enumerate(valid):
        if bool(keep.any()):
            bounds = torch.quantile(scores[row][keep], scores.new_tensor([low, high]))
            cut[row] = scores[row].clamp(bounds[0], bounds[1])
    return cut


def share_above_middle(r: Tensor, mask: Tensor | None = None, r_min: float = 0.01, r_max: float = 1.0) -> Tensor:
    """Share of the valid tokens with r above (r_min + r_max) / 2, a scalar; near 0: a sink took all the range."""
    valid = _valid(r, mask)
    above = (r > (r_min + r_max) / 2) & valid
    return above.sum() / valid.sum().clamp(min=1)


def expand_by_rolls(values: Tensor, mask: Tensor | None = None, factor: int = 8) -> Tensor:
    """Dataset expansion: every sequence also rolled by k L / factor, so that each token stands at many positions.

    Args:
        values: (B, T) token ids, or credit that belongs to them.
        mask: (B, T); the L valid tokens of a row are rolled, padding stays. None: L = T.
        factor: 1 (no expansion) or more.

    Returns:
        (factor B, T): all rows rolled by 0, then all rows rolled by L // factor, ...

    Raises:
        ValueError: a factor below 1.
    """
    if factor < 1:
        raise ValueError(f"factor={factor}; allowed: >= 1 (1 is no expansion)")
    valid = _valid(values, mask)
    order, length = _places(valid)
    order, length = order.long(), length.long()
    first = valid.long().argmax(-1, keepdim=True)
    rolled = []
    for k in range(factor):
        source = first + (order - k * length // factor) % length.clamp(min=1)
        rolled.append(torch.where(valid, values.gather(-1, source.clamp(max=values.size(-1) - 1)), values))
    return torch.cat(rolled)


def check_range(r_min: float, r_max: float) -> None:
    """Refuse a range of importance that cannot weigh tokens."""
    if not (0 <= r_min <= r_max and 0 < r_max < float("inf")):
        raise ValueError(f"r_min={r_min}, r_max={r_max}; allowed: 0 <= r_min <= r_max, 0 < r_max, both finite")


def _finished(
    scores: Tensor,
    mask: Tensor | None,
    r_min: float,
    r_max: float,
    discount: Discount | None,
    clip: tuple[float, float] | None,
) -> Tensor:
    if discount is not None:
        scores = discounted(scores, mask, discount)
    if clip is not None:
        scores = clip_quantiles(scores, mask, *clip)
    return scale_to_range(scores, mask, r_min, r_max)


def _valid(values: Tensor, mask: Tensor | None) -> Tensor:
    """Bool of the shape of `values`."""
    if mask is None:
        return torch.ones_like(values, dtype=torch.bool)
    if mask.shape != values.shape:
        raise ValueError(f"mask has shape {tuple(mask.shape)}; allowed: {tuple(values.shape)}, that of the tokens")
    return mask.to(values.device).bool()


def _floating(values: Tensor) -> Tensor:
    return values if values.dtype == torch.float64 else values.float()


def _extremes(scores: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
    """Smallest and largest valid score of each row, (B, 1); 0 and 0 in a row without."""
    empty = ~valid.any(-1, keepdim=True)
    low = scores.masked_fill(~valid, torch.inf).amin(-1, keepdim=True)
    high = scores.masked_fill(~valid, -torch.inf).amax(-1, keepdim=True)
    return low.masked_fill(empty, 0.0), high.masked_fill(empty, 0.0)


def _places(mask: Tensor) -> tuple[Tensor, Tensor]:
    """(B, T) place of each token among the valid ones of its row, and (B, 1) their number; float64."""
    valid = mask.bool().to(torch.float64)
    return valid.cumsum(-1) - 1, valid.sum(-1, keepdim=True)


def _check_power(power: int) -> None:
    if power not in (1, 2):
        raise ValueError(f"power={power}; allowed: 1 (weight r, official code) or 2 (weight r^2, paper)")


def _check_discount(kind: str | None) -> None:
    if kind not in (None, *get_args(Discount)):
        raise ValueError(f"discount={kind!r}; allowed: None, {', '.join(get_args(Discount))}")


def _check_clip(clip: tuple[float, float] | None) -> None:
    if clip is not None and not 0 <= clip[0] < clip[1] <= 1:
        raise ValueError(f"clip={clip}; allowed: None, or quantiles 0 <= low < high <= 1")
