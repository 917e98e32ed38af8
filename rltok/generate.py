"""Completions of a checkpoint with decoding methods, to read and to choose from, token by token.

generate/
    generations.jsonl    one completion per line: prompt, text, tokens, rewards, whether it was chosen
    tokens.parquet       one row per token: log-probability, temperature, wave and what else the methods record
    generation.json      settings, versions and means; written last

A log-probability is that of the distribution the token was drawn from, with every method, temperature, top-p and top-k.
Greedy decoding draws nothing: its log-probabilities are those of the changed logits at temperature 1.
"""

from __future__ import annotations

import json
import math
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table
from rich.text import Text
from torch import Tensor

from rltok.attend import WeightType, checkpoint_config, load_policy, print_facts
from rltok.config import ConfigError, suggestion
from rltok.entropy import EntropyStats
from rltok.evaluate import decoding_context, end_ids, generate_batch, inference, isolated_rng, score
from rltok.models import load_tokenizer
from rltok.progress import EvaluationBar
from rltok.prompts import Row, asked_as, check_prompt, clip, flag, prompt_tokens, read_rows, token_texts
from rltok.recipe import DecodingRecipe, Recipe, load_decoding
from rltok.rollout import build_decoding
from rltok.run import (
    build_steering,
    check_vectors,
    check_words,
    held_out_rows,
    json_line,
    quiet_libraries,
    versions,
    write_atomically,
    write_json,
)
from rltok.sampler_stats import calibrate_entropy, checkpoint_stats
from rltok.sampling import (
    DECODING,
    AdaptiveTemperature,
    CyclicReflexLogitsProcessor,
    DecodingModule,
    RolloutProcessor,
    SampledLogps,
    make_processors,
)
from rltok.sampling.processor import run_order

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from rltok.rewards import RewardSet
    from rltok.steering import SteeringConfig

NO_RECIPE = "none"
"""Value of `--decoding` for the plain sampler."""
MAX_NEW_TOKENS = 256
"""Completion length where neither the command line nor a recipe has one; less where the model's context is shorter."""
RECIPE_LENGTH = 512
"""TRL's, where a recipe has none."""
OTHER_SETTINGS = {"min_p": None, "repetition_penalty": 1.0, "generation_kwargs": None}
"""Sampling settings of a training that are not among ours, and their neutral values."""
SAMPLING_ONLY = ("top_p", "top_k", "seed")
TOKEN_COLUMNS = ("completion", "position", "token_id", "token", "logp", "temperature", "wave")
"""Of tokens.parquet, before what the methods record by name."""
SHOWN = 8
"""Rows of the printed table."""


