"""A registered model as MLflow's `python_function`: `mlflow models serve` gives the scores that a batch job gives.

The server must be able to import Millrace: install it there, or put its folder on PYTHONPATH, and use
`--env-manager local`.
"""

from __future__ import annotations

import os
from typing import Any

import pyarrow as pa

from schemas.errors import MismatchError
from schemas.tables import scores
from transforms.models.scoring import PinnedModel, Scorer, open_scorer, score


class PyfuncModel:
    """The object on which MLflow calls `predict` with a pandas frame of raw inputs."""

    def __init__(self, scorer: Scorer) -> None:
        self.scorer = scorer

    def predict(self, rows: Any, params: dict[str, object] | None = None) -> Any:
        """Score rows: a pandas frame of float32 in their order.  An input without a column is null in every row.

        Raises:
            MismatchError: a value does not fit its input's type.
        """
        import pandas as pd

        batch = rows_of(self.scorer, rows)
        names = scores(self.scorer.bundle.classes)
        values = score(self.scorer, batch).reshape(len(rows), len(names))
        return pd.DataFrame({name: values[:, i] for i, name in enumerate(names)})


def rows_of(scorer: Scorer, rows: Any) -> pa.RecordBatch:
    """Convert a pandas frame to a RecordBatch of the model's inputs, in the types of its training."""
    columns, fields = [], []
    for name, kind in scorer.bundle.encoders.inputs.items():
        wanted = _TYPES.get(kind) or pa.type_for_alias(kind)
        try:
            if name not in rows:
                column = pa.nulls(len(rows), wanted)
            else:
                values = rows[name]
                # pandas has whole numbers with gaps as doubles, and values that JSON leaves out as NaN.
                column = pa.array(values.astype(object).where(values.notna(), None).tolist()).cast(wanted)
        except (pa.ArrowInvalid, pa.ArrowTypeError, pa.ArrowNotImplementedError) as error:
            raise MismatchError(f"The input {name!r} is {kind}", str(error).splitlines()[0], "Send it so") from None
        columns.append(column)
        fields.append(pa.field(name, wanted))
    return pa.RecordBatch.from_arrays(columns, schema=pa.schema(fields))


_TYPES = {
    "float": pa.float32(),
    "double": pa.float64(),
    "large_string": pa.large_string(),
    "date32[day]": pa.date32(),
    "timestamp[us, tz=UTC]": pa.timestamp("us", "UTC"),
}


def load_pyfunc(path: str) -> PyfuncModel:
    """MLflow's entry point: open the model in `path` and check its digests."""
    import mlflow

    folder = path if os.path.isdir(path) else os.path.dirname(path)
    metadata = mlflow.models.Model.load(os.path.join(folder, "MLmodel")).metadata or {}
    return PyfuncModel(open_scorer(PinnedModel(folder, digest=metadata.get("manifest_sha256"))))
