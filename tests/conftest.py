"""What every test runs under: a quiet TensorFlow, this environment's `python` on PATH, a Hypothesis profile, and the
process that others are forked from."""

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

from tests.support.processes import Zygote

pytest_plugins = [
    "tests.support.live_fixtures",
    "tests.support.live_inference_case",
    "tests.support.training_pipeline_case",
]

os.environ["COLUMNS"] = "160"  # the width of every terminal, whatever runs the tests
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("GIT_PYTHON_REFRESH", "quiet")
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)  # subprocesses would compile Beam and TensorFlow each time
os.environ["PATH"] = os.pathsep.join(
    [str(Path(sys.executable).parent), os.environ["PATH"]]
)  # Beam shells out to `python`

# HYPOTHESIS_PROFILE=thorough looks hard; ci says the same thing twice, so a red run there is about the change.
slow_machine = {"deadline": None, "suppress_health_check": [HealthCheck.too_slow, HealthCheck.data_too_large]}
settings.register_profile("dev", max_examples=50, **slow_machine)
settings.register_profile("ci", max_examples=50, derandomize=True, print_blob=True, **slow_machine)
settings.register_profile("thorough", max_examples=2000, **slow_machine)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE") or ("ci" if os.environ.get("CI") else "dev"))


@pytest.fixture(scope="module")
def zygote(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Zygote]:
    """A process that has imported everything, whose forks are killed in place of slow starts."""
    with Zygote(tmp_path_factory.mktemp("logs")) as started:
        yield started
