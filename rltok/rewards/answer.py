"""Finding the answer in a completion: the fixed forms, and the looser candidates of lenient scoring.

| form | looks like |
| --- | --- |
| `answer_tag` | `<answer>42</answer>` |
| `boxed` | `\\boxed{42}`, braces balanced |
| `hash` | `#### 42`, to the end of the line |
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any, Literal, get_args

Form = Literal["answer_tag", "boxed", "hash"]
Occurrence = Literal["first", "last"]

FORMS: tuple[str, ...] = get_args(Form)

_TAG = re.compile(r"<answer>((?:(?!<answer>).)*?)</answer>", re.DOTALL)
_HASH = re.compile(r"####[ \t]*([^\n]*)")
_BOX = re.compile(r"\\(?:boxed|fbox)\s*\{")
_NUMBER = re.compile(r"(?<![\w.)])[-+]?(?:\d[\d,]*(?:\.\d+)?|\.\d+)(?:/\d+)?")
_EXPRESSION = re.compile(r"[-+(\d][\d \t+\-*/().×÷]*")
_OPERATION = re.compile(r"[\d)]\s*[-+*/×÷]\s*[(\d+-]")
_CLOSING = ".,;$ \t\n\r"
_MATH_CLOSING = re.compile(r"(?:\\\)|\\\]|[.$\s])*")


def completion_text(completion: str | list[dict[str, Any]]) -> str:
    """Text of a completion: the string itself, or the assistant messages' content joined by newlines.

    Raises:
        TypeError: neither a string nor a list of messages.
    """
    if isinstance(completion, str):
        return completion
    if not isinstance(completion, list) or not all(isinstance(m, dict) for m in completion):
        raise TypeError(f"completion is a {type(completion).__name__}; expected a string or a list of messages")
    return "\n".join(_content(m) for m in completion if m.get("role", "assistant") == "assistant")


def check_form(form: str, allowed: Iterable[str] = FORMS) -> None:
    """Raise `ValueError` for an unknown form."""
    names = tuple(allowed)
    if form not in names:
        raise ValueError(f"form={form!r} is unknown; allowed: {', '.join(names)}")


def extract_answer(text: str, form: Form = "answer_tag", occurrence: Occurrence = "first") -> str | None:
    """The stripped answer written in `form`, or None where there is none (an empty answer counts as none).

    Raises:
        ValueError: unknown form or occurrence.
    """
    check_form(form)
    if occurrence not in get_args(Occurrence):
        raise ValueError(f"occurrence={occurrence!r} is unknown; allowed: first, last")
    found = [inner for inner, _, _ in find_form(text, form)]
    if not found:
        return None
    return found[0 if occurrence == "first" else -1] or None


def ends_with_form(text: str, form: Form) -> bool:
    """Whether `text` has the form exactly once and nothing but white space (boxed: closing `$`, `.`) behind it."""
    found = find_form(text, form)
    if len(found) != 1 or not found[0][0]:
        return False
    if form == "answer_tag" and (text.count("<answer>") != 1 or text.count("</answer>") != 1):
        return False
    rest = text[found[0][2] :]
    return _MATH_CLOSING.fullmatch(rest) is not None if form == "boxed" else not rest.strip()


def find_form(text: str, form: Form) -> list[tuple[str, int, int]]:
    """(stripped content, start, end) of every occurrence of `form`."""
    if form == "boxed":
        return _boxes(text)
    pattern = _TAG if form == "answer_tag" else _HASH
    return [(m.group(1).strip(), m.start(), m.end()) for m in pattern.finditer(text)]


def lenient_candidates(text: str, *, expressions: bool = True) -> list[str]:
    """What lenient scoring tries: the last answer of each form, the last expression, the last number.

    Args:
        text: the whole completion.
        expressions: also the last arithmetic expression with an operator, such as `(3 + 4) * 2`.
    """
    found: list[str | None] = [extract_answer(text, form, "last") for form in get_args(Form)]
    if expressions:
        found.append(last_expression(text))
    found.append(last_number(text))
    return list(dict.fromkeys(c for c in found if c))


def last_number(text: str) -> str | None:
    """The last number as plain digits (`1,234.50` -> `1234.50`; `3/4` stays), or None."""
    numbers = _NUMBER.findall(text)
    return numbers[-1].replace(",", "") if numbers else None


def last_expression(text: str) -> str | None:
    """The last run of numbers joined by + - * / and parentheses, with × and ÷ as * and /, or None."""
    for match in reversed(list(_EXPRESSION.finditer(text))):
        candidate = match.group().strip(_CLOSING).rstrip("+-*/×÷ \t")
        candidate = _balanced(candidate)
        if _OPERATION.search(candidate):
            return candidate.replace("×", "*").replace("÷", "/")
    return None


def _content(message: dict[str, Any]) -> str:
    """Text of one message; content blocks without text (images) count as empty."""
    content = message.get("content")
    if isinstance(content, list):
        return "".join(str(block.get("text", "")) for block in content if isinstance(block, dict))
    return "" if content is None else str(content)


def _boxes(text: str) -> list[tuple[str, int, int]]:
    """Every `\\boxed{...}` whose braces close; a box inside a box is part of the outer one."""
    found, position = [], 0
    while (opening := _BOX.search(text, position)) is not None:
        end = _closing_brace(text, opening.end())
        if end is None:
            position = opening.end()
            continue
        found.append((text[opening.end() : end].strip(), opening.start(), end + 1))
        position = end + 1
    return found


def _closing_brace(text: str, start: int) -> int | None:
    """Index of the brace that closes the one before `start`; None where it never closes."""
    depth, i = 1, start
    while i < len(text):
        if text[i] == "\\":
            i += 2
            continue
        depth += {"{": 1, "}": -1}.get(text[i], 0)
        if depth == 0:
            return i
        i += 1
    return None


def _balanced(expression: str) -> str:
    """`expression` without leading or trailing parentheses that have no partner."""
    while expression.count("(") > expression.count(")") and expression.startswith("("):
        expression = expression[1:].lstrip()
    while expression.count(")") > expression.count("(") and expression.endswith(")"):
        expression = expression[:-1].rstrip()
    return expression
