"""Words as token ids, and the span of a completion in which a model thinks."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, get_args

import torch
from torch import Tensor

from rltok.sampling.processor import Columns, Rows

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Variants = Literal["bare", "space", "both", "all"]

REFLECTION_WORDS = ("wait", "Wait", "but", "But", "Alternatively")
"""The list of the CyclicReflex authors."""
THINK_END = "</think>"
SPACE_MARKS = ("\u0120", "\u2581", " ")
"""How vocabularies write a leading space: byte-level BPE, SentencePiece, plain."""


def resolve_word_ids(
    tokenizer: PreTrainedTokenizerBase, words: Sequence[str], variants: Variants = "bare", require: int = 1
) -> list[int]:
    """Token ids of words, each once, ascending.

    Args:
        words: looked up in the vocabulary; a word that is no single token is left out with a warning, because biasing
            its first piece would hit unrelated words.
        variants: `bare` as spelled, without a leading space (sentence-initial forms in byte-level BPE, what the
            authors of CyclicReflex bias); `space` with a leading space; `both`; `all` is both in lower case,
            Capitalised and UPPER.
        require: at least so many ids must be found.

    Raises:
        ValueError: unknown variants, or fewer ids than `require`.
    """
    if variants not in get_args(Variants):
        raise ValueError(f"variants={variants!r} is unknown; allowed: {', '.join(map(repr, get_args(Variants)))}")
    vocabulary = tokenizer.get_vocab()
    found: set[int] = set()
    missing = []
    for word in dict.fromkeys(words):
        forms = dict.fromkeys([word, *((word.lower(), word.capitalize(), word.upper()) if variants == "all" else ())])
        ids = {vocabulary[text] for form in forms for text in _spellings(form, variants) if text in vocabulary}
        if not ids:
            missing.append(word)
        found |= ids
    if len(found) < require:
        raise ValueError(
            f"of words={list(words)} only {len(found)} token(s) are in the tokenizer's vocabulary (variants="
            f"{variants!r}), {require} needed: change words, or set variants='all'"
        )
    if missing:
        warnings.warn(
            f"words {missing} are no single token of this tokenizer (variants={variants!r}) and are left out",
            stacklevel=2,
        )
    return sorted(found)


def _spellings(word: str, variants: Variants) -> list[str]:
    bare = [] if variants == "space" else [word]
    return bare if variants == "bare" else [*bare, *(mark + word for mark in SPACE_MARKS)]


def token_ids(tokenizer: PreTrainedTokenizerBase, text: str) -> tuple[int, ...]:
    """Ids of a text as it is appended to other text: one id if the vocabulary has it whole."""
    whole = tokenizer.get_vocab().get(text)
    return (whole,) if whole is not None else tuple(tokenizer.encode(text, add_special_tokens=False))


def thinking_end(tokenizer: PreTrainedTokenizerBase, text: str | None) -> tuple[int, ...]:
    """Ids that end the thinking span: of `text`, or with `auto` of `</think>` if that is one token, else none."""
    if text is None:
        return ()
    if text == "auto":
        return token_ids(tokenizer, THINK_END) if THINK_END in tokenizer.get_vocab() else ()
    return token_ids(tokenizer, text)


def span_ids(
    tokenizer: PreTrainedTokenizerBase, think_end: str | None, think_start: str | None
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """(`end_ids`, `start_ids`) of a thinking span from the texts of a decoding method's settings."""
    return thinking_end(tokenizer, think_end), () if think_start is None else token_ids(tokenizer, think_start)


class Delimiter:
    """Finds a sequence of tokens as a row grows, one token at a time (the matching automaton of Knuth et al.)."""

    def __init__(self, ids: Sequence[int]) -> None:
        self.ids = tuple(ids)
        self._symbols = tuple(dict.fromkeys(self.ids))
        self._table = self._transitions()  # [matched][symbol, the last for any other token] -> matched
        self._on: dict[torch.device, tuple[Tensor, Tensor]] = {}

    def advance(self, matched: Tensor, last: Tensor) -> tuple[Tensor, Tensor]:
        """(B,) tokens matched so far, (B,) newest token -> matched now, and (B,) bool whether the sequence ended."""
        symbols, table = self._tensors(last.device)
        hits = last[:, None] == symbols  # (B, K)
        symbol = torch.where(hits.any(1), hits.long().argmax(1), len(self._symbols))
        now = table[matched, symbol]
        return now, now == len(self.ids)

    def _transitions(self) -> list[list[int]]:
        ids, table = self.ids, []
        for matched in range(len(ids) + 1):
            row = []
            for symbol in self._symbols:
                text = (*ids[:matched], symbol)
                longest = min(len(text), len(ids))
                row.append(next(k for k in range(longest, -1, -1) if text[len(text) - k :] == ids[:k]))
            table.append([*row, 0])
        return table

    def _tensors(self, device: torch.device) -> tuple[Tensor, Tensor]:
        if device not in self._on:
            self._on[device] = (torch.tensor(self._symbols, device=device), torch.tensor(self._table, device=device))
        return self._on[device]


@dataclass(frozen=True)
class ThinkingSpan:
    """From the start ids (or the first token, without any) to the end ids (or for ever); it never opens again.

    Only generated tokens are searched: earlier turns in a prompt may hold the same marks.
    """

    start_ids: tuple[int, ...] = ()
    end_ids: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "_start", Delimiter(self.start_ids))
        object.__setattr__(self, "_end", Delimiter(self.end_ids))

    def columns(self, rows: int, device: torch.device) -> Columns:
        """`inside` (B,) bool, and what is matched of the marks."""
        zeros = torch.zeros(rows, dtype=torch.long, device=device)
        inside = torch.full((rows,), not self.start_ids, dtype=torch.bool, device=device)
        return {"inside": inside, "ended": torch.zeros_like(inside), "at_start": zeros, "at_end": zeros.clone()}

    def observe(self, rows: Rows, columns: Columns) -> None:
        """Enter the newest tokens, in place."""
        if self.start_ids:
            matched, found = self._start.advance(columns["at_start"], rows.last)  # type: ignore[attr-defined]
            columns["at_start"].copy_(matched)
            columns["inside"] |= found
        if self.end_ids:
            matched, found = self._end.advance(columns["at_end"], rows.last)  # type: ignore[attr-defined]
            columns["at_end"].copy_(matched)
            columns["ended"] |= found
            columns["inside"] &= ~columns["ended"]
