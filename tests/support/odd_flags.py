"""Command lines with odd values: what `--help` lists, given what nobody should give."""

from __future__ import annotations

import dataclasses
import functools
import os
import re
from pathlib import Path
from typing import Any

from hypothesis import strategies as st

from beam_pipelines.cli import COMMANDS
from tests.support.broken_files import run

LIVE = ("features --streaming", "inference --streaming")
# Nobody listens there, so these end before they would start.
KAFKA = tuple(f"{each} --source kafka" for each in LIVE)
LINES = (
    *(f"schema {action}" for action in ("infer", "check", "update")),
    *(each for each in COMMANDS if each != "schema"),
    *LIVE,
    *KAFKA,
)
NUMBERS = ("0", "-1", "1", "007", "1e3", "0x10", "2.5", "nan", "inf", "-inf", "١٢", "9" * 30, "-" + "9" * 30)
TEXTS = (
    "",
    " ",
    "x",
    "-",
    "--",
    "--store",
    "=",
    "a=b",
    "visit=3",
    "visit=",
    "=3",
    "visit=x",
    "\x1b[2Kx",
    "a\nb",
    "'",
    '"',
)
BYTES = (os.fsdecode(b"\xff\xfe"), "\ud800", "é", "x" * 5000)
DATES = ("0000-13-99", "2024-02-30", "2024-01-05", "2024-02-20", "0001-01-01", "9999-12-31", "2024-1-1", "20240105")
DATES += ("2024-01-05T00:00:00Z", "2024-W01-1", "tomorrow", "2024-01-05T25:61")
LENGTHS = ("1d", "0s", "-1d", "99999999999999w", "1y", "1.5d", "d", "1 d", "1D")
ADDRESSES = (
    *(
        "postgresql://u:p@localhost:1/d",
        "mysql://localhost:1/x",
        "oracle://h/d",
        "sqlite://",
        "sqlite:////dev/null/x.db",
    ),
    *(
        "sqlite:///{folder}",
        "sqlite:///{fifo}",
        "x://y",
        "gs://",
        "gs://b/f",
        "s3://b/f",
        "hdfs://x/y",
        "file://{folder}",
    ),
    *("http://[::1", "localhost:1", ":", "localhost:99999", "[::1]:1", "file://elsewhere/x"),
)
PLACES = (
    *(
        "{folder}",
        "{empty}",
        "{fifo}",
        "{text}",
        "{missing}",
        "{missing}/below",
        "{text}/below",
        "/dev/null",
        "/dev/full",
    ),
    *(
        "{loop}",
        "{binary}",
        "{json}",
        "{store}",
        "{store}/sources",
        "{definition}",
        ".",
        "~",
        "*",
        "{store}/*",
        "/proc/self/mem",
    ),
)
NAMES = ("os", "sys", ".", "..", "a..b", "os.path", "tests", "schemas", "no.such.module", "__main__", "1", "é.py")
ODD = (*NAMES, *NUMBERS, *TEXTS, *BYTES, *DATES, *LENGTHS, *ADDRESSES, *PLACES)


@dataclasses.dataclass(frozen=True)
class Line:
    """A command, the values of its flags, and words at its end."""

    command: str
    values: tuple[tuple[str, str], ...]
    words: tuple[str, ...] = ()

    def argv(self, places: dict[str, str]) -> list[str]:
        known: dict[str, str] = {
            "--definition": "{definition}",
            "--store": "{store}",
            "--why": "to try",
            "--threads": "1",
        }
        known |= {"--where": "visit = 3", "--key": "visit=3"}
        if self.command in KAFKA:
            known |= {"--bootstrap": "127.0.0.1:1"}
        if self.command.startswith("features --streaming"):
            known |= {"--store": "{folder}/live", "--sources": "{store}/sources"}
            known |= {"--end": "2024-01-03"} if self.command in LIVE else {}
        if self.command == "new":
            known |= {"--folder": "{folder}"}
        takes = flags_of(self.command)
        values = {
            name: value for name, value in known.items() if name in takes and (name != "--key" or not self.values)
        }
        given = {**values, **dict(self.values)}
        words = [word for name, value in given.items() for word in ([name, value] if takes.get(name, True) else [name])]
        return [*self.command.split(), *(_placed(word, places) for word in (*words, *self.words))]


def _placed(text: str, places: dict[str, str]) -> str:
    return re.sub(r"\{(\w+)\}", lambda found: places[found[1]], text)


@functools.cache
def flags_of(command: str) -> dict[str, bool]:
    """The flags that the command's help lists; whether each takes a value."""
    printed = run(*command.split(), "--help")
    if command in (*LIVE, *KAFKA):
        printed = run(command.split()[0], "--streaming", "--help")
    assert printed.code == 0, printed.text
    found = re.findall(r"^  (--\w+)(?:, (--no-\w+))?( \S+)?", printed.out, re.MULTILINE)
    flags = {name: bool(value) for name, _, value in found} | {other: False for _, other, _ in found if other}
    return {name: value for name, value in flags.items() if name not in ("--help", "--streaming", "--source")}


def takes_a_word(command: str) -> bool:
    return command in ("promote", "register", "retrain", "erase", "new")


@st.composite
def lines(draw: Any, commands: tuple[str, ...] = LINES) -> Line:
    command = draw(st.sampled_from(commands))
    takes = flags_of(command)
    names = draw(st.lists(st.sampled_from(sorted(takes)), unique=True, min_size=0, max_size=3))
    values = tuple((name, draw(st.sampled_from(ODD)) if takes[name] else "") for name in names)
    words: tuple[str, ...] = ()
    if takes_a_word(command):
        usual = {"promote": "1", "register": "t3", "retrain": "1", "erase": "sales", "new": "case"}[command]
        words = (draw(st.sampled_from([usual, usual, *ODD])),)
    extra = draw(st.sampled_from([(), (), (), (), ("--stor", "x"), ("word",), ("--unknown_flag=1",), ("-x",), ("--",)]))
    return Line(command, values, (*words, *extra))


def places(folder: Path, store: Path) -> dict[str, str]:
    """Paths of every kind, by name."""
    (folder / "folder" / "inside").mkdir(parents=True)
    (folder / "empty").touch()
    (folder / "text").write_text("a text\n")
    (folder / "json").write_text("[]")
    (folder / "binary").write_bytes(bytes(range(256)))
    os.mkfifo(folder / "fifo")
    (folder / "loop").symlink_to("loop")
    names = ("folder", "empty", "fifo", "text", "json", "binary", "loop", "missing")
    return {
        **{name: str(folder / name) for name in names},
        "store": str(store),
        "definition": str(store / "definition.py"),
    }
