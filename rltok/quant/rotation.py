"""Rotate the residual stream of a decoder, so that no channel holds the outliers that quantisation suffers from.

    h -> h Q,   E -> E Q,   W -> W diag(gamma) Q  for inputs,   W -> Q^T W  for outputs,   Q Q^T = 1

RMSNorm without a gain commutes with a rotation, so the gains gamma are first folded into the linears behind them, and
the model computes what it did. Q = D H / sqrt(d) is a Hadamard matrix with random signs D, or a random orthogonal
matrix. Values of each head are rotated by a Hadamard matrix of the head's size, undone in the output projection.
Everything is computed in float64 and rounded once to the parameter's dtype.

Limits: only rotations that cancel in the weights; those of QuaRot that need a kernel at inference (inputs of the down
projection, across heads, keys) are left out. A head tied to the embedding gets its own matrix, since the final gain
is folded into it.

Source: QuaRot, arXiv 2404.00456, as used by RSQ, arXiv 2503.01820 v1. The official code also subtracts the mean of the
embedding's rows, which is wrong for RMSNorm and is not done here.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from rltok.attention.probe import is_sharded

RotationKind = Literal["hadamard", "orthogonal"]
KNOWN_MODELS = ("llama", "mistral", "qwen2", "qwen3")
"""model types whose layers are input norm, q k v o, second norm, gate up down, with RMSNorm gains"""
INPUT_LINEARS = {
    "input_layernorm": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "post_attention_layernorm": ("mlp.gate_proj", "mlp.up_proj"),
}
"""norm of a layer -> the linears that read what it returns"""
OUTPUT_LINEARS = ("self_attn.o_proj", "mlp.down_proj")
"""linears of a layer that write to the residual stream"""


class UnknownModelError(ValueError):
    """The model's layers are not of the form that rotation and layer-wise quantisation know."""


@dataclass(frozen=True)
class Rotation:
    """What was done to a model."""

    matrix: Tensor
    """(d, d) float64 Q of the residual stream"""
    head_matrix: Tensor | None
    """(D, D) float64 of the values of every head; None: they were left alone"""
    untied: bool
    """the head got its own matrix, which the embedding shared before"""


def rotate_model(
    model: nn.Module,
    kind: RotationKind = "hadamard",
    seed: int = 0,
    *,
    heads: bool = True,
    untie: bool = True,
) -> Rotation:
    """Fold the norms and rotate a model in place; its logits stay as they were, up to rounding.

    Args:
        model: a causal language model of `KNOWN_MODELS`, without adapters or quantised layers.
        kind: "hadamard" (random signs, then a Hadamard matrix) or "orthogonal" (uniform over rotations).
        seed: of the random signs or the random matrix.
        heads: rotate the values of each head as well.
        untie: give a head that shares the embedding's matrix its own; False: refuse such a model.

    Returns:
        The matrices, and whether the head was untied.

    Raises:
        UnknownModelError: another model type, or layers that are not plain linears.
        ValueError: a tied head with untie=False, or no Hadamard matrix of the model's size.
    """
    core = known_decoder(model)
    width = core.config.hidden_size
    generator = torch.Generator().manual_seed(seed)
    if kind == "hadamard":
        matrix = random_hadamard(width, generator)
    elif kind == "orthogonal":
        matrix = random_orthogonal(width, generator)
    else:
        raise ValueError(f"kind={kind!r}; allowed: {', '.join(get_args(RotationKind))}")
    head_size = core.model.layers[0].self_attn.head_dim
    head_matrix = hadamard(head_size) / math.sqrt(head_size) if heads else None
    _check_tied(core, untie)
    with torch.no_grad():
        untied = _untie(core)
        _rotate(core, matrix)
        if head_matrix is not None:
            for layer in core.model.layers:
                _rotate_heads(layer.self_attn, head_matrix)
    return Rotation(matrix, head_matrix, untied)


