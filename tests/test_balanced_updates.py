"""Balanced, budgeted and packed updates against TRL's own: gradients of optimizer steps, metrics, ranks, resume."""

from collections import defaultdict
from dataclasses import replace
from functools import partial

import pytest
import torch
from balanced_worker import BATCHING, DIFFERS
from tests_support import (
    build_model,
    build_tokenizer,
    digit_dataset,
    even_length,
    even_reward,
    run_on_ranks,
    run_settings,
)
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    Mamba2Config,
    Mamba2ForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)
from trl import GRPOConfig, GRPOTrainer

from rltok.config import ConfigError
from rltok.objective import LOSS_TYPES
from rltok.trainers import CreditConfig, CreditTrainer
from rltok.trainers.packed import check_isolation

P, T = 7, 12
KINDS = {
    "qwen2": (Qwen2ForCausalLM, Qwen2Config, {}),
    "llama": (LlamaForCausalLM, LlamaConfig, {}),
    "gpt2": (GPT2LMHeadModel, GPT2Config, {"n_positions": 64, "resid_pdrop": 0, "embd_pdrop": 0, "attn_pdrop": 0}),
}
SMALL = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 64,
    "initializer_range": 0.3,
}


def tiny(kind="qwen2", attention="sdpa", seed=0):
    """A float64 model whose predictions differ between tokens and contexts."""
    torch.manual_seed(seed)
    cls, config, changes = KINDS[kind]
    tokenizer = build_tokenizer()
    ids = {"vocab_size": len(tokenizer), "pad_token_id": 0, "eos_token_id": 1, "bos_token_id": None}
    model = cls(config(**(SMALL | ids | changes), attn_implementation=attention)).double()
    if kind != "gpt2":
        model.model.rotary_emb.forward = partial(exact_rotary, model.model.rotary_emb.inv_freq.double())
    return model, tokenizer


def exact_rotary(frequencies, states, position_ids):
    """cos and sin in float64; transformers' are float32, so that equal distances at other positions differ by 1e-7."""
    angles = torch.cat([position_ids[..., None] * frequencies] * 2, -1)
    return angles.cos().to(states.dtype), angles.sin().to(states.dtype)


def make(folder, ours=True, batching=None, kind="qwen2", model=None, **changes):
    """A trainer whose `training_step` can be called: 2 optimizer steps per rollout, each of 3 slices of 4 rows."""
    beta = changes.pop("beta", 0.0)  # set late: TRL would load a reference model by name
    settings = {"gradient_accumulation_steps": 3, "steps_per_generation": 6, "max_completion_length": T}
    settings |= {"temperature": 0.9, "gradient_checkpointing": False} | changes
    args = run_settings(folder, **settings)
    built, tokenizer = tiny(kind)
    trainer = (CreditTrainer if ours else GRPOTrainer)(
        built if model is None else model,
        even_reward,
        CreditConfig(**args, batching=batching) if ours else GRPOConfig(**args),
        train_dataset=digit_dataset(),
        processing_class=tokenizer,
    )
    trainer.current_gradient_accumulation_steps = trainer.args.gradient_accumulation_steps
    trainer.model.train()
    trainer.beta = beta
    return trainer


def rollout(rows, seed=0, per_token=True):
    """Scored rows of many lengths; one without a completion, one whose completion is masked whole, one partly."""
    generator = torch.Generator().manual_seed(seed)
    noise = lambda: torch.randn(rows, T, generator=generator, dtype=torch.float64)  # noqa: E731
    lengths = torch.randn(rows, generator=generator).mul(0.8).add(1.2).exp().long().clamp(1, T)
    lengths[0], lengths[1], lengths[2] = T, 0, 0
    completion = (torch.arange(T) < lengths[:, None]).long()
    counted = (torch.rand(rows, T, generator=generator) > 0.2).long()
    counted[3] = 0
    prompts = torch.randint(1, P + 1, (rows,), generator=generator)
    prompts[4] = P
    return {
        "prompt_ids": torch.randint(3, 40, (rows, P), generator=generator),
        "prompt_mask": (torch.arange(P) >= P - prompts[:, None]).long(),
        "completion_ids": torch.randint(3, 40, (rows, T), generator=generator),
        "completion_mask": completion,
        "tool_mask": counted,
        "advantages": noise() if per_token else noise()[:, 0],
        "old_per_token_logps": -3.7 + 0.4 * noise(),
        "ref_per_token_logps": -3.7 + 0.3 * noise(),
        "num_items_in_batch": (completion * counted).sum(),
    }


