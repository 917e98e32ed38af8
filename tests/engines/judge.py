"""Whether a cell of the matrix trained what one process trains."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from cells import TOLERANCE


def judged(result: Mapping[str, Any], one: Mapping[str, Any], engine: str, method: str) -> tuple[str, str]:
    """`same`, `refused` or `different`, and the numbers or the error behind it."""
    if "refused" in result:
        if result["refused"] is None:
            return "different", f"{method} on {engine} can be built, but is expected to be refused"
        return "refused", result["refused"]
    limit = TOLERANCE[engine]
    if "wanted" in result:
        apart = (result["gradient"] - result["wanted"]).norm().item() / result["wanted"].norm().item()
        loss = abs(result["losses"][0] - result["losses"][1])
        good = apart <= limit and loss <= limit and result["same_tokens"] and not result["frozen_moved"]
        why = f"gradient {apart:.1e} of its norm, loss {loss:.1e}, tokens equal: {result['same_tokens']}"
        return ("same" if good else "different"), f"{why}, frozen weights that moved: {result['frozen_moved']}"
    if "start" in result:
        moved, plain = (
            torch.cat([(result[kind][name] - start).flatten() for name, start in result["start"].items()])
            for kind in ("parameters", "plain")
        )
        apart = (moved - plain).norm().item() / plain.norm().item()
        loss = abs(result["losses"][0] - one["losses"][0])
        good = 0 < apart <= limit and loss <= limit
        return ("same" if good else "different"), f"update {apart:.1e} of its norm, loss {loss:.1e}"
    apart = max((result["parameters"][name] - value).abs().max().item() for name, value in one["parameters"].items())
    losses = [abs(a - b) for a, b in zip(result["losses"], one["losses"], strict=True)]
    good = apart <= limit and max(losses) <= max(limit, 1e-5)
    return ("same" if good else "different"), f"parameters {apart:.1e}, losses {max(losses):.1e}"
