"""Makes this store: run it with the code that is to have written it on PYTHONPATH, in a folder of its own."""

import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path

import polars as pl

from beam_pipelines.features import main

HERE = Path(__file__).parent
START = datetime(2024, 1, 1, tzinfo=UTC)


def put(store: Path, source: str, name: str, days: list[int], hour: int, **columns: list[float] | list[int]) -> None:
    folder = store / "sources" / source
    folder.mkdir(parents=True, exist_ok=True)
    times = pl.Series([START + timedelta(days=day, hours=hour) for day in days], dtype=pl.Datetime("us", "UTC"))
    pl.DataFrame({"at": times, "k": [1] * len(days), **columns}).write_parquet(folder / f"{name}.parquet")


def run(store: Path, run_id: str) -> None:
    for view in ("ever", "plain"):
        path = store / f"{view}.py"
        text = (HERE / "definition.py").read_text()
        path.write_text(text if view == "ever" else text.replace("view = ", "ever_ = ").replace("plain = ", "view = "))
        flags = ["--definition", str(path), "--store", str(store), "--run_id", f"{run_id}-{view}", "--no-statistics"]
        assert main(flags) == 0


if __name__ == "__main__":
    store = Path(sys.argv[1])
    put(store, "events", "first", list(range(11)), 6, v=[float(2**day) for day in range(11)])
    put(store, "asks", "first", list(range(5)), 12, id=list(range(5)))
    run(store, "first")
    put(store, "asks", "second", [5, 7, 9], 12, id=[5, 7, 9])
    run(store, "second")
