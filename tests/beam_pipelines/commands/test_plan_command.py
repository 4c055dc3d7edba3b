"""`millrace plan` shows what `features` would do, and why, and does nothing."""

import hashlib
import re
from pathlib import Path

import apache_beam as beam
import polars as pl
import pytest
from apache_beam.options.pipeline_options import PipelineOptions
from apache_beam.pipeline import AppliedPTransform, PipelineVisitor

from beam_pipelines import cli, features
from beam_pipelines.commands.plan import main, reasons
from beam_pipelines.runtime.features_arguments import FeaturesOptions
from beam_pipelines.runtime.plan_text import steps
from schemas.errors import DefinitionError
from tests.support import shop
from transforms.features.preparation import PreparedRun

Out = pytest.CaptureFixture[str]


@pytest.fixture
def case(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    monkeypatch.setenv("COLUMNS", "160")
    definition = shop.write(tmp_path, 600)
    return ["--definition", str(definition), "--store", str(tmp_path)]


def content(store: Path) -> dict[str, str]:
    return {str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in store.rglob("*") if path.is_file()}


def section(out: str, name: str) -> str:
    return out.split(f"\n{name}\n")[1].split("\n\n")[0]


def test_a_new_table_would_be_computed_whole_and_nothing_is_written(
    case: list[str], tmp_path: Path, capsys: Out
) -> None:
    before = content(tmp_path)
    assert cli.main(["plan", *case]) == 0
    assert content(tmp_path) == before
    out = capsys.readouterr().out
    assert "not there yet" in out
    reported = section(out, "features")
    assert re.search(r"sales_by_shop_amount_mean_3d +Float32 +sales +mean of amount in the 3d before by shop", reported)
    assert re.search(r"hour +Int64 +its row", reported)
    assert re.search(r"visits +2024-01-01 +2024-02-29 +600 +1 +the spine", section(out, "sources"))
    assert re.search(r"sales .* events, 3 d back", section(out, "sources"))
    assert re.search(r"2024-01-01–2024-02-29 +60 +600 +never computed: the table is new", section(out, "dates"))
    assert "1 block, each block reads the slices it needs" in section(out, "plan")
    steps = section(out, "Beam steps")
    assert re.search(r"^  Features: .*Compute", steps, re.MULTILINE)
    assert re.search(r"^  Commit", steps, re.MULTILINE)


def test_reasons_are_those_of_the_run_that_follows(case: list[str], tmp_path: Path, capsys: Out) -> None:
    assert features.main([*case, "--end", "2024-02-20"]) == 0
    part = tmp_path / "sources" / "sales" / "part.parquet"
    sales = pl.read_parquet(part)
    changed = sales["sold"].dt.date() == pl.date(2024, 1, 10)
    sales.with_columns(pl.when(changed).then(pl.lit(5.0)).otherwise("amount").alias("amount")).write_parquet(part)
    capsys.readouterr()
    assert main(case) == 0
    dates = section(capsys.readouterr().out, "dates")
    assert re.search(r"2024-01-10–2024-01-13 +4 +\d+ +sales changed on 2024-01-10\n", dates)
    assert re.search(r"2024-02-20–2024-02-29 +10 +\d+ +never computed\n", dates)
    assert "together 14 days" in dates
    assert features.main([*case, "--run_id", "next"]) == 0
    capsys.readouterr()
    assert main(case) == 0
    assert "nothing to do: no date is missing or stale" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "why"),
    [
        (["--full"], "requested (--full)"),
        (["--start", "2024-02-01", "--end", "2024-02-03"], "requested (--start, --end)"),
    ],
)
def test_what_is_asked_for_is_the_reason(case: list[str], flags: list[str], why: str) -> None:
    assert features.main(case) == 0
    options = features.parse([*case, *flags])
    reported = reasons(options, features.prepare(options))
    assert [each[2] for each in reported] == [why]
    first, last, _ = reported[0]
    assert last - first + 1 == (60 if flags == ["--full"] else 2)


def test_the_plan_asked_for_is_shown(case: list[str], capsys: Out) -> None:
    assert main([*case, "--plan", "shuffle", "--block_rows", "100"]) == 0
    out = capsys.readouterr().out
    assert re.search(r"\d\d? blocks, each slice is read once", out)
    assert "Gather" in section(out, "Beam steps")


