"""What a recipe will take, before it runs: completions, updates, tokens, memory; and whether its settings combine."""

from __future__ import annotations

import tempfile
from typing import TYPE_CHECKING

from rltok.config import ConfigError, build_typed
from rltok.models import Size, load_model_config, measure

if TYPE_CHECKING:
    from rltok.quant.qat_config import QuantizationAwareConfig
    from rltok.recipe import Recipe
    from rltok.trainers import CreditConfig

GIB = 2**30
BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "auto": 2}


def check_combination(recipe: Recipe) -> CreditConfig:
    """Everything that can be refused without a model: TRL's own checks and those between the doors.

    Raises:
        ConfigError: names the settings that do not go together.
    """
    from rltok.quant.qat_config import build_quantization_aware
    from rltok.rewards.check import check_rewards
    from rltok.run import quiet_libraries, training_arguments
    from rltok.trainers.doors import build_doors, check_doors

    quiet_libraries()
    rewards = check_rewards(recipe.rewards)
    with tempfile.TemporaryDirectory() as folder:
        args = training_arguments(recipe, folder, rewards.weights)
    doors = build_doors(recipe.credit, recipe.objective, recipe.rollout, recipe.selection)
    check_doors(doors, args, rewards.names)
    quantization = build_quantization_aware(recipe.quantization_aware)
    if quantization is not None:
        from rltok.trainers.quantization_aware import check_quantization_aware, refuse_adapters

        model = recipe.model
        refuse_adapters(model.lora is not None or model.adapter == "continue", model.quantization is not None)
        if model.attn_implementation not in (None, "sdpa"):
            raise ConfigError(
                f"quantization_aware: attention {model.attn_implementation!r} has no quantisers; set "
                "model.attn_implementation=sdpa",
                "model.attn_implementation",
            )
        check_quantization_aware(quantization, doors, args, patterned=model.attention_pattern is not None)
    return args


def estimate(recipe: Recipe, args: CreditConfig, processes: int = 1) -> list[str]:
    """Lines on completions, updates, tokens and memory; what cannot be known says so."""
    return [*_work(recipe, args, processes), *_memory(recipe, args)]


def _work(recipe: Recipe, args: CreditConfig, processes: int) -> list[str]:
    per_rollout = args.per_device_train_batch_size * args.steps_per_generation * processes
    per_update = args.per_device_train_batch_size * args.gradient_accumulation_steps * processes
    updates_per_rollout = args.steps_per_generation * args.num_iterations / args.gradient_accumulation_steps
    steps = args.max_steps if args.max_steps > 0 else None
    rows = recipe.data.get("train_size") if recipe.data.get("source") == "reasoning_gym" else None
    if steps is None and rows:
        steps = int(args.num_train_epochs * rows * args.num_generations * args.num_iterations / per_update)
    length = args.max_completion_length or 0
    lines = [
        f"rollout: {per_rollout} completions of {per_rollout // args.num_generations} prompts "
        f"({args.num_generations} each), at most {per_rollout * length:,} tokens",
        f"updates: {updates_per_rollout:g} per rollout, each of {per_update} completions, on {processes} process(es)",
    ]
    if recipe.rollout is not None:
        lines += _sampler(recipe, args)
    if recipe.selection is not None:
        lines.append(_selection(recipe, per_rollout, args.num_generations, steps or 1))
    if steps is None:
        lines.append(f"steps: {args.num_train_epochs:g} epoch(s) of a data set whose size is known when it is loaded")
    else:
        rollouts = steps / updates_per_rollout
        lines.append(
            f"steps: {steps} updates in {rollouts:g} rollouts, at most {int(rollouts * per_rollout * length):,} tokens"
        )
    return lines


def _sampler(recipe: Recipe, args: CreditConfig) -> list[str]:
    """The engine, what changes its samples, and the weights that make up for it."""
    from rltok.rollout import build_rollout
    from rltok.trainers.engine_choice import engine_of

    rollout = build_rollout(recipe.rollout)
    engine = engine_of(args, rollout)
    if not rollout.modifies_sampler:
        return [f"sampler: plain, on the engine {engine}"]
    names = [
        item["type"]
        for item, m in zip((recipe.rollout or {}).get("decoding") or (), rollout.decoding, strict=True)
        if not m.is_neutral
    ]
    names += ["steering"] if rollout.steers else []
    if rollout.kv is not None:
        names.append(f"cache policy {(recipe.rollout or {})['kv']['policy']}")
    if rollout.quant is not None and not rollout.quant.is_neutral:
        same = ", learner in the same precision" if rollout.quant.quantizes_learner else ""
        noise = ", noise" if rollout.quant.noise is not None else ""
        names.append(f"{rollout.quant.spec.bits}-bit copy of the policy{same}{noise}")
    weights = rollout.resolved_correction
    low, high = weights.bounds
    correction = "none" if weights.mode == "off" else f"{weights.mode} {weights.level} weights to [{low:g}, {high:g}]"
    return [f"sampler: {', '.join(names)} on the engine {engine}; correction: {correction}"]


