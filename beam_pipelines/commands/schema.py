"""schema: `infer`, `check` and `update` the schema.pbtxt that a use case's features must satisfy."""

from __future__ import annotations

import dataclasses
import difflib
import os
import sys
from collections.abc import Sequence
from datetime import date

from tensorflow_metadata.proto.v0.schema_pb2 import Schema
from tensorflow_metadata.proto.v0.statistics_pb2 import DatasetFeatureStatisticsList

from beam_pipelines.runtime.arguments import Arguments
from beam_pipelines.runtime.errors import guard
from schemas.durations import DAY, microseconds
from schemas.errors import DataError, DefinitionError, StoreError, nearest
from schemas.loading import Definition, load_project
from transforms.storage.delta_tables import DataFile, data_files, file_groups, newest_version, open_table, read_group
from transforms.storage.paths import features_uri
from transforms.validation.publish_check import (
    committed_statistics,
    read_account,
    read_schema,
    read_statistics,
    statistics_path,
)
from transforms.validation.statistics import describe_batch, describe_nothing, statistics_proto, view_columns
from transforms.validation.tfdv_schema import (
    Anomaly,
    find_anomalies,
    infer_schema,
    parse_schema,
    schema_text,
    update_schema,
)

# More intervals would add little information about the distance between two of them.
PIECES = 60


@dataclasses.dataclass(frozen=True, eq=False)
class SchemaOptions:
    """The options of one run.  `run_id` is None if the flag was not given."""

    definition: Definition
    store: str
    schema: str
    run_id: str | None
    start: date | None
    end: date | None
    every: int
    force: bool

    @property
    def table(self) -> str:
        return features_uri(self.store, self.definition.view.name, self.definition.view.fingerprint)

    @property
    def command(self) -> str:
        return f"{self.definition.flags} --store {self.store}"


def parse(action: str, argv: Sequence[str]) -> SchemaOptions:
    """Options from flags that mean one view.

    Raises:
        DefinitionError: a flag or the definition is refused, or several views are meant.
    """
    found = parse_each(action, argv)
    if len(found) > 1:
        names = ", ".join(each.definition.view.name for each in found)
        raise DefinitionError("One view must be chosen", f"there are {names}", "Choose one with --view")
    return found[0]


def parse_each(action: str, argv: Sequence[str]) -> list[SchemaOptions]:
    """SchemaOptions from flags, of each view that is meant.

    Raises:
        DefinitionError: a flag or the definition is refused.
    """
    arguments = Arguments(f"millrace schema {action}", ACTIONS[action].__doc__ or "", every="view")
    arguments.add_interval("spine rows")
    arguments.add_schema()
    if action == "infer":
        arguments.add_argument(
            "--every",
            default="1d",
            help="the interval that a run loads: bounds on drift are set by how far such intervals lie apart "
            "(default 1d)",
        )
        arguments.add_argument("--force", action="store_true", help="write over a schema that is there")
    flags, rest = arguments.parse(argv)
    if rest:
        arguments.error(f"unknown flag {rest[0]}")
    definitions = load_project(flags.definition).each_view(flags.view, flags.model)
    # Arguments names every run; here a name is only meant if it was given.
    named = any(word.split("=")[0] == "--run_id" for word in argv)
    if flags.schema and len(definitions) > 1:
        value = ", ".join(each.view.name for each in definitions)
        raise DefinitionError("--schema needs one view", f"there are {value}", "Choose one with --view")
    return [
        SchemaOptions(
            definition,
            flags.store,
            flags.schema or definition.schema_path,
            flags.run_id if named else None,
            flags.start,
            flags.end,
            _days(getattr(flags, "every", "1d")),
            getattr(flags, "force", False),
        )
        for definition in definitions
    ]


def _days(text: str) -> int:
    length = microseconds(text, "--every")
    if length % DAY:
        raise DefinitionError("--every must be a number of whole days", f"it is {text!r}", "Write it like 1d or 4w")
    return length // DAY


def infer(options: SchemaOptions) -> int:
    """Write a first schema from the rows of the feature table (all, or those of --start to --end)."""
    if os.path.exists(options.schema) and not options.force:
        raise DefinitionError(
            "infer must not replace a schema",
            f"{options.schema} exists",
            "Change it with update, or write over it with --force",
        )
    columns = view_columns(options.definition.view)
    statistics, pieces = statistics_of_rows(options), statistics_of_pieces(options)
    write(options.schema, schema_text(infer_schema(statistics, columns, pieces)))
    drift = (
        f"drift as between {len(pieces)} intervals of {options.every} d"
        if len(pieces) > 1
        else "drift not measured, for want of intervals"
    )
    print(f"{options.schema}: {len(columns)} columns, {drift}.  Review it, tighten it, keep it beside the definition.")
    return 0


def check(options: SchemaOptions) -> int:
    """Print where statistics violate the schema; exit code 7 if they do."""
    schema = read(options)
    meant, statistics, previous = chosen(options)
    found = find_anomalies(statistics, schema, previous, meant)
    print(listed(found, meant, options.schema))
    return 7 if found else 0


