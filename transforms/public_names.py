"""Names that a package lists in its `__init__` and imports when they are first used.

A package shows what it offers as ordinary imports under `if TYPE_CHECKING:`, which type checkers and editors follow.
Python does not run them, so that importing one module of a package does not import Beam, MLflow and XGBoost as well.
"""

from __future__ import annotations

import ast
import importlib
import inspect
import sys


def listed_names(source: str) -> dict[str, str]:
    """Name → module of every `from … import …` under `if TYPE_CHECKING:` in the source of a package's `__init__`."""
    return {
        alias.asname or alias.name: str(statement.module)
        for block in ast.parse(source).body
        if isinstance(block, ast.If) and ast.unparse(block.test) == "TYPE_CHECKING"
        for statement in block.body
        if isinstance(statement, ast.ImportFrom)
        for alias in statement.names
    }


def import_when_used(package: str) -> None:
    """Let `package` import each name that it lists when the name is first used (PEP 562).

    Args:
        package: name of a package that is being imported: its `__name__`.
    """
    module = sys.modules[package]
    names: dict[str, str] = {}

    def listed() -> dict[str, str]:
        if not names:
            names.update(listed_names(inspect.getsource(module)))
        return names

    def load(name: str) -> object:
        if name == "__all__":
            return sorted(listed())
        if name.startswith("__") or name not in listed():
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        value = getattr(importlib.import_module(listed()[name]), name)
        setattr(module, name, value)
        return value

    module.__dict__["__getattr__"] = load
    module.__dict__["__dir__"] = lambda: sorted({*module.__dict__, *listed()})
