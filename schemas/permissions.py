"""Who may read the files that commands write: rows, messages, models."""

from __future__ import annotations

import os
import re

from schemas.errors import DefinitionError

UMASK_VARIABLE = "MILLRACE_UMASK"


def umask() -> int | None:
    """The umask of commands: 077, or that of `MILLRACE_UMASK`; None (`inherit`) keeps the umask of the process.

    Raises:
        DefinitionError: the variable is not a umask.
    """
    text = os.environ.get(UMASK_VARIABLE, "077")
    if text == "inherit":
        return None
    if not re.fullmatch(r"0?[0-7]{3}", text):
        raise DefinitionError(f"{UMASK_VARIABLE} is three octal digits or `inherit`", repr(text), "077 is the default")
    return int(text, 8)
