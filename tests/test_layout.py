"""The house keeps its plan: who may import whom, what the wheel holds, how fast `schemas` comes in."""

import ast
import re
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ("beam_pipelines", "transforms", "schemas", "examples")
ROOMS = (*PACKAGES, "tests", "benchmarks", "deploy")
CHECKED = (*PACKAGES, "tests", "benchmarks", "deploy/streaming")  # the rest of deploy/ runs in other environments

# DESIGN §2: what each folder may import of ours.
MAY_IMPORT = {
    "schemas": {"schemas"},
    "transforms": {"schemas", "transforms"},
    "beam_pipelines": {"schemas", "transforms", "beam_pipelines"},
    "examples": {"schemas", "examples"},
    "deploy": {"schemas", "deploy"},
}
PIPELINES = {f"beam_pipelines.{name}" for name in ("features", "training", "inference")}
# A use case's entry points run pipelines; its definition and its data never do.
ENTRY_POINTS = {"examples/flights/run.py", "examples/flights/stream.py"}
# `schemas` says what data looks like, and needs no more than this to say it.
SCHEMAS_THIRD_PARTY = {"pyarrow", "polars"}
# TFDV decides which Python and which glibc Millrace runs on; one file knows it.
TFDV_FILES = {"transforms/validation.py"}

PACKAGE_EXTRAS = {"live", "examples"}  # tests and benchmarks may use them all
# What a module comes with, where the name does not say it; the last two are what Beam itself stands on.
DISTRIBUTION = {"google": "protobuf", "sklearn": "scikit-learn", "fastavro": "apache-beam", "grpc": "apache-beam"}
LINES = 520


def imported(tree: ast.AST, path: str) -> Iterator[tuple[int, str]]:
    """Line and absolute name of every import of a module, however deep, and of literal import_module calls."""
    package = path.removesuffix(".py").split("/")[:-1]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*above, *([node.module] if node.module else [])])
            for alias in node.names:  # `from beam_pipelines import features` reaches the module too
                yield node.lineno, f"{module}.{alias.name}" if module else alias.name
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if called in ("import_module", "__import__") and isinstance(node.args[0].value, str):
                yield node.lineno, node.args[0].value


def within(name: str, module: str) -> bool:
    return name == module or name.startswith(f"{module}.")


# Functions that run in an environment of their own, which the file makes.
ELSEWHERE = {"benchmarks/features_join.py": {"feast"}}


def declared(room: str) -> set[str]:
    """Distributions that setup.py lets this folder import."""
    constants = {
        node.targets[0].id: ast.literal_eval(node.value)
        for node in ast.parse((ROOT / "setup.py").read_text()).body
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name)
    }
    extras = constants["EXTRAS"]
    chosen = extras if room not in PACKAGES else PACKAGE_EXTRAS
    requirements = constants["REQUIRES"] + [r for extra in chosen for r in extras[extra]]
    return {re.split(r"[\[<>=!~; ]", r)[0].lower() for r in requirements}


def faults(source: str, path: str) -> list[str]:
    """What a file imports against the plan, one line each."""
    room, found = path.split("/")[0], []
    neighbours = {p.stem for p in (ROOT / path).parent.glob("*.py")} if room not in PACKAGES else set()
    for line, name in imported(ast.parse(source), path):
        top = name.split(".")[0]
        here = f"{path}:{line}: imports {name}"
        if top in ROOMS:
            allowed = MAY_IMPORT.get(room, set(ROOMS)) | (
                {"beam_pipelines", "deploy", "transforms"} if path in ENTRY_POINTS else set()
            )
            if top not in allowed:
                found.append(f"{here}; {room}/ may import only {', '.join(sorted(allowed))} of ours")
            this = path.removesuffix(".py").replace("/", ".")
            if this in PIPELINES and any(within(name, other) for other in PIPELINES - {this}):
                found.append(f"{here}; the pipelines meet only in tables, topics, files and the registry")
            continue
        if top in sys.stdlib_module_names or top in neighbours:
            continue
        if room == "schemas" and top not in SCHEMAS_THIRD_PARTY:
            found.append(f"{here}; schemas/ may import only {', '.join(sorted(SCHEMAS_THIRD_PARTY))}")
        if top == "tensorflow_data_validation" and room in PACKAGES and path not in TFDV_FILES:
            found.append(f"{here}; TFDV stays behind {', '.join(sorted(TFDV_FILES))}")
        if top in ELSEWHERE.get(path, ()):
            continue
        distribution = DISTRIBUTION.get(top, top.replace("_", "-").lower())
        if distribution not in declared(room):
            found.append(f"{here}; setup.py does not declare {distribution} for {room}/")
    return found


def sources(*rooms: str) -> list[Path]:
    return sorted(path for room in rooms for path in (ROOT / room).rglob("*.py"))


