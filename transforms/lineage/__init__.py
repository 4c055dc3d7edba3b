"""Where a row comes from, and whether live and batch agree.

`find_rows` and `find_prediction` find a row in a store; `origin_of` follows it back to the sources, commits and models
that it was made from.  `check_parity` computes every live feature row again from exactly the events that it could
see, and compares it with the batch table too; `rescore` does the same for predictions.  Each difference gets its cause.
`Erasure` removes rows of a source, and everything that was made from them.
"""

from typing import TYPE_CHECKING

from transforms.public_names import import_when_used

if TYPE_CHECKING:
    from transforms.lineage.counted_rows import UNEXPLAINED, BatchSide
    from transforms.lineage.difference_causes import FullComparison, compare_with_full
    from transforms.lineage.erasure import Condition, Erasure
    from transforms.lineage.erasure_records import Erased, ErasureRecord, erased_row, erasure_of, erasures, now_text
    from transforms.lineage.feature_parity import Parity, check_parity, unaccounted_after_erasures
    from transforms.lineage.live_trace import DimensionUsed, LiveVisibleSource, dimensions_used, visible_to
    from transforms.lineage.live_verification import verify_live
    from transforms.lineage.prediction_parity import Rescored, rescore
    from transforms.lineage.trace import (
        Origin,
        VisibleSource,
        commit_of,
        describe_tables,
        find_prediction,
        find_rows,
        origin_of,
        parse_key,
        view_table,
    )

import_when_used(__name__)
