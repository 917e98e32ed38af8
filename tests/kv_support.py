"""Builders for the tests of cache policies: sharp random models, ragged prompts, greedy decoding in two engines."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from rltok.fast import LoopSettings, generate_rows
from rltok.kv import KVPolicy, PolicyCache, watched_attention

NEW = 24
"""tokens that are generated"""
HEADS, KEY_HEADS, LAYERS = 4, 2, 3
"""of `build` as it comes"""


def build(kind: str, **changes: Any) -> Any:
    """A random model, `qwen3` or `llama`."""
    sizes: dict[str, Any] = {
        "vocab_size": 97,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KEY_HEADS,
        "head_dim": 16,
        "max_position_embeddings": 512,
        "attn_implementation": "sdpa",
    }
    torch.manual_seed(1)
    if kind == "qwen3":
        return sharpened(Qwen3ForCausalLM(Qwen3Config(**sizes | changes)))
    return sharpened(LlamaForCausalLM(LlamaConfig(**sizes | changes)))


def sharpened(model: Any) -> Any:
    """The model with weights so large that attention prefers some tokens, in evaluation mode."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(6)
    return model.eval()


def random_prompts(lengths: Sequence[int]) -> list[list[int]]:
    """Rows of these lengths."""
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(5, 97, (length,), generator=generator).tolist() for length in lengths]


def padded(rows: list[list[int]], extra: int = 0) -> dict[str, Tensor]:
    """`input_ids` and `attention_mask` of rows padded on the left, by `extra` columns more than they need."""
    width = max(map(len, rows)) + extra
    return {
        "input_ids": torch.tensor([[0] * (width - len(row)) + row for row in rows]),
        "attention_mask": torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows]),
    }


def greedy(model: Any, rows: list[list[int]], extra: int = 0, **options: Any) -> tuple[list[list[int]], Tensor]:
    """Generated ids, and (rows, NEW, V) logits, of transformers' `generate`."""
    given = padded(rows, extra)
    output = model.generate(
        **given,
        max_new_tokens=NEW,
        do_sample=False,
        pad_token_id=0,
        eos_token_id=None,
        return_dict_in_generate=True,
        output_logits=True,
        **options,
    )
    return output.sequences[:, given["input_ids"].size(1) :].tolist(), torch.stack(output.logits, 1)


def in_loop(model: Any, policy: KVPolicy, rows: list[list[int]], **options: Any) -> Any:
    """The same in the loop `fast`, prompts computed in parts; `options` of its settings."""
    given: dict[str, Any] = {"max_new_tokens": NEW, "end_ids": (), "temperature": 0.0, "prefill_chunk": 20}
    with watched_attention(model):
        return generate_rows(
            model, rows, None, LoopSettings(**given | options), cache=partial(PolicyCache, policy=policy)
        )


@contextmanager
def replaced(name: str, attention: Callable[..., Any]) -> Iterator[None]:
    """Another attention function under a name."""
    before = ALL_ATTENTION_FUNCTIONS[name]
    ALL_ATTENTION_FUNCTIONS[name] = attention
    try:
        yield
    finally:
        del ALL_ATTENTION_FUNCTIONS[name]
        assert ALL_ATTENTION_FUNCTIONS[name] is before
