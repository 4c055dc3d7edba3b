"""parity: every live answer computed again in batch, over exactly the events that it could see; and scored again."""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Sequence

from apache_beam.io.filesystems import FileSystems

from beam_pipelines.options import Arguments
from beam_pipelines.reporting import Run, guard
from schemas.errors import MismatchError
from schemas.loading import Definition, load_definition
from transforms.parity import Parity, check
from transforms.predicted import Outlet
from transforms.registry import registry_uri
from transforms.rescoring import Rescored, rescore
from transforms.tables import open_table


def main(argv: Sequence[str]) -> int:
    """0 when no value differs."""
    arguments = Arguments("millrace parity", "Compute live answers again in batch and compare them to the bit.")
    arguments.add_interval("questions")
    arguments.add_argument(
        "--registry", help="MLflow tracking URI, if there are predictions (default: SQLite in <store>/registry)"
    )
    flags, rest = arguments.parse(argv)
    if rest:
        arguments.error(f"unknown flag {rest[0]}; parity runs here, not on Beam")
    definition = load_definition(flags.definition)
    with Run("parity", flags.run_id, FileSystems.join(flags.store, "runs", flags.run_id)) as run:
        found = check(definition.view, flags.store, flags.start, flags.end)
        run.update(figures(found))
        scored = rescored(definition, flags)
        run.update({} if scored is None else {"predictions": dataclasses.asdict(scored)})
    print(table(found), flush=True)
    if scored is not None:
        print(told(scored), flush=True)
    if found.differing:
        name, worst = max(found.features.items(), key=lambda item: item[1].differing)
        raise MismatchError(
            "Live and batch agree to the last bit",
            f"{found.differing} values differ, {worst.differing} of them in {name!r}, such as {worst.examples[0]}",
            "Please report it, with run.json",
        )
    if scored is not None and (scored.differing or scored.doubled or scored.stray):
        raise MismatchError(
            "Live predictions are a batch job's, one for each answer",
            f"{scored.differing} differ, {scored.doubled} doubled, {scored.stray} of no answer{'; such as ' + scored.examples[0] if scored.examples else ''}",
            "Please report it, with run.json",
        )
    return 0


def rescored(definition: Definition, flags: argparse.Namespace) -> Rescored | None:
    """The predictions scored again; None where the store has none."""
    view, model = definition.view, definition.model
    if model is None or open_table(Outlet(view, model.name, flags.store, "").uri) is None:
        return None
    registry = registry_uri(flags.store, flags.registry)
    return rescore(view, flags.store, model.name, registry, flags.start, flags.end)


def told(scored: Rescored) -> str:
    """A line of the predictions."""
    versions = ", ".join(f"{rows:,} by version {version}" for version, rows in scored.compared.items()) or "none"
    return (
        f"  predictions: {versions}; {scored.differing} differ, {scored.doubled} doubled, {scored.stray} of no answer, "
        f"{scored.otherwise} of an answer told otherwise, {scored.missing} answers without one (yet)"
    )


def figures(found: Parity) -> dict[str, object]:
    """The result as JSON."""
    return {
        "answers_compared": found.answers, "values_compared": sum(each.rows for each in found.features.values()),
        "values_differing": found.differing, "cuts": found.cuts, "answers_with_later_arrivals": found.by_cut,
        "answers_later_arrivals_change": found.changed_later, "questions_unanswered": found.unanswered,
        "features": {name: dataclasses.asdict(each) for name, each in found.features.items()},
    }  # fmt: skip


def table(found: Parity) -> str:
    """A line per feature."""
    width = max(map(len, found.features))
    lines = [
        f"  {'feature':<{width}}  {'rows':>10}  {'null live':>10}  {'null batch':>10}  {'differing':>10}  {'changed later':>13}"
    ]
    lines += [
        f"  {name:<{width}}  {each.rows:>10,}  {each.nulls_live:>10,}  {each.nulls_batch:>10,}  {each.differing:>10,}  {each.changed_later:>13,}"
        for name, each in found.features.items()
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(guard(main)(sys.argv[1:]))
