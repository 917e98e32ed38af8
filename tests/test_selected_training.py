"""Training on what was selected: gradients of the zero-weighted full batch, divisors, tables, work saved."""

import math
from dataclasses import dataclass
from typing import ClassVar

import pandas as pd
import pytest
import torch
from tests_support import build_model, build_tokenizer, digit_dataset, even_reward, run_settings

from rltok.objective import GSPOToken
from rltok.selection import D3S, select_rollouts, select_tokens
from rltok.trainers import CreditConfig, CreditTrainer

ONE_WINDOW = {"gradient_accumulation_steps": 4, "steps_per_generation": 4, "max_steps": 1}
DESCENT = {"optim": "sgd", "learning_rate": 1.0, "max_grad_norm": 0.0, "lr_scheduler_type": "constant"}
HALF = {"rows_start": 0.5, "rows_end": 0.5, "tokens_start": 1.0, "tokens_end": 1.0}
TOKENS = {"rows_start": 0.5, "rows_end": 0.5, "tokens_start": 0.3, "tokens_end": 0.3}
NORMS = ("kept", "selected", "full")


class Fixed(CreditTrainer):
    """Completions of many lengths that depend on the row only."""

    def _generate_single_turn(self, prompt_ids, *args, **kwargs):
        generator = torch.Generator().manual_seed(3)
        lengths = torch.randint(1, 9, (len(prompt_ids),), generator=generator).tolist()
        return [torch.randint(3, 40, (n,), generator=generator).tolist() for n in lengths], None


def build(tmp_path, cls=Fixed, rewards=even_reward, **changes):
    doors = {name: changes.pop(name) for name in ("credit", "selection", "objective", "rollout") if name in changes}
    tokenizer = build_tokenizer()
    args = CreditConfig(**run_settings(tmp_path, **changes))
    data = {"train_dataset": digit_dataset(), "processing_class": tokenizer}
    return cls(build_model(tokenizer), rewards, args, **data, **doors)


def train(tmp_path, **changes):
    trainer = build(tmp_path, **changes)
    trainer.train()
    return trainer


def logged(trainer, key):
    return [entry[key] for entry in trainer.state.log_history if key in entry]


def descent(trainer):
    """The gradient of the only step, from where plain descent of rate 1 went."""
    start = dict(build_model(build_tokenizer()).named_parameters())
    return {name: (start[name] - p).detach() for name, p in trainer.model.named_parameters()}


@dataclass(frozen=True)
class Zeroed:
    """Group credit that is 0 on every row and token that D3S would drop: the same choice without dropping anything."""

    rows: float
    tokens: float
    norm: str
    row_mean: bool
    spread: bool = False
    """give a completion the share of its kept tokens, for ratios that need one advantage per completion"""

    needs: ClassVar[tuple[str, ...]] = ("entropy",)
    per_token: ClassVar[bool] = False

    def __call__(self, batch):
        mask = batch.mask.bool()
        rows = select_rollouts(batch.advantages, batch.all_groups, round(self.rows * mask.size(0)))
        selected = torch.zeros(mask.size(0), dtype=torch.bool)
        selected[rows] = True
        credit = batch.advantages[:, None] * mask
        keep = torch.zeros_like(mask)
        entropy = batch.entropy[rows]
        keep[rows] = select_tokens(batch.advantages[rows], entropy, mask[rows], self.tokens)
        kept, alive = keep.sum(), keep.any(1).sum()
        numbers = {"kept": kept, "selected": mask[rows].sum(), "full": mask.sum()}
        counts = {"kept": alive, "selected": len(rows), "full": mask.size(0)}
        if self.row_mean:  # the loss averages over a row's valid tokens, then over all rows
            scale = mask.size(0) / counts[self.norm]
            own = keep.sum(1, keepdim=True) if self.norm == "kept" else mask.sum(1, keepdim=True)
            scale = scale * mask.sum(1, keepdim=True) / own.clamp(min=1)
        else:
            scale = mask.sum() / numbers[self.norm]
        if self.spread:
            keep = keep.sum(1, keepdim=True) / mask.sum(1, keepdim=True)
        return credit * keep * scale * mask


