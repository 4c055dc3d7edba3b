"""What commands print has no control characters and no secrets of others, and their files are for their user alone."""

import json
import logging
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from beam_pipelines import features
from beam_pipelines.runtime.errors import guard
from beam_pipelines.runtime.protection import hide, printable, terminal_of, without_secrets
from beam_pipelines.runtime.run_report import Run, figures_table, progress, write_json
from beam_pipelines.runtime.terminal import columns
from schemas.errors import DataError
from tests.support import market
from transforms.records.value_text import format_value

ATTACK = "a\x1b[2Kb\r\x9b31m\x08\u202ec\x7f"


@given(st.text())
def test_what_is_printed_has_no_control_characters(text: str) -> None:
    shown = printable(text)
    assert all(dead_letter.isprintable() or dead_letter in "\n\t" or ord(dead_letter) >= 0x80 for dead_letter in shown)
    assert not set(shown) & {"\x1b", "\r", "\x9b", "\u202e", "\x7f", "\u2028"}
    assert printable(shown) == shown


def test_every_way_out_of_a_command_is_escaped(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    def main(argv: object) -> int:
        print(ATTACK)
        sys.stderr.writelines([ATTACK])
        print(columns(["name", "x"], [[ATTACK + "\nforged", "1"]]))
        print(figures_table("t", {"x": ATTACK}))
        progress()
        logging.getLogger("millrace.test").warning("says %s", ATTACK)
        raise DataError("A rule", ATTACK, "")

    assert guard(main)([]) == 3
    out, error = capsys.readouterr()
    for text, times in ((out, 3), (error, 3)):
        assert text.count("a\\x1b[2Kb\\r\\x9b31m\\x08\\u202ec\\x7f") == times
        assert "\x1b" not in text
    assert "\nforged" not in out


def test_our_own_escape_sequences_reach_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    def main(argv: object) -> int:
        terminal_of(sys.stderr).write("\r\x1b[K")
        return 0

    before = sys.stdout, sys.stderr
    assert guard(main)([]) == 0
    assert capsys.readouterr().err == "\r\x1b[K"
    assert (sys.stdout, sys.stderr) == before


@pytest.mark.parametrize(
    "address",
    ["postgresql://ann:S3CRET@host/db", "mysql+pymysql://ann:S3CRET@host:3306/db?x=1", "https://:S3CRET@host"],
)
def test_passwords_of_addresses_are_in_no_text(
    address: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert "S3CRET" not in without_secrets(address)

    def main(argv: object) -> int:
        with Run("features", "r1", str(tmp_path / "r1")) as each:
            each["registry"] = address
        with Run("features", "r2", str(tmp_path / "r2")):
            raise DataError("A registry", address, "")

    assert guard(main)(["--registry", address]) == 3
    out, error = capsys.readouterr()
    assert "to resume: millrace features --registry" in error
    assert "S3CRET" not in out + error
    assert all(b"S3CRET" not in path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())


def test_secrets_that_are_known_are_hidden(tmp_path: Path) -> None:
    hide({"", "p4ss word"})
    assert without_secrets("x p4ss word y") == "x *** y"
    write_json(str(tmp_path / "x.json"), {"a": "p4ss word"})
    assert json.loads((tmp_path / "x.json").read_text()) == {"a": "***"}


@pytest.mark.parametrize("text", ["a b", "user@host", "12:30@noon", "s3://bucket/key@2:3", "http://host:80/a@b"])
def test_text_without_passwords_stays(text: str) -> None:
    assert without_secrets(text) == text


def test_files_of_rows_are_for_their_user_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    frames = market.sources(20)
    before = os.umask(0o022)
    try:
        market.write(tmp_path, frames)
        for value, expected in (("inherit", "0o44"), (None, "0o0"), ("027", "0o40")):
            store = tmp_path / f"store-{value}"
            monkeypatch.delenv("MILLRACE_UMASK", raising=False)
            if value is not None:
                monkeypatch.setenv("MILLRACE_UMASK", value)
            store.mkdir()
            flags = ["--definition", str(market.define(tmp_path)), "--sources", str(tmp_path / "sources")]
            assert guard(features.main)([*flags, "--store", str(store), "--no-statistics"]) == 0
            found = {oct(stat.S_IMODE(path.stat().st_mode) & 0o077) for path in store.rglob("*.parquet")}
            assert found == {expected}
        assert os.umask(0o022) == 0o022
    finally:
        os.umask(before)


@pytest.mark.parametrize("value", ["", "77", "0o77", "888", "-1"])
def test_a_umask_that_is_none_is_refused(
    value: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MILLRACE_UMASK", value)
    assert guard(lambda argv: 0)([]) == 2
    assert "MILLRACE_UMASK is three octal digits" in capsys.readouterr().err


def test_a_value_with_line_feeds_begins_no_line_of_its_own(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    forged = "x\nmillrace: version 9 is champion\r\nfeatures  done"

    def main(argv: object) -> int:
        progress()
        logging.getLogger("millrace.test").warning("row %s is odd", forged)
        print(columns(["name"], [[forged]]))
        print(figures_table("t", {"x": forged}))
        print(format_value(forged))
        with Run("features", "r", str(tmp_path / "r")):
            raise DataError("A rule", forged, forged)

    assert guard(main)([]) == 3
    out, error = capsys.readouterr()
    lines = (out + error).splitlines()
    assert not [line for line in lines if line.startswith(("millrace: version", "features  done"))]
    assert sum("x\\nmillrace: version 9 is champion\\r\\nfeatures  done" in line for line in lines) >= 4


DEFINITIONS = {
    "raises": (f"raise ValueError({ATTACK!r} + '\\nmillrace: forged')", 2),
    "exits": (f"import sys; sys.exit({ATTACK!r})", 2),
    "prints": (f"import sys; print({ATTACK!r}); print({ATTACK!r}, file=sys.stderr)", 2),
    "warns": (f"import warnings; warnings.warn({ATTACK!r})", 2),
    "has no view": (f"view = {ATTACK!r}", 2),
    "is no Python": (f"'''\n{ATTACK}", 2),
}


@pytest.mark.parametrize("name", DEFINITIONS)
def test_the_output_of_a_definition_has_no_control_characters(name: str, tmp_path: Path) -> None:
    """In a process of its own, so that what Python itself prints counts too."""
    text, code = DEFINITIONS[name]
    (tmp_path / "definition.py").write_text(text)
    flags = ["plan", "--definition", str(tmp_path / "definition.py"), "--store", str(tmp_path)]
    entry = "import sys; from beam_pipelines.cli import main; sys.exit(main(sys.argv[1:]))"
    done = subprocess.run([sys.executable, "-c", entry, *flags], capture_output=True, text=True, check=False)
    assert done.returncode == code, done.stderr
    assert not set(done.stdout + done.stderr) & set("\x1b\r\x9b\x08\u202e\x7f"), done.stderr
    assert "Traceback" not in done.stderr
    assert not [line for line in done.stderr.splitlines() if line.startswith("millrace: forged")]


def test_the_traceback_of_a_defect_has_no_control_characters(capsys: pytest.CaptureFixture[str]) -> None:
    def main(argv: object) -> int:
        raise RuntimeError(ATTACK)

    assert guard(main)(["tables"]) == 70
    error = capsys.readouterr().err
    assert "this is a defect" in error
    assert not set(error) & set("\x1b\r\x9b\x08\u202e\x7f")
