"""What the pages for people show runs: the Python blocks of README.md and docs/, each page from top to bottom."""

import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGES = [path for path in (ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))) if path.exists()]
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
            monkeypatch.delitem(sys.modules, file.removesuffix(".py"), raising=False)
        # Blank lines in front make a traceback show the line of the page.
        exec(compile("\n" * (line - 1) + code, str(page), "exec"), names)


def anchors(page: Path) -> set[str]:
    """Headings as GitHub links to them."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_lead_somewhere(page: Path) -> None:
    for match in LINK.finditer(page.read_text(encoding="utf-8")):
        target = page.parent / match["path"] if match["path"] else page
        assert target.exists(), f"{page.name} links to {match['path']}"
        if match["heading"]:
            assert match["heading"] in anchors(target), f"{page.name} links to {match.group()}"
