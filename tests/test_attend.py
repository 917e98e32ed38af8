"""The command that shows attention signals: its files, its picture, its errors."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from rich.console import Console
from tests_support import build_model, build_tokenizer

from rltok.attend import (
    FAI_COLOUR,
    PREPLAN_COLOUR,
    WAAD_COLOUR,
    Attended,
    AttendOptions,
    Sample,
    build_method,
    draw,
    figure_layout,
    read_completions,
    run_attend,
    strongest_tokens,
    tick_label,
)
from rltok.attention.signals import attention_signals
from rltok.cli import main
from rltok.config import ConfigError
from rltok.credit.preplan_anchor import PreplanAnchor, rhythm_gamma
from rltok.recipe import load_recipe

TOKENIZER = build_tokenizer()
SIGNALS = ("waad", "fai", "fai_count", "delta", "gamma_local", "gamma_global", "gamma_coupled")
SETS = ("is_preplan", "is_anchor", "is_dominated", "is_introductory")
SHORT = ["--set", "horizon_min=2", "--set", "horizon_max=9", "--set", "window=4", "--set", "layers=[0, 2]"]
ROWS = [
    {"prompt": "what is 1+2?", "completion": "so 1 and 2 is 3. then the answer is 3."},
    {"prompt": "9*9=", "completion": "8"},
    {"prompt": "a longer prompt than the others: 4/2=", "completion": "2\nor 2.0"},
]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model of three layers on disk."""
    folder = tmp_path_factory.mktemp("models") / "random"
    build_model(TOKENIZER, seed=3, num_hidden_layers=3).save_pretrained(folder)
    TOKENIZER.save_pretrained(folder)
    return folder


@pytest.fixture
def rows_file(tmp_path: Path) -> Path:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return path


def run_cli(*arguments: object) -> int:
    """Exit status of `rltok attend` in this process."""
    with pytest.raises(SystemExit) as caught:
        main(["attend", *map(str, arguments)])
    return int(caught.value.code or 0)


def read(folder: Path) -> tuple[dict[str, Any], pd.DataFrame]:
    return json.loads((folder / "signals.json").read_text()), pd.read_parquet(folder / "signals.parquet")


# Files


def test_files_hold_the_signals_of_every_completion_alone(checkpoint: Path, rows_file: Path, tmp_path: Path) -> None:
    """Padding, batching, labels and file formats change nothing of what the pure functions give for one row."""
    assert run_cli(checkpoint, "--completions", rows_file, "--out", tmp_path / "out", "--pictures", 0, *SHORT) == 0
    found, table = read(tmp_path / "out")
    assert list(table.columns) == ["completion", "position", "token", "token_id", *SIGNALS, *SETS]
    method = PreplanAnchor(horizon_min=2, horizon_max=9, window=4, layers=(0, 2))
    assert found["layers"] == [0, 2] and found["method"]["window"] == 4 and found["checkpoint"] == str(checkpoint)
    model = build_model(TOKENIZER, seed=3, num_hidden_layers=3)
    for index, (row, entry) in enumerate(zip(ROWS, found["completions"], strict=True)):
        prompt, ids = (TOKENIZER(row[key])["input_ids"] for key in ("prompt", "completion"))
        both, ones = torch.tensor([prompt + ids]), torch.ones(1, len(ids), dtype=torch.long)
        signals = attention_signals(model, both, torch.ones_like(both), ones, method.attention)
        rhythm = rhythm_gamma(signals.waad, signals.fai, signals.fai_count, ones, ones, method)
        part = table[table["completion"] == index]
        assert part["token_id"].tolist() == ids == entry["token_ids"]
        assert part["position"].tolist() == list(range(len(ids)))
        assert "".join(part["token"]) == row["completion"] == entry["completion"] == "".join(entry["tokens"])
        assert entry["prompt"] == row["prompt"]
        for name in ("waad", "fai"):
            np.testing.assert_allclose(part[name], getattr(signals, name)[0].numpy(), atol=1e-5)
        assert part["fai_count"].tolist() == signals.fai_count[0].tolist()
        for name, expected in (
            *((gamma, getattr(rhythm, gamma)) for gamma in ("gamma_local", "gamma_global", "gamma_coupled")),
            ("is_preplan", rhythm.is_local),
            ("is_anchor", rhythm.is_global),
            ("is_dominated", rhythm.is_dominated),
            ("is_introductory", rhythm.is_introductory),
        ):
            assert part[name].tolist() == expected[0].tolist(), name
        waad = part["waad"].to_numpy()
        np.testing.assert_allclose(part["delta"].to_numpy()[:-1], np.abs(np.diff(waad)), atol=1e-6)
        assert np.isnan(part["delta"].iloc[-1]) and entry["delta"][-1] is None
        for name in (*SIGNALS, *SETS):
            assert [None if value != value else value for value in part[name]] == entry[name]
        spans = {(h["layer"], h["head"]): h["span"] for h in entry["local_heads"] + entry["global_heads"]}
        assert len(spans) == 4 and {layer for layer, _ in spans} <= {0, 2}
        for (layer, head), span in spans.items():
            assert span == pytest.approx(signals.span[0, (0, 2).index(layer) * 4 + head].item(), abs=1e-4)
        assert max(h["span"] for h in entry["local_heads"]) <= min(h["span"] for h in entry["global_heads"])
    assert set(table["is_preplan"]) == {True, False} and table["is_anchor"].any()


