"""Budget forcing (S1): a least and a greatest number of thinking tokens, and ends of thinking that become "Wait".

S1 drops the end that a model sampled too early and appends the text "Wait". A sampled token cannot be taken back here,
so the end's probability moves to the text's first token w before sampling, which makes the same next token:

    z'[w] = T logsumexp_{v in {w} and E} z[v] / T,   z'[e] = -inf for e in E      E = end of thinking, end of sequence

while the row thinks, and fewer than `ignore` ends were ignored or n < min_tokens; greedy is the limit T -> 0, the
maximum. Every other token keeps its log-probability. At n = max_tokens a row that still thinks gets the tokens of the
end and of `final_text`, one per step, each with log-probability 0. n counts tokens generated so far in the row. With
min_tokens 0, ignore 0 and max_tokens None it is the plain sampler, bit for bit.

    S1                          here          default
    minimum                     min_tokens    0 tokens
    maximum                     max_tokens    32000 tokens (README)
    times the end is ignored    ignore        1 (README)
    "Wait"                      wait_text     "Wait"; of several tokens, the others are forced after w
    end-of-thinking delimiter   end           </think> if the tokenizer has it

Example, T = 1, probabilities w 0.1, end 0.3, end of sequence 0.1, other 0.5: w gets 0.5, other keeps 0.5, and the
importance ratio pi / mu of w is 0.1 / 0.5, the probability that the policy chose the word by itself.

Whether a w was chosen or stands for an end cannot be seen: it counts as an ignored end, and the rest of a text of
several tokens follows, if the ends were likelier than w in its step. So with greedy decoding, and with `min_tokens`
alone and a text of one token, whole texts have exactly S1's distribution; with `ignore` and sampling each step has it,
given the count. Where the logits of earlier steps are unknown (a direct call with a longer history), every w that may
stand for an end counts.

The learner must not train on forced tokens (`forced_ids`, log-probability 0), and it sees no probability for ends that
are ignored: those have no weight. The temperature must be the engine's; under an adaptive temperature or truncation
the mass moves at the base temperature, before them. List it after methods that bias words.

Source: arXiv 2501.19393 and its README. Published for decoding only, without any result of RL.
Left out: several different continuation texts.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rltok.sampling.processor import (
    Columns,
    DecodingContext,
    DecodingModule,
    GenerationSettings,
    RolloutProcessor,
    Rows,
)
from rltok.sampling.words import ThinkingSpan, span_ids, token_ids


@dataclass(eq=False)
class BudgetForcingLogitsProcessor(RolloutProcessor):
    """Budgets of every row by itself; without any budget it returns the very tensor it got.

    Columns, one entry per row: the thinking span, `ignored` ends so far, `pending` (the newest w, if it comes now, is
    an ignored end), `cursor` into the tokens to force (0: none); and how many tokens the row had when the newest
    ignored end was entered, `ignored_at`, and when it reached the greatest budget, `cut_at` (-1: never).
    """

    wait_ids: Sequence[int] = ()
    """continuation text; its first token gets the mass of the ends"""
    end_ids: Sequence[int] = ()
    """end-of-thinking delimiter; one token where ends are to be ignored"""
    eos_ids: Sequence[int] = ()
    """end-of-sequence tokens, which end thinking too"""
    final_ids: Sequence[int] = ()
    """text forced after the delimiter at the greatest budget"""
    min_tokens: int = 0
    max_tokens: int | None = 32000
    ignore: int = 1
    base: float = 1.0
    """T by which the engine divides; 0 is greedy. `begin` checks it, and learns of greedy decoding"""
    start_ids: Sequence[int] = ()
    """text that opens the thinking span; empty: open from the first token"""
    prompt_length: int | None = None

    memory = "logits"
    traced = ("forced",)
    kept = ("ignored", "ignored_at", "cut_at")

    def __post_init__(self) -> None:
        for name in ("wait_ids", "end_ids", "eos_ids", "final_ids", "start_ids"):
            setattr(self, name, tuple(getattr(self, name)))
        check_budgets(self.min_tokens, self.max_tokens, self.ignore)
        if not (self.base >= 0 and math.isfinite(self.base)):
            raise ValueError(f"base={self.base} must be finite and >= 0; it is the sampling temperature, 0 is greedy")
        self._moves = self.min_tokens > 0 or self.ignore > 0
        self._ends = tuple(dict.fromkeys((*self.end_ids, *self.eos_ids)))
        if self._moves:
            self._check_move()
        self._tail = tuple(self.wait_ids[1:]) if self._moves else ()
        self._last = () if self.max_tokens is None else self._last_words()
        self._span = ThinkingSpan(tuple(self.start_ids), tuple(self.end_ids))
        self._greedy = self.base == 0
        self._on: dict[torch.device, tuple[Tensor, Tensor, Tensor, Tensor]] = {}

    @property
    def is_neutral(self) -> bool:
        """True without any budget."""
        return not self._moves and self.max_tokens is None

    @property
    def forced_ids(self) -> frozenset[int]:
        """Tokens that can be forced: the continuation after its first, the delimiter, the final text."""
        return frozenset((*self._tail, *self._last))

    def begin(self, prompt_length: int, settings: GenerationSettings) -> None:
        """Forget an earlier call; the base temperature must be the one that generate divides by, or it is greedy."""
        actual = 1.0 if settings.temperature is None else settings.temperature
        if self._moves and settings.do_sample and actual != self.base:
            raise ValueError(f"budget forcing was built for temperature={self.base} but generate uses {actual}")
        self._greedy = not settings.do_sample
        super().begin(prompt_length, settings)

    def columns(self, rows: int, device: torch.device) -> Columns:
        """Rows that have generated nothing and ignored no end."""
        columns = self._span.columns(rows, device)
        zeros = torch.zeros(rows, dtype=torch.long, device=device)
        # Until `apply` knows better, an occurrence of w is an ignored end.
        columns |= {"ignored": zeros, "cursor": zeros.clone(), "pending": torch.ones_like(columns["inside"])}
        columns |= {name: torch.full_like(zeros, -1) for name in ("ignored_at", "cut_at")}
        self._cut(zeros, columns)
        return columns

    def observe(self, rows: Rows, columns: Columns) -> None:
        """Count an ignored end, follow a forced text, end the thinking span."""
        tokens, following, _, eos = self._tensors(rows.last.device)
        cursor = columns["cursor"]
        if self._moves:
            counted = self._ignores(rows.position - 1, columns) & columns["pending"] & (rows.last == self.wait_ids[0])
            columns["ignored"] += counted
            columns["ignored_at"].copy_(torch.where(counted, rows.position, columns["ignored_at"]))
        # A row that has not got the token it was forced to (a finished one, a foreign history) leaves the text.
        cursor.copy_(torch.where(rows.last == tokens[cursor], following[cursor], torch.zeros_like(cursor)))
        if self._tail:
            cursor.copy_(torch.where(counted, torch.ones_like(cursor), cursor))
        self._span.observe(rows, columns)
        columns["ended"] |= (rows.last[:, None] == eos).any(1)
        columns["inside"] &= ~columns["ended"]
        if self._can_cut(rows.furthest):
            self._cut(rows.position, columns)

    def apply(self, scores: Tensor, rows: Rows, columns: Columns) -> Tensor:
        """Move the mass of ends that are to be ignored, and force what must come, in place."""
        columns["forced"] = columns["cursor"] > 0
        if self._moves:
            self._move_ends(scores, rows, columns)
        if self._tail or self._can_cut(rows.furthest):
            self._force(scores, columns)
        return scores

    def metrics(self, lengths: Sequence[int] | None = None) -> dict[str, float]:
        """Means over the completions of the last call; waits for the device once.

        Args:
            lengths: tokens of each completion. With them only what happened before the last token was drawn counts, on
                every engine; None counts also what `generate` enters after a row's end.

        Returns:
            `budget_ends_ignored` ends ignored per completion, `budget_cut` share of completions that reached
            max_tokens while thinking; empty before any call.
        """
        final = self.final()
        if not final:
            return {}
        ignored, cut = final["ignored"], final["cut_at"] >= 0
        if lengths is not None:
            ends = torch.as_tensor(lengths, device=ignored.device)
            # behind the last token there is padding, so the one ignored end too many is the last token itself
            ignored = ignored - (final["ignored_at"] >= ends).long()
            cut = cut & (final["cut_at"] < ends)
        values = torch.stack([ignored.float().mean(), cut.float().mean()]).tolist()
        return dict(zip(("budget_ends_ignored", "budget_cut"), values, strict=True))

    def _ignores(self, position: Tensor, columns: Columns) -> Tensor:
        """(B,) bool, rows in which an end at this position is to be ignored."""
        due = (columns["ignored"] < self.ignore) | (position < self.min_tokens)
        return columns["inside"] & (columns["cursor"] == 0) & due

    def _move_ends(self, scores: Tensor, rows: Rows, columns: Columns) -> None:
        _, _, group, _ = self._tensors(scores.device)
        active = self._ignores(rows.position, columns)
        old = scores[:, group]  # (B, 1 + E): w, then the ends
        word, ends = self._mass(old[:, :1]), self._mass(old[:, 1:])
        new = torch.full_like(old, -math.inf)
        new[:, 0] = torch.maximum(word, ends) if self._greedy else self._mass(torch.stack([word, ends], dim=1))
        scores[:, group] = torch.where(active[:, None], new, old)
        columns["pending"].copy_(active & (ends > word))

    def _mass(self, logits: Tensor) -> Tensor:
        """(B, k) logits -> (B,) the one logit with their mass together, at least float32."""
        logits = logits if logits.dtype == torch.float64 else logits.float()
        return logits.amax(-1) if self._greedy else self.base * (logits / self.base).logsumexp(-1)

    def _force(self, scores: Tensor, columns: Columns) -> None:
        """Rows with a token to force: all others -inf, its own logit kept (0 where it was forbidden)."""
        forced = columns["cursor"] > 0
        if scores.device.type == "cpu" and not forced.any():
            return
        token = self._tensors(scores.device)[0][columns["cursor"]].clamp(min=0)[:, None]
        own = scores.gather(1, token)
        own = torch.where(forced[:, None] & ~own.isfinite(), torch.zeros_like(own), own)
        scores.masked_fill_(forced[:, None], -math.inf)
        scores.scatter_(1, token, own)

    def _can_cut(self, furthest: int) -> bool:
        return self.max_tokens is not None and furthest >= self.max_tokens

    def _cut(self, position: Tensor, columns: Columns) -> None:
        """Rows that still think at the greatest budget start their last words; a delimiter half written is finished."""
        if self.max_tokens is None:
            return
        due = columns["inside"] & (position >= self.max_tokens)
        begun = columns["at_end"] if self.end_ids else torch.zeros_like(position)
        columns["cursor"].copy_(torch.where(due, 1 + len(self._tail) + begun, columns["cursor"]))
        columns["cut_at"].copy_(torch.where(due, position, columns["cut_at"]))
        columns["ended"] |= due
        columns["inside"] &= ~due

    def _last_words(self) -> tuple[int, ...]:
        words = (*self.end_ids, *self.final_ids) or tuple(self.eos_ids[:1])
        if not words:
            raise ValueError(
                f"max_tokens={self.max_tokens} needs a way to end thinking, but there is no delimiter, no final text "
                "and no end-of-sequence token: set end, final_text or max_tokens=null"
            )
        return words

    def _check_move(self) -> None:
        budgets = f"min_tokens={self.min_tokens}, ignore={self.ignore}"
        if len(self.end_ids) > 1:
            raise ValueError(
                f"{budgets} move the probability of one token, but the end of thinking is {len(self.end_ids)} tokens "
                f"({list(self.end_ids)}): set end to a text of one token, or min_tokens=0 and ignore=0"
            )
        if not self._ends:
            raise ValueError(f"{budgets} need an end to ignore: the tokenizer has no end-of-sequence token, set end")
        if not self.wait_ids:
            raise ValueError(f"{budgets} need a text that continues: wait_text has no tokens")
        both = set(self.wait_ids) & set(self._ends)
        if both:
            raise ValueError(f"wait_text holds token(s) {sorted(both)} that end thinking: change wait_text")

    def _tensors(self, device: torch.device) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Tokens to force by cursor, the cursor that follows, [w, *ends], end-of-sequence tokens."""
        if device not in self._on:
            script = (-1, *self._tail, *self._last)
            following = [cursor + 1 for cursor in range(len(script))]
            following[0] = following[len(self._tail)] = following[-1] = 0
            group = (*self.wait_ids[:1], *self._ends)
            script_on, following_on, group_on, eos_on = (
                torch.tensor(ids, dtype=torch.long, device=device) for ids in (script, following, group, self.eos_ids)
            )
            self._on[device] = (script_on, following_on, group_on, eos_on)
        return self._on[device]