@dataclass(frozen=True)
class GenerateOptions:
    """What `rltok generate` was asked for; None takes the recipe's value."""

    checkpoint: str
    """a checkpoint or model directory, `tiny-reasoner` or a hub id"""
    decoding: str = NO_RECIPE
    """recipe, file with a list `decoding`, or `none`"""
    overrides: Sequence[str] = ()
    """`key.path=value` on top of it"""
    prompts: Sequence[str] = ()
    """prompts as text; either these, a file, or the recipe's data"""
    prompts_file: Path | None = None
    """JSON lines or Parquet with a column `prompt`; the other columns go to the rewards"""
    recipe_data: bool = False
    """the held-out rows of the recipe"""
    rows: int | None = None
    """first rows of file or recipe; None takes all, or the recipe's `evaluation.rows`"""
    chat: bool = False
    """make a plain prompt the user message of a conversation, by the tokenizer's chat template"""
    temperature: float | None = None
    """0 decodes greedily"""
    top_p: float | None = None
    top_k: int | None = None
    max_new_tokens: int | None = None
    num_samples: int | None = None
    """completions per prompt; None is 1"""
    best_of: int | None = None
    """as `num_samples`, and the completion of the highest reward is chosen"""
    rewards: Sequence[str] = ()
    """names of reward functions or path/file.py:function; empty takes the recipe's where rewards are needed"""
    seed: int | None = None
    """of the sampling; None is 0"""
    batch_size: int = 16
    """completions generated at once"""
    out: Path = Path("generate")
    """directory of the files"""
    dtype: WeightType = "float32"
    """of the weights"""

    def __post_init__(self) -> None:
        self._check_sources()
        self._check_numbers()
        if self.num_samples is not None and self.best_of is not None:
            raise ConfigError(
                f"--num-samples {self.num_samples} and --best-of {self.best_of}: both say how many completions a "
                "prompt gets; give one"
            )
        if self.decoding == NO_RECIPE and self.overrides:
            raise ConfigError(
                f"{self.overrides[0]}: there is no recipe to change with --decoding none; name one, or leave it out"
            )
        if self.out.exists() and not self.out.is_dir():
            raise ConfigError(f"--out {self.out}: is a file; give a directory, which may be new")

    def _check_sources(self) -> None:
        sources = {
            "--prompt TEXT": bool(self.prompts),
            "--prompts FILE": self.prompts_file is not None,
            "--recipe-data": self.recipe_data,
        }
        given = [name for name, is_given in sources.items() if is_given]
        if len(given) != 1:
            seen = f"{' and '.join(given)} were given" if given else "no prompts were given"
            raise ConfigError(f"{seen}: give one of {', '.join(sources)}")
        if self.rows is not None and self.prompts:
            raise ConfigError(f"--rows {self.rows} only goes with --prompts FILE or --recipe-data; leave it out")
        if self.recipe_data and self.chat:
            raise ConfigError("--chat: the recipe's data.conversational decides that for --recipe-data; leave it out")

    def _check_numbers(self) -> None:
        limits = {"rows": 1, "max_new_tokens": 1, "num_samples": 1, "best_of": 1, "batch_size": 1}
        for name, least in (limits | {"temperature": 0, "top_k": 0, "seed": 0}).items():
            value = getattr(self, name)
            if value is not None and not (value >= least and math.isfinite(value)):
                raise ConfigError(f"{flag(name)} {value} must be >= {least} and finite")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ConfigError(f"--top-p {self.top_p} must be > 0 and <= 1")

    @property
    def completions_per_prompt(self) -> int:
        """How many completions every prompt gets."""
        return self.best_of or self.num_samples or 1


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn."""

    temperature: float = 1.0
    """0 decodes greedily"""
    top_p: float = 1.0
    top_k: int = 0
    """0 is no limit"""
    max_new_tokens: int = MAX_NEW_TOKENS
    num_samples: int = 1
    seed: int = 0
    batch_size: int = 16
    """completions made at once; part of the settings that decide a sample"""


@dataclass(frozen=True)
class Generated:
    """One completion; every list of `columns` has one entry per token."""

    row: int
    """index of its prompt"""
    sample: int
    """index among the completions of the prompt"""
    ids: list[int]
    """up to and with the end-of-sequence token"""
    columns: dict[str, list[Any]]
    """`logp` in nats, `temperature` (None where decoding is greedy), `wave` in logits, and what the methods record"""


def run_generate(options: GenerateOptions, console: Console) -> int:
    """Make, score and write completions; print the first ones.

    Raises:
        ConfigError: options, recipes, files, rewards or models that cannot be used.
    """
    quiet_libraries()
    plan = DecodingRecipe() if options.decoding == NO_RECIPE else load_decoding(options.decoding, options.overrides)
    decoding = build_decoding(plan.decoding, "decoding")
    steering = build_steering(plan.steering, "steering")
    sampling = resolve_sampling(options, plan.recipe)
    rewards = reward_set(options, plan.recipe)
    rows = prompt_rows(options, plan.recipe)
    _check_columns(rewards, rows)
    check_vectors(steering, "steering")
    config = checkpoint_config(options.checkpoint, options.dtype)
    tokenizer = load_tokenizer(config)
    template = {} if plan.recipe is None else plan.recipe.training.get("chat_template_kwargs") or {}
    prompts = [prompt_tokens(tokenizer, row["prompt"], template)[1] for row in rows]
    check_words(decoding, tokenizer, f"--decoding {options.decoding}")
    model = load_policy(config)
    sampling = fit_context(sampling, prompts, model, has_length=_has_length(options, plan.recipe))
    say = _printer(console)
    options.out.mkdir(parents=True, exist_ok=True)
    stats = calibrate_entropy(
        model,
        tokenizer,
        [prompt for prompt in prompts for _ in range(sampling.num_samples)][: sampling.batch_size],
        decoding,
        max_new_tokens=sampling.max_new_tokens,
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        top_k=sampling.top_k,
        seed=sampling.seed,
        saved=checkpoint_stats(options.checkpoint),
        steering=steering,
        say=say,
    )
    started = time.monotonic()
    with EvaluationBar(console, "generation", len(prompts) * sampling.num_samples) as bar:
        completions = generate(
            model, tokenizer, prompts, decoding, sampling, entropy_stats=stats, steering=steering, on_batch=bar
        )
    seconds = time.monotonic() - started
    scores = score_completions(completions, rows, tokenizer, rewards)
    totals = total_rewards(scores, rewards)
    chosen = choose(completions, totals) if options.best_of is not None else None
    settings = _settings(sampling, plan)
    records = _records(completions, rows, tokenizer, scores, totals, chosen, settings, set(end_ids(model, tokenizer)))
    facts = {
        "checkpoint": options.checkpoint,
        "dtype": options.dtype,
        "recipe": options.decoding,
        "prompts": len(prompts),
        "completions": len(completions),
        "tokens": sum(len(one.ids) for one in completions),
        "best_of": options.best_of,
        **settings,
        "entropy_stats": None if stats is None else [float(value) for value in stats],
        "rewards": {} if rewards is None else dict(zip(rewards.names, rewards.weights, strict=True)),
        "means": reward_means(scores, totals, chosen),
        "seconds": round(seconds, 3),
        "versions": versions(),
    }
    _write(options.out, records, completions, facts)
    _print_table(records, options.best_of is not None, console)
    _print_summary(facts, options.out, console)
    return 0


# Settings


def resolve_sampling(options: GenerateOptions, recipe: Recipe | None) -> Sampling:
    """The command line's settings, else those of the recipe's rollouts, else TRL's plain sampler.

    Raises:
        ConfigError: settings that contradict greedy decoding, or a sampling setting of the recipe that is none of ours.
    """
    training = {} if recipe is None else recipe.training
    for name, neutral in OTHER_SETTINGS.items():
        if training.get(name, neutral) not in (None, neutral):
            raise ConfigError(
                f"training.{name}: {training[name]!r} would be ignored, `rltok generate` has no such setting; "
                f"add the override training.{name}={'null' if neutral is None else neutral}"
            )
    length = training.get("max_completion_length") or (MAX_NEW_TOKENS if recipe is None else RECIPE_LENGTH)
    defaults = {"temperature": 1.0, "top_p": 1.0, "top_k": 0} | {
        name: training[name] for name in ("temperature", "top_p", "top_k") if training.get(name) is not None
    }
    given = {name: getattr(options, name) for name in defaults if getattr(options, name) is not None}
    sampling = Sampling(
        **(defaults | given),
        max_new_tokens=options.max_new_tokens or length,
        num_samples=options.completions_per_prompt,
        seed=options.seed or 0,
        batch_size=options.batch_size,
    )
    if sampling.temperature == 0:
        _check_greedy(options)
        return replace(sampling, top_p=1.0, top_k=0)
    return sampling


def _check_greedy(options: GenerateOptions) -> None:
    for name in ("num_samples", "best_of"):
        count = getattr(options, name)
        if count is not None and (count > 1 or name == "best_of"):
            raise ConfigError(
                f"{flag(name)} {count}: greedy completions of a prompt are all equal; give --temperature T > 0"
            )
    for name in SAMPLING_ONLY:
        if getattr(options, name) is not None:
            raise ConfigError(
                f"{flag(name)} {getattr(options, name)}: greedy decoding does not read it; leave it out, or give "
                "--temperature T > 0"
            )


def _has_length(options: GenerateOptions, recipe: Recipe | None) -> bool:
    return options.max_new_tokens is not None or (
        recipe is not None and recipe.training.get("max_completion_length") is not None
    )


def fit_context(
    sampling: Sampling, prompts: Sequence[Sequence[int]], model: PreTrainedModel, has_length: bool
) -> Sampling:
    """The settings with a completion length that the model's context has room for; one that was asked for stays.

    Raises:
        ConfigError: the longest prompt, or it and a length that was asked for, do not fit.
    """
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if limit is None or limit <= 0:
        return sampling
    longest = max(len(prompt) for prompt in prompts)
    room = limit - longest
    if room < 1 or (has_length and sampling.max_new_tokens > room):
        raise ConfigError(
            f"--max-new-tokens {sampling.max_new_tokens}: the longest prompt has {longest} tokens and the model is "
            f"made for {limit} (max_position_embeddings); "
            + (f"give at most --max-new-tokens {room}" if room >= 1 else "give shorter prompts")
        )
    return replace(sampling, max_new_tokens=min(sampling.max_new_tokens, room))


def _settings(sampling: Sampling, plan: DecodingRecipe) -> dict[str, Any]:
    """What decides a completion besides the model, in plain values."""
    greedy = sampling.temperature == 0
    values = {name: value for name, value in asdict(sampling).items() if name != "seed"}
    return {
        "seed": None if greedy else sampling.seed,
        "sampling": values,
        "decoding": plan.decoding,
        "steering": plan.steering,
    }


# Prompts and rewards


def prompt_rows(options: GenerateOptions, recipe: Recipe | None) -> list[Row]:
    """Rows with `prompt` and the columns that rewards read.

    Raises:
        ConfigError: a file or a prompt that cannot be read, or no recipe where its data is asked for.
    """
    if options.prompts:
        return [{"prompt": asked_as(prompt, options.chat)} for prompt in options.prompts]
    if options.recipe_data:
        return _recipe_rows(options, recipe)
    assert options.prompts_file is not None
    from rltok.data.table_rows import RESERVED

    table = read_rows(options.prompts_file, "--prompts", ("prompt",), rows=options.rows)
    columns = dict.fromkeys(name for row in table for name in row if name not in RESERVED)
    for number, row in enumerate(table, start=1):
        check_prompt(row["prompt"], f"--prompts {options.prompts_file}, row {number}")
    return [{n: row.get(n) for n in columns} | {"prompt": asked_as(row["prompt"], options.chat)} for row in table]


def _recipe_rows(options: GenerateOptions, recipe: Recipe | None) -> list[Row]:
    from rltok.config import build
    from rltok.data import DataConfig, load_data

    if recipe is None:
        raise ConfigError(
            f"--recipe-data: --decoding {options.decoding} has no section data; name a whole recipe, or give prompts"
        )
    heldout = load_data(build(DataConfig, recipe.data, "data"), recipe.seed).heldout
    count = held_out_rows(recipe, heldout) if options.rows is None else min(options.rows, len(heldout))
    if count == 0:
        raise ConfigError("--recipe-data: the recipe holds no row out; set data.heldout_size >= 1")
    return [dict(heldout[i]) for i in range(count)]


def reward_set(options: GenerateOptions, recipe: Recipe | None) -> RewardSet | None:
    """The functions of `--reward`, else the recipe's where a choice or its data asks for rewards, else None.

    Raises:
        ConfigError: an unknown function, or none to choose by.
    """
    from rltok.rewards import build_rewards

    own: Mapping[str, Any] = (recipe.rewards or {}) if recipe is not None else {}
    if options.rewards:
        section = _asked_rewards(options.rewards, own)
    elif options.best_of is None and not options.recipe_data:
        return None
    elif not own:
        if options.best_of is None:
            return None
        raise ConfigError(
            f"--best-of {options.best_of}: no reward to choose by; give --reward NAME, or a recipe with rewards"
        )
    else:
        section = dict(own)
    found = build_rewards(section, save_dir=options.out)
    if options.best_of is not None and not any(found.weights):
        raise ConfigError(f"--best-of {options.best_of}: every reward has weight 0; give --reward NAME")
    return found


def _asked_rewards(references: Sequence[str], own: Mapping[str, Any]) -> dict[str, Any]:
    """Section `rewards` for names of the recipe's rewards, registered names and `file.py:function`; weight 1 each."""
    from rltok.rewards import REWARDS

    section: dict[str, Any] = {}
    for reference in references:
        name = reference.rpartition(":")[2]
        if name in section:
            raise ConfigError(f"--reward {reference}: {name!r} is given twice; leave one out")
        if ":" not in reference and reference not in own and reference not in REWARDS:
            known = [*own, *REWARDS, "module:function", "path/file.py:function"]
            raise ConfigError(f"--reward {reference}: unknown reward{suggestion(reference, known)}")
        section[name] = {**own.get(reference, {"function": reference}), "weight": 1.0}
    return section


