"""Completions of prompts outside of training: those of evaluation, commands and the calibration of temperatures.

fast          one call of the rollout loop for all prompts; the random numbers of a completion come from its
              (seed, prompt, sample), so neither batch size nor order nor the other rows change it
transformers  `generate` on one batch after another, all of them from one random state

Longer prompts come first. The caller's random states and the model's mode are as before afterwards.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor
from transformers import GenerationConfig, StoppingCriteria, StoppingCriteriaList, StopStringCriteria

from rltok.config import ConfigError
from rltok.entropy import EntropyStats
from rltok.fast import LoopMetrics, LoopProgress, LoopSettings, generate_rows, row_key, servable_model
from rltok.kv import KVPolicy, PolicyCache, attach, policy_cache
from rltok.kv.attach import base_model
from rltok.kv.attention import implementation
from rltok.quant import QuantizedShadow, RolloutQuantSpec
from rltok.sampling import (
    DECODING,
    DecodingContext,
    DecodingModule,
    RolloutProcessor,
    SampledLogps,
    make_processors,
    sampling_control,
)
from rltok.sampling.processor import run_order

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from rltok.steering import SteeringConfig

Engine = Literal["fast", "transformers"]
NamedProcessor = tuple[str, RolloutProcessor]
"""Name of a decoding method, and its processor."""
OnRows = Callable[[int, int], None]
"""Is told how many completions have ended and how many tokens were sampled since the last call."""


@dataclass(frozen=True)
class CompletionSettings:
    """How completions are made.

    Raises:
        ValueError: an unknown engine, or a batch of no completion.
    """

    max_new_tokens: int
    temperature: float = 1.0
    """0 decodes greedily"""
    top_p: float = 1.0
    top_k: int = 0
    """0 is no limit"""
    min_new_tokens: int = 0
    """tokens before the first of which no end token is sampled"""
    stop_strings: tuple[str, ...] = ()
    """texts that end a completion, of which they are part"""
    seed: int = 0
    """of the sampling; greedy decoding does not read it"""
    batch_size: int = 16
    """completions computed at once"""
    engine: Engine = "fast"
    """`fast` or `transformers`"""

    def __post_init__(self) -> None:
        if self.engine not in get_args(Engine):
            raise ValueError(f"engine={self.engine!r} is unknown; allowed: {', '.join(get_args(Engine))}")
        if self.batch_size < 1:
            raise ValueError(f"batch_size={self.batch_size} must be >= 1")


@dataclass(frozen=True)
class Completed:
    """Completions that were made together, and what their processors recorded."""

    indices: list[int]
    """of their prompts"""
    ids: list[list[int]]
    """each up to and with its end token"""
    logps: list[list[float]] | None
    """log-probability in nats of every token under what drew it (greedy: at temperature 1); None: not recorded"""
    processors: list[NamedProcessor]
    """rows of their traces are in the order of `indices`"""
    metrics: LoopMetrics | None
    """what they cost; None from transformers"""


def complete(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    settings: CompletionSettings,
    *,
    places: Sequence[tuple[int, int]] | None = None,
    processors: Callable[[], Sequence[NamedProcessor]] = list,
    record: bool = False,
    steering: SteeringConfig | None = None,
    kv: KVPolicy | None = None,
    quant: RolloutQuantSpec | None = None,
    autocast: torch.dtype | None = None,
    on_rows: OnRows | None = None,
) -> list[Completed]:
    """One completion of every prompt, in as many parts as the engine makes.

    Args:
        prompts: token ids, none of them empty.
        places: (prompt, sample) of every completion, numbers of the whole data set, from which the engine `fast` draws
            its random numbers; None: every prompt is another one.
        processors: makes the processors of a part, in the order they run; none is the plain model.
        record: keep log-probabilities.
        steering: vectors that are added to hidden states.
        kv: what the cache keeps of every row; None: all.
        quant: a copy with weights quantised so makes the completions, a new one in every call; None or `bits=16`: the
            model itself.
        autocast: compute in this dtype; None computes in the weights' dtype.
        on_rows: as completions end.

    Raises:
        ConfigError: a model that the engine, the cache policy or the quantiser does not serve.
        ValueError: settings out of their range.
    """
    check_engine(model, settings.engine, "engine='transformers'")
    check_policy(model, kv)
    if not prompts:
        return []
    if quant is not None and steering is not None and not steering.is_neutral:
        steering.load(model)  # compares its weights: those of a copy would be taken for another model's
    model = quantized_policy(model, quant)
    order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]), reverse=True)
    call = _Call(model, tokenizer, prompts, settings, record, kv, on_rows or (lambda ended, tokens: None))
    with isolated_rng(settings.seed), inference(model, steering, autocast):
        if settings.engine == "fast":
            where = [(index, 0) for index in range(len(prompts))] if places is None else places
            return [call.by_loop(order, [where[index] for index in order], list(processors()))]
        batches = [order[i : i + settings.batch_size] for i in range(0, len(order), settings.batch_size)]
        return [call.by_generate(batch, list(processors())) for batch in batches]


def completed_ids(parts: Sequence[Completed]) -> list[list[int]]:
    """Ids of all completions in the order of the prompts."""
    found = {index: ids for part in parts for index, ids in zip(part.indices, part.ids, strict=True)}
    return [found[index] for index in range(len(found))]


def check_engine(model: PreTrainedModel, engine: Engine, instead: str) -> None:
    """Refuse a model that an engine does not serve.

    Args:
        instead: the setting that names the other engine.

    Raises:
        ConfigError: names the model's type, what stands against it, and `instead`.
    """
    if engine != "fast":
        return
    try:
        servable_model(model)
    except ValueError as error:
        raise ConfigError(f"the engine fast cannot complete prompts with this model: {error} ({instead})") from error


def check_policy(model: PreTrainedModel, kv: KVPolicy | None, where: str = "kv") -> None:
    """Refuse a model that a cache policy does not serve.

    Raises:
        ConfigError: names the setting and what stands against it.
    """
    if kv is None:
        return
    base = base_model(model)
    try:
        implementation(base)
        PolicyCache(base.config, policy=kv)
    except ValueError as error:
        raise ConfigError(f"{where}: {error}", where) from None


def quantized_policy(model: PreTrainedModel, quant: RolloutQuantSpec | None, where: str = "quant") -> PreTrainedModel:
    """The model that makes completions: a quantised copy of the present weights, of LoRA the merged ones.

    None and `bits=16` give the model itself. The copy shares all other parameters with the model, which stays as it is.
    It lacks wrappers around the model's forward: call it inside `torch.autocast` where the model computes so.

    Args:
        where: the setting that asks for it.

    Raises:
        ConfigError: names `where` and what of the model the quantiser does not serve.
    """
    if quant is None or quant.bits == 16:
        return model
    from rltok.quant.qat import is_prepared

    if is_prepared(model):
        raise ConfigError(
            f"{where}: this model has fake quantisers of its own (quantization_aware) and is evaluated with them; "
            f"remove {where}",
            where,
        )
    try:
        copy: PreTrainedModel = QuantizedShadow(model, quant).module
    except ValueError as error:
        raise ConfigError(f"{where}: {error}", where) from None
    return copy


def quantizer_name(quant: RolloutQuantSpec | None) -> str | None:
    """How weights are quantised in a few words, such as `4 bits, groups of 32, torch`; None where they are not."""
    if quant is None or quant.bits == 16:
        return None
    groups = "one scale per row" if quant.group_size is None else f"groups of {quant.group_size}"
    return f"{quant.bits} bits, {groups}, {quant.backend}"


def end_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Every token that ends a completion, as the trainer counts them: the tokenizer's and the model's own."""
    declared = model.generation_config.eos_token_id
    own = [declared] if isinstance(declared, int) else list(declared or ())
    return list(dict.fromkeys(token for token in (tokenizer.eos_token_id, *own) if token is not None))


