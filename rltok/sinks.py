"""`rltok sinks`: which heads put their weight on the first token, what they write, and how many tokens a cache needs.

Per layer and head the metrics of `rltok.attention.sinks`, on completions of a file, on a text, or on completions that
the embedded model gives to problems of its own task. With `--check N` the loss says what N heads that look dormant do,
beside N that write most.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text
from torch import Tensor

from rltok.attend import (
    DPI,
    Sample,
    WeightType,
    checkpoint_config,
    generate,
    load_policy,
    print_facts,
    read_completions,
    sample_of,
)
from rltok.attention.model_sinks import (
    SINK_SHARE,
    Intervention,
    SinkProposal,
    SinkStatistics,
    all_layers,
    loss_change,
    next_token_loss,
    propose_sink,
    sink_statistics,
)
from rltok.attention.probe import UnprobeableAttentionError, language_model, text_config
from rltok.attention.sinks import FIRST, OUTPUT_RATIO, SINK_MASS
from rltok.config import ConfigError
from rltok.files import write_atomically
from rltok.models import TINY, load_tokenizer, resolve_path
from rltok.prompts import clip, flag
from rltok.run import quiet_libraries

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

TOKENS = 512
"""Longest row unless told otherwise; a model with a shorter context sets its own."""
BATCH = 8
"""Rows of one pass."""
LARGE_PEAK = 20
"""Residual peak above which the picture is logarithmic."""
SHOWN_HEADS = 8
"""Rows of the table of heads."""


@dataclass(frozen=True)
class SinkOptions:
    """What `rltok sinks` was asked for."""

    checkpoint: str
    """a checkpoint or model directory, `tiny-reasoner` or a hub id"""
    completions: Path | None = None
    """file of prompts with their completions: JSON lines or Parquet"""
    text: Path | None = None
    """plain text, cut into rows"""
    rows: int = 8
    """at most so many rows"""
    tokens: int | None = None
    """tokens of a row at most; None is `TOKENS`, or the model's context if that is shorter"""
    layers: Sequence[int] | None = None
    """indices; None is all whose attention can be read"""
    check: int = 0
    """heads whose effect on the loss is measured, of those that stand out and of those that write most"""
    chat: bool = False
    """make a plain prompt the user message of a conversation, by the tokenizer's chat template"""
    json: Path | None = None
    """file for everything that was measured"""
    picture: Path | None = None
    """PNG with the heat maps"""
    dtype: WeightType = "float32"
    """of the weights"""

    def __post_init__(self) -> None:
        if self.completions is not None and self.text is not None:
            raise ConfigError("both were given: give either --completions FILE or --text FILE")
        if self.completions is None and self.text is None and not self._is_embedded:
            raise ConfigError(
                f"{self.checkpoint}: give what it should read, --completions FILE (such as a run's "
                f"completions/*.parquet) or --text FILE; only {TINY} brings problems of its own"
            )
        if self.chat and self.completions is None:
            raise ConfigError("--chat only goes with --completions FILE; leave it out")
        for name, least in (("rows", 1), ("tokens", 2), ("check", 0)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ConfigError(f"{flag(name)} {value} must be >= {least}")
        for name in ("json", "picture"):
            path = getattr(self, name)
            if path is not None and path.is_dir():
                raise ConfigError(f"{flag(name)} {path}: is a directory; give a file")
        if self.picture is not None and self.picture.suffix.lower() != ".png":
            raise ConfigError(f"--picture {self.picture}: is written as PNG; give a file that ends in .png")

    @property
    def _is_embedded(self) -> bool:
        return self.checkpoint == TINY or resolve_path(TINY) == str(Path(self.checkpoint).resolve())


class Row(NamedTuple):
    """What the model reads at once."""

    ids: list[int]
    start: int
    """first token whose loss counts: of a completion, or the second of a text"""


class Batch(NamedTuple):
    """Rows padded on the right."""

    ids: Tensor
    """(B, T)"""
    mask: Tensor
    """(B, T) 1 for real tokens"""
    counted: Tensor
    """(B, T) 1 where the loss counts"""


class HeadReport(NamedTuple):
    """One head, as it is printed and written."""

    layer: int
    head: int
    sink_mass: float
    value_ratio: float
    output_norm: float
    relative_norm: float
    """output norm over the layer's median"""
    entropy: float
    argmax_column: int
    """place in the row, from 0, of the token that receives most attention"""
    sink: bool
    """sink mass at or above `SINK_MASS`"""
    quiet: bool
    """output norm at or below `OUTPUT_RATIO` of the layer's median"""

    @property
    def dormant(self) -> bool:
        """Both."""
        return self.sink and self.quiet

    @property
    def name(self) -> str:
        """Layer and head in words."""
        return f"layer {self.layer} head {self.head}"


class HeadCheck(NamedTuple):
    """What the loss says of a head, nats per token."""

    layer: int
    head: int
    zero_out: float
    """change with the head's weights at 0"""
    move_to_sink: float
    """change with all of its weight on the first token"""


class Loss(NamedTuple):
    """Of the model as it is."""

    mean: float
    """nats per token"""
    tokens: int
    """that count"""


def run_sinks(options: SinkOptions, console: Console) -> int:
    """Measure, print the tables, and write the files that were asked for.

    Raises:
        ConfigError: options, files or models that cannot be used; matplotlib missing.
    """
    quiet_libraries()
    figure = _new_figure() if options.picture is not None else None  # refused before the work, not after it
    config = checkpoint_config(options.checkpoint, options.dtype)
    tokenizer = load_tokenizer(config)
    model = load_policy(config)
    with _in_words():
        layers = all_layers(model, options.layers)
    tokens = _row_length(options, model)
    rows, source = _rows(options, model, tokenizer, tokens)
    batches = _batches(rows, tokenizer.pad_token_id or 0, next(model.parameters()).device)
    statistics = measure(model, batches, layers)
    heads = head_reports(statistics)
    proposal = propose_sink(statistics)
    checks, loss = _checks(model, batches, heads, options.check)
    _print_layers(statistics, console)
    _print_heads(heads, checks, rows, tokenizer, console)
    facts = _facts(statistics, heads, proposal, rows, source, loss)
    print_facts(facts, console)
    if options.json is not None:
        report = _report(options, statistics, heads, proposal, checks, rows, source, loss)
        write_atomically(options.json, json.dumps(report, allow_nan=False, indent=1) + "\n")
        print_facts({"json": str(options.json)}, console)
    if figure is not None and options.picture is not None:
        draw(figure, statistics, options.picture, f"attention sinks of {clip(options.checkpoint, 60)}, {source}")
        print_facts({"picture": str(options.picture)}, console)
    return 0


@contextmanager
def _in_words() -> Iterator[None]:
    """What the pass refuses, as errors of this command."""
    try:
        yield
    except UnprobeableAttentionError as error:
        raise ConfigError(f"the attention of this model cannot be read: {error}") from error
    except ValueError as error:
        raise ConfigError(f"--{error}") from error


# What is read


def _row_length(options: SinkOptions, model: PreTrainedModel) -> int:
    limit = getattr(text_config(language_model(model)), "max_position_embeddings", None) or math.inf
    if options.tokens is None:
        return int(min(TOKENS, limit))
    if options.tokens > limit:
        raise ConfigError(
            f"--tokens {options.tokens}: the model is made for {limit} (max_position_embeddings); give at most that"
        )
    return options.tokens


def _rows(
    options: SinkOptions, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, tokens: int
) -> tuple[list[Row], str]:
    """The rows, and what they are in words."""
    if options.text is not None:
        rows = [Row(ids, 1) for ids in text_rows(options.text, tokenizer, options.rows, tokens)]
        source = f"text {options.text}"
    elif options.completions is not None:
        read = read_completions(options.completions, options.rows)
        samples = [
            sample_of(row, tokenizer, options.chat, f"{options.completions}, row {number}")
            for number, row in enumerate(read, start=1)
        ]
        rows, source = _joined(samples), f"completions {options.completions}"
    else:
        rows = _joined(generate(model, tokenizer, _problems(options.rows)))
        source = "held-out problems of its own task with greedy completions"
    rows = [Row(row.ids[:tokens], row.start) for row in rows]
    if max(len(row.ids) for row in rows) < 2:
        raise ConfigError(f"{source}: no row has two tokens, so no attention goes back to a first one")
    return rows, source


def _joined(samples: Sequence[Sample]) -> list[Row]:
    return [Row(one.prompt_ids + one.completion_ids, len(one.prompt_ids)) for one in samples]


def _problems(rows: int) -> list[Any]:
    """Prompts of the embedded model's task, those that its demo is evaluated on."""
    from rltok.config import build
    from rltok.data import DataConfig
    from rltok.data.reasoning_gym_rows import heldout_rows
    from rltok.recipe import load_recipe

    data = build(DataConfig, load_recipe("demo", [f"data.heldout_size={rows}"]).data, "data")
    return [row["prompt"] for row in heldout_rows(data)]


def text_rows(path: Path, tokenizer: PreTrainedTokenizerBase, rows: int, tokens: int) -> list[list[int]]:
    """A text in consecutive rows, each opened by what the tokenizer puts in front of a text.

    Raises:
        ConfigError: no such file, not UTF-8, or no token in it.
    """
    if not path.is_file():
        raise ConfigError(f"--text {path}: there is no such file")
    try:
        text = path.read_text(encoding="utf-8")
    except (UnicodeDecodeError, OSError) as error:
        raise ConfigError(f"--text {path}: cannot be read as UTF-8 text: {error}") from error
    ids: list[int] = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    if not ids:
        raise ConfigError(f"--text {path}: the file has no tokens")
    opening = _opening(tokenizer)
    step = tokens - len(opening)
    if step < 1:
        raise ConfigError(f"--tokens {tokens}: the tokenizer opens a row with {len(opening)} tokens; give more")
    return [opening + ids[start : start + step] for start in range(0, len(ids), step)][:rows]


def _opening(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Tokens that the tokenizer puts in front of a text, such as <s>."""
    plain: list[int] = tokenizer("a", add_special_tokens=False)["input_ids"]
    whole: list[int] = tokenizer("a")["input_ids"]
    place = next((i for i in range(len(whole)) if whole[i : i + len(plain)] == plain), 0)
    return whole[:place]


def _batches(rows: Sequence[Row], pad: int, device: torch.device) -> list[Batch]:
    """Batches of similarly long rows."""
    ordered = sorted(rows, key=lambda row: len(row.ids))
    batches = []
    for start in range(0, len(ordered), BATCH):
        group = ordered[start : start + BATCH]
        ids = torch.full((len(group), len(group[-1].ids)), pad)
        mask, counted = torch.zeros_like(ids), torch.zeros_like(ids)
        for index, row in enumerate(group):
            ids[index, : len(row.ids)] = torch.tensor(row.ids)
            mask[index, : len(row.ids)] = 1
            counted[index, row.start : len(row.ids)] = 1
        batches.append(Batch(ids.to(device), mask.to(device), counted.to(device)))
    return batches


# What is measured


def measure(model: PreTrainedModel, batches: Sequence[Batch], layers: Sequence[int]) -> SinkStatistics:
    """Sums over batches.

    Raises:
        ConfigError: attention that cannot be read or is not finite.
    """
    total: SinkStatistics | None = None
    with _in_words():
        for batch in batches:
            found = sink_statistics(model, batch.ids, batch.mask, layers)
            total = found if total is None else total + found
    assert total is not None
    if not bool(total.output_norm.isfinite().all() and total.residual_peak.isfinite().all()):
        dtype = next(model.parameters()).dtype
        raise ConfigError(f"what the heads write is not finite in {dtype}; check the weights, or give --dtype float32")
    return total


def head_reports(statistics: SinkStatistics) -> list[HeadReport]:
    """Every head, those that stand out first: dormant ones, then by falling sink mass."""
    dormant = statistics.dormant()
    columns = (
        statistics.sink_mass,
        statistics.value_ratio,
        statistics.output_norm,
        statistics.relative_norm,
        statistics.entropy,
        statistics.argmax_column,
        dormant.sink,
        dormant.quiet,
    )
    listed = [column.tolist() for column in columns]
    heads = [
        HeadReport(layer, head, *(column[index][head] for column in listed))
        for index, layer in enumerate(statistics.layers)
        for head in range(statistics.sink_mass.size(1))
    ]
    return sorted(heads, key=lambda one: (not one.dormant, -one.sink_mass))


def _checks(
    model: PreTrainedModel, batches: Sequence[Batch], heads: Sequence[HeadReport], count: int
) -> tuple[list[HeadCheck], Loss | None]:
    """Loss changes of the first `count` heads and of the `count` others that write most; and the loss itself."""
    if not count:
        return [], None
    chosen = [*heads[:count], *sorted(heads[count:], key=lambda one: -one.relative_norm)[:count]]
    pairs = [(one.layer, one.head) for one in chosen]
    sums = [next_token_loss(model, *batch) for batch in batches]
    tokens = sum(number for _, number in sums)
    if not tokens:
        raise ConfigError("--check: no token is left whose loss counts; raise --tokens above the prompts' length")

    def mean(how: Intervention) -> list[float]:
        total = torch.zeros(len(pairs), dtype=torch.float64)
        for (ids, mask, counted), (_, number) in zip(batches, sums, strict=True):
            if number:
                total += loss_change(model, ids, mask, pairs, how, counted) * (number / tokens)
        return total.tolist()

    columns = zip(pairs, mean("zero"), mean("sink"), strict=True)
    loss = Loss(sum(total for total, _ in sums) / tokens, tokens)
    return [HeadCheck(*pair, zero, sink) for pair, zero, sink in columns], loss


# Terminal


def _table(title: str, columns: Sequence[str], left: Sequence[str] = ()) -> Table:
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, padding=(0, 0), show_edge=False)
    for column in columns:
        table.add_column(column, justify="left" if column in left else "right", no_wrap=True)
    return table


def _print_layers(statistics: SinkStatistics, console: Console) -> None:
    columns = ("layer", "mass", "largest", "value", "output", "entropy", "peak", "sink", "quiet", "dormant")
    table = _table("layers: means over heads, and how many are sink, quiet, dormant", columns)
    dormant = statistics.dormant()
    for index, layer in enumerate(statistics.layers):
        mass = statistics.sink_mass[index]
        values = (
            mass.mean(),
            mass.max(),
            statistics.value_ratio[index].mean(),
            statistics.output_norm[index].mean(),
            statistics.entropy[index].mean(),
            statistics.residual_peak[index],
        )
        counts = (int(flags[index].sum()) for flags in (dormant.sink, dormant.quiet, dormant.both))
        table.add_row(str(layer), *(f"{float(value):.4g}" for value in values), *map(str, counts))
    console.print(table)


def _print_heads(
    heads: Sequence[HeadReport],
    checks: Sequence[HeadCheck],
    rows: Sequence[Row],
    tokenizer: PreTrainedTokenizerBase,
    console: Console,
) -> None:
    measured = {(check.layer, check.head): check for check in checks}
    shown = [one for index, one in enumerate(heads) if index < SHOWN_HEADS or (one.layer, one.head) in measured]
    columns = ["layer", "head", "mass", "value", "output", "entropy", "most on", "is"]
    columns += ["zeroed", "on sink"] if checks else []
    table = _table("heads that stand out; output: over the layer's median", columns, ("most on", "is"))
    for one in shown:
        kind = "dormant" if one.dormant else "sink" if one.sink else "quiet" if one.quiet else ""
        numbers = (one.sink_mass, one.value_ratio, one.relative_norm, one.entropy)
        cells: list[str | Text] = [str(one.layer), str(one.head), *(f"{value:.3f}" for value in numbers)]
        cells += [Text(_place(one.argmax_column, rows, tokenizer)), kind]
        check = measured.get((one.layer, one.head))
        if checks:
            cells += ["", ""] if check is None else [f"{check.zero_out:+.4f}", f"{check.move_to_sink:+.4f}"]
        table.add_row(*cells)
    console.print(table)


def _place(column: int, rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase) -> str:
    """A place in the row, with its token where all rows have the same."""
    found = {row.ids[column] for row in rows if column < len(row.ids)}
    return clip(f"{column} {tokenizer.decode([found.pop()])!r}", 12) if len(found) == 1 else str(column)


def _facts(
    statistics: SinkStatistics,
    heads: Sequence[HeadReport],
    proposal: SinkProposal,
    rows: Sequence[Row],
    source: str,
    loss: Loss | None,
) -> dict[str, str]:
    """Label -> line below the tables."""
    counts = {kind: sum(getattr(one, kind) for one in heads) for kind in ("sink", "quiet", "dormant")}
    facts = {
        "rows": f"{len(rows)}, of {sum(len(row.ids) for row in rows)} tokens: {source}",
        "heads": f"{len(heads)}: {counts['sink']} with sink mass >= {SINK_MASS}, {counts['quiet']} with output norm <= "
        f"{OUTPUT_RATIO} of their layer's median, {counts['dormant']} dormant (both)",
        "uniform": f"attention without preference would have sink mass {uniform_mass(statistics):.3f} on these rows",
        "sink": describe_proposal(proposal),
    }
    if loss is not None:
        facts["loss"] = (
            f"{loss.mean:.4f} nats per token over {loss.tokens}; the last columns say what it gains without the head"
        )
    if statistics.gated:
        layers = ", ".join(map(str, statistics.gated))
        facts["gated"] = f"something acts between attention and output projection in layers {layers}: output norms are "
        facts["gated"] += "those in front of it"
    return facts


def uniform_mass(statistics: SinkStatistics) -> float:
    """Sink mass of uniform attention over the rows that were read."""
    return float(statistics.heads.uniform_mass.reshape(-1)[0])


def describe_proposal(proposal: SinkProposal) -> str:
    """The proposed `sink` of a window cache, in words."""
    if proposal.sink is None:
        return f"no proposal: no row has more than {FIRST} tokens"
    behind = f"of the attention beyond uniform that the first {FIRST} tokens get from {proposal.queries} later queries"
    if proposal.sink == 0:
        return f"streaming_llm with sink: 0; there is none {behind}"
    shares = f"all heads: {proposal.mass[-1]:.0%} of their attention; the first token alone {proposal.mass[0]:.0%}"
    if proposal.sink > len(proposal.mass) // 2:
        return f"no proposal: {proposal.sink} tokens hold {SINK_SHARE:.0%} {behind}, so it is spread ({shares})"
    tokens = "token holds" if proposal.sink == 1 else f"{proposal.sink} tokens hold"
    held = proposal.held[proposal.sink - 1]
    return f"streaming_llm with sink: {proposal.sink}; the first {tokens} {held:.0%} {behind} ({shares})"


# Files


def _report(
    options: SinkOptions,
    statistics: SinkStatistics,
    heads: Sequence[HeadReport],
    proposal: SinkProposal,
    checks: Sequence[HeadCheck],
    rows: Sequence[Row],
    source: str,
    loss: Loss | None,
) -> dict[str, Any]:
    """Everything that was measured, for JSON; what has no value is null."""
    return {
        "checkpoint": options.checkpoint,
        "source": source,
        "rows": len(rows),
        "tokens": sum(len(row.ids) for row in rows),
        "thresholds": {"sink_mass": SINK_MASS, "output_ratio": OUTPUT_RATIO, "sink_share": SINK_SHARE, "first": FIRST},
        "layers": [
            {"layer": layer, "residual_peak": peak}
            for layer, peak in zip(statistics.layers, statistics.residual_peak.tolist(), strict=True)
        ],
        "uniform_mass": uniform_mass(statistics),
        "gated_layers": list(statistics.gated),
        "heads": [
            {name: _number(value) for name, value in one._asdict().items()} | {"dormant": one.dormant}
            for one in sorted(heads, key=lambda one: (one.layer, one.head))
        ],
        "proposal": proposal._asdict(),
        "loss": None if loss is None else loss._asdict(),
        "checks": [check._asdict() for check in checks],
    }


def _number(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


# Picture


def _new_figure() -> Figure:
    try:
        from matplotlib.figure import Figure  # without pyplot: draws with Agg, needs no display
    except ImportError:
        raise ConfigError("--picture needs matplotlib: pip install rltok[plot], or leave the option out") from None
    return Figure(dpi=DPI, layout="constrained")


def draw(figure: Figure, statistics: SinkStatistics, path: Path, title: str) -> None:
    """Heat maps of sink mass, value ratio and relative output norm, heads by layers, and the residual peaks; a PNG.

    Dormant heads are marked by a cross. Value ratio and output norm are cut at 2 in colour.
    """
    n_layers, n_heads = statistics.sink_mass.shape
    figure.set_size_inches(4.5 + 3 * min(5.0, max(2.2, 0.22 * n_heads)), min(12.0, max(3.6, 1.6 + 0.22 * n_layers)))
    panels = figure.subplots(1, 4, width_ratios=[3, 3, 3, 2])
    maps = (
        ("sink mass", statistics.sink_mass, "viridis", 1.0),
        ("value ratio", statistics.value_ratio, "coolwarm", 2.0),
        ("output norm / layer's median", statistics.relative_norm, "coolwarm", 2.0),
    )
    dormant = statistics.dormant().both.nonzero().tolist()
    for panel, (name, values, colours, top) in zip(panels, maps, strict=False):
        image = panel.imshow(values.cpu().numpy(), aspect="auto", cmap=colours, vmin=0.0, vmax=top, origin="lower")
        figure.colorbar(image, ax=panel, extend="neither" if top == 1.0 else "max")
        panel.scatter([h for _, h in dormant], [n for n, _ in dormant], marker="x", s=24, color="black", linewidths=1.2)
        panel.set_title(name, fontsize=10)
        panel.set_xlabel("head")
        _label_layers(panel, statistics.layers)
        panel.xaxis.get_major_locator().set_params(integer=True)
    panels[0].set_ylabel("layer")
    peaks = panels[3]
    peaks.barh(range(n_layers), statistics.residual_peak.tolist(), color="#0072B2")
    peaks.axvline(1.0, color="0.4", linewidth=0.8, linestyle="--")
    peaks.set_title("residual peak", fontsize=10)
    peaks.set_xlabel("first token / largest other")
    if float(statistics.residual_peak.max()) > LARGE_PEAK:
        peaks.set_xscale("log")
    peaks.set_ylim(-0.5, n_layers - 0.5)
    _label_layers(peaks, statistics.layers)
    figure.suptitle(title, fontsize=11, x=0.01, ha="left", parse_math=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(path.name + ".part")
    figure.savefig(draft, format="png")
    draft.replace(path)


def _label_layers(panel: Axes, layers: Sequence[int]) -> None:
    step = max(1, math.ceil(len(layers) / 24))
    places = range(0, len(layers), step)
    panel.set_yticks(list(places), [str(layers[place]) for place in places])
