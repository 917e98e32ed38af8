"""Selection: which rollouts and which of their tokens the updates train on, decided after credit is assigned.

Pure functions and the methods made of them. The trainer exchanges and repacks the rows that are left.
"""

from rltok.selection.control import RandomSelection
from rltok.selection.d3s import D3S
from rltok.selection.method import RowBatch, SelectionMethod
from rltok.selection.packing import pack_rows
from rltok.selection.pods import PODS, renormalized
from rltok.selection.rows import max_variance_subset, select_rollouts
from rltok.selection.schedule import D3SSchedule
from rltok.selection.tokens import keep_count, select_tokens

SELECTION: dict[str, type] = {
    "d3s": D3S,
    "pods": PODS,
    "random": RandomSelection,
}

__all__ = [
    "D3S",
    "PODS",
    "SELECTION",
    "D3SSchedule",
    "RandomSelection",
    "RowBatch",
    "SelectionMethod",
    "keep_count",
    "max_variance_subset",
    "pack_rows",
    "renormalized",
    "select_rollouts",
    "select_tokens",
]
