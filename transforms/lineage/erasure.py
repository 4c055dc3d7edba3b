"""Removes rows of a source, and everything in the store that was made from them, for good.

Everything that the next runs make again is removed as a whole: feature tables that read the source, with all their
versions, lifetime summaries, digests and statistics, and the dead letters of the source. From everything else, only the
rows themselves and those that could see them are removed: predictions; accepted rows, feature rows and dimension
versions of live jobs. Files of older versions are deleted. The source comes last, so that an interrupted erasure finds
the same rows again.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import shutil
from collections.abc import Collection, Mapping, Sequence

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq

from schemas.errors import DefinitionError, StoreError, nearest
from schemas.features import Derived, Latest, Lookup, Trailing
from schemas.live import repeats_by
from schemas.sources import Source
from schemas.views import FeatureView
from transforms.features.manifest_store import read_manifest
from transforms.records.arrays import Bools
from transforms.records.record_batches import frame
from transforms.records.row_hashing import row_ids
from transforms.sources.contracts import Contract
from transforms.sources.inventory import open_parquet, source_files, survey_source
from transforms.sources.repeats import KnownOrder
from transforms.storage.delta_log import logged_versions
from transforms.storage.delta_tables import data_files, open_table, read_file, write_file_atomically
from transforms.storage.paths import folders, source_uri, sources_root, table_path_in_store, tables_below
from transforms.storage.rewriting import Matches, Revise, matching_rows, purge, rewrite_delta, write_without
from transforms.storage.run_markers import MARKER
from transforms.storage.stored_json import DAMAGE, explain_damage, parse_object, read_regular
from transforms.storage.vacuum import TEMPORARY_FILE, files_below, tables_of
from transforms.streaming.beginnings import HISTORY_PARTITION
from transforms.streaming.fates import known_columns, known_order
from transforms.streaming.live_dimensions import rewrite_versions
from transforms.streaming.messages import ORIGIN_TYPES
from transforms.streaming.pending_spine_rows import about_spine_rows
from transforms.streaming.row_origin import ORIGIN_COLUMNS

# Columns of a predictions table that do not name the spine row.
_OF_PREDICTIONS = {"row_id", "prediction_id", "model", "model_version", "arm", "fingerprint", "date"}
# Files in the folder of a run that show rows, by pipeline; the figures of the run stay.
_FIGURES = {"run.json", "account.json", MARKER}
_UNREGISTERED = {"model", "registration.json", "training.json"}


@dataclasses.dataclass(frozen=True, eq=False)
class Condition:
    """The condition for the rows of a source that are to be erased.

    Args:
        source: their source.
        text: the condition, in the SQL of Polars.
    """

    source: Source
    text: str

    @functools.cached_property
    def expression(self) -> pl.Expr:
        """
        Raises:
            DefinitionError: the text is not a condition, or names no column, or one that the source does not declare.
        """
        example = "Write it in SQL: --where \"customer = 'c17' AND placed_at < '2024-01-01'\""
        schema = self.source.schema
        try:
            expression = pl.sql_expr(self.text)
            names = expression.meta.root_names()
        except pl.exceptions.PolarsError as error:
            reason = (str(error).splitlines() or ["it cannot be parsed"])[0]
            raise DefinitionError("--where is a condition on one row", f"{self.text!r}: {reason}", example) from None
        unknown = [name for name in names if name not in schema]
        if unknown:
            raise DefinitionError(
                f"--where names columns that source {self.source.name!r} declares: {', '.join(schema)}",
                repr(unknown[0]),
                nearest(unknown[0], schema),
            )
        if not names:
            raise DefinitionError("--where names a column", repr(self.text), example)
        try:
            kind = pl.DataFrame(schema=schema).select(expression.alias("_")).schema["_"]
        except pl.exceptions.PolarsError as error:
            reason = (str(error).splitlines() or ["types do not fit"])[0]
            raise DefinitionError("--where fits the columns' types", f"{self.text!r}: {reason}", example) from None
        if kind != pl.Boolean:
            raise DefinitionError("--where is true or false for a row", f"{self.text!r}, which is {kind}", example)
        return expression

    @property
    def columns(self) -> list[str]:
        return self.expression.meta.root_names()

    def of(self, rows: pl.DataFrame) -> pl.Series:
        """Whether each row is to be erased; a row for which the condition is null is not."""
        found = rows.select(self.expression.fill_null(False).alias("_"))["_"]
        return found if len(found) == len(rows) else pl.Series([bool(found[0])]).new_from_index(0, len(rows))


@dataclasses.dataclass(frozen=True, eq=False)
class SourceFiles:
    """The location of a source: its folder, whether it is a Delta table, its files, and the contract by which to read
    them."""

    folder: str
    delta: bool
    paths: tuple[str, ...]
    contract: Contract

    def matches(self, condition: Condition, group: pa.Table, path: str) -> Bools:
        """Whether each row of a row group is to be erased."""
        return condition.of(self.rows(group, path, condition.columns)).to_numpy()

    def rows(self, group: pa.Table, path: str, columns: Sequence[str]) -> pl.DataFrame:
        contract = dataclasses.replace(self.contract, columns=tuple(columns), ordering=())
        return contract.cast(group, path)

    def open(self, path: str) -> pq.ParquetFile:
        return open_parquet(path, self.contract.source)


@dataclasses.dataclass(frozen=True, eq=False)
class Erasure:
    """What is to be erased, and where.

    Args:
        views: all that the definition names, which declares the source.
        condition: the rows.
        store: its folder.
        roots: folders of sources; the store's own is always one.
        run_id: part of the names of the files that are written.
        keep_sources: whether the rows stay in the folders `roots`, because another store reads them too.
    """

    views: tuple[FeatureView, ...]
    condition: Condition
    store: str
    roots: tuple[str, ...]
    run_id: str
    keep_sources: bool = False

    @property
    def source(self) -> Source:
        return self.condition.source

    @property
    def metadata(self) -> dict[str, str]:
        return {"pipeline": "erase", "run_id": self.run_id}

    @functools.cached_property
    def places(self) -> list[SourceFiles]:
        """The locations of the source."""
        found = []
        for root in dict.fromkeys([*self.roots, sources_root(self.store)]):
            folder = source_uri(root, self.source.name)
            delta = bool(logged_versions(folder))
            if not delta and not os.path.isdir(folder) and not os.path.isfile(f"{folder}.parquet"):
                continue
            contract, _ = survey_source(root, Contract(self.source, tuple(self.condition.columns)))
            found.append(SourceFiles(folder, delta, tuple(source_files(root, self.source)), contract))
        if not found and not os.path.isdir(self._versions_folder):
            value = f"no folder {self.source.name!r} in {', '.join(self.roots)}"
            raise StoreError("The source is in the store", value, "Name its folder with --sources")
        return found

    @functools.cached_property
    def erased(self) -> pl.DataFrame:
        """The rows to erase, with the columns that all locations have."""
        parts = []
        for place in self.places:
            for path in place.paths:
                file = place.open(path)
                given = {} if place.contract.partitions is None else place.contract.partitions.types
                there = {*file.schema_arrow.names, *given}
                columns = [name for name in self.source.schema if name in there]
                for number in range(file.num_row_groups):
                    group = file.read_row_group(number)
                    hit = place.matches(self.condition, group, path)
                    if hit.any():
                        parts.append(place.rows(group, path, columns).filter(pl.Series(hit)))
        return pl.concat([pl.DataFrame(schema=self.source.schema), *parts], how="diagonal").unique()

    @property
    def rows(self) -> dict[str, int]:
        """Rows that match, by file of the source."""
        counts = {}
        for place in self.places:
            matches = functools.partial(place.matches, self.condition)
            for path in place.paths:
                if count := matching_rows(place.open(path), path, matches):
                    counts[path] = count
        return counts

    # What is affected.

    @functools.cached_property
    def feature_tables(self) -> list[str]:
        """Feature tables, as paths within the store, that read the source, or for which this is not known."""
        return [name for name in self._tables("features") if self._reads(name)]

    def _reads(self, name: str) -> bool:
        try:
            table = open_table(self._uri(name))
            files = {} if table is None else read_manifest(table).files
        except StoreError:
            return True
        return not files or self.source.name in files

    def _tables(self, position: str) -> list[str]:
        return [name for name in tables_below(self.store) if name.split("/")[0] == position]

    def _uri(self, name: str) -> str:
        return os.path.join(self.store, *name.split("/"))

    def affected_models(self, every: Mapping[str, Mapping[str, object]]) -> list[str]:
        """The manifests, by name and version, of those models that were trained on the source."""
        # A registered model's manifest is also in the folder of its run.
        registered = {each.get("run_id") for name, each in every.items() if not name.startswith("run ")}
        return [
            name
            for name, manifest in every.items()
            if self._trained(manifest) and not (name.startswith("run ") and manifest.get("run_id") in registered)
        ]

    def _trained(self, manifest: Mapping[str, object]) -> bool:
        label, sources = (manifest.get(each) or {} for each in ("label_table", "sources"))
        tables = tables_of(manifest)
        assert isinstance(label, Mapping)
        assert isinstance(sources, Mapping)
        if not tables or self.source.name in sources:
            return True
        return (
            any(table_path_in_store(str(table.get("uri"))) in self.feature_tables for table in tables)
            or str(label.get("uri", "")).rstrip("/").rsplit("/", 1)[-1] == self.source.name
        )

    # Removing. Each of these can be repeated.

    def erase_features(self) -> int:
        """Removes the feature tables with all their versions, summaries, statistics and manifests."""
        for name in self.feature_tables:
            folder = self._uri(name)
            # The folder is renamed first: from then on there is no table, even if a kill leaves parts of it.
            aside = os.path.join(os.path.dirname(folder), f".erasing-{os.path.basename(folder)}")
            shutil.rmtree(aside, ignore_errors=True)
            os.rename(folder, aside)
        for (view,) in folders(os.path.join(self.store, "features"), 1):
            for each in os.scandir(os.path.join(self.store, "features", view)):
                if each.name.startswith(".erasing-"):
                    shutil.rmtree(each.path)
        return len(self.feature_tables)

    def erase_dead_letters(self) -> int:
        """Removes the dead letters of the source, and those of messages with feature rows.

        Dead letters of a live job that explain why an accepted spine row has no feature row stay if the spine row
            stays: without them, nobody could find out what became of it.
        """
        names = [self.source.name, *(f"{view}.features" for view in self._views())]

        def matches(group: pa.Table, path: str) -> Bools:
            rows = frame(group)
            hit = rows["source"].is_in(names)
            if "place" in rows.columns:
                origins = rows.select(pl.col(name.removeprefix("__")).alias(name) for name in ORIGIN_COLUMNS)
                gone = origins.with_row_index("#").join(self.live_origins, on=ORIGIN_COLUMNS, how="semi")["#"]
                about = rows.select(about_spine_rows().fill_null(False)).to_series()
                hit &= ~about | pl.Series(np.isin(np.arange(len(rows)), gone.to_numpy()))
            return hit.to_numpy()

        return sum(self._rewrite(name, matches) for name in self._tables("dead_letters"))

    @functools.cached_property
    def live_origins(self) -> pl.DataFrame:
        """Where a live job had the rows from that it accepted and that are erased."""
        found = [pl.DataFrame(schema={name: ORIGIN_TYPES[name] for name in ORIGIN_COLUMNS})]
        for place in self.places if any(self.source.name == view.spine.name for view in self.views) else ():
            for path in place.paths:
                file = place.open(path)
                if not set(ORIGIN_COLUMNS) <= set(file.schema_arrow.names):
                    continue
                for number in range(file.num_row_groups):
                    group = file.read_row_group(number)
                    hit = pl.Series(place.matches(self.condition, group, path))
                    found.append(frame(group.select(ORIGIN_COLUMNS)).filter(hit).cast(found[0].schema))
        return pl.concat(found)

    def _views(self) -> set[str]:
        live = self._tables("features_live")
        return {*(view.name for view in self.views), *(name.split("/")[1] for name in (*live, *self.feature_tables))}

    @functools.cached_property
    def _erased_or_repeating(self) -> pl.DataFrame:
        """The rows to erase, and accepted rows with the same `unique` values, which may count once the former are
        gone."""
        unique, found = list(self.source.unique or ()), [self.erased]
        for place in self.places if unique and {*unique} <= {*self.erased.columns} else ():
            for path in place.paths:
                file = place.open(path)
                if not {*ORIGIN_COLUMNS, *unique} <= set(file.schema_arrow.names):
                    continue
                columns = [name for name in self.source.schema if name in file.schema_arrow.names]
                for number in range(file.num_row_groups):
                    rows = place.rows(file.read_row_group(number), path, columns)
                    found.append(rows.join(self.erased, on=unique, how="semi"))
        return pl.concat(found, how="diagonal").unique()

    @functools.cached_property
    def live_row_ids(self) -> pl.Series:
        """Ids of the live feature rows of erased rows, and of those that could see one of them."""
        found, known = [pl.Series("row_id", [], pl.Int64)], {view.name: view for view in self.views}
        for name in self._tables("features_live"):
            view = known.get(name.split("/")[1])
            table = open_table(self._uri(name))
            for file in [] if table is None else data_files(table):
                rows = frame(read_file(file))
                if view is not None:  # its definition is not available, so what its rows could see is not known
                    seen = could_see(view, self.source, self._erased_or_repeating, rows)
                    rows = rows.filter(seen | rows["row_id"].is_in(self.row_ids.implode()))
                found.append(rows["row_id"])
        return pl.concat(found).unique()

    def erase_live_features(self, row_ids: Collection[int]) -> int:
        """Removes live feature rows with these ids (see `live_row_ids`)."""
        return sum(self._rewrite(name, _with_ids(row_ids)) for name in self._tables("features_live"))

    @property
    def _versions_folder(self) -> str:
        """The folder in which live jobs keep the versions of the source, if it is a dimension."""
        return os.path.join(self.store, "dimensions", self.source.name)

    @functools.cached_property
    def in_versions(self) -> int:
        """The number of rows that match in kept versions of the dimension."""
        return rewrite_versions(self._versions_folder, self._version_matches, dry_run=True)

    def erase_dimension_versions(self) -> int:
        """Removes the rows from the versions of the dimension that live jobs have kept."""
        return rewrite_versions(self._versions_folder, self._version_matches)

    def _version_matches(self, rows: pl.DataFrame) -> pl.Series:
        """Whether each row of a version is removed: by its keys, and by the condition if the version has its
        columns."""
        keys = [
            [column for _, column in feature.keys]
            for view in self.views
            for feature in view.features
            if isinstance(feature, Lookup) and feature.source.name == self.source.name
        ]

        hit = pl.Series(np.zeros(len(rows), np.bool_))
        if {*self.condition.columns} <= {*rows.columns}:
            hit |= self.condition.of(rows)
        for names in keys:  # a version has only columns that features read, maybe with other values
            at = rows.with_row_index("#").join(self.erased.select(names).unique(), on=names, how="semi")["#"]
            hit |= pl.Series(np.isin(np.arange(len(rows)), at.to_numpy()))
        return hit

    @functools.cached_property
    def row_ids(self) -> pl.Series:
        """Ids of the feature rows of the erased rows, if the source is the spine."""
        found = [pl.Series("row_id", [], pl.Int64)]
        for view in self.views:
            names = [*view.key, view.time]
            if self.source.name == view.spine.name and all(name in self.erased.columns for name in names):
                found.append(row_ids(view.name, [self.erased[name] for name in names]))
        return pl.concat(found)

    def erase_predictions(self, live_row_ids: Collection[int]) -> tuple[int, set[int]]:
        """Removes predictions for the erased rows, and those of live feature rows with these ids.

        Returns:
            How many, and their ids.
        """
        count, ids = 0, set[int]()
        for name in (*self._tables("predictions"), *self._tables("predictions_live")):
            gone = pl.Series(live_row_ids if name.startswith("predictions_live/") else [], dtype=pl.Int64)

            def matches(group: pa.Table, path: str, gone: pl.Series = gone) -> Bools:
                rows = frame(group)
                hit = self._predicted(rows) | rows["row_id"].is_in(gone.implode())
                ids.update(rows["prediction_id"].filter(hit).to_list())
                return hit.to_numpy()

            count += self._rewrite(name, matches)
        return count, ids

    def _predicted(self, rows: pl.DataFrame) -> pl.Series:
        """Whether each prediction is for an erased row: by its id, or by key and time, for any view."""
        names = [
            name
            for name in rows.columns
            if name not in _OF_PREDICTIONS and not name.startswith(("score", "__")) and name != "scored_at"
        ]
        hit = rows["row_id"].is_in(self.row_ids.implode())
        if str(self.source.time) not in names or not {*names} <= {*self.erased.columns}:
            return hit
        wanted = self.erased.select(names).unique().cast({name: rows.schema[name] for name in names})
        found = rows.select(names).with_row_index("#").join(wanted, on=names, how="semi")["#"]
        return hit | pl.Series(np.isin(np.arange(len(rows)), found.to_numpy()))

    def _rewrite(self, name: str, matches: Matches) -> int:
        uri = self._uri(name)
        count = rewrite_delta(uri, matches, self.metadata)
        purge(uri)
        return count

    def erase_examples(self, unaffected_runs: Collection[str]) -> int:
        """Removes the training examples of every run, unless the run is known to have been trained on other data."""
        count = 0
        for model, run in folders(os.path.join(self.store, "examples"), 2):
            if run not in unaffected_runs:
                count += sum(1 for _ in files_below(os.path.join(self.store, "examples", model, run)))
                shutil.rmtree(os.path.join(self.store, "examples", model, run))
        return count

    def erase_runs(self, registered_runs: Collection[str], unaffected_runs: Collection[str]) -> int:
        """Removes files of runs that show rows: reports, trials, examples of differences."""
        count = 0
        for (run,) in folders(os.path.join(self.store, "runs"), 1):
            if run == self.run_id or run in unaffected_runs:
                continue
            folder = os.path.join(self.store, "runs", run)
            pipeline = pipeline_of(folder)
            keep = set(_FIGURES)
            if pipeline in ("training", "retrain", None) and run not in registered_runs:
                keep |= _UNREGISTERED
            if pipeline in ("parity", "verify"):
                keep = {MARKER}
            elif pipeline not in ("training", "retrain", None):
                continue
            for each in os.scandir(folder):
                if each.name not in keep:
                    count += 1
                    shutil.rmtree(each.path) if each.is_dir() else os.remove(each.path)
        return count

    def erase_from_registry(self, model_folders: Collection[str]) -> int:
        """Removes example rows and reports of registered models; the models themselves stay unchanged."""
        count = 0
        for folder in model_folders:
            example = {"input_example.json": (), "serving_input_example.json": ("dataframe_split",)}
            for name, inside in example.items():
                path = os.path.join(folder, name)
                if not os.path.isfile(path):
                    continue
                with explain_damage("The example rows of a model can be read", path, "Restore or delete the file"):
                    content = parse_object(read_regular(path))
                    rows = functools.reduce(lambda held, key: held[key], inside, content)
                    found = bool(rows["data"])
                if found:
                    rows["data"], count = [], count + 1
                    write_file_atomically(folder, name, pa.py_buffer(json.dumps(content).encode()))
            above = os.path.dirname(folder.rstrip("/"))
            for name in ("report.html", "report.json"):
                path = os.path.join(above, name)
                if os.path.isfile(path) and os.path.getsize(path) != len(_REMOVED[name]):
                    write_file_atomically(above, name, pa.py_buffer(_REMOVED[name]))
                    count += 1
        return count

    def erase_source(self) -> int:
        """Removes the rows from the files of the source, and the files of its older versions."""
        count, own = 0, sources_root(self.store)
        for place in self.places:
            if self.keep_sources and os.path.dirname(place.folder) != own.rstrip("/"):
                continue
            matches = functools.partial(place.matches, self.condition)
            if place.delta:
                revise = self._recounted(place)
                count += rewrite_delta(place.folder, matches, self.metadata, place.open, revise)
                purge(place.folder)
                continue
            for path in place.paths:
                if matching_rows(place.open(path), path, matches):
                    count += write_without(place.open(path), path, matches, path)[1]
            for file in files_below(place.folder):
                if TEMPORARY_FILE.fullmatch(os.path.basename(file.path)):
                    os.remove(file.path)
        return count

    def _recounted(self, place: SourceFiles) -> Revise:
        """Marks accepted rows as counted that repeated an erased one.

        Whether a row of history counts, or one of a store of before, is decided when it is accepted and then only
        stored (`fates`).  Of one `unique` value, the first row that is left counts if one that did is erased.
        """
        name = self.source.name
        view = next((each for each in self.views if name in each.events and repeats_by(each, name)), None)
        if view is None:
            return lambda rows: rows
        order, found = known_order(view, name), list[pl.DataFrame]()
        for path in place.paths:
            file = place.open(path)
            if not {*ORIGIN_COLUMNS, "__counted", *order.unique} <= set(file.schema_arrow.names):
                return lambda rows: rows  # no accepted rows
            for number in range(file.num_row_groups):
                group = file.read_row_group(number)
                columns = list(dict.fromkeys([*order.unique, order.time, *known_columns(view, name)]))
                rows = place.rows(group, path, columns)
                fates = frame(group.select([each for each in FATES if each in group.column_names]))
                stored = pl.concat([rows, fates], how="horizontal").with_columns(
                    pl.Series("#gone", place.matches(self.condition, group, path))
                )
                found.append(stored.join(self.erased, on=order.unique, how="semi"))
        return _counting(newly_counted(order, pl.concat(found, how="diagonal"))) if found else lambda rows: rows

    def unread_files(self) -> list[str]:
        """Files beside those of the source that no command reads, and that an erasure does not change."""
        return sorted(
            file.path
            for place in self.places
            if not place.delta
            for file in files_below(place.folder)
            if file.path not in place.paths
        )


# Columns of accepted rows that say where they come from and whether they count.
FATES = (*ORIGIN_COLUMNS, "__counted", "__uncompared")


def newly_counted(order: KnownOrder, rows: pl.DataFrame) -> pl.DataFrame:
    """The origins of rows that count from now on, of those whose fate is stored.

    Args:
        order: of the source.
        rows: accepted rows with `FATES` and `#gone`, whether they are erased.
    """
    if "__uncompared" not in rows.columns:
        rows = rows.with_columns(pl.lit(None, pl.Boolean).alias("__uncompared"))
    stored = rows.filter((pl.col("__partition") == HISTORY_PARTITION) | pl.col("__uncompared").is_null())
    counts = pl.col("__counted").fill_null(True)
    lost = stored.filter("#gone", counts)
    left = stored.filter(~pl.col("#gone"))
    left = left.join(lost, on=order.unique, how="semi").join(left.filter(counts), on=order.unique, how="anti")
    return order.first(left).select(ORIGIN_COLUMNS)


def _counting(origins: pl.DataFrame) -> Revise:
    def revise(rows: pa.Table) -> pa.Table:
        if not len(origins):
            return rows
        mine = frame(rows.select(ORIGIN_COLUMNS)).with_row_index("#")
        at = mine.join(origins.cast({name: mine.schema[name] for name in ORIGIN_COLUMNS}), on=ORIGIN_COLUMNS)["#"]
        if not len(at):
            return rows
        hit = pl.Series(np.isin(np.arange(len(rows)), at.to_numpy()))
        counted = frame(rows.select(["__counted"]))["__counted"] | hit
        return rows.set_column(rows.column_names.index("__counted"), "__counted", counted.to_arrow())

    return revise


def _with_ids(row_ids: Collection[int]) -> Matches:
    ids = pl.Series(list(row_ids), dtype=pl.Int64)

    def matches(group: pa.Table, path: str) -> Bools:
        return frame(group.select(["row_id"]))["row_id"].is_in(ids.implode()).to_numpy()

    return matches


_REMOVED = {
    "report.html": b"<!doctype html><title>Report</title><p>This report showed values of rows that were erased.\n",
    "report.json": b'{"removed": "this report showed values of rows that were erased"}\n',
}


def could_see(view: FeatureView, source: Source, erased: pl.DataFrame, rows: pl.DataFrame) -> pl.Series:
    """Whether each feature row could see one of the erased rows: one with the same key, within the window's length.

    A row of a table that lacks a column of the key counts as one that could.
    """
    seen = pl.Series(np.zeros(len(rows), np.bool_))
    moment = rows[view.time].to_physical()
    for feature in view.features:
        if isinstance(feature, Derived) or feature.source.name != source.name:
            continue
        mine, theirs = [spine for spine, _ in feature.keys], [column for _, column in feature.keys]
        if not {*mine} <= {*rows.columns} or not {*theirs} <= {*erased.columns}:
            return pl.Series(np.ones(len(rows), np.bool_))
        keys = dict(zip(theirs, mine, strict=True))
        gone = erased.select(pl.col(column).cast(rows.schema[name]).alias(name) for column, name in keys.items())
        asked = rows.select(mine).with_columns(moment.alias("#at")).with_row_index("#")
        if source.time is None:
            found = asked.join(gone.unique(), on=mine, how="semi")
        else:  # of the erased rows with its key, the last one that was known before it decides
            known = gone.with_columns(erased[source.time].to_physical().alias("#known")).drop_nulls().sort("#known")
            last = asked.sort("#at").join_asof(known, left_on="#at", right_on="#known", by=mine, check_sortedness=False)
            length = _length(feature)
            found = last.filter(pl.col("#at") - pl.col("#known") <= (2**62 if length is None else length))
        hit = pl.Series(np.isin(np.arange(len(rows)), found["#"].to_numpy()))
        seen |= hit
    return seen


def _length(feature: Trailing | Latest | Lookup) -> int | None:
    """The longest window of a feature in µs; None for a lifetime window."""
    if isinstance(feature, Trailing):
        lengths = [each.length for each in feature.statistics]
        return None if None in lengths else max(each for each in lengths if each is not None)
    return feature.length if isinstance(feature, Latest) else None


def pipeline_of(folder: str) -> str | None:
    """The pipeline of a run, from its figures; None if it has none."""
    try:
        return str(parse_object(read_regular(os.path.join(folder, "run.json")))["pipeline"])
    except (OSError, *DAMAGE):
        return None
