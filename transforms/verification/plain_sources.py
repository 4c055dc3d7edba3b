"""Reads sources by plain code: every row group is looked at, and the rows that the sampled spine rows can see are kept.

First, only the times of a row group are read; the other columns are read only if some time is within reach of a sampled
row.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq

from schemas.errors import ContractError
from schemas.sources import Source
from schemas.views import FeatureView
from transforms.records.arrays import Bools, Ints
from transforms.sources.contracts import Contract, check_rows
from transforms.sources.inventory import Slice, open_parquet, stamp_of

# Rows of a source in memory before they are reduced to those that are needed.
PIECE = 500_000
# Most rows that are kept of one source; a sample whose windows contain more is made smaller.
MOST_KEPT = 3_000_000
EVER = 2**62


class TooManyRows(Exception):
    """The windows of a sample contain more rows than may be in memory."""


@dataclasses.dataclass(frozen=True, eq=False)
class Wanted:
    """Rows of a source that some spine rows can see through one key.

    Args:
        keys: columns of the source.
        values: their values, one row per spine row; null matches nothing.
        moments: the times of the spine rows, µs.
        length: how far back the longest window reaches, µs; None: without limit.
    """

    keys: tuple[str, ...]
    values: pl.DataFrame
    moments: Ints
    length: int | None

    def within(self, known: Ints, placed: Ints) -> Bools:
        """Rows that are in the window of some spine row of any key: the first spine row after the row became known is
        not further from the row's position in time than the window reaches."""
        moments = np.sort(self.moments)
        after = np.searchsorted(moments, known, "right")
        later = np.append(moments, EVER)[after]
        return (after < len(moments)) & (later - placed <= (EVER if self.length is None else self.length))

    def of(self, frame: pl.DataFrame) -> pl.DataFrame:
        """The rows of `frame` whose key is among `values`."""
        return frame.join(self.values.drop_nulls().unique(), on=list(self.keys), how="semi")


@dataclasses.dataclass(frozen=True, eq=False)
class Files:
    """The sources as a run listed them.

    Args:
        contracts: per source, the rules by which its rows count.
        slices: per source, its row groups.
        skip: leave out row groups that have nothing within reach by their footers, without reading their times.
        most: the most rows of one source in memory.
    """

    contracts: Mapping[str, Contract]
    slices: Mapping[str, Sequence[Slice]]
    skip: bool = False
    most: int = MOST_KEPT
    resolved = False

    def rows(self, name: str, columns: Sequence[str], wanted: Sequence[Wanted] | None = None) -> Iterator[pl.DataFrame]:
        """Yields `columns` of all rows of a source, valid and invalid, in declared types.

        Args:
            wanted: row groups without a row within reach are left out.
        """
        contract = self.contracts[name]
        held: list[pl.DataFrame] = []
        for each in self.slices[name]:
            if wanted is not None and self.skip and not _overlaps(each, wanted):
                continue
            for frame in _read(contract, each, columns, wanted):
                held.append(frame)
                if sum(map(len, held)) >= PIECE:
                    yield pl.concat(held)
                    held = []
        if held:
            yield pl.concat(held)


@dataclasses.dataclass(frozen=True, eq=False)
class SourceFrames:
    """Sources in memory: valid rows without repeats."""

    contracts: Mapping[str, Contract]
    frames: Mapping[str, pl.DataFrame]
    most = EVER
    resolved = True

    def rows(self, name: str, columns: Sequence[str], wanted: Sequence[Wanted] | None = None) -> Iterator[pl.DataFrame]:
        """`columns` of all rows of a source."""
        frame = self.frames[name]
        yield frame.select(name for name in columns if name in frame.columns)


Tables = Files | SourceFrames


def identity(view: FeatureView, source: Source) -> tuple[str, ...]:
    """Columns whose repeated values count once; none if every row counts.  A spine row is identified by key and
    time."""
    return (view.time, *view.key) if source is view.spine else tuple(source.unique or ())


