"""Attention signals of completions, to look at: JSON, Parquet and a picture per completion.

attend/
    signals.parquet    one row per completion token
    signals.json       the same per completion, with its prompt, the probed layers and the heads of either group
    attend_<i>.png     WAAD with the preplan tokens above FAI with the anchors; of the first completions

Signals and sets are those of `rltok.credit.preplan_anchor` on the ids that are printed, with every token counted as
the policy's own: tool tokens, which training leaves out, cannot be told from a text.
"""

from __future__ import annotations

import json
import math
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from rich.console import Console
from rich.table import Table
from rich.text import Text
from torch import Tensor, nn
from yaml import YAMLError

from rltok.attention.probe import (
    UnprobeableAttentionError,
    language_model,
    probeable_layers,
    text_config,
)
from rltok.attention.signals import AttentionSignals, attention_signals
from rltok.complete import CompletionSettings, Engine, check_engine, complete, completed_ids
from rltok.config import ConfigError, build
from rltok.credit.preplan_anchor import PreplanAnchor, RhythmCredit, rhythm_gamma
from rltok.files import write_atomically
from rltok.models import ModelConfig, load_model, load_tokenizer
from rltok.prompts import (
    Prompt,
    asked_as,
    check_prompt,
    clip,
    flag,
    is_conversation,
    prompt_tokens,
    read_rows,
    token_texts,
)
from rltok.run import quiet_libraries

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

WeightType = Literal["auto", "float32", "bfloat16", "float16"]
OTHER_ENGINE = "give --engine transformers"
"""What to do where the engine `fast` does not serve a model."""

MAX_NEW_TOKENS = 256
"""Completion length of `--prompt` unless told otherwise."""
GENERATION_BATCH = 16
"""Prompts that are completed at once."""
UNUSED_OPTIONS = {
    "control": "the sets are shown where attention puts them",
    "sign": "a completion read from here has no advantage",
    "renormalize": "the multipliers are shown as the strategies give them",
}
"""Options of the method that change training but nothing that is written here."""
SHOWN_TOKENS = 8
"""Rows of the printed table."""


@dataclass(frozen=True)
class AttendOptions:
    """What `rltok attend` was asked for."""

    checkpoint: str
    """a checkpoint or model directory, `tiny-reasoner` or a hub id"""
    prompts: Sequence[str] = ()
    """prompts to complete; either these or `completions`"""
    completions: Path | None = None
    """file of prompts with their completions: JSON lines or Parquet"""
    rows: int | None = None
    """first rows of `completions` to read; None reads all"""
    chat: bool = False
    """make a plain prompt the user message of a conversation, by the tokenizer's chat template"""
    max_new_tokens: int | None = None
    """length of a generated completion; None is `MAX_NEW_TOKENS`"""
    temperature: float | None = None
    """of the generation; None and 0 decode greedily"""
    seed: int | None = None
    """of the sampling; None is 0"""
    engine: Engine | None = None
    """of the generation, `fast` or `transformers`; None is `fast`"""
    settings: Sequence[str] = ()
    """`key=value` options of `PreplanAnchor`"""
    out: Path = Path("attend")
    """directory of the files"""
    pictures: int = 4
    """at most so many completions are drawn; 0 draws none"""
    dtype: WeightType = "float32"
    """of the weights"""

    def __post_init__(self) -> None:
        if bool(self.prompts) == (self.completions is not None):
            given = "both were given" if self.prompts else "neither was given"
            raise ConfigError(f"{given}: give either --prompt TEXT (any number of times) or --completions FILE")
        foreign = ("rows",) if self.prompts else ("max_new_tokens", "temperature", "seed", "engine")
        for name in foreign:
            if getattr(self, name) is not None:
                owner = "--completions FILE" if self.prompts else "--prompt TEXT"
                raise ConfigError(f"{flag(name)} {getattr(self, name)} only goes with {owner}; leave it out")
        if self.out.exists() and not self.out.is_dir():
            raise ConfigError(f"--out {self.out}: is a file; give a directory, which may be new")
        limits = {"rows": 1, "max_new_tokens": 1, "temperature": 0, "pictures": 0}
        for name, least in limits.items():
            value = getattr(self, name)
            if value is not None and not (value >= least and math.isfinite(value)):
                raise ConfigError(f"{flag(name)} {value} must be >= {least} and finite")