def _selection(recipe: Recipe, rows: int, group: int, steps: int) -> str:
    from rltok.selection import SELECTION

    method = build_typed(SELECTION, recipe.selection or {}, "selection")
    ends = []
    for step in (0, steps):
        kept, share = method.at(step, steps, rows, group)
        kept = min(rows, kept if method.scope == "batch" else kept * (rows // group))
        ends.append(f"{kept} of {rows} completions and {share:.0%} of their tokens")
    if ends[0] == ends[1]:
        return f"selection: trains at most {ends[0]}"
    return f"selection: trains at most {ends[0]} at the start, {ends[1]} at the end"


def _memory(recipe: Recipe, args: CreditConfig) -> list[str]:
    compute = 2 if args.bf16 or args.fp16 else BYTES[recipe.model.dtype]
    try:
        size = measure(recipe.model, kv_bytes=compute)
    except (ConfigError, OSError) as error:
        return [f"memory: unknown, the model's configuration cannot be read ({error})"]
    return _memory_lines(size, recipe, args)


def _memory_lines(size: Size, recipe: Recipe, args: CreditConfig) -> list[str]:
    from rltok.quant.qat_config import build_quantization_aware

    weights = size.parameters * BYTES[recipe.model.dtype]
    gradients = size.trainable * BYTES[recipe.model.dtype]
    states = 2 * gradients
    reference = weights if args.beta > 0 and recipe.model.lora is None else 0
    length = args.max_completion_length or 0
    held = _held(recipe, length)
    cache = size.kv_bytes_per_token * held * args.generation_batch_size
    quantization = build_quantization_aware(recipe.quantization_aware)
    needs_teacher = quantization is not None and quantization.has_teacher and not reference
    teacher = weights if needs_teacher else 0  # the reference is the same model
    total = weights + gradients + states + reference + teacher
    parts = f"weights {_gib(weights)}, gradients {_gib(gradients)}, Adam {_gib(states)}"
    if reference:
        parts += f", reference {_gib(reference)}"
    if teacher:
        parts += f", teacher {_gib(teacher)}"
    return [
        f"parameters: {size.parameters:,}, of which {size.trainable:,} are trained",
        f"memory per process, unsharded: {_gib(total)} ({parts}), plus activations of "
        f"{args.per_device_train_batch_size} completions",
        f"key-value cache of one rollout on one process: at most {_gib(cache)}, plus the prompts"
        + (" while they are computed" if held < length else ""),
        *_shadow_lines(size, recipe),
        *([] if quantization is None else [_quantizers(quantization)]),
    ]


def _shadow_lines(size: Size, recipe: Recipe) -> list[str]:
    """Memory of the quantised copy that samples, if there is one."""
    from rltok.rollout import build_rollout

    quant = build_rollout(recipe.rollout).quant
    if quant is None or quant.spec.bits == 16:
        return []
    spec, width = quant.spec, BYTES[recipe.model.dtype]
    per_weight = spec.bits / 8 + (0 if spec.group_size is None else width / spec.group_size)
    per_weight += width if spec.hold_dequantized else 0
    return [f"quantised copy on each process: at most {_gib(size.parameters * per_weight)}, beside the policy"]


def _quantizers(config: QuantizationAwareConfig) -> str:
    """What is quantised, and what is added to the loss."""
    low = f", {config.low_share:.0%} of the tokens A{config.low_bits}" if config.low_share else ""
    losses = {
        f"entropy {config.entropy:g}": config.entropy > 0,
        f"distribution {config.distribution:g}": config.distribution > 0,
        "distillation": config.distills,
    }
    named = ", ".join(name for name, there in losses.items() if there) or "none"
    end = "converted at the end" if config.convert else "not converted"
    return (
        f"quantization-aware: W{config.weight_bits} A{config.activation_bits}{low}; losses: {named}; {end}; a rollout "
        "holds the quantised weights beside the policy's"
    )


def _held(recipe: Recipe, length: int) -> float:
    """Tokens that the cache holds of a completion of so many, mean over the layers."""
    from rltok.fast.cache import layer_windows
    from rltok.rollout import build_rollout

    kv = build_rollout(recipe.rollout).kv
    if kv is None or kv.policy.interval is None:
        return length
    policy, most = kv.at(None if kv.hold is None else kv.hold.most), kv.policy.interval
    windows = layer_windows(load_model_config(recipe.model).get_text_config(decoder=True))
    counts = [length if w is not None else min(length, policy.kept(i) + most) for i, w in enumerate(windows)]
    return sum(counts) / len(counts)


def _gib(count: float) -> str:
    return f"{count / GIB:.2f} GiB" if count >= GIB / 10 else f"{count / 2**20:.1f} MiB"
