"""The policy: where its weights and tokenizer come from, adapters, and how large it is."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from rltok.config import ConfigError

if TYPE_CHECKING:
    from peft import LoraConfig
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

TINY = "tiny-reasoner"
"""Name of the embedded model."""


@dataclass(frozen=True)
class LoraSettings:
    """A low-rank adapter that is trained instead of the full weights (peft's LoRA)."""

    r: int = 16
    """rank"""
    alpha: float = 32
    """scale; the update counts alpha / r"""
    dropout: float = 0.0
    """dropout on the adapter's input"""
    target_modules: list[str] | str = "all-linear"
    """names of the adapted modules"""
    modules_to_save: list[str] | None = None
    """modules that are trained in full beside the adapter"""
    use_dora: bool = False
    """weight-decomposed adapter"""
    use_rslora: bool = False
    """the update counts alpha / sqrt(r)"""
    bias: Literal["none", "all", "lora_only"] = "none"
    """which biases are trained"""

    def __post_init__(self) -> None:
        if self.r < 1:
            raise ConfigError(f"model.lora.r: {self.r} must be >= 1", "model.lora.r")


@dataclass(frozen=True)
class ModelConfig:
    """Which policy is trained, and how it is loaded."""

    path: str
    """`tiny-reasoner` (embedded), a local directory, or a hub id"""
    revision: str | None = None
    """branch, tag or commit on the hub"""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "float32"
    """of the weights; training.bf16 computes in bfloat16 over float32 weights"""
    attn_implementation: str | None = None
    """eager, sdpa, flash_attention_2 or a kernel of the hub; None lets transformers choose"""
    trust_remote_code: bool = False
    """run model code from the hub"""
    lora: LoraSettings | None = None
    """train an adapter; None trains all weights"""
    config_overrides: dict[str, Any] = field(default_factory=dict)
    """fields of the model's own configuration to change, such as rope_parameters"""


def resolve_path(path: str) -> str:
    """`path`, or the directory of the embedded model for its name."""
    if path != TINY:
        return path
    from rltok.tiny import tiny_reasoner_path

    return str(tiny_reasoner_path())


def is_adapter(path: str) -> bool:
    """Whether a directory holds a LoRA adapter instead of whole weights."""
    return (Path(path) / "adapter_config.json").is_file()


def load_tokenizer(config: ModelConfig) -> PreTrainedTokenizerBase:
    """Tokenizer of the policy, padding on the left; the end-of-sequence token pads where there is no other.

    Raises:
        ConfigError: there is no tokenizer at `model.path`.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(
            resolve_path(config.path), revision=config.revision, trust_remote_code=config.trust_remote_code
        )
    except (OSError, ValueError) as error:
        raise _not_found(config, error) from error
    tokenizer.padding_side = "left"
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_model_config(config: ModelConfig) -> PretrainedConfig:
    """The model's own configuration (a small file), with `model.config_overrides` applied."""
    from transformers import AutoConfig

    try:
        found = AutoConfig.from_pretrained(
            resolve_path(config.path), revision=config.revision, trust_remote_code=config.trust_remote_code
        )
    except (OSError, ValueError) as error:
        raise _not_found(config, error) from error
    for key, value in config.config_overrides.items():
        if not hasattr(found, key):
            where = f"model.config_overrides.{key}"
            raise ConfigError(f"{where}: {type(found).__name__} has no field {key!r}", where)
        setattr(found, key, value)
    return found


def load_model(config: ModelConfig) -> PreTrainedModel:
    """The policy with its weights, on the CPU and in training mode's dtype; without the adapter.

    A directory that holds a LoRA adapter is loaded with the adapter merged into the weights.
    """
    from transformers import AutoModelForCausalLM

    path = resolve_path(config.path)
    options: dict[str, Any] = {"dtype": config.dtype}
    if config.attn_implementation is not None:
        options["attn_implementation"] = config.attn_implementation
    if is_adapter(path):
        from peft import AutoPeftModelForCausalLM

        return AutoPeftModelForCausalLM.from_pretrained(path, **options).merge_and_unload()
    try:
        return AutoModelForCausalLM.from_pretrained(
            path,
            config=load_model_config(config),
            revision=config.revision,
            trust_remote_code=config.trust_remote_code,
            **options,
        )
    except OSError as error:
        raise _not_found(config, error) from error


def peft_config(lora: LoraSettings | None) -> LoraConfig | None:
    """peft's configuration of the adapter, None for full training."""
    if lora is None:
        return None
    from peft import LoraConfig

    return LoraConfig(
        task_type="CAUSAL_LM",
        r=lora.r,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=lora.target_modules,
        modules_to_save=lora.modules_to_save,
        use_dora=lora.use_dora,
        use_rslora=lora.use_rslora,
        bias=lora.bias,
    )


@dataclass(frozen=True)
class Size:
    """How large a policy is, counted without loading its weights."""

    parameters: int
    """all of them"""
    trainable: int
    """those that the optimizer moves"""
    kv_bytes_per_token: int
    """key-value cache of one token in the compute dtype"""


def measure(config: ModelConfig, kv_bytes: int = 4) -> Size:
    """Parameter counts from the model's configuration alone (no weights are read or allocated)."""
    import torch
    from transformers import AutoModelForCausalLM

    found = load_model_config(config)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(found, trust_remote_code=config.trust_remote_code)
        model.tie_weights()
        total = sum(p.numel() for p in model.parameters())
        trainable = total
        adapter = peft_config(config.lora)
        if adapter is not None:
            from peft import get_peft_model

            wrapped = get_peft_model(model, adapter)
            trainable = sum(p.numel() for p in wrapped.parameters() if p.requires_grad)
            total += trainable
    text = found.get_text_config()
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    return Size(total, trainable, 2 * text.num_hidden_layers * heads * head_dim * kv_bytes)


def _not_found(config: ModelConfig, error: Exception) -> ConfigError:
    reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    return ConfigError(
        f"model.path: {config.path!r} cannot be loaded ({reason}); give {TINY!r}, a directory or a hub id", "model.path"
    )
