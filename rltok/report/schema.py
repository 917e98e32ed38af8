"""What is recorded of sampled completions, as data: one source for the writer, the reader, the docs and the page.

One row is one completion of one generation batch. A per-token column holds a list as long as the row's `token_ids`. A
column that the run did not compute is absent from the file or null; a value that was not computed inside a list is NaN.
One column `reward/<name>` stands for every reward function.

Facts that hold for a whole file lie in the Parquet metadata under `METADATA_KEY`, as the JSON of a `SampleMeta`.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import pyarrow as pa

VERSION = 1
"""Of the schema; a reader refuses newer ones."""
METADATA_KEY = b"rltok"
"""Key of the JSON in a file's Parquet metadata."""
REWARD_PREFIX = "reward/"
"""Before the name of a reward function, in a column's name."""

Dtype = Literal["bool", "int8", "int32", "float32", "string"]

ARROW: dict[Dtype, pa.DataType] = {
    "bool": pa.bool_(),
    "int8": pa.int8(),
    "int32": pa.int32(),
    "float32": pa.float32(),
    "string": pa.string(),
}


@dataclass(frozen=True)
class Scale:
    """How a page may colour a quantity."""

    kind: Literal["diverging", "sequential", "discrete"]
    """two colours about a centre, one colour from low to high, or one colour per value"""
    centre: float | None = None
    """the neutral value of a diverging scale"""
    log: bool = False
    """distances are those of logarithms: 1/2 is as far from 1 as 2 is"""
    values: tuple[tuple[int, str], ...] = ()
    """(value, what it says) of a discrete scale"""


@dataclass(frozen=True)
class Column:
    """One column of a sample file."""

    name: str
    dtype: Dtype
    meaning: str
    unit: str = ""
    """empty for numbers without a unit"""
    per_token: bool = False
    """a list per completion, with one entry per token"""
    required: bool = False
    """never absent and never null"""
    label: str = ""
    """name on a page; empty: not a quantity to show"""
    scale: Scale | None = None
    """None: not a quantity to colour"""

    @property
    def arrow(self) -> pa.DataType:
        """Type in Arrow and Parquet."""
        return pa.list_(ARROW[self.dtype]) if self.per_token else ARROW[self.dtype]

    @property
    def type_name(self) -> str:
        """Type as the docs print it, such as `list<float32>`."""
        return f"list<{self.dtype}>" if self.per_token else self.dtype


def _row(name: str, dtype: Dtype, meaning: str, unit: str = "", *, required: bool = False, label: str = "") -> Column:
    return Column(name, dtype, meaning, unit, required=required, label=label)


def _token(
    name: str,
    dtype: Dtype,
    meaning: str,
    unit: str = "",
    *,
    required: bool = False,
    label: str = "",
    scale: Scale | None = None,
) -> Column:
    return Column(name, dtype, meaning, unit, per_token=True, required=required, label=label, scale=scale)


LOW_TO_HIGH = Scale("sequential")
ABOUT_ZERO = Scale("diverging", centre=0.0)
ABOUT_ONE = Scale("diverging", centre=1.0, log=True)


def _yes_no(yes: str, no: str) -> Scale:
    return Scale("discrete", values=((0, no), (1, yes)))


_COLUMNS = (
    _row("rollout", "int32", "number of the generation batch, from 0", required=True),
    _row("step", "int32", "optimizer steps done when the batch was generated", required=True),
    _row("updates", "int32", "updates that had used the batch when it was written", required=True),
    _row("row", "int32", "place of the completion in the batch over all ranks", required=True),
    _row("group", "int32", "prompt of the batch the completion belongs to: row // group size", required=True),
    _row("prompt", "string", "the prompt as text", required=True),
    _row("completion", "string", "the completion as text, special tokens included", required=True),
    _row("ended", "bool", "the completion ended by itself and was not cut off by the length limit"),
    _row("reward", "float32", "weighted sum of the reward functions", label="reward"),
    _row("advantage", "float32", "advantage of the completion, before credit is assigned to tokens", label="advantage"),
    _token("token_ids", "int32", "ids of the completion's tokens", required=True),
    _token("tokens", "string", "text of every token decoded alone", required=True),
    _token(
        "in_loss",
        "bool",
        "the loss counts the token: no tool output, not forced, not rejected",
        label="in the loss",
        scale=_yes_no("in the loss", "not in the loss"),
    ),
    _token("credit", "float32", "advantage of the token by the credit method", label="credit", scale=ABOUT_ZERO),
    _token(
        "credit_used",
        "float32",
        "advantage of the token that the loss last used, after the objective's terms",
        label="credit used by the loss",
        scale=ABOUT_ZERO,
    ),
    _token(
        "entropy",
        "float32",
        "entropy of the policy's next-token distribution before the first update",
        "nats",
        label="entropy",
        scale=LOW_TO_HIGH,
    ),
    _token(
        "sampler_logp",
        "float32",
        "log-probability of the token under what drew it",
        "nats",
        label="log-probability, sampler",
        scale=LOW_TO_HIGH,
    ),
    _token(
        "old_logp",
        "float32",
        "log-probability under the learner before the first update",
        "nats",
        label="log-probability, learner before",
        scale=LOW_TO_HIGH,
    ),
    _token(
        "learner_logp",
        "float32",
        "log-probability under the learner at the last update",
        "nats",
        label="log-probability, learner at the last update",
        scale=LOW_TO_HIGH,
    ),
    _token(
        "ratio",
        "float32",
        "probability under the learner at the last update over that before the first",
        label="ratio learner / old",
        scale=ABOUT_ONE,
    ),
    _token(
        "clipped",
        "int8",
        "whether the last update clipped the token's ratio, and at which bound",
        label="clipped",
        scale=Scale("discrete", values=((-1, "at the lower bound"), (0, "not clipped"), (1, "at the upper bound"))),
    ),
    _token(
        "kept",
        "bool",
        "token selection kept the token",
        label="kept by selection",
        scale=_yes_no("kept", "dropped"),
    ),
    _token(
        "weight",
        "float32",
        "importance weight that corrects the sampler's mismatch",
        label="correction weight",
        scale=ABOUT_ONE,
    ),
    _token(
        "temperature",
        "float32",
        "temperature the token was drawn at",
        label="temperature",
        scale=LOW_TO_HIGH,
    ),
    _token(
        "wave",
        "float32",
        "what the reflection wave added to the logits of its words",
        "logits",
        label="reflection wave",
        scale=ABOUT_ZERO,
    ),
    _token(
        "forced",
        "bool",
        "the token was put in place and is no choice of the policy",
        label="forced",
        scale=_yes_no("forced", "chosen by the policy"),
    ),
    _token(
        "waad",
        "float32",
        "windowed average attention distance",
        "tokens",
        label="attention distance (WAAD)",
        scale=LOW_TO_HIGH,
    ),
    _token(
        "fai",
        "float32",
        "future attention influence: attention that later tokens pay to this one",
        label="future attention influence (FAI)",
        scale=LOW_TO_HIGH,
    ),
    _token(
        "mark",
        "int8",
        "bit 1: local (preplan) anchor; bit 2: global anchor",
        label="attention anchor",
        scale=Scale("discrete", values=((0, "none"), (1, "local"), (2, "global"), (3, "local and global"))),
    ),
)

