"""Processors as one line of text: how they reach an engine that runs in another process, or behind HTTP.

    [{"processor": "CyclicReflexLogitsProcessor", "word_ids": [11, 12], "amplitude": 5.0, ...}, {...}]

A list in the order to run; each entry names a class of `PROCESSORS` and its constructor arguments
(`RolloutProcessor.settings`). Only these classes are built, and only from plain values of the right type. A new method
is one more class in the table.
"""

from __future__ import annotations

import dataclasses
import inspect
import json
import typing
from collections.abc import Sequence
from functools import cache
from typing import Any

from rltok.config import ConfigError, convert, suggestion
from rltok.sampling.budget_forcing import BudgetForcingLogitsProcessor
from rltok.sampling.cyclic_reflex import CyclicReflexLogitsProcessor
from rltok.sampling.processor import RolloutProcessor
from rltok.sampling.suppression import ReflectionSuppressionLogitsProcessor
from rltok.sampling.temperature import AdaptiveTemperature
from rltok.sampling.thought_switching import ThoughtSwitchingLogitsProcessor

KEY = "rltok_decoding"
"""Name of the request parameter that carries the text."""

CLASSES: tuple[type[RolloutProcessor], ...] = (
    AdaptiveTemperature,
    BudgetForcingLogitsProcessor,
    CyclicReflexLogitsProcessor,
    ReflectionSuppressionLogitsProcessor,
    ThoughtSwitchingLogitsProcessor,
)
PROCESSORS = {cls.__name__: cls for cls in CLASSES}
"""Name -> class of every processor that an engine may build from text."""


def encode(processors: Sequence[RolloutProcessor]) -> str:
    """The text from which `decode` makes the same processors again, in the same order.

    Raises:
        ValueError: a processor whose class is not in `PROCESSORS`.
    """
    entries = []
    for processor in processors:
        name = type(processor).__name__
        if PROCESSORS.get(name) is not type(processor):
            raise ValueError(
                f"{name} cannot be sent to an engine; allowed: {', '.join(PROCESSORS)}. Add it to "
                "rltok.sampling.serial.CLASSES, or generate with transformers (use_vllm=False)."
            )
        entries.append({"processor": name} | processor.settings())
    return json.dumps(entries, separators=(",", ":"))


def decode(text: str) -> list[RolloutProcessor]:
    """The processors that `encode` wrote down; new objects at every call.

    Raises:
        ValueError: no JSON list of objects, an unknown class or argument, a missing argument, a value of the wrong type
            or out of range; says where.
    """
    if not isinstance(text, str):
        raise ValueError(f"{KEY}={text!r} is not a text; send the JSON list as one string")
    try:
        entries = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{KEY} is no JSON: {error}") from None
    if not isinstance(entries, list):
        raise ValueError(f'{KEY} is {type(entries).__name__}, not a list of {{"processor": NAME, ...}}')
    return [_build(entry, f"{KEY}[{index}]") for index, entry in enumerate(entries)]


def _build(entry: Any, path: str) -> RolloutProcessor:
    if not isinstance(entry, dict) or "processor" not in entry:
        raise ValueError(f'{path}: {entry!r} is no object with a "processor"; known: {", ".join(PROCESSORS)}')
    name = entry["processor"]
    if not isinstance(name, str) or name not in PROCESSORS:
        raise ValueError(f"{path}: unknown processor {name!r}{suggestion(str(name), PROCESSORS)}")
    allowed = _arguments(name)
    given = {key: value for key, value in entry.items() if key != "processor"}
    for key in given:
        if key not in allowed:
            raise ValueError(f"{path}: {name} has no argument {key!r}{suggestion(key, allowed)}")
    try:
        arguments = {key: convert(allowed[key], given[key], f"{path}.{key}") for key in given}
        return PROCESSORS[name](**arguments)
    except ConfigError as error:
        raise ValueError(str(error)) from None
    except (ValueError, TypeError) as error:  # out of range, or an argument missing
        raise ValueError(f"{path}: {name}: {error}") from None


@cache
def _arguments(name: str) -> dict[str, Any]:
    """Argument -> type hint of a constructor."""
    cls: Any = PROCESSORS[name]
    known = typing.get_type_hints(cls if dataclasses.is_dataclass(cls) else cls.__init__)
    return {argument: known.get(argument, Any) for argument in inspect.signature(cls).parameters}
