"""Recorded completions and the reader of a run directory: round trips, the size cap, and damage of every kind.

`python tests/test_report_data.py` prints what recording costs.
"""

from __future__ import annotations

import json
import math
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from rltok.config import ConfigError
from rltok.report import (
    COLUMNS,
    Methods,
    RunData,
    SampleMeta,
    SampleStore,
    chosen_groups,
    describe,
    load,
    quantities,
    resolve_runs,
    reward_names,
    token_lists,
    token_texts,
)
from rltok.report.environment import environment, write_environment
from rltok.report.load import METRICS, RECIPE, SUMMARY
from rltok.report.schema import METADATA_KEY, REWARD_PREFIX, markdown, ordered
from rltok.report.store import densest, sample_table

METHODS = Methods("hapo", ("hapo_clip", "covariance"), ("adaptive_temperature",), "d3s")
META = SampleMeta(2, ("accuracy", "format"), 0.9, METHODS)
PLAIN = SampleMeta(2)
TEXTS = [
    *("plain", " ", "\n", "", "\x00", '"', "<script>alert('x')</script>"),
    *("שלום", "\u202eevil\u202c", "👩🏽\u200d🔬", "e\u0301", "\ufffd"),
]


def batch(lengths=(3, 0, 5, 4), width=6, seed=0) -> dict:
    """Every column of one generation batch, its tensors on the way a trainer holds them."""
    generator = torch.Generator().manual_seed(seed)
    shape = (len(lengths), width)
    counts = torch.tensor(lengths)
    found = {}
    for column in COLUMNS.values():
        if not column.per_token or column.name == "tokens":
            continue
        if column.dtype == "float32":
            values = torch.randn(shape, generator=generator)
        elif column.dtype == "bool":
            values = torch.rand(shape, generator=generator) > 0.5
        else:
            low, high = {"token_ids": (0, len(TEXTS)), "clipped": (-1, 2)}.get(column.name, (0, 4))
            values = torch.randint(low, high, shape, generator=generator)
        found[column.name] = token_lists(values, counts)
    rows = len(lengths)
    found["tokens"] = token_texts(found["token_ids"], TEXTS.__getitem__)
    found |= {"step": 7, "updates": 2, "row": range(rows), "prompt": [f"prompt {i // 2}" for i in range(rows)]}
    found |= {"completion": ["".join(texts) for texts in found["tokens"].to_pylist()]}
    found |= {"ended": torch.arange(rows) % 2 == 0}
    for name in ("reward", "advantage", "reward/accuracy", "reward/format"):
        found[name] = torch.randn(rows, generator=generator, dtype=torch.bfloat16)
    return found


def small(rollout: int, **extra) -> dict:
    """The required columns of two completions, a few of whose values differ between rollouts."""
    return {
        "step": rollout * 2,
        "updates": 1,
        "row": [0, 1],
        "prompt": "p",
        "completion": ["ab", "c"],
        "token_ids": [[rollout, 1], [2]],
        "tokens": [["a", "b"], ["c"]],
    } | extra


