"""Commands of the model registry: `models`, `promote`, `rollback`, `register`."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from datetime import UTC, datetime

from beam_pipelines.runtime.arguments import Arguments, file_name_part
from beam_pipelines.runtime.terminal import columns
from schemas.errors import DataError, GateError, StoreError
from transforms.models.registry import Registry, registry_uri
from transforms.models.stored_records import ChampionMove
from transforms.storage.file_systems import FileSystems


def _arguments(command: str, text: str, why: bool = False) -> Arguments:
    arguments = Arguments(f"millrace {command}", text, definition=None, beam=False)
    arguments.add_argument("--registry", help="MLflow tracking URI (default: SQLite under <store>/registry)")
    if command != "register":
        arguments.add_argument("--model", help="its registered name (default: the only one)")
    if why:
        arguments.add_argument("--why", required=True, help="the reason, which is recorded with the move")
        arguments.add_argument("--who", help="who decided (default: the user of this machine)")
    return arguments


def _named(flags: argparse.Namespace) -> tuple[Registry, str]:
    """The registry, and the name of the model that the flags select."""
    registry = Registry(registry_uri(flags.store, flags.registry))
    names = sorted({name for name, _ in registry.models()})
    if flags.model is None and len(names) == 1:
        return registry, names[0]
    if flags.model is None or flags.model not in names:
        value = f"{', '.join(names) or 'no model'} in {registry.uri}"
        fix = "Name one with --model" if names else "Train one with: millrace training"
        raise DataError("A model is named where there are several, and is registered", value, fix)
    return registry, flags.model


def models(argv: Sequence[str]) -> int:
    """List registered models: versions, test metrics, the alias, and the verdicts of their gates."""
    flags = _arguments("models", models.__doc__ or "").parse_all(argv)
    registry = Registry(registry_uri(flags.store, flags.registry))
    names = sorted(
        {name for name, _ in registry.models()} & ({flags.model} if flags.model else set())
        or {name for name, _ in registry.models() if not flags.model}
    )
    if not names:
        raise DataError(
            "Models are registered before they are listed",
            f"none in {registry.uri}",
            "Train one with: millrace training",
        )
    for name in names:
        rows = []
        for each in registry.versions(name):
            tested = {
                key.removeprefix("test_"): value for key, value in each.metrics.items() if key.startswith("test_")
            }
            shown = ", ".join(f"{key} {value:.4f}" for key, value in sorted(tested.items()))
            at = f"{datetime.fromtimestamp(each.at / 1000, UTC):%Y-%m-%d %H:%M}"
            rows.append((each.version, "champion" if each.champion else "", at, each.run, each.gates, shown))
        print(name)
        print(columns(("version", "alias", "registered (UTC)", "run", "gates", "test metrics"), rows, "version"))
        for entry in registry.records(name):
            print(f"  {entry['at'][:16].replace('T', ' ')}  {_move(entry)}: {entry['why']} ({entry['who']})")
    return 0


def _move(entry: ChampionMove) -> str:
    """A move of the alias, as text."""
    if entry["before"] == entry["version"]:
        return f"version {entry['version']} was champion already"
    return f"version {entry['version']} champion" + (f" after version {entry['before']}" if entry["before"] else "")


def promote(argv: Sequence[str]) -> int:
    """Give a version the alias champion, whether or not its gates hold; who, when and why are recorded."""
    arguments = _arguments("promote", promote.__doc__ or "", why=True)
    arguments.add_argument("version", help="a registered version's number")
    flags = arguments.parse_all(argv)
    registry, name = _named(flags)
    before = registry.promote(name, flags.version, flags.why, flags.who)
    if before == flags.version:
        print(f"{name}: version {before} is champion already")
    else:
        print(f"{name}: version {flags.version} is champion, after {'version ' + before if before else 'none'}")
    return 0


def rollback(argv: Sequence[str]) -> int:
    """Give the alias back to the previous champion; who, when and why are recorded."""
    flags = _arguments("rollback", rollback.__doc__ or "", why=True).parse_all(argv)
    registry, name = _named(flags)
    before, after = registry.rollback(name, flags.why, flags.who)
    print(f"{name}: version {after} is champion again, after version {before}")
    return 0


def register(argv: Sequence[str]) -> int:
    """Register a model that was trained while the registry could not be reached."""
    # The other commands here need neither Beam nor XGBoost.
    from transforms.training.publish_model import failed_gates, register_run

    arguments = _arguments("register", register.__doc__ or "")
    arguments.add_argument("run", type=file_name_part, help="the run that trained it")
    flags = arguments.parse_all(argv)
    folder = FileSystems.join(flags.store, "runs", flags.run)
    if "://" not in folder and not os.path.isdir(folder):
        raise StoreError(
            "A model is trained before it is registered",
            f"no run {flags.run} in {flags.store}",
            f"Run: millrace training --run_id {flags.run}",
        )
    done = register_run(folder, flags.run, registry_uri(flags.store, flags.registry))
    champion = f"version {done['champion']}" if done["champion"] else "none"
    kept = f" ({done['kept']})" if done["kept"] else ""
    print(f"{done['model']}: version {done['model_version']} is registered; the champion is {champion}{kept}")
    if failed := failed_gates(done):
        raise GateError(
            f"Version {done['model_version']} of {done['model']} passes its gates to become champion",
            "; ".join(f"{each['gate']}: {each['reason']}" for each in failed),
            f"Improve the model, or promote it by hand: millrace promote {done['model_version']} --why …",
        )
    return 0
