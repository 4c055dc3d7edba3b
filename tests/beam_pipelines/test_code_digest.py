"""The digest that `millrace retrain` compares covers the whole program, whichever package a module is in."""

from __future__ import annotations

from pathlib import Path

import pytest

from transforms.training import preparation

ROOT = Path(__file__).parents[2]
MODULES = sorted(
    path.relative_to(ROOT).as_posix()
    for name in ("schemas", "transforms", "beam_pipelines")
    for path in (ROOT / name).rglob("*.py")
)


def test_every_module_of_the_program_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in MODULES:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("x = 1\n")
    monkeypatch.setattr(preparation, "__file__", str(tmp_path / "transforms" / "training" / "preparation.py"))
    digests = {preparation.code_digest()}
    assert digests == {preparation.code_digest()}
    for name in MODULES:
        (tmp_path / name).write_text(f"x = {name!r}\n")
        digests.add(preparation.code_digest())
    assert len(digests) == 1 + len(MODULES) > 100


def test_a_module_that_moves_is_another_program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preparation, "__file__", str(tmp_path / "transforms" / "training" / "preparation.py"))
    for name in ("transforms/features/plan.py", "beam_pipelines/training.py"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("x = 1\n")
    before = preparation.code_digest()
    (tmp_path / "transforms/features/plan.py").rename(tmp_path / "transforms/plan.py")
    assert preparation.code_digest() != before
