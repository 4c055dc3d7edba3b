"""The training pipeline on files: features table → registered champion; refusals; the same run twice."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import polars as pl
import pytest
from sklearn.metrics import roc_auc_score

from beam_pipelines import training
from schemas.errors import DataError, DefinitionError, GateError, MismatchError
from tests.support import shop
from tests.support.training_pipeline_case import account, flags
from transforms.models.bundle import load_bundle
from transforms.models.registry import Registry, registry_uri
from transforms.models.scoring import PinnedModel, open_scorer, score


def test_a_model_is_trained_judged_registered_and_promoted(store: Path) -> None:
    assert training.main(flags(store, "one")) == 0
    found = account(store, "one")
    registry = Registry(registry_uri(str(store)))
    assert found["model_version"] == found["champion"] == registry.champion("buying") == "1"
    assert found["metrics"]["auc"] > 0.65
    assert found["feature_rows"] == 3000
    splits = found["splits"].values()
    assert found["outside"] + sum(each["waiting"] + each["dropped"] + each["entered"] for each in splits) == 3000
    assert {each["by"]["shop"] for each in found["slices"]} == {"north", "south", "west"}
    assert json.loads((store / "runs/one/run.json").read_text())["model_version"] == "1"

    # The examples on disk give the reported metric under the registered model.
    _, folder = registry.resolve("buying")
    rows = pl.concat([pl.read_parquet(path) for path in sorted(store.glob("examples/buying/one/test-*.parquet"))])
    assert len(rows) == found["splits"]["test"]["entered"]
    (batch,) = rows.to_arrow().combine_chunks().to_batches()
    found_auc = roc_auc_score(rows["__label"], score(open_scorer(PinnedModel(folder)), batch))
    assert found_auc == pytest.approx(found["metrics"]["auc"])
    manifest = load_bundle(folder).manifest
    assert manifest["feature_table"]["version"] == 0
    assert manifest["split"]["cutoff"] == "2024-03-01T00:00:00+00:00"

    # The same work under another name.
    assert training.main(flags(store, "two", "--no-keep_examples")) == 0
    assert account(store, "two")["model_version"] == registry.champion("buying") == "2"
    assert account(store, "two")["metrics"] == found["metrics"]
    booster = (store / "runs/one/model/booster.ubj").read_bytes()
    assert (store / "runs/two/model/booster.ubj").read_bytes() == booster
    assert (store / "examples/buying/one").exists()
    assert not (store / "examples/buying/two").exists()

    # Repeating the first run registers nothing new and does not take the alias back.
    assert training.main(flags(store, "one")) == 0
    assert account(store, "one")["model_version"] == "1"
    assert registry.champion("buying") == "2"


def test_a_run_repeated_after_its_promotion_is_judged_as_before_it(store: Path) -> None:
    """As after a kill between the promotion and the run's end: the run does not compare the model with itself."""
    path = store / "definition.py"
    path.write_text(shop.DEFINITION.replace("min_slice_rows=20", "min_slice_rows=20, margin=0.01"))
    assert training.main(flags(store, "one")) == 0
    before = account(store, "one")
    assert training.main(flags(store, "one")) == 0
    again = account(store, "one")
    assert again.pop("kept") == before.pop("kept") == ""
    for trial in (*before["trials"], *again["trials"]):
        del trial["seconds"]
    assert again == before
    with pytest.raises(GateError, match=r"beats the champion's by 0\.01"):
        training.main(flags(store, "two"))
    assert account(store, "two")["rival"]["version"] == "1"


def test_a_model_below_its_floor_is_registered_and_not_promoted(
    store: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = store / "definition.py"
    path.write_text(
        shop.DEFINITION.replace('"auc": 0.6', '"auc": 0.99').replace(
            "rounds=12", "rounds=12, search=Search(3, {'eta': (0.1, 0.5), 'max_depth': [2, 3, -4]}, seed=4)"
        )
    )
    with pytest.raises(GateError, match=r"Version 1 of buying.*auc ≥ 0\.99: auc is 0\.") as caught:
        training.main(flags(store, "low"))
    assert caught.value.exit_code == 6
    assert Registry(registry_uri(str(store))).champion("buying") is None
    found = account(store, "low")
    assert found["champion"] is None
    assert [bool(each["error"]) for each in found["trials"]] == [True, False, False]
    assert "max_depth" in found["trials"][0]["error"]
    assert "auc" in capsys.readouterr().out


def test_features_of_another_definition_are_refused(store: Path) -> None:
    path = store / "definition.py"
    path.write_text(shop.DEFINITION.replace('over="3d"', 'over="4d"'))
    (other,) = (each.name for each in (store / "features/buying").iterdir())
    with pytest.raises(
        MismatchError, match=f"own fingerprint, [0-9a-f]{{16}}. Got {other} .*Run: millrace features --definition"
    ):
        training.main(flags(store, "mismatch"))
    shutil.rmtree(store / "features")
    with pytest.raises(DataError, match=r"has a feature table\. Got none"):
        training.main(flags(store, "none"))


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        (('pl.col("amount") > 0', 'pl.col("amount") > -1'), DataError, "train split has examples of two classes"),
        (
            ('on="visit", value=pl.col("amount") > 0', 'on="visit", value=pl.lit(None, pl.Int64)'),
            DataError,
            "have no label",
        ),
        (('value=pl.col("amount") > 0', 'value=pl.col("amount")'), DataError, "is 0 or 1"),
        (('"12d", "12d"', '"12d", "2024-02-29"'), DataError, "wait for their label's horizon"),
        (('"eta": 0.3', '"eta": 0.3, "seed": 3'), DefinitionError, "leaves .*seed.* to the model"),
        (('"eta": 0.3', '"eta": -3'), DataError, "A trial succeeds"),
    ],
)
def test_what_cannot_be_trained_is_refused_with_a_reason(
    store: Path, change: tuple[str, str], error: type, words: str
) -> None:
    text = shop.DEFINITION.replace(*change)
    assert text != shop.DEFINITION
    if "two classes" in words or "no label" in words:
        text = text.replace("absent=0", 'absent="drop"')
    (store / "definition.py").write_text(text)
    with pytest.raises(error, match=words):
        training.main(flags(store, "refused"))
    assert not (store / "registry").exists()


def test_no_rows_before_the_cutoff(store: Path) -> None:
    with pytest.raises(DataError, match="before the cutoff"):
        training.main(flags(store, "early", "--cutoff=2020-01-01"))
