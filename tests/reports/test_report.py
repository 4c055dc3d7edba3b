"""The report of a training run: its content is that of `training.json`; it is complete, safe, self-contained, and
stored with the model."""

from __future__ import annotations

import contextlib
import json
import re
import urllib.parse
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa
import pytest
import xgboost
from markupsafe import escape

from beam_pipelines import features, training
from schemas.errors import GateError
from tests.support import shop
from transforms.evaluation.shap import ExplainedSample, by_input, contributions, explain
from transforms.models.bundle import load_bundle
from transforms.models.registry import Registry, registry_uri
from transforms.models.scoring import PinnedModel, open_scorer
from transforms.reports.charts import Axis
from transforms.reports.formatting import format_number, given, interval, named, number
from transforms.reports.header import outcome
from transforms.reports.report import FILE, render, templates

HOSTILE = """<script>alert('1')</script>&"west"""
VOID = {"meta", "br", "wbr"}


class Page(HTMLParser):
    """A page read strictly: every element that opens closes, in order."""

    def __init__(self, page: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.feed(page)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] != "style":
            self.words.append(data)

    @property
    def text(self) -> str:
        return "".join(self.words)

    @property
    def values(self) -> list[str]:
        return [str(attributes["value"]) for name, attributes in self.tags if name == "data"]

    def all(self, name: str) -> list[dict[str, str | None]]:
        return [attributes for each, attributes in self.tags if each == name]


def several(text: str, objective: str, metric: str, bound: float) -> str:
    return (
        text.replace("absent=0", 'absent="drop"')
        .replace("view, Label", f'view, objective="{objective}", metric="{metric}", label=Label')
        .replace('TimeSplit("12d"', 'split=TimeSplit("12d"')
        .replace('at_least={"auc": 0.6}', f'at_least={{"{metric}": {bound}}}')
        .replace('max_gap={"auc": 0.5}', f'max_gap={{"{metric}": {bound}}}')
    )


