"""Processors on the changing batch of vLLM: which request sits in which row, and what is remembered of it.

vLLM has two model runners that describe their batch differently. Both are served by the same processors, through the
same three methods as in `generate` (`rltok.sampling.processor`); only the bookkeeping differs.

    V1   rows come, go and move; the host holds every request's generated ids               `BatchRows`
    V2   a request keeps its slot, rows name slots; ids and positions stay on the device    `SlotRows`

Requests that name the same processors share one `Chain`, whose columns have an entry for every row (V1) or slot (V2).
Nothing here imports vllm.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from rltok.sampling.processor import Columns, Rows
from rltok.sampling.serial import KEY, decode

Where = slice | Tensor
"""Rows of a chain: a range (views) or int64 indices (copies)."""


def decoding_text(params: Any) -> str | None:
    """The processors that a request asks for (`extra_args` of its sampling parameters); None for a plain request."""
    arguments: Mapping[str, Any] | None = params.extra_args
    return None if arguments is None else arguments.get(KEY)


class Chain:
    """Processors in the order they run, and the columns of `size` rows."""

    def __init__(self, text: str, size: int, device: torch.device) -> None:
        self.text = text
        self.processors = [p for p in decode(text) if not p.is_neutral]
        self.columns = [p.columns(size, device) for p in self.processors]
        self._fresh = [p.columns(1, device) for p in self.processors]
        self.remembers_logits = any(p.memory == "logits" for p in self.processors)
        # What the columns were before the last `apply`, for steps that an engine repeats.
        self.before = [_copy(columns) for columns in self.columns] if self.remembers_logits else []

    def reset(self, where: Where) -> None:
        """Rows that have generated nothing."""
        for kept, fresh in zip(self.columns, self._fresh, strict=True):
            for name, column in kept.items():
                column[where] = fresh[name]
        if self.remembers_logits:
            for kept, columns in zip(self.before, self.columns, strict=True):
                for name, column in kept.items():
                    column[where] = columns[name][where]

    def move(self, source: Tensor, target: Tensor) -> None:
        """Rows `source` become rows `target`, all at once."""
        for columns in (*self.columns, *self.before):
            for column in columns.values():
                column[target] = column[source]  # indexing copies before it writes

    def select(self, where: Where) -> list[Columns]:
        """Columns of some rows."""
        return [{name: column[where] for name, column in columns.items()} for columns in self.columns]

    def write(self, where: Where, parts: Sequence[Columns]) -> None:
        """Put the columns of some rows back; what a processor added to them for the record is dropped."""
        for columns, part in zip(self.columns, parts, strict=True):
            for name, column in columns.items():
                if isinstance(where, slice):
                    view = column[where]
                    if part[name].data_ptr() != view.data_ptr():
                        view.copy_(part[name])
                else:
                    column[where] = part[name]

    def observe(self, where: Where, rows: Rows) -> None:
        """Enter the newest tokens of some rows, all of position >= 1."""
        parts = self.select(where)
        for processor, part in zip(self.processors, parts, strict=True):
            processor.observe(rows, part)
        self.write(where, parts)

    def apply(self, where: Where, rows: Rows, scores: Tensor) -> Tensor:
        """(B, V) scores of some rows -> (B, V), through all processors; may overwrite them."""
        parts = self.select(where)
        if self.remembers_logits:
            for kept, part in zip(self.before, parts, strict=True):
                for name, column in kept.items():
                    column[where] = part[name]
        for processor, part in zip(self.processors, parts, strict=True):
            scores = processor.apply(scores, rows, part)
        self.write(where, parts)
        return scores

    def undo(self, where: Where) -> None:
        """Take back the last `apply` of some rows."""
        for columns, kept in zip(self.columns, self.before, strict=True):
            for name, column in columns.items():
                column[where] = kept[name][where]


def _copy(columns: Columns) -> Columns:
    return {name: column.clone() for name, column in columns.items()}


@dataclass(eq=False)
class _Request:
    """One request of the V1 batch."""

    chain: Chain
    prompt: Sequence[int] | None
    outputs: list[int]
    """generated ids, which the engine extends"""
    row: int | None = None
    """where its columns lie; None: it has none yet"""
    seen: int = 0
    """tokens entered into the columns"""
    applied: int = -1
    """position of the last `apply`"""


class _Suspended(NamedTuple):
    """Columns of a request that left the batch, which no replay of its ids could make again."""

    columns: list[Columns]
    before: list[Columns]
    applied: int


@dataclass(eq=False)
class BatchRows:
    """The batch of the V1 runner.

    A request that is preempted leaves and comes back with its ids so far; these are replayed. Where the memory of a
    processor also holds logits, the columns wait in a small store; they are found again by prompt and ids, because two
    requests equal in both have equal columns.
    """

    size: int
    """most rows of a batch"""
    device: torch.device
    _requests: dict[int, _Request] = field(default_factory=dict)
    _groups: list[tuple[Chain, list[int]]] = field(default_factory=list)
    _chains: WeakValueDictionary[str, Chain] = field(default_factory=WeakValueDictionary)
    _suspended: OrderedDict[tuple[Any, ...], _Suspended] = field(default_factory=OrderedDict)

    def update(self, removed: Sequence[int], added: Sequence[Any], moved: Sequence[Any]) -> None:
        """Follow the batch: requests that left, came (index, parameters, prompt ids, output ids) and moved."""
        requests, leaving = self._requests, []
        for index in removed:
            leaving.append(requests.pop(index, None))
        for index, params, prompt, outputs in added:
            leaving.append(requests.pop(index, None))  # an index may be given anew without a removal
            text = decoding_text(params)
            if text is not None:
                requests[index] = _Request(self._chain(text), prompt, outputs)
        for source, target, direction in moved:
            arriving, replaced = requests.pop(source, None), requests.pop(target, None)
            if arriving is not None:
                requests[target] = arriving
            if direction.name == "SWAP" and replaced is not None:
                requests[source] = replaced
            else:
                leaving.append(replaced)
        self._suspend([request for request in leaving if request is not None])
        self._place()

    def apply(self, logits: Tensor) -> Tensor:
        """(B, V) float32 logits of this step, which it overwrites -> (B, V)."""
        for chain, indices in self._groups:
            requests = [self._requests[index] for index in indices]
            if len(indices) == logits.size(0):
                logits = self._step(chain, requests, logits, slice(0, len(indices)))
            else:
                rows = torch.tensor(indices, device=logits.device)
                logits[rows] = self._step(chain, requests, logits[rows], rows)
        return logits

    def _chain(self, text: str) -> Chain:
        chain = self._chains.get(text)
        if chain is None:
            self._chains[text] = chain = Chain(text, self.size, self.device)
        return chain

    def _place(self) -> None:
        """Bring every request's columns to the row it sits in."""
        by_chain: dict[Chain, list[int]] = {}
        for index in sorted(self._requests):
            by_chain.setdefault(self._requests[index].chain, []).append(index)
        for chain, indices in by_chain.items():
            pairs = [(self._requests[index].row, index) for index in indices]
            moving = [(row, index) for row, index in pairs if row is not None and row != index]
            if moving:
                source, target = self._tensor(moving).unbind(1)
                chain.move(source, target)
            fresh = [index for row, index in pairs if row is None]
            if fresh:
                chain.reset(self._tensor(fresh))
            for index in indices:
                self._requests[index].row = index
        self._groups = list(by_chain.items())

    def _step(self, chain: Chain, requests: list[_Request], scores: Tensor, where: Where) -> Tensor:
        counts = [len(request.outputs) for request in requests]
        last = [request.outputs[-1] if request.outputs else 0 for request in requests]
        if min(last) < 0:
            raise RuntimeError(
                "vLLM gave placeholders in place of generated ids: load the class through --logits-processors (or "
                "LLM(logits_processors=[...])), not as an entry point of the group vllm.logits_processors"
            )
        rows = self._rows(counts, last)
        for request, count in zip(requests, counts, strict=True):
            if count and request.applied < 0 and chain.remembers_logits:
                self._resume(request)
            elif count < request.seen:
                self._start_over(request)
        if all(request.seen + 1 == count for request, count in zip(requests, counts, strict=True)):
            chain.observe(where, rows)  # plain decoding: every row grew by one token
        else:
            self._replay(chain, requests, counts)
        if chain.remembers_logits:
            repeated = [r.row for r, count in zip(requests, counts, strict=True) if r.applied == count]
            if repeated:  # a prompt that is read in several parts is sampled, in vain, after each
                chain.undo(self._tensor(repeated))
        for request, count in zip(requests, counts, strict=True):
            request.seen = request.applied = count
        return chain.apply(where, rows, scores)

    def _replay(self, chain: Chain, requests: list[_Request], counts: list[int]) -> None:
        """Enter tokens that were not seen, some rows at a time: new rows have none, resumed ones many."""
        while True:
            behind = [r for r, count in zip(requests, counts, strict=True) if r.seen < count]
            if not behind:
                return
            rows = self._rows([r.seen + 1 for r in behind], [r.outputs[r.seen] for r in behind])
            chain.observe(self._tensor([r.row for r in behind]), rows)
            for request in behind:
                request.seen += 1

    def _rows(self, counts: list[int], last: list[int]) -> Rows:
        position, newest = self._tensor([counts, last]).unbind(0)
        return Rows(position, newest, max(counts))

    def _tensor(self, values: Any) -> Tensor:
        """int64 on the device; the only copies of a step."""
        return torch.tensor(values, dtype=torch.long).to(self.device, non_blocking=True)

    def _start_over(self, request: _Request) -> None:
        """The engine took tokens back."""
        assert request.row is not None
        if request.chain.remembers_logits:
            raise RuntimeError(
                f"vLLM took back {request.seen - len(request.outputs)} generated token(s), which "
                f"{_names(request.chain)} cannot follow: its memory holds logits"
            )
        request.chain.reset(slice(request.row, request.row + 1))
        request.seen = 0

    def _suspend(self, leaving: Sequence[_Request]) -> None:
        """Keep what a replay could not make again; whether a request has ended or will resume is not known here."""
        for request in leaving:
            chain = request.chain
            if not chain.remembers_logits or request.row is None or request.applied < 0:
                continue
            row = request.row
            key = _key(chain, request.prompt, request.outputs[: request.seen])
            columns, before = (
                [{name: column[row].clone() for name, column in part.items()} for part in parts]
                for parts in (chain.columns, chain.before)
            )
            self._suspended[key] = _Suspended(columns, before, request.applied)
            self._suspended.move_to_end(key)
        while len(self._suspended) > 4 * self.size:
            self._suspended.popitem(last=False)

    def _resume(self, request: _Request) -> None:
        chain, ids = request.chain, request.outputs
        for seen in (len(ids) - 1, len(ids)):  # the token sampled last was kept, or dropped
            found = self._suspended.get(_key(chain, request.prompt, ids[:seen]))
            if found is None:
                continue
            for parts, kept in ((chain.columns, found.columns), (chain.before, found.before)):
                for part, values in zip(parts, kept, strict=True):
                    for name, column in part.items():
                        column[request.row] = values[name]
            request.seen, request.applied = seen, found.applied
            return
        raise RuntimeError(
            f"a preempted request came back and its memory of {_names(chain)} is no longer kept: give the engine more "
            "cache (vllm_gpu_memory_utilization) or fewer rows (max_num_seqs), so that it preempts less"
        )


