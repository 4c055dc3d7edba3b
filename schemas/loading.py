"""Finds the views and models in the files that a user wrote."""

from __future__ import annotations

import ast
import contextlib
import dataclasses
import functools
import hashlib
import importlib
import io
import pkgutil
import re
import sys
import sysconfig
import tokenize
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path, PurePosixPath
from types import ModuleType
from typing import TypeVar

from schemas.errors import DefinitionError, MillraceError, nearest
from schemas.models import Model
from schemas.sources import Source
from schemas.views import FeatureView

Named = TypeVar("Named", Source, FeatureView, Model)


@dataclasses.dataclass(frozen=True, eq=False)
class Definition:
    """One view of a loaded definition, and a model over it.

    `path` is its file; `model` is missing where only features are wanted, or where several models are over the view.

    `source` is the text that was loaded.  `modules` are the sources of the modules that it imports, installed ones left
    out, by their path below a folder of imports, as `rates/fees.py`.  `project` is what it was chosen from.
    """

    name: str
    path: str
    view: FeatureView
    model: Model | None
    source: bytes = b""
    modules: Mapping[str, bytes] = dataclasses.field(default_factory=dict)
    project: Project | None = None

    @property
    def schema_path(self) -> str:
        """Where the schema of its features stands, if there is one: beside the definition.

        Raises:
            DefinitionError: there is one that may be of any of several views.
        """
        shared, own = (Path(self.path).with_name(name) for name in ("schema.pbtxt", f"{self.view.name}.schema.pbtxt"))
        if own.exists():
            return str(own)
        if not self.is_one_of_several:
            return str(shared)
        if self.project is not None and self.project.main_view == self.view.name and shared.exists():
            return str(shared)
        if shared.exists() and (self.project is None or self.project.main_view is None):
            raise DefinitionError(
                f"Each of the views of {self.name} must have a schema of its own",
                f"{shared} is not named after a view",
                f"Rename it to that of its view, as {own.name}",
            )
        return str(own)

    @property
    def is_one_of_several(self) -> bool:
        """Whether the project has other views."""
        return self.project is not None and len(self.project.views) > 1

    @property
    def flags(self) -> str:
        """The flags of a command that mean this view, as they are written."""
        return f"--definition {self.name}" + (f" --view {self.view.name}" if self.is_one_of_several else "")

    @property
    def digest(self) -> str:
        """SHA-256 of the file's text; of a package, of the texts of all its modules."""
        if not self.path.endswith("__init__.py"):
            return hashlib.sha256(Path(self.path).read_bytes()).hexdigest()
        files = sorted((path.as_posix(), path.read_bytes()) for path in Path(self.path).parent.rglob("*.py"))
        root = len(Path(self.path).parent.as_posix())
        return hashlib.sha256(b"".join(path[root:].encode() + b"\n" + text for path, text in files)).hexdigest()

    def require_model(self) -> Model:
        if self.model is None:
            over = [] if self.project is None else self.project.models_over(self.view)
            if over:
                names = ", ".join(each.name for each in over)
                raise DefinitionError(
                    f"One of the models of {self.name} must be chosen", f"there are {names}", "Choose one with --model"
                )
            raise DefinitionError(
                f"{self.name} must name a model", "it names only a view", "Write model = Model(view, …)"
            )
        return self.model