@dataclass(frozen=True)
class Sample:
    """A prompt and its completion as the model reads them."""

    prompt: str
    """text with the chat template's tags"""
    prompt_ids: list[int]
    completion: str
    """text without special tokens"""
    completion_ids: list[int]
    """with the end-of-sequence token, if it was sampled"""


class Head(NamedTuple):
    """A head of the local or global group."""

    layer: int
    head: int
    span: float
    """average attention distance of the completion's tokens, in tokens"""


@dataclass(frozen=True)
class Attended:
    """A completion with its signals; every list of `columns` has one entry per completion token."""

    sample: Sample
    tokens: list[str]
    """text of every token"""
    columns: dict[str, list[Any]]
    """waad and delta in tokens, fai, fai_count, the gammas of the three strategies, and four sets as is_... booleans;
    delta is None at the last token, which has none"""
    local_heads: list[Head] = field(default_factory=list)
    """whose maps WAAD is the mean of"""
    global_heads: list[Head] = field(default_factory=list)
    """whose maps FAI is the mean of"""


def run_attend(options: AttendOptions, console: Console) -> int:
    """Write the signals of `options` and print the strongest tokens of the first completion.

    Raises:
        ConfigError: options, files or models that cannot be used; matplotlib missing (after the files are written).
    """
    quiet_libraries()
    method = build_method(options.settings)
    rows = None if options.completions is None else read_completions(options.completions, options.rows)
    model, tokenizer = load_checkpoint(options)
    _check_probeable(model, method)  # before the time that generation takes
    if rows is None:
        check_engine(model, options.engine or "fast", OTHER_ENGINE)
    if rows is None:
        samples = generate(
            model, tokenizer, [asked_as(p, options.chat) for p in options.prompts], **_generation(options)
        )
    else:
        samples = [
            sample_of(row, tokenizer, options.chat, f"{options.completions}, row {number}")
            for number, row in enumerate(rows, start=1)
        ]
        _report_other_tokens(rows, samples, tokenizer, console)
    layers, attended = attend(model, tokenizer, samples, method)
    json_file, table_file = options.out / "signals.json", options.out / "signals.parquet"
    write_signals_json(attended, layers, options.checkpoint, method, json_file)
    write_signals_parquet(attended, table_file)
    _print_strongest(attended[0], method, console)
    tokens = sum(len(one.tokens) for one in attended)
    facts = {
        "completions": f"{len(attended)}, of {tokens} tokens",
        "layers": ", ".join(map(str, layers)),
        "signals": f"{json_file} and {table_file}",
    }
    print_facts(facts, console)
    pictures = _write_pictures(attended, options)
    if pictures:
        print_facts({"pictures": " ".join(map(str, pictures))}, console)
    return 0


def build_method(settings: Sequence[str]) -> PreplanAnchor:
    """`PreplanAnchor` with `key=value` options, values in YAML.

    Raises:
        ConfigError: no `key=value`, an unknown option, a value that does not fit, or an option of training alone.
    """
    values: dict[str, Any] = {}
    for text in settings:
        key, equals, raw = text.partition("=")
        if not equals or not key.strip():
            raise ConfigError(f"--set {text!r}: write key=value, such as --set window=5")
        try:
            loaded = OmegaConf.to_container(OmegaConf.create(f"value: {raw}"), resolve=False)
        except (YAMLError, OmegaConfBaseException) as error:
            raise ConfigError(f"--set {text!r}: {raw!r} is not a YAML value") from error
        assert isinstance(loaded, dict)
        values[key.strip()] = loaded["value"]
    for name in UNUSED_OPTIONS.keys() & values.keys():
        raise ConfigError(f"--set {name}: has no effect here, {UNUSED_OPTIONS[name]}; leave it out")
    try:
        return build(PreplanAnchor, values)
    except ConfigError as error:
        raise ConfigError(f"--set {str(error).removeprefix('credit.')}", error.path) from error


