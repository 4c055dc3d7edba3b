"""The gates of a training run: first those that failed, and separately those that could not be evaluated."""

from __future__ import annotations

import dataclasses

from transforms.models.stored_records import GateRecord, TrainingRecord

# Number of gates that are shown at once, unless more of them failed.
SHOWN = 8


@dataclasses.dataclass(frozen=True)
class Gate:
    """One gate's verdict: `pass`, `fail` or `none`."""

    name: str
    verdict: str
    reason: str


@dataclasses.dataclass(frozen=True)
class GatesSection:
    """The gates that are shown at once, other gates that hold, and gates that were not evaluated."""

    first: tuple[Gate, ...]
    more: tuple[Gate, ...]
    idle: tuple[Gate, ...]


def gates(content: TrainingRecord) -> GatesSection:
    def gate(each: GateRecord) -> Gate:
        return Gate(each["gate"], ("pass" if each["holds"] else "fail") if each["judged"] else "none", each["reason"])

    found = [gate(each) for each in content["gates"]]
    judged = sorted((each for each in found if each.verdict != "none"), key=lambda each: each.verdict == "pass")
    enough = max(SHOWN, sum(each.verdict == "fail" for each in judged))
    idle = tuple(each for each in found if each.verdict == "none")
    return GatesSection(tuple(judged[:enough]), tuple(judged[enough:]), idle)
