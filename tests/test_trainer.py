"""CreditTrainer as a user meets it: exact limits, refusals, edge cases, tables, trackers."""

import math

import pandas as pd
import pytest
import torch
from datasets import Dataset
from tests_support import build_model, build_tokenizer, digit_dataset, even_length, even_reward, run_settings
from trl import GRPOConfig, GRPOTrainer

from rltok.config import ConfigError
from rltok.objective import HAPO
from rltok.trainers import CreditConfig, CreditTrainer

HAPO_DOORS = {
    "credit": {"type": "token_group_average"},
    "objective": {"type": "hapo"},
    "rollout": {"decoding": [{"type": "adaptive_temperature"}]},
}


REFLEX = {"type": "cyclic_reflex", "words": ["1", "2", "3"], "amplitude": 2.0, "period": 6.0}
SWITCHING = {"type": "thought_switching", "words": ["4", "5"], "alpha": 1.0, "beta": 3}
SUPPRESSION = {"type": "reflection_suppression", "words": ["6"], "strength": 1.5, "variants": "bare"}
FORCING = {"type": "budget_forcing", "min_tokens": 3, "max_tokens": 5, "ignore": 0, "wait_text": "w"}
PREPLAN = {"type": "preplan_anchor", "window": 2, "horizon_min": 1, "horizon_max": 4}
DOORS = ("credit", "objective", "rollout", "selection")


def make(tmp_path, cls=CreditTrainer, rewards=even_reward, dataset=None, eval_dataset=None, **changes):
    doors = {name: changes.pop(name) for name in DOORS if name in changes}
    tokenizer = build_tokenizer()
    config = GRPOConfig if cls is GRPOTrainer else CreditConfig
    dataset = dataset if dataset is not None else digit_dataset()
    args = config(**run_settings(tmp_path, **changes))
    data = {"train_dataset": dataset, "eval_dataset": eval_dataset, "processing_class": tokenizer}
    return cls(build_model(tokenizer), rewards, args, **data, **doors)


def train(tmp_path, *args, **kwargs):
    trainer = make(tmp_path, *args, **kwargs)
    trainer.train()
    return trainer


def parameters(trainer):
    return {name: p.detach().clone() for name, p in trainer.model.named_parameters()}


def logged(trainer, key):
    return [entry[key] for entry in trainer.state.log_history if key in entry]


@pytest.fixture(scope="module")
def trl_run(tmp_path_factory):
    """TRL's own DAPO: five optimizer steps with accumulation and three updates per rollout."""
    return parameters(train(tmp_path_factory.mktemp("trl"), GRPOTrainer, max_steps=5, delta=10.0))


NEUTRAL = {
    "no doors": {},
    "group": {"credit": {"type": "group"}},
    "strength 0": {
        "objective": {"type": "hapo", "alpha": 0.0, "beta": 0.0},
        "rollout": {"decoding": [{"type": "adaptive_temperature", "tau": 0.0}]},
    },
    "amplitude 0": {"rollout": {"decoding": [REFLEX | {"amplitude": 0.0}]}},
    "alpha 0": {"rollout": {"decoding": [SWITCHING | {"alpha": 0.0}]}},
    "suppression 0": {"rollout": {"decoding": [SUPPRESSION | {"strength": 0.0}]}},
    "infinite budget": {"rollout": {"decoding": [FORCING | {"min_tokens": 0, "max_tokens": None}]}},
    "recorded only": {"rollout": {"record_logps": "always"}},
    "preplan 1": {"credit": {"type": "preplan_anchor", "gamma_amp": 1.0}},
    "preplan of nothing": {"credit": {"type": "preplan_anchor", "top_quantile": 0.0}},
    "shaping 0": {"credit": {"type": "entropy_shaping", "alpha": 0.0}},
    "clip-cov 0": {"objective": {"type": "clip_cov", "ratio": 0.0}},
    "d3s keeps all": {"selection": {"type": "d3s", "rows_start": 1.0, "tokens_start": 1.0}},
    "d3s keeps all, rows per prompt": {
        "selection": {"type": "d3s", "rows_start": 1.0, "tokens_start": 1.0, "scope": "group", "loss_norm": "full"}
    },
    "pods keeps all": {"selection": {"type": "pods", "keep": 1.0}},
    "random keeps all": {"selection": {"type": "random", "rows_start": 1.0, "tokens_start": 1.0}},
}