# Completions from a file


def read_completions(path: Path, rows: int | None = None) -> list[dict[str, Any]]:
    """Prompts and completions of a JSON-lines or Parquet file, such as a run's completions/*.parquet.

    A prompt is text or a conversation, a completion text or one message. `tokens` (what was sampled) and `ended` are
    kept where the file has them: they tell whether the end-of-sequence token was sampled, which the text does not.

    Raises:
        ConfigError: no such file, another kind of file, unreadable, without rows, or a column that is missing.
    """
    return read_rows(path, "--completions", ("prompt", "completion"), ("tokens", "ended"), rows)


def sample_of(row: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase, chat: bool, where: str) -> Sample:
    """A row of `read_completions` in tokens; its end-of-sequence token is added where the row says it was sampled.

    Raises:
        ConfigError: a prompt or completion that is neither text nor messages of text, or an empty completion.
    """
    prompt = row["prompt"]
    check_prompt(prompt, f"--completions {where}")
    prompt_text, prompt_ids = prompt_tokens(tokenizer, asked_as(prompt, chat))
    text = _completion_text(row["completion"], where)
    ids = tokenizer(text, add_special_tokens=False)["input_ids"] + _sampled_end(row, tokenizer)
    if not ids:
        shown = clip(str(prompt), 60)
        raise ConfigError(f"--completions {where}: the completion of {shown!r} is empty; leave the row out")
    return Sample(prompt_text, prompt_ids, text, ids)


def _completion_text(value: Any, where: str) -> str:
    if isinstance(value, str):
        return value
    if is_conversation(value) and len(value) == 1:
        return value[0]["content"]
    raise ConfigError(f"--completions {where}: completion {value!r} is neither text nor one message of text")


def _sampled_end(row: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The end-of-sequence token that the row's text leaves out, by its `tokens` or `ended`."""
    sampled = row.get("tokens")
    if sampled:
        return [tokenizer.convert_tokens_to_ids(sampled[-1])] if sampled[-1] in tokenizer.all_special_tokens else []
    return [tokenizer.eos_token_id] if row.get("ended") and tokenizer.eos_token_id is not None else []


def _report_other_tokens(
    rows: Sequence[Mapping[str, Any]], samples: Sequence[Sample], tokenizer: PreTrainedTokenizerBase, console: Console
) -> None:
    """Say how many completions are not in the tokens they were sampled in: text does not determine tokens."""
    pairs = [(row["tokens"], sample) for row, sample in zip(rows, samples, strict=True) if row.get("tokens")]
    other = sum(list(sampled) != token_texts(tokenizer, sample.completion_ids) for sampled, sample in pairs)
    if other:
        console.print(
            f"note: {other} of {len(pairs)} completions tokenise otherwise than they were sampled, by their column "
            "tokens; their signals are those of the text",
            highlight=False,
            soft_wrap=True,
        )


# Completions from the model


def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    max_new_tokens: int = MAX_NEW_TOKENS,
    temperature: float = 0.0,
    seed: int = 0,
    engine: Engine = "fast",
) -> list[Sample]:
    """One completion per prompt; random states and the model's mode are as before afterwards.

    Args:
        prompts: text or conversations.
        max_new_tokens: longest completion, in tokens.
        temperature: 0 decodes greedily.
        seed: of the sampling; greedy decoding does not read it.
        engine: `fast` or `transformers`.

    Raises:
        ConfigError: a model that the engine does not serve.
    """
    asked = [prompt_tokens(tokenizer, prompt) for prompt in prompts]
    settings = CompletionSettings(max_new_tokens, temperature, seed=seed, batch_size=GENERATION_BATCH, engine=engine)
    outputs = completed_ids(complete(model, tokenizer, [ids for _, ids in asked], settings))
    return [
        Sample(text, ids, tokenizer.decode(output, skip_special_tokens=True), output)
        for (text, ids), output in zip(asked, outputs, strict=True)
    ]


