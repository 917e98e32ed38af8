"""`rltok quantize`: weights in few bits, once, by RSQ, GPTQ or rounding, as a checkpoint that others load.

OUT/
    config.json, model.safetensors, generation_config.json, tokenizer files
    quantization.json     what was done: method, options, calibration, versions
    quality.json          errors of linears and layers, held-out perplexity and accuracy, before and after
    quality.png, .svg     the same as a picture

Calibration texts are files, or rollouts of the model itself on a recipe's training prompts, sampled at temperature 1.
Held-out texts are likewise files, or such rollouts on the recipe's held-out prompts: there the rise of the loss, in
nats per token, estimates the divergence KL(full || quantised). OUT appears when everything in it is whole.
"""

from __future__ import annotations

import math
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from rich.console import Console
from rich.table import Table

from rltok.attend import OTHER_ENGINE, WeightType, checkpoint_config, load_policy, print_facts, sample_of
from rltok.complete import CompletionSettings, check_engine, complete, completed_ids
from rltok.config import ConfigError
from rltok.evaluate import Evaluation, evaluate, tokenize_prompt
from rltok.files import explained_writes, write_json
from rltok.models import TINY, is_adapter, load_model_config, load_tokenizer, quantizers_folder, resolve_path
from rltok.progress import EvaluationBar, bar
from rltok.prompts import flag, is_conversation, read_rows
from rltok.quant.export import Format, package_problem, write_weights
from rltok.quant.gptq import QuantSpec
from rltok.quant.importance import ImportanceSpec
from rltok.quant.quality import Accuracy, Perplexity, Quality, draw, linear_errors, new_figure, paired_scores
from rltok.quant.quantize import Method, QuantizedModel, quantize_model
from rltok.quant.rotation import KNOWN_MODELS, hadamard
from rltok.quant.texts import SequenceLosses, TokenSequence, calibration, choose, cut, sequence_losses
from rltok.recipe import load_recipe
from rltok.report.environment import versions
from rltok.run import evaluation_options, held_out_rows, quiet_libraries
from rltok.secrets import redacted

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from rltok.recipe import Recipe
    from rltok.rewards import RewardSet

RotationName = Literal["hadamard", "orthogonal", "none"]
SAMPLES, LENGTH, EXPANSION = 128, 2048, 8
"""calibration sequences, their longest, and how often RSQ uses each"""
ONLY_RSQ = ("importance", "r_min", "r_max", "power", "discount")
"""options that weigh tokens"""
LINE_SECONDS = 30.0
"""between two lines of progress where there is no terminal"""


