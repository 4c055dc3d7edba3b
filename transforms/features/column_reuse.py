"""Finds the columns of an older table that a run over a changed view can copy instead of computing them.

A column is copied for a day only if all of the following holds. Digests prove it, never timestamps.

- The feature has the same meaning (`FeatureView.meanings`: expressions, windows, types, kernel), and so does the spine.
- The day was computed from the rows whose digests are in the older table's manifest.
- Of each source that the feature needs, directly or through other features, every day within reach still has those
  rows, and the contract accepts the same rows as before. The content of each dimension is unchanged.

`Derived` columns are always computed, because they need only their own row.
"""

from __future__ import annotations

import bisect
import dataclasses
import functools
import json
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence

import polars as pl
from pyarrow.parquet import Statistics

from schemas.durations import instant
from schemas.errors import ContractError, DataError, StoreError
from schemas.expressions import columns_of
from schemas.feature_groups import column_names
from schemas.features import ORDERED, Derived, Trailing, is_lifetime
from schemas.sources import Source
from schemas.views import FeatureView
from transforms.features.manifest import MANIFEST_VERSION, Manifest, SourceDescription, ViewDescription, read_anew
from transforms.features.source_digests import Current, digests_now, digests_within, dimensions_digest, reaches
from transforms.records.row_hashing import row_ids
from transforms.records.times import as_date, as_number
from transforms.sources.contracts import Contract
from transforms.sources.conversions import problem_free, type_holds
from transforms.sources.data_files import open_file, open_parquet
from transforms.sources.day_digests import Digests
from transforms.sources.formats import is_text
from transforms.sources.inventory import Inventory
from transforms.sources.reader import RepeatedKeys, read_raw
from transforms.sources.slices import Slice
from transforms.storage.delta_tables import DataFile, read_file

log = logging.getLogger("millrace.features")

CANDIDATES = 3
# A float column satisfies every contract if its values stay below this.
_LARGEST = 3.4e38


def describe_view(view: FeatureView) -> ViewDescription:
    """Describes the view so that later views can be compared with it. The result is stored in manifests."""
    described = {
        "spine": {"key": view.key, **_rules(view.spine, view.spine.schema)},
        "meanings": view.meanings,
        "sources": {
            name: _rules(source, view.spine.schema)
            if source is view.spine
            else _rules(source, view.columns_held(name), view.columns_ordering(name))
            for name, source in view.sources.items()
        },
        "reaches": list(reaches(view).items()),
    }
    return json.loads(json.dumps(described))


def _rules(source: Source, columns: Iterable[str], ordering: Sequence[str] = ()) -> dict[str, object]:
    """Describes everything that decides which rows of a source count.

    Args:
        columns: all columns that are read. The contract checks those that are not in `ordering`.
    """
    return {
        "name": source.name,
        "time": source.time,
        "event_time": source.event_time,
        "unique": source.unique and list(source.unique),
        "order": source.order and list(source.order),
        "not_before": str(instant(source.not_before)),
        "columns": [[name, str(source.schema[name])] for name in columns],
        **({"ordering": list(ordering)} if ordering else {}),
        **({"reading": source.reading} if source.reading else {}),
    }


def description_after(view: FeatureView, before: Manifest) -> ViewDescription:
    """Describes the view for a manifest that follows `before`; empty, so that nothing is copied, if they differ."""
    described = describe_view(view)
    return described if not before.dates or before.about == described else {}


@dataclasses.dataclass(frozen=True, eq=False)
class OlderTable:
    """A table of the same view under another fingerprint: address, version, manifest and files of that version."""

    uri: str
    version: int
    manifest: Manifest
    files: tuple[DataFile, ...]