BINARY = (
    shop.DEFINITION.replace('"auc": 0.6', '"auc": 0.99')
    .replace("rounds=12", 'rounds=12, search=Search(4, {"eta": (0.05, 0.5), "max_depth": [2, 3, -4]}, seed=4)')
    .replace(
        'max_gap={"auc": 0.5}',
        'protected=("shop",), max_difference={"demographic_parity": 0.01, "equal_opportunity": 1.0}',
    )
)
CLASSES = several(
    shop.DEFINITION.replace(
        'value=pl.col("amount") > 0', 'value=(pl.col("amount") > 3).cast(pl.Int32) + (pl.col("amount") > 7)'
    ),
    "multi:softprob",
    "accuracy",
    0.05,
)
AMOUNT = several(
    shop.DEFINITION.replace('value=pl.col("amount") > 0', 'value=pl.col("amount")'), "reg:squarederror", "rmse", 10
)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A feature table over a category that is a script, and a run of each kind of model: `binary` fails a gate."""
    folder = tmp_path_factory.mktemp("shop")
    path = shop.write(folder, definition=BINARY)
    for source in ("visits", "sales"):
        file = folder / f"sources/{source}/part.parquet"
        pl.read_parquet(file).with_columns(shop=pl.col("shop").replace({"west": HOSTILE})).write_parquet(file)
    assert features.main(["--definition", str(path), "--store", str(folder), "--run_id", "f"]) == 0
    for name, definition in (("binary", BINARY), ("classes", CLASSES), ("amount", AMOUNT)):
        path.write_text(definition.replace("encode=", f'name="{name}", encode='))
        words = ["--definition", str(path), "--store", str(folder), "--run_id", name, "--threads=1"]
        if name == "binary":
            with pytest.raises(GateError):
                training.main(words)
        else:
            assert training.main(words) == 0
    return folder


def account(store: Path, run: str) -> dict[str, Any]:
    return json.loads((store / "runs" / run / "training.json").read_text())  # type: ignore[no-any-return]


RUNS = ("binary", "classes", "amount")


@pytest.mark.parametrize("run", RUNS)
def test_the_page_says_what_the_account_says(store: Path, run: str) -> None:
    content, page = account(store, run), Page((store / "runs" / run / FILE).read_text())
    reported = list(content["metrics"].values()) + [content["rows"], content["feature_rows"]]
    reported += [end for span in content["intervals"].values() if span and set(content["metrics"]) for end in span][:2]
    reported += [
        value for split in content["splits"].values() for value in (split["rows"], split["waiting"], split["entered"])
    ]
    reported += [trial["value"] for trial in content["trials"]] + [trial["rounds"] for trial in content["trials"]]
    metric = next(iter(content["validate"]))
    reported += [each["metrics"][metric] for each in content["slices"]] + [each["rows"] for each in content["slices"]]
    reported += [each["mean_abs"] for each in content["explanation"]["inputs"]] + list(content["data"]["skew"].values())
    reported += [value for found in content["fairness"] for value in found["differences"].values()]
    reported += [cell for row in content.get("confusion", []) for cell in row] + [
        each["error"] for each in content.get("errors", [])
    ]
    reported += [each["auc"] for each in content.get("classes", [])] + [
        each["share"] for each in content.get("calibration", [])
    ]
    for value in reported:
        assert value is None or repr(value) in page.values, value
    for gate in content["gates"]:
        assert gate["gate"] in page.text
        assert gate["reason"] in page.text
    assert content["report"] == str(store / "runs" / run / FILE)


@pytest.mark.parametrize("run", RUNS)
def test_the_page_is_whole_safe_and_needs_nothing_else(store: Path, run: str) -> None:
    raw = (store / "runs" / run / FILE).read_text()
    page = Page(raw)
    assert len(raw) < 500_000
    assert HOSTILE in page.text
    assert "None" not in page.text.split("The definition")[0]
    assert not {"script", "link", "img", "iframe", "object", "base", "form"} & {name for name, _ in page.tags}
    for _, attributes in page.tags:
        assert not any(key.startswith("on") for key in attributes)
        for key in ("href", "src", "srcset", "data", "action", "xlink:href"):
            assert attributes.get(key) is None or str(attributes[key]).startswith("#")
        assert "url(" not in str(attributes.get("style"))
    style = re.search(r"<style>(.*?)</style>", raw, re.DOTALL)[1]  # type: ignore[index]
    assert not re.search(r"url\(|@import|https?:", style)
    assert "prefers-color-scheme:dark" in style
    assert page.all("html")[0]["lang"] == "en"
    assert len(page.all("h1")) == 1
    anchors = {str(attributes["id"]) for _, attributes in page.tags if attributes.get("id")}
    assert {str(each["href"])[1:] for each in page.all("a")} <= anchors
    for attributes in page.all("div"):
        if attributes.get("role") == "img":
            assert attributes["aria-label"]
    assert len(page.all("table")) == len(page.all("caption")) == raw.count('<div class="scroll"')


def texts(value: Any, way: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Where in JSON there is a text: one way to each kind of place."""
    inside = value.items() if isinstance(value, dict) else enumerate(value[:1]) if isinstance(value, list) else ()
    for key, each in inside:
        yield from texts(each, (*way, key))
    if isinstance(value, str):
        yield way


def test_no_text_of_the_account_becomes_markup(store: Path) -> None:
    """Every text in turn is a script: a name, a reason, an address, a version."""
    for run in RUNS:
        kept = json.dumps([account(store, run), load_bundle(store / "runs" / run / "model").manifest])
        seen = 0
        for way in texts(json.loads(kept)):
            arguments = json.loads(kept)
            place = arguments
            for key in way[:-1]:
                place = place[key]
            place[way[-1]] = HOSTILE
            try:
                raw = render(*arguments)
            except (ValueError, KeyError):  # a stamp, or the name of a metric
                continue
            assert "<script" not in raw
            seen += HOSTILE in Page(raw).text
        assert seen > 10


