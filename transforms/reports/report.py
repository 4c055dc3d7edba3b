"""A training run's report: one HTML file that needs nothing else, made of what `training.json` says."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

from transforms.reports.data_section import data, search, words
from transforms.reports.inputs_section import explanation
from transforms.reports.markup import (
    DASH,
    Markup,
    chip,
    details,
    estimate,
    join,
    named,
    note,
    number,
    section,
    table,
    tag,
    text,
)
from transforms.reports.performance_section import performance
from transforms.reports.slices_section import groups, slices
from transforms.reports.style import STYLE

Content = Mapping[str, Any]
FILE = "report.html"


def render(content: Content, manifest: Content, points: Content | None = None) -> str:
    """The report.

    Args:
        content: what `training.json` says.
        manifest: of the model's bundle.
        points: the `Explanation` with single rows, as JSON values; None leaves its pictures out.
    """
    content = {**content, "points": points}
    parts = [
        gates(content), data(content, manifest), search(content, manifest), performance(content, manifest),
        slices(content, manifest), groups(content), explanation(content), provenance(content, manifest),
    ]  # fmt: skip
    known = [each for each in parts if each is not None]
    title = f"{content['model']}: training report"
    head = Markup(
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1"><meta name="color-scheme" content="light dark">'
        f"<title>{text(title)}</title><style>{STYLE}</style></head>"
    )
    body = tag("main", header(content, manifest), contents(known), *known)
    foot = tag("footer", "Millrace ", manifest.get("code_version", ""), " · made from ", tag("code", "training.json"), " of run ", tag("code", manifest.get("run_id", "")))  # fmt: skip
    return f"{head}{tag('body', body, foot)}</html>\n"


_TITLES = {"gates": "Gates", "data": "Data", "search": "Search", "performance": "Performance", "slices": "Slices", "fairness": "Fairness", "inputs": "Inputs", "provenance": "Provenance"}  # fmt: skip


def contents(parts: list[Markup]) -> Markup:
    """Links to the sections there are."""
    links = [
        tag("a", word, href=f"#{anchor}")
        for anchor, word in _TITLES.items()
        if any(f'id="{anchor}"' in each[:200] for each in parts)
    ]
    return tag("nav", *links, aria_label="Sections")


def outcome(content: Content) -> tuple[str, str, str]:
    """(kind, title, why) of what became of the model."""
    version, champion = content.get("model_version"), content.get("champion")
    failed = [each for each in content["gates"] if not each["holds"]]
    now = f"The champion is version {champion}." if champion else "There is no champion."
    if version is None:
        return (
            "wait",
            "Not registered",
            "The registry was not reached when this page was written. The model is kept on disk: millrace register.",
        )
    if failed:
        more = f", and {len(failed) - 1} more of {len(content['gates'])} gates" if len(failed) > 1 else ""
        why = f"Failed: {failed[0]['gate']} ({failed[0]['reason']}){more}. {now}"
        return "fail", "Registered, not champion", why
    if content.get("kept"):
        return "wait", "Registered, not champion", f"Every gate holds, but {content['kept']}"
    if champion != version:
        return "wait", "Registered, not champion", f"Every gate holds; another version was promoted since. {now}"
    held = "Every gate holds" if content["gates"] else "There are no gates"
    rival = content["rival"]
    if rival["version"] is None or rival["version"] == version:
        return "pass", "Champion", f"{held}, and there was no champion to beat."
    challenge = next((each for each in content["gates"] if "beats the champion" in each["gate"]), None)
    against = f": {challenge['reason']}" if challenge else ""
    return "pass", "Champion", f"{held}; it takes over from version {rival['version']}{against}."


def header(content: Content, manifest: Content) -> Markup:
    kind, title, why = outcome(content)
    version = content.get("model_version")
    at = (manifest.get("read") or {}).get("now")
    moment = (
        [
            " · ",
            tag(
                "time",
                f"{(when := datetime.fromtimestamp(at / 1e6, UTC)).day} {when:%b %Y, %H:%M} UTC",
                datetime=when.isoformat(),
            ),
        ]
        if at
        else []
    )
    metric, splits = manifest["metric"], content["splits"]
    value = content["metrics"].get(metric)
    judged, idle = content["gates"], sum(not each["judged"] for each in content["gates"])
    tiles = [
        ("main", words(metric) + ", test", estimate(value, content["intervals"].get(metric))), ("", "Examples: train", number(splits["train"]["entered"])),
        ("", "validate", number(splits["validate"]["entered"])), ("", "test", number(splits["test"]["entered"])), ("", "Boosting rounds", number(content["rounds"])),
        ("", "Gates that hold", join([number(sum(each["holds"] for each in judged)), " of ", number(len(judged)), tag("span", f" {idle:,} not judged", class_="ci") if idle else ""])),
    ]  # fmt: skip
    return tag(
        "header", tag("p", "Training report", *moment, class_="eyebrow"),
        tag("h1", named(content["model"]), tag("small", f" version {version}" if version else " no version yet")),
        tag("p", manifest["objective"], " on view ", tag("code", manifest["view"]), class_="sub"),
        tag("div", tag("p", title, class_="title"), tag("p", why), class_=f"verdict {kind}", role="status"),
        tag("dl", *(tag("div", tag("dt", word), tag("dd", each), class_=f"tile {kind}") for kind, word, each in tiles), class_="tiles"),
    )  # fmt: skip


def gates(content: Content) -> Markup:
    """Verdicts: those that failed first, those with nothing to judge by apart."""
    found = content["gates"]
    if not found:
        return section("gates", "Gates", note("None are declared: every model becomes champion."))

    def row(each: Content) -> list[object]:
        verdict = (
            chip("not judged", "none")
            if not each["judged"]
            else chip("holds", "pass")
            if each["holds"]
            else chip("fails", "fail")
        )
        return [named(each["gate"]), verdict, each["reason"]]

    heads = ["Gate", "Verdict", "What was seen"]
    judged = sorted((each for each in found if each["judged"]), key=lambda each: each["holds"])
    others = [each for each in found if not each["judged"]]
    enough = max(8, sum(not each["holds"] for each in judged))
    first, more = judged[:enough], judged[enough:]
    parts = (
        [table(heads, [row(each) for each in first], "Gates and their verdicts")]
        if first
        else [note("No gate had anything to judge by.")]
    )
    parts += (
        [details(f"{len(more)} more that hold", table(heads, [row(each) for each in more], "Further gates"))]
        if more
        else []
    )
    parts += (
        [
            details(
                f"{len(others)} not judged",
                table(heads, [row(each) for each in others], "Gates with nothing to judge by"),
            )
        ]
        if others
        else []
    )
    return section("gates", "Gates", *parts)


def provenance(content: Content, manifest: Content) -> Markup:
    """What it takes to make the same model again."""
    definition = manifest.get("definition") or {}
    rows = [
        ["run", manifest.get("run_id", DASH)], ["bundle", content["bundle"]], ["definition", f"{definition.get('name', DASH)}, SHA-256 {definition.get('sha256', DASH)}"],
        ["code", f"{manifest.get('code_version', DASH)}, SHA-256 {manifest.get('code_sha256', DASH)}"], ["packages, SHA-256", manifest.get("constraints_sha256", DASH)],
        ["environment", ", ".join(f"{name} {version}" for name, version in (manifest.get("environment") or {}).items())],
        ["cores, device, seed", f"{manifest.get('cores', DASH)}, {manifest.get('device', DASH)}, {manifest.get('seed', DASH)}"],
        ["parameters", ", ".join(f"{name} {value}" for name, value in manifest.get("params", {}).items()) or DASH],
    ]  # fmt: skip
    again = f"millrace retrain {content['model_version']}" if content.get("model_version") else None
    how = note("The same model, to the last bit: ", tag("code", again)) if again else None
    shown = [[name, tag("code", value)] for name, value in rows]
    source = (
        details("The definition", tag("pre", tag("code", definition["source"]), tabindex="0"))
        if definition.get("source")
        else None
    )
    return section(
        "provenance", "Provenance", how, table(["What", "Which"], shown, "What the model was made of"), source
    )