@dataclass(frozen=True)
class QuantizeOptions:
    """What `rltok quantize` was asked for; None takes the default of the method."""

    checkpoint: str
    """a checkpoint or model directory, `tiny-reasoner` or a hub id"""
    out: Path
    """new directory"""
    method: Method = "rsq"
    """rsq, gptq or rtn (round to nearest)"""
    bits: int = 4
    """of a weight, 2 to 8"""
    group_size: int = 128
    """weights of a row that share a scale; -1: all"""
    calibration: Sequence[Path] = ()
    """files of texts: JSON lines or Parquet, column text, or prompt and completion"""
    eval_text: Sequence[Path] = ()
    """files of held-out texts, likewise"""
    recipe: str | None = None
    """whose data and rewards are used; the embedded model takes its demo where no files are given"""
    overrides: Sequence[str] = ()
    """settings that replace the recipe's"""
    rows: int | None = None
    """first rows of each file to read"""
    samples: int = SAMPLES
    """sequences to calibrate on, and as many held-out ones at most"""
    length: int | None = None
    """tokens of a sequence at most; None is `LENGTH`, or the model's context"""
    chat: bool = False
    """make a plain prompt of a file the user message of a conversation"""
    rotation: RotationName | None = None
    """of the residual stream before; None is hadamard for rsq, none for the others"""
    importance: str | None = None
    """rsq: what makes a token important; None is attention_concentration"""
    r_min: float | None = None
    """rsq: importance of a sequence's least token; None is 0.01, without rotation 0.1"""
    r_max: float | None = None
    """rsq: of its first; None is 1"""
    power: int | None = None
    """rsq: a token counts by its importance to this power, 1 or 2; None is 1"""
    discount: str | None = None
    """rsq: divide a score by the queries that see the token (linear) or their root (root); None is neither"""
    expansion: int | None = None
    """times a calibration sequence is used, rolled; None is 8 for rsq, 1 for the others"""
    clip_search: bool = True
    """choose scales among 80 shrunk ones"""
    percdamp: float = 0.01
    """damping of the Hessian, share of its mean diagonal"""
    batch_size: int = 8
    """sequences computed at once"""
    seed: int = 0
    """of the calibration's choice and rollouts, and of the rotation"""
    format: Format = "compressed-tensors"
    """of the weights on disk"""
    picture: bool = True
    """draw quality.png and quality.svg"""
    dtype: WeightType = "auto"
    """of the weights that are not quantised, and of scales; auto: as they are stored"""

    def __post_init__(self) -> None:
        if self.out.exists():
            raise ConfigError(f"--out {self.out}: exists and is not overwritten; give a new directory")
        least = {"rows": 1, "samples": 1, "length": 2, "expansion": 1, "batch_size": 1}
        for name, limit in least.items():
            value = getattr(self, name)
            if value is not None and value < limit:
                raise ConfigError(f"{flag(name)} {value} must be >= {limit}")
        for name in ONLY_RSQ:
            if self.method != "rsq" and getattr(self, name) is not None:
                raise ConfigError(f"{flag(name)} only goes with --method rsq; leave it out")
        with _in_options():
            self.spec()
            self.importance_spec()
        if self.importance == "credit" and not self.calibration:
            raise ConfigError(
                "--importance credit reads a column credit, such as that of a run's completions/*.parquet; name files "
                "with --calibration"
            )
        if self.recipe_name is None:
            self._check_without_recipe()

    def _check_without_recipe(self) -> None:
        if self.overrides:
            raise ConfigError(f"{self.overrides[0]}: changes a recipe; name one with --recipe, or leave it out")
        if self.method != "rtn" and not self.calibration:
            raise ConfigError(
                f"--method {self.method} needs calibration texts: --calibration FILE (JSON lines or Parquet with a "
                "column text, or prompt and completion), or --recipe RECIPE, on whose prompts the model completes"
            )

    @property
    def recipe_name(self) -> str | None:
        """The recipe, where there is one: the demo for the embedded model without files."""
        if self.recipe is None and self.checkpoint == TINY and not (self.calibration or self.eval_text):
            return "demo"
        return self.recipe

    @property
    def turns(self) -> Literal["hadamard", "orthogonal"] | None:
        """The rotation of the method."""
        name = self.rotation or ("hadamard" if self.method == "rsq" else "none")
        return None if name == "none" else name

    @property
    def times(self) -> int:
        """How often a calibration sequence is used."""
        return self.expansion or (EXPANSION if self.method == "rsq" else 1)

    def spec(self) -> QuantSpec:
        """How matrices are rounded; the dtype of the scales is known with the model."""
        return QuantSpec(self.bits, self.group_size, self.clip_search, self.percdamp)

    def importance_spec(self) -> ImportanceSpec | None:
        """How tokens are weighed; None: all alike."""
        if self.method != "rsq":
            return None
        chosen = {name: getattr(self, name) for name in ("r_max", "power", "discount")}
        given: dict[str, Any] = {name: value for name, value in chosen.items() if value is not None}
        low = self.r_min if self.r_min is not None else (0.01 if self.turns else 0.1)
        if self.importance is not None:
            given["score"] = self.importance
        return ImportanceSpec(r_min=low, **given)


@dataclass(frozen=True)
class Task:
    """What a recipe brings: prompts to complete, problems to judge by."""

    name: str
    recipe: Recipe
    rewards: RewardSet
    train: Any
    heldout: Any


@dataclass(frozen=True)
class Texts:
    """Sequences and what they are in words."""

    sequences: list[TokenSequence]
    source: str

    @property
    def tokens(self) -> int:
        """Of all sequences."""
        return sum(len(one.ids) for one in self.sequences)


