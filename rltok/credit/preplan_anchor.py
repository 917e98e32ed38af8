"""Preplan-and-anchor credit: multiply a token's advantage where the policy's own attention shows planning or anchoring.

    Delta_t = |WAAD_t - WAAD_{t+1}|           preplan tokens  T_loc  = TopQ(Delta, q)
    FAI_s   = mean attention that s receives  anchors         T_glob = TopQ(FAI, q)      TopQ: the ceil(q n) largest
    D       = {t in T_glob : WAAD_t <= tau_waad  and  max_{t-k <= u < t} Delta_u >= tau_delta}      dominated anchors
    I(D)    = {argmax_{t-k <= u < t} Delta_u : t in D}                                          introductory tokens

    A_it = gamma_it A_i,  b = gamma_amp - 1
    local     gamma_t = 1 + b 1{T_loc}
    global    gamma_t = 1 + b 1{T_glob}
    coupled   gamma_t = 1 + b (1{T_glob \\ D} + (1 - alpha) 1{D} + alpha 1{I(D)})

The terms add: an anchor that is also introductory gets 1 + b (1 + alpha). In `coupled` a preplan token as such gets
nothing. All of it is per completion; n counts the tokens the loss sees. Tool tokens are context: they may be the t + 1
of a Delta and query of an FAI, and are never chosen.

| paper | here |
| --- | --- |
| gamma_amp, q, alpha, k | `gamma_amp`, `top_quantile`, `backalloc`, `lookback` |
| tau_waad, tau_Delta | `tau_waad`, `tau_delta` |
| T_loc, T_glob, D, I(D) | `is_local`, `is_global`, `is_dominated`, `is_introductory` of `RhythmCredit` |
| W, H_lo, H_hi | `window`, `horizon_min`, `horizon_max`, read by `rltok.attention` |

Example (defaults, n = 8): WAAD 3.0 .8 1.4 5.2 1.0 .9 2.6 .7 and FAI .02 .30 .05 .26 .41 .03 .22 .01 give
T_loc {0,2,3,6}, T_glob {1,3,4,6}, D {1,4}, I(D) {0,3} and coupled gamma 1.25 1.25 1 1.75 1.25 1 1.5 1.

gamma_amp = 1 or top_quantile = 0 is the baseline bit for bit and reads no attention; backalloc = 0 turns coupled into
global.

Source: arXiv 2510.13554 v2, Eqs. 13-19. Not in the paper and fixed here: ties go to the earlier token, an exact count
in place of a quantile, the thresholds, alpha, the choice of the introductory token, Delta of the last token (none) and
FAI without horizon (no anchor). Ours alone: `control=shuffled` for strategies with unequal multipliers, `renormalize`.
Left out: amplifying the lowest quantile (the paper's ablation, worse than the baseline) and peak detection, which the
paper's training does not use.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal, NamedTuple, Protocol, get_args

import numpy as np
import torch
from torch import Tensor

from rltok.batch import TokenBatch

if TYPE_CHECKING:
    from rltok.attention.signals import AttentionConfig, AttentionSignals

Strategy = Literal["coupled", "local", "global"]
Control = Literal["none", "shuffled", "entropy"]
AdvantageSign = Literal["both", "positive", "negative"]
DeltaMode = Literal["abs", "drop"]


class RhythmConfig(Protocol):
    """The numbers `rhythm_gamma` reads; `PreplanAnchor` has them, any other object may."""

    @property
    def gamma_amp(self) -> float: ...
    @property
    def top_quantile(self) -> float: ...
    @property
    def backalloc(self) -> float: ...
    @property
    def lookback(self) -> int: ...
    @property
    def tau_waad(self) -> float | Literal["median"]: ...
    @property
    def tau_delta(self) -> float | Literal["topq"]: ...
    @property
    def delta_mode(self) -> DeltaMode: ...


class RhythmCredit(NamedTuple):
    """Multipliers of the three strategies and the sets behind them; all (B, C), without gradient."""

    gamma_local: Tensor
    """1 or 1 + b"""
    gamma_global: Tensor
    """1 or 1 + b"""
    gamma_coupled: Tensor
    """from 1 to 1 + b (1 + alpha)"""
    is_local: Tensor
    """bool, T_loc: preplan tokens"""
    is_global: Tensor
    """bool, T_glob: anchors"""
    is_dominated: Tensor
    """bool, D: anchors that only carry on what a token just before them planned; a subset of T_glob"""
    is_introductory: Tensor
    """bool, I(D): the tokens that planned them"""


def rhythm_gamma(
    waad: Tensor, fai: Tensor, fai_count: Tensor, response_mask: Tensor, credit_mask: Tensor, cfg: RhythmConfig
) -> RhythmCredit:
    """Multipliers of every token of every completion, one completion at a time and independent of the others.

    Args:
        waad: (B, C) windowed average attention distance, in tokens; any value outside the response.
        fai: (B, C) future attention influence, already a mean over the horizon; any value outside the response.
        fai_count: (B, C) number of queries in the horizon; a token with 0 cannot be an anchor.
        response_mask: (B, C) 1 at completion tokens, tool tokens included.
        credit_mask: (B, C) 1 at the tokens that may be amplified, a subset of `response_mask`.
        cfg: gamma_amp, top_quantile, backalloc, lookback, tau_waad, tau_delta, delta_mode.

    Returns:
        Multipliers of at least 1 in float32 (float64 for float64 signals); 1 outside `credit_mask`. gamma_amp = 1 or
        top_quantile = 0 give 1 everywhere.

    Raises:
        ValueError: shapes differ, credit outside the response, or a signal of the response that is not finite.
    """
    response, credit = response_mask.bool(), credit_mask.bool()
    _check_signals(waad, fai, fai_count, response, credit)
    dtype = torch.promote_types(waad.dtype, torch.float32)
    waad, fai = waad.detach().to(dtype), fai.detach().to(dtype)
    delta, has_delta = _changes(waad, response, credit, cfg.delta_mode)
    n_select = torch.ceil(cfg.top_quantile * credit.sum(1).double() - 1e-9).long()
    is_local = _largest(delta, has_delta, n_select)
    is_global = _largest(fai, credit & (fai_count > 0), n_select)
    if cfg.tau_delta == "topq":
        tau_delta = torch.where(is_local, delta, torch.inf).amin(1, keepdim=True) if delta.size(1) else delta
    else:
        tau_delta = torch.full_like(waad[:, :1], cfg.tau_delta)
    tau_waad = _lower_median(waad, credit) if cfg.tau_waad == "median" else torch.full_like(waad[:, :1], cfg.tau_waad)
    recent, introducer = _strongest_before(torch.where(has_delta, delta, -torch.inf), cfg.lookback)
    is_dominated = is_global & (waad <= tau_waad) & (recent >= tau_delta)
    is_introductory = torch.zeros_like(introducer).scatter_add_(1, introducer, is_dominated.long()) > 0
    own, dominated, introductory = (
        chosen.to(dtype) for chosen in (is_global & ~is_dominated, is_dominated, is_introductory)
    )
    bonus = cfg.gamma_amp - 1
    return RhythmCredit(
        gamma_local=1 + bonus * is_local.to(dtype),
        gamma_global=1 + bonus * is_global.to(dtype),
        gamma_coupled=1 + bonus * (own + (1 - cfg.backalloc) * dominated + cfg.backalloc * introductory),
        is_local=is_local,
        is_global=is_global,
        is_dominated=is_dominated,
        is_introductory=is_introductory,
    )


def shape_advantages(adv: Tensor, gamma: Tensor, sign: AdvantageSign = "both") -> Tensor:
    """A gamma, where the sign of A takes part; gamma = 1 returns A bit for bit.

    Args:
        adv: (B,) advantage of every completion.
        gamma: (B, C) multipliers.
        sign: `both`; `positive` leaves completions with A < 0 as they are, `negative` those with A >= 0.

    Returns:
        (B, C) in the dtype of `adv`, without gradient.

    Raises:
        ValueError: unknown sign, or shapes that do not fit.
    """
    _check_choice("sign", sign, AdvantageSign)
    if gamma.dim() != 2 or adv.shape != gamma.shape[:1]:
        raise ValueError(f"advantages {tuple(adv.shape)} and gamma {tuple(gamma.shape)} do not fit: (B,) and (B, C)")
    column, factor = adv.detach()[:, None], gamma.detach().to(adv.dtype)
    if sign != "both":
        factor = torch.where((column >= 0) == (sign == "positive"), factor, 1.0)
    return column * factor


def shuffle_multipliers(gamma: Tensor, credit_mask: Tensor, seed: int, first_row: int = 0) -> Tensor:
    """The multipliers of every completion in random order among its credit tokens: right numbers, wrong places.

    Args:
        gamma: (B, C).
        credit_mask: (B, C) 1 where a multiplier may stand; the others stay in place.
        seed: not negative. The order depends on the seed, the row's index over all ranks and the number of credit
            tokens alone, so neither padding nor the number of ranks changes it.
        first_row: index over all ranks of row 0.

    Returns:
        (B, C) with the same values in every row.
    """
    source = torch.arange(gamma.size(1)).repeat(gamma.size(0), 1)
    for row, mask in enumerate(credit_mask.bool().cpu()):
        places = mask.nonzero()[:, 0]
        order = np.random.default_rng([seed, first_row + row]).permutation(places.numel())
        source[row, places] = places[torch.from_numpy(order)]
    return gamma.gather(1, source.to(gamma.device))


def rank_by_entropy(gamma: Tensor, entropy: Tensor, credit_mask: Tensor) -> Tensor:
    """The multipliers of every completion handed to its credit tokens anew: the largest to the highest entropy.

    So the same number of tokens is amplified, by the same amounts. Ties in entropy go to the earlier token.

    Args:
        gamma: (B, C) multipliers.
        entropy: (B, C) nats; any value outside `credit_mask`.
        credit_mask: (B, C).

    Returns:
        (B, C); 1 outside `credit_mask`.

    Raises:
        ValueError: an entropy at a credit token that is not finite.
    """
    credit = credit_mask.bool()
    if not entropy[credit].isfinite().all():
        raise ValueError("entropy is not finite at a token that counts; check the model's logits")
    order = torch.where(credit, entropy.detach(), -torch.inf).argsort(dim=1, descending=True, stable=True)
    falling = torch.where(credit, gamma, -torch.inf).sort(dim=1, descending=True).values
    return torch.where(credit, torch.ones_like(gamma).scatter(1, order, falling), 1.0)


@dataclass(frozen=True)
class PreplanAnchor:
    """Amplifies the advantage of tokens where attention shows planning (local), anchoring (global) or both."""

    strategy: Strategy = "coupled"
    """`local` amplifies preplan tokens, `global` anchors, `coupled` anchors and the tokens that planned them"""
    control: Control = "none"
    """where the strategy's multipliers go instead, within each completion: `shuffled` at random, `entropy` to the
    tokens of highest entropy; the same numbers, for comparison"""
    gamma_amp: float = 1.5
    """multiplier of an amplified token; 1 is the baseline and reads no attention"""
    top_quantile: float = 0.4
    """share of a completion's tokens that count as preplan tokens, and as anchors; 0 is the baseline"""
    backalloc: float = 0.5
    """share of a dominated anchor's bonus that its introductory token gets; 0 makes coupled global"""
    lookback: int = 3
    """tokens before an anchor among which its introductory token lies"""
    sign: AdvantageSign = "both"
    """completions that are shaped: `both`, `positive` (advantage >= 0) or `negative` (advantage < 0)"""
    tau_waad: float | Literal["median"] = "median"
    """an anchor with a WAAD (tokens) at or below can be dominated; `median` is the completion's lower median"""
    tau_delta: float | Literal["topq"] = "topq"
    """change of WAAD (tokens) just before a dominated anchor, at least; `topq`: the smallest of a preplan token"""
    delta_mode: DeltaMode = "abs"
    """what ranks preplan tokens: the change of WAAD to the next token, `abs`, or `drop`: its fall, rises negative"""
    renormalize: bool = False
    """divide by the mean multiplier of each completion, so that amplifying does not raise the learning rate"""
    layers: tuple[int, ...] | None = None
    """probed layers; null takes 5 evenly spaced ones of the middle third"""
    head_quantile: float = 0.3
    """share of heads of shortest span that are local, and of longest that are global; at most 0.5"""
    head_scope: Literal["sequence", "batch", "static"] = "sequence"
    """what heads are ranked on: each completion, the batch of all ranks, or never (`local_heads`, `global_heads`)"""
    local_heads: tuple[int, ...] | None = None
    """local heads for head_scope static: flat indices over the probed layers, layer by layer"""
    global_heads: tuple[int, ...] | None = None
    """global heads for head_scope static, likewise"""
    window: int = 10
    """WAAD counts distances up to this, in tokens"""
    horizon_min: int = 10
    """FAI counts attention from this many tokens later on"""
    horizon_max: int | None = 100
    """and up to this many tokens later; null is the end of the completion"""

    per_token: ClassVar[bool] = True

    def __post_init__(self) -> None:
        for name, hint in _CHOICES.items():
            _check_choice(f"credit.{name}", getattr(self, name), hint)
        if not 1 <= self.gamma_amp < math.inf:
            raise ValueError(f"credit.gamma_amp={self.gamma_amp} must be finite and >= 1; 1 is the baseline")
        for name in ("top_quantile", "backalloc"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"credit.{name}={getattr(self, name)} must lie in [0, 1]")
        if self.lookback < 1:
            raise ValueError(f"credit.lookback={self.lookback} must be >= 1")
        for name, word in (("tau_waad", "median"), ("tau_delta", "topq")):
            value = getattr(self, name)
            if value != word and (isinstance(value, str) or not math.isfinite(value)):
                raise ValueError(f"credit.{name}={value!r} must be {word!r} or a finite number of tokens")
        if not self.is_neutral:
            _ = self.attention  # refuses its options now, not at the first rollout

    @property
    def is_neutral(self) -> bool:
        """True if nothing can be amplified: the baseline, which reads no attention."""
        return self.gamma_amp == 1 or self.top_quantile == 0

    @property
    def needs(self) -> tuple[str, ...]:
        """Signals it reads: `attention`, `entropy` for the control of that name, none for the baseline."""
        if self.is_neutral:
            return ()
        return ("attention", "entropy") if self.control == "entropy" else ("attention",)

    @property
    def attention(self) -> AttentionConfig:
        """Options of the attention pass whose signals it reads."""
        from rltok.attention.signals import AttentionConfig

        return AttentionConfig(**{name: getattr(self, name) for name in _ATTENTION_OPTIONS})

    def __call__(self, batch: TokenBatch) -> Tensor:
        if self.is_neutral:
            return batch.advantages[:, None] * batch.mask
        gamma = self.multipliers(batch, self._rhythm(batch))
        return shape_advantages(batch.advantages, gamma, self.sign) * batch.mask

    def metrics(self, batch: TokenBatch) -> dict[str, Tensor]:
        """Numbers to log: (B, C) values that mean something averaged over the tokens of `batch.mask`.

        `gamma` and `amplified` (multiplier above 1, before renormalize) hold before `sign`; `preplan`, `anchor`,
        `dominated` and `introductory` are the sets behind the strategy, whatever the control; `dominated_of_anchors`
        is |D| / |T_glob| of the token's completion, 0 without anchor; `waad` and `fai` are the signals. {} for the
        baseline.
        """
        if self.is_neutral:
            return {}
        rhythm, signals = self._rhythm(batch), _attention_of(batch)
        gamma = self.multipliers(batch, rhythm)
        anchors, dominated = rhythm.is_global.sum(1, keepdim=True), rhythm.is_dominated.sum(1, keepdim=True)
        values = {
            "gamma": gamma,
            "amplified": self._placed(batch, rhythm) > 1,
            "preplan": rhythm.is_local,
            "anchor": rhythm.is_global,
            "dominated": rhythm.is_dominated,
            "introductory": rhythm.is_introductory,
            "dominated_of_anchors": (dominated / anchors.clamp(min=1)).expand_as(gamma),
            "waad": signals.waad,
            "fai": signals.fai,
        }
        return {name: torch.where(batch.mask.bool(), value.to(gamma.dtype), 0.0) for name, value in values.items()}

    def multipliers(self, batch: TokenBatch, rhythm: RhythmCredit) -> Tensor:
        """(B, C) what advantages are multiplied by, after control and renormalisation, before `sign`."""
        gamma, mask = self._placed(batch, rhythm), batch.mask.bool()
        if not self.renormalize:
            return gamma
        mean = (gamma * mask).sum(1, keepdim=True) / mask.sum(1, keepdim=True).clamp(min=1)
        return torch.where(mask, gamma / mean, 1.0)

    def _placed(self, batch: TokenBatch, rhythm: RhythmCredit) -> Tensor:
        """(B, C) the strategy's multipliers where the control puts them."""
        gamma: Tensor = getattr(rhythm, f"gamma_{self.strategy}")
        if self.control == "shuffled":
            return shuffle_multipliers(gamma, batch.mask, batch.seed, batch.offset)
        if self.control == "entropy":
            if batch.entropy is None:
                raise ValueError("credit.control='entropy' needs TokenBatch.entropy, which is None")
            return rank_by_entropy(gamma, batch.entropy, batch.mask)
        return gamma

    def _rhythm(self, batch: TokenBatch) -> RhythmCredit:
        signals = _attention_of(batch)
        response = batch.mask if batch.response_mask is None else batch.response_mask
        return rhythm_gamma(signals.waad, signals.fai, signals.fai_count, response, batch.mask, self)