def make_run(path: Path, *, rollouts=3, steps=6) -> Path:
    """A complete run directory."""
    path.mkdir(parents=True)
    recipe = {"name": "demo", "training": {"max_steps": steps}, "evaluation": {"before": True, "after": True}}
    (path / "recipe.yaml").write_text(json.dumps(recipe | {"report": {"samples": {"rows": 16}}}))  # JSON is YAML
    lines = [{"step": step, "seconds": 0.5 * step, "reward": 0.1 * step} for step in range(1, steps + 1)]
    (path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    for moment, value in (("before", 0.25), ("after", 0.5)):
        means = {"strict": value, "lenient": value}
        (path / f"evaluation_{moment}.json").write_text(json.dumps({"completions": 4, "means": means}))
        pd.DataFrame({"row": range(4), "strict": [value] * 4}).to_parquet(path / f"evaluation_{moment}.parquet")
    (path / "summary.json").write_text(json.dumps({"steps": steps, "strict_after": 0.5}))
    (path / "environment.json").write_text(json.dumps({"started": "2030-01-01T00:00:00+00:00", "seed": 3}))
    store = SampleStore(path / "samples")
    for rollout in range(rollouts):
        store.write(rollout, small(rollout), PLAIN)
    return path


# Schema


def test_every_column_comes_back_as_written(tmp_path):
    columns = batch()
    SampleStore(tmp_path / "samples").write(12, columns, META)
    frame = load(tmp_path).samples()
    assert list(frame.columns) == [c.name for c in ordered([*COLUMNS, "reward/accuracy", "reward/format"])]
    table = sample_table(12, columns, META)
    for name in table.column_names:
        expected = table[name].to_pylist()
        read = [list(cell) if isinstance(cell, np.ndarray) else cell for cell in frame[name]]
        assert read == expected, name
    assert frame["rollout"].tolist() == [12] * 4
    assert frame["group"].tolist() == [0, 0, 1, 1]
    assert frame["step"].tolist() == [7] * 4
    assert len(frame["token_ids"][1]) == 0 and frame["completion"][1] == ""  # an empty completion is a row
    assert [len(cell) for cell in frame["credit"]] == [3, 0, 5, 4]


def test_values_equal_the_tensors_they_came_from(tmp_path):
    credit = torch.tensor([[1.5, -2.25, 9.0], [0.1, 9.0, 9.0]])
    kept = torch.tensor([[True, False, True], [True, True, True]])
    lengths = torch.tensor([2, 1])
    columns = small(0, credit=token_lists(credit, lengths), kept=token_lists(kept, lengths))
    SampleStore(tmp_path / "samples").write(0, columns, PLAIN)
    frame = load(tmp_path).samples(columns=["kept", "credit"])
    assert list(frame.columns) == ["credit", "kept"]  # the schema's order
    assert [list(cell) for cell in frame["credit"]] == [[1.5, -2.25], [np.float32(0.1)]]
    assert frame["credit"][0].dtype == np.float32
    assert [list(cell) for cell in frame["kept"]] == [[True, False], [True]]


def test_what_the_docs_describe_is_what_is_written(tmp_path):
    path = SampleStore(tmp_path).write(0, batch(), META)
    written = pq.read_schema(path)
    described = {entry["name"]: entry for entry in describe()}
    names = [name for name in written.names if not name.startswith(REWARD_PREFIX)]
    assert names == [name for name in described if name != "reward/<name>"]
    types = {"bool": "bool", "int8": "int8", "int32": "int32", "float": "float32", "string": "string"}
    for field in written:
        entry = described["reward/<name>" if field.name.startswith(REWARD_PREFIX) else field.name]
        inner = str(field.type.value_type if pa.types.is_list(field.type) else field.type)
        expected = f"list<{types[inner]}>" if pa.types.is_list(field.type) else types[inner]
        assert entry["type"] == expected, field.name
        assert field.nullable == (entry["present"] != "always"), field.name
    assert all(entry["meaning"] for entry in describe())
    table = markdown().splitlines()
    assert len(table) == len(describe()) + 2
    assert all(line.count("|") == 6 for line in table)  # a bar in a meaning would break the table


def test_metadata_of_a_file(tmp_path):
    path = SampleStore(tmp_path / "samples").write(0, batch(), META)
    assert json.loads(pq.read_schema(path).metadata[METADATA_KEY]) == {
        "schema": 1,
        "group_size": 2,
        "rewards": ["accuracy", "format"],
        "temperature": 0.9,
        "methods": {
            "credit": "hapo",
            "objective": ["hapo_clip", "covariance"],
            "decoding": ["adaptive_temperature"],
            "selection": "d3s",
        },
    }
    run = load(tmp_path)
    assert run.sample_files[0].meta == META
    assert reward_names(run) == ["accuracy", "format"]


def test_quantities_have_what_a_page_needs():
    assert {"credit", "credit_used", "entropy", "ratio", "fai", "clipped", "mark"} <= {c.name for c in quantities()}
    for column in quantities():
        assert column.per_token and column.label, column.name
        assert column.dtype != "string"
        assert (column.scale.kind == "diverging") == (column.scale.centre is not None), column.name
        assert (column.scale.kind == "discrete") == bool(column.scale.values), column.name
        assert column.scale.kind != "discrete" or column.dtype in ("bool", "int8")
    labels = [c.label for c in quantities()]
    assert len(set(labels)) == len(labels)


# Writing


def test_nulls_and_absent_columns(tmp_path):
    store = SampleStore(tmp_path / "samples")
    store.write(0, small(0, entropy=[[0.5, 0.25], None], ended=[True, None], reward=[None, 1.0]), PLAIN)
    store.write(1, small(1), PLAIN)
    frame = load(tmp_path).samples(columns=["entropy", "ended", "reward", "wave"])
    assert list(frame["entropy"][0]) == [0.5, 0.25]
    assert [frame["entropy"][i] is None for i in range(4)] == [False, True, True, True]
    assert frame["ended"][0] and pd.isna(frame["ended"][1]) and pd.isna(frame["ended"][2])
    assert pd.isna(frame["reward"][0]) and frame["reward"][1] == 1.0
    assert frame["wave"].isna().all()  # no file has it


def test_not_a_number_and_infinity_survive(tmp_path):
    values = [[math.nan, math.inf], [-math.inf]]
    SampleStore(tmp_path / "samples").write(0, small(0, ratio=values, reward=[math.nan, -math.inf]), PLAIN)
    frame = load(tmp_path).samples(columns=["ratio", "reward"])
    assert np.isnan(frame["ratio"][0][0]) and frame["ratio"][0][1] == math.inf and frame["ratio"][1][0] == -math.inf
    assert np.isnan(frame["reward"][0]) and frame["reward"][1] == -math.inf


def test_texts_survive_byte_for_byte(tmp_path):
    ids = [list(range(len(TEXTS)))]
    rows = small(0, token_ids=ids, tokens=[TEXTS], completion=["".join(TEXTS)], row=[0])
    SampleStore(tmp_path / "samples").write(0, rows, PLAIN)
    frame = load(tmp_path).samples()
    assert list(frame["tokens"][0]) == TEXTS
    assert frame["completion"][0] == "".join(TEXTS)


def test_a_lone_surrogate_is_written_as_its_escape(tmp_path):
    rows = small(0, tokens=[["a", "\ud83d"], ["c"]], completion=["a\ud83d", "c"])
    SampleStore(tmp_path / "samples").write(0, rows, PLAIN)
    frame = load(tmp_path).samples(columns=["tokens", "completion"])
    assert list(frame["tokens"][0]) == ["a", "\\ud83d"]
    assert frame["completion"][0] == "a\\ud83d"


def test_rows_of_other_ranks_arrive_in_any_order(tmp_path):
    rows = [
        {
            "step": 0,
            "updates": 1,
            "row": row,
            "prompt": f"p{row}",
            "completion": "x",
            "token_ids": [row],
            "tokens": ["x"],
        }
        for row in (2, 3, 0, 1)  # rank 1 before rank 0
    ]
    SampleStore(tmp_path / "samples").write(5, rows, PLAIN)
    frame = load(tmp_path).samples()
    assert frame["row"].tolist() == [0, 1, 2, 3]
    assert frame["prompt"].tolist() == ["p0", "p1", "p2", "p3"]
    assert [cell.tolist() for cell in frame["token_ids"]] == [[0], [1], [2], [3]]
    assert frame["group"].tolist() == [0, 0, 1, 1]


def test_files_written_in_any_order_are_read_in_order(tmp_path):
    first, second = SampleStore(tmp_path / "samples"), SampleStore(tmp_path / "samples")
    for rollout in (9, 2, 1_000_000):
        (first if rollout % 2 else second).write(rollout, small(rollout), PLAIN)
    run = load(tmp_path)
    assert [file.rollout for file in run.sample_files] == [2, 9, 1_000_000]
    assert run.samples(columns=["rollout"])["rollout"].tolist() == [2, 2, 9, 9, 1_000_000, 1_000_000]


def test_the_same_rows_give_the_same_file(tmp_path):
    paths = [SampleStore(tmp_path / name).write(3, batch(), META) for name in ("a", "b")]
    assert paths[0].read_bytes() == paths[1].read_bytes()
    assert not list(tmp_path.rglob("*.part"))


def test_no_rows_write_no_file(tmp_path):
    store = SampleStore(tmp_path / "samples")
    assert store.write(0, [], META) is None
    assert store.write(0, small(0) | {"token_ids": [], "row": []}, PLAIN) is None
    assert not (tmp_path / "samples").exists()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"credits": [[1.0, 2.0], [3.0]]}, "'credits' is no column"),
        ({"reward/accuracy": [1.0, 0.0]}, "meta.rewards names \\[\\]"),
        ({"credit": [[1.0], [2.0]]}, "column credit has lists of \\[1, 1\\] entries, token_ids of \\[2, 1\\]"),
        ({"reward": [1.0]}, "column reward has 1 values but token_ids 2"),
        ({"credit": torch.zeros(2, 2)}, "token_lists"),
        ({"row": [1, 1]}, "column row holds \\[1, 1\\]"),
        ({"row": [0, None]}, "column row holds 1 nulls"),
        ({"rollout": [1, 2]}, "in the file of 0"),
        ({"reward": ["good", "bad"]}, "column reward: values are no float32"),
        ({"token_ids": [[2**40, 1], [2]]}, "column token_ids: values are no list<int32>"),
    ],
)
def test_rows_that_do_not_fit_are_refused(tmp_path, change, words):
    with pytest.raises(ValueError, match=words):
        SampleStore(tmp_path / "samples").write(0, small(0) | change, PLAIN)
    assert not list(tmp_path.rglob("*.parquet*"))


