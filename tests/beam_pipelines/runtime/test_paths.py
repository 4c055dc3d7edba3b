"""Paths that a library would take for another one are refused before anything is written."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from beam_pipelines.runtime.arguments import Arguments
from schemas.errors import DefinitionError


@pytest.mark.parametrize("name", ["a%20b", "50%25", "two\nlines", "tab\there", "back\\slash", os.fsdecode(b"\xff")])
@pytest.mark.parametrize("flag", ["--store", "--definition"])
def test_a_path_that_means_another_is_refused(tmp_path: Path, name: str, flag: str) -> None:
    words = {"--store": str(tmp_path / "s"), "--definition": "d.py"} | {flag: str(tmp_path / name)}
    with pytest.raises(DefinitionError, match=flag) as caught:
        Arguments("millrace features", "").parse([word for pair in words.items() for word in pair])
    str(caught.value).encode()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["a b", "50% off", "n#1", "what?", "it's", "zürich", "-rf", "file:x", "[a]*{b}"])
def test_other_paths_pass(tmp_path: Path, name: str) -> None:
    found, _ = Arguments("millrace features", "", definition=None).parse([f"--store={tmp_path / name}"])
    assert found.store == str(tmp_path / name)
