"""What commands print: tables, stages as they come, progress, and one line for what went wrong."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from tocom.runtime.errors import readable

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress

_ENDED = ("done", "reused", "FAILED")  # stages that a degree ends with


def open_console(*, stderr: bool = False) -> Console:
    """A console that is wide enough for a table where the output is no terminal."""
    from rich.console import Console

    console = Console(stderr=stderr, highlight=False)
    return console if console.is_terminal else Console(stderr=stderr, highlight=False, width=140)


def open_progress(*, remaining: bool = False) -> Progress:
    """A bar on stderr, where that is a terminal; it goes when the work is done.

    Args:
        remaining: Whether steps are alike, so that the time that is left can be told.
    """
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        SpinnerColumn,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = [SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(),
               TimeElapsedColumn()]  # fmt: skip
    console = open_console(stderr=True)
    return Progress(*columns, *([TimeRemainingColumn()] if remaining else []), console=console, transient=True,
                    disable=not console.is_terminal)  # fmt: skip


@contextmanager
def stages(total: int | None) -> Iterator[Callable[[int | None, str], None]]:
    """Shows stages as they come: a bar on a terminal, a line each elsewhere."""
    with open_progress() as progress:
        task = progress.add_task("starting", total=total)

        def notify(degree: int | None, stage: str) -> None:
            text = stage if degree is None else f"r={degree}: {stage}"
            progress.update(task, description=text)
            if stage in _ENDED:
                progress.advance(task)
            if not progress.console.is_terminal:
                progress.console.print(text)

        yield notify


@contextmanager
def progress_bar(first: str) -> Iterator[Callable[[str, int, int], None]]:
    """Shows how much of a work of equal steps is done, on a terminal; tell it (what, done, of how many)."""
    with open_progress(remaining=True) as progress:
        task = progress.add_task(first, total=None)
        yield lambda text, done, total: progress.update(task, description=text, completed=done, total=total)


def complain(message: object) -> None:
    """Prints one line on stderr, whatever the message holds.

    Of several processes that meet the same, only the first speaks; what one meets in the middle of a training is its
    own.
    """
    torch = sys.modules.get("torch")
    if os.environ.get("RANK", "0") != "0" and not (torch and torch.distributed.is_initialized()):
        return
    print(f"tocom: {readable(' '.join(str(message).split()))}", file=sys.stderr)
