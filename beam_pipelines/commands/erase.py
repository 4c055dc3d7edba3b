"""erase: remove rows of a source, and everything in the store that was made from them, for good."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import os
import tempfile
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path

from beam_pipelines.runtime.arguments import Arguments
from beam_pipelines.runtime.run_report import Run
from beam_pipelines.runtime.terminal import many, wrapped
from beam_pipelines.runtime.trained_models import trained
from schemas.errors import DefinitionError, StoreError, nearest
from schemas.loading import Project, load_project, load_recorded
from schemas.sources import Source
from transforms.lineage.erasure import Condition, Erasure
from transforms.lineage.erasure_records import ErasureRecord, erasures, now_text
from transforms.models.bundle import load_bundle
from transforms.models.registry import Registry, registry_uri
from transforms.storage.file_systems import FileSystems
from transforms.storage.run_markers import ERASE, require_no_erasure

BEYOND = (
    "topics of Kafka and consumer groups; backups and snapshots of disks; files that were exported (--output_tfrecord, "
    "copies of examples); the state of jobs on other machines; statistics that schema.pbtxt holds (string domains); "
    "logs and shell histories"
)


def main(argv: Sequence[str]) -> int:
    """Remove rows of a source, and everything in the store that was made from them, for good."""
    arguments = Arguments("millrace erase", main.__doc__ or "", definition=False, beam=False, every="all")
    arguments.add_argument("source", help="name of the source, as the definition declares it")
    arguments.add_argument(
        "--where", required=True, metavar="SQL", help="condition on the source's columns: \"customer = 'c17'\""
    )
    arguments.add_argument("--sources", help="folder of the sources, also of other stores (default: <store>/sources)")
    arguments.add_argument(
        "--keep_sources",
        action="store_true",
        help="leave the rows in the folder --sources, since another store reads it too (for all stores but the last)",
    )
    arguments.add_argument("--registry", help="MLflow tracking URI (default: SQLite under <store>/registry)")
    arguments.add_argument("--dry_run", action="store_true", help="count what would be removed, and change nothing")
    flags = arguments.parse_all(argv)
    require_own_sources(flags)
    if "://" in flags.store or "://" in (flags.sources or ""):
        raise StoreError("erase works on folders", flags.store, "Copy the store to a disk, or mount it")
    with contextlib.ExitStack() as stack:
        project = project_of(flags, stack)
        condition = Condition(source_of(project, flags.source), flags.where)
        roots = (os.path.abspath(flags.sources),) if flags.sources else ()
        run_id = f"erase-{uuid.uuid4().hex[:12]}"
        erasure = Erasure(tuple(project.views.values()), condition, flags.store, roots, run_id, flags.keep_sources)
        _ = condition.expression  # refused before anything is read
        require_no_erasure(flags.store, ERASE)
        models = trained(flags.store, flags.registry)
        if flags.dry_run:
            preview(erasure, models)
            return 0
        if not len(erasure.erased) and not erasure.in_versions and unfinished(erasure) is None:
            print(f"no row of {flags.source} matches: nothing was changed")
            return 0
        with Run(ERASE, erasure.run_id, FileSystems.join(flags.store, "runs", erasure.run_id)) as run:
            erasure = dataclasses.replace(erasure)  # live jobs may have accepted rows before the marker was written
            run.update(erase(erasure, unfinished(erasure), models, flags.registry))
        print_rest(erasure, erasure.affected_models(models))
    return 0


def project_of(flags: argparse.Namespace, stack: contextlib.ExitStack) -> Project:
    """The definition that is named, or the newest one with the source that a registered model has recorded.

    Args:
        flags: the flags of the command.
        stack: keeps the files of a recorded definition while it is open.

    Raises:
        DefinitionError: no model has recorded one with the source.
    """
    if flags.definition:
        return load_project(flags.definition)
    registry, found = Registry(registry_uri(flags.store, flags.registry)), list[str]()
    for name, version in sorted(registry.models(), key=lambda each: int(each[1]), reverse=True):
        _, folder, digest = registry.locate(name, version)
        recorded = load_bundle(folder, digest).manifest.get("definition") or {}
        if "source" not in recorded or "modules" not in recorded:  # manifests of earlier versions of Millrace
            continue
        files = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        project = load_recorded(str(recorded["name"]), recorded["source"], recorded["modules"], files)
        if flags.source in project.sources:
            print(f"by the definition that model {name} {version} has recorded")
            return project
        found.append(f"{name} {version}")
    raise DefinitionError(
        "Without --definition, that of a registered model is used",
        f"no model has recorded one with a source {flags.source!r} (looked at: {', '.join(found) or 'none'})",
        "Name the file with --definition",
    )


def require_own_sources(flags: argparse.Namespace) -> None:
    """
    Raises:
        DefinitionError: rows would be removed from the sources of another store, but stay in its tables.
    """
    if not flags.sources or flags.keep_sources:
        return
    other, name = os.path.split(os.path.abspath(flags.sources))
    there = [each for each in ("features", "features_live", "runs") if os.path.isdir(os.path.join(other, each))]
    if name == "sources" and there and other != os.path.abspath(flags.store):
        raise DefinitionError(
            "Rows are erased from the sources of a store together with all that the store made of them",
            f"--sources {flags.sources}, of the store {other}",
            f"Add --keep_sources here; then erase them in their own store, with --store {other}",
        )


def source_of(project: Project, name: str) -> Source:
    """The source that the definition declares under this name.

    Raises:
        DefinitionError: there is no such source.
    """
    if name not in project.sources:
        rule = f"The definition declares the sources {', '.join(project.sources)}"
        raise DefinitionError(rule, repr(name), nearest(name, project.sources))
    return project.sources[name]


def unfinished(erasure: Erasure) -> ErasureRecord | None:
    """An interrupted erasure from this source, if there is one."""
    return next(
        (each for each in erasures(erasure.store) if each.source == erasure.source.name and each.finished is None), None
    )


def erase(
    erasure: Erasure, begun: ErasureRecord | None, models: Mapping[str, Mapping[str, object]], registry: str | None
) -> dict[str, object]:
    """Erases, and returns the figures of the run.

    Args:
        begun: the record of the same erasure, if it was interrupted.
        models: manifests of all models.
        registry: tracking URI; None: the store's own.
    """
    record = begun or ErasureRecord(erasure.run_id, erasure.source.name, now_text())
    affected = erasure.affected_models(models)
    record = dataclasses.replace(
        record,
        row_ids=tuple(sorted({*record.row_ids, *erasure.row_ids.to_list()})),
        live_row_ids=tuple(sorted({*record.live_row_ids, *erasure.live_row_ids.to_list()})),
        models=tuple(sorted({*record.models, *affected})),
    )
    record.write(erasure.store)  # from here on `trace` finds it, and the same command completes the erasure
    unaffected = {str(each.get("run_id")) for each in models.values()}
    unaffected -= {str(models[name].get("run_id")) for name in affected}
    registered = {str(each.get("run_id")) for name, each in models.items() if not name.startswith("run ")}
    counts = {"training_files": erasure.erase_examples(unaffected)}
    counts["report_files"] = erasure.erase_runs(registered, unaffected)
    counts["report_files"] += erasure.erase_from_registry(model_folders(erasure, affected, registry))
    counts["predictions"], predictions = erasure.erase_predictions(record.live_row_ids)
    record = dataclasses.replace(record, prediction_ids=tuple(sorted({*record.prediction_ids, *predictions})))
    record.write(erasure.store)
    counts["live_features"] = erasure.erase_live_features(record.live_row_ids)
    counts["dimension_versions"] = erasure.erase_dimension_versions()
    counts["dead_letters"] = erasure.erase_dead_letters()
    counts["feature_tables"] = erasure.erase_features()
    counts["source_rows"] = erasure.erase_source()
    os.sync()  # deleted files stay deleted after a power cut
    totals = {name: record.counts.get(name, 0) + count for name, count in counts.items()}
    dataclasses.replace(record, finished=now_text(), counts=totals).write(erasure.store)
    return {"source": erasure.source.name, **counts, "erasure": record.erasure_id, "models": affected}


def model_folders(erasure: Erasure, affected: Sequence[str], registry: str | None) -> list[str]:
    """Folders of the registered models among `affected` that lie on this machine."""
    known = Registry(registry_uri(erasure.store, registry))
    names = [name.rsplit(" ", 1) for name in affected if not name.startswith("run ")]
    found = [known.resolve(name, version)[1] for name, version in names]
    return [folder for folder in found if os.path.isdir(folder)]


def preview(erasure: Erasure, models: Mapping[str, Mapping[str, object]]) -> None:
    """Prints what would be erased."""
    rows = erasure.rows
    print(f"would erase {many(sum(rows.values()), 'row')} of {erasure.source.name} in {many(len(rows), 'file')}")
    for path, count in rows.items():
        print(wrapped(f"{path}: {many(count, 'row')}", hanging=2))
    if not rows:
        return
    for name in erasure.feature_tables:
        print(wrapped(f"{name}: all versions; the next features run computes it again", hanging=2))
    print_rest(erasure, erasure.affected_models(models))


def print_rest(erasure: Erasure, affected: Sequence[str]) -> None:
    """Prints what the next runs have to do, and what was not erased."""
    if affected:
        print("models trained on such rows: they keep what they learned until they are trained again")
        for name in affected:
            print(wrapped(f"{name}", hanging=2))
        print(wrapped("train again, then delete these versions and their artifacts in MLflow", hanging=2))
    for path in erasure.unread_files():
        print(wrapped(f"not read and not changed: {path}", 0, hanging=2))
    print(wrapped(f"not reached: {BEYOND}", 0, hanging=2))
    print("next: millrace features, training and inference make their tables again without these rows")
