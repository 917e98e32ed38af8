"""From mappings to dataclasses: types are strict, and every error names key, value and nearest valid name."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, Literal

import pytest

from rltok.config import ConfigError, build, build_typed, convert, describe, first_line, suggestion, type_name


@dataclass(frozen=True)
class Inner:
    """One level down."""

    count: int = 1
    """how many"""


@dataclass(frozen=True)
class Outer:
    """All kinds of fields.

    More about it.
    """

    name: str
    """required"""
    learning_rate: float = 1.0
    """step size,
    in two lines"""
    mode: Literal["fast", "slow"] = "fast"
    limit: int | None = None
    widths: tuple[float, ...] = ()
    inner: Inner | None = None
    items: list[Inner] = field(default_factory=list)
    table: dict[str, Inner] = field(default_factory=dict)
    flag: bool = False
    anything: Any = None
    exotic: re.Pattern | Literal["auto"] = "auto"  # type: ignore[type-arg]
    hinted: int = field(default=3, metadata={"help": "from metadata"})

    def __post_init__(self) -> None:
        if self.limit is not None and self.limit < 0:
            raise ValueError(f"limit={self.limit} must be >= 0")


def test_builds_nested_values() -> None:
    values = {
        "name": "a",
        "learning_rate": 1,
        "widths": [1, 2.5],
        "inner": {"count": 2},
        "items": [{"count": 3}, {}],
        "table": {"x": {"count": 4}},
        "limit": None,
        "anything": {"free": [1]},
    }
    made = build(Outer, values, "outer")
    assert made.learning_rate == 1.0 and isinstance(made.learning_rate, float)
    assert made.widths == (1.0, 2.5)
    assert made.inner == Inner(2) and made.items == [Inner(3), Inner()] and made.table == {"x": Inner(4)}
    assert made.anything == {"free": [1]}


@pytest.mark.parametrize(
    ("values", "path", "words"),
    [
        ({"learning_rate": "abc"}, "outer.learning_rate", ["'abc' is not a valid float"]),
        ({"learning_rate": "1e-4"}, "outer.learning_rate", ["'1e-4' is not a valid float"]),
        ({"learning_rate": True}, "outer.learning_rate", ["True is not a valid float"]),
        ({"learning_rate": None}, "outer.learning_rate", ["None is not a valid float"]),
        ({"limit": 1.5}, "outer.limit", ["1.5 is not a valid int | None"]),
        ({"limit": True}, "outer.limit", ["True is not a valid int | None"]),
        ({"flag": 1}, "outer.flag", ["1 is not a valid bool"]),
        ({"mode": "fats"}, "outer.mode", ["'fats'", "did you mean 'fast'", "slow"]),
        ({"widths": [1, "x"]}, "outer.widths", ["tuple[float, ...]"]),
        ({"inner": {"cuont": 1}}, "outer.inner.cuont", ["unknown key 'cuont'", "did you mean 'count'"]),
        ({"items": [{}, {"count": "x"}]}, "outer.items[1].count", ["'x' is not a valid int"]),
        ({"table": {"k": {"count": "x"}}}, "outer.table.k.count", ["'x' is not a valid int"]),
        ({"inner": 3}, "outer.inner", ["3 is not a valid Inner | None"]),
        ({"lerning_rate": 1.0}, "outer.lerning_rate", ["did you mean 'learning_rate'", "mode, limit"]),
        ({"lr": 1.0}, "outer.lr", ["did you mean 'learning_rate'"]),
    ],
)
def test_errors_name_path_value_and_alternatives(values: dict[str, Any], path: str, words: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        build(Outer, {"name": "a"} | values, "outer")
    assert caught.value.path == path
    assert str(caught.value).startswith(f"{path}: ")
    for word in words:
        assert word in str(caught.value)


def test_required_keys_and_own_checks_are_config_errors() -> None:
    with pytest.raises(ConfigError, match=r"outer\.name: missing; it is required \(str\)"):
        build(Outer, {}, "outer")
    with pytest.raises(ConfigError, match=r"outer: limit=-1 must be >= 0"):
        build(Outer, {"name": "a", "limit": -1}, "outer")
    with pytest.raises(ConfigError, match="is not a mapping"):
        build(Outer, [1], "outer")  # type: ignore[arg-type]
    assert build(Inner, None) == Inner()


def test_typed_sections_list_known_types_nearest_first() -> None:
    registry = {"entropy": Inner, "hapo": Outer}
    assert build_typed(registry, {"type": "entropy", "count": 7}, "credit") == Inner(7)
    with pytest.raises(ConfigError, match=r"credit\.type: unknown type 'hapoo'; did you mean 'hapo'\? Allowed: hapo"):
        build_typed(registry, {"type": "hapoo"}, "credit")
    with pytest.raises(ConfigError, match=r"credit\.type: missing; known types: entropy, hapo"):
        build_typed(registry, {"count": 1}, "credit")
    with pytest.raises(ConfigError, match="write {type: NAME"):
        build_typed(registry, "hapo", "credit")  # type: ignore[arg-type]


def test_long_lists_of_names_are_cut() -> None:
    names = [f"name_{i}" for i in range(100)]
    text = suggestion("name_77", names)
    assert "did you mean 'name_77'" in text and text.endswith("and 60 more")


def test_describe_reads_the_strings_under_the_fields() -> None:
    rows = {row.name: row for row in describe(Outer)}
    assert rows["name"].default == "required" and rows["name"].doc == "required"
    assert rows["learning_rate"] == ("learning_rate", "float", "1.0", "step size, in two lines")
    assert rows["mode"].type == "'fast' | 'slow'" and rows["mode"].doc == ""
    assert rows["items"].default == "[]"
    assert rows["hinted"].doc == "from metadata"
    assert first_line(Outer) == "All kinds of fields"
    assert type_name(dict[str, float] | None) == "dict[str, float] | None"


def test_every_field_of_the_trainer_config_keeps_its_default() -> None:
    """The strict types must accept what TRL itself uses, or a recipe could not spell out a default."""
    import dataclasses

    from rltok.config import convert, hints
    from rltok.trainers import CreditConfig

    checked = 0
    for setting in dataclasses.fields(CreditConfig):
        if setting.init and setting.default is not dataclasses.MISSING:
            value = getattr(setting.default, "value", setting.default)
            assert convert(hints(CreditConfig)[setting.name], value, setting.name) == setting.default
            checked += 1
    assert checked > 150


class Saving(StrEnum):
    NO = "no"
    STEPS = "steps"


@pytest.mark.parametrize(
    ("hint", "value", "found"),
    [
        (Literal["auto", "off"], False, "off"),
        (Literal["on", "off"], True, "on"),
        (Literal["yes", "no"] | None, False, "no"),
        (Literal["on", "off"] | bool, True, True),
        (Saving | str, False, "no"),
    ],
)
def test_a_word_that_yaml_reads_as_a_boolean_is_that_word(hint: Any, value: bool, found: Any) -> None:
    assert convert(hint, value, "x") == found
    with pytest.raises(ConfigError, match="x: False"):
        convert(Literal["a", "b"], False, "x")
