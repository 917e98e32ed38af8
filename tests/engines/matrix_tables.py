"""The tables of the documentation, from what the matrix is expected to show."""

from __future__ import annotations

from cells import ENGINES, METHODS, expected

SHOWN = {"same": "same", "refused": "refused", "gpu": "GPU"}


def full_table() -> str:
    """Methods in rows, engines in columns."""
    lines = ["| method | " + " | ".join(ENGINES) + " |", "| --- |" + " --- |" * len(ENGINES)]
    for method in METHODS:
        cells = " | ".join(SHOWN[expected(method, engine)] for engine in ENGINES)
        door, name = method.split(": ")
        lines.append(f"| {door}: `{name}` | {cells} |")
    return "\n".join(lines) + "\n"


def short_table() -> str:
    """One line per engine."""
    lines = [
        "| engine | methods with the numbers of one process | refused when the trainer is built |",
        "| --- | --- | --- |",
    ]
    for engine, how in ENGINES.items():
        outcomes = {method: expected(method, engine) for method in METHODS}
        refused = [f"`{method.split(': ')[1]}`" for method, found in outcomes.items() if found == "refused"]
        same = sum(found == "same" for found in outcomes.values())
        shown = f"{same} of {len(METHODS)}" if same else "its tests need a GPU and have not been run"
        lines.append(f"| {engine} ({how}) | {shown} | {', '.join(refused) or '-'} |")
    return "\n".join(lines) + "\n"
