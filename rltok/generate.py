"""Completions of a checkpoint with decoding methods, to read and to choose from, token by token.

A log-probability is that of the distribution the token was drawn from, with every method, temperature, top-p and top-k.
Greedy decoding draws nothing: its log-probabilities are those of the changed logits at temperature 1.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from rltok.attend import OTHER_ENGINE, WeightType, checkpoint_config, load_policy, print_facts
from rltok.best_of import check_columns, choose, reward_means, reward_set, score_completions, total_rewards
from rltok.complete import (
    CompletionSettings,
    Engine,
    OnRows,
    check_engine,
    check_policy,
    complete,
    decoding_context,
    end_ids,
    named_processors,
    quantized_policy,
    quantizer_name,
)
from rltok.config import ConfigError
from rltok.entropy import EntropyStats
from rltok.fast import LoopMetrics
from rltok.generation_files import Generated, completion_records, token_columns, token_traces, write_generation
from rltok.kv import KVPolicy, build_policy
from rltok.models import load_tokenizer
from rltok.progress import EvaluationBar
from rltok.prompts import Row, asked_as, check_prompt, clip, flag, prompt_tokens, read_rows
from rltok.quant import RolloutQuantSpec
from rltok.quant.config import build_spec
from rltok.recipe import DecodingRecipe, Recipe, load_decoding
from rltok.rollout import build_decoding
from rltok.run import (
    build_steering,
    check_decoding_fits,
    check_vectors,
    evaluation_engine,
    held_out_rows,
    quiet_libraries,
    versions,
)
from rltok.sampler_stats import CALIBRATION_ROWS, calibrate_entropy, checkpoint_stats
from rltok.sampling import DecodingModule

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

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
    min_new_tokens: int | None = None
    """tokens before the first of which no end token is sampled; None is 0"""
    stop: Sequence[str] = ()
    """texts that end a completion, of which they are part"""
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
    engine: Engine | None = None
    """`fast` or `transformers`; None is the recipe's `rollout.engine`, else `fast`"""
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
        zeros = {"temperature": 0, "top_k": 0, "seed": 0, "min_new_tokens": 0}
        for name, least in (limits | zeros).items():
            value = getattr(self, name)
            if value is not None and not (value >= least and math.isfinite(value)):
                raise ConfigError(f"{flag(name)} {value} must be >= {least} and finite")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ConfigError(f"--top-p {self.top_p} must be > 0 and <= 1")
        if "" in self.stop:
            raise ConfigError("--stop '': every completion would end before its first token; give a text")

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
    min_new_tokens: int = 0
    stop_strings: tuple[str, ...] = ()
    num_samples: int = 1
    seed: int = 0
    batch_size: int = 16
    """completions made at once; part of the settings that decide a sample with the engine `transformers`"""
    engine: Engine = "fast"

    def settings(self) -> CompletionSettings:
        """The same for every single completion."""
        return CompletionSettings(**{name: value for name, value in vars(self).items() if name != "num_samples"})


@dataclass(frozen=True)
class Generation:
    """What `generate` made."""

    completions: list[Generated]
    """in the order of the prompts, those of a prompt adjacent"""
    cost: LoopMetrics | None
    """of the rollout loop; None from transformers"""


def run_generate(options: GenerateOptions, console: Console) -> int:
    """Make, score and write completions; print the first ones.

    Raises:
        ConfigError: options, recipes, files, rewards or models that cannot be used.
    """
    quiet_libraries()
    plan = DecodingRecipe() if options.decoding == NO_RECIPE else load_decoding(options.decoding, options.overrides)
    decoding = build_decoding(plan.decoding, "decoding")
    steering = build_steering(plan.steering, "steering")
    kv = None if plan.kv is None else build_policy(plan.kv, "kv")
    quant = build_spec(plan.quant, "quant")
    sampling = resolve_sampling(options, plan.recipe)
    rewards = reward_set(options.rewards, options.best_of, options.recipe_data, options.out, plan.recipe)
    rows = prompt_rows(options, plan.recipe)
    check_columns(rewards, rows)
    check_vectors(steering, "steering")
    config = checkpoint_config(options.checkpoint, options.dtype)
    tokenizer = load_tokenizer(config)
    template = {} if plan.recipe is None else plan.recipe.training.get("chat_template_kwargs") or {}
    prompts = [prompt_tokens(tokenizer, row["prompt"], template)[1] for row in rows]
    check_decoding_fits(decoding, tokenizer, sampling.engine, f"--decoding {options.decoding}")
    check_stop_texts(tokenizer, sampling.stop_strings)
    model = load_policy(config)
    check_engine(model, sampling.engine, OTHER_ENGINE)
    check_policy(model, kv)
    quantized_policy(model, quant, "quant")
    sampling = fit_context(sampling, prompts, model, has_length=_has_length(options, plan.recipe))
    options.out.mkdir(parents=True, exist_ok=True)
    places = [(row, sample) for row in range(len(prompts)) for sample in range(sampling.num_samples)]
    first = places[:CALIBRATION_ROWS]
    stats = calibrate_entropy(
        model,
        tokenizer,
        [prompts[row] for row, _ in first],
        decoding,
        sampling.settings(),
        places=first,
        saved=checkpoint_stats(options.checkpoint),
        steering=steering,
        kv=kv,
        quant=quant,
        say=_printer(console),
    )
    started = time.monotonic()
    with EvaluationBar(console, "generation", len(places)) as bar:
        made = generate(
            model,
            tokenizer,
            prompts,
            decoding,
            sampling,
            entropy_stats=stats,
            steering=steering,
            kv=kv,
            quant=quant,
            on_rows=bar,
        )
    seconds, completions = time.monotonic() - started, made.completions
    scores = score_completions(completions, rows, tokenizer, rewards)
    totals = total_rewards(scores, rewards)
    chosen = choose(completions, totals) if options.best_of is not None else None
    settings = _settings(sampling, plan)
    records = completion_records(
        completions, rows, tokenizer, scores, totals, chosen, settings, set(end_ids(model, tokenizer))
    )
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
        "cost": None if made.cost is None else _cost(made.cost),
        "versions": versions(),
    }
    write_generation(options.out, records, completions, facts)
    _print_table(records, options.best_of is not None, console)
    _print_summary(facts, options.out, console)
    return 0


