"""What is recorded of a run is what its trainer held, from the loss to the file, on any number of ranks."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import torch
from recording_worker import CASES, DOORS, train
from test_report_page import unpacked_floats
from tests_support import even_reward, run_on_ranks

from rltok.config import ConfigError
from rltok.report import load
from rltok.report.page.samples import pack_samples

TOKENS = ["in_loss", "credit", "credit_used", "entropy", "sampler_logp", "old_logp", "learner_logp", "ratio", "clipped"]


def samples(folder):
    data = load(folder)
    return data.samples(), data


@pytest.fixture(scope="module")
def full(tmp_path_factory):
    """Everything that can be recorded, and what the trainer held."""
    folder = tmp_path_factory.mktemp("full")
    trainer = train(folder, "everything", watch=True)
    table, data = samples(folder)
    return trainer, table, data


def test_rows_are_whole_groups_of_every_rollout(full):
    trainer, table, data = full
    assert not [p for p in data.problems if "sample" in p]
    assert sorted(table["rollout"].unique()) == list(range(len(trainer.scored)))
    for _, rows in table.groupby(["rollout", "group"]):
        assert len(rows) == 4 and rows["prompt"].nunique() == 1
    assert (table.groupby("rollout").size() == 8).all()
    assert (table["updates"] == 3).all()


def test_what_was_scored_is_what_is_recorded(full):
    trainer, table, _ = full
    for rollout, held in enumerate(trainer.scored):
        for _, row in table[table["rollout"] == rollout].iterrows():
            i, n = row["row"], len(row["token_ids"])
            assert n == held["completion_mask"][i].sum()
            assert list(row["token_ids"]) == held["completion_ids"][i, :n].tolist()
            np.testing.assert_allclose(row["credit"], held["credit"][i, :n], rtol=1e-6)
            np.testing.assert_allclose(row["sampler_logp"], held["sampling_per_token_logps"][i, :n], rtol=1e-6)
            np.testing.assert_allclose(row["entropy"], held["entropy"][i, :n], rtol=1e-6)
            np.testing.assert_allclose(row["weight"], held["importance_sampling_ratio"][i, :n], rtol=1e-6)
            text = trainer.processing_class.decode(row["token_ids"], skip_special_tokens=True)
            assert row["reward/even_reward"] == pytest.approx(even_reward([text])[0])
            assert row["advantage"] == pytest.approx(float(held["advantage"][i]), abs=1e-6)
            assert list(row["in_loss"]) == held["in_loss"][i, :n].tolist()
            assert row["ended"] == (row["token_ids"][-1] == 1)
            assert [trainer.processing_class.decode([token]) for token in row["token_ids"]] == list(row["tokens"])


def test_what_the_loss_used_last_is_what_is_recorded(full):
    """Of every token: its values in the last micro-batch whose loss it entered."""
    trainer, table, _ = full
    compared = 0
    for rollout in range(len(trainer.scored)):
        for _, row in table[table["rollout"] == rollout].iterrows():
            used = [u for u in trainer.losses if u["rollout"] == rollout and u["row"] == row["row"]]
            (last,) = used[-1:] or [None]
            if last is None:
                assert row["ratio"] is None and row["credit_used"] is None and not np.any(row["kept"])
                continue
            n = min(len(row["token_ids"]), len(last["trained"]))
            there = last["trained"][:n]
            for name in ("credit_used", "learner_logp", "ratio"):
                values = np.asarray(row[name])
                np.testing.assert_allclose(values[:n][there], last[name][:n][there], rtol=1e-5)
                assert np.isnan(values[:n][~there]).all() and np.isnan(values[n:]).all()
            np.testing.assert_array_equal(np.asarray(row["clipped"])[:n][there], last["clipped"][:n][there])
            compared += there.sum()
    assert compared > 50
    assert (np.concatenate(list(table["clipped"].dropna())) != 0).any(), "some ratio was clipped"


def test_the_page_holds_what_the_loss_used(full):
    """With the tests above: from the trainer's tensors to the numbers that the inspector shows, to five digits."""
    _, table, data = full
    chunks = pack_samples(data, 1e7).chunks
    for name in ("credit", "credit_used", "entropy", "ratio", "sampler_logp", "waad", "wave"):
        shown = [value for chunk in chunks for value in unpacked_floats(chunk[name])]
        lists = zip(table[name], table["token_ids"], strict=True)
        held = np.concatenate([np.full(len(ids), np.nan) if values is None else values for values, ids in lists])
        assert len(shown) == len(held) and np.isfinite(held).sum() > 50
        expected = [float(f"{value:.5g}") for value in held.tolist()]
        np.testing.assert_array_equal(np.array(shown), np.array(expected), err_msg=name)


