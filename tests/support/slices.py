"""The row groups of a source."""

from __future__ import annotations

from transforms.sources.contracts import Contract
from transforms.sources.inventory import Slice, survey_source


def slices_of(root: str, contract: Contract, version: int | None = None) -> list[Slice]:
    return survey_source(root, contract, version)[1]
