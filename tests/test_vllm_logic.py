"""Processors on vLLM without vLLM: the text they travel as, both batch layouts against `generate`, TRL's hooks.

The engines here are small models of vLLM's two runners: they admit, preempt, move and drop requests at random, read
prompts in parts, and call the processors as vLLM does. What vLLM itself returns is tested in `tests/vllm`.
"""

from __future__ import annotations

import json
import logging
import subprocess
import sys
import threading
import zlib
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace

import numpy as np
import pytest
import requests
import torch
from trl import GRPOConfig
from trl.generation import vllm_generation as trl_generation

from rltok.config import ConfigError
from rltok.entropy import EntropyStats
from rltok.sampling import (
    DECODING,
    AdaptiveTemperature,
    BudgetForcingLogitsProcessor,
    CyclicReflexLogitsProcessor,
    DecodingContext,
    ReflectionSuppressionLogitsProcessor,
    RolloutProcessor,
    SampledLogps,
    ThoughtSwitchingLogitsProcessor,
)
from rltok.sampling.serial import KEY, PROCESSORS, decode, encode
from rltok.sampling.vllm_rows import BatchRows, SlotRows
from rltok.trainers.vllm import (
    PROCESSOR,
    RUNNER,
    decoding_parameters,
    engine_with_processors,
    probe_server,
    with_decoding,
)

VOCAB, WORDS, END, EOS = 16, (3, 4, 5), 6, 1
STATS = EntropyStats(*(torch.tensor(x) for x in (0.8, -2.0, 1.0, 0.7, 50)))
WAVE = CyclicReflexLogitsProcessor(WORDS, amplitude=3.0, period=9.0, end_ids=(END,))
WAVE_2 = CyclicReflexLogitsProcessor(WORDS, amplitude=2.0, period=5.0, start_ids=(7, 8), end_ids=(END, 9))
PENALTY = ThoughtSwitchingLogitsProcessor(WORDS, alpha=2.0, beta=4, end_ids=(END,))
SUPPRESSION = ReflectionSuppressionLogitsProcessor(WORDS, strength=1.5, only_thinking=True, end_ids=(END,))
BUDGETS = BudgetForcingLogitsProcessor((10, 11), (END,), (EOS,), (12, 13), min_tokens=3, max_tokens=14, ignore=2)
TEMPERATURE = AdaptiveTemperature(STATS, tau=0.3)
ONE_OF_EACH = [WAVE, PENALTY, SUPPRESSION, BUDGETS, TEMPERATURE]


# ---- text ----


def test_every_decoding_method_travels_as_text(tokenizer):
    """A new decoding method must be in the table, and its settings must make the same processor again."""
    context = DecodingContext(0.7, STATS, tokenizer)
    options = {name: {"words": ("a", "b")} for name, cls in DECODING.items() if hasattr(cls, "words")}
    options["budget_forcing"] = {"wait_text": "abc", "end": "z"}
    made = [cls(**options.get(name, {})).processor(context) for name, cls in DECODING.items()]
    assert all(processor is not None for processor in made)
    again = decode(encode(made))
    assert [type(p) for p in again] == [type(p) for p in made]
    assert encode(again) == encode(made)
    assert {*map(type, ONE_OF_EACH), Tally} == set(PROCESSORS.values())


def test_text_keeps_values_and_order():
    text = encode([TEMPERATURE, WAVE])
    first, second = decode(text)
    assert [float(x) for x in first.stats] == [float(x) for x in STATS]
    assert (second.word_ids, second.amplitude, second.end_ids) == (WORDS, 3.0, [END])
    assert json.loads(text)[1]["processor"] == "CyclicReflexLogitsProcessor"
    assert encode([]) == "[]" and decode("[]") == []


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (7, "rltok_decoding=7 is not a text"),
        ("probe", "rltok_decoding is no JSON"),
        ("{}", "not a list"),
        ("[3]", r"rltok_decoding\[0\]: 3 is no object"),
        ('[{"processor": "Exec"}]', "unknown processor 'Exec'"),
        ('[{"processor": "CyclicReflex", "word_ids": [1]}]', "did you mean 'CyclicReflexLogitsProcessor'"),
        ('[{"processor": "CyclicReflexLogitsProcessor", "word_ids": [1], "amplitud": 1}]', "no argument 'amplitud'"),
        ('[{"processor": "CyclicReflexLogitsProcessor", "word_ids": ["a"]}]', r"\[0\].word_ids: .*not a valid"),
        ('[{"processor": "CyclicReflexLogitsProcessor", "word_ids": [1], "amplitude": "5"}]', "amplitude: '5' is not"),
        ('[{"processor": "CyclicReflexLogitsProcessor", "word_ids": [1], "amplitude": -1}]', "amplitude=-1"),
        ('[{"processor": "CyclicReflexLogitsProcessor"}]', "CyclicReflexLogitsProcessor: .*word_ids"),
        ('[{"processor": "AdaptiveTemperature", "stats": [1, 2]}]', "AdaptiveTemperature: "),
        ('[{"processor": "AdaptiveTemperature", "stats": null, "form": "linear"}]', "'linear' is not valid"),
    ],
)
def test_wrong_texts_are_refused(text, words):
    with pytest.raises(ValueError, match=words):
        decode(text)


