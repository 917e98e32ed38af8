"""The log-probability of every sampled token under the distribution that drew it.

Last in the list of processors, the recorder sees the row after temperature, truncation and all else. Which token was
drawn is known only at the next call, so it keeps one (B, V) row; what it gathers is one number per token. The scores
pass through untouched, so recording changes no sample.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from rltok.sampling.processor import GenerationSettings, RolloutProcessor
from rltok.sampling.temperature import row_blocks


class SampledLogps(RolloutProcessor):
    """Records log mu(a_t) in nats during one `generate` call; `finish` hands it out and makes room for the next.

    Greedy decoding draws nothing and is refused; `greedy="record"` records it under the processed distribution at
    temperature 1, the one whose mode was taken.
    """

    def __init__(self, greedy: Literal["refuse", "record"] = "refuse") -> None:
        if greedy not in ("refuse", "record"):
            raise ValueError(f"greedy={greedy!r} is unknown; allowed: 'refuse', 'record'")
        self.greedy = greedy
        self.reset()

    def reset(self) -> None:
        """Forget everything recorded."""
        self._logps: list[Tensor] = []  # (B,) per resolved step
        self._row: Tensor | None = None  # (B, V) scores whose token is not known yet
        self._ids: Tensor | None = None  # (B, S) ids that led to `_row`
        self._prompt_length = 0

    def begin(self, prompt_length: int, settings: GenerationSettings) -> None:
        """Start a generate call; refuses what it could not record."""
        if self._row is not None:
            raise ValueError("the recorder still holds an earlier generate call: read it with finish() first")
        if not settings.do_sample and self.greedy == "refuse":
            raise ValueError("do_sample=False samples nothing to record: set do_sample=True or record_logps='never'")

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Resolve the previous row with the token that was drawn from it, keep this one; returns `scores` itself."""
        if self._row is not None and self._ids is not None:
            if input_ids.shape != (self._ids.size(0), self._ids.size(1) + 1):
                raise ValueError(
                    f"ids went from {tuple(self._ids.shape)} to {tuple(input_ids.shape)}, not one token further: "
                    "recording needs plain sampling (no assistant_model, num_beams=1, no continuous batching)"
                )
            self._logps.append(_gather(self._row, input_ids[:, -1]))
        else:
            self._prompt_length = input_ids.size(1)
        self._row, self._ids = scores, input_ids
        return scores

    def finish(self, completion_ids: Sequence[Sequence[int]]) -> list[list[float]]:
        """Log-probabilities of the completions, and forget the call.

        Args:
            completion_ids: per row the generated tokens up to and including the end token; whatever was generated
                after (padding) is left out.

        Returns:
            Per row one log-probability in nats for each token.

        Raises:
            ValueError: nothing was recorded, or the completions are not the ones that were sampled.
        """
        if self._row is None or self._ids is None:
            raise ValueError("nothing was recorded: generate did not run inside sampling_control with this recorder")
        steps, rows = len(self._logps) + 1, self._row.size(0)
        lengths = [len(ids) for ids in completion_ids]
        if len(lengths) != rows or max(lengths, default=0) > steps:
            raise ValueError(
                f"recorded {rows} rows of {steps} tokens, got {len(lengths)} completions of up to "
                f"{max(lengths, default=0)} tokens"
            )
        last = torch.tensor([ids[steps - 1] if len(ids) == steps else 0 for ids in completion_ids])
        last = last.to(self._ids.device)
        logps = torch.stack([*self._logps, _gather(self._row, last)], dim=1)  # (B, steps)
        sampled = torch.cat([self._ids[:, self._prompt_length :], last[:, None]], dim=1).tolist()
        for row, (ids, drawn) in enumerate(zip(completion_ids, sampled, strict=True)):
            if drawn[: len(ids)] != list(ids):
                raise ValueError(f"completion {row} is not the sequence that was sampled in row {row}")
        self.reset()
        return [values[:length] for values, length in zip(logps.tolist(), lengths, strict=True)]


def _gather(row: Tensor, tokens: Tensor) -> Tensor:
    """(B, V) scores, (B,) tokens -> (B,) float32 log-probabilities."""
    blocks = row_blocks(row)
    workspace = torch.empty_like(blocks[0], dtype=torch.float32)
    parts = []
    for block, drawn in zip(blocks, tokens.split(blocks[0].size(0)), strict=True):
        logps = torch.log_softmax(block, dim=-1, dtype=torch.float32, out=workspace[: block.size(0)])
        parts.append(logps.gather(1, drawn[:, None]))
    return torch.cat(parts).squeeze(1)
