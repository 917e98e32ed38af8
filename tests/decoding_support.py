"""Builders for the tests of decoding methods: tokenizers of whole words, and two ways to run a processor."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from rltok.sampling import RolloutProcessor, Rows

WORDS = [
    "<pad>",
    "<eos>",
    "</think>",
    "<think>",
    "wait",
    "Wait",
    "\u0120wait",
    "but",
    "But",
    "Alternatively",
    *"abcdef",
]
PAD, EOS, END, START, LOWER_WAIT, WAIT = range(6)
A, B, C, D = (WORDS.index(letter) for letter in "abcd")
VOCAB = len(WORDS)


def word_tokenizer(words: Sequence[str] = WORDS) -> PreTrainedTokenizerFast:
    """One token per word of the list, words between spaces."""
    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<pad>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", eos_token="<eos>", padding_side="left")


def random_rows(rows: int, steps: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """(B, T) ids and (B, T, V) float64 logits."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(1, VOCAB, (rows, steps), generator=generator)
    return ids, torch.randn(rows, steps, VOCAB, generator=generator, dtype=torch.float64)


def step_by_step(processor: RolloutProcessor, ids: Tensor, logits: Tensor, prompt: Tensor | None = None) -> Tensor:
    """Call a processor as `generate` does: (B, T) ids, (B, T, V) logits -> (B, T, V) outputs."""
    prompt = torch.full((ids.size(0), 2), PAD) if prompt is None else prompt
    outputs = [processor(torch.cat([prompt, ids[:, :t]], 1), logits[:, t]) for t in range(ids.size(1))]
    return torch.stack(outputs, dim=1)


def as_an_engine(
    processor: RolloutProcessor, ids: Tensor, logits: Tensor, joins: Sequence[int], seed: int | None = 0
) -> Tensor:
    """Run rows that join at different steps, are moved between steps and leave when they are done.

    Args:
        joins: step at which each row joins.
        seed: of the order of rows, drawn anew at every step; None keeps them in place.
    """
    generator = None if seed is None else torch.Generator().manual_seed(seed)
    steps, outputs, present = ids.size(1), torch.empty_like(logits), []
    columns = processor.columns(0, ids.device)
    for step in range(max(joins) + steps):
        keep = [i for i, row in enumerate(present) if step - joins[row] < steps]
        order = [keep[i] for i in torch.randperm(len(keep), generator=generator)] if generator else keep
        present = [present[i] for i in order]
        columns = {name: values[torch.tensor(order, dtype=torch.long)] for name, values in columns.items()}
        if present:
            processor.observe(_rows(present, step, joins, ids), columns)
        new = [row for row, first in enumerate(joins) if first == step]
        fresh = processor.columns(len(new), ids.device)
        columns = {name: torch.cat([columns[name], values]) for name, values in fresh.items()}
        present += new
        rows = _rows(present, step, joins, ids)
        scores = logits[torch.tensor(present), rows.position].clone()
        outputs[torch.tensor(present), rows.position] = processor.apply(scores, rows, columns)
        assert all(values.shape == (len(present),) for values in columns.values())
    return outputs


def _rows(present: Sequence[int], step: int, joins: Sequence[int], ids: Tensor) -> Rows:
    position = torch.tensor([step - joins[row] for row in present])
    last = ids[torch.tensor(present), (position - 1).clamp(min=0)]
    return Rows(position, last, int(position.max()))
