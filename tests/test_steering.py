"""Steering: attribution against its theorem, vectors, hooks that leave no trace, files, and the command."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file
from tests_support import build_model, build_tokenizer
from torch import Tensor, nn
from transformers import GenerationConfig, GPT2Config, GPT2LMHeadModel
from transformers.generation.configuration_utils import ContinuousBatchingConfig
from typer.testing import CliRunner

from rltok.cli import app, main
from rltok.config import ConfigError, build
from rltok.steering import (
    ContrastOptions,
    SteeringConfig,
    SteeringVector,
    attribute_tokens,
    build_vectors,
    contrast_states,
    decoder_layers,
    describe_model,
    integrated_gradients,
    layer_directions,
    load_vectors,
    save_vectors,
    steer,
    steered,
    steering_direction,
)
from rltok.steering.attribution import Float32Model, common_start, in_float32
from rltok.steering.vectors import last_hidden_states, top_tokens

TOKENIZER = build_tokenizer()
NEW = 8
SAMPLING = {"do_sample": True, "max_new_tokens": NEW, "pad_token_id": 0, "eos_token_id": [1, 7, 8], "top_k": 0}
TRIPLES = [("1+2=", "3 yes", "4"), ("9-3=", "6", "5 or so"), ("so 2*2 is ", "4.", "8."), ("7/7=", "1", "77")]
SMOOTH = {"rms_norm_eps": 0.1, "initializer_range": 0.2}
"""A model whose norms do not jump near the zero embedding, where 20 nodes see the whole path."""


def ids_of(text: str) -> Tensor:
    return torch.tensor(TOKENIZER(text)["input_ids"])


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return build_model(TOKENIZER, seed=1, num_hidden_layers=3, initializer_range=0.2).eval()


@pytest.fixture(scope="module")
def smooth() -> nn.Module:
    return build_model(TOKENIZER, seed=2, **SMOOTH).eval()


@pytest.fixture(scope="module")
def prompts() -> dict[str, Tensor]:
    """Left-padded prompts of different lengths."""
    return TOKENIZER(["1+2=", "what is 3*7?", "9", "so 5-4 is "], return_tensors="pt", padding=True)


def vector(layer: int, strength: float = 3.0, size: int = 32, seed: int = 0) -> SteeringVector:
    generator = torch.Generator().manual_seed(seed + layer)
    return SteeringVector(layer, nn.functional.normalize(torch.randn(size, generator=generator), dim=0), strength)


def hooks_of(model: nn.Module) -> int:
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())


def sample(model: Any, prompts: dict[str, Tensor], **changes: Any) -> Any:
    torch.manual_seed(5)
    return model.generate(**prompts, **SAMPLING, output_logits=True, return_dict_in_generate=True, **changes)


def teacher_forced(model: Any, prompts: dict[str, Tensor], ids: Tensor) -> Tensor:
    """(B, C) log-probabilities of the generated part of `ids` from one pass without a cache."""
    width = prompts["input_ids"].size(1)
    mask = nn.functional.pad(prompts["attention_mask"], (0, ids.size(1) - width), value=1)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        logits = model(input_ids=ids, attention_mask=mask, position_ids=positions).logits
    logps = logits[:, width - 1 : -1].log_softmax(-1)
    return logps.gather(-1, ids[:, width:, None])[..., 0]


# The rule


def test_worked_example() -> None:
    h, v = torch.tensor([3.0, 4.0]), torch.tensor([1.0, 0.0])
    torch.testing.assert_close(steer(h, v, 4.0), torch.tensor([4.341216, 2.480695]), atol=1e-6, rtol=0)
    torch.testing.assert_close(steer(h, v, 4.0, normalize=False), torch.tensor([7.0, 4.0]))
    assert steer(h, v, 0.0) is h


def test_norm_is_kept_per_token() -> None:
    """Also in bfloat16, up to the rounding of its numbers, and where h is 0 or is cancelled."""
    torch.manual_seed(0)
    h = torch.randn(3, 5, 32) * torch.logspace(-2, 3, 15).view(3, 5, 1)
    moved = steer(h, torch.randn(32), 7.0)
    torch.testing.assert_close(moved.norm(dim=-1) / h.norm(dim=-1), torch.ones(3, 5), atol=1e-5, rtol=0)
    assert not torch.allclose(moved, h)
    half = steer(h.bfloat16(), torch.randn(32), 7.0)
    assert half.dtype is torch.bfloat16
    torch.testing.assert_close(half.float().norm(dim=-1) / h.norm(dim=-1), torch.ones(3, 5), atol=0.01, rtol=0)
    v = torch.tensor([3.0, 4.0])
    assert steer(torch.zeros(1, 2), v, 2.0).tolist() == [[0.0, 0.0]]
    assert steer(-2 * v, v, 2.0).tolist() == [0.0, 0.0]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: steer(torch.zeros(2, 3), torch.zeros(2), 1.0), r"v has shape \(2,\); allowed: \(3,\)"),
        (lambda: SteeringVector(-1, torch.zeros(2), 1.0), "layer=-1"),
        (lambda: SteeringVector(0, torch.zeros(2, 2), 1.0), r"shape \(2, 2\)"),
        (lambda: SteeringVector(0, torch.tensor([float("nan")]), 1.0), "finite"),
        (lambda: SteeringVector(0, torch.zeros(2), float("inf")), "strength=inf"),
        (lambda: ContrastOptions(k=0), "k=0 must be >= 1"),
        (lambda: ContrastOptions(mode="best"), "mode='best' is unknown; allowed: 'pos'"),  # type: ignore[arg-type]
    ],
)
def test_wrong_values_are_refused(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


# Integrated gradients


def test_integrated_gradients_of_a_polynomial() -> None:
    inputs = torch.tensor([1.0, 3.0])
    for at_once in (None, 1, 7, 20):
        found = integrated_gradients(lambda x: x[..., 0] ** 2 + 2 * x[..., 1], inputs, points_per_call=at_once)
        torch.testing.assert_close(found, torch.tensor([1.0, 6.0]))
    # from (1, 1): x1^2 + x1 x2 along the path; by hand IG = (0, 1 * 2)
    found = integrated_gradients(lambda x: x[0] ** 2 + x[0] * x[1], inputs, 2, torch.ones(2))
    torch.testing.assert_close(found, torch.tensor([0.0, 2.0]))
    with torch.inference_mode():
        assert integrated_gradients(lambda x: (x**3).sum(), torch.tensor([2]), 2).item() == pytest.approx(8.0)
    with pytest.raises(ValueError, match="steps=0"):
        integrated_gradients(torch.sum, inputs, 0)


def test_scores_are_complete(smooth: nn.Module) -> None:
    """The sum over both sequences is F(E) - F(0), from plain passes of the model, within 1 % at 20 nodes."""
    pos, neg = ids_of("1+2=3 yes"), ids_of("1+2=4")

    def contrast(scale: float) -> float:
        def response(ids: Tensor) -> Tensor:
            embeddings = scale * smooth.get_input_embeddings()(ids)[None]
            logps = smooth(inputs_embeds=embeddings).logits[0].log_softmax(-1)
            return sum(logps[j - 1, ids[j]] for j in range(4, ids.numel()))  # type: ignore[return-value]

        with torch.no_grad():
            return float(response(pos) - response(neg))

    scores = attribute_tokens(smooth, pos, neg, response_starts=4)
    assert scores.pos.shape == pos.shape and scores.neg.shape == neg.shape
    assert scores.joint.sum().item() == pytest.approx(contrast(1.0) - contrast(0.0), rel=0.01)
    # the common start of "3" and "4" is the prompt too
    torch.testing.assert_close(attribute_tokens(smooth, pos, neg, 20).joint, scores.joint)
    assert attribute_tokens(smooth, pos[None], neg.tolist(), 20).joint.equal(scores.joint)


def test_gap_tells_what_the_nodes_do_not_see() -> None:
    """A model with the usual norms jumps near the zero embedding; from the mean embedding the sum is right."""
    usual = build_model(TOKENIZER, seed=4, initializer_range=0.3)
    pos, neg = ids_of("1+2=3 yes"), ids_of("1+2=4")
    with in_float32(usual) as frozen:
        zero = frozen.attribute(pos, neg, 20, 4)
        mean = frozen.attribute(pos, neg, 100, 4, baseline="mean")
        average = usual.get_input_embeddings().weight.detach().mean(0)
        same = frozen.attribute(pos, neg, 100, 4, baseline=average)
    assert zero.gap > 0.1
    assert mean.gap < 0.05
    torch.testing.assert_close(mean.scores.joint, same.scores.joint, rtol=1e-3, atol=1e-4)


def test_last_token_score_is_the_released_one(smooth: nn.Module) -> None:
    """log p of the last token read at the last position."""
    pos, neg = ids_of("1+2=3"), ids_of("1+2=44")

    def last(ids: Tensor, scale: float) -> float:
        with torch.no_grad():
            embeddings = scale * smooth.get_input_embeddings()(ids)[None]
            return float(smooth(inputs_embeds=embeddings).logits[0, -1].log_softmax(-1)[ids[-1]])

    scores = attribute_tokens(smooth, pos, neg, 20, score="last_token")
    assert scores.pos.sum().item() == pytest.approx(last(pos, 1.0) - last(pos, 0.0), rel=0.01)
    assert scores.neg.sum().item() == pytest.approx(last(neg, 0.0) - last(neg, 1.0), rel=0.01)


def test_exchange_negates_all_scores(model: nn.Module) -> None:
    pos, neg = ids_of("9-3=6 yes"), ids_of("9-3=5")
    there, back = attribute_tokens(model, pos, neg, 6), attribute_tokens(model, neg, pos, 6)
    assert there.pos.equal(-back.neg) and there.neg.equal(-back.pos)
    assert there.pos[:-1].abs().min() > 0 and there.pos[-1] == 0  # nothing is predicted from the last token


def test_nodes_at_once_change_nothing(model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    pos, neg = ids_of("9-3=6 yes"), ids_of("9-3=5")
    together = attribute_tokens(model, pos, neg, 6).joint
    monkeypatch.setattr("rltok.steering.attribution.TOKENS_PER_PASS", 1)
    torch.testing.assert_close(attribute_tokens(model, pos, neg, 6).joint, together, rtol=1e-4, atol=1e-5)


def test_attribution_leaves_the_model_alone(model: nn.Module) -> None:
    """No gradients; modes, requires_grad and parameters as before, also when the pass fails; inside no_grad too."""
    subject = build_model(TOKENIZER, seed=1, attention_dropout=0.5)
    expected = attribute_tokens(subject.eval(), ids_of("1+1=2"), ids_of("1+1=3"), 3)
    subject.train()
    subject.model.layers[0].eval()
    subject.lm_head.requires_grad_(False)
    modes = [module.training for module in subject.modules()]
    before = {name: (p.data_ptr(), p.requires_grad, p.clone()) for name, p in subject.named_parameters()}

    def unchanged() -> bool:
        return [module.training for module in subject.modules()] == modes and all(
            p.grad is None
            and p.data_ptr() == before[n][0]
            and p.requires_grad == before[n][1]
            and p.equal(before[n][2])
            for n, p in subject.named_parameters()
        )

    pos, neg = ids_of("1+1=2"), ids_of("1+1=3")
    plain = attribute_tokens(subject, pos, neg, 3)
    assert unchanged() and plain.joint.equal(expected.joint)  # without dropout
    with torch.inference_mode():
        assert attribute_tokens(subject, pos, neg, 3).joint.equal(plain.joint)
    with torch.autocast("cpu", torch.bfloat16):
        assert attribute_tokens(subject, pos, neg, 3).joint.equal(plain.joint)
    handle = subject.model.layers[1].register_forward_hook(fail)
    with pytest.raises(RuntimeError, match="on purpose"):
        attribute_tokens(subject, pos, neg, 3)
    handle.remove()
    assert unchanged()


def fail(*_: Any) -> None:
    raise RuntimeError("on purpose")


def test_bfloat16_model_is_computed_in_float32(model: nn.Module) -> None:
    """The scores are those of the float32 model with the same rounded weights, and the weights stay bfloat16."""
    half = build_model(TOKENIZER, seed=1).to(torch.bfloat16)
    whole = build_model(TOKENIZER, seed=1).to(torch.bfloat16).float()
    pos, neg = ids_of("1+1=2"), ids_of("1+1=3")
    found = attribute_tokens(half, pos, neg, 4)
    assert found.pos.dtype is torch.float32
    torch.testing.assert_close(found.joint, attribute_tokens(whole, pos, neg, 4).joint, rtol=1e-4, atol=1e-6)
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}
    built = build_vectors(half, TOKENIZER, TRIPLES, [1], 2, "pos", steps=2)
    expected = build_vectors(whole, TOKENIZER, TRIPLES, [1], 2, "pos", steps=2)
    torch.testing.assert_close(built[0].vector, expected[0].vector, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("pos", "neg", "options", "message"),
    [
        ([5], [5, 6], {}, "have 1 and 2 tokens"),
        ([5, 6], [5, 7], {"response_starts": 0}, "preferred response starts at 0 of 2 tokens; allowed: 1 to 1"),
        ([5, 6, 7], [5, 7], {"response_starts": 2}, "dispreferred response starts at 2 of 2"),
        ([5, 6], [5, 7], {"score": "best"}, "score='best' is unknown; allowed: 'response', 'last_token'"),
        ([5, 6], [5, 7], {"baseline": "pad"}, "baseline='pad' is unknown; allowed: 'zero', 'mean'"),
        ([[5, 6], [7, 8]], [5, 7], {}, r"ids of shape \(2, 2\)"),
        ([5, 6], [5, 7], {"steps": 0}, "steps=0"),
    ],
)
def test_wrong_sequences_are_refused(model: nn.Module, pos: Any, neg: Any, options: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        attribute_tokens(model, pos, neg, **options)


def test_models_that_cannot_be_attributed_are_refused(model: nn.Module) -> None:
    quantised = build_model(TOKENIZER)
    quantised.model.layers[0].mlp.up_proj.weight = nn.Parameter(torch.zeros(2, dtype=torch.int8), requires_grad=False)
    with pytest.raises(ValueError, match="up_proj.weight is torch.int8: load the model without quantisation"):
        attribute_tokens(quantised, [5, 6], [5, 7])
    with steered(model, [vector(1)]), pytest.raises(ValueError, match=r"layers \[1\] are being steered"):
        attribute_tokens(model, [5, 6], [5, 7])


def test_common_start() -> None:
    def start(a: list[int], b: list[int]) -> int:
        return common_start(torch.tensor(a), torch.tensor(b))

    assert start([4, 5, 6], [4, 5, 7, 8]) == 2
    assert start([4, 5], [6, 5]) == 1  # a first token has nothing before it
    assert start([4, 5, 6], [4, 5, 6, 7]) == 2  # either response keeps a token
    assert start([4, 5, 6], [4, 9, 6]) == 1  # what agrees again later is no prefix


# Vectors


def test_top_tokens() -> None:
    scores = torch.tensor([0.5, -2.0, 1.0, 0.5, -0.1])
    assert top_tokens(scores, 2, "pos").tolist() == [2, 0]
    assert top_tokens(scores, 2, "neg").tolist() == [1, 4]
    assert top_tokens(scores, 2, "abs").tolist() == [1, 2]
    allowed = torch.tensor([True, True, False, True, True])
    assert top_tokens(scores, 3, "pos", allowed).tolist() == [0, 3, 4]
    assert sorted(top_tokens(scores, 99, "neg").tolist()) == [0, 1, 2, 3, 4]


def test_pca_direction() -> None:
    """The known axis of a cloud, of norm 1, on the side of mean(dh+), whatever the rows' order."""
    torch.manual_seed(0)
    axis = nn.functional.normalize(torch.tensor([1.0, -2.0, 0.5, 0.0]), dim=0)
    pos = torch.randn(20, 1) * 3 * axis + 0.1 * torch.randn(20, 4) + 2 * axis
    neg = torch.randn(20, 1) * 3 * axis + 0.1 * torch.randn(20, 4) - 2 * axis
    found = steering_direction(pos, neg)
    assert found.vector.norm().item() == pytest.approx(1.0, abs=1e-6)
    assert found.vector @ axis > 0.99 and found.cosine > 0 and 0.9 < found.share <= 1
    exchanged = steering_direction(neg, pos)
    torch.testing.assert_close(exchanged.vector, -found.vector)
    assert exchanged.cosine > 0 and {found.flipped, exchanged.flipped} == {True, False}
    centred = torch.cat([pos, neg]) - torch.cat([pos, neg]).mean(0)
    leading = torch.linalg.eigh(centred.T @ centred)  # ascending
    torch.testing.assert_close((leading.eigenvectors[:, -1] @ found.vector).abs().item(), 1.0, atol=1e-5, rtol=0)
    assert found.share == pytest.approx((leading.eigenvalues[-1] / leading.eigenvalues.sum()).item(), rel=1e-4)


