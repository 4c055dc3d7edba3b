"""Projects: many views and models in one module, or in a package of modules."""

from __future__ import annotations

import ast
import dataclasses
import sys
from pathlib import Path

import pytest

from schemas import models
from schemas.errors import DefinitionError
from schemas.loading import Project, decode_python, load_definition, load_project, load_recorded

BASE = """
import polars as pl
from schemas import Derived, FeatureView, Label, Model, Source, TimeSplit, Trailing, encoders
"""
SOURCES = (
    BASE
    + """
asked = Source("asked", time="at", columns={"k": pl.Int64, "price": pl.Float64})
sold = Source("sold", time="at", columns={"k": pl.Int64, "amount": pl.Float64})
"""
)
VIEWS = """
prices = FeatureView("prices", spine=asked, key="k", features=[
    Derived(double=pl.col("price") * 2, hour=pl.col("at").dt.hour()),
    Trailing(sold, by="k", over=("1d", "7d"), stats={"amount": "mean"}),
])
sales = FeatureView("sales", spine=asked, key="k", features=[
    Derived(hour=pl.col("at").dt.hour(), double=pl.col("price") * 4),
    Trailing(sold, by="k", over="7d", stats={"*": "count"}),
])
"""
MODELS = """
label, split = Label(sold, on="k", value=pl.col("amount") > 0, within="1d", absent=0), TimeSplit("1d", "1d")
"""
ONE = SOURCES + VIEWS + MODELS


def load(folder: Path, text: str) -> Project:
    path = folder / "definition.py"
    path.write_text(text)
    return load_project(str(path))


def model_of(folder: Path, arguments: str) -> Project:
    return load(folder, ONE + f"model = Model({arguments}, label=label, split=split)\n")


def test_every_public_name_counts_once(tmp_path: Path) -> None:
    text = ONE + 'a = Model(prices, label, split)\nb = Model(sales, label, split, name="b")\nagain, _hidden = a, 1\n'
    found = load(tmp_path, text + '_other = FeatureView("other", spine=asked, key="k", features=prices.features)\n')
    assert (list(found.views), list(found.models)) == (["prices", "sales"], ["prices", "b"])
    assert list(found.sources) == ["asked", "sold"]
    assert [each.view.name for each in found.each_view()] == ["prices", "sales"]
    assert [each.view.name for each in found.each_view(model="b")] == ["sales"]
    assert [each.require_model().name for each in found.each_model()] == ["prices", "b"]
    assert [each.require_model().name for each in found.each_model(view="sales")] == ["b"]
    assert found.definition("sales").require_model().name == found.definition(model="b").require_model().name == "b"
    assert found.definition("sales").flags == f"--definition {tmp_path}/definition.py --view sales"


@pytest.mark.parametrize(
    ("view", "model", "message"),
    [
        (None, None, r"One of the views .* must be chosen; there are prices, sales. Choose one with --view"),
        ("sale", None, r"--view must be one of the views prices, sales .*; it is sale. Did you mean 'sales'"),
        (None, "bb", r"--model must be one of the models prices, b .*; it is bb"),
        ("prices", "b", r"that model 'b' reads, that is sales; it is prices. Leave --view out"),
    ],
)
def test_a_choice_is_refused_with_what_there_is(
    tmp_path: Path, view: str | None, model: str | None, message: str
) -> None:
    found = load(tmp_path, ONE + 'a = Model(prices, label, split)\nb = Model(sales, label, split, name="b")\n')
    with pytest.raises(DefinitionError, match=message):
        found.definition(view, model)


def test_one_of_several_models_of_a_view_is_chosen_by_name(tmp_path: Path) -> None:
    found = load(tmp_path, ONE + 'a = Model(prices, label, split)\nb = Model(prices, label, split, name="b")\n')
    with pytest.raises(
        DefinitionError, match=r"One of the models .* must be chosen; there are prices, b. Choose one with --model"
    ):
        found.definition("prices").require_model()
    with pytest.raises(DefinitionError, match=r"only a view"):
        found.definition("sales").require_model()
    with pytest.raises(DefinitionError, match=r"A model must be named in .* over view 'sales'"):
        found.each_model(view="sales")


