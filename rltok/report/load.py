"""Everything a run directory holds, read so that a killed, running, old or damaged run still gives what is there.

What is missing or damaged is said in `RunData.problems`, in words; only a directory that is no run at all is refused.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import yaml

from rltok.config import ConfigError
from rltok.report.environment import FILE as ENVIRONMENT_FILE
from rltok.report.schema import COLUMNS, METADATA_KEY, REWARD_PREFIX, SampleMeta, column, ordered
from rltok.report.store import FOLDER, sample_paths

if TYPE_CHECKING:
    import pandas as pd

Moment = Literal["before", "after"]
MOMENTS: tuple[Moment, ...] = ("before", "after")
RECIPE, METRICS, SUMMARY = "recipe.yaml", "metrics.jsonl", "summary.json"
"""Files of a run, as `rltok.run.RunDirectory` names them; that module takes seconds to import."""
SAMPLES_SETTING = "report.samples.rows"
"""The setting of a recipe that records completions."""
FIRST_ONES = 3
"""A problem names so many places at most."""


@dataclass(frozen=True)
class SampleFile:
    """One readable file of recorded completions."""

    rollout: int
    """number of the generation batch"""
    path: Path
    rows: int
    """completions"""
    bytes: int
    step: int | None
    """optimizer steps done when the batch was generated; None where rows differ in it"""
    columns: tuple[str, ...]
    meta: SampleMeta


@dataclass
class RunData:
    """One run as `load` found it. What is missing is empty or None, and `problems` says so."""

    name: str
    """short, for a legend; `resolve_runs` makes it unique among several runs"""
    path: Path
    recipe: dict[str, Any] = field(default_factory=dict)
    """the resolved recipe"""
    environment: dict[str, Any] = field(default_factory=dict)
    """of the start, as `rltok.report.environment` makes it; `continued` lists those of later continuations"""
    metrics: pd.DataFrame = field(default_factory=lambda: _frame([]))
    """one row per logged step, ascending; `step` and `seconds` are always there, what a step did not log is NaN"""
    evaluations: dict[Moment, dict[str, Any]] = field(default_factory=dict)
    """moment -> number of completions and their means; only the evaluations that were made"""
    summary: dict[str, Any] | None = None
    """None: the run is not complete"""
    sample_files: list[SampleFile] = field(default_factory=list)
    """recorded generation batches, ascending"""
    problems: list[str] = field(default_factory=list)
    """what is missing or damaged, in plain words; `samples` and `evaluation_rows` add what they find"""

    def samples(self, steps: Collection[int] | None = None, columns: Sequence[str] | None = None) -> pd.DataFrame:
        """Recorded completions, one row each, in the order of rollout and row.

        Args:
            steps: optimizer steps whose rollouts are wanted; None takes all. Other files are not opened.
            columns: names of the schema; None takes all that any file has. A column that no file has is null.

        Returns:
            A frame whose per-token cells are arrays, None where the run did not compute them.

        Raises:
            KeyError: a column that the schema lacks.
        """
        names = [c.name for c in ordered(columns)] if columns is not None else None
        tables = []
        for file in self.sample_files:
            if steps is None or file.step is None or file.step in steps:
                table = self._read(file, names)
                if table is not None:
                    tables.append(table)
        found = ordered(name for table in tables for name in table.column_names) if names is None else ordered(names)
        whole = [_complete(table, [c.name for c in found]) for table in tables]
        joined = pa.concat_tables(whole) if whole else pa.schema([(c.name, c.arrow) for c in found]).empty_table()
        if steps is not None and "step" in joined.column_names:
            joined = joined.filter(pc.is_in(joined["step"], pa.array(list(steps), pa.int32())))
        return joined.to_pandas()

    def evaluation_rows(self, moment: Moment) -> pd.DataFrame | None:
        """The completions of a held-out evaluation, None where they are missing or damaged."""
        path = self.path / f"evaluation_{moment}.parquet"
        if not path.is_file():
            if moment in self.evaluations:
                self._problem(f"{path.name} is missing: the means of this evaluation are known, its completions not")
            return None
        try:
            return pq.read_table(path).to_pandas()
        except (pa.ArrowException, OSError, ValueError) as error:
            self._problem(_damaged(path.name, error))
            return None

    def _read(self, file: SampleFile, names: Sequence[str] | None) -> pa.Table | None:
        """The columns that the file has; None, and a problem, where it is damaged."""
        wanted = list(file.columns) if names is None else [name for name in names if name in file.columns]
        # lengths are checked against the ids and rows are counted, whatever is asked for
        needed = dict.fromkeys([*wanted, "token_ids"])
        try:
            with pq.ParquetFile(file.path, page_checksum_verification=True) as opened:
                table = opened.read(columns=list(needed))
            table = pa.table({name: table[name].cast(column(name).arrow) for name in needed})
            _check_lists(table)
        except (pa.ArrowException, OSError, ValueError, KeyError) as error:
            self._problem(_damaged(f"{FOLDER}/{file.path.name}", error))
            return None
        return table

    def _problem(self, text: str) -> None:
        if text not in self.problems:
            self.problems.append(text)


def load(run_dir: str | Path, name: str | None = None) -> RunData:
    """Read a run directory; sampled completions only when they are asked for.

    Args:
        run_dir: of a run that is complete, going on, killed or damaged.
        name: what to call it; None takes the directory's name.

    Returns:
        What is there, with `problems` for what is not.

    Raises:
        ConfigError: the directory does not exist or holds nothing of a run.
    """
    path = check_run(Path(run_dir))
    run = RunData(name or path.resolve().name, path)
    run.recipe = _mapping_file(run, RECIPE, "its settings are not known", yaml.safe_load)
    run.environment = _mapping_file(
        run, ENVIRONMENT_FILE, "versions, commit and command line of this run are not known", json.loads
    )
    continued = run.environment.get("continued")
    if isinstance(continued, list) and continued:
        run.problems.append(_continued(continued))
    run.metrics = _frame(_metric_lines(run))
    _read_summary(run)
    _read_evaluations(run)
    _find_samples(run)
    return run


def check_run(path: Path) -> Path:
    """The path, if it is a directory that holds a part of a run.

    Raises:
        ConfigError: it does not exist or holds none.
    """
    if not path.is_dir():
        raise ConfigError(f"run: {path} is no directory; give the directory of a run, such as runs/demo-seed0")
    if _is_run(path):
        return path
    inside = sorted(child for child in path.iterdir() if child.is_dir() and _is_run(child))
    hint = f"; runs in it: {', '.join(str(child) for child in inside[:FIRST_ONES])}" if inside else ""
    raise ConfigError(f"run: {path} holds no run: neither {RECIPE} nor {METRICS} nor {SUMMARY}{hint}")


def _is_run(path: Path) -> bool:
    return any((path / name).is_file() for name in (RECIPE, METRICS, SUMMARY)) or bool(sample_paths(path / FOLDER))


def resolve_runs(paths: Sequence[str | Path]) -> dict[str, Path]:
    """Short unique names of several run directories: the last part of the path, with parents where that is not enough.

    The same directory given twice is taken once.

    Raises:
        ConfigError: no path, or one that is no run.
    """
    if not paths:
        raise ConfigError("run: no directory of a run was given; give one or more, such as runs/demo-seed0")
    given: dict[Path, Path] = {}
    for path in map(Path, paths):
        given.setdefault(check_run(path).resolve(), path)
    parts = dict.fromkeys(given, 1)
    while True:
        names = {run: "/".join(run.parts[-parts[run] :]) for run in given}
        shared = [run for run in given if sum(name == names[run] for name in names.values()) > 1]
        if not shared:
            return {names[run]: path for run, path in given.items()}
        for run in shared:
            parts[run] += 1  # ends: two different absolute paths differ when all their parts are there


def _mapping_file(run: RunData, name: str, consequence: str, parse: Any) -> dict[str, Any]:
    """A mapping in a file of the run; empty, and a problem, where there is none."""
    path = run.path / name
    if not path.is_file():
        run.problems.append(f"{name} is missing: {consequence}")
        return {}
    try:
        values = parse(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        run.problems.append(f"{_damaged(name, error)}: {consequence}")
        return {}
    if isinstance(values, dict):
        return values
    run.problems.append(f"{name} holds no mapping: {consequence}")
    return {}


def _section(run: RunData, name: str) -> dict[str, Any]:
    """A section of the recipe, empty where a damaged recipe holds something else."""
    values = run.recipe.get(name)
    return values if isinstance(values, dict) else {}


def _damaged(name: str, error: Exception) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return f"{name} is damaged and left out ({text[:160]})"


def _continued(starts: Sequence[Mapping[str, Any]]) -> str:
    times = [str(start.get("started", "?")) for start in starts if isinstance(start, dict)]
    often = "once" if len(starts) == 1 else f"{len(starts)} times"
    return f"the run was interrupted and continued {often} (at {', '.join(times[-FIRST_ONES:])})"


def _metric_lines(run: RunData) -> list[dict[str, Any]]:
    path = run.path / METRICS
    if not path.is_file():
        run.problems.append(f"{METRICS} is missing: there are no curves")
        return []
    try:
        texts = path.read_text(encoding="utf-8", errors="replace").split("\n")
    except OSError as error:
        run.problems.append(f"{_damaged(METRICS, error)}: there are no curves")
        return []
    unfinished = texts.pop()  # what follows the last line break
    lines, bad = [], []
    for number, text in enumerate([*texts, unfinished] if unfinished else texts, start=1):
        line = _metric_line(text)
        if line is not None:
            lines.append(line)
        elif text.strip():
            bad.append(number)
    if unfinished and len(texts) + 1 in bad:
        bad.pop()
        run.problems.append(f"the last line of {METRICS} is cut off and left out: the run was killed while it wrote it")
    if bad:
        more = f" and {len(bad) - FIRST_ONES} more" if len(bad) > FIRST_ONES else ""
        places = ", ".join(map(str, bad[:FIRST_ONES])) + more
        run.problems.append(f"{METRICS} has {len(bad)} damaged line(s), left out: line {places}")
    if not lines:
        run.problems.append(f"{METRICS} holds no logged step: there are no curves")
    return lines


def _metric_line(text: str) -> dict[str, Any] | None:
    try:
        line = json.loads(text)
    except ValueError:
        return None
    usable = isinstance(line, dict) and isinstance(line.get("step"), int) and not isinstance(line["step"], bool)
    return line if usable else None


def _frame(lines: Sequence[Mapping[str, Any]]) -> pd.DataFrame:
    """One row per step; where a step was logged in several lines, the last value of each metric counts."""
    import pandas as pd

    steps: dict[int, dict[str, Any]] = {}
    for line in lines:
        steps.setdefault(line["step"], {}).update({key: value for key, value in line.items() if value is not None})
    names = dict.fromkeys(["step", "seconds", *(name for line in lines for name in line)])
    frame = pd.DataFrame([steps[step] for step in sorted(steps)], columns=list(names))
    return frame.astype({"step": "int64", "seconds": "float64"})


def _read_summary(run: RunData) -> None:
    if (run.path / SUMMARY).is_file():
        run.summary = _mapping_file(run, SUMMARY, "what the run reached in the end is not known", json.loads) or None
        return
    planned = _section(run, "training").get("max_steps")
    of = f" of {planned}" if isinstance(planned, int) and planned > 0 else ""
    last = f"the last logged step is {run.metrics['step'].iloc[-1]}{of}" if len(run.metrics) else "no step was logged"
    run.problems.append(f"{SUMMARY} is missing: the run is going on or was killed; {last}")


def _read_evaluations(run: RunData) -> None:
    settings = _section(run, "evaluation")
    for moment in MOMENTS:
        name = f"evaluation_{moment}.json"
        expected = settings.get(moment, False) and (moment == "before" or run.summary is not None)
        if not expected and not (run.path / name).is_file():
            continue
        values = _mapping_file(run, name, f"the held-out accuracy {moment} training is not known", json.loads)
        if values and not isinstance(values.get("means"), dict):
            run.problems.append(f"{name} holds no means: the held-out accuracy {moment} training is not known")
        elif values:
            run.evaluations[moment] = values


def _find_samples(run: RunData) -> None:
    """Files of recorded completions, by their footers."""
    folder = run.path / FOLDER
    for rollout, path in sample_paths(folder).items():
        try:
            run.sample_files.append(_sample_file(rollout, path))
        except (pa.ArrowException, OSError, ValueError) as error:
            run.problems.append(_damaged(f"{FOLDER}/{path.name}", error))
    drafts = len(list(folder.glob("rollout_*.parquet.part"))) if folder.is_dir() else 0
    if drafts:
        run.problems.append(f"{FOLDER} holds {drafts} unfinished file(s), left out: the run was killed while it wrote")
    if not run.sample_files:
        run.problems.append(f"no completions were recorded token by token: {_why_no_samples(run)}")


def _why_no_samples(run: RunData) -> str:
    settings = _section(run, "report").get("samples")
    rows = settings.get("rows") if isinstance(settings, Mapping) else None
    if sample_paths(run.path / FOLDER):
        return f"every file in {FOLDER} is damaged"
    if not run.recipe or rows:
        return f"{FOLDER} is empty; {SAMPLES_SETTING} of the recipe turns recording on"
    return f"{SAMPLES_SETTING} of the recipe is off or not there; set it to the number of completions to record"


def _sample_file(rollout: int, path: Path) -> SampleFile:
    with pq.ParquetFile(path, page_checksum_verification=True) as opened:
        schema, rows = opened.schema_arrow, opened.metadata.num_rows
        meta = _check_columns(schema)
        # the column, not the footer's statistics: pyarrow aborts the process where those are damaged
        steps = opened.read(columns=["step"])["step"].unique().to_pylist()
    step = steps[0] if len(steps) == 1 else None
    return SampleFile(rollout, path, rows, path.stat().st_size, step, tuple(schema.names), meta)


def _check_columns(schema: pa.Schema) -> SampleMeta:
    """The metadata of a file; footers have no checksum, so names are checked against the schema.

    Raises:
        ValueError: no metadata, an unknown column, or a required one that is missing.
    """
    text = (schema.metadata or {}).get(METADATA_KEY)
    if text is None:
        raise ValueError(f"no {METADATA_KEY.decode()!r} metadata: not written as samples of a run")
    meta = SampleMeta.from_json(text)
    expected = {f"{REWARD_PREFIX}{name}" for name in meta.rewards} | {c.name for c in COLUMNS.values() if c.required}
    allowed = expected | set(COLUMNS)
    wrong = [name for name in schema.names if name not in allowed]
    missing = [name for name in sorted(expected) if name not in schema.names]
    if wrong or missing:
        raise ValueError(f"unknown columns {wrong}, missing columns {missing}")
    return meta


def _check_lists(table: pa.Table) -> None:
    lengths = pc.list_value_length(table["token_ids"])
    for name in table.column_names:
        if pa.types.is_list(table.schema.field(name).type):
            same = pc.equal(pc.list_value_length(table[name]), lengths)
            if not pc.all(same, min_count=0).as_py():
                raise ValueError(f"column {name} has another number of entries than token_ids")


def _complete(table: pa.Table, names: Sequence[str]) -> pa.Table:
    """The named columns, nulls where the table lacks one."""
    nulls = {name: pa.nulls(table.num_rows, column(name).arrow) for name in names if name not in table.column_names}
    return pa.table({name: nulls[name] if name in nulls else table[name] for name in names})


def reward_names(run: RunData) -> list[str]:
    """Names of the reward functions in the recorded completions, in the order of the recipe."""
    return list(dict.fromkeys(name for file in run.sample_files for name in file.meta.rewards))
