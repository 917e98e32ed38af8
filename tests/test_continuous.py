"""Continuous batching: log-probabilities against teacher forcing, neutrality, TRL's own call, refusals, no trace."""

from __future__ import annotations

import copy
import functools
from itertools import pairwise

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tests_support import build_model, build_sharp_model, even_reward, run_settings
from transformers import (
    GenerationConfig,
    LogitsProcessorList,
    MinPLogitsWarper,
    Qwen3ForCausalLM,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)
from transformers.generation import ContinuousBatchingConfig
from transformers.generation.continuous_batching.cb_logits_processors import CLASSIC_TO_CB_PROCESSORS_MAP
from transformers.generation.continuous_batching.offloading_manager import OffloadingManager
from transformers.generation.continuous_batching.requests import FutureRequestState, RequestState
from trl import GRPOConfig, GRPOTrainer

from rltok.entropy import entropy_stats
from rltok.sampling import AdaptiveTemperature, CyclicReflexLogitsProcessor, RolloutProcessor, sampling_control
from rltok.sampling.continuous import (
    _Bias,
    _Control,
    _Ledger,
    _Memoryless,
    continuous_control,
    supports_continuous_batching,
    unsupported,
)
from rltok.sampling.suppression import ReflectionSuppressionLogitsProcessor
from rltok.sampling.thought_switching import ThoughtSwitchingLogitsProcessor
from rltok.sampling.word_bias import WordBias

PAD, VOCAB, NEW, THINK_END = 0, 60, 12, 9
EOS = [1, 2, 3, 4, 5]  # enough that rows end at different times
WORDS = (20, 21, 22, 23)
LENGTHS = (6, 2, 3, 9, 5, 6, 2, 4, 11, 3, 7, 5)
STATS = entropy_stats(torch.tensor([[0.3, 1.0, 2.0, 2.6, 3.2]]), torch.ones(1, 5))
PLAIN = {"temperature": 1.0, "top_k": 0, "top_p": 1.0}
WARPED = {"temperature": 0.7, "top_k": 20, "top_p": 0.9, "min_p": 0.02}
ROOMY = {"num_blocks": 64, "max_batch_tokens": 64}
CROWDED = {"num_blocks": 64, "max_batch_tokens": 16, "page_size": 4, "max_requests_per_batch": 5}
STARVED = {"num_blocks": 12, "max_batch_tokens": 16, "page_size": 4}


@pytest.fixture(scope="module")
def model():
    return build_sharp_model(VOCAB, PAD, EOS)


@pytest.fixture
def model_of_trl(tokenizer):
    return build_model(tokenizer, initializer_range=0.3)


@pytest.fixture(scope="module")
def prompts():
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(6, VOCAB, (length,), generator=generator).tolist() for length in LENGTHS]


def config(seed=0, **changes):
    return ContinuousBatchingConfig(**({"use_cuda_graph": False, "seed": seed} | changes))


def settings(**changes):
    base = {"do_sample": True, "max_new_tokens": NEW, "pad_token_id": PAD, "eos_token_id": EOS}
    return GenerationConfig(**(base | changes))


def sample(model, prompts, warpers=PLAIN, engine=ROOMY, seed=0, **changes):
    outputs = model.generate_batch(
        prompts, generation_config=settings(**warpers, **changes), continuous_batching_config=config(seed, **engine)
    )
    return list(outputs.values())


def wave(**changes):
    return CyclicReflexLogitsProcessor(
        **({"word_ids": WORDS, "amplitude": 3.0, "period": 5.0, "end_ids": (THINK_END,)} | changes)
    )


def temperature(base=0.7):
    return AdaptiveTemperature(STATS, tau=0.4, base=base)


def switching():
    return ThoughtSwitchingLogitsProcessor(WORDS, alpha=2.0, beta=3, end_ids=(THINK_END,))


def suppression(**changes):
    return ReflectionSuppressionLogitsProcessor(WORDS, **changes)


RECIPES = {
    "wave": lambda base: [wave()],
    "temperature": lambda base: [temperature(base)],
    "wave and temperature": lambda base: [wave(), temperature(base)],
    "switching": lambda base: [switching()],
    "suppression": lambda base: [suppression(strength=2.0)],
    "forbidden while thinking": lambda base: [suppression(only_thinking=True, end_ids=(THINK_END,))],
    "all": lambda base: [wave(phase=0.2), switching(), suppression(strength=1.0), temperature(base)],
}


