"""Cache policies by name, and the recipe section that sets one: `{policy: NAME, budget: N, option: value}`.

The same section stands in `rollout.kv` (training, `rltok generate`) and in `evaluation.kv` (`rltok eval`).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from rltok.config import ConfigError, build, build_typed, join, suggestion
from rltok.correction import CorrectionConfig
from rltok.kv.compress_kv import CompressKV
from rltok.kv.h2o import H2O
from rltok.kv.policy import KVPolicy
from rltok.kv.r_kv import RKV
from rltok.kv.razor_attention import RazorAttention
from rltok.kv.snap_kv import SnapKV
from rltok.kv.streaming_llm import StreamingLLM

POLICIES: dict[str, type[KVPolicy]] = {
    "streaming_llm": StreamingLLM,
    "h2o": H2O,
    "snap_kv": SnapKV,
    "r_kv": RKV,
    "compress_kv": CompressKV,
    "razor_attention": RazorAttention,
}
"""name in a recipe -> policy"""

SAFE_AGREEMENT = 0.86
"""5th percentile of min(xi, 1/xi) above which Sparrow (arXiv 2606.08446) saw stable training of 1.7B to 14B models"""


@dataclass(frozen=True)
class HoldConfig:
    """Moves the budget from rollout to rollout so that sampler and learner stay as close as wanted.

    After a rollout: agreement below `agreement` multiplies the budget by `factor`, agreement above
    `agreement + slack` divides it, within `least` and `most`.
    """

    least: int
    """Smallest budget, tokens."""
    most: int
    """Largest budget, tokens."""
    agreement: float = SAFE_AGREEMENT
    """Wanted 5th percentile of min(xi, 1/xi) over the tokens of a rollout, in (0, 1)."""
    slack: float = 0.05
    """Above the wanted value by so much, the budget shrinks."""
    factor: float = 1.25
    """Of one move, above 1."""

    def __post_init__(self) -> None:
        if not 1 <= self.least <= self.most:
            raise ValueError(f"least={self.least} and most={self.most} must be 1 <= least <= most")
        if not 0 < self.agreement < 1:
            raise ValueError(f"agreement={self.agreement} is not in (0, 1); 1 is a sampler that equals the learner")
        if not self.slack >= 0:
            raise ValueError(f"slack={self.slack} must be >= 0")
        if not (self.factor > 1 and math.isfinite(self.factor)):
            raise ValueError(f"factor={self.factor} must be above 1")

    def moved(self, budget: int, agreement: float) -> int:
        """Budget of the next rollout after one with this 5th percentile; NaN (no token) leaves it.

        Example: factor 1.25, agreement 0.86, slack 0.05, budget 100: 0.80 gives 125, 0.90 gives 100, 0.95 gives 80.
        """
        if agreement < self.agreement:
            budget = math.ceil(budget * self.factor)
        elif agreement > self.agreement + self.slack:
            budget = math.floor(budget / self.factor)
        return min(max(budget, self.least), self.most)


@dataclass(frozen=True)
class KVConfig:
    """A cache policy of the sampler, and what makes up for it."""

    policy: KVPolicy
    """What every layer keeps."""
    budget: int | None = None
    """Tokens of a row that a layer keeps at a cut, where it was given as one number."""
    hold: HoldConfig | None = None
    """Moves the budget to hold the agreement of sampler and learner; null: it stays."""
    safe_agreement: float = SAFE_AGREEMENT
    """Warn that learning is unsafe where the 5th percentile of min(xi, 1/xi) falls below this; 0 never warns."""

    recommended: ClassVar[CorrectionConfig] = CorrectionConfig(mode="truncate", clip_max=1.5, veto=1e-4)
    """correction where a recipe has none: token weights up to 1.5, completions with a ratio below 1e-4 dropped"""
    is_neutral: ClassVar[bool] = False
    """what was forgotten can change any sample"""
    engines: ClassVar[tuple[str, ...]] = ("fast", "transformers")
    """engines whose cache is ours to choose"""

    def __post_init__(self) -> None:
        if not isinstance(self.policy, KVPolicy):
            raise TypeError(f"policy={self.policy!r} is no cache policy; known: {', '.join(POLICIES)}")
        if not 0 <= self.safe_agreement < 1:
            raise ValueError(f"safe_agreement={self.safe_agreement} is not in [0, 1)")
        if self.hold is not None:
            if self.budget is None:
                raise ValueError("hold moves the budget, but there is none: give `budget` in place of the policy's own")
            if not self.hold.least <= self.budget <= self.hold.most:
                raise ValueError(
                    f"budget={self.budget} is outside hold.least={self.hold.least} .. hold.most={self.hold.most}"
                )
            for end in (self.hold.least, self.hold.most):
                self.at(end)

    def at(self, budget: int | None) -> KVPolicy:
        """The policy with another budget; None: as it is."""
        if budget is None or budget == self.budget:
            return self.policy
        options = {field.name: getattr(self.policy, field.name) for field in dataclasses.fields(self.policy)}
        return replace(self.policy, **type(self.policy).of_budget(budget, options))


OWN = ("budget", "hold", "safe_agreement")
"""keys of the section that are no options of a policy"""


def build_kv(section: Mapping[str, Any] | KVConfig | KVPolicy | None, path: str = "rollout.kv") -> KVConfig | None:
    """A recipe section `{policy: NAME, budget: N, hold: {...}, option: value}` as typed settings; None: dense.

    Raises:
        ConfigError: unknown policy or option, a wrong value, or a budget beside the numbers that it stands for.
    """
    if section is None or isinstance(section, KVConfig):
        return section
    policy = build_policy(section, path)
    if isinstance(section, KVPolicy):
        return KVConfig(policy)
    return build(KVConfig, {name: section[name] for name in OWN if name in section} | {"policy": policy}, path)


def build_policy(section: Mapping[str, Any] | KVPolicy, path: str = "rollout.kv") -> KVPolicy:
    """The policy of a recipe section; `budget` stands for the policy's own numbers of tokens.

    Raises:
        ConfigError: unknown policy or option, a wrong value, or a budget beside the numbers that it stands for.
    """
    if isinstance(section, KVPolicy):
        return section
    kind = policy_type(section, path)
    options = {key: value for key, value in section.items() if key not in ("policy", *OWN)}
    budget = section.get("budget")
    if budget is not None:
        where = join(path, "budget")
        if not isinstance(budget, int) or isinstance(budget, bool) or budget < 1:
            raise ConfigError(f"{where}: {budget!r} is not a whole number >= 1", where)
        try:
            own = kind.of_budget(budget, options)
        except ConfigError:
            raise
        except ValueError as error:
            raise ConfigError(f"{path}: {error}", where) from None
        for name in own:
            if name in options:
                raise ConfigError(f"{path}.{name} and {path}.budget both say how much is kept; keep one", path)
        options |= own
    return build_typed(POLICIES, {"type": section["policy"], **options}, path)


def policy_type(section: Mapping[str, Any], path: str) -> type[KVPolicy]:
    """The class that `policy` of a section names.

    Raises:
        ConfigError: no mapping, or no or an unknown name.
    """
    if not isinstance(section, Mapping):
        raise ConfigError(f"{path}: {section!r} is not a mapping; write {{policy: NAME, budget: N}}", path)
    name, where = section.get("policy"), join(path, "policy")
    if name is None:
        raise ConfigError(f"{where}: missing; known policies: {', '.join(POLICIES)}", where)
    if name not in POLICIES:
        raise ConfigError(f"{where}: unknown policy {name!r}{suggestion(str(name), POLICIES)}", where)
    return POLICIES[name]


def kv_settings(section: Mapping[str, Any], path: str) -> dict[str, Any]:
    """The section with every default filled in, as values that read back as the same settings."""
    config = build_kv(section, path)
    assert config is not None
    kind = type(config.policy)
    of_budget = set() if config.budget is None else set(kind.of_budget(config.budget, section))
    values = {
        field.name: getattr(config.policy, field.name)
        for field in dataclasses.fields(config.policy)
        if field.name not in of_budget
    }
    return {"policy": section["policy"], "budget": config.budget, **values} | {
        "hold": config.hold,
        "safe_agreement": config.safe_agreement,
    }