def graph_steps(options: FeaturesOptions, work: PreparedRun) -> dict[str, tuple[str, ...]]:
    """Labels of the graph's steps, with those right below them; the inside of Beam's own steps is left out."""
    pipeline = beam.Pipeline(runner="DirectRunner", options=PipelineOptions([]))
    features.build(pipeline, options, work)
    found: dict[str, list[str]] = {}

    class Labels(PipelineVisitor):
        def enter_composite_transform(self, node: AppliedPTransform) -> None:
            self.visit_transform(node)

        def visit_transform(self, node: AppliedPTransform) -> None:
            parts = node.full_label.split("/")
            if parts[0] and len(parts) <= 2:
                inside = found.setdefault(parts[0], [])
                if len(parts) == 2 and not type(node.parent.transform).__module__.startswith("apache_beam"):
                    inside.append(parts[1])

    pipeline.visit(Labels())
    return {label: tuple(inside) for label, inside in found.items()}


@pytest.mark.parametrize("windows", ['over="3d"', 'over=("3d", "all")'], ids=["3d", "all"])
@pytest.mark.parametrize(
    "flags",
    [
        "",
        "--no-statistics",
        "--verify 0",
        "--key_shards 3",
        "--plan shuffle --block_rows 100",
        "--plan shuffle --no-statistics",
    ],
)
def test_the_steps_shown_are_those_of_the_graph(tmp_path: Path, windows: str, flags: str) -> None:
    definition = shop.write(tmp_path, 300, shop.DEFINITION.replace('over="3d"', windows))
    options = features.parse(["--definition", str(definition), "--store", str(tmp_path), *flags.split()])
    work = features.prepare(options)
    shown = steps(work, checked=options.rules is not None)
    assert list(shown.items()) == list(graph_steps(options, work).items())


def test_a_changed_dimension_is_a_note(tmp_path: Path, capsys: Out, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "160")
    text = shop.DEFINITION.replace("import Derived,", "import Derived, Lookup,").replace(
        "view = ", 'shops = Source("shops", columns={"shop": pl.String, "size": pl.Int32})\nview = '
    )
    text = text.replace("    Derived(", '    Lookup(shops, by="shop", columns="size"),\n    Derived(')
    case = ["--definition", str(shop.write(tmp_path, 200, text)), "--store", str(tmp_path)]
    folder = tmp_path / "sources" / "shops"
    folder.mkdir()
    pl.DataFrame({"shop": ["north"], "size": pl.Series([3], dtype=pl.Int32)}).write_parquet(folder / "a.parquet")
    assert features.main(case) == 0
    pl.DataFrame({"shop": ["north"], "size": pl.Series([4], dtype=pl.Int32)}).write_parquet(folder / "a.parquet")
    capsys.readouterr()
    assert main(case) == 0
    out = capsys.readouterr().out
    assert "nothing to do" in out
    assert "note: shops changed; features computed before keep its old rows" in out
    assert main([*case, "--refresh"]) == 0
    assert "a dimension changed (--refresh)" in capsys.readouterr().out


def test_lines_fit_a_narrow_terminal(case: list[str], capsys: Out, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    assert main(case) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if "/" not in line]  # paths stay whole
    assert max(map(len, lines)) <= 80


def test_flags_of_ours_are_checked_under_its_own_name(case: list[str]) -> None:
    with pytest.raises(DefinitionError, match="millrace plan: unknown flag --ful"):
        main([*case, "--ful"])


LONG = shop.DEFINITION.replace('over="3d"', 'over=("3d", "40d"), name="sold", where=pl.col("amount") > 1').replace(
    '("mean", "count")', '("mean", "median", "max")'
)


def plan(case: list[str], capsys: Out, *flags: str) -> str:
    capsys.readouterr()
    assert main([*case, *flags]) == 0
    return section(capsys.readouterr().out, "plan")


