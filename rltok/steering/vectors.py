"""Steering vectors of a model, from triples of a prompt, a preferred and a dispreferred response.

Per triple and sequence the k tokens of the selection are replaced by the pad id, and the hidden states of the last
position of every layer are compared with the untouched ones:

    dh_l = h_l(full) - h_l(ablated)                    dh+ of the preferred sequence, dh- of the other
    pca:   v_l = first principal component of the centred 2N rows dh+, dh-, unit norm, mean(dh+) . v_l >= 0
    mean:  v_l = mean of the 2N rows, as it is

| mode | tokens of a sequence that are replaced |
| --- | --- |
| `pos`, `neg`, `abs` | the k of largest, smallest, absolutely largest signed score |
| `both` | v_l(pos) - v_l(neg), not normalised again |
| `random` | k random ones: the control that shows what the attribution adds |

h_l is the output of decoder layer l, which is what `steered` moves; for the last layer that is before the final norm.
Source: arXiv 2507.18043. The authors fix no sign of the component; without it half of the vectors steer backwards.
Left out: the paper's image tokens.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn

from rltok.attention.probe import text_config
from rltok.steering.attribution import STEPS, Baseline, Float32Model, Score, check_choice, in_float32
from rltok.steering.hooks import SteeringVector, decoder_layers

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Selection = Literal["pos", "neg", "abs", "random"]
Mode = Literal["pos", "neg", "both", "abs", "random"]
Method = Literal["pca", "mean"]
Part = str | Sequence[int]
"""Text, or token ids."""

K = 10
"""Tokens that are replaced per sequence; the authors' number for language models."""
STRENGTH = 40.0
"""The authors' number for language models; large where hidden states are short."""


class Triple(NamedTuple):
    """A prompt with two responses, each as text or token ids; texts are joined as they stand."""

    prompt: Part
    preferred: Part
    dispreferred: Part


