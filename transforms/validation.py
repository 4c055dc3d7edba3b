"""Statistics against a reviewed schema: what is expected, what broke it, how far it moved since the interval before.

TFDV decides; this is the only file that knows it.  Its rules live in one shared library that needs neither TensorFlow
nor the rest of the package: loaded by itself it takes 15 ms, where `import tensorflow_data_validation` takes 5 s.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.machinery
import importlib.util
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
from google.protobuf import text_format
from tensorflow_metadata.proto.v0 import anomalies_pb2, schema_pb2, statistics_pb2

from schemas.errors import DefinitionError

# What `infer` allows a feature to move between intervals: Jensen–Shannon divergence (0 … 1) of numbers, greatest change
# of a value's share (0 … 1) of strings.  To be reviewed like everything in the schema.
DRIFT = 0.3
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
def tfdv() -> Any:
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


def infer_schema(statistics: Any, columns: pa.Schema) -> Any:
    """What the statistics look like as a schema, each column's drift bounded by `DRIFT`.

    Args:
        statistics: `DatasetFeatureStatisticsList`.
        columns: the columns' Arrow types: only booleans are limited to 0 and 1, whatever was seen.
    """
    serialised = tfdv().InferSchema(_dataset(statistics), CATEGORIES, True)
    schema = schema_pb2.Schema.FromString(serialised)
    return _completed(schema, columns, {feature.name for feature in schema.feature})


def update_schema(schema: Any, statistics: Any, columns: pa.Schema) -> Any:
    """The schema, changed as little as makes the statistics keep it; new columns as `infer_schema` has them.

    A bound on drift that was passed is not loosened: it compares with an interval that will be another one next time.
    """
    known = {feature.name for feature in schema.feature}
    serialised = tfdv().UpdateSchema(schema.SerializeToString(), _dataset(statistics), CATEGORIES)
    updated = schema_pb2.Schema.FromString(serialised)
    return _completed(updated, columns, {feature.name for feature in updated.feature} - known)


def _completed(schema: Any, columns: pa.Schema, names: set[str]) -> Any:
    for feature in schema.feature:
        if feature.name not in names:
            continue
        if feature.name in columns.names and not pa.types.is_boolean(columns.field(feature.name).type):
            feature.ClearField("bool_domain")
        drift = feature.drift_comparator
        if feature.type == schema_pb2.BYTES:
            drift.infinity_norm.threshold = DRIFT
        else:
            # Over equal widths, TFDV's default, one outlier moves everything else into one bucket: 0.98 where nothing
            # else changed, and 1.0 where a column that was mostly 0 is all 0.  Over quantiles: 0.10 and 0.31.
            drift.jensen_shannon_divergence.threshold = DRIFT
            drift.jensen_shannon_divergence.source.type = schema_pb2.HistogramSelection.QUANTILES
    return schema


def validate(statistics: Any, schema: Any, previous: Any = None, interval: str = "") -> tuple[Anomaly, ...]:
    """Where the statistics break the schema; against `previous` statistics where it bounds drift."""
    serialised = tfdv().ValidateFeatureStatistics(
        _dataset(statistics), schema.SerializeToString(), b"", b"" if previous is None else _dataset(previous),
        b"", b"", b"", b"", False,
    )  # fmt: skip
    found = anomalies_pb2.Anomalies.FromString(serialised)
    result = [
        Anomaly(name, reason.short_description, _cut(reason.description), interval)
        for name, info in sorted(found.anomaly_info.items())
        for reason in info.reason
    ]
    result += [
        Anomaly("(rows)", reason.short_description, _cut(reason.description), interval)
        for reason in found.dataset_anomaly_info.reason
    ]
    if found.data_missing:
        result.append(Anomaly("(rows)", "There are rows", "none", interval))
    return tuple(result)


def _cut(text: str) -> str:
    text = " ".join(text.split()).rstrip(".")
    return text if len(text) <= _LONGEST else text[:_LONGEST] + "…"


def _dataset(statistics: Any) -> bytes:
    (only,) = statistics.datasets
    return only.SerializeToString()


def parse_schema(text: str, path: str = "schema.pbtxt") -> Any:
    """The schema that a `schema.pbtxt` spells out.

    Raises:
        DefinitionError: the text is not one.
    """
    try:
        return text_format.Parse(text, schema_pb2.Schema())
    except text_format.ParseError as error:
        raise DefinitionError(
            f"{path} is a TensorFlow Metadata Schema",
            str(error),
            "Correct it, or write a fresh one with: millrace schema infer --force",
        ) from None


def schema_text(schema: Any) -> str:
    """The schema as text to keep and review."""
    return HEADER + text_format.MessageToString(schema, as_utf8=True)


HEADER = """\
# What the features of this use case look like; `millrace features` publishes nothing else.
# A TensorFlow Metadata Schema: https://www.tensorflow.org/tfx/data_validation.  Review it like code.
"""


def parse_statistics(content: bytes) -> Any:
    """The `DatasetFeatureStatisticsList` that was serialised."""
    return statistics_pb2.DatasetFeatureStatisticsList.FromString(content)
