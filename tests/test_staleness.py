"""What is stale follows from the data and the clock by which stamps are judged."""

import dataclasses
from datetime import UTC, date, datetime
from pathlib import Path

import apache_beam as beam
import shop

from beam_pipelines import features
from beam_pipelines.features import Options
from transforms.staleness import as_date


def at(options: Options, moment: datetime) -> Options:
    """The same run, launched at `moment`."""
    return dataclasses.replace(options, now=int(moment.timestamp() * 1_000_000))


def test_questions_too_far_ahead_are_answered_once_their_time_comes(tmp_path: Path) -> None:
    """Their file has not changed: a day of which some rows were set aside for their stamp does not count as known."""
    definition = shop.write(tmp_path, 600)
    options = features.parse(["--definition", str(definition), "--store", str(tmp_path), "--no-statistics"])
    first = at(options, datetime(2024, 2, 10, 9, tzinfo=UTC))
    pipeline = beam.Pipeline()
    features.build(pipeline, first, features.prepare(first))
    pipeline.run().wait_until_finish()
    assert features.prepare(first).plan is None, "nothing changed and no time has passed"
    later = features.prepare(at(options, datetime(2024, 2, 13, 9, tzinfo=UTC)))
    reasons = {as_date(day): why for day, why in later.stale.reasons.items()}
    assert reasons[date(2024, 2, 11)] == "visits changed on 2024-02-11"
    assert set(reasons) == {date(2024, 2, day) for day in (11, 12, 13, 14)}
