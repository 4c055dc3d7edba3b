"""Sources at rest: their files and row groups, and reads pruned to the columns and times that are needed."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
from apache_beam.io.filesystems import FileSystems

from schemas.errors import ContractError, DataError
from schemas.sources import Source
from transforms.contracts import EPOCH, MICROSECOND, Contract, judge
from transforms.tables import WRITERS

ALWAYS = -(2**62)
# Columns of dead letters with their place; `time` in µs decides their date.
LETTERS = {
    "source": pl.String,
    "file": pl.String,
    "row": pl.Int64,
    "field": pl.String,
    "rule": pl.String,
    "value": pl.String,
    "time": pl.Int64,
}


@dataclasses.dataclass(frozen=True)
class Slice:
    """A row group of a file: its first row's number in the file, rows, and bounds of its times in µs (both inclusive)."""

    path: str
    group: int
    first: int
    rows: int
    low: int
    high: int


@dataclasses.dataclass(frozen=True, eq=False)
class Read:
    """What came of reading slices: rows that keep the contract, and dead letters with their file and row."""

    frame: pl.DataFrame
    letters: pl.DataFrame


def source_uri(root: str, source: str) -> str:
    return FileSystems.join(root, source)


def files_of(root: str, source: Source) -> list[str]:
    """The source's Parquet files under `<root>/<name>`, sorted.

    Raises:
        DataError: there are none.
    """
    folder = source_uri(root, source.name)
    matched = FileSystems.match([f"{folder}/**.parquet", f"{folder}.parquet"])
    paths = sorted(
        each.path
        for match in matched
        for each in match.metadata_list
        if not any(part.startswith((".", "_")) for part in each.path[len(folder) :].split("/"))
    )
    if not paths:
        raise DataError(
            f"Source {source.name!r} has Parquet files",
            f"none under {folder}",
            "Write its rows there, or name another folder with --sources",
        )
    return paths


def slices_of(root: str, contract: Contract) -> list[Slice]:
    """Every row group of a source, from the files' footers.

    Raises:
        ContractError: a file is not Parquet or truncated, or its columns are not those declared.
    """
    parts = WRITERS.map(lambda path: _slices(path, contract), files_of(root, contract.source))
    return [each for part in parts for each in part]


def _slices(path: str, contract: Contract) -> list[Slice]:
    file = open_parquet(path, contract.source)
    contract.check(file.schema_arrow, path)
    time = contract.source.time
    column = file.schema_arrow.names.index(time) if time is not None else None
    result, first = [], 0
    for group in range(file.num_row_groups):
        meta = file.metadata.row_group(group)
        low, high = ALWAYS, 2**62
        if column is not None and time is not None:
            bounds = _bounds(meta, time)
            if bounds is None:
                times = pl.Series(pl.from_arrow(file.read_row_group(group, [time]))[time]).drop_nulls()  # type: ignore[index]
                bounds = (times.min(), times.max()) if len(times) else None
            if bounds is not None:
                low, high = (_epoch(bound) for bound in bounds)
        result.append(Slice(path, group, first, meta.num_rows, low, high))
        first += meta.num_rows
    return [each for each in result if each.rows]


def _bounds(meta: pq.RowGroupMetaData, time: str) -> tuple[datetime, datetime] | None:
    for i in range(meta.num_columns):
        column = meta.column(i)
        if column.path_in_schema == time and column.is_stats_set and column.statistics.has_min_max:
            return column.statistics.min, column.statistics.max
    return None


def _epoch(moment: datetime) -> int:
    whole = moment.to_pydatetime() if hasattr(moment, "to_pydatetime") else moment
    return ((whole if whole.tzinfo else whole.replace(tzinfo=UTC)).astimezone(UTC) - EPOCH) // MICROSECOND


def open_parquet(path: str, source: Source) -> pq.ParquetFile:
    """A Parquet file of `source`, local or on any Beam filesystem."""
    try:
        return pq.ParquetFile(path if "://" not in path else FileSystems.open(path, compression_type="uncompressed"))
    except (OSError, pa.ArrowInvalid) as error:
        reason = (str(error).splitlines() or ["unreadable"])[0]
        raise ContractError(
            f"Source {source.name!r}: every file is whole Parquet",
            f"{path}: {reason}",
            "Write the file again (aside, then rename), or remove it",
        ) from None


