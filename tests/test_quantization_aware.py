"""EdgeQAT as a section of a recipe: its losses over ranks, training behind quantisers, saved and loaded models."""

from __future__ import annotations

import dataclasses
import gc
import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from tests_support import build_model, build_tokenizer, digit_dataset, even_reward, run_on_ranks, run_settings
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, Qwen3ForCausalLM
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from rltok.config import ConfigError
from rltok.models import QUANTIZERS, ModelConfig, check_trainable, load_model
from rltok.quant.fake import OFF, DynamicFakeQuantWeight, FakeQuantWeight
from rltok.quant.qat import (
    QATSpec,
    calibrate_qat,
    collecting,
    collecting_teacher,
    convert,
    high_width,
    is_converted,
    is_prepared,
    kept_weights,
    needs_calibration,
    prepare_qat,
    qat_state,
    suspended,
    to_torchao,
)
from rltok.quant.qat_config import QuantizationAwareConfig, build_quantization_aware, filled_quantization_aware
from rltok.quant.qat_files import restore_quantizers, write_quantizers
from rltok.quant.qat_losses import (
    distillation_loss,
    entropy_loss,
    hidden_divergence,
    streamed_distribution_loss,
)
from rltok.quant.qat_training import QATObjective, start_copy
from rltok.recipe import load_recipe
from rltok.resume_rules import Verdict, rule_of
from rltok.trainers import CreditConfig, CreditTrainer

LOSSES = {"entropy": 0.5, "distribution": 1.0, "distillation": {"gamma": 0.25, "temperature": 2.0}}
NEUTRAL = {"weight_bits": OFF, "activation_bits": OFF}
IDS = torch.tensor([[5, 9, 11, 7, 20, 31, 8, 12], [6, 10, 14, 3, 22, 30, 13, 15], [4, 8, 15, 16, 23, 42, 7, 9]])
MASK = torch.tensor([[1] * 8, [0, 0, 1, 1, 1, 1, 1, 0], [0, 1, 1, 1, 1, 1, 1, 1]])
PREDICTED = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 1], [0, 0, 0, 0, 1, 1, 0, 0], [0, 0, 0, 0, 0, 0, 1, 1]])


@pytest.fixture(autouse=True)
def _no_wrapper_left() -> Iterator[None]:
    """Whatever a test leaves prepared is forgotten, so that the next one sees transformers' own function."""
    before = ALL_ATTENTION_FUNCTIONS["sdpa"]
    yield
    if ALL_ATTENTION_FUNCTIONS["sdpa"] is not before:
        from rltok.quant import qat

        for quantisers in list(qat._LIVE):
            qat._LIVE.discard(quantisers)
        qat._release()


def build(seed: int = 0, **changes: object) -> Qwen3ForCausalLM:
    return build_model(build_tokenizer(), seed, **changes)


def logits_of(model: nn.Module, ids: Tensor = IDS, mask: Tensor = MASK) -> Tensor:
    return model(input_ids=ids, attention_mask=mask, use_cache=False).logits


# The section


def test_the_section_is_checked_and_filled_in() -> None:
    config = build_quantization_aware({"weight_bits": 4, "entropy": 0.5})
    assert config is not None and config.spec == QATSpec() and config.has_loss and not config.has_teacher
    assert build_quantization_aware(None) is None and build_quantization_aware(NEUTRAL) is None
    assert build_quantization_aware(NEUTRAL | {"distillation": {"gamma": 0.0}}) is None
    filled = filled_quantization_aware({"distillation": {"gamma": 0.3}, "skip": None, "group_size": None})
    assert filled["distillation"] == {"gamma": 0.3, "temperature": 2.0} and filled["skip"] == [
        "lm_head",
        "embed_tokens",
    ]
    assert filled_quantization_aware(filled) == filled
    recipe = load_recipe("edge_qat")
    assert recipe.quantization_aware == filled_quantization_aware({"entropy": 0.5, "distribution": 1.0})
    assert load_recipe("demo").quantization_aware is None
    for override, words in {
        "quantization_aware.weight_bit=4": "did you mean 'weight_bits'",
        "quantization_aware.weight_bits=16": "weight_bits=16",
        "quantization_aware.entropy=-1": "entropy=-1",
        "quantization_aware.distillation={gamma: 2}": "gamma=2",
        "quantization_aware.teacher=other": "start",
        "quantization_aware.group_size=8": "weight='dynamic'",
    }.items():
        with pytest.raises(ConfigError) as caught:
            load_recipe("edge_qat", [override])
        assert words in str(caught.value)
    assert rule_of("quantization_aware.weight_bits").verdict is Verdict.ALWAYS
    assert rule_of("quantization_aware.entropy").verdict is Verdict.SHOWN