def test_other_classes_cannot_be_sent():
    class Mine(CyclicReflexLogitsProcessor):
        pass

    Mine.__name__ = "CyclicReflexLogitsProcessor"  # the name alone does not do
    for processor in (SampledLogps(), Mine([1])):
        with pytest.raises(ValueError, match="cannot be sent to an engine; allowed: AdaptiveTemperature"):
            encode([processor])


def test_nothing_imports_vllm_but_the_engine():
    code = "import sys, rltok.sampling, rltok.sampling.serial, rltok.sampling.vllm_rows; print('vllm' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "False"


# ---- batches ----


@dataclass(eq=False)
class Request:
    """One request of the model engines, with the steps that count."""

    prompt: list[int]
    text: str | None
    limit: int
    parts: int = 1
    """parts in which its prompt is read"""
    outputs: list[int] = field(default_factory=list)
    unread: int = 0
    seen: list[torch.Tensor] = field(default_factory=list)
    """processed logits of every step that gave a token"""

    def __post_init__(self):
        self.unread = self.parts - 1

    @property
    def params(self):
        return SimpleNamespace(extra_args=None if self.text is None else {KEY: self.text, "other": 1})

    @property
    def done(self):
        return len(self.outputs) >= self.limit or (EOS in self.outputs)

    def logits(self, garbage=False):
        """What the model gives after prompt and outputs; garbage where a prompt is read in part."""
        seed = zlib.crc32(str((self.prompt, self.outputs, garbage, self.unread if garbage else 0)).encode())
        return 2 * torch.randn(VOCAB, generator=torch.Generator().manual_seed(seed))

    def take(self, processed):
        self.seen.append(processed.clone())
        seed = zlib.crc32(str((self.prompt, len(self.outputs))).encode())
        noise = torch.rand(VOCAB, generator=torch.Generator().manual_seed(seed)).log().neg().log().neg()
        self.outputs.append(int((processed + noise).argmax()))


@dataclass(eq=False)
class Tally(RolloutProcessor):
    """Remembers the greatest logit of every step, in a matrix; checks what an engine promises of rows."""

    gain: float = 0.5

    memory = "logits"

    def columns(self, rows, device):
        return {"tally": torch.zeros(rows, 2, device=device)}

    def observe(self, rows, columns):
        assert (rows.position >= 1).all() and (rows.last >= 0).all()
        columns["tally"] = columns["tally"] * 0.5 + rows.last[:, None] * torch.tensor([0.01, 0.0])  # not in place

    def apply(self, scores, rows, columns):
        assert (rows.position >= 0).all() and rows.furthest >= rows.position.max()
        greatest = scores.amax(1)
        scores[:, 7] += self.gain * columns["tally"].sum(1)
        columns["tally"][:, 1] += greatest
        columns["note"] = greatest  # for the record only
        return scores


@pytest.fixture(autouse=True)
def tally(monkeypatch):
    monkeypatch.setitem(PROCESSORS, "Tally", Tally)


def make_requests(texts, count=40, parts=3, seed=0):
    rng = np.random.default_rng(seed)
    return [
        Request(
            prompt=rng.integers(2, VOCAB, rng.integers(1, 6)).tolist(),
            text=texts[rng.integers(len(texts))],
            limit=int(rng.integers(1, 25)),
            parts=int(rng.integers(1, parts + 1)),
        )
        for _ in range(count)
    ]


