"""Child processes that end with this one, however it ends, and that report why they do not start.

    with Child(["java", …], log) as child:
        child.await_ready(lambda: listening(port), within=60)

Signals are only sent to what was started here: each child is a process group of its own, watched by a keeper
    (`keeper.py`) that ends the group when this process is gone, even by Ctrl-C or kill −9.
"""

from __future__ import annotations

import contextlib
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

from schemas.errors import MillraceError

KEEPER = Path(__file__).with_name("keeper.py")
HOST = "127.0.0.1"
TAKEN = ("already in use", "BindException", "Failed to bind")


class StartError(MillraceError):
    """A service that did not start."""

    exit_code = 8


class Child:
    """A running command with its output in the file `log`.

    Args:
        grace: seconds between SIGTERM and SIGKILL.
    """

    def __init__(
        self,
        command: Sequence[str],
        log: Path,
        env: Mapping[str, str] | None = None,
        cwd: Path | None = None,
        grace: float = 10,
    ) -> None:
        self.command, self.log, self.grace = list(command), log, grace
        log.parent.mkdir(parents=True, exist_ok=True)
        self.began = log.stat().st_size if log.exists() else 0
        self._keeper = subprocess.Popen(
            [sys.executable, "-I", "-S", str(KEEPER), str(grace), str(log), *command],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=None if env is None else {**os.environ, **env},
            cwd=cwd,
            start_new_session=True,  # Ctrl-C is for this process, which decides the order in which children end
        )
        assert self._keeper.stdout is not None
        assert self._keeper.stderr is not None
        with self._keeper.stdout as out:
            pid = out.readline()
        if not pid:
            why = self._keeper.communicate()[1].decode(errors="replace").strip().rsplit("\n", 1)[-1]
            raise StartError(f"{command[0]} can be run", why, "Install it, or put it on PATH")
        self._keeper.stderr.close()
        self.pid = int(pid)

    @property
    def running(self) -> bool:
        return self._keeper.poll() is None

    def wait(self, timeout: float | None = None) -> int:
        """Its exit status; 128 + n if signal n ended it.

        Raises:
            subprocess.TimeoutExpired: it still runs.
        """
        return self._keeper.wait(timeout)

    def signal(self, number: int) -> None:
        """Sends a signal to the command and everything that it started; SIGKILL, SIGSTOP and SIGCONT inject faults."""
        if self.running:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.pid, number)

    def kill(self) -> None:
        """Ends it as kill −9 does, and waits until it is gone."""
        self.signal(signal.SIGKILL)
        self._keeper.wait()
        self._close()

    def stop(self) -> int:
        """Sends SIGTERM, kills it after `grace` seconds, and returns its exit status.  Does nothing if it has ended."""
        self._close()
        return self._keeper.wait()

    def _close(self) -> None:
        assert self._keeper.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self._keeper.stdin.close()

    def output(self) -> str:
        """The output so far."""
        with open(self.log, "rb") as file:
            file.seek(self.began)
            return file.read().decode(errors="replace")

    def await_ready(self, ready: Callable[[], bool], within: float) -> None:
        """Waits until `ready()`.

        Raises:
            StartError: the process ended first, or `within` seconds have passed.
        """
        deadline = time.monotonic() + within
        while not ready():
            name = Path(self.command[0]).name
            if not self.running:
                tail = " | ".join(self.output().strip().splitlines()[-5:])
                raise StartError(f"{name} keeps running", f"exit status {self.wait()}: {tail}", f"See {self.log}")
            if time.monotonic() > deadline:
                raise StartError(f"{name} is ready within {within:g} s", "it is not", f"See {self.log}")
            time.sleep(0.05)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.stop()


class Service:
    """A child with ports of its own.  Subclasses define how to run it; within its context, it is ready.

    Args:
        folder: the folder of its log and its data.
    """

    name: str
    ports: tuple[str, ...]  # attributes that hold its ports
    within: float = 60  # seconds within which it must be ready
    grace: float = 10

    def __init__(self, folder: Path | str) -> None:
        self.folder = Path(folder)
        self.log = self.folder / f"{self.name}.log"
        self.child: Child | None = None
        self.kept = False  # its ports do not change once others may use them
        self._choose_ports()

    def command(self) -> Sequence[str]:
        raise NotImplementedError

    def environment(self) -> Mapping[str, str]:
        return {}

    def ready(self) -> bool:
        return all(listening(getattr(self, port)) for port in self.ports)

    @property
    def running(self) -> bool:
        return self.child is not None and self.child.running

    def launch(self) -> None:
        """Starts it without waiting."""
        if self.running:
            raise StartError(f"The {self.name} is started once", "a running one", "Stop it first")
        self.child = Child(self.command(), self.log, self.environment(), grace=self.grace)

    def await_ready(self) -> None:
        """Waits until a launched service is ready; if another program has taken its port, it is launched a second
        time."""
        assert self.child is not None
        for tries in range(3):
            try:
                self.child.await_ready(self.ready, self.within)
                self.kept = True
                return
            except StartError:
                taken = any(word in self.child.output() for word in TAKEN)
                self.child.stop()
                if tries == 2 or not taken or self.kept:
                    raise
                self._choose_ports()
                self.launch()

    def start(self) -> Self:
        try:
            self.launch()
            self.await_ready()
        except BaseException:
            self.stop()
            raise
        return self

    def stop(self) -> None:
        if self.child is not None:
            self.child.stop()

    def kill(self) -> None:
        """Injects a fault: kill −9."""
        assert self.child is not None
        self.child.kill()

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.stop()

    def _choose_ports(self) -> None:
        for attribute, port in zip(self.ports, free_ports(len(self.ports))):
            setattr(self, attribute, port)


@contextlib.contextmanager
def running(*services: Service) -> Iterator[None]:
    """Within this context, all of them are ready; they are started at once and stopped in reverse order."""
    try:
        for service in services:
            service.launch()
        for service in services:
            service.await_ready()
        yield
    finally:
        for service in reversed(services):
            service.stop()


def free_ports(count: int) -> list[int]:
    """Ports of loopback on which no process listens, below those that the kernel uses for outgoing connections.

    So the port of a stopped service is still free when it starts again.
    """
    try:
        first = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    except OSError:
        first = 49152
    found: list[int] = []
    while len(found) < count:
        port = random.SystemRandom().randrange(10_000, max(first, 20_000))
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            with contextlib.suppress(OSError):
                probe.bind(("", port))
                found += [port] if port not in found else []
    return found


def listening(port: int) -> bool:
    """Whether the port of loopback accepts a connection."""
    with socket.socket() as probe:
        probe.settimeout(1)
        return probe.connect_ex((HOST, port)) == 0
