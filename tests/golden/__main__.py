"""Golden values anew: shows what is another one now, and with --write keeps that.

python -m tests.golden [--write]
"""

from __future__ import annotations

from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from tests.golden.values import FILE, Difference, changed_versions, compute, differences, read, write


def table(found: list[Difference]) -> Table:
    """Old, new and the relative difference of everything that differs."""
    shown = Table(title="golden values")
    for name in ("value", "old", "new", "relative difference"):
        shown.add_column(name, justify="left" if name == "value" else "right", overflow="fold")
    for each in found:
        relative = "" if each.relative is None else f"{each.relative:.1e}"
        shown.add_row(each.where, _text(each.old), _text(each.new), relative)
    return shown


def _text(value: Any) -> str:
    return "-" if value is None else str(value)


def main(
    write_them: Annotated[bool, typer.Option("--write", help="Keep the values as they are now.")] = False,
) -> None:
    """Compares golden values with what they are now; exit status 1 if any differs and is not kept.

    Raises:
        Exit: With that status.
    """
    console, now = Console(), compute()
    before = read() if FILE.exists() else {"versions": {}, "values": {}}
    found = differences(before["values"], now)
    for line in changed_versions(before["versions"]):
        console.print(line, markup=False, highlight=False)
    if found:
        console.print(table(found))
    if write_them:
        write(now)
        console.print(f"wrote {FILE.name}: {len(found)} values differ from before", highlight=False)
    elif found:
        console.print(f"{len(found)} values differ: --write keeps them", highlight=False)
        raise typer.Exit(1)
    else:
        console.print("no difference")


if __name__ == "__main__":
    typer.run(main)
