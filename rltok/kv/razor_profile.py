"""Retrieval heads of RazorAttention: key-value heads that look back at earlier copies of what they read.

On a text of K random tokens repeated several times, with A the attention weights of one query head after rotary
positions, i a token of a later copy and j an earlier token that equals it (j = i - K, i - 2K, ...)

    echo      = mean over all pairs (i, j) of A_ij            the head looks at the token itself
    induction = mean over all pairs (i, j) of A_i,j+1         the head looks at what came after it

A key-value head has the best score of its query heads. Over all layers, the best `round(n * 0.01)` of the n key-value
heads by echo and the best `round(n * 0.14)` by induction are the retrieval heads, which keep every token.

Queries and keys are read while the model runs, one layer at a time, and only the diagonals of pairs are kept: never a
map of all heads. Layers with a sliding window are left out: no policy cuts them, and they do not count in n.

Source: arXiv 2407.15891 v1, Secs. 3.2 and 3.3, Table 2. Some other implementations count the nearest copy alone
(`nearest`), or score projections without rotary positions and query norms, which ranks other heads. Left out: models
with ALiBi, whose heads the paper ranks by their slopes.

Legend: H query heads, Hkv key-value heads, D head size, K tokens of a copy, F tokens in front of the first copy,
T = F + copies K, L layers, n key-value heads of all layers that are ranked.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from rltok.attention.probe import AttentionCall, evaluating, language_model, probing, text_config
from rltok.fast.cache import layer_windows
from rltok.fast.serve import forward_arguments

ECHO_SHARE = 0.01
INDUCTION_SHARE = 0.14
"""shares of the paper's Table 2"""
BLOCK_ELEMENTS = 2**22
"""scores held at once"""

_log = logging.getLogger(__name__)

Scores = Sequence[Sequence[float] | None]


def retrieval_scores(attention: Tensor, k: int, first: int = 0, *, nearest: bool = False) -> tuple[Tensor, Tensor]:
    """Echo and induction of every head, from whole attention maps.

        echo = mean over (i, j) of A_ij,    induction = mean over (i, j) of A_i,j+1

    Args:
        attention: (H, T, T) causal weights over a text of T = first + copies k tokens.
        k: tokens of a copy.
        first: tokens in front of the first copy.
        nearest: pairs with the last earlier copy alone; else with every earlier copy.

    Returns:
        (H,) echo and (H,) induction.

    Raises:
        ValueError: a text without a second copy, or of another length.

    Example: rows [1], [.5, .5], [.7, .1, .2], [.1, .6, .2, .1] and k = 2: echo (.7 + .6) / 2 = 0.65, induction
    (.1 + .2) / 2 = 0.15.
    """
    width = attention.size(-1)
    _check_copies(width, k, first)
    echo, induction = (attention.new_zeros(attention.size(0)) for _ in range(2))
    columns, real = _pairs(first + k, width, k, first, nearest, attention.device)
    rows = attention[:, first + k :]
    echo += _picked(rows, columns, real).sum((1, 2))
    induction += _picked(rows, columns + 1, real).sum((1, 2))
    pairs = int(real.sum())
    return echo / pairs, induction / pairs


