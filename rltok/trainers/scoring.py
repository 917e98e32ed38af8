"""Log-probabilities and entropies at kept positions only, through TRL's own head.

TRL's head gives a log-probability for every completion token, and on a CPU computes all positions of the sequence.
Inside `kept_positions` the same head sees only the hidden states of the positions that count:

    known before the forward pass    keep is a mask: one head pass over the kept positions
    found in the forward pass        keep is a function of the entropies: a head without gradient over all valid
                                     positions, then the head with gradient over the kept ones (two-stage)

The body of the model runs once either way. Nothing of the head is written again here: TRL's forward is called on a
stand-in for the model whose body returns the hidden states at hand, so that soft-capping, logit scales, sharded heads
and temperature stay TRL's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import copy
from types import MethodType, SimpleNamespace
from typing import Any

import torch
from torch import Tensor

Choice = Callable[[Tensor], Tensor]
"""(B, T) entropies of the current policy, nats, 0 where not valid -> (B, T) bool of positions to keep"""

PER_TOKEN = ("log_probs", "entropy", "log_sum_sq_probs", "mean_logits", "is_top1")


class KeptPositions:
    """The positions that the last scoring pass inside `kept_positions` computed."""

    mask: Tensor
    """(B, T) bool"""


@contextmanager
def kept_positions(model: Any, keep: Tensor | Choice, width: int) -> Iterator[KeptPositions]:
    """While open, `model(..., labels=labels, fused_lm_head=True)` scores kept positions only; the others read 0.

    Args:
        model: the causal LM that TRL gave its fused head (inside PEFT and data-parallel wrappers).
        keep: (B, T) mask over the last T positions of the labels, or a choice by entropy. A position is scored if it is
            kept and its label is not -100.
        width: T.

    Raises:
        TypeError: the model's forward is not TRL's fused one.
    """
    original = model.forward
    if not _is_fused(original):
        raise TypeError(f"{type(model).__name__} has no fused head; kept_positions needs a model TRL has prepared")
    kept = KeptPositions()
    had_own = "forward" in vars(model)

    def forward(self: Any, *args: Any, fused_lm_head: bool = False, labels: Any = None, **kwargs: Any) -> Any:
        if not fused_lm_head or labels is None:
            return original(*args, fused_lm_head=fused_lm_head, labels=labels, **kwargs)
        body = self.base_model(*args, **{"use_cache": False, **kwargs})
        hidden, targets = body.last_hidden_state[:, :-1], labels[:, 1:].to(body.last_hidden_state.device)
        valid = targets != -100

        def head(hidden: Tensor, at: Tensor, **options: Any) -> Any:
            """TRL's head on the positions `at`, spread back over (B, L - 1)."""
            shown = copy(body)
            shown.last_hidden_state = hidden[at][None]
            stand_in = SimpleNamespace(
                base_model=lambda *_, **__: shown, get_output_embeddings=self.get_output_embeddings
            )
            output = original.__func__(stand_in, fused_lm_head=True, shift_labels=targets[at][None], **options)
            for name in PER_TOKEN:
                value = getattr(output, name)
                if value is not None:
                    setattr(output, name, value.new_zeros(at.shape).masked_scatter(at, value))
            output.label_mask = at
            return output

        if isinstance(keep, Tensor):
            kept.mask = keep.bool()
        else:
            with torch.no_grad():
                entropy = head(hidden.detach(), valid, output_router_logits=False).entropy
            kept.mask = keep(entropy[:, -width:]).bool()
        at = valid.clone()
        at[:, :-width] = False
        at[:, -width:] &= kept.mask
        return head(hidden, at, **{k: v for k, v in kwargs.items() if k in ("output_router_logits", "attention_mask")})

    model.forward = MethodType(forward, model)
    try:
        yield kept
    finally:
        if had_own:
            model.forward = original
        else:
            del model.forward


def _is_fused(forward: Any) -> bool:
    """True for TRL's fused forward, also inside the wrappers of mixed precision."""
    function = getattr(forward, "__func__", None)
    while function is not None:
        code = getattr(function, "__code__", None)
        if code is not None and "fused_lm_head" in code.co_varnames:
            return True
        function = getattr(function, "__wrapped__", None)
    return False
