"""Bundles and the registry: nothing altered is loaded, nothing is registered twice, every refusal names the way out."""

import contextlib
import hashlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from schemas.errors import StoreError
from tests.support.trained_models import trained
from transforms.models.bundle import Bundle, bundle_digest, load_bundle, save_bundle
from transforms.models.registry import Registry, RunRecord, preparing_database, registry_uri
from transforms.storage.paths import BOOSTER, ENCODERS, MANIFEST


@pytest.fixture
def registry(tmp_path: Path) -> Registry:
    return Registry(registry_uri(str(tmp_path / "store")))


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> tuple[Registry, Path]:
    """One registry with version 1 of `delay`, for tests that only look (a fresh one costs a second of migrations)."""
    store = tmp_path_factory.mktemp("store")
    registry = Registry(registry_uri(str(store)))
    assert registry.register(trained(), "run-1") == "1"
    return registry, store


def test_a_saved_bundle_is_loaded_to_the_byte(tmp_path: Path) -> None:
    bundle = trained()
    digest = save_bundle(bundle, tmp_path / "model")
    again = load_bundle(tmp_path / "model", digest)
    assert (again.booster, again.encoders, again.manifest) == (bundle.booster, bundle.encoders, bundle.manifest)
    assert (again.name, again.fingerprint, again.classes) == ("delay", "f" * 16, 1)
    assert digest == bundle_digest(tmp_path / "model") == save_bundle(again, tmp_path / "copy")


def test_a_bundle_holds_neither_pickle_nor_code(tmp_path: Path) -> None:
    save_bundle(trained(), tmp_path)
    assert sorted(os.listdir(tmp_path)) == [BOOSTER, ENCODERS, MANIFEST]
    for name in (ENCODERS, MANIFEST):
        json.loads((tmp_path / name).read_text())
    assert (tmp_path / BOOSTER).read_bytes()[:1] == b"{"  # UBJSON


@pytest.mark.parametrize("name", [BOOSTER, ENCODERS])
@pytest.mark.parametrize("where", [0, -2])
def test_one_changed_byte_is_refused_with_both_digests(tmp_path: Path, name: str, where: int) -> None:
    save_bundle(trained(), tmp_path)
    expected = json.loads((tmp_path / MANIFEST).read_text())["files"][name]["sha256"]
    content = bytearray((tmp_path / name).read_bytes())
    content[where] ^= 1
    (tmp_path / name).write_bytes(content)
    with pytest.raises(StoreError, match="as they were saved") as caught:
        load_bundle(tmp_path)
    assert expected in str(caught.value)
    assert hashlib.sha256(content).hexdigest() in str(caught.value)
    assert name in str(caught.value)


def test_a_changed_manifest_is_refused_by_its_digest(tmp_path: Path) -> None:
    digest = save_bundle(trained(), tmp_path)
    text = (tmp_path / MANIFEST).read_text().replace("somewhere", "elsewhere")
    (tmp_path / MANIFEST).write_text(text)
    with pytest.raises(StoreError, match=digest):
        load_bundle(tmp_path, digest)
    assert load_bundle(tmp_path).manifest["feature_table"]["uri"] == "elsewhere"  # nobody asked


@pytest.mark.parametrize(
    ("content", "word"),
    [
        ("{", "JSON"),
        ("[]", "JSON"),
        ("{}", "JSON"),
        ('{"files": {}, "format": 1}', "format 1"),
        ('{"files": 3}', "JSON"),
    ],
)
def test_an_empty_manifest_is_refused(tmp_path: Path, content: str, word: str) -> None:
    save_bundle(trained(), tmp_path)
    (tmp_path / MANIFEST).write_text(content)
    with pytest.raises(StoreError, match=word):
        load_bundle(tmp_path)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    save_bundle(trained(), tmp_path)
    (tmp_path / BOOSTER).unlink()
    with pytest.raises(StoreError, match=rf"{BOOSTER}: No such file.* Restore"):
        load_bundle(tmp_path)


def test_a_manifest_names_what_scoring_needs(tmp_path: Path) -> None:
    bundle = trained()
    manifest = {name: value for name, value in bundle.manifest.items() if name != "time"}
    with pytest.raises(StoreError, match="it lacks time"):
        save_bundle(Bundle(bundle.booster, bundle.encoders, manifest), tmp_path)


