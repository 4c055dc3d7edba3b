"""parity: computes every live feature row again in batch, over exactly the events that it could see, and scores it
again.  It also compares the rows with the full batch table, and names the cause of every difference.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Mapping, Sequence

from beam_pipelines.runtime.arguments import Arguments
from beam_pipelines.runtime.errors import guard
from beam_pipelines.runtime.run_report import Run, read_json, write_json
from beam_pipelines.runtime.terminal import columns
from schemas.errors import MismatchError
from schemas.loading import Definition, load_definition
from schemas.views import FeatureView
from transforms.inference.live_output import Outlet
from transforms.lineage.counted_rows import UNEXPLAINED, BatchSide
from transforms.lineage.difference_causes import FullComparison, compare_with_full
from transforms.lineage.feature_parity import Parity, check_parity
from transforms.lineage.prediction_parity import Rescored, rescore
from transforms.models.registry import registry_uri
from transforms.records.value_text import format_value
from transforms.storage.delta_tables import open_table
from transforms.storage.file_systems import FileSystems

NO_BATCH = {
    "batch": None,
    "why": "there is none to compare with; name its store with --batch_store, or its sources with --sources",
}


def main(argv: Sequence[str]) -> int:
    """Runs the command; 0 if no value differs."""
    arguments = Arguments("millrace parity", "Compute live feature rows again in batch, and compare them bit by bit.")
    arguments.add_interval("spine rows")
    arguments.add_argument(
        "--registry", help="MLflow tracking URI, if there are predictions (default: SQLite in <store>/registry)"
    )
    arguments.add_argument(
        "--batch_store",
        help="store of the batch feature table to compare with as well, its sources beside it; without a table "
        "its values are "
        "computed from them (default: --store if it has the table, else the store to which the last live job's "
        "--sources belong)",
    )
    arguments.add_argument(
        "--sources", help="folder of the batch table's sources (default: beside it, in <batch_store>/sources)"
    )
    arguments.add_argument("--json", metavar="FILE", help="also write the figures to this file")
    flags, rest = arguments.parse(argv)
    if rest:
        arguments.error(f"unknown flag {rest[0]}; parity runs here, not on Beam")
    definition = load_definition(flags.definition, flags.view, flags.model)
    view = definition.view
    side = batch_side(view, flags)
    lines: list[str] = []
    with Run("parity", flags.run_id, FileSystems.join(flags.store, "runs", flags.run_id)) as run:
        found = check_parity(view, flags.store, flags.start, flags.end)
        run.update(parity_figures(found))
        lines.append(feature_lines(view, found))
        scored = rescored(definition, flags)
        if scored is not None:
            run.update({"predictions": scored.as_json()})
            lines.append(text_of(scored))
        full = None if side is None else compare_with_full(view, flags.store, side, flags.start, flags.end)
        run.update({"full_batch": NO_BATCH if full is None else full_figures(full)})
        lines.append(f"\nagainst the full batch table: {NO_BATCH['why']}" if full is None else full_table(view, full))
    if flags.json:
        write_json(flags.json, run.figures)
    print("\n".join(lines), flush=True)
    require_agreement(view, found, scored, full)
    return 0


def require_agreement(view: FeatureView, found: Parity, scored: Rescored | None, full: FullComparison | None) -> None:
    """Checks the results.

    Raises:
        MismatchError: live and batch differ where they must not.
    """
    if found.differing:
        name, worst = max(found.features.items(), key=lambda item: item[1].differing)
        raise MismatchError(
            "Live and batch agree to the last bit",
            f"{found.differing} values differ, {worst.differing} of them in {name!r}, such as "
            f"{example(view, {**worst.examples[0], 'feature': name})}",
            "Please report it, with run.json",
        )
    if found.unaccounted:
        raise MismatchError(
            "Every spine row that a live job accepted is computed, rejected or pending",
            f"{found.unaccounted} are none of these",
            "Please report it, with run.json and the job's",
        )
    if scored is not None and (scored.differing or scored.doubled or scored.stray):
        raise MismatchError(
            "Live predictions equal a batch job's, one for each feature row",
            f"{scored.differing} differ, {scored.doubled} doubled, {scored.stray} of no "
            f"feature row{'; such as ' + scored.examples[0] if scored.examples else ''}",
            "Please report it, with run.json",
        )
    if full is not None and full.unexplained:
        only_live, only_batch = full.only_live.get(UNEXPLAINED, 0), full.only_batch.get(UNEXPLAINED, 0)
        value = (
            f"{full.unexplained} values or rows do not: {only_live} feature rows that batch lacks, "
            f"{only_batch} rows that live lacks"
        )
        for name, each in full.causes.items():
            if name.startswith(UNEXPLAINED):
                value += f"; {each.values} values ({name}), such as {example(view, each.examples[0])}"
        raise MismatchError(
            f"What differs from the full batch table ({full.batch}) comes from a known cause",
            value,
            "If its sources changed since it was computed, run: millrace features; else please report it, with "
            "run.json",
        )


def batch_side(view: FeatureView, flags: argparse.Namespace) -> BatchSide | None:
    """The batch table, or the sources, to compare a live store's feature rows with; None if there is none."""
    if flags.batch_store or flags.sources:
        return BatchSide.of(view, flags.batch_store, flags.sources)
    if open_table(FileSystems.join(flags.store, "features", view.name, view.fingerprint)) is not None:
        return BatchSide.of(view, flags.store)
    root = _last_sources(flags.store)
    if root is None or not _has_sources(view, root):  # there may only be dimensions
        return None
    return BatchSide.of(view, root.removesuffix("/sources") if root.endswith("/sources") else None, root)


