"""Statistics against a reviewed schema: what is expected, what broke it, how far it moved since the interval before.

TFDV decides; this is the only file that knows it.  Its rules live in one shared library that needs neither TensorFlow
nor the rest of the package: loaded by itself it takes 15 ms, where `import tensorflow_data_validation` takes 5 s.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.machinery
import importlib.util
import itertools
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

import pyarrow as pa
from google.protobuf import text_format
from google.protobuf.message import DecodeError
from tensorflow_metadata.proto.v0.anomalies_pb2 import Anomalies, AnomalyInfo
from tensorflow_metadata.proto.v0.schema_pb2 import (
    BYTES,
    Feature,
    HistogramSelection,
    InfinityNorm,
    JensenShannonDivergence,
    Schema,
)
from tensorflow_metadata.proto.v0.statistics_pb2 import DatasetFeatureStatisticsList

from schemas.errors import DefinitionError

# How far a feature may move between intervals, where nothing was measured: Jensen–Shannon divergence of numbers,
# greatest change of a value's share of strings, both from 0 to 1.
DRIFT = 0.5
# Where it was measured: so many times the most it moved, and never less than the least.
MARGIN, LEAST_DRIFT = 1.5, 0.1
# Strings of more distinct values are no categories, and get no domain.
CATEGORIES = 100

_LIBRARY = "tensorflow_data_validation.pywrap.tensorflow_data_validation_extension"
# Descriptions name every unexpected value; a message need not.
_LONGEST = 300


@dataclasses.dataclass(frozen=True)
class Anomaly:
    """One rule of the schema that the rows of an interval break.  `feature` is "(rows)" for the rows as a whole."""

    feature: str
    rule: str
    value: str
    interval: str

    def __str__(self) -> str:
        return f"{self.feature}: {self.rule}: {self.value}"


@functools.cache
def tfdv() -> ModuleType:
    """TFDV's rules (`InferSchema`, `UpdateSchema`, `ValidateFeatureStatistics`), on serialised protos."""
    if _LIBRARY not in sys.modules:
        package = importlib.util.find_spec("tensorflow_data_validation")
        found = (
            []
            if package is None or package.origin is None
            else sorted((Path(package.origin).parent / "pywrap").glob(f"{_LIBRARY.rsplit('.')[-1]}*.so"))
        )
        if not found:  # laid out differently: the long way
            return importlib.import_module(_LIBRARY).validation
        loader = importlib.machinery.ExtensionFileLoader(_LIBRARY, str(found[0]))
        spec = importlib.util.spec_from_file_location(_LIBRARY, found[0], loader=loader)
        assert spec is not None
        library = importlib.util.module_from_spec(spec)
        loader.exec_module(library)
        sys.modules[_LIBRARY] = library  # whoever imports TFDV later gets this one
    return sys.modules[_LIBRARY].validation


def infer_schema(
    statistics: DatasetFeatureStatisticsList, columns: pa.Schema, pieces: Sequence[DatasetFeatureStatisticsList] = ()
) -> Schema:
    """What the statistics look like as a schema.

    Args:
        statistics: `DatasetFeatureStatisticsList`.
        columns: the columns' Arrow types: only booleans are limited to 0 and 1, whatever was seen.
        pieces: statistics of consecutive intervals.  How far they lie apart bounds each column's drift; a column that
            moves all the way (the weekday, from day to day) gets no bound.
    """
    serialised = tfdv().InferSchema(_dataset(statistics), CATEGORIES, True)
    schema = _completed(Schema.FromString(serialised), columns, set())
    pairs = [measure_drift(schema, now, before) for before, now in itertools.pairwise(pieces)]
    for feature in schema.feature if pairs else ():
        bound = max(MARGIN * max(pair.get(feature.name, 0.0) for pair in pairs), LEAST_DRIFT)
        if bound < 1:
            _bound(feature).threshold = _up(bound)
        else:
            feature.ClearField("drift_comparator")
    return schema


def update_schema(
    schema: Schema,
    statistics: DatasetFeatureStatisticsList,
    columns: pa.Schema,
    previous: DatasetFeatureStatisticsList | None = None,
) -> Schema:
    """The schema, changed as little as makes the statistics keep it, bounds on drift from `previous` included."""
    known = {feature.name for feature in schema.feature}
    serialised = tfdv().UpdateSchema(schema.SerializeToString(), _dataset(statistics), CATEGORIES)
    updated = _completed(Schema.FromString(serialised), columns, known)
    moved = {} if previous is None else measure_drift(updated, statistics, previous)
    for feature in updated.feature:
        if feature.name in known & set(moved) and moved[feature.name] > _bound(feature).threshold:
            _bound(feature).threshold = _up(moved[feature.name])
    return updated