def _check_columns(rewards: RewardSet | None, rows: Sequence[Row]) -> None:
    """Refuse rows that a reward function of ours cannot judge, before the time that generation takes."""
    from rltok.rewards import REWARDS

    for guard in [] if rewards is None else rewards.functions:
        function: Any = getattr(guard, "function", None)
        if type(function) not in REWARDS.values():
            continue  # a function of the user is called on real completions only
        columns = {name: [row[name] for row in rows] for name in rows[0] if name != "prompt"}
        empty: list[Any] = [
            [{"role": "assistant", "content": ""}] if isinstance(row["prompt"], list) else "" for row in rows
        ]
        try:
            function(
                prompts=[row["prompt"] for row in rows], completions=empty, completion_ids=[[] for _ in rows], **columns
            )
        except (ValueError, KeyError, TypeError) as error:
            raise ConfigError(f"--reward {guard.__name__}: cannot judge these prompts: {error}") from error


def score_completions(
    completions: Sequence[Generated],
    rows: Sequence[Row],
    tokenizer: PreTrainedTokenizerBase,
    rewards: RewardSet | None,
) -> dict[str, list[float]]:
    """Name of the reward function -> reward of every completion, NaN where it does not apply.

    Raises:
        ConfigError: a function raised, or returned no number.
    """
    from rltok.rewards import RewardError

    if rewards is None:
        return {}
    try:
        return score([rows[one.row] for one in completions], tokenizer, [one.ids for one in completions], rewards)
    except RewardError as error:
        raise ConfigError(f"--reward {error}") from error


