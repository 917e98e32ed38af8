"""What vLLM returns with processors, against the policy's logits through the same processors in transformers."""

from __future__ import annotations

import pytest
import torch
from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper
from vllm import LLM, SamplingParams
from vllm.exceptions import VLLMValidationError
from vllm.v1.sample.logits_processor import LogitsProcessor as V1LogitsProcessor

from rltok.entropy import EntropyStats
from rltok.sampling import (
    AdaptiveTemperature,
    BudgetForcingLogitsProcessor,
    CyclicReflexLogitsProcessor,
    ReflectionSuppressionLogitsProcessor,
    ThoughtSwitchingLogitsProcessor,
)
from rltok.sampling.serial import KEY, PROCESSORS, decode, encode
from rltok.sampling.vllm_processor import VLLMDecoding
from rltok.sampling.vllm_rows import BatchRows
from rltok.trainers.vllm import PROCESSOR

WORDS, END, EOS, TEMPERATURE = (3, 4, 5, 6, 7, 8), 9, 1, 0.7
STATS = EntropyStats(*(torch.tensor(x) for x in (0.8, -2.0, 1.0, 0.7, 50)))
SINGLE = {
    "cyclic_reflex": CyclicReflexLogitsProcessor(WORDS, amplitude=5.0, period=9.0, end_ids=(END,)),
    "thought_switching": ThoughtSwitchingLogitsProcessor(WORDS, alpha=3.0, beta=4, end_ids=(END,)),
    "suppression": ReflectionSuppressionLogitsProcessor(WORDS, strength=2.0, only_thinking=True, end_ids=(END,)),
    "budget_forcing": BudgetForcingLogitsProcessor(
        (10, 11), (END,), (EOS,), (12, 13), min_tokens=3, max_tokens=12, ignore=2, base=TEMPERATURE
    ),
    "adaptive_temperature": AdaptiveTemperature(STATS, tau=0.4, base=TEMPERATURE),
}
CHAINS = {name: [processor] for name, processor in SINGLE.items()} | {"all": list(SINGLE.values())}
ENGINE = {
    "dtype": "float32",
    "enforce_eager": True,
    "max_model_len": 64,
    "max_num_seqs": 8,
    "block_size": 32,
    "logprobs_mode": "processed_logprobs",
    "enable_prefix_caching": False,
    "seed": 0,
}


TIGHT = {"num_gpu_blocks_override": 10, "max_num_batched_tokens": 24, "enable_chunked_prefill": True}


@pytest.fixture(scope="module")
def engine(folder):
    """So small that requests wait for a row and for cache, and prompts are read in parts."""
    return LLM(model=folder, **ENGINE, **TIGHT, logits_processors=[PROCESSOR])


@pytest.fixture(scope="module")
def roomy_engine(folder):
    """Prompts are read whole, so that requests can have seeds: vLLM's CPU runner cannot do both."""
    return LLM(model=folder, **ENGINE, max_num_batched_tokens=512, logits_processors=[PROCESSOR])


@pytest.fixture(scope="module")
def prompts():
    """12 prompts of 1 to 30 tokens."""
    generator = torch.Generator().manual_seed(1)
    lengths = [1, 2, 3, 5, 8, 30, 13, 21, 1, 7, 17, 4]
    return [torch.randint(3, 50, (length,), generator=generator).tolist() for length in lengths]


def generate(engine, prompts, chains, n=2, seeds=None, **changes):
    """[(prompt, ids, log-probabilities, chain)] of n completions of every prompt; one chain for all, or a list."""
    chains = chains if isinstance(chains[0] if chains else None, list) else [chains] * len(prompts)
    settings = {"temperature": TEMPERATURE, "max_tokens": 24, "logprobs": 0, "n": n, **changes}
    params = [
        SamplingParams(**settings, seed=seed, extra_args={KEY: encode(chain)} if chain else None)
        for chain, seed in zip(chains, seeds or [None] * len(prompts), strict=True)
    ]
    torch.manual_seed(0)
    outputs = engine.generate([{"prompt_token_ids": p} for p in prompts], params, use_tqdm=False)

    def logps(completion):
        return [entry[token].logprob for entry, token in zip(completion.logprobs, completion.token_ids, strict=True)]

    return [
        (list(o.prompt_token_ids), list(c.token_ids), logps(c), chain)
        for o, chain in zip(outputs, chains, strict=True)
        for c in o.outputs
    ]


