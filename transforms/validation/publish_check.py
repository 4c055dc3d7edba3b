"""Before features are committed: are they what the use case's schema says, and were few enough rows set aside?"""

from __future__ import annotations

import dataclasses
import itertools
import json
import logging
import os
from collections.abc import Callable, Mapping
from datetime import date, timedelta
from typing import Any

import apache_beam as beam
import pyarrow as pa
from deltalake import DeltaTable

from schemas.errors import AnomalyError, ContractError, DefinitionError, StoreError
from transforms.sources.tallies import SourceTally
from transforms.storage.delta_log import commits
from transforms.storage.delta_tables import Committed, write_aside
from transforms.storage.file_systems import FileSystems
from transforms.validation.publish_rules import PublishRules
from transforms.validation.tfdv_schema import Anomaly, parse_schema, parse_statistics, validate

log = logging.getLogger("millrace.validation")

# Delta and its readers pass over folders that begin with an underscore.
FOLDER = "_statistics"
HISTORY = 1000
_SHOWN = 10


@dataclasses.dataclass(frozen=True)
class PublishCheck:
    """All that the last step needs to judge a run, resolved at launch.

    Args:
        rules: what the user asked for.
        schema: text of the schema; None where there is none, and nothing is checked.
        table, run_id: whose statistics these are.
        first, last: the run's days, both included.
        previous: serialised statistics of the interval before, to measure drift from, left by the run `before`.
        letters: the table of dead letters.
        command: "--definition … --store …", for messages.
        ranges: the runs of neighbouring days, both ends included, where there are gaps between first and last.
    """

    rules: PublishRules
    schema: str | None
    table: str
    run_id: str
    first: date
    last: date
    previous: bytes | None
    before: str
    dead_letters: str
    command: str
    ranges: tuple[tuple[date, date], ...] = ()

    @property
    def interval(self) -> str:
        ranges = self.ranges or ((self.first, self.last),)
        rest = f" and {len(ranges) - _SHOWN} more" if len(ranges) > _SHOWN else ""
        return ", ".join(f"[{first}, {last + timedelta(days=1)})" for first, last in ranges[:_SHOWN]) + rest


def make_check(
    rules: PublishRules,
    table: str,
    base: int | None,
    run_id: str,
    first: date,
    last: date,
    dead_letters: str,
    command: str,
    ranges: tuple[tuple[date, date], ...] = (),
) -> PublishCheck:
    """Read the schema and the previous statistics.

    The statistics of a run are those of all its rows, whatever the gaps between its days; drift is measured from the
    interval that ended before the first of them.

    Args:
        base: the table's version at launch; None where there is no table.

    Raises:
        DefinitionError: the schema cannot be read.
    """
    schema = read_schema(rules.schema, rules.required)
    before, previous = previous_statistics(table, base, first, run_id) if schema is not None else ("", None)
    if schema is None:
        log.info(
            "no %s: statistics are kept, nothing is checked (millrace schema infer %s writes one)",
            rules.schema,
            command,
        )
    return PublishCheck(rules, schema, table, run_id, first, last, previous, before, dead_letters, command, ranges)


def read_schema(path: str, required: bool) -> str | None:
    """The schema's text, checked to be one; None where there is no file and none is `required`."""
    if not os.path.exists(path):
        if required:
            raise DefinitionError(
                "--schema names a schema.pbtxt", path, "No such file; millrace schema infer writes one"
            )
        return None
    with open(path, encoding="utf-8") as file:
        text = file.read()
    parse_schema(text, path)
    return text


def statistics_path(table: str, run_id: str) -> str:
    """Where a run's statistics are, committed or not."""
    return FileSystems.join(table, FOLDER, f"{run_id}.pb")


def read_statistics(path: str) -> Any:
    """Statistics that `check_statistics` wrote.

    Raises:
        StoreError: they cannot be read.
    """
    try:
        with FileSystems.open(path) as handle:
            return parse_statistics(handle.read())
    except Exception as error:  # Beam's file systems raise what they like
        raise StoreError(
            "A run's statistics can be read", f"{path}: {error}", "See the runs with: millrace tables"
        ) from None


def committed_statistics(table: str, version: int | None) -> list[dict[str, Any]]:
    """Commits up to `version` that name their statistics, newest first: what their metadata says."""
    if version is None:
        return []
    return [entry for entry in itertools.islice(commits(table, version), HISTORY) if entry.get("statistics")]


def previous_statistics(table: str, version: int | None, first: date, run_id: str) -> tuple[str, bytes | None]:
    """The run to compare with, and its statistics: the last interval that ended before `first`; else the newest other commit."""
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