def fold_norms(model: nn.Module, *, untie: bool = True) -> bool:
    """Fold the gains of all norms of the residual stream into the linears behind them, in place; gains become 1.

    The per-head norms of queries and keys (Qwen3) stay: they act behind the linears.

    Args:
        model, untie: as for `rotate_model`.

    Returns:
        Whether the head was untied from the embedding.
    """
    core = known_decoder(model)
    _check_tied(core, untie)
    with torch.no_grad():
        untied = _untie(core)
        _rotate(core, None)
    return untied


def known_decoder(model: nn.Module) -> PreTrainedModel:
    """The model itself, if its layers have the form that this package knows.

    Raises:
        UnknownModelError: another model type, a model without language head, an adapter, or layers that are not plain
            linears.
    """
    config = getattr(model, "config", None)
    kind = getattr(config, "model_type", None)
    if not isinstance(model, PreTrainedModel):
        raise UnknownModelError(
            f"{type(model).__name__} (model_type {kind!r}) is not a plain transformers model; merge adapters "
            f"and unwrap it first; known model types: {', '.join(KNOWN_MODELS)}"
        )
    if kind not in KNOWN_MODELS:
        raise UnknownModelError(f"{type(model).__name__} has model_type {kind!r}; known: {', '.join(KNOWN_MODELS)}")
    if not isinstance(getattr(model, "lm_head", None), nn.Linear):
        raise UnknownModelError(f"{type(model).__name__} has no language head (lm_head); load it as a causal LM")
    if is_sharded(model):
        raise UnknownModelError(
            f"{type(model).__name__} has its parameters spread over ranks (FSDP, ZeRO-3); gather it on one device first"
        )
    names = [name for group in INPUT_LINEARS.values() for name in group] + list(OUTPUT_LINEARS)
    for index, layer in enumerate(model.model.layers):
        for name in names:
            linear = layer.get_submodule(name)
            if type(linear) is not nn.Linear:
                raise UnknownModelError(
                    f"layer {index} {name} is {type(linear).__name__}; allowed: torch.nn.Linear. Merge adapters, and "
                    "load the model without quantisation"
                )
    return model


def hadamard(size: int) -> Tensor:
    """(size, size) float64 matrix of +-1 with orthogonal rows, by Sylvester's and Paley's constructions.

    Args:
        size: 1, 2, or a multiple of 4 that is 2^k (p + 1), p a prime with p % 4 = 3, or 2^(k+1) (p + 1), p a prime
            with p % 4 = 1: the widths of common models are.

    Raises:
        ValueError: no such matrix is built here.

    Example: 896 = 2^5 (2 (13 + 1)), 1536 = 2^7 (11 + 1).
    """
    odd = size // (size & -size) if size > 0 else 0
    if odd == 1:
        return _sylvester(size)
    order = 4 * odd
    while odd and size % order == 0:
        found = _paley(order)
        if found is not None:
            return torch.kron(_sylvester(size // order), found)
        order *= 2
    raise ValueError(
        f"no Hadamard matrix of size {size} is known here; use kind='orthogonal', and heads=False if {size} is the "
        "size of a head"
    )


def random_hadamard(size: int, generator: torch.Generator | None = None) -> Tensor:
    """(size, size) float64 orthogonal matrix D H / sqrt(size), D random signs."""
    signs = torch.randint(0, 2, (size, 1), generator=generator).to(torch.float64) * 2 - 1
    return signs * hadamard(size) / math.sqrt(size)


def random_orthogonal(size: int, generator: torch.Generator | None = None) -> Tensor:
    """(size, size) float64 orthogonal matrix, uniform (Haar)."""
    q, r = torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64))
    return q * r.diagonal().sign()


def _check_tied(core: PreTrainedModel, untie: bool) -> None:
    if _tied(core) and not untie:
        raise ValueError(
            f"{type(core).__name__} shares the matrix of embedding and lm_head (tie_word_embeddings), which folding "
            "the final norm ends; set untie=True (the checkpoint grows by one embedding) or leave rotation out"
        )


def _tied(core: PreTrainedModel) -> bool:
    return core.lm_head.weight is core.model.embed_tokens.weight