def test_the_verdict_is_at_the_top(store: Path) -> None:
    content = account(store, "binary")
    kind, title, why = outcome(content)
    assert (kind, title) == ("fail", "Registered, not champion")
    assert "auc ≥ 0.99" in why
    assert "There is no champion" in why
    assert why in Page((store / "runs/binary" / FILE).read_text()).text
    held = account(store, "amount")
    assert outcome(held)[:2] == ("pass", "Champion")
    assert outcome({**held, "champion": "9"})[:2] == ("wait", "Registered, not champion")
    assert "promoted since" in outcome({**held, "champion": "9"})[2]
    assert "not compared" in outcome({**held, "kept": "which was not compared with"})[2]
    away = {name: value for name, value in held.items() if name != "model_version"}
    assert outcome(away)[:2] == ("wait", "Not registered")


def test_the_report_is_an_artifact_and_in_the_closing_account(store: Path) -> None:
    import mlflow

    registry = Registry(registry_uri(str(store)))
    client = mlflow.MlflowClient(registry.uri)
    for run in RUNS:
        version = client.get_model_version(run, "1")
        assert {each.path for each in client.list_artifacts(version.run_id)} >= {FILE, "report.json", "definition.py"}
        kept = Path(urllib.parse.urlparse(client.get_run(version.run_id).info.artifact_uri).path) / FILE
        assert kept.read_bytes() == (store / "runs" / run / FILE).read_bytes()
    closing = json.loads((store / "runs/amount/run.json").read_text())
    assert closing["report"] == account(store, "amount")["report"]


def scorer_and_rows(store: Path, run: str) -> tuple[Any, pa.RecordBatch]:
    scorer = open_scorer(PinnedModel(str(store / "runs" / run / "model")), 1)
    rows = pl.read_parquet(store / f"examples/{run}/{run}/test-*.parquet").to_arrow().combine_chunks()
    (batch,) = rows.to_batches()
    schema = pa.schema(
        [pa.field(each.name, pa.string() if each.type == pa.large_string() else each.type) for each in batch.schema]
    )
    (batch,) = pa.Table.from_batches([batch]).cast(schema).to_batches()
    return scorer, batch


@pytest.mark.parametrize("run", RUNS)
def test_contributions_add_up_to_the_margin(store: Path, run: str) -> None:
    scorer, rows = scorer_and_rows(store, run)
    found = contributions(scorer, rows)
    inputs = by_input(scorer, found)
    assert inputs.shape == (rows.num_rows, scorer.bundle.classes, len(scorer.bundle.encoders.inputs))
    matrix = xgboost.DMatrix(scorer.bundle.encoders.apply(rows), feature_names=scorer.bundle.encoders.names)
    margin = scorer.booster.predict(matrix, output_margin=True).reshape(rows.num_rows, -1)
    assert np.allclose(inputs.sum(axis=2) + found[:, :, -1], margin, atol=1e-4)
    names = list(scorer.bundle.encoders.inputs)
    one_hot = [i for i, name in enumerate(scorer.bundle.encoders.names) if name.startswith("shop=")]
    assert np.allclose(inputs[:, :, names.index("shop")], found[:, :, one_hot].sum(axis=2), atol=1e-6)
    reported = account(store, run)["explanation"]
    sampled = ExplainedSample().add_input(None, rows)
    again = by_input(scorer, contributions(scorer, sampled.slice(0, reported["rows"])))  # type: ignore[union-attr]
    means = np.abs(again).mean(axis=0).sum(axis=0)
    for each in reported["inputs"]:
        assert each["mean_abs"] == pytest.approx(means[names.index(each["input"])], rel=1e-4, abs=1e-7)


