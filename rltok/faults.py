"""What a run does when something goes wrong in the middle of training."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Literal

from rltok.config import ConfigError

ON_NONFINITE = ("stop", "skip")

_TIMED_OUT = re.compile(r"timed out|timeout|timed-out", re.IGNORECASE)
_GONE = re.compile(r"gloo/|Application timeout caused pair closure|TCPStore|NCCL (?:error|operation)|ProcessGroup")


class TrainingFault(RuntimeError):
    """Training cannot go on; the message says what happened, what was saved and which setting decides."""


class NonFiniteError(TrainingFault):
    """A loss or gradient is NaN or infinite."""


class LostProcessError(TrainingFault):
    """Another process of the run died, failed, or did not answer in time."""


@dataclass(frozen=True)
class FaultsConfig:
    """Reactions to faults during training."""

    nonfinite: Literal["stop", "skip"] = "stop"
    """a loss or gradient that is NaN or infinite: end the run, or leave out that optimizer step; the micro-batch is
    saved either way"""
    max_skips: int = 10
    """with `skip`, optimizer steps in a row that may be left out; one more ends the run"""
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


def limit_collectives(ddp_timeout: float) -> None:
    """Let collectives wait for other processes at most `training.ddp_timeout` seconds, also on the CPU.

    transformers drops the setting there, so that gloo would wait its own 30 minutes. One process: nothing to do.
    """
    from torch import distributed

    if distributed.is_available() and distributed.is_initialized() and distributed.get_backend() == "gloo":
        distributed.distributed_c10d._set_pg_timeout(timedelta(seconds=ddp_timeout))


@contextmanager
def explained(rank: int, ddp_timeout: float) -> Iterator[None]:
    """Inside the block, an error of a collective whose other end is gone says so, and what to do.

    NCCL may end the process from a thread of its own after the timeout; that cannot be caught here.

    Args:
        rank: of this process.
        ddp_timeout: `training.ddp_timeout`, seconds that a collective waits for the others.

    Raises:
        LostProcessError: in place of the error of torch.distributed, which is its cause.
    """
    try:
        yield
    except RuntimeError as error:
        happened = _lost(error, ddp_timeout)
        if happened is None:
            raise
        raise LostProcessError(
            f"rank {rank}: {happened}. This process can only wait for it, so the run ends here; its first error "
            "stands in the output of that other process. Start the run again with resume=auto to go on from its last "
            "whole checkpoint."
        ) from error


def _lost(error: RuntimeError, ddp_timeout: float) -> str | None:
    """What an error of torch.distributed says about another process; None: it is none of those."""
    from torch.distributed import DistError

    text = str(error)
    if isinstance(error, TrainingFault) or not (isinstance(error, DistError) or _GONE.search(text)):
        return None
    if _TIMED_OUT.search(text):
        return (
            f"another process did not answer within training.ddp_timeout={ddp_timeout:g} s. If it only works longer "
            "than that (a long rollout, a slow reward), raise training.ddp_timeout; if a reward function hangs, set "
            "faults.reward_timeout"
        )
    return f"another process of this run died or stopped with an error ({text.splitlines()[0][:200]})"
