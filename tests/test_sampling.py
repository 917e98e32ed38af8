"""Adaptive temperature and the recorder: worked numbers, exactness against `generate`, and no trace afterwards."""

from __future__ import annotations

import math

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tests_support import build_sharp_model
from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
    MinPLogitsWarper,
    Qwen3ForCausalLM,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from rltok.correction import CorrectionConfig, rollout_weights
from rltok.entropy import entropy_stats
from rltok.sampling import (
    DECODING,
    AdaptiveTemperature,
    AdaptiveTemperatureConfig,
    DecodingContext,
    DecodingModule,
    RolloutProcessor,
    SampledLogps,
    adaptive_temperature,
    generation_model,
    make_processors,
    row_entropy,
    sampling_control,
)

PAD, VOCAB, NEW = 0, 60, 10
EOS = [1, 2, 3, 4, 5, 6]  # enough that rows end at different times
CARD_ENTROPIES = torch.tensor([[0.01, 0.05, 0.2, 0.4, 0.9, 1.6]])
STATS = entropy_stats(CARD_ENTROPIES, torch.ones(1, 6))
WIDE_STATS = entropy_stats(torch.tensor([[0.3, 1.0, 2.0, 2.6, 3.2]]), torch.ones(1, 5))  # of the tiny model's range


@pytest.fixture(scope="module")
def model():
    return build_sharp_model(VOCAB, PAD, EOS)


