"""Running a command inside this process, and judging how it answers a damaged file."""

from __future__ import annotations

import os
import re
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.fuzz.case import ESCAPED, LEFTOVER, FaultError, RefusedError
from tocom.runtime.errors import InputError, readable

_LONGEST = 2000  # characters of a line that somebody is to read
# what infer tells beside errors
_ASIDE = re.compile(r"^infer: (degree \d+ was not faster|images go on|\d+ images?, (degree|cascade))")
_STAGES = ("loading", "r=", "measuring", "calibrating", "choosing", "note: ")


@dataclass(frozen=True)
class Answer:
    """What a command left behind."""

    status: int  # its exit status
    out: str  # what it printed
    err: str  # what it, and every library in it, said on stderr


def run_tocom(*arguments: object) -> Answer:
    """Runs `tocom` as its own process would, refusing what is left of one that ran before."""
    from tocom.export.cli import __main__ as cli

    def run() -> int:
        before, sys.argv = sys.argv, ["tocom", *map(str, arguments)]
        try:
            cli.main()
        except SystemExit as left:
            return left.code or 0
        finally:
            sys.argv = before
        raise AssertionError("tocom always leaves by SystemExit")

    return _captured(run)


def run_infer(*arguments: object) -> Answer:
    """Runs `runtime/infer.py`."""
    from tocom.runtime.infer import main

    return _captured(lambda: main(list(map(str, arguments))))


def refusing(run: Callable[[Any, Path], bool]) -> Callable[[Any, Path], bool]:
    """Makes a refusal of what refuses by an exception that the commands print as one line."""

    def told(given: Any, folder: Path) -> bool:
        try:
            return run(given, folder)
        except InputError as error:
            raise RefusedError(require_clear(readable(" ".join(str(error).split())))) from error

    return told


def judge(answer: Answer, folder: Path | None = None) -> str:
    """Checks that a command ended well or refused clearly.

    Returns:
        What it printed, where it ended well.
    """
    left = [file.name for file in folder.rglob(".*.tmp")] if folder is not None and folder.exists() else []
    if left:
        raise FaultError(LEFTOVER, f"{left[0]} was left")
    lines = [line for line in answer.err.splitlines() if line.strip()]
    told = [line for line in lines if line.startswith(("tocom: ", "infer: "))]
    noise = [line for line in lines if line not in told and not line.startswith(_STAGES)]
    if "Traceback" in answer.err or answer.status not in (0, 1, 2):
        raise FaultError(ESCAPED, f"status {answer.status}: {lines[-1] if lines else 'nothing said'}")
    if noise:
        raise FaultError(ESCAPED, f"status {answer.status}, and a library said: {noise[0]}")
    if answer.status == 0:
        return answer.out
    reasons = [line for line in told if not _ASIDE.search(line)]
    if not reasons:
        raise FaultError(ESCAPED, f"status {answer.status}, and nothing was said of why")
    raise RefusedError(require_clear(reasons[0].partition(": ")[2]))


def require_clear(message: str) -> str:
    """Checks what a user is told."""
    if "\n" in message.strip() or not message.strip():
        raise FaultError(ESCAPED, f"a message must be one line, got {message!r:.200}")
    if len(message) > _LONGEST:
        raise FaultError(ESCAPED, f"a message must be readable, got {len(message)} characters: {message[:100]}")
    if any(ord(letter) < 32 for letter in message):
        raise FaultError(ESCAPED, f"a message must not steer the terminal, got {message!r:.200}")
    return message


def _captured(run: Callable[[], int]) -> Answer:
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        with _instead(1, out.fileno()), _instead(2, err.fileno()):
            status = run()
        out.seek(0)
        err.seek(0)
        return Answer(status, out.read().decode(errors="replace"), err.read().decode(errors="replace"))


@contextmanager
def _instead(descriptor: int, other: int) -> Iterator[None]:
    """Sends what is written to a descriptor elsewhere, by libraries in C too."""
    stream = sys.stdout if descriptor == 1 else sys.stderr
    stream.flush()
    kept = os.dup(descriptor)
    os.dup2(other, descriptor)
    try:
        yield
    finally:
        stream.flush()
        os.dup2(kept, descriptor)
        os.close(kept)
