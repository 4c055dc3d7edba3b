"""A registered model behind `mlflow models serve`: raw rows over HTTP, the scores of a batch job to the bit."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from schemas.errors import MismatchError, StoreError
from tests.support.trained_models import trained
from transforms.models.mlflow_pyfunc import load_pyfunc
from transforms.models.registry import Registry, RunRecord, registry_uri
from transforms.models.scoring import PinnedModel, open_scorer, score
from transforms.storage.paths import BOOSTER

ROOT = Path(__file__).parents[2]


EXAMPLE = {"columns": ["x", "n"], "data": [[0.25, 1], [None, None], [-1.5, 2]]}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    registry = Registry(registry_uri(str(tmp_path_factory.mktemp("store"))))
    registry.register(trained(), "run-1", RunRecord(example=EXAMPLE))
    return registry.resolve("delay", "1")[1]


def rows() -> tuple[list[list[float | int | None]], pa.RecordBatch]:
    random = np.random.default_rng(4)
    x = [None if i % 7 == 3 else float(np.float32(v)) for i, v in enumerate(random.normal(size=50))]
    n = [None if i % 5 == 4 else int(v) for i, v in enumerate(random.integers(-2, 3, 50))]
    batch = pa.RecordBatch.from_arrays([pa.array(x, pa.float32()), pa.array(n, pa.int64())], ["x", "n"])
    return [list(pair) for pair in zip(x, n)], batch


def invoke(port: int, body: bytes) -> list[dict[str, float]]:
    request = urllib.request.Request(f"http://127.0.0.1:{port}/invocations", body, {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=60) as feature_row:
            return json.loads(feature_row.read())["predictions"]  # type: ignore[no-any-return]
    except urllib.error.HTTPError as error:
        pytest.fail(error.read().decode())


def test_a_server_gives_the_scores_of_a_batch_job_to_the_bit(folder: str) -> None:
    data, batch = rows()
    expected = score(open_scorer(PinnedModel(folder)), batch)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [
        sys.executable,
        "-m",
        "mlflow",
        "models",
        "serve",
        "-m",
        folder,
        "-h",
        "127.0.0.1",
        "-p",
        str(port),
        "--env-manager",
        "local",
    ]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    server = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=environment, start_new_session=True
    )
    try:
        for _ in range(240):
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/ping", timeout=5).close()
                break
            except OSError:
                assert server.poll() is None, server.stdout.read().decode()  # type: ignore[union-attr]
                time.sleep(0.25)
        found = invoke(port, json.dumps({"dataframe_split": {"columns": ["x", "n"], "data": data}}).encode())
        example = invoke(port, (Path(folder) / "serving_input_example.json").read_bytes())
    finally:
        os.killpg(server.pid, signal.SIGTERM)
        server.communicate(timeout=30)
    assert np.array([each["score"] for each in found], np.float32).tobytes() == expected.tobytes()
    x, n = zip(*EXAMPLE["data"])
    raw = pa.RecordBatch.from_arrays([pa.array(x, pa.float32()), pa.array(n, pa.int64())], ["x", "n"])
    of_example = score(open_scorer(PinnedModel(folder)), raw)
    assert np.array([each["score"] for each in example], np.float32).tobytes() == of_example.tobytes()


@pytest.mark.filterwarnings("ignore:.*Any type hint:UserWarning")  # MLflow, of classes of its own
def test_the_input_example_is_one_that_mlflow_reads_and_fits_the_signature(folder: str) -> None:
    import mlflow

    model = mlflow.models.Model.load(folder)
    frame = model.load_input_example(folder)
    assert list(frame.columns) == model.signature.inputs.input_names() == EXAMPLE["columns"]
    assert json.loads(model.get_serving_input(folder)) == {"dataframe_split": EXAMPLE}
    loaded = mlflow.pyfunc.load_model(folder)  # enforces the signature
    assert len(loaded.predict(frame)) == len(EXAMPLE["data"])


def test_a_frame_is_scored_as_its_rows_are_and_refused_where_a_value_does_not_fit(folder: str) -> None:
    import pandas as pd

    data, batch = rows()
    model = load_pyfunc(folder)
    frame = pd.DataFrame(data, columns=["x", "n"])
    found = model.predict(frame)["score"].to_numpy()
    assert found.tobytes() == score(model.scorer, batch).tobytes()
    with pytest.raises(MismatchError, match="'n' must be int64"):
        model.predict(pd.DataFrame({"x": [1.0], "n": [0.5]}))


def test_a_booster_altered_on_disk_is_not_served(folder: str) -> None:
    path = Path(folder) / BOOSTER
    whole = path.read_bytes()
    try:
        path.write_bytes(whole[:-2] + b"!!")
        with pytest.raises(StoreError, match="as they were saved"):
            load_pyfunc(folder)
    finally:
        path.write_bytes(whole)
