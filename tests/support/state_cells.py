"""Helpers and fixtures for: the journal's step by hand: what it says when a job starts again from its tables."""

from __future__ import annotations

from typing import Any


class Cell:
    """State of a key."""

    def __init__(self) -> None:
        self.held: Any = None
        self.many: list[Any] = []

    def read(self) -> Any:
        return self.held if self.held is not None else self.many

    def write(self, value: Any) -> None:
        self.held = value

    def add(self, value: Any) -> None:
        self.many.append(value)

    def clear(self) -> None:
        self.many = []

    def set(self, _: float) -> None:
        """As a timer."""
