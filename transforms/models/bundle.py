"""A trained model as a folder of plain files whose digests detect any change.

It has no code and no pickle: the booster is XGBoost's UBJSON, encoders and manifest are JSON.  The manifest has the
SHA-256 of the other files, and the registry has that of the manifest.  Nothing is parsed before its digest is checked.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TypeVar, cast

from schemas.errors import StoreError
from transforms.models.encoders import Fitted
from transforms.models.stored_records import BundleFiles, ModelManifest
from transforms.storage import durable
from transforms.storage.file_systems import FileSystems
from transforms.storage.paths import BOOSTER, ENCODERS, MANIFEST
from transforms.storage.stored_json import DAMAGE, parse_record, read_regular, reason_of

Record = TypeVar("Record")
FORMAT = 1
# MLflow's description of a model, and the one loader module that it may name.
MLMODEL, LOADER = "MLmodel", "transforms.serving"
_REQUIRED = ("model", "objective", "classes", "fingerprint", "view", "key", "time", "inputs")
_RESTORE = "Restore the file from a backup, or train and register the model again"


@dataclasses.dataclass(frozen=True, eq=False)
class Bundle:
    """A trained model, and everything that scoring needs.

    Args:
        booster: XGBoost's UBJSON, cut to the best round: scoring uses every round in it.
        encoders: fitted on the training split.
        manifest: what the model is, and its provenance: tables and their versions, split dates, code, environment.
        extra: further files by name, such as statistics of the training data; the manifest has their digests, too.
    """

    booster: bytes
    encoders: Fitted
    manifest: ModelManifest
    extra: Mapping[str, bytes] = dataclasses.field(default_factory=dict)

    @property
    def name(self) -> str:
        return str(self.manifest["model"])

    @property
    def fingerprint(self) -> str:
        return str(self.manifest["fingerprint"])

    @property
    def classes(self) -> int:
        """Scores per row."""
        return int(self.manifest["classes"] or 1)


def save_bundle(bundle: Bundle, folder: str | Path) -> str:
    """Write the bundle into `folder` (local, or any filesystem Beam knows) and return its digest.

    The manifest is written last: after an interrupted write it is missing, or its digests do not match the files.

    Raises:
        StoreError: the manifest lacks a required entry, or the folder cannot be written.
    """
    missing = [name for name in _REQUIRED if name not in bundle.manifest]
    if missing:
        raise StoreError(f"A model's manifest has {', '.join(_REQUIRED)}", f"no {', '.join(missing)}", "Add them")
    files = {BOOSTER: bundle.booster, ENCODERS: bundle.encoders.to_json().encode(), **bundle.extra}
    digests = {name: {"sha256": _sha256(content), "bytes": len(content)} for name, content in files.items()}
    manifest = {**bundle.manifest, "format": FORMAT, "files": digests}
    text = json.dumps(manifest, indent=1, sort_keys=True, ensure_ascii=False, allow_nan=False).encode()
    try:
        for name, content in (*files.items(), (MANIFEST, text)):
            path = FileSystems.join(str(folder), name)
            if "://" not in path:
                durable.write_file(path, content)
                continue
            with FileSystems.create(path, "application/octet-stream") as handle:
                handle.write(content)
    except OSError as error:
        raise StoreError(
            "A model's folder can be written", f"{folder}: {error}", "Grant access or free space"
        ) from None
    return _sha256(text)


def load_bundle(folder: str | Path, digest: str | None = None) -> Bundle:
    """Load the bundle in `folder`; all digests are checked before anything is parsed.

    Args:
        folder: a folder that `save_bundle` wrote.
        digest: the manifest's expected SHA-256; None accepts the manifest as it is.

    Raises:
        StoreError: a file is missing or was altered; the message has both digests.
    """
    check_mlmodel(folder)
    text = read_bytes(folder, MANIFEST)
    if digest is not None:
        check_digest(folder, MANIFEST, text, digest)
    about = _parsed(BundleFiles, text, folder)
    files = {name: entry["sha256"] for name, entry in about["files"].items()}
    if about["format"] != FORMAT or not {BOOSTER, ENCODERS} <= set(files) or any("/" in name for name in files):
        value = f"{folder}: {', '.join(sorted(files))}"
        raise StoreError(
            f"A model has format {FORMAT}: {BOOSTER} and {ENCODERS}", value, "Read it with the Millrace that wrote it"
        )
    contents = {name: read_bytes(folder, name) for name in files}
    for name, expected in files.items():
        check_digest(folder, name, contents[name], expected)
    booster, encoders = contents.pop(BOOSTER), contents.pop(ENCODERS)
    stored = _parsed(ModelManifest, text, folder).items()
    manifest = {name: value for name, value in stored if name not in BundleFiles.__annotations__}
    try:
        fitted = Fitted.from_json(encoders.decode())
    except DAMAGE as error:
        value = f"{folder}/{ENCODERS}: {reason_of(error)}"
        raise StoreError("A model's encoders are as Millrace writes them", value, _RESTORE) from None
    return Bundle(booster, fitted, cast(ModelManifest, manifest), contents)


def _parsed(kind: type[Record], text: bytes, folder: str | Path) -> Record:
    try:
        return parse_record(kind, text)
    except DAMAGE as error:
        value = f"{folder}/{MANIFEST}: {reason_of(error)}"
        raise StoreError("A model's manifest is JSON as Millrace writes it", value, _RESTORE) from None


def model_manifest(folder: str | Path) -> ModelManifest:
    """The manifest in a model's folder; the other files are not looked at.

    Raises:
        StoreError: it cannot be read, or is not as Millrace writes it.
    """
    return _parsed(ModelManifest, read_bytes(folder, MANIFEST), folder)


def bundle_digest(folder: str | Path) -> str:
    """SHA-256 of the folder's manifest, which identifies every file of the bundle."""
    return _sha256(read_bytes(folder, MANIFEST))


