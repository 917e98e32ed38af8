"""`scripts/credit_recovery.py`: the language, the statistic on credits whose answer is known, and one trained model."""

from __future__ import annotations

import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tests_support import load_script

from rltok.batch import TokenBatch
from rltok.credit.preplan_anchor import PreplanAnchor

script = load_script("credit_recovery")


def language_rollouts(rows: int = 256, seed: int = 0):
    rng = random.Random(seed)
    return script.collate([(script.write_prompt(rng), script.write_completion(rng)) for _ in range(rows)])


# The language


def test_completions_are_grammatical_and_the_deciding_token_lies_in_the_first_two_thirds():
    rng = random.Random(0)
    for _ in range(500):
        completion = script.write_completion(rng)
        assert script.is_grammatical(completion)
        places = [i for i, token in enumerate(completion) if token in script.DECIDING]
        assert len(places) == 1 and places[0] < script.LAST_PLACE
        assert len(completion) <= script.MAX_COMPLETION
        decision = completion[places[0]] - script.DECIDING[0]
        assert completion[-script.TAIL :] == script.write_tail(decision)


def test_the_four_decisions_have_different_answers():
    assert len({script.write_tail(decision)[1] for decision in range(4)}) == 4


@pytest.mark.parametrize(
    "spoil",
    [
        lambda c: c[:-1],
        lambda c: [*c[:-1], script.FILLER[0]],
        lambda c: [script.DECIDING[0], *c],
        lambda c: [token for token in c if token not in script.DECIDING],
        lambda c: [script.LATER[0], *c],
        lambda c: [*c[:3], script.MARK, *c[3:]],
        lambda c: [],
    ],
    ids=["no end", "other end", "two decisions", "none", "later token first", "two marks", "empty"],
)
def test_broken_completions_are_left_out(spoil):
    completion = script.write_completion(random.Random(3))
    assert script.is_grammatical(completion)
    assert not script.is_grammatical(spoil(completion))


def test_entropy_of_the_language_is_the_same_before_and_after_the_deciding_token():
    """Up to the last place and to the mark: rates of the classes, counted."""
    rng = random.Random(1)
    before, after = [], []
    for _ in range(3000):
        completion = script.write_completion(rng)
        place = next(i for i, token in enumerate(completion) if token in script.DECIDING)
        before += completion[: min(place + 1, script.LAST_PLACE - 1)]
        after += completion[place + 1 : place + 1 + script.GAP[0]]
    for tokens, rare in ((before, script.DECIDING), (after, script.LATER)):
        share = np.mean([token in rare for token in tokens])
        decoys = np.mean([token in script.DECOY for token in tokens])
        assert share == pytest.approx(script.RARE, abs=0.02)
        assert decoys == pytest.approx(script.RARE, abs=0.02)


def test_rollouts_name_the_deciding_token_and_the_reward():
    rollouts = language_rollouts(64)
    rows = torch.arange(64)
    decision = rollouts.ids[rows, rollouts.deciding] - script.DECIDING[0]
    assert ((decision >= 0) & (decision < 4)).all()
    prompts = rollouts.input_ids[:, : -rollouts.mask.size(1)]
    assert torch.equal(rollouts.rewards, (prompts[:, -1] - script.ANSWER[0] == decision).float())
    assert torch.equal(rollouts.mask.bool(), rollouts.ids != script.PAD)
    assert 0 < rollouts.rewards.mean() < 1


# The statistic


def test_percentiles_worked():
    credit = torch.tensor([[1.0, 2.0, 2.0, 0.0, 9.0], [5.0, 7.0, 7.0, 7.0, 7.0], [3.0, 0.0, 0.0, 0.0, 0.0]])
    mask = torch.tensor([[1, 1, 1, 1, 0], [1, 1, 1, 1, 1], [1, 0, 0, 0, 0]])
    nan = np.nan
    expected = [[1 / 3, 2.5 / 3, 2.5 / 3, 0, nan], [0, 2.5 / 4, 2.5 / 4, 2.5 / 4, 2.5 / 4], [nan] * 5]
    np.testing.assert_allclose(script.percentiles(credit, mask), expected)


def test_any_credit_has_mean_percentile_one_half_over_a_completion():
    torch.manual_seed(0)
    credit = torch.randint(0, 4, (20, 30)).float()
    mask = (torch.arange(30) < torch.randint(2, 31, (20, 1))).long()
    np.testing.assert_allclose(np.nanmean(script.percentiles(credit, mask), axis=1), 0.5)
    np.testing.assert_allclose(np.nanmax(script.percentiles(torch.ones(20, 30), mask), axis=1), 0.5)


def test_same_place_leaves_out_the_row_itself_and_rows_that_decide_there():
    ranks = np.array([[0.1, 0.2, 0.3], [0.4, 0.5, np.nan], [0.7, 0.8, 0.9]])
    # places 1, 1, 2: rows 0 and 1 see row 2 only; row 2 sees row 0, as row 1 has no token there
    np.testing.assert_allclose(script.same_place(ranks, np.array([1, 1, 2])), [0.8, 0.8, 0.3])


def test_auc_counts_pairs_and_halves_ties():
    assert script.auc(np.array([1.0, 2.0]), np.array([0.0, 1.0])) == pytest.approx(3.5 / 4)
    assert script.auc(np.ones(3), np.ones(5)) == 0.5


