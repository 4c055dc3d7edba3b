"""The sides that `benchmarks/training.py` compares, and their made-up data: rows of 28 numbers and 2 categories."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import polars as pl
import pyarrow as pa

from benchmarks.measure import Figures, stage

if TYPE_CHECKING:
    import xgboost

    from transforms.models.encoders import Fitted
    from transforms.training.examples import ExamplesAccount
    from transforms.training.trainer import Study

NUMBERS, WORDS = 28, ("city", "kind")
ROUNDS, PARAMS = 100, {"max_depth": 6, "eta": 0.1}
DAYS = 100
DEFINITION = f"""
import polars as pl
from schemas import Derived, FeatureView, Gates, Label, Model, Source, TimeSplit, encoders

numbers = [f"x{{i:02}}" for i in range({NUMBERS})]
spine = Source("spine", time="t", columns={{
    "id": pl.Int64, **dict.fromkeys(numbers, pl.Float32), "city": pl.String, "kind": pl.String
}})
outcomes = Source("outcomes", time="at", columns={{"id": pl.Int64, "y": pl.Int8}}, order="id")
view = FeatureView("made_up", spine, key="id", features=[
    Derived(**{{name: pl.col(name) for name in (*numbers, "city", "kind")}})
])
model = Model(
    view, Label(outcomes, on="id", value=pl.col("y") > 0, within="1h"), TimeSplit("10d", "10d", embargo="1d"),
    params={PARAMS!r}, rounds={ROUNDS},
    encode={{"city": encoders.OneHot(), "kind": encoders.Ordinal(), "x00": encoders.Standardize()}},
    gates=Gates(slices=("city",)),
)
"""


def values(rows: int, seed: int) -> dict[str, pl.Series]:
    """Columns and label of some rows; every other column lacks one number in ten."""
    random = np.random.default_rng(seed)
    columns: dict[str, pl.Series] = {}
    for i in range(NUMBERS):
        x = random.standard_normal(rows, dtype=np.float32)
        columns[f"x{i:02}"] = pl.Series(x).set(pl.Series(random.random(rows) < 0.1), None) if i % 2 else pl.Series(x)
    columns["city"] = pl.Series(np.array(["rome", "oslo", "lima", "bern"])[random.integers(0, 4, rows)])
    columns["kind"] = pl.Series(np.array([f"k{i}" for i in range(40)])[random.integers(0, 40, rows)])
    signal = columns["x00"] + columns["x02"] * columns["x04"] + (columns["city"] == "rome").cast(pl.Float32)
    columns["y"] = pl.Series((signal.to_numpy() + random.standard_normal(rows) > 0.5).astype(np.int8))
    return columns


def write_store(folder: Path, rows: int) -> None:
    """Sources, the definition and the computed feature table."""
    from beam_pipelines import features

    start = datetime(2024, 1, 1, tzinfo=UTC)
    step = DAYS * 86_400_000_000 // rows
    frame = pl.DataFrame({"id": np.arange(rows), **values(rows, 1)}).with_columns(
        t=pl.lit(start).dt.cast_time_unit("us") + pl.int_range(pl.len()) * timedelta(microseconds=step)
    )
    for name in ("spine", "outcomes"):
        (folder / "sources" / name).mkdir(parents=True)
    (folder / "definition.py").write_text(DEFINITION)
    spine = frame.drop("y").with_columns(pl.col("t").cast(pl.Datetime("us", "UTC")))
    spine.write_parquet(folder / "sources/spine/part.parquet", row_group_size=100_000)
    frame.select("id", "y", at=(pl.col("t") + timedelta(minutes=5)).cast(pl.Datetime("us", "UTC"))).write_parquet(
        folder / "sources/outcomes/part.parquet", row_group_size=100_000
    )
    if code := features.main(
        ["--definition", str(folder / "definition.py"), "--store", str(folder), "--run_id", "features"]
    ):
        raise SystemExit(code)


def pipeline(store: str, out: str) -> Figures:
    """`millrace training`."""
    from beam_pipelines import training

    run = Path(out).name
    training.main(
        [
            "--definition",
            f"{store}/definition.py",
            "--store",
            store,
            "--run_id",
            run,
            "--registry",
            f"sqlite:///{out}/mlflow.db",
        ]
    )
    report = json.loads((Path(store) / "runs" / run / "training.json").read_text())
    return {"auc": report["metrics"]["auc"], "train": report["splits"]["train"]["entered"]}


def native(store: str, out: str) -> Figures:
    """The same reads, statistics, encodings, example files, training and metrics by hand."""
    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    parts = _labelled(store)
    _write_statistics(parts, folder)
    _write_examples(parts, folder)
    matrix = _encoding(parts["train"])
    booster = _trained(parts, matrix)
    booster.save_model(folder / "model.ubj")
    report = _metrics(parts["test"], booster.inplace_predict(matrix(parts["test"])))
    (folder / "metrics.json").write_text(json.dumps(report))
    return {"auc": report[""]["auc"], "train": len(parts["train"])}


def _labelled(store: str) -> dict[str, pl.DataFrame]:
    """Feature rows with their labels, by split."""
    from deltalake import DeltaTable

    (table,) = (Path(store) / "features" / "made_up").iterdir()
    rows = pl.read_parquet(sorted(DeltaTable(str(table)).file_uris()))
    outcomes = pl.read_parquet(f"{store}/sources/outcomes/part.parquet")
    rows = (
        rows.join(outcomes, on="id")
        .filter(pl.col("at") >= pl.col("t"), pl.col("at") < pl.col("t") + timedelta(hours=1))
        .sort("t")
    )
    rows = rows.with_columns(label=(pl.col("y") > 0).cast(pl.Float32)).drop("y", "at")
    cutoff = rows["t"].dt.date().max() + timedelta(days=1)  # type: ignore[operator]
    end = datetime(cutoff.year, cutoff.month, cutoff.day, tzinfo=UTC)  # type: ignore[union-attr]
    day, hour = timedelta(days=1), timedelta(hours=1)
    t = pl.col("t")
    return {
        "train": rows.filter(t + hour <= end - 22 * day),
        "validate": rows.filter(t >= end - 21 * day, t + hour <= end - 11 * day),
        "test": rows.filter(t >= end - 10 * day, t + hour <= end),
    }


def _write_statistics(parts: Mapping[str, pl.DataFrame], folder: Path) -> None:
    import tensorflow_data_validation as tfdv

    names = [*(f"x{i:02}" for i in range(NUMBERS)), *WORDS]
    for name in ("train", "test"):
        found = tfdv.generate_statistics_from_dataframe(parts[name].select(*names, "label").to_pandas(), n_jobs=1)
        (folder / f"{name}.stats").write_bytes(found.SerializeToString())


def _write_examples(parts: Mapping[str, pl.DataFrame], folder: Path) -> None:
    """Parquet and TFRecord files of each split."""
    import tensorflow as tf
    from tensorflow_metadata.proto.v0 import schema_pb2
    from tfx_bsl.coders.example_coder import RecordBatchToExamplesEncoder

    schema = schema_pb2.Schema()
    for name, dtype in parts["train"].schema.items():
        kind = "BYTES" if dtype == pl.String else "FLOAT" if dtype.is_float() else "INT"
        schema.feature.add(name=name, type=kind, presence={"min_count": 0})
    coder = RecordBatchToExamplesEncoder(schema)
    for name, part in parts.items():
        part.write_parquet(folder / f"{name}.parquet", compression="lz4")
        options = tf.io.TFRecordOptions(compression_type="GZIP", compression_level=1)
        with tf.io.TFRecordWriter(str(folder / f"{name}.tfrecord.gz"), options) as writer:
            for piece in part.iter_slices(100_000):
                for record in coder.encode(_lists(piece)):
                    writer.write(record)


def _encoding(train: pl.DataFrame) -> Callable[[pl.DataFrame], npt.NDArray[np.float32]]:
    """The model's matrix of a split, with encodings fitted on the training split."""
    ranks = {
        name: train[name].value_counts().sort(["count", name], descending=[True, False])[name].to_list()
        for name in WORDS
    }
    mean, deviation = train["x00"].mean(), train["x00"].std(ddof=0)

    def matrix(part: pl.DataFrame) -> npt.NDArray[np.float32]:
        return (
            part.select(
                (pl.col("x00") - mean) / deviation,
                *(f"x{i:02}" for i in range(1, NUMBERS)),
                *((pl.col("city") == each).cast(pl.Float32).alias(each) for each in ranks["city"]),
                pl.col("kind").replace_strict(ranks["kind"], range(len(ranks["kind"])), return_dtype=pl.Float32),
            )
            .cast(pl.Float32)
            .to_numpy()
        )

    return matrix


