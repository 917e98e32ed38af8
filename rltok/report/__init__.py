"""What a run left behind: recorded completions with every number of every token, and a reader for the whole run."""

from rltok.report.load import RunData, SampleFile, load, resolve_runs, reward_names
from rltok.report.schema import COLUMNS, Column, Methods, SampleMeta, Scale, describe, quantities
from rltok.report.store import SampleConfig, SampleStore, chosen_groups, token_lists, token_texts

__all__ = [
    "COLUMNS",
    "Column",
    "Methods",
    "RunData",
    "SampleConfig",
    "SampleFile",
    "SampleMeta",
    "SampleStore",
    "Scale",
    "chosen_groups",
    "describe",
    "load",
    "quantities",
    "resolve_runs",
    "reward_names",
    "token_lists",
    "token_texts",
]