def read_account(table: str, run_id: str) -> dict[str, Any]:
    """What a run left beside its statistics: its interval, the run it was compared with, its anomalies."""
    try:
        with FileSystems.open(FileSystems.join(table, FOLDER, f"{run_id}.json")) as handle:
            return json.loads(handle.read())
    except Exception as error:  # Beam's file systems raise what they like
        raise StoreError(
            "A run's account of its statistics can be read",
            f"run {run_id}: {error}",
            "See the runs with: millrace tables",
        ) from None


@dataclasses.dataclass(eq=False)  # Beam sets the label
class Validate(beam.PTransform):
    """PCollection of one `DatasetFeatureStatisticsList` → PCollection of one dict: metadata for the commit that may follow.

    Anomalies, or too many dead rows, fail the step and the run.  A commit that takes the dict as a side input waits for it.

    Args:
        tallies: per source, as a side input.
        letters: the dead letters' commit, as a side input: they can be looked at whatever is found.
    """

    check: PublishCheck
    tallies: beam.pvalue.AsSideInput
    dead_letters: beam.pvalue.AsSideInput

    def expand(self, statistics: beam.PCollection) -> beam.PCollection:
        return statistics | "Check" >> beam.Map(check_statistics, self.check, self.tallies, self.dead_letters)


@dataclasses.dataclass(frozen=True)
class AlsoChecked:
    """`prepare` of a `CommitFiles` whose last side input is what `Validate` found: its own metadata and that."""

    prepare: Callable[..., Mapping[str, str]]

    def __call__(self, table: DeltaTable | None, *side: Any) -> dict[str, str]:
        *own, checked = side
        return {**self.prepare(table, *own), **checked}


def check_statistics(
    statistics: Any, check: PublishCheck, tallies: Mapping[str, SourceTally], dead_letters: Committed | None = None
) -> dict[str, str]:
    """What to keep with the commit, if there may be one.  Statistics and account are written whatever is found.

    Raises:
        ContractError: too many rows of a source were set aside.
        AnomalyError: the statistics break the schema and this was not allowed.
    """
    check_dead(check, tallies)
    found: tuple[Anomaly, ...] = ()
    if check.schema is not None:
        previous = None if check.previous is None else parse_statistics(check.previous)
        found = validate(statistics, parse_schema(check.schema, check.rules.schema), previous, check.interval)
    anomalies = [dataclasses.asdict(each) for each in found]
    account = {"run_id": check.run_id, "interval": check.interval, "previous": check.before, "anomalies": anomalies}
    folder = FileSystems.join(check.table, FOLDER)
    write_aside(
        folder, f"{check.run_id}.json", pa.py_buffer(json.dumps(account, ensure_ascii=False, indent=2).encode())
    )
    write_aside(folder, f"{check.run_id}.pb", pa.py_buffer(statistics.SerializeToString(deterministic=True)))
    if found and not check.rules.allow_anomalies:
        raise anomaly_error(check, found)
    if found:
        log.warning("allowed in %s: %s", check.interval, _listed(found))
    metadata = {
        "statistics": f"{FOLDER}/{check.run_id}.pb",
        "statistics_first": check.first.isoformat(),
        "statistics_last": check.last.isoformat(),
        "statistics_previous": check.before,
    }
    if check.rules.allow_anomalies:
        metadata |= {"allow_anomalies": "true", "anomalies": json.dumps(anomalies[:_SHOWN], ensure_ascii=False)}
    return metadata


def check_dead(check: PublishCheck, tallies: Mapping[str, SourceTally]) -> None:
    """Refuse a run that set aside more of a source than allowed."""
    most = check.rules.max_dead_fraction
    for tally in tallies.values():
        if tally.dead > most * tally.read:
            raise ContractError(
                f"At most {most:g} of a source's rows are set aside (--max_dead_fraction)",
                f"{tally.dead:,} of {tally.read:,} rows of {tally.source!r}, that is {tally.dead / tally.read:.3g}, in {check.interval}",
                f"Nothing was committed; {check.dead_letters} holds the rows and the rules they broke.  Mend the source, or run again with --max_dead_fraction {tally.dead / tally.read + 0.0005:.3f}",
            )


def anomaly_error(check: PublishCheck, found: tuple[Anomaly, ...]) -> AnomalyError:
    """What stops a run whose statistics break the schema: `--schema` is named where it was given."""
    count = "1 anomaly" if len(found) == 1 else f"{len(found)} anomalies"
    where = f" --schema {check.rules.schema}" if check.rules.required else ""
    return AnomalyError(
        f"The features of {check.interval} keep {check.rules.schema}",
        f"{count}: {_listed(found)}",
        "Nothing was committed.  If the data is right, let the schema follow it: "
        f"millrace schema update {check.command}{where} --run_id {check.run_id}; to publish as it is, run again with --allow_anomalies",
    )


def _listed(found: tuple[Anomaly, ...]) -> str:
    rest = f"; and {len(found) - _SHOWN} more" if len(found) > _SHOWN else ""
    return "; ".join(map(str, found[:_SHOWN])) + rest
