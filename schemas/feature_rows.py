"""The feature rows that a model reads: those of one view, or of several views joined by key and time."""

from __future__ import annotations

import dataclasses
import difflib
import fnmatch
import functools
import re
from collections.abc import Collection, Sequence

import polars as pl
import pyarrow as pa

from schemas.errors import DefinitionError
from schemas.views import FeatureView

# What counts rows of which one view has none.
MISSING = "missing_in_"


@dataclasses.dataclass(frozen=True, eq=False)
class FeatureRows:
    """Rows of `views` joined by key and time, and the features that are chosen of them.

    A row of several views has the `row_id`, the date and the further spine columns of the first.

    Args:
        views: over one spine, with one key.
        patterns: names of features, or patterns such as `or_*`; `weather.or_*` chooses from the view `weather`.  None
            chooses every feature.
        what: how messages call the model.
    """

    views: tuple[FeatureView, ...]
    patterns: tuple[str, ...] | None = None
    what: str = "A model"

    def __post_init__(self) -> None:
        _check_views(self.views, self.what)
        _ = self.chosen

    @property
    def first(self) -> FeatureView:
        return self.views[0]

    @property
    def fingerprint(self) -> str:
        """The fingerprints of the views, in their order."""
        return ",".join(view.fingerprint for view in self.views)

    @functools.cached_property
    def chosen(self) -> dict[str, FeatureView]:
        """Per chosen feature the view whose column it is, in the order of the views and of their features.

        Raises:
            DefinitionError: a pattern matches nothing, or one name stands for different features.
        """
        wanted = {(view.name, name) for pattern in self.patterns or ("*",) for view, name in self._matching(pattern)}
        result: dict[str, FeatureView] = {}
        for view in self.views:
            for name in view.columns:
                if (view.name, name) not in wanted:
                    continue
                other = result.setdefault(name, view)
                if other.meanings[name] != view.meanings[name]:
                    raise DefinitionError(
                        f"{self.what}: one name is one feature",
                        f"{name!r} of view {other.name!r} and of view {view.name!r}, which are computed differently",
                        f"Rename one, or choose one, as features=[{other.name + '.' + name!r}, …]",
                    )
        return result

    def _matching(self, pattern: str) -> list[tuple[FeatureView, str]]:
        view_name, dot, rest = pattern.partition(".")
        views = [view for view in self.views if dot and view.name == view_name]
        text = rest if views else pattern
        found = [
            (view, name)
            for view in views or self.views
            for name in view.columns
            if name == text or fnmatch.fnmatchcase(name, text)
        ]
        if not found:
            names = dict.fromkeys(name for view in views or self.views for name in view.columns)
            raise DefinitionError(
                f"{self.what}: features names features of {_listed(views or self.views)}, or patterns of them",
                f"{pattern!r}, which matches none",
                nearest_names(text, names),
            )
        return found

    @functools.cached_property
    def origins(self) -> dict[str, FeatureView]:
        """Per column of a joined row the view that it is read from: spine columns, chosen features, then the others."""
        result = dict.fromkeys(self.first.context, self.first)
        result |= {name: view for name, view in self.chosen.items() if name not in (*self.first.key, self.first.time)}
        for view in self.views:
            for name in view.columns:
                result.setdefault(name, view)
        return result

    @property
    def columns(self) -> dict[str, pl.DataType]:
        """Stored type per chosen feature."""
        return {name: view.columns[name] for name, view in self.chosen.items()}

    def read_from(self, view: FeatureView, columns: Collection[str]) -> list[str]:
        """Those of `columns` that are read from the table of `view`, beside key and time."""
        own = [name for name in columns if self.origins.get(name) is view]
        return list(dict.fromkeys([*view.key, view.time, *own]))

    @functools.cached_property
    def schema(self) -> pa.Schema:
        """Arrow schema of a joined row; that of its table if there is one view."""
        if len(self.views) == 1:
            return self.first.output_schema
        fields = [view.output_schema.field(name) for name, view in self.origins.items()]
        return pa.schema([*fields, *(self.first.output_schema.field(name) for name in ("row_id", "date"))])

    def require(self, name: str, what: str) -> None:
        """Refuse a `name` that is neither a feature nor a spine column.

        Raises:
            DefinitionError: it is neither.
        """
        if name not in self.origins:
            raise DefinitionError(
                f"{what} names a feature or a spine column of {_listed(self.views)}",
                repr(name),
                nearest_names(name, self.origins),
            )


def _check_views(views: Sequence[FeatureView], what: str) -> None:
    if not views or not all(isinstance(view, FeatureView) for view in views):
        wrong = next((view for view in views if not isinstance(view, FeatureView)), None)
        raise DefinitionError(
            f"{what} reads a FeatureView, or several", repr(wrong) if views else "none", "Write Model(view, …)"
        )
    first = views[0]
    for view in views[1:]:
        if view.spine is not first.spine or view.key != first.key:
            raise DefinitionError(
                f"{what}: its views have the same spine (one Source object) and the same key",
                f"{_identity(first)}; {_identity(view)}",
                "Give both views one spine and one key, or train a model on each",
            )
    for name in {view.name for view in views}:
        twins = [view for view in views if view.name == name]
        if len(twins) > 1:
            raise DefinitionError(
                f"{what} names each view once",
                " and ".join(f"{name!r} at {view.place}" for view in twins),
                "Remove one",
            )


def _identity(view: FeatureView) -> str:
    return (
        f"view {view.name!r} has the spine {view.spine.name!r} ({view.spine.place}) and the key {', '.join(view.key)}"
    )


def _listed(views: Sequence[FeatureView]) -> str:
    return f"view{'' if len(views) == 1 else 's'} " + " and ".join(repr(view.name) for view in views)


def nearest_names(pattern: str, names: Collection[str]) -> str:
    """A hint with the names nearest to a pattern, or with all of them.

    >>> nearest_names("orgin_*", ["origin_mean", "carrier", "origin_max"])
    "Did you mean 'origin_max' or 'origin_mean'?"
    """
    text = re.sub(r"[*?]|\[.*?\]", "", pattern)
    close = sorted(difflib.get_close_matches(text, names, n=3, cutoff=0.6))
    if not close:  # the beginning of longer names
        begun = {name[: len(text)]: name for name in names} if len(text) > 2 else {}
        close = sorted(begun[start] for start in difflib.get_close_matches(text, begun, n=3, cutoff=0.75))
    if not close:
        return f"Known names: {', '.join(sorted(names)) or 'none'}"
    return f"Did you mean {' or '.join(map(repr, close))}?"
