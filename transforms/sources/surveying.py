"""A first look at the files of a source: their columns, their row groups or pieces, and the times in each."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence

import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq

from schemas.errors import ContractError
from transforms.records.times import ALWAYS
from transforms.sources.contracts import READ_ERRORS, Contract, Mismatch, as_frame, not_whole, readable
from transforms.sources.conversions import LocalTimes, Reading, converted, problem_free, type_holds
from transforms.sources.data_files import ParquetData, TextData, open_file, stamp_of
from transforms.sources.slices import Slice
from transforms.sources.text_files import BROKEN

# Rows of a text file by which its columns are judged as a whole.
JUDGED_ROWS = 20_000
# Of a Parquet timestamp: how many of the unit make a µs, or how many µs make one.
_UNITS = {"milliseconds": (1000, 1), "microseconds": (1, 1), "nanoseconds": (1, 1000)}


@dataclasses.dataclass
class Judged:
    """How many values of a column of text are read as declared, with a file and value of one that is not."""

    good: int = 0
    bad: int = 0
    file: str = ""
    value: str = ""
    rule: str = ""


@dataclasses.dataclass(frozen=True)
class SurveyedFiles:
    """What a look at some files found.

    Args:
        slices: their parts.
        wrong: why some of them are not read.
        local: by file, its local times that occur twice or do not exist.
        columns: of text files, by name.
    """

    slices: list[Slice] = dataclasses.field(default_factory=list)
    wrong: list[Mismatch | ContractError] = dataclasses.field(default_factory=list)
    local: dict[str, LocalTimes] = dataclasses.field(default_factory=dict)
    columns: dict[str, Judged] = dataclasses.field(default_factory=dict)


def survey_batch(contract: Contract, paths: Sequence[str]) -> SurveyedFiles:
    """Looks at some files of a source."""
    result = SurveyedFiles()
    checked: pa.Schema | None = None  # the schema that was checked last: most files of a source have the same
    for path in paths:
        try:
            file = open_file(path, contract.source)
            stamp = file.stamp or stamp_of(path)
            if isinstance(file, TextData):
                _survey_text(contract, file, stamp, result)
                continue
            if checked is None or not file.schema.equals(checked) or "=" in path:
                wrong = contract.mismatches(file.schema, path)
                if wrong:
                    result.wrong.extend(wrong)
                    continue
                checked = file.schema
            _survey_parquet(contract, file, stamp, result)
        except ContractError as error:
            result.wrong.append(error)
        except (*READ_ERRORS, *BROKEN, pl.exceptions.PolarsError, pl.exceptions.PanicException) as error:
            result.wrong.append(not_whole(contract.source, path, error))
    return result


def _survey_parquet(contract: Contract, file: ParquetData, stamp: str, result: SurveyedFiles) -> None:
    path, metadata, time = file.path, file.file.metadata, contract.source.time
    first, local = 0, LocalTimes()
    for group in range(metadata.num_row_groups):
        rows = metadata.row_group(group).num_rows
        low, high = ALWAYS, 2**62
        if time is not None and time not in file.schema.names and time not in contract.given(path):
            low, high = ALWAYS, ALWAYS  # added to a Delta table later
        elif time is not None:
            known = _bounds(file.file, group, time) if _is_instant(contract, file, time) else None
            low, high = known or (ALWAYS, 2**62)
            if low < contract.earliest or high >= contract.latest:
                columns = [time] if time in file.schema.names else list(file.schema.names[:1])
                table = file.read([Slice(path, group, first, rows, low, high)], columns)
                times, count = contract.times(table, path)
                low, high = _plausible(times, contract)
                local += count
        if rows:
            result.slices.append(Slice(path, group, first, rows, low, high, stamp))
        first += rows
    if local != LocalTimes():
        result.local[path] = local


def _is_instant(contract: Contract, file: ParquetData, time: str) -> bool:
    """Whether the bounds in a footer are those of instants."""
    return time in file.schema.names and type_holds(contract.source.schema[time], file.schema.field(time).type)


def _survey_text(contract: Contract, file: TextData, stamp: str, result: SurveyedFiles) -> None:
    path, text, time = file.path, file.file, contract.source.time
    local, here, seen = LocalTimes(), set[str](), False
    if text.is_csv and text.layout.names:
        here = {*text.layout.names}
        wrong = contract.mismatches(file.schema, path)
        if wrong:
            result.wrong.extend(wrong)
            return
    for piece, data in text.pieces():
        if not text.is_csv:
            here |= {*text.names(data)}
        if not seen:
            _judge(contract, file, data, result)
            seen = True
        low, high = ALWAYS, 2**62
        if time is not None:
            table = text.table(data, [time] if time in text.names(data) or not text.is_csv else [], contract.reading)
            if time not in table.schema.names and time not in contract.given(path):
                table = table.append_column(time, pa.nulls(table.num_rows, pa.string()))
            times, count = contract.times(table, path)
            low, high = _plausible(times, contract)
            local += count
        result.slices.append(
            Slice(path, 0, piece.line, piece.rows, low, high, stamp, piece.offset, piece.size, piece.lines)
        )
    if seen and not text.is_csv:
        schema = pa.schema([(name, pa.string()) for name in contract.source.schema if name in here])
        result.wrong.extend(contract.mismatches(schema.with_metadata({b"millrace": b"text"}), path))
    if local != LocalTimes():
        result.local[path] = local


def _judge(contract: Contract, file: TextData, data: bytes, result: SurveyedFiles) -> None:
    """Counts the values of each column that are read as declared."""
    table = file.file.table(data, contract.by_weight, contract.reading).slice(0, JUDGED_ROWS)
    frame = readable(as_frame(table.select([name for name in table.schema.names if name in contract.read])))
    for name in frame.columns:
        there = frame[name].is_not_null().sum()
        now = converted(frame.select(name), {name: contract.source.schema[name]}, contract.reading, {name})
        broken = now.filter(pl.col("__rule").is_not_null()) if not problem_free(now) else now.clear()
        if "__rule" in table.schema.names and not file.file.is_csv:  # JSON of another type is null by now
            fields = pl.Series(table.column("__field").to_pylist())
            there += int((fields == name).sum())
            at = (fields == name).arg_true()
            if len(at):
                rows = table.take(pa.array(at.to_list()))
                broken = pl.DataFrame(pl.from_arrow(rows.select(["__field", "__rule", "__value"])))
        judged = result.columns.setdefault(name, Judged())
        judged.good += int(there) - len(broken)
        judged.bad += len(broken)
        if len(broken) and not judged.file:
            judged.file, judged.value, judged.rule = file.path, str(broken["__value"][0]), str(broken["__rule"][0])


def wrong_columns(contract: Contract, parts: Sequence[SurveyedFiles]) -> list[Mismatch | ContractError]:
    """Columns of text of which no value is read as declared, though several are there: the declaration is wrong."""
    total: dict[str, Judged] = {}
    for part in parts:
        for name, each in part.columns.items():
            held = total.setdefault(name, Judged())
            held.good, held.bad = held.good + each.good, held.bad + each.bad
            if each.file and not held.file:
                held.file, held.value, held.rule = each.file, each.value, each.rule
    wrong: list[Mismatch | ContractError] = []
    for name, each in total.items():
        if each.bad > 1 and not each.good:
            declared, kind, hint = contract.source.schema[name], "type", _type_of(each.value)
            if declared.is_temporal() and contract.source.zone is None and "zone=" in each.rule:
                kind = "zone"
            elif declared.is_temporal() and contract.source.unit is None and hint in ("pl.Int64", "pl.Float64"):
                kind = "unit"
            wrong.append(Mismatch(contract.source, name, each.file, kind, f"text such as {each.value!r}", hint))
    return wrong


def _type_of(value: str) -> str:
    """The type to declare for a column that has such a value."""
    text = pl.DataFrame({"_": [value]})
    for dtype in (pl.Int64(), pl.Float64(), pl.Boolean(), pl.Date()):
        if problem_free(converted(text, {"_": dtype}, Reading(), {"_"})):
            return f"pl.{dtype}"
    return "pl.String"


def _plausible(times: pl.Series, contract: Contract) -> tuple[int, int]:
    """Bounds of a row group's plausible times, where its footer gives none or those of a clock that was wrong."""
    moments = times.dt.epoch("us")
    moments = moments.filter((moments >= contract.earliest) & (moments < contract.latest))
    return (int(moments.min()), int(moments.max())) if len(moments) else (ALWAYS, ALWAYS)  # type: ignore[arg-type]


def _bounds(file: pq.ParquetFile, group: int, time: str) -> tuple[int, int] | None:
    """The smallest and largest time of a row group in µs, from the footer; None where it does not say.

    As whole numbers: what a writer notes may be beyond what Python's datetime can hold.
    """
    meta = file.metadata.row_group(group)
    for i in range(meta.num_columns):
        column = meta.column(i)
        if column.path_in_schema == time and column.is_stats_set and column.statistics.has_min_max:
            kind = json.loads(file.schema.column(i).logical_type.to_json())
            if column.physical_type != "INT64" or kind.get("timeUnit") not in _UNITS:
                return None
            times, parts = _UNITS[kind["timeUnit"]]
            low, high = column.statistics.min_raw, column.statistics.max_raw
            return low * times // parts, high * times // parts
    return None
