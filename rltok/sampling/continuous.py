"""Processors and recorded log-probabilities under transformers' continuous batching (`model.generate_batch`).

There a processor sees the newest id of each row and its logits, no history, and rows come, move and go at every step.
Two kinds of `RolloutProcessor` still fit:

    memory "none"                 `apply` on the (rows, V) scores of the step
    memory "ids" and a `WordBias`  its columns live on the host, one row per request; what reaches the device is one
                                   number per row and step, `delta`, as the 32 bits that the engine carries per request

    n = position_offset - (_true_initial_tokens or len(initial_tokens))        tokens generated, of a request's state

which also holds after a request was evicted and starts again with its completion as part of the prompt.

Left out: memory "logits" (no way to replay the logits of earlier steps), and memory "ids" that changes scores by more
than one number per row. With memory, asynchronous batching is off: it hands out ids one token late.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import (
    EpsilonLogitsWarper,
    EtaLogitsWarper,
    InfNanRemoveLogitsProcessor,
    LogitNormalization,
    LogitsProcessorList,
    MinPLogitsWarper,
    SuppressTokensLogitsProcessor,
    TemperatureLogitsWarper,
    TopHLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    TypicalLogitsWarper,
)
from transformers.generation.configuration_utils import ContinuousBatchingConfig
from transformers.generation.continuous_batching.cb_logits_processors import ContinuousBatchingLogitsProcessor

from rltok.sampling.control import HOOK, generation_model, refuse_other_modes
from rltok.sampling.processor import Columns, RolloutProcessor, Rows
from rltok.sampling.word_bias import WordBias

HOOKS = (HOOK, "init_continuous_batching", "generate_batch")
CACHED_MANAGER = "_cached_continuous_batching_manager"
WARMUP = "__warmup_"
"""How the ids of requests begin that only exercise the engine."""
INSTEAD = "set training.use_transformers_continuous_batching=false"

STATELESS = (
    EpsilonLogitsWarper,
    EtaLogitsWarper,
    InfNanRemoveLogitsProcessor,
    LogitNormalization,
    MinPLogitsWarper,
    SuppressTokensLogitsProcessor,
    TemperatureLogitsWarper,
    TopHLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    TypicalLogitsWarper,
)
"""transformers' processors that never look at ids, so that they mean the same here; others are dropped or crash."""

NEUTRAL: dict[str, tuple[Any, ...]] = {
    "repetition_penalty": (1.0,),
    "encoder_repetition_penalty": (1.0,),
    "guidance_scale": (1.0,),
    "no_repeat_ngram_size": (0,),
    "encoder_no_repeat_ngram_size": (0,),
    "min_length": (0,),
    "min_new_tokens": (0,),
    "bad_words_ids": (),
    "sequence_bias": (),
    "begin_suppress_tokens": (),
    "forced_bos_token_id": (),
    "forced_eos_token_id": (),
    "exponential_decay_length_penalty": (),
    "watermarking_config": (),
}
"""Settings that need a row's history -> values beside None that switch them off; here they would be lost silently."""


def supports_continuous_batching(processor: object) -> bool:
    """Whether `continuous_control` can run a processor: neutral, without memory, or one bias per row and step."""
    if not isinstance(processor, RolloutProcessor):
        return False
    if processor.is_neutral or processor.memory == "none":
        return True
    # With an `apply` of its own it needs more than `delta` on the device.
    return processor.memory == "ids" and isinstance(processor, WordBias) and type(processor).apply is WordBias.apply


def unsupported(processors: Sequence[object]) -> list[str]:
    """Class names of the processors that `continuous_control` refuses."""
    return [type(processor).__name__ for processor in processors if not supports_continuous_batching(processor)]