# Engines


@dataclass(frozen=True)
class _Call:
    """One call of `complete`."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    prompts: Sequence[Sequence[int]]
    settings: CompletionSettings
    record: bool
    kv: KVPolicy | None
    tell: OnRows

    def by_loop(
        self, chosen: list[int], places: Sequence[tuple[int, int]], processors: list[NamedProcessor]
    ) -> Completed:
        """Chosen prompts by the rollout loop."""
        seed, told = self.settings.seed, (0, 0)

        def progress(now: LoopProgress) -> None:
            nonlocal told
            self.tell(now.ended - told[0], now.tokens - told[1])
            told = (now.ended, now.tokens)

        with policy_cache(self.model, self.kv) as cache:
            found = generate_rows(
                self.model,
                [self.prompts[index] for index in chosen],
                [row_key(seed, 0, prompt, sample) for prompt, sample in places],
                self._loop_settings(),
                [processor for _, processor in processors],
                self.record,
                tokenizer=self.tokenizer,
                cache=cache,
                on_progress=progress,
            )
        return Completed(chosen, found.ids, found.logps, processors, found.metrics)

    def by_generate(self, chosen: list[int], processors: list[NamedProcessor]) -> Completed:
        """Chosen prompts by one call of transformers' generate."""
        ours = [processor for _, processor in processors]
        recorder = SampledLogps(greedy="record") if self.record else None
        control = sampling_control(self.model, ours, recorder) if ours or recorder is not None else nullcontext()
        with control, nullcontext() if self.kv is None else attach(self.model, self.kv):
            ids = self._generate([list(self.prompts[index]) for index in chosen])
        self.tell(len(ids), sum(map(len, ids)))
        return Completed(chosen, ids, None if recorder is None else recorder.finish(ids), processors, None)

    def _loop_settings(self) -> LoopSettings:
        settings = self.settings
        return LoopSettings(
            max_new_tokens=settings.max_new_tokens,
            end_ids=tuple(end_ids(self.model, self.tokenizer)),
            min_new_tokens=settings.min_new_tokens,
            temperature=settings.temperature,
            top_k=settings.top_k,
            top_p=settings.top_p,
            stop_strings=settings.stop_strings,
            max_rows=settings.batch_size,
        )

    def _generate(self, prompts: list[list[int]]) -> list[list[int]]:
        """Completions, each up to and with what ended it."""
        padded = self.tokenizer.pad({"input_ids": prompts}, padding=True, padding_side="left", return_tensors="pt")
        inputs = {key: padded[key].to(self.model.device) for key in ("input_ids", "attention_mask")}
        config = _generation_config(self.model, self.tokenizer, self.settings)
        stop = list(self.settings.stop_strings)
        stops = [_StoppedAt(StopStringCriteria(self.tokenizer, stop))] if stop else []
        output = self.model.generate(**inputs, generation_config=config, stopping_criteria=StoppingCriteriaList(stops))
        width = inputs["input_ids"].size(1)
        rows = output[:, width:].tolist()  # (batch, completion)
        lengths = [next((i for i, token in enumerate(row) if token in config.eos_token_id), len(row)) for row in rows]
        lengths = [length + 1 for length in lengths]
        for stopped in stops:
            lengths = [min(length, at - width) for length, at in zip(lengths, stopped.columns(), strict=True)]
        return [row[:length] for row, length in zip(rows, lengths, strict=True)]