def close(found, expected):
    norm = math.sqrt(sum(float(v.square().sum()) for v in expected.values()))
    error = math.sqrt(sum(float((found[k] - v).square().sum()) for k, v in expected.items()))
    assert norm > 1e-4, "the gradient is not trivially zero"
    assert error < 1e-5 * norm, error / norm


CUTS = {"rows": HALF, "rows and tokens": TOKENS}
ROW_MEANS = ("grpo", "sapo")


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize("loss_type", ["dapo", "grpo", "sapo", "cispo"])
def test_repacking_has_the_gradient_of_the_zero_weighted_full_batch(tmp_path, loss_type, cut, norm):
    common = {"loss_type": loss_type, **ONE_WINDOW, **DESCENT} | ({"epsilon_high": 5.0} if loss_type == "cispo" else {})
    selection = {"type": "d3s", "entropy_from": "old", "loss_norm": norm, **CUTS[cut]}
    ours = train(tmp_path / "a", selection=selection, **common)
    credit = Zeroed(0.5, CUTS[cut]["tokens_start"], norm, loss_type in ROW_MEANS)
    theirs = train(tmp_path / "b", credit=credit, **common)
    assert logged(ours, "selection/samples_trained")[0] <= 8 and logged(ours, "selection/samples_generated") == [16]
    close(descent(ours), descent(theirs))


@pytest.mark.parametrize("loss_type", ["dr_grpo", "luspo", "vespo"])
def test_dropped_rows_change_no_gradient_with_the_full_divisor(tmp_path, loss_type):
    common = {"loss_type": loss_type, **ONE_WINDOW, **DESCENT}
    if loss_type == "luspo":
        common["importance_sampling_level"] = "sequence"
    ours = train(tmp_path / "a", selection={"type": "d3s", "loss_norm": "full", **HALF}, **common)
    theirs = train(tmp_path / "b", credit=Zeroed(0.5, 1.0, "full", loss_type == "luspo"), **common)
    close(descent(ours), descent(theirs))


@pytest.mark.parametrize("norm", NORMS)
def test_a_sequence_ratio_keeps_all_tokens_of_its_rows(tmp_path, norm):
    common = {"loss_type": "dapo", "importance_sampling_level": "sequence", **ONE_WINDOW, **DESCENT}
    with pytest.warns(UserWarning, match="save no time"):
        selection = {"type": "d3s", "entropy_from": "old", "loss_norm": norm, **TOKENS}
        ours = train(tmp_path / "a", selection=selection, **common)
    theirs = train(tmp_path / "b", credit=Zeroed(0.5, 0.3, norm, False, spread=True), **common)
    close(descent(ours), descent(theirs))


