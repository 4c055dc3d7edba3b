"""Arrow schemas of what live jobs write: accepted rows with their origin, feature rows with their cut, dead letters."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import polars as pl
import pyarrow as pa

from schemas.errors import DefinitionError
from schemas.sources import Source
from schemas.tables import TIME, predictions
from schemas.views import FeatureView

# The origin of a row: topic partition, offset of its message, position in the message, and time of arrival.
ORIGIN_FIELDS = pa.schema(
    [
        ("__partition", pa.int32()),
        ("__offset", pa.int64()),
        ("__place", pa.int32()),
        ("__arrived", TIME),
    ]
)

# Columns added to the features of a feature row: the next offset per partition that it could see
# (`source/partition:offset,…`), whether the spine row was late, its origin, the time of computation, the versions of
# the dimensions as JSON, and whether some window begins before the job has its source's rows (null in files written
# before the column existed).
LIVE_COLUMNS = pa.schema(
    [
        ("__cut", pa.string()),
        ("__late", pa.bool_()),
        *list(ORIGIN_FIELDS)[:3],
        ("__answered", TIME),
        ("__dimensions", pa.string()),
        ("__cold", pa.bool_()),
    ]
)

# The columns of a feature row that a live prediction keeps, and the feature row's origin in the features topic.
SEEN = pa.schema([*(LIVE_COLUMNS.field(name) for name in ("__cut", "__late", "__answered")), *ORIGIN_FIELDS])


def live_sources(view: FeatureView) -> dict[str, Source]:
    """The sources whose messages a live view reads: the spine and its events."""
    return {view.spine.name: view.spine, **view.events}


def joined_sources(views: Sequence[FeatureView]) -> dict[str, Source]:
    """The sources whose messages a live job of several views reads.

    A source that several views declare has all the columns that they declare, and else what the first of them says.

    Raises:
        DefinitionError: two of them declare a column of one source with different types, or different times.
    """
    found: dict[str, Source] = {}
    for view in views:
        for name, source in live_sources(view).items():
            found[name] = _joined(found[name], source, view) if name in found else source
    return found


def _joined(known: Source, source: Source, view: FeatureView) -> Source:
    if known is source:
        return known
    for what in ("time", "event_time"):
        if getattr(known, what) != getattr(source, what):
            raise DefinitionError(
                f"The views of one live job must declare source {source.name!r} with the same {what}",
                f"it is {getattr(known, what)!r}, and {getattr(source, what)!r} in view {view.name!r}",
                "Give one of the sources another name and topic, or one of the views another store",
            )
    for name, dtype in source.schema.items():
        if known.schema.get(name, dtype) != dtype:
            raise DefinitionError(
                f"The views of one live job must declare column {name!r} of source {source.name!r} with one type",
                f"it is {known.schema[name]}, and {dtype} in view {view.name!r}",
                "Declare the type that the messages have, or give one of the views another store",
            )
    more = {name: dtype for name, dtype in source.columns.items() if name not in known.schema}
    return dataclasses.replace(known, columns={**known.columns, **more}) if more else known


def newest_versions(views: Sequence[FeatureView]) -> list[FeatureView]:
    """The first of the versions of each view."""
    return [view for number, view in enumerate(views) if all(each.name != view.name for each in views[:number])]


def repeats_by(view: FeatureView, name: str) -> tuple[str, ...]:
    """Columns that identify repeats among the events of `name`, which count once; empty if every row counts.

    The rows of a spine are unique even where the spine is a source of events.
    """
    if name not in view.events:
        return ()
    return (*view.key, view.time) if view.events[name] is view.spine else tuple(view.events[name].unique or ())


def accepted(view: FeatureView, name: str) -> pa.Schema:
    """Rows of a source as a live job stores them: its columns, `ORIGIN_FIELDS`, and `date`, the UTC date of their time.

    There are also columns for whether the row came too late to be compared with others, and for the declared columns
    that it does not have, as a JSON list (both null in files written before they existed).  If repeats count once, two
    more say whether the row counted when it was accepted, and which row (`__instead`) counted until then.
    """
    return accepted_rows(live_sources(view)[name], bool(repeats_by(view, name)))


def accepted_rows(source: Source, unique: bool) -> pa.Schema:
    """As `accepted`, for a source; `unique`: whether some view counts its repeats once."""
    arrow = pl.DataFrame(schema=source.schema).to_arrow().schema
    fields = [pa.field(each.name, pa.string() if pa.types.is_large_string(each.type) else each.type) for each in arrow]
    decided = [pa.field("__counted", pa.bool_()), pa.field("__instead", pa.int64())] if unique else []
    stored = [pa.field("__uncompared", pa.bool_()), pa.field("__absent", pa.string()), pa.field("date", pa.date32())]
    return pa.schema([*fields, *ORIGIN_FIELDS, *decided, *stored])


def live_schema(view: FeatureView) -> pa.Schema:
    """Live feature rows: the view's feature table with the columns of `LIVE_COLUMNS`."""
    return pa.schema([*view.output_schema, *LIVE_COLUMNS])


def scorable(view: FeatureView) -> pa.Schema:
    """Feature rows to be scored: the view's feature table with the columns of `SEEN`."""
    return pa.schema([*view.output_schema, *SEEN])


def live_predictions(view: FeatureView, classes: int = 1) -> pa.Schema:
    """A batch job's predictions with the columns of `SEEN` and the time of scoring."""
    made = predictions(view.output_schema, tuple(view.key), view.time, classes)
    return pa.schema([*made, *SEEN, pa.field("__scored", TIME)])