def test_mean_direction() -> None:
    pos, neg = torch.tensor([[1.0, 0.0]]), torch.tensor([[2.0, 4.0]])
    found = steering_direction(pos, neg, "mean")
    assert found.vector.tolist() == [1.5, 2.0] and not found.flipped


@pytest.mark.parametrize(
    ("pos", "neg", "method", "message"),
    [
        (torch.ones(1, 2), torch.zeros(1, 2), "pca", "pca' with 1 triple.*at least 2, or set method='mean'"),
        (torch.ones(3, 2), torch.ones(3, 2), "pca", "are the same"),
        (torch.zeros(3, 2), torch.zeros(3, 2), "mean", "is 0"),
        (torch.ones(3, 2), torch.zeros(3, 2), "median", "method='median' is unknown; allowed: 'pca', 'mean'"),
    ],
)
def test_directions_that_do_not_exist(pos: Tensor, neg: Tensor, method: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        steering_direction(pos, neg, method)


def test_hidden_states_are_the_layers_outputs() -> None:
    """transformers' hidden_states[layer + 1], except that of the last layer, which stands before the final norm."""
    model = build_model(TOKENIZER, seed=1, num_hidden_layers=3).eval()  # transformers leaves its hooks on this one
    ids = torch.stack([ids_of("1+2=3"), ids_of("so it")])
    with in_float32(model) as frozen:
        found = last_hidden_states(frozen, ids, [0, 1, 2])
    with torch.no_grad():
        states = model(input_ids=ids, output_hidden_states=True).hidden_states
        torch.testing.assert_close(model.model.norm(found[2]), states[3][:, -1])
    for layer in (0, 1):
        torch.testing.assert_close(found[layer], states[layer + 1][:, -1])


def test_differences_are_those_of_ablating_by_hand(model: nn.Module) -> None:
    options = ContrastOptions(k=2, mode="both", steps=3, protect_special=True)
    found = contrast_states(model, TOKENIZER, TRIPLES, [2, 0], options)
    assert list(found.hidden_norm) == [2, 0] and found.triples == len(found.gaps) == len(TRIPLES)
    prompt, *texts = TRIPLES[1]
    pair = [ids_of(prompt + text) for text in texts]
    scores = attribute_tokens(model, *pair, 3, response_starts=len(ids_of(prompt)))
    for ids, values, sides in zip(pair, scores, (found.pos, found.neg), strict=True):
        for selection in ("pos", "neg"):
            other = ids.clone()
            order = values.argsort(descending=selection == "pos")
            other[order[:2]] = TOKENIZER.pad_token_id
            with in_float32(model) as frozen:
                states = last_hidden_states(frozen, torch.stack([ids, other]), [0, 2])
            for layer in (0, 2):
                torch.testing.assert_close(
                    sides[selection][layer][1], states[layer][0] - states[layer][1], rtol=1e-4, atol=1e-4
                )


def test_vectors_of_every_mode(model: nn.Module) -> None:
    def of(mode: Any, **changes: Any) -> list[SteeringVector]:
        return build_vectors(model, TOKENIZER, TRIPLES, [1, 2], 2, mode, steps=2, strength=5.0, **changes)

    vectors = {mode: of(mode) for mode in ("pos", "neg", "abs", "random", "both")}
    for mode, found in vectors.items():
        assert [v.layer for v in found] == [1, 2] and all(v.strength == 5.0 for v in found)
        if mode != "both":
            assert all(v.vector.norm().item() == pytest.approx(1.0, abs=1e-5) for v in found)
    for both, pos, neg in zip(vectors["both"], vectors["pos"], vectors["neg"], strict=True):
        torch.testing.assert_close(both.vector, pos.vector - neg.vector, atol=1e-4, rtol=1e-3)
    assert of("random")[0].vector.equal(vectors["random"][0].vector)
    assert not of("random", seed=1)[0].vector.allclose(vectors["random"][0].vector)
    contrast = contrast_states(model, TOKENIZER, TRIPLES, [1], ContrastOptions(2, "pos", 2))
    (direction,) = layer_directions(contrast)
    mean_pos = contrast.pos["pos"][1].mean(0)
    assert mean_pos @ direction.vector >= 0 and direction.cosine >= 0
    mean = build_vectors(model, TOKENIZER, TRIPLES, [1], 2, "pos", "mean", 2)[0].vector
    torch.testing.assert_close(mean, torch.cat([contrast.pos["pos"][1], contrast.neg["pos"][1]]).mean(0))


def test_all_tokens_where_k_is_longer(model: nn.Module) -> None:
    """Every selection is then the same: `both` is zero."""
    done: list[int] = []
    vectors = build_vectors(model, TOKENIZER, TRIPLES, [0], 99, "both", steps=1, progress=done.append)
    torch.testing.assert_close(vectors[0].vector, torch.zeros(32), atol=1e-5, rtol=0)
    assert done == [1] * len(TRIPLES)


def test_special_tokens_are_protected(model: nn.Module) -> None:
    """With only special tokens in a sequence nothing is left to replace; ids are taken as they are."""
    special = ([2, 1], [1, 1], [2])
    with pytest.warns(UserWarning, match="triple 0: all tokens are special"):
        found = contrast_states(
            model, TOKENIZER, [special, *TRIPLES], [0], ContrastOptions(1, steps=1, protect_special=True)
        )
    assert found.triples == len(TRIPLES)
    assert contrast_states(model, TOKENIZER, [special, *TRIPLES], [0], ContrastOptions(1, steps=1)).triples == 5


def test_triples_that_cannot_be_used(model: nn.Module) -> None:
    options = ContrastOptions(1, steps=1)
    with pytest.warns(UserWarning, match="triple 1: the dispreferred response is empty; the triple is left out"):
        found = contrast_states(model, TOKENIZER, [*TRIPLES[:1], ("1", "2", ""), *TRIPLES[1:]], [0], options)
    assert found.triples == len(TRIPLES)
    with pytest.warns(UserWarning, match="empty"), pytest.raises(ValueError, match="none of the 1 triples"):
        build_vectors(model, TOKENIZER, [("1", "", "2")], [0])
    with pytest.raises(ValueError, match="triple 0: the prompt '' has no tokens"):
        build_vectors(model, TOKENIZER, [("", "1", "2")], [0])
    with pytest.raises(ValueError, match="triple 0 has 301 tokens, the model is made for 256"):
        build_vectors(model, TOKENIZER, [("1", "1" * 300, "2")], [0])
    with pytest.raises(ValueError, match=r"layers=\[3\]; allowed: distinct indices from 0 to 2"):
        build_vectors(model, TOKENIZER, TRIPLES, [3])
    with pytest.raises(ValueError, match="at least 2, or set method='mean'"):
        build_vectors(model, TOKENIZER, TRIPLES[:1], [0], 1, steps=1)
    assert len(build_vectors(model, TOKENIZER, TRIPLES[:1], [0], 1, "pos", "mean", 1)) == 1


# Hooks


def test_strength_0_generates_bit_for_bit(model: nn.Module, prompts: dict[str, Tensor]) -> None:
    plain = sample(model, prompts)
    for vectors in ([], [vector(0, 0.0), vector(2, 0.0)]):
        with steered(model, vectors) as state:
            assert hooks_of(model) == 0
            same = sample(model, prompts)
        assert same.sequences.equal(plain.sequences) and torch.stack(same.logits).equal(torch.stack(plain.logits))
        assert state.metrics() == {}


def test_generation_equals_teacher_forcing_under_steering(model: nn.Module, prompts: dict[str, Tensor]) -> None:
    """Left padding, a cache, several layers: the logits that were sampled from are those of one steered pass."""
    vectors = [vector(0, 4.0), replace(vector(2, 2.0), normalize=False)]
    with steered(model, vectors):
        generated = sample(model, prompts)
        forced = teacher_forced(model, prompts, generated.sequences)
    unsteered = teacher_forced(model, prompts, generated.sequences)
    tokens = generated.sequences[:, prompts["input_ids"].size(1) :]
    sampled = torch.stack(generated.logits, 1).log_softmax(-1).gather(-1, tokens[..., None])[..., 0]
    live = (tokens != 0).long().cummin(1).values.bool()  # rows that have ended are padded
    assert live.any(1).all() and not live.all()
    assert (sampled - forced)[live].abs().max() < 1e-5
    assert (sampled - unsteered)[live].abs().mean() > 1e-2
    assert not sample(model, prompts).sequences.equal(generated.sequences)


def test_padding_changes_nothing(model: nn.Module, prompts: dict[str, Tensor]) -> None:
    """A steered prompt alone and the same one in a left-padded batch."""
    row, mask = prompts["input_ids"][2:3], prompts["attention_mask"][2:3]
    assert mask.sum() == 1
    with steered(model, [vector(0, 4.0), vector(2)]):
        padded = teacher_forced(model, prompts, sample(model, prompts).sequences)[2]
        ids = sample(model, prompts).sequences[2:3, row.size(1) - 1 :]
        alone = teacher_forced(model, {"input_ids": row[:, -1:], "attention_mask": mask[:, -1:]}, ids)[0]
    torch.testing.assert_close(padded, alone, atol=1e-5, rtol=0)


def test_continuous_batching_is_steered(model: Any) -> None:
    """Its tokens are those of steered greedy passes without cache or batch, and not the plain ones."""
    prompts = [ids_of(text) for text in ("1+2=", "what is 3*7?", "9")]
    settings = GenerationConfig(max_new_tokens=5, do_sample=False, eos_token_id=1, pad_token_id=0)

    cache = ContinuousBatchingConfig(num_blocks=16, max_batch_tokens=32, use_cuda_graph=False)  # a small one

    def greedy(ids: Tensor) -> list[int]:
        for _ in range(5):
            with torch.no_grad():
                ids = torch.cat([ids, model(input_ids=ids[None]).logits[0, -1:].argmax(-1)])
        return ids[-5:].tolist()

    plain = [greedy(ids) for ids in prompts]
    with steered(model, [vector(1, 4.0)]) as state:
        inputs = [ids.tolist() for ids in prompts]
        found = model.generate_batch(inputs, settings, cache, warmup=False)
        expected = [greedy(ids) for ids in prompts]
    assert [output.generated_tokens for output in found.values()] == expected != plain
    assert hooks_of(model) == 0 and state.metrics()["steering/shift"] > 0


def test_outputs_of_a_layer_keep_their_norm(model: nn.Module, prompts: dict[str, Tensor]) -> None:
    with outputs_of(model, 1) as plain, torch.no_grad():
        model(**prompts)
    v = vector(1, 6.0)
    with steered(model, [v]) as state, outputs_of(model, 1) as moved, torch.no_grad():
        model(**prompts)
    torch.testing.assert_close(moved[0].norm(dim=-1), plain[0].norm(dim=-1), rtol=1e-5, atol=0)
    torch.testing.assert_close(moved[0], steer(plain[0], v.vector, 6.0))
    norms = plain[0].norm(dim=-1)
    assert (norms == 0).any()  # padding of this model, which is left out
    expected = (6.0 * v.vector.norm() / norms[norms > 0]).mean().item()
    assert state.metrics() == {"steering/shift": pytest.approx(expected, rel=1e-5)}


@contextmanager
def outputs_of(model: Any, layer: int) -> Iterator[list[Tensor]]:
    """What a layer gives to the next one."""
    found: list[Tensor] = []
    handle = model.model.layers[layer + 1].register_forward_pre_hook(lambda _, args: found.append(args[0].clone()))
    yield found
    handle.remove()


def test_metrics_of_several_layers(model: nn.Module, prompts: dict[str, Tensor]) -> None:
    with steered(model, [vector(0, 1.0), vector(1, -2.0)]) as state:
        assert state.metrics() == {}
        sample(model, prompts)
    found = state.metrics()
    assert set(found) == {"steering/shift", "steering/shift_layer_0", "steering/shift_layer_1"}
    parts = [found["steering/shift_layer_0"], found["steering/shift_layer_1"]]
    assert min(parts) > 0 and found["steering/shift"] == pytest.approx(sum(parts) / 2)


def test_hooks_are_gone_after_an_exception(model: nn.Module, prompts: dict[str, Tensor]) -> None:
    plain = sample(model, prompts).sequences
    with pytest.raises(RuntimeError, match="on purpose"), steered(model, [vector(0), vector(1)]):
        assert hooks_of(model) == 2
        raise RuntimeError("on purpose")
    assert hooks_of(model) == 0
    assert sample(model, prompts).sequences.equal(plain)
    with steered(model, [vector(0)]):  # and the layer may be steered again
        assert hooks_of(model) == 1


def test_hooks_are_gone_where_registering_fails(model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model.model.layers[1], "register_forward_hook", fail, raising=False)
    with pytest.raises(RuntimeError, match="on purpose"), steered(model, [vector(0), vector(1)]):
        pass
    assert hooks_of(model) == 0
    with steered(model, [vector(0)]):
        pass


def test_nested_blocks(model: nn.Module) -> None:
    """Other layers may be steered inside; the same one may not, and the outer block keeps its hook."""
    with steered(model, [vector(0)]):
        with steered(model, [vector(1)]):
            assert hooks_of(model) == 2
        with pytest.raises(ValueError, match=r"layers \[0\] are steered already"), steered(model, [vector(0)]):
            pass
        assert hooks_of(model) == 1
    assert hooks_of(model) == 0


@pytest.mark.parametrize(
    ("vectors", "message"),
    [
        ([vector(3)], "for layer 3; the model has layers 0 to 2"),
        ([vector(0, size=16)], "layer 0 has size 16; the model's hidden size: 32"),
        ([vector(1), vector(1, 0.0)], "layer 1 has two vectors"),
    ],
)
def test_vectors_that_do_not_fit(model: nn.Module, vectors: list[SteeringVector], message: str) -> None:
    with pytest.raises(ValueError, match=message), steered(model, vectors):
        pass


def test_layers_that_return_tuples() -> None:
    """The first element is steered, the others pass through."""

    class Tupled(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, hidden: Tensor, **options: Any) -> tuple[Tensor, str]:
            return self.inner(hidden, **options), "kept"

    subject = build_model(TOKENIZER, seed=1).eval()
    ids = ids_of("1+2=3")[None]
    with steered(subject, [vector(1)]), torch.no_grad():
        expected = subject(input_ids=ids).logits
    layer = Tupled(subject.model.layers[1])
    seen = []
    layer.register_forward_hook(lambda _, __, output: (seen.append(output[1]), output[0])[1])
    subject.model.layers[1] = layer
    layer._forward_hooks.clear()
    with steered(subject, [vector(1)]), torch.no_grad():
        layer.register_forward_hook(lambda _, __, output: (seen.append(output[1]), output[0])[1])
        torch.testing.assert_close(subject(input_ids=ids).logits, expected)
    assert seen == ["kept"]


def test_layers_that_return_nothing_usable(model: nn.Module) -> None:
    handle = model.model.layers[0].register_forward_hook(lambda *_: {"states": 1})
    try:
        with pytest.raises(TypeError, match="layer 0 returns dict"), steered(model, [vector(0)]):
            model(input_ids=ids_of("1")[None])
    finally:
        handle.remove()
    assert hooks_of(model) == 0


def test_peft_model_is_steered_like_its_base(model: nn.Module, prompts: dict[str, Tensor]) -> None:
    """A fresh adapter changes nothing: same tokens steered, same scores, same vectors, same digest."""
    base = build_model(TOKENIZER, seed=1, num_hidden_layers=3, initializer_range=0.2).eval()
    wrapped = get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj", "up_proj"])).eval()
    with steered(model, [vector(1)]):
        expected = sample(model, prompts)
    with steered(wrapped, [vector(1)]) as state:
        found = sample(wrapped, prompts)
    assert found.sequences.equal(expected.sequences) and state.metrics()["steering/shift"] > 0
    assert hooks_of(wrapped) == 0 and decoder_layers(wrapped) is base.model.layers
    pos, neg = ids_of("1+1=2"), ids_of("1+1=3")
    scores, plain = attribute_tokens(wrapped, pos, neg, 3), attribute_tokens(model, pos, neg, 3)
    torch.testing.assert_close(scores.joint, plain.joint, rtol=1e-4, atol=1e-5)
    assert all(p.grad is None for p in wrapped.parameters())
    assert describe_model(wrapped, "m") == describe_model(model, "m")


def test_gradients_pass_through_the_hook(model: nn.Module) -> None:
    """A pass with gradient inside the block learns about the steered model; the vector is no part of it."""
    subject = build_model(TOKENIZER, seed=1)
    v = replace(vector(0), vector=vector(0).vector.requires_grad_())
    with steered(subject, [v]):
        subject(input_ids=ids_of("1+2=")[None]).logits.sum().backward()
    assert subject.model.layers[0].mlp.up_proj.weight.grad.abs().sum() > 0 and v.vector.grad is None


def test_another_architecture(prompts: dict[str, Tensor]) -> None:
    """Layers under another name, learned positions, and a list of experts or heads is not mistaken for them."""
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=len(TOKENIZER), n_embd=32, n_layer=2, n_head=2, n_positions=64)
    gpt = GPT2LMHeadModel(config).eval()
    gpt.transformer.h[0].extra = nn.ModuleList([nn.Identity(), nn.Identity()])
    assert decoder_layers(gpt) is gpt.transformer.h
    vectors = build_vectors(gpt, TOKENIZER, TRIPLES, [1], 2, "pos", steps=2, strength=9.0)
    with torch.no_grad():
        plain = gpt(**prompts).logits
        with steered(gpt, vectors):
            moved = gpt(**prompts).logits
    assert not moved.allclose(plain, atol=1e-3)


