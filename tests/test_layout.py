"""The house keeps its plan: who may import whom, what the wheel holds, how fast `schemas` comes in."""

import ast
import functools
import importlib
import re
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from transforms.public_names import listed_names

ROOT = Path(__file__).parents[1]
PACKAGES = ("beam_pipelines", "transforms", "schemas", "examples")
OURS = (*PACKAGES, "tests", "benchmarks", "deploy", "docs")
CHECKED = (
    *PACKAGES,
    "tests",
    "benchmarks",
    "deploy/streaming",
    "docs",
)  # the rest of deploy/ runs in other environments

# Each package imports only those above it.
ORDER = (
    "schemas",
    "transforms.public_names",  # used by the `__init__` of every package
    "transforms.records",
    "transforms.storage",
    "transforms.sources",
    "transforms.verification",
    "transforms.features",
    "transforms.validation",
    "transforms.models",
    "transforms.evaluation",
    "transforms.reports",
    "transforms.training",
    "transforms.streaming",
    "transforms.inference",
    "transforms.lineage",
    "transforms.monitoring",
    "transforms.online",
    "transforms",  # the modules right below it: `serving`, which registered models name as their loader
    "beam_pipelines.runtime",
    "beam_pipelines.features",
    "beam_pipelines.training",
    "beam_pipelines.inference",
    "beam_pipelines.features_streaming",
    "beam_pipelines.inference_streaming",
    "beam_pipelines.commands",
    "beam_pipelines.cli",
)
# Some may import less than the order lets them.
ONLY = {
    # What verifies the kernel shares nothing with it.
    "transforms.verification": {
        "schemas",
        "transforms.public_names",
        "transforms.records",
        "transforms.storage",
        "transforms.sources",
    },
    "transforms.reports": {"schemas", "transforms.public_names", "transforms.models", "transforms.evaluation"},
}
# Pipelines meet only in tables, topics, files and the registry; one and its live form are one.
PIPELINES = (
    {"beam_pipelines.features", "beam_pipelines.features_streaming"},
    {"beam_pipelines.training"},
    {"beam_pipelines.inference", "beam_pipelines.inference_streaming"},
)
MAY_IMPORT = {
    "schemas": {"schemas"},
    "transforms": {"schemas", "transforms"},
    "beam_pipelines": {"schemas", "transforms", "beam_pipelines"},
    "examples": {"schemas", "examples"},
    "deploy": {"schemas", "deploy"},
    "docs": {"docs"},  # it reads the code, and runs none of it
}
# A demonstration runs pipelines on an example; the example's definition and its data never do.
DEMONSTRATIONS = "deploy/flights/"
# A test of a definition computes features: the kernel is looked up by its name when it is called, never imported.
LOOKED_UP = {"schemas/testing.py": "transforms.features.literal_rows"}
# `schemas` says what data looks like, and needs no more than this to say it.
SCHEMAS_THIRD_PARTY = {"pyarrow", "polars"}
# TFDV decides which Python and which glibc Millrace runs on; one file knows it.
TFDV_FILES = {"transforms/validation/tfdv_schema.py"}
# Beam's file systems stand behind a class that looks at a local disk without Beam; the other file sets their options.
FILE_SYSTEMS = "apache_beam.io.filesystems"
FILE_SYSTEM_FILES = {"transforms/storage/file_systems.py", "beam_pipelines/runtime/addresses.py"}

PACKAGE_EXTRAS = {"live", "examples"}  # tests and benchmarks may use them all
# What a module comes with, where the name does not say it; the last two are what Beam itself stands on.
DISTRIBUTION = {
    "yaml": "pyyaml",
    "google": "protobuf",
    "sklearn": "scikit-learn",
    "fastavro": "apache-beam",
    "grpc": "apache-beam",
}
# Functions that run in an environment of their own, which the file makes.
ELSEWHERE = {"benchmarks/features_join.py": {"feast"}}


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


def private(tree: ast.AST, path: str) -> Iterator[tuple[int, str]]:
    """Line and absolute name of every private name of a module of ours that a file reaches for."""
    modules = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            modules |= {alias.asname or alias.name: alias.name for alias in node.names}
    names = {name.rpartition(".")[2]: name for _, name in imported(tree, path)}
    for line, name in imported(tree, path):
        if any(re.match("_[^_]", part) for part in name.split(".")[1:]):
            yield line, name
    for node in ast.walk(tree):  # `tables._add` of an imported module
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and re.match("_[^_]", node.attr):
            module = names.get(modules.get(node.value.id, node.value.id), "")
            if (ROOT / Path(*module.split("."))).with_suffix(".py").exists():
                yield node.lineno, f"{module}.{node.attr}"


def within(name: str, module: str) -> bool:
    return name == module or name.startswith(f"{module}.")


