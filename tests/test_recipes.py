"""Recipes: layers, overrides and errors; every shipped recipe checks, and every hub recipe trains on stand-ins."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from rich.console import Console
from tests_support import build_model, build_tokenizer

from rltok.config import ConfigError
from rltok.estimate import check_combination, estimate
from rltok.recipe import Recipe, find_recipe, load_recipe, merged, shipped_recipes

TASKS = sorted(set(shipped_recipes()) - {"base"})
HUB = sorted(name for name in TASKS if "qwen" in name or name == "countdown")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def reload(recipe: Recipe, folder: Path) -> Recipe:
    return load_recipe(write(folder / "resolved.yaml", recipe.to_yaml()))


# Shipped recipes


def test_the_promised_recipes_are_there() -> None:
    assert {"base", "demo", "smoke", "dapo", "countdown"} <= set(shipped_recipes())
    assert {"d3s", "d3s_random", "pods", "d3s_gsm8k_qwen2.5_0.5b"} <= set(shipped_recipes())
    assert {"gsm8k_qwen2.5_0.5b", "gsm8k_qwen2.5_0.5b_lora"} <= set(shipped_recipes())
    assert {"dapo_math_qwen2.5_1.5b", "dapo_math_qwen2.5_7b"} <= set(shipped_recipes())
    assert all(line for line in shipped_recipes().values()), "every recipe starts with a comment that says what it is"


@pytest.mark.parametrize("name", TASKS)
def test_shipped_recipe_checks_and_loads_back_equal(name: str, folder: Path) -> None:
    recipe = load_recipe(name)
    assert recipe.name == name
    args = check_combination(recipe)
    assert args.loss_type == "dapo" and args.seed == recipe.seed
    assert reload(recipe, folder) == recipe


def test_words_that_yaml_reads_as_booleans_need_no_quotes() -> None:
    recipe = load_recipe("smoke", ["training.save_strategy=no", "rollout.correction.mode=off", "report.progress=off"])
    assert recipe.training["save_strategy"] == "no" and recipe.report.progress == "off"
    assert recipe.rollout is not None and recipe.rollout["correction"]["mode"] == "off"
    assert check_combination(recipe).save_strategy == "no"


def test_demo_is_hapo_with_several_updates_per_rollout() -> None:
    demo, dapo = load_recipe("demo"), load_recipe("dapo")
    assert demo.objective["type"] == "hapo" and demo.objective["alpha"] == demo.objective["beta"] == 1.0
    assert demo.credit["type"] == "token_group_average"
    assert demo.rollout["decoding"][0] | {"tau": 0.05} == demo.rollout["decoding"][0]
    assert (dapo.objective, dapo.credit, dapo.rollout) == (None, None, None)
    assert demo.training == dapo.training and demo.data == dapo.data
    assert demo.training["steps_per_generation"] > demo.training["gradient_accumulation_steps"]
    assert demo.report.to == []


def test_the_arms_of_the_selection_experiment_differ_in_the_selection_only() -> None:
    dapo, d3s, random, pods = (load_recipe(name) for name in ("dapo", "d3s", "d3s_random", "pods"))
    for arm in (d3s, random, pods):
        assert (arm.training, arm.data, arm.rewards, arm.model) == (dapo.training, dapo.data, dapo.rewards, dapo.model)
        assert (arm.credit, arm.objective, arm.rollout) == (None, None, None)
    assert dapo.selection is None and {**d3s.selection, "type": "random"} == {**random.selection, "drop_zero": False}
    (line,) = [line for line in estimate(d3s, check_combination(d3s)) if line.startswith("selection:")]
    assert "64 of 256 completions and 20% of their tokens at the start, 256 of 256" in line
    (line,) = [line for line in estimate(pods, check_combination(pods)) if line.startswith("selection:")]
    assert line == "selection: trains at most 64 of 256 completions and 100% of their tokens"


def test_the_arms_of_the_attention_experiment_differ_in_one_option() -> None:
    base, dapo = load_recipe("preplan"), load_recipe("dapo")
    assert (base.training, base.data, base.rewards, base.selection) == (dapo.training, dapo.data, dapo.rewards, None)
    changes = {"local": {"strategy": "local"}, "global": {"strategy": "global"}}
    changes |= {"shuffled": {"control": "shuffled"}, "entropy": {"control": "entropy"}}
    for name, change in changes.items():
        arm = load_recipe(f"preplan_{name}")
        assert arm.credit == base.credit | change and arm.training == base.training, name


def test_hapo_official_settings() -> None:
    """The card's table: 512 prompts x 16 responses, 16 updates per rollout, on 32 devices."""
    for name, context in (("dapo_math_qwen2.5_1.5b", 16384), ("dapo_math_qwen2.5_7b", 32768)):
        recipe = load_recipe(name)
        t = recipe.training
        per_step = t["per_device_train_batch_size"] * 32
        assert per_step * t["steps_per_generation"] == 512 * 16
        assert per_step * t["gradient_accumulation_steps"] == 512
        assert t["steps_per_generation"] / t["gradient_accumulation_steps"] == 16
        assert (t["learning_rate"], t["weight_decay"], t["max_grad_norm"]) == (1e-6, 0.1, 1.0)
        assert (t["epsilon"], t["epsilon_high"], t["delta"], t["beta"]) == (0.2, 0.28, 10.0, 0.0)
        assert t["max_completion_length"] == recipe.rewards["overlong"]["max_tokens"] == 10240
        assert recipe.rewards["overlong"]["cache_tokens"] == 4096
        assert recipe.model.config_overrides["max_position_embeddings"] == context