def _generation_config(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, settings: CompletionSettings
) -> GenerationConfig:
    """Every field that a model's own generation_config may carry is set, so that none of them slips in."""
    samples = settings.temperature > 0
    return GenerationConfig(
        max_new_tokens=settings.max_new_tokens,
        min_new_tokens=settings.min_new_tokens or None,
        do_sample=samples,
        temperature=settings.temperature if samples else 1.0,
        top_p=settings.top_p if samples else 1.0,
        top_k=settings.top_k if samples else 50,
        repetition_penalty=1.0,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=end_ids(model, tokenizer),
        use_cache=True,
    )


class _StoppedAt(StoppingCriteria):
    """A stopping criterion that remembers where every row met it: `generate` fills what follows with padding."""

    def __init__(self, criterion: StoppingCriteria) -> None:
        self.criterion = criterion
        self._columns: Tensor | None = None

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        """(B, S) ids so far -> (B,) whether a row ends."""
        met = self.criterion(input_ids, scores, **kwargs)
        if self._columns is None:
            self._columns = torch.full_like(met, torch.iinfo(torch.long).max, dtype=torch.long)
        self._columns[met] = self._columns[met].clamp(max=input_ids.size(1))
        return met

    def columns(self) -> list[int]:
        """Columns of ids up to and with the token that met it; a number beyond all where none did."""
        assert self._columns is not None
        return self._columns.tolist()


