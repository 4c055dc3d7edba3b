"""Prism, Beam's portable runner for one machine, which serves the Job API.

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
        """Beam's options to run there.

        When a bundle is slow, Prism 2.77 gives its later elements to another bundle while the first still runs, even if
        all have the same key: then both bundles write the state of that key, and what one of them wrote is lost.  So
        splits are off.
        """
        return ["--runner=PortableRunner", f"--job_endpoint={self.endpoint}", "--experiments=prism_disable_sdf_split"]

    def command(self) -> list[str]:
        return [str(prism()), f"--job_port={self.port}", "--serve_http=false"]
