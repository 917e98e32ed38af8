"""Prompt skipping: the probability, the traces and their controller, and replaced rows on one and two ranks."""

import datetime
import io
import math
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator

from rltok.config import ConfigError
from rltok.recipe import load_recipe
from rltok.rollout import RolloutConfig, build_rollout
from rltok.selection.prompts import PromptSkippingConfig, PromptTraces, prompt_id, skip_probability
from rltok.trainers import prompt_skipping
from rltok.trainers.prompt_skipping import SkippedPrompts
from rltok.trainers.prompts import RefillPrompts

GROUP = 4
EASY, HARD, MIXED = [1.0] * GROUP, [0.0] * GROUP, [1.0, 0.0, 0.0, 1.0]
UNSCORED = [math.nan] * GROUP


def config(**changes):
    return PromptSkippingConfig(**({"metric": "strict"} | changes))


def visit(traces, *visits, adapt=False):
    """Record rollouts, each a mapping of prompt id -> rewards of its group."""
    values = {}
    for rollout in visits:
        metric = torch.tensor([reward for rewards in rollout.values() for reward in rewards])
        values = traces.record(list(rollout), metric, GROUP, adapt)
    return values


# Probability


def test_probability_after_easy_visits():
    assert [skip_probability(z, 0.5) for z in range(5)] == [0, 0.5, 0.75, 0.875, 0.9375]
    assert skip_probability(7, 0.5) == skip_probability(5000, 0.5) == 0.99
    for p in (0.0, 0.05, 0.5, 0.95, 1.0):
        assert skip_probability(0, p) == 0
        series = [skip_probability(z, p) for z in range(400)]
        assert series == sorted(series) and max(series) <= 0.99
    assert skip_probability(9, 0.5, floor=1.0) == skip_probability(9, 1.0) == 0  # plain sampling


@pytest.mark.parametrize("arguments", [(-1, 0.5), (1, 1.5), (1, -0.1), (1, math.nan), (1, 0.5, 0.0), (1, 0.5, 2.0)])
def test_probability_refuses(arguments):
    with pytest.raises(ValueError, match=r"visits=-1|p=.*\[0, 1\]|floor=.*\(0, 1\]"):
        skip_probability(*arguments)


@pytest.mark.parametrize("visits", [1, 2, 7])
def test_skips_as_often_as_the_probability_says(visits):
    traces = PromptTraces(config(), seed=3)
    visit(traces, *[{"a": EASY}] * visits)
    n = 4000
    share = sum(traces.skips("a") for _ in range(n)) / n
    expected = skip_probability(visits, 0.5)
    assert share == pytest.approx(expected, abs=4 * math.sqrt(expected * (1 - expected) / n))
    assert 0 < share < 1  # an easy prompt is visited again
    assert traces.draws == n


def test_unknown_prompts_are_never_skipped_and_use_no_draw():
    traces = PromptTraces(config(), seed=0)
    assert not any(traces.skips("new") for _ in range(200)) and traces.draws == 0


def test_draws_depend_on_seed_and_position_only():
    def decisions(seed, names):
        traces = PromptTraces(config(), seed)
        visit(traces, {"a": EASY, "b": HARD})
        return [traces.skips(name) for name in names]

    assert decisions(0, "a" * 64) == decisions(0, "b" * 64) == decisions(0, "ab" * 32)
    assert decisions(0, "a" * 64) != decisions(1, "a" * 64)


# Traces


def test_runs_grow_change_kind_and_end():
    traces = PromptTraces(config(), seed=0)
    visit(traces, {"a": EASY, "b": HARD, "c": MIXED})
    assert traces.runs == {"a": 1, "b": -1}
    visit(traces, {"a": EASY, "b": HARD}, {"a": EASY})
    assert traces.runs == {"a": 3, "b": -2}
    assert [traces.skip_probability(name) for name in "abc"] == [0.875, 0.75, 0]
    visit(traces, {"a": HARD, "b": MIXED, "c": EASY})
    assert traces.runs == {"a": -1, "c": 1}
    visit(traces, {"a": [0.5] * GROUP, "c": [1.0, 1.0, 1.0, 0.9]})
    assert traces.runs == {}  # constant but neither maximal nor minimal ends a run as well


