"""Numbers and texts of a report as compact base64 text.

A float becomes `m * 10^e` with at most five significant digits, so that the page shows the recorded value rounded to
five digits and no other. The bytes of equal weight lie together (all low bytes, then all middle bytes, ...), which lets
gzip find the order that there is.
"""

from __future__ import annotations

import base64
import gzip
import json
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

DIGITS = 5
"""Significant digits of a packed float."""
_BIAS = 64
_NAN, _INFINITY, _MINUS_INFINITY = 255, 254, 253


def compress(data: bytes) -> str:
    """gzip, then base64; equal data gives equal text."""
    return base64.b64encode(gzip.compress(data, 6, mtime=0)).decode("ascii")


def pack_floats(values: ArrayLike) -> str:
    """Floats (n,) as planes of bytes: 3 of the signed digits (zigzag), 1 of the decimal exponent.

    Values beyond 1e±50 become infinite or zero; float32 has none. NaN and infinities are kept.
    """
    array = np.asarray(values, dtype=np.float64).ravel()
    size = np.abs(array)
    normal = np.isfinite(array) & (size > 1e-50) & (size < 1e50)
    safe = np.where(normal, size, 1.0)
    exponent = np.floor(np.log10(safe)).astype(np.int64) - (DIGITS - 1)
    digits = np.rint(_scaled(safe, exponent)).astype(np.int64)
    above = digits >= 10**DIGITS  # 9.99996 -> 10.0000
    digits, exponent = np.where(above, digits // 10, digits), exponent + above
    digits, exponent = np.where(normal, digits, 0), np.where(normal, exponent, 0) + _BIAS
    exponent = np.where(np.isnan(array), _NAN, exponent)
    exponent = np.where(array >= 1e50, _INFINITY, exponent)
    exponent = np.where(array <= -1e50, _MINUS_INFINITY, exponent)
    zigzag = (digits << 1) | (array < 0)
    planes = [zigzag & 255, (zigzag >> 8) & 255, zigzag >> 16, exponent]
    return compress(b"".join(plane.astype(np.uint8).tobytes() for plane in planes))


def _scaled(values: NDArray[np.float64], exponent: NDArray[np.int64]) -> NDArray[np.float64]:
    """values / 10^exponent, with powers of ten that float64 holds exactly wherever there are such."""
    up = np.float64(10) ** np.maximum(-exponent, 0)
    return values * up / np.float64(10) ** np.maximum(exponent, 0)


def pack_small(values: ArrayLike) -> str:
    """Whole numbers in [-128, 127] (n,), one byte each."""
    return compress(np.asarray(values).astype(np.int8).tobytes())


def pack_counts(values: ArrayLike) -> str:
    """Whole numbers from 0 (n,) as planes of bytes, lowest first; as many planes as the largest needs, at least one."""
    array = np.asarray(values, dtype=np.uint32).ravel()
    planes = max((int(array.max(initial=0)).bit_length() + 7) // 8, 1)
    return compress(b"".join(((array >> (8 * plane)) & 255).astype(np.uint8).tobytes() for plane in range(planes)))


def pack_json(value: Any) -> str:
    """JSON as compressed text."""
    return compress(
        json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False).encode("utf-8", "replace")
    )


def script_json(value: Any) -> str:
    """JSON that cannot end the script element it stands in, whatever texts it holds."""
    text = json.dumps(value, ensure_ascii=True, separators=(",", ":"), allow_nan=False)
    return text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")