def warper_chain(warpers):
    """What transformers makes of the settings, in its order."""
    makers = {"temperature": TemperatureLogitsWarper, "top_k": TopKLogitsWarper, "top_p": TopPLogitsWarper}
    makers["min_p"] = MinPLogitsWarper
    return [make(warpers[name]) for name, make in makers.items() if warpers.get(name, 0) not in (0, 1.0)]


def teacher_forced(model, prompt, completion, processors, warpers):
    """Log-probability of every token of a completion through the processors' transformers form."""
    ids = torch.tensor([prompt + completion])
    with torch.no_grad():
        logits = model(ids).logits[0]
    for processor in processors:
        processor.prompt_length = len(prompt)
    chain = LogitsProcessorList([*processors, *warper_chain(warpers)])
    logps = []
    for t, token in enumerate(completion):
        end = len(prompt) + t
        logps.append(chain(ids[:, :end], logits[end - 1 : end].clone()).log_softmax(-1)[0, token].item())
    return logps


def check_against_teacher(model, prompts, completions, recorded, recipe, warpers):
    for prompt, completion, actual in zip(prompts, completions, recorded, strict=True):
        expected = teacher_forced(model, prompt, completion, recipe(warpers["temperature"]), warpers)
        assert actual == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize(
    ("warpers", "engine"), [(PLAIN, ROOMY), (WARPED, CROWDED)], ids=["plain-roomy", "warped-crowded"]
)
@pytest.mark.parametrize("name", RECIPES)
def test_recorded_equals_teacher_forcing(model, prompts, name, warpers, engine):
    with continuous_control(model, RECIPES[name](warpers["temperature"]), record=True) as record:
        outputs = sample(model, prompts, warpers, engine)
    completions = [output.generated_tokens for output in outputs]
    assert [output.prompt_ids for output in outputs] == prompts
    lengths = {len(ids) for ids in completions}
    assert len(lengths) > 2 and max(lengths) == NEW  # rows end at different times, some at the limit
    recorded = record.finish(completions)
    check_against_teacher(model, prompts, completions, recorded, RECIPES[name], warpers)
    without = [teacher_forced(model, p, c, [], warpers) for p, c in zip(prompts, completions, strict=True)]
    assert max(abs(a - b) for x, y in zip(recorded, without, strict=True) for a, b in zip(x, y, strict=True)) > 0.05


def test_the_gate_closes_for_some_rows_only(model, prompts):
    """What the tests above rely on: the end of thinking is sampled, and what comes after is seen to be unbiased."""
    processor = wave()
    with continuous_control(model, [processor], record=True):
        outputs = sample(model, prompts * 2, engine=CROWDED)
    bias = processor.trace()["bias"]
    ended = [i for i, output in enumerate(outputs) if THINK_END in output.generated_tokens[:-2]]
    assert 0 < len(ended) < len(outputs)
    for row, output in enumerate(outputs):
        ids = output.generated_tokens
        open_until = ids.index(THINK_END) + 1 if THINK_END in ids else len(ids)
        position = torch.arange(len(ids))
        expected = torch.where(position < open_until, wave()._schedule(position), torch.zeros(len(ids)))
        torch.testing.assert_close(bias[row, : len(ids)], expected, rtol=0, atol=0)


def test_requests_that_are_evicted_keep_their_place(model, prompts, monkeypatch):
    evicted = []
    original = OffloadingManager.offload_requests

    def counted(self):
        before = {state.request_id: state for state, _ in self.scheduler.starved_requests}
        done = original(self)
        evicted.extend(id for id in before if id in self.scheduler.waiting_requests and before[id].generated_tokens)
        return done

    monkeypatch.setattr(OffloadingManager, "offload_requests", counted)
    with continuous_control(model, RECIPES["all"](1.0), record=True) as record:
        outputs = sample(model, prompts, engine=STARVED)
    assert evicted  # requests with generated tokens had to start again
    completions = [output.generated_tokens for output in outputs]
    check_against_teacher(model, prompts, completions, record.finish(completions), RECIPES["all"], PLAIN)


