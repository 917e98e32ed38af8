"""Prompts made of fixed segments and shared texts, prefilled without computing everything again.

    prompt = fixed_0, shared_1, fixed_1, shared_2, fixed_2 ...        a reader's template around what others wrote

`SegmentCache` prefills such a prompt up to its last token, which `sample_rows` computes and continues.

    dense     every token is computed
    prefix    the longest beginning that an earlier prompt had is copied, the rest computed: exact
    kvcomm    the same up to the first shared text that is new here; that text and what follows are put together from
              stored keys and values (rotated to their place, corrected by anchors), or computed densely and stored as
              anchors where `predict_as_anchor` says so; approximate

A segment moves by rotating its keys by the difference of the starts (`rotate_keys`), its values stay: exact in layer 0,
where a token's keys and values depend on the token and its position alone. In the layers above they depend on
everything before the token, which is what anchors estimate. The base of a text is what its writer's decoding left
(`publish`), or is computed once, alone. A prompt that was estimated is never copied from.

All of it belongs to the weights that computed it. The cache looks at the version counters of the parameters before
every prefill and forgets everything when one has moved; where an optimizer writes past them (`.data`), use
`flush_on_step` or `FlushOnStep`.

For several completions of one prompt no anchors are needed: one prefill serves them all (`sample_rows` repeats it).
One prompt at a time, full attention, rotary keys.

Source: KVCOMM, arXiv 2510.12872; see `anchors.py`.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.cache_utils import DynamicCache

from rltok.fast.cache import layer_windows
from rltok.fast.row_random import pick, uniforms
from rltok.fast.serve import evaluation_mode, forward_arguments, servable_model
from rltok.kv.anchors import KV, Anchor, Flushable, KVAnchorPool, joined
from rltok.kv.rotary import model_inv_freq, rotate_keys

Mode = Literal["dense", "prefix", "kvcomm"]
MODES: tuple[str, ...] = ("dense", "prefix", "kvcomm")

Ids = tuple[int, ...]


@dataclass(frozen=True)
class SegmentPrompt:
    """A reader's template with the shared texts in their places; an empty text is left out of the account."""

    reader: str
    """whose template this is; anchors belong to a reader"""
    fixed: tuple[Ids, ...]
    """n + 1 token sequences of the template, of which only the first must not be empty"""
    shared: tuple[Ids, ...] = ()
    """n token sequences, number i between fixed i and fixed i + 1"""

    def __post_init__(self) -> None:
        if len(self.fixed) != len(self.shared) + 1:
            raise ValueError(
                f"{len(self.fixed)} fixed segments around {len(self.shared)} shared texts: there must be one more"
            )
        if not self.fixed[0]:
            raise ValueError("fixed[0] is empty: a prompt begins with a segment of its reader")

    @property
    def ids(self) -> Ids:
        """All tokens."""
        parts = [*self.fixed[0]]
        for shared, fixed in zip(self.shared, self.fixed[1:], strict=True):
            parts += [*shared, *fixed]
        return tuple(parts)

    @property
    def starts(self) -> list[int]:
        """Where every shared text begins."""
        at, found = len(self.fixed[0]), []
        for shared, fixed in zip(self.shared, self.fixed[1:], strict=True):
            found.append(at)
            at += len(shared) + len(fixed)
        return found


@dataclass(frozen=True)
class Prefill:
    """A prompt's keys and values without those of its last token."""

    ids: Ids
    kv: KV | None
    """of all but the last token; None for a prompt of one token"""
    copied: int
    """tokens copied from an equal beginning, exact"""
    estimated: int
    """tokens put together from stored segments"""

    @property
    def exact(self) -> bool:
        """Whether the keys and values are the model's own."""
        return self.estimated == 0


@dataclass
class SegmentCounts:
    """What prompts cost since the start."""

    prompt_tokens: int = 0
    computed: int = 0
    """tokens that went through the model, bases and last tokens included"""
    copied: int = 0
    estimated: int = 0
    anchors: int = 0
    """texts that were computed densely to become anchors"""
    flushes: int = 0

    @property
    def saved(self) -> float:
        """Share of the prompt tokens that were not computed; negative where bases cost more than they saved."""
        return 1 - self.computed / self.prompt_tokens if self.prompt_tokens else 0.0


