"""The command of a campaign: options that all share, errors as one line, cases that run one after the other."""

from __future__ import annotations

import functools
import inspect
import os
import shlex
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any, NoReturn, get_type_hints

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # threads that spin would take the cores of whose turn it is

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from bench.harness.state import State
from tocom.runtime.errors import GateError, InputError

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "bench" / "results"
_INTERRUPTED = 130
_TELL_S = 10.0  # between two lines about how far it is, where there is no terminal

Seed = Annotated[int, typer.Option(help="Decides everything random.")]
Again = Annotated[bool, typer.Option("--again", help="Run once more what did not pass.")]
Tell = Callable[..., None]
"""tell(text, done=None): what is going on, and how many cases are done."""


@dataclass(frozen=True)
class Places:
    """Where a campaign keeps what."""

    work: Path  # what is finished, and files on the way
    page: Path  # what is read

    @property
    def results(self) -> Path:
        """The numbers that the page is written from."""
        return self.page.with_suffix(".json")

    @property
    def state(self) -> Path:
        """What is finished."""
        return self.work / "state.jsonl"


@dataclass(frozen=True)
class Common:
    """Options that all campaigns share: a command that has a parameter `common` has them, see `main`."""

    out: Annotated[
        Path | None, typer.Option(help="The page; numbers and pictures go beside it. Default: in bench/results.")
    ] = None
    work: Annotated[
        Path | None, typer.Option(help="What is finished, and files on the way. Default: below build/bench.")
    ] = None
    fresh: Annotated[bool, typer.Option("--fresh", help="Begin anew instead of going on.")] = False
    quick: Annotated[
        bool, typer.Option("--quick", help="Little of everything: whether it runs. Its page lies in --work.")
    ] = False
    report_only: Annotated[
        bool, typer.Option("--report-only", help="Measure nothing: write the page from the numbers beside it.")
    ] = False

    def places(self, name: str) -> Places:
        """Where a campaign of that name keeps what; what is quick is kept apart, so that no result is made of it."""
        work = self.work or ROOT / "build" / "bench" / name
        work = work / "quick" if self.quick else work
        return Places(work, self.out or (work if self.quick else RESULTS) / f"{name}.md")


COMMON = Common()


def _spelled_out(command: Callable[..., None]) -> Callable[..., None]:
    """A command with the shared options in place of its parameter `common`."""
    own = inspect.signature(command, eval_str=True).parameters
    if "common" not in own:
        return command
    shared = {field.name: field.default for field in fields(Common)}
    hints = {name: each.annotation for name, each in own.items() if name != "common"}
    hints |= get_type_hints(Common, include_extras=True)
    defaults = {name: own[name].default if name in own else shared[name] for name in hints}

    @functools.wraps(command)
    def run(**given: Any) -> None:
        command(**{name: given[name] for name in own if name != "common"},
                common=Common(**{name: given[name] for name in shared}))  # fmt: skip

    run.__annotations__ = hints
    run.__signature__ = inspect.Signature([
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=defaults[name], annotation=hint)
        for name, hint in hints.items()
    ])  # fmt: skip
    return run


def command_line() -> str:
    """The command as it was given."""
    spec = sys.modules["__main__"].__spec__
    return shlex.join(["python", "-m", spec.parent if spec else "bench", *sys.argv[1:]])


def main(name: str, *commands: Callable[..., None], arguments: list[str] | None = None) -> NoReturn:
    """Runs one of some commands; what goes wrong is one line on stderr.

    Args:
        name: Stands in front of that line.
        commands: Their docstrings are the help.
        arguments: In place of those of the process.

    Raises:
        SystemExit: Always; 0 done, 1 something measured is not as it must be, 2 something given cannot be used.
    """
    app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)
    for command in commands:
        app.command()(_spelled_out(command))
    # as Ctrl-C, so that nothing started is left behind
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        status = app(arguments, standalone_mode=False)
        if status == _INTERRUPTED:  # what typer makes of Ctrl-C
            _complain(name, "interrupted; the same command goes on", status)
    except typer.TyperException as error:
        status = _complain(name, error.format_message(), 2)
    except InputError as error:
        status = _complain(name, error, 2)
    except GateError as error:
        status = _complain(name, error, 1)
    finally:
        signal.signal(signal.SIGTERM, before)
    raise SystemExit(status if isinstance(status, int) else 0)


def _complain(name: str, message: object, status: int) -> int:
    print(f"{name}: {' '.join(str(message).split())}", file=sys.stderr)
    return status


@contextmanager
def progress(total: int | None, text: str = "") -> Iterator[Tell]:
    """Tells on stderr how far it is: a bar on a terminal, elsewhere a line now and then."""
    console, last = Console(stderr=True), 0.0
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    # a terminal that is drawn often would take the cores of what is measured
    with Progress(*columns, console=console, disable=not console.is_terminal, refresh_per_second=1) as shown:
        task = shown.add_task(text, total=total)

        def tell(text: str, done: int | None = None) -> None:
            nonlocal last
            shown.update(task, description=text, completed=done)
            if not console.is_terminal and (done in (None, total) or time.monotonic() - last > _TELL_S):
                last = time.monotonic()
                console.print(text if done is None else f"{done} of {total}: {text}", markup=False, highlight=False)

        yield tell


def run_cases(state: State, cases: Mapping[str, Callable[[], Any]]) -> dict[str, Any]:
    """Runs the cases that are not in the state yet, and keeps what each returns.

    Returns:
        The results of these cases, in their order.
    """
    with progress(len(cases)) as tell:
        for done, (name, run) in enumerate(cases.items()):
            if name not in state.results:
                began = time.monotonic()
                tell(f"{name} ({done + 1} of {len(cases)}) ...")
                state.keep(name, run())
                tell(f"{name} took {time.monotonic() - began:.0f} s")
    return {name: state.results[name] for name in cases}


def names(option: str, text: str, known: Mapping[str, Any] | tuple[str, ...]) -> list[str]:
    """Names parted by commas; all where there are none.

    Raises:
        InputError: One is not known.
    """
    found = [name for name in text.split(",") if name]
    for name in found:
        if name not in known:
            raise InputError(f"--{option} must be some of {', '.join(known)}, got {name!r}")
    return found or list(known)


def numbers(option: str, text: str, low: int = 0) -> tuple[int, ...]:
    """Whole numbers parted by commas.

    Raises:
        InputError: One is not, or is too small.
    """
    try:
        found = tuple(map(int, text.split(",")))
    except ValueError:
        found = (low - 1,)
    if min(found) < low:
        raise InputError(f"--{option} must be numbers of {low} or more parted by commas, got {text!r}.")
    return found


def matching(option: str, text: str, known: Mapping[str, Any] | tuple[str, ...]) -> list[str]:
    """Names that have a text in them, whatever the case.

    Raises:
        InputError: None has.
    """
    found = [name for name in known if text.lower() in name.lower()]
    if not found:
        raise InputError(f"--{option} must be part of one of {', '.join(known)}, got {text!r}")
    return found
