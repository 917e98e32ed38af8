"""`rltok heads`: which heads look near and which far, measured once, as a recipe section that holds the lists.

With `head_scope: static` a run uses these lists instead of ranking the heads of every completion or batch; the lists
stand in the run's recipe.yaml like any other setting.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.console import Console

from rltok.attend import AttendOptions, build_method, in_words, load_checkpoint, padded, read_completions, sample_of
from rltok.attention import calibrate_heads
from rltok.attention.probe import probeable_layers
from rltok.config import ConfigError
from rltok.recipe import dump_yaml
from rltok.run import quiet_libraries


def run_heads(options: AttendOptions, out: Path | None, console: Console) -> int:
    """Rank the heads of a model over all completions of a file; print or write the recipe section.

    Raises:
        ConfigError: options, files or models that cannot be used.
    """
    quiet_libraries()
    if options.completions is None:
        raise ConfigError("--completions: missing; heads are ranked over completions, such as those of a run")
    method = build_method(options.settings)
    rows = read_completions(options.completions, options.rows)
    model, tokenizer = load_checkpoint(options)
    samples = [
        sample_of(row, tokenizer, options.chat, f"{options.completions}, row {number}")
        for number, row in enumerate(rows, start=1)
    ]
    batch = padded(samples, tokenizer.pad_token_id or 0)
    device = next(model.parameters()).device
    ids, mask, response = (tensor.to(device) for tensor in batch)
    with in_words():
        layers = probeable_layers(model, method.attention.layers)
        local, far = calibrate_heads(model, [(ids, mask, response)], method.attention)
    section: dict[str, Any] = {
        "type": "preplan_anchor",
        "head_scope": "static",
        "layers": list(layers),
        "local_heads": list(local),
        "global_heads": list(far),
    }
    text = dump_yaml({"credit": section})
    if out is None:
        console.print(text, end="", markup=False, highlight=False)
    else:
        out.parent.mkdir(parents=True, exist_ok=True)
        header = (
            f"# Heads of {options.checkpoint} ranked over {len(samples)} completions, {int(response.sum())} tokens\n"
        )
        out.write_text(header + text, encoding="utf-8")
        console.print(f"heads written to {out}", markup=False, highlight=False)
    return 0
