"""The plain recomputation behind `--verify` and `millrace verify`.

A few published rows are computed again from all rows of the sources, directly by the definition.  The package imports
nothing that the kernel uses.  `choose_rows` samples spine rows, `recompute` filters the events of each and computes its
features one at a time, and `verify_written` compares every bit with the file that is about to be published.
"""

from typing import TYPE_CHECKING

from transforms.public_names import import_when_used

if TYPE_CHECKING:
    from transforms.verification.check import (
        VERIFIED_ROWS,
        VERIFIED_SHARE,
        VERIFIED_SHARE_OF_EVERYTHING,
        SampleSize,
        Verification,
        Verified,
        verify_rows,
        verify_written,
    )
    from transforms.verification.plain_sources import SourceFrames
    from transforms.verification.sample import choose_files, choose_rows, every_row

import_when_used(__name__)
