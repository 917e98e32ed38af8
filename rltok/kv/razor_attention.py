"""RazorAttention: heads that retrieve keep every token; the others keep sinks, a window, and one token for the rest.

Of a row of N tokens, a head that does not retrieve keeps the first `sink` and the last L_h = max(floor, N // ratio).
The set D of the others, N_d = |D|, becomes one compensation token, k_d = mean_D k and v_d = mean_D v, k as rotated:

    out = (N_d e^{s k_d} v_d + sum_{n not in D} e^{s k_n} v_n) / (N_d e^{s k_d} + sum_{n not in D} e^{s k_n})

with s = scaling q. It is one more key, whose logit gets + log N_d. Tokens dropped later join by running sums, which
gives the mean over the grown D exactly. Padding is in neither set.

Retrieval heads come from `razor_profile`, once per base model. The paper leaves open how often to cut while tokens are
generated: here every `interval` of them. Left out: ALiBi models, whose windows the paper derives from slopes.

Source: arXiv 2407.15891 v1, Algorithm 1, eqs. 4-5, Table 2.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from rltok.fast.cache import layer_windows
from rltok.kv.policy import KVPolicy
from rltok.kv.tables import ModelFacts, read_razor_table

if TYPE_CHECKING:
    from rltok.fast.cache import Size
    from rltok.kv.layer import PolicyLayer
    from rltok.kv.slots import Slots


@dataclass(frozen=True)
class RazorAttention(KVPolicy):
    """Two groups of heads; with all heads full, or a window as long as the row, it is dense attention.

    A layer whose heads are all full is a dense layer, bit for bit.
    """

    full_heads: Mapping[int, Sequence[int]] | None = None
    """layer -> key-value heads that keep every token; a layer that is missing has none; None: as `table` says"""
    sink: int = 4
    """N_0, first tokens of a row that the other heads keep"""
    floor: int = 4000
    """S_0, least window of the other heads; the paper's, which rollouts of few thousand tokens never reach: they want
    256 or so"""
    ratio: int | None = 5
    """C: the window grows to a C-th of the row, rounded down; None: it is always `floor`"""
    compensate: bool = True
    """fold dropped tokens into the compensation token; False forgets them"""
    table: str | None = field(default=None, kw_only=True)
    """file of `rltok profile razor_attention`, in place of `full_heads`"""
    made_of: ModelFacts | None = field(default=None, kw_only=True)
    """the table's model"""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.positions != "original":
            raise ValueError(
                f"positions={self.positions!r}: the compensation token is a mean over keys at their own positions; set "
                "positions to original"
            )
        if self.sink < 0:
            raise ValueError(f"sink={self.sink} must be >= 0")
        if self.floor < 1:
            raise ValueError(f"floor={self.floor} must be >= 1; with `budget`, budget - sink")
        if self.ratio is not None and self.ratio < 1:
            raise ValueError(f"ratio={self.ratio} must be >= 1, or None for a window of `floor` tokens")
        heads = self._given_heads()
        object.__setattr__(self, "full_heads", {layer: tuple(sorted(heads[layer])) for layer in sorted(heads)})

    def _given_heads(self) -> dict[int, Sequence[int]]:
        """`full_heads`, read from the table if need be."""
        if self.full_heads is None and self.table is None:
            raise ValueError(
                "full_heads and table are missing: give `table`, made by rltok profile razor_attention CHECKPOINT "
                "--out FILE, or full_heads={} for no retrieval head"
            )
        if self.table is not None and self.made_of is None:
            if self.full_heads is not None:
                raise ValueError(f"full_heads and table={self.table!r} both say which heads are full; keep one")
            read = read_razor_table(self.table)
            object.__setattr__(self, "made_of", read.model)
            return dict(read.full_heads)
        heads: dict[int, Sequence[int]] = {}
        for layer, chosen in (self.full_heads or {}).items():
            if len(set(chosen)) != len(chosen):
                raise ValueError(f"full_heads[{layer}]={list(chosen)} names a head twice")
            heads[int(layer)] = chosen  # keys of JSON are text
        return heads

    @classmethod
    def of_budget(cls, budget: int, options: Mapping[str, Any]) -> dict[str, Any]:
        """Heads that do not retrieve keep `budget` tokens, sinks included, whatever the row's length.

        The compensation token comes on top, and retrieval heads keep everything: what a layer holds is more.
        """
        return {"floor": budget - options.get("sink", cls.sink), "ratio": None}

    def check_model(self, config: Any) -> None:
        """Refuse a model that does not have these heads.

        Raises:
            ConfigError: another model than the table's.
            ValueError: a layer or a head that the model does not have, or a layer with a sliding window.
        """
        if self.made_of is not None:
            self.made_of.check(config, "razor_attention", f"table {self.table}")
        facts = ModelFacts.of(config)
        windows = layer_windows(config.get_text_config(decoder=True))
        for layer, heads in self.full.items():
            if not (0 <= layer < facts.layers and all(0 <= head < facts.kv_heads for head in heads)):
                raise ValueError(
                    f"full_heads[{layer}]={list(heads)}; allowed: layers 0 to {facts.layers - 1}, key-value heads 0 to "
                    f"{facts.kv_heads - 1}"
                )
            if windows[layer] is not None:
                raise ValueError(
                    f"full_heads[{layer}]={list(heads)}, but layer {layer} has a sliding window of {windows[layer]} "
                    "tokens: no head of it can keep every token; take the layer out"
                )

    @property
    def full(self) -> dict[int, tuple[int, ...]]:
        """Layer -> key-value heads that keep every token, ascending."""
        assert self.full_heads is not None
        return {layer: tuple(heads) for layer, heads in self.full_heads.items()}

    def recent(self, length: int) -> int:
        """L_h, newest tokens that the other heads keep of a row: max(floor, N // ratio).

        Example: floor 4000, ratio 5: 4000 of 10 000 tokens, 6000 of 30 000.
        """
        return self.floor if self.ratio is None else max(self.floor, length // self.ratio)

    def kept(self, layer: int) -> int:
        """Slots of the other heads in short rows: sink + floor, and the compensation token's."""
        return self.sink + self.floor + self.compensate

    def kept_by_length(self, layer: int) -> Callable[[int], int] | None:
        """sink + L_h, and the compensation token's slot."""
        if self.ratio is None:
            return None
        return lambda length: self.sink + self.recent(length) + self.compensate

    def make_layer(self, index: int, heads: int, slots: Slots, block: int, size: Size) -> PolicyLayer | None:
        """A layer of two groups of heads; None where all are full."""
        from rltok.kv.razor_layer import RazorLayer  # which itself knows this policy

        full = self.full.get(index, ())
        return None if len(full) == heads else RazorLayer(index, self, slots, block, size, full, heads)


def dropped_tokens(length: int, sink: int, recent: int, device: torch.device | None = None) -> Tensor:
    """(N,) True for the tokens of a row that are neither sinks nor recent.

    Args:
        length: N, tokens of the row.
        sink, recent: first and last tokens that stay.

    Example: 6 tokens, sink 1, recent 2: tokens 1, 2 and 3.
    """
    column = torch.arange(length, device=device)
    return (column >= sink) & (column < length - recent)


def compensated_attention(
    query: Tensor, keys: Tensor, values: Tensor, dropped: Tensor, scaling: float = 1.0, compensate: bool = True
) -> Tensor:
    """Attention of one query with the dropped tokens as one (eq. 5); without any dropped it is plain attention.

    Args:
        query: (..., D).
        keys: (..., S, D) as rotated.
        values: (..., S, Dv).
        dropped: (..., S) bool, D; not all of them where `compensate` is off.
        scaling: factor of the scores.
        compensate: False leaves the dropped tokens out.

    Returns:
        (..., Dv).

    Example: query (1, 0), keys (1, 0), (0, 1), (2, 0), (0, 2), (1, 1), (0, 0), values 1 to 6, tokens 1 to 3 dropped:
    3.244304; without compensation 3.466087, with none dropped 3.189566.
    """
    logits = (keys @ query[..., None])[..., 0] * scaling
    logits = logits.masked_fill(dropped, -torch.inf)
    if compensate:
        count = dropped.sum(-1, keepdim=True)
        weight = dropped.to(keys.dtype)[..., None, :]
        share = count.clamp(min=1)[..., None].to(keys.dtype)
        key, value = ((weight @ x / share) for x in (keys, values))  # (..., 1, D)
        extra = (key @ query[..., None])[..., 0] * scaling + count.to(logits.dtype).log()
        logits, values = torch.cat([logits, extra], -1), torch.cat([values, value], -2)
    return (logits.softmax(-1)[..., None, :] @ values)[..., 0, :]
