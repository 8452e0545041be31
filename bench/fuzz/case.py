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
    """One damaged file at one entry point.

    Attributes:
        entry: Name of the entry point.
        kind: Name of the damage.
        number: Counts the cases of that entry point and kind.
        seed: Of the campaign.
    """

    entry: str
    kind: str
    number: int
    seed: int

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
        name: What it is.
        kinds: Name of a damage -> what does it.
        whole: (given, source of randomness) -> a whole file to be damaged.
        place: (given, folder, content) -> puts the damaged file where `run` finds it.
        run: (given, folder) -> whether the answer is the one that whole files give. Raises `RefusedError` for a
            refusal, `FaultError` for what must not be; whatever else it raises is a fault too.
        weight: How many cases it gets, beside the others' weights.
        forged: Whether every check that is there to be passed was passed on purpose, so that a crash is the library's.
    """

    name: str
    kinds: Mapping[str, Mutate]
    whole: Callable[[Given, random.Random], bytes]
    place: Callable[[Given, Path, bytes], object]
    run: Callable[[Given, Path], bool]
    weight: float = 1.0
    forged: bool = False


def entry_of_file(
    name: str, kinds: Mapping[str, Mutate], file: str, run: Callable[[Given, Path], bool], weight: float = 1.0
) -> Entry:
    """An entry point that reads one of the whole files, by its name."""
    return Entry(name, kinds, lambda given, _: (given.folder / file).read_bytes(),
                 lambda _, folder, content: (folder / file).write_bytes(content), run, weight)  # fmt: skip