def test_steering_moves_the_model_towards_what_is_preferred() -> None:
    """On a direction known to help: the vector that the head reads `3` from makes `3` likelier, its opposite less."""
    subject = build_model(TOKENIZER, seed=1, initializer_range=0.2).eval()
    three = subject.lm_head.weight[TOKENIZER("3")["input_ids"][0]].detach()
    ids = ids_of("1+2=")[None]

    def logp(strength: float) -> float:
        with steered(subject, [SteeringVector(1, three, strength)]), torch.no_grad():
            return float(subject(input_ids=ids).logits[0, -1].log_softmax(-1)[TOKENIZER("3")["input_ids"][0]])

    values = [logp(strength) for strength in (-4.0, 0.0, 4.0)]
    assert values == sorted(values) and values[2] - values[0] > 0.1


# Files


def test_round_trip(model: nn.Module, tmp_path: Path) -> None:
    vectors = [vector(2, 4.0), replace(vector(0, -1.5), normalize=False)]
    path = tmp_path / "new" / "v.safetensors"
    save_vectors(path, vectors, {"k": 3, "mode": "both", **describe_model(model, "tiny")})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        stored = load_vectors(path, model)
    assert [v.layer for v in stored.vectors] == [0, 2]
    for found, given in zip(stored.vectors, reversed(vectors), strict=True):
        assert found.vector.equal(given.vector)
        assert (found.strength, found.normalize) == (given.strength, given.normalize)
    assert stored.settings["k"] == 3 and stored.settings["hidden_size"] == 32 and stored.settings["model"] == "tiny"
    assert [p.name for p in path.parent.iterdir()] == ["v.safetensors"]
    half = build_model(TOKENIZER, seed=1, num_hidden_layers=3, initializer_range=0.2).to(torch.bfloat16)
    assert describe_model(half, "tiny") == describe_model(model, "tiny")


