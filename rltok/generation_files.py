"""The files of `rltok generate`: completions to read, and what is known of every token.

generate/
    generations.jsonl    one completion per line: prompt, text, tokens, rewards, whether it was chosen
    tokens.parquet       one row per token: log-probability, temperature, wave and what else the methods record
    generation.json      settings, versions and means; written last
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from rltok.complete import NamedProcessor
from rltok.files import json_line, write_atomically, write_json
from rltok.prompts import Row, token_texts
from rltok.sampling import AdaptiveTemperature, CyclicReflexLogitsProcessor

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TOKEN_COLUMNS = ("completion", "position", "token_id", "token", "logp", "temperature", "wave")
"""Of tokens.parquet, before what the methods record by name."""


@dataclass(frozen=True)
class Generated:
    """One completion; every list of `columns` has one entry per token."""

    row: int
    """index of its prompt"""
    sample: int
    """index among the completions of the prompt"""
    ids: list[int]
    """up to and with what ended it"""
    columns: dict[str, list[Any]]
    """`logp` in nats, `temperature` (None where decoding is greedy), `wave` in logits, and what the methods record"""


def token_traces(named: Sequence[NamedProcessor]) -> dict[str, Tensor]:
    """Column -> (B, steps), what the processors of a call recorded.

    The bias of cyclic_reflex is `wave`, the factor T_t / T_b of adaptive_temperature `temperature`. Other values keep
    their name, with the method in front where two methods use the same one.
    """
    special: dict[str, Tensor] = {}
    others: list[tuple[str, str, Tensor]] = []
    for name, processor in named:
        for key, values in processor.trace().items():
            if key == "bias" and isinstance(processor, CyclicReflexLogitsProcessor):
                special["wave"] = values
            else:
                others.append((name, key, values))
        factors = processor.factors() if isinstance(processor, AdaptiveTemperature) else None
        if factors is not None:
            special["temperature"] = factors
    taken = Counter([*TOKEN_COLUMNS, *(key for _, key, _ in others)])
    return special | {key if taken[key] == 1 else f"{name}_{key}": values for name, key, values in others}


def token_columns(
    logps: list[float], traces: Mapping[str, Tensor], row: int, temperature: float
) -> dict[str, list[Any]]:
    """Columns of one completion; what was generated after its end is left out."""
    length = len(logps)
    own = {name: values[row, :length].tolist() for name, values in traces.items()}
    factors = own.pop("temperature", [1.0] * length)
    temperatures = [None if temperature == 0 else temperature * factor for factor in factors]
    return {"logp": logps, "temperature": temperatures, "wave": own.pop("wave", [0.0] * length), **own}


def completion_records(
    completions: Sequence[Generated],
    rows: Sequence[Row],
    tokenizer: PreTrainedTokenizerBase,
    scores: Mapping[str, Sequence[float]],
    totals: Sequence[float],
    chosen: Sequence[bool] | None,
    settings: Mapping[str, Any],
    ends: set[int],
) -> list[dict[str, Any]]:
    """Lines of generations.jsonl, which `rltok attend --completions` reads as well."""
    limit = settings["sampling"]["max_new_tokens"]
    stops = settings["sampling"]["stop_strings"]
    texts = tokenizer.batch_decode([one.ids for one in completions], skip_special_tokens=True)
    return [
        {
            "index": index,
            "row": one.row,
            "sample": one.sample,
            "prompt": rows[one.row]["prompt"],
            "completion": texts[index],
            "token_ids": one.ids,
            "tokens": token_texts(tokenizer, one.ids),
            "length": len(one.ids),
            "ended": len(one.ids) < limit or one.ids[-1] in ends or _holds(tokenizer.decode(one.ids), stops),
            "logp": math.fsum(one.columns["logp"]),
            "rewards": {name: values[index] for name, values in scores.items()},
            "reward": totals[index] if totals else None,
            "chosen": None if chosen is None else chosen[index],
            **settings,
        }
        for index, one in enumerate(completions)
    ]


def _holds(text: str, parts: Sequence[str]) -> bool:
    return any(part in text for part in parts)


def write_generation(
    out: Path, records: Sequence[Mapping[str, Any]], completions: Sequence[Generated], facts: Mapping[str, Any]
) -> None:
    """Completions first, settings last: where generation.json is, the others are whole and belong to it."""
    (out / "generation.json").unlink(missing_ok=True)
    write_atomically(out / "generations.jsonl", "".join(json_line(record) for record in records))
    _write_tokens(out / "tokens.parquet", records, completions)
    write_json(out / "generation.json", facts)


def _write_tokens(path: Path, records: Sequence[Mapping[str, Any]], completions: Sequence[Generated]) -> None:
    import pandas as pd

    parts = [
        pd.DataFrame(
            {
                "completion": record["index"],
                "position": range(len(one.ids)),
                "token_id": one.ids,
                "token": record["tokens"],
                **one.columns,
                "temperature": pd.Series(one.columns["temperature"], dtype="float64"),  # null where greedy
            }
        )
        for record, one in zip(records, completions, strict=True)
    ]
    table = pd.concat(parts, ignore_index=True)
    draft = path.with_name(path.name + ".part")
    table[[*TOKEN_COLUMNS, *(name for name in table.columns if name not in TOKEN_COLUMNS)]].to_parquet(draft)
    draft.replace(path)
