"""Decoding processors inside vLLM: one class for both of its model runners.

    colocated     LLM(logits_processors=["rltok.sampling.vllm_processor:VLLMDecoding"])
    server        vllm serve MODEL --logits-processors rltok.sampling.vllm_processor:VLLMDecoding

It does nothing until a request carries `rltok_decoding` (`rltok.sampling.serial`) in `extra_args`, over HTTP in
`vllm_xargs`. The engine's own temperature and truncation come after it, so processors see raw logits as in `generate`;
with `logprobs_mode="processed_logprobs"` the returned log-probabilities are those of the distribution that was sampled.

The runners have interfaces of the same name: V1 constructs with (config, device, is_pin_memory), V2, from vLLM 0.31 on,
with (config, request states). Imported by an engine only; the rest of rltok never imports this module.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from vllm.v1.sample.logits_processor import LogitsProcessor as V1LogitsProcessor

from rltok.sampling.serial import decode
from rltok.sampling.vllm_rows import BatchRows, SlotRows, decoding_text

try:
    from vllm.v1.worker.gpu.sample.logits_processor import LogitsProcessor as V2LogitsProcessor
except ImportError:  # vLLM < 0.31 has the V1 interface only
    BASES: tuple[type, ...] = (V1LogitsProcessor,)
else:
    BASES = (V1LogitsProcessor, V2LogitsProcessor)

Interfaces: Any = type("Interfaces", BASES, {"__doc__": "Every processor interface of this vLLM."})


class VLLMDecoding(Interfaces):
    """Runs the processors that a request names, for all rows of a step together."""

    def __init__(self, vllm_config: Any, *arguments: Any) -> None:
        if vllm_config.speculative_config is not None:
            raise ValueError("rltok's decoding does not run with speculative decoding: remove speculative_config")
        self._batch: BatchRows | None = None
        self._slots: SlotRows | None = None
        if len(arguments) == 2:
            self._batch = BatchRows(vllm_config.scheduler_config.max_num_seqs, torch.device(arguments[0]))
        else:
            (states,) = arguments
            self._slots = SlotRows(states)

    @classmethod
    def validate_params(cls, sampling_params: Any) -> None:
        """Refuse a request whose `rltok_decoding` cannot run; ValueError becomes HTTP 400."""
        text = decoding_text(sampling_params)
        if text is not None:
            if not isinstance(text, str):
                decode(text)
            _check(text, sampling_params.temperature)

    def is_argmax_invariant(self) -> bool:
        """False: run before the temperature, and for greedy requests too."""
        return False

    def update_state(self, batch_update: Any) -> None:
        """V1: follow the batch."""
        assert self._batch is not None
        if batch_update is not None:
            self._batch.update(batch_update.removed, batch_update.added, batch_update.moved)

    def add_request(self, req_idx: int, sampling_params: Any) -> bool:
        """V2: a request enters a slot; True if its logits are changed."""
        assert self._slots is not None
        return self._slots.add(req_idx, sampling_params)

    def apply_staged_writes(self) -> None:
        """V2: the request buffers are complete."""
        assert self._slots is not None
        self._slots.flush()

    def apply(self, logits: Tensor, ctx: Any = None) -> Tensor:
        """(B, V) float32 logits -> (B, V); V2 passes the step's layout."""
        if self._batch is not None:
            return self._batch.apply(logits)
        assert self._slots is not None
        return self._slots.apply(logits, ctx)


@lru_cache(maxsize=32)  # the rows of a batch say the same
def _check(text: str, temperature: float) -> None:
    for processor in decode(text):
        base = processor.settings().get("base", temperature)
        if base != temperature and not processor.is_neutral:
            raise ValueError(
                f"{type(processor).__name__} was built for temperature={base} but the request has {temperature}"
            )
