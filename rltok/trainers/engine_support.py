"""What a training engine (DDP, DeepSpeed, FSDP) cannot do, refused when the trainer is built.

    engine            weights on a process    kept out here
    single, DDP       whole                   -
    ZeRO-1, ZeRO-2    whole                   -
    ZeRO-3            a share                 continuous batching without ds3_gather_for_generation
    FSDP2             a share                 continuous batching
    FSDP1                                     everything: use FSDP2

Where weights are shared out, every forward pass waits for all processes, so all must run equally many. Parts of the
trainer that run another number refuse such engines where they are checked: the engine `fast` (`fast_engine.py`) and
credit from attention (`credit_trainer.py`). Kept out as well is parallelism within a sequence or a layer: the trainer
takes every process for one with rows of its own.

transformers' generate lets processes that are done wait for the others, but does not recognise a model that accelerate
has sharded by FSDP2: the first process to finish would leave the others waiting. It is told so here.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from rltok.config import ConfigError
from rltok.trainers.engine_choice import engine_of

if TYPE_CHECKING:
    from rltok.trainers.door_trainer import DoorTrainer

BATCHING = "training.use_transformers_continuous_batching"


def training_engine(trainer: DoorTrainer) -> str:
    """`single`, `ddp`, `zero1`, `zero2`, `zero3`, `fsdp1` or `fsdp2`: what accelerate runs a trainer on."""
    backend = trainer._dist
    if backend.zero_stage:
        return f"zero{backend.zero_stage}"
    if backend.is_fsdp:
        return f"fsdp{backend.fsdp_version}"
    return "single" if trainer.accelerator.num_processes == 1 else "ddp"


def check_engine_support(trainer: DoorTrainer) -> None:
    """Refuse what would hang or train something else on the engine of this run; keep generating processes in step.

    Args:
        trainer: whose accelerator is there, and whose model is not wrapped yet.

    Raises:
        ConfigError: names engine and setting, and what to use instead.
    """
    engine = training_engine(trainer)
    if engine == "fsdp1":
        raise ConfigError(
            "FSDP version 1 (fsdp_version: 1, accelerate's default) is not supported, as this library is not tested "
            "on it. Set fsdp_version: 2 in the configuration of accelerate."
        )
    _refuse_other_parallelism(trainer)
    rollout = engine_of(trainer.args, trainer.doors.rollout)
    shared_out = engine == "fsdp2" or (engine == "zero3" and not trainer.args.ds3_gather_for_generation)
    if rollout == "continuous_batching" and shared_out:
        raise ConfigError(
            f"{BATCHING}=true runs another number of forward passes on every process, which waits forever where each "
            f"pass gathers weights (FSDP, or ZeRO-3 with training.ds3_gather_for_generation=false). Set {BATCHING}="
            "false with rollout.engine=transformers."
        )
    if rollout == "transformers" and engine == "fsdp2":
        model = trainer.model
        model.generate = partial(model.generate, synced_gpus=trainer.accelerator.num_processes > 1)


def _refuse_other_parallelism(trainer: DoorTrainer) -> None:
    """Refuse processes that share rows, and models that came sharded."""
    sizes = getattr(trainer.accelerator, "parallelism_config", None)
    for name in ("tp_size", "cp_size", "sp_size"):
        size = getattr(sizes, name, None) or 1
        if size > 1:
            raise ConfigError(
                f"parallelism_config.{name}={size}: several processes would hold the same rows, which the statistics "
                "over processes count once for each. Use data parallelism alone (DDP, ZeRO, FSDP2)."
            )
    if getattr(trainer, "is_distributed_loading_by_transformers", False):
        raise ConfigError(
            "the model was sharded while it was loaded (distributed_config), which hides from the trainer that every "
            "forward pass waits for all processes. Load it whole and let accelerate shard it (FSDP2 or ZeRO-3)."
        )
