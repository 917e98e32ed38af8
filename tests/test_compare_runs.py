"""`scripts/compare_runs.py` on run directories written here: curves, figures, errors in words, the picture."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests_support import load_script

script = load_script("compare_runs")

Line = dict[str, Any]


def points(tokens: Sequence[float], rewards: Sequence[float | None], seconds_per_step: float = 1.0) -> list[Line]:
    """Lines of metrics.jsonl; a reward of None is a step without a rollout, whose line lacks the field."""
    lines = []
    for step, (count, reward) in enumerate(zip(tokens, rewards, strict=True), start=1):
        line: Line = {"step": step, "seconds": step * seconds_per_step, "trained_tokens": count, "loss": 0.1}
        lines.append(line if reward is None else line | {"reward": reward})
    return lines


def write_run(path: Path, lines: Sequence[Line], seed: int = 0, strict: float = 0.5, train_seconds: float = 9.0) -> str:
    path.mkdir()
    (path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (path / "summary.json").write_text(json.dumps({"seed": seed, "train_seconds": train_seconds}))
    means = {"strict": strict, "length": 10.0 + seed}
    (path / "evaluation_after.json").write_text(json.dumps({"completions": 4, "means": means}))
    return str(path)


@pytest.fixture
def arms(tmp_path: Path) -> list[str]:
    """Two seeds with points at tokens 0, 100, 200 and 50, 150, 250; one run that stops at 150 tokens but later."""
    first = write_run(tmp_path / "a0", points([0, 60, 100, 200], [0.0, None, 1.0, 0.0]), 0, 0.5, 4.5)
    second = write_run(tmp_path / "a1", points([50, 150, 250, 400], [0.2, 0.6, 1.0, None]), 1, 0.7, 5.5)
    other = write_run(tmp_path / "b0", points([10, 70, 150], [0.1, None, 0.5], 2.0), 0, 0.9, 7.0)
    return [f"full={first},{second}", f"d3s={other}"]


def test_mean_curve_is_taken_where_all_seeds_have_data(arms: list[str]) -> None:
    runs = script.read_arms(arms, "reward", 1)["full"]
    grid, mean = script.mean_curve(runs, "trained_tokens")
    # first seed: 0.5, 1, 0.5, 0 at these tokens; second seed: 0.2, 0.4, 0.6, 0.8
    assert grid.tolist() == [50, 100, 150, 200]
    np.testing.assert_allclose(mean, [0.35, 0.7, 0.55, 0.4])


def test_smoothing_is_a_trailing_mean() -> None:
    np.testing.assert_allclose(script.trailing_mean(np.array([1.0, 3.0, 5.0, 1.0]), 2), [1, 2, 4, 3])
    np.testing.assert_array_equal(script.trailing_mean(np.array([1.0, 3.0, 5.0]), 1), [1, 3, 5])


def test_figures_of_the_table(arms: list[str]) -> None:
    figures = script.compare(script.read_arms(arms, "reward", 1), "reward", 1)
    full, d3s = figures["arms"]["full"], figures["arms"]["d3s"]
    assert figures["equal"] == {"trained_tokens": 150, "seconds": 3}
    assert full["seeds"] == [0, 1]
    assert full["after"]["strict"] == {"per_seed": [0.5, 0.7], "mean": pytest.approx(0.6), "min": 0.5, "max": 0.7}
    assert full["after"]["length"]["mean"] == 10.5
    assert full["trained_tokens"] == {"per_seed": [200, 400], "mean": 300, "min": 200, "max": 400}
    assert full["train_seconds"] == {"per_seed": [4.5, 5.5], "mean": 5, "min": 4.5, "max": 5.5}
    assert full["last_quarter"]["per_seed"] == [0.0, 1.0]
    assert full["at_equal"]["trained_tokens"]["per_seed"] == pytest.approx([0.5, 0.6])
    assert full["at_equal"]["seconds"]["per_seed"] == pytest.approx([1.0, 1.0])
    # the points of d3s are at 2 and 6 s: at 3 s a quarter of the way from 0.1 to 0.5
    assert d3s["at_equal"]["trained_tokens"]["mean"] == pytest.approx(0.5)
    assert d3s["at_equal"]["seconds"]["mean"] == pytest.approx(0.2)


def test_last_quarter_counts_points_and_ignores_smoothing(tmp_path: Path) -> None:
    rewards = [0.0, 0.0, 0.0, 0.0, 0.0, 0.2, 0.6]  # 7 points: the last 2
    run = write_run(tmp_path / "run", points(range(7), rewards))
    figures = script.compare(script.read_arms([f"a={run}"], "reward", 5), "reward", 5)
    assert figures["arms"]["a"]["last_quarter"]["mean"] == pytest.approx(0.4)
    assert figures["arms"]["a"]["at_equal"]["seconds"]["mean"] == pytest.approx(0.16)


def test_no_value_where_a_run_has_not_begun(tmp_path: Path) -> None:
    early = write_run(tmp_path / "early", points([1, 2], [0.0, 1.0]))
    late = write_run(tmp_path / "late", points([5, 9], [0.0, 1.0]))
    figures = script.compare(script.read_arms([f"early={early}", f"late={late}"], "reward", 1), "reward", 1)
    assert figures["arms"]["late"]["at_equal"]["trained_tokens"]["mean"] is None
    assert figures["arms"]["early"]["at_equal"]["trained_tokens"]["mean"] == 1.0


def test_command_prints_and_writes(arms: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib", reason="the picture needs matplotlib: pip install rltok[plot]")
    from matplotlib.image import imread

    picture, figures = tmp_path / "new" / "figure.png", tmp_path / "figures.json"
    script.main([*arms, "--smooth", "2", "--out", str(picture), "--json", str(figures)])
    printed = capsys.readouterr().out
    for text in ("full", "d3s", "held-out strict", "0.5, 0.7", "300 (200 to 400)", "5.0 (4.5 to 5.5)", "150 tokens"):
        assert text in printed, text
    assert json.loads(figures.read_text())["arms"]["d3s"]["after"]["strict"]["mean"] == 0.9
    pixels = imread(picture)[..., :3]  # (height, width, 3)
    assert pixels.shape[1] == 1200
    for colour in script.COLOURS[:2]:
        wanted = np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)]) / 255
        drawn = (np.abs(pixels - wanted).max(axis=-1) < 0.02).any(axis=0)  # (width,)
        assert drawn[:600].sum() > 50 and drawn[600:].sum() > 50, f"{colour} is missing in a panel"


def break_directory(run: Path) -> None:
    run.rename(run.with_name("elsewhere"))


def break_file(name: str, text: str | None) -> Callable[[Path], None]:
    def act(run: Path) -> None:
        (run / name).unlink() if text is None else (run / name).write_text(text)

    return act


NO_TOKENS = '{"step": 4, "seconds": 1.0, "reward": 0.5}\n'
FALLING = "".join(f'{{"step": 1, "seconds": {s}, "reward": 0.5, "trained_tokens": 1}}\n' for s in (2.0, 1.0))


@pytest.mark.parametrize(
    ("act", "words"),
    [
        (break_directory, ["a0 is no directory", "rltok train"]),
        (break_file("metrics.jsonl", None), ["metrics.jsonl is missing", "let the run train"]),
        (break_file("metrics.jsonl", ""), ["metrics.jsonl is missing or empty"]),
        (break_file("metrics.jsonl", '{"step": 1, "rew'), ["which is no JSON", "train again"]),
        (break_file("metrics.jsonl", NO_TOKENS), ["step 4", "'trained_tokens'", "train again"]),
        (break_file("metrics.jsonl", '{"step": 1, "reward": null}'), ["'reward' is null", "--metric"]),
        (break_file("metrics.jsonl", FALLING), ["seconds falls", "output_dir"]),
        (break_file("summary.json", None), ["summary.json is missing", "not complete", "resume=auto"]),
        (break_file("summary.json", '{"seed": 0}'), ["summary.json", "'train_seconds'"]),
        (break_file("evaluation_after.json", None), ["evaluation_after.json", "evaluation.after=true"]),
        (break_file("evaluation_after.json", '{"means": {"strict": 1}}'), ["a0/evaluation_after.json", "'length'"]),
    ],
)
def test_what_is_missing_is_named(
    act: Callable[[Path], None], words: list[str], arms: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    act(tmp_path / "a0")
    with pytest.raises(SystemExit) as stop:
        script.main(arms)
    message = capsys.readouterr().err
    assert stop.value.code == 2
    for word in words:
        assert word in message, message


def test_wrong_arguments_are_named(arms: list[str], tmp_path: Path) -> None:
    for specs, metric, words in (
        ([str(tmp_path)], "reward", "is no arm; write NAME="),
        ([arms[0], arms[0]], "reward", "'full' is given twice"),
        ([f"a={tmp_path / 'a0'},{tmp_path / 'a0'}"], "reward", "a directory twice"),
        (arms, "rewards", "no step has the field 'rewards'.*one of: reward"),
    ):
        with pytest.raises(script.CompareError, match=words):
            script.read_arms(specs, metric, 1)


def test_seeds_without_common_range_are_refused(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="the picture needs matplotlib: pip install rltok[plot]")
    near, far = (write_run(tmp_path / n, points(t, [0.0, 1.0])) for n, t in (("near", [1, 2]), ("far", [3, 4])))
    arms = script.read_arms([f"a={near},{far}"], "reward", 1)
    with pytest.raises(script.CompareError, match="share no range of trained_tokens"):
        script.plot(arms, "reward", 1, tmp_path / "figure.png")


def test_missing_matplotlib_is_named_after_the_table(
    arms: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(SystemExit):
        script.main([*arms, "--out", str(tmp_path / "figure.png")])
    printed = capsys.readouterr()
    assert "pip install rltok[plot]" in printed.err
    assert "held-out strict" in printed.out


def test_one_panel_on_request(arms: list[str], tmp_path: Path) -> None:
    both, one = tmp_path / "both.png", tmp_path / "one.png"
    script.main([*arms, "--out", str(both)])
    script.main([*arms, "--out", str(one), "--axis", "trained_tokens"])
    assert one.read_bytes() != both.read_bytes() and one.stat().st_size > 5000
    with pytest.raises(SystemExit):
        script.main([*arms, "--out", str(one), "--axis", "tokens"])