@pytest.mark.parametrize(
    ("warpers", "engine"), [(PLAIN, ROOMY), (WARPED, CROWDED)], ids=["plain-roomy", "warped-crowded"]
)
def test_neutral_control_is_the_plain_sampler(model, prompts, warpers, engine):
    plain = sample(model, prompts, warpers, engine | {"return_logprobs": True})
    neutral = [wave(amplitude=0.0), AdaptiveTemperature(STATS, tau=0.0, base=warpers["temperature"])]
    for processors in ([], neutral):
        with continuous_control(model, processors, record=True) as record:
            outputs = sample(model, prompts, warpers, engine)
        assert [output.generated_tokens for output in outputs] == [output.generated_tokens for output in plain]
        assert record.finish([o.generated_tokens for o in outputs]) == [output.logprobs for output in plain]
    with continuous_control(model, [wave()]):
        changed = sample(model, prompts, warpers, engine)
    assert [output.generated_tokens for output in changed] != [output.generated_tokens for output in plain]


def test_a_bias_of_zero_changes_nothing_either(model, prompts):
    """The machinery itself: a wave that acts nowhere runs at every step."""
    plain = sample(model, prompts, WARPED, CROWDED | {"return_logprobs": True})
    with continuous_control(model, [wave(windows=((1000, 1001),))], record=True):
        outputs = sample(model, prompts, WARPED, CROWDED)
    assert [(o.generated_tokens, o.logprobs) for o in outputs] == [(o.generated_tokens, o.logprobs) for o in plain]


def test_several_completions_per_prompt(model, prompts):
    with continuous_control(model, RECIPES["wave and temperature"](0.7), record=True) as record:
        outputs = sample(model, prompts[3:6], WARPED, CROWDED, num_return_sequences=3)
    completions = [output.generated_tokens for output in outputs]
    repeated = [prompt for prompt in prompts[3:6] for _ in range(3)]
    assert [output.prompt_ids for output in outputs] == repeated
    assert len({tuple(ids) for ids in completions}) > 3
    check_against_teacher(
        model, repeated, completions, record.finish(completions), RECIPES["wave and temperature"], WARPED
    )


def test_per_request_processors_of_the_engine_go_with_ours(model, prompts):
    engine = CROWDED | {"per_request_processors": True}
    with continuous_control(model, RECIPES["all"](0.7), record=True) as record:
        outputs = sample(model, prompts, WARPED, engine)
    completions = [output.generated_tokens for output in outputs]
    check_against_teacher(model, prompts, completions, record.finish(completions), RECIPES["all"], WARPED)


def test_traced_values_come_back_in_the_order_of_the_completions(model, prompts):
    processor = temperature(1.0)
    with continuous_control(model, [wave(), processor]):
        outputs = sample(model, prompts, engine=CROWDED)
    lengths = [len(output.generated_tokens) for output in outputs]
    entropy = processor.trace()["entropy"]
    assert entropy.shape == (len(prompts), max(lengths))
    for row, (prompt, output) in enumerate(zip(prompts, outputs, strict=True)):
        twin = temperature(1.0)
        teacher_forced(model, prompt, output.generated_tokens, [wave(), twin], PLAIN)
        torch.testing.assert_close(entropy[row, : lengths[row]], twin.trace()["entropy"][0], atol=1e-5, rtol=0)
        assert not entropy[row, lengths[row] :].any()
    counted = torch.cat([entropy[row, :length] for row, length in enumerate(lengths)])
    assert processor.metrics(lengths)["sampling_entropy"] == pytest.approx(counted.mean().item(), abs=1e-5)


def test_one_block_may_hold_several_calls(model, prompts):
    with continuous_control(model, [wave()], record=True) as record:
        for seed in (1, 2):
            outputs = sample(model, prompts, seed=seed)
            ids = [output.generated_tokens for output in outputs]
            check_against_teacher(model, prompts, ids, record.finish(ids), RECIPES["wave"], PLAIN)
    first, second = (sample_inside(model, prompts, seed) for seed in (1, 1))
    assert first == second
    assert model.generate_batch([]) == {}


def sample_inside(model, prompts, seed):
    with continuous_control(model, [wave()], record=True) as record:
        outputs = sample(model, prompts, seed=seed)
    return record.finish([output.generated_tokens for output in outputs])


# ---- TRL ----


