"""What `beam_workers` and `scoring` change in Beam is needed for as long as Beam is as it is."""

from __future__ import annotations

import ast
import inspect
import pickle
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import apache_beam as beam
import grpc
import psutil
import pytest
from apache_beam.coders import VarIntCoder
from apache_beam.ml.inference import base
from apache_beam.options.pipeline_options import (
    DebugOptions,
    GoogleCloudOptions,
    PipelineOptions,
    StandardOptions,
    TypeOptions,
)
from apache_beam.portability.api import beam_fn_api_pb2, beam_fn_api_pb2_grpc
from apache_beam.runners.portability.fn_api_runner import FnApiRunner
from apache_beam.runners.worker import data_plane, sdk_worker, statesampler, worker_pool_main
from apache_beam.transforms import core, userstate
from apache_beam.transforms.timeutil import TimeDomain
from apache_beam.utils.counters import CounterFactory

from beam_pipelines.runtime import beam_workers
from beam_pipelines.runtime.local_runner import BatchOptions

Start = Callable[[str], object]
MODULES = (sdk_worker, data_plane, worker_pool_main)


def run_worker(address: str) -> object:
    pool = worker_pool_main.BeamFnExternalWorkerPoolServicer()
    request = beam_fn_api_pb2.StartWorkerRequest(worker_id="worker")
    request.control_endpoint.url = address
    return pool.StartWorker(request, None)


def read_state(address: str) -> object:
    return sdk_worker.GrpcStateHandler(beam_fn_api_pb2_grpc.BeamFnStateStub(grpc.insecure_channel(address)))


def read_inputs(address: str) -> object:
    return data_plane.GrpcClientDataChannel(beam_fn_api_pb2_grpc.BeamFnDataStub(grpc.insecure_channel(address)))


STARTS: dict[str, Start] = {
    "run_worker_worker": run_worker,
    "read_state": read_state,
    "read_grpc_client_inputs": read_inputs,
}


@pytest.fixture
def address() -> Iterator[str]:
    """Of a gRPC server that refuses every call."""
    server = grpc.server(ThreadPoolExecutor(2))
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    yield f"127.0.0.1:{port}"
    server.stop(None)


