"""What a user asked of the publish check.  Commands that run nothing need this alone, without TFDV's protos and Beam."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class PublishRules:
    """What the user asked for.  `schema` is the path of a `schema.pbtxt`; `required` whether it must be there."""

    schema: str
    required: bool = False
    allow_anomalies: bool = False
    max_dead_fraction: float = 1.0
