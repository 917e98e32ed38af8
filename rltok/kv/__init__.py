"""Cache policies: fewer keys and values per token, exact in batches of ragged rows."""

from rltok.kv.attach import Attached, attach, policy_cache
from rltok.kv.attention import watched_attention
from rltok.kv.cache import PolicyCache
from rltok.kv.compress_kv import CompressKV, allocate_layers, budgets_of, semantic_head_scores
from rltok.kv.config import POLICIES, HoldConfig, KVConfig, build_kv, build_policy, kv_settings
from rltok.kv.h2o import H2O, heavy_hitters
from rltok.kv.policy import KVPolicy, LayerView
from rltok.kv.r_kv import RKV, redundancy
from rltok.kv.razor_attention import RazorAttention, compensated_attention, dropped_tokens
from rltok.kv.razor_profile import retrieval_heads, retrieval_scores
from rltok.kv.rotary import rotate_keys
from rltok.kv.snap_kv import SnapKV
from rltok.kv.streaming_llm import StreamingLLM

__all__ = [
    "H2O",
    "POLICIES",
    "RKV",
    "Attached",
    "CompressKV",
    "HoldConfig",
    "KVConfig",
    "KVPolicy",
    "LayerView",
    "PolicyCache",
    "RazorAttention",
    "SnapKV",
    "StreamingLLM",
    "allocate_layers",
    "attach",
    "budgets_of",
    "build_kv",
    "build_policy",
    "compensated_attention",
    "dropped_tokens",
    "heavy_hitters",
    "kv_settings",
    "policy_cache",
    "redundancy",
    "retrieval_heads",
    "retrieval_scores",
    "rotate_keys",
    "semantic_head_scores",
    "watched_attention",
]
