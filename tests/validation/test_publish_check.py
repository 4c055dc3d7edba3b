"""`millrace features` publishes what keeps its schema."""

from pathlib import Path

import polars as pl
import pytest

from beam_pipelines.cli import main
from beam_pipelines.runtime.run_report import read_json
from schemas.loading import load_definition
from tests.support import shop
from transforms.storage.delta_tables import newest_version
from transforms.storage.paths import features_uri
from transforms.validation.publish_check import committed_statistics


@pytest.fixture
def store(tmp_path: Path) -> Path:
    shop.write(tmp_path, rows=600)
    return tmp_path


def run(store: Path, run_id: str, *flags: str) -> int:
    return main(
        ["features", "--definition", str(store / "definition.py"), "--store", str(store), "--run_id", run_id, *flags]
    )


def table(store: Path) -> str:
    return features_uri(str(store), "buying", load_definition(str(store / "definition.py")).view.fingerprint)


def schema(store: Path, action: str, *flags: str) -> int:
    return main(["schema", action, "--definition", str(store / "definition.py"), "--store", str(store), *flags])


def test_a_run_is_stopped_followed_by_the_schema_and_published(store: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(store, "first", "--end", "2024-02-01") == 0
    assert schema(store, "infer") == 0
    path = store / "sources" / "visits" / "part.parquet"
    visits = pl.read_parquet(path)
    new = pl.when(pl.col("asked") >= pl.datetime(2024, 2, 10, time_zone="UTC")).then(pl.lit("east")).otherwise("shop")
    visits.with_columns(new.alias("shop")).write_parquet(path)

    february = ("--start", "2024-02-01", "--end", "2024-03-01")
    assert run(store, "second", *february) == 7
    printed = capsys.readouterr().err
    for part in (
        "[2024-02-01, 2024-03-01)",
        "shop: Unexpected string values",
        "east (~",
        "--allow_anomalies",
        "--run_id second",
    ):
        assert part in printed
    assert newest_version(table(store)) == 0

    assert schema(store, "update", "--run_id", "second") == 0
    assert '+  value: "east"' in capsys.readouterr().out
    assert run(store, "second", *february) == 0
    assert newest_version(table(store)) == 1
    entry = committed_statistics(table(store), 1)[0]
    assert (entry["statistics"], entry["statistics_previous"]) == ("_statistics/second.pb", "first")
    assert schema(store, "check") == 0


def test_anomalies_can_be_allowed(store: Path) -> None:
    assert run(store, "first") == 0
    assert schema(store, "infer") == 0
    text = (store / "schema.pbtxt").read_text()
    (store / "schema.pbtxt").write_text(text.replace('  value: "west"\n', ""))
    assert run(store, "second", "--full") == 7
    assert run(store, "second", "--full", "--allow_anomalies") == 0
    entry = committed_statistics(table(store), newest_version(table(store)))[0]
    assert entry["allow_anomalies"] == "true"
    assert "shop" in entry["anomalies"]


def test_a_source_of_mostly_bad_rows_stops_the_run_and_its_dead_letters_can_be_read(
    store: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = store / "sources" / "visits" / "part.parquet"
    visits = pl.read_parquet(path)
    bad = pl.when(pl.int_range(pl.len()) % 4 == 0).then(float("inf")).otherwise("age").cast(pl.Float32)
    visits.with_columns(bad.alias("age")).write_parquet(path)
    assert run(store, "first", "--max_dead_fraction", "0.1") == 3
    assert "150 of 600 rows of 'visits' were, that is 0.25" in capsys.readouterr().err
    assert newest_version(table(store)) is None
    assert pl.read_delta(str(store / "dead_letters" / "features")).height == 150
    assert run(store, "first", "--max_dead_fraction", "0.25") == 0
    assert read_json(str(store / "runs" / "first" / "run.json"))["set_aside"] == 150