@dataclass(frozen=True)
class BudgetForcingConfig(DecodingModule):
    """A least and a greatest number of thinking tokens; ends of thinking that come too early become "Wait"."""

    min_tokens: int = 0
    """Tokens before which every end of thinking is ignored."""
    max_tokens: int | None = 32000
    """Tokens after which thinking is ended; null is never."""
    ignore: int = 1
    """Ends of thinking that are ignored in every completion, besides those before min_tokens."""
    wait_text: str = "Wait"
    """What stands in place of an ignored end; a text of several tokens is forced from its second token on."""
    end: str | None = "auto"
    """Text that ends thinking; `auto` is </think> if the tokenizer has it; null: the end of the sequence alone."""
    final_text: str = ""
    """Text forced after the end at max_tokens, such as "Final Answer:"."""
    think_start: str | None = None
    """Text that opens the thinking span; null: open from the first generated token."""

    forces = True
    engines = ("fast", "transformers", "vllm_colocate", "vllm_server")

    def __post_init__(self) -> None:
        check_budgets(self.min_tokens, self.max_tokens, self.ignore)
        if not self.wait_text and (self.min_tokens or self.ignore):
            raise ValueError(
                f"wait_text='' but min_tokens={self.min_tokens}, ignore={self.ignore} put it in place of an end: "
                "name a text, or set both to 0"
            )

    @property
    def is_neutral(self) -> bool:
        """True if it can never change a sample."""
        return not (self.min_tokens or self.ignore) and self.max_tokens is None

    def processor(self, context: DecodingContext) -> BudgetForcingLogitsProcessor:
        """The processor of one generate call.

        Raises:
            ValueError: ends are to be ignored but the delimiter is several tokens, or there is nothing to end with.
        """
        assert context.tokenizer is not None
        tokenizer = context.tokenizer
        end_ids, start_ids = span_ids(tokenizer, self.end, self.think_start)
        return BudgetForcingLogitsProcessor(
            wait_ids=token_ids(tokenizer, self.wait_text) if self.min_tokens or self.ignore else (),
            end_ids=end_ids,
            eos_ids=context.end_of_sequence,
            final_ids=token_ids(tokenizer, self.final_text) if self.final_text else (),
            min_tokens=self.min_tokens,
            max_tokens=self.max_tokens,
            ignore=self.ignore,
            base=context.temperature,
            start_ids=start_ids,
        )

    def forced_ids(self, context: DecodingContext) -> frozenset[int]:
        """The continuation after its first token, the delimiter and the final text."""
        return frozenset() if self.is_neutral else self.processor(context).forced_ids


def check_budgets(min_tokens: int, max_tokens: int | None, ignore: int) -> None:
    """Raise ValueError for budgets that contradict each other."""
    if min_tokens < 0:
        raise ValueError(f"min_tokens={min_tokens} must be >= 0; 0 sets no least budget")
    if ignore < 0:
        raise ValueError(f"ignore={ignore} must be >= 0; it is how many ends of thinking are ignored")
    if max_tokens is not None and max_tokens < min_tokens:
        raise ValueError(f"max_tokens={max_tokens} is below min_tokens={min_tokens}: raise it, or null for no maximum")
