"""Supervised fine-tuning: recipes, rows, the trainer's losses, and whole runs of the command on tiny models."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from tests_support import build_model, build_tokenizer, run_on_ranks
from torch import Tensor
from torch.nn.functional import cross_entropy, kl_div
from transformers import AutoModelForCausalLM
from trl import SFTConfig, SFTTrainer

from rltok.cli import main
from rltok.config import ConfigError
from rltok.data.sft_rows import SFTDataConfig, load_sft_data
from rltok.models import QUANTIZER_MARKS, ModelConfig, load_model
from rltok.quant.qat import collecting, collecting_teacher, is_converted
from rltok.quant.qat_losses import distribution_loss, entropy_loss
from rltok.recipe import Recipe, load_recipe, shipped_recipes
from rltok.sft_recipe import SFT_DIR, load_sft_recipe
from rltok.trainers.sft_trainer import QATSFTTrainer

TOKENIZER = build_tokenizer()
EDGE = {"entropy": 0.5, "distribution": 1.0, "distillation": {"gamma": 0.5, "temperature": 2.0}}


def pairs(rows: int = 12) -> Dataset:
    """Prompts and completions of different lengths."""
    made = [{"prompt": f"{i}+{i * 37 % 100}=", "completion": str(i + i * 37 % 100)} for i in range(rows)]
    return Dataset.from_list(made)


def settings(folder: Path, **changes: Any) -> SFTConfig:
    values: dict[str, Any] = {
        "output_dir": str(folder),
        "per_device_train_batch_size": 4,
        "max_steps": 2,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "report_to": [],
        "save_strategy": "no",
        "use_cpu": True,
        "disable_tqdm": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "train_sampling_strategy": "sequential",
        "lr_scheduler_type": "constant",
    }
    return SFTConfig(**(values | changes))


def trainer(folder: Path, section: dict[str, Any] | None, rows: int = 12, **changes: Any) -> QATSFTTrainer:
    data = pairs(rows)
    args = settings(folder, **changes)
    return QATSFTTrainer(
        build_model(TOKENIZER), args, quantization_aware=section, train_dataset=data, eval_dataset=data,
        processing_class=TOKENIZER,
    )  # fmt: skip


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("sft") / "model"
    build_model(TOKENIZER).save_pretrained(path)
    TOKENIZER.save_pretrained(path)
    return path


@pytest.fixture
def folder(tmp_path: Path, model_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A working directory with rows and a recipe."""
    monkeypatch.chdir(tmp_path)
    rows = [{"question": f"{i}+{i}=", "solution": str(2 * i), "answer": str(2 * i)} for i in range(40)]
    (tmp_path / "rows.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    (tmp_path / "tiny.yaml").write_text(f"""
model: {{path: {model_folder}}}
data:
  source: file
  path: rows.jsonl
  columns: {{prompt: question, completion: solution}}
  heldout_size: 8
training:
  max_steps: 4
  per_device_train_batch_size: 4
  learning_rate: 0.01
  gradient_checkpointing: false
  bf16: false
  logging_steps: 1
  save_steps: 2
report: {{progress: lines}}
""")
    yield tmp_path


def run(*arguments: str) -> int:
    with pytest.raises(SystemExit) as ended:
        main(["sft", *arguments])
    return int(ended.value.code or 0)


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert run(*arguments) == 2
    return capsys.readouterr().err


# Recipes


@pytest.mark.parametrize("name", sorted(shipped_recipes(SFT_DIR)))
def test_a_shipped_recipe_checks_and_loads_back_equal(name: str, tmp_path: Path) -> None:
    recipe = load_sft_recipe(name)
    (tmp_path / "again.yaml").write_text(recipe.to_yaml())
    assert load_sft_recipe(tmp_path / "again.yaml") == recipe and recipe.name == name
    assert shipped_recipes(SFT_DIR)[name], "it starts with a comment that says what it is"
    assert type(load_recipe("dapo")) is Recipe and load_recipe("dapo").data["tasks"] == recipe.data["tasks"]


def test_edge_qat_is_the_demo_with_quantisers() -> None:
    plain, edge = load_sft_recipe("sft"), load_sft_recipe("sft_edge_qat")
    assert plain.quantization_aware is None and edge.quantization_aware is not None
    assert (edge.quantization_aware["weight_bits"], edge.quantization_aware["activation_bits"]) == (4, 8)
    assert (edge.training, edge.data, edge.rewards) == (plain.training, plain.data, plain.rewards)


def test_recipes_of_sft_are_not_among_those_of_train(capsys: pytest.CaptureFixture[str]) -> None:
    assert "sft_edge_qat" not in shipped_recipes()
    with pytest.raises(SystemExit):
        main(["recipes"])
    assert "sft_edge_qat" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("training.learning_rat=1", "training.learning_rat: unknown key 'learning_rat'; did you mean 'learning_rate'"),
        ("training.max_steps=many", "training.max_steps: 'many' is not a valid int"),
        ("training.num_generations=4", "training.num_generations: unknown key"),
        ("training.seed=3", "training.seed: set `seed` instead"),
        ("training.dataset_text_field=body", "set `data.columns.text` instead"),
        ("credit.type=hapo", "credit: unknown key 'credit'"),
        ("data.habits=good", "data.habits: 'good' is not valid; Allowed: careful, mixed"),
        ("data.max_prompt_tokens=5", "data.max_prompt_tokens: has no meaning for supervised fine-tuning"),
        ("quantization_aware.weight_bits=1", "weight_bits=1; allowed: 2 to 8, or 32"),
        ("quantization_aware.gamma=1", "quantization_aware.gamma: unknown key"),
        ("evaluation.quant={bits: 4}", "evaluation.quant: quantises weights that quantization_aware has rounded"),
        ("report.samples.rows=3", "report.samples: belongs to `rltok train`"),
    ],
)
def test_wrong_settings_are_named(override: str, words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert words in refused(capsys, "sft_edge_qat", override, "--resolved")


def test_an_error_names_file_and_line(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = (folder / "tiny.yaml").read_text()
    (folder / "bad.yaml").write_text(text.replace("max_steps: 4", "max_step: 4"))
    assert "bad.yaml:9: training.max_step: unknown key" in refused(capsys, "bad.yaml")
    assert "no such recipe file; did you mean 'sft_edge_qat'?" in refused(capsys, "sft_edge_qad")


def test_worked_solutions_exist_for_two_tasks_only() -> None:
    with pytest.raises(ConfigError, match="no worked solutions of 'leg_counting'; Allowed: chain_sum, countdown"):
        SFTDataConfig(source="reasoning_gym", task="leg_counting", train_size=4, heldout_size=2)


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["model.lora={r: 4}"], "trains the steps of all weights, which an adapter leaves frozen"),
        (
            ["training.packing=true", "quantization_aware.low_share=0.5"],
            "quantization_aware.low_share: 0.5 looks at one text per row, but training.packing lays several into a row",
        ),
        (
            ["training.padding_free=true", "quantization_aware.distribution=1.0"],
            "quantization_aware.distribution: 1.0 looks at one text per row, but training.padding_free",
        ),
        (
            [
                "training.gradient_checkpointing=true",
                "training.gradient_checkpointing_kwargs={use_reentrant: true}",
                "quantization_aware.entropy=1.0",
            ],
            "reentrant checkpointing loses",
        ),
        (["model.attn_implementation=eager"], "attn_implementation='eager' cannot be quantised; allowed: 'sdpa'"),
    ],
)
def test_settings_that_exclude_each_other(
    overrides: list[str], words: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ["quantization_aware.weight_bits=4", *overrides]
    assert words in refused(capsys, "tiny.yaml", *given, "evaluation.before=false")


# Rows


def write_rows(path: Path, rows: Sequence[dict[str, Any]]) -> str:
    path.write_text("\n".join(json.dumps(row) for row in rows))
    return str(path)


def test_rows_of_a_file_in_three_forms(tmp_path: Path) -> None:
    asked = [{"q": f"{i % 6}?", "a": f"{i}", "body": f"text {i}"} for i in range(12)]
    path = write_rows(tmp_path / "rows.jsonl", asked)
    config = SFTDataConfig(
        source="file", path=path, columns={"prompt": "q", "completion": "a"}, template="say {prompt}",
        system="be short", heldout_size=2,
    )  # fmt: skip
    splits = load_sft_data(config)
    assert splits.train.column_names == ["prompt", "completion"] and "body" in splits.heldout.column_names
    told = [row["prompt"][1]["content"] for row in splits.train]
    held = [row["prompt"][1]["content"] for row in splits.heldout]
    assert len(splits.train) == 8 and len(held) == 4, "two of six distinct prompts, with both of their rows each"
    assert not set(told) & set(held) and all(text.startswith("say ") for text in told)
    assert splits.train[0]["completion"][0]["role"] == "assistant"

    whole = load_sft_data(SFTDataConfig(source="file", path=path, columns={"text": "body"}, heldout_fraction=0.25))
    assert whole.train.column_names == ["text"] and (len(whole.train), len(whole.heldout)) == (9, 3)

    talk = [
        {"messages": [{"role": "user", "content": str(i)}, {"role": "assistant", "content": "ok"}]} for i in range(5)
    ]
    path = write_rows(tmp_path / "talk.jsonl", talk)
    assert load_sft_data(SFTDataConfig(source="file", path=path, heldout_size=1)).train.column_names == ["messages"]


def test_rows_that_cannot_be_read(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "rows.jsonl", [{"q": "1", "a": "2"}, {"q": "2", "a": ""}])
    with pytest.raises(ConfigError, match="the source has the columns q, a; needed are prompt and completion"):
        load_sft_data(SFTDataConfig(source="file", path=path))
    with pytest.raises(ConfigError, match="data.columns.completion: the source has no column 'b'"):
        load_sft_data(SFTDataConfig(source="file", path=path, columns={"prompt": "q", "completion": "b"}))
    with pytest.raises(ConfigError, match="data.columns.completion: a row holds ''"):
        load_sft_data(SFTDataConfig(source="file", path=path, columns={"prompt": "q", "completion": "a"}))
    with pytest.raises(ConfigError, match="data.system: makes prompts, but the rows are whole"):
        load_sft_data(SFTDataConfig(source="file", path=path, columns={"text": "q"}, system="be short"))


def test_worked_solutions_are_right_and_the_held_out_ones_do_not_move() -> None:
    options = {"min_terms": 3, "max_terms": 3, "min_digits": 1, "max_digits": 1}
    config = SFTDataConfig(task="chain_sum", task_options=options, template="compute {metadata[expression]}",
                           train_size=20, heldout_size=10)  # fmt: skip
    first, second = load_sft_data(config, seed=0), load_sft_data(config, seed=1)
    assert first.heldout["completion"][:] == second.heldout["completion"][:]
    assert first.train["completion"][:] != second.train["completion"][:]
    for row in first.heldout:
        assert row["completion"][0]["content"].endswith(f"<answer>{row['answer']}</answer>")
    assert not {json.dumps(p) for p in first.train["prompt"]} & {json.dumps(p) for p in first.heldout["prompt"]}


# The trainer


def weights(model: torch.nn.Module) -> dict[str, Tensor]:
    state = model.state_dict()
    return {name: value.clone() for name, value in state.items() if not any(mark in name for mark in QUANTIZER_MARKS)}


@pytest.mark.parametrize("section", [None, {"weight_bits": 32, "activation_bits": 32}])
def test_everything_off_is_trl_bit_for_bit(section: dict[str, Any] | None, tmp_path: Path) -> None:
    ours = trainer(tmp_path / "a", section)
    ours.train()
    theirs = SFTTrainer(
        build_model(TOKENIZER), settings(tmp_path / "b"), train_dataset=pairs(), processing_class=TOKENIZER
    )
    theirs.train()
    found, expected = weights(ours.model), weights(theirs.model)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in found)
    start = weights(build_model(TOKENIZER))
    assert any(not torch.equal(found[name], start[name]) for name in found)


def test_quantisers_at_32_bits_compute_the_plain_loss(tmp_path: Path) -> None:
    """With a loss on, so that the quantisers are in place: the cross-entropy inside it is unchanged, bit for bit."""
    off = {"weight_bits": 32, "activation_bits": 32}
    losses = []
    for section in (None, off | {"distribution": 1.0}):  # the student is its own teacher: the loss is exactly 0
        made = trainer(tmp_path, section)
        made.prepare_quantization()
        losses.append(loss_of(made, batch_of(made)))
    assert torch.equal(losses[0], losses[1])


def batch_of(made: QATSFTTrainer, rows: slice = slice(0, 4)) -> dict[str, Tensor]:
    return made._collated([made.train_dataset[i] for i in range(*rows.indices(len(made.train_dataset)))])


def loss_of(made: QATSFTTrainer, batch: dict[str, Tensor], items: int | None = None) -> Tensor:
    made.model.train()
    made.current_gradient_accumulation_steps = 1
    return made.compute_loss(made.model, dict(batch), num_items_in_batch=items)


def test_the_loss_is_the_formula(tmp_path: Path) -> None:
    made = trainer(tmp_path, {"weight_bits": 4, "activation_bits": 8, **EDGE})
    teacher = build_model(TOKENIZER).eval()
    made.prepare_quantization()
    batch = batch_of(made)
    assert batch["attention_mask"].min() == 0 and (batch["labels"] == -100).any(), "padding and prompts are in it"
    found = loss_of(made, batch)
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    with collecting(made.model) as ours:
        logits = made.model(**inputs).logits[:, :-1]
    with torch.no_grad(), collecting_teacher(teacher) as theirs:
        given = teacher(**inputs).logits[:, :-1]
    mask = batch["attention_mask"]

    def maps(layers: dict[int, Any]) -> list[Tensor]:
        repeated = [(one.query, one.key.repeat_interleave(2, dim=1), one.scaling) for one in layers.values()]
        return [query @ key.transpose(-1, -2) * scaling for query, key, scaling in repeated]

    chosen = batch["labels"][:, 1:] != -100
    nll = cross_entropy(logits[chosen], batch["labels"][:, 1:][chosen])
    kl = kl_div((logits / 2).log_softmax(-1)[chosen], (given / 2).softmax(-1)[chosen], reduction="batchmean")
    spread = entropy_loss([x.query for x in ours.values()], [x.key for x in ours.values()], mask, 0.5, "mean")
    expected = 0.5 * nll + 0.5 * 4 * kl + spread + distribution_loss(maps(ours), maps(theirs), mask)
    assert kl > 0
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    logged = made._metrics["train"]
    assert {"qat/entropy_loss", "qat/distribution_loss", "qat/distillation_loss"} <= logged.keys()


def gradients(folder: Path, section: dict[str, Any], batch_size: int) -> dict[str, Tensor]:
    """The weights' move in one step of SGD on eight rows, in micro-batches of some size."""
    made = trainer(
        folder, section, 8, per_device_train_batch_size=batch_size, gradient_accumulation_steps=8 // batch_size,
        max_steps=1, optim="sgd", learning_rate=1.0, max_grad_norm=0.0,
    )  # fmt: skip
    before = weights(made.model)
    made.train()
    return {name: value - before[name] for name, value in weights(made.model).items()}


def test_accumulation_is_one_big_batch(tmp_path: Path) -> None:
    """Cross-entropy, divergence and L_D: up to rounding. L_E, the log of a mean per micro-batch: close to it."""
    section = {"weight_bits": 4, "activation_bits": 32, "distillation": EDGE["distillation"], "distribution": 1.0}
    whole, parts = gradients(tmp_path, section, 8), gradients(tmp_path, section, 2)
    largest = max(float(value.abs().max()) for value in whole.values())
    worst = max(float((whole[name] - parts[name]).abs().max()) for name in whole)
    assert largest > 1e-2 and worst < 1e-5 * max(largest, 1)
    section = {"weight_bits": 4, "activation_bits": 32, "entropy": 5.0}
    whole, parts = gradients(tmp_path, section, 8), gradients(tmp_path, section, 2)
    change = sum(float((whole[n] - parts[n]).square().sum()) for n in whole) ** 0.5
    assert 0 < change < 0.2 * sum(float(value.square().sum()) for value in whole.values()) ** 0.5


@pytest.mark.slow
def test_two_processes_are_one(tmp_path: Path) -> None:
    """Cross-entropy, divergence and L_D of eight rows, on one process or four rows on each of two."""
    found = []
    for ranks in (1, 2):
        folder = tmp_path / str(ranks)
        folder.mkdir()
        run_on_ranks("sft_worker.py", ranks, folder)
        found.append(torch.load(folder / "weights.pt"))
    start = weights(build_model(TOKENIZER))
    assert max(float((found[0][name] - start[name]).abs().max()) for name in start) > 1e-2
    for name, value in found[0].items():
        torch.testing.assert_close(value, found[1][name], rtol=0, atol=1e-5)


def test_gradient_checkpointing_changes_no_gradient(tmp_path: Path) -> None:
    found = []
    for on in (False, True):
        made = trainer(tmp_path, {"weight_bits": 4, **EDGE}, max_steps=1, gradient_checkpointing=on)
        made.train()
        found.append(weights(made.model))
    for name, value in found[0].items():
        torch.testing.assert_close(value, found[1][name], rtol=0, atol=1e-6)


def test_steps_do_not_decay_and_are_trained(tmp_path: Path) -> None:
    made = trainer(tmp_path, {"weight_bits": 4}, weight_decay=0.1)
    made.prepare_quantization()
    assert not [name for name in made.get_decay_parameter_names(made.model) if "alpha" in name or "zp" in name]
    steps = {name: p.detach().clone() for name, p in made.model.named_parameters() if name.endswith("alpha")}
    made.train()
    moved = {name for name, p in made.model.named_parameters() if name in steps and not torch.equal(p, steps[name])}
    assert len(moved) > 0.9 * len(steps) > 0


def test_the_held_out_loss_weighs_tokens_alike(tmp_path: Path) -> None:
    made = trainer(tmp_path, None)
    found = made.heldout_loss(12, 5)
    assert found == pytest.approx(made.heldout_loss(12, 12), rel=1e-6)
    nats, tokens, exact = 0.0, 0, 0
    model = made.model.eval()
    for row in made.train_dataset:
        with torch.no_grad():
            logits = model(torch.tensor([row["input_ids"]])).logits[0, :-1]
        labels = torch.tensor(row["labels"][1:])
        nats += float(cross_entropy(logits, labels, ignore_index=-100, reduction="sum"))
        tokens += int((labels != -100).sum())
        exact += int(bool(((logits.argmax(-1) == labels) | (labels == -100)).all()))
    assert found["tokens"] == tokens and found["loss"] == pytest.approx(nats / tokens, rel=1e-5)
    assert found["exact"] == pytest.approx(exact / 12)


# The command


def test_a_run_from_recipe_to_converted_model(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    section = "quantization_aware={weight_bits: 4, activation_bits: 8, entropy: 0.5, distribution: 1.0, low_share: 0.5}"
    assert run("tiny.yaml", section, "output_dir=out", "rewards={len: {function: length, coef: 0.01}}",
               "evaluation.max_new_tokens=4") == 0  # fmt: skip
    out = folder / "out"
    summary = json.loads((out / "summary.json").read_text())
    assert summary["steps"] == 4 and summary["converted"] is True
    assert summary["loss_before"] > summary["loss_after"] > 0
    assert summary["loss_rounded"] not in (summary["loss_before"], summary["loss_after"])
    assert "len" in summary["after"] and (out / "evaluation_after.parquet").is_file()
    written = json.loads((out / "evaluation_after.json").read_text())
    assert written["completions"] == 8 and written["means"] == summary["after"]
    assert written["settings"] == {"decoding": [], "steering": None, "kv": None, "quant": None}
    steps = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in steps] == [1, 2, 3, 4] and "qat/entropy_loss" in steps[0]
    assert "distribution" in capsys.readouterr().out

    model = AutoModelForCausalLM.from_pretrained(out / "model").eval()
    for name, value in model.named_parameters():
        if name.endswith("_proj.weight"):
            assert len(value.unique()) <= 16, f"{name} is not on a 4-bit grid"
    loaded = load_model(ModelConfig(path=str(out / "model"))).eval()
    assert is_converted(loaded)
    rows = TOKENIZER(["12+12=24", "7+7=14"], return_tensors="pt", padding=True)
    inputs = {name: rows[name] for name in ("input_ids", "attention_mask")}
    assert not torch.equal(model(**inputs).logits, loaded(**inputs).logits), "activations are quantised"

    for name in ("model", "checkpoint-4"):
        with pytest.raises(SystemExit) as ended:
            main(["eval", str(out / name), "--output", name + ".json"])
        assert not ended.value.code and "8 completions" in capsys.readouterr().out
    judged = json.loads((folder / "model.json").read_text())["means"]
    assert judged == {key: value for key, value in summary["after"].items() if key in judged}


def test_what_is_saved_computes_what_was_trained(tmp_path: Path) -> None:
    made = trainer(tmp_path, {"weight_bits": 4, "activation_bits": 8, "low_share": 0.5})
    made.train()
    made.finish_quantization()
    made.save_final(tmp_path / "model")
    loaded = load_model(ModelConfig(path=str(tmp_path / "model"))).eval()
    batch = batch_of(made)
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    with made.sampling():  # as it is loaded: every token at the high width
        assert torch.equal(loaded(**inputs).logits, made.model.eval()(**inputs).logits)


def test_a_run_continues_where_it_would_have_been(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    section = "quantization_aware={weight_bits: 4, entropy: 0.5, distribution: 1.0, convert: false}"
    common = ["tiny.yaml", section, "evaluation.before=false"]
    assert run(*common, "output_dir=whole") == 0
    shutil.copytree(folder / "whole", folder / "cut")
    shutil.rmtree(folder / "cut" / "checkpoint-4")
    shutil.rmtree(folder / "cut" / "model")
    (folder / "cut" / "summary.json").unlink()
    assert run(*common, "output_dir=cut", "resume=auto") == 0
    capsys.readouterr()
    whole, cut = (json.loads((folder / name / "summary.json").read_text()) for name in ("whole", "cut"))
    assert whole["loss_after"] == cut["loss_after"] and cut["steps"] == 4
    assert "already holds a run; continue it with resume=auto" in refused(capsys, *common, "output_dir=cut")
    assert run(*common, "output_dir=cut", "resume=auto") == 0
    assert "is complete already" in capsys.readouterr().out.replace("\n", " ")
    changed = [*common, "output_dir=cut", "resume=cut", "training.learning_rate=0.5"]
    assert "training.learning_rate: the run in" in refused(capsys, *changed)
