"""`millrace tables` and `millrace trace`; and the message of a failed run."""

import re
import shutil
from datetime import date, datetime, timedelta
from pathlib import Path

import polars as pl
import pytest

from beam_pipelines import cli, features, inference, training
from beam_pipelines.commands.tables import tables
from beam_pipelines.commands.trace import trace
from beam_pipelines.runtime.errors import guard, resume_hint
from beam_pipelines.runtime.run_report import Run
from schemas.errors import DataError, DefinitionError, StoreError
from schemas.loading import load_definition
from tests.support import shop
from tests.support.tables import rows_of
from transforms.lineage.trace import describe_tables
from transforms.storage.delta_tables import open_table
from transforms.storage.run_markers import running_runs

Out = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A shop whose features were loaded in two runs, with a model and its predictions."""
    folder = tmp_path_factory.mktemp("store")
    definition = shop.write(folder, 1500)
    flags = ["--definition", str(definition), "--store", str(folder)]
    assert features.main([*flags, "--end", "2024-02-01", "--run_id", "first"]) == 0
    assert features.main([*flags, "--start", "2024-02-01", "--run_id", "second"]) == 0
    assert training.main([*flags, "--run_id", "learn"]) == 0
    assert inference.main([*flags, "--run_id", "score"]) == 0
    return folder


@pytest.fixture
def wide(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "400")


def fingerprint(store: Path) -> str:
    return load_definition(str(store / "definition.py")).view.fingerprint


def test_tables_says_what_there_is(store: Path, capsys: Out, wide: None) -> None:
    assert tables(["--store", str(store)]) == 0
    lines = {line.split()[0]: line.split() for line in capsys.readouterr().out.splitlines()}
    mark = fingerprint(store)
    made = lines[f"features/buying/{mark}"]
    assert made[1:4] == ["1", "2024-01-01–2024-02-29", "1,500"]
    assert {mark, "second"} < set(made)
    assert {"score", mark, "1,500"} < set(lines["predictions/buying"])
    assert lines["dead_letters/features"][2] == "0"
    assert lines["sources/sales"][1] == "Parquet"


def test_tables_counts_what_is_there(store: Path) -> None:
    (made,) = (each for each in describe_tables(str(store)) if each.table.startswith("features/"))
    files = list((store / made.table).rglob("date=*/*.parquet"))
    assert (made.files, made.bytes) == (len(files), sum(path.stat().st_size for path in files))


def test_lines_fit_a_narrow_terminal(store: Path, capsys: Out, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    tables(["--store", str(store)])
    out = capsys.readouterr().out
    assert max(map(len, out.splitlines())) <= 80
    assert "1,500 rows" in out
    assert "1 file" in out.replace("1 files", "!")


def test_an_empty_store_has_no_tables(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="none in"):
        tables(["--store", str(tmp_path)])


def test_a_row_leads_to_its_commit_its_run_and_what_it_could_see(store: Path, capsys: Out, wide: None) -> None:
    all_rows = rows_of(str(store / "features" / "buying" / fingerprint(store)))
    row = all_rows.row(1200, named=True)
    flags = ["--store", str(store), "--definition", str(store / "definition.py")]
    assert trace([*flags, "--key", f"visit={row['visit']}"]) == 0
    out = capsys.readouterr().out
    assert f"row_id {row['row_id']}" in out
    assert "committed as version 1" in out
    assert "by run second" in out
    day = row["asked"].date()
    seen = [day - timedelta(days=i) for i in (3, 2, 1, 0)]
    of_sales = out[out.index("  sales:") :]
    assert re.findall(r"^    (\d{4}-\d\d-\d\d) ", of_sales, re.MULTILINE) == [each.isoformat() for each in seen]
    sales = pl.read_parquet(store / "sources" / "sales" / "part.parquet")
    counts = [int((sales["sold"].dt.date() == each).sum()) for each in seen]
    assert [int(count) for count in re.findall(r"(\d+) rows  digest", of_sales)] == counts
    assert f"{store}/sources/sales/part.parquet  unchanged" in out
    assert f"fingerprint {fingerprint(store)}" in out
    assert "as when it was computed" in out


def test_a_window_without_a_beginning_saw_every_day_before(tmp_path: Path, capsys: Out, wide: None) -> None:
    definition = shop.write(tmp_path, 200, shop.DEFINITION.replace('over="3d"', 'over=("3d", "all")'))
    flags = ["--store", str(tmp_path), "--definition", str(definition)]
    assert features.main([*flags, "--end", "2024-02-01"]) == 0
    assert features.main(flags) == 0
    capsys.readouterr()
    assert trace([*flags, "--key", "visit=150", "--days"]) == 0
    out = capsys.readouterr().out
    asked = (
        pl.read_parquet(tmp_path / "sources" / "visits" / "part.parquet").filter(visit=150)["asked"].dt.date().item()
    )
    sold = pl.read_parquet(tmp_path / "sources" / "sales" / "part.parquet")["sold"].dt.date()
    days = sold.filter(sold <= asked).unique().sort().to_list()
    assert len(days) > 4
    of_sales = out[out.index("  sales:") :]
    assert re.findall(r"^    (\d{4}-\d\d-\d\d) ", of_sales, re.MULTILINE) == [each.isoformat() for each in days]


def test_a_row_computed_from_a_file_that_is_gone_says_so(store: Path, tmp_path: Path, capsys: Out, wide: None) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(store, copy)
    flags = ["--store", str(copy), "--definition", str(copy / "definition.py")]
    sales = copy / "sources" / "sales" / "part.parquet"
    sales.unlink()
    trace([*flags, "--key", "visit=1200"])
    assert f"{sales}  gone" in capsys.readouterr().out


def test_time_chooses_among_rows_of_one_key(tmp_path: Path, capsys: Out, wide: None) -> None:
    definition = shop.write(tmp_path, 200)
    part = tmp_path / "sources" / "visits" / "part.parquet"
    visits = pl.read_parquet(part)
    visits.with_columns(visit=pl.col("visit") % 50).write_parquet(part)
    flags = ["--store", str(tmp_path), "--definition", str(definition)]
    assert features.main(flags) == 0
    capsys.readouterr()
    moments: list[datetime] = visits.filter(pl.col("visit") % 50 == 7)["asked"].sort().to_list()
    trace([*flags, "--key", "visit=7"])
    out = capsys.readouterr().out
    assert out.startswith("4 rows of this key")
    assert f"at {moments[-1].isoformat()}" in out
    trace([*flags, "--key", "visit=7", "--time", moments[1].isoformat()])
    assert f"visit = 7 at {moments[1].isoformat()}" in capsys.readouterr().out
    trace([*flags, "--key", "visit=7", "--time", moments[2].date().isoformat()])
    assert f"at {moments[2].isoformat()}" in capsys.readouterr().out


def test_a_prediction_leads_to_model_run_features_and_sources(store: Path, capsys: Out, wide: None) -> None:
    row = rows_of(str(store / "predictions" / "buying")).row(700, named=True)
    assert trace(["--store", str(store), "--prediction", str(row["prediction_id"])]) == 0
    out = capsys.readouterr().out
    mark = fingerprint(store)
    assert f"version 1 of buying in the registry of the store, {store}/registry/artifacts" in out
    assert "trained by run learn" in out
    assert f"{store}/features/buying/{mark} version 1, fingerprint {mark}" in out
    assert f"from {store}/features/buying/{mark}@1" in out
    assert "definition.py, SHA-256" in out
    assert out.index("labels") < out.index(f"{store}/sources/sales/part.parquet (stamp")
    assert "visits: 1,500 rows, 1 file" in out
    assert (
        trace(
            [
                "--store",
                str(store),
                "--prediction",
                str(row["prediction_id"]),
                "--definition",
                str(store / "definition.py"),
            ]
        )
        == 0
    )
    assert f"row_id {row['row_id']}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "error", "words"),
    [
        (["--key", "visit=99999"], DataError, "visit = 99999: not in version 1"),
        (["--key", "visit=1", "--time", "2024-01-02T03:04:05+00:00"], DataError, "2024-01-02T03:04:05"),
        (["--key", "visit=seven"], DefinitionError, "'visit' is Int64"),
        (["--key", "shop=north"], DefinitionError, "Write --key visit=…"),
        ([], DefinitionError, "--prediction ID"),
        (["--key", "visit=1", "--prediction", "1"], DefinitionError, "--prediction ID"),
        (["--prediction", "12345"], DataError, "12345 not in predictions/buying"),
        (["--key", "visit=1", "--live"], StoreError, "features_live"),
    ],
)
def test_what_cannot_be_traced_is_said(store: Path, flags: list[str], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=re.escape(words)):
        trace(["--store", str(store), "--definition", str(store / "definition.py"), *flags])


def test_a_near_miss_of_a_flag_is_refused(store: Path) -> None:
    with pytest.raises(DefinitionError, match="--prediction"):
        trace(["--store", str(store), "--predicton", "1"])


def test_a_failed_run_says_where_and_how_to_resume(tmp_path: Path, capsys: Out) -> None:
    definition = shop.write(tmp_path, 200)
    spoiled = tmp_path / "sources" / "sales" / "part.parquet"
    whole = spoiled.read_bytes()
    interior = bytearray(whole)
    interior[4:200] = bytes(196)  # pages, not the footer: noticed by a worker
    spoiled.write_bytes(bytes(interior))
    command = ["features", "--definition", str(definition), "--store", str(tmp_path), "--start", "2024-01-05"]
    assert cli.main(command) == 3
    err = capsys.readouterr().err
    assert str(spoiled) in err
    assert f"{tmp_path}/features/buying/" in err
    (line,) = (line for line in err.splitlines() if "to resume" in line)
    again = line.split("millrace ", 1)[1].split()
    assert again[:-1] == [*command, "--run_id"]
    assert running_runs(str(tmp_path)) == [], "a run that ended by a mistake is not at work"
    spoiled.write_bytes(whole)
    assert cli.main(again) == 0
    assert open_table(str(tmp_path / "features" / "buying" / fingerprint(tmp_path))) is not None


def test_the_resume_command_replaces_the_run_id_it_was_given(tmp_path: Path) -> None:
    error = DataError("rule")
    with pytest.raises(DataError), Run("features", "r7", str(tmp_path)):
        raise error
    for argv in (["features", "--run_id", "r7", "--store", "a b"], ["--store", "a b", "--run_id=r7"]):
        assert resume_hint(error, argv).endswith("millrace features --store 'a b' --run_id r7")
    assert resume_hint(DataError("before any run"), ["features"]) == ""


def test_a_defect_shows_its_traceback_and_how_to_resume(tmp_path: Path, capsys: Out) -> None:
    def main(argv: object) -> int:
        with Run("features", "r8", str(tmp_path / "runs" / "r8")):
            raise ZeroDivisionError
        return 0

    assert guard(main)(["features"]) == 70
    err = capsys.readouterr().err
    assert "Traceback" in err
    assert "to resume: millrace features --run_id r8" in err
    assert [each.run_id for each in running_runs(str(tmp_path))] == ["r8"], "its workers may be at work elsewhere"


def test_dates_are_days(store: Path) -> None:
    made = next(each for each in describe_tables(str(store)) if each.table.startswith("predictions/"))
    assert (made.first, made.last) == (date(2024, 1, 1), date(2024, 2, 29))