def test_a_prompt_twice_in_one_rollout_counts_twice():
    traces = PromptTraces(config(), seed=0)
    traces.record(["a", "a", "b"], torch.tensor(EASY + EASY + HARD), GROUP, adapt=False)
    assert traces.runs == {"a": 2, "b": -1}


def test_thresholds_compare_in_the_precision_of_the_rewards():
    traces = PromptTraces(config(easy_at=0.9, hard_at=0.1), seed=0)
    values = visit(traces, {"a": [0.9, 1.0, 0.95, 0.9], "b": [0.1, 0.0, 0.1, -3.0], "c": [0.9, 0.9, 0.9, 0.1]})
    assert traces.runs == {"a": 1, "b": -1}
    assert (values["share_easy"], values["share_hard"]) == (1 / 3, 1 / 3)


def test_rows_nobody_could_score_are_ignored():
    traces = PromptTraces(config(), seed=0)
    visit(traces, {"a": EASY, "b": HARD})
    nan = math.nan
    values = visit(
        traces,
        {"a": [nan, 1, 1, nan], "b": [0, nan, nan, nan], "c": [nan, 1, 0, nan], "d": UNSCORED},
    )
    assert traces.runs == {"a": 2, "b": -2}
    assert (values["share_easy"], values["share_hard"]) == (1 / 3, 1 / 3)  # of the three scored groups
    before = traces.state
    values = visit(traces, {"a": UNSCORED, "b": UNSCORED}, adapt=True)
    assert traces.state == before and math.isnan(values["share_easy"]) and math.isnan(values["share_hard"])


def test_rejects_rewards_that_do_not_match_the_groups():
    traces = PromptTraces(config(), seed=0)
    for metric in (torch.zeros(7), torch.zeros(2, 4)):
        with pytest.raises(ValueError, match=r"2 groups of 4 rows need \(8,\)"):
            traces.record(["a", "b"], metric, 4, adapt=False)
    assert traces.runs == {}


# Controller


def test_controller_moves_towards_the_targets_from_the_second_epoch_on():
    traces = PromptTraces(config(), seed=0)
    rollout = {"a": EASY, "b": HARD, **{f"m{i}": MIXED for i in range(6)}}  # shares 1/8: above 1/12, below 1/6
    values = visit(traces, rollout, adapt=False)
    assert (values["p_easy"], values["p_hard"]) == (0.5, 0.5)
    values = visit(traces, rollout, adapt=True)
    assert values == {"share_easy": 1 / 8, "share_hard": 1 / 8, "p_easy": 0.5 - 0.01, "p_hard": 0.5 + 0.01}


def test_a_share_on_the_target_counts_as_too_many():
    traces = PromptTraces(config(target_zero_variance=0.75), seed=0)  # a quarter easy, half hard
    assert (traces.config.target_easy, traces.config.target_hard) == (0.25, 0.5)
    values = visit(traces, {"a": EASY, "b": HARD, "c": HARD, "d": MIXED}, adapt=True)
    assert (values["p_easy"], values["p_hard"]) == (0.49, 0.49)


def test_p_stays_between_its_bounds():
    traces = PromptTraces(config(), seed=0)
    seen = []
    for rollout in [{"a": EASY}] * 150 + [{"a": HARD}] * 150:
        values = visit(traces, rollout, adapt=True)
        seen += [values["p_easy"], values["p_hard"]]
    assert min(seen) == 0.05 and max(seen) == 0.95
    still = PromptTraces(config(step=0), seed=0)
    visit(still, *[{"a": EASY}] * 9, adapt=True)
    assert (still.p_easy, still.p_hard) == (0.5, 0.5)


def test_state_survives_a_checkpoint_bit_for_bit():
    def rollouts(traces, n, seed):
        generator = torch.Generator().manual_seed(seed)
        log = []
        for _ in range(n):
            names = [name for name in "abcdefgh" if not traces.skips(name)]
            metric = (torch.rand(len(names), 1, generator=generator).round().repeat(1, GROUP)).flatten()
            log.append((names, traces.record(names, metric, GROUP, adapt=True) if names else None))
        return log

    traces = PromptTraces(config(), seed=5)
    rollouts(traces, 20, seed=0)
    file = io.BytesIO()
    torch.save(traces.state, file)
    file.seek(0)
    resumed = PromptTraces(config(), seed=5)
    resumed.load(torch.load(file, weights_only=True))
    assert resumed.state == traces.state and traces.draws > 0
    expected = rollouts(traces, 30, seed=1)
    assert rollouts(resumed, 30, seed=1) == expected
    assert resumed.state == traces.state
    assert rollouts(PromptTraces(config(), seed=5), 30, seed=1) != expected  # the state matters


