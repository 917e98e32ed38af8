"""Killed with SIGKILL and resumed equals never killed, bit for bit; damaged checkpoints are skipped, never loaded."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
import torch

from rltok.trainers.checkpoint import MANIFEST, damage, latest_checkpoint, write_manifest

HERE = Path(__file__).parent


def work(folder: Path, *words: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, str(HERE / "resume_worker.py"), str(folder), *words],
        env={**os.environ, "PYTHONPATH": str(HERE), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=180,
    )


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    run = work(folder)
    assert run.returncode == 0, run.stderr[-3000:]
    return folder, torch.load(folder / "final.pt")


@pytest.mark.parametrize(
    ("how", "expected"), [(("step", "5"), "checkpoint-4"), (("save", "8"), "checkpoint-6")], ids=["in-step", "in-save"]
)
def test_a_killed_run_continues_bit_for_bit(whole, tmp_path, how, expected):
    killed = work(tmp_path, *how)
    assert killed.returncode == -9, killed.stderr[-3000:]
    resumed = work(tmp_path, "resume")
    assert resumed.returncode == 0, resumed.stderr[-3000:]
    final, (folder, reference) = torch.load(tmp_path / "final.pt"), whole
    assert final["from"] == expected
    if how[0] == "save":
        assert "checkpoint-8" in resumed.stderr and "was not finished" in resumed.stderr
    for name, value in reference["parameters"].items():
        assert torch.equal(final["parameters"][name], value), name
    assert final["stats"] == reference["stats"] and final["refill"] == reference["refill"] != [0, 0]
    assert final["skipping"] == reference["skipping"]
    start = int(expected.split("-")[1])
    assert final["log"][start:] == reference["log"][start:]
    for step in range(start + 1, 10):
        table = f"completions/completions_{step:05d}.parquet"
        pd.testing.assert_frame_equal(pd.read_parquet(tmp_path / table), pd.read_parquet(folder / table))


def test_a_run_killed_after_its_last_checkpoint_trains_no_further(whole, tmp_path):
    folder, reference = whole
    shutil.copytree(folder / "checkpoint-9", tmp_path / "checkpoint-9")
    resumed = work(tmp_path, "resume")
    assert resumed.returncode == 0, resumed.stderr[-3000:]
    final = torch.load(tmp_path / "final.pt")
    assert final["from"] == "checkpoint-9" and final["log"] == reference["log"]
    for name, value in reference["parameters"].items():
        assert torch.equal(final["parameters"][name], value), name


def test_the_run_crossed_an_epoch(whole):
    assert whole[1]["log"][-1]["epoch"] > 1


def test_the_run_moved_through_the_schedule_and_skipped_prompts(whole):
    log = whole[1]["log"]
    shares = [entry["selection/rows_share"] for entry in log]
    assert len(log) == 9 and shares == sorted(shares) and len(set(shares)) == 3, "one value per rollout, each step"
    assert sum(entry.get("prompt_skipping/skipped", 0) for entry in log) > 0
    totals = [entry["trained_tokens"] for entry in log]
    assert totals == sorted(totals) and totals[-1] > totals[0] > 0


def seal(folder: Path, step: int) -> Path:
    checkpoint = folder / f"checkpoint-{step}"
    checkpoint.mkdir(parents=True)
    (checkpoint / "model.safetensors").write_bytes(bytes(range(100)) * step)
    (checkpoint / "state.json").write_text("{}")
    write_manifest(checkpoint)
    return checkpoint


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def flip_a_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[17] ^= 1
    path.write_bytes(bytes(data))


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (lambda c: truncate(c / "model.safetensors"), "has 1999 bytes, expected 2000"),
        (lambda c: flip_a_bit(c / "model.safetensors"), "does not match its digest"),
        (lambda c: (c / "state.json").unlink(), "state.json is missing"),
        (lambda c: (c / MANIFEST).unlink(), "was not finished"),
        (lambda c: (c / MANIFEST).write_text('{"a": '), "cannot be read"),
    ],
    ids=["truncated", "flipped", "missing", "unsealed", "torn-manifest"],
)
def test_damage_is_named_and_skipped(tmp_path, caplog, harm, message):
    good, bad = seal(tmp_path, 3), seal(tmp_path, 20)
    assert latest_checkpoint(tmp_path) == bad
    harm(bad)
    assert message in damage(bad)
    assert latest_checkpoint(tmp_path) == good
    assert "checkpoint-20" in caplog.text and message in caplog.text
    shutil.rmtree(good)
    assert latest_checkpoint(tmp_path) is None


def test_large_files_are_digested_by_their_ends(tmp_path, monkeypatch):
    monkeypatch.setattr("rltok.trainers.checkpoint.WHOLE_DIGEST_BYTES", 1 << 20)
    folder = tmp_path / "checkpoint-1"
    folder.mkdir()
    (folder / "big").write_bytes(os.urandom(3 << 20))
    write_manifest(folder)
    assert damage(folder) is None and json.loads((folder / MANIFEST).read_text())["big"]["bytes"] == 3 << 20
    with (folder / "big").open("r+b") as file:
        file.seek(-5, os.SEEK_END)
        file.write(b"other")
    assert "digest" in damage(folder)


def test_another_shape_of_run_is_refused(whole, tmp_path):
    from tests_support import build_model, build_tokenizer, digit_dataset, even_length, even_reward, run_settings

    from rltok.trainers import CreditConfig, CreditTrainer

    tokenizer = build_tokenizer()
    args = CreditConfig(**run_settings(tmp_path, per_device_train_batch_size=8, max_steps=12))
    trainer = CreditTrainer(
        build_model(tokenizer),
        [even_reward, even_length],
        args,
        train_dataset=digit_dataset(13),
        processing_class=tokenizer,
    )
    with pytest.raises(ValueError, match="per_device_train_batch_size=8 but the checkpoint .* was written with 4"):
        trainer.train(resume_from_checkpoint=str(latest_checkpoint(whole[0])))
