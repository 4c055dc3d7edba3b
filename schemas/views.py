"""A feature view: a spine and its features, and the table that they form."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import itertools
import json
from collections.abc import Callable
from typing import TypeVar

import polars as pl
import pyarrow as pa

from schemas.arithmetic import Arithmetic, Bounds
from schemas.errors import DefinitionError, nearest
from schemas.expressions import columns_of
from schemas.features import (
    ARITHMETIC,
    Derived,
    Feature,
    Latest,
    Lookup,
    Trailing,
    is_lifetime,
    iter_sources,
    limits_of,
)
from schemas.places import built_at
from schemas.sources import RESERVED, TIME, Source, identifier, names

# Increased when the kernel computes other values from the same definition and data.
KERNEL_VERSION = 1
Result = TypeVar("Result")


def _once_per_source(method: Callable[[FeatureView, str], Result]) -> Callable[[FeatureView, str], Result]:
    """Keeps what a method of a view returns for each source.  Callers must not change it."""

    @functools.wraps(method)
    def call(self: FeatureView, source: str) -> Result:
        known: dict[str, Result] = self.__dict__.setdefault(f"_{method.__name__}", {})
        if source not in known:
            known[source] = method(self, source)
        return known[source]

    return call


@dataclasses.dataclass(frozen=True, eq=False)
class FeatureView:
    """Features of each row of `spine` as of that row's time.

    Args:
        name: names the table `<store>/features/<name>/<fingerprint>`.
        spine: source with a time; each row gets a feature row.
        key: columns that identify a spine row together with its time.
        features: computed in this order; a `Derived` may use the features above it.
    """

    name: str
    spine: Source
    key: str | tuple[str, ...]
    features: tuple[Feature, ...] | list[Feature]
    place: str = dataclasses.field(default="", init=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "place", built_at())
        identifier(self.name, "The name of a view")
        what = f"View {self.name!r}"
        if not isinstance(self.spine, Source) or self.spine.time is None:
            raise DefinitionError(
                f"{what}: the spine is a Source with a time",
                getattr(self.spine, "name", self.spine),
                "Declare Source(…, time=…)",
            )
        if self.spine.event_time is not None:
            raise DefinitionError(
                f"{what}: a spine row has one time, that of the prediction",
                f"event_time={self.spine.event_time!r}",
                "Leave event_time out of the spine",
            )
        if self.spine.unique is not None or self.spine.order is not None:
            raise DefinitionError(
                f"{what}: key and time identify a spine row",
                "unique or order on the spine",
                "Leave them out of the spine",
            )
        object.__setattr__(self, "key", names(self.key, f"{what}: key"))
        for column in self.key:
            self.spine.require(column, f"{what}: key")
            if self.spine.schema[column].is_float() or self.spine.schema[column] == TIME:
                raise DefinitionError(
                    f"{what}: a key is an integer, a string, a boolean or a date",
                    repr(column),
                    "The time belongs to a spine row's identity by itself",
                )
        if not isinstance(self.features, list | tuple):
            raise DefinitionError(f"{what}: features is a list", repr(self.features), "Write features=[…]")
        object.__setattr__(self, "features", tuple(self.features))
        if not self.features:
            raise DefinitionError(f"{what} has at least one feature", "none", "Add Derived, Trailing, Latest or Lookup")
        for feature in self.features:
            if not isinstance(feature, Derived | Trailing | Latest | Lookup):
                raise DefinitionError(
                    f"{what}: a feature is Derived, Trailing, Latest or Lookup", repr(feature), "See docs/definition.md"
                )
        seen: dict[str, Source] = {}
        for source in (self.spine, *iter_sources(self.features)):
            if seen.setdefault(source.name, source) is not source:
                raise DefinitionError(
                    f"{what}: one name is one source",
                    repr(source.name),
                    "Rename one, or use the same Source object twice",
                )
        _ = self.columns

    @functools.cached_property
    def columns(self) -> dict[str, pl.DataType]:
        """The stored type of each feature, in order."""
        known = dict(self.spine.schema)
        result: dict[str, pl.DataType] = {}
        made_by: dict[str, Feature] = {}
        for feature in self.features:
            try:
                outputs = feature.outputs({**known, **result})
            except DefinitionError as error:
                later = self._made_below(feature)
                name = str(error.value).strip("'")
                if name in later:
                    raise DefinitionError(
                        f"View {self.name!r}: a feature uses only what stands above it (no cycles)",
                        repr(name),
                        f"Move the feature that makes {name!r} up",
                    ) from None
                raise
            for name, dtype in outputs.items():
                if name in (*self.key, self.time) and not _alike(dtype, self.spine.schema[name]):
                    raise DefinitionError(
                        f"View {self.name!r}: key and time stay as the spine has them",
                        f"{_short(feature)} of type {dtype}",
                        "Give the feature another name",
                    )
                if (
                    name in result
                    or name in RESERVED
                    or name.startswith("__")
                    or (name in known and not isinstance(feature, Derived))
                ):
                    other = made_by.get(name, "the spine" if name in known else "Millrace's own columns")
                    raise DefinitionError(
                        f"View {self.name!r}: a feature has a name of its own",
                        f"{name!r} from {_short(other)} and from {_short(feature)}",
                        "Give one of them name=…",
                    )
                result[name], made_by[name] = dtype, feature
        return result

    def _made_below(self, feature: Feature) -> set[str]:
        position = next(i for i, each in enumerate(self.features) if each is feature)
        return {
            name
            for below in self.features[position:]
            for name in (
                below.columns
                if isinstance(below, Derived)
                else [each.name for each in below.statistics]
                if isinstance(below, Trailing)
                else below.renamed.values()
            )
        }

    @property
    def feature_names(self) -> tuple[str, ...]:
        return tuple(self.columns)

    @property
    def time(self) -> str:
        """The name of the time column."""
        return str(self.spine.time)

    @property
    def context(self) -> tuple[str, ...]:
        """Spine columns that stay beside the features: key, time, and every column that no feature replaces."""
        return tuple(name for name in self.spine.schema if name not in self.columns)

    @functools.cached_property
    def sources(self) -> dict[str, Source]:
        """Every source that is read besides the spine, by name.  It includes the spine if features trail over it."""
        return {source.name: source for source in iter_sources(self.features)}

    @functools.cached_property
    def dimensions(self) -> dict[str, Source]:
        return {name: source for name, source in self.sources.items() if source.time is None}

    @functools.cached_property
    def events(self) -> dict[str, Source]:
        return {name: source for name, source in self.sources.items() if source.time is not None}

    @_once_per_source
    def reach(self, source: str) -> int:
        """How far back features look in `source`, µs."""
        lengths = [0]
        for feature in self.features:
            if isinstance(feature, Trailing) and feature.source.name == source:
                lengths += [each.length or 0 for each in feature.statistics]
            elif isinstance(feature, Latest) and feature.source.name == source:
                lengths.append(feature.length or 0)
        return max(lengths)

    @_once_per_source
    def columns_read(self, source: str) -> list[str]:
        """Columns of `source` that some feature needs, in declared order.  A row is checked by these columns."""
        declared = self.sources[source]
        read: set[str] = {*(declared.unique or ()), *(declared.order or ())}
        for feature in self.features:
            if isinstance(feature, Derived) or feature.source.name != source:
                continue
            read |= {column for _, column in feature.keys}
            if feature.where is not None:
                read |= set(columns_of(feature.where))
            if isinstance(feature, Trailing):
                read |= {column for column in feature.stats if column != "*"}
                ordered = any(each.stat in ("first", "last") for each in feature.statistics)
            else:
                read |= set(feature.columns)
                ordered = True
            if ordered and declared.time is not None and declared.order is None:
                read |= set(declared.columns)
        times = {name for name in (declared.time, declared.event_time) if name}
        return [name for name in declared.schema if name in read | times]

    @_once_per_source
    def columns_ordering(self, source: str) -> tuple[str, ...]:
        """Further columns of `source` that decide which of several rows a feature takes, in declared order.

        There are none if the columns that are read come first in `tie_order`, as far as the feature uses them: rows
        that are equal in these are equal for the feature.  Otherwise, they are those before the last one that is read.
        No row is checked by them.
        """
        declared = self.sources[source]
        if declared is self.spine:  # all of its columns are read anyway
            return ()
        read, order = set(self.columns_read(source)), declared.tie_order
        first = list(itertools.takewhile(read.__contains__, order))
        if not any(
            feature.chooses(first)
            for feature in self.features
            if not isinstance(feature, Derived) and feature.source is declared
        ):
            return ()
        last = max(place for place, name in enumerate(order) if name in read)
        before = set(order[:last]) - read
        return tuple(name for name in declared.schema if name in before)

    @_once_per_source
    def columns_held(self, source: str) -> list[str]:
        """Columns of `source` that are read: those that features need and those that break ties, in declared order."""
        wanted = {*self.columns_read(source), *self.columns_ordering(source)}
        return [name for name in self.sources[source].schema if name in wanted]

    @functools.cached_property
    def arithmetic(self) -> dict[str, Arithmetic]:
        """For each column of a Derived, the expression as it is computed."""
        known, bounds, result = dict(self.spine.schema), dict[str, Bounds](), dict[str, Arithmetic]()
        for feature in self.features:
            limits: dict[str, Bounds | None]
            if isinstance(feature, Derived):
                made = feature.computed(known, bounds, self.columns)
                result |= made
                limits = {name: each.bounds for name, each in made.items()}
            else:
                limits = limits_of(feature)
            for name, limit in limits.items():
                known[name] = self.columns[name]
                bounds.pop(name, None)
                if limit is not None and known[name].is_integer():
                    bounds[name] = limit
        return result

    @functools.cached_property
    def meanings(self) -> dict[str, str]:
        """For each feature, a digest of everything that decides its values, including features above it."""
        digests: dict[str, str] = {}
        for feature in self.features:
            for name in (
                feature.outputs({**self.spine.schema, **self.columns})
                if not isinstance(feature, Derived)
                else feature.columns
            ):
                meaning: dict[str, object] = {
                    "kernel": KERNEL_VERSION,
                    "type": str(self.columns[name]),
                    **feature.meaning(name),
                }
                if isinstance(feature, Derived) and self.arithmetic[name].changed:
                    meaning["arithmetic"] = ARITHMETIC
                above = (
                    columns_of(feature.columns[name])
                    if isinstance(feature, Derived)
                    else [spine for spine, _ in feature.keys]
                )
                meaning["uses"] = {column: digests.get(column, str(self.spine.schema.get(column))) for column in above}
                digests[name] = _digest(meaning)
        return digests

    @functools.cached_property
    def fingerprint(self) -> str:
        """16 hexadecimal digits that change with whatever changes values: expressions, order, types, kernel version.

        It does not change with labels, encoders, lateness or the text of the file.
        """
        return _digest(
            {
                "key": self.key,
                "time": self.time,
                "spine": {name: str(dtype) for name, dtype in self.spine.schema.items()},
                "features": list(self.meanings.items()),
                "kernel": KERNEL_VERSION,
                **({"ties": self._ties} if self._ties else {}),
            }
        )

    @functools.cached_property
    def _ties(self) -> dict[str, list[list[str]]]:
        """The order of ties of each source of which columns are read only to break ties.

        Features of other sources take the same rows as in earlier versions.
        """
        return {
            name: [[column, str(source.schema[column])] for column in source.ties(self.columns_held(name))]
            for name, source in self.sources.items()
            if self.columns_ordering(name)
        }

    @functools.cached_property
    def output_schema(self) -> pa.Schema:
        """Arrow schema of the feature table: context, features, `row_id` (int64), `date` (UTC date of the time)."""
        frame = pl.DataFrame(schema={name: self.spine.schema[name] for name in self.context} | self.columns)
        fields = [pa.field(field.name, _plain(field.type)) for field in frame.to_arrow().schema]
        return pa.schema([*fields, pa.field("row_id", pa.int64()), pa.field("date", pa.date32())])

    def require_feature(self, name: str, what: str) -> None:
        """Refuses a `name` that is neither a feature nor a spine column."""
        if name not in self.columns and name not in self.context:
            raise DefinitionError(
                f"{what} names a feature or a spine column of view {self.name!r}",
                repr(name),
                nearest(name, [*self.columns, *self.context]),
            )


def _alike(a: pl.DataType, b: pl.DataType) -> bool:
    return a == b or (a.is_integer() and b.is_integer())


def _plain(dtype: pa.DataType) -> pa.DataType:
    """Polars exports strings as large_string; tables and topics have string."""
    return pa.string() if pa.types.is_large_string(dtype) else dtype


def _digest(value: object) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()[:16]


def _short(feature: object) -> str:
    if isinstance(feature, Derived):
        return "Derived(" + ", ".join(feature.columns) + ")"
    source = getattr(getattr(feature, "source", None), "name", None)
    return f"{type(feature).__name__}({source}, by={feature.by!r})" if source else str(feature)  # type: ignore[attr-defined]


@functools.lru_cache(256)
def lifetime_sources(view: FeatureView) -> tuple[str, ...]:
    """Sources over which there are lifetime windows."""
    return tuple(dict.fromkeys(feature.source.name for feature in view.features if is_lifetime(feature)))  # type: ignore[union-attr]


def reached_from(view: FeatureView, source: str, moment: int) -> int:
    """The earliest time (µs) of the rows of a source that a spine row at `moment` can see."""
    return -(2**62) if source in lifetime_sources(view) else moment - view.reach(source)
