"""Describe a prediction problem: sources, a view of features, a model.

>>> from schemas import Source, FeatureView, Trailing, Latest, Lookup, Derived, Model, Label, TimeSplit
"""

from schemas import encoders
from schemas.errors import DefinitionError, MillraceError
from schemas.features import Derived, Latest, Lookup, Trailing
from schemas.loading import Definition, Project, load_definition, load_project
from schemas.models import Gates, Label, Model, Search
from schemas.sources import Source
from schemas.splits import GroupSplit, RollingOrigin, TimeSplit
from schemas.views import FeatureView

__all__ = [
    "Definition",
    "DefinitionError",
    "Derived",
    "FeatureView",
    "Gates",
    "GroupSplit",
    "Label",
    "Latest",
    "Lookup",
    "MillraceError",
    "Model",
    "Project",
    "RollingOrigin",
    "Search",
    "Source",
    "TimeSplit",
    "Trailing",
    "encoders",
    "load_definition",
    "load_project",
]
