"""Wake-up timers: a keyed step sets one timer, and its state records when that timer fires.

A step sets a timer when it has work left and no further input may arrive.  Setting a timer costs a round trip through
the runner, so a timer that fires early enough is left unchanged.  A recorded time that has long passed belongs to a
timer that a runner has lost, and does not count.

Each DoFn makes its own `TimerSpec`, since Beam attaches one callback to each:

    WAKE = wake_timer()
    ...
    if set_wake_up(state, wake, at):  # in `process`
        write_head(head, state)
    ...
    clear_wake_up(state)  # in the callback of the timer
"""

from __future__ import annotations

from typing import Protocol

from apache_beam.transforms.timeutil import TimeDomain
from apache_beam.transforms.userstate import TimerSpec

from transforms.records.frame_packets import Head
from transforms.records.times import now_us

# The entry of a step's state that holds the time (µs) of its timer; 0 or none: no timer is set.
_WAKE = "wake"
# A timer that has not fired this long (µs) after its time is taken to be lost.
OVERDUE = 5_000_000


class Timer(Protocol):
    """The timer of a key, as Beam hands it to a step."""

    def set(self, timestamp: float, /) -> None: ...


def wake_timer() -> TimerSpec:
    """Returns a new timer on the worker's clock."""
    return TimerSpec("wake", TimeDomain.REAL_TIME)


def unset_timer() -> TimerSpec:
    """Returns a new timer that a step declares and never sets.

    Prism 2.77 uses a full core while it runs a step that has neither an output nor a timer, because it keeps polling
    for outputs.  A declared timer gives it something to wait for.
    """
    return TimerSpec("never", TimeDomain.WATERMARK)


def set_wake_up(state: Head, timer: Timer, at: int) -> bool:
    """Sets the timer to `at` (µs since 1970), unless it is set to an earlier time already.

    Returns:
        Whether the timer was set.  If so, `state` has changed and must be written.
    """
    if now_us() - OVERDUE < state.get(_WAKE, 0) <= at:
        return False
    state[_WAKE] = at
    timer.set(at / 1e6)
    return True


def clear_wake_up(state: Head) -> None:
    """Records in `state` that the timer has fired."""
    state[_WAKE] = 0