# Decoding methods


def named_processors(decoding: Sequence[DecodingModule], context: DecodingContext) -> list[NamedProcessor]:
    """Processors of decoding methods in the order they run, with the methods' names."""
    return [(_name(module), made) for module in run_order(decoding) for made in make_processors([module], context)]


def _name(module: DecodingModule) -> str:
    return next((name for name, cls in DECODING.items() if cls is type(module)), type(module).__name__)


def decoding_context(
    decoding: Sequence[DecodingModule],
    tokenizer: PreTrainedTokenizerBase,
    temperature: float,
    entropy_stats: EntropyStats | None = None,
    eos_ids: Sequence[int] | None = None,
) -> DecodingContext:
    """What the processors of a call are made from; greedy decoding counts as temperature 1.

    `eos_ids` are all tokens that end a completion (`end_ids`); None: the tokenizer's.

    Raises:
        ValueError: a method needs statistics of the entropy, and there are none.
    """
    if temperature > 0 and entropy_stats is None and needs_entropy_stats(decoding):
        raise ValueError("the temperature adapts to statistics of the entropy: give entropy_stats (calibrate_entropy)")
    ends = None if eos_ids is None else tuple(eos_ids)
    return DecodingContext(temperature or 1.0, entropy_stats if temperature > 0 else None, tokenizer, ends)


def check_methods(decoding: Sequence[DecodingModule], engine: Engine) -> None:
    """Refuse decoding methods that an engine cannot run.

    Raises:
        ValueError: names the method, the engine, and those that can.
    """
    for module in decoding:
        if not module.is_neutral and engine not in module.engines:
            raise ValueError(
                f"{_name(module)} does not run on the engine {engine!r}; it runs on {', '.join(module.engines)}"
            )


def needs_entropy_stats(decoding: Sequence[DecodingModule]) -> bool:
    """True if an active method reads statistics of the entropy."""
    return any("entropy_stats" in module.needs for module in decoding if not module.is_neutral)


# Surroundings


@contextmanager
def isolated_rng(seed: int) -> Iterator[None]:
    """Seed Python, numpy and torch inside, restore their states afterwards."""
    python_state, numpy_state = random.getstate(), np.random.get_state()
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    with torch.random.fork_rng(devices=devices):
        random.seed(seed)
        np.random.seed(seed % 2**32)
        torch.manual_seed(seed)
        try:
            yield
        finally:
            random.setstate(python_state)
            np.random.set_state(numpy_state)


@contextmanager
def inference(
    model: PreTrainedModel, steering: SteeringConfig | None = None, autocast: torch.dtype | None = None
) -> Iterator[None]:
    """Evaluation mode without gradients, steered if that is asked for; the model is as before afterwards."""
    with _evaluating(model), _autocast(model, autocast), torch.no_grad(), _steered(model, steering):
        yield


def _steered(model: PreTrainedModel, steering: SteeringConfig | None) -> AbstractContextManager[Any]:
    return nullcontext() if steering is None or steering.is_neutral else steering.attach(model)


@contextmanager
def _evaluating(model: PreTrainedModel) -> Iterator[None]:
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


def _autocast(model: PreTrainedModel, dtype: torch.dtype | None) -> Any:
    return nullcontext() if dtype is None else torch.autocast(model.device.type, dtype)