class Recording(GRPOTrainer):
    """One generation inside the control, as the trainer does it."""

    def _generate_single_turn(self, prompt_ids, *args, **kwargs):
        self.made = RECIPES["wave and temperature"](0.7)
        inner = self.accelerator.unwrap_model(self.model)
        with continuous_control(inner, self.made, record=True) as record:
            completion_ids, logps, *rest = super()._generate_single_turn(prompt_ids, *args, **kwargs)
        assert logps is None  # TRL asks for none on this path
        self.seen = (copy.deepcopy(prompt_ids), copy.deepcopy(completion_ids), record.finish(completion_ids))
        # At once: the weights move, and a copy of the model would share the forward that TRL puts into it.
        check_against_teacher(inner.eval(), *self.seen, RECIPES["wave and temperature"], WARPED | {"min_p": 0})
        inner.train()
        return completion_ids, self.seen[2], *rest


@pytest.mark.parametrize("adapter", [False, True], ids=["full", "lora"])
def test_a_step_of_trl(tmp_path, tokenizer, model_of_trl, dataset, adapter):
    changes = {
        "use_transformers_continuous_batching": True,
        "transformers_continuous_batching_config": {"num_blocks": 64, "max_batch_tokens": 64, "use_cuda_graph": False},
        "temperature": 0.7,
        "top_k": 20,
        "top_p": 0.9,
        "max_steps": 1,
        "max_completion_length": NEW,
    }
    peft = LoraConfig(target_modules=["q_proj"], r=2, task_type="CAUSAL_LM") if adapter else None
    trainer = Recording(
        model=model_of_trl,
        reward_funcs=even_reward,
        args=GRPOConfig(**run_settings(tmp_path, **changes)),
        train_dataset=dataset,
        processing_class=tokenizer,
        peft_config=peft,
    )
    trainer.train()
    prompt_ids, completion_ids, _ = trainer.seen
    assert len(prompt_ids) == len(completion_ids) == 24
    assert all(a == b for a, b in pairwise(prompt_ids[:4]))  # completions of a prompt are neighbours
    assert trainer.made[1].metrics([len(ids) for ids in completion_ids])["sampling_entropy"] > 0
    assert "generate_batch" not in vars(trainer.accelerator.unwrap_model(trainer.model))


# ---- no trace, refusals ----


def test_no_trace_is_left(model, prompts):
    before, classes = dict(vars(model)), dict(CLASSIC_TO_CB_PROCESSORS_MAP)
    plain = sample(model, prompts[:2])
    with continuous_control(model, RECIPES["all"](1.0), record=True):
        assert vars(model) != before
        sample(model, prompts)
    assert vars(model) == before
    with pytest.raises(RuntimeError, match="from inside"), continuous_control(model, [wave()]):
        raise RuntimeError("from inside")
    assert vars(model) == before and classes == CLASSIC_TO_CB_PROCESSORS_MAP
    assert [o.generated_tokens for o in sample(model, prompts[:2])] == [o.generated_tokens for o in plain]


def test_a_failing_start_leaves_the_attention_as_it_was(model, prompts, monkeypatch):
    monkeypatch.setattr(model.config, "_attn_implementation", "eager")
    engine = {"num_blocks": 64, "max_batch_tokens": 64, "page_size": 1}
    with pytest.raises(ValueError, match="page_size"), continuous_control(model):
        sample(model, prompts, engine=engine)
    assert model.config._attn_implementation == "eager"


class Breaks(WordBias):
    def delta(self, rows, columns):
        if int(rows.position.max()) == 3:
            raise FloatingPointError("broken at the third token")
        return torch.zeros(rows.position.numel())


def test_a_processor_that_fails_is_not_a_result(model, prompts):
    before = dict(vars(model))
    with pytest.raises(RuntimeError, match="broken at the third token"), continuous_control(model, [Breaks(WORDS)]):
        sample(model, prompts)
    assert vars(model) == before


def test_peft_models_are_reached(model, prompts):
    torch.manual_seed(0)
    base = Qwen3ForCausalLM(model.config).eval()
    wrapped = get_peft_model(base, LoraConfig(target_modules=["q_proj"], r=2, task_type="CAUSAL_LM")).eval()
    before = dict(vars(base))
    with continuous_control(wrapped, [wave()], record=True) as record:
        outputs = sample(wrapped, prompts)
    ids = [output.generated_tokens for output in outputs]
    check_against_teacher(base, prompts, ids, record.finish(ids), RECIPES["wave"], PLAIN)
    assert vars(base) == before


