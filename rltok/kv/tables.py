"""Tables that cache policies read: what was measured of a model once, as small JSON files.

    {"format": 1, "policy": NAME, "model": {model_type, layers, query_heads, kv_heads}, "made": {...}, ...}

compress_kv adds `heads` {layer: [query heads]}, `errors` [per layer, null without full attention] and `scores`;
razor_attention adds `full_heads` {layer: [key-value heads]} and `scores`. `made` says by which settings. A table
belongs to a model with its tokenizer: one of another policy or shape is refused.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, NoReturn

from rltok.config import ConfigError
from rltok.files import write_json

FORMAT = 1
"""version of the files"""


@dataclass(frozen=True)
class ModelFacts:
    """What a table says of the model that it was made of."""

    model_type: str
    """as transformers names it"""
    layers: int
    """decoder layers"""
    query_heads: int
    """per layer"""
    kv_heads: int
    """per layer"""

    @classmethod
    def of(cls, config: Any) -> ModelFacts:
        """Facts of a transformers configuration."""
        text = config.get_text_config(decoder=True)
        kv_heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
        return cls(str(text.model_type), text.num_hidden_layers, text.num_attention_heads, kv_heads)

    def check(self, config: Any, policy: str, source: str) -> None:
        """Refuse another model.

        Args:
            config: of the model that is to use the table.
            policy: name of the table's policy.
            source: of the table, for the message.

        Raises:
            ConfigError: names the first fact that differs, both values, and the command that makes a table.
        """
        found = ModelFacts.of(config)
        for name in (entry.name for entry in fields(self)):
            ours, theirs = getattr(self, name), getattr(found, name)
            if ours != theirs:
                raise ConfigError(
                    f"{source} was made of a model with {name}={ours!r}, this one has {name}={theirs!r}; make a table "
                    f"of it: rltok profile {policy} CHECKPOINT --out FILE"
                )


@dataclass(frozen=True)
class CompressTable:
    """What CompressKV needs to know of a model."""

    model: ModelFacts
    heads: dict[int, list[int]]
    """layer -> query heads that choose, best first"""
    errors: list[float | None]
    """(L,) relative error of a small cache, sum 1; None: a layer without full attention, which keeps its own window"""
    scores: list[list[float] | None] = field(default_factory=list)
    """(L, H) semantic retrieval scores of all query heads; None like `errors`"""
    made: dict[str, Any] = field(default_factory=dict)
    """settings of the measurement"""

    policy = "compress_kv"


@dataclass(frozen=True)
class RazorTable:
    """What RazorAttention needs to know of a model."""

    model: ModelFacts
    full_heads: dict[int, list[int]]
    """layer -> key-value heads that keep every token"""
    scores: dict[str, Any] = field(default_factory=dict)
    """echo and induction, (L, Hkv) each"""
    made: dict[str, Any] = field(default_factory=dict)
    """settings of the measurement"""

    policy = "razor_attention"


Table = CompressTable | RazorTable


def write_table(path: Path, table: Table) -> None:
    """Write a table as JSON, whole or not at all."""
    write_json(path, {"format": FORMAT, "policy": table.policy, **asdict(table)})


def read_compress_table(path: str | Path) -> CompressTable:
    """The table of CompressKV in a file.

    Raises:
        ConfigError: names the file, the value, what is allowed, and the command that makes a table.
    """
    place = _Place(Path(path), CompressTable.policy)
    values = place.values()
    model = place.model(values)
    errors = place.entry(values, "errors", list)
    if len(errors) != model.layers:
        place.refuse(f"errors has {len(errors)} numbers for layers={model.layers}")
    for layer, error in enumerate(errors):
        if error is not None and not _is_share(error):
            place.refuse(f"errors[{layer}]={error!r} is neither null nor a finite number >= 0")
    if not any(errors):
        place.refuse("errors has none above 0")
    return CompressTable(
        model=model,
        heads=place.heads(values, "heads", model.query_heads, model),
        errors=[None if error is None else float(error) for error in errors],
        scores=list(values.get("scores") or []),
        made=dict(values.get("made") or {}),
    )


def read_razor_table(path: str | Path) -> RazorTable:
    """The table of RazorAttention in a file.

    Raises:
        ConfigError: as `read_compress_table`.
    """
    place = _Place(Path(path), RazorTable.policy)
    values = place.values()
    model = place.model(values)
    return RazorTable(
        model=model,
        full_heads=place.heads(values, "full_heads", model.kv_heads, model),
        scores=dict(values.get("scores") or {}),
        made=dict(values.get("made") or {}),
    )


def full_heads_of(path: str | Path) -> dict[int, list[int]]:
    """Layer -> key-value heads that keep every token, from a table of RazorAttention.

    Raises:
        ConfigError: as `read_compress_table`.
    """
    return read_razor_table(path).full_heads


@dataclass(frozen=True)
class _Place:
    """A file, and whose table it should hold."""

    path: Path
    policy: str

    def refuse(self, what: str) -> NoReturn:
        """Raise ConfigError."""
        raise ConfigError(
            f"table {self.path}: {what}; make one with rltok profile {self.policy} CHECKPOINT --out FILE", "table"
        )

    def values(self) -> Mapping[str, Any]:
        """Content of a file of our format and policy."""
        if not self.path.is_file():
            self.refuse("there is no such file")
        try:
            values = json.loads(self.path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            self.refuse(f"cannot be read as JSON ({error})")
        if not isinstance(values, dict) or "policy" not in values:
            self.refuse("is no table of a cache policy")
        if values["policy"] != self.policy:
            self.refuse(f"is for policy {values['policy']!r}, not {self.policy!r}")
        if values.get("format") != FORMAT:
            self.refuse(f"has format={values.get('format')!r}, this version reads {FORMAT}")
        return values

    def entry(self, values: Mapping[str, Any], name: str, kind: type) -> Any:
        """An entry of a kind."""
        if not isinstance(values.get(name), kind):
            self.refuse(f"{name}={values.get(name)!r} is no {kind.__name__}")
        return values[name]

    def model(self, values: Mapping[str, Any]) -> ModelFacts:
        """The model's facts."""
        given = self.entry(values, "model", dict)
        counts = {}
        for name in ("layers", "query_heads", "kv_heads"):
            count = given.get(name)
            if not isinstance(count, int) or isinstance(count, bool) or count < 1:
                self.refuse(f"model.{name}={count!r} is not a whole number >= 1")
            counts[name] = count
        return ModelFacts(str(given.get("model_type")), **counts)

    def heads(self, values: Mapping[str, Any], name: str, count: int, model: ModelFacts) -> dict[int, list[int]]:
        """Layer -> heads below `count`."""
        found = {}
        for key, heads in self.entry(values, name, dict).items():
            layer = int(key) if str(key).isdigit() else -1
            if not 0 <= layer < model.layers:
                self.refuse(f"{name} has layer {key!r}, the model has 0 to {model.layers - 1}")
            if not _are_heads(heads, count):
                self.refuse(f"{name}[{key}]={heads!r} are not distinct heads from 0 to {count - 1}")
            found[layer] = list(heads)
        return dict(sorted(found.items()))


def _are_heads(heads: Any, count: int) -> bool:
    if not isinstance(heads, Sequence) or isinstance(heads, str) or len(set(map(str, heads))) != len(heads):
        return False
    return all(isinstance(head, int) and not isinstance(head, bool) and 0 <= head < count for head in heads)


def _is_share(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and value >= 0 and math.isfinite(value)
