"""From a mapping to a typed dataclass, with errors that name the key, the value and the nearest valid name.

Values are checked strictly against the type hints, as in a JSON document: no number from a string, no integer from
a boolean; an integer is fine for a float, a list for a tuple, a string for an enum or a path.
Type checks are pydantic's; the recursion and the wording are ours.
"""

from __future__ import annotations

import ast
import dataclasses
import difflib
import enum
import functools
import inspect
import json
import textwrap
import types
import typing
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, NamedTuple, TypeVar, Union, get_args, get_origin

from pydantic import PydanticSchemaGenerationError, PydanticUserError, TypeAdapter, ValidationError

T = TypeVar("T")

REQUIRED = "required"
"""What `describe` reports as the default of a field that has none."""


class ConfigError(ValueError):
    """A setting that cannot be used; `path` is its key path, such as `training.learning_rate`."""

    def __init__(self, message: str, path: str | None = None) -> None:
        super().__init__(message)
        self.path = path


class FieldDoc(NamedTuple):
    """One setting of a dataclass, as the command line shows it."""

    name: str
    type: str
    default: str
    doc: str


SHOWN_NAMES = 40
"""An error lists at most so many allowed names, nearest first."""


def close_names(name: str, allowed: Iterable[str]) -> list[str]:
    """The allowed names that `name` may have meant: by its initials (`lr`), its beginning, or spelled alike."""
    wanted = str(name).lower()
    folded = {n.lower(): n for n in allowed}
    initials = [n for low, n in folded.items() if len(wanted) > 1 and wanted == "".join(w[:1] for w in low.split("_"))]
    alike = [folded[low] for low in difflib.get_close_matches(wanted, folded, n=3, cutoff=0.6)]
    begun = [n for low, n in folded.items() if len(wanted) > 2 and low.startswith(wanted)]
    return list(dict.fromkeys(initials + begun + alike))


def suggestion(name: str, allowed: Iterable[str]) -> str:
    """`; did you mean 'x'? Allowed: ...` for an unknown name, nearest names first."""
    names = list(allowed)
    close = close_names(name, names)
    ordered = list(dict.fromkeys(close + names))
    listed = ", ".join(ordered[:SHOWN_NAMES]) or "(nothing)"
    more = f" and {len(ordered) - SHOWN_NAMES} more" if len(ordered) > SHOWN_NAMES else ""
    hint = f"; did you mean {close[0]!r}?" if close else ";"
    return f"{hint} Allowed: {listed}{more}"


def join(path: str, key: object) -> str:
    """Key path of `key` below `path`; `path` may be empty."""
    return f"{path}.{key}" if path else str(key)


def check_keys(values: Mapping[str, Any], allowed: Iterable[str], path: str) -> None:
    """Raise `ConfigError` for the first key of `values` that is not allowed."""
    names = list(allowed)
    for key in values:
        if key not in names:
            where = join(path, key)
            raise ConfigError(f"{where}: unknown key {key!r}{suggestion(str(key), names)}", where)


def build(cls: type[T], values: Mapping[str, Any] | None, path: str = "") -> T:
    """Instance of the dataclass `cls` from a mapping; what the mapping leaves out takes the dataclass's default.

    Args:
        cls: a dataclass; nested dataclasses (also optional, in lists and as mapping values) are built likewise.
        values: field name -> plain value. None counts as empty.
        path: key path of the mapping, for messages.

    Raises:
        ConfigError: unknown key, missing required key, wrong type, or a `ValueError` of the dataclass itself.
    """
    values = {} if values is None else values
    if isinstance(values, cls):
        return values
    if not isinstance(values, Mapping):
        raise ConfigError(f"{path}: {values!r} is not a mapping of options; give `key: value` pairs", path)
    fields = {f.name: f for f in dataclasses.fields(cls) if f.init}  # type: ignore[arg-type]
    check_keys(values, fields, path)
    for name, field in fields.items():
        if name not in values and _default(field) is dataclasses.MISSING:
            where = join(path, name)
            raise ConfigError(f"{where}: missing; it is required ({type_name(hints(cls)[name])})", where)
    arguments = {key: convert(hints(cls)[key], value, join(path, key)) for key, value in values.items()}
    try:
        return cls(**arguments)
    except ConfigError:
        raise
    except (ValueError, TypeError) as error:
        raise ConfigError(f"{path}: {error}" if path else str(error), path) from error


