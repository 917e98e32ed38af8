"""A rollout loop for decoder-only transformers models that computes no row longer than it must.

Equal prompts are prefilled once and their cache is copied to the rows that begin with them; rows that end leave the
batch; waiting rows enter the freed places; the cache is written in place (`cache.py` says how rows are aligned, and why
positions, masks and sliding windows are exact). One step is

    decode      the newest token of every row -> logits; processors observe that token
    admit       prefill waiting prompts, put them behind the other rows
    sample      minimum length, processors, temperature, top-k, top-p, min-p, record, draw
    leave       ended rows make room

The model is called in evaluation mode and without gradients, and gets nothing but arguments: ids, a mask where rows are
padded, position ids counted from each row's own first token, and the cache. Processors run through `columns`, `observe`
and `apply`; what they remember of a row moves with the row. A token drawn in a row depends on the row's logits and on
its key alone (`row_random.py`), so other batch sizes give the same tokens up to floating-point ties.
"""

from __future__ import annotations

import inspect
import time
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from rltok.fast.cache import BlockCache, KeysValues, layer_windows
from rltok.fast.row_random import draw, uniforms
from rltok.fast.settings import LoopSettings, warp
from rltok.sampling import RolloutProcessor, Rows, generation_model
from rltok.sampling.processor import Columns

MOVING_ROPE = {"dynamic", "longrope"}
"""rotary types whose frequencies depend on the length of the batch, and are stored in the model as they change"""
INSTEAD = "use transformers' generate for this model"


@dataclass(frozen=True)
class LoopMetrics:
    """What a call cost."""

    tokens: int
    """tokens sampled"""
    seconds: float
    """wall time of the call"""
    live_share: float
    """share of the rows computed by decoding steps that had not ended; 1 where nothing was decoded"""
    prefill_tokens: int
    """prompt tokens computed"""
    prefill_tokens_saved: int
    """prompt tokens that were copied instead of computed"""
    peak_cache_bytes: int
    """largest size of all caches together, without the second copy of a tensor while it grows"""

    @property
    def tokens_per_second(self) -> float:
        """Sampled tokens by wall time."""
        return self.tokens / self.seconds


@dataclass(frozen=True)
class LoopResult:
    """Completions in the order of the prompts."""

    ids: list[list[int]]
    """tokens of every completion, the end token included"""
    logps: list[list[float]] | None
    """log-probability in nats of every token under what drew it (greedy: at temperature 1); None: not recorded"""
    traces: list[dict[str, Tensor]]
    """for every processor, name -> (B, steps) traced values, 0 after a row's end; the processors have them too"""
    metrics: LoopMetrics


def generate_rows(
    model: Any,
    prompts: Sequence[Sequence[int]],
    keys: Sequence[int] | None,
    settings: LoopSettings,
    processors: Sequence[RolloutProcessor] = (),
    record: bool = True,
) -> LoopResult:
    """One completion of every prompt.

    Args:
        model: a decoder-only transformers model, or a PEFT model around one; as before afterwards.
        prompts: token ids without padding; equal prompts are computed once.
        keys: of each completion's random numbers, see `row_key`; may be None with temperature 0.
        settings: how to sample.
        processors: act on the logits before the temperature, in this order (see `make_processors`).
        record: keep log-probabilities.

    Raises:
        ValueError: a model or a setting that the loop does not serve, an empty prompt, missing keys.
    """
    started = time.perf_counter()
    base = servable_model(model)
    check_inputs(prompts, keys, settings)
    active = [processor for processor in processors if not processor.is_neutral]
    for processor in processors:
        processor.begin(0, settings.for_processors())
    with evaluation_mode(base), torch.no_grad():
        loop = _Loop(base, prompts, keys, settings, active, record)
        loop.run()
    logps = loop.records.lists("logps", len(prompts)) if record else None
    traces = [loop.traces(processor) for processor in processors]
    for processor, traced in zip(processors, traces, strict=True):
        processor.take_trace(traced)
    ids = [row.ids for row in loop.rows]
    return LoopResult(ids, logps, traces, loop.metrics(time.perf_counter() - started))


