"""HAPO part A: sample hot where the next token is uncertain, cool where it is certain.

    bounded:  T_t = T_b (1 + tau h_t)                    h from `rltok.entropy`, in [-1, 1]; tau 0.05 (released code)
    zscore:   T_t = T_b (1 + tau (l_t - Q) / sigma)      l = log max(H, floor), sigma about the mean; tau 0.1 (Eq. 8)

H is the entropy in nats of softmax(z / T_b) of the row being sampled; Q, sigma and the extremes come from the previous
generation batch. tau = 0, or no statistics yet, is the plain sampler bit for bit.

Example: entropies 0.01, 0.05, 0.2, 0.4, 0.9, 1.6 with rho 0.8; logits (2, 0, 0, -1) at T_b = 1 have H = 0.801056, so
h = -0.025882 and T = 0.998706 (bounded, tau 0.05), or signal -0.067313 and T = 0.993269 (zscore, tau 0.1).

The sampler then differs from the learner, which scores at T_b: weight with the recorded log-probabilities
(`rltok.correction`); the authors train without that weight (`correction: {mode: off}`).

Source: arXiv 2509.16591, Eqs. 5, 6, 8. Left out: replaying T_t in the learner. The floor of the z-score form is ours.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torch.nn import functional

from rltok.entropy import LOG_FLOOR, EntropyStats, Gather, Sign, entropy_stats, log_entropy, signal_from_log
from rltok.sampling.processor import (
    Columns,
    DecodingContext,
    DecodingModule,
    GenerationSettings,
    RolloutProcessor,
    Rows,
)

Form = Literal["bounded", "zscore"]

ZSCORE_FLOOR = 0.1
"""Smallest T_t / T_b of the unbounded z-score form, which could otherwise reach 0."""

LEAST_EXPONENT = -87.0
"""exp of this is 2e-38, nothing beside 1; further down exp leaves its fast path and takes a hundred times as long."""
LEAST_ENTROPY = 1e-29
"""Entropies up to this are 0: what the smallest weights of forbidden tokens may add up to."""

CACHE_ELEMENTS = 3 << 16
"""Elements of a block of rows for one CPU thread: two float32 copies stay in a core's own cache of 2 MiB."""
SHARED_ELEMENTS = 1 << 20
"""Elements per thread where several share a block: waking them for every operation costs more than a larger cache."""
DEVICE_ELEMENTS = 1 << 26
"""Elements of a block elsewhere, which bounds the memory of temporaries."""


def adaptive_temperature(
    entropy: Tensor,
    stats: EntropyStats | None,
    base: float = 1.0,
    tau: float = 0.05,
    form: Form = "bounded",
    sign: Sign = "signed",
    floor: float = LOG_FLOOR,
) -> Tensor:
    """Sampling temperature of every entropy; `base` where tau is 0, at the pivot, or without statistics.

    Args:
        entropy: nats, any shape; of the distribution at temperature `base`.
        stats: log-entropy statistics of an earlier batch; None gives `base`.
        base: T_b > 0.
        tau: strength, in [0, 1) for `bounded`, >= 0 for `zscore`.
        form: `bounded` lies in [base (1 - tau), base (1 + tau)]; `zscore` is floored at 0.1 base.
        sign: `signed` cools below the pivot; `released` heats on both sides, as the authors' code does (bounded only).
        floor: smallest entropy told apart from 0, the one used for `stats`.

    Returns:
        Detached temperatures of entropy's shape, at least float32.

    Raises:
        ValueError: an option out of range.
    """
    check_temperature(base)
    check_options(tau, form, sign)
    log_h = log_entropy(entropy, floor)
    if stats is None or tau == 0:
        return torch.full_like(log_h, base)
    if form == "bounded":
        return base * (1 + tau * signal_from_log(log_h, stats, sign))
    pivot, sigma = (torch.as_tensor(x).to(log_h) for x in (stats.pivot, stats.sigma))
    z_score = (log_h - pivot) / sigma
    return base * (1 + tau * z_score).clamp(min=ZSCORE_FLOOR)


def stats_from_entropy(
    entropy: Tensor, mask: Tensor, pivot: float = 0.8, gather: Gather | None = None
) -> EntropyStats | None:
    """Statistics for the next rollout's temperatures: `rltok.entropy.entropy_stats` with the quantile as `pivot`."""
    return entropy_stats(entropy, mask, pivot, gather=gather)


