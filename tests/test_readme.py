"""What the README and the documents say works as written."""

import importlib
import re
from pathlib import Path

import datasets
import pytest
from datasets import Dataset
from tests_support import build_model, build_tokenizer

from rltok.cli import main
from rltok.credit import CREDIT, TokenGroupAverage
from rltok.objective import HAPO, OBJECTIVE
from rltok.recipe import load_recipe
from rltok.rewards import REWARDS
from rltok.sampling import DECODING
from rltok.selection import SELECTION

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


def block(language: str) -> str:
    return blocks(language)[0]


@pytest.fixture
def model_folder(tmp_path):
    tokenizer = build_tokenizer()
    build_model(tokenizer).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_python_example_builds_the_trainer_it_describes(tmp_path, model_folder, monkeypatch):
    rows = Dataset.from_list([{"question": f"{i}+1?", "answer": f"so\n#### {i + 1}"} for i in range(64)])
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: rows)
    monkeypatch.chdir(tmp_path)
    code = block("python").replace("Qwen/Qwen2.5-0.5B-Instruct", str(model_folder))
    code = code.replace("CreditConfig(", "CreditConfig(use_cpu=True, bf16=False, report_to=[],", 2)
    code = code.replace("import CreditConfig(use_cpu=True, bf16=False, report_to=[],", "import CreditConfig")
    assert code.rstrip().endswith("trainer.train()")
    names: dict = {}
    exec(code.rstrip().removesuffix("trainer.train()"), names)
    trainer = names["trainer"]
    assert trainer.doors.credit == TokenGroupAverage() and trainer.doors.objective == (HAPO(),)
    assert trainer.doors.rollout.decoding[0].tau == 0.05
    completion = [[{"role": "assistant", "content": "it is #### 5"}]] * 2
    (reward,) = trainer.reward_funcs
    assert reward(prompts=["", ""], completions=completion, completion_ids=[[1], [1]], answer=["5", "6"]) == [1.0, 0.0]


def test_yaml_example_passes_check(tmp_path, model_folder, monkeypatch, capsys):
    (tmp_path / "my.yaml").write_text(block("yaml"), encoding="utf-8")
    (tmp_path / "rows.jsonl").write_text(
        "".join(f'{{"question": "{i}+1?", "answer": "#### {i + 1}"}}\n' for i in range(400)), encoding="utf-8"
    )
    monkeypatch.chdir(tmp_path)
    local = [f"model.path={model_folder}", "data.source=file", "data.path=rows.jsonl", "training.bf16=false"]
    with pytest.raises(SystemExit) as stop:
        main(["check", "my.yaml", "training.learning_rate=1e-6", *local])
    shown = capsys.readouterr()
    assert stop.value.code in (0, None), shown
    assert "beta: 0.5" in shown.out and "metric: strict" in shown.out and "learning_rate: 1.0e-06" in shown.out


def test_the_cache_policy_example_is_a_recipe(tmp_path):
    whole, policy = blocks("yaml")
    (tmp_path / "my.yaml").write_text("defaults: dapo.yaml\n" + policy, encoding="utf-8")
    assert load_recipe(tmp_path / "my.yaml").rollout["kv"]["budget"] == 512
    assert len(blocks("python")) == 1 and "defaults:" in whole


def test_tables_name_every_method():
    methods = (ROOT / "docs" / "methods.md").read_text(encoding="utf-8")
    for name in (*CREDIT, *SELECTION, *OBJECTIVE, *DECODING):
        assert f"`{name}`" in README, name
        assert name in methods, name
    for name in REWARDS:
        assert f"`{name}`" in methods, name


def test_functions_live_where_the_document_says():
    text = (ROOT / "docs" / "methods.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (`.*) \| `(rltok[\w.]*)` \|$", text, flags=re.MULTILINE)
    assert len(rows) > 12
    for functions, module in rows:
        for name in re.findall(r"`(\w+)", functions):
            assert hasattr(importlib.import_module(module), name), (module, name)


def test_files_named_in_the_readme_exist():
    for path in re.findall(r"\]\(([^)]+)\)", README):
        assert (ROOT / path).exists(), path
    for path in ("trainers", "rewards", "configs"):
        assert (ROOT / path).is_symlink()