def run_quantize(options: QuantizeOptions, console: Console) -> int:
    """Quantise a model, measure what it cost, write the checkpoint, and print the table.

    Raises:
        ConfigError: options, files or models that cannot be used, before anything is computed; matplotlib or
            compressed-tensors missing.
    """
    quiet_libraries()
    figure = _figure(options)
    _check_format(options)
    config = checkpoint_config(options.checkpoint, options.dtype)
    tokenizer = load_tokenizer(config)
    about = load_model_config(config)
    _check_model(about, options)
    length = _length(options, about)
    task = None if options.recipe_name is None else load_task(options.recipe_name, options.overrides)
    with explained_writes(options.out, "Nothing is left of it; give another disk with --out DIR"):
        model = load_policy(config)
        if is_adapter(resolve_path(options.checkpoint)):
            print_facts({"adapter": "merged into the weights below it, which are quantised"}, console)
        _quantize(options, console, model, tokenizer, task, length, figure)
    return 0


def _quantize(
    options: QuantizeOptions,
    console: Console,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    task: Task | None,
    length: int,
    figure: Figure | None,
) -> None:
    spec = replace(options.spec(), scale_dtype=model.dtype)
    pad = tokenizer.pad_token_id or 0
    texts = calibration_texts(options, task, model, tokenizer, length, console)
    held_out = held_out_texts(options, task, model, tokenizer, length, console)
    _say_calibration(options, texts, model, console)
    before = _losses(model, held_out, pad, options.batch_size)
    solved = None if task is None else accuracy(task, model, tokenizer, "full precision", console)
    started = time.monotonic()
    with _in_words(options), _bar(console, "quantize") as progress:
        quantized = quantize_model(
            model,
            calibration(texts.sequences, pad, batch_size=options.batch_size, expansion=options.times)
            if texts is not None
            else None,
            spec,
            options.method,
            options.importance_spec(),
            rotation=options.turns,
            seed=options.seed,
            progress=progress,
        )
    seconds = time.monotonic() - started
    after = _losses(model, held_out, pad, options.batch_size)
    quality = Quality(
        quantized,
        _perplexity(held_out, before, after),
        None if task is None or solved is None else _accuracy(task, solved, model, tokenizer, console),
    )
    notes = _notes(options, texts, quantized, model, length, seconds)
    _write(options, model, tokenizer, quality, notes, figure)
    _print(options, quality, model, console)


# What is read


def load_task(name: str, overrides: Sequence[str] = ()) -> Task:
    """Data and rewards of a recipe.

    Raises:
        ConfigError: a recipe that quantises its evaluation itself, or has no held-out row.
    """
    from rltok.config import build
    from rltok.data import DataConfig, load_data
    from rltok.rewards import build_rewards

    recipe = load_recipe(name, overrides)
    if recipe.evaluation.quant is not None:
        raise ConfigError(
            "evaluation.quant: the model that is measured here is the quantised one already; set evaluation.quant=null",
            "evaluation.quant",
        )
    data = load_data(build(DataConfig, recipe.data, "data"), recipe.seed)
    if not len(data.heldout):
        raise ConfigError(f"--recipe {name}: there is no held-out row; set data.heldout_size, or leave --recipe out")
    return Task(name, recipe, build_rewards(recipe.rewards), data.train, data.heldout)


def calibration_texts(
    options: QuantizeOptions,
    task: Task | None,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    length: int,
    console: Console,
) -> Texts | None:
    """Sequences to calibrate on; None where rounding to nearest was given none."""
    if options.calibration:
        found = _read(options, "--calibration", options.calibration, tokenizer, length)
        names = ", ".join(str(path) for path in options.calibration)
        return Texts(choose(found, options.samples, options.seed), names)
    if task is None:
        return None
    sequences = training_rollouts(task, model, tokenizer, options.samples, options.seed, length, console)
    return Texts(sequences, f"own rollouts on {task.name}'s training prompts")


