"""How the rows of an update share forward passes: padding trimmed, passes balanced by tokens, rows packed."""

from __future__ import annotations

from dataclasses import dataclass

from rltok.config import ConfigError


@dataclass(frozen=True)
class BatchingConfig:
    """Micro-batches of the policy update; the default leaves them as TRL cuts them, bit for bit."""

    balance: bool = False
    """cut every optimizer step's rows into micro-batches of equal cost, rows of similar length together, and trim them"""
    max_tokens: int | None = None
    """most tokens of one forward pass, padding included; a longer row goes alone; None: no limit"""
    pack: bool = False
    """put several rows into one, without padding; they do not see each other"""
    multiple_of: int = 1
    """widths are rounded up to this, for kernels that are compiled per shape"""

    def __post_init__(self) -> None:
        for name in ("max_tokens", "multiple_of"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"batching.{name}: {value} must be >= 1", f"batching.{name}")

    @property
    def is_neutral(self) -> bool:
        """True if micro-batches stay TRL's."""
        return not (self.balance or self.pack or self.max_tokens)
