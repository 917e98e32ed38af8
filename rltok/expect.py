"""What a recipe must reach: small expressions over the summary and the logged metrics of a run.

    strict_after - strict_before >= 0.25
    max(reward) > 0.6 and last(entropy) > 0.05

A name is a key of the summary, or a metric with `/` written as `_`; a metric alone stands for its last value, inside
`min`, `max`, `mean`, `first` and `last` for all of them. Numbers, comparisons, + - * / and `and`, `or`, `not`;
nothing else is evaluated.
"""

from __future__ import annotations

import ast
import operator
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from rltok.config import ConfigError, suggestion

_BINARY: dict[type, Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
}
_COMPARE: dict[type, Callable[[Any, Any], bool]] = {
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
}
_REDUCE: dict[str, Callable[[Sequence[float]], float]] = {
    "min": min,
    "max": max,
    "mean": lambda values: sum(values) / len(values),
    "first": lambda values: values[0],
    "last": lambda values: values[-1],
}


class Outcome(NamedTuple):
    """One expression and whether it held; None where a figure it reads was not measured."""

    expression: str
    held: bool | None
    reason: str = ""


class _Unmeasured(Exception):
    """A key of the summary that has no value, such as `strict_before` without an evaluation before training."""


def check_expectations(
    expressions: Sequence[str], summary: Mapping[str, Any], metrics: Sequence[Mapping[str, Any]]
) -> list[Outcome]:
    """Evaluate every expression over a run's summary and the lines of its metrics.

    An expression with a name that the run does not have fails; the run's results are not lost over it.
    """
    names: dict[str, Any] = {}
    for line in metrics:
        for key, value in line.items():
            if isinstance(value, int | float) and not isinstance(value, bool):
                names.setdefault(re.sub(r"\W", "_", key), []).append(float(value))
    names |= {k: v for k, v in summary.items() if v is None or isinstance(v, int | float) and not isinstance(v, bool)}
    return [_outcome(text, names) for text in expressions]


def _outcome(text: str, names: Mapping[str, Any]) -> Outcome:
    try:
        return Outcome(text, bool(_Evaluator(text, names).value()))
    except _Unmeasured as missing:
        return Outcome(text, None, f"{missing} was not measured")
    except ConfigError as error:
        return Outcome(text, False, str(error))


def check_syntax(expression: str, path: str = "expect") -> None:
    """Raise `ConfigError` for an expression outside the small language, before anything runs."""
    try:
        tree = ast.parse(expression, mode="eval")
    except SyntaxError as error:
        raise ConfigError(f"{path}: {expression!r} is not an expression ({error.msg})", path) from error
    allowed = (ast.Expression, ast.BinOp, ast.UnaryOp, ast.Compare, ast.BoolOp, ast.Call, ast.Name, ast.Constant)
    small = (ast.operator, ast.unaryop, ast.cmpop, ast.boolop, ast.expr_context)
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and not isinstance(node.value, int | float):
            raise ConfigError(f"{path}: {expression!r} may not use {node.value!r}; only numbers and names", path)
        if not isinstance(node, allowed + small):
            raise ConfigError(f"{path}: {expression!r} may not use {type(node).__name__}", path)
        if isinstance(node, ast.Call):
            name = node.func.id if isinstance(node.func, ast.Name) else ""
            if name not in _REDUCE or len(node.args) != 1 or node.keywords:
                raise ConfigError(f"{path}: {expression!r}: functions of one metric are {', '.join(_REDUCE)}", path)


class _Evaluator:
    def __init__(self, text: str, names: Mapping[str, Any]) -> None:
        check_syntax(text)
        self.text = text
        self.names = names

    def value(self) -> Any:
        return self._number(ast.parse(self.text, mode="eval").body)

    def _number(self, node: ast.expr) -> Any:
        value = self._eval(node)
        return value[-1] if isinstance(value, list) else value

    def _eval(self, node: ast.expr) -> Any:
        match node:
            case ast.Constant(value=int() | float() as value):
                return value
            case ast.Name(id=name):
                return self._lookup(name)
            case ast.Call(func=ast.Name(id=name), args=[argument]):
                values = self._eval(argument)
                return _REDUCE[name](values if isinstance(values, list) else [values])
            case ast.BinOp(left=left, op=op, right=right) if type(op) in _BINARY:
                return _BINARY[type(op)](self._number(left), self._number(right))
            case ast.UnaryOp(op=ast.USub(), operand=operand):
                return -self._number(operand)
            case ast.UnaryOp(op=ast.Not(), operand=operand):
                return not self._number(operand)
            case ast.BoolOp(op=op, values=values):
                results = [bool(self._number(v)) for v in values]
                return all(results) if isinstance(op, ast.And) else any(results)
            case ast.Compare(left=left, ops=ops, comparators=rights) if all(type(op) in _COMPARE for op in ops):
                numbers = [self._number(n) for n in (left, *rights)]
                return all(_COMPARE[type(op)](a, b) for op, a, b in zip(ops, numbers, numbers[1:], strict=False))
        raise ConfigError(f"expect: {self.text!r} may not use {ast.unparse(node)!r}", "expect")

    def _lookup(self, name: str) -> Any:
        if name not in self.names:
            raise ConfigError(f"expect: {self.text!r}: unknown name {name!r}{suggestion(name, self.names)}", "expect")
        if self.names[name] is None:
            raise _Unmeasured(name)
        return self.names[name]
