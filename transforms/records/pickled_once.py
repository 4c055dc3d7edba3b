"""Objects that are pickled once, compressed, however often Beam pickles the steps that hold them.

Beam pickles a step's function several times while it builds and runs a graph, and compresses it with bz2 each time.
This costs little for a function, but seconds for the names of 100,000 files.
"""

from __future__ import annotations

import dataclasses
import functools
import pickle
import zlib
from collections.abc import Callable
from typing import Any, TypeVar

Made = TypeVar("Made")


class PickledOnce:
    """Base of a frozen dataclass, or of an immutable sequence that defines `pickled_state` and `from_state`."""

    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        return _restored, (type(self), self._pickled)

    def pickled_state(self) -> object:
        """The state from which `from_state` makes an equal object."""
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}  # type: ignore[arg-type]

    @classmethod
    def from_state(cls: type[Made], state: Any) -> Made:
        return cls(**state)

    @functools.cached_property
    def _pickled(self) -> bytes:
        return zlib.compress(pickle.dumps(self.pickled_state(), pickle.HIGHEST_PROTOCOL), 1)


def _restored(kind: type[PickledOnce], pickled: bytes) -> PickledOnce:
    return kind.from_state(pickle.loads(zlib.decompress(pickled)))
