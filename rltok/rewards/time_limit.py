"""A time limit for code that is not ours: first an exception, and if that does not end it, the end of the process.

    after `seconds`             a timer of the kernel raises `Overdue` in the code, where it runs in the main thread
    GRACE later                 a thread says what hangs, with its stack, and ends the process
    LAST_RESORT later           where a C call keeps the interpreter's lock, so that no thread of Python can run:
                                the timer of `faulthandler`, a C thread, prints the stacks and ends the process

A Python thread cannot be ended from outside, hence the process; a launcher then ends the others of the run.
Code that sets SIGALRM or an interval timer of its own is not interrupted, but still ended after the grace.
"""

from __future__ import annotations

import faulthandler
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext

GRACE = 5.0
"""Seconds that code has to end after the exception."""
LAST_RESORT = 3.0
"""Seconds after which the C thread takes over from Python's."""
EXIT_STATUS = 70
"""Of a process that had to be ended (EX_SOFTWARE); where the C thread ends it, 1."""
_AGAIN = 1.0
"""The exception is raised again so often, for code that catches everything and goes on."""
_STDERR = 2


class Overdue(BaseException):
    """The time is up. No `Exception`, so that code which catches those of single rows does not go on with the next."""


LastWords = Callable[[str], str]
"""Stack of the code that hangs -> what to print about it; may save what is known."""


@contextmanager
def time_limit(seconds: float | None, last_words: LastWords, interrupt: bool = True) -> Iterator[None]:
    """Run the block for at most `seconds` (None: no limit).

    Args:
        seconds: > 0.
        last_words: called before the process is ended.
        interrupt: raise in the block; False for a block that has its own way to end in time.

    Raises:
        Overdue: in the block, or after it where the block caught it.
    """
    if seconds is None:
        yield
        return
    interrupt = interrupt and hasattr(signal, "setitimer") and threading.current_thread() is threading.main_thread()
    done = threading.Event()
    code = threading.get_ident()
    watcher = threading.Thread(
        target=_watch, args=(done, code, seconds, last_words, interrupt), name="time limit", daemon=True
    )
    with _last_resort(seconds + GRACE + LAST_RESORT):
        watcher.start()
        try:
            with _alarm(seconds) if interrupt else nullcontext():
                yield
        finally:
            done.set()
            watcher.join()


class _Alarm:
    """The handler of one block."""

    def __init__(self) -> None:
        self.armed, self.rang = True, False

    def __call__(self, *_: object) -> None:
        if self.armed:
            self.rang = True
            raise Overdue


@contextmanager
def _alarm(seconds: float) -> Iterator[None]:
    alarm = _Alarm()
    previous, rest = signal.signal(signal.SIGALRM, alarm), (0.0, 0.0)
    try:
        try:
            rest = signal.setitimer(signal.ITIMER_REAL, seconds, _AGAIN)
            yield
        finally:
            alarm.armed = False
    finally:  # once more outside: the signal may come between the block's end and the line above
        alarm.armed = False
        signal.setitimer(signal.ITIMER_REAL, *rest)
        signal.signal(signal.SIGALRM, previous)
    if alarm.rang:
        raise Overdue


def _watch(done: threading.Event, code: int, seconds: float, last_words: LastWords, interrupt: bool) -> None:
    if done.wait(seconds + _AGAIN):
        return
    if interrupt and isinstance(signal.getsignal(signal.SIGALRM), _Alarm):
        signal.pthread_kill(code, signal.SIGALRM)  # the timer may have been taken by the code
    if done.wait(GRACE - _AGAIN):
        return
    frame = sys._current_frames().get(code)
    text = last_words("".join(traceback.format_stack(frame)))
    if done.is_set():
        return
    os.write(_STDERR, f"\n{text}\n".encode(errors="replace"))
    faulthandler.dump_traceback(_STDERR, all_threads=True)
    os._exit(EXIT_STATUS)


_deadlines: dict[object, float] = {}
_lock = threading.Lock()


@contextmanager
def _last_resort(seconds: float) -> Iterator[None]:
    """faulthandler has one timer per process: it is set to the earliest deadline."""
    key = object()
    with _lock:
        _deadlines[key] = time.monotonic() + seconds
        _set_timer()
    try:
        yield
    finally:
        with _lock:
            del _deadlines[key]
            _set_timer()


def _set_timer() -> None:
    if not _deadlines:
        faulthandler.cancel_dump_traceback_later()
        return
    rest = max(0.1, min(_deadlines.values()) - time.monotonic())
    faulthandler.dump_traceback_later(rest, exit=True, file=_STDERR)


def _after_fork() -> None:
    """A forked child has neither the threads nor the timers."""
    global _lock
    _lock = threading.Lock()
    _deadlines.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
