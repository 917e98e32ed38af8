"""The controls of a comparison: shuffled credit and the random reward."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from rltok.batch import TokenBatch
from rltok.config import ConfigError, build_typed
from rltok.credit import CREDIT, EntropyShaping, PreplanAnchor, ShuffledCredit, shuffle_credit
from rltok.recipe import load_recipe
from rltok.rewards import RandomReward, build_rewards
from rltok.trainers.doors import build_doors

ROOT = Path(__file__).resolve().parent.parent


def batch(rows: int = 8, width: int = 6, seed: int = 0) -> TokenBatch:
    generator = torch.Generator().manual_seed(1)
    lengths = torch.tensor([6, 1, 0, 3, 2, 5, 4, 6])[:rows]
    rewards = torch.randn(rows, generator=generator)
    return TokenBatch(
        advantages=rewards - rewards.mean(),
        mask=(torch.arange(width) < lengths[:, None]).float(),
        ids=torch.randint(0, 90, (rows, width), generator=generator),
        all_rewards=rewards,
        all_lengths=lengths,
        group_size=4,
        entropy=torch.rand(rows, width, generator=generator),
        seed=seed,
    )


# Shuffled credit


def test_shuffled_credit_keeps_the_values_of_every_completion_and_moves_them() -> None:
    data = batch()
    plain, shuffled = EntropyShaping()(data), ShuffledCredit()(data)
    torch.testing.assert_close(shuffled.sort(1).values, plain.sort(1).values, rtol=0, atol=0)
    assert not torch.equal(shuffled, plain)
    assert not (shuffled * (1 - data.mask)).any()


def test_every_order_is_as_likely() -> None:
    """The docstring's example: 1.5, 1, 1 puts 1.5 on each of three tokens in a third of the rollouts."""
    credit, mask, ids = torch.tensor([[1.5, 1.0, 1.0, 0.0]]), torch.tensor([[1, 1, 1, 0]]), torch.tensor([[7, 7, 7, 2]])
    places = [int(shuffle_credit(credit, mask, ids, (0, seed)).argmax()) for seed in range(900)]
    counts = torch.bincount(torch.tensor(places), minlength=4).tolist()
    assert counts[3] == 0 and all(240 < count < 360 for count in counts[:3])  # 300 each, deviation 14


def test_orders_change_with_rollout_and_seed_and_repeat_otherwise() -> None:
    first = ShuffledCredit()(batch(seed=3))
    assert torch.equal(first, ShuffledCredit()(batch(seed=3)))
    assert not torch.equal(first, ShuffledCredit()(batch(seed=4)))
    assert not torch.equal(first, ShuffledCredit(seed=1)(batch(seed=3)))


def test_uniform_credit_stays_as_it_is_bit_for_bit() -> None:
    data = batch()
    neutral = ShuffledCredit(of={"type": "preplan_anchor", "gamma_amp": 1.0})
    assert neutral.needs == ()
    assert torch.equal(neutral(data), data.advantages[:, None] * data.mask)


def test_it_asks_for_the_signals_of_its_method() -> None:
    assert ShuffledCredit().needs == ("entropy",) and build_doors({"type": "shuffled"}, None, None).attention is None
    section = {"type": "shuffled", "of": {"type": "preplan_anchor", "window": 4}}
    doors = build_doors(section, None, None)
    assert doors.needs == {"attention"} and doors.attention == PreplanAnchor(window=4).attention
    assert doors.attention is not None and doors.attention.window == 4


@pytest.mark.parametrize(
    ("section", "words"),
    [
        ({"of": {"type": "group"}}, "credit.of: 'group' leaves nothing to shuffle.*entropy_shaping, preplan_anchor"),
        ({"of": {"type": "shuffled"}}, "leaves nothing to shuffle"),
        ({"of": {"type": "entropy_shapin"}}, "did you mean 'entropy_shaping'"),
        ({"of": {"type": "entropy_shaping", "alpa": 1.0}}, "credit.of.alpa.*did you mean 'alpha'"),
        ({"seed": -1}, "credit.seed: -1 must be >= 0"),
    ],
)
def test_what_cannot_be_shuffled_is_refused(section: dict, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        build_typed(CREDIT, {"type": "shuffled", **section}, "credit")


def test_a_recipe_with_shuffled_credit_loads_back_equal(tmp_path: Path) -> None:
    recipe = load_recipe("dapo", ["credit={type: shuffled, of: {type: entropy_shaping, alpha: 0.2}}"])
    assert recipe.credit == {"type": "shuffled", "of": {"type": "entropy_shaping", "alpha": 0.2}, "seed": 0}
    file = tmp_path / "recipe.yaml"
    file.write_text(recipe.to_yaml())
    assert load_recipe(file) == recipe


# Random reward

Draw = Callable[..., list[float]]


def draw(reward: RandomReward, count: int = 4000, step: int = 0, **changes: object) -> list[float]:
    arguments = {"prompts": ["p"] * count, "completions": [""] * count, "completion_ids": [[i] for i in range(count)]}
    return reward(**(arguments | changes), trainer_state=SimpleNamespace(global_step=step))  # type: ignore[arg-type]


def test_random_rewards_are_bernoulli_and_know_nothing() -> None:
    found = draw(RandomReward(p=0.3))
    assert set(found) == {0.0, 1.0} and abs(sum(found) / 4000 - 0.3) < 0.03  # four deviations
    alike = [draw(RandomReward(), step=1), draw(RandomReward(seed=1)), draw(RandomReward(), prompts=["q"] * 4000)]
    plain = draw(RandomReward())
    for other in alike:  # a new step, seed or prompt is a new lottery
        assert 0.45 < sum(a == b for a, b in zip(plain, other, strict=True)) / 4000 < 0.55
    assert draw(RandomReward(p=0.0)) == [0.0] * 4000 and draw(RandomReward(p=1.0)) == [1.0] * 4000


def test_random_rewards_are_the_same_in_every_process() -> None:
    code = (
        "import json, sys; from types import SimpleNamespace as N; from rltok.rewards import RandomReward; "
        "print(json.dumps(RandomReward(seed=2)([[{'role': 'user', 'content': 'é'}]] * 40, [''] * 40, "
        "[[i, 7] for i in range(40)], N(global_step=5))))"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONHASHSEED": "7"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    here = RandomReward(seed=2)(
        [[{"content": "é", "role": "user"}]] * 40,
        [""] * 40,
        torch.tensor([[i, 7] for i in range(40)]).numpy(),
        SimpleNamespace(global_step=5),
    )
    assert json.loads(done.stdout) == here and 0 < sum(here) < 40
    assert here[:8] == [0.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0]  # pinned: a change would change finished comparisons


def test_random_reward_in_a_recipe_and_its_errors() -> None:
    rewards = build_rewards({"lot": {"function": "random_reward", "p": 0.25}})
    values = rewards.functions[0](prompts=["a"], completions=["b"], completion_ids=[[1]], answer=["x"])
    assert values in ([0.0], [1.0])
    with pytest.raises(ConfigError, match="p=1.5 is not a probability"):
        build_rewards({"lot": {"function": "random_reward", "p": 1.5}})
    with pytest.raises(ValueError, match="completion_ids"):
        RandomReward()(["a"], ["b"], None)
