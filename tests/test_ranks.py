"""Two processes over gloo give what one gives: losses, metrics and parameters, on the same completions."""

from pathlib import Path

import pytest
import torch
from ranks_worker import CASES
from tests_support import run_on_ranks


def launch(ranks: int, folder: Path) -> dict:
    run_on_ranks("ranks_worker.py", ranks, folder)
    return torch.load(folder / f"ranks{ranks}.pt", weights_only=True)


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    return launch(1, folder), launch(2, folder)


@pytest.mark.parametrize("case", [case for case in CASES if case != "nothing"])
def test_two_processes_equal_one(results, case):
    one, two = (result[case] for result in results)
    assert len(one["losses"]) == 4 and any(abs(loss) > 1e-4 for loss in one["losses"])
    assert two["losses"] == pytest.approx(one["losses"], abs=1e-5)
    for name, value in one["parameters"].items():
        torch.testing.assert_close(two["parameters"][name], value, atol=1e-5, rtol=0, msg=name)
    for name, value in one["metrics"].items():
        assert two["metrics"][name] == pytest.approx(value, abs=2e-5, rel=1e-4), name


def test_nothing_selected_skips_the_updates_on_every_rank(results):
    for result in (run["nothing"] for run in results):
        assert result["losses"] == [0.0] * 4 and result["metrics"]["selection/samples_trained"] == 0
        assert result["skipped"] == [1, 2, 3, 4]
        for name, value in result["parameters"].items():
            assert torch.equal(value, result["start"][name]), name


def test_one_row_is_trained_by_both_ranks_together(results):
    for result in (run["one_row"] for run in results):
        assert result["metrics"]["selection/samples_trained"] == 1
        assert result["skipped"][-1] == 2, "in each of two rollouts, one of two updates has the row"


def test_our_loss_equals_trls_on_two_processes(results):
    differences = results[1]["parity"]
    assert len(differences) == 8
    assert max(differences.values()) < 1e-6, differences


def test_the_cases_differ_from_the_baseline(results):
    base = results[0]["dapo"]["parameters"]
    for case, result in results[0].items():
        if case == "parity":
            continue
        moved = max((result["parameters"][k] - v).abs().max().item() for k, v in base.items())
        assert (moved == 0) == (case == "dapo"), case
    assert results[0]["skipping"]["prompts_skipped"] > 0
