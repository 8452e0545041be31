"""What the command prints: tables, stages as they come, and one line for what went wrong."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from tocom.runtime.errors import readable


def open_console(*, stderr: bool = False) -> Console:
    """A console that is wide enough for a table where the output is no terminal."""
    console = Console(stderr=stderr, highlight=False)
    return console if console.is_terminal else Console(stderr=stderr, highlight=False, width=140)


@contextmanager
def stages(total: int | None) -> Iterator:
    """Shows stages as they come: a bar on a terminal, a line each elsewhere."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    console = open_console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("starting", total=total)

        def notify(degree: int | None, stage: str) -> None:
            text = stage if degree is None else f"r={degree}: {stage}"
            progress.update(task, description=text)
            if stage in ("done", "reused", "FAILED"):
                progress.advance(task)
            if not console.is_terminal:
                console.print(text)

        yield notify


def complain(message: object) -> None:
    """Prints one line on stderr, whatever the message holds.

    Of several processes that meet the same, only the first speaks; what one meets in the middle of a training is its
    own.
    """
    torch = sys.modules.get("torch")
    if os.environ.get("RANK", "0") != "0" and not (torch and torch.distributed.is_initialized()):
        return
    print(f"tocom: {readable(' '.join(str(message).split()))}", file=sys.stderr)
