"""Compares statistics with a reviewed schema: what is expected, what violates it, and the drift between intervals.

TFDV decides; this is the only module that calls it.  Its rules live in one shared library that needs neither TensorFlow
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

# How far a feature may drift between intervals if nothing was measured: Jensen–Shannon divergence of numbers, or
# greatest change of the share of a string, both from 0 to 1.
DRIFT = 0.5
# If drift was measured: this multiple of the greatest, and never less than the least.
MARGIN, LEAST_DRIFT = 1.5, 0.1
# Strings with more distinct values are not categories, and get no domain.
CATEGORIES = 100

_LIBRARY = "tensorflow_data_validation.pywrap.tensorflow_data_validation_extension"
# TFDV's descriptions name every unexpected value; a message names some.
_LONGEST = 300


@dataclasses.dataclass(frozen=True)
class Anomaly:
    """A rule of the schema that the rows of an interval violate.  `feature` is "(rows)" for the rows as a whole."""

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
        if not found:  # the library is somewhere else: import the whole package
            return importlib.import_module(_LIBRARY).validation
        loader = importlib.machinery.ExtensionFileLoader(_LIBRARY, str(found[0]))
        spec = importlib.util.spec_from_file_location(_LIBRARY, found[0], loader=loader)
        assert spec is not None
        library = importlib.util.module_from_spec(spec)
        loader.exec_module(library)
        sys.modules[_LIBRARY] = library  # a later import of TFDV gets this module
    return sys.modules[_LIBRARY].validation


def infer_schema(
    statistics: DatasetFeatureStatisticsList, columns: pa.Schema, pieces: Sequence[DatasetFeatureStatisticsList] = ()
) -> Schema:
    """Infers a schema from statistics.

    Args:
        statistics: `DatasetFeatureStatisticsList`.
        columns: the columns' Arrow types: only booleans are limited to 0 and 1, whatever the values were.
        pieces: statistics of consecutive intervals.  Their distances bound each column's drift; a column that changes
            completely (the weekday, from day to day) gets no bound.
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
    """The schema with the fewest changes by which the statistics satisfy it, bounds on drift from `previous`
    included."""
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
    """The drift of each feature for which the schema has a bound."""
    found = _anomalies(schema, statistics, previous).drift_skew_info
    return {".".join(each.path.step): max(drift.value for drift in each.drift_measurements) for each in found}


def _completed(schema: Schema, columns: pa.Schema, known: set[str]) -> Schema:
    """The schema, in which features that are not `known` lose bounds that are accidental, and get a bound on drift."""
    for feature in schema.feature:
        if feature.name in known:
            continue
        if feature.name in columns.names and not pa.types.is_boolean(columns.field(feature.name).type):
            feature.ClearField("bool_domain")
        _bound(feature).threshold = DRIFT
        if feature.type != BYTES:
            # With buckets of equal width, TFDV's default, one outlier moves all other values into one bucket: a drift
            # of 0.98 although nothing else changed, and of 1.0 for a column that was mostly 0 and is all 0 now.  With
            # quantiles: 0.10 and 0.01.
            feature.drift_comparator.jensen_shannon_divergence.source.type = HistogramSelection.QUANTILES
    return schema


def _bound(feature: Feature) -> InfinityNorm | JensenShannonDivergence:
    drift = feature.drift_comparator
    if drift.HasField("infinity_norm"):  # a user may have chosen it for a number
        return drift.infinity_norm
    return drift.infinity_norm if feature.type == BYTES else drift.jensen_shannon_divergence


def _up(value: float) -> float:
    """Rounds up to the next hundredth."""
    return min(math.ceil(value * 100) / 100, 1.0)


def find_anomalies(
    statistics: DatasetFeatureStatisticsList,
    schema: Schema,
    previous: DatasetFeatureStatisticsList | None = None,
    interval: str = "",
) -> tuple[Anomaly, ...]:
    """Where the statistics violate the schema; bounds on drift are checked against `previous` statistics."""
    found = _anomalies(schema, statistics, previous)
    result = [
        Anomaly(name, reason.short_description, _cut(reason.description), interval)
        for name, info in sorted(found.anomaly_info.items())
        for reason in info.reason
        # Values of a table are single: a feature loses its shape only if rows lack it, which is reported separately.
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
    """Parses the text of a `schema.pbtxt`.

    Raises:
        DefinitionError: the text is not a schema.
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
    """The schema as text, to be stored and reviewed."""
    return HEADER + text_format.MessageToString(schema, as_utf8=True)


HEADER = """\
# What the features of this use case look like; `millrace features` publishes nothing else.
# A TensorFlow Metadata Schema: https://www.tensorflow.org/tfx/data_validation.  Review it like code.
"""


def parse_statistics(content: bytes) -> DatasetFeatureStatisticsList:
    """Parses a serialised `DatasetFeatureStatisticsList`.

    Raises:
        ValueError: the bytes are something else.
    """
    try:
        found = DatasetFeatureStatisticsList.FromString(content)
    except DecodeError as error:
        raise ValueError(f"no statistics ({error})") from None
    if len(found.datasets) != 1:
        raise ValueError(f"statistics of {len(found.datasets)} datasets")
    return found
