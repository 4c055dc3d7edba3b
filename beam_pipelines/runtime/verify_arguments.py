"""Flags that decide how many rows a run verifies before its commit."""

from __future__ import annotations

import argparse
import dataclasses

from beam_pipelines.runtime.arguments import Arguments, fraction
from transforms.verification.check import VERIFIED_ROWS, VERIFIED_SHARE, VERIFIED_SHARE_OF_EVERYTHING, SampleSize

# The value of --verify and --rows that means every row.
ALL = -1


@dataclasses.dataclass(frozen=True)
class VerifyFlags:
    """`--verify` (None: not given) and `--verify_share` of a run."""

    rows: int | None = None
    share: float | None = None

    def amount(self, began: int, everything: bool) -> SampleSize | None:
        """How many rows a run verifies that began at `began`, µs since 1970; None: it verifies none."""
        if self.rows == 0:
            return None
        if self.rows is not None:
            return SampleSize(None if self.rows == ALL else self.rows, self.share, began)
        share = self.share if self.share is not None else VERIFIED_SHARE_OF_EVERYTHING if everything else VERIFIED_SHARE
        return SampleSize(VERIFIED_ROWS, share, began)


def add_verification(arguments: Arguments) -> None:
    """--verify and --verify_share."""
    arguments.add_argument(
        "--verify",
        type=some_or_all,
        metavar="N|all",
        help="rows to compute again by plain code, from all rows of the sources, before the commit; 0: none "
        f"(default: up to {VERIFIED_ROWS}, as time allows)",
    )
    arguments.add_argument(
        "--verify_share",
        type=fraction,
        help="share of the run's time that this may take "
        f"(default: {VERIFIED_SHARE_OF_EVERYTHING:g} of a run over everything and {VERIFIED_SHARE:g} of any other; "
        "no limit if --verify gives a number)",
    )


def some_or_all(text: str) -> int:
    """A number of rows, or `ALL`."""
    if text == "all":
        return ALL
    if not text.isdigit():
        raise argparse.ArgumentTypeError(f"{text!r} is neither a number of rows nor all")
    return int(text)
