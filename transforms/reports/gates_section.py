"""The gates of a training run: those that failed first, and apart those that could not be judged."""

from __future__ import annotations

import dataclasses

from transforms.models.stored_records import GateRecord, TrainingRecord

# Gates shown at once, unless more of them failed.
SHOWN = 8


@dataclasses.dataclass(frozen=True)
class Gate:
    """One gate's verdict: `pass`, `fail` or `none`."""

    name: str
    verdict: str
    reason: str


@dataclasses.dataclass(frozen=True)
class GatesSection:
    """What is shown at once, what holds besides, and what was not judged."""

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
