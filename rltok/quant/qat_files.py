"""Saved models with fake quantisers: which ones belong to the weights of a directory, and how they come back.

A directory with `quantization_aware.json` holds, in its safetensors, full-precision or converted weights under their
usual names and the steps of the quantisers beside them. transformers alone does not know the latter: it reports them as
unexpected keys and computes without them. `rltok.models.load_model` puts them in place.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import Tensor, nn

from rltok.config import ConfigError, build
from rltok.files import write_json
from rltok.models import QUANTIZER_MARKS, QUANTIZERS
from rltok.quant.fake import OFF
from rltok.quant.qat import QATSpec, convert, is_converted, is_prepared, prepare_qat, qat_state

NOTE = (
    "This model computes with fake quantisers, whose steps lie beside its weights. Load it with "
    "rltok.models.load_model; transformers alone reports the steps as unexpected and computes without them."
)


@dataclass(frozen=True)
class SavedQuantizers:
    """What `quantization_aware.json` says."""

    converted: bool
    """weights lie on their grid, steps of weights are gone"""
    spec: QATSpec
    """what was trained with"""


def write_quantizers(folder: str | Path, model: nn.Module) -> None:
    """Write `quantization_aware.json` beside the saved weights of a model with quantisers, none for a plain one."""
    file = Path(folder) / QUANTIZERS
    if not is_prepared(model):
        file.unlink(missing_ok=True)
        return
    spec = dataclasses.asdict(qat_state(model).spec)
    write_json(file, {"converted": is_converted(model), "spec": spec, "note": NOTE})


def read_quantizers(folder: str | Path) -> SavedQuantizers | None:
    """Which quantisers belong to a directory's weights, None for none.

    Raises:
        ConfigError: the file cannot be read as such.
    """
    file = Path(folder) / QUANTIZERS
    if not file.is_file():
        return None
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
        return SavedQuantizers(bool(values["converted"]), build(QATSpec, values["spec"], "spec"))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"model.path: {file} does not say which quantisers the model has ({error})") from error


def restore_quantizers(model: Any, folder: str | Path) -> Any:
    """Put the quantisers of a directory into the model whose weights were loaded from it, in place.

    Of several widths per token every token has the high one, as in sampling; training mixes them again.

    Raises:
        ConfigError: a model that they do not fit, or steps that are missing.
    """
    saved = read_quantizers(folder)
    if saved is None:
        return model
    try:
        prepare_qat(model, replace(saved.spec, weight_bits=OFF) if saved.converted else saved.spec)
    except ValueError as error:
        raise ConfigError(f"model.path: the quantisers in {folder} do not fit: {error}", "model.path") from error
    if saved.converted:
        convert(model)
    wanted = {name for name in model.state_dict() if any(mark in name for mark in QUANTIZER_MARKS)}
    steps = _read(Path(folder), wanted)
    if wanted - steps.keys():
        missing = sorted(wanted - steps.keys())
        raise ConfigError(
            f"model.path: {folder} lacks {len(missing)} tensors of its quantisers, such as {missing[0]}", "model.path"
        )
    model.load_state_dict(steps, strict=False)
    state = qat_state(model)
    state.spec, state.high_only = saved.spec, True
    return model


def _read(folder: Path, wanted: set[str]) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as tensors:
            found |= {name: tensors.get_tensor(name) for name in tensors.keys() if name in wanted}  # noqa: SIM118
    return found
