"""Windows over all history keep one row per key, and give the very bits that all of history would."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path

import polars as pl
import pytest

from tests.support import market
from tests.support.features_runs import days, feature_rows, run
from tests.support.lifetime_case import definition, same


def sources(rows: int = 80) -> dict[str, pl.DataFrame]:
    frames = market.sources(rows)
    return {name: frames[name] for name in ("visits", "sales")}


def long(store: Path, frames: dict[str, pl.DataFrame]) -> pl.DataFrame:
    """The same features over windows that are only longer than the data, by their lifetime names."""
    market.write(store, frames)
    market.define(store, definition("3650d", "3650d"))
    run(store)
    found = feature_rows(store)
    return found.rename({name: name.replace("_3650d", "_all") for name in found.columns})


@pytest.mark.parametrize("flags", [(), ("--block_rows", "60"), ("--block_rows", "60", "--plan", "shuffle")])
def test_a_lifetime_is_a_window_longer_than_the_data(tmp_path: Path, flags: tuple[str, ...]) -> None:
    frames = market.spoiled(market.sources(80))
    frames = {name: frames[name] for name in ("visits", "sales")}
    market.write(tmp_path / "a", frames, files=2, shuffle=4 if "shuffle" in flags else None)
    market.define(tmp_path / "a", definition("all", "forever"))
    run(tmp_path / "a", *flags)
    same(feature_rows(tmp_path / "a"), long(tmp_path / "b", frames))


def test_day_by_day_each_starts_from_the_summary_of_the_days_before(tmp_path: Path) -> None:
    frames = sources()
    market.write(tmp_path / "a", frames)
    market.define(tmp_path / "a", definition("all", "forever"))
    for day in days()[:-1]:
        run(tmp_path / "a", "--start", str(day), "--end", str(day + timedelta(days=1)))
    same(feature_rows(tmp_path / "a"), long(tmp_path / "b", frames))


def test_a_late_event_reaches_every_feature_row_after_it(tmp_path: Path) -> None:
    frames = sources()
    market.define(tmp_path / "a", definition("all", "forever"))
    late = pl.col("sale") == frames["sales"].filter(pl.col("sold") < market.at(2))["sale"][-1]
    market.write(tmp_path / "a", {**frames, "sales": frames["sales"].filter(~late)})
    run(tmp_path / "a")
    market.write(tmp_path / "a", frames)
    run(tmp_path / "a")
    same(feature_rows(tmp_path / "a"), long(tmp_path / "b", frames))


def test_new_days_go_on_from_the_last_summary(tmp_path: Path) -> None:
    frames = sources()
    market.define(tmp_path / "a", definition("all", "forever"))
    market.write(
        tmp_path / "a",
        {name: frame.filter(pl.col(market.TIMES[name]) < market.at(3)) for name, frame in frames.items()},
    )
    run(tmp_path / "a")
    market.write(tmp_path / "a", frames)
    figures = run(tmp_path / "a")
    assert figures["first"] == str(days()[3])
    same(feature_rows(tmp_path / "a"), long(tmp_path / "b", frames))


def test_a_key_may_be_called_as_a_summary_calls_its_last_rows(tmp_path: Path) -> None:
    frames = sources()
    for name, (window, age) in {"a": ("all", "forever"), "b": ("3650d", "3650d")}.items():
        text = definition(window, age).replace('"city": pl.Int32', '"latest": pl.Int32').replace('"city"', '"latest"')
        market.write(tmp_path / name, {source: frame.rename({"city": "latest"}) for source, frame in frames.items()})
        market.define(tmp_path / name, text)
        run(tmp_path / name)
    expected = feature_rows(tmp_path / "b")
    same(
        feature_rows(tmp_path / "a"),
        expected.rename({each: each.replace("_3650d", "_all") for each in expected.columns}),
    )