def _generation(options: AttendOptions) -> dict[str, Any]:
    """Keyword arguments of `generate`; what was not given keeps its default."""
    names = ("max_new_tokens", "temperature", "seed", "engine")
    return {name: getattr(options, name) for name in names if getattr(options, name) is not None}


# Signals


def attend(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, samples: Sequence[Sample], method: PreplanAnchor
) -> tuple[tuple[int, ...], list[Attended]]:
    """Probed layers, and the signals of every sample; with `head_scope="batch"` the samples are the batch.

    Raises:
        ConfigError: the model's attention cannot be probed, its context is too short, or layers or heads do not fit.
    """
    _check_length(model, samples)
    input_ids, attention_mask, response_mask = padded(samples, tokenizer.pad_token_id or 0)
    device = next(model.parameters()).device
    masks = (attention_mask.to(device), response_mask.to(device))
    with in_words():
        signals = attention_signals(model, input_ids.to(device), *masks, method.attention)
    if not (signals.waad.isfinite().all() and signals.fai.isfinite().all()):
        dtype = next(model.parameters()).dtype
        raise ConfigError(f"the attention is not finite in {dtype}; check the weights, or give --dtype float32")
    rhythm = rhythm_gamma(signals.waad, signals.fai, signals.fai_count, masks[1], masks[1], method)
    layers = tuple(int(layer) for layer in signals.layers)
    texts = [token_texts(tokenizer, sample.completion_ids) for sample in samples]
    found = [
        Attended(sample, tokens, _columns(signals, rhythm, row, len(tokens), method), *_heads(signals, row))
        for row, (sample, tokens) in enumerate(zip(samples, texts, strict=True))
    ]
    return layers, found


def _check_probeable(model: nn.Module, method: PreplanAnchor) -> None:
    with in_words():
        probeable_layers(model, method.layers)


@contextmanager
def in_words() -> Iterator[None]:
    """What the attention pass refuses, as errors of this command."""
    try:
        yield
    except UnprobeableAttentionError as error:
        raise ConfigError(f"the attention of this model cannot be read: {error}") from error
    except ValueError as error:
        raise ConfigError(f"--set {error}") from error


def _check_length(model: nn.Module, samples: Sequence[Sample]) -> None:
    limit = getattr(text_config(language_model(model)), "max_position_embeddings", None)
    longest = max(len(sample.prompt_ids) + len(sample.completion_ids) for sample in samples)
    if limit is not None and 0 < limit < longest:
        raise ConfigError(
            f"prompt and completion have {longest} tokens, the model is made for {limit} (max_position_embeddings); "
            "give shorter completions, or a smaller --max-new-tokens"
        )


def padded(samples: Sequence[Sample], pad: int) -> tuple[Tensor, Tensor, Tensor]:
    """(B, P + C) ids and attention mask, padded left of prompts and right of completions; (B, C) response mask."""
    width = max(len(sample.prompt_ids) for sample in samples)
    length = max(len(sample.completion_ids) for sample in samples)
    ids = torch.full((len(samples), width + length), pad)
    mask = torch.zeros_like(ids)
    for row, sample in enumerate(samples):
        first, end = width - len(sample.prompt_ids), width + len(sample.completion_ids)
        ids[row, first:end] = torch.tensor(sample.prompt_ids + sample.completion_ids)
        mask[row, first:end] = 1
    return ids, mask, mask[:, width:]


def _columns(
    signals: AttentionSignals, rhythm: RhythmCredit, row: int, length: int, method: PreplanAnchor
) -> dict[str, list[Any]]:
    tensors = {
        "waad": signals.waad,
        "fai": signals.fai,
        "fai_count": signals.fai_count,
        "gamma_local": rhythm.gamma_local,
        "gamma_global": rhythm.gamma_global,
        "gamma_coupled": rhythm.gamma_coupled,
        "is_preplan": rhythm.is_local,
        "is_anchor": rhythm.is_global,
        "is_dominated": rhythm.is_dominated,
        "is_introductory": rhythm.is_introductory,
    }
    columns = {name: values[row, :length].tolist() for name, values in tensors.items()}
    columns["fai_count"] = [int(count) for count in columns["fai_count"]]
    columns["delta"] = [*_falls(signals.waad[row, :length], method), None]
    order = ("waad", "fai", "fai_count", "delta")
    return {name: columns[name] for name in (*order, *(name for name in columns if name not in order))}