_CHOICES = {"strategy": Strategy, "control": Control, "sign": AdvantageSign, "delta_mode": DeltaMode}
_ATTENTION_OPTIONS = (
    "layers",
    "head_quantile",
    "head_scope",
    "local_heads",
    "global_heads",
    "window",
    "horizon_min",
    "horizon_max",
)


def _attention_of(batch: TokenBatch) -> AttentionSignals:
    if batch.attention is None:
        raise ValueError(
            "credit.type=preplan_anchor needs TokenBatch.attention, which is None; fill it with the signals of "
            "`PreplanAnchor.attention`, or set credit.gamma_amp=1"
        )
    return batch.attention


def _check_choice(name: str, value: object, hint: object) -> None:
    if value not in get_args(hint):
        raise ValueError(f"{name}={value!r} is unknown; allowed: {', '.join(map(repr, get_args(hint)))}")


def _check_signals(waad: Tensor, fai: Tensor, fai_count: Tensor, response: Tensor, credit: Tensor) -> None:
    shapes = {
        name: tuple(value.shape)
        for name, value in zip(
            ("waad", "fai", "fai_count", "response_mask", "credit_mask"),
            (waad, fai, fai_count, response, credit),
            strict=True,
        )
    }
    if waad.dim() != 2 or len(set(shapes.values())) > 1:
        listed = ", ".join(f"{name} {shape}" for name, shape in shapes.items())
        raise ValueError(f"the attention signals and masks must all be (B, C); got {listed}")
    if (credit & ~response).any():
        row, position = (credit & ~response).nonzero()[0].tolist()
        raise ValueError(
            f"credit_mask is 1 outside response_mask at row {row}, token {position}; credit tokens must lie in it"
        )
    for name, values in (("waad", waad), ("fai", fai)):
        broken = response & ~values.isfinite()
        if broken.any():
            row, position = broken.nonzero()[0].tolist()
            raise ValueError(f"{name} is {values[row, position].item()} at row {row}, token {position}; must be finite")


