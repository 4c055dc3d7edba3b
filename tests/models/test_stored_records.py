"""Stored JSON of a model: a damaged file is refused by file and key; what is not known yet is kept."""

import json
from pathlib import Path
from typing import Any

import pytest

from schemas.errors import StoreError
from tests.support.trained_models import trained
from transforms.models.bundle import load_bundle, model_manifest, save_bundle
from transforms.storage.paths import MANIFEST


def changed(folder: Path, **values: Any) -> None:
    path = folder / MANIFEST
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


@pytest.mark.parametrize(
    ("name", "value", "key"),
    [
        ("classes", "2", "classes"),
        ("key", "flight", "key"),
        ("inputs", {"age": 3}, "inputs.age"),
        ("feature_table", {"uri": "here", "version": "newest"}, "feature_table.version"),
        ("rounds", 1.5, "rounds"),
        ("split", [], "split"),
    ],
)
def test_a_value_of_another_type_is_named_by_file_and_key(tmp_path: Path, name: str, value: Any, key: str) -> None:
    save_bundle(trained(), tmp_path)
    changed(tmp_path, **{name: value})
    for read in (load_bundle, model_manifest):
        with pytest.raises(StoreError, match=rf"{MANIFEST}: {key}: .*Restore the file"):
            read(tmp_path)


def test_a_key_of_another_version_is_kept(tmp_path: Path) -> None:
    save_bundle(trained(), tmp_path)
    changed(tmp_path, later={"a": [1, 2.5, None]})
    assert load_bundle(tmp_path).manifest["later"] == {"a": [1, 2.5, None]}
