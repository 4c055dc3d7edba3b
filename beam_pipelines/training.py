"""training: features and labels → examples → trials → evaluation of the best model → gates → registry."""

from __future__ import annotations

import argparse
import dataclasses
import logging
import os
import re
import sys
import time
from collections.abc import Sequence

import apache_beam as beam
from apache_beam.pvalue import AsSingleton

from beam_pipelines.runtime.arguments import Arguments, run_of_model, threads, utc_day, whole
from beam_pipelines.runtime.errors import guard
from beam_pipelines.runtime.local_runner import batch_pipeline
from beam_pipelines.runtime.run_report import Run, execute
from schemas.errors import DefinitionError, GateError, MillraceError, StoreError
from schemas.feature_rows import MISSING
from schemas.loading import Definition, decode_python, load_project
from transforms.evaluation.evaluate import Evaluate, tally_columns
from transforms.evaluation.shap import Explain
from transforms.models.bundle import load_bundle
from transforms.models.problem_identity import require_same_problem
from transforms.models.registry import Registry, preparing_database, registry_uri
from transforms.models.scoring import PinnedModel, Score
from transforms.models.stored_records import ProvenanceRecord, TrainingRecord
from transforms.storage.file_systems import FileSystems
from transforms.training.champion_comparison import Challenge, CompareWithChampion
from transforms.training.data_checks import STATISTICS, FindLeaks, check_data, model_columns
from transforms.training.examples import (
    ExamplePlan,
    MakeExamples,
    add_accounts,
    delete_files,
    read_shard,
    require_usable,
    shards_to_test,
)
from transforms.training.fit_encoders import FitEncoders, declared_inputs
from transforms.training.float32_checks import lost_digits
from transforms.training.hyperparameter_search import first_trials
from transforms.training.preparation import TrainingRequest, prepare_training
from transforms.training.publish_model import (
    BUNDLE,
    REPORT,
    Publication,
    RunOutcome,
    failed_gates,
    publish_trained_model,
    read_record,
    rival_of,
)
from transforms.training.trainer import BundleRequest, Study, Train, save_best
from transforms.training.unseen_categories import warn_of_unseen
from transforms.training.xgboost_data import examples_of_fold
from transforms.validation.statistics import Statistics

log = logging.getLogger("millrace.training")


@dataclasses.dataclass(frozen=True, eq=False)
class TrainingOptions(TrainingRequest):
    """The options of one run: what to train, and how to run it.

    Args:
        registry: MLflow tracking URI.
        beam_args: flags for Beam.
    """

    registry: str
    beam_args: tuple[str, ...]

    @property
    def folder(self) -> str:
        """Folder of the run's report, trials and bundle."""
        return FileSystems.join(self.store, "runs", self.run_id)

    @property
    def bundle(self) -> str:
        return FileSystems.join(self.folder, BUNDLE)


def _arguments() -> Arguments:
    arguments = Arguments(
        "millrace training", "Train models on feature tables, evaluate and register them.", every="model"
    )
    arguments.add_argument("--sources", help="folder of the sources (default: <store>/sources)")
    arguments.add_argument(
        "--features_version",
        type=table_version,
        action="append",
        default=[],
        metavar="[VIEW=]VERSION",
        help="version of the feature table, or of that of one view (default: the newest)",
    )
    arguments.add_argument("--start", type=utc_day, help="first UTC day of features used (default: the first)")
    arguments.add_argument(
        "--cutoff",
        type=utc_day,
        help="UTC day before which everything is known (default: the day after the last of the feature table)",
    )
    arguments.add_argument("--registry", help="MLflow tracking URI (default: SQLite under <store>/registry)")
    arguments.add_argument(
        "--threads",
        type=threads,
        default=0,
        help="cores that the trials of one worker share (default: those of this machine)",
    )
    arguments.add_argument(
        "--device", type=device, default="cpu", help="XGBoost's device: cpu (default), cuda or cuda:N"
    )
    arguments.add_argument(
        "--keep_examples",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="keep TFRecord and Parquet examples (default: yes)",
    )
    return arguments


def parse(argv: Sequence[str]) -> TrainingOptions:
    """Parse flags that mean one model into options.

    Raises:
        DefinitionError: a flag or the definition is not valid, or several models are meant.
    """
    found = parse_each(argv)
    if len(found) > 1:
        names = ", ".join(each.model.name for each in found)
        raise DefinitionError("One model must be chosen", f"there are {names}", "Choose one with --model")
    return found[0]