def servable_model(model: Any) -> Any:
    """The inner model that the loop calls.

    Raises:
        ValueError: a model that it does not serve.
    """
    for name, adapter in getattr(model, "peft_config", {}).items():
        if getattr(adapter, "is_prompt_learning", False):
            raise ValueError(f"adapter {name!r} ({adapter.peft_type}) adds virtual tokens: {INSTEAD}")
    base = generation_model(model)
    config, kind = base.config, base.config.model_type
    if config.is_encoder_decoder:
        raise ValueError(f"{kind!r} is an encoder-decoder: {INSTEAD}")
    if config.get_text_config(decoder=True) is not config:
        raise ValueError(f"{kind!r} takes more than text (its config holds a text config): {INSTEAD}")
    if getattr(base, "_is_stateful", False):
        raise ValueError(f"{kind!r} keeps a recurrent state: {INSTEAD}")
    if getattr(config, "num_kv_shared_layers", 0):
        raise ValueError(f"{kind!r} shares keys and values between layers: {INSTEAD}")
    moving = sorted(_rope_types(config) & MOVING_ROPE)
    if moving:
        raise ValueError(
            f"{kind!r} has {moving} rotary positions, which change with the longest row beside it: {INSTEAD}"
        )
    missing = {"position_ids", "past_key_values"} - set(inspect.signature(base.forward).parameters)
    if missing:
        raise ValueError(f"{kind!r} takes no {' and no '.join(sorted(missing))} in its forward: {INSTEAD}")
    layer_windows(config)
    return base


def _rope_types(config: Any) -> set[str]:
    """Rotary types of a config, which has one for all layers or one for each type of layer."""
    parameters = getattr(config, "rope_parameters", None) or {}
    several = [parameters, *(value for value in parameters.values() if isinstance(value, dict))]
    return {value["rope_type"] for value in several if value.get("rope_type")}


def check_inputs(prompts: Sequence[Sequence[int]], keys: Sequence[int] | None, settings: LoopSettings) -> None:
    """Raise ValueError for inputs that cannot be completed."""
    empty = [index for index, prompt in enumerate(prompts) if len(prompt) == 0]
    if empty:
        raise ValueError(
            f"prompts {empty[:8]} are empty: the loop needs at least one token, such as the first of a text"
        )
    if keys is None and settings.do_sample:
        raise ValueError(f"keys=None but temperature={settings.temperature} samples: pass one row_key for each prompt")
    if keys is not None and len(keys) != len(prompts):
        raise ValueError(f"{len(keys)} keys for {len(prompts)} prompts: pass one row_key for each")
    longest = max((len(prompt) for prompt in prompts), default=0) + settings.max_new_tokens
    if settings.max_cache_tokens is not None and longest > settings.max_cache_tokens:
        raise ValueError(
            f"max_cache_tokens={settings.max_cache_tokens} is less than the {longest} tokens of the longest prompt and "
            f"max_new_tokens={settings.max_new_tokens}: raise it, or shorten them"
        )