def test_the_same_rows_are_sampled_however_they_are_cut() -> None:
    ids = np.random.default_rng(0).integers(-(2**62), 2**62, 5000)
    whole = pa.RecordBatch.from_pydict({"row_id": pa.array(ids), "x": pa.array(np.arange(5000))})
    sample = ExplainedSample(100)
    expected = sample.add_input(None, whole)
    states = [sample.add_input(None, whole.slice(start, 700)) for start in range(0, 5000, 700)]
    folded: Any = None
    for start in range(0, 5000, 333):
        folded = sample.add_input(folded, whole.slice(start, 333))
    assert expected is not None
    assert expected.num_rows == 100
    assert sample.merge_accumulators(states[::-1]) == expected == folded
    assert sample.merge_accumulators([None, None]) is None


def test_a_model_without_contributions_still_has_a_report(store: Path) -> None:
    content = account(store, "binary")
    content["explanation"] = {"rows": 0, "unit": "", "base": [], "inputs": [], "reason": "XGBoost refused"}
    page = Page(render(content, load_bundle(store / "runs/binary/model").manifest))
    assert "There are no contributions: XGBoost refused" in page.text
    assert explain(None, PinnedModel("nowhere"), "binary:logistic").reason == "there are no test rows"


def test_a_report_compares_with_the_champion(store: Path) -> None:
    path = store / "definition.py"
    path.write_text(AMOUNT.replace("encode=", 'name="amount", encode=').replace("rounds=12", "rounds=3"))
    words = ["--definition", str(path), "--store", str(store), "--run_id", "second", "--threads=1"]
    with contextlib.suppress(GateError):  # whichever way it goes, the page says so
        training.main(words)
    content, page = account(store, "second"), Page((store / "runs/second" / FILE).read_text())
    assert content["rival"]["version"] == "1"
    difference, span = content["rival"]["differences"]["rmse"]
    assert difference == content["metrics"]["rmse"] - content["rival"]["metrics"]["rmse"]
    assert span[0] <= difference <= span[1]
    for value in (difference, *span, content["rival"]["metrics"]["rmse"]):
        assert repr(value) in page.values
    assert "Champion (version 1)" in page.text


def test_markup_escapes_and_keeps_exact_values() -> None:
    written = templates().from_string('<b title="{{ title }}">{{ word }}</b>').render(title='"&', word="<i>")
    assert written.replace("&#34;", "&quot;") == '<b title="&quot;&amp;">&lt;i&gt;</b>'
    assert named("a_b<c>") == '<span class="name">a_<wbr>b&lt;c&gt;</span>'
    assert Page(str(number(0.1 + 0.2))).values == ["0.30000000000000004"]
    assert [format_number(value) for value in (336776, 0.7523149, -12.3456, 1.234e-5, 0.0, float("nan"))] == [
        "336,776",
        "0.7523",
        "−12.35",
        "1.234e−5",
        "0",
        "–",
    ]
    assert Page(str(given(0.05))).text == "0.05"
    assert Page(str(interval([-1.0, 2.0]))).text == "−1 to 2"
    assert escape(number(1)) == number(1)


def axes() -> Iterator[Axis]:
    random = np.random.default_rng(2)
    for _ in range(200):
        yield Axis.over((random.normal(size=3) * 10.0 ** random.integers(-8, 9)).tolist())
        yield Axis.over(np.exp(random.normal(size=3) * 5).tolist(), log=True)
    for odd in ([], [0.0], [5.0, 5.0], [float("nan")], [1e-12, 1e12]):
        yield Axis.over(odd)


def test_an_axis_shows_what_it_is_over_with_marks_inside() -> None:
    for axis in axes():
        assert axis.low < axis.high
        assert len(axis.ticks) <= 8
        slack = 1e-6 * (axis.high - axis.low)
        assert all(axis.low - slack <= at <= axis.high + slack for at, _ in axis.ticks)
        positions = axis.position([axis.low, axis.high])
        assert positions[0] == pytest.approx(0, abs=1e-6)
        assert positions[1] == pytest.approx(1000)
