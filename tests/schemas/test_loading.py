"""Definitions with neighbours: what they import is recorded, and loads again whatever stands in its place later."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from schemas.errors import DefinitionError
from schemas.loading import decode_python, load_definition, load_recorded

DEFINITION = """
import polars as pl
from schemas import Derived, FeatureView, Source
{imports}
orders = Source("orders", time="at", columns={{"k": pl.Int64, "price": pl.Float64}})
view = FeatureView("vw", spine=orders, key="k", features=[Derived(double=pl.col("price") * FACTOR)])
"""


def write(folder: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text, encoding="utf-8")


FILES = {
    "definition.py": DEFINITION.format(imports="from rates.fees import FACTOR\nimport json, colours"),
    "rates/__init__.py": "",
    "rates/fees.py": "from .base import BASE\nFACTOR = BASE * 2",
    "rates/base.py": "BASE = 1.5  # é",
    "rates/unused.py": "raise SystemExit",
    "colours.py": "from bare import inside",
    "bare/inside.py": "def late():\n    import afterwards\n",
    "afterwards.py": "",
}
KEPT = ["bare/inside.py", "colours.py", "rates/__init__.py", "rates/base.py", "rates/fees.py"]


def test_a_file_imports_its_neighbours_which_are_recorded(tmp_path: Path) -> None:
    write(tmp_path, FILES)
    found = load_definition(str(tmp_path / "definition.py"))
    assert list(found.modules) == KEPT
    assert found.source.decode() == FILES["definition.py"]
    assert str(tmp_path) not in sys.path
    # Neighbours of the same names are another definition's own.
    write(tmp_path / "other", {**FILES, "rates/base.py": "BASE = 7.0"})
    other = load_definition(str(tmp_path / "other/definition.py"))
    assert other.view.fingerprint != found.view.fingerprint
    assert load_definition(str(tmp_path / "definition.py")).view.fingerprint == found.view.fingerprint


@pytest.mark.parametrize("after", ["changed", "gone"])
@pytest.mark.parametrize("by_name", [False, True])
def test_a_recorded_definition_loads_whatever_became_of_its_neighbours(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, after: str, by_name: bool
) -> None:
    package = f"case_{after}"
    imports = "from .rates.fees import FACTOR" if by_name else "from rates.fees import FACTOR"
    folder = tmp_path / package if by_name else tmp_path
    write(folder, {**FILES, "definition.py": DEFINITION.format(imports=imports)})
    name = f"{package}.definition" if by_name else str(folder / "definition.py")
    monkeypatch.syspath_prepend(tmp_path)
    before = load_definition(name)
    assert [path.rpartition("/")[2] for path in before.modules] == ["__init__.py", "base.py", "fees.py"]
    texts = {path: decode_python(source) for path, source in before.modules.items()}
    for path in folder.rglob("*.py"):
        path.write_text("raise RuntimeError") if after == "changed" else path.unlink()
    (tmp_path / "again").mkdir()
    loaded = set(sys.modules)
    again = load_recorded(name, decode_python(before.source), texts, tmp_path / "again").definition()
    assert again.view.fingerprint == before.view.fingerprint
    assert before.modules.items() <= again.modules.items()
    assert {each for each in sys.modules if not each.startswith("millrace_definition")} <= loaded
    assert not any(str(tmp_path / "again") in each for each in sys.path)


def test_the_encoding_that_a_file_declares_is_kept(tmp_path: Path) -> None:
    text = "# -*- coding: latin-1 -*-\nNAME = 'café'\n" + DEFINITION.format(imports="FACTOR = len(NAME)")
    (tmp_path / "definition.py").write_bytes(text.encode("latin-1"))
    found = load_definition(str(tmp_path / "definition.py"))
    (tmp_path / "again").mkdir()
    again = load_recorded("definition.py", decode_python(found.source), {}, tmp_path / "again").definition()
    assert (again.source, again.view.fingerprint) == (found.source, found.view.fingerprint)


@pytest.mark.parametrize("path", ["../evil.py", "/tmp/evil.py", "a/../../evil.py", ""])
def test_a_recorded_module_stays_in_its_folder(tmp_path: Path, path: str) -> None:
    (tmp_path / "again").mkdir()
    with pytest.raises(DefinitionError, match="lie in one folder"):
        load_recorded("definition.py", "", {path: "x = 1"}, tmp_path / "again")