class SegmentCache:
    """Prefills prompts of one model.

    Args:
        model: a decoder-only model of transformers with full attention and rotary keys, or a PEFT model around one.
        mode: see the module; only `kvcomm` estimates.
        pool: anchors of mode `kvcomm`; None: a pool with its defaults.
        prompts: prompts whose keys and values are held, the ones used last.

    Raises:
        ValueError: an unknown mode, a model with sliding windows or without rotary keys, a pool without `kvcomm`.
    """

    def __init__(self, model: Any, mode: Mode = "prefix", pool: KVAnchorPool | None = None, prompts: int = 32) -> None:
        if mode not in MODES:
            raise ValueError(f"mode={mode!r}; allowed: {', '.join(MODES)}")
        if pool is not None and mode != "kvcomm":
            raise ValueError(f"a pool of anchors is used by mode='kvcomm' alone, but mode={mode!r}")
        if prompts < 1:
            raise ValueError(f"prompts={prompts} must be >= 1")
        self.model, self.mode, self.prompts = servable_model(model), mode, prompts
        windows = [window for window in layer_windows(self.model.config) if window is not None]
        if windows:
            raise ValueError(
                f"{self.model.config.model_type!r} has sliding windows of {windows[0]} tokens, whose layers forget "
                "the beginning of a prompt: segments cannot be put together; use generate_rows"
            )
        self.pool = KVAnchorPool() if pool is None and mode == "kvcomm" else pool
        self.inv_freq = model_inv_freq(self.model.config) if mode == "kvcomm" else ()
        self.counts = SegmentCounts()
        self._options = {"logits_to_keep": 1} if "logits_to_keep" in forward_arguments(self.model) else {}
        self._seen: OrderedDict[Ids, KV] = OrderedDict()
        self._bases: dict[Ids, KV] = {}
        self._templates: dict[tuple[Ids, ...], list[KV]] = {}
        self._weights = weights_version(self.model)

    def __len__(self) -> int:
        """Things held: prompts, bases, templates and anchors."""
        return len(self._seen) + len(self._bases) + len(self._templates) + (len(self.pool) if self.pool else 0)

    def flush(self) -> None:
        """Forget everything: the weights have changed."""
        self._seen.clear()
        self._bases.clear()
        self._templates.clear()
        if self.pool is not None:
            self.pool.flush()
        self.counts.flushes += 1
        self._weights = weights_version(self.model)

    @torch.no_grad()
    def prefill(self, prompt: SegmentPrompt) -> Prefill:
        """Keys and values of all tokens but the last, which `sample_rows` computes."""
        if weights_version(self.model) != self._weights:
            self.flush()
        ids = prompt.ids
        self.counts.prompt_tokens += len(ids)
        self.counts.computed += 1  # the last token
        known = self._known(ids[:-1])
        if self.mode == "kvcomm":
            estimated = self._estimate(prompt, known)
            if estimated is not None:
                return estimated
        return Prefill(ids, self._dense(ids[:-1], known), known, 0)

    # ---- exact

    def _known(self, ids: Ids) -> int:
        """Length of the longest beginning that is held."""
        return 0 if self.mode == "dense" else max((common(ids, other) for other in self._seen), default=0)

    def _dense(self, ids: Ids, known: int) -> KV | None:
        """Keys and values of some tokens, of which the first `known` are held; None of none."""
        before = None
        if known:
            source = max(self._seen, key=lambda other: common(ids, other))
            self._seen.move_to_end(source)
            before = self._seen[source].span(0, known)
            self.counts.copied += known
        if known == len(ids):
            return before
        kv = self._forward(ids[known:], before)
        if self.mode != "dense":
            self._seen[ids] = kv
            while len(self._seen) > self.prompts:
                self._seen.popitem(last=False)
        return kv

    def _forward(self, ids: Sequence[int], before: KV | None) -> KV:
        """Keys and values of what is before and of these tokens behind it."""
        self.counts.computed += len(ids)
        cache = dynamic_cache(before)
        start = 0 if before is None else before.tokens
        device = self.model.device
        with evaluation_mode(self.model):
            self.model(
                input_ids=torch.tensor([list(ids)], device=device),
                position_ids=torch.arange(start, start + len(ids), device=device)[None],
                past_key_values=cache,
                use_cache=True,
                **self._options,
            )
        return stacked(cache)

    # ---- estimated

    def _estimate(self, prompt: SegmentPrompt, known: int) -> Prefill | None:
        """The prompt with stored segments from the first shared text on that is new here; None if there is none.

        Where an anchor is wanted, the prompt is computed densely, and that is what it becomes.
        """
        assert self.pool is not None
        ids, starts = prompt.ids[:-1], prompt.starts
        ends = [start + len(text) for start, text in zip(starts, prompt.shared, strict=True)]
        first = next((i for i, end in enumerate(ends) if end > known and prompt.shared[i]), None)
        if first is None:
            return None
        places = list(range(first, len(starts)))
        bases = {i: self._base(prompt.shared[i]) for i in places if prompt.shared[i]}
        behind = self._template(prompt.fixed)
        behind[-1] = behind[-1].span(0, max(0, behind[-1].tokens - 1))  # the last token is computed
        wanted = [
            i for i, base in bases.items() if self.pool.decide(_place(prompt, i), base, behind[i + 1].tokens).new_anchor
        ]
        if wanted:
            return self._learn(prompt, known, wanted, bases, behind)
        begin = self._dense(ids[: starts[first]], min(known, starts[first]))
        parts = [begin] if begin is not None else []
        for i in places:
            text, fixed = bases.get(i), behind[i + 1]
            if text is not None:
                text, fixed = self.pool.correct(_place(prompt, i), text, fixed)
                parts.append(self.rotated(text, starts[i]))
            parts.append(self.rotated(fixed, ends[i]))
        kv = joined(parts).span(0, len(ids))
        estimated = len(ids) - starts[first]
        self.counts.estimated += estimated
        return Prefill(prompt.ids, kv, min(known, starts[first]), estimated)

    def _learn(
        self, prompt: SegmentPrompt, known: int, wanted: Sequence[int], bases: dict[int, KV], behind: list[KV]
    ) -> Prefill:
        """Compute a prompt densely and make anchors of some of its shared texts."""
        assert self.pool is not None
        ids, starts = prompt.ids[:-1], prompt.starts
        whole = self._dense(ids, known)
        assert whole is not None
        for i in wanted:
            text, fixed = prompt.shared[i], behind[i + 1]
            end = starts[i] + len(text)
            if end > len(ids):  # the prompt ends with this text
                continue
            real = self.rotated(whole.span(starts[i], end), -starts[i])
            after = self.rotated(whole.span(end, end + fixed.tokens), -end)
            self.pool.add(_place(prompt, i), text, Anchor(bases[i], real.minus(bases[i]), after.minus(fixed)))
            self.counts.anchors += 1
        return Prefill(prompt.ids, whole, known, 0)

    def publish(self, text: Ids, kv: KV | None, start: int) -> None:
        """Take over the base of a text from whoever wrote it, which saves computing it alone (mode `kvcomm`).

        Args:
            text: as others will read it.
            kv: of a completion that begins with it, see `Rows.kv`; nothing happens if it is shorter than the text.
            start: position of the completion's first token.
        """
        stale = weights_version(self.model) != self._weights
        if self.mode != "kvcomm" or stale or not text or kv is None or kv.tokens < len(text):
            return
        self._bases.setdefault(text, self.rotated(kv.span(0, len(text)), -start))

    def _base(self, text: Ids) -> KV:
        """A shared text at position 0, as its writer left it or computed alone."""
        if text not in self._bases:
            self._bases[text] = self._forward(text, None)
        return self._bases[text]

    def _template(self, fixed: tuple[Ids, ...]) -> list[KV]:
        """A reader's fixed segments, each at position 0, computed one behind the other without the shared texts."""
        if fixed not in self._templates:
            whole = self._forward([token for part in fixed for token in part], None)
            parts, at = [], 0
            for part in fixed:
                parts.append(self.rotated(whole.span(at, at + len(part)), -at))
                at += len(part)
            self._templates[fixed] = parts
        return list(self._templates[fixed])

    def rotated(self, kv: KV, delta: int) -> KV:
        """The same tokens so many positions further on; values do not know positions."""
        keys = [rotate_keys(keys, delta, inv_freq) for keys, inv_freq in zip(kv.keys, self.inv_freq, strict=True)]
        return KV(torch.stack(keys), kv.values)


