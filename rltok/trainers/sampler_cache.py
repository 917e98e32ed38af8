"""The cache policy of a run's rollouts: its budget from rollout to rollout, what it cost, whether learning is safe."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from rltok.config import ConfigError
from rltok.fast.cache import layer_windows
from rltok.kv import KVConfig, KVPolicy, PolicyCache
from rltok.kv.attention import implementation

if TYPE_CHECKING:
    from rltok.trainers.door_trainer import DoorTrainer

logger = logging.getLogger(__name__)


class SamplerCache:
    """What a trainer remembers of `rollout.kv`.

    Args:
        config: of the recipe.
    """

    def __init__(self, config: KVConfig) -> None:
        self.config = config
        self.budget = config.budget
        """tokens of a row that a layer keeps in the next rollout; None: the policy's own numbers say it"""
        self._warned = False

    @property
    def policy(self) -> KVPolicy:
        """Of the next rollout."""
        return self.config.at(self.budget)

    def check(self, trainer: DoorTrainer) -> None:
        """Refuse a model that the policy does not serve, before anything is generated.

        Raises:
            ConfigError: names `rollout.kv` and what stands against it.
        """
        model = trainer._causal_lm
        try:
            implementation(model)
            ends = [] if self.config.hold is None else [self.config.hold.least, self.config.hold.most]
            for budget in (self.budget, *ends):
                PolicyCache(model.config, policy=self.config.at(budget))
        except ValueError as error:
            raise ConfigError(f"rollout.kv: {error}", "rollout.kv") from None

    def _kept_share(self, trainer: DoorTrainer, lengths: Tensor) -> float:
        """Share of the tokens of all ranks' rows that a cut at their end leaves, mean over the policy's layers."""
        windows = layer_windows(trainer._causal_lm.config.get_text_config(decoder=True))
        budgets = [self.policy.kept(layer) for layer, window in enumerate(windows) if window is None]
        kept = torch.stack([lengths.clamp(max=budget).sum() for budget in budgets]).float().mean()
        kept, total = trainer._reducer.sum(torch.stack([kept, lengths.sum().float()]))
        return float(kept / total)

    def after_rollout(
        self, trainer: DoorTrainer, output: Mapping[str, Any], values: Mapping[str, float]
    ) -> dict[str, float]:
        """Metrics of the rollout that was just corrected; moves the budget, and warns once where learning is unsafe.

        Args:
            output: TRL's tensors of the rollout.
            values: metrics of its correction.
        """
        lengths = output["prompt_mask"].sum(1) + output["completion_mask"].sum(1)
        share = self._kept_share(trainer, lengths)
        agreement, safe = values["agreement_p5"], self.config.safe_agreement
        unsafe = agreement < safe
        if unsafe and not self._warned:
            self._warned = True
            if trainer.accelerator.is_main_process:
                logger.warning(
                    "Learning from these rollouts is unsafe: the 5th percentile of the agreement min(xi, 1/xi) between "
                    "learner and sampler is %.3f, below rollout.kv.safe_agreement=%s. Raise rollout.kv.budget%s, or "
                    "let rollout.kv.hold move it. This is said once; kv/unsafe and correction/agreement_p5 are "
                    "logged at every rollout.",
                    agreement,
                    safe,
                    "" if self.budget is None else f"={self.budget}",
                )
        found = {"unsafe": float(unsafe), "kept_share": share}
        if self.budget is not None:
            found["budget"] = float(self.budget)
            if self.config.hold is not None:
                self.budget = self.config.hold.moved(self.budget, agreement)
        return found
