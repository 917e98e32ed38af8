"""Attention signals of a causal language model: which tokens look back, and which are looked back at.

`probe` reads per-head statistics in a stream, `heads` splits heads into local and global ones, `signals` joins both for
a batch. `sinks` and `model_sinks` measure attention sinks and dormant heads. Pure torch and transformers; no trainer is
needed, except for the callback `rltok.attention.sink_monitor.SinkDiagnostics`, which is imported from there.
"""

from rltok.attention.heads import select_heads
from rltok.attention.model_sinks import propose_sink, sink_statistics
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
from rltok.attention.sinks import sink_stats

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
    "propose_sink",
    "select_heads",
    "sink_statistics",
    "sink_stats",
]