def test_a_required_column_may_not_be_left_out(tmp_path):
    rows = small(0)
    del rows["tokens"]
    with pytest.raises(ValueError, match="columns tokens are missing"):
        SampleStore(tmp_path).write(0, rows, PLAIN)
    with pytest.raises(ValueError, match="rollout=-1"):
        SampleStore(tmp_path).write(-1, small(0), PLAIN)
    with pytest.raises(ValueError, match="max_bytes=0"):
        SampleStore(tmp_path, 0)


def test_packing_equals_a_loop_over_tokens():
    values = torch.arange(12.0).reshape(3, 4).bfloat16()
    packed = token_lists(values, torch.tensor([4, 0, 2]))
    assert packed.to_pylist() == [[0.0, 1.0, 2.0, 3.0], [], [8.0, 9.0]]
    assert packed.type == pa.list_(pa.float32())
    assert token_lists(values[:0], []).to_pylist() == []
    assert token_lists(np.zeros((2, 0)), [0, 0]).to_pylist() == [[], []]
    asked = []
    texts = token_texts(
        token_lists(torch.tensor([[5, 5, 7], [7, 1, 5]]), [3, 2]), lambda i: asked.append(i) or f"<{i}>"
    )
    assert texts.to_pylist() == [["<5>", "<5>", "<7>"], ["<7>", "<1>"]]
    assert asked == [1, 5, 7]  # once per distinct token
    with pytest.raises(ValueError, match="from 1 to 5; allowed: 0 to T=4"):
        token_lists(values, [1, 5, 2])
    with pytest.raises(ValueError, match=r"\(3, 4\) and lengths \(2,\)"):
        token_lists(values, [1, 2])