@pytest.mark.parametrize("case", NEUTRAL)
def test_neutral_settings_are_dapo_bit_for_bit(tmp_path, trl_run, case):
    """On TRL's own sampler, TRL's own parameters."""
    doors = NEUTRAL[case]
    rollout = doors.get("rollout", {}) | {"engine": "transformers"}
    trainer = train(tmp_path, max_steps=5, delta=10.0, **{**doors, "rollout": rollout})
    assert min(logged(trainer, "ratio")) < 1 - 1e-4, "several updates per rollout"
    for name, value in parameters(trainer).items():
        assert torch.equal(value, trl_run[name]), name


@pytest.fixture(scope="module")
def fast_run(tmp_path_factory):
    """The same with the engine `fast` and no other door."""
    return parameters(train(tmp_path_factory.mktemp("fast"), max_steps=5, delta=10.0))


@pytest.mark.parametrize("case", [case for case, doors in NEUTRAL.items() if "rollout" in doors])
def test_neutral_rollouts_on_our_engine_change_no_bit(tmp_path, fast_run, trl_run, case):
    found = parameters(train(tmp_path, max_steps=5, delta=10.0, **NEUTRAL[case]))
    for name, value in found.items():
        assert torch.equal(value, fast_run[name]), name
    assert not all(torch.equal(value, trl_run[name]) for name, value in found.items()), "other samples than TRL's"


ACTIVE = {
    "hapo": HAPO_DOORS,
    "B": {"credit": HAPO_DOORS["credit"]},
    "C": {"objective": {"type": "hapo", "alpha": 0.0}},
    "D": {"objective": {"type": "hapo", "beta": 0.0}},
    "A": {"rollout": {"decoding": [{"type": "adaptive_temperature", "tau": 0.5}]}},
    "reflex": {"rollout": {"decoding": [REFLEX]}},
    "thought switching": {"rollout": {"decoding": [SWITCHING]}},
    "suppression": {"rollout": {"decoding": [SUPPRESSION]}},
    "budget forcing": {"rollout": {"decoding": [FORCING]}},
    "all decoding on hapo and d3s": {
        **HAPO_DOORS,
        "rollout": {"decoding": [REFLEX, SWITCHING, SUPPRESSION, FORCING, {"type": "adaptive_temperature"}]},
        "selection": {"type": "d3s"},
    },
    "released": {"objective": {"type": "hapo", "sign": "released", "statistics": "micro_batch", "zone": "token"}},
    "clip_cov": {"objective": {"type": "clip_cov", "ratio": 0.1, "low": 0.0}},
    "kl_cov": {"objective": {"type": "kl_cov", "ratio": 0.1}},
    "shaping": {"credit": {"type": "entropy_shaping"}},
    "gspo_token": {"objective": {"type": "gspo_token"}, "loss_type": "grpo", "epsilon": 0.01, "epsilon_high": 0.01},
    "chain": {"objective": [{"type": "hapo"}, {"type": "clip_cov", "ratio": 0.1, "low": 0.0}]},
    "preplan": {"credit": PREPLAN},
    "preplan local, batch heads": {"credit": PREPLAN | {"strategy": "local", "head_scope": "batch"}},
    "preplan global, positive": {"credit": PREPLAN | {"strategy": "global", "sign": "positive"}},
    "preplan shuffled": {"credit": PREPLAN | {"control": "shuffled"}},
    "preplan entropy": {"credit": PREPLAN | {"control": "entropy"}},
    "d3s on preplan": {"credit": PREPLAN, "selection": {"type": "d3s"}},
    "preplan on hapo": {"credit": PREPLAN, "objective": {"type": "hapo"}},
    "d3s": {"selection": {"type": "d3s"}},
    "d3s by micro-batch": {"selection": {"type": "d3s", "entropy_from": "micro"}},
    "d3s per prompt": {"selection": {"type": "d3s", "scope": "group", "token_scope": "sample", "drop_zero": True}},
    "pods": {"selection": {"type": "pods", "keep": 0.5}},
    "random": {"selection": {"type": "random"}},
    "d3s on hapo": {**HAPO_DOORS, "selection": {"type": "d3s"}},
    "d3s on shaping": {"credit": {"type": "entropy_shaping"}, "selection": {"type": "d3s"}},
    "d3s on kl_cov": {"objective": {"type": "kl_cov", "ratio": 0.1}, "selection": {"type": "d3s"}},
    "d3s on grpo": {"loss_type": "grpo", "selection": {"type": "d3s"}},
    "d3s on gspo": {"loss_type": "grpo", "importance_sampling_level": "sequence", "selection": {"type": "d3s"}},
    "d3s on gspo_token": {"loss_type": "grpo", "objective": {"type": "gspo_token"}, "selection": {"type": "d3s"}},
    "d3s on cispo": {"loss_type": "cispo", "epsilon_high": 5.0, "selection": {"type": "d3s"}},
    "d3s on dr_grpo": {"loss_type": "dr_grpo", "scale_rewards": "none", "selection": {"type": "d3s"}},
    "d3s on vespo": {"loss_type": "vespo", "selection": {"type": "d3s"}},
    "d3s corrected": {"rollout": {"correction": {"mode": "mask"}}, "selection": {"type": "d3s"}},
    "d3s after dynamic sampling": {
        "rollout": {"dynamic_sampling": {"metric": "even_reward", "max_rounds": 0}},
        "selection": {"type": "d3s"},
    },
}


