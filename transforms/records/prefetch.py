"""A DoFn that reads and processes its next elements while later steps consume earlier outputs."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

import apache_beam as beam
from apache_beam import pvalue
from apache_beam.transforms.window import GlobalWindows

import transforms.records.record_batch_coder  # noqa: F401  registers the coder of RecordBatches
from transforms.records.garbage_collection import freeze_imports

Read = TypeVar("Read")


class PrefetchDoFn(beam.DoFn):
    """Reads the elements of a bundle in `readers` threads and processes them, in order, in another thread.

    Meanwhile the fused steps that follow consume earlier outputs, so that no core is idle while files are read or
    written. Memory holds the outputs of the element being emitted, those of the next one, and the input of the
    `readers` elements after it. Outputs are in the global window.
    """

    readers = 1

    def setup(self) -> None:
        freeze_imports()
        self.reader, self.worker = ThreadPoolExecutor(self.readers, "read"), ThreadPoolExecutor(1, "work")

    def start_bundle(self) -> None:
        self.pending: deque[Future[list[object]]] = deque()

    def prefetch(self, read: Callable[[], Read], work: Callable[[Read], Iterable[object]]) -> Iterator[object]:
        """Starts an element whose outputs are `work(read())`.

        Yields the outputs of an earlier element if enough are pending.
        """
        found = self.reader.submit(read)
        self.pending.append(self.worker.submit(lambda: list(work(found.result()))))
        if len(self.pending) > self.readers + 1:
            yield from self.pending.popleft().result()

    def rest(self) -> Iterator[object]:
        """Yields the outputs of all pending elements."""
        while self.pending:
            yield from self.pending.popleft().result()

    def finish_bundle(self) -> Iterator[object]:
        for each in self.rest():
            if isinstance(each, pvalue.TaggedOutput):
                yield pvalue.TaggedOutput(each.tag, GlobalWindows.windowed_value(each.value))
            else:
                yield GlobalWindows.windowed_value(each)

    def teardown(self) -> None:
        for each in (self.reader, self.worker):
            each.shutdown(cancel_futures=True)
