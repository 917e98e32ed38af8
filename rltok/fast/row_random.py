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
    golden = _signed(GOLDEN)
    words = _mix_tensor(_mix_tensor(keys + golden) + (position + 1) * golden)
    return _shift(words, 64 - DIGITS).double() * 2.0**-DIGITS


def draw(scores: Tensor, u: Tensor) -> Tensor:
    """Token of every row by the inverse of its cumulative distribution.

        token = min {v : sum_{w <= v} p_w > u},   p = softmax(scores)

    Every operation stays within its row, sums are float64 over blocks of tokens in the order of their ids, and a token
    whose weight exp(score - max) is 0 in the dtype of the scores is never returned. One-hot rows are greedy decoding.

    Args:
        scores: (B, V) floating, -inf where forbidden; half precision is raised to float32.
        u: (B,) float64 in [0, 1).

    Returns:
        (B,) int64.

    Raises:
        ValueError: a row without any finite maximum: all tokens forbidden, or NaN or +inf among its scores.
    """
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
    top = scores.amax(dim=-1, keepdim=True)
    if not bool(top.isfinite().all()):
        row = int((~top.isfinite()).flatten().nonzero()[0])
        raise ValueError(
            f"row {row} of the scores has the maximum {float(top[row])}: no token can be drawn; a processor or a "
            "truncation has forbidden all tokens, or the model returned NaN"
        )
    weights = torch.exp(scores - top)
    missing = -weights.size(1) % BLOCK
    blocks = torch.nn.functional.pad(weights, (0, missing)).unflatten(1, (-1, BLOCK))  # (B, V / BLOCK, BLOCK)
    cumulative = blocks.sum(dim=-1, dtype=torch.float64).cumsum(dim=-1)
    target = u[:, None] * cumulative[:, -1:]
    block = _first_above(cumulative, target)
    before = torch.nn.functional.pad(cumulative, (1, 0)).gather(1, block)
    chosen = blocks.gather(1, block[:, :, None].expand(-1, -1, BLOCK)).squeeze(1).double().cumsum(dim=-1)
    return (block * BLOCK + _first_above(chosen, target - before)).squeeze(1)


def _first_above(cumulative: Tensor, target: Tensor) -> Tensor:
    """(B, n) non-decreasing sums, (B, 1) targets -> (B, 1) first index above the target, never behind the last weight.

    Rounding can lift a target to the whole sum; the first index that reaches the sum is then the last with a weight.
    """
    above = (cumulative <= target).sum(dim=-1, keepdim=True)
    last = (cumulative < cumulative[:, -1:]).sum(dim=-1, keepdim=True)
    return torch.minimum(above, last)


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