@dataclasses.dataclass(frozen=True, eq=False)
class Project:
    """Everything that a definition names: a module, or a package of modules.

    Args:
        name: what it was loaded by.
        path: its file; of a package its `__init__.py`.
        views: by name, as they stand in the file.
        models: by name.
        sources: by name, those that views and labels read.
        source, modules: as in `Definition`.
        main_view: the name of the view that the file calls `view`, or that its `model` reads; None if there is none.
        main_model: the name of the model that it calls `model`.
    """

    name: str
    path: str
    views: Mapping[str, FeatureView]
    models: Mapping[str, Model]
    sources: Mapping[str, Source]
    source: bytes = b""
    modules: Mapping[str, bytes] = dataclasses.field(default_factory=dict)
    main_view: str | None = None
    main_model: str | None = None

    def models_over(self, view: FeatureView) -> list[Model]:
        """The models whose first view this is."""
        return [model for model in self.models.values() if model.view.name == view.name]

    def definition(self, view: str | None = None, model: str | None = None) -> Definition:
        """The one view that is meant, with its model if one is meant or there is only one over it.

        Where several could be meant and none is named, it is what the file calls `view` and `model`.

        Raises:
            DefinitionError: several views could be meant, or one is named that is not there.
        """
        if model is not None:
            chosen = self._named("model", self.models, model)
            if view is not None and self._named("view", self.views, view).name not in (v.name for v in chosen.views):
                read = ", ".join(each.name for each in chosen.views)
                raise DefinitionError(
                    f"--view must be one that model {model!r} reads, that is {read}",
                    f"it is {view}",
                    "Leave --view out",
                )
            return self._of(chosen.view if view is None else self.views[view], chosen)
        view = self.main_view if view is None else view
        if view is None and len(self.views) > 1:
            raise DefinitionError(
                f"One of the views of {self.name} must be chosen",
                f"there are {', '.join(self.views)}",
                "Choose one with --view",
            )
        found = next(iter(self.views.values())) if view is None else self._named("view", self.views, view)
        over = self.models_over(found)
        main = [each for each in over if each.name == self.main_model]
        return self._of(found, over[0] if len(over) == 1 else next(iter(main), None))

    def each_view(self, view: str | None = None, model: str | None = None) -> list[Definition]:
        """Every view, or the one that is named; of a model those that it reads."""
        if view is None and model is not None:
            return [self.definition(each.name) for each in self._named("model", self.models, model).views]
        return [self.definition(name) for name in ([view] if view is not None else self.views)]

    def each_model(self, view: str | None = None, model: str | None = None) -> list[Definition]:
        """Every model, or the one that is named, or those that read one view.

        Raises:
            DefinitionError: there is none.
        """
        if model is not None:
            return [self.definition(view, model)]
        read = None if view is None else self._named("view", self.views, view)
        names = {each.name: {of.name for of in each.views} for each in self.models.values()}
        found = [each for each in self.models.values() if read is None or read.name in names[each.name]]
        if not found:
            what = "only a view" if len(self.views) == 1 else "none, only views"
            about = self.name if read is None else f"{self.name} over view {view!r}"
            raise DefinitionError(
                f"A model must be named in {about}", f"there is {what}", "Write model = Model(view, …)"
            )
        return [self._of(each.view, each) for each in found]

    def _of(self, view: FeatureView, model: Model | None) -> Definition:
        return Definition(self.name, self.path, view, model, self.source, self.modules, self)

    def _named(self, kind: str, known: Mapping[str, Named], name: str) -> Named:
        if name not in known:
            there = f"the {kind}s {', '.join(known)}" if known else f"the {kind}s (there are none)"
            raise DefinitionError(
                f"--{kind} must be one of {there} of {self.name}", f"it is {name}", nearest(name, known)
            )
        return known[name]


_RULE = "The definition must be an importable module or a .py file, or the folder of a package"


def load_definition(name: str, view: str | None = None, model: str | None = None) -> Definition:
    """Load a definition, and choose one view of it; see `load_project` and `Project.definition`."""
    return load_project(name).definition(view, model)


def load_project(name: str) -> Project:
    """Import a module or package (`examples.flights.definition`, `shop`), a file or a package's folder.

    Every public module-level name counts, of a package those of all its modules that import `schemas`; its tests are
    left out.

    Raises:
        DefinitionError: not found, no view in it, refused by the definition itself, or two things of one name.
    """
    before = set(sys.modules)
    folder = Path(name)
    in_folder = not name.endswith(".py") and (folder / "__init__.py").is_file() and "." not in folder.name
    in_folder = in_folder and (len(folder.parts) > 1 or not name.isidentifier())
    if in_folder:
        with _imports_from(folder.resolve().parent, {folder.resolve().name}):
            before = set(sys.modules)
            return _project(name, _imported(name, lambda: importlib.import_module(folder.resolve().name)), before)
    if not name.endswith(".py") and not all(part.isidentifier() for part in name.split(".")):
        raise DefinitionError(
            _RULE, f"it is {name!r}", "Write it like examples.flights.definition, or path/definition.py"
        )
    found = _project(name, _file(folder) if name.endswith(".py") else _module(name), before)
    if name.endswith(".py"):  # another definition may have other neighbours of these names
        for path in found.modules:
            loaded = module_name(path)
            if loaded not in before:
                sys.modules.pop(loaded, None)
    return found


