"""Does the completion end with its answer in the fixed form, given exactly once?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rltok.rewards.answer import Form, check_form, completion_text, ends_with_form


@dataclass(frozen=True)
class AnswerFormat:
    """1 where the fixed form stands exactly once, is not empty and ends the completion, else 0.

    White space may follow; after a box also closing math signs and a full stop.
    """

    form: Form = "answer_tag"
    """`answer_tag`, `boxed` or `hash` (`#### x`)"""

    __name__ = "answer_format"

    def __post_init__(self) -> None:
        check_form(self.form)

    def __call__(
        self, prompts: Sequence[Any], completions: Sequence[Any], completion_ids: Any = None, **columns: Any
    ) -> list[float]:
        return [float(ends_with_form(completion_text(c), self.form)) for c in completions]
