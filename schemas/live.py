"""Arrow schemas of what live jobs write: accepted rows with their origin, answers with what they could see, dead letters."""

from __future__ import annotations

import polars as pl
import pyarrow as pa

from schemas.tables import TIME, predictions
from schemas.views import FeatureView

# Where a row came from: topic partition, offset of its message, place in the message; and when it arrived.
ORIGIN = pa.schema([
    ("__partition", pa.int32()),
    ("__offset", pa.int64()),
    ("__place", pa.int32()),
    ("__arrived", TIME),
])  # fmt: skip

# Beside the features of an answer: the next offset per partition it could see (`source/partition:offset,…`), whether the
# question came late, where the question came from, when it was answered, the dimensions' versions as JSON, and whether some
# window began before the job has the rows of its source (null in what was written before this was told).
ANSWER = pa.schema([("__cut", pa.string()), ("__late", pa.bool_()), *list(ORIGIN)[:3], ("__answered", TIME), ("__dimensions", pa.string()), ("__cold", pa.bool_())])  # fmt: skip

# What a live prediction keeps of the answer it was made from, and where in the features topic that came from.
SEEN = pa.schema([*(ANSWER.field(name) for name in ("__cut", "__late", "__answered")), *ORIGIN])

# Messages and rows that broke their contract, and questions set aside.  `place` is −1 for a message as a whole.  Of a
# dimension's row `partition` is −1, `offset` its row in a file, `place` the file's number; the rule names file and version.
LIVE_DEAD_LETTERS = pa.schema([
    ("source", pa.string()),
    ("partition", pa.int32()),
    ("offset", pa.int64()),
    ("place", pa.int32()),
    ("field", pa.string()),
    ("rule", pa.string()),
    ("value", pa.string()),
    ("view", pa.string()),
    ("arrived", TIME),
    ("date", pa.date32()),
])  # fmt: skip


def repeats_by(view: FeatureView, name: str) -> tuple[str, ...]:
    """Columns whose repeated values count once among the events of `name`; none if every row counts.

    As events too a spine's rows are questions, each asked once.
    """
    if name not in view.events:
        return ()
    return (*view.key, view.time) if view.events[name] is view.spine else tuple(view.events[name].unique or ())


def accepted(view: FeatureView, name: str) -> pa.Schema:
    """Rows of a source as a live job keeps them: its columns, `ORIGIN`, and `date`, the UTC date of their time.

    Where repeats count once, also what became of the row: whether it counted, and which row (`__instead`) it replaced.
    """
    source = view.spine if name == view.spine.name else view.events[name]
    arrow = pl.DataFrame(schema=source.schema).to_arrow().schema
    fields = [pa.field(each.name, pa.string() if pa.types.is_large_string(each.type) else each.type) for each in arrow]
    decided = [pa.field("__counted", pa.bool_()), pa.field("__instead", pa.int64())] if repeats_by(view, name) else []
    return pa.schema([*fields, *ORIGIN, *decided, pa.field("date", pa.date32())])


def live_schema(view: FeatureView) -> pa.Schema:
    """Answers: the view's feature table with `ANSWER` beside."""
    return pa.schema([*view.output_schema, *ANSWER])


def scorable(view: FeatureView) -> pa.Schema:
    """Answers on their way to a model: the view's feature table with `SEEN` beside."""
    return pa.schema([*view.output_schema, *SEEN])


def live_predictions(view: FeatureView, classes: int = 1) -> pa.Schema:
    """A batch job's predictions with `SEEN` and the moment of scoring beside."""
    made = predictions(view.output_schema, tuple(view.key), view.time, classes)
    return pa.schema([*made, *SEEN, pa.field("__scored", TIME)])
