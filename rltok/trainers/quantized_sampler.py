"""The quantised copy of a run's policy that samples in its place: when it is refreshed, and what it costs.

With `rollout.quant.learner: same` the learner, and a reference of its own weights, compute with quantised weights too,
and so evaluations during training sample from the copy. With `full` these sample from the policy itself.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from rltok.config import ConfigError
from rltok.fast import row_key
from rltok.quant.config import QuantConfig
from rltok.quant.same_precision import attach_same_precision
from rltok.quant.shadow import QuantizedShadow, SyncFacts, is_rms_norm
from rltok.trainers.engine_support import training_engine

if TYPE_CHECKING:
    from rltok.trainers.door_trainer import DoorTrainer

SECTION = "rollout.quant"


class QuantizedSampler:
    """The shadow of a trainer's policy.

    Args:
        trainer: built, but for its model's wrappers.
        config: of the recipe.

    Raises:
        ConfigError: a model or a training engine that cannot have such a copy; names `rollout.quant` and the reason.
    """

    def __init__(self, trainer: DoorTrainer, config: QuantConfig) -> None:
        self.config = config
        engine = training_engine(trainer)
        if engine in ("zero3", "fsdp1", "fsdp2"):
            raise ConfigError(
                f"{SECTION} quantises whole weights, of which each process holds a share on {engine}. Use "
                f"launch.strategy ddp, zero1 or zero2, or remove {SECTION}.",
                SECTION,
            )
        policy = trainer.accelerator.unwrap_model(trainer.model)
        try:
            self.shadow = QuantizedShadow(policy, config.spec)
            if config.quantizes_learner:
                for model in (policy, trainer.ref_model):
                    if model is not None:
                        attach_same_precision(trainer.accelerator.unwrap_model(model), config.spec)
        except ValueError as error:
            raise ConfigError(f"{SECTION}: {error}", SECTION) from None
        if config.noise is not None and not any(is_rms_norm(module) for module in policy.modules()):
            raise ConfigError(
                f"{SECTION}.noise is added to the gains of RMSNorm layers, of which {type(policy).__name__} has none. "
                f"Remove {SECTION}.noise.",
                f"{SECTION}.noise",
            )

    def samples(self, training: bool) -> bool:
        """Whether completions of training, or of an evaluation, are the copy's."""
        return training or self.config.quantizes_learner

    @contextmanager
    def sampling(self, trainer: DoorTrainer) -> Iterator[Any]:
        """The model that makes this batch of completions, refreshed if that is due."""
        if trainer.model.training:
            assert trainer._fast is not None
            rollout = trainer._fast.rollouts - 1
            if rollout % self.config.refresh == 0:
                self._log(trainer, self._sync(trainer, rollout))
        else:
            self.shadow.sync()
        with trainer.accelerator.autocast():
            yield self.shadow.module

    def _sync(self, trainer: DoorTrainer, rollout: int) -> SyncFacts:
        noise = self.config.noise
        if noise is None:
            return self.shadow.sync()
        sigma = noise.sigma(trainer.state.global_step, max(trainer.state.max_steps, 1))
        return self.shadow.sync(noise=sigma, seed=row_key(trainer.args.seed, rollout, "noise", 0))

    def _log(self, trainer: DoorTrainer, facts: SyncFacts) -> None:
        """What a refresh did, into the trainer's metrics; seconds are those of the slowest process."""
        seconds = trainer._reducer.max(torch.tensor([facts.seconds], device=trainer.accelerator.device))
        found = {
            "codes_changed": facts.changed,
            "refreshed_layers": facts.refreshed,
            "refresh_seconds": seconds.item(),
            "shadow_bytes": facts.nbytes,
            "replaced_bytes": facts.replaced_nbytes,
        }
        if self.config.noise is not None:
            found["noise"] = facts.noise
        for name, value in found.items():
            trainer._metrics["train"][f"quant/{name}"].append(float(value))

    def state(self) -> dict[str, Any] | None:
        """What a checkpoint must hold of the copy: codes and scales where it may be older than the policy."""
        if self.config.refresh == 1:
            return None
        layers = {
            name: {key: getattr(layer.state, key) for key in ("codes", "scale", "dense")}
            for name, layer in self.shadow.layers.items()
        }
        return {"spec": repr(self.config.spec), "layers": layers}

    def load(self, state: Mapping[str, Any] | None) -> None:
        """Take the codes of a checkpoint, unless they are of another quantiser, whose run goes on with fresh ones."""
        if state is None or state["spec"] != repr(self.config.spec):
            return
        for name, layer in self.shadow.layers.items():
            layer.state = replace(layer.state, **state["layers"][name])
