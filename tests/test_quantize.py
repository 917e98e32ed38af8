"""`rltok quantize`: the command, its checkpoint, its quality figures, and the texts that it reads."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tests_support import build_tokenizer, load_script
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen3Config, Qwen3ForCausalLM

from rltok import quantize
from rltok.cli import main
from rltok.config import ConfigError
from rltok.models import QUANTIZERS
from rltok.quant import export
from rltok.quant.gptq import QuantSpec
from rltok.quant.importance import ImportanceSpec
from rltok.quant.quality import Perplexity, Quality, Score, linear_errors, paired_scores
from rltok.quant.quantize import QuantizedModel, quantize_model
from rltok.quant.texts import TokenSequence, calibration, choose, cut, sequence_losses
from rltok.quantize import QuantizeOptions

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def small_model(tied: bool = True) -> Qwen3ForCausalLM:
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        max_position_embeddings=64,
        initializer_range=0.3,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=None,
        tie_word_embeddings=tied,
    )
    model = Qwen3ForCausalLM(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.uniform_(0.5, 1.5)
    return model


def some_ids(rows: int = 6, width: int = 20) -> torch.Tensor:
    return torch.randint(3, 50, (rows, width), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    small_model().save_pretrained(folder)
    build_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("texts") / "texts.jsonl"
    rows: list[dict[str, Any]] = [{"text": f"{i}+{i}={2 * i} and so on and on, {i * i}."} for i in range(8)]
    rows += [{"prompt": f"{i}*3=", "completion": f"{3 * i} for sure", "credit": [0.5] * 11} for i in range(10, 14)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def run(*arguments: object) -> int:
    with pytest.raises(SystemExit) as caught:
        main(["quantize", *map(str, arguments)])
    return int(caught.value.code or 0)


def options(tmp_path: Path, **given: Any) -> QuantizeOptions:
    return QuantizeOptions(**{"checkpoint": "tiny-reasoner", "out": tmp_path / "new"} | given)


# The command


def test_the_command_writes_a_checkpoint_that_loads(
    checkpoint: Path, texts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("compressed_tensors", reason="the packed format is that of compressed-tensors: rltok[quant]")
    out = tmp_path / "deep" / "q"
    given = ("--calibration", texts, "--eval-text", texts, "--group-size", 16, "--bits", 3, "--expansion", 2)
    assert run(checkpoint, "--out", out, *given) == 0
    shown = capsys.readouterr().out
    assert "each also rolled 1 times" in shown and "perplexity" in shown and "compressed-tensors" in shown
    assert {file.name for file in out.iterdir()} >= {
        "config.json",
        "model.safetensors",
        "generation_config.json",
        "tokenizer.json",
        "quantization.json",
        "quality.json",
        "quality.png",
        "quality.svg",
    }
    assert [file.name for file in out.parent.iterdir()] == ["q"]  # no draft is left
    about = json.loads((out / "config.json").read_text())
    weights = about["quantization_config"]["config_groups"]["group_0"]["weights"]
    assert about["tie_word_embeddings"] is False and about["quantization_config"]["ignore"] == ["lm_head"]
    assert (weights["num_bits"], weights["group_size"], weights["strategy"], weights["symmetric"]) == (
        3,
        16,
        "group",
        True,
    )
    stored = load_file(out / "model.safetensors")
    assert stored["model.layers.0.mlp.down_proj.weight_packed"].shape == (32, 64 * 3 // 32)
    notes = json.loads((out / "quantization.json").read_text())
    assert notes["rotation"] == {"kind": "hadamard", "heads": True} and notes["importance"]["r_min"] == 0.01
    assert notes["calibration"]["sequences"] == 12 and len(notes["linears"]) == 14
    quality = json.loads((out / "quality.json").read_text())
    assert quality["accuracy"] is None and len(quality["linears"]) == 14 and len(quality["layers"]) == 2
    assert all(0 < layer["error"] < 0.5 and layer["weighted_error"] > 0 for layer in quality["layers"])
    # what was printed as quantised is what the reloaded checkpoint does
    ppl = quality["perplexity"]
    loaded = AutoModelForCausalLM.from_pretrained(out).eval()
    tokenizer = AutoTokenizer.from_pretrained(out)
    read = quantize._read(options(tmp_path), "--eval-text", [texts], tokenizer, 64)
    total, count = 0.0, 0
    for one in read:
        with torch.no_grad():
            logits = loaded(torch.tensor([one.ids])).logits[0]
        total += float(cross_entropy(logits[one.start - 1 : -1], torch.tensor(one.ids[one.start :]), reduction="sum"))
        count += len(one.ids) - one.start
    assert count == ppl["tokens"] and math.exp(total / count) == pytest.approx(ppl["quantized"], rel=1e-4)
    assert ppl["quantized"] != pytest.approx(ppl["full"], rel=1e-3)


def test_a_second_run_does_not_overwrite(
    checkpoint: Path, texts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "q"
    given = (checkpoint, "--out", out, "--format", "dequantized", "--method", "rtn", "--no-picture", "--group-size", -1)
    assert run(*given) == 0
    before = {file.name: file.read_bytes() for file in out.iterdir()}
    assert run(*given) == 2
    assert "exists and is not overwritten" in capsys.readouterr().err
    assert {file.name: file.read_bytes() for file in out.iterdir()} == before
    assert "quality.png" not in before


def test_a_failed_write_leaves_nothing(
    checkpoint: Path, texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*args: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(quantize, "write_json", broken)
    given = (checkpoint, "--out", tmp_path / "q", "--format", "dequantized", "--method", "rtn", "--no-picture")
    assert run(*given, "--group-size", 16) == 2
    assert list(tmp_path.iterdir()) == []


def test_dequantized_weights_load_anywhere(checkpoint: Path, texts: Path, tmp_path: Path) -> None:
    out = tmp_path / "q"
    given = ("--method", "gptq", "--group-size", 16, "--bits", 4, "--no-picture", "--format", "dequantized")
    assert run(checkpoint, "--out", out, "--calibration", texts, *given) == 0
    about = json.loads((out / "config.json").read_text())
    assert "quantization_config" not in about and about["tie_word_embeddings"] is True
    loaded, original = AutoModelForCausalLM.from_pretrained(out), small_model()
    assert torch.equal(loaded.lm_head.weight, original.lm_head.weight)
    weight = loaded.model.layers[0].mlp.up_proj.weight
    assert not torch.equal(weight, original.model.layers[0].mlp.up_proj.weight)
    for group in weight.view(-1, 16):
        assert group.unique().numel() <= 16


def test_the_embedded_model_calibrates_on_its_own_rollouts(tmp_path: Path) -> None:
    out = tmp_path / "q"
    given = ("--format", "dequantized", "--samples", 8, "--expansion", 1, "--no-picture")
    assert run("tiny-reasoner", "--out", out, *given, "evaluation.rows=6") == 0
    quality = json.loads((out / "quality.json").read_text())
    assert quality["accuracy"]["problems"] == 6 and quality["accuracy"]["source"] == "demo"
    assert set(quality["accuracy"]["means"]) == {"strict", "lenient", "length", "ended"}
    assert quality["perplexity"]["sequences"] == 6 and 1 < quality["perplexity"]["full"] < 4
    notes = json.loads((out / "quantization.json").read_text())
    assert notes["calibration"]["source"] == "own rollouts on demo's training prompts"
    assert notes["scale_dtype"] == "float16"  # as the weights are stored


# Errors


def test_settings_are_refused_by_option(checkpoint: Path, texts: Path, tmp_path: Path) -> None:
    for given, message in (
        ({"bits": 9}, "--bits=9; allowed: 2 to 8"),
        ({"group_size": 0}, "--group-size=0"),
        ({"percdamp": 0.0}, "--percdamp=0.0"),
        ({"importance": "credits"}, "--importance='credits'; allowed: attention_concentration"),
        ({"r_min": 2.0}, "--r-min=2.0, r_max=1.0"),
        ({"method": "gptq", "r_min": 0.1}, "--r-min only goes with --method rsq"),
        ({"samples": 0}, "--samples 0 must be >= 1"),
        ({"importance": "credit"}, "--importance credit reads a column credit"),
        ({"checkpoint": "elsewhere"}, "--method rsq needs calibration texts"),
        ({"checkpoint": "elsewhere", "method": "rtn", "overrides": ("a=1",)}, "a=1: changes a recipe"),
        ({"out": tmp_path}, "exists and is not overwritten"),
    ):
        with pytest.raises(ConfigError, match=message.replace("(", r"\(")):
            options(tmp_path, **given)


def test_models_and_files_are_refused_before_anything_is_computed(
    checkpoint: Path, texts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def loaded(config: Any) -> None:
        raise AssertionError("weights were loaded")

    monkeypatch.setattr(quantize, "load_policy", loaded)
    plain = ("--format", "dequantized", "--no-picture", "--calibration", texts)
    about = json.loads((checkpoint / "config.json").read_text())
    for name, change in (("gemma", {"model_type": "gemma"}), ("done", {"quantization_config": {"quant_method": "x"}})):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps(about | change))
        build_tokenizer().save_pretrained(folder)
    aware = tmp_path / "aware"
    aware.mkdir()
    (aware / "config.json").write_text(json.dumps(about))
    (aware / QUANTIZERS).write_text("{}")
    build_tokenizer().save_pretrained(aware)
    for arguments, message in (
        ((checkpoint, "--group-size", 24), "--group-size 24 does not divide hidden_size 32"),
        ((checkpoint, "--group-size", 16, "--length", 65), "--length 65: the model is made for 64"),
        ((tmp_path / "gemma",), "model_type 'gemma' are not known; llama, mistral, qwen2, qwen3"),
        ((tmp_path / "done",), "is quantised already"),
        ((aware,), "has fake quantisers of its own (quantization_aware.json)"),
        (("tiny-reasoner", "--recipe", "demo", "evaluation.quant={bits: 4}"), "evaluation.quant: the model that is"),
    ):
        assert run(*arguments, "--out", tmp_path / "q", *plain) == 2
        assert message in capsys.readouterr().err
    assert not (tmp_path / "q").exists()


def test_a_missing_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(export.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(
        ConfigError, match=r"compressed-tensors is not installed; pip install 'rltok\[quant\]', or give"
    ):
        quantize._check_format(options(tmp_path))
    quantize._check_format(options(tmp_path, format="dequantized"))
    monkeypatch.undo()
    monkeypatch.setattr(export.importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(export.importlib.metadata, "version", lambda name: "0.15.0")
    assert "0.15.0 is too old, 0.20 or newer" in (export.package_problem() or "")


def test_credit_must_fit_the_tokens(texts: Path, tmp_path: Path) -> None:
    tokenizer = build_tokenizer()
    weighed = options(tmp_path, importance="credit", calibration=(texts,))
    with pytest.raises(ConfigError, match="needs the column credit in every row"):
        quantize._read(weighed, "--calibration", [texts], tokenizer, 64)
    row = {"prompt": "1+1=", "completion": "2 ok", "credit": [1.0, 0.0, 2.0, None]}
    (found,) = quantize._of_completion(row, tokenizer, weighed, 64, "row 1")
    assert found.credit == [0.0] * 4 + [1.0, 0.0, 2.0, 0.0] and found.start == 4
    with pytest.raises(ConfigError, match="1 numbers in the column credit for 4 tokens"):
        quantize._of_completion(row | {"credit": [1.0]}, tokenizer, weighed, 64, "row 1")


# The checkpoint


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
@pytest.mark.parametrize(("bits", "group", "rotation"), [(3, 16, "hadamard"), (4, -1, None), (8, 16, "orthogonal")])
def test_a_packed_checkpoint_is_the_model_in_memory(
    dtype: torch.dtype, bits: int, group: int, rotation: Any, tmp_path: Path
) -> None:
    """Codes, scales and weights bit for bit; logits too, since equal weights run through equal kernels."""
    reason = "the packed format is that of compressed-tensors: rltok[quant]"
    compressors = pytest.importorskip("compressed_tensors.compressors", reason=reason)
    small_model().to(dtype).save_pretrained(tmp_path / "full")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "full", dtype=dtype).eval()
    spec = QuantSpec(bits, group, clip_search=True, scale_dtype=dtype)
    found = quantize_model(model, some_ids(), spec, "rsq", rotation=rotation, measure=False)
    export.write_weights(model, found, tmp_path / "packed", "compressed-tensors")
    assert not hasattr(model.config, "quantization_config")
    stored = load_file(tmp_path / "packed" / "model.safetensors")
    for name, state in found.states.items():
        packed, shape = stored[f"{name}.weight_packed"], stored[f"{name}.weight_shape"]
        assert torch.equal(compressors.unpack_from_int32(packed, bits, torch.Size(shape.tolist())), state.codes)
        scale = stored[f"{name}.weight_scale"]
        assert scale.dtype == dtype and torch.equal(scale.to(state.scales.dtype), state.scales)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "packed").eval()
    ids = some_ids()
    with torch.no_grad():
        logits, wanted = loaded(ids).logits, model(ids).logits
    assert loaded.dtype == dtype and loaded.config.tie_word_embeddings is (rotation is None)
    assert ("lm_head.weight" in stored) == (rotation is not None)
    for name in found.states:
        assert torch.equal(loaded.get_submodule(name).weight, model.get_submodule(name).weight)
    assert torch.equal(logits, wanted)


def test_scales_that_the_dtype_would_change_are_refused(tmp_path: Path) -> None:
    pytest.importorskip("compressed_tensors", reason="the packed format is that of compressed-tensors: rltok[quant]")
    model = small_model().bfloat16()
    found = quantize_model(model, None, QuantSpec(4), "rtn")
    with pytest.raises(ValueError, match="scales are not exact in torch.bfloat16"):
        export.write_weights(model, found, tmp_path / "q", "compressed-tensors")
    with pytest.raises(ValueError, match="form='gguf'; allowed: compressed-tensors, dequantized"):
        export.write_weights(model, found, tmp_path / "q", "gguf")  # type: ignore[arg-type]


def test_equal_importances_write_the_codes_of_gptq() -> None:
    model = small_model()
    sequences = [TokenSequence(row.tolist()[: 12 + i]) for i, row in enumerate(some_ids())]
    batches = calibration(sequences, 0, batch_size=4)
    spec = QuantSpec(3, 16, clip_search=True, scale_dtype=torch.float16)
    states: list[QuantizedModel] = []
    for method, importance in (("gptq", None), ("rsq", ImportanceSpec(r_min=0.4, r_max=0.4)), ("rsq", None)):
        copied = copy.deepcopy(model)
        states.append(quantize_model(copied, batches, spec, method, importance, rotation="hadamard", measure=False))
    plain, alike, weighed = (found.states for found in states)
    assert all(torch.equal(plain[name].codes, alike[name].codes) for name in plain)
    assert all(torch.equal(plain[name].scales, alike[name].scales) for name in plain)
    assert any(not torch.equal(plain[name].codes, weighed[name].codes) for name in plain)


# Texts and figures


def test_texts_are_cut_and_chosen() -> None:
    assert [one.ids for one in cut(range(7), 3)] == [
        [0, 1, 2],
        [3, 4, 5],
    ]  # a last single token predicts nothing
    assert [one.ids for one in cut([7, 8, 9], 3, [1])] == [[1, 7, 8], [1, 9]]
    with pytest.raises(ValueError, match="length=2; allowed: >= 3"):
        cut([1], 2, [0])
    many = [TokenSequence([i, i]) for i in range(20)]
    first, other = choose(many, 5, 0), choose(many, 5, 1)
    assert len(first) == 5 and first == choose(many, 5, 0) != other and first == sorted(first)
    assert choose(many[:3], 5, 0) == many[:3]


def test_calibration_batches_hold_every_sequence_as_often_as_asked() -> None:
    lengths = (5, 9, 3, 9, 4)
    sequences = [TokenSequence(list(range(3, 3 + n)), credit=[1.0] * n) for n in lengths]
    batches = calibration(sequences, 0, batch_size=4, expansion=2)
    assert sum(int(batch.attention_mask.sum()) for batch in batches) == 2 * sum(lengths)
    assert all(
        batch.credit is not None and torch.equal(batch.credit, batch.attention_mask.float()) for batch in batches
    )
    assert max(len(batch.input_ids) for batch in batches) <= 4
    assert calibration([*sequences, TokenSequence([3, 4])], 0)[0].credit is None
    with pytest.raises(ValueError, match="nothing to calibrate on"):
        calibration([], 0)


def test_losses_are_those_of_single_rows() -> None:
    model = small_model()
    sequences = [TokenSequence(row.tolist()[: 6 + 2 * i], 1 + i) for i, row in enumerate(some_ids())]
    found = sequence_losses(model.train(), sequences, 0, batch_size=4)
    assert model.training
    model.eval()
    for i, one in enumerate(sequences):
        with torch.no_grad():
            logits = model(torch.tensor([one.ids])).logits[0, one.start - 1 : -1]
        wanted = cross_entropy(logits, torch.tensor(one.ids[one.start :]), reduction="sum")
        assert found.tokens[i] == len(one.ids) - one.start
        assert float(found.nats[i]) == pytest.approx(float(wanted), rel=1e-5)
    assert found.mean == pytest.approx(float(found.nats.sum() / found.tokens.sum()))
    with pytest.raises(ValueError, match="no token's loss counts"):
        _ = sequence_losses(model, [TokenSequence([3, 4], 2)], 0).mean


def test_scores_count_what_changed() -> None:
    rows = [{"strict": value} for value in (1.0, 1.0, 0.0, 0.0)]
    after = [{"strict": value} for value in (0.0, 1.0, 1.0, 0.0)]
    assert paired_scores(rows, after, ["strict"]) == {"strict": Score(0.5, 0.5, 1, 1)}


def test_quality_without_calibration_says_so() -> None:
    found = quantize_model(small_model(), None, QuantSpec(4), "rtn")
    quality = Quality(found, Perplexity("texts", 1, 10, 0.0, math.log(2)), None)
    values = quality.to_json()
    assert values["perplexity"]["quantized"] == pytest.approx(2) and values["perplexity"]["full"] == 1
    assert linear_errors(found)["down"] == [None, None]
    assert [linear["error"] for linear in values["linears"]] == [None] * 14


def test_the_comparison_writes_its_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = load_script("compare_quantizers")
    arms = {name: script.ARMS[name] for name in ("rtn", "gptq")}
    monkeypatch.setattr(script, "ARMS", arms)
    monkeypatch.setattr(script, "CONTRASTS", (("gptq", "rtn"),))
    given = ["--out", str(tmp_path), "--problems", "6", "--samples", "4", "--bits", "3", "--seeds", "0", "1"]
    assert script.main(given) == 0
    runs = (tmp_path / "runs.csv").read_text().splitlines()
    assert len(runs) == 1 + 1 + 4 and runs[1].startswith("embedded,,full precision,0,")
    text = (tmp_path / "comparison.md").read_text()
    assert "| gptq − rtn | 3 |" in text and "python scripts/compare_quantizers.py --problems 6" in text
    assert (tmp_path / "comparison.png").stat().st_size > 10_000 and (tmp_path / "comparison.svg").is_file()
    differences = (tmp_path / "differences.csv").read_text().splitlines()
    assert len(differences) == 3 and differences[1].startswith("embedded,3,gptq,rtn,loss_nats,")
