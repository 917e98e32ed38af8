"""Data: the same config and seed give the same rows, and no held-out prompt is ever trained on."""

import json
from collections import Counter

import pytest
import reasoning_gym
from datasets import Dataset, DatasetDict

from rltok.config import ConfigError, build, describe
from rltok.data import DataConfig, TaskSpec, load_data
from rltok.data.reasoning_gym_rows import turns
from rltok.rewards import decode_entry


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    """The datasets library writes what it reads into its cache: keep that out of the user's."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))


def config(**values) -> DataConfig:
    return build(DataConfig, values, "data")


def user_text(row) -> str:
    return next(m["content"] for m in row["prompt"] if m["role"] == "user")


def prompts(table) -> set[str]:
    return {json.dumps(p) for p in table["prompt"]}


CHAIN = {"task": "chain_sum", "options": {"min_terms": 3, "max_terms": 4, "min_digits": 1, "max_digits": 2}}
COUNTDOWN = {"task": "countdown", "options": {"min_numbers": 3, "max_numbers": 3, "max_target": 300, "min_target": 1}}


# ---------------------------------------------------------------- reasoning-gym


def test_generated_rows_are_deterministic_and_held_out_rows_ignore_the_training_seed():
    settings = config(tasks=[CHAIN, COUNTDOWN], train_size=60, heldout_size=20)
    one, again, other = load_data(settings, 1), load_data(settings, 1), load_data(settings, 2)
    assert one.train.to_dict() == again.train.to_dict() and one.heldout.to_dict() == again.heldout.to_dict()
    assert other.heldout.to_dict() == one.heldout.to_dict()
    assert len(prompts(other.train) & prompts(one.train)) < 20  # two seeds are two streams, not one shifted by one
    moved = load_data(config(tasks=[CHAIN, COUNTDOWN], train_size=60, heldout_size=20, split_seed=5), 1)
    assert moved.heldout.to_dict() != one.heldout.to_dict()


def test_columns_of_generated_rows():
    train, heldout = load_data(config(tasks=[CHAIN, COUNTDOWN], train_size=6, heldout_size=2), 0)
    expected = {"prompt", "answer", "task", "entry", "task_options", "difficulty"}
    assert set(train.column_names) == set(heldout.column_names) == expected
    row = train[0]
    entry = decode_entry(row["entry"])
    assert row["task"] == "chain_sum" and user_text(row) == entry["question"] and row["answer"] == entry["answer"]
    assert json.loads(row["task_options"]) == CHAIN["options"]
    numbers = entry["metadata"]
    assert row["difficulty"] == f"num_terms={numbers['num_terms']} num_digits={numbers['num_digits']}"
    task = reasoning_gym.create_dataset(row["task"], **json.loads(row["task_options"]))
    assert task.score_answer(row["answer"], entry) == 1.0
    assert train[1]["task"] == "countdown" and "value=1-100" in train[1]["difficulty"]


def test_no_prompt_is_in_both_parts_even_where_the_task_is_small():
    small = {"task": "chain_sum", "options": {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1}}
    train, heldout = load_data(config(tasks=[small], train_size=400, heldout_size=60), 3)
    assert len(train) == 400 and len(heldout) == len(prompts(heldout)) == 60
    assert not prompts(train) & prompts(heldout)
    assert len(prompts(train)) <= 140  # 200 problems exist


def test_too_small_a_task_is_an_error_that_names_the_settings():
    tiny = {"task_options": {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1}, "task": "chain_sum"}
    with pytest.raises(ConfigError, match=r"data\.heldout_size: 500 rows .* 'chain_sum'.*widen"):
        load_data(config(**tiny, train_size=10, heldout_size=500))


def test_mixture_weights_are_exact_and_interleaved():
    counts = Counter(turns([3.0, 1.0], 400))
    assert counts == {0: 300, 1: 100}
    assert list(turns([1.0, 1.0], 4)) == [0, 1, 0, 1]
    for cut in range(1, 60):
        seen = Counter(turns([5.0, 2.0, 1.0], cut))
        assert all(abs(seen[i] - cut * w / 8) < 1 + 1e-9 for i, w in enumerate([5, 2, 1]))
    mixture = [{**CHAIN, "weight": 3.0, "difficulty": "easy"}, {**COUNTDOWN, "weight": 1.0}]
    train, _ = load_data(config(tasks=mixture, train_size=40, heldout_size=0))
    assert Counter(train["task"]) == {"chain_sum": 30, "countdown": 10}
    assert set(train.filter(lambda r: r["task"] == "chain_sum")["difficulty"]) == {"easy"}


def test_templates_system_and_plain_prompts():
    mixture = [{**CHAIN, "template": "Sum {metadata[expression]}"}, COUNTDOWN]
    shared = {
        "tasks": mixture,
        "train_size": 2,
        "heldout_size": 0,
        "template": "Q: {question}\nIn <answer>.",
        "system": "Hi",
    }
    train, _ = load_data(config(**shared))
    entry = decode_entry(train[0]["entry"])
    assert train[0]["prompt"] == [
        {"role": "system", "content": "Hi"},
        {"role": "user", "content": f"Sum {entry['metadata']['expression']}"},
    ]
    assert user_text(train[1]).startswith("Q: ") and user_text(train[1]).endswith("In <answer>.")
    plain, _ = load_data(config(**shared, conversational=False))
    assert plain[0]["prompt"] == f"Hi\n\nSum {entry['metadata']['expression']}"


def test_short_form_is_a_mixture_of_one():
    short = config(task="chain_sum", task_options=CHAIN["options"], train_size=8, heldout_size=2)
    long = config(tasks=[CHAIN], train_size=8, heldout_size=2)
    assert load_data(short, 4).train.to_dict() == load_data(long, 4).train.to_dict()
    assert DataConfig(tasks=[CHAIN], train_size=1, heldout_size=0).tasks == [TaskSpec(**CHAIN)]


def test_a_task_without_a_single_answer_has_an_empty_one():
    train, _ = load_data(config(task="propositional_logic", train_size=2, heldout_size=0))
    assert train["answer"][:] == ["", ""]


# ---------------------------------------------------------------- files


ROWS = [
    {"question": f"What is {i} + {i}?", "solution": f"{i} + {i} is\n#### {2 * i}", "level": i % 3} for i in range(40)
]
MAPPED = {"columns": {"prompt": "question", "answer": "solution"}, "answer_pattern": r"#### (\S+)"}


@pytest.fixture(params=["jsonl", "csv", "tsv", "parquet"])
def file(request, tmp_path):
    table = Dataset.from_list(ROWS)
    path = tmp_path / f"rows.{request.param}"
    if request.param == "jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    elif request.param == "parquet":
        table.to_parquet(path)
    else:
        table.to_pandas().to_csv(path, index=False, sep="\t" if request.param == "tsv" else ",")
    return path


def test_local_files_column_map_and_answer_pattern(file):
    settings = config(source="file", path=file.name, heldout_size=5, template="{question} ({level})", **MAPPED)
    train, heldout = load_data(settings, base_dir=file.parent)
    assert len(train) == 35 and len(heldout) == 5 and not prompts(train) & prompts(heldout)
    everything = {user_text(r): r for r in [*train, *heldout]}
    assert everything["What is 7 + 7? (1)"]["answer"] == "14"
    assert set(train.column_names) == {"question", "solution", "level", "prompt", "answer"}
    assert train["level"][:] == sorted(train["level"][:], key=lambda _: 0)  # the source's own order
    assert [int(r["answer"]) for r in train] == sorted(int(r["answer"]) for r in train)
    assert load_data(settings, 9, base_dir=file.parent).train.to_dict() == train.to_dict()


@pytest.fixture
def jsonl(tmp_path):
    def write(rows, name="rows.jsonl"):
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
        return name

    return write


def test_held_out_rows_do_not_depend_on_the_order_of_the_file_nor_on_repeats(jsonl, tmp_path):
    first, second = jsonl(ROWS), jsonl([*reversed(ROWS), *ROWS], "other.jsonl")
    one = load_data(config(source="file", path=first, **MAPPED), base_dir=tmp_path)
    two = load_data(config(source="file", path=second, **MAPPED), base_dir=tmp_path)
    assert len(one.heldout) == 4 and prompts(one.heldout) == prompts(two.heldout)  # a tenth
    assert len(two.train) == 36 and prompts(one.train) == prompts(two.train)
    other = load_data(config(source="file", path=first, split_seed=1, **MAPPED), base_dir=tmp_path)
    assert prompts(other.heldout) != prompts(one.heldout)


def test_max_rows_leaves_the_held_out_rows_alone(jsonl, tmp_path):
    name = jsonl(ROWS)
    full = load_data(config(source="file", path=name, heldout_fraction=0.25, **MAPPED), base_dir=tmp_path)
    cut = load_data(config(source="file", path=name, heldout_fraction=0.25, max_rows=3, **MAPPED), base_dir=tmp_path)
    assert len(full.heldout) == 10 and cut.heldout.to_dict() == full.heldout.to_dict()
    assert cut.train.to_dict() == full.train.select(range(3)).to_dict()


def test_a_held_out_file_wins_over_the_training_rows(jsonl, tmp_path):
    settings = config(source="file", path=jsonl(ROWS), heldout_path=jsonl(ROWS[:7], "test.jsonl"), **MAPPED)
    train, heldout = load_data(settings, base_dir=tmp_path)
    assert (len(train), len(heldout)) == (33, 7) and not prompts(train) & prompts(heldout)


def test_nothing_held_out_if_so_asked(jsonl, tmp_path):
    train, heldout = load_data(config(source="file", path=jsonl(ROWS), heldout_size=0, **MAPPED), base_dir=tmp_path)
    assert len(train) == 40 and len(heldout) == 0 and heldout.column_names == train.column_names


def test_messages_nested_columns_and_clashing_names(jsonl, tmp_path):
    rows = [
        {
            "prompt": [{"role": "user", "content": f"q{i}"}],
            "reward_model": {"ground_truth": i},
            "completions": "clash",
            "extra": i,
        }
        for i in range(4)
    ]
    shared = {"source": "file", "path": jsonl(rows), "heldout_size": 1}
    shared["columns"] = {"answer": "reward_model.ground_truth", "number": "extra"}
    train, _ = load_data(config(**shared), base_dir=tmp_path)
    assert set(train.column_names) == {"prompt", "answer", "number", "reward_model", "extra"}
    assert train[0]["prompt"] == [{"role": "user", "content": "q" + train[0]["answer"]}]
    assert train[0]["number"] == train[0]["extra"] and isinstance(train[0]["answer"], str)
    templated, _ = load_data(config(**shared, template=r"{prompt} in \boxed{{}}", system="S"), base_dir=tmp_path)
    assert templated[0]["prompt"][0] == {"role": "system", "content": "S"}
    assert user_text(templated[0]) == rf"q{templated[0]['answer']} in \boxed{{}}"


def test_a_source_without_answers(jsonl, tmp_path):
    name = jsonl([{"prompt": "a"}, {"prompt": "b"}])
    with pytest.raises(ConfigError, match=r"data\.columns\.answer: the source has no column 'answer'"):
        load_data(config(source="file", path=name, heldout_size=1), base_dir=tmp_path)
    train, _ = load_data(config(source="file", path=name, heldout_size=1, columns={"answer": ""}), base_dir=tmp_path)
    assert train.column_names == ["prompt"]


# ---------------------------------------------------------------- hub


class StandIn:
    """Plays the hub: remembers what was asked, returns rows of GSM8K's columns."""

    def __init__(self, **splits):
        self.splits, self.asked = splits, []

    def __call__(self, name, config_name=None, *, split, revision=None):
        self.asked.append((name, config_name, split, revision))
        if split not in self.splits:
            raise ValueError(f"Unknown split {split!r}. Should be one of {list(self.splits)}.")
        return self.splits[split]


