"""Splits by group and by rolling origin; what the run says about its data."""

from __future__ import annotations

import html
from pathlib import Path

import polars as pl
import pyarrow as pa
import pytest
import sklearn.metrics

from beam_pipelines import cli, features, training
from schemas.errors import GateError
from tests.support import shop
from tests.support.training_pipeline_case import account, flags
from transforms.models.bundle import load_bundle
from transforms.validation.tfdv_schema import parse_schema, parse_statistics


@pytest.mark.parametrize(
    "split",
    ['GroupSplit(by="shop", validate=0.3, test=0.3, salt="6")', 'RollingOrigin(3, "10d", "12d", embargo="1d")'],
)
def test_other_splits_train_too(store: Path, split: str) -> None:
    text = shop.DEFINITION.replace('TimeSplit("12d", "12d", embargo="1d")', split)
    text = text.replace("TimeSplit,", "TimeSplit, GroupSplit, RollingOrigin,").replace('"auc": 0.6', '"auc": 0.4')
    (store / "definition.py").write_text(text)
    assert training.main(flags(store, "split")) == 0
    found = account(store, "split")
    parts = {
        name: pl.concat([pl.read_parquet(path) for path in store.glob(f"examples/buying/split/{name}-*.parquet")])
        for name in ("train", "validate", "test")
    }
    assert {name: len(part) for name, part in parts.items()} == {
        name: each["entered"] for name, each in found["splits"].items()
    }
    if "Group" in split:
        shops = [set(part["shop"].unique()) for part in parts.values()]
        assert sum(map(len, shops)) == len(set.union(*shops)) == 3
    else:
        (trial,) = found["trials"]
        assert len(trial["folds"]) == 3
        assert trial["value"] == pytest.approx(sum(trial["folds"]) / 3)


def test_what_is_wrong_with_the_data_is_said(store: Path) -> None:
    assert training.main(flags(store, "champion")) == 0
    first = account(store, "champion")["data"]
    assert first["champion"] is None
    assert first["warnings"] == []
    assert first["skew"]
    derived = 'Derived(age=pl.col("age"), '
    odd = derived + 'one=pl.lit(1), none=pl.lit(None, pl.Float32), told=pl.col("told"), '
    text = shop.DEFINITION.replace(derived, odd).replace('"age": pl.Float32}', '"age": pl.Float32, "told": pl.Boolean}')
    assert text.count("told") == 3
    text = text.replace("min_slice_rows=20", "min_slice_rows=20, max_drift=0.2")
    (store / "definition.py").write_text(text)
    visits, sales = (store / f"sources/{name}/part.parquet" for name in ("visits", "sales"))
    bought = pl.read_parquet(sales)["visit"].to_list()
    changed = pl.read_parquet(visits).with_columns(told=pl.col("visit").is_in(bought), age=pl.col("age") + 30)
    changed.write_parquet(visits)
    assert (
        features.main(["--definition", str(store / "definition.py"), "--store", str(store), "--allow_anomalies"]) == 0
    )
    with pytest.raises(GateError, match=r"drift from the champion's training data ≤ 0\.2: age moved most"):
        training.main(flags(store, "odd"))
    found = account(store, "odd")["data"]
    assert found["champion"] == "1"
    assert found["drift"]["age"] > 0.2 > found["drift"]["shop"]
    texts = " ".join(found["warnings"])
    assert "'told' equals the label" in texts
    assert "'one' has one value" in texts
    assert "'none' is null" in texts
    assert len(found["warnings"]) == 3
    bundle = load_bundle(store / "runs/odd/model")
    assert (
        parse_statistics(bundle.extra["statistics.pb"]).datasets[0].num_examples
        == account(store, "odd")["splits"]["train"]["entered"]
    )
    assert parse_schema(bundle.extra["schema.pbtxt"].decode()).feature


def test_a_category_seen_only_in_test_is_scored_as_unknown_and_named(store: Path) -> None:
    visits = store / "sources/visits/part.parquet"
    rows = pl.read_parquet(visits)
    late = (pl.col("visit") % 10 == 0) & (pl.col("asked") >= pl.datetime(2024, 2, 20, time_zone="UTC"))
    rows.with_columns(shop=pl.when(late).then(pl.lit("east")).otherwise("shop")).write_parquet(visits)
    words = ["--definition", str(store / "definition.py"), "--store", str(store)]
    assert features.main([*words, "--allow_anomalies"]) == 0
    assert training.main(flags(store, "new")) == 0
    (warning,) = account(store, "new")["data"]["warnings"]
    assert "'shop' has values in the test split that the training split never had" in warning
    test = pl.concat([pl.read_parquet(path) for path in store.glob("examples/buying/new/test-*.parquet")])
    east = test.filter(pl.col("shop") == "east")
    assert f"'east' ({len(east)} rows)" in warning
    assert warning in html.unescape((store / "runs/new/report.html").read_text())
    (batch,) = east.to_arrow().combine_chunks().to_batches()
    fitted = load_bundle(store / "runs/new/model").encoders
    typed = pa.schema(
        [pa.field(each.name, pa.string() if each.type == pa.large_string() else each.type) for each in batch.schema]
    )
    (batch,) = pa.Table.from_batches([batch]).cast(typed).to_batches()
    assert (fitted.apply(batch)[:, fitted.names.index("shop=*")] == 1).all()


