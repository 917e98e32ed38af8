"""Random numbers that belong to a row and a position, so that no neighbour, batch size or process changes a sample.

Every completion has a key, made of (seed, rollout step, prompt, completion index). The number for its token t is a hash
of (key, t): nothing is consumed, so rows may be sampled in any order, in any company and again after a resume.

    mix(x)     the output function of SplitMix64: two multiplications and three xor-shifts on 64 bits
    u(key, t)  the upper 53 bits of mix(mix(key + g) + (t + 1) g), times 2^-53, with g = floor(2^64 / golden ratio)

Streams of different keys are pieces of one cycle of length 2^64 that begin at hashed places: n streams of T tokens
overlap with probability about n^2 T / 2^64. Meant for sampling, not for cryptography.

Source: Steele, Lea, Flood, "Fast splittable pseudorandom number generators", OOPSLA 2014 (SplitMix64).
"""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

GOLDEN = 0x9E3779B97F4A7C15
FIRST, SECOND = 0xBF58476D1CE4E5B9, 0x94D049BB133111EB
WORD = (1 << 64) - 1
DIGITS = 53
"""bits of a uniform number, all that float64 holds"""
BLOCK = 256
"""tokens whose weights are summed at once when a token is drawn"""
BELOW_ONE = 1 - 2.0**-52
"""a factor that makes every positive float64 less"""


def row_key(seed: int, step: int, prompt_id: int | str, completion: int) -> int:
    """Key of one completion, the same on every machine: a signed 64-bit integer.

    Args:
        seed: of the run.
        step: rollout step; another step gives other samples.
        prompt_id: number or name of the prompt; 1 and "1" are different prompts.
        completion: index of the completion among those of its prompt and step.

    Raises:
        ValueError: a number that 64 bits cannot hold.
    """
    key = 0
    for name, part in (("seed", seed), ("step", step), ("prompt_id", prompt_id), ("completion", completion)):
        key = _mix(((key ^ _word(name, part)) + GOLDEN) & WORD)
    return _signed(key)


def uniforms(keys: Tensor, position: Tensor) -> Tensor:
    """(B,) int64 keys, (B,) int64 positions -> (B,) float64 in [0, 1), multiples of 2^-53.

    Raises:
        ValueError: tensors of another type, or of different shapes.
    """
    if keys.dtype != torch.int64 or position.dtype != torch.int64 or keys.shape != position.shape:
        raise ValueError(
            f"keys are {keys.dtype} of shape {tuple(keys.shape)}, position {position.dtype} of shape "
            f"{tuple(position.shape)}: both must be torch.int64 of one shape"
        )
    return uniforms_of(streams(keys), position)


def streams(keys: Tensor) -> Tensor:
    """(B,) keys -> (B,) int64, the part of `uniforms` that is the same for all positions."""
    return _mix_tensor(keys + _signed(GOLDEN))


def uniforms_of(streams: Tensor, position: Tensor) -> Tensor:
    """`uniforms` of (B,) `streams`, unchecked."""
    words = _mix_tensor(streams + (position + 1) * _signed(GOLDEN))
    return _shift(words, 64 - DIGITS).double() * 2.0**-DIGITS


def draw(scores: Tensor, u: Tensor) -> Tensor:
    """Token of every row by the inverse of its cumulative distribution.

        token = min {v : sum_{w <= v} p_w > u},   p = softmax(scores)

    Every operation stays within its row. Sums are float64 over blocks of tokens in the order of their ids; those of a
    block have the precision of the scores. A token whose weight exp(score - max) is 0 in the dtype of the scores is
    never returned. One-hot rows are greedy decoding.

    Args:
        scores: (B, V) floating, -inf where forbidden; half precision is raised to float32.
        u: (B,) float64 in [0, 1).

    Returns:
        (B,) int64.

    Raises:
        ValueError: a row without any finite maximum: all tokens forbidden, or NaN or +inf among its scores.
    """
    tokens, _ = pick(scores, u)
    for row in (tokens < 0).nonzero().flatten().tolist():
        raise ValueError(f"row {row} of the scores {no_token(scores[row])}")
    return tokens


def no_token(scores: Tensor) -> str:
    """What is wrong with (V,) scores of which `pick` found no token."""
    return (
        f"has the maximum {float(scores.amax())}: no token can be drawn; a processor or a truncation has forbidden all "
        "tokens, or the model returned NaN"
    )


