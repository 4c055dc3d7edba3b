"""retrain: train a registered version again from what it records, and compare the models."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from datetime import date
from pathlib import Path

import apache_beam as beam
import pyarrow as pa
from apache_beam.pvalue import AsSingleton

from beam_pipelines.runtime.arguments import Arguments
from beam_pipelines.runtime.errors import guard
from beam_pipelines.runtime.local_runner import batch_pipeline
from beam_pipelines.runtime.run_report import Run, execute
from beam_pipelines.training import TrainingOptions, resolve, train_and_test
from schemas.durations import instant
from schemas.errors import DataError, MismatchError, StoreError
from schemas.loading import load_recorded
from transforms.evaluation.evaluate import Report, metrics_record
from transforms.models.bundle import Bundle, load_bundle
from transforms.models.registry import Registry, registry_uri
from transforms.models.stored_records import ModelManifest, ProvenanceRecord, RetrainingRecord
from transforms.storage.delta_log import root_of
from transforms.storage.delta_tables import write_file_atomically
from transforms.storage.file_systems import FileSystems
from transforms.training.examples import ExamplesAccount, delete_files
from transforms.training.preparation import code_digest, constraints_digest, path_within_source, path_within_store
from transforms.training.publish_model import read_record
from transforms.training.trainer import Trained
from transforms.training.trial_log import logged_metrics

AGAIN = "retrain.json"


@dataclasses.dataclass(frozen=True)
class Comparison:
    """The comparison of a version that was trained again with the registered one.

    Args:
        metrics: test metrics of the new training.
        apart: by metric, the registered and the new value if they differ.
        same_model: whether booster and encoders are the same.
    """

    metrics: Mapping[str, float]
    apart: Mapping[str, tuple[float | None, float]]
    same_model: bool

    def require_same(self, what: str, causes: Sequence[str]) -> None:
        """Checks that there is no difference.

        Raises:
            MismatchError: the model or a metric differs.
        """
        if not self.apart and self.same_model:
            return
        values = ", ".join(f"{metric} was {was}, is {value}" for metric, (was, value) in self.apart.items())
        raise MismatchError(
            f"{what} comes out the same from what it records",
            values or "the booster's bytes differ",
            "; ".join(causes) or "Train on the type of machine that it was trained on: XGBoost's sums depend on it",
        )


def main(argv: Sequence[str]) -> int:
    """Trains a registered version again and compares; returns 0 if model and metrics are the same to the last bit."""
    flags, rest = _arguments().parse(argv)
    registry = Registry(registry_uri(flags.store, flags.registry))
    name = flags.model or only_model(registry)
    version, folder = registry.resolve(name, flags.version)
    bundle = load_bundle(folder)
    with (
        recorded_options(bundle, flags.store, registry.uri, flags.run_id, tuple(rest)) as options,
        Run("retrain", flags.run_id, options.folder) as run,
    ):
        differences = train_again(bundle, options)
        found = compare_again(bundle, options, logged_metrics(registry, name, version))
        same = {"same_metrics": not found.apart, "same_model": found.same_model}
        run.update({"model": name, "version": version, **found.metrics, **same})
        delete_files([options.examples])
    found.require_same(f"Version {version} of {name}", differences)
    return 0


def _arguments() -> Arguments:
    arguments = Arguments("millrace retrain", main.__doc__ or "", definition=None)
    arguments.add_argument("version", help="a registered version's number")
    arguments.add_argument("--model", help="its registered name (default: that of the store's only model)")
    arguments.add_argument("--registry", help="MLflow tracking URI (default: SQLite under <store>/registry)")
    return arguments


def train_again(bundle: Bundle, options: TrainingOptions) -> list[str]:
    """Runs the training pipeline up to its test, and returns what differs from the conditions of the first training."""
    plan, provenance = resolve(options)
    differences = changed(bundle, provenance)
    for each in differences:
        print(f"retrain: {each}", file=sys.stderr, flush=True)
    pipeline = batch_pipeline(options.beam_args)
    tested = train_and_test(pipeline, options, plan, provenance)
    _ = tested.report | "Leave" >> beam.Map(
        leave, AsSingleton(tested.trained), AsSingleton(tested.account), options.folder
    )
    execute(pipeline)
    return differences


def compare_again(bundle: Bundle, options: TrainingOptions, before: Mapping[str, float]) -> Comparison:
    """Compares the model that `train_again` left with the registered `bundle` and its metrics `before`."""
    found = read_record(RetrainingRecord, options.folder, AGAIN)
    again = load_bundle(options.bundle)
    now = {f"test_{metric}": value for metric, value in found["metrics"].items() if value is not None}
    apart = {metric: (before.get(metric), value) for metric, value in now.items() if before.get(metric) != value}
    return Comparison(now, apart, again.booster == bundle.booster and again.encoders == bundle.encoders)


def only_model(registry: Registry) -> str:
    """The registry's only model.

    Raises:
        DataError: there is none, or there are several.
    """
    with registry.client() as client:
        names = [] if client is None else sorted(each.name for each in client.search_registered_models())
    if len(names) != 1:
        raise DataError("A model is named where there are several", ", ".join(names) or "none", "Write --model NAME")
    return str(names[0])


@contextlib.contextmanager
def recorded_options(
    bundle: Bundle, store: str, registry: str, run_id: str, beam_args: tuple[str, ...]
) -> Iterator[TrainingOptions]:
    """The options of the run that trained the bundle, with another run id.

    The recorded definition is a file for as long as the context is open.

    Raises:
        StoreError: the version was registered before Millrace recorded what this needs.
    """
    manifest = bundle.manifest
    missing = [key for key in ("read", "definition", "cores", "feature_table") if key not in manifest]
    if missing or "source" not in manifest["definition"]:
        raise StoreError(
            "A version records what it was trained on",
            f"no {', '.join(missing) or 'definition'}",
            "Train it again with: millrace training",
        )
    read = manifest["read"]
    with tempfile.TemporaryDirectory() as folder:
        recorded = manifest["definition"]
        name = str(recorded["name"])
        if "modules" not in recorded:  # earlier versions of Millrace kept only the file of the definition
            name = "definition.py"
        project = load_recorded(name, recorded["source"], recorded.get("modules", {}), Path(folder))
        definition = project.definition(model=str(manifest["model"]))
        if definition.require_model().rows.fingerprint != bundle.fingerprint:
            raise MismatchError(
                "The recorded definition gives the recorded fingerprint",
                f"{definition.require_model().rows.fingerprint} and {bundle.fingerprint}",
                "Use the code version that trained it: " + str(manifest.get("code_version")),
            )
        cutoff = instant(read["cutoff"]).date()
        yield TrainingOptions(
            definition=definition,
            store=store,
            sources=recorded_sources_folder(manifest, store),
            run_id=run_id,
            features_versions=_versions(manifest),
            start=date.fromisoformat(read["start"]) if read["start"] else None,
            cutoff=cutoff,
            registry=registry,
            cores=manifest["cores"],
            device=manifest["device"],
            keep_examples=False,
            now=read["now"],
            beam_args=beam_args,
            label_version=manifest["label_table"]["version"],
        )


def _versions(manifest: ModelManifest) -> dict[str, int]:
    """Versions of the feature tables that a model was trained on, by view."""
    views = manifest.get("views")
    versions = (
        {manifest["view"]: manifest["feature_table"]["version"]}
        if views is None
        else {each["view"]: each["version"] for each in views}
    )
    return {view: version for view, version in versions.items() if version is not None}


def recorded_sources_folder(manifest: ModelManifest, store: str) -> str:
    """The folder of sources that a version was trained on; one within its store is found in `store`."""
    sources, table = str(manifest["read"]["sources"]), str(manifest["feature_table"]["uri"])
    if "://" in sources or os.path.isabs(sources):
        # Earlier versions of Millrace recorded whole paths: <store>/features/<view>/<fingerprint> gives the store.
        sources = path_within_store(root_of(table).rsplit("/", 3)[0], sources)
    return sources if "://" in sources or os.path.isabs(sources) else FileSystems.join(store, sources)


def changed(bundle: Bundle, provenance: ProvenanceRecord) -> list[str]:
    """Sentences that name what differs from the conditions of the first training.

    Raises:
        MismatchError: the label's source, which has no versions, has other files now.
    """
    before = bundle.manifest
    if provenance["label_table"]["version"] is None:
        content = "label_content" in before
        then, now = _label_files(before, content), _label_files(provenance, content)
        gone = sorted(path for path in {*then, *now} if then.get(path) != now.get(path))
        if gone:
            raise MismatchError(
                "The label's source holds the files that the version was trained on",
                f"{len(gone)} differ, as {gone[0]}",
                "Restore them; a source that is a Delta table keeps its versions",
            )
    words = []
    if before["code_sha256"] != code_digest():
        words.append(
            f"the code is not that of the version ({before['code_version']}, SHA-256 {before['code_sha256'][:12]})"
        )
    if before["constraints_sha256"] != constraints_digest():
        words.append(
            f"the installed packages are not those of the version (SHA-256 {before['constraints_sha256'][:12]})"
        )
    return words


def _label_files(manifest: ProvenanceRecord, content: bool) -> Mapping[str, str]:
    """What identifies each file of the label's source, by path: its content, or its size and time of modification.

    Earlier versions of Millrace recorded only the latter.
    """
    if content:
        digests: Mapping[str, str] = manifest["label_content"]
        return digests
    pairs = (each.partition(" ") for each in manifest["label_files"])
    return {path_within_source(str(manifest["label_table"]["uri"]), path): stamp for stamp, _, path in pairs}


def leave(report: Report, trained: Trained, account: ExamplesAccount, folder: str) -> None:
    """Writes the report where the launching process reads it."""
    content: RetrainingRecord = {**metrics_record(report), "digest": trained.digest, "feature_rows": account.rows}
    write_file_atomically(folder, AGAIN, pa.py_buffer(json.dumps(content).encode()))


if __name__ == "__main__":
    sys.exit(guard(main)(sys.argv[1:]))
