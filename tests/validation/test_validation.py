"""Nothing is published that breaks the reviewed schema, and the message says what, where and what to do."""

import dataclasses
import itertools
import json
from collections.abc import Callable
from datetime import date, timedelta
from pathlib import Path

import apache_beam as beam
import numpy as np
import polars as pl
import pyarrow as pa
import pytest
from apache_beam.pvalue import AsSingleton

from beam_pipelines.runtime.run_report import execute
from schemas.errors import AnomalyError, ContractError, DefinitionError
from transforms.sources.tallies import SourceTally
from transforms.storage.delta_tables import CommitTarget, Committed, newest_version
from transforms.storage.table_transforms import CommitFiles, WriteFiles
from transforms.validation.publish_check import (
    AlsoChecked,
    CheckedRun,
    PublishCheck,
    PublishRules,
    Validate,
    check_dead,
    committed_statistics,
    make_check,
    previous_statistics,
    read_account,
    read_statistics,
    statistics_path,
)
from transforms.validation.statistics import Statistics, columns_described, describe_batch, statistics_proto
from transforms.validation.tfdv_schema import (
    find_anomalies,
    infer_schema,
    measure_drift,
    parse_schema,
    schema_text,
    tfdv,
    update_schema,
)

SCHEMA = pa.schema(
    [
        ("delay", pa.float32()),
        ("full", pa.float32()),
        ("hour", pa.int64()),
        ("late", pa.bool_()),
        ("carrier", pa.string()),
        ("date", pa.date32()),
    ]
)
COLUMNS = columns_described(SCHEMA, SCHEMA.names)
DAY = date(2013, 3, 1)


def rows(seed: int = 0, day: date = DAY, **changed: object) -> pa.RecordBatch:
    """A thousand feature rows of one day."""
    rng, n = np.random.default_rng(seed), 1000
    columns = {
        "delay": pa.array(rng.exponential(12, n).astype(np.float32), mask=rng.random(n) < 0.1),
        "full": pa.array(rng.normal(size=n).astype(np.float32)),
        "hour": pa.array(rng.integers(5, 23, n)),
        "late": pa.array(rng.random(n) < 0.4),
        "carrier": pa.array(rng.choice(["AA", "B6", "UA"], n)),
        "date": pa.array([day] * n, pa.date32()),
        **changed,
    }
    return pa.RecordBatch.from_pydict({name: value for name, value in columns.items() if value is not None})


def statistics(batch: pa.RecordBatch) -> object:
    return statistics_proto(describe_batch(batch, columns_described(batch.schema, batch.schema.names)))


USUAL = statistics(rows())
REVIEWED = infer_schema(USUAL, COLUMNS)


def texts(batch: pa.RecordBatch, schema: object = REVIEWED, previous: object = USUAL) -> list[str]:
    return [str(each) for each in find_anomalies(statistics(batch), schema, previous, "[2013-03-01, 2013-03-02)")]


def test_rows_like_those_before_keep_the_schema() -> None:
    assert texts(rows(seed=1)) == []


@pytest.mark.parametrize(
    ("changed", "printed"),
    [
        (
            {"carrier": pa.array(["AA", "B6", "UA", "XX"] * 250)},
            "carrier: Unexpected string values: Examples contain values missing from the schema: XX (~25%)",
        ),
        (
            {"full": pa.array([None, *[0.5] * 999], pa.float32())},
            "full: Column dropped: The feature was present in fewer examples than expected: "
            "minimum fraction = 1.000000, actual = 0.999000",
        ),
        ({"delay": pa.nulls(1000, pa.float32())}, "delay: Column dropped: The feature was not present in any examples"),
        ({"hour": None}, "hour: Column dropped: Column is completely missing"),
        ({"hour": pa.array(np.zeros(1000))}, "hour: Unexpected data type: Expected data of type: INT but got FLOAT"),
        ({"wind": pa.array(np.zeros(1000))}, "wind: New column: New column (column in data but not in schema)"),
    ],
)
def test_what_breaks_the_schema_is_named(changed: dict[str, object], printed: str) -> None:
    assert printed in texts(rows(seed=1, **changed))


def test_a_bound_written_by_hand_is_kept() -> None:
    schema = parse_schema(
        schema_text(REVIEWED).replace('name: "delay"\n', 'name: "delay"\n  float_domain { min: 0 max: 50 }\n', 1)
    )
    (printed,) = texts(rows(seed=1), schema)
    assert printed.startswith("delay: Out-of-range values: Unexpectedly high value")