def build_typed(registry: Mapping[str, type], values: Mapping[str, Any], path: str) -> Any:
    """Instance of the dataclass that `values["type"]` names in `registry`; the other keys are its options.

    Raises:
        ConfigError: no or unknown `type` (lists the known ones, nearest first), or an error of `build`.
    """
    cls = lookup_type(registry, values, path)
    return build(cls, {key: value for key, value in values.items() if key != "type"}, path)


def lookup_type(registry: Mapping[str, type], values: Mapping[str, Any], path: str) -> type:
    """The class that `values["type"]` names in `registry`."""
    if not isinstance(values, Mapping):
        raise ConfigError(f"{path}: {values!r} is not a mapping; write {{type: NAME, option: value}}", path)
    where = join(path, "type")
    if "type" not in values:
        raise ConfigError(f"{where}: missing; known types: {', '.join(registry)}", where)
    name = values["type"]
    if not isinstance(name, str) or name not in registry:
        raise ConfigError(f"{where}: unknown type {name!r}{suggestion(str(name), registry)}", where)
    return registry[name]


def convert(hint: Any, value: Any, path: str) -> Any:
    """`value` checked against a type hint; mappings become the dataclasses that the hint names.

    Raises:
        ConfigError: the value does not fit; for a `Literal` the message lists the allowed values.
    """
    nested = _dataclass_target(hint, value)
    if nested is not None:
        return build(nested, value, path)
    inner = _item_hint(hint, value)
    if inner is not None and isinstance(value, Mapping):
        return {key: convert(inner, item, join(path, key)) for key, item in value.items()}
    if inner is not None:
        items = [convert(inner, item, f"{path}[{i}]") for i, item in enumerate(value)]
        return tuple(items) if _container(hint) is tuple else items
    adapter = _adapter(hint)
    if adapter is None:
        return value
    try:
        return _validate(adapter, as_word(hint, value))
    except ValidationError as error:
        raise ConfigError(f"{path}: {_explain(hint, value, error)}", path) from None


def as_word(hint: Any, value: Any) -> Any:
    """The word of a `Literal` or an enum that YAML read as a boolean: an unquoted off, no, on or yes."""
    parts = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)
    if not isinstance(value, bool) or bool in parts:
        return value
    listed = [word for part in parts if get_origin(part) is Literal for word in get_args(part)]
    listed += [one.value for part in parts if isinstance(part, type) and issubclass(part, enum.Enum) for one in part]
    words = ("on", "yes", "true") if value else ("off", "no", "false")
    return next((word for word in words if word in listed), value)


def type_name(hint: Any) -> str:
    """A type hint as a reader writes it: `float`, `int | None`, `'a' | 'b'`."""
    if hint is None or hint is type(None):
        return "None"
    origin = get_origin(hint)
    if origin is typing.Annotated:
        return type_name(get_args(hint)[0])
    if origin is Literal:
        return " | ".join(repr(a) for a in get_args(hint))
    if origin in (Union, types.UnionType):
        return " | ".join(type_name(a) for a in get_args(hint))
    if origin is not None:
        inner = ", ".join("..." if a is Ellipsis else type_name(a) for a in get_args(hint))
        return f"{getattr(origin, '__name__', origin)}[{inner}]"
    return getattr(hint, "__name__", str(hint))


def describe(cls: type) -> list[FieldDoc]:
    """Name, type, default and one-paragraph documentation of every field of a dataclass.

    The documentation is the string under the field, else the `help` of the field's metadata.
    """
    docs = _field_docs(cls)
    rows = []
    for field in dataclasses.fields(cls):  # type: ignore[arg-type]
        if not field.init:
            continue
        default = _default(field)
        shown = REQUIRED if default is dataclasses.MISSING else repr(default)
        doc = docs.get(field.name) or str(field.metadata.get("help", ""))
        rows.append(FieldDoc(field.name, type_name(hints(cls)[field.name]), shown, " ".join(doc.split())))
    return rows


def first_line(cls: type) -> str:
    """First line of a class's own docstring, without its full stop; empty when it has none."""
    doc = inspect.cleandoc(cls.__dict__.get("__doc__") or "")
    if not doc or doc.startswith(f"{cls.__name__}("):  # what dataclass() writes where there is no docstring
        return ""
    return doc.splitlines()[0].strip().rstrip(".")