# The objective


def objective(seed: int = 0, reducer: Any = None, **section: Any) -> QATObjective:
    config = QuantizationAwareConfig(**(LOSSES | {"distillation": None} | section))
    options = {} if reducer is None else {"reducer": reducer}
    made = QATObjective.prepare(build(seed).double(), config, **options)
    calibrate_qat(made.model, input_ids=IDS, attention_mask=MASK)
    return made


def teach(made: QATObjective, seed: int = 3) -> None:
    """Another teacher than the start, or nothing would be far from it."""
    made.teacher = build(seed).double().requires_grad_(False).eval()


def section_of(**changes: Any) -> dict[str, Any]:
    from rltok.quant.qat_config import DistillationConfig

    return LOSSES | {"distillation": DistillationConfig(0.25, 2.0)} | changes


def grads_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.grad.clone() for name, value in model.named_parameters() if value.grad is not None}


@pytest.mark.parametrize("forms", [("mean", "recommended"), ("code", "recommended"), ("paper", "log")])
def test_the_objective_is_the_sum_of_the_losses(forms: tuple[Any, Any]) -> None:
    made = objective(**section_of(entropy_form=forms[0], distribution_form=forms[1]))
    if forms[1] == "recommended":
        teach(made)
    with made.around():
        logits_of(made.model)
    found, numbers = made.loss(PREDICTED)
    found.backward()
    grads = grads_of(made.model)
    made.model.zero_grad()
    with torch.no_grad(), collecting_teacher(made.teacher) as theirs:
        positions = (MASK.cumsum(1) - 1).clamp(min=0)  # those that the prepared model counts
        wanted = made.teacher(input_ids=IDS, attention_mask=MASK, position_ids=positions, use_cache=False).logits
    with collecting(made.model) as ours:
        logits = logits_of(made.model)
    student, teacher = [[part[layer] for layer in (0, 1)] for part in (ours, theirs)]
    spread = entropy_loss([x.query for x in student], [x.key for x in student], MASK, 0.5, forms[0])
    distance = streamed_distribution_loss(student, teacher, MASK, 1.0, forms[1])
    chosen = (MASK[:, 1:] * MASK[:, :-1] * PREDICTED[:, 1:]).bool()
    divergence = distillation_loss(logits[:, :-1], wanted[:, :-1], chosen, 2.0, 0.25)
    expected = spread + distance + divergence
    expected.backward()
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=1e-6)
    assert numbers == pytest.approx(
        {"entropy_loss": spread.item(), "distribution_loss": distance.item(), "distillation_loss": divergence.item()},
        abs=1e-9,
    )
    other = grads_of(made.model)
    assert grads.keys() == other.keys() and max(value.abs().max() for value in other.values()) > 1e-3
    for name, value in other.items():
        torch.testing.assert_close(grads[name], value, rtol=1e-6, atol=1e-9)
    assert made.task_weight == 0.75


class _Others:
    """A reducer of several ranks: first keeps what each sends, then adds it up."""

    def __init__(self) -> None:
        self.sent: list[Tensor] = []
        self.total: Tensor | None = None

    def sum(self, local: Tensor) -> Tensor:
        self.sent.append(local)
        return local if self.total is None else self.total

    def max(self, local: Tensor) -> Tensor:
        return local


