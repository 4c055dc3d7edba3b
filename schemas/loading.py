"""Finds `view` and `model` in the file a user wrote."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib
import importlib.util
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

from schemas.errors import DefinitionError, MillraceError
from schemas.models import Model
from schemas.views import FeatureView


@dataclasses.dataclass(frozen=True, eq=False)
class Definition:
    """A loaded definition.  `path` is its file; `model` may be missing where only features are wanted."""

    name: str
    path: str
    view: FeatureView
    model: Model | None

    @property
    def schema_path(self) -> str:
        """Where the schema of its features stands, if there is one: beside the definition."""
        return str(Path(self.path).with_name("schema.pbtxt"))

    @property
    def digest(self) -> str:
        """SHA-256 of the file's text."""
        return hashlib.sha256(Path(self.path).read_bytes()).hexdigest()

    def require_model(self) -> Model:
        if self.model is None:
            raise DefinitionError(f"{self.name} names a model", "only a view", "Write model = Model(view, …)")
        return self.model


def load_definition(name: str) -> Definition:
    """Import a module (`examples.flights.definition`) or a file (`path/to/definition.py`).

    Raises:
        DefinitionError: not found, no `view` in it, or refused by the definition itself.
    """
    module = _file(Path(name)) if name.endswith(".py") else _module(name)
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
    return Definition(name, str(module.__file__), view, model)


def _module(name: str) -> ModuleType:
    if "" not in sys.path and str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    return _imported(name, lambda: importlib.import_module(name))


def _file(path: Path) -> ModuleType:
    if not path.is_file():
        raise DefinitionError("The definition is an importable module or a .py file", str(path), "No such file")
    name = f"millrace_definition_{abs(hash(str(path.resolve())))}"
    module = ModuleType(name)
    module.__file__ = str(path)
    sys.modules[name] = module

    def run() -> ModuleType:
        # From its text: byte code kept beside it would be stale when the file is changed twice within a second.
        exec(compile(path.read_bytes(), str(path), "exec"), module.__dict__)
        return module

    return _imported(str(path), run)


def _imported(name: str, load: Callable[[], ModuleType]) -> ModuleType:
    """What `load` gives; whatever goes wrong in a user's file is a user's mistake, told with its line.

    Raises:
        DefinitionError: the file's own refusals pass as they are.
    """
    try:
        return load()
    except MillraceError:
        raise
    except ModuleNotFoundError as error:
        if error.name and (name == error.name or name.startswith(error.name + ".")):
            raise DefinitionError(
                "The definition is an importable module or a .py file",
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
    except Exception as error:
        ours = (__file__, importlib.__file__, "<frozen")
        frames = traceback.extract_tb(error.__traceback__)
        line = next((each for each in frames if not each.filename.startswith(ours)), frames[-1])
        raise DefinitionError(
            f"{name} can be imported",
            f"{type(error).__name__}: {error}, line {line.lineno} of {line.filename}",
            "Correct the file",
        ) from error
