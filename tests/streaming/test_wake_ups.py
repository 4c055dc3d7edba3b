"""The wake-up timer of a live step: set once, moved only to an earlier time, and set anew when a runner has lost it."""

from __future__ import annotations

import pytest

from transforms.records.frame_packets import Head
from transforms.streaming import wake_ups
from transforms.streaming.wake_ups import OVERDUE, clear_wake_up, set_wake_up

NOW = 1_700_000_000_000_000


class Timer:
    def __init__(self) -> None:
        self.times: list[float] = []

    def set(self, timestamp: float) -> None:
        self.times.append(timestamp)


@pytest.fixture(autouse=True)
def clock(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wake_ups, "now_us", lambda: NOW)


def test_a_timer_is_moved_only_to_an_earlier_time() -> None:
    state: Head = {"version": 3}
    timer = Timer()
    assert set_wake_up(state, timer, NOW + 2_000_000)
    assert not set_wake_up(state, timer, NOW + 2_000_000)
    assert not set_wake_up(state, timer, NOW + 3_000_000)
    assert set_wake_up(state, timer, NOW + 1_000_000)
    assert timer.times == [NOW / 1e6 + 2, NOW / 1e6 + 1]
    assert state == {"version": 3, "wake": NOW + 1_000_000}  # the key that stored states have


def test_a_timer_that_has_fired_is_set_anew() -> None:
    state: Head = {}
    timer = Timer()
    set_wake_up(state, timer, NOW)
    clear_wake_up(state)
    assert set_wake_up(state, timer, NOW + 1)
    assert len(timer.times) == 2


@pytest.mark.parametrize(("age", "lost"), [(OVERDUE - 1, False), (OVERDUE, True)])
def test_a_timer_that_has_not_fired_long_after_its_time_is_set_anew(age: int, lost: bool) -> None:
    state: Head = {"wake": NOW - age}
    assert set_wake_up(state, Timer(), NOW) == lost
