"""The check before features are committed: their statistics against the schema, and the share of rejected rows."""

from __future__ import annotations

import dataclasses
import itertools
import json
import logging
import os
from collections.abc import Callable, Mapping
from datetime import date, timedelta
from typing import TypedDict, cast

import apache_beam as beam
import pyarrow as pa
from deltalake import DeltaTable
from tensorflow_metadata.proto.v0.statistics_pb2 import DatasetFeatureStatisticsList

from schemas.errors import AnomalyError, ContractError, DefinitionError, StoreError
from transforms.sources.tallies import SourceTally
from transforms.storage.delta_log import commits
from transforms.storage.delta_tables import Committed, write_file_atomically
from transforms.storage.file_systems import FileSystems
from transforms.storage.stored_json import parse_object, read_regular, reason_of
from transforms.validation.publish_rules import PublishRules
from transforms.validation.tfdv_schema import Anomaly, find_anomalies, parse_schema, parse_statistics

log = logging.getLogger("millrace.validation")

# Delta and its readers skip folders whose names begin with an underscore.
STATISTICS_FOLDER = "_statistics"
COMMITS_SEARCHED = 1000
_SHOWN = 10


class StatisticsCommit(TypedDict, total=False):
    """The metadata of a commit that names its statistics: the run that stored them, and its first and last day
    (ISO)."""

    version: int
    run_id: str
    statistics: str
    statistics_first: str
    statistics_last: str
    statistics_previous: str
    allow_anomalies: str
    anomalies: str


class Account(TypedDict):
    """What a run stores beside its statistics.

    Args:
        previous: id of the run from whose statistics drift was measured; "" if there was none.
        anomalies: the fields of each `Anomaly`.
    """

    run_id: str
    interval: str
    previous: str
    anomalies: list[dict[str, str]]


@dataclasses.dataclass(frozen=True)
class CheckedRun:
    """The run that is checked.

    Args:
        table: the table that it is about to commit to.
        base: the table's version at launch; None if there is no table.
        run_id: its id.
        ranges: its days, as ranges of neighbouring days, both ends included.
        dead_letters: the table of its dead letters.
        command: "--definition … --store …", for messages.
    """

    table: str
    base: int | None
    run_id: str
    ranges: tuple[tuple[date, date], ...]
    dead_letters: str
    command: str

    @property
    def first(self) -> date:
        return self.ranges[0][0]

    @property
    def last(self) -> date:
        return self.ranges[-1][1]

    @property
    def interval(self) -> str:
        """The ranges as text, for messages."""
        rest = f" and {len(self.ranges) - _SHOWN} more" if len(self.ranges) > _SHOWN else ""
        return ", ".join(f"[{first}, {last + timedelta(days=1)})" for first, last in self.ranges[:_SHOWN]) + rest


@dataclasses.dataclass(frozen=True)
class PublishCheck:
    """The check of a run, resolved at launch.

    Args:
        rules: the user's rules.
        run: the run that is checked.
        schema: text of the schema; None: there is no schema, and nothing is checked.
        before: id of the run from which drift is measured; "" if there is none.
        previous: the serialised statistics of that run.
    """

    rules: PublishRules
    run: CheckedRun
    schema: str | None
    before: str
    previous: bytes | None

    def anomalies(self, statistics: DatasetFeatureStatisticsList) -> tuple[Anomaly, ...]:
        """The anomalies: where the statistics violate the schema."""
        if self.schema is None:
            return ()
        previous = None if self.previous is None else parse_statistics(self.previous)
        return find_anomalies(statistics, parse_schema(self.schema, self.rules.schema), previous, self.run.interval)


@dataclasses.dataclass(frozen=True)
class CheckOutcome:
    """The outcome of a check, in the two forms in which it is stored."""

    check: PublishCheck
    anomalies: tuple[Anomaly, ...]

    @property
    def account(self) -> Account:
        """The file beside the statistics."""
        return {
            "run_id": self.check.run.run_id,
            "interval": self.check.run.interval,
            "previous": self.check.before,
            "anomalies": [dataclasses.asdict(each) for each in self.anomalies],
        }

    @property
    def metadata(self) -> dict[str, str]:
        """The metadata of the commit."""
        run, anomalies = self.check.run, self.account["anomalies"][:_SHOWN]
        allowed = {"allow_anomalies": "true", "anomalies": json.dumps(anomalies, ensure_ascii=False)}
        return {
            "statistics": f"{STATISTICS_FOLDER}/{run.run_id}.pb",
            "statistics_first": run.first.isoformat(),
            "statistics_last": run.last.isoformat(),
            "statistics_previous": self.check.before,
            **(allowed if self.check.rules.allow_anomalies else {}),
        }