class ContinuousRecord:
    """log mu(a_t) in nats of one `generate_batch` call; `finish` hands it out and makes room for the next."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Forget everything recorded."""
        self._outputs: list[tuple[list[int], list[float]]] | None = None  # per completion: ids, log-probabilities

    def begin(self, do_sample: bool | None) -> None:
        """Start a call; refuses what it could not record."""
        if self._outputs is not None:
            raise ValueError("the record still holds an earlier generate_batch call: read it with finish() first")
        if not do_sample:
            raise ValueError("do_sample=False samples nothing to record: set do_sample=True or record_logps='never'")

    def keep(self, outputs: Sequence[Any]) -> None:
        """Take ids and log-probabilities of the outputs, in their order."""
        self._outputs = [(list(output.generated_tokens), list(output.logprobs)) for output in outputs]
        for row, (ids, logps) in enumerate(self._outputs):
            if len(ids) != len(logps):
                raise RuntimeError(f"completion {row} has {len(ids)} tokens but {len(logps)} log-probabilities")

    def finish(self, completion_ids: Sequence[Sequence[int]]) -> list[list[float]]:
        """Log-probabilities of the completions, and forget the call.

        Args:
            completion_ids: in the order of `generate_batch`: that of its inputs, and with num_return_sequences > 1 the
                completions of an input side by side; the generated tokens, or as many of the first as are wanted. TRL
                sends one input per completion and keeps the outputs as they come, end token included.

        Returns:
            Per completion one log-probability in nats for each token.

        Raises:
            ValueError: nothing was recorded, or the completions are not the ones that were sampled.
        """
        if self._outputs is None:
            raise ValueError("nothing was recorded: generate_batch did not run inside continuous_control(record=True)")
        lengths = [len(ids) for ids in completion_ids]
        steps = max((len(ids) for ids, _ in self._outputs), default=0)
        if len(lengths) != len(self._outputs) or max(lengths, default=0) > steps:
            raise ValueError(
                f"recorded {len(self._outputs)} rows of up to {steps} tokens, got {len(lengths)} completions of up to "
                f"{max(lengths, default=0)} tokens"
            )
        for row, (ids, (drawn, _)) in enumerate(zip(completion_ids, self._outputs, strict=True)):
            if drawn[: len(ids)] != list(ids):
                raise ValueError(f"completion {row} is not the sequence that was sampled in row {row}")
        logps = [values[:length] for (_, values), length in zip(self._outputs, lengths, strict=True)]
        self.reset()
        return logps


@contextmanager
def continuous_control(
    model: Any, processors: Sequence[RolloutProcessor] = (), record: bool = False
) -> Iterator[ContinuousRecord]:
    """Run `model.generate_batch` with extra processors; the model is as before afterwards, also on errors.

    Neutral processors are left out, so the sampler is then the plain one, bit for bit. The values that a processor
    traces are handed to it after the call, in the order of the completions and 0 after their end.

    Args:
        model: a transformers model, or a PEFT model around one; not wrapped for data parallelism.
        processors: in the order they run (see `make_processors`): before temperature, top-k and top-p of the config.
        record: keep the log-probability of every sampled token for `ContinuousRecord.finish`. One call of
            `generate_batch` at a time; without it any number.

    Raises:
        ValueError: nested use, or a processor that needs another engine; and from `generate_batch` inside the block,
            for settings that the engine would drop, greedy decoding with `record`, a manager that outlives the call,
            or asynchronous batching asked for together with a processor that remembers ids.
        RuntimeError: from `generate_batch`, where the engine would return incomplete results.
    """
    model = generation_model(model)
    if any(name in vars(model) for name in HOOKS):
        raise ValueError("a sampling control is already active on this model: pass all processors to one block")
    refused = unsupported(processors)
    if refused:
        raise ValueError(
            f"{', '.join(refused)} cannot run under continuous batching, which gives processors neither a row's "
            f"history nor its earlier logits: {INSTEAD} (transformers generate)"
        )
    kept = ContinuousRecord()
    control = _Control(model, processors, kept if record else None)
    attention = model.config._attn_implementation
    for name, hook in zip(HOOKS, (control.prepare, control.start, control.generate), strict=True):
        setattr(model, name, hook)
    try:
        yield kept
    finally:
        for name in HOOKS:
            delattr(model, name)
        if model.config._attn_implementation != attention:  # an engine that fails while it starts leaves its own
            model.set_attn_implementation(attention)