def parse_each(argv: Sequence[str]) -> list[TrainingOptions]:
    """Parse flags into the options of each model that is meant.

    Of several models each has a run of its own, whose id ends in its name.

    Raises:
        DefinitionError: a flag or the definition is not valid.
    """
    flags, rest = _arguments().parse(argv)
    definitions = load_project(flags.definition).each_model(flags.view, flags.model)
    now = time.time_ns() // 1000
    return [
        TrainingOptions(
            definition=definition,
            store=flags.store,
            sources=flags.sources or FileSystems.join(flags.store, "sources"),
            run_id=run_of_model(flags.run_id, definition, len(definitions)),
            features_versions=_versions(flags.features_version, definition),
            start=flags.start,
            cutoff=flags.cutoff,
            registry=registry_uri(flags.store, flags.registry),
            cores=flags.threads or os.cpu_count() or 1,
            device=flags.device,
            keep_examples=flags.keep_examples,
            now=now,
            beam_args=tuple(rest),
            label_version=None,
        )
        for definition in definitions
    ]


def _versions(given: Sequence[tuple[str, int]], definition: Definition) -> dict[str, int]:
    """Versions of feature tables by view; one without a view is that of a model's only view.

    Raises:
        DefinitionError: the model has several views.
    """
    views = definition.require_model().views
    if any(not name for name, _ in given) and len(views) > 1:
        names = ", ".join(view.name for view in views)
        raise DefinitionError(
            "--features_version must name its view, because the model reads several",
            f"there are {names}",
            f"Write --features_version {views[0].name}=…",
        )
    return {name or views[0].name: version for name, version in given}


def table_version(text: str) -> tuple[str, int]:
    """Parse `VERSION` or `VIEW=VERSION`; the view is empty if it is not named."""
    view, _, version = text.rpartition("=")
    return view, whole(0, 2**62)(version)


def device(text: str) -> str:
    """Check that XGBoost has a device of this name."""
    if not re.fullmatch(r"cpu|cuda(:\d+)?", text):
        raise argparse.ArgumentTypeError(f"{text!r} is not cpu, cuda or cuda:N")
    return text


@dataclasses.dataclass(frozen=True)
class Tested:
    """A trained and evaluated model in the graph: PCollections of one element each."""

    report: beam.PCollection
    trained: beam.PCollection
    account: beam.PCollection
    findings: beam.PCollection
    rows: beam.PCollection


def build(pipeline: beam.Pipeline, options: TrainingOptions, plan: ExamplePlan, provenance: ProvenanceRecord) -> None:
    """Builds the graph.  The steps before the last write files and return their names; the last makes the model
    visible."""
    tested = train_and_test(pipeline, options, plan, provenance, champion_of(options))
    rival = tested.rows | "Compare" >> CompareWithChampion(challenge_of(options), plan.split)
    explained = tested.rows | "Explain" >> Explain(options.model, PinnedModel(options.bundle), options.cores)
    sides = [AsSingleton(each) for each in (tested.trained, tested.account, tested.findings, rival, explained)]
    outcome = tested.report | "Outcome" >> beam.Map(RunOutcome, *sides)
    _ = outcome | "Publish" >> beam.Map(publish_trained_model, publication(options))


def train_and_test(
    pipeline: beam.Pipeline,
    options: TrainingOptions,
    plan: ExamplePlan,
    provenance: ProvenanceRecord,
    champion: tuple[str, bytes] | None = None,
) -> Tested:
    """Build the graph up to the evaluated model.

    Args:
        champion: the champion's version and the statistics of its training data, to compare with.
    """
    model = options.model
    blocks = pipeline | "Blocks" >> beam.Create(list(plan.blocks))
    accounts, learning = blocks | "Examples" >> MakeExamples(plan)
    account = (
        accounts | "Account" >> beam.CombineGlobally(add_accounts) | "Check" >> beam.Map(require_usable, plan.alone)
    )
    statistics = learning | "Statistics" >> Statistics(model_columns(model))
    leaks = learning | "Leaks" >> beam.CombineGlobally(FindLeaks.of(model))
    fitted = [
        learning
        | f"Fold{i}" >> beam.Map(examples_of_fold, model, fold)
        | f"FitFold{i}" >> FitEncoders(declared_inputs(model))
        for i, fold in enumerate(plan.split.folds)
    ]
    fitted.append(learning | "Fit" >> FitEncoders(declared_inputs(model)))
    study = Study(model, plan.split, options.folder, options.cores, options.device)
    tried = pipeline | "Trials" >> beam.Create(first_trials(model)) | "Train" >> Train(study, account, fitted)
    sides = AsSingleton(account), AsSingleton(fitted[-1]), AsSingleton(statistics)
    trained = (
        tried
        | "Gather" >> beam.combiners.ToList()
        | "Save" >> beam.Map(save_best, BundleRequest(model, options.bundle, provenance), *sides)
    )
    tests = trained | "TestFiles" >> beam.FlatMap(shards_to_test, AsSingleton(account)) | "Spread" >> beam.Reshuffle()
    rows = tests | "Read" >> beam.FlatMap(read_shard)
    scored = rows | "Score" >> Score(
        PinnedModel(options.bundle), threads=options.cores, carry=tally_columns(model.gates)
    )
    tested = rows | "TestStatistics" >> Statistics(model_columns(model))
    findings = statistics | "Examine" >> beam.Map(check_data, AsSingleton(tested), AsSingleton(leaks), model, champion)
    findings = findings | "Unseen" >> beam.Map(
        warn_of_unseen, AsSingleton(statistics), AsSingleton(tested), tuple(model.inputs)
    )
    findings = findings | "Digits" >> beam.Map(lost_digits, AsSingleton(statistics), AsSingleton(account), model)
    return Tested(scored | "Evaluate" >> Evaluate(model), trained, account, findings, rows)


