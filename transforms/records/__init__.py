"""What Beam elements are made of, and the tools that every package needs to work on them.

A row never travels alone: it is part of a `pa.RecordBatch`. `to_ipc` and `from_ipc` turn a batch into bytes and back,
`frame` and `batch` turn it into a Polars frame and back. `row_ids` gives each row a 64-bit id that is the same on every
machine. Sums over rows are exact integers (`exact_sums`), so the order in which Beam merges them does not matter. Rows
that are too large for memory are written to local disk in partitions by the hash of their key.
"""

from typing import TYPE_CHECKING

from transforms.public_names import import_when_used

if TYPE_CHECKING:
    from transforms.records.arrays import Bools, Floats, Ints, UInt64s
    from transforms.records.columns import moments_of, select, whole_numbers, with_columns, with_series
    from transforms.records.disk_partitions import DiskPartitions, partition_of, positions_by_partition
    from transforms.records.exact_sums import (
        UNIT,
        Bins,
        Moments,
        as_fraction,
        deviation,
        exact_squares,
        exact_sum,
        group_sums,
        integer_sums,
    )
    from transforms.records.frame_packets import Frames, Head, head_of, pack, unpack
    from transforms.records.garbage_collection import freeze_imports
    from transforms.records.pickled_once import PickledOnce
    from transforms.records.prefetch import PrefetchDoFn
    from transforms.records.record_batches import batch, frame, from_ipc, to_ipc
    from transforms.records.row_hashing import (
        combine_hashes,
        hash_column,
        hash_columns,
        hash_text,
        key_hashes,
        keys_hashes,
        mix_bits,
        prediction_ids,
        row_ids,
    )
    from transforms.records.times import (
        ALWAYS,
        EPOCH,
        FOREVER,
        MICROSECOND,
        as_date,
        as_number,
        day_number,
        day_of,
        days_in,
        days_within,
        midnight,
        now_us,
    )
    from transforms.records.value_text import format_value
    from transforms.records.window_sums import (
        Digits,
        ExactSum,
        Numbers,
        decompose,
        squared,
        window_sum,
        window_variance,
    )

import_when_used(__name__)