def held_out_texts(
    options: QuantizeOptions,
    task: Task | None,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    length: int,
    console: Console,
) -> Texts | None:
    """Sequences whose loss is compared; None where nothing says which. They do not depend on the seed."""
    if options.eval_text:
        found = _read(options, "--eval-text", options.eval_text, tokenizer, length)
        return Texts(choose(found, options.samples, 0), ", ".join(str(path) for path in options.eval_text))
    if task is None:
        return None
    rows = [task.heldout[i] for i in range(min(options.samples, held_out_rows(task.recipe, task.heldout)))]
    seed = task.recipe.evaluation.seed
    sequences = rollouts(task, model, tokenizer, rows, seed, length, "held-out texts", console)
    return Texts(sequences, f"own rollouts on {task.name}'s held-out prompts")


def training_rollouts(
    task: Task,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    samples: int,
    seed: int,
    length: int,
    console: Console,
) -> list[TokenSequence]:
    """Rollouts on `samples` training prompts; the seed chooses the prompts and samples the completions."""
    places = choose([TokenSequence([i]) for i in range(len(task.train))], samples, seed)
    rows = [task.train[one.ids[0]] for one in places]
    return rollouts(task, model, tokenizer, rows, seed, length, "calibration", console)


def rollouts(
    task: Task,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Mapping[str, Any]],
    seed: int,
    length: int,
    label: str,
    console: Console,
) -> list[TokenSequence]:
    """Prompts with completions that the model samples at temperature 1, in the tokens it sampled."""
    settings = evaluation_options(task.recipe)
    check_engine(model, settings["engine"], OTHER_ENGINE.replace("give --engine ", "set rollout.engine="))
    template = settings["chat_template_kwargs"] or {}
    prompts = [tokenize_prompt(tokenizer, row["prompt"], template) for row in rows]
    sampling = CompletionSettings(
        settings["max_new_tokens"], 1.0, seed=seed, batch_size=settings["batch_size"], engine=settings["engine"]
    )
    with EvaluationBar(console, label, len(prompts), task.recipe.report.progress) as on_rows:
        parts = complete(model, tokenizer, prompts, sampling, on_rows=on_rows)
    pairs = zip(prompts, completed_ids(parts), strict=True)
    return [TokenSequence([*prompt, *ids][:length], len(prompt)) for prompt, ids in pairs]


def _read(
    options: QuantizeOptions, option: str, paths: Sequence[Path], tokenizer: PreTrainedTokenizerBase, length: int
) -> list[TokenSequence]:
    """All sequences of files of texts, or of prompts with completions."""
    found: list[TokenSequence] = []
    for path in paths:
        for number, row in enumerate(read_rows(path, option, (), None, options.rows), start=1):
            where = f"{option} {path}, row {number}"
            if row.get("text") is not None:
                found += _of_text(row["text"], tokenizer, length, where)
            elif row.get("completion") is not None:
                found += _of_completion(row, tokenizer, options, length, where)
            else:
                columns = ", ".join(row) or "none"
                raise ConfigError(f"{where}: there is no column text, or prompt and completion; found: {columns}")
    if options.importance == "credit" and option == "--calibration" and any(one.credit is None for one in found):
        raise ConfigError(
            f"{option}: --importance credit needs the column credit in every row, beside prompt and completion"
        )
    if not found:
        raise ConfigError(f"{option}: no text of the files has two tokens")
    return found


def _of_text(value: Any, tokenizer: PreTrainedTokenizerBase, length: int, where: str) -> list[TokenSequence]:
    if is_conversation(value):
        value = "\n".join(message["content"] for message in value)
    if not isinstance(value, str):
        raise ConfigError(f"{where}: {value!r} is neither text nor messages of text")
    ids = tokenizer(value, add_special_tokens=False, verbose=False)["input_ids"]
    marked, plain = (tokenizer("a", add_special_tokens=special)["input_ids"] for special in (True, False))
    opening = marked[: marked.index(plain[0])]
    try:
        return cut(ids, length, opening)
    except ValueError as error:
        raise ConfigError(f"--{error}") from error


