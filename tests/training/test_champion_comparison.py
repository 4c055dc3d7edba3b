"""A champion is replaced only by a model that was compared with it, on the same test rows, and that predicts the same
thing."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import polars as pl
import pyarrow as pa
import pytest
from sklearn.metrics import roc_auc_score

from beam_pipelines import cli, features, training
from schemas.errors import GateError, MismatchError
from schemas.loading import load_definition
from schemas.splits import LABEL
from tests.support import shop
from tests.support.training_pipeline_case import account, flags
from transforms.models.registry import Registry, registry_uri
from transforms.models.scoring import PinnedModel, open_scorer, score
from transforms.storage.delta_tables import data_files, open_table
from transforms.storage.paths import features_uri
from transforms.training.champion_rows import OwnTable, own_rows

# The same problem from less: neither the shop nor the visitor's age.
POOR = (
    shop.DEFINITION.replace(
        'Derived(age=pl.col("age"), hour=pl.col("asked").dt.hour())', 'Derived(hour=pl.col("asked").dt.hour())'
    )
    .replace('encode={"shop": encoders.OneHot(), "age": encoders.Impute("median")},', "")
    .replace(
        'Gates(at_least={"auc": 0.6}, slices=("shop", ("shop", "hour")), max_gap={"auc": 0.5}, min_slice_rows=20)',
        "Gates()",
    )
)


@pytest.fixture(scope="module")
def computed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store with features of two definitions of one problem."""
    assert "age=pl" not in POOR
    assert "encode=" not in POOR
    assert "Gates()" in POOR
    store = tmp_path_factory.mktemp("challenge")
    path = shop.write(store)
    for name, text in (("features-rich", shop.DEFINITION), ("features-poor", POOR)):
        path.write_text(text)
        assert features.main(["--definition", str(path), "--store", str(store), "--run_id", name]) == 0
    return store


@pytest.fixture
def store(computed: Path, tmp_path: Path) -> Path:
    """A copy of it, whose champion reads the richer features."""
    store = Path(shutil.copytree(computed, tmp_path / "store"))
    (store / "definition.py").write_text(shop.DEFINITION)
    assert training.main(flags(store, "first")) == 0
    return store


def train(store: Path, run_id: str, definition: str) -> dict[str, Any]:
    (store / "definition.py").write_text(definition)
    training.main(flags(store, run_id))
    return account(store, run_id)


def champion(store: Path) -> str | None:
    return Registry(registry_uri(str(store))).champion("buying")


def test_a_worse_model_of_other_features_does_not_take_the_alias(store: Path) -> None:
    with pytest.raises(GateError, match=r"beats the champion's by 0: 0\.\d+ against 0\.\d+ of version 1") as caught:
        train(store, "worse", POOR)
    assert "millrace promote 2 --why" in str(caught.value)
    found = account(store, "worse")
    assert (champion(store), found["model_version"], found["champion"]) == ("1", "2", "1")
    (gate,) = (each for each in found["gates"] if "champion" in each["gate"])
    assert (gate["holds"], gate["judged"]) == (False, True)
    assert "its own table's rows of the same moments" in gate["reason"]

    # The champion's metric is that of its own features of the challenger's test rows.
    first = load_definition(str(store / "definition.py"))
    registry = Registry(registry_uri(str(store)))
    scorer = open_scorer(PinnedModel(registry.resolve("buying", "1")[1]))
    assert scorer.bundle.fingerprint != first.view.fingerprint
    rows = pl.concat([pl.read_parquet(path) for path in sorted(store.glob("examples/buying/worse/test-*.parquet"))])
    own = pl.read_delta(str(store / "features/buying" / scorer.bundle.fingerprint)).drop("row_id", "date")
    joined = rows.select("visit", "asked", "__label").join(
        own, on=["visit", "asked"], how="left", maintain_order="left"
    )
    (batch,) = joined.to_arrow().combine_chunks().to_batches()
    expected = roc_auc_score(rows["__label"], score(scorer, batch))
    assert found["rival"]["metrics"]["auc"] == pytest.approx(expected, abs=1e-9)
    assert found["rival"]["metrics"]["auc"] > found["metrics"]["auc"]


def test_a_better_model_of_other_features_takes_the_alias(store: Path) -> None:
    with pytest.raises(GateError):
        train(store, "poor", POOR)
    assert cli.main(["promote", "2", "--why", "to be beaten", "--store", str(store)]) == 0
    found = train(store, "better", shop.DEFINITION)
    assert champion(store) == found["model_version"] == "3"
    assert found["rival"]["version"] == "2"


def test_a_champion_whose_features_are_gone_or_cover_less_is_kept(store: Path) -> None:
    rich = Path(features_uri(str(store), "buying", load_definition(str(store / "definition.py")).view.fingerprint))
    aside = rich.with_name("aside")
    rich.rename(aside)
    with pytest.raises(
        GateError, match="not judged, so version 1 stays champion: version 1 reads features of fingerprint"
    ):
        train(store, "gone", POOR)
    assert champion(store) == "1"
    aside.rename(rich)
    (store / "definition.py").write_text(shop.DEFINITION)
    shutil.rmtree(rich)
    words = [
        "--definition",
        str(store / "definition.py"),
        "--store",
        str(store),
        "--run_id",
        "half",
        "--end=2024-02-25",
    ]
    assert features.main(words) == 0
    with pytest.raises(GateError, match=r"its feature table lacks, or cannot read, \d+ of \d+ test rows"):
        train(store, "half-covered", POOR)
    found = account(store, "half-covered")
    assert (champion(store), found["champion"], found["rival"]["metrics"]) == ("1", "1", None)
    assert "Registered, not champion" in (store / "runs/half-covered/report.html").read_text()
    for path in rich.rglob("*.parquet"):
        path.write_bytes(b"broken")
    with pytest.raises(GateError, match=r"its feature table lacks, or cannot read, (\d+) of \1 test rows"):
        train(store, "unreadable", POOR)


