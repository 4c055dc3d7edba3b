"""A marked person in the sources of a store, and a search over every byte of the store."""

import gzip
import io
import zlib
from datetime import UTC, datetime, timedelta
from pathlib import Path

import polars as pl

from beam_pipelines import features, features_streaming, inference, inference_streaming, training
from beam_pipelines.cli import main
from tests.support.tables import figures_of

PERSON, NOTE = "Zaphkiel-Marked-7731", "Xylophonic-Remark-4419"
WHERE = f"cust = '{PERSON}'"
START = datetime(2024, 1, 1, tzinfo=UTC)
DEFINITION = """
import polars as pl
from schemas import Derived, FeatureView, Label, Latest, Lookup, Model, Source, TimeSplit, Trailing, encoders

orders = Source("orders", time="at", columns={
    "k": pl.Int64, "cust": pl.String, "note": pl.String, "price": pl.Float64})
returns = Source("returns", time="at", unique="k", columns={"k": pl.Int64, "cust": pl.String})
people = Source("people", columns={"cust": pl.String, "remark": pl.String})
view = FeatureView("vw", spine=orders, key="cust", features=[
    Derived(price=pl.col("price")),
    Latest(orders, by="cust", columns="note", max_age="forever"),
    Lookup(people, by="cust", columns="remark"),
    Trailing(orders, by="cust", over=("all", "9d"), stats={"price": ("mean", "count")}),
    Trailing(returns, by="cust", over="9d", stats={"*": "count"}),
])
model = Model(view, label=Label(returns, on="k", value=pl.lit(1), within="2d", absent=0),
    split=TimeSplit(validate="9d", test="9d"), params={"max_depth": 2}, rounds=3, features=INPUTS)
"""
SOURCES = ("orders", "returns", "people")


def rows() -> dict[str, pl.DataFrame]:
    orders = [
        {
            "at": START + timedelta(hours=4 * i),
            "k": i,
            "cust": PERSON if i % 50 == 0 else f"c{i % 7}",
            "note": NOTE if i % 50 == 0 else f"n{i % 3}",
            "price": float("inf") if i in (150, 151) else float(i * 37 % 101),
        }
        for i in range(300)
    ]
    returned = [
        {"at": row["at"] + timedelta(hours=5), "k": row["k"], "cust": row["cust"]}  # type: ignore[operator]
        for row in orders
        if row["price"] > 60  # type: ignore[operator]
    ]
    names = [PERSON, *(f"c{i}" for i in range(7))]
    frames = {
        "orders": pl.DataFrame(orders),
        "returns": pl.DataFrame(returned),
        "people": pl.DataFrame({"cust": names, "remark": [NOTE, *(f"r{i}" for i in range(7))]}),
    }
    return {name: frame.with_columns(pl.col(pl.Datetime).dt.cast_time_unit("us")) for name, frame in frames.items()}


class Store:
    def __init__(self, root: Path, definition: str) -> None:
        self.root, self.store, self.definition = root, root / "store", root / "definition.py"
        self.definition.write_text(definition)

    @property
    def flags(self) -> list[str]:
        return ["--definition", str(self.definition), "--store", str(self.store)]

    def put(self, name: str, frame: pl.DataFrame, delta: bool = False) -> None:
        folder = self.store / "sources" / name
        folder.mkdir(parents=True, exist_ok=True)
        if delta:
            half = len(frame) // 2
            for part in (frame[:half], frame[half:]):
                part.write_delta(str(folder), mode="append")
            frame.write_delta(str(folder), mode="overwrite")
        else:
            frame.write_parquet(folder / "a.parquet", row_group_size=70)

    def run(self) -> None:
        for pipeline in (features, training, inference):
            more = ["--max_dead_fraction", "1"] if pipeline is features else []
            assert pipeline.main([*self.flags, *more]) == 0

    def erase(self, source: str, where: str = WHERE, *flags: str) -> int:
        return main(["erase", source, *self.flags, "--where", where, *flags])

    def found(self) -> list[str]:
        """Files that hold a marker anywhere, decompressed; the log and statistics of Parquet files included."""
        names = []
        for path in sorted(self.store.rglob("*")):
            if path.is_file() and any(mark.encode() in held(path) for mark in (PERSON, NOTE)):
                names.append(str(path.relative_to(self.store)))
        return names


def held(path: Path) -> bytes:
    content = path.read_bytes()
    if path.suffix == ".gz":
        content += gzip.decompress(content)
    if content[:4] == b"PAR1":
        content += str(pl.read_parquet(path).to_dicts()).encode()
    if path.suffix == ".arrow":
        content += str(pl.read_ipc(io.BytesIO(content)).to_dicts()).encode()
    for start in range(len(content) - 2) if path.suffix == ".db" else ():
        if content[start : start + 2] == b"\x78\x9c":
            content += zlib.decompressobj().decompress(content[start:])
    return content


ENCODE = """encode={
        "orders_note": encoders.Ordinal(), "people_remark": encoders.Hashing(8), "note": encoders.Hashing(8),
        "shop": encoders.Ordinal()}"""
SHOPS = '    Trailing(orders, by="shop", over="1d", stats={"price": "mean", "*": "count"}),\n'
LIVE = (
    DEFINITION.replace("features=INPUTS", ENCODE)
    .replace('"note": pl.String, "price"', '"note": pl.String, "shop": pl.String, "price"')
    .replace("    Trailing(returns,", f"{SHOPS}    Trailing(returns,")
)


class LiveStore(Store):
    """A live store beside a batch store, whose sources and registry it reads."""

    def __init__(self, root: Path) -> None:
        super().__init__(root, LIVE)
        self.batch = Store(root / "batch", LIVE)
        self.registry = f"sqlite:///{self.batch.store}/registry/mlflow.db"

    @property
    def sources(self) -> str:
        return str(self.batch.store / "sources")

    def run_live(self) -> None:
        flags = ["--streaming", *self.flags]
        replay = ["--sources", self.sources, "--start", "2024-01-21", "--chunk", "6h", "--run_id", "live"]
        assert features_streaming.main([*flags, *replay]) == 0
        assert inference_streaming.main([*flags, "--registry", self.registry, "--run_id", "scored"]) == 0

    def erase_live(self, source: str, *more: str) -> int:
        return self.erase(source, WHERE, "--sources", self.sources, "--registry", self.registry, *more)

    def parity(self, run_id: str) -> dict[str, object]:
        command = ["parity", *self.flags, "--registry", self.registry, "--batch_store", str(self.batch.store)]
        assert main([*command, "--run_id", run_id]) == 0
        return figures_of(self.store, run_id)


def with_shops() -> dict[str, pl.DataFrame]:
    """Three shops, in which others meet the person; and a spine row of the person that contradicts another one."""
    frames = rows()
    orders = frames["orders"].with_columns(shop=pl.format("s{}", pl.col("k") % 3))
    again = orders.filter(k=250).with_columns(price=pl.col("price") + 1000)
    frames["orders"] = pl.concat([orders, again]).select("at", "k", "cust", "note", "shop", "price")
    return frames