# The ring


def ring(folder: Path, count: int, files: int) -> tuple[SampleStore, int]:
    """A store that has room for so many files, after `count` rollouts."""
    one = SampleStore(folder / "one").write(0, small(0), PLAIN).stat().st_size
    store = SampleStore(folder / "samples", max_bytes=files * (one + 2))
    for rollout in range(count):
        store.write(rollout, small(rollout), PLAIN)
        assert sum(path.stat().st_size for path in store.folder.iterdir()) <= store.max_bytes
        assert store.path(rollout).is_file()
    return store, one


def test_the_ring_keeps_first_newest_and_an_even_spread(tmp_path):
    store, _ = ring(tmp_path, 61, files=8)
    kept = [file.rollout for file in load(tmp_path).sample_files]
    assert kept == sorted(store.sizes)
    assert len(kept) >= 7
    assert kept[0] == 0 and kept[-1] == 60
    gaps = np.diff(kept)
    assert gaps.max() <= 2 * 60 / (len(kept) - 1)


def test_the_spread_holds_over_a_long_run():
    kept: list[int] = []
    for rollout in range(0, 6000, 3):  # every third rollout is recorded
        kept.append(rollout)
        while len(kept) > 50:
            kept.remove(densest(kept, rollout))
        if len(kept) == 50:
            assert kept[0] == 0 and kept[-1] == rollout
            assert max(np.diff(kept)) <= 2 * rollout / 49 + 3


def test_the_newest_stays_even_above_the_cap(tmp_path):
    store = SampleStore(tmp_path / "samples", max_bytes=10)
    for rollout in range(3):
        store.write(rollout, small(rollout), PLAIN)
    assert [file.rollout for file in load(tmp_path).sample_files] == [2]