def test_rows_that_are_not_there_are_an_anomaly() -> None:
    assert texts(rows().slice(0, 0)) == ["(rows): There are rows: none"]


@pytest.mark.parametrize(
    ("changed", "feature"),
    [
        ({"delay": pa.array(np.random.default_rng(3).exponential(12, 1000) + 30, pa.float32())}, "delay"),
        ({"hour": pa.array(np.full(1000, 6))}, "hour"),
        ({"carrier": pa.array(["AA"] * 900 + ["B6"] * 100)}, "carrier"),
    ],
)
def test_drift_is_detected(changed: dict[str, object], feature: str) -> None:
    (found,) = find_anomalies(statistics(rows(seed=1, **changed)), REVIEWED, USUAL, "[2013-03-01, 2013-03-02)")
    assert found.feature == feature
    assert ("Linfty" if feature == "carrier" else "Jensen-Shannon") in found.rule
    assert "above the threshold 0.5" in found.value
    assert found.interval == "[2013-03-01, 2013-03-02)"
    assert texts(rows(seed=1, **changed), previous=None) == []  # nothing to drift from


@pytest.mark.parametrize(
    "delay",
    [
        np.append(np.random.default_rng(3).exponential(12, 999), 1e6),  # one outlier
        np.random.default_rng(3).exponential(15, 1000),  # a quarter more
    ],
)
def test_small_changes_are_no_drift(delay: object) -> None:
    assert texts(rows(seed=1, delay=pa.array(delay, pa.float32()))) == []


def test_a_column_mostly_zero_may_be_all_zero() -> None:
    before = statistics(rows(full=pa.array(np.arange(1000) % 50 == 0, pa.uint8()).cast(pa.float32())))
    assert texts(rows(full=pa.array(np.zeros(1000), pa.float32())), previous=before) == []


def test_an_inferred_schema_leaves_integers_free_and_binds_booleans() -> None:
    schema = infer_schema(statistics(rows(hour=pa.array([0, 1] * 500))), COLUMNS)
    assert [each.name for each in schema.feature if each.HasField("bool_domain")] == ["late"]


def test_update_changes_what_must_and_keeps_the_rest() -> None:
    schema = parse_schema(schema_text(REVIEWED).replace("threshold: 0.5", "threshold: 0.7"))
    now = statistics(rows(carrier=pa.array(["AA", "XX"] * 500), wind=pa.array(np.zeros(1000))))
    after = update_schema(schema, now, COLUMNS)
    assert list(after.string_domain[0].value) == ["AA", "B6", "UA", "XX"]
    thresholds = [each.drift_comparator.jensen_shannon_divergence.threshold for each in after.feature if each.type != 1]
    assert thresholds == [0.7, 0.7, 0.7, 0.7, 0.5]  # ours, and that of the new column
    assert find_anomalies(now, after) == ()
    assert update_schema(after, now, COLUMNS) == after


def test_update_raises_a_bound_on_drift_only_as_far_as_it_was_passed() -> None:
    now = statistics(rows(seed=1, hour=pa.array(np.full(1000, 6))))
    assert find_anomalies(now, REVIEWED, USUAL)
    after = update_schema(REVIEWED, now, COLUMNS, USUAL)
    assert find_anomalies(now, after, USUAL) == ()
    raised = {each.name: each.drift_comparator.jensen_shannon_divergence.threshold for each in after.feature}
    assert 0.5 < raised.pop("hour") <= 1.0
    assert raised == {"delay": 0.5, "full": 0.5, "late": 0.5, "carrier": 0.0}


def test_bounds_on_drift_follow_what_was_measured() -> None:
    pieces = [statistics(rows(seed, full=pa.array(np.full(1000, seed), pa.float32()))) for seed in range(5)]
    schema = infer_schema(USUAL, COLUMNS, pieces)
    by_name = {each.name: each for each in schema.feature}
    moved = [measure_drift(REVIEWED, now, before)["delay"] for before, now in itertools.pairwise(pieces)]
    bound = by_name["delay"].drift_comparator.jensen_shannon_divergence.threshold
    assert bound == pytest.approx(max(1.5 * max(moved), 0.1), abs=0.01)
    assert 0.1 <= by_name["carrier"].drift_comparator.infinity_norm.threshold < 0.2
    assert not by_name["full"].HasField("drift_comparator")  # another value each day: there is nothing to bound