@pytest.mark.parametrize("forms", [("mean", "recommended"), ("code", "log")])
def test_ranks_with_unequal_rows_average_to_the_loss_of_all_rows(forms: tuple[str, str]) -> None:
    options = section_of(entropy_form=forms[0], distribution_form=forms[1])
    whole = objective(**options)
    with whole.around():
        logits_of(whole.model)
    expected, numbers = whole.loss(PREDICTED)
    expected.backward()
    shares = [slice(0, 1), slice(1, 3)]

    def run(reducer: _Others) -> tuple[list[Tensor], list[dict[str, Tensor]], list[dict[str, float]]]:
        losses, grads, logged = [], [], []
        for share in shares:
            made = objective(**options)
            made.reducer = reducer
            with made.around():
                logits_of(made.model, IDS[share], MASK[share])
            loss, found = made.loss(PREDICTED[share])
            loss.backward()
            losses, grads, logged = [*losses, loss], [*grads, grads_of(made.model)], [*logged, found]
        return losses, grads, logged

    reducer = _Others()
    run(reducer)
    reducer.total = torch.stack(reducer.sent).sum(0)
    losses, grads, logged = run(reducer)
    torch.testing.assert_close(torch.stack(losses).mean(), expected, rtol=0, atol=1e-6)
    assert logged[0] == pytest.approx(numbers) and logged[1] == pytest.approx(numbers)
    quantisers = ("fake_quant.", "fake_quantizer.")  # their gradients are scaled by a rank's own number of elements
    for name, value in grads_of(whole.model).items():
        if not any(mark in name for mark in quantisers):
            torch.testing.assert_close((grads[0][name] + grads[1][name]) / 2, value, rtol=1e-5, atol=1e-8)


def test_passes_of_unequal_size_add_up_to_the_means_of_a_step() -> None:
    """`rows` and `tokens` are those of a whole optimizer step; the entropy loss is a mean over its passes."""
    options = section_of(entropy=0.0)
    made = objective(**options)
    teach(made)
    with made.around():
        logits_of(made.model)
    expected, _ = made.loss(PREDICTED)
    chosen = float((MASK[:, 1:] * MASK[:, :-1] * PREDICTED[:, 1:]).sum())
    total = torch.zeros(())
    for share in (slice(0, 1), slice(1, 3)):
        with made.around():
            logits_of(made.model, IDS[share], MASK[share])
        total = total + made.loss(PREDICTED[share], tokens=chosen, rows=1.5, slices=2)[0]
    torch.testing.assert_close(total, expected, rtol=0, atol=1e-6)


def test_the_divergence_of_hidden_states_is_that_of_logits() -> None:
    generator = torch.Generator().manual_seed(0)
    hidden, other = (torch.randn(7, 5, dtype=torch.float64, generator=generator) for _ in range(2))
    heads = [nn.Linear(5, 11, dtype=torch.float64) for _ in range(2)]
    found = []
    for block in (3, 100):
        leaf = hidden.clone().requires_grad_(True)
        loss = hidden_divergence(leaf, heads[0], other, heads[1], 2.0, block)
        loss.backward()
        found.append((loss.detach(), leaf.grad))
    leaf = hidden.clone().requires_grad_(True)
    expected = 7 * distillation_loss(heads[0](leaf)[None], heads[1](other)[None], torch.ones(1, 7), 2.0, 1.0)
    expected.backward()
    for loss, grad in found:
        torch.testing.assert_close(loss, expected.detach())
        torch.testing.assert_close(grad, leaf.grad)
    with pytest.raises(ValueError, match="block=0"):
        hidden_divergence(hidden, heads[0], other, heads[1], block=0)


def test_the_objective_refuses_in_words() -> None:
    packed = objective(distribution=0.0)
    with packed.around():
        packed.model(input_ids=IDS[:1], position_ids=torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3]]), use_cache=False)
    with pytest.raises(ValueError, match="packed"):
        packed.loss()
    saving = objective(distribution=0.0)
    saving.model.train()
    saving.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
    with saving.around():
        logits_of(saving.model)
    with pytest.raises(ValueError, match="use_reentrant"):
        saving.loss()
    with pytest.raises(RuntimeError, match="2 forward passes"), packed.around():
        logits_of(packed.model)
        logits_of(packed.model)
    with pytest.raises(ValueError, match="is converted"):
        QATObjective.prepare(convert(packed.model), packed.config)
    with pytest.raises(ValueError, match="other quantisers"):
        QATObjective.prepare(saving.model, QuantizationAwareConfig(weight_bits=8))
    scaled = build()
    scaled.config.logits_scaling = 8.0
    with pytest.raises(ValueError, match="logits_scaling"):
        QATObjective.prepare(scaled, QuantizationAwareConfig(**section_of()))


# Contexts of a prepared model