def read_slices(
    contract: Contract,
    slices: Sequence[Slice],
    low: int = ALWAYS,
    high: int = 2**62,
    own: tuple[int, int] | None = None,
    numbered: bool = False,
) -> Read:
    """Rows of `slices` known in `[low, high)` µs, judged; repeats by `unique` are still there.

    Args:
        own: `[from, to)` µs whose dead letters are wanted (None: all).  A letter without a plausible time belongs to the
            first plausible time of its row group, so that exactly one of the runs or blocks that read the group owns it.
        numbered: add `__row`, the row's number in its file (of a single slice).

    Raises:
        ContractError: a file cannot be read as declared.
    """
    parts = [_read_file(contract, path, groups) for path, groups in _by_file(slices)]
    if not parts:
        frame = pl.DataFrame(schema={name: contract.source.schema[name] for name in contract.columns})
        return Read(frame, pl.DataFrame(schema=LETTERS))
    whole = pl.concat(parts)
    if numbered:
        whole = whole.with_columns(
            pl.int_range(slices[0].first, slices[0].first + len(whole), dtype=pl.Int64).alias("__row")
        )
    frame, letters = judge(contract, whole)
    letters = _placed(letters, slices, whole, contract) if len(letters) else pl.DataFrame(schema=LETTERS)
    if own is not None:
        letters = letters.filter(pl.col("time").is_between(*own, closed="left"))
    if contract.source.time is not None:
        moment = pl.col(contract.source.time).to_physical()
        if low > ALWAYS or high < 2**62:
            frame = frame.filter((moment >= low) & (moment < high))
    return Read(frame, letters)


def _by_file(slices: Iterable[Slice]) -> Iterable[tuple[str, list[int]]]:
    files: dict[str, list[int]] = {}
    for each in slices:
        files.setdefault(each.path, []).append(each.group)
    return files.items()


def _read_file(contract: Contract, path: str, groups: list[int]) -> pl.DataFrame:
    file = open_parquet(path, contract.source)
    try:
        table = file.read_row_groups(groups, list(contract.columns))
    except (OSError, pa.ArrowInvalid) as error:
        raise ContractError(
            f"Source {contract.source.name!r}: every file is whole Parquet",
            f"{path}: {str(error).splitlines()[0]}",
            "Write the file again, or remove it",
        ) from None
    return contract.cast(table, path)


def _placed(letters: pl.DataFrame, slices: Sequence[Slice], whole: pl.DataFrame, contract: Contract) -> pl.DataFrame:
    """Letters with source, file, row in the file, and a time: their own or that of their row group's first plausible row."""
    time = contract.source.time
    slices = [
        each for path, groups in _by_file(slices) for each in slices if each.path == path and each.group in groups
    ]
    ends = np.cumsum([each.rows for each in slices])
    place = letters["place"].to_numpy()
    index = np.searchsorted(ends, place, "right")
    starts = ends - [each.rows for each in slices]
    owners = {}
    for i in np.unique(index):
        owner = None
        if time is not None:
            moments = whole[time].slice(int(starts[i]), slices[i].rows).dt.epoch("us")
            moments = moments.filter((moments >= contract.earliest) & (moments < contract.latest))
            owner = moments[0] if len(moments) else None
        owners[int(i)] = owner
    own = pl.Series([owners[int(i)] for i in index], dtype=pl.Int64)
    return letters.select(
        pl.lit(contract.source.name).alias("source"),
        pl.Series("file", [slices[i].path for i in index], pl.String),
        pl.Series("row", place - starts[index] + np.array([each.first for each in slices])[index], pl.Int64),
        "field", "rule", "value",
        pl.coalesce("time", own, pl.lit(ALWAYS)).alias("time"),
    )  # fmt: skip


def repeats_of(contract: Contract, slices: Sequence[Slice]) -> pl.DataFrame:
    """Rows of a source with `unique` columns whose values occur again: (unique columns, time) of the first known row.

    Two passes: the first reads the unique columns alone, the second only if any value repeats.
    """
    source = contract.source
    unique = list(source.unique or ())
    narrow = dataclasses.replace(
        contract, columns=(*(name for name in source.schema if name in (*unique, source.time)),), required=()
    )
    ids = pl.concat([_read_file(narrow, path, groups).select(unique) for path, groups in _by_file(slices)])
    again = ids.lazy().group_by(unique).len().filter(pl.col("len") > 1).select(unique).collect()
    if not len(again):
        return again.with_columns(pl.lit(None, pl.Int64).alias("__known"))
    first = []
    for path, groups in _by_file(slices):
        part, _ = judge(contract, _read_file(contract, path, groups))
        first.append(
            part.join(again, on=unique, how="semi")
            .group_by(unique)
            .agg(pl.col(str(source.time)).to_physical().min().alias("__known"))
        )
    return pl.concat(first).group_by(unique).agg(pl.col("__known").min())


def without_repeats(source: Source, frame: pl.DataFrame, repeats: pl.DataFrame | None) -> pl.DataFrame:
    """`frame` without the rows whose unique values were known before; of one moment the smallest row stays."""
    if source.unique is None or repeats is None or not len(repeats):
        return frame
    unique = list(source.unique)
    order = [*(source.order or ()), *(name for name in source.schema if name in frame.columns)]
    joined = frame.with_row_index("__place").join(repeats, on=unique, how="inner")
    if not len(joined):
        return frame
    first = (
        joined.filter(pl.col(str(source.time)).to_physical() == pl.col("__known"))
        .sort(list(dict.fromkeys(order)))
        .unique(unique, keep="first", maintain_order=True)
    )
    dropped = joined.join(first.select("__place"), on="__place", how="anti")["__place"]
    keep = np.ones(len(frame), np.bool_)
    keep[dropped.to_numpy()] = False
    return frame.filter(pl.Series(keep))