def check_against_generate(requests):
    """Every processed row equals the one that the processors give as logits processors of `generate`."""
    changed = 0
    for request in requests:
        assert request.done and len(request.seen) == len(request.outputs)
        outputs, seen = request.outputs, request.seen
        processors = [] if request.text is None else decode(request.text)
        request.outputs = []
        for token, actual in zip(outputs, seen, strict=True):
            plain = expected = request.logits()[None]
            ids = torch.tensor([request.prompt + request.outputs])
            for processor in processors:
                expected = processor(ids, expected)
            torch.testing.assert_close(actual, expected[0], atol=1e-6, rtol=0)
            changed += not torch.equal(plain, expected)
            request.outputs.append(token)
    return changed


SWAP, ONE_WAY = SimpleNamespace(name="SWAP"), SimpleNamespace(name="UNIDIRECTIONAL")


class V1Engine:
    """Keeps a dense batch: indices of removed requests are given anew or filled from the end; lists are shared."""

    def __init__(self, size=6, seed=0, preempt=0.15, apart=False):
        self.rows = BatchRows(size, torch.device("cpu"))
        self.size, self.rng, self.preempt, self.apart = size, np.random.default_rng(seed), preempt, apart
        self.batch: list[Request | None] = []
        self.preempted = self.swaps = 0

    def run(self, requests):
        waiting = list(requests)
        for request in waiting:
            request.live = []
        while waiting or self.batch:
            leaving = [i for i, r in enumerate(self.batch) if r.done]
            for i, request in enumerate(self.batch):
                if not request.done and self.rng.random() < self.preempt:
                    leaving.append(i)
                    waiting.insert(0, request)
                    request.unread = int(self.rng.integers(request.parts))
                    if request.outputs and self.rng.random() < 0.3:  # the token sampled last is dropped
                        for values in (request.outputs, request.live, request.seen):
                            values.pop()
                    if self.apart:  # asynchronous scheduling hands out another list
                        request.live = list(request.live)
                    self.preempted += len(request.outputs) > 0
            holes = sorted(leaving)
            for i in holes:
                self.batch[i] = None
            added, moved = [], []
            while waiting and (holes or len(self.batch) < self.size) and self.rng.random() < 0.7:
                request = waiting.pop(0)
                index = holes.pop(0) if holes else len(self.batch)
                if index == len(self.batch):
                    self.batch.append(None)
                self.batch[index] = request
                added.append((index, request.params, request.prompt, request.live))
            removed = holes[::-1]  # an index given anew is not reported as removed
            while holes:
                if self.batch[-1] is not None:
                    hole = holes.pop(0)
                    moved.append((len(self.batch) - 1, hole, ONE_WAY))
                    self.batch[hole] = self.batch[-1]
                else:
                    holes.remove(len(self.batch) - 1)
                self.batch.pop()
            if len(self.batch) > 1 and self.rng.random() < 0.3:
                a, b = self.rng.choice(len(self.batch), 2, replace=False).tolist()
                self.batch[a], self.batch[b] = self.batch[b], self.batch[a]
                moved.append((a, b, SWAP))
                self.swaps += 1
            if removed or added or moved:
                self.rows.update(removed, added, moved)
            self.step()

    def step(self):
        if not self.batch:
            return
        given = torch.stack([r.logits(garbage=r.unread > 0) for r in self.batch])
        processed = self.rows.apply(given)
        for request, row in zip(self.batch, processed, strict=True):
            if request.unread:
                request.unread -= 1
            else:
                request.take(row)
                request.live.append(request.outputs[-1])


