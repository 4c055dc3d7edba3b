"""What the job supervisor changes in Beam is needed for as long as Beam is as it is."""

from __future__ import annotations

import ast
import inspect
import textwrap

from apache_beam.runners.worker import sdk_worker


def test_beam_still_prints_the_traceback_that_it_logs() -> None:
    """When this fails, remove the assignment to `sdk_worker.print` in `job_supervisor`."""
    code = ast.parse(textwrap.dedent(inspect.getsource(sdk_worker.SdkHarness._execute)))
    called = [node.func.id for node in ast.walk(code) if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)]
    assert "print" in called