def updates(trainer, rollouts, steps=None):
    """(loss, gradients, metrics) of every optimizer step, none of which moves the weights."""
    waiting = iter(rollouts)
    trainer._generate_and_score_completions = lambda _: next(waiting)
    trainer._metrics["train"], trainer._step, trainer._buffered_inputs = defaultdict(list), 0, None
    accumulation = trainer.args.gradient_accumulation_steps
    steps = steps or max(1, trainer.args.steps_per_generation // accumulation)
    torch.manual_seed(5)  # the order of rows
    found = []
    for _ in range(steps):
        trainer.model.zero_grad()
        loss = 0.0
        for slice_ in range(accumulation):
            trainer.accelerator.gradient_state._set_sync_gradients(slice_ == accumulation - 1)
            loss = loss + trainer.training_step(trainer.model, None, None)
        gradients = [p.grad.clone() for p in trainer.model.parameters()]
        found.append((loss.item(), gradients, {k: sum(v) / len(v) for k, v in trainer._metrics["train"].items()}))
        trainer._metrics["train"].clear()
    return found


def assert_equal_updates(ours, theirs, metrics=False, unlike=("step_time",)):
    assert len(ours) == len(theirs)
    assert any(g.abs().max() > 1e-3 for g in theirs[0][1]), "the comparison needs a gradient"
    for (loss, gradients, logged), (expected, wanted, numbers) in zip(ours, theirs, strict=True):
        # the softmax of TRL's head is float32
        assert loss == pytest.approx(expected, abs=1e-7, rel=1e-7)
        for a, b in zip(gradients, wanted, strict=True):
            torch.testing.assert_close(a, b, atol=1e-7 * max(1.0, b.abs().max().item()), rtol=1e-7)
        for name, value in numbers.items() if metrics else ():
            if value == value and name not in unlike:  # TRL divides by the zero tokens of a row
                assert logged[name] == pytest.approx(value, abs=1e-6), name


def with_loss(trainer, loss_type):
    trainer.loss_type = loss_type
    if isinstance(trainer, CreditTrainer):
        trainer.loss_settings = replace(trainer.loss_settings, loss_type=loss_type)
    return trainer


ONE_SLICE = {"per_device_train_batch_size": 12, "gradient_accumulation_steps": 1, "steps_per_generation": 2}


def reference(name):
    """TRL with one slice per optimizer step, whose means are those of the step; packing alone leaves TRL's slices."""
    return ONE_SLICE if BATCHING[name].get("balance") else {}


@pytest.mark.parametrize("kind", ["qwen2", "llama"])
def test_every_loss_type_equals_trls(tmp_path, kind):
    """Loss and gradient of both optimizer steps of a rollout, for every way to batch it."""
    untouched = make(tmp_path, ours=False, kind=kind)
    one_slice = make(tmp_path, ours=False, kind=kind, **ONE_SLICE)
    cases = [make(tmp_path, batching=batching, kind=kind) for batching in BATCHING.values()]
    for loss_type in LOSS_TYPES:
        rows = rollout(24)
        theirs = updates(with_loss(untouched, loss_type), [rows])
        whole = updates(with_loss(one_slice, loss_type), [rows])
        for trainer in cases:
            # TRL's bnpo is the mean over a slice's tokens, whatever they are; a balanced one's that of the whole step
            mean_of_step = loss_type == "bnpo" and trainer.args.batching.get("balance")
            ours = updates(with_loss(trainer, loss_type), [rows])
            assert_equal_updates(ours, whole if mean_of_step else theirs)
    assert abs(theirs[0][0] - whole[0][0]) < 1e-9, "all but bnpo are the same with one slice"


@pytest.mark.parametrize("name", BATCHING)
@pytest.mark.parametrize(
    "settings",
    [
        {"beta": 0.1},
        {"beta": 0.1, "use_bias_correction_kl": True, "loss_type": "grpo"},
        {"importance_sampling_level": "sequence", "loss_type": "luspo", "epsilon": 0.05},
        {"entropy_coef": 0.05, "loss_type": "grpo"},
        {"off_policy_mask_threshold": 0.05},
        {"delta": 1.5, "loss_type": "dr_grpo"},
    ],
    ids=lambda s: next(iter(s)) + s.get("loss_type", ""),
)
def test_options_and_metrics_equal_trls(tmp_path, name, settings):
    """KL, entropy bonus, ratio levels and masks; and every metric of TRL's, as means over the optimizer step."""
    per_token = "importance_sampling_level" not in settings
    theirs = updates(make(tmp_path, ours=False, **reference(name), **settings), [rollout(24, 1, per_token)])
    ours = updates(make(tmp_path, batching=BATCHING[name], **settings), [rollout(24, 1, per_token)])
    # of whole sequences TRL also counts those without a token
    unlike = ("step_time",) if per_token else ("step_time", "clip_ratio/low_min")
    assert_equal_updates(ours, theirs, metrics=True, unlike=unlike)


@pytest.mark.parametrize("name", BATCHING)
def test_the_adaptive_bonus_steers_by_the_whole_step(tmp_path, name):
    settings = {"entropy_coef": 0.01, "use_adaptive_entropy": True, "entropy_target": 10.0, "loss_type": "grpo"}
    found = []
    for options in ({"ours": False, **reference(name)}, {"batching": BATCHING[name]}):
        trainer = make(tmp_path, **options, **settings)
        trainer._last_world_entropy = 0.0
        found.append((updates(trainer, [rollout(24)]), trainer.entropy_coef))
    (theirs, their_coef), (ours, our_coef) = found
    assert_equal_updates(ours, theirs, metrics=True)
    assert our_coef == their_coef != 0.01


@pytest.mark.parametrize("name", BATCHING)
def test_a_step_over_several_rollouts_and_iterations(tmp_path, name):
    """Steps of 6 slices from 2 rollouts of 3 slices; then 2 iterations over one rollout."""
    several = {"gradient_accumulation_steps": 6, "steps_per_generation": 3}
    parts = [rollout(12, 1), rollout(12, 2)]
    for loss_type in ("dapo", "grpo"):
        theirs = updates(make(tmp_path, ours=False, **several, loss_type=loss_type), parts)
        ours = updates(make(tmp_path, batching=BATCHING[name], **several, loss_type=loss_type), parts)
        assert_equal_updates(ours, theirs)
    again = {"num_iterations": 2}
    theirs = updates(make(tmp_path, ours=False, **again), [rollout(24, 3)], steps=4)
    ours = make(tmp_path, batching=BATCHING[name], **again)
    assert_equal_updates(updates(ours, [rollout(24, 3)], steps=4), theirs)
    assert ours._step == 12


def test_bnpo_of_several_rollouts_is_the_mean_of_their_token_means(tmp_path):
    several = {"loss_type": "bnpo", "gradient_accumulation_steps": 6, "steps_per_generation": 3}
    one_each = {"per_device_train_batch_size": 12, "gradient_accumulation_steps": 2, "steps_per_generation": 1}
    parts = [rollout(12, 1), rollout(12, 2)]
    theirs = updates(make(tmp_path, ours=False, loss_type="bnpo", **one_each), parts, steps=1)
    ours = updates(make(tmp_path, batching=BATCHING["budget"], **several), parts)
    assert_equal_updates(ours, theirs)


def test_passes_keep_the_budget_the_rows_and_their_order_in_time(tmp_path):
    rows = rollout(24)
    rows["row"] = torch.arange(24)
    plain = make(tmp_path)
    updates(plain, [rows])
    windows = [set(torch.cat([s["row"] for s in plain._buffered_inputs[k : k + 3]]).tolist()) for k in (0, 3)]
    for name, batching in BATCHING.items():
        trainer = make(tmp_path, batching=batching)
        updates(trainer, [rows])
        slices = trainer._buffered_inputs
        if not batching.get("balance"):
            assert all(torch.equal(a["row"], b["row"]) for a, b in zip(slices, plain._buffered_inputs, strict=True))
            continue
        assert len(slices) == 6 and all(slices)
        for window, k in zip(windows, (0, 3), strict=True):
            placed = [row for s in slices[k : k + 3] for one in s for row in one["row"].tolist()]
            assert sorted(placed) == sorted(window), name
        passes = [one for s in slices for one in s]
        assert len(passes) == 6 or "max_tokens" in batching
        multiple = batching.get("multiple_of", 1)
        for one in passes:
            prompt, completion = one["prompt_mask"], one["completion_mask"]
            # nothing that can be cut is left: some row fills the width, up to rounding
            assert prompt.any(0).sum() > prompt.size(1) - multiple
            assert completion.size(1) <= max(2, completion.any(0).sum() + multiple - 1)
            tokens = prompt.numel() + completion.numel()
            if batching.get("pack"):
                tokens = int(prompt.sum() + completion.sum())
            assert tokens <= batching.get("max_tokens", 10**6) or len(one["row"]) == 1


def test_less_padding_is_computed(tmp_path):
    """Positions that reach the model in one rollout's updates."""
    seen = {}
    for name, batching in {"plain": None, **BATCHING}.items():
        trainer = make(tmp_path, batching=batching)
        counts = []
        trainer.model.model.embed_tokens.register_forward_hook(lambda _m, args, _o, c=counts: c.append(args[0].numel()))
        if name != "plain":
            scores(trainer, rollout(6))  # the check of isolation comes before the first packed pass
        counts.clear()
        updates(trainer, [rollout(24)])
        seen[name] = sum(counts)
    tokens = int(rollout(24)["prompt_mask"].sum() + rollout(24)["completion_mask"].sum())
    assert seen["plain"] == 24 * (P + T)
    assert seen["balance"] < 0.8 * seen["plain"]
    assert tokens <= seen["together"] < 1.35 * tokens, "packed rows hold little padding"


def scores(trainer, rows, batch_size=None, model=None):
    ids = torch.cat([rows["prompt_ids"], rows["completion_ids"]], 1)
    mask = torch.cat([rows["prompt_mask"], rows["completion_mask"]], 1)
    with torch.no_grad():
        return trainer._get_per_token_logps_and_entropies(
            model or trainer.model, ids, mask, T, batch_size=batch_size, compute_entropy=True
        )


@pytest.mark.parametrize("batching", BATCHING.values(), ids=BATCHING)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_scores_of_a_rollout_equal_trls(tmp_path, batching, attention):
    """Old policy and reference: the same (B, T), in several passes or one, in training and in evaluation."""
    rows = rollout(24)
    exact = attention == "sdpa"  # the eager softmax is float32, where a float64 mask becomes infinite
    near = {"atol": 1e-9, "rtol": 1e-9} if exact else {"atol": 1e-5, "rtol": 1e-5}

    def model():
        made, _ = tiny(attention=attention)
        return made if exact else made.float()

    expected = scores(make(tmp_path, ours=False, model=model()), rows)
    for batch_size in (None, 4, 5):
        trainer = make(tmp_path, batching=batching, model=model())
        for mode in (True, False):
            trainer.model.train(mode)
            logps, entropy, aux = scores(trainer, rows, batch_size)
            torch.testing.assert_close(logps, expected[0], **near)
            torch.testing.assert_close(entropy, expected[1], **near)
            assert aux is None and trainer.model.training == mode


@pytest.mark.parametrize("kind", KINDS)
def test_packed_samples_do_not_see_each_other(tmp_path, kind):
    trainer = make(tmp_path, batching={"pack": True}, kind=kind)
    rows = rollout(6)
    before = scores(trainer, rows)
    for changed in range(6):
        other = {name: value.clone() for name, value in rows.items()}
        other["prompt_ids"][changed] += 1
        other["completion_ids"][changed] += 1
        after = scores(trainer, other)
        rest = [row for row in range(6) if row != changed]
        for a, b in zip(before[:2], after[:2], strict=True):
            assert torch.equal(a[rest], b[rest]), "bit-equal"
        if rows["completion_mask"][changed].any():
            assert not torch.equal(before[0][changed], after[0][changed])


def test_packing_gives_absolute_positions_as_generation_does(tmp_path):
    """TRL counts the padding at the left; a packed sample begins at 0, as a prompt without padding does."""
    trainer = make(tmp_path, batching={"pack": True}, kind="gpt2")
    rows = rollout(6)
    packed, _, _ = scores(trainer, rows)
    for i in range(6):
        prompt, length = rows["prompt_mask"][i].bool(), int(rows["completion_mask"][i].sum())
        ids = torch.cat([rows["prompt_ids"][i][prompt], rows["completion_ids"][i][:length]])[None]
        with torch.no_grad():
            logps = (trainer.model(ids).logits[0, :-1] / trainer.temperature).log_softmax(-1)
        alone = logps.gather(1, ids[0, 1:, None])[:, 0][len(ids[0]) - 1 - length :]
        torch.testing.assert_close(packed[i, :length].double(), alone, atol=1e-5, rtol=1e-5)


def test_a_model_that_mixes_samples_is_found_out(tmp_path):
    trainer = make(tmp_path, batching={"pack": True})
    original = trainer.model.model.forward
    trainer.model.model.forward = lambda *args, **kwargs: original(
        *args, **(kwargs | {"attention_mask": torch.ones_like(kwargs["input_ids"])})
    )
    with pytest.raises(ConfigError, match=r"batching.pack=true.*see each other"):
        scores(trainer, rollout(6))
    trainer.model.model.forward = original
    check_isolation(trainer.model, trainer.model.config)


def moe(**changes):
    torch.manual_seed(0)
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "head_dim": 8}
    config = Qwen3MoeConfig(**(SMALL | experts | {"vocab_size": 60, "output_router_logits": True} | changes))
    return Qwen3MoeForCausalLM(config)