def test_a_continued_run_ends_as_one_that_was_never_stopped(tmp_path):
    for name in ("whole", "stopped"):
        (tmp_path / name).mkdir()
    whole, _ = ring(tmp_path / "whole", 12, files=20)
    stopped, _ = ring(tmp_path / "stopped", 9, files=20)
    (stopped.folder / "rollout_000009.parquet.part").write_bytes(b"half")
    again = SampleStore(stopped.folder, stopped.max_bytes)
    assert again.drop_from(5) == [5, 6, 7, 8]
    assert sorted(path.name for path in again.folder.iterdir()) == [f"rollout_{i:06d}.parquet" for i in range(5)]
    for rollout in range(5, 12):
        again.write(rollout, small(rollout), PLAIN)
    assert {p.name: p.read_bytes() for p in whole.folder.iterdir()} == {
        p.name: p.read_bytes() for p in again.folder.iterdir()
    }
    assert SampleStore(tmp_path / "nowhere").drop_from(0) == []


def test_chosen_groups_are_whole_spread_and_repeatable():
    assert chosen_groups(0, 3, 8, 8, 4) == chosen_groups(0, 3, 8, 8, 4)
    for rollout in range(50):
        low, high = chosen_groups(1, rollout, 8, 8, 4)
        assert 0 <= low < 4 <= high < 8  # one from each half
    assert len({tuple(chosen_groups(1, rollout, 8, 8, 4)) for rollout in range(50)}) > 8
    by_seed = [[chosen_groups(seed, rollout, 8, 8, 4) for rollout in range(9)] for seed in (1, 2)]
    assert by_seed[0] != by_seed[1]
    assert chosen_groups(0, 0, 4, 100, 4) == [0, 1, 2, 3]
    assert len(chosen_groups(0, 0, 4, 3, 8)) == 1  # a whole group, though it has more rows
    assert chosen_groups(0, 0, 4, 0, 8) == []
    assert chosen_groups(0, 0, 0, 4, 2) == []
    with pytest.raises(ValueError, match="group_size=0"):
        chosen_groups(0, 0, 4, 4, 0)


def test_chosen_groups_do_not_hang_on_the_process():
    code = "from rltok.report import chosen_groups; print([chosen_groups(5, r, 16, 12, 4) for r in range(4)])"
    root = Path(__file__).resolve().parent.parent
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=root, check=True)
    assert json.loads(done.stdout) == [chosen_groups(5, rollout, 16, 12, 4) for rollout in range(4)]


# Reading


def test_a_complete_run(tmp_path):
    run = load(make_run(tmp_path / "demo-seed0"))
    assert run.problems == []
    assert run.name == "demo-seed0"
    assert run.recipe["name"] == "demo"
    assert run.environment["seed"] == 3
    assert run.summary["strict_after"] == 0.5
    assert run.metrics["step"].tolist() == [1, 2, 3, 4, 5, 6]
    assert run.metrics["reward"].tolist() == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.5, 0.6])
    assert run.evaluations["after"]["means"]["strict"] == 0.5
    assert run.evaluation_rows("before")["strict"].tolist() == [0.25] * 4
    assert [(file.rollout, file.step, file.rows) for file in run.sample_files] == [(0, 0, 2), (1, 2, 2), (2, 4, 2)]


def test_samples_of_chosen_steps_open_no_other_file(tmp_path):
    run = load(make_run(tmp_path / "run"))
    run.sample_files[0].path.write_bytes(b"damaged after the footers were read")
    frame = run.samples(steps={2, 4}, columns=["rollout", "token_ids"])
    assert frame["rollout"].tolist() == [1, 1, 2, 2]
    assert run.samples(steps=range(3, 5))["step"].tolist() == [4, 4]
    assert run.problems == []
    with pytest.raises(KeyError, match="'credits' is no column"):
        run.samples(columns=["credits"])


def test_names_of_files_are_those_of_a_run_directory(tmp_path):
    from rltok.run import RunDirectory

    run = RunDirectory(tmp_path)
    assert (run.recipe.name, run.metrics.name, run.summary.name) == (RECIPE, METRICS, SUMMARY)


