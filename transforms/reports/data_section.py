"""The parts of a training report about what went in: splits, drift, inputs that are suspicious, the search."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any

import numpy as np

from schemas.models import RISING
from schemas.splits import SPLITS
from transforms.reports import charts
from transforms.reports.charts import Axis
from transforms.reports.markup import (  # fmt: skip
    DASH,
    Markup,
    day,
    details,
    figure,
    given,
    join,
    named,
    note,
    number,
    percent,
    section,
    shown,
    table,
    tag,
    text,
)

Content = Mapping[str, Any]
# Columns of drift, trials and points of a learning curve that are drawn.
COLUMNS, TRIALS, ROUNDS = 15, 60, 160


def data(content: Content, manifest: Content) -> Markup:
    """Splits, what was left out, where it was read, drift and warnings."""
    found = content["data"]
    warnings = [tag("li", each) for each in found["warnings"]]
    return section(
        "data", "Data",
        tag("div", tag("h3", "Look at these first"), tag("ul", *warnings), class_="callout warn") if warnings else None,
        timeline(manifest), splits(content, manifest), tag("h3", "Where it was read"), origin(manifest), drift(content),
    )  # fmt: skip


def splits(content: Content, manifest: Content) -> Markup:
    """Rows of each split, and what became of the others."""
    bounds, rows, kinds = _bounds(manifest), [], content.get("labels") or {}
    positive = manifest["objective"] == "binary:logistic"
    for name in SPLITS:
        count, seen = content["splits"][name], {float(key): n for key, n in kinds.get(name, {}).items()}
        share = percent(seen.get(1.0, 0) / count["entered"]) if positive and count["entered"] else None
        rows.append([
            name, tag("span", bounds.get(name, DASH), class_="keep"), number(count["rows"]), number(count["waiting"]), number(count["dropped"]), number(count["entered"]),
            *([share] if positive else []),
        ])  # fmt: skip
    heads = ["Split", "Dates (UTC)", "Rows", "Waiting", "No label", "Examples", *(["Positive"] if positive else [])]
    waiting = sum(each["waiting"] for each in content["splits"].values())
    outside = content["outside"]
    return join([
        table(heads, rows, "Rows of each split", range(2, 7)),
        note(
            "Of ", number(content["feature_rows"]), " feature rows ", number(outside), " lie in no split (in an embargo, or after the cutoff) and ",
            number(waiting), " wait: their label’s horizon ends after their split does.",
        ),
    ])  # fmt: skip


def _bounds(manifest: Content) -> dict[str, Markup]:
    split = manifest.get("split", {})
    if "groups" in split:
        each = f"groups of {', '.join(split['groups']['by'])}, before "
        return {name: join([each, day(split["cutoff"])]) for name in SPLITS}
    if "validate_start" not in split:
        return {}
    return {
        "train": join(["until ", day(split["train_end"])]),
        "validate": join([day(split["validate_start"]), f" {DASH} ", day(split["validate_end"])]),
        "test": join([day(split["test_start"]), f" {DASH} ", day(split["cutoff"])]),
    }


def timeline(manifest: Content) -> Markup | None:
    """The splits to scale, gaps between them included."""
    split, first = manifest.get("split", {}), (manifest.get("feature_table") or {}).get("first")
    if "validate_start" not in split or first is None:
        return None
    start, end = datetime.fromisoformat(first).replace(tzinfo=UTC), datetime.fromisoformat(split["cutoff"])
    spans = [("train", start, datetime.fromisoformat(split["train_end"]))]
    for name, until in (("validate", "validate_end"), ("test", "cutoff")):
        spans.append((name, datetime.fromisoformat(split[f"{name}_start"]), datetime.fromisoformat(split[until])))
    whole = (end - start) / timedelta(seconds=1)
    if whole <= 0 or spans[0][2] <= start:
        return None
    parts = []
    for name, low, high in spans:
        left, width = (low - start) / timedelta(seconds=1) / whole, (high - low) / timedelta(seconds=1) / whole
        word = f"{name} · {_length(high - low)}"
        parts.append(tag("span", name if width > 0.1 else "", title=word, class_=f"span {name}", style=f"left:{left:.2%};width:{width:.2%}"))  # fmt: skip
    words = ", ".join(f"{name} {_length(high - low)}" for name, low, high in spans)
    ends = tag("div", day(first), day(split["cutoff"]), class_="ends")
    return tag("div", tag("div", *parts, class_="bar"), ends, class_="timeline", role="img", aria_label=f"In order of time: {words}")  # fmt: skip


def _length(span: timedelta) -> str:
    days = span / timedelta(days=1)
    return f"{days:.0f} days" if days >= 2 else f"{days * 24:.0f} hours"


def origin(manifest: Content) -> Markup:
    """Tables and their versions."""
    features, label = manifest.get("feature_table") or {}, manifest.get("label_table") or {}
    rows: list[list[object]] = [["features", _position(features.get("uri", DASH)), _version(features), f"fingerprint {manifest['fingerprint']}"]]  # fmt: skip
    files = manifest.get("label_files") or []
    rows.append(
        ["label", _position(label.get("uri", DASH)), _version(label), f"{_files(len(files))} read" if files else ""]
    )
    for name, each in (manifest.get("sources") or {}).items():
        words = [_files(each["files"]) if each.get("files") else "a dimension"]
        words += [join([day(each["first"]), f" {DASH} ", day(each["last"])])] if each.get("first") else []
        what = join([tag("span", word, class_="keep") for word in words], ", ")
        rows.append([name, "source of the features", text(each.get("digest", DASH)), what])
    return join([
        table(["Read", "From", "Version or digest", ""], rows, "Tables read and their versions"),
        note("A source’s digest is of the files that the feature table’s newest commit read: equal digests, equal files."),
    ])  # fmt: skip


def _files(count: int) -> str:
    return f"{count:,} file" + ("s" if count > 1 else "")


def _position(uri: object) -> Markup:
    return tag("code", str(uri).removeprefix("file://").rstrip("/"))


def _version(known: Content) -> str:
    return "files without versions" if known.get("version") is None else f"version {known['version']}"


def drift(content: Content) -> Markup:
    """How far columns moved, from the champion's training data and from training to test."""
    found, most = content["data"], (content.get("rules") or {}).get("max_drift")
    moved, skew = found["drift"], found["skew"]
    if not moved and not skew:
        return note("No column could be compared.")
    order = sorted({*moved, *skew}, key=lambda name: (-max(moved.get(name, 0.0), skew.get(name, 0.0)), name))
    x = Axis.over(
        [0.0, *moved.values(), *skew.values(), *([most] if most else []), 0.1], "0 same … 1 nothing in common", ticks=4
    )
    limit = charts.upright(x, most, "limit") if most is not None and moved else Markup("")

    def row(name: str) -> list[object]:
        marks = [charts.bar(x, skew[name], "second", 0.3 if moved else 0.5)] if name in skew else []
        if name in moved:
            marks.insert(0, charts.bar(x, moved[name], "first", 0.7))
        cells: list[object] = [named(name), charts.strip(x, *marks, limit, height=18)]
        return [*cells, *([number(moved.get(name), 3)] if moved else []), number(skew.get(name), 3)]

    heads = ["Column", charts.scale(x), *(["From champion’s"] if moved else []), "Test from training"]
    whole = table(heads, [row(name) for name in order[:COLUMNS]], "Drift of columns", (2, 3))
    rest = details(f"{len(order) - COLUMNS} more columns", table(heads, [row(name) for name in order[COLUMNS:]], "Drift of further columns", (2, 3))) if len(order) > COLUMNS else None  # fmt: skip
    against = (
        f"Compared with the training data of version {found['champion']}, the champion at launch."
        if moved else "There is no champion to compare the training data with; shown is how the test split differs from the training split."
    )  # fmt: skip
    keys = charts.legend(("first", f"training data against version {found['champion']}’s"), ("second", "test against training")) if moved else None  # fmt: skip
    method = "Jensen" + DASH + "Shannon divergence of numbers, greatest change of a value’s share of strings."
    return join([tag("h3", "Drift"), note(against, " ", method), keys, whole, rest])


