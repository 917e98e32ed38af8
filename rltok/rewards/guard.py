"""A reward that fails or hangs stops the run with its name, and the completions it failed on saved to disk."""

from __future__ import annotations

import asyncio
import dataclasses
import inspect
import json
import math
import os
import re
import time
import traceback
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from rltok.rewards.time_limit import Overdue, time_limit
from rltok.secrets import redacted

RewardFunction = Callable[..., Any]

DEFAULT_DIR = "reward_errors"
"""Where failures are saved below the working directory, unless told otherwise."""
REPLAY_SECONDS = 30.0
"""How long to search for the row that makes a reward raise, by calling it one row at a time."""
PER_BATCH = frozenset({"trainer_state", "log_extra", "log_metric"})
"""Keyword arguments of TRL that are not columns."""


class RewardError(RuntimeError):
    """A reward function raised, took too long, or returned other than one finite number (or None) per completion."""

    def __init__(self, message: str, row: int | None = None, file: Path | None = None) -> None:
        super().__init__(message)
        self.row = row
        """index in the batch, None where no single row is to blame"""
        self.file = file
        """the saved failure, None where it could not be saved"""


def guarded(
    function: RewardFunction, name: str, save_dir: str | Path | None = None, timeout: float | None = None
) -> RewardFunction:
    """`function` under `name`, checked at every call; an async function stays one.

    After `timeout` seconds (None: no limit) a call is interrupted; one that cannot be is ended with its process, see
    `rltok.rewards.time_limit`. An async function is interrupted where it awaits.

    Returns:
        A callable with `__name__ == name` that returns one float, or None for "not applicable", per completion.
        It can be pickled where `function` can.

    Raises (when called):
        RewardError: with the name, the row and the file in `save_dir` (default `reward_errors/`) that holds the
            prompt, the completion and the traceback.
        ValueError (at once): a timeout that is not positive.
    """
    if timeout is not None and not timeout > 0:
        raise ValueError(f"timeout={timeout} must be > 0 seconds, or None for no limit (faults.reward_timeout)")
    is_async = inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(
        getattr(function, "__call__", None)  # noqa: B004 - an async callable object hides its `async` there
    )
    kind = _AsyncGuard if is_async else _Guard
    return kind(function, name, Path(DEFAULT_DIR if save_dir is None else save_dir), timeout)


def limited(function: RewardFunction, name: str, save_dir: str | Path, timeout: float) -> RewardFunction:
    """`function` with a time limit: guarded if it is not yet; a limit that it has already stays."""
    if not isinstance(function, _Base):
        return guarded(function, name, save_dir, timeout)
    return function if function.timeout is not None else dataclasses.replace(function, timeout=timeout)


@dataclass(frozen=True)
class _Base:
    function: RewardFunction
    name: str
    save_dir: Path
    timeout: float | None = None

    @property
    def __name__(self) -> str:
        return self.name

    def check(self, result: Any, prompts: Sequence[Any], completions: Sequence[Any]) -> list[float | None]:
        """`result` as a list of floats and None, one per completion."""
        try:
            values = list(result)
        except TypeError:
            self.fail(f"returned {_short(result)}, not a list", None, prompts, completions, value=result)
        if len(values) != len(completions):
            message = f"returned {len(values)} rewards for {len(completions)} completions"
            self.fail(message, None, prompts, completions, value=values)
        return [self.number(value, row, prompts, completions) for row, value in enumerate(values)]

    def number(self, value: Any, row: int, prompts: Sequence[Any], completions: Sequence[Any]) -> float | None:
        """`value` as a finite float; None stays None."""
        if value is None:
            return None
        try:
            number = math.nan if isinstance(value, str | bytes) else float(value)
        except (TypeError, ValueError):
            number = math.nan
        if not math.isfinite(number):
            message = f"returned {_short(value)}, not a finite number or None"
            self.fail(message, row, prompts, completions, value=value)
        return number

    def raised(self, error: Exception, row: int | None, prompts: Sequence[Any], completions: Sequence[Any]) -> NoReturn:
        """Stop because the function raised."""
        self.fail(f"raised {type(error).__name__}: {error}", row, prompts, completions, error=error)

    def overdue(self, error: BaseException, prompts: Sequence[Any], completions: Sequence[Any]) -> NoReturn:
        """Stop because the time was up; the traceback shows where."""
        self.fail(f"took longer than faults.reward_timeout={self.timeout:g} s", None, prompts, completions, error)

    def last_words(self, stack: str, prompts: Sequence[Any], completions: Sequence[Any]) -> str:
        """What is said when the process has to be ended."""
        message = f"did not return within faults.reward_timeout={self.timeout:g} s and could not be interrupted"
        record = self.record(message, None, prompts, completions) | {"traceback": stack}
        text = f"reward function {self.name!r} {message}; rank {os.environ.get('RANK', '0')} ends here"
        return f"{text}; the prompts and completions {self.saved(record, None)[1]}. It hangs in\n{stack}"

    def fail(
        self,
        message: str,
        row: int | None,
        prompts: Sequence[Any],
        completions: Sequence[Any],
        error: BaseException | None = None,
        value: Any = None,
    ) -> NoReturn:
        """Save what is known and raise `RewardError`."""
        where = f"row {row} of {len(completions)}" if row is not None else "the batch as a whole"
        file, saved = self.saved(self.record(message, row, prompts, completions, error, value), row)
        text = f"reward function {self.name!r} {message} ({where}); the prompt and completion {saved}"
        raise RewardError(redacted(text), row, file) from error

    def record(
        self,
        message: str,
        row: int | None,
        prompts: Sequence[Any],
        completions: Sequence[Any],
        error: BaseException | None = None,
        value: Any = None,
    ) -> dict[str, Any]:
        """What is known about a failure."""
        record = {
            "function": self.name,
            "message": message,
            "row": row,
            "prompt": None if row is None else prompts[row],
            "completion": None if row is None else completions[row],
            "value": value,
            "traceback": None if error is None else "".join(traceback.format_exception(error)),
        }
        if row is None:  # no single row is to blame: keep them all
            record |= {"prompts": list(prompts), "completions": list(completions)}
        return record

    def saved(self, record: Mapping[str, Any], row: int | None) -> tuple[Path | None, str]:
        """The file, None where it could not be written, and which of the two in words."""
        try:
            file = _save(record, self.save_dir, self.name, row)
        except OSError as problem:
            return None, f"could not be saved to {self.save_dir}: {problem}"
        return file, f"saved to {file}"


