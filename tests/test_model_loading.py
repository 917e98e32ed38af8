"""Adapters of every kind, quantised weights, and tokenizers that lack something."""

from __future__ import annotations

import dataclasses
import importlib.util
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tests_support import build_model, build_tokenizer, digit_dataset, even_reward, run_settings
from transformers import BitsAndBytesConfig
from typer.testing import CliRunner

from rltok.cli import app
from rltok.config import ConfigError
from rltok.models import (
    LoraSettings,
    ModelConfig,
    QuantizationSettings,
    check_trainable,
    load_model,
    load_model_config,
    load_tokenizer,
    peft_config,
    quantization_config,
)
from rltok.recipe import load_recipe
from rltok.trainers import CreditConfig, CreditTrainer

ADAPTER = "adapter_model.safetensors"
needs_bitsandbytes = pytest.mark.skipif(
    importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed: pip install 'rltok[qlora]'"
)


@pytest.fixture
def policy(tmp_path: Path) -> Path:
    tokenizer = build_tokenizer()
    sizes = {"hidden_size": 64, "intermediate_size": 64, "head_dim": 16}  # bitsandbytes wants multiples of 32
    build_model(tokenizer, **sizes).save_pretrained(tmp_path / "policy")
    tokenizer.save_pretrained(tmp_path / "policy")
    return tmp_path / "policy"


SHORT = {"max_steps": 2, "gradient_accumulation_steps": 1, "steps_per_generation": 2}


def train(config: ModelConfig, folder: Path, tokenizer=None, **changes) -> CreditTrainer:
    """Two updates of a recipe's model section."""
    tokenizer = tokenizer or load_tokenizer(config)
    settings = run_settings(folder, **SHORT, save_strategy="steps", save_steps=1, **changes)
    trainer = CreditTrainer(
        load_model(config),
        even_reward,
        CreditConfig(**settings),
        train_dataset=digit_dataset(),
        processing_class=tokenizer,
        peft_config=peft_config(config.lora),
    )
    trainer.train()
    assert all(math.isfinite(line["loss"]) for line in trainer.state.log_history if "loss" in line)
    return trainer


def settings_of(**changes) -> LoraSettings:
    return LoraSettings(**({"r": 4, "alpha": 8, "target_modules": ["q_proj", "v_proj"]} | changes))


# Adapters


@pytest.mark.parametrize("changes", [{"target_modules": "all-linear"}, {"use_dora": True}, {"use_rslora": True}])
def test_an_adapter_is_trained_and_nothing_else(policy: Path, tmp_path: Path, changes: dict) -> None:
    before = load_file(policy / "model.safetensors")
    trainer = train(ModelConfig(str(policy), lora=settings_of(**changes)), tmp_path / "run", beta=0.1)
    parameters = dict(trainer.model.named_parameters())
    for name, value in parameters.items():
        if value.requires_grad:
            assert "lora_" in name
        else:
            plain = name.removeprefix("base_model.model.").replace(".base_layer", "")
            assert torch.equal(value, before[plain]), name
    assert all(value.abs().max() > 0 for name, value in parameters.items() if "lora_B" in name)
    layer = trainer.model.base_model.model.model.layers[0].self_attn.q_proj
    assert layer.scaling["default"] == pytest.approx(8 / (2 if changes.get("use_rslora") else 4))
    magnitudes = [name for name in parameters if "lora_magnitude_vector" in name]
    assert bool(magnitudes) is bool(changes.get("use_dora"))
    for name in magnitudes:
        weight = before[name.split("base_model.model.")[1].split(".lora_")[0] + ".weight"]
        assert not torch.equal(parameters[name].squeeze(), weight.norm(dim=1))