class V2Engine:
    """Keeps requests in slots of a free list; rows come in any order; ids and positions are tensors."""

    def __init__(self, size=6, seed=0, preempt=0.15):
        def buffer(*shape):
            cpu = torch.zeros(*shape, dtype=torch.int32)
            return SimpleNamespace(gpu=cpu, np=cpu.numpy())

        self.states = SimpleNamespace(
            device="cpu",
            max_num_reqs=size,
            prompt_len=buffer(size),
            prefill_len=buffer(size),
            all_token_ids=buffer(size, 64),
        )
        self.rows = SlotRows(self.states)
        self.rng, self.preempt = np.random.default_rng(seed), preempt
        self.slots: dict[int, Request] = {}
        self.free = list(range(size))
        self.preempted = 0

    def run(self, requests):
        waiting = list(requests)
        while waiting or self.slots:
            for slot, request in list(self.slots.items()):
                if request.done or self.rng.random() < self.preempt:
                    self.free.append(slot)
                    del self.slots[slot]
                    if not request.done:
                        waiting.insert(0, request)
                        request.unread = int(self.rng.integers(request.parts))
                        self.preempted += len(request.outputs) > 0
            while waiting and self.free and self.rng.random() < 0.7:
                request, slot = waiting.pop(0), self.free.pop()
                self.slots[slot] = request
                ids = request.prompt + request.outputs
                self.states.prompt_len.np[slot] = len(request.prompt)
                self.states.prefill_len.np[slot] = len(ids)
                self.states.all_token_ids.gpu[slot] = -1
                self.states.all_token_ids.gpu[slot, : len(ids)] = torch.tensor(ids)
                assert self.rows.add(slot, request.params) == (request.text is not None)
            self.rows.flush()
            if self.slots:
                self.step()

    def step(self):
        order = self.rng.permutation(list(self.slots))
        requests = [self.slots[slot] for slot in order.tolist()]
        ids = [r.prompt + r.outputs for r in requests]
        # Read in part: the row stands at an earlier token, possibly within the prompt.
        positions = [len(i) - 1 - (r.unread if len(i) > r.unread else 0) for i, r in zip(ids, requests, strict=True)]
        context = SimpleNamespace(
            expanded_idx_mapping=torch.tensor(order, dtype=torch.int32),
            idx_mapping_np=order,
            input_ids=torch.tensor([i[p] for i, p in zip(ids, positions, strict=True)], dtype=torch.int32),
            pos=torch.tensor(positions),
            seq_lens_upper_bound_np=np.array([len(i) for i in ids]),
        )
        given = torch.stack([r.logits(garbage=r.unread > 0) for r in requests])
        processed = self.rows.apply(given, context)
        for request, row in zip(requests, processed, strict=True):
            if request.unread:
                request.unread -= 1
            else:
                request.take(row)


REPLAYABLE = [encode([WAVE, TEMPERATURE]), encode([WAVE_2, PENALTY]), encode([SUPPRESSION]), None]
TALLIES = ['[{"processor": "Tally"}]', '[{"processor": "Tally", "gain": 1.0}, ' + encode([TEMPERATURE])[1:]]
TEXTS = {
    "one chain": [encode([WAVE, TEMPERATURE])],
    "one processor": [encode([TEMPERATURE])],
    "all": [encode(ONE_OF_EACH)],
    "mixed": [*REPLAYABLE, encode(ONE_OF_EACH), TALLIES[0]],
    "memory of logits": TALLIES,
}


@pytest.mark.parametrize("texts", TEXTS.values(), ids=TEXTS)
@pytest.mark.parametrize("apart", [False, True], ids=["same list", "new list"])
def test_v1_batch_equals_generate(texts, apart):
    engine, requests = V1Engine(apart=apart), make_requests(texts)
    engine.run(requests)
    assert engine.preempted > 10 and engine.swaps > 5
    assert check_against_generate(requests) > 100
    assert not engine.rows._requests


@pytest.mark.parametrize(
    "texts", [TEXTS["one chain"], TEXTS["one processor"], REPLAYABLE], ids=["one", "none", "mixed"]
)
def test_v2_batch_equals_generate(texts):
    engine, requests = V2Engine(), make_requests(texts)
    engine.run(requests)
    assert engine.preempted > 10
    assert check_against_generate(requests) > 100


@pytest.mark.parametrize("name", ["mixed", "memory of logits"])
def test_v2_batch_with_memory_of_logits(name):
    engine, requests = V2Engine(preempt=0.0), make_requests(TEXTS[name])
    engine.run(requests)
    assert check_against_generate(requests) > 100


def test_v2_does_not_resume_memory_of_logits():
    resumed = Request([2, 3], TEXTS["all"][0], 5, outputs=[4])
    engine = V2Engine()
    engine.states.prompt_len.np[0], engine.states.prefill_len.np[0] = 2, 3
    with pytest.raises(RuntimeError, match="VLLM_USE_V2_MODEL_RUNNER=0"):
        engine.rows.add(0, resumed.params)


@pytest.mark.parametrize("engine", [V1Engine, V2Engine])
@pytest.mark.parametrize("size", [1, 16])
def test_order_and_size_of_the_batch_do_not_matter(engine, size):
    first, second = (make_requests(REPLAYABLE, count=12) for _ in range(2))
    engine(size=1, seed=1).run(first)
    engine(size=size, seed=2).run(second[::-1])
    for a, b in zip(first, second, strict=True):
        assert a.outputs == b.outputs
        torch.testing.assert_close(torch.stack(a.seen), torch.stack(b.seen), atol=1e-6, rtol=0)


