"""Selection: which rollouts and which of their tokens an update trains on (D3S, PODS), as pure functions.

Decided after credit is assigned and before the loss. Not yet offered by the trainer: there is no recipe section for it.
"""

from rltok.selection.rows import max_variance_subset, select_rollouts
from rltok.selection.schedule import D3SSchedule
from rltok.selection.tokens import keep_count, select_tokens

__all__ = ["D3SSchedule", "keep_count", "max_variance_subset", "select_rollouts", "select_tokens"]
