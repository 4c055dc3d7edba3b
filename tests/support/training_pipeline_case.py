"""Helpers and fixtures for: the training pipeline on files: features table → registered champion; refusals; the same
run twice."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def flags(store: Path, run_id: str, *more: str) -> list[str]:
    return [
        "--definition",
        str(store / "definition.py"),
        "--store",
        str(store),
        "--run_id",
        run_id,
        "--threads=1",
        *more,
    ]


def account(store: Path, run_id: str) -> dict[str, Any]:
    return json.loads((store / "runs" / run_id / "training.json").read_text())  # type: ignore[no-any-return]