def total_rewards(scores: Mapping[str, Sequence[float]], rewards: RewardSet | None) -> list[float]:
    """Weighted sum of every completion's rewards, without those that do not apply; NaN where none applies."""
    if rewards is None:
        return []
    weights = dict(zip(rewards.names, rewards.weights, strict=True))
    totals = []
    for values in zip(*(scores[name] for name in weights), strict=True):
        pairs = [(w, v) for w, v in zip(weights.values(), values, strict=True) if not math.isnan(v)]
        totals.append(sum(w * v for w, v in pairs) if pairs else math.nan)
    return totals


def choose(completions: Sequence[Generated], totals: Sequence[float]) -> list[bool]:
    """Which completion of every prompt has the highest total reward; the first of equals, NaN below every number."""
    best: dict[int, int] = {}
    ranks = [-math.inf if math.isnan(total) else total for total in totals]
    for index, one in enumerate(completions):
        if one.row not in best or ranks[index] > ranks[best[one.row]]:
            best[one.row] = index
    kept = set(best.values())
    return [index in kept for index in range(len(completions))]


def reward_means(
    scores: Mapping[str, Sequence[float]], totals: Sequence[float], chosen: Sequence[bool] | None
) -> dict[str, float]:
    """Means over all completions by function, of the `total`, and of the `chosen` ones' totals."""
    means = {name: _mean(values) for name, values in scores.items()}
    if scores:
        means["total"] = _mean(totals)
    if chosen is not None:
        means["chosen"] = _mean([total for total, is_chosen in zip(totals, chosen, strict=True) if is_chosen])
    return means