def test_the_first_registration_makes_everything(registry: Registry, tmp_path: Path) -> None:
    import mlflow

    (tmp_path / "report").mkdir()
    (tmp_path / "report" / "metrics.json").write_text("{}")
    bundle = trained()
    params = {f"p{i}": i for i in range(150)}  # MLflow takes 100 at a time
    metrics = {"auc": 0.75, "nothing": float("nan")}
    version = registry.register(bundle, "run-7", RunRecord(params, metrics, tmp_path / "report", {"who": "test"}))
    assert version == "1"
    assert registry.champion("delay") is None

    client = mlflow.MlflowClient(registry.uri)
    found = client.get_model_version("delay", "1")
    run = client.get_run(found.run_id)
    assert (run.info.status, run.data.tags["millrace.run_id"], run.data.tags["who"]) == ("FINISHED", "run-7", "test")
    assert (len(run.data.params), run.data.params["p149"], run.data.metrics) == (150, "149", {"auc": 0.75})
    assert {each.path for each in client.list_artifacts(run.info.run_id)} == {"metrics.json", "model"}
    assert found.tags["millrace.fingerprint"] == bundle.fingerprint
    store = tmp_path / "store" / "registry"
    assert sorted(os.listdir(store)) == ["artifacts", "mlflow.db"]

    described = mlflow.models.Model.load(str(store / "artifacts" / "delay" / found.run_id / "artifacts" / "model"))
    assert [(each.name, each.type.name) for each in described.signature.inputs] == [("x", "float"), ("n", "double")]
    assert described.signature.outputs.input_names() == ["score"]
    assert described.metadata["manifest_sha256"] == found.tags["millrace.manifest_sha256"]


def test_the_same_run_registers_once(shared: tuple[Registry, Path]) -> None:
    registry, _ = shared
    assert registry.register(trained(), "run-1") == "1"
    assert registry.register(trained(seed=9), "run-1", RunRecord({"other": 1})) == "1"  # the first stays


def test_a_registration_cut_short_is_completed(registry: Registry) -> None:
    """As after a kill between the run and its version: one run, one version, parameters once."""
    import mlflow

    client = mlflow.MlflowClient(registry.uri)
    experiment = client.create_experiment("delay", registry.uri.removeprefix("sqlite:///") + ".artifacts")
    run = client.create_run(experiment, tags={"millrace.run_id": "run-1"})
    client.log_param(run.info.run_id, "seconds", "1.25")
    assert registry.register(trained(), "run-1", RunRecord({"seconds": 1.5, "depth": 2})) == "1"
    assert [each.info.run_id for each in client.search_runs([experiment])] == [run.info.run_id]
    assert client.get_run(run.info.run_id).data.params == {"seconds": "1.25", "depth": "2"}
    assert load_bundle(registry.resolve("delay", 1)[1]).booster == trained().booster


def test_champion_is_promoted_and_resolved(registry: Registry) -> None:
    assert registry.register(trained(0), "a") == "1"
    assert registry.register(trained(1), "b") == "2"
    with pytest.raises(StoreError, match=r"'delay' with versions 1, 2.*--model_version"):
        registry.resolve("delay")
    assert registry.promote("delay", "1", "gates held", who="lead") is None
    assert registry.promote("delay", 2, "better") == "1"
    assert registry.promote("delay", 2, "again") == "2"
    assert registry.champion("delay") == "2"
    version, folder = registry.resolve("delay")
    assert (version, load_bundle(folder).booster) == ("2", trained(1).booster)
    assert load_bundle(registry.resolve("delay", "1")[1]).booster == trained(0).booster
    moves = [(each["version"], each["before"], each["why"]) for each in registry.history("delay")]
    assert moves == [("1", None, "gates held"), ("2", "1", "better")]
    assert registry.history("delay")[0]["who"] == "lead"