def pick(scores: Tensor, u: Tensor | None) -> tuple[Tensor, Tensor]:
    """`draw` with the log-probability of what was drawn, and without a wait for the device.

    Args:
        scores: (B, V) as for `draw`.
        u: (B,) as for `draw`; None takes the largest score, the first one of several.

    Returns:
        (B,) int64, -1 where no token can be drawn, and (B,) float32 log-probabilities in nats.
    """
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
    if u is None:
        top, tokens = scores.max(dim=-1, keepdim=True)
        cumulative = _blocks(scores, top)[1]
    else:
        top = scores.amax(dim=-1, keepdim=True)
        blocks, cumulative = _blocks(scores, top)
        tokens = _invert(blocks, cumulative, u[:, None]).clamp_(max=scores.size(1) - 1)  # of NaN, any token
    logps = (scores.gather(1, tokens) - top).double() - cumulative[:, -1:].log()
    return torch.where(top.isfinite(), tokens, -1).squeeze(1), logps.float().squeeze(1)


def largest(scores: Tensor) -> Tensor:
    """The tokens of `pick` with u None: (B, V) scores -> (B,) int64."""
    top, tokens = scores.max(dim=-1)
    return torch.where(top.isfinite(), tokens, -1)


def _blocks(scores: Tensor, top: Tensor) -> tuple[Tensor, Tensor]:
    """exp(scores - top) in (B, n, BLOCK) with zeros behind the last token, and (B, n) float64 sums up to each block.

    A vocabulary within one block keeps its size, and its sums are those up to each token.
    """
    rows, count = scores.shape
    if count <= BLOCK:
        weights = torch.exp(scores - top)
        return weights[:, None], weights.cumsum(dim=-1, dtype=torch.float64)
    padded = scores.new_empty(rows, -(-count // BLOCK) * BLOCK)
    torch.sub(scores, top, out=padded[:, :count])
    padded[:, count:] = -torch.inf
    weights = padded.exp_().unflatten(1, (-1, BLOCK))
    return weights, weights.sum(dim=-1).cumsum(dim=-1, dtype=torch.float64)


def _invert(blocks: Tensor, cumulative: Tensor, u: Tensor) -> Tensor:
    """What `_blocks` gave, (B, 1) uniform numbers -> (B, 1) tokens."""
    target = u * cumulative[:, -1:]
    first = _first_above(cumulative, target)
    if blocks.size(1) == 1:
        return first
    before = torch.nn.functional.pad(cumulative, (1, 0)).gather(1, first)
    chosen = blocks.gather(1, first[:, :, None].expand(-1, -1, BLOCK)).squeeze(1).cumsum(dim=-1, dtype=torch.float64)
    return first * BLOCK + _first_above(chosen, target - before)


def _first_above(cumulative: Tensor, target: Tensor) -> Tensor:
    """(B, n) non-decreasing sums, (B, 1) targets -> (B, 1) first index above the target, never behind the last weight.

    Rounding can lift a target to the whole sum; the first index that reaches the sum is then the last with a weight.
    """
    below = torch.minimum(target, cumulative[:, -1:] * BELOW_ONE)
    # NaN is above nothing, and its index must exist all the same
    return torch.searchsorted(cumulative, below, right=True).clamp_(max=cumulative.size(1) - 1)


def _word(name: str, part: int | str) -> int:
    if isinstance(part, str):
        return int.from_bytes(hashlib.blake2b(part.encode(), digest_size=8, person=b"rltok").digest(), "little")
    if not -(1 << 63) <= part < 1 << 63:
        raise ValueError(
            f"{name}={part} does not fit in 64 bits; allowed: -2**63 to 2**63 - 1, or a string as prompt_id"
        )
    return part & WORD


def _mix(word: int) -> int:
    word = ((word ^ (word >> 30)) * FIRST) & WORD
    word = ((word ^ (word >> 27)) * SECOND) & WORD
    return word ^ (word >> 31)


def _mix_tensor(words: Tensor) -> Tensor:
    """`_mix` on int64, whose products wrap as those of unsigned words do."""
    words = (words ^ _shift(words, 30)) * _signed(FIRST)
    words = (words ^ _shift(words, 27)) * _signed(SECOND)
    return words ^ _shift(words, 31)


def _shift(words: Tensor, bits: int) -> Tensor:
    """Shift to the right that fills with zeros; torch's own repeats the sign."""
    return (words >> bits) & ((1 << (64 - bits)) - 1)


def _signed(word: int) -> int:
    return word - (1 << 64) if word >> 63 else word
