"""What a disk holds after a power cut: recorded operations of a process, replayed up to any of them.

Run as a program, it runs a function of a module and records what happens to files below a folder, in order: names that
appear, move and go, flushes of files with their content, and what the function reports.  `images` replays a record.  A
disk may write a name before it is flushed or only when its folder is; of content it keeps what was flushed.
"""

from __future__ import annotations

import dataclasses
import importlib
import os
import pickle
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
# (kind, path, further path or content or report)
Operation = tuple[str, str, Any]


def record(function: str, folder: Path) -> list[Operation]:
    """Runs `function` ("module:name") in a process of its own, with `folder` and a function that takes its reports."""
    target = folder.parent / f"{folder.name}.operations"
    command = [sys.executable, "-m", __name__, function, str(folder), str(target)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    return list(pickle.loads(target.read_bytes()))


def main(function: str, folder: str, target: str) -> None:
    operations: list[Operation] = []
    lock = threading.Lock()
    flush = os.fsync

    def note(kind: str, path: object, more: object = None) -> None:
        if isinstance(path, str) and path.startswith(folder):
            with lock:
                operations.append((kind, path, more))

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open" and isinstance(arguments[2], int) and arguments[2] & os.O_CREAT:
            note("create", arguments[0])
        elif event in ("os.rename", "os.link"):
            note(event, arguments[0], arguments[1])
        elif event in ("os.remove", "os.mkdir"):
            note(event, arguments[0])

    def recorded(handle: int) -> None:
        flush(handle)
        path = os.readlink(f"/proc/self/fd/{handle}")
        note("flush", path, None if os.path.isdir(path) else Path(path).read_bytes())

    module, name = function.split(":")
    run: Callable[[str, Callable[[Any], None]], None] = getattr(importlib.import_module(module), name)
    os.fsync = recorded
    sys.addaudithook(hook)
    run(folder, lambda report: note("report", folder, report))
    os.fsync = flush
    Path(target).write_bytes(pickle.dumps(operations))


@dataclasses.dataclass(eq=False)
class _File:
    content: bytes = b""


@dataclasses.dataclass(frozen=True)
class Image:
    """Files and folders after a cut, each path with its content (None: a folder), and what was reported before it."""

    names: dict[str, bytes | None]
    reports: tuple[Any, ...]

    def restore(self, before: Path, to: Path) -> None:
        """Puts what was below the folder `before` into `to`."""
        to.mkdir(parents=True)
        for path in sorted(self.names):
            content, place = self.names[path], to / Path(path).relative_to(before)
            if not place.parent.is_dir():
                continue  # its folder's own name was lost
            if content is None:
                place.mkdir(exist_ok=True)
            else:
                place.write_bytes(content)


def images(operations: list[Operation]) -> Iterator[Image]:
    """Two images for each moment: names as they were seen, and names as their folders were flushed."""
    seen: dict[str, _File | None] = {}
    flushed: dict[str, _File | None] = {}
    reports: list[Any] = []
    for kind, path, more in operations:
        if kind == "create":
            seen.setdefault(path, _File())
        elif kind == "os.mkdir":
            seen[path] = None
        elif kind == "os.rename":
            seen[more] = seen.pop(path)
        elif kind == "os.link":
            seen[more] = seen[path]
        elif kind == "os.remove":
            seen.pop(path, None)
        elif kind == "report":
            reports.append(more)
        elif more is None:  # a folder
            for name in {name for name in {*seen, *flushed} if os.path.dirname(name) == path}:
                if name in seen:
                    flushed[name] = seen[name]
                else:
                    del flushed[name]
        else:
            file = seen[path]
            assert file is not None
            file.content = more
        for names in (seen, flushed):
            yield Image({name: file and file.content for name, file in names.items()}, tuple(reports))


if __name__ == "__main__":
    main(*sys.argv[1:])