def temperature_factor(
    logits_over_base: Tensor, stats: EntropyStats | None, tau: float = 0.05, form: Form = "bounded"
) -> Tensor:
    """f = T_t / T_b of every row: (B, V) logits already divided by T_b -> (B,); 1 where tau is 0 or without stats."""
    return adaptive_temperature(row_entropy(logits_over_base), stats, 1.0, tau, form)


def row_blocks(scores: Tensor) -> tuple[Tensor, ...]:
    """Views of (B, V) scores, some rows each: as many as keep repeated passes over a block cheap."""
    threads = torch.get_num_threads()
    on_cpu = CACHE_ELEMENTS if threads == 1 else SHARED_ELEMENTS * threads
    most = on_cpu if scores.device.type == "cpu" else DEVICE_ELEMENTS
    return scores.split(max(1, most // scores.size(1)))


def row_entropy(scores: Tensor, temperature: float = 1.0) -> Tensor:
    """Entropy in nats of softmax(scores / temperature): (B, V) logits, -inf where forbidden -> (B,), at least float32.

    log sum exp y - sum p y with y = (z - max z) / T: both terms are >= 0, so small entropies keep their digits.
    """
    scores = scores.detach()
    dtype = torch.promote_types(scores.dtype, torch.float32)
    blocks = row_blocks(scores)
    # one workspace for all blocks: fresh memory for every temporary costs more than the arithmetic
    workspace = torch.empty(2, *blocks[0].shape, dtype=dtype, device=scores.device)
    entropies = []
    for block in blocks:
        shifted, weights = workspace[:, : block.size(0)]
        torch.sub(block.to(dtype), block.amax(dim=-1, keepdim=True), out=shifted)
        if temperature != 1:
            shifted /= temperature
        shifted.clamp_(min=LEAST_EXPONENT)  # 0 * -inf would be NaN
        total = torch.exp(shifted, out=weights).sum(dim=-1)
        entropies.append(total.log() - shifted.mul_(weights).sum(dim=-1) / total)
    return functional.threshold(torch.cat(entropies), LEAST_ENTROPY, 0.0)


class AdaptiveTemperature(RolloutProcessor):
    """Divides row z by f = T_t / T_b, so that the engine's own division by T_b makes T_t of it.

    Place it after every processor that changes logits and before the temperature (see `sampling_control`).
    tau = 0 or stats None returns the very tensor it got.
    """

    memory = "none"
    traced = ("entropy",)

    def __init__(
        self,
        stats: EntropyStats | Sequence[float] | None,
        tau: float = 0.05,
        base: float = 1.0,
        form: Form = "bounded",
        sign: Sign = "signed",
        floor: float = LOG_FLOOR,
    ) -> None:
        check_temperature(base)
        check_options(tau, form, sign)
        if stats is not None and not isinstance(stats, EntropyStats):
            stats = EntropyStats(*(torch.tensor(value) for value in stats))
        self.stats, self.tau, self.base, self.form, self.sign, self.floor = stats, tau, base, form, sign, floor

    @property
    def is_neutral(self) -> bool:
        """True with tau 0 or without statistics."""
        return self.stats is None or self.tau == 0

    def settings(self) -> dict[str, Any]:
        """Constructor arguments in plain values."""
        stats = None if self.stats is None else [float(value) for value in self.stats]
        return {"stats": stats} | {name: getattr(self, name) for name in ("tau", "base", "form", "sign", "floor")}

    def begin(self, prompt_length: int, settings: GenerationSettings) -> None:
        """Drop the record of an earlier call; the base temperature must be the one that generate divides by."""
        actual = 1.0 if settings.temperature is None else settings.temperature
        if actual != self.base:
            raise ValueError(f"adaptive temperature was built for temperature={self.base} but generate uses {actual}")
        super().begin(prompt_length, settings)

    def apply(self, scores: Tensor, rows: Rows, columns: Columns) -> Tensor:
        """Divide each row by its factor, in place."""
        columns["entropy"] = entropy = row_entropy(scores, self.base)
        scores /= self._factor(entropy)[:, None].to(scores.dtype)
        return scores

    def factors(self) -> Tensor | None:
        """(B, steps) factors T_t / T_b of the last generate call, None if nothing was changed."""
        entropy = self.trace().get("entropy")
        return None if entropy is None else self._factor(entropy)

    def metrics(self, lengths: Sequence[int] | None = None) -> dict[str, float]:
        """Means over the sampled tokens of the last generate call; waits for the device once.

        Args:
            lengths: tokens of each completion; None counts also the steps after a row's end.

        Returns:
            `temperature_factor` mean of T_t / T_b, `temperature_clamped` share of tokens at a bound (a large share
            means that the statistics no longer fit), `sampling_entropy` in nats at T_b; empty if nothing was changed.
        """
        entropy = self.trace().get("entropy")  # (B, steps)
        if entropy is None:
            return {}
        if lengths is not None:
            steps = torch.arange(entropy.size(1), device=entropy.device)
            entropy = entropy[steps < torch.as_tensor(lengths, device=entropy.device)[:, None]]
        factor = self._factor(entropy)
        values = torch.stack([factor.mean(), self._is_clamped(entropy, factor).float().mean(), entropy.mean()]).tolist()
        return dict(zip(("temperature_factor", "temperature_clamped", "sampling_entropy"), values, strict=True))

    def _factor(self, entropy: Tensor) -> Tensor:
        return adaptive_temperature(entropy, self._stats, 1.0, self.tau, self.form, self.sign, self.floor)

    @property
    def _stats(self) -> EntropyStats | None:
        return self.stats if isinstance(self.stats, EntropyStats) else None

    def _is_clamped(self, entropy: Tensor, factor: Tensor) -> Tensor:
        assert self._stats is not None
        if self.form == "zscore":
            return factor <= ZSCORE_FLOOR
        log_h = log_entropy(entropy, self.floor)
        return (log_h <= self._stats.low.to(log_h)) | (log_h >= self._stats.high.to(log_h))


@dataclass(frozen=True)
class AdaptiveTemperatureConfig(DecodingModule):
    """HAPO part A: sampling temperature of every token from the entropy of its row."""

    tau: float = 0.05
    """Strength: the temperature moves by at most this fraction (bounded); 0 is the plain sampler."""
    form: Form = "bounded"
    """`bounded` as released, or `zscore` as Eq. 8 of the paper's second version (with tau 0.1)."""
    sign: Sign = "signed"
    """`signed` cools below the pivot; `released` heats there too, as the authors' code does (bounded only)."""
    rho: float = 0.8
    """Quantile of log-entropy where the temperature is unchanged."""
    floor: float = LOG_FLOOR
    """Smallest entropy (nats) told apart from 0, in the statistics and in the sampler."""

    needs = ("entropy_stats",)
    stage = "temperature"

    def __post_init__(self) -> None:
        check_options(self.tau, self.form, self.sign)
        if not 0.0 <= self.rho <= 1.0:
            raise ValueError(f"rho={self.rho} is not in [0, 1]; it is the quantile that splits low from high entropy")
        if not self.floor > 0.0:
            raise ValueError(f"floor={self.floor} must be > 0; it replaces entropies that round to zero")

    @property
    def is_neutral(self) -> bool:
        """True if it can never change a sample."""
        return self.tau == 0

    def processor(self, context: DecodingContext) -> AdaptiveTemperature | None:
        """The processor of one generate call; None where it changes nothing (also before the first statistics)."""
        if self.is_neutral or context.entropy_stats is None:
            return None
        return AdaptiveTemperature(
            context.entropy_stats, self.tau, context.temperature, self.form, self.sign, self.floor
        )


def check_temperature(base: float) -> None:
    """Raise ValueError unless the base temperature is positive."""
    if not base > 0:
        raise ValueError(f"base={base} must be > 0; it is the sampling temperature")


def check_options(tau: float, form: str, sign: str) -> None:
    """Raise ValueError for options that do not go together or would reach a temperature of 0."""
    if form not in get_args(Form):
        raise ValueError(f"form={form!r} is unknown; allowed: 'bounded', 'zscore'")
    if sign not in get_args(Sign):
        raise ValueError(f"sign={sign!r} is unknown; allowed: 'signed', 'released'")
    if not tau >= 0.0:
        raise ValueError(f"tau={tau} must be >= 0; it is the strength of the temperature change")
    if form == "bounded" and not tau < 1.0:
        raise ValueError(f"tau={tau} must be < 1 with form='bounded', or the temperature reaches 0")
    if form == "zscore" and sign == "released":
        raise ValueError("sign='released' exists for form='bounded' only; set sign='signed' or form='bounded'")
