"""CompressKV: a few heads that retrieve meaning choose the tokens for their whole layer; budgets differ by layer.

    score = mean over chosen heads of average-pool(sum over the window of softmax(q k))

Heads and errors come from a table that `rltok profile compress_kv` makes once per model (`compress_profile`): heads by
`semantic_head_scores` on texts with a needle, budgets of any total by `allocate_layers` from the error that a small
cache makes in each layer. The paper cuts the prompt alone; cutting while tokens are generated (`interval`) is an
extension.

Source: arXiv 2508.02401 v1 and its code; the rewrite 2606.24467 changes the wording of results only.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from rltok.kv.attention import window_weights_by_head
from rltok.kv.policy import KVPolicy, LayerView, best_slots, newest
from rltok.kv.snap_kv import check_window, pooled_votes
from rltok.kv.tables import ModelFacts, read_compress_table

LOW = 32
"""tokens that every layer gets, as in the paper, unless the budget is smaller"""
HIGH = 3
"""largest budget of a layer, in budgets"""


@dataclass(frozen=True)
class CompressKV(KVPolicy):
    """One kept set per layer, chosen by the layer's retrieval heads; with all heads and equal budgets it is SnapKV
    averaged over heads."""

    interval: int | None = field(default=None, kw_only=True)
    """generated tokens of a row between two cuts; None, as in the paper: the prompt alone is cut"""
    heads: Mapping[int, Sequence[int]] = field(default_factory=dict)
    """layer -> query heads that choose; a layer that is missing uses all of its heads"""
    budgets: Sequence[int] = ()
    """tokens kept by every layer, window included, as `allocate_layers` gives them"""
    window: int = 8
    """newest queries that are looked at; their tokens stay"""
    kernel: int = 5
    """width of the average pooling, odd"""
    table: str | None = field(default=None, kw_only=True)
    """file of `rltok profile compress_kv`; with `budget` it gives heads and budgets"""
    made_of: ModelFacts | None = field(default=None, kw_only=True)
    """the table's model"""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.budgets:
            raise ValueError(
                "budgets=() is empty: give `table` (made by rltok profile compress_kv) and `budget`, or one number per "
                "layer, see allocate_layers"
            )
        check_window(min(self.budgets), self.window, self.kernel, "min(budgets)")

    @property
    def watched(self) -> int:
        """Queries that vote."""
        return self.window

    @classmethod
    def of_budget(cls, budget: int, options: Mapping[str, Any]) -> dict[str, Any]:
        """Heads of `options["table"]`, and budgets that its layers share by error: `budget` in the mean.

        Raises:
            ConfigError: a table that cannot be used.
            ValueError: no table.
        """
        path = options.get("table")
        if not isinstance(path, str):
            raise ValueError(
                f"budget={budget} is shared by a table, and table={path!r} names none: make one with rltok profile "
                "compress_kv CHECKPOINT --out FILE, or set heads and budgets"
            )
        table = read_compress_table(path)
        return {"heads": table.heads, "budgets": budgets_of(table.errors, budget), "made_of": table.model}

    def check_model(self, config: Any) -> None:
        """Refuse a model that heads and budgets are not made for.

        Raises:
            ConfigError: another model than the table's.
            ValueError: another number of layers, or a head that the model does not have.
        """
        if self.made_of is not None:
            self.made_of.check(config, "compress_kv", f"table {self.table}")
        facts = ModelFacts.of(config)
        if len(self.budgets) != facts.layers:
            raise ValueError(f"budgets has {len(self.budgets)} numbers, the model has {facts.layers} layers")
        for layer, heads in self.heads.items():
            if not (0 <= layer < facts.layers and heads and min(heads) >= 0 and max(heads) < facts.query_heads):
                raise ValueError(
                    f"heads[{layer}]={list(heads)}; allowed: layers 0 to {facts.layers - 1}, query heads 0 to "
                    f"{facts.query_heads - 1}, at least one"
                )

    def kept(self, layer: int) -> int:
        """budgets[layer]."""
        if layer >= len(self.budgets):
            raise ValueError(f"budgets has {len(self.budgets)} numbers, but the model has a layer {layer}")
        return self.budgets[layer]

    def select(self, view: LayerView) -> Tensor:
        """The window's slots and the best others, the same in all key-value heads."""
        weights = window_weights_by_head(view).flatten(1, 2)  # (B, H, w, S)
        chosen = self.heads.get(view.index)
        if chosen is not None:
            weights = weights[:, torch.tensor(list(chosen), device=weights.device)]
        window = newest(view, self.window)
        score = pooled_votes(weights, window, self.kernel).mean(1, keepdim=True)
        return best_slots(score, window, view.filled, view.budget).expand(-1, view.keys.size(1), -1)