def _falls(waad: Tensor, method: PreplanAnchor) -> list[float]:
    """Delta of every token but the last: what preplan tokens are ranked by."""
    fall = waad[:-1] - waad[1:]
    return (fall.abs() if method.delta_mode == "abs" else fall).tolist()


def _heads(signals: AttentionSignals, row: int) -> tuple[list[Head], list[Head]]:
    """Local and global heads of a completion, by layer and head, with the completion's own spans."""
    per_layer = signals.span.size(1) // len(signals.layers)
    spans = signals.span[row].tolist()

    def named(group: Tensor) -> list[Head]:
        chosen = group if group.dim() == 1 else group[row]
        return [Head(int(signals.layers[h // per_layer]), h % per_layer, spans[h]) for h in chosen.tolist()]

    return named(signals.local), named(signals.global_)


# Files


def write_signals_json(
    attended: Sequence[Attended], layers: Sequence[int], checkpoint: str, method: PreplanAnchor, path: Path
) -> None:
    """One object: checkpoint, method with all options, layers, and the completions, each on a line of its own."""
    head = {"checkpoint": checkpoint, "method": asdict(method), "layers": list(layers)}
    rows = [
        {
            "prompt": one.sample.prompt,
            "completion": one.sample.completion,
            "tokens": one.tokens,
            "token_ids": one.sample.completion_ids,
            **one.columns,
            "local_heads": [found._asdict() for found in one.local_heads],
            "global_heads": [found._asdict() for found in one.global_heads],
        }
        for one in attended
    ]
    lines = ",\n".join(json.dumps(row, allow_nan=False) for row in rows)
    opening = json.dumps(head, allow_nan=False).removesuffix("}")
    write_atomically(path, f'{opening}, "completions": [\n{lines}\n]}}\n')


def write_signals_parquet(attended: Sequence[Attended], path: Path) -> None:
    """One row per token: completion, position (both from 0), token, token_id and the columns of `Attended`."""
    import pandas as pd

    parts = [
        pd.DataFrame(
            {
                "completion": index,
                "position": range(len(one.tokens)),
                "token": one.tokens,
                "token_id": one.sample.completion_ids,
                **one.columns,
                "delta": pd.Series(one.columns["delta"], dtype="float64"),  # None in a list of one token is no number
            }
        )
        for index, one in enumerate(attended)
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(path.name + ".part")
    pd.concat(parts, ignore_index=True).to_parquet(draft)
    draft.replace(path)


def _write_pictures(attended: Sequence[Attended], options: AttendOptions) -> list[Path]:
    """Draw the first completions; pictures of an earlier call in the same directory go."""
    for old in options.out.glob("attend_*.png"):
        if re.fullmatch(r"attend_\d+\.png", old.name):
            old.unlink()
    paths = []
    for index, one in enumerate(attended[: options.pictures]):
        path = options.out / f"attend_{index}.png"
        prompt = clip(" ".join(one.sample.prompt.split()), 60)
        draw(one, path, f"completion {index} of {clip(options.checkpoint, 60)}: {prompt}")
        paths.append(path)
    return paths


# Terminal


def strongest_tokens(one: Attended, member: str, value: str, limit: int = SHOWN_TOKENS) -> list[int]:
    """Positions of the set `member` (is_anchor, is_preplan) by falling `value`, ties to the earlier."""
    return sorted(_members(one, member), key=lambda position: -one.columns[value][position])[:limit]


def _print_strongest(one: Attended, method: PreplanAnchor, console: Console) -> None:
    gamma = one.columns[f"gamma_{method.strategy}"]
    table = Table(title="strongest tokens of the first completion", title_justify="left")
    for column in ("anchor", "at", "FAI", "gamma", "preplan token", "at", "Delta", "gamma"):
        table.add_column(column, justify="left" if column in ("anchor", "preplan token") else "right")
    sides = (("is_anchor", "fai", ".4f"), ("is_preplan", "delta", ".2f"))
    cells: list[list[list[Text | str]]] = [
        [
            [Text(repr(one.tokens[t])), str(t), format(one.columns[value][t], spec), f"{gamma[t]:.3g}"]
            for t in strongest_tokens(one, member, value)
        ]
        for member, value, spec in sides
    ]
    for row in range(max(map(len, cells))):
        table.add_row(*(cell for side in cells for cell in (side[row] if row < len(side) else [""] * 4)))
    console.print(table)
    if not any(one.columns["fai_count"]):
        console.print(
            f"no anchors: no token has another {method.horizon_min} tokens later or more; for short completions lower "
            "--set horizon_min",
            highlight=False,
            soft_wrap=True,
        )


def print_facts(facts: Mapping[str, str], console: Console) -> None:
    """A line per label and value; markup in them is inert."""
    for label, value in facts.items():
        console.print(f"{label:<15} {value}", highlight=False, soft_wrap=True, markup=False)


# Picture

WAAD_COLOUR, FAI_COLOUR = "#0072B2", "#009E73"
PREPLAN_COLOUR, ANCHOR_COLOUR = "#D55E00", "#000000"
"""Of the Okabe-Ito palette; the marks also differ in shape."""

DPI = 110
LABELLED_TOKENS = 120
"""Up to so many tokens each has its label."""
TOKEN_INCHES = 0.16
"""Width of a labelled token."""
WIDEST_INCHES = 40.0
LABEL_LENGTH = 12


def draw(one: Attended, path: Path, title: str) -> None:
    """WAAD with preplan tokens above FAI with anchors, over the same tokens; a PNG of one completion.

    Above `LABELLED_TOKENS` tokens the picture grows with their square root and only every so many tokens is labelled.

    Raises:
        ConfigError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure  # without pyplot: draws with Agg, needs no display
    except ImportError:
        raise ConfigError(
            f"the pictures need matplotlib: pip install rltok[plot], or leave them out with --pictures 0; "
            f"the signals are written to {path.parent}"
        ) from None
    width, step = figure_layout(len(one.tokens))
    figure = Figure(figsize=(width, 5.6), dpi=DPI, layout="constrained")
    upper, lower = figure.subplots(2, 1, sharex=True)
    _draw_waad(upper, one)
    _draw_fai(lower, one)
    for panel in (upper, lower):
        panel.grid(color="0.9", linewidth=0.6)
        panel.set_axisbelow(True)
        panel.spines[["top", "right"]].set_visible(False)
        panel.margins(x=0.01)
        panel.legend(frameon=False, fontsize=9, loc="lower right", bbox_to_anchor=(1, 1), ncols=3, borderaxespad=0.1)
    positions = range(0, len(one.tokens), step)
    lower.set_xticks(positions, [tick_label(one.tokens[t]) for t in positions], rotation=90)
    for label in lower.get_xticklabels():
        label.set(fontsize=8, fontfamily="monospace", parse_math=False)
    lower.set_xlabel("token" if step == 1 else f"token (one label every {step} tokens)")
    figure.suptitle(title, fontsize=11, x=0.01, ha="left", parse_math=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from")  # a box is drawn; the files have the text
        figure.savefig(path, format="png")


def figure_layout(tokens: int) -> tuple[float, int]:
    """Width in inches, and the distance in tokens between labels.

    Example: 60 tokens give (10.6, 1), 120 give (20.2, 1), 480 give (39.4, 2).
    """
    full = TOKEN_INCHES * min(tokens, LABELLED_TOKENS)
    width = min(WIDEST_INCHES, max(8.0, 1.0 + full * math.sqrt(max(1.0, tokens / LABELLED_TOKENS))))
    return width, max(1, math.ceil(TOKEN_INCHES * tokens / (width - 1.0) - 1e-9))


def tick_label(token: str) -> str:
    """A token as a label: blanks and line ends made visible, cut to `LABEL_LENGTH` characters."""
    visible = token.replace("\n", "\\n").replace("\t", "\\t").replace("\r", "\\r")
    return clip("".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in visible), LABEL_LENGTH).replace(
        " ", "\N{OPEN BOX}"
    )


def _draw_waad(panel: Axes, one: Attended) -> None:
    waad = one.columns["waad"]
    panel.plot(waad, color=WAAD_COLOUR, linewidth=1.3, marker=".", markersize=3)
    preplan = _members(one, "is_preplan")
    introductory = _members(one, "is_introductory")
    panel.scatter(
        preplan,
        [waad[t] for t in preplan],
        marker="^",
        s=34,
        color=PREPLAN_COLOUR,
        zorder=3,
        label=f"preplan ({len(preplan)})",
    )
    panel.scatter(
        introductory,
        [waad[t] for t in introductory],
        marker="o",
        s=95,
        facecolors="none",
        edgecolors=ANCHOR_COLOUR,
        linewidths=1.0,
        zorder=3,
        label=f"introduces a dominated anchor ({len(introductory)})",
    )
    panel.set_ylabel("WAAD (tokens)")
    panel.set_ylim(bottom=0)


def _draw_fai(panel: Axes, one: Attended) -> None:
    fai = one.columns["fai"]
    shown = [value if count else math.nan for value, count in zip(fai, one.columns["fai_count"], strict=True)]
    panel.plot(shown, color=FAI_COLOUR, linewidth=1.3, marker=".", markersize=3)
    dominated = set(_members(one, "is_dominated"))
    own = [t for t in _members(one, "is_anchor") if t not in dominated]
    for places, face, label in ((own, ANCHOR_COLOUR, "anchor"), (sorted(dominated), "none", "dominated anchor")):
        panel.scatter(
            places,
            [fai[t] for t in places],
            marker="D",
            s=28,
            facecolors=face,
            edgecolors=ANCHOR_COLOUR,
            linewidths=1.0,
            zorder=3,
            label=f"{label} ({len(places)})",
        )
    without = [t for t, count in enumerate(one.columns["fai_count"]) if not count]
    if without:
        panel.axvspan(without[0] - 0.5, len(fai) - 0.5, color="0.93", zorder=0, label="no later token in the horizon")
    panel.set_ylabel("FAI")
    panel.set_ylim(bottom=0)


def _members(one: Attended, name: str) -> list[int]:
    return [position for position, inside in enumerate(one.columns[name]) if inside]


# Model


def load_checkpoint(options: AttendOptions) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Model on this process's device, and tokenizer.

    Raises:
        ConfigError: a directory without a model; for a run directory the message names its checkpoints.
    """
    config = checkpoint_config(options.checkpoint, options.dtype)
    tokenizer = load_tokenizer(config)
    return load_policy(config), tokenizer


def checkpoint_config(checkpoint: str, dtype: WeightType) -> ModelConfig:
    """How the model of a checkpoint is loaded.

    Raises:
        ConfigError: a directory without a model; for a run directory the message names its checkpoints.
    """
    folder = Path(checkpoint)
    if folder.is_dir() and not any((folder / name).is_file() for name in ("config.json", "adapter_config.json")):
        inside = sorted(str(path.parent) for path in folder.glob("*/config.json"))
        hint = f"; its checkpoints: {', '.join(inside)}" if inside else ""
        raise ConfigError(f"{folder}: holds no config.json or adapter_config.json, so it is no checkpoint{hint}")
    return ModelConfig(path=checkpoint, dtype=dtype)


def load_policy(config: ModelConfig) -> PreTrainedModel:
    """Model on this process's device.

    Raises:
        ConfigError: no causal language model.
    """
    try:
        model = load_model(config)
    except ConfigError:
        raise
    except ValueError as error:  # transformers' answer to a model that generates no text
        reason = str(error).strip().splitlines()[0]
        raise ConfigError(f"{config.path}: is no causal language model ({reason})") from error
    return model.to("cuda" if torch.cuda.is_available() else "cpu")
