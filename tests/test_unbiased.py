"""What each kind of correction makes exact, by enumerating every completion of a tiny problem; nothing is sampled.

Vocabulary 8, length 4, float64. Two sides are compared. The library's side is the trainer's first update: processors,
recorded log-probabilities, `rollout_weights`, `token_loss`, `aggregate`, over all completions with their probability
under the sampler. The other side is written from the definitions: the derivative of the expected advantage, or sums
over the tree of prefixes, where Q is the expected advantage after a token when the sampler draws all later ones.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from itertools import product
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor, nn
from transformers import LogitsProcessor, PreTrainedTokenizerFast, TopPLogitsWarper

from rltok.correction import CorrectionConfig, RolloutWeights, rollout_weights
from rltok.entropy import entropy_stats
from rltok.objective import Divisors, LossBatch, LossSettings, aggregate, plan_loss, token_loss
from rltok.sampling import DECODING, DecodingContext, make_processors

WORDS = ("a", "wait", "b", "But", "c", "</think>", "d", "<eos>")
VOCAB, LENGTH = len(WORDS), 4
EOS = WORDS.index("<eos>")
PROMPT = torch.tensor([[EOS, 0, 4]])  # left-padded
VISIBLE = 0.02
"""relative error of a gradient that counts as a bias and not as rounding"""

ENTROPIES = torch.tensor([[0.6, 1.0, 1.3, 1.6, 1.9]])
STATS = entropy_stats(ENTROPIES, torch.ones_like(ENTROPIES), rho=0.5)
MILD: dict[str, dict[str, Any]] = {
    "adaptive_temperature": {"tau": 0.3},
    "cyclic_reflex": {"amplitude": 2.0, "period": 4.0, "words": ["wait", "But"]},
    "reflection_suppression": {"strength": 1.0, "words": ["wait"]},
    "thought_switching": {"alpha": 1.5, "beta": 2, "words": ["But"]},
}
"""decoding method -> options with which every token keeps some probability"""
SAMPLERS = {**{name: {name: options} for name, options in MILD.items()}, "all": MILD}
RESTRICTING: dict[str, dict[str, Any]] = {
    "budget_forcing": {"min_tokens": 2, "ignore": 0, "max_tokens": None, "wait_text": "wait"},
    "reflection_suppression": {"strength": None, "words": ["wait"]},
}
"""decoding method -> options with which some token has none"""


class Policy(nn.Module):
    """(B, t) completion ids -> (B, t + 1, V) logits after 0, 1, .. t tokens. Without memory only the place counts."""

    def __init__(self, memory: bool = True) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.memory = memory
        self.embedding = nn.Embedding(VOCAB, 6)
        self.cell = nn.GRU(6, 6, batch_first=True)
        self.head = nn.Linear(6, VOCAB)
        self.place = nn.Parameter(0.7 * torch.randn(LENGTH, VOCAB))
        self.double()

    def forward(self, ids: Tensor) -> Tensor:
        place = self.place[: ids.size(1) + 1].expand(ids.size(0), -1, -1)
        if not self.memory:
            return place
        start = self.place.new_zeros(ids.size(0), 1, 6)
        return place + 2.5 * self.head(self.cell(torch.cat([start, self.embedding(ids)], dim=1))[0])


@cache
def tokenizer() -> PreTrainedTokenizerFast:
    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="a"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<eos>", eos_token="<eos>", padding_side="left")


@dataclass
class Problem:
    """All completions of one policy and one sampler, as one batch of B rows, T = length."""

    policy: Policy
    make: Callable[[], list[LogitsProcessor]]
    temperature: float
    length: int
    ids: Tensor
    """(B, T), padded with the end token"""
    mask: Tensor
    """(B, T) 1 up to the end token, which counts"""
    advantages: Tensor
    """(B,)"""
    loss_mask: Tensor
    """(B, T) float64, 1 where the loss counts a token"""

    def logps(self) -> Tensor:
        """(B, T) of the learner, with gradient."""
        logits = self.policy(self.ids[:, :-1]) / self.temperature
        return logits.log_softmax(-1).gather(2, self.ids[..., None]).squeeze(2)

    def sampler_rows(self, ids: Tensor, steps: range) -> Tensor:
        """(B, steps, V) log-probabilities of the sampler after the first tokens of `ids`."""
        with torch.no_grad():
            logits = self.policy(ids)
        processors, rows = self.make(), []
        for processor in processors:
            if hasattr(processor, "begin"):
                settings = SimpleNamespace(temperature=self.temperature, do_sample=True, output_logits=False)
                processor.begin(PROMPT.size(1), settings)
        for step in steps:
            scores = logits[:, step].clone()
            so_far = torch.cat([PROMPT.expand(len(ids), -1), ids[:, :step]], dim=1)
            for processor in processors:
                scores = processor(so_far, scores)
            rows.append((scores / self.temperature).log_softmax(-1))
        return torch.stack(rows, dim=1)

    def log_mu(self) -> Tensor:
        """(B, T) of the sampler, step by step as in `generate`; NaN behind the end, where nothing may read."""
        rows = self.sampler_rows(self.ids[:, :-1], range(self.length))
        return rows.gather(2, self.ids[..., None]).squeeze(2).masked_fill(self.mask == 0, math.nan)

    def probability(self) -> Tensor:
        """(B,) of every completion under the sampler."""
        return self.log_mu().nan_to_num(nan=0.0, neginf=-math.inf).sum(1).exp()

    def gradient(self, scalar: Tensor) -> Tensor:
        found = torch.autograd.grad(scalar, list(self.policy.parameters()), allow_unused=True, materialize_grads=True)
        return torch.cat([part.flatten() for part in found])


def methods(settings: dict[str, dict[str, Any]], temperature: float = 1.0) -> list[LogitsProcessor]:
    """Processors of the methods, by the way of a recipe."""
    modules = [DECODING[name](**options) for name, options in settings.items()]
    return list(make_processors(modules, DecodingContext(temperature, STATS, tokenizer())))


def build(
    sampler: str | Callable[[], list[LogitsProcessor]],
    temperature: float = 1.0,
    ends: bool = True,
    length: int = LENGTH,
    memory: bool = True,
    additive: bool = False,
    **changes: Any,
) -> Problem:
    """`ends`: a token ends completions. `additive`: the advantage is a sum over steps. `changes`: to the options."""

    def make() -> list[LogitsProcessor]:
        if callable(sampler):
            return sampler()
        return methods({name: {**options, **changes} for name, options in SAMPLERS[sampler].items()}, temperature)

    ids = torch.tensor(list(product(range(VOCAB), repeat=length)))
    mask = torch.ones_like(ids)
    if ends:
        before = (ids == EOS).cumsum(1) - (ids == EOS).long()
        ids, mask = ids.masked_fill(before > 0, EOS), (before == 0).long()
        ids, first = ids.unique(dim=0, return_inverse=True)
        mask = torch.zeros_like(ids).index_copy_(0, first, mask)
    generator = torch.Generator().manual_seed(5)
    rewards = torch.randn(len(ids), generator=generator, dtype=torch.float64)
    rewards = rewards + 1.5 * (ids == 1).any(1) - (ids == 3).sum(1) * (ids[:, 0] % 2)  # the biased words matter
    if additive:
        rewards = torch.randn(length, VOCAB, generator=generator, dtype=torch.float64)[torch.arange(length), ids].sum(1)
    return Problem(Policy(memory), make, temperature, length, ids, mask, rewards - 0.4, mask.double())


# ---- the library's side


def corrected(problem: Problem, config: CorrectionConfig, loss_type: str = "dr_grpo") -> tuple[Tensor, RolloutWeights]:
    """Expected ascent direction of the first update, and the weights of all completions."""
    logps, mask = problem.logps(), problem.loss_mask
    weights = rollout_weights(logps.detach(), problem.log_mu(), mask, config)
    batch = LossBatch(logps, logps.detach(), weights.loss_mask, torch.zeros_like(mask))
    settings = LossSettings(loss_type)
    plan = plan_loss(batch, problem.advantages[:, None], settings)
    losses, _ = token_loss(batch, plan, settings, None if config.mode == "off" else weights.weight)
    divisors = Divisors(tokens=float(problem.length), token_budget=problem.length, rows=1.0)
    loss = aggregate(losses * problem.probability()[:, None], weights.loss_mask, loss_type, divisors)
    return -problem.gradient(loss), weights


def config(level: str, mode: str = "truncate", high: float | None = None, **options: Any) -> CorrectionConfig:
    return CorrectionConfig(level=level, mode=mode, clip_max=high, **options)  # type: ignore[arg-type]


# ---- the other side, from the definitions


def on_policy(problem: Problem, per_token: bool = False) -> Tensor:
    """Derivative of the learner's expected advantage, over length (or over each completion's own)."""
    divisor = problem.mask.sum(1) if per_token else problem.length
    expected = (problem.logps() * problem.mask).sum(1).exp()
    if per_token:  # the divisor is no function of the policy: score function, completion by completion
        logp = (problem.logps() * problem.mask).sum(1)
        return problem.gradient((expected.detach() * problem.advantages / divisor * logp).sum())
    return problem.gradient((expected * problem.advantages).sum() / divisor)


@dataclass
class Place:
    """All prefixes of one length that are not ended, n of them."""

    log_pi: Tensor
    """(n, V) with gradient"""
    mu: Tensor
    """(n, V)"""
    reach: Tensor
    """(n,) probability that the sampler gets here"""
    q: Tensor
    """(n, V) expected advantage after a token, later ones from the sampler"""


def tree(problem: Problem) -> list[Place]:
    """Every prefix with its distributions; the sampler's come from fresh processors that see a whole prefix at once."""
    lengths = problem.mask.sum(1).tolist()
    rows = zip(problem.ids.tolist(), lengths, problem.advantages.tolist(), strict=True)
    value = {tuple(row[:length]): advantage for row, length, advantage in rows}
    ends = problem.mask.min() == 0
    levels = [[()]]
    for _ in range(problem.length - 1):
        levels.append([(*p, a) for p in levels[-1] for a in range(VOCAB) if not (ends and a == EOS)])
    places = []
    for depth, prefixes in reversed(list(enumerate(levels))):
        ids = torch.tensor(prefixes, dtype=torch.long).view(len(prefixes), depth)
        log_pi = (problem.policy(ids)[:, -1] / problem.temperature).log_softmax(-1)
        mu = problem.sampler_rows(ids, range(depth, depth + 1))[:, 0].exp()
        q = torch.tensor([[value[*p, a] for a in range(VOCAB)] for p in prefixes], dtype=torch.float64)
        value |= {p: float(v) for p, v in zip(prefixes, (mu * q).sum(1), strict=True)}
        places.insert(0, Place(log_pi, mu, torch.ones(len(prefixes), dtype=torch.float64), q))
    for depth in range(1, problem.length):
        above = {p: i for i, p in enumerate(levels[depth - 1])}
        parents = torch.tensor([above[p[:-1]] for p in levels[depth]])
        last = torch.tensor([p[-1] for p in levels[depth]])
        before = places[depth - 1]
        places[depth].reach = before.reach[parents] * before.mu[parents, last]
    return places