@contextmanager
def evaluation_mode(model: Any) -> Iterator[None]:
    """No dropout and no gradient checkpointing, which needs training mode; every module is as before afterwards."""
    training = [module for module in model.modules() if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True


@dataclass
class _Row:
    """One completion; its place in the batch is kept by the loop."""

    index: int
    prompt: tuple[int, ...]
    ids: list[int] = field(default_factory=list)
    done: bool = False
    cached: int = 0
    """columns of the cache that are its own"""
    group: int = 0
    """index of the first row with the same prompt"""


@dataclass
class _Prompt:
    """A computed prompt that rows may begin with."""

    entry: list[KeysValues]
    logits: Tensor  # (1, V)

    def own(self) -> _Prompt:
        """The same in memory of its own, so that the batch it was computed in can go."""
        return _Prompt([(keys.clone(), values.clone()) for keys, values in self.entry], self.logits.clone())

    def nbytes(self) -> int:
        return sum(keys.nbytes + values.nbytes for keys, values in self.entry)


class _Records:
    """Values of one number per row and step, left on the device until the end."""

    def __init__(self) -> None:
        self._owners: list[int] = []  # row, -1 for one that has ended
        self._steps: list[int] = []
        self._values: dict[Any, list[Tensor]] = {}

    def step(self, rows: Sequence[_Row]) -> None:
        """The rows, in order, to which the values of this step belong."""
        self._owners += [-1 if row.done else row.index for row in rows]
        self._steps += [len(row.ids) for row in rows]

    def add(self, name: Any, values: Tensor) -> None:
        """(B,) values of this step."""
        self._values.setdefault(name, []).append(values)

    def lists(self, name: Any, rows: int) -> list[list[float]]:
        """One list for each row."""
        lists: list[list[float]] = [[] for _ in range(rows)]
        if name in self._values:
            for owner, value in zip(self._owners, torch.cat(self._values[name]).tolist(), strict=True):
                if owner >= 0:
                    lists[owner].append(value)
        return lists

    def table(self, name: Any, rows: int) -> Tensor:
        """(rows, steps), 0 where a row had ended."""
        if name not in self._values:
            return torch.zeros(rows, 0)
        values = torch.cat(self._values[name])
        owners, steps = (torch.tensor(side, device=values.device) for side in (self._owners, self._steps))
        live = owners >= 0
        table = values.new_zeros(rows, int(steps[live].max()) + 1)
        table[owners[live], steps[live]] = values[live]
        return table


class _Loop:
    """State of one call: `places` are the rows in the batch; every (B,) tensor and column follows their order."""

    def __init__(
        self,
        model: Any,
        prompts: Sequence[Sequence[int]],
        keys: Sequence[int] | None,
        settings: LoopSettings,
        processors: Sequence[RolloutProcessor],
        record: bool,
    ) -> None:
        self.model, self.settings, self.processors, self.record = model, settings, processors, record
        self.device = model.get_input_embeddings().weight.device
        self.ends = torch.tensor(settings.end_ids, dtype=torch.long, device=self.device)
        self.all_keys = None if keys is None else torch.tensor(list(keys), dtype=torch.long, device=self.device)
        self.rows = [_Row(index, tuple(prompt)) for index, prompt in enumerate(prompts)]
        _group(self.rows)
        self.waiting = deque(sorted(self.rows, key=lambda row: row.group))
        self.missing = Counter(row.group for row in self.rows)  # rows that wait, by group
        self.places: list[_Row] = []
        self.shared: dict[int, _Prompt] = {}
        self.cache = BlockCache(model.config, block=settings.cache_block)
        none = torch.zeros(0, dtype=torch.long, device=self.device)
        self.state = {name: none for name in ("index", "length", "position", "last", "cached", "alive")}
        self.columns: list[Columns] = [processor.columns(0, self.device) for processor in processors]
        self.records = _Records()
        self.one_logit = "logits_to_keep" in inspect.signature(model.forward).parameters
        self.computed = self.live = self.prefilled = self.peak = self.lent = 0

    def run(self) -> None:
        """Until every row has ended."""
        while self.waiting or self.places:
            decoded = self._decode() if self.places else None
            fresh = self._admit()
            self._sample(torch.cat([logits for logits in (decoded, fresh) if logits is not None]))
            self._leave()

    def traces(self, processor: RolloutProcessor) -> dict[str, Tensor]:
        """Name -> (B, steps) traced values; none of a neutral processor, which never ran."""
        names = () if processor.is_neutral else processor.traced
        return {name: self.records.table((id(processor), name), len(self.rows)) for name in names}

    def metrics(self, seconds: float) -> LoopMetrics:
        """What was counted."""
        prompt_tokens = sum(len(row.prompt) for row in self.rows)
        return LoopMetrics(
            tokens=sum(len(row.ids) for row in self.rows),
            seconds=seconds,
            live_share=self.live / self.computed if self.computed else 1.0,
            prefill_tokens=self.prefilled,
            prefill_tokens_saved=prompt_tokens - self.prefilled,
            peak_cache_bytes=self.peak,
        )

    def _decode(self) -> Tensor:
        """(B, V) logits after the newest token of every row."""
        state, columns = self.state, self.cache.seen + 1
        state["cached"] += 1
        for row in self.places:
            row.cached += 1
        mask = None
        if any(row.cached < columns for row in self.places):
            mask = _padding_mask(state["cached"], columns)
        positions = (state["length"] + state["position"] - 1)[:, None]
        logits = self._forward(state["last"][:, None], mask, positions, self.cache)
        seen = Rows(state["position"], state["last"], self._furthest())
        for processor, memory in zip(self.processors, self.columns, strict=True):
            processor.observe(seen, memory)
        self.computed += len(self.places)
        self.live += sum(not row.done for row in self.places)
        self._note_bytes()
        return logits

    def _admit(self) -> Tensor | None:
        """Put waiting rows into free places -> (rows, V) logits after their prompts, None if none can enter."""
        new = self._take()
        if not new:
            return None
        groups: dict[int, list[_Row]] = {}
        for row in new:
            row.cached = len(row.prompt)
            groups.setdefault(row.group, []).append(row)
        self.cache.reserve(self._places_wanted(len(new)))
        seen = max(self.cache.seen, *(row.cached for row in new))
        logits = []
        for held in self._computed({group: rows[0].prompt for group, rows in groups.items()}):
            members = [groups[group] for group in held]
            self.cache.insert([prompt.entry for prompt in held.values()], [len(rows) for rows in members], seen)
            logits += [prompt.logits.expand(len(groups[group]), -1) for group, prompt in held.items()]
            self._enter([row for rows in members for row in rows])
            self._note_bytes()
            self._hold(held)
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
            wanted = min(wanted, self.settings.max_cache_tokens // (longest + self.settings.max_new_tokens))
        return max(rows, wanted)

    def _take(self) -> list[_Row]:
        """Waiting rows that may enter, in order."""
        new: list[_Row] = []
        if not self.waiting:
            return new
        longest = max((len(row.prompt) for row in self.places), default=0)
        limit = self.settings.max_rows or len(self.rows)
        while self.waiting and len(self.places) + len(new) < limit:
            longest = max(longest, len(self.waiting[0].prompt))
            needed = (len(self.places) + len(new) + 1) * (longest + self.settings.max_new_tokens)
            if self.settings.max_cache_tokens is not None and needed > self.settings.max_cache_tokens:
                break
            new.append(self.waiting.popleft())
            self.missing[new[-1].group] -= 1
        return new

    def _enter(self, new: Sequence[_Row]) -> None:
        """Append the (B,) tensors and memories of new rows."""
        lengths = [len(row.prompt) for row in new]
        values = {"index": [row.index for row in new], "length": lengths, "cached": lengths, "alive": [1] * len(new)}
        for name, old in self.state.items():
            fresh = torch.tensor(values.get(name, [0] * len(new)), dtype=torch.long, device=self.device)
            self.state[name] = torch.cat([old, fresh])
        for i, processor in enumerate(self.processors):
            memory = processor.columns(len(new), self.device)
            # what `apply` left there beside the memory is of the last step and not carried on
            self.columns[i] = {name: torch.cat([self.columns[i][name], fresh]) for name, fresh in memory.items()}
        self.places += new

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
        cache = BlockCache(self.model.config, len(prompts), block=width - chunk + 1)
        rows = [[0] * (width - len(prompt)) + list(prompt) for prompt in prompts.values()]
        ids, sizes = torch.tensor(rows, device=self.device), torch.tensor(lengths, device=self.device)
        mask = None if min(lengths) == width else _padding_mask(sizes, width)
        positions = (torch.arange(width, device=self.device) - (width - sizes)[:, None]).clamp(min=0)
        for first in range(0, width, chunk):
            part = slice(first, min(first + chunk, width))
            seen = None if mask is None else mask[:, : part.stop]
            logits = self._forward(ids[:, part], seen, positions[:, part], cache)
        self.prefilled += sum(lengths)
        self.lent = cache.nbytes()
        return {
            group: _Prompt(cache.of_row(row, len(prompt)), logits[row : row + 1])
            for row, (group, prompt) in enumerate(prompts.items())
        }

    def _hold(self, prompts: dict[int, _Prompt]) -> None:
        """Keep the prompts that rows still wait for, in memory of their own, and forget the others."""
        for group, prompt in prompts.items():
            if not self.missing[group]:
                self.shared.pop(group, None)
            elif group not in self.shared:
                self.shared[group] = prompt.own()
        self.lent = 0

    def _forward(self, ids: Tensor, mask: Tensor | None, positions: Tensor, cache: BlockCache) -> Tensor:
        """(B, V) float32 logits after the last of (B, q) ids."""
        options = {"logits_to_keep": 1} if self.one_logit else {}
        output = self.model(
            input_ids=ids,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
            return_dict=True,
            **options,
        )
        return output.logits[:, -1].float()

    def _sample(self, scores: Tensor) -> None:
        """Draw the next token of every row from (B, V) logits, record it, and mark rows that end."""
        state, settings = self.state, self.settings
        if settings.end_ids and min(len(row.ids) for row in self.places) < settings.min_new_tokens:
            early = (state["position"] < settings.min_new_tokens)[:, None]
            scores[:, self.ends] = scores[:, self.ends].masked_fill(early, -torch.inf)
        self.records.step(self.places)
        rows = Rows(state["position"], state["last"], self._furthest())
        for processor, memory in zip(self.processors, self.columns, strict=True):
            scores = processor.apply(scores, rows, memory)
            for name in processor.traced:
                self.records.add((id(processor), name), memory[name].clone())
        scores = warp(scores, settings)
        tokens = self._draw(scores)
        if self.record:
            logps = scores.log_softmax(dim=-1, dtype=torch.float32).gather(1, tokens[:, None])
            self.records.add("logps", logps.squeeze(1))
        state["last"] = tokens
        state["position"] = state["position"] + state["alive"]
        self._append(tokens.tolist())

    def _draw(self, scores: Tensor) -> Tensor:
        if not self.settings.do_sample:
            return scores.argmax(dim=-1)
        assert self.all_keys is not None
        return draw(scores, uniforms(self.all_keys[self.state["index"]], self.state["position"]))

    def _append(self, tokens: Sequence[int]) -> None:
        ended = False
        for row, token in zip(self.places, tokens, strict=True):
            if not row.done:
                row.ids.append(token)
                row.done = token in self.settings.end_ids or len(row.ids) == self.settings.max_new_tokens
                ended |= row.done
        if ended:
            alive = [int(not row.done) for row in self.places]
            self.state["alive"] = torch.tensor(alive, dtype=torch.long, device=self.device)

    def _leave(self) -> None:
        """Close the gaps of rows that ended, if enough of them did."""
        live = [place for place, row in enumerate(self.places) if not row.done]
        ended = len(self.places) - len(live)
        if not ended or (live and ended <= self.settings.compact_share * len(self.places)):
            return
        count = len(live)
        holes = [place for place in range(count) if self.places[place].done]
        moves = list(zip(live[count - len(holes) :], holes, strict=True))
        order = list(range(count))
        for source, target in moves:
            order[target] = source
        index = torch.tensor(order, dtype=torch.long, device=self.device)
        self.places = [self.places[place] for place in order]
        self.state = {name: values[index] for name, values in self.state.items()}
        self.columns = [{name: values[index] for name, values in memory.items()} for memory in self.columns]
        self.cache.keep(moves, count)
        self.cache.trim(max((row.cached for row in self.places), default=0))

    def _furthest(self) -> int:
        return max(len(row.ids) for row in self.places)

    def _note_bytes(self) -> None:
        """Caches in memory now: of the rows, of prompts that are held, of the prompts just computed."""
        held = sum(prompt.nbytes() for prompt in self.shared.values())
        self.peak = max(self.peak, self.cache.nbytes() + held + self.lent)


def _group(rows: Sequence[_Row]) -> None:
    """Give rows of equal prompts one number, that of the first."""
    first: dict[tuple[int, ...], int] = {}
    for row in rows:
        row.group = first.setdefault(row.prompt, row.index)


def _padding_mask(lengths: Tensor, columns: int) -> Tensor:
    """(B,) tokens at the right -> (B, columns) int64, 1 where a token is."""
    return (torch.arange(columns, device=lengths.device) >= columns - lengths[:, None]).long()
