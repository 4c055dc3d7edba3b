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
from collections.abc import Callable, Iterable, Sequence
from types import FrameType
from typing import TextIO, cast

STOPPED = 130
# The exit code where all is well but for what was to be printed: that of a file that cannot be written.
UNWRITTEN = 4
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
            # Python gives SIGINT back to the system while it ends, which would kill a process whose work is done.
            atexit.register(signal.signal, signal.SIGINT, signal.SIG_IGN)

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
    """Runs `main` as the command of this process; a SIGINT ends the process with one line and exit code 130.

    What it prints may go to a full disk, or to a reader that has gone: it does its work all the same.
    """
    INTERRUPT.listen(None if "--streaming" in argv else ENDING)
    out, error = (Output(each, number) for number, each in ((1, sys.stdout), (2, sys.stderr)))
    sys.stdout, sys.stderr = cast(TextIO, out), cast(TextIO, error)
    try:
        code = main(argv)
    except SystemExit as ended:  # of --help
        code = ended.code if isinstance(ended.code, int) else 0
    except BaseException:
        if INTERRUPT.came:
            INTERRUPT.leave()
        raise
    if code == STOPPED and INTERRUPT.came:
        INTERRUPT.leave()
    lost, _ = out.close(), error.close()
    if code == 0 and lost is not None and not isinstance(lost, BrokenPipeError):
        with contextlib.suppress(OSError):
            os.write(2, f"millrace: what was printed is lost: {lost.strerror or lost}; the work is done\n".encode())
        return UNWRITTEN
    return code


class Output:
    """Standard output or standard error, whose errors are kept instead of raised: they say nothing about the work.

    Args:
        stream: where it goes; None if the process has none.
        number: its file descriptor.
    """

    def __init__(self, stream: TextIO | None, number: int) -> None:
        self.stream: TextIO = open(os.devnull, "w") if stream is None else stream  # noqa: SIM115
        self.number = number
        self.lost: OSError | None = None

    def write(self, text: str) -> int:
        if self.lost is None:
            self._try(lambda: self.stream.write(text))
        return len(text)

    def writelines(self, lines: Iterable[str]) -> None:
        for line in lines:
            self.write(line)

    def flush(self) -> None:
        if self.lost is None:
            self._try(self.stream.flush)

    def close(self) -> OSError | None:
        """Writes the rest; returns the first error.  What is lost is not tried again when the process ends."""
        self.flush()
        if self.lost is not None:
            with contextlib.suppress(OSError):
                nowhere = os.open(os.devnull, os.O_WRONLY)
                os.dup2(nowhere, self.number)
                os.close(nowhere)
        return self.lost

    def _try(self, action: Callable[[], object]) -> None:
        try:
            action()
        except OSError as error:
            self.lost = error

    def __getattr__(self, name: str) -> object:
        return getattr(self.stream, name)
