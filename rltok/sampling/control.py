"""Put processors into a model's own `generate` for the length of a `with` block, and leave no trace.

Order in generate: penalties and bans of the generation config, then ours (biases first, temperature last), then
temperature, top-k, top-p, min-p of the config, then the recorder. Only plain sampling is supported; a mode that would
skip or repeat processors is refused when generate starts.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from transformers import LogitsProcessor, LogitsProcessorList
from transformers.generation.configuration_utils import GenerationMode

from rltok.sampling.processor import RolloutProcessor

if TYPE_CHECKING:
    from rltok.sampling.recorder import SampledLogps

HOOK = "_get_logits_processor"


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
        refuse_other_modes(settings)
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


def refuse_other_modes(settings: Any) -> None:
    """Raise ValueError for modes of generate that would skip or repeat processors."""
    mode = settings.get_generation_mode()
    if mode not in (GenerationMode.SAMPLE, GenerationMode.GREEDY_SEARCH):
        raise ValueError(
            f"sampling control supports plain sampling only, but generate is in mode {mode.value!r}: set num_beams=1 "
            f"(now {settings.num_beams}), prompt_lookup_num_tokens=None and penalty_alpha=None, pass no assistant_model"
        )
