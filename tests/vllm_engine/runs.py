"""A tiny training run on vLLM, and what its rollouts must be."""

from __future__ import annotations

import math

import torch
from tests_support import digit_dataset, even_reward, run_settings, teacher_forced
from transformers import AutoModelForCausalLM, TemperatureLogitsWarper

from rltok.sampling import DecodingContext, make_processors
from rltok.trainers import CreditConfig, CreditTrainer

REFLEX = {"type": "cyclic_reflex", "words": ["1", "2", "3"], "amplitude": 5.0, "period": 6.0}
FORCING = {
    "type": "budget_forcing",
    "min_tokens": 3,
    "max_tokens": 5,
    "ignore": 0,
    "wait_text": "w",
    "final_text": "so",
}
TEMPERATURE = {"type": "adaptive_temperature", "tau": 0.5}


class Watching(CreditTrainer):
    """Keeps the scored rollouts, the statistics that their temperatures came from, and whether processors ran."""

    def _generate_and_score_completions(self, inputs):
        before = self._sampler_stats
        output = super()._generate_and_score_completions(inputs)
        self.seen = [*getattr(self, "seen", []), (before, dict(output), self.model.training)]
        return output


def make(folder, path, tokenizer, decoding, rollout=None, **changes):
    """A trainer of the model in `folder`, where vLLM finds it too."""
    settings = run_settings(path, max_steps=4, temperature=0.7, use_vllm=True, vllm_mode="colocate") | changes
    args = CreditConfig(**settings, rollout={"decoding": decoding, **(rollout or {})})
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return Watching(
        model,
        even_reward,
        args,
        train_dataset=digit_dataset(),
        eval_dataset=digit_dataset(4),
        processing_class=tokenizer,
    )


def logged(trainer, key):
    return [entry[key] for entry in trainer.state.log_history if key in entry]


def check_metrics(trainer):
    assert len(trainer.seen) == 2
    for name in ("k1", "k3", "max_abs_diff", "ess", "weight_mean", "weight_ess", "truncated"):
        values = logged(trainer, f"correction/{name}")
        assert len(values) == 2 and all(math.isfinite(value) for value in values), (name, values)


def check_rollouts(trainer):
    """Returned log-probabilities equal a recomputation; forced words are no data. For rollouts of unchanged weights."""
    assert [training for _, _, training in trainer.seen] == [True, True]
    assert trainer.seen[0][0] is None and trainer.seen[1][0] is not None  # the second rollout has temperatures
    lengths, worst = set(), 0.0
    for stats, output, _ in trainer.seen:
        context = DecodingContext(0.7, stats, trainer.processing_class)
        chain = [*make_processors(trainer.doors.rollout.decoding, context), TemperatureLogitsWarper(0.7)]
        assert len(chain) == (3 if stats is None else 4)
        mask = output["completion_mask"].bool()
        lengths |= set(mask.sum(1).tolist())
        expected = teacher_forced(trainer.model.eval(), output, chain)
        worst = max(worst, (output["sampling_per_token_logps"] - expected)[mask].abs().max().item())
        forced = mask & (output["sampling_per_token_logps"] == 0)
        assert forced.any() and not (output["tool_mask"].bool() & forced).any()
    trainer.model.train()
    print(f"largest difference of recorded log-probabilities: {worst:.1e}")
    assert len(lengths) > 1
    assert worst < 1e-5
    check_metrics(trainer)
    assert min(logged(trainer, "correction/max_abs_diff")) > 0.5
