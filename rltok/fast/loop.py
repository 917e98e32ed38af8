"""A rollout loop for decoder-only transformers models that computes no row longer than it must.

Equal prompts are prefilled once and their cache is copied to the rows that begin with them; rows that end leave the
batch; waiting rows enter the freed places; the cache is written in place (`cache.py` says how rows are aligned, and why
positions, masks and sliding windows are exact). One step is

    decode      the newest token of every row -> logits; processors observe that token
    admit       prefill waiting prompts, put them behind the other rows
    sample      repetition penalty, minimum length, processors, temperature, top-k, top-p, min-p, record, draw
    leave       ended rows make room

The model is called in evaluation mode and without gradients, and gets nothing but arguments: ids, a mask where rows are
padded, position ids counted from each row's own first token, and the cache. Processors run through `columns`, `observe`
and `apply`; what they remember of a row moves with the row. A token drawn in a row depends on the row's logits and on
its key alone (`row_random.py`), so other batch sizes give the same tokens up to floating-point ties.
"""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from rltok.fast.cache import BlockCache, Entry, RowCache
from rltok.fast.history import RepetitionPenalty, StopStrings
from rltok.fast.inputs import check_inputs
from rltok.fast.records import LastValues, Records
from rltok.fast.result import LoopMetrics, LoopProgress, LoopResult
from rltok.fast.row_random import largest, no_token, pick, streams, uniforms_of
from rltok.fast.serve import evaluation_mode, forward_arguments, servable_model
from rltok.fast.settings import LoopSettings, warp
from rltok.sampling import RolloutProcessor, Rows
from rltok.sampling.processor import Columns

CacheFactory = Callable[..., RowCache]
"""(config, rows, block=...) -> cache"""


def generate_rows(
    model: Any,
    prompts: Sequence[Sequence[int]],
    keys: Sequence[int] | None,
    settings: LoopSettings,
    processors: Sequence[RolloutProcessor] = (),
    record: bool = True,
    *,
    tokenizer: Any = None,
    on_progress: Callable[[LoopProgress], None] | None = None,
    cache: CacheFactory = BlockCache,
) -> LoopResult:
    """One completion of every prompt.

    Args:
        model: a decoder-only transformers model, or a PEFT model around one; as before afterwards.
        prompts: token ids without padding (`unpad` takes it off); equal prompts are computed once.
        keys: of each completion's random numbers, see `row_key`; may be None with temperature 0.
        settings: how to sample.
        processors: act on the logits before the temperature, in this order (see `make_processors`).
        record: keep log-probabilities.
        tokenizer: the model's, where `settings.stop_strings` are set.
        on_progress: called after every step.
        cache: makes what holds keys and values, see `RowCache`.

    Raises:
        ValueError: a model or a setting that the loop does not serve, an empty prompt, missing keys or tokenizer; a row
            whose scores allow no token.
    """
    started = time.perf_counter()
    base = servable_model(model)
    check_inputs(prompts, keys, settings, tokenizer)
    active = [processor for processor in processors if not processor.is_neutral]
    for processor in processors:
        processor.begin(0, settings.for_processors())
    with evaluation_mode(base), torch.no_grad():
        loop = _Loop(base, prompts, keys, settings, active, record, tokenizer, cache)
        for _ in loop.steps():
            if on_progress is not None:
                seconds = time.perf_counter() - started
                on_progress(LoopProgress(loop.ended, len(prompts), loop.tokens, seconds))
    logps = loop.records.lists("logps", len(prompts)) if record else None
    traces = [loop.traces(processor) for processor in processors]
    for processor, traced in zip(processors, traces, strict=True):
        processor.take_trace(traced)
        processor.take_final(loop.finals(processor))
    ids = [row.ids for row in loop.rows]
    return LoopResult(ids, logps, traces, loop.metrics(time.perf_counter() - started))


@dataclass
class _Row:
    """One completion; its place in the batch is kept by the loop."""

    index: int
    prompt: tuple[int, ...]
    ids: list[int] = field(default_factory=list)
    done: bool = False
    pad: int = 0
    """columns of the cache to the left of its own"""
    group: int = 0
    """index of the first row with the same prompt"""


@dataclass
class _Prompt:
    """A computed prompt that rows may begin with."""

    entry: Entry
    logits: Tensor  # (1, V)

    def own(self) -> _Prompt:
        """The same in memory of its own, so that the batch it was computed in can go."""
        return _Prompt([tuple(part.clone() for part in layer) for layer in self.entry], self.logits.clone())

    def nbytes(self) -> int:
        return sum(part.nbytes for layer in self.entry for part in layer)