def _key(chain: Chain, prompt: Sequence[int] | None, ids: Sequence[int]) -> tuple[Any, ...]:
    if prompt is None:
        raise RuntimeError(f"{_names(chain)} needs requests with token ids; this one has embeddings as its prompt")
    return chain.text, tuple(prompt), tuple(ids)


def _names(chain: Chain) -> str:
    return ", ".join(type(p).__name__ for p in chain.processors if p.memory == "logits")


class SlotRows:
    """The batch of the V2 runner: nothing waits for the device.

    Args:
        states: the runner's buffers (`device`, `max_num_reqs`, `prompt_len`, `prefill_len`, `all_token_ids`).
    """

    def __init__(self, states: Any) -> None:
        self._states = states
        self._size, self._device = int(states.max_num_reqs), torch.device(states.device)
        self._of_slot: dict[int, Chain] = {}
        self._chains: WeakValueDictionary[str, Chain] = WeakValueDictionary()
        self._added: list[int] = []
        zeros = torch.zeros(self._size, dtype=torch.long, device=self._device)
        self._seen, self._applied = zeros, zeros - 1  # per slot, as in `_Request`

    def add(self, slot: int, params: Any) -> bool:
        """A request enters a slot, whose last occupant is forgotten; True if it asks for processors."""
        self._of_slot.pop(slot, None)
        text = decoding_text(params)
        if text is None:
            return False
        chain = self._chains.get(text)
        if chain is None:
            self._chains[text] = chain = Chain(text, self._size, self._device)
        generated = int(self._states.prefill_len.np[slot]) - int(self._states.prompt_len.np[slot])
        if generated and chain.remembers_logits:
            raise RuntimeError(
                f"a preempted request came back, and this model runner does not say what it was, so {_names(chain)} "
                "cannot continue: set VLLM_USE_V2_MODEL_RUNNER=0, or give the engine more cache so that it preempts "
                "less (vllm_gpu_memory_utilization)"
            )
        self._of_slot[slot] = chain
        self._added.append(slot)
        return True

    def flush(self) -> None:
        """Columns of the requests added since the last step; generated ids that came with them are replayed."""
        added, self._added = self._added, []
        for slot in dict.fromkeys(added):
            chain, one = self._of_slot.get(slot), slice(slot, slot + 1)
            if chain is None:
                continue
            chain.reset(one)
            prompt, filled = (int(n.np[slot]) for n in (self._states.prompt_len, self._states.prefill_len))
            ids = self._states.all_token_ids.gpu[slot, prompt:filled].to(self._device).long()
            for count in range(1, filled - prompt + 1):
                position = torch.full((1,), count, dtype=torch.long, device=self._device)
                chain.observe(one, Rows(position, ids[count - 1 : count], count))
            self._seen[one], self._applied[one] = filled - prompt, -1

    def apply(self, logits: Tensor, context: Any) -> Tensor:
        """(B, V) float32 logits of this step, which it overwrites -> (B, V)."""
        slots = context.idx_mapping_np.tolist()
        if logits.size(0) != len(slots):
            raise RuntimeError(f"{logits.size(0)} rows for {len(slots)} requests: decoding has no speculative decoding")
        groups: dict[Chain, list[int]] = {}
        for row, slot in enumerate(slots):
            chain = self._of_slot.get(slot)
            if chain is not None:
                groups.setdefault(chain, []).append(row)
        furthest = int(context.seq_lens_upper_bound_np.max(initial=0))
        for chain, indices in groups.items():
            if len(indices) == len(slots):
                logits = self._step(chain, logits, context, slice(0, len(slots)), furthest)
            else:
                rows = torch.tensor(indices).to(logits.device, non_blocking=True)
                logits[rows] = self._step(chain, logits[rows], context, rows, furthest)
        return logits

    def _step(self, chain: Chain, scores: Tensor, context: Any, where: Where, furthest: int) -> Tensor:
        slot = context.expanded_idx_mapping[where].long()
        prompt = self._states.prompt_len.gpu[slot]
        # Below 0 where a prompt is read in several parts: sampled in vain.
        position = (context.pos[where] + 1 - prompt).long().clamp(min=0)
        last = context.input_ids[where].long()
        seen = self._seen[slot]
        grown = position == seen + 1
        before = chain.select(slot)
        chain.observe(slot, Rows(position.clamp(min=1), last, furthest))
        self._keep(chain, slot, grown, before)
        self._seen[slot] = torch.where(grown, position, seen)
        if chain.remembers_logits:
            repeated = self._applied[slot] == position
            before = [{name: column[slot] for name, column in kept.items()} for kept in chain.before]
            self._keep(chain, slot, ~repeated, before)
            self._applied[slot] = position
        return chain.apply(slot, Rows(position, last, furthest), scores)

    @staticmethod
    def _keep(chain: Chain, slot: Tensor, changed: Tensor, before: Sequence[Columns]) -> None:
        """Rows that are not `changed` go back to what they were."""
        now = chain.select(slot)
        for part, old in zip(now, before, strict=True):
            for name in part:
                mask = changed.view(-1, *[1] * (part[name].dim() - 1))
                part[name] = torch.where(mask, part[name], old[name])
        chain.write(slot, now)
