"""A DoFn that works on its next element while Beam hands on what the last one gave."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import apache_beam as beam
from apache_beam import pvalue
from apache_beam.transforms.window import GlobalWindows


class Ahead(beam.DoFn):
    """A bundle's elements are worked on one after another, in a thread; meanwhile the fused steps that follow take what came
    before, so that a core is not idle while files are written.  One element's outputs are held, in the global window.
    """

    def setup(self) -> None:
        self.thread = ThreadPoolExecutor(1, "ahead")

    def start_bundle(self) -> None:
        self.pending: Future[list[Any]] | None = None

    def ahead(self, work: Callable[[], Iterable[Any]] | None = None) -> Iterator[Any]:
        """Begin `work`, an element's outputs, if any; give those of the element before it."""
        last, self.pending = self.pending, None if work is None else self.thread.submit(lambda: list(work()))
        if last is not None:
            yield from last.result()

    def finish_bundle(self) -> Iterator[Any]:
        for each in self.ahead():
            if isinstance(each, pvalue.TaggedOutput):
                yield pvalue.TaggedOutput(each.tag, GlobalWindows.windowed_value(each.value))
            else:
                yield GlobalWindows.windowed_value(each)

    def teardown(self) -> None:
        self.thread.shutdown(cancel_futures=True)