def test_interval_holds_the_mean_and_is_reproducible():
    values = np.random.default_rng(0).random(200)
    low, high = script.interval(values)
    assert low < values.mean() < high < low + 0.1
    assert script.interval(values) == (low, high)


def planted(rollouts, deciding_value: float):
    """Signals of an attention in which the deciding token receives `deciding_value` and others less than 0.5."""
    torch.manual_seed(0)
    fai = torch.rand(rollouts.mask.shape) * 0.5 * rollouts.mask
    fai[torch.arange(len(fai)), rollouts.deciding] = deciding_value
    batch = TokenBatch(
        advantages=torch.ones(len(fai)),
        mask=rollouts.mask.float(),
        ids=rollouts.ids,
        all_rewards=rollouts.rewards,
        all_lengths=rollouts.mask.sum(1),
        group_size=len(fai),
        attention=SimpleNamespace(waad=torch.zeros_like(fai), fai=fai, fai_count=rollouts.mask.long()),
    )
    return PreplanAnchor(strategy="global")(batch), fai


def test_a_planted_anchor_is_recovered_and_a_planted_stranger_is_not():
    rollouts = language_rollouts()
    n = rollouts.mask.sum(1).numpy()
    chosen = np.ceil(0.4 * n - 1e-9)
    credit, fai = planted(rollouts, 0.9)
    finding = script.find("", "global", credit, rollouts, seed=0)
    np.testing.assert_allclose(finding.rank, ((n - chosen) + (chosen - 1) / 2) / (n - 1))
    assert (finding.above_mean == 1).all()
    assert script.auc(finding.rank, finding.shuffled) > 0.75
    assert abs(finding.shuffled.mean() - 0.5) < 0.05
    assert abs(np.nanmean(finding.place) - 0.5) < 0.05
    assert (script.find("", "FAI", fai, rollouts, seed=0).rank == 1).all()

    credit, fai = planted(rollouts, 0.0)
    finding = script.find("", "global", credit, rollouts, seed=0)
    np.testing.assert_allclose(finding.rank, (n - chosen - 1) / 2 / (n - 1))
    assert (finding.above_mean == 0).all()
    assert (script.find("", "FAI", fai, rollouts, seed=0).rank == 0).all()


def test_the_shuffle_of_the_statistic_is_the_shuffled_control():
    rollouts = language_rollouts(32)
    credit, fai = planted(rollouts, 0.9)
    batch = TokenBatch(
        advantages=torch.ones(32),
        mask=rollouts.mask.float(),
        ids=rollouts.ids,
        all_rewards=rollouts.rewards,
        all_lengths=rollouts.mask.sum(1),
        group_size=32,
        attention=SimpleNamespace(waad=torch.zeros_like(fai), fai=fai, fai_count=rollouts.mask.long()),
        seed=5,
    )
    control = PreplanAnchor(strategy="global", control="shuffled")(batch)
    own = script.find("", "", credit, rollouts, seed=5).shuffled
    np.testing.assert_array_equal(own, script.find("", "", control, rollouts, seed=5).rank)


# A trained model


@pytest.fixture(scope="module")
def outcome():
    torch.set_num_threads(1)
    return script.measure(seed=0, steps=script.STEPS, completions=256)


def by_name(outcome):
    return {(one.setting, one.method): one for one in outcome.findings}


def test_the_model_reads_its_answer_off_the_deciding_token(outcome):
    assert outcome.facts["answer_accuracy"] > script.MIN_ACCURACY
    assert outcome.facts["answer_accuracy_exchanged"] > script.MIN_ACCURACY


def test_credits_that_know_nothing_stay_at_one_half(outcome):
    found = by_name(outcome)
    assert (found["", "uniform (group)"].rank == 0.5).all()
    for (setting, method), finding in found.items():
        assert len(finding.rank) == 256 and np.isfinite(finding.rank).all()
        if method.endswith("shuffled"):
            assert abs(finding.rank.mean() - 0.5) < 0.07, (setting, method)


def test_preplan_credit_ranks_the_deciding_token_above_the_shuffled_control(outcome):
    """Nothing is asserted of anchors (FAI, global, coupled): they do not find it beyond its place, see the script."""
    finding = by_name(outcome)["scaled", "local"]
    control = by_name(outcome)["scaled", "local, shuffled"]
    low, _ = script.interval(finding.rank - control.rank)
    print(
        f"preplan {finding.rank.mean():.3f}, shuffled {control.rank.mean():.3f}, same place {finding.place.mean():.3f}"
    )
    assert low > 0.03
    assert script.auc(finding.rank, control.rank) > 0.53


def test_the_summary_joins_models_and_keeps_each_mean(outcome):
    rows = script.summarise([outcome, outcome])
    assert len(rows) == len(outcome.findings)
    for row, finding in zip(rows, outcome.findings, strict=True):
        assert row["completions"] == 512
        assert row["rank_by_seed"] == [pytest.approx(finding.rank.mean())] * 2
        assert row["rank_low"] <= row["rank"] + 1e-12 and row["rank"] <= row["rank_high"] + 1e-12
    assert script.table(rows).row_count == len(rows)


def test_a_model_that_has_not_learnt_the_task_is_refused():
    with pytest.raises(script.RecoveryError, match="--steps"):
        script.measure(seed=0, steps=2, completions=32)
