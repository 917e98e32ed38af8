"""The policy: where its weights and tokenizer come from, adapters, quantised weights, and how large it is.

Weights are read from safetensors alone, and no code of a model folder runs unless `model.trust_remote_code` is true.
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from rltok.config import ConfigError, build_typed

if TYPE_CHECKING:
    from peft import LoraConfig
    from transformers import BitsAndBytesConfig, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

TINY = "tiny-reasoner"
"""Name of the embedded model."""
QUANTIZERS = "quantization_aware.json"
"""File beside the weights of a model with fake quantisers."""
QUANTIZER_MARKS = ("fake_quant.", "fake_quantizer.")
"""What the names of their tensors contain."""
PICKLED_WEIGHTS = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")
"""Patterns of weight files whose reading can run code."""


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
class QuantizationSettings:
    """Frozen weights of the linear layers in few bits, below an adapter that is trained (bitsandbytes).

    Source: QLoRA, arXiv 2305.14314. Everything else (norms, embeddings, head) is kept in float32.
    """

    bits: Literal[4, 8] = 4
    """of a quantised weight"""
    type: Literal["nf4", "fp4"] = "nf4"
    """the sixteen values of 4 bits: of a normal distribution, or of a float"""
    double: bool = True
    """quantise the scales of 4 bits as well; saves about 0.4 bit per weight"""
    compute_dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"
    """in which 4-bit layers multiply"""
    storage_dtype: Literal["uint8", "bfloat16", "float16", "float32"] = "uint8"
    """in which 4-bit weights are packed; FSDP needs that of the other weights"""


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
    """eager, sdpa, flash_attention_2 or, with trust_remote_code, a kernel of the hub; None lets transformers choose"""
    trust_remote_code: bool = False
    """run code that comes with the model or its tokenizer"""
    lora: LoraSettings | None = None
    """train an adapter; None trains all weights"""
    adapter: Literal["merge", "continue"] = "merge"
    """where `path` is an adapter: merge it into the weights below it, or train on the same adapter"""
    quantization: QuantizationSettings | None = None
    """keep the weights below an adapter in 4 or 8 bits"""
    config_overrides: dict[str, Any] = field(default_factory=dict)
    """fields of the model's own configuration to change, such as rope_parameters"""
    attention_pattern: dict[str, Any] | None = None
    """which keys the learner sees in long rows, such as {type: sink_lora, groups: 4}; None: all, as the sampler does"""

    def __post_init__(self) -> None:
        trains_adapter = self.lora is not None or self.adapter == "continue"
        if self.adapter == "continue" and self.lora is not None:
            raise ConfigError(
                "model.adapter: 'continue' trains the adapter at model.path with its own settings; remove model.lora, "
                "or merge it and train a new one with model.adapter=merge",
                "model.adapter",
            )
        if self.quantization is not None and not trains_adapter:
            raise ConfigError(
                "model.quantization: weights in few bits cannot be trained; train an adapter with model.lora, such as "
                "{r: 16}, or go on with one by model.adapter=continue",
                "model.quantization",
            )
        if "/" in (self.attn_implementation or "") and not self.trust_remote_code:
            raise ConfigError(
                f"model.attn_implementation: {self.attn_implementation!r} is a kernel of the hub, which is code; take "
                "eager, sdpa or flash_attention_2, or set model.trust_remote_code=true",
                "model.attn_implementation",
            )
        if self.attention_pattern is not None:
            object.__setattr__(self, "attention_pattern", _filled_pattern(self.attention_pattern))
            if self.attn_implementation not in (None, "sdpa"):
                raise ConfigError(
                    f"model.attention_pattern: {self.attn_implementation!r} cannot run a pattern; set "
                    "model.attn_implementation=sdpa",
                    "model.attn_implementation",
                )


def _filled_pattern(section: Any) -> dict[str, Any]:
    """The section `model.attention_pattern`, checked and with the defaults filled in."""
    from rltok.attention.sink_lora import PATTERNS  # only here: it imports torch and transformers

    values = {key: value for key, value in section.items() if value is not None or key == "type"}
    return {"type": values.get("type"), **asdict(build_typed(PATTERNS, values, "model.attention_pattern"))}


def resolve_path(path: str) -> str:
    """`path`, or the directory of the embedded model for its name."""
    if path != TINY:
        return path
    from rltok.tiny import tiny_reasoner_path

    return str(tiny_reasoner_path())