@pytest.mark.parametrize("case", ACTIVE)
def test_every_method_moves_the_parameters_its_own_way(tmp_path, case):
    changes = {"max_steps": 4, **ACTIVE[case]}
    plain = {k: v for k, v in changes.items() if k not in DOORS}
    ours = train(tmp_path / "a", **changes)
    base = parameters(train(tmp_path / "b", **plain))
    assert all(torch.isfinite(v).all() for v in parameters(ours).values())
    assert any(not torch.equal(v, base[k]) for k, v in parameters(ours).items())
    assert all(math.isfinite(loss) for loss in logged(ours, "loss"))


def test_gspo_token_with_one_advantage_per_completion_is_gspo(tmp_path):
    common = {"loss_type": "grpo", "epsilon": 0.01, "epsilon_high": 0.01, "max_steps": 3}
    token = parameters(train(tmp_path / "a", objective={"type": "gspo_token"}, **common))
    whole = parameters(train(tmp_path / "b", importance_sampling_level="sequence", **common))
    for name, value in whole.items():
        torch.testing.assert_close(token[name], value, atol=1e-4, rtol=1e-3)


def test_hapo_reports_what_would_reveal_its_failure(tmp_path):
    trainer = train(tmp_path, max_steps=4, **HAPO_DOORS)
    first = trainer.state.log_history[0]
    assert first["hapo/amplified"] == 0 and first["hapo/attenuated"] > 0.5, "on the first update every ratio is 1"
    assert -1 <= first["entropy_signal/p10"] <= first["entropy_signal/p50"] <= first["entropy_signal/p90"] <= 1
    assert 0 < first["credit/top20_share"] <= 1 and first["credit/nonzero_share"] == 1
    assert "rollout/temperature_factor" not in first, "the first rollout has no statistics yet"
    (factor,) = logged(trainer, "rollout/temperature_factor")
    assert 0.95 <= factor <= 1.05 and factor != 1
    before, after = logged(trainer, "correction/max_abs_diff")
    assert before < 1e-5 < after, "the sampler differs from the learner exactly when the temperature adapts"


def test_attention_is_read_once_per_rollout_and_only_if_asked_for(tmp_path, monkeypatch):
    import rltok.trainers.credit_trainer as module

    passes = []
    real = module.attention_signals

    def counting(model, ids, *args):
        passes.append(ids.size(0))
        return real(model, ids, *args)

    monkeypatch.setattr(module, "attention_signals", counting)
    train(tmp_path / "a", max_steps=4, credit={"type": "preplan_anchor", "gamma_amp": 1.0})
    train(tmp_path / "b", max_steps=4)
    assert passes == []
    trainer = train(tmp_path / "c", max_steps=4, credit=PREPLAN)
    assert passes == [24, 24], "two rollouts of 24 completions, three updates each"
    first = trainer.state.log_history[0]
    assert 0 < first["attention/local_span"] <= first["attention/global_span"] <= 8 + 6
    assert 1 < first["credit/gamma"] < 1.5 and 0 < first["credit/amplified"] <= 0.8
    for group in ("local", "global"):
        shares = [value for key, value in first.items() if key.startswith(f"attention/{group}_share_in_layer_")]
        assert len(shares) == 2 and sum(shares) == pytest.approx(1)