def _place(prompt: SegmentPrompt, index: int) -> tuple[str, tuple[Ids, ...], int]:
    """Name of a placeholder: anchors fit this reader, this template and this place in it alone."""
    return prompt.reader, prompt.fixed, index


def common(left: Sequence[int], right: Sequence[int]) -> int:
    """Length of the beginning that two sequences share."""
    for index, (a, b) in enumerate(zip(left, right, strict=False)):
        if a != b:
            return index
    return min(len(left), len(right))


def dynamic_cache(kv: KV | None) -> DynamicCache:
    """transformers' cache with these keys and values in it; its tensors are not shared."""
    if kv is None:
        return DynamicCache()
    return DynamicCache(list(zip(kv.keys, kv.values, strict=True)))


def stacked(cache: DynamicCache) -> KV:
    """What a dense cache of transformers holds."""
    return KV(
        torch.stack([layer.keys for layer in cache.layers]), torch.stack([layer.values for layer in cache.layers])
    )


def weights_version(model: torch.nn.Module) -> tuple[int, int]:
    """Changes when parameters are written in place or replaced; writes through `.data` are not seen."""
    return sum(parameter._version for parameter in model.parameters()), sum(map(id, model.parameters()))


# ---- decoding


@dataclass
class Rows:
    """Completions of one prompt."""

    ids: list[list[int]] = field(default_factory=list)
    """the end token included"""
    logps: list[list[float]] = field(default_factory=list)
    """of the tokens under what drew them, nats"""
    kv: KV | None = None
    """of the first completion, without its last token; None where that is all there is"""


