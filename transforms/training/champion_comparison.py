"""Evaluation of the champion on a challenger's test rows, if necessary with the rows of its own feature table for the
same times."""

from __future__ import annotations

import dataclasses
import logging
from datetime import date, timedelta

import apache_beam as beam
from apache_beam.pvalue import AsSingleton

from schemas import Model
from schemas.errors import MillraceError, StoreError
from schemas.splits import LABEL, Split
from transforms.evaluation.evaluate import Evaluate, Report
from transforms.evaluation.gates import Rival, may_know
from transforms.models.bundle import Bundle
from transforms.models.registry import Registry
from transforms.models.scoring import PinnedModel, Score, open_scorer
from transforms.storage.delta_tables import data_files, open_table
from transforms.storage.paths import features_uri
from transforms.training.champion_rows import OwnRows, OwnTable
from transforms.training.examples import schema_of
from transforms.training.publish_model import rival_of

log = logging.getLogger("millrace.training")


@dataclasses.dataclass(frozen=True, eq=False)
class Challenge:
    """A model that is compared with the champion.

    Args:
        model: the challenger.
        registry: MLflow tracking URI.
        run_id: id of its run; a promotion that an earlier attempt of this run made is ignored.
        store: folder of the feature tables.
        threads: XGBoost's threads.
    """

    model: Model
    registry: str
    run_id: str
    store: str
    threads: int


@dataclasses.dataclass(eq=False)  # Beam sets the label
class CompareWithChampion(beam.PTransform):
    """PCollection[RecordBatch] of test examples → one `Rival`: the champion's report on these rows, or why it has none.

    The champion is looked up and loaded when the graph is built.
    """

    challenge: Challenge
    split: Split

    def expand(self, rows: beam.PCollection) -> beam.PCollection:
        found = comparison(self.challenge, self.split)
        if isinstance(found, Rival):
            if found.version is not None:
                log.warning("version %s is not compared with, and stays champion: %s", found.version, found.reason)
            return rows.pipeline | "Rival" >> beam.Create([found])
        missing: beam.PCollection | None = None
        if found.own:
            rows, missing = rows | "ChampionRows" >> OwnRows(found.own)
        scored = rows | "ScoreChampion" >> Score(found.pinned, threads=self.challenge.threads, carry=(LABEL,))
        report = scored | "EvaluateChampion" >> Evaluate(self.challenge.model, slices=False)
        sides = [] if missing is None else [AsSingleton(missing)]
        return report | "Rival" >> beam.Map(rival, *sides, version=found.pinned.version, caveats=found.caveats)


@dataclasses.dataclass(frozen=True)
class ChampionComparison:
    """How the champion is evaluated on the test rows.

    Args:
        pinned: the champion.
        caveats: of the comparison (see `Rival`).
        own: its own feature tables, if it reads other features.
    """

    pinned: PinnedModel
    caveats: str
    own: tuple[OwnTable, ...] = ()


def rival(report: Report, missing: int = 0, *, version: str, caveats: str) -> Rival:
    """The champion with its report, which is used only if it covers every test row."""
    if missing:
        reason = (
            f"its feature table lacks, or cannot read, {missing} of {report.rows + missing} test rows; "
            "compute them with its own definition, and train again"
        )
        return Rival(version, None, reason)
    return Rival(version, report, caveats=caveats)


def comparison(challenge: Challenge, split: Split) -> ChampionComparison | Rival:
    """How the champion is evaluated on the test rows of `split`, or a `Rival` with the reason why it cannot be."""
    model, registry, version = challenge.model, Registry(challenge.registry), None
    try:
        if (version := rival_of(registry, model.name, challenge.run_id)) is None:
            return Rival()
        _, folder = registry.resolve(model.name, version)
        pinned = PinnedModel(folder, version)
        bundle = open_scorer(pinned, challenge.threads).bundle
    except MillraceError as error:
        log.warning("no champion to compare with: %s", error)
        return Rival(version, None, f"the champion could not be read ({error.rule}: {error.value})")
    caveats = may_know(bundle.manifest, split)
    if bundle.manifest["objective"] != model.objective:
        return Rival(version, None, f"version {version} has the objective {bundle.manifest['objective']}")
    inputs = tuple(bundle.encoders.inputs)
    same = bundle.fingerprint == model.rows.fingerprint and all(
        model.rows.origins[name].name == each["view"]
        for each in bundle.manifest.get("views") or ()
        for name in each["inputs"]
    )
    if same and set(inputs) <= set(schema_of(model).names):
        return ChampionComparison(pinned, caveats)
    return own_comparison(challenge, split, bundle, ChampionComparison(pinned, caveats))


def own_comparison(
    challenge: Challenge, split: Split, bundle: Bundle, found: ChampionComparison
) -> ChampionComparison | Rival:
    """`found` with the champion's own feature table, or a `Rival` with the reason why that cannot be used."""
    version, manifest = found.pinned.version, bundle.manifest
    reads = f"version {version} reads features of fingerprint {bundle.fingerprint}"
    if (list(manifest["key"]), manifest["time"]) != (list(challenge.model.view.key), challenge.model.view.time):
        return Rival(
            version, None, f"version {version} is keyed by {', '.join(manifest['key'])} and {manifest['time']}"
        )
    views = manifest.get("views") or [
        {"view": manifest["view"], "fingerprint": bundle.fingerprint, "inputs": tuple(bundle.encoders.inputs)}
    ]
    tables, versions = list[OwnTable](), list[int]()
    for each in views:
        try:
            table = open_table(features_uri(challenge.store, each["view"], each["fingerprint"]))
            if table is None:
                return Rival(version, None, f"{reads}, of which there is no table in {challenge.store}")
            files = tuple(data_files(table))
        except StoreError as error:
            return Rival(version, None, f"{reads}, whose table cannot be read: {error.value}")
        if split.test_start is not None:
            # A file's date is the first of its partition, which may begin before the test.
            first = max((file.date for file in files if file.date <= split.test_start.date()), default=date.min)
            files = tuple(file for file in files if first <= file.date < split.cutoff.date() + timedelta(days=1))
        tables.append(OwnTable(files, tuple(manifest["key"]), manifest["time"], tuple(each["inputs"])))
        versions.append(table.version())
    which = f"version {', '.join(map(str, versions))}"
    used = f"{reads}, and was tested on its own table's rows of the same moments ({which})"
    return dataclasses.replace(
        found, own=tuple(tables), caveats="; ".join(each for each in (found.caveats, used) if each)
    )