def _of_completion(
    row: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase, options: QuantizeOptions, length: int, where: str
) -> list[TokenSequence]:
    sample = sample_of({"prompt": "", **row}, tokenizer, options.chat, where)
    ids, start = [*sample.prompt_ids, *sample.completion_ids], len(sample.prompt_ids)
    credit = row.get("credit") if options.importance == "credit" else None
    if credit is not None:
        if len(credit) != len(sample.completion_ids):
            raise ConfigError(
                f"{where}: {len(credit)} numbers in the column credit for {len(sample.completion_ids)} tokens of the "
                "completion; the text tokenises otherwise than it was sampled, leave the row out"
            )
        credit = [0.0] * start + [float(value or 0.0) for value in credit]
    one = TokenSequence(ids[:length], max(1, start), None if credit is None else credit[:length])
    return [one] if len(one.ids) > 1 else []


# What is checked before


def _figure(options: QuantizeOptions) -> Figure | None:
    if not options.picture:
        return None
    try:
        return new_figure()
    except ImportError:
        raise ConfigError(
            "the picture needs matplotlib: pip install rltok[plot], or leave it out with --no-picture"
        ) from None


def _check_format(options: QuantizeOptions) -> None:
    problem = package_problem() if options.format == "compressed-tensors" else None
    if problem is not None:
        raise ConfigError(f"--format {options.format}: {problem}, or give --format dequantized")


def _check_model(about: Any, options: QuantizeOptions) -> None:
    """Refuse, by the model's configuration alone, what would fail behind hours of work."""
    where = f"{options.checkpoint}:"
    if getattr(about, "quantization_config", None) is not None:
        raise ConfigError(f"{where} is quantised already; give the checkpoint that it was made from")
    if quantizers_folder(resolve_path(options.checkpoint)) is not None:
        raise ConfigError(
            f"{where} has fake quantisers of its own (quantization_aware.json), which another rounding would spoil; "
            "`convert` has put its weights on their grid, or give a model that was trained without quantization_aware"
        )
    if about.model_type not in KNOWN_MODELS:
        raise ConfigError(f"{where} layers of model_type {about.model_type!r} are not known; {', '.join(KNOWN_MODELS)}")
    head = getattr(about, "head_dim", None) or about.hidden_size // about.num_attention_heads
    inputs = {
        "hidden_size": about.hidden_size,
        "num_attention_heads x head_dim": about.num_attention_heads * head,
        "intermediate_size": about.intermediate_size,
    }
    with _in_options():
        for name, width in inputs.items():
            if options.group_size != -1 and width % options.group_size:
                most = math.gcd(*inputs.values())
                raise ConfigError(
                    f"--group-size {options.group_size} does not divide {name} {width} of {options.checkpoint}; give a "
                    f"divisor of {most}, or -1 (one scale per row)"
                )
        if options.turns == "hadamard":
            for width in (about.hidden_size, head):
                _check_hadamard(width)


def _check_hadamard(width: int) -> None:
    try:
        hadamard(width)
    except ValueError:
        raise ConfigError(
            f"--rotation hadamard: no Hadamard matrix of size {width} (hidden_size or head_dim) is known; give "
            "--rotation orthogonal or none"
        ) from None


def _length(options: QuantizeOptions, about: Any) -> int:
    limit = getattr(about, "max_position_embeddings", None) or LENGTH
    if options.length is not None and options.length > limit:
        raise ConfigError(
            f"--length {options.length}: the model is made for {limit} tokens (max_position_embeddings); give at most "
            "that"
        )
    return options.length or min(LENGTH, limit)


@contextmanager
def _in_options() -> Iterator[None]:
    """What a setting's own check refuses, under the name of its option."""
    try:
        yield
    except ConfigError:
        raise
    except ValueError as error:
        name, equals, rest = str(error).partition("=")
        option = {"score": "importance"}.get(name, name)
        raise ConfigError(f"{flag(option)}{equals}{rest}" if equals else str(error)) from error


@contextmanager
def _in_words(options: QuantizeOptions) -> Iterator[None]:
    """What the quantiser refuses, as errors of this command."""
    try:
        yield
    except ConfigError:
        raise
    except ValueError as error:
        raise ConfigError(f"rltok quantize {options.checkpoint}: {error}") from error


# What is measured


