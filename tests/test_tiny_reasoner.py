"""The embedded model: tokenizer, size, demonstrations with known deciding tokens, and that it solves some problems."""

from __future__ import annotations

import random
import string
from typing import Any

import pytest
import reasoning_gym
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from rltok import tiny
from rltok.config import build
from rltok.data import DataConfig, load_data
from rltok.recipe import load_recipe
from rltok.rewards.accuracy import LenientAccuracy, StrictAccuracy

SEEDS = range(200)
SUM = {"answer": "3", "metadata": {"source_dataset": "chain_sum", "expression": "4 - 1 - 7 + 7"}}
SEARCH = {"answer": "(9/3)+6", "metadata": {"source_dataset": "countdown", "numbers": [9, 6, 3], "target": 9}}


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(tiny.tiny_reasoner_path())


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(tiny.tiny_reasoner_path(), dtype=torch.float32)


@pytest.fixture(scope="module")
def data() -> DataConfig:
    return build(DataConfig, load_recipe("dapo").data, "data")


def entries(data: DataConfig, count: int) -> list[tuple[Any, Any]]:
    """(dataset, entry) pairs over every task of the demo."""
    pairs = []
    for spec in data.mixture:
        dataset = reasoning_gym.create_dataset(spec.task, seed=7, size=count, **spec.options)
        pairs += [(dataset, dataset[i]) for i in range(count)]
    return pairs


# Tokenizer and model


@pytest.mark.parametrize(
    "text",
    [
        string.printable,
        "".join(map(chr, range(128))),
        "<think>4-1=3;3-7=-4</think><answer>-4</answer>",
        "also: no so  ok, compute 12 - 3 from make \n\n",
        "",
    ],
)
def test_ascii_round_trip(tokenizer: PreTrainedTokenizerBase, text: str) -> None:
    ids = tokenizer(text)["input_ids"]
    assert tokenizer.unk_token_id not in ids
    assert tokenizer.batch_decode([ids], skip_special_tokens=True) == [text]


def test_tags_digits_and_operators_are_single_plain_tokens(tokenizer: PreTrainedTokenizerBase) -> None:
    for token in (*string.digits, *"+-*/=;,()", *tiny.WORDS):
        ids = tokenizer(token)["input_ids"]
        assert len(ids) == 1 and ids[0] not in tokenizer.all_special_ids, token
    assert tokenizer.convert_ids_to_tokens(tokenizer("407")["input_ids"]) == ["4", "0", "7"]
    assert tokenizer.pad_token_id != tokenizer.eos_token_id and tokenizer.padding_side == "left"


def test_chat_template(tokenizer: PreTrainedTokenizerBase) -> None:
    user = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "compute 4 - 1"}]
    prompt = tokenizer.apply_chat_template(user, tokenize=False, add_generation_prompt=True)
    assert prompt == "<|system|>be brief<|user|>compute 4 - 1<|assistant|>"
    whole = tokenizer.apply_chat_template([*user, {"role": "assistant", "content": "so 3"}], tokenize=False)
    assert whole == prompt + "so 3<eos>"
    assert tokenizer.decode(tokenizer(whole)["input_ids"], skip_special_tokens=True) == "be briefcompute 4 - 1so 3"


