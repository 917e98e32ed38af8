"""`CreditConfig`: TRL's GRPOConfig plus the sections of the doors."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from trl import GRPOConfig


@dataclass
class CreditConfig(GRPOConfig):
    """Every setting of TRL's `GRPOConfig`, with TRL's defaults, and one mapping per door.

    Left at None, the doors are TRL's own behaviour: group-relative credit, every rollout and token trained, the loss
    that `loss_type` names, plain sampling; nothing is recorded.
    """

    credit: dict[str, Any] | None = field(default=None, metadata={"help": "credit section, {type: ..., **options}"})
    objective: Any = field(default=None, metadata={"help": "objective section, a mapping or a list of mappings"})
    rollout: dict[str, Any] | None = field(default=None, metadata={"help": "rollout section"})
    selection: dict[str, Any] | None = field(
        default=None, metadata={"help": "selection section, {type: ..., **options}"}
    )
    samples: dict[str, Any] | None = field(
        default=None,
        metadata={"help": "record completions with every number of their tokens, {rows: 16, max_mb: 64}; None: none"},
    )
    batching: dict[str, Any] | None = field(
        default=None, metadata={"help": "micro-batches of the update, {balance: true}; None: as TRL cuts them"}
    )
    faults: dict[str, Any] | None = field(
        default=None, metadata={"help": "reactions to faults, {nonfinite: skip}; None: the defaults"}
    )