class NeedsLogits(RolloutProcessor):
    memory = "logits"


class NeedsIds(RolloutProcessor):
    memory = "ids"


class OwnApply(WordBias):
    def apply(self, scores, rows, columns):
        return scores + rows.position[:, None]


def test_processors_that_need_another_engine_are_refused(model):
    for processor in (NeedsLogits(), NeedsIds(), OwnApply(WORDS), TemperatureLogitsWarper(0.5)):
        assert not supports_continuous_batching(processor)
        words = f"{type(processor).__name__}.*use_transformers_continuous_batching=false"
        with pytest.raises(ValueError, match=words), continuous_control(model, [wave(), processor]):
            pass
    made = [*RECIPES["all"](1.0), suppression(), wave(amplitude=0.0)]
    assert unsupported([NeedsLogits(), *made, NeedsIds()]) == ["NeedsLogits", "NeedsIds"]
    assert all(map(supports_continuous_batching, made))


LOST = {
    "repetition_penalty": 1.2,
    "no_repeat_ngram_size": 2,
    "min_length": 3,
    "min_new_tokens": 3,
    "bad_words_ids": [[5]],
    "sequence_bias": [[[5], 1.0]],
    "begin_suppress_tokens": [5],
    "forced_bos_token_id": 5,
    "forced_eos_token_id": 1,
    "exponential_decay_length_penalty": (3, 1.1),
    "guidance_scale": 1.5,
    "encoder_repetition_penalty": 1.2,
}


@pytest.mark.parametrize("name", LOST)
def test_settings_that_the_engine_would_lose_are_refused(model, prompts, name):
    before = dict(vars(model))
    with pytest.raises(ValueError, match=f"{name}="), continuous_control(model):
        sample(model, prompts, **{name: LOST[name]})
    assert vars(model) == before


def test_harmless_settings_pass(model, prompts):
    with continuous_control(model, record=True) as record:
        outputs = sample(model, prompts, suppress_tokens=[30], repetition_penalty=1.0, typical_p=0.9, min_p=0.01)
    assert record.finish([output.generated_tokens for output in outputs])
    assert not any(30 in output.generated_tokens for output in outputs)


def test_unknown_processors_of_the_config_are_refused(model, prompts, monkeypatch):
    class New(TemperatureLogitsWarper):
        pass

    original = type(model)._get_logits_processor

    @functools.wraps(original)
    def patched(*args, **kwargs):
        return LogitsProcessorList([*original(*args, **kwargs), New(0.5)])

    monkeypatch.setattr(type(model), "_get_logits_processor", patched)
    with pytest.raises(ValueError, match="New of the generation config"), continuous_control(model):
        sample(model, prompts)


def test_other_wrong_uses_are_refused(model, prompts):
    before = dict(vars(model))
    inputs = torch.tensor([prompts[0]])
    with pytest.raises(ValueError, match="num_beams=1"), continuous_control(model):
        sample(model, prompts, num_beams=2)
    with pytest.raises(ValueError, match="do_sample=False"), continuous_control(model, record=True):
        sample(model, prompts, do_sample=False)
    with (
        pytest.raises(ValueError, match="temperature=0.7 but generate uses 1.0"),
        continuous_control(model, [temperature()]),
    ):
        sample(model, prompts)
    with pytest.raises(ValueError, match="persistent_manager=True"), continuous_control(model):
        model.generate_batch(prompts, generation_config=settings(), persistent_manager=True)
    with pytest.raises(ValueError, match="use sampling_control"), continuous_control(model):
        model.generate(inputs, generation_config=settings())
    with continuous_control(model), pytest.raises(ValueError, match="already active"), continuous_control(model):
        pass
    with continuous_control(model), pytest.raises(ValueError, match="already active"), sampling_control(model):
        pass
    with sampling_control(model), pytest.raises(ValueError, match="already active"), continuous_control(model):
        pass
    assert vars(model) == before
    with continuous_control(model, [wave()]):  # greedy evaluation needs no record
        sample(model, prompts, do_sample=False)