def stand_in_rows(name: str, count: int = 24) -> list[dict[str, Any]]:
    """Rows with the columns of the hub dataset that a recipe names."""
    if "gsm8k" in name:
        return [
            {"question": f"what is {i} plus {i}?", "answer": f"{i}+{i}={2 * i}\n#### {2 * i}"} for i in range(count)
        ]
    return [
        {
            "data_source": "math_dapo",
            "prompt": [{"role": "user", "content": f"solve. the last line is answer: x. what is {i} times {i % 3}?"}],
            "ability": "math",
            "reward_model": {"ground_truth": str(i * (i % 3)), "style": "rule"},
            "extra_info": {"index": f"row {i}"},
        }
        for i in range(count)
    ]


@pytest.fixture(scope="module")
def random_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    tokenizer = build_tokenizer()
    build_model(tokenizer, max_position_embeddings=512).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


@pytest.mark.parametrize("name", HUB)
def test_hub_recipe_trains_on_stand_ins(name: str, folder: Path, random_model: Path) -> None:
    """The same code as with the real model and dataset: only sizes and places are overridden."""
    from rltok.run import train

    overrides = [
        f"model.path={random_model}",
        "training.max_steps=2",
        "training.num_generations=2",
        "training.per_device_train_batch_size=2",
        "training.gradient_accumulation_steps=1",
        "training.steps_per_generation=2",
        "training.max_completion_length=6",
        "training.warmup_steps=0",
        "training.save_steps=2",
        "evaluation.rows=3",
        "expect=[]",
        "output_dir=out",
    ]
    if name == "countdown":
        overrides += ["data.train_size=8", "data.heldout_size=4"]
    else:
        write(folder / "rows.jsonl", "\n".join(json.dumps(row) for row in stand_in_rows(name)))
        overrides += ["data.source=file", "data.path=rows.jsonl", "data.heldout_size=4"]
    if "qlora" in name:
        overrides += ["model.quantization=null"]  # bitsandbytes may be missing; tests/test_model_loading.py has it
    if "dapo_math" in name:
        overrides += ["rewards.overlong.cache_tokens=2"]
    recipe = load_recipe(name, overrides)
    assert train(recipe, Console(quiet=True)) == 0
    out = folder / "out"
    summary = json.loads((out / "summary.json").read_text())
    assert summary["steps"] == 2 and summary["recipe"] == name
    for key in ("strict_before", "strict_after", "lenient_before", "lenient_after"):
        assert 0.0 <= summary[key] <= 1.0
    assert (out / "checkpoint-2" / "adapter_config.json").is_file() == ("lora" in name)
    assert load_recipe(out / "recipe.yaml") == recipe


