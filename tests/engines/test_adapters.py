"""LoRA and DoRA: signals and credit are those of the policy with its adapter, the reference is the model without it."""

from __future__ import annotations

import pytest
import torch
from peft import PeftModel, get_peft_model
from tests_support import build_tokenizer
from worker import MatrixTrainer, adapted_model, adapter, build, matrix_model, settings

from rltok.attention import AttentionConfig, attention_signals
from rltok.trainers.checkpoint import latest_checkpoint
from rltok.trainers.door_trainer import sequence

KINDS = ("LoRA", "DoRA")


class Watching(MatrixTrainer):
    """Keeps what scoring and credit saw of the first rollout."""

    def _token_batch(self, output, *args, **kwargs):
        batch = super()._token_batch(output, *args, **kwargs)
        if not hasattr(self, "seen"):
            self.seen = (dict(output), batch)
        return batch


def merged(model: PeftModel) -> torch.nn.Module:
    """The same policy as whole weights."""
    plain = matrix_model(build_tokenizer())
    copy = get_peft_model(plain, model.peft_config["default"])
    copy.load_state_dict({k: v for k, v in model.state_dict().items() if ".ref." not in k})
    return copy.merge_and_unload().eval()


def scores(model: torch.nn.Module, output: dict) -> tuple[torch.Tensor, torch.Tensor]:
    """(B, T) log-probabilities and entropies of a plain forward pass."""
    ids, mask, width = sequence(output)
    with torch.no_grad():
        logps = model(input_ids=ids, attention_mask=mask).logits[:, -width - 1 : -1].log_softmax(-1)
    return logps.gather(-1, ids[:, -width:, None]).squeeze(-1), -(logps.exp() * logps).sum(-1)


def trained(tmp_path, method, model, **changes):
    trainer = build(tmp_path, method, settings(tmp_path, method, 1, **changes), model, Watching)
    start = {name: value.detach().clone() for name, value in trainer.model.named_parameters()}
    policy = merged(trainer.model)
    trainer.train()
    return trainer, start, policy


@pytest.mark.parametrize("kind", KINDS)
def test_entropy_and_log_probabilities_are_those_of_the_adapted_policy(tmp_path, kind):
    trainer, _, policy = trained(tmp_path, "credit: entropy_shaping", adapted_model(kind), max_steps=1)
    output, batch = trainer.seen
    logps, entropy = scores(policy, output)
    bare = scores(matrix_model(build_tokenizer()).eval(), output)
    counted = batch.mask.bool()
    torch.testing.assert_close(batch.entropy[counted], entropy[counted], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(output["old_per_token_logps"][counted], logps[counted], atol=1e-5, rtol=1e-5)
    assert (bare[1] - entropy)[counted].abs().max() > 0.05, "the adapter changes the entropy"


@pytest.mark.parametrize("kind", KINDS)
def test_attention_signals_are_those_of_the_adapted_policy(tmp_path, kind):
    trainer, _, policy = trained(tmp_path, "credit: preplan_anchor", adapted_model(kind), max_steps=1)
    output, batch = trainer.seen
    config = trainer.doors.attention
    assert isinstance(config, AttentionConfig)
    ids, mask, _ = sequence(output)
    right = attention_signals(policy, ids, mask, output["completion_mask"], config)
    bare = attention_signals(matrix_model(build_tokenizer()).eval(), ids, mask, output["completion_mask"], config)
    for name in ("waad", "fai", "span"):
        torch.testing.assert_close(getattr(batch.attention, name), getattr(right, name), atol=1e-4, rtol=1e-4)
        assert (getattr(bare, name) - getattr(right, name)).abs().max() > 1e-3, name


@pytest.mark.parametrize("kind", KINDS)
def test_a_new_adapters_reference_is_the_model_without_it(tmp_path, kind):
    """`model.lora` in a recipe: the trainer makes the adapter, whose reference is the model below."""
    args = settings(tmp_path, "credit: group", 1, max_steps=4, beta=0.1)
    trainer = build(tmp_path, "credit: group", args, cls=Watching, peft_config=adapter(kind))
    assert "ref" not in trainer.model.peft_config
    trainer.train()
    output, batch = trainer.seen
    counted = batch.mask.bool()
    bare, _ = scores(matrix_model(build_tokenizer()).eval(), output)
    torch.testing.assert_close(output["ref_per_token_logps"][counted], bare[counted], atol=1e-5, rtol=1e-5)
    assert (output["old_per_token_logps"] - bare)[counted].abs().max() > 0.05


@pytest.mark.parametrize("kind", KINDS)
def test_a_continued_adapters_reference_is_the_adapter_as_it_was(tmp_path, kind):
    """`model.adapter: continue`: training starts from an adapter, and so does the reference."""
    trainer, start, policy = trained(tmp_path, "credit: group", adapted_model(kind), max_steps=4, beta=0.1)
    output, batch = trainer.seen
    counted = batch.mask.bool()
    logps, _ = scores(policy, output)
    torch.testing.assert_close(output["ref_per_token_logps"][counted], logps[counted], atol=1e-5, rtol=1e-5)
    after = dict(trainer.model.named_parameters())
    moved = {name for name, value in start.items() if not torch.equal(after[name], value)}
    assert moved and all("lora_" in name and ".default." in name for name in moved), moved


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", ["credit: entropy_shaping", "selection: d3s"])
def test_a_resumed_adapter_ends_where_an_undisturbed_one_does(tmp_path, kind, method):
    changes = {"optim": "adamw_torch", "learning_rate": 1e-2, "beta": 0.1}
    whole, _, _ = trained(tmp_path / "a", method, adapted_model(kind), max_steps=4, **changes)
    saving = {"save_strategy": "steps", "save_steps": 2}
    place = {"output_dir": str(tmp_path / "b")}
    trained(tmp_path / "b", method, adapted_model(kind), max_steps=2, **saving, **place, **changes)
    found = latest_checkpoint(tmp_path / "b")
    assert found is not None and found.name == "checkpoint-2" and (found / "adapter_model.safetensors").is_file()
    again = build(tmp_path, method, settings(tmp_path, method, 1, max_steps=4, **place, **changes), adapted_model(kind))
    again.train(resume_from_checkpoint=str(found))
    for (name, value), other in zip(whole.model.named_parameters(), again.model.parameters(), strict=True):
        assert torch.equal(value, other), name


def test_modules_that_are_trained_in_full_beside_an_adapter(tmp_path):
    """`modules_to_save`: the head of the adapted policy is the trained copy, that of the reference the original."""
    config = adapter("LoRA", modules_to_save=["lm_head"])
    args = settings(tmp_path, "selection: d3s", 1, max_steps=4, beta=0.1)
    trainer = build(tmp_path, "selection: d3s", args, cls=Watching, peft_config=config)
    trainer.train()
    output, batch = trainer.seen
    bare, _ = scores(matrix_model(build_tokenizer()).eval(), output)
    counted = batch.mask.bool()
    torch.testing.assert_close(output["ref_per_token_logps"][counted], bare[counted], atol=1e-5, rtol=1e-5)
    state = {name: value for name, value in trainer.model.named_parameters() if "lm_head" in name}
    (copy,) = (value for name, value in state.items() if "modules_to_save" in name)
    (original,) = (value for name, value in state.items() if "original_module" in name)
    assert not torch.equal(copy, original) and not original.requires_grad