@pytest.mark.parametrize("use_dora", [False, True])
def test_signals_are_those_of_the_adapter_and_references_of_what_is_below(
    policy: Path, tmp_path: Path, use_dora: bool
) -> None:
    config = ModelConfig(str(policy), lora=settings_of(use_dora=use_dora))
    tokenizer = load_tokenizer(config)
    trainer = CreditTrainer(
        load_model(config),
        even_reward,
        CreditConfig(**run_settings(tmp_path / "run", beta=0.1, credit={"type": "entropy_shaping"})),
        train_dataset=digit_dataset(),
        processing_class=tokenizer,
        peft_config=peft_config(config.lora),
    )
    torch.manual_seed(1)
    with torch.no_grad():
        for name, value in trainer.model.named_parameters():
            if "lora_B" in name:
                value.normal_(std=2.0)
    seen: list = []
    trainer.doors = dataclasses.replace(trainer.doors, credit=Spy(trainer.doors.credit, seen))
    output = trainer._generate_and_score_completions([digit_dataset()[0]] * 4)
    ids = torch.cat([output["prompt_ids"], output["completion_ids"]], 1)
    mask = torch.cat([output["prompt_mask"], output["completion_mask"]], 1)
    positions, kept = (mask.cumsum(1) - 1).clamp(min=0), output["completion_mask"].bool()
    width = output["completion_ids"].size(1)

    def reference(model) -> tuple[torch.Tensor, torch.Tensor]:
        with torch.no_grad():
            logits = model(ids, attention_mask=mask, position_ids=positions).logits[:, -width - 1 : -1]
        logps = logits.log_softmax(-1)
        return logps.gather(2, output["completion_ids"][..., None])[..., 0], -(logps.exp() * logps).sum(-1)

    _, entropy = reference(trainer.model)
    with trainer.model.disable_adapter():
        below, plain_entropy = reference(trainer.model)
    (batch,) = seen
    torch.testing.assert_close(batch.entropy[kept], entropy[kept], rtol=1e-4, atol=1e-4)
    assert (entropy - plain_entropy)[kept].abs().max() > 2e-3  # twenty times the tolerance
    torch.testing.assert_close(output["ref_per_token_logps"][kept], below[kept], rtol=1e-4, atol=1e-4)


class Spy:
    """A credit method that keeps what it was given."""

    def __init__(self, method, seen: list) -> None:
        self.method, self.seen = method, seen

    def __getattr__(self, name: str):
        return getattr(self.method, name)

    def __call__(self, batch):
        self.seen.append(batch)
        return self.method(batch)


@pytest.fixture
def adapter(policy: Path, tmp_path: Path) -> Path:
    """The checkpoint of a LoRA run."""
    train(ModelConfig(str(policy), lora=settings_of()), tmp_path / "first", learning_rate=5e-2)
    return tmp_path / "first" / "checkpoint-2"


def logits_of(model) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(torch.arange(3, 11)[None]).logits


def test_an_adapter_is_merged_or_continued(policy: Path, adapter: Path, tmp_path: Path) -> None:
    merged = load_model(ModelConfig(str(adapter)))
    apart = load_model(ModelConfig(str(adapter), adapter="continue"))
    torch.testing.assert_close(logits_of(merged), logits_of(apart), rtol=1e-4, atol=1e-5)
    assert (logits_of(merged) - logits_of(load_model(ModelConfig(str(policy))))).abs().max() > 1e-3
    assert all(value.requires_grad for value in merged.parameters())
    trainable = [name for name, value in apart.named_parameters() if value.requires_grad]
    assert trainable and all("lora_" in name for name in trainable)
    saved = load_file(adapter / ADAPTER)
    for name, value in apart.named_parameters():
        if "lora_" in name:
            assert torch.equal(value, saved[name.replace(".default", "")])


@pytest.mark.parametrize("beta", [0.0, 0.1])
def test_the_same_adapter_is_trained_on(adapter: Path, tmp_path: Path, beta: float) -> None:
    """With beta > 0 the reference is the adapter as it was at the start of this run."""
    config = ModelConfig(str(adapter), adapter="continue")
    trainer = train(config, tmp_path / "second", beta=beta)
    before = load_file(adapter / ADAPTER)
    after = load_file(tmp_path / "second" / "checkpoint-2" / ADAPTER)
    assert before.keys() == after.keys()
    assert all(not torch.equal(before[name], after[name]) for name in before)
    for name, value in trainer.model.named_parameters():
        if ".ref." in name:
            assert beta > 0 and torch.equal(value, before[name.replace(".ref", "")])
    if beta:
        kls = [line["kl"] for line in trainer.state.log_history if "kl" in line]
        assert kls[0] == pytest.approx(0.0, abs=1e-6) and kls[-1] > 0
    again = load_model(ModelConfig(str(tmp_path / "second" / "checkpoint-2")))
    torch.testing.assert_close(logits_of(again), logits_of(trainer.model), rtol=1e-4, atol=1e-5)


