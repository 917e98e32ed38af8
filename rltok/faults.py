"""What a run does when something goes wrong in the middle of training."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from rltok.config import ConfigError

ON_NONFINITE = ("stop", "skip")


@dataclass(frozen=True)
class FaultsConfig:
    """Reactions to faults during training."""

    nonfinite: Literal["stop", "skip"] = "stop"
    """a loss or gradient that is NaN or infinite: end the run, or leave out that optimizer step; the micro-batch is
    saved either way"""
    max_skips: int = 10
    """with `skip`, optimizer steps in a row that may be left out before the run ends"""
    reward_timeout: float | None = None
    """seconds one call of a reward function may take; None: no limit"""

    def __post_init__(self) -> None:
        if self.nonfinite not in ON_NONFINITE:
            raise ConfigError(
                f"faults.nonfinite: {self.nonfinite!r}; allowed: {', '.join(ON_NONFINITE)}", "faults.nonfinite"
            )
        if self.max_skips < 1:
            raise ConfigError(f"faults.max_skips: {self.max_skips} must be >= 1", "faults.max_skips")
        if self.reward_timeout is not None and self.reward_timeout <= 0:
            raise ConfigError(
                f"faults.reward_timeout: {self.reward_timeout} must be > 0, or null for no limit",
                "faults.reward_timeout",
            )