def search(content: Content, manifest: Content) -> Markup:
    """Trials as a table, their learning curves, and the metric by parameter."""
    trials, metric = content["trials"], manifest["metric"]
    worked = [each for each in trials if not each["error"] and each["value"] is not None]
    if not worked:
        return section("search", "Search", note("No trial is recorded."))
    last = max(each["rung"] for each in worked)
    sign = -1 if metric in RISING else 1
    best = min(
        (each for each in worked if each["rung"] == last), key=lambda each: (sign * each["value"], each["trial"])
    )
    varied = [name for name in trials[0]["params"] if len({str(each["params"].get(name)) for each in trials}) > 1]
    failed = len(trials) - len(worked)
    said = [f"{len(trials)} trials" if len(trials) > 1 else "One trial, no search"]
    said += [f"{failed} of which failed"] if failed else []
    text_ = note(
        ", ".join(said), ". Kept: trial ", number(best["trial"]), " with ", number(best["rounds"]), " rounds, validation ", words(metric), " ",
        number(best["value"]), ".",
    )  # fmt: skip
    pictures = [curves(worked, best, metric)] + [
        by_parameter(name, worked, best, metric) for name in varied if _numbers(name, worked)
    ]
    return section("search", "Search", text_, tag("div", *[each for each in pictures[:7] if each], class_="grid"), trial_table(trials, best, varied, metric))  # fmt: skip