def test_state_is_a_copy():
    traces = PromptTraces(config(), seed=0)
    visit(traces, {"a": EASY})
    state = traces.state
    visit(traces, {"a": EASY})
    assert state["runs"] == {"a": 1}
    other = PromptTraces(config(), seed=0)
    other.load(state)
    visit(other, {"a": EASY})
    assert state["runs"] == {"a": 1} and other.runs == {"a": 2}


# Prompt ids


def test_prompt_id_is_of_the_content():
    row = {"prompt": [{"role": "user", "content": "2+2="}], "answer": 4, "day": datetime.date(2020, 1, 2)}
    assert prompt_id(row) == prompt_id(dict(reversed(row.items())))
    assert prompt_id(row) != prompt_id(row | {"answer": 5}) and len(prompt_id(row)) == 32
    assert prompt_id({"a": torch.arange(2000)}) != prompt_id({"a": torch.cat([torch.arange(1999), torch.zeros(1)])})


def test_prompt_id_leaves_binary_content_out():
    class Image:
        """Its text names its address, as that of a decoded image does."""

    row = {"prompt": "what is it?", "image": Image(), "raw": b"\x00"}
    assert prompt_id(row) == prompt_id({"prompt": "what is it?", "raw": b"\x01"})
    nested = {"prompt": [{"content": [{"type": "image", "image": Image()}, {"type": "text", "text": "hm"}]}]}
    other = {"prompt": [{"content": [{"type": "image", "image": Image()}, {"type": "text", "text": "hm"}]}]}
    assert prompt_id(nested) == prompt_id(other)


def test_prompt_id_is_the_same_in_another_process():
    row = "{'prompt': 'äöü', 'tags': {'x', 'y', 'z'}, 'n': [1, 2.5, None], 'info': {'b': True, 'a': 1}}"
    code = f"from rltok.selection.prompts import prompt_id; print(prompt_id({row}))"
    found = {
        subprocess.run(
            [sys.executable, "-c", code], env={"PYTHONHASHSEED": seed}, capture_output=True, text=True, check=True
        ).stdout.strip()
        for seed in ("1", "2")
    }
    assert found == {prompt_id(eval(row))}


# Replacing rows


ROWS = 12


def dataset(rows=ROWS):
    return [{"prompt": f"{i}+{i}=", "answer": str(2 * i)} for i in range(rows)]


def batch(*indices, group=GROUP):
    return [dict(dataset()[i]) for i in indices for _ in range(group)]


def skipper(seed=0, rows=ROWS, **changes):
    return SkippedPrompts(config(**changes), dataset(rows), RefillPrompts(rows, seed), Accelerator(cpu=True), seed)


def make(skipped, rewards, *indices, times=1):
    """Let prompts have been visited with these rewards."""
    for index in indices:
        visit(skipped.traces, *[{prompt_id(dataset()[index]): rewards}] * times)


def indices_of(rows, group=GROUP):
    assert all(rows[i] == rows[i - i % group] for i in range(len(rows)))
    return [int(row["prompt"].split("+")[0]) for row in rows[::group]]


def test_nothing_skipped_returns_the_inputs():
    skipped = skipper()
    inputs = batch(0, 1, 2)
    assert skipped.replace(inputs, GROUP) is inputs
    assert skipped.refill.state == [0, 0] and skipped.traces.draws == 0
    assert skipped.ids == [prompt_id(dataset()[i]) for i in (0, 1, 2)]
    assert skipped.metrics == {"skipped": 0, "skipped_share": 0, "kept_at_limit": 0}


def test_floor_one_is_plain_sampling():
    skipped = skipper(floor=1.0)
    make(skipped, EASY, *range(ROWS), times=9)
    inputs = batch(0, 1, 2)
    assert skipped.replace(inputs, GROUP) is inputs and skipped.refill.state == [0, 0]


