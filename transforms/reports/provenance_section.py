"""Everything that is needed to train the model of a training report again."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from transforms.models.stored_records import ModelManifest, TrainingRecord
from transforms.reports.formatting import DASH


@dataclasses.dataclass(frozen=True)
class Provenance:
    """The content of the section.

    Args:
        again: the command that trains the model again; None before it is registered.
        made_of: (kind of input, its identity) of everything that the model was made from.
        source: the definition's text.
    """

    again: str | None
    made_of: tuple[tuple[str, str], ...]
    source: str | None


def provenance(content: TrainingRecord, manifest: ModelManifest) -> Provenance:
    known: Mapping[str, object] = manifest
    definition, version = manifest.get("definition") or {}, content.get("model_version")
    made_of = (
        ("run", manifest.get("run_id", DASH)),
        ("bundle", content["bundle"]),
        ("definition", f"{definition.get('name', DASH)}, SHA-256 {definition.get('sha256', DASH)}"),
        ("code", f"{manifest.get('code_version', DASH)}, SHA-256 {manifest.get('code_sha256', DASH)}"),
        ("packages, SHA-256", manifest.get("constraints_sha256", DASH)),
        ("environment", _pairs(manifest.get("environment") or {})),
        ("cores, device, seed", ", ".join(f"{known.get(name, DASH)}" for name in ("cores", "device", "seed"))),
        ("parameters", _pairs(manifest.get("params", {})) or DASH),
    )
    return Provenance(f"millrace retrain {version}" if version else None, made_of, definition.get("source") or None)


def _pairs(named: Mapping[str, object]) -> str:
    return ", ".join(f"{name} {value}" for name, value in named.items())
