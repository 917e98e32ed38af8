"""Processes and strategy of a run: what the recipe asks for, how it is started, and whether that is what started."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from rltok.config import ConfigError

Strategy = Literal["single", "ddp", "zero1", "zero2", "zero3", "fsdp"]
STRATEGIES: tuple[str, ...] = ("single", "ddp", "zero1", "zero2", "zero3", "fsdp")


@dataclass(frozen=True)
class LaunchConfig:
    """Processes and strategy; a run that got something else stops before anything is loaded."""

    processes: int | None = None
    """processes over all machines; None: as many as there are"""
    strategy: Strategy | None = None
    """`single`, `ddp` (whole model on every process), DeepSpeed `zero1`, `zero2`, `zero3`, or `fsdp` (FSDP2); None: any"""

    def __post_init__(self) -> None:
        if self.processes is not None and self.processes < 1:
            raise ConfigError(f"launch.processes: {self.processes} must be >= 1", "launch.processes")
        if self.strategy is not None and self.strategy not in STRATEGIES:
            raise ConfigError(
                f"launch.strategy: {self.strategy!r}; allowed: {', '.join(STRATEGIES)}", "launch.strategy"
            )


def check_started(config: LaunchConfig, state: Any) -> None:
    """Compare what runs with what the recipe asked for.

    Raises:
        ConfigError: another number of processes or another strategy; both are named.
    """