def test_a_schema_that_is_none_is_refused() -> None:
    with pytest.raises(DefinitionError, match=r"schema.pbtxt is a TensorFlow Metadata Schema. Got 1:1 .*infer --force"):
        parse_schema("features: yes")


def test_the_rules_are_tfdvs_own() -> None:
    import tensorflow_data_validation
    from tensorflow_data_validation.api import validation_api

    now = statistics(rows(carrier=pa.array(["AA", "XX"] * 500), hour=pa.array(np.full(1000, 6))))
    theirs = tensorflow_data_validation.validate_statistics(now, REVIEWED, previous_statistics=USUAL)
    assert validation_api.pywrap_tensorflow_data_validation is tfdv()  # one copy, whichever came first
    printed = {(name, reason.short_description) for name, info in theirs.anomaly_info.items() for reason in info.reason}
    assert {(each.feature, each.rule) for each in find_anomalies(now, REVIEWED, USUAL)} == printed


# A run as `features` does it: files, statistics, check, commit.


@dataclasses.dataclass
class Shop:
    """A table, a schema beside it, and runs against both."""

    table: str
    schema: Path

    def check(self, run_id: str, day: date, **rules: object) -> PublishCheck:
        asked = PublishRules(str(self.schema), **rules)  # type: ignore[arg-type]
        version = newest_version(self.table)
        run = CheckedRun(self.table, version, run_id, ((day, day),), "out/dead", "--definition d --store s")
        return make_check(asked, run)

    def run(self, run_id: str, batch: pa.RecordBatch, day: date = DAY, dead: int = 0, **rules: object) -> None:
        check = self.check(run_id, day, **rules)
        target = CommitTarget(
            self.table, SCHEMA, (day,), run_id, newest_version(self.table), metadata={"view": "departure_delay"}
        )
        pipeline = beam.Pipeline()
        features = pipeline | beam.Create([batch.slice(0, 400), batch.slice(400)], reshuffle=False)
        tallies = pipeline | "Tallies" >> beam.Create(
            [{"schedule": SourceTally("schedule", 1000 + dead, 1000, dead=dead)}]
        )
        dead_letters = pipeline | "Letters" >> beam.Create([Committed(0, 0, 0, (), False)])
        checked = features | Statistics(COLUMNS) | Validate(check, AsSingleton(tallies), AsSingleton(dead_letters))
        commit = CommitFiles(
            target, AlsoChecked(lambda table, tallies: {"mine": "too"}), (AsSingleton(tallies), AsSingleton(checked))
        )
        _ = features | WriteFiles(self.table, run_id) | commit
        execute(pipeline)

    def visible(self) -> int:
        return pl.read_delta(self.table).height

    def commits(self) -> list[dict[str, object]]:
        return committed_statistics(self.table, newest_version(self.table))


@pytest.fixture
def shop(tmp_path: Path) -> Shop:
    schema = tmp_path / "schema.pbtxt"
    schema.write_text(schema_text(REVIEWED))
    return Shop(str(tmp_path / "table"), schema)


def broken(seed: int = 1, day: date = DAY) -> pa.RecordBatch:
    return rows(seed, day, carrier=pa.array(["AA", "B6", "UA", "XX"] * 250))


def test_anomalies_stop_a_run_and_nothing_is_visible(shop: Shop) -> None:
    with pytest.raises(AnomalyError) as caught:
        shop.run("first", broken())
    message = str(caught.value)
    assert caught.value.exit_code == 7
    for part in (
        "[2013-03-01, 2013-03-02)",
        str(shop.schema),
        "carrier: Unexpected string values",
        "XX (~25%)",
        "Nothing was committed",
        "--allow_anomalies",
        "millrace schema update --definition d --store s --run_id first",
    ):
        assert part in message
    assert newest_version(shop.table) is None
    assert read_account(shop.table, "first")["anomalies"][0]["feature"] == "carrier"
    assert read_statistics(statistics_path(shop.table, "first")) == statistics(broken())  # for schema update