def _cost(cost: LoopMetrics) -> dict[str, float]:
    """What the rollout loop counted, in plain values."""
    return asdict(cost) | {"tokens_per_second": round(cost.tokens_per_second, 3), "live_share": cost.live_share}


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
        min_new_tokens=options.min_new_tokens or 0,
        stop_strings=tuple(options.stop),
        seed=options.seed or 0,
        batch_size=options.batch_size,
        engine=options.engine or ("fast" if recipe is None else evaluation_engine(recipe)),
    )
    _check_lengths(sampling)
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


def _check_lengths(sampling: Sampling) -> None:
    if sampling.min_new_tokens > sampling.max_new_tokens:
        raise ConfigError(
            f"--min-new-tokens {sampling.min_new_tokens}: completions have at most {sampling.max_new_tokens} tokens; "
            "give less, or raise --max-new-tokens"
        )


def check_stop_texts(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> None:
    """Raise ConfigError where the text of a tokenizer's tokens is unknown, in which stop texts are looked for."""
    if not texts:
        return
    from transformers import StopStringCriteria

    try:
        StopStringCriteria(tokenizer, list(texts))
    except ValueError as error:
        raise ConfigError(
            f"--stop {texts[0]!r}: this tokenizer does not turn single tokens into text ({error}); leave it out, or "
            "give the tokenizer a decoder"
        ) from error


def _has_length(options: GenerateOptions, recipe: Recipe | None) -> bool:
    return options.max_new_tokens is not None or (
        recipe is not None and recipe.training.get("max_completion_length") is not None
    )


def fit_context(
    sampling: Sampling, prompts: Sequence[Sequence[int]], model: PreTrainedModel, has_length: bool
) -> Sampling:
    """The settings with a completion length that the model's context has room for; one that was asked for stays.

    Raises:
        ConfigError: the longest prompt, or it and a length that was asked for, do not fit; or nor does the least one.
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
    fitted = replace(sampling, max_new_tokens=min(sampling.max_new_tokens, room))
    _check_lengths(fitted)
    return fitted


def _settings(sampling: Sampling, plan: DecodingRecipe) -> dict[str, Any]:
    """What decides a completion besides the model, in plain values."""
    greedy = sampling.temperature == 0
    values = {name: value for name, value in asdict(sampling).items() if name != "seed"}
    return {
        "seed": None if greedy else sampling.seed,
        "sampling": values,
        "decoding": plan.decoding,
        "steering": plan.steering,
        "kv": plan.kv,
        "quant": plan.quant,
    }


# Prompts


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
    kv: KVPolicy | None = None,
    quant: RolloutQuantSpec | None = None,
    on_rows: OnRows | None = None,
) -> Generation:
    """Completions of all prompts with what was recorded of every token.

    The caller's random state and the model's mode are as before afterwards; longer prompts are completed first.

    Args:
        prompts: token ids.
        decoding: methods; those of strength 0 change no bit of ids and log-probabilities.
        entropy_stats: for adaptive temperature (`rltok.sampler_stats`).
        kv: what the cache keeps of every row; None: every token.
        quant: a copy with weights quantised so makes the completions; None or `bits=16`: the model itself.
        on_rows: as completions end, with their number and the tokens sampled since the last call.

    Raises:
        ConfigError: a model that the engine, the cache policy or the quantiser does not serve.
        ValueError: the tokenizer lacks what a method names, or statistics are missing.
    """
    ends = end_ids(model, tokenizer)
    context = decoding_context(decoding, tokenizer, sampling.temperature, entropy_stats, ends)
    places = [(row, sample) for row in range(len(prompts)) for sample in range(sampling.num_samples)]
    parts = complete(
        model,
        tokenizer,
        [prompts[row] for row, _ in places],
        sampling.settings(),
        places=places,
        processors=partial(named_processors, decoding, context),
        record=True,
        steering=steering,
        kv=kv,
        quant=quant,
        on_rows=on_rows,
    )
    found: dict[int, Generated] = {}
    for part in parts:
        assert part.logps is not None
        traces = token_traces(part.processors)
        for at, index in enumerate(part.indices):
            columns = token_columns(part.logps[at], traces, at, sampling.temperature)
            found[index] = Generated(*places[index], part.ids[at], columns)
    return Generation([found[index] for index in range(len(places))], parts[0].metrics if parts else None)


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
        "weights": quantizer_name(build_spec(facts["quant"], "quant")) or facts["dtype"],
        "sampling": json.dumps(facts["sampling"] | {"seed": facts["seed"]}),
        "speed": _speed(facts),
        "files": " ".join(str(out / name) for name in ("generations.jsonl", "tokens.parquet", "generation.json")),
    }
    print_facts(lines, console)


def _speed(facts: Mapping[str, Any]) -> str:
    cost = facts["cost"]
    if cost is None:
        return f"{facts['tokens'] / max(facts['seconds'], 1e-9):.0f} tokens/s"
    return (
        f"{cost['tokens_per_second']:.0f} tokens/s; prompt tokens computed once: {cost['prefill_tokens_saved']} saved"
    )