@pytest.mark.parametrize("engine", [V1Engine, V2Engine])
def test_requests_that_ask_for_nothing_are_untouched(engine):
    neutral = encode([CyclicReflexLogitsProcessor(WORDS, amplitude=0.0), AdaptiveTemperature(None)])
    for text in (None, "[]", neutral):
        requests = make_requests([text], count=8)
        engine().run(requests)
        assert check_against_generate(requests) == 0


def test_plain_decoding_takes_the_short_way(monkeypatch):
    """Rows of one chain that grew by a token cost one observe and one apply on views, and one copy to the device."""
    batch = BatchRows(8, torch.device("cpu"))
    lists = [[2], [3], [4]]
    batch.update([], [(i, make_requests(TEXTS["one chain"])[0].params, [5], ids) for i, ids in enumerate(lists)], [])
    batch.apply(torch.zeros(3, VOCAB))
    for ids in lists:
        ids.append(7)
    copies, made = [], BatchRows._tensor
    monkeypatch.setattr(BatchRows, "_tensor", lambda self, values: copies.append(1) or made(self, values))
    monkeypatch.setattr(BatchRows, "_replay", lambda *_: pytest.fail("replayed"))
    given = torch.zeros(3, VOCAB)
    assert batch.apply(given) is given
    assert len(copies) == 1


def test_placeholders_are_refused():
    batch = BatchRows(4, torch.device("cpu"))
    batch.update([], [(0, make_requests(TEXTS["one chain"])[0].params, [5], [2, -1])], [])
    with pytest.raises(RuntimeError, match="--logits-processors"):
        batch.apply(torch.zeros(1, VOCAB))


def test_tokens_taken_back_are_forgotten():
    request, ids = make_requests(TEXTS["one chain"])[0], [2, 3, END]
    batch = BatchRows(4, torch.device("cpu"))
    batch.update([], [(0, request.params, [5], ids)], [])
    batch.apply(torch.zeros(1, VOCAB))
    del ids[1:]  # the end of thinking with them
    actual = batch.apply(torch.zeros(1, VOCAB))
    wave, _ = decode(request.text)
    wave.prompt_length = 1
    expected = TEMPERATURE(None, wave(torch.tensor([[5, 2]]), torch.zeros(1, VOCAB)))
    assert not torch.equal(expected, torch.zeros(1, VOCAB))
    torch.testing.assert_close(actual, expected)


def test_lost_memory_of_logits_is_an_error():
    batch = BatchRows(4, torch.device("cpu"))
    request = make_requests(TEXTS["all"])[0]
    batch.update([], [(0, request.params, [5], [2, 3])], [])
    with pytest.raises(RuntimeError, match="BudgetForcingLogitsProcessor is no longer kept"):
        batch.apply(torch.zeros(1, VOCAB))


def test_kept_memory_is_bounded():
    batch = BatchRows(2, torch.device("cpu"))
    params = make_requests(TEXTS["all"])[0].params
    for prompt in range(30):
        batch.update([0] if prompt else [], [(0, params, [prompt], [])], [])
        batch.apply(torch.zeros(1, VOCAB))
    assert len(batch._suspended) == 8 and len(batch._chains) == 1


# ---- TRL ----


def colocate(folder, **changes):
    args = GRPOConfig(output_dir=str(folder), use_cpu=True, bf16=False, report_to=[])
    args.use_vllm, args.vllm_mode = changes.get("use_vllm", True), changes.get("vllm_mode", "colocate")
    return args


def test_engine_is_built_with_processors(tmp_path, monkeypatch, caplog):
    built = []
    monkeypatch.setattr(trl_generation, "LLM", lambda *a, **k: built.append((a, k)) or "engine", raising=False)
    monkeypatch.delenv(RUNNER, raising=False)
    original = trl_generation.LLM
    caplog.set_level(logging.INFO, "rltok.trainers.vllm")
    with engine_with_processors(colocate(tmp_path)):
        assert trl_generation.LLM(model="x", logits_processors=["mine"]) == "engine"
    assert trl_generation.LLM is original
    assert built == [((), {"model": "x", "logits_processors": ["mine", PROCESSOR]})]
    assert caplog.messages == ["vLLM's model runner with rltok's processors: V1 (VLLM_USE_V2_MODEL_RUNNER=0)"]
    monkeypatch.setenv(RUNNER, "1")  # the user's choice stays
    with pytest.raises(ZeroDivisionError), engine_with_processors(colocate(tmp_path)):
        1 / 0  # noqa: B018
    assert trl_generation.LLM is original
    assert "V2 (VLLM_USE_V2_MODEL_RUNNER=1)" in caplog.messages[-1]


