"""The rollout loop: completions of decoder-only models without wasted work, with random numbers that belong to a row.

`loop` runs it; `settings` says how, `inputs` and `serve` what it takes, `result` what it gives. `cache` holds keys and
values, `history` what depends on a row's earlier ids, `records` the numbers of every token; `row_random` draws. Pure
torch and transformers, no trainer is needed.
"""

from rltok.fast.cache import BlockCache, RowCache
from rltok.fast.inputs import unpad
from rltok.fast.loop import generate_rows
from rltok.fast.result import LoopMetrics, LoopProgress, LoopResult
from rltok.fast.row_random import draw, row_key, uniforms
from rltok.fast.serve import servable_model
from rltok.fast.settings import LoopSettings

__all__ = [
    "BlockCache",
    "LoopMetrics",
    "LoopProgress",
    "LoopResult",
    "LoopSettings",
    "RowCache",
    "draw",
    "generate_rows",
    "row_key",
    "servable_model",
    "uniforms",
    "unpad",
]
