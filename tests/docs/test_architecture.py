"""The picture of `docs/architecture.md` is the one that its script draws from the imports, and the script reads them
all."""

from __future__ import annotations

from pathlib import Path

from docs import draw_architecture
from docs.draw_architecture import draw, read_graph, reduced, with_picture


def test_the_picture_is_drawn_from_the_imports() -> None:
    page = draw_architecture.PAGE.read_text(encoding="utf-8")
    assert with_picture(page, draw(read_graph())) == page, "run: python docs/draw_architecture.py"


def test_every_package_is_described() -> None:
    page = draw_architecture.PAGE.read_text(encoding="utf-8").split("## What each package is for")[1]
    packages = {path.parent.name for path in (draw_architecture.ROOT / "transforms").glob("*/__init__.py")}
    assert not [name for name in sorted(packages) if f"`transforms.{name}`" not in page]


def test_imports_of_every_kind_are_drawn(tmp_path: Path) -> None:
    files = {
        "schemas/views.py": "import polars\n",
        "transforms/records/ids.py": "from ...schemas import views\n",
        "transforms/storage/__init__.py": "from ..records import ids\n",
        "transforms/features/kernel.py": "def f():\n    import transforms.records.ids\n",
        "transforms/serving.py": "from transforms.features import kernel\n",
        "beam_pipelines/features_streaming.py": "from transforms.features.kernel import f\n",
        "beam_pipelines/cli.py": "COMMANDS = {'features': 'beam_pipelines.features:main'}\n",
    }
    for name, source in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(source)
    assert read_graph(tmp_path) == {
        "schemas": frozenset(),
        "transforms.records": {"schemas"},
        "transforms.storage": {"transforms.records"},
        "transforms.features": {"transforms.records"},
        "beam_pipelines.features": {"transforms.features"},
        "beam_pipelines.cli": {"beam_pipelines.features"},
    }


def test_the_picture_leaves_out_only_what_follows_from_it() -> None:
    graph = {"a": frozenset("bc"), "b": frozenset("cd"), "c": frozenset(), "d": frozenset("b")}
    assert reduced(graph) == {"a": {"b"}, "b": {"c", "d"}, "c": frozenset(), "d": {"b"}}
