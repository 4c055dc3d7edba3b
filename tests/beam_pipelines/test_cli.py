"""The command line starts without what it does not need."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from beam_pipelines import features
from tests.support import shop
from tests.support.trained_models import trained
from transforms.models.registry import Registry, registry_uri

HEAVY = ("apache_beam", "polars", "pyarrow", "numpy", "mlflow", "xgboost", "tensorflow")
# Each takes as long to import as these commands may take together.
SLOW = (
    "apache_beam",
    "google.protobuf",
    "mlflow",
    "pandas",
    "scipy",
    "sklearn",
    "sqlalchemy",
    "tensorflow",
    "tensorflow_data_validation",
    "tensorflow_metadata",
    "xgboost",
)


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys; from beam_pipelines.cli import main; assert main(['--help']) == 0; "
        f"print('loaded:', sorted(set({HEAVY!r}) & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "loaded: []"


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store with a feature table, one day of its spine that is not computed, and a registered model."""
    folder = tmp_path_factory.mktemp("store")
    definition = shop.write(folder, 200)
    argv = ["--definition", str(definition), "--store", str(folder), "--end", "2024-02-20", "--no-statistics"]
    assert features.main([*argv, "--verify", "0"]) == 0
    registry = Registry(registry_uri(str(folder)))
    registry.promote("delay", registry.register(trained(), "run-1"), "the first")
    return folder


def slow_modules(argv: list[str], exit_code: int) -> str:
    """The slow modules that a command has imported when it ends, as a list in text."""
    code = (
        "import sys; from beam_pipelines.cli import main\n"
        f"try: code = main({argv!r})\n"
        "except SystemExit as done: code = done.code or 0\n"
        f"assert code == {exit_code}, code\n"
        f"print('loaded:', sorted(set({SLOW!r}) & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()[-1]


@pytest.mark.parametrize("command", ["plan", "tables", "models", "trace", "promote", "rollback", "vacuum", "new"])
def test_help_of_a_command_that_runs_no_pipeline_imports_nothing_slow(command: str) -> None:
    assert slow_modules([command, "--help"], 0) == "loaded: []"


@pytest.mark.parametrize(
    ("command", "exit_code"),
    [
        ("tables --store STORE", 0),
        ("plan --definition STORE/definition.py --store STORE", 0),
        ("plan --definition STORE/definition.py --store STORE --full --plan shuffle", 0),
        ("trace --definition STORE/definition.py --store STORE --key visit=1", 0),
        ("models --store STORE", 0),
        ("models --store STORE --model other", 3),
        ("vacuum --store STORE", 0),
    ],
)
def test_a_command_that_only_looks_imports_nothing_slow(store: Path, command: str, exit_code: int) -> None:
    assert slow_modules(command.replace("STORE", str(store)).split(), exit_code) == "loaded: []"
