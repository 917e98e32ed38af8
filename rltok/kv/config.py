"""Cache policies by name, and the recipe section that sets one: `{policy: NAME, budget: N, option: value}`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rltok.config import ConfigError, build_typed
from rltok.kv.compress_kv import CompressKV
from rltok.kv.h2o import H2O
from rltok.kv.policy import KVPolicy
from rltok.kv.r_kv import RKV
from rltok.kv.snap_kv import SnapKV
from rltok.kv.streaming_llm import StreamingLLM

POLICIES: dict[str, type[KVPolicy]] = {
    "streaming_llm": StreamingLLM,
    "h2o": H2O,
    "snap_kv": SnapKV,
    "r_kv": RKV,
    "compress_kv": CompressKV,
}
"""name in a recipe -> policy"""


def build_policy(section: Mapping[str, Any] | KVPolicy, path: str = "rollout.kv") -> KVPolicy:
    """A policy of a recipe section; `budget` stands for the policy's own numbers of tokens.

    Raises:
        ConfigError: unknown policy or option, a wrong value, or a budget beside the numbers that it stands for.
    """
    if isinstance(section, KVPolicy):
        return section
    if not isinstance(section, Mapping):
        raise ConfigError(f"{path}: {section!r} is not a mapping; write {{policy: NAME, budget: N}}", path)
    options = {key: value for key, value in section.items() if key not in ("policy", "budget")}
    options["type"] = section.get("policy")
    budget = section.get("budget")
    kind = POLICIES.get(str(options["type"]))
    if budget is not None and kind is not None:
        if not isinstance(budget, int) or budget < 1:
            raise ConfigError(f"{path}.budget: {budget!r} is not a whole number >= 1", f"{path}.budget")
        own = kind.of_budget(budget, options)
        for name in own:
            if name in options:
                raise ConfigError(f"{path}.{name} and {path}.budget both say how much is kept; keep one", path)
        options |= own
    return build_typed(POLICIES, options, path)
