"""EdgeQAT's losses on queries and keys: keep their spread, and keep the score maps of a full-precision teacher.

    L_E = - r_E log( sum [ log(1 + var q) + log(1 + var k) ] )     one unbiased variance over the head size per token
    c   = cosine of the student's and the teacher's map q k^T scaling, one per layer, row and head
    L_D = r_D mean(1 - c)
    L   = L_task + L_E + L_D + gamma tau^2 KL(teacher || student)

Queries and keys are those after rotary and fake quantisation. Only valid tokens count, and of the maps only what
causal attention sees, so padding and future positions change nothing. Maps are formed in blocks of query rows, in the
backward pass again: none is ever kept.

Losses are those of the batch at hand. L_E is the log of a sum, whose gradient is 1 / sum; `spread_sums` and
`streamed_cosines` are what ranks add up (`rltok.quant.qat_training`).

Source: arXiv 2402.10787 (EdgeQAT; version 2 is called Squat). As printed and as coded there, L_D = + r_D log(sum c):
descent then lowers the similarity that the loss is to raise. That form is kept as `printed`, for comparison.

Legend: B rows, T tokens, Hq query heads, Hkv key heads (Hq a multiple), D head size, L layers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import cross_entropy
from torch.utils.checkpoint import checkpoint

EntropyForm = Literal["code", "mean", "paper"]
DistributionForm = Literal["recommended", "log", "printed"]
ENTROPY_FORMS = ("code", "mean", "paper")
DISTRIBUTION_FORMS = ("recommended", "log", "printed")
MIN_NORM = 1e-6
"""smallest norm of a map in a cosine"""


class QueryKey(NamedTuple):
    """What one attention layer compares."""

    query: Tensor
    """(B, Hq, T, D)"""
    key: Tensor
    """(B, Hkv, T, D)"""
    scaling: float
    """factor of the scores"""


def entropy_loss(
    queries: Tensor | Sequence[Tensor],
    keys: Tensor | Sequence[Tensor],
    mask: Tensor | None = None,
    rate: float = 0.5,
    form: EntropyForm = "code",
) -> Tensor:
    """Low where queries and keys are spread out: a stand-in for their entropy, 1/2 log(2 pi e var) of a Gaussian.

    code     - rate log( sum over layers, heads, valid tokens of [log(1 + var q) + log(1 + var k)] ), unbiased
             variances over the head size
    mean     the same of the mean instead of the sum: the same gradient, and a value that does not grow with the batch
    paper    - rate log( sum over layers and heads of log(1 + var q var k) ), one population variance per layer and head
             over its valid tokens and the head size

    Keys that several query heads share count once for each, as after the repetition of heads.

    Args:
        queries: (B, Hq, T, D), one such tensor per layer, or (L, B, Hq, T, D); (T, D) is one head.
        keys: the same with Hkv heads.
        mask: (B, T) 1 at valid tokens; None: all are.
        rate: r_E; 0 is no loss.
        form: see above.

    Returns:
        Scalar in float32 (float64 for float64 inputs); 0 with a zero gradient if no token is valid.

    Raises:
        ValueError: an unknown form, shapes that do not fit, head size 1 (no unbiased variance), or no variance at all.

    Example: q = [[1, 3], [2, 2]], k = [[0, 2], [1, 1]], one head: code -0.393598, paper +0.749970.
    """
    _check_form(form, ENTROPY_FORMS)
    layers = _paired_layers(queries, keys)
    if form == "paper":
        total, count = layers[0][0].new_zeros((), dtype=_wide(layers[0][0])), torch.ones(())
        for query, key in layers:
            valid = _valid(mask, query)
            spread = _head_variance(key, valid).repeat_interleave(_groups(query, key)) * _head_variance(query, valid)
            total = total + torch.log1p(spread).sum()
    else:
        total, count = spread_sums(queries, keys, mask)
    if not bool(_valid(mask, layers[0][0]).any()):
        return total * 0.0
    check_spread(total)
    return -rate * torch.log(total / count if form == "mean" else total)


def spread_sums(
    queries: Tensor | Sequence[Tensor], keys: Tensor | Sequence[Tensor], mask: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Sum over layers, heads and valid tokens of log(1 + var q) + log(1 + var k), and the number of its terms.

    `entropy_loss` of several batches together is the log of the sum of these sums, of all ranks for example.

    Args:
        queries, keys, mask: as for `entropy_loss`.

    Returns:
        Two scalars, the second without gradient.

    Raises:
        ValueError: as `entropy_loss`, but for a sum of 0.
    """
    layers = _paired_layers(queries, keys)
    total = layers[0][0].new_zeros((), dtype=_wide(layers[0][0]))
    count = torch.zeros_like(total)
    for query, key in layers:
        valid = _valid(mask, query)
        total = total + _token_spread(query, valid) + _groups(query, key) * _token_spread(key, valid)
        count = count + valid.sum() * query.size(1)
    return total, count


