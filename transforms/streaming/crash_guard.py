"""Messages that kill the process that decodes them, found after its restart and refused.

Before a worker decodes messages, it notes them in a small memory-mapped file, which survives the process however it
dies; afterwards it clears the note.  A worker that starts finds the notes of dead workers.  A noted message may have
killed its worker, or something else did while it was decoded.  So the message is decoded again in a process of its own.
If that process dies too, the message becomes a dead letter, and the verdict is stored beside the notes.  See ADR 15.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import hashlib
import json
import logging
import mmap
import os
import pickle
import resource
import select
import signal
import subprocess
import sys
import tempfile
import uuid
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from transforms.storage.file_systems import open_regular
from transforms.storage.stored_json import DAMAGE, parse_object, read_regular
from transforms.streaming.messages import Message, by_partition

log = logging.getLogger("millrace.live")
# Bytes of a note, and bytes of memory that the trial of a message may take in addition to those that the process has
# mapped.
NOTE_BYTES, TRIAL_MEMORY = 1 << 16, 4 << 30
# Seconds that a trial may take, including its start.
TRIAL_SECONDS = 120.0
DONE = b"."
_NOTES, _SUSPECTS, _VERDICTS, _LOCK = "note-", "suspect-", "verdicts", "lock"


def guard_folder(store: str, job: str) -> str:
    """The folder of the notes of a job, on a disk of the machine of the worker.

    Args:
        store: the folder of the tables; if it is in an object store, the notes are in a temporary folder of the
            machine.
        job: name of the job among those of the store.
    """
    if "://" not in store:
        return os.path.join(store, "crash_guard", job)
    name = hashlib.sha256(f"{store} {job}".encode()).hexdigest()[:16]
    return os.path.join(tempfile.gettempdir(), f"millrace-crash-guard-{os.getuid()}-{name}")


@dataclasses.dataclass(frozen=True)
class Suspects:
    """Messages `[first, last]` of a partition that a worker was decoding when it died, and the file that records it."""

    topic: str
    partition: int
    first: int
    last: int
    file: str = ""

    def has(self, message: Message) -> bool:
        same = (message.topic, message.partition) == (self.topic, self.partition)
        return same and self.first <= message.offset <= self.last

    def is_before(self, message: Message) -> bool:
        same = (message.topic, message.partition) == (self.topic, self.partition)
        return same and message.offset >= self.last


class CrashGuard:
    """Notes the messages that a worker decodes, and refuses those that have killed one.

    Args:
        folder: the folder of the notes (see `guard_folder`); None switches the guard off.
        decode: decodes one message; a function that can be pickled.
    """

    def __init__(self, folder: str | None, decode: Callable[[Message], object]) -> None:
        self.trial = DecodingAttempt(decode)
        self.suspects = list[Suspects]()
        self.verdicts = dict[str, str]()
        self.cleared = set[str]()
        self.note: mmap.mmap | None = None
        if folder is None:
            return
        try:
            self._open(Path(folder))
        except OSError as error:
            log.warning("no crash guard: %s; a message that kills its worker would do so at every start", error)

    def _open(self, folder: Path) -> None:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        if folder.stat().st_uid != os.getuid():  # in a temporary folder, other users could create files of known names
            raise PermissionError(f"{folder} belongs to another user")
        self.folder = folder
        # So that no other worker takes it for the note of a dead worker before it is locked.
        with os.fdopen(os.open(folder / _LOCK, os.O_RDWR | os.O_CREAT | os.O_NONBLOCK, 0o600), "wb") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            self._read_notes()
            self.path = folder / f"{_NOTES}{uuid.uuid4().hex}"
            with open(self.path, "w+b") as file:
                fcntl.flock(
                    file, fcntl.LOCK_EX
                )  # held while the worker lives, since the memory map keeps the file open
                file.truncate(NOTE_BYTES)
                self.note = mmap.mmap(file.fileno(), NOTE_BYTES)

    def _read_notes(self) -> None:
        """Turns the notes of dead workers into suspects; reads all suspects and verdicts."""
        for path in self.folder.glob(f"{_NOTES}*"):
            with contextlib.suppress(OSError), open_regular(str(path)) as file:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # raises while its worker lives
                for each in _ranges(file.read(NOTE_BYTES)):
                    (self.folder / f"{_SUSPECTS}{uuid.uuid4().hex}").write_text(json.dumps(each))
                path.unlink()
        for path in self.folder.glob(f"{_SUSPECTS}*"):
            with contextlib.suppress(OSError, *DAMAGE):
                (found,) = _ranges_of(json.loads(b"[%b]" % read_regular(str(path))))
                self.suspects.append(Suspects(*found, str(path)))
        with contextlib.suppress(OSError, *DAMAGE):
            for line in read_regular(str(self.folder / _VERDICTS)).decode(errors="replace").splitlines():
                with contextlib.suppress(*DAMAGE):  # cut short, as by a full disk
                    verdict = parse_object(line)
                    self.verdicts[str(verdict["message"])] = str(verdict["reason"])

    @contextlib.contextmanager
    def decoding(self, messages: Sequence[Message]) -> Iterator[list[Message]]:
        """Notes the messages while they are decoded; yields them, with a reason in those that are refused."""
        checked = [self._checked(each) for each in messages] if self.suspects or self.verdicts else list(messages)
        if self.note is None:
            yield checked
            return
        ranges = [
            (topic, number, some[0].offset, some[-1].offset) for (topic, number), some in by_partition(messages).items()
        ]
        text = json.dumps(ranges).encode()
        if len(text) < NOTE_BYTES - 8:
            self.note[8 : 8 + len(text)] = text
            self.note[:8] = len(text).to_bytes(8, "little")
        try:
            yield checked
        finally:
            self.note[:8] = bytes(8)

    def _checked(self, message: Message) -> Message:
        """The message, with a reason if it kills the process that decodes it."""
        suspects = [each for each in self.suspects if each.has(message)]
        if not suspects and not self.verdicts:
            return message
        name = _name(message)
        if suspects and name not in self.verdicts and name not in self.cleared:
            reason = self.trial.death(message)
            if reason:
                self.verdicts[name] = reason
                self._keep_verdict(name, reason)
            else:
                self.cleared.add(name)
        for each in [each for each in self.suspects if each.is_before(message)]:
            self.suspects.remove(each)
            with contextlib.suppress(OSError):
                Path(each.file).unlink(missing_ok=True)
        if not self.suspects:
            self.trial.close()
        return message._replace(refused=self.verdicts[name]) if name in self.verdicts else message

    def _keep_verdict(self, name: str, reason: str) -> None:
        """Appends to the verdicts; without the file, the next worker tries the message again."""
        try:
            handle = os.open(self.folder / _VERDICTS, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NONBLOCK, 0o600)
            with os.fdopen(handle, "ab") as file:
                file.write(b"\n" + json.dumps({"message": name, "reason": reason}).encode() + b"\n")
        except OSError as error:
            log.warning("the verdict on %s could not be kept: %s", name, error)

    def close(self) -> None:
        """Removes the worker's note."""
        self.trial.close()
        if self.note is not None:
            self.note.close()
            self.path.unlink(missing_ok=True)
            self.note = None


