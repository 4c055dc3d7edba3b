"""A training run's report: one self-contained HTML file, made from `training.json`.

Each section is a module that returns its content as a dataclass, and a template in `templates/` that formats it.
"""

from __future__ import annotations

import dataclasses
import functools

import jinja2

from transforms.models.stored_records import ExplanationRecord, ModelManifest, TrainingRecord
from transforms.reports import formatting
from transforms.reports.data_section import Data, data
from transforms.reports.fairness_section import Fairness, fairness
from transforms.reports.gates_section import GatesSection, gates
from transforms.reports.header import Header, header
from transforms.reports.inputs_section import Inputs, inputs
from transforms.reports.performance_section import Performance, performance
from transforms.reports.provenance_section import Provenance, provenance
from transforms.reports.search_section import SearchSection, search
from transforms.reports.slices_section import SlicesSection, slices

FILE = "report.html"
_FILTERS = (
    formatting.number,
    formatting.given,
    formatting.parameter,
    formatting.percent,
    formatting.interval,
    formatting.estimate,
    formatting.day,
    formatting.named,
    formatting.category,
    formatting.metric_name,
)


@dataclasses.dataclass(frozen=True)
class Page:
    """The content of the page; empty sections are None."""

    header: Header
    gates: GatesSection
    data: Data
    search: SearchSection
    performance: Performance
    slices: SlicesSection | None
    fairness: Fairness | None
    inputs: Inputs | None
    provenance: Provenance

    @property
    def contents(self) -> list[tuple[str, str]]:
        """Anchor and title of each section that is not empty, in the page's order."""
        names = [field.name for field in dataclasses.fields(self) if field.name != "header"]
        return [(name, name.capitalize()) for name in names if getattr(self, name) is not None]


def render(content: TrainingRecord, manifest: ModelManifest, points: ExplanationRecord | None = None) -> str:
    """Renders the report.

    Args:
        content: the content of `training.json`.
        manifest: the manifest of the model's bundle.
        points: the `Explanation` with single rows, as JSON values; None leaves its pictures out.
    """
    report = Page(
        header(content, manifest),
        gates(content),
        data(content, manifest),
        search(content, manifest),
        performance(content, manifest, points or {}),
        slices(content, manifest),
        fairness(content),
        inputs(content, points or {}),
        provenance(content, manifest),
    )
    return templates().get_template("report.html.j2").render(report=report)


@functools.cache
def templates() -> jinja2.Environment:
    """The templates, which escape everything that is not marked as HTML, and refuse undefined names."""
    found = jinja2.Environment(
        loader=jinja2.PackageLoader("transforms.reports"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        auto_reload=False,
    )
    found.filters |= {each.__name__: each for each in _FILTERS}
    return found
