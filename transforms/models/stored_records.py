"""What Millrace stores of a trained model as JSON, key by key, and what a reader checks of it.

`manifest.json` lies in the model's bundle.  `training.json`, `explanation.json` and `registration.json` lie in the
folder of its run: the report, single rows with their contributions, and what registering needs later.

A record stays the JSON object that was read, so that keys of other versions of Millrace are kept.  Keys that may be
absent are those that came later, or that only one kind of model has.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import (
    Literal,
    NotRequired,  # Pydantic takes no other before Python 3.12
)

from typing_extensions import TypedDict

# Lower and upper end of a 95 % interval.
Span = tuple[float, float]
MetricValues = Mapping[str, float | None]
Spans = Mapping[str, Span | None]


class FileDigest(TypedDict):
    """A file of a bundle."""

    sha256: str
    bytes: int


class TableVersion(TypedDict, total=False):
    """A table that a model was trained on.

    Args:
        version: None of files that have no versions.
        first: the first day that was read.
    """

    uri: str
    version: int | None
    first: str


class ViewRecord(TableVersion, total=False):
    """A view of a model that has several, the table of its features that the model was trained on, and the inputs that
    are read from it.
    """

    view: str
    fingerprint: str
    inputs: Sequence[str]


class SourceRecord(TypedDict, total=False):
    """What a feature table had read of a source; for a dimension there is only the digest."""

    files: int
    digest: str
    first: str
    last: str


class ReadRequest(TypedDict):
    """What a training run was asked to read: dates, the current time at launch (µs since 1970), and the folder of the
    sources."""

    start: str | None
    cutoff: str
    now: int
    sources: str


class RecordedDefinition(TypedDict, total=False):
    """The definition that a model was trained with, and the modules beside it that it imports."""

    name: str
    sha256: str
    source: str
    modules: Mapping[str, str]


class FoldRecord(TypedDict):
    train_end: str
    validate_start: str
    validate_end: str


class GroupSplitRecord(TypedDict):
    """A split by the values of columns; it has more keys than are read."""

    by: Sequence[str]


class SplitBounds(TypedDict, total=False):
    """`schemas.splits.Split.as_json`: moments in ISO format."""

    train_end: str
    validate_start: str
    validate_end: str
    test_start: str
    cutoff: str
    groups: GroupSplitRecord
    folds: Sequence[FoldRecord]


class SplitCounts(TypedDict):
    """Counts of one split's rows; see `transforms.training.labels.LabelCounts`."""

    rows: int
    waiting: int
    absent: NotRequired[int]
    dropped: int
    entered: int


class ProvenanceRecord(TypedDict, total=False):
    """The entries of a manifest that record where a model came from."""

    feature_table: TableVersion
    views: Sequence[ViewRecord]
    sources: Mapping[str, SourceRecord]
    label_content: Mapping[str, str]
    label_files: Sequence[str]
    label_table: TableVersion
    split: SplitBounds
    read: ReadRequest
    cores: int
    device: str
    definition: RecordedDefinition
    run_id: str
    code_version: str
    code_sha256: str
    constraints_sha256: str
    environment: Mapping[str, str]


class ModelManifest(ProvenanceRecord):
    """`manifest.json` of a bundle, but for its format and its files' digests.

    Args:
        model: its registered name.
        classes: scores per row, 1 or the classes of a multi-class model.
        fingerprint: of its view; of several views theirs, with commas between them.
        view: its view, or the first of several.
        inputs: input column → Arrow type as text.
        params: XGBoost's parameters.
    """

    model: str
    objective: str
    classes: int | None
    fingerprint: str
    view: str
    key: Sequence[str]
    time: str
    inputs: Mapping[str, str]
    metric: NotRequired[str]
    problem: NotRequired[Mapping[str, object]]
    columns: NotRequired[Sequence[str]]
    rounds: NotRequired[int]
    params: NotRequired[Mapping[str, object]]
    seed: NotRequired[int]
    examples: NotRequired[Mapping[str, SplitCounts]]


class BundleFiles(TypedDict):
    """The entries of `manifest.json` that describe the bundle itself."""

    format: int
    files: Mapping[str, FileDigest]


RateName = Literal["precision", "recall", "false_positive_rate", "selection_rate"]


class ThresholdRates(TypedDict):
    """Rates of a binary model among the rows whose score is at least `threshold`."""

    threshold: float
    precision: float | None
    recall: float | None
    false_positive_rate: float | None
    selection_rate: float | None
    intervals: Spans


class CalibrationBin(TypedDict):
    """Rows of one part of the scores: their mean score, and the share of positives."""

    rows: int
    score: float
    share: float


# MetricValues of one class against all others; `chosen` is how often the class had the highest score.
ClassMetrics = TypedDict(
    "ClassMetrics",
    {
        "class": int,
        "rows": int,
        "chosen": int,
        "precision": float | None,
        "recall": float | None,
        "auc": float | None,
        "intervals": NotRequired[Spans],
    },
)


class ErrorQuantile(TypedDict):
    """A quantile of a regression's absolute error."""

    share: float
    error: float


class CurvePoints(TypedDict, total=False):
    """Points of the ROC curve (false and true positive rate), and of precision by recall."""

    roc: Sequence[Sequence[float]]
    precision_recall: Sequence[Sequence[float]]


class MetricDetails(CurvePoints, total=False):
    """Details of one kind of model besides its metrics: first of a binary one, then of a multi-class one, then of a
    regression."""

    thresholds: Sequence[ThresholdRates]
    calibration: Sequence[CalibrationBin]
    classes: Sequence[ClassMetrics]
    confusion: Sequence[Sequence[int]]
    errors: Sequence[ErrorQuantile]