def test_experts_are_balanced_over_all_tokens_of_a_step(tmp_path):
    """With one pass per step the load-balancing loss is TRL's; with several, a mean weighted by tokens."""
    theirs = make(tmp_path, ours=False, model=moe(), **ONE_SLICE)
    ours = make(tmp_path, batching={"balance": True}, model=moe(), **ONE_SLICE)
    assert theirs.aux_loss_enabled
    for a, b in zip(updates(ours, [rollout(24)]), updates(theirs, [rollout(24)]), strict=True):
        assert a[0] == pytest.approx(b[0], rel=1e-5) and a[2]["aux_loss"] == pytest.approx(b[2]["aux_loss"], rel=1e-5)
        for x, y in zip(a[1], b[1], strict=True):
            torch.testing.assert_close(x, y, atol=1e-4, rtol=1e-4)
    several = make(tmp_path, batching=BATCHING["budget"], model=moe())
    updates(several, [rollout(24)])
    shares = [float(one["pass/share"]) for s in several._buffered_inputs[:3] for one in s]
    assert len(shares) > 3 and sum(shares) == pytest.approx(3)


@pytest.mark.parametrize(
    ("batching", "settings", "words"),
    [
        ({"balance": True}, {"selection": {"type": "d3s"}}, "batching.balance=true with selection.type=D3S"),
        ({"pack": True}, {"selection": {"type": "d3s"}}, "batching.pack=true with selection.type=D3S"),
        ({"balance": True}, {"top_entropy_quantile": 0.2}, "training.top_entropy_quantile=0.2"),
        (
            {"balance": True},
            {"objective": {"type": "hapo", "statistics": "micro_batch"}},
            "objective.statistics='micro_batch'",
        ),
        ({"balance": True}, {"objective": {"type": "clip_cov"}}, "objective.type=ClipCov"),
        ({"balance": True}, {"objective": [{"type": "gspo_token"}, {"type": "kl_cov"}]}, "objective.type=KLCov"),
        ({"balance": True}, {"gradient_accumulation_steps": 4}, "training.steps_per_generation=6 is neither"),
        ({"balance": True}, {"kind": "gpt2"}, r"learned table of positions \(transformer.wpe\).*batching.pack=true"),
        ({"balanced": True}, {}, "did you mean 'balance'"),
    ],
)
def test_what_would_change_its_meaning_is_refused(tmp_path, batching, settings, words):
    with pytest.raises(ConfigError, match=words):
        make(tmp_path, batching=batching, **settings)


