"""Sources at an address: listed and read through Beam's own file systems, here one whose objects lie on a disk.

It shows objects as gs:// and s3:// do: there are no folders and no links, and an object is there whole or not at all.
"""

from __future__ import annotations

import io
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from apache_beam.io.filesystem import BeamIOError, FileMetadata, FileSystem

from schemas import Source
from schemas.errors import ContractError, DataError
from transforms.sources.contracts import Contract
from transforms.sources.inventory import survey_files
from transforms.sources.listing import list_files, require_unchanged
from transforms.sources.reader import read_slices


class ObjectsOnDisk(FileSystem):  # type: ignore[misc]
    """objects://bucket/name → ROOT/bucket/name.  Beam finds it by its scheme."""

    root = ""
    listed = 0

    @classmethod
    def scheme(cls) -> str:
        return "objects"

    def _path(self, url: str) -> str:
        return os.path.join(self.root, url.removeprefix("objects://"))

    def join(self, basepath: str, *paths: str) -> str:
        return "/".join([basepath.rstrip("/"), *(path.strip("/") for path in paths)])

    def split(self, path: str) -> tuple[str, str]:
        head, _, tail = path.rpartition("/")
        return head, tail

    def has_dirs(self) -> bool:
        return False

    def _list(self, dir_or_prefix: str) -> Iterator[FileMetadata]:
        type(self).listed += 1
        for folder, _, names in os.walk(self.root):
            for name in names:
                path = os.path.join(folder, name)
                url = "objects://" + os.path.relpath(path, self.root)
                if url.startswith(dir_or_prefix):
                    yield FileMetadata(url, os.path.getsize(path), os.path.getmtime(path))

    def open(self, path: str, mime_type: str = "", compression_type: str = "auto") -> Any:
        return io.BytesIO(Path(self._path(path)).read_bytes())

    def create(self, path: str, mime_type: str = "", compression_type: str = "auto") -> Any:
        os.makedirs(os.path.dirname(self._path(path)), exist_ok=True)
        return open(self._path(path), "wb")

    def exists(self, path: str) -> bool:
        return os.path.isfile(self._path(path))

    def size(self, path: str) -> int:
        return os.path.getsize(self._path(path))

    def last_updated(self, path: str) -> float:
        return os.path.getmtime(self._path(path))

    def metadata(self, path: str) -> FileMetadata:
        if not self.exists(path):
            raise BeamIOError("metadata", {path: FileNotFoundError(path)})
        return FileMetadata(path, self.size(path), self.last_updated(path))

    def mkdirs(self, path: str) -> None:
        raise NotImplementedError

    copy = rename = delete = mkdirs


FOLDER = "objects://lake/sources/events"
EVENTS = Source("events", time="at", columns={"k": pl.Int64})


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(ObjectsOnDisk, "root", str(tmp_path))
    path = tmp_path / "lake" / "sources" / "events"
    at = pl.datetime_range(pl.datetime(2024, 1, 1), pl.datetime(2024, 1, 2), "1h", time_zone="UTC", eager=True)
    rows = pl.DataFrame({"at": at.cast(pl.Datetime("us", "UTC")), "k": range(len(at))})
    for number, part in enumerate(rows.iter_slices(10)):
        (path / f"day={number}").mkdir(parents=True)
        part.write_parquet(path / f"day={number}" / "a.parquet")
    for beside in ("events2", "other"):  # of other sources
        shutil.copytree(path, path.with_name(beside))
    return path


def test_objects_are_read_or_passed_over_as_files_are(folder: Path) -> None:
    (folder / "_SUCCESS").touch()
    (folder / "_draft").mkdir()
    shutil.copy(folder / "day=0" / "a.parquet", folder / "_draft" / "a.parquet")
    listing = list_files("events", FOLDER)
    assert [path.removeprefix(FOLDER) for path in listing.files] == [f"/day={number}/a.parquet" for number in range(3)]
    assert listing.passed_over == (f"{FOLDER}/_draft",)
    found = survey_files("objects://lake/sources", Contract(EVENTS, ("at", "k")))
    assert read_slices(found.contract, found.slices).frame["k"].sort().to_list() == list(range(25))
    (folder / "a.txt").write_text("at,k\n")
    with pytest.raises(ContractError, match="a folder or a Parquet file"):
        list_files("events", FOLDER)


@pytest.mark.parametrize("how", ["removed", "all removed", "replaced"])
def test_objects_that_change_while_they_are_read_are_noticed(folder: Path, how: str) -> None:
    listing = list_files("events", FOLDER)
    assert require_unchanged("read", [listing]) == "read"
    path = folder / "day=1" / "a.parquet"
    if how == "replaced":
        pl.read_parquet(path)[:-1].write_parquet(path)
    elif how == "removed":
        path.unlink()
    else:
        shutil.rmtree(folder)
    with pytest.raises(DataError, match="replaced since" if how == "replaced" else "gone since"):
        require_unchanged("read", [listing])


def test_objects_that_are_added_are_named_and_looking_again_is_one_listing(
    folder: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    listing = list_files("events", FOLDER)
    shutil.copytree(folder / "day=0", folder / "day=9")
    monkeypatch.setattr(ObjectsOnDisk, "listed", 0)
    require_unchanged("read", [listing])
    assert f"not read, since they were added after the run began: {FOLDER}/day=9/a.parquet" in caplog.text
    assert ObjectsOnDisk.listed == 1
