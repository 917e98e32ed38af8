"""Needle-in-a-haystack prompts from any text: one sentence hides among others, and its beginning asks for the rest.

    head | sentence ... needle ... sentence | tail | cue            answer: the needle after the cue

The cue is the needle's first tokens, so a model that was never taught to follow instructions can answer as well: it
goes on with what it has read. No sentence of the haystack begins as the needle does, and none occurs twice.

Ours: the paper's prompts hide one fact in essays and ask a question about it.
"""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

CUE = 4
"""tokens of the needle that ask for the rest"""
LEAST_ANSWER = 4
"""tokens of the shortest answer"""
LEAST_FILLED = 0.5
"""share of the room for a haystack that the texts must fill"""
_END = re.compile(r"(?<=[.!?])\s+|\n+")


@dataclass(frozen=True)
class Needle:
    """A prompt with a needle."""

    prompt: list[int]
    """token ids, the cue included"""
    span: tuple[int, int]
    """first and one past the last position of the needle in the prompt"""
    answer: list[int]
    """the needle after the cue"""
    depth: float
    """share of the haystack before the needle"""


def sentences_of(text: str) -> list[str]:
    """Sentences of a text: what line ends, or full stops and the like before a blank, set apart."""
    return [part for part in (piece.strip() for piece in _END.split(text)) if part]


def encode_sentences(tokenizer: Any, texts: Sequence[str], separator: str = " ") -> list[list[int]]:
    """Token ids of the distinct sentences of texts, each behind a separator."""
    found = list(dict.fromkeys(sentence for text in texts for sentence in sentences_of(text)))
    if not found:
        return []
    encoded = tokenizer([separator + sentence for sentence in found], add_special_tokens=False)["input_ids"]
    return [list(ids) for ids in encoded if ids]


def make_needles(
    sentences: Sequence[Sequence[int]],
    count: int,
    length: int,
    seed: int,
    *,
    head: Sequence[int] = (),
    tail: Sequence[int] = (),
    cue: int = CUE,
    longest_answer: int | None = None,
) -> list[Needle]:
    """Prompts of about `length` tokens, never more, whose needles lie at even depths from the first to the last.

    Args:
        sentences: token ids of distinct sentences.
        count: prompts.
        length: tokens of a prompt, cue included.
        seed: of the choice of needles and haystacks.
        head, tail: token ids before the haystack, and between it and the cue.
        cue: tokens of the needle that are given.
        longest_answer: tokens; None: as long as half of the prompt has room for.

    Raises:
        ValueError: sentences that make no needle, or too few of them for the length.
    """
    room = length - len(head) - len(tail) - cue
    longest = room // 2 if longest_answer is None else min(room // 2, cue + longest_answer)
    candidates = [index for index, ids in enumerate(sentences) if cue + LEAST_ANSWER <= len(ids) <= longest]
    if not candidates:
        raise ValueError(
            f"no sentence of {len(sentences)} has {cue + LEAST_ANSWER} to {longest} tokens, as a needle of a prompt of "
            f"length={length} must; give other texts or another length"
        )
    made = []
    for number in range(count):
        rng = random.Random(f"{seed}/{number}")
        needle = list(sentences[rng.choice(candidates)])
        others = [ids for ids in sentences if list(ids[:cue]) != needle[:cue]]
        haystack = _fill(others, room - len(needle), rng)
        filled, wanted = sum(map(len, haystack)), room - len(needle)
        if filled < LEAST_FILLED * wanted:
            raise ValueError(
                f"{len(sentences)} distinct sentences fill {filled} of {wanted} tokens; give more texts, or a length "
                f"of about {length - wanted + filled}"
            )
        depth = number / (count - 1) if count > 1 else 0.5
        made.append(_hide(needle, haystack, depth, list(head), list(tail), cue))
    return made


def _fill(sentences: Sequence[Sequence[int]], room: int, rng: random.Random) -> list[list[int]]:
    """Sentences in random order that fit into so many tokens together."""
    chosen: list[list[int]] = []
    for index in rng.sample(range(len(sentences)), len(sentences)):
        ids = sentences[index]
        if len(ids) <= room:
            chosen.append(list(ids))
            room -= len(ids)
    return chosen


def _hide(
    needle: list[int], haystack: Sequence[Sequence[int]], depth: float, head: list[int], tail: list[int], cue: int
) -> Needle:
    """The needle before the sentence that lies nearest to the depth in tokens."""
    total = sum(map(len, haystack))
    starts = [0]
    for ids in haystack:
        starts.append(starts[-1] + len(ids))
    at = min(range(len(starts)), key=lambda index: abs(starts[index] - depth * total))
    before = [token for ids in haystack[:at] for token in ids]
    after = [token for ids in haystack[at:] for token in ids]
    first = len(head) + len(before)
    return Needle(
        prompt=[*head, *before, *needle, *after, *tail, *needle[:cue]],
        span=(first, first + len(needle)),
        answer=needle[cue:],
        depth=starts[at] / total if total else depth,
    )


def token_recall(reference: Sequence[int], given: Sequence[int]) -> float:
    """Share of the reference's tokens that were given, each as often as it was: ROUGE-1 recall over tokens, in [0, 1].

    Example: reference 5, 6, 6, 7 and given 6, 5, 9 share 5 and one 6: 0.5.
    """
    left: dict[int, int] = {}
    for token in given:
        left[token] = left.get(token, 0) + 1
    hits = 0
    for token in reference:
        if left.get(token, 0):
            left[token] -= 1
            hits += 1
    return hits / len(reference) if reference else 0.0
