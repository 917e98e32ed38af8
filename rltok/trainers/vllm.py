"""Decoding processors on vLLM, as TRL drives it: colocated with the trainer, or as a server.

    engine_with_processors    colocated: TRL's engine is built with `rltok.sampling.vllm_processor`
    steered_engine            colocated: hidden states inside the engine are moved during one generation
    probe_server              server: proves that it was started with it
    decoding_parameters       both: the processors of one generation, as a request parameter

TRL has no setting for the first two; it reads the third, `generation_kwargs`, anew at every generation.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from trl import GRPOConfig
from trl.generation import vllm_generation as trl_generation

from rltok.config import ConfigError
from rltok.sampling import RolloutProcessor
from rltok.sampling.serial import KEY, encode
from rltok.steering.hooks import Steering, SteeringVector, layer_list, steered_modules

logger = logging.getLogger(__name__)

PROCESSOR = "rltok.sampling.vllm_processor:VLLMDecoding"
"""What vLLM loads, by name, so that an engine in another process finds it too."""
RUNNER = "VLLM_USE_V2_MODEL_RUNNER"
"""vLLM's switch between its two model runners."""
PARAMETER = {"colocate": "extra_args", "server": "vllm_xargs"}
"""vllm_mode -> where a request carries arguments of its own; the other one is an error or is silently ignored."""


@contextmanager
def engine_with_processors(args: GRPOConfig, eager: bool = False) -> Iterator[None]:
    """Let the engine that TRL builds inside the block load `VLLMDecoding`; nothing stays replaced afterwards.

    `eager` builds it without captured graphs, which would pass steering hooks by.

    Unless the environment has decided, vLLM's V1 model runner is chosen (for the process): the V2 interface is served,
    but has not been run on a GPU.

    Raises:
        ConfigError: not a colocated engine, TRL has no engine class where it is replaced, or built none through it.
    """
    if not args.use_vllm or args.vllm_mode != "colocate":
        raise ConfigError(
            f"training.use_vllm={args.use_vllm}, vllm_mode={args.vllm_mode!r}: only a colocated engine is built here"
        )
    original = getattr(trl_generation, "LLM", None)
    if original is None:
        raise ConfigError(
            "rollout.decoding with training.use_vllm=true: trl.generation.vllm_generation has no LLM. Install a vLLM "
            "that TRL supports, or set use_vllm=false."
        )
    _choose_runner()
    built = []

    def with_processors(*arguments: Any, **settings: Any) -> Any:
        others = settings.pop("logits_processors", None) or []
        if eager:
            settings["enforce_eager"] = True
        built.append(original(*arguments, logits_processors=[*others, PROCESSOR], **settings))
        return built[-1]

    trl_generation.LLM = with_processors
    try:
        yield
    finally:
        trl_generation.LLM = original
    if not built:
        raise ConfigError(
            "rollout.decoding: TRL built its vLLM engine in an unknown way, without rltok's processors. Use TRL 1.16, "
            "or set training.use_vllm=false."
        )


def _choose_runner() -> None:
    chosen = os.environ.setdefault(RUNNER, "0")
    logger.info(
        "vLLM's model runner with rltok's processors: %s (%s=%s)", "V1" if chosen == "0" else "V2", RUNNER, chosen
    )


@contextmanager
def decoding_parameters(vllm_generation: Any, processors: Sequence[RolloutProcessor]) -> Iterator[None]:
    """Send the processors along with every request of the block; the user's own parameters stay.

    Args:
        vllm_generation: TRL's `VLLMGeneration`; its `generation_kwargs` are restored afterwards, also on errors.
        processors: in the order to run; none, or only neutral ones, leaves the requests as they are.

    Raises:
        ConfigError: parameters of the user that would be lost or collide.
        ValueError: a processor that cannot be sent.
    """
    active = [processor for processor in processors if not processor.is_neutral]
    if not active:
        yield
        return
    before: Mapping[str, Any] = vllm_generation.generation_kwargs
    vllm_generation.generation_kwargs = with_decoding(before, vllm_generation.mode, encode(active))
    try:
        yield
    finally:
        vllm_generation.generation_kwargs = before


