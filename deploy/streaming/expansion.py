"""Beam's expansion service with KafkaIO, which also runs KafkaIO's Java workers.

with Expansion(folder) as expansion:
    ReadFromKafka(…, expansion_service=expansion.address)
"""

from __future__ import annotations

import logging

from deploy.streaming.processes import Service
from deploy.streaming.toolchain import POM, java, loopback_expansion

log = logging.getLogger("millrace.setup")


class Expansion(Service):
    """See the module."""

    name, ports = "expansion", ("port",)
    port: int

    @property
    def address(self) -> str:
        return f"localhost:{self.port}"

    def command(self) -> list[str]:
        # On Prism, KafkaIO's newer reader waits for its polling timeout of two seconds in one partition after another:
        # 16 partitions lag by 24 s.  The older one reads in the background: 0.3 s. The workers run in this process, so
        # nothing must be staged; otherwise every expansion would copy the 140 MB of the class path.
        flags = ["--experiments=use_unbounded_sdf_wrapper", "--alsoStartLoopbackWorker", f"--filesToStage={POM}"]
        options, ours = ["-Xmx1g", "-XX:+UseSerialGC"], loopback_expansion()
        if ours is not None:
            return java("expansion", "LoopbackExpansion", str(self.port), *flags, options=options, classes=[ours])
        log.warning(
            "the expansion service listens on all interfaces, since javac is missing: whoever reaches port %d can have "
            "it run code.  Install a JDK (apt-get install openjdk-17-jdk-headless), or close the port",
            self.port,
        )
        main = "org.apache.beam.sdk.expansion.service.ExpansionService"
        return java("expansion", main, str(self.port), *flags, options=options)