def is_adapter(path: str) -> bool:
    """Whether a directory holds a LoRA adapter instead of whole weights."""
    return (Path(path) / "adapter_config.json").is_file()


def quantizers_folder(path: str, revision: str | None = None) -> Path | None:
    """Where `quantization_aware.json` lies; None where there is none or the hub could not be asked.

    Args:
        path: a directory, or the name of a model on the hub, whose snapshot is the folder.
    """
    if Path(path).is_dir():
        return Path(path) if (Path(path) / QUANTIZERS).is_file() else None
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, HFValidationError

    try:
        return Path(hf_hub_download(path, QUANTIZERS, revision=revision)).parent
    except (EntryNotFoundError, HFValidationError, HfHubHTTPError, OSError):  # loading finds steps without the file
        return None


def load_tokenizer(config: ModelConfig) -> PreTrainedTokenizerBase:
    """Tokenizer of the policy, padding on the left; the end-of-sequence token pads where there is no other.

    Raises:
        ConfigError: there is no tokenizer at `model.path`, it needs code of its own, or it has no end-of-sequence token
            to pad with.
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
        if tokenizer.eos_token is None:
            raise ConfigError(
                f"model.path: the tokenizer of {config.path!r} has neither pad_token nor eos_token, so nothing can pad "
                "prompts or end a completion; set eos_token in its tokenizer_config.json",
                "model.path",
            )
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_model_config(config: ModelConfig) -> PretrainedConfig:
    """The model's own configuration (a small file), with `model.config_overrides` applied; of an adapter's directory,
    that of the weights below it."""
    from transformers import AutoConfig

    path = resolve_path(config.path)
    if is_adapter(path):
        config = _weights_below(config, path)
    try:
        found = AutoConfig.from_pretrained(
            resolve_path(config.path), revision=config.revision, trust_remote_code=config.trust_remote_code
        )
    except (OSError, ValueError) as error:
        raise _not_found(config, error) from error
    _check_attention(config, found)
    for key, value in config.config_overrides.items():
        if not hasattr(found, key):
            where = f"model.config_overrides.{key}"
            raise ConfigError(f"{where}: {type(found).__name__} has no field {key!r}", where)
        setattr(found, key, value)
    return found


def load_model(config: ModelConfig) -> PreTrainedModel:
    """The policy with its weights, on the CPU and in training mode's dtype; without the adapter that `lora` adds.

    A directory that holds a LoRA adapter is loaded with the adapter merged into the weights below it, unless
    `adapter="continue"` or the weights are quantised: then the adapter stays apart (a merged one would be rounded).
    Quantised weights lie on the current CUDA device, if there is one.

    Raises:
        ConfigError: nothing there to load, weights only as pickle, code of its own without `trust_remote_code`, steps
            of fake quantisers without the file that describes them, or bitsandbytes is missing.
    """
    path = resolve_path(config.path)
    if is_adapter(path):
        return _load_adapter(config, path)
    if config.adapter == "continue":
        raise ConfigError(
            f"model.adapter: 'continue' needs an adapter at model.path, but {config.path!r} holds none "
            "(adapter_config.json); name a checkpoint of a LoRA run, or train a new adapter with model.lora",
            "model.adapter",
        )
    return _load_weights(config, path)


def _load_weights(config: ModelConfig, path: str) -> PreTrainedModel:
    """Whole weights of a directory or of the hub, quantised if asked."""
    from transformers import AutoModelForCausalLM

    refuse_pickled_weights(path)
    options: dict[str, Any] = {"dtype": config.dtype}
    if config.attn_implementation is not None:
        options["attn_implementation"] = config.attn_implementation
    if config.quantization is not None:
        options |= _quantized_options(config.quantization)
    quantizers = quantizers_folder(path, config.revision)
    if quantizers is not None and config.quantization is not None:
        raise ConfigError(
            f"model.quantization: the model at {config.path!r} has fake quantisers of its own ({QUANTIZERS}), which "
            "weights in few bits would replace; remove model.quantization",
            "model.quantization",
        )
    try:
        with _errors_only() if quantizers else nullcontext():  # transformers reports their steps as unexpected
            model, loaded = AutoModelForCausalLM.from_pretrained(
                path,
                config=load_model_config(config),
                revision=config.revision,
                trust_remote_code=config.trust_remote_code,
                use_safetensors=True,
                output_loading_info=True,
                **options,
            )
    except OSError as error:
        raise _not_found(config, error) from error
    if quantizers is None:
        _refuse_lost_quantizers(config, loaded["unexpected_keys"])
    if config.quantization is None:
        return model if quantizers is None else _with_quantizers(model, quantizers)
    from peft import prepare_model_for_kbit_training

    _keep_unpacked(model)
    # gradient checkpointing is the trainer's to switch on
    return prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)


def _keep_unpacked(model: Any) -> None:
    """Forward passes of 4-bit layers on a CPU must not pack the weights in place, which training could not undo."""
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False


@contextmanager
def _errors_only() -> Iterator[None]:
    """No warnings of transformers inside."""
    from transformers.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)


def _refuse_lost_quantizers(config: ModelConfig, unexpected: Iterable[str]) -> None:
    """Steps of fake quantisers without the file that says how: the model would compute without them, silently."""
    steps = sorted(name for name in unexpected if any(mark in name for mark in QUANTIZER_MARKS))
    if steps:
        raise ConfigError(
            f"model.path: the weights at {config.path!r} hold steps of fake quantisers ({steps[0]}), but {QUANTIZERS} "
            "is not beside them or could not be fetched; put it there, or load the model where the hub can be reached",
            "model.path",
        )


def _with_quantizers(model: Any, folder: Path) -> Any:
    """The model with the fake quantisers that `quantization_aware` saved beside its weights."""
    from rltok.quant.qat_files import restore_quantizers

    return restore_quantizers(model, folder)


def _load_adapter(config: ModelConfig, path: str) -> Any:
    """The adapter of a directory with the weights below it, merged or beside them."""
    from peft import PeftModel

    refuse_pickled_weights(path)
    below = _weights_below(config, path)
    model = _load_weights(below, resolve_path(below.path))
    if (Path(path) / "tokenizer_config.json").is_file():
        tokens = len(load_tokenizer(config))
        if tokens > model.get_input_embeddings().weight.shape[0]:
            model.resize_token_embeddings(tokens)
    with_adapter = PeftModel.from_pretrained(model, path, is_trainable=config.adapter == "continue")
    if config.adapter == "continue" or config.quantization is not None:
        return with_adapter
    merged = with_adapter.merge_and_unload()
    return merged.requires_grad_(True)  # peft froze the weights below the adapter


def _weights_below(config: ModelConfig, path: str) -> ModelConfig:
    """How the weights below an adapter are loaded: as the policy, from the place that the adapter names."""
    from peft import PeftConfig

    about = PeftConfig.from_pretrained(path)
    base = about.base_model_name_or_path
    if not base:
        raise ConfigError(
            f"model.path: adapter_config.json in {path!r} does not say which model the adapter belongs to; add "
            "base_model_name_or_path to it",
            "model.path",
        )
    if is_adapter(resolve_path(base)):
        raise ConfigError(
            f"model.path: the adapter at {config.path!r} belongs to {base!r}, which is an adapter itself; merge that "
            "one and save it as a whole model first",
            "model.path",
        )
    return replace(config, path=base, revision=about.revision)


def check_trainable(config: ModelConfig) -> None:
    """Refuse to train a new adapter on top of one that stays apart, and weights that were rounded for good.

    Raises:
        ConfigError: quantised weights, an adapter at `model.path` and `model.lora` together; or a converted model.
    """
    quantizers = quantizers_folder(resolve_path(config.path), config.revision)
    if quantizers is not None:
        from rltok.quant.qat_files import read_quantizers

        saved = read_quantizers(quantizers)
        if saved is not None and saved.converted:
            raise ConfigError(
                f"model.path: {config.path!r} is converted: its weights lie on a low-bit grid whose steps are gone, "
                "and training would move them off it; start from a checkpoint-N of that run, or the model before it",
                "model.path",
            )
    if config.quantization is not None and config.lora is not None and is_adapter(resolve_path(config.path)):
        raise ConfigError(
            f"model.quantization: the adapter at {config.path!r} cannot be merged into quantised weights, so "
            "model.lora would be a second one; go on with it by model.adapter=continue model.lora=null",
            "model.quantization",
        )


def refuse_pickled_weights(path: str) -> None:
    """Refuse a directory whose weights could only be read as pickle; names of the hub are checked while loading.

    Raises:
        ConfigError: names the files, and the command that converts them; or an index of shards that leads elsewhere.
    """
    folder = Path(path)
    if not folder.is_dir():
        return
    for index in sorted(folder.glob("*.safetensors.index.json")):
        _check_index(index)
    if any(folder.glob("*.safetensors")):
        return
    pickled = sorted({file.name for pattern in PICKLED_WEIGHTS for file in folder.glob(pattern)})
    pickled = [name for name in pickled if name.startswith(("pytorch_model", "adapter_model", "model"))]
    if pickled:
        raise ConfigError(
            f"model.path: {path!r} holds its weights only as pickle ({', '.join(pickled[:3])}), which can run code "
            f"when it is read; if you trust it, convert it once:\n  {_conversion(path, pickled)}",
            "model.path",
        )


def _conversion(path: str, pickled: list[str]) -> str:
    """A command that writes safetensors from pickled weights, reading tensors alone."""
    if "adapter_model.bin" in pickled:
        text = (
            "import torch, safetensors.torch as s; "
            f"w = torch.load({path + '/adapter_model.bin'!r}, weights_only=True); "
            f"s.save_file({{k: v.contiguous() for k, v in w.items()}}, {path + '/adapter_model.safetensors'!r})"
        )
    else:
        text = (
            "from transformers import AutoModelForCausalLM as M; "
            f"M.from_pretrained({path!r}, use_safetensors=False, dtype='auto').save_pretrained({path!r})"
        )
    return f'python -c "{text}"'


def _check_index(index: Path) -> None:
    """Refuse an index of shards that names a file of another kind or in another folder."""
    try:
        shards = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"model.path: {index} is no index of shards ({type(error).__name__}: {error})") from error
    for name in sorted(map(str, shards)):
        if Path(name).name != name or not name.endswith(".safetensors"):
            raise ConfigError(
                f"model.path: {index} names {name!r}; allowed: .safetensors files in the same folder", "model.path"
            )


def _check_attention(config: ModelConfig, found: PretrainedConfig) -> None:
    """Refuse a kernel of the hub that the model's own configuration asks for."""
    name = getattr(found, "_attn_implementation", None)
    if not isinstance(name, str) or config.trust_remote_code or config.attn_implementation is not None:
        return
    if "/" in name:
        raise ConfigError(
            f"model.path: the configuration of {config.path!r} asks for the attention kernel {name!r}, which is code "
            "from the hub; name another with model.attn_implementation=sdpa, or set model.trust_remote_code=true",
            "model.path",
        )


