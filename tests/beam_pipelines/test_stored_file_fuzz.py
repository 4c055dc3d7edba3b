"""A fuzzer over the files that a store keeps: whatever becomes of them, a command does its work or says in one message
what is wrong, and what it publishes is what it would have published.

The plain suite tries some dozen, with commands that are quick; `-m slow` tries hundreds, with all of them.
"""

from __future__ import annotations

import itertools
import re
import shutil
from collections.abc import Sequence
from pathlib import Path

import polars as pl
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from polars.testing import assert_frame_equal

from schemas import load_definition
from tests.support.broken_files import (
    Change,
    changes,
    commands,
    copied,
    files_of,
    files_read,
    made_store,
    one_message,
    run,
)
from transforms.storage.paths import features_uri, predictions_uri

QUICK = ("tables", "models", "plan", "trace", "vacuum", "verify", "promote", "register", "inference", "features")
_numbers = itertools.count()


SLOW = (*QUICK, "check", "update", "rollback", "erase", "features again", "inference again", "features full")
TRAINING = ("training again", "training", "retrain", "parity")
# Nothing in a Delta log or a data file shows that somebody has changed it afterwards.
CHECKED = re.compile(r"(?<!_delta_log/\d{20})\.json$|MLmodel$|\.pbtxt$|\.ubj$|\.pb$")
_numbers = itertools.count()


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return made_store(tmp_path_factory.mktemp("stored") / "base")


def published(store: Path) -> list[pl.DataFrame]:
    """The rows of features and predictions, without what names the run or its time."""
    view = load_definition(str(store / "definition.py")).view
    uris = [features_uri(str(store), view.name, view.fingerprint), predictions_uri(str(store), "buying")]
    return [pl.read_delta(uri).drop("scored_at", "run_id", strict=False).sort("row_id") for uri in uris]


def try_one(base: Path, folder: Path, name: str, file: str, change: Change) -> None:
    """Breaks a file of a copy of the store, and runs the command there."""
    store = copied(base, folder / f"store-{next(_numbers)}")
    try:
        change.apply(store / file)
        printed = run(*commands(store)[name])
        one_message(printed)
        if printed.code == 0 and name.split()[0] in ("features", "inference") and CHECKED.search(file):
            for found, expected in zip(published(store), published(base), strict=True):
                assert_frame_equal(found, expected, check_exact=True)
    finally:
        shutil.rmtree(store, ignore_errors=True)


def fuzz(base: Path, folder: Path, names: Sequence[str], count: int) -> int:
    """Tries so many; returns how many were tried."""
    read_by = {name: sorted(files) for name, files in files_read(base, names).items()}
    every, tried = files_of(base), 0
    cases = st.sampled_from(names).flatmap(
        lambda name: st.tuples(st.just(name), st.one_of(*[st.sampled_from(read_by[name])] * 5, st.sampled_from(every)))
    )

    @settings(max_examples=count, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(cases, changes)
    def each(case: tuple[str, str], change: Change) -> None:
        nonlocal tried
        tried += 1
        try_one(base, folder, *case, change)

    each()
    return tried


@pytest.mark.parametrize(
    ("file", "kind", "name", "words"),
    [
        ("features/buying/*/_manifests/f2-1.json", "UTF-16", "inference", ""),
        ("features/buying/*/_manifests/f2-1.json", "UTF-16", "features", "manifest can be read"),
        ("features/buying/*/_statistics/f1.pb", "empty", "check", ""),
        ("schema.pbtxt", "UTF-16", "features full", "is a text file. Got"),
        ("features/buying/*/date=*/f2-*.parquet", "FIFO", "inference", "it is not a regular file"),
        ("runs/t9/started.json", "FIFO", "vacuum", "The mark of a run can be read"),
        ("runs/t9/started.json", "zeros", "vacuum", "The mark of a run can be read"),
    ],
)
def test_what_the_fuzzer_has_found(base: Path, tmp_path: Path, file: str, kind: str, name: str, words: str) -> None:
    store = copied(base, tmp_path / "store")
    (path,) = store.glob(file)
    Change(kind, 0.5, "").apply(path)
    printed = run(*commands(store)[name])
    one_message(printed)
    assert (printed.code in (2, 4)) == bool(words), printed.text
    assert words in printed.err, printed.text


def test_stored_files_of_any_content(base: Path, tmp_path: Path) -> None:
    assert fuzz(base, tmp_path, QUICK, 25) >= 25


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_many_stored_files_of_any_content(base: Path, tmp_path: Path) -> None:
    print(fuzz(base, tmp_path, SLOW, 1500), "stored files were tried")


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_stored_files_that_training_reads(base: Path, tmp_path: Path) -> None:
    print(fuzz(base, tmp_path, TRAINING, 120), "stored files were tried")
