"""Files and logs that somebody made to reach further than their folder: no code of theirs runs, no path of theirs is
opened."""

import ast
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from schemas.errors import ContractError, StoreError
from tests.support import market
from tests.support.crafted import running_code, with_schema
from tests.support.features_runs import run
from transforms.storage.delta_log import file_actions, path_within
from transforms.storage.delta_tables import data_files, open_table, paths_of
from transforms.streaming.messages import to_arrow

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("column", [None, "price"])
def test_a_parquet_file_whose_schema_names_code_is_refused(tmp_path: Path, column: str | None) -> None:
    frames = market.sources(20)
    market.write(tmp_path, frames)
    path = next((tmp_path / "sources" / "sales").rglob("*.parquet"))
    table = pq.read_table(path)
    pq.write_table(with_schema(table, running_code(table.schema, tmp_path / "ran", column)), path)
    with pytest.raises(ContractError, match=r"Source 'sales': every file must be complete Parquet.*py_extension_type"):
        run(tmp_path)
    assert not (tmp_path / "ran").exists()


READS_ARROW = re.compile(r"import pyarrow\.parquet|\bpa\.ipc\.|pyarrow\.(ipc|feather|dataset)")


def imports_at_once(module: str) -> Iterator[str]:
    """Names that the module imports when it is imported itself."""
    for node in ast.parse((ROOT / Path(*module.split("."))).with_suffix(".py").read_text()).body:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield str(node.module)


def protects(module: str, seen: set[str]) -> bool:
    if module == "pyarrow_hotfix":
        return True
    if module in seen or not (ROOT / Path(*module.split("."))).with_suffix(".py").exists():
        return False
    return any(protects(each, seen | {module}) for each in list(imports_at_once(module)))


def test_every_module_that_reads_arrow_is_protected() -> None:
    """By our own imports: that Beam protects itself is its affair."""
    readers = {
        ".".join(path.relative_to(ROOT).with_suffix("").parts)
        for folder in ("schemas", "transforms", "beam_pipelines", "deploy", "examples")
        for path in (ROOT / folder).rglob("*.py")
        if READS_ARROW.search(path.read_text(encoding="utf-8"))
    }
    assert {"transforms.streaming.messages", "transforms.storage.delta_tables", "examples.flights.data"} <= readers
    assert not {each for each in readers if not protects(each, set())}


def test_a_consumer_of_messages_is_protected(tmp_path: Path) -> None:
    """In a process of its own, as a consumer is."""
    schema = running_code(pa.schema([("a", pa.int64())]), tmp_path / "ran", "a")
    (tmp_path / "message").write_bytes(to_arrow(with_schema(pa.table({"a": [1]}), schema).to_batches()[0]))
    code = (
        "import pathlib, sys\nfrom transforms.streaming.messages import from_arrow\n"
        "try:\n    from_arrow(pathlib.Path(sys.argv[1]).read_bytes())\n"
        "except Exception as error:\n    print(type(error).__name__)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "message")], capture_output=True, text=True, timeout=120, cwd=ROOT
    )
    assert done.stdout.strip() == "ContractError", done.stderr
    assert not (tmp_path / "ran").exists()


LEAVING = [
    "/etc/passwd",
    "../visits/part.parquet",
    "date=2020-01-01/../../visits/part.parquet",
    "%2e%2e/visits/part.parquet",
    "%2Fetc%2Fpasswd",
    "..%5Cvisits",
    "file:///etc/passwd",
    "FILE:/etc/passwd",
    "s3://bucket/part.parquet",
    "a%00b.parquet",
    "",
]


@pytest.mark.parametrize("path", LEAVING)
def test_a_path_in_a_log_that_leaves_the_table_is_refused(path: str) -> None:
    with pytest.raises(StoreError, match="The files of a Delta table must be in its folder"):
        path_within("/store/table", path)


@given(st.text(min_size=1, max_size=12))
def test_a_path_that_is_taken_stays_in_the_table(text: str) -> None:
    try:
        path = path_within("/store/table", text)
    except StoreError:
        return
    assert Path("/store/table", path).is_relative_to("/store/table")
    assert ".." not in Path(path).parts


@pytest.mark.parametrize(
    "path",
    ["date=2020-01-01/part-0.parquet", "city=a%3Ab/x%20y.parquet", "note=..half../p.parquet", "t=10:00/p.parquet"],
)
def test_names_that_only_look_like_it_are_taken(path: str) -> None:
    assert path_within("/store/table", path)


@pytest.mark.parametrize("path", [each for each in LEAVING if each and "%00" not in each])
def test_a_delta_source_does_not_read_files_elsewhere(tmp_path: Path, path: str) -> None:
    for name, frame in market.sources(20).items():
        frame.write_delta(tmp_path / "sources" / name)
    log = tmp_path / "sources" / "sales" / "_delta_log" / f"{0:020}.json"
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    for line in lines:
        if "add" in line:
            line["add"]["path"] = path
    log.write_text("".join(json.dumps(line, separators=(",", ":")) + "\n" for line in lines))
    with pytest.raises(StoreError, match="The files of a Delta table must be in its folder"):
        run(tmp_path)


@pytest.mark.parametrize("path", ["/etc/hosts", "%2e%2e/visits/part.parquet"])
def test_a_table_of_ours_does_not_read_or_remove_files_elsewhere(tmp_path: Path, path: str) -> None:
    market.write(tmp_path, market.sources(20))
    run(tmp_path)
    (log,) = (tmp_path / "features").glob("*/*/_delta_log")
    lines = [json.loads(line) for line in (log / f"{0:020}.json").read_text().splitlines()]
    added = next(line["add"] for line in lines if "add" in line)
    info = next(line["commitInfo"] for line in lines if "commitInfo" in line)
    info = {**info, "operationMetrics": {}}  # nothing that an entry could have lost: only its paths are refused
    more = {"add": {**added, "path": path}}, {"remove": {"path": path, "deletionTimestamp": 0, "dataChange": True}}
    crafted = {"commitInfo": info}, more[0]
    (log / f"{1:020}.json").write_text("".join(json.dumps(each, separators=(",", ":")) + "\n" for each in crafted))
    table = open_table(str(log.parent))
    assert table is not None
    for read in (paths_of, data_files):
        with pytest.raises(StoreError, match="be in its folder"):
            read(table)
    (log / f"{2:020}.json").write_text(json.dumps(more[1], separators=(",", ":")) + "\n")
    for version in (1, 2):
        with pytest.raises(StoreError, match="be in its folder"):
            file_actions(str(log.parent), version)
