"""Steering of hidden states while completions are made: attribution, vectors, and the hooks that add them.

`attribution` scores tokens by integrated gradients, `vectors` makes one direction per layer of what the highest of them
change, `hooks` adds it during generation, `files` keeps it, `config` is its place in a recipe. Pure torch and
transformers; no trainer is needed.
"""

from rltok.steering.attribution import Attribution, TokenScores, attribute_tokens, integrated_gradients
from rltok.steering.config import SteeringConfig
from rltok.steering.files import StoredVectors, describe_model, load_vectors, save_vectors
from rltok.steering.hooks import Steering, SteeringVector, decoder_layers, steer, steered
from rltok.steering.vectors import (
    Contrast,
    ContrastOptions,
    Direction,
    LayerDirection,
    Triple,
    build_vectors,
    contrast_states,
    layer_directions,
    steering_direction,
)

__all__ = [
    "Attribution",
    "Contrast",
    "ContrastOptions",
    "Direction",
    "LayerDirection",
    "Steering",
    "SteeringConfig",
    "SteeringVector",
    "StoredVectors",
    "TokenScores",
    "Triple",
    "attribute_tokens",
    "build_vectors",
    "contrast_states",
    "decoder_layers",
    "describe_model",
    "integrated_gradients",
    "layer_directions",
    "load_vectors",
    "save_vectors",
    "steer",
    "steered",
    "steering_direction",
]