def test_imports_follow_the_plan() -> None:
    found = [
        fault
        for path in sources(*CHECKED)
        for fault in faults(path.read_text(encoding="utf-8"), path.relative_to(ROOT).as_posix())
    ]
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    ("path", "source", "fault"),
    [
        ("schemas/tables.py", "import apache_beam as beam", "schemas/ may import only polars, pyarrow"),
        ("schemas/tables.py", "def f():\n    from transforms.tables import read", "may import only schemas of ours"),
        ("schemas/tables.py", "from ..transforms import tables", "may import only schemas of ours"),
        ("transforms/topics.py", "from deploy.streaming.kafka import Broker", "may import only schemas, transforms"),
        ("deploy/streaming/kafka.py", "from transforms import topics", "may import only deploy, schemas of ours"),
        ("transforms/scoring.py", "from beam_pipelines.options import Options", "may import only schemas, transforms"),
        ("transforms/scoring.py", "import tensorflow_data_validation as tfdv", "TFDV stays behind"),
        ("transforms/scoring.py", "import_module('tensorflow_data_validation')", "TFDV stays behind"),
        ("transforms/scoring.py", "import torch", "setup.py does not declare torch"),
        ("transforms/scoring.py", "import pytest", "setup.py does not declare pytest for transforms/"),
        ("beam_pipelines/training.py", "from beam_pipelines import features", "the pipelines meet only in"),
        ("beam_pipelines/training.py", "from .inference import build", "the pipelines meet only in"),
        ("beam_pipelines/training.py", "from examples.flights import definition", "may import only beam_pipelines"),
        ("examples/flights/definition.py", "import beam_pipelines.cli", "may import only examples, schemas"),
        ("examples/flights/data.py", "from transforms.tables import read", "may import only examples, schemas"),
    ],
)
def test_an_import_against_the_plan_is_found(path: str, source: str, fault: str) -> None:
    found = faults(source, path)
    assert len(found) == 1
    assert fault in found[0]


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("schemas/tables.py", "import polars as pl, datetime\nfrom .definition import Source"),
        (
            "transforms/validation.py",
            "import tensorflow_data_validation as tfdv\nfrom google.protobuf import json_format",
        ),
        ("beam_pipelines/cli.py", "from beam_pipelines import features, inference, training"),
        ("examples/flights/run.py", "from beam_pipelines import features"),
        (
            "examples/flights/stream.py",
            "from deploy.streaming.kafka import Broker\nfrom transforms.registry import Registry",
        ),
        ("tests/test_schemas.py", "import sklearn.metrics\nimport schemas, conftest"),
    ],
)
def test_an_import_within_the_plan_passes(path: str, source: str) -> None:
    assert faults(source, path) == []


def test_schemas_comes_in_under_half_a_second_and_alone() -> None:
    subprocess.run([sys.executable, "-m", "compileall", "-q", "schemas"], cwd=ROOT, check=True)
    program = (
        "import sys, time; start = time.process_time(); import schemas; took = time.process_time() - start\n"
        "print(took, *sorted({name.split('.')[0] for name in sys.modules}))"
    )
    fastest = float("inf")
    for _ in range(3):
        out = subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=True, capture_output=True, text=True)
        took, *modules = out.stdout.split()
        assert not {"apache_beam", "tensorflow", "tensorflow_data_validation", "mlflow", "transforms"} & set(modules)
        fastest = min(fastest, float(took))
        if fastest < 0.5:
            break
    assert fastest < 0.5, f"import schemas took {fastest:.2f} s"


def test_no_file_is_two_rooms() -> None:
    long = {
        path.relative_to(ROOT).as_posix(): lines
        for path in sources("schemas", "transforms", "beam_pipelines")
        if (lines := len(path.read_text(encoding="utf-8").splitlines())) > LINES
    }
    assert not long, f"over {LINES} lines, so more than one room: {long}"


def test_wheel_holds_the_packages_and_nothing_else(tmp_path: Path) -> None:
    command = (
        f"egg_info --egg-base {tmp_path} build --build-base {tmp_path}/build bdist_wheel --bdist-dir {tmp_path}/bdist"
    )
    command = [sys.executable, "setup.py", "-q", *command.split(), "--dist-dir", str(tmp_path / "dist")]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)  # the tree itself stays as it was
    (wheel,) = (tmp_path / "dist").iterdir()
    names = zipfile.ZipFile(wheel).namelist()
    tops = {name.split("/")[0] for name in names}
    assert wheel.name.startswith("millrace-0.1.0-py3-none-any")
    assert {top for top in tops if not top.endswith(".dist-info")} == set(PACKAGES)
    ours = {
        path.relative_to(ROOT).as_posix()
        for pattern in ("*.py", "*.pbtxt")
        for room in PACKAGES
        for path in (ROOT / room).rglob(pattern)
    }
    assert ours <= set(names), f"not in the wheel: {sorted(ours - set(names))}"


def test_lock_covers_what_setup_declares() -> None:
    locked = {re.split("==", line)[0] for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line}
    assert declared("tests") <= locked
    assert not re.search("file:|https?:", (ROOT / "constraints.txt").read_text())