def check_spread(total: Tensor) -> None:
    """Refuse a sum whose log does not exist.

    Raises:
        ValueError: it is not above 0.
    """
    if float(total.detach()) <= 0:
        raise ValueError("queries and keys have no variance at all, so the entropy loss is infinite; check their steps")


def distribution_loss(
    student: Tensor | Sequence[Tensor],
    teacher: Tensor | Sequence[Tensor],
    mask: Tensor | None = None,
    rate: float = 1.0,
    form: DistributionForm = "recommended",
) -> Tensor:
    """How far the student's score maps point away from the teacher's.

    recommended  rate mean(1 - c)
    log          - rate log(mean c)
    printed      + rate log(sum c), the source's formula: descent lowers the cosines

    c is the cosine of the lower triangles of valid tokens, norms at least 1e-6. Rows without a valid token do not
    count.

    Args:
        student, teacher: (B, H, T, T) scores before the softmax, one such tensor per layer, or (L, B, H, T, T); (T, T)
            is one head. The teacher gets no gradient.
        mask: (B, T) 1 at valid tokens; None: all are.
        rate: r_D; 0 is no loss.
        form: see above.

    Returns:
        Scalar; identical maps give 0 with zero gradient under `recommended`.

    Raises:
        ValueError: an unknown form, shapes that do not fit, or cosines whose mean is not positive where a log is taken.

    Example: student [[1, 0], [1, 1]], teacher [[1, 0], [0, 1]]: c = 0.816497, recommended 0.183503, printed -0.202733.
    """
    _check_form(form, DISTRIBUTION_FORMS)
    pairs = list(zip(_as_list(student), _as_list(teacher), strict=True))
    found = [map_cosines(left, right, mask) for left, right in pairs]
    return _of_cosines(found, rate, form)


def streamed_distribution_loss(
    student: Sequence[QueryKey],
    teacher: Sequence[QueryKey],
    mask: Tensor | None = None,
    rate: float = 1.0,
    form: DistributionForm = "recommended",
    block: int = 128,
) -> Tensor:
    """`distribution_loss` from queries and keys, with the same value and gradient and without a whole map.

    Args:
        student, teacher: one `QueryKey` per layer, with as many query heads each; head sizes and key heads may differ.
        mask: (B, T) 1 at valid tokens; None: all are.
        rate, form: as for `distribution_loss`.
        block: query rows whose scores are held at once; memory and speed only.

    Returns:
        Scalar; the gradient reaches the student's queries and keys.

    Raises:
        ValueError: as for `distribution_loss`, or a block below 1.
    """
    _check_form(form, DISTRIBUTION_FORMS)
    return _of_cosines(streamed_cosines(student, teacher, mask, block), rate, form)


def streamed_cosines(
    student: Sequence[QueryKey], teacher: Sequence[QueryKey], mask: Tensor | None = None, block: int = 128
) -> list[tuple[Tensor, Tensor]]:
    """`map_cosines` of every layer from queries and keys, without a whole map.

    Args:
        student, teacher, mask, block: as for `streamed_distribution_loss`.

    Returns:
        Per layer (B, H) cosines, and (B, 1) bool: the row has a valid token.

    Raises:
        ValueError: shapes that do not fit, or a block below 1.
    """
    if block < 1:
        raise ValueError(f"block={block}; allowed: >= 1 query row")
    found = []
    for left, right in zip(student, teacher, strict=True):
        if left.query.shape[:3] != right.query.shape[:3]:
            raise ValueError(
                f"student queries {tuple(left.query.shape)} and teacher queries {tuple(right.query.shape)} must agree "
                "in rows, heads and tokens: the teacher is the student's start checkpoint"
            )
        valid = _valid(mask, left.query)
        products = _MapProducts.apply(
            *_clean(left, valid), *_clean(right, valid), left.scaling, right.scaling, valid, block
        )
        found.append((_cosine(*products), valid.any(1)[:, None]))
    return found


