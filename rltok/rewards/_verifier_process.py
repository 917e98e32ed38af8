"""The process that judges answers: reads one JSON job per line, writes one JSON reply per line.

Run by its path (never imported by rltok), so that neither rltok nor a file in the caller's directory is imported.
Verifiers evaluate text that a model wrote (`eval` and sympy's parser among them). Here that can take any time, crash
or fill the memory without harm to the training process: a timer of the kernel ends this process, whatever it does.
While an answer is judged, an audit hook refuses to write files, start processes, open connections and load libraries.
That stops what a model stumbles upon; it is no sandbox against a text made to break out of it.

Replies: `{"score": x}`; `{"error": text}` where the verifier raised on the answer; `{"fault": text}` where the job
itself is wrong (unknown task, broken entry), which is never the answer's fault.
"""

from __future__ import annotations

import functools
import importlib.util
import json
import logging
import math
import os
import re
import signal
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

MEMORY_LIMIT_BYTES = 4 << 30
MAX_MESSAGE_CHARS = 300

Reply = dict[str, Any]
Judge = Callable[[], float]


READING = frozenset({"os.listdir", "os.scandir", "os.walk", "os.fwalk", "os.getxattr", "os.listxattr"})
"""Events of the module os that change nothing."""
REFUSED = ("os", "subprocess", "socket", "shutil", "ctypes", "tempfile", "pty", "fcntl", "mmap", "resource", "signal")
"""Modules whose other events are refused while answers are judged."""


class Fault(Exception):
    """A job that cannot be judged, whatever the answer."""


def serve() -> None:
    """Answer jobs until the other end closes."""
    requests, replies = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    nowhere = os.open(os.devnull, os.O_RDWR)
    for descriptor in (0, 1):  # what a verifier prints or reads must not touch the protocol
        os.dup2(nowhere, descriptor)
    warnings.simplefilter("ignore")
    logging.disable(logging.CRITICAL)
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    limit_memory()
    refuse_side_effects()
    for line in requests:
        judging.clear()
        if json.loads(line).get("kind") != "load":  # libraries may do what they like while they are loaded
            judging.append(True)
        replies.write(json.dumps(answer(json.loads(line))).encode() + b"\n")
        replies.flush()


def answer(job: dict[str, Any]) -> Reply:
    """The reply to one job; the timer starts when everything but the judging is done."""
    try:
        judge = prepare(job)
    except Exception as error:  # reported to the caller, who raises it
        return {"fault": describe(error)}
    signal.setitimer(signal.ITIMER_REAL, job.get("timeout", 0))
    try:
        score = float(judge())
    except BaseException as error:  # an evaluated `exit()` raises SystemExit
        return {"error": describe(error)}
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
    return {"score": score} if math.isfinite(score) else {"error": f"the verifier returned {score}"}


def prepare(job: dict[str, Any]) -> Judge:
    """Everything that does not depend on the answer."""
    kind = job["kind"]
    if kind == "load":
        warm_up(job["of"])
        return lambda: 1.0
    if kind == "reasoning_gym":
        task = reasoning_task(job["task"], job["options"])
        entry = entry_codec().decode_entry(job["entry"])
        return lambda: task.score_answer(job["answer"], entry)
    if kind == "math":
        return lambda: equivalence(job["answer"], job["gold"], job["is_text"])
    raise Fault(f"unknown kind of job {kind!r}")


def warm_up(kind: str) -> None:
    """Import and exercise a verifier once, so that no job's time is spent on it."""
    if kind == "math":
        equivalence(r"\frac{1}{2}", "0.5", False)
    else:
        import reasoning_gym  # noqa: F401


@functools.lru_cache(maxsize=256)
def reasoning_task(name: str, options: str) -> Any:
    """A reasoning-gym task made for scoring only."""
    import reasoning_gym

    try:
        return reasoning_gym.create_dataset(name, **{"seed": 0, "size": 1, **json.loads(options)})
    except AssertionError as error:
        raise Fault(f"options {options} are refused by {name!r}: {error}") from error


@functools.lru_cache(maxsize=4096)
def parse_gold(gold: str) -> tuple[Any, ...]:
    """math-verify's reading of a reference answer."""
    from math_verify import parse

    return tuple(parse(gold if r"\boxed" in gold else boxed(gold), parsing_timeout=None))


def equivalence(prediction: str, gold: str, is_text: bool) -> float:
    """1 where math-verify finds the prediction equal to the reference; `is_text`: it looks for the answer itself."""
    from math_verify import parse, verify

    reference = parse_gold(gold)
    if not reference:
        raise ValueError(f"math-verify cannot read the reference answer {gold!r}")
    read = parse(prediction if is_text else boxed(prediction), parsing_timeout=None)
    return float(verify(list(reference), read, timeout_seconds=None))


def boxed(text: str) -> str:
    """A bare answer as LaTeX that math-verify takes whole; Python's `**` becomes `^`."""
    text = re.sub(r"\*\*\s*\(?\s*(-?\d+)\s*\)?", r"^{\1}", text.strip().strip("$"))
    return rf"\boxed{{{text}}}"


@functools.cache
def entry_codec() -> Any:
    """The neighbouring module `entries`, loaded by its path."""
    spec = importlib.util.spec_from_file_location("rltok_entries", Path(__file__).with_name("entries.py"))
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def limit_memory() -> None:
    """Let a runaway answer end in MemoryError here rather than in the machine's swap (where the system allows it)."""
    import resource

    try:
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY_LIMIT_BYTES, MEMORY_LIMIT_BYTES))
    except (ValueError, OSError) as error:
        print(f"no memory limit: {error}", file=sys.stderr)


judging: list[bool] = []
"""Not empty while an answer is judged."""


def refuse_side_effects() -> None:
    """While an answer is judged no file is written, no process started, no connection opened, no library loaded."""
    import ctypes  # noqa: F401 - loads a library, which it may not do later

    sys.dont_write_bytecode = True
    writing = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_TRUNC

    def refuse(event: str, arguments: tuple[Any, ...]) -> None:
        if not judging:
            return
        if event == "open":
            flags = arguments[2]
            if isinstance(flags, int) and flags & writing:
                raise PermissionError(f"an answer may not write {arguments[0]!r}")
        elif event.partition(".")[0] in REFUSED and event not in READING:
            raise PermissionError(f"an answer may not do {event}")

    sys.addaudithook(refuse)


def describe(error: BaseException) -> str:
    """Type and message, cut: the message may be as long as the answer."""
    try:
        text = str(error)
    except Exception:  # the evaluated answer may define its own exceptions
        text = "(the message cannot be shown)"
    return f"{type(error).__name__}: {text[:MAX_MESSAGE_CHARS]}"


if __name__ == "__main__":
    serve()