def check_digest(folder: str | Path, name: str, content: bytes, expected: str) -> None:
    if (found := _sha256(content)) != expected:
        value = f"{folder}/{name} with SHA-256 {found}, saved with {expected}"
        raise StoreError("A model's files are as they were saved", value, _RESTORE)


def check_mlmodel(folder: str | Path) -> None:
    """Refuse an `MLmodel` that makes MLflow run other code than Millrace's loader.  There need not be one.

    Nothing is imported: the file is parsed as plain YAML.

    Raises:
        StoreError: it names another loader, or code or data to load; or it cannot be read.
    """
    path = FileSystems.join(str(folder), MLMODEL)
    if not (FileSystems.exists(path) if "://" in path else os.path.lexists(path)):
        return
    import yaml

    rule, fix = f"MLflow loads a model of Millrace with {LOADER}, and with no other code", "Register the model again"
    try:
        found = yaml.safe_load(read_bytes(folder, MLMODEL))
        flavor = found["flavors"].get("python_function", {})
        foreign = sorted(set(found["flavors"]) - {"millrace", "python_function"})
        keys = sorted(set(flavor) - {"loader_module", "python_version"})
        loader = flavor.get("loader_module", LOADER)
    except (yaml.YAMLError, *DAMAGE) as error:
        value = f"{path}: {(str(error).splitlines() or [repr(error)])[0]}"
        raise StoreError(f"{MLMODEL} describes a model of MLflow", value, fix) from None
    if loader != LOADER or keys or foreign:
        named = f"loader_module {loader!r}" if loader != LOADER else ", ".join(map(str, [*keys, *foreign]))
        raise StoreError(rule, f"{path} with {named}", fix)


def read_bytes(folder: str | Path, name: str) -> bytes:
    """The content of a file.

    Raises:
        StoreError: it cannot be read, or is not a regular file.
    """
    path = FileSystems.join(str(folder), name)
    try:
        return read_regular(path)
    except OSError as error:
        raise StoreError(
            "A model's files can be read", f"{path}: {getattr(error, 'strerror', None) or error}", _RESTORE
        ) from None


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
