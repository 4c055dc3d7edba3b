"""The kernel, which computes features, and the batch engine around it.

A spine row is read with the other rows of its time block (`Block`). The block's events are those that a window of one
of its spine rows can reach. The kernel (`compute`) sorts the events, finds each window by binary search, and computes
all features of the block at once. `TrailingFeatures` is the PTransform that does this for every block of a
`FeaturePlan`. Before it, `examine` and `find_stale` decide which days to compute, and `plan_blocks` divides them into
blocks.
"""

from typing import TYPE_CHECKING

from transforms.public_names import import_when_used

if TYPE_CHECKING:
    from transforms.features.block_inputs import concat_reads, contradictions, dimension_rows, distinct_by_key
    from transforms.features.column_reuse import Copies, reading_features
    from transforms.features.history_snapshots import HistorySnapshots
    from transforms.features.kernel import (
        KernelTables,
        compute,
        computing,
        feature_columns,
        kernel_pool,
        lookup_columns,
        with_derived,
    )
    from transforms.features.lifetime_snapshots import Chain, SnapshotSegment
    from transforms.features.lifetime_summaries import Summary, merge_summaries, summarise
    from transforms.features.long_windows import LONG, firsts_and_lasts
    from transforms.features.manifest import MANIFEST_VERSION, Manifest
    from transforms.features.manifest_store import WriteManifest, read_manifest, warn_of_outdated
    from transforms.features.packed_events import SMALL, DistinctKeys, IndexedRows, Keys, PackedEvents
    from transforms.features.plan import (
        BLOCK_ROWS,
        BROADCAST_BYTES,
        MOST_BLOCKS,
        MOST_SHARDS,
        Block,
        FeaturePlan,
        amplification,
        events_reached,
    )
    from transforms.features.preparation import FeaturesRequest, PreparedRun, computed_together, prepare_features
    from transforms.features.shared_blocks import SharedFeatures, ViewPart
    from transforms.features.source_digests import DIGESTED, REPEATS
    from transforms.features.trailing_features import TrailingFeatures
    from transforms.features.window_bounds import is_sorted

import_when_used(__name__)