def test_files_that_are_refused(model: nn.Module, tmp_path: Path) -> None:
    path = tmp_path / "v.safetensors"
    save_vectors(path, [vector(2)], describe_model(model, "tiny"))
    two_layers = build_model(TOKENIZER, seed=1)
    with pytest.raises(ValueError, match="made for 3 layers, the model has 2; layers .2., the model has 0 to 1"):
        load_vectors(path, two_layers)
    wide = build_model(TOKENIZER, seed=1, num_hidden_layers=3, hidden_size=64)
    with pytest.raises(ValueError, match="hidden size 32, the model has 64"):
        load_vectors(path, wide)
    trained = build_model(TOKENIZER, seed=7, num_hidden_layers=3)
    with pytest.warns(UserWarning, match=r"made of other weights \(tiny\)"):
        load_vectors(path, trained)
    with pytest.raises(ValueError, match="there is no such file"):
        load_vectors(tmp_path / "none.safetensors")
    save_file({"layer.0": torch.zeros(2)}, path)
    with pytest.raises(ValueError, match="holds no steering vectors"):
        load_vectors(path)
    save_file({"layer.0": torch.zeros(2)}, path, metadata={"rltok_steering.format": "9"})
    with pytest.raises(ValueError, match="has format '9', known: '1'"):
        load_vectors(path)
    path.write_text("text")
    with pytest.raises(ValueError, match="cannot be read as safetensors"):
        load_vectors(path)
    with pytest.raises(ValueError, match=r"vectors of layers \[1, 1\]"):
        save_vectors(path, [vector(1), vector(1)], {})
    with pytest.raises(ValueError, match="plain values"):
        save_vectors(path, [vector(1)], {"k": torch.zeros(1)})
    assert path.read_text() == "text"


