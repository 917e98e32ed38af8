"""Token texts as a table of unique entries, and what to show of a token that is only part of a character.

A token decoded alone that holds a part of a multi-byte character reads U+FFFD. The completion's whole text says which
character it was: its bytes are shown where each token holds one, otherwise which part of the character a token is.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

REPLACEMENT = "\ufffd"
_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_PARTS_OF_A_CHARACTER = 8


class TokenTable:
    """Unique (id, text, shown) of tokens; `index` gives places in it."""

    def __init__(self) -> None:
        self._places: dict[tuple[int, str, str | None], int] = {}

    def index(self, ids: NDArray[np.int64], texts: Sequence[str], completion: str) -> NDArray[np.uint32]:
        """Places (n,) of a completion's tokens in the table."""
        shown = shown_bytes(texts, completion)
        places = self._places
        return np.fromiter(
            (
                places.setdefault((token, text, shown.get(i)), len(places))
                for i, (token, text) in enumerate(zip(ids.tolist(), texts, strict=True))
            ),
            dtype=np.uint32,
            count=len(texts),
        )

    def columns(self) -> dict[str, list[int | str | None]]:
        """The table by columns; `shown` replaces the text on the page where it is not None."""
        entries = list(self._places)
        return {
            "ids": [entry[0] for entry in entries],
            "texts": [entry[1] for entry in entries],
            "shown": [entry[2] for entry in entries],
        }


def shown_bytes(texts: Sequence[str], completion: str) -> dict[int, str]:
    """Position -> what to show, for the tokens that are part of a character."""
    found: dict[int, str] = {}
    run: list[int] = []
    place = 0
    for i, text in enumerate(texts):
        byte = _BYTE.fullmatch(text)
        if byte:
            found[i] = byte[1].upper()
        elif REPLACEMENT in text:
            run.append(i)
            continue
        if run:
            end = completion.find(text, place, place + _PARTS_OF_A_CHARACTER * len(run)) if text and not byte else -1
            end = end if end >= 0 else min(place + 1, len(completion))
            _explain(found, run, texts, completion[place:end])
            place, run = end, []
        if completion.startswith(text, place):
            place += len(text)
    if run:
        _explain(found, run, texts, completion[place:])
    return found


def _explain(found: dict[int, str], run: list[int], texts: Sequence[str], characters: str) -> None:
    """Say what the tokens of a run of parts are parts of, as far as it is certain."""
    data = characters.encode("utf-8", "replace")
    alone = all(texts[i].strip(REPLACEMENT) == "" for i in run)
    if REPLACEMENT in characters or not data:  # the completion itself holds broken text
        for i in run:
            found[i] = texts[i]
    elif alone and len(data) == len(run):
        for i, byte in zip(run, data, strict=True):
            found[i] = f"{byte:02X}"
    else:
        for number, i in enumerate(run, start=1):
            found[i] = f"{number}/{len(run)} of {characters[:_PARTS_OF_A_CHARACTER]}"
