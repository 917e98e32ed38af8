"""DeepSpeed's engine and torch's `fully_shard` beyond the matrix: AdamW, tied weights, adapters, checkpoints."""

from __future__ import annotations

import importlib.util

import pytest
import torch
from cells import DEEPSPEED
from groups import start

ENGINES = (pytest.param("ZeRO-1", marks=pytest.mark.slow), "ZeRO-2", "ZeRO-3", "FSDP2")


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    folder = tmp_path_factory.mktemp("below")
    start("below_worker.py", 1, str(folder), "one process")
    return folder, torch.load(folder / "below one process.pt", weights_only=True)


@pytest.fixture(scope="module", params=ENGINES)
def sharded(request, one):
    engine = request.param
    if engine in DEEPSPEED and importlib.util.find_spec("deepspeed") is None:
        pytest.skip("DeepSpeed is not installed (pip install rltok[deepspeed])")
    folder, _ = one
    start("below_worker.py", 2, str(folder), engine)
    return torch.load(folder / f"below {engine}.pt", weights_only=True)


def assert_same(result, expected):
    assert result["losses"] == pytest.approx(expected["losses"], abs=1e-5)
    assert result["parameters"].keys() == expected["parameters"].keys()
    for name, value in expected["parameters"].items():
        torch.testing.assert_close(result["parameters"][name], value, atol=1e-5, rtol=0, msg=name)


@pytest.mark.parametrize("case", ["plain", "tied", "adapter"])
def test_five_updates_equal_those_of_one_process(one, sharded, case):
    expected = one[1][case]
    assert len(expected["losses"]) == 5 and expected["moved"] > 1e-3
    assert_same(sharded[case], expected)


def test_a_run_that_stopped_goes_on_from_its_sealed_checkpoint(one, sharded):
    """The engine's own files are in the manifest, and the updates before and after are those of an undisturbed run."""
    assert "error" not in sharded["resumed"], sharded["resumed"]["error"]
    assert_same(sharded["resumed"], one[1]["plain"])
    assert sum("engine" in name for name in sharded["resumed"]["files"]) >= 2, "a file of every rank"


def test_an_update_without_rows_changes_nothing(one, sharded):
    assert one[1]["nothing"]["moved"] == 0
    assert sharded["nothing"]["moved"] == 0 and sharded["nothing"]["losses"] == [0.0] * 5


def test_processes_that_finish_early_wait_while_others_generate(sharded):
    """Under FSDP2 with transformers' generate; the log-probabilities of what was drawn are the policy's."""
    if "generated" not in sharded:
        pytest.skip("of FSDP2 alone; with DeepSpeed the engine fast or gathered weights generate")
    generated = sharded["generated"]
    assert len(set(generated["steps"])) == 2, "the two processes must end after different numbers of tokens"
    assert generated["apart"] < 1e-4
