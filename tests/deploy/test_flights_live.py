"""`./run_local.sh stream`: the line of figures at any width, and a month replayed in one process."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from deploy.flights import live
from deploy.flights.progress_table import ProgressTable
from transforms.records.times import FOREVER

TOLD = {
    "clock": {"schedule": {"settled": 1362873660000000}, "departures": {"settled": 1362870000000000}},
    "state": {"journal": {"rows": 31_250, "bytes": 2_500_000}, "shards": {"rows": 1_200_000, "bytes": 123_400_000}},
}


@pytest.mark.parametrize("width", [80, 120])
def test_the_live_table_fits_its_terminal_and_its_figures_stand_below_their_names(
    width: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    watch: Any = SimpleNamespace(
        computed=range(1_028_456), predicted=dict.fromkeys(range(999)), version_since={"1": 1.0, "12": 2.0}
    )
    table = ProgressTable()
    table({"time": 0, "rows": 0}, {}, 0, SimpleNamespace(computed=(), predicted={}, version_since={}), None, True)
    table({"time": 1362873660000000, "rows": 12_345_678}, TOLD, 1_028_456, watch, 12.34, True)
    table({"time": FOREVER, "rows": 12_345_678}, TOLD, 1_028_456, watch, None, True)
    head, nothing, amid, end = capsys.readouterr().out.splitlines()
    assert max(map(len, (head, nothing, amid, end))) < width
    assert len(head) == len(nothing) == len(end)
    assert amid.split()[:6] == ["03-10", "00:01", "12,345,678", "03-09", "23:00", "1,028,456"]
    assert "12.3" in amid
    assert "v12" in amid
    assert end.split()[0] == "end"
    assert ("held MB" in head) == (width == 120)
    assert ("125.9" in amid and "1,231,250" in amid) == (width == 120)


def test_a_month_in_one_process_is_computed_and_equals_batch(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert live.main(["--embedded", "--features_only", "--month", "2013-02", "--out", str(tmp_path)]) == 0
    (found,) = (tmp_path / "stream").glob("*/run.json")
    figures = json.loads(found.read_text())
    assert figures["mode"] == "replay in one process"
    assert figures["answered"] == figures["questions"] == figures["parity"]["answers_compared"] > 20_000
    assert figures["parity"]["values_differing"] == 0
    assert "live through a replay in one process" in capsys.readouterr().out


@pytest.mark.live
def test_a_month_through_kafka_equals_batch(tmp_path: Path) -> None:
    flags = ["--features_only", "--month", "2013-02", "--seconds", "20", "--out", str(tmp_path)]
    assert live.main(flags) == 0  # it compares every row with batch, and fails if one is missing or differs
    (found,) = (tmp_path / "stream").glob("*/run.json")
    figures = json.loads(found.read_text())
    assert figures["mode"] == "kafka and prism"
    assert figures["answered"] == figures["questions"] > 20_000