def _losses(model: PreTrainedModel, texts: Texts | None, pad: int, batch_size: int) -> SequenceLosses | None:
    return None if texts is None else sequence_losses(model, texts.sequences, pad, batch_size)


def _perplexity(texts: Texts | None, before: SequenceLosses | None, after: SequenceLosses | None) -> Perplexity | None:
    if texts is None or before is None or after is None:
        return None
    return Perplexity(texts.source, len(texts.sequences), int(before.tokens.sum()), before.mean, after.mean)


def accuracy(
    task: Task, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, label: str, console: Console
) -> Evaluation:
    """Rewards of plain greedy completions of the recipe's held-out rows."""
    settings = evaluation_options(task.recipe)
    names = ("max_new_tokens", "batch_size", "engine", "chat_template_kwargs")
    rows = [task.heldout[i] for i in range(held_out_rows(task.recipe, task.heldout))]
    with EvaluationBar(console, f"evaluation, {label}", len(rows), task.recipe.report.progress) as on_rows:
        return evaluate(
            model,
            tokenizer,
            rows,
            task.rewards,
            temperature=0.0,
            **{name: settings[name] for name in names},
            on_rows=on_rows,
        )


def _accuracy(
    task: Task, before: Evaluation, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, console: Console
) -> Accuracy:
    after = accuracy(task, model, tokenizer, "quantized", console)
    return Accuracy(task.name, len(after.rows), paired_scores(before.rows, after.rows, list(after.means)))


# What is written


def _notes(
    options: QuantizeOptions,
    texts: Texts | None,
    quantized: QuantizedModel,
    model: PreTrainedModel,
    length: int,
    seconds: float,
) -> dict[str, Any]:
    """What was done, for whoever finds the checkpoint."""
    spec, importance, rotation = quantized.spec, quantized.importance, quantized.rotation
    notes = {
        "checkpoint": options.checkpoint,
        "adapter_merged": is_adapter(resolve_path(options.checkpoint)),
        "method": options.method,
        "bits": spec.bits,
        "group_size": spec.group_size,
        "clip_search": spec.clip_search,
        "percdamp": spec.percdamp,
        "scale_dtype": str(spec.scale_dtype).removeprefix("torch."),
        "symmetric": True,
        "rotation": None if rotation is None else {"kind": options.turns, "heads": rotation.head_matrix is not None},
        "tie_word_embeddings": bool(model.config.tie_word_embeddings),
        "importance": None if importance is None else asdict(importance),
        "calibration": None
        if texts is None
        else {
            "source": texts.source,
            "sequences": len(texts.sequences),
            "tokens": texts.tokens,
            "length": length,
            "expansion": options.times,
        },
        "seed": options.seed,
        "format": options.format,
        "linears": list(quantized.states),
        "seconds": round(seconds, 1),
        "versions": versions(),
    }
    redact: dict[str, Any] = redacted(notes)
    return redact


def _write(
    options: QuantizeOptions,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    quality: Quality,
    notes: Mapping[str, Any],
    figure: Figure | None,
) -> None:
    """All files in a directory beside `out`, then one rename."""
    options.out.parent.mkdir(parents=True, exist_ok=True)
    draft = Path(tempfile.mkdtemp(prefix=f".{options.out.name}.", dir=options.out.parent))
    try:
        draft.chmod(0o755)  # mkdtemp's directory is the owner's alone
        write_weights(model, quality.quantized, draft, options.format)
        tokenizer.save_pretrained(draft)
        write_json(draft / "quantization.json", notes)
        write_json(draft / "quality.json", redacted(quality.to_json()))
        if figure is not None:
            draw(figure, quality, draft, _title(options))
        if options.out.exists():
            raise ConfigError(f"--out {options.out}: appeared in the meantime and is not overwritten; give another")
        draft.rename(options.out)
    except BaseException:
        shutil.rmtree(draft, ignore_errors=True)
        raise


# Terminal


def _title(options: QuantizeOptions) -> str:
    group = "one scale per row" if options.group_size == -1 else f"groups of {options.group_size}"
    turned = f", rotation {options.turns}" if options.turns else ""
    return str(redacted(f"{options.checkpoint}: {options.method}, {options.bits} bits, {group}{turned}"))


