"""`millrace`: the three pipelines, and the commands that inspect or change a store.

This module imports neither Beam nor Polars, so that `millrace --help` is fast; a command imports only what it needs.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence

from beam_pipelines.runtime.interrupts import as_process

# Command → (module or module:function, purpose).  The module is imported when the command is called: some import
# TensorFlow or MLflow.
COMMANDS = {
    "features": ("beam_pipelines.features", "compute a view's features and commit them to its table"),
    "training": ("beam_pipelines.training", "train a model on a feature table, evaluate it, register it"),
    "retrain": (
        "beam_pipelines.commands.retrain",
        "train a registered version again from its own record, and compare",
    ),
    "inference": ("beam_pipelines.inference", "score feature rows with a registered model"),
    "schema": ("beam_pipelines.commands.schema", "infer, check or update the schema.pbtxt that features must match"),
    "plan": ("beam_pipelines.commands.plan", "print what `features` would do, and run nothing"),
    "parity": ("beam_pipelines.commands.parity", "recompute live feature rows in batch, and compare them bit by bit"),
    "verify": (
        "beam_pipelines.commands.verify",
        "recompute rows of a feature table independently, and compare them bit by bit",
    ),
    "tables": ("beam_pipelines.commands.tables:tables", "list every table of a store"),
    "trace": (
        "beam_pipelines.commands.trace:trace",
        "follow a feature row or a prediction back to what it was made from",
    ),
    "vacuum": ("beam_pipelines.commands.vacuum:vacuum", "remove files that no commit names and no kept version needs"),
    "compact": ("beam_pipelines.commands.compact:compact", "merge small files of tables, also while live jobs run"),
    "erase": ("beam_pipelines.commands.erase", "remove rows of a source and all that was made from them, for good"),
    "models": ("beam_pipelines.commands.models:models", "list registered models, their metrics, the champion, and why"),
    "promote": ("beam_pipelines.commands.models:promote", "make a version the champion, with a reason"),
    "rollback": (
        "beam_pipelines.commands.models:rollback",
        "give the alias back to the previous champion, with a reason",
    ),
    "register": (
        "beam_pipelines.commands.models:register",
        "register a model that was trained while the registry could not be reached",
    ),
    "test": (
        "beam_pipelines.commands.run_tests:test",
        "run the tests beside a definition, in a moment and without Beam",
    ),
    "new": ("beam_pipelines.commands.new", "write a definition that runs as it is"),
}
USAGE = (
    "usage: millrace COMMAND [flags]\n\n{commands}\n\n"
    "Every command has --help.  Flags it does not know go to Beam (--runner=…)."
)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code; without `argv`, the command of this process."""
    return as_process(_main, sys.argv[1:]) if argv is None else _main(list(argv))


def _main(arguments: Sequence[str]) -> int:
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        width = max(map(len, COMMANDS))
        print(USAGE.format(commands="\n".join(f"  {name:<{width}}  {text}" for name, (_, text) in COMMANDS.items())))
        return 0 if arguments else 2
    from beam_pipelines.runtime.errors import guard

    return guard(_run)(arguments)


def _run(argv: Sequence[str]) -> int:
    """Imports the command's module and calls it."""
    from schemas.errors import DefinitionError, nearest

    command, *rest = argv
    if command not in COMMANDS:
        rule = f"millrace has the commands {', '.join(COMMANDS)}"
        raise DefinitionError(rule, repr(command), nearest(command, COMMANDS))
    module, _, function = COMMANDS[command][0].partition(":")
    return int(getattr(importlib.import_module(module), function or "main")(rest))


if __name__ == "__main__":
    sys.exit(main())
