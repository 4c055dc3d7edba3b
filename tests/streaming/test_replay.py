"""Files replayed through the whole live graph, in this process, against the batch pipeline over the same files."""

from __future__ import annotations

import itertools
from datetime import UTC, datetime, timedelta
from pathlib import Path
from random import Random
from typing import Any

import polars as pl
import pytest

from beam_pipelines import features, features_streaming
from beam_pipelines.commands import parity
from beam_pipelines.runtime.errors import guard
from schemas import DefinitionError, FeatureView, load_definition
from schemas.live import live_sources
from tests.support import market
from tests.support.tables import figures_of, rows_of
from transforms.storage.delta_tables import data_files, open_table
from transforms.storage.paths import features_live_uri, live_dead_letters_uri
from transforms.streaming.live_tables import UnknownIds
from transforms.streaming.messages import decode, from_arrow
from transforms.streaming.replay import Replay, chunks

DAYS = 4


def feature_rows(view: FeatureView, store: Path) -> pl.DataFrame:
    return rows_of(features_live_uri(str(store), view.name, view.fingerprint))


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """The definition's file, and a folder that holds the market's sources, good rows and bad."""
    folder = tmp_path_factory.mktemp("market")
    market.write(folder, market.spoiled(market.sources()))
    return str(market.define(folder)), folder


def replayed(case: tuple[str, Path], store: Path, run_id: str, *flags: str) -> pl.DataFrame:
    definition, folder = case
    argv = [
        "--streaming",
        "--definition",
        definition,
        "--store",
        str(store),
        "--sources",
        str(folder / "sources"),
        "--run_id",
        run_id,
        *flags,
    ]
    assert features_streaming.main(argv) == 0
    return feature_rows(load_definition(definition).view, store)


def test_a_replay_in_order_gives_the_very_table_of_the_batch_pipeline(case: tuple[str, Path], tmp_path: Path) -> None:
    definition, folder = case
    view = load_definition(definition).view
    found = replayed(case, tmp_path, "first", "--chunk", "3h")
    features.main(["--definition", definition, "--store", str(folder), "--run_id", "batch"])
    batch = rows_of(figures_of(folder, "batch")["table"])
    columns = [name for name in view.output_schema.names if name != "date"]
    assert found.select(columns).sort("row_id").equals(batch.select(columns).sort("row_id"))
    counts = figures_of(tmp_path, "first")["counts"]
    for name in ("visits", "sales", "stock"):
        assert counts[name].get("dead", 0) + counts[name].get("conflicting", 0) == market.SET_ASIDE[name]
        assert counts[name].get("repeated", 0) == market.REPEATED[name]
    dead_letters = rows_of(live_dead_letters_uri(str(tmp_path), view.name))
    assert len(dead_letters) == sum(market.SET_ASIDE.values())  # a dimension's too
    # Every row is accepted, or a dead letter since its time is not plausible; some are both, once each.
    places = ["source", "partition", "offset", "place"]
    assert not dead_letters.filter(pl.col("partition") >= 0).select(places).is_duplicated().any()
    for name, frame in market.spoiled(market.sources()).items():
        if name != "shops":
            kept = open_table(str(tmp_path / "sources" / name))
            assert kept is not None
            accepted = sum(file.rows for file in data_files(kept))
            assert accepted == counts[name]["rows"]
            implausible = dead_letters.filter(pl.col("source") == name, pl.col("field") == market.TIMES[name])
            assert accepted + len(implausible) == len(frame)
            assert counts[name]["dead"] - counts[name].get("rejected", 0) == len(implausible)
    assert parity.main(["--definition", definition, "--store", str(tmp_path), "--run_id", "parity"]) == 0
    found_out = figures_of(tmp_path, "parity")
    assert found_out["answers_later_arrivals_change"] == 0
    full = found_out["full_batch"]  # the table beside the sources that were replayed
    assert full["batch"].startswith(figures_of(folder, "batch")["table"])
    assert full["answers_compared"] == len(found)
    assert full["values_differing"] == full["unexplained"] == 0
    assert full["answers_that_batch_lacks"] == full["rows_without_an_answer"] == {}


LOOKED_UP = """
import polars as pl
from schemas import Derived, FeatureView, Latest, Lookup, Source, Trailing

visits = Source("visits", time="at", columns={"visit": pl.Int64, "shop": pl.String})
sales = Source("sales", time="at", lateness="1m", columns={"region": pl.Int32, "band": pl.Int64, "price": pl.Float64})
shops = Source("shops", columns={"shop": pl.String, "region": pl.Int32})
regions = Source("regions", columns={"region": pl.Int32, "size": pl.Int64})
view = FeatureView("vw", spine=visits, key="visit", features=[
    Lookup(shops, by="shop", columns="region"),
    Lookup(regions, by={"shops_region": "region"}, columns="size"),
    Derived(band=pl.col("regions_size") % 3),
    Trailing(sales, by={"shops_region": "region"}, over=("1h", "all"), stats={"price": ("mean", "count")}),
    Latest(sales, by={"shops_region": "region", "band": "band"}, columns="price", max_age="3h", name="last"),
])
"""