def module_of(name: str) -> str:
    """The module of ours that an imported name is, or is in; "" where there is none."""
    parts = name.split(".")
    for end in range(len(parts), 0, -1):
        path = ROOT.joinpath(*parts[:end])
        if path.with_suffix(".py").exists() or (path / "__init__.py").exists():
            return ".".join(parts[:end])
    return ""


@functools.cache  # read once: a test per package asks for it
def used_outside() -> dict[str, set[tuple[str, str]]]:
    """(module, name) of everything in each package of `transforms` that another package, or a pipeline, uses."""
    used: dict[str, set[tuple[str, str]]] = {}
    for path in sources("transforms", "beam_pipelines"):
        tree, name = ast.parse(path.read_text(encoding="utf-8")), path.relative_to(ROOT).as_posix()
        here = package_of(name.removesuffix(".py").removesuffix("/__init__").replace("/", "."))
        modules: dict[str, str] = {}  # local name → module
        found: set[tuple[str, str]] = set()
        for node in ast.walk(tree):
            if not isinstance(node, ast.ImportFrom) or node.level or node.module is None:
                continue
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                if (module := module_of(full)) == full:
                    modules[alias.asname or alias.name] = full
                elif module:
                    found.add((module, alias.name))
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in modules:
                found.add((modules[node.value.id], node.attr))
        for module, each in found:
            package = package_of(module)
            # A function named as its module (`exact_sums`) is found in the module: the package's attribute is the
            # module.
            named_alike = module_of(f"{package}.{each}") == f"{package}.{each}"
            if package.count(".") == 1 and package.startswith("transforms.") and package != here and not named_alike:
                used.setdefault(package, set()).add((module, each))
    used.pop("transforms.public_names", None)
    return used


def package_of(name: str) -> str:
    """The entry of `ORDER` that a module, or a name in one, belongs to; "" where there is none."""
    return max((each for each in ORDER if within(name, each)), key=len, default="")


@functools.cache
def declared(folder: str) -> set[str]:
    """Distributions that setup.py lets this folder import."""
    constants = {
        node.targets[0].id: ast.literal_eval(node.value)
        for node in ast.parse((ROOT / "setup.py").read_text()).body
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name)
    }
    extras = constants["EXTRAS"]
    chosen = extras if folder not in PACKAGES else PACKAGE_EXTRAS
    requirements = constants["REQUIRES"] + [r for extra in chosen for r in extras[extra]]
    return {re.split(r"[\[<>=!~; ]", r)[0].lower() for r in requirements}


def faults(source: str, path: str) -> list[str]:
    """What a file imports against the plan, one line each."""
    top, found, tree = path.split("/")[0], [], ast.parse(source)
    this = path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
    mine = package_of(this)
    for line, name in imported(tree, path):
        other = name.split(".")[0]
        here = f"{path}:{line}: imports {name}"
        if LOOKED_UP.get(path) == name:
            continue
        if other in OURS:
            allowed = MAY_IMPORT.get(top, set(OURS)) | (
                {"beam_pipelines", "transforms", "examples"} if path.startswith(DEMONSTRATIONS) else set()
            )
            theirs = package_of(name)
            if other not in allowed:
                found.append(f"{here}; {top}/ may import only {', '.join(sorted(allowed))} of ours")
            elif mine in ONLY and theirs not in ONLY[mine] | {mine}:
                found.append(f"{here}; {mine} may import only {', '.join(sorted(ONLY[mine]))}")
            elif any(mine in one and theirs in two for one in PIPELINES for two in PIPELINES if one is not two):
                found.append(f"{here}; the pipelines meet only in tables, topics, files and the registry")
            elif mine and theirs and ORDER.index(theirs) > ORDER.index(mine) and not together(mine, theirs):
                found.append(f"{here}; {theirs} comes after {mine}")
            if top == "tests" and re.match("test_", name.split(".")[-2] if name.count(".") else ""):
                found.append(f"{here}; no test module imports another: put it into tests/support/")
            continue
        if other in sys.stdlib_module_names:
            continue
        if top == "schemas" and other not in SCHEMAS_THIRD_PARTY:
            found.append(f"{here}; schemas/ may import only {', '.join(sorted(SCHEMAS_THIRD_PARTY))}")
        if other == "tensorflow_data_validation" and top in PACKAGES and path not in TFDV_FILES:
            found.append(f"{here}; TFDV stays behind {', '.join(sorted(TFDV_FILES))}")
        if within(name, FILE_SYSTEMS) and top in PACKAGES and path not in FILE_SYSTEM_FILES:
            found.append(f"{here}; Beam's file systems stay behind transforms/storage/file_systems.py")
        if other in ELSEWHERE.get(path, ()):
            continue
        distribution = DISTRIBUTION.get(other, other.replace("_", "-").lower())
        if distribution not in declared(top):
            found.append(f"{here}; setup.py does not declare {distribution} for {top}/")
    if top in PACKAGES:
        for line, name in private(tree, path):
            if name.split(".")[0] in OURS and package_of(name) != mine:
                found.append(f"{path}:{line}: reaches for {name}; a name that begins with _ stays in its package")
    return found


