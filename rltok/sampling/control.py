"""Put processors into a model's own `generate` for the length of a `with` block, and leave no trace.

Order in generate: penalties and bans of the generation config, then ours (biases first, temperature last), then
temperature, top-k, top-p, min-p of the config, then the recorder. Only plain sampling is supported; a mode that would
skip or repeat processors is refused when generate starts.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol, runtime_checkable

from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList
from transformers.generation.configuration_utils import GenerationMode

from rltok.entropy import EntropyStats

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from rltok.sampling.recorder import SampledLogps

HOOK = "_get_logits_processor"


class GenerationSettings(Protocol):
    """What a processor may read of transformers' GenerationConfig when a call starts."""

    temperature: float | None
    do_sample: bool | None


class RolloutProcessor(LogitsProcessor):
    """A logits processor that is told when a `generate` call starts, so that no call inherits another's state."""

    def begin(self, prompt_length: int, settings: GenerationSettings) -> None:
        """Called before the first step.

        Args:
            prompt_length: columns of `input_ids` before the first generated token, left padding included.
            settings: the generation config in force.
        """

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """(B, S) ids so far, (B, V) scores -> (B, V) scores."""
        raise NotImplementedError

    def metrics(self, lengths: Sequence[int] | None = None) -> dict[str, float]:
        """Numbers of the last call, for the log; `lengths` are the completions' lengths."""
        return {}


@dataclass(frozen=True)
class DecodingContext:
    """What a decoding module may use to make its processor; a module names what it needs in `needs`."""

    temperature: float = 1.0
    """T_b that generate divides by"""
    entropy_stats: EntropyStats | None = None
    """log-entropy statistics of the previous generation batch; None before the first"""
    tokenizer: PreTrainedTokenizerBase | None = None
    """to turn words into token ids"""


@runtime_checkable
class DecodingModule(Protocol):
    """Settings of one decoding method: an entry of `rltok.sampling.DECODING`."""

    needs: ClassVar[tuple[str, ...]]
    """fields of `DecodingContext`, beside the temperature, that the trainer must fill"""
    stage: ClassVar[Literal["logits", "temperature"]]
    """`logits` changes logits at temperature 1, `temperature` scales them and comes after"""

    @property
    def is_neutral(self) -> bool:
        """True if it can never change a sample."""
        ...

    def processor(self, context: DecodingContext) -> LogitsProcessor | None:
        """The processor of one generate call, None where it changes nothing."""
        ...


def make_processors(modules: Sequence[DecodingModule], context: DecodingContext) -> list[LogitsProcessor]:
    """Processors of one generate call in the order they must run: given order, temperatures last."""
    ordered = sorted(modules, key=lambda module: module.stage == "temperature")
    made = (module.processor(context) for module in ordered if not module.is_neutral)
    return [processor for processor in made if processor is not None]


def generation_model(model: Any) -> Any:
    """The model whose `generate` runs: the inner one of a PEFT model, else `model` itself."""
    unwrap = getattr(model, "get_base_model", None)
    return model if unwrap is None else unwrap()


@contextmanager
def sampling_control(
    model: Any, processors: Sequence[LogitsProcessor] = (), recorder: SampledLogps | None = None
) -> Iterator[None]:
    """Run `model.generate` with extra processors and a recorder; the model is as before afterwards, also on errors.

    Args:
        model: a transformers model, or a PEFT model around one; not wrapped for data parallelism.
        processors: in the order they run (see `make_processors`).
        recorder: emptied here, filled by one generate call, read with `finish` inside or after the block.

    Raises:
        ValueError: nested use; and from `generate` inside the block, for beams, assisted or contrastive decoding,
            continuous batching, or a recorder without sampling.
    """
    model = generation_model(model)
    if HOOK in vars(model):
        raise ValueError("sampling_control is already active on this model: pass all processors to one block")
    if recorder is not None:
        recorder.reset()
    original = getattr(model, HOOK)
    signature = inspect.signature(original)

    def with_ours(*args: Any, **kwargs: Any) -> LogitsProcessorList:
        arguments = signature.bind(*args, **kwargs).arguments
        settings, prompt_length = arguments["generation_config"], arguments.get("input_ids_seq_length")
        if prompt_length is None:
            raise ValueError(
                "continuous batching gives processors no history: set use_transformers_continuous_batching=False"
            )
        _refuse_other_modes(settings)
        for processor in [*processors, *([] if recorder is None else [recorder])]:
            if isinstance(processor, RolloutProcessor):
                processor.begin(prompt_length, settings)
        # As a user's own processors: after the config's penalties, before its temperature.
        arguments["logits_processor"] = [*(arguments.get("logits_processor") or ()), *processors]
        prepared = original(**arguments)
        if recorder is not None:
            prepared.append(recorder)
        return prepared

    setattr(model, HOOK, with_ours)
    try:
        yield
    finally:
        delattr(model, HOOK)


def _refuse_other_modes(settings: Any) -> None:
    mode = settings.get_generation_mode()
    if mode not in (GenerationMode.SAMPLE, GenerationMode.GREEDY_SEARCH):
        raise ValueError(
            f"sampling control supports plain sampling only, but generate is in mode {mode.value!r}: set num_beams=1 "
            f"(now {settings.num_beams}), prompt_lookup_num_tokens=None and penalty_alpha=None, pass no assistant_model"
        )
