"""Tables of the result pages."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence


def table(columns: Sequence[str], rows: Iterable[Sequence[str]], text: Collection[str] = ()) -> str:
    """A table in Markdown.

    Args:
        columns: Their names.
        rows: One cell per column each.
        text: Columns that are aligned to the left; the others, numbers, to the right.
    """
    rule = "|" + "|".join("---" if name in text else "---:" for name in columns) + "|"
    lines = ["| " + " | ".join(cells) + " |" for cells in (columns, *rows)]
    return "\n".join([lines[0], rule, *lines[1:]])


def spread(quartiles: Sequence[float] | None, form: str) -> str:
    """A median with its quartiles, each in a format; nothing where there is none.

    >>> spread((0.9, 1, 1.2), "{:.1f}x")
    '1.0x (0.9x to 1.2x)'
    """
    if quartiles is None:
        return ""
    low, middle, high = map(form.format, quartiles)
    return f"{middle} ({low} to {high})"
