"""What a command prints may go to a full disk, a reader that has gone, or nowhere: it does its work all the same."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ENTRY = [sys.executable, "-W", "ignore", "-c", "import sys; from beam_pipelines.cli import main; sys.exit(main())"]
ROOT = Path(__file__).parents[3]


def ended(words: str, redirect: str, folder: Path) -> tuple[int, str, str]:
    """Exit code, standard output and standard error of a command, as a shell redirects it."""
    out, error = folder / "out", folder / "error"
    shell = f'"$@" {words} >{out} 2>{error} {redirect}; exit ${{PIPESTATUS[0]}}'
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(["bash", "-c", shell, "-", *ENTRY], check=False, env=environment, timeout=120)
    return done.returncode, out.read_text(), error.read_text()


@pytest.mark.parametrize(
    ("words", "redirect", "code", "said"),
    [
        ("--help", "", 0, ""),
        ("--help", ">/dev/full", 4, "what was printed is lost: No space left on device; the work is done"),
        ("tables --help", ">/dev/full", 4, "what was printed is lost"),
        ("--help", ">&-", 0, ""),
        ("--help", "> >(true)", 0, ""),
        ("nothing", "", 2, "The command must be one of"),
        ("nothing", "2>/dev/full", 2, ""),
        ("nothing", "2>&-", 2, ""),
        ("nothing", ">/dev/full 2>/dev/full", 2, ""),
    ],
)
def test_output_that_cannot_be_written_is_no_error_of_the_work(
    words: str, redirect: str, code: int, said: str, tmp_path: Path
) -> None:
    found, out, error = ended(words, redirect, tmp_path)
    assert found == code, error
    assert said in error
    assert "Traceback" not in error
    assert error.count("\n") <= 1
    assert (out == "") == (redirect != "" or code == 2)
