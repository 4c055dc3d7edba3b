"""plan: shows what `millrace features` would do with the same flags, and why. It runs and writes nothing."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence

from beam_pipelines.runtime.errors import guard
from beam_pipelines.runtime.features_arguments import FeaturesOptions, parse_each
from beam_pipelines.runtime.plan_text import looked_lines, prepared_lines, steps
from beam_pipelines.runtime.terminal import columns, many, wrapped
from schemas.durations import DAY
from schemas.features import Derived, Feature, Latest, Lookup, Trailing
from schemas.views import FeatureView, lifetime_sources
from transforms.features.column_reuse import Copies, reading_features
from transforms.features.plan import FeaturePlan
from transforms.features.preparation import PreparedRun, prepare_features
from transforms.records.times import as_date, day_number, day_of, days_in, days_within, midnight
from transforms.sources.inventory import Inventory, take_inventory

MOST_LINES = 40


def main(argv: Sequence[str]) -> int:
    """Prints the plan. Returns 0 whether or not there is anything to compute."""
    purpose = "Print what `millrace features` would do with the same flags, and run nothing."
    for number, options in enumerate(parse_each(argv, "plan", purpose)):
        if number:
            print()
        print_plan(options)
    return 0


def print_plan(options: FeaturesOptions) -> None:
    """Prints the plan of one view."""
    work = prepare_features(options)
    view = options.view
    inventory = take_inventory(view, options.sources, options.now)
    state = "not there yet" if work.base is None else f"version {work.base}"
    print(wrapped(f"view {view.name}, fingerprint {view.fingerprint}, of {options.definition.path}", 0, hanging=2))
    print(wrapped(f"table {options.table}, {state}", 0, hanging=2))
    print("\nfeatures")
    print(columns(("feature", "type", "from", "how"), list(feature_lines(view))))
    print("\nsources")
    print(columns(("source", "first", "last", "rows", "files", "use"), list(read(view, inventory)), ("rows", "files")))
    print("\ndates")
    if work.plan is None:
        print("  nothing to do: no date is missing or stale")
        for line in looked_lines(work.current.looked):
            print(wrapped(line, hanging=2))
    else:
        _print_dates(options, work, work.plan)
        if work.copies is not None:
            print("\ncopied columns")
            _print_copies(view, work.copies, work.plan)
        print("\nplan")
        for line in prepared_lines(view, work):
            print(wrapped(line, hanging=2))
        print("\nBeam steps")
        for step, inside in steps(work, checked=options.rules is not None).items():
            print(wrapped(f"{step}{': ' if inside else ''}{', '.join(inside)}", hanging=4))
    for note in work.stale.notes:
        print("\n" + wrapped(f"note: {note}", 0, hanging=2))


def feature_lines(view: FeatureView) -> Iterator[tuple[str, str, str, str]]:
    """(Name, type, source, how it is computed) per feature."""
    for feature in view.features:
        for name, source, how in _described(view, feature):
            yield name, str(view.columns[name]), source, how


def _described(view: FeatureView, feature: Feature) -> Iterator[tuple[str, str, str]]:
    if isinstance(feature, Derived):
        yield from ((name, "its row", _short(str(expr))) for name, expr in feature.columns.items())
        return
    by = " by " + ", ".join(left if left == right else f"{left} = {right}" for left, right in feature.keys)
    where = "" if feature.where is None else f" where {_short(str(feature.where))}"
    if isinstance(feature, Trailing):
        for each in feature.statistics:
            what = "rows" if each.column == "*" else each.column
            window = "all before" if each.length is None else f"the {each.window} before"
            yield each.name, feature.source.name, f"{each.stat} of {what} in {window}{by}{where}"
    elif isinstance(feature, Latest):
        age = "of any age" if feature.length is None else f"of the {feature.max_age} before"
        yield from (
            (name, feature.source.name, f"latest {column} {age}{by}{where}") for column, name in feature.renamed.items()
        )
    elif isinstance(feature, Lookup):
        yield from ((name, feature.source.name, f"{column}{by}") for column, name in feature.renamed.items())


def _short(text: str) -> str:
    return text if len(text) <= 60 else text[:57] + "…"


def read(view: FeatureView, inventory: Inventory) -> Iterator[tuple[str, str, str, str, str, str]]:
    """(Source, first, last, rows, files, use) per source, from footers."""
    for name, slices in inventory.slices.items():
        contract = inventory.contract(name)
        low = max(min((each.low for each in slices), default=0), contract.earliest)
        high = min(max((each.high for each in slices), default=0), contract.latest)
        first, last = ("", "") if contract.source.time is None or low > high else (str(day_of(low)), str(day_of(high)))
        use = []
        if name == view.spine.name:
            use.append("the spine")
        if name in view.events:
            reach = f"{_length(view.reach(name))} back"
            ever = "all before, as a summary" + (f" but for {reach}" if view.reach(name) else "")
            use.append(f"events, {ever if name in lifetime_sources(view) else reach}")
        if name in view.dimensions:
            use.append("dimension")
        files = len({each.path for each in slices})
        yield name, first, last, f"{sum(each.rows for each in slices):,}", f"{files:,}", "; ".join(use)


def _length(reach: int) -> str:
    return f"{reach // DAY} d" if reach % DAY == 0 else f"{reach / 3_600_000_000:g} h"


def reasons(options: FeaturesOptions, work: PreparedRun) -> list[tuple[int, int, str]]:
    """(First day, last day, reason) of neighbouring days with the same reason."""
    result: list[tuple[int, int, str]] = []
    for day, why in sorted(work.stale.reasons.items()):
        if result and result[-1][1:] == (day - 1, why):
            result[-1] = (result[-1][0], day, why)
        else:
            result.append((day, day, why))
    if result or work.plan is None:
        return result
    if options.start is not None or options.end is not None:
        why = "requested (--start, --end)"
    elif options.full and work.base is not None:
        why = "requested (--full)"
    else:
        why = "never computed: the table is new"
    return [(day_number(first), days_in(last) - 1, why) for first, last in work.plan.ranges]


def _print_dates(options: FeaturesOptions, work: PreparedRun, plan: FeaturePlan) -> None:
    lines = reasons(options, work)
    rows = []
    for first, last, why in lines[:MOST_LINES]:
        count = estimated_spine_rows(plan, midnight(first), midnight(last + 1))
        rows.append((f"{as_date(first)}–{as_date(last)}", f"{last - first + 1:,}", f"{count:,}", why))
    print(columns(("dates", "days", "about rows", "why"), rows, ("days", "about rows")))
    if len(lines) > MOST_LINES:
        print(f"  and {many(len(lines) - MOST_LINES, 'more range')}")
    total = sum(estimated_spine_rows(plan, first, last) for first, last in plan.ranges)
    days = len(days_within(plan.ranges))
    print(f"  together {many(days, 'day')}, about {many(total, 'row')}")


def estimated_spine_rows(plan: FeaturePlan, first: int, last: int) -> int:
    """The approximate number of spine rows in `[first, last)` µs, on the assumption that row groups are evenly
    filled."""
    total = 0.0
    for each in {piece for block in plan.blocks for piece in block.spine}:
        low, high = each.low, each.high + 1
        total += each.rows * max(min(high, last) - max(low, first), 0) / (high - low)
    return round(total)


def _print_copies(view: FeatureView, copies: Copies, plan: FeaturePlan) -> None:
    """Prints which columns are copied from the older table on which days, and which are computed."""
    print(wrapped(f"from {copies.uri}, version {copies.version}", hanging=2))
    every = reading_features(view)
    rows = []
    days = days_within(plan.ranges)
    for first, last, names in _spans(copies, days):
        count = estimated_spine_rows(plan, midnight(first), midnight(last + 1))
        span = f"{as_date(first)}–{as_date(last)}"
        rows.append((span, f"{last - first + 1:,}", f"{count:,}", str(len(names)), str(len(every) - len(names))))
    numbers = ("days", "about rows", "copied", "computed")
    print(columns(("dates", *numbers), rows[:MOST_LINES], numbers))
    if len(rows) > MOST_LINES:
        print(f"  and {many(len(rows) - MOST_LINES, 'more range')}")
    never = [name for name in every if not any(name in names for names in copies.classes(days))]
    if never:
        print(wrapped(f"computed on every date: {', '.join(never)}", hanging=4))
    if len(every) < len(view.columns):
        print("  columns made of their own row alone are computed too")


def _spans(copies: Copies, days: Sequence[int]) -> list[tuple[int, int, tuple[str, ...]]]:
    """(First day, last day, copied columns) of neighbouring days with the same columns."""
    result: list[tuple[int, int, tuple[str, ...]]] = []
    for day in days:
        names = copies.columns.get(day, ())
        if result and result[-1][1:] == (day - 1, names):
            result[-1] = (result[-1][0], day, names)
        else:
            result.append((day, day, names))
    return result


if __name__ == "__main__":
    sys.exit(guard(main)(sys.argv[1:]))
