"""Stored files that are broken in every way, and commands that read them: what each command printed and how it
ended."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import os
import re
import shutil
import signal
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

from hypothesis import strategies as st

from beam_pipelines.cli import main
from tests.support import shop
from transforms.storage.run_markers import write_marker

# Of the table in README.md; 130 is Ctrl-C's.
EXIT_CODES = {0, 2, 3, 4, 5, 6, 7, 8}
SECONDS = 240  # of a machine that others use too
DEFINITION = shop.DEFINITION.replace(
    'stats={"amount": ("mean", "count")}),',
    'stats={"amount": ("mean", "count")}),\n    Trailing(sales, by="shop", over="all", stats={"amount": "sum"}),',
)


@dataclasses.dataclass(frozen=True)
class Said:
    """How a command ended."""

    argv: tuple[str, ...]
    code: int
    out: str
    err: str

    @property
    def text(self) -> str:
        return f"{' '.join(self.argv)} ended with {self.code}\n{self.out[-500:]}\n{self.err[-4000:]}"


class TooSlow(BaseException):
    """A command waits for something that never comes."""


@contextlib.contextmanager
def at_most(seconds: int) -> Iterator[None]:
    def late(number: int, frame: FrameType | None) -> None:
        raise TooSlow(f"not done after {seconds} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def run(*argv: str) -> Said:
    """`millrace ARGV…` in this process.

    Raises:
        Exception: anything that a user would see as a traceback.
    """
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), at_most(SECONDS):
        try:
            code = main(argv)
        except SystemExit as done:  # of --help
            code = int(done.code or 0)
    return Said(argv, code, out.getvalue(), err.getvalue())


def one_message(printed: Said) -> None:
    """A documented exit code, and if it is not 0 one message that says what is wrong, without a traceback."""
    assert printed.code in EXIT_CODES, printed.text
    assert "Traceback" not in printed.err + printed.out, printed.text
    if printed.code not in (0, 6, 7):
        reported = [line for line in printed.err.splitlines() if line.startswith("millrace: ")]
        assert reported, printed.text
        last = printed.err[printed.err.rindex("\nmillrace: ") if "\nmillrace: " in printed.err else 0 :].strip()
        lines = last.splitlines()
        assert all(line.startswith("  ") for line in lines[1:]), printed.text  # the run, and how it is resumed
        assert len(lines[0]) < 6000, printed.text


def made_store(folder: Path) -> Path:
    """A store with two runs of each pipeline, a schema and two registered models."""
    definition = shop.write(folder, 400, definition=DEFINITION)
    flags = ["--definition", str(definition), "--store", str(folder)]
    for argv in (
        ["features", *flags, "--run_id", "f1", "--end", "2024-02-20"],
        ["schema", "infer", *flags],
        ["features", *flags, "--run_id", "f2"],
        ["training", *flags, "--run_id", "t1", "--threads=1"],
        ["training", *flags, "--run_id", "t2", "--threads=1"],
        ["inference", *flags, "--run_id", "i1", "--threads=1"],
        ["erase", "sales", *flags, "--where", "visit = 399"],
        ["features", *flags, "--run_id", "f2b"],
        ["training", *flags, "--run_id", "t3", "--threads=1", "--registry", "sqlite:////dev/null/mlflow.db"],
    ):
        printed = run(*argv)
        assert printed.code == (4 if "t3" in argv else 0), printed.text
    write_marker(str(folder / "runs" / "t9"), "training", "t9")
    return folder


def made_live_store(folder: Path) -> Path:
    """A store of live jobs in `<folder>/live`, beside the batch store that has its model, and its files."""
    definition = shop.write(folder, 150, definition=DEFINITION)
    flags, registry = ["--definition", str(definition)], f"sqlite:///{folder}/registry/mlflow.db"
    batch, live = [*flags, "--store", str(folder)], [*flags, "--store", str(folder / "live")]
    for argv in (
        ["features", *batch, "--run_id", "f1"],
        ["training", *batch, "--run_id", "t1", "--threads=1"],
        ["promote", "1", "--store", str(folder), "--why", "to try"],
        ["features", "--streaming", *live, "--sources", str(folder / "sources"), "--run_id", "l1", "--chunk=60d"],
        ["inference", "--streaming", *live, "--registry", registry, "--run_id", "p1"],
    ):
        said = run(*argv)
        assert said.code in (0, 6), said.text
    guard = folder / "live" / "crash_guard" / "buying.features"
    guard.mkdir(parents=True)
    (guard / "suspect-1").write_text('["visits", 0, 3, 4]')
    (guard / "verdicts").write_text('{"message": "visits/0@3 ab", "reason": "it died"}\n')
    note = b'[["sales", 0, 1, 2]]'
    (guard / "note-1").write_bytes(len(note).to_bytes(8, "little") + note + bytes(100))
    (guard / "lock").touch()
    return folder


def live_commands(folder: Path) -> dict[str, list[str]]:
    """Commands that read what a live store keeps, each by a name."""
    live = ["--store", str(folder / "live")]
    both = ["--definition", str(folder / "definition.py"), *live]
    registry = ["--registry", f"sqlite:///{folder}/registry/mlflow.db"]
    features = ["features", "--streaming", *both, "--sources", str(folder / "sources"), "--chunk=60d"]
    kafka = ["--source", "kafka", "--bootstrap", "127.0.0.1:1"]
    return {
        "live features": [*features, "--run_id", "l2"],
        "live features again": [*features, "--run_id", "l1"],
        "live features of topics": ["features", "--streaming", *both, "--run_id", "l1", *kafka],
        "live inference": ["inference", "--streaming", *both, *registry, "--run_id", "p2"],
        "live inference again": ["inference", "--streaming", *both, *registry, "--run_id", "p1"],
        "parity": ["parity", *both, *registry, "--batch_store", str(folder), "--run_id", "q1"],
        "verify": ["verify", *both, "--live", "--run_id", "v1"],
        "trace": ["trace", *both, "--live", "--key", "visit=120"],
        "tables": ["tables", *live],
        "compact": ["compact", *live],
        "vacuum": ["vacuum", *live, "--older_than", "0s", "--force", "--retention", "0s"],
        "erase": ["erase", "sales", *both, *registry, "--where", "visit = 3", "--keep_sources"],
    }


# Values of another type, size or sign, in place of one in a JSON file.
VALUES: tuple[Any, ...] = (
    *(None, True, False, 0, -1, 2**31, 2**63, 2**64, 10**400, -(10**30), 1.5, 1e308, float("inf"), float("nan")),
    *("", "x", "-1", "0000-13-99", "../../etc/passwd", "/etc/passwd", "a\x1b[2K\nb", "\ud800", "é" * 300, "%2e%2e"),
    *([], {}, [[]], [None], {"x": 1}, ["x"], [1, 2, 3]),
)


@dataclasses.dataclass(frozen=True)
class Change:
    """One way to break a file.

    Args:
        kind: what is done.
        where: which part of the file, from 0 to 1.
        value: what is put there.
    """

    kind: str
    where: float
    value: Any

    def apply(self, path: Path) -> None:
        content = path.read_bytes()
        if self.kind in PLACES:
            path.unlink()
            PLACES[self.kind](path)
        elif self.kind in ("replace", "drop", "add", "deep"):
            self._apply_json(path, content)
        else:
            path.write_bytes(self._bytes(content))

    def _bytes(self, content: bytes) -> bytes:
        at = int(self.where * len(content))
        raw = str(self.value).encode("utf-8", "surrogatepass") or b"\0"
        match self.kind:
            case "cut":
                return content[:at]
            case "flip" if content:
                at = min(at, len(content) - 1)
                return content[:at] + bytes([content[at] ^ (1 << len(raw) % 8)]) + content[at + 1 :]
            case "insert":
                return content[:at] + raw + content[at:]
            case "not UTF-8":
                return content[:at] + b"\xff\xfe\xc3(" + content[at:]
            case "UTF-16":
                return content.decode("latin-1").encode("utf-16")
            case "whole":
                return json.dumps(self.value).encode()
            case "zeros":
                return bytes(len(content))
        return content

    def _apply_json(self, path: Path, content: bytes) -> None:
        """Change one value of a JSON file, or of one line of a file with one JSON value a line."""
        try:
            text = content.decode()
            lines = text.splitlines() if path.parent.name == "_delta_log" else [text]
            number = min(int(self.where * len(lines)), len(lines) - 1)
            root = json.loads(lines[number])
        except (ValueError, IndexError):
            return  # no JSON
        places = list(walk(root))
        share = self.where * len(lines) - number
        holder, name = places[min(int(share * len(places)), len(places) - 1)]
        if self.kind == "drop":
            del holder[name]
        elif self.kind == "add":
            if isinstance(holder, dict):
                holder[f"{name}x"] = self.value
            else:
                holder.append(self.value)
        elif self.kind == "deep":
            holder[name] = "DEEP"
        else:
            holder[name] = self.value
        text = json.dumps(root, separators=(",", ":"))[len('{"":') : -1]
        lines[number] = text.replace('"DEEP"', "[" * 20_000 + "]" * 20_000)
        path.write_text("\n".join(lines) + ("\n" if len(lines) > 1 else ""), encoding="utf-8")


def walk(root: Any) -> Iterator[tuple[Any, Any]]:
    """Every value of a JSON value, as the list or object that holds it and its place there."""

    def below(holder: Any, names: Any) -> Iterator[tuple[Any, Any]]:
        for name in names:
            yield holder, name
            value = holder[name]
            if isinstance(value, dict):
                yield from below(value, list(value))
            elif isinstance(value, list):
                yield from below(value, range(len(value)))

    yield from below({"": root}, [""])


def _link_to(target: str) -> Any:
    return lambda path: path.symlink_to(target)


PLACES: dict[str, Any] = {
    "missing": lambda path: None,
    "empty": lambda path: path.touch(),
    "folder": lambda path: path.mkdir(),
    "FIFO": os.mkfifo,
    "socket": lambda path: os.mknod(path, 0o140600),
    "link to nothing": _link_to("nowhere"),
    "link to itself": lambda path: path.symlink_to(path.name),
    "link to /dev/null": _link_to("/dev/null"),
    "link to /dev/full": _link_to("/dev/full"),
}
KINDS = (
    *PLACES,
    *("cut", "flip", "insert", "not UTF-8", "UTF-16", "whole", "zeros"),
    *("replace", "replace", "replace", "replace", "drop", "drop", "add", "deep"),
)
changes = st.builds(Change, st.sampled_from(KINDS), st.floats(0, 1), st.sampled_from(VALUES))


def copied(store: Path, to: Path) -> Path:
    shutil.copytree(store, to)
    definition = to / "definition.py"
    assert definition.exists()
    return to


def commands(store: Path) -> dict[str, list[str]]:
    """Commands that read what a store keeps, each by a name."""
    at = ["--store", str(store)]
    both = ["--definition", str(store / "definition.py"), *at]
    return {
        "tables": ["tables", *at],
        "models": ["models", *at],
        "plan": ["plan", *both],
        "trace": ["trace", *both, "--key", "visit=390"],
        "vacuum": ["vacuum", *at, "--older_than", "0s", "--force", "--retention", "0s"],
        "verify": ["verify", *both, "--run_id", "v"],
        "check": ["schema", "check", *both],
        "update": ["schema", "update", *both],
        "features": ["features", *both, "--run_id", "f3"],
        "features again": ["features", *both, "--run_id", "f2"],
        "features full": ["features", *both, "--run_id", "f4", "--full"],
        "inference": ["inference", *both, "--run_id", "i2", "--threads=1"],
        "inference again": ["inference", *both, "--run_id", "i1", "--threads=1"],
        "promote": ["promote", "1", *at, "--why", "to try"],
        "rollback": ["rollback", *at, "--why", "to try"],
        "register": ["register", "t3", *at],
        "training again": ["training", *both, "--run_id", "t2", "--threads=1"],
        "training": ["training", *both, "--run_id", "t4", "--threads=1"],
        "retrain": ["retrain", "1", *at, "--run_id", "r1", "--threads=1"],
        "erase": ["erase", "sales", *both, "--where", "visit = 3"],
        "parity": ["parity", *both],
    }


def files_read(store: Path, names: Sequence[str]) -> dict[str, set[str]]:
    """Of each of these commands, the files of `store` that it reads, relative to the store.

    Those that delta-rs and Arrow read by themselves are not noticed: logs and data are added for each command.
    """
    found: dict[str, set[str]] = {}
    read: set[str] = set()
    prefix = f"{store}-"

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open" and isinstance(arguments[0], str) and arguments[0].startswith(prefix):
            read.add(arguments[0].removeprefix(prefix).partition("/")[2])

    sys.addaudithook(hook)
    kept = set(files_of(store))
    for name in names:
        place = Path(f"{prefix}{name.replace(' ', '-')}")
        argv = commands(copied(store, place))[name]
        read.clear()
        printed = run(*argv)
        one_message(printed)
        shutil.rmtree(place)
        found[name] = (read & kept) | {
            each for each in kept if "_delta_log" in each or (each.endswith("parquet") and "/date=" in each)
        }
    return found


def files_of(store: Path) -> Sequence[str]:
    """Files that a fuzzer breaks, relative to the store; data files by way of tests/sources."""
    return sorted(
        str(path.relative_to(store))
        for path in store.rglob("*")
        if path.is_file() and not re.search(r"\.html$|/sources/", str(path))
    )
