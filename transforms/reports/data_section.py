"""The data of a model: its splits on a timeline and in rows, the tables that were read, and how far columns drifted."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime, timedelta

from schemas.splits import SPLITS
from transforms.models.stored_records import ModelManifest, SplitBounds, TableVersion, TrainingRecord
from transforms.reports import charts
from transforms.reports.charts import Axis, Paths, Strip
from transforms.reports.formatting import DASH

# Number of columns in the table of drift that are shown at once.
COLUMNS = 15


@dataclasses.dataclass(frozen=True)
class Dates:
    """The dates of a split: text before one time, or from one time to another."""

    words: str
    stamps: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class SplitRow:
    """A split's examples, and what became of its other rows; `positive` is the share of examples with the label 1."""

    name: str
    dates: Dates
    rows: int
    waiting: int
    dropped: int
    entered: int
    positive: float | None


@dataclasses.dataclass(frozen=True)
class SplitBar:
    """A split on the timeline: its start and end as shares of the timeline, and its length."""

    name: str
    left: float
    width: float
    length: str


@dataclasses.dataclass(frozen=True)
class Timeline:
    """The splits on a timeline, with the gaps between them."""

    spans: tuple[SplitBar, ...]
    first: str
    cutoff: str


@dataclasses.dataclass(frozen=True)
class Table:
    """A table that was read: its purpose, address and version."""

    name: str
    uri: str
    version: str
    about: str


@dataclasses.dataclass(frozen=True)
class SourceRead:
    """A source of the features: its digest, its files, and their first and last date."""

    name: str
    digest: str
    files: str
    dates: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Drifting:
    """How far one column moved from the champion's training data, and from training to test."""

    column: str
    strip: Strip
    moved: float | None
    skew: float | None


@dataclasses.dataclass(frozen=True)
class Drift:
    """Columns that moved, in descending order of the distance.

    Args:
        champion: the model with whose training data they are compared; None: there is none.
    """

    champion: str | None
    scale: Axis
    first: tuple[Drifting, ...]
    more: tuple[Drifting, ...]
    compared: bool


@dataclasses.dataclass(frozen=True)
class Data:
    """The content of the section.

    Args:
        binary: whether examples are positive or not.
        feature_rows, outside, waiting: rows of the feature table; those in no split; those whose label was not known.
        drift: None: no column could be compared.
        missing: of a model with several views, feature rows that one of them lacks, by view.
    """

    warnings: tuple[str, ...]
    timeline: Timeline | None
    splits: tuple[SplitRow, ...]
    binary: bool
    feature_rows: int
    outside: int
    waiting: int
    tables: tuple[Table, ...]
    sources: tuple[SourceRead, ...]
    drift: Drift | None
    missing: tuple[tuple[str, int], ...] = ()


def data(content: TrainingRecord, manifest: ModelManifest) -> Data:
    counts = content["splits"]
    return Data(
        tuple(content["data"]["warnings"]),
        timeline(manifest),
        splits(content, manifest),
        _binary(manifest),
        content["feature_rows"],
        content["outside"],
        sum(each["waiting"] for each in counts.values()),
        tables(manifest),
        sources(manifest),
        drift(content),
        tuple((content.get("missing") or {}).items()),
    )


def _binary(manifest: ModelManifest) -> bool:
    return bool(manifest["objective"] == "binary:logistic")


def splits(content: TrainingRecord, manifest: ModelManifest) -> tuple[SplitRow, ...]:
    dates, labels, found = _dates(manifest.get("split", {})), content.get("labels") or {}, []
    for name in SPLITS:
        count, seen = content["splits"][name], {float(key): n for key, n in labels.get(name, {}).items()}
        share = seen.get(1.0, 0) / count["entered"] if _binary(manifest) and count["entered"] else None
        when = dates.get(name, Dates(DASH))
        found.append(SplitRow(name, when, count["rows"], count["waiting"], count["dropped"], count["entered"], share))
    return tuple(found)


