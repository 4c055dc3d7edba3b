"""Reads sources, only the columns, row groups and times that are needed, and checks each row."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np
import numpy.typing as npt
import polars as pl
import pyarrow as pa

from schemas.errors import ContractError
from schemas.sources import Source
from transforms.records.times import ALWAYS, FOREVER
from transforms.sources.contracts import READ_ERRORS, Contract, check_rows, not_whole
from transforms.sources.conversions import problem_free, with_problems
from transforms.sources.data_files import open_file, stamp_of
from transforms.sources.day_digests import Digests, day_digests, subtract
from transforms.sources.dead_letters import SOURCE_DEAD_LETTERS, concat_dead_letters
from transforms.sources.inventory import FILES_AT_ONCE
from transforms.sources.repeats import KnownOrder
from transforms.sources.slices import Slice
from transforms.storage.delta_tables import file_pool

# Rows in memory while a source is read in pieces.
READ_CHUNK_ROWS = 500_000
# Rows among which repeats are searched for at once, by their unique columns alone; more rows are searched in parts, by
# hash.
REPEATS_AT_ONCE = 4_000_000
# A file of at most so many rows is small: a thread takes several small files at a time.
SMALL_FILE_ROWS = 10_000


# Position of a slice → the first plausible time in it, µs.
Owners = Callable[[int], int | None]


@dataclasses.dataclass(frozen=True, eq=False)
class SourceRows:
    """The result of reading slices: rows that satisfy the contract, and dead letters with their file and row.

    `loaded` is the number of rows that were read from files for it.
    """

    frame: pl.DataFrame
    dead_letters: pl.DataFrame
    digests: Digests = dataclasses.field(default_factory=dict)
    loaded: int = 0


@dataclasses.dataclass(frozen=True)
class ReadOptions:
    """What to read of slices.

    Args:
        low, high: only rows whose time is in `[low, high)` µs.
        own: `[from, to)` µs whose dead letters are wanted (None: all).  A dead letter without a plausible time belongs
            to the first plausible time of its row group, so that exactly one run or block that reads the group owns it.
        span: `[from, to)` µs whose rows, valid or rejected, are digested by day.
        numbered: add `__row`, the row's number in its file (of a single slice).
    """

    low: int = ALWAYS
    high: int = FOREVER
    own: tuple[int, int] | None = None
    span: tuple[int, int] | None = None
    numbered: bool = False


EVERYTHING = ReadOptions()


def read_slices(contract: Contract, slices: Sequence[Slice], options: ReadOptions = EVERYTHING) -> SourceRows:
    """Rows of `slices`, checked against the contract; repeats by `unique` are not removed.

    Raises:
        ContractError: a file cannot be read as declared.
    """
    if not slices:
        frame = pl.DataFrame(schema={name: contract.source.schema[name] for name in contract.read})
        return SourceRows(frame, pl.DataFrame(schema=SOURCE_DEAD_LETTERS))
    return UncheckedRows.of(contract, slices).checked(contract, options)


@dataclasses.dataclass(frozen=True, eq=False)
class UncheckedRows:
    """Rows of slices as they were read once by `contract`, to be checked against it or others of fewer columns."""

    contract: Contract
    slices: Sequence[Slice]
    whole: pl.DataFrame

    @classmethod
    def of(cls, contract: Contract, slices: Sequence[Slice]) -> UncheckedRows:
        """Read the columns of `contract`.

        Raises:
            ContractError: a file cannot be read as declared.
        """
        if not slices:
            nothing = pl.DataFrame(schema={name: contract.source.schema[name] for name in contract.read})
            return cls(contract, slices, nothing)
        return cls(contract, slices, _read_files(contract, slices))

    def digests(self, contract: Contract, options: ReadOptions) -> Digests:
        """What `checked` digests."""
        return {} if options.span is None else day_digests(contract, self._rows(contract), *options.span)

    def checked(self, contract: Contract, options: ReadOptions) -> SourceRows:
        """The rows that satisfy a contract, which may have fewer columns than were read."""
        whole = self._rows(contract)
        return _checked(contract, self.slices, whole, _owners(contract, self.slices, whole), options)

    def _rows(self, contract: Contract) -> pl.DataFrame:
        """The rows as `contract` reads them."""
        mine = self.contract
        times = contract.reads_times_as(mine)
        if times and contract.columns == mine.columns and contract.ordering == mine.ordering:
            return self.whole
        # Each row has one problem, which may be of a column that the other contract does not judge.
        if self.slices and not (times and problem_free(self.whole)):
            return _read_files(contract, self.slices)
        return self.whole.select(contract.read)


def stream_slices(
    contract: Contract,
    slices: Sequence[Slice],
    options: ReadOptions = EVERYTHING,
    chunk: int = READ_CHUNK_ROWS,
) -> Iterator[SourceRows]:
    """As `read_slices`, in pieces of at most `chunk` rows, so that memory is bounded whatever the size of row groups.

    Raises:
        ContractError: a file cannot be read as declared.
    """
    held: list[Slice] = []
    rows = 0
    for each in _in_files(slices):
        if held and rows + each.rows > chunk:
            yield read_slices(contract, held, options)
            held, rows = [], 0
        if each.rows <= chunk:
            held.append(each)
            rows += each.rows
            continue
        owner = functools.cache(functools.partial(_first_plausible, contract, each))
        for piece, whole in _pieces(contract, each, chunk):
            yield _checked(contract, [piece], whole, lambda _, first=owner: first(), options)  # type: ignore[misc]
    if held or not slices:
        yield read_slices(contract, held, options)


def _checked(
    contract: Contract,
    slices: Sequence[Slice],
    whole: pl.DataFrame,
    owners: Owners,
    options: ReadOptions,
) -> SourceRows:
    digests = {} if options.span is None else day_digests(contract, whole, *options.span)
    loaded = len(whole)
    if options.numbered:
        whole = whole.with_columns(pl.Series("__row", _numbers(contract, slices[0], len(whole)), pl.Int64))
    frame, dead_letters = check_rows(contract, whole)
    dead_letters = (
        _placed(dead_letters, slices, owners, contract)
        if len(dead_letters)
        else pl.DataFrame(schema=SOURCE_DEAD_LETTERS)
    )
    if options.own is not None:
        dead_letters = dead_letters.filter(pl.col("time").is_between(*options.own, closed="left"))
    if contract.source.time is not None:
        moment = pl.col(contract.source.time).to_physical()
        if options.low > ALWAYS or options.high < FOREVER:
            frame = frame.filter((moment >= options.low) & (moment < options.high))
    return SourceRows(frame, dead_letters, digests, loaded)


def _numbers(contract: Contract, piece: Slice, rows: int) -> npt.NDArray[np.int64]:
    """The number of each row in its file; of a part of a row group, its first is `piece.first`."""
    if not piece.size:
        return np.arange(piece.first, piece.first + rows)
    return open_file(piece.path, contract.source).numbers(piece)


def _pieces(contract: Contract, piece: Slice, chunk: int) -> Iterator[tuple[Slice, pl.DataFrame]]:
    """A row group in pieces of `chunk` rows, each as if it were a row group."""
    file, first = open_file(piece.path, contract.source), piece.first
    with _whole(contract, piece.path):
        for part in file.parts(piece, chunk, contract.by_weight):
            rows = contract.cast(part, piece.path)
            yield dataclasses.replace(piece, first=first, rows=len(rows)), rows
            first += len(rows)
    _complete(contract, piece.path, first - piece.first, piece.rows)
    _unchanged(contract, piece.path, piece.stamp or None)


def read_raw(contract: Contract, slices: Sequence[Slice]) -> pl.DataFrame:
    """Rows of `slices` in declared types, unchecked."""
    if not slices:
        return pl.DataFrame(schema={name: contract.source.schema[name] for name in contract.read})
    return _read_files(contract, [dataclasses.replace(each, stamp="") for each in slices])


def _read_files(contract: Contract, slices: Sequence[Slice]) -> pl.DataFrame:
    """Rows of `slices` in declared types, unchecked, file after file.

    Neighbouring files with the same schema are converted at once: a conversion costs more than reading a small file.
    """
    files = [list(groups) for _, groups in itertools.groupby(_in_files(slices), lambda each: each.path)]
    read = functools.partial(_read_tables, contract)
    if sum(each.rows for each in slices) > SMALL_FILE_ROWS * len(files):
        tables: Iterator[_FileRows] = itertools.chain.from_iterable(map(read, ([file] for file in files)))
    else:
        batches = [files[i : i + FILES_AT_ONCE] for i in range(0, len(files), FILES_AT_ONCE)]
        mapped = file_pool().map(read, batches) if len(batches) > 1 else map(read, batches)
        tables = itertools.chain.from_iterable(mapped)
    parts: list[pl.DataFrame] = []
    for _, alike in itertools.groupby(tables, _Alike):
        parts += _cast_together(contract, list(alike))
    return parts[0] if len(parts) == 1 else pl.concat(with_problems(parts))


@dataclasses.dataclass(frozen=True, eq=False)
class _FileRows:
    """Rows of a file as Arrow read them, and the values of its partition columns."""

    path: str
    table: pa.Table
    given: Mapping[str, object]


class _Alike:
    """A key that is equal for files whose rows are converted in the same way."""

    def __init__(self, rows: _FileRows) -> None:
        self.rows = rows

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, _Alike):
            return NotImplemented
        mine, others = self.rows, other.rows
        if max(mine.table.num_rows, others.table.num_rows) > SMALL_FILE_ROWS:
            return False  # it is converted alone, so that fewer rows are in memory twice
        return mine.given == others.given and bool(mine.table.schema.equals(others.table.schema))


def _read_tables(contract: Contract, files: Sequence[Sequence[Slice]]) -> list[_FileRows]:
    """The row groups of each file; one stamp is checked for each file."""
    result = []
    for groups in files:
        path, stamp = groups[0].path, groups[0].stamp or None
        file = open_file(path, contract.source)
        with _whole(contract, path):
            # A second thread would cost more than reading a small file.
            threads = sum(each.rows for each in groups) > SMALL_FILE_ROWS
            table = file.read(groups, contract.by_weight, threads)
        _complete(contract, path, table.num_rows, sum(map(file.rows, groups)))
        _unchanged(contract, path, stamp, file.stamp)
        result.append(_FileRows(path, table, contract.given(path)))
    return result


def _cast_together(contract: Contract, alike: Sequence[_FileRows]) -> list[pl.DataFrame]:
    """Rows of files with the same schema, in declared types.

    Raises:
        ContractError: names the file whose rows cannot be converted.
    """
    if len(alike) > 1:
        with contextlib.suppress(ContractError, *READ_ERRORS):  # converting each file alone shows which of them it is
            # In one piece per column: Polars takes 35 µs over a piece of each column of a file.
            together = pa.concat_tables([each.table for each in alike]).combine_chunks()
            return [contract.cast(together, alike[0].path)]
    return [contract.cast(each.table, each.path) for each in alike]


@contextlib.contextmanager
def _whole(contract: Contract, path: str) -> Iterator[None]:
    try:
        yield
    except READ_ERRORS as error:
        raise not_whole(contract.source, path, error) from None


def _complete(contract: Contract, path: str, found: int, rows: int) -> None:
    if found != rows:
        error = ValueError(f"{found:,} rows, and {rows:,} by its footer")
        raise not_whole(contract.source, path, error)


def _unchanged(contract: Contract, path: str, stamp: str | None, found: str | None = None) -> None:
    """Refuses a file that is not the one of `stamp`; `found` is the stamp of what was read, if it is known."""
    if stamp is not None and (found or stamp_of(path)) != stamp:
        raise ContractError(
            f"Source {contract.source.name!r}: its files must not change while a run reads them",
            f"{path} was replaced",
            "Run the same command again; write new files aside and rename them",
        )


def _owners(contract: Contract, slices: Sequence[Slice], whole: pl.DataFrame) -> Owners:
    """The first plausible time of each slice; `whole` has the rows of one slice after another."""
    ends = list(itertools.accumulate(each.rows for each in _in_files(slices)))

    def owner(i: int) -> int | None:
        if contract.source.time is None:
            return None
        start = ends[i - 1] if i else 0
        return _plausible(contract, whole[contract.source.time].slice(start, ends[i] - start))

    return owner


def _first_plausible(contract: Contract, piece: Slice) -> int | None:
    """As `_owners`, for a row group that is too large for memory."""
    if contract.source.time is None:
        return None
    file = open_file(piece.path, contract.source)
    time = contract.source.time
    if time not in file.schema.names and time not in contract.given(piece.path):
        return None
    with _whole(contract, piece.path):
        for part in file.parts(piece, READ_CHUNK_ROWS, [time]):
            found = _plausible(contract, contract.times(part, piece.path)[0])
            if found is not None:
                return found
    return None


def _plausible(contract: Contract, times: pl.Series) -> int | None:
    moments = times.dt.epoch("us")
    moments = moments.filter((moments >= contract.earliest) & (moments < contract.latest))
    return moments[0] if len(moments) else None


def _in_files(slices: Sequence[Slice]) -> list[Slice]:
    """Slices in the order in which they are read."""
    files: dict[str, list[Slice]] = {}
    for each in slices:
        files.setdefault(each.path, []).append(each)
    return [each for file in files.values() for each in file]


def _placed(dead_letters: pl.DataFrame, slices: Sequence[Slice], owners: Owners, contract: Contract) -> pl.DataFrame:
    """Dead letters with source, file, row in the file, and a time: their own, or that of the first plausible row in
    their row group."""
    slices = _in_files(slices)
    ends = np.cumsum([each.rows for each in slices])
    position = dead_letters["place"].to_numpy()
    index = np.searchsorted(ends, position, "right")
    starts = ends - [each.rows for each in slices]
    owned = {int(i): owners(int(i)) for i in np.unique(index[dead_letters["time"].is_null().to_numpy()])}
    own = pl.Series([owned.get(int(i)) for i in index], dtype=pl.Int64)
    return dead_letters.select(
        pl.lit(contract.source.name).alias("source"),
        pl.Series("file", [slices[i].path for i in index], pl.String),
        pl.Series("row", _rows_in_files(contract, slices, index, position - starts[index]), pl.Int64),
        "field",
        "rule",
        "value",
        pl.coalesce("time", own, pl.lit(ALWAYS)).alias("time"),
    )


def _rows_in_files(
    contract: Contract, slices: Sequence[Slice], index: npt.NDArray[np.int64], place: npt.NDArray[np.int64]
) -> npt.NDArray[np.int64]:
    """The number in its file of each row: which of `slices` it is in, and its place there."""
    rows = place + np.array([each.first for each in slices], np.int64)[index]
    for number in np.unique(index).tolist():
        if slices[number].size:  # of text the line, which only the bytes tell
            mine = index == number
            rows[mine] = _numbers(contract, slices[number], slices[number].rows)[place[mine]]
    return rows


@dataclasses.dataclass(frozen=True, eq=False)
class RepeatedKeys:
    """Values of `unique` columns that occur more than once: `first` has them with the time (`__known`, µs) of the row
    that stays; `dropped` has the digests of the others by day."""

    first: pl.DataFrame
    dropped: Digests


def repeats_of(contract: Contract, slices: Sequence[Slice]) -> RepeatedKeys:
    """The repeats among a source's rows.

    There are two passes: the first reads only the unique columns, as many rows at once as memory allows; the second
        runs only if a value repeats.  The whole source is read: a value may repeat one of any age, and footers do not
        show this.
    """
    source = contract.source
    unique = list(source.unique or ())
    narrow = dataclasses.replace(contract, columns=tuple(unique), ordering=(), required=())
    if not slices:
        return RepeatedKeys(
            pl.DataFrame(schema={**{name: source.schema[name] for name in unique}, "__known": pl.Int64}), {}
        )
    parts = -(-sum(each.rows for each in slices) // REPEATS_AT_ONCE)
    again = pl.concat([_again(narrow, slices, part, parts) for part in range(parts)])
    if not len(again):
        return RepeatedKeys(again.with_columns(pl.lit(None, pl.Int64).alias("__known")), {})
    occurrences = pl.concat(
        [check_rows(contract, rows.join(again, on=unique, how="semi"))[0] for rows in _raw(contract, slices)]
    )
    first = occurrences.group_by(unique).agg(pl.col(str(source.time)).to_physical().min().alias("__known"))
    kept = without_repeats(source, occurrences, first)
    return RepeatedKeys(first, subtract(day_digests(contract, occurrences), day_digests(contract, kept)))


def _again(narrow: Contract, slices: Sequence[Slice], part: int, parts: int) -> pl.DataFrame:
    """Values that occur more than once, among those whose hash falls into one of several parts."""
    mine = pl.struct(narrow.columns).hash() % parts == part
    ids = pl.concat([rows if parts == 1 else rows.filter(mine) for rows in _raw(narrow, slices)])
    return ids.lazy().group_by(narrow.columns).len().filter(pl.col("len") > 1).select(narrow.columns).collect()


def _raw(contract: Contract, slices: Sequence[Slice], chunk: int = READ_CHUNK_ROWS) -> Iterator[pl.DataFrame]:
    """Rows of `slices` in declared types, unchecked, in pieces of at most `chunk` rows."""
    held: list[Slice] = []
    rows = 0
    for each in _in_files(slices):
        if held and rows + each.rows > chunk:
            yield _read_files(contract, held)
            held, rows = [], 0
        if each.rows > chunk:
            yield from (piece for _, piece in _pieces(contract, each, chunk))
        else:
            held.append(each)
            rows += each.rows
    if held:
        yield _read_files(contract, held)


def without_repeats(source: Source, frame: pl.DataFrame, repeats: pl.DataFrame | None) -> pl.DataFrame:
    """`frame` without the rows whose unique values were known earlier; of rows with the same time, the smallest
    stays."""
    if source.unique is None or repeats is None or not len(repeats):
        return frame
    unique = list(source.unique)
    joined = frame.with_row_index("__place").join(repeats, on=unique, how="inner")
    if not len(joined):
        return frame
    order = KnownOrder.of(source, unique, frame.columns)
    first = order.first(joined.filter(pl.col(str(source.time)).to_physical() == pl.col("__known")))
    dropped = joined.join(first.select("__place"), on="__place", how="anti")["__place"]
    keep = np.ones(len(frame), np.bool_)
    keep[dropped.to_numpy()] = False
    return frame.filter(pl.Series(keep))


def locate_rows(
    contract: Contract, slices: Sequence[Slice], rows: pl.DataFrame, key: Sequence[str], rule: str
) -> pl.DataFrame:
    """Dead letters for every occurrence of `rows` in their files."""
    parts = []
    for each in slices if len(rows) else ():
        found = read_slices(contract, [each], ReadOptions(numbered=True)).frame.join(
            rows, on=rows.columns, how="semi", nulls_equal=True
        )
        value = pl.concat_str([pl.col(name).cast(pl.String).fill_null("null") for name in key], separator=", ")
        time = pl.col(contract.source.time).to_physical() if contract.source.time is not None else pl.lit(0, pl.Int64)
        parts.append(
            found.select(
                pl.lit(contract.source.name).alias("source"),
                pl.lit(each.path).alias("file"),
                pl.col("__row").alias("row"),
                pl.lit(", ".join(key)).alias("field"),
                pl.lit(rule).alias("rule"),
                value.alias("value"),
                time.alias("time"),
            )
        )
    return concat_dead_letters(parts)
