"""`millrace test`: runs what stands beside a definition, in a moment and without Beam."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from beam_pipelines.cli import main
from tests.support.project_case import MODELS, VIEWS

TESTS = """
from definition import buying
from schemas.testing import expect, features

VISIT = {"visit": 1, "shop": "north", "asked": "2024-01-05", "age": 40}

def test_a_sale_before_the_visit_counts():
    sold = [{"visit": 9, "shop": "north", "sold": "2024-01-04", "amount": 2.5}]
    expect(features(buying, [VISIT], sales=sold), [{"sales_by_shop_amount_mean_3d": 2.5}])

def test_that_fails():
    expect(features(buying, [VISIT]), [{"hour": 7}])

def test_with_a_fixture(tmp_path):
    raise RuntimeError
"""


def write(folder: Path, tests: str = TESTS, package: bool = False) -> Path:
    (folder / "definition.py").write_text(VIEWS + MODELS)
    (folder / "test_definition.py").write_text(tests)
    return folder / "definition.py"


def test_each_test_is_reported(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    path = write(tmp_path)
    assert main(["test", "--definition", str(path)]) == 1
    lines = capfd.readouterr().out.splitlines()
    assert lines[0].startswith("passed test_definition.py::test_a_sale_before_the_visit_counts (")
    line = TESTS.split("\n").index('    expect(features(buying, [VISIT]), [{"hour": 7}])') + 1
    assert lines[1:3] == [
        f"FAILED test_definition.py::test_that_fails, line {line}: features are not as expected",
        "  row 0, hour: 7 expected, 0 found",
    ]
    assert lines[3] == "test_definition.py::test_with_a_fixture needs arguments, and is left to pytest"
    assert lines[-1] == "1 of 2 passed"
    assert main(["test", "--definition", str(path), "--only", "sale"]) == 0


def test_it_takes_under_a_second_and_no_beam(tmp_path: Path) -> None:
    path = write(tmp_path, TESTS.replace('"hour": 7', '"hour": 0'))
    program = (
        "import sys, time\nfrom beam_pipelines.cli import main\n"
        f"code = main(['test', '--definition', {str(path)!r}])\n"
        "print(time.process_time(), sorted({'apache_beam', 'xgboost', 'mlflow', 'pandas'} & set(sys.modules)))\n"
        "sys.exit(code)"
    )
    took = []
    for _ in range(3):
        done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
        seconds, _, modules = done.stdout.splitlines()[-1].partition(" ")
        assert modules == "[]"
        took.append(float(seconds))
    assert min(took) < 1.0, took


@pytest.mark.parametrize(
    ("tests", "words", "message"),
    [
        ("x = 1", (), "There must be tests beside"),
        (TESTS, ("--only", "nothing"), "whose name contains 'nothing'"),
        ("import no_such_module", (), "test_definition.py must be importable; ModuleNotFoundError"),
    ],
)
def test_what_cannot_be_run_is_refused(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], tests: str, words: tuple[str, ...], message: str
) -> None:
    name = f"test_{len(tests)}_{len(words)}.py"
    path = write(tmp_path, tests)
    (tmp_path / "test_definition.py").rename(tmp_path / name)
    assert main(["test", "--definition", str(path), *words]) == 2
    assert message.replace("test_definition.py", name) in capfd.readouterr().err


def test_tests_of_a_package_import_from_it(tmp_path: Path) -> None:
    folder = tmp_path / "packed"
    (folder / "tests").mkdir(parents=True)
    (folder / "__init__.py").touch()
    (folder / "views.py").write_text(VIEWS)
    (folder / "tests" / "__init__.py").touch()
    (folder / "tests" / "test_views.py").write_text(TESTS.replace("from definition", "from packed.views"))
    assert main(["test", "--definition", str(folder), "--only", "sale"]) == 0
