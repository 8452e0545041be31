"""python -m bench.fuzz: see --help."""

from __future__ import annotations

import os
import shlex
import sys
from pathlib import Path
from typing import Annotated

# threads that spin while they wait would only fight the other processes
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

import tocom.runtime.errors
from bench.fuzz.outcome import FAULTS, LIBRARY_CRASH, Outcome
from bench.fuzz.tables import COLUMNS, by_entry, total

app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)
_INTERRUPTED = 130
_LIMITS = "30 s of processor time, 300 s by the clock and 2 GiB of memory for a case"


@app.command()
def fuzz(
    cases: Annotated[int, typer.Option(min=1, help="How many, over all entry points.")] = 5000,
    seconds: Annotated[float, typer.Option(help="Stop after this long.")] = 720.0,
    seed: Annotated[int, typer.Option(help="Decides everything random.")] = 0,
    only: Annotated[str, typer.Option(help="Entry points with this in their names, like 'image'.")] = "",
    out: Annotated[Path, typer.Option(help="The page.")] = Path("bench/results/fuzz.md"),
    work: Annotated[
        Path, typer.Option(help="Whole files, what is finished, and files that bring faults to light.")
    ] = Path("build/fuzz"),
    fresh: Annotated[bool, typer.Option("--fresh", help="Begin anew instead of going on.")] = False,
    again: Annotated[bool, typer.Option("--again", help="Run the cases once more that were faulty.")] = False,
) -> None:
    """Damage real files and feed them to every entry point: each must refuse in one clear line, or answer rightly.

    The same command goes on where it stopped. Exit status: 0 no fault, 1 a fault, 2 bad input.
    """  # noqa: DOC501 - it is the text of --help
    from bench.fuzz.campaign import run
    from bench.fuzz.page import write_page
    from bench.fuzz.registry import ENTRIES
    from bench.fuzz.state import State

    if not any(only.lower() in name.lower() for name in ENTRIES):
        raise tocom.runtime.errors.InputError(f"--only must be part of one of {', '.join(ENTRIES)}, got {only!r}")
    kept = work / f"state-{seed}.jsonl"
    if fresh:
        kept.unlink(missing_ok=True)
    state, console = State.load(kept), Console(stderr=True)
    if again:
        state.forget_faults()
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal) as shown:
        task = shown.add_task("making whole files", total=cases)

        def progress(done: int, taken: float, outcomes: dict[str, Outcome]) -> None:
            text = f"{total(outcomes).faults} faults"
            shown.update(task, completed=done, description=text)
            if not console.is_terminal and done % 250 == 0:
                console.print(f"{done} cases, {taken:.0f} s, {text}")

        run(work, state, count=cases, seconds=seconds, seed=seed, only=only, progress=progress)
    command = shlex.join(["python", "-m", "bench.fuzz", *sys.argv[1:]])
    write_page(out, state.outcomes, command=command, seconds=state.seconds, seed=seed, limits=_LIMITS)
    _print(state.outcomes)
    if total(state.outcomes).faults:
        raise typer.Exit(1)


def _print(outcomes: dict[str, Outcome]) -> None:
    shown = Table(title="damaged files")
    for name in ("entry point", "cases", *COLUMNS, "MiB"):
        shown.add_column(name, justify="left" if name == "entry point" else "right",
                         style="red" if name in FAULTS else "yellow" if name == LIBRARY_CRASH else "")  # fmt: skip
    for name, row in sorted(by_entry(outcomes).items()):
        shown.add_row(name, *row.cells(), f"{row.mebibytes:.0f}")
    shown.add_section()
    shown.add_row("all", *total(outcomes).cells(), f"{total(outcomes).mebibytes:.0f}")
    console = Console()
    (console if console.is_terminal else Console(width=200)).print(shown)


def main() -> None:
    """Runs the command; what goes wrong is one line on stderr.

    Raises:
        SystemExit: Always.
    """
    try:
        status = app(sys.argv[1:], standalone_mode=False)
    except typer.Exit as leave:
        raise SystemExit(leave.exit_code) from None
    except typer.TyperException as error:
        status = _complain(error.format_message(), 2)
    except tocom.runtime.errors.InputError as error:
        status = _complain(error, 2)
    except (KeyboardInterrupt, typer.Abort):
        status = _complain("interrupted; the same command goes on", _INTERRUPTED)
    raise SystemExit(status if isinstance(status, int) else 0)


def _complain(message: object, status: int) -> int:
    print(f"fuzz: {' '.join(str(message).split())}", file=sys.stderr)
    return status


if __name__ == "__main__":
    main()
