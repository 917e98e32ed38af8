"""Steering in a recipe: `rollout.steering` and `evaluation.steering`."""

from __future__ import annotations

import math
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import cached_property
from typing import ClassVar

from torch import nn

from rltok.config import ConfigError
from rltok.correction import CorrectionConfig
from rltok.steering.files import StoredVectors, check_stored, load_vectors
from rltok.steering.hooks import Steering, SteeringVector, decoder_layers, steered


@dataclass(frozen=True)
class SteeringConfig:
    """Steering vectors of a file, added to hidden states while completions are made."""

    path: str
    """File of `rltok steer`."""
    strength: float | None = None
    """Factor of every vector; null as stored, 0 is the plain sampler."""
    layers: tuple[int, ...] | None = None
    """Layers of the file that are used; null: all."""

    recommended: ClassVar[CorrectionConfig] = CorrectionConfig(mode="truncate")
    """correction that goes with it where a recipe has none"""

    def __post_init__(self) -> None:
        if not self.path:
            raise ValueError("path is empty: name a file of `rltok steer`")
        if self.strength is not None and not math.isfinite(self.strength):
            raise ValueError(f"strength={self.strength} must be finite; null takes the file's, 0 is off")
        if self.layers is not None:
            object.__setattr__(self, "layers", tuple(self.layers))
            if not self.layers or len(set(self.layers)) != len(self.layers) or min(self.layers) < 0:
                raise ValueError(f"layers={list(self.layers)}; allowed: distinct indices from 0, or null for all")

    @property
    def is_neutral(self) -> bool:
        """True if it can never change a sample."""
        return self.strength == 0

    def load(self, model: nn.Module) -> list[SteeringVector]:
        """Vectors with this strength, on the devices of their layers; the file is read once, its weights compared once.

        Raises:
            ConfigError: no such file, a file of another kind, a layer that it lacks, or vectors of another model.
        """
        try:
            stored = self._stored
            check_stored(stored, model, f"path={self.path!r}", digest=not self.__dict__.get("_compared", False))
        except ConfigError:
            raise
        except ValueError as error:
            raise ConfigError(f"steering: {error}") from error
        self.__dict__["_compared"] = True  # weights that are being trained differ at every later call
        modules = decoder_layers(model)
        return [
            replace(
                vector,
                vector=vector.vector.to(next(modules[vector.layer].parameters()).device),
                strength=vector.strength if self.strength is None else self.strength,
            )
            for vector in stored.vectors
            if self.layers is None or vector.layer in self.layers
        ]

    def attach(self, model: nn.Module) -> AbstractContextManager[Steering]:
        """`steered` with the vectors of the file; at strength 0 the file is not read.

        Raises:
            ConfigError: as `load`.
        """
        return steered(model, [] if self.is_neutral else self.load(model))

    @cached_property
    def _stored(self) -> StoredVectors:
        stored = load_vectors(self.path)
        held = [vector.layer for vector in stored.vectors]
        missing = [layer for layer in self.layers or () if layer not in held]
        if missing:
            raise ValueError(f"path={self.path!r} has no vectors of layers {missing}; it has {held}")
        return stored
