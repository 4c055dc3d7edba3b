"""A pool that starts a Python worker process whenever a runner requests one: the way Flink runs Python without Docker.

    with WorkerPool(folder) as pool:
        beam.Pipeline(options=PipelineOptions([*prism.options, *pool.options]))

It is Beam's own pool (`apache_beam.runners.worker.worker_pool_main`), which listens on every interface; here only on
loopback.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from deploy.streaming.processes import HOST, Service

ROOT = Path(__file__).parents[2]
STATE_CACHE = 100 << 20  # bytes; Beam's default for workers in this process, while the pool's default is no cache


class WorkerPool(Service):
    """See the module.

    Args:
        folder: the folder of its log.
        path: folders of modules that the workers import, besides this repository.
    """

    name, ports = "workers", ("port",)
    port: int

    def __init__(self, folder: Path | str, path: Sequence[Path | str] = ()) -> None:
        super().__init__(folder)
        self.path = path

    @property
    def options(self) -> list[str]:
        """Beam's options to run Python there."""
        return ["--environment_type=EXTERNAL", f"--environment_config=localhost:{self.port}"]

    def command(self) -> list[str]:
        return [sys.executable, "-m", "deploy.streaming.workers", str(self.port)]

    def environment(self) -> Mapping[str, str]:
        path = [str(Path(sys.executable).parent), os.environ["PATH"]]  # the pool launches `python` by this name
        modules = [str(ROOT), *map(str, self.path), *filter(None, [os.environ.get("PYTHONPATH")])]
        return {"PATH": os.pathsep.join(path), "PYTHONPATH": os.pathsep.join(modules)}


def serve(port: int) -> None:
    """Serve until ended."""
    import grpc
    from apache_beam.portability.api import beam_fn_api_pb2_grpc
    from apache_beam.runners.worker.worker_pool_main import BeamFnExternalWorkerPoolServicer
    from apache_beam.utils import thread_pool_executor

    server = grpc.server(thread_pool_executor.shared_unbounded_instance())
    pool = BeamFnExternalWorkerPoolServicer(
        use_process=True, state_cache_size=STATE_CACHE, data_buffer_time_limit_ms=-1
    )
    beam_fn_api_pb2_grpc.add_BeamFnExternalWorkerPoolServicer_to_server(pool, server)
    server.add_insecure_port(f"{HOST}:{port}")
    server.start()
    while True:
        time.sleep(3600)


if __name__ == "__main__":
    serve(int(sys.argv[1]))