Range = tuple[str, int, int, int]


def _ranges(note: bytes) -> list[Range]:
    """The messages that a note names; none if it is damaged."""
    size = int.from_bytes(note[:8], "little")
    if not 0 < size < NOTE_BYTES:
        return []
    with contextlib.suppress(*DAMAGE):
        return _ranges_of(json.loads(note[8 : 8 + size]))
    return []


def _ranges_of(value: object) -> list[Range]:
    """
    Raises:
        ValueError, TypeError: it is no list of topics with partition, first and last offset.
    """
    if not isinstance(value, list):
        raise TypeError("a list is expected")
    return [(str(topic), int(partition), int(first), int(last)) for topic, partition, first, last in value]


def _name(message: Message) -> str:
    """The position of a message, and its digest: a topic that was created again has other messages at the same
    offsets."""
    digest = hashlib.sha256(b"%d %b" % (len(message.key or b""), (message.key or b"") + message.value)).hexdigest()
    return f"{message.topic}/{message.partition}@{message.offset} {digest}"


class DecodingAttempt:
    """A process that decodes messages, so that they cannot kill this one.  It is started when it is needed.

    Args:
        decode: decodes one message.
    """

    def __init__(self, decode: Callable[[Message], object]) -> None:
        self.decode = decode
        self.child: subprocess.Popen[bytes] | None = None

    def death(self, message: Message) -> str:
        """How the message killed the process; empty if it did not, or if the process could not be started."""
        place = f"{message.topic}/{message.partition}@{message.offset}"
        log.warning("%s was being decoded when a worker died: trying it in a process of its own", place)
        try:
            if self.child is None:
                self._start()
            reply = self._try(message)
        except OSError as error:
            self.close()
            log.warning("%s could not be tried: %s", place, error)
            return ""
        if reply == DONE:
            return ""
        assert self.child is not None
        if reply is None:
            self.child.kill()
        code = self.child.wait()
        how = signal.Signals(-code).name if code < 0 else f"exit status {code}"
        how = "it takes too long" if reply is None else how
        self.close()
        log.warning("%s kills the process that decodes it (%s): it is a dead letter", place, how)
        return f"a message can be decoded; this one kills the process that does ({how})"

    def _start(self) -> None:
        self.child = subprocess.Popen(
            [sys.executable, "-m", "transforms.streaming.crash_guard"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        )
        self._send(self.decode)
        if self._reply() != DONE:
            raise OSError("the process does not start")

    def _try(self, message: Message) -> bytes | None:
        self._send(message)
        return self._reply()

    def _send(self, value: object) -> None:
        assert self.child is not None
        assert self.child.stdin is not None
        pickle.dump(value, self.child.stdin)  # only `main` reads it, and only this process writes it
        self.child.stdin.flush()

    def _reply(self) -> bytes | None:
        """A byte; empty if the process ended, None if it takes too long."""
        assert self.child is not None
        assert self.child.stdout is not None
        ready, _, _ = select.select([self.child.stdout], [], [], TRIAL_SECONDS)
        return os.read(self.child.stdout.fileno(), 1) if ready else None

    def close(self) -> None:
        """Ends the process."""
        child, self.child = self.child, None
        if child is not None:
            child.kill()
            child.wait()
            for pipe in (child.stdin, child.stdout):
                with contextlib.suppress(OSError):
                    pipe.close()  # type: ignore[union-attr]


def main() -> int:
    """Decodes messages from standard input, one after another: the process of a trial."""
    replies = os.dup(1)
    os.dup2(2, 1)  # printed text must not be taken for a reply
    decode = pickle.load(sys.stdin.buffer)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    mapped = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    with contextlib.suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_AS, (mapped + TRIAL_MEMORY, resource.getrlimit(resource.RLIMIT_AS)[1]))
    os.write(replies, DONE)
    while True:
        try:
            message = pickle.load(sys.stdin.buffer)
        except EOFError:
            return 0
        decode(message)
        os.write(replies, DONE)


if __name__ == "__main__":
    sys.exit(main())
