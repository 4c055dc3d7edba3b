"""The models of a store: those in its registry, and those of runs that could not register them."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping
from pathlib import Path

from beam_pipelines.runtime.run_report import log, read_json
from schemas.errors import MillraceError
from transforms.models.registry import Registry, registry_uri
from transforms.storage.paths import MANIFEST, table_path_in_store
from transforms.storage.stored_json import read_object
from transforms.storage.vacuum import pins_of


def trained(store: str, registry: str | None, whole: bool = True) -> dict[str, Mapping[str, object]]:
    """Manifests of every model whose training data must be kept: those registered, and those trained in this store.

    Args:
        store: address of the store.
        registry: MLflow tracking URI; None means the store's own.
        whole: raise an error if a manifest cannot be read, because its data must not be deleted; otherwise warn and
            leave it out.

    Raises:
        StoreError: the registry or a model in it cannot be read, and `whole` is set.
    """
    found: dict[str, Mapping[str, object]] = {}

    @contextlib.contextmanager
    def reading(what: str) -> Iterator[None]:
        try:
            yield
        except (MillraceError, OSError, ValueError) as error:
            if whole:
                raise
            log.warning("%s cannot be read, so it is not known what was trained on: %s", what, error)

    with reading("the model registry"):
        models = Registry(registry_uri(store, registry))
        for name, version in models.models():
            with reading(f"model {name} {version}"):
                found[f"{name} {version}"] = read_json(os.path.join(models.resolve(name, version)[1], MANIFEST))
    runs = Path(store, "runs")  # they may be in another registry, or theirs was unreachable
    for path in sorted(runs.glob(f"*/model/{MANIFEST}")) if "://" not in store else ():
        with reading(f"the model of run {path.parts[-3]}"):
            rule, fix = "The manifest of a trained model can be read", "Restore it, or delete its run's folder"
            found.setdefault(f"run {path.parts[-3]}", read_object(str(path), rule, fix))
    return found


def models_trained_on(store: str, table: str, version: int | None) -> list[str]:
    """Names and versions, or runs, of the models that were trained on the table up to this version."""
    every = trained(store, None, whole=False)
    # A registered model's manifest is also in the folder of its run.
    registered = {manifest.get("run_id") for name, manifest in every.items() if not name.startswith("run ")} - {None}
    return [
        f"{name} (table version {pin.version})"
        for name, manifest in every.items()
        if not (name.startswith("run ") and manifest.get("run_id") in registered)
        for pin in pins_of({name: manifest})
        if pin.table == table_path_in_store(table) and version is not None and pin.version <= version
    ]
