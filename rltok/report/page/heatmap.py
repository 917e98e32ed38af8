"""One completion as a static piece of HTML, coloured by one quantity: for trackers that show HTML, such as W&B."""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Mapping
from typing import Any

import numpy as np
from markupsafe import Markup, escape
from numpy.typing import NDArray

from rltok.report.page.colors import Theme, at, color_table, hexed, rgb, text_color
from rltok.report.page.quantities import NEUTRAL, PALETTE, Quantity, Range, all_quantities, derive, place, scale_range
from rltok.report.page.tokens import shown_bytes

_VISIBLE = {"\n": "\u21b5\n", "\t": "\u2192\t", "\r": "\u240d", " ": "\u00b7\u200b"}
"""White space -> a sign for it; the zero-width space lets lines break where a space was."""


def heatmap(row: Mapping[str, Any], quantity: str = "credit", theme: Theme = "light") -> str:
    """HTML fragment of a completion: no script, styles inline, the exact value of a token as its tooltip.

    Args:
        row: a row of the samples: `tokens`, the columns of the quantity, and what there is of `completion`,
            `in_loss`, `clipped`, `kept`, `step`, `reward` and `advantage`.
        quantity: a column of the schema that can be coloured, or `credit_share` or `mismatch`.
        theme: surroundings that the colours suit; the fragment brings its own background.

    Raises:
        ValueError: no such quantity, or the row has not recorded it.
    """
    chosen = _quantity(quantity)
    texts = [str(text) for text in row["tokens"]]
    values = _values(row, chosen, len(texts))
    span = scale_range(chosen, [values])
    shown = shown_bytes(texts, str(row.get("completion") or ""))
    tokens = Markup("").join(
        _token(chosen, span, theme, row, i, shown.get(i, text), float(values[i])) for i, text in enumerate(texts)
    )
    page, ink = color_table()[theme]["missing"], "#1b1f24" if theme == "light" else "#e6e8eb"
    return str(
        Markup(
            '<div style="background:{};color:{};padding:10px;border-radius:6px;'
            'font:13px/1.9 ui-monospace,Menlo,Consolas,monospace">{}'
            '<div dir="auto" style="white-space:pre-wrap;overflow-wrap:anywhere;unicode-bidi:plaintext">{}</div></div>'
        ).format(page, ink, _caption(chosen, span, theme, row), tokens)
    )


def _quantity(name: str) -> Quantity:
    known = {quantity.name: quantity for quantity in all_quantities()}
    if name not in known:
        raise ValueError(f"quantity: {name!r} cannot be coloured; allowed: {', '.join(known)}")
    return known[name]


def _values(row: Mapping[str, Any], quantity: Quantity, length: int) -> NDArray[np.float64]:
    absent = [name for name in quantity.columns if row.get(name) is None]
    if absent:
        raise ValueError(f"quantity: {quantity.name!r} needs {', '.join(absent)}, which this row has not recorded")
    columns = {name: np.asarray(row[name], dtype=np.float64) for name in quantity.columns if name != "advantage"}
    wrong = {name: len(values) for name, values in columns.items() if len(values) != length}
    if wrong:
        raise ValueError(f"{wrong} values for {length} tokens: a column has one entry per token")
    advantage = float(row["advantage"]) if row.get("advantage") is not None else math.nan
    return derive(quantity, columns, np.full(length, advantage))


def _token(
    quantity: Quantity, span: Range, theme: Theme, row: Mapping[str, Any], i: int, text: str, value: float
) -> Markup:
    background = color(quantity, span, theme, value)
    style = f"color:{text_color(rgb(background))};background:{background}" if background else ""
    style += _marks(row, i)
    visible = "".join(_visible(character) for character in text)
    title = f"{i}: {value:.5g} {quantity.unit}".strip() if math.isfinite(value) else f"{i}: not recorded"
    return Markup('<span style="{}" title="{}">{}</span>').format(style, title, escape(visible))


def _visible(character: str) -> str:
    """White space with a sign; what is invisible or reorders text by its number, but for the joiners."""
    if character in _VISIBLE:
        return _VISIBLE[character]
    hidden = unicodedata.category(character) in ("Cc", "Cf", "Zl", "Zp", "Co", "Cs") and character not in "\u200c\u200d"
    return f"[U+{ord(character):04X}]" if hidden else character


def color(quantity: Quantity, span: Range, theme: Theme, value: float) -> str:
    """Background of a value; empty for none."""
    table = color_table()[theme]
    if math.isnan(value):
        return ""
    if quantity.kind == "discrete":
        neutral = NEUTRAL.get(quantity.name, 0)
        return "" if value == neutral else str(table["palette"][PALETTE[int(value)]])
    return hexed(at(table[quantity.kind], place(quantity, span, value)))


def _marks(row: Mapping[str, Any], i: int) -> str:
    """Lines that do not depend on colour: clipped tokens and those outside the loss."""
    lines = []
    clipped = row.get("clipped")
    if clipped is not None and clipped[i] in (-1, 1):
        lines.append("underline" if clipped[i] == -1 else "overline")
    for name in ("in_loss", "kept"):
        flags = row.get(name)
        if flags is not None and not flags[i]:
            lines.append("line-through")
            break
    return f";text-decoration:{' '.join(lines)};text-decoration-thickness:2px" if lines else ""


def _caption(quantity: Quantity, span: Range, theme: Theme, row: Mapping[str, Any]) -> Markup:
    facts = [f"{name} {row[name]:.5g}" for name in ("step", "reward", "advantage") if row.get(name) is not None]
    unit = f", {quantity.unit}" if quantity.unit else ""
    if quantity.kind == "discrete":
        scale = Markup(" ").join(
            Markup('<span style="background:{}">{}</span>').format(
                color(quantity, span, theme, float(value)) or "none", text
            )
            for value, text in quantity.values
        )
    else:
        stops = [hexed(at(color_table()[theme][quantity.kind], share / 8)) for share in range(9)]
        stops = stops[::-1] if span.reverse else stops
        scale = Markup(
            '{:.4g} <span style="display:inline-block;width:9em;height:.8em;vertical-align:middle;'
            'background:linear-gradient(to right,{})"></span> {:.4g}'
        ).format(span.low, ",".join(stops), span.high)
    return Markup('<div style="font:12px system-ui,sans-serif;margin-bottom:6px">{} <b>{}</b>{} {}</div>').format(
        " · ".join(facts), quantity.label, unit, scale
    )