@pytest.fixture
def unpatched(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Beam as it is, whatever another test has changed in this process; the test's changes are undone."""
    for module in MODULES:
        monkeypatch.setattr(module, "threading", threading)
    monkeypatch.setattr(sdk_worker, "print", print, raising=False)
    beam_workers.quiet_lost_connections.cache_clear()
    yield
    beam_workers.quiet_lost_connections.cache_clear()


def escaped(name: str, address: str, monkeypatch: pytest.MonkeyPatch) -> list[BaseException | None]:
    """The errors that end the thread of this name."""
    found: list[BaseException | None] = []
    monkeypatch.setattr(
        threading, "excepthook", lambda died: found.append(died.exc_value) if died.thread.name == name else None
    )
    before = set(threading.enumerate())
    kept = STARTS[name](address)  # a channel that nobody refers to is closed
    for thread in set(threading.enumerate()) - before:
        if thread.name == name:
            thread.join(20)
            assert not thread.is_alive()
    del kept
    return found


@pytest.mark.parametrize("name", STARTS)
def test_a_thread_of_a_worker_still_lets_the_error_of_a_lost_connection_escape(
    name: str, address: str, unpatched: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """When this fails for all names, remove `WorkerThread`."""
    (error,) = escaped(name, address, monkeypatch)
    assert isinstance(error, grpc.RpcError)


@pytest.mark.parametrize("name", STARTS)
def test_no_traceback_of_a_lost_connection_is_printed_once_workers_are_quiet(
    name: str, address: str, unpatched: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    hook = threading.excepthook
    beam_workers.quiet_lost_connections()
    assert threading.excepthook is hook
    assert escaped(name, address, monkeypatch) == []


def test_another_error_of_a_worker_thread_is_printed_as_before(
    unpatched: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    found: list[BaseException | None] = []
    monkeypatch.setattr(threading, "excepthook", lambda args: found.append(args.exc_value))
    beam_workers.quiet_lost_connections()

    def fail() -> None:
        raise ValueError("a defect")

    thread = sdk_worker.threading.Thread(target=fail)
    thread.start()
    thread.join()
    assert [str(error) for error in found] == ["a defect"]


def test_beam_still_prints_the_traceback_that_it_logs() -> None:
    """When this fails, remove the assignment to `sdk_worker.print` in `beam_workers`."""
    code = ast.parse(textwrap.dedent(inspect.getsource(sdk_worker.SdkHarness._execute)))
    called = [node.func.id for node in ast.walk(code) if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)]
    assert "print" in called


def test_beam_still_drops_the_module_resource_with_another_import() -> None:
    """When this fails, remove the assignment to `base.resource` in `transforms/models/scoring.py`."""
    (block,) = (
        [alias.name for each in node.body if isinstance(each, ast.Import | ast.ImportFrom) for alias in each.names]
        for node in ast.parse(inspect.getsource(base)).body
        if isinstance(node, ast.Try) and any("resource" in ast.unparse(each) for each in node.body)
    )
    assert block == ["resource", "ModelManager"]


@pytest.mark.parametrize("patched", [False, True])
def test_the_workers_of_this_process_listen_on_loopback(patched: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """And the change is needed for as long as Beam's own listen everywhere."""
    monkeypatch.setattr(worker_pool_main, "grpc", grpc)
    if patched:
        beam_workers.listen_on_loopback.__wrapped__()
    address, server = worker_pool_main.BeamFnExternalWorkerPoolServicer.start()
    try:
        port = int(address.rpartition(":")[2])
        (where,) = {
            each.laddr.ip
            for each in psutil.Process().net_connections("tcp")
            if each.status == psutil.CONN_LISTEN and each.laddr.port == port
        }
        assert (where in ("127.0.0.1", "::ffff:127.0.0.1")) is patched, where
        grpc.channel_ready_future(grpc.insecure_channel(address)).result(10)
    finally:
        server.stop(None).wait()


def seconds_to_end(after: float) -> float:
    """How long a bundle of `after` seconds waits for the thread that samples its steps."""
    sampler = statesampler.StateSampler("bundle", CounterFactory())
    sampler.start()
    time.sleep(after)
    start = time.perf_counter()
    sampler.stop()
    return time.perf_counter() - start


@pytest.mark.parametrize("patched", [False, True])
def test_a_bundle_ends_when_its_work_does(patched: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """And the change is needed for as long as a bundle of Beam's own waits for its sampler."""
    init = statesampler.StateSampler.__init__
    monkeypatch.setattr(init, "__defaults__", (statesampler.DEFAULT_SAMPLING_PERIOD_MS,))
    if patched:
        beam_workers.end_bundles_at_once.__wrapped__()
    # Beam's sampler wakes after 373 and 450 ms.
    waits = [seconds_to_end(0.38) for _ in range(5)]
    assert min(waits) <= beam_workers.SAMPLING_MS / 1000 + 0.005 if patched else max(waits) > 0.03, waits


class Plain(beam.DoFn):
    def process(self, element: int) -> Iterator[int]:
        yield element


class Counting(beam.DoFn):
    COUNT = userstate.ReadModifyWriteStateSpec("count", VarIntCoder())
    TIMER = userstate.TimerSpec("timer", TimeDomain.WATERMARK)

    def process(
        self,
        element: tuple[str, int],
        count: object = beam.DoFn.StateParam(COUNT),
        timer: object = beam.DoFn.TimerParam(TIMER),
    ) -> Iterator[int]:
        yield element[1]

    @userstate.on_timer(TIMER)
    def expire(self, count: object = beam.DoFn.StateParam(COUNT)) -> Iterator[int]:
        yield 0

    def counted(self, element: tuple[str, int], count: object = beam.DoFn.StateParam(COUNT)) -> list[int]:
        return [element[1]]


def dofns() -> list[beam.DoFn]:
    with_method = Plain()
    with_method.start_bundle = Counting().counted  # type: ignore[method-assign,assignment]
    functions = [beam.FlatMap(lambda x: [x]).fn, beam.FlatMap(Counting().counted).fn, beam.Map(str).fn]
    return [Plain(), Counting(), *functions, with_method, Plain()]


def test_state_and_timers_of_a_dofn_are_what_beam_finds(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where one instance of a class has a method of its own."""
    found = [userstate.get_dofn_specs(each) for each in dofns()]
    assert [len(states) + len(timers) for states, timers in found].count(0) < len(found)
    monkeypatch.setattr(userstate, "get_dofn_specs", userstate.get_dofn_specs)
    beam_workers.inspect_classes_once.__wrapped__()
    for _ in range(2):
        assert [userstate.get_dofn_specs(each) for each in dofns()] == found
    assert userstate.is_stateful_dofn(Counting())
    assert not userstate.is_stateful_dofn(Plain())


@pytest.mark.parametrize("patched", [False, True])
def test_a_class_is_inspected_once(patched: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """And the change is needed for as long as Beam inspects a class for each use of each step."""
    looked: list[tuple[type, str]] = []
    arguments = core.get_function_arguments

    def noted(dofn: beam.DoFn, name: str) -> object:
        looked.append((type(dofn), name))
        return arguments(dofn, name)

    original = getattr(userstate.get_dofn_specs, "__wrapped__", userstate.get_dofn_specs)
    monkeypatch.setattr(userstate, "get_dofn_specs", original)
    if patched:
        beam_workers.inspect_classes_once.__wrapped__()
    monkeypatch.setattr(core, "get_function_arguments", noted)
    pipeline = beam.Pipeline(runner=FnApiRunner())
    numbers = pipeline | beam.Create([1, 2], reshuffle=False)
    for i in range(5):
        numbers |= f"Step{i}" >> beam.ParDo(Plain())
    pipeline.run().wait_until_finish()
    times = looked.count((Plain, "default_type_hints"))
    assert times <= 1 if patched else times > 10, times


def test_views_of_a_pipelines_options_are_those_of_beam() -> None:
    flags = ["--streaming", "--experiments=one", "--temp_location=/tmp/x"]
    ours, beams = BatchOptions(flags), PipelineOptions(flags)
    for kind in (StandardOptions, DebugOptions, TypeOptions, GoogleCloudOptions):
        assert ours.view_as(kind)._visible_options == beams.view_as(kind)._visible_options
        assert ours.view_as(kind) is ours.view_as(kind)
    ours.view_as(DebugOptions).add_experiment("two")
    beams.view_as(DebugOptions).add_experiment("two")
    assert ours.get_all_options() == beams.get_all_options()
    assert ours.view_as(DebugOptions).experiments == ["one", "two"]
    assert pickle.loads(pickle.dumps(ours)).get_all_options() == beams.get_all_options()