def test_skipped_prompts_are_replaced_from_the_refill_stream_in_order():
    skipped = skipper(floor=1e-12)
    make(skipped, EASY, 1, times=60)  # skipped with probability 1 - 1e-12
    make(skipped, HARD, 3, times=60)
    stream = [i for i in RefillPrompts(ROWS, 0).take(ROWS) if i not in (1, 3)]
    inputs = batch(0, 1, 2, 3)
    rows = skipped.replace(inputs, GROUP)
    assert len(rows) == len(inputs)
    assert indices_of(rows) == [0, stream[0], 2, stream[1]]
    assert all(rows[i] is inputs[i] for i in [*range(4), *range(8, 12)])  # visited prompts keep their rows
    assert len({id(row) for row in rows}) == len(rows)  # rewards and templates may change a row
    assert skipped.ids == [prompt_id(row) for row in rows[::GROUP]]
    in_vain = skipped.refill.state[1] - 2
    assert skipped.metrics == {
        "skipped": 2 + in_vain,
        "skipped_share": (2 + in_vain) / (6 + in_vain),
        "kept_at_limit": 0,
    }
    assert inputs == batch(0, 1, 2, 3)


def test_refill_prompts_are_tested_in_the_same_way():
    skipped = skipper(floor=1e-12)
    make(skipped, HARD, *range(ROWS - 1), times=60)  # only the last row is not hard
    assert indices_of(skipped.replace(batch(11, 7), GROUP)) == [ROWS - 1] * 2
    assert skipped.refill.state == [0, RefillPrompts(ROWS, 0).take(ROWS).index(ROWS - 1) + 1]
    assert skipped.metrics["kept_at_limit"] == 0


def test_ends_when_every_prompt_is_skipped():
    skipped = skipper(floor=1e-12)
    make(skipped, EASY, *range(ROWS), times=60)
    inputs = batch(2, 0, 1)
    assert skipped.replace(inputs, GROUP) is inputs  # kept against the test
    assert skipped.refill.state == [1, 0]  # one pass over the dataset, then no more
    assert skipped.metrics == {"skipped": ROWS, "skipped_share": ROWS / (ROWS + 3), "kept_at_limit": 3}
    assert skipped.take(5) == RefillPrompts(ROWS, 0).take(ROWS + 5)[-5:]  # beyond the limit untested
    assert skipped.metrics["kept_at_limit"] == 8
    assert skipped.replace(inputs, GROUP) is inputs and skipped.refill.state == [2, 5]  # the next batch tries again


def test_skipped_prompts_come_back():
    skipped = skipper()
    make(skipped, HARD, *range(ROWS), times=30)
    seen = set()
    for _ in range(150):
        rows = skipped.replace(batch(0, 1), GROUP)
        assert len(rows) == 2 * GROUP
        if skipped.metrics["kept_at_limit"] < 2:
            seen |= set(indices_of(rows))
    assert len(seen) > ROWS // 2


def test_take_draws_what_is_not_skipped():
    skipped = skipper(floor=1e-12)
    make(skipped, EASY, 0, 5, times=60)
    stream = [i for i in RefillPrompts(ROWS, 0).take(2 * ROWS) if i not in (0, 5)]
    assert skipped.take(3) + skipped.take(9) == stream[:12]
    assert skipped.metrics["kept_at_limit"] == 0 and skipped.metrics["skipped"] > 0


def test_rows_of_a_group_must_be_one_prompt():
    skipped = skipper()
    with pytest.raises(ValueError, match="rows 4 to 7 are one group of group_size=4 but hold different prompts"):
        skipped.replace(batch(0, group=4) + batch(1, 2, group=2), GROUP)
    with pytest.raises(ValueError, match="6 rows on all ranks are not whole groups of group_size=4"):
        skipped.replace(batch(0, group=6), GROUP)


