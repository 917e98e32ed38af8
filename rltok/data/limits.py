"""Whether the prompts can be asked at all: rows, chat template, padding and length, before anything is generated."""

from __future__ import annotations

import logging
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from datasets import Dataset

from rltok.config import ConfigError
from rltok.data.config import DataConfig
from rltok.data.load import DataSplits

logger = logging.getLogger(__name__)

SLACK = 8
"""Tokens per message that a tokenizer may put around the text (spaces, marks), more than any does."""


@dataclass(frozen=True)
class _Limit:
    """The longest prompt of a split, in tokens."""

    tokens: int
    setting: str
    """the setting that decides"""
    why: str


def check_prompts(
    splits: DataSplits,
    config: DataConfig,
    tokenizer: Any,
    model_config: Any,
    *,
    completion: int | None,
    evaluation: int | None = None,
    chat_template_kwargs: Mapping[str, Any] | None = None,
) -> DataSplits:
    """The rows that fit the model, in their order: all of them, unless `data.long_prompts` says to drop the others.

    Only prompts that could be too long by their number of bytes are tokenized.

    Args:
        splits: from `load_data`.
        tokenizer: of the policy.
        model_config: the model's own configuration; its `max_position_embeddings` limits prompt and completion.
        completion: `training.max_completion_length`.
        evaluation: tokens per held-out completion; None: the held-out rows are not evaluated, nor checked.
        chat_template_kwargs: `training.chat_template_kwargs`.

    Raises:
        ConfigError: no row, no padding token, no chat template for conversations, or a prompt that is too long; with
            the value, the limit and the setting to change.
    """
    if len(splits.train) == 0:
        raise _error("data", "there is no row to train on")
    if evaluation is not None and len(splits.heldout) == 0:
        raise _error(
            "data.heldout_size",
            "no row is held out, but the recipe evaluates; hold some out (data.heldout_size or "
            "data.heldout_fraction), or set evaluation.before=false and evaluation.after=false",
        )
    _check_tokenizer(tokenizer, splits.train[0]["prompt"])
    template = dict(chat_template_kwargs or {})

    def tokenize(prompt: Any) -> list[int]:
        if isinstance(prompt, str):
            return tokenizer(prompt)["input_ids"]
        text = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, tokenize=False, **template)
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    positions = getattr(model_config.get_text_config(), "max_position_embeddings", None)
    train_limit = _limit(config, positions, completion or 0, "training.max_completion_length")
    train = _fit(splits.train, train_limit, config, tokenize, "training")
    heldout = splits.heldout
    if evaluation is not None:
        heldout_limit = _limit(config, positions, evaluation, "evaluation.max_new_tokens")
        heldout = _fit(heldout, heldout_limit, config, tokenize, "held-out")
    return DataSplits(train, heldout)


def _check_tokenizer(tokenizer: Any, prompt: Any) -> None:
    if tokenizer.pad_token_id is None:
        raise _error(
            "model.path",
            "its tokenizer has neither a padding nor an end-of-sequence token, one of which must fill up shorter rows; "
            "set pad_token in its tokenizer_config.json",
        )
    if not isinstance(prompt, str) and tokenizer.chat_template is None:
        raise _error(
            "data.conversational",
            "true makes prompts of messages, but the tokenizer of model.path has no chat template; set "
            "data.conversational=false for plain text, or take a model whose tokenizer has one",
        )


def _limit(config: DataConfig, positions: int | None, completion: int, setting: str) -> _Limit | None:
    own = config.max_prompt_tokens
    room = None if positions is None else positions - completion
    if room is not None and room < 1:
        raise _error(
            setting,
            f"{completion} leaves no room for a prompt in the model's {positions} positions "
            f"(max_position_embeddings); lower {setting}",
        )
    if room is not None and (own is None or room < own):
        why = f"the model's {positions} positions (max_position_embeddings) less {setting}={completion}"
        return _Limit(room, setting, why)
    return None if own is None else _Limit(own, "data.max_prompt_tokens", f"data.max_prompt_tokens={own}")


def _fit(
    rows: Dataset, limit: _Limit | None, config: DataConfig, tokenize: Callable[[Any], list[int]], kind: str
) -> Any:
    """The rows whose prompt is not longer than the limit."""
    if limit is None:
        return rows
    lengths = _long_ones(rows["prompt"], limit.tokens, tokenize)
    if not lengths:
        return rows
    worst = max(lengths, key=lengths.__getitem__)
    found = (
        f"{len(lengths)} of {len(rows)} {kind} rows have more prompt tokens than {limit.tokens}, which is {limit.why}; "
        f"row {worst} has {lengths[worst]}"
    )
    verb = "Raise" if limit.setting == "data.max_prompt_tokens" else "Lower"
    change = f"{verb} {limit.setting}"
    if config.long_prompts == "refuse":
        raise _error(limit.setting, f"{found}. {change}, or set data.long_prompts=drop to leave such rows out")
    if len(lengths) == len(rows):
        raise _error("data.long_prompts", f"'drop' leaves no {kind} row: {found}. {change}")
    logger.warning("data.long_prompts=drop: %s; they are left out", found)
    return rows.select([i for i in range(len(rows)) if i not in lengths])


def _long_ones(prompts: Sequence[Any], limit: int, tokenize: Callable[[Any], list[int]]) -> dict[int, int]:
    """Row -> tokens of its prompt, of the rows above the limit."""
    around: dict[tuple[str, ...], int] = {}
    found = {}
    for i, prompt in enumerate(prompts):
        messages = [{"role": "", "content": prompt}] if isinstance(prompt, str) else prompt
        roles = tuple(str(message["role"]) for message in messages)
        if roles not in around:
            around[roles] = len(tokenize(_emptied(prompt)))
        # no token is shorter than a byte of the text that the tokenizer normalises
        if around[roles] + sum(_bytes(str(message["content"])) + SLACK for message in messages) <= limit:
            continue
        length = len(tokenize(prompt))
        if length > limit:
            found[i] = length
    return found


def _emptied(prompt: Any) -> Any:
    return "" if isinstance(prompt, str) else [{**message, "content": ""} for message in prompt]


def _bytes(text: str) -> int:
    return max(len(text.encode()), len(unicodedata.normalize("NFKC", text).encode()))


def _error(setting: str, message: str) -> ConfigError:
    return ConfigError(f"{setting}: {message}", setting)