# Recipe


def test_config(model: nn.Module, prompts: dict[str, Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "v.safetensors"
    vectors = [vector(0, 2.0), vector(2, 4.0)]
    save_vectors(path, vectors, describe_model(model, "tiny"))
    config = build(SteeringConfig, {"path": str(path)}, "rollout.steering")
    assert not config.is_neutral and config.recommended.mode == "truncate"
    with steered(model, vectors):
        expected = sample(model, prompts).sequences
    with config.attach(model) as state:
        assert sample(model, prompts).sequences.equal(expected)
    assert state.metrics()["steering/shift"] > 0 and hooks_of(model) == 0
    path.unlink()  # read once
    assert [v.strength for v in config.load(model)] == [2.0, 4.0]
    neutral = SteeringConfig(str(path), strength=0.0)
    with neutral.attach(model):
        assert neutral.is_neutral and hooks_of(model) == 0
    with pytest.raises(ConfigError, match=r"steering: .*there is no such file"):
        SteeringConfig(str(path)).attach(model)


def test_config_chooses_layers_and_strength(model: nn.Module, tmp_path: Path) -> None:
    path = tmp_path / "v.safetensors"
    save_vectors(path, [vector(0, 2.0), vector(2, 4.0)], describe_model(model, "tiny"))
    config = build(SteeringConfig, {"path": str(path), "strength": 7, "layers": [2]}, "rollout.steering")
    (found,) = config.load(model)
    assert (found.layer, found.strength) == (2, 7.0) and found.vector.equal(vector(2).vector)
    with pytest.raises(ConfigError, match=r"no vectors of layers \[1\]; it has \[0, 2\]"):
        SteeringConfig(str(path), layers=(1,)).load(model)
    with pytest.raises(ConfigError, match="does not fit the model: made for 3 layers"):
        SteeringConfig(str(path)).load(build_model(TOKENIZER))
    other = build_model(TOKENIZER, seed=9, num_hidden_layers=3)
    with pytest.warns(UserWarning, match="other weights"):
        config = SteeringConfig(str(path))
        config.load(other)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # once is enough for weights that are being trained
        config.load(other)


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"path": ""}, "path is empty"),
        ({"path": "a", "strength": float("nan")}, "strength=nan"),
        ({"path": "a", "layers": [1, 1]}, r"layers=\[1, 1\]"),
        ({"path": "a", "layers": []}, "allowed: distinct indices"),
        ({"path": "a", "strenght": 1}, "strength"),
    ],
)
def test_config_refuses(section: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build(SteeringConfig, section, "rollout.steering")


# Command


ROWS = [{"prompt": p, "preferred": a, "dispreferred": b} for p, a, b in TRIPLES]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory, model: Any) -> Path:
    folder = tmp_path_factory.mktemp("models") / "random"
    model.save_pretrained(folder)
    TOKENIZER.save_pretrained(folder)
    return folder


