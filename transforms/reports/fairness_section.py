"""Protected groups in a training report: rates by their values, and the differences that gates bound."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from transforms.evaluation.gates import RATES
from transforms.models.stored_records import FairnessRecord, GroupRates, RateName, TrainingRecord
from transforms.reports import charts
from transforms.reports.charts import Axis, Paths, Strip
from transforms.reports.formatting import category

SHOWN: dict[RateName, str] = {
    "selection_rate": "Selected",
    "recall": "Recall",
    "false_positive_rate": "False positive rate",
    "precision": "Precision",
}
DRAWN = 3  # of them


@dataclasses.dataclass(frozen=True)
class Rates:
    """Rates of one value of a protected column, in the order of `SHOWN`."""

    value: str
    strip: Strip
    rows: int
    rates: tuple[float | None, ...]
    judged: bool


@dataclasses.dataclass(frozen=True)
class Measure:
    """The greatest difference between groups, the difference that gates allow, and the rates that it compares."""

    name: str
    value: float | None
    bound: float | None
    rates: tuple[str, ...]

    @property
    def verdict(self) -> str | None:
        """`pass` or `fail`; None if there is no bound."""
        if self.bound is None or self.value is None:
            return None
        return "pass" if self.value <= self.bound else "fail"


@dataclasses.dataclass(frozen=True)
class Protected:
    """A protected column."""

    column: str
    scale: Axis
    groups: tuple[Rates, ...]
    measures: tuple[Measure, ...]


@dataclasses.dataclass(frozen=True)
class Fairness:
    """The content of the section; rows with a score of at least `threshold` are selected."""

    threshold: float | None
    columns: tuple[Protected, ...]
    names: tuple[str, ...] = tuple(SHOWN.values())


def fairness(content: TrainingRecord) -> Fairness | None:
    if not content["fairness"]:
        return None
    rules = content.get("rules") or {}
    bounds = rules.get("max_difference", {})
    return Fairness(rules.get("threshold"), tuple(protected(each, bounds) for each in content["fairness"]))


def protected(found: FairnessRecord, bounds: Mapping[str, float]) -> Protected:
    x = Axis.share()

    def marks(each: GroupRates) -> Paths:
        paths: Paths = ()
        for i, (rate, word) in enumerate(list(SHOWN.items())[:DRAWN]):
            if (share := each.get(rate)) is not None:
                paths += charts.dots(x, charts.ROW, [share], [0.5], f"big g{i}", [word])
        return paths

    groups = tuple(
        Rates(
            category(each["value"]),
            Strip(x, marks(each)),
            each["rows"],
            tuple(each.get(rate) for rate in SHOWN),
            each["judged"],
        )
        for each in found["groups"]
    )
    measures = tuple(
        Measure(name, value, bounds.get(name), tuple(RATES[name])) for name, value in found["differences"].items()
    )
    return Protected(found["column"], x, groups, measures)