def _say_calibration(options: QuantizeOptions, texts: Texts | None, model: PreTrainedModel, console: Console) -> None:
    if texts is None:
        print_facts({"calibration": "none: errors are not measured"}, console)
        return
    used = texts.tokens * options.times
    times = f", each also rolled {options.times - 1} times" if options.times > 1 else ""
    size = used * model.config.hidden_size * model.dtype.itemsize
    print_facts(
        {
            "calibration": f"{len(texts.sequences)} sequences of {texts.tokens} tokens{times}; {texts.source}",
            "hidden states": f"{size / 2**20:.0f} MiB are held between layers",
        },
        console,
    )
    if used < model.config.intermediate_size and options.method != "rtn":
        print_facts(
            {
                "note": f"{used} tokens are fewer than the {model.config.intermediate_size} inputs of a down "
                "projection, so that damping decides part of its rounding; raise --samples or --length"
            },
            console,
        )


def _print(options: QuantizeOptions, quality: Quality, model: PreTrainedModel, console: Console) -> None:
    if any(layer.error is not None for layer in quality.quantized.layers):
        console.print(_error_table(quality.quantized))
    ppl, acc = quality.perplexity, quality.accuracy
    if ppl is not None or acc is not None:
        shown = Table()
        for name in ("held out", "full precision", f"{options.method}, {options.bits} bits", "fell", "rose"):
            shown.add_column(name, justify="left" if name == "held out" else "right")
        if ppl is not None:
            shown.add_row("perplexity", f"{math.exp(ppl.full):.4f}", f"{math.exp(ppl.quantized):.4f}", "", "")
        for name, score in ({} if acc is None else acc.scores).items():
            shown.add_row(name, f"{score.full:.4f}", f"{score.quantized:.4f}", str(score.fell), str(score.rose))
        console.print(shown)
    facts = {}
    if ppl is not None:
        facts["perplexity"] = f"of {ppl.tokens} tokens in {ppl.sequences} sequences; {ppl.source}"
    if acc is not None:
        facts["greedy"] = f"completions of {acc.problems} held-out problems of {acc.source}"
    facts["checkpoint"] = f"{options.out}, {_megabytes(options.out)}, {options.format}"
    print_facts(facts, console)


def _error_table(quantized: QuantizedModel) -> Table:
    """Relative squared errors, a row per layer; above: share of tokens in the upper half of the importance range."""
    shown = Table(title="relative squared error of outputs, in %", title_justify="left")
    errors = linear_errors(quantized)
    weighed = any(layer.weighted_error is not None for layer in quantized.layers)
    for name in ("layer", *errors, "whole", *(("weighted", "above") if weighed else ())):
        shown.add_column(name, justify="right")
    for place, layer in enumerate(quantized.layers):
        cells = [*(column[place] for column in errors.values()), layer.error]
        last = [_short(layer.weighted_error), _percent(layer.share_above_middle)] if weighed else []
        shown.add_row(str(layer.layer), *map(_short, cells), *last)
    return shown


def _short(error: float | None) -> str:
    return "" if error is None else f"{100 * error:.2g}"


def _percent(share: float | None) -> str:
    return "" if share is None else f"{100 * share:.0f} %"


def _megabytes(folder: Path) -> str:
    size = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    return f"{size / 1e6:.1f} MB of weights"


@contextmanager
def _bar(console: Console, label: str) -> Iterator[Callable[[int, int, str], None]]:
    """A bar over linears in a terminal, elsewhere a line for every half minute."""
    if console.is_terminal:
        with bar(console) as display:
            task = display.add_task(label, total=None, detail="linears")
            yield lambda done, total, name: display.update(task, completed=done, total=total)
        return
    last = time.monotonic()

    def line(done: int, total: int, name: str) -> None:
        nonlocal last
        if time.monotonic() - last >= LINE_SECONDS:
            last = time.monotonic()
            console.print(f"{label}: {done}/{total} linears  {name}", highlight=False, soft_wrap=True)

    yield line
