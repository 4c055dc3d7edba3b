"""`millrace trace` of live feature rows and predictions: back to the spine row, to what the feature row could see, and
to the model."""

from __future__ import annotations

import os
import re
from datetime import timedelta
from pathlib import Path

import polars as pl
import pytest
from mlflow import MlflowClient

from beam_pipelines.commands.tables import tables
from beam_pipelines.commands.trace import trace
from schemas.errors import DataError
from tests.support.live_dimensions_case import SHOPS, computed_one
from tests.support.live_inference_case import House
from tests.support.live_turns import read, view
from transforms.lineage.live_trace import dimensions_used, visible_to
from transforms.models.registry import registry_uri
from transforms.storage.paths import features_live_uri, sources_root
from transforms.streaming.row_origin import cut_of

Out = pytest.CaptureFixture[str]


@pytest.fixture
def traced(house: House, built: House, monkeypatch: pytest.MonkeyPatch) -> House:
    """The store with the sources that its feature rows saw."""
    os.symlink(built.store / "sources", house.store / "sources")
    monkeypatch.setenv("COLUMNS", "400")
    return house


def answer_of(house: House, number: int) -> dict[str, object]:
    return pl.DataFrame(pl.from_arrow(house.feature_rows())).filter(id=number).row(0, named=True)


def visible(house: House, row: dict[str, object]) -> dict[str, int]:
    """Rows per day in the feature row's windows over sales, found by the slow way."""
    cut, at = cut_of(str(row["__cut"])), row["asked_at"]
    sales = read(f"{sources_root(str(house.store))}/sales")
    seen = [
        each["sold_at"]
        for each in sales.iter_rows(named=True)
        if each["__offset"] < cut["sales", each["__partition"]] and at - timedelta(days=1) <= each["sold_at"] < at  # type: ignore[operator]
    ]
    return {f"{day}": sum(each.date() == day for each in seen) for day in sorted({each.date() for each in seen})}


def days_in(out: str) -> dict[str, int]:
    found = re.findall(r"^    (\d{4}-\d\d-\d\d) +([\d,]+) rows$", out[out.index("  sales, offsets") :], re.MULTILINE)
    return {day: int(count.replace(",", "")) for day, count in found}


def test_a_live_answer_leads_to_its_question_and_what_it_could_see(traced: House, capsys: Out) -> None:
    row = answer_of(traced, 1700)
    flags = ["--store", str(traced.store), "--definition", traced.definition, "--live"]
    capsys.readouterr()
    assert trace([*flags, "--key", "id=1700"]) == 0
    out = capsys.readouterr().out
    assert f"row_id {row['row_id']}" in out
    assert "committed as version 0" in out
    assert "by run live" in out
    assert (
        f"orders: partition {row['__partition']}, offset {row['__offset']}, row {row['__place']} of the message" in out
    )
    expected = visible(traced, row)
    assert len(expected) == 2
    assert days_in(out) == expected
    for (source, partition), offset in cut_of(str(row["__cut"])).items():
        assert re.search(rf"  {source}, offsets before [^(]*{partition}: {offset}\b", out)
    assert f"{traced.store}/sources/sales)" in out


def test_a_live_prediction_leads_to_its_model_its_answer_and_its_sources(traced: House, capsys: Out) -> None:
    assert traced.run("--run_id", "scores") == 0
    row = traced.predictions.filter(id=1700).row(0, named=True)
    capsys.readouterr()
    flags = ["--store", str(traced.store), "--prediction", str(row["prediction_id"])]
    assert trace([*flags, "--definition", traced.definition]) == 0
    out = capsys.readouterr().out
    assert out.startswith(f"prediction {row['prediction_id']} of orders, live\n")
    assert f"{traced.store}/predictions_live/orders version" in out
    assert "by run scores" in out
    assert "version 1 of orders in the registry of the store" in out
    assert "trained by run" in out
    assert f"of the feature row at orders.features: partition 0, offset {row['__offset']}" in out
    assert f"row_id {row['row_id']}" in out
    assert days_in(out) == visible(traced, answer_of(traced, 1700))
    assert trace([*flags, "--live"]) == 0
    assert "version 1 of orders" in capsys.readouterr().out
    assert tables(["--store", str(traced.store)]) == 0
    assert re.search(r"^predictions_live/orders .* 2,400 ", capsys.readouterr().out, re.MULTILINE)
    with pytest.raises(DataError, match="12345 is not in predictions_live/orders"):
        trace(["--store", str(traced.store), "--prediction", "12345"])
    os.remove(traced.store / "sources")
    (traced.store / "features_live").rename(traced.store / "elsewhere")
    assert trace([*flags, "--definition", traced.definition]) == 0
    assert "it is not in the live feature table of this store and definition" in capsys.readouterr().out


def test_a_prediction_of_another_alias_is_found_in_its_own_table(traced: House, capsys: Out) -> None:
    client = MlflowClient(registry_uri(str(traced.store)))
    client.set_registered_model_alias("orders", "challenger", "2")
    assert traced.run("--run_id", "other", "--alias", "challenger") == 0
    client.delete_registered_model_alias("orders", "challenger")  # the registry is shared
    row = traced.table("predictions_live", "orders.challenger").row(0, named=True)
    capsys.readouterr()
    flags = ["--store", str(traced.store), "--prediction", str(row["prediction_id"]), "--definition", traced.definition]
    assert trace(flags) == 0
    assert "version 2 of orders in the registry" in capsys.readouterr().out


def test_an_answer_names_the_dimensions_that_it_looked_up(tmp_path: Path) -> None:
    path = tmp_path / "in" / "shops" / "s.parquet"
    path.parent.mkdir(parents=True)
    SHOPS.cast({"size": view.dimensions["shops"].schema["size"]}).write_parquet(path)
    computed_one(tmp_path, 1, "a").commit()
    row = read(features_live_uri(str(tmp_path), view.name, view.fingerprint)).row(0, named=True)
    (looked,) = dimensions_used(str(tmp_path), row)
    assert looked.path is not None
    assert pl.read_ipc(looked.path)["k"].to_list() == ["a", "b"]
    Path(looked.path).unlink()
    assert dimensions_used(str(tmp_path), row)[0].path is None
    seen = {each.source: each for each in visible_to(view, str(tmp_path), row)}
    assert list(seen) == ["questions", "events", "sales", "placed"]
    assert seen["questions"].cut == {0: 12, 1: 12}
    assert seen["events"].table is None
