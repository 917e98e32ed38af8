"""DeepSpeed, FSDP2 and QLoRA as accelerate starts them, which it does on a GPU alone.

Two processes with two GPUs, one with one: the engine shards over a single process then, and all its code runs.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from rltok.config import ConfigError
from rltok.models import QuantizationSettings, quantization_config

HERE = Path(__file__).parent
FILES = {"ZeRO-2": "zero2", "ZeRO-3": "zero3", "FSDP2": "fsdp"}
gpu = pytest.mark.gpu
PROCESSES = min(2, torch.cuda.device_count())


def needs(*modules: str) -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device here")
    for module in modules:
        if importlib.util.find_spec(module) is None:
            pytest.skip(f"{module} is not installed")


def run(folder: Path, method: str, engine: str) -> dict:
    """A run through accelerate; plain Python where no strategy is asked for."""
    command = [sys.executable]
    environment = {
        **os.environ,
        "PYTHONPATH": f"{HERE.parent}{os.pathsep}{HERE.parents[1]}",
        "HF_HUB_OFFLINE": "1",
        "CUDA_VISIBLE_DEVICES": "0",
    }
    if engine in FILES.values():
        import rltok

        file = Path(rltok.__file__).parent / "configs" / "accelerate" / f"{engine}.yaml"
        command += ["-m", "accelerate.commands.launch", "--config_file", str(file), "--num_processes", str(PROCESSES)]
        environment["CUDA_VISIBLE_DEVICES"] = ",".join(map(str, range(PROCESSES)))
    worker = [str(HERE / "gpu_worker.py"), str(folder), method, engine]
    done = subprocess.run([*command, *worker], env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-4000:]
    return torch.load(folder / f"{engine}.pt", weights_only=True)


@gpu
@pytest.mark.parametrize("engine", ["ZeRO-2", "ZeRO-3", "FSDP2"])
@pytest.mark.parametrize("method", ["credit: entropy_shaping", "objective: hapo", "selection: d3s"])
def test_five_updates_through_accelerate_equal_those_of_one_process(tmp_path, engine, method):
    needs(*(["deepspeed"] if engine.startswith("ZeRO") else []))
    one, other = run(tmp_path, method, "single"), run(tmp_path, method, FILES[engine])
    assert len(one["losses"]) == 5
    assert other["losses"] == pytest.approx(one["losses"], abs=1e-4)
    for name, value in one["parameters"].items():
        torch.testing.assert_close(other["parameters"][name], value, atol=1e-4, rtol=0, msg=name)


@gpu
@pytest.mark.parametrize("engine", ["QLoRA"])
@pytest.mark.parametrize("method", ["credit: entropy_shaping", "credit: preplan_anchor", "selection: d3s"])
def test_an_adapter_over_four_bits_trains_and_the_weights_below_stay(tmp_path, engine, method):
    needs("bitsandbytes")
    result = run(tmp_path, method, engine.lower())
    assert result["four_bits"] > 0, "the weights below are in four bits"
    assert len(result["losses"]) == 5 and any(abs(loss) > 1e-4 for loss in result["losses"])
    assert not result["frozen_moved"]
    adapter = {name: value for name, value in result["parameters"].items() if "lora_B" in name}
    assert adapter and all(value.isfinite().all() and value.any() for value in adapter.values())


def test_the_settings_of_qlora_reach_transformers(monkeypatch):
    """On any machine: what bitsandbytes would be told, with it and without."""
    real = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *a: None if name == "bitsandbytes" else real(name, *a)
    )
    with pytest.raises(ConfigError, match="bitsandbytes is not installed"):
        quantization_config(QuantizationSettings())
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *a: real("json" if name == "bitsandbytes" else name, *a)
    )
    four = quantization_config(QuantizationSettings())
    assert four.load_in_4bit and four.bnb_4bit_quant_type == "nf4" and four.bnb_4bit_use_double_quant
    assert four.bnb_4bit_compute_dtype == torch.bfloat16
    stored = quantization_config(QuantizationSettings(storage_dtype="bfloat16", double=False, type="fp4"))
    assert stored.bnb_4bit_quant_storage == torch.bfloat16 and not stored.bnb_4bit_use_double_quant
    assert stored.bnb_4bit_quant_type == "fp4"
    eight = quantization_config(QuantizationSettings(bits=8))
    assert eight.load_in_8bit and not eight.load_in_4bit
