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
from typing import Any

from schemas.errors import StoreError
from transforms.models.encoders import Fitted
from transforms.storage.file_systems import FileSystems
from transforms.storage.paths import BOOSTER, ENCODERS, MANIFEST

FORMAT = 1
_REQUIRED = ("model", "objective", "classes", "fingerprint", "view", "key", "time", "inputs")
_RESTORE = "Restore the file from a backup, or train and register the model again"


@dataclasses.dataclass(frozen=True, eq=False)
class Bundle:
    """A trained model, and everything that scoring needs.

    Args:
        booster: XGBoost's UBJSON, cut to the best round: scoring uses every round in it.
        encoders: fitted on the training split.
        manifest: JSON values.  `model` (its registered name), `objective`, `classes` (how many scores a row gets:
            1, or the classes of a multi-class model), `fingerprint`, `view`, `key` (list of columns), `time` (column),
            `inputs` (input column → Arrow type as text), and the model's provenance: tables and their versions, split
            dates, code version, environment.
        extra: further files by name, such as statistics of the training data; the manifest has their digests, too.
    """

    booster: bytes
    encoders: Fitted
    manifest: Mapping[str, Any]
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


def save(bundle: Bundle, folder: str | Path) -> str:
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
        _make_folder(str(folder))
        for name, content in (*files.items(), (MANIFEST, text)):
            with FileSystems.create(FileSystems.join(str(folder), name), "application/octet-stream") as handle:
                handle.write(content)
    except OSError as error:
        raise StoreError(
            "A model's folder can be written", f"{folder}: {error}", "Grant access or free space"
        ) from None
    return _sha256(text)


def load(folder: str | Path, digest: str | None = None) -> Bundle:
    """Load the bundle in `folder`; all digests are checked before anything is parsed.

    Args:
        folder: a folder that `save` wrote.
        digest: the manifest's expected SHA-256; None accepts the manifest as it is.

    Raises:
        StoreError: a file is missing or was altered; the message has both digests.
    """
    text = read_bytes(folder, MANIFEST)
    if digest is not None:
        check_digest(folder, MANIFEST, text, digest)
    try:
        manifest = json.loads(text)
        files = {name: str(entry["sha256"]) for name, entry in manifest.pop("files").items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        value = f"{folder}/{MANIFEST}: {error!r}"
        raise StoreError("A model's manifest is JSON that lists its files", value, _RESTORE) from None
    if (
        manifest.pop("format", None) != FORMAT
        or not {BOOSTER, ENCODERS} <= set(files)
        or any("/" in name for name in files)
    ):
        value = f"{folder}: {', '.join(sorted(files))}"
        raise StoreError(
            f"A model has format {FORMAT}: {BOOSTER} and {ENCODERS}", value, "Read it with the Millrace that wrote it"
        )
    contents = {name: read_bytes(folder, name) for name in files}
    for name, expected in files.items():
        check_digest(folder, name, contents[name], expected)
    booster, encoders = contents.pop(BOOSTER), contents.pop(ENCODERS)
    return Bundle(booster, Fitted.from_json(encoders.decode()), manifest, contents)


def digest_of(folder: str | Path) -> str:
    """SHA-256 of the folder's manifest, which identifies every file of the bundle."""
    return _sha256(read_bytes(folder, MANIFEST))


def check_digest(folder: str | Path, name: str, content: bytes, expected: str) -> None:
    if (found := _sha256(content)) != expected:
        value = f"{folder}/{name} with SHA-256 {found}, saved with {expected}"
        raise StoreError("A model's files are as they were saved", value, _RESTORE)


def read_bytes(folder: str | Path, name: str) -> bytes:
    path = FileSystems.join(str(folder), name)
    try:
        if "://" not in path:
            return Path(path).read_bytes()
        with FileSystems.open(path, "application/octet-stream") as handle:
            return bytes(handle.read())
    except OSError as error:
        raise StoreError(
            "A model's files can be read", f"{path}: {getattr(error, 'strerror', None) or error}", _RESTORE
        ) from None


def _make_folder(folder: str) -> None:
    if "://" not in folder:
        os.makedirs(folder, exist_ok=True)


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
