"""Records of erasures, without any erased value: the ids of rows and predictions, counts, and times.

`trace` reads them. An id is a hash that nothing else in the store contains any more; neither the condition nor a value
is stored.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Collection, Iterator, Mapping
from datetime import UTC, datetime

import polars as pl
import pyarrow as pa

from schemas.views import FeatureView
from transforms.records.row_hashing import row_ids as ids_of
from transforms.storage.delta_tables import TableRow, write_file_atomically
from transforms.storage.stored_json import explain_damage, parse_object, read_regular

ERASURES_FOLDER = "erasures"


@dataclasses.dataclass(frozen=True)
class ErasureRecord:
    """An erasure.

    Args:
        erasure_id: id of the run that began it.
        source: the source that the rows were in.
        started: when it started, in UTC as ISO 8601.
        finished: when it finished; None: it was interrupted, and the same command completes it.
        row_ids: ids of feature rows.
        prediction_ids: ids of predictions.
        counts: number of rows and files removed, by where they were.
        models: names and versions of the models that were trained on the rows.
        live_row_ids: ids of live feature rows that were removed because they could see an erased row, or belonged to
            one.
    """

    erasure_id: str
    source: str
    started: str
    finished: str | None = None
    row_ids: tuple[int, ...] = ()
    prediction_ids: tuple[int, ...] = ()
    counts: dict[str, int] = dataclasses.field(default_factory=dict)
    models: tuple[str, ...] = ()
    live_row_ids: tuple[int, ...] = ()

    def check(self) -> None:
        """Raises ValueError if a field has another type than it is declared with."""
        texts = (self.erasure_id, self.source, self.started, *self.models, self.finished or "")
        numbers = (*self.row_ids, *self.live_row_ids, *self.prediction_ids, *dict(self.counts).values())
        if not all(isinstance(each, str) for each in texts) or not all(type(each) is int for each in numbers):
            raise ValueError("a field has another type")

    @property
    def at(self) -> str:
        """When the rows were erased."""
        return self.finished or self.started

    def write(self, store: str) -> None:
        content = json.dumps(dataclasses.asdict(self), indent=1)
        write_file_atomically(
            os.path.join(store, ERASURES_FOLDER), f"{self.erasure_id}.json", pa.py_buffer(content.encode())
        )


def now_text() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def erasures(store: str) -> Iterator[ErasureRecord]:
    """Every erasure of a store, the newest last.

    Raises:
        StoreError: a record cannot be read.
    """
    folder = os.path.join(store, ERASURES_FOLDER)
    found = []
    for name in os.listdir(folder) if "://" not in store and os.path.isdir(folder) else ():
        if name.startswith(".") or not name.endswith(".json"):
            continue
        path = os.path.join(folder, name)
        with explain_damage("The record of an erasure can be read", path):
            raw = parse_object(read_regular(path))
            ids = {each: tuple(raw[each]) for each in ("row_ids", "prediction_ids", "models")}
            ids["live_row_ids"] = tuple(raw.get("live_row_ids", ()))  # earlier versions did not record these ids
            record = ErasureRecord(**{**raw, **ids})
            record.check()
            found.append(record)
    yield from sorted(found, key=lambda each: each.started)


def erasure_of(
    store: str, row_ids: Collection[int] = (), prediction_ids: Collection[int] = (), live: bool = False
) -> ErasureRecord | None:
    """The last erasure of one of these rows (`live`: live feature rows) or predictions."""
    rows, predictions, last = set(row_ids), set(prediction_ids), None
    for each in erasures(store):
        if rows & {*each.row_ids, *(each.live_row_ids if live else ())} or predictions & set(each.prediction_ids):
            last = each
    return last


def erased_row(store: str, view: FeatureView, values: TableRow, live: bool = False) -> ErasureRecord | None:
    """The last erasure of the feature row with these values of the key's columns and the time."""
    names = [*view.key, view.time]
    columns = [pl.Series(name, [values[name]]).cast(view.spine.schema[name]) for name in names]
    return erasure_of(store, row_ids=ids_of(view.name, columns).to_list(), live=live)


@dataclasses.dataclass(frozen=True, eq=False)
class Erased:
    """What was erased from a live store.

    Args:
        row_ids: ids of its feature rows and spine rows.
        rows: by source, the greatest number of accepted or rejected rows that may be gone.
    """

    row_ids: pl.Series
    rows: Mapping[str, int]

    @classmethod
    def of(cls, store: str) -> Erased:
        ids, rows = set[int](), dict[str, int]()
        for each in erasures(store):
            ids |= {*each.row_ids, *each.live_row_ids}
            gone = sum(each.counts.get(name, 0) for name in ("source_rows", "dead_letters"))
            rows[each.source] = rows.get(each.source, 0) + gone
        return cls(pl.Series("row_id", sorted(ids), pl.Int64), rows)

    def has(self, frame: pl.DataFrame) -> pl.DataFrame:
        """The rows of a frame with `row_id` that were erased."""
        return frame.filter(pl.col("row_id").is_in(self.row_ids.implode()))
