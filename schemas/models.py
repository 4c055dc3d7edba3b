"""A model over a view: its label, split, encoders, parameters, search and gates."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Mapping, Sequence
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import polars as pl

from schemas import encoders
from schemas.arithmetic import in_64_bits
from schemas.durations import microseconds
from schemas.errors import DefinitionError, nearest
from schemas.expressions import canonical, dtype_of, require_row_local
from schemas.feature_rows import FeatureRows
from schemas.features import By, pairs
from schemas.places import built_at
from schemas.sources import Source, identifier, names
from schemas.splits import GroupSplit, RollingOrigin, TimeSplit
from schemas.views import FeatureView

OBJECTIVES = {
    "binary:logistic": ("auc", "average_precision", "log_loss", "brier"),
    "multi:softprob": ("log_loss", "accuracy"),
    "reg:squarederror": ("rmse", "mae"),
    "reg:absoluteerror": ("mae", "rmse"),
    "count:poisson": ("rmse", "mae"),
}
# Further metrics of a test: at `Gates.threshold`, and over ten equal bins of the score; for several classes, the
# unweighted means over classes that occur, each against all others.
_BEYOND = {
    "binary:logistic": ("calibration_error", "precision", "recall"),
    "multi:softprob": ("macro_auc", "macro_precision", "macro_recall"),
}
METRICS_OF = {objective: (*names, *_BEYOND.get(objective, ())) for objective, names in OBJECTIVES.items()}
# Metrics of which a greater value is better.
RISING = {"auc", "average_precision", "accuracy", "precision", "recall", "macro_auc", "macro_precision", "macro_recall"}
# Differences between groups, as Fairlearn names them.
FAIRNESS = ("demographic_parity", "equal_opportunity", "equalized_odds")
# XGBoost's parameters, which have many types.
Params = Mapping[str, Any]


@dataclasses.dataclass(frozen=True, eq=False)
class Label:
    """What became of a spine row at *t*: `value` of the first row of `source` with its key, known in `[t, t + within)`.

    An example is used only after `t + within`, whether or not a label was received: otherwise quick outcomes would be
    over-represented.

    Args:
        source: events.
        on: key columns, as in `Trailing`.
        value: row-local expression over the source's columns; null means no label.
        within: the horizon.
        absent: `"drop"`, or the label of a row that received none within the horizon.
    """

    source: Source
    on: By
    value: pl.Expr
    within: str
    absent: str | float | int | bool = "drop"

    def __post_init__(self) -> None:
        if not isinstance(self.source, Source) or self.source.time is None:
            raise DefinitionError(
                "Label: source is a Source with a time", repr(self.source), "Declare Source(…, time=…)"
            )
        what = f"Label from {self.source.name!r}"
        for _, column in self.keys:
            self.source.require(column, f"{what}: on")
        require_row_local(self.value, f"{what}: value")
        dtype = dtype_of(self.value, self.source.schema, f"{what}: value")
        if not (dtype.is_numeric() or dtype == pl.Boolean):
            raise DefinitionError(
                f"{what}: value is a number or a condition", f"{self.value}: {dtype}", "Number the classes from 0"
            )
        microseconds(self.within, f"{what}: within")
        if self.absent != "drop" and (isinstance(self.absent, str) or not isinstance(self.absent, int | float | bool)):
            raise DefinitionError(
                f'{what}: absent is "drop" or a value', repr(self.absent), "Write absent=0 to count silence as no"
            )

    @property
    def keys(self) -> tuple[tuple[str, str], ...]:
        return pairs(self.on, "on")

    @property
    def computed(self) -> pl.Expr:
        """`value` as it is computed, in 64 bits."""
        return in_64_bits(self.value, self.source.schema).expr


@dataclasses.dataclass(frozen=True)
class Search:
    """Trials over a space: `{"max_depth": [4, 6, 8], "eta": (0.02, 0.3)}` (a list of choices, or bounds, sampled in log
    when both are above 0).

    Args:
        trials: number of trials.
        space: choices or bounds by XGBoost parameter.
        method: `random`; `sobol`, which covers the space more evenly; or `halving`: random trials with few rounds, of
            which one in `factor` continues with `factor` times the rounds, until one is left.
        seed: decides every trial.
        factor: the factor of halving.
    """

    trials: int
    space: Mapping[str, object]
    method: str = "random"
    seed: int = 0
    factor: int = 3

    def __post_init__(self) -> None:
        if self.trials < 1:
            raise DefinitionError("Search: trials is at least 1", self.trials, "Raise it")
        if self.factor < 2:
            raise DefinitionError("Search: factor is at least 2", self.factor, "Raise it")
        if self.method not in ("random", "sobol", "halving"):
            raise DefinitionError(
                "Search: method is random, sobol or halving",
                repr(self.method),
                nearest(self.method, ("random", "sobol", "halving")),
            )
        for name, values in self.space.items():
            bounds = (
                isinstance(values, tuple)
                and len(values) == 2
                and all(isinstance(v, int | float) for v in values)
                and values[0] < values[1]
            )
            if not bounds and not (isinstance(values, list) and values):
                raise DefinitionError(
                    f"Search: {name!r} has a list of choices or a pair of bounds",
                    repr(values),
                    "Write [4, 6, 8] or (0.02, 0.3)",
                )


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


@dataclasses.dataclass(frozen=True)
class Gates:
    """The conditions on the test split that a model must satisfy before it becomes champion.

    Args:
        at_least: the least value by metric (for error metrics, the greatest).
        slices: columns, or tuples of columns, by whose values metrics are also computed.
        max_gap: by metric, how much worse than the whole a slice may be; a slice fails if the whole 95 % interval of
            its gap is above that, so that chance does not explain it.
        min_slice_rows: smaller slices and groups are shown, but cannot make a gate fail.
        margin: a challenger must beat the champion's `metric` by this much on the same rows, with the whole 95 %
            interval of the paired difference.  If the two cannot be compared, the champion stays.
        protected: columns whose values must be treated alike; they are slices too.
        max_difference: `demographic_parity` (in shares selected), `equal_opportunity` (in recall) or `equalized_odds`
            (in recall or false positive rate, whichever is greater): the greatest allowed difference between two
            groups.
        threshold: the score from which on a row is selected, for `precision`, `recall` and `max_difference`.
        max_drift: the greatest allowed distance, 0 … 1, of a column of the training data from the champion's:
            Jensen–Shannon divergence of numbers, or greatest change of the share of a string; None only reports it.
    """

    at_least: Mapping[str, float] = dataclasses.field(default_factory=dict)
    slices: tuple[str | tuple[str, ...], ...] = ()
    max_gap: Mapping[str, float] = dataclasses.field(default_factory=dict)
    min_slice_rows: int = 500
    margin: float = 0.0
    max_drift: float | None = None
    protected: tuple[str, ...] = ()
    max_difference: Mapping[str, float] = dataclasses.field(default_factory=dict)
    threshold: float = 0.5

    def __post_init__(self) -> None:
        for field in ("slices", "protected"):
            value = getattr(self, field)
            object.__setattr__(self, field, (value,) if isinstance(value, str) else tuple(value))
        missing = tuple(name for name in self.protected if name not in self.slices)
        object.__setattr__(self, "slices", (*self.slices, *missing))
        if not _is_number(self.threshold) or not 0 < self.threshold < 1:
            raise DefinitionError("Gates: threshold is a score between 0 and 1", repr(self.threshold), "Write 0.5")
        for field in ("at_least", "max_gap", "max_difference"):
            bounds = getattr(self, field)
            if not isinstance(bounds, Mapping) or not all(_is_number(bound) for bound in bounds.values()):
                raise DefinitionError(f"Gates: {field} maps metrics to numbers", repr(bounds), 'Write {"auc": 0.7}')
        if self.max_drift is not None and not (_is_number(self.max_drift) and 0 <= self.max_drift <= 1):
            raise DefinitionError("Gates: max_drift is from 0 to 1", repr(self.max_drift), "Write 0.2")
        for name in self.max_difference:
            if name not in FAIRNESS:
                raise DefinitionError(
                    f"Gates: max_difference bounds {', '.join(FAIRNESS)}", repr(name), nearest(name, FAIRNESS)
                )
        if self.max_difference and not self.protected:
            raise DefinitionError(
                "Gates: max_difference compares the values of protected columns",
                "none protected",
                'Write protected=("sex",)',
            )
        for field in ("min_slice_rows", "margin"):
            if not _is_number(getattr(self, field)) or getattr(self, field) < 0:
                raise DefinitionError(f"Gates: {field} is at least 0", repr(getattr(self, field)), "Raise it")


@dataclasses.dataclass(frozen=True, eq=False)
class Model:
    """An XGBoost model over features of a view, or of several, and those spine columns that `encode` names.

    Args:
        view: the features; a list of views is joined by key and time, and is kept as `view` (the first) and `others`.
        label: what to predict.
        objective: one of XGBoost's objectives listed in `OBJECTIVES`.
        metric: the metric that chooses among trials and decides when to stop early.
        split: how examples are divided.
        encode: encoder by input; a string input needs one, a number without one is passed unchanged.
        params: XGBoost parameters.
        rounds: the most boosting rounds.
        early_stopping: training stops after so many rounds without a better `metric` on validation; 0: never.
        search: trials over parameters; None trains once.
        gates: the conditions for becoming champion.
        seed: XGBoost's seed.
        name: names the registered model and its tables; default the view's name.  One name is one problem (see
            `problem`).
        features: the features that it takes: names, or patterns such as `or_*`, or `weather.or_*` of the view
            `weather`; None takes all.
        others: further views.
    """

    view: FeatureView
    label: Label
    split: TimeSplit | GroupSplit | RollingOrigin
    objective: str = "binary:logistic"
    metric: str = "auc"
    encode: Mapping[str, encoders.Encoder] = dataclasses.field(default_factory=dict)
    params: Params = dataclasses.field(default_factory=dict)
    rounds: int = 300
    early_stopping: int = 0
    search: Search | None = None
    gates: Gates = dataclasses.field(default_factory=Gates)
    seed: int = 0
    name: str = ""
    features: Sequence[str] | None = None
    others: Sequence[FeatureView] = ()
    place: str = dataclasses.field(default="", init=False, repr=False)

    if TYPE_CHECKING:  # the fields again: to type checkers a list of views is no FeatureView

        def __init__(  # noqa: PLR0913
            self,
            view: FeatureView | Sequence[FeatureView],
            label: Label,
            split: TimeSplit | GroupSplit | RollingOrigin,
            objective: str = "binary:logistic",
            metric: str = "auc",
            encode: Mapping[str, encoders.Encoder] = ...,
            params: Params = ...,
            rounds: int = 300,
            early_stopping: int = 0,
            search: Search | None = None,
            gates: Gates = ...,
            seed: int = 0,
            name: str = "",
            features: Sequence[str] | None = None,
            others: Sequence[FeatureView] = (),
        ) -> None: ...

    def __post_init__(self) -> None:
        object.__setattr__(self, "place", built_at())
        views = (*self.view, *self.others) if isinstance(self.view, list | tuple) else (self.view, *self.others)
        if not views or not all(isinstance(view, FeatureView) for view in views):
            wrong = next((view for view in views if not isinstance(view, FeatureView)), None)
            value = repr(wrong) if views else "none"
            raise DefinitionError("A model reads a FeatureView, or several", value, "Write Model(view, …)")
        object.__setattr__(self, "view", views[0])
        object.__setattr__(self, "others", views[1:])
        object.__setattr__(self, "name", identifier(self.name or self.view.name, "The name of a model"))
        what = f"Model {self.name!r}"
        if self.features is not None:
            object.__setattr__(
                self, "features", names(self.features, f"{what}: features", "name or pattern of features")
            )
        _ = self.rows
        if self.objective not in OBJECTIVES:
            raise DefinitionError(
                f"{what}: objective is one of {', '.join(OBJECTIVES)}",
                repr(self.objective),
                nearest(self.objective, OBJECTIVES),
            )
        named = [
            (self.metric, OBJECTIVES),
            *((name, METRICS_OF) for name in (*self.gates.at_least, *self.gates.max_gap)),
        ]
        for metric, known in named:
            if metric not in known[self.objective]:
                raise DefinitionError(
                    f"{what}: {self.objective} has the metrics {', '.join(known[self.objective])}",
                    repr(metric),
                    nearest(metric, known[self.objective]),
                )
        if self.gates.protected and self.objective != "binary:logistic":
            raise DefinitionError(
                f"{what}: protected columns are compared by who is selected",
                self.objective,
                'Use slices and max_gap, or objective="binary:logistic"',
            )
        for group in self.gates.slices:
            for column in (group,) if isinstance(group, str) else group:
                self.rows.require(column, f"{what}: slices")
        sources = {self.view.spine.name: self.view.spine}
        for view in self.views:
            for source in view.sources.values():
                if sources.setdefault(source.name, source) is not source:
                    raise DefinitionError(
                        f"{what}: one name is one source",
                        f"{source.name!r} at {sources[source.name].place} and at {source.place}",
                        "Rename one, or use the same Source object in all views",
                    )
        if sources.get(self.label.source.name, self.label.source) is not self.label.source:
            raise DefinitionError(
                f"{what}: one name is one source",
                repr(self.label.source.name),
                "Rename one, or use the same Source object in view and label",
            )
        for column, _ in self.label.keys:
            if column not in self.rows.origins:
                raise DefinitionError(
                    f"{what}: the label is joined on spine columns", repr(column), nearest(column, self.view.context)
                )
        for column in self.split.by if isinstance(self.split, GroupSplit) else ():
            if column not in self.view.context:
                raise DefinitionError(
                    f"{what}: groups are named by spine columns", repr(column), nearest(column, self.view.context)
                )
        if self.rounds < 1 or self.early_stopping < 0:
            raise DefinitionError(
                f"{what}: rounds is at least 1 and early_stopping at least 0",
                (self.rounds, self.early_stopping),
                "Raise them",
            )
        self._check_inputs(what)

    def _check_inputs(self, what: str) -> None:
        for column, encoder in self.encode.items():
            self.rows.require(column, f"{what}: encode")
            if column not in self.inputs:
                raise DefinitionError(
                    f"{what}: encode names inputs, and features chooses them",
                    f"{column!r}, which it does not choose",
                    f"Add {column!r} to features, or leave it out of encode",
                )
            dtype = self.inputs[column]
            if not isinstance(encoder, encoders.Encoder):
                raise DefinitionError(
                    f"{what}: encode maps inputs to encoders", f"{column!r}: {encoder!r}", "Write encoders.Ordinal()"
                )
            size = getattr(encoder, "max_size", getattr(encoder, "buckets", 0))
            if size > 1 << 24:
                raise DefinitionError(
                    f"{what}: {type(encoder).__name__} numbers at most 2^24 categories or buckets, which float32 "
                    "tells apart",
                    f"{column!r}: {size}",
                    "Lower it",
                )
            if isinstance(encoder, encoders.NUMERIC) and not (dtype.is_numeric() or dtype == pl.Boolean):
                raise DefinitionError(
                    f"{what}: {type(encoder).__name__} encodes numbers",
                    f"{column!r}: {dtype}",
                    "Use Ordinal, OneHot, Native, Hashing or Target",
                )
        for column, dtype in self.inputs.items():
            if column not in self.encode and not (dtype.is_numeric() or dtype == pl.Boolean):
                raise DefinitionError(
                    f"{what}: XGBoost takes numbers, so a string input has an encoder",
                    repr(column),
                    f"Add encode={{{column!r}: encoders.Ordinal()}}",
                )

    @property
    def views(self) -> tuple[FeatureView, ...]:
        """Its views; the first gives the ids of its predictions."""
        return (self.view, *self.others)

    @functools.cached_property
    def rows(self) -> FeatureRows:
        """The feature rows that it reads."""
        patterns = None if self.features is None else tuple(self.features)
        return FeatureRows(self.views, patterns, f"Model {self.name!r}")

    @functools.cached_property
    def inputs(self) -> dict[str, pl.DataType]:
        """Type per input: the chosen features in order, then the spine columns that `encode` names."""
        known = {name for view in self.views for name in view.columns}
        extra = [column for column in self.encode if column not in known]
        return {**self.rows.columns, **{column: self.view.spine.schema[column] for column in extra}}

    @property
    def problem(self) -> dict[str, object]:
        """What is predicted, as flat JSON values. All versions of a registered model have the same problem.

        Features, encoders, parameters, split and gates are not part of it, so that a model can get better.
        """
        label = self.label
        return {
            "view": self.view.name,
            "spine": self.view.spine.name,
            "key": list(self.view.key),
            "time": self.view.time,
            "objective": self.objective,
            "label_source": label.source.name,
            "label_on": [list(pair) for pair in label.keys],
            "label_value": canonical(label.value),
            "label_value_shown": str(label.value),
            "label_within": microseconds(label.within),
            "label_within_shown": label.within,
            "label_absent": label.absent,
        }

    @property
    def horizon(self) -> timedelta:
        return timedelta(microseconds=microseconds(self.label.within))