# Layers


def test_child_lists_only_what_differs(folder: Path) -> None:
    child = write(
        folder / "child.yaml",
        "defaults: demo\nseed: 3\ntraining: {learning_rate: 1e-3}\nobjective: null\nrewards: {lenient: null}\n",
    )
    recipe, demo = load_recipe(child), load_recipe("demo")
    assert recipe.name == "child" and recipe.seed == 3
    assert recipe.training == demo.training | {"learning_rate": 1e-3}
    assert recipe.objective is None and recipe.credit == demo.credit
    assert list(recipe.rewards) == ["strict"]


def test_defaults_may_be_a_list_relative_to_the_file(folder: Path) -> None:
    write(folder / "parts" / "fast.yaml", "training: {max_steps: 7}\n")
    child = write(folder / "parts" / "child.yaml", "defaults: [demo.yaml, fast.yaml]\ntraining: {save_steps: 5}\n")
    recipe = load_recipe(child)
    assert recipe.training["max_steps"] == 7 and recipe.training["save_steps"] == 5
    assert recipe.objective["type"] == "hapo"


def test_a_file_may_build_on_the_shipped_one_of_its_name(folder: Path) -> None:
    recipe = load_recipe(write(folder / "demo.yaml", "defaults: demo.yaml\nseed: 5\n"))
    assert recipe.seed == 5 and recipe.objective["type"] == "hapo"


def test_new_type_drops_the_old_options(folder: Path) -> None:
    child = write(folder / "child.yaml", "defaults: demo\nobjective: {type: kl_cov, coef: 0.5}\n")
    assert load_recipe(child).objective == {"type": "kl_cov", "ratio": 0.0002, "coef": 0.5}
    assert load_recipe("demo", ["objective.coef=0.5", "objective.type=kl_cov"]).objective["coef"] == 0.5
    assert load_recipe("demo", ["objective.type=hapo"]).objective == load_recipe("demo").objective


def test_new_data_source_drops_what_only_the_old_one_reads(folder: Path) -> None:
    recipe = load_recipe("gsm8k_qwen2.5_0.5b", ["data.path=rows.jsonl", "data.source=file"])
    assert recipe.data["name"] is None and recipe.data["heldout_split"] is None
    assert recipe.data["columns"] == {"prompt": "question"}, "what both sources read stays"
    assert recipe.data["path"] == str(folder / "rows.jsonl")


def test_null_means_none_where_allowed_else_the_default() -> None:
    recipe = load_recipe("demo", ["training.learning_rate=null", "training.max_completion_length=null", "credit=null"])
    assert "learning_rate" not in recipe.training
    assert recipe.training["max_completion_length"] is None
    assert recipe.credit is None
    assert load_recipe("gsm8k_qwen2.5_0.5b_lora", ["model.lora=null"]).model.lora is None


def test_circles_are_found(folder: Path) -> None:
    write(folder / "a.yaml", "defaults: b.yaml\n")
    write(folder / "b.yaml", "defaults: a.yaml\n")
    with pytest.raises(ConfigError, match=r"circle: a\.yaml -> b\.yaml -> a\.yaml"):
        load_recipe(folder / "a.yaml")


def test_references_and_literal_dollars(folder: Path) -> None:
    text = "defaults: demo\nseed: 4\ntraining: {data_seed: '${seed}'}\nreport: {project: 'costs \\${1}'}\n"
    recipe = load_recipe(write(folder / "child.yaml", text))
    assert recipe.training["data_seed"] == 4
    assert recipe.report.project == "costs ${1}"
    assert reload(recipe, folder) == recipe
    with pytest.raises(ConfigError, match="sead"):
        load_recipe("demo", ["training.data_seed=${sead}"])