def test_a_model_whose_attention_cannot_be_read_is_refused_before_any_rollout(tmp_path):
    from transformers import Gemma2Config, Gemma2ForCausalLM

    tokenizer = build_tokenizer()
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "head_dim": 8}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "pad_token_id": 0, "attn_implementation": "eager"}
    model = Gemma2ForCausalLM(Gemma2Config(vocab_size=len(tokenizer), **shape, **heads))
    args = CreditConfig(**run_settings(tmp_path), credit=PREPLAN)
    with pytest.raises(ConfigError, match="PreplanAnchor: Gemma2ForCausalLM has attention soft-capping"):
        CreditTrainer(model, even_reward, args, train_dataset=digit_dataset(), processing_class=tokenizer)


def test_sampler_and_learner_agree_without_decoding(tmp_path):
    rollout = {"correction": {"mode": "truncate"}, "record_logps": "always"}
    corrected = train(tmp_path / "a", rollout=rollout)
    plain = train(tmp_path / "b")
    assert max(logged(corrected, "correction/max_abs_diff")) < 1e-5
    assert logged(corrected, "correction/weight_mean") == pytest.approx([1.0], abs=1e-5)
    for name, value in parameters(plain).items():
        torch.testing.assert_close(parameters(corrected)[name], value, atol=1e-4, rtol=1e-3)


def test_no_trace_on_the_model_after_training(tmp_path):
    ours, theirs = train(tmp_path / "a", **HAPO_DOORS), train(tmp_path / "b", GRPOTrainer)
    assert set(vars(ours.model)) == set(vars(theirs.model))


def test_evaluation_samples_plainly_with_groups_of_one(tmp_path):
    evaluation = {"num_generations_eval": 1, "per_device_eval_batch_size": 4, "eval_strategy": "steps", "eval_steps": 2}
    trainer = train(tmp_path, eval_dataset=digit_dataset(6), **evaluation, **HAPO_DOORS)
    assert logged(trainer, "eval_reward") and all(math.isfinite(v) for v in logged(trainer, "eval_loss"))
    shown = {key for entry in trainer.state.log_history for key in entry if key.startswith("eval_rollout/")}
    costs = ("tokens_per_second", "live_share", "prefill_tokens", "prefill_tokens_saved", "peak_cache_bytes")
    assert shown == {f"eval_rollout/{name}" for name in costs}, "of no decoding method"


def test_dynamic_sampling_trains_on_mixed_groups_only(tmp_path):
    seen = []

    class Watching(CreditTrainer):
        def _generate_and_score_completions(self, inputs):
            output = super()._generate_and_score_completions(inputs)
            seen.append(output)
            return output

    rollout = {"dynamic_sampling": {"metric": "even_length", "max_rounds": 0}}
    trainer = make(tmp_path, Watching, [even_length, even_reward], rollout=rollout, num_generations=2, max_steps=4)
    trainer.train()
    assert max(logged(trainer, "dynamic_sampling/rounds")) > 1
    for output in seen:
        assert output["completion_ids"].shape[0] == 24, "the batch is exact after refilling"
        assert output["num_items_in_batch"] == output["completion_mask"].sum()
        texts = trainer.processing_class.batch_decode(
            [i[m.bool()] for i, m in zip(output["completion_ids"], output["completion_mask"], strict=True)],
            skip_special_tokens=True,
        )
        pairs = torch.tensor(even_length(texts)).view(-1, 2)
        assert (pairs[:, 0] != pairs[:, 1]).all()
        prompts = output["prompt_ids"].view(12, 2, -1)
        assert torch.equal(prompts[:, 0], prompts[:, 1]), "groups stay whole"


def constant(completions, **_):
    return [1.0] * len(completions)


def test_dynamic_sampling_stops_at_its_limit(tmp_path):
    rollout = {"dynamic_sampling": {"metric": "constant", "max_rounds": 2}}
    with pytest.raises(RuntimeError, match="max_rounds=2 rounds only 0 of 6 groups vary in 'constant'"):
        train(tmp_path, rewards=[constant, even_reward], rollout=rollout)
    rollout["dynamic_sampling"]["on_limit"] = "keep"
    trainer = train(tmp_path, rewards=[constant, even_reward], rollout=rollout)
    assert logged(trainer, "dynamic_sampling/kept_share") == [0.0]


