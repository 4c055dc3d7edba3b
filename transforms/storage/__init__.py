"""Everything that a store holds: Delta tables and their log, TFRecord files, paths, run markers, vacuum.

Workers write the rows of a batch to data files (`WriteFiles`), which no reader sees.  One last step adds all files of
the run to the table's log in one commit (`CommitFiles`); from then on `data_files` lists them and `read_file` reads
them. `paths` knows where each table of a store is.  Vacuum deletes files that no commit and no kept version names.
"""

from typing import TYPE_CHECKING

from transforms.public_names import import_when_used

if TYPE_CHECKING:
    from transforms.storage.bounded import NoResponse, first_contact
    from transforms.storage.compaction import MOST_FILES, Compaction, compact_table
    from transforms.storage.date_spans import TABLE_READ_ERRORS, partition_days
    from transforms.storage.delta_log import (
        CommitInfo,
        commit_at,
        commits,
        file_actions,
        logged_versions,
        metadata_of,
        path_within,
        root_of,
    )
    from transforms.storage.delta_tables import (
        COMMIT_ATTEMPTS,
        CommitTarget,
        Committed,
        CommittedMeanwhile,
        DataFile,
        TableRow,
        WrittenFiles,
        add_actions,
        append_commit,
        commit,
        commit_attempt,
        data_files,
        dates_of,
        days_between,
        delta_schema,
        file_groups,
        file_pool,
        newest_version,
        open_table,
        paths_of,
        read_file,
        read_group,
        retry_commits,
        schema_with_columns,
        table_root,
        write_file_atomically,
        write_files,
    )
    from transforms.storage.durable import rename_files, sync_file, sync_folder, sync_folders, write_file
    from transforms.storage.feature_tables import lost_commit, open_feature_table
    from transforms.storage.file_systems import FileSystems, open_regular, require_regular
    from transforms.storage.joined_features import (
        JoinCounts,
        ReadJoined,
        TableFiles,
        add_counts,
        joined_groups,
        read_joined,
    )
    from transforms.storage.log_entries import LogEntry, RemovedFile, append_entry, sync_log, write_checkpoint
    from transforms.storage.paths import (
        BOOSTER,
        ENCODERS,
        MANIFEST,
        dead_letters_uri,
        features_live_uri,
        features_uri,
        folders,
        live_dead_letters_uri,
        predictions_uri,
        present_path,
        source_uri,
        sources_root,
        table_path_in_store,
        tables_below,
    )
    from transforms.storage.rewriting import Matches, Revise, matching_rows, purge, rewrite_delta, write_without
    from transforms.storage.run_markers import (
        ERASE,
        MARKER,
        RunMarker,
        begin_run,
        remove_marker,
        require_no_erasure,
        running_runs,
        write_marker,
    )
    from transforms.storage.stored_json import (
        DAMAGE,
        explain_damage,
        parse_object,
        parse_record,
        read_object,
        read_regular,
        reason_of,
    )
    from transforms.storage.table_transforms import CommitFiles, ReadTable, WriteFiles, WriteTable
    from transforms.storage.tfrecord_codec import gzipped
    from transforms.storage.tfrecord_io import (
        ReadExamples,
        TFRecordFile,
        WriteTFRecordFiles,
        matching_files,
        publish_tfrecord_files,
    )
    from transforms.storage.vacuum import (
        TEMPORARY_FILE,
        VacuumRules,
        Waste,
        at_work,
        files_below,
        pins_of,
        remove_waste,
        tables_of,
        waste_of,
        waste_of_runs,
    )

import_when_used(__name__)