def _project(name: str, module: ModuleType, before: set[str]) -> Project:
    """What the modules of a loaded definition name."""
    parts = [module, *_inside(name, module)]
    source = _read(getattr(module, "__file__", None))
    modules = neighbours(module, before, [each.__name__ for each in parts[1:]])
    public = [value for part in parts for key, value in vars(part).items() if not key.startswith("_")]
    models = _by_name("model", [each for each in public if isinstance(each, Model)], _model_content)
    views = [each for each in public if isinstance(each, FeatureView)]
    views += [view for model in models.values() for view in model.views]
    for wrong in ("view", "model"):
        value, kind = getattr(module, wrong, None), FeatureView if wrong == "view" else Model
        if value is not None and not isinstance(value, kind | ModuleType):
            raise DefinitionError(
                f"{name} must name a FeatureView `view` and a Model `model`",
                f"{wrong}={value!r}",
                "Write view = FeatureView(…) and model = Model(view, …)",
            )
    named = _by_name("view", views, _view_content)
    if not named:
        rule = f"{name} must name a FeatureView `view`, or several under any public names"
        raise DefinitionError(rule, "there is none", "Write view = FeatureView(…)")
    sources = [source for view in named.values() for source in (view.spine, *view.sources.values())]
    sources += [model.label.source for model in models.values()]
    known = _by_name("source", sources, _source_content)
    view, model = (getattr(module, each, None) for each in ("view", "model"))
    main_model = model if isinstance(model, Model) else None
    main_view = view if isinstance(view, FeatureView) else None if main_model is None else main_model.view
    return Project(
        name,
        str(module.__file__),
        named,
        models,
        known,
        source,
        modules,
        None if main_view is None else main_view.name,
        None if main_model is None else main_model.name,
    )


def _inside(name: str, module: ModuleType) -> list[ModuleType]:
    """The modules of a package that import `schemas`, imported; its tests are left out."""
    found = []
    for path in sorted(getattr(module, "__path__", ())):
        for each in pkgutil.walk_packages([path], module.__name__ + ".", onerror=lambda _: None):
            inner = each.name.rsplit(".", 1)[-1]
            if re.fullmatch(r"tests?|test_.*|.*_test|conftest|__main__", inner):
                continue
            file = Path(path, *each.name.removeprefix(module.__name__ + ".").split("."))
            text = file / "__init__.py" if each.ispkg else file.with_suffix(".py")
            if text.is_file() and _imports_schemas(text.read_bytes(), str(text)):
                found.append(_imported(name, functools.partial(importlib.import_module, each.name)))
    return found


def _imports_schemas(source: bytes, path: str) -> bool:
    try:
        tree = ast.parse(source)
    except SyntaxError as error:
        raise DefinitionError(
            f"{path} must be valid Python", f"line {error.lineno}: {error.msg}", "Correct it"
        ) from None
    imports = [each for each in ast.walk(tree) if isinstance(each, ast.Import | ast.ImportFrom)]
    names = [node.module or "" for node in imports if isinstance(node, ast.ImportFrom) and not node.level]
    names += [alias.name for node in imports if isinstance(node, ast.Import) for alias in node.names]
    return any(name.split(".")[0] == "schemas" for name in names)