def map_cosines(student: Tensor, teacher: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Cosines of score maps over the lower triangle of valid tokens.

    Args:
        student, teacher: (..., T, T).
        mask: (T,) or (B, T), 1 at valid tokens; None: all are.

    Returns:
        (...) cosines, 0 where a row has no valid token, and a bool tensor that broadcasts to them: the row has one.

    Raises:
        ValueError: shapes that do not fit.
    """
    if student.shape != teacher.shape or student.dim() < 2 or student.size(-1) != student.size(-2):
        raise ValueError(f"maps {tuple(student.shape)} and {tuple(teacher.shape)}; allowed: equal, (..., T, T)")
    width = student.size(-1)
    valid = torch.ones(width, dtype=torch.bool, device=student.device) if mask is None else mask.bool()
    if valid.size(-1) != width:
        raise ValueError(f"mask {tuple(valid.shape)} has not the {width} tokens of the maps")
    if valid.dim() == 2 and student.dim() > 3:
        valid = valid[:, None]
    compared = (valid[..., :, None] & valid[..., None, :]).tril()
    left = torch.where(compared, student.to(_wide(student)), 0.0)
    right = torch.where(compared, teacher.detach().to(_wide(student)), 0.0)
    products = ((left * right).sum((-2, -1)), left.square().sum((-2, -1)), right.square().sum((-2, -1)))
    return _cosine(*products), valid.any(-1)


def distillation_loss(
    logits: Tensor,
    teacher_logits: Tensor,
    mask: Tensor,
    temperature: float = 2.0,
    gamma: float = 0.5,
    labels: Tensor | None = None,
) -> Tensor:
    """Divergence from a teacher's predictions, beside the task's own loss.

        gamma tau^2 mean over valid tokens of KL(softmax(teacher / tau) || softmax(student / tau))
        + (1 - gamma) mean over valid tokens of the cross-entropy, only with `labels`

    Without labels the loss of the task stays with the caller, who weighs it by 1 - gamma.

    Args:
        logits, teacher_logits: (B, T, V). The teacher gets no gradient.
        mask: (B, T) 1 at valid tokens.
        temperature: tau, above 0.
        gamma: weight of the divergence, 0 to 1; 0 is the cross-entropy alone.
        labels: (B, T) token ids that `logits` at the same place predict; None: only the divergence.

    Returns:
        Scalar, 0 if no token is valid.

    Raises:
        ValueError: a temperature or gamma out of range, or shapes that do not fit.
    """
    if temperature <= 0:
        raise ValueError(f"temperature={temperature}; allowed: above 0")
    if not 0 <= gamma <= 1:
        raise ValueError(f"gamma={gamma}; allowed: 0..1")
    if logits.shape != teacher_logits.shape or mask.shape != logits.shape[:-1]:
        shapes = f"logits {tuple(logits.shape)}, teacher_logits {tuple(teacher_logits.shape)}, mask {tuple(mask.shape)}"
        raise ValueError(f"{shapes}; allowed: (B, T, V) twice and (B, T)")
    rows = mask.bool()
    student = logits[rows].to(_wide(logits))  # (N, V): what padding holds stays out of the gradient
    teacher = teacher_logits.detach()[rows].to(student.dtype)
    count = max(1, student.size(0))
    ours, theirs = (student / temperature).log_softmax(-1), (teacher / temperature).log_softmax(-1)
    loss = gamma * temperature**2 * (theirs.exp() * (theirs - ours)).sum() / count
    if labels is not None:
        loss = loss + (1 - gamma) * cross_entropy(student, labels[rows], reduction="sum") / count
    return loss


def hidden_divergence(
    hidden: Tensor,
    head: Callable[[Tensor], Tensor],
    teacher_hidden: Tensor,
    teacher_head: Callable[[Tensor], Tensor],
    temperature: float = 2.0,
    block: int = 1024,
) -> Tensor:
    """tau^2 sum over tokens of KL(softmax(teacher / tau) || softmax(student / tau)), logits formed block by block.

    Args:
        hidden, teacher_hidden: (N, D) and (N, D') states below the heads. The teacher gets no gradient.
        head, teacher_head: (n, D) -> (n, V) logits.
        temperature: tau, above 0.
        block: tokens whose logits are held at once, in the backward pass again; memory and speed only.

    Returns:
        Scalar; divided by N and times gamma it is `distillation_loss` without labels.

    Raises:
        ValueError: a temperature or block out of range.
    """
    if temperature <= 0 or block < 1:
        raise ValueError(f"temperature={temperature}, block={block}; allowed: above 0 and >= 1")

    def part(states: Tensor, others: Tensor) -> Tensor:
        with torch.no_grad():
            wanted = teacher_head(others)
            theirs = (wanted.to(_wide(wanted)) / temperature).log_softmax(-1)
        ours = (head(states).to(theirs.dtype) / temperature).log_softmax(-1)
        return temperature**2 * (theirs.exp() * (theirs - ours)).sum()

    total = hidden.new_zeros((), dtype=_wide(hidden))
    for states, others in zip(hidden.split(block), teacher_hidden.detach().split(block), strict=True):
        total = total + checkpoint(part, states, others, use_reentrant=False)
    return total


class _MapProducts(torch.autograd.Function):
    """(B, H) products <s, t>, <s, s>, <t, t> of two causal score maps, block by block in both directions."""

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        teacher_query: Tensor,
        teacher_key: Tensor,
        scaling: float,
        teacher_scaling: float,
        valid: Tensor,
        block: int,
    ) -> tuple[Tensor, Tensor, Tensor]:
        ctx.save_for_backward(query, key, teacher_query, teacher_key, valid)
        ctx.settings = scaling, teacher_scaling, block
        dot, left, right = (query.new_zeros(query.shape[:2]) for _ in range(3))
        for start in range(0, query.size(2), block):
            ours = _score_block(query, key, scaling, valid, start, block)
            theirs = _score_block(teacher_query, teacher_key, teacher_scaling, valid, start, block)
            dot += (ours * theirs).sum((-2, -1))
            left += ours.square().sum((-2, -1))
            right += theirs.square().sum((-2, -1))
        ctx.mark_non_differentiable(right)
        return dot, left, right

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_dot: Tensor, grad_left: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        query, key, teacher_query, teacher_key, valid = ctx.saved_tensors
        scaling, teacher_scaling, block = ctx.settings
        rows, heads, width, size = query.shape
        grad_query, grad_key = torch.zeros_like(query), torch.zeros_like(key)
        for start in range(0, width, block):
            stop = min(start + block, width)
            ours = _score_block(query, key, scaling, valid, start, block)
            theirs = _score_block(teacher_query, teacher_key, teacher_scaling, valid, start, block)
            grad = scaling * (grad_dot[..., None, None] * theirs + 2 * grad_left[..., None, None] * ours)
            grad = grad.view(rows, key.size(1), -1, stop)  # (B, Hkv, G n, S): the queries of a key head side by side
            part = query[:, :, start:stop].reshape(rows, key.size(1), -1, size)
            grad_query[:, :, start:stop] = (grad @ key[:, :, :stop]).view(rows, heads, stop - start, size)
            grad_key[:, :, :stop] += grad.transpose(-1, -2) @ part
        return grad_query, grad_key, None, None, None, None, None, None


def _score_block(query: Tensor, key: Tensor, scaling: float, valid: Tensor, start: int, block: int) -> Tensor:
    """(B, Hq, n, stop) scores of the query rows [start, stop), 0 at future and at padded positions."""
    rows, heads, width, size = query.shape
    stop = min(start + block, width)
    part = query[:, :, start:stop].reshape(rows, key.size(1), -1, size)
    scores = (part @ key[:, :, :stop].transpose(-1, -2)).view(rows, heads, stop - start, stop) * scaling
    index = torch.arange(stop, device=query.device)
    seen = (index <= index[start:, None]) & valid[:, None, :stop] & valid[:, start:stop, None]
    return scores.masked_fill_(~seen[:, None], 0.0)


def _cosine(dot: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """Cosine from three products; exactly 1 for equal maps."""
    floor = MIN_NORM**2
    return dot / (left.clamp(min=floor) * right.clamp(min=floor)).sqrt()


def _of_cosines(found: Sequence[tuple[Tensor, Tensor]], rate: float, form: DistributionForm) -> Tensor:
    """The loss of the cosines of all layers; each comes with a bool tensor that says what counts."""
    if not found:
        raise ValueError("the distribution loss needs at least one layer")
    cosines = torch.cat([cosine.flatten() for cosine, _ in found])
    counted = torch.cat([counts.expand_as(cosine).flatten() for cosine, counts in found])
    number = counted.sum()
    if not bool(number):
        return cosines.sum() * 0.0
    if form == "recommended":
        return rate * torch.where(counted, 1 - cosines, 0.0).sum() / number
    total = torch.where(counted, cosines, 0.0).sum()
    if float(total.detach()) <= 0:
        raise ValueError(
            f"the cosines of the score maps average {float(total.detach()) / int(number):.4g}, whose log does not "
            f"exist; set form='recommended' (seen: {form!r})"
        )
    return rate * torch.log(total) if form == "printed" else -rate * torch.log(total / number)


def _clean(layer: QueryKey, valid: Tensor) -> tuple[Tensor, Tensor]:
    """Queries and keys in the dtype of sums, 0 at padding: what is there must not reach a gradient as NaN."""
    _groups(layer.query, layer.key)
    kind, outside = _wide(layer.query), ~valid[:, None, :, None]
    return layer.query.to(kind).masked_fill(outside, 0.0), layer.key.to(kind).masked_fill(outside, 0.0)


def _token_spread(values: Tensor, valid: Tensor) -> Tensor:
    """Sum over heads and valid tokens of log(1 + unbiased variance over the head size)."""
    if values.size(-1) < 2:
        raise ValueError(f"head size {values.size(-1)} has no unbiased variance; allowed: >= 2, or form='paper'")
    values = values.to(_wide(values)).masked_fill(~valid[:, None, :, None], 0.0)  # no variance, so nothing to the sum
    return torch.log1p(values.var(-1)).sum()


def _head_variance(values: Tensor, valid: Tensor) -> Tensor:
    """(H,) population variance over rows, valid tokens and the head size."""
    inside = valid[:, None, :, None]
    values = values.to(_wide(values)).masked_fill(~inside, 0.0)
    count = (valid.sum() * values.size(-1)).clamp(min=1)
    mean = values.sum((0, 2, 3), keepdim=True) / count
    return ((values - mean) * inside).square().sum((0, 2, 3)) / count


def _wide(values: Tensor) -> torch.dtype:
    return torch.promote_types(values.dtype, torch.float32)


def _as_list(values: Tensor | Sequence[Tensor]) -> list[Tensor]:
    return [values] if isinstance(values, Tensor) else list(values)


def _paired_layers(queries: Tensor | Sequence[Tensor], keys: Tensor | Sequence[Tensor]) -> list[tuple[Tensor, Tensor]]:
    layers = list(zip(_layers(queries), _layers(keys), strict=True))
    if not layers:
        raise ValueError("the entropy loss needs the queries and keys of at least one layer")
    return layers


def _layers(values: Tensor | Sequence[Tensor]) -> list[Tensor]:
    """One (B, H, T, D) tensor per layer."""
    parts = list(values.unbind(0)) if isinstance(values, Tensor) and values.dim() == 5 else _as_list(values)
    parts = [part[None, None] if part.dim() == 2 else part for part in parts]
    wrong = [tuple(part.shape) for part in parts if part.dim() != 4]
    if wrong:
        raise ValueError(f"queries or keys of shape {wrong[0]}; allowed: (B, H, T, D), a list of them, (L, B, H, T, D)")
    return parts


def _valid(mask: Tensor | None, query: Tensor) -> Tensor:
    """(B, T) bool."""
    shape = query.size(0), query.size(2)
    if mask is None:
        return torch.ones(shape, dtype=torch.bool, device=query.device)
    mask = mask[None] if mask.dim() == 1 else mask
    if tuple(mask.shape) != shape:
        raise ValueError(f"mask {tuple(mask.shape)} does not fit {tuple(query.shape)}; allowed: {shape}")
    return mask.bool()


def _groups(query: Tensor, key: Tensor) -> int:
    """Query heads per key head."""
    same = query.size(0) == key.size(0) and query.shape[2:] == key.shape[2:]
    if not same or query.size(1) % key.size(1):
        raise ValueError(
            f"queries {tuple(query.shape)} and keys {tuple(key.shape)}; allowed: (B, Hq, T, D) and (B, Hkv, T, D), Hq "
            "a multiple of Hkv"
        )
    return query.size(1) // key.size(1)


def _check_form(form: str, allowed: tuple[str, ...]) -> None:
    if form not in allowed:
        raise ValueError(f"form={form!r}; allowed: {', '.join(allowed)}")
