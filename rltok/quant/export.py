"""Write a quantised model as a checkpoint that transformers loads.

    compressed-tensors   codes packed into int32 beside their scales ("pack-quantized": weight_packed, weight_scale,
                         weight_shape), described by quantization_config in config.json; read by transformers with the
                         package compressed-tensors, and by engines that know the format
    dequantized          plain weights, codes times scales: as large as before, loads anywhere

Embeddings, norms, biases and the head are kept in the model's dtype in both. Scales are stored in that dtype too, so
quantise with `QuantSpec(scale_dtype=model.dtype)`: the weights that are read back are then those of the model in
memory, bit for bit.

Packing is that of the package: dense, so that 3, 5, 6 and 7 bits cross the borders of words. Older versions padded
those widths; 2, 4 and 8 bits are alike in all.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from rltok.quant.quantize import QuantizedModel
from rltok.quant.rotation import known_decoder

Format = Literal["compressed-tensors", "dequantized"]
PACKAGE = "compressed-tensors"
OLDEST = (0, 20)
"""version of the package whose packing is known to be dense"""
KEPT = ("lm_head",)
"""linears that are not quantised"""


def write_weights(model: nn.Module, quantized: QuantizedModel, folder: Path, form: Format) -> None:
    """Configuration and weights of a model that `quantize_model` has quantised; other files are not touched.

    Args:
        model: holds the dequantised weights.
        quantized: codes and scales of its linears.
        folder: may be new.
        form: "compressed-tensors" or "dequantized".

    Raises:
        ValueError: an unknown form, or scales that the model's dtype would change.
        ImportError: compressed-tensors is missing or too old.
    """
    if form not in get_args(Format):
        raise ValueError(f"form={form!r}; allowed: {', '.join(get_args(Format))}")
    core = known_decoder(model)
    if form == "dequantized":
        core.save_pretrained(folder)
        return
    problem = package_problem()
    if problem is not None:
        raise ImportError(problem)
    state = packed_state(core, quantized)
    core.config.quantization_config = packed_config(quantized)
    try:
        core.save_pretrained(folder, state_dict=state)
    finally:
        del core.config.quantization_config


def package_problem() -> str | None:
    """What keeps compressed-tensors from being used here, in words; None: nothing."""
    if importlib.util.find_spec("compressed_tensors") is None:
        return f"{PACKAGE} is not installed; pip install 'rltok[quant]'"
    found = importlib.metadata.version(PACKAGE)
    if tuple(int(part) for part in found.split(".")[:2]) < OLDEST:
        needed = ".".join(map(str, OLDEST))
        return f"{PACKAGE} {found} is too old, {needed} or newer is needed; pip install -U 'rltok[quant]'"
    return None


def packed_state(model: nn.Module, quantized: QuantizedModel) -> dict[str, Tensor]:
    """The model's state with `weight_packed`, `weight_scale` and `weight_shape` in place of quantised weights.

    Raises:
        ValueError: scales that are not exact in the dtype of the weights.
    """
    from compressed_tensors.compressors import pack_to_int32

    state = dict(model.state_dict())
    for name, one in quantized.states.items():
        weight = state.pop(f"{name}.weight")
        scales = one.scales.to(weight.dtype)
        if not torch.equal(scales.to(one.scales.dtype), one.scales):
            raise ValueError(
                f"{name}: scales are not exact in {weight.dtype}, so that a reader would see other weights; quantise "
                f"with QuantSpec(scale_dtype={weight.dtype})"
            )
        state[f"{name}.weight_packed"] = pack_to_int32(one.codes, one.bits)
        state[f"{name}.weight_scale"] = scales
        state[f"{name}.weight_shape"] = torch.tensor(one.codes.shape)
    return state


def packed_config(quantized: QuantizedModel) -> dict[str, Any]:
    """`quantization_config` of a packed checkpoint, as plain values."""
    from compressed_tensors.quantization import QuantizationArgs, QuantizationConfig, QuantizationScheme

    spec = quantized.spec
    whole_row = spec.group_size == -1
    weights = QuantizationArgs(
        num_bits=spec.bits,
        type="int",
        symmetric=True,
        strategy="channel" if whole_row else "group",
        group_size=None if whole_row else spec.group_size,
    )
    about = QuantizationConfig(
        config_groups={"group_0": QuantizationScheme(targets=["Linear"], weights=weights)},
        format="pack-quantized",
        quantization_status="compressed",
        ignore=list(KEPT),
    )
    values: dict[str, Any] = about.model_dump(mode="json")
    return values
