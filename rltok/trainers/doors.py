"""The doors of a run: from recipe sections or objects to instances, and what must not be combined."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from trl import GRPOConfig

from rltok.attention import AttentionConfig
from rltok.config import ConfigError, build_typed
from rltok.credit import CREDIT, AttentiveCredit, CreditMethod, GroupCredit, TokenGroupAverage
from rltok.objective import HAPO, OBJECTIVE, ClipCov, GSPOToken, KLCov, ObjectiveTerm
from rltok.objective.aggregate import CLIPPED
from rltok.rollout import RolloutConfig, build_rollout, refuse_restricted_sampling
from rltok.selection import SELECTION, SelectionMethod
from rltok.trainers.engine_choice import check_engine


@dataclass(frozen=True)
class Doors:
    """What a run does differently from TRL."""

    credit: CreditMethod
    objective: tuple[ObjectiveTerm, ...]
    rollout: RolloutConfig
    selection: SelectionMethod | None = None

    @property
    def needs(self) -> frozenset[str]:
        """Signals that some part reads: `entropy`, `entropy_stats`, `old_logps`, `attention`."""
        return self.rollout.needs.union(self.credit.needs, *(term.needs for term in self.objective))

    @property
    def attention(self) -> AttentionConfig | None:
        """Options of the attention pass, if the credit method asks for one."""
        wanted = "attention" in self.credit.needs
        return self.credit.attention if wanted and isinstance(self.credit, AttentiveCredit) else None


def build_doors(
    credit: CreditMethod | Mapping[str, Any] | None,
    objective: ObjectiveTerm | Mapping[str, Any] | Sequence[ObjectiveTerm | Mapping[str, Any]] | None,
    rollout: RolloutConfig | Mapping[str, Any] | None,
    selection: SelectionMethod | Mapping[str, Any] | None = None,
) -> Doors:
    """Instances from objects or recipe sections.

    Raises:
        ConfigError: unknown type, key or value; names key path and nearest valid name.
    """
    method = build_typed(CREDIT, credit, "credit") if isinstance(credit, Mapping) else credit
    entries: Sequence[Any] = objective if isinstance(objective, list | tuple) else [objective]
    terms = tuple(
        build_typed(OBJECTIVE, entry, "objective" if len(entries) == 1 else f"objective[{i}]")
        if isinstance(entry, Mapping)
        else entry
        for i, entry in enumerate(entries)
        if entry is not None
    )
    chosen = build_typed(SELECTION, selection, "selection") if isinstance(selection, Mapping) else selection
    return Doors(method if method is not None else GroupCredit(), terms, build_rollout(rollout), chosen)


def check_doors(doors: Doors, args: GRPOConfig, reward_names: Sequence[str], has_rollout_func: bool = False) -> None:
    """Refuse combinations whose mathematics is wrong; warn of one that only does nothing.

    Raises:
        ConfigError: names both settings and what to change.
    """
    _check_signals(doors)
    _check_credit(doors, args)
    _check_ratio_level(doors, args)
    _check_clipping(doors, args)
    _check_sampler(doors, args, has_rollout_func)
    _check_correction(doors, args)
    _check_dynamic_sampling(doors, args, reward_names)
    _check_prompt_skipping(doors, args, reward_names)
    _check_selection(doors, args)
    updates = (args.steps_per_generation or 1) * args.num_iterations / args.gradient_accumulation_steps
    if updates <= 1 and any(isinstance(t, HAPO) and t.alpha + t.beta > 0 for t in doors.objective):
        warnings.warn(
            "objective.type=hapo with one update per rollout: every ratio is 1, so the adaptive clip range does "
            "nothing and redistribution only shrinks low-entropy tokens. Set training.steps_per_generation to "
            "several times training.gradient_accumulation_steps.",
            stacklevel=3,
        )


SIGNALS = frozenset({"entropy", "entropy_stats", "old_logps"})
"""What the trainer can compute for a method; credit methods may also ask for `attention`."""


def _check_signals(doors: Doors) -> None:
    parts: list[Any] = [doors.credit, *doors.objective, *doors.rollout.decoding]
    for part in parts:
        allowed = SIGNALS | {"attention"} if part is doors.credit else SIGNALS
        unknown = sorted(set(part.needs) - allowed)
        if unknown:
            raise ConfigError(
                f"{type(part).__name__} needs {', '.join(map(repr, unknown))}, which the trainer cannot give; "
                f"allowed in `needs`: {', '.join(sorted(allowed))}"
            )
    if "attention" in doors.credit.needs and doors.attention is None:
        raise ConfigError(
            f"{type(doors.credit).__name__} needs 'attention' but has no `attention`, the AttentionConfig that says "
            "which layers and windows"
        )


def _check_credit(doors: Doors, args: GRPOConfig) -> None:
    if not isinstance(doors.credit, TokenGroupAverage):
        return
    for name, neutral in (("scale_rewards", "group"), ("multi_objective_aggregation", "sum_then_normalize")):
        value = getattr(args, name)
        if value != neutral:
            raise ConfigError(
                f"credit.type=token_group_average normalises by itself and would ignore training.{name}={value!r}. "
                f"Set it to {neutral!r} (credit.scale=false only centres)."
            )


def _check_ratio_level(doors: Doors, args: GRPOConfig) -> None:
    level = args.importance_sampling_level
    if level not in ("token", "sequence"):
        raise ConfigError(f"training.importance_sampling_level={level!r}: allowed are 'token', 'sequence'")
    if level == "token":
        return
    if doors.credit.per_token:
        raise ConfigError(
            f"credit.type={type(doors.credit).__name__} gives every token its own credit, but "
            "training.importance_sampling_level='sequence' has one ratio per completion, whose gradient all but "
            "ignores it. Use 'token', or objective.type=gspo_token."
        )
    for term in doors.objective:
        if isinstance(term, HAPO | GSPOToken | ClipCov | KLCov):
            raise ConfigError(
                f"objective.type={type(term).__name__} works on token ratios, but "
                "training.importance_sampling_level='sequence'. Set it to 'token'."
            )


def _check_clipping(doors: Doors, args: GRPOConfig) -> None:
    epsilon_high = args.epsilon if args.epsilon_high is None else args.epsilon_high
    for term in doors.objective:
        name = f"objective.type={type(term).__name__}"
        if isinstance(term, HAPO):
            if term.alpha > 0 and args.loss_type not in CLIPPED:
                raise ConfigError(
                    f"{name} with objective.alpha={term.alpha} widens a clip range that training.loss_type="
                    f"{args.loss_type!r} does not have. Use one of {', '.join(CLIPPED)}, or objective.alpha=0."
                )
            try:
                term.check_widths(args.epsilon, args.delta, epsilon_high)
            except ValueError as error:
                raise ConfigError(str(error)) from None
        if isinstance(term, ClipCov | KLCov) and args.loss_type not in CLIPPED:
            raise ConfigError(
                f"{name} replaces ratio clipping, which training.loss_type={args.loss_type!r} does not do. "
                f"Use one of {', '.join(CLIPPED)}."
            )
    if args.loss_type == "cispo" and args.epsilon_high is None:
        raise ConfigError(
            "training.loss_type='cispo' reads training.epsilon_high as the upper bound of the ratio itself, not as "
            "1 + epsilon. Set it, for example to 5.0."
        )


def _check_sampler(doors: Doors, args: GRPOConfig, has_rollout_func: bool) -> None:
    rollout = doors.rollout
    try:
        refuse_restricted_sampling(
            rollout,
            top_p=args.top_p,
            top_k=args.top_k,
            min_p=args.min_p,
            repetition_penalty=args.repetition_penalty,
        )
    except ValueError as error:
        raise ConfigError(f"training: {error}", "training") from None
    for index, module in enumerate(rollout.decoding):
        if rollout.strict and module.restricts and not module.is_neutral:
            raise ConfigError(
                f"rollout.decoding[{index}]: {type(module).__name__} gives tokens probability 0 that the policy may "
                "choose, and no weight makes up for what is never sampled. Give it a finite strength, use it in "
                "evaluation.decoding, or accept a biased gradient with rollout.strict=false."
            )
    if rollout.strict and rollout.forces and rollout.resolved_correction.mode == "off":
        raise ConfigError(
            "rollout.decoding puts words in place of samples, which rollout.correction.mode='off' would train as the "
            "policy's own. Remove rollout.correction.mode, or accept that with rollout.strict=false."
        )
    check_engine(rollout, args, has_rollout_func)


def _check_correction(doors: Doors, args: GRPOConfig) -> None:
    correction = doors.rollout.resolved_correction
    if correction.mode == "off":
        quant = doors.rollout.quant
        lossy = quant is not None and not quant.is_neutral and not quant.quantizes_learner
        if doors.rollout.kv is not None or lossy:
            name = "rollout.kv" if doors.rollout.kv is not None else "rollout.quant"
            warnings.warn(
                f"rollout.correction.mode='off' with {name} trains on tokens of another policy as if the learner "
                "had sampled them, and nothing measures how far the two are apart. Remove rollout.correction.mode to "
                "correct.",
                stacklevel=4,
            )
        return
    if args.loss_type == "vespo" and correction.level != "token":
        raise ConfigError(
            f"rollout.correction.level={correction.level!r} with training.loss_type='vespo': VESPO multiplies token "
            "weights into its own. Use level 'token'."
        )
    if isinstance(args.generation_kwargs, Mapping) and args.generation_kwargs.get("logprobs"):
        raise ConfigError(
            f"training.generation_kwargs.logprobs={args.generation_kwargs['logprobs']} returns the most likely "
            "token's log-probability in place of the sampled one's. Remove it."
        )
    if doors.rollout.modifies_sampler and correction.level == "sequence":
        warnings.warn(
            "rollout.correction.level='sequence' with rollout.decoding: the product of token ratios over a whole "
            "completion has a very large variance; level 'token' is the recommended one.",
            stacklevel=4,
        )


def _check_dynamic_sampling(doors: Doors, args: GRPOConfig, reward_names: Sequence[str]) -> None:
    dynamic = doors.rollout.dynamic_sampling
    if dynamic is None:
        return
    if dynamic.metric not in reward_names:
        raise ConfigError(
            f"rollout.dynamic_sampling.metric={dynamic.metric!r} is not a reward of this run; "
            f"allowed: {', '.join(reward_names)}. It must be correctness, not the shaped sum."
        )
    if args.scale_rewards == "batch" or args.multi_objective_aggregation != "sum_then_normalize":
        setting = (
            "training.scale_rewards='batch'"
            if args.scale_rewards == "batch"
            else f"training.multi_objective_aggregation={args.multi_objective_aggregation!r}"
        )
        raise ConfigError(
            f"rollout.dynamic_sampling replaces groups after {setting} has normalised over the whole batch. "
            "Use scale_rewards='group' or 'none' with 'sum_then_normalize'."
        )
    if args.use_vllm and args.vllm_mode == "server":
        raise ConfigError(
            "rollout.dynamic_sampling generates batches of varying size, which training.vllm_mode='server' "
            "does not split over ranks. Use 'colocate' or training.use_vllm=false."
        )


def _check_prompt_skipping(doors: Doors, args: GRPOConfig, reward_names: Sequence[str]) -> None:
    skipping = doors.rollout.prompt_skipping
    if skipping is None:
        return
    if skipping.metric not in reward_names:
        raise ConfigError(
            f"rollout.prompt_skipping.metric={skipping.metric!r} is not a reward of this run; "
            f"allowed: {', '.join(reward_names)}. It must be correctness, not the shaped sum."
        )
    if args.remove_unused_columns:
        raise ConfigError(
            "rollout.prompt_skipping knows a prompt by its whole row, of which training.remove_unused_columns=true "
            "drops columns. Set it to false."
        )


def needs_whole_rows(doors: Doors, args: GRPOConfig) -> bool:
    """True if a token's loss depends on the log-probabilities of all tokens of its completion."""
    return (
        args.importance_sampling_level == "sequence"
        or args.loss_type == "vespo"
        or args.off_policy_mask_threshold is not None
        or any(isinstance(term, GSPOToken) for term in doors.objective)
    )


