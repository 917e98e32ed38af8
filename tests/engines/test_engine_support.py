"""What an engine cannot do is refused when the trainer is built, in words that name the way out."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from worker import build, refusal, settings, write_vectors

from rltok.config import ConfigError
from rltok.trainers.engine_support import check_engine_support, training_engine

GROUP = "credit: group"
CONTINUOUS = {"use_transformers_continuous_batching": True}


@pytest.fixture
def trainer(tmp_path):
    return build(tmp_path, GROUP, settings(tmp_path, GROUP, 1))


def backend(zero=0, fsdp=None):
    return SimpleNamespace(zero_stage=zero, fsdp_version=fsdp, is_zero3=zero == 3, is_fsdp=fsdp is not None)


@pytest.mark.parametrize(
    ("found", "name"),
    [(backend(), "single"), (backend(zero=1), "zero1"), (backend(zero=3), "zero3"), (backend(fsdp=2), "fsdp2")],
)
def test_engines_are_told_apart(trainer, found, name):
    trainer._dist = found
    assert training_engine(trainer) == name
    check_engine_support(trainer)


def test_several_processes_without_sharding_are_ddp(trainer, monkeypatch):
    monkeypatch.setattr(type(trainer.accelerator), "num_processes", 2)
    assert training_engine(trainer) == "ddp"


@pytest.mark.parametrize("engine", ["ZeRO-1", "ZeRO-2", "ZeRO-3", "FSDP2"])
def test_credit_from_attention_is_refused_where_weights_are_shared_out(tmp_path, engine):
    found = refusal(tmp_path, "credit: preplan_anchor", engine)
    if engine in ("ZeRO-3", "FSDP2"):
        assert "reads attention in passes whose number differs" in found
    else:
        assert found is None
    assert refusal(tmp_path, "credit: entropy_shaping", engine) is None


def test_the_engine_fast_is_refused_by_fsdp_and_by_zero3_without_gathering(tmp_path):
    assert "rollout.engine=transformers" in refusal(tmp_path, GROUP, "FSDP2", {"engine": "fast"})
    assert "ds3_gather_for_generation" in refusal(tmp_path, GROUP, "ZeRO-3", ds3_gather_for_generation=False)


def test_continuous_batching_is_refused_where_every_pass_gathers(tmp_path):
    assert "another number of forward passes" in refusal(tmp_path, GROUP, "FSDP2", **CONTINUOUS)
    found = refusal(tmp_path, GROUP, "ZeRO-3", **CONTINUOUS, ds3_gather_for_generation=False)
    assert "use_transformers_continuous_batching=false" in found
    assert refusal(tmp_path, GROUP, "ZeRO-2", **CONTINUOUS) is None


def test_the_first_version_of_fsdp_is_refused(tmp_path):
    assert "fsdp_version: 2" in refusal(tmp_path, GROUP, "FSDP1")


@pytest.mark.parametrize("name", ["tp_size", "cp_size", "sp_size"])
def test_processes_that_share_rows_are_refused(trainer, monkeypatch, name):
    sizes = SimpleNamespace(tp_size=1, cp_size=None, sp_size=1)
    monkeypatch.setattr(type(trainer.accelerator), "parallelism_config", sizes, raising=False)
    check_engine_support(trainer)
    setattr(sizes, name, 2)
    with pytest.raises(ConfigError, match=rf"{name}=2"):
        check_engine_support(trainer)


def test_a_model_that_came_sharded_is_refused(trainer):
    trainer.is_distributed_loading_by_transformers = True
    with pytest.raises(ConfigError, match="Load it whole"):
        check_engine_support(trainer)


def test_under_fsdp2_processes_are_told_to_generate_in_step(tmp_path, monkeypatch):
    args = settings(tmp_path, GROUP, 1, rollout={"engine": "transformers"})
    trainer = build(tmp_path, GROUP, args)
    called = []
    monkeypatch.setattr(type(trainer.model), "generate", lambda *_, **kwargs: called.append(kwargs))
    trainer.model.generate()
    trainer._dist = backend(fsdp=2)
    monkeypatch.setattr(type(trainer.accelerator), "num_processes", 2)
    check_engine_support(trainer)
    trainer.model.generate()
    assert called == [{}, {"synced_gpus": True}]


def test_steering_is_built_on_every_engine(tmp_path):
    write_vectors(tmp_path)
    for engine in ("ZeRO-2", "ZeRO-3", "FSDP2"):
        assert refusal(tmp_path, "rollout: steering", engine) is None
    assert torch.is_grad_enabled()
