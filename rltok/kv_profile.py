"""`rltok profile`: what a cache policy needs to know of a model, measured once and kept as a small JSON table.

    compress_kv       which query heads retrieve (needles in a haystack of one's own texts), and what a small cache
                      costs in every layer
    razor_attention   which key-value heads repeat and continue what they saw (random tokens, several times over)

A table belongs to a model with its tokenizer; training moves the model away from it, slowly.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from rltok.attend import WeightType, checkpoint_config, load_policy
from rltok.complete import CompletionSettings, complete, completed_ids
from rltok.config import ConfigError, suggestion
from rltok.kv.compress_kv import budgets_of
from rltok.kv.compress_profile import (
    ERROR_BUDGET,
    FIRST,
    RECALL,
    HeadScores,
    first_heads,
    full_layers,
    head_scores,
    layer_errors,
    normalised_errors,
)
from rltok.kv.needles import Needle, encode_sentences, make_needles
from rltok.kv.tables import CompressTable, ModelFacts, RazorTable, write_table
from rltok.models import TINY, load_model_config, load_tokenizer
from rltok.progress import EvaluationBar, bar
from rltok.prompts import flag, is_conversation, read_rows
from rltok.recipe import dump_yaml, load_recipe
from rltok.run import quiet_libraries

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

POLICIES = ("compress_kv", "razor_attention")
"""policies that read a table"""
ONLY_FOR = {
    "texts": "compress_kv",
    "rows": "compress_kv",
    "samples": "compress_kv",
    "length": "compress_kv",
    "max_new_tokens": "compress_kv",
    "heads": "compress_kv",
    "error_budget": "compress_kv",
    "recall": "compress_kv",
    "teacher_forced": "compress_kv",
    "question": "compress_kv",
    "chat": "compress_kv",
    "tokens": "razor_attention",
    "copies": "razor_attention",
}
"""option -> the policy that reads it"""
WINDOW, KERNEL = 8, 5
"""of CompressKV while its errors are measured: its defaults"""
SAMPLES, LENGTH, MAX_NEW_TOKENS = 16, 2048, 50
TOKENS, COPIES = 2500, 4
"""of RazorAttention's random text, as in the paper"""
QUESTION = "\n\nOne sentence of the text above, repeated word for word:"
"""what stands between the haystack and the beginning of the needle"""
EXAMPLE_BUDGET = 256
"""budget of the printed recipe"""
BATCH = 8
"""answers decoded at once"""
EMBEDDED_ROWS = 64
"""problems of every step of the embedded model's tasks that make texts"""


@dataclass(frozen=True)
class ProfileOptions:
    """What `rltok profile` was asked for; None takes the default of the policy."""

    policy: str
    """compress_kv or razor_attention"""
    checkpoint: str
    """a checkpoint or model directory, `tiny-reasoner` or a hub id"""
    out: Path
    """the JSON file"""
    texts: Sequence[Path] = ()
    """files of texts, each a data set: JSON lines or Parquet, column text, or prompt and completion"""
    rows: int | None = None
    """first rows of each file to read"""
    samples: int | None = None
    """needles of a data set"""
    length: int | None = None
    """tokens of a prompt"""
    max_new_tokens: int | None = None
    """longest answer, tokens; also of a needle that is one"""
    heads: int | None = None
    """query heads of a layer that choose"""
    error_budget: int | None = None
    """tokens of the small cache whose error is measured"""
    recall: float | None = None
    """share of the needle above which an answer counts"""
    teacher_forced: bool = False
    """the needle itself is the answer"""
    question: str | None = None
    """text between haystack and cue"""
    chat: bool = False
    """haystack and question are the user's message of the tokenizer's chat template"""
    tokens: int | None = None
    """random tokens that are repeated"""
    copies: int | None = None
    """times they stand there"""
    seed: int = 0
    """of needles and haystacks, or of random tokens"""
    dtype: WeightType = "float32"
    """of the weights"""

    def __post_init__(self) -> None:
        if self.policy not in POLICIES:
            raise ConfigError(f"POLICY {self.policy!r} has no table{suggestion(self.policy, POLICIES)}")
        for name, owner in ONLY_FOR.items():
            if owner != self.policy and getattr(self, name) not in (None, False, ()):
                raise ConfigError(f"{flag(name)} only goes with {owner}; leave it out")
        if self.out.suffix != ".json" or self.out.is_dir():
            raise ConfigError(f"--out {self.out}: name a file that ends in .json")
        least = {"rows": 1, "samples": 1, "length": 1, "max_new_tokens": 2, "heads": 1, "tokens": 2, "copies": 2}
        for name, limit in {**least, "error_budget": WINDOW + 1}.items():
            value = getattr(self, name)
            if value is not None and value < limit:
                raise ConfigError(f"{flag(name)} {value} must be >= {limit}")
        if self.recall is not None and not 0 <= self.recall < 1:
            raise ConfigError(f"--recall {self.recall} must be in [0, 1)")
        if self.policy == "compress_kv" and not self.texts and self.checkpoint != TINY:
            raise ConfigError(
                "--texts: missing; needles are hidden in texts: JSON lines or Parquet with a column text, or prompt "
                "and completion, such as a run's completions/*.parquet"
            )