def _trained(
    parts: Mapping[str, pl.DataFrame], matrix: Callable[[pl.DataFrame], npt.NDArray[np.float32]]
) -> xgboost.Booster:
    import xgboost

    train = xgboost.QuantileDMatrix(matrix(parts["train"]), parts["train"]["label"].to_numpy())
    validate = xgboost.QuantileDMatrix(matrix(parts["validate"]), parts["validate"]["label"].to_numpy(), ref=train)
    return xgboost.train(
        {**PARAMS, "objective": "binary:logistic", "eval_metric": "auc", "seed": 0},
        train,
        ROUNDS,
        evals=[(validate, "v")],
        verbose_eval=False,
    )


def _metrics(test: pl.DataFrame, scores: npt.NDArray[np.float32]) -> dict[str, dict[str, float]]:
    """Metrics of the whole test ("") and by city."""
    from sklearn.metrics import average_precision_score, brier_score_loss, log_loss, roc_auc_score

    measures = {
        "auc": roc_auc_score,
        "average_precision": average_precision_score,
        "log_loss": log_loss,
        "brier": brier_score_loss,
    }
    labels = test["label"].to_numpy()
    report = {"": {name: float(measure(labels, scores)) for name, measure in measures.items()}}
    for (city,), positions in test.with_row_index("row").group_by("city"):
        at = positions["row"].to_numpy()
        report[str(city)] = {name: float(measure(labels[at], scores[at])) for name, measure in measures.items()}
    return report


