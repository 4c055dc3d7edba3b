"""Changes to Beam's workers in this process: what they print, where they listen, how often they inspect a step, and
when a bundle ends.

With the environment LOOPBACK, and in local batch pipelines, the workers are threads of the launcher.  Beam has no
options for this, so this module replaces a few names and a default in Beam's worker modules;
`tests/beam_pipelines/runtime/test_beam_workers.py` fails when Beam no longer needs it.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import threading
import types
import weakref
from collections.abc import Callable

import apache_beam as beam
import grpc
from apache_beam.runners.worker import data_plane, sdk_worker, statesampler, worker_pool_main
from apache_beam.transforms import userstate

# State and timers of a DoFn.
Specs = tuple[set[userstate.StateSpec], set[userstate.TimerSpec]]

# Loggers of those worker modules that log a lost connection with its traceback.
LOGGERS = ("data_plane", "sdk_worker", "log_handler")
# How often, in ms, a worker's thread samples the current step of a bundle.
SAMPLING_MS = 10


@functools.cache
def quiet_lost_connections() -> None:
    """Keep Beam's worker threads from printing the traceback of a lost connection; other errors are printed as before.

    This lasts until the process ends, since some of the threads outlive the job.
    """
    # apache/beam issue 22643: a worker's threads let the RpcError of a lost runner escape, and Python prints it.
    # Only threads that these three modules start are concerned, and only this error.
    worker_threading = types.ModuleType("threading")
    vars(worker_threading).update(vars(threading), Thread=WorkerThread)
    for module in (sdk_worker, data_plane, worker_pool_main):
        module.threading = worker_threading
    # `SdkHarness._execute` prints a traceback that it also logs, and filters reach only what is logged.  Beam declined
    # to remove the repetition (apache/beam pull request 5020).
    sdk_worker.print = lambda *_, **__: None
    for name in LOGGERS:
        logging.getLogger(f"apache_beam.runners.worker.{name}").addFilter(_is_no_lost_connection)


@functools.cache
def listen_on_loopback() -> None:
    """Makes the workers of the environment LOOPBACK, which run in this process, listen only on loopback.

    Anyone who can connect to a worker pool can make it run code.  Beam's pool listens on all interfaces, which
    apache/beam pull request 10161 (BEAM-8746) introduced for job services, although it announces the address localhost.
    """
    worker_grpc = types.ModuleType("grpc")
    vars(worker_grpc).update(vars(grpc), server=_loopback_server)
    worker_pool_main.grpc = worker_grpc


@functools.cache
def end_bundles_at_once() -> None:
    """Makes a bundle wait for at most `SAMPLING_MS` for the thread that samples its steps.

    A bundle joins this thread before it ends, and the thread sleeps for a sixth of the bundle's time, up to 200 ms.
    This took 1.1 s of the three batch pipelines over a year of flights, and would delay every feature row of a live
    job.
    """
    statesampler.StateSampler.__init__.__defaults__ = (SAMPLING_MS,)


@functools.cache
def inspect_classes_once() -> None:
    """Makes Beam inspect each class of DoFn only once for parameters of state and timers.

    Beam inspects every method of every step eight times while a graph is built and run, which took a third of the time
    of a run over a few thousand rows.
    """
    userstate.get_dofn_specs = _specs_by_class(userstate.get_dofn_specs)


def _specs_by_class(specs: Callable[[beam.DoFn], Specs]) -> Callable[[beam.DoFn], Specs]:
    known: weakref.WeakKeyDictionary[type, Specs] = weakref.WeakKeyDictionary()

    @functools.wraps(specs)
    def by_class(dofn: beam.DoFn) -> Specs:
        kind = type(dofn)
        if any(isinstance(value, types.MethodType) for value in vars(dofn).values()):
            return specs(dofn)  # a method of the object, besides those of its class
        if kind not in known:
            known[kind] = specs(dofn)
        states, timers = known[kind]
        return {*states}, {*timers}

    return by_class


def _loopback_server(*arguments: object, **named: object) -> grpc.Server:
    """A gRPC server that listens on loopback when it is asked to listen on all interfaces."""
    server = grpc.server(*arguments, **named)
    listen = server.add_insecure_port
    server.add_insecure_port = lambda address: listen(address.replace("[::]:", "127.0.0.1:"))
    return server


class WorkerThread(threading.Thread):
    """A thread that ends without a traceback when its gRPC connection is lost."""

    def run(self) -> None:
        with contextlib.suppress(grpc.RpcError):
            super().run()


def _is_no_lost_connection(record: logging.LogRecord) -> bool:
    return not (record.exc_info and isinstance(record.exc_info[1], grpc.RpcError))