def measure_drift(
    schema: Schema, statistics: DatasetFeatureStatisticsList, previous: DatasetFeatureStatisticsList
) -> dict[str, float]:
    """How far each feature moved, of those whose drift the schema bounds."""
    found = _anomalies(schema, statistics, previous).drift_skew_info
    return {".".join(each.path.step): max(drift.value for drift in each.drift_measurements) for each in found}


def _completed(schema: Schema, columns: pa.Schema, known: set[str]) -> Schema:
    """The schema, its features that are not `known` free of chance bounds and with one on drift."""
    for feature in schema.feature:
        if feature.name in known:
            continue
        if feature.name in columns.names and not pa.types.is_boolean(columns.field(feature.name).type):
            feature.ClearField("bool_domain")
        _bound(feature).threshold = DRIFT
        if feature.type != BYTES:
            # Over equal widths, TFDV's default, one outlier moves everything else into one bucket: 0.98 where nothing
            # else changed, and 1.0 where a column that was mostly 0 is all 0.  Over quantiles: 0.10 and 0.01.
            feature.drift_comparator.jensen_shannon_divergence.source.type = HistogramSelection.QUANTILES
    return schema


def _bound(feature: Feature) -> InfinityNorm | JensenShannonDivergence:
    drift = feature.drift_comparator
    if drift.HasField("infinity_norm"):  # somebody may have chosen it for a number
        return drift.infinity_norm
    return drift.infinity_norm if feature.type == BYTES else drift.jensen_shannon_divergence


def _up(value: float) -> float:
    """To the next hundredth."""
    return min(math.ceil(value * 100) / 100, 1.0)


def find_anomalies(
    statistics: DatasetFeatureStatisticsList,
    schema: Schema,
    previous: DatasetFeatureStatisticsList | None = None,
    interval: str = "",
) -> tuple[Anomaly, ...]:
    """Where the statistics break the schema; against `previous` statistics where it bounds drift."""
    found = _anomalies(schema, statistics, previous)
    result = [
        Anomaly(name, reason.short_description, _cut(reason.description), interval)
        for name, info in sorted(found.anomaly_info.items())
        for reason in info.reason
        # Values of a table are single: its shape is lost exactly when rows miss it, which is reported by itself.
        if reason.type != AnomalyInfo.INVALID_FEATURE_SHAPE or len(info.reason) == 1
    ]
    result += [
        Anomaly("(rows)", reason.short_description, _cut(reason.description), interval)
        for reason in found.dataset_anomaly_info.reason
    ]
    if found.data_missing:
        result.append(Anomaly("(rows)", "There are rows", "none", interval))
    return tuple(result)


def _anomalies(
    schema: Schema, statistics: DatasetFeatureStatisticsList, previous: DatasetFeatureStatisticsList | None
) -> Anomalies:
    before = b"" if previous is None else _dataset(previous)
    serialised = tfdv().ValidateFeatureStatistics(
        _dataset(statistics), schema.SerializeToString(), b"", before, b"", b"", b"", b"", False
    )
    return Anomalies.FromString(serialised)


def _cut(text: str) -> str:
    text = " ".join(text.split()).rstrip(".")
    return text if len(text) <= _LONGEST else text[:_LONGEST] + "…"


def _dataset(statistics: DatasetFeatureStatisticsList) -> bytes:
    (only,) = statistics.datasets
    return only.SerializeToString()


def parse_schema(text: str, path: str = "schema.pbtxt") -> Schema:
    """The schema that a `schema.pbtxt` spells out.

    Raises:
        DefinitionError: the text is not one.
    """
    try:
        return text_format.Parse(text, Schema())
    except text_format.ParseError as error:
        raise DefinitionError(
            f"{path} is a TensorFlow Metadata Schema",
            str(error),
            "Correct it, or write a fresh one with: millrace schema infer --force",
        ) from None


def schema_text(schema: Schema) -> str:
    """The schema as text to keep and review."""
    return HEADER + text_format.MessageToString(schema, as_utf8=True)


HEADER = """\
# What the features of this use case look like; `millrace features` publishes nothing else.
# A TensorFlow Metadata Schema: https://www.tensorflow.org/tfx/data_validation.  Review it like code.
"""


def parse_statistics(content: bytes) -> DatasetFeatureStatisticsList:
    """The `DatasetFeatureStatisticsList` that was serialised.

    Raises:
        ValueError: something else was.
    """
    try:
        found = DatasetFeatureStatisticsList.FromString(content)
    except DecodeError as error:
        raise ValueError(f"no statistics ({error})") from None
    if len(found.datasets) != 1:
        raise ValueError(f"statistics of {len(found.datasets)} datasets")
    return found
