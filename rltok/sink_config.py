"""When and on what attention sinks are measured during training; no torch, so that recipes can be read without."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class SinkConfig:
    """How often, and on how much of the training batch, attention sinks are measured.

    Raises:
        ValueError: a number below its least.
    """

    every: int = 50
    """updates between two measurements"""
    rows: int = 8
    """rows of the sample on a rank"""
    tokens: int = 512
    """of a row at most"""

    def __post_init__(self) -> None:
        for name, least in (("every", 1), ("rows", 1), ("tokens", 2)):
            value = getattr(self, name)
            if value < least:
                raise ValueError(f"{name}={value}; allowed: >= {least}")
