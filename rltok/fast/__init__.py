"""The rollout loop: completions of decoder-only models without wasted work, with random numbers that belong to a row.

`loop` runs it, `cache` holds keys and values, `row_random` draws, `settings` says how; pure torch and transformers, no
trainer is needed.
"""

from rltok.fast.loop import LoopMetrics, LoopResult, generate_rows
from rltok.fast.row_random import draw, row_key, uniforms
from rltok.fast.settings import LoopSettings

__all__ = ["LoopMetrics", "LoopResult", "LoopSettings", "draw", "generate_rows", "row_key", "uniforms"]