@dataclass(frozen=True)
class ContrastOptions:
    """How triples become differences of hidden states."""

    k: int = K
    """tokens that are replaced per sequence; all of a shorter one"""
    mode: Mode = "both"
    """which tokens, and what the vector is made of"""
    steps: int = STEPS
    """quadrature nodes of the attribution"""
    score: Score = "response"
    """the contrastive score"""
    baseline: Baseline = "zero"
    """where the path of the attribution starts; `mean` with 50 steps makes scores add up in models that normalise"""
    protect_special: bool = False
    """never replace special tokens, such as those of a chat template"""
    ablate_with: Literal["pad", "unk"] = "pad"
    """the token that replaces others"""
    seed: int = 0
    """of mode `random`"""

    def __post_init__(self) -> None:
        for name, least in (("k", 1), ("steps", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name}={getattr(self, name)} must be >= {least}")
        check_choice("mode", self.mode, get_args(Mode))
        check_choice("score", self.score, get_args(Score))
        check_choice("baseline", self.baseline, get_args(Baseline))
        check_choice("ablate_with", self.ablate_with, ("pad", "unk"))

    @property
    def selections(self) -> tuple[Selection, ...]:
        """Selections that the mode needs."""
        return ("pos", "neg") if self.mode == "both" else (self.mode,)


class Contrast(NamedTuple):
    """Differences of hidden states, of N triples."""

    pos: Mapping[Selection, Mapping[int, Tensor]]
    """selection -> layer -> (N, d) dh+, on the CPU"""
    neg: Mapping[Selection, Mapping[int, Tensor]]
    """selection -> layer -> (N, d) dh-"""
    hidden_norm: Mapping[int, float]
    """layer -> mean ||h|| of the last positions"""
    gaps: tuple[float, ...]
    """(N,) completeness gap of every attribution; empty where none was made"""

    @property
    def triples(self) -> int:
        """N."""
        return next(iter(next(iter(self.pos.values())).values())).size(0)


class Direction(NamedTuple):
    """One layer's direction, with the numbers that would reveal a bad one."""

    vector: Tensor
    """(d,) float32"""
    share: float
    """of the rows' variance (pca) or of their squared length (mean) that lies along the vector, in [0, 1]"""
    cosine: float
    """between mean(dh+) and the vector"""
    flipped: bool
    """the component was turned round"""


class LayerDirection(NamedTuple):
    """What one layer's vector was made of."""

    layer: int
    vector: Tensor
    """(d,)"""
    parts: tuple[Direction, ...]
    """one per selection"""
    cosine: float
    """between mean(dh+) of the first selection and the vector"""
    hidden_norm: float
    """mean ||h|| of the last positions"""


def build_vectors(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    triples: Sequence[Triple | tuple[Part, Part, Part]],
    layers: Sequence[int],
    k: int = K,
    mode: Mode = "both",
    method: Method = "pca",
    steps: int = STEPS,
    *,
    strength: float = STRENGTH,
    score: Score = "response",
    baseline: Baseline = "zero",
    protect_special: bool = False,
    ablate_with: Literal["pad", "unk"] = "pad",
    seed: int = 0,
    progress: Callable[[int], None] | None = None,
) -> list[SteeringVector]:
    """Steering vectors of the given layers; computed in float32, the model stays as it is.

    Args:
        model: a causal language model, PEFT and other wrappers included; not sharded, not quantised.
        tokenizer: for texts, special tokens and the replacement.
        triples: prompt, preferred and dispreferred response, as text or ids. One with an empty response, or without a
            token that may be replaced, is dropped with a warning.
        layers: indices of decoder layers.
        k, mode, steps, score, baseline, protect_special, ablate_with, seed: see `ContrastOptions`.
        method: `pca` or `mean`.
        strength: of the vectors.
        progress: called with 1 after every triple.

    Raises:
        ValueError: a value out of range, no triple left, fewer than two with `pca`, or a model that cannot be used.
    """
    options = ContrastOptions(k, mode, steps, score, baseline, protect_special, ablate_with, seed)
    check_choice("method", method, get_args(Method))
    contrast = contrast_states(model, tokenizer, triples, layers, options, progress)
    return [SteeringVector(found.layer, found.vector, strength) for found in layer_directions(contrast, method)]


def steering_direction(pos: Tensor, neg: Tensor, method: Method = "pca") -> Direction:
    """The common direction of differences of hidden states.

    Args:
        pos: (N, d) dh+.
        neg: (N, d) dh-.
        method: `pca`: the first principal component of the centred rows of both, of norm 1 and turned so that
            mean(dh+) . v >= 0. `mean`: the mean of the rows, neither scaled nor turned.

    Raises:
        ValueError: fewer than two pairs of rows for pca, rows that do not differ (pca) or are all 0 (mean).
    """
    check_choice("method", method, get_args(Method))
    rows, mean_pos = torch.cat([pos, neg]).double(), pos.double().mean(0)
    if method == "mean":
        v, centred = rows.mean(0), rows
        if not v.any():
            raise ValueError("the mean difference of hidden states is 0: replacing the tokens changes nothing")
    else:
        if pos.size(0) < 2:
            raise ValueError(f"method='pca' with {pos.size(0)} triple(s): give at least 2, or set method='mean'")
        centred = rows - rows.mean(0)
        if not centred.any():
            raise ValueError("all differences of hidden states are the same: give other triples, or set method='mean'")
        v = torch.linalg.svd(centred, full_matrices=False).Vh[0]
    flipped = method == "pca" and bool(mean_pos @ v < 0)
    v = -v if flipped else v
    share = float((centred @ (v / v.norm())).square().sum() / centred.square().sum())
    return Direction(v.float(), share, _cosine(mean_pos, v), flipped)


def _cosine(a: Tensor, b: Tensor) -> float:
    scale = float(a.norm() * b.norm())
    return float(a.double() @ b.double()) / scale if scale else math.nan


def layer_directions(contrast: Contrast, method: Method = "pca") -> list[LayerDirection]:
    """The direction of every layer: of the one selection, or of the first minus that of the second.

    Raises:
        ValueError: as `steering_direction`.
    """
    found = []
    selections = list(contrast.pos)
    for layer, norm in contrast.hidden_norm.items():
        parts = tuple(steering_direction(contrast.pos[s][layer], contrast.neg[s][layer], method) for s in selections)
        vector = parts[0].vector if len(parts) == 1 else parts[0].vector - parts[1].vector
        mean_pos = contrast.pos[selections[0]][layer].double().mean(0)
        found.append(LayerDirection(layer, vector, parts, _cosine(mean_pos, vector), norm))
    return found


def contrast_states(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    triples: Sequence[Triple | tuple[Part, Part, Part]],
    layers: Sequence[int],
    options: ContrastOptions,
    progress: Callable[[int], None] | None = None,
) -> Contrast:
    """Differences of hidden states that the selected tokens make.

    Args and errors as `build_vectors`.
    """
    replacement = _replacement(tokenizer, options.ablate_with)
    special = set(tokenizer.all_special_ids) if options.protect_special else set()
    with in_float32(model) as frozen:
        wanted = _checked_layers(frozen, layers)
        pos: dict[Selection, dict[int, list[Tensor]]] = {s: {layer: [] for layer in wanted} for s in options.selections}
        neg: dict[Selection, dict[int, list[Tensor]]] = {s: {layer: [] for layer in wanted} for s in options.selections}
        norms: dict[int, list[float]] = {layer: [] for layer in wanted}
        gaps = []
        for index, triple in enumerate(triples):
            found = _one_triple(frozen, tokenizer, Triple(*triple), index, wanted, options, replacement, special)
            if progress is not None:
                progress(1)
            if found is None:
                continue
            gaps += found.gaps
            for side, states in ((pos, found.pos), (neg, found.neg)):
                for layer in wanted:
                    full, *ablated = states[layer]
                    norms[layer].append(float(full.norm()))
                    for selection, other in zip(options.selections, ablated, strict=True):
                        side[selection][layer].append(full - other)
    if not any(norms.values()):
        raise ValueError(f"none of the {len(triples)} triples can be used: each needs a prompt and two responses")
    return Contrast(_stacked(pos), _stacked(neg), {layer: sum(v) / len(v) for layer, v in norms.items()}, tuple(gaps))


class _States(NamedTuple):
    """Hidden states of one triple: layer -> (1 + selections, d), the untouched sequence first."""

    pos: dict[int, Tensor]
    neg: dict[int, Tensor]
    gaps: list[float]


def _one_triple(
    frozen: Float32Model,
    tokenizer: PreTrainedTokenizerBase,
    triple: Triple,
    index: int,
    layers: Sequence[int],
    options: ContrastOptions,
    replacement: int,
    special: set[int],
) -> _States | None:
    """None, with a warning, where the triple cannot be used."""
    prompt = _ids(tokenizer, triple.prompt, True)
    if not prompt:
        raise ValueError(f"triple {index}: the prompt {triple.prompt!r} has no tokens; a response needs one before it")
    responses = [_ids(tokenizer, part, False) for part in (triple.preferred, triple.dispreferred)]
    if not all(responses):
        side = "preferred" if not responses[0] else "dispreferred"
        warnings.warn(f"triple {index}: the {side} response is empty; the triple is left out", stacklevel=4)
        return None
    sequences = [torch.tensor(prompt + response, device=frozen.device) for response in responses]
    _check_length(frozen, sequences, index)
    may = [torch.tensor([int(i) not in special for i in ids], device=frozen.device) for ids in sequences]
    if not all(bool(allowed.any()) for allowed in may):
        warnings.warn(f"triple {index}: all tokens are special and protected; the triple is left out", stacklevel=4)
        return None
    gaps: list[float] = []
    if options.mode == "random":
        generator = torch.Generator().manual_seed(1_000_003 * options.seed + index)
        scores = [torch.rand(ids.numel(), generator=generator).to(frozen.device) for ids in sequences]
    else:
        found = frozen.attribute(
            sequences[0], sequences[1], options.steps, len(prompt), options.score, options.baseline
        )
        scores, gaps = list(found.scores), [found.gap]
    states = []
    for ids, allowed, values in zip(sequences, may, scores, strict=True):
        batch = ids.repeat(1 + len(options.selections), 1)
        for row, selection in enumerate(options.selections, start=1):
            batch[row, top_tokens(values, options.k, selection, allowed)] = replacement
        states.append(last_hidden_states(frozen, batch, layers))
    return _States(states[0], states[1], gaps)


def top_tokens(scores: Tensor, k: int, selection: Selection, allowed: Tensor | None = None) -> Tensor:
    """(min(k, allowed tokens),) positions of a selection, ties to the earlier.

    Args:
        scores: (L,) signed scores; for `random` any random numbers.
        k: how many.
        selection: `pos` and `random` take the largest, `neg` the smallest, `abs` the absolutely largest.
        allowed: (L,) bool, positions that may be taken; None: all.
    """
    check_choice("selection", selection, get_args(Selection))
    ranked = {"pos": scores, "random": scores, "neg": -scores, "abs": scores.abs()}[selection]
    if allowed is None:
        return ranked.argsort(descending=True, stable=True)[:k]
    places = allowed.nonzero()[:, 0]
    return places[ranked[places].argsort(descending=True, stable=True)[:k]]


def last_hidden_states(frozen: Float32Model, ids: Tensor, layers: Sequence[int]) -> dict[int, Tensor]:
    """(S, L) ids without padding -> layer -> (S, d) output of the decoder layer at the last position, on the CPU."""
    with _capturing(frozen.core, layers) as states, torch.no_grad():
        frozen.logits(1, input_ids=ids)
    return states


@contextmanager
def _capturing(core: nn.Module, layers: Sequence[int]) -> Iterator[dict[int, Tensor]]:
    modules, states = decoder_layers(core), {}

    def keep(layer: int) -> Callable[..., None]:
        def hook(_: nn.Module, __: Any, output: Any) -> None:
            hidden = output[0] if isinstance(output, tuple) else output
            states[layer] = hidden[:, -1].float().cpu()

        return hook

    handles = [modules[layer].register_forward_hook(keep(layer)) for layer in layers]
    try:
        yield states
    finally:
        for handle in handles:
            handle.remove()


def _stacked(rows: Mapping[Selection, Mapping[int, list[Tensor]]]) -> dict[Selection, dict[int, Tensor]]:
    return {s: {layer: torch.stack(found) for layer, found in by.items()} for s, by in rows.items()}


def _ids(tokenizer: PreTrainedTokenizerBase, part: Part, opens: bool) -> list[int]:
    """Token ids; only the text that opens a sequence gets the tokenizer's special tokens."""
    if isinstance(part, str):
        return list(tokenizer(part, add_special_tokens=opens)["input_ids"])
    return [int(token) for token in part]


def _replacement(tokenizer: PreTrainedTokenizerBase, kind: str) -> int:
    found = tokenizer.pad_token_id if kind == "pad" else tokenizer.unk_token_id
    if found is None:
        other = "unk" if kind == "pad" else "pad"
        raise ValueError(f"the tokenizer has no {kind} token: set ablate_with={other!r}")
    return int(found)


def _checked_layers(frozen: Float32Model, layers: Sequence[int]) -> list[int]:
    n_layers = text_config(frozen.core).num_hidden_layers
    if not layers or len(set(layers)) != len(layers) or min(layers) < 0 or max(layers) >= n_layers:
        raise ValueError(f"layers={list(layers)}; allowed: distinct indices from 0 to {n_layers - 1}, at least one")
    return list(layers)


def _check_length(frozen: Float32Model, sequences: Sequence[Tensor], index: int) -> None:
    limit = getattr(text_config(frozen.core), "max_position_embeddings", None)
    longest = max(ids.numel() for ids in sequences)
    if limit is not None and 0 < limit < longest:
        raise ValueError(
            f"triple {index} has {longest} tokens, the model is made for {limit} (max_position_embeddings)"
        )
