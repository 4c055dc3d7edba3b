"""Warnings of categories that only the test split has, and that encoders treat as unknown."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Collection
from typing import TYPE_CHECKING

from transforms.training.data_checks import Findings

if TYPE_CHECKING:
    from tensorflow_metadata.proto.v0.statistics_pb2 import DatasetFeatureStatisticsList

log = logging.getLogger("millrace.training")

# Values that a warning names.
NAMED = 5


def warn_of_unseen(
    findings: Findings,
    learnt: DatasetFeatureStatisticsList,
    tested: DatasetFeatureStatisticsList,
    inputs: Collection[str],
) -> Findings:
    """Add a warning for each string among `inputs` that has values in the test split only.

    An input is skipped if its statistics do not list all of its training values.

    Args:
        findings: the findings so far.
        learnt, tested: TFDV statistics of the training and of the test split.
        inputs: the model's inputs.
    """
    before = {feature.path.step[0]: feature.string_stats for feature in learnt.datasets[0].features}
    warnings = []
    for feature in tested.datasets[0].features:
        name = feature.path.step[0]
        known = {bucket.label for bucket in before[name].rank_histogram.buckets} if name in before else set()
        if name not in inputs or not known or len(known) < before[name].unique:
            continue
        ranks = feature.string_stats.rank_histogram.buckets
        new = {bucket.label: int(bucket.sample_count) for bucket in ranks if bucket.label not in known}
        if new:
            shown = ", ".join(f"{value!r} ({rows} rows)" for value, rows in list(new.items())[:NAMED])
            more = f" and {len(new) - NAMED} more" if len(new) > NAMED else ""
            warnings.append(
                f"Input {name!r} has values in the test split that the training split never had, "
                f"which are encoded as unknown: {shown}{more}"
            )
    for each in warnings:
        log.warning(each)
    return dataclasses.replace(findings, warnings=(*findings.warnings, *warnings))