@pytest.mark.parametrize(
    ("wrong", "warning_text"),
    [(0, "gives the label away: each of its 2 values"), (20, "all but gives the label away: 9")],
)
def test_a_text_that_determines_the_label_is_named(store: Path, wrong: int, warning_text: str) -> None:
    derived = 'Derived(age=pl.col("age"), '
    text = shop.DEFINITION.replace(derived, derived + 'told=pl.col("told"), ')
    text = text.replace('"age": pl.Float32}', '"age": pl.Float32, "told": pl.String}')
    text = text.replace('encode={"shop"', 'encode={"told": encoders.Ordinal(), "shop"')
    (store / "definition.py").write_text(text)
    visits, sales = (store / f"sources/{name}/part.parquet" for name in ("visits", "sales"))
    bought = pl.read_parquet(sales)["visit"].to_list()[wrong:]
    told = pl.when(pl.col("visit").is_in(bought)).then(pl.lit("1")).otherwise(pl.lit("0"))
    pl.read_parquet(visits).with_columns(told=told).write_parquet(visits)
    words = ["--definition", str(store / "definition.py"), "--store", str(store)]
    assert features.main([*words, "--allow_anomalies"]) == 0
    assert training.main(flags(store, "text")) == 0
    (warning,) = account(store, "text")["data"]["warnings"]
    assert warning.startswith(f"Input 'told' {warning_text}")


def test_three_classes_go_through_the_whole_pipeline(store: Path) -> None:
    text = shop.DEFINITION.replace(
        'value=pl.col("amount") > 0', 'value=pl.when(pl.col("amount") > 5).then(2).otherwise(1)'
    )
    text = text.replace("params=", 'objective="multi:softprob", metric="log_loss", early_stopping=4, params=')
    text = text.replace('{"auc": 0.6}', '{"log_loss": 1.05, "accuracy": 0.3}').replace(
        '{"auc": 0.5}', '{"accuracy": 0.9}'
    )
    (store / "definition.py").write_text(text)
    assert cli.main(["training", *flags(store, "classes")]) == 0
    found = account(store, "classes")
    (trial,) = found["trials"]
    assert trial["value"] == min(trial["history"]) < 1.1
    assert [each["class"] for each in found["classes"]] == [0, 1, 2]
    assert sum(map(sum, found["confusion"])) == found["splits"]["test"]["entered"] == found["rows"]
    # Each figure again, by scikit-learn, from the predictions that inference makes of the same rows.
    words = ["--definition", str(store / "definition.py"), "--store", str(store)]
    assert cli.main(["inference", *words, "--run_id", "score"]) == 0
    test = pl.concat([pl.read_parquet(path) for path in store.glob("examples/buying/classes/test-*.parquet")])
    scored = pl.read_delta(str(store / "predictions/buying")).join(test, on="row_id")
    assert len(scored) == len(test)
    scores = scored.select("score_0", "score_1", "score_2").to_numpy().astype(float)
    truth = scored["__label"].to_numpy().astype(int)
    assert found["metrics"]["log_loss"] == pytest.approx(
        sklearn.metrics.log_loss(truth, scores / scores.sum(axis=1, keepdims=True)), rel=1e-6
    )
    assert found["metrics"]["accuracy"] == pytest.approx((scores.argmax(axis=1) == truth).mean())
    area = sklearn.metrics.roc_auc_score(truth, scores / scores.sum(axis=1, keepdims=True), multi_class="ovr")
    assert found["metrics"]["macro_auc"] == pytest.approx(area, rel=1e-6)
    assert "Confusion" in (store / "runs/classes/report.html").read_text()


def test_what_flags_and_params_cannot_mean_is_refused(
    store: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for more, words in {
        "--device=tpu": "'tpu' is not cpu, cuda or cuda:N",
        "--threads=-2": "'-2' is not a whole number from 0 to 1024",
    }.items():
        assert cli.main(["training", *flags(store, "flag"), more]) == 2
        assert words in capsys.readouterr().err
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "-1")
    assert cli.main(["training", *flags(store, "gpu", "--device=cuda")]) == 3
    printed = capsys.readouterr().err
    assert (
        "Trials run on the device that --device names. Got cuda, where XGBoost reports: No visible GPU is found"
        in printed
    )
    assert "Train with --device=cpu, or on workers with such a GPU" in printed
    assert "Traceback" not in printed
    (store / "definition.py").write_text(shop.DEFINITION.replace('"eta"', '"etta"'))
    assert cli.main(["training", *flags(store, "typo")]) == 2
    assert "Got 'etta'. Did you mean 'eta'?" in capsys.readouterr().err
    assert not (store / "registry").exists()


def test_a_regression_of_one_label_is_trained_and_warned_of(store: Path) -> None:
    text = shop.DEFINITION.replace('value=pl.col("amount") > 0', "value=pl.lit(3.5)").replace(
        "absent=0", 'absent="drop"'
    )
    text = text.replace("params=", 'objective="reg:squarederror", metric="rmse", params=')
    text = text.replace('"auc": 0.6', '"rmse": 0.1').replace('"auc": 0.5', '"rmse": 0.1')
    (store / "definition.py").write_text(text)
    assert cli.main(["training", *flags(store, "one")]) == 0
    found = account(store, "one")
    assert found["data"]["warnings"] == ["The label is 3.5 in every training example: there is nothing to learn"]
    assert found["metrics"]["rmse"] < 1e-5
