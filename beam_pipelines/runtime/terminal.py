"""Text for terminals: a table if it fits, otherwise a paragraph per row."""

from __future__ import annotations

import shutil
import textwrap
from collections.abc import Sequence

from beam_pipelines.runtime.protection import printable


def terminal_width() -> int:
    """Columns of the terminal; 160 without one."""
    return shutil.get_terminal_size((160, 24)).columns


def columns(
    head: Sequence[str],
    rows: Sequence[Sequence[str]],
    right: Sequence[str] = (),
    width: int | None = None,
    indent: int = 2,
) -> str:
    """Format `rows` under `head`, each column as wide as its longest text.

    Args:
        head: names of the columns.
        rows: the texts of each row; columns without any text are left out.
        right: names of the columns that are right-aligned.
        width: width of the terminal; None means `terminal_width()`.  If the rows do not fit, each becomes a paragraph.
        indent: number of spaces before each line.
    """
    width = terminal_width() if width is None else width
    rows = [[" ".join(printable(slot).split("\n")) for slot in row] for row in rows]
    empty = [i for i in range(1, len(head)) if not any(row[i] for row in rows)]
    head = [name for i, name in enumerate(head) if i not in empty]
    rows = [[slot for i, slot in enumerate(row) if i not in empty] for row in rows]
    wide = [max(len(row[i]) for row in [head, *rows]) for i in range(len(head))]
    pad = " " * indent
    if indent + sum(wide) + 2 * (len(wide) - 1) <= width:
        lines = [
            "  ".join(
                slot.rjust(size) if name in right else slot.ljust(size)
                for name, slot, size in zip(head, row, wide, strict=True)
            )
            for row in [head, *rows]
        ]
        return "\n".join(pad + line.rstrip() for line in lines)
    blocks = []
    for row in rows:
        texts = [_record(name, slot) for name, slot in zip(head[1:], row[1:], strict=True) if slot]
        blocks.append(
            "\n".join([pad + row[0], wrapped(", ".join(texts), indent + 4, width)]) if texts else pad + row[0]
        )
    return "\n".join(blocks)


# Columns whose values need no name beside them in a paragraph.
_PLAIN = ("bytes", "type", "how", "why", "use")


def _record(name: str, slot: str) -> str:
    """A value with its column's name: `3,000 rows`, `version 2`, `1.2 MB`."""
    if name in _PLAIN:
        return slot
    if name.endswith("s") and slot[0].isdigit() and "–" not in slot:
        return f"{slot} {name.removesuffix('s') if slot == '1' else name}"
    return f"{name} {slot}"


def wrapped(text: str, indent: int = 2, width: int | None = None, hanging: int = 0) -> str:
    """Wrap `text` to the terminal's width; words longer than a line are not broken, so that they can be copied."""
    width = terminal_width() if width is None else width
    return textwrap.fill(
        text,
        max(width, indent + hanging + 20),
        initial_indent=" " * indent,
        subsequent_indent=" " * (indent + hanging),
        break_long_words=False,
        break_on_hyphens=False,
    )


def many(count: int, what: str) -> str:
    """A count with its noun.

    >>> many(1, "file"), many(2000, "file")
    ('1 file', '2,000 files')
    """
    return f"{count:,} {what}" if count == 1 else f"{count:,} {what}s"


def format_size(count: int) -> str:
    """Bytes as people read them.

    >>> format_size(1_234_567)
    '1.2 MB'
    """
    value, unit = float(count), "B"
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if value < 1000:
            break
        if unit != "TB":
            value /= 1000
    return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
