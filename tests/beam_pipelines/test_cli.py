"""The command line starts without what it does not need."""

from __future__ import annotations

import subprocess
import sys

HEAVY = ("apache_beam", "polars", "pyarrow", "numpy", "mlflow", "xgboost", "tensorflow")


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys; from beam_pipelines.cli import main; assert main(['--help']) == 0; "
        f"print('loaded:', sorted(set({HEAVY!r}) & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "loaded: []"