def _dates(split: SplitBounds) -> dict[str, Dates]:
    if "groups" in split:
        return dict.fromkeys(
            SPLITS, Dates(f"groups of {', '.join(split['groups']['by'])}, before ", (split["cutoff"],))
        )
    if "validate_start" not in split:
        return {}
    return {
        "train": Dates("until ", (split["train_end"],)),
        "validate": Dates("", (split["validate_start"], split["validate_end"])),
        "test": Dates("", (split["test_start"], split["cutoff"])),
    }


def timeline(manifest: ModelManifest) -> Timeline | None:
    split, first = manifest.get("split", {}), (manifest.get("feature_table") or {}).get("first")
    if "validate_start" not in split or first is None:
        return None
    moment = datetime.fromisoformat
    start, end = moment(first).replace(tzinfo=UTC), moment(split["cutoff"])
    bounds = [
        ("train", start, moment(split["train_end"])),
        ("validate", moment(split["validate_start"]), moment(split["validate_end"])),
        ("test", moment(split["test_start"]), end),
    ]
    if end <= start or bounds[0][2] <= start:
        return None
    whole = end - start
    found = [
        SplitBar(name, (low - start) / whole, (high - low) / whole, _length(high - low)) for name, low, high in bounds
    ]
    return Timeline(tuple(found), first, split["cutoff"])


def _length(span: timedelta) -> str:
    days = span / timedelta(days=1)
    return f"{days:.0f} days" if days >= 2 else f"{days * 24:.0f} hours"


def tables(manifest: ModelManifest) -> tuple[Table, ...]:
    """The tables of features and labels."""
    features, label = manifest.get("feature_table") or {}, manifest.get("label_table") or {}
    files = len(manifest.get("label_files") or [])
    views = manifest.get("views") or ()
    one = Table("features", _folder(features), _version(features), f"fingerprint {manifest['fingerprint']}")
    return (
        *(() if views else (one,)),
        *(
            Table(f"features of {each['view']}", _folder(each), _version(each), f"fingerprint {each['fingerprint']}")
            for each in views
        ),
        Table("label", _folder(label), _version(label), f"{_files(files)} read" if files else ""),
    )


def sources(manifest: ModelManifest) -> tuple[SourceRead, ...]:
    return tuple(
        SourceRead(
            name,
            str(each.get("digest", DASH)),
            _files(each["files"]) if each.get("files") else "a dimension",
            (each["first"], each["last"]) if each.get("first") else (),
        )
        for name, each in (manifest.get("sources") or {}).items()
    )


def _files(count: int) -> str:
    return f"{count:,} file" + ("s" if count > 1 else "")


def _folder(table: TableVersion) -> str:
    return str(table.get("uri", DASH)).removeprefix("file://").rstrip("/")


def _version(table: TableVersion) -> str:
    return "files without versions" if table.get("version") is None else f"version {table['version']}"


def drift(content: TrainingRecord) -> Drift | None:
    found, most = content["data"], (content.get("rules") or {}).get("max_drift")
    moved, skew = found["drift"], found["skew"]
    if not moved and not skew:
        return None
    order = sorted({*moved, *skew}, key=lambda name: (-max(moved.get(name, 0.0), skew.get(name, 0.0)), name))
    ends = [0.0, *moved.values(), *skew.values(), *([most] if most else []), 0.1]
    x = Axis.over(ends, "0 same … 1 nothing in common", ticks=4)
    limit = charts.upright(x, most, "limit") if most is not None and moved else ()
    columns = _drifting(order, moved, skew, x, limit)
    return Drift(found["champion"], x, columns[:COLUMNS], columns[COLUMNS:], bool(moved))


def _drifting(
    order: Sequence[str], moved: Mapping[str, float], skew: Mapping[str, float], x: Axis, limit: Paths
) -> tuple[Drifting, ...]:
    def bars(name: str) -> Paths:
        first = charts.bar(x, moved[name], "first", 0.7) if name in moved else ()
        second = charts.bar(x, skew[name], "second", 0.3 if moved else 0.5) if name in skew else ()
        return first + second + limit

    return tuple(Drifting(name, Strip(x, bars(name), 18), moved.get(name), skew.get(name)) for name in order)
