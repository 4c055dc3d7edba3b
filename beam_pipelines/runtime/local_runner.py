"""Batch pipelines, and the runner of those that name none."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

import apache_beam as beam
from apache_beam.options.pipeline_options import PipelineOptions, StandardOptions
from apache_beam.portability.api import beam_provision_api_pb2
from apache_beam.runners.portability.fn_api_runner import FnApiRunner
from apache_beam.runners.portability.fn_api_runner.fn_runner import ExtendedProvisionInfo
from apache_beam.runners.portability.portable_runner import JobServiceHandle

from beam_pipelines.runtime.beam_workers import inspect_classes_once

OptionsType = TypeVar("OptionsType", bound=PipelineOptions)


class BatchOptions(PipelineOptions):
    """Beam's options, with cached views: Beam requests a view several times for each step, and parses the flags each
    time."""

    def view_as(self, cls: type[OptionsType]) -> OptionsType:
        views = self.__dict__.setdefault("_views", {})
        if cls not in views:
            views[cls] = super().view_as(cls)
        return views[cls]

    def __getstate__(self) -> dict[str, object]:
        return {name: value for name, value in super().__getstate__().items() if name != "_views"}


def batch_pipeline(beam_args: Sequence[str]) -> beam.Pipeline:
    """An empty pipeline with Beam's options.

    DirectRunner, the default, is replaced by the FnApiRunner in this process.  Beam's own choice would first try to
    download Prism from GitHub, so that the engine of one command would depend on the network.
    """
    inspect_classes_once()
    options = BatchOptions(list(beam_args))
    if options.view_as(StandardOptions).runner not in (None, "DirectRunner"):
        return beam.Pipeline(options=options)
    encoded = JobServiceHandle.encode_pipeline_options(options.get_all_options())
    info = ExtendedProvisionInfo(beam_provision_api_pb2.ProvisionInfo(pipeline_options=encoded))
    return beam.Pipeline(runner=FnApiRunner(provision_info=info), options=options)