def test_a_killed_run(tmp_path):
    path = make_run(tmp_path / "run")
    for name in ("summary.json", "evaluation_after.json", "evaluation_after.parquet"):
        (path / name).unlink()
    with (path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 7, "seconds": 3.')
    (path / "samples" / "rollout_000003.parquet.part").write_bytes(b"PAR1")
    run = load(path)
    assert run.summary is None
    assert run.metrics["step"].tolist() == [1, 2, 3, 4, 5, 6]
    assert sorted(run.evaluations) == ["before"]
    assert len(run.samples()) == 6
    assert run.problems == [
        "the last line of metrics.jsonl is cut off and left out: the run was killed while it wrote it",
        "summary.json is missing: the run is going on or was killed; the last logged step is 6 of 6",
        "samples holds 1 unfinished file(s), left out: the run was killed while it wrote",
    ]


def test_damaged_lines_of_metrics(tmp_path):
    path = make_run(tmp_path / "run")
    lines = (path / "metrics.jsonl").read_text().splitlines()
    lines[1] = lines[1][:10]
    lines[3] = '"no mapping"'
    lines.insert(2, '{"step": 3, "eval_reward": 0.75, "reward": null}')  # the same step in two lines
    (path / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    run = load(path)
    assert run.metrics["step"].tolist() == [1, 3, 5, 6]
    assert run.metrics.set_index("step").loc[3, "reward"] == pytest.approx(0.3)  # a later null takes nothing away
    row = run.metrics.set_index("step").loc[3]
    assert row["eval_reward"] == 0.75
    assert any("metrics.jsonl has 2 damaged line(s), left out: line 2, 5" in problem for problem in run.problems)


@pytest.mark.parametrize("damage", ["cut", "empty", "text", "foreign", "footer"])
def test_a_damaged_sample_file_is_named_and_left_out(tmp_path, damage):
    path = make_run(tmp_path / "run")
    victim = path / "samples" / "rollout_000001.parquet"
    whole = victim.read_bytes()
    if damage == "foreign":
        pd.DataFrame({"token_ids": [[1]]}).to_parquet(victim)
    else:
        half, footless = whole[: len(whole) // 2], whole[:-8] + bytes(8)
        victim.write_bytes({"cut": half, "empty": b"", "text": b"not parquet", "footer": footless}[damage])
    run = load(path)
    assert [file.rollout for file in run.sample_files] == [0, 2]
    assert len(run.problems) == 1 and "samples/rollout_000001.parquet is damaged and left out" in run.problems[0]
    assert run.samples(columns=["rollout"])["rollout"].tolist() == [0, 0, 2, 2]


def test_damage_inside_a_sample_file_is_found_when_it_is_read(tmp_path):
    path = make_run(tmp_path / "run")
    victim = path / "samples" / "rollout_000001.parquet"
    content = bytearray(victim.read_bytes())
    chunks = pq.read_metadata(victim).row_group(0)
    chunk = next(chunks.column(i) for i in range(chunks.num_columns) if chunks.column(i).path_in_schema == "completion")
    content[chunk.data_page_offset + chunk.total_compressed_size - 2] ^= 0xFF
    victim.write_bytes(bytes(content))
    run = load(path)
    assert run.problems == []
    assert run.samples()["rollout"].tolist() == [0, 0, 2, 2]
    assert len(run.problems) == 1 and "samples/rollout_000001.parquet is damaged" in run.problems[0]
    run.samples()
    assert len(run.problems) == 1  # said once


def test_a_damaged_column_name_is_found(tmp_path):
    path = make_run(tmp_path / "run")
    victim = path / "samples" / "rollout_000001.parquet"
    table = pq.read_table(victim)
    for old, new in (("updates", "updat\x01s"), ("prompt", "pro\x02pt")):
        renamed = table.rename_columns([new if name == old else name for name in table.column_names])
        pq.write_table(renamed.replace_schema_metadata(table.schema.metadata), victim)
        run = load(path)
        assert [file.rollout for file in run.sample_files] == [0, 2]
        assert f"missing columns ['{old}']" in run.problems[0]


def test_lists_of_another_length_are_damage(tmp_path):
    path = make_run(tmp_path / "run")
    victim = path / "samples" / "rollout_000001.parquet"
    table = pq.read_table(victim)
    table = table.append_column("credit", pa.array([[1.0], [2.0]], pa.list_(pa.float32())))
    pq.write_table(table, victim)
    run = load(path)
    assert run.samples()["rollout"].tolist() == [0, 0, 2, 2]
    assert "column credit has another number of entries than token_ids" in run.problems[0]


def test_a_newer_schema_is_refused_by_name(tmp_path):
    path = make_run(tmp_path / "run")
    victim = path / "samples" / "rollout_000001.parquet"
    table = pq.read_table(victim)
    facts = json.loads(table.schema.metadata[METADATA_KEY]) | {"schema": 2}
    pq.write_table(table.replace_schema_metadata({METADATA_KEY: json.dumps(facts)}), victim)
    assert "schema 2 is newer than 1" in load(path).problems[0]


def test_everything_else_missing_or_damaged(tmp_path):
    path = make_run(tmp_path / "run")
    (path / "recipe.yaml").write_text("a: [1, 2")
    (path / "environment.json").unlink()
    (path / "evaluation_after.json").write_text('{"means": ')
    (path / "evaluation_before.parquet").write_bytes(b"x")
    (path / "summary.json").write_text("[1]")
    run = load(path)
    assert run.recipe == {} and run.environment == {} and run.summary is None
    assert sorted(run.evaluations) == ["before"]
    assert run.evaluation_rows("before") is None
    said = " / ".join(run.problems)
    for words in (
        "recipe.yaml is damaged",
        "environment.json is missing: versions, commit and command line of this run are not known",
        "evaluation_after.json is damaged",
        "evaluation_before.parquet is damaged",
        "summary.json holds no mapping",
    ):
        assert words in said, words
    assert len(run.problems) == 5


@pytest.mark.parametrize("text", ["evaluation", "evaluation: bef", "training: 3\nreport: x", ""])
def test_a_recipe_that_was_cut_off_does_not_stop_the_reader(tmp_path, text):
    path = make_run(tmp_path / "run")
    (path / "recipe.yaml").write_text(text)
    (path / "summary.json").unlink()
    run = load(path)
    assert isinstance(run, RunData) and len(run.metrics) == 6


def test_a_run_without_samples_says_which_setting_records_them(tmp_path):
    path = make_run(tmp_path / "run", rollouts=0)
    assert load(path).problems == [
        "no completions were recorded token by token: samples is empty; "
        "report.samples.rows of the recipe turns recording on"
    ]
    (path / "recipe.yaml").write_text("name: demo\nreport: {samples: {rows: 0}}\n")
    run = load(path)
    assert run.problems == [
        "no completions were recorded token by token: report.samples.rows of the recipe is off or not there; "
        "set it to the number of completions to record"
    ]
    frame = run.samples(columns=["step", "credit"])
    assert len(frame) == 0 and list(frame.columns) == ["step", "credit"]
    assert len(run.samples()) == 0
    assert len(run.samples(steps=[1])) == 0


def test_a_run_that_logged_nothing(tmp_path):
    path = make_run(tmp_path / "run", rollouts=0, steps=0)
    (path / "summary.json").unlink()
    run = load(path)
    assert list(run.metrics.columns) == ["step", "seconds"] and len(run.metrics) == 0
    assert "metrics.jsonl holds no logged step: there are no curves" in run.problems
    assert "summary.json is missing: the run is going on or was killed; no step was logged" in run.problems
    (path / "metrics.jsonl").unlink()
    assert "metrics.jsonl is missing: there are no curves" in load(path).problems


def test_what_is_no_run_is_refused_with_its_path(tmp_path):
    with pytest.raises(ConfigError, match="nowhere is no directory"):
        load(tmp_path / "nowhere")
    (tmp_path / "other.txt").write_text("x")
    with pytest.raises(ConfigError, match=f"{tmp_path.name} holds no run"):
        load(tmp_path)
    make_run(tmp_path / "inner", rollouts=0)
    with pytest.raises(ConfigError, match="runs in it: .*inner"):
        load(tmp_path)


def test_names_of_several_runs(tmp_path):
    paths = [make_run(tmp_path / name, rollouts=0) for name in ("a/demo", "b/demo", "b/hapo")]
    assert resolve_runs(paths) == {"a/demo": paths[0], "b/demo": paths[1], "hapo": paths[2]}
    assert resolve_runs([paths[0], tmp_path / "b" / ".." / "a" / "demo"]) == {"demo": paths[0]}
    name, path = next(iter(resolve_runs(paths[:1]).items()))
    assert load(path, name).name == "demo"
    with pytest.raises(ConfigError, match="no directory of a run was given"):
        resolve_runs([])
    with pytest.raises(ConfigError, match="no directory"):
        resolve_runs([paths[0], tmp_path / "c"])


# Environment


def test_environment_of_a_run(tmp_path):
    facts = environment(["rltok", "train", "my recipe"], seed=4, processes=2, folder=tmp_path)
    assert facts["command"] == "rltok train 'my recipe'"
    assert (facts["seed"], facts["processes"]) == (4, 2)
    assert facts["versions"]["torch"] == torch.__version__
    assert facts["devices"][0]["type"] == "cpu" and facts["devices"][0]["cores"] >= 1
    assert facts["started"].endswith("+00:00")
    assert facts["git"] is None  # no repository
    make_run(tmp_path / "run", rollouts=1)
    write_environment(tmp_path / "run", facts)
    run = load(tmp_path / "run")
    assert run.environment == json.loads(json.dumps(facts)) and run.problems == []


def test_commit_and_changes(tmp_path, monkeypatch):
    def git(*arguments):
        settings = ["-c", "user.name=n", "-c", "user.email=e@example.com", "-c", "commit.gpgsign=false"]
        subprocess.run(["git", *settings, *arguments], cwd=tmp_path, check=True, capture_output=True)

    git("init", "-b", "main")
    (tmp_path / "file").write_text("one")
    git("add", "file")
    git("commit", "-m", "first")
    state = environment([], 0, 1, tmp_path)["git"]
    assert len(state["commit"]) == 40 and state["branch"] == "main" and state["dirty"] is False
    (tmp_path / "file").write_text("two")
    assert environment([], 0, 1, tmp_path)["git"] == state | {"dirty": True}
    monkeypatch.setenv("PATH", "")
    assert environment([], 0, 1, tmp_path)["git"] is None  # no git


def test_a_continued_run_keeps_the_facts_of_its_start(tmp_path):
    path = make_run(tmp_path / "run", rollouts=1)
    write_environment(path, {"started": "2030-01-01", "seed": 0})
    write_environment(path, {"started": "2030-01-02", "seed": 0}, continued=True)
    write_environment(path, {"started": "2030-01-03", "seed": 0}, continued=True)
    run = load(path)
    assert run.environment["started"] == "2030-01-01"
    assert [start["started"] for start in run.environment["continued"]] == ["2030-01-02", "2030-01-03"]
    assert run.problems == ["the run was interrupted and continued 2 times (at 2030-01-02, 2030-01-03)"]
    write_environment(path, {"started": "2030-01-04"})
    assert load(path).problems == []


def bench(rows: int = 16, tokens: int = 1000, repeats: int = 30) -> None:
    """Print what it costs to record completions with every column, from (B, T) tensors to the file."""
    torch.set_num_threads(1)
    texts = [f" tok{i}" for i in range(150_000)]
    ids = torch.from_numpy(np.minimum(np.random.default_rng(0).zipf(1.3, (rows, tokens)), len(texts) - 1))
    lengths = torch.full((rows,), tokens)
    tensors = {"token_ids": ids}
    for column in quantities():
        floating = column.dtype == "float32"
        tensors[column.name] = torch.randn(rows, tokens) if floating else torch.randint(0, 2, (rows, tokens))
    fixed = {"step": 0, "updates": 1, "row": range(rows), "prompt": "What is 3 + 4? " * 20, "ended": True}
    fixed |= {"completion": "x " * tokens, "reward": 1.0, "advantage": 0.5, "reward/accuracy": 1.0}
    with tempfile.TemporaryDirectory() as folder:
        store = SampleStore(folder, max_bytes=8 * 2**20)
        times = []
        for rollout in range(repeats):
            started = time.perf_counter()
            columns = {name: token_lists(values, lengths) for name, values in tensors.items()}
            columns["tokens"] = token_texts(columns["token_ids"], texts.__getitem__)
            path = store.write(rollout, columns | fixed, SampleMeta(8, ("accuracy",)))
            times.append(1000 * (time.perf_counter() - started))
        print(
            f"{rows} completions x {tokens} tokens, {len(columns | fixed)} columns: median {np.median(times):.1f} ms, "
            f"slowest {max(times[1:]):.1f} ms, {path.stat().st_size / 1000:.0f} kB"
        )


def test_the_documentation_has_the_table_of_the_schema():
    assert markdown().strip() in (Path(__file__).parent.parent / "docs" / "report.md").read_text(encoding="utf-8")


if __name__ == "__main__":
    bench()
    bench(tokens=80)
    bench(rows=64, tokens=80)
