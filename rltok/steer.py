"""`rltok steer`: steering vectors of a model from triples of a prompt, a preferred and a dispreferred response."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table
from torch import nn

from rltok.attend import WeightType, checkpoint_config, load_policy
from rltok.config import ConfigError
from rltok.models import load_tokenizer
from rltok.progress import bar
from rltok.prompts import asked_as, check_prompt, is_conversation, prompt_tokens, read_rows
from rltok.run import quiet_libraries
from rltok.steering import (
    Contrast,
    ContrastOptions,
    LayerDirection,
    SteeringVector,
    Triple,
    contrast_states,
    describe_model,
    layer_directions,
    save_vectors,
)
from rltok.steering.vectors import STRENGTH, Method

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

COLUMNS = ("prompt", "preferred", "dispreferred")
LARGE_GAP = 0.05
"""A completeness gap above it is pointed out."""


@dataclass(frozen=True)
class SteerOptions:
    """What `rltok steer` was asked for."""

    checkpoint: str
    """a checkpoint or model directory, `tiny-reasoner` or a hub id"""
    triples: Path
    """JSON lines or Parquet with the columns prompt, preferred, dispreferred"""
    out: Path
    """the safetensors file"""
    layers: Sequence[int]
    """decoder layers, from 0"""
    contrast: ContrastOptions = field(default_factory=ContrastOptions)
    """how triples become differences of hidden states"""
    method: Method = "pca"
    """pca or mean"""
    strength: float = STRENGTH
    """of the vectors"""
    rows: int | None = None
    """first rows of the file to read; None reads all"""
    chat: bool = False
    """make a plain prompt the user message of a conversation, by the tokenizer's chat template"""
    dtype: WeightType = "float32"
    """of the weights; the computation is in float32"""

    def __post_init__(self) -> None:
        if self.out.suffix != ".safetensors" or self.out.is_dir():
            raise ConfigError(f"--out {self.out}: name a file that ends in .safetensors")
        if not self.layers or len(set(self.layers)) != len(self.layers) or min(self.layers) < 0:
            raise ConfigError(f"--layers {_commas(self.layers)}: name distinct layers from 0, such as 1,2")
        if not math.isfinite(self.strength):
            raise ConfigError(f"--strength {self.strength} must be finite")
        if self.rows is not None and self.rows < 1:
            raise ConfigError(f"--rows {self.rows} must be >= 1")


def parse_layers(text: str) -> tuple[int, ...]:
    """`1,2` as numbers.

    Raises:
        ConfigError: something else than numbers.
    """
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise ConfigError(f"--layers {text!r}: name layers by number, such as 1,2") from None


def run_steer(options: SteerOptions, console: Console) -> int:
    """Build the vectors of `options`, write them, and print what they are made of.

    Raises:
        ConfigError: options, files or models that cannot be used.
    """
    quiet_libraries()
    rows = read_rows(options.triples, "--triples", COLUMNS, (), options.rows)
    config = checkpoint_config(options.checkpoint, options.dtype)
    tokenizer = load_tokenizer(config)
    triples = [
        triple_of(row, tokenizer, options.chat, f"--triples {options.triples}, row {number}")
        for number, row in enumerate(rows, start=1)
    ]
    model = load_policy(config)
    try:
        with _progress(console, len(triples)) as advance:
            contrast = contrast_states(model, tokenizer, triples, options.layers, options.contrast, advance)
        found = layer_directions(contrast, options.method)
    except ValueError as error:
        raise ConfigError(f"--triples {options.triples}: {error}") from error
    vectors = [SteeringVector(one.layer, one.vector, options.strength) for one in found]
    save_vectors(options.out, vectors, _settings(options, contrast, model))
    _print_table(found, options, console)
    _print_facts(contrast, len(rows), options, console)
    return 0


def triple_of(row: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase, chat: bool, where: str) -> Triple:
    """A row in token ids; prompt and response are joined as in a rollout, without a blank between them.

    Raises:
        ConfigError: a prompt that is neither text nor a conversation, or a response that is neither text nor a message.
    """
    check_prompt(row["prompt"], where)
    _, prompt = prompt_tokens(tokenizer, asked_as(row["prompt"], chat))
    responses = (_response(row[name], f"{where}: {name}") for name in COLUMNS[1:])
    return Triple(prompt, *(tokenizer(text, add_special_tokens=False)["input_ids"] for text in responses))


def _response(value: Any, where: str) -> str:
    if isinstance(value, str):
        return value
    if is_conversation(value) and len(value) == 1:
        return value[0]["content"]
    raise ConfigError(f"{where} {value!r} is neither text nor one message of text")


@contextmanager
def _progress(console: Console, total: int) -> Iterator[Callable[[int], None] | None]:
    """A bar in a terminal, nothing elsewhere."""
    if not console.is_terminal:
        yield None
        return
    with bar(console) as display:
        task = display.add_task("attribution", total=total, detail="triples")
        yield lambda done: display.advance(task, done)


def _settings(options: SteerOptions, contrast: Contrast, model: nn.Module) -> dict[str, Any]:
    made = asdict(options.contrast) | {"method": options.method, "strength": options.strength}
    source = {"layers": list(options.layers), "triples": contrast.triples, "file": options.triples.name}
    return made | source | describe_model(model, options.checkpoint)


def _print_table(found: Sequence[LayerDirection], options: SteerOptions, console: Console) -> None:
    table = Table()
    selections = options.contrast.selections
    explained = f"explained ({', '.join(selections)})"
    names = ("layer", "|v|", explained, "cosine", "sign", "|h|", "shift")
    for name in names:
        table.add_column(name, justify="right")
    for one in found:
        norm = float(one.vector.norm())
        table.add_row(
            str(one.layer),
            f"{norm:.3f}",
            " ".join(f"{part.share:.1%}" for part in one.parts),
            f"{one.cosine:+.3f}",
            " ".join("-" if part.flipped else "+" for part in one.parts),
            f"{one.hidden_norm:.2f}",
            f"{abs(options.strength) * norm / one.hidden_norm:.2f}",
        )
    console.print(table)


def _print_facts(contrast: Contrast, rows: int, options: SteerOptions, console: Console) -> None:
    lines = [
        "cosine: between the mean difference of preferred sequences and v; sign -: the component was turned; shift: "
        "strength |v| / |h|, what is added before the old length is restored",
        f"triples         {contrast.triples} of {rows}",
    ]
    if contrast.gaps:
        gap = statistics.median(contrast.gaps)
        lines.append(f"completeness    off by {gap:.1%} (median)")
        if gap > LARGE_GAP:
            lines.append(
                f"note: {options.contrast.steps} nodes do not resolve the path from the {options.contrast.baseline} "
                "embedding; the scores describe the model near the true ones. --baseline mean --steps 50 resolves more"
            )
    lines.append(f"vectors         {options.out}")
    for line in lines:
        console.print(line, highlight=False, soft_wrap=True, markup=False)


def _commas(values: Sequence[int]) -> str:
    return ",".join(map(str, values))