def quantization_config(settings: QuantizationSettings) -> BitsAndBytesConfig:
    """transformers' configuration of quantised weights.

    Raises:
        ConfigError: bitsandbytes is not installed.
    """
    from transformers import BitsAndBytesConfig

    if importlib.util.find_spec("bitsandbytes") is None:
        raise ConfigError(
            "model.quantization: bitsandbytes is not installed; pip install 'rltok[qlora]', or remove "
            "model.quantization to train the adapter over whole weights",
            "model.quantization",
        )
    if settings.bits == 8:
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=settings.type,
        bnb_4bit_use_double_quant=settings.double,
        bnb_4bit_compute_dtype=settings.compute_dtype,
        bnb_4bit_quant_storage=settings.storage_dtype,
    )


def _quantized_options(settings: QuantizationSettings) -> dict[str, Any]:
    """What `from_pretrained` needs; the weights are quantised on the device where they stay."""
    import torch

    options: dict[str, Any] = {"quantization_config": quantization_config(settings)}
    if torch.cuda.is_available():
        options["device_map"] = {"": torch.cuda.current_device()}
    return options


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
    text = str(error).strip()
    if "trust_remote_code" in text and not config.trust_remote_code:
        return ConfigError(
            f"model.path: {config.path!r} comes with code of its own, which does not run unless the recipe says "
            "model.trust_remote_code=true; read that code first",
            "model.path",
        )
    reason = text.splitlines()[0] if text else type(error).__name__
    return ConfigError(
        f"model.path: {config.path!r} cannot be loaded ({reason}); give {TINY!r}, a directory or a hub id", "model.path"
    )
