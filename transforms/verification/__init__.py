"""The plain recomputation behind `--verify` and `millrace verify`: a few published rows, computed again from all rows of the
sources as the definition says, without anything that the kernel is made of."""

from transforms.verification.check import (
    ROWS,
    SHARE,
    SHARE_OF_EVERYTHING,
    Amount,
    Difference,
    Verification,
    Verified,
    verify_rows,
    verify_written,
)
from transforms.verification.plain_features import recompute
from transforms.verification.plain_sources import Files, Frames, spine_rows
from transforms.verification.sample import choose, choose_files, every_row

__all__ = [
    "ROWS",
    "SHARE",
    "SHARE_OF_EVERYTHING",
    "Amount",
    "Difference",
    "Files",
    "Frames",
    "Verification",
    "Verified",
    "choose",
    "choose_files",
    "every_row",
    "recompute",
    "spine_rows",
    "verify_rows",
    "verify_written",
]