def test_a_champion_that_cannot_be_read_is_kept(store: Path) -> None:
    _, folder = Registry(registry_uri(str(store))).resolve("buying", "1")
    (Path(folder) / "booster.ubj").write_bytes(b"broken")
    with pytest.raises(GateError, match="stays champion: the champion could not be read"):
        train(store, "broken", shop.DEFINITION)
    shutil.rmtree(folder)
    with pytest.raises(GateError, match="stays champion: the champion could not be read"):
        train(store, "without", shop.DEFINITION)
    assert champion(store) == "1"


def test_a_run_of_an_earlier_version_that_was_not_compared_is_registered_without_the_alias(store: Path) -> None:
    found = train(store, "second", shop.DEFINITION)
    assert champion(store) == "2"
    registry = Registry(registry_uri(str(store)))
    registry.promote("buying", "1", "back")
    folder = store / "runs" / "second"
    third = store / "runs" / "third"
    shutil.copytree(folder, third)
    gates = [{**each, "judged": "champion" not in each["gate"]} for each in found["gates"]]
    assert all(each["holds"] for each in gates)
    bundle = str(third / "model")
    old = {
        **found,
        "bundle": bundle,
        "gates": gates,
        "rival": {"version": "1", "metrics": None, "reason": "it reads other features"},
    }
    (third / "training.json").write_text(json.dumps(old))
    pending = json.loads((third / "registration.json").read_text())
    (third / "registration.json").write_text(json.dumps({**pending, "run_id": "third"}))
    assert cli.main(["register", "third", "--store", str(store)]) == 0
    assert champion(store) == "1"
    assert "was not compared with: millrace promote 3" in json.loads((third / "training.json").read_text())["kept"]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (('value=pl.col("amount") > 0', 'value=pl.col("amount") > 5'), ("label_value", "0", "5")),
        (('within="1d"', 'within="2d"'), ("label_within 1d", "label_within 2d")),
        (("rounds=12", 'rounds=12, objective="reg:squarederror", metric="rmse"'), ("binary:logistic", "squarederror")),
    ],
)
def test_another_problem_under_the_same_name_is_refused_with_both_named(
    store: Path, change: tuple[str, str], words: tuple[str, ...]
) -> None:
    text = shop.DEFINITION.replace(*change)
    if "reg:" in text:
        text = text.split("gates=")[0] + ")\n"
    assert text != shop.DEFINITION
    with pytest.raises(MismatchError, match="predict the same thing") as caught:
        train(store, "other", text)
    for word in (*words, "version 1", "name='buying_2'"):
        assert word in str(caught.value)
    # Its own name is the way out, and it has no champion yet.
    found = train(store, "named", text.replace("params=", "name='buying_2', params="))
    assert (found["model"], found["model_version"], found["champion"]) == ("buying_2", "1", "1")
    assert champion(store) == "1"


def test_features_parameters_split_and_gates_make_no_other_problem(store: Path) -> None:
    first = load_definition(str(store / "definition.py")).require_model()
    path = store / "again.py"
    path.write_text(POOR.replace("rounds=12", "rounds=5, seed=4").replace('"12d", "12d"', '"9d", "9d"'))
    assert load_definition(str(path)).require_model().problem == first.problem
    assert json.loads(json.dumps(first.problem)) == first.problem


def test_rows_are_joined_by_key_and_time_and_those_missing_are_counted(store: Path) -> None:
    view = load_definition(str(store / "definition.py")).view
    table = open_table(features_uri(str(store), "buying", view.fingerprint))
    assert table is not None
    own = OwnTable(tuple(data_files(table)), ("visit",), "asked", ("age", "shop", "visit"))
    rows = (
        pl.read_delta(table.table_uri)
        .filter(pl.col("date").dt.day() < 4)
        .select("visit", "asked", "date", row_id=pl.col("row_id") + 1, **{LABEL: pl.lit(1.0, pl.Float32)})
    )
    strangers = rows.head(3).with_columns(visit=pl.lit(-1, pl.Int64))
    spine_rows = pl.concat([rows, strangers]).sample(fraction=1.0, shuffle=True, seed=1)
    found, missing = own_rows(of(spine_rows), [own])
    assert missing == 3
    assert found is not None
    result = pl.from_arrow(found)
    expected = spine_rows.filter(pl.col("visit") >= 0).join(
        pl.read_delta(table.table_uri).select("visit", "asked", "age", "shop"),
        on=["visit", "asked"],
        how="left",
        maintain_order="left",
    )
    assert result.select(expected.columns).equals(expected)  # type: ignore[union-attr]
    assert own_rows(of(spine_rows).slice(0, 0), [own]) == (None, 0)


def of(rows: pl.DataFrame) -> pa.RecordBatch:
    (batch,) = rows.rechunk().to_arrow().combine_chunks().to_batches()
    return batch
