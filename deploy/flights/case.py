"""One live run of the flights example: its sources, its two models, and where its results go."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from schemas.errors import GateError
from schemas.loading import load_definition
from schemas.views import FeatureView

if TYPE_CHECKING:
    from transforms.models.registry import Registry

DEFINITION = "examples.flights.definition"
# The model that takes over halfway: the same with fewer rounds.
SECOND = (
    "import dataclasses\n\nfrom examples.flights.definition import model as first, view\n\n"
    "model = dataclasses.replace(first, rounds=150)\n"
)
Figures = dict[str, Any]  # time format of run.json and status.json


@dataclasses.dataclass(frozen=True)
class Case:
    """One live run.

    Args:
        store: the store that holds the sources and the models.
        folder: where the run's results go.
        start: first UTC day, inclusive.
        end: last UTC day, exclusive.
        seconds: how long the replay takes.
        first: version of the model that is champion at the start; "" to compute only features.
        second: version that takes over halfway.
    """

    store: Path
    folder: Path
    start: str
    end: str
    seconds: float
    first: str
    second: str

    @property
    def live(self) -> Path:
        """The live store."""
        return self.folder / "store"

    @functools.cached_property
    def view(self) -> FeatureView:
        return load_definition(DEFINITION).view

    @property
    def registry(self) -> list[str]:
        """Flags of a job that takes its models from `store`."""
        return [f"--registry=sqlite:///{self.store}/registry/mlflow.db"]

    @property
    def common(self) -> list[str]:
        """Flags of every job on the live store."""
        return ["--definition", DEFINITION, "--store", str(self.live)]

    @property
    def speed(self) -> float:
        """Simulated seconds per second."""
        return (_time(self.end) - _time(self.start)) / self.seconds

    @property
    def halfway(self) -> float:
        """The simulated time at which the second model takes over, seconds since 1970."""
        return (_time(self.start) + _time(self.end)) / 2


def _time(day: str) -> float:
    return datetime.fromisoformat(day).replace(tzinfo=UTC).timestamp()


def models(store: Path) -> tuple[str, str]:
    """Two registered versions, the champion first; everything that they lack is made."""
    from transforms.models.registry import Registry, registry_uri

    name, registry = load_definition(DEFINITION).require_model().name, Registry(registry_uri(str(store)))
    for definition in (DEFINITION, str(second_definition(store))):
        if len(versions(registry, name)) < (1 if definition == DEFINITION else 2):
            from beam_pipelines import features, training

            if definition == DEFINITION:
                features.main(["--definition", DEFINITION, "--store", str(store)])
            with contextlib.suppress(GateError):  # it is registered anyway
                training.main(["--definition", definition, "--store", str(store)])
    champion, known = registry.champion(name), versions(registry, name)
    first = champion or known[0]
    return first, next(version for version in reversed(known) if version != first)


def versions(registry: Registry, name: str) -> list[str]:
    """Registered versions of a model, oldest first."""
    return [version for model, version in registry.models() if model == name]


def second_definition(store: Path) -> Path:
    """The file of the second model, written into the store."""
    path = store / "second_definition.py"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(SECOND)
    return path


@contextlib.contextmanager
def swapping(case: Case) -> Iterator[Callable[[], None]]:
    """A function that makes the second version champion; afterwards the first is champion again."""
    from transforms.models.registry import Registry, registry_uri

    if not case.first:
        yield lambda: None
        return
    name, registry = load_definition(DEFINITION).require_model().name, Registry(registry_uri(str(case.store)))

    def promote(version: str, why: str) -> None:
        registry.promote(name, version, why)

    promote(case.first, "./run_local.sh stream begins with it")
    try:
        yield lambda: promote(case.second, "./run_local.sh stream swaps halfway")
    finally:
        promote(case.first, "./run_local.sh stream has ended")
