"""A batch pipeline, and what runs it unless a runner is named."""

from __future__ import annotations

from collections.abc import Sequence

import apache_beam as beam
from apache_beam.options.pipeline_options import PipelineOptions, StandardOptions
from apache_beam.portability.api import beam_provision_api_pb2
from apache_beam.runners.portability.fn_api_runner import FnApiRunner
from apache_beam.runners.portability.fn_api_runner.fn_runner import ExtendedProvisionInfo
from apache_beam.runners.portability.portable_runner import JobServiceHandle


def batch_pipeline(beam_args: Sequence[str]) -> beam.Pipeline:
    """An empty pipeline with Beam's options.

    DirectRunner, the default, means its engine in this process.  Left to choose, Beam first tries to fetch Prism from GitHub, and
    the same command would run on one engine where the network lets it, on the other where not.
    """
    options = PipelineOptions(list(beam_args))
    if options.view_as(StandardOptions).runner not in (None, "DirectRunner"):
        return beam.Pipeline(options=options)
    encoded = JobServiceHandle.encode_pipeline_options(options.get_all_options())
    info = ExtendedProvisionInfo(beam_provision_api_pb2.ProvisionInfo(pipeline_options=encoded))
    return beam.Pipeline(runner=FnApiRunner(provision_info=info), options=options)