def make_check(rules: PublishRules, run: CheckedRun) -> PublishCheck:
    """Read the schema and the previous statistics.

    The statistics of a run cover all its rows, even if there are gaps between its days; drift is measured from the
    interval that ended before the first of these days.

    Raises:
        DefinitionError: the schema cannot be read.
    """
    schema = read_schema(rules.schema, rules.required)
    if schema is None:
        log.info(
            "no %s: statistics are kept, nothing is checked (millrace schema infer %s writes one)",
            rules.schema,
            run.command,
        )
        return PublishCheck(rules, run, None, "", None)
    return PublishCheck(rules, run, schema, *previous_statistics(run.table, run.base, run.first, run.run_id))


def read_schema(path: str, required: bool) -> str | None:
    """The text of the schema, after a check that it is one; None if there is no file and none is `required`."""
    if not os.path.lexists(path):
        if required:
            raise DefinitionError(
                "--schema names a schema.pbtxt", path, "No such file; millrace schema infer writes one"
            )
        return None
    rule = "--schema names a text file" if required else "The schema beside a definition is a text file"
    try:
        text = read_regular(path).decode()
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or reason_of(error)
        raise DefinitionError(rule, f"{path}: {reason}", "Write a fresh one: millrace schema infer --force") from None
    parse_schema(text, path)
    return text


def statistics_path(table: str, run_id: str) -> str:
    """The path of a run's statistics, whether the run was committed or not."""
    return FileSystems.join(table, STATISTICS_FOLDER, f"{run_id}.pb")


def read_statistics(path: str) -> DatasetFeatureStatisticsList:
    """Reads the statistics that `check_statistics` wrote.

    Raises:
        StoreError: they cannot be read.
    """
    try:
        return parse_statistics(read_regular(path))
    except Exception as error:  # Beam's file systems raise what they like
        raise StoreError(
            "A run's statistics can be read", f"{path}: {error}", "See the runs with: millrace tables"
        ) from None


def committed_statistics(table: str, version: int | None) -> list[StatisticsCommit]:
    """The commits up to `version` that name their statistics, newest first."""
    if version is None:
        return []
    newest = itertools.islice(commits(table, version), COMMITS_SEARCHED)
    return [cast(StatisticsCommit, entry) for entry in newest if entry.get("statistics")]


def previous_statistics(table: str, version: int | None, first: date, run_id: str) -> tuple[str, bytes | None]:
    """The run to compare with ("": none), and its statistics.

    It is the run of the last interval that ended before `first`; if there is none, the run of the newest other commit.
    """
    commits = [entry for entry in committed_statistics(table, version) if entry.get("run_id") != run_id]
    earlier = [entry for entry in commits if entry["statistics_last"] < first.isoformat()]
    chosen = max(earlier, key=lambda entry: (entry["statistics_last"], entry["version"]), default=None) or next(
        iter(commits), None
    )
    if chosen is None:
        return "", None
    try:
        before = str(chosen["run_id"])
        return before, read_statistics(statistics_path(table, before)).SerializeToString()
    except StoreError as error:
        log.warning("drift is not measured: %s", error)
        return "", None


def read_account(table: str, run_id: str) -> Account:
    """The account that a run stored beside its statistics.

    Raises:
        StoreError: it cannot be read.
    """
    try:
        account = parse_object(read_regular(FileSystems.join(table, STATISTICS_FOLDER, f"{run_id}.json")))
        return {
            "run_id": run_id,
            "interval": str(account["interval"]),
            "previous": str(account["previous"]),
            "anomalies": list(account["anomalies"]),
        }
    except Exception as error:  # Beam's file systems raise what they like
        raise StoreError(
            "A run's account of its statistics can be read",
            f"run {run_id}: {reason_of(error)}",
            "See the runs with: millrace tables",
        ) from None


