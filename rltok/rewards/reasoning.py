"""reasoning-gym's own score of the answer, partial credit included."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rltok.rewards.accuracy import reasoning_job, row_verifier
from rltok.rewards.answer import Form, Occurrence, check_form, completion_text, extract_answer
from rltok.rewards.verify import DEFAULT_TIMEOUT, judge, log_failures


@dataclass(frozen=True)
class ReasoningGym:
    """Score of reasoning-gym's verifier in [0, 1]; 0 without an answer in the fixed form.

    Needs the columns `task` and `entry` (from `encode_entry`), and `task_options` (JSON) where the task was made
    with parameters. An answer on which the verifier raises or takes too long scores 0 and is counted in the metrics
    `reasoning_gym/verifier_errors` and `reasoning_gym/verifier_timeouts`.
    """

    form: Form = "answer_tag"
    """where the answer must stand: `answer_tag`, `boxed` or `hash` (`#### x`)"""
    occurrence: Occurrence = "first"
    """which answer counts if there are several"""
    timeout: float = DEFAULT_TIMEOUT
    """seconds per answer"""

    __name__ = "reasoning_gym"

    def __post_init__(self) -> None:
        check_form(self.form)
        if not self.timeout > 0:
            raise ValueError(f"timeout={self.timeout} must be > 0 seconds")

    def __call__(
        self, prompts: Sequence[Any], completions: Sequence[Any], completion_ids: Any = None, **columns: Any
    ) -> list[float]:
        answers = [extract_answer(completion_text(c), self.form, self.occurrence) for c in completions]
        for row in range(len(answers)):
            row_verifier(columns, row, "reasoning_gym")  # raises where a column is missing
        rows = [row for row, answer in enumerate(answers) if answer is not None]
        verdicts = judge([reasoning_job(columns, row, answers[row] or "") for row in rows], self.timeout)
        log_failures(verdicts, self.__name__, columns.get("log_metric"))
        scores = dict(zip(rows, (v.score for v in verdicts), strict=True))
        return [scores.get(row, 0.0) for row in range(len(answers))]