@pytest.fixture
def long(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A window that reaches over most of the history, and a dimension."""
    monkeypatch.setenv("COLUMNS", "400")
    text = LONG.replace("import Derived,", "import Derived, Lookup,")
    text = text.replace("view = ", 'shops = Source("shops", columns={"shop": pl.String, "size": pl.Int32})\nview = ')
    text = text.replace("    Derived(", '    Lookup(shops, by="shop", columns="size"),\n    Derived(')
    definition = shop.write(tmp_path, 3000, text)
    (tmp_path / "sources" / "shops").mkdir()
    sizes = pl.DataFrame({"shop": ["north", "south"], "size": pl.Series([3, 4], dtype=pl.Int32)})
    sizes.write_parquet(tmp_path / "sources" / "shops" / "a.parquet")
    return ["--definition", str(definition), "--store", str(tmp_path)]


def test_blocks_that_reach_too_far_are_cut_by_key_and_why_is_told(long: list[str], capsys: Out) -> None:
    assert "key shards" not in plan(long, capsys)
    reported = plan(long, capsys, "--block_rows", "200")
    assert re.search(
        r"key shards \d+ per block of \d+ of them: the 40d window of sales reaches [\d,]+ rows, more than 600|"
        r"key shards \d+ per block: ",
        reported,
    )
    assert "one shard of one key is in memory at a time" in reported
    assert "of what all windows of a block share one row per key is kept: 40d of sales" in reported
    assert re.search(r"medians, .* hold all events of a key at once, however many: 40d of sales", reported)


def test_key_shards_asked_for_or_refused_are_shown_and_change_no_answer(
    long: list[str], capsys: Out, tmp_path: Path
) -> None:
    assert "key shards 5 per block: requested (--key_shards)" in plan(long, capsys, "--key_shards", "5")
    assert "key shards" not in plan(long, capsys, "--key_shards", "1", "--block_rows", "200")
    reported = plan(long, capsys, "--key_shards", "auto")
    assert reported == plan(long, capsys)
    found = []
    for number, flags in enumerate(
        (("--key_shards", "1"), ("--key_shards", "5"), ("--block_rows", "200", "--broadcast_mb", "0"))
    ):
        store = str(tmp_path / f"store-{number}")
        arguments = [*long[:2], "--store", store, "--sources", str(tmp_path / "sources")]
        assert features.main([*arguments, *flags, "--no-statistics"]) == 0
        view = features.parse(arguments).table
        found.append(pl.read_delta(view).sort("visit"))
    assert found[0].equals(found[1])
    assert found[0].equals(found[2])


@pytest.mark.parametrize("value", ["0", "1001", "some", "-3", "2.5"])
def test_key_shards_are_a_number_or_auto(case: list[str], value: str) -> None:
    with pytest.raises(DefinitionError, match="neither auto nor a number from 1 to 1000"):
        main([*case, f"--key_shards={value}"])


def test_a_dimension_is_broadcast_up_to_a_size_and_routed_above_it(long: list[str], capsys: Out) -> None:
    assert "shops: broadcast (2 rows)" in plan(long, capsys)
    assert "shops: routed: blocks read past it and keep what they look up (2 rows)" in plan(
        long, capsys, "--broadcast_mb", "0.00001"
    )


def test_the_plan_of_a_run_is_logged_as_it_is_printed(long: list[str], capsys: Out) -> None:
    reported = plan(long, capsys, "--block_rows", "200")
    assert features.main([*long, "--block_rows", "200"]) == 0
    printed = capsys.readouterr().err
    for line in reported.splitlines():
        assert line.strip() in printed


def test_what_windows_over_all_history_read_is_told(long: list[str], capsys: Out, tmp_path: Path) -> None:
    definition = Path(long[1])
    text = definition.read_text()
    definition.write_text(text.replace('over=("3d", "40d")', 'over=("3d", "all")').replace('"median", ', ""))
    path = tmp_path / "sources" / "sales" / "part.parquet"
    sales = pl.read_parquet(path)
    sales.write_parquet(path, row_group_size=100)
    capsys.readouterr()
    assert main(long) == 0
    out = capsys.readouterr().out
    assert re.search(r"sales .* events, all before, as a summary but for 3 d back", section(out, "sources"))
    reported = section(out, "plan")
    # A new table: whatever there is, and once more for the summary that the run leaves.
    assert "sales is summarised from its first row (there is no snapshot to start from) on; slices of " in reported
    assert re.search(rf"slices of {len(sales):,} rows are read for it, beside those of the blocks", reported)
    assert f"unique columns alone, to find repeats: {len(sales):,} rows of sales" in reported
    assert "to see what has changed" in reported  # the dimension: nothing of a new table's days is known before
    assert "of sales" not in reported.split("to see what has changed")[1].split("\n")[0]

    assert features.main([*long, "--end", "2024-02-20", "--no-statistics"]) == 0
    reported = plan(long, capsys)
    days = sales.filter(pl.col("sold").dt.date() >= pl.date(2024, 2, 20))
    assert "sales is summarised from the snapshot of 2024-02-20 on" in reported
    (read,) = re.findall(r"slices of ([\d,]+) rows are read for it", reported)
    assert len(days) <= int(read.replace(",", "")) <= len(days) + 100, "row groups from that day on, and no others"
    (digested,) = re.findall(r"to see what has changed: .*?([\d,]+) rows of sales", reported)
    assert len(days) <= int(digested.replace(",", "")) <= len(days) + 100

    assert features.main([*long, "--no-statistics"]) == 0
    capsys.readouterr()
    assert main(long) == 0
    dates = section(capsys.readouterr().out, "dates")
    assert "nothing to do" in dates
    assert f"to find repeats: {len(sales):,} rows of sales" in dates