class Fixed(CreditTrainer):
    """Completions of given lengths, the same for every prompt."""

    lengths = (1, 1, 1, 1)

    def _generate_single_turn(self, prompt_ids, *args, **kwargs):
        eos = self.processing_class.eos_token_id
        completions = [[5 + i % 7] * (self.lengths[i % 4] - 1) + [eos] for i in range(len(prompt_ids))]
        return completions, None


@pytest.mark.parametrize(
    "doors",
    [HAPO_DOORS, ACTIVE["released"], ACTIVE["clip_cov"], ACTIVE["shaping"], ACTIVE["preplan"], ACTIVE["d3s"]],
)
@pytest.mark.parametrize(
    "case",
    [
        {"lengths": (1, 1, 1, 1), "rewards": even_reward},
        {"lengths": (1, 8, 3, 2), "rewards": constant},
        {"lengths": (8, 8, 3, 8), "rewards": even_reward, "mask_truncated_completions": True, "truncate": True},
    ],
    ids=["one-token completions", "zero-variance groups", "everything masked"],
)
def test_edge_cases_train_on_without_nan(tmp_path, doors, case):
    doors = {k: v for k, v in doors.items() if k != "rollout"}

    class Edge(Fixed):
        lengths = case["lengths"]

        def _generate_single_turn(self, prompt_ids, *args, **kwargs):
            completions, logps = super()._generate_single_turn(prompt_ids)
            return [c[:-1] + [9] for c in completions] if case.get("truncate") else completions, logps

    masked = {"mask_truncated_completions": True} if case.get("truncate") else {}
    trainer = train(tmp_path, Edge, case["rewards"], **doors, **masked)
    assert all(math.isfinite(loss) for loss in logged(trainer, "loss"))
    assert all(torch.isfinite(v).all() for v in parameters(trainer).values())
    if case["rewards"] is constant or masked:
        assert logged(trainer, "loss") == [0.0, 0.0, 0.0]


def test_the_completions_table_shows_the_credit_of_the_loss(tmp_path):
    trainer = train(tmp_path, log_completions=True, num_completions_to_print=0, **HAPO_DOORS)
    table = pd.read_parquet(tmp_path / "completions" / "completions_00003.parquet")
    assert len(table) == 24 and {"prompt", "completion", "even_reward", "advantage", "tokens", "credit"} <= set(table)
    for tokens, credit, text in zip(table["tokens"], table["credit"], table["completion"], strict=True):
        visible = [token for token in tokens if token not in ("<pad>", "<eos>", "<unk>", " ")]
        assert len(tokens) == len(credit) and "".join(visible) == text.replace(" ", "")
    lengths = [len(credit) for credit in table["credit"]]
    assert max(lengths) <= 8 and min(lengths) >= 1
    # C shrinks low-entropy tokens, so within most completions the credit is not constant
    varied = [len(set(credit)) > 1 for credit in table["credit"] if len(credit) > 2]
    assert sum(varied) > len(varied) / 2
    uniform = train(tmp_path / "plain", log_completions=True, num_completions_to_print=0)
    table = pd.read_parquet(tmp_path / "plain" / "completions" / "completions_00003.parquet")
    for credit, advantage in zip(table["credit"], table["advantage"], strict=True):
        assert list(credit) == pytest.approx([advantage] * len(credit), abs=1e-4)
    assert uniform.state.global_step == trainer.state.global_step == 3


def test_plain_python_use_like_trls(tmp_path):
    tokenizer = build_tokenizer()
    trainer = CreditTrainer(
        model=build_model(tokenizer),
        reward_funcs=even_reward,
        args=GRPOConfig(**run_settings(tmp_path, max_steps=1)),
        train_dataset=digit_dataset(),
        processing_class=tokenizer,
        objective=[HAPO(alpha=0.5)],
    )
    trainer.train()
    assert trainer.doors.objective == (HAPO(alpha=0.5),)
    with pytest.raises(ValueError, match="objective is set both in CreditConfig and in CreditTrainer"):
        CreditTrainer(
            build_model(tokenizer),
            even_reward,
            CreditConfig(**run_settings(tmp_path), objective={"type": "hapo"}),
            train_dataset=digit_dataset(),
            processing_class=tokenizer,
            objective=HAPO(),
        )


