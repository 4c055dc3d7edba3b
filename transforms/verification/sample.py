"""Chooses the rows to verify: spread over dates and files, by a hash of row and run."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from datetime import timedelta

import numpy as np
import polars as pl

from schemas.feature_groups import GroupKey, group_key
from schemas.features import Latest, Trailing
from schemas.views import FeatureView
from transforms.records.record_batches import frame
from transforms.records.row_hashing import combine_hashes, hash_column, hash_text
from transforms.storage.delta_tables import DataFile, read_file

# Sampled rows per opened file.
ROWS_PER_FILE = 12
# A sample looks into the starts of at most so many ranges of dates; if there are more, it is spread over them.
MOST_STARTS = 8


@dataclasses.dataclass(frozen=True, eq=False)
class Sample:
    """Published rows, most revealing first.  The first `least` are one row for each lifetime group."""

    rows: pl.DataFrame
    least: int


def lifetime_feature_names(view: FeatureView) -> list[list[str]]:
    """Names of the features over all history, grouped by source, key and condition."""
    groups: dict[GroupKey, list[str]] = {}
    for feature in view.features:
        if not isinstance(feature, Trailing | Latest):
            continue
        names = (
            [each.name for each in feature.statistics if each.length is None]
            if isinstance(feature, Trailing)
            else list(feature.renamed.values())
            if feature.length is None
            else []
        )
        if names:
            groups.setdefault(group_key(feature), []).extend(names)
    return list(groups.values())


def choose_files(files: Iterable[DataFile], most: int, run_id: str) -> tuple[list[DataFile], list[DataFile]]:
    """Returns (files to sample from, those of them that begin a range of dates)."""
    known = sorted(set(files), key=lambda file: (file.date, file.path))
    days = sorted({file.date for file in known})
    begin = {day for day in days if day - timedelta(days=1) not in set(days)}
    firsts = [next(file for file in known if file.date == day) for day in sorted(begin)]
    starts = _spread(firsts, max(min(most, MOST_STARTS), 1), run_id)
    rest = [file for file in known if file not in starts]
    ends = rest[-1:] if most > len(starts) else []
    more = _spread([file for file in rest if file not in ends], most - len(starts) - len(ends), run_id)
    return [*starts, *ends, *more], starts


def _spread(files: Sequence[DataFile], most: int, run_id: str) -> list[DataFile]:
    """At most so many of the files, at equal distances; the run's id decides where they begin."""
    if len(files) <= most:
        return list(files)
    offset = int(hash_text(run_id)) % 1000 / 1000
    return [files[int((i + offset) * len(files) / most)] for i in range(max(most, 0))]


def choose_rows(
    view: FeatureView, files: Sequence[DataFile], starts: Sequence[DataFile], count: int, run_id: str
) -> Sample:
    """Chooses `count` rows of `files`: from each file its first and last row, then alternately rows with many values
    and random ones."""
    quota = 2 * -(-count // max(len(files), 1))  # a file with few rows leaves part of its share to the others
    ranked, first = [], []
    for file in files:
        rows = frame(read_file(file)).sort(view.time, *view.key)
        ranked.append(_ranked(view, rows, quota, run_id))
        if file in starts:
            first.append(rows)
    groups = lifetime_feature_names(view)
    least = [_with_history(view, first, names, run_id) for names in groups] if first else []
    # Older files may lack the column that records how a row was computed.
    mixed = pl.concat(ranked, how="diagonal").sort("__rank", maintain_order=True).drop("__rank")
    whole = pl.concat([*least, mixed], how="diagonal")
    distinct = whole.unique("row_id", keep="first", maintain_order=True)
    musts = len(pl.concat([row["row_id"] for row in least]).unique()) if least else 0
    return Sample(distinct[: max(count, musts)], musts)


def _ranked(view: FeatureView, rows: pl.DataFrame, quota: int, run_id: str) -> pl.DataFrame:
    """The first `quota` of a file's rows by `__rank`."""
    nulls = rows.select(pl.sum_horizontal(pl.col(name).is_null() for name in view.columns)).to_series().to_numpy()
    draw = _draw(rows, run_id)
    fullest, chance = np.lexsort((draw, nulls)), np.argsort(draw)
    edges = np.array([0, len(rows) - 1])
    # Half of the rows are chosen at random, so that rows with empty windows are verified too.
    mixed = [
        *edges,
        *(int(position) for i in range(quota) for position in (chance if i % 2 else fullest)[i : i + 1]),
    ]
    positions = list(dict.fromkeys(int(position) for position in mixed))[:quota]
    return rows[positions].with_columns(pl.int_range(pl.len(), dtype=pl.Int64).alias("__rank"))


def _with_history(view: FeatureView, starts: Sequence[pl.DataFrame], names: Sequence[str], run_id: str) -> pl.DataFrame:
    """One of the first rows of a range whose lifetime features have values; these come from before the range."""
    start = starts[int(hash_text(run_id)) % len(starts)]
    filled = [
        pl.col(name).cast(pl.Int64) > 0 if view.columns[name].is_integer() else pl.col(name).is_not_null()
        for name in names
    ]
    rows = start.filter(pl.any_horizontal(filled).fill_null(False))[:20]
    rows = rows if len(rows) else start[:20]
    return rows[[int(np.argmin(_draw(rows, run_id)))]]


def _draw(rows: pl.DataFrame, run_id: str) -> np.ndarray[tuple[int], np.dtype[np.uint64]]:
    return combine_hashes([hash_column(rows["row_id"]), hash_text(run_id)])


def every_row(files: Iterable[DataFile], at_once: int) -> Iterator[pl.DataFrame]:
    """Yields all rows of the files, some at a time."""
    held: list[pl.DataFrame] = []
    for file in sorted(set(files), key=lambda file: (file.date, file.path)):
        rows = frame(read_file(file))
        for start in range(0, len(rows), at_once):
            held.append(rows[start : start + at_once])
            if sum(map(len, held)) >= at_once:
                yield pl.concat(held, how="diagonal")
                held = []
    if held:
        yield pl.concat(held, how="diagonal")
