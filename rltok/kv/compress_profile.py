"""What CompressKV is calibrated by: which heads retrieve, and what a small cache costs in every layer.

    s_lh = mean over samples of sum_t sum_{i in needle, x_i = y_t} sum_{j in needle} a_tj          (head scores)
    e_l  = sum over samples and steps of ||O_c - O||_F / (||O||_F + 1e-5)                        (layer errors)

x is the prompt, y_t the token that was generated with attention row a_t of head h; O is the output of a layer's
attention block (after its output projection) at a decoding step over all keys, O_c that over all generated keys and
those of the prompt that CompressKV keeps under a small budget. In a causal model the queries and keys of a finished
sequence are those that it was decoded with, so one forward pass over prompt and answer reads every step; samples go one
by one.

A sample counts for the head scores if the answer holds more than half of the needle (ROUGE-1 recall, here over tokens).
Errors are normalised to sum 1 for each data set, averaged over data sets, and normalised again.

Source: arXiv 2508.02401 v1 and its code (`semantic_retrieval_head_detection.py`, `longbench/model/*_new.py`,
`pred_get_importance_score.py`). Its error scores are measured on the tasks that it is evaluated on; here on texts of
one's own. Ours: teacher forcing, where the needle itself stands as the answer.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from rltok.attention.probe import AttentionCall, evaluating, language_model, probing, text_config
from rltok.fast.cache import layer_windows
from rltok.kv.attention import grouped_weights
from rltok.kv.compress_kv import CompressKV, semantic_head_scores
from rltok.kv.needles import Needle, token_recall
from rltok.kv.policy import LayerView

RECALL = 0.5
"""an answer must hold more of the needle than this"""
FIRST = 4
"""heads of a layer that choose"""
ERROR_BUDGET = 32
"""tokens of the prompt in the small cache whose error is measured"""
PROJECTIONS = ("o_proj", "out_proj", "c_proj", "dense")
"""names of the output projection of an attention module"""
Advance = Callable[[], None]


@dataclass(frozen=True)
class HeadScores:
    """What the needles said of the heads."""

    scores: dict[int, Tensor]
    """layer -> (H,) mean over the samples that count"""
    counted: int
    """samples whose answer held enough of the needle"""
    recalls: list[float]
    """of every sample"""


def full_layers(config: Any) -> list[int]:
    """Layers with full attention, which a policy cuts.

    Raises:
        ValueError: none, or a layer whose cache is not keys and values.
    """
    config = config.get_text_config(decoder=True)
    found = [layer for layer, window in enumerate(layer_windows(config)) if window is None]
    if not found:
        raise ValueError(f"{config.model_type!r} has no layer with full attention: a cache policy has nothing to do")
    return found


# Head scores


def head_scores(
    model: nn.Module,
    needles: Sequence[Needle],
    answers: Sequence[Sequence[int]],
    recall: float = RECALL,
    advance: Advance = lambda: None,
) -> HeadScores:
    """Semantic retrieval scores of all query heads of the layers with full attention.

    Args:
        model: a causal language model of transformers.
        needles: the prompts.
        answers: token ids that were generated after each prompt; the needles' own for teacher forcing.
        recall: samples whose answer holds no more of the needle do not count.
        advance: called after every sample.

    Raises:
        ValueError: no sample counts, or attention that cannot be read.
    """
    layers = full_layers(language_model(model).config)
    recalls = [token_recall(needle.answer, answer) for needle, answer in zip(needles, answers, strict=True)]
    total: dict[int, Tensor] = {}
    counted = 0
    for needle, answer, found in zip(needles, answers, recalls, strict=True):
        if found > recall:
            counted += 1
            for layer, score in sample_head_scores(model, needle, answer, layers).items():
                total[layer] = total.get(layer, torch.zeros_like(score)) + score
        advance()
    if not counted:
        best = max(recalls, default=0.0)
        raise ValueError(
            f"no answer of {len(recalls)} holds more than {recall:.0%} of its needle (best {best:.0%}): the model does "
            "not repeat what it reads; try shorter prompts, or read its heads with the needle as the answer"
        )
    return HeadScores({layer: score / counted for layer, score in total.items()}, counted, recalls)


def sample_head_scores(
    model: nn.Module, needle: Needle, answer: Sequence[int], layers: Sequence[int]
) -> dict[int, Tensor]:
    """Layer -> (H,) float32 scores of one prompt and its answer, on the CPU."""
    width = len(needle.prompt)
    generated, prompt = torch.tensor(list(answer)), torch.tensor(needle.prompt)
    found: dict[int, Tensor] = {}

    def collect(call: AttentionCall) -> None:
        rows = call.query[:, :, width - 1 :]  # what generated the first token is the prompt's last query
        weights = grouped_weights(rows, call.key, _causal(call.key, rows.size(2)), call.scaling)
        read = weights.flatten(1, 2)[0, :, :, :width].transpose(0, 1).cpu()  # (steps, H, P)
        found[call.layer] = semantic_head_scores(read, generated, prompt, needle.span)

    with probing(model, layers, collect):
        _forward(model, [*needle.prompt, *answer][:-1])
    _check_read(layers, found)
    return found


def first_heads(scores: Mapping[int, Tensor], count: int = FIRST) -> dict[int, list[int]]:
    """Layer -> its `count` heads of highest score, best first; ties go to the lower head."""
    return {
        layer: score.argsort(descending=True, stable=True)[:count].tolist() for layer, score in sorted(scores.items())
    }


# Layer errors


def layer_errors(
    model: nn.Module,
    needles: Sequence[Needle],
    answers: Sequence[Sequence[int]],
    heads: Mapping[int, Sequence[int]],
    budget: int = ERROR_BUDGET,
    window: int = 8,
    kernel: int = 5,
    advance: Advance = lambda: None,
) -> dict[int, float]:
    """Layer -> sum of relative errors over all decoding steps of all samples, not normalised.

    A step computes the next token from a generated one; the first token of an answer comes from the prompt and has
    none.

    Args:
        model, needles, answers, advance: as for `head_scores`; every sample counts.
        heads: layer -> query heads that choose; a layer that is missing uses all.
        budget: tokens of the prompt that the small cache keeps.
        window, kernel: of the choice.

    Raises:
        ValueError: prompts within the budget, or answers without a decoding step.
    """
    layers = full_layers(language_model(model).config)
    if all(len(needle.prompt) <= budget for needle in needles):
        longest = max((len(needle.prompt) for needle in needles), default=0)
        raise ValueError(f"budget={budget} keeps all of every prompt (longest: {longest} tokens); give longer prompts")
    if all(len(answer) < 2 for answer in answers):
        raise ValueError("no answer has two tokens, so there is no decoding step to measure")
    policy = CompressKV(heads, [budget] * (max(layers) + 1), window, kernel)
    total = dict.fromkeys(layers, 0.0)
    for needle, answer in zip(needles, answers, strict=True):
        if len(needle.prompt) > budget and len(answer) > 1:
            for layer, error in sample_layer_errors(model, needle.prompt, answer, policy, layers).items():
                total[layer] += error
        advance()
    return total


def sample_layer_errors(
    model: nn.Module, prompt: Sequence[int], answer: Sequence[int], policy: CompressKV, layers: Sequence[int]
) -> dict[int, float]:
    """Layer -> sum over the decoding steps of one sample of the error that the policy makes in it."""
    found: dict[int, float] = {}

    def read(call: AttentionCall, module: nn.Module, value: Tensor) -> None:
        chosen = policy.select(_prompt_view(call, value, len(prompt), policy))[0, 0]
        steps = call.query[:, :, len(prompt) :]
        visible = _causal(call.key, steps.size(2))
        kept = torch.ones_like(visible)
        kept[..., : len(prompt)] = False
        kept[..., chosen] = True
        project = output_projection(module)
        outputs = (
            project(attended(steps, call.key, value, mask, call.scaling)).float() for mask in (visible, visible & kept)
        )
        found[call.layer] = float(relative_errors(*outputs).sum())

    with reading(model, layers, read):
        _forward(model, [*prompt, *answer][:-1])
    _check_read(layers, found)
    return found


def relative_errors(full: Tensor, compressed: Tensor) -> Tensor:
    """||O_c - O|| / (||O|| + 1e-5) of every step.

    Args:
        full, compressed: (B, steps, hidden) outputs of the attention block.

    Returns:
        (B, steps).

    Example: O = (3, 4), O_c = (3, 1) gives 3 / (5 + 1e-5).
    """
    return (compressed - full).norm(dim=-1) / (full.norm(dim=-1) + 1e-5)


def normalised_errors(sets: Sequence[Sequence[float]]) -> list[float]:
    """(L,) errors of several data sets, each normalised to sum 1, then their mean, normalised again.

    Raises:
        ValueError: no data set, or one without error.

    Example: (1, 3) and (1, 1) give ((.25 + .5) / 2, (.75 + .5) / 2) = (.375, .625).
    """
    if not sets or any(not sum(errors) > 0 for errors in sets):
        raise ValueError(f"errors={[list(errors) for errors in sets]}; every data set needs an error above 0")
    shares = torch.tensor([list(errors) for errors in sets], dtype=torch.float64)
    mean = (shares / shares.sum(1, keepdim=True)).mean(0)
    return (mean / (mean.sum() + 1e-12)).tolist()


def attended(query: Tensor, key: Tensor, value: Tensor, visible: Tensor, scaling: float) -> Tensor:
    """(B, q, H D) attention of the newest queries over visible keys, in the dtype of the values."""
    weights = grouped_weights(query, key, visible, scaling)  # (B, Hkv, G, q, S)
    heads = (weights @ value.float()[:, :, None]).flatten(1, 2)  # (B, H, q, D)
    return heads.transpose(1, 2).flatten(2).to(value.dtype)


def output_projection(module: nn.Module) -> nn.Module:
    """The projection of an attention module behind its heads.

    Raises:
        ValueError: none under a known name.
    """
    for name in PROJECTIONS:
        found = getattr(module, name, None)
        if isinstance(found, nn.Module):
            return found
    raise ValueError(
        f"{type(module).__name__} has no output projection under a known name ({', '.join(PROJECTIONS)}): its layer "
        "errors cannot be measured"
    )


def _prompt_view(call: AttentionCall, value: Tensor, width: int, policy: CompressKV) -> LayerView:
    """What the policy sees at the end of a prompt."""
    device = call.key.device
    positions = torch.arange(width, device=device, dtype=torch.int32).expand(1, call.key.size(1), -1)
    length = torch.tensor([width], device=device)
    return LayerView(
        index=call.layer,
        budget=policy.kept(call.layer),
        keys=call.key[:, :, :width],
        values=value[:, :, :width],
        positions=positions,
        counts=length,
        lengths=length,
        scaling=call.scaling,
        queries=call.query[:, :, max(0, width - policy.window) : width],
    )


# Forward passes


@contextmanager
def reading(
    model: nn.Module, layers: Sequence[int], read: Callable[[AttentionCall, nn.Module, Tensor], None]
) -> Iterator[None]:
    """As `probing`, with the attention module and the (B, Hkv, T, D) values beside queries and keys."""
    held: dict[int, tuple[nn.Module, Tensor]] = {}

    def collect(call: AttentionCall) -> None:
        read(call, *held.pop(call.layer))

    with probing(model, layers, collect):
        name = text_config(language_model(model))._attn_implementation  # eager was replaced by now
        probe = ALL_ATTENTION_FUNCTIONS[name]

        def remember(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Any:
            held.clear()
            held[getattr(module, "layer_idx", -1)] = module, value.detach()
            return probe(module, query, key, value, *args, **kwargs)

        ALL_ATTENTION_FUNCTIONS[name] = remember
        try:
            yield
        finally:
            ALL_ATTENTION_FUNCTIONS[name] = probe


def _forward(model: nn.Module, ids: Sequence[int]) -> None:
    device = next(model.parameters()).device
    takes = inspect.signature(language_model(model).forward).parameters
    head = {"logits_to_keep": 1} if "logits_to_keep" in takes else {}
    with torch.no_grad(), evaluating(model):
        model(input_ids=torch.tensor([list(ids)], device=device), use_cache=False, **head)


def _causal(key: Tensor, count: int) -> Tensor:
    """(1, 1, count, T) True where the last `count` positions may look."""
    column = torch.arange(key.size(2), device=key.device)
    return (column <= column[key.size(2) - count :, None])[None, None]


def _check_read(layers: Sequence[int], found: Mapping[int, Any]) -> None:
    missing = [layer for layer in layers if layer not in found]
    if missing:
        raise ValueError(f"layers {missing} never called transformers' attention interface: they cannot be read")
