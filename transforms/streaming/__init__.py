"""The live engine: the same features, computed as messages arrive.

A message is decoded and its rows are put into a micro-batch with their offsets.  The journal receives all
micro-batches, orders them, drops repeats, moves the completeness watermark, and releases spine rows whose sources are
complete.  A shard holds the events of its keys and computes the features of a released spine row with the kernel of
the batch engine.  `LiveFeatures` is the PTransform that contains all of this.  The rows from before a job's start are
accepted from files as its history.  Feature rows go to a topic at once and to the live tables at each commit; after a
stop, `find_recovery_point` reads from these tables where to continue.
"""

from typing import TYPE_CHECKING

from transforms.public_names import import_when_used

if TYPE_CHECKING:
    from transforms.streaming.accepted_rows import accepted_file
    from transforms.streaming.beginnings import HISTORY_PARTITION
    from transforms.streaming.crash_guard import CrashGuard, guard_folder
    from transforms.streaming.fates import FATE_COLUMNS, RepeatMemory, known_columns, known_order, repeated_from
    from transforms.streaming.groups import shard_groups
    from transforms.streaming.history import Handover
    from transforms.streaming.kafka import (
        MESSAGE_ROWS,
        Broker,
        Produce,
        ReadTopics,
        begin_offsets,
        dead_letter_messages,
        ensure_topics,
        send_end,
        set_group_offsets,
        topic_of,
    )
    from transforms.streaming.kafka_admin import FirstAvailable, check_reachable, partitions_of, unread_offsets
    from transforms.streaming.kafka_properties import read_properties, secrets_of
    from transforms.streaming.live_dimensions import kept_version, rewrite_versions
    from transforms.streaming.live_features import DecodeBundles, DecodeChunks, LiveFeatures, to_journal
    from transforms.streaming.live_job import LiveJob
    from transforms.streaming.live_settings import LiveSettings
    from transforms.streaming.live_tables import (
        BeyondOffsets,
        TableWriter,
        UnknownIds,
        application_of,
        is_of_live_job,
        last_commit_record,
        of_version,
        read_dead_letters,
        read_feature_rows,
        source_record,
    )
    from transforms.streaming.message_limits import DEFAULT_LIMITS, MessageLimits, read_arrow
    from transforms.streaming.messages import (
        ANY_ERROR,
        EXPANDED_BYTES,
        HEARTBEAT,
        ORIGIN_TYPES,
        Decoded,
        Message,
        by_partition,
        expanded_size,
        heartbeat,
        out_of_calendar,
        to_arrow,
    )
    from transforms.streaming.micro_batches import (
        SKIPPED,
        MicroBatch,
        admissible,
        envelopes_of,
        micro_batch_envelope,
        micro_batches_of,
        no_topic,
    )
    from transforms.streaming.mirrored_state import (
        BAG_SPEC,
        HEAD_SPEC,
        SINGLE_KEY,
        BagState,
        KeyedBytes,
        Mirror,
        StateParam,
        ValueState,
        read_head,
        replace_bag,
        write_head,
    )
    from transforms.streaming.pending_spine_rows import about_spine_rows
    from transforms.streaming.preparation import (
        LiveFeaturesJob,
        LiveFeaturesPlan,
        live_features_figures,
        prepare_live_features,
    )
    from transforms.streaming.progress import CommitRecord, version_name
    from transforms.streaming.replay import Replay, SendChunks
    from transforms.streaming.row_origin import ORIGIN_COLUMNS, RID, cut_of, row_identity
    from transforms.streaming.step_messages import start_envelope
    from transforms.streaming.store_owner import RecordedDefinition, has_read, read_note
    from transforms.streaming.wake_ups import Timer, clear_wake_up, set_wake_up, wake_timer

import_when_used(__name__)