def run_profile(options: ProfileOptions, console: Console) -> int:
    """Measure a model, write the table, and print it with the recipe lines that use it.

    Raises:
        ConfigError: options, files or models that cannot be used.
    """
    quiet_libraries()
    if options.policy == "razor_attention":
        return _run_razor(options, console)
    return _run_compress(options, console)


# CompressKV


def _run_compress(options: ProfileOptions, console: Console) -> int:
    config = checkpoint_config(options.checkpoint, options.dtype)
    tokenizer = load_tokenizer(config)
    about = load_model_config(config)
    with _in_words(options):
        layers = full_layers(about)
    facts = ModelFacts.of(about)
    chosen = options.heads or FIRST
    if options.heads is not None and chosen > facts.query_heads:
        raise ConfigError(f"--heads {chosen}: the model has {facts.query_heads} query heads in a layer")
    length = _length(options, about.get_text_config(decoder=True))
    sets = _needles(options, tokenizer, length)
    model = load_policy(config)
    with _in_words(options):
        scored, errors = measure_compress(model, tokenizer, sets, options, console)
    chosen_heads = first_heads(scored.scores, chosen)
    shares = dict(zip(layers, errors, strict=True))
    table = CompressTable(
        model=facts,
        heads=chosen_heads,
        errors=[shares.get(layer) for layer in range(facts.layers)],
        scores=[_rounded(scored.scores.get(layer)) for layer in range(facts.layers)],
        made=_made_compress(options, scored, sets, length, chosen),
    )
    write_table(options.out, table)
    _print_compress(table, scored, options, console)
    return 0


def measure_compress(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    sets: Mapping[str, Sequence[Needle]],
    options: ProfileOptions,
    console: Console,
) -> tuple[HeadScores, list[float]]:
    """Head scores over all needles, and the normalised errors of the layers with full attention.

    Args:
        sets: data set -> its needles.

    Raises:
        ValueError: no answer counts, nothing to measure, or attention that cannot be read.
    """
    needles = [needle for part in sets.values() for needle in part]
    answers = _answers(model, tokenizer, needles, options, console)
    with _bar(console, "heads", len(needles)) as advance:
        recall = RECALL if options.recall is None else options.recall
        scored = head_scores(model, needles, answers, recall, advance)
    heads = first_heads(scored.scores, options.heads or FIRST)
    budget = options.error_budget or ERROR_BUDGET
    found, start = [], 0
    with _bar(console, "layers", len(needles)) as advance:
        for part in sets.values():
            of_part = answers[start : start + len(part)]
            start += len(part)
            errors = layer_errors(model, part, of_part, heads, budget, WINDOW, KERNEL, advance)
            found.append([error for _, error in sorted(errors.items())])
    return scored, normalised_errors(found)