@pytest.mark.parametrize(
    ("more", "kind"),
    [
        ('other = FeatureView("prices", spine=asked, key="k", features=sales.features)\n', "view 'prices'"),
        ("a = Model(prices, label, split)\nb = Model(prices, label, split, rounds=7)\n", "model 'prices'"),
        (
            'late = Source("sold", time="at", columns={"k": pl.Int64, "amount": pl.Float64}, lateness="1h")\n'
            'other = FeatureView("other", spine=asked, key="k", features=[\n'
            '    Trailing(late, by="k", over="7d", stats={"*": "count"}),\n])\n',
            "source 'sold'",
        ),
    ],
)
def test_two_contents_of_one_name_are_refused_with_both_places(tmp_path: Path, more: str, kind: str) -> None:
    what, name = kind.split()
    places = r"at \S*definition.py, line \d+ and, with other content, at \S*definition.py, line \d+"
    with pytest.raises(DefinitionError, match=f"A name must stand for one {what}; there is {name} {places}"):
        load(tmp_path, ONE + more)


def test_equal_content_under_one_name_is_one_definition(tmp_path: Path) -> None:
    twin = VIEWS.replace("prices =", "twin =")
    assert list(load(tmp_path, ONE + twin).views) == ["prices", "sales"]


PACKAGE = {
    "__init__.py": "",
    "sources.py": SOURCES,
    "views/__init__.py": "",
    "views/both.py": "from ..sources import *\nfrom schemas import FeatureView\n" + VIEWS,
    "models.py": BASE
    + "from .views.both import prices, sales\nfrom .sources import sold\n"
    + MODELS
    + "a = Model(prices, label, split)\n",
    "helpers.py": "raise SystemExit('not a part of the definition')",
    "test_views.py": "import schemas\nraise SystemExit('a test')",
    "__main__.py": "import schemas\nraise SystemExit('a program')",
}


def package(folder: Path, name: str, files: dict[str, str] = PACKAGE) -> Path:
    for file, text in files.items():
        (folder / name / file).parent.mkdir(parents=True, exist_ok=True)
        (folder / name / file).write_text(text)
    return folder / name


@pytest.mark.parametrize("by_folder", [False, True])
def test_a_package_is_a_project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, by_folder: bool) -> None:
    name = f"project_{'folder' if by_folder else 'name'}"
    folder = package(tmp_path, name)
    monkeypatch.syspath_prepend(tmp_path)
    found = load_project(str(folder) if by_folder else name)
    assert (list(found.views), list(found.models)) == (["prices", "sales"], ["prices"])
    kept = ["models.py", "sources.py", "views/__init__.py", "views/both.py"]
    assert list(found.modules) == [f"{name}/{each}" for each in kept]
    before = found.definition("prices").digest
    # What was recorded loads again, whatever became of the files.
    texts = {path: decode_python(source) for path, source in found.modules.items()}
    (folder / "sources.py").write_text(SOURCES + "# changed\n")
    assert found.definition("prices").digest != before
    for path in folder.rglob("*.py"):
        path.write_text("raise RuntimeError")
    (tmp_path / "again").mkdir()
    loaded = set(sys.modules)
    again = load_recorded(found.name, decode_python(found.source), texts, tmp_path / "again")
    assert {name: view.fingerprint for name, view in again.views.items()} == {
        name: view.fingerprint for name, view in found.views.items()
    }
    assert list(again.models) == ["prices"]
    assert set(sys.modules) == loaded


def test_two_teams_of_a_package_cannot_use_one_name(tmp_path: Path) -> None:
    theirs = VIEWS.replace('"7d"', '"8d"')
    files = {**PACKAGE, "theirs.py": "from .sources import *\nfrom schemas import FeatureView\n" + theirs}
    with pytest.raises(
        DefinitionError, match=r"'prices' at \S*both.py, line \d+ and, with other content, at \S*theirs.py"
    ):
        load_project(str(package(tmp_path, "teams", files)))


def test_of_several_the_one_that_the_file_calls_view_is_meant_where_one_must_be(tmp_path: Path) -> None:
    """As before a definition could name several."""
    both = 'a = Model(sales, label, split, name="a")\nmodel = Model(sales, label, split)\n'
    for more, name in (("view = sales\n", None), (both, "sales"), (both + "view = prices\n", None)):
        found = load(tmp_path, ONE + more)
        chosen = found.definition()
        assert chosen.view.name == ("prices" if "prices" in more else "sales")
        assert (None if chosen.model is None else chosen.model.name) == name
        assert [each.view.name for each in found.each_view()] == ["prices", "sales"]
        assert found.definition("prices").view.name == "prices"
    (tmp_path / "schema.pbtxt").touch()
    assert found.definition("prices").schema_path == str(tmp_path / "schema.pbtxt")
    assert found.definition("sales").schema_path == str(tmp_path / "sales.schema.pbtxt")
    (tmp_path / "prices.schema.pbtxt").touch()
    assert found.definition("prices").schema_path == str(tmp_path / "prices.schema.pbtxt")