def together(one: str, two: str) -> bool:
    return any(one in each and two in each for each in PIPELINES)


def sources(*folders: str) -> list[Path]:
    return sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))


def test_imports_follow_the_plan() -> None:
    found = [
        fault
        for path in sources(*CHECKED)
        for fault in faults(path.read_text(encoding="utf-8"), path.relative_to(ROOT).as_posix())
    ]
    assert not found, "\n".join(found)


def test_every_package_has_its_place_in_the_order() -> None:
    packages = {path.parent.relative_to(ROOT).as_posix().replace("/", ".") for path in sources("transforms", "schemas")}
    assert packages <= set(ORDER), f"not in ORDER: {sorted(packages - set(ORDER))}"


PUBLIC = sorted(path.parent.name for path in (ROOT / "transforms").glob("*/__init__.py"))


def listed(package: str) -> dict[str, str]:
    """Name → module of what a package of `transforms` lists as its public names."""
    return listed_names((ROOT / "transforms" / package / "__init__.py").read_text(encoding="utf-8"))


@pytest.mark.parametrize("package", PUBLIC)
def test_a_package_lists_what_others_use(package: str) -> None:
    names, text = listed(package), (ROOT / "transforms" / package / "__init__.py").read_text(encoding="utf-8")
    used = {name: module for module, name in used_outside().get(f"transforms.{package}", ())}
    missing = [f"    from {module} import {name}" for name, module in sorted(used.items()) if names.get(name) != module]
    assert not missing, f"transforms/{package}/__init__.py does not list:\n" + "\n".join(missing)
    assert not any(name.startswith("_") for name in names)
    assert not [name for name in names if (ROOT / "transforms" / package / f"{name}.py").exists()]
    assert ast.get_docstring(ast.parse(text))


@pytest.mark.parametrize("package", PUBLIC)
def test_a_listed_name_can_be_imported_from_its_package(package: str) -> None:
    module = importlib.import_module(f"transforms.{package}")
    for name, origin in listed(package).items():
        assert getattr(module, name) is getattr(importlib.import_module(origin), name)
        assert name in dir(module)
    with pytest.raises(AttributeError, match="no attribute 'no_such_name'"):
        _ = module.no_such_name


def test_a_package_is_imported_without_its_modules() -> None:
    imports = "; ".join(f"import transforms.{package}" for package in PUBLIC)
    program = f"import sys; {imports}; print(*sorted(name.split('.')[0] for name in sys.modules))"
    out = subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=True, capture_output=True, text=True)
    assert not {"apache_beam", "mlflow", "numpy", "polars", "pyarrow", "tensorflow", "xgboost"} & set(
        out.stdout.split()
    )