def update(options: SchemaOptions) -> int:
    """Change the schema as little as needed for the statistics to satisfy it, and show the difference."""
    schema = read(options)
    meant, statistics, previous = chosen(options)
    changed = update_schema(schema, statistics, view_columns(options.definition.view), previous)
    if changed == schema:
        print(f"{options.schema}: nothing to change for {meant}")
    else:
        with open(options.schema, encoding="utf-8") as file:
            before = file.read()
        after = schema_text(changed)
        write(options.schema, after)
        lines = difflib.unified_diff(before.splitlines(True), after.splitlines(True), "before", options.schema)
        print("".join(lines), end="")
    left = find_anomalies(statistics, changed, previous, meant)
    if left:
        print(f"{listed(left, meant, options.schema)}\n  No schema allows these: run once with --allow_anomalies")
    return 0


ACTIONS = {"infer": infer, "check": check, "update": update}


def chosen(options: SchemaOptions) -> tuple[str, DatasetFeatureStatisticsList, DatasetFeatureStatisticsList | None]:
    """A description of the chosen statistics, the statistics, and those from which to measure drift.

    They are those of the rows of --start to --end if one is given; else those that the run --run_id left, whether it
    was stopped or not; else those of the newest commit; else, if commits have none, those of all rows.
    """
    if options.start or options.end:
        return f"rows of [{options.start or '…'}, {options.end or '…'})", statistics_of_rows(options), None
    run_id = options.run_id
    if run_id is None:
        commits = committed_statistics(options.table, newest_version(options.table))
        if not commits:
            return "all rows", statistics_of_rows(options), None
        run_id = str(commits[0]["run_id"])
    statistics = read_statistics(statistics_path(options.table, run_id))
    account = read_account(options.table, run_id)
    try:
        previous = read_statistics(statistics_path(options.table, account["previous"])) if account["previous"] else None
    except StoreError:
        previous = None
    return f"run {run_id}, {account['interval']}", statistics, previous


def statistics_of_rows(options: SchemaOptions) -> DatasetFeatureStatisticsList:
    """Statistics of the table's rows in the interval.

    Raises:
        DataError: there are none.
    """
    return statistics_of_files(options, files_of_interval(options))


def statistics_of_pieces(options: SchemaOptions) -> list[DatasetFeatureStatisticsList]:
    """Statistics of the newest whole intervals of `every` days, at most `PIECES`, oldest first."""
    pieces: dict[int, list[DataFile]] = {}
    files = files_of_interval(options)
    for file in files:
        pieces.setdefault((file.date - files[0].date).days // options.every, []).append(file)
    last = (files[-1].date - files[0].date).days + 1
    whole = [index for index in sorted(pieces) if (index + 1) * options.every <= last]
    return [statistics_of_files(options, pieces[index]) for index in whole[-PIECES:]]


def files_of_interval(options: SchemaOptions) -> list[DataFile]:
    """The table's files in the interval, by date."""
    table = open_table(options.table)
    files = [] if table is None else data_files(table, options.start, options.end)
    if not files:
        raise DataError(
            f"The feature table of {options.definition.view.name!r} must have "
            f"rows{' in the interval' if options.start or options.end else ''}",
            "there are none",
            f"Compute them first: millrace features {options.command}",
        )
    return files


def statistics_of_files(options: SchemaOptions, files: Sequence[DataFile]) -> DatasetFeatureStatisticsList:
    """Statistics of the files' rows."""
    columns = view_columns(options.definition.view)
    total = describe_nothing(columns)
    for group in file_groups(files):
        total = total + describe_batch(read_group(group, columns.names), columns)
    return statistics_proto(total)


def read(options: SchemaOptions) -> Schema:
    """The present schema.

    Raises:
        DefinitionError: there is no schema, or the file is not one.
    """
    text = read_schema(options.schema, required=False)
    if text is None:
        raise DefinitionError(
            "The use case must have a schema",
            f"there is no {options.schema}",
            f"Write a first one: millrace schema infer {options.command}",
        )
    return parse_schema(text, options.schema)


def listed(found: Sequence[Anomaly], meant: str, schema: str) -> str:
    """The anomalies, one per line."""
    if not found:
        return f"{meant}: keeps {schema}"
    count = "1 anomaly" if len(found) == 1 else f"{len(found)} anomalies"
    return "\n".join([f"{meant}: {count} against {schema}", *(f"  {each}" for each in found)])


def write(path: str, text: str) -> None:
    """Writes the whole file or nothing.

    Raises:
        StoreError: the file cannot be written.
    """
    try:
        with open(path + ".part", "w", encoding="utf-8") as file:
            file.write(text)
        os.replace(path + ".part", path)
    except OSError as error:
        raise StoreError(
            "The schema must be writable",
            f"{path}: {error.strerror}",
            "Grant access, or choose another place with --schema",
        ) from None


def main(argv: Sequence[str]) -> int:
    """Run `infer`, `check` or `update`; its exit code."""
    if not argv or argv[0] in ("-h", "--help"):
        print(
            "usage: millrace schema ACTION --definition … --store … [--view NAME] [--schema FILE] [--run_id RUN] "
            "[--start …] [--end …]\n"
        )
        print("\n".join(f"  {name:<8}{action.__doc__}" for name, action in ACTIONS.items()))
        return 0 if argv else 2
    action, *rest = argv
    if action not in ACTIONS:
        raise DefinitionError(
            "The action of millrace schema must be infer, check or update",
            f"it is {action!r}",
            nearest(action, ACTIONS),
        )
    return max([ACTIONS[action](options) for options in parse_each(action, rest)])


if __name__ == "__main__":
    sys.exit(guard(main)(sys.argv[1:]))
