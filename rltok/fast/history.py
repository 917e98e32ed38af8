"""What depends on a row's earlier ids, prompt included: stop strings and the repetition penalty, as in transformers.

Each keeps one column of the loop's state, a tensor with one entry per row that moves with the row, and exists only
where its setting asks for it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import StopStringCriteria

from rltok.fast.settings import LoopSettings

NO_TOKEN = torch.iinfo(torch.int64).max
"""stands before the first token of a text: transformers' criterion takes ids behind the vocabulary for no token"""


class StopStrings:
    """Ends a row with the token that completes one of the strings, wherever in the token it ends.

    transformers' own criterion on the newest ids, as many as a string can span. As there, the prompt's last tokens may
    begin the string, and a row may end so before `min_new_tokens`.
    """

    def __init__(self, settings: LoopSettings, tokenizer: Any) -> None:
        self._criterion = StopStringCriteria(tokenizer, list(settings.stop_strings))
        self._width = self._criterion.maximum_token_len

    def fresh(self, prompts: Sequence[Sequence[int]], device: torch.device, vocabulary: int) -> Tensor:
        """(n, K) newest ids of rows that have generated nothing."""
        tails = [list(prompt[-self._width :]) for prompt in prompts]
        filled = [[NO_TOKEN] * (self._width - len(tail)) + tail for tail in tails]
        return torch.tensor(filled, dtype=torch.long, device=device).view(-1, self._width)

    def enter(self, tails: Tensor, tokens: Tensor) -> Tensor:
        """(B, K) ids, (B,) tokens that follow -> (B, K)."""
        return torch.cat([tails[:, 1:], tokens[:, None]], dim=1)

    def matched(self, tails: Tensor) -> Tensor:
        """(B, K) -> (B,) bool, True where the newest token completes a string."""
        return self._criterion(tails, None)


class RepetitionPenalty:
    """Makes ids that are in the row, prompt included, less likely: z / p where z > 0, else z p; 1 is off.

    Padding is never counted; transformers 5.23 counts the pad token of padded rows only where it is given no attention
    mask, 5.17 always. Source: arXiv 1909.05858.
    """

    def __init__(self, settings: LoopSettings) -> None:
        self._penalty = settings.repetition_penalty

    def fresh(self, prompts: Sequence[Sequence[int]], device: torch.device, vocabulary: int) -> Tensor:
        """(n, V) bool, True at the ids of each prompt."""
        present = torch.zeros(len(prompts), vocabulary, dtype=torch.bool, device=device)
        for row, prompt in zip(present, prompts, strict=True):
            row[torch.tensor(list(prompt), device=device)] = True
        return present

    def enter(self, present: Tensor, tokens: Tensor) -> Tensor:
        """(B, V) ids so far, (B,) tokens that follow -> (B, V), in place."""
        return present.scatter_(1, tokens[:, None], True)

    def apply(self, scores: Tensor, present: Tensor) -> Tensor:
        """(B, V) logits -> (B, V) logits."""
        penalised = torch.where(scores < 0, scores * self._penalty, scores / self._penalty)
        return torch.where(present, penalised, scores)
