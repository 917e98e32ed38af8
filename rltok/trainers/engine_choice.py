"""The rollout engine that a run's settings choose, and what it cannot do: all that is known before anything is loaded.

engine               chosen by
fast                 the default
transformers         rollout.engine: transformers
continuous_batching  training.use_transformers_continuous_batching
vllm_colocate        training.use_vllm, vllm_mode: colocate
vllm_server          training.use_vllm, vllm_mode: server
"""

from __future__ import annotations

from collections.abc import Mapping

from trl import GRPOConfig

from rltok.config import ConfigError
from rltok.rollout import RolloutConfig

RESTRICTING = (
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "typical_p",
    "top_h",
    "epsilon_cutoff",
    "eta_cutoff",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
    "bad_words",
    "bad_words_ids",
    "suppress_tokens",
    "begin_suppress_tokens",
    "no_repeat_ngram_size",
    "encoder_repetition_penalty",
    "sequence_bias",
    "logit_bias",
    "allowed_token_ids",
    "min_tokens",
    "min_length",
    "min_new_tokens",
    "guidance_scale",
    "thinking_token_budget",
    "structured_outputs",
)
"""Keys of generation_kwargs that make the sampler another one than the policy at training.temperature."""


SERVED_BY_FAST = (
    "max_new_tokens",
    "min_new_tokens",
    "do_sample",
    "temperature",
    "top_k",
    "top_p",
    "min_p",
    "repetition_penalty",
    "stop_strings",
    "eos_token_id",
    "pad_token_id",
    "bos_token_id",
)
"""Keys of generation_kwargs that the engine `fast` follows."""
NEUTRAL = {"use_cache": True, "num_beams": 1, "num_return_sequences": 1}
"""Values of other keys that change nothing; None is one for every key."""


def engine_of(args: GRPOConfig, rollout: RolloutConfig) -> str:
    """Name of the rollout engine that the settings choose."""
    if args.use_vllm:
        return f"vllm_{args.vllm_mode}"
    return "continuous_batching" if args.use_transformers_continuous_batching else rollout.engine


def check_engine(rollout: RolloutConfig, args: GRPOConfig, has_rollout_func: bool = False) -> None:
    """Refuse what the engine of a run cannot do, before anything is loaded.

    Raises:
        ConfigError: names the method, the engine, and the engine to use instead.
    """
    engine = engine_of(args, rollout)
    if engine == "fast" and not has_rollout_func:
        _check_fast(args)
    if not (rollout.records_logps or rollout.modifies_sampler):
        return
    reason = "recording log-probabilities (rollout.record_logps)"
    if rollout.modifies_sampler:
        reason = next(
            name
            for name, present in (
                ("rollout.decoding", rollout.decodes),
                ("rollout.steering", rollout.steers),
                ("rollout.kv", rollout.kv is not None),
                ("rollout.quant", True),
            )
            if present
        )
    if has_rollout_func:
        raise ConfigError(f"{reason} cannot reach into a custom rollout_func. Remove one of the two.")
    for module in rollout.decoding:
        if not module.is_neutral and engine not in module.engines:
            raise ConfigError(
                f"rollout.decoding: {type(module).__name__} does not run on the engine {engine}. Use one of "
                f"{', '.join(module.engines)} ({_settings_of(module.engines[0])})."
            )
    if rollout.kv is not None and engine not in rollout.kv.engines:
        raise ConfigError(
            f"rollout.kv chooses what a cache keeps, but the engine {engine} has a cache of its own. Use "
            f"{' or '.join(f'{name} ({_settings_of(name)})' for name in rollout.kv.engines)}."
        )
    if rollout.quant is not None and not rollout.quant.is_neutral and engine not in rollout.quant.engines:
        raise ConfigError(
            f"rollout.quant samples from a quantised copy of the policy, but the engine {engine} takes its weights "
            "from TRL, in full precision. Use "
            f"{' or '.join(f'{name} ({_settings_of(name)})' for name in rollout.quant.engines)}."
        )
    if engine == "vllm_server" and rollout.steers:
        raise ConfigError(
            f"rollout.steering moves hidden states through hooks, which do not reach the engine {engine}. Use "
            f"vllm_colocate ({_settings_of('vllm_colocate')}) or transformers ({_settings_of('transformers')})."
        )
    if args.use_vllm and rollout.decodes and rollout.resolved_correction.mode == "off":
        mode = args.vllm_importance_sampling_mode
        if args.vllm_importance_sampling_correction and mode.startswith("sequence"):
            raise ConfigError(
                "rollout.correction.mode='off' leaves TRL's own correction in force, and training."
                f"vllm_importance_sampling_mode={mode!r} drops almost every completion that a decoding method touched. "
                "Remove rollout.correction.mode, or set training.vllm_importance_sampling_correction=false."
            )
    generation = args.generation_kwargs if isinstance(args.generation_kwargs, Mapping) else {}
    if generation.get("num_beams", 1) > 1 or generation.get("do_sample") is False:
        raise ConfigError(
            f"{reason} follows the distribution a token was drawn from; training.generation_kwargs={dict(generation)} "
            "does not draw. Remove num_beams and do_sample."
        )
    hidden = [name for name in RESTRICTING if generation.get(name) is not None]
    if rollout.strict and hidden:
        raise ConfigError(
            f"training.generation_kwargs sets {', '.join(hidden)}: {reason} and the learner's ratio take the sampler "
            "to be the policy at training.temperature. Remove them, or accept a biased gradient with "
            "rollout.strict=false."
        )


def _check_fast(args: GRPOConfig) -> None:
    """Refuse options of generate that the engine `fast` does not have."""
    generation = args.generation_kwargs if isinstance(args.generation_kwargs, Mapping) else {}
    instead = "Remove it, or use rollout.engine=transformers."
    for name, value in generation.items():
        if name not in SERVED_BY_FAST and value is not None and NEUTRAL.get(name, ...) != value:
            raise ConfigError(
                f"training.generation_kwargs.{name}={value!r} is no option of the engine fast, which follows "
                f"{', '.join(SERVED_BY_FAST)}. {instead}"
            )
    if args.cache_implementation is not None:
        raise ConfigError(
            f"training.cache_implementation={args.cache_implementation!r}: the engine fast has a cache of its own. "
            f"{instead}"
        )
    if generation.get("stop_strings") and args.mask_truncated_completions:
        raise ConfigError(
            "training.mask_truncated_completions=true drops every completion without an end token, and so those that "
            f"ended at training.generation_kwargs.stop_strings={generation['stop_strings']!r}. Remove one of the two."
        )


def _settings_of(engine: str) -> str:
    plain = "training.use_vllm=false, training.use_transformers_continuous_batching=false"
    return {
        "fast": f"rollout.engine=fast, {plain}",
        "transformers": f"rollout.engine=transformers, {plain}",
        "continuous_batching": "training.use_transformers_continuous_batching=true",
        "vllm_colocate": "training.use_vllm=true, training.vllm_mode=colocate",
        "vllm_server": "training.use_vllm=true, training.vllm_mode=server",
    }[engine]