@pytest.fixture
def triples_file(tmp_path: Path) -> Path:
    path = tmp_path / "triples.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return path


def test_command(checkpoint: Path, triples_file: Path, model: nn.Module, tmp_path: Path) -> None:
    """The file holds what the functions give, with all settings, and is usable as a recipe's steering."""
    out = tmp_path / "made" / "v.safetensors"
    options = ["--layers", "2,0", "--k", "2", "--mode", "pos", "--steps", "3", "--strength", "1.5", "--rows", "3"]
    arguments = ["steer", str(checkpoint), "--triples", str(triples_file), "--out", str(out), *options]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    stored = load_vectors(out, model)
    expected = build_vectors(model, TOKENIZER, TRIPLES[:3], [0, 2], 2, "pos", steps=3)
    for found, other in zip(stored.vectors, expected, strict=True):
        assert (found.layer, found.strength, found.normalize) == (other.layer, 1.5, True)
        torch.testing.assert_close(found.vector, other.vector, rtol=1e-4, atol=1e-5)
    kept = {"mode": "pos", "method": "pca", "k": 2, "steps": 3, "strength": 1.5, "layers": [2, 0], "triples": 3}
    model_facts = {"model": str(checkpoint), "hidden_size": 32, "n_layers": 3, "baseline": "zero", "score": "response"}
    assert stored.settings.items() >= (kept | model_facts).items()
    assert "explained (pos)" in result.output and "3 of 3" in result.output
    with SteeringConfig(str(out)).attach(model):
        assert hooks_of(model) == 2