def test_a_cached_engine_is_refused(model, prompts):
    model.generate_batch(prompts, settings(), config(**ROOMY), persistent_manager=True)
    try:
        with pytest.raises(ValueError, match="destroy_cached_continuous_batching_manager"), continuous_control(model):
            sample(model, prompts)
    finally:
        model.destroy_cached_continuous_batching_manager()


def test_asynchronous_batching_is_never_late(model, prompts):
    """Off where a processor remembers ids, refused where it was asked for, left alone otherwise."""

    def chosen(processors, wanted):
        control = _Control(model, processors, None)
        control._adapters = control._adapt()
        given = config(use_async_batching=wanted)
        result = control._config(given, settings())
        assert given.use_async_batching is wanted  # the caller's own is not touched
        return result.use_async_batching

    assert chosen([wave()], None) is False
    assert chosen([wave()], False) is False
    assert chosen([temperature(1.0)], None) is None
    assert chosen([temperature(1.0), wave(amplitude=0.0)], True) is True
    with pytest.raises(ValueError, match="CyclicReflexLogitsProcessor the generated ids one token late"):
        chosen([wave()], True)


def test_a_token_that_the_host_does_not_know_yet_is_noticed(model):
    """What asynchronous batching would do: the engine is a position further than the tokens of the request."""
    state = RequestState("req_0", initial_tokens=[7, 8, 9])
    state.position_offset, state.generated_tokens = 5, [20, 21]
    request = FutureRequestState(state, has_new_token=True, complete_blocks={}, query_length=1)
    bias = _Bias(wave(), _Ledger(1, NEW), torch.device("cpu"))
    assert bias.prepare_tensor_args([request]).view(torch.float32).tolist() == [wave()._schedule(torch.tensor([2]))[0]]
    state.position_offset = 6
    with pytest.raises(RuntimeError, match="req_0 is a token further.*use_async_batching=false"):
        bias.prepare_tensor_args([request])


def test_rows_out_of_use_are_traced_nowhere():
    """The engine keeps old numbers beyond those of a step, and runs rows there whose scores mean nothing."""
    adapter = _Memoryless(temperature(), _Ledger(3, NEW), torch.device("cpu"))
    requests = []
    for number in range(3):
        state = RequestState(f"req_{number}", initial_tokens=[7, 8])
        state.position_offset = 2
        requests.append(FutureRequestState(state, has_new_token=True, complete_blocks={}, query_length=2))
    assert adapter.prepare_tensor_args(requests).tolist() == [1, 1 + NEW, 1 + 2 * NEW]
    assert adapter.prepare_tensor_args(requests[1:2]).tolist() == [1 + NEW, 0, 0]


def test_more_requests_than_were_announced_find_room():
    bias = _Bias(wave(), _Ledger(0, 0), torch.device("cpu"))
    requests = []
    for number in range(5):
        state = RequestState(f"req_{number}", initial_tokens=[7, 8], generated_tokens=[THINK_END if number == 3 else 5])
        state.position_offset = 3
        requests.append(FutureRequestState(state, has_new_token=True, complete_blocks={}, query_length=1))
    first = wave()._schedule(torch.tensor([1])).item()
    assert bias.prepare_tensor_args(requests[:2]).view(torch.float32).tolist() == [first] * 2
    assert bias.prepare_tensor_args(requests).view(torch.float32).tolist() == [first, first, first, 0.0, first]


def test_finish_checks_what_it_is_given(model, prompts):
    with continuous_control(model) as record:
        sample(model, prompts)
    with pytest.raises(ValueError, match="nothing was recorded"):
        record.finish([[2]])
    with continuous_control(model, record=True) as record:
        with pytest.raises(ValueError, match="nothing was recorded"):
            record.finish([[2]])
        ids = [output.generated_tokens for output in sample(model, prompts)]
        with pytest.raises(ValueError, match="finish"):
            sample(model, prompts)
    with pytest.raises(ValueError, match="12 rows"):
        record.finish(ids[:4])
    with pytest.raises(ValueError, match="up to 13"):
        record.finish([[2] * (NEW + 1)] * len(prompts))
    with pytest.raises(ValueError, match="completion 0 is not"):
        record.finish([ids[1], ids[0], *ids[2:]])
    assert [len(row) for row in record.finish([row[:1] for row in ids])] == [1] * len(prompts)
    with pytest.raises(ValueError, match="nothing was recorded"):
        record.finish(ids)
