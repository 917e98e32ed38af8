"""CyclicReflex: a triangular wave over the position lifts and lowers the logits of reflection words.

    delta(n) = A | 4 ((n + s C - C / 4) mod C) / C - 2 | - A          n = tokens generated so far in the row
    z[v] += delta(n)      v in the word list, while the row still thinks and n lies in a window

delta is 0 at n = 0, +A at C/4, 0 at C/2, -A at 3C/4: a completion starts by being encouraged to reflect. The bias acts
on raw logits, before temperature and truncation. A = 0 is the plain sampler, bit for bit.

    paper   here              default
    A       amplitude         5.0, in logits (tuned per benchmark: 1 to 10)
    C       period            600 tokens (tuned per benchmark: 200 to 2000)
    s       phase             0, in periods
    phi     windows           [[0, 8192]], half-open ranges of n

Example, A = 3, C = 100: n = 0, 10, 25, 50, 60, 75, 90 give 0, 1.2, 3, 0, -1.2, -3, -1.2. Logits (1, 0.5, 0), word 0,
n = 10, T = 0.6: log-probabilities (-0.081007, -2.914340, -3.747673), ratios pi / mu (0.667937, 4.935421, 4.935421).

The sampler differs from the learner; token-level truncated weights are the default (`rltok.correction`), and in
training a small amplitude (1 or 2) keeps them near 1. In a tool loop n counts from 0 in every turn.

Source: arXiv 2506.11077. The authors bias bare vocabulary strings only (`variants: bare`), with byte-level BPE the
sentence-initial forms. Left out: the beam search of their test-time folder, and the Silver schedule.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rltok.sampling.processor import Columns, DecodingContext, DecodingModule, Rows
from rltok.sampling.word_bias import WordBias, add_to_words
from rltok.sampling.words import (
    REFLECTION_WORDS,
    Variants,
    resolve_word_ids,
    span_ids,
)

Windows = Sequence[Sequence[int]]


def triangular_wave(position: Tensor | float, period: float, amplitude: float, phase: float = 0) -> Tensor:
    """Bias at a position: A |4 ((n + s C - C/4) mod C) / C - 2| - A, of mean 0 over a period; amplitude 0 gives 0.

    Args:
        position: n, tokens generated so far, any shape.
        period: C > 0, in tokens; need not be whole.
        amplitude: A >= 0, in logits.
        phase: s, fraction of a period by which the wave is ahead.

    Returns:
        Tensor of position's shape in [-A, A], at least float32.

    Raises:
        ValueError: an option out of range.
    """
    check_wave(amplitude, period, phase)
    n = torch.as_tensor(position)
    if not n.is_floating_point():
        n = n.to(torch.float32 if n.device.type == "mps" else torch.float64)
    turn = torch.remainder(n + phase * period - period / 4, period) / period
    wave = amplitude * (4 * turn - 2).abs() - amplitude
    return wave if torch.as_tensor(position).is_floating_point() else wave.float()


def triangular_bias(position: Tensor, amplitude: float, period: float, shift: float = 0.0) -> Tensor:
    """`triangular_wave` with its arguments in the order of the method's description."""
    return triangular_wave(position, period, amplitude, shift)


@dataclass(frozen=True)
class ReflectionSchedule:
    """The wave within windows of the position: position -> bias in logits."""

    amplitude: float = 5.0
    period: float = 600.0
    shift: float = 0.0
    windows: Windows | None = None
    """half-open ranges of the position where the bias acts; None is everywhere"""

    def __post_init__(self) -> None:
        check_wave(self.amplitude, self.period, self.shift)
        check_windows(self.windows)

    def __call__(self, position: Tensor) -> Tensor:
        """(B,) positions -> (B,) biases, 0 outside the windows."""
        wave = triangular_wave(position, self.period, self.amplitude, self.shift)
        if self.windows is None:
            return wave
        inside = torch.zeros_like(wave, dtype=torch.bool)
        for low, high in self.windows:
            inside |= (position >= low) & (position < high)
        return torch.where(inside, wave, torch.zeros_like(wave))


