"""Sampled completions on disk: one Parquet file per recorded generation batch, in a folder that stays below a size.

samples/rollout_000012.parquet    columns and metadata as `rltok.report.schema` says

When the folder grows too large, files leave it from where they lie densest, so that what stays is spread over the whole
run: the first and the newest recorded batch are kept, and no gap between two neighbours gets larger than about twice
the mean gap.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from rltok.report.schema import COLUMNS, METADATA_KEY, REWARD_PREFIX, Column, SampleMeta, ordered

if TYPE_CHECKING:
    from torch import Tensor

FOLDER = "samples"
"""Name of the folder in a run directory."""
MAX_BYTES = 64 * 2**20
"""Default size of the folder."""
FILE_NAME = re.compile(r"rollout_(\d+)\.parquet")
REPEATING = ["prompt", "token_ids.list.element", "tokens.list.element"]
"""Columns stored as a dictionary of their values; the numbers of the others hardly repeat."""


@dataclass(frozen=True)
class SampleConfig:
    """How much is recorded of a run's completions."""

    rows: int = 16
    """Completions of every rollout, in whole groups; 0 records none."""
    max_mb: float = 64.0
    """Size of all files in MiB; beyond it rollouts are thinned out evenly."""

    def __post_init__(self) -> None:
        if self.rows < 0:
            raise ValueError(f"rows={self.rows} must be >= 0; 0 records none")
        if not self.max_mb > 0:
            raise ValueError(f"max_mb={self.max_mb} must be > 0; to record nothing set rows=0")


class SampleStore:
    """Writes the sample files of one run; one process of the run has it.

    Args:
        folder: made when the first file is written.
        max_bytes: size the folder's files are kept below, >= 1. The newest file stays even if it is larger.

    Raises:
        ValueError: max_bytes < 1.
    """

    def __init__(self, folder: str | Path, max_bytes: int = MAX_BYTES) -> None:
        if max_bytes < 1:
            raise ValueError(f"max_bytes={max_bytes} must be >= 1; to record nothing, sample no completions")
        self.folder = Path(folder)
        self.max_bytes = max_bytes
        self.sizes = {rollout: path.stat().st_size for rollout, path in sample_paths(self.folder).items()}
        """recorded rollout -> bytes of its file"""

    def path(self, rollout: int) -> Path:
        """The file of a generation batch."""
        return self.folder / f"rollout_{rollout:06d}.parquet"

    def write(
        self, rollout: int, rows: Mapping[str, Any] | Sequence[Mapping[str, Any]], meta: SampleMeta
    ) -> Path | None:
        """Write the chosen completions of a generation batch, then thin the folder to its size.

        The file appears whole or not at all, and replaces an older one of the same rollout.

        Args:
            rollout: number of the generation batch, >= 0.
            rows: column -> one value per completion, or one mapping per completion. Values are sequences, arrays or
                tensors; per token an Arrow list array (`token_lists`) or one sequence per completion. A plain number,
                or string, stands for all completions. `rollout` and `group` may be left out.
            meta: what holds for all rows; `meta.rewards` names the columns `reward/<name>`.

        Returns:
            The file, None if there are no rows.

        Raises:
            ValueError: a column that the schema lacks or requires, a wrong type, or lengths that do not fit.
            OSError: the disk is full or the folder cannot be written.
        """
        if rollout < 0:
            raise ValueError(f"rollout={rollout} must be >= 0; generation batches are numbered from 0")
        table = sample_table(rollout, rows, meta)
        if not table.num_rows:
            return None
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.path(rollout)
        draft = path.with_name(path.name + ".part")
        _write_parquet(table, draft)
        draft.replace(path)
        self.sizes[rollout] = path.stat().st_size
        self._thin(rollout)
        return path

    def drop_from(self, rollout: int) -> list[int]:
        """Delete the files of `rollout` and later, which a continued run writes again, and what a killed one left.

        Returns:
            The rollouts whose files were deleted.
        """
        dropped = sorted(number for number in self.sizes if number >= rollout)
        for number in dropped:
            self._delete(number)
        if self.folder.is_dir():
            for draft in self.folder.glob("rollout_*.parquet.part"):
                draft.unlink(missing_ok=True)
        return dropped

    def _thin(self, newest: int) -> None:
        """Delete files until the folder is small enough; `newest` stays."""
        while sum(self.sizes.values()) > self.max_bytes and len(self.sizes) > 1:
            self._delete(densest(self.sizes, newest))

    def _delete(self, rollout: int) -> None:
        self.path(rollout).unlink(missing_ok=True)
        del self.sizes[rollout]


def densest(rollouts: Iterable[int], newest: int) -> int:
    """The rollout that is missed least: the oldest of those whose neighbours are closest to each other.

    Raises:
        ValueError: there is none besides `newest`.
    """
    numbers = sorted(rollouts)
    inner = [(after - before, at) for before, at, after in zip(numbers, numbers[1:], numbers[2:], strict=False)]
    gaps = [(gap, at) for gap, at in inner if at != newest]
    if gaps:
        return min(gaps)[1]
    return next(number for number in numbers if number != newest)