def _mean(values: Sequence[float]) -> float:
    known = [value for value in values if not math.isnan(value)]
    return sum(known) / len(known) if known else math.nan


# Generation


def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[list[int]],
    decoding: Sequence[DecodingModule] = (),
    sampling: Sampling = Sampling(),
    *,
    entropy_stats: EntropyStats | None = None,
    steering: SteeringConfig | None = None,
    on_batch: Callable[[int], None] | None = None,
) -> list[Generated]:
    """Completions in the order of the prompts, those of a prompt adjacent, with what was recorded of every token.

    The caller's random state and the model's mode are as before afterwards; longer prompts are completed first.

    Args:
        prompts: token ids.
        decoding: methods; those of strength 0 change no bit of ids and log-probabilities.
        entropy_stats: for adaptive temperature (`rltok.sampler_stats`).
        on_batch: called after every batch with the number of completions it made.

    Raises:
        ValueError: the tokenizer lacks what a method names, or statistics are missing.
    """
    ends = end_ids(model, tokenizer)
    context = decoding_context(decoding, tokenizer, sampling.temperature, entropy_stats, ends)
    places = [(row, sample) for row in range(len(prompts)) for sample in range(sampling.num_samples)]
    order = sorted(range(len(places)), key=lambda i: len(prompts[places[i][0]]), reverse=True)
    found: dict[int, Generated] = {}
    with isolated_rng(sampling.seed), inference(model, steering):
        for start in range(0, len(order), sampling.batch_size):
            batch = order[start : start + sampling.batch_size]
            named = [(_name(m), p) for m in run_order(decoding) for p in make_processors([m], context)]
            recorder = SampledLogps(greedy="record")
            ids = generate_batch(
                model,
                tokenizer,
                [prompts[places[i][0]] for i in batch],
                sampling.max_new_tokens,
                sampling.temperature,
                sampling.top_p,
                sampling.top_k,
                processors=[processor for _, processor in named],
                recorder=recorder,
            )
            logps = recorder.finish(ids)
            traces = token_traces(named)
            for at, i in enumerate(batch):
                columns = _columns(logps[at], traces, at, sampling.temperature)
                found[i] = Generated(*places[i], ids[at], columns)
            if on_batch is not None:
                on_batch(len(batch))
    return [found[i] for i in range(len(places))]