class _Loop:
    """State of one call: `places` are the rows in the batch; every tensor of `state`, and every column, follows their
    order with one entry per row.

    owner     index of the row, -1 for one that has ended
    alive     1, or 0 for one that has ended
    position  tokens generated; a new tensor at every step, since the records keep it
    place     position id of the newest token
    last      the newest token
    pad       columns of padding
    stream    of its random numbers; only with a temperature
    tail      newest ids; only with stop strings
    present   (B, V) ids that are in the row; only with a repetition penalty
    """

    def __init__(
        self,
        model: Any,
        prompts: Sequence[Sequence[int]],
        keys: Sequence[int] | None,
        settings: LoopSettings,
        processors: Sequence[RolloutProcessor],
        record: bool,
        tokenizer: Any,
        cache: CacheFactory,
    ) -> None:
        self.model, self.settings, self.processors, self.record = model, settings, processors, record
        self.device = model.get_input_embeddings().weight.device
        self.end_ids = frozenset(settings.end_ids)
        self.ends = self._tensor(settings.end_ids)
        self.streams = streams(self._tensor(keys)) if keys is not None and settings.do_sample else None
        self.stop_strings = StopStrings(settings, tokenizer) if settings.stop_strings else None
        self.penalty = RepetitionPenalty(settings) if settings.repetition_penalty != 1 else None
        self.rows = [_Row(index, tuple(prompt)) for index, prompt in enumerate(prompts)]
        _group(self.rows)
        self.waiting = deque(sorted(self.rows, key=lambda row: row.group))
        self.missing = Counter(row.group for row in self.rows)  # rows that wait, by group
        self.places: list[_Row] = []
        self.shared: dict[int, _Prompt] = {}
        self.new_cache = cache
        self.cache = cache(model.config, 0, block=settings.cache_block)
        self.mask: Tensor | None = None
        self.state: dict[str, Tensor] = {}
        self.columns: list[Columns] = [processor.columns(0, self.device) for processor in processors]
        self.records, self.last_values = Records(), LastValues()
        self.options = {"logits_to_keep": 1} if "logits_to_keep" in forward_arguments(model) else {}
        self.ended = self.tokens = self.done_places = self.furthest = 0
        self.computed = self.live = self.prefilled = self.peak = self.held = self.lent = 0

    def steps(self) -> Iterator[None]:
        """Until every row has ended, one step at a time."""
        while self.waiting or self.places:
            decoded = self._decode() if self.places else None
            fresh = self._admit() if self.waiting else None
            if decoded is None or fresh is None:
                scores = fresh if decoded is None else decoded
            else:
                scores = torch.cat([decoded, fresh])
            assert scores is not None, "with rows waiting or in the batch there is something to sample"
            self._sample(scores)
            if self.done_places:
                self._leave()
            yield

    def traces(self, processor: RolloutProcessor) -> dict[str, Tensor]:
        """Name -> (B, steps) traced values; none of a neutral processor, which never ran."""
        names = () if processor.is_neutral else processor.traced
        return {name: self.records.table((id(processor), name), len(self.rows)) for name in names}

    def finals(self, processor: RolloutProcessor) -> dict[str, Tensor]:
        """Name -> (B,) values that rows had at their end; none of a neutral processor or without rows."""
        names = () if processor.is_neutral or not self.rows else processor.kept
        return {name: self.last_values.table((id(processor), name)) for name in names}

    def metrics(self, seconds: float) -> LoopMetrics:
        """What was counted."""
        prompt_tokens = sum(len(row.prompt) for row in self.rows)
        return LoopMetrics(
            tokens=self.tokens,
            seconds=seconds,
            computed_rows=self.computed,
            live_rows=self.live,
            prefill_tokens=self.prefilled,
            prefill_tokens_saved=prompt_tokens - self.prefilled,
            peak_cache_bytes=self.peak,
        )

    # ---- decode

    def _decode(self) -> Tensor:
        """(B, V) logits after the newest token of every row."""
        state = self.state
        mask = None if self.mask is None else self._mask(self.cache.seen + 1)
        logits = self._forward(state["last"][:, None], mask, state["place"][:, None], self.cache)
        if self.processors:
            seen = Rows(state["position"], state["last"], self.furthest)
            for processor, memory in zip(self.processors, self.columns, strict=True):
                processor.observe(seen, memory)
        self.computed += len(self.places)
        self.live += len(self.places) - self.done_places
        self._note_bytes()
        return logits

    def _mask(self, columns: int) -> Tensor:
        """(B, columns) mask, made for a block at once: padding stays where it is until rows come or go."""
        assert self.mask is not None
        if self.mask.size(1) < columns:
            self.mask = _padding_mask(self.state["pad"], columns + self.settings.cache_block)
        return self.mask[:, :columns]

    def _forward(self, ids: Tensor, mask: Tensor | None, positions: Tensor, cache: RowCache) -> Tensor:
        """(B, V) float32 logits after the last of (B, q) ids."""
        output = self.model(
            input_ids=ids,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
            return_dict=True,
            **self.options,
        )
        return output.logits[:, -1].float()

    # ---- admit

    def _admit(self) -> Tensor | None:
        """Put waiting rows into free places -> (rows, V) logits after their prompts, None if none can enter."""
        new = self._take()
        if not new:
            return None
        groups: dict[int, list[_Row]] = {}
        for row in new:
            groups.setdefault(row.group, []).append(row)
        self.cache.reserve(self._places_wanted(len(new)))
        seen = max(self.cache.seen, *(len(row.prompt) for row in new))
        self._pad(seen - self.cache.seen)
        logits = []
        for held in self._computed({group: rows[0].prompt for group, rows in groups.items()}):
            members = [groups[group] for group in held]
            self.cache.insert(
                [prompt.entry for prompt in held.values()],
                [len(rows) for rows in members],
                seen,
                [len(rows[0].prompt) for rows in members],
            )
            logits += [prompt.logits.expand(len(groups[group]), -1) for group, prompt in held.items()]
            self._enter([row for rows in members for row in rows], seen, logits[-1].size(-1))
            self._note_bytes()
            self._hold(held)
        self._places_changed()
        if not self.waiting:
            self.cache.reserve(0)
        return torch.cat(logits)

    def _places_wanted(self, new: int) -> int:
        """Places to allocate when the cache is renewed: for the rows that may come, as far as the limits allow."""
        rows = len(self.places) + new
        wanted = rows + len(self.waiting)
        if self.settings.max_rows is not None:
            wanted = min(wanted, self.settings.max_rows)
        if self.settings.max_cache_tokens is not None:
            longest = (
                max(len(row.prompt) for row in [*self.places, *self.waiting]) if self.places or self.waiting else 1
            )
            columns = self.cache.columns(longest, self.settings.max_new_tokens)
            wanted = min(wanted, self.settings.max_cache_tokens // columns)
        return max(rows, wanted)

    def _take(self) -> list[_Row]:
        """Waiting rows that may enter, in order."""
        new: list[_Row] = []
        longest = max((len(row.prompt) for row in self.places), default=0)
        limit = self.settings.max_rows or len(self.rows)
        while self.waiting and len(self.places) + len(new) < limit:
            longest = max(longest, len(self.waiting[0].prompt))
            needed = (len(self.places) + len(new) + 1) * self.cache.columns(longest, self.settings.max_new_tokens)
            full = self.settings.max_cache_tokens is not None and needed > self.settings.max_cache_tokens
            if full and (self.places or new):  # a row that is longer than the limit is computed alone
                break
            new.append(self.waiting.popleft())
            self.missing[new[-1].group] -= 1
        return new

    def _pad(self, columns: int) -> None:
        """So many columns of padding more, or fewer, to the left of every row in the batch."""
        if columns and self.places:
            self.state["pad"] += columns
            for row in self.places:
                row.pad += columns

    def _enter(self, new: Sequence[_Row], seen: int, vocabulary: int) -> None:
        """Append the state and the memories of new rows."""
        for row in new:
            row.pad = seen - len(row.prompt)
        fresh = self._fresh(new, vocabulary)
        self.state = {name: torch.cat([self.state[name], x]) for name, x in fresh.items()} if self.state else fresh
        for i, processor in enumerate(self.processors):
            memory = processor.columns(len(new), self.device)
            # what `apply` left there beside the memory is of the last step and not carried on
            self.columns[i] = {name: torch.cat([self.columns[i][name], x]) for name, x in memory.items()}
        self.places += new

    def _fresh(self, new: Sequence[_Row], vocabulary: int) -> dict[str, Tensor]:
        """State of rows that have generated nothing."""
        owner = self._tensor([row.index for row in new])
        state = {"owner": owner, "alive": torch.ones_like(owner)}
        state |= {"position": torch.zeros_like(owner), "last": torch.zeros_like(owner)}
        state["place"] = self._tensor([len(row.prompt) - 1 for row in new])
        state["pad"] = self._tensor([row.pad for row in new])
        if self.streams is not None:
            state["stream"] = self.streams[owner]
        prompts = [row.prompt for row in new]
        if self.stop_strings is not None:
            state["tail"] = self.stop_strings.fresh(prompts, self.device, vocabulary)
        if self.penalty is not None:
            state["present"] = self.penalty.fresh(prompts, self.device, vocabulary)
        return state

    def _computed(self, prompts: dict[int, tuple[int, ...]]) -> Iterator[dict[int, _Prompt]]:
        """Prompts by group: first those at hand, then, some at a time, those computed now.

        Prompts of like length share a forward, a long one takes several. A batch of them is gone before the next.
        """
        known = {group: self.shared[group] for group in prompts if group in self.shared}
        if known:
            yield known
        ordered = sorted(prompts.keys() - known.keys(), key=lambda group: (-len(prompts[group]), group))
        while ordered:
            count = max(1, self.settings.prefill_chunk // len(prompts[ordered[0]]))
            yield self._prefill({group: prompts[group] for group in ordered[:count]})
            ordered = ordered[count:]

    def _prefill(self, prompts: dict[int, tuple[int, ...]]) -> dict[int, _Prompt]:
        """Compute prompts, the longest first, in one batch."""
        lengths = [len(prompt) for prompt in prompts.values()]
        width = lengths[0]
        chunk = min(width, self.settings.prefill_chunk)
        cache = self.new_cache(self.model.config, len(prompts), block=width - chunk + 1)
        ids = self._tensor([[0] * (width - len(prompt)) + list(prompt) for prompt in prompts.values()])
        cache.begin([width - length for length in lengths])
        pad = self._tensor([width - length for length in lengths])
        mask = None if min(lengths) == width else _padding_mask(pad, width)
        positions = (torch.arange(width, device=self.device) - pad[:, None]).clamp(min=0)
        for first in range(0, width, chunk):
            part = slice(first, min(first + chunk, width))
            seen = None if mask is None else mask[:, : part.stop]
            logits = self._forward(ids[:, part], seen, positions[:, part], cache)
        self.prefilled += sum(lengths)
        self.lent = cache.take_peak()
        return {
            group: _Prompt(cache.of_row(row, len(prompt)), logits[row : row + 1])
            for row, (group, prompt) in enumerate(prompts.items())
        }

    def _hold(self, prompts: dict[int, _Prompt]) -> None:
        """Keep the prompts that rows still wait for, in memory of their own, and forget the others."""
        for group, prompt in prompts.items():
            if not self.missing[group]:
                gone = self.shared.pop(group, None)
                self.held -= 0 if gone is None else gone.nbytes()
            elif group not in self.shared:
                self.shared[group] = prompt.own()
                self.held += prompt.nbytes()
        self._note_bytes()  # with what the prompts were computed in
        self.lent = 0

    # ---- sample

    def _sample(self, scores: Tensor) -> None:
        """Draw the next token of every row from (B, V) logits, record it, and mark rows that end."""
        state = self.state
        scores = self._processed(self._limited(scores))
        tokens, logps = self._draw(warp(scores, self.settings))
        if logps is not None:
            self.records.add("logps", logps)
        if self.record or self.processors:
            self.records.step(state["owner"], state["position"])
        state["last"] = tokens
        state["position"] = state["position"] + state["alive"]
        state["place"] += state["alive"]
        if self.penalty is not None:
            state["present"] = self.penalty.enter(state["present"], tokens.clamp(min=0))
        if self.stop_strings is None:
            drawn, stopped = tokens.tolist(), []
        else:
            state["tail"] = self.stop_strings.enter(state["tail"], tokens.clamp(min=0))
            drawn, stopped = torch.stack([tokens, self.stop_strings.matched(state["tail"]).long()]).tolist()
        if min(drawn) < 0:
            self._check_drawn(drawn, scores)
        ended = self._append(drawn, {place for place, stops in enumerate(stopped) if stops})
        self.furthest += 1
        if ended:
            self._end(ended)

    def _limited(self, scores: Tensor) -> Tensor:
        """Repetition penalty and minimum length, which come before the processors."""
        least = self.settings.min_new_tokens
        if self.penalty is not None:
            scores = self.penalty.apply(scores, self.state["present"])
        if least and self.end_ids and min(len(row.ids) for row in self.places) < least:
            early = (self.state["position"] < least)[:, None]
            scores[:, self.ends] = scores[:, self.ends].masked_fill(early, -torch.inf)
        return scores

    def _processed(self, scores: Tensor) -> Tensor:
        if self.processors:
            rows = Rows(self.state["position"], self.state["last"], self.furthest)
            for processor, memory in zip(self.processors, self.columns, strict=True):
                scores = processor.apply(scores, rows, memory)
                for name in processor.traced:
                    self.records.add((id(processor), name), memory[name].clone())
        return scores

    def _draw(self, scores: Tensor) -> tuple[Tensor, Tensor | None]:
        """(B, V) final scores -> (B,) tokens, -1 where there is none, and their log-probabilities if recorded."""
        if self.streams is None and not self.record:
            return largest(scores), None
        u = None if self.streams is None else uniforms_of(self.state["stream"], self.state["position"])
        tokens, logps = pick(scores, u)
        return tokens, logps if self.record else None

    def _check_drawn(self, drawn: Sequence[int], scores: Tensor) -> None:
        """Refuse scores of which nothing can be drawn, except in rows that have ended."""
        for row, token, own in zip(self.places, drawn, scores, strict=True):
            if token < 0 and not row.done:
                raise ValueError(
                    f"completion {row.index}, after {len(row.ids)} tokens: the row of scores {no_token(own)}"
                )
        self.state["last"] = self.state["last"].clamp(min=0)

    def _append(self, drawn: Sequence[int], stopped: set[int]) -> list[int]:
        """Give every row its token -> places of the rows that end with it."""
        ended, limit = [], self.settings.max_new_tokens
        for place, (row, token) in enumerate(zip(self.places, drawn, strict=True)):
            if row.done:
                continue
            row.ids.append(token)
            if token in self.end_ids or len(row.ids) == limit or place in stopped:
                row.done = True
                ended.append(place)
        self.tokens += len(self.places) - self.done_places
        return ended

    def _end(self, places: list[int]) -> None:
        """Note which rows have ended, and what processors remember of them, while it is theirs."""
        self.done_places += len(places)
        self.ended += len(places)
        index = self._tensor(places)
        self.last_values.ended([self.places[place].index for place in places])
        for processor, memory in zip(self.processors, self.columns, strict=True):
            for name in processor.kept:
                self.last_values.add((id(processor), name), memory[name][index])
        if len(places) == len(self.places):
            return  # all of them leave at once
        self.state["owner"] = self.state["owner"].index_fill(0, index, -1)
        self.state["alive"] = self.state["alive"].index_fill(0, index, 0)

    # ---- leave

    def _leave(self) -> None:
        """Close the gaps of rows that ended, if enough of them did."""
        live = [place for place, row in enumerate(self.places) if not row.done]
        if live and self.done_places <= self.settings.compact_share * len(self.places):
            return
        count = len(live)
        holes = [place for place in range(count) if self.places[place].done]
        moves = list(zip(live[count - len(holes) :], holes, strict=True))
        order = list(range(count))
        for source, target in moves:
            order[target] = source
        index = self._tensor(order)
        self.places = [self.places[place] for place in order]
        self.state = {name: values[index] for name, values in self.state.items()}
        self.columns = [{name: values[index] for name, values in memory.items()} for memory in self.columns]
        self.done_places = 0
        self.cache.keep(moves, count)
        needless = min((row.pad for row in self.places), default=self.cache.seen)
        self._pad(-needless)
        self.cache.trim(self.cache.seen - needless)
        self._places_changed()

    def _places_changed(self) -> None:
        """Rows came or went: what follows from their padding and their lengths."""
        self.mask = None
        if any(row.pad for row in self.places):
            self.mask = _padding_mask(self.state["pad"], self.cache.seen + self.settings.cache_block)
        self.furthest = max((len(row.ids) for row in self.places), default=0)

    def _note_bytes(self) -> None:
        """Caches in memory until now: of the rows, of prompts that are held, of the prompts just computed."""
        self.peak = max(self.peak, self.cache.take_peak() + self.held + self.lent)

    def _tensor(self, values: Sequence[Any]) -> Tensor:
        return torch.tensor(list(values), dtype=torch.long, device=self.device)


def _group(rows: Sequence[_Row]) -> None:
    """Give rows of equal prompts one number, that of the first."""
    first: dict[tuple[int, ...], int] = {}
    for row in rows:
        row.group = first.setdefault(row.prompt, row.index)


def _padding_mask(pad: Tensor, columns: int) -> Tensor:
    """(B,) columns of padding at the left -> (B, columns) int64, 1 where a token is."""
    return (torch.arange(columns, device=pad.device) >= pad[:, None]).long()
