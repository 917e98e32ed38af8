"""Every method on every engine: what it trains is what one process trains, or it is refused when the trainer is built.

By default the methods of `cells.SHORT` run on every engine, and all methods on two processes; the whole matrix runs
with `-m slow`, or by scripts/engine_matrix.py, which also writes the tables of the documentation.
"""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import pytest
import torch
from cells import DEEPSPEED, ENGINES, METHODS, SHORT, TOLERANCE, expected
from groups import GROUPS, run_group
from judge import judged

from rltok.credit import CREDIT
from rltok.objective import OBJECTIVE
from rltok.sampling import DECODING
from rltok.selection import SELECTION

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
NO_DEEPSPEED = "DeepSpeed is not installed (pip install rltok[deepspeed])"
IN_FULL = ("one process", "two processes")
has_deepspeed = importlib.util.find_spec("deepspeed") is not None


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("matrix")


@pytest.fixture(scope="module")
def results(folder):
    """engine -> method -> what was trained, of the default cells."""
    found = {}
    for ranks, engines in GROUPS.items():
        known = [engine for engine in engines if has_deepspeed or engine not in DEEPSPEED]
        plan = {engine: list(METHODS if engine in IN_FULL else SHORT) for engine in known}
        found |= run_group(folder, ranks, plan)
    return found


CELLS = [
    (engine, method) for engine in ENGINES if engine != "QLoRA" for method in (METHODS if engine in IN_FULL else SHORT)
]


@pytest.mark.parametrize(("engine", "method"), CELLS, ids=lambda value: value.replace(": ", "-"))
def test_a_cell_is_what_the_table_says(results, engine, method):
    if engine in DEEPSPEED and not has_deepspeed:
        pytest.skip(NO_DEEPSPEED)
    found, why = judged(results[engine][method], results["one process"][method], engine, method)
    assert found == expected(method, engine), why


def test_the_methods_act(results):
    """A cell where the method does nothing would prove nothing."""
    base = results["one process"]["credit: group"]
    for method, result in results["one process"].items():
        assert len(result["losses"]) == 5 and result["moved"] > 0.01, method
        apart = max((result["parameters"][k] - v).abs().max().item() for k, v in base["parameters"].items())
        if method.startswith("batching"):  # other passes, the same gradient
            assert 0 < apart < 1e-5, (method, apart)
        else:
            assert (apart > 1e-3) == (method != "credit: group"), (method, apart)


@pytest.mark.slow
@pytest.mark.parametrize("engine", [engine for engine in ENGINES if engine != "QLoRA"])
def test_the_whole_matrix(folder, results, engine):
    if engine in DEEPSPEED and not has_deepspeed:
        pytest.skip(NO_DEEPSPEED)
    if engine in IN_FULL:
        pytest.skip(f"{engine}: every method runs by default")
    ranks = next(ranks for ranks, engines in GROUPS.items() if engine in engines)
    rows = run_group(folder, ranks, {engine: list(METHODS)})[engine]
    for method, result in rows.items():
        found, why = judged(result, results["one process"][method], engine, method)
        assert found == expected(method, engine), (method, why)


def test_every_registered_method_is_in_the_matrix():
    named = {name.split(": ")[1] for name in METHODS}
    for registry in (CREDIT, OBJECTIVE, SELECTION, DECODING):
        assert set(registry) <= named
    assert (
        set(ENGINES) - {"QLoRA"}
        == set(TOLERANCE)
        == {e for engines in GROUPS.values() for e in engines} - {"one process"}
    )


def test_a_difference_is_seen():
    """The judge itself: a parameter that is off by ten tolerances, and a lost refusal."""
    one = {"losses": [0.1] * 5, "parameters": {"w": torch.zeros(3)}, "moved": 0.1}
    other = {"losses": [0.1] * 5, "parameters": {"w": torch.full((3,), 1e-4)}, "moved": 0.1}
    assert judged(one, one, "ZeRO-2", "credit: group")[0] == "same"
    assert judged(other, one, "ZeRO-2", "credit: group")[0] == "different"
    assert judged(one | {"losses": [0.2] * 5}, one, "ZeRO-2", "credit: group")[0] == "different"
    assert judged({"refused": "why"}, one, "ZeRO-2", "credit: group") == ("refused", "why")
    assert judged({"refused": None}, one, "ZeRO-2", "credit: preplan_anchor")[0] == "different"


@pytest.mark.parametrize(("file", "heading"), [("docs/engines.md", "table"), ("README.md", "engines")])
def test_the_committed_tables_are_those_of_the_matrix(file, heading):
    from matrix_tables import full_table, short_table

    text = (ROOT / file).read_text(encoding="utf-8")
    found = re.search(rf"<!-- {heading} -->\n(.*?)<!-- /{heading} -->", text, re.DOTALL)
    if found is None and file == "README.md":
        pytest.skip("README.md has no markers <!-- engines --> and <!-- /engines --> yet")
    assert found is not None, f"{file} has no markers <!-- {heading} -->"
    assert found[1] == (full_table() if file != "README.md" else short_table()), "run scripts/engine_matrix.py --tables"


def test_a_gpu_test_stands_behind_every_gpu_cell():
    source = (HERE / "test_engines_gpu.py").read_text(encoding="utf-8")
    engines = {engine for engine in ENGINES for method in METHODS if expected(method, engine) == "gpu"}
    assert engines == {"QLoRA"}
    for engine in (*engines, "ZeRO-2", "ZeRO-3", "FSDP2"):
        assert f'"{engine}"' in source and "pytest.mark.gpu" in source


def test_the_script_writes_between_markers_and_says_where_they_are_missing(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    import engine_matrix

    good, bad = tmp_path / "good.md", tmp_path / "bad.md"
    good.write_text("before\n<!-- engines -->\nold\n<!-- /engines -->\nafter\n")
    bad.write_text("no markers\n")
    monkeypatch.setattr(engine_matrix, "ROOT", tmp_path)
    table = ("engines", engine_matrix.short_table)
    monkeypatch.setattr(engine_matrix, "PLACES", {good: table, bad: table})
    with pytest.raises(SystemExit, match=r"bad\.md needs the line <!-- engines -->"):
        engine_matrix.main(["--tables"])
    assert "old" in good.read_text(), "nothing is written then"
    monkeypatch.setattr(engine_matrix, "PLACES", {good: table})
    assert engine_matrix.main(["--tables"]) == 0
    assert good.read_text() == f"before\n<!-- engines -->\n{engine_matrix.short_table()}<!-- /engines -->\nafter\n"