def teacher_forced(model, prompt, ids, chain, top_k=0, top_p=1.0):
    """Log-probabilities of a completion, from the model's logits through fresh processors, one step after another."""
    warpers = [TemperatureLogitsWarper(TEMPERATURE)]
    warpers += [TopKLogitsWarper(top_k)] if top_k else []
    warpers += [TopPLogitsWarper(top_p)] if top_p < 1 else []
    whole = torch.tensor([prompt + ids])
    with torch.no_grad():
        logits = model(whole).logits[0]
    processors, values = decode(encode(chain)), []
    for t, token in enumerate(ids):
        scores = logits[len(prompt) + t - 1][None].clone()
        for processor in (*processors, *warpers):
            scores = processor(whole[:, : len(prompt) + t], scores)
        values.append(scores.log_softmax(-1)[0, token].item())
    return values


def check(model, results, **truncation):
    """Returned and recomputed log-probabilities; the largest difference is printed by pytest -s."""
    assert len({len(ids) for _, ids, _, _ in results}) > 3, "rows must end at different times"
    worst = 0.0
    for prompt, ids, logps, chain in results:
        expected = teacher_forced(model, prompt, ids, chain, **truncation)
        worst = max(worst, *(abs(a - b) for a, b in zip(logps, expected, strict=True)))
    print(f"largest difference of {sum(len(ids) for _, ids, _, _ in results)} log-probabilities: {worst:.1e}")
    assert worst < 1e-5
    return worst


def test_the_class_serves_every_interface():
    bases = {base.__module__ for base in VLLMDecoding.__mro__}
    assert issubclass(VLLMDecoding, V1LogitsProcessor)
    assert "vllm.v1.worker.gpu.sample.logits_processor.interface" in bases
    assert set(map(type, SINGLE.values())) == set(PROCESSORS.values()), "a processor has no test here"


def test_v2_loader_accepts_the_class():
    from types import SimpleNamespace

    from vllm.v1.worker.gpu.sample.logits_processor import build_custom_logits_processors_params_validator

    validate = build_custom_logits_processors_params_validator([PROCESSOR])
    validate(SamplingParams(extra_args={KEY: encode(CHAINS["cyclic_reflex"])}))
    with pytest.raises(VLLMValidationError, match="rltok_decoding is no JSON"):
        validate(SamplingParams(extra_args={KEY: "probe"}))
    states = SimpleNamespace(device="cpu", max_num_reqs=4)
    assert VLLMDecoding(SimpleNamespace(speculative_config=None), states)._slots is not None
    with pytest.raises(ValueError, match="speculative"):
        VLLMDecoding(SimpleNamespace(speculative_config=object()), states)


@pytest.mark.parametrize("chain", CHAINS.values(), ids=CHAINS)
def test_returned_log_probabilities(engine, model, prompts, chain):
    check(model, generate(engine, prompts, chain))


@pytest.mark.parametrize("name", ["cyclic_reflex", "adaptive_temperature", "all"])
def test_returned_log_probabilities_of_truncated_sampling(engine, model, prompts, name):
    results = generate(engine, prompts, CHAINS[name], top_p=0.9, top_k=20)
    check(model, results, top_p=0.9, top_k=20)


def test_requests_with_different_processors_in_one_batch(engine, model, prompts):
    chains = [*CHAINS.values(), []] * 2
    check(model, generate(engine, prompts, chains[: len(prompts)]))