def _untie(core: PreTrainedModel) -> bool:
    tied = _tied(core)
    if tied:
        shared = core.lm_head.weight
        core.lm_head.weight = nn.Parameter(shared.detach().clone(), requires_grad=shared.requires_grad)
    core.config.tie_word_embeddings = False
    return tied


def _rotate(core: PreTrainedModel, matrix: Tensor | None) -> None:
    """Fold the gains and, with a matrix, rotate the residual stream."""
    body = core.model
    if matrix is not None:
        _write(body.embed_tokens.weight, _wide(body.embed_tokens.weight) @ matrix.to(body.embed_tokens.weight.device))
    for layer in body.layers:
        for norm, names in INPUT_LINEARS.items():
            gain = layer.get_submodule(norm).weight
            for name in names:
                _turn_input(layer.get_submodule(name).weight, gain, matrix)
            gain.data.fill_(1.0)
        if matrix is not None:
            for name in OUTPUT_LINEARS:
                _turn_output(layer.get_submodule(name), matrix)
    _turn_input(core.lm_head.weight, body.norm.weight, matrix)
    body.norm.weight.data.fill_(1.0)


def _turn_input(weight: nn.Parameter, gain: Tensor, matrix: Tensor | None) -> None:
    folded = _wide(weight) * _wide(gain).to(weight.device)
    _write(weight, folded if matrix is None else folded @ matrix.to(weight.device))


def _turn_output(linear: nn.Linear, matrix: Tensor) -> None:
    turn = matrix.to(linear.weight.device).T
    _write(linear.weight, turn @ _wide(linear.weight))
    if linear.bias is not None:
        _write(linear.bias, turn @ _wide(linear.bias))


def _rotate_heads(attention: Any, matrix: Tensor) -> None:
    """Values of a head v -> v M, undone by the head's columns of the output projection."""
    values, out = attention.v_proj, attention.o_proj
    size = matrix.size(0)
    turn = matrix.to(values.weight.device)
    blocks = _wide(values.weight).view(-1, size, values.in_features)
    _write(values.weight, (turn.T @ blocks).flatten(0, 1))
    if values.bias is not None:
        _write(values.bias, (_wide(values.bias).view(-1, size) @ turn).flatten())
    columns = _wide(out.weight).view(out.out_features, -1, size)
    _write(out.weight, (columns @ turn.to(out.weight.device)).flatten(1))


def _wide(values: Tensor) -> Tensor:
    return values.detach().to(torch.float64)


def _write(parameter: Tensor, values: Tensor) -> None:
    parameter.data.copy_(values)


def _sylvester(size: int) -> Tensor:
    matrix = torch.ones(1, 1, dtype=torch.float64)
    step = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64)
    while matrix.size(0) < size:
        matrix = torch.kron(step, matrix)
    return matrix


def _paley(order: int) -> Tensor | None:
    """(order, order) by Paley's first or second construction over a prime field; None where neither applies."""
    if _is_prime(order - 1):  # order is a multiple of 4, so p % 4 = 3
        core = _bordered(order - 1, -1.0)
        return core + torch.eye(order, dtype=torch.float64)
    p = order // 2 - 1
    if p % 4 == 1 and _is_prime(p):
        plus = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64)
        minus = torch.tensor([[1.0, -1.0], [-1.0, -1.0]], dtype=torch.float64)
        return torch.kron(_bordered(p, 1.0), plus) + torch.kron(torch.eye(p + 1, dtype=torch.float64), minus)
    return None


def _bordered(p: int, left: float) -> Tensor:
    """(p + 1, p + 1) quadratic characters of i - j mod p, with a first row of 1 and a first column of `left`."""
    character = torch.full((p,), -1.0, dtype=torch.float64)
    character[torch.arange(p).square() % p] = 1.0
    character[0] = 0.0
    index = torch.arange(p)
    matrix = torch.zeros(p + 1, p + 1, dtype=torch.float64)
    matrix[1:, 1:] = character[(index[:, None] - index) % p]
    matrix[0, 1:] = 1.0
    matrix[1:, 0] = left
    return matrix


def _is_prime(number: int) -> bool:
    return number > 1 and all(number % factor for factor in range(2, math.isqrt(number) + 1))
