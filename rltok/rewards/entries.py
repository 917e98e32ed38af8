"""A reasoning-gym entry as one JSON string, and back, such that its verifier sees what it was made with.

Plain JSON turns tuples into lists and number keys into strings, and some verifiers notice (`arc_agi` compares
tuples). What JSON lacks is tagged: `{"__tuple__": [...]}`, `{"__set__": [...]}`, `{"__map__": [[key, value], ...]}`.
Everything else is plain JSON, so `json.loads(text)["metadata"]` is readable without this module.

Imports the standard library only: the verifier process loads this file by its path.
"""

from __future__ import annotations

import json
from typing import Any

_TAGS = ("__tuple__", "__set__", "__map__")


def encode_entry(entry: Any) -> str:
    """JSON text of an entry made of dicts, lists, tuples, sets, text, numbers, booleans and None.

    NumPy scalars and arrays become numbers and lists.

    Raises:
        TypeError: a value of another type.
    """
    return json.dumps(_pack(entry), ensure_ascii=False)


def decode_entry(text: str) -> Any:
    """The entry that `encode_entry` was given; plain JSON is read as it is."""
    return _unpack(json.loads(text))


def _pack(value: Any) -> Any:
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, list):
        return [_pack(v) for v in value]
    if isinstance(value, tuple):
        return {"__tuple__": [_pack(v) for v in value]}
    if isinstance(value, set | frozenset):
        return {"__set__": sorted((_pack(v) for v in value), key=repr)}
    if isinstance(value, dict):
        if all(isinstance(k, str) for k in value) and not any(tag in value for tag in _TAGS):
            return {k: _pack(v) for k, v in value.items()}
        return {"__map__": [[_pack(k), _pack(v)] for k, v in value.items()]}
    if hasattr(value, "tolist"):  # NumPy scalar or array
        return _pack(value.tolist())
    raise TypeError(f"a reasoning-gym entry holds a {type(value).__name__}, which has no JSON form")


def _unpack(value: Any) -> Any:
    if isinstance(value, list):
        return [_unpack(v) for v in value]
    if not isinstance(value, dict):
        return value
    if len(value) == 1:
        if "__tuple__" in value:
            return tuple(_unpack(value["__tuple__"]))
        if "__set__" in value:
            return set(_unpack(value["__set__"]))
        if "__map__" in value:
            return {_unpack(k): _unpack(v) for k, v in value["__map__"]}
    return {k: _unpack(v) for k, v in value.items()}