def test_engine_that_cannot_get_processors_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv(RUNNER, "0")
    monkeypatch.setattr(trl_generation, "LLM", object, raising=False)
    with pytest.raises(ConfigError, match="in an unknown way"), engine_with_processors(colocate(tmp_path)):
        pass
    with (
        pytest.raises(ConfigError, match="vllm_mode='server'"),
        engine_with_processors(colocate(tmp_path, vllm_mode="server")),
    ):
        pass
    monkeypatch.delattr(trl_generation, "LLM")
    with pytest.raises(ConfigError, match="Install a vLLM"), engine_with_processors(colocate(tmp_path)):
        pass


@pytest.mark.parametrize(("mode", "key"), [("colocate", "extra_args"), ("server", "vllm_xargs")])
def test_parameters_are_set_and_restored(mode, key):
    own = {"seed": 3, key: {"mine": 1}}
    generation = SimpleNamespace(mode=mode, generation_kwargs=own)
    with decoding_parameters(generation, [WAVE, AdaptiveTemperature(None), TEMPERATURE]):
        sent = generation.generation_kwargs
        assert sent == {"seed": 3, key: {"mine": 1, KEY: encode([WAVE, TEMPERATURE])}}
    assert generation.generation_kwargs is own and own == {"seed": 3, key: {"mine": 1}}
    for nothing in ([], [AdaptiveTemperature(None)]):
        with decoding_parameters(generation, nothing):
            assert generation.generation_kwargs is own
    with pytest.raises(ZeroDivisionError), decoding_parameters(generation, [WAVE]):
        1 / 0  # noqa: B018
    assert generation.generation_kwargs is own


@pytest.mark.parametrize(
    ("mode", "given", "words"),
    [
        ("server", {"extra_args": {}}, "vllm_mode='server' reads vllm_xargs"),
        ("colocate", {"vllm_xargs": {}}, "vllm_mode='colocate' reads extra_args"),
        ("server", {"vllm_xargs": {KEY: "[]"}}, "vllm_xargs sets .rltok_decoding., which rollout.decoding sets"),
        ("colocate", {"extra_args": 3}, "extra_args=3 is not a mapping"),
        ("sglang", {}, "allowed: 'colocate', 'server'"),
    ],
)
def test_parameters_that_collide_are_refused(mode, given, words):
    with pytest.raises(ConfigError, match=words):
        with_decoding(given, mode, "[]")


@pytest.fixture
def server():
    """An HTTP server with the answers in `server.answers`; collects request bodies."""

    class Handler(BaseHTTPRequestHandler):
        def answer(self, status, text):
            self.send_response(status)
            self.send_header("Content-Length", str(len(text)))
            self.end_headers()
            self.wfile.write(text.encode())

        def do_POST(self):
            self.server.bodies.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            self.answer(*self.server.answers[self.path])

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.bodies, server.answers = [], {}
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.mark.parametrize(
    ("answer", "mode", "words"),
    [
        ((400, "rltok_decoding is no JSON: ..."), "processed_logprobs", None),
        ((200, "{}"), "processed_logprobs", "does not load rltok's processors(.|\n)*--logits-processors rltok"),
        ((400, "model not found"), "processed_logprobs", "answered 400: model not found"),
        ((404, "no such page"), "processed_logprobs", "answered 404: no such page"),
        ((400, "rltok_decoding is no JSON"), "raw_logprobs", "returns raw_logprobs(.|\n)*--logprobs-mode processed"),
    ],
)
def test_server_is_probed(server, answer, mode, words):
    server.answers["/v1/completions"] = answer
    client = SimpleNamespace(
        session=requests.Session(),
        base_url=f"http://127.0.0.1:{server.server_port}",
        model="org/model",
        get_server_info=lambda: {"model_config": {"logprobs_mode": mode}},
    )
    generation = SimpleNamespace(vllm_client=client, mode="server")
    if words is None:
        probe_server(generation)
    else:
        with pytest.raises(ConfigError, match=words) as error:
            probe_server(generation)
        assert "vllm serve org/model --logits-processors rltok.sampling.vllm_processor:VLLMDecoding" in str(error.value)
    assert server.bodies == [{"model": "org/model", "prompt": [0], "max_tokens": 1, "vllm_xargs": {KEY: "probe"}}]