GSM8K = {"source": "hub", "name": "openai/gsm8k", "config_name": "main", **MAPPED}


def test_hub_dataset_with_its_own_test_split():
    hub = StandIn(train=Dataset.from_list(ROWS[:30]), test=Dataset.from_list(ROWS[25:]))
    train, heldout = load_data(config(**GSM8K, heldout_split="test", revision="abc"), load_hub=hub)
    assert hub.asked == [("openai/gsm8k", "main", "train", "abc"), ("openai/gsm8k", "main", "test", "abc")]
    assert (len(train), len(heldout)) == (25, 15) and not prompts(train) & prompts(heldout)
    assert heldout[0]["answer"] == "50"


def test_hub_errors_name_the_setting():
    hub = StandIn(train=Dataset.from_list(ROWS), empty=Dataset.from_list([]), all=DatasetDict())
    with pytest.raises(ConfigError, match=r"data\.split: 'openai/gsm8k'.*Unknown split 'tain'"):
        load_data(config(**GSM8K, split="tain"), load_hub=hub)
    with pytest.raises(ConfigError, match=r"data\.split: 'openai/gsm8k empty' has no rows"):
        load_data(config(**GSM8K, split="empty"), load_hub=hub)
    with pytest.raises(ConfigError, match=r"data\.split: 'all' gave a DatasetDict"):
        load_data(config(**GSM8K, split="all"), load_hub=hub)