@pytest.mark.parametrize("shards", ["1", "3"])
def test_keys_from_a_lookup_give_the_table_of_the_batch_pipeline(tmp_path: Path, shards: str) -> None:
    random, folder = Random(7), tmp_path / "batch"
    definition = tmp_path / "definition.py"
    definition.write_text(LOOKED_UP)
    start = datetime(2024, 1, 1, tzinfo=UTC)
    names = [f"s{number}" for number in range(9)]
    moments = [start + timedelta(seconds=random.randrange(2 * 86_400)) for _ in range(900)]
    tables = {
        "visits": {
            "at": moments[:300],
            "visit": range(300),
            "shop": [random.choice([*names, None]) for _ in range(300)],
        },
        "sales": {
            "at": moments[300:],
            "region": [random.randrange(5) for _ in range(600)],
            "band": [random.randrange(3) for _ in range(600)],
            "price": [random.randrange(10**5) / 100 for _ in range(600)],
        },
        "shops": {"shop": names[:8], "region": [random.randrange(6) for _ in range(8)]},
        "regions": {"region": range(5), "size": [random.randrange(100) for _ in range(5)]},
    }
    view = load_definition(str(definition)).view
    for name, rows in tables.items():
        (folder / "sources" / name).mkdir(parents=True)
        source = view.sources.get(name, view.spine)
        pl.DataFrame(rows, schema=source.schema).write_parquet(folder / "sources" / name / "a.parquet")
    found = replayed((str(definition), folder), tmp_path / "live", "first", "--chunk", "1h", "--shards", shards)
    assert features.main(["--definition", str(definition), "--store", str(folder), "--run_id", "batch"]) == 0
    batch = rows_of(figures_of(folder, "batch")["table"])
    columns = [name for name in view.output_schema.names if name != "date"]
    assert found.select(columns).sort("row_id").equals(batch.select(columns).sort("row_id"))
    assert batch.select(pl.col(list(view.columns)).drop_nulls().n_unique() > 1).row(0) == (True,) * len(view.columns)
    assert parity.main(["--definition", str(definition), "--store", str(tmp_path / "live"), "--run_id", "parity"]) == 0
    assert figures_of(tmp_path / "live", "parity")["full_batch"]["values_differing"] == 0


def test_disorder_changes_feature_rows_but_not_parity(case: tuple[str, Path], tmp_path: Path) -> None:
    flags = ("--disorder", "9h", "--keep", "12h", "--chunk", "2h", "--partitions", "1", "--shards", "3", "--seed", "5")
    found = replayed(case, tmp_path, "wild", *flags)
    assert found["__late"].any()
    assert found["row_id"].n_unique() == len(found)
    assert parity.main(["--definition", case[0], "--store", str(tmp_path), "--run_id", "parity"]) == 0
    seen = figures_of(tmp_path, "parity")
    assert seen["values_differing"] == 0
    assert seen["answers_compared"] == len(found)
    assert seen["answers_later_arrivals_change"] > 0
    assert seen["full_batch"]["values_differing"] > 0
    assert set(seen["full_batch"]["causes"]) == {"late row"}
    again = replayed(case, tmp_path, "again", *flags)  # what is in is not written twice
    assert again.sort("row_id").equals(found.sort("row_id"))


def test_a_replay_that_loses_a_feature_row_ends_with_exit_code_5(
    case: tuple[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fresh = UnknownIds.__call__
    monkeypatch.setattr(UnknownIds, "__call__", lambda self, table, frame: fresh(self, table, frame)[1:])
    argv = ["--streaming", "--definition", case[0], "--store", str(tmp_path), "--sources", str(case[1] / "sources")]
    assert guard(features_streaming.main)([*argv, "--run_id", "lossy", "--chunk", "1d", "--end", "2024-03-03"]) == 5
    assert figures_of(tmp_path, "lossy")["questions_unaccounted_for"] >= 1
    assert "are none of these" in capsys.readouterr().err


def test_json_and_arrow_messages_hold_the_same(case: tuple[str, Path], tmp_path: Path) -> None:
    view = load_definition(case[0]).view
    market.write(tmp_path, market.sources(60))  # good rows: JSON has no infinity
    sources = live_sources(view)

    def rows(form: str) -> list[tuple[Any, ...]]:
        found = []
        for messages in chunks([view], Replay(str(tmp_path / "sources"), partitions=1, format=form, rows=1)):
            for message in messages:
                held = decode(sources[message.topic], [message])
                found.append(
                    (
                        message.topic,
                        message.offset,
                        message.timestamp,
                        held.rows.drop("__place").rows(),
                        held.dead_letters["rule"].to_list(),
                    )
                )
        return found

    assert len(rows("arrow")) > 250
    assert rows("arrow") == rows("json")


def test_the_same_seed_gives_the_same_messages_and_offsets_have_no_holes(case: tuple[str, Path]) -> None:
    view = load_definition(case[0]).view
    replay = Replay(str(case[1] / "sources"), partitions=3, disorder=10**10, seed=4, rows=7)
    first, second = (list(chunks([view], replay)) for _ in range(2))
    assert first == second
    offsets: dict[tuple[str, int], list[int]] = {}
    for message in (message for chunk in first for message in chunk):
        offsets.setdefault((message.topic, message.partition), []).append(message.offset)
    assert all(each == list(range(len(each))) for each in offsets.values())
    stamps = [[message.timestamp for message in chunk] for chunk in first[:-1]]
    assert all(chunk == sorted(chunk) for chunk in stamps)
    assert all(a[-1] // replay.chunk < b[0] // replay.chunk for a, b in itertools.pairwise(stamps) if a and b)
    assert any(from_arrow(message.value).num_rows > 1 for message in first[5])


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ([], "from another folder than the one that it writes to"),
        (["--source", "kafka"], "--source kafka needs a broker"),
        (["--sources", "/elsewhere", "--sink", "topic"], "--sink topic needs a broker"),
        (["--sources", "/elsewhere", "--pase", "1s"], "--pace"),
        (["--sources", "/elsewhere", "--keep", "soon"], "whole number and a unit"),
    ],
)
def test_flags_that_make_no_sense_are_refused(
    case: tuple[str, Path], tmp_path: Path, flags: list[str], words: str
) -> None:
    with pytest.raises(DefinitionError, match=words):
        features_streaming.parse(["--streaming", "--definition", case[0], "--store", str(tmp_path), *flags])