@dataclasses.dataclass(frozen=True)
class Copies:
    """Columns to copy from an older table.

    Args:
        uri, version: identify the table.
        columns: per day the columns to copy. Days that are missing have none.
        files: per day the files that contain them.
    """

    uri: str
    version: int
    columns: Mapping[int, tuple[str, ...]]
    files: Mapping[int, tuple[DataFile, ...]]

    def classes(self, days: Iterable[int]) -> dict[tuple[str, ...], list[int]]:
        """Groups `days` by the columns that are copied for them."""
        result: dict[tuple[str, ...], list[int]] = {}
        for day in sorted(days):
            result.setdefault(self.columns.get(day, ()), []).append(day)
        return result


def find_copies(
    view: FeatureView, inventory: Inventory, current: Current, tables: Iterable[OlderTable], days: Sequence[int]
) -> Copies | None:
    """Returns the copies from the table among `tables` that gives the most columns for `days`; None if no table gives
    any.

    If several tables give the same number, the first is used.

    Raises:
        ContractError: a changed source cannot be read.
    """
    described = describe_view(view)
    known = [each for each in tables if each.manifest.about and each.manifest.about["spine"] == described["spine"]]
    known.sort(key=lambda each: -len(_same(view, each.manifest)))
    found = [_copies(view, inventory, current, each, days) for each in known[:CANDIDATES] if _same(view, each.manifest)]
    best = max(found, key=lambda each: sum(map(len, each.columns.values())), default=None)
    return best if best is not None and best.columns else None


def _same(view: FeatureView, manifest: Manifest) -> list[str]:
    """Names of the features that have the same meaning in the older table and are worth copying."""
    before = manifest.about["meanings"]
    return [name for name in reading_features(view) if before.get(name) == view.meanings[name]]


def reading_features(view: FeatureView) -> list[str]:
    """Names of the features that read rows other than their own."""
    return [name for feature in view.features if not isinstance(feature, Derived) for name in column_names(feature)]


def _copies(
    view: FeatureView, inventory: Inventory, current: Current, older: OlderTable, days: Sequence[int]
) -> Copies:
    manifest, spine, needs, same = older.manifest, view.spine.name, sources_needed(view), _same(view, older.manifest)
    if manifest.version < MANIFEST_VERSION:
        same = [name for name in same if name not in of_all_history(view)]
    back = dict(manifest.about["reaches"])
    inputs = digests_within(back, manifest.digests, manifest.dropped, [day for day in days if day in manifest.dates])
    files: dict[int, list[DataFile]] = {}
    for file in older.files:
        files.setdefault(as_number(file.date), []).append(file)
    days = [day for day, digest in inputs.items() if digest == manifest.dates[day] and day in files]
    if not days:
        return Copies(older.uri, older.version, {}, {})
    proof_of = functools.cache(functools.partial(_proof, view, inventory, current, manifest, (days[0], days[-1])))

    def proven(source: str, ordered: bool, day: int) -> bool:
        proof, exactly = proof_of(source)
        return (exactly or not ordered) and proof(day, back.get(source, 0))

    columns: dict[int, tuple[str, ...]] = {}
    one: dict[tuple[str, ...], tuple[str, ...]] = {}
    for day in days:
        if not proof_of(spine)[0](day, 0):
            continue
        names = tuple(name for name in same if all(proven(source, order, day) for source, order in needs[name]))
        if names:
            columns[day] = one.setdefault(names, names)
    return Copies(older.uri, older.version, columns, {day: tuple(files[day]) for day in columns})


def sources_needed(view: FeatureView) -> dict[str, frozenset[tuple[str, bool]]]:
    """Returns per feature the sources that decide it, directly or through the features it uses.

    Each source comes with whether the order of its rows matters.
    """
    result: dict[str, frozenset[tuple[str, bool]]] = {}
    for feature in view.features:
        if isinstance(feature, Derived):
            above = {name: set(columns_of(expr)) for name, expr in feature.columns.items()}
            own: dict[str, set[tuple[str, bool]]] = {name: set() for name in above}
        else:
            keys, source = {left for left, _ in feature.keys}, feature.source.name
            above = dict.fromkeys(column_names(feature), keys)
            own = {name: {(source, True)} for name in above}
            if isinstance(feature, Trailing):
                own = {each.name: {(source, each.stat in ORDERED)} for each in feature.statistics}
        result |= {
            name: frozenset(own[name].union(*(result.get(column, frozenset()) for column in columns)))
            for name, columns in above.items()
        }
    return result


