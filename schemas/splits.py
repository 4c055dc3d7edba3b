"""How examples are divided into train, validate and test: by time, by group, or by time with cross-validation."""

from __future__ import annotations

import dataclasses
from datetime import date, datetime, timedelta

from schemas.durations import instant, microseconds
from schemas.errors import DefinitionError

SPLITS = ("train", "validate", "test")
# The time at which a row's label was known: that of its event, or the end of the horizon if there was none.
LABEL_TIME = "__label_time"

# Column of the training examples that holds the label.
LABEL = "__label"


@dataclasses.dataclass(frozen=True)
class Fold:
    """One fold of a rolling origin, UTC: trained on `[−∞, train_end)` and validated on `[validate_start,
    validate_end)`.
    """

    train_end: datetime
    validate_start: datetime
    validate_end: datetime


@dataclasses.dataclass(frozen=True)
class Split:
    """Resolved bounds, UTC: train `[−∞, train_end)`, validate `[validate_start, validate_end)`, test `[test_start,
    cutoff)`.

    Args:
        groups: divides rows instead of the bounds, which then include all times before the cutoff.
        folds: earlier folds of a rolling origin, within train; the bounds themselves are the last fold.
    """

    train_end: datetime
    validate_start: datetime | None
    validate_end: datetime
    test_start: datetime | None
    cutoff: datetime
    groups: GroupSplit | None = None
    folds: tuple[Fold, ...] = ()

    @property
    def bounds(self) -> dict[str, tuple[datetime | None, datetime]]:
        """Start (None: the beginning) and end of each part."""
        return {
            "train": (None, self.train_end),
            "validate": (self.validate_start, self.validate_end),
            "test": (self.test_start, self.cutoff),
        }

    def as_json(self) -> dict[str, object]:
        """The JSON that a model records."""
        times = {
            name: getattr(self, name)
            for name in ("train_end", "validate_start", "validate_end", "test_start", "cutoff")
        }
        result: dict[str, object] = {name: value.isoformat() for name, value in times.items() if value is not None}
        if self.groups is not None:
            result["groups"] = {**dataclasses.asdict(self.groups), "by": list(self.groups.by)}
        if self.folds:
            result["folds"] = [
                {name: value.isoformat() for name, value in dataclasses.asdict(each).items()} for each in self.folds
            ]
        return result


@dataclasses.dataclass(frozen=True)
class TimeSplit:
    """Train, validate and test in order of time, `embargo` apart so that no label of one part reaches into the next.

    Args:
        validate: its length, or the date on which it starts.
        test: its length back from the cutoff, or the date on which it starts.
        embargo: gap before validation and before test.
    """

    validate: str | date
    test: str | date
    embargo: str = "0s"

    def __post_init__(self) -> None:
        for name in ("validate", "test"):
            value = getattr(self, name)
            instant(value, f"TimeSplit: {name}") if _is_date(value) else microseconds(value, f"TimeSplit: {name}")
        microseconds(self.embargo, "TimeSplit: embargo", zero=True)
        if _is_date(self.validate) and _is_date(self.test) and instant(self.validate) >= instant(self.test):
            raise DefinitionError(
                "TimeSplit: validation comes before test", f"{self.validate} and {self.test}", "Exchange them"
            )

    def resolve(self, cutoff: datetime) -> Split:
        """The bounds when data ends at `cutoff`."""
        gap = timedelta(microseconds=microseconds(self.embargo, zero=True))
        test = _start(self.test, cutoff)
        validate_end = test - gap
        validate = _start(self.validate, validate_end)
        if not validate < validate_end or not test < cutoff:
            raise DefinitionError(
                "TimeSplit: every part has a length",
                f"validate from {validate}, test from {test}, cutoff {cutoff}",
                "Shorten the embargo or move the dates",
            )
        return Split(validate - gap, validate, validate_end, test, cutoff)


@dataclasses.dataclass(frozen=True)
class RollingOrigin:
    """Cross-validation in order of time: the origin rolls forward, and each fold is trained on everything before it.

    A trial's metric is its mean over the folds.  The last fold is `TimeSplit(validate, test, embargo)`, on which the
    registered model is trained; each earlier fold is validated on the `validate` before, an `embargo` apart.

    Args:
        folds: number of folds, at least 2.
        validate: length of the time on which each fold is validated.
        test: its length back from the cutoff, or the date on which it starts.
        embargo: gap before each validation and before test.
    """

    folds: int
    validate: str
    test: str | date
    embargo: str = "0s"

    def __post_init__(self) -> None:
        if self.folds < 2:
            raise DefinitionError("RollingOrigin: folds is at least 2", self.folds, "Use TimeSplit for one")
        if _is_date(self.validate):
            raise DefinitionError("RollingOrigin: validate is a length", repr(self.validate), 'Write "30d"')
        TimeSplit(self.validate, self.test, self.embargo)

    def resolve(self, cutoff: datetime) -> Split:
        """The bounds when data ends at `cutoff`."""
        last = TimeSplit(self.validate, self.test, self.embargo).resolve(cutoff)
        gap = timedelta(microseconds=microseconds(self.embargo, zero=True))
        length = timedelta(microseconds=microseconds(self.validate))
        ends = [last.train_end - i * (length + gap) for i in range(self.folds - 1)]
        folds = tuple(Fold(end - length - gap, end - length, end) for end in reversed(ends))
        return dataclasses.replace(last, folds=folds)


@dataclasses.dataclass(frozen=True)
class GroupSplit:
    """Each group is in one part as a whole, by a hash that never changes: no customer is in both training and test.

    Args:
        by: the columns that identify a group.
        validate: share of groups.
        test: share of groups.
        salt: another value draws other groups.
    """

    by: str | tuple[str, ...]
    validate: float = 0.1
    test: float = 0.2
    salt: str = ""

    def __post_init__(self) -> None:
        object.__setattr__(self, "by", (self.by,) if isinstance(self.by, str) else tuple(self.by))
        if not self.by:
            raise DefinitionError("GroupSplit: by names columns", "none", 'Write GroupSplit(by="customer")')
        for name in ("validate", "test"):
            if not 0 < getattr(self, name) < 1:
                raise DefinitionError(f"GroupSplit: {name} is a share of groups", getattr(self, name), "Write 0.1")
        if self.validate + self.test >= 1:
            raise DefinitionError("GroupSplit: something is left to train on", self.validate + self.test, "Lower them")

    def resolve(self, cutoff: datetime) -> Split:
        """All times before `cutoff`, in each part."""
        return Split(cutoff, None, cutoff, None, cutoff, groups=self)


def _is_date(value: str | date) -> bool:
    return not isinstance(value, str) or (value[:4].isdigit() and "-" in value)


def _start(value: str | date, end: datetime) -> datetime:
    return instant(value) if _is_date(value) else end - timedelta(microseconds=microseconds(str(value)))
