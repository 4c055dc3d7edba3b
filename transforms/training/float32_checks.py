"""Warnings of digits that are lost when whole numbers become float32."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterator
from typing import TYPE_CHECKING

from schemas import Model, encoders
from transforms.models.encoders import EXACT, is_whole
from transforms.training.data_checks import Findings
from transforms.training.examples import ExamplesAccount, schema_of

if TYPE_CHECKING:
    from tensorflow_metadata.proto.v0.statistics_pb2 import DatasetFeatureStatisticsList

log = logging.getLogger("millrace.training")


def lost_digits(
    findings: Findings, learnt: DatasetFeatureStatisticsList, account: ExamplesAccount, model: Model
) -> Findings:
    """Add a warning for each input, and for the label, whose neighbouring whole numbers become equal.

    Integers that no encoder scales lose nothing, since they get as many float32 columns as they need.

    Args:
        findings: the findings so far.
        learnt: TFDV statistics of the training split.
        account: counts of the examples.
        model: the declared model.
    """
    warnings = [*_inputs(learnt, model), *_label(account)]
    for each in warnings:
        log.warning(each)
    return dataclasses.replace(findings, warnings=(*findings.warnings, *warnings))


def _inputs(learnt: DatasetFeatureStatisticsList, model: Model) -> Iterator[str]:
    schema = schema_of(model)
    stats = {feature.path.step[0]: feature.num_stats for feature in learnt.datasets[0].features}
    for name in model.inputs:
        encoder, kind = model.encode.get(name), str(schema.field(name).type)
        if not isinstance(encoder, _SCALING) or not is_whole(kind) or name not in stats:
            continue
        least, greatest = stats[name].min, stats[name].max
        written, merged = f"{type(encoder).__name__}()", "float32, in which neighbours become one"
        if isinstance(encoder, encoders.Log) and greatest > EXACT:
            found = f"up to {greatest:.0f}, above 2^24"
        elif greatest - least > EXACT:
            found = f"from {least:.0f} to {greatest:.0f}, further apart than 2^24"
        else:
            continue
        yield f"Input {name!r} has whole numbers {found}, of which {written} makes {merged}. {_WITHOUT}"


_SCALING = (encoders.Standardize, encoders.MinMax, encoders.Robust, encoders.Log)
_WITHOUT = "Leave the encoder out, or write encoders.Impute(): both keep every digit, in as many columns as it takes"


def _label(account: ExamplesAccount) -> Iterator[str]:
    if account.rounded:
        yield (
            "The label is a whole number beyond 2^24 that float32, in which XGBoost learns, rounds, "
            f"in {account.rounded} examples. Take a constant off it, or divide it, in the label's value"
        )
