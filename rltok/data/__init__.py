"""Data: rows for the trainer from reasoning-gym tasks, local files or hub datasets, with a deterministic split."""

from rltok.data.config import DataConfig, TaskSpec
from rltok.data.limits import check_prompts
from rltok.data.load import DataSplits, load_data

__all__ = ["DataConfig", "DataSplits", "TaskSpec", "check_prompts", "load_data"]
