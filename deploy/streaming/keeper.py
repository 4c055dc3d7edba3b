"""Runs one command, and ends it and everything that it started when the parent process is gone.

    python -I -S keeper.py GRACE LOG COMMAND...

prints the command's process id, then waits for the first of these: the command ends; standard input is closed, as the
kernel does however the parent dies; SIGTERM.  The command's process group gets SIGTERM, GRACE seconds later SIGKILL.
The exit status is the command's.  Standard library only, one thread, so that it starts in 20 ms and forks safely.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import select
import signal
import subprocess
import sys
import time

PR_SET_PDEATHSIG = 1


def die_with_parent() -> None:
    """Called between fork and exec: if the keeper itself is killed, its command dies too (Linux)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def ended(pid: int) -> bool:
    """Whether the child is dead.  It stays a zombie, so that no other process can get its number yet."""
    return os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT | os.WNOHANG) is not None


def signal_group(pid: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):  # macOS: EPERM if only zombies are left
        os.killpg(pid, number)


def main(grace: str, log: str, *command: str) -> int:
    signal.pthread_sigmask(signal.SIG_SETMASK, ())  # signals that the parent blocked are unblocked here
    stopping, wake = os.pipe()
    os.set_blocking(wake, False)
    signal.set_wakeup_fd(wake)  # SIGTERM and SIGCHLD end the select below
    for number in (
        signal.SIGTERM,
        signal.SIGCHLD,
        signal.SIGINT,
    ):  # handled, not ignored, because the command would inherit that
        signal.signal(number, lambda *_: None)
    with open(log, "ab") as out:
        child = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=out,
            start_new_session=True,
            preexec_fn=die_with_parent,  # safe, because there is only one thread
        )
    print(child.pid, flush=True)
    sys.stdout.close()
    stopped = False
    while not stopped and not ended(child.pid):
        readable, _, _ = select.select([0, stopping], [], [])
        stopped = 0 in readable or signal.SIGTERM in os.read(stopping, 64)
    if stopped:
        signal_group(child.pid, signal.SIGTERM)
        signal_group(child.pid, signal.SIGCONT)  # a stopped process does not handle signals
        deadline = time.monotonic() + float(grace)
        while not ended(child.pid) and time.monotonic() < deadline:
            select.select([stopping], [], [], 0.2)
            with contextlib.suppress(BlockingIOError):
                os.set_blocking(stopping, False)
                os.read(stopping, 64)
    signal_group(child.pid, signal.SIGKILL)  # and processes that it left behind
    code = child.wait()
    return code if code >= 0 else 128 - code


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
