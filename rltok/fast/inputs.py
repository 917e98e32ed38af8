"""What the loop is given: prompts without padding, one key for each."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from rltok.fast.settings import LoopSettings


def unpad(input_ids: Tensor, attention_mask: Tensor) -> list[list[int]]:
    """Left-padded ids as lists without their padding; waits for the device once.

    Args:
        input_ids: (B, S).
        attention_mask: (B, S), not 0 where a token is.

    Raises:
        ValueError: other shapes, or a row whose tokens do not fill its right end without a gap.
    """
    if input_ids.dim() != 2 or input_ids.shape != attention_mask.shape:
        raise ValueError(
            f"input_ids have shape {tuple(input_ids.shape)}, attention_mask {tuple(attention_mask.shape)}: both must "
            "be (rows, columns)"
        )
    present = attention_mask.to(input_ids.device) != 0
    broken = (present[:, 1:] < present[:, :-1]).any(dim=1)
    columns = input_ids.size(1)
    rows = []
    facts = zip(input_ids.tolist(), present.sum(dim=1).tolist(), broken.tolist(), strict=True)
    for row, (ids, length, is_broken) in enumerate(facts):
        if is_broken:
            raise ValueError(
                f"row {row} of attention_mask has padding behind a token: its {length} tokens must be the last ones; "
                "pad on the left (padding_side='left')"
            )
        rows.append(ids[columns - length :])
    return rows


def check_inputs(
    prompts: Sequence[Sequence[int]], keys: Sequence[int] | None, settings: LoopSettings, tokenizer: Any
) -> None:
    """Raise ValueError for inputs that cannot be completed."""
    empty = [index for index, prompt in enumerate(prompts) if len(prompt) == 0]
    if empty:
        raise ValueError(
            f"prompts {empty[:8]} are empty: the loop needs at least one token, such as the first of a text"
        )
    if keys is None and settings.do_sample:
        raise ValueError(f"keys=None but temperature={settings.temperature} samples: pass one row_key for each prompt")
    if keys is not None and len(keys) != len(prompts):
        raise ValueError(f"{len(keys)} keys for {len(prompts)} prompts: pass one row_key for each")
    if settings.stop_strings and tokenizer is None:
        raise ValueError(
            f"stop_strings={list(settings.stop_strings)} are found in the text of tokens: pass the model's tokenizer "
            "to generate_rows, or set no stop_strings"
        )