def events(view: FeatureView, tables: Tables, name: str, wanted: Sequence[Wanted], tied: bool) -> pl.DataFrame:
    """The valid rows of a source that `wanted` can see, without repeats, sorted by position in time; if `tied` rows
    must be ordered, then also by `order` and all declared columns.

    Raises:
        TooManyRows: more than `tables.most`.
    """
    contract = tables.contracts[name]
    source = contract.source
    once = () if tables.resolved else identity(view, source)
    columns = list(source.schema) if tied or once else list(contract.columns)
    kept = _kept(contract, tables.rows(name, columns, wanted), wanted, tables.most)
    if once:
        kept = _each_once(contract, tables, kept, once, wanted)
    position = source.event_time or str(source.time)
    by = list(dict.fromkeys([position, *(source.order or ()), *source.schema])) if tied else [position]
    return kept.sort([column for column in by if column in kept.columns], maintain_order=True)


def spine_rows(view: FeatureView, tables: Tables, identities: pl.DataFrame) -> pl.DataFrame:
    """The spine rows with the keys and times `identities`, in that order; null where the source has none."""
    contract = tables.contracts[view.spine.name]
    names, columns = [view.time, *view.key], list(view.spine.schema)
    # A window of one microsecond before the next microsecond contains exactly the wanted time.
    wanted = Wanted(tuple(names), identities.select(names), _moments(identities[view.time]) + 1, 1)
    kept = _kept(contract, tables.rows(view.spine.name, columns, [wanted]), [wanted])
    kept = kept.sort(columns).unique(names, keep="first", maintain_order=True)
    return (
        identities.select(names)
        .join(kept.with_columns(pl.lit(True).alias("__found")), on=names, how="left", maintain_order="left")
        .select(*columns, "__found")
    )


def dimension_row_of_each(tables: Tables, name: str, keys: Sequence[str], values: pl.DataFrame) -> pl.DataFrame:
    """The row of a dimension for each row of `values`, whose columns are named as `keys`. Of several rows, the smallest
    by all declared columns is taken.
    """
    contract = tables.contracts[name]
    columns = list(contract.source.schema)
    wanted = values.drop_nulls().unique()
    parts = [rows.join(wanted, on=list(keys), how="semi") for rows in tables.rows(name, columns)]
    good = check_rows(contract, pl.concat(parts))[0] if parts else pl.DataFrame(schema=contract.source.schema)
    by = [column for column in columns if column in good.columns]
    return good.sort(by).unique(keys, keep="first", maintain_order=True)


def _kept(
    contract: Contract, pieces: Iterator[pl.DataFrame], wanted: Sequence[Wanted], most: int = EVER
) -> pl.DataFrame:
    kept: list[pl.DataFrame] = []
    for piece in pieces:
        kept.append(_seen(contract.source, piece, wanted))
        if sum(map(len, kept)) > most:
            raise TooManyRows
    if not kept:
        return pl.DataFrame(schema=contract.source.schema)
    return check_rows(contract, pl.concat(kept))[0]


def _seen(source: Source, frame: pl.DataFrame, wanted: Sequence[Wanted]) -> pl.DataFrame:
    """The rows of `frame` that some of `wanted` can see."""
    known, placed = _times(source, frame)
    frame = frame.with_columns(pl.int_range(pl.len(), dtype=pl.Int64).alias("__at"))
    rows = np.zeros(len(frame), np.bool_)
    for each in wanted:
        near = frame.lazy().select(*each.keys, "__at").collect().filter(pl.Series(each.within(known, placed)))
        rows[each.of(near)["__at"].to_numpy()] = True
    return frame.filter(pl.Series(rows)).drop("__at")


def _each_once(
    contract: Contract, tables: Tables, kept: pl.DataFrame, once: Sequence[str], wanted: Sequence[Wanted]
) -> pl.DataFrame:
    """`kept` without repeats: of all rows of the source with the same identity, the one that was known first stays; of
    rows with the same time, the smallest by `order` and all declared columns.  This row may have another key, or be
    before every window."""
    source, names = contract.source, list(once)
    values = kept.select(names).unique()
    # If the identity includes the time, repeats have the times of the rows that are kept.
    timed = source.time in once and source.event_time is None
    moments = [Wanted(tuple(names), values, _moments(kept[str(source.time)]) + 1, 1)] if timed else None
    some = list(dict.fromkeys(names))
    found = [piece.join(values, on=names, how="semi") for piece in tables.rows(source.name, some, moments)]
    if not found:
        return kept
    repeated = pl.concat(found).group_by(names).len().filter(pl.col("len") > 1).select(names)
    if not len(repeated):
        return kept
    rows = pl.concat(
        [piece.join(repeated, on=names, how="semi") for piece in tables.rows(source.name, list(source.schema), moments)]
    )
    good = check_rows(contract, rows)[0]
    by = list(dict.fromkeys([str(source.time), *(source.order or ()), *source.schema]))
    first = good.sort(by).unique(names, keep="first", maintain_order=True)
    return pl.concat([kept.join(repeated, on=names, how="anti"), _seen(source, first, wanted).select(kept.columns)])