def test_a_promotion_cut_short_is_finished_by_the_next_attempt_and_recorded_once(
    registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between its two writes: the reason stands, the alias has not moved."""
    assert registry.register(trained(0), "a") == "1"
    assert registry.register(trained(1), "b") == "2"
    registry.promote("delay", 1, "first")

    def gone(*_: object) -> None:
        raise OSError("gone")

    with monkeypatch.context() as cut:
        cut.setattr("mlflow.MlflowClient.set_registered_model_alias", gone)
        with pytest.raises(StoreError):
            registry.promote("delay", 2, "better")
    assert registry.champion("delay") == "1"
    assert registry.promote("delay", 2, "better") == "1"
    assert registry.champion("delay") == "2"
    assert [each["version"] for each in registry.history("delay")] == ["1", "2"]
    assert registry.rollback("delay", "worse") == ("2", "1")


def test_a_registered_model_altered_on_disk_is_refused(shared: tuple[Registry, Path]) -> None:
    registry, store = shared
    (folder,) = (store / "registry").rglob("model")
    manifest = folder / MANIFEST
    before = manifest.read_bytes()
    digest = bundle_digest(folder)
    try:
        manifest.write_bytes(before.replace(b"somewhere", b"elsewhere"))
        with pytest.raises(StoreError, match=rf"SHA-256 {bundle_digest(folder)}, saved with {digest}"):
            registry.resolve("delay", "1")
    finally:
        manifest.write_bytes(before)
    assert registry.resolve("delay", "1") == ("1", str(folder))


def test_unknown_models_and_versions_say_what_to_do(shared: tuple[Registry, Path]) -> None:
    registry, _ = shared
    assert registry.champion("nobody") is None
    with pytest.raises(StoreError, match=r"no model 'nobody'.*millrace training"):
        registry.resolve("nobody")
    with pytest.raises(StoreError, match=r"'12'. Registered: 1."):
        registry.resolve("delay", 12)
    with pytest.raises(StoreError, match="'12'"):
        registry.promote("delay", 12, "why not")
    with pytest.raises(StoreError, match="no model 'nobody'"):
        registry.resolve("nobody", "1")


def test_looking_into_a_store_without_a_registry_leaves_it_alone(registry: Registry, tmp_path: Path) -> None:
    assert registry.champion("delay") is None
    with pytest.raises(StoreError, match="millrace training"):
        registry.resolve("delay")
    assert not (tmp_path / "store").exists()


def test_a_file_that_is_no_database_is_refused_at_once(registry: Registry, tmp_path: Path) -> None:
    path = tmp_path / "store" / "registry" / "mlflow.db"
    path.parent.mkdir(parents=True)
    path.write_bytes(b"not a database at all, only some text that is long enough")
    started = time.monotonic()
    with pytest.raises(StoreError, match=r"mlflow\.db: file is not a database"):
        registry.champion("delay")
    assert time.monotonic() - started < 1


def test_a_store_that_is_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "store").write_text("")
    with pytest.raises(StoreError, match="SQLite file that can be used"):
        Registry(registry_uri(str(tmp_path / "store"))).register(trained(), "a")


def test_a_server_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with pytest.raises(StoreError, match=r"registry must be reachable.*http://127\.0\.0\.1:9.*--registry"):
        Registry("http://127.0.0.1:9").champion("delay")


def test_a_remote_store_needs_a_server() -> None:
    with pytest.raises(StoreError, match="--registry"):
        registry_uri("gs://bucket/store")
    assert registry_uri("gs://bucket/store", "https://models") == "https://models"
    assert registry_uri("/a b/store") == "sqlite:////a b/store/registry/mlflow.db"


def test_mlflow_is_quiet_and_imported_only_when_spoken_to(tmp_path: Path) -> None:
    code = (
        "import sys; from transforms.models.registry import Registry, registry_uri\n"
        f"r = Registry(registry_uri({str(tmp_path)!r}))\n"
        "r.champion('delay'); assert 'mlflow' not in sys.modules\n"
        "from tests.support.trained_models import trained\n"
        "print(r.register(trained(), 'a'))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout == "1\n"
    assert not [line for line in done.stderr.splitlines() if "mlflow" in line or "alembic" in line]


def test_a_local_registry_is_read_without_mlflow(shared: tuple[Registry, Path]) -> None:
    """Nor with what MLflow would bring along: `models` and `trace` then start in a fraction of the time."""
    registry, _ = shared
    code = (
        "import sys; from transforms.models.registry import Registry\n"
        f"r = Registry({registry.uri!r})\n"
        "print(r.champion('delay'), r.models(), r.numbers('delay'), r.run_of('delay', '1'), r.resolve('delay', 1)[0])\n"
        "print(r.versions('delay')[0].run, r.records('delay'), r.history('delay'))\n"
        "assert not {'mlflow', 'sqlalchemy', 'pandas', 'apache_beam'} & set(sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert (done.stdout, done.returncode) == ("None [('delay', '1')] ['1'] run-1 1\nrun-1 [] []\n", 0), done.stderr


@pytest.mark.slow
def test_a_server_that_proxies_files_does_as_sqlite_does(tmp_path: Path) -> None:
    with contextlib.closing(socket.socket()) as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [
        str(Path(sys.executable).parent / "mlflow"),
        "server",
        "--host",
        "127.0.0.1",
        "--port",
        str(port),
        "--workers",
        "1",
        "--serve-artifacts",
        "--backend-store-uri",
        f"sqlite:///{tmp_path}/m.db",
        "--artifacts-destination",
        str(tmp_path / "files"),
    ]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
    try:
        registry = Registry(f"http://127.0.0.1:{port}")
        for _ in range(120):
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
                break
            time.sleep(0.5)
        assert registry.champion("delay") is None
        assert registry.register(trained(0), "a", RunRecord({"p": 1}, {"auc": 0.5})) == "1"
        assert registry.register(trained(0), "a") == "1"
        assert registry.register(trained(1), "b") == "2"
        registry.promote("delay", "2", "better")
        version, folder = registry.resolve("delay")
        assert (version, load_bundle(folder).booster) == ("2", trained(1).booster)
    finally:
        os.killpg(server.pid, signal.SIGTERM)
        server.wait(30)


def test_a_database_is_made_once_per_process_and_written_only_when_it_is_needed(tmp_path: Path) -> None:
    with preparing_database(registry_uri(str(tmp_path))):
        pass
    assert not list(tmp_path.iterdir())
    for store in ("one", "two"):
        with Registry(registry_uri(str(tmp_path / store))).client(write=True) as client:
            assert [each.name for each in client.search_experiments()] == ["Default"]
        assert os.listdir(tmp_path / store / "registry") == ["mlflow.db"]
    # They even hold the same moment of creation.
    one, two = ((tmp_path / store / "registry" / "mlflow.db").read_bytes() for store in ("one", "two"))
    assert one == two
