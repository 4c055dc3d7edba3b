"""`millrace schema`: a first schema from a table, where data breaks it, and how it follows data that is right."""

from datetime import date
from pathlib import Path

import polars as pl
import pytest

from beam_pipelines import features
from beam_pipelines.cli import main
from beam_pipelines.commands import schema
from schemas.errors import AnomalyError
from schemas.loading import load_definition
from tests.support import shop
from transforms.sources.tallies import SourceTally
from transforms.storage.delta_tables import newest_version
from transforms.storage.paths import features_uri
from transforms.validation.publish_check import CheckedRun, PublishRules, check_statistics, make_check
from transforms.validation.statistics import describe_batch, statistics_proto, view_columns
from transforms.validation.tfdv_schema import parse_schema


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store with a feature table."""
    store = tmp_path_factory.mktemp("store")
    shop.write(store)
    assert (
        features.main(["--definition", str(store / "definition.py"), "--store", str(store), "--run_id", "first"]) == 0
    )
    return store


@pytest.fixture
def call(store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):  # type: ignore[no-untyped-def]
    """Runs `millrace schema ACTION` on a schema of its own: exit code, output, errors."""
    path = tmp_path / "schema.pbtxt"

    def call(action: str, *flags: str) -> tuple[int, str, str]:
        code = main(
            [
                "schema",
                action,
                "--definition",
                str(store / "definition.py"),
                "--store",
                str(store),
                "--schema",
                str(path),
                *flags,
            ]
        )
        printed = capsys.readouterr()
        return code, printed.out, printed.err

    call.path = path  # type: ignore[attr-defined]
    return call


def stopped(store: Path, path: Path, run_id: str) -> AnomalyError:
    """A run that the schema stopped: it found a shop that was never seen, and much older visitors."""
    definition = load_definition(str(store / "definition.py"))
    table, columns = features_uri(str(store), "buying", definition.view.fingerprint), view_columns(definition.view)
    found = pl.read_delta(table).with_columns(
        shop=pl.when(pl.col("visit") % 50 == 0).then(pl.lit("east")).otherwise("shop"), age=pl.col("age") + 40
    )
    (rows,) = found.select(columns.names).with_columns(pl.col("shop")).to_arrow().combine_chunks().to_batches()
    ranges = ((date(2024, 3, 1), date(2024, 3, 2)),)
    run = CheckedRun(table, newest_version(table), run_id, ranges, "dead", "--definition d --store s")
    check = make_check(PublishRules(str(path)), run)
    with pytest.raises(AnomalyError) as caught:
        check_statistics(
            statistics_proto(describe_batch(rows, columns)), check, {"visits": SourceTally("visits", 1, 1)}
        )
    return caught.value


def test_an_inferred_schema_is_kept_by_the_rows_it_came_from(call) -> None:  # type: ignore[no-untyped-def]
    code, printed, _ = call("infer")
    assert code == 0
    assert "5 columns, drift as between 60 intervals of 1 d.  Review it" in printed
    text = call.path.read_text()
    assert text.startswith("# What the features of this use case look like")
    found = parse_schema(text)
    assert [each.name for each in found.feature] == [
        "shop",
        "age",
        "hour",
        "sales_by_shop_amount_mean_3d",
        "sales_by_shop_amount_count_3d",
    ]
    assert list(found.string_domain[0].value) == ["north", "south", "west"]
    code, printed, _ = call("check")
    assert code == 0
    assert f"keeps {call.path}" in printed


def test_infer_does_not_write_over_a_reviewed_schema(call) -> None:  # type: ignore[no-untyped-def]
    call.path.write_text("# reviewed")
    code, _, printed = call("infer")
    assert code == 2
    assert f"{call.path} exists" in printed
    assert call.path.read_text() == "# reviewed"
    assert call("infer", "--force")[0] == 0
    assert parse_schema(call.path.read_text()).feature


def test_check_names_what_breaks_and_exits_with_7(call) -> None:  # type: ignore[no-untyped-def]
    call("infer")
    call.path.write_text(call.path.read_text().replace('  value: "west"\n', ""))
    code, printed, _ = call("check")
    assert code == 7
    assert "1 anomaly against" in printed
    assert "shop: Unexpected string values: Examples contain values missing from the schema: west" in printed


def test_update_follows_a_stopped_run_and_shows_how(store: Path, call) -> None:  # type: ignore[no-untyped-def]
    call("infer")
    error = stopped(store, call.path, "stopped")
    assert "schema update --definition d --store s --run_id stopped" in str(error)
    assert call("check", "--run_id", "stopped")[0] == 7
    code, printed, _ = call("update", "--run_id", "stopped")
    assert code == 0
    changed = [line for line in printed.splitlines() if line[:1] in "+-" and line[:3] not in ("+++", "---")]
    assert '+  value: "east"' in changed
    assert all("threshold" in line or "east" in line for line in changed)  # and how far the age moved
    assert "east" in parse_schema(call.path.read_text()).string_domain[0].value
    assert call("check", "--run_id", "stopped")[0] == 0
    code, printed, _ = call("update", "--run_id", "stopped")
    assert code == 0
    assert "nothing to change for run stopped, [2024-03-01, 2024-03-03)" in printed


def test_bounds_on_drift_are_looser_between_days_than_between_weeks(call) -> None:  # type: ignore[no-untyped-def]
    bounds = []
    for every in ("1d", "2w"):
        code, printed, _ = call("infer", "--force", "--every", every)
        assert code == 0
        found = {each.name: each.drift_comparator for each in parse_schema(call.path.read_text()).feature}
        bounds.append(found["age"].jensen_shannon_divergence.threshold)
    assert "between 4 intervals of 14 d" in printed  # 60 days hold four whole ones
    assert bounds[0] > bounds[1] >= 0.1


def test_rows_of_an_interval_can_be_meant(call) -> None:  # type: ignore[no-untyped-def]
    assert call("infer", "--start", "2024-01-05", "--end", "2024-01-20")[0] == 0
    code, printed, _ = call("check", "--start", "2024-01-05", "--end", "2024-01-20")
    assert code == 0
    assert "rows of [2024-01-05, 2024-01-20): keeps" in printed


@pytest.mark.parametrize(
    ("action", "flags", "code", "part"),
    [
        ("check", (), 2, "Write a first one: millrace schema infer --definition"),
        (
            "infer",
            ("--start", "2030-01-01"),
            3,
            "must have rows in the interval; there are none. Compute them first: millrace features",
        ),
        ("inferr", (), 2, "Did you mean 'infer'?"),
        ("infer", ("--every", "36h"), 2, "--every must be a number of whole days; it is '36h'"),
        ("infer", ("--forse",), 2, "did you mean --force?"),
        ("infer", ("--runner=Prism",), 2, "unknown flag --runner=Prism"),
    ],
)
def test_mistakes_are_told(call, action: str, flags: tuple[str, ...], code: int, part: str) -> None:  # type: ignore[no-untyped-def]
    found, _, printed = call(action, *flags)
    assert found == code
    assert part in printed
    assert not call.path.exists()


def test_a_run_without_statistics_is_told(call) -> None:  # type: ignore[no-untyped-def]
    call("infer")
    code, _, printed = call("check", "--run_id", "unknown")
    assert code == 4
    assert "statistics must be readable" in printed


def test_the_schema_stands_beside_the_definition_by_default(store: Path) -> None:
    asked = schema.parse("check", ["--definition", str(store / "definition.py"), "--store", str(store)])
    assert asked.schema == str(store / "schema.pbtxt")
