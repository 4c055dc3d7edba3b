"""Moves of the alias `champion`: one at a time, and each has a record (docs/adr/0014)."""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import os
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING

from schemas.errors import StoreError
from transforms.models.registry_content import RegistryContent
from transforms.models.stored_records import ChampionMove
from transforms.storage.stored_json import DAMAGE, parse_record

if TYPE_CHECKING:
    from mlflow import MlflowClient

__all__ = ["CHAMPION", "ChampionMoves", "only_move"]

log = logging.getLogger("millrace.registry")
CHAMPION = "champion"
# Prefix of a rollback's reason.
ROLLBACK = "rollback: "
# Kinds of record.  A confirmation names the version that was champion already.  Records of earlier versions of Millrace
# have neither a kind nor a sequence number.
PROMOTION, RETURN, CONFIRMATION = "promotion", "rollback", "confirmation"
LONGEST_TAG = 5000  # characters of a tag's value in MLflow
WAIT = 60.0


@contextlib.contextmanager
def only_move(folder: Path | None) -> Iterator[None]:
    """Hold the lock under which the alias of a local registry moves; a registry on a server has none.

    The operating system releases it when the process ends, however it ends.

    Raises:
        StoreError: another process has held it for a minute, or the folder cannot be written.
    """
    if folder is None:
        yield
        return
    path, until = folder / ".champion.lock", time.monotonic() + WAIT
    try:
        file = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    except OSError as error:
        raise StoreError("The model registry can be written", f"{path}: {error.strerror}", "Grant access") from None
    try:
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > until:
                    raise StoreError(
                        "The champion of a registry is moved by one command at a time",
                        f"{path} has been held by another for {WAIT:.0f} s",
                        "Wait for that command to end, or stop it",
                    ) from None
                time.sleep(0.02)
            except OSError as error:  # some network file systems have no locks
                log.warning("moves of the champion are not locked: %s: %s", path, error.strerror)
                break
        yield
    finally:
        os.close(file)


class ChampionMoves:
    """The alias `champion` of one registered model, and the records of its moves, which are tags of the model.

    A move is written in three steps: a pending record, the alias, and the record without its mark.  A pending record
        whose version is champion is a move that happened; any other pending record is of an interrupted move, and the
        next move removes it.  A move holds `only_move`.

    Args:
        content: where alias and records are read.
        name: the registered model.
        client: MLflow's client, to move the alias.
    """

    def __init__(self, content: RegistryContent, name: str, client: MlflowClient | None = None) -> None:
        self.content, self.name, self._client = content, name, client
        self.read()

    @property
    def client(self) -> MlflowClient:
        if self._client is None:
            raise ValueError("the alias is moved with MLflow's client")
        return self._client

    def read(self) -> None:
        """Read alias and records."""
        model = self.content.model(self.name)
        self.champion = model.aliases.get(CHAMPION) if model else None
        self.tags: dict[str, ChampionMove] = {}
        for tag, text in (model.tags if model else {}).items():
            if tag.startswith(f"{CHAMPION}.") and (record := _parsed(tag, text)) is not None:
                self.tags[tag] = record

    @property
    def records(self) -> list[ChampionMove]:
        """Records of moves that happened, in their order, with confirmations."""
        ordered = sorted(self.tags.items(), key=lambda each: (each[1].get("sequence", 0), each[0]))
        records = [
            _dated(tag, record)
            for tag, record in ordered
            if not record.get("pending") or record["version"] == self.champion
        ]
        # Earlier versions of Millrace wrote no mark: such a record is of an interrupted move if the next move, or now
        # the alias, still starts where it started.
        after = [record["before"] for record in records[1:]] + [self.champion]
        return [
            _settled(record)
            for record, then in zip(records, after)
            if "sequence" in record or then == record["version"] or then != record["before"]
        ]

    @property
    def moves(self) -> list[ChampionMove]:
        """Records of moves, without confirmations."""
        return [record for record in self.records if record.get("kind") != CONFIRMATION]

    def promote(self, version: str, why: str, who: str, kind: str = PROMOTION) -> str | None:
        """Move the alias to `version`, which exists, and return the version that it leaves."""
        before = self.champion
        for tag, record in list(self.tags.items()):
            if record.get("pending"):
                if record["version"] == before:
                    self._record(tag, _settled(record))
                else:
                    self.client.delete_registered_model_tag(self.name, tag)
                    del self.tags[tag]
        sequence = 1 + max((int(each.get("sequence", 0)) for each in self.tags.values()), default=0)
        move: ChampionMove = {"version": version, "before": before, "why": why, "who": who, "sequence": sequence}
        tag = self._new_tag()
        if before == version:
            self._record(tag, {**move, "kind": CONFIRMATION})
            return before
        self._record(tag, {**move, "kind": kind, "pending": True})
        self.client.set_registered_model_alias(self.name, CHAMPION, version)
        self.champion = version
        self._record(tag, {**move, "kind": kind})
        return before

    def previous(self) -> str:
        """The version that was champion before the present one was promoted.

        Raises:
            StoreError: there is none.
        """
        stack: list[str] = []
        for record in self.moves:
            back = record["kind"] == RETURN if "kind" in record else record["why"].startswith(ROLLBACK)
            if back and record["version"] in stack:
                del stack[len(stack) - stack[::-1].index(record["version"]) :]
            else:
                stack.append(record["version"])
        if self.champion is not None and stack[-1:] != [self.champion]:  # another tool moved the alias
            stack.append(self.champion)
        if len(stack) < 2 or self.champion is None:
            raise StoreError(
                f"Model {self.name!r} had a champion before this one",
                ", ".join(stack) or "none at all",
                "Name one: millrace promote VERSION --why …",
            )
        return stack[-2]

    def _new_tag(self) -> str:
        """A name that no record has.  Its time is only for display: the sequence number decides the order."""
        at = datetime.now(UTC)
        while (tag := f"{CHAMPION}.{at:%Y-%m-%dT%H:%M:%S.%fZ}") in self.tags:  # a tag's name takes no +
            at += timedelta(microseconds=1)
        return tag

    def _record(self, tag: str, record: ChampionMove) -> None:
        record = {**record, "who": record["who"][:200]}
        while len(text := json.dumps(record, ensure_ascii=False)) > LONGEST_TAG:
            record["why"] = record["why"][: len(record["why"]) * 3 // 4] + "…"
        self.client.set_registered_model_tag(self.name, tag, text)
        self.tags[tag] = record


def _dated(tag: str, record: ChampionMove) -> ChampionMove:
    """The record with the time in its tag's name, unless it has a time of its own."""
    dated: ChampionMove = {"at": tag.removeprefix(f"{CHAMPION}."), **record}
    return dated


def _settled(record: ChampionMove) -> ChampionMove:
    """The record of a move that happened."""
    settled = record.copy()
    settled.pop("pending", None)
    return settled


def _parsed(tag: str, text: str) -> ChampionMove | None:
    """A tag's record; None, with a warning, if something else wrote it."""
    try:
        return parse_record(ChampionMove, text)
    except DAMAGE:
        pass
    log.warning("the tag %s is not a record of a move, and is ignored", tag)
    return None
