"""One decoding method at work, in a form that every rollout engine can run.

A processor sees the rows of one decoding step: how many tokens each row has generated, its newest token, its logits.
What it must remember of a row it keeps in columns, tensors with one entry per row, so that an engine may add, move and
drop rows at any step. `transformers.generate` needs no engine code: `__call__` drives the same three methods.

    columns(rows, device)            the memory of fresh rows
    observe(rows, columns)           take in the newest token of every row
    apply(scores, rows, columns)     change the scores of the step
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol

import torch
from torch import Tensor
from transformers import LogitsProcessor

from rltok.correction import CorrectionConfig
from rltok.entropy import EntropyStats

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

ENGINES = ("fast", "transformers", "continuous_batching", "vllm_colocate", "vllm_server")
"""Every rollout engine: the loop of `rltok.fast`, then those that TRL drives itself."""

Columns = dict[str, Tensor]
"""Memory of a processor, one entry per row in every tensor; values of the last step that are worth a record too."""


@dataclass(frozen=True)
class Rows:
    """The rows of one decoding step, B of them, in any order and at any position."""

    position: Tensor
    """(B,) int64, tokens generated so far; prompt and padding do not count"""
    last: Tensor
    """(B,) int64, the newest generated token; any id where position is 0"""
    furthest: int
    """a bound of position that is known without waiting for the device"""


class GenerationSettings(Protocol):
    """What a processor may read of transformers' GenerationConfig when a call starts."""

    temperature: float | None
    do_sample: bool | None
    output_logits: bool | None


class RolloutProcessor(LogitsProcessor):
    """A decoding method at work. Subclasses write `apply`, and `columns` and `observe` if a row has a memory.

    Called as a logits processor, on left-padded ids of shape (B, S) and scores of shape (B, V), it finds out by itself
    whether a call continues the one before; any other call starts afresh, so nothing is inherited. The generated part
    begins at `prompt_length` if that is set or `begin` was called, else at the length of the first call's ids.
    """

    memory: Literal["none", "ids", "logits"] = "ids"
    """what the columns depend on: nothing, the generated ids (which can be replayed), or also the logits of earlier
    steps (which cannot)"""
    traced: ClassVar[tuple[str, ...]] = ()
    """columns whose values of every step are recorded during `generate`"""
    kept: ClassVar[tuple[str, ...]] = ()
    """columns of which the value that a row has when its last token is drawn is kept for `metrics`"""

    prompt_length: int | None = None
    """columns of `input_ids` before the first generated token, left padding included; None: those of a first call"""

    _columns: Columns
    _ids: Tensor | None = None  # (B, S) of the call before
    _start = 0
    _controlled = False  # begin was called: every call continues the one before it
    _may_overwrite = False
    _record: dict[str, list[Tensor]]
    _final: Mapping[str, Tensor] | None = None

    @property
    def is_neutral(self) -> bool:
        """True if it never changes a score."""
        return False

    def columns(self, rows: int, device: torch.device) -> Columns:
        """Memory of rows that have generated nothing."""
        return {}

    def observe(self, rows: Rows, columns: Columns) -> None:
        """Enter the newest token of every row, all of position >= 1, into the columns, in place."""

    def apply(self, scores: Tensor, rows: Rows, columns: Columns) -> Tensor:
        """(B, V) scores of this step, which it may overwrite -> (B, V) scores."""
        raise NotImplementedError

    def begin(self, prompt_length: int, settings: GenerationSettings) -> None:
        """Called before the first step of a `generate` call.

        Args:
            prompt_length: columns of `input_ids` before the first generated token, left padding included.
            settings: the generation config in force.
        """
        self.prompt_length = prompt_length
        self._controlled, self._may_overwrite = True, not settings.output_logits
        self._ids = self._final = None

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """(B, S) ids so far, (B, V) scores -> (B, V) scores; the very tensor where it is neutral."""
        if self.is_neutral:
            return scores
        rows = self._advance(input_ids, scores)
        out = self.apply(scores if self._may_overwrite else scores.clone(), rows, self._columns)
        for name in self.traced:
            self._record.setdefault(name, []).append(self._columns[name])
        return out

    def trace(self) -> dict[str, Tensor]:
        """Name -> (B, steps), the traced values of the last `generate` call."""
        return {name: torch.stack(values, dim=1) for name, values in getattr(self, "_record", {}).items()}

    def take_trace(self, traced: Mapping[str, Tensor]) -> None:
        """Take over what an engine recorded, name -> (B, steps), in place of the calls' own record."""
        self._record = {name: list(values.unbind(dim=1)) for name, values in traced.items()}

    def take_final(self, values: Mapping[str, Tensor]) -> None:
        """Take over what an engine kept of every row, name of `kept` -> (B, ...); empty where it ran no row."""
        self._final = dict(values)

    def final(self) -> Mapping[str, Tensor]:
        """Name of `kept` -> (B, ...): what an engine kept, else the columns as they are; empty before any call.

        In transformers' `generate` a row that has ended goes on beside the others: what a method enters after a row's
        end it must be able to tell (see `metrics` of budget forcing).
        """
        if self._final is not None:
            return self._final
        return {} if self._ids is None else {name: self._columns[name] for name in self.kept}

    def metrics(self, lengths: Sequence[int] | None = None) -> dict[str, float]:
        """Numbers of the last call, for the log; `lengths` are the completions' lengths."""
        return {}

    def settings(self) -> dict[str, Any]:
        """Arguments that make this processor again, in plain values: how it reaches an engine in another process."""
        assert dataclasses.is_dataclass(self)
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self) if field.init}

    def _advance(self, input_ids: Tensor, scores: Tensor) -> Rows:
        """Bring the columns up to `input_ids`; only the newest token is read where the call continues the last one."""
        if self.memory == "none":
            if self._ids is None:
                self._columns, self._record, self._ids = {}, {}, scores.new_zeros(0)
            zeros = torch.zeros(scores.size(0), dtype=torch.long, device=scores.device)
            return Rows(zeros, zeros, 0)
        length, known = input_ids.size(1), self._ids
        if known is not None and self._continues(known, input_ids):
            rows = self._rows(input_ids, length)
            self.observe(rows, self._columns)
        else:
            self._start = length if self.prompt_length is None else self.prompt_length
            if length < self._start:
                raise ValueError(f"prompt_length={self._start} but input_ids have only {length} columns")
            self._columns, self._record = self.columns(input_ids.size(0), scores.device), {}
            for end in range(self._start + 1, length + 1):
                self.observe(self._rows(input_ids, end), self._columns)
            rows = self._rows(input_ids, length)
        self._ids = input_ids
        return rows

    def _continues(self, known: Tensor, input_ids: Tensor) -> bool:
        grown = input_ids.shape == (known.size(0), known.size(1) + 1)
        return grown and (self._controlled or torch.equal(input_ids[:, :-1], known))

    def _rows(self, input_ids: Tensor, length: int) -> Rows:
        position = length - self._start
        count = torch.full((input_ids.size(0),), position, dtype=torch.long, device=input_ids.device)
        return Rows(count, input_ids[:, length - 1], position)