def test_conversational_prompts(tmp_path):
    rows = [{"prompt": [{"role": "user", "content": f"{i}+1"}]} for i in range(16)]
    texts = []

    def reward(completions, **_):
        texts.extend(c[0]["content"] for c in completions)
        return [float(len(c[0]["content"])) for c in completions]

    trainer = train(tmp_path, rewards=reward, dataset=Dataset.from_list(rows), **HAPO_DOORS)
    assert texts and all(math.isfinite(v) for v in logged(trainer, "loss"))


def test_lora(tmp_path):
    from peft import LoraConfig

    tokenizer = build_tokenizer()
    trainer = CreditTrainer(
        build_model(tokenizer),
        even_reward,
        CreditConfig(**run_settings(tmp_path, max_steps=4), **HAPO_DOORS),
        train_dataset=digit_dataset(),
        processing_class=tokenizer,
        peft_config=LoraConfig(r=4, target_modules=["q_proj", "v_proj"]),
    )
    trainer.train()
    before, after = logged(trainer, "correction/max_abs_diff")
    assert before < 1e-5 < after
    assert any(p.abs().max() > 0 for n, p in trainer.model.named_parameters() if "lora_B" in n)


REFUSED = [
    ({"credit": {"type": "entropi"}}, "entropi.*entropy_shaping"),
    ({"credit": {"type": "entropy_shaping", "alpa": 1.0}}, "credit.alpa.*alpha"),
    ({"objective": {"type": "hapo", "alpha": "1"}}, "objective.alpha"),
    ({"rollout": {"decodings": []}}, "rollout.decodings.*decoding"),
    (
        {"credit": {"type": "entropy_shaping"}, "importance_sampling_level": "sequence"},
        "credit.type=EntropyShaping.*importance_sampling_level='sequence'",
    ),
    (
        {"objective": {"type": "hapo"}, "importance_sampling_level": "sequence"},
        "objective.type=HAPO.*importance_sampling_level='sequence'",
    ),
    ({"objective": {"type": "gspo_token"}, "importance_sampling_level": "sequence"}, "objective.type=GSPOToken"),
    ({"objective": {"type": "hapo"}, "loss_type": "cispo"}, "objective.alpha=1.0.*loss_type='cispo'"),
    ({"objective": {"type": "kl_cov"}, "loss_type": "sapo"}, "KLCov.*loss_type='sapo'"),
    ({"objective": {"type": "hapo"}, "epsilon": 0.6}, "training.epsilon=0.6 with objective.alpha=1.0"),
    ({"objective": {"type": "hapo"}, "delta": 1.4}, "training.delta=1.4"),
    ({"loss_type": "cispo", "epsilon_high": None}, "training.epsilon_high"),
    ({"top_p": 0.9}, "top_p=0.9.*rollout.strict=false"),
    ({"top_k": 20}, "top_k=20.*rollout.strict=false"),
    ({"min_p": 0.1}, "min_p=0.1.*rollout.strict=false"),
    ({"repetition_penalty": 1.1}, "repetition_penalty=1.1.*rollout.strict=false"),
    ({**HAPO_DOORS, "generation_kwargs": {"num_beams": 2}}, "num_beams"),
    (
        {"credit": {"type": "token_group_average"}, "scale_rewards": "batch"},
        "token_group_average.*training.scale_rewards='batch'",
    ),
    ({"rollout": {"dynamic_sampling": {"metric": "accuracy"}}}, "metric='accuracy' is not a reward.*even_reward"),
    (
        {"rollout": {"dynamic_sampling": {"metric": "even_reward"}}, "scale_rewards": "batch"},
        "dynamic_sampling.*scale_rewards='batch'",
    ),
    (
        {"rollout": {"correction": {"mode": "truncate", "level": "sequence"}}, "loss_type": "vespo"},
        "correction.level='sequence'.*loss_type='vespo'",
    ),
    ({"credit": PREPLAN | {"strategy": "locl"}}, "strategy.*'locl'.*local"),
    ({"credit": PREPLAN | {"layers": [7]}}, "PreplanAnchor: layers=.*allowed: distinct indices from 0 to 1"),
    ({"credit": PREPLAN | {"head_quantile": 0.7}}, "head_quantile=0.7"),
    (
        {"credit": PREPLAN, "importance_sampling_level": "sequence"},
        "PreplanAnchor.*importance_sampling_level='sequence'",
    ),
    ({"selection": {"type": "d3"}}, "selection.*'d3'.*d3s"),
    ({"selection": {"type": "d3s", "rows_start": 1.5}}, "rows_start=1.5 is not in"),
    ({"selection": {"type": "pods", "rows_start": 0.5}}, "selection.rows_start.*keep"),
    ({"selection": {"type": "d3s"}, "loss_type": "bnpo"}, "loss_type='bnpo'.*'dapo'"),
    ({"selection": {"type": "d3s"}, "steps_per_generation": 3}, "steps_per_generation=3 is not a multiple"),
    ({"selection": {"type": "d3s"}, "entropy_coef": 0.01}, "entropy_coef=0.01"),
    ({"selection": {"type": "d3s"}, "top_entropy_quantile": 0.2}, "top_entropy_quantile=0.2.*selection.tokens_start=1"),
    (
        {"selection": {"type": "d3s"}, "objective": {"type": "hapo", "statistics": "micro_batch"}},
        "objective.statistics='micro_batch'",
    ),
    (
        {"selection": {"type": "pods"}, "credit": {"type": "token_group_average"}},
        "credit.type='TokenGroupAverage'.*selection.renormalize=false",
    ),
    ({"selection": {"type": "pods", "keep": 0.25}}, "keep 1 of training.num_generations=4.*selection.keep"),
    ({"selection": {"type": "pods"}, "scale_rewards": "none"}, "scale_rewards='none'.*renormalize=false"),
    ({"rollout": {"prompt_skipping": {"metric": "accuracy"}}}, "prompt_skipping.metric='accuracy' is not a reward"),
    (
        {"rollout": {"prompt_skipping": {"metric": "even_reward"}}, "remove_unused_columns": True},
        "remove_unused_columns=true",
    ),
]