@torch.no_grad()
def sample_rows(
    model: Any, prefill: Prefill, keys: Sequence[int], max_new_tokens: int, end_ids: Sequence[int] = ()
) -> Rows:
    """Completions at temperature 1 behind a prefilled prompt, which is copied for every row.

    Args:
        model: the one that prefilled.
        prefill: of the prompt.
        keys: of each completion's random numbers, see `rltok.fast.row_key`.
        max_new_tokens: tokens of a completion at most.
        end_ids: tokens that end a completion.
    """
    base = servable_model(model)
    cache = dynamic_cache(prefill.kv)
    if prefill.kv is not None:
        cache.batch_repeat_interleave(len(keys))
    device, ends = base.device, set(end_ids)
    words = torch.tensor(list(keys), dtype=torch.int64, device=device)
    ids = torch.full((len(keys), 1), prefill.ids[-1], device=device)
    rows = Rows([[] for _ in keys], [[] for _ in keys])
    with evaluation_mode(base):
        for step in range(max_new_tokens):
            at = torch.full_like(ids, len(prefill.ids) - 1 + step)
            logits = base(input_ids=ids, position_ids=at, past_key_values=cache, use_cache=True).logits[:, -1]
            tokens, logps = pick(logits, uniforms(words, torch.full_like(words, step)))
            open_rows = [row for row, drawn in enumerate(rows.ids) if not drawn or drawn[-1] not in ends]
            for row in open_rows:
                rows.ids[row].append(int(tokens[row]))
                rows.logps[row].append(float(logps[row]))
            ids = tokens[:, None]
            if all(drawn[-1] in ends for drawn in rows.ids):
                break
    begin, count = len(prefill.ids), len(rows.ids[0]) - 1
    if count:
        whole = stacked(cache).span(begin, begin + count)
        rows.kv = KV(whole.keys[:, :1].clone(), whole.values[:, :1].clone())
    return rows


class FlushOnStep(TrainerCallback):
    """Flushes stores (`SegmentCache`, `KVAnchorPool`) after every optimizer step of a transformers Trainer."""

    def __init__(self, *stores: Flushable) -> None:
        self.stores = stores

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """The weights are new."""
        for store in self.stores:
            store.flush()


def dense_logps(model: Any, prompt: Ids, completions: Sequence[Sequence[int]]) -> list[Tensor]:
    """Log-probabilities of completions of one prompt in a pass without a cache, as a learner scores them; with
    gradients. Nothing is masked: what stands behind a shorter completion is not seen by it."""
    base = servable_model(model)
    longest = max(map(len, completions))
    ids = torch.tensor(
        [[*prompt, *completion, *[0] * (longest - len(completion))] for completion in completions], device=base.device
    )
    logits = base(input_ids=ids, use_cache=False).logits[:, len(prompt) - 1 : -1]
    scores = logits.float().log_softmax(-1).gather(2, ids[:, len(prompt) :, None])[..., 0]
    return [row[: len(completion)] for row, completion in zip(scores, completions, strict=True)]