def test_size(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    assert model.config.model_type == "qwen3"
    assert 0.7e6 <= sum(p.numel() for p in model.parameters()) <= 1.1e6
    assert (tiny.tiny_reasoner_path() / "model.safetensors").stat().st_size <= 4e6
    assert model.config.vocab_size == len(tokenizer) <= 200
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id
    assert model.generation_config.pad_token_id == tokenizer.pad_token_id


# Demonstrations


def test_careful_demonstrations_are_accepted(data: DataConfig) -> None:
    rng = random.Random(0)
    for dataset, entry in entries(data, len(SEEDS)):
        text = tiny.write_demonstration(entry, rng, {})
        answer = text.split("<answer>")[1].removesuffix("</answer>")
        assert dataset.score_answer(answer, entry) == 1.0, text
        assert all(decision.side == "careful" for decision in tiny.deciding_positions(text)), text


def test_demonstrations_split_as_the_tokenizer_splits(data: DataConfig, tokenizer: PreTrainedTokenizerBase) -> None:
    rng = random.Random(0)
    for _, entry in entries(data, 30):
        text = tiny.write_demonstration(entry, rng)
        tokens = tokenizer.convert_ids_to_tokens(tokenizer(text)["input_ids"])
        assert tiny.split_completion(text) == tokens
        assert len(tokens) < 80


@pytest.mark.parametrize("habit", list(tiny.HABITS))
def test_hasty_side_shows_at_its_deciding_token(data: DataConfig, habit: str) -> None:
    """With one habit hasty, exactly its decision is hasty, and before that token both sides can be the same text."""
    rng = random.Random(0)
    spec = tiny.HABITS[habit]
    shown = accepted = 0
    for dataset, entry in entries(data, len(SEEDS)):
        if entry["metadata"]["source_dataset"] not in spec.tasks:
            continue
        text = tiny.write_demonstration(entry, rng, {habit: 0.0})
        tokens = tiny.split_completion(text)
        hasty = [decision for decision in tiny.deciding_positions(text) if decision.side == "hasty"]
        if habit == "persist" and " no" not in tokens:
            assert not hasty  # the first combination was right: nothing to give up
            continue
        assert [decision.habit for decision in hasty] == [habit], text
        assert tokens[hasty[0].position] in spec.hasty
        if habit == "form":
            assert "<answer>" not in tokens
            continue
        shown += 1
        accepted += dataset.score_answer(text.split("<answer>")[1].removesuffix("</answer>"), entry) == 1.0
    assert habit == "form" or accepted < 0.4 * shown  # a guess, a merged step or giving up is mostly wrong


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("<answer>5</answer>", [("work", 0, "hasty")]),
        (
            "<think>4-1=3;3-7=-4;-4+7=3</think><answer>3</answer>",
            [("work", 0, "careful"), ("care", 10, "careful"), ("form", 21, "careful")],
        ),
        ("<think>4-1=3;3-7+7=-1</think>so -1", [("work", 0, "careful"), ("care", 10, "hasty"), ("form", 16, "hasty")]),
        (
            "<think>9-6=3,3*3=9 ok</think><answer>(9-6)*3</answer>",
            [("work", 0, "careful"), ("form", 14, "careful")],
        ),
        ("<think>9+6=15 no</think>so 9+6", [("work", 0, "careful"), ("persist", 8, "hasty"), ("form", 9, "hasty")]),
        (
            "<think>9+6=15 no;9-6=3 ok</think>so 9-6",
            [("work", 0, "careful"), ("persist", 8, "careful"), ("form", 16, "hasty")],
        ),
        ("<think>4-1=3", [("work", 0, "careful")]),
        ("so what", []),
        ("", []),
    ],
)
def test_deciding_positions(text: str, expected: list[tuple[str, int, str]]) -> None:
    assert tiny.deciding_positions(text) == expected
    assert tiny.deciding_positions(tiny.split_completion(text)) == expected


def test_prompts_match_the_recipe(data: DataConfig) -> None:
    assert {(spec.task, spec.template) for spec in data.mixture} == set(tiny.PROMPTS.items())
    assert tiny.prompt_of(SUM) == "compute 4 - 1 - 7 + 7"
    assert tiny.prompt_of(SEARCH) == "make 9 from [9, 6, 3]"


def test_start_odds_differ_by_problem() -> None:
    favoured = {name: odds[0] for name, odds in tiny.START_ODDS.items()}
    assert tiny.start_odds(SUM) == favoured | {"form": tiny.START_ODDS["form"][1]}
    assert tiny.start_odds(SEARCH)["work"] == tiny.START_ODDS["work"][1]


@pytest.mark.parametrize(
    ("entry", "habits", "message"),
    [
        (SUM, {"carry": 1.0}, "carry"),
        (SUM, {"work": 1.5}, r"habits\['work'\]=1.5"),
        ({"answer": "", "metadata": {"source_dataset": "sudoku", "numbers": [1, 2]}}, {}, "sudoku"),
    ],
)
def test_refuses(entry: tiny.Entry, habits: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tiny.write_demonstration(entry, random.Random(0), habits)


# The start


def test_start_solves_some_but_not_most(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, data: DataConfig
) -> None:
    heldout = load_data(data).heldout.select(range(96))
    prompts = [tokenizer.apply_chat_template(p, tokenize=False, add_generation_prompt=True) for p in heldout["prompt"]]
    inputs = tokenizer(prompts, return_tensors="pt", padding=True)
    with torch.no_grad():
        output = model.generate(**inputs, do_sample=False, max_new_tokens=80)
    texts = tokenizer.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    columns = {name: heldout[name][:] for name in ("task", "entry", "task_options")}
    strict = sum(StrictAccuracy()(prompts, texts, **columns)) / len(texts)
    lenient = sum(LenientAccuracy()(prompts, texts, **columns)) / len(texts)
    assert 0.10 <= strict <= 0.35
    assert strict + 0.05 <= lenient
    sides = {(d.habit, d.side) for text in texts for d in tiny.deciding_positions(text)}
    assert sides >= {(habit, side) for habit in ("work", "care", "form") for side in ("careful", "hasty")}