def test_what_cannot_be_isolated_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="attn_implementation='flex_attention'"):
        model, _ = tiny()
        model.config._attn_implementation = "flex_attention"
        make(tmp_path, batching={"pack": True}, model=model)
    with pytest.raises(ConfigError, match="rotary positions"):
        model, _ = tiny()
        model.config.rope_parameters = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
        make(tmp_path, batching={"balance": True}, model=model)
    with pytest.raises(ConfigError, match="recurrent layers"):
        config = Mamba2Config(vocab_size=60, hidden_size=16, num_hidden_layers=1, num_heads=4, head_dim=8, state_size=8)
        make(tmp_path, batching={"pack": True}, model=Mamba2ForCausalLM(config), rollout={"engine": "transformers"})
    with pytest.raises(ConfigError, match="load-balancing loss"):
        make(tmp_path, batching={"pack": True}, model=moe())


def test_images_are_refused(tmp_path):
    trainer = make(tmp_path, batching={"balance": True})
    with pytest.raises(ValueError, match="batching.balance does not support images"):
        updates(trainer, [rollout(24) | {"pixel_values": torch.zeros(24, 3)}])


# ---------------------------------------------------------------------- whole runs


class Fixed(CreditTrainer):
    """Completions that depend on the prompt and the row only."""

    stop_after = None

    def _generate_single_turn(self, prompt_ids, *args, **kwargs):
        generator = torch.Generator().manual_seed(sum(map(sum, prompt_ids)) % 1000)
        lengths = torch.randint(1, 9, (len(prompt_ids),), generator=generator).tolist()
        return [torch.randint(3, 40, (n,), generator=generator).tolist() for n in lengths], None


