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
)
from transforms.verification.plain_features import recompute
from transforms.verification.plain_sources import Files, Frames, spine_rows

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
    "recompute",
    "spine_rows",
    "verify_rows",
]
