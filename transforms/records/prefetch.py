"""A DoFn that works on its next elements while Beam hands on what the last one gave."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

import apache_beam as beam
from apache_beam import pvalue
from apache_beam.transforms.window import GlobalWindows

from transforms.records.garbage_collection import freeze_imports

Read = TypeVar("Read")


class PrefetchDoFn(beam.DoFn):
    """A bundle's elements are read in one thread and worked on in another, each in turn; meanwhile the fused steps that follow
    take what came before, so that no core is idle while files are read or written.

    At once there are one element's outputs that are handed on, the next one's, and what was read of the `readers` after it.
    Outputs are in the global window.
    """

    readers = 1

    def setup(self) -> None:
        freeze_imports()
        self.reader, self.worker = ThreadPoolExecutor(self.readers, "read"), ThreadPoolExecutor(1, "work")

    def start_bundle(self) -> None:
        self.pending: deque[Future[list[Any]]] = deque()

    def ahead(self, read: Callable[[], Read], work: Callable[[Read], Iterable[Any]]) -> Iterator[Any]:
        """Begin an element, whose outputs are `work(read())`; give those of an element before it, if its turn has come."""
        found = self.reader.submit(read)
        self.pending.append(self.worker.submit(lambda: list(work(found.result()))))
        if len(self.pending) > self.readers + 1:
            yield from self.pending.popleft().result()

    def rest(self) -> Iterator[Any]:
        """Outputs of all that was begun."""
        while self.pending:
            yield from self.pending.popleft().result()

    def finish_bundle(self) -> Iterator[Any]:
        for each in self.rest():
            if isinstance(each, pvalue.TaggedOutput):
                yield pvalue.TaggedOutput(each.tag, GlobalWindows.windowed_value(each.value))
            else:
                yield GlobalWindows.windowed_value(each)

    def teardown(self) -> None:
        for each in (self.reader, self.worker):
            each.shutdown(cancel_futures=True)