def _last_sources(store: str) -> str | None:
    """The folder of sources of the store's last live job."""
    newest: tuple[float, str] | None = None
    for each in FileSystems.match([FileSystems.join(store, "runs", "*", "run.json")])[0].metadata_list:
        ran = read_json(each.path)
        if ran.get("pipeline") == "features --streaming" and (root := ran.get("sources_root")):
            newest = max(newest or (0.0, ""), (float(each.last_updated_in_seconds or 0), str(root)))
    return None if newest is None else newest[1].rstrip("/")


def _has_sources(view: FeatureView, root: str) -> bool:
    patterns = [
        FileSystems.join(root, name) + end for name in (view.spine.name, *view.events) for end in ("/**", ".parquet")
    ]
    found = [match.metadata_list for match in FileSystems.match(patterns)]
    return all(one or other for one, other in zip(found[::2], found[1::2], strict=True))


def example(view: FeatureView, difference: Mapping[str, object]) -> str:
    """One difference as text."""
    dtype = view.columns[str(difference["feature"])]
    about = ", ".join(
        f"{name} = {format_value(difference[name], view.spine.schema[name])}" for name in (*view.key, view.time)
    )
    live, batch = (format_value(difference[side], dtype) for side in ("live", "batch"))
    return f"{difference['feature']} of {about}: {live} live, {batch} batch"


def full_figures(full: FullComparison) -> dict[str, object]:
    """The result of the comparison with the full table, as in `run.json`, with keys older than the names here."""
    return {
        "batch": full.batch,
        "answers_compared": full.feature_rows,
        "values_compared": full.values,
        "values_differing": full.differing,
        "unexplained": full.unexplained,
        "causes": {name: each.as_json() for name, each in full.causes.items()},
        "answers_that_batch_lacks": full.only_live,
        "rows_without_an_answer": full.only_batch,
        "rows_that_wait": full.pending,
        "answers_of_dates_not_computed": full.not_computed,
    }


def full_table(view: FeatureView, full: FullComparison) -> str:
    """A line for each cause."""
    lines = [f"\nagainst the full batch table ({full.batch})"]
    lines.append(f"  {full.feature_rows:,} feature rows, {full.values:,} values, {full.differing:,} differ")
    rows = [
        (name, f"{each.values:,}", f"{each.feature_rows:,}", example(view, each.examples[0]))
        for name, each in sorted(full.causes.items(), key=lambda item: -item[1].values)
    ]
    if rows:
        lines.append(columns(("cause", "values", "rows", "such as"), rows, ("values", "rows")))
    for what, counts in (
        ("feature rows that batch lacks", full.only_live),
        ("batch rows without a live feature row", full.only_batch),
    ):
        lines += [f"  {what}: {number:,} ({cause})" for cause, number in sorted(counts.items())]
    if full.pending:
        lines.append(f"  pending spine rows: {full.pending:,}")
    if full.not_computed:
        lines.append(f"  feature rows of dates that the batch table lacks: {full.not_computed:,}")
    return "\n".join(lines)


def rescored(definition: Definition, flags: argparse.Namespace) -> Rescored | None:
    """The comparison of predictions; None if the store has none."""
    view, model = definition.view, definition.model
    if model is None or open_table(Outlet(view, model.name, flags.store, "").uri) is None:
        return None
    registry = registry_uri(flags.store, flags.registry)
    return rescore(view, flags.store, model.name, registry, flags.start, flags.end)


def text_of(scored: Rescored) -> str:
    """The line about predictions."""
    versions = ", ".join(f"{rows:,} by version {version}" for version, rows in scored.compared.items()) or "none"
    return (
        f"  predictions: {versions}; {scored.differing} differ, {scored.doubled} doubled, "
        f"{scored.stray} without a feature row, {scored.other_cut} of a feature row with another cut in the table; "
        f"{scored.missing} feature rows have none (yet)"
    )


def parity_figures(found: Parity) -> dict[str, object]:
    """The result as in `run.json`, with keys older than the names here."""
    return {
        "answers_compared": found.feature_rows,
        "values_compared": sum(each.rows for each in found.features.values()),
        "values_differing": found.differing,
        "cuts": found.cuts,
        "answers_with_later_arrivals": found.by_cut,
        "answers_later_arrivals_change": found.changed_later,
        "questions_unanswered": found.uncomputed,
        "questions_unaccounted_for": found.unaccounted,
        "questions_erased": found.erased,
        "features": {name: dataclasses.asdict(each) for name, each in found.features.items()},
    }


def feature_lines(view: FeatureView, found: Parity) -> str:
    """A line for each feature, and examples of values that differ."""
    width = max(map(len, found.features))
    lines = [
        f"  {'feature':<{width}}  {'rows':>10}  {'null live':>10}  {'null batch':>10}  {'differing':>10}  "
        f"{'changed later':>13}"
    ]
    lines += [
        f"  {name:<{width}}  {each.rows:>10,}  {each.nulls_live:>10,}  {each.nulls_batch:>10,}  "
        f"{each.differing:>10,}  {each.changed_later:>13,}"
        for name, each in found.features.items()
    ]
    lines += [
        f"  {example(view, {**difference, 'feature': name})}, cut {difference['__cut']}"
        for name, each in found.features.items()
        for difference in each.examples
    ]
    if found.erased:
        lines.append(f"  erased: {found.erased:,} feature rows that could see an erased row")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(guard(main)(sys.argv[1:]))
