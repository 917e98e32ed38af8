"""The ways in which completions are made, and what our part of a rollout does on each.

    engine               processors run
    fast                 inside our own loop, see `rltok.trainers.fast_engine`
    transformers         inside generate
    continuous_batching  inside generate_batch
    vllm_colocate        in the engine, which is built with them
    vllm_server          in the server, which must have been started with them

Log-probabilities are always those of the distribution that drew the token.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import broadcast_object_list
from trl import GRPOConfig

from rltok.config import ConfigError
from rltok.kv import attach
from rltok.rollout import RolloutConfig
from rltok.sampling import RolloutProcessor, SampledLogps, sampling_control
from rltok.sampling.serial import encode
from rltok.steering import Steering, decoder_layers
from rltok.trainers.engine_choice import engine_of
from rltok.trainers.fast_engine import check_servable

if TYPE_CHECKING:
    from rltok.trainers.door_trainer import DoorTrainer

Finish = Callable[[Sequence[Sequence[int]], Any], Any]
"""(completion ids, TRL's log-probabilities or None) -> log-probabilities to keep"""


def built_with(rollout: RolloutConfig, args: GRPOConfig | None) -> AbstractContextManager[None]:
    """Around the construction of TRL's trainer: an engine in this process is built with what we need of it."""
    if args is None or engine_of(args, rollout) != "vllm_colocate" or not (rollout.decodes or rollout.steers):
        return nullcontext()
    from rltok.trainers.vllm import engine_with_processors

    return engine_with_processors(args, eager=rollout.steers)


def check_built(trainer: DoorTrainer) -> None:
    """What can be checked once model, tokenizer and engine are there.

    Raises:
        ConfigError: the tokenizer lacks what the settings name, the steering vectors are another model's, or the
            server was started without processors.
    """
    rollout = trainer.doors.rollout
    if rollout.steering is not None and rollout.steers:
        with rollout.steering.attach(trainer._causal_lm):
            pass
    if trainer._sampler_cache is not None:
        trainer._sampler_cache.check(trainer)
    if trainer._fast is not None:
        check_servable(trainer)
    context, engine = trainer._decoding_context(), engine_of(trainer.args, trainer.doors.rollout)
    for index, module in enumerate(rollout.decoding):
        if module.is_neutral:
            continue
        try:
            _check_processor(module.processor(context), engine)
        except ValueError as error:
            raise ConfigError(f"rollout.decoding[{index}]: {error}") from None
    if engine == "vllm_server" and rollout.decodes:
        _check_server(trainer)


def _check_processor(processor: RolloutProcessor | None, engine: str) -> None:
    """Raise ValueError for a processor that its module lets run on an engine and that does not run there."""
    if processor is None:
        return
    if engine == "continuous_batching":
        from rltok.sampling.continuous import unsupported

        if unsupported([processor]):
            raise ValueError(
                f"{type(processor).__name__} remembers more of a row than continuous batching can give it: set "
                "training.use_transformers_continuous_batching=false"
            )
    elif engine.startswith("vllm"):
        encode([processor])


def _check_server(trainer: DoorTrainer) -> None:
    if trainer._is_vlm:
        raise ConfigError(
            "rollout.decoding does not reach requests with images on a vLLM server. Use training.vllm_mode=colocate "
            "or training.use_vllm=false."
        )
    from rltok.trainers.vllm import probe_server

    problem: list[str | None] = [None]
    if trainer.accelerator.is_main_process:
        try:
            probe_server(trainer.vllm_generation)
        except ConfigError as error:
            problem = [str(error)]
    (message,) = broadcast_object_list(problem)  # every rank stops, or none
    if message is not None:
        raise ConfigError(message)


def steered_rollout(trainer: DoorTrainer) -> AbstractContextManager[Steering | None]:
    """Around one generation of TRL's: the model that samples is steered."""
    steering = trainer.doors.rollout.steering
    if steering is None or steering.is_neutral:
        return nullcontext()
    if engine_of(trainer.args, trainer.doors.rollout) != "vllm_colocate":
        return steering.attach(trainer._sampling_lm)
    from rltok.trainers.vllm import steered_engine

    layers = decoder_layers(trainer._causal_lm)
    return steered_engine(trainer.vllm_generation, steering.load(trainer._causal_lm), len(layers))


@contextmanager
def policed(trainer: DoorTrainer, model: Any) -> Iterator[None]:
    """Around transformers' generate: the cache keeps what `rollout.kv` keeps, and its size is logged."""
    policy = trainer._kv_policy
    if policy is None:
        yield
        return
    with attach(model, policy) as handle:
        yield
    peak = torch.tensor([handle.stats["peak_cache_bytes"]], device=trainer.accelerator.device)
    trainer._metrics["train"]["rollout/peak_cache_bytes"].append(float(trainer._reducer.max(peak)))


@contextmanager
def controlled(trainer: DoorTrainer, processors: Sequence[RolloutProcessor], record: bool) -> Iterator[Finish]:
    """One generation of TRL's with our processors; yields what turns its result into recorded log-probabilities."""
    engine = engine_of(trainer.args, trainer.doors.rollout)
    model = trainer.accelerator.unwrap_model(trainer.model)
    if engine == "transformers":
        recorder = SampledLogps() if record else None
        with sampling_control(model, processors, recorder), policed(trainer, model):
            yield lambda ids, logps: logps if recorder is None else recorder.finish(ids)
    elif engine == "continuous_batching":
        from rltok.sampling.continuous import continuous_control

        with continuous_control(model, processors, record) as kept:
            yield lambda ids, logps: kept.finish(ids) if record else logps
    else:
        from rltok.trainers.vllm import decoding_parameters

        with decoding_parameters(trainer.vllm_generation, processors):
            yield lambda ids, logps: logps