def token_sum(problem: Problem, mass: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """sum_t sum_s reach_mu(s) sum_a mass(pi, mu)(a | s) Q_mu(s, a) grad log pi(a | s), over the length."""
    total = torch.zeros((), dtype=torch.float64)
    for place in tree(problem):
        weight = mass(place.log_pi.detach().exp(), place.mu)
        total = total + (place.reach[:, None] * weight * place.q * place.log_pi).sum()
    return problem.gradient(total / problem.length)


def sequence_sum(problem: Problem, mass: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """sum over completions of mass(pi, mu)(a) A(a) grad log pi(a), over the length."""
    logp = (problem.logps() * problem.mask).sum(1)
    weight = mass(logp.detach().exp(), problem.probability())
    return problem.gradient((weight * problem.advantages * logp).sum() / problem.length)


def close(actual: Tensor, expected: Tensor) -> None:
    """Equal but for rounding in float64."""
    torch.testing.assert_close(actual, expected, atol=1e-10, rtol=0.0)


def error(actual: Tensor, expected: Tensor) -> float:
    return ((actual - expected).norm() / expected.norm()).item()


# ---- full support: what is exact without bounds


def test_every_decoding_method_is_covered():
    assert set(MILD) | set(RESTRICTING) == set(DECODING)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("ends", [True, False])
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_sequence_weights_give_the_on_policy_gradient(sampler, ends, temperature):
    problem = build(sampler, temperature, ends)
    assert len(problem.ids) == (2801 if ends else 4096)
    assert problem.probability().sum().item() == pytest.approx(1, abs=1e-12)
    gradient, weights = corrected(problem, config("sequence"))
    close(gradient, on_policy(problem))
    assert (weights.weight[:, 0] * problem.probability()).sum().item() == pytest.approx(1, abs=1e-12)
    assert error(corrected(problem, CorrectionConfig(mode="off"))[0], on_policy(problem)) > VISIBLE


@pytest.mark.parametrize("loss_type", ["dr_grpo", "dapo", "grpo"])
def test_sequence_weights_are_exact_for_every_divisor(loss_type):
    problem = build("all")
    gradient, _ = corrected(problem, config("sequence"), loss_type)
    close(gradient, on_policy(problem, per_token=loss_type == "grpo"))


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_token_weights_correct_the_step_and_not_what_is_around_it(sampler, temperature):
    problem = build(sampler, temperature)
    gradient, _ = corrected(problem, config("token"))
    close(gradient, token_sum(problem, lambda pi, mu: pi))
    # which is the derivative of sum_t E[A], the learner drawing token t and the sampler all others
    one_step = torch.zeros((), dtype=torch.float64)
    for place in tree(problem):
        one_step = one_step + (place.reach[:, None] * place.log_pi.exp() * place.q).sum()
    close(gradient, problem.gradient(one_step / LENGTH))
    assert error(gradient, on_policy(problem)) > VISIBLE  # prefixes and continuations are still the sampler's


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_token_weights_are_on_policy_for_one_step(sampler):
    crest = {"phase": 0.25} if sampler == "cyclic_reflex" else {}  # at phase 0 the wave starts at 0
    problem = build(sampler, 0.7, length=1, **crest)
    gradient, weights = corrected(problem, config("token"))
    assert (weights.weight - 1).abs().max() > 0.05
    close(gradient, on_policy(problem))


def test_token_weights_are_on_policy_where_steps_do_not_depend_on_each_other():
    settings = {"ends": False, "memory": False, "additive": True, "think_end": None}
    separate = build("cyclic_reflex", **settings)
    gradient, _ = corrected(separate, config("token"))
    close(gradient, on_policy(separate))
    for change in ({"memory": True}, {"additive": False}, {"think_end": "</think>"}):
        joined = build("cyclic_reflex", **{**settings, **change})
        assert error(corrected(joined, config("token"))[0], on_policy(joined)) > VISIBLE


def test_token_weights_leave_less_bias_than_none():
    """Not a theorem: on the mean over rewards that are sums over tokens and pairs of neighbours."""
    problem, errors = build("all"), []
    probability = problem.probability()
    for seed in range(8):
        generator = torch.Generator().manual_seed(100 + seed)
        single = torch.randn(LENGTH, VOCAB, generator=generator, dtype=torch.float64)[torch.arange(LENGTH), problem.ids]
        pairs = torch.randn(VOCAB, VOCAB, generator=generator, dtype=torch.float64)[
            problem.ids[:, :-1], problem.ids[:, 1:]
        ]
        rewards = (single * problem.mask).sum(1) + (pairs * problem.mask[:, 1:]).sum(1)
        problem.advantages = rewards - (probability * rewards).sum()
        exact = on_policy(problem)
        errors.append([error(corrected(problem, c)[0], exact) for c in (config("token"), CorrectionConfig(mode="off"))])
    token, off = torch.tensor(errors).mean(0).tolist()
    assert token < 0.6 * off


@pytest.mark.parametrize("level", ["token", "sequence"])
def test_a_baseline_costs_nothing_until_weights_are_bounded(level):
    problem = build("all")
    free, bounded = config(level), config(level, high=1.1)
    before = corrected(problem, free)[0], corrected(problem, bounded)[0]
    problem.advantages = problem.advantages - 3.0
    close(corrected(problem, free)[0], before[0])
    assert error(corrected(problem, bounded)[0], before[1]) > VISIBLE


# ---- bounds: the bias, exactly


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("bounds", [(1.1, None), (1.1, 0.95)])
def test_truncation_replaces_the_policy_by_what_the_bounds_leave(sampler, bounds):
    problem = build(sampler)
    high, low = bounds
    least = 0.0 if low is None else low

    def left(pi: Tensor, mu: Tensor) -> Tensor:
        return torch.minimum(torch.maximum(pi, least * mu), high * mu)

    for level, total in (("token", token_sum), ("sequence", sequence_sum)):
        gradient, weights = corrected(problem, config(level, high=high, clip_min=low))
        assert weights.metrics["truncated"] > 0
        close(gradient, total(problem, left))
        bias = gradient - corrected(problem, config(level))[0]
        lost = total(problem, lambda pi, mu: -(pi - high * mu).clamp(min=0) + (least * mu - pi).clamp(min=0))
        close(bias, lost)
        assert error(gradient, corrected(problem, config(level))[0]) > VISIBLE / 10


@pytest.mark.parametrize("level", ["token", "sequence"])
def test_truncation_vanishes_where_no_ratio_reaches_the_bound(level):
    problem = build("all")
    free, weights = corrected(problem, config(level))
    high = weights.metrics["ratio_max"].item()
    close(corrected(problem, config(level, high=high))[0], free)
    errors = [
        error(corrected(problem, config(level, high=1 + share * (high - 1)))[0], free) for share in (0.1, 0.5, 0.9)
    ]
    assert errors[0] > errors[1] > errors[2] > 0


def test_without_bounds_ratios_still_end_at_e_to_the_20():
    problem = build("cyclic_reflex", amplitude=40.0)
    limit = math.exp(20.0)

    def left(pi: Tensor, mu: Tensor) -> Tensor:
        return torch.minimum(torch.maximum(pi, mu / limit), limit * mu)

    for level, total in (("token", token_sum), ("sequence", sequence_sum)):
        gradient, weights = corrected(problem, config(level))
        assert weights.metrics["max_abs_diff"] > 20
        close(gradient, total(problem, left))
        assert error(gradient, total(problem, lambda pi, mu: pi)) > VISIBLE / 10


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_masking_leaves_out_exactly_what_is_outside_the_bounds(sampler):
    problem = build(sampler)
    low, high = 0.8, 1.25

    def inside(pi: Tensor, mu: Tensor) -> Tensor:
        return torch.where((pi >= low * mu) & (pi <= high * mu), pi, 0.0)

    for level, total in (("token", token_sum), ("sequence", sequence_sum)):
        gradient, weights = corrected(problem, config(level, "mask", high, clip_min=low))
        assert 0 < weights.metrics["rejected"] < 1
        close(gradient, total(problem, inside))


def test_a_rejected_token_leaves_the_divisor_of_its_completion_or_stays():
    problem = build("all")
    x = (problem.logps() - problem.log_mu().nan_to_num()).detach()
    kept = (x.exp() >= 0.8) & (x.exp() <= 1.25) & (problem.mask == 1)
    for stays, count in ((False, kept.sum(1).clamp(min=1)), (True, problem.mask.sum(1))):
        settings = config("token", "mask", 1.25, clip_min=0.8, masked_in_denominator=stays)
        gradient, _ = corrected(problem, settings, "grpo")
        share = problem.probability() * problem.advantages / count
        expected = problem.gradient((share[:, None] * kept * x.exp() * problem.logps()).sum())
        close(gradient, expected)


def test_a_veto_leaves_out_whole_completions():
    problem = build("cyclic_reflex")
    x = (problem.logps() - problem.log_mu().nan_to_num()).detach() * problem.mask
    kept = (x.exp() >= 0.5).all(1)
    assert 0.1 < kept.double().mean() < 0.95
    gradient, _ = corrected(problem, config("sequence", veto=0.5))
    close(gradient, sequence_sum(problem, lambda pi, mu: pi * kept))


def test_geometric_rejection_selects_and_does_not_correct():
    problem = build("all")
    x = (problem.logps() - problem.log_mu().nan_to_num()).detach() * problem.mask
    mean = (x.sum(1) / problem.mask.sum(1)).exp()
    kept = (mean >= 0.9) & (mean <= 1.1)
    assert 0.1 < kept.double().mean() < 0.9
    gradient, _ = corrected(problem, config("geometric", "mask", 1.1, clip_min=0.9))
    close(gradient, sequence_sum(problem, lambda pi, mu: mu * kept))
    everything, _ = corrected(problem, config("geometric", "mask"))
    close(everything, corrected(problem, CorrectionConfig(mode="off"))[0])


# ---- missing support: what no weight repairs


RESTRICTIONS: dict[str, Callable[[], list[LogitsProcessor]]] = {
    "top-p": lambda: [TopPLogitsWarper(0.8)],
    **{name: partial(methods, {name: options}) for name, options in RESTRICTING.items()},
    "all methods": lambda: methods({**MILD, **RESTRICTING}),
}


@pytest.mark.parametrize("name", RESTRICTIONS)
def test_what_the_sampler_forbids_is_missing_from_the_gradient(name):
    problem = build(RESTRICTIONS[name])
    possible = problem.probability() > 0
    assert 0.01 < possible.double().mean() < 0.95
    gradient, weights = corrected(problem, config("sequence"))
    close(gradient, sequence_sum(problem, lambda pi, mu: pi * (mu > 0)))
    assert error(gradient, on_policy(problem)) > VISIBLE

    kept = (problem.logps() * problem.mask).detach().sum(1).exp()[possible].sum()  # the learner's mass on what is left
    mean = (weights.weight[:, 0] * problem.probability())[possible].sum()
    assert mean.item() == pytest.approx(kept.item(), abs=1e-12) and kept < 0.95

    token, _ = corrected(problem, config("token"))
    close(token, token_sum(problem, lambda pi, mu: pi * (mu > 0)))


@pytest.mark.parametrize("others", [{}, MILD], ids=["alone", "with the others"])
def test_forced_tokens_are_the_environment(others):
    """With forced tokens out of the loss, sequence weights give the derivative for a policy that is interrupted so."""
    options = {"max_tokens": 2, "ignore": 0}
    problem = build(partial(methods, {**others, "budget_forcing": options}))
    forced_ids = DECODING["budget_forcing"](**options).forced_ids(DecodingContext(tokenizer=tokenizer()))
    forced = (problem.log_mu() == 0) & torch.isin(problem.ids, torch.tensor(sorted(forced_ids)))
    assert forced.any(0).tolist() == [False, False, True, False]
    problem.loss_mask = (problem.mask.bool() & ~forced).double()
    gradient, _ = corrected(problem, config("sequence"))
    possible = problem.probability() > 0
    expected = (problem.logps() * problem.loss_mask).sum(1).exp() * problem.advantages * possible
    close(gradient, problem.gradient(expected.sum() / LENGTH))
    problem.loss_mask = problem.mask.double()
    assert error(corrected(problem, config("sequence"))[0], gradient) > VISIBLE  # as samples they would be wrong
