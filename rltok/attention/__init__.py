"""Attention signals of a causal language model: which tokens look back, and which are looked back at.

`probe` reads per-head statistics in a stream, `heads` splits heads into local and global ones, `signals` joins both for
a batch. Pure torch and transformers; no trainer is needed.
"""

from rltok.attention.heads import select_heads
from rltok.attention.probe import (
    AttentionCall,
    AttentionStatistics,
    UnprobeableAttentionError,
    attention_statistics,
    default_layers,
    probing,
)
from rltok.attention.signals import (
    AttentionConfig,
    AttentionSignals,
    attention_signals,
    calibrate_heads,
)

__all__ = [
    "AttentionCall",
    "AttentionConfig",
    "AttentionSignals",
    "AttentionStatistics",
    "UnprobeableAttentionError",
    "attention_signals",
    "attention_statistics",
    "calibrate_heads",
    "default_layers",
    "probing",
    "select_heads",
]
