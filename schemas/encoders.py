"""Encoders that a model declares for its inputs.  They are fitted on the training split and saved with the model; see
`transforms/models/encoders.py`.
"""

from __future__ import annotations

import dataclasses

from schemas.errors import DefinitionError


def _require(condition: bool, rule: str, value: object, fix: str) -> None:
    if not condition:
        raise DefinitionError(rule, repr(value), fix)


@dataclasses.dataclass(frozen=True)
class Ordinal:
    """Each category becomes its rank by descending count (ties by name), from 0; unseen categories share the last code,
    and null stays missing.
    """

    max_size: int = 10_000
    min_count: int = 1

    def __post_init__(self) -> None:
        _require(self.max_size >= 1, "Ordinal: max_size is at least 1", self.max_size, "Raise it")
        _require(self.min_count >= 1, "Ordinal: min_count is at least 1", self.min_count, "Raise it")


@dataclasses.dataclass(frozen=True)
class OneHot(Ordinal):
    """One 0/1 column per category, and one for unseen categories; null is 0 in all of them."""

    max_size: int = 64


@dataclasses.dataclass(frozen=True)
class Native(Ordinal):
    """As `Ordinal`, but XGBoost gets a category instead of a number."""


@dataclasses.dataclass(frozen=True)
class Hashing:
    """Each category becomes one of `buckets` by a fixed hash; nothing is fitted."""

    buckets: int = 1024

    def __post_init__(self) -> None:
        _require(self.buckets >= 2, "Hashing: buckets is at least 2", self.buckets, "Raise it")


@dataclasses.dataclass(frozen=True)
class Standardize:
    """(x − mean) / population standard deviation of the training split."""


@dataclasses.dataclass(frozen=True)
class MinMax:
    """(x − min) / (max − min) of the training split; not clipped outside it."""


@dataclasses.dataclass(frozen=True)
class Robust:
    """(x − median) / interquartile range of the training split."""


@dataclasses.dataclass(frozen=True)
class Bucketize:
    """The number of the value's quantile bucket; `buckets` of them are fitted on the training split."""

    buckets: int = 10

    def __post_init__(self) -> None:
        _require(self.buckets >= 2, "Bucketize: buckets is at least 2", self.buckets, "Raise it")


@dataclasses.dataclass(frozen=True)
class Log:
    """log(1 + x); values not above −1 become missing.  Nothing is fitted."""


@dataclasses.dataclass(frozen=True)
class Impute:
    """Nulls are replaced by the training split's `mean` or `median`, or by a number."""

    value: str | float = "median"

    def __post_init__(self) -> None:
        ok = self.value in ("mean", "median") or (
            isinstance(self.value, int | float) and not isinstance(self.value, bool)
        )
        _require(ok, "Impute: value is 'mean', 'median' or a number", self.value, "Choose one")


@dataclasses.dataclass(frozen=True)
class Target:
    """Smoothed mean of the label per category: (sum + smoothing · prior) / (count + smoothing) (Micci-Barreca 2001).

    A training row is encoded only from labels that were known before its own time.
    """

    smoothing: float = 20.0

    def __post_init__(self) -> None:
        _require(self.smoothing > 0, "Target: smoothing is above 0", self.smoothing, "Raise it")


Encoder = Ordinal | OneHot | Native | Hashing | Standardize | MinMax | Robust | Bucketize | Log | Impute | Target
CATEGORICAL = (Ordinal, OneHot, Native, Hashing, Target)
NUMERIC = (Standardize, MinMax, Robust, Bucketize, Log, Impute)
