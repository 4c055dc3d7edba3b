"""A shop whose features are computed, and how a training run over it is started and its account read."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.support import shop


@pytest.fixture(scope="session")
def computed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store with the shop's sources and its feature table, which tests only read."""
    from beam_pipelines import features

    store = tmp_path_factory.mktemp("shop")
    path = shop.write(store)
    assert features.main(["--definition", str(path), "--store", str(store), "--run_id", "f"]) == 0
    return store


@pytest.fixture
def store(computed: Path, tmp_path: Path) -> Path:
    """A copy of the computed store, which a test may change."""
    return Path(shutil.copytree(computed, tmp_path / "store"))


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
