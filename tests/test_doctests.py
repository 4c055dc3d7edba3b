"""The `>>>` examples in docstrings print what they say."""

from __future__ import annotations

import doctest
import importlib
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
WITH_EXAMPLES = sorted(
    path.relative_to(ROOT).as_posix()
    for folder in ("schemas", "transforms", "beam_pipelines")
    for path in (ROOT / folder).rglob("*.py")
    if re.search(r"^\s*>>> ", path.read_text(encoding="utf-8"), re.MULTILINE)
)


def test_examples_are_found() -> None:
    assert {"schemas/durations.py", "transforms/records/exact_sums.py"} <= {*WITH_EXAMPLES}


@pytest.mark.parametrize("path", WITH_EXAMPLES)
def test_examples_of_a_module_run(path: str) -> None:
    module = importlib.import_module(path.removesuffix(".py").removesuffix("/__init__").replace("/", "."))
    found = doctest.testmod(module)
    assert found.attempted > 0, "the file has an example outside its docstrings"
    assert found.failed == 0, "an example prints something else: see the output above"
