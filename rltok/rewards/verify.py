"""Judging answers in bounded time: one verifier process per training process, restarted when it had to be ended.

A job that takes longer than its timeout scores 0 (`status="timeout"`), one on which the verifier raises scores 0
(`status="error"`). Works from any thread and after a fork: threads share the process one job at a time, a forked
child starts its own. Cost: about a second at the first use, then about 0.1 ms per job above the verifier's own time.

Left out: several verifier processes per training process; a batch with many pathological answers waits for each.
"""

from __future__ import annotations

import atexit
import json
import os
import re
import selectors
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction
from pathlib import Path
from typing import IO, Any, Literal, NamedTuple

from rltok.secrets import without_secrets

Status = Literal["ok", "timeout", "error"]

VERIFIED = 0.99
"""Score from which an answer counts as right."""
DEFAULT_TIMEOUT = 5.0
"""Seconds that one answer may take."""
START_TIMEOUT = 120.0
"""Seconds that the verifier process may take to import its libraries."""
GRACE = 2.0
"""Seconds after the timeout at which this side ends a process that did not end itself."""
MAX_JOBS = 10_000
"""Jobs after which the process is replaced, so that what sympy's caches keep stays far from the memory limit."""
MAX_ANSWER_CHARS = 4096
"""A longer extracted answer is wrong unless it equals the reference literally."""
TEXT_TAIL_CHARS = 2000
"""End of a completion in which math-verify looks for an answer that has no fixed form."""

_PLAIN_NUMBER = re.compile(r"[-+]?(?:\d{1,3}(?:,\d{3})+|\d+)?(?:\.\d*)?")
_PLAIN_FRACTION = re.compile(r"([-+]?\d{1,30})\s*/\s*(\d{1,30})")


class VerifierError(RuntimeError):
    """The verifier process cannot start, or a job is wrong in a way that no answer could cause."""


class Verdict(NamedTuple):
    """Score of one answer, and how it came about."""

    score: float
    """what the verifier returned; 0 unless `status` is `ok`"""
    status: Status = "ok"
    detail: str = ""
    """the verifier's error, if any"""


class ReasoningJob(NamedTuple):
    """One answer for reasoning-gym's own verifier."""

    answer: str
    task: str
    entry: str
    """from `encode_entry`"""
    options: str = "{}"
    """JSON of the task's parameters"""

    def fast(self) -> Verdict | None:
        """Only the verifier knows."""
        return None

    def message(self) -> dict[str, Any]:
        """The job as the verifier process reads it."""
        return {"kind": "reasoning_gym", **self._asdict()}


class MathJob(NamedTuple):
    """One answer for math-verify."""

    answer: str
    gold: str
    is_text: bool = False
    """the answer is a text in which math-verify finds the answer itself"""

    def fast(self) -> Verdict | None:
        """Verdict on literally equal answers and on plain numbers, without the verifier process."""
        if self.is_text:
            return None
        score = compare_plain(self.answer, self.gold)
        if score is None and len(self.answer) > max(MAX_ANSWER_CHARS, 2 * len(self.gold)):
            score = 0.0
        return None if score is None else Verdict(score)

    def message(self) -> dict[str, Any]:
        """The job as the verifier process reads it."""
        return {"kind": "math", **self._asdict()}


Job = ReasoningJob | MathJob


def judge(jobs: Sequence[Job], timeout: float = DEFAULT_TIMEOUT) -> list[Verdict]:
    """Verdicts on `jobs`, in order; equal jobs are judged once.

    Args:
        jobs: what to judge.
        timeout: seconds per job, > 0.

    Raises:
        VerifierError: the verifier process cannot start, or a job names an unknown task or a broken entry.
    """
    known: dict[Job, Verdict] = {}
    for job in jobs:
        if job not in known:
            known[job] = job.fast() or _shared().ask(job.message(), timeout)
    return [known[job] for job in jobs]


