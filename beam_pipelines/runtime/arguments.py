"""Flags of the commands: Millrace's are checked here, and the others go to Beam."""

from __future__ import annotations

import argparse
import contextlib
import difflib
import os
import re
import uuid
from collections.abc import Callable, Sequence
from datetime import date
from typing import TYPE_CHECKING, NoReturn

from beam_pipelines.runtime.addresses import local_path, usable_address
from schemas.errors import DefinitionError, nearest

if TYPE_CHECKING:
    from schemas.loading import Definition

# If more than half of the rows are rejected, the source itself is at fault.
MAX_DEAD_FRACTION = 0.5


class Parser(argparse.ArgumentParser):
    """An argparse parser whose errors are those of Millrace."""

    def error(self, message: str) -> NoReturn:
        raise DefinitionError(f"{self.prog}: {message}", None, f"See {self.prog} --help")


class _FirstAndAll(argparse.Action):
    """Keeps the first value of a flag under its name, and all values under its plural."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: str | Sequence[object] | None,
        option_string: str | None = None,
    ) -> None:
        values_so_far = [*getattr(namespace, f"{self.dest}s", []), values]
        setattr(namespace, self.dest, values_so_far[0])
        setattr(namespace, f"{self.dest}s", values_so_far)


class Arguments(Parser):
    """An argparse parser that passes unknown flags on to Beam, unless one is almost a flag of Millrace.

    >>> arguments = Arguments("millrace features", "Compute features.")
    >>> namespace, beam_args = arguments.parse(["--definition", "d", "--store", "s", "--runner=PrismRunner"])
    >>> beam_args
    ['--runner=PrismRunner']

    Args:
        prog: the command, such as `millrace features`.
        description: what the command does.
        definition: whether --definition is required; None means that there is no such flag.
        beam: whether the command launches a pipeline, and so has --run_id and accepts flags for Beam.
        every: `view` or `model`, if the command works on all views or models of the definition unless one is chosen;
            `all`, if none can be chosen.
        several: whether --definition may be repeated; `definition` is then the first one, and `definitions` all.
    """

    def __init__(
        self,
        prog: str,
        description: str,
        definition: bool | None = True,
        beam: bool = True,
        every: str = "",
        several: bool = False,
    ) -> None:
        beyond = "Any other flag goes to Beam: --runner, --job_endpoint, --project, …" if beam else None
        super().__init__(prog=prog, description=description, allow_abbrev=False, epilog=beyond)
        if definition is not None:
            text = "module, package or .py file that names views and models"
            if several:
                text += "; repeated: a job of several views, the newest definition first"
                self.add_argument("--definition", required=definition, action=_FirstAndAll, help=text)
            else:
                self.add_argument("--definition", required=definition, help=text)
            for kind in ("view", "model") if every != "all" else ():
                default = (
                    f"every {kind}" if kind == every else "what the other flags leave open" if every else "the only one"
                )
                self.add_argument(
                    f"--{kind}", metavar="NAME", help=f"a {kind} that the definition names (default: {default})"
                )
        self.add_argument(
            "--store",
            required=True,
            help="folder (or gs://, s3:// address) that holds sources, tables and the registry",
        )
        if beam:
            self.add_argument(
                "--run_id",
                default=None,
                type=file_name_part,
                help="id of the run; a run with the same id is resumed (default: a new one)",
            )

    def add_interval(self, of: str) -> None:
        """Add --start and --end."""
        self.add_argument("--start", type=utc_day, help=f"first UTC day of {of}, like 2013-01-01 (default: the first)")
        self.add_argument("--end", type=utc_day, help="the UTC day after the last (default: the day after the last)")

    def add_schema(self) -> None:
        """Add --schema."""
        self.add_argument("--schema", help="the use case's schema.pbtxt (default: beside the definition)")

    def add_validation(self) -> None:
        """Add --schema, --allow_anomalies and --max_dead_fraction, which decide what may be published."""
        self.add_schema()
        self.add_argument(
            "--allow_anomalies", action="store_true", help="publish what breaks the schema; recorded in the commit"
        )
        self.add_argument(
            "--max_dead_fraction",
            type=fraction,
            default=MAX_DEAD_FRACTION,
            help=f"stop if a greater share of a source's rows breaks its contract (default {MAX_DEAD_FRACTION:g})",
        )

    def parse(self, argv: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
        """Parse Millrace's flags; returns them and the flags for Beam.

        Raises:
            DefinitionError: an unknown flag differs by at most two letters from one of Millrace's, a word belongs to no
                flag, or the interval is empty.
            StoreError: nothing can be stored at the address of --store or --sources.
        """
        namespace, rest = self.parse_known_args(list(argv))
        ours = [option for action in self._actions for option in action.option_strings if option.startswith("--")]
        for word in rest:
            name = word.split("=")[0]
            if not name.startswith("-") and rest.index(word) == 0:
                self.error(f"{name!r} belongs to no flag")
            near = [
                option
                for option in ours
                if name.startswith("--")
                and name not in ours
                and _edits(name.replace("-", "_"), option.replace("-", "_")) <= 2
            ]
            if near and not _known_to_beam(name):
                self.error(f"unknown flag {name}; did you mean {near[0]}?")
        start, end = getattr(namespace, "start", None), getattr(namespace, "end", None)
        if start is not None and end is not None and start >= end:
            self.error(f"--start {start} comes before --end {end}; the end is the day after the last")
        for name in ("store", "sources", "definition", "batch_store", "output_tfrecord", "input_tfrecord"):
            require_usable_path(name, getattr(namespace, name, None))
        namespace.store = local_path(usable_address("--store", namespace.store, rest))
        if getattr(namespace, "sources", None):
            namespace.sources = usable_address("--sources", namespace.sources, rest)
        if getattr(namespace, "run_id", "") is None:
            namespace.run_id = uuid.uuid4().hex[:12]
        return namespace, rest

    def parse_all(self, argv: Sequence[str]) -> argparse.Namespace:
        """Parse the flags of a command that passes none on to Beam."""
        namespace, rest = self.parse(argv)
        if rest:
            ours = [option for action in self._actions for option in action.option_strings]
            self.error(f"unknown flag {rest[0]}; {nearest(rest[0].split('=')[0], ours)}")
        return namespace


def require_usable_path(flag: str, text: str | None) -> None:
    """Refuses a path that a library would read as another one, before anything is written.

    delta-rs decodes `%20` in a path, reads a backslash as a slash, and accepts no control characters; neither libraries
    nor logs accept bytes that are not UTF-8.

    Raises:
        DefinitionError: see above.
    """
    if text is None:
        return
    rule, fix = f"The path of --{flag} must consist of plain characters", "Rename the folder"
    if any(not letter.isprintable() for letter in text):
        shown = text.encode("unicode_escape", "surrogatepass").decode()
        raise DefinitionError(rule, f"{shown} has characters that cannot be printed", fix)
    if "://" not in text and (found := re.search(r"%[0-9A-Fa-f]{2}|\\", os.path.abspath(text))):
        raise DefinitionError(rule, f"in {text}, {found[0]} stands for another letter", fix)


def _edits(a: str, b: str) -> int:
    """The number of letters to replace, insert or remove to turn one word into the other, as difflib aligns them.

    >>> _edits("--store", "--stroe"), _edits("--start", "--stat")
    (2, 1)
    """
    changes = difflib.SequenceMatcher(None, a, b, autojunk=False).get_opcodes()
    return sum(max(i2 - i1, j2 - j1) for kind, i1, i2, j1, j2 in changes if kind != "equal")


def _known_to_beam(flag: str) -> bool:
    from apache_beam.options.pipeline_options import PipelineOptions

    parser = argparse.ArgumentParser(add_help=False, conflict_handler="resolve")
    for options in PipelineOptions.__subclasses__():
        options._add_argparse_args(parser)
    return flag in parser._option_string_actions


def utc_day(text: str) -> date:
    """Parse a UTC day."""
    try:
        return date.fromisoformat(text)
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"{text!r} is not a day like 2013-01-31 (intervals are whole UTC days)"
        ) from None


def file_name_part(text: str) -> str:
    """Check that the text can be part of file names."""
    if not text or not all(letter.isalnum() or letter in "-_" for letter in text) or len(text) > 64:
        raise argparse.ArgumentTypeError(f"{text!r} is not made of letters, digits, - and _")
    return text


def _within(text: str, accepts: Callable[[float], bool], what: str) -> float:
    """Whether a number is between two bounds; NaN never is."""
    with contextlib.suppress(ValueError):
        if accepts(value := float(text)):
            return value
    raise argparse.ArgumentTypeError(f"{text!r} is not {what}")


def fraction(text: str) -> float:
    """Parse a number from 0 to 1."""
    return _within(text, lambda value: 0 <= value <= 1, "a fraction from 0 to 1")


def whole(least: int, most: int) -> Callable[[str], int]:
    """A parser of whole numbers between two bounds.

    >>> whole(1, 9)("4")
    4
    """

    def parsed(text: str) -> int:
        if not re.fullmatch(r"-?[0-9]{1,19}", text) or not least <= int(text) <= most:
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from {least} to {most}")
        return int(text)

    return parsed


def finite_number(text: str) -> float:
    """Parse a finite number that is not negative."""
    return _within(text, lambda value: 0 <= value < float("inf"), "a number from 0 on")


# XGBoost starts any requested number of threads.
threads = whole(0, 1024)


def run_of_model(run_id: str, definition: Definition, models: int) -> str:
    """The id of the run of one of so many models: of several each has a run of its own."""
    return run_id if models == 1 else f"{run_id}-{definition.require_model().name}"