def _times(source: Source, frame: pl.DataFrame) -> tuple[Ints, Ints]:
    """When each row became known, and its position in time; a row without a time is never seen."""
    known = _moments(frame[str(source.time)].fill_null(_LAST))
    return known, known if source.event_time is None else _moments(frame[source.event_time].fill_null(_LAST))


_LAST = pl.Series([EVER]).cast(pl.Datetime("us", "UTC"))


def _moments(times: pl.Series) -> Ints:
    return times.to_physical().to_numpy()


def _overlaps(each: Slice, wanted: Sequence[Wanted]) -> bool:
    """Whether some row of the row group is within reach according to its footer."""
    for one in wanted:
        moments = np.sort(one.moments)
        after = np.searchsorted(moments, each.low, "right")
        if after < len(moments) and (one.length is None or moments[after] - one.length <= each.high):
            return True
    return False


def _read(
    contract: Contract, each: Slice, columns: Sequence[str], wanted: Sequence[Wanted] | None
) -> Iterator[pl.DataFrame]:
    """Columns of a row group; nothing if none of its times is within reach."""
    source = contract.source
    file = open_parquet(each.path, source)
    times = [name for name in (source.time, source.event_time) if name is not None]
    try:
        # The times are read even if the footer has nothing within reach: footers are not trusted here.
        if (
            wanted is None
            or _overlaps(each, wanted)
            or any(_any_within(source, frame, wanted) for frame in _pieces(contract, file, each, times))
        ):
            yield from _pieces(contract, file, each, columns)
    except (OSError, pa.ArrowInvalid) as error:
        raise ContractError(
            f"Source {source.name!r}: every file is whole Parquet",
            f"{each.path}: {str(error).splitlines()[0]}",
            "Write the file again, or remove it",
        ) from None
    if each.stamp and stamp_of(each.path) != each.stamp:
        raise ContractError(
            f"Source {source.name!r}: files stay as they are while a run reads them",
            f"{each.path} was replaced",
            "Run the same command again; write new files aside and rename them",
        )


def _any_within(source: Source, frame: pl.DataFrame, wanted: Sequence[Wanted]) -> bool:
    known, placed = _times(source, frame)
    return any(one.within(known, placed).any() for one in wanted)


def _pieces(contract: Contract, file: pq.ParquetFile, each: Slice, columns: Sequence[str]) -> Iterator[pl.DataFrame]:
    """Columns of a row group in declared types; a declared column that the view does not need may be missing, and then
    is null.
    """
    types, names = contract.source.schema, file.schema_arrow.names
    given: Mapping[str, object] = {} if contract.partitions is None else contract.partitions.types
    if contract.partitions is not None:  # older files may have a column that was removed from a Delta table
        names = [name for name in names if name in contract.partitions.columns]
    there = [name for name in columns if name in contract.columns or name in names or name in given]
    missing = [pl.lit(None, types[name]).alias(name) for name in columns if name not in there]
    # A contract of exactly these columns: a run may read more columns than it checks.
    rules = Contract(contract.source, tuple(there), contract.required, contract.now, contract.partitions)
    inside = [name for name in there if name in names]
    parts = (
        [file.read_row_group(each.group, inside)]
        if each.rows <= PIECE
        else (pa.Table.from_batches([batch]) for batch in file.iter_batches(PIECE, [each.group], inside))
    )
    for part in parts:
        frame = rules.cast(part, each.path)
        yield frame.with_columns(missing).select(columns) if missing else frame
