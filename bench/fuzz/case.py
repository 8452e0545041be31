"""One case: which entry point, which kind of damage, the number that decides all else; and what can come of it."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from bench.fuzz.given import Given

Mutate = Callable[[random.Random, bytes], bytes]
"""(source of randomness, a whole file) -> a damaged one."""


SAME = "same answer"  # the damage does not matter, or was undone
DIFFERENT = "another answer"  # still a valid file, which says something else
REFUSED = "refused"  # one clear line, status 2
FINE = (SAME, DIFFERENT, REFUSED)

ESCAPED = "exception"  # anything but this project's own errors, or a message that is no single line
CRASH = "crash"  # the process died
HANG = "hang"  # it took longer than the limit
MEMORY = "memory"  # it took more memory than the limit
WRONG = "wrong answer"  # accepted where a check should have refused it
LEFTOVER = "leftover"  # something half-written stayed behind
FAULTS = (ESCAPED, CRASH, HANG, MEMORY, WRONG, LEFTOVER)

# A crash inside an engine library, on a graph whose hashes were forged together with it: counted apart.
LIBRARY_CRASH = "library's crash"


@dataclass(frozen=True)
class Outcome:
    """Of one case."""

    verdict: str  # one of `FINE`, of `FAULTS`, or `LIBRARY_CRASH`
    message: str = ""  # the line that was told, or what went wrong
    mebibytes: float = 0.0  # how far resident memory rose meanwhile, at its peak
    seconds: float = 0.0  # how long it took


class FaultError(Exception):
    """What an entry point did that it must not.

    Attributes:
        verdict: One of `FAULTS`.
    """

    def __init__(self, verdict: str, message: str) -> None:
        super().__init__(message)
        self.verdict = verdict


class RefusedError(Exception):
    """An entry point refused a file in one clear line, which is the message."""


@dataclass(frozen=True)
class Case:
    """One damaged file at one entry point."""

    entry: str  # name of the entry point
    kind: str  # name of the damage
    number: int  # counts the cases of that entry point and kind
    seed: int  # of the campaign

    @property
    def key(self) -> str:
        """What tells it from the others of a campaign."""
        return f"{self.entry}|{self.kind}|{self.number}"

    def random(self) -> random.Random:
        """Gives the same numbers whenever and wherever the case is run."""
        return random.Random(f"{self.seed}|{self.key}")


@dataclass(frozen=True)
class Entry:
    """An entry point, and how files for it are damaged.

    Attributes:
        place: (given, folder, content) -> puts the damaged file where `run` finds it.
        run: (given, folder) -> whether the answer is the one that whole files give. Raises `RefusedError` for a
            refusal, `FaultError` for what must not be; whatever else it raises is a fault too.
        forged: Whether every check that is there to be passed was passed on purpose, so that a crash is the
            library's.
    """

    name: str  # what it is
    kinds: Mapping[str, Mutate]  # name of a damage -> what does it
    whole: Callable[[Given, random.Random], bytes]  # (given, source of randomness) -> a whole file to be damaged
    place: Callable[[Given, Path, bytes], object]
    run: Callable[[Given, Path], bool]
    weight: float = 1.0  # how many cases it gets, beside the others' weights
    forged: bool = False


def entry_of_file(
    name: str, kinds: Mapping[str, Mutate], file: str, run: Callable[[Given, Path], bool], weight: float = 1.0
) -> Entry:
    """An entry point that reads one of the whole files, by its name."""
    return Entry(name, kinds, lambda given, _: (given.folder / file).read_bytes(),
                 lambda _, folder, content: (folder / file).write_bytes(content), run, weight)  # fmt: skip
