"""test: runs the tests beside a definition, without Beam and without files (see `schemas.testing`)."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import re
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import ModuleType

from beam_pipelines.runtime.arguments import Parser
from schemas.errors import DefinitionError, MillraceError
from schemas.loading import load_project

TEST_FILE = re.compile(r"test_\w+\.py|\w+_test\.py")


def test(argv: Sequence[str]) -> int:
    """Run the tests beside a definition: functions `test_…` in files `test_….py`; 1 when one fails."""
    parser = Parser("millrace test", description=test.__doc__)
    parser.add_argument("--definition", required=True, help="module, package or .py file that names views and models")
    parser.add_argument("--only", metavar="TEXT", default="", help="tests whose name contains this (default: all)")
    flags = parser.parse_args(list(argv))
    project = load_project(flags.definition)
    folder = Path(project.path).resolve().parent
    files = sorted(path for path in folder.rglob("*.py") if TEST_FILE.fullmatch(path.name) and _is_ours(path, folder))
    count, failed = 0, 0
    for path in files:
        for name, call in tests_in(path):
            if flags.only not in name:
                continue
            count += 1
            failed += not passes(f"{path.relative_to(folder)}::{name}", call)
    if not count:
        which = f" whose name contains {flags.only!r}" if flags.only else ""
        raise DefinitionError(
            f"There must be tests{which} beside {flags.definition}",
            f"there are none in {folder}",
            "Write functions test_… with schemas.testing in a file test_….py",
        )
    print(f"{count - failed} of {count} passed")
    return 1 if failed else 0


def _is_ours(path: Path, folder: Path) -> bool:
    """Whether a file lies in the folder itself, or in packages below it."""
    return all(
        (each / "__init__.py").exists() or each.name == "tests"
        for each in path.relative_to(folder).parents
        if str(each) != "."
    )


def tests_in(path: Path) -> Iterator[tuple[str, Callable[[], object]]]:
    """Name and function of each test of a file, in the order in which they stand."""
    for name, value in vars(imported(path)).items():
        if not name.startswith("test") or not inspect.isfunction(value):
            continue
        if inspect.signature(value).parameters:
            print(f"{path.name}::{name} needs arguments, and is left to pytest")
            continue
        yield name, value


def imported(path: Path) -> ModuleType:
    """The module of a test file; it can import its neighbours, and those of its package.

    Raises:
        DefinitionError: it cannot be imported.
    """
    root, parts = path.parent, [path.stem]
    while (root / "__init__.py").exists():
        parts.insert(0, root.name)
        root = root.parent
    if str(root) not in sys.path:
        sys.path.insert(0, str(root))
    try:
        return importlib.import_module(".".join(parts))
    except MillraceError:
        raise
    except Exception as error:
        value = f"{type(error).__name__}: {error}"
        raise DefinitionError(f"{path} must be importable", value, "Correct the file") from None


def passes(name: str, call: Callable[[], object]) -> bool:
    """Run one test, and print what came of it."""
    start = time.perf_counter()
    try:
        call()
    except Exception as error:
        frames = [each for each in traceback.extract_tb(error.__traceback__) if each.filename != __file__]
        own = next((each for each in reversed(frames) if TEST_FILE.fullmatch(Path(each.filename).name)), frames[-1])
        kind = "" if isinstance(error, AssertionError) and str(error) else f"{type(error).__name__}: "
        text = str(error) or str(own.line)
        print(f"FAILED {name}, line {own.lineno}: {kind}{text}")
        return False
    print(f"passed {name} ({1000 * (time.perf_counter() - start):.0f} ms)")
    return True