def streamed_scores(
    query: Tensor, key: Tensor, scaling: float, k: int, first: int = 0, *, nearest: bool = False, block: int = 64
) -> tuple[Tensor, Tensor]:
    """`retrieval_scores` from queries and keys, in blocks of query rows.

    Args:
        query: (H, T, D) after norms and rotary positions.
        key: (Hkv, T, D), H a multiple of Hkv.
        scaling: factor of the scores.
        k, first, nearest: as for `retrieval_scores`.
        block: query rows at once; memory and speed only.

    Returns:
        (H,) echo and (H,) induction, float32 (float64 for float64 queries).

    Raises:
        ValueError: as `retrieval_scores`; block below 1.
    """
    heads, width, _ = query.shape
    _check_copies(width, k, first)
    if block < 1:
        raise ValueError(f"block={block}; allowed: >= 1 query row")
    dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
    groups = heads // key.size(0)
    echo, induction = (query.new_zeros(heads, dtype=dtype) for _ in range(2))
    pairs = 0
    for start in range(first + k, width, block):
        stop = min(start + block, width)
        columns, real = _pairs(start, stop, k, first, nearest, query.device)
        hidden = torch.arange(stop, device=query.device) > torch.arange(start, stop, device=query.device)[:, None]
        pairs += int(real.sum())
        chunk = max(1, BLOCK_ELEMENTS // (groups * (stop - start) * stop))
        for head in range(0, key.size(0), chunk):
            keys = key[head : head + chunk, :stop].to(dtype)
            mine = slice(head * groups, (head + keys.size(0)) * groups)
            rows = query[mine, start:stop].to(dtype).unflatten(0, (-1, groups)).flatten(1, 2)
            scores = (rows @ keys.transpose(1, 2)).mul_(scaling).view(-1, stop - start, stop)
            weights = scores.masked_fill_(hidden, -torch.inf).softmax(-1)
            echo[mine] += _picked(weights, columns, real).sum((1, 2))
            induction[mine] += _picked(weights, columns + 1, real).sum((1, 2))
    return echo / pairs, induction / pairs


def _check_copies(width: int, k: int, first: int) -> None:
    if k < 1 or first < 0 or width < first + 2 * k or (width - first) % k:
        raise ValueError(
            f"k={k} and first={first} do not fit {width} tokens; allowed: first + copies * k tokens, k >= 1, first >= "
            "0, at least 2 copies"
        )


def _pairs(start: int, stop: int, k: int, first: int, nearest: bool, device: torch.device) -> tuple[Tensor, Tensor]:
    """(rows, copies) columns of the earlier tokens that equal those of the rows [start, stop), and which are there."""
    last = 1 if nearest else (stop - 1 - first) // k
    columns = torch.arange(start, stop, device=device)[:, None] - k * torch.arange(1, last + 1, device=device)
    return columns.clamp(min=0), columns >= first


def _picked(weights: Tensor, columns: Tensor, real: Tensor) -> Tensor:
    """(H, rows, copies) weights at the columns, 0 where there is no such copy."""
    return weights.gather(2, columns.expand(weights.size(0), -1, -1)) * real


def retrieval_heads(
    echo: Scores, induction: Scores, echo_share: float = ECHO_SHARE, induction_share: float = INDUCTION_SHARE
) -> dict[int, list[int]]:
    """Key-value heads that keep every token: the best by echo and the best by induction, over all layers.

        round(n echo_share) by echo, round(n induction_share) by induction, their union; ties go to the lower (layer,
        head)

    Args:
        echo, induction: (L, Hkv) scores; None for a layer that is not ranked.
        echo_share, induction_share: of all ranked heads, in [0, 1].

    Returns:
        Layer -> heads, ascending, without layers that have none.

    Raises:
        ValueError: a share out of range, a score that is not finite, or layers that differ in the two.

    Example: 2 layers of 2 heads, induction (.1, .4), (.4, .2), share 0.25: head 1 of layer 0.
    """
    ranked = [layer for layer, row in enumerate(echo) if row is not None]
    for name, share in (("echo_share", echo_share), ("induction_share", induction_share)):
        if not 0 <= share <= 1:
            raise ValueError(f"{name}={share} is not in [0, 1]")
    if ranked != [layer for layer, row in enumerate(induction) if row is not None] or len(echo) != len(induction):
        raise ValueError("echo and induction have different layers")
    chosen = {*_best(echo, echo_share), *_best(induction, induction_share)}
    return {
        layer: sorted(head for at, head in chosen if at == layer) for layer in sorted({layer for layer, _ in chosen})
    }


def _best(scores: Scores, share: float) -> list[tuple[int, int]]:
    """(layer, head) of the best round(n share) heads."""
    flat = [(score, layer, head) for layer, row in enumerate(scores) for head, score in enumerate(row or ())]
    if not all(torch.tensor(score).isfinite() for score, _, _ in flat):
        raise ValueError("a score is not finite: the model's attention has NaN or infinite weights")
    flat.sort(key=lambda entry: (-entry[0], entry[1], entry[2]))
    return [(layer, head) for _, layer, head in flat[: head_count(len(flat), share)]]


def head_count(heads: int, share: float) -> int:
    """round(heads * share), halves to even; 0 of fewer than 51 heads at 1 %."""
    return round(heads * share)


def razor_profile(
    model: Any,
    tokenizer: Any,
    k: int = 2500,
    copies: int = 4,
    *,
    echo_share: float = ECHO_SHARE,
    induction_share: float = INDUCTION_SHARE,
    nearest: bool = False,
    seed: int = 0,
    block: int = 64,
) -> dict[str, Any]:
    """Retrieval heads of a model, from one forward pass over random tokens.

    The text is the model's first token (`bos`, if tokenizer or configuration have one) and `copies` times the same k
    tokens, drawn uniformly from the vocabulary without special tokens.

    Args:
        model: a causal LM of transformers with rotary positions, or a PEFT model around one; runs in eval mode.
        tokenizer: the model's.
        k: tokens of a copy.
        copies: at least 2.
        echo_share, induction_share: of all key-value heads of layers with full attention.
        nearest: pairs with the last earlier copy alone.
        seed: of the random tokens.
        block: query rows at once; memory and speed only.

    Returns:
        full_heads: layer -> key-value heads, as `RazorAttention` takes them
        echo, induction: (L, Hkv) scores of the key-value heads; None for layers with a sliding window
        heads, echo_heads, induction_heads: numbers of heads ranked, and chosen by either score
        k, copies, nearest, seed, echo_share, induction_share, tokens, bos: how it was measured

    Raises:
        UnprobeableAttentionError: attention that cannot be rebuilt from queries and keys, such as ALiBi.
        ValueError: settings out of range, a text longer than the model's positions, no layer with full attention.
    """
    core = language_model(model)
    config = text_config(core)
    windows = layer_windows(config)
    layers = [layer for layer, window in enumerate(windows) if window is None]
    if not layers:
        raise ValueError(f"{config.model_type!r} has sliding-window layers alone: there are no heads to rank")
    ids, bos = random_copies(config, tokenizer, k, copies, seed)
    first = ids.numel() - k * copies
    found: dict[int, tuple[list[float], list[float]]] = {}

    def collect(call: AttentionCall) -> None:
        scores = streamed_scores(call.query[0], call.key[0], call.scaling, k, first, nearest=nearest, block=block)
        groups = call.query.size(1) // call.key.size(1)
        echo, induction = (score.unflatten(0, (-1, groups)).amax(1).tolist() for score in scores)
        found[call.layer] = (echo, induction)

    head = {"logits_to_keep": 1} if "logits_to_keep" in forward_arguments(core) else {}
    ids = ids[None].to(core.get_input_embeddings().weight.device)
    with torch.no_grad(), evaluating(model), probing(model, layers, collect, tuple(ids.shape)):
        model(input_ids=ids, use_cache=False, **head)
    missing = [layer for layer in layers if layer not in found]
    if missing:
        raise ValueError(f"layers {missing} of {config.model_type!r} did not use transformers' attention interface")
    echo, induction = ([found[layer][i] if layer in found else None for layer in range(len(windows))] for i in (0, 1))
    count = sum(len(row) for row in echo if row is not None)
    if not head_count(count, echo_share) and echo_share:
        _log.warning("echo_share=%s of %d key-value heads is less than one head: no echo head", echo_share, count)
    return {
        "full_heads": retrieval_heads(echo, induction, echo_share, induction_share),
        "echo": echo,
        "induction": induction,
        "heads": count,
        "echo_heads": head_count(count, echo_share),
        "induction_heads": head_count(count, induction_share),
        "k": k,
        "copies": copies,
        "nearest": nearest,
        "seed": seed,
        "echo_share": echo_share,
        "induction_share": induction_share,
        "tokens": ids.size(1),
        "bos": bos,
    }


def random_copies(config: Any, tokenizer: Any, k: int, copies: int, seed: int) -> tuple[Tensor, int | None]:
    """(T,) ids of the first token, if the model has one, and `copies` times k random tokens; the first token's id.

    Raises:
        ValueError: settings out of range, or more tokens than the model has positions.
    """
    if k < 2 or copies < 2:
        raise ValueError(f"k={k} and copies={copies}; allowed: >= 2 tokens, >= 2 copies")
    bos = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else getattr(config, "bos_token_id", None)
    longest = getattr(config, "max_position_embeddings", None)
    tokens = (bos is not None) + k * copies
    if longest is not None and tokens > longest:
        raise ValueError(f"k={k} and copies={copies} make {tokens} tokens, the model has {longest} positions; lower k")
    special = set(tokenizer.all_special_ids) | ({bos} if bos is not None else set())
    allowed = [token for token in range(min(len(tokenizer), config.vocab_size)) if token not in special]
    if not allowed:
        raise ValueError(f"the tokenizer has {len(tokenizer)} tokens, all of them special: there is none to draw")
    drawn = torch.randint(len(allowed), (k,), generator=torch.Generator().manual_seed(seed))
    text = torch.tensor(allowed)[drawn].repeat(copies)
    return (text if bos is None else torch.cat([torch.tensor([bos]), text])), bos