def of_all_history(view: FeatureView) -> set[str]:
    """Names of the features with lifetime windows, and of those that use such features."""
    found: set[str] = set()
    for feature in view.features:
        if isinstance(feature, Derived):
            found |= {name for name, expr in feature.columns.items() if found.intersection(columns_of(expr))}
        elif found.intersection(left for left, _ in feature.keys):
            found |= {*column_names(feature)}
        elif isinstance(feature, Trailing):
            found |= {each.name for each in feature.statistics if each.length is None}
        elif is_lifetime(feature):
            found |= {*column_names(feature)}
    return found


# (Day, days back) → whether the rows of a source that a window of that day sees are unchanged.
Proof = Callable[[int, int], bool]


def _proof(
    view: FeatureView, inventory: Inventory, current: Current, manifest: Manifest, span: tuple[int, int], source: str
) -> tuple[Proof, bool]:
    """Returns the proof for a source over the days of `span`, and whether the same columns were read.

    If the same columns were read, rows with the same time have the same order.
    """
    spine = source == view.spine.name
    before = manifest.about["spine"] if spine else manifest.about["sources"].get(source)
    contract, slices = inventory.contract(source), inventory.slices[source]
    now = _rules(contract.source, contract.read, contract.ordering)
    rules: Mapping[str, object] = before or {}
    if before is None or any(
        rules.get(rule) != now.get(rule) for rule in {*rules, *now} - {"columns", "ordering", "key"}
    ):
        return _never, False
    exactly = before["columns"] == now["columns"]
    same = exactly and before.get("ordering") == now.get("ordering")
    then = contract if same else _alike(contract, before, slices, current.repeats.get(source))
    if then is None:
        return _never, False
    if contract.source.time is None:
        content = manifest.dimensions.get(source) == current.dimensions[source]
        used = dimensions_digest(manifest.dimensions)
        return lambda day, _: content and manifest.looked_up.get(day) == used, exactly
    # Rows that no window of these days can see need not be read.
    first, last = span[0] - dict(manifest.about["reaches"]).get(source, 0), span[1]
    files = {
        path: span_of_file
        for path, span_of_file in current.files[source].items()
        if span_of_file[1] <= last and span_of_file[2] >= first
    }
    try:
        known = read_anew(manifest) if manifest.version < MANIFEST_VERSION else manifest
        rows = digests_now(source, then, [each for each in slices if each.path in files], files, known)
    except ContractError:  # a column that is no longer needed may be missing
        return _never, False
    dropped = current.repeats[source].dropped if source in current.repeats else {}
    changed = sorted(
        _differing(rows, manifest.digests.get(source, {})) | _differing(dropped, manifest.dropped.get(source, {}))
    )

    def proof(day: int, back: int) -> bool:
        at = bisect.bisect_left(changed, day - back)
        return day <= current.whole[source] and (at == len(changed) or changed[at] > day)

    return proof, exactly


def _never(day: int, back: int) -> bool:
    return False


def _differing(now: Digests, before: Digests) -> set[int]:
    return {day for day in {*now, *before} if now.get(day) != before.get(day)}


