"""One case: which entry point, which kind of damage, and the number that decides everything random about it."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from bench.fuzz.given import Given

Mutate = Callable[[random.Random, bytes], bytes]
"""(source of randomness, a whole file) -> a damaged one."""


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
