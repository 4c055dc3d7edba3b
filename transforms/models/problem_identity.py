"""The prediction problem of a registered model.  A name stands for one problem, whatever features and parameters its
versions have."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping

from schemas.errors import MillraceError, MismatchError
from transforms.models.bundle import model_manifest
from transforms.models.registry import Registry
from transforms.models.stored_records import ModelManifest

log = logging.getLogger("millrace.training")


def problem_of(manifest: ModelManifest) -> dict[str, object]:
    """The problem in a manifest, as flat JSON values; manifests of earlier versions of Millrace have only a part of
    it."""
    if "problem" in manifest:
        return dict(manifest["problem"])
    parts = ("view", "key", "time", "objective")
    known: dict[str, object] = {name: value for name, value in manifest.items() if name in parts}
    if "uri" in manifest.get("label_table", {}):
        known["label_source"] = manifest["label_table"]["uri"].rstrip("/").rsplit("/", 1)[-1]
    return known


def require_same_problem(registry: Registry, name: str, mine: Mapping[str, object]) -> None:
    """Refuse a model whose name stands for another problem: that of its champion, or else of its newest version.

    A version that cannot be read is ignored, since the alias moves only after a comparison that reads it.

    Raises:
        StoreError: the registry cannot be reached.
        MismatchError: the problems differ; both are named.
    """
    version = registry.champion(name)
    if version is None:
        versions = registry.numbers(name)
        if not versions:
            return
        version = versions[-1]
    try:
        _, folder = registry.resolve(name, version)
        theirs = problem_of(model_manifest(folder))
    except MillraceError as error:
        log.warning("whether version %s of %r predicts the same is not known: %s", version, name, error)
        return
    apart = [part for part in mine if part in theirs and mine[part] != theirs[part] and not part.endswith("_shown")]
    if apart:
        was, now = (", ".join(f"{part} {_shown(each, part)}" for part in apart) for each in (theirs, mine))
        raise MismatchError(
            f"Versions of the registered model {name!r} predict the same thing",
            f"version {version} has {was}; this definition has {now}",
            f"Give this model a name of its own, as Model(…, name={name + '_2'!r}): "
            "its versions, champion, predictions and examples are then kept apart",
        )


def _shown(problem: Mapping[str, object], part: str) -> str:
    value = problem.get(f"{part}_shown", problem[part])
    return value if isinstance(value, str) else json.dumps(value)