def _lists(part: pl.DataFrame) -> pa.RecordBatch:
    """The form that the encoder of tf.Example needs: lists of one value, or null."""
    arrays = []
    for column in (
        part.with_columns(pl.col(pl.Datetime, pl.Date).to_physical().cast(pl.Int64)).to_arrow().combine_chunks().columns
    ):
        values = column.combine_chunks()
        values = values.cast(pa.large_binary()) if pa.types.is_large_string(values.type) else values
        valid = values.is_valid().to_numpy(zero_copy_only=False)
        offsets = np.concatenate([[0], np.cumsum(valid)]).astype(np.int64)
        mask = np.append(~valid, False)
        arrays.append(pa.LargeListArray.from_arrays(pa.array(offsets, pa.int64(), mask=mask), values.drop_null()))
    return pa.RecordBatch.from_arrays(arrays, part.columns)


def write_shards(folder: Path, rows: int, shard: int = 250_000) -> None:
    """Example files in the form that training writes, a fifth of them for validation."""
    folder.mkdir(parents=True)
    for i in range(rows // shard):
        columns = values(shard, i)
        columns["__label"] = columns.pop("y").cast(pl.Float32)
        split = "validate" if i % 5 == 4 else "train"
        pl.DataFrame(columns).write_parquet(
            folder / f"{split}-{i:05d}.parquet", compression="lz4", row_group_size=1 << 15
        )


def _study(store: str, shards: str, out: str, cores: int) -> tuple[Study, ExamplesAccount, Fitted]:
    """Study, account and fitted encoders over example files."""
    import pyarrow.parquet as pq

    from schemas import load_definition
    from transforms.training.examples import ExamplesAccount, ExampleShard, read_shard
    from transforms.training.fit_encoders import fit
    from transforms.training.trainer import Study

    model = load_definition(f"{store}/definition.py").require_model()
    files = [
        ExampleShard(path.name.split("-")[0], i, str(path), pq.ParquetFile(path).metadata.num_rows)
        for i, path in enumerate(sorted(Path(shards).iterdir()))
    ]
    account = ExamplesAccount(sum(each.rows for each in files), {}, {}, tuple(files))
    fitted = fit(model, (batch for each in account.of("train") for batch in read_shard(each, tuple(model.inputs))))
    Path(out).mkdir(parents=True, exist_ok=True)
    return Study(model, model.split.resolve(datetime(2024, 4, 10, tzinfo=UTC)), out, cores), account, fitted


def train_ours(store: str, shards: str, out: str, rounds: int = ROUNDS) -> Figures:
    """The Train step over example files."""
    import os

    from transforms.training.hyperparameter_search import Trial
    from transforms.training.trainer import side_by_side

    study, account, fitted = _study(store, shards, out, os.cpu_count() or 1)
    with stage("train"):
        (result,) = side_by_side(study, account, [fitted], [Trial(0, PARAMS, rounds=rounds)])
    if result.error:
        raise SystemExit(result.error)
    return {"auc": result.value}


def train_native(store: str, shards: str, out: str, rounds: int = ROUNDS) -> Figures:
    """XGBoost over the same files, read and encoded with Polars."""
    import xgboost

    _, _, fitted = _study(store, shards, out, 1)
    ranks = {each.input: each.state["categories"] for each in fitted.encodings if each.input in WORDS}
    (standard,) = (each.state for each in fitted.encodings if each.input == "x00")

    def read(split: str) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
        part = pl.read_parquet(f"{shards}/{split}-*.parquet")
        matrix = part.select(
            ((pl.col("x00") - standard["offset"]) / standard["scale"]).cast(pl.Float32),
            *(f"x{i:02}" for i in range(1, NUMBERS)),
            *((pl.col("city") == each).cast(pl.Float32).alias(each) for each in [*ranks["city"], "*"]),
            pl.col("kind").replace_strict(ranks["kind"], range(len(ranks["kind"])), return_dtype=pl.Float32),
        )
        return matrix.to_numpy(), part["__label"].to_numpy()

    with stage("train"):
        learn = xgboost.QuantileDMatrix(*read("train"))
        validate = xgboost.QuantileDMatrix(*read("validate"), ref=learn)
        history: dict[str, dict[str, list[float]]] = {}
        booster = xgboost.train(
            {**PARAMS, "objective": "binary:logistic", "eval_metric": "auc", "seed": 0},
            learn,
            rounds,
            evals=[(validate, "v")],
            evals_result=history,
            verbose_eval=False,
        )
        booster.save_model(f"{out}/model.ubj")
    return {"auc": history["v"]["auc"][-1]}


def search(store: str, shards: str, out: str, side: bool, trials: int = 8) -> Figures:
    """Trials on two cores: side by side, or one after another with both cores each.  The binned rows are shared either
    way."""
    from transforms.training.hyperparameter_search import Trial
    from transforms.training.trainer import TrialRunner, side_by_side

    study, account, fitted = _study(store, shards, out, 2)
    several = [Trial(i, {"max_depth": 4, "eta": 0.05 + i / 50}, rounds=300) for i in range(trials)]
    with stage("train"):
        if side:
            results = side_by_side(study, account, [fitted], several)
        else:
            bench = TrialRunner(study, account, [fitted], 1)
            results = [bench.run(trial) for trial in several]
    return {"auc": max(each.value for each in results)}
