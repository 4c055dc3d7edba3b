"""The options of the publish check, for commands that need neither TFDV's protos nor Beam."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class PublishRules:
    """The checks that the user requests.  `schema` is the path of a `schema.pbtxt`; `required` is whether the file must
    exist.
    """

    schema: str
    required: bool = False
    allow_anomalies: bool = False
    max_dead_fraction: float = 1.0
