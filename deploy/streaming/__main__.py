"""Runs a broker, KafkaIO, Prism and a worker pool until Ctrl-C, and prints the flags to use them.

python -m deploy.streaming
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import tempfile
from pathlib import Path

from deploy.streaming.expansion import Expansion
from deploy.streaming.kafka import Broker
from deploy.streaming.prism import Prism
from deploy.streaming.processes import running
from deploy.streaming.workers import WorkerPool
from schemas.errors import MillraceError
from schemas.permissions import umask


def main() -> int:
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        mask = umask()
    except MillraceError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    if mask is not None:
        os.umask(mask)  # the workers write files with rows
    with tempfile.TemporaryDirectory(prefix="millrace-") as name:
        folder = Path(name)
        broker, expansion, prism, workers = Broker(folder), Expansion(folder), Prism(folder), WorkerPool(folder)
        try:
            with running(broker, expansion, prism, workers):
                print(f"--bootstrap={broker.bootstrap} --expansion_service={expansion.address}")
                print(*prism.options, "--environment_type=LOOPBACK")
                print(*prism.options, *workers.options)
                print(f"Logs are in {folder}; Ctrl-C ends it all.", flush=True)
                signal.pause()
        except KeyboardInterrupt:
            pass
        except MillraceError as error:
            print(f"error: {error}", file=sys.stderr)
            return error.exit_code
    return 0


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    sys.exit(main())