# ---------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"source": "files"}, r"data\.source: 'files'.*did you mean 'file'"),
        ({"source": "file"}, r"data\.path: missing"),
        ({"source": "file", "path": "x.jsonk"}, r"data\.path: .*'\.jsonk'; did you mean '\.json"),
        ({"source": "hub"}, r"data\.name: missing"),
        (
            {"source": "hub", "name": "a/b", "path": "x.csv"},
            r"data\.path: belongs to source: file, but data\.source is hub",
        ),
        ({"source": "file", "path": "x.csv", "train_size": 3}, r"data\.train_size: belongs to source: reasoning_gym"),
        (
            {"source": "file", "path": "x.csv", "heldout_size": 3, "heldout_fraction": 0.1},
            r"data\.heldout_size: set together",
        ),
        ({"source": "file", "path": "x.csv", "heldout_fraction": 1.0}, r"data\.heldout_fraction: 1\.0 must be in"),
        ({"source": "file", "path": "x.csv", "answer_pattern": "("}, r"data\.answer_pattern: '\('"),
        ({"source": "file", "path": "x.csv", "max_rows": 0}, r"data\.max_rows: 0"),
        ({}, r"data\.task: missing"),
        ({"task": "chain_sum", "heldout_size": 1}, r"data\.train_size: missing"),
        (
            {"task": "chain_sum", "train_size": 1, "heldout_size": 1, "columns": {"a": "b"}},
            r"data\.columns: belongs to",
        ),
        ({"task": "chain_sums", "train_size": 1, "heldout_size": 1}, r"data\.task: .*did you mean 'chain_sum'"),
        (
            {"tasks": [CHAIN, {"task": "chain_sum", "options": {"max_term": 3}}], "train_size": 1, "heldout_size": 1},
            r"data\.tasks\[1\]\.options\.max_term: .*did you mean 'm.._terms'",
        ),
        (
            {"tasks": [{"task": "chain_sum", "options": {"min_terms": 9}}], "train_size": 1, "heldout_size": 1},
            r"data\.tasks\[0\]\.options: .*refused by chain_sum: max_terms must be >= min_terms",
        ),
        (
            {"tasks": [{"task": "chain_sum", "options": {"seed": 9}}], "train_size": 1, "heldout_size": 1},
            r"data\.tasks\[0\]\.options\.seed: unknown key",
        ),
        (
            {"tasks": [{"task": "chain_sum", "weight": 0}], "train_size": 1, "heldout_size": 1},
            r"data\.tasks\[0\]\.weight: 0",
        ),
        (
            {"tasks": [{"task": "chain_sum", "wieght": 2}], "train_size": 1, "heldout_size": 1},
            r"data\.tasks\[0\]\.wieght",
        ),
        (
            {"task": "composite", "train_size": 1, "heldout_size": 1},
            r"data\.task: unknown reasoning-gym task 'composite'",
        ),
        ({"tasks": [CHAIN], "task": "gcd", "train_size": 1, "heldout_size": 1}, r"data\.task: both"),
    ],
)
def test_settings_that_cannot_work_are_refused_before_anything_loads(values, message):
    with pytest.raises(ConfigError, match=message):
        config(**values)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"path": "no.jsonl"}, r"data\.path: there is no file .*no\.jsonl"),
        ({"path": "bad.jsonl"}, r"data\.path: 'bad\.jsonl' cannot be read"),
        ({"columns": {"prompt": "qestion", "answer": "solution"}}, r"data\.columns\.prompt: .*did you mean 'question'"),
        ({"columns": {"prompt": "question", "answer": "level.x"}}, r"data\.columns\.answer: 'level\.x' has no 'x'"),
        ({"columns": {**MAPPED["columns"], "completions": "level"}}, r"data\.columns\.completions: the trainer uses"),
        ({"template": "{qestion}"}, r"data\.template: .*'qestion'.*did you mean 'question'"),
        ({"template": r"{question} \boxed{}"}, r"data\.template: .*double literal braces"),
        ({"template": "{question"}, r"data\.template: .*is not a template"),
        ({"template": "{level[x]}"}, r"data\.template: .*does not fit a row"),
        ({"answer_pattern": "=(.*)"}, r"data\.answer_pattern: '=\(\.\*\)' matches nothing in the answer of row 0"),
        ({"heldout_size": 40}, r"data\.heldout_size: 40 of 40"),
    ],
)
def test_rows_that_do_not_fit_are_refused(values, message, jsonl, tmp_path):
    (tmp_path / "bad.jsonl").write_text("{not json\n")
    with pytest.raises(ConfigError, match=message):
        load_data(config(**{"source": "file", "path": jsonl(ROWS), **MAPPED, **values}), base_dir=tmp_path)


def test_bad_template_of_a_task_is_refused():
    with pytest.raises(ConfigError, match=r"data\.tasks\[0\]\.template: .*'qestion'.*did you mean 'question'"):
        load_data(config(tasks=[{**CHAIN, "template": "{qestion}"}], train_size=1, heldout_size=0))
    with pytest.raises(ConfigError, match=r"data\.template: .*does not fit a row: KeyError: 'expresion'"):
        load_data(config(tasks=[CHAIN], template="{metadata[expresion]}", train_size=1, heldout_size=0))


def test_every_setting_is_documented():
    assert all(setting.doc for kind in (DataConfig, TaskSpec) for setting in describe(kind))