@dataclasses.dataclass(eq=False)  # Beam sets the label
class Validate(beam.PTransform):
    """PCollection of one `DatasetFeatureStatisticsList` → PCollection of one dict: metadata for the commit that may
    follow.

    Anomalies or too many rejected rows make the step and the run fail. A commit that takes the dict as a side input
    waits for it.

    Args:
        tallies: the tallies by source, as a side input.
        dead_letters: the commit of the dead letters, as a side input, so that they can be read whatever the check
            finds.
    """

    check: PublishCheck
    tallies: beam.pvalue.AsSideInput
    dead_letters: beam.pvalue.AsSideInput

    def expand(self, statistics: beam.PCollection) -> beam.PCollection:
        return statistics | "Check" >> beam.Map(check_statistics, self.check, self.tallies, self.dead_letters)


@dataclasses.dataclass(frozen=True)
class AlsoChecked:
    """`prepare` for a `CommitFiles` whose last side input is the output of `Validate`: returns its own metadata and
    that output."""

    prepare: Callable[..., Mapping[str, str]]

    def __call__(self, table: DeltaTable | None, *side: object) -> dict[str, str]:
        *own, checked = side
        return {**self.prepare(table, *own), **cast(Mapping[str, str], checked)}


def check_statistics(
    statistics: DatasetFeatureStatisticsList,
    check: PublishCheck,
    tallies: Mapping[str, SourceTally],
    dead_letters: Committed | None = None,
) -> dict[str, str]:
    """Checks the rejected rows and the statistics; returns metadata for the commit.

    Statistics and account are stored whatever the result is.

    Args:
        dead_letters: the commit of the dead letters, for which the check waits.

    Raises:
        ContractError: too many rows of a source were rejected.
        AnomalyError: the statistics violate the schema, and this was not allowed.
    """
    check_dead(check, tallies)
    outcome = CheckOutcome(check, check.anomalies(statistics))
    store_outcome(outcome, statistics)
    if outcome.anomalies and not check.rules.allow_anomalies:
        raise anomaly_error(check, outcome.anomalies)
    if outcome.anomalies:
        log.warning("allowed in %s: %s", check.run.interval, _listed(outcome.anomalies))
    return outcome.metadata


def store_outcome(outcome: CheckOutcome, statistics: DatasetFeatureStatisticsList) -> None:
    """Stores the account and the statistics of a run beside its table."""
    run = outcome.check.run
    folder = FileSystems.join(run.table, STATISTICS_FOLDER)
    account = json.dumps(outcome.account, ensure_ascii=False, indent=2)
    write_file_atomically(folder, f"{run.run_id}.json", pa.py_buffer(account.encode()))
    write_file_atomically(folder, f"{run.run_id}.pb", pa.py_buffer(statistics.SerializeToString(deterministic=True)))


def check_dead(check: PublishCheck, tallies: Mapping[str, SourceTally]) -> None:
    """Refuses a run that rejected a greater share of a source than allowed.

    Raises:
        ContractError: it rejected more.
    """
    most = check.rules.max_dead_fraction
    for tally in tallies.values():
        if tally.dead <= most * tally.read:
            continue
        fraction = tally.dead / tally.read
        raise ContractError(
            f"At most {most:g} of a source's rows are rejected (--max_dead_fraction)",
            f"{tally.dead:,} of {tally.read:,} rows of {tally.source!r}, that is {fraction:.3g}, in "
            f"{check.run.interval}",
            f"Nothing was committed; {check.run.dead_letters} holds the rows and the rules they broke.  Mend the "
            "source, "
            f"or run again with --max_dead_fraction {fraction + 0.0005:.3f}",
        )


def anomaly_error(check: PublishCheck, found: tuple[Anomaly, ...]) -> AnomalyError:
    """The error for a run whose statistics violate the schema. It names `--schema` if that was given."""
    count = "1 anomaly" if len(found) == 1 else f"{len(found)} anomalies"
    where = f" --schema {check.rules.schema}" if check.rules.required else ""
    return AnomalyError(
        f"The features of {check.run.interval} keep {check.rules.schema}",
        f"{count}: {_listed(found)}",
        "Nothing was committed.  If the data is right, let the schema follow it: "
        f"millrace schema update {check.run.command}{where} --run_id {check.run.run_id}; to publish as it is, "
        "run again with --allow_anomalies",
    )


def _listed(found: tuple[Anomaly, ...]) -> str:
    rest = f"; and {len(found) - _SHOWN} more" if len(found) > _SHOWN else ""
    return "; ".join(map(str, found[:_SHOWN])) + rest
