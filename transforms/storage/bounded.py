"""A bound on how long a first contact over the network may take.

Libraries of object stores, databases and MLflow try again for minutes, each in its own way, where nobody answers.  A
command asks once, in a thread that may be left behind, before it relies on them.
"""

from __future__ import annotations

import threading
from collections.abc import Callable

# Seconds that the first contact may take.
FIRST_CONTACT = 20.0


class NoResponse(Exception):
    """Whoever was asked has not answered in time."""


def first_contact(ask: Callable[[], object]) -> None:
    """Calls `ask`, which raises what it likes.

    Raises:
        NoResponse: it has not returned after `FIRST_CONTACT` seconds.
        Exception: what `ask` raises.
    """
    errors: list[BaseException] = []

    def run() -> None:
        try:
            ask()
        except BaseException as error:
            errors.append(error)

    # A daemon, so that it does not keep the process from ending.
    thread = threading.Thread(target=run, name="first-contact", daemon=True)
    thread.start()
    thread.join(FIRST_CONTACT)
    if thread.is_alive():
        raise NoResponse(f"no response within {FIRST_CONTACT:g} s")
    if errors:
        raise errors[0]