@pytest.mark.parametrize(
    ("path", "source", "fault"),
    [
        ("schemas/tables.py", "import apache_beam as beam", "schemas/ may import only polars, pyarrow"),
        (
            "schemas/tables.py",
            "def f():\n    from transforms.storage.delta_tables import read_file",
            "may import only schemas of ours",
        ),
        ("schemas/tables.py", "from ..transforms import storage", "may import only schemas of ours"),
        (
            "transforms/streaming/kafka.py",
            "from deploy.streaming.kafka import Broker",
            "may import only schemas, transforms",
        ),
        ("deploy/streaming/kafka.py", "from transforms.streaming import kafka", "may import only deploy, schemas"),
        (
            "transforms/models/scoring.py",
            "from beam_pipelines.features import Options",
            "may import only schemas, transforms",
        ),
        ("transforms/models/scoring.py", "import tensorflow_data_validation as tfdv", "TFDV stays behind"),
        ("transforms/models/scoring.py", "import_module('tensorflow_data_validation')", "TFDV stays behind"),
        ("transforms/models/scoring.py", "import torch", "setup.py does not declare torch"),
        ("transforms/models/scoring.py", "import pytest", "setup.py does not declare pytest for transforms/"),
        ("transforms/records/row_hashing.py", "from transforms.storage import paths", "comes after transforms.records"),
        ("transforms/records/row_hashing.py", "from ..features.kernel import compute", "comes after"),
        (
            "transforms/storage/vacuum.py",
            "def f():\n    from transforms.models import bundle",
            "transforms.models comes after transforms.storage",
        ),
        ("transforms/features/plan.py", "import transforms.streaming.journal", "comes after transforms.features"),
        (
            "transforms/verification/recompute.py",
            "from transforms.features.kernel import compute",
            "transforms.verification may import only",
        ),
        (
            "transforms/streaming/live_tables.py",
            "from transforms.storage.delta_tables import _paths",
            "begins with _ stays in its package",
        ),
        (
            "transforms/streaming/live_tables.py",
            "from transforms.storage import delta_tables as t\nt._paths()",
            "begins with _ stays in its package",
        ),
        (
            "transforms/training/trainer.py",
            "from apache_beam.io.filesystems import FileSystems",
            "stay behind transforms/storage/file_systems.py",
        ),
        ("beam_pipelines/training.py", "from beam_pipelines import features", "the pipelines meet only in"),
        ("beam_pipelines/training.py", "from .inference import build", "the pipelines meet only in"),
        ("beam_pipelines/training.py", "import_module('beam_pipelines.features_streaming')", "the pipelines meet only"),
        ("beam_pipelines/runtime/arguments.py", "from beam_pipelines.commands import plan", "comes after"),
        ("beam_pipelines/features.py", "from .commands.plan import main", "comes after beam_pipelines.features"),
        ("beam_pipelines/training.py", "from examples.flights import definition", "may import only beam_pipelines"),
        ("examples/flights/definition.py", "import beam_pipelines.cli", "may import only examples, schemas"),
        (
            "examples/flights/data.py",
            "from transforms.storage.delta_tables import read_file",
            "may import only examples, schemas",
        ),
        (
            "tests/streaming/test_live.py",
            "from tests.streaming.test_journal import run",
            "no test module imports another",
        ),
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
            "transforms/validation/tfdv_schema.py",
            "import tensorflow_data_validation as tfdv\nfrom google.protobuf import json_format",
        ),
        (
            "transforms/features/plan.py",
            "from ..sources import inventory\nfrom . import kernel\nfrom .kernel import _taken",
        ),
        ("transforms/serving.py", "from transforms.models.mlflow_pyfunc import load_pyfunc as _load_pyfunc"),
        ("transforms/verification/recompute.py", "from transforms.sources import reader\nimport schemas"),
        ("beam_pipelines/cli.py", "from beam_pipelines import features, inference, training"),
        ("beam_pipelines/features.py", "import_module('beam_pipelines.features_streaming')"),
        ("beam_pipelines/commands/plan.py", "from beam_pipelines import features\nfrom .trace import trace"),
        ("deploy/flights/batch.py", "from beam_pipelines import features"),
        (
            "deploy/flights/live.py",
            "from deploy.streaming.kafka import Broker\nfrom transforms.models.registry import Registry",
        ),
        ("tests/test_schemas.py", "import sklearn.metrics\nimport schemas\nfrom tests.support import shop"),
    ],
)
def test_an_import_within_the_plan_passes(path: str, source: str) -> None:
    assert faults(source, path) == []


def imported_at_once(module: str) -> set[str]:
    """The modules of ours that come in with a module; those that a function imports are left out."""
    found: set[str] = set()
    left = [module]
    while left:
        name = left.pop()
        path = ROOT / (name.replace(".", "/") + ".py")
        path = path if path.exists() else path.with_suffix("") / "__init__.py"
        if name in found or not path.exists():
            continue
        found.add(name)
        tree = ast.parse(path.read_text(encoding="utf-8"))
        top = ast.Module([node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)], [])
        for _, imports in imported(top, str(path.relative_to(ROOT))):
            left += [imports, imports.rpartition(".")[0]]
    return found


CODER = "transforms.records.record_batch_coder"
BUILDERS = [
    str(path.relative_to(ROOT))
    for folder in ("transforms", "beam_pipelines")
    for path in sorted((ROOT / folder).rglob("*.py"))
    if re.search(r"RecordBatch", path.read_text(encoding="utf-8"))
    and re.search(r"^(import|from) apache_beam", path.read_text(encoding="utf-8"), re.MULTILINE)
]


@pytest.mark.parametrize("path", BUILDERS)
def test_what_builds_steps_over_record_batches_registers_their_coder(path: str) -> None:
    assert CODER in imported_at_once(path.removesuffix(".py").replace("/", "."))


def test_steps_over_record_batches_are_found() -> None:
    assert {"transforms/storage/table_transforms.py", "transforms/features/trailing_features.py"} <= set(BUILDERS)
    assert CODER not in imported_at_once("transforms.records.record_batches")


def test_schemas_is_imported_in_under_half_a_second_and_alone() -> None:
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
        for pattern in ("*.py", "*.pbtxt", "*.html.j2", "*.css")
        for folder in PACKAGES
        for path in (ROOT / folder).rglob(pattern)
    }
    assert ours <= set(names), f"not in the wheel: {sorted(ours - set(names))}"


def test_lock_covers_what_setup_declares() -> None:
    locked = {re.split("==", line)[0] for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line}
    assert declared("tests") <= locked
    assert not re.search("file:|https?:", (ROOT / "constraints.txt").read_text())