def _changes(waad: Tensor, response: Tensor, credit: Tensor, mode: DeltaMode) -> tuple[Tensor, Tensor]:
    """(B, C) Delta, and where it is defined: at credit tokens with a next token in the response."""
    _check_choice("delta_mode", mode, DeltaMode)
    follows = torch.zeros_like(response)
    follows[:, :-1] = response[:, 1:]
    delta = torch.zeros_like(waad)
    delta[:, :-1] = waad[:, :-1] - waad[:, 1:]
    has_delta = credit & follows
    return torch.where(has_delta, delta.abs() if mode == "abs" else delta, 0.0), has_delta


def _largest(values: Tensor, candidates: Tensor, n_select: Tensor) -> Tensor:
    """(B, C) bool: the `n_select` (B,) largest candidates of every row, ties to the earlier; all if there are fewer."""
    order = torch.where(candidates, values, -torch.inf).argsort(dim=1, descending=True, stable=True)
    ranks = torch.arange(values.size(1), device=values.device).expand_as(order)
    return torch.zeros_like(candidates).scatter(1, order, ranks < n_select[:, None]) & candidates


def _lower_median(values: Tensor, mask: Tensor) -> Tensor:
    """(B, 1) the ((n - 1) // 2)-th smallest masked value of every row, from 0; infinite where the row has none."""
    if values.size(1) == 0:
        return values
    ascending = torch.where(mask, values, torch.inf).sort(dim=1).values
    return ascending.gather(1, ((mask.sum(1, keepdim=True) - 1) // 2).clamp(min=0))


def _strongest_before(delta: Tensor, lookback: int) -> tuple[Tensor, Tensor]:
    """Largest of the `lookback` values before each token, and its index (first on ties).

    Args:
        delta: (B, C), -inf where undefined.
        lookback: at least 1.

    Returns:
        (B, C) value, -inf where there is none, and (B, C) index, meaningless there but inside the row.
    """
    width = delta.size(1)
    if width == 0:
        return delta, delta.long()
    lookback = min(lookback, width)
    before = torch.cat([delta.new_full((delta.size(0), lookback), -torch.inf), delta[:, :-1]], dim=1)
    windows = before.unfold(1, lookback, 1)  # (B, C, lookback): values of t - lookback .. t - 1
    strongest, place = windows.amax(2), windows.argmax(2)
    return strongest, (torch.arange(width, device=delta.device) - lookback + place).clamp(min=0)
