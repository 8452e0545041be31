"""python -m bench.serving: see --help."""

from __future__ import annotations

import os
import shlex
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

os.environ.setdefault("OMP_NUM_THREADS", "1")  # the local engine must not take the server's core
os.environ.setdefault("GRPC_VERBOSITY", "NONE")  # it remarks on every process that is started

import typer
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

import tocom.runtime.errors

app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)
_INTERRUPTED = 130

Engines = Annotated[Path, typer.Option(help="Folder of a family of the digits example, degree 0 among it.")]
Images = Annotated[Path, typer.Option(help="Labelled sheets: one folder per class.")]
Work = Annotated[Path, typer.Option(help="What is finished, logs, and copies of the family.")]
Fresh = Annotated[bool, typer.Option("--fresh", help="Begin anew instead of going on.")]
Seed = Annotated[int, typer.Option(help="Decides everything random.")]
_ENGINES, _IMAGES, _WORK = Path("engines/digits"), Path("examples/digits/sheets"), Path("build/serving")


@app.command()
def load(
    engines: Engines = _ENGINES,
    images: Images = _IMAGES,
    objective_ms: Annotated[float, typer.Option(help="Of the 99th percentile.")] = 100.0,
    request: Annotated[int, typer.Option(min=1, help="Images in a request.")] = 16,
    seconds: Annotated[float, typer.Option(min=1, max=180, help="For each measurement.")] = 60.0,
    trial_s: Annotated[float, typer.Option(min=1, help="For each step of the search for what r=0 sustains.")] = 15.0,
    max_queue: Annotated[int, typer.Option(min=1, help="Images that may wait, in every server.")] = 96,
    workers: Annotated[int, typer.Option(min=0, help="Of every server.")] = 1,
    server_cores: Annotated[str, typer.Option(help="Of the server, like 0 or 0,1. The generator has the rest.")] = "",
    seed: Seed = 0,
    out: Annotated[Path, typer.Option(help="The page.")] = Path("bench/results/serving.md"),
    work: Work = _WORK,
    fresh: Fresh = False,
) -> None:
    """Offer 0.5x to 4x of what r=0 sustains to fixed r=0, fixed most compressed, and adaptive; then a step of load.

    The same command goes on where it stopped. Exit status: 0 all claims hold, 1 one does not, 2 bad input.
    """
    from dataclasses import asdict

    from bench.serving.load import LoadOptions, LoadTest
    from bench.serving.load_page import verdicts, write_load_page
    from bench.serving.state import State
    from bench.serving.subject import Subject

    cores = {"server_cores": tuple(int(core) for core in server_cores.split(","))} if server_cores else {}
    options = LoadOptions(objective_ms, request, seconds, trial_s, max_queue, workers, seed=seed, **cores)
    state = State.load(work / "load.json", {**asdict(options), "family": _hash(engines)}, fresh=fresh)
    subject = Subject(engines, images)
    with _telling() as tell:
        LoadTest(subject, options, state, work / "load", tell).run()
    write_load_page(out, state.results, options, max(subject.expected), _command())
    _end(verdicts(state.results, options))


@app.command()
def faults(
    engines: Engines = _ENGINES,
    images: Images = _IMAGES,
    only: Annotated[str, typer.Option(help="Cases with this in their names.")] = "",
    malformed: Annotated[int, typer.Option(min=1, help="Malformed requests.")] = 10_000,
    seconds: Annotated[float, typer.Option(min=1, help="Of steady traffic around a fault.")] = 12.0,
    seed: Seed = 0,
    out: Annotated[Path, typer.Option(help="The page.")] = Path("bench/results/serving-faults.md"),
    work: Work = _WORK,
    fresh: Fresh = False,
    again: Annotated[bool, typer.Option("--again", help="Run the cases once more that did not pass.")] = False,
) -> None:
    """Break things under steady traffic: every valid request gets a right answer or a clear refusal, none is lost.

    The same command goes on where it stopped. Exit status: 0 every case passes, 1 one does not, 2 bad input.
    """
    from bench.serving.faults import FaultOptions, run_faults
    from bench.serving.faults_page import fault_verdicts, write_faults_page
    from bench.serving.state import State
    from bench.serving.subject import Subject

    options = FaultOptions(seconds=seconds, malformed=malformed, seed=seed)
    settings = {"malformed": malformed, "seconds": seconds, "seed": seed, "family": _hash(engines)}
    state = State.load(work / "faults.json", settings, fresh=fresh)
    if again:
        state.results = {name: each for name, each in state.results.items() if each["passed"] or each["skipped"]}
    with _telling() as tell:
        run_faults(Subject(engines, images), options, state, work / "faults", only, tell)
    soaked = work / "soak.json"
    write_faults_page(out, state.results, soaked if soaked.exists() else None, _command())
    _end(fault_verdicts(state.results))


@app.command()
def soak(
    engines: Engines = _ENGINES,
    images: Images = _IMAGES,
    minutes: Annotated[float, typer.Option(min=0.1, help="How long.")] = 10.0,
    seed: Seed = 0,
    out: Annotated[Path, typer.Option(help="The page.")] = Path("bench/results/serving-faults.md"),
    work: Work = _WORK,
) -> None:
    """Valid and malformed requests, reloads and killed workers for minutes: memory, files and threads stay flat.

    Exit status: 0 all claims hold, 1 one does not, 2 bad input.
    """
    from bench.serving.faults_page import soak_verdicts, write_faults_page
    from bench.serving.soak import run_soak
    from bench.serving.state import State
    from bench.serving.subject import Subject

    state = State.load(work / "soak.json", {"minutes": minutes, "seed": seed, "command": _command()}, fresh=True)
    with _telling() as tell:
        result = run_soak(Subject(engines, images), minutes, seed, work / "soak", tell)
    state.keep("soak", result)
    kept = work / "faults.json"
    write_faults_page(out, _results(kept), state.file, "python -m bench.serving faults")
    _end(soak_verdicts(result))


def _results(file: Path) -> dict:
    import json

    return json.loads(file.read_text())["results"] if file.exists() else {}


def _hash(engines: Path) -> str:
    from tocom.runtime.files import sha256_file

    file = engines / "family.json"
    if not file.is_file():
        raise tocom.runtime.errors.InputError(
            f"there is no family in {tocom.runtime.errors.one_line(engines)}: give --engines"
        )
    return sha256_file(file)


def _command() -> str:
    return shlex.join(["python", "-m", "bench.serving", *sys.argv[1:]])


def _end(lines: list[str]) -> None:
    console = Console()
    for line in lines:
        console.print(line, style="green" if line.startswith("PASS") else "red", soft_wrap=True, highlight=False)
    if not all(line.startswith(("PASS", "SKIPPED")) for line in lines):
        raise typer.Exit(1)


@contextmanager
def _telling() -> Iterator[Callable[[str], None]]:
    console = Console(stderr=True)
    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    # a terminal that is drawn often would take the generator's core
    with Progress(*columns, console=console, disable=not console.is_terminal, refresh_per_second=1) as shown:
        task = shown.add_task("opening the local engine", total=None)

        def tell(text: str) -> None:
            shown.update(task, description=text)
            if not console.is_terminal:
                console.print(text, highlight=False)

        yield tell


def main() -> None:
    """Runs the command; what goes wrong is one line on stderr.

    Raises:
        SystemExit: Always.
    """
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C, so that no server is left behind
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
    print(f"serving: {' '.join(str(message).split())}", file=sys.stderr)
    return status


if __name__ == "__main__":
    main()
