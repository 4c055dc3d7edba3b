"""Every entry under a source is read, refused by its name, or named as passed over."""

import logging
import os
import shutil
import socket
from collections.abc import Callable
from pathlib import Path

import polars as pl
import pytest
from deltalake import write_deltalake

from schemas import Source
from schemas.errors import ContractError, DataError, MillraceError
from tests.support.slices import slices_of
from transforms.sources.contracts import Contract
from transforms.sources.inventory import source_files, survey_source
from transforms.sources.listing import list_files

source = Source("sales", columns={"id": pl.Int64})


def put(path: Path, *ids: int) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pl.DataFrame({"id": list(ids)}, schema={"id": pl.Int64}).write_parquet(path)
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return put(tmp_path / "sales" / "a.parquet", 1).parent


def names(folder: Path) -> list[str]:
    return [str(Path(path).relative_to(folder)) for path in list_files("sales", str(folder)).files]


def refusal(folder: Path) -> str:
    with pytest.raises(MillraceError) as caught:
        source_files(str(folder.parent), source)
    assert caught.value.exit_code == 3
    return str(caught.value)


def test_linked_folders_and_files_are_read(folder: Path, tmp_path: Path) -> None:
    put(tmp_path / "archive" / "year=2020" / "b.parquet", 2)
    put(tmp_path / "c.parquet", 3)
    (folder / "older").symlink_to(tmp_path / "archive")
    (folder / "c.parquet").symlink_to(tmp_path / "c.parquet")
    assert names(folder) == ["a.parquet", "c.parquet", "older/year=2020/b.parquet"]


def test_a_source_may_be_a_link_itself(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(folder)
    assert names(tmp_path / "link") == ["a.parquet"]


def test_a_folder_named_as_a_file_is_read(folder: Path) -> None:
    put(folder / "out.parquet" / "part-0.snappy.parquet", 2)
    put(folder.parent / "sales.parquet" / "part-1.parquet", 3)
    assert [Path(path).name for path in source_files(str(folder.parent), source)] == [
        "part-1.parquet",
        "a.parquet",
        "part-0.snappy.parquet",
    ]


def test_upper_case_suffixes_are_read(folder: Path) -> None:
    put(folder / "B.PARQUET", 2)
    assert sum(each.rows for each in slices_of(str(folder.parent), Contract(source, ("id",)))) == 2


def socket_at(path: Path) -> None:
    here = os.getcwd()
    os.chdir(path.parent)  # an address is at most 107 bytes long
    try:
        with socket.socket(socket.AF_UNIX) as made:
            made.bind(path.name)
    finally:
        os.chdir(here)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda folder: (folder / "x").symlink_to("/nowhere/x"), ["x", "a link to /nowhere/x, which is not there"]),
        (lambda folder: (folder / "x.parquet").symlink_to("gone.parquet"), ["a link to gone.parquet"]),
        (lambda folder: (folder / "x").symlink_to("x"), ["a link that leads back to itself"]),
        (lambda folder: (folder / "x").symlink_to(folder), ["x: the same as", "by way of a link"]),
        (lambda folder: (folder / "x.parquet").symlink_to("a.parquet"), ["x.parquet: the same as", "a.parquet"]),
        (lambda folder: os.link(folder / "a.parquet", folder / "x.parquet"), ["holds each file once"]),
        (lambda folder: os.mkfifo(folder / "x.parquet"), ["x.parquet: a named pipe"]),
        (lambda folder: socket_at(folder / "x"), ["x: a socket"]),
        (lambda folder: (folder / "x.parquet").symlink_to("/dev/null"), ["a character device"]),
        (lambda folder: (folder / "x.csv").write_text("id\n1\n"), ["x.csv: 5 bytes", "let its name begin with _"]),
        (lambda folder: (folder / "x.parquet.gz").write_bytes(b""), ["x.parquet.gz: 0 bytes"]),
        (lambda folder: put(folder / "x", 1), ["x: ", "name it .parquet if it is Parquet"]),
        (lambda folder: put(folder / "x.parquet").write_bytes(b""), ["x.parquet", "whole Parquet"]),
        (
            lambda folder: shutil.copy(folder / "a.parquet", folder / os.fsdecode(b"x\xff.parquet")),
            ["x\\udcff.parquet: a name that is not UTF-8"],
        ),
        (lambda folder: write_deltalake(folder / "eu", pl.DataFrame({"id": [1]})), ["a Delta table inside the source"]),
    ],
)
def test_what_is_not_parquet_is_refused_by_its_name(
    folder: Path, make: Callable[[Path], object], words: list[str]
) -> None:
    make(folder)
    with pytest.raises(ContractError) as caught:
        slices_of(str(folder.parent), Contract(source, ("id",)))
    for word in ("Source 'sales'", *words):
        assert word in str(caught.value)


def test_a_loop_through_another_folder_is_refused(folder: Path, tmp_path: Path) -> None:
    put(tmp_path / "archive" / "b.parquet", 2)
    (folder / "older").symlink_to(tmp_path / "archive")
    (tmp_path / "archive" / "newer").symlink_to(folder)
    assert "older/newer: the same as" in refusal(folder)


