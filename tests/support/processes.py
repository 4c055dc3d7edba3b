"""Processes of Millrace that end, or stop, at a chosen moment.

A zygote imports Beam once and forks every command, so that a process costs what it does and not its imports.  As
delta-rs and Polars do not survive a fork once used, the zygote uses neither.  Run as a program this module is the
zygote.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
RUNNER = ("apache_beam.runners.direct.direct_runner", "apache_beam.runners.portability.fn_api_runner.fn_runner")
PIPELINES = ("beam_pipelines.features", "beam_pipelines.commands.plan", "beam_pipelines.commands.tables", *RUNNER)
ALL_PIPELINES = (*PIPELINES, "beam_pipelines.training", "beam_pipelines.inference", "mlflow", "xgboost")


@dataclasses.dataclass(frozen=True)
class Ended:
    """How a process ended: its exit code (minus the signal, if one killed it), what it said, how many steps it took on
    the store's file system and the seconds they took."""

    code: int
    out: str
    err: str
    steps: tuple[str, ...]
    seconds: float


@dataclasses.dataclass(frozen=True)
class Process:
    """A command at work."""

    zygote: Zygote
    pid: int
    log: Path

    def wait(self) -> Ended:
        """Until it has ended."""
        status, seconds = self.zygote.ask(do="wait", pid=self.pid, stopped=False)
        steps = Path(f"{self.log}.steps")
        reported = tuple(steps.read_text().splitlines()) if steps.exists() else ()
        out, err = (Path(f"{self.log}.{name}").read_text() for name in ("out", "err"))
        return Ended(os.waitstatus_to_exitcode(status), out, err, reported, seconds)

    def stopped(self) -> bool:
        """Wait until it has stopped; False where it ended instead."""
        status, _ = self.zygote.ask(do="wait", pid=self.pid, stopped=True)
        return os.WIFSTOPPED(status)

    def resume(self) -> None:
        os.kill(self.pid, signal.SIGCONT)


class Zygote:
    """Starts commands.  A context manager; `logs` is a folder for what they say."""

    def __init__(self, logs: Path, modules: Sequence[str] = PIPELINES) -> None:
        self.logs, self.modules, self.count = logs, modules, 0

    def __enter__(self) -> Zygote:
        command = [sys.executable, "-W", "ignore", __file__, *self.modules]
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT, env=environment
        )
        return self

    def __exit__(self, *_: object) -> None:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.close()
        self.process.wait(30)
        self.process.stdout.close()

    def ask(self, **what: Any) -> Any:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps(what) + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())

    def start(
        self,
        *argv: str,
        watch: Path,
        step: int | None = None,
        delay: float = 0.0,
        kind: signal.Signals = signal.SIGKILL,
        user: int | None = None,
        limit: int | None = None,
    ) -> Process:
        """Run `millrace ARGV…`.

        Args:
            watch: the folder below which steps (a file opened for writing, renamed, removed) are counted.
            step: at which `kind` is sent to the process, before that step is done; None: `delay` counts from the start.
            delay: seconds to wait then, while the process goes on; 0 without a step: nothing is sent.
            user: to run as.
            limit: bytes that a file may hold (RLIMIT_FSIZE).
        """
        self.count += 1
        log = self.logs / f"process-{self.count}"
        pid = self.ask(
            do="start",
            argv=argv,
            watch=str(watch),
            step=step,
            delay=delay,
            kind=int(kind),
            log=str(log),
            user=user,
            limit=limit,
        )
        return Process(self, pid, log)

    def run(self, *argv: str, watch: Path, **how: Any) -> Ended:
        return self.start(*argv, watch=watch, **how).wait()


def _child(main: Callable[[list[str]], int], what: dict[str, Any]) -> None:
    victim, step, delay = os.getpid(), what["step"], what["delay"]
    relays = []
    for number, name in ((1, "out"), (2, "err")):
        handle = os.open(f"{what['log']}.{name}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
        if what["limit"] is not None:  # which does not hold for what is printed
            handle, pid = _relay(handle)
            relays.append(pid)
        os.dup2(handle, number)
        os.close(handle)
    alarm = _killer(victim, step, delay, what["kind"]) if delay else None
    steps: list[str] = []

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event not in ("open", "os.rename", "os.remove"):
            return
        path = arguments[1] if event == "os.rename" else arguments[0]
        if event == "open" and not (isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR)):
            return
        if not isinstance(path, str | os.PathLike) or not os.fspath(path).startswith(what["watch"]):
            return
        steps.append(f"{event} {os.fspath(path)[len(what['watch']) :]}")
        if len(steps) - 1 == step:
            if alarm is None:
                os.kill(victim, what["kind"])
            else:
                os.write(alarm, b"!")

    sys.addaudithook(hook)
    if what["user"] is not None:
        os.setgroups([])
        os.setgid(what["user"])
        os.setuid(what["user"])
    if what["limit"] is not None:
        import resource

        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (what["limit"], what["limit"]))
    code = 99
    try:
        code = main(what["argv"])
    finally:
        sys.stdout.flush()
        if what["limit"] is None:
            Path(f"{what['log']}.steps").write_text("\n".join(steps)) if what["user"] is None else None
        sys.stderr.flush()
        for number in (1, 2) if relays else ():
            os.close(number)
        for pid in relays:
            os.waitpid(pid, 0)
        os._exit(code)


def _relay(handle: int) -> tuple[int, int]:
    """A pipe, and the process that writes to a file what comes through it."""
    read, write = os.pipe()
    pid = os.fork()
    if pid:
        os.close(read)
        os.close(handle)
        return write, pid
    for number in range(3, 256):
        if number not in (read, handle):
            with contextlib.suppress(OSError):
                os.close(number)
    while some := os.read(read, 1 << 16):
        os.write(handle, some)
    os._exit(0)


def _killer(victim: int, step: int | None, delay: float, kind: int) -> int:
    """A process that sends the signal from outside, so that no lock of the victim's keeps it waiting; where to write to
    start its clock (without a step it runs already)."""
    read, write = os.pipe()
    if os.fork():
        os.close(read)
        return write
    os.close(write)
    if step is not None:
        late = os.read(read, 1) == b""
        time.sleep(delay)
    else:
        late = bool(select.select([read], [], [], delay)[0])
    if not late:
        os.kill(victim, kind)
    os._exit(0)


def _serve(modules: Sequence[str]) -> None:
    import importlib

    from beam_pipelines.cli import main

    for name in modules:
        importlib.import_module(name)
    begun: dict[int, float] = {}
    for line in sys.stdin:
        what = json.loads(line)
        if what["do"] == "start":
            pid = os.fork()
            if pid == 0:
                _child(main, what)
            begun[pid] = time.perf_counter()
            feature_row: Any = pid
        else:
            _, status = os.waitpid(what["pid"], os.WUNTRACED if what["stopped"] else 0)
            feature_row = status, time.perf_counter() - begun[what["pid"]]
        print(json.dumps(feature_row), flush=True)


if __name__ == "__main__":
    _serve(sys.argv[1:])
