"""Steering vectors in a safetensors file, with how they were made and of which model."""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from rltok.attention.probe import language_model, text_config
from rltok.steering.hooks import SteeringVector

FORMAT = "1"
DIGEST_SAMPLE = 64
"""Numbers of every parameter that the digest reads."""


class StoredVectors(NamedTuple):
    """What a file holds."""

    vectors: list[SteeringVector]
    """by layer, float32 on the CPU"""
    settings: dict[str, Any]
    """how they were made"""


def save_vectors(path: str | Path, vectors: Sequence[SteeringVector], settings: Mapping[str, Any]) -> None:
    """Write vectors and settings to a safetensors file, whole or not at all.

    Args:
        path: file; its directory is made.
        vectors: at most one per layer.
        settings: plain values; `describe_model` gives those that loading compares with a model.

    Raises:
        ValueError: no vectors, two of one layer, or settings that are no plain values.
    """
    path = Path(path)
    layers = [vector.layer for vector in vectors]
    if not vectors or len(set(layers)) != len(layers):
        raise ValueError(f"vectors of layers {layers}; allowed: at least one, and one per layer")
    about = [{"layer": v.layer, "strength": v.strength, "normalize": v.normalize} for v in vectors]
    try:
        metadata = {"format": FORMAT, "vectors": json.dumps(about), "settings": json.dumps(dict(settings))}
    except TypeError as error:
        raise ValueError(f"settings must be plain values: {error}") from error
    tensors = {_name(v.layer): v.vector.detach().float().cpu().contiguous() for v in vectors}
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(path.name + ".part")
    save_file(tensors, draft, metadata={f"rltok_steering.{key}": value for key, value in metadata.items()})
    draft.replace(path)


def _name(layer: int) -> str:
    return f"layer.{layer}"


def load_vectors(path: str | Path, model: nn.Module | None = None) -> StoredVectors:
    """Vectors and settings of a file that `save_vectors` wrote.

    Args:
        path: the file.
        model: checked against them if given.

    Raises:
        ValueError: no such file, a file of another kind, or vectors that do not fit the model.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path}: there is no such file; `rltok steer` makes one")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path}: cannot be read as safetensors: {error}") from error
    found = metadata.get("rltok_steering.format")
    if found != FORMAT:
        what = "holds no steering vectors" if found is None else f"has format {found!r}, known: {FORMAT!r}"
        raise ValueError(f"{path}: {what}; `rltok steer` makes such files")
    about = json.loads(metadata["rltok_steering.vectors"])
    vectors = [SteeringVector(a["layer"], tensors[_name(a["layer"])], a["strength"], a["normalize"]) for a in about]
    stored = StoredVectors(sorted(vectors, key=lambda v: v.layer), json.loads(metadata["rltok_steering.settings"]))
    if model is not None:
        check_stored(stored, model, str(path))
    return stored


def check_stored(stored: StoredVectors, model: nn.Module, where: str = "the vectors", digest: bool = True) -> None:
    """Raise ValueError, naming every difference, for vectors of a model of another shape; warn of other weights.

    Args:
        stored: as loaded.
        model: where they are to be used.
        where: what messages call the vectors.
        digest: compare the weights too.
    """
    config = text_config(language_model(model))
    differences = []
    sizes = sorted({v.vector.numel() for v in stored.vectors})
    if sizes != [config.hidden_size]:
        differences.append(f"hidden size {', '.join(map(str, sizes))}, the model has {config.hidden_size}")
    n_layers = config.num_hidden_layers
    if stored.settings.get("n_layers", n_layers) != n_layers:
        differences.append(f"made for {stored.settings['n_layers']} layers, the model has {n_layers}")
    outside = [v.layer for v in stored.vectors if v.layer >= n_layers]
    if outside:
        differences.append(f"layers {outside}, the model has 0 to {n_layers - 1}")
    if differences:
        raise ValueError(f"{where} does not fit the model: {'; '.join(differences)}")
    known = stored.settings.get("digest") if digest else None
    if known is not None and known != weights_digest(model):
        warnings.warn(
            f"{where} was made of other weights ({stored.settings.get('model', 'unnamed')}): the further they are, the "
            "less the vectors mean; `rltok steer` makes new ones",
            stacklevel=2,
        )


def describe_model(model: nn.Module, name: str) -> dict[str, Any]:
    """The settings that loading compares: model, hidden_size, n_layers, digest."""
    config = text_config(language_model(model))
    return {
        "model": name,
        "hidden_size": config.hidden_size,
        "n_layers": config.num_hidden_layers,
        "digest": weights_digest(model),
    }


def weights_digest(model: nn.Module) -> str:
    """A digest of the base weights: shapes, and some numbers of every parameter rounded to bfloat16.

    Adapters are left out, and loading the same checkpoint in another type seldom changes it.
    """
    digest = hashlib.sha256()
    for name, parameter in language_model(model).named_parameters():
        if "lora_" not in name:
            digest.update(f"{name.replace('.base_layer', '')}{tuple(parameter.shape)}".encode())
            digest.update(_sample(parameter.detach()).numpy().tobytes())
    return digest.hexdigest()[:16]


def _sample(values: Tensor) -> Tensor:
    flat = values.reshape(-1)
    stride = max(1, flat.numel() // DIGEST_SAMPLE)
    return flat[::stride][:DIGEST_SAMPLE].to(torch.bfloat16).float().cpu()
