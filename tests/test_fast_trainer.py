"""The engine `fast` in training: whose tokens are sampled, by how many processes, after a resume; what is refused."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from fast_worker import CASES, Sampled
from peft import LoraConfig
from rich.console import Console
from tests_support import build_model, build_tokenizer, digit_dataset, even_reward, run_on_ranks, run_settings
from tokenizers import decoders
from transformers import MambaConfig, MambaForCausalLM

from rltok.config import ConfigError
from rltok.fast import LoopProgress, LoopSettings, generate_rows, row_key
from rltok.progress import ProgressDisplay
from rltok.rollout import FastConfig, RolloutConfig, build_rollout
from rltok.trainers import CreditConfig, CreditTrainer
from rltok.trainers.doors import build_doors, check_doors
from rltok.trainers.engine_choice import engine_of
from rltok.trainers.fast_engine import loop_settings, prompt_id


def make(folder, model=None, rollout=None, dataset=None, cls=Sampled, peft_config=None, eval_dataset=None, **changes):
    tokenizer = build_tokenizer()
    args = CreditConfig(**run_settings(folder, **changes), rollout=rollout)
    data = {"train_dataset": dataset or digit_dataset(), "processing_class": tokenizer, "eval_dataset": eval_dataset}
    model = model or build_model(tokenizer, initializer_range=0.2)
    return cls(model, even_reward, args, **data, peft_config=peft_config)


def train(*args, **kwargs):
    trainer = make(*args, **kwargs)
    trainer.train()
    return trainer


def completions(trainer, kind="train"):
    return [ids for found, _, ids in trainer.sampled if found == kind]


def logged(trainer, key):
    return [entry[key] for entry in trainer.state.log_history if key in entry]


# ---- the default, and what a row's tokens depend on ----


def test_it_is_the_default_where_trl_would_call_generate():
    def engine(rollout=None, **settings):
        return engine_of(CreditConfig(**run_settings("unused", **settings)), build_rollout(rollout))

    assert RolloutConfig().engine == "fast" and engine() == "fast"
    assert engine({"engine": "transformers"}) == "transformers"
    assert engine(use_transformers_continuous_batching=True) == "continuous_batching"
    assert engine(use_vllm=True, vllm_mode="server") == "vllm_server"


def test_tokens_follow_from_seed_rollout_prompt_and_index_alone(tmp_path):
    """Sampled anew outside of the trainer, one row at a time, from what the documentation says a key is made of."""
    trainer = train(tmp_path, learning_rate=0.0, max_steps=6, seed=5)
    assert len(trainer.sampled) == trainer._fast.rollouts == 2
    settings = LoopSettings(max_new_tokens=8, end_ids=(1,))
    for step, (_, prompts, sampled) in enumerate(trainer.sampled):
        seen: dict[tuple, int] = {}
        for prompt, ids in zip(prompts, sampled, strict=True):
            index = seen[tuple(prompt)] = seen.get(tuple(prompt), -1) + 1
            key = row_key(5, step, prompt_id(prompt), index)
            assert generate_rows(trainer.model, [prompt], [key], settings).ids == [ids]
        assert set(seen.values()) == {3}
    first, second = completions(trainer)
    assert first != second


def test_the_same_prompt_twice_in_a_batch_is_sampled_anew(tmp_path):
    rows = Dataset.from_list([{"prompt": "1+1=", "answer": "2"}] * 12)
    trainer = train(tmp_path, dataset=rows, max_steps=1)
    ((_, prompts, sampled),) = trainer.sampled
    assert len({tuple(p) for p in prompts}) == 1 and len(sampled) == 24
    assert len({tuple(ids) for ids in sampled}) > 20
    assert logged(trainer, "rollout/prefill_tokens") == [len(prompts[0])]


def test_greedy_training_is_that_of_trls_generate(tmp_path):
    greedy = {"generation_kwargs": {"do_sample": False}, "max_steps": 4}
    fast = train(tmp_path / "a", **greedy)
    plain = train(tmp_path / "b", rollout={"engine": "transformers"}, **greedy)
    assert fast._fast is not None and plain._fast is None
    assert completions(fast) == completions(plain)
    for a, b in zip(fast.model.parameters(), plain.model.parameters(), strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize(
    "changes",
    [
        {"generation_kwargs": {"min_new_tokens": 5}},
        {"generation_kwargs": {"eos_token_id": [1, 5, 6, 7]}},
        {"temperature": 0.6},
        {"rollout": {"strict": False}, "top_p": 0.8, "top_k": 12, "min_p": 0.02, "repetition_penalty": 1.3},
    ],
    ids=["at least 5", "several ends", "cooler", "truncated"],
)
def test_settings_of_a_recipe_reach_the_loop(tmp_path, changes):
    trainer = train(tmp_path, max_steps=1, **changes)
    ((_, prompts, sampled),) = trainer.sampled
    settings = loop_settings(trainer.generation_kwargs, FastConfig())
    for name in ("temperature", "top_p", "top_k", "min_p", "repetition_penalty"):
        assert name not in changes or getattr(settings, name) == changes[name]
    if "generation_kwargs" in changes:
        assert settings.min_new_tokens == changes["generation_kwargs"].get("min_new_tokens", 0)
        assert settings.end_ids == tuple(changes["generation_kwargs"].get("eos_token_id", [1]))
    plain = completions(train(tmp_path / "plain", max_steps=1))[0]
    assert sampled != plain
    lengths = [len(ids) for ids in sampled]
    assert min(lengths) >= settings.min_new_tokens and max(lengths) <= 8


def test_stop_strings_end_completions(tmp_path):
    stops = {"generation_kwargs": {"stop_strings": ["7", "ab"]}}
    trainer = make(tmp_path, max_steps=1, max_completion_length=40, **stops)
    trainer.processing_class.backend_tokenizer.decoder = decoders.Fuse()  # texts without spaces between the tokens
    trainer.train()
    texts = trainer.processing_class.batch_decode(completions(trainer)[0])
    ended = [text for text in texts if text.endswith("7")]
    assert ended and all("7" not in text[:-1] for text in texts)
    with pytest.raises(ConfigError, match="mask_truncated_completions=true drops.*stop_strings"):
        make(tmp_path, mask_truncated_completions=True, **stops)


# ---- processes, resume, evaluation ----


def launch(ranks: int, folder: Path) -> dict:
    run_on_ranks("fast_worker.py", ranks, folder)
    return torch.load(folder / f"fast{ranks}.pt", weights_only=True)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("fast")
    return launch(1, folder), launch(2, folder)


@pytest.mark.parametrize("case", CASES)
def test_two_processes_sample_what_one_samples(runs, case):
    one, two = (run[case] for run in runs)
    assert one["rollouts"] == two["rollouts"] >= 2
    assert [kind for kind, *_ in one["batches"]].count("eval") == 2
    assert one["batches"] == two["batches"]
    assert len({tuple(ids) for _, _, batch in one["batches"] for ids in batch}) > 40


def test_limits_of_memory_change_no_token(runs):
    assert runs[0]["limits"]["batches"] == runs[0]["plain"]["batches"]


def test_a_group_on_two_ranks_is_prefilled_by_both(runs):
    one, two = (run["plain"]["costs"] for run in runs)
    assert sum(two.values()) == sum(one.values()) == 4 * one["rollout/prefill_tokens"], "groups of four"
    _, prompts, _ = runs[0]["plain"]["batches"][0]
    more = two["rollout/prefill_tokens"] - one["rollout/prefill_tokens"]
    assert more == len(prompts[12]), "of the fourth of seven groups"


def test_a_resumed_run_samples_what_an_undisturbed_one_samples(tmp_path):
    constant = {"lr_scheduler_type": "constant"}
    whole = train(tmp_path / "whole", max_steps=9, **constant)
    first = train(tmp_path / "cut", max_steps=4, save_strategy="steps", save_steps=4, **constant)
    resumed = make(tmp_path / "cut", max_steps=9, **constant)
    resumed.train(resume_from_checkpoint=str(tmp_path / "cut" / "checkpoint-4"))
    assert completions(first) + completions(resumed) == completions(whole)
    assert len(completions(resumed)) == 1 and resumed._fast.rollouts == 3


def test_evaluation_changes_no_sample_of_training(tmp_path):
    plain = train(tmp_path / "a", max_steps=4)
    evaluation = {"eval_strategy": "steps", "eval_steps": 1, "per_device_eval_batch_size": 4}
    same = Dataset.from_list([{"prompt": "1+1=", "answer": "2"}] * 4)  # every batch of an evaluation completes it
    often = train(tmp_path / "b", max_steps=4, eval_dataset=same, **evaluation)
    assert completions(often) == completions(plain)
    found = completions(often, "eval")
    assert len(found) == 16 and len({str(batch) for batch in found}) == 16, "no batch is sampled like another"


def test_later_turns_of_a_row_continue_its_stream(tmp_path):
    """What TRL's tool loop does: some rows come back with their tokens and a tool's answer behind them."""
    trainer = make(tmp_path, generation_kwargs={"eos_token_id": [1]})
    prompts = [[5, 6, 7]] * 3 + [[8, 9]]

    def turns(chosen):
        trainer._fast.rollouts = 0
        trainer._fast.begin()
        first = trainer._fast.complete(prompts, (), False)
        later = [[*prompts[i], *first.ids[i], 11, 12] for i in chosen]
        return first.ids, trainer._fast.complete(later, (), False).ids

    first, all_of_them = turns([0, 1, 2, 3])
    again, some = turns([1, 3])
    assert again == first and some == [all_of_them[1], all_of_them[3]]
    settings = loop_settings(trainer.generation_kwargs, FastConfig())
    key = row_key(row_key(trainer.args.seed, 0, prompt_id(prompts[1]), 1), 1, "turn", 0)
    history = [*prompts[1], *first[1], 11, 12]
    assert generate_rows(trainer.model, [history], [key], settings).ids == [some[0]]
    trainer._fast.begin()
    trainer._fast.complete(prompts, (), False)
    with pytest.raises(RuntimeError, match="does not begin with the tokens of an earlier one"):
        trainer._fast.complete([[1, 2, 3, 4]], (), False)


# ---- models ----


@pytest.mark.parametrize(
    "changes",
    [
        {"peft_config": LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)},
        {"gradient_checkpointing": True},
        {"bf16": True},
        {"bf16": True, "gradient_checkpointing": True, "peft_config": LoraConfig(r=2, target_modules=["q_proj"])},
    ],
    ids=["lora", "checkpointing", "bf16", "all three"],
)
def test_wrapped_models(tmp_path, changes):
    """The sampler is the learner: log-probabilities that were recorded are those of scoring."""
    rollout = {"record_logps": "always", "correction": {"mode": "truncate"}}
    trainer = train(tmp_path, rollout=rollout, max_steps=4, **changes)
    tolerance = 0.2 if changes.get("bf16") else 1e-5  # bf16: batches of another shape round otherwise
    assert max(logged(trainer, "correction/max_abs_diff")) < tolerance
    assert logged(trainer, "correction/weight_mean") == pytest.approx([1.0, 1.0], abs=tolerance / 10)
    assert trainer.model.training
    if changes.get("gradient_checkpointing"):
        assert trainer.accelerator.unwrap_model(trainer.model).is_gradient_checkpointing


REFUSED = [
    ({"generation_kwargs": {"num_beams": 4}}, "num_beams=4 is no option of the engine fast.*engine=transformers"),
    ({"generation_kwargs": {"prompt_lookup_num_tokens": 3}}, "prompt_lookup_num_tokens=3"),
    ({"generation_kwargs": {"penalty_alpha": 0.5}}, "penalty_alpha=0.5"),
    ({"cache_implementation": "static"}, "cache_implementation='static'.*cache of its own"),
    ({"rollout": {"fast": {"max_cache_tokens": 0}}}, "rollout.fast: max_cache_tokens=0"),
    ({"rollout": {"fast": {"max_row": 4}}}, "max_row.*max_rows"),
    ({"rollout": {"engine": "fats"}}, "rollout.engine: 'fats'.*fast"),
    ({"rollout": {"engine": "transformers", "fast": {"max_rows": 2}}}, "read by engine='fast' alone"),
]


@pytest.mark.parametrize(("changes", "message"), REFUSED, ids=[m[:30] for _, m in REFUSED])
def test_what_it_cannot_do_is_refused_before_anything_is_loaded(changes, message):
    rollout = changes.get("rollout")
    with pytest.raises(ConfigError, match=f"(?s){message}"):
        settings = {name: value for name, value in changes.items() if name != "rollout"}
        check_doors(build_doors(None, None, rollout), CreditConfig(**run_settings("unused", **settings)), ["reward"])


def test_neutral_options_and_other_engines_are_not_refused():
    generation = {"num_beams": 1, "use_cache": True, "penalty_alpha": None}
    for settings, rollout in (
        ({"generation_kwargs": generation}, None),
        ({"generation_kwargs": {"num_beams": 4}}, {"engine": "transformers"}),
        ({"cache_implementation": "static"}, {"engine": "transformers"}),
    ):
        check_doors(build_doors(None, None, rollout), CreditConfig(**run_settings("unused", **settings)), ["reward"])


def test_models_that_it_cannot_serve_are_refused_at_construction(tmp_path):
    tokenizer = build_tokenizer()
    config = MambaConfig(vocab_size=len(tokenizer), hidden_size=16, state_size=4, num_hidden_layers=1, pad_token_id=0)
    with pytest.raises(ConfigError, match="(?s)'mamba' keeps a recurrent state.*rollout.engine=transformers"):
        make(tmp_path, model=MambaForCausalLM(config))


def test_a_custom_rollout_func_keeps_its_own_engine(tmp_path):
    def own(prompts, trainer):
        ids = [trainer.processing_class(prompt)["input_ids"] for prompt in prompts]
        return {"prompt_ids": ids, "completion_ids": [[5, 6, 1]] * len(ids), "logprobs": None}

    tokenizer = build_tokenizer()
    args = CreditConfig(**run_settings(tmp_path, max_steps=1, generation_kwargs={"num_beams": 3}))
    data = {"train_dataset": digit_dataset(), "processing_class": tokenizer}
    trainer = CreditTrainer(build_model(tokenizer), even_reward, args, rollout_func=own, **data)
    trainer.train()
    assert trainer._fast is None and not logged(trainer, "rollout/live_share")


# ---- metrics and progress ----


def test_costs_are_logged(tmp_path):
    trainer = train(tmp_path, max_steps=1, max_completion_length=30)
    ((_, prompts, sampled),) = trainer.sampled
    (saved,), (computed,) = logged(trainer, "rollout/prefill_tokens_saved"), logged(trainer, "rollout/prefill_tokens")
    assert computed == sum(map(len, prompts)) / 4 and saved == 3 * computed
    assert logged(trainer, "rollout/live_share") == [1.0]
    assert logged(trainer, "rollout/tokens_per_second")[0] > 0
    per_token = 2 * 2 * 2 * 8 * 4  # keys and values, layers, heads, dim, float32
    longest = max(len(p) + len(c) for p, c in zip(prompts, sampled, strict=True))
    assert logged(trainer, "rollout/peak_cache_bytes")[0] >= per_token * longest
    lazy = train(tmp_path / "b", max_steps=1, max_completion_length=30, rollout={"fast": {"compact_share": 1.0}})
    lengths = [len(ids) - 1 for ids in sampled]
    assert logged(lazy, "rollout/live_share") == [pytest.approx(sum(lengths) / (24 * max(lengths)))]


def test_a_long_rollout_shows_its_progress(tmp_path):
    stream = io.StringIO()
    display = ProgressDisplay(Console(file=stream, width=120), mode="lines")
    for seconds, ended in ((1.0, 2), (31.0, 5), (32.0, 6), (59.0, 7), (61.0, 8), (0.5, 1), (20.0, 8), (30.5, 8)):
        display.on_rollout(LoopProgress(ended=ended, rows=8, tokens=ended * 100, seconds=seconds))
    assert stream.getvalue().splitlines() == [
        "rollout 5/8 completions  500 tokens  16 tokens/s",
        "rollout 8/8 completions  800 tokens  13 tokens/s",
        "rollout 8/8 completions  800 tokens  26 tokens/s",
    ]
    trainer = make(tmp_path, max_steps=1)
    seen = []
    display.on_rollout = seen.append
    display.install(trainer)
    trainer.train()
    assert seen[-1].ended == seen[-1].rows == 24
    assert [p.ended for p in seen] == sorted(p.ended for p in seen) and len(seen) <= 8


def test_without_a_display_a_bar_appears_after_a_while(tmp_path, monkeypatch, capsys):
    import rltok.trainers.fast_engine as module

    monkeypatch.setattr(module, "BAR_AFTER", 0.0)
    train(tmp_path / "a", max_steps=1, disable_tqdm=False)
    assert "rollout" in capsys.readouterr().err
    train(tmp_path / "b", max_steps=1, disable_tqdm=True)
    assert "rollout" not in capsys.readouterr().err


TOOL_TEMPLATE = (
    "{% for m in messages %}{{ m['role'][0] }}:{{ m['content'] }}"
    "{% for c in m.get('tool_calls') or [] %}<{{ c['function']['name'] }} "
    "{% for k, v in c['function']['arguments'].items() %}{{ k }}={{ v }}{% endfor %}>{% endfor %}\n{% endfor %}"
    "{% if add_generation_prompt %}a:{% endif %}"
)


def tool_run(folder, monkeypatch, rows):
    """TRL's own tool loop: a completion with an even digit calls a tool, as long as there is room."""
    import trl.trainer.grpo_trainer as grpo

    def parsed(tokenizer, ids, prefix=None, tools=None):
        text = tokenizer.decode(ids, skip_special_tokens=True)
        message = {"role": "assistant", "content": text}
        if any(digit in text for digit in "02468"):
            message["tool_calls"] = [{"type": "function", "function": {"name": "add", "arguments": {"x": len(text)}}}]
        return message

    def add(x: int) -> int:
        """Adds one.

        Args:
            x: a number.
        """
        return x + 1

    monkeypatch.setattr(grpo, "parse_response", parsed)
    tokenizer = build_tokenizer()
    tokenizer.chat_template, tokenizer.response_schema = TOOL_TEMPLATE, {"type": "object"}
    size = {"per_device_train_batch_size": rows, "gradient_accumulation_steps": 1, "steps_per_generation": 1}
    args = CreditConfig(**run_settings(folder, max_steps=1, max_completion_length=60, **size))
    data = [{"prompt": [{"role": "user", "content": f"{i}+1"}]} for i in range(8)]
    model = build_model(tokenizer, initializer_range=0.3, eos_token_id=[1, 5, 6, 7, 8, 9])
    trainer = Sampled(
        model,
        lambda completions, **_: [float(len(str(c)) % 7) for c in completions],
        args,
        train_dataset=Dataset.from_list(data),
        processing_class=tokenizer,
        tools=[add],
    )
    trainer.train()
    return [
        (list(p), list(ids)) for _, prompts, sampled in trainer.sampled for p, ids in zip(prompts, sampled, strict=True)
    ]


def test_turns_after_tool_calls_in_trls_own_loop(tmp_path, monkeypatch):
    """What a conversation samples does not depend on which others are in the batch, in no turn."""
    few, many = (tool_run(tmp_path / str(rows), monkeypatch, rows) for rows in (8, 16))
    later = [turn for turn in few if len(turn[0]) > len(few[0][0])]
    assert len(later) >= 4
    assert all(turn in many for turn in few) and len(many) > len(few)
