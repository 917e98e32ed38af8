"""Strict and lenient accuracy: is the answer right, and is it right where it was asked for?

    strict  = 1 if the answer in the fixed form is verified (score >= 0.99), else 0
    lenient = 1 if strict, or if a looser candidate of the text is verified, else 0

so lenient >= strict on every completion; their difference is what the policy loses by its form alone.

Candidates of the lenient pair: the last answer in any fixed form, the last number, and the last arithmetic
expression. The expression is left out for the verifier `math`: there `17 + 25`, copied from the question, would
equal the answer 42.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from rltok.rewards.answer import Form, Occurrence, check_form, completion_text, extract_answer, lenient_candidates
from rltok.rewards.verify import DEFAULT_TIMEOUT, VERIFIED, Job, MathJob, ReasoningJob, judge, log_failures

Verifier = Literal["auto", "reasoning_gym", "math", "exact"]

VERIFIERS = ("auto", "reasoning_gym", "math", "exact")


@dataclass(frozen=True)
class StrictAccuracy:
    """1 where the answer in the fixed form is verified, else 0."""

    form: Form = "answer_tag"
    """where the answer must stand: `answer_tag`, `boxed` or `hash` (`#### x`)"""
    occurrence: Occurrence = "first"
    """which answer counts if there are several; `first` leaves no room for hedging"""
    verifier: Verifier = "auto"
    """`reasoning_gym` (columns task, entry), `math` or `exact` (column answer); `auto`: by the columns of the row"""
    timeout: float = DEFAULT_TIMEOUT
    """seconds per answer; a slower one is wrong"""

    __name__ = "strict_accuracy"

    def __post_init__(self) -> None:
        _check(self)

    def __call__(
        self, prompts: Sequence[Any], completions: Sequence[Any], completion_ids: Any = None, **columns: Any
    ) -> list[float]:
        texts = [completion_text(c) for c in completions]
        found = [[] if (a := extract_answer(t, self.form, self.occurrence)) is None else [a] for t in texts]
        return _score(found, columns, self.verifier, self.timeout, self.__name__)


@dataclass(frozen=True)
class LenientAccuracy:
    """1 where strict accuracy gives 1, or a looser candidate of the text is verified, else 0."""

    form: Form = "answer_tag"
    """as in strict_accuracy"""
    occurrence: Occurrence = "first"
    """as in strict_accuracy"""
    verifier: Verifier = "auto"
    """as in strict_accuracy"""
    timeout: float = DEFAULT_TIMEOUT
    """seconds per candidate; a slower one is wrong"""

    __name__ = "lenient_accuracy"

    def __post_init__(self) -> None:
        _check(self)

    def __call__(
        self, prompts: Sequence[Any], completions: Sequence[Any], completion_ids: Any = None, **columns: Any
    ) -> list[float]:
        found = []
        for row, completion in enumerate(completions):
            text = completion_text(completion)
            strict = extract_answer(text, self.form, self.occurrence)
            is_math = row_verifier(columns, row, self.verifier) == "math"
            loose = lenient_candidates(text, expressions=not is_math)
            found.append(list(dict.fromkeys(([] if strict is None else [strict]) + loose)))
        return _score(found, columns, self.verifier, self.timeout, self.__name__)


def row_verifier(columns: Mapping[str, Any], row: int, verifier: Verifier = "auto") -> Verifier:
    """The verifier of a row: `auto` is `reasoning_gym` where the row has task and entry, else `math`.

    Raises:
        ValueError: the row lacks the columns of its verifier.
    """
    has_entry = _cell(columns, "task", row) is not None and _cell(columns, "entry", row) is not None
    chosen = ("reasoning_gym" if has_entry else "math") if verifier == "auto" else verifier
    needed = ("task", "entry") if chosen == "reasoning_gym" else ("answer",)
    missing = [name for name in needed if _cell(columns, name, row) is None]
    if missing:
        present = ", ".join(k for k, v in columns.items() if isinstance(v, list)) or "(none)"
        hint = " or the columns task and entry" if verifier == "auto" else ""
        raise ValueError(
            f"row {row} has no column {' and '.join(missing)}{hint}, which the verifier {chosen!r} needs "
            f"(columns: {present}); map it with data.columns, or choose another `verifier`"
        )
    return chosen


def reasoning_job(columns: Mapping[str, Any], row: int, answer: str) -> ReasoningJob:
    """Job of a row for reasoning-gym's verifier."""
    options = _cell(columns, "task_options", row) or "{}"
    return ReasoningJob(answer, columns["task"][row], columns["entry"][row], options)


def _score(
    found: Sequence[Sequence[str]], columns: Mapping[str, Any], verifier: Verifier, timeout: float, name: str
) -> list[float]:
    """1 for each row of which a candidate is verified. Later candidates are judged only where earlier ones failed."""
    scores = [0.0] * len(found)
    rows = [(row, row_verifier(columns, row, verifier)) for row in range(len(found))]
    verdicts = []
    for depth in range(max(map(len, found), default=0)):
        open_rows = [(r, v) for r, v in rows if not scores[r] and depth < len(found[r])]
        for row, chosen in open_rows:
            if chosen == "exact":
                scores[row] = float(found[row][depth] == str(columns["answer"][row]).strip())
        judged = [row for row, chosen in open_rows if chosen != "exact"]
        makers: Mapping[str, Callable[..., Job]] = {"reasoning_gym": reasoning_job, "math": _math_job}
        jobs = [makers[dict(open_rows)[row]](columns, row, found[row][depth]) for row in judged]
        results = judge(jobs, timeout)
        verdicts += results
        for row, result in zip(judged, results, strict=True):
            scores[row] = float(result.score >= VERIFIED)
    log_failures(verdicts, name, columns.get("log_metric"))
    return scores


def _math_job(columns: Mapping[str, Any], row: int, answer: str) -> MathJob:
    return MathJob(answer, str(columns["answer"][row]))


def _cell(columns: Mapping[str, Any], name: str, row: int) -> Any:
    values = columns.get(name)
    return None if values is None else values[row]


def _check(reward: StrictAccuracy | LenientAccuracy) -> None:
    check_form(reward.form)
    if reward.occurrence not in ("first", "last"):
        raise ValueError(f"occurrence={reward.occurrence!r} is unknown; allowed: first, last")
    if reward.verifier not in VERIFIERS:
        raise ValueError(f"verifier={reward.verifier!r} is unknown; allowed: {', '.join(VERIFIERS)}")
    if not reward.timeout > 0:
        raise ValueError(f"timeout={reward.timeout} must be > 0 seconds")