def test_a_run_on_the_same_adapter_resumes_exactly(adapter: Path, tmp_path: Path) -> None:
    config = ModelConfig(str(adapter), adapter="continue")
    whole = train(config, tmp_path / "whole", beta=0.1)
    tokenizer = load_tokenizer(config)
    settings = run_settings(tmp_path / "resumed", **SHORT, beta=0.1)
    resumed = CreditTrainer(
        load_model(config),
        even_reward,
        CreditConfig(**settings),
        train_dataset=digit_dataset(),
        processing_class=tokenizer,
    )
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-1"))
    for (name, a), b in zip(whole.model.named_parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(a, b), name


def test_the_configuration_of_an_adapter_is_that_of_the_weights_below_it(policy: Path, adapter: Path) -> None:
    below = load_model_config(ModelConfig(str(policy)))
    found = load_model_config(ModelConfig(str(adapter), config_overrides={"max_position_embeddings": 77}))
    assert found.max_position_embeddings == 77
    found.max_position_embeddings = below.max_position_embeddings
    assert found.to_dict() == below.to_dict()


@pytest.mark.parametrize("way", ["merge", "continue"])
def test_a_recipe_trains_from_the_directory_of_an_adapter(tmp_path: Path, way: str) -> None:
    common = ["training.max_steps=1", "evaluation.before=false", "evaluation.after=false", "report.progress=off"]
    runs = {"first": ["model.lora={r: 4}"]}
    runs["second"] = [f"model.path={tmp_path / 'first' / 'checkpoint-1'}", f"model.adapter={way}"]
    for name, changes in runs.items():
        result = CliRunner().invoke(app, ["train", "smoke", f"output_dir={tmp_path / name}", *common, *changes])
        assert result.exit_code == 0, result.output
    assert (tmp_path / "second" / "checkpoint-1" / ADAPTER).is_file() == (way == "continue")


def test_settings_of_the_model_reach_what_lies_below_an_adapter(adapter: Path) -> None:
    model = load_model(ModelConfig(str(adapter), dtype="bfloat16", attn_implementation="eager"))
    assert model.dtype == torch.bfloat16 and model.config._attn_implementation == "eager"
    with pytest.raises(ConfigError, match=r"model\.config_overrides\.nothing"):
        load_model(ModelConfig(str(adapter), config_overrides={"nothing": 1}))


def test_adapters_that_cannot_be_continued(policy: Path, adapter: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"model\.adapter: 'continue' .*remove model\.lora"):
        ModelConfig(str(adapter), adapter="continue", lora=settings_of())
    with pytest.raises(ConfigError, match=r"model\.adapter: 'continue' needs an adapter at model\.path"):
        load_model(ModelConfig(str(policy), adapter="continue"))
    text = (adapter / "adapter_config.json").read_text()
    (adapter / "adapter_config.json").write_text(text.replace(f'"{policy}"', "null"))
    with pytest.raises(ConfigError, match="does not say which model"):
        load_model(ModelConfig(str(adapter)))
    (adapter / "adapter_config.json").write_text(text.replace(f'"{policy}"', f'"{adapter}"'))
    with pytest.raises(ConfigError, match="is an adapter itself"):
        load_model(ModelConfig(str(adapter)))


# Quantised weights


def test_the_configuration_of_quantised_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rltok.models.importlib.util.find_spec", lambda name: object())
    found = quantization_config(QuantizationSettings())
    assert isinstance(found, BitsAndBytesConfig)
    assert (found.load_in_4bit, found.load_in_8bit) == (True, False)
    assert (found.bnb_4bit_quant_type, found.bnb_4bit_use_double_quant) == ("nf4", True)
    assert (found.bnb_4bit_compute_dtype, found.bnb_4bit_quant_storage) == (torch.bfloat16, torch.uint8)
    other = quantization_config(
        QuantizationSettings(type="fp4", double=False, compute_dtype="float16", storage_dtype="bfloat16")
    )
    assert (other.bnb_4bit_quant_type, other.bnb_4bit_use_double_quant) == ("fp4", False)
    assert (other.bnb_4bit_compute_dtype, other.bnb_4bit_quant_storage) == (torch.float16, torch.bfloat16)
    assert quantization_config(QuantizationSettings(bits=8)).load_in_8bit


def test_quantised_weights_without_the_library_or_an_adapter(
    policy: Path, adapter: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ConfigError, match=r"model\.quantization: .*cannot be trained.*model\.lora"):
        ModelConfig(str(policy), quantization=QuantizationSettings())
    both = ModelConfig(str(adapter), lora=settings_of(), quantization=QuantizationSettings())
    with pytest.raises(ConfigError, match=r"model\.quantization: .*model\.adapter=continue"):
        check_trainable(both)
    check_trainable(ModelConfig(str(policy), lora=settings_of(), quantization=QuantizationSettings()))
    monkeypatch.setattr("rltok.models.importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install 'rltok\[qlora\]'"):
        load_model(ModelConfig(str(policy), lora=settings_of(), quantization=QuantizationSettings()))


def test_the_shipped_recipe_of_quantised_weights() -> None:
    recipe = load_recipe("gsm8k_qwen2.5_7b_qlora")
    assert recipe.model.quantization == QuantizationSettings(bits=4, type="nf4", double=True)
    assert recipe.model.lora is not None and recipe.model.dtype == "bfloat16"
    again = load_recipe("gsm8k_qwen2.5_7b_qlora", ["model.quantization.compute_dtype=float16"])
    assert again.model.quantization.compute_dtype == "float16"
    with pytest.raises(ConfigError, match=r"model\.quantization\.bits"):
        load_recipe("gsm8k_qwen2.5_7b_qlora", ["model.quantization.bits=3"])


def check_quantised_training(policy: Path, tmp_path: Path, **changes) -> None:
    quantised = QuantizationSettings(**changes)
    config = ModelConfig(str(policy), lora=settings_of(target_modules="all-linear"), quantization=quantised)
    trainer = train(config, tmp_path / "run")
    kinds = {type(m).__name__ for m in trainer.model.modules() if type(m).__module__.startswith("bitsandbytes")}
    assert kinds == {"Linear4bit" if quantised.bits == 4 else "Linear8bitLt"}
    moved = [value for name, value in trainer.model.named_parameters() if "lora_B" in name]
    assert moved and all(value.abs().max() > 0 for value in moved)
    assert not any(value.requires_grad for name, value in trainer.model.named_parameters() if "lora_" not in name)
    checkpoint = tmp_path / "run" / "checkpoint-2"
    assert not (checkpoint / "model.safetensors").exists()
    apart = ModelConfig(str(checkpoint), adapter="continue", quantization=quantised)
    torch.testing.assert_close(logits_of(load_model(apart)), logits_of(trainer.model), rtol=5e-2, atol=5e-2)
    # what `rltok eval CHECKPOINT` does with the run's recipe
    evaluated = load_model(ModelConfig(str(checkpoint), lora=config.lora, quantization=quantised))
    torch.testing.assert_close(logits_of(evaluated), logits_of(trainer.model), rtol=5e-2, atol=5e-2)


@needs_bitsandbytes
def test_an_adapter_over_quantised_weights_is_trained(policy: Path, tmp_path: Path) -> None:
    check_quantised_training(policy, tmp_path)


@needs_bitsandbytes
@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("changes", [{"bits": 8}, {"type": "fp4", "double": False}])
def test_an_adapter_over_quantised_weights_is_trained_on_a_gpu(policy: Path, tmp_path: Path, changes: dict) -> None:
    check_quantised_training(policy, tmp_path, **changes)


# Tokenizers


def test_the_end_that_pads_is_still_an_end(policy: Path, tmp_path: Path) -> None:
    """A tokenizer without pad token trains exactly as with one: the real end of a completion counts."""
    runs = []
    for name in ("with", "without"):
        tokenizer = build_tokenizer()
        if name == "without":
            tokenizer.pad_token = None
        tokenizer.save_pretrained(tmp_path / name)
        loaded = load_tokenizer(ModelConfig(str(tmp_path / name)))
        assert (loaded.pad_token == loaded.eos_token) is (name == "without")
        trainer = train(
            ModelConfig(str(policy)),
            tmp_path / f"run-{name}",
            tokenizer=loaded,
            max_completion_length=24,
            temperature=2.0,
        )
        runs.append(trainer)
    logs = [[line for line in trainer.state.log_history if "loss" in line] for trainer in runs]
    assert logs[0][0]["completions/clipped_ratio"] < 1, "some completion must end by itself"
    for name in ("loss", "grad_norm", "completions/mean_length", "reward", "trained_tokens"):
        assert [line.get(name) for line in logs[0]] == [line.get(name) for line in logs[1]], name
    for (name, a), b in zip(runs[0].model.named_parameters(), runs[1].model.parameters(), strict=True):
        assert torch.equal(a, b), name


def test_a_tokenizer_that_cannot_pad_is_refused(tmp_path: Path) -> None:
    tokenizer = build_tokenizer()
    tokenizer.pad_token = tokenizer.eos_token = None
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=r"model\.path: .*neither pad_token nor eos_token"):
        load_tokenizer(ModelConfig(str(tmp_path)))
