"""What every test runs under: a quiet TensorFlow, this environment's `python` on PATH, and a Hypothesis profile."""

import os
import sys
from pathlib import Path

from hypothesis import HealthCheck, settings

pytest_plugins = ["live_fixtures"]

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