@pytest.mark.parametrize(("changes", "message"), REFUSED, ids=[m[:40] for _, m in REFUSED])
def test_wrong_combinations_are_refused_at_construction(tmp_path, changes, message):
    with pytest.raises(ConfigError, match=f"(?s){message}"):
        make(tmp_path, **changes)


def test_truncated_sampling_can_be_accepted_and_is_recorded_as_it_was(tmp_path):
    trainer = train(tmp_path, top_p=0.8, rollout={"strict": False, "record_logps": "always"})
    assert trainer.state.global_step == 3


def test_one_update_per_rollout_warns_that_hapo_is_idle(tmp_path):
    with pytest.warns(UserWarning, match="one update per rollout"):
        make(tmp_path, objective={"type": "hapo"}, steps_per_generation=2)


def test_a_signal_nobody_can_give_is_refused(tmp_path):
    class Curious:
        needs, per_token = ("hidden_states",), True

    class Attentive:
        needs, per_token = ("attention",), True

    with pytest.raises(ConfigError, match="Curious needs 'hidden_states'.*attention, entropy"):
        make(tmp_path, credit=Curious())
    with pytest.raises(ConfigError, match="Attentive needs 'attention' but has no `attention`"):
        make(tmp_path, credit=Attentive())


def test_a_credit_method_that_breaks_its_contract_is_named(tmp_path):
    class Leaky:
        needs, per_token = (), True

        def __call__(self, batch):
            return batch.mask * float("nan")

    with pytest.raises(ValueError, match="credit 'Leaky' returned nan at row 0, token 0"):
        train(tmp_path, credit=Leaky())


def test_wandb_offline_records_metrics_and_table(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    monkeypatch.setenv("WANDB_SILENT", "true")
    import wandb

    trainer = train(tmp_path, report_to=["wandb"], log_completions=True, num_completions_to_print=0, **HAPO_DOORS)
    wandb.finish()
    assert trainer.state.global_step == 3
    (run,) = (tmp_path / "wandb").glob("offline-run-*")
    record = next(run.glob("*.wandb")).read_bytes()
    assert b"credit/top20_share" in record and b"hapo/attenuated" in record
    assert list(run.rglob("*.table.json")), "the completions table"