def sample_paths(folder: Path) -> dict[int, Path]:
    """Rollout -> its file, in the order of the rollouts; other files in the folder are left out."""
    if not folder.is_dir():
        return {}
    found = {int(match[1]): path for path in folder.iterdir() if (match := FILE_NAME.fullmatch(path.name))}
    return dict(sorted(found.items()))


def chosen_groups(seed: int, rollout: int, groups: int, rows: int, group_size: int) -> list[int]:
    """Which groups of a generation batch to record: whole groups, one from each of equal parts of the batch.

    Args:
        seed: of the run. The choice depends on the arguments alone, so it is the same on every rank and when a
            rollout is made again, and it differs between rollouts.
        groups: number of groups in the batch over all ranks.
        rows: number of completions wanted. Whole groups are taken, as many as fit but at least one; 0 takes none.
        group_size: G.

    Returns:
        Group numbers, ascending.

    Raises:
        ValueError: group_size < 1, or a negative number of groups or rows.
    """
    if group_size < 1 or groups < 0 or rows < 0:
        raise ValueError(f"group_size={group_size} must be >= 1, groups={groups} and rows={rows} >= 0")
    count = min(groups, max(1, rows // group_size)) if rows else 0
    generator = random.Random(f"{seed}/{rollout}")  # of a string: the same on every platform and Python
    bounds = [part * groups // count for part in range(count + 1)] if count else []
    return [generator.randrange(low, high) for low, high in zip(bounds, bounds[1:], strict=False)]


def token_lists(values: Tensor | np.ndarray, lengths: Tensor | np.ndarray | Sequence[int]) -> pa.ListArray:
    """The first `lengths[b]` entries of every row of a (B, T) tensor, as one Arrow list per row.

    Args:
        values: (B, T), right-padded; on any device. Half precision becomes float32.
        lengths: (B,) in [0, T].

    Raises:
        ValueError: shapes that do not fit, or a length outside [0, T].
    """
    cells = host_array(values)
    counts = host_array(lengths).astype(np.int64)
    if cells.ndim != 2 or counts.shape != cells.shape[:1]:
        raise ValueError(f"values have shape {cells.shape} and lengths {counts.shape}; (B, T) and (B,) are needed")
    if counts.size and (counts.min() < 0 or counts.max() > cells.shape[1]):
        raise ValueError(f"lengths reach from {counts.min()} to {counts.max()}; allowed: 0 to T={cells.shape[1]}")
    flat = cells[np.arange(cells.shape[1]) < counts[:, None]]
    offsets = np.concatenate([[0], counts.cumsum()]).astype(np.int32)
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(flat))


def token_texts(ids: pa.ListArray, text: Callable[[int], str]) -> pa.ListArray:
    """Texts of token ids; `text` is called once per distinct id."""
    distinct, places = np.unique(ids.flatten().to_numpy(zero_copy_only=False), return_inverse=True)
    texts = _strings([text(int(token)) for token in distinct])
    counts = pc.fill_null(pc.list_value_length(ids), 0).to_numpy(zero_copy_only=False)
    offsets = np.concatenate([[0], counts.cumsum()]).astype(np.int32)
    return pa.ListArray.from_arrays(pa.array(offsets), texts.take(pa.array(places)))


def host_array(values: Tensor | np.ndarray | Sequence[Any]) -> np.ndarray:
    """A NumPy array of a tensor on any device, an array or a sequence; half precision becomes float32."""
    if isinstance(values, np.ndarray | list | tuple | range):
        array = np.asarray(values)
        return array.astype(np.float32) if array.dtype == np.float16 else array
    tensor = cast("Tensor", values).detach().cpu()
    return (tensor.float() if tensor.is_floating_point() and tensor.element_size() < 4 else tensor).numpy()


def sample_table(rollout: int, rows: Mapping[str, Any] | Sequence[Mapping[str, Any]], meta: SampleMeta) -> pa.Table:
    """The table of a sample file, rows in the order of `row`; arguments and errors as `SampleStore.write`."""
    values = dict(rows) if isinstance(rows, Mapping) else _columns_of(rows)
    if not values:
        values = {"token_ids": [], "row": []}
    _check_names(values, meta)
    count = _count(values)
    if not count:
        return pa.table({})
    values.setdefault("rollout", rollout)
    arrays = {c.name: _array(c, values[c.name], count) for c in ordered(values)}
    if "group" not in arrays:
        arrays["group"] = pc.divide(arrays["row"], pa.scalar(meta.group_size, pa.int32()))
    columns = ordered(arrays)
    _check_arrays(columns, arrays, rollout)
    schema = pa.schema(
        [pa.field(c.name, c.arrow, nullable=not c.required) for c in columns],
        metadata={METADATA_KEY: meta.to_json()},
    )
    table = pa.table([arrays[c.name] for c in columns], schema=schema)
    places = arrays["row"].to_numpy()
    return table if (np.diff(places) > 0).all() else table.take(np.argsort(places))


def _columns_of(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    names = dict.fromkeys(name for row in rows for name in row)
    return {name: [row.get(name) for row in rows] for name in names}


def _check_names(values: Mapping[str, Any], meta: SampleMeta) -> None:
    try:
        ordered(values)
    except KeyError as error:
        raise ValueError(error.args[0]) from error
    derived = ("rollout", "group")
    missing = [c.name for c in COLUMNS.values() if c.required and c.name not in values and c.name not in derived]
    if missing and _count(values):
        raise ValueError(f"columns {', '.join(missing)} are missing; the schema requires them in every sample file")
    rewards = [name[len(REWARD_PREFIX) :] for name in values if name.startswith(REWARD_PREFIX)]
    if _count(values) and set(rewards) != set(meta.rewards):
        raise ValueError(f"columns hold rewards {sorted(rewards)} but meta.rewards names {sorted(meta.rewards)}")


def _count(values: Mapping[str, Any]) -> int:
    if "token_ids" not in values:
        raise ValueError("column token_ids is missing; it says how many completions and tokens there are")
    return len(values["token_ids"])


def _array(column: Column, values: Any, count: int) -> pa.Array:
    """An Arrow array of the column's type.

    Raises:
        ValueError: another type, or not `count` values.
    """
    if not column.per_token and (values is None or isinstance(values, bool | int | float | str)):
        values = [values] * count
    try:
        array = values if isinstance(values, pa.Array | pa.ChunkedArray) else _plain_array(column, values)
        array = array.cast(column.arrow)
    except (pa.ArrowInvalid, pa.ArrowTypeError, pa.ArrowNotImplementedError, TypeError) as error:
        raise ValueError(f"column {column.name}: values are no {column.type_name}: {error}") from error
    if len(array) != count:
        raise ValueError(f"column {column.name} has {len(array)} values but token_ids {count}; give one per completion")
    return array.combine_chunks() if isinstance(array, pa.ChunkedArray) else array


def _plain_array(column: Column, values: Any) -> pa.Array:
    if not column.per_token:
        if column.dtype == "string":
            return _strings(values)
        if isinstance(values, list | tuple):
            return pa.array(values, type=column.arrow)  # None stays null
        return pa.array(host_array(values))
    if not isinstance(values, list | tuple):
        raise TypeError("give one sequence per completion, or `token_lists(values, lengths)` of a (B, T) tensor")
    lists = [cells if cells is None or isinstance(cells, list | tuple) else host_array(cells) for cells in values]
    if column.dtype != "string":
        return pa.array(lists, type=column.arrow)
    lengths = [0 if cells is None else len(cells) for cells in lists]
    offsets = pa.array(np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32))
    flat = _strings([cell for cells in lists if cells is not None for cell in cells])
    return pa.ListArray.from_arrays(offsets, flat, mask=pa.array([cells is None for cells in lists]))


def _strings(texts: Sequence[str | None]) -> pa.Array:
    """UTF-8 texts; a lone surrogate, which UTF-8 does not have, is written as its escape."""
    try:
        return pa.array(texts, type=pa.string())
    except UnicodeEncodeError:
        escaped = [None if t is None else t.encode("utf-8", "backslashreplace").decode() for t in texts]
        return pa.array(escaped, type=pa.string())


def _check_arrays(columns: Sequence[Column], arrays: Mapping[str, pa.Array], rollout: int) -> None:
    lengths = pc.list_value_length(arrays["token_ids"])
    for column in columns:
        array = arrays[column.name]
        if column.required and array.null_count:
            raise ValueError(f"column {column.name} holds {array.null_count} nulls; the schema requires a value")
        if column.per_token and not pc.all(pc.equal(pc.list_value_length(array), lengths), min_count=0).as_py():
            raise ValueError(
                f"column {column.name} has lists of {pc.list_value_length(array).to_pylist()} entries, "
                f"token_ids of {lengths.to_pylist()}; give one entry per token"
            )
    if not pc.all(pc.equal(arrays["rollout"], rollout)).as_py():
        raise ValueError(f"column rollout holds {arrays['rollout'].unique().to_pylist()} in the file of {rollout}")
    if pc.count_distinct(arrays["row"]).as_py() < len(arrays["row"]):
        raise ValueError(f"column row holds {arrays['row'].to_pylist()}; every completion has a place of its own")


def _write_parquet(table: pa.Table, path: Path) -> None:
    dictionary = [name for name in REPEATING if name.split(".")[0] in table.column_names]
    floats = [
        f"{field.name}.list.element"
        for field in table.schema
        if pa.types.is_list(field.type) and pa.types.is_floating(field.type.value_type)
    ]
    pq.write_table(
        table,
        path,
        compression="zstd",
        use_dictionary=dictionary,
        use_byte_stream_split=floats,  # bytes of equal weight side by side: exponents compress
        write_statistics=False,
        write_page_checksum=True,
    )