def train(folder, batching, resume=None, **changes):
    tokenizer = build_tokenizer()
    settings = {"max_steps": 4, "num_iterations": 2} | changes
    args = CreditConfig(**run_settings(folder, **settings), batching=batching, samples={"rows": 8})
    trainer = Fixed(
        build_model(tokenizer),
        [even_reward, even_length],
        args,
        train_dataset=digit_dataset(),
        processing_class=tokenizer,
    )
    trainer.train(resume_from_checkpoint=resume)
    return trainer


DESCENT = {"optim": "sgd", "learning_rate": 0.3, "lr_scheduler_type": "constant"}


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    return train(tmp_path_factory.mktemp("plain"), None, **DESCENT)


@pytest.mark.parametrize("name", BATCHING)
def test_training_equals_the_default(tmp_path, plain, name):
    """Whole runs of several updates per rollout: parameters, steps, metrics, one entry of a metric per step."""
    other = train(tmp_path / "other", BATCHING[name], **DESCENT)
    assert other.state.global_step == plain.state.global_step == 4 and other._step == plain._step
    for (key, a), b in zip(plain.model.named_parameters(), other.model.parameters(), strict=True):
        torch.testing.assert_close(b, a, atol=2e-6, rtol=1e-5, msg=key)
    for a, b in zip(plain.state.log_history[:4], other.state.log_history[:4], strict=True):
        assert b["loss"] == pytest.approx(a["loss"], abs=1e-5)
        assert b["trained_tokens"] == a["trained_tokens"]
        assert set(a) == set(b) and b["step_time"] > 0


