"""What the pages show is so: the Python blocks of README.md and docs/ run, each page from top to bottom; links lead to
files, headings, and functions of the code."""

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parent.parent
PAGES = [
    path
    for path in (
        *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")),
        *sorted((ROOT / "docs").rglob("*.md")),
    )
    if path.exists()
]
BLOCK = re.compile(r"^```python(?P<info>[^\n]*)\n(?P<code>.*?)^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\[[^\]]*\]\((?!https?:)(?P<path>[^)#\s]*)(?:#(?P<heading>[^)\s]*))?\)")


def blocks(page: Path) -> list[tuple[int, str, str]]:
    """(line, file it is to be written to or "", code) of every Python block."""
    text = page.read_text(encoding="utf-8")
    found = []
    for match in BLOCK.finditer(text):
        info = match["info"].strip()
        assert not info or re.fullmatch(r"file=\w+\.py", info), (
            f"{page.name}: a Python block says nothing, or file=name.py; got {info!r}"
        )
        found.append((text[: match.start("code")].count("\n") + 1, info.removeprefix("file="), match["code"]))
    return found


@pytest.mark.parametrize(
    "page", [page for page in PAGES if blocks(page)], ids=lambda page: page.relative_to(ROOT).as_posix()
)
def test_python_blocks_run(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    names: dict[str, object] = {"__name__": "docs"}
    for line, file, code in blocks(page):
        if file:
            (tmp_path / file).write_text(code, encoding="utf-8")
            # Also after the test: another one may have a module of this name.
            monkeypatch.setitem(sys.modules, file.removesuffix(".py"), ModuleType(file))
            del sys.modules[file.removesuffix(".py")]
        # Blank lines in front make a traceback show the line of the page.
        exec(compile("\n" * (line - 1) + code, str(page), "exec"), names)


def anchors(page: Path) -> set[str]:
    """What a link may name after `#`: headings, as GitHub writes them, or functions, classes and methods of a
    module."""
    text = page.read_text(encoding="utf-8")
    if page.suffix == ".py":
        return set(definitions(ast.parse(text)))
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def definitions(tree: ast.Module | ast.ClassDef, above: str = "") -> Iterator[str]:
    """Names of the functions and classes of a module, methods as `Class.method`."""
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            yield above + node.name
            if isinstance(node, ast.ClassDef):
                yield from definitions(node, f"{above}{node.name}.")


def broken_links(page: Path, text: str) -> list[str]:
    """Links of `text`, which stands in `page`, that lead nowhere."""
    found = []
    for match in LINK.finditer(text):
        target = page.parent / match["path"] if match["path"] else page
        if not target.exists() or (match["heading"] and match["heading"] not in anchors(target)):
            found.append(match.group())
    return found


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_lead_somewhere(page: Path) -> None:
    assert not broken_links(page, page.read_text(encoding="utf-8"))


def test_a_broken_link_is_found() -> None:
    good = (
        "[a](tour.md#7-the-kernel) [b](../schemas/loading.py#load_definition) "
        "[c](../transforms/streaming/shards.py#Shard.apply)"
    )
    bad = (
        "[a](tour.md#no-stop)",
        "[b](../schemas/loading.py#no_function)",
        "[c](../transforms/streaming/shards.py#apply)",
        "[d](no.md)",
    )
    assert broken_links(ROOT / "docs" / "tour.md", good + " ".join(bad)) == list(bad)


def test_every_stop_of_the_tour_links_to_code() -> None:
    stops = (ROOT / "docs" / "tour.md").read_text(encoding="utf-8").split("\n## ")[1:]
    assert len(stops) >= 10
    for stop in stops:
        assert re.search(r"\]\(\.\./\w+/[\w/]+\.py", stop), stop.splitlines()[0]
