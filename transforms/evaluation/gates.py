"""Verdicts of a model's gates: least metrics, slices, differences between protected groups, and the champion."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from datetime import datetime
from typing import cast

from schemas import Gates
from schemas.models import RISING
from schemas.splits import Split
from transforms.evaluation.bootstrap import LEAST_ROWS, percentile_interval
from transforms.evaluation.evaluate import EvaluationSlice, Report
from transforms.models.stored_records import FairnessRecord, GateRecord, GroupRates, ModelManifest, RateName

# A fairness measure is the greatest difference of these rates between groups.
RATES: dict[str, tuple[RateName, ...]] = {
    "demographic_parity": ("selection_rate",),
    "equal_opportunity": ("recall",),
    "equalized_odds": ("recall", "false_positive_rate"),
}


# Part of the name of the gate that compares with the champion.
BEATS = "beats the champion's"


@dataclasses.dataclass(frozen=True)
class Verdict:
    """The verdict of one gate.

    `judged` is False if there was nothing to compare.  Such a gate holds, except the gate against a champion: only a
    model that was compared with the champion replaces it.
    """

    gate: str
    holds: bool
    reason: str
    judged: bool = True

    def as_json(self) -> GateRecord:
        return {"gate": self.gate, "holds": self.holds, "reason": self.reason, "judged": self.judged}


@dataclasses.dataclass(frozen=True)
class Rival:
    """The champion at launch.

    Args:
        version: its version; None if there is no champion.
        report: its report on the same test rows; None if it could not score them.
        reason: why it could not.
        caveats: notes on the comparison: why it may have learnt from these rows, and which features it read.
    """

    version: str | None = None
    report: Report | None = None
    reason: str = "there is no champion"
    caveats: str = ""


def may_know(manifest: ModelManifest, split: Split) -> str:
    """Why the model of `manifest` may have learnt from the test rows of `split`; "" if it cannot have."""
    before = manifest.get("split", {})
    mine = split.as_json().get("groups")
    if "groups" in before or mine is not None:
        apart = before.get("groups") == mine and mine is not None
        return "" if apart else "the two divide rows in different ways, so that it may have learnt from these rows"
    until = before.get("validate_end")
    if until is None or split.test_start is None or datetime.fromisoformat(until) <= split.test_start:
        return ""
    return f"it has seen rows up to {until[:10]}, so that it may have learnt from these rows"


def verdicts(gates: Gates, report: Report, metric: str = "", rival: Rival | None = None) -> list[Verdict]:
    """The verdict of each gate on `report`: first least metrics, then slices, groups, and the champion.

    Args:
        gates: the declared gates.
        report: the model's report.
        metric: the metric by which champion and challenger are compared.
        rival: the champion; None leaves out its gate.
    """
    result = [_floor(name, bound, report) for name, bound in gates.at_least.items()]
    for name, bound in gates.max_gap.items():
        result += [_gap(name, bound, report, each, gates.min_slice_rows) for each in report.slices]
    for found in fairness_records(gates, report):
        for name, bound in gates.max_difference.items():
            result.append(_difference(name, bound, found))
    return result if rival is None else [*result, _challenge(metric, gates.margin, report, rival)]


def _floor(metric: str, bound: float, report: Report) -> Verdict:
    value, rising = report.metrics[metric], metric in RISING
    gate = f"{metric} {'≥' if rising else '≤'} {bound:g}"
    if value is None:
        return Verdict(gate, False, f"{metric} is undefined on {report.rows} test rows")
    known = f" {_span(report.intervals.get(metric))}".rstrip()
    return Verdict(gate, value >= bound if rising else value <= bound, f"{metric} is {value:.4f}{known}")


def _gap(metric: str, bound: float, report: Report, part: EvaluationSlice, least: int) -> Verdict:
    gate = f"{metric} of {part.name} within {bound:g} of the whole"
    whole, value = report.metrics[metric], part.metrics[metric]
    if part.rows < least:
        return Verdict(gate, True, f"{part.rows} rows, fewer than {least}", judged=False)
    if whole is None or value is None:
        return Verdict(gate, True, f"{metric} is undefined there", judged=False)
    gap = whole - value if metric in RISING else value - whole
    span = part.gaps.get(metric)
    reason = f"{value:.4f} against {whole:.4f} overall, {part.rows} rows"
    if span is not None:
        reason += f", worse by {gap:.4f} {_span(span)}"
        if gap > bound >= span[0]:
            reason += ", which chance may explain"
    return Verdict(gate, (gap if span is None else min(gap, span[0])) <= bound, reason)


def fairness_records(gates: Gates, report: Report) -> list[FairnessRecord]:
    """For each protected column, rates by group, and each measure's greatest difference.

    A difference is over the groups that have enough rows, and None if fewer than two have.
    """
    result: list[FairnessRecord] = []
    for column in gates.protected:
        groups = [each for each in report.slices if [name for name, _ in each.by] == [column]]
        judged = [each for each in groups if each.rows >= gates.min_slice_rows]
        result.append(
            {
                "column": column,
                "groups": [_group_rates(each, each in judged) for each in groups],
                "differences": {
                    name: _greatest([_spread(rate, judged) for rate in rates]) for name, rates in RATES.items()
                },
            }
        )
    return result


def _group_rates(group: EvaluationSlice, judged: bool) -> GroupRates:
    found = {"value": group.by[0][1], "rows": group.rows, "judged": judged, **group.rates}
    return cast(GroupRates, found)


def _spread(rate: str, groups: Iterable[EvaluationSlice]) -> float | None:
    known = [value for each in groups if (value := each.rates.get(rate)) is not None]
    return max(known) - min(known) if len(known) > 1 else None


def _greatest(values: list[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return max(known) if known else None


def _difference(name: str, bound: float, found: FairnessRecord) -> Verdict:
    gate = f"{name} difference over {found['column']} ≤ {bound:g}"
    value = found["differences"][name]
    if value is None:
        return Verdict(gate, True, "fewer than two groups have enough rows", judged=False)
    rate = RATES[name][0]
    known = [each for each in found["groups"] if each["judged"] and each[rate] is not None]
    shown = ", ".join(f"{'null' if each['value'] is None else each['value']} {each[rate]:.4f}" for each in known[:6])
    return Verdict(gate, value <= bound, f"{value:.4f}; {rate.replace('_', ' ')} of {shown}")


def _challenge(metric: str, margin: float, report: Report, rival: Rival) -> Verdict:
    gate = f"{metric} {BEATS} by {margin:g}"
    if rival.version is None:
        return Verdict(gate, True, rival.reason, judged=False)
    if rival.report is None:
        return _not_judged(gate, rival, rival.reason)
    ours, theirs = report.metrics[metric], rival.report.metrics[metric]
    if ours is None or theirs is None:
        return _not_judged(gate, rival, f"{metric} is undefined on these rows")
    if report.rows < LEAST_ROWS:
        return _not_judged(gate, rival, f"{report.rows} test rows, fewer than the {LEAST_ROWS} that rule out chance")
    sign = 1 if metric in RISING else -1
    better = sign * (ours - theirs)
    reason = f"{ours:.4f} against {theirs:.4f} of version {rival.version}, better by {better:+.4f}"
    least = better
    if report.replicates is not None and rival.report.replicates is not None:
        paired = sign * (report.replicates.values[metric] - rival.report.replicates.values[metric])
        if (span := percentile_interval(paired)) is not None:
            reason, least = f"{reason} {_span(span)}", min(better, span[0])
    if rival.caveats:
        reason += f"; {rival.caveats}"
    return Verdict(gate, least >= margin, reason)


def _not_judged(gate: str, rival: Rival, reason: str) -> Verdict:
    return Verdict(gate, False, f"not judged, so version {rival.version} stays champion: {reason}", judged=False)


def paired_differences(report: Report, other: Report) -> dict[str, tuple[float, tuple[float, float] | None]]:
    """Each metric's difference to `other`'s on the same rows, with a 95 % interval from the paired replicates."""
    result = {}
    for name, value in report.metrics.items():
        theirs = other.metrics.get(name)
        if value is None or theirs is None:
            continue
        span = None
        if (
            report.replicates is not None
            and other.replicates is not None
            and name in report.replicates.values
            and name in other.replicates.values
        ):
            span = percentile_interval(report.replicates.values[name] - other.replicates.values[name])
        result[name] = (value - theirs, span)
    return result


def _span(span: tuple[float, float] | None) -> str:
    return "" if span is None else f"(95 %: {span[0]:.4f} … {span[1]:.4f})"
