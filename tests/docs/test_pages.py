"""Pages that list things list all of them: commands, stored names, decisions."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from beam_pipelines.cli import COMMANDS
from schemas import live, tables
from schemas.splits import LABEL, LABEL_TIME
from transforms.sources import dead_letters

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"


@pytest.mark.parametrize("command", COMMANDS)
def test_readme_names_every_command(command: str) -> None:
    commands = (ROOT / "README.md").read_text(encoding="utf-8").split("## Commands")[1].split("##")[0]
    assert re.search(rf"\b{command}\b", commands)


@pytest.mark.parametrize("page", sorted(path.name for path in DOCS.glob("*.md")))
def test_readme_links_to_every_page(page: str) -> None:
    assert f"(docs/{page})" in (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_glossary_translates_every_column_of_ours_with_underscores() -> None:
    schemas = (
        live.ORIGIN_FIELDS,
        live.LIVE_COLUMNS,
        live.SEEN,
        dead_letters.LIVE_DEAD_LETTERS,
        dead_letters.DEAD_LETTERS,
        tables.PREDICTION,
    )
    names = {name for schema in schemas for name in schema.names if name.startswith("__")} | {LABEL, LABEL_TIME}
    glossary = (DOCS / "glossary.md").read_text(encoding="utf-8").split("## Stored names")[1]
    assert {"__cut", "__label"} <= names
    assert not [name for name in sorted(names) if f"`{name}`" not in glossary]


def test_no_term_of_the_glossary_is_explained_twice() -> None:
    terms = re.findall(r"^\| (\*\*.*?) \|", (DOCS / "glossary.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert len(terms) > 50
    assert sorted({*terms}) == sorted(terms)


def test_decisions_are_numbered_as_their_titles_say() -> None:
    files = sorted((DOCS / "adr").glob("*.md"))
    for number, path in enumerate(files, 1):
        assert path.name.startswith(f"{number:04}-"), f"{path.name}: the next number is {number:04}"
        assert path.read_text(encoding="utf-8").startswith(f"# {number}. "), path.name
