"""Draws the picture of `docs/architecture.md` from the imports of the code: `python docs/draw_architecture.py`.

It reads every module by AST, imports inside functions included, and replaces the text between the two markers of the
    page: a Mermaid graph of the packages, and a table of all their imports.  `tests/docs/test_architecture.py` compares
    the page with the imports.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator, Mapping
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "architecture.md"
BEGIN, END = "<!-- drawn by docs/draw_architecture.py: begin -->", "<!-- end -->"
FOLDERS = ("schemas", "transforms", "beam_pipelines")
# A pipeline and its live form share one box.
TOGETHER = {
    "beam_pipelines.features_streaming": "beam_pipelines.features",
    "beam_pipelines.inference_streaming": "beam_pipelines.inference",
}
MODULE_NAME = re.compile(rf"({'|'.join(FOLDERS)})(\.\w+)+(:\w+)?")
LEFT_OUT = {"transforms", "beam_pipelines", "transforms.public_names", "transforms.serving"}

Graph = Mapping[str, frozenset[str]]


def box(module: str) -> str:
    """The box in which a module is drawn; "" if it is in none."""
    parts = module.split(".")
    if parts[0] not in FOLDERS:
        return ""
    if module == "schemas.testing":  # of tests of a definition, which look the kernel up by its name
        return ""
    name = parts[0] if parts[0] == "schemas" else ".".join(parts[:2])
    return "" if name in LEFT_OUT else TOGETHER.get(name, name)


def modules_of(root: Path) -> Iterator[tuple[str, Path]]:
    """Name and file of every module below the folders that are drawn."""
    for folder in FOLDERS:
        for path in sorted((root / folder).rglob("*.py")):
            yield ".".join(path.relative_to(root).with_suffix("").parts).removesuffix(".__init__"), path


def imports_of(tree: ast.AST, package: str) -> Iterator[str]:
    """Every name that a module imports, absolute; `package` is the package from which its relative imports start."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package.split(".")[: len(package.split(".")) + 1 - node.level] if node.level else []
            above = ".".join([*base, *([node.module] if node.module else [])])
            yield from (f"{above}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and MODULE_NAME.fullmatch(node.value):
            yield node.value.partition(":")[0]  # for import_module, such as in the table of commands


def read_graph(root: Path = ROOT) -> Graph:
    """Box → the boxes that it imports."""
    graph: dict[str, set[str]] = {}
    for module, path in modules_of(root):
        if not (here := box(module)):
            continue
        package = module if path.name == "__init__.py" else module.rpartition(".")[0]
        found = {box(name) for name in imports_of(ast.parse(path.read_text(encoding="utf-8")), package)}
        graph.setdefault(here, set()).update(found - {"", here})
    return {name: frozenset(found) for name, found in graph.items()}


def reaches(graph: Mapping[str, set[str]], start: str, end: str) -> bool:
    """Whether a path leads from one box to another."""
    seen, waiting = set[str](), [start]
    while waiting:
        for name in graph[waiting.pop()] - seen:
            if name == end:
                return True
            seen.add(name)
            waiting.append(name)
    return False


def reduced(graph: Graph) -> Graph:
    """The graph without the arrows that follow from others, so that it can be read."""
    left = {name: set(found) for name, found in graph.items()}
    for name in sorted(graph):
        for other in sorted(graph[name]):
            left[name].discard(other)
            if not reaches(left, name, other):
                left[name].add(other)
    return {name: frozenset(found) for name, found in left.items()}


def identifier(name: str) -> str:
    """A box's name as Mermaid accepts it: dots and slashes have a meaning there."""
    return name.replace(".", "_")


def draw(graph: Graph) -> str:
    """The Mermaid graph and the table of all imports, as Markdown."""
    lines = ["```mermaid", "graph TD"]
    for folder in reversed(FOLDERS):
        lines.append(f'    subgraph {folder}_folder["{folder}/"]')
        lines += [
            f'        {identifier(name)}["{name.rpartition(".")[2]}"]'
            for name in sorted(graph)
            if name.startswith(folder)
        ]
        lines.append("    end")
    few = reduced(graph)
    lines += [f"    {identifier(name)} --> {identifier(other)}" for name in sorted(few) for other in sorted(few[name])]
    lines += ["```", "", "| package | imports |", "|---|---|"]
    lines += [
        f"| `{name}` | {', '.join(f'`{each}`' for each in sorted(graph[name])) or 'none'} |" for name in sorted(graph)
    ]
    return "\n".join(lines)


def with_picture(page: str, picture: str) -> str:
    """The page with the picture between its markers."""
    before, _, rest = page.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n{picture}\n{END}{after}"


if __name__ == "__main__":
    PAGE.write_text(with_picture(PAGE.read_text(encoding="utf-8"), draw(read_graph())), encoding="utf-8")