@pytest.mark.parametrize("group", [1, 3, 4])
def test_two_ranks_do_what_one_does(monkeypatch, group):
    """With groups of 4 and 6 rows per rank the middle group, which is replaced, lies on both ranks."""
    inputs = batch(*range(12 // group), group=group)
    every_id = [prompt_id(row) for row in inputs]

    def run(rank, ranks):
        part = slice(rank * 12 // ranks, (rank + 1) * 12 // ranks)

        def gather(ids):
            assert ids == every_id[part]
            return every_id

        monkeypatch.setattr(prompt_skipping, "gather_object", gather)
        accelerator = SimpleNamespace(process_index=rank, num_processes=ranks)
        skipped = SkippedPrompts(config(floor=1e-12), dataset(), RefillPrompts(ROWS, 0), accelerator, 0)
        make(skipped, EASY, *range(0, ROWS, 2), times=2)
        make(skipped, HARD, 1, times=60)
        rows = skipped.replace(inputs[part], group)
        return rows, (skipped.ids, skipped.metrics, skipped.take(3), skipped.state, skipped.refill.state)

    whole, decided = run(0, 1)
    assert whole[group] != inputs[group] and [prompt_id(row) for row in whole[::group]] == decided[0]
    (first, decided_first), (second, decided_second) = run(0, 2), run(1, 2)
    assert len(first) == len(second) == 6 and first + second == whole
    assert decided_first == decided_second == decided


def test_records_and_continues_from_a_checkpoint():
    def train(skipped, batches):
        log = []
        for number in batches:
            rows = skipped.replace(batch(*((number * 3 + i) % ROWS for i in range(3))), GROUP)
            solved = torch.tensor([float(i % 3 == 0) for i in indices_of(rows) for _ in range(GROUP)])
            values = skipped.record(skipped.ids, solved, GROUP, epoch=number / 4)
            log.append((rows, values, skipped.metrics))
        return log

    skipped = skipper()
    first = train(skipped, range(4))
    assert all(values["p_easy"] == values["p_hard"] == 0.5 for _, values, _ in first)
    train(skipped, range(4, 9))
    assert skipped.traces.p_hard < 0.5  # two thirds of the prompts are hard
    file = io.BytesIO()
    torch.save({"traces": skipped.state, "refill": skipped.refill.state}, file)
    expected = train(skipped, range(9, 20))
    assert any(metrics["skipped"] for _, _, metrics in expected)
    file.seek(0)
    state = torch.load(file, weights_only=True)
    resumed = skipper()
    resumed.load(state["traces"])
    resumed.refill.state = state["refill"]
    assert train(resumed, range(9, 20)) == expected
    assert resumed.state == skipped.state and resumed.refill.state == skipped.refill.state


# Settings


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"metric": ""}, "metric is empty"),
        ({"easy_at": 0.0}, r"easy_at=0.0 must be > hard_at=0.0"),
        ({"hard_at": math.nan}, "hard_at=nan"),
        ({"p_easy": 0.01}, r"p_easy=0.01 is not in \[low, high\] = \[0.05, 0.95\]"),
        ({"p_hard": 1.0}, r"p_hard=1.0 is not in \[low, high\]"),
        ({"target_zero_variance": 1.5}, r"target_zero_variance=1.5 is not in \[0, 1\]"),
        ({"step": -0.01}, r"step=-0.01 is not in \[0, 1\]"),
        ({"floor": 0.0}, r"floor=0.0 is not in \(0, 1\]"),
        ({"low": 0.6, "high": 0.4}, "low=0.6 and high=0.4"),
        ({"high": math.nan}, "high=nan"),
    ],
)
def test_settings_refuse(changes, message):
    with pytest.raises(ValueError, match=message):
        config(**changes)


def test_rollout_section():
    assert RolloutConfig().prompt_skipping is None
    assert build_rollout({"prompt_skipping": None}).prompt_skipping is None
    section = {"prompt_skipping": {"metric": "strict", "p_easy": 0.4, "easy_at": 1}}
    assert build_rollout(section).prompt_skipping == config(p_easy=0.4)
    for wrong, message in (
        ({}, r"rollout\.prompt_skipping\.metric: missing"),
        ({"metric": "strict", "p_eazy": 0.5}, r"rollout\.prompt_skipping\.p_eazy: unknown key.*did you mean 'p_easy'"),
        ({"metric": "strict", "floor": 0}, r"rollout\.prompt_skipping: floor=0"),
        ({"metric": "strict", "step": "0.1"}, r"rollout\.prompt_skipping\.step: '0.1' is not a valid float"),
    ):
        with pytest.raises(ConfigError, match=message):
            build_rollout({"prompt_skipping": wrong})


def test_recipe_from_yaml(tmp_path):
    path = tmp_path / "r.yaml"
    path.write_text("defaults: demo\nrollout: {prompt_skipping: {metric: strict, target_zero_variance: 0.3}}\n")
    recipe = load_recipe(path)
    assert build_rollout(recipe.rollout).prompt_skipping == config(target_zero_variance=0.3)
    path.write_text("defaults: demo\nrollout: {prompt_skipping: null}\n")
    assert build_rollout(load_recipe(path).rollout).prompt_skipping is None