def test_paths_belong_to_the_file_that_names_them(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(folder / "mine" / "score.py", "def score(completions, **columns):\n    return [0.5] * len(completions)\n")
    write(
        folder / "mine" / "child.yaml",
        "defaults: gsm8k_qwen2.5_0.5b\ndata: {source: file, path: rows.jsonl}\nmodel: {path: ./model}\n"
        "rewards: {mine: {function: 'score.py:score', weight: 0.5}}\n",
    )
    elsewhere = folder / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    recipe = load_recipe(folder / "mine" / "child.yaml")
    assert recipe.data["path"] == str(folder / "mine" / "rows.jsonl")
    assert recipe.model.path == str(folder / "mine" / "model")
    assert recipe.rewards["mine"]["function"] == f"{folder}/mine/score.py:score"
    assert load_recipe("demo", ["model.path=./here"]).model.path == str(elsewhere / "here")
    assert load_recipe("demo", ["model.path=some/hub-id"]).model.path == "some/hub-id"


# Overrides


def test_override_values_are_yaml() -> None:
    recipe = load_recipe(
        "demo",
        [
            "training.learning_rate=3e-5",
            "rewards.strict.weight=2",
            "rollout.decoding[0].tau=0.1",
            "data.tasks.0.weight=0.5",
            "report.to=[tensorboard]",
            "evaluation.before=off",
            "rewards.short={function: length, weight: 0.1}",
            "name=other",
        ],
    )
    assert recipe.training["learning_rate"] == 3e-5
    assert recipe.rewards["strict"]["weight"] == 2
    assert recipe.rollout["decoding"][0]["tau"] == 0.1
    assert recipe.data["tasks"][0]["weight"] == 0.5 and recipe.data["tasks"][1]["weight"] == 0.2
    assert recipe.report.to == ["tensorboard"] and recipe.evaluation.before is False
    assert recipe.rewards["short"] == {"function": "length", "weight": 0.1}
    assert recipe.name == "other"


def test_overrides_reach_into_a_list_of_objectives(folder: Path) -> None:
    child = write(folder / "child.yaml", "defaults: demo\nobjective: [{type: hapo}, {type: clip_cov}]\n")
    for text in ("objective[0].alpha=0.5", "objective.0.alpha=0.5"):
        recipe = load_recipe(child, [text])
        assert [term["type"] for term in recipe.objective] == ["hapo", "clip_cov"]
        assert recipe.objective[0]["alpha"] == 0.5


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("training.learning_rat=1", ["training.learning_rat: unknown key", "did you mean 'learning_rate'"]),
        ("training.lr=1", ["did you mean 'learning_rate'"]),
        ("training.learning_rate=fast", ["training.learning_rate: 'fast' is not a valid float"]),
        ("seed=-1", ["seed: -1; allowed: 0 to 4294967295"]),
        ("seed=4294967296", ["allowed: 0 to 4294967295"]),
        ("traning.max_steps=1", ["traning: unknown key", "did you mean 'training'"]),
        ("credit.type=token_group", ["credit.type: unknown type", "did you mean 'token_group_average'"]),
        ("objective.alpah=1", ["objective.alpah: unknown key", "did you mean 'alpha'"]),
        ("objective.sign=minus", ["objective.sign: 'minus' is not valid", "signed", "released"]),
        ("rollout.decoding[0].tau=x", ["rollout.decoding[0].tau: 'x' is not a valid float"]),
        ("rollout.decoding[3].tau=1", ["rollout.decoding has 1 item"]),
        ("objective[0].alpha=1", ["objective is not a list"]),
        ("rollout.corection=1", ["rollout.corection: unknown key", "did you mean 'correction'"]),
        ("rewards.strict.frm=x", ["rewards.strict.frm", "did you mean 'form'"]),
        ("rewards.strict.function=strict", ["rewards.strict.function", "did you mean 'strict_accuracy'"]),
        ("data.tasks[0].task=chain_sums", ["data.tasks[0].task", "did you mean 'chain_sum'"]),
        ("data.sources=file", ["data.sources: unknown key", "did you mean 'source'"]),
        ("model.lora.rank=3", ["model.lora.rank: unknown key"]),
        ("model.dtype=float", ["model.dtype: 'float' is not valid", "float32"]),
        ("evaluation.rows=many", ["evaluation.rows: 'many' is not a valid int | None"]),
        ("evaluation.num_samples=4", ["evaluation.num_samples", "evaluation.temperature"]),
        ("report.to=[mlflow]", ["report.to", "mlflow"]),
        ("resume", ["write key.path=value"]),
        ("expect=[max(rewardd]", ["expect", "not an expression"]),
        ("expect=['import os']", ["expect", "not an expression"]),
    ],
)
def test_wrong_override_says_where_what_and_what_instead(override: str, words: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        load_recipe("demo", [override])
    for word in (override.split("=")[0], *words):
        assert word in str(caught.value)


@pytest.mark.parametrize(
    ("key", "place"),
    [
        ("seed", "`seed`"),
        ("output_dir", "`output_dir`"),
        ("reward_weights", "`rewards.<name>.weight`"),
        ("credit", "`credit`"),
        ("report_to", "`report.to`"),
        ("log_completions", "`report.completions`"),
        ("run_name", "`name`"),
        ("resume_from_checkpoint", "`resume`"),
        ("hub_token", "`hf auth login`"),
    ],
)
def test_one_place_for_every_setting(key: str, place: str) -> None:
    with pytest.raises(ConfigError, match=f"training.{key}") as caught:
        load_recipe("demo", [f"training.{key}=1"])
    assert f"set {place}" in str(caught.value)


# Errors in files


def test_errors_name_file_and_line(folder: Path) -> None:
    child = write(folder / "child.yaml", "defaults: demo\n\ntraining:\n  max_steps: 3\n  learning_rat: 1.0\n")
    with pytest.raises(ConfigError, match=r"child\.yaml:5: training\.learning_rat: unknown key"):
        load_recipe(child)
    child = write(folder / "child.yaml", "defaults: demo\nrollout:\n  decoding:\n    - type: adaptive\n")
    with pytest.raises(ConfigError, match=r"child\.yaml:4: rollout\.decoding\[0\]\.type: unknown type 'adaptive'"):
        load_recipe(child)
    broken = write(folder / "broken.yaml", "training:\n  max_steps: [1\n")
    with pytest.raises(ConfigError, match=r"broken\.yaml:\d+: not valid YAML"):
        load_recipe(broken)
    twice = write(folder / "twice.yaml", "seed: 1\nseed: 2\n")
    with pytest.raises(ConfigError, match=r"twice\.yaml:2: not valid YAML: found duplicate key"):
        load_recipe(twice)
    with pytest.raises(ConfigError, match="a recipe is a mapping"):
        load_recipe(write(folder / "list.yaml", "- 1\n"))


def test_missing_sections_and_recipes(folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"demoo: no such recipe file; did you mean 'demo'"):
        find_recipe("demoo")
    with pytest.raises(ConfigError, match="data: missing"):
        load_recipe(write(folder / "a.yaml", "model: {path: tiny-reasoner}\n"))
    with pytest.raises(ConfigError, match="model.path: missing"):
        load_recipe(write(folder / "a.yaml", "seed: 1\n"))
    with pytest.raises(ConfigError, match="rewards: missing"):
        load_recipe(write(folder / "a.yaml", "defaults: demo\nrewards: null\n"))


def test_combinations_are_refused_with_both_settings() -> None:
    with pytest.raises(ConfigError, match=r"top_p=0\.9"):
        check_combination(load_recipe("demo", ["training.top_p=0.9"]))
    with pytest.raises(ConfigError, match=r"importance_sampling_level"):
        check_combination(load_recipe("demo", ["training.importance_sampling_level=sequence"]))
    with pytest.raises(ConfigError, match=r"training: .*num_generations"):
        check_combination(load_recipe("demo", ["training.num_generations=7"]))


def test_yaml_of_the_files_is_plain(folder: Path) -> None:
    """Any YAML reader gets the values that ours gets; only 1e-4 without a point needs ours."""
    values, marks = merged("dapo")
    path = find_recipe("dapo")
    assert yaml.safe_load(path.read_text())["data"] == values["data"]
    assert marks["training.learning_rate"].startswith(f"{path}:")