def test_each_view_of_several_has_a_schema_of_its_own(tmp_path: Path) -> None:
    found = load(tmp_path, ONE)
    assert found.definition("sales").schema_path == str(tmp_path / "sales.schema.pbtxt")
    (tmp_path / "schema.pbtxt").touch()
    with pytest.raises(DefinitionError, match=r"Rename it to that of its view, as sales.schema.pbtxt"):
        _ = found.definition("sales").schema_path
    (tmp_path / "sales.schema.pbtxt").touch()
    assert found.definition("sales").schema_path == str(tmp_path / "sales.schema.pbtxt")
    alone = load(tmp_path, SOURCES + VIEWS.replace("sales =", "_sales ="))
    assert alone.definition().schema_path == str(tmp_path / "schema.pbtxt")


def test_a_model_takes_the_features_that_match(tmp_path: Path) -> None:
    found = model_of(tmp_path, 'prices, features=["hour", "sold_*_7d"]').models["prices"]
    assert list(found.inputs) == ["hour", "sold_by_k_amount_mean_7d"]
    assert list(model_of(tmp_path, "prices").models["prices"].inputs) == list(found.view.columns)
    assert found.rows.schema == found.view.output_schema


def test_several_views_are_one_input(tmp_path: Path) -> None:
    chosen = 'features=["prices.*", "sales.*count*"]'
    found = model_of(tmp_path, f"[prices, sales], {chosen}").models["prices"]
    assert [view.name for view in found.views] == ["prices", "sales"]
    assert list(found.inputs) == [*found.view.columns, "sold_by_k_count_7d"]
    assert {
        name: found.rows.origins[name].name for name in found.rows.schema.names if name not in ("row_id", "date")
    } == {
        **dict.fromkeys(["at", "k", "price", *found.view.columns], "prices"),
        "sold_by_k_count_7d": "sales",
    }
    assert found.rows.fingerprint == ",".join(view.fingerprint for view in found.views)
    # `hour` means the same in both views, so it is one input.
    found = model_of(tmp_path, '[prices, sales], features=["hour"]').models["prices"]
    assert list(found.inputs) == ["hour"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ('prices, features=["sold_by_k_*_8d", "hour"]', r"'sold_by_k_\*_8d' matches none. Did you mean '.*_7d'"),
        ('prices, features=["huor"]', r"patterns of them; 'huor' matches none. Did you mean 'hour'"),
        ('[prices, sales], features=["sales.double_x*"]', r"features of view 'sales'.*'sales.double_x\*'.*'double'"),
        ("prices, features=[]", r"features must be a name or pattern of features or a tuple of them; it is \[\]"),
        ('prices, features=["hour", "hour"]', r"must have each name or pattern of features once"),
        ("[prices, sales]", r"a name must stand for one feature; 'double' .* in view 'prices' and in view 'sales'"),
        ("[prices, prices]", r"must name each view once"),
        ("[]", r"A model must read a FeatureView, or several; there is none"),
        ("[prices, asked]", r"A model must read a FeatureView, or several; it is Source"),
        (
            'prices, features=["hour"], encode={"double": encoders.Impute("mean")}',
            r"encode must name inputs, which features chooses; it does not choose 'double'",
        ),
        (
            '[prices, FeatureView("o", spine=sold, key="k", features=[Derived(x=pl.col("amount"))])]',
            r"same spine.*'prices' has the spine 'asked' \(.*line \d+\) and the key k; view 'o' has the spine 'sold'",
        ),
        (
            '[prices, FeatureView("o", spine=asked, key=("k",), features=[Derived(x=pl.col("k"))]),'
            ' FeatureView("p", spine=Source("asked", time="at", columns=asked.columns), key="k",'
            ' features=[Derived(x=pl.col("k"))])]',
            r"same spine \(one Source object\).*view 'p' has the spine 'asked'",
        ),
    ],
)
def test_inputs_that_cannot_be_meant_are_refused(tmp_path: Path, arguments: str, message: str) -> None:
    with pytest.raises(DefinitionError, match=message):
        model_of(tmp_path, arguments)


def test_a_definition_of_one_view_is_as_it_was() -> None:
    found = load_definition("examples.flights.definition")
    assert found.require_model().rows.fingerprint == found.view.fingerprint == "764b45c175630294"
    assert found.flags == "--definition examples.flights.definition"
    assert found.schema_path.endswith("examples/flights/schema.pbtxt")


def test_what_type_checkers_see_of_a_model_is_what_it_has() -> None:
    tree = ast.parse(Path(models.__file__).read_text())
    (shown,) = (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef) and node.name == "__init__")
    fields = [field.name for field in dataclasses.fields(models.Model) if field.init]
    assert [each.arg for each in shown.args.args] == ["self", *fields]