def trial_table(trials: Sequence[Content], best: Content, varied: Sequence[str], metric: str) -> Markup:
    """Every trial, the best first, failed ones last with their reason."""
    sign = -1 if metric in RISING else 1

    def merit(each: Content) -> tuple[bool, int, float, int]:
        return each["value"] is None, -each["rung"], sign * (each["value"] or 0.0), each["trial"]

    ordered = sorted(trials, key=merit)
    halved, folds = any(each["rung"] for each in trials), max((len(each["folds"]) for each in trials), default=0)
    names = varied or list(trials[0]["params"])
    heads = ["Trial", f"Validation {words(metric)}", "Rounds", *names, *(["Rung"] if halved else []), *(["Folds"] if folds else []), "Seconds", ""]  # fmt: skip

    def row(each: Content) -> list[object]:
        state: object = (
            tag("span", "failed: ", each["error"], class_="bad") if each["error"] else ("kept" if each is best else "")
        )
        given = [_parameter(each["params"].get(name)) for name in names]
        rung = [number(each["rung"])] if halved else []
        parts = [join([number(value) for value in each["folds"]], ", ")] if folds else []
        return [number(each["trial"]), number(each["value"]), number(each["rounds"]), *given, *rung, *parts, number(each["seconds"], 3), state]  # fmt: skip

    numeric = range(len(heads) - 1)
    kinds = ["best" if each is best else "" for each in ordered]
    first = table(heads, [row(each) for each in ordered[:12]], "Trials, the best first", numeric, kinds[:12])
    if len(ordered) <= 12:
        return first
    return join([first, details(f"{len(ordered) - 12} more trials", table(heads, [row(each) for each in ordered[12:]], "Further trials", numeric))])  # fmt: skip


def _parameter(value: Any) -> Markup:
    if isinstance(value, int | float) and not isinstance(value, bool):
        return given(value)
    return text(DASH if value is None else value)


def curves(worked: Sequence[Content], best: Content, metric: str) -> Markup:
    """The metric on validation after each round, thinned."""
    chosen = [best, *[each for each in worked if each is not best][: TRIALS - 1]]
    thin = {}
    for each in chosen:
        history = np.array([math.nan if value is None else value for value in each["history"]], np.float64)
        at = (
            np.unique(np.linspace(0, len(history) - 1, min(len(history), ROUNDS)).astype(int))
            if len(history)
            else np.zeros(0, int)
        )
        at = at[np.isfinite(history[at])]
        thin[each["trial"]] = at + 1.0, history[at]
    values = np.concatenate([found for _, found in thin.values()])
    if not len(values):
        return Markup("")
    # The first rounds are far from the rest, and say little.
    low, high = np.quantile(values, [0.02, 1.0] if metric in RISING else [0.0, 0.98])
    x = Axis.over([1.0, *(float(at.max()) for at, _ in thin.values() if len(at))], "boosting rounds")
    y = Axis.over([low, high], f"validation {words(metric)}", pad=0.04)
    lines = [
        charts.line(x, y, at, found, "thin solid") for trial, (at, found) in thin.items() if trial != best["trial"]
    ]
    at, found = thin[best["trial"]]
    end = charts.dots(x, y, [best["rounds"]], [best["history"][best["rounds"] - 1]], "big first", [f"trial {best['trial']}, round {best['rounds']}: {shown(best['value'])}"]) if best["history"] else Markup("")  # fmt: skip
    label = f"Validation {words(metric)} by boosting round; the best trial ends at {shown(best['value'])} after {best['rounds']} rounds"
    keys = charts.legend(("first", f"trial {best['trial']}, kept"), *([("thin solid", "others")] if lines else []))
    return figure("Learning curves", charts.plot(label, x, y, *lines, charts.line(x, y, at, found, "first"), end), keys)


def _numbers(name: str, worked: Sequence[Content]) -> bool:
    values = [each["params"].get(name) for each in worked]
    return len(set(map(str, values))) > 1 and all(
        isinstance(value, int | float) and not isinstance(value, bool) for value in values
    )


def by_parameter(name: str, worked: Sequence[Content], best: Content, metric: str) -> Markup:
    """The metric of each trial against one of its parameters; in steps of factors where values span more than 20."""
    values = [float(each["params"][name]) for each in worked]
    found = [each["value"] for each in worked]
    log = min(values) > 0 and max(values) / min(values) > 20
    x, y = Axis.over(values, name, log=log, pad=0.05), Axis.over(found, f"validation {words(metric)}", pad=0.08)
    titles = [f"trial {each['trial']}: {shown(each['value'])}" for each in worked]
    marks = charts.dots(x, y, values, found, "second", titles)
    chosen = charts.dots(
        x, y, [float(best["params"][name])], [best["value"]], "big first", [f"trial {best['trial']}, kept"]
    )
    return figure(
        tag("code", name),
        charts.plot(f"Validation {words(metric)} of {len(worked)} trials by {name}", x, y, marks, chosen),
    )


NAMES = {"auc": "AUC", "rmse": "RMSE", "mae": "MAE", "brier": "Brier score", "macro_auc": "macro AUC"}


def words(metric: str) -> str:
    """A metric's name for reading."""
    return NAMES.get(metric, metric.replace("_", " "))
