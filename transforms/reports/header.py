"""The header of a training report: what became of the model and why, and the most important figures."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import NamedTuple

from transforms.models.stored_records import ModelManifest, TrainingRecord


class Outcome(NamedTuple):
    """What became of the model: `pass`, `fail` or `wait`, a short text, and the reason."""

    kind: str
    title: str
    why: str


@dataclasses.dataclass(frozen=True)
class Header:
    """The model's name and version, and the tiles.

    Args:
        moment: when it was trained.
        value, span: the metric over the test split, and its 95 % interval.
        examples: number of examples by split.
        holding, judged, idle: number of gates that hold, of all gates, and of those that could not be evaluated.
    """

    model: str
    version: str | None
    moment: datetime | None
    objective: str
    view: str
    outcome: Outcome
    metric: str
    value: float | None
    span: Sequence[float] | None
    examples: Mapping[str, int]
    rounds: int
    holding: int
    judged: int
    idle: int
    code_version: str
    run_id: str

    @property
    def stamp(self) -> str:
        return "" if self.moment is None else f"{self.moment.day} {self.moment:%b %Y, %H:%M} UTC"


def header(content: TrainingRecord, manifest: ModelManifest) -> Header:
    found, metric = content["gates"], manifest["metric"]
    now = manifest["read"]["now"] if manifest.get("read") else None
    return Header(
        model=content["model"],
        version=content.get("model_version"),
        moment=datetime.fromtimestamp(now / 1e6, UTC) if now else None,
        objective=manifest["objective"],
        view=", ".join(each["view"] for each in manifest.get("views") or ()) or manifest["view"],
        outcome=outcome(content),
        metric=metric,
        value=content["metrics"].get(metric),
        span=content["intervals"].get(metric),
        examples={name: each["entered"] for name, each in content["splits"].items()},
        rounds=content["rounds"],
        holding=sum(each["holds"] for each in found),
        judged=len(found),
        idle=sum(not each["judged"] for each in found),
        code_version=manifest.get("code_version", ""),
        run_id=manifest.get("run_id", ""),
    )


def outcome(content: TrainingRecord) -> Outcome:
    """What became of the model."""
    version, champion = content.get("model_version"), content.get("champion")
    failed = [each for each in content["gates"] if not each["holds"]]
    now = f"The champion is version {champion}." if champion else "There is no champion."
    if version is None:
        return Outcome(
            "wait",
            "Not registered",
            "The registry was not reached when this page was written. The model is kept on disk: millrace register.",
        )
    if failed:
        more = f", and {len(failed) - 1} more of {len(content['gates'])} gates" if len(failed) > 1 else ""
        why = f"Failed: {failed[0]['gate']} ({failed[0]['reason']}){more}. {now}"
        return Outcome("fail", "Registered, not champion", why)
    if content.get("kept"):
        return Outcome("wait", "Registered, not champion", f"Every gate holds, but {content['kept']}")
    if champion != version:
        return Outcome(
            "wait", "Registered, not champion", f"Every gate holds; another version was promoted since. {now}"
        )
    held = "Every gate holds" if content["gates"] else "There are no gates"
    rival = content["rival"]
    if rival["version"] is None or rival["version"] == version:
        return Outcome("pass", "Champion", f"{held}, and there was no champion to beat.")
    challenge = next((each for each in content["gates"] if "beats the champion" in each["gate"]), None)
    against = f": {challenge['reason']}" if challenge else ""
    return Outcome("pass", "Champion", f"{held}; it takes over from version {rival['version']}{against}.")
