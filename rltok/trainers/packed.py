"""Scoring without padding: several rows of prompt and completion in one, none of which sees another.

`_get_per_token_logps_and_entropies`, the method of every pass that scores (updates, old policy, reference), gives the
same (B, T) as TRL's. With `batching.pack` its rows are packed by best fit decreasing; the model is told where a sample
begins by position ids that restart at 0, without an attention mask and without a cache, which TRL's head leaves out.
Each of the three is needed: with a mask of ones, or with a cache, transformers lets the samples of a row see each
other. That they do not is checked once per model, before its first packed pass.

With `batching.balance` the passes that score a whole rollout group its rows by length; their number stays TRL's.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rltok.batching import (
    BatchingConfig,
    pack_rows,
    pack_tokens,
    packed_positions,
    packed_width,
    plan_micro_batches,
    unpack,
)
from rltok.config import ConfigError
from rltok.fast.serve import MOVING_ROPE, evaluation_mode, forward_arguments, rope_types
from rltok.trainers.door_trainer import DoorTrainer

FLASH = ("flash_attention_2", "flash_attention_3")
"""attention implementations that read restarting positions in a single row only"""
ISOLATING = ("sdpa", "eager", *FLASH)
"""attention implementations that keep the samples of a packed row apart"""
ATTENTION_LAYERS = {"full_attention", "sliding_attention", "chunked_attention"}
"""layer types of a config that look at other positions through a mask"""
LEAK = 0.05
"""largest effect of another sample, as a share of the effect of a sample's own first token"""

Scores = tuple[Tensor, Tensor | None, Tensor | None]
"""(B, T) log-probabilities, (B, T) entropies, 0-d auxiliary loss"""