def test_resume_in_the_middle_of_a_rollout(tmp_path):
    """A checkpoint between two updates of a rollout holds its passes; the run goes on bit for bit."""
    for name in ("budget", "together"):
        whole = train(tmp_path / name, BATCHING[name], save_strategy="steps", save_steps=2)
        again = train(tmp_path / name, BATCHING[name], resume=str(tmp_path / name / "checkpoint-2"))
        for (key, a), b in zip(whole.model.named_parameters(), again.model.parameters(), strict=True):
            assert torch.equal(a, b), key
    with pytest.raises(ValueError, match="batching.balance=false.*recipe it was started with"):
        train(tmp_path / "budget", None, resume=str(tmp_path / "budget" / "checkpoint-2"))


def test_two_processes_equal_one(tmp_path):
    results = []
    for ranks in (1, 2):
        run_on_ranks("balanced_worker.py", ranks, tmp_path)
        results.append(torch.load(tmp_path / f"balanced{ranks}.pt", weights_only=True))
    one, two = results
    for name in ("plain", *BATCHING):
        assert two[name]["losses"] == pytest.approx(one[name]["losses"], abs=1e-5)
        for key, value in one[name]["parameters"].items():
            torch.testing.assert_close(two[name]["parameters"][key], value, atol=1e-5, rtol=0, msg=f"{name}: {key}")
            torch.testing.assert_close(value, one["plain"]["parameters"][key], atol=1e-5, rtol=0, msg=f"{name}: {key}")
        for key, value in one[name]["metrics"].items():
            if not any(word in key for word in DIFFERS):
                assert two[name]["metrics"][key] == pytest.approx(value, abs=2e-5, rel=1e-4), f"{name}: {key}"
    counts = two["budget"]["passes"]
    assert counts[0] == counts[1] and max(counts[0]) > 1, "ranks run the same number of passes in every slice"
    assert two["budget"]["exchanges"] == two["plain"]["exchanges"], "gradients are exchanged once per optimizer step"