def champion_of(options: TrainingOptions) -> tuple[str, bytes] | None:
    """The champion's version and the statistics of its training data; None without a champion that can be read."""
    registry, name = Registry(options.registry), options.model.name
    try:
        version = rival_of(registry, name, options.run_id)
        if version is None:
            return None
        bundle = load_bundle(registry.resolve(name, version)[1])
    except MillraceError as error:
        log.warning("nothing to compare the training data with: %s", error)
        return None
    return (version, bundle.extra[STATISTICS]) if STATISTICS in bundle.extra else None


def challenge_of(options: TrainingOptions) -> Challenge:
    return Challenge(options.model, options.registry, options.run_id, options.store, options.cores)


def publication(options: TrainingOptions) -> Publication:
    model = options.model
    text = decode_python(options.definition.source)
    return Publication(
        model.name, model.metric, model.gates, options.registry, options.run_id, options.folder, {"definition.py": text}
    )


def resolve(options: TrainingOptions) -> tuple[ExamplePlan, ProvenanceRecord]:
    """Fix the versions that the run reads; see `transforms.training.preparation.prepare_training`."""
    return prepare_training(options)


def main(argv: Sequence[str]) -> int:
    """Run the pipeline; returns 0 if the model is registered and every gate holds."""
    every, failures = parse_each(argv), list[GateError]()
    for options in every:
        try:
            train_one(options, several=len(every) > 1)
        except GateError as error:  # the other models are trained all the same
            failures.append(error)
            if len(every) > 1:
                log.warning("%s", error)
    if len(failures) == 1:
        raise failures[0]
    if failures:
        value = "; ".join(f"{error.rule}: {error.value}" for error in failures)
        raise GateError("Models pass their gates to become champions", value, "Improve them, or promote them by hand")
    return 0


def train_one(options: TrainingOptions, several: bool) -> None:
    """Train, evaluate and register one model.

    Args:
        several: whether the command trains other models too.

    Raises:
        GateError: it is registered, and not every gate holds.
    """
    with Run("training", options.run_id, options.folder) as run:
        run.words = ("--model", options.model.name) if several else ()
        check_problem(options)
        plan, provenance = resolve(options)
        pipeline = batch_pipeline(options.beam_args)
        build(pipeline, options, plan, provenance)
        with preparing_database(options.registry):
            execute(pipeline)
        report = read_record(TrainingRecord, options.folder, REPORT)
        run.update(training_figures(report))
        if not options.keep_examples:
            delete_files([options.examples])
    if failed := failed_gates(report):
        raise GateError(
            f"Version {report['model_version']} of {report['model']} must pass its gates to become champion",
            "; ".join(f"{each['gate']}: {each['reason']}" for each in failed),
            f"It is registered; the champion is {'version ' + report['champion'] if report['champion'] else 'none'}. "
            f"Improve the model, or promote it by hand: millrace promote {report['model_version']} --why …",
        )


def check_problem(options: TrainingOptions) -> None:
    """Refuses before training what registering would refuse afterwards.  An unreachable registry only causes a warning.

    Raises:
        MismatchError: the model's name stands for another problem.
    """
    try:
        require_same_problem(Registry(options.registry), options.model.name, options.model.problem)
    except StoreError as error:
        log.warning("whether the name %r is free is not known: %s", options.model.name, error)


def training_figures(report: TrainingRecord) -> dict[str, object]:
    """The figures of `run.json` and of the closing table."""
    splits = report["splits"].values()
    shown = {name: round(value, 6) for name, value in report["metrics"].items() if value is not None}
    return {
        "rows_in": report["feature_rows"] + sum(report.get("missing", {}).values()),
        "rows_out": sum(each["entered"] for each in splits),
        "rows_outside": report["outside"],
        "rows_waiting": sum(each["waiting"] for each in splits),
        "rows_without_label": sum(each["dropped"] for each in splits),
        **{f"{MISSING}{view}": rows for view, rows in report.get("missing", {}).items()},
        **{name: each["entered"] for name, each in report["splits"].items()},
        "rounds": report["rounds"],
        **shown,
        "gates_held": sum(each["holds"] for each in report["gates"]),
        "gates": len(report["gates"]),
        "model": report["model"],
        "model_version": report["model_version"],
        "champion": report["champion"],
        **({"not_champion": report["kept"]} if report.get("kept") else {}),
        "trials": report["trials"],
        "warnings": report["data"]["warnings"],
        "drift_max": max(report["data"]["drift"].values(), default=None),
        "report": report["report"],
    }


if __name__ == "__main__":
    sys.exit(guard(main)(sys.argv[1:]))
