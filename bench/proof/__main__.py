"""python -m bench.proof: see --help."""

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

import tocom.runtime.errors

app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)
_INTERRUPTED = 130


@app.command()
def proof(
    models: Annotated[int, typer.Option(min=1, help="How many random models.")] = 500,
    seed: Annotated[int, typer.Option(help="Decides everything random.")] = 0,
    work: Annotated[Path, typer.Option(help="Where finished models are kept.")] = Path("build/bench/proof"),
    out: Annotated[Path, typer.Option(help="The page; the picture is put beside it.")] = Path("bench/results/proof.md"),
    jobs: Annotated[int, typer.Option(min=1, help="Processes that prove models.")] = 1,
    fresh: Annotated[bool, typer.Option("--fresh", help="Begin anew instead of going on.")] = False,
) -> None:
    """Compile random healthy models and prove them: every gate that one of them does not hold is a false alarm.

    The same command goes on where it stopped. Exit status: 0 no alarm, 1 an alarm, 2 bad input.
    """  # noqa: DOC501 - it is the text of --help
    from bench.proof.campaign import run
    from bench.proof.page import write_page
    from bench.proof.state import Record, State

    kept = work / f"models-{seed}.jsonl"
    if fresh:
        kept.unlink(missing_ok=True)
    state, console = State.load(kept), Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal) as shown:
        task = shown.add_task("0 alarms", total=models)

        def progress(done: int, alarms: list[Record]) -> None:
            shown.update(task, completed=done, description=f"{len(alarms)} alarms")
            if not console.is_terminal and done % 25 == 0:
                console.print(f"{done} models, {len(alarms)} alarms")

        records = run(state, models=models, seed=seed, progress=progress, jobs=jobs)
    command = shlex.join(["python", "-m", "bench.proof", *sys.argv[1:]])
    alarms = write_page(out, records, command=command)
    for record in alarms:
        console.print(f"model {record['drawn']['number']}: {'; '.join(record['faults'])}", markup=False)
    console.print(f"{len(records)} models, {len(alarms)} alarms: {out}", markup=False)
    if alarms:
        raise typer.Exit(1)


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
    print(f"proof: {' '.join(str(message).split())}", file=sys.stderr)
    return status


if __name__ == "__main__":
    main()