def test_parquet_of_a_run_with_conversations(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """Prompts go through the chat template; the end that was sampled counts; other tokens than the sampled are told."""
    user = [{"role": "user", "content": "1+1="}]
    answers = [[{"role": "assistant", "content": text}] for text in ("is 2", "or 3", "cut o")]
    tokens = [[*"is 2", "<eos>"], ["or", " ", "3"], list("cut o")]
    pd.DataFrame({"step": 7, "prompt": [user] * 3, "completion": answers, "tokens": tokens}).to_parquet(
        tmp_path / "completions_00007.parquet"
    )
    out = tmp_path / "out"
    assert run_cli(checkpoint, "--completions", tmp_path / "completions_00007.parquet", "--out", out) == 0
    found, _ = read(out)
    first, second, third = found["completions"]
    assert first["prompt"] == "u:1+1=\na:"
    assert first["tokens"] == [*"is 2", "<eos>"] and first["completion"] == "is 2"
    assert second["tokens"] == list("or 3") and third["tokens"] == list("cut o")
    assert "1 of 3 completions tokenise otherwise" in capsys.readouterr().out
    ended = tmp_path / "evaluation_after.parquet"
    pd.DataFrame({"prompt": [user] * 2, "completion": ["2", ""], "ended": [False, True]}).to_parquet(ended)
    assert run_cli(checkpoint, "--completions", ended, "--out", out) == 0
    assert [entry["tokens"] for entry in read(out)[0]["completions"]] == [["2"], ["<eos>"]]


def test_rows_limit_and_plain_prompts_as_conversations(checkpoint: Path, rows_file: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert run_cli(checkpoint, "--completions", rows_file, "--rows", 2, "--chat", "--out", out) == 0
    prompts = [entry["prompt"] for entry in read(out)[0]["completions"]]
    assert prompts == ["u:what is 1+2?\na:", "u:9*9=\na:"]
    file = tmp_path / "rows.parquet"
    pd.DataFrame(ROWS).to_parquet(file)
    assert [row["prompt"] for row in read_completions(file, 2)] == [row["prompt"] for row in ROWS[:2]]
    assert read_completions(file) == read_completions(rows_file) == ROWS


def test_options_of_the_method_change_the_files(checkpoint: Path, rows_file: Path, tmp_path: Path) -> None:
    common = [checkpoint, "--completions", rows_file, "--out", tmp_path, "--pictures", 0, *SHORT]
    assert run_cli(*common, "--set", "gamma_amp=3.0", "--set", "top_quantile=0.2", "--set", "delta_mode=drop") == 0
    found, table = read(tmp_path)
    assert set(table["gamma_local"]) == {1.0, 3.0}
    assert table.groupby("completion")["is_preplan"].sum().tolist() == [8, 0, 2]  # ceil(0.2 n), none of one token
    assert table["delta"].min() < 0, "drop is signed"
    groups = ["--set", "head_scope=static", "--set", "local_heads=[1, 6]", "--set", "global_heads=[0]"]
    assert run_cli(*common, *groups) == 0
    for entry in read(tmp_path)[0]["completions"]:
        assert [(h["layer"], h["head"]) for h in entry["local_heads"]] == [(0, 1), (2, 2)]
        assert [(h["layer"], h["head"]) for h in entry["global_heads"]] == [(0, 0)]
    assert run_cli(*common, "--set", "head_scope=batch") == 0
    heads = [{(h["layer"], h["head"]) for h in entry["local_heads"]} for entry in read(tmp_path)[0]["completions"]]
    assert heads[0] == heads[1] == heads[2]


def test_completions_without_anchors_or_marks(
    checkpoint: Path, rows_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """Completions shorter than the horizon, and a method that marks nothing, are shown as they are."""
    common = [checkpoint, "--completions", rows_file, "--out", tmp_path]
    assert run_cli(*common, "--set", "horizon_min=60") == 0
    assert "no anchors: no token has another 60 tokens" in capsys.readouterr().out
    table = read(tmp_path)[1]
    assert not table["is_anchor"].any() and set(table["gamma_coupled"]) == {1.0} and (table["fai"] == 0).all()
    assert table["is_preplan"].any()
    assert run_cli(*common, "--set", "top_quantile=0.0") == 0
    table = read(tmp_path)[1]
    assert not table[list(SETS)].any().any() and table["fai"].any() and table["waad"].any()


def test_adapter_checkpoint_is_merged(checkpoint: Path, rows_file: Path, tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(checkpoint)
    model = get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj", "k_proj"]))
    folders = []
    for strength in (0.0, 0.5):
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.constant_(parameter, strength)
        folder = tmp_path / str(strength)
        model.save_pretrained(folder)
        TOKENIZER.save_pretrained(folder)
        folders.append(folder)
    found = []
    for folder in (checkpoint, *folders):
        assert run_cli(folder, "--completions", rows_file, "--out", tmp_path / "out", "--pictures", 0) == 0
        found.append(read(tmp_path / "out")[1]["waad"].to_numpy())
    np.testing.assert_allclose(found[0], found[1], atol=1e-5)
    assert np.abs(found[2] - found[0]).max() > 1e-3


# Generation


def test_embedded_model_completes_prompts(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    out = tmp_path / "out"
    prompts = ["--prompt", "compute 12 + 34 - 5", "--prompt", "make 7 from 3, 4"]
    assert run_cli("tiny-reasoner", *prompts, "--chat", "--max-new-tokens", 60, "--out", out) == 0
    found, table = read(out)
    shown = capsys.readouterr().out
    first, second = found["completions"]
    assert first["prompt"] == "<|user|>compute 12 + 34 - 5<|assistant|>"
    for entry in (first, second):
        assert entry["tokens"][0] in ("<think>", "<answer>"), "a trained model opens like that after its template"
        assert entry["tokens"][-1] == "<eos>" and len(entry["tokens"]) <= 60
        assert "<eos>" not in entry["completion"]
    assert sorted(path.name for path in out.iterdir()) == [
        "attend_0.png",
        "attend_1.png",
        "signals.json",
        "signals.parquet",
    ]
    best = table[(table["completion"] == 0) & table["is_preplan"]].sort_values("delta", ascending=False).iloc[0]
    assert repr(best["token"]) in shown and f"{best['delta']:.2f}" in shown
    assert "signals.json" in shown and "attend_1.png" in shown and "Traceback" not in shown


def test_greedy_is_default_and_sampling_is_seeded(checkpoint: Path, tmp_path: Path) -> None:
    def tokens(*options: object) -> list[str]:
        common = [checkpoint, "--prompt", "1+2=", "--max-new-tokens", 12, "--pictures", 0, "--out", tmp_path]
        assert run_cli(*common, *options) == 0
        return read(tmp_path)[0]["completions"][0]["tokens"]

    greedy, other = tokens(), ("--engine", "transformers")
    assert greedy == tokens("--temperature", 0, "--seed", 5) == tokens(*other) and 1 <= len(greedy) <= 12
    for engine in ((), other):
        sampled = tokens("--temperature", 1.5, "--seed", 1, *engine)
        assert sampled == tokens("--temperature", 1.5, "--seed", 1, *engine)
        assert len({tuple(tokens("--temperature", 1.5, "--seed", seed, *engine)) for seed in (1, 2, 3)}) > 1
    beside = tokens("--temperature", 1.5, "--seed", 1, "--prompt", "a longer one: 2+2=")
    assert beside == tokens("--temperature", 1.5, "--seed", 1), "the completion of a prompt is its own"


# Picture


def attended(length: int, token: str = "a") -> Attended:
    """A completion with smooth signals and a mark every fifth token."""
    steps = np.arange(length)
    marks = [bool(t % 5 == 1) for t in steps]
    values = {"waad": 4 + np.sin(steps / 3), "fai": 0.02 + 0.01 * np.cos(steps / 4), "delta": np.full(length, 0.5)}
    columns: dict[str, list[Any]] = {name: value.tolist() for name, value in values.items()}
    counts = [max(0, length - 10 - t) for t in range(length)]
    columns |= {"fai_count": counts, "is_preplan": marks}
    anchors = [mark and count > 0 for mark, count in zip(marks, counts, strict=True)]
    columns |= {"is_anchor": anchors, "is_dominated": [False] * length, "is_introductory": [False] * length}
    return Attended(Sample("p", [3], token * length, [4] * length), [token] * length, columns)


@pytest.mark.parametrize("length", [1, 40, 400])
def test_picture_shows_curves_and_marks(length: int, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="the picture needs matplotlib: pip install rltok[plot]")
    from matplotlib.image import imread

    one = attended(length, "$x_1$")
    draw(one, tmp_path / "a.png", "a $title")
    pixels = imread(tmp_path / "a.png")[..., :3]  # (height, width, 3)
    assert pixels.shape[1] == pytest.approx(figure_layout(length)[0] * 110, abs=2)
    columns = {
        colour: (np.abs(pixels - np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)]) / 255).max(axis=-1) < 0.02)
        .any(axis=0)
        .astype(int)  # (width,) 1 where the colour occurs
        for colour in (WAAD_COLOUR, FAI_COLOUR, PREPLAN_COLOUR)
    }
    marks = (np.diff(columns[PREPLAN_COLOUR], prepend=0) == 1).sum()
    assert marks - sum(one.columns["is_preplan"]) in (0, 1), "every mark is apart from the others; one is the legend's"
    if length > 1:
        for colour, share in ((WAAD_COLOUR, 0.9), (FAI_COLOUR, 0.9 * (length - 10) / length)):
            assert np.ptp(np.flatnonzero(columns[colour])) > share * 0.9 * len(columns[colour]), (
                "a curve of full length"
            )


def test_labels_thin_out_and_the_figure_widens() -> None:
    assert figure_layout(60) == (pytest.approx(10.6), 1) and figure_layout(120) == (pytest.approx(20.2), 1)
    assert figure_layout(480) == (pytest.approx(39.4), 2)
    for length in range(1, 3000, 7):
        width, step = figure_layout(length)
        assert 8 <= width <= 40
        assert step == 1 or length > 120
        assert (width - 1) * step / length >= 0.16 - 1e-9, "labels must not overlap"
    assert tick_label(" a\n") == "␣a\\n" and tick_label("x" * 30) == "x" * 11 + "…" and tick_label("\x00") == "�"


def test_pictures_are_limited_and_old_ones_go(checkpoint: Path, rows_file: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="the picture needs matplotlib: pip install rltok[plot]")
    out = tmp_path / "out"
    common = [checkpoint, "--completions", rows_file, "--out", out]
    assert run_cli(*common) == 0
    (out / "attend_notes.png").touch()
    assert len(list(out.glob("attend_?.png"))) == 3
    assert run_cli(*common, "--pictures", 1) == 0
    assert sorted(path.name for path in out.glob("*.png")) == ["attend_0.png", "attend_notes.png"]


def test_without_matplotlib_the_signals_are_written(
    checkpoint: Path, rows_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    common = [checkpoint, "--completions", rows_file, "--out", tmp_path / "out"]
    assert run_cli(*common) == 2
    assert "pip install rltok[plot]" in capsys.readouterr().err
    assert len(read(tmp_path / "out")[0]["completions"]) == 3
    assert run_cli(*common, "--pictures", 0) == 0


def test_strongest_tokens() -> None:
    one = attended(30)
    one.columns["fai"][6] = 1.0
    assert strongest_tokens(one, "is_anchor", "fai", 2) == [6, 1]
    assert strongest_tokens(one, "is_preplan", "delta", 3) == [1, 6, 11], "ties go to the earlier token"


# Errors

ONE = ["--prompt", "1+1="]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], ["neither was given", "--prompt TEXT", "--completions FILE"]),
        ([*ONE, "--completions", "rows.jsonl"], ["both were given"]),
        (["--completions", "no.jsonl"], ["no.jsonl", "no such file"]),
        (["--completions", "rows.csv"], ["'.csv'", "allowed: .jsonl, .parquet"]),
        (["--completions", "other.jsonl"], ["no column completion", "found: prompt, text", "line 1"]),
        (["--completions", "other.parquet"], ["no column prompt and no completion", "found: text"]),
        (["--completions", "broken.parquet"], ["broken.parquet", "Parquet"]),
        (["--completions", "broken.jsonl"], ["line 2: not JSON"]),
        (["--completions", "nothing.jsonl"], ["has no rows"]),
        (["--completions", "empty.jsonl"], ["row 2", "'5*5='", "is empty"]),
        (["--completions", "number.jsonl"], ["completion 5 is neither text nor one message"]),
        (["--completions", "rows.jsonl", "--temperature", "1"], ["--temperature 1.0 only goes with --prompt"]),
        (["--completions", "rows.jsonl", "--engine", "fast"], ["--engine fast only goes with --prompt"]),
        (["--completions", "latin.jsonl"], ["latin.jsonl", "UTF-8"]),
        ([*ONE, "--out", "rows.csv"], ["--out rows.csv: is a file"]),
        ([*ONE, "--rows", "2"], ["--rows 2 only goes with --completions"]),
        ([*ONE, "--max-new-tokens", "0"], ["--max-new-tokens 0 must be >= 1"]),
        ([*ONE, "--temperature", "-1"], ["--temperature -1.0 must be >= 0"]),
        (["--prompt", ""], ["has no tokens"]),
        ([*ONE, "--set", "window"], ["--set 'window'", "key=value"]),
        ([*ONE, "--set", "windw=3"], ["--set windw: unknown key", "did you mean 'window'"]),
        ([*ONE, "--set", "window=wide"], ["--set window: 'wide' is not a valid int"]),
        ([*ONE, "--set", "lookback=0"], ["--set lookback=0 must be >= 1"]),
        ([*ONE, "--set", "horizon_max=2"], ["horizon_max=2", "horizon_min=10"]),
        ([*ONE, "--set", "control=shuffled"], ["--set control: has no effect here"]),
        ([*ONE, "--set", "layers=[7]"], ["--set layers=(7,)", "0 to 2"]),
        (["--prompt", "1" * 250, "--max-new-tokens", "20"], ["max_position_embeddings", "256"]),
    ],
)
def test_bad_input_ends_with_status_2_and_words(
    checkpoint: Path,
    arguments: list[str],
    words: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("rows.jsonl").write_text('{"prompt": "1", "completion": "2"}\n')
    Path("rows.csv").write_text("prompt,completion\n1,2\n")
    Path("other.jsonl").write_text('{"prompt": "1", "text": "2"}\n')
    pd.DataFrame({"text": ["a"]}).to_parquet("other.parquet")
    Path("broken.parquet").write_text("not parquet")
    Path("broken.jsonl").write_text('{"prompt": "1", "completion": "2"}\n{"prompt":\n')
    Path("latin.jsonl").write_bytes(b'{"prompt": "\xe9", "completion": "2"}')
    Path("nothing.jsonl").write_text("\n")
    Path("empty.jsonl").write_text('{"prompt": "1", "completion": "2"}\n{"prompt": "5*5=", "completion": ""}\n')
    Path("number.jsonl").write_text('{"prompt": "1", "completion": 5}\n')
    assert run_cli(checkpoint, *arguments) == 2
    error = capsys.readouterr().err
    assert "error: " in error and "Traceback" not in error
    for word in words:
        assert word in error
    assert not Path("attend").exists()


def test_models_that_cannot_be_read_are_refused_by_name(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    from transformers import Gemma2Config, Gemma2ForCausalLM, T5Config

    sizes = {"vocab_size": len(TOKENIZER), "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8}
    capped, other = tmp_path / "capped", tmp_path / "other"
    Gemma2ForCausalLM(Gemma2Config(**sizes, **heads)).save_pretrained(capped)
    T5Config().save_pretrained(other)
    for folder in (capped, other):
        TOKENIZER.save_pretrained(folder)
    run = tmp_path / "run"
    run.mkdir()
    (run / "checkpoint-4").symlink_to(checkpoint)
    for model, words in (
        (capped, ["cannot be read", "Gemma2ForCausalLM", "soft-capping"]),
        (other, ["is no causal language model"]),
        (run, ["is no checkpoint", str(run / "checkpoint-4")]),
        (tmp_path / "nothing", ["nothing", "tiny-reasoner"]),
    ):
        assert run_cli(model, *ONE, "--out", tmp_path / "out") == 2
        error = capsys.readouterr().err
        for word in words:
            assert word in error
    assert not (tmp_path / "out").exists()


def test_chat_without_template_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    import shutil

    bare = tmp_path / "bare"
    shutil.copytree(checkpoint, bare)
    for file in bare.glob("chat_template*"):
        file.unlink()
    with pytest.raises(ConfigError, match="no chat template"):
        run_attend(AttendOptions(str(bare), prompts=("1",), chat=True, out=tmp_path / "out"), Console(quiet=True))


def test_weights_that_are_not_finite_are_named(checkpoint: Path, rows_file: Path, tmp_path: Path) -> None:
    model = build_model(TOKENIZER)
    with torch.no_grad():
        model.model.layers[1].self_attn.q_proj.weight.fill_(float("nan"))
    model.save_pretrained(tmp_path / "nan")
    TOKENIZER.save_pretrained(tmp_path / "nan")
    with pytest.raises(ConfigError, match="not finite in torch.float32"):
        run_attend(AttendOptions(str(tmp_path / "nan"), completions=rows_file, out=tmp_path), Console(quiet=True))


def test_lines_end_at_newlines_only(tmp_path: Path) -> None:
    row = {"prompt": "a", "completion": "one\u2028two"}
    (tmp_path / "rows.jsonl").write_text(json.dumps(row, ensure_ascii=False) + "\r\n", encoding="utf-8")
    assert read_completions(tmp_path / "rows.jsonl") == [row]


def test_method_options_are_those_of_the_method() -> None:
    assert build_method([]) == PreplanAnchor()
    changed = build_method(["horizon_max=null", "tau_waad=2.5", "layers=[1, 2]", "window=3"])
    assert changed == PreplanAnchor(horizon_max=None, tau_waad=2.5, layers=(1, 2), window=3)


def test_heads_are_ranked_once_and_make_a_recipe_section(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [{"prompt": f"compute {i} + {i + 1}", "completion": f"{i} + {i + 1} = {2 * i + 1}"} for i in range(6)]
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    out = tmp_path / "heads.yaml"
    with pytest.raises(SystemExit) as stop:
        main(["heads", "tiny-reasoner", "--completions", str(file), "--chat", "--out", str(out)])
    assert stop.value.code in (0, None), capsys.readouterr()
    section = yaml.safe_load(out.read_text(encoding="utf-8"))["credit"]
    assert section["layers"] == [1, 2] and len(section["local_heads"]) == len(section["global_heads"]) == 2
    child = tmp_path / "static.yaml"
    child.write_text(out.read_text(encoding="utf-8") + "defaults: dapo.yaml\n", encoding="utf-8")
    recipe = load_recipe(child)
    assert recipe.credit["head_scope"] == "static" and recipe.credit["local_heads"] == section["local_heads"]
    with pytest.raises(SystemExit) as stop:
        main(["heads", "tiny-reasoner", "--completions", str(tmp_path / "none.jsonl")])
    assert stop.value.code == 2 and "none.jsonl" in capsys.readouterr().err