def test_command_on_conversations_and_parquet(checkpoint: Path, tmp_path: Path, model: nn.Module) -> None:
    """Prompts go through the chat template, and `--chat` makes a plain prompt such a one."""
    import pandas as pd

    parquet, lines = tmp_path / "t.parquet", tmp_path / "t.jsonl"
    chats = [row | {"prompt": [{"role": "user", "content": row["prompt"]}], "more": 1} for row in ROWS]
    pd.DataFrame(chats).to_parquet(parquet)
    lines.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    common = ["--layers", "1", "--steps", "2", "--method", "mean", "--dtype", "bfloat16"]
    for file, extra in ((parquet, []), (lines, ["--chat"])):
        run_cli(checkpoint, "--triples", file, "--out", file.with_suffix(".safetensors"), *common, *extra)
    (one,), _ = load_vectors(tmp_path / "t.safetensors")
    assert one.vector.norm() > 0
    half = build_model(TOKENIZER, seed=1, num_hidden_layers=3, initializer_range=0.2).to(torch.bfloat16)
    asked = [(f"u:{p}\na:", a, b) for p, a, b in TRIPLES]
    expected = build_vectors(half, TOKENIZER, asked, [1], 10, "both", "mean", 2)[0].vector
    torch.testing.assert_close(one.vector, expected, rtol=1e-3, atol=1e-4)


