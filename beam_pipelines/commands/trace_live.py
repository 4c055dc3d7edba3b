"""`millrace trace` of live feature rows and predictions: what the cut of a feature row shows."""

from __future__ import annotations

from beam_pipelines.runtime.terminal import many, wrapped
from schemas.views import FeatureView
from transforms.lineage.live_trace import DimensionUsed, LiveVisibleSource, dimensions_used, visible_to
from transforms.storage.delta_tables import TableRow


def print_seen(view: FeatureView, store: str, row: TableRow, days: bool, most: int) -> None:
    """Prints where the spine row of a live feature row came from, and what the feature row could see.

    Args:
        row: a row of the live feature table.
        days: list all days of each source; otherwise up to `most`.
    """
    late = ", after the watermark of its partition" if row["__late"] else ""
    print("\nquestion")
    print(wrapped(f"{_position(view.spine.name, row)}, computed {row['__answered'].isoformat()}{late}", hanging=2))
    print("\nsources, as the feature row could see them")
    for each in visible_to(view, store, row):
        _print_visible(each, days, most)
    for dimension in dimensions_used(store, row):
        _print_looked(dimension)


def print_scored(view: FeatureView, row: TableRow) -> None:
    """Prints the feature row from which a live prediction was made, and when."""
    where = _position(f"{view.name}.features", row)
    print(
        wrapped(
            f"of the feature row at {where}, computed {row['__answered'].isoformat()}, "
            f"scored {row['__scored'].isoformat()}",
            hanging=2,
        )
    )


def _position(topic: str, row: TableRow) -> str:
    return f"{topic}: partition {row['__partition']}, offset {row['__offset']}, row {row['__place']} of the message"


def _print_visible(each: LiveVisibleSource, days: bool, most: int) -> None:
    upto = (
        ", ".join(f"{partition if partition >= 0 else 'history'}: {offset}" for partition, offset in each.cut.items())
        or "nothing"
    )
    print(wrapped(f"{each.source}, offsets before {upto} ({each.table or 'not in this store'})", hanging=2))
    total = sum(count for _, count in each.days)
    if len(each.days) > most and not days:
        print(
            f"    {each.days[0][0]} to {each.days[-1][0]}, {many(total, 'row')} in {many(len(each.days), 'day')} "
            "(--days lists them)"
        )
    else:
        for day, count in each.days:
            print(f"    {day}  {count:>9,} rows")


def _print_looked(each: DimensionUsed) -> None:
    print(wrapped(f"{each.source}: dimension, version {each.version} ({each.path or 'no longer kept'})", hanging=2))
