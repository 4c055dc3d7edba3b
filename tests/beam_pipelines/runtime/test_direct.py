"""Which engine runs a batch pipeline."""

import subprocess
import sys
from pathlib import Path

import pytest
from apache_beam.options.pipeline_options import DirectOptions
from apache_beam.runners.portability.fn_api_runner import FnApiRunner
from apache_beam.runners.portability.portable_runner import PortableRunner

from beam_pipelines.runtime.local_runner import batch_pipeline

ROOT = Path(__file__).parents[3]


@pytest.mark.parametrize(
    "flags", [[], ["--runner=DirectRunner"], ["--runner", "DirectRunner", "--direct_num_workers=2"]]
)
def test_directrunner_is_the_engine_in_this_process(flags: list[str]) -> None:
    pipeline = batch_pipeline(flags)
    assert isinstance(pipeline.runner, FnApiRunner)
    assert pipeline.options.view_as(DirectOptions).direct_num_workers == (2 if len(flags) == 3 else 1)


def test_a_runner_that_is_named_is_taken() -> None:
    assert isinstance(batch_pipeline(["--runner=PortableRunner", "--job_endpoint=localhost:1"]).runner, PortableRunner)


def test_nothing_is_fetched_to_run_on_the_default_runner(tmp_path: Path) -> None:
    """The same program with Beam's own choice does try: that is what is avoided."""
    program = """
import sys, urllib.request
import apache_beam as beam
from beam_pipelines.runtime.local_runner import batch_pipeline
asked = []
def refuse(request, *args, **named):
    asked.append(getattr(request, "full_url", request))
    raise OSError("no network")
urllib.request.urlopen = refuse
import apache_beam.runners.portability.prism_runner as prism
prism.urlopen = refuse
prism.PrismJobServer.BIN_CACHE = sys.argv[1]
for pipeline in (batch_pipeline([]), beam.Pipeline()):
    _ = pipeline | beam.Create([1, 2]) | beam.Map(print)
    pipeline.run().wait_until_finish()
    print("asked", len(asked))
"""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", program, str(tmp_path)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    lines = done.stdout.split("\n")
    assert lines[:3] == ["1", "2", "asked 0"]
    assert lines[5] == "asked 1"