def hints(cls: type) -> dict[str, Any]:
    """Resolved type hints of a class; a hint that cannot be resolved counts as `Any`."""
    return _hints(cls)


@functools.cache
def _hints(cls: Any) -> dict[str, Any]:
    try:
        return typing.get_type_hints(cls)
    except (NameError, TypeError):
        return {field.name: Any for field in dataclasses.fields(cls)}  # type: ignore[arg-type]


def _default(field: dataclasses.Field[Any]) -> Any:
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return field.default


def _options(hint: Any) -> tuple[Any, ...]:
    """The alternatives of a union, or the hint alone."""
    return get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)


def _dataclass_target(hint: Any, value: Any) -> type | None:
    """The dataclass that a mapping is meant for, if the hint names exactly one (and no plain mapping)."""
    if not isinstance(value, Mapping):
        return None
    options = _options(hint)
    found = [o for o in options if isinstance(o, type) and dataclasses.is_dataclass(o)]
    return found[0] if len(found) == 1 and not any(_container(o) is dict for o in options) else None


def _container(hint: Any) -> type | None:
    """`list`, `tuple` or `dict` for a hint of such a container, also an abstract or an optional one."""
    for option in _options(hint):
        origin = get_origin(option) or option
        if origin is tuple:
            return tuple
        if inspect.isclass(origin) and issubclass(origin, Mapping):
            return dict
        if inspect.isclass(origin) and issubclass(origin, Sequence) and not issubclass(origin, str | bytes):
            return list
    return None


def _item_hint(hint: Any, value: Any) -> Any:
    """Hint of the items where they are dataclasses (the only containers that need our recursion), else None."""
    is_mapping, is_list = isinstance(value, Mapping), isinstance(value, list | tuple)
    for option in _options(hint):
        wanted = _container(option)
        arguments = [a for a in get_args(option) if a is not Ellipsis]
        if not arguments or wanted is None or (wanted is dict) != is_mapping or not (is_mapping or is_list):
            continue
        item = arguments[-1]
        if any(isinstance(o, type) and dataclasses.is_dataclass(o) for o in _options(item)):
            return item
    return None


@functools.lru_cache(maxsize=4096)
def _cached_adapter(hint: Any) -> TypeAdapter[Any] | None:
    try:
        return TypeAdapter(hint)
    except (PydanticSchemaGenerationError, PydanticUserError):
        return None


def _adapter(hint: Any) -> TypeAdapter[Any] | None:
    """Validator of a hint, or None where pydantic has no schema for it (then the value is passed through)."""
    try:
        return _cached_adapter(hint)
    except TypeError:  # an unhashable hint
        return None


def _validate(adapter: TypeAdapter[Any], value: Any) -> Any:
    try:
        text = json.dumps(value)
    except (TypeError, ValueError):  # a Python object, given in code
        return adapter.validate_python(value, strict=True)
    return adapter.validate_json(text, strict=True)


def _explain(hint: Any, value: Any, error: ValidationError) -> str:
    literals = [a for o in _options(hint) if get_origin(o) is Literal for a in get_args(o)]
    if literals and isinstance(value, str | int | float | bool):
        choices = [str(a) for a in literals] + (["null"] if type(None) in _options(hint) else [])
        return f"{value!r} is not valid{suggestion(str(value), choices)}"
    detail = ""
    problems = error.errors()
    if len(problems) == 1 and problems[0]["type"] not in _PLAIN_ERRORS:
        detail = f" ({problems[0]['msg']})"
    return f"{value!r} is not a valid {type_name(hint)}{detail}"


_PLAIN_ERRORS = {"float_type", "int_type", "string_type", "bool_type", "list_type", "dict_type", "tuple_type"}


def _field_docs(cls: type) -> dict[str, str]:
    """Strings that stand directly under annotated fields, of the class and its bases."""
    docs: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        if not dataclasses.is_dataclass(base):
            continue
        try:
            tree = ast.parse(textwrap.dedent(inspect.getsource(base)))
        except (OSError, TypeError, SyntaxError):
            continue
        body = tree.body[0].body if tree.body and isinstance(tree.body[0], ast.ClassDef) else []
        for field, below in zip(body, body[1:], strict=False):
            if not (isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name)):
                continue
            if isinstance(below, ast.Expr) and isinstance(below.value, ast.Constant):
                docs[field.target.id] = str(below.value.value)
    return docs