def budgets_of(errors: Sequence[float | None], budget: int) -> list[int]:
    """Budgets of all layers, `budget` in the mean of those with an error.

    At least 32 tokens (`budget` where that is less) and at most 3 `budget` for a layer. A layer without error has no
    full attention: no policy cuts it, and its number is `budget`.

    Args:
        errors: (L,) as a table holds them.
        budget: tokens of a layer in the mean.

    Example: errors 0.5, 0.3, 0.15, 0.05, budget 64 give 97, 70, 51, 38.
    """
    measured = [error for error in errors if error is not None]
    shared = iter(allocate_layers(measured, budget * len(measured), min(LOW, budget), HIGH * budget))
    return [budget if error is None else next(shared) for error in errors]


def allocate_layers(errors: Sequence[float], total: int, low: int, high: int) -> list[int]:
    """Tokens of every layer, by the error a small cache makes in it.

        b_l = clip(low + round(e_l (total - low L)), low, high),    then one token at a time until they sum to total

    Tokens are added to the layers of largest error first and taken from those of smallest error first, in turns.

    Args:
        errors: (L,) not negative; normalised to sum 1.
        total: tokens of all layers.
        low, high: bounds of a layer.

    Raises:
        ValueError: bounds that `total` does not fit between, negative errors or none above 0.

    Example: errors 0.5, 0.3, 0.15, 0.05, total 256, low 32, high 192 give 97, 70, 51, 38.
    """
    layers = len(errors)
    if not low * layers <= total <= high * layers:
        raise ValueError(f"total={total} does not fit {layers} layers between low={low} and high={high} tokens each")
    if min(errors, default=0) < 0 or sum(errors) <= 0:
        raise ValueError(f"errors={list(errors)} must not be negative, and some must be above 0")
    whole = sum(errors)
    budgets = [min(max(low + round(e / whole * (total - low * layers)), low), high) for e in errors]
    by_error = sorted(range(layers), key=lambda layer: (-errors[layer], layer))
    while sum(budgets) != total:
        missing = total - sum(budgets)
        for layer in by_error if missing > 0 else reversed(by_error):
            if sum(budgets) == total:
                break
            moved = budgets[layer] + (1 if missing > 0 else -1)
            if low <= moved <= high:
                budgets[layer] = moved
    return budgets


def semantic_head_scores(attention: Tensor, generated: Tensor, prompt: Tensor, needle: tuple[int, int]) -> Tensor:
    """How much each head looks at the needle while it is being copied.

        score_h = sum over steps t and needle positions i with prompt_i = generated_t of sum_{j in needle} a_thj

    Args:
        attention: (steps, H, P) weights over the prompt when each token was generated.
        generated: (steps,) token ids.
        prompt: (P,) token ids.
        needle: first and one past the last position of the needle in the prompt.

    Returns:
        (H,) float.

    Example: prompt 1, 7, 9, 7, 2, needle 1..3, tokens 7 and 9 with weights (.1, .2, .3, .1, .3), (0, .5, .1, .1, .3):
    2 * 0.6 + 0.7 = 1.9.
    """
    first, last = needle
    matches = (generated[:, None] == prompt[None, first:last]).sum(1).to(attention.dtype)
    return (attention[:, :, first:last].sum(-1) * matches[:, None]).sum(0)