@dataclass(frozen=True)
class _Guard(_Base):
    def __call__(
        self,
        prompts: Sequence[Any],
        completions: Sequence[Any],
        completion_ids: Sequence[Any] | None = None,
        **columns: Any,
    ) -> list[float | None]:
        arguments = _arguments(prompts, completions, completion_ids, columns)

        def last_words(stack: str) -> str:
            return self.last_words(stack, prompts, completions)

        try:
            with time_limit(self.timeout, last_words):
                result = self.function(**arguments)
        except Overdue as error:
            self.overdue(error, prompts, completions)
        except Exception as error:  # user code may raise anything; raised again as RewardError
            try:
                with time_limit(self.timeout, last_words):
                    row = self.blame(arguments)
            except Overdue:
                row = None
            self.raised(error, row, prompts, completions)
        return self.check(result, prompts, completions)

    def blame(self, arguments: Mapping[str, Any]) -> int | None:
        """The first row on which the function raises when called with that row alone."""
        deadline = time.monotonic() + REPLAY_SECONDS
        for row in range(len(arguments["completions"])):
            if time.monotonic() > deadline:
                return None
            try:
                self.function(**_one_row(arguments, row))
            except Exception:  # any exception marks the row
                return row
        return None


@dataclass(frozen=True)
class _AsyncGuard(_Base):
    async def __call__(
        self,
        prompts: Sequence[Any],
        completions: Sequence[Any],
        completion_ids: Sequence[Any] | None = None,
        **columns: Any,
    ) -> list[float | None]:
        arguments = _arguments(prompts, completions, completion_ids, columns)
        limit = asyncio.timeout(self.timeout)

        def last_words(stack: str) -> str:
            return self.last_words(stack, prompts, completions)

        try:
            with time_limit(self.timeout, last_words, interrupt=False):
                async with limit:
                    result = await self.function(**arguments)
        except Exception as error:  # user code may raise anything; raised again as RewardError
            if limit.expired():  # a TimeoutError of the function's own is none of ours
                self.overdue(error, prompts, completions)
            longest = None if self.timeout is None else 2 * self.timeout + 1.0
            with time_limit(longest, last_words, interrupt=False):
                row = await self.blame(arguments)
            self.raised(error, row, prompts, completions)
        return self.check(result, prompts, completions)

    async def blame(self, arguments: Mapping[str, Any]) -> int | None:
        """As `_Guard.blame`; a row that takes longer than a whole batch may is to blame as well."""
        deadline = time.monotonic() + min(REPLAY_SECONDS, self.timeout or REPLAY_SECONDS)
        for row in range(len(arguments["completions"])):
            if time.monotonic() > deadline:
                return None
            try:
                pending: Awaitable[Any] = self.function(**_one_row(arguments, row))
                await asyncio.wait_for(pending, self.timeout)
            except Exception:  # any exception marks the row
                return row
        return None


def _arguments(prompts: Any, completions: Any, completion_ids: Any, columns: Mapping[str, Any]) -> dict[str, Any]:
    return {"prompts": prompts, "completions": completions, "completion_ids": completion_ids, **columns}


def _one_row(arguments: Mapping[str, Any], row: int) -> dict[str, Any]:
    """The arguments of a batch cut to one row; loggers are replaced so that the search leaves no trace in the logs."""
    count = len(arguments["completions"])
    cut: dict[str, Any] = {}
    for key, value in arguments.items():
        if key in ("log_extra", "log_metric"):
            cut[key] = _ignore
        elif key not in PER_BATCH and isinstance(value, list | tuple) and len(value) == count:
            cut[key] = [value[row]]
        else:
            cut[key] = value
    return cut


def _ignore(*_: Any) -> None:
    pass


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _save(record: Mapping[str, Any], folder: Path, name: str, row: int | None) -> Path:
    """Write `record` to a new file of `folder`; the name is unique over rows, processes and time."""
    folder.mkdir(parents=True, exist_ok=True)
    safe = re.sub(r"[^\w.-]+", "_", name)
    place = "batch" if row is None else f"row{row}"
    file = folder / f"{safe}-{place}-{os.getpid()}-{time.time_ns()}.json"
    file.write_text(json.dumps(redacted(record), indent=2, ensure_ascii=False, default=repr) + "\n", encoding="utf-8")
    return file.resolve()