def test_a_table_that_is_there_stays_as_it_was(shop: Shop) -> None:
    shop.run("first", rows())
    before = pl.read_delta(shop.table)
    with pytest.raises(AnomalyError):
        shop.run("second", broken())
    assert newest_version(shop.table) == 0
    assert pl.read_delta(shop.table).equals(before)


def test_allowed_anomalies_are_recorded_in_the_commit(shop: Shop) -> None:
    shop.run("first", broken(), allow_anomalies=True)
    assert shop.visible() == 1000
    (entry,) = shop.commits()
    assert entry["allow_anomalies"] == "true"
    assert [each["feature"] for each in json.loads(str(entry["anomalies"]))] == ["carrier"]
    assert (entry["view"], entry["mine"]) == ("departure_delay", "too")


def test_statistics_stand_beside_the_table_and_are_named_in_its_commit(shop: Shop) -> None:
    shop.run("first", rows())
    (entry,) = shop.commits()
    assert (entry["statistics"], entry["statistics_first"], entry["statistics_last"]) == (
        "_statistics/first.pb",
        "2013-03-01",
        "2013-03-01",
    )
    assert "allow_anomalies" not in entry
    assert read_statistics(f"{shop.table}/{entry['statistics']}") == USUAL
    assert pl.read_delta(shop.table).height == 1000
    shop.run("first", rows())  # a repeated run changes nothing
    assert newest_version(shop.table) == 0


def test_drift_is_measured_from_the_interval_before(shop: Shop) -> None:
    shop.run("first", rows())
    drifted = rows(1, DAY + timedelta(days=1), hour=pa.array(np.full(1000, 6)))
    with pytest.raises(AnomalyError, match=r"\[2013-03-02, 2013-03-03\).*hour: High approximate Jensen-Shannon"):
        shop.run("second", drifted, DAY + timedelta(days=1))
    assert newest_version(shop.table) == 0


def test_the_interval_before_is_found_in_commits(shop: Shop) -> None:
    for run_id, days in (("third", 3), ("first", 1), ("fifth", 5), ("again", 1)):
        day = DAY + timedelta(days=days)
        shop.run(run_id, rows(0, day), day)

    def before(days: int, run_id: str = "new") -> str:
        return previous_statistics(shop.table, newest_version(shop.table), DAY + timedelta(days=days), run_id)[0]

    assert [before(days) for days in (9, 6, 5, 4, 2)] == [
        "fifth",
        "fifth",
        "third",
        "third",
        "again",
    ]  # ends before it starts
    assert before(1) == "again"  # none ended before: the newest
    assert before(1, "again") == "fifth"  # never itself
    assert previous_statistics(shop.table, None, DAY, "new") == ("", None)


def test_statistics_that_are_gone_are_said_and_not_missed(shop: Shop, caplog: pytest.LogCaptureFixture) -> None:
    shop.run("first", rows())
    Path(statistics_path(shop.table, "first")).unlink()
    assert previous_statistics(shop.table, 0, date(2014, 1, 1), "new") == ("", None)
    assert "drift is not measured" in caplog.text


def test_without_a_schema_statistics_are_kept_and_nothing_is_checked(shop: Shop) -> None:
    shop.schema.unlink()
    shop.run("first", broken())
    assert shop.visible() == 1000
    assert len(shop.commits()) == 1
    with pytest.raises(DefinitionError, match="No such file"):
        shop.check("second", DAY, required=True)


def test_too_many_dead_rows_stop_a_run(shop: Shop) -> None:
    with pytest.raises(ContractError) as caught:
        shop.run("first", rows(), dead=250, max_dead_fraction=0.1)
    for part in (
        "250 of 1,250 rows of 'schedule'",
        "0.2",
        "[2013-03-01, 2013-03-02)",
        "--max_dead_fraction 0.2",
        "out/dead",
    ):
        assert part in str(caught.value)
    assert newest_version(shop.table) is None


@pytest.mark.parametrize(("dead", "passes"), [(100, True), (101, False)])
def test_the_fraction_itself_is_allowed(shop: Shop, dead: int, passes: bool) -> None:
    check: Callable[[], None] = lambda: check_dead(  # noqa: E731
        shop.check("first", DAY, max_dead_fraction=0.1),
        {"schedule": SourceTally("schedule", 1000, 1000 - dead, dead=dead), "none": SourceTally("none")},  # type: ignore[arg-type]
    )
    if passes:
        check()
    else:
        with pytest.raises(ContractError):
            check()
