"""Token sequences that a quantiser is calibrated on and judged by: chosen, padded, and their losses."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from rltok.attention.probe import evaluating
from rltok.quant.quantize import CalibrationBatch, calibration_batches
from rltok.quant.rotation import known_decoder

HEAD_POSITIONS = 1024
"""positions whose logits exist at once while losses are computed"""


class TokenSequence(NamedTuple):
    """What a model reads at once."""

    ids: list[int]
    start: int = 1
    """first token whose loss counts: of a completion, or the second of a text"""
    credit: list[float] | None = None
    """of every token, for importance by credit"""


class SequenceLosses(NamedTuple):
    """Next-token losses of N sequences."""

    nats: Tensor
    """(N,) float64 sums over the tokens that count"""
    tokens: Tensor
    """(N,) float64 how many those are"""

    @property
    def mean(self) -> float:
        """Nats per token over all sequences; its exponential is the perplexity.

        Raises:
            ValueError: no token counts.
        """
        if not float(self.tokens.sum()):
            raise ValueError("no token's loss counts: every sequence ends before its completion; raise length")
        return float(self.nats.sum() / self.tokens.sum())


def cut(ids: Sequence[int], length: int, opening: Sequence[int] = ()) -> list[TokenSequence]:
    """A text in consecutive sequences of at most `length` tokens; a last one of a single token is left out.

    Args:
        ids: tokens of the text, without `opening`.
        length: at least 2 above the opening's.
        opening: tokens in front of every sequence, such as <s>.

    Raises:
        ValueError: a length that leaves no room.
    """
    step = length - len(opening)
    if step < 2:
        raise ValueError(f"length={length}; allowed: >= {len(opening) + 2} (a sequence opens with {len(opening)})")
    parts = [[*opening, *ids[start : start + step]] for start in range(0, len(ids), step)]
    return [TokenSequence(part, max(1, len(opening))) for part in parts if len(part) > max(1, len(opening))]


def choose(sequences: Sequence[TokenSequence], count: int, seed: int) -> list[TokenSequence]:
    """`count` of the sequences by lot, in their order; all of them where there are no more."""
    if len(sequences) <= count:
        return list(sequences)
    return [sequences[i] for i in sorted(random.Random(seed).sample(range(len(sequences)), count))]


def padded(sequences: Sequence[TokenSequence], pad_id: int) -> tuple[Tensor, Tensor]:
    """(B, T) ids padded on the right, and (B, T) mask, 1 at real tokens."""
    width = max(len(one.ids) for one in sequences)
    ids = torch.full((len(sequences), width), pad_id)
    mask = torch.zeros_like(ids)
    for row, one in enumerate(sequences):
        ids[row, : len(one.ids)] = torch.tensor(one.ids)
        mask[row, : len(one.ids)] = 1
    return ids, mask


def calibration(
    sequences: Sequence[TokenSequence], pad_id: int, *, batch_size: int = 8, expansion: int = 1
) -> list[CalibrationBatch]:
    """Batches of similarly long sequences for `rltok.quant.quantize.quantize_model`.

    Args:
        sequences: their credit is passed on if all of them have some.
        pad_id: stands behind shorter ones.
        batch_size: sequences per batch, after the expansion.
        expansion: 1, or times that a sequence is used, rolled.

    Raises:
        ValueError: no sequences, or sizes out of range.
    """
    if not sequences:
        raise ValueError("there is nothing to calibrate on; give at least one sequence")
    if batch_size < 1:
        raise ValueError(f"batch_size={batch_size}; allowed: >= 1")
    ordered = sorted(sequences, key=lambda one: len(one.ids))
    size = max(1, batch_size // max(1, expansion))
    batches = []
    for start in range(0, len(ordered), size):
        part = ordered[start : start + size]
        ids, mask = padded(part, pad_id)
        credit = _padded_credit(part, ids.size(1))
        batches += calibration_batches(ids, mask, credit, batch_size=batch_size, expansion=expansion)
    return batches


def sequence_losses(
    model: torch.nn.Module, sequences: Sequence[TokenSequence], pad_id: int, batch_size: int = 8
) -> SequenceLosses:
    """Next-token losses of the sequences, teacher-forced; the model's mode is as before afterwards.

    Args:
        model: a causal language model of `rltok.quant.rotation.KNOWN_MODELS`.
        sequences: losses count from their `start` on.
        pad_id: stands behind shorter ones.
        batch_size: sequences per pass.

    Returns:
        Sums and counts in the order of the sequences.
    """
    core = known_decoder(model)
    order = sorted(range(len(sequences)), key=lambda i: len(sequences[i].ids))
    nats, tokens = torch.zeros(len(order), dtype=torch.float64), torch.zeros(len(order), dtype=torch.float64)
    with torch.no_grad(), evaluating(core):
        for first in range(0, len(order), batch_size):
            places = order[first : first + batch_size]
            part = [sequences[i] for i in places]
            ids, mask = (values.to(core.device) for values in padded(part, pad_id))
            hidden = core.model(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
            counted = mask[:, 1:].bool()
            for row, one in enumerate(part):
                counted[row, : max(0, one.start - 1)] = False
            rows = counted.nonzero()[:, 0].cpu()
            found = _losses(core, hidden[:, :-1][counted], ids[:, 1:][counted])
            nats[torch.tensor(places)] = torch.zeros(len(part), dtype=torch.float64).index_add_(0, rows, found)
            tokens[torch.tensor(places)] = counted.sum(1).double().cpu()
    return SequenceLosses(nats, tokens)


def _losses(core: Any, hidden: Tensor, targets: Tensor) -> Tensor:
    """(K,) float64 losses of K positions, from their hidden states."""
    parts = []
    for start in range(0, len(targets), HEAD_POSITIONS):
        place = slice(start, start + HEAD_POSITIONS)
        logits = core.lm_head(hidden[place])
        wide = logits if logits.dtype == torch.float64 else logits.float()
        parts.append(cross_entropy(wide, targets[place], reduction="none").double().cpu())
    return torch.cat(parts) if parts else torch.zeros(0, dtype=torch.float64)


def _padded_credit(sequences: Sequence[TokenSequence], width: int) -> Tensor | None:
    credit = torch.zeros(len(sequences), width)
    for row, one in enumerate(sequences):
        if one.credit is None:
            return None
        credit[row, : len(one.ids)] = torch.tensor(one.credit)
    return credit
