"""Ctrl-C: one line and exit code 130, whatever the process is doing at that moment.

Python's KeyboardInterrupt alone is not enough: if it is raised within an import, a finaliser or a callback of C code,
it is printed, turned into another error or lost; and at its end, the process waits for threads that still train.  This
module imports nothing of Millrace or Beam, so that it works while they are imported.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import signal
import sys
import threading
from collections.abc import Callable, Sequence
from types import FrameType

STOPPED = 130
# Seconds within which a command must end after a signal.  A live job has no limit: it completes its turn.
ENDING, LEAVING = 10.0, 3.0


class Interrupt:
    """The SIGINT of one process: whether it was received, and how the process then ends."""

    def __init__(self) -> None:
        self.came = self.reported = False
        self.stderr = 2
        self.limit: float | None = ENDING

    def listen(self, limit: float | None) -> None:
        """Handles SIGINT from now on, unless the process was started with SIGINT ignored."""
        self.limit = limit
        if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
            signal.signal(signal.SIGINT, self._signalled)
            sys.unraisablehook = self._lost

    def report(self, how: str = "run the same command again") -> None:
        """Prints the one line."""
        if not self.reported:
            self.reported = True
            with contextlib.suppress(OSError):
                os.write(self.stderr, f"millrace: stopped; nothing half-done is visible; {how}\n".encode())

    def leave(self) -> None:
        """Ends the process, without waiting for its threads and without further output."""
        self.report()
        with contextlib.suppress(OSError, ValueError):
            sys.stdout.flush()
        self._end_after(LEAVING)
        atexit._run_exitfuncs()  # this removes temporary folders
        os._exit(STOPPED)

    def _signalled(self, number: int, frame: FrameType | None) -> None:
        if self.came:
            self._end()
        self.came = True
        if self.limit is not None:
            self._mute()
            self._end_after(self.limit)
        raise KeyboardInterrupt

    def _mute(self) -> None:
        """Reserves stderr for the one line: libraries print errors when a signal interrupts them."""
        with contextlib.suppress(OSError):
            kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, 2)
            self.stderr = kept

    def _lost(self, unraisable: sys.UnraisableHookArgs) -> None:
        """Called where an exception cannot be raised, so that the signal is not lost there."""
        if self.came and issubclass(unraisable.exc_type, KeyboardInterrupt):
            self._end()
        sys.__unraisablehook__(unraisable)

    def _end_after(self, seconds: float) -> None:
        watch = threading.Timer(seconds, self._end)
        watch.daemon = True
        watch.start()

    def _end(self) -> None:
        self.report()
        os._exit(STOPPED)


INTERRUPT = Interrupt()


def as_process(main: Callable[[Sequence[str]], int], argv: Sequence[str]) -> int:
    """Runs `main` as the command of this process; a SIGINT ends the process with one line and exit code 130."""
    INTERRUPT.listen(None if "--streaming" in argv else ENDING)
    try:
        code = main(argv)
    except BaseException:
        if INTERRUPT.came:
            INTERRUPT.leave()
        raise
    if code == STOPPED and INTERRUPT.came:
        INTERRUPT.leave()
    return code