def _answers(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    needles: Sequence[Needle],
    options: ProfileOptions,
    console: Console,
) -> list[list[int]]:
    """What follows every prompt: greedy decoding, or the needle."""
    if options.teacher_forced:
        return [needle.answer for needle in needles]
    settings = CompletionSettings(options.max_new_tokens or MAX_NEW_TOKENS, temperature=0.0, batch_size=BATCH)
    with EvaluationBar(console, "answers", len(needles)) as on_rows:
        parts = complete(model, tokenizer, [needle.prompt for needle in needles], settings, on_rows=on_rows)
    return completed_ids(parts)


def _length(options: ProfileOptions, about: Any) -> int:
    """Tokens of a prompt that leave room for the answer within the model's positions."""
    limit = getattr(about, "max_position_embeddings", None) or sys.maxsize
    answer, budget = options.max_new_tokens or MAX_NEW_TOKENS, options.error_budget or ERROR_BUDGET
    most = limit - answer
    if most <= budget:
        raise ConfigError(
            f"--max-new-tokens {answer} leaves {most} of the model's {limit} positions (max_position_embeddings) to a "
            f"prompt, which must be longer than --error-budget {budget}; lower either"
        )
    if options.length is not None and options.length <= budget:
        raise ConfigError(f"--length {options.length} must be above --error-budget {budget}, which would keep it all")
    if options.length is not None and options.length > most:
        raise ConfigError(
            f"--length {options.length}: prompt and answer may have {limit} tokens (max_position_embeddings), so "
            f"--length {most} is the most"
        )
    return options.length or min(LENGTH, most)


def _needles(options: ProfileOptions, tokenizer: PreTrainedTokenizerBase, length: int) -> dict[str, list[Needle]]:
    """Data set -> its prompts."""
    head, tail = _frame(options, tokenizer)
    sets = {}
    for name, (option, texts) in _texts(options).items():
        sentences = encode_sentences(tokenizer, texts)
        try:
            sets[name] = make_needles(
                sentences,
                options.samples or SAMPLES,
                length,
                options.seed,
                head=head,
                tail=tail,
                longest_answer=options.max_new_tokens or MAX_NEW_TOKENS,
            )
        except ValueError as error:
            raise ConfigError(f"{option}: {error}; the length is that of --length {length}") from error
    return sets


def _texts(options: ProfileOptions) -> dict[str, tuple[str, list[str]]]:
    """Data set -> the option that names it, and its texts."""
    if not options.texts:
        return {task: (f"tiny-reasoner's {task}", texts) for task, texts in embedded_texts(options.seed).items()}
    found = {}
    for path in options.texts:
        option = f"--texts {path}"
        rows = read_rows(path, "--texts", (), None, options.rows)
        name = path.name if path.name not in found else str(path)
        found[name] = (option, [_text_of(row, f"{option}, row {number}") for number, row in enumerate(rows, start=1)])
    return found


def _text_of(row: Mapping[str, Any], where: str) -> str:
    """A row's text: its column text, else prompt and completion."""
    names = ("text",) if row.get("text") is not None else ("prompt", "completion")
    parts = []
    for value in (row[name] for name in names if row.get(name) is not None):
        if isinstance(value, str):
            parts.append(value)
        elif is_conversation(value):
            parts.append("\n".join(message["content"] for message in value))
        else:
            raise ConfigError(f"{where}: {value!r} is neither text nor messages of text")
    if not parts:
        columns = ", ".join(row) or "none"
        raise ConfigError(f"{where}: there is no column text, prompt or completion; found: {columns}")
    return "\n".join(parts)