@pytest.fixture(scope="module")
def prompts():
    """8 left-padded prompts of 2 to 6 tokens."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(2, VOCAB, (8, 6), generator=generator)
    lengths = torch.tensor([6, 2, 3, 4, 5, 6, 2, 4])
    mask = (torch.arange(6) >= 6 - lengths[:, None]).long()
    return {"input_ids": ids.masked_fill(mask == 0, PAD), "attention_mask": mask}


SETTINGS = {"do_sample": True, "max_new_tokens": NEW, "pad_token_id": PAD, "eos_token_id": EOS}
WARPED = {**SETTINGS, "temperature": 0.7, "top_k": 20, "top_p": 0.9, "min_p": 0.02}
PLAIN = {**SETTINGS, "temperature": 1.0, "top_k": 0, "top_p": 1.0}


def sample(model, prompts, settings, seed=0, **kwargs):
    torch.manual_seed(seed)
    return model.generate(**prompts, **settings, return_dict_in_generate=True, output_scores=True, **kwargs)


def completions(sequences, prompt_length=6):
    """Generated ids of every row, up to and including the end token."""
    rows = sequences[:, prompt_length:].tolist()
    ends = [next((i for i, token in enumerate(row) if token in EOS), NEW) for row in rows]
    return [row[: end + 1] for row, end in zip(rows, ends, strict=True)]


class TowardsSeven(LogitsProcessor):
    """A bias that depends on the history: token 7 is likelier after an even token."""

    def __call__(self, input_ids, scores):
        scores = scores.clone()
        scores[:, 7] += 2.0 * (input_ids[:, -1] % 2 == 0)
        return scores


def ours(base=0.7, tau=0.3):
    return [TowardsSeven(), AdaptiveTemperature(WIDE_STATS, tau=tau, base=base)]


# ---- adaptive temperature ----


@pytest.mark.parametrize(
    ("logits", "entropy", "temperature"),
    [
        ([2.0, 0, 0, -1], 0.801056, 0.998706),
        ([6.0, 0, 0, -1], 0.041770, 0.965885),
        ([0.2, 0.1, 0, 0], 1.382772, 1.037320),
    ],
)
def test_worked_temperatures(logits, entropy, temperature):
    rows = torch.tensor([logits])
    assert row_entropy(rows).item() == pytest.approx(entropy, abs=1e-6)
    assert adaptive_temperature(row_entropy(rows), STATS).item() == pytest.approx(temperature, abs=1e-6)


def test_worked_z_score_and_log_probs():
    rows = torch.tensor([[2.0, 0, 0, -1]])
    z_score = adaptive_temperature(row_entropy(rows), STATS, tau=0.1, form="zscore")
    assert z_score.item() == pytest.approx(0.993269, abs=1e-6)
    logps = AdaptiveTemperature(STATS)(None, rows).log_softmax(-1)
    expected = torch.tensor([[-0.277301, -2.279893, -2.279893, -3.281189]])
    torch.testing.assert_close(logps, expected, atol=1e-6, rtol=0)


def test_temperatures_of_the_hapo_example():
    entropy = torch.tensor([0.02, 1.2, 0.3, 0.1, 0.05, 0.8, 0.001])
    stats = entropy_stats(entropy[None], torch.ones(1, 7))
    bounded = torch.tensor([0.972408, 1.05, 0.992664, 0.984446, 0.979261, 1, 0.95])
    torch.testing.assert_close(adaptive_temperature(entropy, stats), bounded, atol=1e-6, rtol=0)
    z_score = torch.tensor([0.836797, 1.017939, 0.956606, 0.908002, 0.877335, 1, 0.704260])  # sigma about the mean
    actual = adaptive_temperature(entropy, stats, tau=0.1, form="zscore")
    torch.testing.assert_close(actual, z_score, atol=1e-6, rtol=0)


def test_temperature_bounds_order_and_limits():
    entropy = torch.logspace(-9, 1.5, 200)
    bounded = adaptive_temperature(entropy, STATS, base=0.8, tau=0.3)
    assert bounded.min().item() == pytest.approx(0.8 * 0.7)
    assert bounded.max().item() == pytest.approx(0.8 * 1.3)
    assert (bounded.diff() >= 0).all()
    assert adaptive_temperature(STATS.pivot.exp(), STATS, base=0.8).item() == pytest.approx(0.8, abs=1e-6)
    released = adaptive_temperature(entropy, STATS, tau=0.3, sign="released")
    assert (released >= 1).all()
    z_score = adaptive_temperature(entropy, STATS, base=0.8, tau=0.5, form="zscore")
    assert z_score.min().item() == pytest.approx(0.08)  # the floor: Eq. 8 alone would be negative here
    assert (z_score.diff() >= 0).all()
    for neutral in (adaptive_temperature(entropy, None, base=0.8), adaptive_temperature(entropy, STATS, 0.8, 0.0)):
        assert torch.equal(neutral, torch.full_like(entropy, 0.8))
    assert adaptive_temperature(torch.tensor(0.0), STATS).item() == pytest.approx(0.95)


def test_row_entropy_against_float64():
    rows = torch.randn(20, 50, generator=torch.Generator().manual_seed(0)) * torch.logspace(-1, 1.3, 20)[:, None]
    rows[::2] += 30.0  # where the row lies must not cost digits
    rows[:, 3] = -float("inf")
    expected = torch.special.entr((rows.double() / 0.7).softmax(-1)).sum(-1)
    assert expected.min() < 1e-3
    torch.testing.assert_close(row_entropy(rows, 0.7).double(), expected, rtol=2e-5, atol=1e-7)


def test_entropy_is_taken_at_the_base_temperature():
    rows = torch.tensor([[2.0, 0, 0, -1]])
    processor = AdaptiveTemperature(STATS, tau=0.5, base=0.5)
    actual = processor(None, rows) / 0.5  # generate divides by the base
    temperature = adaptive_temperature(row_entropy(rows / 0.5), STATS, base=0.5, tau=0.5)
    torch.testing.assert_close(actual, rows / temperature)
    assert processor.metrics()["sampling_entropy"] == pytest.approx(row_entropy(rows / 0.5).item())


def test_forbidden_tokens_and_the_mode_survive():
    rows = torch.tensor([[1.0, -float("inf"), 0.5], [3.0, -float("inf"), -float("inf")]])
    assert row_entropy(rows)[0].item() == pytest.approx(row_entropy(rows[:1, [0, 2]]).item(), abs=1e-7)
    assert row_entropy(rows)[1] == 0
    scaled = AdaptiveTemperature(STATS, tau=0.5)(None, rows)
    assert not scaled.isnan().any()
    assert torch.equal(scaled == -float("inf"), rows == -float("inf"))
    random = torch.randn(64, 30, generator=torch.Generator().manual_seed(0))
    assert torch.equal(AdaptiveTemperature(STATS, tau=0.9)(None, random).argmax(-1), random.argmax(-1))


def test_neutral_processors_return_the_very_tensor():
    scores = torch.randn(3, 5)
    assert AdaptiveTemperature(STATS, tau=0.0)(None, scores) is scores
    assert AdaptiveTemperature(None, tau=0.5)(None, scores) is scores
    assert AdaptiveTemperature(None).metrics() == {}


def test_metrics_count_only_sampled_tokens():
    processor = AdaptiveTemperature(STATS, tau=0.5)
    sharp, flat = [50.0, 0, 0, 0, 0, 0], [0.0] * 6  # entropies below and above everything in the statistics
    for step in ([flat, flat], [sharp, flat], [sharp, flat]):
        processor(None, torch.tensor(step))
    torch.testing.assert_close(processor.factors(), torch.tensor([[1.5, 0.5, 0.5], [1.5, 1.5, 1.5]]))
    metrics = processor.metrics([1, 3])
    assert metrics["temperature_factor"] == pytest.approx(1.5)
    assert metrics["temperature_clamped"] == 1.0
    assert metrics["sampling_entropy"] == pytest.approx(math.log(6))
    assert processor.metrics()["temperature_factor"] == pytest.approx(7 / 6)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"tau": 1.0}, "tau=1.0 must be < 1"),
        ({"tau": -0.1}, "tau=-0.1"),
        ({"form": "linear"}, "form='linear'"),
        ({"sign": "unsigned"}, "sign='unsigned'"),
        ({"form": "zscore", "sign": "released"}, "form='bounded'"),
        ({"rho": 1.2}, "rho=1.2"),
        ({"floor": 0.0}, "floor=0.0"),
    ],
)
def test_wrong_temperature_settings_are_refused(options, words):
    with pytest.raises(ValueError, match=words):
        AdaptiveTemperatureConfig(**options)


def test_decoding_registry():
    for name, cls in DECODING.items():
        assert isinstance(cls(), DecodingModule), name
    config = AdaptiveTemperatureConfig(tau=0.2, form="zscore")
    context = DecodingContext(temperature=0.7, entropy_stats=STATS)
    (processor,) = make_processors([config], context)
    assert (processor.tau, processor.base, processor.form) == (0.2, 0.7, "zscore")
    assert make_processors([config], DecodingContext(temperature=0.7)) == []  # no statistics yet
    assert make_processors([AdaptiveTemperatureConfig(tau=0.0)], context) == []


def test_temperatures_come_after_logit_changes():
    class Bias:
        needs, stage, is_neutral = (), "logits", False

        def processor(self, context):
            return TowardsSeven()

    context = DecodingContext(entropy_stats=STATS)
    made = make_processors([AdaptiveTemperatureConfig(), Bias()], context)
    assert [type(p) for p in made] == [TowardsSeven, AdaptiveTemperature]


def test_expected_weight_is_one_under_adaptive_temperature():
    logits = 2 * torch.randn(1, 40, generator=torch.Generator().manual_seed(2))
    log_old = logits.log_softmax(-1).T
    log_mu = AdaptiveTemperature(STATS, tau=0.5)(None, logits).log_softmax(-1).T
    cfg = CorrectionConfig(mode="truncate", clip_max=None)
    weight = rollout_weights(log_old, log_mu, torch.ones(40, 1), cfg).weight
    assert (weight - 1).abs().max() > 0.1
    assert (weight * log_mu.exp()).sum().item() == pytest.approx(1, abs=1e-6)


# ---- recorder and control ----


@pytest.mark.parametrize("settings", [PLAIN, WARPED], ids=["plain", "warped"])
@pytest.mark.parametrize("with_processors", [False, True])
def test_recorded_equals_the_scores_of_generate(model, prompts, settings, with_processors):
    recorder = SampledLogps()
    processors = ours(base=settings["temperature"]) if with_processors else []
    with sampling_control(model, processors, recorder):
        output = sample(model, prompts, settings)
    ids = completions(output.sequences)
    lengths = [len(row) for row in ids]
    assert min(lengths) < NEW == max(lengths)  # rows end at different times, some at the limit
    recorded = recorder.finish(ids)
    for row, tokens in enumerate(ids):
        expected = [output.scores[t][row].log_softmax(-1)[token].item() for t, token in enumerate(tokens)]
        assert recorded[row] == expected  # difference 0.0


@pytest.mark.parametrize("settings", [PLAIN, WARPED], ids=["plain", "warped"])
def test_recorded_equals_teacher_forcing(model, prompts, settings):
    recorder = SampledLogps()
    with sampling_control(model, ours(base=settings["temperature"]), recorder):
        sequences = sample(model, prompts, settings).sequences
    ids = completions(sequences)
    recorded = recorder.finish(ids)

    mask = torch.cat([prompts["attention_mask"], torch.ones_like(sequences[:, 6:])], dim=1)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        logits = model(sequences, attention_mask=mask, position_ids=positions).logits
    chain = LogitsProcessorList([*ours(base=settings["temperature"]), TemperatureLogitsWarper(settings["temperature"])])
    if settings is WARPED:
        chain += [TopKLogitsWarper(20), TopPLogitsWarper(0.9), MinPLogitsWarper(0.02)]
    for t in range(sequences.size(1) - 6):
        logps = chain(sequences[:, : 6 + t], logits[:, 5 + t]).log_softmax(-1)
        for row, tokens in enumerate(ids):
            if t < len(tokens):
                assert recorded[row][t] == pytest.approx(logps[row, tokens[t]].item(), abs=1e-5)


def test_learner_and_sampler_agree_without_processors(model, prompts):
    recorder = SampledLogps()
    with sampling_control(model, recorder=recorder):
        sequences = sample(model, prompts, {**PLAIN, "temperature": 0.7}).sequences
    ids = completions(sequences)
    recorded = recorder.finish(ids)
    mask = torch.cat([prompts["attention_mask"], torch.ones_like(sequences[:, 6:])], dim=1)
    with torch.no_grad():
        logits = model(sequences, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp(min=0)).logits
    learner = (logits[:, 5:-1] / 0.7).log_softmax(-1).gather(2, sequences[:, 6:, None]).squeeze(2)
    log_mu = torch.zeros_like(learner)
    loss_mask = torch.zeros_like(learner)
    for row, values in enumerate(recorded):
        log_mu[row, : len(values)] = torch.tensor(values)
        loss_mask[row, : len(values)] = 1
    result = rollout_weights(learner, log_mu, loss_mask, CorrectionConfig(mode="truncate"))
    assert result.weight.max() - 1 < 1e-5
    assert result.metrics["max_abs_diff"] < 1e-5
    assert result.metrics["ess"].item() == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize("settings", [PLAIN, WARPED], ids=["plain", "warped"])
def test_neutral_control_leaves_the_samples_bit_identical(model, prompts, settings):
    plain = sample(model, prompts, settings)
    neutral = [AdaptiveTemperature(WIDE_STATS, tau=0.0, base=settings["temperature"])]
    for processors in ([], neutral):
        with sampling_control(model, processors, SampledLogps()):
            controlled = sample(model, prompts, settings)
        assert torch.equal(plain.sequences, controlled.sequences)
        assert all(torch.equal(a, b) for a, b in zip(plain.scores, controlled.scores, strict=True))
    with sampling_control(model, ours(base=settings["temperature"])):
        changed = sample(model, prompts, settings)
    assert not all(torch.equal(a, b) for a, b in zip(plain.scores, changed.scores, strict=False))


def test_several_completions_per_prompt_and_reuse(model, prompts):
    recorder = SampledLogps()
    with sampling_control(model, recorder=recorder):
        for seed in (0, 1):
            output = sample(model, prompts, PLAIN, seed=seed, num_return_sequences=2)
            ids = completions(output.sequences)
            recorded = recorder.finish(ids)
            assert [len(r) for r in recorded] == [len(i) for i in ids]
            assert recorded[15][0] == output.scores[0][15].log_softmax(-1)[ids[15][0]].item()


def test_order_in_the_list(model):
    seen = []
    processors, recorder = ours(), SampledLogps()
    with sampling_control(model, processors, recorder):
        config = model.generation_config.__class__(**WARPED, repetition_penalty=1.1)
        mine = TowardsSeven()
        seen = model._get_logits_processor(
            config, 6, None, None, LogitsProcessorList([mine]), "cpu", {"attention_mask": torch.ones(1, 6)}
        )
    names = [type(p).__name__ for p in seen]
    assert names == [
        "RepetitionPenaltyLogitsProcessor",
        "TowardsSeven",
        "TowardsSeven",
        "AdaptiveTemperature",
        "TemperatureLogitsWarper",
        "TopKLogitsWarper",
        "TopPLogitsWarper",
        "MinPLogitsWarper",
        "SampledLogps",
    ]
    assert seen[1] is mine


def test_processors_are_told_where_the_completion_starts(model, prompts):
    class Position(RolloutProcessor):
        def begin(self, prompt_length, settings):
            self.start, self.temperature, self.positions = prompt_length, settings.temperature, []

        def __call__(self, input_ids, scores):
            self.positions.append(input_ids.size(1) - self.start)
            return scores

    position = Position()
    with sampling_control(model, [position]):
        sample(model, prompts, WARPED)
    assert position.positions == list(range(NEW))
    assert position.temperature == 0.7


def test_no_trace_is_left(model, prompts):
    before = dict(vars(model))
    method = model._get_logits_processor
    with sampling_control(model, ours(base=1.0), SampledLogps()):
        sample(model, prompts, PLAIN)
    assert vars(model) == before
    with pytest.raises(RuntimeError, match="from inside"), sampling_control(model, ours(base=1.0), SampledLogps()):
        raise RuntimeError("from inside")
    assert vars(model) == before
    assert model._get_logits_processor == method


def test_peft_models_are_reached(model, prompts):
    torch.manual_seed(0)
    base = Qwen3ForCausalLM(model.config).eval()
    wrapped = get_peft_model(base, LoraConfig(target_modules=["q_proj"], r=2, task_type="CAUSAL_LM")).eval()
    assert generation_model(wrapped) is base
    assert generation_model(base) is base
    recorder = SampledLogps()
    before = dict(vars(base))
    with sampling_control(wrapped, recorder=recorder):
        output = sample(wrapped, prompts, PLAIN)
    ids = completions(output.sequences)
    assert recorder.finish(ids)[3][0] == output.scores[0][3].log_softmax(-1)[ids[3][0]].item()
    assert vars(base) == before


def test_unsupported_generation_is_refused(model, prompts):
    before = dict(vars(model))
    cases = [
        ({**PLAIN, "num_beams": 2}, "num_beams=1"),
        ({**PLAIN, "prompt_lookup_num_tokens": 2}, "prompt_lookup_num_tokens"),
        ({**PLAIN, "do_sample": False}, "do_sample=False"),
    ]
    for settings, words in cases:
        with pytest.raises(ValueError, match=words), sampling_control(model, recorder=SampledLogps()):
            model.generate(**prompts, **settings)
    with pytest.raises(ValueError, match="use_transformers_continuous_batching=False"), sampling_control(model):
        model._get_logits_processor(model.generation_config)
    with sampling_control(model), pytest.raises(ValueError, match="already active"), sampling_control(model):
        pass
    with pytest.raises(ValueError, match="temperature=1.0 but generate uses 0.7"), sampling_control(model, ours(1.0)):
        model.generate(**prompts, **WARPED)
    assert vars(model) == before
    with sampling_control(model, ours(base=1.0)):  # greedy evaluation needs no recorder
        model.generate(**prompts, **{**PLAIN, "do_sample": False})


def test_assisted_generation_cannot_be_recorded_wrongly(model, prompts):
    one = {name: value[:1] for name, value in prompts.items()}
    torch.manual_seed(0)
    assistant = Qwen3ForCausalLM(model.config).eval()
    with (
        pytest.raises(ValueError, match="assistant_model"),
        sampling_control(model, recorder=SampledLogps()),
    ):
        model.generate(**one, **PLAIN, assistant_model=assistant)


def test_finish_checks_what_it_is_given(model, prompts):
    recorder = SampledLogps()
    with pytest.raises(ValueError, match="nothing was recorded"):
        recorder.finish([[2]])
    with sampling_control(model, recorder=recorder):
        ids = completions(sample(model, prompts, PLAIN).sequences)
        with pytest.raises(ValueError, match="finish"):
            sample(model, prompts, PLAIN)
    with pytest.raises(ValueError, match="8 rows"):
        recorder.finish(ids[:4])
    with pytest.raises(ValueError, match="up to 11"):
        recorder.finish([[2] * (NEW + 1)] * 8)
    with pytest.raises(ValueError, match="completion 0 is not"):
        recorder.finish([ids[1], ids[0], *ids[2:]])
    shorter = [row[:1] for row in ids]
    assert [len(row) for row in recorder.finish(shorter)] == [1] * 8  # trailing steps are left out


def test_the_recorder_keeps_one_row_only(model, prompts):
    recorder = SampledLogps()
    with sampling_control(model, recorder=recorder):
        sample(model, prompts, PLAIN)
    held = [value for value in vars(recorder).values() if isinstance(value, torch.Tensor)] + recorder._logps
    assert sum(VOCAB in tensor.shape for tensor in held) == 1
    assert all(tensor.untyped_storage().nbytes() <= 8 * VOCAB * 4 for tensor in held)