def _by_name(kind: str, found: Iterable[Named], content: Callable[[Named], object]) -> dict[str, Named]:
    """What was found, by name, each once.

    Raises:
        DefinitionError: two of one name are not the same.
    """
    result: dict[str, Named] = {}
    for each in found:
        other = result.setdefault(each.name, each)
        if other is not each and content(other) != content(each):
            fix = "Give one of them name=…" if kind == "model" else "Rename one of them, or import it from the other"
            raise DefinitionError(
                f"A name must stand for one {kind}",
                f"there is {each.name!r} at {other.place} and, with other content, at {each.place}",
                fix,
            )
    return result


def _source_content(source: Source) -> object:
    return [getattr(source, field.name) for field in dataclasses.fields(source) if field.name != "place"]


def _view_content(view: FeatureView) -> object:
    return view.fingerprint, view.spine.name


def _model_content(model: Model) -> object:
    kept = [field.name for field in dataclasses.fields(model) if field.name not in ("view", "others", "label", "place")]
    views = [(view.name, view.fingerprint) for view in model.views]
    return views, model.problem, [getattr(model, name) for name in kept]


def load_recorded(name: str, source: str, modules: Mapping[str, str], folder: Path) -> Project:
    """Load a definition from its recorded text and that of its neighbours, whatever stands in their places now.

    Args:
        name: the name by which it was loaded, a module or a file.
        source: its text.
        modules: texts of the modules that it imports, by path (see `Definition`).
        folder: an empty folder, in which they are written.

    Raises:
        DefinitionError: as `load_definition`; or a path leaves the folder.
    """
    by_file = name.endswith(".py")
    if not by_file and not all(part.isidentifier() for part in name.split(".")):
        name = Path(name).name  # a package's folder
    own = Path(name).name if by_file else name.replace(".", "/") + ".py"
    if not by_file and any(path.startswith(name.replace(".", "/") + "/") for path in modules):
        own = f"{name.replace('.', '/')}/__init__.py"
    files = {**modules, own: source}
    for path, text in files.items():
        parts = PurePosixPath(path).parts
        if not parts or not all(part.removesuffix(".py").isidentifier() for part in parts[:-1]) or ".." in parts:
            raise DefinitionError(
                "The recorded modules of a definition must be in one folder", f"{path!r} is not", "Restore it"
            )
        for depth in range(1, len(parts)):  # a package with this name elsewhere must not be found first
            package = folder.joinpath(*parts[:depth])
            package.mkdir(exist_ok=True)
            (package / "__init__.py").touch()
        folder.joinpath(*parts).write_bytes(_encoded(text))
    names = {module_name(path) for path in modules} | (set() if by_file else {name})
    with _imports_from(folder, names):
        return load_project(str(folder / own) if by_file else name)


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


def neighbours(module: ModuleType, before: Iterable[str] = (), inside: Iterable[str] = ()) -> dict[str, bytes]:
    """The sources of all modules that a definition's module imports, also through others; installed ones are left out.

    Args:
        module: the module of the definition.
        before: names of modules that were imported before it was.
        inside: names of further modules of the definition, if it is a package.
    """
    waiting = [name for name in sys.modules if name not in before] + list(_imported_by(module, _read(module.__file__)))
    waiting += inside
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
        raise DefinitionError(_RULE, "it is a module without a Python file")
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
        raise DefinitionError(_RULE, f"there is no file {path}", "Check the path")
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
                f"for {name!r}, there is no module {error.name!r}",
                "Check the name, or give a path that ends in .py",
            ) from None
        raise DefinitionError(
            f"{name} must import only installed modules",
            f"there is no module {error.name!r}",
            "Install it, or remove the import",
        ) from None
    except SyntaxError as error:
        raise DefinitionError(
            f"{name} must be valid Python", f"line {error.lineno}: {error.msg}", "Correct the file"
        ) from None
    except (Exception, SystemExit) as error:
        ours = (__file__, importlib.__file__, "<frozen")
        frames = traceback.extract_tb(error.__traceback__)
        line = next((each for each in frames if not each.filename.startswith(ours)), frames[-1])
        raise DefinitionError(
            f"{name} must be importable",
            f"line {line.lineno} of {line.filename}: {type(error).__name__}: {error}",
            "Correct the file",
        ) from error