def embedded_texts(seed: int, rows: int = EMBEDDED_ROWS) -> dict[str, list[str]]:
    """Task of the embedded model -> problems with careful solutions, a line each."""
    import reasoning_gym

    from rltok import tiny

    rng = random.Random(seed)
    texts: dict[str, list[str]] = {}
    for spec in load_recipe("dapo").data["tasks"]:
        entries = reasoning_gym.create_dataset(spec["task"], seed=seed, size=rows, **spec["options"])
        lines = [tiny.prompt_of(entry) + tiny.write_demonstration(entry, rng, {}) for entry in entries]
        texts.setdefault(spec["task"], []).extend(lines)
    return texts


def _frame(options: ProfileOptions, tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """Token ids before the haystack, and between it and the cue."""
    question = options.question
    if question is None:  # the embedded model reads no words
        question = "" if options.checkpoint == TINY else QUESTION
    if not options.chat:
        plain = tokenizer("a", add_special_tokens=False)["input_ids"]
        marked = tokenizer("a")["input_ids"]
        tail = tokenizer(question, add_special_tokens=False)["input_ids"] if question else []
        return list(marked[: marked.index(plain[0])]), list(tail)
    if tokenizer.chat_template is None:
        raise ConfigError("--chat: the tokenizer has no chat template; leave it out")
    place = "HAYSTACK"
    messages = [{"role": "user", "content": place + question}]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    before, found, after = text.partition(place)
    if not found:
        raise ConfigError("--chat: the tokenizer's chat template does not show the user's message as it is")
    encoded = (tokenizer(part, add_special_tokens=False)["input_ids"] if part else [] for part in (before, after))
    first, last = encoded
    return list(first), list(last)


def _made_compress(
    options: ProfileOptions, scored: HeadScores, sets: Mapping[str, Sequence[Needle]], length: int, heads: int
) -> dict[str, Any]:
    return {
        "answers": "needle (teacher forced)" if options.teacher_forced else "greedy",
        "data_sets": {name: len(needles) for name, needles in sets.items()},
        "counted": scored.counted,
        "length": length,
        "max_new_tokens": options.max_new_tokens or MAX_NEW_TOKENS,
        "recall": RECALL if options.recall is None else options.recall,
        "heads": heads,
        "error_budget": options.error_budget or ERROR_BUDGET,
        "window": WINDOW,
        "kernel": KERNEL,
        "chat": options.chat,
        "seed": options.seed,
        "dtype": options.dtype,
    }


def _print_compress(table: CompressTable, scored: HeadScores, options: ProfileOptions, console: Console) -> None:
    shown = Table()
    for name in ("layer", "heads (score)", "others' mean", "error", f"tokens of {EXAMPLE_BUDGET}"):
        shown.add_column(name, justify="right")
    budgets = budgets_of(table.errors, EXAMPLE_BUDGET)
    for layer, heads in table.heads.items():
        scores = scored.scores[layer].tolist()
        others = [score for head, score in enumerate(scores) if head not in heads]
        shown.add_row(
            str(layer),
            "  ".join(f"{head} ({scores[head]:.3g})" for head in heads),
            f"{sum(others) / len(others):.3g}" if others else "",
            f"{table.errors[layer]:.4f}",
            str(budgets[layer]),
        )
    console.print(shown)
    recalls = scored.recalls
    lines = [
        f"answers         {table.made['answers']}, {scored.counted} of {len(recalls)} count, mean recall "
        f"{sum(recalls) / len(recalls):.2f}",
        f"table           {options.out}",
    ]
    if len(next(iter(table.heads.values()))) >= table.model.query_heads:
        lines.append(
            f"note: all {table.model.query_heads} query heads of a layer choose, as in SnapKV; --heads 1 to "
            f"{table.model.query_heads - 1} leaves the others out"
        )
    _print_lines(lines, console)
    _print_recipe(options, console)


# RazorAttention


def _run_razor(options: ProfileOptions, console: Console) -> int:
    from rltok.kv.razor_profile import razor_profile

    config = checkpoint_config(options.checkpoint, options.dtype)
    tokenizer = load_tokenizer(config)
    about = load_model_config(config)
    with _in_words(options):
        full_layers(about)
    tokens, copies = _random_text(options, about.get_text_config(decoder=True), tokenizer)
    model = load_policy(config)
    with _in_words(options):
        found = razor_profile(model, tokenizer, k=tokens, copies=copies, seed=options.seed)
    scores = {name: found[name] for name in ("echo", "induction")}
    made = {name: value for name, value in found.items() if name not in ("full_heads", *scores)}
    table = RazorTable(
        model=ModelFacts.of(about),
        full_heads={int(layer): [int(head) for head in heads] for layer, heads in found["full_heads"].items()},
        scores={name: [_rounded(row) for row in rows] for name, rows in scores.items()},
        made={**made, "dtype": options.dtype},
    )
    write_table(options.out, table)
    _print_razor(table, options, console)
    return 0


def _random_text(options: ProfileOptions, about: Any, tokenizer: PreTrainedTokenizerBase) -> tuple[int, int]:
    """Tokens and copies that fit the model's positions, behind a first token if it has one."""
    copies = options.copies or COPIES
    limit = getattr(about, "max_position_embeddings", None) or sys.maxsize
    front = tokenizer.bos_token_id is not None or getattr(about, "bos_token_id", None) is not None
    most = (limit - front) // copies
    if options.tokens is not None and options.tokens > most:
        raise ConfigError(
            f"--tokens {options.tokens} --copies {copies}: the model is made for {limit} tokens "
            f"(max_position_embeddings), so --tokens {most} is the most"
        )
    return options.tokens or min(TOKENS, most), copies


def _print_razor(table: RazorTable, options: ProfileOptions, console: Console) -> None:
    shown = Table()
    for name in ("layer", "full heads", "echo of each head", "induction of each head"):
        shown.add_column(name, justify="right")
    for layer in range(table.model.layers):
        rows = [table.scores[name][layer] for name in ("echo", "induction")]
        if None in rows:
            continue
        cells = ("  ".join(f"{score:.3f}" for score in row) for row in rows)
        shown.add_row(str(layer), "  ".join(map(str, table.full_heads.get(layer, []))), *cells)
    console.print(shown)
    made = table.made
    lines = [
        f"full heads      {sum(map(len, table.full_heads.values()))} of {made['heads']} key-value heads: "
        f"{made['echo_heads']} by echo, {made['induction_heads']} by induction",
        f"text            {made['k']} random tokens, {made['copies']} times",
        f"table           {options.out}",
    ]
    _print_lines(lines, console)
    _print_recipe(options, console)


# Terminal


@contextmanager
def _bar(console: Console, label: str, total: int) -> Iterator[Callable[[], None]]:
    """A bar in a terminal, nothing elsewhere."""
    if not console.is_terminal:
        yield lambda: None
        return
    with bar(console) as display:
        task = display.add_task(label, total=total, detail="samples")
        yield lambda: display.advance(task)


@contextmanager
def _in_words(options: ProfileOptions) -> Iterator[None]:
    """What the measurement refuses, as errors of this command."""
    try:
        yield
    except ConfigError:
        raise
    except ValueError as error:
        text = str(error)
        hint = "; --teacher-forced does" if "as the answer" in text else ""
        raise ConfigError(f"rltok profile {options.policy} {options.checkpoint}: {text}{hint}") from error


def _print_recipe(options: ProfileOptions, console: Console) -> None:
    section = {"policy": options.policy, "table": str(options.out.resolve()), "budget": EXAMPLE_BUDGET}
    _print_lines(["in a recipe:", dump_yaml({"rollout": {"kv": section}}).rstrip()], console)


def _print_lines(lines: Sequence[str], console: Console) -> None:
    for line in lines:
        console.print(line, highlight=False, soft_wrap=True, markup=False)


def _rounded(scores: Any) -> list[float] | None:
    return None if scores is None else [round(float(score), 6) for score in scores]