def test_suspended_quantisers_are_not_there() -> None:
    plain = build().eval()
    model: Any = prepare_qat(build().eval(), QATSpec(low_share=0.5))
    with suspended(model):
        assert torch.equal(logits_of(model), logits_of(plain))
        assert torch.equal(model.generate(IDS[:1], max_new_tokens=4), plain.generate(IDS[:1], max_new_tokens=4))
    assert needs_calibration(model)
    calibrate_qat(model, input_ids=IDS, attention_mask=MASK)
    assert not needs_calibration(model) and not torch.equal(logits_of(model), logits_of(plain))


def test_the_high_width_serves_all_tokens_and_allows_a_cache() -> None:
    mixed: Any = prepare_qat(build().eval(), QATSpec(low_share=0.5))
    calibrate_qat(mixed, input_ids=IDS, attention_mask=MASK)
    uniform = prepare_qat(build().eval(), QATSpec())
    calibrate_qat(uniform, input_ids=IDS, attention_mask=MASK)
    state = {name: value for name, value in mixed.state_dict().items() if name in uniform.state_dict()}
    uniform.load_state_dict(state)
    assert not torch.equal(logits_of(mixed), logits_of(uniform))
    with high_width(mixed):
        assert torch.equal(logits_of(mixed), logits_of(uniform))
        mixed.generate(IDS[:1], max_new_tokens=3)
    with pytest.raises(ValueError, match="whole sequences"):
        mixed.generate(IDS[:1], max_new_tokens=3)


def test_positions_count_from_the_first_token_so_that_padding_decides_no_code() -> None:
    model: Any = prepare_qat(build().double().eval(), QATSpec())
    calibrate_qat(model, input_ids=IDS, attention_mask=MASK)
    ids, mask = nn.functional.pad(IDS, (5, 2)), nn.functional.pad(MASK, (5, 2))
    valid = MASK.bool()
    torch.testing.assert_close(logits_of(model, ids, mask)[:, 5:13][valid], logits_of(model)[valid], rtol=0, atol=1e-10)
    alone = logits_of(model, IDS[1:2, 2:7], torch.ones(1, 5))
    torch.testing.assert_close(logits_of(model)[1:2, 2:7], alone, rtol=0, atol=1e-10)


def test_the_wrapper_goes_with_the_last_prepared_model() -> None:
    original = ALL_ATTENTION_FUNCTIONS["sdpa"]
    model: Any = prepare_qat(build(), QATSpec())
    assert ALL_ATTENTION_FUNCTIONS["sdpa"] is not original
    del model
    gc.collect()
    assert ALL_ATTENTION_FUNCTIONS["sdpa"] is original


def test_kept_weights_are_formed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model: Any = prepare_qat(build().eval(), QATSpec())
    calibrate_qat(model, input_ids=IDS, attention_mask=MASK)
    expected, calls, forward = logits_of(model), [], FakeQuantWeight.forward

    def counted(self: FakeQuantWeight, weight: Tensor) -> Tensor:
        calls.append(1)
        return forward(self, weight)

    monkeypatch.setattr(FakeQuantWeight, "forward", counted)
    with kept_weights(model):
        assert len(calls) == 2 * 7
        assert torch.equal(logits_of(model), expected) and torch.equal(logits_of(model), expected)
    assert len(calls) == 2 * 7
    logits_of(model)
    assert len(calls) == 4 * 7


# Saved models


@pytest.mark.parametrize("low_share", [0.0, 0.5])
@pytest.mark.parametrize("converted", [True, False])
def test_a_saved_model_comes_back_with_its_quantisers(tmp_path: Path, converted: bool, low_share: float) -> None:
    spec = QATSpec(low_share=low_share)
    model: Any = prepare_qat(build().eval(), spec)
    calibrate_qat(model, input_ids=IDS, attention_mask=MASK)
    if converted:
        convert(model)
    model.save_pretrained(tmp_path)
    write_quantizers(tmp_path, model)
    with high_width(model):
        expected = logits_of(model)
    loaded = load_model(ModelConfig(path=str(tmp_path))).eval()
    assert torch.equal(logits_of(loaded), expected)
    assert is_prepared(loaded) and is_converted(loaded) == converted and qat_state(loaded).spec == spec
    steps = [p.requires_grad for name, p in loaded.named_parameters() if name.endswith("zp")]
    assert steps and all(steps) != converted
    if not converted:
        check_trainable(ModelConfig(path=str(tmp_path)))
        return
    with pytest.raises(ConfigError, match="is converted"):
        check_trainable(ModelConfig(path=str(tmp_path)))
    (tmp_path / QUANTIZERS).unlink()
    with pytest.raises(ConfigError, match="hold steps of fake quantisers"):
        load_model(ModelConfig(path=str(tmp_path)))


