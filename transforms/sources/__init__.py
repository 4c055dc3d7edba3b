"""The tables that users provide: their contracts, their files, reading them, and an account of every row.

`take_inventory` lists the files of a view's sources, refuses files that are neither read nor skipped, and reads the
Parquet footers.  `require_unchanged` checks at the end that the files are still those that were listed.  `read_slices`
reads the row groups and columns that are needed, checks each row against the contract of its source, and returns three
things: the good rows, the bad ones as dead letters, and a `SourceTally` that counts each row in exactly one place.
`Digests` of the rows of each day show which days have changed since an earlier run.
"""

from typing import TYPE_CHECKING

from transforms.public_names import import_when_used

if TYPE_CHECKING:
    from transforms.sources.contracts import (
        IN_YEARS,
        READ_ERRORS,
        Contract,
        all_in_years,
        check_rows,
        not_whole,
        outside_years,
    )
    from transforms.sources.conversions import (
        PROBLEM,
        Reading,
        Twice,
        converted,
        problem_free,
        type_holds,
        with_problems,
        without_problems,
    )
    from transforms.sources.data_files import DataFile, ParquetData, open_file, open_parquet, stamp_of
    from transforms.sources.day_digests import Digests, add_digests
    from transforms.sources.dead_letters import (
        DEAD_LETTERS,
        LIVE_DEAD_LETTERS,
        MESSAGE_DEAD_LETTERS,
        SOURCE_DEAD_LETTERS,
        UNDATED,
        VIEW_DEAD_LETTERS,
        as_message_dead_letters,
        concat_dead_letters,
        dated_dead_letters,
        dead_letters_batch,
        message_dead_letters,
    )
    from transforms.sources.formats import SUFFIXES, format_of, is_text, without_suffix
    from transforms.sources.inventory import (
        HAS_FILES,
        Inventory,
        source_files,
        spine_contract,
        survey_files,
        survey_source,
        take_inventory,
        version_of,
    )
    from transforms.sources.listing import Listing, is_hidden, require_unchanged
    from transforms.sources.reader import (
        READ_CHUNK_ROWS,
        ReadOptions,
        RepeatedKeys,
        SourceRows,
        UncheckedRows,
        locate_rows,
        read_raw,
        read_slices,
        repeats_of,
        stream_slices,
        without_repeats,
    )
    from transforms.sources.repeats import NEVER_REPEATED, KnownOrder
    from transforms.sources.slices import Slice, Slices
    from transforms.sources.tallies import (
        AS_EVENTS,
        SourceTally,
        add_tallies,
        digests_read,
        require_conserved,
        rows_loaded,
    )
    from transforms.sources.text_rewriting import rewrite_text

import_when_used(__name__)
