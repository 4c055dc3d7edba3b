"""Slices of the test split in a training report, as forest plots; slices that made a gate fail are marked."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from transforms.models.stored_records import ModelManifest, SliceRecord, TrainingRecord
from transforms.reports import charts
from transforms.reports.charts import Axis, Strip
from transforms.reports.formatting import category, metric_name

# The most slices of one group that are shown at once, and that are shown at all.
SHOWN, MOST = 25, 200


@dataclasses.dataclass(frozen=True)
class SliceRow:
    """One slice: its values, and its metric with a 95 % interval.

    Args:
        pale: whether it has too few rows for a gate.
    """

    name: str
    failed: bool
    pale: bool
    strip: Strip
    rows: int
    value: float | None
    span: Sequence[float] | None


@dataclasses.dataclass(frozen=True)
class Forest:
    """A metric of the slices of one group, the largest first; `left` are not shown."""

    metric: str
    scale: Axis
    first: tuple[SliceRow, ...]
    more: tuple[SliceRow, ...]
    left: int

    @property
    def smaller(self) -> int:
        """Slices that are not shown at once."""
        return len(self.more) + self.left


@dataclasses.dataclass(frozen=True)
class SliceGroup:
    """Slices by the same columns."""

    columns: tuple[str, ...]
    forests: tuple[Forest, ...]


@dataclasses.dataclass(frozen=True)
class SlicesSection:
    """The content of the section; gates ignore slices of fewer than `least` rows."""

    least: int | None
    groups: tuple[SliceGroup, ...]


def slices(content: TrainingRecord, manifest: ModelManifest) -> SlicesSection | None:
    if not content["slices"]:
        return None
    rules = content.get("rules") or {}
    chosen = list(dict.fromkeys([manifest["metric"], *rules.get("max_gap", {})]))
    members: dict[tuple[str, ...], list[SliceRecord]] = {}
    for each in content["slices"]:
        members.setdefault(tuple(each["by"]), []).append(each)
    groups = [SliceGroup(by, tuple(forest(content, some, metric) for metric in chosen)) for by, some in members.items()]
    return SlicesSection(rules.get("min_slice_rows"), tuple(groups))


def forest(content: TrainingRecord, members: Sequence[SliceRecord], metric: str) -> Forest:
    rules = content.get("rules") or {}
    bound, least = rules.get("max_gap", {}).get(metric), rules.get("min_slice_rows", 0)
    whole, span = content["metrics"][metric], content["intervals"].get(metric)
    firm = [each for each in members if each["rows"] >= least] or members
    ends = [value for each in firm for value in (each["metrics"][metric], *(each["intervals"].get(metric) or ()))]
    known = [value for value in (whole, *(span or ()), *ends) if value is not None]
    x = Axis.over(known, metric_name(metric), ticks=4, pad=0.04)
    holds = {each["gate"]: each["holds"] for each in content["gates"]}
    behind = charts.stripe(x, span[0], span[1], "whole") if span else ()
    behind += charts.upright(x, whole, "whole") if whole is not None else ()

    def row(each: SliceRecord) -> SliceRow:
        name = ", ".join(f"{column}={'null' if value is None else value}" for column, value in each["by"].items())
        failed = bound is not None and not holds.get(f"{metric} of {name} within {bound:g} of the whole", True)
        firm = each["rows"] >= least
        value, mine = each["metrics"][metric], each["intervals"].get(metric)
        marks = charts.whisker(x, value, mine, "fail" if failed else "first" if firm else "pale")
        values = ", ".join(category(value) for value in each["by"].values())
        return SliceRow(values, failed, not firm and not failed, Strip(x, behind + marks), each["rows"], value, mine)

    rows = tuple(row(each) for each in members)
    return Forest(metric, x, rows[:SHOWN], rows[SHOWN:MOST], max(len(rows) - MOST, 0))
