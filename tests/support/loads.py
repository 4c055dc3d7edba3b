"""Loads to disturb: a small market's sources, the store before, and the store that an undisturbed process leaves."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import polars as pl
from deltalake import DeltaTable
from polars.testing import assert_frame_equal

from schemas import load_definition
from tests.support import market
from tests.support.processes import Ended, Zygote
from transforms.storage.delta_tables import open_table

DEFINITION = market.DEFINITION.replace(
    "    Lookup(shops", '    Trailing(sales, by="shop", over="all", stats={"price": "sum"}),\n    Lookup(shops'
)
DAYS = 4


@dataclasses.dataclass(frozen=True)
class Case:
    """A load: its sources, the store before it (None: none) and the store after it when nothing disturbs it."""

    folder: Path
    zygote: Zygote
    before: Path | None
    after: Path
    undisturbed: Ended

    @property
    def arguments(self) -> list[str]:
        return ["--definition", str(self.folder / "definition.py"), "--sources", str(self.folder / "sources")]

    @property
    def table(self) -> str:
        view = load_definition(str(self.folder / "definition.py")).view
        return f"features/{view.name}/{view.fingerprint}"

    def copy(self, name: str) -> Path:
        """A store as it is before the load."""
        store = self.folder / name
        if self.before is not None:
            shutil.copytree(self.before, store)
        return store

    def load(self, store: Path, run_id: str, **how: object) -> Ended:
        return self.zygote.run(
            "features", *self.arguments, "--store", str(store), "--run_id", run_id, watch=store, **how
        )  # type: ignore[arg-type]


Frames = dict[str, pl.DataFrame | None]


def content(store: Path | None, table: str) -> Frames:
    """What a reader finds: every row of each table, sorted."""
    found: Frames = {}
    for name in (table, "dead_letters/features"):
        there = store is not None and open_table(str(store / name)) is not None
        frame = pl.read_delta(str(store / name)) if store is not None and there else None
        found[name] = None if frame is None else frame.sort(frame.columns)
    return found


def same(a: pl.DataFrame | None, b: pl.DataFrame | None) -> bool:
    if a is None or b is None:
        return a is b
    try:
        assert_frame_equal(a, b, check_exact=True, check_column_order=False)
    except AssertionError:
        return False
    return True


def thinned(late: bool) -> dict[str, pl.DataFrame]:
    """The market's first days; or all of them, with what came late to the first ones."""
    frames = market.spoiled(market.sources(60))
    if late:
        return {
            name: frame.filter(pl.col(market.TIMES[name]).fill_null(market.START) < market.at(DAYS))
            if name in market.TIMES
            else frame
            for name, frame in frames.items()
        }
    early = {
        name: frame.filter(pl.col(market.TIMES[name]).fill_null(market.START) < market.at(DAYS - 1))
        if name in market.TIMES
        else frame
        for name, frame in frames.items()
    }
    return {**early, "sales": early["sales"].filter(pl.col("sale") % 3 != 0)}


def prepared(folder: Path, zygote: Zygote, second: bool) -> Case:
    market.define(folder, DEFINITION)
    market.write(folder, thinned(late=not second), files=2)
    first = Case(folder, zygote, None, folder / "base", Ended(0, "", "", (), 0))
    if second:
        assert first.load(first.after, "first").code == 0
        market.write(folder, thinned(late=True), files=2)
    case = dataclasses.replace(first, before=first.after if second else None, after=folder / "reference")
    reference = case.copy("reference")
    undisturbed = case.load(reference, "undisturbed")
    assert undisturbed.code == 0, undisturbed.err
    return dataclasses.replace(case, undisturbed=undisturbed)


def leftovers(store: Path) -> list[str]:
    """Files of tables that no version names, and half-written ones, by delta-rs's own account of its log."""
    strays = [str(path) for path in store.rglob(".*") if path.is_file()]
    strays += [str(path) for path in store.rglob("*.part")]
    for log in store.rglob("_delta_log"):
        root = log.parent
        if not list(log.glob("*.json")):  # killed before its first version had its name
            strays += [str(path) for path in root.rglob("*") if path.is_file()]
            continue
        newest = DeltaTable(str(root)).version()
        named = {
            path.removeprefix("file://")
            for version in range(newest + 1)
            for path in DeltaTable(str(root), version=version).file_uris()
        }
        strays += [str(path) for path in root.rglob("date=*/*") if str(path) not in named]
        commits = [
            json.loads(line)["commitInfo"]
            for path in log.glob("*.json")
            for line in path.read_text().splitlines()
            if line.startswith('{"commitInfo"')
        ]
        manifests = {each.get("manifest") for each in commits}
        strays += [str(path) for path in root.glob("_manifests/*") if path.name not in manifests]
        summaries = {
            file
            for path in root.glob("_manifests/*")
            for files, _ in json.loads(path.read_text())["snapshots"].values()
            for file in files
        }
        strays += [str(path) for path in root.glob("_summaries/*") if path.name not in summaries]
        strays += [
            str(path) for path in root.glob("_statistics/*") if path.stem not in {each["run_id"] for each in commits}
        ]
        strays += [str(path) for path in log.glob("*") if not (path.name[:20].isdigit() and path.suffix == ".json")]
    for folder in store.glob("features/*/*"):
        strays += [str(path) for path in folder.rglob("*") if path.is_file() and not (folder / "_delta_log").exists()]
    return strays
