"""Finds `view` and `model` in a user's file."""

from __future__ import annotations

import ast
import contextlib
import dataclasses
import hashlib
import importlib
import importlib.util
import io
import sys
import sysconfig
import tokenize
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path, PurePosixPath
from types import ModuleType

from schemas.errors import DefinitionError, MillraceError
from schemas.models import Model
from schemas.views import FeatureView


@dataclasses.dataclass(frozen=True, eq=False)
class Definition:
    """A loaded definition.  `path` is its file; `model` may be missing if only features are needed.

    `source` is the text that was loaded.  `modules` are the texts of the modules that it imports, without installed
    ones, by their path below an import folder, such as `rates/fees.py`.
    """

    name: str
    path: str
    view: FeatureView
    model: Model | None
    source: bytes = b""
    modules: Mapping[str, bytes] = dataclasses.field(default_factory=dict)

    @property
    def schema_path(self) -> str:
        """The path of the schema of its features, if there is one: beside the definition."""
        return str(Path(self.path).with_name("schema.pbtxt"))

    @property
    def digest(self) -> str:
        """SHA-256 of the file's text."""
        return hashlib.sha256(Path(self.path).read_bytes()).hexdigest()

    def require_model(self) -> Model:
        if self.model is None:
            raise DefinitionError(f"{self.name} names a model", "only a view", "Write model = Model(view, …)")
        return self.model


_RULE = "The definition is an importable module or a .py file"


def load_definition(name: str) -> Definition:
    """Imports a module (`examples.flights.definition`) or a file (`path/to/definition.py`).

    Raises:
        DefinitionError: it is not found, it has no `view`, or the definition in it is refused.
    """
    before = set(sys.modules)
    if not name.endswith(".py") and not all(part.isidentifier() for part in name.split(".")):
        raise DefinitionError(_RULE, repr(name), "Name it like examples.flights.definition, or path/definition.py")
    module = _file(Path(name)) if name.endswith(".py") else _module(name)
    source, modules = _read(getattr(module, "__file__", None)), neighbours(module, before)
    if name.endswith(".py"):  # another definition may have other neighbours of these names
        for path in modules:
            loaded = module_name(path)
            if loaded not in before:
                sys.modules.pop(loaded, None)
    model = getattr(module, "model", None)
    view = getattr(module, "view", None) or getattr(model, "view", None)
    if not isinstance(view, FeatureView) or not isinstance(model, Model | None):
        raise DefinitionError(
            f"{name} names a FeatureView `view` and a Model `model`",
            f"view={view!r}, model={model!r}",
            "Write view = FeatureView(…) and model = Model(view, …)",
        )
    if model is not None and model.view is not view:
        raise DefinitionError(
            f"{name}: the model reads the view of the same file",
            f"{model.view.name!r} and {view.name!r}",
            "Write model = Model(view, …)",
        )
    return Definition(name, str(module.__file__), view, model, source, modules)


def load_recorded(name: str, source: str, modules: Mapping[str, str], folder: Path) -> Definition:
    """Loads a definition from its recorded text and that of its neighbours, whatever is in their places now.

    Args:
        name: the name by which it was loaded, a module or a file.
        source: its text.
        modules: texts of the modules that it imports, by path (see `Definition`).
        folder: an empty folder, in which they are written.

    Raises:
        DefinitionError: as `load_definition`; or a path leaves the folder.
    """
    own = name.replace(".", "/") + ".py" if not name.endswith(".py") else Path(name).name
    if not name.endswith(".py") and f"{name.replace('.', '/')}/__init__.py" in modules:
        own = f"{name.replace('.', '/')}/__init__.py"
    files = {**modules, own: source}
    for path, text in files.items():
        parts = PurePosixPath(path).parts
        if not parts or not all(part.removesuffix(".py").isidentifier() for part in parts[:-1]) or ".." in parts:
            raise DefinitionError("The recorded modules of a definition lie in one folder", repr(path), "Restore it")
        for depth in range(1, len(parts)):  # a package with this name elsewhere must not be found first
            package = folder.joinpath(*parts[:depth])
            package.mkdir(exist_ok=True)
            (package / "__init__.py").touch()
        folder.joinpath(*parts).write_bytes(_encoded(text))
    names = {module_name(path) for path in modules} | ({name} if not name.endswith(".py") else set())
    with _imports_from(folder, names):
        return load_definition(str(folder / own) if name.endswith(".py") else name)


def decode_python(source: bytes) -> str:
    """The text of a Python file, in the encoding that it declares."""
    return source.decode(tokenize.detect_encoding(io.BytesIO(source).readline)[0])


def _encoded(text: str) -> bytes:
    return text.encode(tokenize.detect_encoding(io.BytesIO(text.encode()).readline)[0])


def module_name(path: str) -> str:
    """The name of the module for a path below an import folder.

    >>> module_name("rates/fees.py"), module_name("rates/__init__.py")
    ('rates.fees', 'rates')
    """
    return path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")