def _check_selection(doors: Doors, args: GRPOConfig) -> None:
    selection = doors.selection
    if selection is None:
        return
    name = f"selection.type={type(selection).__name__}"
    steps, accumulation = args.steps_per_generation or 1, args.gradient_accumulation_steps
    if steps % accumulation:
        raise ConfigError(
            f"{name} spreads a rollout over whole optimizer steps, but training.steps_per_generation={steps} is not a "
            f"multiple of training.gradient_accumulation_steps={accumulation}. Make it one."
        )
    if args.loss_type == "bnpo":
        raise ConfigError(
            f"{name} with training.loss_type='bnpo': its mean over each micro-batch changes meaning when micro-batches "
            "are packed anew. Use 'dapo', the same mean over a whole optimizer step."
        )
    if args.fp16:
        raise ConfigError(
            f"{name} can leave an optimizer step without gradients, which the loss scaler of training.fp16=true does "
            "not allow. Use bf16."
        )
    if args.entropy_coef or args.use_adaptive_entropy:
        raise ConfigError(
            f"{name} with training.entropy_coef={args.entropy_coef}, use_adaptive_entropy={args.use_adaptive_entropy}: "
            "the bonus is a mean over whole micro-batches, of which selection leaves a biased part. Turn it off."
        )
    if selection.recredits:
        _check_recredit(name, doors, args)
    if not selection.selects_tokens:
        return
    if args.top_entropy_quantile < 1:
        raise ConfigError(
            f"{name} drops tokens and training.top_entropy_quantile={args.top_entropy_quantile} drops tokens of what "
            "is left. Use one: top_entropy_quantile=1, or selection.tokens_start=1 and tokens_end=1."
        )
    for term in doors.objective:
        if isinstance(term, HAPO) and term.statistics == "micro_batch":
            raise ConfigError(
                f"objective.statistics='micro_batch' with {name}: the pivot would be that of the dropped tokens' "
                "rest. Use objective.statistics='generation_batch'."
            )
    if needs_whole_rows(doors, args):
        warnings.warn(
            f"{name} drops tokens, but the ratio (training.importance_sampling_level, vespo, gspo_token or the "
            "off-policy mask) needs whole completions: dropped tokens leave the loss and save no time.",
            stacklevel=4,
        )


def _check_recredit(name: str, doors: Doors, args: GRPOConfig) -> None:
    """Advantages computed anew need a credit that is nothing but the group's normalised reward."""
    settings = {
        "credit.type": (type(doors.credit).__name__, "GroupCredit"),
        "training.scale_rewards": (args.scale_rewards, "group"),
        "training.multi_objective_aggregation": (args.multi_objective_aggregation, "sum_then_normalize"),
    }
    for setting, (value, neutral) in settings.items():
        if value != neutral:
            raise ConfigError(
                f"{name} normalises the kept rewards by itself and would replace {setting}={value!r}. "
                f"Use {neutral!r}, or selection.renormalize=false."
            )
    kept = doors.selection.at(0, 1, args.num_generations, args.num_generations)[0] if doors.selection else 0
    if kept < 2:
        raise ConfigError(
            f"{name} would keep {kept} of training.num_generations={args.num_generations} completions and normalise a "
            "single reward, which gives no advantage. Raise selection.keep so that at least 2 are left."
        )
