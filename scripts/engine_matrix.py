"""Run the matrix method x engine, and write its tables into the documentation.

    python scripts/engine_matrix.py                       # all cells, then the tables; about 3 minutes on two cores
    python scripts/engine_matrix.py --engines FSDP2       # some engines, no tables
    python scripts/engine_matrix.py --tables              # the tables alone, from what the tests expect

Every cell prints what was found and the numbers behind it. A cell that is not what tests/engines/cells.py expects ends
the script with status 1, and no table is written. Without DeepSpeed its engines cannot run: they are named, and the
status is 1. `docs/engines.md` needs the markers `<!-- table -->` and `<!-- /table -->`, README.md `<!-- engines -->`
and `<!-- /engines -->`.
"""

from __future__ import annotations

import argparse
import importlib.util
import re
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests" / "engines"))

from cells import DEEPSPEED, ENGINES, METHODS, TOLERANCE, expected  # noqa: E402
from groups import GROUPS, run_group  # noqa: E402
from judge import judged  # noqa: E402
from matrix_tables import full_table, short_table  # noqa: E402

PLACES = {ROOT / "docs" / "engines.md": ("table", full_table), ROOT / "README.md": ("engines", short_table)}


def run_matrix(engines: Sequence[str], methods: Sequence[str]) -> list[str]:
    """Run cells and print them; the names of those that are not as expected."""
    wrong = []
    with tempfile.TemporaryDirectory(prefix="rltok-engines-") as name:
        folder = Path(name)
        one = run_group(folder, 1, {"one process": methods})["one process"]
        for ranks, group in GROUPS.items():
            for engine in (engine for engine in group if engine in engines):
                start = time.perf_counter()
                rows = run_group(folder, ranks, {engine: methods})[engine]
                elapsed = time.perf_counter() - start
                print(f"{engine} ({ENGINES[engine]}), tolerance {TOLERANCE[engine]:g}: {elapsed:.0f} s")
                for method in methods:
                    found, why = judged(rows[method], one[method], engine, method)
                    right = found == expected(method, engine)
                    print(
                        f"  {method:34} {found:9} {why}" + ("" if right else f"   EXPECTED {expected(method, engine)}")
                    )
                    wrong += [] if right else [f"{method} on {engine}"]
    return wrong


def write_tables() -> None:
    """Put the tables between their markers.

    Raises:
        SystemExit: a file without the markers; nothing is written then.
    """
    texts = {}
    for path, (name, table) in PLACES.items():
        text = path.read_text(encoding="utf-8")
        pattern = re.compile(rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)", re.DOTALL)
        if len(pattern.findall(text)) != 1:
            raise SystemExit(f"{path} needs the line <!-- {name} --> and, after it, <!-- /{name} -->, each once")
        content = table()
        texts[path] = pattern.sub(lambda match, content=content: match[1] + content + match[2], text)
    for path, text in texts.items():
        path.write_text(text, encoding="utf-8")
        print(f"wrote the table of {path.relative_to(ROOT)}")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    runnable = [engine for engine in ENGINES if expected("credit: group", engine) != "gpu"]
    parser.add_argument("--engines", nargs="+", choices=runnable, metavar="ENGINE", help=", ".join(runnable))
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), metavar="METHOD", help="such as 'credit: group'")
    parser.add_argument("--tables", action="store_true", help="write the tables and run nothing")
    options = parser.parse_args(arguments)
    wrong: list[str] = []
    if not options.tables:
        engines = options.engines or runnable
        if importlib.util.find_spec("deepspeed") is None:
            wrong = [f"{engine} (DeepSpeed is not installed)" for engine in engines if engine in DEEPSPEED]
            engines = [engine for engine in engines if engine not in DEEPSPEED]
        wrong += run_matrix(engines, options.methods or list(METHODS))
        print("not as expected, or not run: " + ", ".join(wrong) if wrong else "every cell is as expected")
    if not wrong and not options.engines and not options.methods:
        write_tables()
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