def test_a_converted_model_of_the_hub_has_its_quantisers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From a cache as downloads leave it."""
    from huggingface_hub import constants

    commit, cache = "0" * 40, tmp_path / "models--someone--small"
    snapshot = cache / "snapshots" / commit
    model: Any = prepare_qat(build().eval(), QATSpec())
    calibrate_qat(model, input_ids=IDS, attention_mask=MASK)
    convert(model)
    model.save_pretrained(snapshot)
    (cache / "refs").mkdir()
    (cache / "refs" / "main").write_text(commit)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    config = ModelConfig(path="someone/small")
    with pytest.raises(ConfigError, match=r"hold steps of fake quantisers .* could not be fetched"):
        load_model(config)  # as where the weights are in the cache, and the hub does not answer

    write_quantizers(snapshot, model)
    loaded = load_model(config).eval()
    assert is_converted(loaded) and torch.equal(logits_of(loaded), logits_of(model))
    with pytest.raises(ConfigError, match="is converted"):
        check_trainable(config)


def test_transformers_alone_reports_what_it_leaves_out(tmp_path: Path) -> None:
    model: Any = prepare_qat(build().eval(), QATSpec())
    calibrate_qat(model, input_ids=IDS, attention_mask=MASK)
    convert(model)
    model.save_pretrained(tmp_path)
    write_quantizers(tmp_path, model)
    logging.getLogger("transformers").setLevel(logging.ERROR)
    plain, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and any("fake_quant" in name for name in info["unexpected_keys"])
    assert not torch.equal(logits_of(plain.eval()), logits_of(model))  # weights in 4 bits, activations in full


def test_without_quantised_activations_the_converted_model_is_plain(tmp_path: Path) -> None:
    made = QATObjective.prepare(build(), QuantizationAwareConfig(activation_bits=OFF))
    made.model.eval()
    expected = logits_of(made.model)
    model = made.convert()
    model.save_pretrained(tmp_path)
    write_quantizers(tmp_path, model)
    assert not (tmp_path / QUANTIZERS).exists() and not is_prepared(model)
    assert torch.equal(logits_of(AutoModelForCausalLM.from_pretrained(tmp_path).eval()), expected)
    check_trainable(ModelConfig(path=str(tmp_path)))


def test_broken_files_of_quantisers_are_refused(tmp_path: Path) -> None:
    model: Any = prepare_qat(build().eval(), QATSpec())
    calibrate_qat(model, input_ids=IDS, attention_mask=MASK)
    build().save_pretrained(tmp_path)
    write_quantizers(tmp_path, model)
    with pytest.raises(ConfigError, match="lacks .* tensors"):
        restore_quantizers(build(), tmp_path)
    values = json.loads((tmp_path / QUANTIZERS).read_text())
    (tmp_path / QUANTIZERS).write_text(json.dumps(values | {"spec": {"weight_bits": 99}}))
    with pytest.raises(ConfigError, match="weight_bits=99"):
        restore_quantizers(build(), tmp_path)


@pytest.mark.parametrize("group", [None, 8])
def test_dynamic_weights_go_to_torchao_with_the_same_logits(group: int | None) -> None:
    pytest.importorskip("torchao", reason="hands a model over to torchao; install rltok[quant]")
    model: Any = prepare_qat(build().eval(), QATSpec(weight="dynamic", activation_bits=OFF, group_size=group))
    expected, plain = logits_of(model), logits_of(build().eval())
    assert any(isinstance(module, DynamicFakeQuantWeight) for module in model.modules())
    to_torchao(model)
    assert type(model.get_submodule("model.layers.0.mlp.down_proj").weight).__module__.startswith("torchao")
    torch.testing.assert_close(logits_of(model), expected, rtol=0, atol=1e-6)
    assert (plain - expected).abs().max() > 1e-3
    with pytest.raises(ValueError, match="allowed: weight='dynamic'"):
        to_torchao(prepare_qat(build(), QATSpec()))


# The trainer


def make(folder: Path, section: Any = None, model: Any = None, **changes: Any) -> CreditTrainer:
    own = {"credit", "rollout", "selection", "attention_pattern", "peft_config", "optimizers"}
    options = {name: changes.pop(name) for name in own & changes.keys()}
    tokenizer = build_tokenizer()
    return CreditTrainer(
        build_model(tokenizer) if model is None else model,
        even_reward,
        CreditConfig(**run_settings(folder, **changes)),
        train_dataset=digit_dataset(),
        processing_class=tokenizer,
        quantization_aware=section,
        **options,
    )


def parameters(trainer: CreditTrainer) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in trainer.model.named_parameters()}


def log_of(trainer: CreditTrainer) -> list[dict[str, Any]]:
    return [entry for entry in trainer.state.log_history if "loss" in entry]


def test_everything_off_is_the_plain_trainer_bit_for_bit(tmp_path: Path) -> None:
    results = []
    for name, section in {"none": None, "off": NEUTRAL}.items():
        trainer = make(tmp_path / name, section, max_steps=2)
        trainer.train()
        results.append(parameters(trainer))
        assert not is_prepared(trainer.model) and not any("qat/loss" in entry for entry in log_of(trainer))
    assert results[0].keys() == results[1].keys()
    assert all(torch.equal(results[0][name], value) for name, value in results[1].items())


@pytest.mark.parametrize("engine", ["fast", "transformers"])
def test_the_policy_trains_and_samples_behind_its_quantisers(tmp_path: Path, engine: str) -> None:
    rollout = {"engine": engine, "correction": {"mode": "truncate"}}  # only to measure sampler against learner
    trainer = make(tmp_path, LOSSES | {"activation_bits": 6}, rollout=rollout)
    before = parameters(trainer)
    assert needs_calibration(trainer.model)
    trainer.train()
    log, after = log_of(trainer), parameters(trainer)
    assert not needs_calibration(trainer.model)
    for name in ("entropy_loss", "distribution_loss", "distillation_loss", "weight_step"):
        assert all(f"qat/{name}" in entry for entry in log)
    assert 0 < log[0]["qat/distribution_loss"] < 1 and log[0]["qat/distillation_loss"] > 0
    assert log[0]["correction/max_abs_diff"] < 0.05, "sampler and learner pass the same quantisers"
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert {name.rpartition(".")[2] for name in changed} >= {"alpha", "zp", "weight"}
    with torch.no_grad(), trainer._qat.sampling() if trainer._qat else pytest.fail("no quantisers"):
        behind = logits_of(trainer.model.eval())
    with suspended(trainer.model):
        assert not torch.equal(logits_of(trainer.model), behind)


def test_the_losses_are_added_to_the_policys(tmp_path: Path) -> None:
    """Of one update on the same rollout, the gradient is that of both parts, weighted."""
    grads: dict[str, dict[str, Tensor]] = {}
    for name, section in {
        "policy": {},
        "both": {"entropy": 0.5},
        "teacher": {"distillation": {"gamma": 1.0}},
    }.items():
        trainer = make(tmp_path / name, section, max_steps=1, learning_rate=0.0, max_grad_norm=0.0)
        found: dict[str, Tensor] = {}
        clip = trainer._clip_grad_norm

        def keep(model: Any, found: dict[str, Tensor] = found, clip: Any = clip) -> Any:
            found |= grads_of(model)
            return clip(model)

        trainer.args.max_grad_norm = 1e9
        trainer._clip_grad_norm = keep  # type: ignore[method-assign]
        trainer.train()
        grads[name] = found
    name = "model.layers.1.self_attn.q_proj.weight"
    assert grads["policy"][name].abs().max() > 0
    assert not torch.allclose(grads["policy"][name], grads["both"][name])
    head = "model.layers.1.mlp.down_proj.weight"  # above all queries and keys: the entropy loss does not reach it
    torch.testing.assert_close(grads["policy"][head], grads["both"][head])
    assert not torch.allclose(grads["policy"][head], grads["teacher"][head], rtol=0.1)


def test_mixed_widths_are_sampled_high_and_corrected(tmp_path: Path) -> None:
    trainer = make(tmp_path, {"low_share": 0.5, "low_bits": 3}, max_steps=1)
    assert trainer.doors.rollout.resolved_correction.mode != "off"
    trainer.train()
    log = log_of(trainer)
    assert 0.3 < log[0]["qat/low_share"] <= 0.5
    assert log[0]["correction/max_abs_diff"] > 1e-3 and log[0]["correction/unknown"] == 0.0
    off = make(tmp_path / "off", {"low_share": 0.5}, rollout={"correction": {"mode": "off"}})
    assert off.doors.rollout.resolved_correction.mode == "off"


def test_a_continued_run_is_the_whole_run(tmp_path: Path) -> None:
    section = {"entropy": 0.5, "distribution": 1.0}
    whole = make(tmp_path / "whole", section, max_steps=4, save_strategy="steps", save_steps=2)
    whole.train()
    folder = tmp_path / "whole" / "checkpoint-2"
    assert json.loads((folder / QUANTIZERS).read_text())["converted"] is False
    rest = make(tmp_path / "rest", section, max_steps=4)
    rest.train(resume_from_checkpoint=str(folder))
    expected, found = parameters(whole), parameters(rest)
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[name], value) for name, value in found.items())


def test_another_run_goes_on_with_the_steps_of_a_checkpoint(tmp_path: Path) -> None:
    section = {"distribution": 1.0}
    first = make(tmp_path / "first", section, max_steps=1, save_strategy="steps", save_steps=1)
    first.train()
    path = tmp_path / "first" / "checkpoint-1"
    loaded = load_model(ModelConfig(path=str(path)))
    latent = start_copy(loaded)
    second = make(tmp_path / "second", section, model=loaded, max_steps=1)
    assert all(torch.equal(value, parameters(second)[name]) for name, value in parameters(first).items())
    assert second._qat is not None and not is_prepared(second._qat.teacher) and not qat_state(second.model).high_only
    assert torch.equal(logits_of(second._qat.teacher), logits_of(latent))
    second.train()
    with pytest.raises(ConfigError, match="other quantisers"):
        make(tmp_path / "third", {"weight_bits": 8}, model=load_model(ModelConfig(path=str(path))))
    with pytest.raises(ConfigError, match="would train by accident"):
        make(tmp_path / "fourth", None, model=load_model(ModelConfig(path=str(path))))


def test_the_reference_is_the_plain_start_and_serves_as_teacher(tmp_path: Path) -> None:
    start = build()
    start.save_pretrained(tmp_path / "start")
    build_tokenizer().save_pretrained(tmp_path / "start")
    model = load_model(ModelConfig(path=str(tmp_path / "start")))
    trainer = make(tmp_path / "run", {"distribution": 1.0}, model=model, beta=0.1, max_steps=1)
    assert trainer._qat is not None and trainer.ref_model is not None
    assert trainer._qat.teacher is trainer.accelerator.unwrap_model(trainer.ref_model)
    trainer.train()
    assert torch.equal(logits_of(trainer._qat.teacher), logits_of(start.eval()))
    assert log_of(trainer)[0]["kl"] > 0, "the policy differs from its reference by the quantisers already"


def test_balanced_micro_batches_train_too(tmp_path: Path) -> None:
    trainer = make(tmp_path, {"entropy": 0.5, "distribution": 1.0}, max_steps=1, batching={"balance": True})
    trainer.train()
    assert log_of(trainer)[0]["qat/distribution_loss"] > 0


def _adapter() -> dict[str, Any]:
    from peft import LoraConfig

    return {"peft_config": LoraConfig(target_modules=["q_proj"], r=2)}


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "adapter": (_adapter(), "rollout.quant"),
    "own optimizer": ({"optimizers": (torch.optim.SGD([torch.zeros(1)], 0.1), None)}, "optimizers"),
    "continuous batching": ({"use_transformers_continuous_batching": True}, "continuous_batching"),
    "compiled": ({"torch_compile": True}, "torch_compile"),
    "moving reference": ({"sync_ref_model": True, "beta": 0.1}, "sync_ref_model"),
    "quantised sampler": ({"rollout": {"quant": {"bits": 8, "group_size": None}}}, "rollout.quant"),
    "cache policy": ({"rollout": {"kv": {"policy": "streaming_llm", "budget": 16}}}, "rollout.kv"),
    "pattern": ({"attention_pattern": {"type": "sink_lora", "above": 4}}, "model.attention_pattern"),
    "selection": ({"selection": {"type": "d3s"}}, "selection.type"),
    "packed rows": ({"batching": {"balance": True, "pack": True}}, "batching.pack"),
    "attention credit": (
        {"credit": {"type": "preplan_anchor", "window": 2, "horizon_min": 1, "horizon_max": 4}},
        "credit.type",
    ),
    "reentrant": (
        {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}},
        "use_reentrant",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_would_pass_the_quantisers_by_is_refused(tmp_path: Path, case: str) -> None:
    changes, words = REFUSED[case]
    with pytest.raises(ConfigError) as caught:
        make(tmp_path, {"entropy": 0.5}, **changes)
    assert words in str(caught.value) and str(caught.value).startswith("quantization_aware")


def test_models_that_cannot_be_prepared_are_refused(tmp_path: Path) -> None:
    eager = build()
    eager.set_attn_implementation("eager")
    with pytest.raises(ConfigError, match="attn_implementation='eager'"):
        make(tmp_path, {}, model=eager)
    done = prepare_qat(build(), QATSpec())
    calibrate_qat(done, input_ids=IDS, attention_mask=MASK)
    with pytest.raises(ConfigError, match="is converted"):
        make(tmp_path, {}, model=convert(done))


def test_attention_credit_goes_with_quantised_weights_alone(tmp_path: Path) -> None:
    credit = {"type": "preplan_anchor", "window": 2, "horizon_min": 1, "horizon_max": 4}
    trainer = make(tmp_path, {"activation_bits": OFF}, credit=credit, max_steps=1)
    trainer.train()
    assert "attention/local_span" in log_of(trainer)[0]


def test_steps_do_not_decay(tmp_path: Path) -> None:
    trainer = make(tmp_path, {})
    names = trainer.get_decay_parameter_names(trainer.model)
    assert names and not [name for name in names if name.endswith(("alpha", "zp"))]


def test_the_recipe_trains_converts_and_evaluates_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from rltok.estimate import check_combination, estimate
    from rltok.run import RunDirectory, evaluate_path, train

    monkeypatch.chdir(tmp_path)
    overrides = [
        "output_dir=out",
        "data.train_size=64",
        "data.heldout_size=8",
        "training.max_steps=1",
        "training.per_device_train_batch_size=8",
        "training.steps_per_generation=2",
        "training.num_generations=4",
        "training.max_completion_length=16",
    ]
    recipe = load_recipe("edge_qat", overrides)
    lines = estimate(recipe, check_combination(recipe))
    assert any("teacher" in line for line in lines)
    assert any(line.startswith("quantization-aware: W4 A8; losses: entropy 0.5, distribution 1") for line in lines)
    with pytest.raises(ConfigError, match="adapter"):
        check_combination(load_recipe("edge_qat", ["model.lora={r: 4}"]))
    with pytest.raises(ConfigError, match="sdpa"):
        check_combination(load_recipe("edge_qat", ["model.attn_implementation=eager"]))
    assert train(recipe, Console(quiet=True)) == 0
    run = RunDirectory(Path("out"))
    summary = json.loads(run.summary.read_text())
    assert summary["checkpoint"] == "out/model"
    after = json.loads(run.evaluation("after").read_text())["means"]
    final = dataclasses.replace(recipe, model=ModelConfig(path="out/model"))
    assert evaluate_path(final, Console(quiet=True)).means == after
    weight = load_model(final.model).get_submodule("model.layers.0.mlp.down_proj").weight
    assert len(weight.unique()) <= 16
    latent = load_model(ModelConfig(path="out/checkpoint-1")).get_submodule("model.layers.0.mlp.down_proj").weight
    assert len(latent.unique()) > 1000


@pytest.mark.slow
def test_two_processes_train_as_one(tmp_path: Path) -> None:
    for ranks in (1, 2):
        run_on_ranks("quantization_aware_worker.py", ranks, tmp_path)
    one, two = (torch.load(tmp_path / f"ranks{ranks}.pt") for ranks in (1, 2))
    for name in ("qat/entropy_loss", "qat/distribution_loss", "qat/distillation_loss"):
        assert two["log"][0][name] == pytest.approx(one["log"][0][name], rel=1e-3)
    for (
        name,
        value,
    ) in build().named_parameters():  # noise of the order of sums flips a code here and there
        moved, apart = one["parameters"][name] - value, two["parameters"][name] - one["parameters"][name]
        assert apart.norm() < 0.02 * moved.norm(), name