class SliceRecord(TypedDict):
    """MetricValues of the test rows with one value of each column in `by`."""

    by: Mapping[str, str | None]
    rows: int
    metrics: MetricValues
    intervals: Spans
    gaps: NotRequired[Spans]
    rates: NotRequired[MetricValues]


class MetricsRecord(MetricDetails):
    """`transforms.evaluation.evaluate.Report` without its replicates."""

    rows: int
    metrics: MetricValues
    intervals: Spans
    auc_error: NotRequired[float]
    slices: Sequence[SliceRecord]


class GateRecord(TypedDict):
    """The verdict of one gate."""

    gate: str
    holds: bool
    reason: str
    judged: bool


class GroupRates(TypedDict):
    """Rates of the test rows with one value of a protected column."""

    value: str | None
    rows: int
    judged: bool
    precision: NotRequired[float | None]
    recall: NotRequired[float | None]
    false_positive_rate: NotRequired[float | None]
    selection_rate: NotRequired[float | None]


class FairnessRecord(TypedDict):
    """Rates by group of a protected column, and each measure's greatest difference."""

    column: str
    groups: Sequence[GroupRates]
    differences: MetricValues


class RivalRecord(CurvePoints):
    """The champion on the same test rows; each difference has a 95 % interval."""

    version: str | None
    reason: str
    metrics: MetricValues | None
    differences: NotRequired[Mapping[str, tuple[float, Span | None]]]


class GateRules(TypedDict, total=False):
    """The declared `schemas.Gates`, of which these are read."""

    threshold: float
    min_slice_rows: int
    max_gap: Mapping[str, float]
    max_difference: Mapping[str, float]
    max_drift: float | None


class TrialRecord(TypedDict):
    """One trial of the search; `value` is None if it failed."""

    trial: int
    params: Mapping[str, object]
    value: float | None
    rounds: int
    seconds: float
    error: str
    rung: int
    folds: Sequence[float]
    history: Sequence[float | None]


class FindingsRecord(TypedDict):
    """`transforms.training.data_checks.Findings`."""

    drift: Mapping[str, float]
    skew: Mapping[str, float]
    champion: str | None
    warnings: Sequence[str]


class InputShare(TypedDict):
    """Mean absolute contribution of one input; `by_class` only of a multi-class model."""

    input: str
    mean_abs: float
    by_class: NotRequired[Sequence[float]]


class ExplanationSummary(TypedDict):
    """SHAP contributions by input; `reason` says why there are none."""

    rows: int
    unit: str
    base: Sequence[float]
    inputs: Sequence[InputShare]
    reason: str


# Values of one input, row by row, and their contributions; of a multi-class model to the score of `class`.
InputPoints = TypedDict(
    "InputPoints",
    {
        "input": str,
        "values": Sequence[float | str | None],
        "contributions": Sequence[float],
        "class": NotRequired[int | None],
    },
)


class ExplanationRecord(TypedDict, total=False):
    """`explanation.json`: single rows of the test split; of a regression also scores and labels."""

    rows: int
    unit: str
    base: Sequence[float]
    inputs: Sequence[InputShare]
    points: Sequence[InputPoints]
    scores: Sequence[float]
    labels: Sequence[float | None]
    reason: str


class TrainingRecord(MetricsRecord):
    """`training.json`.

    Args:
        labels: number of examples by split and label, of classes only.
        missing: of a model with several views, by view the rows that it lacks and that the views before it have.
        validate: the metric that chose among trials, and its value.
        model_version: present once the model is registered, as are `champion` and `kept`, the reason why the champion
            was kept.
    """

    model: str
    feature_rows: int
    missing: NotRequired[Mapping[str, int]]
    outside: int
    gates: Sequence[GateRecord]
    fairness: Sequence[FairnessRecord]
    rival: RivalRecord
    rules: NotRequired[GateRules]
    splits: Mapping[str, SplitCounts]
    labels: NotRequired[Mapping[str, Mapping[str, int]]]
    rounds: int
    validate: Mapping[str, float | None]
    bundle: str
    trials: Sequence[TrialRecord]
    data: FindingsRecord
    explanation: NotRequired[ExplanationSummary]
    report: str
    model_version: NotRequired[str]
    champion: NotRequired[str | None]
    kept: NotRequired[str]


class RetrainingRecord(MetricsRecord):
    """`retrain.json`: the report of a model that was trained again, and the digest of its bundle."""

    digest: str
    feature_rows: int


class RequestExample(TypedDict, total=False):
    """Raw rows in the form of a request, in MLflow's format `dataframe_split`; empty if there are none."""

    columns: Sequence[str]
    data: Sequence[Sequence[object]]


class RegistrationRecord(TypedDict):
    """`registration.json`: digest of the bundle's manifest, and the text of further files by name."""

    run_id: str
    digest: str
    files: Mapping[str, str]
    example: NotRequired[RequestExample]


class ChampionMove(TypedDict):
    """A record of a move of the alias `champion`.

    Args:
        at: time in ISO format, UTC; it is the tag's name, and only for display.
        before: the version that was champion.
        kind, sequence: absent from records of earlier versions of Millrace.
        pending: whether it is not known yet that the move happened.
    """

    at: NotRequired[str]
    version: str
    before: str | None
    why: str
    who: str
    kind: NotRequired[str]
    sequence: NotRequired[int]
    pending: NotRequired[bool]
