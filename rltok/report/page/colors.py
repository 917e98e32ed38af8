"""Colours of the token quantities: two scales and a few single colours, each for light and dark surroundings.

The stops lie in `static/colors.json`, which the page's script reads too. Text is black or white, whichever contrasts
more: that is at least 4.58 : 1 on any colour.
"""

from __future__ import annotations

import json
import math
from functools import cache
from importlib.resources import files
from typing import Any, Literal

Theme = Literal["light", "dark"]
Rgb = tuple[float, float, float]


@cache
def color_table() -> dict[str, Any]:
    """The stops and single colours, by theme."""
    return json.loads((files("rltok.report.page") / "static" / "colors.json").read_text(encoding="utf-8"))


def at(stops: list[str], place: float) -> Rgb:
    """Colour at `place` in [0, 1] between equally spaced stops; red, green and blue in [0, 255]."""
    place = min(max(place, 0.0), 1.0) * (len(stops) - 1)
    low = min(int(place), len(stops) - 2)
    a, b = rgb(stops[low]), rgb(stops[low + 1])
    share = place - low
    return (
        a[0] + (b[0] - a[0]) * share,
        a[1] + (b[1] - a[1]) * share,
        a[2] + (b[2] - a[2]) * share,
    )


def rgb(text: str) -> Rgb:
    """`#rrggbb` as three numbers."""
    return (float(int(text[1:3], 16)), float(int(text[3:5], 16)), float(int(text[5:7], 16)))


def hexed(color: Rgb) -> str:
    """Three numbers as `#rrggbb`."""
    return "#" + "".join(f"{round(part):02x}" for part in color)


def luminance(color: Rgb) -> float:
    """Relative luminance of an sRGB colour (WCAG 2), 0 black to 1 white."""
    linear = [part / 255 / 12.92 if part / 255 <= 0.04045 else ((part / 255 + 0.055) / 1.055) ** 2.4 for part in color]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(a: Rgb, b: Rgb) -> float:
    """Contrast ratio of two colours (WCAG 2), 1 to 21."""
    high, low = sorted((luminance(a), luminance(b)), reverse=True)
    return (high + 0.05) / (low + 0.05)


def text_color(background: Rgb) -> str:
    """Black or white, whichever contrasts more."""
    return "#000000" if luminance(background) > math.sqrt(1.05 * 0.05) - 0.05 else "#ffffff"