def _name(module: DecodingModule) -> str:
    return next((name for name, cls in DECODING.items() if cls is type(module)), type(module).__name__)


def token_traces(named: Sequence[tuple[str, RolloutProcessor]]) -> dict[str, Tensor]:
    """Column -> (B, steps), what the processors of a call recorded.

    The bias of cyclic_reflex is `wave`, the factor T_t / T_b of adaptive_temperature `temperature`. Other values keep
    their name, with the method in front where two methods use the same one.
    """
    special: dict[str, Tensor] = {}
    others: list[tuple[str, str, Tensor]] = []
    for name, processor in named:
        for key, values in processor.trace().items():
            if key == "bias" and isinstance(processor, CyclicReflexLogitsProcessor):
                special["wave"] = values
            else:
                others.append((name, key, values))
        factors = processor.factors() if isinstance(processor, AdaptiveTemperature) else None
        if factors is not None:
            special["temperature"] = factors
    taken = Counter([*TOKEN_COLUMNS, *(key for _, key, _ in others)])
    return special | {key if taken[key] == 1 else f"{name}_{key}": values for name, key, values in others}


def _columns(logps: list[float], traces: Mapping[str, Tensor], row: int, temperature: float) -> dict[str, list[Any]]:
    """Columns of one completion; what was generated after its end is left out."""
    length = len(logps)
    own = {name: values[row, :length].tolist() for name, values in traces.items()}
    factors = own.pop("temperature", [1.0] * length)
    temperatures = [None if temperature == 0 else temperature * factor for factor in factors]
    return {"logp": logps, "temperature": temperatures, "wave": own.pop("wave", [0.0] * length), **own}


# Files


