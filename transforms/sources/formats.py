"""The formats of files, which their names tell."""

from __future__ import annotations

PARQUET, CSV, JSON = "parquet", "csv", "json"
_SUFFIXES = {".parquet": PARQUET, ".csv": CSV, ".tsv": CSV, ".jsonl": JSON, ".ndjson": JSON, ".json": JSON}
# As text, a file may be compressed as a whole.
GZIP = ".gz"
SUFFIXES = (*_SUFFIXES, *(f"{suffix}{GZIP}" for suffix, kind in _SUFFIXES.items() if kind != PARQUET))
NAMED = ".parquet, .csv, .tsv, .jsonl, .ndjson or .json, text also with .gz"


def format_of(path: str) -> str | None:
    """The format of a file, in letters of any case; None if its name tells none."""
    name = path.casefold()
    if name.endswith(GZIP):
        name = name[: -len(GZIP)]
        return next((kind for suffix, kind in _SUFFIXES.items() if name.endswith(suffix) and kind != PARQUET), None)
    return next((kind for suffix, kind in _SUFFIXES.items() if name.endswith(suffix)), None)


def is_text(path: str) -> bool:
    return format_of(path) in (CSV, JSON)


def without_suffix(name: str) -> str:
    """A file's name without what tells its format."""
    suffix = max((each for each in SUFFIXES if name.casefold().endswith(each)), key=len, default="")
    return name[: len(name) - len(suffix)]
