"""Rows for the trainer: training and held-out, from the section `data` of a recipe."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import datasets
from datasets import Dataset

from rltok.data import reasoning_gym_rows, table_rows
from rltok.data.config import DataConfig


class DataSplits(NamedTuple):
    """Rows to train on and rows to judge by; no prompt is in both."""

    train: Dataset
    """columns `prompt`, `answer` and what reward functions need"""
    heldout: Dataset
    """the same columns"""


def load_data(
    config: DataConfig,
    seed: int = 0,
    *,
    base_dir: str | Path | None = None,
    load_hub: Any = datasets.load_dataset,
) -> DataSplits:
    """Training and held-out rows: the same for the same config and seed, in the same order.

    Args:
        config: the section `data`.
        seed: training seed; changes which problems reasoning-gym generates, nothing else, and never the held-out rows.
        base_dir: what a file's path is relative to; default the working directory.
        load_hub: called as `load_hub(name, config_name, split=..., revision=...)`.

    Raises:
        ConfigError: missing file, column or split, no rows, a template that does not fit, too few distinct problems.
    """
    if config.source == "reasoning_gym":
        heldout = reasoning_gym_rows.heldout_rows(config)
        train = reasoning_gym_rows.train_rows(config, seed, heldout)
        return DataSplits(reasoning_gym_rows.to_dataset(train), reasoning_gym_rows.to_dataset(heldout))
    return _table_splits(config, Path.cwd() if base_dir is None else Path(base_dir), load_hub)


def _table_splits(config: DataConfig, base_dir: Path, load_hub: Any) -> DataSplits:
    """Splits of a file or a hub dataset; the order of the source is kept."""
    if config.source == "file":
        assert config.path is not None
        table = table_rows.read_file(config.path, base_dir, "data.path")
        own = config.heldout_path and table_rows.read_file(config.heldout_path, base_dir, "data.heldout_path")
    else:
        table = table_rows.read_hub(config, config.split or "train", "data.split", load_hub)
        own = config.heldout_split and table_rows.read_hub(config, config.heldout_split, "data.heldout_split", load_hub)
    rows = table_rows.to_rows(table, config)
    if own:
        heldout = table_rows.to_rows(own, config)
        train = table_rows.without(rows, heldout)
    else:
        train, heldout = table_rows.split_off(rows, config)
    if config.max_rows is not None and len(train) > config.max_rows:
        train = train.select(range(config.max_rows))
    return DataSplits(train, heldout)