def _records(
    completions: Sequence[Generated],
    rows: Sequence[Row],
    tokenizer: PreTrainedTokenizerBase,
    scores: Mapping[str, Sequence[float]],
    totals: Sequence[float],
    chosen: Sequence[bool] | None,
    settings: Mapping[str, Any],
    ends: set[int],
) -> list[dict[str, Any]]:
    """Lines of generations.jsonl, which `rltok attend --completions` reads as well."""
    texts = tokenizer.batch_decode([one.ids for one in completions], skip_special_tokens=True)
    return [
        {
            "index": index,
            "row": one.row,
            "sample": one.sample,
            "prompt": rows[one.row]["prompt"],
            "completion": texts[index],
            "token_ids": one.ids,
            "tokens": token_texts(tokenizer, one.ids),
            "length": len(one.ids),
            "ended": one.ids[-1] in ends,
            "logp": math.fsum(one.columns["logp"]),
            "rewards": {name: values[index] for name, values in scores.items()},
            "reward": totals[index] if totals else None,
            "chosen": None if chosen is None else chosen[index],
            **settings,
        }
        for index, one in enumerate(completions)
    ]


def _write(
    out: Path, records: Sequence[Mapping[str, Any]], completions: Sequence[Generated], facts: Mapping[str, Any]
) -> None:
    """Completions first, settings last: where generation.json is, the others are whole and belong to it."""
    (out / "generation.json").unlink(missing_ok=True)
    write_atomically(out / "generations.jsonl", "".join(json_line(record) for record in records))
    _write_tokens(out / "tokens.parquet", records, completions)
    write_json(out / "generation.json", facts)


def _write_tokens(path: Path, records: Sequence[Mapping[str, Any]], completions: Sequence[Generated]) -> None:
    import pandas as pd

    parts = [
        pd.DataFrame(
            {
                "completion": record["index"],
                "position": range(len(one.ids)),
                "token_id": one.ids,
                "token": record["tokens"],
                **one.columns,
                "temperature": pd.Series(one.columns["temperature"], dtype="float64"),  # null where greedy
            }
        )
        for record, one in zip(records, completions, strict=True)
    ]
    table = pd.concat(parts, ignore_index=True)
    draft = path.with_name(path.name + ".part")
    table[[*TOKEN_COLUMNS, *(name for name in table.columns if name not in TOKEN_COLUMNS)]].to_parquet(draft)
    draft.replace(path)


# Terminal


def _printer(console: Console) -> Callable[[str], None]:
    return lambda line: console.print(line, highlight=False, soft_wrap=True, markup=False)


def _print_table(records: Sequence[Mapping[str, Any]], is_best_of: bool, console: Console) -> None:
    shown = [record for record in records if record["chosen"] is not False]
    title = "best completion of the first prompts" if is_best_of else "first completions"
    table = Table(title=title, title_justify="left")
    names = list(records[0]["rewards"])
    table.add_column("prompt", ratio=2)
    table.add_column("completion", ratio=3)
    for name in ("tokens", "logp", *names):
        table.add_column(Text(name), justify="right")
    for record in shown[:SHOWN]:
        prompt = record["prompt"]
        asked = prompt if isinstance(prompt, str) else prompt[-1]["content"]
        numbers = [str(record["length"]), f"{record['logp']:.2f}", *(_short(record["rewards"][n]) for n in names)]
        table.add_row(_line(asked, 60), _line(record["completion"], 120), *numbers)
    console.print(table)


def _line(text: str, length: int) -> Text:
    return Text(clip(" ".join(text.split()), length))


def _short(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:.4g}"


def _print_summary(facts: Mapping[str, Any], out: Path, console: Console) -> None:
    lines = {"completions": f"{facts['completions']} of {facts['prompts']} prompts, {facts['tokens']} tokens"}
    if facts["means"]:
        lines["mean rewards"] = "  ".join(f"{name} {_short(value)}" for name, value in facts["means"].items())
    methods: Iterator[str] = (item["type"] for item in facts["decoding"])
    lines |= {
        "decoding": ", ".join(methods) or "plain",
        "sampling": json.dumps(facts["sampling"] | {"seed": facts["seed"]}),
        "files": " ".join(str(out / name) for name in ("generations.jsonl", "tokens.parquet", "generation.json")),
    }
    print_facts(lines, console)