def run_cli(*arguments: object) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["steer", *map(str, arguments)])
    assert not caught.value.code


def test_command_on_the_embedded_model(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """Right against hasty answers of the demo's tasks; the mean baseline adds up where the zero one does not."""
    file, out = tmp_path / "t.jsonl", tmp_path / "v.safetensors"
    right = [("2 + 3 + 4", "<think>2+3=5;5+4=9</think><answer>9</answer>", "<answer>5</answer>")]
    right += [("8 - 3 + 1", "<think>8-3=5;5+1=6</think><answer>6</answer>", "<answer>5</answer>")]
    rows = [{"prompt": f"compute {p}", "preferred": a, "dispreferred": b} for p, a, b in right]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    gaps = []
    for extra in (["--steps", 20], ["--steps", 50, "--baseline", "mean"]):
        run_cli("tiny-reasoner", "--triples", file, "--out", out, "--layers", "2", "--k", 3, *extra)
        printed = capsys.readouterr().out
        gaps.append(float(printed.split("off by ")[1].split("%")[0]))
        assert ("note: 20 nodes" in printed) == (gaps[-1] > 5)
    assert gaps[0] > 20 and gaps[1] < 5
    assert load_vectors(out).settings["model"] == "tiny-reasoner"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"--layers": "one"}, "--layers 'one': name layers by number"),
        ({"--layers": "9"}, r"layers=[9]; allowed: distinct indices from 0 to 2"),
        ({"--layers": "1,1"}, "--layers 1,1: name distinct layers"),
        ({"--out": "v.bin"}, "--out v.bin: name a file that ends in .safetensors"),
        ({"--k": "0"}, "--k=0 must be >= 1"),
        ({"--rows": "0"}, "--rows 0 must be >= 1"),
        ({"--rows": "1"}, "give at least 2, or set method='mean'"),
        ({"--strength": "nan"}, "--strength nan must be finite"),
        ({"--triples": "none.jsonl"}, "--triples none.jsonl: there is no such file"),
    ],
)
def test_command_refuses(
    checkpoint: Path, triples_file: Path, tmp_path: Path, changes: dict, message: str, capsys: pytest.CaptureFixture
) -> None:
    given = {"--triples": triples_file, "--out": tmp_path / "v.safetensors", "--layers": "1", "--steps": 1} | changes
    with pytest.raises(SystemExit) as caught:
        main(["steer", str(checkpoint), *(str(part) for pair in given.items() for part in pair)])
    assert caught.value.code == 2 and message in capsys.readouterr().err
    assert not (tmp_path / "v.safetensors").exists()


def test_command_names_the_row(checkpoint: Path, tmp_path: Path) -> None:
    file = tmp_path / "t.jsonl"
    for row, message in (
        ({"prompt": 3, "preferred": "a", "dispreferred": "b"}, "row 1: prompt 3 is neither text nor a list"),
        ({"prompt": "3", "preferred": None, "dispreferred": "b"}, "row 1: preferred None is neither text nor one"),
        ({"prompt": "3", "chosen": "a"}, "line 1: there is no column preferred and no dispreferred"),
    ):
        file.write_text(json.dumps(row) + "\n")
        arguments = ["steer", str(checkpoint), "--triples", str(file), "--out", str(tmp_path / "v.safetensors")]
        result = CliRunner().invoke(app, [*arguments, "--layers", "1"])
        assert isinstance(result.exception, ConfigError) and message in str(result.exception)


def test_float32_model_is_not_copied(model: Any) -> None:
    """Only half-precision weights cost memory."""
    frozen = Float32Model(model)
    own = {p.data_ptr() for p in model.parameters()}
    assert {t.data_ptr() for n, t in frozen._state.items() if n in dict(model.named_parameters())} <= own