def math_equal(answer: str, gold: str, timeout: float = DEFAULT_TIMEOUT) -> bool:
    """Whether two answers are mathematically equal by math-verify; False where that takes longer than `timeout` s."""
    return judge([MathJob(answer, gold)], timeout)[0].score >= VERIFIED


def compare_plain(answer: str, gold: str) -> float | None:
    """1 for literally equal answers and equal numbers, 0 for clearly different numbers, None where it takes more.

    Numbers within a relative 1e-3 that are not both integers are left to math-verify's rounding rules.
    """
    answer, gold = _tidy(answer), _tidy(gold)
    if not answer:
        return 0.0
    if answer == gold:
        return 1.0
    a, b = _plain_number(answer), _plain_number(gold)
    if a is None or b is None:
        return None
    if a == b:
        return 1.0
    both_integers = a.denominator == 1 and b.denominator == 1
    return 0.0 if both_integers or abs(a - b) > Fraction(1, 1000) * max(abs(a), abs(b)) else None


def _tidy(text: str) -> str:
    return text.strip().strip("$").strip().removesuffix(".").strip()


def _plain_number(text: str) -> Fraction | None:
    if len(text) > 64:
        return None
    if (fraction := _PLAIN_FRACTION.fullmatch(text)) is not None:
        top, bottom = int(fraction.group(1)), int(fraction.group(2))
        return Fraction(top, bottom) if bottom else None
    if _PLAIN_NUMBER.fullmatch(text) is None or not any(c.isdigit() for c in text):
        return None
    return Fraction(text.replace(",", "").removesuffix("."))