@dataclass(frozen=True)
class DecodingContext:
    """What a decoding module may use to make its processor; a module names what it needs in `needs`."""

    temperature: float = 1.0
    """T_b that the engine divides by"""
    entropy_stats: EntropyStats | None = None
    """log-entropy statistics of the previous generation batch; None before the first"""
    tokenizer: PreTrainedTokenizerBase | None = None
    """to turn words into token ids"""
    eos_ids: tuple[int, ...] | None = None
    """tokens that end a sequence; None: the tokenizer's own"""

    @property
    def end_of_sequence(self) -> tuple[int, ...]:
        """Tokens that end a sequence, of whatever source."""
        if self.eos_ids is not None:
            return self.eos_ids
        own = None if self.tokenizer is None else self.tokenizer.eos_token_id
        return () if own is None else (own,)


class DecodingModule:
    """Settings of one decoding method: the base of every entry of `rltok.sampling.DECODING`, a frozen dataclass."""

    needs: ClassVar[tuple[str, ...]] = ()
    """signals that the trainer must compute for it, such as `entropy_stats`"""
    stage: ClassVar[Literal["logits", "temperature"]] = "logits"
    """`logits` changes logits at temperature 1, `temperature` scales them and comes after"""
    restricts: ClassVar[bool] = False
    """True if it gives some token that the policy may choose probability 0, which no weight can repair"""
    forces: ClassVar[bool] = False
    """True if it puts tokens in place of samples (`forced_ids`)"""
    engines: ClassVar[tuple[str, ...]] = ENGINES
    """rollout engines that can run it; the trainer refuses the others"""
    recommended: ClassVar[CorrectionConfig] = CorrectionConfig()
    """correction that goes with it where a recipe names none"""

    @property
    def is_neutral(self) -> bool:
        """True if it can never change a sample."""
        raise NotImplementedError

    def processor(self, context: DecodingContext) -> RolloutProcessor | None:
        """The processor of one generate call, None where it changes nothing.

        Raises:
            ValueError: the tokenizer does not have what the settings name.
        """
        raise NotImplementedError

    def forced_ids(self, context: DecodingContext) -> frozenset[int]:
        """Tokens that it can put in place of a sample; where one was certain, the loss leaves it out."""
        return frozenset()


def run_order(modules: Sequence[DecodingModule]) -> list[DecodingModule]:
    """Decoding methods in the order they must run: given order, temperatures last."""
    return sorted(modules, key=lambda module: module.stage == "temperature")


def make_processors(modules: Sequence[DecodingModule], context: DecodingContext) -> list[RolloutProcessor]:
    """Processors of one generate call in the order they must run."""
    made = (module.processor(context) for module in run_order(modules) if not module.is_neutral)
    return [processor for processor in made if processor is not None]