def with_decoding(generation_kwargs: Mapping[str, Any] | None, mode: str, text: str) -> dict[str, Any]:
    """A copy of TRL's `generation_kwargs` in which requests of a mode carry `text`.

    Raises:
        ConfigError: unknown mode, a key that the mode does not read, or one that is taken.
    """
    if mode not in PARAMETER:
        raise ConfigError(f"training.vllm_mode={mode!r} is unknown; allowed: {', '.join(map(repr, PARAMETER))}")
    given, parameter = dict(generation_kwargs or {}), PARAMETER[mode]
    for other, name in PARAMETER.items():
        if other != mode and name in given:
            raise ConfigError(
                f"training.generation_kwargs.{name} belongs to vllm_mode={other!r}, but vllm_mode={mode!r} reads "
                f"{parameter}. Rename it."
            )
    own = given.get(parameter) or {}
    if not isinstance(own, Mapping):
        raise ConfigError(f"training.generation_kwargs.{parameter}={own!r} is not a mapping of names to values")
    if KEY in own:
        raise ConfigError(
            f"training.generation_kwargs.{parameter} sets {KEY!r}, which rollout.decoding sets. Remove it."
        )
    return given | {parameter: {**own, KEY: text}}


@contextmanager
def steered_engine(vllm_generation: Any, vectors: Sequence[SteeringVector], n_layers: int) -> Iterator[Steering]:
    """Steer the colocated engine's model inside the block; its cache of prefixes is emptied before and after.

    Args:
        vllm_generation: TRL's, with an engine built eagerly (`engine_with_processors`).
        vectors: at most one per layer; none leaves everything as it is.
        n_layers: decoder layers of the model.

    Raises:
        ConfigError: the engine's model lies in another process.
        ValueError: the engine's model has no such list of layers.
    """
    if not any(vector.strength for vector in vectors):
        yield Steering()
        return
    engine, found = vllm_generation.llm, []
    engine.apply_model(lambda model: found.append(layer_list(model, n_layers)))
    if len(found) != 1:
        raise ConfigError(
            "rollout.steering: vLLM's model is not in this process, where hooks reach it. Set "
            "VLLM_ENABLE_V1_MULTIPROCESSING=0, or training.use_vllm=false."
        )
    engine.reset_prefix_cache()
    try:
        with steered_modules(found[0], vectors, splits_residual=True) as state:
            yield state
    finally:
        engine.reset_prefix_cache()


def probe_server(vllm_generation: Any) -> None:
    """Prove that a vLLM server runs `VLLMDecoding` and returns log-probabilities after it; asks for one token.

    The request carries processors that do not exist. A server that knows them refuses it with status 400; one that
    samples has ignored them, and every rollout would silently be a plain one.

    Raises:
        ConfigError: the processors are missing, or the log-probabilities are those before them; with the command that
            starts the server rightly.
    """
    client = vllm_generation.vllm_client
    body = {"model": client.model, "prompt": [0], "max_tokens": 1, PARAMETER["server"]: {KEY: "probe"}}
    response = client.session.post(f"{client.base_url}/v1/completions", json=body)
    if response.status_code == 200:
        raise ConfigError(
            f"rollout.decoding: the vLLM server at {client.base_url} does not load rltok's processors and would sample "
            f"without them. Start it with\n    {server_command(client.model)}"
        )
    if response.status_code != 400 or KEY not in response.text:
        raise ConfigError(
            f"rollout.decoding: asked whether it loads rltok's processors, the vLLM server at {client.base_url} "
            f"answered {response.status_code}: {response.text[:500]}\nIt should be started with\n    "
            f"{server_command(client.model)}"
        )
    mode = client.get_server_info()["model_config"]["logprobs_mode"]
    if mode != "processed_logprobs":
        raise ConfigError(
            f"rollout.decoding: the vLLM server at {client.base_url} returns {mode}, log-probabilities without the "
            f"processors that the samples were drawn with. Start it with\n    {server_command(client.model)}"
        )


def server_command(model: str) -> str:
    """The command that starts a server which rollouts with processors can use."""
    return (
        f"VLLM_SERVER_DEV_MODE=1 {RUNNER}=0 vllm serve {model} --logits-processors {PROCESSOR} "
        "--logprobs-mode processed_logprobs --max-logprobs -1 "
        """--weight-transfer-config '{"backend": "nccl"}'"""
    )