def _alike(
    contract: Contract, before: SourceDescription, slices: Sequence[Slice], repeats: RepeatedKeys | None
) -> Contract | None:
    """Returns the contract of an older view that read or checked other columns.

    Returns None if that contract may have accepted other rows. Columns decide about rows in two ways: numbers must be
    finite, texts UTF-8 and dates within the years 1 to 9999; and of repeats with the same time, the smallest row is
    kept.
    """
    declared, columns, ordering = contract.source.schema, before["columns"], before.get("ordering", ())
    if contract.source.time is None or (repeats is not None and len(repeats.first)):
        return None
    if any(name not in declared or str(declared[name]) != dtype for name, dtype in columns):
        return None
    checked = tuple(name for name, _ in columns if name not in ordering)
    others = sorted({*checked} ^ {*contract.columns})
    floats = [name for name in others if declared[name].is_float()]
    read = [name for name in others if declared[name] == pl.String or declared[name].is_temporal()]
    then = dataclasses.replace(contract, columns=checked, ordering=tuple(ordering))
    if not finite(slices, contract.source, floats) or not keep_rules(contract, slices, read):
        return None
    return then if all(map(_held_as_declared(contract, others), {each.path for each in slices})) else None


def _held_as_declared(contract: Contract, columns: Sequence[str]) -> Callable[[str], bool]:
    """Whether a file has these columns in types of which every value is one of the declared type."""
    declared = contract.source.schema

    def held(path: str) -> bool:
        if is_text(path):
            return False
        schema = open_file(path, contract.source).schema
        return all(name not in schema.names or type_holds(declared[name], schema.field(name).type) for name in columns)

    return held if columns else lambda _: True


def keep_rules(contract: Contract, slices: Sequence[Slice], columns: Sequence[str]) -> bool:
    """Whether all values of these columns satisfy the rules of their types. The values are read, because footers do not
    show this."""
    narrow = dataclasses.replace(contract, columns=tuple(columns), ordering=(), required=())
    broken = [condition for name, _, condition in narrow.rules if name in columns]
    for each in slices if broken else ():
        rows = read_raw(narrow, [each])
        if not problem_free(rows) or rows.select(pl.any_horizontal(broken).any()).item():
            return False
    return True


def finite(slices: Sequence[Slice], source: Source, columns: Sequence[str]) -> bool:
    """Whether the footers prove that these columns contain no infinity and nothing beyond float32."""
    groups: dict[str, list[int]] = {}
    for each in slices if columns else ():
        if is_text(each.path):
            return False
        groups.setdefault(each.path, []).append(each.group)
    for path, wanted in groups.items():
        meta = open_parquet(path, source).metadata
        positions = {meta.schema.column(i).path: i for i in range(meta.num_columns)}
        for group in wanted:
            for name in columns:
                statistics = meta.row_group(group).column(positions[name]).statistics if name in positions else None
                if statistics is None or not _bounded(statistics, meta.row_group(group).num_rows):
                    return False
    return True


def _bounded(statistics: Statistics, rows: int) -> bool:
    if not statistics.has_min_max:
        return bool(statistics.has_null_count and statistics.null_count == rows)
    return bool(abs(statistics.min) < _LARGEST and abs(statistics.max) < _LARGEST)


def copied_columns(
    view: FeatureView, copies: Copies, spine: pl.DataFrame, names: Sequence[str], days: Sequence[int]
) -> dict[str, pl.Series]:
    """Reads columns of the older table in the order of the spine rows.

    Returns nothing unless the older table has exactly these rows, each once.
    """
    wanted = ["row_id", *names]
    try:
        parts = [pl.from_arrow(read_file(file, wanted)) for day in days for file in copies.files[day]]
    except (StoreError, DataError) as error:
        log.warning("computed instead of copied: %s", error)
        return {}
    old: pl.DataFrame = pl.concat(parts)  # type: ignore[type-var, assignment]
    ids = row_ids(view.name, [spine[name] for name in (*view.key, view.time)])
    order = pl.DataFrame({"row_id": ids}).join(
        old.with_row_index("__place").select("row_id", "__place"), on="row_id", how="left", maintain_order="left"
    )["__place"]
    if len(order) != len(spine) or len(old) != len(spine) or order.null_count():
        log.warning(
            "computed instead of copied: %s version %d has other rows of %s",
            copies.uri,
            copies.version,
            as_date(days[0]),
        )
        return {}
    found = old.select(names)[order.to_numpy()]
    return {name: found[name] for name in names}