def alternating(completions, **_):
    """Constant in every second group, at a value whose float32 mean is not exact."""
    varied = even_reward(completions)
    return [0.7 if i // 4 % 2 else varied[i] for i in range(len(completions))]


def test_zero_rows_change_no_gradient_with_the_full_divisor(tmp_path):
    common = {**ONE_WINDOW, **DESCENT, "rewards": alternating}
    keep_all = {"rows_start": 1.0, "tokens_start": 1.0}
    dropped = train(
        tmp_path / "a", selection={"type": "d3s", "drop_zero": True, "loss_norm": "full", **keep_all}, **common
    )
    whole = train(tmp_path / "b", **common)
    assert logged(dropped, "selection/samples_trained") == [8.0]
    close(descent(dropped), descent(whole))


@pytest.mark.parametrize("scope", ["micro", "sample"])
def test_two_stage_selection_keeps_exact_numbers_in_its_pool(tmp_path, scope):
    kept = []

    class Watching(Fixed):
        def _score_for_loss(self, model, inputs, mask):
            result = super()._score_for_loss(model, inputs, mask)
            kept.append((mask.clone(), result[3].clone(), inputs["advantages"].clone(), result[1].detach()))
            return result

    selection = {"type": "d3s", "entropy_from": "micro", "token_scope": scope, **TOKENS}
    trainer = train(tmp_path, cls=Watching, selection=selection, steps_per_generation=2)
    assert not any("old_per_token_logps" in entry for entry in trainer.state.log_history)
    pools = [(m, k) for m, k, *_ in kept]
    if scope == "sample":
        pools = [(m[i], k[i]) for m, k in pools for i in range(m.size(0))]
    for mask, keep in pools:
        assert int(keep.sum()) == max(1, math.ceil(0.3 * int(mask.sum()) - 1e-9))
        assert not (keep.bool() & ~mask.bool()).any()
    trained = logged(trainer, "selection/tokens_trained")
    assert len(kept) == 3, "half of the rows fill one of the two micro-batches of each update"
    assert trained == [int(k.sum()) for _, k, *_ in kept], "the number is known before the entropies are"


def test_two_stage_and_known_entropies_agree_on_one_micro_batch(tmp_path):
    """One micro-batch of everything selected, on-policy: both pools and both entropies are the same."""
    shape = {
        "per_device_train_batch_size": 16,
        "gradient_accumulation_steps": 1,
        "steps_per_generation": 1,
        "max_steps": 1,
    }
    old, micro = (
        train(tmp_path / source, selection={"type": "d3s", "entropy_from": source, **TOKENS}, **shape, **DESCENT)
        for source in ("old", "micro")
    )
    assert logged(old, "selection/tokens_trained") == logged(micro, "selection/tokens_trained")
    close(descent(micro), descent(old))


def test_postponed_scores_equal_those_of_the_full_pass(tmp_path):
    """Old log-probabilities of kept rows, computed after selection, are those TRL would have computed for all rows."""
    seen = {}

    class Watching(Fixed):
        def _compute_loss(self, model, inputs):
            ids = inputs["completion_ids"]
            for i, row in enumerate(inputs["row"].tolist()):
                last = int(inputs["completion_mask"][i].sum())
                seen.setdefault(name, {})[row] = (ids[i, :last], inputs["old_per_token_logps"][i, :last])
            return super()._compute_loss(model, inputs)

    for name in ("postponed", "full"):
        rollout = {"rollout": {"correction": {"mode": "truncate"}}} if name == "full" else {}
        generate = CreditTrainer._generate_single_turn

        class Sampled(Watching):
            _generate_single_turn = generate

        trainer = build(tmp_path / name, cls=Sampled, selection={"type": "d3s", **HALF}, max_steps=3, **rollout)
        trainer.train()
    assert len(seen["postponed"]) == 12
    for row, (ids, logps) in seen["postponed"].items():
        other_ids, other = seen["full"][row]
        assert torch.equal(ids, other_ids)
        torch.testing.assert_close(logps, other, atol=1e-5, rtol=0)


def test_postponing_scores_kept_rows_only(tmp_path, monkeypatch):
    passes = []
    real = CreditTrainer._score_selected

    def counting(self, rows):
        passes.append(rows["completion_ids"].size(0))
        return real(self, rows)

    monkeypatch.setattr(CreditTrainer, "_score_selected", counting)
    train(tmp_path / "a", selection={"type": "d3s", **HALF}, max_steps=3)
    assert passes == [12]
    train(tmp_path / "b", selection={"type": "d3s", **HALF}, max_steps=3, objective={"type": "hapo"})
    assert passes == [12], "HAPO's statistics are those of all rows, so TRL's pass runs and is used"


def test_dropped_samples_are_in_no_forward_pass_and_tails_are_cut(tmp_path):
    shapes = []

    class Watching(Fixed):
        def _compute_loss(self, model, inputs):
            shapes.append((tuple(inputs["prompt_ids"].shape), tuple(inputs["completion_ids"].shape), inputs["keep"]))
            return super()._compute_loss(model, inputs)

    trainer = train(tmp_path, cls=Watching, selection={"type": "d3s", **TOKENS}, max_steps=3)
    assert sum(prompt[0] for prompt, _, _ in shapes) == logged(trainer, "selection/samples_trained")[0] <= 12
    for _, completion, keep in shapes:
        assert keep[:, -1].any(), "the last column is needed by some row"
        assert completion[1] == keep.size(1) <= 8
        assert keep.any(1).all(), "rows without a kept token leave altogether"
    tokens = [logged(trainer, f"selection/tokens_{kind}")[0] for kind in ("generated", "trained", "skipped")]
    assert tokens[0] == tokens[1] + tokens[2] and tokens[1] == sum(int(k.sum()) for *_, k in shapes)
    assert logged(trainer, "trained_tokens")[-1] == tokens[1]
    assert 0 < logged(trainer, "selection/work_share")[0] < 0.6
    assert all(seconds > 0 for seconds in logged(trainer, "selection/update_seconds"))


def constant(completions, **_):
    return [0.7] * len(completions)


@pytest.mark.parametrize("kind", ["d3s", "pods", "random"])
def test_nothing_to_learn_skips_the_updates_cleanly(tmp_path, kind):
    options = {"keep": 0.5} if kind == "pods" else {}
    start = {name: p.detach().clone() for name, p in build_model(build_tokenizer()).named_parameters()}
    trainer = train(tmp_path, rewards=constant, selection={"type": kind, **options}, weight_decay=0.1, max_steps=5)
    assert trainer.state.global_step == 5 and logged(trainer, "selection/skipped_updates")[:5] == [1, 2, 3, 4, 5]
    assert logged(trainer, "loss") == [0.0] * 5 and logged(trainer, "trained_tokens")[-1] == 0
    for name, p in trainer.model.named_parameters():
        assert torch.equal(p, start[name]), "not even momentum or weight decay moved it"


def test_one_sample_trains_one_update_and_skips_the_others(tmp_path):
    trainer = train(tmp_path, selection={"type": "d3s", "rows_start": 0.01, "rows_end": 0.01}, max_steps=3)
    assert logged(trainer, "selection/samples_trained") == [1.0] * 3
    assert logged(trainer, "selection/skipped_updates")[2] == 2
    assert [loss != 0 for loss in logged(trainer, "loss")].count(True) == 1


def test_completions_without_a_token_to_train_leave_room_for_others(tmp_path):
    class Endless(Fixed):
        def _generate_single_turn(self, prompt_ids, *args, **kwargs):
            completions, logps = super()._generate_single_turn(prompt_ids)
            end = self.processing_class.eos_token_id
            return [c if i % 2 else [*c[:-1], end] for i, c in enumerate(completions)], logps

    trainer = train(
        tmp_path, cls=Endless, mask_truncated_completions=True, selection={"type": "d3s", **HALF}, max_steps=3
    )
    assert logged(trainer, "selection/samples_trained") == [12.0] * 3, "half of 24, all from rows that ended"


def test_pods_trains_with_the_advantages_of_the_kept_rows(tmp_path):
    rows = {}

    class Watching(Fixed):
        def _compute_loss(self, model, inputs):
            credit = inputs["advantages"].sum(1) / inputs["keep"].sum(1)
            rows.update(zip(inputs["row"].tolist(), credit.tolist(), strict=True))
            return super()._compute_loss(model, inputs)

    train(tmp_path, cls=Watching, selection={"type": "pods", "keep": 0.5}, max_steps=3)
    for group in range(6):
        (a, b) = (value for row, value in rows.items() if row // 4 == group)
        assert a == pytest.approx(-b) and abs(a) == pytest.approx(2**-0.5, rel=0.02)


def test_the_table_shows_what_was_trained(tmp_path):
    tables = {"log_completions": True, "num_completions_to_print": 0}
    for source in ("old", "micro"):
        selection = {"type": "d3s", "entropy_from": source, **TOKENS}
        trainer = train(tmp_path / source, selection=selection, max_steps=3, **tables)
        table = pd.read_parquet(tmp_path / source / "completions" / "completions_00003.parquet")
        assert len(table) == 24
        shown = sum(sum(value != 0 for value in credit) for credit in table["credit"])
        assert shown == logged(trainer, "selection/tokens_trained")[0]
        for credit, tokens, advantage in zip(table["credit"], table["tokens"], table["advantage"], strict=True):
            assert len(credit) == len(tokens)
            assert all(value == 0 or value == pytest.approx(advantage, abs=1e-4) for value in credit)


def test_the_schedule_moves_both_cuts_and_ends_in_the_baseline(tmp_path):
    selection = {"type": "d3s", "rows_start": 0.25, "tokens_start": 0.2, "over": 6}
    trainer = train(tmp_path, selection=selection, max_steps=9)
    assert logged(trainer, "selection/rows_share") == pytest.approx([0.25] * 3 + [0.625] * 3 + [1.0] * 3)
    assert logged(trainer, "selection/tokens_share") == pytest.approx([0.2] * 3 + [0.6] * 3 + [1.0] * 3)
    assert logged(trainer, "selection/work_share")[-1] == 1.0
    assert logged(trainer, "selection/samples_skipped")[-1] == 0


def test_old_entropies_for_one_update_per_rollout_warn_of_their_cost(tmp_path, caplog):
    build(tmp_path, selection={"type": "d3s", "entropy_from": "old"}, steps_per_generation=2)
    assert "costs one more forward pass" in caplog.text


def test_instances_and_terms_that_need_whole_rows(tmp_path):
    trainer = build(tmp_path / "a", selection=D3S(rows_start=0.5))
    assert not trainer._selector.whole_rows and trainer._selector.source == "old"
    with pytest.warns(UserWarning, match="save no time"):
        trainer = build(tmp_path / "b", selection=D3S(), objective=[GSPOToken()], loss_type="grpo")
    assert trainer._selector.whole_rows
    trainer = build(tmp_path / "c", selection=D3S(), steps_per_generation=2)
    assert trainer._selector.source == "micro"


@pytest.mark.parametrize("source", ["old", "micro"])
def test_adapters_under_gradient_checkpointing(tmp_path, source):
    from peft import LoraConfig

    tokenizer = build_tokenizer()
    selection = {"type": "d3s", "entropy_from": source, **TOKENS}
    args = CreditConfig(**run_settings(tmp_path, max_steps=4, gradient_checkpointing=True), selection=selection)
    data = {"train_dataset": digit_dataset(), "processing_class": tokenizer, "peft_config": LoraConfig(r=2)}
    trainer = Fixed(build_model(tokenizer), even_reward, args, **data)
    trainer.train()
    assert all(math.isfinite(loss) for loss in logged(trainer, "loss")) and logged(trainer, "trained_tokens")[-1] > 0
    assert any(p.abs().max() > 0 for n, p in trainer.model.named_parameters() if "lora_B" in n)


@pytest.mark.parametrize("source", ["old", "micro"])
def test_kl_to_the_reference_is_taken_on_kept_tokens_only(tmp_path, source):
    tokenizer = build_tokenizer()
    build_model(tokenizer).save_pretrained(tmp_path / "model")
    selection = {"type": "d3s", "entropy_from": source, **TOKENS}
    args = CreditConfig(**run_settings(tmp_path, max_steps=4, beta=0.5, learning_rate=0.05), selection=selection)
    data = {"train_dataset": digit_dataset(), "processing_class": tokenizer}
    trainer = Fixed(str(tmp_path / "model"), even_reward, args, **data)
    trainer.train()
    kl = logged(trainer, "kl")
    assert kl[0] < 1e-6 < kl[-1] and all(math.isfinite(value) for value in kl)