COLUMNS: dict[str, Column] = {column.name: column for column in _COLUMNS}
"""Every column but those of the reward functions, in the order they are written."""


def reward_column(name: str) -> Column:
    """The column of one reward function."""
    return Column(f"{REWARD_PREFIX}{name}", "float32", f"reward by `{name}`, unweighted", label=f"reward: {name}")


def column(name: str) -> Column:
    """The column of a name, also of `reward/<name>`.

    Raises:
        KeyError: the schema has no such column.
    """
    if name.startswith(REWARD_PREFIX) and name != REWARD_PREFIX:
        return reward_column(name[len(REWARD_PREFIX) :])
    if name not in COLUMNS:
        raise KeyError(f"{name!r} is no column of a sample file; columns: {', '.join(COLUMNS)}, {REWARD_PREFIX}<name>")
    return COLUMNS[name]


def ordered(names: Iterable[str]) -> list[Column]:
    """Columns of the names in the order they are written: rewards by function follow `reward`."""
    given = dict.fromkeys(names)
    order = {name: place for place, name in enumerate(COLUMNS)}
    place = {name: order["reward"] if name.startswith(REWARD_PREFIX) else order.get(name, 0) for name in given}
    return [column(name) for name in sorted(given, key=lambda name: place[name])]  # stable: rewards keep their order


def quantities() -> list[Column]:
    """Per-token columns that a page may colour, each with a label and a scale."""
    return [column for column in COLUMNS.values() if column.scale is not None]


def describe() -> list[dict[str, str]]:
    """One entry per column for the docs: name, type, unit, meaning, and whether it is always there."""
    listed = list(COLUMNS.values())
    place = 1 + next(i for i, c in enumerate(listed) if c.name == "reward")
    generic = Column(f"{REWARD_PREFIX}<name>", "float32", "unweighted reward, one column per reward function")
    return [
        {
            "name": c.name,
            "type": c.type_name,
            "unit": c.unit,
            "meaning": c.meaning,
            "present": "always" if c.required else "if the run has it",
        }
        for c in [*listed[:place], generic, *listed[place:]]
    ]


def markdown() -> str:
    """`describe()` as a Markdown table."""
    rows = [[f"`{d['name']}`", d["type"], d["unit"], d["meaning"], d["present"]] for d in describe()]
    lines = [["column", "type", "unit", "meaning", "present"], ["---"] * 5, *rows]
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)


@dataclass(frozen=True)
class Methods:
    """Names of the methods at the four doors."""

    credit: str | None = None
    objective: tuple[str, ...] = ()
    decoding: tuple[str, ...] = ()
    selection: str | None = None


@dataclass(frozen=True)
class SampleMeta:
    """What holds for all completions of a file."""

    group_size: int
    """completions per prompt"""
    rewards: tuple[str, ...] = ()
    """names of the reward functions, in the recipe's order"""
    temperature: float = 1.0
    """T_b, of the sampler before any method changes it"""
    methods: Methods = field(default_factory=Methods)

    def to_json(self) -> bytes:
        """As it stands in the Parquet metadata."""
        return json.dumps({"schema": VERSION, **asdict(self)}).encode()

    @classmethod
    def from_json(cls, text: bytes) -> SampleMeta:
        """Read what `to_json` wrote.

        Raises:
            ValueError: not the JSON of a sample file, or written by a newer schema.
        """
        try:
            values = json.loads(text)
            version = int(values["schema"])
            if version > VERSION:
                raise ValueError(f"schema {version} is newer than {VERSION}, which this version of rltok reads")
            return cls(
                group_size=int(values["group_size"]),
                rewards=tuple(values["rewards"]),
                temperature=float(values["temperature"]),
                methods=_methods(values["methods"]),
            )
        except (KeyError, TypeError, json.JSONDecodeError) as error:
            raise ValueError(f"metadata of a sample file is not readable: {error!r}") from error


def _methods(values: Mapping[str, Any]) -> Methods:
    return Methods(values["credit"], tuple(values["objective"]), tuple(values["decoding"]), values["selection"])
