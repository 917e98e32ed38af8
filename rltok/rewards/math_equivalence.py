"""Mathematical equivalence to the reference answer, by math-verify in bounded time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from rltok.rewards.accuracy import row_verifier
from rltok.rewards.answer import FORMS, Occurrence, check_form, completion_text, extract_answer
from rltok.rewards.verify import DEFAULT_TIMEOUT, TEXT_TAIL_CHARS, MathJob, judge, log_failures


@dataclass(frozen=True)
class MathEquivalence:
    """1 where the answer equals the column `answer` mathematically, else 0.

    Literal and numeric equality are decided at once; the rest goes to math-verify in a process of its own, so any
    thread may call it, and an answer that takes longer than `timeout` scores 0.
    """

    form: Literal["text", "answer_tag", "boxed", "hash"] = "text"
    """where the answer stands; `text`: the last box, else what math-verify finds in the last 2000 characters"""
    occurrence: Occurrence = "last"
    """which answer counts if there are several"""
    timeout: float = DEFAULT_TIMEOUT
    """seconds per answer; a slower one is wrong"""

    __name__ = "math_equivalence"

    def __post_init__(self) -> None:
        check_form(self.form, ("text", *FORMS))
        if not self.timeout > 0:
            raise ValueError(f"timeout={self.timeout} must be > 0 seconds")

    def __call__(
        self, prompts: Sequence[Any], completions: Sequence[Any], completion_ids: Any = None, **columns: Any
    ) -> list[float]:
        for row in range(len(completions)):
            row_verifier(columns, row, "math")  # raises where the column is missing
        jobs = [self.job(completion_text(c), str(columns["answer"][row])) for row, c in enumerate(completions)]
        verdicts = judge([job for job in jobs if job is not None], self.timeout)
        log_failures(verdicts, self.__name__, columns.get("log_metric"))
        scores = iter(verdicts)
        return [0.0 if job is None else next(scores).score for job in jobs]

    def job(self, text: str, gold: str) -> MathJob | None:
        """What to judge in one completion; None where there is no answer."""
        if self.form == "text":
            box = extract_answer(text, "boxed", self.occurrence)
            tail = text[-TEXT_TAIL_CHARS:]
            return MathJob(box, gold) if box else MathJob(tail, gold, is_text=True) if tail.strip() else None
        answer = extract_answer(text, self.form, self.occurrence)
        return None if answer is None else MathJob(answer, gold)