def apply(
    logits: Tensor,
    position: Tensor,
    active: Tensor,
    word_ids: Sequence[int],
    bias: Callable[[Tensor], Tensor] | Tensor,
) -> Tensor:
    """A copy of the logits with the words of active rows biased.

    Args:
        logits: (B, V), at temperature 1.
        position: (B,) tokens generated so far.
        active: (B,) bool, rows that still think.
        word_ids: token ids of the words; duplicates count once.
        bias: a schedule of the position, or (B,) biases.
    """
    delta = bias if isinstance(bias, Tensor) else bias(position)
    index = torch.tensor(sorted(set(word_ids)), device=logits.device)
    return add_to_words(logits.clone(), index, torch.where(active, delta, torch.zeros_like(delta)))


@dataclass(eq=False)
class CyclicReflexLogitsProcessor(WordBias):
    """The wave on `word_ids`, of every row by itself; amplitude 0 returns the very tensor it got.

    Args as `CyclicReflexConfig`, with token ids in place of words.
    """

    amplitude: float = 5.0
    period: float = 600.0
    phase: float = 0.0
    windows: Windows | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self._schedule = ReflectionSchedule(self.amplitude, self.period, self.phase, self.windows)

    @property
    def is_neutral(self) -> bool:
        """True at amplitude 0."""
        return self.amplitude == 0

    def delta(self, rows: Rows, columns: Columns) -> Tensor:
        """(B,) wave at each row's position, 0 where the row does not think."""
        wave = self._schedule(rows.position)
        return torch.where(columns["inside"], wave, torch.zeros_like(wave))


@dataclass(frozen=True)
class CyclicReflexConfig(DecodingModule):
    """A triangular wave over the position on the logits of reflection words."""

    amplitude: float = 5.0
    """Height of the wave in logits; 0 is the plain sampler. In training 1 or 2 keep importance weights near 1."""
    period: float = 600.0
    """Length of the wave in tokens."""
    phase: float = 0.0
    """Fraction of a period by which the wave is ahead."""
    words: tuple[str, ...] = REFLECTION_WORDS
    """Words whose tokens are biased; one of several tokens is left out with a warning."""
    variants: Variants = "bare"
    """Spellings: `bare` as the authors do, `space` with a leading space, `both`, `all` in every case as well."""
    windows: tuple[tuple[int, int], ...] | None = ((0, 8192),)
    """Half-open ranges of the position where the bias acts; null is everywhere."""
    think_end: str | None = "auto"
    """Text that ends the thinking span; `auto` is </think> if the tokenizer has it; null: the span never ends."""
    think_start: str | None = None
    """Text that opens the span; null: open from the first generated token, as where the prompt ends with <think>."""

    def __post_init__(self) -> None:
        check_wave(self.amplitude, self.period, self.phase)
        check_windows(self.windows)
        if not self.words:
            raise ValueError("words is empty: name at least one word to bias")

    @property
    def is_neutral(self) -> bool:
        """True if it can never change a sample."""
        return self.amplitude == 0

    def processor(self, context: DecodingContext) -> CyclicReflexLogitsProcessor:
        """The processor of one generate call."""
        assert context.tokenizer is not None
        end_ids, start_ids = span_ids(context.tokenizer, self.think_end, self.think_start)
        return CyclicReflexLogitsProcessor(
            resolve_word_ids(context.tokenizer, self.words, self.variants),
            self.amplitude,
            self.period,
            self.phase,
            self.windows,
            end_ids=end_ids,
            start_ids=start_ids,
        )


def check_wave(amplitude: float, period: float, phase: float) -> None:
    """Raise ValueError for a wave that does not exist."""
    if not (amplitude >= 0 and math.isfinite(amplitude)):
        raise ValueError(f"amplitude={amplitude} must be finite and >= 0; a phase of 0.5 turns the wave over")
    if not (period > 0 and math.isfinite(period)):
        raise ValueError(f"period={period} must be finite and > 0; it is the length of the wave in tokens")
    if not math.isfinite(phase):
        raise ValueError(f"phase={phase} must be finite; it is a fraction of a period")


def check_windows(windows: Windows | None) -> None:
    """Raise ValueError unless every window is a half-open range [low, high) with 0 <= low < high."""
    for window in () if windows is None else windows:
        if len(window) != 2 or not 0 <= window[0] < window[1]:
            raise ValueError(f"windows has {list(window)}; each is [low, high) with 0 <= low < high, in tokens")
