"""What `make check` runs, and what runs before a commit."""

from __future__ import annotations

import re
from pathlib import Path

import yaml

ROOT = Path(__file__).parent.parent


def commands_of_make_check() -> list[str]:
    """The commands that the target `check` runs, with the Makefile's variable filled in."""
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    (recipe,) = re.findall(r"^check:.*\n((?:\t.*\n)+)", makefile, re.MULTILINE)
    (python,) = re.findall(r"^PY := (.*)$", makefile, re.MULTILINE)
    return [line.strip().replace("$(PY)", python) for line in recipe.splitlines()]


def test_pre_commit_runs_the_linters_of_make_check() -> None:
    configuration = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8"))
    hooks = [hook for repository in configuration["repos"] for hook in repository["hooks"]]
    assert [hook["entry"] for hook in hooks] == [each for each in commands_of_make_check() if " -m " in each]
    assert {repository["repo"] for repository in configuration["repos"]} == {"local"}


def test_make_check_tests_the_lowest_layers_after_the_linters() -> None:
    *linters, tests = commands_of_make_check()
    assert all(" -m " in each for each in linters)
    assert tests.startswith("./run_local.sh test ")
