"""Which models the loop serves, and the mode in which it calls them."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from rltok.fast.cache import layer_windows
from rltok.sampling import generation_model

MOVING_ROPE = {"dynamic", "longrope"}
"""rotary types whose frequencies depend on the length of the batch, and are stored in the model as they change"""
INSTEAD = "use transformers' generate for this model"


def servable_model(model: Any) -> Any:
    """The inner model that the loop calls.

    Raises:
        ValueError: a model that it does not serve.
    """
    for name, adapter in getattr(model, "peft_config", {}).items():
        if getattr(adapter, "is_prompt_learning", False):
            raise ValueError(f"adapter {name!r} ({adapter.peft_type}) adds virtual tokens: {INSTEAD}")
    base = generation_model(model)
    config, kind = base.config, base.config.model_type
    if config.is_encoder_decoder:
        raise ValueError(f"{kind!r} is an encoder-decoder: {INSTEAD}")
    if config.get_text_config(decoder=True) is not config:
        raise ValueError(f"{kind!r} takes more than text (its config holds a text config): {INSTEAD}")
    if getattr(base, "_is_stateful", False):
        raise ValueError(f"{kind!r} keeps a recurrent state: {INSTEAD}")
    if getattr(config, "num_kv_shared_layers", 0):
        raise ValueError(f"{kind!r} shares keys and values between layers: {INSTEAD}")
    moving = sorted(rope_types(config) & MOVING_ROPE)
    if moving:
        raise ValueError(
            f"{kind!r} has {moving} rotary positions, which change with the longest row beside it: {INSTEAD}"
        )
    missing = {"position_ids", "past_key_values"} - forward_arguments(base)
    if missing:
        raise ValueError(f"{kind!r} takes no {' and no '.join(sorted(missing))} in its forward: {INSTEAD}")
    layer_windows(config)
    return base


def forward_arguments(model: Any) -> set[str]:
    """Names of the arguments of a model's forward, also where it was wrapped after the model was made.

    Mixed precision puts a wrapper into the instance, which may tell nothing of what it wraps; the class still does.
    """
    own, of_class = (inspect.signature(function).parameters for function in (model.forward, type(model).forward))
    return set(own) | set(of_class)


def rope_types(config: Any) -> set[str]:
    """Rotary types of a config, which has one for all layers or one for each type of layer."""
    parameters = getattr(config, "rope_parameters", None) or {}
    several = [parameters, *(value for value in parameters.values() if isinstance(value, dict))]
    return {value["rope_type"] for value in several if value.get("rope_type")}


@contextmanager
def evaluation_mode(model: Any) -> Iterator[None]:
    """No dropout and no gradient checkpointing, which needs training mode; every module is as before afterwards."""
    training = [module for module in model.modules() if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True