def neighbours(module: ModuleType, before: Iterable[str] = ()) -> dict[str, bytes]:
    """The texts of all modules that a definition's module imports, directly or not, without installed ones.

    Args:
        module: the module of the definition.
        before: names of modules that were imported before it was.
    """
    waiting = [name for name in sys.modules if name not in before] + list(_imported_by(module, _read(module.__file__)))
    found: dict[str, bytes] = {}
    seen = {module.__name__}
    while waiting:
        name = waiting.pop()
        if name in seen or (each := sys.modules.get(name)) is None:
            continue
        seen.add(name)
        if not _is_of_user(each):
            continue
        source = _read(each.__file__)
        found[name.replace(".", "/") + ("/__init__.py" if hasattr(each, "__path__") else ".py")] = source
        waiting += _imported_by(each, source)
    return dict(sorted(found.items()))


def _imported_by(module: ModuleType, source: bytes) -> Iterator[str]:
    """Names of modules, and of packages above them, that a text may import; some of them name attributes instead."""
    package = module.__package__ or ""
    names = [module.__name__]
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names += [each.name for each in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                above = package.rsplit(".", node.level - 1)[0] if node.level > 1 else package
                base = f"{above}.{base}".strip(".")
            names += [f"{base}.{each.name}" for each in node.names]
    for name in names:
        parts = name.split(".")
        yield from (".".join(parts[: depth + 1]) for depth in range(len(parts)))


def _is_of_user(module: ModuleType) -> bool:
    """Whether a module is a Python file that is neither installed nor a part of Millrace."""
    file = getattr(module, "__file__", None)
    if not file or not file.endswith(".py") or not Path(file).is_file():
        return False
    path = Path(file).resolve()
    root = Path(__file__).resolve().parents[1]
    ours = [root / name for name in ("schemas", "transforms", "beam_pipelines")]
    installed = [Path(sysconfig.get_path(name)).resolve() for name in ("stdlib", "platstdlib", "purelib", "platlib")]
    return not any(path.is_relative_to(each) for each in (*ours, *installed))


def _read(path: str | None) -> bytes:
    if path is None:
        raise DefinitionError(_RULE, "a module that is no Python file")
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise DefinitionError(_RULE, f"{path}: {error.strerror}") from None


@contextlib.contextmanager
def _imports_from(folder: Path, names: Iterable[str]) -> Iterator[None]:
    """Imports look in `folder` first; the packages of `names` are imported anew meanwhile, and restored afterwards."""
    tops = {name.partition(".")[0] for name in names}

    def taken() -> dict[str, ModuleType]:
        return {name: sys.modules.pop(name) for name in list(sys.modules) if name.partition(".")[0] in tops}

    kept = taken()
    sys.path.insert(0, str(folder))
    importlib.invalidate_caches()
    try:
        yield
    finally:
        sys.path.remove(str(folder))
        taken()
        sys.modules.update(kept)


def _module(name: str) -> ModuleType:
    if "" not in sys.path and str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    return _imported(name, lambda: importlib.import_module(name))


def _file(path: Path) -> ModuleType:
    if not path.is_file():
        raise DefinitionError(_RULE, str(path), "No such file")
    name = f"millrace_definition_{abs(hash(str(path.resolve())))}"
    module = ModuleType(name)
    module.__file__ = str(path)
    sys.modules[name] = module

    def run() -> ModuleType:
        # The module is compiled from its text: cached byte code would be stale if the file changed twice within a
        # second.
        folder, writes = str(path.resolve().parent), sys.dont_write_bytecode
        sys.path.insert(0, folder)  # so that it can import its neighbours, like a script
        sys.dont_write_bytecode = True
        try:
            exec(compile(path.read_bytes(), str(path), "exec"), module.__dict__)
        finally:
            sys.dont_write_bytecode = writes
            sys.path.remove(folder)
        return module

    return _imported(str(path), run)


def _imported(name: str, load: Callable[[], ModuleType]) -> ModuleType:
    """Calls `load`, and reports any error in a user's file as a user's mistake, with its line.

    Raises:
        DefinitionError: see above; a DefinitionError from the file itself is raised unchanged.
    """
    try:
        return load()
    except MillraceError:
        raise
    except ModuleNotFoundError as error:
        if error.name and (name == error.name or name.startswith(error.name + ".")):
            raise DefinitionError(
                _RULE,
                repr(name),
                f"No module {error.name!r} here: check the name, or give a path ending in .py",
            ) from None
        raise DefinitionError(
            f"{name} imports what is installed", f"no module {error.name!r}", "Install it, or remove the import"
        ) from None
    except SyntaxError as error:
        raise DefinitionError(
            f"{name} is valid Python", f"{error.msg}, line {error.lineno}", "Correct the file"
        ) from None
    except (Exception, SystemExit) as error:
        ours = (__file__, importlib.__file__, "<frozen")
        frames = traceback.extract_tb(error.__traceback__)
        line = next((each for each in frames if not each.filename.startswith(ours)), frames[-1])
        raise DefinitionError(
            f"{name} can be imported",
            f"{type(error).__name__}: {error}, line {line.lineno} of {line.filename}",
            "Correct the file",
        ) from error
