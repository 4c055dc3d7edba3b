"""Prism, Beam's portable runner of one machine, serving the Job API.

with Prism(folder) as prism:
    beam.Pipeline(options=PipelineOptions([*prism.options, "--environment_type=LOOPBACK"]))
"""

from __future__ import annotations

from deploy.streaming.processes import Service
from deploy.streaming.toolchain import prism


class Prism(Service):
    """See the module."""

    name, ports = "prism", ("port",)
    port: int

    @property
    def endpoint(self) -> str:
        return f"localhost:{self.port}"

    @property
    def options(self) -> list[str]:
        """Beam's options to run there."""
        return ["--runner=PortableRunner", f"--job_endpoint={self.endpoint}"]

    def command(self) -> list[str]:
        return [str(prism()), f"--job_port={self.port}", "--serve_http=false"]
