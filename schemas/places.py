"""Where in a user's files something was built, for messages."""

from __future__ import annotations

import os
import sys

_FOLDER = os.path.dirname(os.path.abspath(__file__)) + os.sep


def built_at() -> str:
    """The file and line outside `schemas` that is being run now, as `shop/views.py, line 12`.

    Dataclasses call `__post_init__` from code that has no file, which is passed over too.
    """
    frame = sys._getframe(1)
    while frame.f_back is not None and (
        frame.f_code.co_filename.startswith(_FOLDER) or not frame.f_code.co_filename.endswith(".py")
    ):
        frame = frame.f_back
    path = os.path.relpath(frame.f_code.co_filename)
    return f"{frame.f_code.co_filename if path.startswith('..') else path}, line {frame.f_lineno}"