class VerifierProcess:
    """A running `_verifier_process.py`, started at the first job; safe to share between threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._stderr: IO[bytes] | None = None
        self._loaded: set[str] = set()
        self._jobs = 0

    @property
    def pid(self) -> int | None:
        """Process id while it runs."""
        return None if self._process is None else self._process.pid

    def ask(self, message: Mapping[str, Any], timeout: float) -> Verdict:
        """Verdict on one job.

        A process that dies without having used up its time may have been ended from outside (memory pressure),
        so the job gets a second try before it counts as an error.
        """
        if not timeout > 0:
            raise ValueError(f"timeout={timeout} must be > 0 seconds")
        with self._lock:
            for _ in range(2):
                self._ensure(str(message["kind"]))
                started = time.monotonic()
                reply = self._exchange({**message, "timeout": timeout}, timeout + GRACE)
                if reply is not None:
                    return _verdict(reply, message)
                if time.monotonic() - started >= timeout or self._reap() == -signal.SIGALRM:
                    self._reap()
                    return Verdict(0.0, "timeout", f"took more than {timeout} s")
            return Verdict(0.0, "error", "the verifier process died of it twice")

    def close(self) -> None:
        """End the process."""
        with self._lock:
            self._reap()

    def disown(self) -> None:
        """After a fork, in the child: drop the parent's process without ending it."""
        if self._process is not None:
            for pipe in (self._process.stdin, self._process.stdout):
                if pipe is not None:
                    pipe.close()
            self._process.returncode = 0  # not our child: keep Popen from waiting for it
        self._process = None

    def _ensure(self, kind: str) -> None:
        """Start the process and load the verifier of `kind` where that has not been done."""
        if self._jobs >= MAX_JOBS:
            self._reap()
        if self._process is None:
            self._start()
        self._jobs += 1
        if kind in self._loaded:
            return
        reply = self._exchange({"kind": "load", "of": kind}, START_TIMEOUT)
        if reply is None or "score" not in reply:
            reason = self._complaint() if reply is None else reply.get("fault") or reply.get("error")
            self._reap()
            raise VerifierError(f"the verifier for {kind!r} cannot start: {reason}")
        self._loaded.add(kind)

    def _start(self) -> None:
        self._jobs, self._stderr = 0, tempfile.TemporaryFile()  # noqa: SIM115 - lives as long as the process
        threads = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
        self._process = subprocess.Popen(
            # -P: no directory of ours or of the user in front of the installed packages
            [sys.executable, "-P", str(Path(__file__).with_name("_verifier_process.py"))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._stderr,
            bufsize=0,
            env={**without_secrets(os.environ), **threads, "CUDA_VISIBLE_DEVICES": ""},
            start_new_session=True,  # an interrupt from the keyboard is the training process's to handle
        )

    def _exchange(self, message: Mapping[str, Any], timeout: float) -> dict[str, Any] | None:
        """Send one line and wait for one; None where the process died or was ended for being late."""
        assert self._process is not None and self._process.stdin is not None and self._process.stdout is not None
        try:
            _write_all(self._process.stdin.fileno(), json.dumps(message).encode() + b"\n")
        except BrokenPipeError:
            return None
        line = _read_line(self._process.stdout.fileno(), timeout)
        if line is None:
            os.killpg(self._process.pid, signal.SIGKILL)
            return None
        return json.loads(line) if line else None

    def _reap(self) -> int | None:
        """End the process if it still runs; its return code."""
        process, self._process, self._loaded = self._process, None, set()
        if process is None:
            return None
        for pipe in (process.stdin, process.stdout):
            if pipe is not None:
                pipe.close()
        try:
            process.wait(timeout=1.0)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        if self._stderr is not None:
            self._stderr.close()
            self._stderr = None
        return process.returncode

    def _complaint(self) -> str:
        """Last words of the process."""
        if self._stderr is None:
            return "no message"
        self._stderr.seek(0)
        return self._stderr.read()[-2000:].decode(errors="replace").strip() or "no message"


def _verdict(reply: Mapping[str, Any], message: Mapping[str, Any]) -> Verdict:
    if "fault" in reply:
        named = {k: message[k] for k in ("kind", "task", "options") if k in message}
        raise VerifierError(f"a row cannot be judged, whatever the answer: {reply['fault']} (job {named})")
    if "error" in reply:
        return Verdict(0.0, "error", str(reply["error"]))
    return Verdict(float(reply["score"]))


def _write_all(descriptor: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(descriptor, view) :]


def _read_line(descriptor: int, timeout: float) -> bytes | None:
    """One line, b"" at the end of the stream, None after `timeout` seconds."""
    deadline, data = time.monotonic() + timeout, b""
    with selectors.DefaultSelector() as selector:
        selector.register(descriptor, selectors.EVENT_READ)
        while not data.endswith(b"\n"):
            remaining = deadline - time.monotonic()
            if remaining <= 0 or not selector.select(remaining):
                if time.monotonic() >= deadline:
                    return None
                continue
            chunk = os.read(descriptor, 65536)
            if not chunk:
                return b""
            data += chunk
    return data


_verifier: VerifierProcess | None = None
_verifier_lock = threading.Lock()


def _shared() -> VerifierProcess:
    """This process's verifier."""
    global _verifier
    with _verifier_lock:
        if _verifier is None:
            _verifier = VerifierProcess()
            atexit.register(_verifier.close)
        return _verifier


def _after_fork() -> None:
    """A forked child must neither share its parent's pipes nor wait for a lock that a thread of the parent holds."""
    global _verifier, _verifier_lock
    inherited, _verifier, _verifier_lock = _verifier, None, threading.Lock()
    if inherited is not None:
        atexit.unregister(inherited.close)
        inherited.disown()


os.register_at_fork(after_in_child=_after_fork)

LogMetric = Callable[[str, float], None]


def log_failures(verdicts: Sequence[Verdict], name: str, log_metric: LogMetric | None) -> None:
    """Log the fractions of answers that ran out of time and on which the verifier raised, where a logger is given."""
    if log_metric is None:
        return
    count = max(len(verdicts), 1)
    log_metric(f"{name}/verifier_timeouts", sum(v.status == "timeout" for v in verdicts) / count)
    log_metric(f"{name}/verifier_errors", sum(v.status == "error" for v in verdicts) / count)