def test_same_logits_as_the_transformers_twin(engine, prompts, monkeypatch):
    """What goes into the processors inside vLLM, through their twins, is what comes out."""
    steps, apply = [], BatchRows.apply

    def watched(self, logits):
        rows = [(list(r.prompt), list(r.outputs)) for _, r in sorted(self._requests.items())]
        before = logits.clone()
        after = apply(self, logits)
        if self._requests:
            steps.append((rows, before, after.clone()))
        return after

    monkeypatch.setattr(BatchRows, "apply", watched)
    chain = [processor for name, processor in SINGLE.items() if name != "budget_forcing"]  # replayable, so comparable
    generate(engine, prompts, chain)
    assert len({len(rows) for rows, _, _ in steps}) > 2, "the batch must change"
    compared = 0
    for rows, before, after in steps:
        for index, (prompt, outputs) in enumerate(rows):
            scores, ids = before[index : index + 1], torch.tensor([prompt + outputs])
            for processor in decode(encode(chain)):
                processor.prompt_length = len(prompt)
                scores = processor(ids, scores)
            torch.testing.assert_close(after[index : index + 1], scores, atol=1e-6, rtol=1e-6)
            compared += 1
    assert compared > 300


def test_preempted_requests_continue(engine, model, prompts, monkeypatch):
    scheduler = engine.llm_engine.engine_core.engine_core.scheduler
    preempted, original = [], type(scheduler)._preempt_request

    def counted(self, request, *args, **kwargs):
        preempted.append(request.num_output_tokens)
        return original(self, request, *args, **kwargs)

    monkeypatch.setattr(type(scheduler), "_preempt_request", counted)
    for name in ("all", "cyclic_reflex"):
        check(model, generate(engine, prompts, CHAINS[name], n=4, max_tokens=30))
    print(f"{len(preempted)} preemptions")
    assert sum(count > 0 for count in preempted) > 5


def test_order_of_requests_does_not_matter(roomy_engine, prompts):
    chains = ([*CHAINS.values(), []] * 2)[: len(prompts)]
    seeds = [1000 + 10 * i for i in range(len(prompts))]
    there = generate(roomy_engine, prompts, chains, seeds=seeds, n=1)
    back = generate(roomy_engine, prompts[::-1], chains[::-1], seeds=seeds[::-1], n=1)[::-1]
    assert [r[:2] for r in there] == [r[:2] for r in back]
    for (_, _, a, _), (_, _, b, _) in zip(there, back, strict=True):
        assert a == pytest.approx(b, abs=1e-5)


def test_neutral_is_the_plain_engine(roomy_engine, folder, prompts):
    neutral = [CyclicReflexLogitsProcessor(WORDS, amplitude=0.0), AdaptiveTemperature(None)]
    seeds = list(range(0, 100 * len(prompts), 100))
    ours = [generate(roomy_engine, prompts, chain, seeds=seeds) for chain in ([], neutral)]
    changed = generate(roomy_engine, prompts, CHAINS["cyclic_reflex"], seeds=seeds)
    plain = generate(LLM(model=folder, **ENGINE, max_num_batched_tokens=512), prompts, [], seeds=seeds)
    for results in ours:
        assert [r[:3] for r in results] == [r[:3] for r in plain]  # ids and log-probabilities, bit for bit
    assert [r[1] for r in changed] != [r[1] for r in plain]


def test_wrong_requests_are_refused(engine):
    for text, words in (("probe", "rltok_decoding is no JSON"), ([1], "rltok_decoding=.* is not a text")):
        with pytest.raises(VLLMValidationError, match=words):
            engine.generate([{"prompt_token_ids": [4]}], SamplingParams(extra_args={KEY: text}), use_tqdm=False)
    other = SamplingParams(temperature=0.5, extra_args={KEY: encode(CHAINS["adaptive_temperature"])})
    with pytest.raises(VLLMValidationError, match="built for temperature=0.7 but the request has 0.5"):
        engine.generate([{"prompt_token_ids": [4]}], other, use_tqdm=False)