class PackedScoring(DoorTrainer):
    """`_get_per_token_logps_and_entropies` for `batching`; without it TRL's."""

    _batching: BatchingConfig
    _isolated: tuple[int, ...] = ()
    """ids of the models that were seen to keep samples apart"""

    def _get_per_token_logps_and_entropies(
        self,
        model: Any,
        input_ids: Tensor,
        attention_mask: Tensor,
        logits_to_keep: int,
        batch_size: int | None = None,
        compute_entropy: bool = False,
        compute_aux_loss: bool = False,
        **images: Any,
    ) -> Any:
        rows = input_ids.size(0)
        passes = -(-rows // (batch_size or rows))
        pack, several = self._batching.pack, self._batching.balance and passes > 1
        options = {"compute_entropy": compute_entropy, "compute_aux_loss": compute_aux_loss}
        has_images = any(value is not None for value in images.values())
        if pack and has_images:
            raise ValueError("batching.pack does not support images; set it to false")
        if not (pack or several) or has_images:
            return super()._get_per_token_logps_and_entropies(
                model, input_ids, attention_mask, logits_to_keep, batch_size=batch_size, **options, **images
            )
        if pack and id(model) not in self._isolated:
            with self.accelerator.autocast():
                check_isolation(model, self._causal_lm.config.get_text_config())
            self._isolated += (id(model),)
        if passes == 1:
            return self._score_packed(model, input_ids, attention_mask, logits_to_keep, compute_entropy)
        logps: list[Tensor] = []
        entropies: list[Tensor] = []
        order: list[int] = []
        for group in self._scoring_groups(attention_mask, logits_to_keep, passes):
            index = torch.tensor(group, device=input_ids.device)
            ids, mask, keep = _trimmed(input_ids[index], attention_mask[index], logits_to_keep, self._batching)
            if pack:
                found = self._score_packed(model, ids, mask, keep, compute_entropy)
            else:
                found = super()._get_per_token_logps_and_entropies(model, ids, mask, keep, **options)
            order += group
            logps.append(_widened(found[0], logits_to_keep))
            if found[1] is not None:
                entropies.append(_widened(found[1], logits_to_keep))
        back = torch.tensor(order, device=input_ids.device).argsort()
        return torch.cat(logps)[back], torch.cat(entropies)[back] if entropies else None, None

    def _scoring_groups(self, mask: Tensor, keep: int, passes: int) -> list[list[int]]:
        """Rows of each of the passes that score a rollout."""
        prompts, total = mask[:, :-keep].sum(1).tolist(), mask.sum(1).tolist()
        return plan_micro_batches(total, passes, heads=prompts, padded=not self._batching.pack)

    def _packed_rows(self, lengths: list[int]) -> tuple[list[list[int]], int]:
        """Rows no wider than the longest sample, or one row where those would exceed `max_tokens`; and their width.

        Without flash attention the cost of attention grows with the square of a row's width.
        """
        budget, multiple = self._batching.max_tokens, self._batching.multiple_of
        rows = pack_rows(lengths, max(*lengths, 1))
        width = packed_width(rows, lengths, multiple)
        flash = self._causal_lm.config.get_text_config()._attn_implementation in FLASH
        if flash or (budget is not None and len(rows) * width > budget >= sum(lengths)):
            rows = [list(range(len(lengths)))]
            width = packed_width(rows, lengths, multiple)
        return rows, max(2, width)

    def _score_packed(self, model: Any, ids: Tensor, mask: Tensor, keep: int, with_entropy: bool) -> Scores:
        """One forward pass over packed rows."""
        valid = mask.bool()
        lengths: list[int] = valid.sum(1).tolist()
        rows, width = self._packed_rows(lengths)
        columns = torch.arange(ids.size(1), device=ids.device)
        # (B, L) column of each sample's tokens, samples moved to the left; what lies behind them is not read
        source = torch.where(valid, columns, columns + ids.size(1)).argsort(1)[:, : max(lengths)]
        tokens = ids.gather(1, source)
        scored = (source >= ids.size(1) - keep) & (torch.arange(source.size(1), device=ids.device) > 0)
        pad_id = self._tokenizer.pad_token_id
        labels = pack_tokens(tokens.masked_fill(~scored, -100), rows, lengths, fill=-100, width=width)
        with self.accelerator.autocast():
            output = model(
                input_ids=pack_tokens(tokens, rows, lengths, fill=pad_id, width=width),
                position_ids=packed_positions(rows, lengths, width).to(ids.device),
                labels=labels,
                fused_lm_head=True,
            )
        # a token's score stands one place before it
        place = torch.full(ids.shape, source.size(1), device=ids.device)
        place.scatter_(1, source, torch.arange(source.size(1), device=ids.device).expand_as(source))

        def spread(values: Tensor) -> Tensor:
            own = unpack(torch.nn.functional.pad(values, (1, 0)), rows, lengths)
            found = torch.nn.functional.pad(own, (0, 1)).gather(1, place[:, -keep:])
            return found.masked_fill(~valid[:, -keep:], 0)

        return spread(output.log_probs), spread(output.entropy) if with_entropy else None, None


def _trimmed(ids: Tensor, mask: Tensor, keep: int, config: BatchingConfig) -> tuple[Tensor, Tensor, int]:
    """Rows without the padding at the left and right that none of them needs, and how many columns are kept."""
    columns = torch.arange(1, ids.size(1) + 1, device=ids.device) * mask.any(0)
    first = int(columns.masked_fill(columns == 0, ids.size(1)).min()) - 1
    prompt, completion = ids.size(1) - keep, int(columns.max()) - (ids.size(1) - keep)
    multiple = config.multiple_of
    left = min(prompt, -(-max(prompt - first, 1) // multiple) * multiple)
    right = min(keep, -(-max(completion, 1) // multiple) * multiple)
    part = slice(prompt - left, prompt + right)
    return ids[:, part], mask[:, part], right


def _widened(values: Tensor, width: int) -> Tensor:
    return torch.nn.functional.pad(values, (0, width - values.size(1)))


def check_packable(model: Any, aux_loss: bool) -> None:
    """Refuse models whose samples would see each other in a packed row.

    Args:
        model: the causal LM inside all wrappers.
        aux_loss: whether the load-balancing loss of a mixture of experts is trained.

    Raises:
        ConfigError: names the reason.
    """
    config = model.config.get_text_config()
    reason = None
    others = sorted(set(getattr(config, "layer_types", None) or ()) - ATTENTION_LAYERS)
    moving = sorted(rope_types(config) & MOVING_ROPE)
    if config is not model.config:
        reason = "takes more than text, whose positions it makes itself"
    elif config._attn_implementation not in ISOLATING:
        reason = (
            f"runs attn_implementation={config._attn_implementation!r}, which does not keep samples apart by their "
            f"positions (model.attn_implementation: {', '.join(ISOLATING)} do)"
        )
    elif getattr(model, "_is_stateful", False) or others:
        reason = f"has recurrent layers{f' {others}' if others else ''}, whose state passes from sample to sample"
    elif moving:
        reason = f"has {moving} rotary positions, whose frequencies change with the longest sample"
    elif "position_ids" not in forward_arguments(model):
        reason = "takes no position_ids in its forward"
    elif any(a.is_prompt_learning for a in getattr(model, "peft_config", {}).values()):
        reason = "has an adapter of virtual tokens, which come as a cache"
    elif aux_loss:
        reason = (
            "trains the load-balancing loss of its experts (router_aux_loss_coef), which would count the padding of "
            "packed rows; set it to 0"
        )
    if reason is not None:
        raise ConfigError(
            f"batching.pack=true: {config.model_type!r} {reason}. Set batching.pack=false.", "batching.pack"
        )


def check_isolation(model: Any, config: Any) -> None:
    """Run two short samples in one row, change one, and see that the other's log-probabilities stay.

    Args:
        model: with TRL's fused head, in all its wrappers; every rank calls this.
        config: of the text model.

    Raises:
        ConfigError: they change.
    """
    device = next(model.parameters()).device
    size = 4
    tokens = torch.arange(1, 2 * size + 1, device=device) % config.vocab_size
    other, first = tokens.clone(), tokens.clone()
    other[:size] = (tokens[:size] + size) % config.vocab_size  # the first sample is another one
    first[size] = (tokens[size] + 1) % config.vocab_size  # the second sample's own first token is
    labels = tokens.clone()
    labels[: size + 1] = -100
    found = []
    with torch.no_grad(), evaluation_mode(model):
        for ids in (tokens, other, first):
            positions = torch.arange(size, device=device).repeat(2)
            output = model(input_ids=ids[None], position_ids=positions[None], labels=labels[None], fused_lm_head=True)
            found.append(output.log_probs[0, size:].double())
    leak, own = ((value - found[0]).abs().max().item() for value in found[1:])
    if not leak <= LEAK * own:
        raise ConfigError(
            f"batching.pack=true: in {config.model_type!r} with attn_implementation={config._attn_implementation!r} "
            f"samples of a packed row see each other (log-probabilities move by {leak:.3g} nats with a neighbour, by "
            f"{own:.3g} with their own first token). Set batching.pack=false.",
            "batching.pack",
        )