@pytest.mark.parametrize("make", [lambda path: path.write_text("x"), os.mkfifo, lambda path: path.symlink_to("gone")])
def test_a_source_that_is_no_folder_is_refused(tmp_path: Path, make: Callable[[Path], object]) -> None:
    make(tmp_path / "sales")
    assert str(tmp_path / "sales") in refusal(tmp_path / "sales")


def test_hidden_entries_are_named_once_and_markers_are_not(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    for name in ("_SUCCESS", "_metadata", ".a.parquet.crc", ".part-1.parquet", "_2024/b.parquet"):
        put(folder / name, 9)
    (folder / ".#a.parquet").symlink_to("gone")  # as an editor's lock
    put(folder / "_year=2024" / "c.parquet", 3)
    with caplog.at_level(logging.WARNING, "millrace"):
        assert names(folder) == names(folder) == ["_year=2024/c.parquet", "a.parquet"]
    (printed,) = (record.getMessage() for record in caplog.records)
    assert "source sales: passed over" in printed
    assert f"{folder}/.part-1.parquet" in printed
    assert f"{folder}/_2024" in printed
    assert "_SUCCESS" not in printed
    assert "crc" not in printed


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda folder: shutil.rmtree(folder / "day=2"), "day=2/b.parquet gone"),
        (lambda folder: (folder / "a.parquet").unlink(), "a.parquet gone"),
        (lambda folder: put(folder / "a.parquet", 1, 2), "a.parquet replaced"),
        (lambda folder: os.utime(folder / "a.parquet", (1, 1)), "a.parquet replaced"),
        (lambda folder: (folder / "a.parquet").rename(folder / "z.parquet"), "a.parquet gone"),
    ],
)
def test_files_that_are_gone_or_replaced_since_they_were_listed_are_refused(
    folder: Path, change: Callable[[Path], object], words: str
) -> None:
    put(folder / "day=2" / "b.parquet", 2)
    listed = list_files("sales", str(folder))
    assert listed.check_unchanged() == ()
    change(folder)
    with pytest.raises(DataError, match="stay as they are while a run reads them") as caught:
        listed.check_unchanged()
    assert words in str(caught.value)


def test_files_that_were_added_since_are_returned(folder: Path) -> None:
    listed = list_files("sales", str(folder))
    new = put(folder / "new" / "b.parquet", 2)
    assert listed.check_unchanged() == (str(new),)


def test_a_folder_that_disappears_while_it_is_listed_is_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put(folder / "day=2" / "b.parquet", 2)
    real = os.scandir

    def scandir(path: str) -> object:
        if str(path).endswith("day=2"):
            shutil.rmtree(path)
        return real(path)

    monkeypatch.setattr(os, "scandir", scandir)
    assert "day=2 disappeared" in refusal(folder)


# Delta tables


def delta(folder: Path) -> Path:
    shutil.rmtree(folder)
    write_deltalake(folder, pl.DataFrame({"id": [1]}))
    write_deltalake(folder, pl.DataFrame({"id": [2]}), mode="overwrite")
    return folder


def empty(log: Path) -> None:
    for path in log.iterdir():
        path.unlink()


def as_file(log: Path) -> None:
    shutil.rmtree(log)
    log.write_text("")


def without_first(log: Path) -> None:
    (log / f"{0:020}.json").unlink()


def without_middle(log: Path) -> None:
    write_deltalake(log.parent, pl.DataFrame({"id": [3]}), mode="overwrite")
    (log / f"{1:020}.json").unlink()


def as_link(log: Path) -> None:
    shutil.rmtree(log)
    log.symlink_to("gone")


def written(number: int, content: bytes) -> Callable[[Path], object]:
    return lambda log: (log / f"{number:020}.json").write_bytes(content)


@pytest.mark.parametrize(
    "spoil",
    [
        empty,
        as_file,
        as_link,
        without_first,
        without_middle,
        written(0, b""),
        written(1, b""),
        written(1, b'{"add":{"path'),
        written(1, b"\xff\xfe\x00"),
        written(1, b"{}\n"),
        written(1, b'{"add":{}}\n'),
        written(1, b"[1, 2]\n"),
        written(3, b'{"commitInfo":{}}\n'),
    ],
)
def test_a_log_that_is_empty_or_broken_is_refused_and_its_files_are_not_read_as_parquet(
    folder: Path, spoil: Callable[[Path], object]
) -> None:
    spoil(delta(folder) / "_delta_log")
    with pytest.raises(MillraceError) as caught:
        survey_source(str(folder.parent), Contract(source, ("id",)))
    assert str(folder) in str(caught.value)
    assert caught.value.exit_code in (3, 4)


def test_a_file_beside_a_delta_table_is_refused(folder: Path) -> None:
    put(delta(folder).parent / "sales.parquet", 3)
    assert "is a Delta table or Parquet files, not both" in refusal(folder)
