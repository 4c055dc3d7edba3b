"""No test of before the packages was lost: see `tests/data/test_ids/README.md`."""

from __future__ import annotations

from pathlib import Path

import pytest

FOLDER = Path(__file__).parent / "data" / "test_ids"
WITHOUT_SUCCESSOR = {"tests/test_layout.py::test_no_file_is_two_rooms"}


def lines(name: str) -> list[str]:
    return (FOLDER / name).read_text(encoding="utf-8").splitlines()


def test_every_earlier_test_has_a_successor() -> None:
    moved = dict(line.split("\t") for line in lines("moved.tsv"))

    def present(name: str) -> str:
        module, test = name.split("::", 1)
        return moved.get(name, f"{moved.get(module, module)}::{test}")

    before = lines("before.txt")
    assert len(before) == 1448
    assert sorted(present(name) for name in before if name not in WITHOUT_SUCCESSOR) == lines("after.txt")


def test_a_run_of_everything_runs_the_successors(request: pytest.FixtureRequest) -> None:
    config = request.config
    if config.args != config.getini("testpaths") or config.option.keyword:
        pytest.skip("only some tests were chosen")
    chosen = {item.nodeid for item in request.session.items}
    assert [name for name in lines("after.txt") if name not in chosen] == []
