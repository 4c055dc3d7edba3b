"""Checks of a table before it is published: statistics, the reviewed schema, and the share of dead letters.

Every batch of rows goes through `describe_batch`, which keeps a mergeable sketch per column.  `Statistics` merges the
sketches and writes a TensorFlow Metadata proto.  `Validate` compares it with the reviewed `schema.pbtxt` by means of
TFDV, and refuses the commit if there are anomalies or if too many rows were rejected.
"""

from typing import TYPE_CHECKING

from transforms.public_names import import_when_used

if TYPE_CHECKING:
    from transforms.validation.publish_check import (
        AlsoChecked,
        CheckedRun,
        PublishCheck,
        Validate,
        committed_statistics,
        make_check,
        read_account,
        read_schema,
        read_statistics,
        statistics_path,
    )
    from transforms.validation.publish_rules import PublishRules
    from transforms.validation.statistics import (
        Statistics,
        columns_described,
        describe_batch,
        describe_nothing,
        statistics_proto,
        view_columns,
    )
    from transforms.validation.tfdv_schema import (
        Anomaly,
        find_anomalies,
        infer_schema,
        measure_drift,
        parse_schema,
        parse_statistics,
        schema_text,
        update_schema,
    )

import_when_used(__name__)