def test_methods_and_columns_of_a_run_that_uses_them(full):
    _, table, data = full
    meta = data.sample_files[0].meta
    assert meta.group_size == 4 and meta.methods.credit == "preplan_anchor" and meta.methods.selection == "d3s"
    assert meta.methods.decoding == ("cyclic_reflex", "budget_forcing") and meta.methods.objective == ("hapo",)
    assert np.concatenate(list(table["wave"])).any() and np.concatenate(list(table["forced"])).any()
    assert set(np.concatenate(list(table["mark"]))) == {0, 1, 2, 3}
    assert np.isfinite(np.concatenate(list(table["waad"]))).all()
    trained = table[table["credit_used"].notna()]
    assert 0 < len(trained) < len(table), "selection left some completions out"
    kept, used = (np.concatenate(list(trained[name])) for name in ("kept", "credit_used"))
    assert 0 < kept.mean() < 1 and (np.isnan(used) == ~kept.astype(bool)).all()


def test_later_passes_over_a_rollout_overwrite_earlier_ones(tmp_path):
    trainer = train(tmp_path, "plain", watch=True, num_iterations=2, max_steps=6)
    table, _ = samples(tmp_path)
    assert table["rollout"].nunique() == 1 and (table["updates"] == 6).all()
    for _, row in table.iterrows():
        first, last = (u for u in trainer.losses if u["row"] == row["row"])
        n = len(row["token_ids"])
        np.testing.assert_allclose(row["learner_logp"], last["learner_logp"][:n], rtol=1e-5)
        np.testing.assert_allclose(row["entropy"], first["entropy"][:n], rtol=1e-5)
        assert not np.allclose(first["learner_logp"][:n], last["learner_logp"][:n])


def test_files_of_an_earlier_run_in_the_folder_do_not_stay(tmp_path):
    train(tmp_path, "plain", max_steps=9)
    train(tmp_path, "plain", max_steps=3)
    assert samples(tmp_path)[0]["rollout"].unique().tolist() == [0]


def test_a_plain_run_records_what_it_has(tmp_path):
    train(tmp_path, "plain")
    table, data = samples(tmp_path)
    for name in ("wave", "weight", "mark", "kept", "sampler_logp", "temperature"):
        assert name not in table or table[name].isna().all(), name
    for name in ("entropy", "old_logp", "credit", "credit_used", "ratio", "learner_logp"):
        assert np.isfinite(np.concatenate(list(table[name]))).all(), name
    first = table[table["rollout"] == 0]
    assert np.allclose(np.concatenate(list(first["credit"])), np.concatenate(list(first["credit_used"])))


def test_recording_changes_no_parameter(tmp_path):
    on, off = train(tmp_path / "on", "everything"), train(tmp_path / "off", "everything", samples=None)
    assert not (tmp_path / "off" / "samples").exists() and off._recorder is None
    for a, b in zip(on.model.parameters(), off.model.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    for ranks in (1, 2):
        run_on_ranks("recording_worker.py", ranks, folder)
    return folder


@pytest.mark.parametrize("case", CASES)
def test_two_processes_record_what_one_records(runs, case):
    """Rows that selection sent to another rank are recorded where their completion was generated."""
    one, two = (samples(runs / f"{case}{ranks}")[0] for ranks in (1, 2))
    same_tables(one, two, tolerance=2e-4)
    assert len(one) == 16 * DOORS[case]["rollouts"]


def same_tables(one: pd.DataFrame, two: pd.DataFrame, tolerance: float) -> None:
    assert list(one.columns) == list(two.columns) and len(one) == len(two) > 0
    for name in one.columns:
        for a, b in zip(one[name], two[name], strict=True):
            if isinstance(a, np.ndarray) and a.dtype.kind == "f":
                np.testing.assert_allclose(a, b, atol=tolerance, rtol=tolerance, err_msg=name)
            elif isinstance(a, float):
                assert a == pytest.approx(b, abs=tolerance, nan_ok=True), name
            else:
                assert np.array_equal(a, b), name


def test_a_resumed_run_records_what_an_undisturbed_one_records(tmp_path):
    train(tmp_path / "whole", "everything", max_steps=9)
    train(tmp_path / "cut", "everything", max_steps=5, save_steps=4)
    # beyond the checkpoint the first part wrote files that the second writes again
    train(tmp_path / "cut", "everything", max_steps=9, resume=str(tmp_path / "cut" / "checkpoint-4"))
    whole, cut = (samples(tmp_path / name)[0] for name in ("whole", "cut"))
    same_tables(whole, cut, tolerance=0.0)


def test_the_folder_stays_within_its_size(tmp_path):
    train(tmp_path, "plain", max_steps=30, samples={"rows": 4, "max_mb": 0.05})
    table, data = samples(tmp_path)
    assert sum(file.bytes for file in data.sample_files) <= 0.05 * 2**20
    assert 2 <= table["rollout"].nunique() < 10 and table["rollout"].max() == 9 and table["rollout"].min() == 0


def test_a_folder_that_cannot_be_written_stops_the_recording_alone(tmp_path, caplog):
    (tmp_path / "samples").write_text("in the way")
    trainer = train(tmp_path, "plain")
    assert trainer.state.global_step == 6
    assert [r.message for r in caplog.records if "recorded no more (report.samples)" in r.message]


def test_wrong_settings_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="samples: rows=-1 must be >= 0"):
        train(tmp_path, "plain", samples={"rows": -1})
    with pytest.raises(ConfigError, match="samples.row.*rows"):
        train(tmp_path, "plain", samples={"row": 4})