class _Control:
    """The three methods that stand in for the model's own while a block is active."""

    def __init__(self, model: Any, processors: Sequence[RolloutProcessor], record: ContinuousRecord | None) -> None:
        self.model, self.processors, self.record = model, processors, record
        self._prepare, self._start, self._generate = (getattr(model, name) for name in HOOKS)
        self._adapters: list[_Adapter] = []
        self._shape = (0, 0)  # requests and tokens of the call, for the traces

    def prepare(self, *args: Any, **kwargs: Any) -> LogitsProcessorList:
        """`_get_logits_processor`: the config's penalties, ours, the config's temperature and truncation."""
        arguments = inspect.signature(self._prepare).bind(*args, **kwargs).arguments
        if arguments.get("input_ids_seq_length") is not None:
            raise ValueError("continuous_control is for generate_batch: use sampling_control around generate")
        # As a user's own processors: after the config's penalties, before its temperature.
        arguments["logits_processor"] = LogitsProcessorList(self._adapters)
        return self._prepare(**arguments)

    def start(self, *args: Any, **kwargs: Any) -> Any:
        """`init_continuous_batching`: refuse what would go wrong, then make the engine with room for our numbers."""
        arguments = inspect.signature(self._start).bind(*args, **kwargs).arguments
        settings = arguments.get("generation_config") or self.model.generation_config
        refuse_other_modes(settings)
        _refuse_lost_settings(settings)
        if getattr(self.model, CACHED_MANAGER, None) is not None:
            raise ValueError(
                "the model holds an engine from persistent_manager=True, which was made without these processors: "
                "call destroy_cached_continuous_batching_manager() first"
            )
        if self.record is not None:
            self.record.begin(settings.do_sample)
        for processor in self.processors:
            processor.begin(0, settings)  # no common prompt length; positions come from the requests
            processor.take_trace({})
        self._adapters = self._adapt()
        _refuse_unknown(self.prepare(settings), self._adapters)
        arguments["continuous_batching_config"] = self._config(arguments.get("continuous_batching_config"), settings)
        manager = self._start(**arguments)
        manager.logit_processor.tensors_required += len(self._adapters)  # a line of numbers for each
        return manager

    def generate(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """`generate_batch`: the same outputs; keeps their log-probabilities and the traced values."""
        arguments = inspect.signature(self._generate).bind(*args, **kwargs).arguments
        if arguments.get("persistent_manager"):
            raise ValueError("persistent_manager=True would keep the processors beyond their block: leave it False")
        settings = arguments.get("generation_config") or self.model.generation_config
        limit = arguments.get("kwargs", {}).get("max_new_tokens")
        limit = settings.max_new_tokens if limit is None else limit
        expected = len(arguments["inputs"]) * (settings.num_return_sequences or 1)
        self._shape = (expected, limit or 0)
        results = self._generate(*args, **kwargs)
        self._shape = (0, 0)
        outputs = list(results.values())
        _check_outputs(outputs, expected)
        if self.record is not None:
            self.record.keep(outputs)
        for adapter in self._adapters:
            adapter.hand_over(outputs)
        return results

    def _adapt(self) -> list[_Adapter]:
        ledger, device = _Ledger(*self._shape), self.model.device
        active = (processor for processor in self.processors if not processor.is_neutral)
        return [(_Memoryless if p.memory == "none" else _Bias)(p, ledger, device) for p in active]

    def _config(self, config: ContinuousBatchingConfig | None, settings: Any) -> ContinuousBatchingConfig:
        """A copy of the config in force, with log-probabilities on and asynchronous batching off where needed."""
        if config is None:
            config = getattr(settings, "continuous_batching_config", None) or ContinuousBatchingConfig()
        config = copy.copy(config)
        config.return_logprobs |= self.record is not None
        remembers = [type(adapter.processor).__name__ for adapter in self._adapters if isinstance(adapter, _Bias)]
        if remembers:
            if config.use_async_batching:
                raise ValueError(
                    f"use_async_batching=True shows {', '.join(remembers)} the generated ids one token late: set "
                    "use_async_batching=false in training.transformers_continuous_batching_config"
                )
            config.use_async_batching = False
        return config


@dataclass(frozen=True)
class _Step:
    """The requests of one step that get a token, B of them."""

    rows: Tensor
    """(B,) int64 row of each request in host memory"""
    position: Tensor
    """(B,) int64 tokens generated so far"""
    last: Tensor
    """(B,) int64 newest token; of the prompt where position is 0"""
    slots: Tensor
    """(B,) int64 where values of this step are traced; 0 is thrown away"""
    fresh: list[list[int]]
    """per request the generated tokens that no earlier step saw"""
    late: str | None
    """id of a request whose newest token is not known on the host yet"""


class _Ledger:
    """Which row belongs to which request, and how far each one is. Row 0 belongs to nobody."""

    def __init__(self, requests: int, steps: int) -> None:
        self.requests, self.steps = requests, steps
        self._rows: dict[str, int] = {}
        self._seen: list[int] = [0]
        self._newest: tuple[Any, _Step] | None = None

    @property
    def size(self) -> int:
        """Rows in use, with row 0."""
        return len(self._seen)

    def row(self, request_id: str) -> int:
        """The row of a request."""
        if request_id.startswith(WARMUP):
            return 0
        if request_id not in self._rows:
            self._rows[request_id] = len(self._seen)
            self._seen.append(0)
        return self._rows[request_id]

    def step(self, requests: list[Any]) -> _Step:
        """What a step is about; the engine asks once per processor with the same list."""
        if self._newest is None or self._newest[0] is not requests:
            self._newest = (requests, self._read(requests))
        return self._newest[1]

    def _read(self, requests: list[Any]) -> _Step:
        rows, positions, last, slots = [], [], [], []
        fresh: list[list[int]] = []
        late = None
        for request in requests:
            state = request.state
            prompt = state._true_initial_tokens or len(state.initial_tokens)
            row, position = self.row(state.request_id), state.position_offset - prompt
            tokens: list[int] = []
            if row:
                known = len(state.initial_tokens) - prompt + len(state.generated_tokens)
                if known != position:
                    late = state.request_id
                tokens = _last_tokens(state, known - self._seen[row])
                self._seen[row] = known
            rows.append(row)
            positions.append(position)
            last.append((state.generated_tokens or state.initial_tokens)[-1])
            slots.append(self._slot(row, position))
            fresh.append(tokens)
        numbers = torch.tensor([rows, positions, last, slots], dtype=torch.long)  # (4, B)
        return _Step(numbers[0], numbers[1], numbers[2], numbers[3], fresh, late)

    def _slot(self, row: int, position: int) -> int:
        inside = 1 <= row <= self.requests and position < self.steps
        return 1 + (row - 1) * self.steps + position if inside else 0


def _last_tokens(state: Any, count: int) -> list[int]:
    """The newest `count` generated tokens of a request, also those that an eviction made part of its prompt."""
    if count <= 0:
        return []
    if count <= len(state.generated_tokens):
        return state.generated_tokens[-count:]
    return (state.initial_tokens + state.generated_tokens)[-count:]


class _Adapter(ContinuousBatchingLogitsProcessor):
    """A `RolloutProcessor` as the engine wants it: 32 bits per request from the host, then the scores of a step."""

    supported_kwargs: dict[str, type] = {}
    ignored_kwargs: tuple[str, ...] = ()

    def __init__(self, processor: RolloutProcessor, ledger: _Ledger, device: torch.device) -> None:
        self.processor, self.ledger = processor, ledger
        size = 1 + ledger.requests * ledger.steps
        self.traces = {name: torch.zeros(size, device=device) for name in processor.traced}
        if isinstance(processor, WordBias):
            processor.index(device)  # in place before a graph is captured

    def fill_defaults(self, int32_tensor: Tensor) -> None:
        """No bias, and the slot that is thrown away."""
        int32_tensor.zero_()

    def trace(self, slots: Tensor, columns: Columns) -> None:
        """Keep this step's traced values; no branch and no transfer, so that a captured graph may replay it."""
        for name, values in self.traces.items():
            values[slots] = columns[name].to(values.dtype)

    def hand_over(self, outputs: Sequence[Any]) -> None:
        """Give the processor what was traced, rows in the order of the outputs."""
        steps = max((len(output.generated_tokens) for output in outputs), default=0)
        if not steps or not self.ledger.steps:  # without a limit of new tokens there was nowhere to trace
            return
        order = torch.tensor([self.ledger.row(output.request_id) - 1 for output in outputs])
        shape = (self.ledger.requests, self.ledger.steps)
        self.processor.take_trace(
            {name: values[1:].view(shape)[order.to(values.device), :steps] for name, values in self.traces.items()}
        )


class _Memoryless(_Adapter):
    """Runs `apply` on the rows as they come; the number of a request is the slot of its trace."""

    def __init__(self, processor: RolloutProcessor, ledger: _Ledger, device: torch.device) -> None:
        super().__init__(processor, ledger, device)
        self._widest = 0

    def prepare_tensor_args(self, requests_with_new_token: list[Any]) -> Tensor:
        """(rows,) int32 slots. Numbers of rows that are not in use now must not point at a trace: they become 0."""
        slots = self.ledger.step(requests_with_new_token).slots
        self._widest = max(self._widest, slots.numel())
        padded = torch.zeros(self._widest, dtype=torch.int32)
        padded[: slots.numel()] = slots
        return padded

    def __call__(self, scores: Tensor, tensor_arg: Tensor) -> Tensor:
        """(rows, V) scores, (rows,) int32 slots -> (rows, V) scores."""
        nowhere = torch.zeros(scores.size(0), dtype=torch.long, device=scores.device)
        columns: Columns = {}
        scores = self.processor.apply(scores, Rows(nowhere, nowhere, 0), columns)
        self.trace(tensor_arg[: scores.size(0)].long(), columns)
        return scores


class _Bias(_Adapter):
    """Keeps the columns of a `WordBias` on the host; the number of a request is the float32 bits of its delta."""

    processor: WordBias

    def __init__(self, processor: RolloutProcessor, ledger: _Ledger, device: torch.device) -> None:
        super().__init__(processor, ledger, device)
        host = torch.device("cpu")
        self.traces = {name: values.to(host) for name, values in self.traces.items()}
        self._capacity = 1 + ledger.requests
        self._columns = processor.columns(self._capacity, host)

    def prepare_tensor_args(self, requests_with_new_token: list[Any]) -> Tensor:
        """(B,) int32, the bits of each request's bias at this step."""
        step = self.ledger.step(requests_with_new_token)
        if step.late is not None:
            raise RuntimeError(
                f"request {step.late} is a token further than the host knows, so {type(self.processor).__name__} "
                "would be late: set use_async_batching=false in training.transformers_continuous_batching_config"
            )
        self._grow()
        self._observe(step)
        rows = Rows(step.position, step.last, int(step.position.max()) if step.position.numel() else 0)
        columns = {name: values[step.rows] for name, values in self._columns.items()}
        delta = self.processor.delta(rows, columns).float()
        self.trace(step.slots, columns | {"bias": delta})
        return delta.view(torch.int32)

    def __call__(self, scores: Tensor, tensor_arg: Tensor) -> Tensor:
        """(rows, V) scores, (rows,) int32 bits of the biases -> (rows, V) scores."""
        delta = tensor_arg[: scores.size(0)].view(torch.float32)
        return self.processor.add(scores, delta)

    def _observe(self, step: _Step) -> None:
        """Enter the fresh tokens, one of each request at a time."""
        lengths = torch.tensor([len(tokens) for tokens in step.fresh], dtype=torch.long)
        for turn in range(int(lengths.max()) if lengths.numel() else 0):
            having = (lengths > turn).nonzero().squeeze(1)
            position = step.position[having] - lengths[having] + turn + 1
            last = torch.tensor([step.fresh[index][turn] for index in having.tolist()])
            index = step.rows[having]
            columns = {name: values[index] for name, values in self._columns.items()}
            self.processor.observe(Rows(position, last, int(position.max())), columns)
            for name, values in self._columns.items():
                values[index] = columns[name]

    def _grow(self) -> None:
        """Make room for requests that nobody announced."""
        missing = self.ledger.size - self._capacity
        if missing > 0:
            fresh = self.processor.columns(max(missing, self._capacity), torch.device("cpu"))
            self._columns = {name: torch.cat([values, fresh[name]]) for name, values in self._columns.items()}
            self._capacity += max(missing, self._capacity)


def _refuse_lost_settings(settings: Any) -> None:
    for name, neutral in NEUTRAL.items():
        value = getattr(settings, name, None)
        if value is not None and value not in neutral:
            raise ValueError(
                f"{name}={value!r} needs a row's history, and continuous batching would leave it out: remove it, or "
                f"{INSTEAD}"
            )


def _refuse_unknown(prepared: Sequence[Any], ours: Sequence[_Adapter]) -> None:
    unknown = [type(p).__name__ for p in prepared if p not in ours and type(p) not in STATELESS]
    if unknown:
        raise ValueError(
            f"{', '.join(unknown)} of the generation config may not mean the same under continuous batching: remove "
            f"the setting, or {INSTEAD}"
        )


def _check_outputs(outputs: Sequence[Any], expected: int) -> None:
    """The engine returns what it has when it fails; that must not pass for a result."""
    errors = [output.error for output in outputs if output.error is not None]
    if errors or len(outputs) != expected or not all(output.is_finished() for output in outputs):
        reason = errors[0] if errors else "see the log of transformers"
        raise RuntimeError(
            f"continuous batching finished {len(outputs) - len(errors)} of {expected} completions: {reason}"
        )
