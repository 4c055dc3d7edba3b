"""The main job on a year of flights: the three pipelines against Polars, XGBoost and Parquet files by hand.

    python -m benchmarks.main_job [--repeats 3] [--json FILE]

Both sides read the same Parquet sources and do their whole work in one process each: features of the year, a model
trained and tested, every row scored.  `benchmarks/flights_native.py` is the hand-written side.  The other side calls
`main(argv)` of the three pipelines one after the other, with their defaults: in addition to what the native side does,
they check every row against its contract, write Delta tables, training examples as Parquet and TFRecord, metrics by
slice, and register the model in MLflow.  First, the outputs of both sides are compared: features, test AUC, scores.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import polars as pl

from benchmarks.measure import Figures, Side, arguments, compare, machine, ratios, raw, say, stage, summary, write_json

# float32 has 24 bits; the sides add in different orders, and may differ in the last bit.
RELATIVE = 1e-6
AUC_APART = 0.003


def main(argv: Sequence[str]) -> int:
    flags = arguments("The three pipelines against the same work done natively, on a year of flights.").parse_args(argv)
    with tempfile.TemporaryDirectory() as temporary:
        folder = flags.keep or Path(temporary)
        sources = folder / "data" / "sources"
        if not sources.exists():
            from examples.flights import data

            data.write(str(folder / "data"))
        inputs = {"sources": str(sources)}
        sides = [
            Side("native", "benchmarks.flights_native:main", inputs),
            Side("pipelines", "benchmarks.main_job:pipelines", inputs),
        ]
        measured, checked = compare(sides, flags.repeats, folder / "runs", check)
    found = ratios(measured, "pipelines", "native")
    say("\n" + summary(measured))
    say("both sides agree: " + ", ".join(f"{name} {value}" for name, value in checked.items()))
    say(
        "pipelines / native (fastest run, median peak): "
        + ", ".join(f"{name} {value:.2f}" for name, value in found.items())
    )
    if flags.json:
        write_json(
            flags.json, {"benchmark": "main_job", **found, **checked, "machine": machine(), "raw": raw(measured)}
        )
    return 0


def pipelines(sources: str, out: str) -> Figures:
    """Features, model and predictions of the year into the store `out`; the test AUC."""
    from beam_pipelines import features, inference, training

    common = ["--definition", "examples.flights.definition", "--store", out]
    with stage("features"):
        _run(features.main, [*common, "--sources", sources, "--run_id", "features"])
    with stage("training"):
        _run(training.main, [*common, "--sources", sources, "--run_id", "training"])
    with stage("inference"):
        _run(inference.main, [*common, "--run_id", "inference"])
    return {"auc": json.loads((Path(out) / "runs" / "training" / "training.json").read_text())["metrics"]["auc"]}


def _run(pipeline: Callable[[Sequence[str]], int], argv: Sequence[str]) -> None:
    if code := pipeline(argv):
        raise SystemExit(code)


def check(outputs: Mapping[str, Path]) -> Figures:
    """Checks that the two sides' warm-up runs agree; returns what was compared.

    Raises:
        SystemExit: they do not agree.
    """
    from examples.flights.definition import model
    from transforms.storage.paths import features_uri, predictions_uri

    native, store = outputs["native"], str(outputs["pipelines"])
    view = model.view
    ours = _table(features_uri(store, view.name, view.fingerprint)).sort("flight_id")
    theirs = pl.read_parquet(native / "features.parquet").sort("flight_id")
    _require(len(ours) == len(theirs), f"{len(ours)} feature rows and {len(theirs)}")
    for name in view.feature_names:
        different = int(_different(ours[name], theirs[name]).sum())
        _require(not different, f"{different} of {len(ours)} values of {name}")
    scores = _table(predictions_uri(store, model.name)).sort("flight_id")["score"]
    others = pl.read_parquet(native / "predictions.parquet").sort("flight_id")["score"]
    _require(len(scores) == len(others), f"{len(scores)} predictions and {len(others)}")
    auc = json.loads((outputs["pipelines"] / "runs" / "training" / "training.json").read_text())["metrics"]["auc"]
    its = json.loads((native / "metrics.json").read_text())["auc"]
    _require(abs(auc - its) < AUC_APART, f"an AUC of {auc:.4f} and one of {its:.4f}")
    return {
        "feature_values": len(ours) * len(view.feature_names),
        "auc": round(auc, 5),
        "auc_native": round(its, 5),
        "mean_score_difference": round(float((scores - others).abs().mean()), 6),  # type: ignore[arg-type]
    }


def _table(uri: str) -> pl.DataFrame:
    from transforms.records.record_batches import frame
    from transforms.storage.delta_tables import data_files, open_table, read_group

    table = open_table(uri)
    assert table is not None, uri
    return frame(read_group(data_files(table)))


def _different(ours: pl.Series, theirs: pl.Series) -> pl.Series:
    """Whether two columns differ by more than rounding, row by row."""
    a, b = ours.cast(pl.Float64), theirs.cast(pl.Float64)
    apart = ((a - b).abs() > RELATIVE * pl.select(pl.max_horizontal(a.abs(), pl.lit(1.0))).to_series()).fill_null(False)
    return (ours.is_null() != theirs.is_null()) | apart


def _require(holds: bool, what: str) -> None:
    if not holds:
        raise SystemExit(f"The two sides did not compute the same: {what}")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
