"""erase: remove rows of a source, and everything in the store that was made from them, for good."""

from __future__ import annotations

import dataclasses
import os
import socket
import uuid
from collections.abc import Mapping, Sequence

from beam_pipelines.runtime.arguments import Arguments
from beam_pipelines.runtime.run_report import Run
from beam_pipelines.runtime.terminal import many, wrapped
from beam_pipelines.runtime.trained_models import trained
from schemas.errors import ConflictError, DefinitionError, StoreError, nearest
from schemas.loading import Definition, load_definition
from schemas.sources import Source
from transforms.lineage.erasure import Condition, Erasure, holding
from transforms.lineage.erasure_records import ErasureRecord, erasures, now_text
from transforms.models.registry import Registry, registry_uri
from transforms.storage.file_systems import FileSystems
from transforms.storage.run_markers import running_runs

BEYOND = (
    "topics of Kafka and consumer groups; backups and snapshots of disks; files that were exported (--output_tfrecord, "
    "copies of examples); the state of jobs on other machines; statistics that schema.pbtxt holds (string domains); "
    "logs and shell histories"
)


def main(argv: Sequence[str]) -> int:
    """Remove rows of a source, and everything in the store that was made from them, for good."""
    arguments = Arguments("millrace erase", main.__doc__ or "", beam=False)
    arguments.add_argument("source", help="name of the source, as the definition declares it")
    arguments.add_argument(
        "--where", required=True, metavar="SQL", help="condition on the source's columns: \"customer = 'c17'\""
    )
    arguments.add_argument("--sources", help="folder of the sources, also of other stores (default: <store>/sources)")
    arguments.add_argument("--registry", help="MLflow tracking URI (default: SQLite under <store>/registry)")
    arguments.add_argument("--dry_run", action="store_true", help="count what would be removed, and change nothing")
    flags = arguments.parse_all(argv)
    if "://" in flags.store or "://" in (flags.sources or ""):
        raise StoreError("erase works on folders", flags.store, "Copy the store to a disk, or mount it")
    definition = load_definition(flags.definition)
    condition = Condition(source_of(definition, flags.source), flags.where)
    roots = (os.path.abspath(flags.sources),) if flags.sources else ()
    erasure = Erasure(definition, condition, flags.store, roots, f"erase-{uuid.uuid4().hex[:12]}")
    _ = condition.expression  # refused before anything is read
    refuse_while_held(flags.store)
    models = trained(flags.store, flags.registry)
    if flags.dry_run:
        preview(erasure, models)
        return 0
    begun = unfinished(erasure)
    if not len(erasure.erased) and begun is None:
        print(f"no row of {flags.source} matches: nothing was changed")
        return 0
    with Run("erase", erasure.run_id, FileSystems.join(flags.store, "runs", erasure.run_id)) as run:
        run.update(erase(erasure, begun, models, flags.registry))
    print_rest(erasure, erasure.affected_models(models))
    return 0


def source_of(definition: Definition, name: str) -> Source:
    """The source that the definition declares under this name.

    Raises:
        DefinitionError: there is none.
    """
    view = definition.view
    declared = {view.spine.name: view.spine, **view.sources}
    if definition.model is not None:
        declared.setdefault(definition.model.label.source.name, definition.model.label.source)
    if name not in declared:
        rule = f"The definition declares the sources {', '.join(declared)}"
        raise DefinitionError(rule, repr(name), nearest(name, declared))
    return declared[name]


def refuse_while_held(store: str) -> None:
    """
    Raises:
        ConflictError: a run or a live job works on the store.
    """
    for each in holding(running_runs(store), socket.gethostname()):
        raise ConflictError(
            "Nothing works on a store while rows are erased from it",
            f"run {each.run_id} ({each.pipeline}), started {each.started:%Y-%m-%d %H:%M} UTC on {each.host}",
            f"Wait for it or stop it. If it was killed, delete {store}/runs/{each.run_id}/started.json",
        )


def unfinished(erasure: Erasure) -> ErasureRecord | None:
    """An erasure from this source that was interrupted."""
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
    ids = {*record.row_ids, *erasure.row_ids.to_list()}
    record = dataclasses.replace(record, row_ids=tuple(sorted(ids)), models=tuple(sorted({*record.models, *affected})))
    record.write(erasure.store)  # from here on `trace` finds it, and the same command completes the erasure
    unaffected = {str(each.get("run_id")) for each in models.values()}
    unaffected -= {str(models[name].get("run_id")) for name in affected}
    registered = {str(each.get("run_id")) for name, each in models.items() if not name.startswith("run ")}
    counts = {"training_files": erasure.erase_examples(unaffected)}
    counts["report_files"] = erasure.erase_runs(registered, unaffected)
    counts["report_files"] += erasure.erase_from_registry(model_folders(erasure, affected, registry))
    counts["predictions"], predictions = erasure.erase_predictions()
    record = dataclasses.replace(record, prediction_ids=tuple(sorted({*record.prediction_ids, *predictions})))
    record.write(erasure.store)
    counts["live_features"] = erasure.erase_live_features()
    counts["dead_letters"] = erasure.erase_dead_letters()
    counts["feature_tables"] = erasure.erase_features()
    counts["source_rows"] = erasure.erase_source()
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
    """Prints what the next runs have to do, and what was not reached."""
    if affected:
        print("models trained on such rows: they keep what they learned until they are trained again")
        for name in affected:
            print(wrapped(f"{name}", hanging=2))
        print(wrapped("train again, then delete these versions and their artifacts in MLflow", hanging=2))
    for path in erasure.unread_files():
        print(wrapped(f"not read and not changed: {path}", 0, hanging=2))
    print(wrapped(f"not reached: {BEYOND}", 0, hanging=2))
    print("next: millrace features, training and inference make their tables again without these rows")
